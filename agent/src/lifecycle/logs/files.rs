//! The files of one log, in order, whatever is renamed while they are read.

use std::{
    collections::VecDeque,
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use super::{
    CHUNK_BYTES, LogError, LogOptions,
    line::{HEAD_BYTES, head},
};

/// Rotated files that are looked for.
const MOST_FILES: u32 = 64;
/// While files are being renamed one number may be missing, never two in a row.
const GAP: u32 = 2;

/// The file that is read and those that come after it.
pub(super) struct Files {
    path: PathBuf,
    follow: bool,
    current: Open,
    newer: VecDeque<Open>,
    /// Those read before, latest first.
    older: VecDeque<FileId>,
    /// The next file had something in it before the current one was read to its end.
    has_moved_on: bool,
}

/// Names a file as long as it exists.
type FileId = (u64, u64);

struct Open {
    path: PathBuf,
    file: File,
    id: FileId,
    at: u64,
    /// Where it ended when it was opened; for reading what is there and no more.
    size: u64,
    modified: (i64, i64),
}

impl Files {
    /// Opens all files and finds where the wished lines begin.
    pub(super) fn open(path: &Path, options: &LogOptions) -> Result<Self, LogError> {
        let mut files = scan(path)?;
        if let Some(lines) = options.tail_lines {
            skip_to_tail(&mut files, lines, options)?;
        }
        let current = files.pop_front().ok_or_else(|| LogError::Missing {
            path: path.to_owned(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            follow: options.follow,
            current,
            newer: files,
            older: VecDeque::new(),
            has_moved_on: false,
        })
    }

    /// Reads on in the current file; 0 is its end, for now.
    pub(super) fn read(&mut self, chunk: &mut [u8]) -> Result<usize, LogError> {
        let file = &mut self.current;
        let mut most = chunk.len();
        if !self.follow {
            // A container that writes faster than its log is read would never let that end.
            let left = file.size.saturating_sub(file.at);
            most = most.min(usize::try_from(left).unwrap_or(usize::MAX));
        }
        let count = file
            .file
            .read_at(&mut chunk[..most], file.at)
            .map_err(file.failed())?;
        file.at += count as u64;
        Ok(count)
    }

    /// At the end of the current file: goes to the next, or finds out that it must be read again.
    /// False if there is nothing to go on with.
    pub(super) fn advance(&mut self, has_ended: bool) -> Result<bool, LogError> {
        if !self.follow {
            return Ok(self.go_to_next());
        }
        let size = self
            .current
            .file
            .metadata()
            .map_err(self.current.failed())?
            .len();
        if size < self.current.at {
            // Somebody cut it, which is how some tools rotate.
            self.current.at = 0;
            return Ok(true);
        }
        if self.newer.is_empty() {
            self.newer = self.find_newer()?;
        }
        let Some(next) = self.newer.front() else {
            return Ok(false);
        };
        if self.has_moved_on {
            return Ok(self.go_to_next());
        }
        let is_begun = next.file.metadata().map_err(next.failed())?.len() > 0;
        // Whatever was written to the current file before that is read once more.
        self.has_moved_on = is_begun || has_ended;
        Ok(self.has_moved_on)
    }

    /// Nothing of the current file was read yet.
    pub(super) fn is_at_start(&self) -> bool {
        self.current.at == 0
    }

    fn find_newer(&self) -> Result<VecDeque<Open>, LogError> {
        let current = &self.current;
        if fs::symlink_metadata(&self.path).is_ok_and(|found| id(&found) == current.id) {
            return Ok(VecDeque::new());
        }
        let mut files = scan(&self.path)?;
        if let Some(at) = files.iter().position(|file| file.id == current.id) {
            files.drain(..=at);
            return Ok(files);
        }
        // It was removed or got another name: only ages tell. A number may have been given to
        // another file since, so that alone does not tell.
        let metadata = current.file.metadata().map_err(current.failed())?;
        let modified = modified(&metadata);
        files.retain(|file| {
            file.modified > modified
                || (file.modified == modified && !self.older.contains(&file.id))
        });
        Ok(files)
    }

    fn go_to_next(&mut self) -> bool {
        self.has_moved_on = false;
        match self.newer.pop_front() {
            Some(next) => {
                let read = std::mem::replace(&mut self.current, next);
                self.older.truncate(MOST_FILES as usize);
                self.older.push_front(read.id);
                true
            }
            None => false,
        }
    }
}

impl Open {
    fn failed(&self) -> impl FnOnce(io::Error) -> LogError + use<> {
        failed(&self.path)
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> LogError + use<> {
    let path = path.to_owned();
    move |source| LogError::Read { path, source }
}

/// All files of a log, oldest first.
///
/// They are opened newest first: a rotation meanwhile moves files to where they are still looked
/// for, so one may be seen twice, but none is missed.
fn scan(path: &Path) -> Result<VecDeque<Open>, LogError> {
    let mut found: VecDeque<Open> = VecDeque::new();
    let mut missing = 0;
    for number in 0..=MOST_FILES {
        match open(&numbered(path, number))? {
            Some(file) => {
                missing = 0;
                if found.iter().all(|known| known.id != file.id) {
                    found.push_front(file);
                }
            }
            None if number == 0 => {}
            None => {
                missing += 1;
                if missing == GAP {
                    break;
                }
            }
        }
    }
    Ok(found)
}

fn open(path: &Path) -> Result<Option<Open>, LogError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed(path))?,
    };
    let metadata = file.metadata().map_err(failed(path))?;
    if !metadata.is_file() {
        let refused = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(failed(path)(refused));
    }
    Ok(Some(Open {
        path: path.to_owned(),
        file,
        id: id(&metadata),
        at: 0,
        size: metadata.len(),
        modified: modified(&metadata),
    }))
}

fn id(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

fn modified(metadata: &Metadata) -> (i64, i64) {
    (metadata.mtime(), metadata.mtime_nsec())
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    if number == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Leaves out what comes before the last `lines` lines.
fn skip_to_tail(
    files: &mut VecDeque<Open>,
    lines: u64,
    options: &LogOptions,
) -> Result<(), LogError> {
    let mut tail = Tail {
        left: lines,
        is_seen: [false; 2],
        options,
    };
    for index in (0..files.len()).rev() {
        let file = &mut files[index];
        if let Some(start) = tail.start_in(file).map_err(file.failed())? {
            file.at = start;
            files.drain(..index);
            break;
        }
    }
    Ok(())
}

/// Counts lines from the end.
struct Tail<'a> {
    left: u64,
    /// A later entry was seen, by stream.
    is_seen: [bool; 2],
    options: &'a LogOptions,
}

impl Tail<'_> {
    /// Where in this file the tail begins; none if all of it belongs to the tail.
    fn start_in(&mut self, file: &Open) -> io::Result<Option<u64>> {
        let mut chunk = vec![0; CHUNK_BYTES];
        // The first octets of the line whose beginning is not yet found, and where the next begins.
        let (mut begun, mut next_start) = (Vec::new(), file.size);
        let mut scanned = file.size;
        while scanned > 0 {
            let count = scanned.min(CHUNK_BYTES as u64);
            scanned -= count;
            let chunk = &mut chunk[..usize::try_from(count).expect("at most a chunk")];
            file.file.read_exact_at(chunk, scanned)?;
            let mut end = chunk.len();
            while let Some(newline) = chunk[..end].iter().rposition(|&b| b == b'\n') {
                prepend(&chunk[newline + 1..end], &mut begun);
                let start = scanned + newline as u64 + 1;
                if self.is_before(&begun) {
                    return Ok(Some(next_start));
                }
                next_start = start;
                begun.clear();
                end = newline;
            }
            prepend(&chunk[..end], &mut begun);
        }
        Ok(self.is_before(&begun).then_some(next_start))
    }

    /// Counts an entry; true if its line is one too many.
    fn is_before(&mut self, line: &[u8]) -> bool {
        let Some((head, _)) = head(line).filter(|(head, _)| self.options.wants(head.stream)) else {
            return false;
        };
        let is_seen = &mut self.is_seen[head.stream as usize];
        // A piece belongs to the line that a later entry ends, if there is one.
        let ends_line = !head.partial || !*is_seen;
        *is_seen = true;
        if !ends_line {
            return false;
        }
        if self.left == 0 {
            return true;
        }
        self.left -= 1;
        false
    }
}

/// Puts octets before others, of which only as many as a head has are kept.
fn prepend(octets: &[u8], to: &mut Vec<u8>) {
    let mut all = octets[..octets.len().min(HEAD_BYTES)].to_vec();
    if octets.len() < HEAD_BYTES {
        all.extend_from_slice(to);
        all.truncate(HEAD_BYTES);
    }
    *to = all;
}
