//! Running one operation: admission, intent, steps, outcome or unwinding.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, info, warn};

use super::{
    Context, Done, Entry, FINISHED, Finished, Intent, OnRestart, Operation, OperationError,
    Operations, Over, Stage, crash, ended,
};
use crate::{
    clock::Time,
    id::OperationId,
    store::{Changes, StoreError},
};

/// Longest pause between attempts to undo what could not be undone.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

type Outcome<O> = Result<<O as Operation>::Output, OperationError<<O as Operation>::Error>>;

enum Admitted<O: Operation> {
    /// An equal one runs.
    Join(watch::Receiver<Option<Done>>),
    /// An equal one ran.
    Answer(O::Output),
    /// Another one holds the subject.
    Queue(watch::Receiver<Option<Done>>),
    Go(Task),
}

/// The task's side of an entry.
pub(super) struct Task {
    pub(super) context: Context,
    started_at: Time,
    done: watch::Sender<Option<Done>>,
}

impl Operations {
    /// Runs `operation`, or joins an equal one; the work goes on if the caller leaves.
    ///
    /// # Errors
    /// `Domain` with everything undone; `Store`; `Cancelled` when a stop or remove pre-empted it.
    pub async fn run<O: Operation>(&self, operation: O, on: Arc<O::Domain>) -> Outcome<O> {
        loop {
            match self.admit(&operation) {
                Admitted::Answer(output) => return Ok(output),
                Admitted::Join(done) => {
                    let done = ended(done).await;
                    return done.map_or_else(|| Err(died::<O>()), |done| result::<O>(&done));
                }
                Admitted::Queue(done) => drop(ended(done).await),
                Admitted::Go(task) => {
                    let receiver = task.done.subscribe();
                    self.spawn(operation, on, task);
                    let done = ended(receiver).await;
                    return done.map_or_else(|| Err(died::<O>()), |done| result::<O>(&done));
                }
            }
        }
    }

    fn admit<O: Operation>(&self, operation: &O) -> Admitted<O> {
        let (key, subject) = (operation.key(), operation.subject());
        let mut table = self.lock();
        if let Some(entry) = table.running.get(&subject) {
            if entry.key == key && entry.name == O::NAME {
                return Admitted::Join(entry.done.clone());
            }
            if operation.over(entry.name) == Over::Preempt {
                entry.cancel.cancel();
            }
            return Admitted::Queue(entry.done.clone());
        }
        // Under the lock: what runs has not ended, what has ended is in the snapshot.
        if let Some(output) = operation.standing(&self.store.snapshot()) {
            return Admitted::Answer(output);
        }
        let (entry, task) = entry::<O>(key, OperationId::random());
        table.running.insert(subject, entry);
        Admitted::Go(task)
    }

    fn spawn<O: Operation>(&self, mut operation: O, on: Arc<O::Domain>, task: Task) {
        let operations = self.clone();
        let span = tracing::info_span!("operation", name = O::NAME, operation_id = %task.context.id, subject = %operation.subject());
        let work = async move {
            let outcome = operations.perform(&mut operation, &on, &task).await;
            operations.finish(&operation, &task, outcome);
        };
        tokio::spawn(work.instrument(span));
    }

    /// Plan, intent, steps, outcome; or unwinding.
    async fn perform<O: Operation>(
        &self,
        operation: &mut O,
        on: &Arc<O::Domain>,
        task: &Task,
    ) -> Outcome<O> {
        self.begin(operation, on, task).await?;
        self.carry_out(operation, on, task).await
    }

    async fn begin<O: Operation>(
        &self,
        operation: &mut O,
        on: &Arc<O::Domain>,
        task: &Task,
    ) -> Result<(), OperationError<O::Error>> {
        crash::point(O::NAME, &"intent", "before");
        let planning = self.planning.lock().await;
        let changes = operation
            .intent(&self.store.snapshot(), on)
            .map_err(|error| OperationError::Domain(Arc::new(error)))?;
        let intent = Intent {
            id: task.context.id.clone(),
            name: O::NAME.to_owned(),
            subject: operation.subject(),
            input: serde_json::to_value(&*operation).expect("operations have string keys"),
            started_at: task.started_at,
        };
        self.store
            .commit(changes.put(intent))
            .await
            .map_err(store_error::<O>)?;
        drop(planning);
        crash::point(O::NAME, &"intent", "after");
        Ok(())
    }

