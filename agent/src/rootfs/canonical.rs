//! A tree as the one tar that stands for it: what is in it and its order depend on the tree alone.
//!
//! Depth first, names in the order of their bytes, `./` first; whole seconds; owners by number. A
//! file with several names has its content at the first, and links at the others. Headers are ustar,
//! with PAX records only for what these can't say. Unpacking the tar gives the tree again, so its
//! digest is the diff ID of a layer that did not come as a layer.
//!
//! Source: POSIX pax(1), "ustar Interchange Format" and "pax Extended Header".

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Read, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{
        Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fgetxattr, flistxattr, fstat, openat2,
        readlinkat,
    },
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::{
    error::{LayerError, LimitKind},
    layer::is_settable,
    tree::failed,
};
use crate::id::Digest;

const BLOCK: usize = 512;
const BUFFER: usize = 256 << 10;
/// Largest numbers of the fields of 8 and of 12 bytes.
const SHORT_MAX: u64 = 0o7_777_777;
const LONG_MAX: u64 = 0o77_777_777_777;

/// Digest and length of the tar of the tree `root`, in which nobody works; blocking.
///
/// # Errors
/// `TooLarge` above `limit_bytes`, `Cancelled`, `Kernel`.
pub(super) fn digest(
    root: BorrowedFd<'_>,
    limit_bytes: u64,
    cancelled: &AtomicBool,
) -> Result<(Digest, u64), LayerError> {
    let mut hash = Hash(Sha256::new());
    let written = write(root, &mut hash, limit_bytes, cancelled)?;
    Ok((Digest::from_sha256(hash.0.finalize().into()), written))
}

/// Writes small files and, below `rootfs/`, the tree `root` as one tar.
pub(super) fn write_unified(
    root: BorrowedFd<'_>,
    files: &[(String, Vec<u8>)],
    out: impl Write,
    cancelled: &AtomicBool,
) -> Result<(), LayerError> {
    let mut writer = Writer::new(root, b"rootfs", out, u64::MAX, cancelled);
    for (name, content) in files {
        let head = Head {
            name: name.clone().into_bytes(),
            kind: b'0',
            mode: 0o644,
            size: content.len() as u64,
            ..Head::default()
        };
        writer.head(&head, name.as_bytes())?;
        writer.put(content, name.as_bytes())?;
        writer.fill(head.size, name.as_bytes())?;
    }
    writer.tree()
}

/// Writes the tar of the tree `root` and returns its length; see [`digest`].
fn write(
    root: BorrowedFd<'_>,
    out: impl Write,
    limit_bytes: u64,
    cancelled: &AtomicBool,
) -> Result<u64, LayerError> {
    let mut writer = Writer::new(root, b"", out, limit_bytes, cancelled);
    writer.tree()?;
    Ok(writer.written)
}
struct Hash(Sha256);

impl Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Writer<'a, W> {
    root: BorrowedFd<'a>,
    /// What the names of the tree begin with.
    top: &'static [u8],
    out: W,
    written: u64,
    limit_bytes: u64,
    cancelled: &'a AtomicBool,
    /// Where the content of files with several names is.
    first_names: HashMap<u64, Vec<u8>>,
    buffer: Vec<u8>,
}

impl<'a, W: Write> Writer<'a, W> {
    fn new(
        root: BorrowedFd<'a>,
        top: &'static [u8],
        out: W,
        limit_bytes: u64,
        cancelled: &'a AtomicBool,
    ) -> Self {
        Self {
            root,
            top,
            out,
            written: 0,
            limit_bytes,
            cancelled,
            first_names: HashMap::new(),
            buffer: vec![0; BUFFER],
        }
    }

    /// The name in the archive of something in the tree.
    fn named(&self, path: &[u8]) -> Vec<u8> {
        match (self.top, path) {
            (b"", b"") => b".".to_vec(),
            (b"", path) => path.to_vec(),
            (top, b"") => top.to_vec(),
            (top, path) => [top, b"/", path].concat(),
        }
    }

