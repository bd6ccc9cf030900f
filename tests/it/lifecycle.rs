//! Pods and containers from their first to their last second, through CRI.

use std::{collections::HashMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1::{self as cri, ContainerState, NamespaceMode, PodSandboxState};
use longshore_tests::{
    images::{ImageBuilder, LayerBuilder},
    pods::{
        Bench, Pod, container, host_network_pod, options, pod, read_log, resources, script,
        security, wait_for,
    },
};
use prost::Message as _;
use serde_json::json;
use tonic::Code;

/// A pod with one container that sleeps, in which tests exec.
async fn sleeper(bench: &mut Bench, name: &str) -> Result<(Pod, String)> {
    let pod = bench.run(pod(name)).await?;
    let config = container("main", &bench.toolbox.clone(), &["sleep", "10000"]);
    let id = bench.launch(&pod, config).await?;
    Ok((pod, id))
}

/// CRI contract 3.1, 3.2, 3.4, 3.5 and 2.1: states, their times, and what removing leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_container_goes_through_its_states() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("states")).await?;
    assert_eq!(pod.id.len(), 64);
    assert_eq!(
        bench.pod_status(&pod).await?.state(),
        PodSandboxState::SandboxReady
    );
    let mut config = script(
        "main",
        &toolbox,
        "echo out; echo err >&2; cat /etc/hostname; sleep 10000",
    );
    config.labels = HashMap::from([("a".to_owned(), "b".to_owned())]);
    config.annotations = HashMap::from([("weird/key".to_owned(), "{\"x\": 1}".to_owned())]);
    let id = bench.create(&pod, config.clone()).await?;
    let status = bench.status(&id).await?;
    assert_eq!(status.state(), ContainerState::ContainerCreated);
    assert_eq!(
        (status.started_at, status.finished_at, status.exit_code),
        (0, 0, 0)
    );
    assert_eq!((status.reason.as_str(), status.message.as_str()), ("", ""));
    assert!(status.created_at > 0);
    assert_eq!(status.labels, config.labels);
    assert_eq!(status.annotations, config.annotations);
    assert_eq!(status.image.clone().unwrap_or_default().image, toolbox);
    assert!(
        Path::new(&status.log_path).is_absolute(),
        "{}",
        status.log_path
    );

    bench.start_container(&id).await?;
    let running = bench.status(&id).await?;
    assert_eq!(running.state(), ContainerState::ContainerRunning);
    assert!(running.started_at >= running.created_at && running.finished_at == 0);
    assert!(bench.start_container(&id).await.is_err(), "started twice");
    let log = running.log_path.clone();
    wait_for("the hostname in the log", async || {
        Ok(read_log(Path::new(&log)).is_ok_and(|log| log.lines.len() >= 3))
    })
    .await?;
    let lines = read_log(Path::new(&log))?.lines;
    let stdout: Vec<_> = lines
        .iter()
        .filter(|line| line.stream == "stdout")
        .map(|line| line.text.as_str())
        .collect();
    assert_eq!(stdout, ["out", "states"]);
    assert!(
        lines
            .iter()
            .any(|line| line.stream == "stderr" && line.text == "err")
    );

    bench.stop_container(&id, 0).await?;
    let exited = bench.status(&id).await?;
    assert_eq!(exited.state(), ContainerState::ContainerExited);
    assert_eq!((exited.exit_code, exited.reason.as_str()), (137, "Error"));
    assert!(exited.finished_at >= exited.started_at);
    bench.stop_container(&id, 0).await?;
    bench.remove_container(&id).await?;
    bench.remove_container(&id).await?;
    assert!(Path::new(&log).exists(), "the log is kubelet's");
    let gone = bench.status(&id).await.expect_err("removed");
    assert_eq!(
        gone.downcast_ref::<tonic::Status>()
            .map(tonic::Status::code),
        Some(Code::NotFound)
    );

    bench.stop(&pod).await?;
    let stopped = bench.pod_status(&pod).await?;
    assert_eq!(stopped.state(), PodSandboxState::SandboxNotready);
    bench.stop(&pod).await?;
    bench.remove(&pod).await?;
    bench.remove(&pod).await?;
    bench.finish().await
}

/// CRI contract 3.5: codes and reasons of exits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn exits_have_exact_codes_and_reasons() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("exits")).await?;
    for (text, code, reason) in [
        ("true", 0, "Completed"),
        ("exit 1", 1, "Error"),
        ("exit 42", 42, "Error"),
        ("exit 255", 255, "Error"),
        // pid 1 ignores signals without a handler, SIGKILL from inside included: a child dies by them.
        ("sh -c 'kill -9 $$'", 137, "Error"),
        ("sh -c 'kill -15 $$'", 143, "Error"),
        ("sh -c 'kill -6 $$'", 134, "Error"),
    ] {
        let (status, _) = bench.run_script(&pod, text).await?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (code, reason),
            "{text}"
        );
        assert!(
            status.finished_at >= status.started_at && status.started_at > 0,
            "{text}"
        );
    }
    bench.finish().await
}

/// CRI contract 3.2: a start that fails is an exit of code 128 with its reason.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn what_cannot_start_says_why() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("unstartable")).await?;
    for command in ["/no/such/program", "no-such-program", "/etc/passwd", "/etc"] {
        let id = match bench
            .create(&pod, container("main", &toolbox, &[command]))
            .await
        {
            Ok(id) => id,
            Err(error) => {
                assert!(error.message().contains(command), "{error:?}");
                continue;
            }
        };
        let error = bench.start_container(&id).await.expect_err(command);
        assert!(error.message().contains(command), "{error:?}");
        let told = tonic_types::Status::decode(error.details())?;
        let named = (tonic::Code::from(told.code), told.message.as_str());
        assert_eq!(named, (error.code(), error.message()), "{command}");
        let status = bench.status(&id).await?;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (128, "StartError"),
            "{command}"
        );
        assert_eq!(status.started_at, 0, "{command}");
        assert!(
            status.finished_at > 0 && !status.message.is_empty(),
            "{command}"
        );
        bench.stop_container(&id, 1).await?;
        bench.remove_container(&id).await?;
    }
    let image = ImageBuilder::new(vec![LayerBuilder::new().file("x", 0o644, "x").build()]).build();
    bench.offer("empty:1", &image).await?;
    let empty = bench.registry.reference("empty:1");
    let error = bench
        .create(&pod, container("main", &empty, &[]))
        .await
        .expect_err("no command");
    assert!(error.message().contains("command"), "{error:?}");
    let error = bench
        .create(&pod, container("main", "not/pulled:1", &["true"]))
        .await
        .expect_err("no image");
    assert!(error.message().contains("not/pulled:1"), "{error:?}");
    bench.finish().await
}

