//! The agent's memory: one SQLite file, one writer, immutable snapshots for everybody else.
//!
//! ```text
//!  verbs --Changes--> commit() --queue--> writer thread --one transaction--> store.db (WAL)
//!                                              |
//!                                              +--publishes--> Snapshot --> lists, status, plans
//! ```
//! - State, claims and events change in one commit, all or nothing.
//! - A claimed key has one holder, so races for names, ports and addresses end here.
//! - A reader takes a [`Snapshot`]: memory only, never a lock that a commit holds for long.
//! - [`Changes::durable`] commits are synced (they survive power loss), the others survive
//!   SIGKILL: their kernel objects end with the machine's uptime anyway.
//! - The file has a schema version; an older one is migrated, a newer one refused untouched.

mod changes;
mod error;
mod file;
mod snapshot;
mod writer;

use std::{
    path::Path,
    sync::{Arc, RwLock, mpsc},
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{oneshot, watch};

pub use self::{
    changes::Changes,
    error::StoreError,
    file::{SCHEMA_VERSION, Tables},
    snapshot::{EventRow, Snapshot},
};

/// A row of state with an identity. Each chapter owns the records of its subject.
pub trait Record: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Name of the kind, in the file and in `fsck` reports.
    const TABLE: &'static str;

    /// Identity within the kind.
    fn id(&self) -> String;
}

/// Handle of the store; clones share it.
#[derive(Clone)]
pub struct Store {
    published: Arc<RwLock<Snapshot>>,
    queue: mpsc::SyncSender<writer::Commit>,
    commits: watch::Receiver<u64>,
}

/// Commits that may wait for the writer; more callers wait to enter the queue.
const QUEUE: usize = 1024;

impl Store {
    /// Opens or creates the file at `path` and reads all of it; blocking.
    ///
    /// Starts a new epoch of events with a synced commit.
    ///
    /// # Errors
    /// `Newer` for the file of a later release, `Damaged` for one that can't be read, `Io`.
    pub fn open(path: &Path, tables: Tables) -> Result<Self, StoreError> {
        Self::start(Some(path), &tables)
    }

    /// A store without a file, for looking at a host without leaving anything.
    ///
    /// # Errors
    /// `Io` if SQLite does not start.
    pub fn in_memory(tables: Tables) -> Result<Self, StoreError> {
        Self::start(None, &tables)
    }

    fn start(path: Option<&Path>, tables: &Tables) -> Result<Self, StoreError> {
        let (connection, state) = file::open(path, tables)?;
        let snapshot = Snapshot::new(state);
        let published = Arc::new(RwLock::new(snapshot.clone()));
        let (queue, inbox) = mpsc::sync_channel(QUEUE);
        let (counter, commits) = watch::channel(0);
        let writer =
            writer::Writer::new(path, connection, snapshot, Arc::clone(&published), counter);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run(&inbox))
            .map_err(|source| StoreError::Io {
                action: "start the writer thread",
                detail: source.to_string(),
            })?;
        Ok(Self {
            published,
            queue,
            commits,
        })
    }

    /// The state after the latest commit.
    pub fn snapshot(&self) -> Snapshot {
        self.published
            .read()
            .expect("no panic while this lock is held")
            .clone()
    }

    /// Applies `changes`, all or nothing, and returns the state after them.
    ///
    /// # Errors
    /// `Claimed` if a key has another holder; `Full` if the disk is; `Io`.
    pub async fn commit(&self, changes: Changes) -> Result<Snapshot, StoreError> {
        let (reply, answer) = oneshot::channel();
        let commit = writer::Commit { changes, reply };
        match self.queue.try_send(commit) {
            Ok(()) => {}
            Err(mpsc::TrySendError::Full(commit)) => {
                let queue = self.queue.clone();
                crate::blocking::run("wait for the store", move || queue.send(commit))
                    .await
                    .map_err(|_| StoreError::Closed)?;
            }
            Err(mpsc::TrySendError::Disconnected(_)) => return Err(StoreError::Closed),
        }
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Changes its value after each commit; its value means nothing else.
    pub fn commits(&self) -> watch::Receiver<u64> {
        self.commits.clone()
    }
}
