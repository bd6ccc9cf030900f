//! How containers and pods end: all of them, in order, and told.

use std::fs;

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1::{
    self as cri, ContainerEventType as Kind, ContainerState, NamespaceMode, PodSandboxState,
};
use longshore_tests::pods::{
    Bench, WAIT_LIMIT, pod, resources, script, security, unique, wait_for,
};

/// Processes of the host with `word` among their arguments.
fn with_argument(word: &str) -> Result<usize> {
    let mut found = 0;
    for entry in fs::read_dir("/proc")? {
        let arguments = fs::read(entry?.path().join("cmdline")).unwrap_or_default();
        let mut words = arguments.split(|byte| *byte == 0);
        found += usize::from(words.any(|one| one == word.as_bytes()));
    }
    Ok(found)
}

/// CRI contract 3.3 and 3.4: a stop and a removal end all that a container has started, also where its
/// first process is not the first of a pid namespace, and whatever the others think of signals.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_outlives_its_container() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let mut shared = pod("shared");
    longshore_tests::pods::options(&mut shared).pid = NamespaceMode::Pod.into();
    let pod = bench.run(shared).await?;
    for (mode, how) in [
        (NamespaceMode::Pod, "kill"),
        (NamespaceMode::Pod, "term"),
        (NamespaceMode::Node, "term"),
        (NamespaceMode::Container, "term"),
        (NamespaceMode::Pod, "remove"),
    ] {
        // No other test, and no other run of this one, sleeps for so long.
        let seconds = format!("{}{:03}", 1_000_000 + std::process::id(), unique());
        let text = format!(
            "trap '' TERM; sleep {seconds} & setsid sleep {seconds} & trap - TERM; \
             sleep {seconds} & exec sleep {seconds}"
        );
        let mut config = script("main", &toolbox, &text);
        let context = security(&mut config);
        context.namespace_options.get_or_insert_default().pid = mode.into();
        let id = bench.launch(&pod, config).await?;
        wait_for("four sleepers", async || Ok(with_argument(&seconds)? == 4)).await?;
        match how {
            "kill" => bench.stop_container(&id, 0).await?,
            "term" => bench.stop_container(&id, 1).await?,
            _ => bench.remove_container(&id).await?,
        }
        assert_eq!(with_argument(&seconds)?, 0, "{mode:?} {how}");
        if how != "remove" {
            assert_eq!(
                bench.status(&id).await?.state(),
                ContainerState::ContainerExited
            );
        }
        bench.remove_container(&id).await?;
    }
    bench.finish().await
}

/// CRI contract 3.3: a command can be started while its container is being stopped, and ends with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_run_until_their_container_ends() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("grace")).await?;
    let text = "trap 'touch /asked' TERM; touch /ready; while true; do sleep 0.05; done";
    let id = bench.launch(&pod, script("main", &toolbox, text)).await?;
    let runtime = bench.runtime.clone();
    let exec = |command: &[&str]| {
        let request = cri::ExecSyncRequest {
            container_id: id.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: 0,
        };
        let mut runtime = runtime.clone();
        async move {
            runtime
                .exec_sync(request)
                .await
                .map(tonic::Response::into_inner)
        }
    };
    wait_for("the handler", async || {
        Ok(exec(&["test", "-e", "/ready"]).await?.exit_code == 0)
    })
    .await?;
    let stop = cri::StopContainerRequest {
        container_id: id.clone(),
        timeout: 600,
    };
    let mut stopping = bench.runtime.clone();
    let first = tokio::spawn(async move { stopping.stop_container(stop).await });
    wait_for("the signal", async || {
        Ok(exec(&["test", "-e", "/asked"]).await?.exit_code == 0)
    })
    .await?;
    let long = tokio::spawn(exec(&["sh", "-c", "touch /running; sleep 100000"]));
    wait_for("the command", async || {
        Ok(exec(&["test", "-e", "/running"]).await?.exit_code == 0)
    })
    .await?;
    // The second stop has less patience, and both are answered by the one end.
    bench.stop_container(&id, 0).await?;
    tokio::time::timeout(WAIT_LIMIT, first).await???;
    let ended = tokio::time::timeout(WAIT_LIMIT, long).await??;
    assert!(
        ended.as_ref().map_or(true, |ended| ended.exit_code == 137),
        "{ended:?}"
    );
    bench.finish().await
}

