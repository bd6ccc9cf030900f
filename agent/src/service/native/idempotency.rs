//! Idempotency keys: what a repeated wish gets is the first one's result.
//!
//! ```text
//! (method, key) -> content, then  Running (shared by all who wait)  ->  Done for ten minutes
//! ```
//! The table is in memory and bounded. Work whose last caller left is not held here: an operation
//! goes on by itself, and the repeated call joins it. Errors after which the same call may well
//! succeed are not kept.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use longshore_proto::longshore::v1 as pb;
use prost::Message;
use tonic::{Code, Status};

use super::{error::NativeError, parse, refused};
use crate::id::Digest;

/// Longest key, in bytes.
const KEY_BYTES: usize = 128;
/// How long a key is remembered after its call ended.
const KEPT: Duration = Duration::from_secs(600);
/// Most keys that are remembered; beyond, the oldest are forgotten early.
const ENTRIES: usize = 4096;

type Outcome = Result<Bytes, Status>;
type Work = Shared<BoxFuture<'static, Outcome>>;

/// A request that changes something.
pub(super) trait Change: Send + 'static {
    /// Its idempotency key; empty for none.
    fn key(&self) -> &str;
    /// What it is about, as a caller names it.
    fn subject(&self) -> &str;
    /// What it wishes beside the key; equal for equal wishes, and tells nothing about secrets.
    fn content(&self) -> Digest;
}

/// Requires a key that can be kept.
pub(super) fn check_key(key: &str) -> Result<(), NativeError> {
    if key.len() > KEY_BYTES {
        return Err(NativeError::range(
            "idempotency_key",
            key.len(),
            0,
            KEY_BYTES,
        ));
    }
    Ok(crate::service::edge::text(
        "idempotency_key",
        key,
        KEY_BYTES,
    )?)
}

/// Wishes may hold secrets with little to guess: the digest is worth nothing outside this process.
pub(super) fn digest(parts: &[&[u8]]) -> Digest {
    static SALT: LazyLock<[u8; 32]> = LazyLock::new(rand::random);
    let mut text = SALT.to_vec();
    for part in parts {
        text.extend(part.len().to_le_bytes());
        text.extend_from_slice(part);
    }
    Digest::of(&text)
}

macro_rules! changes {
    ($($request:ident about $subject:ident;)*) => {
        $(impl Change for pb::$request {
            fn key(&self) -> &str {
                &self.idempotency_key
            }

            fn subject(&self) -> &str {
                &self.$subject
            }

            fn content(&self) -> Digest {
                let mut bare = self.clone();
                bare.idempotency_key.clear();
                digest(&[&bare.encode_to_vec()])
            }
        })*
    };
}

// Messages with maps are not here: their encoding differs from time to time.
changes! {
    StopSandboxRequest about sandbox_id;
    RemoveSandboxRequest about sandbox_id;
    StartContainerRequest about container_id;
    StopContainerRequest about container_id;
    SignalContainerRequest about container_id;
    RemoveContainerRequest about container_id;
    PullImageRequest about reference;
    TagImageRequest about image;
    RemoveImageRequest about image;
    CancelOperationRequest about operation_id;
    StartSystemRequest about name;
    StopSystemRequest about name;
    RestartSystemRequest about name;
    RemoveSystemRequest about name;
    FreezeSystemRequest about name;
    UnfreezeSystemRequest about name;
}

impl Change for pb::PruneImagesRequest {
    fn key(&self) -> &str {
        &self.idempotency_key
    }

    fn subject(&self) -> &str {
        ""
    }

    fn content(&self) -> Digest {
        digest(&[&[u8::from(self.dry_run)]])
    }
}

impl Change for pb::RunSandboxRequest {
    fn key(&self) -> &str {
        &self.idempotency_key
    }

    fn subject(&self) -> &str {
        self.config.as_ref().map_or("", |config| &config.name)
    }

    fn content(&self) -> Digest {
        let (bare, maps) = parse::sandbox_without_maps(self.config.clone().unwrap_or_default());
        digest(&[&bare.encode_to_vec(), &maps])
    }
}

impl Change for pb::CreateSystemRequest {
    fn key(&self) -> &str {
        &self.idempotency_key
    }

    fn subject(&self) -> &str {
        self.config.as_ref().map_or("", |config| &config.name)
    }

    fn content(&self) -> Digest {
        let (bare, maps) = parse::system_without_maps(self.config.clone().unwrap_or_default());
        digest(&[&bare.encode_to_vec(), &maps])
    }
}

