//! Mounts, preferring descriptors over paths.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::check;

pub use rustix::mount::{MountFlags as Flags, MountPropagationFlags as PropagationFlags};

/// Mounts a file system the old way.
///
/// # Errors
/// What mount(2) answers; `InvalidInput` for NUL in a text.
pub fn mount(
    source: &str,
    target: impl AsRef<Path>,
    fs_type: &str,
    flags: MountFlags,
    data: &str,
) -> io::Result<()> {
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(
        source,
        target.as_ref(),
        fs_type,
        flags,
        data.as_c_str(),
    )?)
}

/// Mounts a tmpfs of at most `size_bytes` with this mode: nosuid, nodev, noexec.
///
/// # Errors
/// What mount(2) answers.
pub fn tmpfs(target: &Path, size_bytes: u64, mode: u32) -> io::Result<()> {
    mount(
        "tmpfs",
        target,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        &format!("mode={mode:o},size={size_bytes}"),
    )
}

/// Binds `source` over `target`, with the mounts below it if `recursive`.
///
/// # Errors
/// What mount(2) answers.
pub fn bind(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let bound = if recursive {
        rustix::mount::mount_bind_recursive(source, target)
    } else {
        rustix::mount::mount_bind(source, target)
    };
    Ok(bound?)
}

/// Changes propagation of a mount, or of all below it with `PropagationFlags::REC`.
///
/// # Errors
/// What mount(2) answers.
pub fn set_propagation(target: impl AsRef<Path>, flags: MountPropagationFlags) -> io::Result<()> {
    Ok(rustix::mount::mount_change(target.as_ref(), flags)?)
}

/// Unmounts lazily without following a link; that nothing is mounted or there is fine.
///
/// # Errors
/// What umount2(2) answers, but `EINVAL` and `ENOENT`.
pub fn unmount_detach(target: &Path) -> io::Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Copies the mount (with those below it if `recursive`) that shows `path` as a detached tree.
///
/// # Errors
/// What open_tree(2) answers.
pub fn clone_tree(dir: impl AsFd, path: impl AsRef<Path>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    flags.set(
        OpenTreeFlags::AT_EMPTY_PATH,
        path.as_ref().as_os_str().is_empty(),
    );
    Ok(rustix::mount::open_tree(dir, path.as_ref(), flags)?)
}

/// Attaches a detached tree on what `target` has open.
///
/// # Errors
/// What move_mount(2) answers.
pub fn attach(tree: impl AsFd, target: impl AsFd) -> io::Result<()> {
    Ok(rustix::mount::move_mount(
        tree,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?)
}

/// Attributes for [`set_attributes`]; bits are `MOUNT_ATTR_*`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear.
    pub clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or 0 to leave it.
    pub propagation: u64,
}

/// Changes attributes of the mount that `tree` is the root of, or of all below it too.
///
/// # Errors
/// `ENOSYS` before Linux 5.12; what mount_setattr(2) answers.
pub fn set_attributes(tree: impl AsFd, recursive: bool, attributes: Attributes) -> io::Result<()> {
    mount_setattr(
        tree,
        recursive,
        libc::mount_attr {
            attr_set: attributes.set,
            attr_clr: attributes.clear,
            propagation: attributes.propagation,
            userns_fd: 0,
        },
    )
}

/// Shows the files of a detached tree with owners as `user_ns` maps them: what belongs to id 0 on
/// disk belongs to root of the namespace, and back.
///
/// # Errors
/// `EINVAL` when a file system lacks it, `EPERM` when a mount is id-mapped already, `ENOSYS` before
/// Linux 5.12.
pub fn map_ids(tree: impl AsFd, recursive: bool, user_ns: impl AsFd) -> io::Result<()> {
    let raw = user_ns.as_fd().as_raw_fd();
    mount_setattr(
        tree,
        recursive,
        libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::try_from(raw).expect("descriptors are not negative"),
        },
    )
}

