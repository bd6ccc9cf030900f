//! The SQLite file: schema, versions, reading everything at start.

use std::{any::Any, collections::HashMap, path::Path, sync::Arc};

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Record, StoreError,
    snapshot::{EventRow, State},
};
use crate::clock::Time;

/// Version of the layout below; each later one adds a step to [`migrate`].
pub const SCHEMA_VERSION: i64 = 1;

type Decode = fn(&[u8]) -> Result<Arc<dyn Any + Send + Sync>, serde_json::Error>;

/// The kinds of record that a store may hold.
#[derive(Default)]
pub struct Tables(HashMap<&'static str, (&'static str, Decode)>);

impl Tables {
    /// No kind yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a kind.
    pub fn with<R: Record>(mut self) -> Self {
        let decode: Decode =
            |json| serde_json::from_slice::<R>(json).map(|record| Arc::new(record) as _);
        self.0.insert(R::TABLE, (R::TABLE, decode));
        self
    }
}

const SCHEMA: &str = "
CREATE TABLE record (kind TEXT NOT NULL, id TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE claim (key TEXT PRIMARY KEY NOT NULL, holder TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE event (epoch INTEGER NOT NULL, number INTEGER NOT NULL, at INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (epoch, number)) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY NOT NULL, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('epoch', 0);
";

/// Opens the file, or without a path a store that ends with its handle.
pub(super) fn open(
    path: Option<&Path>,
    tables: &Tables,
) -> Result<(Connection, State), StoreError> {
    let connection = path
        .map_or_else(Connection::open_in_memory, Connection::open)
        .map_err(StoreError::sqlite("open the store"))?;
    let found: i64 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(StoreError::sqlite("read the schema version"))?;
    if found > SCHEMA_VERSION {
        return Err(StoreError::Newer {
            found,
            known: SCHEMA_VERSION,
        });
    }
    connection
        .execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=1000;",
        )
        .map_err(StoreError::sqlite("set up the journal"))?;
    migrate(&connection, found)?;
    connection
        .execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'", [])
        .map_err(StoreError::sqlite("begin an epoch"))?;
    let state = read(&connection, tables)?;
    Ok((connection, state))
}

fn migrate(connection: &Connection, found: i64) -> Result<(), StoreError> {
    if found < 1 {
        connection
            .execute_batch(&format!("BEGIN; {SCHEMA} PRAGMA user_version = 1; COMMIT;"))
            .map_err(StoreError::sqlite("create the tables"))?;
    }
    Ok(())
}

fn read(connection: &Connection, tables: &Tables) -> Result<State, StoreError> {
    let mut state = State::default();
    read_records(connection, tables, &mut state)?;
    read_claims(connection, &mut state)?;
    read_events(connection, &mut state)?;
    state.epoch = connection
        .query_row("SELECT value FROM meta WHERE key = 'epoch'", [], |row| {
            row.get::<_, i64>(0)
        })
        .optional()
        .map_err(StoreError::sqlite("read the epoch"))?
        .and_then(|epoch| u64::try_from(epoch).ok())
        .ok_or_else(|| StoreError::Damaged {
            what: "no epoch".into(),
        })?;
    Ok(state)
}

fn read_records(
    connection: &Connection,
    tables: &Tables,
    state: &mut State,
) -> Result<(), StoreError> {
    let mut query = connection
        .prepare("SELECT kind, id, value FROM record")
        .map_err(StoreError::sqlite("read records"))?;
    let mut rows = query
        .query([])
        .map_err(StoreError::sqlite("read records"))?;
    while let Some(row) = rows.next().map_err(StoreError::sqlite("read records"))? {
        let (kind, id, value): (String, String, Vec<u8>) =
            row.try_into().map_err(StoreError::sqlite("read records"))?;
        let (table, decode) = tables
            .0
            .get(kind.as_str())
            .ok_or_else(|| StoreError::Damaged {
                what: format!("unknown kind of record {kind:?}"),
            })?;
        let record = decode(&value).map_err(|error| StoreError::Damaged {
            what: format!("{kind} {id}: {error}"),
        })?;
        state.records.insert((*table, id), record);
    }
    Ok(())
}

fn read_claims(connection: &Connection, state: &mut State) -> Result<(), StoreError> {
    let mut query = connection
        .prepare("SELECT key, holder FROM claim")
        .map_err(StoreError::sqlite("read claims"))?;
    let mut rows = query.query([]).map_err(StoreError::sqlite("read claims"))?;
    while let Some(row) = rows.next().map_err(StoreError::sqlite("read claims"))? {
        let (key, holder): (String, String) =
            row.try_into().map_err(StoreError::sqlite("read claims"))?;
        state.held.insert((holder.clone(), key.clone()), ());
        state.claims.insert(key, holder);
    }
    Ok(())
}

fn read_events(connection: &Connection, state: &mut State) -> Result<(), StoreError> {
    let mut query = connection
        .prepare("SELECT epoch, number, at, body FROM event")
        .map_err(StoreError::sqlite("read events"))?;
    let mut rows = query.query([]).map_err(StoreError::sqlite("read events"))?;
    while let Some(row) = rows.next().map_err(StoreError::sqlite("read events"))? {
        let (epoch, number, at, body): (i64, i64, i64, Vec<u8>) =
            row.try_into().map_err(StoreError::sqlite("read events"))?;
        let (epoch, number) = (epoch.cast_unsigned(), number.cast_unsigned());
        state.events.insert(
            (epoch, number),
            Arc::new(EventRow {
                epoch,
                number,
                at: Time::from_unix_ns(at),
                body,
            }),
        );
    }
    Ok(())
}

/// Writes one prepared statement; the cache keeps them compiled.
pub(super) fn execute(
    connection: &Connection,
    sql: &'static str,
    values: impl rusqlite::Params,
) -> Result<(), rusqlite::Error> {
    connection.prepare_cached(sql)?.execute(values).map(drop)
}

pub(super) fn put_record(
    c: &Connection,
    kind: &str,
    id: &str,
    value: &[u8],
) -> Result<(), rusqlite::Error> {
    execute(
        c,
        "INSERT INTO record VALUES (?1, ?2, ?3) ON CONFLICT (kind, id) DO UPDATE SET value = ?3",
        params![kind, id, value],
    )
}

pub(super) fn delete_record(c: &Connection, kind: &str, id: &str) -> Result<(), rusqlite::Error> {
    execute(
        c,
        "DELETE FROM record WHERE kind = ?1 AND id = ?2",
        params![kind, id],
    )
}

pub(super) fn put_claim(c: &Connection, key: &str, holder: &str) -> Result<(), rusqlite::Error> {
    execute(
        c,
        "INSERT OR REPLACE INTO claim VALUES (?1, ?2)",
        params![key, holder],
    )
}

pub(super) fn delete_claim(c: &Connection, key: &str) -> Result<(), rusqlite::Error> {
    execute(c, "DELETE FROM claim WHERE key = ?1", params![key])
}

pub(super) fn put_event(c: &Connection, event: &EventRow) -> Result<(), rusqlite::Error> {
    execute(
        c,
        "INSERT INTO event VALUES (?1, ?2, ?3, ?4)",
        params![
            event.epoch.cast_signed(),
            event.number.cast_signed(),
            event.at.unix_ns(),
            event.body
        ],
    )
}

pub(super) fn delete_event(
    c: &Connection,
    (epoch, number): (u64, u64),
) -> Result<(), rusqlite::Error> {
    execute(
        c,
        "DELETE FROM event WHERE epoch = ?1 AND number = ?2",
        params![epoch.cast_signed(), number.cast_signed()],
    )
}
