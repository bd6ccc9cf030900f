//! A real agent on a machine of its own: started, killed, restarted, stopped, and inspected.

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use hyper_util::rt::TokioIo;
use longshore_proto::{
    cri::v1::{
        VersionRequest, image_service_client::ImageServiceClient,
        runtime_service_client::RuntimeServiceClient,
    },
    longshore::v1::{self as longshore, node_service_client::NodeServiceClient},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{
    host::{Scope, Snapshot, remove_cgroups},
    machine::Machine,
    program,
};

/// How long an agent may take to answer its first call: emulated machines are slow.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long the kernel may take to drop what was taken down.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// CRI's runtime service.
pub type Runtime = RuntimeServiceClient<Channel>;
/// CRI's image service.
pub type ImageService = ImageServiceClient<Channel>;

/// Connects to a unix socket.
pub async fn connect(socket: &Path) -> Result<Channel> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("connect to {}", socket.display()))
}

/// What a node starts with.
#[derive(Default)]
pub struct Options {
    /// Contents of `longshored.toml`.
    pub config: String,
    /// More flags.
    pub flags: Vec<String>,
    /// The machine to live on; by default one of its own.
    pub machine: Option<Machine>,
}

/// An agent and everything that is its own.
pub struct Node {
    machine: Machine,
    flags: Vec<String>,
    dir: TempDir,
    child: Option<Child>,
    channel: Option<Channel>,
    instance: String,
    baseline: Option<Snapshot>,
    finished: bool,
}

impl Node {
    /// Starts an agent with embedded defaults on a machine of its own.
    pub async fn start() -> Result<Self> {
        Self::start_with(Options::default()).await
    }

    /// Starts an agent with this configuration on a machine of its own.
    pub async fn start_configured(config: &str) -> Result<Self> {
        Self::start_with(Options {
            config: config.to_owned(),
            ..Options::default()
        })
        .await
    }

    /// Starts an agent.
    pub async fn start_with(options: Options) -> Result<Self> {
        crate::init();
        let machine = match options.machine {
            Some(machine) => machine,
            None => Machine::start()?,
        };
        let mut make = tempfile::Builder::new();
        // Short: a unix socket's path has at most 107 bytes.
        make.prefix("ls-").rand_bytes(6);
        let dir = match env::var_os("LONGSHORE_TEST_DIR") {
            Some(base) => make.tempdir_in(base)?,
            None => make.tempdir()?,
        };
        fs::write(dir.path().join("longshored.toml"), options.config)?;
        fs::create_dir(dir.path().join("logs"))?;
        let mut node = Self {
            machine,
            flags: options.flags,
            dir,
            child: None,
            channel: None,
            instance: String::new(),
            baseline: None,
            finished: false,
        };
        node.launch().await?;
        Ok(node)
    }

