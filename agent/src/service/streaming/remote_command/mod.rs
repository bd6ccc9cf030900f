//! Exec and attach behind a client's channels, whatever protocol carries them.
//!
//! ```text
//!  client stdin  --> Inbox  --> Stdin             until its end
//!  client stdout <-- Outlet <-- Output            until its end, or the command's and an empty pipe
//!  client error  <-- Outlet <-- Outcome           after all output
//!  client resize --> Sizes  --> SessionControl    the newest counts
//! ```

mod outcome;
mod size;
pub(super) mod spdy;
pub(super) mod websocket;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::outcome::Outcome;
pub(super) use self::{outcome::ErrorStyle, size::Size};
use super::{
    AttachGrant, ExecGrant,
    channel::{Gone, Inbox, Outlet},
};
use crate::{
    id::Face,
    lifecycle::{
        AttachWish, ExecWish, Lifecycle, LifecycleError,
        session::{Output, Session, Stdin},
    },
    service::status,
};

/// Time a client with a terminal has to tell its size before the command starts without.
const FIRST_SIZE: Duration = Duration::from_millis(50);
/// After the end of a command, its pipes are read until they are empty: a child of it that still
/// holds them holds up nobody. What a pipe can hold, at most.
const REST: usize = 1 << 20;
/// How long an empty pipe is waited for then: long enough to have been looked at.
const EXEC_PATIENCE: Duration = Duration::from_millis(20);
/// The output of a container comes through its supervisor, which closes the pipes after it.
const ATTACH_PATIENCE: Duration = Duration::from_secs(2);

/// What a token for a command grants.
#[derive(Clone, Debug)]
pub(super) enum Command {
    Exec(ExecGrant),
    Attach(AttachGrant),
}

/// Channels that a client must open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) tty: bool,
}

impl Command {
    pub(super) fn wanted(&self) -> Wanted {
        match self {
            Self::Exec(grant) => Wanted {
                stdin: grant.stdin,
                stdout: grant.stdout,
                stderr: grant.stderr && !grant.tty,
                tty: grant.tty,
            },
            Self::Attach(grant) => Wanted {
                stdin: grant.stdin,
                stdout: grant.stdout,
                stderr: grant.stderr && !grant.tty,
                tty: grant.tty,
            },
        }
    }

    async fn start(
        self,
        lifecycle: &Arc<Lifecycle>,
        size: Option<Size>,
    ) -> Result<Session, LifecycleError> {
        // The grant was given to one who may see the container.
        match self {
            Self::Exec(grant) => {
                let wish = ExecWish {
                    command: grant.command,
                    tty: grant.tty,
                    stdin: grant.stdin,
                    stdout: grant.stdout,
                    stderr: grant.stderr,
                    size,
                    ..ExecWish::default()
                };
                lifecycle
                    .exec(Face::Native, grant.container.as_str(), wish)
                    .await
            }
            Self::Attach(grant) => {
                let wish = AttachWish {
                    stdin: grant.stdin,
                    stdout: grant.stdout,
                    stderr: grant.stderr,
                    replay: false,
                    size,
                };
                lifecycle
                    .attach(Face::Native, grant.container.as_str(), wish)
                    .await
            }
        }
    }
}

/// A client's channels.
pub(super) struct Client {
    pub(super) stdin: Option<Inbox>,
    pub(super) stdout: Option<Outlet>,
    pub(super) stderr: Option<Outlet>,
    pub(super) error: Outlet,
    pub(super) sizes: watch::Receiver<Option<Size>>,
    pub(super) style: ErrorStyle,
    pub(super) gone: CancellationToken,
}

/// Runs a command for a client, until it ends and all is told, or the client is gone.
pub(super) async fn run(lifecycle: &Arc<Lifecycle>, command: Command, client: Client) {
    let gone = client.gone.clone();
    tokio::select! {
        told = serve(lifecycle, command, client) => {
            if told.is_err() {
                tracing::debug!("the client left before it was told");
            }
        }
        // Dropping the session ends an exec, and lets go of an attached container.
        () = gone.cancelled() => {}
    }
}