/// CRI contract 3.1: the table of command and args.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn command_and_args_follow_the_table() -> Result<()> {
    let mut bench = Bench::start().await?;
    let image = ImageBuilder::new(vec![longshore_tests::images::toolbox_layer()?])
        .set("Entrypoint", json!(["echo", "entry"]))
        .set("Cmd", json!(["cmd"]))
        .set("WorkingDir", "/srv")
        .set("Env", json!(["PATH=/bin", "COLOUR=red", "SHAPE=round"]))
        .build();
    bench.offer("table:1", &image).await?;
    let reference = bench.registry.reference("table:1");
    let pod = bench.run(pod("table")).await?;
    let words = |list: &[&str]| {
        list.iter()
            .map(|word| (*word).to_owned())
            .collect::<Vec<_>>()
    };
    for (command, args, expected) in [
        (vec![], vec![], "entry cmd\n"),
        (vec![], words(&["a", "b"]), "entry a b\n"),
        (words(&["echo", "mine"]), vec![], "mine\n"),
        (words(&["echo", "mine"]), words(&["a"]), "mine a\n"),
    ] {
        let mut config = container("main", &reference, &[]);
        (config.command, config.args) = (command, args);
        let (_, output) = bench.run_to_end(&pod, config).await?;
        assert_eq!(output, expected);
    }
    let mut config = script(
        "main",
        &reference,
        "pwd; echo $COLOUR $SHAPE $HOSTNAME $HOME; id -u",
    );
    config.envs = vec![cri::KeyValue {
        key: "COLOUR".to_owned(),
        value: b"blue".to_vec(),
    }];
    let (_, output) = bench.run_to_end(&pod, config.clone()).await?;
    assert_eq!(output, "/srv\nblue round table /root\n0\n");
    config.working_dir = "/made/on/demand".to_owned();
    let (_, output) = bench.run_to_end(&pod, config).await?;
    assert!(output.starts_with("/made/on/demand\n"), "{output}");
    bench.finish().await
}

/// CRI contract 8.1: output and exit code of a command.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn exec_sync_tells_output_and_code() -> Result<()> {
    let mut bench = Bench::start().await?;
    let (_, id) = sleeper(&mut bench, "exec").await?;
    let response = bench
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 7"], 0)
        .await?;
    assert_eq!(response.exit_code, 7);
    assert_eq!(response.stdout, b"out\n");
    assert_eq!(response.stderr, b"err\n");
    let missing = bench
        .exec(&id, &["/no/such/program"], 0)
        .await
        .expect_err("missing");
    assert!(
        missing.message().contains("/no/such/program"),
        "{missing:?}"
    );
    let killed = bench.exec(&id, &["sh", "-c", "kill -9 $$"], 0).await?;
    assert_eq!(killed.exit_code, 137);
    let unknown = bench
        .exec(&"0".repeat(64), &["true"], 0)
        .await
        .expect_err("unknown");
    assert_eq!(unknown.code(), Code::NotFound);
    // Output past the cap is read and dropped, and the code is still true.
    let flood = "head -c 20000000 /dev/zero | tr '\\0' x; exit 3";
    let response = bench.exec(&id, &["sh", "-c", flood], 0).await?;
    let length = response.stdout.len();
    assert!((15 << 20..=16 << 20).contains(&length), "{length} bytes");
    assert_eq!(response.exit_code, 3);
    // Many at once.
    let runs = (0..20).map(|number| {
        let mut runtime = bench.runtime.clone();
        let request = cri::ExecSyncRequest {
            container_id: id.clone(),
            cmd: vec![
                "sh".to_owned(),
                "-c".to_owned(),
                format!("echo {number}; exit {number}"),
            ],
            timeout: 60,
        };
        tokio::spawn(async move { runtime.exec_sync(request).await })
    });
    for (number, run) in futures_util::future::join_all(runs)
        .await
        .into_iter()
        .enumerate()
    {
        let response = run??.into_inner();
        assert_eq!(response.stdout, format!("{number}\n").into_bytes());
        assert_eq!(response.exit_code, i32::try_from(number)?);
    }
    bench.finish().await
}

/// A deadline may pass at any moment of an exec: also between the wish and the shim's answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn an_exec_whose_caller_leaves_ends() -> Result<()> {
    const COMMAND: [&str; 2] = ["sleep", "73505"];
    let mut bench = Bench::start().await?;
    let (_, id) = sleeper(&mut bench, "leave").await?;
    let calls = (0..120_u64).map(|round| {
        let (mut runtime, id) = (bench.runtime.clone(), id.clone());
        async move {
            let mut request = tonic::Request::new(cri::ExecSyncRequest {
                container_id: id,
                cmd: COMMAND.map(str::to_owned).to_vec(),
                timeout: 0,
            });
            request.set_timeout(Duration::from_micros(500 + round * 100));
            runtime.exec_sync(request).await
        }
    });
    for answer in futures_util::future::join_all(calls).await {
        answer.expect_err("it sleeps longer than any deadline");
    }
    let none_left = async || {
        let line = COMMAND.map(|word| format!("{word}\0")).concat();
        let running = fs::read_dir("/proc")?
            .flatten()
            .filter(|entry| {
                fs::read(entry.path().join("cmdline")).is_ok_and(|found| found == line.as_bytes())
            })
            .count();
        Ok(running == 0)
    };
    wait_for("every exec to end", none_left).await?;
    bench.finish().await
}

/// CRI contract 8.1: a command that runs too long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn an_exec_timeout_ends_everything_it_started() -> Result<()> {
    let mut bench = Bench::start().await?;
    let (_, id) = sleeper(&mut bench, "timeout").await?;
    for text in [
        "sleep 5555",
        "sleep 5555 & sleep 5555",
        "setsid sleep 5555 & setsid sh -c 'sleep 5555 & exec sleep 5555' & sleep 5555",
        "trap '' TERM; while true; do sleep 5555; done",
    ] {
        let error = bench
            .exec(&id, &["sh", "-c", text], 1)
            .await
            .expect_err(text);
        assert_eq!(error.code(), Code::DeadlineExceeded, "{text}: {error:?}");
        let left = bench
            .exec_ok(
                &id,
                "for d in /proc/[0-9]*; do tr '\\0' ' ' <$d/cmdline; echo; done",
            )
            .await?;
        assert!(!left.contains("sleep 5555"), "{text} leaves:\n{left}");
    }
    let state = bench.status(&id).await?.state();
    assert_eq!(state, ContainerState::ContainerRunning);
    bench.finish().await
}

/// CRI contract 8.1: a command runs as the container does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn an_exec_is_confined_like_the_first_process() -> Result<()> {
    const SHOW: &str = "grep -E '^(Cap|Seccomp:|NoNewPrivs|Groups|Uid|Gid)' /proc/self/status; \
        cat /proc/self/oom_score_adj; cat /proc/self/limits; pwd; ls -l /proc/self/fd | grep -v /proc/ | wc -l; \
        readlink /proc/self/ns/mnt /proc/self/ns/pid /proc/self/ns/net /proc/self/ns/ipc /proc/self/ns/uts; env | grep -v ^_= | sort";
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("confined")).await?;
    for (user, no_new_privs, seccomp) in [
        (
            None,
            false,
            cri::security_profile::ProfileType::RuntimeDefault,
        ),
        (
            Some(1000),
            true,
            cri::security_profile::ProfileType::RuntimeDefault,
        ),
        (
            Some(1000),
            false,
            cri::security_profile::ProfileType::RuntimeDefault,
        ),
        (None, true, cri::security_profile::ProfileType::Unconfined),
    ] {
        let toolbox = bench.toolbox.clone();
        let mut config = script(
            "main",
            &toolbox,
            &format!("({SHOW}) >/tmp/shown 2>&1; sleep 10000"),
        );
        let context = security(&mut config);
        context.run_as_user = user.map(|value| cri::Int64Value { value });
        context.no_new_privs = no_new_privs;
        context.seccomp = Some(cri::SecurityProfile {
            profile_type: seccomp.into(),
            localhost_ref: String::new(),
        });
        let id = bench.launch(&pod, config).await?;
        let runtime = bench.runtime.clone();
        let wait = id.clone();
        wait_for("the first process to write", async || {
            let request = cri::ExecSyncRequest {
                container_id: wait.clone(),
                cmd: ["sh", "-c", "test -s /tmp/shown && sleep 0.2"]
                    .map(str::to_owned)
                    .to_vec(),
                timeout: 30,
            };
            Ok(runtime
                .clone()
                .exec_sync(request)
                .await?
                .into_inner()
                .exit_code
                == 0)
        })
        .await?;
        let first = bench.exec_ok(&id, "cat /tmp/shown").await?;
        let second = bench.exec_ok(&id, &format!("({SHOW}) 2>&1")).await?;
        assert_eq!(first, second, "user {user:?}, no_new_privs {no_new_privs}");
        let expected = if seccomp == cri::security_profile::ProfileType::RuntimeDefault {
            "2"
        } else {
            "0"
        };
        assert!(first.contains(&format!("Seccomp:\t{expected}")), "{first}");
        assert!(
            first.contains(&format!("NoNewPrivs:\t{}", u8::from(no_new_privs))),
            "{first}"
        );
        assert!(first.contains("CapInh:\t0000000000000000"), "{first}");
        assert!(first.contains("CapAmb:\t0000000000000000"), "{first}");
        if user.is_some() {
            assert!(first.contains("CapEff:\t0000000000000000"), "{first}");
        }
        bench.stop_container(&id, 0).await?;
        bench.remove_container(&id).await?;
    }
    bench.finish().await
}

