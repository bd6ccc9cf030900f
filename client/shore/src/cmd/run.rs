//! `run` and `create`: a pod with one container, or one more container in a pod.
//!
//! ```text
//!  image there? --no--> pull
//!  RunSandbox --> CreateContainer --> Attach --> StartContainer --> copy until it ends --> remove?
//!      (undone if the container cannot be made)   (-d: start, print the id)
//! ```

use std::{collections::HashMap, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCompleter;
use longshore_client::{
    Client, Error, Reason, idempotency_key,
    proto::{
        self, BindMount, Container, ContainerConfig, CreateContainerRequest, GetImageRequest,
        MountPropagation, NetworkMode, PidMode, PortMapping, PullImageRequest,
        RemoveContainerRequest, RemoveSandboxRequest, Resources, RunSandboxRequest, SandboxConfig,
        SandboxNetwork, Seccomp, SeccompMode, Security, SignalContainerRequest,
        StartContainerRequest, TerminalSize, TmpfsMount, WaitContainerRequest, mount,
    },
};
use tokio::sync::mpsc;

use super::attach::{self, Connection};
use crate::{
    app::App,
    complete::{Every, First, Live},
    error::Problem,
    exit_code::ExitCode,
    find::{RUN_ANNOTATION, Things},
    human,
    parse::{self, Pair, Propagation, Protocol, Publish, Volume},
    progress::{self, Show},
    session::{End, Session},
    terminal::{self, DetachKeys},
};

/// When to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PullPolicy {
    /// If the image is not there
    Missing,
    /// Always, for what is new
    Always,
    /// Never
    Never,
}

/// `NAME=SOFT[:HARD]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ulimit {
    name: String,
    soft: u64,
    hard: u64,
}

fn ulimit(text: &str) -> Result<Ulimit, String> {
    let wrong = || {
        format!("`{text}` is no limit: write NAME=SOFT or NAME=SOFT:HARD, as in nofile=1024:4096")
    };
    let number = |text: &str| match text {
        "unlimited" | "-1" => Some(u64::MAX),
        text => text.parse().ok(),
    };
    let (name, limits) = text.split_once('=').ok_or_else(wrong)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    match (number(soft), number(hard)) {
        (Some(soft), Some(hard)) if !name.is_empty() => Ok(Ulimit {
            name: name.to_owned(),
            soft,
            hard,
        }),
        _ => Err(wrong()),
    }
}

/// `HOST[:CONTAINER[:PERMISSIONS]]`.
fn device(text: &str) -> Result<proto::Device, String> {
    let mut parts = text.split(':').map(str::to_owned);
    let host_path = parts.next().unwrap_or_default();
    let (container_path, permissions) = match (parts.next(), parts.next(), parts.next()) {
        (None, ..) => (String::new(), String::new()),
        (Some(path), None, _) if path.starts_with('/') => (path, String::new()),
        (Some(permissions), None, _) => (String::new(), permissions),
        (Some(path), Some(permissions), None) => (path, permissions),
        _ => return Err("too many colons: write HOST:CONTAINER:rwm".into()),
    };
    let known = permissions.chars().all(|letter| "rwm".contains(letter));
    if !host_path.starts_with('/') || !known {
        return Err("write a path and what is allowed, as in /dev/fuse:/dev/fuse:rwm".into());
    }
    Ok(proto::Device {
        host_path,
        container_path,
        permissions,
    })
}

/// `TARGET[:size=SIZE,mode=OCTAL,ro,exec]`.
fn tmpfs(text: &str) -> Result<proto::Mount, String> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    if !target.starts_with('/') {
        return Err(format!(
            "`{target}` is not an absolute path in the container"
        ));
    }
    let mut memory = TmpfsMount::default();
    let mut mount = proto::Mount {
        target: target.to_owned(),
        noexec: true,
        ..Default::default()
    };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", size)) => memory.size_bytes = parse::size(size)?,
            Some(("mode", mode)) => {
                memory.mode = u32::from_str_radix(mode, 8)
                    .map_err(|_| format!("`{mode}` is not a mode as in 1777"))?;
            }
            None if option == "ro" => mount.readonly = true,
            None if option == "exec" => mount.noexec = false,
            None if matches!(option, "rw" | "noexec" | "nosuid" | "nodev") => {}
            _ => return Err(format!("`{option}` is not one of size=, mode=, ro, exec")),
        }
    }
    mount.source = Some(mount::Source::Tmpfs(memory));
    Ok(mount)
}