async fn serve(
    lifecycle: &Arc<Lifecycle>,
    command: Command,
    mut client: Client,
) -> Result<(), Gone> {
    let patience = match &command {
        Command::Exec(_) => EXEC_PATIENCE,
        Command::Attach(_) => ATTACH_PATIENCE,
    };
    let attached = matches!(command, Command::Attach(_));
    let size = if command.wanted().tty {
        first_size(&mut client.sizes).await
    } else {
        None
    };
    // On a task of its own: a start that is cancelled half way could leave a process behind.
    let starting = {
        let lifecycle = Arc::clone(lifecycle);
        tokio::spawn(async move { command.start(&lifecycle, size).await })
    };
    let outcome = match starting.await {
        Ok(Ok(session)) => relay(session, &mut client, patience, attached).await,
        Ok(Err(error)) => Outcome::Failed(status::chain(&error)),
        Err(_) => Outcome::Failed("starting it failed".into()),
    };
    for outlet in [&client.stdout, &client.stderr].into_iter().flatten() {
        outlet.end().await?;
    }
    if let Some(status) = outcome.render(client.style) {
        client.error.send(status).await?;
    }
    client.error.end().await
}

async fn first_size(sizes: &mut watch::Receiver<Option<Size>>) -> Option<Size> {
    let first = timeout(FIRST_SIZE, sizes.wait_for(Option::is_some)).await;
    let size = first.ok()?.ok()?;
    *size
}

/// Carries bytes and sizes until the process has ended and its output is sent.
async fn relay(
    session: Session,
    client: &mut Client,
    patience: Duration,
    attached: bool,
) -> Outcome {
    let Session {
        stdin,
        stdout,
        stderr,
        tty,
        mut control,
        ..
    } = session;
    // Detach keys are the client's own: all that is seen of them is that its input ends. Without a
    // terminal the end of input is just that, and the output is still wished for.
    let detaches = attached && tty && stdin.is_some();
    let ended = CancellationToken::new();
    let outputs = async {
        tokio::join!(
            pump(stdout, client.stdout.as_ref(), &ended, patience),
            pump(stderr, client.stderr.as_ref(), &ended, patience),
        );
    };
    let input = feed(stdin, client.stdin.take());
    let sizes = &mut client.sizes;
    let life = async {
        let mut resizable = true;
        let exit = loop {
            // Both arms may be cancelled: the exit is kept, and so is the newest size.
            tokio::select! {
                exit = control.exit() => break exit,
                changed = sizes.changed(), if resizable => resizable = changed.is_ok(),
            }
            let size = *sizes.borrow_and_update();
            if let Some((columns, rows)) = size
                && let Err(error) = control.resize(columns, rows).await
            {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "size of the terminal not set"
                );
            }
        };
        ended.cancel();
        exit
    };
    let work = async {
        let ((), exit) = tokio::join!(outputs, life);
        exit
    };
    let input = async {
        input.await;
        if !detaches {
            std::future::pending().await
        }
    };
    let exit = tokio::select! {
        exit = work => exit,
        () = input => return Outcome::Success,
    };
    match exit.code {
        0 => Outcome::Success,
        _ if attached => Outcome::Success,
        code => Outcome::ExitCode(code),
    }
}

/// Carries output until its end, or what is left of it after the process has `ended`.
///
/// Output that the client does not want is read too: a full pipe would hold up the process.
async fn pump(
    output: Option<Output>,
    outlet: Option<&Outlet>,
    ended: &CancellationToken,
    patience: Duration,
) {
    let Some(mut output) = output else { return };
    let mut rest = REST;
    while rest > 0 {
        // Reading may be cancelled: it takes whole chunks.
        let bytes = tokio::select! {
            biased;
            bytes = output.next() => bytes,
            () = after(ended, patience) => {
                rest = 0;
                Some(output.drain(REST).into())
            }
        };
        let Some(bytes) = bytes.filter(|bytes: &Bytes| !bytes.is_empty()) else {
            return;
        };
        if ended.is_cancelled() {
            rest = rest.saturating_sub(bytes.len());
        }
        if let Some(outlet) = outlet
            && outlet.send(bytes).await.is_err()
        {
            return;
        }
    }
}

async fn after(ended: &CancellationToken, patience: Duration) {
    ended.cancelled().await;
    sleep(patience).await;
}

/// Carries input until its end.
async fn feed(stdin: Option<Stdin>, inbox: Option<Inbox>) {
    if let Some(mut stdin) = stdin {
        let mut whole = true;
        if let Some(mut inbox) = inbox {
            while let Some(bytes) = inbox.next().await {
                if stdin.write_all(&bytes).await.is_err() {
                    whole = false;
                    break;
                }
            }
        }
        if whole {
            stdin.close().await;
        }
    }
}
