//! Octets of a log file become entries.
//!
//! ```text
//!  2026-03-04T05:06:07.123456789Z stdout F text
//!  RFC 3339                       stream tags text; the first tag is F (full) or P (partial)
//! ```
//! Whoever can write to the file can write anything: a line without end is passed on in pieces, and
//! one of another form is skipped up to its end.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{LogEntry, LogOptions, LogStream};
use crate::clock::Time;

/// Longest piece of a line; the writer cuts there too.
const PIECE_BYTES: usize = 16 << 10;
/// Time, stream and tags are shorter than this.
pub(super) const HEAD_BYTES: usize = 256;

/// What stands before the text of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) time: Time,
    pub(super) stream: LogStream,
    pub(super) partial: bool,
}

/// Reads the head of a line and says where the text begins.
pub(super) fn head(line: &[u8]) -> Option<(Head, usize)> {
    let line = &line[..line.len().min(HEAD_BYTES)];
    let mut parts = line.splitn(4, |&b| b == b' ');
    let (time, stream, tags) = (parts.next()?, parts.next()?, parts.next()?);
    let text = (time.len() + stream.len() + tags.len() + 3).min(line.len());
    let time: jiff::Timestamp = std::str::from_utf8(time).ok()?.parse().ok()?;
    let stream = match stream {
        b"stdout" => LogStream::Stdout,
        b"stderr" => LogStream::Stderr,
        _ => return None,
    };
    let partial = match tags.split(|&b| b == b':').next()? {
        b"F" => false,
        b"P" => true,
        _ => return None,
    };
    let head = Head {
        time: Time::from_unix_ns(i64::try_from(time.as_nanosecond()).ok()?),
        stream,
        partial,
    };
    Some((head, text))
}

/// Puts lines together and keeps the entries that are wished.
pub(super) struct Lines {
    options: LogOptions,
    /// The beginning of a line whose end is not yet there.
    rest: Vec<u8>,
    /// Pieces of the current line were passed on, or skipped if it has no head.
    continues: Option<Option<Head>>,
    entries: VecDeque<LogEntry>,
}

impl Lines {
    pub(super) fn new(options: LogOptions) -> Self {
        Self {
            options,
            rest: Vec::new(),
            continues: None,
            entries: VecDeque::new(),
        }
    }

    pub(super) fn feed(&mut self, mut octets: &[u8]) {
        while let Some(at) = octets.iter().position(|&b| b == b'\n') {
            self.rest.extend_from_slice(&octets[..at]);
            octets = &octets[at + 1..];
            self.line(true);
        }
        self.rest.extend_from_slice(octets);
        if self.rest.len() > HEAD_BYTES + PIECE_BYTES {
            self.line(false);
        }
    }

    /// The line that was begun does not go on.
    pub(super) fn finish(&mut self) {
        if !self.rest.is_empty() {
            self.line(false);
            self.rest.clear();
        }
        self.continues = None;
    }

    pub(super) fn take(&mut self) -> VecDeque<LogEntry> {
        std::mem::take(&mut self.entries)
    }

    fn line(&mut self, is_complete: bool) {
        let line = std::mem::take(&mut self.rest);
        let (head, text) = match self.continues {
            Some(head) => (head, 0),
            None => head(&line).map_or((None, 0), |(head, text)| (Some(head), text)),
        };
        self.continues = (!is_complete).then_some(head);
        let Some(head) = head.filter(|head| self.is_wished(head)) else {
            return;
        };
        let text = Bytes::from(line).slice(text..);
        let mut from = 0;
        loop {
            let to = text.len().min(from + PIECE_BYTES);
            let is_last = to == text.len();
            self.entries.push_back(LogEntry {
                time: head.time,
                stream: head.stream,
                data: text.slice(from..to),
                partial: !is_last || !is_complete || head.partial,
            });
            if is_last {
                return;
            }
            from = to;
        }
    }

