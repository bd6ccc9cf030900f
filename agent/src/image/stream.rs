//! A compressed layer on its way to the unpacker: first what is on disk, then what arrives.
//!
//! ```text
//! blobs/partial/<hex> --\
//!                        >-- hash, count --> decompress --> rootfs::unpack
//! registry --channel----/ \
//!                          `--> append to blobs/partial/<hex>
//! ```
//! This end runs in a blocking lane. The channel is short, so a slow disk slows the network down and
//! no layer is ever in memory as a whole.

use std::fs::File;
use std::io::{self, BufRead, Read};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::content::Partial;
use super::manifest::Compression;
use crate::id::Digest;

const REPLAY_CHUNK_BYTES: usize = 256 << 10;
/// Window of zstd that a layer may ask us to keep in memory: 128 MiB, as its own tool has it.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Dictionary of xz that an image may ask us to keep in memory: its own tool's largest is 64 MiB.
const XZ_MEMORY_MAX_BYTES: u64 = 160 << 20;

/// The compressed bytes, hashed as they pass.
pub(crate) struct LayerStream {
    partial: Option<Partial>,
    /// What is left of the partial blob to read again.
    replay: Option<(File, u64)>,
    incoming: mpsc::Receiver<Bytes>,
    current: Bytes,
    hash: Sha256,
    /// Hashes what came before this stream, and then the stream.
    combined: Option<Sha256>,
    passed_bytes: u64,
    size_bytes: u64,
}

impl LayerStream {
    /// Makes the stream of a layer of `size_bytes`; `incoming` goes on where `partial` ends.
    pub(crate) fn new(
        partial: Option<(Partial, File)>,
        incoming: mpsc::Receiver<Bytes>,
        size_bytes: u64,
    ) -> LayerStream {
        let (partial, replay) = match partial {
            Some((partial, file)) => {
                let have = partial.have_bytes();
                (Some(partial), Some((file, have)))
            }
            None => (None, None),
        };
        LayerStream {
            partial,
            replay,
            incoming,
            current: Bytes::new(),
            hash: Sha256::new(),
            combined: None,
            passed_bytes: 0,
            size_bytes,
        }
    }

    /// Also hashes this stream together with what `before` has seen.
    pub(crate) fn combined_with(mut self, before: Sha256) -> LayerStream {
        self.combined = Some(before);
        self
    }

    /// How the content is packed, by its first bytes, which stay.
    pub(crate) fn packing(&mut self) -> io::Result<Packing> {
        while self.current.len() < Packing::MAGIC_BYTES && self.passed_bytes < self.size_bytes {
            let chunk = self.next_chunk()?;
            self.take(&chunk);
            self.current = [&*self.current, &*chunk].concat().into();
        }
        Ok(Packing::of(&self.current))
    }

    fn take(&mut self, chunk: &[u8]) {
        self.hash.update(chunk);
        if let Some(combined) = &mut self.combined {
            combined.update(chunk);
        }
        self.passed_bytes += chunk.len() as u64;
    }

    /// Reads what the unpacker has left, and returns the digest of all, with the partial blob.
    pub(crate) fn finish(self) -> (io::Result<Digest>, Option<Partial>) {
        let (digests, partial) = self.finish_combined();
        (digests.map(|(digest, _)| digest), partial)
    }

    /// Like `finish`, also with the digest of what came before and this stream.
    pub(crate) fn finish_combined(
        mut self,
    ) -> (io::Result<(Digest, Option<Digest>)>, Option<Partial>) {
        let drained = loop {
            match self.fill_buf() {
                Ok([]) => break Ok(()),
                Ok(rest) => {
                    let length = rest.len();
                    self.consume(length);
                }
                Err(error) => break Err(error),
            }
        };
        let digest = |hash: Sha256| Digest::from_sha256(hash.finalize().into());
        let digests = drained.map(|()| (digest(self.hash), self.combined.map(digest)));
        (digests, self.partial)
    }

