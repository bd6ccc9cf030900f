//! The CRI log: lines of both streams in one file.
//!
//! ```text
//! 2026-03-04T05:06:07.123456789Z stdout F text
//! ```
//! `P` instead of `F` marks a piece that had no newline in the original: a line longer than
//! [`MAX_LINE_BYTES`] is cut, and output that ends without a newline ends with a `P`. Nothing
//! here ever fails towards the container: what cannot be written is dropped and reading goes on.

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::time::{ClockId, clock_gettime};

use crate::poll::Stream;

/// Longest piece of a line.
pub(crate) const MAX_LINE_BYTES: usize = 16 << 10;

/// Slices of one writev, below the kernel's limit of 1024.
const MAX_SLICES: usize = 1020;

/// What of a stream waits for its newline.
#[derive(Debug, Default)]
pub(crate) struct Partial(Vec<u8>);

/// A piece of a line, in two parts: what waited, and what has just come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece<'a> {
    full: bool,
    waited: &'a [u8],
    fresh: &'a [u8],
}

/// Cuts `chunk`, which follows `waited`, into pieces. What is left over at the end is told as
/// (whether `waited` still belongs to it, its part of `chunk`).
fn split<'a>(
    waited: &'a [u8],
    chunk: &'a [u8],
    mut emit: impl FnMut(Piece<'a>),
) -> (bool, &'a [u8]) {
    let mut waited = waited;
    let mut rest = chunk;
    loop {
        let end = rest.iter().position(|byte| *byte == b'\n');
        let mut fresh = &rest[..end.unwrap_or(rest.len())];
        if end.is_some() {
            // A carriage return before the newline belongs to neither line nor log.
            match (fresh.split_last(), waited.split_last()) {
                (Some((b'\r', before)), _) => fresh = before,
                (None, Some((b'\r', before))) => waited = before,
                _ => {}
            }
        }
        while waited.len() + fresh.len() > MAX_LINE_BYTES {
            let (now, later) = fresh.split_at(MAX_LINE_BYTES.saturating_sub(waited.len()));
            emit(Piece {
                full: false,
                waited,
                fresh: now,
            });
            (waited, fresh) = (&[], later);
        }
        let Some(end) = end else {
            return (!waited.is_empty(), fresh);
        };
        emit(Piece {
            full: true,
            waited,
            fresh,
        });
        waited = &[];
        rest = &rest[end + 1..];
    }
}

/// A log file.
#[derive(Debug)]
pub(crate) struct LogFile {
    file: OwnedFd,
    path: PathBuf,
    rotate_bytes: u64,
    keep_files: u32,
    size_bytes: u64,
    /// A write failed in the middle of a line: the next one starts on a new line.
    torn: bool,
}

impl LogFile {
    pub(crate) fn new(file: OwnedFd, log: &crate::wire::Log) -> Self {
        let size_bytes = size_of_file(&file);
        Self {
            file,
            path: PathBuf::from(&log.path),
            rotate_bytes: log.rotate_bytes,
            keep_files: log.keep_files,
            size_bytes,
            torn: false,
        }
    }

    /// Goes on with another file.
    pub(crate) fn reopen(&mut self, file: OwnedFd) {
        self.size_bytes = size_of_file(&file);
        self.file = file;
        self.torn = false;
    }

    /// Appends what `stream` has brought.
    pub(crate) fn append(&mut self, stream: Stream, partial: &mut Partial, chunk: &[u8]) {
        let waited = std::mem::take(&mut partial.0);
        let mut batch = Batch::new(self, stream);
        let (keeps, fresh) = split(&waited, chunk, |piece| batch.push(piece));
        batch.flush();
        let left = [if keeps { waited.as_slice() } else { &[] }, fresh].concat();
        partial.0 = left;
        self.rotate_if_due();
    }

    /// Writes out what waits for a newline that will not come.
    pub(crate) fn finish(&mut self, stream: Stream, partial: &mut Partial) {
        let waited = std::mem::take(&mut partial.0);
        if waited.is_empty() {
            return;
        }
        let mut batch = Batch::new(self, stream);
        batch.push(Piece {
            full: false,
            waited: &waited,
            fresh: &[],
        });
        batch.flush();
    }

