//! The root tree of a system container, from archives that are not made as layers.
//!
//! ```text
//!  root tar     etc/ usr/ ...                         all of it is the tree
//!  unified tar  metadata.yaml rootfs/ templates/      what is below rootfs/ is; small files beside it
//!                                                     are handed to the caller
//! ```
//! They are unpacked as layers are, under the same bounds, but:
//! - there is nothing below to hide, so whiteouts are refused;
//! - devices are left out: a guest's /dev is its own, and in a user namespace they could not be opened;
//! - attributes of the builder's own overlay (`trusted.*`) are left out instead of refused;
//! - times are whole seconds;
//! - the diff ID is that of the [`canonical`] tar, so the same tree has the same one however it came.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::Read,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use rustix::{
    fd::{AsFd, AsRawFd},
    fs::{Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat2, readlink},
    io::Errno,
};

use super::{
    canonical,
    error::{LayerError, LimitKind},
    layer::{LayerDir, Limits, Unpacked, Unpacker, find_whiteout},
    tar::{Entry, Kind, Reader},
    tree,
};

/// One small file beside a root tree, and all of them.
const FILE_MAX_BYTES: u64 = 1 << 20;
const FILES_MAX_BYTES: u64 = 8 << 20;
const FILES_MAX: usize = 1024;

/// Where in its archive a root tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootShape {
    /// The archive is the tree.
    Root,
    /// Below `rootfs/` if the first entry is of a unified image, else at the top.
    RootOrUnified,
}

/// Small files of an archive, by their clean names.
pub type SmallFiles = BTreeMap<String, Vec<u8>>;

/// A root tree that is unpacked.
#[derive(Debug)]
pub struct UnpackedRoot {
    /// As a layer of its own; the diff ID is of its canonical tar.
    pub layer: Unpacked,
    /// Length of that tar.
    pub tar_bytes: u64,
    /// What was beside the tree; `None` if the archive was nothing but the tree.
    pub beside: Option<SmallFiles>,
}

