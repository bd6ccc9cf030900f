//! The one thread that writes.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Arc, RwLock, mpsc},
};

use rusqlite::Connection;
use tokio::sync::{oneshot, watch};

use super::{
    Changes, Snapshot, StoreError,
    changes::ClaimChange,
    file,
    snapshot::{EventRow, State},
};
use crate::clock::Time;

/// Commits that share one transaction when they wait side by side.
const BATCH: usize = 64;
/// Events that are kept; older ones give `CursorExpired` to whoever asks.
const KEPT_EVENTS: usize = 16_384;
/// Bytes held back for the day when the disk is full.
const RESERVE_BYTES: usize = 1 << 20;

pub(super) struct Commit {
    pub(super) changes: Changes,
    pub(super) reply: oneshot::Sender<Result<Snapshot, StoreError>>,
}

pub(super) struct Writer {
    connection: Connection,
    snapshot: Snapshot,
    published: Arc<RwLock<Snapshot>>,
    commits: watch::Sender<u64>,
    reserve: Option<PathBuf>,
    synced: bool,
}

impl Writer {
    pub(super) fn new(
        path: Option<&Path>,
        connection: Connection,
        snapshot: Snapshot,
        published: Arc<RwLock<Snapshot>>,
        commits: watch::Sender<u64>,
    ) -> Self {
        let writer = Self {
            connection,
            snapshot,
            published,
            commits,
            reserve: path.map(|path| path.with_extension("reserve")),
            synced: true,
        };
        writer.keep_reserve();
        writer
    }

