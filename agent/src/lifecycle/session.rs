//! A client's connection to the stdio of an exec or a container.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use longshore_sys::fd;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
};

use super::{Lifecycle, LifecycleError};
use crate::{
    handler::Handler as _,
    id::{ContainerId, SandboxId},
};

/// Bytes that are read from a stream at once.
const CHUNK: usize = 32 << 10;

/// Stdio of a process, seen from outside. Dropping the session of an exec kills it; that of an
/// attachment lets go of the container.
pub struct Session {
    /// The process of an exec, in the host.
    pub pid: Option<i32>,
    /// It is on a terminal.
    pub tty: bool,
    /// Where input goes; dropping it is the end of input.
    pub stdin: Option<Stdin>,
    /// Output, or all of a terminal's.
    pub stdout: Option<Output>,
    /// Errors.
    pub stderr: Option<Output>,
    /// Everything else.
    pub control: SessionControl,
}

/// Where input goes.
pub struct Stdin {
    pipe: pipe::Sender,
    /// A terminal sees end of input as a character, not as a closed descriptor.
    terminal: bool,
}

impl Stdin {
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// `BrokenPipe` when the process reads no more.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.pipe.write_all(bytes).await
    }

    /// Ends the input.
    pub async fn close(mut self) {
        if self.terminal {
            // VEOF in the terminal's usual setting; the process may have gone already.
            let _ = self.pipe.write_all(&[4]).await;
        }
    }
}

/// Output of a process.
pub struct Output(pipe::Receiver);

impl Output {
    /// The next bytes; none at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        let mut buffer = BytesMut::with_capacity(CHUNK);
        // A pseudoterminal whose other side is closed answers EIO: that is its end.
        match self.0.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(buffer.freeze()),
        }
    }

    /// What can be read without waiting, after the process has ended: a child that still holds
    /// the pipe holds up nobody.
    ///
    /// The kernel is asked, not the runtime: on a busy host the news that there is something to
    /// read may come after that of the exit.
    pub(crate) fn drain(&mut self, limit: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let mut chunk = vec![0; CHUNK];
        while all.len() < limit {
            match rustix::io::read(&self.0, &mut chunk) {
                Ok(0) => break,
                Ok(read) => all.extend_from_slice(&chunk[..read]),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => break,
            }
        }
        all.truncate(limit);
        all
    }
}

/// How the process of a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionExit {
    /// 0 to 255; 128 and the signal if one ended it.
    pub code: i32,
    /// That signal, or 0.
    pub signal: i32,
    /// It was killed because its time was up.
    pub timed_out: bool,
}

/// Size, exit and end of a session.
pub struct SessionControl {
    lifecycle: Arc<Lifecycle>,
    sandbox_id: SandboxId,
    container_id: ContainerId,
    kind: Kind,
}

pub(super) enum Kind {
    Exec {
        exec_id: u64,
        terminal: Option<OwnedFd>,
        exit: Option<tokio::sync::oneshot::Receiver<longshore_shim::wire::ExecExited>>,
    },
    Attach,
}

impl SessionControl {
    pub(super) fn new(
        lifecycle: Arc<Lifecycle>,
        sandbox_id: SandboxId,
        container_id: ContainerId,
        kind: Kind,
    ) -> Self {
        Self {
            lifecycle,
            sandbox_id,
            container_id,
            kind,
        }
    }

    /// Sets the size of the terminal, in character cells; without a terminal nothing happens.
    ///
    /// # Errors
    /// `Handler` when the shim does not do it.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), LifecycleError> {
        match &self.kind {
            Kind::Exec { terminal, .. } => {
                if let Some(terminal) = terminal {
                    // The terminal may be gone with its process; then its size is no matter.
                    let _ = tcsetwinsize(terminal, window(columns, rows));
                }
                Ok(())
            }
            Kind::Attach => Ok(self
                .lifecycle
                .handler
                .resize(
                    &self.sandbox_id,
                    &self.container_id,
                    columns.into(),
                    rows.into(),
                )
                .await?),
        }
    }

    /// Waits for the end of the process. After the first call's answer it is that of a lost one.
    pub async fn exit(&mut self) -> SessionExit {
        match &mut self.kind {
            Kind::Exec { exit, .. } => {
                let exited = match exit.as_mut() {
                    Some(waiting) => waiting.await.ok(),
                    None => None,
                };
                *exit = None;
                exited.map_or(LOST, |exited| {
                    session_exit(&exited.status, exited.timed_out)
                })
            }
            Kind::Attach => self
                .lifecycle
                .exited(&self.container_id)
                .await
                .map_or(LOST, |exit| SessionExit {
                    code: exit.code,
                    signal: exit.signal,
                    timed_out: false,
                }),
        }
    }
}

