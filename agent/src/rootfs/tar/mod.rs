//! Reads a tar stream from an untrusted source: one entry at a time, bounded memory, typed errors.
//!
//! ```text
//!  source --read--> Stream (hash, cancel, bounds) --blocks--> Reader --Entry--> layer.rs
//!                                                 --content chunks, no copy---->
//! ```
//! It reads what the writers of image layers write: V7, ustar, star, GNU and PAX headers, long
//! names, numbers in base 256, sparse files. Where readers differ it does as Go's `archive/tar`
//! does, since most images were made with it: blank numbers are zero, links and directories have
//! no content whatever their size says, global PAX headers change nothing, an archive may end
//! without blocks of zeros. Names are not judged here.

mod header;
mod pax;
mod sparse;
mod stream;

use std::{ffi::OsStr, io::Read, os::unix::ffi::OsStrExt, sync::atomic::AtomicBool};

use self::{
    header::{Header, gnu_sparse_block},
    pax::Pax,
    sparse::{MAX_SEGMENTS, decimal},
    stream::{BLOCK, Stream},
};
pub(super) use self::{
    pax::Moment,
    sparse::{Segment, SparseMap},
};
use super::{
    error::{HeaderFault, LayerError, LimitKind},
    layer::Limits,
};
use crate::id::Digest;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File(Option<SparseMap>),
    HardLink,
    Symlink,
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Directory,
    Fifo,
}

/// A header with everything that extended headers said about it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Moment,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// See the module.
pub(super) struct Reader<'a, R> {
    stream: Stream<'a, R>,
    limits: &'a Limits,
    entries: u64,
    content: u64,
    /// Content of the current entry that nobody has read yet, and what fills its last block.
    remaining: u64,
    padding: u64,
}

/// What extended headers say about the entry after them.
#[derive(Default)]
struct Extended {
    pax: Pax,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    any: bool,
}

impl<'a, R: Read> Reader<'a, R> {
    pub(super) fn new(source: R, limits: &'a Limits, cancelled: &'a AtomicBool) -> Self {
        Self {
            stream: Stream::new(source, cancelled),
            limits,
            entries: 0,
            content: 0,
            remaining: 0,
            padding: 0,
        }
    }

