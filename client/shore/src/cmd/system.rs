//! `system`: whole systems, from the making to the console.

use std::{net::IpAddr, time::Duration};

use anyhow::Result;
use clap::{Args, Subcommand};
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use longshore_client::{
    Client, idempotency_key,
    proto::{
        self, AttachStart, Autostart, CreateSystemRequest, ExecStart, FreezeSystemRequest,
        GetConsoleLogRequest, GetSystemRequest, GetSystemResponse, ListSystemsRequest,
        RemoveSystemRequest, Resources, RestartSystemRequest, SandboxNetwork, StartSystemRequest,
        StopSystemRequest, SystemConfig, SystemState, TerminalSize, UnfreezeSystemRequest,
    },
};

use super::{attach, each, exec, run};
use crate::{
    app::App,
    complete::{Every, First, Live},
    error::Problem,
    exit_code::ExitCode,
    human,
    output::{Column, Table, json, row},
    parse::{self, Pair, Publish, Volume},
    session::{End, Session},
    terminal::{self, DetachKeys},
};

/// The key of LXC's consoles, which fingers know.
const ESCAPE: &str = "^a";

/// The user's own shell, as the passwd file inside has it.
const LOGIN_SHELL: &str = "shell=$(grep '^root:' /etc/passwd | cut -d: -f7); \
                           [ -x \"$shell\" ] || shell=/bin/sh; exec \"$shell\" -l";

#[derive(Debug, Args)]
pub(crate) struct System {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a system container
    Create(Create),
    /// Start system containers
    Start(Start),
    /// Stop system containers
    Stop(Stop),
    /// Stop system containers and start them again
    Restart(Stop),
    /// Remove system containers and all that they have written
    Rm(Rm),
    /// List system containers
    #[command(visible_alias = "list")]
    Ls(Ls),
    /// Show all about a system container
    Info(Info),
    /// Connect to the console of a system container, or show what it has shown
    Console(Console),
    /// Run a command in a running system container
    Exec(Exec),
    /// Open a shell in a running system container
    Shell(Shell),
    /// Stop all in system containers from running
    #[command(visible_alias = "pause")]
    Freeze(Names),
    /// Let all in frozen system containers run again
    #[command(visible_aliases = ["resume", "thaw"])]
    Unfreeze(Names),
}

impl System {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        match self.verb {
            Verb::Create(verb) => verb.run(app).await,
            Verb::Start(verb) => verb.run(app).await,
            Verb::Stop(verb) => verb.stop(app).await,
            Verb::Restart(verb) => verb.restart(app).await,
            Verb::Rm(verb) => verb.run(app).await,
            Verb::Ls(verb) => verb.run(app).await,
            Verb::Info(verb) => verb.run(app).await,
            Verb::Console(verb) => verb.run(app).await,
            Verb::Exec(verb) => verb.run(app).await,
            Verb::Shell(verb) => verb.run(app).await,
            Verb::Freeze(verb) => verb.freeze(app).await,
            Verb::Unfreeze(verb) => verb.unfreeze(app).await,
        }
    }
}

#[derive(Debug, Args)]
struct Create {
    /// Its name, and its host name
    name: String,
    /// An image with an init
    #[arg(add = ArgValueCompleter::new(Every(Live::Images)))]
    image: String,
    /// Another host name
    #[arg(long)]
    hostname: Option<String>,
    /// Note something for selection
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    label: Vec<Pair>,
    /// Most memory it may use
    #[arg(short, long, value_name = "SIZE", value_parser = parse::size)]
    memory: Option<u64>,
    /// Most processors it may use, as in 1.5
    #[arg(long, value_name = "NUMBER", value_parser = parse::cpus)]
    cpus: Option<u64>,
    /// Most processes and threads it may have
    #[arg(long, value_name = "NUMBER")]
    pids_limit: Option<u64>,
    /// Show a path of this host inside, with the owners that it has
    #[arg(short, long, value_name = "SOURCE:TARGET[:ro]", value_parser = parse::volume)]
    volume: Vec<Volume>,
    /// Let ports of this host lead into it
    #[arg(short, long, value_parser = parse::publish, value_name = "PORTS")]
    publish: Vec<Publish>,
    /// Attach it to this network
    #[arg(long, add = ArgValueCompleter::new(Every(Live::Networks)))]
    network: Option<String>,
    /// Start it with the host
    #[arg(long)]
    autostart: bool,
    /// Before those with a higher number
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    order: i32,
    /// Wait after its start before the next one's
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    delay: Option<Duration>,
    /// Run this as process 1
    #[arg(long, value_name = "PROGRAM")]
    init: Option<String>,
    /// Halt it by this signal
    #[arg(long, value_name = "SIGNAL")]
    halt_signal: Option<String>,
    /// Between that signal and the killing
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    stop_timeout: Option<Duration>,
    /// Start it, too
    #[arg(long)]
    start: bool,
}

