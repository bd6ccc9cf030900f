//! Raw kernel interfaces: every unsafe block of the agent, without domain words.
//!
//! Everything here is synchronous, and what changes the calling thread (namespaces, capabilities,
//! credentials) says so. Descriptors come back owned and close-on-exec. Errors are plain
//! [`std::io::Error`]s carrying the error number; who knows the path or the step adds it.

pub mod bpf;
pub mod caps;
pub mod clone;
pub mod fd;
pub mod mount;
pub mod ns;
pub mod path;
pub mod pidfd;
pub mod proc;
pub mod seccomp;
pub mod user;

use std::io;

/// Turns the result of a system call into an [`io::Result`].
pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
