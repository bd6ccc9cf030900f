//! Unpacks one layer: a tar stream from anybody becomes a directory for overlayfs.
//!
//! ```text
//!  Reader --Entry--> Unpacker --> Tree (parents) --> one file, link, device, whiteout
//!                       |
//!                       +-- directory attributes, kept until everything is in its place
//! ```
//! - Nothing outside of the layer's directory changes, whatever the archive says.
//! - A later entry wins: a directory over a directory merges, anything else replaces.
//! - `.wh.NAME` hides NAME of lower layers, `.wh..wh..opq` everything of its directory.
//! - Owners, modes, times and extended attributes are those of the archive; directories that it
//!   does not mention are root's, 0755, of 1970. The result depends on the archive alone.
//! - On an error the directory holds what came before; `discard_layer` removes it.
//!
//! Source: OCI image specification, layer.md; kernel, overlayfs.rst.

use std::{
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
        chownat, fchmod, fchown, fsetxattr, futimens, linkat, makedev, mknodat, openat, symlinkat,
        utimensat,
    },
    io::Errno,
    process::{getegid, geteuid},
};
use serde::{Deserialize, Serialize};

use super::{
    error::{LayerError, LimitKind, PathFault},
    tar::{Entry, Kind, Moment, Reader, SparseMap},
    tree::{self, Dir, Tree, failed, shown},
    usage,
};
use crate::{id::Digest, store::Record};

/// A layer that is unpacked and durable: one directory below `layers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Number, which is the name, of its directory.
    pub dir: u32,
    /// Bytes that it takes on disk, within a few per cent.
    pub size_bytes: u64,
    /// Inodes that it takes.
    pub inodes: u64,
    /// Nothing of the layers below it is visible: its root is opaque.
    #[serde(default)]
    pub opaque: bool,
}

impl Record for Layer {
    const TABLE: &'static str = "layer";

    fn id(&self) -> String {
        self.diff_id.to_string()
    }
}

/// What an archive may ask for at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Content of all files together, without holes.
    pub content_bytes: u64,
    /// Size of one file, with holes.
    pub file_bytes: u64,
    /// Headers: files, directories, links, and what extends them.
    pub entries: u64,
    /// One extended header: long name, PAX records with extended attributes.
    pub header_bytes: u64,
    /// Memory for names and attributes of directories, which are kept to the end.
    pub directory_name_bytes: u64,
    /// Components of link targets that are followed to directories; each costs a few calls.
    pub link_steps: u64,
    /// What may follow the end of the archive.
    pub trailing_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            content_bytes: 64 << 30,
            file_bytes: 16 << 40,
            entries: 4_000_000,
            header_bytes: 1 << 20,
            directory_name_bytes: 256 << 20,
            link_steps: 8 << 20,
            trailing_bytes: 1 << 30,
        }
    }
}

/// Where a layer is unpacked to, before it has a number.
#[derive(Debug)]
pub struct LayerDir {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
}