    /// The next entry; skips what is left of the one before. `None` at the end of the archive.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut extended = Extended::default();
        loop {
            self.stream.skip(self.remaining)?;
            self.stream.skip(self.padding)?;
            (self.remaining, self.padding) = (0, 0);
            let Some(block) = self.header_block()? else {
                // Headers that refine nothing: something is missing.
                return if extended.any {
                    Err(self.stream.truncated())
                } else {
                    Ok(None)
                };
            };
            let header = Header::new(&block).map_err(|fault| self.fault(fault))?;
            let size = header.size().map_err(|fault| self.fault(fault))?;
            match header.kind() {
                b'x' | b'X' => {
                    let records = self.extended_header(size)?;
                    extended.pax = pax::parse(&records).map_err(|fault| self.fault(fault))?;
                }
                b'L' => extended.long_name = Some(self.long_text(size)?),
                b'K' => extended.long_link = Some(self.long_text(size)?),
                // Global headers and volume labels say nothing about files.
                b'g' | b'V' => {
                    self.begin_content(size)?;
                    continue;
                }
                kind => return self.entry(&header, kind, size, extended).map(Some),
            }
            extended.any = true;
        }
    }

    /// Content of the current entry that is at hand; empty at its end. `consume` takes it.
    pub(super) fn chunk(&mut self, wanted: u64) -> Result<&[u8], LayerError> {
        let wanted = self.remaining.min(wanted);
        if wanted == 0 {
            return Ok(&[]);
        }
        self.stream.chunk(wanted)
    }

    pub(super) fn consume(&mut self, length: usize) {
        self.stream.consume(length);
        self.remaining -= length as u64;
    }

    /// Content of the current entry that nobody has read yet.
    pub(super) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Reads the stream to its end and returns the digest of all of it.
    pub(super) fn finish(self) -> Result<Digest, LayerError> {
        self.stream.finish(self.limits.trailing_bytes)
    }

    /// A header, or `None` after a block of zeros or at the end of the stream.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let is_zero = |block: &[u8; BLOCK]| block.iter().all(|byte| *byte == 0);
        let Some(block) = self.stream.block()? else {
            return Ok(None);
        };
        if !is_zero(&block) {
            self.count_entry()?;
            return Ok(Some(block));
        }
        match self.stream.block()? {
            Some(second) if !is_zero(&second) => Err(self.fault(HeaderFault::LoneZeroBlock)),
            _ => Ok(None),
        }
    }

    fn count_entry(&mut self) -> Result<(), LayerError> {
        self.entries += 1;
        let limit = self.limits.entries;
        if self.entries > limit {
            let what = LimitKind::Entries;
            return Err(LayerError::TooLarge { what, limit });
        }
        Ok(())
    }

    fn begin_content(&mut self, size: u64) -> Result<(), LayerError> {
        let limit = self.limits.content_bytes;
        self.content = self.content.saturating_add(size);
        if self.content > limit {
            let what = LimitKind::ContentBytes;
            return Err(LayerError::TooLarge { what, limit });
        }
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        Ok(())
    }

    /// All content of an extended header.
    fn extended_header(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        if size > self.limits.header_bytes {
            return Err(self.fault(HeaderFault::TooLong));
        }
        self.begin_content(size)?;
        let mut content = Vec::new();
        while self.remaining > 0 {
            let chunk = self.chunk(u64::MAX)?;
            content.extend_from_slice(chunk);
            let length = chunk.len();
            self.consume(length);
        }
        Ok(content)
    }

    fn long_text(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        let mut text = self.extended_header(size)?;
        if let Some(end) = text.iter().position(|byte| *byte == 0) {
            text.truncate(end);
        }
        Ok(text)
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        kind: u8,
        size: u64,
        extended: Extended,
    ) -> Result<Entry, LayerError> {
        let Extended {
            pax,
            long_name,
            long_link,
            ..
        } = extended;
        let path = long_name
            .filter(|name| !name.is_empty())
            .or(pax.sparse.name.clone())
            .or(pax.path)
            .unwrap_or_else(|| header.name());
        let size = pax.size.unwrap_or(size);
        let kind = match kind {
            b'0' | b'7' => {
                self.begin_content(size)?;
                Kind::File(self.pax_sparse_map(pax.sparse, &path)?)
            }
            b'S' => {
                let map = self.gnu_sparse_map(header, size, &path)?;
                self.begin_content(size)?;
                Kind::File(Some(map))
            }
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' | b'4' => {
                let (major, minor) = header.device().map_err(|fault| self.fault(fault))?;
                match kind {
                    b'3' => Kind::CharDevice(major, minor),
                    _ => Kind::BlockDevice(major, minor),
                }
            }
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            _ => {
                let path = OsStr::from_bytes(&path).into();
                return Err(LayerError::Unsupported { path, kind });
            }
        };
        let mtime = || {
            let seconds = header.mtime()?;
            Ok(Moment {
                seconds,
                nanoseconds: 0,
            })
        };
        let attributes = || -> Result<_, HeaderFault> {
            Ok((
                header.mode()?,
                pax.uid.map_or_else(|| header.uid(), Ok)?,
                pax.gid.map_or_else(|| header.gid(), Ok)?,
                pax.mtime.map_or_else(mtime, Ok)?,
            ))
        };
        let (mode, uid, gid, mtime) = attributes().map_err(|fault| self.fault(fault))?;
        Ok(Entry {
            path,
            kind,
            link: long_link
                .filter(|link| !link.is_empty())
                .or(pax.link)
                .unwrap_or_else(|| header.link().to_vec()),
            mode,
            uid,
            gid,
            mtime,
            xattrs: pax.xattrs,
        })
    }

    fn gnu_sparse_map(
        &mut self,
        header: &Header<'_>,
        size: u64,
        path: &[u8],
    ) -> Result<SparseMap, LayerError> {
        let bad = || bad_sparse(path);
        let (real_size, mut segments, mut more) = header.gnu_sparse().ok_or_else(bad)?;
        while more {
            let block = self
                .stream
                .block()?
                .ok_or_else(|| self.stream.truncated())?;
            let (further, again) = gnu_sparse_block(&block).ok_or_else(bad)?;
            segments.extend(further);
            more = again;
            if segments.len() > MAX_SEGMENTS {
                return Err(bad());
            }
            self.count_entry()?;
        }
        SparseMap::new(real_size, segments, size).ok_or_else(bad)
    }

    /// The map of a file in one of the PAX sparse formats; `None` for any other file.
    fn pax_sparse_map(
        &mut self,
        sparse: pax::PaxSparse,
        path: &[u8],
    ) -> Result<Option<SparseMap>, LayerError> {
        let segments = if sparse.map_in_content {
            self.map_in_content(path)?
        } else {
            match sparse.segments {
                Some(segments) => segments,
                None => return Ok(None),
            }
        };
        let real_size = sparse.real_size.ok_or_else(|| bad_sparse(path))?;
        SparseMap::new(real_size, segments, self.remaining)
            .map(Some)
            .ok_or_else(|| bad_sparse(path))
    }

    /// Format 1.0: lines of decimal numbers, how many pairs first, filled up to whole blocks.
    fn map_in_content(&mut self, path: &[u8]) -> Result<Vec<Segment>, LayerError> {
        let bad = || bad_sparse(path);
        let mut read = 0;
        let mut number = |reader: &mut Self| -> Result<u64, LayerError> {
            let mut digits = Vec::new();
            loop {
                let byte = *reader.chunk(1)?.first().ok_or_else(bad)?;
                reader.consume(1);
                read += 1;
                match byte {
                    b'\n' => return decimal(&digits).ok_or_else(bad),
                    digit if digits.len() < 20 => digits.push(digit),
                    _ => return Err(bad()),
                }
            }
        };
        let count = number(self)?;
        if count > MAX_SEGMENTS as u64 {
            return Err(bad());
        }
        let mut segments = Vec::new();
        for _ in 0..count {
            let (offset, length) = (number(self)?, number(self)?);
            segments.push(Segment { offset, length });
        }
        let mut fill = u64::next_multiple_of(read, BLOCK as u64) - read;
        while fill > 0 {
            let length = self.chunk(fill)?.len();
            if length == 0 {
                return Err(bad());
            }
            self.consume(length);
            fill -= length as u64;
        }
        Ok(segments)
    }

    fn fault(&self, fault: HeaderFault) -> LayerError {
        let offset = self.stream.offset();
        LayerError::Header { offset, fault }
    }
}

fn bad_sparse(path: &[u8]) -> LayerError {
    let path = OsStr::from_bytes(path).into();
    LayerError::Sparse { path }
}
