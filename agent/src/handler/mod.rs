//! CRI runtime handlers: what runs the containers of a pod.
//!
//! ```text
//!  lifecycle -> Handler -> NativeHandler -- wire --> longshore-shim (one per pod)
//!                            native.rs    OCI specification -> plan of system calls, pure
//!                            seccomp.rs   OCI profile -> program, cached
//!                            oci.rs       OCI specification -> bundle of an OCI runtime, pure
//!                            runtimes.rs  which of those there are, and what they can
//!                            shim.rs      one connection per pod
//! ```
//! A handler never stores: what it returns can be had again from the shim, by [`Handler::reconnect`].
//! It knows pods by sandbox id and run directory, containers by id, and nothing of images, networks
//! or records. Exits are told as events and repeated on each new connection until acknowledged.

mod default_profile;
mod error;
mod lower;
mod native;
mod oci;
mod runtimes;
pub mod seccomp;
mod shim;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::BoxFuture;
use longshore_shim::wire;
use oci_spec::runtime::{LinuxSeccomp, Process, Spec};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

pub use error::{Blame, HandlerError};
pub use native::NativeHandler;
pub use runtimes::{Features, NATIVE, RuntimeConfig, RuntimeKind};

use crate::{
    cgroup::CgroupPath,
    id::{ContainerId, SandboxId},
};

/// `[handler]` of `longshored.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HandlerChapterConfig {
    /// The shim's program. Unset: `longshore-shim` beside the agent's own.
    pub shim: Option<PathBuf>,
}

/// A CRI runtime handler.
///
/// All of it may be cancelled by dropping the future: what was asked goes on in the shim, and its
/// outcome shows in the next [`wire::Welcome`].
pub trait Handler: Send + Sync + 'static {
    /// Starts the supervisor of a pod; `dir` is the pod's run directory. Returns its pid.
    fn start_pod<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<i32, HandlerError>>;

    /// Ends everything in a pod and its supervisor, by id alone; not there is fine, repeatable.
    fn end_pod<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Ends the supervisor of a pod that is to be stopped if it answers nothing: what waits for it
    /// would hold up the stop.
    fn end_if_silent<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Connects to the supervisor of a pod again and returns all that it knows.
    fn reconnect<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<wire::Welcome, HandlerError>>;

    /// Builds a container up to the point before its program runs. Returns the pid.
    fn create(&self, request: CreateRequest) -> BoxFuture<'_, Result<i32, HandlerError>>;

    /// Lets a created container run its program; returns once that is running.
    fn start<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Sends a signal to the first process of a container.
    fn signal<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        signal: i32,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Sets the size of a container's terminal, in character cells.
    fn resize<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        width: u32,
        height: u32,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Closes the stdin of a container.
    fn close_stdin<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Goes on with another log file.
    fn reopen_log<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        log: File,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// The exit of a container is committed: it need not be told again.
    fn ack_exit<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Forgets a container; what still runs of it is killed first. Unknown is fine.
    fn delete<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Runs one more process in a container; returns once its program runs.
    fn exec(&self, request: ExecRequest) -> BoxFuture<'_, Result<Exec, HandlerError>>;

    /// Ends an exec and all that it started. One that has ended is fine.
    fn kill_exec<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        exec_id: u64,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// Connects to the stdio of a container; the other ends are the caller's. With `replay` what a
    /// console has shown comes first.
    fn attach<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        streams: Streams,
        replay: bool,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;

    /// What happens by itself, in all pods. Can be taken once.
    fn events(&self) -> Option<mpsc::Receiver<ShimEvent>>;

    /// Pods whose supervisor runs, with its pid, for run directories directly below `sandboxes`.
    fn inventory<'a>(&'a self, sandboxes: &'a Path) -> BoxFuture<'a, Vec<(SandboxId, i32)>>;
}

