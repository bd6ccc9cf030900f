//! `longshore.v1`: one short method per RPC: parse, call, render.
//!
//! ```text
//!  lifecycle  system  image  network  node  operation  event      one file per service
//!       |         \____________|__________/
//!  parse (messages -> wishes)  render (records -> messages)
//!  idempotency + deadline: around every change
//!  dialogue: Exec and Attach   stats: what Stats sends again and again   page: lists in parts
//! ```
//! This face sees everything, also what CRI made, and says whose it is.

mod deadline;
mod dialogue;
mod error;
mod event;
mod idempotency;
mod image;
mod lifecycle;
mod logs;
mod network;
mod node;
mod operation;
mod page;
mod parse;
mod render;
mod stats;
mod system;

use std::{future::Future, pin::Pin, sync::Arc};

use futures_util::Stream;
use prost::Message;
use tonic::{Request, Response, Status};

use self::{deadline::Deadline, idempotency::Change, idempotency::Idempotency, operation::Pulls};
use crate::{
    agent::Agent,
    clock::Time,
    id::Face,
    lifecycle::{Lifecycle, LifecycleError, container::Container, sandbox::Sandbox},
    service::{edge, status::ToStatus},
};

/// What the streaming RPCs return.
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The seven services of `longshore.v1` over one agent.
#[derive(Clone)]
pub(super) struct Native {
    agent: Arc<Agent>,
    idempotency: Idempotency,
    pulls: Pulls,
    started_at: Time,
}

impl Native {
    /// Serves this agent.
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self {
            agent,
            idempotency: Idempotency::default(),
            pulls: Pulls::default(),
            started_at: Time::now(),
        }
    }

    fn lifecycle(&self) -> &Arc<Lifecycle> {
        &self.agent.lifecycle
    }

    fn sandbox(&self, field: &str, id: &str) -> Result<Arc<Sandbox>, Status> {
        edge::id(field, id).map_err(refused)?;
        let at = self.agent.store.snapshot();
        self.lifecycle()
            .find_sandbox(&at, Face::Native, id)
            .map_err(refused)
    }

    fn container(&self, field: &str, id: &str) -> Result<Arc<Container>, Status> {
        edge::id(field, id).map_err(refused)?;
        let at = self.agent.store.snapshot();
        self.lifecycle()
            .find_container(&at, Face::Native, id)
            .map_err(refused)
    }

    /// One change: within the caller's deadline, and once however often it is repeated with a key.
    ///
    /// The work itself goes on when the deadline passes, unless it leaves nothing behind.
    async fn change<Q, A, W>(
        &self,
        method: &'static str,
        request: Request<Q>,
        work: impl FnOnce(Self, Q) -> W + Send,
    ) -> Result<Response<A>, Status>
    where
        Q: Change,
        A: Message + Default,
        W: Future<Output = Result<A, Status>> + Send + 'static,
    {
        let deadline = Deadline::of(request.metadata());
        let request = request.into_inner();
        idempotency::check_key(request.key()).map_err(refused)?;
        let (key, subject) = (request.key().to_owned(), request.subject().to_owned());
        let content = if key.is_empty() {
            None
        } else {
            Some(request.content())
        };
        let work = work(self.clone(), request);
        let answer = deadline.limit(
            || {
                self.stage_of(&subject)
                    .unwrap_or_else(|| (method.to_owned(), Time::now()))
            },
            async {
                match content {
                    None => work.await,
                    Some(content) => self.idempotency.once(method, &key, content, work).await,
                }
            },
        );
        answer.await.map(Response::new)
    }
}

fn refused(error: impl ToStatus) -> Status {
    error.to_status()
}

/// The object, or none if it is not there.
fn if_found<T>(found: Result<T, LifecycleError>) -> Result<Option<T>, LifecycleError> {
    match found {
        Ok(object) => Ok(Some(object)),
        Err(LifecycleError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
