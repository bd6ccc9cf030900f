//! Finds files and directories of an image as overlayfs would show them, without mounting anything.
//!
//! A directory of the merged tree is the list of directories that make it, topmost first. One
//! step down asks each of them in turn: a file or link ends the search, a whiteout too, an opaque
//! directory is the last of its list. This takes microseconds, needs no privilege beyond reading,
//! and works on every kernel; the test compares it with the real overlayfs.

use std::{ffi::OsStr, fs::File, io::Read, os::unix::ffi::OsStrExt, path::PathBuf};

use rustix::{
    fd::OwnedFd,
    fs::{FileType, Mode, OFlags, fgetxattr, fstat, openat, readlinkat},
    io::Errno,
};

use super::{
    RootfsError,
    error::RootfsError::{FileTooLarge, NotADirectory, NotAFile, SymlinkLoop},
    tree::{OPAQUE, components_reversed, is_whiteout},
};

/// As the kernel allows.
const MAX_LINKS: u32 = 40;

/// A directory of one layer.
pub(super) struct Part {
    pub(super) fd: OwnedFd,
    /// Where it is, without links, relative to the directory of all layers.
    pub(super) path: PathBuf,
}

/// Directories of several layers that are one; never empty, topmost first.
pub(super) type Merged = Vec<Part>;

pub(super) enum Found {
    Nothing,
    Directory(Merged),
    /// Anything else.
    Other {
        fd: OwnedFd,
        kind: FileType,
    },
}

/// See `Rootfs::read_file`; `layers` are topmost first.
pub(super) fn read_file(
    layers: Merged,
    path: &str,
    max_bytes: usize,
) -> Result<Option<Vec<u8>>, RootfsError> {
    match find(layers, path)? {
        Found::Nothing => Ok(None),
        Found::Other {
            fd,
            kind: FileType::RegularFile,
        } => content(&fd, path, max_bytes).map(Some),
        Found::Directory(_) | Found::Other { .. } => Err(NotAFile { path: path.into() }),
    }
}

/// Whether `path` is a file with an execute bit.
pub(super) fn is_program(layers: Merged, path: &str) -> Result<bool, RootfsError> {
    let Found::Other {
        fd,
        kind: FileType::RegularFile,
    } = find(layers, path)?
    else {
        return Ok(false);
    };
    let found = fstat(&fd).map_err(RootfsError::kernel("fstat", path))?;
    Ok(found.st_mode & 0o111 != 0)
}

/// The directory `path`; none if there is nothing.
pub(super) fn directory(layers: Merged, path: &str) -> Result<Option<Merged>, RootfsError> {
    match find(layers, path)? {
        Found::Nothing => Ok(None),
        Found::Directory(merged) => Ok(Some(merged)),
        Found::Other { .. } => Err(NotADirectory { path: path.into() }),
    }
}

/// What is at `path`, links followed inside the root.
fn find(layers: Merged, path: &str) -> Result<Found, RootfsError> {
    let kernel = |call| RootfsError::kernel(call, path);
    let mut pending = components_reversed(path.as_bytes());
    // From the root to where we are.
    let mut way = vec![layers];
    let mut links = 0;
    while let Some(name) = pending.pop() {
        if name == b".." {
            if way.len() > 1 {
                way.pop();
            }
            continue;
        }
        let here = way.last().map_or(&[][..], Vec::as_slice);
        match look_up(here, &name).map_err(kernel("openat"))? {
            Found::Nothing => return Ok(Found::Nothing),
            Found::Directory(merged) => way.push(merged),
            Found::Other {
                fd,
                kind: FileType::Symlink,
            } => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(SymlinkLoop { path: path.into() });
                }
                let target = readlinkat(&fd, "", Vec::new())
                    .map_err(kernel("readlinkat"))?
                    .into_bytes();
                if target.starts_with(b"/") {
                    way.truncate(1);
                }
                pending.extend(components_reversed(&target));
            }
            // A file where a directory would be needed.
            Found::Other { .. } if !pending.is_empty() => return Ok(Found::Nothing),
            other => return Ok(other),
        }
    }
    Ok(way.pop().map_or(Found::Nothing, Found::Directory))
}

/// What `name` is in a merged directory.
pub(super) fn look_up(here: &[Part], name: &[u8]) -> Result<Found, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut merged = Merged::new();
    for layer in here {
        let fd = match openat(&layer.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NAMETOOLONG) => continue,
            Err(error) => return Err(error),
        };
        let stat = fstat(&fd)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let opaque = is_opaque(&fd)?;
            let path = layer.path.join(OsStr::from_bytes(name));
            merged.push(Part { fd, path });
            if opaque {
                break;
            }
            continue;
        }
        if merged.is_empty() && !is_whiteout(&stat) {
            return Ok(Found::Other { fd, kind });
        }
        break;
    }
    Ok(if merged.is_empty() {
        Found::Nothing
    } else {
        Found::Directory(merged)
    })
}

fn is_opaque(dir: &OwnedFd) -> Result<bool, Errno> {
    // Attributes can't be read through an O_PATH descriptor.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(dir, c".", flags, Mode::empty())?;
    let mut value = [0; 1];
    match fgetxattr(&dir, OPAQUE, &mut value[..]) {
        Ok(length) => Ok(length == 1 && value == *b"y"),
        Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => Ok(false),
        Err(error) => Err(error),
    }
}

fn content(file: &OwnedFd, path: &str, max_bytes: usize) -> Result<Vec<u8>, RootfsError> {
    let kernel = |call| RootfsError::kernel(call, path);
    let name = format!("/proc/self/fd/{}", rustix::fd::AsRawFd::as_raw_fd(file));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(name, flags, Mode::empty()).map_err(kernel("open"))?;
    let mut content = Vec::new();
    let limit = max_bytes as u64;
    let read = File::from(opened)
        .take(limit.saturating_add(1))
        .read_to_end(&mut content);
    read.map_err(|error| super::kernel_error("read", path.as_ref(), &error))?;
    if content.len() > max_bytes {
        return Err(FileTooLarge {
            path: path.into(),
            limit_bytes: limit,
        });
    }
    Ok(content)
}
