//! EventService.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use futures_util::stream;
use longshore_proto::longshore::v1::{self as pb, event_service_server::EventService};
use tonic::{Request, Response, Status};

use super::{Native, Streamed, parse, refused, render};
use crate::{
    event::{Cursor, Event, EventDraft, EventKind, Watch},
    lifecycle::{container::Container, sandbox::Sandbox},
    service::{edge, status::ToStatus as _},
    store::{Snapshot, Store},
};

/// Hidden events after which the cursor is moved all the same.
const HIDDEN: u32 = 1000;
/// Time after which it is.
const QUIET: Duration = Duration::from_secs(30);

/// Which events a watcher wants.
struct Filter {
    kinds: Vec<pb::EventKind>,
    sandbox_id: String,
    container_id: String,
    labels: HashMap<String, String>,
    /// Sandboxes and containers with these labels: the last event of each comes when its record has
    /// gone.
    labelled: HashSet<String>,
}

impl Filter {
    fn new(request: pb::WatchRequest, at: &Snapshot) -> Result<Self, Status> {
        for (field, id) in [
            ("sandbox_id", &request.sandbox_id),
            ("container_id", &request.container_id),
        ] {
            edge::text(field, id, 128).map_err(refused)?;
        }
        let mut filter = Self {
            kinds: parse::event_kinds(&request.kinds).map_err(refused)?,
            sandbox_id: request.sandbox_id,
            container_id: request.container_id,
            labels: request.label_selector,
            labelled: HashSet::new(),
        };
        if !filter.labels.is_empty() {
            let sandboxes = at
                .all::<Sandbox>()
                .filter(|sandbox| parse::labels_match(&filter.labels, &sandbox.config.labels))
                .map(|sandbox| sandbox.id.to_string());
            let containers = at
                .all::<Container>()
                .filter(|container| parse::labels_match(&filter.labels, &container.config.labels))
                .map(|container| container.id.to_string());
            filter.labelled = sandboxes.chain(containers).collect();
        }
        Ok(filter)
    }

    /// The event as this watcher sees it, if it does.
    fn pass(&mut self, event: &Event, store: &Store) -> Option<pb::Event> {
        let what = &event.what;
        let shown = render::event(event)?;
        let labelled = self.labels.is_empty() || self.is_labelled(what, store);
        let wanted = labelled
            && (self.kinds.is_empty() || self.kinds.contains(&shown.kind()))
            && (self.sandbox_id.is_empty() || self.sandbox_id == shown.sandbox_id)
            && (self.container_id.is_empty() || self.container_id == shown.container_id);
        wanted.then(|| with_names(shown, &store.snapshot()))
    }

    fn is_labelled(&mut self, what: &EventDraft, store: &Store) -> bool {
        let at = store.snapshot();
        let (id, labels) = match (&what.container_id, &what.sandbox_id) {
            (Some(id), _) => {
                let record = at.get::<Container>(id.as_str());
                (
                    id.to_string(),
                    record.map(|container| container.config.labels.clone()),
                )
            }
            (None, Some(id)) => {
                let record = at.get::<Sandbox>(id.as_str());
                (
                    id.to_string(),
                    record.map(|sandbox| sandbox.config.labels.clone()),
                )
            }
            (None, None) => return false,
        };
        if labels.is_some_and(|labels| parse::labels_match(&self.labels, &labels)) {
            self.labelled.insert(id.clone());
        }
        match what.kind {
            EventKind::SandboxRemoved | EventKind::ContainerRemoved => self.labelled.remove(&id),
            _ => self.labelled.contains(&id),
        }
    }
}

/// A created container with its name and image, while its record is there.
fn with_names(mut event: pb::Event, at: &Snapshot) -> pb::Event {
    if event.kind() == pb::EventKind::ContainerCreated
        && let Some(container) = at.get::<Container>(&event.container_id)
    {
        let shown = render::container(&container);
        event.attributes.insert("name".to_owned(), shown.name);
        event.attributes.insert("image".to_owned(), shown.image);
    }
    event
}

struct Watching {
    store: Store,
    watch: Watch,
    filter: Filter,
    /// The last event that was sent or hidden.
    at: Cursor,
    hidden: u32,
    /// Where a watch of the past ends.
    until: Option<Cursor>,
    /// Messages to send before anything is read.
    ready: VecDeque<pb::WatchResponse>,
}

impl Watching {
    /// The next message; none at the end.
    async fn next(&mut self) -> Result<Option<pb::WatchResponse>, Status> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Ok(Some(message));
            }
            if self.until.is_some_and(|until| self.at >= until) {
                return Ok(None);
            }
            // Nothing is lost when the wait is dropped.
            let Ok(event) = tokio::time::timeout(QUIET, self.watch.next()).await else {
                self.moved();
                continue;
            };
            let event = event.map_err(|error| error.to_status())?;
            self.at = event.cursor;
            match self.filter.pass(&event, &self.store) {
                Some(event) => {
                    self.hidden = 0;
                    self.ready.push_back(pb::WatchResponse {
                        cursor: event.cursor,
                        event: Some(event),
                    });
                }
                None => {
                    self.hidden += 1;
                    let ends = self.until.is_some_and(|until| self.at >= until);
                    if self.hidden >= HIDDEN || ends {
                        self.moved();
                    }
                }
            }
        }
    }

    /// Tells the place if events were hidden since the last message.
    fn moved(&mut self) {
        if self.hidden > 0 {
            self.hidden = 0;
            self.ready.push_back(pb::WatchResponse {
                event: None,
                cursor: Some(render::cursor(self.at)),
            });
        }
    }
}

#[tonic::async_trait]
impl EventService for Native {
    type WatchStream = Streamed<pb::WatchResponse>;

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let newest = self.agent.events.newest();
        let from = request.cursor.map_or(newest, |cursor| Cursor {
            epoch: cursor.epoch,
            number: cursor.number,
        });
        let until = request.past_only.then_some(newest);
        let filter = Filter::new(request, &self.agent.store.snapshot())?;
        let watching = Watching {
            store: self.agent.store.clone(),
            watch: self.agent.events.watch(Some(from)).map_err(refused)?,
            filter,
            at: from,
            hidden: 0,
            until,
            ready: VecDeque::from([pb::WatchResponse {
                event: None,
                cursor: Some(render::cursor(from)),
            }]),
        };
        Ok(Response::new(Box::pin(stream::unfold(
            Some(watching),
            |state| async {
                let mut watching = state?;
                match watching.next().await {
                    Ok(Some(message)) => Some((Ok(message), Some(watching))),
                    Ok(None) => None,
                    Err(status) => Some((Err(status), None)),
                }
            },
        ))))
    }
}
