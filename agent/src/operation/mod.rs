//! Verbs that must survive a crash: intent, steps with undo, outcome.
//!
//! ```text
//!  run(op) --admit--> joins an equal one | waits for or pre-empts another of the same subject
//!     |
//!     plan + commit intent (every claim)     <- one planning lock: a plan sees what it commits on
//!     steps, group by group                  <- side by side within a group
//!     |                      \
//!  commit outcome          unwind: undo in reverse, then give the claims back
//! ```
//! - Two commits frame the side effects, so a crash anywhere ends in the finished state or in
//!   nothing: an unfinished create is undone, an unfinished stop or remove runs again.
//! - Steps are not journalled. Each derives from ids alone, may run twice, and its undo treats
//!   "not there" as success.
//! - The work goes on when its caller leaves; an equal request afterwards gets the result.

mod crash;
mod error;
mod recover;
mod run;

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    fmt::{self, Debug},
    future::Future,
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::error::OperationError;
use crate::{
    clock::Time,
    id::OperationId,
    store::{Changes, Record, Snapshot, Store},
};

/// What equal wishes have in common: an equal key joins, it never runs twice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OperationKey(pub String);

/// What an operation holds while it runs, e.g. `sandbox/<id>`; one operation at a time each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Subject(pub String);

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What becomes of an operation that a crash cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRestart {
    /// All its steps are undone: creates.
    Unwind,
    /// It runs again from its start: stop, remove.
    Resume,
}

/// What to do when the subject is held by another operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Wait until it has ended, then look again.
    Wait,
    /// Tell it to unwind, then wait.
    Preempt,
}

/// A verb with side effects outside the store.
pub trait Operation: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// The RPC in snake case; also span, metric and intent kind.
    const NAME: &'static str;
    /// What a crash makes of it.
    const ON_RESTART: OnRestart;
    /// Its steps.
    type Step: Copy + Debug + Send + Sync + 'static;
    /// Groups of steps, in order; those of one group run side by side.
    const STEPS: &'static [&'static [Self::Step]];
    /// The chapter that does the work.
    type Domain: Send + Sync + 'static;
    /// What a step found out, for the outcome.
    type Fact: Send + 'static;
    /// What the caller gets.
    type Output: Clone + Send + Sync + 'static;
    /// The chapter's error.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Equal keys are the same wish.
    fn key(&self) -> OperationKey;

    /// What it holds.
    fn subject(&self) -> Subject;

    /// What to do when `running` holds the subject.
    fn over(&self, running: &str) -> Over {
        let _ = running;
        Over::Wait
    }

    /// The output of an equal wish that was carried out and that nobody has touched since: the
    /// answer for a caller who never got it, because it had gone or the agent had died.
    fn standing(&self, at: &Snapshot) -> Option<Self::Output> {
        let _ = at;
        None
    }

    /// Decides on the state `at` and claims names, ports and addresses; may fill in what the
    /// steps need. Nothing has happened yet when this fails.
    ///
    /// # Errors
    /// The chapter's refusals.
    fn intent(&mut self, at: &Snapshot, on: &Self::Domain) -> Result<Changes, Self::Error>;

    /// Does a step; harmless when repeated.
    fn apply(
        &self,
        step: Self::Step,
        on: &Arc<Self::Domain>,
        context: &Context,
    ) -> impl Future<Output = Result<Option<Self::Fact>, Self::Error>> + Send;

    /// Undoes a step; harmless when repeated or when the step never happened.
    fn undo(
        &self,
        step: Self::Step,
        on: &Arc<Self::Domain>,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Records and events of the finished state, committed with the end of the intent.
    fn outcome(&self, facts: Vec<Self::Fact>, at: &Snapshot) -> (Changes, Self::Output);

    /// What is committed with the end of the intent once everything is undone: at least the
    /// release of the claims.
    fn unwound(&self, error: Option<&Self::Error>, at: &Snapshot) -> Changes;
}

/// What a step may know of the operation around it.
pub struct Context {
    /// The operation's id.
    pub id: OperationId,
    /// Becomes true when the operation is to unwind.
    pub cancelled: CancellationToken,
    stage: watch::Sender<Stage>,
}

impl Context {
    /// Tells an operator what is being done within the step.
    pub fn stage(&self, name: impl Into<String>) {
        let name = name.into();
        self.stage.send_replace(Stage {
            name,
            since: Time::now(),
        });
    }
}

/// What an operation is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The step or what a step said of itself.
    pub name: String,
    /// Since when.
    pub since: Time,
}

/// A running operation, as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Its id.
    pub id: OperationId,
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub subject: Subject,
    /// Since when it runs.
    pub started_at: Time,
    /// What it is doing.
    pub stage: Stage,
}

/// An operation that ended a short time ago, as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its id.
    pub id: OperationId,
    /// Its name.
    pub name: &'static str,
    /// What it held.
    pub subject: Subject,
    /// Its input's `id` and `config.face`, where it has them.
    pub input: serde_json::Value,
    /// Since when it ran.
    pub started_at: Time,
    /// When it ended.
    pub ended_at: Time,
    /// Why it failed, with causes; none if it worked.
    pub error: Option<String>,
}

