//! One 512-byte header block, in any of the formats V7, ustar, star and GNU.
//!
//! Source: POSIX pax(1) "ustar Interchange Format"; tar(5); GNU tar manual, "Basic Tar Format".

use super::{sparse::Segment, stream::BLOCK};
use crate::rootfs::error::HeaderFault;

pub(super) struct Header<'a> {
    block: &'a [u8; BLOCK],
}

#[derive(PartialEq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<'a> Header<'a> {
    /// A header whose checksum is right.
    pub(super) fn new(block: &'a [u8; BLOCK]) -> Result<Self, HeaderFault> {
        let stated = number(&block[148..156]).ok_or(HeaderFault::Checksum)?;
        let others = || block[..148].iter().chain(&block[156..]);
        let blanks = 8 * i64::from(b' ');
        let unsigned = others().map(|byte| i64::from(*byte)).sum::<i64>() + blanks;
        // Some old writers summed signed characters.
        let signed = || {
            others()
                .map(|byte| i64::from(byte.cast_signed()))
                .sum::<i64>()
                + blanks
        };
        if stated == unsigned || stated == signed() {
            Ok(Self { block })
        } else {
            Err(HeaderFault::Checksum)
        }
    }

    fn format(&self) -> Format {
        match &self.block[257..265] {
            b"ustar  \0" => Format::Gnu,
            magic if magic.starts_with(b"ustar\0") && self.block.ends_with(b"tar\0") => {
                Format::Star
            }
            magic if magic.starts_with(b"ustar\0") => Format::Ustar,
            _ => Format::V7,
        }
    }

    /// Type flag; a regular file with a trailing slash in an old header is a directory.
    pub(super) fn kind(&self) -> u8 {
        match self.block[156] {
            0 if self.name().ends_with(b"/") => b'5',
            0 => b'0',
            other => other,
        }
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let prefix = match self.format() {
            Format::Ustar => text(&self.block[345..500]),
            Format::Star => text(&self.block[345..476]),
            Format::V7 | Format::Gnu => b"",
        };
        let name = text(&self.block[..100]);
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    pub(super) fn link(&self) -> &'a [u8] {
        text(&self.block[157..257])
    }

    pub(super) fn mode(&self) -> Result<u32, HeaderFault> {
        let mode = self.number(100, 8).ok_or(HeaderFault::Number("mode"))?;
        Ok((mode & 0o7777) as u32)
    }

    pub(super) fn uid(&self) -> Result<u32, HeaderFault> {
        owner(self.number(108, 8)).ok_or(HeaderFault::Number("uid"))
    }

    pub(super) fn gid(&self) -> Result<u32, HeaderFault> {
        owner(self.number(116, 8)).ok_or(HeaderFault::Number("gid"))
    }

    pub(super) fn size(&self) -> Result<u64, HeaderFault> {
        unsigned(self.number(124, 12)).ok_or(HeaderFault::Number("size"))
    }

    pub(super) fn mtime(&self) -> Result<i64, HeaderFault> {
        self.number(136, 12).ok_or(HeaderFault::Number("mtime"))
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> Result<(u32, u32), HeaderFault> {
        // The kernel's dev_t has 12 and 20 bits for them.
        let part = |at, bits: u32| {
            let part = unsigned(self.number(at, 8))?;
            u32::try_from(part).ok().filter(|part| part >> bits == 0)
        };
        match (part(329, 12), part(337, 20)) {
            (Some(major), Some(minor)) => Ok((major, minor)),
            _ => Err(HeaderFault::Number("device")),
        }
    }

    /// Old GNU sparse file: size with holes, the first part of the map, whether more blocks of
    /// the map follow.
    pub(super) fn gnu_sparse(&self) -> Option<(u64, Vec<Segment>, bool)> {
        let real_size = unsigned(self.number(483, 12))?;
        Some((
            real_size,
            segments(&self.block[386..482])?,
            self.block[482] != 0,
        ))
    }

    fn number(&self, at: usize, length: usize) -> Option<i64> {
        number(&self.block[at..at + length])
    }
}

/// A further block of an old GNU sparse map, and whether one more follows.
pub(super) fn gnu_sparse_block(block: &[u8; BLOCK]) -> Option<(Vec<Segment>, bool)> {
    Some((segments(&block[..504])?, block[504] != 0))
}

fn segments(table: &[u8]) -> Option<Vec<Segment>> {
    table
        .chunks_exact(24)
        .take_while(|slot| slot[0] != 0)
        .map(|slot| {
            let (offset, length) = slot.split_at(12);
            Some(Segment {
                offset: unsigned(number(offset))?,
                length: unsigned(number(length))?,
            })
        })
        .collect()
}

fn unsigned(value: Option<i64>) -> Option<u64> {
    u64::try_from(value?).ok()
}

/// A user or group; the largest number means "nobody" to chown(2), so it owns nothing.
pub(super) fn owner(value: Option<i64>) -> Option<u32> {
    u32::try_from(value?)
        .ok()
        .filter(|owner| *owner != u32::MAX)
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Octal digits between blanks (none at all are zero), or base 256 after a set top bit.
fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        return base256(field);
    }
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(first) = field.iter().position(|byte| !blank(byte)) else {
        return Some(0);
    };
    let last = field.iter().rposition(|byte| !blank(byte))?;
    field[first..=last]
        .iter()
        .try_fold(0_i64, |sum, byte| match byte {
            b'0'..=b'7' => sum.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
            _ => None,
        })
}

/// Two's complement, big endian; the top bit only marks the format.
fn base256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let first = if negative { field[0] } else { field[0] & 0x7f };
    let start = if negative { -1 } else { 0 };
    std::iter::once(first)
        .chain(field[1..].iter().copied())
        .try_fold(start, |sum: i64, byte| {
            sum.checked_mul(256).map(|sum| sum | i64::from(byte))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        fn check(field: &[u8], expected: Option<i64>) {
            assert_eq!(number(field), expected, "{field:?}");
        }
        check(b"0000644\0", Some(0o644));
        check(b"   644 \0", Some(0o644));
        check(b"777777777777", Some(0o777_777_777_777));
        check(b"        ", Some(0));
        check(b"\0\0\0\0\0\0\0\0", Some(0));
        check(b"12 4\0\0\0\0", None);
        check(b"0000009\0", None);
        check(b"-000001\0", None);
        check(b"\x80\0\0\0\0\0\x01\x02", Some(0x102));
        check(b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1));
        check(b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2));
        check(
            b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
            Some(i64::MAX),
        );
        check(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", None);
        check(b"\x80\x01\0\0\0\0\0\0\0\0\0\0", None);
    }

    #[test]
    fn nobody_owns_nothing() {
        assert_eq!(owner(Some(0)), Some(0));
        assert_eq!(owner(Some(4_294_967_294)), Some(4_294_967_294));
        assert_eq!(owner(Some(4_294_967_295)), None);
        assert_eq!(owner(Some(-1)), None);
    }
}