/// CRI contract 4.3: capabilities.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn capabilities_are_added_and_dropped() -> Result<()> {
    const DEFAULT: u64 = 0x0000_0000_a804_25fb;
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("caps")).await?;
    // All that there is to give is what this host's root has itself.
    let own = fs::read_to_string("/proc/self/status")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .context("CapBnd")?;
    let all = u64::from_str_radix(own.trim(), 16)?;
    for (add, drop, expected) in [
        (vec![], vec![], DEFAULT),
        (vec!["SYS_TIME"], vec![], DEFAULT | 1 << 25),
        (vec!["sys_time"], vec!["chown"], (DEFAULT | 1 << 25) & !1),
        (vec!["ALL"], vec![], all),
        (vec![], vec!["ALL"], 0),
        (vec!["NET_ADMIN"], vec!["ALL"], 1 << 12),
        (vec!["ALL"], vec!["SYS_ADMIN"], all & !(1 << 21)),
    ] {
        let toolbox = bench.toolbox.clone();
        let mut config = script(
            "main",
            &toolbox,
            "grep ^CapEff /proc/self/status; grep ^CapBnd /proc/self/status",
        );
        let owned = |list: Vec<&str>| list.into_iter().map(str::to_owned).collect();
        security(&mut config).capabilities = Some(cri::Capability {
            add_capabilities: owned(add.clone()),
            drop_capabilities: owned(drop.clone()),
            add_ambient_capabilities: Vec::new(),
        });
        let (_, output) = bench.run_to_end(&pod, config).await?;
        let expected = format!("CapEff:\t{expected:016x}\nCapBnd:\t{expected:016x}\n");
        assert_eq!(output, expected, "add {add:?}, drop {drop:?}");
    }
    bench.finish().await
}

/// CRI contract 4.6: system calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn the_default_seccomp_profile_filters() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("seccomp")).await?;
    let toolbox = bench.toolbox.clone();
    let profile = bench.node.dir().join("profile.json");
    fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}"#,
    )?;
    for (kind, reference, text, works) in [
        (
            cri::security_profile::ProfileType::RuntimeDefault,
            "",
            "unshare -U true",
            false,
        ),
        (
            cri::security_profile::ProfileType::Unconfined,
            "",
            "unshare -U true",
            true,
        ),
        (
            cri::security_profile::ProfileType::RuntimeDefault,
            "",
            "mkdir /x",
            true,
        ),
        (
            cri::security_profile::ProfileType::Localhost,
            profile.to_str().context("a path")?,
            "mkdir /x",
            false,
        ),
    ] {
        let mut config = script("main", &toolbox, text);
        security(&mut config).seccomp = Some(cri::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: reference.to_owned(),
        });
        let (status, output) = bench.run_to_end(&pod, config).await?;
        assert_eq!(status.exit_code == 0, works, "{kind:?}: {text}: {output}");
    }
    bench.finish().await
}

/// CRI contract 4.1 and 4.2: users and groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn users_and_groups_follow_the_image_and_the_request() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("users")).await?;
    let toolbox = bench.toolbox.clone();
    type Change = fn(&mut cri::LinuxContainerSecurityContext);
    let number = |value| Some(cri::Int64Value { value });
    let _ = number;
    let table: &[(&str, Change, &str)] = &[
        ("root by default", |_| {}, "0 0 0"),
        (
            "a number",
            |c| c.run_as_user = Some(cri::Int64Value { value: 1234 }),
            "1234 0 0",
        ),
        (
            "a member",
            |c| c.run_as_user = Some(cri::Int64Value { value: 1000 }),
            "1000 1000 1000 50000",
        ),
        (
            "a name",
            |c| c.run_as_username = "member".to_owned(),
            "1000 1000 1000 50000",
        ),
        (
            "a number and a group",
            |c| {
                c.run_as_user = Some(cri::Int64Value { value: 1234 });
                c.run_as_group = Some(cri::Int64Value { value: 4321 });
            },
            "1234 4321 4321",
        ),
        (
            "more groups",
            |c| {
                c.run_as_user = Some(cri::Int64Value { value: 1000 });
                c.supplemental_groups = vec![7, 8];
            },
            "1000 1000 7 8 1000 50000",
        ),
        (
            "strict groups",
            |c| {
                c.run_as_user = Some(cri::Int64Value { value: 1000 });
                c.supplemental_groups = vec![7];
                c.supplemental_groups_policy = cri::SupplementalGroupsPolicy::Strict.into();
            },
            "1000 1000 7 1000",
        ),
    ];
    for (what, change, expected) in table {
        let mut config = script(
            "main",
            &toolbox,
            "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n | tr '\\n' ' ')",
        );
        change(security(&mut config));
        let (status, output) = bench.run_to_end(&pod, config).await?;
        let sorted = |text: &str| {
            let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
            words
        };
        assert_eq!(sorted(&output), sorted(expected), "{what}");
        let user = status.user.unwrap_or_default().linux.unwrap_or_default();
        assert_eq!(user.uid.to_string(), sorted(expected)[0], "{what}");
    }
    let mut config = script("main", &toolbox, "true");
    security(&mut config).run_as_username = "stranger".to_owned();
    let error = bench
        .create(&pod, config)
        .await
        .expect_err("an unknown name");
    assert!(error.message().contains("stranger"), "{error:?}");
    bench.finish().await
}

