//! OperationService: running changes of all faces, pulls among them, and what ended a short time ago.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use longshore_proto::longshore::v1::{self as pb, operation_service_server::OperationService};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{
    Native,
    deadline::Deadline,
    error::NativeError,
    page::{Page, oldest_first},
    refused, render,
};
use crate::{
    clock::Time,
    id::{Digest, Face, OperationId},
    image::{Pull, PullRequest, PullStage, RunningPull},
    lifecycle::{container::Container, sandbox::Sandbox},
    operation::{Finished, Intent, Running, Subject},
    service::edge,
    store::Snapshot,
};

/// How long an ended pull is remembered, and how many of them.
const KEPT: Duration = Duration::from_secs(600);
const KEPT_PULLS: usize = 256;
/// How often a pull of another caller is looked at while one waits for it.
const LOOK_EVERY: Duration = Duration::from_millis(100);

const PULL: &str = "pull_image";
/// Operations whose steps can be undone; others can only be finished.
const CANCELLABLE: [&str; 5] = [
    "run_pod_sandbox",
    "create_container",
    "create_system",
    "start_system",
    PULL,
];

/// Pulls that this face began: they can be cancelled, and are remembered.
#[derive(Clone, Default)]
pub(super) struct Pulls(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    running: HashMap<String, CancellationToken>,
    ended: VecDeque<(Instant, pb::Operation)>,
}

/// One caller's part in a pull.
pub(super) struct Ticket {
    pulls: Pulls,
    operation: pb::Operation,
    cancelled: CancellationToken,
}

impl Ticket {
    /// Waits until the pull is cancelled.
    pub(super) async fn ended(&self) {
        self.cancelled.cancelled().await;
    }

    /// What a caller of a cancelled pull is told.
    pub(super) fn status(&self) -> Status {
        let id = self.operation.id.clone();
        refused(NativeError::Cancelled { id })
    }

    /// Remembers how it ended.
    pub(super) fn finish(&self, error: Option<&Status>) {
        let mut operation = self.operation.clone();
        operation.stage = String::new();
        operation.stage_since = Some(render::timestamp(Time::now()));
        operation.set_state(match error {
            None => pb::OperationState::Succeeded,
            Some(_) => pb::OperationState::Failed,
        });
        operation.error = error
            .map(|error| error.message().to_owned())
            .unwrap_or_default();
        let mut table = self.pulls.lock();
        table.running.remove(&operation.id);
        // All who joined come here.
        if table
            .ended
            .iter()
            .any(|(_, ended)| ended.id == operation.id)
        {
            return;
        }
        if table.ended.len() >= KEPT_PULLS {
            table.ended.pop_front();
        }
        table.ended.push_back((Instant::now(), operation));
    }
}

impl Pulls {
    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().expect("no panic while this lock is held")
    }

    fn ticket(&self, operation: pb::Operation) -> Ticket {
        let mut table = self.lock();
        // A pull whose callers all left has ended without telling.
        table.running.retain(|_, token| !token.is_cancelled());
        let token = table.running.entry(operation.id.clone()).or_default();
        Ticket {
            pulls: self.clone(),
            cancelled: token.clone(),
            operation,
        }
    }

    fn ended(&self) -> Vec<pb::Operation> {
        let mut table = self.lock();
        while table
            .ended
            .front()
            .is_some_and(|(at, _)| at.elapsed() >= KEPT)
        {
            table.ended.pop_front();
        }
        table
            .ended
            .iter()
            .map(|(_, operation)| operation.clone())
            .collect()
    }

    fn cancel(&self, id: &str) -> bool {
        let token = self.lock().running.get(id).cloned();
        if let Some(token) = &token {
            token.cancel();
        }
        token.is_some()
    }

    /// Forgets the tokens of pulls that run no more.
    fn forget_all_but(&self, running: &[RunningPull]) {
        let ids: Vec<String> = running.iter().map(pull_id).collect();
        self.lock().running.retain(|id, _| ids.contains(id));
    }
}

