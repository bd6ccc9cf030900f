//! Processes held by descriptor, so that a pid that is used again is never mistaken.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::check;

/// Opens a process.
///
/// # Errors
/// `ESRCH` when there is none; what pidfd_open(2) answers.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers.
    let raw = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(raw).expect("descriptors are small")) })
}

/// Sends a signal, real-time ones too; 0 only asks whether that would be possible.
///
/// # Errors
/// `ESRCH` once the process has been waited for; what pidfd_send_signal(2) answers.
pub fn send_signal(process: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: the siginfo pointer may be null, the rest are numbers.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })?;
    Ok(())
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(u8),
    /// This signal ended it.
    Killed(i32),
}

/// Waits for a child by its pidfd and reaps it; `None` if `block` is false and it still runs.
///
/// # Errors
/// `ECHILD` if it is no child of ours or was reaped already; what waitid(2) answers.
pub fn wait(process: impl AsFd, block: bool) -> io::Result<Option<Ended>> {
    let id = u32::try_from(process.as_fd().as_raw_fd()).expect("descriptors are not negative");
    Ok(wait_id(libc::P_PIDFD, id, block)?.map(|(_, ended)| ended))
}

/// Reaps any child that has ended; `None` if all still run.
///
/// # Errors
/// `ECHILD` if there are no children.
pub fn reap_any() -> io::Result<Option<(i32, Ended)>> {
    wait_id(libc::P_ALL, 0, false)
}

fn wait_id(kind: libc::idtype_t, id: u32, block: bool) -> io::Result<Option<(i32, Ended)>> {
    let flags = libc::WEXITED | libc::__WALL | if block { 0 } else { libc::WNOHANG };
    // SAFETY: all-zero is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: `info` outlives the call.
        match check(libc::c_long::from(unsafe {
            libc::waitid(kind, id, &raw mut info, flags)
        })) {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    // SAFETY: waitid fills the child members, or leaves zero if nothing ended.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let ended = if info.si_code == libc::CLD_EXITED {
        Ended::Exited(u8::try_from(status & 0xff).expect("masked"))
    } else {
        Ended::Killed(status)
    };
    Ok(Some((pid, ended)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    #[expect(clippy::zombie_processes, reason = "it is waited for by descriptor")]
    fn a_child_is_signalled_and_waited_for_by_descriptor() {
        let child = Command::new("sleep").arg("100").spawn().expect("spawn");
        let fd = open(child.id().cast_signed()).expect("pidfd");
        assert_eq!(wait(&fd, false).expect("wait"), None);
        send_signal(&fd, libc::SIGTERM).expect("signal");
        assert_eq!(
            wait(&fd, true).expect("wait"),
            Some(Ended::Killed(libc::SIGTERM))
        );
        assert_eq!(
            wait(&fd, false).expect_err("reaped").raw_os_error(),
            Some(libc::ECHILD)
        );
    }
}