/// CRI contract 4.5 and 4.10: masked, read-only and a read-only root.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn the_root_can_be_read_only_and_paths_masked() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("masks")).await?;
    let toolbox = bench.toolbox.clone();
    let mut config = script(
        "main",
        &toolbox,
        "touch /x || echo refused; touch /dev/shm/y && echo shm",
    );
    security(&mut config).readonly_rootfs = true;
    let (_, output) = bench.run_to_end(&pod, config).await?;
    assert!(output.ends_with("refused\nshm\n"), "{output}");
    let text = "cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; echo 1 >/proc/sys/vm/drop_caches || echo refused";
    let mut config = script("main", &toolbox, text);
    let context = security(&mut config);
    context.masked_paths = ["/proc/timer_list", "/sys/firmware", "/proc/not-there"]
        .map(str::to_owned)
        .to_vec();
    context.readonly_paths = vec!["/proc/sys".to_owned()];
    let (_, output) = bench.run_to_end(&pod, config).await?;
    let shown: Vec<_> = output.lines().collect();
    assert_eq!((shown[0], shown[1]), ("0", "0"), "{output}");
    assert!(output.ends_with("refused\n"), "{output}");
    bench.finish().await
}

/// CRI contract 5.2: order, links and missing ends of mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn mounts_land_where_they_should() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("mounts")).await?;
    let host = bench.node.dir().join("host");
    fs::create_dir_all(host.join("inner"))?;
    fs::write(host.join("file"), "from the host\n")?;
    std::os::unix::fs::symlink("file", host.join("link"))?;
    let path = |name: &str| host.join(name).to_string_lossy().into_owned();
    let mount = |container_path: &str, host_path: String, readonly: bool| cri::Mount {
        container_path: container_path.to_owned(),
        host_path,
        readonly,
        ..Default::default()
    };
    let toolbox = bench.toolbox.clone();
    let text = "cat /data/file /file /link; echo written >/data/new; \
        touch /ro/new 2>/dev/null || echo read-only; ls -d /made; cat /data/sub/file; cat /etc/hosts | head -1";
    let mut config = script("main", &toolbox, text);
    config.mounts = vec![
        // The deeper one is listed first and must still be mounted last.
        mount("/data/sub", path(""), true),
        mount("/data", path(""), false),
        mount("/file", path("file"), true),
        mount("/link", path("link"), true),
        mount("/ro", path(""), true),
        mount("/made", path("made/by/us"), false),
        mount("/etc/hosts", path("file"), true),
    ];
    fs::create_dir_all(host.join("sub"))?;
    let (status, output) = bench.run_to_end(&pod, config.clone()).await?;
    let from = "from the host\n";
    assert_eq!(
        output,
        format!("{from}{from}{from}read-only\n/made\n{from}{from}")
    );
    assert_eq!(fs::read_to_string(host.join("new"))?, "written\n");
    assert!(host.join("made/by/us").is_dir());
    assert_eq!(status.mounts.len(), config.mounts.len());
    // A link in the image that points outside is followed inside the container's root.
    let image = ImageBuilder::new(vec![
        longshore_tests::images::toolbox_layer()?,
        LayerBuilder::new()
            .symlink("escape", "../../../../etc")
            .build(),
    ])
    .build();
    bench.offer("escape:1", &image).await?;
    let reference = bench.registry.reference("escape:1");
    let mut config = script("main", &reference, "cat /etc/planted");
    config.mounts = vec![mount("/escape/planted", path("file"), true)];
    let (_, output) = bench.run_to_end(&pod, config).await?;
    assert_eq!(output, from);
    assert!(!Path::new("/etc/planted").exists());
    bench.finish().await
}

/// CRI contract 5.2: propagation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn mount_propagation_goes_the_way_it_is_told() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("propagation")).await?;
    let shared = bench.node.dir().join("shared");
    fs::create_dir(&shared)?;
    let place = shared.to_string_lossy().into_owned();
    bench
        .machine()
        .output("mount", &["-t", "tmpfs", "tmpfs", &place])?;
    bench
        .machine()
        .output("mount", &["--make-shared", &place])?;
    bench
        .machine()
        .output("mkdir", &[&format!("{place}/later")])?;
    let toolbox = bench.toolbox.clone();
    let mut ids = Vec::new();
    for (name, propagation) in [
        ("private", cri::MountPropagation::PropagationPrivate),
        ("slave", cri::MountPropagation::PropagationHostToContainer),
    ] {
        let mut config = container(name, &toolbox, &["sleep", "10000"]);
        config.mounts = vec![cri::Mount {
            container_path: "/shared".to_owned(),
            host_path: place.clone(),
            propagation: propagation.into(),
            ..Default::default()
        }];
        ids.push(bench.launch(&pod, config).await?);
    }
    bench.machine().output(
        "mount",
        &["-t", "tmpfs", "tmpfs", &format!("{place}/later")],
    )?;
    bench
        .machine()
        .output("mkdir", &[&format!("{place}/later/seen")])?;
    assert_eq!(bench.exec_ok(&ids[0], "ls /shared/later").await?, "");
    assert_eq!(bench.exec_ok(&ids[1], "ls /shared/later").await?, "seen\n");
    bench.remove(&pod).await?;
    bench.machine().output("umount", &["-R", &place])?;
    bench.finish().await
}

/// CRI contract 5.5: devices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn devices_appear_only_when_asked_for() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("devices")).await?;
    let toolbox = bench.toolbox.clone();
    let text = "for d in null zero full random urandom tty ptmx; do test -e /dev/$d || echo no $d; done; \
        test -e /dev/kmsg && echo kmsg; test -c /dev/mine && echo mine; \
        mknod /tmp/kmsg c 1 11 && { head -c 1 /tmp/kmsg >/dev/null 2>&1 && echo readable || echo denied; }";
    let (_, output) = bench
        .run_to_end(&pod, script("main", &toolbox, text))
        .await?;
    assert_eq!(output, "denied\n");
    let mut config = script("main", &toolbox, text);
    config.devices = vec![cri::Device {
        container_path: "/dev/mine".to_owned(),
        host_path: "/dev/zero".to_owned(),
        permissions: "rw".to_owned(),
    }];
    let (_, output) = bench.run_to_end(&pod, config.clone()).await?;
    assert_eq!(output, "mine\ndenied\n");
    config.devices[0].host_path = "/dev/not-there".to_owned();
    let error = bench.create(&pod, config).await;
    let failed = match error {
        Err(error) => error.message().contains("/dev/not-there"),
        Ok(id) => bench
            .start_container(&id)
            .await
            .is_err_and(|error| error.message().contains("/dev/not-there")),
    };
    assert!(failed, "a missing device is an error that names it");
    bench.finish().await
}

