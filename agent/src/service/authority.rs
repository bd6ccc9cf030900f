//! Lets clients of gRPC's C core (Python, C++, Ruby, PHP) talk over the unix socket.
//!
//! They send the socket's path, percent-encoded, as `:authority`: `run%2Flongshore.sock`. That is
//! no authority for the `http` crate, so h2 resets each of their streams before a service sees it.
//! [`AnyAuthority`] sits between socket and h2 and makes such a name acceptable on its way in:
//!
//! ```text
//!  socket --> preface | frame | frame | HEADERS [CONTINUATION] | ... --> h2
//!                                       :authority: run%2Flongshore.sock
//!                                       :authority: run-2Flongshore.sock
//! ```
//! The name keeps its length, and this is what makes the rest simple. HPACK counts its table in
//! bytes, so the tables of client and h2 stay equal whatever the client indexes, evicts and refers
//! to later; no table has to be followed here, no frame grows, no block is encoded again. It is
//! also why giving up is harmless at any byte: what is passed as it came is for h2 to judge.
//! Nobody below reads the name: the peer is who the socket's permissions let in.
//!
//! A connection whose first request needs no help (Go, Rust) is not looked at again. Names in
//! Huffman code, or whose `:authority` is an entry of the dynamic table, are left alone: the C core
//! makes neither.
//!
//! Source: RFC 9113, sections 3.4, 4.1, 6.2, 6.10; RFC 7541, sections 4.1, 5, 6.

use std::{
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use http::uri::Authority;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;
use tonic::transport::server::Connected;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const FRAME_HEAD_BYTES: usize = 9;
const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;

/// Longest frame that h2 takes, as it announces no other SETTINGS_MAX_FRAME_SIZE.
const FRAME_BYTES: usize = 16 << 10;
/// Most that is held back of one header block; h2 refuses such a block on its own.
const BLOCK_BYTES: usize = 64 << 10;
/// Most frames of one header block: each read looks at their heads again.
const BLOCK_FRAMES: usize = 8;

const READ_BYTES: usize = 8 << 10;

/// A server's end of a connection on which h2 accepts whatever name the client has for it.
#[derive(Debug)]
pub(super) struct AnyAuthority<S> {
    stream: S,
    incoming: Incoming,
}

impl<S> AnyAuthority<S> {
    /// Wraps a connection of which nothing was read yet.
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            incoming: Incoming::default(),
        }
    }
}

impl<S: Connected> Connected for AnyAuthority<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if into.remaining() == 0 || this.incoming.take(into) {
                return Poll::Ready(Ok(()));
            }
            if this.incoming.stage == Stage::Through {
                return Pin::new(&mut this.stream).poll_read(context, into);
            }
            this.incoming.held.reserve(READ_BYTES);
            let stream = Pin::new(&mut this.stream);
            match ready!(poll_read_buf(stream, context, &mut this.incoming.held))? {
                0 => this.incoming.give_up(),
                _ => this.incoming.settle(),
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The connection's first bytes.
    #[default]
    Preface,
    /// No header block was seen.
    Watching,
    /// The client's name is not acceptable; each of its header blocks is looked at.
    Mending,
    /// All bytes pass as they come.
    Through,
}

/// What came from the client and is not yet with h2: at most one header block and one read.
#[derive(Debug, Default)]
struct Incoming {
    stage: Stage,
    held: BytesMut,
    /// So many bytes at the front of `held` may go on.
    settled: usize,
    /// So many bytes of the current frame are still to come, and none of them matters here.
    passing: usize,
}

impl Incoming {
    /// Moves settled bytes to the reader; false when there are none.
    fn take(&mut self, into: &mut ReadBuf<'_>) -> bool {
        let count = self.settled.min(into.remaining());
        into.put_slice(&self.held[..count]);
        self.held.advance(count);
        self.settled -= count;
        if self.stage == Stage::Through && self.held.is_empty() {
            self.held = BytesMut::new();
        }
        count > 0
    }

    fn give_up(&mut self) {
        self.stage = Stage::Through;
        self.settled = self.held.len();
    }

