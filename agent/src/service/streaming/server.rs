//! The HTTP server: a token is redeemed, the connection upgraded and handed over.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn, upgrade::Upgraded};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};
use tokio_util::sync::CancellationToken;

use super::{
    PortForwardGrant,
    channel::Activity,
    negotiate::{self, Agreed, Answer, Forward, Refusal},
    port_forward::{self, Place},
    remote_command::{self, Command},
    spdy,
    token::Tokens,
    websocket,
};
use crate::lifecycle::Lifecycle;

/// Connections at once.
const CONNECTIONS: usize = 4096;
/// Time a client has to send its request.
const REQUEST: Duration = Duration::from_secs(30);
/// A connection on which nothing was sent or received for so long is closed.
const IDLE: Duration = Duration::from_secs(4 * 60 * 60);
/// Pause when connections can't be accepted, e.g. for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a token is good for.
#[derive(Clone, Debug)]
pub(super) enum Grant {
    Command(Command),
    PortForward(PortForwardGrant),
}

/// What connections are served with.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) tokens: Arc<Tokens<Grant>>,
    pub(super) tls: Option<TlsAcceptor>,
    pub(super) stop: CancellationToken,
}

impl Server {
    /// Serves until it is stopped; connections end with it.
    pub(super) async fn run(self, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let permit = Arc::clone(&room).acquire_owned().await;
            let permit = Arc::new(permit.expect("this semaphore is never closed"));
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((socket, _)) => {
                        tokio::spawn(self.clone().connection(socket, permit));
                    }
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "streaming client not accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                () = self.stop.cancelled() => return,
            }
        }
    }

    async fn connection(self, socket: TcpStream, permit: Arc<OwnedSemaphorePermit>) {
        // Keystrokes do not wait for company. A socket that can't be set so works too.
        let _ = socket.set_nodelay(true);
        match self.tls.clone() {
            None => self.serve(socket, permit).await,
            Some(tls) => match timeout(REQUEST, tls.accept(socket)).await {
                Ok(Ok(secured)) => self.serve(secured, permit).await,
                Ok(Err(error)) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "no TLS with a streaming client"
                    );
                }
                Err(_) => tracing::debug!("a streaming client began no TLS in time"),
            },
        }
    }

    async fn serve<T>(self, io: T, permit: Arc<OwnedSemaphorePermit>)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let stop = self.stop.clone();
        let service = service_fn(move |request| {
            let answer = self.answer(request, &permit);
            async move { Ok::<_, Infallible>(answer) }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        tokio::select! {
            served = serving => if let Err(error) = served {
                tracing::debug!(error = &error as &dyn std::error::Error, "streaming request not served");
            },
            () = stop.cancelled() => {}
        }
    }

    fn answer(
        &self,
        request: Request<Incoming>,
        permit: &Arc<OwnedSemaphorePermit>,
    ) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST");
        }
        let Some((grant, path)) = self.redeem(request.uri().path()) else {
            return text(StatusCode::NOT_FOUND, "unknown, used or expired token");
        };
        tracing::debug!(path, "streaming client");
        let agreed = match grant {
            Grant::Command(command) => self.command(request, command, permit),
            Grant::PortForward(grant) => self.port_forward(request, grant, permit),
        };
        agreed.map_or_else(refused, upgrading)
    }

    /// The grant of a path `/kind/token`, and its kind. A token of another kind is used up too.
    fn redeem(&self, path: &str) -> Option<(Grant, &'static str)> {
        let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
        let grant = self.tokens.redeem(token)?;
        let right = match &grant {
            Grant::Command(Command::Exec(_)) => "exec",
            Grant::Command(Command::Attach(_)) => "attach",
            Grant::PortForward(_) => "portforward",
        };
        (kind == right).then_some((grant, right))
    }

    fn command(
        &self,
        request: Request<Incoming>,
        command: Command,
        permit: &Arc<OwnedSemaphorePermit>,
    ) -> Result<Answer, Refusal> {
        let (agreed, answer) = negotiate::command(request.headers())?;
        let lifecycle = Arc::clone(&self.lifecycle);
        let wanted = command.wanted();
        self.upgrade(request, permit, async move |upgraded, activity| {
            let run = async |client| remote_command::run(&lifecycle, command, client).await;
            match agreed {
                Agreed::Spdy(style) => {
                    let connection = spdy::Connection::new(upgraded, activity);
                    remote_command::spdy::serve(connection, wanted, style, run).await;
                }
                Agreed::WebSocket((coding, style)) => {
                    let socket = websocket(upgraded).await;
                    remote_command::websocket::serve(socket, coding, wanted, style, activity, run)
                        .await;
                }
            }
        });
        Ok(answer)
    }

    fn port_forward(
        &self,
        request: Request<Incoming>,
        grant: PortForwardGrant,
        permit: &Arc<OwnedSemaphorePermit>,
    ) -> Result<Answer, Refusal> {
        let (agreed, answer) = negotiate::port_forward(request.headers())?;
        let ports = match agreed {
            Agreed::WebSocket(Forward::Channels(_)) => ports(request.uri().query(), &grant)?,
            _ => Vec::new(),
        };
        let lifecycle = Arc::clone(&self.lifecycle);
        self.upgrade(request, permit, async move |upgraded, activity| {
            let place = move || Place::of(&lifecycle, &grant.sandbox);
            match agreed {
                Agreed::Spdy(()) => {
                    port_forward::spdy::serve(spdy::Connection::new(upgraded, activity), place)
                        .await;
                }
                Agreed::WebSocket(Forward::Tunnel) => {
                    let (inside, carry) = websocket::tunnel(websocket(upgraded).await);
                    port_forward::spdy::serve(spdy::Connection::new(inside, activity), place).await;
                    // What was said last is still carried.
                    let _ = timeout(websocket::LINGER, carry).await;
                }
                Agreed::WebSocket(Forward::Channels(coding)) => {
                    let socket = websocket(upgraded).await;
                    port_forward::websocket::serve(socket, coding, &ports, activity, place).await;
                }
            }
        });
        Ok(answer)
    }

    /// Serves the connection with `work` when the answer has been sent.
    fn upgrade<F>(
        &self,
        mut request: Request<Incoming>,
        permit: &Arc<OwnedSemaphorePermit>,
        work: impl FnOnce(TokioIo<Upgraded>, Activity) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send,
    {
        let upgrading = hyper::upgrade::on(&mut request);
        let (stop, permit) = (self.stop.clone(), Arc::clone(permit));
        tokio::spawn(async move {
            let _permit = permit;
            let upgraded = match upgrading.await {
                Ok(upgraded) => TokioIo::new(upgraded),
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "streaming client left"
                    );
                    return;
                }
            };
            let activity = Activity::new();
            tokio::select! {
                () = work(upgraded, activity.clone()) => {}
                () = activity.idle(IDLE) => tracing::debug!("streaming client idle for too long"),
                () = stop.cancelled() => {}
            }
        });
    }
}

