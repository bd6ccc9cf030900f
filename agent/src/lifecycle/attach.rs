//! Attach: a client at the stdio of a running container's first process.

use std::sync::Arc;

use super::{
    Lifecycle, LifecycleError,
    session::{self, Kind, Session, SessionControl},
    start_container::wrong_state,
};
use crate::{
    handler::{Handler as _, Streams},
    id::Face,
};

/// What of it is wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttachWish {
    /// Input; the container must have a stdin.
    pub stdin: bool,
    /// Output from now on.
    pub stdout: bool,
    /// Errors; a terminal has none of its own.
    pub stderr: bool,
    /// What a console has shown so far comes first.
    pub replay: bool,
    /// Size of the client's terminal: columns, rows.
    pub size: Option<(u16, u16)>,
}

impl Lifecycle {
    /// Connects to a container that runs or waits for its start. Many clients may be attached.
    ///
    /// # Errors
    /// `NotFound`; `State` once it has exited; `Lacks` without stdin if input is wished; `Handler`.
    pub async fn attach(
        self: &Arc<Self>,
        face: Face,
        id: &str,
        wish: AttachWish,
    ) -> Result<Session, LifecycleError> {
        let container = self.find_container(&self.store.snapshot(), face, id)?;
        // One that waits for its start may be attached to, so that no output is missed.
        if container.exit().is_some() {
            return Err(wrong_state(&container, "CONTAINER_RUNNING"));
        }
        if wish.stdin && !container.config.stdin {
            return Err(LifecycleError::Lacks {
                id: container.id.to_string(),
                what: "stdin",
            });
        }
        let tty = container.config.tty;
        let mut streams = Streams::default();
        let (mut stdin, mut stdout, mut stderr) = (None, None, None);
        if wish.stdin {
            let (theirs, ours) = session::input()?;
            (streams.stdin, stdin) = (Some(theirs), Some(ours));
        }
        if wish.stdout || tty {
            let (theirs, ours) = session::output()?;
            (streams.stdout, stdout) = (Some(theirs), Some(ours));
        }
        if wish.stderr && !tty {
            let (theirs, ours) = session::output()?;
            (streams.stderr, stderr) = (Some(theirs), Some(ours));
        }
        self.handler
            .attach(&container.sandbox_id, &container.id, streams, wish.replay)
            .await?;
        let control = SessionControl::new(
            Arc::clone(self),
            container.sandbox_id.clone(),
            container.id.clone(),
            Kind::Attach,
        );
        if let (true, Some((columns, rows))) = (tty, wish.size) {
            control.resize(columns, rows).await?;
        }
        Ok(Session {
            pid: None,
            tty,
            stdin,
            stdout,
            stderr,
            control,
        })
    }

    /// Lets a container's shim go on with the log file that is now at its path.
    ///
    /// # Errors
    /// `NotFound`; `State` unless it runs; `Lacks` without a log; `File`; `Handler`.
    pub async fn reopen_container_log(&self, face: Face, id: &str) -> Result<(), LifecycleError> {
        let container = self.find_container(&self.store.snapshot(), face, id)?;
        if !container.is_running() {
            return Err(wrong_state(&container, "CONTAINER_RUNNING"));
        }
        let log = container
            .config
            .log
            .clone()
            .ok_or_else(|| LifecycleError::Lacks {
                id: container.id.to_string(),
                what: "log",
            })?;
        let input =
            crate::blocking::run("open log", move || super::create_container::open_log(&log))
                .await?;
        Ok(self
            .handler
            .reopen_log(&container.sandbox_id, &container.id, input.file)
            .await?)
    }
}
