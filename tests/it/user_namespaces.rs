//! Pods whose root is nobody on the host.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1::{self as cri, NamespaceMode};
use longshore_tests::{
    images::{ImageBuilder, LayerBuilder},
    pods::{
        Bench, MAPPED_GID, MAPPED_UID, container, host_network_pod, id_map, options, pod, read_log,
        script, security, user_namespace, wait_for,
    },
};
use tonic::Code;

const UID: u32 = MAPPED_UID;
const GID: u32 = MAPPED_GID;

fn mapped(mut config: cri::PodSandboxConfig) -> cri::PodSandboxConfig {
    options(&mut config).userns_options = Some(user_namespace());
    config
}

fn inside(mut config: cri::ContainerConfig) -> cri::ContainerConfig {
    security(&mut config)
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(user_namespace());
    config
}

fn volume(host_path: &Path, container_path: &str) -> cri::Mount {
    cri::Mount {
        host_path: host_path.to_string_lossy().into_owned(),
        container_path: container_path.to_owned(),
        ..Default::default()
    }
}

fn mapped_volume(host_path: &Path, container_path: &str) -> cri::Mount {
    cri::Mount {
        uid_mappings: id_map(UID),
        gid_mappings: id_map(GID),
        ..volume(host_path, container_path)
    }
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let found = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    Ok((found.uid(), found.gid()))
}

async fn pid(bench: &mut Bench, container: &str) -> Result<u64> {
    let request = cri::ContainerStatusRequest {
        container_id: container.to_owned(),
        verbose: true,
    };
    let status = bench.runtime.container_status(request).await?.into_inner();
    let info: serde_json::Value = serde_json::from_str(status.info.get("info").context("info")?)?;
    info["pid"].as_u64().context("a pid")
}

