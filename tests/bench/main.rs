//! `cargo xtask bench`: what pods and execs cost, beside Debian's containerd on the same machine.
//!
//! Both engines run at once, each on a machine (network and mount namespace) of its own, and are
//! driven through CRI by the same code, taking turns in every round. CPU is that of the whole
//! machine less our own, so nothing else should be running. Memory is the proportional set size of
//! the engine's helper processes per idle pod.
#![forbid(unsafe_code)]

mod containerd;
mod measure;

use std::{env, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    images,
    machine::Machine,
    node::{ImageService, Node, Options, Runtime, connect},
    pods::{container, host_network_pod, pod, pull},
    registry::Registry,
};

use measure::{Cost, Samples, Stopwatch, pss_kib, rss_kib};

/// Parent of all cgroups here, as kubelet gives one; removed at the end.
pub(crate) const CGROUP: &str = "longshore-bench";

/// An engine that speaks CRI.
struct Engine {
    name: &'static str,
    runtime: Runtime,
    image: String,
    /// Pid of the daemon.
    daemon: u32,
    /// What the command lines of its helpers contain.
    helpers: String,
    log_dir: String,
    _registry: Registry,
    /// What lives as long as the engine: one of the two.
    node: Option<Node>,
    _peer: Option<containerd::Containerd>,
}

struct Wishes {
    rounds: u32,
    pods: u32,
}

fn wishes() -> Result<Wishes> {
    let mut wishes = Wishes {
        rounds: 20,
        pods: 20,
    };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args
            .next()
            .with_context(|| format!("{arg} needs a number"))?;
        match arg.as_str() {
            "--rounds" => wishes.rounds = value.parse()?,
            "--pods" => wishes.pods = value.parse()?,
            other => bail!("unknown option {other}"),
        }
    }
    Ok(wishes)
}

#[tokio::main]
async fn main() -> ExitCode {
    match bench().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench() -> Result<()> {
    let wishes = wishes()?;
    let mut engines = vec![longshore().await.context("start longshored")?];
    match peer().await {
        Ok(peer) => engines.push(peer),
        Err(why) => println!("without containerd: {why:#}\n"),
    }
    let mut samples: Vec<Samples> = engines.iter().map(|_| Samples::default()).collect();
    // The first round warms caches and is not counted.
    for round in 0..=wishes.rounds {
        for (engine, samples) in engines.iter_mut().zip(&mut samples) {
            let mut one = Samples::default();
            cycle(engine, &mut one)
                .await
                .with_context(|| format!("{} in round {round}", engine.name))?;
            if round > 0 {
                samples.merge(one);
            }
        }
    }
    let mut idle = Vec::new();
    for engine in &mut engines {
        idle.push(
            idle_memory(engine, wishes.pods)
                .await
                .context(engine.name)?,
        );
    }
    report(&engines, &samples, &idle, &wishes);
    for engine in &mut engines {
        if let Some(node) = engine.node.take() {
            node.finish().await?;
        }
    }
    Ok(())
}

async fn longshore() -> Result<Engine> {
    let node = Node::start_with(Options {
        flags: vec!["--log".to_owned(), "warn".to_owned()],
        ..Options::default()
    })
    .await?;
    let registry = Registry::start(node.machine().listen("127.0.0.1:0")?)?;
    registry.push("toolbox:1", &images::toolbox()?);
    let image = registry.reference("toolbox:1");
    pull(&mut node.images(), &image, None).await?;
    Ok(Engine {
        name: "longshore",
        runtime: node.runtime(),
        image,
        daemon: node.pid(),
        helpers: "longshore-shim".to_owned(),
        log_dir: node.log_dir().to_string_lossy().into_owned(),
        _registry: registry,
        node: Some(node),
        _peer: None,
    })
}

async fn peer() -> Result<Engine> {
    let machine = Machine::start()?;
    let registry = Registry::start(machine.listen("127.0.0.1:0")?)?;
    registry.push("toolbox:1", &images::toolbox()?);
    registry.push("pause:1", &images::pause_image()?);
    let image = registry.reference("toolbox:1");
    let daemon = containerd::Containerd::start(&machine, &registry.reference("pause:1")).await?;
    let channel = connect(&daemon.socket()).await?;
    pull(&mut ImageService::new(channel.clone()), &image, None)
        .await
        .context("containerd pulls")?;
    Ok(Engine {
        name: "containerd",
        runtime: Runtime::new(channel).max_decoding_message_size(64 << 20),
        image,
        daemon: daemon.pid(),
        helpers: "containerd-shim".to_owned(),
        log_dir: daemon.dir().join("logs").to_string_lossy().into_owned(),
        _registry: registry,
        node: None,
        _peer: Some(daemon),
    })
}

impl Engine {
    async fn up(&mut self, mut config: cri::PodSandboxConfig) -> Result<(String, String)> {
        config.log_directory.clone_from(&self.log_dir);
        config.linux.get_or_insert_default().cgroup_parent = format!("/{CGROUP}");
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            ..Default::default()
        };
        let sandbox = self
            .runtime
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id;
        let mut wish = container("main", &self.image, &["sleep", "100000"]);
        wish.log_path = format!("{sandbox}.log");
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(wish),
            sandbox_config: Some(config),
        };
        let id = self
            .runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id;
        let request = cri::StartContainerRequest {
            container_id: id.clone(),
        };
        self.runtime.start_container(request).await?;
        Ok((sandbox, id))
    }

    /// As kubelet does it: stop and remove the container, then the pod.
    async fn down(&mut self, sandbox: &str, id: &str) -> Result<()> {
        let container_id = id.to_owned();
        let pod_sandbox_id = sandbox.to_owned();
        let request = cri::StopContainerRequest {
            container_id: container_id.clone(),
            timeout: 0,
        };
        self.runtime.stop_container(request).await?;
        self.runtime
            .remove_container(cri::RemoveContainerRequest { container_id })
            .await?;
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.runtime.stop_pod_sandbox(request).await?;
        self.runtime
            .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id })
            .await?;
        Ok(())
    }

    async fn exec(&mut self, id: &str) -> Result<()> {
        let request = cri::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: vec!["true".to_owned()],
            timeout: 30,
        };
        let code = self
            .runtime
            .exec_sync(request)
            .await?
            .into_inner()
            .exit_code;
        if code != 0 {
            bail!("true exits with {code}");
        }
        Ok(())
    }
}

