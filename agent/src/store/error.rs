//! What can go wrong with the store.

/// Why the store did not do it. Nothing of the change was applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A key that the change claims has another holder.
    #[error("{key} is held by {holder}")]
    Claimed {
        /// The claim.
        key: String,
        /// Who holds it.
        holder: String,
    },
    /// The file was written by a later release.
    #[error("the store has schema version {found}, this release knows up to {known}")]
    Newer {
        /// Version of the file.
        found: i64,
        /// Newest version that this release reads.
        known: i64,
    },
    /// The file can't be read.
    #[error("the store is damaged: {what}")]
    Damaged {
        /// What was found.
        what: String,
    },
    /// No space is left, also after the reserve was given up.
    #[error("no space is left for the store")]
    Full,
    /// The file system or SQLite refused.
    #[error("cannot {action}: {detail}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What was answered.
        detail: String,
    },
    /// The agent is stopping.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Translates an error of SQLite met while doing `action`.
    pub(super) fn sqlite(action: &'static str) -> impl FnOnce(rusqlite::Error) -> Self {
        move |error| match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Self::Full,
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
                Self::Damaged {
                    what: error.to_string(),
                }
            }
            _ => Self::Io {
                action,
                detail: error.to_string(),
            },
        }
    }
}
