//! A pull, followed to its end also across a restart of the agent.

use tonic::Streaming;

use crate::{
    Client, Error, Reason, Retry,
    proto::{
        PullImageRequest, PullImageResponse, PullProgress, PulledImage, pull_image_response::Update,
    },
};

/// What a pull tells.
#[derive(Debug, Clone, PartialEq)]
pub enum PullUpdate {
    /// How far it is: a whole picture each time.
    Progress(PullProgress),
    /// It is complete. The last update.
    Done(PulledImage),
}

/// A pull under way; dropping it stops the pull unless somebody else waits for it too.
#[derive(Debug)]
pub struct Pull {
    client: Client,
    request: PullImageRequest,
    stream: Option<Streaming<PullImageResponse>>,
    attempt: u32,
}

impl Client {
    /// Pulls an image; nothing is asked for before [`Pull::next`].
    ///
    /// Pulling is safe to repeat, so a pull goes on after a restart of the agent, from the bytes that
    /// are already there.
    #[must_use]
    pub fn pull(&self, request: PullImageRequest) -> Pull {
        Pull {
            client: self.clone(),
            request,
            stream: None,
            attempt: 1,
        }
    }
}

impl Pull {
    /// The next update; call it until [`PullUpdate::Done`].
    ///
    /// # Errors
    /// What the agent said; [`Error::Unreachable`] if it stays away for longer than
    /// [`Retry::PATIENT`] waits.
    pub async fn next(&mut self) -> Result<PullUpdate, Error> {
        loop {
            match self.step().await {
                Ok(Some(update)) => {
                    self.attempt = 1;
                    return Ok(update);
                }
                Ok(None) => {}
                Err(error) => {
                    self.stream = None;
                    let asked = error.refusal().and_then(|refusal| refusal.retry_after);
                    match Retry::PATIENT.wait_after(self.attempt, asked) {
                        Some(wait) if Self::repeatable(&error) => tokio::time::sleep(wait).await,
                        _ => return Err(error),
                    }
                    self.attempt += 1;
                }
            }
        }
    }

    /// Waits for the end without looking at progress.
    ///
    /// # Errors
    /// As [`Pull::next`].
    pub async fn finish(mut self) -> Result<PulledImage, Error> {
        loop {
            if let PullUpdate::Done(image) = self.next().await? {
                return Ok(image);
            }
        }
    }

    async fn step(&mut self) -> Result<Option<PullUpdate>, Error> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let mut images = self.client.images();
                let opened = self
                    .client
                    .call(images.pull_image(self.request.clone()))
                    .await?;
                self.stream.insert(opened)
            }
        };
        let address = self.client.address();
        let message = stream
            .message()
            .await
            .map_err(|status| Error::from_status(address, status))?
            .ok_or_else(|| Error::Incomplete {
                address: address.clone(),
                expected: "the image was pulled",
            })?;
        Ok(message.update.map(|update| match update {
            Update::Progress(progress) => PullUpdate::Progress(progress),
            Update::Result(image) => PullUpdate::Done(image),
        }))
    }

    /// An agent that is away comes back; that it cannot reach a registry, it has retried itself.
    fn repeatable(error: &Error) -> bool {
        match error {
            Error::Incomplete { .. } | Error::Unreachable { .. } => true,
            Error::Refused(refusal) => {
                matches!(refusal.reason, Some(Reason::Starting | Reason::Draining))
            }
            _ => false,
        }
    }
}