impl Create {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let config = SystemConfig {
            name: self.name.clone(),
            image: self.image,
            hostname: self.hostname.unwrap_or_default(),
            labels: self
                .label
                .into_iter()
                .map(|pair| (pair.key, pair.value.unwrap_or_default()))
                .collect(),
            resources: Some(Resources {
                cpu_millis: self
                    .cpus
                    .and_then(|millis| u32::try_from(millis).ok())
                    .unwrap_or_default(),
                memory_limit_bytes: self.memory.unwrap_or_default(),
                pids_limit: self.pids_limit.unwrap_or_default(),
                ..Default::default()
            }),
            mounts: self.volume.iter().map(run::bind).collect(),
            network: Some(SandboxNetwork {
                network: self.network.unwrap_or_default(),
                ports: self.publish.iter().map(run::port).collect(),
                ..Default::default()
            }),
            init: self.init.into_iter().collect(),
            halt_signal: self.halt_signal.unwrap_or_default(),
            stop_timeout: self.stop_timeout.map(human::wire_duration),
            autostart: Some(Autostart {
                enabled: self.autostart,
                order: self.order,
                delay: self.delay.map(human::wire_duration),
            }),
            ..Default::default()
        };
        let request = CreateSystemRequest {
            config: Some(config),
            idempotency_key: idempotency_key(),
        };
        client
            .repeat(request, |client, request| async move {
                client.systems().create_system(request).await
            })
            .await?;
        if self.start {
            start(&client, &self.name).await?;
        }
        app.output.line(&self.name)?;
        Ok(ExitCode::OK)
    }
}

async fn start(client: &Client, name: &str) -> Result<proto::System> {
    let request = StartSystemRequest {
        name: name.to_owned(),
        idempotency_key: idempotency_key(),
    };
    let started = client
        .repeat(request, |client, request| async move {
            client.systems().start_system(request).await
        })
        .await?;
    Ok(started.system.unwrap_or_default())
}

#[derive(Debug, Args)]
struct Start {
    /// Connect to its console, from its first word
    #[arg(short = 'F', long)]
    foreground: bool,
    /// The key that, followed by q, leaves the console: ^ and a letter, or none
    #[arg(short, long, value_name = "KEY", default_value = ESCAPE, value_parser = DetachKeys::escape)]
    escape: DetachKeys,
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Systems)))]
    names: Vec<String>,
}

impl Start {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        if !self.foreground {
            let client = &client;
            return each(app, &self.names, |name| async move {
                start(client, name).await?;
                Ok(name.to_owned())
            })
            .await;
        }
        let [name] = self.names.as_slice() else {
            return Err(Problem::Usage("one console at a time: name one".into()).into());
        };
        let system = start(&client, name).await?;
        connect(&client, &system, self.escape, false).await
    }
}

#[derive(Debug, Args)]
struct Stop {
    /// Kill it at once
    #[arg(short, long, visible_short_alias = 'k', conflicts_with = "timeout")]
    force: bool,
    /// Kill what does not halt within this time
    #[arg(short, long, value_name = "TIME", value_parser = parse::duration)]
    timeout: Option<Duration>,
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Systems)))]
    names: Vec<String>,
}

impl Stop {
    async fn stop(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let (force, timeout) = (self.force, self.timeout.map(human::wire_duration));
        each(app, &self.names, |name| async move {
            let request = StopSystemRequest {
                name: name.to_owned(),
                force,
                timeout,
                idempotency_key: idempotency_key(),
            };
            client
                .repeat(request, |client, request| async move {
                    client.systems().stop_system(request).await
                })
                .await?;
            Ok(name.to_owned())
        })
        .await
    }

    async fn restart(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let (force, timeout) = (self.force, self.timeout.map(human::wire_duration));
        each(app, &self.names, |name| async move {
            let request = RestartSystemRequest {
                name: name.to_owned(),
                force,
                timeout,
                idempotency_key: idempotency_key(),
            };
            client
                .repeat(request, |client, request| async move {
                    client.systems().restart_system(request).await
                })
                .await?;
            Ok(name.to_owned())
        })
        .await
    }
}

