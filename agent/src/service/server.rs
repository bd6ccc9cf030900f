//! Sockets, services, and their end.

use std::{fs, io, net::SocketAddr, os::unix::fs::PermissionsExt as _, path::PathBuf, sync::Arc};

use futures_util::TryStreamExt as _;
use longshore_proto::{
    cri::v1::{
        self as cri_proto, image_service_server::ImageServiceServer as CriImageServer,
        runtime_service_server::RuntimeServiceServer,
    },
    longshore::v1::{
        self as native_proto, event_service_server::EventServiceServer,
        image_service_server::ImageServiceServer, lifecycle_service_server::LifecycleServiceServer,
        network_service_server::NetworkServiceServer, node_service_server::NodeServiceServer,
        operation_service_server::OperationServiceServer,
        system_service_server::SystemServiceServer,
    },
};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};
use tower::layer::util::{Identity as NoLayer, Stack};
use tower_http::catch_panic::{CatchPanicLayer, DefaultResponseForPanic};
use tracing::info;

use super::{
    authority::AnyAuthority, cri::Cri, deadline::DeadlineLayer, native::Native,
    streaming::StreamingError,
};
use crate::{
    agent::Agent,
    config::{ServerConfig, TlsConfig},
};

/// Longest message that is taken or sent: kubelet's client accepts as much.
const MESSAGE_BYTES: usize = 16 << 20;

/// Time that calls have to end once the agent stops.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The unix socket can't be opened.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The TCP address can't be used.
    #[error("cannot listen on {address}")]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A file of the TLS configuration can't be read.
    #[error("cannot read {}", path.display())]
    TlsFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server failed, or its TLS configuration is not usable.
    #[error("the server failed")]
    Transport(#[from] tonic::transport::Error),
    /// The streams of CRI can't be served.
    #[error("streaming")]
    Streaming(#[from] StreamingError),
    /// The descriptors of the protocols can't be served.
    #[error("reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves both faces, health and reflection until `stop`.
///
/// # Errors
/// When a socket can't be opened; both are opened before anything is served.
pub async fn serve(agent: &Arc<Agent>, stop: CancellationToken) -> Result<(), ServeError> {
    let path = agent.config.run_dir.join("longshore.sock");
    let unix = listen_unix(&path)?;
    let tcp = match agent.config.server.listen {
        Some(address) => Some(listen_tcp(address).await?),
        None => None,
    };
    if agent.config.streaming.tls.is_some() {
        // A certificate that can't be used is told now, not to the first who wants a terminal.
        agent.streaming().await?;
    }
    let routes = routes(agent).await?;
    let on_unix = server(None)?
        .add_routes(routes.clone())
        .serve_with_incoming_shutdown(
            UnixListenerStream::new(unix).map_ok(AnyAuthority::new),
            stop.clone().cancelled_owned(),
        );
    let on_tcp = match tcp {
        None => None,
        Some(listener) => {
            info!(address = ?listener.local_addr().ok(), "serving");
            let server = server(Some(&agent.config.server))?.add_routes(routes);
            let incoming = TcpListenerStream::new(listener);
            Some(server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()))
        }
    };
    info!(socket = %path.display(), "serving");
    ready(&stop);
    let serving = async {
        let tcp = async {
            match on_tcp {
                Some(serving) => serving.await,
                None => Ok(()),
            }
        };
        tokio::try_join!(on_unix, tcp).map(drop)
    };
    tokio::select! {
        ended = serving => ended?,
        // Watches and followed logs never end by themselves; their clients resume elsewhere.
        () = patience(&stop) => info!("open streams are cut off"),
    }
    // A socket that nobody serves only puzzles clients; the next agent makes its own.
    let _ = fs::remove_file(path);
    Ok(())
}

/// Ends some time after the stop.
async fn patience(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(PATIENCE).await;
}

async fn routes(agent: &Arc<Agent>) -> Result<Routes, ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let cri = Cri::new(Arc::clone(agent));
    let native = Native::new(Arc::clone(agent));
    macro_rules! limited {
        ($server:ty, $service:expr) => {{
            health.set_serving::<$server>().await;
            <$server>::new($service)
                .max_decoding_message_size(MESSAGE_BYTES)
                .max_encoding_message_size(MESSAGE_BYTES)
        }};
    }
    let mut routes = Routes::builder();
    routes
        .add_service(limited!(RuntimeServiceServer<Cri>, cri.clone()))
        .add_service(limited!(CriImageServer<Cri>, cri))
        .add_service(limited!(ImageServiceServer<Native>, native.clone()))
        .add_service(limited!(NetworkServiceServer<Native>, native.clone()))
        .add_service(limited!(LifecycleServiceServer<Native>, native.clone()))
        .add_service(limited!(SystemServiceServer<Native>, native.clone()))
        .add_service(limited!(OperationServiceServer<Native>, native.clone()))
        .add_service(limited!(EventServiceServer<Native>, native.clone()))
        .add_service(limited!(NodeServiceServer<Native>, native))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok(routes.routes())
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(cri_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(native_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

type Layered = Stack<DeadlineLayer, Stack<CatchPanicLayer<DefaultResponseForPanic>, NoLayer>>;

fn server(config: Option<&ServerConfig>) -> Result<Server<Layered>, ServeError> {
    let mut server = Server::builder()
        .tcp_nodelay(true)
        // Many short deadlines on one connection that pass at once, on a busy host, are no attack.
        .http2_max_pending_accept_reset_streams(Some(1024))
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(30)));
    if let Some(tls) = config.and_then(|config| config.tls.as_ref()) {
        server = server.tls_config(tls_config(tls)?)?;
    }
    Ok(server.layer(CatchPanicLayer::new()).layer(DeadlineLayer))
}

fn tls_config(tls: &TlsConfig) -> Result<ServerTlsConfig, ServeError> {
    let read = |path: &PathBuf| {
        fs::read(path).map_err(|source| ServeError::TlsFile {
            path: path.clone(),
            source,
        })
    };
    Ok(ServerTlsConfig::new()
        .identity(Identity::from_pem(read(&tls.certificate)?, read(&tls.key)?))
        .client_ca_root(Certificate::from_pem(read(&tls.client_ca)?)))
}

/// Replaces the socket of an agent that ended without removing it; the lock on the directory says
/// that it did end.
fn listen_unix(path: &PathBuf) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Socket {
        path: path.clone(),
        source,
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

async fn listen_tcp(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Tcp { address, source })
}

/// Tells systemd that the agent serves, and keeps its watchdog content.
///
/// Source: sd_notify(3), sd_watchdog_enabled(3).
fn ready(stop: &CancellationToken) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    let stop = stop.clone();
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(period / 2);
        loop {
            tokio::select! {
                _ = tick.tick() => { let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]); }
                () = stop.cancelled() => break,
            }
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    });
}