/// Everything once.
async fn cycle(engine: &mut Engine, samples: &mut Samples) -> Result<()> {
    for (network, config) in [
        ("bridge", pod("bench")),
        ("host network", host_network_pod("bench")),
    ] {
        let watch = Stopwatch::start()?;
        let (sandbox, id) = engine.up(config).await?;
        samples.add(&format!("pod up, {network}"), watch.stop()?);
        if network == "bridge" {
            for _ in 0..5 {
                let watch = Stopwatch::start()?;
                engine.exec(&id).await?;
                samples.add("ExecSync true", watch.stop()?);
            }
        }
        let watch = Stopwatch::start()?;
        engine.down(&sandbox, &id).await?;
        samples.add(&format!("pod down, {network}"), watch.stop()?);
    }
    Ok(())
}

struct Idle {
    helpers_pss_kib: u64,
    daemon_rss_kib: u64,
}

async fn idle_memory(engine: &mut Engine, pods: u32) -> Result<Idle> {
    let mut all = Vec::new();
    for _ in 0..pods {
        all.push(engine.up(pod("idle")).await?);
    }
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let idle = Idle {
        helpers_pss_kib: pss_kib(&engine.helpers)?,
        daemon_rss_kib: rss_kib(engine.daemon)?,
    };
    for (sandbox, id) in all {
        engine.down(&sandbox, &id).await?;
    }
    Ok(idle)
}

fn report(engines: &[Engine], samples: &[Samples], idle: &[Idle], wishes: &Wishes) {
    println!(
        "medians of {} rounds; CPU is a mean per call\n",
        wishes.rounds
    );
    print!("{:<24}", "");
    for engine in engines {
        print!("{:>24}", engine.name);
    }
    println!("{:>10}", if engines.len() > 1 { "share" } else { "" });
    for name in samples[0].names() {
        for (label, pick) in [("", true), (", CPU", false)] {
            let figures: Vec<f64> = samples
                .iter()
                .filter_map(|samples| samples.cost(&name))
                .map(|Cost { wall_ms, cpu_ms }| if pick { wall_ms } else { cpu_ms })
                .collect();
            row(&format!("{name}{label}"), &figures, "ms");
        }
    }
    let kib = |value: u64| f64::from(u32::try_from(value).unwrap_or(u32::MAX));
    let pods = f64::from(wishes.pods.max(1));
    let helpers: Vec<f64> = idle
        .iter()
        .map(|idle| kib(idle.helpers_pss_kib) / pods)
        .collect();
    row("helpers' PSS per pod", &helpers, "kB");
    let daemons: Vec<f64> = idle.iter().map(|idle| kib(idle.daemon_rss_kib)).collect();
    row(&format!("daemon RSS, {} pods", wishes.pods), &daemons, "kB");
}

fn row(label: &str, figures: &[f64], unit: &str) {
    print!("{label:<24}");
    for figure in figures {
        print!("{:>24}", format!("{figure:.1} {unit}"));
    }
    match figures {
        [ours, theirs] if *theirs > 0.0 => println!("{:>10}", format!("{:.2}", ours / theirs)),
        _ => println!(),
    }
}
