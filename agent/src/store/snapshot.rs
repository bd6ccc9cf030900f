//! An immutable state of the store.

use std::{any::Any, ops::Bound, sync::Arc};

use imbl::OrdMap;

use super::Record;
use crate::clock::Time;

/// The state after some commit. Cloning costs a pointer; nothing in it ever changes.
#[derive(Clone)]
pub struct Snapshot(Arc<State>);

/// Maps share their unchanged parts between snapshots.
#[derive(Clone, Default)]
pub(super) struct State {
    pub(super) records: OrdMap<(&'static str, String), Arc<dyn Any + Send + Sync>>,
    pub(super) claims: OrdMap<String, String>,
    /// (holder, key), to release all of a holder.
    pub(super) held: OrdMap<(String, String), ()>,
    pub(super) events: OrdMap<(u64, u64), Arc<EventRow>>,
    pub(super) epoch: u64,
    /// Number of the newest event of this epoch; 0 before the first.
    pub(super) last_event: u64,
}

/// An event in its encoded form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRow {
    /// Rises with each start of the agent.
    pub epoch: u64,
    /// From 1, without gaps within an epoch.
    pub number: u64,
    /// When it was committed.
    pub at: Time,
    /// The encoded event.
    pub body: Vec<u8>,
}

impl Snapshot {
    pub(super) fn new(state: State) -> Self {
        Self(Arc::new(state))
    }

    pub(super) fn state(&self) -> State {
        State::clone(&self.0)
    }

    /// The record with this id.
    pub fn get<R: Record>(&self, id: &str) -> Option<Arc<R>> {
        let found = self.0.records.get(&(R::TABLE, id.to_owned()))?;
        Some(typed(found))
    }

    /// All records of a kind, by id.
    pub fn all<R: Record>(&self) -> impl Iterator<Item = Arc<R>> {
        self.by_prefix("")
    }

    /// Records whose id begins with `prefix`, by id.
    pub fn by_prefix<'a, R: Record>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = Arc<R>> + 'a {
        self.0
            .records
            .range((
                Bound::Included((R::TABLE, prefix.to_owned())),
                Bound::Unbounded,
            ))
            .take_while(move |((table, id), _)| *table == R::TABLE && id.starts_with(prefix))
            .map(|(_, record)| typed(record))
    }

    /// How many records of a kind there are.
    pub fn count<R: Record>(&self) -> usize {
        self.all::<R>().count()
    }

    /// Who holds `key`.
    pub fn claim(&self, key: &str) -> Option<String> {
        self.0.claims.get(key).cloned()
    }

    /// Claims whose key begins with `prefix`, by key: (key, holder).
    pub fn claims<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (String, String)> + 'a {
        self.0
            .claims
            .range((Bound::Included(prefix.to_owned()), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, holder)| (key.clone(), holder.clone()))
    }

    /// Keys that `holder` has claimed.
    pub fn held_by<'a>(&'a self, holder: &'a str) -> impl Iterator<Item = String> + 'a {
        self.0
            .held
            .range((
                Bound::Included((holder.to_owned(), String::new())),
                Bound::Unbounded,
            ))
            .take_while(move |((owner, _), ())| owner == holder)
            .map(|((_, key), ())| key.clone())
    }

    /// The epoch that began with this start of the agent.
    pub fn epoch(&self) -> u64 {
        self.0.epoch
    }

    /// (epoch, number) of the newest event, number 0 if this epoch has none.
    pub fn last_event(&self) -> (u64, u64) {
        (self.0.epoch, self.0.last_event)
    }

    /// (epoch, number) of the oldest event that is still kept.
    pub fn oldest_event(&self) -> Option<(u64, u64)> {
        self.0.events.get_min().map(|(at, _)| *at)
    }

    /// Up to `limit` events after (epoch, number), in order.
    pub fn events_after(&self, after: (u64, u64), limit: usize) -> Vec<Arc<EventRow>> {
        self.0
            .events
            .range((Bound::Excluded(after), Bound::Unbounded))
            .take(limit)
            .map(|(_, row)| Arc::clone(row))
            .collect()
    }

    /// All events that are still kept, the newest first.
    pub fn events_back(&self) -> impl Iterator<Item = &Arc<EventRow>> {
        self.0.events.iter().rev().map(|(_, row)| row)
    }
}

fn typed<R: Record>(record: &Arc<dyn Any + Send + Sync>) -> Arc<R> {
    Arc::clone(record)
        .downcast()
        .expect("a table holds records of the one type that names it")
}