fn mount_setattr(tree: impl AsFd, recursive: bool, attr: libc::mount_attr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string and `attr` is of the size given; both outlive the call,
    // as does the borrow of a user namespace whose number is in it.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// `MOUNT_ATTR_*` bits to set and to clear so that a mount has exactly what `MS_*` `flags` say.
pub fn attributes_of(flags: u64) -> Attributes {
    use libc::{
        MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME,
        MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY,
        MOUNT_ATTR_STRICTATIME,
    };
    let mut out = Attributes::default();
    for (ms, attr) in [
        (libc::MS_RDONLY, MOUNT_ATTR_RDONLY),
        (libc::MS_NOSUID, MOUNT_ATTR_NOSUID),
        (libc::MS_NODEV, MOUNT_ATTR_NODEV),
        (libc::MS_NOEXEC, MOUNT_ATTR_NOEXEC),
        (libc::MS_NODIRATIME, MOUNT_ATTR_NODIRATIME),
        (libc::MS_NOSYMFOLLOW, MOUNT_ATTR_NOSYMFOLLOW),
    ] {
        if flags & ms != 0 {
            out.set |= attr;
        }
    }
    // The access time mode is one field, not bits: the whole field is cleared, then set.
    // Relative access times are value 0 and the kernel's default.
    if flags & (libc::MS_NOATIME | libc::MS_STRICTATIME | libc::MS_RELATIME) != 0 {
        out.clear |= MOUNT_ATTR__ATIME;
        if flags & libc::MS_NOATIME != 0 {
            out.set |= MOUNT_ATTR_NOATIME;
        } else if flags & libc::MS_STRICTATIME != 0 {
            out.set |= MOUNT_ATTR_STRICTATIME;
        }
    }
    out
}

/// Layers of an overlay.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// Directory that `lower` is relative to.
    pub layers_dir: &'a Path,
    /// Lower directories, topmost first.
    pub lower: &'a [String],
    /// Upper and work directory; `None` for a read-only tree.
    pub writable: Option<(&'a Path, &'a Path)>,
    /// Nothing is synced, neither for programs inside nor when it is unmounted, and the upper
    /// directory can't be used again: the kernel refuses to mount it once more.
    pub volatile: bool,
}

