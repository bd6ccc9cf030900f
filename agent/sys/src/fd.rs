//! Descriptors: memory files, pipes, sockets, and descriptors sent over sockets.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::FdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::pipe::PipeFlags;

use crate::check;

/// Most descriptors that one message carries (the kernel's `SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// Makes an executable memory file with `content` that nobody can change any more, not even
/// through `/proc/PID/exe` of a process that runs it.
///
/// # Errors
/// What memfd_create(2), write(2) or the seals answer.
pub fn sealed_memfd(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut rest = content;
    while !rest.is_empty() {
        let written = rustix::io::write(&fd, rest)?;
        rest = &rest[written..];
    }
    seal(&fd)?;
    Ok(fd)
}

/// Seals a memory file for good.
///
/// While the kernel still holds pages of it elsewhere, as it does for a moment after they were
/// written on a busy machine, it answers `EBUSY`: that passes.
fn seal(fd: &OwnedFd) -> io::Result<()> {
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    for _ in 0..100 {
        match rustix::fs::fcntl_add_seals(fd, seals) {
            Err(rustix::io::Errno::BUSY) => std::thread::sleep(Duration::from_millis(20)),
            sealed => return Ok(sealed?),
        }
    }
    Ok(rustix::fs::fcntl_add_seals(fd, seals)?)
}

/// Makes a pipe: read end, write end, both close-on-exec.
///
/// # Errors
/// What pipe2(2) answers.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?)
}

/// Makes a pair of connected stream sockets, both close-on-exec.
///
/// # Errors
/// What socketpair(2) answers.
pub fn socketpair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sets or clears `O_NONBLOCK`, which belongs to the open file and so to all who share it.
///
/// # Errors
/// What fcntl(2) answers.
pub fn set_nonblocking(fd: impl AsFd, on: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(&fd)?;
    flags.set(rustix::fs::OFlags::NONBLOCK, on);
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

/// Sets or clears close-on-exec.
///
/// # Errors
/// What fcntl(2) answers.
pub fn set_cloexec(fd: impl AsFd, on: bool) -> io::Result<()> {
    let flags = if on {
        FdFlags::CLOEXEC
    } else {
        FdFlags::empty()
    };
    Ok(rustix::io::fcntl_setfd(fd, flags)?)
}

/// Marks every descriptor from `first` upwards close-on-exec.
///
/// # Errors
/// What close_range(2) answers; `CLOSE_RANGE_CLOEXEC` exists since Linux 5.11.
pub fn cloexec_from(first: u32) -> io::Result<()> {
    // SAFETY: close_range takes three numbers; setting close-on-exec closes nothing here.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })?;
    Ok(())
}

/// Closes every descriptor from `first` to `last`, whoever owns it.
///
/// # Safety
/// No object that owns a descriptor in this range may be used or dropped afterwards: this is for a
/// process that is about to leave its inherited state behind.
///
/// # Errors
/// What close_range(2) answers.
pub unsafe fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the caller promises that nothing uses these descriptors any more.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    Ok(())
}

/// Takes over a descriptor that was handed to this process by number, e.g. 0 at its start.
///
/// # Safety
/// `raw` is open and nothing else in the process owns it.
pub unsafe fn adopt(raw: RawFd) -> OwnedFd {
    // SAFETY: passed on to the caller.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// Borrows a descriptor known by number for as long as the process keeps it open.
///
/// # Safety
/// `raw` stays open for the life of the borrow.
pub unsafe fn borrow<'a>(raw: RawFd) -> BorrowedFd<'a> {
    // SAFETY: passed on to the caller.
    unsafe { BorrowedFd::borrow_raw(raw) }
}

/// Who is at the other end of a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process at the time of connecting; 0 if it is not visible from here.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Reads the credentials of the peer of a unix socket, taken when it connected.
///
/// # Errors
/// What `SO_PEERCRED` answers.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<PeerCredentials> {
    let mut cred = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("small");
    // SAFETY: `cred` and `length` outlive the call, and `length` is the size of `cred`.
    check(libc::c_long::from(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut length,
        )
    }))?;
    Ok(PeerCredentials {
        pid: cred.pid,
        uid: cred.uid,
        gid: cred.gid,
    })
}

/// Sends `bytes` with `fds` beside the first of them; returns how many bytes were taken.
///
/// The descriptors went with the first byte: after a short send the rest is sent without them.
///
/// # Errors
/// What sendmsg(2) answers; `InvalidInput` for more than [`MAX_FDS`].
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space =
        vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1)) * fds.len().max(1)];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(rustix::net::sendmsg(
        socket,
        &[io::IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

/// Receives into `buffer`; returns the number of bytes (0 at the end) and the descriptors that
/// came beside them, close-on-exec.
///
/// # Errors
/// What recvmsg(2) answers; `InvalidData` when more than `max_fds` came (those that fit are closed).
pub fn recv_with_fds(
    socket: impl AsFd,
    buffer: &mut [u8],
    max_fds: usize,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space =
        vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1)) * max_fds.clamp(1, MAX_FDS)];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        socket,
        &mut [io::IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.contains(rustix::net::ReturnFlags::CTRUNC) || fds.len() > max_fds {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_travel_beside_bytes() {
        let (left, right) = socketpair().expect("socketpair");
        let (read, write) = pipe().expect("pipe");
        let sent = send_with_fds(&left, b"hello", &[write.as_fd(), read.as_fd()]).expect("send");
        assert_eq!(sent, 5);
        let mut buffer = [0; 16];
        let (count, fds) = recv_with_fds(&right, &mut buffer, 4).expect("receive");
        assert_eq!(&buffer[..count], b"hello");
        assert_eq!(fds.len(), 2);
        rustix::io::write(&fds[0], b"x").expect("write through the copy");
        let mut one = [0; 1];
        assert_eq!(rustix::io::read(&read, &mut one).expect("read"), 1);
    }

    #[test]
    fn more_descriptors_than_allowed_are_refused_and_closed() {
        let (left, right) = socketpair().expect("socketpair");
        let (read, write) = pipe().expect("pipe");
        let many: Vec<_> = (0..9).map(|_| write.as_fd()).collect();
        send_with_fds(&left, b"x", &many).expect("send");
        drop(write);
        let mut buffer = [0; 1];
        let error = recv_with_fds(&right, &mut buffer, 2).expect_err("too many");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(left);
        assert_eq!(
            rustix::io::read(&read, &mut buffer).expect("read"),
            0,
            "a copy is still open"
        );
    }

    #[test]
    fn sealed_memfd_cannot_be_written() {
        let fd = sealed_memfd("test", b"content").expect("memfd");
        assert!(rustix::io::pwrite(&fd, b"x", 0).is_err());
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::pread(&fd, &mut buffer, 0).expect("read"), 7);
    }

    #[test]
    fn peer_of_a_socketpair_is_this_process() {
        let (left, _right) = socketpair().expect("socketpair");
        let peer = peer_credentials(&left).expect("credentials");
        assert_eq!(peer.pid.unsigned_abs(), std::process::id());
    }
}
