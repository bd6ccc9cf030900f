//! Settings of a process: one path for first processes and execs, so that they cannot differ.
//!
//! Order matters. Limits, session, stdio and working directory need rights that go away; the
//! bounding set needs `CAP_SETPCAP`; a change of user clears the effective set, hence keep-caps;
//! seccomp needs `CAP_SYS_ADMIN` or no_new_privs, so without the latter it is loaded while the
//! capabilities are still there, and with it as the very last thing.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use longshore_sys::caps::{self, Sets};
use longshore_sys::{fd, path, proc, seccomp};
use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::terminal::Terminal;
use super::{ChildStdio, Step, at, program};
use crate::wire::{Capabilities, ProcessPlan};

/// `RLIMIT_*` numbers as configuration files spell them, for the names of failed steps.
const LIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// Session, stdio, limits and working directory, inside the root. A terminal that is a `console` is
/// left for those who log in there to take: it could not be taken from an init.
pub(super) fn prepare(
    process: &ProcessPlan,
    stdio: &ChildStdio,
    terminal: Option<&Terminal>,
    console: bool,
    host_null: &OwnedFd,
) -> Step<()> {
    at(proc::new_session(), || "setsid".into())?;
    match terminal {
        Some(terminal) => take_terminal(&terminal.program, !console)?,
        None => take_stdio(process, stdio, host_null)?,
    }
    for limit in &process.rlimits {
        set_limit(limit.resource, limit.soft, limit.hard)?;
    }
    change_dir(process)
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> Step<()> {
    at(proc::set_rlimit(resource, soft, hard), || {
        let name = usize::try_from(resource).ok().and_then(|at| LIMITS.get(at));
        format!("setrlimit {}", name.unwrap_or(&"?"))
    })
}

/// Raises hard limits that are below the wish, and only those: what lowers them, or changes what
/// is in force, needs no rights and comes with [`prepare`].
pub(super) fn raise_limits(process: &ProcessPlan) -> Step<()> {
    for limit in &process.rlimits {
        let (soft, hard) = at(proc::rlimit(limit.resource), || "getrlimit".into())?;
        if limit.hard > hard {
            set_limit(limit.resource, soft, limit.hard)?;
        }
    }
    Ok(())
}

fn take_terminal(program: &OwnedFd, controlling: bool) -> Step<()> {
    if controlling {
        at(proc::set_controlling_terminal(program), || {
            "set the controlling terminal".into()
        })?;
    }
    at(replace_stdio([program, program, program]), || "dup2".into())
}

fn take_stdio(process: &ProcessPlan, stdio: &ChildStdio, host_null: &OwnedFd) -> Step<()> {
    let null = own_null();
    let null = null.as_ref().unwrap_or(host_null);
    stdio.give_to(Uid::from_raw(process.uid), Gid::from_raw(process.gid));
    let given = [&stdio.stdin, &stdio.stdout, &stdio.stderr];
    at(
        replace_stdio(given.map(|fd| fd.as_ref().unwrap_or(null))),
        || "dup2".into(),
    )
}

/// The container's own null device rather than a handle on the host's `/dev`.
fn own_null() -> Option<OwnedFd> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let probe = path::open_in_root(&root, "/dev/null", OFlags::PATH, 0).ok()?;
    let found = rustix::fs::fstat(&probe).ok()?;
    let is_null = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && found.st_rdev == rustix::fs::makedev(1, 3);
    is_null
        .then(|| path::open_in_root(&root, "/dev/null", OFlags::RDWR, 0).ok())
        .flatten()
}

pub(super) fn replace_stdio(fds: [&OwnedFd; 3]) -> io::Result<()> {
    rustix::stdio::dup2_stdin(fds[0])?;
    rustix::stdio::dup2_stdout(fds[1])?;
    rustix::stdio::dup2_stderr(fds[2])?;
    Ok(())
}

/// No magic links on the way, and afterwards the kernel must know a path for where we are: a
/// directory of the host that leaked in has none (CVE-2024-21626).
fn change_dir(process: &ProcessPlan) -> Step<()> {
    let cwd = if process.cwd.is_empty() {
        "/"
    } else {
        &process.cwd
    };
    let change = || -> io::Result<()> {
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let dir = path::open_in_root(&root, cwd, OFlags::PATH | OFlags::DIRECTORY, 0)?;
        rustix::process::fchdir(&dir)?;
        let verified = rustix::process::getcwd(Vec::new())?;
        if verified.as_bytes().first() == Some(&b'/') {
            Ok(())
        } else {
            Err(Errno::NOENT.into())
        }
    };
    at(change(), || format!("chdir {cwd}"))
}