impl Native {
    /// Begins or joins a pull of this face.
    pub(super) fn begin_pull(&self, request: PullRequest) -> (Pull, Ticket) {
        let (reference, platform) = (request.reference.clone(), request.platform.clone());
        let pull = self.agent.images.pull(request);
        let running = self.agent.images.running_pulls();
        self.pulls.forget_all_but(&running);
        let ours = running
            .into_iter()
            .rfind(|one| {
                one.face == Face::Native && one.reference == reference && one.platform == platform
            })
            .unwrap_or_else(|| RunningPull {
                reference,
                platform,
                face: Face::Native,
                started_at: Time::now(),
                progress: pull.progress().borrow().clone(),
            });
        (pull, self.pulls.ticket(running_pull(&ours)))
    }

    /// Everything that runs, or ended a short time ago.
    fn operations(&self) -> Vec<pb::Operation> {
        let at = self.agent.store.snapshot();
        let running = self.agent.operations.list();
        let mut all: Vec<_> = running
            .iter()
            .map(|running| operation(&at, running))
            .collect();
        all.extend(self.agent.images.running_pulls().iter().map(running_pull));
        all.extend(
            self.agent
                .operations
                .finished()
                .iter()
                .map(|finished| self::finished(&at, finished)),
        );
        all.extend(self.pulls.ended());
        all
    }

    fn operation(&self, id: &str) -> Result<pb::Operation, Status> {
        edge::required("operation_id", id).map_err(refused)?;
        self.operations()
            .into_iter()
            .find(|operation| operation.id == id)
            .ok_or_else(|| {
                let id = id.chars().take(128).collect();
                refused(NativeError::NoOperation { id })
            })
    }

    /// What the operation about `subject` is doing, and since when.
    pub(super) fn stage_of(&self, subject: &str) -> Option<(String, Time)> {
        if subject.is_empty() {
            return None;
        }
        let at = self.agent.store.snapshot();
        let running = self.agent.operations.list();
        running
            .into_iter()
            .find(|running| {
                running.subject.0.contains(subject)
                    || operation(&at, running).subject.contains(subject)
            })
            .map(|running| {
                (
                    format!("{}: {}", running.name, running.stage.name),
                    running.stage.since,
                )
            })
    }

