//! Frames: bytes to what they mean, and back. Pure.
//!
//! ```text
//!  control  1 | version 15 | type 16 | flags 8 | length 24 | body
//!  data     0 | stream 31            | flags 8 | length 24 | bytes
//! ```
//! Data frames may be 16 MiB long, so their bytes are handed on as they arrive. Source: SPDY
//! protocol, draft 3.1, section 2.2.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::headers::{Deflater, HeaderError, Headers, Inflater};

/// Longest control frame that is read whole.
const CONTROL_BYTES: usize = 64 << 10;
const VERSION: u16 = 3;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Why a stream is reset.
pub(in crate::service::streaming) mod reset {
    /// The frame breaks the protocol.
    pub(in crate::service::streaming) const PROTOCOL: u32 = 1;
    /// The stream is not wanted.
    pub(in crate::service::streaming) const REFUSED: u32 = 3;
    /// It is broken off.
    pub(in crate::service::streaming) const CANCEL: u32 = 5;
}

/// Why a connection can't be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    /// Another version of the protocol.
    #[error("control frame of version {0}")]
    Version(u16),
    /// A frame is longer or shorter than it may be.
    #[error("frame of type {kind} with {length} bytes")]
    Length { kind: u16, length: usize },
    /// Headers.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// What a client says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A new stream.
    Open {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    /// Bytes of a stream; with `fin` the last.
    Data { id: u32, fin: bool, bytes: Bytes },
    /// It breaks a stream off.
    Reset { id: u32 },
    /// It wants the same back.
    Ping { id: u32 },
    /// It opens no more streams.
    GoAway,
}

/// The reading direction of a connection.
pub(super) struct Decoder {
    inflater: Inflater,
    state: State,
}

enum State {
    Head,
    Data { id: u32, fin: bool, left: usize },
    Control { kind: u16, flags: u8, length: usize },
    Skip { left: usize },
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            inflater: Inflater::new(),
            state: State::Head,
        }
    }

    /// Takes one frame, or part of a data frame, from `buffer`; none when more bytes are needed.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        loop {
            match self.state {
                State::Head => {
                    if buffer.len() < 8 {
                        return Ok(None);
                    }
                    self.state = head(buffer)?;
                }
                State::Data { id, fin, left } => {
                    let now = left.min(buffer.len());
                    if now == 0 && left > 0 {
                        return Ok(None);
                    }
                    // A copy: a slice would keep the whole buffer alive for one byte.
                    let bytes = Bytes::copy_from_slice(&buffer[..now]);
                    buffer.advance(now);
                    let left = left - now;
                    self.state = match left {
                        0 => State::Head,
                        left => State::Data { id, fin, left },
                    };
                    let fin = fin && left == 0;
                    return Ok(Some(Frame::Data { id, fin, bytes }));
                }
                State::Control {
                    kind,
                    flags,
                    length,
                } => {
                    if buffer.len() < length {
                        return Ok(None);
                    }
                    self.state = State::Head;
                    let body = buffer.split_to(length);
                    if let Some(frame) = self.control(kind, flags, &body)? {
                        return Ok(Some(frame));
                    }
                }
                State::Skip { left } => {
                    let now = left.min(buffer.len());
                    buffer.advance(now);
                    if now < left {
                        self.state = State::Skip { left: left - now };
                        return Ok(None);
                    }
                    self.state = State::Head;
                }
            }
        }
    }

    fn control(&mut self, kind: u16, flags: u8, body: &[u8]) -> Result<Option<Frame>, FrameError> {
        let short = FrameError::Length {
            kind,
            length: body.len(),
        };
        let id = number(body, 0).ok_or(short)?;
        Ok(match kind {
            SYN_STREAM => {
                let headers = self.inflater.read(body.get(10..).ok_or(short)?)?;
                let fin = flags & FIN != 0;
                Some(Frame::Open { id, fin, headers })
            }
            SYN_REPLY | HEADERS => {
                // Nothing of ours asks for them, but later blocks build on them.
                self.inflater.read(&body[4..])?;
                None
            }
            RST_STREAM => Some(Frame::Reset { id }),
            // Pings of the server have even ids; we send none, so an even one is no answer either.
            PING => (id % 2 == 1).then_some(Frame::Ping { id: body_id(body) }),
            GOAWAY => Some(Frame::GoAway),
            _ => None,
        })
    }
}

fn head(buffer: &mut BytesMut) -> Result<State, FrameError> {
    let first = buffer.get_u32();
    let second = buffer.get_u32();
    let flags = u8::try_from(second >> 24).unwrap_or(0);
    let length = usize::try_from(second & 0x00ff_ffff).unwrap_or(usize::MAX);
    if first >> 31 == 0 {
        return Ok(State::Data {
            id: first,
            fin: flags & FIN != 0,
            left: length,
        });
    }
    let version = u16::try_from(first >> 16 & 0x7fff).unwrap_or(0);
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let kind = u16::try_from(first & 0xffff).unwrap_or(0);
    match kind {
        SYN_STREAM | SYN_REPLY | RST_STREAM | PING | GOAWAY | HEADERS if length > CONTROL_BYTES => {
            Err(FrameError::Length { kind, length })
        }
        SYN_STREAM | SYN_REPLY | RST_STREAM | PING | GOAWAY | HEADERS => Ok(State::Control {
            kind,
            flags,
            length,
        }),
        // SETTINGS and WINDOW_UPDATE are about flow control, which no peer of ours has.
        _ => Ok(State::Skip { left: length }),
    }
}

