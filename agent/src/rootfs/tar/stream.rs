//! The bytes of an archive: buffered, hashed as they arrive, bounded, cancellable.

use std::{
    io::{self, Read},
    sync::atomic::{AtomicBool, Ordering},
};

use sha2::{Digest as _, Sha256};

use crate::{
    id::Digest,
    rootfs::error::{LayerError, LimitKind},
};

pub(super) const BLOCK: usize = 512;

/// One read, one hash update and, within a large file, one write have this size.
const BUFFER: usize = 256 << 10;

pub(super) struct Stream<'a, R> {
    source: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes that came from the source.
    total: u64,
    ended: bool,
    hasher: Sha256,
    cancelled: &'a AtomicBool,
}

impl<'a, R: Read> Stream<'a, R> {
    pub(super) fn new(source: R, cancelled: &'a AtomicBool) -> Self {
        Self {
            source,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            total: 0,
            ended: false,
            hasher: Sha256::new(),
            cancelled,
        }
    }

    /// Offset of the next byte.
    pub(super) fn offset(&self) -> u64 {
        self.total - (self.end - self.start) as u64
    }

    pub(super) fn truncated(&self) -> LayerError {
        LayerError::Truncated { offset: self.total }
    }

    /// The next block; `None` if the stream ends right before it.
    pub(super) fn block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        self.check_cancelled()?;
        if self.end - self.start < BLOCK {
            self.fill()?;
        }
        let rest = &self.buffer[self.start..self.end];
        match rest.first_chunk::<BLOCK>() {
            Some(block) => {
                self.start += BLOCK;
                Ok(Some(*block))
            }
            None if rest.is_empty() => Ok(None),
            None => Err(self.truncated()),
        }
    }

    /// Between one byte and `wanted` of the next bytes; `consume` takes them.
    pub(super) fn chunk(&mut self, wanted: u64) -> Result<&[u8], LayerError> {
        if self.start == self.end {
            self.fill()?;
            if self.start == self.end {
                return Err(self.truncated());
            }
        }
        let here = (self.end - self.start) as u64;
        let length = here.min(wanted) as usize;
        Ok(&self.buffer[self.start..self.start + length])
    }

    pub(super) fn consume(&mut self, length: usize) {
        self.start += length;
    }

    pub(super) fn skip(&mut self, mut length: u64) -> Result<(), LayerError> {
        while length > 0 {
            let taken = self.chunk(length)?.len();
            self.consume(taken);
            length -= taken as u64;
        }
        Ok(())
    }

    /// Reads and hashes what follows the archive, and returns the digest of everything.
    pub(super) fn finish(mut self, trailing_limit: u64) -> Result<Digest, LayerError> {
        let archive = self.offset();
        loop {
            if self.total - archive > trailing_limit {
                return Err(LayerError::TooLarge {
                    what: LimitKind::TrailingBytes,
                    limit: trailing_limit,
                });
            }
            self.start = self.end;
            self.fill()?;
            if self.start == self.end {
                return Ok(Digest::from_sha256(self.hasher.finalize().into()));
            }
        }
    }

    /// Reads until the buffer is full or the source ends; keeps unread bytes.
    fn fill(&mut self) -> Result<(), LayerError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let old_end = self.end;
        while self.end < self.buffer.len() && !self.ended {
            self.check_cancelled()?;
            match self.source.read(&mut self.buffer[self.end..]) {
                Ok(0) => self.ended = true,
                Ok(length) => {
                    self.end += length;
                    self.total += length as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let offset = self.total;
                    return Err(LayerError::Source { offset, source });
                }
            }
        }
        self.hasher.update(&self.buffer[old_end..self.end]);
        Ok(())
    }

    fn check_cancelled(&self) -> Result<(), LayerError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(LayerError::Cancelled);
        }
        Ok(())
    }
}