/// What `container` wrote, on the host.
fn upper(bench: &Bench, container: &str) -> PathBuf {
    let containers = bench.node.data_dir().join("containers");
    containers.join(container).join("upper")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn root_of_a_pod_is_root_inside_and_nobody_outside() -> Result<()> {
    let mut bench = Bench::start().await?;
    let layer = LayerBuilder::new().file("secret", 0o600, "of root").build();
    let toolbox = longshore_tests::images::toolbox_layer()?;
    let image = ImageBuilder::new(vec![toolbox, layer]).build();
    bench.offer("mapped:1", &image).await?;
    let image = bench.registry.reference("mapped:1");
    let mut config = mapped(pod("inside"));
    config.linux.get_or_insert_default().sysctls = [
        ("net.ipv4.ip_unprivileged_port_start", "7"),
        ("kernel.shmmni", "99"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let pod = bench.run(config).await?;
    let main = container("main", &image, &["sleep", "10000"]);
    let id = bench.launch(&pod, inside(main)).await?;
    for (text, expected) in [
        (
            "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '",
            " 0 200000 65536\n 0 300000 65536\n",
        ),
        ("id -u; id -g", "0\n0\n"),
        (
            "stat -c '%u %g' / /bin /secret /tmp /etc /dev /dev/shm",
            "0 0\n0 0\n0 0\n0 0\n0 0\n0 0\n0 0\n",
        ),
        (
            "cat /secret; echo more >>/secret; cat /secret",
            "of rootof rootmore\n",
        ),
        ("hostname; cat /etc/hostname", "inside\ninside\n"),
        ("echo more >>/etc/hosts && tail -n1 /etc/hosts", "more\n"),
        (
            "echo x >/dev/null; head -c2 /dev/zero | wc -c; echo x >/dev/full || echo full",
            "2\nfull\n",
        ),
        (
            "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni",
            "7\n99\n",
        ),
        (
            "touch /new && chown 1000:2000 /new && stat -c '%u %g' /new",
            "1000 2000\n",
        ),
        ("echo s >/dev/shm/x && cat /dev/shm/x", "s\n"),
        ("echo again >/proc/self/fd/1", "again\n"),
        ("mknod /n c 1 3 2>/dev/null || echo refused", "refused\n"),
        ("cat /proc/1/uid_map | tr -s ' '", " 0 200000 65536\n"),
        ("ls /sys/class/net | sort | tr '\\n' ' '", "eth0 lo "),
        (
            "echo 1 2>/dev/null >/proc/sys/kernel/panic || echo refused",
            "refused\n",
        ),
        ("cat /proc/self/oom_score_adj", "0\n"),
    ] {
        assert_eq!(bench.exec_ok(&id, text).await?, expected, "{text}");
    }
    // Sharing a mount is not, what is on disk belongs to whom the kernel says.
    let upper = upper(&bench, &id);
    assert_eq!(owner(&upper)?, (UID, GID));
    assert_eq!(owner(&upper.join("new"))?, (UID + 1000, GID + 2000));
    assert_eq!(owner(&upper.join("secret"))?, (UID, GID));
    // Layers are as they were unpacked.
    for layer in fs::read_dir(bench.node.data_dir().join("layers"))? {
        for file in fs::read_dir(layer?.path())? {
            assert_eq!(owner(&file?.path())?, (0, 0));
        }
    }
    // It is what the host says, too, and no process of it is the host's root.
    let pid = pid(&mut bench, &id).await?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for ids in [
        format!("Uid:{}", format!("\t{UID}").repeat(4)),
        format!("Gid:{}", format!("\t{GID}").repeat(4)),
    ] {
        assert!(status.contains(&ids), "{status}");
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_the_map_and_the_support() -> Result<()> {
    let mut bench = Bench::start().await?;
    let status = bench.runtime.status(cri::StatusRequest::default()).await?;
    let status = status.into_inner();
    let features = status
        .runtime_handlers
        .iter()
        .filter(|one| ["", "native"].contains(&one.name.as_str()))
        .map(|one| one.features.unwrap_or_default());
    assert!(features.clone().all(|one| one.user_namespaces));
    let pod = bench.run(mapped(pod("told"))).await?;
    let told = bench.pod_status(&pod).await?;
    let told = told
        .linux
        .and_then(|linux| linux.namespaces)
        .and_then(|namespaces| namespaces.options)
        .and_then(|options| options.userns_options);
    assert_eq!(told, Some(user_namespace()));
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn volumes_are_mapped_only_where_that_is_asked() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(mapped(pod("volumes"))).await?;
    let dir = bench.node.dir().join("volume");
    fs::create_dir(&dir)?;
    for (name, mode) in [("secret", 0o600), ("shown", 0o644)] {
        fs::write(dir.join(name), "of the host's root")?;
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode))?;
    }
    let mut config = inside(container("main", &toolbox, &["sleep", "10000"]));
    config.mounts = vec![
        mapped_volume(&dir, "/mapped"),
        volume(&dir, "/plain"),
        mapped_volume(&dir.join("shown"), "/file"),
    ];
    let id = bench.launch(&pod, config).await?;
    for (text, expected) in [
        (
            "stat -c '%u %g' /mapped /mapped/secret /file",
            "0 0\n0 0\n0 0\n",
        ),
        ("cat /mapped/secret", "of the host's root"),
        (
            "touch /mapped/new; chown 7:8 /mapped/new; mkdir /mapped/dir",
            "",
        ),
        (
            "stat -c '%u %g' /plain /plain/secret",
            "65534 65534\n65534 65534\n",
        ),
        ("cat /plain/shown", "of the host's root"),
        ("cat /plain/secret 2>/dev/null || echo refused", "refused\n"),
        (
            "chmod 644 /plain/secret 2>/dev/null || echo refused",
            "refused\n",
        ),
        (
            "chown 0 /plain/secret 2>/dev/null || echo refused",
            "refused\n",
        ),
        (
            "echo x 2>/dev/null >>/plain/shown || echo refused",
            "refused\n",
        ),
        ("touch /plain/mine 2>/dev/null || echo refused", "refused\n"),
        (
            "rm -f /plain/shown 2>/dev/null || echo refused",
            "refused\n",
        ),
    ] {
        assert_eq!(bench.exec_ok(&id, text).await?, expected, "{text}");
    }
    assert_eq!(owner(&dir.join("new"))?, (7, 8));
    assert_eq!(owner(&dir.join("dir"))?, (0, 0));
    // What can't be mapped is told by name before anything is made.
    let mut config = inside(container("proc", &toolbox, &["true"]));
    config.mounts = vec![mapped_volume(Path::new("/proc"), "/p")];
    let error = bench.create(&pod, config).await.expect_err("proc can't");
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("proc at /proc"), "{error:?}");
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn what_comes_from_images_has_the_owners_that_it_has_there() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = longshore_tests::images::toolbox_layer()?;
    let base = LayerBuilder::new()
        .dir("data")
        .file("data/secret", 0o600, "of root")
        .build();
    let top = LayerBuilder::new().file("top", 0o600, "top").build();
    let image = ImageBuilder::new(vec![toolbox, base, top])
        .set("Volumes", serde_json::json!({"/data": {}}))
        .build();
    bench.offer("owners:1", &image).await?;
    let reference = bench.registry.reference("owners:1");
    let pod = bench.run(mapped(pod("owners"))).await?;
    let image_mount = |container_path: &str, sub_path: &str| cri::Mount {
        container_path: container_path.to_owned(),
        readonly: true,
        image: Some(cri::ImageSpec {
            image: reference.clone(),
            ..Default::default()
        }),
        image_sub_path: sub_path.to_owned(),
        ..Default::default()
    };
    let mut config = inside(container("main", &reference, &["sleep", "10000"]));
    config.mounts = vec![image_mount("/many", ""), image_mount("/one", "data")];
    let id = bench.launch(&pod, config).await?;
    for (text, expected) in [
        (
            "stat -c '%u %g' /many /many/top /one/secret /data /data/secret",
            "0 0\n0 0\n0 0\n0 0\n0 0\n",
        ),
        (
            "cat /many/top /one/secret /data/secret",
            "topof rootof root",
        ),
        ("touch /many/x 2>/dev/null || echo read-only", "read-only\n"),
        ("touch /one/x 2>/dev/null || echo read-only", "read-only\n"),
        (
            "touch /data/x && chown 5:6 /data/x && stat -c '%u %g' /data/x",
            "5 6\n",
        ),
    ] {
        assert_eq!(bench.exec_ok(&id, text).await?, expected, "{text}");
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn users_terminals_and_limits_are_those_of_the_namespace() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(mapped(pod("users"))).await?;
    let show = "id -u; id -g; tty; stat -c %u \"$(tty)\"; echo x >/dev/tty; stty size; \
        grep -E '^(CapEff|CapBnd|Seccomp:|Groups)' /proc/self/status";
    let mut config = inside(script("user", &toolbox, &format!("{show}; sleep 10000")));
    config.tty = true;
    let context = security(&mut config);
    context.run_as_user = Some(cri::Int64Value { value: 1000 });
    context.run_as_group = Some(cri::Int64Value { value: 1001 });
    context.supplemental_groups = vec![65_535];
    let id = bench.launch(&pod, config).await?;
    let log = PathBuf::from(bench.status(&id).await?.log_path);
    wait_for("the whole output", async || {
        Ok(read_log(&log).is_ok_and(|log| {
            log.lines
                .iter()
                .any(|line| line.text.starts_with("Seccomp"))
        }))
    })
    .await?;
    let lines = read_log(&log)?.lines;
    let text = lines
        .iter()
        .map(|line| line.text.trim_end())
        .collect::<Vec<_>>();
    assert_eq!(
        text[..5],
        ["1000", "1001", "/dev/pts/0", "1000", "x"],
        "{text:?}"
    );
    assert!(text.contains(&"CapEff:\t0000000000000000"), "{text:?}");
    assert!(text.contains(&"Groups:\t1001 50000 65535"), "{text:?}");
    let exec = "id -u; id -g; echo again >/dev/stdout";
    assert_eq!(bench.exec_ok(&id, exec).await?, "1000\n1001\nagain\n");

    let mut config = inside(container("beyond", &toolbox, &["true"]));
    security(&mut config).run_as_user = Some(cri::Int64Value { value: 65_536 });
    let error = bench.create(&pod, config).await.expect_err("not mapped");
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("run_as_user"), "{error:?}");

    // Capabilities are good inside, and worth nothing outside.
    let mut config = inside(container("capable", &toolbox, &["sleep", "10000"]));
    let context = security(&mut config);
    context.capabilities = Some(cri::Capability {
        add_capabilities: vec!["ALL".to_owned()],
        ..Default::default()
    });
    context.seccomp = Some(cri::SecurityProfile {
        profile_type: cri::security_profile::ProfileType::Unconfined.into(),
        localhost_ref: String::new(),
    });
    let capable = bench.launch(&pod, config).await?;
    for (text, expected) in [
        (
            "mkdir /m && mount -t tmpfs none /m && touch /m/x && ls /m",
            "x\n",
        ),
        ("hostname other && hostname", "other\n"),
        (
            "date -s 2001-01-01 >/dev/null 2>&1 || echo refused",
            "refused\n",
        ),
        (
            "mount -t devtmpfs none /m 2>/dev/null || echo refused",
            "refused\n",
        ),
    ] {
        assert_eq!(bench.exec_ok(&capable, text).await?, expected, "{text}");
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_pids_and_the_hosts_network_work_as_well() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let mut config = mapped(pod("shared"));
    options(&mut config).pid = NamespaceMode::Pod.into();
    let shared = bench.run(config).await?;
    let with_mode = |mut config: cri::ContainerConfig, mode: NamespaceMode, target: &str| {
        let options = security(&mut config)
            .namespace_options
            .get_or_insert_default();
        options.pid = mode.into();
        options.target_id = target.to_owned();
        inside(config)
    };
    let first = container("first", &toolbox, &["sleep", "7777"]);
    let first = bench
        .launch(&shared, with_mode(first, NamespaceMode::Pod, ""))
        .await?;
    let second = container("second", &toolbox, &["sleep", "8888"]);
    let second = bench
        .launch(&shared, with_mode(second, NamespaceMode::Pod, ""))
        .await?;
    let own = container("own", &toolbox, &["sleep", "9999"]);
    let own = bench
        .launch(&shared, with_mode(own, NamespaceMode::Container, ""))
        .await?;
    let target = container("target", &toolbox, &["sleep", "10000"]);
    let target = bench
        .launch(&shared, with_mode(target, NamespaceMode::Target, &own))
        .await?;
    let seen = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
    for (id, sees, not) in [
        (&second, "sleep 7777", "sleep 9999"),
        (&target, "sleep 9999", "sleep 7777"),
    ] {
        let seen = bench.exec_ok(id, seen).await?;
        assert!(seen.contains(sees) && !seen.contains(not), "{seen}");
    }
    assert_eq!(
        bench
            .exec_ok(
                &first,
                "cat /proc/1/comm; stat -c %u /proc/1; ls /proc/1/root 2>/dev/null || echo refused"
            )
            .await?,
        "pod-init\n0\nrefused\n"
    );
    bench.stop_container(&first, 0).await?;
    bench.remove(&shared).await?;

    let host = bench.run(mapped(host_network_pod("host"))).await?;
    let id = container("main", &toolbox, &["sleep", "10000"]);
    let id = bench.launch(&host, inside(id)).await?;
    for (text, expected) in [
        ("cat /proc/self/uid_map | tr -s ' '", " 0 200000 65536\n"),
        ("ls /sys/class/net | grep lo", "lo\n"),
        (
            "echo x 2>/dev/null >/sys/kernel/mm/ksm/run || echo refused",
            "refused\n",
        ),
    ] {
        assert_eq!(bench.exec_ok(&id, text).await?, expected, "{text}");
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_killed_agent_finds_the_pod_again() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(mapped(pod("found"))).await?;
    let main = container("main", &toolbox, &["sleep", "10000"]);
    let id = bench.launch(&pod, inside(main)).await?;
    bench.crash().await?;
    assert_eq!(
        bench.exec_ok(&id, "id -u; cat /etc/hostname").await?,
        "0\nfound\n"
    );
    let more = container("more", &toolbox, &["sleep", "10000"]);
    let more = bench.launch(&pod, inside(more)).await?;
    let user = "readlink /proc/self/ns/user";
    assert_eq!(
        bench.exec_ok(&id, user).await?,
        bench.exec_ok(&more, user).await?
    );
    bench.stop_container(&id, 0).await?;
    bench.remove_container(&id).await?;
    bench.remove(&pod).await?;
    bench.node.fsck_clean().await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_is_refused_by_field() -> Result<()> {
    let mut bench = Bench::start().await?;
    let one = |length, host_id, container_id| cri::IdMapping {
        length,
        host_id,
        container_id,
    };
    type Change = fn(&mut cri::NamespaceOption);
    let base = |options: &mut cri::NamespaceOption,
                uids: Vec<cri::IdMapping>,
                gids: Vec<cri::IdMapping>| {
        options.userns_options = Some(cri::UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids,
            gids,
        });
    };
    let at = "config.linux.security_context.namespace_options";
    for (uids, gids, field) in [
        (vec![], id_map(1), "userns_options.uids"),
        (id_map(1), vec![], "userns_options.gids"),
        (
            [id_map(1), id_map(70_000)].concat(),
            id_map(1),
            "userns_options.uids",
        ),
        (
            vec![one(10, 1, 1)],
            id_map(1),
            "userns_options.uids[0].container_id",
        ),
        (
            vec![one(0, 1, 0)],
            id_map(1),
            "userns_options.uids[0].length",
        ),
        (
            vec![one(2, u32::MAX - 1, 0)],
            id_map(1),
            "userns_options.uids[0].length",
        ),
        (
            id_map(1),
            vec![one(10, 1, 0)],
            "userns_options.gids[0].length",
        ),
    ] {
        let mut config = pod("refused");
        base(options(&mut config), uids, gids);
        let error = bench.run(config).await.expect_err(field);
        let status = error.downcast_ref::<tonic::Status>().context("a status")?;
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
        assert!(
            status.message().contains(&format!("{at}.{field}")),
            "{status:?}"
        );
    }
    let cases: [(Change, &str); 5] = [
        (|o| o.pid = NamespaceMode::Node.into(), "pid"),
        (|o| o.ipc = NamespaceMode::Node.into(), "ipc"),
        (
            |o| o.userns_options.get_or_insert_default().mode = NamespaceMode::Container.into(),
            "userns_options.mode",
        ),
        (
            |o| o.userns_options.get_or_insert_default().mode = NamespaceMode::Target.into(),
            "userns_options.mode",
        ),
        (
            |o| o.userns_options.get_or_insert_default().mode = NamespaceMode::Node.into(),
            "userns_options.uids",
        ),
    ];
    for (change, field) in cases {
        let mut config = mapped(pod("refused"));
        change(options(&mut config));
        let error = bench.run(config).await.expect_err(field);
        let status = error.downcast_ref::<tonic::Status>().context("a status")?;
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
        assert!(
            status.message().contains(&format!("{at}.{field}")),
            "{status:?}"
        );
    }
    // A container can't differ from its pod, nor a volume.
    let toolbox = bench.toolbox.clone();
    let own = bench.run(mapped(pod("own"))).await?;
    let none = bench.run(pod("none")).await?;
    let mut of_host = container("main", &toolbox, &["true"]);
    security(&mut of_host)
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(cri::UserNamespace {
        mode: NamespaceMode::Node.into(),
        ..Default::default()
    });
    let mut other_volume = inside(container("main", &toolbox, &["true"]));
    other_volume.mounts = vec![cri::Mount {
        uid_mappings: id_map(7),
        ..mapped_volume(bench.node.dir(), "/v")
    }];
    let mut volume_alone = container("main", &toolbox, &["true"]);
    volume_alone.mounts = vec![mapped_volume(bench.node.dir(), "/v")];
    for (pod, config, field) in [
        (&own, of_host, "userns_options"),
        (
            &none,
            inside(container("main", &toolbox, &["true"])),
            "userns_options",
        ),
        (&own, other_volume, "uidMappings"),
        (&none, volume_alone, "uidMappings"),
    ] {
        let error = bench.create(pod, config).await.expect_err(field);
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        assert!(error.message().contains(field), "{error:?}");
    }
    bench.finish().await
}
