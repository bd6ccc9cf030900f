//! Lists in parts: a token says after which item the next part begins, so that what comes and goes
//! meanwhile neither repeats nor hides another item.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};

use super::error::NativeError;
use crate::clock::Time;

const DEFAULT_SIZE: u32 = 100;
const LARGEST_SIZE: u32 = 1000;
/// Longer than any that we give out.
const LONGEST_TOKEN: usize = 4096;

/// Which part of which list is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    list: &'static str,
    size: usize,
    /// Key of the last item of the part before.
    after: Option<String>,
}

impl Page {
    /// Reads `page_size` and `page_token` of a request for `list`.
    pub(super) fn new(list: &'static str, size: u32, token: &str) -> Result<Self, NativeError> {
        if size > LARGEST_SIZE {
            return Err(NativeError::range("page_size", size, 0, LARGEST_SIZE));
        }
        let size = if size == 0 { DEFAULT_SIZE } else { size };
        Ok(Self {
            list,
            size: usize::try_from(size).unwrap_or(usize::MAX),
            after: read(list, token)?,
        })
    }

    /// The wanted part of `items`, in the order of their keys, and the token of the next one.
    pub(super) fn cut<T>(
        &self,
        items: impl IntoIterator<Item = T>,
        key: impl Fn(&T) -> String,
    ) -> (Vec<T>, String) {
        let mut keyed: Vec<(String, T)> = items
            .into_iter()
            .map(|item| (key(&item), item))
            .filter(|(key, _)| self.after.as_ref().is_none_or(|after| key > after))
            .collect();
        keyed.sort_by(|(one, _), (other, _)| one.cmp(other));
        let more = keyed.len() > self.size;
        keyed.truncate(self.size);
        let token = match keyed.last() {
            Some((last, _)) if more => {
                BASE64_URL_SAFE_NO_PAD.encode(format!("{}\n{last}", self.list))
            }
            _ => String::new(),
        };
        (keyed.into_iter().map(|(_, item)| item).collect(), token)
    }
}

fn read(list: &str, token: &str) -> Result<Option<String>, NativeError> {
    if token.is_empty() {
        return Ok(None);
    }
    Some(token)
        .filter(|token| token.len() <= LONGEST_TOKEN)
        .and_then(|token| BASE64_URL_SAFE_NO_PAD.decode(token).ok())
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| {
            let (of, key) = text.split_once('\n')?;
            (of == list).then(|| key.to_owned())
        })
        .map(Some)
        .ok_or(NativeError::PageToken)
}

/// The key that puts the newest first, equal times by id.
pub(super) fn newest_first(at: Time, id: &str) -> String {
    format!("{:020}/{id}", i64::MAX.abs_diff(at.unix_ns()))
}

/// The key that puts the oldest first.
pub(super) fn oldest_first(at: Time, id: &str) -> String {
    format!("{:020}/{id}", i64::MIN.abs_diff(at.unix_ns()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(item: &u32) -> String {
        format!("{item:04}")
    }

    #[test]
    fn parts_together_are_the_list_whatever_comes_meanwhile() {
        let first = Page::new("x", 2, "").expect("valid");
        let (part, token) = first.cut([5, 1, 3], key);
        assert_eq!(part, [1, 3]);
        let second = Page::new("x", 2, &token).expect("our own");
        let (part, token) = second.cut([0, 2, 3, 5, 7], key);
        assert_eq!((part, token.as_str()), (vec![5, 7], ""));
        let (all, token) = Page::new("x", 0, "").expect("valid").cut(0..100, key);
        assert_eq!((all.len(), token.as_str()), (100, ""));
    }

    #[test]
    fn foreign_tokens_and_sizes_are_refused() {
        let (_, token) = Page::new("x", 1, "").expect("valid").cut([1, 2], key);
        assert!(matches!(
            Page::new("y", 1, &token),
            Err(NativeError::PageToken)
        ));
        for token in ["!", "\u{1}not one", "YQ", &"A".repeat(5000)] {
            assert!(
                matches!(Page::new("x", 1, token), Err(NativeError::PageToken)),
                "{token:?}"
            );
        }
        assert!(matches!(
            Page::new("x", 1001, ""),
            Err(NativeError::OutOfRange { .. })
        ));
        assert!(Page::new("x", 1000, "").is_ok());
    }

    #[test]
    fn newer_comes_first_also_before_1970() {
        let at = |ns| newest_first(Time::from_unix_ns(ns), "id");
        assert!(at(2) < at(1) && at(1) < at(-1) && at(i64::MAX) < at(i64::MIN));
        let at = |ns| oldest_first(Time::from_unix_ns(ns), "id");
        assert!(at(1) < at(2) && at(-1) < at(1) && at(i64::MIN) < at(i64::MAX));
    }
}
