//! The agent dies without a word; pods do not notice, and the next agent knows everything.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use longshore_proto::cri::v1::{self as cri, ContainerState, PodSandboxState};
use longshore_tests::{
    machine::fetch_page,
    pods::{Bench, container, options, pod, read_log, script, user_namespace, wait_for},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// CRI contract 3.7: what lives through a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn pods_live_through_the_death_of_the_agent() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let mut config = pod("lives");
    config.port_mappings = vec![cri::PortMapping {
        container_port: 8080,
        host_port: 18080,
        ..Default::default()
    }];
    let pod = bench.run(config.clone()).await?;
    let page = bench
        .launch(&pod, container("page", &toolbox, &["page-server"]))
        .await?;
    let gate = bench.node.dir().join("gate");
    fs::create_dir(&gate)?;
    let gated = |name: &str, code: &str| {
        let mut config = script(
            name,
            &toolbox,
            &format!("while ! test -e /gate/open; do sleep 0.05; done; echo bye; {code}"),
        );
        config.mounts = vec![cri::Mount {
            container_path: "/gate".to_owned(),
            host_path: gate.to_string_lossy().into_owned(),
            readonly: true,
            ..Default::default()
        }];
        config
    };
    let ends = bench.launch(&pod, gated("ends", "exit 23")).await?;
    let killed = bench
        .launch(&pod, gated("killed", "sh -c 'kill -9 $$'"))
        .await?;
    let mut hungry = gated("hungry", "exec tail /dev/zero");
    longshore_tests::pods::resources(&mut hungry).memory_limit_in_bytes = 20 << 20;
    let hungry = bench.launch(&pod, hungry).await?;
    let counts = bench
        .launch(
            &pod,
            script(
                "counts",
                &toolbox,
                "i=0; while true; do i=$((i+1)); echo $i; sleep 0.02; done",
            ),
        )
        .await?;
    let created = bench
        .create(&pod, container("created", &toolbox, &["sleep", "10000"]))
        .await?;
    let addresses = bench.addresses(&pod).await?;
    let before = bench.status(&counts).await?;

    bench.node.kill()?;
    let target = std::net::SocketAddr::new(addresses[0], 8080);
    assert!(
        fetch_page(bench.machine(), target)?.contains("Hello"),
        "unreachable while the agent is down"
    );
    fs::write(gate.join("open"), "")?;
    // What exits while nobody listens.
    let last_words = [&ends, &killed, &hungry];
    let log = Path::new(&before.log_path)
        .parent()
        .context("a directory")?
        .join("ends.log");
    wait_for("the last words", async || {
        Ok(fs::read_to_string(&log).is_ok_and(|text| text.contains("bye")))
    })
    .await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    bench.node.launch().await?;
    bench.reconnect();

    for (id, code, reason) in [
        (&ends, 23, "Error"),
        (&killed, 137, "Error"),
        (&hungry, 137, "OOMKilled"),
    ] {
        let status = bench.wait_exited(id).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason));
        assert!(status.finished_at >= status.started_at && status.started_at > 0);
    }
    assert_eq!(last_words.len(), 3);
    assert_eq!(
        bench.pod_status(&pod).await?.state(),
        PodSandboxState::SandboxReady
    );
    assert_eq!(bench.addresses(&pod).await?, addresses);
    let after = bench.status(&counts).await?;
    assert_eq!(after.state(), ContainerState::ContainerRunning);
    assert_eq!(after.started_at, before.started_at);
    assert_eq!(bench.exec_ok(&counts, "echo back").await?, "back\n");
    assert_eq!(bench.exec_ok(&page, "echo back").await?, "back\n");
    assert!(fetch_page(bench.machine(), "127.0.0.1:18080".parse()?)?.contains("Hello"));
    // The log has no gap.
    let numbers: Vec<u32> = read_log(Path::new(&before.log_path))?
        .text()
        .lines()
        .map(|line| line.parse().context("a number"))
        .collect::<Result<_>>()?;
    assert!(
        numbers.len() > 10
            && numbers
                .iter()
                .zip(1..)
                .all(|(found, expected)| *found == expected)
    );
    bench.start_container(&created).await?;
    let running = bench.status(&created).await?.state();
    assert_eq!(running, ContainerState::ContainerRunning);
    // The same wish again is answered, another one of that name is not; ports are still held.
    assert_eq!(bench.run(config.clone()).await?.id, pod.id);
    let mut namesake = config.clone();
    namesake.hostname = "another".to_owned();
    bench.run(namesake).await.expect_err("the name is taken");
    let mut other = longshore_tests::pods::pod("other");
    other.port_mappings = config.port_mappings;
    bench.run(other).await.expect_err("the port is taken");
    bench.node.fsck_clean().await?;
    // New and old pods side by side, and everything can be taken down.
    let second = bench.run(longshore_tests::pods::pod("second")).await?;
    bench
        .launch(&second, container("main", &toolbox, &["sleep", "10000"]))
        .await?;
    bench.stop_container(&counts, 1).await?;
    assert_eq!(bench.status(&counts).await?.exit_code, 137);
    bench.finish().await
}

