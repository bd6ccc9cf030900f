//! `longshored`: flags, logging, runtime, signals; no decisions.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use longshore_agent::{agent::Agent, config::Config, node};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// The container node agent of one host.
#[derive(Parser)]
#[command(version, about)]
struct Flags {
    /// Configuration file [default: /etc/longshore/longshored.toml, if it is there]
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Images, layers and state [default: /var/lib/longshore]
    #[arg(long, global = true)]
    data_dir: Option<PathBuf>,
    /// Socket, namespaces and supervisors [default: /run/longshore]
    #[arg(long, global = true)]
    run_dir: Option<PathBuf>,
    /// Also serve on this TCP address, as tcp://127.0.0.1:4765
    #[arg(long)]
    listen: Option<String>,
    /// What is logged, as `info` or `longshore_agent::network=debug`
    #[arg(long, env = "LONGSHORE_LOG", default_value = "info", global = true)]
    log: String,
    /// Log as JSON lines
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Check configuration and host, explain each finding, and change nothing
    Check,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    match run(&flags) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("longshored: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    init_log(flags)?;
    // The provider is chosen once for registries and for the server.
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider is installed already"))?;
    let config = config(flags)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("longshored")
        .build()
        .context("cannot start the runtime")?;
    match flags.command {
        Some(Command::Check) => runtime.block_on(check(config)),
        None => runtime.block_on(serve(config)),
    }
}

fn init_log(flags: &Flags) -> anyhow::Result<()> {
    let filter =
        EnvFilter::try_new(&flags.log).with_context(|| format!("--log {:?}", flags.log))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if flags.log_json {
        log.json().init();
    } else {
        log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .init();
    }
    Ok(())
}

fn config(flags: &Flags) -> anyhow::Result<Config> {
    let mut config = Config::load(flags.config.as_deref())?;
    if let Some(dir) = &flags.data_dir {
        config.data_dir = std::path::absolute(dir).context("--data-dir")?;
    }
    if let Some(dir) = &flags.run_dir {
        config.run_dir = std::path::absolute(dir).context("--run-dir")?;
    }
    if let Some(address) = &flags.listen {
        config.server.listen = Some(listen(address)?);
    }
    config.validate()?;
    Ok(config)
}

fn listen(address: &str) -> anyhow::Result<SocketAddr> {
    address
        .strip_prefix("tcp://")
        .and_then(|address| address.parse().ok())
        .with_context(|| {
            format!("--listen {address:?}: wanted is tcp://ADDRESS:PORT, as tcp://127.0.0.1:4765")
        })
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopping.cancel();
    });
    Agent::start(config)
        .await
        .context("cannot start")?
        .serve(stop)
        .await?;
    Ok(ExitCode::SUCCESS)
}

async fn check(config: Config) -> anyhow::Result<ExitCode> {
    let findings = node::check::run(&config).await;
    for finding in &findings {
        println!("{finding}");
    }
    Ok(if findings.iter().any(|finding| finding.is_fatal()) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