    /// Settles as much of `held` as can be judged.
    fn settle(&mut self) {
        loop {
            let passed = self.passing.min(self.held.len() - self.settled);
            self.passing -= passed;
            self.settled += passed;
            let rest = &mut self.held[self.settled..];
            let seen = match self.stage {
                _ if rest.is_empty() => return,
                Stage::Preface => preface(rest),
                Stage::Watching | Stage::Mending => frame(rest),
                Stage::Through => return self.give_up(),
            };
            match seen {
                Seen::Part => return,
                Seen::Preface => {
                    self.passing = PREFACE.len();
                    self.stage = Stage::Watching;
                }
                Seen::Other { bytes } => self.passing = bytes,
                Seen::Block { bytes, mended } => {
                    self.passing = bytes;
                    if mended {
                        self.stage = Stage::Mending;
                    } else if self.stage == Stage::Watching {
                        self.stage = Stage::Through;
                    }
                }
                Seen::Unclear => return self.give_up(),
            }
        }
    }
}

/// What the first bytes of a buffer are.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// The start of something.
    Part,
    /// The connection preface.
    Preface,
    /// A frame without header fields.
    Other { bytes: usize },
    /// All frames of a header block; `mended` when its `:authority` had to be changed.
    Block { bytes: usize, mended: bool },
    /// Nothing that h2 would accept.
    Unclear,
}

fn preface(bytes: &[u8]) -> Seen {
    if bytes.starts_with(PREFACE) {
        Seen::Preface
    } else if PREFACE.starts_with(bytes) {
        Seen::Part
    } else {
        Seen::Unclear
    }
}

struct FrameHead {
    payload_bytes: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl FrameHead {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, flags, d, e, f, g] = bytes.first_chunk::<FRAME_HEAD_BYTES>()?;
        Some(Self {
            payload_bytes: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes([d & 0x7f, e, f, g]),
        })
    }
}

fn frame(bytes: &mut [u8]) -> Seen {
    match FrameHead::parse(bytes) {
        None => Seen::Part,
        Some(head) if head.kind == HEADERS => header_block(bytes),
        Some(head) => Seen::Other {
            bytes: FRAME_HEAD_BYTES + head.payload_bytes,
        },
    }
}

/// Mends the header block that starts at the first byte, once all its frames are there.
fn header_block(bytes: &mut [u8]) -> Seen {
    let mut fragments: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    let mut stream = None;
    loop {
        let Some(head) = FrameHead::parse(&bytes[at..]) else {
            return Seen::Part;
        };
        let expected = match stream {
            None => head.kind == HEADERS,
            Some(stream) => head.kind == CONTINUATION && head.stream == stream,
        };
        let start = at + FRAME_HEAD_BYTES;
        let end = start + head.payload_bytes;
        if !expected
            || head.payload_bytes > FRAME_BYTES
            || end > BLOCK_BYTES
            || fragments.len() == BLOCK_FRAMES
        {
            return Seen::Unclear;
        }
        let Some(payload) = bytes.get(start..end) else {
            return Seen::Part;
        };
        let Some(fragment) = fragment(&head, payload) else {
            return Seen::Unclear;
        };
        fragments.push(start + fragment.start..start + fragment.end);
        at = end;
        if head.flags & END_HEADERS != 0 {
            break;
        }
        stream = Some(head.stream);
    }
    let mut block = Vec::with_capacity(at);
    for fragment in &fragments {
        block.extend_from_slice(&bytes[fragment.clone()]);
    }
    let Some(mended) = mend(&mut block) else {
        return Seen::Unclear;
    };
    if mended {
        let mut block = block.as_slice();
        for fragment in fragments {
            block.copy_to_slice(&mut bytes[fragment]);
        }
    }
    Seen::Block { bytes: at, mended }
}