/// A stream id: 31 bits of the four bytes at `at`.
fn number(body: &[u8], at: usize) -> Option<u32> {
    let raw = body.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*raw) & 0x7fff_ffff)
}

/// All 32 bits of a ping's id.
fn body_id(body: &[u8]) -> u32 {
    body.first_chunk().map_or(0, |raw| u32::from_be_bytes(*raw))
}

/// The writing direction of a connection.
pub(in crate::service::streaming) struct Encoder {
    deflater: Deflater,
}

impl Encoder {
    pub(in crate::service::streaming) fn new() -> Self {
        Self {
            deflater: Deflater::new(),
        }
    }

    pub(in crate::service::streaming) fn data(
        &mut self,
        to: &mut BytesMut,
        id: u32,
        fin: bool,
        bytes: &[u8],
    ) {
        to.put_u32(id);
        length(to, if fin { FIN } else { 0 }, bytes.len());
        to.extend_from_slice(bytes);
    }

    pub(super) fn reply(&mut self, to: &mut BytesMut, id: u32) {
        let block = self.deflater.write(&Headers::default());
        control(to, SYN_REPLY, 0, 4 + block.len());
        to.put_u32(id);
        to.extend_from_slice(&block);
    }

    pub(in crate::service::streaming) fn reset(&mut self, to: &mut BytesMut, id: u32, status: u32) {
        control(to, RST_STREAM, 0, 8);
        to.put_u32(id);
        to.put_u32(status);
    }

    pub(in crate::service::streaming) fn ping(&mut self, to: &mut BytesMut, id: u32) {
        control(to, PING, 0, 4);
        to.put_u32(id);
    }

    pub(super) fn go_away(&mut self, to: &mut BytesMut, last: u32) {
        control(to, GOAWAY, 0, 8);
        to.put_u32(last);
        to.put_u32(0);
    }

    /// A window of one more byte for no stream: no peer has windows, and none answers.
    pub(super) fn beat(&mut self, to: &mut BytesMut) {
        control(to, WINDOW_UPDATE, 0, 8);
        to.put_u32(0);
        to.put_u32(1);
    }

    #[cfg(test)]
    pub(in crate::service::streaming) fn open(
        &mut self,
        to: &mut BytesMut,
        id: u32,
        fin: bool,
        headers: &Headers,
    ) {
        let block = self.deflater.write(headers);
        control(to, SYN_STREAM, u8::from(fin), 10 + block.len());
        to.put_u32(id);
        to.put_u32(0);
        to.put_u16(0);
        to.extend_from_slice(&block);
    }
}

fn control(to: &mut BytesMut, kind: u16, flags: u8, bytes: usize) {
    to.put_u16(0x8000 | VERSION);
    to.put_u16(kind);
    length(to, flags, bytes);
}