#[derive(Debug, Args)]
struct Rm {
    /// Also one that runs: it is killed
    #[arg(short, long)]
    force: bool,
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Systems)))]
    names: Vec<String>,
}

impl Rm {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let force = self.force;
        each(app, &self.names, |name| async move {
            // Unknown is success for a program; a person has mistyped.
            get(client, name).await?;
            let request = RemoveSystemRequest {
                name: name.to_owned(),
                force,
                idempotency_key: idempotency_key(),
            };
            client
                .repeat(request, |client, request| async move {
                    client.systems().remove_system(request).await
                })
                .await?;
            Ok(name.to_owned())
        })
        .await
    }
}

#[derive(Debug, Args)]
struct Names {
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Systems)))]
    names: Vec<String>,
}

impl Names {
    async fn freeze(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        each(app, &self.names, |name| async move {
            let request = FreezeSystemRequest {
                name: name.to_owned(),
                idempotency_key: idempotency_key(),
            };
            client
                .repeat(request, |client, request| async move {
                    client.systems().freeze_system(request).await
                })
                .await?;
            Ok(name.to_owned())
        })
        .await
    }

    async fn unfreeze(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        each(app, &self.names, |name| async move {
            let request = UnfreezeSystemRequest {
                name: name.to_owned(),
                idempotency_key: idempotency_key(),
            };
            client
                .repeat(request, |client, request| async move {
                    client.systems().unfreeze_system(request).await
                })
                .await?;
            Ok(name.to_owned())
        })
        .await
    }
}

#[derive(Debug, Args)]
struct Ls {
    /// As lxc-ls -f prints them
    #[arg(short, long)]
    fancy: bool,
    /// Only those that run
    #[arg(long)]
    running: bool,
}

impl Ls {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let mut request = ListSystemsRequest::default();
        if self.running {
            request.set_state(SystemState::Running);
        }
        let rows = app
            .ask(|client| {
                let request = request.clone();
                async move { client.all_systems(request).await }
            })
            .await?;
        let systems = || {
            rows.iter()
                .flat_map(|(node, systems)| systems.iter().map(move |one| (node.as_str(), one)))
        };
        if app.output.for_programs() {
            app.output
                .list(systems().map(|(node, one)| (app.many().then_some(node), one)))?;
            return Ok(app.outcome());
        }
        if self.fancy {
            app.output.text(&fancy(systems().map(|(_, one)| one)))?;
            return Ok(app.outcome());
        }
        let mut table = Table::new(&[
            Column::text("NAME"),
            Column::text("STATE"),
            Column::text("ADDRESSES"),
            Column::text("IMAGE"),
            Column::text("AUTOSTART"),
            Column::text("AGE"),
            Column::wide("PID"),
            Column::wide("INTERFACE"),
            Column::wide("IDS"),
            Column::wide("ID"),
        ])
        .first(app.node_column());
        let now = Timestamp::now();
        for (node, system) in systems() {
            let ids = system.ids.unwrap_or_default();
            let mut row = row![
                system.name.as_str(),
                word(system.state()).to_lowercase(),
                or_dash(system.addresses.join(", ")),
                system.image.as_str(),
                if is_automatic(system) { "yes" } else { "no" },
                human::since(system.created_at, now),
                or_dash(
                    Some(system.pid)
                        .filter(|pid| *pid != 0)
                        .map_or_else(String::new, |pid| pid.to_string())
                ),
                or_dash(system.host_interface.clone()),
                format!("{}+{}", ids.first_uid, ids.length),
                system.id.as_str(),
            ];
            app.name_row(&mut row, node);
            table.push(row);
        }
        app.output.table(&table)?;
        Ok(app.outcome())
    }
}

fn is_automatic(system: &proto::System) -> bool {
    system.autostart.as_ref().is_some_and(|auto| auto.enabled)
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// A state in LXC's words.
fn word(state: SystemState) -> &'static str {
    state
        .as_str_name()
        .strip_prefix("SYSTEM_STATE_")
        .unwrap_or("UNKNOWN")
}