    fn next_chunk(&mut self) -> io::Result<Bytes> {
        if let Some((file, left)) = &mut self.replay {
            if *left > 0 {
                let wanted = usize::try_from(*left)
                    .unwrap_or(usize::MAX)
                    .min(REPLAY_CHUNK_BYTES);
                let mut chunk = vec![0; wanted];
                file.read_exact(&mut chunk)?;
                *left -= wanted as u64;
                return Ok(chunk.into());
            }
            self.replay = None;
        }
        // Closed before the end: the fetch failed or was cancelled, and says why itself.
        let Some(chunk) = self.incoming.blocking_recv() else {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the fetch ended early",
            ));
        };
        if let Some(partial) = &mut self.partial {
            partial.append(&chunk);
        }
        Ok(chunk)
    }
}

impl BufRead for LayerStream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && self.passed_bytes < self.size_bytes {
            let chunk = self.next_chunk()?;
            self.take(&chunk);
            self.current = chunk;
        }
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        let _ = self.current.split_to(amount);
    }
}

impl Read for LayerStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let amount = available.len().min(buffer.len());
        buffer[..amount].copy_from_slice(&available[..amount]);
        self.consume(amount);
        Ok(amount)
    }
}

/// What the first bytes of a file say about the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// A tar, compressed or not.
    Tar(Compression),
    /// Something that we do not read, by name.
    Foreign(&'static str),
}

impl Packing {
    const MAGIC_BYTES: usize = 6;

    fn of(begin: &[u8]) -> Packing {
        match begin {
            [0x1f, 0x8b, ..] => Packing::Tar(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Tar(Compression::Zstd),
            // An lzma file has no magic: properties, and a dictionary of a power of two.
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] | [0x5d, 0, 0, ..] => {
                Packing::Tar(Compression::Xz)
            }
            [b'B', b'Z', b'h', ..] => Packing::Foreign("bzip2"),
            [b'h', b's', b'q', b's', ..] => Packing::Foreign("squashfs"),
            [b'Q', b'F', b'I', 0xfb, ..] => {
                Packing::Foreign("qcow2, the disk of a virtual machine")
            }
            _ => Packing::Tar(Compression::None),
        }
    }
}

/// The layer's tar.
pub(crate) enum TarStream {
    Plain(LayerStream),
    /// Boxed for its window.
    Gzip(Box<MultiGzDecoder<LayerStream>>),
    Zstd(zstd::stream::read::Decoder<'static, LayerStream>),
    Xz(liblzma::bufread::XzDecoder<LayerStream>),
}

impl TarStream {
    pub(crate) fn new(compression: Compression, stream: LayerStream) -> io::Result<TarStream> {
        Ok(match compression {
            Compression::None => TarStream::Plain(stream),
            Compression::Gzip => TarStream::Gzip(Box::new(MultiGzDecoder::new(stream))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                TarStream::Zstd(decoder)
            }
            Compression::Xz => {
                let stream_decoder = liblzma::stream::Stream::new_auto_decoder(
                    XZ_MEMORY_MAX_BYTES,
                    liblzma::stream::CONCATENATED,
                )?;
                TarStream::Xz(liblzma::bufread::XzDecoder::new_stream(
                    stream,
                    stream_decoder,
                ))
            }
        })
    }

    /// Returns the compressed stream, as far as it was read.
    pub(crate) fn into_inner(self) -> LayerStream {
        match self {
            TarStream::Plain(stream) => stream,
            TarStream::Gzip(decoder) => decoder.into_inner(),
            TarStream::Zstd(decoder) => decoder.finish(),
            TarStream::Xz(decoder) => decoder.into_inner(),
        }
    }
}

impl Read for TarStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            TarStream::Plain(stream) => stream.read(buffer),
            TarStream::Gzip(decoder) => decoder.read(buffer),
            TarStream::Zstd(decoder) => decoder.read(buffer),
            TarStream::Xz(decoder) => decoder.read(buffer),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::image::content::Content;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn stream(bytes: &[u8], size_bytes: u64) -> LayerStream {
        let (sender, receiver) = mpsc::channel(64);
        for chunk in bytes.chunks(7) {
            sender.blocking_send(Bytes::copy_from_slice(chunk)).unwrap();
        }
        LayerStream::new(None, receiver, size_bytes)
    }