impl Change for pb::CreateContainerRequest {
    fn key(&self) -> &str {
        &self.idempotency_key
    }

    fn subject(&self) -> &str {
        self.config.as_ref().map_or("", |config| &config.name)
    }

    fn content(&self) -> Digest {
        let (bare, maps) = parse::container_without_maps(self.config.clone().unwrap_or_default());
        digest(&[self.sandbox_id.as_bytes(), &bare.encode_to_vec(), &maps])
    }
}

/// The keys of this agent; clones share them.
#[derive(Clone, Default)]
pub(super) struct Idempotency {
    table: Arc<Mutex<HashMap<(&'static str, String), Entry>>>,
}

struct Entry {
    content: Digest,
    state: State,
    /// When it was last used.
    at: Instant,
}

enum State {
    Running(WeakShared<BoxFuture<'static, Outcome>>),
    Done(Outcome),
}

impl Idempotency {
    /// Does `work`, or gives the result of the first call with this key.
    ///
    /// # Errors
    /// `IDEMPOTENCY_KEY_REUSED` if the key stands for other content; what the work fails with.
    pub(super) async fn once<A>(
        &self,
        method: &'static str,
        key: &str,
        content: Digest,
        work: impl Future<Output = Result<A, Status>> + Send + 'static,
    ) -> Result<A, Status>
    where
        A: Message + Default,
    {
        let bytes = match self.admit(method, key, content, work)? {
            Admitted::Done(outcome) => outcome?,
            Admitted::Wait(work) => work.await?,
        };
        A::decode(bytes).map_err(|error| Status::internal(error.to_string()))
    }

    fn admit<A: Message>(
        &self,
        method: &'static str,
        key: &str,
        content: Digest,
        work: impl Future<Output = Result<A, Status>> + Send + 'static,
    ) -> Result<Admitted, Status> {
        let at = (method, key.to_owned());
        let mut table = self.table.lock().expect("no panic while this lock is held");
        make_room(&mut table);
        if let Some(entry) = table.get_mut(&at) {
            if entry.content != content {
                return Err(refused(NativeError::KeyReused { key: at.1, method }));
            }
            entry.at = Instant::now();
            match &entry.state {
                State::Done(outcome) => return Ok(Admitted::Done(outcome.clone())),
                State::Running(work) => {
                    if let Some(work) = work.upgrade() {
                        return Ok(Admitted::Wait(work));
                    }
                }
            }
        }
        let (keys, kept_at) = (self.clone(), at.clone());
        let shared = async move {
            let outcome = work.await.map(|answer| Bytes::from(answer.encode_to_vec()));
            keys.finish(&kept_at, &outcome);
            outcome
        }
        .boxed()
        .shared();
        if let Some(running) = shared.downgrade() {
            let entry = Entry {
                content,
                state: State::Running(running),
                at: Instant::now(),
            };
            table.insert(at, entry);
        }
        Ok(Admitted::Wait(shared))
    }

    /// The result of an earlier call with this key, for a stream that ends with its result.
    ///
    /// # Errors
    /// As [`Idempotency::once`].
    pub(super) fn earlier<A: Message + Default>(
        &self,
        method: &'static str,
        key: &str,
        content: &Digest,
    ) -> Result<Option<A>, Status> {
        let table = self.table.lock().expect("no panic while this lock is held");
        let Some(entry) = table
            .get(&(method, key.to_owned()))
            .filter(|entry| entry.at.elapsed() < KEPT)
        else {
            return Ok(None);
        };
        if entry.content != *content {
            let key = key.to_owned();
            return Err(refused(NativeError::KeyReused { key, method }));
        }
        match &entry.state {
            State::Done(Ok(bytes)) => Ok(A::decode(bytes.clone()).ok()),
            State::Done(Err(_)) | State::Running(_) => Ok(None),
        }
    }

    /// Keeps the result of such a stream.
    pub(super) fn keep(
        &self,
        method: &'static str,
        key: &str,
        content: Digest,
        answer: &impl Message,
    ) {
        let mut table = self.table.lock().expect("no panic while this lock is held");
        make_room(&mut table);
        let entry = Entry {
            content,
            state: State::Done(Ok(answer.encode_to_vec().into())),
            at: Instant::now(),
        };
        table.insert((method, key.to_owned()), entry);
    }

