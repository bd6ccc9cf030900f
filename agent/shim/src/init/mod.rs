//! After clone, before execve: what turns a copy of the shim into a process of a container.
//!
//! The shim has one thread and clones without sharing memory, so allocating here is safe: no
//! other thread can hold the allocator's lock. What must never happen is a return into the
//! shim's event loop: every path ends in execve or [`exit_now`], and a guard does so for panics.
//! Nothing relies on destructors; descriptors that the shim has open are closed by number first.
//!
//! ```text
//!   first process                           exec
//!     cgroups, oom score                      cgroups, oom score
//!     join and make namespaces, host name     join all namespaces of the first process
//!     root, mounts, devices, masks
//!     pivot_root
//!     terminal                                terminal
//!     session, stdio, limits, cwd             session, stdio, limits, cwd
//!     Ready, wait for the word
//!     identity, seccomp, capabilities         identity, seccomp, capabilities
//!     execve                                  execve
//! ```
//! The last lines are one function for both ([`settings`]): an exec gets what the first got. With
//! a user namespace some of it has to come before that is joined: see [`user`].

mod devices;
mod files;
mod masks;
mod mounts;
mod namespaces;
mod program;
pub(crate) mod reaper;
mod root;
pub(crate) mod runtime;
mod settings;
pub(crate) mod terminal;
mod user;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use longshore_sys::clone::exit_now;
use longshore_sys::path::Missing;
use longshore_sys::{fd, path, proc};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};

use crate::container::{clone_flags, open_cgroup};
use crate::report;
use crate::wire::{CgroupPlan, ContainerPlan, Failure, ProcessPlan, UserNamespace};

/// What a step gives.
type Step<T> = Result<T, Failure>;

/// Names the step that an error belongs to.
fn at<T, E: Into<io::Error>>(result: Result<T, E>, step: impl FnOnce() -> String) -> Step<T> {
    result.map_err(|error| failure(&error.into(), step()))
}

fn failure(error: &io::Error, step: String) -> Failure {
    Failure {
        step,
        errno: error.raw_os_error().unwrap_or(libc::EINVAL),
    }
}

/// Ends the process if the stack is unwound: a panic in a child must not reach the shim's loop.
struct NeverReturn;

impl Drop for NeverReturn {
    fn drop(&mut self) {
        exit_now(125);
    }
}

/// Exit code of a child that failed before execve; nobody sees it but a trace.
const FAILED: i32 = 126;

/// Stdio that the shim made, or was given, for a child without a terminal.
#[derive(Debug, Default)]
pub(crate) struct ChildStdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

impl ChildStdio {
    fn raw(&self) -> impl Iterator<Item = RawFd> {
        [&self.stdin, &self.stdout, &self.stderr]
            .into_iter()
            .flatten()
            .map(AsRawFd::as_raw_fd)
    }

    /// So that a program of another user can open /dev/stdout again. Only what we were given for
    /// this process: never the null device.
    fn give_to(&self, uid: Uid, gid: Gid) {
        for fd in [&self.stdin, &self.stdout, &self.stderr]
            .into_iter()
            .flatten()
        {
            let _ = rustix::fs::fchown(fd, Some(uid), Some(gid));
        }
    }
}

/// Builds a container around this process and runs its program; called in the child.
pub(crate) fn run_first(
    plan: &ContainerPlan,
    default_oom_score_adj: i32,
    channel: &OwnedFd,
    stdio: &ChildStdio,
) -> ! {
    let _guard = NeverReturn;
    let result = close_foreign_fds(stdio.raw().chain([channel.as_raw_fd()]))
        .and_then(|()| first(plan, default_oom_score_adj, channel, stdio));
    end(channel, result)
}

/// The container that an exec joins.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    /// Its first process.
    pub(crate) process: BorrowedFd<'a>,
    /// Its pod's user namespace.
    pub(crate) user_namespace: Option<&'a UserNamespace>,
}

/// Joins a running container and runs a program; called in the child.
pub(crate) fn run_exec(
    process: &ProcessPlan,
    cgroup: &CgroupPlan,
    target: Target<'_>,
    default_oom_score_adj: i32,
    channel: &OwnedFd,
    stdio: &ChildStdio,
) -> ! {
    let _guard = NeverReturn;
    let keep = stdio
        .raw()
        .chain([channel.as_raw_fd(), target.process.as_raw_fd()]);
    let result = close_foreign_fds(keep).and_then(|()| {
        exec(
            process,
            cgroup,
            target,
            default_oom_score_adj,
            channel,
            stdio,
        )
    });
    end(channel, result)
}

fn end(channel: &OwnedFd, result: Step<std::convert::Infallible>) -> ! {
    let Err(failure) = result;
    report::failed(channel, &failure);
    exit_now(FAILED)
}

fn first(
    plan: &ContainerPlan,
    default_oom_score_adj: i32,
    channel: &OwnedFd,
    stdio: &ChildStdio,
) -> Step<std::convert::Infallible> {
    let (host, sources) = match &plan.user_namespace {
        None => {
            let host = enter(&plan.process, &plan.cgroup, default_oom_score_adj)?;
            namespaces::join_and_make(plan)?;
            (host, root::open_sources(plan, None)?)
        }
        Some(user) => enter_user(user, plan, default_oom_score_adj, channel, stdio)?,
    };
    let root = root::build(plan, sources)?;
    let terminal = plan
        .process
        .terminal
        .then(|| terminal::open(&root, &plan.process))
        .transpose()?;
    if let Some(terminal) = &terminal {
        terminal::bind_console(&root, terminal)?;
    }
    root::enter(plan, root)?;
    let console = plan.console_bytes > 0;
    settings::prepare(&plan.process, stdio, terminal.as_ref(), console, &host.null)?;
    let controlling = terminal
        .as_ref()
        .map(|terminal| terminal.controlling.as_fd());
    at(report::ready(channel, controlling), || "report".into())?;
    drop(terminal);
    if !report::wait_for_start(channel) {
        exit_now(FAILED);
    }
    settings::become_program(&plan.process, &host.proc_self)
}