    fn tree(&mut self) -> Result<(), LayerError> {
        self.entry(b"")?;
        let mut above = vec![(Vec::new(), self.names(b"")?.into_iter())];
        while let Some((dir, names)) = above.last_mut() {
            let Some(name) = names.next() else {
                above.pop();
                continue;
            };
            let path = match &**dir {
                b"" => name,
                dir => [dir, b"/", &*name].concat(),
            };
            if self.entry(&path)? {
                let names = self.names(&path)?.into_iter();
                above.push((path, names));
            }
        }
        self.put(&[0; 2 * BLOCK], b"")
    }

    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, LayerError> {
        let name = if path.is_empty() { b"." } else { path };
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        openat2(self.root, name, flags, Mode::empty(), resolve).map_err(failed("openat2", path))
    }

    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>, LayerError> {
        let fd = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let list = || -> Result<Vec<Vec<u8>>, Errno> {
            let entries = Dir::new(fd)?;
            let mut names = Vec::new();
            for entry in entries {
                let name = entry?.file_name().to_bytes().to_vec();
                if name != b"." && name != b".." {
                    names.push(name);
                }
            }
            names.sort_unstable();
            Ok(names)
        };
        list().map_err(failed("getdents64", path))
    }

    /// Writes one entry; true if it is a directory.
    fn entry(&mut self, path: &[u8]) -> Result<bool, LayerError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(LayerError::Cancelled);
        }
        let fd = self.open(path, OFlags::PATH)?;
        let stat = fstat(&fd).map_err(failed("fstat", path))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut head = Head::new(self.named(path), &stat);
        match kind {
            FileType::Directory => {
                head.kind = b'5';
                head.name.push(b'/');
                let fd = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
                head.xattrs(&fd).map_err(failed("fgetxattr", path))?;
                self.head(&head, path)?;
                return Ok(true);
            }
            FileType::Symlink => {
                head.kind = b'2';
                let target = readlinkat(&fd, "", Vec::new()).map_err(failed("readlinkat", path))?;
                head.link = target.into_bytes();
                self.head(&head, path)?;
            }
            FileType::RegularFile => {
                if stat.st_nlink > 1 {
                    if let Some(first) = self.first_names.get(&stat.st_ino) {
                        head.kind = b'1';
                        head.link = self.named(first);
                        return self.head(&head, path).map(|()| false);
                    }
                    self.first_names.insert(stat.st_ino, path.to_vec());
                }
                head.size = stat.st_size.cast_unsigned();
                let file = File::from(self.open(path, OFlags::RDONLY)?);
                head.xattrs(&file).map_err(failed("fgetxattr", path))?;
                self.head(&head, path)?;
                self.content(file, head.size, path)?;
            }
            FileType::Fifo => {
                head.kind = b'6';
                self.head(&head, path)?;
            }
            // Nothing else is made in such a tree.
            _ => {
                return Err(LayerError::Unsupported {
                    path: super::tree::shown(path),
                    kind: b'?',
                });
            }
        }
        Ok(false)
    }

    fn head(&mut self, head: &Head, path: &[u8]) -> Result<(), LayerError> {
        let records = head.records();
        if !records.is_empty() {
            let extended = Head {
                name: b"PaxHeader".to_vec(),
                kind: b'x',
                mode: 0o644,
                size: records.len() as u64,
                ..Head::default()
            };
            self.put(&extended.block(), path)?;
            self.put(&records, path)?;
            self.fill(records.len() as u64, path)?;
        }
        self.put(&head.block(), path)
    }

    fn content(&mut self, mut file: File, size: u64, path: &[u8]) -> Result<(), LayerError> {
        let mut left = size;
        let mut buffer = std::mem::take(&mut self.buffer);
        while left > 0 {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(LayerError::Cancelled);
            }
            let wanted = left.min(BUFFER as u64) as usize;
            file.read_exact(&mut buffer[..wanted]).map_err(|error| {
                failed("read", path)(Errno::from_io_error(&error).unwrap_or(Errno::IO))
            })?;
            self.put(&buffer[..wanted], path)?;
            left -= wanted as u64;
        }
        self.buffer = buffer;
        self.fill(size, path)
    }

    /// Fills the last block of something with `size` bytes.
    fn fill(&mut self, size: u64, path: &[u8]) -> Result<(), LayerError> {
        let fill = size.wrapping_neg() % BLOCK as u64;
        self.put(&[0; BLOCK][..fill as usize], path)
    }

    fn put(&mut self, bytes: &[u8], path: &[u8]) -> Result<(), LayerError> {
        self.written += bytes.len() as u64;
        if self.written > self.limit_bytes {
            return Err(LayerError::TooLarge {
                what: LimitKind::ContentBytes,
                limit: self.limit_bytes,
            });
        }
        self.out.write_all(bytes).map_err(|error| {
            failed("write", path)(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        })
    }
}