    fn finish(&self, at: &(&'static str, String), outcome: &Outcome) {
        let mut table = self.table.lock().expect("no panic while this lock is held");
        if !is_final(outcome) {
            table.remove(at);
        } else if let Some(entry) = table.get_mut(at) {
            entry.state = State::Done(outcome.clone());
            entry.at = Instant::now();
        }
    }
}

enum Admitted {
    Done(Outcome),
    Wait(Work),
}

/// A repeated call would not fare better, or must not be tried.
fn is_final(outcome: &Outcome) -> bool {
    match outcome {
        Ok(_) => true,
        Err(status) => matches!(
            status.code(),
            Code::NotFound
                | Code::AlreadyExists
                | Code::FailedPrecondition
                | Code::PermissionDenied
        ),
    }
}

fn make_room(table: &mut HashMap<(&'static str, String), Entry>) {
    table.retain(|_, entry| entry.at.elapsed() < KEPT);
    while table.len() >= ENTRIES {
        let oldest = table
            .iter()
            .min_by_key(|(_, entry)| entry.at)
            .map(|(at, _)| at.clone());
        let Some(oldest) = oldest else { return };
        table.remove(&oldest);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn answer(
        keys: &Idempotency,
        count: &Arc<AtomicU32>,
        key: &str,
        content: &str,
    ) -> BoxFuture<'static, Result<u32, Status>> {
        let (keys, key, content) = (keys.clone(), key.to_owned(), digest(&[content.as_bytes()]));
        let count = Arc::clone(count);
        async move {
            let work = async move {
                tokio::task::yield_now().await;
                Ok(count.fetch_add(1, Ordering::Relaxed) + 1)
            };
            keys.once("Test", &key, content, work).await
        }
        .boxed()
    }

    #[tokio::test]
    async fn equal_wishes_share_one_result_and_others_are_refused() {
        let (keys, count) = (Idempotency::default(), Arc::default());
        let (one, two) = tokio::join!(
            answer(&keys, &count, "k", "a"),
            answer(&keys, &count, "k", "a")
        );
        assert_eq!((one.ok(), two.ok()), (Some(1), Some(1)), "joined");
        assert_eq!(answer(&keys, &count, "k", "a").await.ok(), Some(1), "kept");
        let other = answer(&keys, &count, "k", "b")
            .await
            .expect_err("another wish");
        assert_eq!(other.code(), Code::AlreadyExists);
        assert_eq!(
            answer(&keys, &count, "l", "b").await.ok(),
            Some(2),
            "another key"
        );
    }

    #[tokio::test]
    async fn what_may_succeed_later_is_not_kept() {
        let keys = Idempotency::default();
        for (code, tries) in [(Code::Unavailable, 2), (Code::FailedPrecondition, 1)] {
            let count = Arc::new(AtomicU32::new(0));
            for _ in 0..2 {
                let count = Arc::clone(&count);
                let work = async move {
                    count.fetch_add(1, Ordering::Relaxed);
                    Err::<u32, _>(Status::new(code, "no"))
                };
                let failed = keys
                    .once("Test", code.description(), digest(&[]), work)
                    .await;
                assert_eq!(failed.expect_err("fails").code(), code);
            }
            assert_eq!(count.load(Ordering::Relaxed), tries, "{code:?}");
        }
    }

    #[tokio::test]
    async fn work_whose_callers_left_is_begun_again() {
        let keys = Idempotency::default();
        let stuck = keys.once::<u32>("Test", "k", digest(&[]), std::future::pending());
        assert!(
            tokio::time::timeout(Duration::from_millis(1), stuck)
                .await
                .is_err()
        );
        let again = keys
            .once::<u32>("Test", "k", digest(&[]), std::future::ready(Ok(7)))
            .await;
        assert_eq!(again.ok(), Some(7));
    }

    #[test]
    fn the_table_is_bounded() {
        let keys = Idempotency::default();
        for number in 0..ENTRIES + 10 {
            keys.keep("Test", &number.to_string(), digest(&[]), &1_u32);
        }
        assert_eq!(keys.table.lock().expect("no panic").len(), ENTRIES);
        assert!(
            keys.earlier::<u32>("Test", "0", &digest(&[]))
                .is_ok_and(|found| found.is_none())
        );
    }

    #[test]
    fn maps_make_no_difference_by_their_order() {
        let request = || pb::RunSandboxRequest {
            config: Some(pb::SandboxConfig {
                labels: (0..50).map(|n| (format!("k{n}"), n.to_string())).collect(),
                ..Default::default()
            }),
            idempotency_key: rand::random::<u32>().to_string(),
        };
        assert_eq!(request().content(), request().content());
        let mut other = request();
        other.config.get_or_insert_default().labels.clear();
        assert_ne!(request().content(), other.content());
    }
}