/// How the container is to be.
#[derive(Debug, Args)]
struct Options {
    /// Name of pod and container
    #[arg(long)]
    name: Option<String>,
    /// Put the container into this pod instead of one of its own
    #[arg(long, value_name = "POD", add = ArgValueCompleter::new(Every(Live::Pods)),
          conflicts_with_all = ["publish", "network", "hostname", "sysctls", "dns"])]
    pod: Option<String>,
    /// Lead a port of the host into the container: [ADDRESS:]HOST:CONTAINER[/udp]
    #[arg(short, long, value_parser = parse::publish, value_name = "PORTS")]
    publish: Vec<Publish>,
    /// Network: default, host, none, or the name of one
    #[arg(long, visible_alias = "net", value_name = "NETWORK",
          add = ArgValueCompleter::new(Every(Live::Networks)))]
    network: Option<String>,
    /// Host name in the container
    #[arg(long)]
    hostname: Option<String>,
    /// Name servers
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    /// Kernel parameter of the pod
    #[arg(long = "sysctl", value_name = "KEY=VALUE", value_parser = parse::pair)]
    sysctls: Vec<Pair>,
    /// Which processes it sees: its own (default), those of the pod, or of the host
    #[arg(long, value_enum)]
    pid: Option<Pid>,
    /// What runs it
    #[arg(long, visible_alias = "runtime")]
    handler: Option<String>,

    /// Mount a path of the host: SOURCE:TARGET[:ro]
    #[arg(short, long, value_parser = parse::volume, value_name = "PATHS")]
    volume: Vec<Volume>,
    /// Mount an empty file system in memory: TARGET[:size=64m,mode=1777]
    #[arg(long, value_parser = tmpfs, value_name = "TARGET")]
    tmpfs: Vec<proto::Mount>,
    /// Offer a device of the host: HOST[:CONTAINER[:rwm]]
    #[arg(long, value_parser = device, value_name = "DEVICE")]
    device: Vec<proto::Device>,
    /// Set a variable; without =VALUE it is handed over from here
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = parse::pair)]
    env: Vec<Pair>,
    /// Set the variables in a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Attach a label to pod and container
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse::pair)]
    labels: Vec<Pair>,

    /// Most memory, as in 64m or 1g
    #[arg(short, long, value_name = "SIZE", value_parser = parse::size)]
    memory: Option<u64>,
    /// Most memory and swap together
    #[arg(long, value_name = "SIZE", value_parser = parse::size, requires = "memory")]
    memory_swap: Option<u64>,
    /// Most CPU, as in 0.5
    #[arg(long, value_name = "NUMBER", value_parser = parse::cpus)]
    cpus: Option<u64>,
    /// CPUs to run on, as in 0-2
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Most processes
    #[arg(long, value_name = "NUMBER")]
    pids_limit: Option<u64>,
    /// Limit of each process, as in nofile=1024:4096
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = ulimit)]
    ulimit: Vec<Ulimit>,

    /// Run as this user: NAME or UID, with :GROUP or :GID
    #[arg(short, long)]
    user: Option<String>,
    /// Add a group, by number
    #[arg(long, value_name = "GID")]
    group_add: Vec<u32>,
    /// Working directory
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// Command in place of the image's entrypoint
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Make the container's own files read-only
    #[arg(long)]
    read_only: bool,
    /// Add a capability, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Drop a capability, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// Allow everything that root on the host may do
    #[arg(long)]
    privileged: bool,
    /// no-new-privileges, seccomp=unconfined or seccomp=FILE
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Signal that asks it to stop
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// Time it has to stop by itself
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    stop_timeout: Option<Duration>,

    /// Connect standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// When to ask the registry
    #[arg(long, value_enum, default_value = "missing", value_name = "WHEN")]
    pull: PullPolicy,
    /// Show no progress of a pull
    #[arg(short, long)]
    quiet: bool,

    /// The image, and the command with its arguments if not the image's own
    #[arg(required = true, trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"],
          add = ArgValueCompleter::new(First(Live::Images)))]
    image_and_command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pid {
    Container,
    Pod,
    Host,
}