/// CRI contract 6: process ids and IPC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn pid_and_ipc_namespaces_are_shared_as_asked() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    for mode in [
        NamespaceMode::Container,
        NamespaceMode::Pod,
        NamespaceMode::Node,
    ] {
        let mut pod_config = pod(&format!("pids-{}", mode.as_str_name().to_lowercase()));
        options(&mut pod_config).pid = mode.into();
        let pod = bench.run(pod_config).await?;
        let with_mode = |mut config: cri::ContainerConfig| {
            security(&mut config)
                .namespace_options
                .get_or_insert_default()
                .pid = mode.into();
            config
        };
        let first = bench
            .launch(
                &pod,
                with_mode(container("first", &toolbox, &["sleep", "7777"])),
            )
            .await?;
        let text =
            "readlink /proc/self/ns/pid; cat /proc/1/comm; cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
        let second = bench
            .launch(
                &pod,
                with_mode(container("second", &toolbox, &["sleep", "8888"])),
            )
            .await?;
        let shown = bench.exec_ok(&second, text).await?;
        let sees_other = shown.contains("sleep 7777");
        assert_eq!(
            sees_other,
            mode != NamespaceMode::Container,
            "{mode:?}: {shown}"
        );
        let host = fs::read_link("/proc/self/ns/pid")?
            .to_string_lossy()
            .into_owned();
        assert_eq!(
            shown.starts_with(&host),
            mode == NamespaceMode::Node,
            "{mode:?}: {shown}"
        );
        // One that shares pids is still stopped whole.
        let config = with_mode(script(
            "many",
            &toolbox,
            "sleep 9999 & sleep 9999 & setsid sleep 9999 & wait",
        ));
        let many = bench.launch(&pod, config).await?;
        bench.stop_container(&many, 0).await?;
        if mode != NamespaceMode::Container {
            let left = bench
                .exec_ok(
                    &first,
                    "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '",
                )
                .await?;
            assert!(!left.contains("sleep 9999"), "{mode:?} leaves {left}");
        }
        // The shared memory of a pod.
        bench.exec_ok(&first, "echo shared >/dev/shm/x").await?;
        assert_eq!(bench.exec_ok(&second, "cat /dev/shm/x").await?, "shared\n");
        let same = bench.exec_ok(&first, "readlink /proc/self/ns/ipc").await?;
        assert_eq!(
            bench.exec_ok(&second, "readlink /proc/self/ns/ipc").await?,
            same
        );
        bench.remove(&pod).await?;
    }
    bench.finish().await
}

/// CRI contract 6: the process ids of a target.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_container_can_join_the_pids_of_another() -> Result<()> {
    let mut bench = Bench::start().await?;
    let (pod, target) = sleeper(&mut bench, "target").await?;
    let toolbox = bench.toolbox.clone();
    let with_target = |name: &str, target: &str| {
        let mut config = container(name, &toolbox, &["sleep", "10000"]);
        let options = security(&mut config)
            .namespace_options
            .get_or_insert_default();
        options.pid = NamespaceMode::Target.into();
        options.target_id = target.to_owned();
        config
    };
    let debugger = bench.launch(&pod, with_target("debugger", &target)).await?;
    let pid = "readlink /proc/self/ns/pid";
    assert_eq!(
        bench.exec_ok(&debugger, pid).await?,
        bench.exec_ok(&target, pid).await?
    );
    let other = bench.run(longshore_tests::pods::pod("other")).await?;
    let refused = bench.create(&other, with_target("stranger", &target)).await;
    assert!(refused.is_err(), "a target in another pod");
    bench.stop_container(&debugger, 0).await?;
    let state = bench.status(&target).await?.state();
    assert_eq!(state, ContainerState::ContainerRunning);
    bench.finish().await
}

/// CRI contract 2.3: kernel parameters and the host name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn sysctls_and_the_hostname_are_the_pods_own() -> Result<()> {
    let mut bench = Bench::start().await?;
    let mut config = pod("knobs");
    config.hostname = "a-name-of-its-own".to_owned();
    config.linux.get_or_insert_default().sysctls = HashMap::from([
        ("net.core.somaxconn".to_owned(), "321".to_owned()),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
    ]);
    config.dns_config = Some(cri::DnsConfig {
        servers: vec!["192.0.2.53".to_owned(), "2001:db8::53".to_owned()],
        searches: vec!["one.example".to_owned(), "two.example".to_owned()],
        options: vec!["ndots:3".to_owned()],
    });
    let pod = bench.run(config).await?;
    let text = "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shm_rmid_forced; uname -n; cat /etc/hostname; cat /etc/resolv.conf";
    let (_, output) = bench.run_script(&pod, text).await?;
    assert_eq!(
        output,
        "321\n1\na-name-of-its-own\na-name-of-its-own\n\
         search one.example two.example\nnameserver 192.0.2.53\nnameserver 2001:db8::53\noptions ndots:3\n"
    );
    bench.finish().await
}

/// Reads a limit of the container's own cgroup as the host sees it: v1 name, v2 name.
fn limit(pid: u64, v1: (&str, &str), v2: &str) -> Result<String> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let roots = longshore_tests::host::hierarchies()?;
    let unified = !groups
        .lines()
        .any(|line| line.split(':').nth(1) == Some(v1.0));
    let line = groups
        .lines()
        .find(|line| line.split(':').nth(1) == Some(if unified { "" } else { v1.0 }))
        .with_context(|| groups.clone())?;
    let path = line
        .splitn(3, ':')
        .nth(2)
        .context("a path")?
        .trim_start_matches('/');
    let file = if unified { v2 } else { v1.1 };
    for root in roots {
        let name = root
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let fits = if unified {
            name == "cgroup" || name == "unified"
        } else {
            name == v1.0
        };
        if fits && let Ok(text) = fs::read_to_string(root.join(path).join(file)) {
            return Ok(text.trim().to_owned());
        }
    }
    anyhow::bail!("no {file} for {pid} in {line}")
}

async fn pid_of(bench: &mut Bench, id: &str) -> Result<u64> {
    let request = cri::ContainerStatusRequest {
        container_id: id.to_owned(),
        verbose: true,
    };
    let response = bench.runtime.container_status(request).await?.into_inner();
    let info: serde_json::Value = serde_json::from_str(response.info.get("info").context("info")?)?;
    info["pid"].as_u64().context("pid")
}

/// CRI contract 3.6 and 7: limits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn limits_reach_the_kernel_and_can_change() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("limits")).await?;
    let toolbox = bench.toolbox.clone();
    let mut config = container("main", &toolbox, &["sleep", "10000"]);
    let wanted = resources(&mut config);
    wanted.memory_limit_in_bytes = 64 << 20;
    wanted.cpu_period = 100_000;
    wanted.cpu_quota = 50_000;
    wanted.cpu_shares = 512;
    wanted.oom_score_adj = 500;
    let id = bench.launch(&pod, config).await?;
    let pid = pid_of(&mut bench, &id).await?;
    assert_eq!(
        limit(pid, ("memory", "memory.limit_in_bytes"), "memory.max")?,
        (64 << 20).to_string()
    );
    let quota = limit(pid, ("cpu", "cpu.cfs_quota_us"), "cpu.max")?;
    assert!(quota.starts_with("50000"), "{quota}");
    assert_eq!(
        bench.exec_ok(&id, "cat /proc/1/oom_score_adj").await?,
        "500\n"
    );
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    bench.runtime.update_container_resources(request).await?;
    assert_eq!(
        limit(pid, ("memory", "memory.limit_in_bytes"), "memory.max")?,
        (96 << 20).to_string()
    );
    let quota = limit(pid, ("cpu", "cpu.cfs_quota_us"), "cpu.max")?;
    assert!(quota.starts_with("50000"), "zero means unchanged: {quota}");
    let shown = bench
        .status(&id)
        .await?
        .resources
        .unwrap_or_default()
        .linux
        .unwrap_or_default();
    assert_eq!(
        (
            shown.memory_limit_in_bytes,
            shown.cpu_quota,
            shown.cpu_shares
        ),
        (96 << 20, 50_000, 512)
    );
    // Changed before the start, it holds from the start.
    let mut config = container("later", &toolbox, &["sleep", "10000"]);
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    let later = bench.create(&pod, config).await?;
    let request = cri::UpdateContainerResourcesRequest {
        container_id: later.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 80 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    bench.runtime.update_container_resources(request).await?;
    bench.start_container(&later).await?;
    let pid = pid_of(&mut bench, &later).await?;
    assert_eq!(
        limit(pid, ("memory", "memory.limit_in_bytes"), "memory.max")?,
        (80 << 20).to_string()
    );
    bench.finish().await
}

