//! ExecSync: a command's output and exit code in one answer. No intent, no event, no store.

use std::{sync::Arc, time::Duration};

use super::{
    ExecWish, Lifecycle, LifecycleError,
    session::{Output, Session},
};
use crate::id::Face;

/// Most that is kept of both streams together; the rest is read and dropped, so that the command
/// goes on. With what is around it, it fits the 16 MiB of a message that clients take.
const LIMIT: usize = (16 << 20) - 4096;

/// A finished command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// What it wrote to stdout, at most 16 MiB together with the other stream.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr, at most 16 MiB together with the other stream.
    pub stderr: Vec<u8>,
    /// 0 to 255; 128 and the signal if one ended it.
    pub exit_code: i32,
}

impl Lifecycle {
    /// Runs a command and waits for it.
    ///
    /// # Errors
    /// As [`Lifecycle::exec`]; `ExecTimeout` when it and what it started was killed.
    pub async fn exec_sync(
        self: &Arc<Self>,
        face: Face,
        id: &str,
        command: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput, LifecycleError> {
        let wish = ExecWish {
            command,
            stdout: true,
            stderr: true,
            timeout,
            ..ExecWish::default()
        };
        let mut session = self.exec(face, id, wish).await?;
        let (stdout, stderr, exit) = collect(&mut session).await;
        if exit.timed_out {
            return Err(LifecycleError::ExecTimeout {
                after: timeout.unwrap_or_default(),
            });
        }
        Ok(ExecOutput {
            stdout,
            stderr,
            exit_code: exit.code,
        })
    }
}

/// Reads both streams until the process ends, and then what is there without waiting.
async fn collect(session: &mut Session) -> (Vec<u8>, Vec<u8>, super::session::SessionExit) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (mut out, mut err) = (session.stdout.take(), session.stderr.take());
    let exit = {
        let exited = session.control.exit();
        tokio::pin!(exited);
        loop {
            // Each arm may be cancelled: reads take whole chunks, and the exit is kept.
            let room = LIMIT - stdout.len() - stderr.len();
            tokio::select! {
                exit = &mut exited => break exit,
                chunk = next(&mut out) => keep(&mut out, &mut stdout, chunk, room),
                chunk = next(&mut err) => keep(&mut err, &mut stderr, chunk, room),
            }
        }
    };
    if let Some(mut stream) = out {
        stdout.extend(stream.drain(LIMIT - stdout.len() - stderr.len()));
    }
    if let Some(mut stream) = err {
        stderr.extend(stream.drain(LIMIT - stdout.len() - stderr.len()));
    }
    (stdout, stderr, exit)
}

async fn next(stream: &mut Option<Output>) -> Option<bytes::Bytes> {
    match stream {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}

fn keep(stream: &mut Option<Output>, kept: &mut Vec<u8>, chunk: Option<bytes::Bytes>, room: usize) {
    match chunk {
        Some(chunk) => kept.extend_from_slice(&chunk[..chunk.len().min(room)]),
        None => *stream = None,
    }
}