/// Rows as `lxc-ls -f` prints them: each cell as wide as the widest of its column, one space between,
/// and nothing at all if there are none.
fn fancy<'a>(systems: impl Iterator<Item = &'a proto::System>) -> String {
    let mut rows: Vec<[String; 7]> = systems
        .map(|system| {
            let of = |wanted: fn(&IpAddr) -> bool| {
                let all: Vec<_> = system
                    .addresses
                    .iter()
                    .filter(|text| text.parse().is_ok_and(|ip| wanted(&ip)))
                    .map(String::as_str)
                    .collect();
                or_dash(all.join(", "))
            };
            [
                system.name.clone(),
                word(system.state()).to_owned(),
                u8::from(is_automatic(system)).to_string(),
                "-".to_owned(),
                of(IpAddr::is_ipv4),
                of(IpAddr::is_ipv6),
                "true".to_owned(),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let names = [
        "NAME",
        "STATE",
        "AUTOSTART",
        "GROUPS",
        "IPV4",
        "IPV6",
        "UNPRIVILEGED",
    ];
    rows.insert(0, names.map(str::to_owned));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{cell:<width$} "));
        }
        text.push('\n');
    }
    text
}

#[derive(Debug, Args)]
struct Info {
    /// Only what lxc-info prints, as it prints it
    #[arg(long)]
    lxc: bool,
    #[arg(value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Systems)))]
    name: String,
}

impl Info {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let found = get(&client, &self.name).await?;
        if app.output.for_programs() {
            app.output.data(&json(&found)?)?;
            return Ok(ExitCode::OK);
        }
        let mut text = lxc_info(&found);
        if !self.lxc {
            text.push_str(&more_info(&found, Timestamp::now()));
        }
        app.output.text(&text)?;
        Ok(ExitCode::OK)
    }
}

async fn get(client: &Client, name: &str) -> Result<GetSystemResponse> {
    let request = GetSystemRequest {
        name: name.to_owned(),
    };
    let found = client
        .repeat(request, |client, request| async move {
            client.systems().get_system(request).await
        })
        .await?;
    Ok(found)
}

fn line(label: &str, value: impl std::fmt::Display) -> String {
    format!("{:<16}{value}\n", format!("{label}:"))
}

/// The block of lxc-info: a stopped one has a name and a state.
fn lxc_info(found: &GetSystemResponse) -> String {
    let system = found.system.clone().unwrap_or_default();
    let usage = found.usage.unwrap_or_default();
    let mut text = line("Name", &system.name) + &line("State", word(system.state()));
    if system.pid == 0 {
        return text;
    }
    text += &line("PID", system.pid);
    for address in &system.addresses {
        text += &line("IP", address);
    }
    let seconds = usage.cpu_ns as f64 / 1e9;
    text += &line("CPU use", format!("{seconds:.2} seconds"));
    let disk = usage.disk_read_bytes + usage.disk_write_bytes;
    for (label, bytes) in [
        ("BlkIO use", disk),
        ("Memory use", usage.memory_bytes),
        ("KMem use", usage.kernel_memory_bytes),
    ] {
        text += &line(label, lxc_size(bytes));
    }
    if !system.host_interface.is_empty() {
        text += &line("Link", &system.host_interface);
        for (label, bytes) in [
            (" TX bytes", usage.tx_bytes),
            (" RX bytes", usage.rx_bytes),
            (" Total bytes", usage.tx_bytes + usage.rx_bytes),
        ] {
            text += &line(label, lxc_size(bytes));
        }
    }
    text
}

/// A size as LXC's tools print it.
fn lxc_size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.iter().find(|(unit, _)| bytes >= *unit) {
        None => format!("{bytes} bytes"),
        Some((unit, name)) => format!("{:.2} {name}", bytes as f64 / *unit as f64),
    }
}