/// Unpacks the uncompressed tar stream `source` to its end; blocking.
///
/// # Errors
/// See [`LayerError`]; `into` then holds what came before.
pub fn unpack_root(
    source: impl Read,
    into: &LayerDir,
    shape: RootShape,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<UnpackedRoot, LayerError> {
    let mut reader = Reader::new(source, limits, cancelled);
    let mut unpacker = Unpacker::new(into, limits)?;
    let mut unified = match shape {
        RootShape::Root => Some(false),
        RootShape::RootOrUnified => None,
    };
    let mut beside = Beside::default();
    while let Some(mut entry) = reader.next()? {
        let path = clean(&entry.path)?;
        if unified.is_none() && !path.is_empty() {
            let top = path.split(|byte| *byte == b'/').next();
            let known: [&[u8]; 3] = [b"metadata.yaml", b"rootfs", b"templates"];
            unified = Some(top.is_some_and(|top| known.contains(&top)));
        }
        if unified == Some(true) {
            match below_rootfs(&path) {
                Some(inside) => entry.path = [b"./", inside].concat(),
                None => {
                    beside.take(&path, &entry, &mut reader)?;
                    continue;
                }
            }
            if entry.kind == Kind::HardLink {
                entry.link = inner_link(&entry)?;
            }
        }
        if matches!(entry.kind, Kind::CharDevice(..) | Kind::BlockDevice(..)) {
            continue;
        }
        let path = clean(&entry.path)?;
        if find_whiteout(&path)?.is_some() {
            let path = tree::shown(&path);
            return Err(LayerError::Whiteout { path });
        }
        let is_ours = |name: &[u8]| !name.starts_with(b"trusted.");
        entry.xattrs.retain(|(name, _)| is_ours(name));
        entry.mtime.nanoseconds = 0;
        unpacker.entry(entry, &mut reader)?;
    }
    let stream = reader.finish()?;
    let mut layer = unpacker.finish(into, stream, cancelled)?;
    // Headers are not content: room for them beside the content that was allowed.
    let limit_bytes = limits.content_bytes.saturating_add(4096 * layer.inodes);
    let (diff_id, tar_bytes) = canonical::digest(into.fd.as_fd(), limit_bytes, cancelled)?;
    layer.diff_id = diff_id;
    Ok(UnpackedRoot {
        layer,
        tar_bytes,
        beside: (unified == Some(true)).then_some(beside.files),
    })
}

/// Reads the regular files of a small archive, as the metadata of an image is; blocking.
///
/// # Errors
/// See [`LayerError`].
pub fn read_small_files(
    source: impl Read,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<SmallFiles, LayerError> {
    let mut reader = Reader::new(source, limits, cancelled);
    let mut beside = Beside::default();
    while let Some(entry) = reader.next()? {
        let path = clean(&entry.path)?;
        beside.take(&path, &entry, &mut reader)?;
    }
    reader.finish()?;
    Ok(beside.files)
}

fn clean(path: &[u8]) -> Result<Vec<u8>, LayerError> {
    tree::clean(path).map_err(|fault| LayerError::Path {
        path: tree::shown(path),
        fault,
    })
}

/// The path inside of `rootfs/`, empty for that directory itself.
fn below_rootfs(path: &[u8]) -> Option<&[u8]> {
    match path.strip_prefix(b"rootfs")? {
        b"" => Some(b""),
        rest => rest.strip_prefix(b"/"),
    }
}

/// Names of hard links count from the top of the archive.
fn inner_link(entry: &Entry) -> Result<Vec<u8>, LayerError> {
    let target = clean(&entry.link)?;
    let inside = below_rootfs(&target).filter(|inside| !inside.is_empty());
    inside
        .map(<[u8]>::to_vec)
        .ok_or_else(|| LayerError::LinkTarget {
            path: tree::shown(&entry.path),
            target: tree::shown(&entry.link),
        })
}

#[derive(Default)]
struct Beside {
    files: SmallFiles,
    bytes: u64,
}

impl Beside {
    /// Keeps a regular file with a name in UTF-8; others say nothing to anyone.
    fn take<R: Read>(
        &mut self,
        path: &[u8],
        entry: &Entry,
        reader: &mut Reader<'_, R>,
    ) -> Result<(), LayerError> {
        let Kind::File(None) = entry.kind else {
            return Ok(());
        };
        let Ok(name) = std::str::from_utf8(path) else {
            return Ok(());
        };
        let size = reader.remaining();
        let too_large = |what, limit| Err(LayerError::TooLarge { what, limit });
        if size > FILE_MAX_BYTES {
            return too_large(LimitKind::FileBytes, FILE_MAX_BYTES);
        }
        self.bytes += size;
        if self.bytes > FILES_MAX_BYTES {
            return too_large(LimitKind::ContentBytes, FILES_MAX_BYTES);
        }
        if self.files.len() == FILES_MAX {
            return too_large(LimitKind::Entries, FILES_MAX as u64);
        }
        let mut content = Vec::new();
        loop {
            let chunk = reader.chunk(u64::MAX)?;
            if chunk.is_empty() {
                break;
            }
            content.extend_from_slice(chunk);
            let length = chunk.len();
            reader.consume(length);
        }
        self.files.insert(name.to_owned(), content);
        Ok(())
    }
}

impl LayerDir {
    /// What `path` is once all links are followed inside the root: its path from the root, if it is
    /// a regular file.
    ///
    /// # Errors
    /// Of openat2(2), but for what says that there is no such file.
    pub fn resolve_file(&self, path: &str) -> Result<Option<PathBuf>, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = match openat2(&self.fd, path, flags, Mode::empty(), resolve) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error),
        };
        if FileType::from_raw_mode(fstat(&fd)?.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let shown = |fd: i32| readlink(format!("/proc/self/fd/{fd}"), Vec::new());
        let (root, file) = (shown(self.fd.as_raw_fd())?, shown(fd.as_raw_fd())?);
        let inside = file.as_bytes().strip_prefix(root.as_bytes());
        Ok(inside.map(|inside| PathBuf::from(OsString::from_vec(inside.to_vec()))))
    }

    /// Names in the directory `path`, links followed inside the root; none if it is not there.
    pub fn names(&self, path: &str) -> Vec<OsString> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(fd) = openat2(&self.fd, Path::new(path), flags, Mode::empty(), resolve) else {
            return Vec::new();
        };
        let Ok(entries) = Dir::new(fd) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| {
                Some(OsString::from_vec(
                    entry.ok()?.file_name().to_bytes().into(),
                ))
            })
            .filter(|name| !matches!(name.as_bytes(), b"." | b".."))
            .collect()
    }
}
