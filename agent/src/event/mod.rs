//! Facts in order: what happened to sandboxes, containers, images and networks.
//!
//! An event is appended in the same commit as the change that it tells of, so the log has no gap
//! and no lie. Readers pull from the snapshot with a [`Cursor`], so a slow one holds up nobody and
//! loses nothing that is still retained.

mod error;
mod kind;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::{error::EventError, kind::EventKind};
use crate::{
    clock::Time,
    id::{ContainerId, Face, ImageId, SandboxId},
    store::{Changes, EventRow, Store},
};

/// A place in the log: after the event `number` of `epoch`.
///
/// The epoch rises with each start of the agent; numbers count from 1 without gaps within one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Cursor {
    /// Start of the agent.
    pub epoch: u64,
    /// Event within it; 0 is before the first.
    pub number: u64,
}

/// An event before it has a place in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventDraft {
    /// What happened.
    pub kind: EventKind,
    /// Whose object it is.
    pub face: Face,
    /// The sandbox concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<SandboxId>,
    /// The container concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_id: Option<ContainerId>,
    /// The image concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<ImageId>,
    /// More facts, e.g. `exit_code`, `reference`, `reason`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
}

impl EventDraft {
    /// An event without an object yet.
    pub fn new(kind: EventKind, face: Face) -> Self {
        Self {
            kind,
            face,
            sandbox_id: None,
            container_id: None,
            image_id: None,
            attributes: BTreeMap::new(),
        }
    }

    /// Names the sandbox.
    #[must_use]
    pub fn sandbox(mut self, id: &SandboxId) -> Self {
        self.sandbox_id = Some(id.clone());
        self
    }

    /// Names the container.
    #[must_use]
    pub fn container(mut self, id: &ContainerId) -> Self {
        self.container_id = Some(id.clone());
        self
    }

    /// Names the image.
    #[must_use]
    pub fn image(mut self, id: &ImageId) -> Self {
        self.image_id = Some(id.clone());
        self
    }

    /// Adds a fact.
    #[must_use]
    pub fn attribute(mut self, name: &str, value: impl Into<String>) -> Self {
        self.attributes.insert(name.to_owned(), value.into());
        self
    }
}

impl Changes {
    /// Appends an event.
    pub fn event(self, draft: EventDraft) -> Self {
        let body =
            serde_json::to_vec(&draft).expect("drafts have string keys and no failing serializer");
        self.event_row(body)
    }
}

/// An event with its place in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its place; a watcher that has seen it resumes after it.
    pub cursor: Cursor,
    /// When it was committed.
    pub at: Time,
    /// What happened.
    pub what: EventDraft,
}

impl Event {
    fn decode(row: &EventRow) -> Result<Self, EventError> {
        let cursor = Cursor {
            epoch: row.epoch,
            number: row.number,
        };
        let what = serde_json::from_slice(&row.body).map_err(|error| EventError::Unreadable {
            cursor,
            detail: error.to_string(),
        })?;
        Ok(Self {
            cursor,
            at: row.at,
            what,
        })
    }
}

/// The log of one agent.
#[derive(Clone)]
pub struct EventLog {
    store: Store,
}

/// Events that are read in one step, so that a reader far behind holds little memory.
const CHUNK: usize = 256;

impl EventLog {
    /// The log in `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// The place after the newest event.
    pub fn newest(&self) -> Cursor {
        let (epoch, number) = self.store.snapshot().last_event();
        Cursor { epoch, number }
    }

    /// What is still kept of a sandbox and its containers, oldest first, at most `limit` of the newest.
    /// It looks through the log from its end to the sandbox's beginning.
    pub fn about(&self, sandbox: &SandboxId, limit: usize) -> Vec<Event> {
        let snapshot = self.store.snapshot();
        let mut found: Vec<Event> = Vec::new();
        for row in snapshot.events_back() {
            if found.len() == limit {
                break;
            }
            let named =
                std::str::from_utf8(&row.body).is_ok_and(|body| body.contains(sandbox.as_str()));
            let Some(event) = named.then(|| Event::decode(row).ok()).flatten() else {
                continue;
            };
            if event.what.sandbox_id.as_ref() != Some(sandbox) {
                continue;
            }
            let first = event.what.kind == EventKind::SandboxCreated;
            found.push(event);
            if first {
                break;
            }
        }
        found.reverse();
        found
    }

    /// Follows the log from the place after `from`, or from now on without one.
    ///
    /// # Errors
    /// `CursorExpired` when events after `from` are no longer kept; `CursorUnknown` for a place
    /// that this log has not reached.
    pub fn watch(&self, from: Option<Cursor>) -> Result<Watch, EventError> {
        let after = match from {
            Some(cursor) => self.admit(cursor)?,
            None => self.newest(),
        };
        let mut commits = self.store.commits();
        commits.mark_unchanged();
        Ok(Watch {
            store: self.store.clone(),
            commits,
            after,
            ready: Vec::new(),
        })
    }