    /// Steps and outcome of an operation whose intent is committed.
    pub(super) async fn carry_out<O: Operation>(
        &self,
        operation: &O,
        on: &Arc<O::Domain>,
        task: &Task,
    ) -> Outcome<O> {
        let mut facts = Vec::new();
        for (group, steps) in O::STEPS.iter().enumerate() {
            if task.context.cancelled.is_cancelled() {
                return self.fail(operation, on, task, group, None).await;
            }
            task.context.stage(names(steps));
            let applied = join_all(
                steps
                    .iter()
                    .map(|step| apply(operation, *step, on, &task.context)),
            )
            .await;
            let mut failure = None;
            for one in applied {
                match one {
                    Ok(fact) => facts.extend(fact),
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            if let Some(error) = failure {
                return self.fail(operation, on, task, group + 1, Some(error)).await;
            }
        }
        task.context.stage("commit");
        crash::point(O::NAME, &"outcome", "before");
        let (changes, output) = operation.outcome(facts, &self.store.snapshot());
        match self.close(&task.context.id, changes).await {
            Ok(()) => {
                crash::point(O::NAME, &"outcome", "after");
                info!(elapsed_ms = elapsed_ms(task.started_at), "done");
                Ok(output)
            }
            Err(source) => {
                self.unwind(operation, on, task, O::STEPS.len(), None).await;
                Err(store_error::<O>(source))
            }
        }
    }

    async fn fail<O: Operation>(
        &self,
        operation: &O,
        on: &Arc<O::Domain>,
        task: &Task,
        groups: usize,
        error: Option<O::Error>,
    ) -> Outcome<O> {
        match &error {
            Some(error) => info!(error = error as &dyn std::error::Error, "failed, unwinding"),
            None => info!("cancelled, unwinding"),
        }
        self.unwind(operation, on, task, groups, error.as_ref())
            .await;
        Err(
            error.map_or(OperationError::Cancelled { operation: O::NAME }, |error| {
                OperationError::Domain(Arc::new(error))
            }),
        )
    }

    /// Undoes the steps of the first `groups` groups, in reverse, and ends the intent. What can't
    /// be undone now is tried again in the background, with the subject still held.
    pub(super) async fn unwind<O: Operation>(
        &self,
        operation: &O,
        on: &Arc<O::Domain>,
        task: &Task,
        groups: usize,
        error: Option<&O::Error>,
    ) {
        let mut pause = Duration::from_millis(200);
        loop {
            task.context.stage("unwind");
            let undone = O::ON_RESTART == OnRestart::Resume || undo(operation, on, groups).await;
            if undone {
                let changes = operation.unwound(error, &self.store.snapshot());
                match self.close(&task.context.id, changes).await {
                    Ok(()) | Err(StoreError::Closed) => return,
                    Err(error) => warn!(%error, "cannot commit the end of an unwound operation"),
                }
            }
            task.context.stage("unwind: waiting to try again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn close(&self, id: &OperationId, changes: Changes) -> Result<(), StoreError> {
        self.store
            .commit(changes.delete::<Intent>(id.as_str()))
            .await
            .map(drop)
    }

    /// Publishes the result and frees the subject.
    fn finish<O: Operation>(&self, operation: &O, task: &Task, outcome: Outcome<O>) {
        let finished = finished(operation, task, &outcome);
        let done: Done = Arc::new(outcome);
        let mut table = self.lock();
        table.running.remove(&operation.subject());
        if table.finished.len() >= FINISHED {
            table.finished.pop_front();
        }
        table.finished.push_back(finished);
        drop(table);
        task.done.send_replace(Some(done));
    }

    /// Enters a recovered operation into the table.
    pub(super) fn readmit<O: Operation>(&self, operation: &O, id: OperationId) -> Task {
        let (entry, task) = entry::<O>(operation.key(), id);
        self.lock().running.insert(operation.subject(), entry);
        task
    }

    /// Runs a recovered operation to its end.
    pub(super) async fn recovered<O: Operation>(
        &self,
        operation: &O,
        on: &Arc<O::Domain>,
        task: &Task,
    ) {
        let outcome = match O::ON_RESTART {
            OnRestart::Unwind => {
                self.unwind(operation, on, task, O::STEPS.len(), None).await;
                Err(OperationError::Cancelled { operation: O::NAME })
            }
            OnRestart::Resume => self.carry_out(operation, on, task).await,
        };
        self.finish(operation, task, outcome);
    }
}

fn entry<O: Operation>(key: super::OperationKey, id: OperationId) -> (Entry, Task) {
    let started_at = Time::now();
    let (stage, stages) = watch::channel(Stage {
        name: "plan".into(),
        since: started_at,
    });
    let (done, results) = watch::channel(None);
    let cancelled = CancellationToken::new();
    let entry = Entry {
        id: id.clone(),
        name: O::NAME,
        key,
        started_at,
        cancel: cancelled.clone(),
        stage: stages,
        done: results,
    };
    let task = Task {
        context: Context {
            id,
            cancelled,
            stage,
        },
        started_at,
        done,
    };
    (entry, task)
}

async fn apply<O: Operation>(
    operation: &O,
    step: O::Step,
    on: &Arc<O::Domain>,
    context: &Context,
) -> Result<Option<O::Fact>, O::Error> {
    crash::point(O::NAME, &step, "before");
    let began = crate::clock::boot_ns();
    let result = operation.apply(step, on, context).await;
    debug!(
        ?step,
        elapsed_us = (crate::clock::boot_ns() - began) / 1000,
        "step"
    );
    crash::point(O::NAME, &step, "after");
    result
}

/// Undoes groups in reverse, going on past failures; true if all is undone.
async fn undo<O: Operation>(operation: &O, on: &Arc<O::Domain>, groups: usize) -> bool {
    let mut clean = true;
    for steps in O::STEPS[..groups].iter().rev() {
        for step in steps.iter().rev() {
            crash::point(O::NAME, &("undo", step), "before");
            if let Err(error) = operation.undo(*step, on).await {
                warn!(
                    ?step,
                    error = &error as &dyn std::error::Error,
                    "cannot undo a step yet"
                );
                clean = false;
            }
            crash::point(O::NAME, &("undo", step), "after");
        }
    }
    clean
}

fn result<O: Operation>(done: &Done) -> Outcome<O> {
    done.downcast_ref::<Outcome<O>>()
        .cloned()
        .unwrap_or_else(|| Err(died::<O>()))
}

fn finished<O: Operation>(operation: &O, task: &Task, outcome: &Outcome<O>) -> Finished {
    // The whole input may be large; this is what tells its object.
    let input = serde_json::to_value(operation).expect("operations have string keys");
    let face = input.get("config").and_then(|config| config.get("face"));
    Finished {
        id: task.context.id.clone(),
        name: O::NAME,
        subject: operation.subject(),
        input: serde_json::json!({ "id": input.get("id"), "config": { "face": face } }),
        started_at: task.started_at,
        ended_at: Time::now(),
        error: outcome.as_ref().err().map(|error| chain(error)),
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn died<O: Operation>() -> OperationError<O::Error> {
    OperationError::Died { operation: O::NAME }
}

fn store_error<O: Operation>(source: StoreError) -> OperationError<O::Error> {
    OperationError::Store {
        operation: O::NAME,
        source,
    }
}

fn names(steps: &[impl std::fmt::Debug]) -> String {
    let names: Vec<_> = steps.iter().map(|step| format!("{step:?}")).collect();
    names.join("+")
}

fn elapsed_ms(since: Time) -> i64 {
    (Time::now().unix_ns() - since.unix_ns()) / 1_000_000
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::{
        operation::{OperationKey, Subject},
        store::{Snapshot, Store, Tables},
    };

    #[derive(Default)]
    struct Host(Mutex<Vec<String>>);

    impl Host {
        fn note(&self, what: String) {
            self.0.lock().expect("no panic").push(what);
        }

        fn notes(&self) -> Vec<String> {
            self.0.lock().expect("no panic").clone()
        }
    }

    #[derive(Clone, Debug, Serialize, Deserialize)]
    struct Build {
        name: String,
        fail_at: Option<String>,
        slow: bool,
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Walls,
        Roof,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Broken(String);

    impl Operation for Build {
        const NAME: &'static str = "build";
        const ON_RESTART: OnRestart = OnRestart::Unwind;
        type Step = Step;
        const STEPS: &'static [&'static [Step]] = &[&[Step::Walls], &[Step::Roof]];
        type Domain = Host;
        type Fact = String;
        type Output = usize;
        type Error = Broken;

        fn key(&self) -> OperationKey {
            OperationKey(format!("{self:?}"))
        }

        fn subject(&self) -> Subject {
            Subject(format!("house/{}", self.name))
        }

        fn standing(&self, at: &Snapshot) -> Option<usize> {
            at.claim(&format!("name/{}", self.name)).map(|_| 2)
        }

        fn over(&self, _running: &str) -> Over {
            if self.slow { Over::Wait } else { Over::Preempt }
        }

        fn intent(&mut self, _at: &Snapshot, _on: &Host) -> Result<Changes, Broken> {
            Ok(Changes::new().claim(format!("name/{}", self.name), self.subject().0))
        }

        async fn apply(
            &self,
            step: Step,
            on: &Arc<Host>,
            context: &Context,
        ) -> Result<Option<String>, Broken> {
            on.note(format!("{step:?}"));
            if self.slow {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            if self.fail_at.as_deref() == Some(&format!("{step:?}")) {
                return Err(Broken(format!("{step:?}")));
            }
            context.stage("standing");
            Ok(Some(format!("{step:?}")))
        }

        async fn undo(&self, step: Step, on: &Arc<Host>) -> Result<(), Broken> {
            on.note(format!("undo {step:?}"));
            Ok(())
        }

        fn outcome(&self, facts: Vec<String>, _at: &Snapshot) -> (Changes, usize) {
            (Changes::new(), facts.len())
        }

        fn unwound(&self, _error: Option<&Broken>, _at: &Snapshot) -> Changes {
            Changes::new().release_holder(self.subject().0)
        }
    }

    fn open(dir: &tempfile::TempDir) -> Store {
        Store::open(&dir.path().join("store.db"), Tables::new().with::<Intent>()).expect("opens")
    }

    fn build(name: &str) -> Build {
        Build {
            name: name.into(),
            fail_at: None,
            slow: false,
        }
    }

    #[tokio::test]
    async fn a_finished_operation_leaves_its_claims_and_no_intent() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = open(&dir);
        let host = Arc::new(Host::default());
        let output = Operations::new(store.clone())
            .run(build("a"), Arc::clone(&host))
            .await;
        assert_eq!(output.ok(), Some(2));
        assert_eq!(host.notes(), ["Walls", "Roof"]);
        assert_eq!(store.snapshot().count::<Intent>(), 0);
        assert_eq!(store.snapshot().claim("name/a").as_deref(), Some("house/a"));
    }

    #[tokio::test]
    async fn a_failed_step_undoes_all_and_frees_the_claims() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = open(&dir);
        let host = Arc::new(Host::default());
        let operations = Operations::new(store.clone());
        let failing = Build {
            fail_at: Some("Roof".into()),
            ..build("a")
        };
        let output = operations.run(failing, Arc::clone(&host)).await;
        assert!(matches!(output, Err(OperationError::Domain(error)) if error.0 == "Roof"));
        assert_eq!(host.notes(), ["Walls", "Roof", "undo Roof", "undo Walls"]);
        assert_eq!(store.snapshot().claim("name/a"), None);
        assert!(
            operations.run(build("a"), host).await.is_ok(),
            "the name is free again"
        );
    }

    #[tokio::test]
    async fn equal_requests_join_and_a_standing_result_is_handed_to_every_retry() {
        let dir = tempfile::tempdir().expect("temp dir");
        let operations = Operations::new(open(&dir));
        let host = Arc::new(Host::default());
        let slow = Build {
            slow: true,
            ..build("a")
        };
        let (one, two) = tokio::join!(
            operations.run(slow.clone(), Arc::clone(&host)),
            operations.run(slow.clone(), Arc::clone(&host))
        );
        assert_eq!((one.ok(), two.ok()), (Some(2), Some(2)));
        assert_eq!(host.notes().len(), 2, "it ran once");

        let other = Build {
            slow: true,
            ..build("b")
        };
        let impatient = tokio::time::timeout(
            Duration::from_millis(10),
            operations.run(other.clone(), Arc::clone(&host)),
        );
        assert!(impatient.await.is_err());
        assert_eq!(operations.list().len(), 1, "the work goes on");
        operations.wait_for(&other.subject()).await;
        for _ in 0..2 {
            let again = operations.run(other.clone(), Arc::clone(&host)).await;
            assert_eq!(again.ok(), Some(2));
        }
        let restarted = Operations::new(operations.store.clone());
        let again = restarted.run(other, Arc::clone(&host)).await;
        assert_eq!(again.ok(), Some(2));
        assert_eq!(
            host.notes().len(),
            4,
            "the retries got the result and ran nothing"
        );
    }

    #[tokio::test]
    async fn a_preempting_request_unwinds_the_running_one() {
        let dir = tempfile::tempdir().expect("temp dir");
        let operations = Operations::new(open(&dir));
        let host = Arc::new(Host::default());
        let slow = Build {
            slow: true,
            ..build("a")
        };
        let (first, second) = tokio::join!(operations.run(slow, Arc::clone(&host)), async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            operations.run(build("a"), Arc::clone(&host)).await
        });
        assert!(matches!(first, Err(OperationError::Cancelled { .. })));
        assert!(second.is_ok());
        assert!(host.notes().contains(&"undo Walls".into()));
    }

    #[tokio::test]
    async fn an_interrupted_operation_is_undone_at_the_next_start() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = open(&dir);
        let operation = build("a");
        let intent = Intent {
            id: OperationId::random(),
            name: Build::NAME.into(),
            subject: operation.subject(),
            input: serde_json::to_value(&operation).expect("serializes"),
            started_at: Time::now(),
        };
        store
            .commit(Changes::new().put(intent).claim("name/a", "house/a"))
            .await
            .expect("commits");
        let host = Arc::new(Host::default());
        let operations = Operations::new(store.clone());
        operations.recover::<Build>(&host).await;
        assert_eq!(host.notes(), ["undo Roof", "undo Walls"]);
        assert_eq!(store.snapshot().count::<Intent>(), 0);
        assert_eq!(store.snapshot().claim("name/a"), None);
    }
}