/// Where a frame's part of the header block is in its payload.
fn fragment(head: &FrameHead, payload: &[u8]) -> Option<Range<usize>> {
    let (mut start, mut padding) = (0, 0);
    if head.kind == HEADERS && head.flags & PADDED != 0 {
        start += 1;
        padding = usize::from(*payload.first()?);
    }
    if head.kind == HEADERS && head.flags & PRIORITY != 0 {
        start += PRIORITY_BYTES;
    }
    let end = payload.len().checked_sub(padding)?;
    (start <= end).then_some(start..end)
}

/// Makes each `:authority` of a header block one that `http` accepts; whether there was any to
/// change, or None when this is not a header block.
fn mend(block: &mut [u8]) -> Option<bool> {
    let names = authorities(block)?;
    let mut mended = false;
    for name in names {
        let name = &mut block[name];
        // An empty one has no bytes to write a name into.
        if !name.is_empty() && Authority::try_from(&*name).is_err() {
            name.iter_mut()
                .filter(|byte| !matches!(byte, b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'.'))
                .for_each(|byte| *byte = b'-');
            mended = true;
        }
    }
    Some(mended)
}

/// Where a header block spells out values of `:authority`.
fn authorities(block: &[u8]) -> Option<Vec<Range<usize>>> {
    /// Its index in the static table.
    const AUTHORITY: usize = 1;
    let mut found = Vec::new();
    let mut fields = Fields { block, at: 0 };
    while let Some(&first) = block.get(fields.at) {
        let prefix_bits = match first {
            // A field of the tables.
            0x80.. => {
                fields.integer(7)?;
                continue;
            }
            0x40..0x80 => 6,
            // A new size of the dynamic table.
            0x20..0x40 => {
                fields.integer(5)?;
                continue;
            }
            0..0x20 => 4,
        };
        let is_authority = match fields.integer(prefix_bits)? {
            0 => {
                let name = fields.string()?;
                !name.huffman && &block[name.bytes] == b":authority"
            }
            index => index == AUTHORITY,
        };
        let value = fields.string()?;
        if is_authority && !value.huffman {
            found.push(value.bytes);
        }
    }
    Some(found)
}

/// Reads the primitive types of HPACK from a header block.
struct Fields<'a> {
    block: &'a [u8],
    at: usize,
}

struct Text {
    huffman: bool,
    bytes: Range<usize>,
}