/// What LXC does not tell.
fn more_info(found: &GetSystemResponse, now: Timestamp) -> String {
    let system = found.system.clone().unwrap_or_default();
    let config = found.config.clone().unwrap_or_default();
    let usage = found.usage.unwrap_or_default();
    let ids = system.ids.unwrap_or_default();
    let shared = if ids.shared {
        " (shared with others)"
    } else {
        ""
    };
    let mut text = line("Id", &system.id);
    text += &line(
        "Image",
        format!("{} ({})", system.image, human::short_id(&system.image_id)),
    );
    text += &line("Init", config.init.join(" "));
    text += &line(
        "Made",
        format!("{} ago", human::since(system.created_at, now)),
    );
    if system.started_at.is_some() {
        text += &line("Up", human::since(system.started_at, now));
        text += &line("Tasks", usage.tasks);
        text += &line("Gateways", or_dash(system.gateways.join(", ")));
    }
    text += &line("Starts", system.starts);
    if let Some(exit) = &system.last_exit {
        let how = match exit.signal {
            1 => "reboot".to_owned(),
            2 => "power-off".to_owned(),
            0 => format!("exit code {}", exit.code),
            signal => format!("signal {signal}"),
        };
        text += &line(
            "Last end",
            format!("{how}, {} ago", human::since(system.last_exit_at, now)),
        );
    }
    text += &line("Written", human::bytes(usage.written_bytes));
    text += &line(
        "Ids",
        format!(
            "users {}+{}, groups {}+{}{shared}",
            ids.first_uid, ids.length, ids.first_gid, ids.length
        ),
    );
    let limits = config.resources.unwrap_or_default();
    for (label, value, shown) in [
        (
            "Memory limit",
            limits.memory_limit_bytes,
            human::bytes(limits.memory_limit_bytes),
        ),
        (
            "Tasks limit",
            limits.pids_limit,
            limits.pids_limit.to_string(),
        ),
        (
            "CPU limit",
            limits.cpu_millis.into(),
            format!("{} thousandths", limits.cpu_millis),
        ),
    ] {
        if value != 0 {
            text += &line(label, shown);
        }
    }
    text + &line(
        "Autostart",
        if is_automatic(&system) { "yes" } else { "no" },
    )
}

#[derive(Debug, Args)]
struct Console {
    /// The key that, followed by q, leaves it: ^ and a letter, or none
    #[arg(short, long, value_name = "KEY", default_value = ESCAPE, value_parser = DetachKeys::escape)]
    escape: DetachKeys,
    /// Only watch
    #[arg(long)]
    read_only: bool,
    /// Print what it has shown, also when it is stopped
    #[arg(long)]
    log: bool,
    /// Only this many last lines of that
    #[arg(long, value_name = "NUMBER", requires = "log")]
    lines: Option<u64>,
    #[arg(value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Systems)))]
    name: String,
}

impl Console {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        if self.log {
            let request = GetConsoleLogRequest {
                name: self.name,
                tail_lines: self.lines,
            };
            let log = client
                .repeat(request, |client, request| async move {
                    client.systems().get_console_log(request).await
                })
                .await?;
            app.output.text(&String::from_utf8_lossy(&log.content))?;
            return Ok(ExitCode::OK);
        }
        let found = get(&client, &self.name).await?.system.unwrap_or_default();
        connect(&client, &running(found)?, self.escape, self.read_only).await
    }
}

/// A person is told what to do about one that does not run.
fn running(system: proto::System) -> Result<proto::System> {
    if system.container_id.is_empty() || system.pid == 0 {
        let (name, state) = (&system.name, word(system.state()));
        return Err(Problem::State(format!(
            "{name} is {state}: `shore system start {name}` starts it"
        ))
        .into());
    }
    Ok(system)
}

async fn connect(
    client: &Client,
    system: &proto::System,
    escape: DetachKeys,
    read_only: bool,
) -> Result<ExitCode> {
    let size = terminal::size().filter(|_| !read_only);
    let start = AttachStart {
        container_id: system.container_id.clone(),
        stdin: !read_only,
        terminal_size: size.map(|(columns, rows)| TerminalSize { columns, rows }),
        replay: true,
    };
    let name = &system.name;
    let connection = attach::begin(client, start).await?;
    let keys = escape.to_string();
    terminal::note(&match keys.split_once(' ') {
        Some((key, _)) => {
            format!("Connected to {name} console. Detach: {keys}; {key} {key} sends {key}")
        }
        None => format!("Connected to {name} console. There is no key to detach"),
    });
    let session = Session {
        stdin: !read_only,
        tty: !read_only,
        detach: escape,
        signals: None,
    };
    match session.run(connection.inputs, connection.outputs).await? {
        End::Detached => {
            terminal::note(&format!("\r\n{name} runs on"));
            Ok(ExitCode::OK)
        }
        End::Exited(_) | End::Closed => {
            terminal::note(&format!("\r\nthe console of {name} has ended"));
            Ok(ExitCode::OK)
        }
        End::Interrupted(signal) => Ok(ExitCode::of_process(128 + signal)),
    }
}

#[derive(Debug, Args)]
struct Exec {
    /// Set a variable; without =VALUE it is handed over from here
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = parse::pair)]
    env: Vec<Pair>,
    /// Run as this user: NAME or UID, with :GROUP or :GID
    #[arg(short, long)]
    user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// Without a terminal, even if there is one here
    #[arg(short = 'T', long)]
    no_tty: bool,
    /// The system container, and the command with its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true,
          value_names = ["NAME", "COMMAND"],
          add = ArgValueCompleter::new(First(Live::Systems)))]
    name_and_command: Vec<String>,
}

