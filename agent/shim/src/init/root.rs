//! The root of a container: put together inside its own mount namespace, then entered.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use longshore_sys::mount::{self, Attributes, Overlay, PropagationFlags};
use longshore_sys::path;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};

use super::{Step, at, devices, files, masks, mounts, open_dir, user};
use crate::wire::{ContainerPlan, Propagation, Rootfs, Sysctl};

/// What is opened on the host's mounts before the root is put together.
pub(super) struct Sources {
    /// Detached trees of bind mounts.
    binds: Vec<Option<OwnedFd>>,
    /// The null device, for masks.
    null: OwnedFd,
    /// The detached root, once it is mounted.
    overlay: Option<OwnedFd>,
}

impl Sources {
    /// Mounts what consists of layers: the root, and images as volumes. In a mount namespace of this
    /// process's own, with the host's rights.
    pub(super) fn mount_layers(&mut self, plan: &ContainerPlan) -> Step<()> {
        mounts::open_overlays(&plan.mounts, &plan.rootfs, &mut self.binds)?;
        self.overlay = Some(overlay(&plan.rootfs)?);
        Ok(())
    }

    /// The root; its layers are mounted now unless they have been.
    fn take_overlay(&mut self, plan: &ContainerPlan) -> Step<OwnedFd> {
        if self.overlay.is_none() {
            self.mount_layers(plan)?;
        }
        Ok(self.overlay.take().expect("mounted above"))
    }
}

/// Opens them; those that are id-mapped are so by `user_ns`.
pub(super) fn open_sources(plan: &ContainerPlan, user_ns: Option<BorrowedFd<'_>>) -> Step<Sources> {
    Ok(Sources {
        // Cloned while the host's mounts are still peers of the host's: a clone of a slave could
        // not propagate back.
        binds: mounts::open_sources(&plan.mounts, user_ns)?,
        null: masks::open_null()?,
        overlay: None,
    })
}

/// Mounts everything below the plan's mount point; returns the root, not entered yet.
pub(super) fn build(plan: &ContainerPlan, mut sources: Sources) -> Step<OwnedFd> {
    at(
        mount::set_propagation("/", PropagationFlags::DOWNSTREAM | PropagationFlags::REC),
        || "make mounts slave".into(),
    )?;
    write_sysctls(&plan.sysctls)?;
    let root = attach_root(&plan.rootfs, &sources.take_overlay(plan)?)?;
    if plan.user_namespace.is_some() {
        // What is made from here on is the pod's own root's.
        user::become_root()?;
    }
    files::write(&plan.files, &root)?;
    mounts::mount_all(plan, &root, sources.binds)?;
    if !mounts::brings_own_dev(&plan.mounts) {
        devices::make(plan, &root)?;
    }
    masks::make_readonly(&plan.readonly_paths, &root)?;
    masks::make_writable(&plan.writable_paths, &root)?;
    masks::mask(&plan.masked_paths, &root, &sources.null)?;
    Ok(root)
}

pub(super) fn overlay(rootfs: &Rootfs) -> Step<OwnedFd> {
    let writable =
        (!rootfs.upper.is_empty()).then(|| (Path::new(&rootfs.upper), Path::new(&rootfs.work)));
    let overlay = Overlay {
        layers_dir: Path::new(&rootfs.layers_dir),
        lower: &rootfs.lower,
        writable,
        volatile: !rootfs.durable,
    };
    let mounted = mount_overlay(&overlay, Path::new(&rootfs.mount_point));
    at(mounted, || "mount overlay".into())
}

/// Mounts an overlay as a detached tree, by way of `point` where the kernel needs one; in a mount
/// namespace of this process's own.
pub(super) fn mount_overlay(overlay: &Overlay<'_>, point: &Path) -> io::Result<OwnedFd> {
    match mount::overlay_detached(overlay) {
        // A kernel without lowerdir+, or a path beyond the 255 bytes of one fsconfig string.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOSYS | libc::ENAMETOOLONG)
            ) =>
        {
            mount::overlay_at(overlay, point)?;
            let tree = mount::clone_tree(CWD, point, false)?;
            mount::unmount_detach(point)?;
            Ok(tree)
        }
        mounted => mounted,
    }
}

pub(super) fn attach_root(rootfs: &Rootfs, overlay: &OwnedFd) -> Step<OwnedFd> {
    let point = Path::new(&rootfs.mount_point);
    let attached = rustix::fs::open(point, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|target| mount::attach(overlay, &target));
    at(attached, || "mount overlay".into())?;
    at(open_dir(&rootfs.mount_point), || {
        format!("open {}", rootfs.mount_point)
    })
}

/// Through a proc of our own that nobody can reach: what is mounted over the host's or the
/// container's `/proc/sys` plays no part.
fn write_sysctls(sysctls: &[Sysctl]) -> Step<()> {
    if sysctls.is_empty() {
        return Ok(());
    }
    let proc = at(private_proc(), || "mount a private proc".into())?;
    for sysctl in sysctls {
        let written = longshore_sys::ns::sysctl_path(&sysctl.name)
            .ok_or_else(|| Errno::INVAL.into())
            .and_then(|name| path::open_no_links(&proc, format!("sys/{name}"), OFlags::WRONLY, 0))
            .and_then(|file| Ok(rustix::io::write(&file, sysctl.value.as_bytes())?));
        at(written, || format!("sysctl {}", sysctl.name))?;
    }
    Ok(())
}

fn private_proc() -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
}

/// Makes `root` the root of this process and lets go of the host's.
pub(super) fn enter(plan: &ContainerPlan, root: OwnedFd) -> Step<()> {
    at(rustix::process::fchdir(&root), || "chdir".into())?;
    let pivoted = match rustix::process::pivot_root(".", ".") {
        // The old root lies on top of the new one now, and `.` is the old one.
        Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH),
        // The host runs on its initramfs, which cannot be pivoted away from.
        Err(Errno::INVAL) => {
            rustix::mount::mount_move(".", "/").and_then(|()| rustix::process::chroot("."))
        }
        Err(error) => Err(error),
    };
    at(pivoted, || "pivot_root".into())?;
    at(rustix::process::chdir("/"), || "chdir /".into())?;
    let cwd = &plan.process.cwd;
    if !cwd.is_empty() && cwd != "/" {
        at(path::make_dir_in_root(&root, cwd, 0o755), || {
            format!("mkdir {cwd}")
        })?;
    }
    let propagation = match plan.root_propagation() {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    };
    let attributes = Attributes {
        set: if plan.readonly_rootfs {
            libc::MOUNT_ATTR_RDONLY
        } else {
            0
        },
        clear: 0,
        propagation,
    };
    at(mount::set_attributes(&root, false, attributes), || {
        "set attributes of the root".into()
    })
}

/// Whether `path` is there on the host, without following its last link.
pub(super) fn exists(path: impl AsRef<OsStr>) -> bool {
    rustix::fs::statat(CWD, path.as_ref(), rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
}
