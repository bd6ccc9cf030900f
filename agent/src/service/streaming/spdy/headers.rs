//! Header blocks: pairs of text, deflated with one zlib stream per direction of a connection.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;

/// Pairs in one block.
const PAIRS: usize = 1000;
/// Bytes of one inflated block: ours have five short pairs.
const BLOCK_BYTES: usize = 256 << 10;

/// Why a header block can't be read. Nothing can be read from the connection after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::service::streaming) enum HeaderError {
    /// Not zlib, or another dictionary.
    #[error("the header block can't be inflated")]
    Deflate,
    /// More than we take.
    #[error("the header block is too large")]
    TooLarge,
    /// Lengths point outside of it, or text is not UTF-8.
    #[error("the header block is malformed")]
    Malformed,
}

/// Names in lower case and their values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::service::streaming) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of a header.
    pub(in crate::service::streaming) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .and_then(|(_, value)| value.split('\0').next())
    }

    fn parse(block: &[u8]) -> Result<Self, HeaderError> {
        let mut rest = block;
        let count = number(&mut rest)?;
        if count > PAIRS {
            return Err(HeaderError::TooLarge);
        }
        let mut pairs = Vec::new();
        for _ in 0..count {
            let name = text(&mut rest)?.to_ascii_lowercase();
            pairs.push((name, text(&mut rest)?));
        }
        if !rest.is_empty() {
            return Err(HeaderError::Malformed);
        }
        Ok(Self(pairs))
    }
}

#[cfg(test)]
impl<const N: usize> From<[(&str, &str); N]> for Headers {
    fn from(pairs: [(&str, &str); N]) -> Self {
        Self(
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        )
    }
}

fn number(rest: &mut &[u8]) -> Result<usize, HeaderError> {
    let (raw, after) = rest.split_first_chunk().ok_or(HeaderError::Malformed)?;
    *rest = after;
    usize::try_from(u32::from_be_bytes(*raw)).map_err(|_| HeaderError::Malformed)
}

fn text(rest: &mut &[u8]) -> Result<String, HeaderError> {
    let length = number(rest)?;
    let (text, after) = rest
        .split_at_checked(length)
        .ok_or(HeaderError::Malformed)?;
    *rest = after;
    String::from_utf8(text.to_vec()).map_err(|_| HeaderError::Malformed)
}

/// The reading direction. Every block of a connection goes through it, also of refused streams:
/// each builds on those before.
pub(in crate::service::streaming) struct Inflater(Decompress);

impl Inflater {
    pub(in crate::service::streaming) fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub(in crate::service::streaming) fn read(
        &mut self,
        deflated: &[u8],
    ) -> Result<Headers, HeaderError> {
        Headers::parse(&self.inflate(deflated)?)
    }

    fn inflate(&mut self, deflated: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let began = self.0.total_in();
        let mut block = Vec::with_capacity(1024);
        loop {
            let used =
                usize::try_from(self.0.total_in() - began).map_err(|_| HeaderError::TooLarge)?;
            let input = &deflated[used..];
            match self
                .0
                .decompress_vec(input, &mut block, FlushDecompress::Sync)
            {
                Ok(Status::StreamEnd) => return Err(HeaderError::Deflate),
                Ok(Status::Ok | Status::BufError) => {
                    let rest = deflated.len()
                        - usize::try_from(self.0.total_in() - began).unwrap_or(usize::MAX);
                    if block.len() < block.capacity() {
                        // There was room for more, so there is no more.
                        return if rest == 0 {
                            Ok(block)
                        } else {
                            Err(HeaderError::Deflate)
                        };
                    }
                    if block.len() >= BLOCK_BYTES {
                        return Err(HeaderError::TooLarge);
                    }
                    block.reserve(block.len());
                }
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| HeaderError::Deflate)?;
                }
                Err(_) => return Err(HeaderError::Deflate),
            }
        }
    }
}

/// The writing direction.
pub(super) struct Deflater(Compress);

