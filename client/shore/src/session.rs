//! A terminal, or two pipes, joined to a process in a container.
//!
//! ```text
//!  stdin  --thread--> detach keys? --> Input::Stdin  --+
//!  SIGWINCH -------------------------> Input::Resize --+--> agent
//!  SIGINT, SIGTERM ------------------> Signals (no tty) -> agent
//!  stdout, stderr <--------------------------------- Chunk <-- agent
//! ```

use std::{
    io::{self, Read as _},
    thread,
};

use anyhow::{Context as _, Result};
use futures_util::{Stream, StreamExt as _};
use prost::bytes::Bytes;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::terminal::{self, DetachKeys, DetachWatch, RawMode};

/// How many pieces of input wait at most for a slow agent.
const INPUT_QUEUE: usize = 16;

/// A read of standard input is at most this long, in bytes.
const INPUT_CHUNK_BYTES: usize = 32 << 10;

/// Whoever presses the key this often wants out, whatever the container does with the signal.
const PATIENCE: u32 = 3;

/// From here to the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    Stdin(Vec<u8>),
    CloseStdin,
    Resize { columns: u32, rows: u32 },
}

/// From the process to here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Chunk {
    Stdout(Bytes),
    Stderr(Bytes),
    Exited(i32),
    /// A message that is for somebody else, or nobody.
    Nothing,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The process ended with this exit code.
    Exited(i32),
    /// The detach keys were pressed: the process runs on.
    Detached,
    /// This signal wants us gone; the process may run on.
    Interrupted(i32),
    /// The agent closed the stream without an exit code.
    Closed,
}

/// What a session is made of.
pub(crate) struct Session<'a> {
    /// Send standard input.
    pub(crate) stdin: bool,
    /// The process has a terminal: ours goes raw and its size follows.
    pub(crate) tty: bool,
    /// The keys that leave it.
    pub(crate) detach: DetachKeys,
    /// Where SIGINT and SIGTERM go when there is no terminal; nowhere ends us as usual.
    pub(crate) signals: Option<&'a mpsc::UnboundedSender<i32>>,
}

/// The sending half of a session, made first: the call to the agent takes it along.
pub(crate) fn inputs() -> (mpsc::Sender<Input>, mpsc::Receiver<Input>) {
    mpsc::channel(INPUT_QUEUE)
}

impl Session<'_> {
    /// Copies until the process ends, the keys are pressed, or the agent closes the stream.
    pub(crate) async fn run(
        self,
        inputs: mpsc::Sender<Input>,
        outputs: impl Stream<Item = Result<Chunk>>,
    ) -> Result<End> {
        let raw = if self.tty && self.stdin && terminal::interactive() {
            Some(RawMode::enter().context("switching the terminal to raw mode")?)
        } else {
            None
        };
        let end = self.copy(inputs, outputs).await;
        drop(raw);
        end
    }

    async fn copy(
        self,
        inputs: mpsc::Sender<Input>,
        outputs: impl Stream<Item = Result<Chunk>>,
    ) -> Result<End> {
        futures_util::pin_mut!(outputs);
        let mut typed = if self.stdin {
            Some(read_stdin()?)
        } else {
            None
        };
        let mut watch = DetachWatch::new(&self.detach);
        let mut resized = if self.tty {
            resize(&inputs).await;
            Some(signal(SignalKind::window_change())?)
        } else {
            None
        };
        let proxied = self.signals.filter(|_| !self.tty);
        let mut interrupt = listen(proxied.is_some(), SignalKind::interrupt())?;
        // With a terminal it must be caught, so that the terminal is left as it was found.
        let mut terminate = listen(proxied.is_some() || self.tty, SignalKind::terminate())?;
        let mut pressed = 0;
        loop {
            // Each arm takes whole messages from a channel or a stream: nothing is lost when
            // another one wins.
            tokio::select! {
                chunk = outputs.next() => match chunk.transpose()? {
                    Some(Chunk::Stdout(bytes)) => put(&mut io::stdout().lock(), &bytes)?,
                    Some(Chunk::Stderr(bytes)) => put(&mut io::stderr().lock(), &bytes)?,
                    Some(Chunk::Exited(code)) => return Ok(End::Exited(code)),
                    Some(Chunk::Nothing) => {}
                    None => return Ok(End::Closed),
                },
                read = next(&mut typed) => match read {
                    Some(bytes) => {
                        let typed = watch.feed(&bytes);
                        if !typed.forward.is_empty() {
                            // A process that no longer reads is noticed by its exit.
                            let _ = inputs.send(Input::Stdin(typed.forward)).await;
                        }
                        if typed.detach {
                            return Ok(End::Detached);
                        }
                    }
                    None => {
                        typed = None;
                        let _ = inputs.send(Input::CloseStdin).await;
                    }
                },
                () = came(&mut resized) => resize(&inputs).await,
                number = either(&mut interrupt, &mut terminate) => {
                    pressed += 1;
                    if self.tty || pressed >= PATIENCE {
                        return Ok(End::Interrupted(number));
                    }
                    if let Some(signals) = proxied {
                        let _ = signals.send(number);
                    }
                }
            }
        }
    }
}

fn put(to: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Standard input, read on a thread of its own: a blocking read cannot be given up.
fn read_stdin() -> io::Result<mpsc::Receiver<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
    thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut buffer = vec![0; INPUT_CHUNK_BYTES];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(count) if count > 0 => {
                    if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return,
            }
        }
    })?;
    Ok(receiver)
}

async fn next(typed: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match typed {
        Some(typed) => typed.recv().await,
        None => std::future::pending().await,
    }
}

fn listen(wanted: bool, kind: SignalKind) -> io::Result<Option<Signal>> {
    wanted.then(|| signal(kind)).transpose()
}

async fn came(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

async fn either(interrupt: &mut Option<Signal>, terminate: &mut Option<Signal>) -> i32 {
    tokio::select! {
        () = came(interrupt) => SignalKind::interrupt().as_raw_value(),
        () = came(terminate) => SignalKind::terminate().as_raw_value(),
    }
}

async fn resize(inputs: &mpsc::Sender<Input>) {
    if let Some((columns, rows)) = terminal::size() {
        let _ = inputs.send(Input::Resize { columns, rows }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn run(chunks: Vec<Result<Chunk>>) -> Result<End> {
        let (sender, _receiver) = inputs();
        let session = Session {
            stdin: false,
            tty: false,
            detach: DetachKeys::parse("").expect("no keys"),
            signals: None,
        };
        session
            .run(sender, futures_util::stream::iter(chunks))
            .await
    }

    #[tokio::test]
    async fn the_exit_code_ends_a_session() {
        let end = run(vec![
            Ok(Chunk::Nothing),
            Ok(Chunk::Exited(7)),
            Ok(Chunk::Exited(8)),
        ])
        .await;
        assert_eq!(end.expect("no error"), End::Exited(7));
    }

    #[tokio::test]
    async fn a_stream_without_exit_code_is_told_apart_from_an_error() {
        assert_eq!(run(Vec::new()).await.expect("no error"), End::Closed);
        assert!(run(vec![Err(anyhow::anyhow!("broken"))]).await.is_err());
    }
}
