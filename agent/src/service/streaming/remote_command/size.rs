//! Sizes of a client's terminal.

use bytes::{Buf as _, Bytes, BytesMut};
use serde::Deserialize;

use super::Inbox;

/// Columns and rows.
pub(in crate::service::streaming) type Size = (u16, u16);

/// Sizes of the client's terminal, as JSON objects one after another.
pub(super) struct Sizes {
    inbox: Inbox,
    buffer: BytesMut,
}

/// Longest text of one size.
const SIZE_BYTES: usize = 1024;

#[derive(Deserialize)]
struct SizeText {
    #[serde(alias = "width", default)]
    #[serde(rename = "Width")]
    columns: u16,
    #[serde(alias = "height", default)]
    #[serde(rename = "Height")]
    rows: u16,
}

impl Sizes {
    pub(super) fn new(inbox: Inbox) -> Self {
        Self {
            inbox,
            buffer: BytesMut::new(),
        }
    }

    /// The next usable size; none at the end, or after what is no size. Cancelling loses nothing.
    pub(super) async fn next(&mut self) -> Option<Size> {
        loop {
            match take_size(&mut self.buffer) {
                Ok(Some(size)) => return Some(size),
                Ok(None) => {
                    let more: Bytes = self.inbox.next().await?;
                    self.buffer.extend_from_slice(&more);
                }
                Err(NoSize) => return None,
            }
        }
    }
}

struct NoSize;

/// Takes one usable size from the buffer; none when more bytes are needed.
fn take_size(buffer: &mut BytesMut) -> Result<Option<Size>, NoSize> {
    loop {
        let mut texts = serde_json::Deserializer::from_slice(buffer).into_iter::<SizeText>();
        match texts.next() {
            None => {
                buffer.clear();
                return Ok(None);
            }
            Some(Ok(SizeText { columns, rows })) => {
                let used = texts.byte_offset();
                buffer.advance(used);
                if columns > 0 && rows > 0 {
                    return Ok(Some((columns, rows)));
                }
            }
            Some(Err(error)) if error.is_eof() && buffer.len() < SIZE_BYTES => return Ok(None),
            Some(Err(_)) => return Err(NoSize),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_one_after_another() {
        let cases: [(&str, &[Size], bool); 9] = [
            (r#"{"Width":80,"Height":24}"#, &[(80, 24)], true),
            (
                "{\"Width\":80,\"Height\":24}\n{\"Width\":1,\"Height\":2}\n",
                &[(80, 24), (1, 2)],
                true,
            ),
            (r#"{"width":80,"height":24}{"Wid"#, &[(80, 24)], true),
            (
                r#"{"Width":0,"Height":24}{"Width":5,"Height":6}"#,
                &[(5, 6)],
                true,
            ),
            (r#"{"Width":80}"#, &[], true),
            (r#"{"Width":80,"Height":24,"X":[]}"#, &[(80, 24)], true),
            (r#"{"Width":70000,"Height":24}"#, &[], false),
            (r#"{"Width":-1,"Height":24}"#, &[], false),
            ("what", &[], false),
        ];
        for (text, expected, good) in cases {
            let mut buffer = BytesMut::from(text);
            let mut found = Vec::new();
            let end = loop {
                match take_size(&mut buffer) {
                    Ok(Some(size)) => found.push(size),
                    Ok(None) => break true,
                    Err(NoSize) => break false,
                }
            };
            assert_eq!((found.as_slice(), end), (expected, good), "{text}");
        }
    }

    #[test]
    fn an_endless_size_is_refused() {
        let mut buffer = BytesMut::from(r#"{"Width":1,"Height":1,"#);
        buffer.resize(SIZE_BYTES + 1, b' ');
        assert!(take_size(&mut buffer).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_sizes_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take_size(&mut buffer) {}
        }
    }
}
