//! Paths that a container must not read or write.

use std::io;
use std::os::fd::OwnedFd;

use longshore_sys::mount::{self, Attributes};
use longshore_sys::path;
use rustix::fs::{CWD, FileType, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::{Step, at};

/// Clones the mount of the host's `/dev/null`, having looked that it is the null device.
pub(super) fn open_null() -> Step<OwnedFd> {
    at(null(), || "open /dev/null".into())
}

fn null() -> io::Result<OwnedFd> {
    let tree = mount::clone_tree(CWD, "/dev/null", false)?;
    let found = rustix::fs::fstat(&tree)?;
    let is_null = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && found.st_rdev == rustix::fs::makedev(1, 3);
    if !is_null {
        return Err(Errno::NODEV.into());
    }
    let private = Attributes {
        propagation: libc::MS_PRIVATE,
        ..Attributes::default()
    };
    mount::set_attributes(&tree, false, private)?;
    Ok(tree)
}

/// Opens what a mask is for; `None` where there is nothing to hide.
fn open(root: &OwnedFd, target: &str) -> io::Result<Option<OwnedFd>> {
    match path::open_in_root(root, target, OFlags::PATH, 0) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Ok(None)
        }
        result => result.map(Some),
    }
}

/// Covers files with `/dev/null` and directories with an empty read-only one.
pub(super) fn mask(paths: &[String], root: &OwnedFd, null: &OwnedFd) -> Step<()> {
    let mut covers = Covers {
        null,
        null_attached: false,
        empty: None,
    };
    for target in paths {
        at(mask_one(target, root, &mut covers), || {
            format!("mask {target}")
        })?;
    }
    Ok(())
}

fn mask_one(target: &str, root: &OwnedFd, covers: &mut Covers<'_>) -> io::Result<()> {
    let Some(target) = open(root, target)? else {
        return Ok(());
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode) == FileType::Directory {
        covers.cover_with_empty(&target)
    } else {
        covers.cover_with_null(&target)
    }
}

/// One null device and one empty file system serve all masks: once attached, a tree can be cloned.
struct Covers<'a> {
    null: &'a OwnedFd,
    null_attached: bool,
    empty: Option<OwnedFd>,
}

impl Covers<'_> {
    fn cover_with_null(&mut self, target: &OwnedFd) -> io::Result<()> {
        if self.null_attached {
            return mount::attach(mount::clone_tree(self.null, "", false)?, target);
        }
        mount::attach(self.null, target)?;
        self.null_attached = true;
        Ok(())
    }

    fn cover_with_empty(&mut self, target: &OwnedFd) -> io::Result<()> {
        if let Some(empty) = &self.empty {
            return mount::attach(mount::clone_tree(empty, "", false)?, target);
        }
        let empty = empty_readonly()?;
        mount::attach(&empty, target)?;
        self.empty = Some(empty);
        Ok(())
    }
}

/// A detached empty read-only file system.
pub(super) fn empty_readonly() -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    rustix::mount::fsconfig_set_string(&context, "nr_inodes", "1")?;
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// Binds paths over themselves, read-only.
pub(super) fn make_readonly(paths: &[String], root: &OwnedFd) -> Step<()> {
    let readonly = Attributes {
        set: libc::MOUNT_ATTR_RDONLY,
        clear: 0,
        propagation: libc::MS_PRIVATE,
    };
    for target in paths {
        at(bind_over_itself(target, root, readonly), || {
            format!("make {target} read-only")
        })?;
    }
    Ok(())
}

/// Binds paths below read-only ones over themselves, writable again.
pub(super) fn make_writable(paths: &[String], root: &OwnedFd) -> Step<()> {
    let writable = Attributes {
        set: 0,
        clear: libc::MOUNT_ATTR_RDONLY,
        propagation: libc::MS_PRIVATE,
    };
    for target in paths {
        at(bind_over_itself(target, root, writable), || {
            format!("make {target} writable")
        })?;
    }
    Ok(())
}

fn bind_over_itself(target: &str, root: &OwnedFd, attributes: Attributes) -> io::Result<()> {
    let Some(target) = open(root, target)? else {
        return Ok(());
    };
    let tree = mount::clone_tree(&target, "", true)?;
    mount::set_attributes(&tree, true, attributes)?;
    mount::attach(&tree, &target)
}
