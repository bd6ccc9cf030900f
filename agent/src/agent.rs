//! The wiring diagram: every part is built once, what an earlier agent left is recovered, and only
//! then is anything served.
//!
//! ```text
//!  lock directories -> instance -> store -> cgroups, layers, images, networks, handler
//!      -> lifecycle -> recover (networks of live pods, shims, intents) -> serve -> drain
//! ```

use std::{
    fs::{self, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    blocking,
    cgroup::{CgroupError, Cgroups},
    clock,
    config::Config,
    event::{EventDraft, EventKind, EventLog},
    handler::{Handler as _, HandlerError, NativeHandler},
    id::{Face, InstanceId},
    image::{Image, ImageError, Images},
    lifecycle::{
        Lifecycle, LifecycleError, Parts, container::Container, sandbox::Sandbox, system::System,
    },
    network::{Network, NetworkError, Networks, cni},
    operation::{Intent, Operations},
    rootfs::{Layer, Rootfs, RootfsError, can_map_layers},
    service::{
        self,
        streaming::{Streaming, StreamingError},
    },
    store::{Changes, Record, Store, StoreError, Tables},
};

/// Time that running operations have to end when the agent stops.
const DRAIN: Duration = Duration::from_secs(20);

/// One agent.
pub struct Agent {
    /// Its settings.
    pub config: Config,
    /// Who it is.
    pub instance: InstanceId,
    /// State.
    pub store: Store,
    /// Running verbs.
    pub operations: Operations,
    /// Facts.
    pub events: EventLog,
    /// Cgroups.
    pub cgroups: Arc<Cgroups>,
    /// Layers.
    pub rootfs: Rootfs,
    /// Images.
    pub images: Images,
    /// Networks.
    pub networks: Networks,
    /// The engine.
    pub handler: Arc<NativeHandler>,
    /// Sandboxes and containers.
    pub lifecycle: Arc<Lifecycle>,
    streaming: OnceCell<Streaming>,
    /// Nobody else uses the directories while these are held.
    _locks: Vec<File>,
}

/// Why the agent could not start. Nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another agent uses the directory.
    #[error("{} is in use by another agent", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// A directory or file of the agent.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Layers.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// Images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Networks.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The engine.
    #[error(transparent)]
    Handler(#[from] HandlerError),
    /// Recovery.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// Serving.
    #[error(transparent)]
    Serve(#[from] service::ServeError),
}

/// What the agent remembers of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Node {
    /// Boot of the machine in which it last ran.
    boot_id: String,
}

impl Record for Node {
    const TABLE: &'static str = "node";

    fn id(&self) -> String {
        "self".into()
    }
}

impl Agent {
    /// Builds and recovers everything.
    ///
    /// # Errors
    /// The first part that can't be built; what was recovered until then stays recovered.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let began = clock::boot_ns();
        let locks = vec![lock(&config.data_dir).await?, lock(&config.run_dir).await?];
        let instance = instance(&config.data_dir)?;
        make_logs_dir(&config.data_dir)?;
        let tables = Tables::new()
            .with::<Node>()
            .with::<Intent>()
            .with::<Image>()
            .with::<Layer>()
            .with::<Network>()
            .with::<cni::Cached>()
            .with::<Sandbox>()
            .with::<Container>()
            .with::<System>();
        let store = Store::open(&config.data_dir.join("store.db"), tables)?;
        let rebooted = note_boot(&store).await?;
        let cgroups = Arc::new(Cgroups::new(&instance, &config.cgroup)?);
        let rootfs = Rootfs::open(&config.data_dir, store.clone())?;
        let images = Images::new(
            store.clone(),
            rootfs.clone(),
            &config.data_dir,
            config.image.clone(),
        )?;
        let networks = Networks::new(instance.clone(), config.network.clone(), store.clone());
        let handler = Arc::new(NativeHandler::new(
            &config.handler,
            &config.handlers,
            Arc::clone(&cgroups),
        )?);
        let layers_dir = config.data_dir.join("layers");
        let id_maps = blocking::run("probe id-mapped mounts", move || {
            can_map_layers(&layers_dir)
        })
        .await;
        let operations = Operations::new(store.clone());
        let lifecycle = Arc::new(Lifecycle::new(Parts {
            instance: instance.clone(),
            config: config.lifecycle.clone(),
            store: store.clone(),
            operations: operations.clone(),
            images: images.clone(),
            rootfs: rootfs.clone(),
            networks: networks.clone(),
            cgroups: Arc::clone(&cgroups),
            handler: Arc::clone(&handler),
            id_maps,
            run_dir: config.run_dir.clone(),
            data_dir: config.data_dir.clone(),
        }));
        let agent = Self {
            events: EventLog::new(store.clone()),
            config,
            instance,
            store,
            operations,
            cgroups,
            rootfs,
            images,
            networks,
            handler,
            lifecycle,
            streaming: OnceCell::new(),
            _locks: locks,
        };
        agent.recover(rebooted).await?;
        info!(instance = %agent.instance, rebooted, elapsed_ms = (clock::boot_ns() - began) / 1_000_000, "started");
        Ok(agent)
    }

    async fn recover(&self, rebooted: bool) -> Result<(), StartError> {
        self.images.recover().await?;
        let live = if rebooted {
            Vec::new()
        } else {
            self.lifecycle.live_networks(&self.store.snapshot())
        };
        self.networks.start(live).await?;
        if let Some(events) = self.handler.events() {
            tokio::spawn(Arc::clone(&self.lifecycle).follow_shims(events));
        }
        self.lifecycle.recover(rebooted).await?;
        let at = self.store.snapshot();
        self.networks
            .recovered(|sandbox| at.get::<Sandbox>(sandbox.as_str()).is_some());
        self.store
            .commit(Changes::new().event(EventDraft::new(EventKind::AgentStarted, Face::Native)))
            .await?;
        if rebooted {
            tokio::spawn(Arc::clone(&self.lifecycle).autostart_systems());
        }
        Ok(())
    }

    /// Serves until `stop`, then lets running operations end. Pods run on.
    ///
    /// An agent without sandboxes takes its bridge, rules and cgroup with it.
    ///
    /// # Errors
    /// `Serve` if a socket can't be opened.
    pub async fn serve(self, stop: CancellationToken) -> Result<(), StartError> {
        let agent = Arc::new(self);
        service::serve(&agent, stop).await?;
        agent.drain().await;
        if agent.store.snapshot().all::<Sandbox>().next().is_none() {
            agent.leave().await;
        }
        info!("stopped");
        Ok(())
    }

    /// The server of CRI's streams, started when the first is asked for.
    ///
    /// # Errors
    /// `Listen` when no loopback port can be had; `Tls` when its certificate can't be used.
    pub async fn streaming(&self) -> Result<&Streaming, StreamingError> {
        self.streaming
            .get_or_try_init(|| {
                Streaming::start(
                    Arc::clone(&self.lifecycle),
                    self.config.streaming.tls.as_ref(),
                )
            })
            .await
    }

    async fn drain(&self) {
        let drained = tokio::time::timeout(DRAIN, async {
            for running in self.operations.list() {
                self.operations.wait(&running.id).await;
            }
        });
        if drained.await.is_err() {
            warn!("operations still run; the next start recovers them");
        }
    }

    async fn leave(&self) {
        if let Err(error) = self.networks.remove_all().await {
            warn!(
                error = &error as &dyn std::error::Error,
                "networks are left"
            );
        }
        let cgroups = Arc::clone(&self.cgroups);
        let removed = blocking::run("remove cgroup", move || cgroups.leave()).await;
        if let Err(error) = removed {
            warn!(
                error = &error as &dyn std::error::Error,
                "the root cgroup is left"
            );
        }
    }
}