impl Fields<'_> {
    fn octet(&mut self) -> Option<u8> {
        let octet = *self.block.get(self.at)?;
        self.at += 1;
        Some(octet)
    }

    fn integer(&mut self, prefix_bits: u32) -> Option<usize> {
        let mask = (1 << prefix_bits) - 1;
        let mut value = usize::from(self.octet()?) & mask;
        if value < mask {
            return Some(value);
        }
        // Four octets hold all that a block of 64 KiB can mean.
        for shift in [0, 7, 14, 21] {
            let octet = self.octet()?;
            value += usize::from(octet & 0x7f) << shift;
            if octet & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn string(&mut self) -> Option<Text> {
        let huffman = self.block.get(self.at)? & 0x80 != 0;
        let length = self.integer(7)?;
        let start = self.at;
        let end = start + length;
        if end > self.block.len() {
            return None;
        }
        self.at = end;
        Some(Text {
            huffman,
            bytes: start..end,
        })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tonic::transport::Server;

    use super::*;

    const PATH: &str = "tmp%2Frun%2Flongshore.sock";
    const MENDED: &str = "tmp-2Frun-2Flongshore.sock";

    const DATA: u8 = 0x0;
    const RST_STREAM: u8 = 0x3;
    const SETTINGS: u8 = 0x4;
    const END_STREAM: u8 = 0x1;

    /// Gives its bytes in pieces of these sizes, again and again.
    struct Pieces {
        bytes: Vec<u8>,
        sizes: Vec<usize>,
        turn: usize,
    }

    impl AsyncRead for Pieces {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            into: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let this = self.get_mut();
            let size = this.sizes[this.turn % this.sizes.len()];
            this.turn += 1;
            let count = size.min(into.remaining()).min(this.bytes.len());
            into.put_slice(&this.bytes[..count]);
            this.bytes.drain(..count);
            Poll::Ready(Ok(()))
        }
    }

    fn through(bytes: &[u8], sizes: &[usize]) -> Vec<u8> {
        let mut stream = AnyAuthority::new(Pieces {
            bytes: bytes.to_vec(),
            sizes: sizes.to_vec(),
            turn: 0,
        });
        let mut out = Vec::new();
        stream
            .read_to_end(&mut out)
            .now_or_never()
            .expect("pieces are always there")
            .expect("pieces do not fail");
        out
    }

    fn frame_of(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = PREFACE.to_vec();
        bytes.extend(frame_of(SETTINGS, 0, 0, &[]));
        bytes.extend(frames.concat());
        bytes
    }

    fn text(value: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        match value.len() {
            short @ 0..127 => bytes.push(u8::try_from(short).expect("below 127")),
            long => bytes.extend([127, u8::try_from(long - 127).expect("below 255")]),
        }
        bytes.extend(value.as_bytes());
        bytes
    }

    /// A field the way the C core writes it: name and value in letters, and into the table.
    fn indexed(name: &str, value: &str) -> Vec<u8> {
        [vec![0x40], text(name), text(value)].concat()
    }

    /// `POST http`, then the authority, as the C core starts a call.
    fn request(authority: &str) -> Vec<u8> {
        [
            vec![0x83, 0x86],
            indexed(":authority", authority),
            indexed(":path", "/grpc.health.v1.Health/Check"),
            indexed("te", "trailers"),
            indexed("content-type", "application/grpc"),
            vec![0x10],
            text("grpc-accept-encoding"),
            text("identity"),
        ]
        .concat()
    }

    /// The same call once more, by four entries of the dynamic table, latest first.
    const AGAIN: &[u8] = &[0x83, 0x86, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62];

    /// How a request with `authority` looks in frames: (what, its frames).
    fn shapes(authority: &str) -> Vec<(&'static str, Vec<Vec<u8>>)> {
        let block = request(authority);
        let half = &block[..20];
        let rest = &block[20..];
        let end = END_HEADERS;
        let mut padded = vec![3];
        padded.extend(&block);
        padded.extend([b'%'; 3]);
        let mut both = vec![2, 0x80, 0, 0, 0, 16];
        both.extend(&block);
        both.extend([0; 2]);
        let mut priority = vec![0, 0, 0, 0, 16];
        priority.extend(half);
        vec![
            ("plain", vec![frame_of(HEADERS, end, 1, &block)]),
            ("padded", vec![frame_of(HEADERS, end | PADDED, 1, &padded)]),
            (
                "padded with priority",
                vec![frame_of(HEADERS, end | PADDED | PRIORITY, 1, &both)],
            ),
            (
                "continued in the middle of the name",
                vec![
                    frame_of(HEADERS, PRIORITY, 1, &priority),
                    frame_of(CONTINUATION, 0, 1, &[]),
                    frame_of(CONTINUATION, end, 1, rest),
                ],
            ),
        ]
    }

    #[test]
    fn the_path_of_a_socket_becomes_a_name_of_equal_length_at_any_split() {
        for ((shape, given), (_, expected)) in shapes(PATH).into_iter().zip(shapes(MENDED)) {
            // The second request comes in the same shape, as after an eviction.
            let given = connection(&[given.clone(), given].concat());
            let expected = connection(&[expected.clone(), expected].concat());
            for size in 1..given.len() {
                assert_eq!(through(&given, &[size]), expected, "{shape}, {size}");
            }
        }
    }

    #[test]
    fn a_good_name_is_untouched_and_ends_the_watch() {
        let later = frame_of(HEADERS, END_HEADERS, 3, &request(PATH));
        for name in ["localhost", "a.example:443", "[::1]:80", "a_b"] {
            for (shape, mut frames) in shapes(name) {
                frames.push(later.clone());
                let bytes = connection(&frames);
                for size in [1, 2, 3, 7, 64, bytes.len()] {
                    assert_eq!(through(&bytes, &[size]), bytes, "{name}, {shape}, {size}");
                }
            }
        }
    }

    #[test]
    fn names_that_http_refuses_are_mended() {
        for (given, expected) in [
            (PATH, MENDED),
            ("a/b", "a-b"),
            ("a:b:c", "a-b-c"),
            ("[x", "-x"),
            ("é", "--"),
            ("%00abstract", "-00abstract"),
            ("%", "-"),
            ("", ""),
        ] {
            let mut block = request(given);
            let mended = mend(&mut block);
            assert_eq!(mended, Some(given != expected), "{given}");
            assert_eq!(block, request(expected), "{given}");
            assert!(expected.is_empty() || expected.parse::<Authority>().is_ok());
        }
    }

    #[test]
    fn fields_are_told_apart() {
        let long = "x".repeat(200);
        let cases: [(&str, Vec<u8>, Option<usize>); 11] = [
            ("nothing", vec![], Some(0)),
            ("static name", [vec![0x41], text(PATH)].concat(), Some(1)),
            ("without index", [vec![0x01], text(PATH)].concat(), Some(1)),
            ("never indexed", [vec![0x11], text(PATH)].concat(), Some(1)),
            (
                "after a size",
                [vec![0x3f, 0xe1, 0x1f, 0x41], text(PATH)].concat(),
                Some(1),
            ),
            (
                "after a long one",
                [indexed("a", &long), indexed(":authority", PATH)].concat(),
                Some(1),
            ),
            ("other name", indexed("authority", PATH), Some(0)),
            ("huffman", vec![0x41, 0x81, 0x57], Some(0)),
            ("cut value", vec![0x41, 5, b'%'], None),
            ("cut name", vec![0x40], None),
            ("endless integer", vec![0xff; 9], None),
        ];
        for (what, block, expected) in cases {
            let found = authorities(&block).map(|found| found.len());
            assert_eq!(found, expected, "{what}");
        }
    }

    #[test]
    fn what_h2_refuses_passes_as_it_came() {
        let block = request(PATH);
        let whole = frame_of(HEADERS, END_HEADERS, 1, &block);
        let long = vec![0; FRAME_BYTES + 1];
        let cases: [(&str, Vec<Vec<u8>>); 7] = [
            (
                "too long a frame",
                vec![frame_of(HEADERS, END_HEADERS, 1, &long)],
            ),
            (
                "another frame within",
                vec![frame_of(HEADERS, 0, 1, &block), whole.clone()],
            ),
            (
                "another stream within",
                vec![
                    frame_of(HEADERS, 0, 1, &block),
                    frame_of(CONTINUATION, END_HEADERS, 3, &[]),
                ],
            ),
            (
                "more padding than frame",
                vec![frame_of(HEADERS, END_HEADERS | PADDED, 1, &[9, 0])],
            ),
            (
                "too many frames",
                std::iter::once(frame_of(HEADERS, 0, 1, &block))
                    .chain(std::iter::repeat_n(
                        frame_of(CONTINUATION, 0, 1, &[]),
                        BLOCK_FRAMES,
                    ))
                    .collect(),
            ),
            (
                "too long a block",
                std::iter::once(frame_of(HEADERS, 0, 1, &block))
                    .chain(std::iter::repeat_n(
                        frame_of(CONTINUATION, 0, 1, &long[1..]),
                        4,
                    ))
                    .collect(),
            ),
            (
                "no header block",
                vec![frame_of(HEADERS, END_HEADERS, 1, &[0x40])],
            ),
        ];
        for (what, mut frames) in cases {
            frames.push(whole.clone());
            let bytes = connection(&frames);
            for size in [1, 4096, bytes.len()] {
                assert!(through(&bytes, &[size]) == bytes, "{what}, {size}");
            }
        }
        let cut = &connection(&[whole])[..80];
        assert_eq!(through(cut, &[9]), cut, "the end within a block");
        assert_eq!(
            through(b"GET / HTTP/1.1\r\n\r\n", &[4]),
            b"GET / HTTP/1.1\r\n\r\n"
        );
    }

    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let payload = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            Just(request(PATH)),
            Just(request("localhost")),
            Just(AGAIN.to_vec()),
        ];
        let kind = prop_oneof![Just(HEADERS), Just(CONTINUATION), Just(DATA), any::<u8>()];
        let frame = (kind, any::<u8>(), 0..4_u32, payload);
        prop::collection::vec(frame, 0..12).prop_map(|frames| {
            let frames: Vec<_> = frames
                .iter()
                .map(|(kind, flags, stream, payload)| frame_of(*kind, *flags, *stream, payload))
                .collect();
            connection(&frames)
        })
    }

    proptest! {
        #[test]
        fn any_bytes_keep_their_number_and_change_only_to_dashes(
            bytes in prop_oneof![prop::collection::vec(any::<u8>(), 0..400), frames()],
            tail in prop::collection::vec(any::<u8>(), 0..40),
            sizes in prop::collection::vec(1..50_usize, 1..8),
        ) {
            let bytes = [bytes, tail].concat();
            let out = through(&bytes, &sizes);
            prop_assert_eq!(out.len(), bytes.len());
            for (before, after) in bytes.iter().zip(&out) {
                prop_assert!(before == after || *after == b'-');
            }
            // How the bytes arrive must not matter.
            prop_assert_eq!(out, through(&bytes, &[bytes.len().max(1)]));
        }

        #[test]
        fn any_block_is_walked_without_a_panic(
            mut block in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let length = block.len();
            mend(&mut block);
            prop_assert_eq!(block.len(), length);
        }
    }

    /// Two health checks by hand over one connection; the kinds of the frames that came back with
    /// the payloads of DATA.
    async fn talk<S>(wrap: impl Fn(tokio::io::DuplexStream) -> S) -> Vec<(u8, u32, Vec<u8>)>
    where
        S: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let (mut client, server) = tokio::io::duplex(64 << 10);
        let (_health, service) = tonic_health::server::health_reporter();
        let incoming = tokio_stream::once(Ok::<_, io::Error>(wrap(server)));
        let serving = tokio::spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        let message = [0; 5];
        let call = |stream, block: &[u8]| {
            [
                frame_of(HEADERS, END_HEADERS, stream, block),
                frame_of(DATA, END_STREAM, stream, &message),
            ]
            .concat()
        };
        let mut replies = Vec::new();
        let mut bytes = connection(&[call(1, &request(PATH))]);
        for again in [true, false] {
            client.write_all(&bytes).await.expect("the server reads");
            bytes = call(3, AGAIN);
            loop {
                let mut head = [0; FRAME_HEAD_BYTES];
                client.read_exact(&mut head).await.expect("a frame");
                let head = FrameHead::parse(&head).expect("nine bytes");
                let mut payload = vec![0; head.payload_bytes];
                client.read_exact(&mut payload).await.expect("its payload");
                let last =
                    head.stream > 0 && (head.flags & END_STREAM != 0 || head.kind == RST_STREAM);
                if head.stream > 0 {
                    replies.push((head.kind, head.stream, payload));
                }
                if last {
                    break;
                }
            }
            if again && replies.last().is_some_and(|(kind, ..)| *kind == RST_STREAM) {
                break;
            }
        }
        drop(client);
        serving
            .await
            .expect("the server does not panic")
            .expect("the server ends with its connections");
        replies
    }

    #[tokio::test]
    async fn a_client_of_the_c_core_is_served_and_would_not_be_without_this() {
        // PROTOCOL_ERROR. When this changes, h2 takes such names and this file can go.
        let bare = talk(|stream| stream).await;
        assert_eq!(bare, [(RST_STREAM, 1, vec![0, 0, 0, 1])]);

        let mended = talk(AnyAuthority::new).await;
        let serving: Vec<_> = mended
            .iter()
            .filter(|(kind, ..)| *kind == DATA)
            .map(|(_, stream, payload)| (*stream, payload.as_slice()))
            .collect();
        // The message `status: SERVING`, in its gRPC frame; the second call came by the table.
        let message: &[u8] = &[0, 0, 0, 0, 2, 0x08, 1];
        assert_eq!(serving, [(1, message), (3, message)]);
    }
}
