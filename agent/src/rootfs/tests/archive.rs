//! Writes archives, also ones that no tar would.

/// An archive in the making.
#[derive(Clone, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
}

/// A ustar header with sensible fields, to be spoilt.
pub(super) fn header(kind: u8, name: &[u8], size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    let length = name.len().min(100);
    block[..length].copy_from_slice(&name[..length]);
    let mode: &[u8] = if kind == b'5' {
        b"0000755\0"
    } else {
        b"0000644\0"
    };
    block[100..108].copy_from_slice(mode);
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    block[136..148].copy_from_slice(b"00000001750\0");
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block
}

impl Archive {
    /// An entry; `change` has the header before its checksum is made.
    pub(super) fn raw(
        mut self,
        mut block: [u8; 512],
        content: &[u8],
        change: impl FnOnce(&mut [u8; 512]),
    ) -> Self {
        change(&mut block);
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
        self.content(content)
    }

    /// Bytes filled up to whole blocks.
    pub(super) fn content(mut self, content: &[u8]) -> Self {
        self.bytes.extend_from_slice(content);
        let whole = self.bytes.len().next_multiple_of(512);
        self.bytes.resize(whole, 0);
        self
    }

    pub(super) fn entry(self, kind: u8, name: &str, link: &str, content: &[u8]) -> Self {
        let block = header(kind, name.as_bytes(), content.len() as u64);
        self.long(b'L', name)
            .long(b'K', link)
            .raw(block, content, |block| {
                let length = link.len().min(100);
                block[157..157 + length].copy_from_slice(&link.as_bytes()[..length]);
            })
    }

    /// A GNU header for a name that does not fit the next one.
    fn long(self, kind: u8, name: &str) -> Self {
        if name.len() <= 100 {
            return self;
        }
        let content = [name.as_bytes(), b"\0"].concat();
        let block = header(kind, b"././@LongLink", content.len() as u64);
        self.raw(block, &content, |_| {})
    }

    pub(super) fn file(self, name: &str, content: &str) -> Self {
        self.entry(b'0', name, "", content.as_bytes())
    }

    pub(super) fn dir(self, name: &str) -> Self {
        self.entry(b'5', name, "", b"")
    }

    pub(super) fn link(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, b"")
    }

    pub(super) fn hard(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name, target, b"")
    }

    pub(super) fn device(self, kind: u8, name: &str, major: u32, minor: u32) -> Self {
        self.raw(header(kind, name.as_bytes(), 0), b"", |block| {
            block[329..337].copy_from_slice(format!("{major:07o}\0").as_bytes());
            block[337..345].copy_from_slice(format!("{minor:07o}\0").as_bytes());
        })
    }

    /// A PAX header for the next entry.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            content.extend(record(key, value));
        }
        self.pax_raw(&content)
    }

    pub(super) fn pax_raw(self, content: &[u8]) -> Self {
        self.raw(
            header(b'x', b"PaxHeaders/x", content.len() as u64),
            content,
            |_| {},
        )
    }

    /// The whole archive with its end.
    pub(super) fn end(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }

    /// The archive as it is, without an end.
    pub(super) fn cut(self) -> Vec<u8> {
        self.bytes
    }
}

/// `LENGTH KEY=VALUE\n`, whose length counts its own digits.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (1..8)
        .map(|digits| digits + rest)
        .find(|length| length.to_string().len() + rest == *length)
        .expect("short records have few digits");
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}