/// How often, and how long apart, a lock is tried: a child that a killed agent was just making may
/// have it for a moment longer.
const LOCK_TRIES: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

/// Makes a directory if need be, and holds it against other agents.
async fn lock(dir: &Path) -> Result<File, StartError> {
    let file = |action, path: &Path| {
        let path = path.to_owned();
        move |source| StartError::File {
            action,
            path,
            source,
        }
    };
    fs::create_dir_all(dir).map_err(file("create directory", dir))?;
    let path = dir.join("lock");
    let lock = File::create(&path).map_err(file("open", &path))?;
    for _ in 0..LOCK_TRIES {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(LOCK_PAUSE).await,
            Err(error) => return Err(file("lock", &path)(error.into())),
        }
    }
    Err(StartError::InUse { path: dir.into() })
}

/// Logs of containers lie here; nobody else need see them.
fn make_logs_dir(data_dir: &Path) -> Result<(), StartError> {
    let path = data_dir.join("logs");
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(&path);
    made.map_err(|source| StartError::File {
        action: "create directory",
        path,
        source,
    })
}

/// Reads the instance id, or makes one for a new data directory.
fn instance(data_dir: &Path) -> Result<InstanceId, StartError> {
    let path = data_dir.join("instance");
    let file = |action| {
        let path = path.clone();
        move |source| StartError::File {
            action,
            path,
            source,
        }
    };
    match fs::read_to_string(&path) {
        Ok(text) => text
            .trim()
            .parse()
            .map_err(|error| file("understand")(io::Error::new(io::ErrorKind::InvalidData, error))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let instance = InstanceId::random();
            let new = path.with_extension("new");
            let written = fs::write(&new, format!("{instance}\n"))
                .and_then(|()| File::open(&new)?.sync_all())
                .and_then(|()| fs::rename(&new, &path))
                .and_then(|()| File::open(data_dir)?.sync_all());
            written.map_err(file("write"))?;
            Ok(instance)
        }
        Err(error) => Err(file("read")(error)),
    }
}

/// Notes this boot; true if the machine was restarted since the last note.
async fn note_boot(store: &Store) -> Result<bool, StartError> {
    let boot_id = clock::boot_id().map_err(|source| StartError::File {
        action: "read",
        path: "/proc/sys/kernel/random/boot_id".into(),
        source,
    })?;
    let last = store.snapshot().get::<Node>("self");
    if last.as_ref().is_some_and(|node| node.boot_id == boot_id) {
        return Ok(false);
    }
    store
        .commit(Changes::new().put(Node { boot_id }).durable())
        .await?;
    Ok(last.is_some())
}
