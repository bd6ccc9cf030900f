//! Maps of sparse files: GNU's old header, and GNU's PAX formats 0.0, 0.1 and 1.0.
//!
//! Source: GNU tar manual, "Storing Sparse Files".

/// A run of stored bytes; everything between two runs is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rootfs) struct Segment {
    pub(in crate::rootfs) offset: u64,
    pub(in crate::rootfs) length: u64,
}

/// Where the stored bytes of a sparse file belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::rootfs) struct SparseMap {
    /// Size with holes.
    pub(in crate::rootfs) real_size: u64,
    /// Ascending, without overlap, inside the size.
    pub(in crate::rootfs) segments: Vec<Segment>,
}

/// More entries than any writer makes: 16 MiB of memory.
pub(super) const MAX_SEGMENTS: usize = 1 << 20;

impl SparseMap {
    /// A map that is consistent in itself and with the number of bytes stored.
    pub(super) fn new(real_size: u64, segments: Vec<Segment>, stored: u64) -> Option<Self> {
        let mut end = 0;
        let mut sum = 0_u64;
        for segment in &segments {
            if segment.offset < end {
                return None;
            }
            end = segment.offset.checked_add(segment.length)?;
            sum = sum.checked_add(segment.length)?;
        }
        (end <= real_size && sum == stored && segments.len() <= MAX_SEGMENTS).then_some(Self {
            real_size,
            segments,
        })
    }
}

/// `offset,length,offset,length,…` of format 0.1.
pub(super) fn parse_list(list: &[u8]) -> Option<Vec<Segment>> {
    if list.is_empty() {
        return Some(Vec::new());
    }
    let numbers = list
        .split(|byte| *byte == b',')
        .map(decimal)
        .collect::<Option<Vec<_>>>()?;
    let (pairs, rest) = numbers.as_chunks::<2>();
    rest.is_empty().then(|| {
        pairs
            .iter()
            .map(|[offset, length]| Segment {
                offset: *offset,
                length: *length,
            })
            .collect()
    })
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_must_fit_itself_and_its_content() {
        fn check(real_size: u64, segments: &[(u64, u64)], stored: u64, good: bool) {
            let list = segments
                .iter()
                .map(|(offset, length)| Segment {
                    offset: *offset,
                    length: *length,
                })
                .collect();
            let map = SparseMap::new(real_size, list, stored);
            assert_eq!(map.is_some(), good, "{real_size} {segments:?} {stored}");
        }
        check(0, &[], 0, true);
        check(100, &[], 0, true);
        check(100, &[(0, 10), (90, 10)], 20, true);
        check(100, &[(0, 10), (100, 0)], 10, true);
        check(100, &[(0, 10), (91, 10)], 20, false);
        check(100, &[(0, 10), (5, 10)], 20, false);
        check(100, &[(50, 10), (0, 10)], 20, false);
        check(100, &[(0, 10)], 11, false);
        check(u64::MAX, &[(u64::MAX, 2)], 2, false);
        check(u64::MAX, &[(0, u64::MAX), (u64::MAX, u64::MAX)], 0, false);
    }

    #[test]
    fn a_list_has_pairs_of_numbers() {
        assert_eq!(parse_list(b""), Some(Vec::new()));
        assert_eq!(
            parse_list(b"0,5,10,6"),
            Some(vec![
                Segment {
                    offset: 0,
                    length: 5
                },
                Segment {
                    offset: 10,
                    length: 6
                }
            ])
        );
        for bad in [
            "0",
            "0,",
            "0,1,",
            "a,1",
            "-1,1",
            "0,1,2",
            "0, 1",
            "99999999999999999999,1",
        ] {
            assert_eq!(parse_list(bad.as_bytes()), None, "{bad}");
        }
    }
}
