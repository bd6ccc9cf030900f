//! CRI `runtime.v1`: one short method per RPC: parse, call, render.

mod events;
mod filter;
mod image;
mod json;
mod metrics;
mod parse;
mod render;
mod runtime;
mod signal;

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, stream};
use longshore_proto::cri::v1 as cri;
use tonic::Status;

use crate::{agent::Agent, id::SandboxId, store::Snapshot};

/// CRI's two services over one agent.
#[derive(Clone)]
pub(super) struct Cri {
    agent: Arc<Agent>,
}

impl Cri {
    /// Serves this agent.
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// Statuses of a pod's containers, the newest first: of several with one name, kubelet takes the
    /// first for the one that counts.
    fn statuses_of(&self, at: &Snapshot, sandbox: &SandboxId) -> Vec<cri::ContainerStatus> {
        let mut containers = self.agent.lifecycle.containers_of(at, sandbox);
        containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
        containers
            .iter()
            .map(|container| render::container_status(container))
            .collect()
    }
}

/// What the streaming RPCs return.
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items in one message of a streamed list: far below the client's 16 MiB.
const CHUNK: usize = 1000;

/// A list as messages of at most [`CHUNK`] items; an empty list is no message.
fn chunks<T, M>(items: Vec<T>, message: impl Fn(Vec<T>) -> M + Send + 'static) -> Streamed<M>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let mut messages = Vec::new();
    let mut rest = items.into_iter();
    loop {
        let chunk: Vec<T> = rest.by_ref().take(CHUNK).collect();
        if chunk.is_empty() {
            break;
        }
        messages.push(Ok(message(chunk)));
    }
    Box::pin(stream::iter(messages))
}
