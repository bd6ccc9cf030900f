//! clone3(2) as a fork that says where the child belongs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::check;

/// Which side of a clone this is.
#[derive(Debug)]
pub enum Cloned {
    /// The new process.
    Child,
    /// The caller.
    Parent {
        /// Pid of the child in the caller's pid namespace.
        pid: i32,
        /// The child.
        pidfd: OwnedFd,
    },
}

/// Forks with `namespaces` (`CLONE_NEW*` bits) made for the child, which starts inside the
/// version 2 cgroup whose directory `cgroup` is, if given.
///
/// # Safety
/// - The calling process has one thread: in the child no other thread exists to release a lock.
/// - The child never returns to what the parent was doing: it ends by execve or [`exit_now`].
///   Destructors of objects made before the clone do not run in it with effects outside of it.
/// - The C library's notion of the thread id is stale in the child; nothing there may rely on it
///   (no `raise`, `abort`, pthread calls). Allocation is all right.
///
/// # Errors
/// What clone3(2) answers.
pub unsafe fn fork(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let signal = u64::try_from(libc::SIGCHLD).expect("a positive number");
    // SAFETY: passed on to the caller.
    unsafe { clone3(namespaces, signal, cgroup) }
}

/// As [`fork`], but the child is one of the caller's parent, which waits for it and to which the
/// pid and the descriptor are of use.
///
/// # Safety
/// As [`fork`].
///
/// # Errors
/// What clone3(2) answers.
pub unsafe fn fork_sibling(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let sibling = u64::try_from(libc::CLONE_PARENT).expect("a positive flag");
    // SAFETY: passed on to the caller. The signal must be 0: it is the one that the caller ends with.
    unsafe { clone3(namespaces | sibling, 0, cgroup) }
}

unsafe fn clone3(
    flags: u64,
    exit_signal: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Cloned> {
    let mut raw_pidfd: libc::c_int = -1;
    // SAFETY: all-zero is a valid `clone_args`: no stack, no thread-local storage, plain fork.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | u64::try_from(libc::CLONE_PIDFD).expect("a positive flag");
    args.pidfd = (&raw mut raw_pidfd) as u64;
    args.exit_signal = exit_signal;
    if let Some(dir) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(dir.as_fd().as_raw_fd()).expect("descriptors are not negative");
    }
    // SAFETY: `args` is initialised and of the size given; without CLONE_VM the child has its own
    // copy of memory and stack. The rest is the caller's promise.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    Ok(Cloned::Parent {
        pid: i32::try_from(pid).expect("pids fit"),
        // SAFETY: CLONE_PIDFD has made this descriptor for us.
        pidfd: unsafe { OwnedFd::from_raw_fd(raw_pidfd) },
    })
}

/// `CLONE_INTO_CGROUP` (linux/sched.h), Linux 5.7.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Ends the process at once: no destructors, no exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// Plain fork(2), which keeps the C library's view of the child right; the child's pid, or `None`
/// in the child.
///
/// # Safety
/// The calling process has one thread.
///
/// # Errors
/// What fork(2) answers.
pub unsafe fn fork_plain() -> io::Result<Option<i32>> {
    // SAFETY: with one thread, fork leaves no lock held in the child.
    let pid = unsafe { libc::fork() };
    check(libc::c_long::from(pid))?;
    Ok((pid != 0).then_some(pid))
}
