//! A container whose pod has a user namespace: what is done on either side of its border.
//!
//! The border is crossed once, and nothing leads back. What needs the host's rights comes first:
//!
//! ```text
//!  rights of the host                      rights of the pod's root
//!    limits, owners of stdio
//!    net, uts, ipc
//!    sources of mounts, id-mapped
//!    overlay of id-mapped layers
//!    setns -----------------------------> new namespaces, which belong to the user namespace
//!                                         root attached, the last thing done as the host's user
//!                                         ids become 0
//! ```
//! A new pid namespace has its first process by a second clone: the forerunner that has crossed
//! tells the shim who that is, and ends.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use longshore_sys::clone::{self, Cloned, exit_now};
use longshore_sys::user::outside;
use longshore_sys::{fd, mount, pidfd};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::{ChildStdio, Step, at, failure, open_dir, settings};
use crate::report;
use crate::wire::{ProcessPlan, Rootfs, UserNamespace};

/// Opens the namespace.
pub(super) fn open(user: &UserNamespace) -> Step<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    at(
        rustix::fs::open(user.path.as_str(), flags, Mode::empty()),
        || format!("open {}", user.path),
    )
}

/// What of a process's settings only the host may give.
pub(super) fn prepare(user: &UserNamespace, process: &ProcessPlan, stdio: &ChildStdio) -> Step<()> {
    settings::raise_limits(process)?;
    give_stdio(user, process, stdio);
    Ok(())
}

/// Makes the process the owner of its stdio, as seen from the host.
pub(super) fn give_stdio(user: &UserNamespace, process: &ProcessPlan, stdio: &ChildStdio) {
    let uid = outside(&user.uids(), process.uid);
    let gid = outside(&user.gids(), process.gid);
    if let (Some(uid), Some(gid)) = (uid, gid) {
        stdio.give_to(Uid::from_raw(uid), Gid::from_raw(gid));
    }
}

/// Leaves the host's mounts.
pub(super) fn unshare_mounts() -> Step<()> {
    // SAFETY: this process has one thread.
    let made = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    at(made, || "unshare mount".into())?;
    let down = mount::PropagationFlags::DOWNSTREAM | mount::PropagationFlags::REC;
    at(mount::set_propagation("/", down), || {
        "make mounts slave".into()
    })
}

/// Covers the layers with a view of themselves in which the pod's root owns what id 0 owns on
/// disk. In a mount namespace of this process's own.
pub(super) fn map_layers(rootfs: &Rootfs, namespace: BorrowedFd<'_>) -> Step<()> {
    let cover = || -> std::io::Result<()> {
        let tree = mount::clone_tree(CWD, &rootfs.layers_dir, false)?;
        let private = mount::Attributes {
            propagation: libc::MS_PRIVATE,
            ..mount::Attributes::default()
        };
        mount::set_attributes(&tree, false, private)?;
        mount::map_ids(&tree, false, namespace)?;
        mount::attach(&tree, open_dir(&rootfs.layers_dir)?)
    };
    at(cover(), || format!("id-map {}", rootfs.layers_dir))
}

/// Enters the namespace, with all rights that its root has and none beyond.
pub(super) fn cross(namespace: BorrowedFd<'_>) -> Step<()> {
    at(
        rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::User)),
        || "setns user".into(),
    )
}

/// Makes `namespaces` (`CLONE_NEW*`) for this process; with a new pid namespace among them it is
/// another process that goes on from here, inside the cgroup, and this one that ends.
pub(super) fn be_born(
    namespaces: libc::c_int,
    cgroup: Option<BorrowedFd<'_>>,
    channel: &OwnedFd,
) -> Step<()> {
    if namespaces & libc::CLONE_NEWPID == 0 {
        let flags = UnshareFlags::from_bits_retain(namespaces.cast_unsigned());
        // SAFETY: this process has one thread.
        let made = unsafe { rustix::thread::unshare_unsafe(flags) };
        return at(made, || "unshare".into());
    }
    let (word, teller) = at(fd::pipe(), || "pipe".into())?;
    // SAFETY: this process has one thread, and neither side ever returns to the shim's loop.
    let cloned = unsafe { clone::fork_sibling(u64::from(namespaces.cast_unsigned()), cgroup) };
    match at(cloned, || "clone".into())? {
        Cloned::Parent { pid, pidfd } => {
            let Err(failure) = announce(channel, &teller, pid, &pidfd);
            let _ = pidfd::send_signal(&pidfd, libc::SIGKILL);
            Err(failure)
        }
        Cloned::Child => {
            drop(teller);
            // The shim must know of this process before it hears from it.
            let mut told = [0; 1];
            match rustix::io::retry_on_intr(|| rustix::io::read(&word, &mut told)) {
                Ok(1) => Ok(()),
                // Nobody would ever end this process: the one who should have told of it is gone.
                _ => exit_now(super::FAILED),
            }
        }
    }
}

fn announce(channel: &OwnedFd, teller: &OwnedFd, pid: i32, process: &OwnedFd) -> Step<Infallible> {
    at(report::born(channel, pid, process.as_fd()), || {
        "report".into()
    })?;
    at(rustix::io::write(teller, b"B"), || "report".into())?;
    exit_now(0)
}

/// Takes the ids of the namespace's root, without the groups that came from the host.
pub(super) fn become_root() -> Step<()> {
    at(rustix::thread::set_thread_groups(&[]), || {
        "setgroups of the pod's root".into()
    })?;
    let gid = Gid::from_raw(0);
    at(rustix::thread::set_thread_res_gid(gid, gid, gid), || {
        "setgid of the pod's root".into()
    })?;
    let uid = Uid::from_raw(0);
    at(rustix::thread::set_thread_res_uid(uid, uid, uid), || {
        "setuid of the pod's root".into()
    })
}

/// The namespace to map a mount's ids with.
pub(super) fn needed(namespace: Option<BorrowedFd<'_>>) -> Step<BorrowedFd<'_>> {
    namespace.ok_or_else(|| {
        let error = rustix::io::Errno::INVAL.into();
        failure(&error, "id-map without a user namespace".into())
    })
}