async fn websocket(upgraded: TokioIo<Upgraded>) -> WebSocketStream<TokioIo<Upgraded>> {
    WebSocketStream::from_raw_socket(upgraded, Role::Server, Some(websocket::config())).await
}

/// Ports in the query, or those of the grant.
fn ports(query: Option<&str>, grant: &PortForwardGrant) -> Result<Vec<u16>, Refusal> {
    let bad = Refusal {
        status: StatusCode::BAD_REQUEST,
        text: "`port` has to be given, from 1 to 65535, at most 32 times",
        header: None,
    };
    let asked = query.unwrap_or_default().split('&');
    let mut ports = asked
        .filter_map(|pair| pair.strip_prefix("port="))
        .map(|port| port.parse().ok().filter(|port| *port != 0))
        .collect::<Option<Vec<u16>>>()
        .ok_or(bad.clone())?;
    if ports.is_empty() {
        ports.clone_from(&grant.ports);
    }
    if ports.is_empty() || ports.len() > port_forward::websocket::PORTS {
        return Err(bad);
    }
    Ok(ports)
}

fn upgrading(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    for (name, value) in answer {
        let value = HeaderValue::from_str(&value).expect("our own names and base64");
        response.headers_mut().insert(name, value);
    }
    response
}

fn refused(refusal: Refusal) -> Response<Full<Bytes>> {
    let mut response = text(refusal.status, refusal.text);
    if let Some((name, value)) = refusal.header {
        let value = HeaderValue::from_str(&value).expect("our own names");
        response.headers_mut().insert(name, value);
    }
    response
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
