//! Sleeps until a log may have grown.

use std::{path::Path, time::Duration};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{net::unix::pipe::Receiver, time};

/// Looked at anyway: not every file system tells of changes.
const AT_LEAST: Duration = Duration::from_secs(2);
/// Looked at without inotify, whose instances are few.
const POLL: Duration = Duration::from_millis(200);

/// Changes of one log.
pub(super) struct Watch {
    /// Not a pipe, but all that is done with it is to wait and to read.
    inotify: Option<Receiver>,
}

impl Watch {
    pub(super) fn new() -> Self {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)
            .ok()
            .and_then(|fd| Receiver::from_owned_fd_unchecked(fd).ok());
        Self { inotify }
    }

    /// Watches the file that has the name now, and whether another gets it. Repeating it is fine.
    pub(super) fn set(&mut self, path: &Path) {
        let Some(inotify) = &self.inotify else { return };
        let dir = path.parent().unwrap_or(Path::new("/"));
        let of_dir = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        let of_file = WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::MOVE_SELF
            | WatchFlags::DONT_FOLLOW;
        if inotify::add_watch(inotify, dir, of_dir).is_err() {
            self.inotify = None;
            return;
        }
        // Not there while it is being rotated; the directory tells when it is.
        let _ = inotify::add_watch(inotify, path, of_file);
    }

    /// Returns when something happened, and now and then without.
    pub(super) async fn woken(&self) {
        let Some(inotify) = &self.inotify else {
            return time::sleep(POLL).await;
        };
        if !matches!(
            time::timeout(AT_LEAST, inotify.readable()).await,
            Ok(Ok(()))
        ) {
            return;
        }
        // What happened does not matter, only that it did. The read that finds nothing more makes
        // the next wait wait.
        let mut events = [0; 4096];
        while inotify.try_read(&mut events).is_ok_and(|count| count > 0) {}
    }
}
