//! How system containers stand and what they use: lists from the snapshot, readings for one.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    super::{
        Lifecycle, LifecycleError,
        container::{Container, ContainerState},
        sandbox::Sandbox,
        stats::InterfaceUse,
    },
    System, find,
    start::not_found,
    subject,
};
use crate::{blocking, cgroup::CgroupMetrics, clock::Time, rootfs::Usage, store::Snapshot};

/// How a system container stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SystemState {
    /// Nothing of it runs.
    Stopped,
    /// Its run is being made.
    Starting,
    /// Its init runs.
    Running {
        /// Process 1, in the host.
        pid: i32,
        /// Since when.
        since: Time,
    },
    /// Its end was asked for, or is being dealt with.
    Stopping,
    /// All of it stands still.
    Frozen {
        /// Process 1, in the host.
        pid: i32,
        /// Since when it runs.
        since: Time,
    },
}

impl SystemState {
    /// The word of LXC's tools.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Stopped => "STOPPED",
            Self::Starting => "STARTING",
            Self::Running { .. } => "RUNNING",
            Self::Stopping => "STOPPING",
            Self::Frozen { .. } => "FROZEN",
        }
    }
}

/// A system container with what its run has.
#[derive(Clone, Debug)]
pub struct SystemView {
    /// The record.
    pub system: Arc<System>,
    /// How it stands.
    pub state: SystemState,
    /// Its sandbox, while it has one.
    pub sandbox: Option<Arc<Sandbox>>,
    /// Its container, while it has one.
    pub container: Option<Arc<Container>>,
}

/// What a running system container uses.
#[derive(Clone, Debug, Default)]
pub struct SystemUse {
    /// Readings of its cgroup.
    pub cgroup: CgroupMetrics,
    /// Traffic of its link, from the inside.
    pub interface: Option<InterfaceUse>,
    /// What it has written.
    pub disk: Usage,
}

impl Lifecycle {
    /// The system container with this name or id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn system(&self, name: &str) -> Result<Arc<System>, LifecycleError> {
        find(&self.store.snapshot(), name).ok_or_else(|| not_found(name))
    }

    /// All of them by name, from memory and, for those that run, one small file each.
    pub fn systems(&self, at: &Snapshot) -> Vec<SystemView> {
        let views = at
            .all::<System>()
            .map(|system| self.system_view(at, system));
        let by_name: BTreeMap<String, SystemView> = views
            .map(|view| (view.system.config.name.clone(), view))
            .collect();
        by_name.into_values().collect()
    }

    /// One with what its run has.
    pub fn system_view(&self, at: &Snapshot, system: Arc<System>) -> SystemView {
        let (sandbox, container) = match self.run_of(at, &system) {
            Some((sandbox, container)) => (Some(sandbox), container),
            None => (None, None),
        };
        SystemView {
            state: self.system_state(at, &system),
            system,
            sandbox,
            container,
        }
    }

    /// What it uses; zeros while it does not run.
    ///
    /// # Errors
    /// `Cgroup`, `Rootfs`.
    pub async fn system_use(&self, view: &SystemView) -> Result<SystemUse, LifecycleError> {
        let (rootfs, id) = (self.rootfs.clone(), view.system.id.clone());
        let disk =
            blocking::run("measure writable layer", move || rootfs.writable_usage(&id)).await?;
        let running = view.container.as_ref().filter(|one| one.exit().is_none());
        let (Some(container), Some(sandbox)) = (running, &view.sandbox) else {
            return Ok(SystemUse {
                disk,
                ..SystemUse::default()
            });
        };
        let link = sandbox
            .attachment
            .as_ref()
            .map(|attachment| attachment.host_interface.clone())
            .filter(|link| !link.is_empty());
        let interface = match link {
            Some(link) => Some(blocking::run("read link", move || traffic(&link)).await),
            None => None,
        };
        Ok(SystemUse {
            cgroup: self.container_metrics(container).await?,
            interface,
            disk,
        })
    }

    /// How it stands.
    pub(super) fn system_state(&self, at: &Snapshot, system: &System) -> SystemState {
        match self.operations.running_on(&subject(&system.id)) {
            Some("start_system") => SystemState::Starting,
            Some("end_system" | "remove_system") => SystemState::Stopping,
            _ => self.run_state(at, system),
        }
    }

    /// The same, without what an operation is about to make of it.
    pub(super) fn run_state(&self, at: &Snapshot, system: &System) -> SystemState {
        match self.run_of(at, system).and_then(|(_, container)| container) {
            None => SystemState::Stopped,
            Some(container) => match container.state {
                ContainerState::Created { .. } => SystemState::Starting,
                // Nobody deals with it any more: what is left goes with the next start or stop.
                ContainerState::Exited(_) => SystemState::Stopped,
                ContainerState::Running { pid, started_at } => {
                    if self.cgroups.is_frozen(&container.cgroup) {
                        SystemState::Frozen {
                            pid,
                            since: started_at,
                        }
                    } else if self.halting.contains(&container.id) {
                        SystemState::Stopping
                    } else {
                        SystemState::Running {
                            pid,
                            since: started_at,
                        }
                    }
                }
            },
        }
    }

    /// The sandbox of its run and the container in it.
    pub(super) fn run_of(
        &self,
        at: &Snapshot,
        system: &System,
    ) -> Option<(Arc<Sandbox>, Option<Arc<Container>>)> {
        let holder = at.claim(&system.sandbox_claim())?;
        let sandbox = at.get::<Sandbox>(holder.strip_prefix("sandbox/")?)?;
        let names = format!("container-name/{}/", sandbox.id);
        let container = at
            .claims(&names)
            .filter_map(|(_, holder)| at.get::<Container>(holder.strip_prefix("container/")?))
            .next();
        Some((sandbox, container))
    }
}

impl System {
    /// Refusal that names the state.
    pub(super) fn wrong_state(&self, state: &SystemState, wanted: &'static str) -> LifecycleError {
        LifecycleError::State {
            kind: "system container",
            id: self.config.name.clone(),
            state: state.word(),
            wanted,
        }
    }
}

/// What the host's end of a link has received was sent from inside.
fn traffic(link: &str) -> InterfaceUse {
    let dir: PathBuf = Path::new("/sys/class/net").join(link).join("statistics");
    let read = |name: &str| {
        let text = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    InterfaceUse {
        rx_bytes: read("tx_bytes"),
        rx_packets: read("tx_packets"),
        rx_errors: read("tx_errors"),
        rx_dropped: read("tx_dropped"),
        tx_bytes: read("rx_bytes"),
        tx_packets: read("rx_packets"),
        tx_errors: read("rx_errors"),
        tx_dropped: read("rx_dropped"),
    }
}
