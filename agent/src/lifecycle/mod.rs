//! Sandboxes and containers: one file per verb.
//!
//! ```text
//!  run_pod_sandbox  create_container  start_container  stop_container  remove_container
//!  stop_pod_sandbox remove_pod_sandbox   exec attach exec_sync logs stats update
//!        |                 |                    (plain functions: they leave nothing behind)
//!   Operations (intent, steps, undo, outcome) --> store
//!        |
//!   network  rootfs  cgroup  handler --> kernel, shim
//! ```
//! Invariants
//! - A state moves only as the diagrams in [`sandbox`] and [`container`] show.
//! - A container's exit is committed once, by [`exit`], whoever caused it; the shim keeps it until
//!   then.
//! - Everything that a sandbox or container has in the kernel is named by ids, so it can be undone
//!   without memory: cgroup, namespaces, shim directory, writable layer, nft elements.
//! - A system container's run is one sandbox and one container; what outlives it is its own record
//!   ([`system`]).
//! - A sandbox or container of one face does not exist for the other; `longshore.v1` sees all.

mod attach;
pub mod container;
mod create_container;
mod error;
mod exec;
mod exec_sync;
mod exit;
mod files;
mod find;
mod held;
pub mod logs;
mod recover;
mod remove_container;
mod remove_pod_sandbox;
mod run_pod_sandbox;
pub mod sandbox;
pub mod session;
pub mod spec;
mod start_container;
pub mod stats;
mod stop_container;
mod stop_pod_sandbox;
pub mod system;
mod update_container;
mod update_pod_sandbox_resources;
mod volumes;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use serde::Deserialize;

pub use self::{attach::AttachWish, error::LifecycleError, exec::ExecWish, exec_sync::ExecOutput};
use crate::{
    cgroup::Cgroups,
    event::EventLog,
    handler::NativeHandler,
    id::{ContainerId, InstanceId, SandboxId},
    image::Images,
    network::Networks,
    operation::Operations,
    rootfs::{IdMapsMissing, Rootfs},
    store::Store,
};

/// Settings of this chapter, `[lifecycle]` in the file.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LifecycleChapterConfig {
    /// Size at which the log of a native container is rotated, in bytes.
    pub log_rotate_bytes: u64,
    /// Rotated logs that are kept.
    pub log_keep_files: u32,
    /// Where files of the Container Device Interface are looked for; later ones go before.
    pub cdi_spec_dirs: Vec<PathBuf>,
}

impl Default for LifecycleChapterConfig {
    fn default() -> Self {
        Self {
            log_rotate_bytes: 10 << 20,
            log_keep_files: 4,
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
        }
    }
}

/// Name of the engine of our own, and the default.
pub use crate::handler::NATIVE as NATIVE_HANDLER;

/// The chapter: what its verbs work on.
pub struct Lifecycle {
    /// This agent.
    pub instance: InstanceId,
    /// Settings.
    pub config: LifecycleChapterConfig,
    /// State.
    pub store: Store,
    /// Running verbs.
    pub operations: Operations,
    /// Facts.
    pub events: EventLog,
    /// Images.
    pub images: Images,
    /// Layers and writable layers.
    pub rootfs: Rootfs,
    /// Networks.
    pub networks: Networks,
    /// Cgroups.
    pub cgroups: Arc<Cgroups>,
    /// The engine.
    pub handler: Arc<NativeHandler>,
    /// Whether sandboxes can have user namespaces, and why not.
    pub id_maps: Result<(), IdMapsMissing>,
    /// Directory of one sandbox each, below the run directory.
    pub sandboxes_dir: PathBuf,
    /// Logs of containers that have no log directory of their own, below the data directory.
    pub logs_dir: PathBuf,
    stopping: Mutex<HashMap<ContainerId, usize>>,
    halting: system::Halting,
    samples: Mutex<HashMap<String, stats::CpuSample>>,
}

/// What a [`Lifecycle`] is made of.
pub struct Parts {
    /// This agent.
    pub instance: InstanceId,
    /// Settings.
    pub config: LifecycleChapterConfig,
    /// State.
    pub store: Store,
    /// Running verbs.
    pub operations: Operations,
    /// Images.
    pub images: Images,
    /// Layers.
    pub rootfs: Rootfs,
    /// Networks.
    pub networks: Networks,
    /// Cgroups.
    pub cgroups: Arc<Cgroups>,
    /// The engine.
    pub handler: Arc<NativeHandler>,
    /// Whether layers can be shown with other owners.
    pub id_maps: Result<(), IdMapsMissing>,
    /// The run directory.
    pub run_dir: PathBuf,
    /// The data directory.
    pub data_dir: PathBuf,
}

impl Lifecycle {
    /// Puts the chapter together; nothing happens yet.
    pub fn new(parts: Parts) -> Self {
        Self {
            instance: parts.instance,
            config: parts.config,
            events: EventLog::new(parts.store.clone()),
            store: parts.store,
            operations: parts.operations,
            images: parts.images,
            rootfs: parts.rootfs,
            networks: parts.networks,
            cgroups: parts.cgroups,
            handler: parts.handler,
            id_maps: parts.id_maps,
            sandboxes_dir: parts.run_dir.join("sandboxes"),
            logs_dir: parts.data_dir.join("logs"),
            stopping: Mutex::default(),
            halting: system::Halting::default(),
            samples: Mutex::default(),
        }
    }

    /// Where a sandbox keeps its namespaces, shim socket and files.
    pub fn sandbox_dir(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes_dir.join(id.as_str())
    }

    /// Where a container's root is put together, inside its own mount namespace.
    /// Name of a pod's handler: its containers are run by that.
    pub(crate) fn handler_of(&self, sandbox: &SandboxId) -> Result<String, LifecycleError> {
        self.store
            .snapshot()
            .get::<sandbox::Sandbox>(sandbox.as_str())
            .map(|sandbox| sandbox.config.handler.clone())
            .ok_or_else(|| LifecycleError::NotFound {
                kind: "sandbox",
                id: sandbox.to_string(),
            })
    }

    pub(crate) fn mount_point(&self, sandbox: &SandboxId, container: &ContainerId) -> PathBuf {
        self.sandbox_dir(sandbox)
            .join("containers")
            .join(container.as_str())
            .join("rootfs")
    }
}
