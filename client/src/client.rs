//! One connection to one agent, and the services on it.

use std::{future::Future, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;
use uuid::Uuid;

use crate::{
    Address, Error, Retry,
    proto::{
        event_service_client::EventServiceClient, image_service_client::ImageServiceClient,
        lifecycle_service_client::LifecycleServiceClient,
        network_service_client::NetworkServiceClient, node_service_client::NodeServiceClient,
        operation_service_client::OperationServiceClient,
        system_service_client::SystemServiceClient,
    },
};

/// The largest message in either direction, in bytes: what kubelet allows, and the agent too.
pub const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// How long connecting may take; a unix socket answers at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a silent TCP connection is probed: a dead node is noticed while a stream is quiet.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// A connection to one agent; clones share it, and it comes back by itself after a break.
#[derive(Debug, Clone)]
pub struct Client {
    address: Address,
    channel: Channel,
    retry: Retry,
}

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident: $service:ident,)*) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> $service<Channel> {
            $service::new(self.channel.clone())
                .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
                .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
        })*
    };
}

impl Client {
    /// Connects, so that an agent which is not there is known at once.
    ///
    /// # Errors
    /// [`Error::Unreachable`] with what the operating system said.
    pub async fn connect(address: &Address) -> Result<Self, Error> {
        let endpoint = endpoint(address);
        let channel = match address {
            Address::Unix(_) => endpoint.connect_with_connector(dial_unix(address)).await,
            Address::Tcp(_) => endpoint.connect().await,
        };
        let channel = channel.map_err(|error| Error::unreachable(address, &error))?;
        Ok(Self::over(address, channel))
    }

    /// A client that connects when it is first used.
    ///
    /// Needs a running tokio runtime.
    #[must_use]
    pub fn lazy(address: &Address) -> Self {
        let endpoint = endpoint(address);
        let channel = match address {
            Address::Unix(_) => endpoint.connect_with_connector_lazy(dial_unix(address)),
            Address::Tcp(_) => endpoint.connect_lazy(),
        };
        Self::over(address, channel)
    }

    fn over(address: &Address, channel: Channel) -> Self {
        Self {
            address: address.clone(),
            channel,
            retry: Retry::default(),
        }
    }

    /// The same connection with another patience for safe calls.
    #[must_use]
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Where the agent listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    services! {
        /// Images: pull, list, tag, remove.
        images: ImageServiceClient,
        /// Networks and attachments.
        networks: NetworkServiceClient,
        /// Sandboxes and containers.
        lifecycle: LifecycleServiceClient,
        /// System containers: a distribution's own init.
        systems: SystemServiceClient,
        /// What is running or was interrupted.
        operations: OperationServiceClient,
        /// What happened; [`Client::watch`] reads on across restarts.
        events: EventServiceClient,
        /// The node itself: facts, checks, repair.
        node: NodeServiceClient,
    }

    /// Makes a call once and reads its error.
    ///
    /// # Errors
    /// What the agent or the way to it said.
    pub async fn call<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        match answer.await {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(Error::from_status(&self.address, status)),
        }
    }

    /// Makes a call, and again while the agent is unavailable.
    ///
    /// Only for what may arrive twice: a call that changes nothing, or one with an
    /// [`idempotency_key`].
    ///
    /// ```no_run
    /// # async fn example(client: longshore_client::Client) -> Result<(), longshore_client::Error> {
    /// use longshore_client::proto::ListImagesRequest;
    /// let images = client
    ///     .repeat(ListImagesRequest::default(), |client, request| async move {
    ///         client.images().list_images(request).await
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// What the last attempt said.
    pub async fn repeat<R, T, F, Fut>(&self, request: R, call: F) -> Result<T, Error>
    where
        R: Clone,
        F: Fn(Self, R) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut attempt = 1;
        loop {
            let error = match self.call(call(self.clone(), request.clone())).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let asked = error.refusal().and_then(|refusal| refusal.retry_after);
            match self.retry.wait_after(attempt, asked) {
                Some(wait) if error.is_unavailable() => tokio::time::sleep(wait).await,
                _ => return Err(error),
            }
            attempt += 1;
        }
    }
}

/// A new key that marks one wish, so that the agent knows its retries as such.
#[must_use]
pub fn idempotency_key() -> String {
    Uuid::now_v7().to_string()
}

fn endpoint(address: &Address) -> Endpoint {
    let uri = match address {
        // The connector below knows the path; HTTP/2 only wants a name for the other side.
        Address::Unix(_) => Uri::from_static("http://localhost"),
        Address::Tcp(place) => Uri::builder()
            .scheme("http")
            .authority(place.as_str())
            .path_and_query("/")
            .build()
            // `Address` holds only hosts with a port; what HTTP forbids in one reaches no host.
            .unwrap_or_else(|_| Uri::from_static("http://invalid.invalid:1")),
    };
    Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
        .http2_adaptive_window(true)
}

type Dialed = std::pin::Pin<Box<dyn Future<Output = std::io::Result<TokioIo<UnixStream>>> + Send>>;

fn dial_unix(
    address: &Address,
) -> impl tower::Service<Uri, Response = TokioIo<UnixStream>, Error = std::io::Error, Future = Dialed>
+ Send
+ 'static {
    let path = match address {
        Address::Unix(path) => path.clone(),
        Address::Tcp(_) => std::path::PathBuf::new(),
    };
    service_fn(move |_: Uri| -> Dialed {
        let path = path.clone();
        Box::pin(async move { UnixStream::connect(path).await.map(TokioIo::new) })
    })
}
