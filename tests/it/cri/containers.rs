//! Containers, where other chapters' tests do not look.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    images::{ImageBuilder, toolbox_layer},
    pods::{Bench, pod, resources, script, security},
};
use tonic::Code;

/// CRI contract 3.1, 3.5, 3.6 and 7: status tells what was asked for and what is in force; nothing that
/// is the agent's own. Limits that follow others are told as not set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_what_was_asked_and_what_is_in_force() -> Result<()> {
    let mut bench = Bench::start().await?;
    let image = ImageBuilder::new(vec![toolbox_layer()?])
        .set("StopSignal", "SIGUSR1")
        .set("User", "member")
        .set("WorkingDir", "/made/for/it")
        .build();
    let image_id = bench.offer("status:1", &image).await?;
    let reference = bench.registry.reference("status:1");
    let pod = bench.run(pod("status")).await?;
    let host = bench.node.dir().join("volume");
    fs::create_dir(&host)?;
    let mut config = script("main", &reference, "pwd; echo $HOME; exec sleep 10000");
    config.command = vec!["sh".to_owned()];
    config.args = vec![
        "-c".to_owned(),
        "pwd; echo $HOME; exec sleep 10000".to_owned(),
    ];
    config.mounts = vec![cri::Mount {
        container_path: "/volume".to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        readonly: true,
        ..Default::default()
    }];
    config.log_path = "deep/er/main.log".to_owned();
    security(&mut config).supplemental_groups = vec![77, 5];
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    resources(&mut config).oom_score_adj = 7;
    let id = bench.create(&pod, config.clone()).await?;
    let status = bench.status(&id).await?;
    assert_eq!(status.stop_signal(), cri::Signal::Sigusr1, "the image's");
    assert_eq!(status.mounts, config.mounts);
    assert_eq!(status.image_id, image_id);
    assert_eq!(status.image.clone().unwrap_or_default().image, reference);
    assert!(!status.image_ref.is_empty());
    let user = status
        .user
        .clone()
        .and_then(|user| user.linux)
        .context("a user")?;
    assert_eq!((user.uid, user.gid), (1000, 1000));
    let groups = user.supplemental_groups;
    assert!(
        groups.is_sorted() && groups.contains(&77) && groups.contains(&5),
        "{groups:?}"
    );
    let limits = |status: &cri::ContainerStatus| {
        let resources = status.resources.clone().unwrap_or_default();
        resources.linux.unwrap_or_default()
    };
    let shown = limits(&status);
    assert_eq!(
        (
            shown.memory_limit_in_bytes,
            shown.memory_swap_limit_in_bytes,
            shown.oom_score_adj
        ),
        (64 << 20, 0, 7)
    );
    let update = |memory_limit_in_bytes| cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes,
            ..Default::default()
        }),
        ..Default::default()
    };
    for _ in 0..2 {
        bench
            .runtime
            .update_container_resources(update(80 << 20))
            .await?;
    }
    bench.start_container(&id).await?;
    let shown = limits(&bench.status(&id).await?);
    assert_eq!(
        (
            shown.memory_limit_in_bytes,
            shown.memory_swap_limit_in_bytes
        ),
        (80 << 20, 0)
    );
    // What is in use cannot be taken away, and the old limits stay.
    let refused = bench.runtime.update_container_resources(update(4096)).await;
    assert!(refused.is_err(), "below what is used");
    assert_eq!(
        limits(&bench.status(&id).await?).memory_limit_in_bytes,
        80 << 20
    );
    let log = status.log_path;
    assert!(
        log.ends_with("deep/er/main.log") && Path::new(&log).is_absolute(),
        "{log}"
    );
    longshore_tests::pods::wait_for("two lines", async || {
        Ok(fs::read_to_string(&log).is_ok_and(|text| text.lines().count() == 2))
    })
    .await?;
    let output = longshore_tests::pods::read_log(log.as_ref())?.stdout();
    assert_eq!(output, "/made/for/it\n/home/member\n");
    bench.stop_container(&id, 0).await?;
    assert!(
        bench
            .runtime
            .update_container_resources(update(90 << 20))
            .await
            .is_err(),
        "it has ended"
    );

    // A name that is taken, and one that is free again after a refusal.
    let error = bench
        .create(&pod, config.clone())
        .await
        .expect_err("the name is taken");
    assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
    bench.remove_container(&id).await?;
    config.working_dir = "/etc/passwd".to_owned();
    let refused = bench
        .create(&pod, config.clone())
        .await
        .expect_err("a file there");
    assert!(refused.message().contains("/etc/passwd"), "{refused:?}");
    config.working_dir.clear();
    let id = bench.create(&pod, config).await?;
    bench.remove_container(&id).await?;
    bench.finish().await
}

