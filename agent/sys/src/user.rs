//! User namespaces: made and mapped, and what their kernel support depends on.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};

use crate::{check, mount, pidfd};

/// A range of ids inside a user namespace and the equally long one outside that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMapping {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many ids.
    pub length: u32,
}

/// What `id` inside is outside; `None` if it is not mapped.
pub fn outside(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|one| {
        let offset = id.checked_sub(one.inside)?;
        (offset < one.length).then_some(one.outside.checked_add(offset)?)
    })
}

/// A process that holds a new user namespace, and others that belong to it. It sleeps, and ends
/// when this is dropped or the thread that made it ends: what must outlive it is bound or opened.
#[derive(Debug)]
pub struct Holder {
    pid: i32,
    process: OwnedFd,
}

impl Holder {
    /// Makes a user namespace with these mappings, and `others` (`CLONE_NEW*`) that it owns.
    ///
    /// # Errors
    /// `ENOSPC` when `user.max_user_namespaces` is reached; what clone3(2) or the write of a
    /// mapping answer.
    pub fn start(uids: &[IdMapping], gids: &[IdMapping], others: libc::c_int) -> io::Result<Self> {
        let holder = Self::fork(libc::CLONE_NEWUSER | others)?;
        for (file, mappings) in [("uid_map", uids), ("gid_map", gids)] {
            let mut text = String::new();
            for one in mappings {
                // Writing to a String does not fail.
                let _ = writeln!(text, "{} {} {}", one.inside, one.outside, one.length);
            }
            // The kernel takes a mapping in one write, once.
            fs::write(format!("/proc/{}/{file}", holder.pid), text)?;
        }
        Ok(holder)
    }

    /// Path of one of its namespaces, `user`, `net`; good while it lives.
    pub fn path(&self, kind: &str) -> String {
        format!("/proc/{}/ns/{kind}", self.pid)
    }

    /// Opens one of its namespaces.
    ///
    /// # Errors
    /// What open(2) answers.
    pub fn open(&self, kind: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(self.path(kind), flags, Mode::empty())?)
    }

    fn fork(namespaces: libc::c_int) -> io::Result<Self> {
        let mut raw_pidfd: libc::c_int = -1;
        // SAFETY: all-zero is a valid `clone_args`.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = u64::from((namespaces | libc::CLONE_PIDFD).cast_unsigned());
        args.pidfd = (&raw mut raw_pidfd) as u64;
        args.exit_signal = u64::try_from(libc::SIGCHLD).expect("a positive number");
        // The child starts with every signal blocked, so that no handler of ours runs in it.
        // SAFETY: both sets are initialised before they are read and outlive the calls.
        let before = unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
            before
        };
        let parent = std::process::id().cast_signed();
        // SAFETY: `args` is initialised and of the size given; without CLONE_VM the child has its
        // own copy of memory and stack, where it calls nothing but the kernel.
        let pid = check(unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut args,
                size_of::<libc::clone_args>(),
            )
        });
        if matches!(pid, Ok(0)) {
            sleep_while_parent_lives(parent);
        }
        // SAFETY: `before` was filled in above.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut())
        };
        Ok(Self {
            pid: i32::try_from(pid?).expect("pids fit"),
            // SAFETY: CLONE_PIDFD has made this descriptor for us.
            process: unsafe { OwnedFd::from_raw_fd(raw_pidfd) },
        })
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It cannot be gone: nobody else waits for it.
        let _ = pidfd::send_signal(&self.process, libc::SIGKILL);
        let _ = pidfd::wait(&self.process, true);
    }
}

/// Runs in the copy of a process that may have many threads: system calls only.
fn sleep_while_parent_lives(parent: i32) -> ! {
    // SAFETY: all take numbers only and touch no state of the C library; nothing in this process uses
    // a descriptor any more.
    unsafe {
        // Locks and sockets are the parent's alone.
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // It may have died before that.
        while libc::getppid() == parent {
            libc::pause();
        }
        libc::_exit(0)
    }
}

/// Whether mounts of what `path` shows, with those below it if `recursive`, can be id-mapped.
///
/// # Errors
/// `EINVAL` when a file system lacks it, `EPERM` when a mount is id-mapped already, `ENOSYS` before
/// Linux 5.12; what open_tree(2) answers.
pub fn can_map_ids(
    path: &Path,
    recursive: bool,
    user_ns: impl std::os::fd::AsFd,
) -> io::Result<()> {
    let tree = mount::clone_tree(CWD, path, recursive)?;
    mount::map_ids(&tree, recursive, user_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPPING: IdMapping = IdMapping {
        inside: 0,
        outside: 100_000,
        length: 1000,
    };

    #[test]
    fn ids_are_found_by_range() {
        let two = [
            MAPPING,
            IdMapping {
                inside: 5000,
                outside: u32::MAX - 1,
                length: 5,
            },
        ];
        for (id, expected) in [
            (0, Some(100_000)),
            (999, Some(100_999)),
            (1000, None),
            (5001, Some(u32::MAX)),
            (5002, None),
        ] {
            assert_eq!(outside(&two, id), expected, "{id}");
        }
    }

    #[test]
    fn a_holder_has_what_was_asked_for_and_ends_with_its_owner() {
        let holder = Holder::start(&[MAPPING], &[MAPPING], libc::CLONE_NEWUTS).expect("start");
        let read =
            |file: &str| fs::read_to_string(format!("/proc/{}/{file}", holder.pid)).expect("read");
        for file in ["uid_map", "gid_map"] {
            let found: Vec<String> = read(file).split_whitespace().map(str::to_owned).collect();
            assert_eq!(found, ["0", "100000", "1000"], "{file}");
        }
        let ours = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).expect("link");
        for (kind, is_own) in [("user", true), ("uts", true), ("net", false)] {
            let theirs = fs::read_link(holder.path(kind)).expect("link");
            assert_eq!(theirs != ours(kind), is_own, "{kind}");
        }
        let pid = holder.pid;
        let has_descriptors = || {
            let mut open = fs::read_dir(format!("/proc/{pid}/fd")).expect("lives");
            open.next().is_some()
        };
        for _ in 0..1000 {
            if has_descriptors() {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        assert!(!has_descriptors(), "locks of this process would outlive it");
        drop(holder);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_mapping_that_the_kernel_refuses_leaves_no_process() {
        let twice = [MAPPING, MAPPING];
        let error = Holder::start(&twice, &twice, 0).expect_err("overlaps");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn proc_cannot_be_id_mapped() {
        let holder = Holder::start(&[MAPPING], &[MAPPING], 0).expect("start");
        let user_ns = holder.open("user").expect("open");
        let error = can_map_ids(Path::new("/proc"), false, &user_ns).expect_err("no support");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