/// Identity, capabilities, seccomp, execve.
pub(super) fn become_program(
    process: &ProcessPlan,
    proc_self: &OwnedFd,
) -> Step<std::convert::Infallible> {
    let program = program::prepare(process)?;
    write_labels(process, proc_self)?;
    at(fd::cloexec_from(3), || "close_range".into())?;
    let held = at(caps::get(), || "capget".into())?;
    let wanted = confine(process.capabilities, held.permitted);
    at(caps::bound(wanted.bounding), || {
        "drop bounding capabilities".into()
    })?;
    change_user(process)?;
    // The change of user has cleared the effective set; seccomp and capset need it once more.
    let all = Sets {
        effective: held.permitted,
        ..held
    };
    at(caps::set(all), || "capset".into())?;
    if !process.no_new_privs {
        load_seccomp(process)?;
    }
    set_capabilities(wanted)?;
    if process.no_new_privs {
        at(proc::set_no_new_privs(), || "no_new_privs".into())?;
        load_seccomp(process)?;
    }
    Err(program.execute())
}

fn write_labels(process: &ProcessPlan, proc_self: &OwnedFd) -> Step<()> {
    let write = |file: &str, text: &str| -> io::Result<()> {
        let fd = rustix::fs::openat(
            proc_self,
            file,
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        rustix::io::write(&fd, text.as_bytes())?;
        Ok(())
    };
    if !process.apparmor_profile.is_empty() {
        let text = format!("exec {}", process.apparmor_profile);
        // Beside other security modules AppArmor has a directory of its own.
        let written = match write("attr/apparmor/exec", &text) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => write("attr/exec", &text),
            result => result,
        };
        at(written, || {
            format!("apparmor profile {}", process.apparmor_profile)
        })?;
    }
    if !process.selinux_label.is_empty() {
        at(write("attr/exec", &process.selinux_label), || {
            format!("selinux label {}", process.selinux_label)
        })?;
    }
    Ok(())
}

fn change_user(process: &ProcessPlan) -> Step<()> {
    at(proc::set_keep_caps(true), || "keep capabilities".into())?;
    let groups: Vec<Gid> = process
        .additional_gids
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    at(rustix::thread::set_thread_groups(&groups), || {
        "setgroups".into()
    })?;
    let gid = Gid::from_raw(process.gid);
    at(rustix::thread::set_thread_res_gid(gid, gid, gid), || {
        format!("setgid {}", process.gid)
    })?;
    let uid = Uid::from_raw(process.uid);
    at(rustix::thread::set_thread_res_uid(uid, uid, uid), || {
        format!("setuid {}", process.uid)
    })?;
    rustix::process::umask(Mode::from_bits_truncate(process.umask.unwrap_or(0o022)));
    Ok(())
}

/// What of the wish we hold ourselves: nobody can give more. Ambient capabilities must be
/// permitted and inheritable too.
fn confine(wish: Capabilities, held: u64) -> Capabilities {
    let permitted = wish.permitted & held;
    let inheritable = wish.inheritable & held;
    Capabilities {
        bounding: wish.bounding,
        permitted,
        effective: wish.effective & permitted,
        inheritable,
        ambient: wish.ambient & permitted & inheritable,
    }
}

fn set_capabilities(wanted: Capabilities) -> Step<()> {
    let sets = Sets {
        effective: wanted.effective,
        permitted: wanted.permitted,
        inheritable: wanted.inheritable,
    };
    at(caps::set(sets), || "capset".into())?;
    at(caps::set_ambient(wanted.ambient), || {
        "set ambient capabilities".into()
    })?;
    at(proc::set_keep_caps(false), || "keep capabilities".into())
}

fn load_seccomp(process: &ProcessPlan) -> Step<()> {
    if process.seccomp.is_empty() {
        return Ok(());
    }
    at(
        seccomp::load(&process.seccomp, process.seccomp_flags),
        || "seccomp".into(),
    )
}

/// Whether a path of the container is a directory, for the search along PATH.
pub(super) fn is_dir(path: &std::ffi::CStr) -> bool {
    rustix::fs::statat(CWD.as_fd(), path, rustix::fs::AtFlags::empty())
        .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_confined_to_what_is_held_and_consistent() {
        let wish = Capabilities {
            bounding: 0b1111,
            permitted: 0b1111,
            effective: 0b1011,
            inheritable: 0b0111,
            ambient: 0b1111,
        };
        let got = confine(wish, 0b1101);
        assert_eq!(
            got,
            Capabilities {
                bounding: 0b1111,
                permitted: 0b1101,
                effective: 0b1001,
                inheritable: 0b0101,
                ambient: 0b0101,
            }
        );
    }
}
