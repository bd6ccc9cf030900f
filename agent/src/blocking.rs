//! The only way into blocking work: two bounded lanes, so that one hung disk or mount holds its
//! own request and not the runtime.
//!
//! [`run`] is for quick kernel and file work (a cgroup, a namespace, a small file), [`run_bulk`]
//! for what takes long by nature (unpacking, deleting a tree). Neither starves the other.

use std::{
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};

use tokio::{sync::Semaphore, task};

/// Quick calls that may run at once.
const HOST_LANE: usize = 64;
/// Long calls that may run at once.
const BULK_LANE: usize = 8;

static HOST: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(HOST_LANE));
static BULK: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(BULK_LANE));
static RUNNING: LazyLock<Mutex<Vec<Stage>>> = LazyLock::new(Mutex::default);

/// Blocking work under way, as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// What is done, e.g. `remove layer`.
    pub label: &'static str,
    /// Since when.
    pub since: Instant,
}

/// Runs quick blocking work; `label` names it to an operator while it runs.
///
/// # Panics
/// Passes on a panic of `work`.
pub async fn run<T: Send + 'static>(
    label: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    lane(&HOST, label, work).await
}

/// Runs long blocking work.
///
/// # Panics
/// Passes on a panic of `work`.
pub async fn run_bulk<T: Send + 'static>(
    label: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    lane(&BULK, label, work).await
}

/// Blocking work that has lasted for at least `age`, oldest first.
pub fn older_than(age: Duration) -> Vec<Stage> {
    let running = RUNNING.lock().expect("no panic while this lock is held");
    let mut stuck: Vec<_> = running
        .iter()
        .filter(|stage| stage.since.elapsed() >= age)
        .copied()
        .collect();
    stuck.sort_by_key(|stage| stage.since);
    stuck
}

async fn lane<T: Send + 'static>(
    lane: &'static Semaphore,
    label: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let permit = lane.acquire().await.expect("lanes are never closed");
    let done = task::spawn_blocking(move || {
        // The permit is given back when the work ends, not when the caller stops waiting:
        // an abandoned call still occupies its thread.
        let _permit = permit;
        let _stage = Entered::new(label);
        work()
    });
    match done.await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

struct Entered(Stage);

impl Entered {
    fn new(label: &'static str) -> Self {
        let stage = Stage {
            label,
            since: Instant::now(),
        };
        RUNNING
            .lock()
            .expect("no panic while this lock is held")
            .push(stage);
        Self(stage)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut running = RUNNING.lock().expect("no panic while this lock is held");
        if let Some(at) = running.iter().position(|stage| *stage == self.0) {
            running.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_returns_its_value_and_is_listed_while_it_runs() {
        let (started, wait) = std::sync::mpsc::channel();
        let (finish, until) = std::sync::mpsc::channel::<()>();
        let work = tokio::spawn(run("listed work", move || {
            started.send(()).expect("the test waits");
            until.recv().expect("the test sends");
            7
        }));
        task::spawn_blocking(move || wait.recv())
            .await
            .expect("joins")
            .expect("started");
        assert!(
            older_than(Duration::ZERO)
                .iter()
                .any(|s| s.label == "listed work")
        );
        finish.send(()).expect("the work waits");
        assert_eq!(work.await.expect("joins"), 7);
        assert!(
            !older_than(Duration::ZERO)
                .iter()
                .any(|s| s.label == "listed work")
        );
    }
}