fn length(to: &mut BytesMut, flags: u8, bytes: usize) {
    let bytes = u32::try_from(bytes).expect("our frames are short");
    to.put_u32(u32::from(flags) << 24 | bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(decoder: &mut Decoder, buffer: &mut BytesMut) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next(buffer)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    fn sample() -> BytesMut {
        let (mut encoder, mut wire) = (Encoder::new(), BytesMut::new());
        encoder.open(
            &mut wire,
            1,
            false,
            &Headers::from([("streamtype", "error")]),
        );
        encoder.beat(&mut wire);
        encoder.open(
            &mut wire,
            3,
            true,
            &Headers::from([("streamtype", "stdin")]),
        );
        encoder.data(&mut wire, 1, false, b"ab");
        encoder.ping(&mut wire, 0x8000_0001);
        encoder.data(&mut wire, 1, true, b"");
        encoder.reply(&mut wire, 7);
        encoder.reset(&mut wire, 3, reset::CANCEL);
        encoder.go_away(&mut wire, 0);
        wire
    }

    fn expected() -> Vec<Frame> {
        let data = |fin, bytes| Frame::Data { id: 1, fin, bytes };
        vec![
            Frame::Open {
                id: 1,
                fin: false,
                headers: Headers::from([("streamtype", "error")]),
            },
            Frame::Open {
                id: 3,
                fin: true,
                headers: Headers::from([("streamtype", "stdin")]),
            },
            data(false, Bytes::from_static(b"ab")),
            Frame::Ping { id: 0x8000_0001 },
            data(true, Bytes::new()),
            Frame::Reset { id: 3 },
            Frame::GoAway,
        ]
    }

    #[test]
    fn frames_are_read_as_written() {
        assert_eq!(frames(&mut Decoder::new(), &mut sample()), Ok(expected()));
    }

    #[test]
    fn frames_may_arrive_byte_by_byte() {
        let (mut decoder, mut buffer, mut found) = (Decoder::new(), BytesMut::new(), Vec::new());
        for byte in sample() {
            buffer.put_u8(byte);
            found.extend(frames(&mut decoder, &mut buffer).expect("well formed"));
        }
        let bytes = |frames: &[Frame]| {
            frames
                .iter()
                .filter_map(|frame| match frame {
                    Frame::Data { bytes, .. } => Some(bytes.to_vec()),
                    _ => None,
                })
                .collect::<Vec<_>>()
                .concat()
        };
        assert_eq!(bytes(&found), b"ab");
        assert_eq!(
            found.len(),
            expected().len() + 1,
            "two bytes came one by one"
        );
        assert_eq!(found.last(), Some(&Frame::GoAway));
    }

    #[test]
    fn known_bytes() {
        type Found = Result<Vec<Frame>, FrameError>;
        let cases: [(&[u8], Found); 9] = [
            (
                &[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1],
                Ok(vec![Frame::Ping { id: 1 }]),
            ),
            (&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 2], Ok(vec![])),
            (
                &[0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 5],
                Ok(vec![Frame::Reset { id: 5 }]),
            ),
            (
                &[
                    0x80, 3, 0, 4, 0, 0, 0, 2, 9, 9, 0x80, 3, 0, 7, 0, 0, 0, 4, 0, 0, 0, 0,
                ],
                Ok(vec![Frame::GoAway]),
            ),
            (
                &[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1],
                Err(FrameError::Version(2)),
            ),
            (
                &[0x80, 3, 0, 1, 0, 1, 0, 1],
                Err(FrameError::Length {
                    kind: 1,
                    length: 65537,
                }),
            ),
            (
                &[0x80, 3, 0, 3, 0, 0, 0, 0],
                Err(FrameError::Length { kind: 3, length: 0 }),
            ),
            (
                &[0x80, 3, 0, 1, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0],
                Err(FrameError::Length { kind: 1, length: 9 }),
            ),
            (
                &[0, 0, 0, 1, 1, 0, 0, 1, b'x'],
                Ok(vec![Frame::Data {
                    id: 1,
                    fin: true,
                    bytes: Bytes::from_static(b"x"),
                }]),
            ),
        ];
        for (bytes, expected) in cases {
            assert_eq!(
                frames(&mut Decoder::new(), &mut BytesMut::from(bytes)),
                expected,
                "{bytes:?}"
            );
        }
    }

    /// Two streams as the library of Kubernetes' clients opens them; the second block builds on the
    /// first.
    #[test]
    fn frames_of_another_implementation_are_read() {
        let wire = hex::decode(
            "800300010000003d0000000100000000000078f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45a0\
             24cc6461c0c0c0c0590489c44c50e2663407000000ffff800300010000001800000003000000000000c2aa15540a\
             2512d209000000ffff",
        )
        .expect("hex");
        let found =
            frames(&mut Decoder::new(), &mut BytesMut::from(&wire[..])).expect("well formed");
        let said: Vec<_> = found
            .iter()
            .map(|frame| match frame {
                Frame::Open { id, fin, headers } => (
                    *id,
                    *fin,
                    headers.get("streamtype"),
                    headers.get("port"),
                    headers.get("requestid"),
                ),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            said,
            [
                (1, false, Some("error"), Some("80"), Some("7")),
                (3, false, Some("data"), Some("80"), Some("7")),
            ]
        );
    }

    #[test]
    fn a_skipped_frame_is_not_kept() {
        let mut decoder = Decoder::new();
        let mut buffer = BytesMut::from(&[0x80, 3, 0, 4, 0, 0xff, 0xff, 0xff][..]);
        for _ in 0..255 {
            buffer.extend_from_slice(&[0; 65536]);
            assert_eq!(decoder.next(&mut buffer), Ok(None));
            assert!(buffer.is_empty());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let _ = frames(&mut Decoder::new(), &mut buffer);
        }

        #[test]
        fn damaged_frames_end_in_frames_or_an_error(at in 0_usize..200, to in any::<u8>()) {
            let mut wire = sample();
            let at = at % wire.len();
            wire[at] = to;
            let mut decoder = Decoder::new();
            let _ = frames(&mut decoder, &mut wire);
        }

        #[test]
        fn cut_points_do_not_matter(cut in 0_usize..200) {
            let mut wire = sample();
            let rest = wire.split_off(cut % wire.len());
            let mut decoder = Decoder::new();
            let mut found = frames(&mut decoder, &mut wire).expect("well formed");
            wire.extend_from_slice(&rest);
            found.extend(frames(&mut decoder, &mut wire).expect("well formed"));
            found.retain(|frame| !matches!(frame, Frame::Data { .. }));
            let mut expected = expected();
            expected.retain(|frame| !matches!(frame, Frame::Data { .. }));
            prop_assert_eq!(found, expected);
        }
    }
}