/// CRI contract 3.5: a kill for memory is named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn want_of_memory_is_named() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("oom")).await?;
    let toolbox = bench.toolbox.clone();
    for _ in 0..5 {
        let mut config = script("main", &toolbox, "exec tail /dev/zero");
        resources(&mut config).memory_limit_in_bytes = 20 << 20;
        let id = bench.launch(&pod, config).await?;
        let status = bench.wait_exited(&id).await?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled")
        );
        bench.remove_container(&id).await?;
    }
    bench.finish().await
}

/// CRI contract 3.3: the stop signal, the wait, the kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_stop_is_gentle_first() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("stop")).await?;
    let toolbox = bench.toolbox.clone();
    let ready = |bench: &Bench, id: &str| {
        let (runtime, id) = (bench.runtime.clone(), id.to_owned());
        async move {
            wait_for("the handler to be set", async || {
                let request = cri::ExecSyncRequest {
                    container_id: id.clone(),
                    cmd: ["test", "-e", "/tmp/ready"].map(str::to_owned).to_vec(),
                    timeout: 30,
                };
                Ok(runtime
                    .clone()
                    .exec_sync(request)
                    .await?
                    .into_inner()
                    .exit_code
                    == 0)
            })
            .await
        }
    };
    let text = "trap 'echo caught; exit 5' TERM; touch /tmp/ready; while true; do sleep 0.05; done";
    let id = bench.launch(&pod, script("gentle", &toolbox, text)).await?;
    ready(&bench, &id).await?;
    bench.stop_container(&id, 30).await?;
    let status = bench.status(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (5, "Error"));
    assert_eq!(read_log(Path::new(&status.log_path))?.text(), "caught\n");
    // Another signal, as the request says.
    let text = "trap 'exit 6' USR1; touch /tmp/ready; while true; do sleep 0.05; done";
    let mut config = script("other", &toolbox, text);
    config.stop_signal = cri::Signal::Sigusr1.into();
    let id = bench.launch(&pod, config).await?;
    ready(&bench, &id).await?;
    bench.stop_container(&id, 30).await?;
    assert_eq!(bench.status(&id).await?.exit_code, 6);
    // One that will not listen.
    let text = "trap '' TERM; touch /tmp/ready; while true; do sleep 0.05; done";
    let id = bench.launch(&pod, script("deaf", &toolbox, text)).await?;
    ready(&bench, &id).await?;
    bench.stop_container(&id, 1).await?;
    assert_eq!(bench.status(&id).await?.exit_code, 137);
    // A second stop shortens the wait of the first.
    let id = bench
        .launch(&pod, script("patience", &toolbox, text))
        .await?;
    ready(&bench, &id).await?;
    let request = cri::StopContainerRequest {
        container_id: id.clone(),
        timeout: 3_000,
    };
    let mut runtime = bench.runtime.clone();
    let patient = tokio::spawn(async move { runtime.stop_container(request).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    bench.stop_container(&id, 0).await?;
    patient.await??;
    assert_eq!(bench.status(&id).await?.exit_code, 137);
    bench.finish().await
}

/// CRI contract 3.3: a caller that leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_cancelled_stop_does_not_kill() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("cancelled")).await?;
    let toolbox = bench.toolbox.clone();
    let id = bench
        .launch(
            &pod,
            script(
                "main",
                &toolbox,
                "trap '' TERM; while true; do sleep 0.05; done",
            ),
        )
        .await?;
    let mut request = tonic::Request::new(cri::StopContainerRequest {
        container_id: id.clone(),
        timeout: 2,
    });
    request.set_timeout(Duration::from_millis(500));
    bench
        .runtime
        .stop_container(request)
        .await
        .expect_err("cancelled");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let state = bench.status(&id).await?.state();
    assert_eq!(state, ContainerState::ContainerRunning);
    bench.finish().await
}

/// CRI contract 8.4 and 8.5: lines of the log, and its rotation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn logs_are_cut_joined_and_rotated_exactly() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("logs")).await?;
    let toolbox = bench.toolbox.clone();
    // Exactly the limit, one more, and a last line without its newline.
    let text = "head -c 16384 /dev/zero | tr '\\0' a; echo; head -c 16385 /dev/zero | tr '\\0' b; echo; printf end";
    let id = bench.launch(&pod, script("lines", &toolbox, text)).await?;
    let status = bench.wait_exited(&id).await?;
    let log = read_log(Path::new(&status.log_path))?;
    let shape: Vec<_> = log
        .lines
        .iter()
        .map(|line| (line.partial, line.text.len()))
        .collect();
    assert_eq!(shape[..3], [(false, 16384), (true, 16384), (false, 1)]);
    assert_eq!(shape[3].1, 3);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&status.log_path)?.permissions());
    assert_eq!(mode & 0o777, 0o640);
    // Rotation: the writer never stops, and no line is lost or doubled.
    let text = "i=0; while test $i -lt 3000; do echo line $i; i=$((i+1)); done; sleep 10000";
    let id = bench
        .launch(&pod, script("rotated", &toolbox, text))
        .await?;
    let path = bench.status(&id).await?.log_path;
    let mut all = String::new();
    for number in 0..5 {
        let old = format!("{path}.{number}");
        fs::rename(&path, &old)?;
        let request = cri::ReopenContainerLogRequest {
            container_id: id.clone(),
        };
        bench.runtime.reopen_container_log(request).await?;
        assert!(
            Path::new(&path).exists(),
            "the new file is there when the reply comes"
        );
        all.push_str(&fs::read_to_string(&old)?);
    }
    let (before, last) = (all, path.clone());
    let expected: String = (0..3000).map(|number| format!("line {number}\n")).collect();
    wait_for("all lines", async || {
        let text = before.clone() + &fs::read_to_string(&last)?;
        Ok(longshore_tests::pods::parse_log(&text)?.lines.len() >= 3000)
    })
    .await?;
    let text = before + &fs::read_to_string(&last)?;
    assert_eq!(longshore_tests::pods::parse_log(&text)?.text(), expected);
    bench.stop_container(&id, 0).await?;
    let request = cri::ReopenContainerLogRequest { container_id: id };
    bench
        .runtime
        .reopen_container_log(request)
        .await
        .expect_err("not running");
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_terminal_is_a_terminal() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("tty")).await?;
    let toolbox = bench.toolbox.clone();
    let mut config = script(
        "main",
        &toolbox,
        "tty; echo $TERM; echo err >&2; test -t 0 && test -t 1 && echo both",
    );
    config.tty = true;
    config.stdin = true;
    let id = bench.launch(&pod, config).await?;
    let status = bench.wait_exited(&id).await?;
    let log = read_log(Path::new(&status.log_path))?;
    let lines: Vec<_> = log
        .lines
        .iter()
        .map(|line| line.text.trim_end_matches('\r'))
        .collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert!(lines[0].starts_with("/dev/"), "{lines:?}");
    assert_eq!(lines[1..], ["xterm", "err", "both"]);
    assert!(log.lines.iter().all(|line| line.stream == "stdout"));
    bench.finish().await
}

