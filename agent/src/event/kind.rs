//! The kinds of event.

use serde::{Deserialize, Serialize};

/// What happened. Names are stable: they are stored, and clients filter by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The agent began to serve.
    AgentStarted,
    /// A sandbox exists.
    SandboxCreated,
    /// A sandbox is ready.
    SandboxStarted,
    /// A sandbox was stopped.
    SandboxStopped,
    /// A sandbox is gone.
    SandboxRemoved,
    /// The supervisor of a sandbox died; attribute `reason`.
    SandboxLost,
    /// A container exists.
    ContainerCreated,
    /// The program of a container runs.
    ContainerStarted,
    /// A container ended; attributes `exit_code`, `reason`, `signal`.
    ContainerExited,
    /// The kernel killed a process of a container for memory.
    ContainerOom,
    /// The resources of a container changed.
    ContainerUpdated,
    /// A container is gone.
    ContainerRemoved,
    /// An image is complete; attribute `reference`.
    ImagePulled,
    /// A name now means this image; attribute `reference`.
    ImageTagged,
    /// A name no longer means this image; attribute `reference`.
    ImageUntagged,
    /// An image is gone.
    ImageRemoved,
    /// A network exists; attribute `network`.
    NetworkCreated,
    /// A network is gone; attribute `network`.
    NetworkDeleted,
    /// A system container exists; attributes `name`, `system_id`, as of all that follow.
    SystemCreated,
    /// The init of a system container stands.
    SystemStarted,
    /// It was started anew from inside; attributes `exit_code`, `signal`.
    SystemRebooted,
    /// Nothing of it runs any more; attributes `exit_code`, `signal`.
    SystemStopped,
    /// A system container is gone.
    SystemRemoved,
}