/// A container that exists, and what goes with it.
struct Made {
    container: Container,
    /// Its pod, if it was made with it.
    pod: Option<String>,
}

impl Options {
    fn image(&self) -> &str {
        // clap has seen to it that there is one.
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// Pod and container, made or not there at all.
    async fn make(&self, client: &Client, stdin_once: bool) -> Result<Made> {
        let config = self.container(stdin_once)?;
        self.provide_image(client).await?;
        let (sandbox_id, pod) = match &self.pod {
            Some(name) => {
                let things = Things::read(client).await?;
                (things.find_pod(name)?.id.clone(), None)
            }
            None => {
                let request = RunSandboxRequest {
                    idempotency_key: idempotency_key(),
                    config: Some(self.sandbox()),
                };
                let answer = client
                    .repeat(request, |client, request| async move {
                        client.lifecycle().run_sandbox(request).await
                    })
                    .await
                    .context("making the pod")?;
                let id = answer.sandbox.unwrap_or_default().id;
                (id.clone(), Some(id))
            }
        };
        let request = CreateContainerRequest {
            idempotency_key: idempotency_key(),
            sandbox_id,
            config: Some(config),
        };
        let created = client
            .repeat(request, |client, request| async move {
                client.lifecycle().create_container(request).await
            })
            .await
            .context("making the container");
        match created {
            Ok(answer) => Ok(Made {
                container: answer.container.unwrap_or_default(),
                pod,
            }),
            Err(error) => {
                if let Some(pod) = pod {
                    remove_pod(client, &pod).await.with_context(|| {
                        format!(
                            "removing the pod again; `shore rm -f {}`",
                            human::short_id(&pod)
                        )
                    })?;
                }
                Err(error)
            }
        }
    }

    async fn provide_image(&self, client: &Client) -> Result<()> {
        if self.pull == PullPolicy::Never {
            return Ok(());
        }
        if self.pull == PullPolicy::Missing {
            let request = GetImageRequest {
                image: self.image().to_owned(),
                verbose: false,
            };
            let there = client
                .repeat(request, |client, request| async move {
                    client.images().get_image(request).await
                })
                .await;
            match there {
                Ok(_) => return Ok(()),
                Err(error) if error.reason() == Some(Reason::ImageNotFound) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let request = PullImageRequest {
            reference: self.image().to_owned(),
            ..Default::default()
        };
        progress::pull(client, request, Show::fitting(self.quiet))
            .await
            .with_context(|| format!("pulling {}", self.image()))?;
        Ok(())
    }

    fn sandbox(&self) -> SandboxConfig {
        SandboxConfig {
            name: self.name.clone().unwrap_or_default(),
            labels: super::container::labels(&self.labels),
            annotations: HashMap::from([(RUN_ANNOTATION.to_owned(), "true".to_owned())]),
            hostname: self.hostname.clone().unwrap_or_default(),
            network: Some(self.network()),
            dns: (!self.dns.is_empty()).then(|| proto::DnsConfig {
                servers: self.dns.clone(),
                ..Default::default()
            }),
            sysctls: super::container::labels(&self.sysctls),
            pid_mode: match self.pid {
                None => PidMode::Unspecified,
                Some(Pid::Container) => PidMode::Container,
                Some(Pid::Pod) => PidMode::Pod,
                Some(Pid::Host) => PidMode::Host,
            }
            .into(),
            handler: self.handler.clone().unwrap_or_default(),
            ..Default::default()
        }
    }

    fn network(&self) -> SandboxNetwork {
        let (mode, network) = match self.network.as_deref() {
            None | Some("default" | "bridge") => (NetworkMode::Pod, ""),
            Some("host") => (NetworkMode::Host, ""),
            Some("none") => (NetworkMode::None, ""),
            Some(name) => (NetworkMode::Pod, name),
        };
        SandboxNetwork {
            mode: mode.into(),
            network: network.to_owned(),
            ports: self.publish.iter().map(port).collect(),
        }
    }

    fn container(&self, stdin_once: bool) -> Result<ContainerConfig> {
        let mut mounts: Vec<_> = self.volume.iter().map(bind).collect();
        mounts.extend(self.tmpfs.iter().cloned());
        Ok(ContainerConfig {
            name: self.name.clone().unwrap_or_default(),
            image: self.image().to_owned(),
            command: self
                .entrypoint
                .iter()
                .filter(|text| !text.is_empty())
                .cloned()
                .collect(),
            args: self.image_and_command.iter().skip(1).cloned().collect(),
            env: self.environment()?,
            working_dir: self.workdir.clone().unwrap_or_default(),
            user: self.user.clone().unwrap_or_default(),
            additional_gids: self.group_add.clone(),
            mounts,
            devices: self.device.clone(),
            resources: Some(self.resources()?),
            security: Some(self.security()?),
            rlimits: self
                .ulimit
                .iter()
                .map(|limit| proto::Rlimit {
                    name: limit.name.clone(),
                    soft: limit.soft,
                    hard: limit.hard,
                })
                .collect(),
            tty: self.tty,
            stdin: self.interactive,
            // A terminal's input does not end, and whoever detaches from one comes back.
            stdin_once: self.interactive && !self.tty && stdin_once,
            stop_signal: self.stop_signal.clone().unwrap_or_default(),
            stop_timeout: self.stop_timeout.map(human::wire_duration),
            labels: super::container::labels(&self.labels),
            ..Default::default()
        })
    }

    /// Files first, so that what is on the command line wins.
    fn environment(&self) -> Result<HashMap<String, String>> {
        let mut pairs = Vec::new();
        for path in &self.env_file {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("reading {}", path.display()))?;
            let read = parse::env_file(&text)
                .map_err(|problem| Problem::Usage(format!("{}: {problem}", path.display())))?;
            pairs.extend(read);
        }
        pairs.extend(self.env.iter().cloned());
        let mut environment = handed_over(pairs);
        if self.tty {
            // A terminal program without TERM draws as if for paper.
            environment
                .entry("TERM".into())
                .or_insert_with(|| "xterm".into());
        }
        Ok(environment)
    }

    fn resources(&self) -> Result<Resources> {
        let cpu_millis = self.cpus.map(u32::try_from).transpose().context("--cpus")?;
        Ok(Resources {
            cpu_millis: cpu_millis.unwrap_or_default(),
            cpuset_cpus: self.cpuset_cpus.clone().unwrap_or_default(),
            memory_limit_bytes: self.memory.unwrap_or_default(),
            memory_swap_limit_bytes: self.memory_swap.unwrap_or_default(),
            pids_limit: self.pids_limit.unwrap_or_default(),
            ..Default::default()
        })
    }

    fn security(&self) -> Result<Security> {
        let mut security = Security {
            privileged: self.privileged,
            add_capabilities: self.cap_add.clone(),
            drop_capabilities: self.cap_drop.clone(),
            readonly_rootfs: self.read_only,
            ..Default::default()
        };
        for option in &self.security_opt {
            match option.split_once(['=', ':']).unwrap_or((option, "")) {
                ("no-new-privileges", "" | "true") => security.no_new_privs = true,
                ("seccomp", "unconfined") => {
                    security.seccomp = Some(Seccomp {
                        mode: SeccompMode::Unconfined.into(),
                        profile_json: String::new(),
                    });
                }
                ("seccomp", path) if !path.is_empty() => {
                    let profile_json = std::fs::read_to_string(path)
                        .with_context(|| format!("reading the seccomp profile {path}"))?;
                    security.seccomp = Some(Seccomp {
                        mode: SeccompMode::Custom.into(),
                        profile_json,
                    });
                }
                _ => {
                    return Err(Problem::Usage(format!(
                        "`{option}` is not one of no-new-privileges, seccomp=unconfined, seccomp=FILE"
                    ))
                    .into());
                }
            }
        }
        Ok(security)
    }
}

/// Variables with their values; those without one come from here, or not at all.
pub(crate) fn handed_over(pairs: Vec<Pair>) -> HashMap<String, String> {
    pairs
        .into_iter()
        .filter_map(|pair| {
            let value = pair.value.or_else(|| std::env::var(&pair.key).ok())?;
            Some((pair.key, value))
        })
        .collect()
}

pub(super) fn port(publish: &Publish) -> PortMapping {
    let protocol = match publish.protocol {
        Protocol::Tcp => proto::Protocol::Tcp,
        Protocol::Udp => proto::Protocol::Udp,
        Protocol::Sctp => proto::Protocol::Sctp,
    };
    PortMapping {
        host_ip: publish.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        host_port: publish.host_port.into(),
        container_port: publish.container_port.into(),
        protocol: protocol.into(),
    }
}

pub(super) fn bind(volume: &Volume) -> proto::Mount {
    let propagation = match volume.propagation {
        Propagation::Private => MountPropagation::Private,
        Propagation::HostToContainer => MountPropagation::HostToContainer,
        Propagation::Bidirectional => MountPropagation::Bidirectional,
    };
    proto::Mount {
        target: volume.target.display().to_string(),
        readonly: volume.read_only,
        source: Some(mount::Source::Bind(BindMount {
            host_path: volume.source.display().to_string(),
            recursive_readonly: false,
            propagation: propagation.into(),
        })),
        ..Default::default()
    }
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    options: Options,
}

impl Create {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let made = self.options.make(&client, false).await?;
        app.output.line(&made.container.id)?;
        Ok(ExitCode::OK)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Leave it running and print its id
    #[arg(short, long)]
    detach: bool,
    /// Remove it once it has ended
    #[arg(long, conflicts_with = "detach")]
    rm: bool,
    /// Keys that leave it running
    #[arg(long, value_name = "KEYS", default_value = attach::DETACH_KEYS, value_parser = DetachKeys::parse)]
    detach_keys: DetachKeys,
    #[command(flatten)]
    options: Options,
}

impl Run {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        if self.options.tty && !self.detach && self.options.interactive && !terminal::interactive()
        {
            return Err(Problem::Usage(
                "-t needs a terminal, and this is none: leave it out, or run in one".into(),
            )
            .into());
        }
        // A connection that fails is the agent's absence, as everywhere; what follows is run's own.
        let client = app.client().await?;
        self.all(app, &client)
            .await
            .map_err(|error| match error.downcast::<Problem>() {
                Ok(problem @ (Problem::Run(_) | Problem::Usage(_))) => problem.into(),
                Ok(problem) => Problem::Run(problem.into()).into(),
                Err(error) => Problem::Run(error).into(),
            })
    }

    async fn all(self, app: &App, client: &Client) -> Result<ExitCode> {
        let made = self.options.make(client, !self.detach).await?;
        if self.detach {
            start(client, &made.container.id).await?;
            app.output.line(&made.container.id)?;
            return Ok(ExitCode::OK);
        }
        let result = self.foreground(client, &made.container).await;
        if self.rm && !matches!(result, Ok(End::Detached)) {
            remove(client, &made).await?;
        }
        let short = human::short_id(&made.container.id);
        match result? {
            End::Exited(code) => Ok(ExitCode::of_process(code)),
            End::Closed => Ok(ExitCode::of_process(
                wait(client, &made.container.id).await?,
            )),
            End::Detached => {
                terminal::note(&format!(
                    "{short} runs on: `shore attach {short}` comes back to it"
                ));
                Ok(ExitCode::OK)
            }
            End::Interrupted(signal) => Ok(ExitCode::of_process(128 + signal)),
        }
    }

    /// Starts the container with this terminal connected, and stays until it ends.
    async fn foreground(&self, client: &Client, container: &Container) -> Result<End> {
        let size = terminal::size().map(|(columns, rows)| TerminalSize { columns, rows });
        let size = size.filter(|_| self.options.tty);
        let stdin = self.options.interactive;
        // Connected before it starts, so that not a byte of what it says first is missed.
        let early = attach::connect(client, &container.id, stdin, size).await;
        start(client, &container.id).await?;
        let connection = match early {
            Ok(connection) => connection,
            // Agents connect only to what runs; a container that was quicker has its log.
            Err(error) if error.reason() == Some(Reason::ContainerState) => {
                if !stdin && !self.options.tty {
                    return super::logs::until_exit(client, &container.id).await;
                }
                match attach::connect(client, &container.id, stdin, size.map(attach::taller)).await
                {
                    Ok(connection) => connection,
                    Err(error) if error.reason() == Some(Reason::ContainerState) => {
                        return super::logs::until_exit(client, &container.id).await;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        };
        self.copy(client, &container.id, connection).await
    }

    async fn copy(&self, client: &Client, id: &str, connection: Connection) -> Result<End> {
        let (signals, mut received) = mpsc::unbounded_channel();
        let forward = async {
            while let Some(number) = received.recv().await {
                if let Err(error) = signal(client, id, number).await {
                    terminal::note(&format!("shore: passing on signal {number}: {error}"));
                }
            }
        };
        let session = Session {
            stdin: self.options.interactive,
            tty: self.options.tty,
            detach: self.detach_keys.clone(),
            signals: Some(&signals),
        };
        let copying = session.run(connection.inputs, connection.outputs);
        tokio::select! {
            end = copying => end,
            // Never ends: `signals` lives as long as the session.
            () = forward => Ok(End::Closed),
        }
        .with_context(|| {
            let short = human::short_id(id);
            format!("the connection to {short} broke; `shore attach {short}` makes a new one")
        })
    }
}

async fn start(client: &Client, id: &str) -> Result<()> {
    let request = StartContainerRequest {
        idempotency_key: idempotency_key(),
        container_id: id.to_owned(),
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().start_container(request).await
        })
        .await
        .context("starting the container")?;
    Ok(())
}

async fn signal(client: &Client, id: &str, number: i32) -> Result<(), Error> {
    let request = SignalContainerRequest {
        idempotency_key: idempotency_key(),
        container_id: id.to_owned(),
        signal: number.to_string(),
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().signal_container(request).await
        })
        .await
        .map(|_| ())
}

/// Waits for the end and returns the exit code.
pub(crate) async fn wait(client: &Client, id: &str) -> Result<i32> {
    let request = WaitContainerRequest {
        container_id: id.to_owned(),
    };
    let ended = client
        .repeat(request, |client, request| async move {
            client.lifecycle().wait_container(request).await
        })
        .await?;
    Ok(i32::try_from(ended.exit.unwrap_or_default().code).unwrap_or(255))
}

/// Takes away what `make` made.
async fn remove(client: &Client, made: &Made) -> Result<()> {
    if let Some(pod) = &made.pod {
        return remove_pod(client, pod).await;
    }
    let request = RemoveContainerRequest {
        idempotency_key: idempotency_key(),
        container_id: made.container.id.clone(),
        force: true,
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().remove_container(request).await
        })
        .await
        .context("removing the container")?;
    Ok(())
}

async fn remove_pod(client: &Client, pod: &str) -> Result<()> {
    let request = RemoveSandboxRequest {
        idempotency_key: idempotency_key(),
        sandbox_id: pod.to_owned(),
        force: true,
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().remove_sandbox(request).await
        })
        .await
        .context("removing the pod")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cmd::{Cli, Command};

