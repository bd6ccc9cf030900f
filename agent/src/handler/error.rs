//! What can go wrong between the agent and the engine in the shim.

use std::{io, path::PathBuf};

use crate::{
    cgroup::CgroupError,
    id::{ContainerId, SandboxId},
};

/// A pod's shim or the engine in it did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// The shim's program is not where it should be: the installation is broken.
    #[error("shim program {path}")]
    ShimMissing {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be used.
        source: io::Error,
    },
    /// A shim did not come up.
    #[error("start shim of sandbox {sandbox}: {step}")]
    Spawn {
        /// Its pod.
        sandbox: SandboxId,
        /// What was being done.
        step: &'static str,
        /// Why not; what the shim said itself, if it did.
        source: io::Error,
    },
    /// There is no connection to the shim, or it broke while the request was under way: whether
    /// the request was carried out is unknown.
    #[error("shim of sandbox {sandbox} is lost: {reason}")]
    ShimLost {
        /// Its pod.
        sandbox: SandboxId,
        /// How that showed.
        reason: String,
    },
    /// The shim did not answer in time: it hangs, or the host is overloaded.
    #[error("shim of sandbox {sandbox} did not answer {request} within {waited_ms} ms")]
    ShimSilent {
        /// Its pod.
        sandbox: SandboxId,
        /// What it was asked.
        request: &'static str,
        /// How long it had.
        waited_ms: u64,
    },
    /// The shim was started by an agent of a release that this one no longer talks to.
    #[error("shim of sandbox {sandbox} speaks version {found}, this agent {spoken}")]
    ShimVersion {
        /// Its pod.
        sandbox: SandboxId,
        /// What it speaks.
        found: u32,
        /// What this agent speaks; one older is understood as well.
        spoken: u32,
    },
    /// Somebody else listens on the shim's socket.
    #[error("socket {path} belongs to uid {uid}")]
    Impostor {
        /// The socket.
        path: PathBuf,
        /// Who listens.
        uid: u32,
    },
    /// The engine failed; nothing of what was asked remains.
    #[error("{step}")]
    Step {
        /// What it was doing, e.g. `execve /bin/sh`.
        step: String,
        /// The error number; 0 when no system call failed.
        errno: i32,
        /// The same, in words.
        source: Option<io::Error>,
    },
    /// The shim does not know this container.
    #[error("shim of sandbox {sandbox} has no container {container}")]
    UnknownContainer {
        /// The pod.
        sandbox: SandboxId,
        /// The container.
        container: ContainerId,
    },
    /// The specification asks for something that this handler does not do.
    #[error("this handler does not support {feature}")]
    Unsupported {
        /// What was asked for.
        feature: String,
    },
    /// The specification contradicts itself or misses something.
    #[error("{field} {reason}")]
    BadSpec {
        /// The field of the OCI specification.
        field: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A seccomp profile could not be compiled.
    #[error("seccomp profile: {reason}")]
    Seccomp {
        /// What is wrong with it.
        reason: String,
    },
    /// The configured name of a handler cannot be one.
    #[error("handlers.{name} {expected}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it, or would be valid.
        expected: &'static str,
    },
    /// The program of a configured handler cannot be used.
    #[error("handlers.{handler}: program {}", path.display())]
    RuntimeMissing {
        /// The handler.
        handler: String,
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be used.
        source: io::Error,
    },
    /// The handler of a pod is not offered any more.
    #[error("handler {handler} of sandbox {sandbox} is not known any more")]
    UnknownHandler {
        /// The pod.
        sandbox: SandboxId,
        /// Its handler.
        handler: String,
    },
    /// An OCI runtime did not do what it was called for; nothing of it remains.
    #[error("{command}: {message}")]
    Runtime {
        /// Program and command, e.g. `runc create`.
        command: String,
        /// What it said, or how it ended.
        message: String,
        /// What is to blame.
        blame: Blame,
    },
    /// A leaf for an exec could not be made.
    #[error("cgroup of an exec")]
    Cgroup(#[from] CgroupError),
}

/// What an OCI runtime's failure is to be blamed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The command that was to be run is not there.
    CommandNotFound,
    /// The command that was to be run cannot be executed.
    CommandNotExecutable,
    /// Anything else.
    Other,
}

impl HandlerError {
    /// The error number of the engine's failing system call, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Step { errno, .. } => Some(*errno).filter(|&errno| errno != 0),
            Self::ShimMissing { source, .. } | Self::Spawn { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
