//! Reading a container's log: the lines that its shim (or CRI's) wrote, old files first.
//!
//! ```text
//!  path.2   path.1   path     rotation: path.1 -> path.2, path -> path.1, new path
//!  oldest ---------> newest
//!     |  files.rs   (which file comes next, whatever was renamed meanwhile)
//!     |  line.rs    (octets -> entries; hostile ones are bounded or skipped)
//!     v  watch.rs   (sleeps until there is more)
//!   Stream of entries
//! ```
//! Invariants
//! - At most one chunk of [`CHUNK_BYTES`] and the entries in it are in memory.
//! - Files are held open while they wait their turn: a rotation meanwhile takes nothing away.
//! - A file is left for its successor only once that has something in it: the writer has moved on.
//! - The stream of a followed log ends when the container has ended and all is sent.

mod files;
mod line;
mod watch;

use std::{collections::VecDeque, io, path::PathBuf};

use bytes::Bytes;
use futures_util::{Stream, stream};
use tokio::sync::watch as signal;

use self::{files::Files, line::Lines, watch::Watch};
use crate::{blocking, clock::Time};

/// Octets that are read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Which part of a log to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on with new entries until the container has ended.
    pub follow: bool,
    /// Only entries of this time or later.
    pub since: Option<Time>,
    /// Only this many last lines, of the wished streams, of what is there.
    pub tail_lines: Option<u64>,
    /// Standard output, and all output of a terminal.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}

/// Which output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line of a log, or a piece of a long one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// When it was written.
    pub time: Time,
    /// Where it was written.
    pub stream: LogStream,
    /// What was written, without the newline; any octets, at most 16 KiB.
    pub data: Bytes,
    /// The line goes on in the next entry of this stream.
    pub partial: bool,
}

/// Why a log can't be read (on).
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// There is no file.
    #[error("there is no log {}", path.display())]
    Missing {
        /// Where.
        path: PathBuf,
    },
    /// A file can't be read.
    #[error("cannot read log {}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl LogOptions {
    fn wants(&self, stream: LogStream) -> bool {
        match stream {
            LogStream::Stdout => self.stdout,
            LogStream::Stderr => self.stderr,
        }
    }
}

/// Reads the log at `path` with its rotated files, oldest first. `running` says whether more may
/// come: once it is false, or its sender is gone, a followed log ends with what is there.
///
/// Lines that are not of CRI's form are skipped. Dropping the stream ends all of it.
///
/// Source: CRI's log format, behaviour of `kubelet logs`.
pub fn read(
    path: PathBuf,
    options: LogOptions,
    running: signal::Receiver<bool>,
) -> impl Stream<Item = Result<LogEntry, LogError>> + Send + 'static {
    let reading = Reading {
        reader: Some(Reader {
            path,
            options,
            files: None,
            lines: Lines::new(options),
        }),
        follow: options.follow,
        ready: VecDeque::new(),
        running,
        watch: None,
        is_looked_again: false,
    };
    stream::unfold(reading, Reading::next)
}

struct Reading {
    /// None once nothing more comes.
    reader: Option<Reader>,
    follow: bool,
    ready: VecDeque<LogEntry>,
    running: signal::Receiver<bool>,
    watch: Option<Watch>,
    /// It was looked for more after the watch was set.
    is_looked_again: bool,
}

impl Reading {
    async fn next(mut self) -> Option<(Result<LogEntry, LogError>, Self)> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Some((Ok(entry), self));
            }
            let mut reader = self.reader.take()?;
            // Before the reading: what was written until then is read.
            let has_ended = !self.follow || self.has_ended();
            let (reader, step, entries) = blocking::run("read log", move || {
                let step = reader.step(has_ended);
                let entries = reader.lines.take();
                (reader, step, entries)
            })
            .await;
            self.ready = entries;
            match step {
                Err(error) => return Some((Err(error), self)),
                Ok(Step::End) => {}
                Ok(Step::More) => {
                    self.is_looked_again = false;
                    self.reader = Some(reader);
                }
                Ok(Step::Wait) => {
                    let path = reader.path.clone();
                    self.reader = Some(reader);
                    self.wait(path).await;
                }
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.running.has_changed().is_err() || !*self.running.borrow()
    }

    /// Waits for more, but not before having looked again after the watch was set.
    async fn wait(&mut self, path: PathBuf) {
        if !self.is_looked_again {
            let watch = self.watch.get_or_insert_with(Watch::new);
            watch.set(&path);
            self.is_looked_again = true;
            return;
        }
        self.is_looked_again = false;
        let Some(watch) = &self.watch else { return };
        // Both only wake: whichever is dropped loses nothing.
        tokio::select! {
            () = watch.woken() => {}
            _ = self.running.changed() => {}
        }
    }
}

/// What a step brought.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Perhaps entries; there may be more at once.
    More,
    /// Nothing, for now.
    Wait,
    /// Perhaps entries, the last.
    End,
}

/// The blocking half.
struct Reader {
    path: PathBuf,
    options: LogOptions,
    files: Option<Files>,
    lines: Lines,
}

impl Reader {
    fn step(&mut self, has_ended: bool) -> Result<Step, LogError> {
        let files = match &mut self.files {
            Some(files) => files,
            none => none.insert(Files::open(&self.path, &self.options)?),
        };
        let mut chunk = vec![0; CHUNK_BYTES];
        let count = files.read(&mut chunk)?;
        if count > 0 {
            self.lines.feed(&chunk[..count]);
            return Ok(Step::More);
        }
        if files.advance(has_ended)? {
            // A torn line of a finished file has no other end than this.
            if files.is_at_start() {
                self.lines.finish();
            }
            return Ok(Step::More);
        }
        if !has_ended {
            return Ok(Step::Wait);
        }
        self.lines.finish();
        Ok(Step::End)
    }
}

#[cfg(test)]
mod tests;