    pub(super) fn run(mut self, inbox: &mpsc::Receiver<Commit>) {
        while let Ok(first) = inbox.recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok(next) = inbox.try_recv()
            {
                batch.push(next);
            }
            self.commit(batch);
        }
    }

    fn commit(&mut self, batch: Vec<Commit>) {
        let mut replies = Vec::with_capacity(batch.len());
        let mut changes = Vec::with_capacity(batch.len());
        for commit in batch {
            replies.push(commit.reply);
            changes.push(commit.changes);
        }
        let mut outcome = self.transact(&changes);
        if matches!(outcome, Err(StoreError::Full)) && self.give_up_reserve() {
            tracing::warn!("the disk is full: the store gave up its reserve");
            outcome = self.transact(&changes);
            self.keep_reserve();
        }
        match outcome {
            Ok((state, results)) => {
                self.snapshot = Snapshot::new(state);
                *self
                    .published
                    .write()
                    .expect("no panic while this lock is held") = self.snapshot.clone();
                for (reply, result) in replies.into_iter().zip(results) {
                    // A caller that went away does not need its answer.
                    let _ = reply.send(result.map(|()| self.snapshot.clone()));
                }
                self.commits.send_modify(|count| *count += 1);
            }
            Err(error) => {
                for reply in replies {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
    }

    /// One transaction for the whole batch; a change whose claims fail is left out of it.
    fn transact(
        &mut self,
        batch: &[Changes],
    ) -> Result<(State, Vec<Result<(), StoreError>>), StoreError> {
        self.set_synced(batch.iter().any(|changes| changes.durable))?;
        let mut state = self.snapshot.state();
        let mut results = Vec::with_capacity(batch.len());
        let transaction = self
            .connection
            .transaction()
            .map_err(StoreError::sqlite("begin a commit"))?;
        for changes in batch {
            // Claims are checked before the first write, so nothing has to be rolled back.
            if let Some(conflict) = conflict(&state, changes) {
                results.push(Err(conflict));
                continue;
            }
            apply(&transaction, &mut state, changes)
                .map_err(StoreError::sqlite("write a change"))?;
            results.push(Ok(()));
        }
        forget_old_events(&transaction, &mut state)
            .map_err(StoreError::sqlite("forget old events"))?;
        transaction.commit().map_err(StoreError::sqlite("commit"))?;
        Ok((state, results))
    }

    fn set_synced(&mut self, synced: bool) -> Result<(), StoreError> {
        if self.synced != synced {
            let level = if synced { "FULL" } else { "NORMAL" };
            self.connection
                .execute_batch(&format!("PRAGMA synchronous={level}"))
                .map_err(StoreError::sqlite("choose the durability"))?;
            self.synced = synced;
        }
        Ok(())
    }

    fn give_up_reserve(&self) -> bool {
        self.reserve
            .as_ref()
            .is_some_and(|path| fs::remove_file(path).is_ok())
    }

    fn keep_reserve(&self) {
        let Some(path) = &self.reserve else { return };
        let kept = fs::metadata(path).is_ok_and(|file| file.len() == RESERVE_BYTES as u64);
        if !kept {
            let written =
                File::create(path).and_then(|mut file| file.write_all(&vec![0; RESERVE_BYTES]));
            if written.is_err() {
                // A partial reserve is no use and takes the space that a commit may need.
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn conflict(state: &State, changes: &Changes) -> Option<StoreError> {
    let mut released: Vec<&str> = Vec::new();
    let mut released_holders: Vec<&str> = Vec::new();
    let mut taken: Vec<(&str, &str)> = Vec::new();
    for claim in &changes.claims {
        match claim {
            ClaimChange::Release { key } => released.push(key),
            ClaimChange::ReleaseHolder { holder } => released_holders.push(holder),
            ClaimChange::Take { key, holder } => {
                let holds = taken
                    .iter()
                    .find(|(other, _)| other == key)
                    .map(|(_, by)| (*by).to_owned())
                    .or_else(|| {
                        state
                            .claims
                            .get(key)
                            .filter(|by| {
                                !released_holders.contains(&by.as_str())
                                    && !released.contains(&key.as_str())
                            })
                            .cloned()
                    });
                match holds {
                    Some(by) if by != *holder => {
                        return Some(StoreError::Claimed {
                            key: key.clone(),
                            holder: by,
                        });
                    }
                    _ => taken.push((key, holder)),
                }
            }
        }
    }
    None
}

fn apply(
    connection: &Connection,
    state: &mut State,
    changes: &Changes,
) -> Result<(), rusqlite::Error> {
    for row in &changes.rows {
        let key = (row.table, row.id.clone());
        if row.only_existing && !state.records.contains_key(&key) {
            continue;
        }
        if let Some((record, json)) = &row.value {
            file::put_record(connection, row.table, &row.id, json)?;
            state.records.insert(key, Arc::clone(record));
        } else {
            file::delete_record(connection, row.table, &row.id)?;
            state.records.remove(&key);
        }
    }
    for claim in &changes.claims {
        match claim {
            ClaimChange::Take { key, holder } => {
                file::put_claim(connection, key, holder)?;
                state.claims.insert(key.clone(), holder.clone());
                state.held.insert((holder.clone(), key.clone()), ());
            }
            ClaimChange::Release { key } => release(connection, state, key)?,
            ClaimChange::ReleaseHolder { holder } => {
                let keys: Vec<String> = Snapshot::new(state.clone()).held_by(holder).collect();
                for key in keys {
                    release(connection, state, &key)?;
                }
            }
        }
    }
    let at = Time::now();
    for body in &changes.events {
        let event = EventRow {
            epoch: state.epoch,
            number: state.last_event + 1,
            at,
            body: body.clone(),
        };
        file::put_event(connection, &event)?;
        state.last_event = event.number;
        state
            .events
            .insert((event.epoch, event.number), Arc::new(event));
    }
    Ok(())
}

fn release(connection: &Connection, state: &mut State, key: &str) -> Result<(), rusqlite::Error> {
    file::delete_claim(connection, key)?;
    if let Some(holder) = state.claims.remove(key) {
        state.held.remove(&(holder, key.to_owned()));
    }
    Ok(())
}

fn forget_old_events(connection: &Connection, state: &mut State) -> Result<(), rusqlite::Error> {
    while state.events.len() > KEPT_EVENTS {
        let Some((oldest, _)) = state
            .events
            .get_min()
            .map(|(at, row)| (*at, Arc::clone(row)))
        else {
            break;
        };
        file::delete_event(connection, oldest)?;
        state.events.remove(&oldest);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::store::{Record, Store, Tables};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Pod {
        name: String,
        size: u32,
    }

    impl Record for Pod {
        const TABLE: &'static str = "pod";

        fn id(&self) -> String {
            self.name.clone()
        }
    }

    fn open(dir: &Path) -> Result<Store, StoreError> {
        Store::open(&dir.join("store.db"), Tables::new().with::<Pod>())
    }

    fn pod(name: &str, size: u32) -> Pod {
        Pod {
            name: name.into(),
            size,
        }
    }

    #[tokio::test]
    async fn a_commit_is_seen_by_later_snapshots_and_after_reopening() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = open(dir.path()).expect("opens");
        let before = store.snapshot();
        let after = store
            .commit(
                Changes::new()
                    .put(pod("a", 1))
                    .put(pod("b", 2))
                    .claim("port/1", "a"),
            )
            .await
            .expect("commits");
        assert!(before.get::<Pod>("a").is_none(), "a snapshot never changes");
        assert_eq!(after.get::<Pod>("b").map(|p| p.size), Some(2));
        drop(store);
        let again = open(dir.path()).expect("opens again").snapshot();
        assert_eq!(again.all::<Pod>().count(), 2);
        assert_eq!(again.claim("port/1").as_deref(), Some("a"));
        assert_eq!(again.held_by("a").collect::<Vec<_>>(), ["port/1"]);
    }

    #[tokio::test]
    async fn a_taken_key_refuses_the_whole_commit_and_names_the_holder() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = open(dir.path()).expect("opens");
        store
            .commit(Changes::new().claim("port/1", "a"))
            .await
            .expect("commits");
        let refused = store
            .commit(Changes::new().put(pod("b", 2)).claim("port/1", "b"))
            .await
            .err();
        assert_eq!(
            refused,
            Some(StoreError::Claimed {
                key: "port/1".into(),
                holder: "a".into()
            })
        );
        assert!(store.snapshot().get::<Pod>("b").is_none());
        let moved = Changes::new().release_holder("a").claim("port/1", "b");
        assert!(store.commit(moved).await.is_ok());
    }

    #[tokio::test]
    async fn events_have_no_gap_and_each_start_begins_an_epoch() {
        let dir = tempfile::tempdir().expect("temp dir");
        let first = open(dir.path()).expect("opens");
        for n in 0..3_u8 {
            first
                .commit(Changes::new().event_row(vec![n]))
                .await
                .expect("commits");
        }
        let epoch = first.snapshot().epoch();
        drop(first);
        let second = open(dir.path()).expect("opens again");
        second
            .commit(Changes::new().event_row(vec![9]))
            .await
            .expect("commits");
        let numbers: Vec<_> = second
            .snapshot()
            .events_after((0, 0), 10)
            .iter()
            .map(|event| (event.epoch, event.number))
            .collect();
        assert_eq!(
            numbers,
            [(epoch, 1), (epoch, 2), (epoch, 3), (epoch + 1, 1)]
        );
    }

    #[test]
    fn a_newer_file_is_refused_untouched() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("store.db");
        Connection::open(&path)
            .and_then(|c| c.execute_batch("PRAGMA user_version = 99"))
            .expect("writes a version");
        let before = fs::read(&path).expect("reads");
        assert_eq!(
            open(dir.path()).err(),
            Some(StoreError::Newer {
                found: 99,
                known: file::SCHEMA_VERSION
            })
        );
        assert_eq!(fs::read(&path).expect("reads"), before);
    }

    #[test]
    fn garbage_is_reported_as_damage() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join("store.db"), vec![7_u8; 8192]).expect("writes");
        assert!(matches!(
            open(dir.path()).err(),
            Some(StoreError::Damaged { .. })
        ));
    }
}