/// Mounts an overlay as a detached tree, by the new mount API: `lowerdir+` (Linux 6.7) takes any
/// number of layers.
///
/// A single layer without a writable one is no overlay but a detached read-only copy of its mount.
///
/// # Errors
/// `EINVAL` or `ENOSYS` where the kernel lacks it (then [`overlay_at`] is the way), and what the
/// mount calls answer.
pub fn overlay_detached(overlay: &Overlay<'_>) -> io::Result<OwnedFd> {
    if let ([single], None) = (overlay.lower, overlay.writable) {
        let tree = clone_tree(CWD, overlay.layers_dir.join(single), false)?;
        set_attributes(
            &tree,
            false,
            Attributes {
                set: libc::MOUNT_ATTR_RDONLY,
                clear: 0,
                propagation: libc::MS_PRIVATE,
            },
        )?;
        return Ok(tree);
    }
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", "overlay")?;
    for lower in overlay.lower {
        rustix::mount::fsconfig_set_string(
            context.as_fd(),
            "lowerdir+",
            overlay.layers_dir.join(lower),
        )?;
    }
    let mut attributes = MountAttrFlags::empty();
    match overlay.writable {
        Some((upper, work)) => {
            rustix::mount::fsconfig_set_string(context.as_fd(), "upperdir", upper)?;
            rustix::mount::fsconfig_set_string(context.as_fd(), "workdir", work)?;
            if overlay.volatile {
                rustix::mount::fsconfig_set_flag(context.as_fd(), "volatile")?;
            }
        }
        None => attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY,
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    Ok(rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// Mounts an overlay on `target` with mount(2).
///
/// All options must fit one page, so the layers are given by their short names; the calling
/// thread's working directory becomes `layers_dir` for that.
///
/// # Errors
/// What chdir(2) or mount(2) answer.
pub fn overlay_at(overlay: &Overlay<'_>, target: &Path) -> io::Result<()> {
    let mut data = b"lowerdir=".to_vec();
    for (at, lower) in overlay.lower.iter().enumerate() {
        if at > 0 {
            data.push(b':');
        }
        escape_option(lower.as_bytes(), &mut data);
    }
    if let Some((upper, work)) = overlay.writable {
        for (key, path) in [("upperdir", upper), ("workdir", work)] {
            data.extend_from_slice(b",");
            data.extend_from_slice(key.as_bytes());
            data.push(b'=');
            escape_option(path.as_os_str().as_bytes(), &mut data);
        }
        if overlay.volatile {
            data.extend_from_slice(b",volatile");
        }
    }
    rustix::process::chdir(overlay.layers_dir)?;
    let flags = if overlay.writable.is_some() {
        MountFlags::empty()
    } else {
        MountFlags::RDONLY
    };
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(
        "overlay",
        target,
        "overlay",
        flags,
        data.as_c_str(),
    )?)
}

/// Overlay's options are split at commas and its layers at colons.
fn escape_option(text: &[u8], out: &mut Vec<u8>) {
    for byte in text {
        if matches!(byte, b'\\' | b',' | b':') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
}

/// Mounts a read-only tree of layers that no mount namespace shows; it lives as long as the
/// descriptor, which is a directory to open files below.
///
/// # Errors
/// What the mount calls answer.
pub fn overlay_for_reading(layers_dir: &Path, lower: &[String]) -> io::Result<OwnedFd> {
    let overlay = Overlay {
        layers_dir,
        lower,
        writable: None,
        volatile: false,
    };
    match overlay_detached(&overlay) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
            overlay_by_private_namespace(&overlay)
        }
        result => result,
    }
}

/// Before `lowerdir+`: mount it where only a thread that ends at once can see it, and keep a
/// detached copy.
fn overlay_by_private_namespace(overlay: &Overlay<'_>) -> io::Result<OwnedFd> {
    std::thread::scope(|scope| {
        let work = || {
            // SAFETY: the thread gets its own mount namespace, root and working directory;
            // nothing that other threads use is unshared from them.
            check(libc::c_long::from(unsafe {
                libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS)
            }))?;
            set_propagation(
                "/",
                MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
            )?;
            // The layers are found through the working directory, so their own directory, which
            // surely exists, can be covered.
            overlay_at(overlay, overlay.layers_dir)?;
            clone_tree(CWD, overlay.layers_dir, false)
        };
        match scope.spawn(work).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;

    fn layers() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temporary directory");
        for (layer, text) in [("1", "base"), ("2", "top")] {
            fs::create_dir(dir.path().join(layer)).expect("mkdir");
            fs::write(dir.path().join(layer).join("file"), text).expect("write");
        }
        fs::write(dir.path().join("1/base-only"), "x").expect("write");
        dir
    }

    fn read(tree: &OwnedFd, path: &str) -> io::Result<String> {
        let fd = crate::path::open_in_root(tree, path, rustix::fs::OFlags::RDONLY, 0)?;
        let mut text = String::new();
        fs::File::from(fd).read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn merged_tree_is_read_without_any_visible_mount() {
        let dir = layers();
        let lower = ["2".to_owned(), "1".to_owned()];
        let overlay = Overlay {
            layers_dir: dir.path(),
            lower: &lower,
            writable: None,
            volatile: false,
        };
        for tree in [
            overlay_for_reading(dir.path(), &lower).expect("mount"),
            overlay_by_private_namespace(&overlay).expect("mount in a private namespace"),
        ] {
            assert_eq!(read(&tree, "/file").expect("read"), "top");
            assert_eq!(read(&tree, "/base-only").expect("read"), "x");
            let error = crate::path::open_in_root(
                &tree,
                "new",
                rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
                0o644,
            )
            .expect_err("read-only");
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        assert!(!mounts.contains(dir.path().to_str().expect("text")));
    }

    #[test]
    fn a_single_layer_is_a_read_only_view() {
        let dir = layers();
        let tree = overlay_for_reading(dir.path(), &["1".to_owned()]).expect("mount");
        assert_eq!(read(&tree, "file").expect("read"), "base");
    }

    #[test]
    fn options_are_escaped() {
        let mut out = Vec::new();
        escape_option(b"a,b:c\\d", &mut out);
        assert_eq!(out, b"a\\,b\\:c\\\\d");
    }
}