impl Deflater {
    pub(super) fn new() -> Self {
        let mut deflate = Compress::new(Compression::fast(), true);
        deflate
            .set_dictionary(&DICTIONARY)
            .expect("a new stream takes a dictionary");
        Self(deflate)
    }

    pub(super) fn write(&mut self, headers: &Headers) -> Vec<u8> {
        let mut block = Vec::new();
        let number = |block: &mut Vec<u8>, value: usize| {
            let value = u32::try_from(value).expect("our own headers are short");
            block.extend_from_slice(&value.to_be_bytes());
        };
        number(&mut block, headers.0.len());
        for text in headers.0.iter().flat_map(|(name, value)| [name, value]) {
            number(&mut block, text.len());
            block.extend_from_slice(text.as_bytes());
        }
        self.deflate(&block)
    }

    fn deflate(&mut self, block: &[u8]) -> Vec<u8> {
        let began = self.0.total_in();
        let mut deflated = Vec::with_capacity(block.len() + 64);
        loop {
            let used = usize::try_from(self.0.total_in() - began).expect("no more than the block");
            self.0
                .compress_vec(&block[used..], &mut deflated, FlushCompress::Sync)
                .expect("deflating memory to memory does not fail");
            if deflated.len() < deflated.capacity() {
                return deflated;
            }
            deflated.reserve(256);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_of_one_connection_build_on_each_other() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        let blocks = [
            Headers::default(),
            Headers::from([("streamtype", "error"), ("port", "80"), ("requestid", "0")]),
            Headers::from([("streamtype", "data"), ("port", "80"), ("requestid", "0")]),
            Headers::from([("content-type", "text/html"), ("x", "")]),
        ];
        for headers in blocks {
            let deflated = deflater.write(&headers);
            assert_eq!(inflater.read(&deflated), Ok(headers));
        }
    }

    #[test]
    fn the_second_block_alone_can_not_be_read() {
        let mut deflater = Deflater::new();
        deflater.write(&Headers::from([("streamtype", "error")]));
        let second = deflater.write(&Headers::from([("streamtype", "data")]));
        assert_eq!(Inflater::new().read(&second), Err(HeaderError::Deflate));
    }

    #[test]
    fn malformed_blocks_are_refused() {
        let cases: [(&[u8], HeaderError); 6] = [
            (b"", HeaderError::Malformed),
            (b"\0\0\0\x01", HeaderError::Malformed),
            (b"\0\0\0\0extra", HeaderError::Malformed),
            (b"\0\0\0\x01\xff\xff\xff\xffa", HeaderError::Malformed),
            (b"\xff\xff\xff\xff", HeaderError::TooLarge),
            (b"\0\0\0\x01\0\0\0\x01\xff\0\0\0\0", HeaderError::Malformed),
        ];
        for (block, expected) in cases {
            let deflated = Deflater::new().deflate(block);
            assert_eq!(Inflater::new().read(&deflated), Err(expected), "{block:?}");
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let deflated = Deflater::new().deflate(&vec![0; 64 << 20]);
        assert!(deflated.len() < 1 << 20);
        assert_eq!(Inflater::new().read(&deflated), Err(HeaderError::TooLarge));
    }

    #[test]
    fn names_are_compared_in_lower_case_and_the_first_value_counts() {
        let mut deflater = Deflater::new();
        let deflated = deflater.write(&Headers::from([("StreamType", "data\0error")]));
        let headers = Inflater::new().read(&deflated).expect("well formed");
        assert_eq!(headers.get("streamtype"), Some("data"));
        assert_eq!(headers.get("port"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let mut inflater = Inflater::new();
            let _ = inflater.read(&bytes);
            let _ = inflater.read(&bytes);
        }

        #[test]
        fn any_inflated_bytes_are_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Headers::parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read(pairs in proptest::collection::vec(("[a-z-]{1,20}", "[ -~]{0,3000}"), 0..30)) {
            let headers = Headers(pairs);
            let mut deflater = Deflater::new();
            let mut inflater = Inflater::new();
            for _ in 0..3 {
                prop_assert_eq!(inflater.read(&deflater.write(&headers)), Ok(headers.clone()));
            }
        }
    }
}
