//! What a client sees while its agent is away, dies in the middle, and comes back.
//!
//! The other side is a small server of the same services on a real unix socket. It runs on a runtime
//! of its own; shutting that down cuts every connection, as SIGKILL does.

use std::{
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{Stream, StreamExt as _, stream};
use longshore_client::{
    Address, Client, Error, Reason, Retry,
    proto::{
        CheckRequest, CheckResponse, Cursor, Event, FsckRequest, FsckResponse, InfoRequest,
        InfoResponse, UsageRequest, UsageResponse, WatchRequest, WatchResponse,
        event_service_server::{EventService, EventServiceServer},
        node_service_server::{NodeService, NodeServiceServer},
    },
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status, transport::Server};
use tonic_types::{ErrorDetails, StatusExt as _};

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves numbered events without end, of which each connection gets only so many.
#[derive(Debug, Clone)]
struct Agent {
    per_watch: usize,
    asked: Arc<Mutex<Vec<Option<Cursor>>>>,
    oldest: u64,
}

#[tonic::async_trait]
impl EventService for Agent {
    type WatchStream = Streamed<WatchResponse>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let asked = request.into_inner().cursor;
        self.asked.lock().expect("not poisoned").push(asked);
        let after = asked.map_or(0, |cursor| cursor.number);
        if after < self.oldest {
            let mut details = ErrorDetails::new();
            details.set_error_info("CURSOR_EXPIRED", "longshore", []);
            return Err(Status::with_error_details(
                Code::OutOfRange,
                "too old",
                details,
            ));
        }
        let cursor = |number| Some(Cursor { epoch: 1, number });
        let start = WatchResponse {
            event: None,
            cursor: cursor(after),
        };
        let events = (after + 1..)
            .take(self.per_watch)
            .map(move |number| WatchResponse {
                event: Some(Event {
                    cursor: cursor(number),
                    ..Default::default()
                }),
                cursor: cursor(number),
            });
        let all = stream::iter(std::iter::once(start).chain(events).map(Ok));
        Ok(Response::new(all.chain(stream::pending()).boxed()))
    }
}

#[tonic::async_trait]
impl NodeService for Agent {
    type FsckStream = Streamed<FsckResponse>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            // More than tonic takes by default, less than we allow.
            os_name: "x".repeat(5 << 20),
            ..Default::default()
        }))
    }

    async fn check(&self, _: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        Err(Status::unavailable("draining"))
    }

    async fn usage(&self, _: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn fsck(&self, _: Request<FsckRequest>) -> Result<Response<Self::FsckStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

struct Running(Option<tokio::runtime::Runtime>);

impl Running {
    fn start(socket: &Path, agent: &Agent) -> Self {
        let _ = std::fs::remove_file(socket);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(socket).expect("a free path")
        };
        let node = NodeServiceServer::new(agent.clone()).max_encoding_message_size(16 << 20);
        runtime.spawn(
            Server::builder()
                .add_service(EventServiceServer::new(agent.clone()))
                .add_service(node)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        Self(Some(runtime))
    }

    fn kill(mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

struct Place {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    address: Address,
}

fn place() -> Place {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("agent.sock");
    Place {
        address: Address::Unix(socket.clone()),
        socket,
        _directory: directory,
    }
}

fn agent(per_watch: usize) -> Agent {
    Agent {
        per_watch,
        asked: Arc::default(),
        oldest: 0,
    }
}

async fn number(watch: &mut longshore_client::Watch) -> u64 {
    let event = watch.next().await.expect("an event").expect("no end");
    event.cursor.expect("numbered").number
}

#[tokio::test]
async fn a_watch_reads_on_without_gap_or_repetition_after_the_agent_was_killed() {
    let place = place();
    let agent = agent(3);
    let first = Running::start(&place.socket, &agent);
    let client = Client::connect(&place.address).await.expect("it is there");
    let mut watch = client.watch(WatchRequest::default());
    for expected in 1..=3 {
        assert_eq!(number(&mut watch).await, expected);
    }
    first.kill();
    let _second = Running::start(&place.socket, &agent);
    for expected in 4..=6 {
        assert_eq!(number(&mut watch).await, expected);
    }
    assert_eq!(
        watch.cursor(),
        Some(Cursor {
            epoch: 1,
            number: 6
        })
    );
    let asked = agent.asked.lock().expect("not poisoned").clone();
    assert_eq!(asked.first(), Some(&None));
    assert_eq!(
        asked.last(),
        Some(&Some(Cursor {
            epoch: 1,
            number: 3
        }))
    );
}

#[tokio::test]
async fn an_expired_cursor_ends_a_watch_instead_of_hiding_a_gap() {
    let place = place();
    let agent = Agent {
        oldest: 10,
        ..agent(3)
    };
    let _running = Running::start(&place.socket, &agent);
    let mut watch = Client::lazy(&place.address).watch(WatchRequest {
        cursor: Some(Cursor {
            epoch: 1,
            number: 4,
        }),
        ..Default::default()
    });
    let error = watch.next().await.expect_err("too old");
    assert_eq!(error.reason(), Some(Reason::CursorExpired));
}

#[tokio::test]
async fn a_safe_call_outlives_an_agent_that_starts_late_and_takes_large_answers() {
    let place = place();
    let client = Client::lazy(&place.address).with_retry(Retry::PATIENT);
    let asking = tokio::spawn(async move {
        client
            .repeat(InfoRequest {}, |client, request| async move {
                client.node().info(request).await
            })
            .await
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let _running = Running::start(&place.socket, &agent(0));
    let info = asking.await.expect("no panic").expect("an answer");
    assert_eq!(info.os_name.len(), 5 << 20);
}

#[tokio::test]
async fn an_agent_that_is_not_there_is_unreachable_with_the_systems_reason() {
    let place = place();
    let error = Client::connect(&place.address).await.expect_err("no agent");
    let Error::Unreachable { kind, problem, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*kind, Some(std::io::ErrorKind::NotFound));
    assert!(problem.contains("No such file"), "{problem}");

    let client = Client::lazy(&place.address).with_retry(Retry::NEVER);
    let error = client
        .repeat(InfoRequest {}, |client, request| async move {
            client.node().info(request).await
        })
        .await
        .expect_err("no agent");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn a_refusal_is_not_taken_for_a_broken_connection() {
    let place = place();
    let _running = Running::start(&place.socket, &agent(0));
    let client = Client::connect(&place.address).await.expect("it is there");
    let client = client.with_retry(Retry::NEVER);
    let error = client
        .repeat(CheckRequest {}, |client, request| async move {
            client.node().check(request).await
        })
        .await
        .expect_err("it drains");
    assert!(error.is_unavailable());
    assert_eq!(error.refusal().expect("it answered").message, "draining");
}

#[tokio::test]
async fn a_stream_that_is_cut_off_is_unreachable_not_refused() {
    let place = place();
    let running = Running::start(&place.socket, &agent(1));
    let client = Client::connect(&place.address).await.expect("it is there");
    let mut watch = client
        .watch(WatchRequest::default())
        .with_retry(Retry::NEVER);
    assert_eq!(number(&mut watch).await, 1);
    running.kill();
    let error = watch.next().await.expect_err("it is dead");
    assert!(
        matches!(error, Error::Unreachable { .. } | Error::Incomplete { .. }),
        "{error:?}"
    );
}