/// A container to build.
#[derive(Debug)]
pub struct CreateRequest {
    /// Name of its pod's handler; empty is the default.
    pub handler: String,
    /// Its pod.
    pub sandbox_id: SandboxId,
    /// Its id.
    pub container_id: ContainerId,
    /// What it is. `root.path`, `linux.cgroups_path` and `linux.resources` are not looked at:
    /// [`Self::root`] and the cgroup chapter have them.
    pub spec: Spec,
    /// Environment that replaces the specification's, whose text cannot hold any octets.
    pub env: Option<Vec<Vec<u8>>>,
    /// Its root.
    pub root: RootInput,
    /// Its cgroup, which exists.
    pub cgroup: CgroupPath,
    /// Its pid namespace; wins over the specification's.
    pub pid: PidMode,
    /// Where its output goes; `None` drops what nobody is attached to.
    pub log: Option<LogInput>,
    /// It has a stdin.
    pub stdin: bool,
    /// That is closed when the first attached client has gone.
    pub stdin_once: bool,
    /// Its first process is the init of a system; needs a terminal. The engine alone has it.
    pub system: Option<SystemInput>,
}

/// What the init of a system gets that no other program does.
#[derive(Debug, Default)]
pub struct SystemInput {
    /// Files written to the root before it runs.
    pub files: Vec<wire::File>,
    /// Writable though they are below a read-only path.
    pub writable_paths: Vec<String>,
    /// Bytes of its console that are kept for who attaches later; 0 for a terminal as any other.
    pub console_bytes: u32,
}

/// Directories that make up the root of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootInput {
    /// An empty directory where it is put together, out of the host's sight.
    pub mount_point: PathBuf,
    /// Directory that `lower` is relative to.
    pub layers_dir: PathBuf,
    /// Layers, topmost first.
    pub lower: Vec<String>,
    /// Writable layer.
    pub upper: PathBuf,
    /// Overlay's work directory beside it.
    pub work: PathBuf,
    /// The writable layer is used again by a later container.
    pub durable: bool,
}

/// Pid namespace of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidMode {
    /// Its own; its first process is pid 1.
    New,
    /// The pod's shared one.
    Pod,
    /// The host's.
    Host,
    /// That of another container of the pod.
    Container(ContainerId),
}

/// A CRI log.
#[derive(Debug)]
pub struct LogInput {
    /// The file, opened for appending.
    pub file: File,
    /// Its path, for rotation by the shim.
    pub path: PathBuf,
    /// Size in bytes at which the shim rotates by itself; 0 for never.
    pub rotate_bytes: u64,
    /// Rotated files to keep.
    pub keep: u32,
}

/// One more process in a container.
#[derive(Debug)]
pub struct ExecRequest {
    /// Name of the pod's handler; empty is the default.
    pub handler: String,
    /// The pod.
    pub sandbox_id: SandboxId,
    /// The container.
    pub container_id: ContainerId,
    /// The process.
    pub process: Process,
    /// Environment that replaces the process's, whose text cannot hold any octets.
    pub env: Option<Vec<Vec<u8>>>,
    /// The container's profile: an exec gets what its first process got.
    pub seccomp: Option<LinuxSeccomp>,
    /// The container's cgroup.
    pub cgroup: CgroupPath,
    /// Its stdio; must be empty with a terminal.
    pub streams: Streams,
    /// After which all of it is killed.
    pub timeout: Option<Duration>,
}

/// Descriptors of stdio, as the process in the container sees them.
#[derive(Debug, Default)]
pub struct Streams {
    /// Read end.
    pub stdin: Option<OwnedFd>,
    /// Write end.
    pub stdout: Option<OwnedFd>,
    /// Write end.
    pub stderr: Option<OwnedFd>,
}

/// A running exec.
#[derive(Debug)]
pub struct Exec {
    /// For [`Handler::kill_exec`].
    pub exec_id: u64,
    /// Its process.
    pub pid: i32,
    /// The other end of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
    /// How it ends; an error if the shim is lost first.
    pub exit: oneshot::Receiver<wire::ExecExited>,
}

/// Something happened in a pod by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct ShimEvent {
    /// The pod.
    pub sandbox_id: SandboxId,
    /// What.
    pub what: ShimNews,
}

/// What happens by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum ShimNews {
    /// The first process of a container ended. May be told more than once until acknowledged.
    Exited(wire::Exited),
    /// The supervisor does not answer any more and could not be connected to again.
    Lost {
        /// It ended; otherwise it hangs or refuses.
        process_gone: bool,
    },
}
