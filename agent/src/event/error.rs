//! What can go wrong with the event log.

use super::Cursor;

/// Why events can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// Events after this place are no longer kept.
    #[error("events after {}/{} are no longer kept; the oldest valid cursor is {}/{}", cursor.epoch, cursor.number, oldest.epoch, oldest.number)]
    CursorExpired {
        /// What was asked.
        cursor: Cursor,
        /// The oldest place from which nothing is missing.
        oldest: Cursor,
    },
    /// This log has not reached that place: it belongs to another agent or an older data directory.
    #[error("cursor {}/{} is beyond the newest event {}/{}", cursor.epoch, cursor.number, newest.epoch, newest.number)]
    CursorUnknown {
        /// What was asked.
        cursor: Cursor,
        /// The newest event.
        newest: Cursor,
    },
    /// A stored event can't be decoded.
    #[error("event {}/{} is unreadable: {detail}", cursor.epoch, cursor.number)]
    Unreadable {
        /// Its place.
        cursor: Cursor,
        /// Why.
        detail: String,
    },
    /// The agent is stopping.
    #[error("the event log is closed")]
    Closed,
}