/// The exit of a process whose supervisor was lost.
const LOST: SessionExit = SessionExit {
    code: 255,
    signal: 0,
    timed_out: false,
};

impl Drop for SessionControl {
    fn drop(&mut self) {
        let Kind::Exec {
            exec_id,
            exit: Some(_),
            ..
        } = self.kind
        else {
            return;
        };
        let (lifecycle, sandbox) = (Arc::clone(&self.lifecycle), self.sandbox_id.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = lifecycle.handler.kill_exec(&sandbox, exec_id).await {
                    tracing::debug!(sandbox_id = %sandbox, error = &error as &dyn std::error::Error, "exec not ended");
                }
            });
        }
    }
}

pub(super) fn session_exit(
    status: &longshore_shim::wire::ExitStatus,
    timed_out: bool,
) -> SessionExit {
    let signal = i32::try_from(status.signal).unwrap_or(0);
    SessionExit {
        code: if signal == 0 {
            i32::try_from(status.code).unwrap_or(LOST.code)
        } else {
            128 + signal
        },
        signal,
        timed_out,
    }
}

fn window(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// A pipe into a process: its end, ours.
pub(super) fn input() -> Result<(OwnedFd, Stdin), LifecycleError> {
    let (theirs, ours) = fd::pipe().map_err(no_pipe)?;
    Ok((theirs, stdin(ours, false)?))
}

/// A pipe out of a process: its end, ours.
pub(super) fn output() -> Result<(OwnedFd, Output), LifecycleError> {
    let (ours, theirs) = fd::pipe().map_err(no_pipe)?;
    fd::set_nonblocking(ours.as_fd(), true).map_err(no_pipe)?;
    let ours = pipe::Receiver::from_owned_fd(ours).map_err(no_pipe)?;
    Ok((theirs, Output(ours)))
}

/// Both directions of a terminal, and a descriptor for its size.
pub(super) fn terminal(master: OwnedFd) -> Result<(Stdin, Output, OwnedFd), LifecycleError> {
    fd::set_nonblocking(master.as_fd(), true).map_err(no_pipe)?;
    let writer = master.try_clone().map_err(no_pipe)?;
    let size = master.try_clone().map_err(no_pipe)?;
    // Tokio takes any pollable descriptor here; the checks it leaves out are for pipes only.
    let reader = pipe::Receiver::from_file_unchecked(File::from(master)).map_err(no_pipe)?;
    Ok((stdin(writer, true)?, Output(reader), size))
}

fn stdin(ours: OwnedFd, terminal: bool) -> Result<Stdin, LifecycleError> {
    fd::set_nonblocking(ours.as_fd(), true).map_err(no_pipe)?;
    let pipe = pipe::Sender::from_file_unchecked(File::from(ours)).map_err(no_pipe)?;
    Ok(Stdin { pipe, terminal })
}

fn no_pipe(source: io::Error) -> LifecycleError {
    LifecycleError::File {
        action: "make stdio for",
        path: "a process".into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn what_a_process_wrote_last_is_there_before_the_runtime_heard_of_it() {
        let (theirs, mut ours) = output().expect("pipe");
        File::from(theirs)
            .write_all(b"1000 1234\n")
            .expect("the pipe has room");
        // Nothing was awaited since: no news can have come.
        assert_eq!(ours.drain(100), b"1000 1234\n");
        assert_eq!(ours.drain(100), b"");
    }
}
