//! Events, without a gap across reconnects.
//!
//! ```text
//!  Watch --cursor--> agent --event, cursor--> Watch   (the agent restarts)
//!        --last cursor seen--> agent --next event...
//! ```

use futures_util::stream::{self, Stream};
use tonic::Streaming;

use crate::{
    Client, Error, Reason, Retry,
    proto::{Cursor, Event, WatchRequest, WatchResponse},
};

/// A watch of an agent's events that survives restarts of either side.
///
/// Keep [`Watch::cursor`] somewhere durable and start the next watch with it: nothing is missed and
/// nothing comes twice.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    request: WatchRequest,
    stream: Option<Streaming<WatchResponse>>,
    retry: Retry,
    attempt: u32,
}

impl Client {
    /// Watches events; nothing is asked for before [`Watch::next`].
    #[must_use]
    pub fn watch(&self, request: WatchRequest) -> Watch {
        Watch {
            client: self.clone(),
            request,
            stream: None,
            retry: Retry::PATIENT,
            attempt: 1,
        }
    }
}

impl Watch {
    /// The same watch with another patience for an agent that is away.
    #[must_use]
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// The place after the last event that was handed out: where a later watch goes on.
    ///
    /// `None` until the agent has answered, if the watch did not start from a cursor.
    #[must_use]
    pub fn cursor(&self) -> Option<Cursor> {
        self.request.cursor
    }

    /// Waits for the next event; `None` only after the last one of a watch with `past_only`.
    ///
    /// # Errors
    /// A refusal with [`Reason::CursorExpired`] when events after the cursor are no longer there: a
    /// gap is never passed over silently. [`Error::Unreachable`] when the agent stays away.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            let error = match self.step().await {
                Ok(Some(message)) => {
                    self.attempt = 1;
                    self.request.cursor = message.cursor.or(self.request.cursor);
                    match message.event {
                        Some(event) => {
                            self.request.cursor = event.cursor.or(self.request.cursor);
                            return Ok(Some(event));
                        }
                        None => continue,
                    }
                }
                Ok(None) if self.request.past_only => return Ok(None),
                Ok(None) => Error::Incomplete {
                    address: self.client.address().clone(),
                    expected: "the watch was over",
                },
                Err(error) => error,
            };
            self.stream = None;
            let passing = matches!(error, Error::Incomplete { .. })
                || error.is_unavailable()
                || error.reason() == Some(Reason::Draining);
            let asked = error.refusal().and_then(|refusal| refusal.retry_after);
            match self.retry.wait_after(self.attempt, asked) {
                Some(wait) if passing => tokio::time::sleep(wait).await,
                _ => return Err(error),
            }
            self.attempt += 1;
        }
    }

    /// The events as a stream; it ends after the first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Event, Error>> {
        stream::unfold(Some(self), |watch| async move {
            let mut watch = watch?;
            match watch.next().await {
                Ok(Some(event)) => Some((Ok(event), Some(watch))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn step(&mut self) -> Result<Option<WatchResponse>, Error> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let mut events = self.client.events();
                let opened = self.client.call(events.watch(self.request.clone())).await?;
                self.stream.insert(opened)
            }
        };
        stream
            .message()
            .await
            .map_err(|status| Error::from_status(self.client.address(), status))
    }
}