/// CRI contract 4.4: privileged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_privileged_container_may_do_all() -> Result<()> {
    let mut bench = Bench::start().await?;
    let mut config = pod("privileged");
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .privileged = true;
    let privileged = bench.run(config).await?;
    let toolbox = bench.toolbox.clone();
    let text = "grep ^Seccomp: /proc/self/status; mount -t tmpfs tmpfs /mnt && echo mounted; test -e /dev/kmsg && echo kmsg; touch /sys/kernel/mm/x 2>&1 | grep -c Read-only";
    let mut config = script("main", &toolbox, text);
    security(&mut config).privileged = true;
    let (_, output) = bench.run_to_end(&privileged, config.clone()).await?;
    assert_eq!(output, "Seccomp:\t0\nmounted\nkmsg\n0\n");
    let plain = bench.run(pod("plain")).await?;
    bench
        .create(&plain, config)
        .await
        .expect_err("privileged in a pod that is not");
    bench.finish().await
}

/// CRI contract 2.3 and 3.1: names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn names_are_unique_and_free_again() -> Result<()> {
    let mut bench = Bench::start().await?;
    let config = pod("unique");
    let first = bench.run(config.clone()).await?;
    // A client that timed out asks again, and gets what it asked for; another wish does not.
    assert_eq!(bench.run(config.clone()).await?.id, first.id);
    let mut other = config.clone();
    other.hostname = "another".to_owned();
    let taken = bench
        .run(other)
        .await
        .expect_err("the same name, another pod");
    let status = taken.downcast_ref::<tonic::Status>().context("a status")?;
    assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
    assert!(
        status.message().contains(&first.id),
        "names the holder: {status:?}"
    );
    let toolbox = bench.toolbox.clone();
    let id = bench
        .create(&first, container("main", &toolbox, &["true"]))
        .await?;
    let same = bench
        .create(&first, container("main", &toolbox, &["true"]))
        .await?;
    assert_eq!(same, id);
    let error = bench
        .create(&first, container("main", &toolbox, &["false"]))
        .await
        .expect_err("the same name, another container");
    assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
    assert!(error.message().contains(&id), "{error:?}");
    bench.remove_container(&id).await?;
    bench
        .create(&first, container("main", &toolbox, &["true"]))
        .await?;
    bench.remove(&first).await?;
    let second = bench.run(config).await?;
    assert_ne!(first.id, second.id);
    bench.finish().await
}

/// CRI contract 1.7 and 11.2: filters, of lists and of streams.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn lists_show_what_their_filters_ask_for() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let (one, main) = sleeper(&mut bench, "one").await?;
    let two = bench.run(pod("two")).await?;
    let created = bench
        .create(&two, container("idle", &toolbox, &["true"]))
        .await?;
    bench.stop(&two).await?;
    let pods = |filter: cri::PodSandboxFilter| {
        let mut runtime = bench.runtime.clone();
        async move {
            let request = cri::ListPodSandboxRequest {
                filter: Some(filter),
            };
            let mut ids: Vec<_> = runtime
                .list_pod_sandbox(request)
                .await?
                .into_inner()
                .items
                .into_iter()
                .map(|pod| pod.id)
                .collect();
            ids.sort();
            anyhow::Ok(ids)
        }
    };
    let mut both = vec![one.id.clone(), two.id.clone()];
    both.sort();
    assert_eq!(pods(cri::PodSandboxFilter::default()).await?, both);
    let by_id = |id: &str| cri::PodSandboxFilter {
        id: id.to_owned(),
        ..Default::default()
    };
    assert_eq!(pods(by_id(&one.id)).await?, [one.id.as_str()]);
    assert_eq!(pods(by_id(&one.id[..13])).await?, [one.id.as_str()]);
    assert!(pods(by_id(&"0".repeat(64))).await?.is_empty());
    let ready = cri::PodSandboxFilter {
        state: Some(cri::PodSandboxStateValue {
            state: PodSandboxState::SandboxReady.into(),
        }),
        ..Default::default()
    };
    assert_eq!(pods(ready).await?, [one.id.as_str()]);
    let labelled = cri::PodSandboxFilter {
        label_selector: HashMap::from([("test".to_owned(), "two".to_owned())]),
        ..Default::default()
    };
    assert_eq!(pods(labelled).await?, [two.id.as_str()]);
    for (filter, expected) in [
        (
            cri::ContainerFilter {
                pod_sandbox_id: one.id.clone(),
                ..Default::default()
            },
            vec![main.clone()],
        ),
        (
            cri::ContainerFilter {
                id: created[..12].to_owned(),
                ..Default::default()
            },
            vec![created.clone()],
        ),
        (
            cri::ContainerFilter {
                state: Some(cri::ContainerStateValue {
                    state: ContainerState::ContainerRunning.into(),
                }),
                ..Default::default()
            },
            vec![main.clone()],
        ),
    ] {
        let request = cri::ListContainersRequest {
            filter: Some(filter.clone()),
        };
        let found: Vec<_> = bench
            .runtime
            .list_containers(request)
            .await?
            .into_inner()
            .containers
            .into_iter()
            .map(|item| item.id)
            .collect();
        assert_eq!(found, expected, "{filter:?}");
        let request = cri::StreamContainersRequest {
            filter: Some(filter.clone()),
        };
        let mut stream = bench.runtime.stream_containers(request).await?.into_inner();
        let mut streamed = Vec::new();
        while let Some(part) = stream.message().await? {
            streamed.extend(part.containers.into_iter().map(|item| item.id));
        }
        assert_eq!(streamed, expected, "{filter:?}");
    }
    bench.finish().await
}

/// CRI contract 11.3: statistics.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn stats_tell_what_is_used() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("stats")).await?;
    let toolbox = bench.toolbox.clone();
    let text =
        "dd if=/dev/zero of=/grown bs=1M count=3 2>/dev/null; i=0; while true; do i=$((i+1)); done";
    let id = bench.launch(&pod, script("busy", &toolbox, text)).await?;
    let runtime = bench.runtime.clone();
    let wait = id.clone();
    wait_for("cpu time and a grown layer", async || {
        let request = cri::ContainerStatsRequest {
            container_id: wait.clone(),
        };
        let stats = runtime
            .clone()
            .container_stats(request)
            .await?
            .into_inner()
            .stats
            .context("stats")?;
        let cpu = stats
            .cpu
            .and_then(|cpu| cpu.usage_core_nano_seconds)
            .map_or(0, |value| value.value);
        let memory = stats
            .memory
            .and_then(|memory| memory.working_set_bytes)
            .map_or(0, |value| value.value);
        let layer = stats
            .writable_layer
            .and_then(|layer| layer.used_bytes)
            .map_or(0, |value| value.value);
        Ok(cpu > 10_000_000 && memory > 0 && layer >= 3 << 20)
    })
    .await?;
    let request = cri::ListContainerStatsRequest::default();
    let all = bench
        .runtime
        .list_container_stats(request)
        .await?
        .into_inner()
        .stats;
    assert_eq!(all.len(), 1);
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let stats = bench
        .runtime
        .pod_sandbox_stats(request)
        .await?
        .into_inner()
        .stats
        .context("stats")?;
    let linux = stats.linux.context("linux")?;
    let interface = linux
        .network
        .and_then(|network| network.default_interface)
        .context("an interface")?;
    assert_eq!(interface.name, "eth0");
    assert!(
        linux
            .process
            .and_then(|process| process.process_count)
            .is_some_and(|count| count.value >= 1)
    );
    assert_eq!(linux.containers.len(), 1);
    // In the host's network nothing is a pod's own; kubelet would follow a network without a default.
    let mut config = host_network_pod("stats-host");
    config.labels = HashMap::from([("network".to_owned(), "host".to_owned())]);
    bench.run(config).await?;
    let request = cri::ListPodSandboxStatsRequest::default();
    let all = bench
        .runtime
        .list_pod_sandbox_stats(request)
        .await?
        .into_inner()
        .stats;
    assert_eq!(all.len(), 2);
    for stats in all {
        let of_host = stats
            .attributes
            .is_some_and(|attributes| attributes.labels.contains_key("network"));
        let network = stats.linux.and_then(|linux| linux.network);
        assert_eq!(network.is_none(), of_host, "{network:?}");
        assert!(network.is_none_or(|network| network.default_interface.is_some()));
    }
    bench.finish().await
}

