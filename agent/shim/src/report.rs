//! What a child that is becoming a container tells the shim, and the word to start.
//!
//! One socket pair per child, record by record. The child's end closes with a successful execve,
//! so the end of the stream after [`Report::Ready`] is the news that the program runs.
//!
//! ```text
//!  child                         shim
//!   | -- Born(pid, pidfd) ----->  |   with a user namespace: another goes on, the child ends
//!   | -- Failed(step, errno) -->  |   at any time; the child is gone then
//!   | -- Ready (+ pty) -------->  |
//!   | <------------------ start   |   first processes of containers only
//!   | -- end of stream -------->  |   execve succeeded
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use longshore_sys::fd;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::wire::Failure;

/// Longest record: a step names at most one path.
const MAX_RECORD_BYTES: usize = 4096 + 256;

/// News from a child.
#[derive(Debug)]
pub(crate) enum Report {
    /// This process, a child of the shim too, has taken the child's place.
    Born(i32, OwnedFd),
    /// All is built; a terminal's controlling side comes along.
    Ready(Option<OwnedFd>),
    /// A step did not work.
    Failed(Failure),
    /// The child's end is closed: by execve, or by its death.
    Closed,
}

/// Makes a channel: the shim's end (non-blocking) and the child's.
pub(crate) fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, childs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    fd::set_nonblocking(&ours, true)?;
    Ok((ours, childs))
}

/// Tells that all is built.
pub(crate) fn ready(channel: impl AsFd, terminal: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<_> = terminal.into_iter().collect();
    fd::send_with_fds(channel, b"R", &fds).map(drop)
}

/// Tells who goes on in this process's place.
pub(crate) fn born(channel: impl AsFd, pid: i32, process: BorrowedFd<'_>) -> io::Result<()> {
    let mut record = vec![b'B'];
    record.extend_from_slice(&pid.to_ne_bytes());
    fd::send_with_fds(channel, &record, &[process]).map(drop)
}

/// Tells which step did not work. That nobody listens any more changes nothing for a child that
/// is about to end.
pub(crate) fn failed(channel: impl AsFd, failure: &Failure) {
    let mut record = vec![b'F'];
    record.extend_from_slice(&failure.errno.to_ne_bytes());
    let room = MAX_RECORD_BYTES - record.len();
    record.extend_from_slice(&failure.step.as_bytes()[..failure.step.len().min(room)]);
    let _ = fd::send_with_fds(channel, &record, &[]);
}

/// Reads the next report; `None` if there is none yet.
pub(crate) fn read(channel: impl AsFd) -> Option<Report> {
    let mut record = [0; MAX_RECORD_BYTES];
    match fd::recv_with_fds(channel, &mut record, 1) {
        Ok((0, _)) => Some(Report::Closed),
        Ok((length, mut fds)) => Some(parse(&record[..length], fds.pop())),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => None,
        Err(_) => Some(Report::Closed),
    }
}

fn parse(record: &[u8], fd: Option<OwnedFd>) -> Report {
    match (record, fd) {
        ([b'B', a, b, c, d], Some(process)) => {
            Report::Born(i32::from_ne_bytes([*a, *b, *c, *d]), process)
        }
        ([b'F', a, b, c, d, step @ ..], _) => Report::Failed(Failure {
            step: String::from_utf8_lossy(step).into_owned(),
            errno: i32::from_ne_bytes([*a, *b, *c, *d]),
        }),
        (_, fd) => Report::Ready(fd),
    }
}

/// Gives the word to start.
pub(crate) fn start(channel: impl AsFd) -> io::Result<()> {
    fd::send_with_fds(channel, b"S", &[]).map(drop)
}

/// Waits for the word to start; `false` when the shim is gone.
pub(crate) fn wait_for_start(channel: impl AsFd) -> bool {
    let mut word = [0; 1];
    loop {
        match fd::recv_with_fds(&channel, &mut word, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return matches!(result, Ok((1, _))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_arrives_with_step_and_number() {
        let (ours, childs) = channel().expect("channel");
        assert!(read(&ours).is_none());
        let sent = Failure {
            step: "mount /proc".into(),
            errno: libc::EPERM,
        };
        failed(&childs, &sent);
        assert!(matches!(read(&ours), Some(Report::Failed(got)) if got == sent));
        drop(childs);
        assert!(matches!(read(&ours), Some(Report::Closed)));
    }

    #[test]
    fn a_successor_arrives_with_its_descriptor() {
        let (ours, childs) = channel().expect("channel");
        let process = longshore_sys::pidfd::open(std::process::id().cast_signed()).expect("pidfd");
        born(&childs, 7, process.as_fd()).expect("send");
        assert!(matches!(read(&ours), Some(Report::Born(7, _))));
    }

    #[test]
    fn an_endless_step_is_cut() {
        let (ours, childs) = channel().expect("channel");
        failed(
            &childs,
            &Failure {
                step: "x".repeat(100_000),
                errno: 1,
            },
        );
        assert!(matches!(read(&ours), Some(Report::Failed(got)) if got.step.len() > 4096));
    }
}
