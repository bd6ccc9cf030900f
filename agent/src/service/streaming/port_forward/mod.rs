//! Port forwarding: a client's channel to a port on the loopback of a sandbox.
//!
//! ```text
//!  client data  <--> Inbox, Outlet <--> 127.0.0.1:port, or [::1]:port, in the sandbox's netns
//!  client error <--  Outlet        <--  why it can't be reached
//! ```

pub(super) mod spdy;
pub(super) mod websocket;

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use longshore_sys::ns;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::channel::{Gone, Inbox, Outlet, PIECE};
use crate::{
    blocking,
    id::{Face, SandboxId},
    lifecycle::{Lifecycle, LifecycleError},
    network::Mode,
    service::status,
};

/// Time a program in the sandbox has to take a connection.
const DIAL: Duration = Duration::from_secs(30);

/// Why a port can't be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    /// The sandbox is gone.
    #[error(transparent)]
    Sandbox(#[from] LifecycleError),
    /// It has stopped since the client was let in.
    #[error("sandbox {0} is not ready")]
    NotReady(SandboxId),
    /// Its network can't be entered.
    #[error("cannot enter the network of the sandbox")]
    Namespace(#[source] io::Error),
    /// Nobody listens.
    #[error("cannot connect to port {port} of the sandbox: 127.0.0.1: {v4}; [::1]: {v6}")]
    Connect {
        port: u16,
        v4: io::Error,
        v6: io::Error,
    },
}

/// Where ports are.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// With the host.
    Host,
    /// In the network namespace at this path.
    Netns(PathBuf),
}

impl Place {
    /// The loopback of a sandbox, if it is ready.
    pub(super) fn of(lifecycle: &Arc<Lifecycle>, id: &SandboxId) -> Result<Self, ForwardError> {
        // The grant was given to one who may see the sandbox.
        let sandbox =
            lifecycle.find_sandbox(&lifecycle.store.snapshot(), Face::Native, id.as_str())?;
        if !sandbox.is_ready() {
            return Err(ForwardError::NotReady(id.clone()));
        }
        Ok(match sandbox.config.network.mode {
            Mode::Host => Self::Host,
            Mode::Pod | Mode::None => Self::Netns(lifecycle.sandbox_dir(id).join("ns/net")),
        })
    }

    async fn dial(self, port: u16) -> Result<TcpStream, ForwardError> {
        let sockets = blocking::run("open sockets in a sandbox", move || self.sockets())
            .await
            .map_err(ForwardError::Namespace)?;
        let [v4, v6] = sockets;
        let v4 = match connect(v4, (Ipv4Addr::LOCALHOST, port).into()).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        match connect(v6, (Ipv6Addr::LOCALHOST, port).into()).await {
            Ok(stream) => Ok(stream),
            Err(v6) => Err(ForwardError::Connect { port, v4, v6 }),
        }
    }

    /// A socket belongs to the namespace in which it was made, wherever it is connected.
    fn sockets(&self) -> io::Result<[io::Result<StdTcpStream>; 2]> {
        let make = || [AddressFamily::INET, AddressFamily::INET6].map(socket);
        match self {
            Self::Host => Ok(make()),
            Self::Netns(path) => ns::in_netns(path, make),
        }
    }
}

fn socket(family: AddressFamily) -> io::Result<StdTcpStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?.into())
}

async fn connect(socket: io::Result<StdTcpStream>, to: SocketAddr) -> io::Result<TcpStream> {
    let connecting = TcpSocket::from_std_stream(socket?).connect(to);
    let stream = timeout(DIAL, connecting)
        .await
        .map_err(|_| io::ErrorKind::TimedOut)??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A client's side of one forwarded connection.
pub(super) struct Client {
    pub(super) port: u16,
    pub(super) inbox: Inbox,
    pub(super) outlet: Outlet,
    pub(super) error: Outlet,
    /// Cancelled when the client breaks it off.
    pub(super) reset: CancellationToken,
}

/// Serves one forwarded connection to its end.
pub(super) async fn forward(place: Result<Place, ForwardError>, client: Client) {
    let Client {
        port,
        inbox,
        outlet,
        error,
        reset,
    } = client;
    let work = async {
        let dialled = match place {
            Ok(place) => place.dial(port).await,
            Err(error) => Err(error),
        };
        match dialled {
            Ok(stream) => copy(stream, inbox, &outlet, &error).await,
            Err(why) => {
                tracing::debug!(
                    port,
                    error = &why as &dyn std::error::Error,
                    "port not reached"
                );
                error.send(status::chain(&why).into()).await
            }
        }
    };
    tokio::select! {
        // A client that is gone needs no more telling.
        _ = work => {}
        () = reset.cancelled() => {}
    }
    if outlet.end().await.is_ok() {
        let _ = error.end().await;
    }
}

/// Copies both ways; the end of one direction leaves the other open.
async fn copy(
    stream: TcpStream,
    inbox: Inbox,
    outlet: &Outlet,
    error: &Outlet,
) -> Result<(), Gone> {
    let (from, to) = stream.into_split();
    let down = async {
        let whole = download(from, outlet).await?;
        // Clients wait for the end of both streams.
        outlet.end().await?;
        error.end().await?;
        Ok(whole)
    };
    let up = upload(inbox, to);
    tokio::pin!(down, up);
    tokio::select! {
        whole = &mut down => {
            if whole? {
                up.await;
            }
            Ok(())
        }
        () = &mut up => down.await.map(|_| ()),
    }
}

/// To the client; false if the connection broke.
async fn download(mut from: OwnedReadHalf, outlet: &Outlet) -> Result<bool, Gone> {
    loop {
        let mut buffer = BytesMut::with_capacity(PIECE);
        match from.read_buf(&mut buffer).await {
            Ok(0) => return Ok(true),
            Ok(_) => outlet.send(buffer.freeze()).await?,
            Err(_) => return Ok(false),
        }
    }
}

/// From the client, until its end or as long as anyone reads.
async fn upload(mut inbox: Inbox, mut to: OwnedWriteHalf) {
    while let Some(bytes) = inbox.next().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
    // The other side may have closed already.
    let _ = to.shutdown().await;
}