/// What a header says.
#[derive(Default)]
struct Head {
    name: Vec<u8>,
    kind: u8,
    link: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: i64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Head {
    fn new(name: Vec<u8>, stat: &Stat) -> Self {
        Self {
            name,
            kind: b'0',
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            ..Self::default()
        }
    }

    fn xattrs(&mut self, fd: impl AsFd) -> Result<(), Errno> {
        let mut names = vec![0; 64 << 10];
        let length = match flistxattr(&fd, &mut *names) {
            Ok(length) => length,
            Err(Errno::NOTSUP) => return Ok(()),
            Err(error) => return Err(error),
        };
        for name in names[..length].split(|byte| *byte == 0) {
            if !is_settable(name) {
                continue;
            }
            let mut value = vec![0; 64 << 10];
            let length = fgetxattr(&fd, name, &mut *value)?;
            value.truncate(length);
            self.xattrs.insert(name.to_vec(), value);
        }
        Ok(())
    }

    /// PAX records for what the header has no room for, in the order of their keys.
    fn records(&self) -> Vec<u8> {
        let mut records: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut say = |key: &str, value: &[u8]| {
            records.insert(key.into(), value.to_vec());
        };
        if self.name.len() > 100 {
            say("path", &self.name);
        }
        if self.link.len() > 100 {
            say("linkpath", &self.link);
        }
        for (key, id) in [("uid", self.uid), ("gid", self.gid)] {
            if u64::from(id) > SHORT_MAX {
                say(key, id.to_string().as_bytes());
            }
        }
        if self.size > LONG_MAX {
            say("size", self.size.to_string().as_bytes());
        }
        if !fits(self.mtime) {
            say("mtime", self.mtime.to_string().as_bytes());
        }
        for (name, value) in &self.xattrs {
            records.insert([b"SCHILY.xattr.", &**name].concat(), value.clone());
        }
        let mut bytes = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            // The length counts its own digits.
            let mut length = rest;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            bytes.extend_from_slice(length.to_string().as_bytes());
            bytes.push(b' ');
            bytes.extend_from_slice(&key);
            bytes.push(b'=');
            bytes.extend_from_slice(&value);
            bytes.push(b'\n');
        }
        bytes
    }

    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut text = |at: usize, value: &[u8]| {
            let length = value.len().min(100);
            block[at..at + length].copy_from_slice(&value[..length]);
        };
        text(0, &self.name);
        text(157, &self.link);
        let mut octal = |at: usize, width: usize, value: u64| {
            let digits = format!("{value:0width$o}");
            block[at..at + width].copy_from_slice(digits.as_bytes());
        };
        let or_zero = |value: u64, largest: u64| if value > largest { 0 } else { value };
        octal(100, 7, self.mode.into());
        octal(108, 7, or_zero(self.uid.into(), SHORT_MAX));
        octal(116, 7, or_zero(self.gid.into(), SHORT_MAX));
        octal(124, 11, or_zero(self.size, LONG_MAX));
        let mtime = if fits(self.mtime) { self.mtime } else { 0 };
        octal(136, 11, mtime.cast_unsigned());
        octal(329, 7, 0);
        octal(337, 7, 0);
        block[156] = self.kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }
}

fn fits(mtime: i64) -> bool {
    u64::try_from(mtime).is_ok_and(|mtime| mtime <= LONG_MAX)
}