/// CRI contract 3.3 and 8.1: a probe that meets the end of its container is told just that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_meet_the_end_of_their_container() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("probed")).await?;
    for _ in 0..12 {
        let sleeper = script(
            "main",
            &toolbox,
            "sleep 10000 & sleep 10000 & exec sleep 10000",
        );
        let id = bench.launch(&pod, sleeper).await?;
        let probes: Vec<_> = (0..6)
            .map(|_| {
                let mut runtime = bench.runtime.clone();
                let request = cri::ExecSyncRequest {
                    container_id: id.clone(),
                    cmd: vec!["true".to_owned()],
                    timeout: 0,
                };
                tokio::spawn(async move {
                    loop {
                        if let Err(refused) = runtime.exec_sync(request.clone()).await {
                            return refused;
                        }
                    }
                })
            })
            .collect();
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        bench.stop_container(&id, 0).await?;
        for probe in probes {
            let refused = tokio::time::timeout(WAIT_LIMIT, probe).await??;
            assert_eq!(
                refused.code(),
                tonic::Code::FailedPrecondition,
                "{refused:?}"
            );
        }
        bench.remove_container(&id).await?;
    }
    bench.finish().await
}

/// CRI contract 11.1 and 2.5: a pod that is stopped with what runs in it tells of the containers first,
/// each event with what all of them are by then; who comes later is not told of what was before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_pod_is_told_in_order() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("told")).await?;
    let running = bench
        .launch(&pod, script("running", &toolbox, "exec sleep 10000"))
        .await?;
    let created = bench
        .create(&pod, script("created", &toolbox, "true"))
        .await?;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let stream = bench
            .runtime
            .get_container_events(cri::GetEventsRequest {})
            .await?;
        streams.push(stream.into_inner());
    }
    bench.remove(&pod).await?;
    for mut stream in streams {
        let mut seen = Vec::new();
        loop {
            let event = tokio::time::timeout(WAIT_LIMIT, stream.message()).await??;
            let event = event.context("the stream ended")?;
            let kind = event.container_event_type();
            let status = event.pod_sandbox_status.clone();
            if kind == Kind::ContainerStoppedEvent && event.container_id == pod.id {
                let status = status.context("the pod's status")?;
                assert_eq!(status.state(), PodSandboxState::SandboxNotready);
                let ran = event
                    .containers_statuses
                    .iter()
                    .find(|one| one.id == running);
                assert!(ran.is_none_or(|one| one.state() == ContainerState::ContainerExited));
            }
            seen.push((event.container_id.clone(), kind));
            if (&event.container_id, kind) == (&pod.id, Kind::ContainerDeletedEvent) {
                break;
            }
        }
        let place = |id: &str, kind: Kind| {
            let found = seen
                .iter()
                .position(|(one, which)| (one.as_str(), *which) == (id, kind));
            found.with_context(|| format!("{kind:?} of {id}: {seen:?}"))
        };
        let container_stopped = place(&running, Kind::ContainerStoppedEvent)?;
        let stopped = place(&pod.id, Kind::ContainerStoppedEvent)?;
        assert!(container_stopped < stopped, "{seen:?}");
        for id in [&running, &created] {
            let deleted = place(id, Kind::ContainerDeletedEvent)?;
            assert!(
                container_stopped < deleted && deleted < seen.len() - 1,
                "{seen:?}"
            );
        }
        let early = [Kind::ContainerCreatedEvent, Kind::ContainerStartedEvent];
        assert!(
            !seen.iter().any(|(_, kind)| early.contains(kind)),
            "{seen:?}"
        );
    }
    bench.finish().await
}

/// CRI contract 7: a size of huge pages that is forbidden is no wish for a controller; files of version 2
/// are written as they are, or refused by name where there are none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_kubelet_always_sends_is_taken() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("kubelet")).await?;
    let mut config = script("main", &toolbox, "true");
    let limits = resources(&mut config);
    limits.hugepage_limits = ["2MB", "1GB", "64KB"]
        .map(|size| cri::HugepageLimit {
            page_size: size.to_owned(),
            limit: 0,
        })
        .to_vec();
    (limits.cpu_shares, limits.cpu_period, limits.oom_score_adj) = (2, 100_000, 1000);
    let (status, _) = bench.run_to_end(&pod, config.clone()).await?;
    assert_eq!(status.exit_code, 0);
    let shown = status
        .resources
        .unwrap_or_default()
        .linux
        .unwrap_or_default();
    assert_eq!(shown.hugepage_limits.len(), 3);
    resources(&mut config)
        .unified
        .insert("memory.oom.group".to_owned(), "1".to_owned());
    let controls = bench
        .machine()
        .run(|| fs::read_to_string("/sys/fs/cgroup/cgroup.controllers"));
    let is_v2 = controls.is_ok_and(|controls| controls.contains("memory"));
    let created = bench.create(&pod, config).await;
    match (is_v2, created) {
        (true, created) => assert!(created.is_ok(), "{created:?}"),
        (false, Ok(_)) => panic!("version 1 has no such file"),
        (false, Err(refused)) => assert!(refused.message().contains("unified"), "{refused:?}"),
    }
    bench.finish().await
}
