//! Exec, attach and port forward: CRI hands out a URL, the client connects to it.
//!
//! ```text
//!  Exec -> token -> http://127.0.0.1:port/exec/<token> -> upgrade -> spdy | websocket
//!                                                           -> remote_command -> lifecycle::Session
//!                                                           -> port_forward   -> sandbox's loopback
//! ```
//! Invariants
//! - A URL is good once, within a minute. Whoever has it may do what was granted, and nothing else.
//! - Nothing waits without bound: inboxes in bytes, outgoing queues in messages, streams, tokens and
//!   connections in number. A peer that does not read holds up its own stream or connection.
//! - A client that leaves takes its exec with it, and leaves an attached container as it is.
//!
//! Source: CRI `Exec`, `Attach`, `PortForward`; Kubernetes' remote command and port forward
//! protocols.

mod channel;
mod negotiate;
mod port_forward;
mod remote_command;
mod server;
mod spdy;
#[cfg(test)]
mod tests;
mod tls;
mod token;
mod websocket;

use std::{io, path::PathBuf, sync::Arc};

use longshore_proto::longshore::v1::ErrorReason;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Code;

use self::{
    remote_command::Command,
    server::{Grant, Server},
    token::{Tokens, UsedUp},
};
use super::status::{ToStatus, Verdict};
use crate::{
    config::StreamingTlsConfig,
    id::{ContainerId, SandboxId},
    lifecycle::Lifecycle,
};

/// A command in a running container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecGrant {
    /// Where.
    pub container: ContainerId,
    /// Program and arguments.
    pub command: Vec<String>,
    /// On a terminal.
    pub tty: bool,
    /// With input.
    pub stdin: bool,
    /// With output.
    pub stdout: bool,
    /// With errors; not with a terminal.
    pub stderr: bool,
}

/// A connection to the first process of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachGrant {
    /// Which.
    pub container: ContainerId,
    /// It is on a terminal.
    pub tty: bool,
    /// With input.
    pub stdin: bool,
    /// With output.
    pub stdout: bool,
    /// With errors; not with a terminal.
    pub stderr: bool,
}

/// Connections to ports on the loopback of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortForwardGrant {
    /// Which.
    pub sandbox: SandboxId,
    /// Those that a client gets which does not name any; others are not refused.
    pub ports: Vec<u16>,
}

/// Why there is no URL.
#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    /// Too many URLs wait for their clients.
    #[error("{limit} streaming URLs are unused; try again in a minute")]
    TokensUsedUp {
        /// How many may wait.
        limit: usize,
    },
    /// The server can't listen.
    #[error("cannot listen for streaming clients on {address}")]
    Listen {
        /// Where.
        address: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Its certificate or key can't be used.
    #[error("streaming.tls: {}: {detail}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// Why not.
        detail: String,
    },
}

impl ToStatus for StreamingError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::TokensUsedUp { limit } => {
                Verdict::new(Code::ResourceExhausted, ErrorReason::Overloaded).fact("limit", limit)
            }
            Self::Listen { address, source } => Verdict::new(Code::Internal, ErrorReason::System)
                .fact("step", format!("listen on {address}"))
                .fact("errno", source.raw_os_error().unwrap_or(0)),
            Self::Tls { path, detail } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::System)
                    .fact("step", format!("read {}", path.display()))
                    .fact("detail", detail)
            }
        }
    }
}

/// Only the machine itself connects: kubelet, crictl.
const ADDRESS: &str = "127.0.0.1:0";

/// The streaming server. It serves until the last clone is dropped.
#[derive(Clone)]
pub struct Streaming(Arc<Running>);

struct Running {
    tokens: Arc<Tokens<Grant>>,
    base: String,
    _stop: DropGuard,
}

impl Streaming {
    /// Listens on a free port of the loopback.
    ///
    /// # Errors
    /// `Listen`, `Tls`.
    pub async fn start(
        lifecycle: Arc<Lifecycle>,
        tls: Option<&StreamingTlsConfig>,
    ) -> Result<Self, StreamingError> {
        let tls = tls.map(tls::acceptor).transpose()?;
        let failed = |source| StreamingError::Listen {
            address: ADDRESS,
            source,
        };
        let listener = TcpListener::bind(ADDRESS).await.map_err(failed)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{}", listener.local_addr().map_err(failed)?);
        let tokens = Arc::new(Tokens::new());
        let stop = CancellationToken::new();
        let server = Server {
            lifecycle,
            tokens: Arc::clone(&tokens),
            tls,
            stop: stop.clone(),
        };
        tokio::spawn(server.run(listener));
        tracing::debug!(url = base, "streaming");
        Ok(Self(Arc::new(Running {
            tokens,
            base,
            _stop: stop.drop_guard(),
        })))
    }

    /// A URL at which the command is run.
    ///
    /// # Errors
    /// `TokensUsedUp`.
    pub fn exec(&self, grant: ExecGrant) -> Result<String, StreamingError> {
        self.issue("exec", Grant::Command(Command::Exec(grant)))
    }

    /// A URL at which the container is attached.
    ///
    /// # Errors
    /// `TokensUsedUp`.
    pub fn attach(&self, grant: AttachGrant) -> Result<String, StreamingError> {
        self.issue("attach", Grant::Command(Command::Attach(grant)))
    }

    /// A URL at which ports are forwarded.
    ///
    /// # Errors
    /// `TokensUsedUp`.
    pub fn port_forward(&self, grant: PortForwardGrant) -> Result<String, StreamingError> {
        self.issue("portforward", Grant::PortForward(grant))
    }

    fn issue(&self, kind: &str, grant: Grant) -> Result<String, StreamingError> {
        let token = self
            .0
            .tokens
            .issue(grant)
            .map_err(|UsedUp| StreamingError::TokensUsedUp {
                limit: token::LIMIT,
            })?;
        Ok(format!("{}/{kind}/{token}", self.0.base))
    }
}
