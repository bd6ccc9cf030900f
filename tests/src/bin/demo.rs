//! `cargo demo`: the main job of the agent, shown on this host with real output.
//!
//! Starts `longshored` in a throw-away root, serves an image through our own registry on loopback,
//! pulls it, runs a pod, looks at it from all sides, waits for Ctrl-C, takes everything down, and
//! compares the host with what it was before. Without any network beyond this host.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    env, fs,
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use longshore_proto::longshore::v1::{
    self as api, event_service_client::EventServiceClient,
    image_service_client::ImageServiceClient, lifecycle_service_client::LifecycleServiceClient,
    node_service_client::NodeServiceClient,
};
use longshore_tests::{
    host::{Scope, Snapshot, remove_cgroups},
    images,
    machine::{Machine, fetch_page},
    node::{Node, Options},
    program,
    registry::Registry,
};
use prost_types::Timestamp;
use tonic::transport::Channel;

/// Long enough for the kernel to take down by itself what was taken down.
const SETTLE: Duration = Duration::from_secs(20);
const HOST_PORT: u32 = 18_080;

#[tokio::main]
async fn main() -> ExitCode {
    let once = env::args().any(|arg| arg == "--once");
    match demo(once).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(once: bool) -> Result<()> {
    let machine = Machine::host()?;
    let forwarding = Forwarding::read();
    let mut scope = Scope {
        machine: machine.clone(),
        // Nothing yet bears the name of the instance that is to come.
        cgroups: String::new(),
        commands: Vec::new(),
        dirs: Vec::new(),
        namespaces: true,
    };
    let before = scope.snapshot()?;
    say("before", &format!("this host has {}", before.summary()));

    let mut node = Node::start_with(Options {
        machine: Some(machine.clone()),
        ..Options::default()
    })
    .await
    .context("start longshored")?;
    let place = node.dir().to_owned();
    scope.dirs = vec![place.clone()];
    scope.commands = vec![place.to_string_lossy().into_owned()];
    scope.cgroups = format!("longshore-{}", node.instance());
    let shown = show(&mut node, &machine, once).await;
    if let Err(error) = &shown {
        eprintln!(
            "\ndemo: {error:#}\nlongshored's log ends with:\n{}",
            node.log_tail()
        );
    }
    title("clean up");
    let cleaned = clean_up(node, &forwarding).await;
    shown?;
    cleaned?;
    prove(&scope, &before, &place)
}

/// Everything between start and clean-up.
async fn show(node: &mut Node, machine: &Machine, once: bool) -> Result<()> {
    title("agent");
    let info = NodeServiceClient::new(node.channel())
        .info(api::InfoRequest {})
        .await?
        .into_inner();
    say(
        "serves",
        &format!(
            "longshored {} on {}, kernel {}, {}",
            info.version,
            node.socket().display(),
            info.kernel_release,
            info.cgroup_version().as_str_name()
        ),
    );

    title("image");
    let registry = Registry::start(machine.listen("127.0.0.1:0")?)?;
    registry.push("longshore/page:1", &images::toolbox()?);
    let reference = registry.reference("longshore/page:1");
    say("registry", &format!("ours, at {}", registry.url()));
    pull(node.channel(), &reference).await?;

    title("pod");
    let mut lifecycle = LifecycleServiceClient::new(node.channel());
    let sandbox = run_sandbox(&mut lifecycle).await?;
    let network = sandbox.network.clone().unwrap_or_default();
    say(
        "sandbox",
        &format!(
            "{} with {}",
            &sandbox.id[..13],
            network.addresses.join(" and ")
        ),
    );
    let container = run_container(&mut lifecycle, &sandbox.id, &reference).await?;
    say(
        "container",
        &format!(
            "{} runs page-server, pid {}",
            &container.id[..13],
            container.pid
        ),
    );

    title("page, from the host");
    let mut targets = Vec::new();
    for address in &network.addresses {
        let address = address.split('/').next().unwrap_or(address);
        targets.push(SocketAddr::new(
            address.parse().context("an address")?,
            8080,
        ));
    }
    targets.push(format!("127.0.0.1:{HOST_PORT}").parse()?);
    await_page(machine, targets[0]).await?;
    for target in targets {
        let page = fetch_page(machine, target)?;
        let line = page
            .lines()
            .find(|line| line.starts_with("<h1>"))
            .unwrap_or_default();
        say(
            &format!("http://{target}/"),
            &line.replace("<h1>", "").replace("</h1>", ""),
        );
    }

    title("logs");
    for line in logs(&mut lifecycle, &container.id).await? {
        println!("  {line}");
    }
    title("exec");
    let command = "id; uname -n; ls /";
    say("$", &format!("sh -c {command:?}"));
    for line in exec(&mut lifecycle, &container.id, command).await?.lines() {
        println!("  {line}");
    }
    title("stats");
    stats(&mut lifecycle, &container.id).await?;
    title("events");
    for line in events(node.channel()).await? {
        println!("  {line}");
    }

    title("your turn");
    instructions(node, &reference, &sandbox.id)?;
    if once {
        return Ok(());
    }
    println!("\n  Ctrl-C ends the demo and removes everything.");
    std::io::stdout().flush()?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    println!();
    Ok(())
}

async fn pull(channel: Channel, reference: &str) -> Result<()> {
    let request = api::PullImageRequest {
        reference: reference.to_owned(),
        ..Default::default()
    };
    let mut stream = ImageServiceClient::new(channel)
        .max_decoding_message_size(64 << 20)
        .pull_image(request)
        .await?
        .into_inner();
    let terminal = std::io::stdout().is_terminal();
    let mut last = String::new();
    while let Some(response) = stream.message().await? {
        match response.update {
            Some(api::pull_image_response::Update::Progress(progress)) => {
                let fetched: u64 = progress
                    .layers
                    .iter()
                    .map(|layer| layer.fetched_bytes)
                    .sum();
                let total: u64 = progress.layers.iter().map(|layer| layer.total_bytes).sum();
                let stage = progress
                    .stage()
                    .as_str_name()
                    .trim_start_matches("PULL_STAGE_")
                    .to_lowercase();
                let line = format!(
                    "{stage:<12} {} {fetched} of {total} bytes",
                    bar(fetched, total)
                );
                if terminal {
                    print!("\r  {line}\x1b[K");
                    std::io::stdout().flush()?;
                } else if line != last {
                    println!("  {line}");
                }
                last = line;
            }
            Some(api::pull_image_response::Update::Result(pulled)) => {
                if terminal {
                    println!();
                }
                say(
                    "pulled",
                    &format!("{} as {}", pulled.reference, &pulled.image_id[..19]),
                );
            }
            None => {}
        }
    }
    Ok(())
}

fn bar(part: u64, whole: u64) -> String {
    let width = 24;
    let done = usize::try_from(part * width / whole.max(1)).unwrap_or_default();
    let width = usize::try_from(width).unwrap_or_default();
    format!(
        "[{}{}]",
        "#".repeat(done.min(width)),
        " ".repeat(width.saturating_sub(done))
    )
}

async fn run_sandbox(lifecycle: &mut LifecycleServiceClient<Channel>) -> Result<api::Sandbox> {
    let request = api::RunSandboxRequest {
        config: Some(api::SandboxConfig {
            name: "demo".to_owned(),
            hostname: "harbour".to_owned(),
            labels: HashMap::from([("app".to_owned(), "page".to_owned())]),
            network: Some(api::SandboxNetwork {
                ports: vec![api::PortMapping {
                    host_port: HOST_PORT,
                    container_port: 8080,
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let response = lifecycle
        .run_sandbox(request)
        .await
        .context("run the sandbox")?
        .into_inner();
    response.sandbox.context("a sandbox")
}

async fn run_container(
    lifecycle: &mut LifecycleServiceClient<Channel>,
    sandbox: &str,
    image: &str,
) -> Result<api::Container> {
    let request = api::CreateContainerRequest {
        sandbox_id: sandbox.to_owned(),
        config: Some(api::ContainerConfig {
            name: "page".to_owned(),
            image: image.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let created = lifecycle
        .create_container(request)
        .await
        .context("create the container")?
        .into_inner();
    let request = api::StartContainerRequest {
        container_id: created.container.context("a container")?.id,
        ..Default::default()
    };
    let started = lifecycle
        .start_container(request)
        .await
        .context("start the container")?
        .into_inner();
    started.container.context("a container")
}

async fn await_page(machine: &Machine, target: SocketAddr) -> Result<()> {
    for _ in 0..200 {
        if fetch_page(machine, target).is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    fetch_page(machine, target).map(drop)
}

async fn logs(lifecycle: &mut LifecycleServiceClient<Channel>, id: &str) -> Result<Vec<String>> {
    let request = api::LogsRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    let mut stream = lifecycle.logs(request).await?.into_inner();
    let mut lines = Vec::new();
    while let Some(part) = stream.message().await? {
        for entry in part.entries {
            let text = String::from_utf8_lossy(&entry.data).trim_end().to_owned();
            lines.push(format!("{} {text}", clock(entry.time)));
        }
    }
    Ok(lines)
}

async fn exec(
    lifecycle: &mut LifecycleServiceClient<Channel>,
    id: &str,
    command: &str,
) -> Result<String> {
    use api::{exec_request::Frame as Ask, exec_response::Frame as Answer};
    let start = api::ExecStart {
        container_id: id.to_owned(),
        command: ["sh", "-c", command].map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let ask = api::ExecRequest {
        frame: Some(Ask::Start(start)),
    };
    let mut stream = lifecycle
        .exec(tokio_stream::iter([ask]))
        .await?
        .into_inner();
    let mut output = Vec::new();
    while let Some(response) = stream.message().await? {
        match response.frame {
            Some(Answer::Stdout(data) | Answer::Stderr(data)) => output.extend_from_slice(&data),
            Some(Answer::Exit(exit)) => {
                output.extend_from_slice(format!("exit code {}\n", exit.code).as_bytes());
            }
            _ => {}
        }
    }
    Ok(String::from_utf8_lossy(&output).into_owned())
}

async fn stats(lifecycle: &mut LifecycleServiceClient<Channel>, id: &str) -> Result<()> {
    let request = api::StatsRequest {
        container_ids: vec![id.to_owned()],
        one_shot: true,
        ..Default::default()
    };
    let mut stream = lifecycle.stats(request).await?.into_inner();
    let stats = stream.message().await?.context("stats")?;
    for container in stats.containers {
        let cpu = container.cpu.and_then(|cpu| cpu.usage).unwrap_or_default();
        let memory = container.memory.unwrap_or_default();
        let pids = container.pids.unwrap_or_default();
        say(
            &container.name,
            &format!(
                "cpu {:.1} ms, memory {} kB, {} processes",
                millis(&cpu),
                memory.usage_bytes / 1024,
                pids.current
            ),
        );
    }
    Ok(())
}

fn millis(duration: &prost_types::Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let seconds = duration.seconds as f64;
    seconds * 1e3 + f64::from(duration.nanos) / 1e6
}

async fn events(channel: Channel) -> Result<Vec<String>> {
    let request = api::WatchRequest {
        cursor: Some(api::Cursor::default()),
        past_only: true,
        ..Default::default()
    };
    let mut stream = EventServiceClient::new(channel)
        .watch(request)
        .await?
        .into_inner();
    let mut lines = Vec::new();
    while let Some(response) = stream.message().await? {
        if let Some(event) = response.event {
            let subject = [&event.container_id, &event.sandbox_id, &event.image_id]
                .into_iter()
                .find(|id| !id.is_empty())
                .map_or("", |id| id.get(..13).unwrap_or(id));
            let kind = event
                .kind()
                .as_str_name()
                .trim_start_matches("EVENT_KIND_")
                .to_lowercase();
            let number = event.cursor.unwrap_or_default().number;
            lines.push(format!(
                "{number:>3} {} {kind:<18} {subject}",
                clock(event.time)
            ));
        }
    }
    Ok(lines)
}

/// Time of day in UTC.
fn clock(time: Option<Timestamp>) -> String {
    let time = time.unwrap_or_default();
    let of_day = time.seconds.rem_euclid(86_400);
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        time.nanos / 1_000_000
    )
}

fn instructions(node: &Node, image: &str, sandbox: &str) -> Result<()> {
    let socket = node.socket();
    let socket = socket.display();
    let shore = program("shore")?;
    println!("  The agent goes on; in another terminal:");
    println!("    export LONGSHORE_ADDRESS=unix://{socket}");
    println!("    {} ps", shore.display());
    println!("    {} exec -it page sh", shore.display());
    println!("    {} logs -f page", shore.display());
    println!("  or with other people's tools:");
    println!("    crictl --runtime-endpoint unix://{socket} images");
    println!("    grpcurl -plaintext -unix {socket} list");
    println!(
        "    grpcurl -plaintext -unix -d '{{\"sandbox_id\": \"{}\"}}' {socket} longshore.v1.LifecycleService/GetSandbox",
        &sandbox[..13]
    );
    println!("  CRI sees what CRI made: with crictl, run a pod of your own from {image}");
    Ok(())
}

/// Whether the host forwards packets: the agent turns it on for its network, and no one else may
/// turn it off while another program needs it, so only we, who know that it was off, put it back.
struct Forwarding(Vec<(PathBuf, String)>);

impl Forwarding {
    fn read() -> Self {
        let paths = [
            "/proc/sys/net/ipv4/ip_forward",
            "/proc/sys/net/ipv6/conf/all/forwarding",
        ];
        Self(
            paths
                .into_iter()
                .filter_map(|path| Some((PathBuf::from(path), fs::read_to_string(path).ok()?)))
                .collect(),
        )
    }

    fn restore(&self) -> Result<()> {
        for (path, value) in &self.0 {
            if fs::read_to_string(path)? != *value {
                fs::write(path, value).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }
}

async fn clean_up(mut node: Node, forwarding: &Forwarding) -> Result<()> {
    let mut lifecycle = LifecycleServiceClient::new(node.channel());
    let request = api::ListSandboxesRequest {
        page_size: 1000,
        ..Default::default()
    };
    for sandbox in lifecycle
        .list_sandboxes(request)
        .await?
        .into_inner()
        .sandboxes
    {
        let request = api::RemoveSandboxRequest {
            sandbox_id: sandbox.id.clone(),
            force: true,
            ..Default::default()
        };
        lifecycle
            .remove_sandbox(request)
            .await
            .context("remove a sandbox")?;
        say("removed", &format!("sandbox {}", &sandbox.id[..13]));
    }
    let differences = node.fsck().await?;
    say(
        "fsck",
        &if differences.is_empty() {
            "no difference".to_owned()
        } else {
            differences.join("; ")
        },
    );
    let status = node.terminate()?;
    say("agent", &format!("ended, {status}"));
    let instance = node.instance().to_owned();
    node.dispose();
    // The agent took its network down, since it had no pods; the root of its cgroups waits for the
    // next start, which will not come.
    remove_cgroups(&format!("longshore-{instance}"))?;
    forwarding.restore()?;
    if !differences.is_empty() {
        bail!("fsck found differences");
    }
    Ok(())
}

/// The host is what it was.
fn prove(scope: &Scope, before: &Snapshot, place: &Path) -> Result<()> {
    scope
        .expect_same(before, SETTLE)
        .context("something is left")?;
    if place.exists() {
        bail!("{} is left", place.display());
    }
    say(
        "after",
        &format!(
            "this host has {}: no difference",
            scope.snapshot()?.summary()
        ),
    );
    Ok(())
}

fn title(text: &str) {
    if std::io::stdout().is_terminal() {
        println!("\n\x1b[1m{text}\x1b[0m");
    } else {
        println!("\n{text}");
    }
}

fn say(label: &str, text: &str) {
    println!("  {label:<10} {text}");
}