    /// Starts the agent (again) and waits for its first answer.
    pub async fn launch(&mut self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let mut command = Command::new(program("longshored")?);
        command
            .arg("--config")
            .arg(self.dir.path().join("longshored.toml"))
            .arg("--data-dir")
            .arg(self.data_dir())
            .arg("--run-dir")
            .arg(self.run_dir())
            .args(&self.flags)
            .env(
                "RUST_LOG",
                env::var("RUST_LOG")
                    .unwrap_or_else(|_| "debug,h2=info,hyper=info,rustls=info".to_owned()),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.child = Some(self.machine.spawn(command)?);
        self.channel = Some(self.await_ready().await?);
        if self.instance.is_empty() {
            self.instance = self.find_instance().await?;
        }
        Ok(())
    }

    async fn await_ready(&mut self) -> Result<Channel> {
        let end = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = self
                .child
                .as_mut()
                .and_then(|child| child.try_wait().transpose())
            {
                bail!("longshored ended with {}:\n{}", status?, self.log_tail());
            }
            let tried = async {
                let channel = connect(&self.socket()).await?;
                let request = VersionRequest::default();
                RuntimeServiceClient::new(channel.clone())
                    .version(request)
                    .await?;
                anyhow::Ok(channel)
            };
            match tried.await {
                Ok(channel) => return Ok(channel),
                Err(error) if Instant::now() > end => {
                    return Err(
                        error.context(format!("longshored does not answer:\n{}", self.log_tail()))
                    );
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// Where it lives.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// A directory of the test that goes away with the node.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The agent's `--data-dir`.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The agent's `--run-dir`.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A directory for container logs.
    pub fn log_dir(&self) -> PathBuf {
        self.dir.path().join("logs")
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("longshore.sock")
    }

    /// The agent's own log.
    pub fn log_path(&self) -> PathBuf {
        self.dir.path().join("longshored.log")
    }

    /// Eight hex digits.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Pid of the agent.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// The connection.
    ///
    /// # Panics
    /// While the agent is down.
    pub fn channel(&self) -> Channel {
        self.channel.clone().expect("the agent runs")
    }

    /// CRI's runtime service.
    pub fn runtime(&self) -> Runtime {
        RuntimeServiceClient::new(self.channel())
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20)
    }

    /// CRI's image service.
    pub fn images(&self) -> ImageService {
        ImageServiceClient::new(self.channel())
    }

    async fn find_instance(&self) -> Result<String> {
        let request = longshore::InfoRequest::default();
        let info = NodeServiceClient::new(self.channel()).info(request).await?;
        Ok(info.into_inner().instance_id)
    }

    /// What `fsck` finds, one difference a line.
    pub async fn fsck(&self) -> Result<Vec<String>> {
        let request = longshore::FsckRequest::default();
        let mut stream = NodeServiceClient::new(self.channel())
            .fsck(request)
            .await?
            .into_inner();
        let mut found = Vec::new();
        while let Some(response) = stream.message().await? {
            let difference = response.difference.unwrap_or_default();
            found.push(format!(
                "{} {} {}: {}",
                difference.kind().as_str_name(),
                difference.subject_type,
                difference.subject,
                difference.cause
            ));
        }
        Ok(found)
    }

    /// Fails unless store and kernel agree.
    pub async fn fsck_clean(&self) -> Result<()> {
        let found = self.fsck().await?;
        if !found.is_empty() {
            bail!("fsck finds:\n{}", found.join("\n"));
        }
        Ok(())
    }

    /// The last lines of the agent's log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(150)..].join("\n")
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        self.channel = None;
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGKILL and start again.
    pub async fn crash(&mut self) -> Result<()> {
        self.kill()?;
        self.launch().await
    }

    /// SIGTERM; answers how it ended.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.channel = None;
        let mut child = self.child.take().context("the agent is down")?;
        kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)?;
        let end = Instant::now() + START_LIMIT;
        while Instant::now() < end {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        child.kill()?;
        child.wait()?;
        bail!("longshored does not end upon SIGTERM:\n{}", self.log_tail());
    }

    /// Everything of this node that the kernel and the disk hold.
    pub fn scope(&self) -> Scope {
        Scope {
            machine: self.machine.clone(),
            cgroups: if self.instance.is_empty() {
                String::new()
            } else {
                format!("longshore-{}", self.instance)
            },
            commands: vec![self.run_dir().to_string_lossy().into_owned()],
            dirs: vec![self.data_dir(), self.run_dir()],
            namespaces: false,
        }
    }

    /// Takes what is there now as what must be there at the end; call it once images are pulled.
    ///
    /// What is on its way out, as the links of a removed pod are for some tens of milliseconds, is
    /// waited for.
    pub fn mark_clean(&mut self) -> Result<()> {
        let end = Instant::now() + SETTLE_LIMIT;
        let mut now = self.snapshot()?;
        loop {
            thread::sleep(Duration::from_millis(250));
            let later = self.snapshot()?;
            let settled = now.difference(&later).is_empty();
            now = later;
            if settled || Instant::now() > end {
                self.baseline = Some(now);
                return Ok(());
            }
        }
    }

    /// Adds what is new since `before` to what must be there at the end.
    pub fn mark_clean_since(&mut self, before: &Snapshot) -> Result<()> {
        let now = self.snapshot()?;
        let baseline = self
            .baseline
            .as_mut()
            .context("mark_clean was not called")?;
        for kind in KINDS {
            let known: Vec<_> = before.of(kind).collect();
            let new = now.of(kind).filter(|fact| !known.contains(fact));
            baseline.add(kind, new.map(str::to_owned));
        }
        Ok(())
    }

    /// The node's snapshot, without the agent's own process, which a restart changes.
    pub fn snapshot(&self) -> Result<Snapshot> {
        self.scope()
            .snapshot()
            .map(|snapshot| self.without_agent(&snapshot))
    }

    fn without_agent(&self, snapshot: &Snapshot) -> Snapshot {
        let own = format!("{} ", self.pid());
        let base = BASE.map(|dir| format!("{} (dir)", self.dir().join(dir).display()));
        let mut without = Snapshot::default();
        for kind in KINDS {
            without.add(
                kind,
                snapshot
                    .of(kind)
                    .filter(|fact| !(*kind == "processes" && fact.starts_with(&own)))
                    .filter(|fact| !base.iter().any(|dir| fact == dir))
                    .map(str::to_owned),
            );
        }
        without
    }

    /// Fails with the difference unless everything is as it was at `mark_clean`.
    pub fn expect_clean(&self) -> Result<()> {
        let before = self
            .baseline
            .as_ref()
            .context("mark_clean was not called")?;
        let end = Instant::now() + SETTLE_LIMIT;
        loop {
            let difference = before.difference(&self.snapshot()?);
            if difference.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(anyhow!("left over (+) or lost (-):\n{difference}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Removes what is left of an agent that ended well.
    pub fn dispose(mut self) {
        self.finished = true;
    }

    /// The end of a test: nothing left over, store and kernel agree, a clean exit, and no process.
    pub async fn finish(mut self) -> Result<()> {
        if self.baseline.is_some() {
            self.expect_clean()?;
        }
        self.fsck_clean().await?;
        let status = self.terminate()?;
        if !status.success() {
            bail!("longshored ended with {status}:\n{}", self.log_tail());
        }
        let left = self.scope().pids()?;
        if !left.is_empty() {
            bail!("processes outlive the agent: {left:?}");
        }
        self.finished = true;
        Ok(())
    }
}

/// Directories that stay once they were needed.
const BASE: [&str; 6] = [
    "run/sandboxes",
    "data/containers",
    "data/layers",
    "data/blobs",
    "data/blobs/sha256",
    "data/blobs/partial",
];

const KINDS: &[&str] = &[
    "mounts",
    "mounts outside",
    "links",
    "addresses",
    "routes",
    "nft",
    "sysctls",
    "cgroups",
    "processes",
    "files",
];

impl Drop for Node {
    fn drop(&mut self) {
        if !self.finished {
            eprintln!(
                "--- longshored's log, last lines ---\n{}\n---",
                self.log_tail()
            );
        }
        let _dead = self.kill();
        // What is left is ours alone: shims and containers of this instance.
        let scope = self.scope();
        for _ in 0..20 {
            let Ok(pids) = scope.pids() else { break };
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                if let Ok(pid) = i32::try_from(pid) {
                    let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
        if !self.instance.is_empty() {
            let _busy = remove_cgroups(&scope.cgroups);
        }
    }
}