    fn write(&mut self, slices: &mut [IoSlice<'_>]) {
        let mut slices = slices;
        if self.torn {
            // If this fails too, so will the rest.
            let _ = rustix::io::write(&self.file, b"\n");
            self.torn = false;
        }
        let mut begun = false;
        while !slices.is_empty() {
            match rustix::io::writev(&self.file, slices) {
                Ok(0) => break,
                Ok(written) => {
                    self.size_bytes += written as u64;
                    IoSlice::advance_slices(&mut slices, written);
                    begun = true;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => {
                    self.torn = begun;
                    return;
                }
            }
        }
    }

    fn rotate_if_due(&mut self) {
        if self.rotate_bytes == 0 || self.size_bytes < self.rotate_bytes {
            return;
        }
        // Whatever goes wrong, the log goes on in the file that is open; the next try comes after
        // as many bytes again.
        if self.rotate().is_err() {
            self.size_bytes = 0;
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let ours = rustix::fs::fstat(&self.file)?;
        let named = rustix::fs::stat(&self.path).ok();
        // Somebody else may have renamed it already; then only the new file is missing.
        if named.is_some_and(|named| (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)) {
            self.shift_old_files()?;
        }
        let mode = Mode::from_raw_mode(ours.st_mode);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(CWD, &self.path, flags, mode)?;
        let owner = (Uid::from_raw(ours.st_uid), Gid::from_raw(ours.st_gid));
        rustix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
        self.reopen(file);
        Ok(())
    }

    fn shift_old_files(&self) -> io::Result<()> {
        if self.keep_files == 0 {
            return fs::remove_file(&self.path);
        }
        for number in (1..self.keep_files).rev() {
            match fs::rename(
                numbered(&self.path, number),
                numbered(&self.path, number + 1),
            ) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&self.path, numbered(&self.path, 1))
    }
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

fn size_of_file(file: &OwnedFd) -> u64 {
    rustix::fs::fstat(file).map_or(0, |found| u64::try_from(found.st_size).unwrap_or(0))
}

/// Lines on their way to one writev.
struct Batch<'a, 'log> {
    log: &'log mut LogFile,
    /// `<time> <stream> P `, and the same with `F`.
    prefixes: [String; 2],
    pieces: Vec<Piece<'a>>,
}

impl<'a, 'log> Batch<'a, 'log> {
    fn new(log: &'log mut LogFile, stream: Stream) -> Self {
        let now = clock_gettime(ClockId::Realtime);
        let time = rfc3339(now.tv_sec, u32::try_from(now.tv_nsec).unwrap_or(0));
        let name = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        Self {
            log,
            prefixes: [format!("{time} {name} P "), format!("{time} {name} F ")],
            pieces: Vec::new(),
        }
    }

    fn push(&mut self, piece: Piece<'a>) {
        self.pieces.push(piece);
        if self.pieces.len() * 4 >= MAX_SLICES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let mut slices = Vec::with_capacity(self.pieces.len() * 4);
        for piece in &self.pieces {
            slices.push(IoSlice::new(
                self.prefixes[usize::from(piece.full)].as_bytes(),
            ));
            slices.push(IoSlice::new(piece.waited));
            slices.push(IoSlice::new(piece.fresh));
            slices.push(IoSlice::new(b"\n"));
        }
        self.log.write(&mut slices);
        self.pieces.clear();
    }
}

/// Formats a moment in UTC with nanoseconds.
///
/// The date is counted from 1 March 0000, where leap days come last in the year. Source: RFC 3339.
fn rfc3339(unix_s: i64, nanos: u32) -> String {
    const DAY_S: i64 = 86_400;
    let (days, second) = (unix_s.div_euclid(DAY_S), unix_s.rem_euclid(DAY_S));
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Log;

    /// Feeds `chunks` and returns `F` or `P` with the text of each line of the log.
    fn check(chunks: &[&[u8]], expected: &[(char, &[u8])]) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("log");
        let mut log = open(&path, 0, 0);
        let mut partial = Partial::default();
        for chunk in chunks {
            log.append(Stream::Stdout, &mut partial, chunk);
        }
        log.finish(Stream::Stdout, &mut partial);
        let text = fs::read(&path).expect("read");
        let mut lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
        assert_eq!(lines.pop(), Some(&b""[..]), "the log ends with a newline");
        let got: Vec<(char, &[u8])> = lines
            .iter()
            .map(|line| {
                let mut parts = line.splitn(4, |byte| *byte == b' ');
                let time = parts.next().expect("time");
                assert_eq!(time.len(), 30);
                assert_eq!(parts.next(), Some(&b"stdout"[..]));
                (
                    parts.next().expect("tag")[0] as char,
                    parts.next().expect("text"),
                )
            })
            .collect();
        assert_eq!(got.len(), expected.len(), "{got:?}");
        for (got, expected) in got.iter().zip(expected) {
            assert!(got == expected, "{} {} bytes", got.0, got.1.len());
        }
    }

    fn open(path: &Path, rotate_bytes: u64, keep_files: u32) -> LogFile {
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(path)
            .expect("open");
        let log = Log {
            path: path.to_str().expect("text").into(),
            rotate_bytes,
            keep_files,
        };
        LogFile::new(file.into(), &log)
    }

    #[test]
    fn lines_are_cut_and_marked() {
        let exact = vec![b'x'; MAX_LINE_BYTES];
        let over = vec![b'x'; MAX_LINE_BYTES + 1];
        let triple = vec![b'y'; 3 * MAX_LINE_BYTES];
        let exact_line = [&exact[..], b"\n"].concat();
        let over_line = [&over[..], b"\n"].concat();
        check(&[], &[]);
        check(&[b"a\n"], &[('F', b"a")]);
        check(
            &[b"a\nb\n\nc"],
            &[('F', b"a"), ('F', b"b"), ('F', b""), ('P', b"c")],
        );
        check(&[b"a", b"b", b"\nc\n"], &[('F', b"ab"), ('F', b"c")]);
        check(&[b"a\r\nb\rc\r", b"\n"], &[('F', b"a"), ('F', b"b\rc")]);
        check(&[&exact_line], &[('F', &exact)]);
        check(&[&exact, b"\n"], &[('F', &exact)]);
        check(&[&over_line], &[('P', &exact), ('F', b"x")]);
        check(&[&exact, b"x", b"\n"], &[('P', &exact), ('F', b"x")]);
        check(
            &[&triple],
            &[
                ('P', &triple[..MAX_LINE_BYTES]),
                ('P', &triple[..MAX_LINE_BYTES]),
                ('P', &triple[..MAX_LINE_BYTES]),
            ],
        );
    }

    #[test]
    fn many_short_lines_fit_any_batch() {
        let chunk = b"\n".repeat(5_000);
        let expected = vec![('F', &b""[..]); 5_000];
        check(&[&chunk], &expected);
    }

    #[test]
    fn a_full_log_is_rotated_and_old_ones_go() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("log");
        let mut log = open(&path, 60, 2);
        let mut partial = Partial::default();
        for line in [
            "one", "two", "three", "four", "five", "six", "seven", "eight",
        ] {
            log.append(Stream::Stderr, &mut partial, format!("{line}\n").as_bytes());
        }
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_default();
        assert_eq!(read("log"), "");
        assert!(read("log.1").contains("eight") && read("log.1").contains("seven"));
        assert!(read("log.2").contains("six") && read("log.2").contains("five"));
        assert!(!dir.path().join("log.3").exists());
    }

    #[test]
    fn a_disk_that_is_full_stops_nothing() {
        let file = fs::File::options()
            .write(true)
            .open("/dev/full")
            .expect("open");
        let mut log = LogFile::new(file.into(), &Log::default());
        let mut partial = Partial::default();
        log.append(Stream::Stdout, &mut partial, b"lost\nkept back");
        assert_eq!(partial.0, b"kept back");
    }

    #[test]
    fn moments_are_formatted_in_utc() {
        for (unix_s, nanos, expected) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (1_772_600_767, 123_456_789, "2026-03-04T05:06:07.123456789Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (4_107_542_399, 999_999_999, "2100-02-28T23:59:59.999999999Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(rfc3339(unix_s, nanos), expected);
        }
    }
}