    fn run(words: &str) -> Run {
        let cli = Cli::try_parse_from(words.split_whitespace()).expect("a valid command line");
        match cli.command {
            Command::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_end_at_the_image() {
        let run = run("shore run -d -e A=1 busybox ls -e -o json --rm");
        assert!(run.detach && !run.rm);
        let config = run.options.container(false).expect("valid");
        assert_eq!(config.image, "busybox");
        assert_eq!(config.args, ["ls", "-e", "-o", "json", "--rm"]);
        assert_eq!(config.env["A"], "1");
    }

    #[test]
    fn the_familiar_options_reach_the_agent() {
        let run = run(
            "shore run -it --rm --name web -p 8080:80 -p 53:53/udp -v /srv:/data:ro \
                       --network host -m 64m --cpus 0.5 -u 1000:1000 -w /app --read-only \
                       --cap-add NET_ADMIN --cap-drop ALL --hostname h --entrypoint /bin/sh \
                       --ulimit nofile=10:20 --tmpfs /tmp:size=1m busybox -c true",
        );
        assert!(run.rm);
        let sandbox = run.options.sandbox();
        assert_eq!(sandbox.name, "web");
        assert_eq!(sandbox.hostname, "h");
        let network = sandbox.network.expect("always set");
        assert_eq!(network.mode(), NetworkMode::Host);
        assert_eq!(network.ports.len(), 2);
        assert_eq!(network.ports[1].protocol(), proto::Protocol::Udp);

        let container = run.options.container(true).expect("valid");
        assert_eq!(container.command, ["/bin/sh"]);
        assert_eq!(container.args, ["-c", "true"]);
        assert!(container.tty && container.stdin && !container.stdin_once);
        assert_eq!(container.env["TERM"], "xterm");
        assert_eq!(
            (container.user.as_str(), container.working_dir.as_str()),
            ("1000:1000", "/app")
        );
        let resources = container.resources.expect("always set");
        assert_eq!(
            (resources.memory_limit_bytes, resources.cpu_millis),
            (64 << 20, 500)
        );
        let security = container.security.expect("always set");
        assert!(security.readonly_rootfs && !security.privileged);
        assert_eq!(security.add_capabilities, ["NET_ADMIN"]);
        assert_eq!(security.drop_capabilities, ["ALL"]);
        assert_eq!(container.mounts.len(), 2);
        assert!(container.mounts[0].readonly);
        assert_eq!(
            (container.rlimits[0].soft, container.rlimits[0].hard),
            (10, 20)
        );
    }

    #[test]
    fn what_cannot_be_together_is_refused_by_the_parser() {
        for words in [
            "shore run -d --rm busybox",
            "shore run --pod p -p 1:2 busybox",
            "shore run",
            "shore run -p 80 busybox",
            "shore run -m lots busybox",
            "shore run --memory-swap 1g busybox",
        ] {
            assert!(
                Cli::try_parse_from(words.split_whitespace()).is_err(),
                "{words}"
            );
        }
    }

    #[test]
    fn limits_devices_and_memory_mounts_are_read() {
        assert_eq!(ulimit("core=unlimited").expect("valid").soft, u64::MAX);
        assert!(ulimit("core").is_err() && ulimit("=1").is_err() && ulimit("a=b").is_err());
        let fuse = device("/dev/fuse:rw").expect("valid");
        assert_eq!(
            (fuse.container_path.as_str(), fuse.permissions.as_str()),
            ("", "rw")
        );
        assert_eq!(
            device("/dev/a:/dev/b:m").expect("valid").container_path,
            "/dev/b"
        );
        assert!(device("fuse").is_err() && device("/dev/a:x").is_err());
        assert!(tmpfs("/tmp:mode=1777,size=1k,ro").expect("valid").readonly);
        assert!(tmpfs("tmp").is_err() && tmpfs("/tmp:huge").is_err());
    }
}
