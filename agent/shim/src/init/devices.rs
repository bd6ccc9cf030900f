//! Device nodes and the links that programs expect below `/dev`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use longshore_sys::mount::{self, Attributes};
use longshore_sys::path::{self, Missing};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Stat, Uid};
use rustix::io::Errno;

use super::{Step, at, resolve, root};
use crate::wire::{ContainerPlan, Device};

/// Links below `/dev`. Source: OCI runtime specification, "Default devices"; Linux's devices.txt.
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// Makes nodes and links.
pub(super) fn make(plan: &ContainerPlan, root: &OwnedFd) -> Step<()> {
    for device in &plan.devices {
        at(make_node(device, root), || format!("mknod {}", device.path))?;
    }
    for (target, link) in LINKS {
        at(make_link(target, link, root), || format!("symlink {link}"))?;
    }
    if root::exists("/proc/kcore") {
        at(make_link("/proc/kcore", "/dev/core", root), || {
            "symlink /dev/core".into()
        })?;
    }
    Ok(())
}

fn make_node(device: &Device, root: &OwnedFd) -> io::Result<()> {
    let (parent, name) = path::parent_in_root(root, Path::new(&device.path))?;
    let kind = if device.block {
        FileType::BlockDevice
    } else {
        FileType::CharacterDevice
    };
    let number = rustix::fs::makedev(device.major, device.minor);
    let mode = Mode::from_bits_truncate(device.mode);
    match mknod(&parent, &name, kind, mode, number) {
        Err(Errno::PERM) => return bind_host_node(device, root, kind, number),
        made => made?,
    }
    rustix::fs::chownat(
        &parent,
        &name,
        Some(Uid::from_raw(device.uid)),
        Some(Gid::from_raw(device.gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    // After chown, which may clear bits. Not a link: it is the node that was just looked at, in a
    // directory that no container's process sees yet.
    Ok(rustix::fs::chmodat(&parent, &name, mode, AtFlags::empty())?)
}

/// Makes a node in the place of whatever else is there.
fn mknod(
    parent: &OwnedFd,
    name: &OsStr,
    kind: FileType,
    mode: Mode,
    number: u64,
) -> Result<(), Errno> {
    match rustix::fs::mknodat(parent, name, kind, mode, number) {
        Err(Errno::EXIST) if is_device(parent, name, kind, number)? => Ok(()),
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            rustix::fs::mknodat(parent, name, kind, mode, number)
        }
        made => made,
    }
}

fn is_device(parent: &OwnedFd, name: &OsStr, kind: FileType, number: u64) -> Result<bool, Errno> {
    let found = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(is(&found, kind, number))
}

fn is(found: &Stat, kind: FileType, number: u64) -> bool {
    FileType::from_raw_mode(found.st_mode) == kind && found.st_rdev == number
}

/// Where nodes may not be made (a user namespace), the host's own is bound, with the owner and the
/// mode that it has there.
fn bind_host_node(device: &Device, root: &OwnedFd, kind: FileType, number: u64) -> io::Result<()> {
    let path = host_node(Path::new(&device.path), kind, number).ok_or(Errno::NODEV)?;
    let tree = mount::clone_tree(CWD, path, false)?;
    if !is(&rustix::fs::fstat(&tree)?, kind, number) {
        return Err(Errno::NODEV.into());
    }
    let private = Attributes {
        propagation: libc::MS_PRIVATE,
        ..Attributes::default()
    };
    mount::set_attributes(&tree, false, private)?;
    mount::attach(
        &tree,
        resolve(root, &device.path, Missing::MakeFile(0o666))?,
    )
}

/// Deepest directory below `/dev` that is searched.
const DEPTH: usize = 4;

/// Finds a node of the host: where the container has it, where udev links it, anywhere in `/dev`.
fn host_node(path: &Path, kind: FileType, number: u64) -> Option<PathBuf> {
    let links = match kind {
        FileType::BlockDevice => "/dev/block",
        _ => "/dev/char",
    };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    [path.to_owned(), format!("{links}/{major}:{minor}").into()]
        .into_iter()
        .find(|path| {
            rustix::fs::statat(CWD, path, AtFlags::empty())
                .is_ok_and(|found| is(&found, kind, number))
        })
        .or_else(|| search(Path::new("/dev"), kind, number, DEPTH))
}

fn search(dir: &Path, kind: FileType, number: u64, depth: usize) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        let found = rustix::fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        if is(&found, kind, number) {
            return Some(path);
        }
        let is_dir = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
        (is_dir && depth > 0)
            .then(|| search(&path, kind, number, depth - 1))
            .flatten()
    })
}

/// Replaces whatever is there, but a directory, which stays.
fn make_link(target: &str, link: &str, root: &OwnedFd) -> io::Result<()> {
    let (parent, name) = path::parent_in_root(root, Path::new(link))?;
    match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(Errno::ISDIR | Errno::BUSY) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::fs::symlinkat(target, &parent, &name)?)
}