impl LayerDir {
    /// Takes an empty directory. The agent's come from `Rootfs::begin_layer`.
    ///
    /// # Errors
    /// Of open(2).
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        let path = path.to_owned();
        Ok(Self { fd, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What `unpack` saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// SHA-256 of the whole stream.
    pub diff_id: Digest,
    /// Bytes taken on disk, within a few per cent.
    pub size_bytes: u64,
    /// Inodes taken.
    pub inodes: u64,
    /// The root is opaque.
    pub opaque: bool,
    /// Extended attributes that are the host's to set, or that the file system does not take.
    pub skipped_attributes: u64,
}

/// Unpacks the uncompressed tar stream `source`, hashing it to its end; blocking.
///
/// Stops with `Cancelled` soon after `cancelled` is set, but not inside of a read of `source`.
///
/// Extended attributes: `user.*` (of files and directories), `security.capability` and the two
/// POSIX ACLs are set; `trusted.*` is refused, because overlayfs obeys it; all others belong to
/// the host's policy (labels, signatures) and are counted as skipped.
///
/// # Errors
/// See [`LayerError`]; `into` then holds what came before.
pub fn unpack(
    source: impl Read,
    into: &LayerDir,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<Unpacked, LayerError> {
    let mut reader = Reader::new(source, limits, cancelled);
    let mut unpacker = Unpacker::new(into, limits)?;
    while let Some(entry) = reader.next()? {
        unpacker.entry(entry, &mut reader)?;
    }
    let diff_id = reader.finish()?;
    unpacker.finish(into, diff_id, cancelled)
}

/// Prefix of whiteouts, and the whole name of the opaque one.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_WHITEOUT: &[u8] = b".wh..wh..opq";

/// Bookkeeping of AUFS at the root of very old layers; it was never part of the image.
const AUFS: [&[u8]; 3] = [b".wh..wh.aufs", b".wh..wh.orph", b".wh..wh.plnk"];

/// Granularity of disk space.
const DISK_BLOCK: u64 = 4096;

pub(super) struct Unpacker<'a> {
    tree: Tree,
    limits: &'a Limits,
    /// In the order of the archive: of several for a path the last wins.
    directories: Vec<(Vec<u8>, Attributes)>,
    directory_bytes: u64,
    size_bytes: u64,
    opaque: bool,
    skipped_attributes: u64,
    /// Owners that the kernel gives by itself.
    own_uid: u32,
    own_gid: u32,
}

struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Moment,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    /// Of a directory that the archive does not mention.
    fn implied() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Moment::default(),
            xattrs: Vec::new(),
        }
    }

    fn mode(&self) -> Mode {
        Mode::from_raw_mode(self.mode)
    }

    fn times(&self) -> Timestamps {
        let time = Timespec {
            tv_sec: self.mtime.seconds,
            tv_nsec: self.mtime.nanoseconds.into(),
        };
        Timestamps {
            last_access: time,
            last_modification: time,
        }
    }
}