/// Durable row of an operation between its two commits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Intent {
    /// The operation.
    pub id: OperationId,
    /// [`Operation::NAME`].
    pub name: String,
    /// [`Operation::subject`].
    pub subject: Subject,
    /// The operation itself.
    pub input: serde_json::Value,
    /// Since when.
    pub started_at: Time,
}

impl Record for Intent {
    const TABLE: &'static str = "intent";

    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// The running operations: start, join by key, wait, cancel, recover.
#[derive(Clone)]
pub struct Operations {
    store: Store,
    table: Arc<Mutex<Table>>,
    planning: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct Table {
    running: HashMap<Subject, Entry>,
    /// The last ones that ended, oldest first, for operators.
    finished: VecDeque<Finished>,
}

/// Ended operations that are remembered.
const FINISHED: usize = 256;

/// The shared result of an operation: `Result<Output, OperationError<Error>>` behind `Any`.
type Done = Arc<dyn Any + Send + Sync>;

#[derive(Clone)]
struct Entry {
    id: OperationId,
    name: &'static str,
    key: OperationKey,
    started_at: Time,
    cancel: CancellationToken,
    stage: watch::Receiver<Stage>,
    done: watch::Receiver<Option<Done>>,
}

impl Operations {
    /// No operation yet; `store` keeps the intents.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            table: Arc::default(),
            planning: Arc::default(),
        }
    }

    /// All running operations, oldest first.
    pub fn list(&self) -> Vec<Running> {
        let mut all: Vec<_> = self
            .lock()
            .running
            .iter()
            .map(|(subject, entry)| Running {
                id: entry.id.clone(),
                name: entry.name,
                subject: subject.clone(),
                started_at: entry.started_at,
                stage: entry.stage.borrow().clone(),
            })
            .collect();
        all.sort_by_key(|running| running.started_at);
        all
    }

    /// The operations that ended last, oldest first.
    pub fn finished(&self) -> Vec<Finished> {
        self.lock().finished.iter().cloned().collect()
    }

    /// Tells the operation to unwind; false if none with this id runs.
    pub fn cancel(&self, id: &OperationId) -> bool {
        let entry = self.find(id);
        if let Some(entry) = &entry {
            entry.cancel.cancel();
        }
        entry.is_some()
    }

    /// Waits until the operation has ended; at once if none with this id runs.
    pub async fn wait(&self, id: &OperationId) {
        if let Some(entry) = self.find(id) {
            ended(entry.done).await;
        }
    }

    /// Waits until no operation holds `subject`.
    pub async fn wait_for(&self, subject: &Subject) {
        loop {
            let entry = self.lock().running.get(subject).cloned();
            match entry {
                Some(entry) => drop(ended(entry.done).await),
                None => return,
            }
        }
    }

    /// Tells every operation whose subject begins with `prefix` to unwind, and waits for them.
    pub async fn preempt(&self, prefix: &str) {
        for entry in self.with_prefix(prefix) {
            entry.cancel.cancel();
            ended(entry.done).await;
        }
    }

    /// Waits for every operation that runs now and whose subject begins with `prefix`.
    pub async fn settled(&self, prefix: &str) {
        for entry in self.with_prefix(prefix) {
            ended(entry.done).await;
        }
    }

    /// Tells an operation of this name that holds `subject` to unwind, and waits for it.
    pub async fn preempt_named(&self, subject: &Subject, name: &str) {
        if let Some(entry) = self.named(subject, name) {
            entry.cancel.cancel();
            ended(entry.done).await;
        }
    }

    /// Name of the operation that holds `subject`.
    pub fn running_on(&self, subject: &Subject) -> Option<&'static str> {
        self.lock().running.get(subject).map(|entry| entry.name)
    }

    fn named(&self, subject: &Subject, name: &str) -> Option<Entry> {
        let table = self.lock();
        let entry = table.running.get(subject);
        entry.filter(|entry| entry.name == name).cloned()
    }

    fn with_prefix(&self, prefix: &str) -> Vec<Entry> {
        self.lock()
            .running
            .iter()
            .filter(|(subject, _)| subject.0.starts_with(prefix))
            .map(|(_, entry)| entry.clone())
            .collect()
    }

    /// Waits while an operation of this name holds `subject`.
    pub async fn wait_for_named(&self, subject: &Subject, name: &str) {
        if let Some(entry) = self.named(subject, name) {
            ended(entry.done).await;
        }
    }

    fn find(&self, id: &OperationId) -> Option<Entry> {
        self.lock()
            .running
            .values()
            .find(|entry| entry.id == *id)
            .cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().expect("no panic while this lock is held")
    }
}

/// The result, or none if the operation's task died.
async fn ended(mut done: watch::Receiver<Option<Done>>) -> Option<Done> {
    done.wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|result| result.clone())
}
