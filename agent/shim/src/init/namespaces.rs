//! Namespaces of a container: joined by path, made by unshare, or all of another process.

use std::os::fd::{AsFd, BorrowedFd};

use longshore_sys::ns;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};

use super::{Step, at, failure};
use crate::wire::{ContainerPlan, Namespace, NamespaceFrom, NamespaceKind};

/// Joins and makes what clone could not: the mount namespace, new UTS, IPC and network ones and a
/// pid namespace are there already.
pub(super) fn join_and_make(plan: &ContainerPlan) -> Step<()> {
    join_paths(&plan.namespaces)?;
    make(plan)
}

/// Makes a new cgroup namespace, and sets up the other new ones.
pub(super) fn make(plan: &ContainerPlan) -> Step<()> {
    let has_new = |kind| {
        plan.namespaces.iter().any(|namespace| {
            namespace.kind() == kind && matches!(namespace.from, Some(NamespaceFrom::New(_)))
        })
    };
    if has_new(NamespaceKind::Cgroup) {
        // Not by clone: the root of a cgroup namespace is where its maker is at that moment, and
        // the version 1 cgroups have only now been joined.
        // SAFETY: this process has one thread.
        let made =
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) };
        at(made, || "unshare cgroup".into())?;
    }
    if has_new(NamespaceKind::Uts) && !plan.hostname.is_empty() {
        at(
            rustix::system::sethostname(plan.hostname.as_bytes()),
            || "sethostname".into(),
        )?;
    }
    if has_new(NamespaceKind::Network) {
        at(ns::loopback_up(), || "bring lo up".into())?;
    }
    Ok(())
}

/// Joins those that have a path; the pid namespace is the clone's matter.
pub(super) fn join_paths(namespaces: &[Namespace]) -> Step<()> {
    for namespace in namespaces {
        match (namespace.kind(), &namespace.from) {
            (NamespaceKind::Pid, _) => {}
            (kind, Some(NamespaceFrom::Path(path))) => join(kind, path)?,
            _ => {}
        }
    }
    Ok(())
}

fn join(kind: NamespaceKind, path: &str) -> Step<()> {
    let link = match kind {
        NamespaceKind::Network => LinkNameSpaceType::Network,
        NamespaceKind::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        NamespaceKind::Ipc => LinkNameSpaceType::InterProcessCommunication,
        NamespaceKind::Cgroup => LinkNameSpaceType::ControlGroup,
        NamespaceKind::Mount | NamespaceKind::Pid | NamespaceKind::User => {
            let error = rustix::io::Errno::NOSYS.into();
            return Err(failure(&error, format!("setns {path}")));
        }
    };
    let entered = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|fd| rustix::thread::move_into_link_name_space(fd.as_fd(), Some(link)));
    at(entered, || format!("setns {path}"))
}

/// Joins every namespace of a process but its pid namespace, at once or not at all. The root and
/// the working directory become those of its mount namespace.
pub(super) fn join_all(target: BorrowedFd<'_>, has_user: bool) -> Step<()> {
    let mut all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::NETWORK;
    // The kernel refuses a user namespace that one is in already.
    all.set(ThreadNameSpaceType::USER, has_user);
    at(
        rustix::thread::move_into_thread_name_spaces(target, all),
        || "setns".into(),
    )
}