impl Exec {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let (name, command) = match self.name_and_command.split_first() {
            Some((name, command)) => (name, command),
            None => return Err(Problem::Usage("a name and a command are needed".into()).into()),
        };
        // Some type it, and clap leaves one behind a name in its place.
        let command = match command {
            [dashes, rest @ ..] if dashes == "--" && !rest.is_empty() => rest,
            command => command,
        };
        let start = ExecStart {
            command: command.to_vec(),
            env: run::handed_over(self.env),
            working_dir: self.workdir.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            ..Default::default()
        };
        execute(&client, name, start, !self.no_tty).await
    }
}

#[derive(Debug, Args)]
struct Shell {
    /// As this user: NAME or UID, with :GROUP or :GID
    #[arg(short, long)]
    user: Option<String>,
    #[arg(value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Systems)))]
    name: String,
}

impl Shell {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let start = ExecStart {
            command: ["/bin/sh", "-c", LOGIN_SHELL].map(str::to_owned).to_vec(),
            user: self.user.unwrap_or_default(),
            working_dir: "/".to_owned(),
            ..Default::default()
        };
        execute(&client, &self.name, start, true).await
    }
}

/// On a terminal if we are on one, as a command typed inside would be.
async fn execute(
    client: &Client,
    name: &str,
    mut start: ExecStart,
    with_tty: bool,
) -> Result<ExitCode> {
    let system = get(client, name).await?.system.unwrap_or_default();
    start.container_id = running(system)?.container_id;
    start.tty = with_tty && terminal::interactive();
    start.stdin = true;
    if start.tty {
        start.terminal_size =
            terminal::size().map(|(columns, rows)| TerminalSize { columns, rows });
        start
            .env
            .entry("TERM".into())
            .or_insert_with(|| std::env::var("TERM").unwrap_or_else(|_| "xterm".into()));
    }
    exec::run_in(client, start, None).await
}

#[cfg(test)]
mod tests {
    use longshore_client::proto::SystemUsage;

    use super::*;

    fn system(name: &str, state: SystemState, addresses: &[&str]) -> proto::System {
        proto::System {
            name: name.into(),
            state: state.into(),
            addresses: addresses.iter().map(|text| (*text).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_list_is_printed_as_lxc_ls_does() {
        let mut web = system("web", SystemState::Running, &["10.0.3.2", "fd00::2"]);
        web.autostart = Some(Autostart {
            enabled: true,
            ..Default::default()
        });
        let all = [web, system("a-longer-one", SystemState::Stopped, &[])];
        assert_eq!(
            fancy(all.iter()),
            "NAME         STATE   AUTOSTART GROUPS IPV4     IPV6    UNPRIVILEGED \n\
             web          RUNNING 1         -      10.0.3.2 fd00::2 true         \n\
             a-longer-one STOPPED 0         -      -        -       true         \n"
        );
        assert_eq!(fancy([].iter()), "");
    }

    #[test]
    fn info_is_printed_as_lxc_info_does() {
        let mut found = GetSystemResponse {
            system: Some(system("web", SystemState::Running, &["10.0.3.28"])),
            usage: Some(SystemUsage {
                cpu_ns: 934_000_000,
                disk_read_bytes: 17_000_000,
                disk_write_bytes: 616_000,
                memory_bytes: 25_850_000,
                kernel_memory_bytes: 5_390_000,
                tx_bytes: 1229,
                rx_bytes: 1000,
                ..Default::default()
            }),
            ..Default::default()
        };
        if let Some(system) = &mut found.system {
            system.pid = 1356;
            system.host_interface = "vethv6Nmn3".into();
        }
        assert_eq!(
            lxc_info(&found),
            "Name:           web\n\
             State:          RUNNING\n\
             PID:            1356\n\
             IP:             10.0.3.28\n\
             CPU use:        0.93 seconds\n\
             BlkIO use:      16.80 MiB\n\
             Memory use:     24.65 MiB\n\
             KMem use:       5.14 MiB\n\
             Link:           vethv6Nmn3\n TX bytes:      1.20 KiB\n RX bytes:      1000 bytes\n \
             Total bytes:   2.18 KiB\n"
        );
        found.system = Some(system("web", SystemState::Stopped, &[]));
        assert_eq!(
            lxc_info(&found),
            "Name:           web\nState:          STOPPED\n"
        );
    }
}
