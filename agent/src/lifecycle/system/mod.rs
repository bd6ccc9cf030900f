//! System containers: a distribution's own init, unprivileged, with what it writes kept.
//!
//! ```text
//!  create --> System (record, writable layer, ids, name)        --remove--> gone
//!                |                       ^
//!              start                  poweroff, stop, crash
//!                v                       |
//!             one sandbox, one container whose process 1 is the init
//!                        ^    |
//!                        reboot: another container in the same sandbox
//! ```
//! A run is a sandbox and a container as any other: network, cgroup, shim, exec and logs are theirs.
//! What outlives it is the [`System`].
//!
//! Invariants
//! - A system container and its claims (name, ids, addresses, layers) are committed durably; a run's
//!   steps are not, and after a restart of the host it is stopped.
//! - It runs while its sandbox is ready and the container in it runs; nothing else says so.
//! - One operation at a time: starting, ending and removing all hold `system/<id>`. A halt is none:
//!   like StopContainer it leaves nothing behind, and what comes after an exit is [`end`]'s matter,
//!   whoever caused it.

mod autostart;
mod console;
mod create;
mod end;
mod error;
mod halt;
mod ids;
mod record;
mod remove;
mod start;
mod view;

use std::{collections::HashSet, sync::Mutex};

pub(super) use self::{
    create::CreateSystem, end::EndSystem, remove::RemoveSystem, start::StartSystem,
};
pub use self::{
    error::SystemError,
    halt::Halt,
    record::{Autostart, System, SystemConfig},
    view::{SystemState, SystemUse, SystemView},
};
use crate::{id::ContainerId, operation::Subject, store::Snapshot};

/// Containers whose end somebody has asked for: a reboot from inside does not go against that.
#[derive(Default)]
pub(super) struct Halting(Mutex<HashSet<ContainerId>>);

impl Halting {
    fn begin(&self, id: &ContainerId) {
        self.lock().insert(id.clone());
    }

    fn forget(&self, id: &ContainerId) {
        self.lock().remove(id);
    }

    fn contains(&self, id: &ContainerId) -> bool {
        self.lock().contains(id)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<ContainerId>> {
        self.0.lock().expect("no panic while this lock is held")
    }
}

/// What all of its operations hold.
fn subject(id: &ContainerId) -> Subject {
    Subject(System::holder(id))
}

/// The system container with this name, or this id.
fn find(at: &Snapshot, name: &str) -> Option<std::sync::Arc<System>> {
    let by_name = at
        .claim(&System::name_claim(name))
        .and_then(|holder| holder.strip_prefix("system/").map(str::to_owned));
    at.get::<System>(by_name.as_deref().unwrap_or(name))
}
