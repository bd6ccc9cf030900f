//! One commit, being put together.

use std::{any::Any, sync::Arc};

use super::Record;

/// Records to put or delete, keys to claim or release, events to append: all or nothing, and the
/// only way to write state.
#[derive(Default)]
#[must_use = "changes do nothing until they are committed"]
pub struct Changes {
    pub(super) rows: Vec<Row>,
    pub(super) claims: Vec<ClaimChange>,
    pub(super) events: Vec<Vec<u8>>,
    pub(super) durable: bool,
}

pub(super) struct Row {
    pub(super) table: &'static str,
    pub(super) id: String,
    /// The record and its JSON form; none deletes.
    pub(super) value: Option<(Arc<dyn Any + Send + Sync>, Vec<u8>)>,
    /// Skipped when no record with this id is there.
    pub(super) only_existing: bool,
}

pub(super) enum ClaimChange {
    Take { key: String, holder: String },
    Release { key: String },
    ReleaseHolder { holder: String },
}

impl Changes {
    /// No change yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes `record` in place of the one with its id.
    pub fn put<R: Record>(self, record: R) -> Self {
        self.write(record, false)
    }

    /// Writes `record` unless the one with its id was deleted meanwhile.
    pub fn update<R: Record>(self, record: R) -> Self {
        self.write(record, true)
    }

    fn write<R: Record>(mut self, record: R, only_existing: bool) -> Self {
        let json = serde_json::to_vec(&record)
            .expect("records have string keys and no failing serializer");
        self.rows.push(Row {
            table: R::TABLE,
            id: record.id(),
            value: Some((Arc::new(record), json)),
            only_existing,
        });
        self
    }

    /// Deletes the record with this id; an absent one is fine.
    pub fn delete<R: Record>(mut self, id: impl Into<String>) -> Self {
        self.rows.push(Row {
            table: R::TABLE,
            id: id.into(),
            value: None,
            only_existing: false,
        });
        self
    }

    /// Claims `key` for `holder`; the commit fails if another holds it.
    pub fn claim(mut self, key: impl Into<String>, holder: impl Into<String>) -> Self {
        self.claims.push(ClaimChange::Take {
            key: key.into(),
            holder: holder.into(),
        });
        self
    }

    /// Releases `key`, whoever holds it.
    pub fn release(mut self, key: impl Into<String>) -> Self {
        self.claims.push(ClaimChange::Release { key: key.into() });
        self
    }

    /// Releases every key of `holder`.
    pub fn release_holder(mut self, holder: impl Into<String>) -> Self {
        self.claims.push(ClaimChange::ReleaseHolder {
            holder: holder.into(),
        });
        self
    }

    /// Appends an event in its encoded form; chapters use [`Changes::event`].
    pub fn event_row(mut self, body: Vec<u8>) -> Self {
        self.events.push(body);
        self
    }

    /// Survives power loss once committed.
    pub const fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// These changes, then `other`, in one commit.
    pub fn merge(mut self, mut other: Self) -> Self {
        self.rows.append(&mut other.rows);
        self.claims.append(&mut other.claims);
        self.events.append(&mut other.events);
        self.durable |= other.durable;
        self
    }

    /// Nothing would change.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.claims.is_empty() && self.events.is_empty()
    }
}