impl<'a> Unpacker<'a> {
    pub(super) fn new(into: &LayerDir, limits: &'a Limits) -> Result<Self, LayerError> {
        let root = into.fd.try_clone().map_err(|error| LayerError::Kernel {
            call: "fcntl",
            path: "/".into(),
            source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        Ok(Self {
            tree: Tree::new(root, limits.link_steps),
            limits,
            directories: vec![(Vec::new(), Attributes::implied())],
            directory_bytes: 0,
            size_bytes: DISK_BLOCK,
            opaque: false,
            skipped_attributes: 0,
            own_uid: geteuid().as_raw(),
            own_gid: getegid().as_raw(),
        })
    }

    pub(super) fn entry<R: Read>(
        &mut self,
        entry: Entry,
        reader: &mut Reader<'_, R>,
    ) -> Result<(), LayerError> {
        let written = &entry.path;
        let path = tree::clean(written).map_err(|fault| bad_path(written, fault))?;
        if let Some(whiteout) = find_whiteout(&path)? {
            return self.whiteout(&path, whiteout);
        }
        let Entry {
            kind,
            link,
            mode,
            uid,
            gid,
            mtime,
            xattrs,
            ..
        } = entry;
        let attributes = Attributes {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        };
        self.check_xattrs(&path, &attributes)?;
        let (parent, name) = tree::split(&path);
        if name.is_empty() {
            return match kind {
                Kind::Directory => self.keep_directory(Vec::new(), attributes),
                _ => Err(bad_path(written, PathFault::Root)),
            };
        }
        let dir = self.tree.directory(parent)?;
        self.keep_implied()?;
        match kind {
            Kind::File(map) => self.file(&dir, name, map, &attributes, reader),
            Kind::HardLink => self.hard_link(&dir, name, &link),
            Kind::Symlink => self.symlink(&dir, name, &link, &attributes),
            Kind::Directory => {
                self.tree.make_directory(&dir, name)?;
                self.keep_directory(dir.join(name), attributes)
            }
            Kind::CharDevice(0, 0) => self.tree.make_whiteout(&dir, name),
            Kind::CharDevice(major, minor) => {
                let device = makedev(major, minor);
                self.node(&dir, name, FileType::CharacterDevice, device, &attributes)
            }
            Kind::BlockDevice(major, minor) => {
                let device = makedev(major, minor);
                self.node(&dir, name, FileType::BlockDevice, device, &attributes)
            }
            Kind::Fifo => self.node(&dir, name, FileType::Fifo, 0, &attributes),
        }
    }

    fn whiteout(&mut self, path: &[u8], whiteout: Whiteout<'_>) -> Result<(), LayerError> {
        let (parent, _) = tree::split(path);
        match whiteout {
            Whiteout::Of(name) => {
                let dir = self.tree.directory(parent)?;
                self.keep_implied()?;
                self.tree.make_whiteout(&dir, name)
            }
            Whiteout::Opaque => {
                let dir = self.tree.directory(parent)?;
                self.keep_implied()?;
                self.opaque |= dir.is_root();
                tree::make_opaque(dir.as_fd(), b".").map_err(failed("fsetxattr", path))
            }
            Whiteout::Aufs => Ok(()),
        }
    }

    fn file<R: Read>(
        &mut self,
        dir: &Dir,
        name: &[u8],
        map: Option<SparseMap>,
        attributes: &Attributes,
        reader: &mut Reader<'_, R>,
    ) -> Result<(), LayerError> {
        let size = map.as_ref().map_or(reader.remaining(), |map| map.real_size);
        if size > self.limits.file_bytes {
            return Err(LayerError::TooLarge {
                what: LimitKind::FileBytes,
                limit: self.limits.file_bytes,
            });
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || openat(dir, name, flags, Mode::RUSR | Mode::WUSR);
        let fd = match open() {
            Err(Errno::EXIST) => {
                self.tree.remove(dir, name)?;
                open()
            }
            other => other,
        };
        let mut file = std::fs::File::from(fd.map_err(failed("openat", &dir.join(name)))?);
        self.tree.count_inode();
        match map {
            None => {
                self.size_bytes += on_disk(size);
                copy(reader, |chunk| file.write_all(chunk), dir, name, u64::MAX)?;
            }
            Some(map) => self.sparse(&file, &map, dir, name, reader)?,
        }
        self.set_attributes(file.as_fd(), attributes)
            .map_err(|(call, error)| failed(call, &dir.join(name))(error))
    }

    fn sparse<R: Read>(
        &mut self,
        file: &std::fs::File,
        map: &SparseMap,
        dir: &Dir,
        name: &[u8],
        reader: &mut Reader<'_, R>,
    ) -> Result<(), LayerError> {
        for segment in &map.segments {
            self.size_bytes += on_disk(segment.length);
            let mut offset = segment.offset;
            let write = |chunk: &[u8]| {
                file.write_all_at(chunk, offset)?;
                offset += chunk.len() as u64;
                Ok(())
            };
            copy(reader, write, dir, name, segment.length)?;
        }
        rustix::fs::ftruncate(file, map.real_size).map_err(failed("ftruncate", &dir.join(name)))
    }

    /// The owner first, because chown(2) takes set-user-ID bits and capabilities away.
    fn set_attributes(
        &mut self,
        fd: rustix::fd::BorrowedFd<'_>,
        attributes: &Attributes,
    ) -> Result<(), (&'static str, Errno)> {
        if let Some((uid, gid)) = self.owner_to_set(attributes) {
            fchown(fd, Some(uid), Some(gid)).map_err(|error| ("fchown", error))?;
        }
        fchmod(fd, attributes.mode()).map_err(|error| ("fchmod", error))?;
        for (name, value) in &attributes.xattrs {
            if !is_settable(name) {
                self.skipped_attributes += 1;
                continue;
            }
            match fsetxattr(fd, &**name, value, XattrFlags::empty()) {
                Ok(()) => {}
                // Without its capabilities a program would be another one.
                Err(Errno::NOTSUP) if name != b"security.capability" => {
                    self.skipped_attributes += 1;
                }
                Err(error) => return Err(("fsetxattr", error)),
            }
        }
        futimens(fd, &attributes.times()).map_err(|error| ("futimens", error))
    }

    fn owner_to_set(&self, attributes: &Attributes) -> Option<(Uid, Gid)> {
        ((attributes.uid, attributes.gid) != (self.own_uid, self.own_gid))
            .then(|| (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid)))
    }

    fn hard_link(&mut self, dir: &Dir, name: &[u8], link: &[u8]) -> Result<(), LayerError> {
        let path = dir.join(name);
        let missing = || LayerError::LinkTarget {
            path: shown(&path),
            target: shown(link),
        };
        let target = tree::clean(link).map_err(|fault| bad_path(link, fault))?;
        let (target_parent, target_name) = tree::split(&target);
        if target_name.is_empty() {
            return Err(missing());
        }
        let target_dir = self
            .tree
            .existing_directory(target_parent)?
            .ok_or_else(missing)?;
        let target = self
            .tree
            .stat(&target_dir, target_name)?
            .ok_or_else(missing)?;
        if tree::is_directory(&target) || tree::is_whiteout(&target) {
            return Err(missing());
        }
        let link = || linkat(&*target_dir, target_name, dir, name, AtFlags::empty());
        match link() {
            Err(Errno::EXIST) => {
                let existing = self.tree.stat(dir, name)?;
                if existing.is_some_and(|existing| existing.st_ino == target.st_ino) {
                    return Ok(());
                }
                self.tree.remove(dir, name)?;
                // The removal may have taken the target's directory along.
                link().map_err(|error| match error {
                    Errno::NOENT => missing(),
                    other => failed("linkat", &path)(other),
                })
            }
            other => other.map_err(failed("linkat", &path)),
        }
    }

    fn symlink(
        &mut self,
        dir: &Dir,
        name: &[u8],
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<(), LayerError> {
        let path = || dir.join(name);
        if target.contains(&0) {
            return Err(bad_path(&path(), PathFault::Nul));
        }
        if target.is_empty() {
            return Err(bad_path(&path(), PathFault::Empty));
        }
        if target.len() > tree::MAX_PATH {
            return Err(bad_path(&path(), PathFault::TooLong));
        }
        let link = || symlinkat(target, dir, name);
        let linked = match link() {
            Err(Errno::EXIST) => {
                self.tree.remove(dir, name)?;
                link()
            }
            other => other,
        };
        linked.map_err(failed("symlinkat", &path()))?;
        self.tree.count_inode();
        if let Some((uid, gid)) = self.owner_to_set(attributes) {
            chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(failed("fchownat", &path()))?;
        }
        // The kernel has no attributes of ours for links.
        self.skipped_attributes += attributes.xattrs.len() as u64;
        utimensat(dir, name, &attributes.times(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("utimensat", &path()))
    }

    fn node(
        &mut self,
        dir: &Dir,
        name: &[u8],
        kind: FileType,
        device: u64,
        attributes: &Attributes,
    ) -> Result<(), LayerError> {
        let path = || dir.join(name);
        let make = || mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, device);
        let made = match make() {
            Err(Errno::EXIST) => {
                self.tree.remove(dir, name)?;
                make()
            }
            other => other,
        };
        made.map_err(failed("mknodat", &path()))?;
        self.tree.count_inode();
        if let Some((uid, gid)) = self.owner_to_set(attributes) {
            chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(failed("fchownat", &path()))?;
        }
        chmodat(dir, name, attributes.mode(), AtFlags::empty())
            .map_err(failed("fchmodat", &path()))?;
        self.skipped_attributes += attributes.xattrs.len() as u64;
        utimensat(dir, name, &attributes.times(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("utimensat", &path()))
    }

    /// Keeps attributes for the end: children still change the time, and need to be made.
    fn keep_directory(&mut self, path: Vec<u8>, attributes: Attributes) -> Result<(), LayerError> {
        let xattrs = &attributes.xattrs;
        let xattr_bytes: usize = xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        self.directory_bytes += (path.len() + xattr_bytes) as u64;
        let limit = self.limits.directory_name_bytes;
        if self.directory_bytes > limit {
            let what = LimitKind::DirectoryNames;
            return Err(LayerError::TooLarge { what, limit });
        }
        self.size_bytes += DISK_BLOCK;
        self.directories.push((path, attributes));
        Ok(())
    }

    fn keep_implied(&mut self) -> Result<(), LayerError> {
        for path in self.tree.take_implied() {
            self.keep_directory(path, Attributes::implied())?;
        }
        Ok(())
    }

    fn check_xattrs(&self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError> {
        match attributes
            .xattrs
            .iter()
            .find(|(name, _)| name.starts_with(b"trusted."))
        {
            Some((name, _)) => Err(LayerError::Attribute {
                path: shown(path),
                name: String::from_utf8_lossy(name).into_owned(),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn finish(
        mut self,
        into: &LayerDir,
        diff_id: Digest,
        cancelled: &AtomicBool,
    ) -> Result<Unpacked, LayerError> {
        for (path, attributes) in std::mem::take(&mut self.directories) {
            if cancelled.load(Ordering::Relaxed) {
                return Err(LayerError::Cancelled);
            }
            if let Some(fd) = self.tree.reopen(&path)? {
                self.set_attributes(fd.as_fd(), &attributes)
                    .map_err(|(call, error)| failed(call, &path)(error))?;
            }
        }
        let (size_bytes, inodes) = match self.tree.inodes() {
            Some(inodes) => (self.size_bytes, inodes),
            None => {
                let usage = usage::of_still_tree(&into.fd).map_err(failed("getdents64", b"/"))?;
                (usage.bytes, usage.inodes)
            }
        };
        Ok(Unpacked {
            diff_id,
            size_bytes,
            inodes,
            opaque: self.opaque,
            skipped_attributes: self.skipped_attributes,
        })
    }
}

/// Moves at most `length` bytes of content to `write`.
fn copy<R: Read>(
    reader: &mut Reader<'_, R>,
    mut write: impl FnMut(&[u8]) -> io::Result<()>,
    dir: &Dir,
    name: &[u8],
    mut length: u64,
) -> Result<(), LayerError> {
    loop {
        let chunk = reader.chunk(length)?;
        if chunk.is_empty() {
            return Ok(());
        }
        write(chunk).map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            failed("write", &dir.join(name))(errno)
        })?;
        let written = chunk.len();
        reader.consume(written);
        length -= written as u64;
    }
}

pub(super) enum Whiteout<'a> {
    Of(&'a [u8]),
    Opaque,
    Aufs,
}

/// The whiteout that the clean `path` is, if it is one.
pub(super) fn find_whiteout(path: &[u8]) -> Result<Option<Whiteout<'_>>, LayerError> {
    // The prefix is rare, and looking for it is quick.
    if !path.windows(WHITEOUT.len()).any(|part| part == WHITEOUT) {
        return Ok(None);
    }
    let refused = || LayerError::Whiteout { path: shown(path) };
    let first = path.split(|byte| *byte == b'/').next().unwrap_or_default();
    if AUFS.contains(&first) {
        return Ok(Some(Whiteout::Aufs));
    }
    let (parent, name) = tree::split(path);
    let mut above = parent.split(|byte| *byte == b'/');
    if above.any(|component| component.starts_with(WHITEOUT)) {
        return Err(refused());
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(None),
        Some(_) if name == OPAQUE_WHITEOUT => Ok(Some(Whiteout::Opaque)),
        Some(b"" | b"." | b"..") => Err(refused()),
        Some(hidden) if hidden.starts_with(WHITEOUT) => Err(refused()),
        Some(hidden) => Ok(Some(Whiteout::Of(hidden))),
    }
}

/// Whole blocks.
fn on_disk(bytes: u64) -> u64 {
    bytes.div_ceil(DISK_BLOCK).saturating_mul(DISK_BLOCK)
}

/// Attributes of files and directories that belong to the image.
pub(super) fn is_settable(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        )
}

fn bad_path(path: &[u8], fault: PathFault) -> LayerError {
    let path = shown(path);
    LayerError::Path { path, fault }
}
