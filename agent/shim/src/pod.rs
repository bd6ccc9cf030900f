//! The pod's shared pid namespace, and cloning into one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use longshore_sys::clone::{self, Cloned, exit_now};
use longshore_sys::{fd, pidfd, proc};
use rustix::fs::{Mode, OFlags};

use crate::init::reaper;
use crate::report::{self, Report};
use crate::wire::{ContainerPlan, Failure};

/// The first process of the pod's shared pid namespace.
#[derive(Debug)]
pub(crate) struct PodInit {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) pid_ns: OwnedFd,
}

impl PodInit {
    /// Makes it, and returns once it has settled.
    pub(crate) fn spawn(dir: &Path, plan: &ContainerPlan) -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure {
            step: "pod's first process".into(),
            errno: error.raw_os_error().unwrap_or(0),
        };
        let (ours, childs) = report::channel().map_err(failed)?;
        let flags = match plan.user_namespace {
            Some(_) => 0,
            None => namespace_bits(reaper::OWN),
        };
        // SAFETY: the shim has one thread, and `reaper::run` does not return.
        let (mut pid, mut pidfd) = match unsafe { clone::fork(flags, None) }.map_err(failed)? {
            Cloned::Child => reaper::run(dir, plan, &childs),
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        drop(childs);
        fd::set_nonblocking(&ours, false).map_err(failed)?;
        loop {
            match report::read(&ours) {
                Some(Report::Ready(_)) => break,
                // The first ends by itself, and is reaped like any other child.
                Some(Report::Born(successor, its_pidfd)) => (pid, pidfd) = (successor, its_pidfd),
                Some(Report::Failed(failure)) => {
                    let _ = pidfd::wait(&pidfd, true);
                    return Err(failure);
                }
                Some(Report::Closed) | None => {
                    let _ = pidfd::wait(&pidfd, true);
                    return Err(failed(io::Error::other("it died")));
                }
            }
        }
        let pid_ns = open_pid_ns(pid).map_err(failed)?;
        Ok(Self { pid, pidfd, pid_ns })
    }
}

/// Opens the pid namespace of a process that we have not reaped yet.
pub(crate) fn open_pid_ns(pid: i32) -> io::Result<OwnedFd> {
    open_ns(&format!("/proc/{pid}/ns/pid"))
}

/// Opens a namespace by path.
pub(crate) fn open_ns(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// `CLONE_*` bits as clone3 takes them.
pub(crate) fn namespace_bits(flags: libc::c_int) -> u64 {
    u64::from(flags.cast_unsigned())
}

/// Clones a child that lives in `pid_ns`, or in the shim's own.
///
/// # Safety
/// As [`clone::fork`]: the child never returns into the shim's loop.
pub(crate) unsafe fn fork_in(
    pid_ns: Option<BorrowedFd<'_>>,
    own_pid_ns: &OwnedFd,
    flags: u64,
    cgroup: Option<&OwnedFd>,
) -> io::Result<Cloned> {
    let cgroup = cgroup.map(AsFd::as_fd);
    let Some(pid_ns) = pid_ns else {
        // SAFETY: passed on to the caller.
        return unsafe { clone::fork(flags, cgroup) };
    };
    proc::set_children_pid_namespace(pid_ns)?;
    // SAFETY: passed on to the caller.
    let cloned = unsafe { clone::fork(flags, cgroup) };
    if !matches!(cloned, Ok(Cloned::Child)) && proc::set_children_pid_namespace(own_pid_ns).is_err()
    {
        // Every later child would be born into this container. The kernel ends the pod's
        // namespaces and the agent the rest, once the shim is gone.
        exit_now(1);
    }
    cloned
}