    #[test]
    fn each_compression_gives_the_tar_and_the_digest_of_the_blob() {
        let plain = b"some text, some text, some text".to_vec();
        let members = [gzip(&plain[..10]), gzip(&plain[10..])].concat();
        let frames = [
            zstd::encode_all(&plain[..5], 1).unwrap(),
            zstd::encode_all(&plain[5..], 1).unwrap(),
        ]
        .concat();
        let xz = liblzma::encode_all(&plain[..], 6).unwrap();
        for (compression, blob) in [
            (Compression::None, plain.clone()),
            (Compression::Gzip, members),
            (Compression::Zstd, frames),
            (Compression::Xz, xz),
        ] {
            let mut input = stream(&blob, blob.len() as u64);
            assert_eq!(input.packing().unwrap(), Packing::Tar(compression));
            let mut tar = TarStream::new(compression, input).unwrap();
            let mut seen = Vec::new();
            tar.read_to_end(&mut seen).unwrap();
            assert_eq!(seen, plain, "{compression:?}");
            assert_eq!(
                tar.into_inner().finish().0.unwrap(),
                Digest::of(&blob),
                "{compression:?}"
            );
        }
    }

    #[test]
    fn what_the_unpacker_leaves_is_hashed_too() {
        let mut input = stream(b"0123456789abcdef", 16);
        input.read_exact(&mut [0; 3]).unwrap();
        assert_eq!(input.finish().0.unwrap(), Digest::of(b"0123456789abcdef"));
    }

    #[test]
    fn two_blobs_have_a_digest_together() {
        let mut before = Sha256::new();
        before.update(b"meta");
        let (digests, _) = stream(b"root", 4).combined_with(before).finish_combined();
        let expected = (Digest::of(b"root"), Some(Digest::of(b"metaroot")));
        assert_eq!(digests.unwrap(), expected);
    }

    #[test]
    fn files_of_other_kinds_are_known_by_name() {
        let table: [(&[u8], Packing); 5] = [
            (b"hsqs....", Packing::Foreign("squashfs")),
            (b"BZh91AY", Packing::Foreign("bzip2")),
            (b"\x5d\0\0\x80\0", Packing::Tar(Compression::Xz)),
            (b"", Packing::Tar(Compression::None)),
            (b"etc/passwd\0", Packing::Tar(Compression::None)),
        ];
        for (begin, expected) in table {
            let mut input = stream(begin, begin.len() as u64);
            assert_eq!(
                input.packing().unwrap(),
                expected,
                "{}",
                begin.escape_ascii()
            );
        }
    }

    #[test]
    fn an_early_end_is_an_error() {
        let mut input = stream(b"0123", 16);
        assert!(input.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn a_partial_blob_is_read_first_and_grows() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        let digest = Digest::of(b"0123456789");
        content
            .partial(&digest, 10)
            .unwrap()
            .unwrap()
            .append(b"0123");
        let partial = content.partial(&digest, 10).unwrap().unwrap();
        let file = partial.reader().unwrap();
        let (sender, receiver) = mpsc::channel(8);
        sender.blocking_send(Bytes::from_static(b"456789")).unwrap();
        let (seen, partial) = LayerStream::new(Some((partial, file)), receiver, 10).finish();
        assert_eq!(seen.unwrap(), digest);
        assert_eq!(
            io::read_to_string(partial.unwrap().reader().unwrap()).unwrap(),
            "0123456789"
        );
    }

    #[test]
    fn huge_zstd_windows_are_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(28).unwrap();
        encoder.include_contentsize(false).unwrap();
        encoder.write_all(&[0; 1000]).unwrap();
        let blob = encoder.finish().unwrap();
        let mut tar = TarStream::new(Compression::Zstd, stream(&blob, blob.len() as u64)).unwrap();
        assert!(tar.read_to_end(&mut Vec::new()).is_err());
    }
}
