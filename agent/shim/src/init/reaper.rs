//! First process of a pod's shared pid namespace: takes in orphans, and has nothing to take.
//!
//! Containers reach `/proc/1/root` and whatever else their rights allow, so it lives in an empty
//! read-only root, without capabilities, descriptors or dumpability.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use longshore_sys::caps::{self, Sets};
use longshore_sys::mount::{self, PropagationFlags};
use longshore_sys::{fd, proc};
use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;

use super::{FAILED, NeverReturn, Step, at, close_foreign_fds, masks, namespaces, user};
use crate::report;
use crate::wire::ContainerPlan;
use longshore_sys::clone::exit_now;

/// Namespaces of its own.
pub(crate) const OWN: libc::c_int = libc::CLONE_NEWPID | libc::CLONE_NEWNS;

/// Becomes that process; called in the child. With a user namespace another does so, else the child
/// has its own namespaces already.
pub(crate) fn run(dir: &Path, plan: &ContainerPlan, channel: &OwnedFd) -> ! {
    let _guard = NeverReturn;
    let Err(failure) = settle(dir, plan, channel);
    report::failed(channel, &failure);
    exit_now(FAILED)
}

fn settle(dir: &Path, plan: &ContainerPlan, channel: &OwnedFd) -> Step<Infallible> {
    close_foreign_fds([channel.as_raw_fd()].into_iter())?;
    // So that it holds the pod's namespaces and no others.
    namespaces::join_paths(&plan.namespaces)?;
    if let Some(user) = &plan.user_namespace {
        user::cross(user::open(user)?.as_fd())?;
        user::be_born(OWN, None, channel)?;
    }
    proc::reset_signals();
    // The kernel reaps what it inherits.
    proc::ignore_children();
    at(proc::set_name(c"pod-init"), || "set name".into())?;
    at(proc::new_session(), || "setsid".into())?;
    enter_empty_root(dir)?;
    if plan.user_namespace.is_some() {
        user::become_root()?;
    }
    at(caps::bound(0), || "drop bounding capabilities".into())?;
    at(caps::set_ambient(0), || "set ambient capabilities".into())?;
    at(proc::set_no_new_privs(), || "no_new_privs".into())?;
    at(caps::set(Sets::default()), || "capset".into())?;
    at(proc::set_dumpable(false), || "not dumpable".into())?;
    // Without the shim nobody would ever end it.
    at(proc::set_parent_death_signal(libc::SIGKILL), || {
        "parent death signal".into()
    })?;
    at(report::ready(channel, None), || "report".into())?;
    // SAFETY: this process uses no descriptor any more; it sleeps until it is killed.
    at(unsafe { fd::close_range(0, u32::MAX) }, || {
        "close_range".into()
    })?;
    loop {
        rustix::event::pause();
    }
}

fn enter_empty_root(dir: &Path) -> Step<()> {
    let enter = || -> std::io::Result<()> {
        mount::set_propagation("/", PropagationFlags::DOWNSTREAM | PropagationFlags::REC)?;
        let empty = masks::empty_readonly()?;
        let target = rustix::fs::open(dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        mount::attach(&empty, &target)?;
        rustix::process::fchdir(&empty)?;
        rustix::process::pivot_root(".", ".")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")?;
        Ok(())
    };
    at(enter(), || "enter an empty root".into())
}