/// CRI contract 11.1: events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn events_come_in_order_with_the_state_of_now() -> Result<()> {
    use cri::ContainerEventType::{
        ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
    };
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let mut stream = bench
        .runtime
        .get_container_events(cri::GetEventsRequest {})
        .await?
        .into_inner();
    let pod = bench.run(pod("events")).await?;
    let id = bench
        .launch(&pod, script("main", &toolbox, "exit 3"))
        .await?;
    bench.wait_exited(&id).await?;
    bench.remove_container(&id).await?;
    bench.remove(&pod).await?;
    let expected = [
        (&pod.id, ContainerCreatedEvent),
        (&pod.id, ContainerStartedEvent),
        (&id, ContainerCreatedEvent),
        (&id, ContainerStartedEvent),
        (&id, ContainerStoppedEvent),
        (&id, ContainerDeletedEvent),
        (&pod.id, ContainerStoppedEvent),
        (&pod.id, ContainerDeletedEvent),
    ];
    for (subject, kind) in expected {
        let event = tokio::time::timeout(longshore_tests::pods::WAIT_LIMIT, stream.message())
            .await
            .with_context(|| format!("{kind:?} never came"))??
            .context("the stream ended")?;
        assert_eq!(
            (&event.container_id, event.container_event_type()),
            (subject, kind)
        );
        assert!(event.created_at > 0);
        // The last one names the pod too: kubelet drops its status then.
        let told = event.pod_sandbox_status.context("a status")?;
        assert_eq!(
            (told.id, told.metadata),
            (pod.id.clone(), pod.config.metadata.clone())
        );
    }
    bench.finish().await
}

/// CRI contract 2.7 and 11.1: kubelet keeps the answer with the latest time, so none may lack what an
/// earlier one told. Of containers of one name it takes the first, so the newest comes first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_answer_knows_all_that_earlier_ones_told() -> Result<()> {
    const CONTAINERS: usize = 40;
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("times")).await?;
    let mut stream = bench
        .runtime
        .get_container_events(cri::GetEventsRequest {})
        .await?
        .into_inner();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let askers: Vec<_> = (0..4)
        .map(|_| {
            let (mut runtime, stopped) = (bench.runtime.clone(), stopped.clone());
            let request = cri::PodSandboxStatusRequest {
                pod_sandbox_id: pod.id.clone(),
                verbose: false,
            };
            tokio::spawn(async move {
                let mut answers = Vec::new();
                while !*stopped.borrow() {
                    let answer = runtime.pod_sandbox_status(request.clone()).await?;
                    let answer = answer.into_inner();
                    assert_newest_first(&answer.containers_statuses);
                    answers.push((answer.timestamp, ids(&answer.containers_statuses)));
                }
                anyhow::Ok(answers)
            })
        })
        .collect();
    for number in 0..CONTAINERS {
        let name = format!("one-{number}");
        bench
            .create(&pod, container(&name, &toolbox, &["true"]))
            .await?;
    }
    let mut told = Vec::new();
    while told.len() < CONTAINERS {
        let event = tokio::time::timeout(longshore_tests::pods::WAIT_LIMIT, stream.message())
            .await??
            .context("the stream ended")?;
        assert_newest_first(&event.containers_statuses);
        assert!(ids(&event.containers_statuses).contains(&event.container_id));
        told.push((event.created_at, event.container_id));
    }
    stop.send_replace(true);
    for asker in askers {
        for (timestamp, known) in asker.await?? {
            for (at, id) in told.iter().filter(|(at, _)| *at < timestamp) {
                assert!(known.contains(id), "{timestamp} lacks {id}, told at {at}");
            }
        }
    }
    bench.finish().await
}

fn assert_newest_first(statuses: &[cri::ContainerStatus]) {
    assert!(
        statuses.is_sorted_by(|one, next| one.created_at >= next.created_at),
        "{statuses:?}"
    );
}

fn ids(statuses: &[cri::ContainerStatus]) -> std::collections::BTreeSet<String> {
    statuses.iter().map(|status| status.id.clone()).collect()
}

/// CRI contract 10.1: conditions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn the_node_says_that_it_is_ready() -> Result<()> {
    let mut bench = Bench::start().await?;
    let version = bench
        .runtime
        .version(cri::VersionRequest::default())
        .await?
        .into_inner();
    assert_eq!(
        (
            version.version.as_str(),
            version.runtime_api_version.as_str()
        ),
        ("0.1.0", "v1")
    );
    assert!(!version.runtime_name.is_empty() && !version.runtime_version.is_empty());
    let status = bench
        .runtime
        .status(cri::StatusRequest { verbose: true })
        .await?
        .into_inner();
    let conditions = status.status.context("a status")?.conditions;
    for kind in ["RuntimeReady", "NetworkReady"] {
        assert!(
            conditions
                .iter()
                .any(|found| found.r#type == kind && found.status),
            "{conditions:?}"
        );
    }
    assert!(
        status
            .runtime_handlers
            .iter()
            .any(|handler| handler.name.is_empty())
    );
    bench
        .runtime
        .runtime_config(cri::RuntimeConfigRequest {})
        .await?;
    let request = cri::UpdateRuntimeConfigRequest {
        runtime_config: Some(cri::RuntimeConfig {
            network_config: Some(cri::NetworkConfig {
                pod_cidr: String::new(),
            }),
        }),
    };
    bench.runtime.update_runtime_config(request).await?;
    bench.finish().await
}

/// CRI contract 2.9: the supervisor of a pod dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_lost_shim_loses_its_pod_alone() -> Result<()> {
    let mut bench = Bench::start().await?;
    let (lost, _) = sleeper(&mut bench, "lost").await?;
    let (kept, id) = sleeper(&mut bench, "kept").await?;
    for pid in longshore_tests::host::pids()? {
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else {
            continue;
        };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains("longshore-shim") && command.contains(&lost.id) {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(i32::try_from(pid)?),
                nix::sys::signal::Signal::SIGKILL,
            )?;
        }
    }
    let runtime = bench.runtime.clone();
    let request = || cri::PodSandboxStatusRequest {
        pod_sandbox_id: lost.id.clone(),
        verbose: false,
    };
    wait_for("the pod to be not ready", async || {
        let status = runtime
            .clone()
            .pod_sandbox_status(request())
            .await?
            .into_inner()
            .status;
        Ok(status.is_some_and(|status| status.state() == PodSandboxState::SandboxNotready))
    })
    .await?;
    assert_eq!(bench.exec_ok(&id, "echo fine").await?, "fine\n");
    assert_eq!(
        bench.pod_status(&kept).await?.state(),
        PodSandboxState::SandboxReady
    );
    bench.remove(&lost).await?;
    bench.finish().await
}