    /// Waits until the operation has ended.
    async fn ended_operation(&self, id: &str) -> Result<pb::Operation, Status> {
        loop {
            let operation = self.operation(id)?;
            if is_ended(&operation) {
                return Ok(operation);
            }
            match id.parse::<OperationId>() {
                Ok(id) if operation.name != PULL => self.agent.operations.wait(&id).await,
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    async fn cancel(
        self,
        request: pb::CancelOperationRequest,
    ) -> Result<pb::CancelOperationResponse, Status> {
        let operation = self.operation(&request.operation_id)?;
        let not_cancellable = || {
            refused(NativeError::NotCancellable {
                id: operation.id.clone(),
                name: operation.name.clone(),
            })
        };
        if !is_ended(&operation) {
            if !CANCELLABLE.contains(&operation.name.as_str()) {
                return Err(not_cancellable());
            }
            let cancelled = match operation.id.parse::<OperationId>() {
                Ok(id) if operation.name != PULL => self.agent.operations.cancel(&id),
                // A pull of CRI belongs to its caller alone.
                _ => self.pulls.cancel(&operation.id),
            };
            // It may have ended just now, which is as good.
            if !cancelled
                && self
                    .operation(&operation.id)
                    .is_ok_and(|now| !is_ended(&now))
            {
                return Err(not_cancellable());
            }
        }
        Ok(pb::CancelOperationResponse {
            operation: Some(self.operation(&operation.id).unwrap_or(operation)),
        })
    }
}

fn is_ended(operation: &pb::Operation) -> bool {
    matches!(
        operation.state(),
        pb::OperationState::Succeeded | pb::OperationState::Failed
    )
}

/// A running operation.
fn operation(at: &Snapshot, running: &Running) -> pb::Operation {
    let intent = at.get::<Intent>(running.id.as_str());
    let input = intent.as_ref().map(|intent| &intent.input);
    let subject = subject(running.name, &running.subject, input);
    let state = if running.stage.name.starts_with("unwind") {
        pb::OperationState::Unwinding
    } else {
        pb::OperationState::Running
    };
    pb::Operation {
        id: running.id.to_string(),
        name: running.name.to_owned(),
        face: render::face(face(at, &subject, input)).into(),
        subject,
        stage: running.stage.name.clone(),
        stage_since: Some(render::timestamp(running.stage.since)),
        started_at: Some(render::timestamp(running.started_at)),
        state: state.into(),
        error: String::new(),
    }
}

/// An operation that ended.
fn finished(at: &Snapshot, finished: &Finished) -> pb::Operation {
    let subject = subject(finished.name, &finished.subject, Some(&finished.input));
    let state = match finished.error {
        None => pb::OperationState::Succeeded,
        Some(_) => pb::OperationState::Failed,
    };
    pb::Operation {
        id: finished.id.to_string(),
        name: finished.name.to_owned(),
        face: render::face(face(at, &subject, Some(&finished.input))).into(),
        subject,
        stage: String::new(),
        stage_since: Some(render::timestamp(finished.ended_at)),
        started_at: Some(render::timestamp(finished.started_at)),
        state: state.into(),
        error: finished.error.clone().unwrap_or_default(),
    }
}

/// Creates hold a name, since their id is new; their input knows it.
fn subject(name: &str, held: &Subject, input: Option<&serde_json::Value>) -> String {
    let kind = match name {
        "run_pod_sandbox" => "sandbox",
        "create_container" => "container",
        "create_system" => "system",
        _ => return held.to_string(),
    };
    let id = input.and_then(|input| input.get("id")?.as_str());
    id.map_or_else(|| held.to_string(), |id| format!("{kind}/{id}"))
}

/// Whose object it is about.
fn face(at: &Snapshot, subject: &str, input: Option<&serde_json::Value>) -> Face {
    let wished = input
        .and_then(|input| input.get("config")?.get("face").cloned())
        .and_then(|face| serde_json::from_value(face).ok());
    wished
        .or_else(|| match subject.split_once('/')? {
            ("sandbox", id) => at.get::<Sandbox>(id).map(|sandbox| sandbox.config.face),
            ("container", id) => at
                .get::<Container>(id)
                .map(|container| container.config.face),
            _ => None,
        })
        .unwrap_or(Face::Native)
}

/// A pull as an operation.
fn running_pull(pull: &RunningPull) -> pb::Operation {
    let stage = match pull.progress.stage {
        PullStage::Resolving => "resolve",
        PullStage::Fetching => "fetch",
        PullStage::Committing => "commit",
        PullStage::Done => "done",
    };
    pb::Operation {
        id: pull_id(pull),
        name: PULL.to_owned(),
        subject: format!("image/{}", pull.reference),
        stage: stage.to_owned(),
        stage_since: Some(render::timestamp(pull.progress.since)),
        started_at: Some(render::timestamp(pull.started_at)),
        state: pb::OperationState::Running.into(),
        face: render::face(pull.face).into(),
        error: String::new(),
    }
}

/// Pulls have no id of their own: this one is the same as long as the pull runs.
fn pull_id(pull: &RunningPull) -> String {
    let what = format!(
        "{}\n{}\n{:?}\n{}",
        pull.reference,
        pull.platform,
        pull.face,
        pull.started_at.unix_ns()
    );
    Digest::of(what.as_bytes()).hex()[..32].to_owned()
}

fn started_at(operation: &pb::Operation) -> Time {
    let at = operation.started_at.unwrap_or_default();
    Time::from_unix_ns(
        at.seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(at.nanos.into()),
    )
}

#[tonic::async_trait]
impl OperationService for Native {
    async fn list_operations(
        &self,
        request: Request<pb::ListOperationsRequest>,
    ) -> Result<Response<pb::ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let page =
            Page::new("operations", request.page_size, &request.page_token).map_err(refused)?;
        edge::text("subject", &request.subject, 1024).map_err(refused)?;
        let found = self
            .operations()
            .into_iter()
            .filter(|operation| request.subject.is_empty() || operation.subject == request.subject);
        let (operations, next_page_token) =
            page.cut(found, |one| oldest_first(started_at(one), &one.id));
        Ok(Response::new(pb::ListOperationsResponse {
            operations,
            next_page_token,
        }))
    }

    async fn get_operation(
        &self,
        request: Request<pb::GetOperationRequest>,
    ) -> Result<Response<pb::GetOperationResponse>, Status> {
        let operation = self.operation(&request.into_inner().operation_id)?;
        Ok(Response::new(pb::GetOperationResponse {
            operation: Some(operation),
        }))
    }

    async fn wait_operation(
        &self,
        request: Request<pb::WaitOperationRequest>,
    ) -> Result<Response<pb::WaitOperationResponse>, Status> {
        let deadline = Deadline::of(request.metadata());
        let id = request.into_inner().operation_id;
        let began = Time::now();
        let stage = || match self.operation(&id) {
            Ok(operation) => {
                let since = operation.stage_since.unwrap_or_default();
                let ns = since
                    .seconds
                    .saturating_mul(1_000_000_000)
                    .saturating_add(since.nanos.into());
                (
                    format!("{}: {}", operation.name, operation.stage),
                    Time::from_unix_ns(ns),
                )
            }
            Err(_) => ("wait for the operation".to_owned(), began),
        };
        let operation = deadline.limit(stage, self.ended_operation(&id)).await?;
        Ok(Response::new(pb::WaitOperationResponse {
            operation: Some(operation),
        }))
    }

    async fn cancel_operation(
        &self,
        request: Request<pb::CancelOperationRequest>,
    ) -> Result<Response<pb::CancelOperationResponse>, Status> {
        self.change("CancelOperation", request, Self::cancel).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pull(at: i64) -> pb::Operation {
        pb::Operation {
            id: at.to_string(),
            started_at: Some(render::timestamp(Time::from_unix_ns(at))),
            ..Default::default()
        }
    }

    #[test]
    fn an_ended_pull_is_remembered_once_and_not_for_ever() {
        let pulls = Pulls::default();
        let (one, two) = (pulls.ticket(pull(1)), pulls.ticket(pull(1)));
        one.finish(None);
        two.finish(Some(&Status::aborted("later")));
        let ended = pulls.ended();
        assert_eq!(ended.len(), 1);
        assert_eq!(ended[0].state(), pb::OperationState::Succeeded);
        for number in 0..300 {
            pulls.ticket(pull(number)).finish(None);
        }
        assert_eq!(pulls.ended().len(), KEPT_PULLS);
    }

    #[tokio::test]
    async fn cancelling_ends_every_caller_of_a_pull() {
        let pulls = Pulls::default();
        let (one, two) = (pulls.ticket(pull(1)), pulls.ticket(pull(1)));
        assert!(pulls.cancel("1") && !pulls.cancel("2"));
        tokio::join!(one.ended(), two.ended());
        assert_eq!(one.status().code(), tonic::Code::Cancelled);
    }

    #[test]
    fn creates_are_about_their_new_object() {
        let held = Subject("sandbox-name/[1]".into());
        let known = serde_json::json!({ "id": "ab" });
        for (name, input, expected) in [
            ("run_pod_sandbox", Some(&known), "sandbox/ab"),
            ("create_container", Some(&known), "container/ab"),
            ("run_pod_sandbox", None, "sandbox-name/[1]"),
            ("stop_pod_sandbox", Some(&known), "sandbox-name/[1]"),
        ] {
            assert_eq!(subject(name, &held, input), expected, "{name}");
        }
    }
}