/// The first steps of a first process in a user namespace.
fn enter_user(
    user: &UserNamespace,
    plan: &ContainerPlan,
    default_oom_score_adj: i32,
    channel: &OwnedFd,
    stdio: &ChildStdio,
) -> Step<(Host, root::Sources)> {
    let flags = clone_flags(plan)?;
    reset(&plan.process, default_oom_score_adj)?;
    user::prepare(user, &plan.process, stdio)?;
    namespaces::join_paths(&plan.namespaces)?;
    let namespace = user::open(user)?;
    let namespace = namespace.as_fd();
    let mut sources = root::open_sources(plan, Some(namespace))?;
    user::unshare_mounts()?;
    user::map_layers(&plan.rootfs, namespace)?;
    sources.mount_layers(plan)?;
    let cgroup = open_cgroup(&plan.cgroup)?;
    user::cross(namespace)?;
    user::be_born(flags, cgroup.as_ref().map(AsFd::as_fd), channel)?;
    // The cgroups are the host's root's, who this process still is.
    join_cgroups(&plan.cgroup)?;
    namespaces::make(plan)?;
    Ok((Host::open()?, sources))
}

fn exec(
    process: &ProcessPlan,
    cgroup: &CgroupPlan,
    target: Target<'_>,
    default_oom_score_adj: i32,
    channel: &OwnedFd,
    stdio: &ChildStdio,
) -> Step<std::convert::Infallible> {
    let host = enter(process, cgroup, default_oom_score_adj)?;
    if let Some(user) = target.user_namespace {
        user::prepare(user, process, stdio)?;
    }
    namespaces::join_all(target.process, target.user_namespace.is_some())?;
    if target.user_namespace.is_some() {
        user::become_root()?;
    }
    let terminal = if process.terminal {
        let root = at(open_dir("/"), || "open /".into())?;
        Some(terminal::open(&root, process)?)
    } else {
        None
    };
    settings::prepare(process, stdio, terminal.as_ref(), false, &host.null)?;
    if let Some(terminal) = &terminal {
        at(
            report::ready(channel, Some(terminal.controlling.as_fd())),
            || "report".into(),
        )?;
    }
    drop(terminal);
    settings::become_program(process, &host.proc_self)
}

/// What is opened while the host's mounts are still in sight, and so can be trusted.
struct Host {
    /// This process's directory in the host's proc: what a container mounts on its own `/proc`
    /// is not written to by us.
    proc_self: OwnedFd,
    /// `/dev/null`.
    null: OwnedFd,
}

impl Host {
    fn open() -> Step<Self> {
        Ok(Self {
            proc_self: at(open_dir("/proc/self"), || "open /proc/self".into())?,
            null: at(
                rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()),
                || "open /dev/null".into(),
            )?,
        })
    }
}

/// First steps of every child, while it still sees the host.
fn enter(process: &ProcessPlan, cgroup: &CgroupPlan, default_oom_score_adj: i32) -> Step<Host> {
    reset(process, default_oom_score_adj)?;
    join_cgroups(cgroup)?;
    Host::open()
}

/// Lets go of what the shim has set for itself.
fn reset(process: &ProcessPlan, default_oom_score_adj: i32) -> Step<()> {
    proc::reset_signals();
    // Modes of what is made from here on are meant exactly.
    rustix::process::umask(Mode::empty());
    let score = process.oom_score_adj.unwrap_or(default_oom_score_adj);
    at(proc::set_oom_score_adj(score), || {
        format!("oom_score_adj {score}")
    })
}

/// A process that moves itself is moved at once; a parent that writes a pid waits for a grace
/// period of the kernel.
fn join_cgroups(cgroup: &CgroupPlan) -> Step<()> {
    let leaf =
        (!cgroup.v1_freezer_leaf.is_empty()).then(|| format!("{}/tasks", cgroup.v1_freezer_leaf));
    for tasks in cgroup.v1_tasks.iter().chain(&leaf) {
        let written = rustix::fs::open(
            tasks.as_str(),
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|file| rustix::io::write(&file, b"0"));
        at(written, || format!("join {tasks}"))?;
    }
    Ok(())
}

fn open_dir(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Closes all that the shim has open but `keep`: its sockets, logs, and other containers' pipes.
fn close_foreign_fds(keep: impl Iterator<Item = RawFd>) -> Step<()> {
    let mut keep: Vec<u32> = keep.filter_map(|raw| u32::try_from(raw).ok()).collect();
    keep.sort_unstable();
    let mut first = 3;
    for kept in keep {
        if kept > first {
            // SAFETY: the owners of these descriptors belong to the shim's loop, to which this
            // process never returns.
            at(unsafe { fd::close_range(first, kept - 1) }, || {
                "close_range".into()
            })?;
        }
        first = first.max(kept + 1);
    }
    // SAFETY: as above.
    at(unsafe { fd::close_range(first, u32::MAX) }, || {
        "close_range".into()
    })
}

/// Walks to `path` in the root, making what is missing.
fn resolve(root: &OwnedFd, target: &str, missing: Missing) -> io::Result<OwnedFd> {
    path::resolve_in_root(root, target, missing)
}