    fn admit(&self, cursor: Cursor) -> Result<Cursor, EventError> {
        let snapshot = self.store.snapshot();
        let (epoch, number) = snapshot.last_event();
        let newest = Cursor { epoch, number };
        if cursor > newest {
            return Err(EventError::CursorUnknown { cursor, newest });
        }
        let oldest = snapshot.oldest_event().map(|(epoch, number)| Cursor {
            epoch,
            number: number - 1,
        });
        match oldest {
            // A cursor of an earlier epoch whose successors are all kept is as good as the oldest.
            Some(oldest)
                if cursor < oldest && !(oldest.number == 0 && cursor.epoch + 1 == oldest.epoch) =>
            {
                Err(EventError::CursorExpired { cursor, oldest })
            }
            _ => Ok(cursor),
        }
    }
}

/// A reader's place in the log.
pub struct Watch {
    store: Store,
    commits: tokio::sync::watch::Receiver<u64>,
    after: Cursor,
    /// Read ahead, newest first.
    ready: Vec<Event>,
}

impl Watch {
    /// The next event; waits for one. Dropping the future loses nothing.
    ///
    /// # Errors
    /// `CursorExpired` when this reader was so slow that its next event is gone; `Closed` when
    /// the agent stops.
    pub async fn next(&mut self) -> Result<Event, EventError> {
        loop {
            if let Some(event) = self.ready.pop() {
                self.after = event.cursor;
                return Ok(event);
            }
            self.read()?;
            if self.ready.is_empty() {
                self.commits
                    .changed()
                    .await
                    .map_err(|_| EventError::Closed)?;
            }
        }
    }

    fn read(&mut self) -> Result<(), EventError> {
        let snapshot = self.store.snapshot();
        let rows = snapshot.events_after((self.after.epoch, self.after.number), CHUNK);
        if let Some(first) = rows.first()
            && first.epoch == self.after.epoch
            && first.number != self.after.number + 1
        {
            return Err(EventError::CursorExpired {
                cursor: self.after,
                oldest: Cursor {
                    epoch: first.epoch,
                    number: first.number - 1,
                },
            });
        }
        for row in rows.iter().rev() {
            self.ready.push(Event::decode(row)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Tables;

    #[tokio::test]
    async fn a_sandbox_is_told_of_from_its_beginning() {
        let store = Store::in_memory(Tables::new()).expect("memory");
        let (one, other) = (SandboxId::random(), SandboxId::random());
        let event = |kind, id: &SandboxId| {
            Changes::new().event(EventDraft::new(kind, Face::Cri).sandbox(id))
        };
        for (kind, id) in [
            (EventKind::SandboxCreated, &one),
            (EventKind::SandboxCreated, &other),
            (EventKind::SandboxStarted, &one),
            (EventKind::SandboxLost, &one),
        ] {
            store.commit(event(kind, id)).await.expect("room");
        }
        let log = EventLog::new(store);
        let kinds = |limit| -> Vec<EventKind> {
            let events = log.about(&one, limit);
            events.into_iter().map(|event| event.what.kind).collect()
        };
        let all = [
            EventKind::SandboxCreated,
            EventKind::SandboxStarted,
            EventKind::SandboxLost,
        ];
        assert_eq!(kinds(99), all);
        assert_eq!(kinds(2), all[1..]);
        assert!(log.about(&SandboxId::random(), 99).is_empty());
    }

    fn draft(n: usize) -> EventDraft {
        EventDraft::new(EventKind::AgentStarted, Face::Native).attribute("n", n.to_string())
    }

    #[tokio::test]
    async fn a_watcher_sees_each_event_once_in_order_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("store.db");
        let store = Store::open(&path, Tables::new()).expect("opens");
        let log = EventLog::new(store.clone());
        let mut watch = log.watch(Some(Cursor::default())).expect("from the start");
        for n in 0..3 {
            store
                .commit(Changes::new().event(draft(n)))
                .await
                .expect("commits");
        }
        let mut last = Cursor::default();
        for n in 0..3 {
            let event = watch.next().await.expect("an event");
            assert_eq!(event.what.attributes["n"], n.to_string());
            last = event.cursor;
        }
        drop((watch, log, store));

        let store = Store::open(&path, Tables::new()).expect("opens again");
        store
            .commit(Changes::new().event(draft(3)))
            .await
            .expect("commits");
        let mut resumed = EventLog::new(store).watch(Some(last)).expect("resumes");
        assert_eq!(
            resumed.next().await.expect("an event").what.attributes["n"],
            "3"
        );
    }

    #[tokio::test]
    async fn a_cursor_from_the_future_or_the_forgotten_past_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = Store::open(&dir.path().join("store.db"), Tables::new()).expect("opens");
        let log = EventLog::new(store.clone());
        let future = Cursor {
            epoch: 9,
            number: 9,
        };
        assert!(matches!(
            log.watch(Some(future)).err(),
            Some(EventError::CursorUnknown { .. })
        ));
        for n in 0..16_400 {
            // Sixty-four at a time would be quicker; one at a time is what happens.
            store
                .commit(Changes::new().event(draft(n)))
                .await
                .expect("commits");
        }
        let old = Cursor {
            epoch: 1,
            number: 3,
        };
        let Some(EventError::CursorExpired { oldest, .. }) = log.watch(Some(old)).err() else {
            panic!("an expired cursor must be refused");
        };
        let first = log.watch(Some(oldest)).expect("valid").next().await;
        assert_eq!(first.expect("an event").cursor.number, oldest.number + 1);
    }
}