/// CRI contract 2.2: all or nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_kill_in_the_middle_leaves_all_or_nothing() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    // Delays spread over the milliseconds that these calls take, so that each step is hit some day.
    for round in 0..16_u64 {
        let mut runtime = bench.runtime.clone();
        let mut config = pod("middle");
        config.log_directory = bench.node.log_dir().to_string_lossy().into_owned();
        config.port_mappings = vec![cri::PortMapping {
            container_port: 8080,
            host_port: 18080,
            ..Default::default()
        }];
        // Every other pod has a user namespace, which takes other steps.
        options(&mut config).userns_options = (round % 2 == 1).then(user_namespace);
        let toolbox = toolbox.clone();
        let work = tokio::spawn(async move {
            let request = cri::RunPodSandboxRequest {
                config: Some(config.clone()),
                ..Default::default()
            };
            let id = runtime
                .run_pod_sandbox(request)
                .await?
                .into_inner()
                .pod_sandbox_id;
            let request = cri::CreateContainerRequest {
                pod_sandbox_id: id.clone(),
                config: Some(container("main", &toolbox, &["sleep", "10000"])),
                sandbox_config: Some(config),
            };
            let container_id = runtime
                .create_container(request)
                .await?
                .into_inner()
                .container_id;
            runtime
                .start_container(cri::StartContainerRequest { container_id })
                .await?;
            let request = cri::StopPodSandboxRequest {
                pod_sandbox_id: id.clone(),
            };
            runtime.stop_pod_sandbox(request).await?;
            runtime
                .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await?;
            Ok::<_, tonic::Status>(())
        });
        tokio::time::sleep(Duration::from_millis(1 + round * round)).await;
        bench.crash().await?;
        let _cut_off = work.await?;
        // What the crash left half made is gone before the first answer, or soon after.
        let node = &bench.node;
        let round_clean = async || Ok(node.fsck().await?.is_empty());
        if let Err(error) = wait_for("fsck to find nothing", round_clean).await {
            anyhow::bail!("round {round}: {error}: {:?}", bench.node.fsck().await?);
        }
        let pods = bench
            .runtime
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await?;
        for item in pods.into_inner().items {
            let pod = longshore_tests::pods::Pod {
                id: item.id,
                config: Default::default(),
            };
            bench.remove(&pod).await?;
        }
        bench
            .node
            .expect_clean()
            .with_context(|| format!("round {round}"))?;
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn a_kill_during_a_pull_leaves_nothing_but_what_the_next_pull_uses() -> Result<()>
{
    use longshore_tests::{
        images::{ImageBuilder, LayerBuilder},
        registry::{Fault, On},
    };
    let mut bench = Bench::start().await?;
    let data: Vec<u8> = (0..3_000_000_u32)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let image =
        ImageBuilder::new(vec![LayerBuilder::new().file("data", 0o644, data).build()]).build();
    bench.registry.push("cut:1", &image);
    bench.registry.fault(
        On::Digest(image.blobs[0].0.clone()),
        Fault::Slow(Duration::from_millis(20)),
        None,
    );
    let reference = bench.registry.reference("cut:1");
    let mut images = bench.images.clone();
    let wanted = reference.clone();
    let pulling =
        tokio::spawn(async move { longshore_tests::pods::pull(&mut images, &wanted, None).await });
    tokio::time::sleep(Duration::from_millis(700)).await;
    bench.crash().await?;
    assert!(pulling.await?.is_err());
    bench.node.fsck_clean().await?;
    let listed = bench
        .images
        .list_images(cri::ListImagesRequest::default())
        .await?
        .into_inner()
        .images;
    assert_eq!(listed.len(), 1, "only the toolbox");
    bench.registry.heal();
    assert_eq!(bench.pull(&reference).await?, image.id);
    let request = cri::RemoveImageRequest {
        image: Some(cri::ImageSpec {
            image: image.id.clone(),
            ..Default::default()
        }),
    };
    bench.images.remove_image(request).await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn an_orderly_end_keeps_pods_running() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("orderly")).await?;
    let id = bench
        .launch(&pod, container("main", &toolbox, &["sleep", "10000"]))
        .await?;
    let status = bench.node.terminate()?;
    assert!(status.success(), "{status}");
    bench.node.launch().await?;
    bench.reconnect();
    assert_eq!(bench.exec_ok(&id, "echo still").await?, "still\n");
    bench.finish().await
}

/// Frozen and killed supervisors: with the agent there, and without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supervisor_that_is_frozen_or_killed_costs_its_own_pod_only() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let mut all = Vec::new();
    for name in ["well", "killed", "frozen", "frozen-later"] {
        let pod = bench.run(pod(name)).await?;
        let sleeper = container("main", &toolbox, &["sleep", "10000"]);
        let id = bench.launch(&pod, sleeper).await?;
        all.push((pod, id));
    }
    let [well, killed, frozen, later] = &all[..] else {
        bail!("four pods");
    };
    kill(supervisor(&killed.0.id)?, Signal::SIGKILL)?;
    wait_for("the loss is seen", async || {
        let state = bench.pod_status(&killed.0).await?.state();
        Ok(state == PodSandboxState::SandboxNotready)
    })
    .await?;

    bench.node.kill()?;
    kill(supervisor(&frozen.0.id)?, Signal::SIGSTOP)?;
    bench.node.launch().await?;
    bench.reconnect();
    for (pod, id) in [killed, frozen] {
        let state = bench.pod_status(pod).await?.state();
        assert_eq!(state, PodSandboxState::SandboxNotready);
        let status = bench.status(id).await?;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
    }
    // Its processes are gone with it, and it is no hindrance to a successor.
    kill(supervisor(&later.0.id)?, Signal::SIGSTOP)?;
    bench.remove(&later.0).await?;
    let again = bench.run(pod("frozen-later")).await?;
    assert_eq!(bench.exec_ok(&well.1, "echo well").await?, "well\n");
    for pod in [&well.0, &killed.0, &frozen.0, &again] {
        bench.remove(pod).await?;
    }
    bench.node.fsck_clean().await?;
    bench.finish().await
}

/// The process that supervises a pod.
fn supervisor(pod: &str) -> Result<Pid> {
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|&byte| byte == 0);
        if words.next() == Some(b"longshore-shim") && words.any(|word| word == pod.as_bytes()) {
            return Ok(Pid::from_raw(pid));
        }
    }
    bail!("no supervisor of {pod}")
}