    fn is_wished(&self, head: &Head) -> bool {
        self.options.wants(head.stream) && self.options.since.is_none_or(|since| head.time >= since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "2026-03-04T05:06:07.123456789Z";

    fn options() -> LogOptions {
        LogOptions {
            follow: false,
            since: None,
            tail_lines: None,
            stdout: true,
            stderr: true,
        }
    }

    fn entries(options: LogOptions, octets: &[u8], step: usize) -> Vec<(LogStream, Vec<u8>, bool)> {
        let mut lines = Lines::new(options);
        for chunk in octets.chunks(step) {
            lines.feed(chunk);
        }
        lines.finish();
        lines
            .take()
            .into_iter()
            .map(|entry| (entry.stream, entry.data.to_vec(), entry.partial))
            .collect()
    }

    #[test]
    fn heads() {
        use LogStream::{Stderr, Stdout};
        let ns = 1_772_600_767_123_456_789;
        for (line, expected) in [
            (
                format!("{TIME} stdout F text"),
                Some((ns, Stdout, false, 40)),
            ),
            (
                format!("{TIME} stderr P:x:y a b"),
                Some((ns, Stderr, true, 44)),
            ),
            (format!("{TIME} stdout F "), Some((ns, Stdout, false, 40))),
            (format!("{TIME} stdout F"), Some((ns, Stdout, false, 39))),
            (
                "2026-03-04T06:06:07.123456789+01:00 stdout F x".to_owned(),
                Some((ns, Stdout, false, 45)),
            ),
            (
                "2026-03-04T05:06:07Z stdout F x".to_owned(),
                Some((1_772_600_767_000_000_000, Stdout, false, 30)),
            ),
            (format!("{TIME} stdin F x"), None),
            (format!("{TIME} stdout G x"), None),
            (format!("{TIME} stdout"), None),
            (format!("{TIME}  stdout F x"), None),
            ("yesterday stdout F x".to_owned(), None),
            ("9999-12-31T00:00:00Z stdout F x".to_owned(), None),
            (String::new(), None),
        ] {
            let found = head(line.as_bytes())
                .map(|(head, text)| (head.time.unix_ns(), head.stream, head.partial, text));
            assert_eq!(found, expected, "{line}");
        }
        assert_eq!(head(b"\xff\xfe stdout F x"), None);
    }

    #[test]
    fn lines_are_the_same_however_they_are_cut() {
        let log = format!(
            "{TIME} stdout F one\nnoise\n\n{TIME} stderr P twoÿ{TIME} stdout F \n\n{TIME} stdout F torn"
        );
        let expected = [
            (LogStream::Stdout, b"one".to_vec(), false),
            (
                LogStream::Stderr,
                format!("twoÿ{TIME} stdout F ").into_bytes(),
                true,
            ),
            (LogStream::Stdout, b"torn".to_vec(), true),
        ];
        for step in [1, 2, 7, 4096] {
            assert_eq!(entries(options(), log.as_bytes(), step), expected, "{step}");
        }
    }

    #[test]
    fn unwished_entries_are_left_out() {
        let log = format!(
            "2026-01-01T00:00:00Z stdout F old\n{TIME} stdout F out\n{TIME} stderr F err\n"
        );
        let since: jiff::Timestamp = TIME.parse().expect("a time");
        let since = Time::from_unix_ns(since.as_nanosecond().try_into().expect("this century"));
        for (options, expected) in [
            (
                LogOptions {
                    stderr: false,
                    ..options()
                },
                vec!["old", "out"],
            ),
            (
                LogOptions {
                    stdout: false,
                    ..options()
                },
                vec!["err"],
            ),
            (
                LogOptions {
                    since: Some(since),
                    ..options()
                },
                vec!["out", "err"],
            ),
        ] {
            let found: Vec<_> = entries(options, log.as_bytes(), 64)
                .into_iter()
                .map(|(_, data, _)| String::from_utf8(data).expect("is text"))
                .collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_line_without_end_is_passed_on_in_pieces() {
        let text: Vec<u8> = (0..100_000_u32)
            .map(|n| b'a' + u8::try_from(n % 26).expect("small"))
            .collect();
        for (tag, is_partial) in [("F", false), ("P", true)] {
            let mut log = format!("{TIME} stdout {tag} ").into_bytes();
            log.extend_from_slice(&text);
            log.extend_from_slice(b"\nnext is skipped\n");
            log.extend_from_slice(format!("{TIME} stdout F z\n").as_bytes());
            for step in [1000, 65536] {
                let mut found = entries(options(), &log, step);
                assert_eq!(found.pop().map(|(_, data, _)| data), Some(b"z".to_vec()));
                assert!(found.iter().all(|(_, data, _)| data.len() <= PIECE_BYTES));
                let partial: Vec<_> = found.iter().map(|(.., partial)| *partial).collect();
                assert!(partial[..partial.len() - 1].iter().all(|&partial| partial));
                assert_eq!(partial.last(), Some(&is_partial));
                let whole: Vec<u8> = found.into_iter().flat_map(|(_, data, _)| data).collect();
                assert!(whole == text, "{step}");
            }
        }
    }

    #[test]
    fn a_full_piece_is_one_entry() {
        let log = [
            format!("{TIME} stdout F ").as_bytes(),
            &[b'x'; PIECE_BYTES],
            b"\n",
        ]
        .concat();
        assert_eq!(entries(options(), &log, 4096).len(), 1);
    }

    #[test]
    fn noise_without_end_is_not_kept() {
        let mut lines = Lines::new(options());
        for _ in 0..1000 {
            lines.feed(&[0; 4096]);
            assert!(lines.rest.len() <= HEAD_BYTES + PIECE_BYTES + 4096);
        }
        lines.feed(format!("\n{TIME} stdout F x\n").as_bytes());
        assert_eq!(lines.take().len(), 1);
    }
}