/// CRI contract 5.1: what every container has mounted, and how.
/// CRI contract 4.9: without new privileges there are none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_container_has_the_usual_mounts() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("usual")).await?;
    let (_, output) = bench.run_script(&pod, "cat /proc/mounts").await?;
    let options = |target: &str, kind: &str| {
        let found = output.lines().find_map(|line| {
            let words: Vec<_> = line.split(' ').collect();
            (words[1] == target && words[2].starts_with(kind)).then(|| words[3].to_owned())
        });
        found.with_context(|| format!("{target} is no {kind}:\n{output}"))
    };
    for (target, kind, expected) in [
        ("/proc", "proc", "rw nosuid nodev noexec"),
        ("/dev", "tmpfs", "rw nosuid mode=755"),
        (
            "/dev/pts",
            "devpts",
            "rw nosuid noexec gid=5 mode=620 ptmxmode=666",
        ),
        ("/dev/shm", "tmpfs", "rw nosuid nodev noexec"),
        ("/dev/mqueue", "mqueue", "rw nosuid nodev noexec"),
        ("/sys", "sysfs", "ro nosuid nodev noexec"),
        ("/sys/fs/cgroup", "", "ro nosuid nodev noexec"),
    ] {
        let options = options(target, kind)?;
        let has: Vec<_> = options.split(',').collect();
        for word in expected.split(' ') {
            assert!(has.contains(&word), "{target}: {word} is not in {options}");
        }
    }
    assert!(
        !output.contains(" /run "),
        "no file system of its own there: {output}"
    );
    let mut config = script("main", &toolbox, "grep NoNewPrivs /proc/self/status");
    security(&mut config).no_new_privs = true;
    let (_, output) = bench.run_to_end(&pod, config).await?;
    assert_eq!(output, "NoNewPrivs:\t1\n");
    let (_, output) = bench
        .run_script(&pod, "grep NoNewPrivs /proc/self/status")
        .await?;
    assert_eq!(output, "NoNewPrivs:\t0\n");
    bench.finish().await
}

/// CRI contract 5.2: read-only is the mount's own, recursively read-only all below it too; options add
/// to it; a missing directory of the host is made; what cannot be is refused, with the word of 1.5.
/// CRI contract 1.5: such words come first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mounts_are_as_read_only_as_they_say() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("mounts")).await?;
    let top = bench.node.dir().join("top");
    fs::create_dir_all(top.join("below"))?;
    let below = top.join("below").to_string_lossy().into_owned();
    bench
        .machine()
        .output("mount", &["-t", "tmpfs", "tmpfs", &below])?;
    let mount = |container_path: &str| cri::Mount {
        container_path: container_path.to_owned(),
        host_path: top.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let text = "for at in /rw /ro /rro; do for place in $at $at/below; do \
        touch $place/x 2>/dev/null && echo $place; done; done; \
        cat /bin/echo >/rw/echo; chmod 755 /rw/echo; /rw/echo runs; /noexec/echo runs 2>/dev/null || echo noexec; ls -d /made";
    let mut config = script("main", &toolbox, text);
    config.mounts = vec![
        mount("/rw"),
        cri::Mount {
            readonly: true,
            ..mount("/ro")
        },
        cri::Mount {
            readonly: true,
            recursive_read_only: true,
            ..mount("/rro")
        },
        cri::Mount {
            mount_options: vec!["noexec".to_owned(), "nodev".to_owned()],
            ..mount("/noexec")
        },
        cri::Mount {
            host_path: top.join("new/deep").to_string_lossy().into_owned(),
            ..mount("/made")
        },
    ];
    let (_, output) = bench.run_to_end(&pod, config.clone()).await?;
    assert_eq!(output, "/rw\n/rw/below\n/ro/below\nruns\nnoexec\n/made\n");
    assert!(top.join("new/deep").is_dir());
    for (wrong, code) in [
        (
            cri::Mount {
                recursive_read_only: true,
                ..mount("/rro")
            },
            Code::InvalidArgument,
        ),
        (
            cri::Mount {
                readonly: true,
                recursive_read_only: true,
                propagation: cri::MountPropagation::PropagationHostToContainer.into(),
                ..mount("/rro")
            },
            Code::InvalidArgument,
        ),
    ] {
        config.mounts = vec![wrong];
        let refused = bench
            .create(&pod, config.clone())
            .await
            .expect_err("cannot be");
        assert_eq!(refused.code(), code);
        assert!(
            refused.message().starts_with("RROUnsupported"),
            "{refused:?}"
        );
    }
    bench.remove(&pod).await?;
    bench.machine().output("umount", &[&below])?;
    bench.finish().await
}

/// CRI contract 4.7: a profile is loaded or refused; without AppArmor only none can be asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_apparmor_profile_that_is_not_there_is_refused() -> Result<()> {
    use cri::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("apparmor")).await?;
    for (kind, localhost_ref, works) in [
        (Localhost, "longshore-tests-has-no-such-profile", false),
        (
            Localhost,
            "localhost/longshore-tests-has-no-such-profile",
            false,
        ),
        (Unconfined, "", true),
        (RuntimeDefault, "", true),
    ] {
        let mut config = script("main", &toolbox, "true");
        security(&mut config).apparmor = Some(cri::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: localhost_ref.to_owned(),
        });
        let created = bench.create(&pod, config).await;
        assert_eq!(created.is_ok(), works, "{kind:?}: {created:?}");
        if let Ok(id) = created {
            bench.remove_container(&id).await?;
        }
    }
    bench.finish().await
}
