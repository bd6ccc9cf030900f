//! PAX extended headers: records `LENGTH KEY=VALUE\n` that refine the header after them.
//!
//! Source: POSIX pax(1) "pax Extended Header"; keys `SCHILY.*` from star(5), `GNU.sparse.*` from
//! the GNU tar manual.

use super::{
    header::owner,
    sparse::{MAX_SEGMENTS, Segment, decimal, parse_list},
};
use crate::rootfs::error::HeaderFault;

/// Seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::rootfs) struct Moment {
    pub(in crate::rootfs) seconds: i64,
    pub(in crate::rootfs) nanoseconds: u32,
}

/// What the records say; `None` where the header's own field stands.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Moment>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// Records of the three sparse formats.
#[derive(Debug, Default, PartialEq)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Formats 0.0 and 0.1.
    pub(super) segments: Option<Vec<Segment>>,
    /// Format 1.0: the map precedes the content.
    pub(super) map_in_content: bool,
    major: Option<u64>,
    minor: Option<u64>,
    /// Format 0.0: an offset that waits for its length.
    offset: Option<u64>,
}

const XATTR: &[u8] = b"SCHILY.xattr.";

pub(super) fn parse(mut records: &[u8]) -> Result<Pax, HeaderFault> {
    let mut pax = Pax::default();
    // Some writers fill the rest of the last block with NUL bytes and count them.
    while !records.iter().all(|byte| *byte == 0) {
        let (key, value, rest) = record(records).ok_or(HeaderFault::Pax)?;
        pax.set(key, value).ok_or(HeaderFault::Pax)?;
        records = rest;
    }
    pax.sparse.map_in_content = (pax.sparse.major, pax.sparse.minor) == (Some(1), Some(0));
    Ok(pax)
}

/// Key and value of the first record, and what follows it.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&records[..space])?).ok()?;
    if length > records.len() {
        return None;
    }
    let (record, rest) = records.split_at(length);
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    (!key.is_empty() && !key.contains(&0)).then_some((key, value, rest))
}

impl Pax {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        if let Some(name) = key.strip_prefix(XATTR) {
            // Of two records for a name the later one is set later.
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Some(());
        }
        // No value withdraws a record; for all of these the header's field then stands.
        if value.is_empty() && key != b"GNU.sparse.map" {
            return Some(());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(id(value)?),
            b"gid" => self.gid = Some(id(value)?),
            b"mtime" => self.mtime = Some(moment(value)?),
            _ => return self.sparse.set(key, value),
        }
        Some(())
    }
}

impl PaxSparse {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"GNU.sparse.name" => self.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.real_size = Some(decimal(value)?),
            b"GNU.sparse.major" => self.major = Some(decimal(value)?),
            b"GNU.sparse.minor" => self.minor = Some(decimal(value)?),
            b"GNU.sparse.map" => self.segments = Some(parse_list(value)?),
            b"GNU.sparse.numblocks" => {
                self.segments.get_or_insert_default();
            }
            b"GNU.sparse.offset" => {
                let offset = decimal(value)?;
                if self.offset.replace(offset).is_some() {
                    return None;
                }
            }
            b"GNU.sparse.numbytes" => {
                let (offset, length) = (self.offset.take()?, decimal(value)?);
                let segments = self.segments.get_or_insert_default();
                segments.push(Segment { offset, length });
                if segments.len() > MAX_SEGMENTS {
                    return None;
                }
            }
            _ => {}
        }
        Some(())
    }
}

fn id(value: &[u8]) -> Option<u32> {
    owner(i64::try_from(decimal(value)?).ok())
}

/// `[-]SECONDS[.FRACTION]`, digits beyond nanoseconds cut off.
fn moment(value: &[u8]) -> Option<Moment> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digit = |at| fraction.get(at).map_or(0, |byte| u32::from(*byte - b'0'));
    let nanoseconds = (0..9).fold(0, |sum, at| sum * 10 + digit(at));
    Some(match (negative, nanoseconds) {
        (false, _) => Moment {
            seconds,
            nanoseconds,
        },
        (true, 0) => Moment {
            seconds: -seconds,
            nanoseconds,
        },
        (true, _) => Moment {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_measured_not_split() {
        let pax =
            parse(b"12 path=a\nb\n28 SCHILY.xattr.user.x=a\0=b\n30 mtime=1350244992.023960108\n")
                .expect("well formed");
        assert_eq!(pax.path.as_deref(), Some(&b"a\nb"[..]));
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"a\0=b".to_vec())]);
        let mtime = Moment {
            seconds: 1_350_244_992,
            nanoseconds: 23_960_108,
        };
        assert_eq!(pax.mtime, Some(mtime));
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"10 path=a"[..],
            b"9 path=ab\n",
            b"99 path=a\n",
            b"path=a\n",
            b"0 path=a\n",
            b"4 =\n",
            b"5 =a\n",
            b"9 path-a\n",
            b"10 size=1x\n",
            b"11 size=-1\n",
            b"18 uid=4294967295\n",
            b"11 mtime=x\n",
            b"99999999999999999999999 a=b\n",
            b"18446744073709551616 a=b\n",
        ] {
            assert_eq!(parse(bad), Err(HeaderFault::Pax), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn time_before_1970_counts_backwards() {
        fn check(text: &str, seconds: i64, nanoseconds: u32) {
            let expected = Moment {
                seconds,
                nanoseconds,
            };
            assert_eq!(moment(text.as_bytes()), Some(expected), "{text}");
        }
        check("0", 0, 0);
        check("1.5", 1, 500_000_000);
        check("1.0000000019", 1, 1);
        check("-1", -1, 0);
        check("-1.5", -2, 500_000_000);
        check("1.", 1, 0);
        assert_eq!(moment(b"1.x"), None);
        assert_eq!(moment(b"9223372036854775808"), None);
    }
}
