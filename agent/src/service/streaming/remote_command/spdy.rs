//! Exec and attach over SPDY: the client opens one stream for each channel.

use std::{future::Future, time::Duration};

use tokio::{sync::watch, time::timeout};

use super::{
    Client, Wanted,
    outcome::ErrorStyle,
    size::{Size, Sizes},
};
use crate::service::streaming::{
    channel::{Gone, Inbox, Outlet},
    spdy::{Connection, Stream, reset},
};

/// Time a client has to open its streams.
const CREATION: Duration = Duration::from_secs(30);

/// Serves one client with `run`, from the opening of its streams to the goodbye.
pub(in crate::service::streaming) async fn serve<F>(
    mut connection: Connection,
    wanted: Wanted,
    style: ErrorStyle,
    run: impl FnOnce(Client) -> F,
) where
    F: Future<Output = ()>,
{
    let mut opened = Opened {
        wanted,
        ..Opened::default()
    };
    match timeout(CREATION, opened.complete(&mut connection)).await {
        Ok(Ok(error)) => {
            let (tell, sizes) = watch::channel(None);
            let client = Client {
                stdin: opened.stdin.take(),
                stdout: opened.stdout.take(),
                stderr: opened.stderr.take(),
                error,
                sizes,
                style,
                gone: connection.gone().clone(),
            };
            tokio::select! {
                () = run(client) => {}
                () = opened.follow(&mut connection, &tell) => {}
            }
        }
        Ok(Err(Gone)) => {}
        Err(_) => tracing::debug!(?wanted, "the client did not open its streams in time"),
    }
    connection.finish().await;
}

/// Streams that the client has opened so far.
#[derive(Default)]
struct Opened {
    wanted: Wanted,
    seen: Vec<String>,
    error: Option<Outlet>,
    stdin: Option<Inbox>,
    stdout: Option<Outlet>,
    stderr: Option<Outlet>,
    resize: Option<Sizes>,
}

impl Opened {
    /// Takes streams until those that are needed are there; the error stream is given.
    ///
    /// Sizes may come later, or never from a client that has no terminal.
    async fn complete(&mut self, connection: &mut Connection) -> Result<Outlet, Gone> {
        loop {
            let stream = connection.accept().await.ok_or(Gone)?;
            self.take(connection, stream).await?;
            let all = (!self.wanted.stdin || self.stdin.is_some())
                && (!self.wanted.stdout || self.stdout.is_some())
                && (!self.wanted.stderr || self.stderr.is_some());
            if all && let Some(error) = self.error.take() {
                return Ok(error);
            }
        }
    }

    /// Follows sizes, and answers streams that come late. Ends only with the connection's task.
    async fn follow(&mut self, connection: &mut Connection, tell: &watch::Sender<Option<Size>>) {
        let mut open = true;
        loop {
            // Both arms may be cancelled: streams and sizes wait in their queues.
            let resize = self.resize.as_mut();
            tokio::select! {
                stream = connection.accept(), if open => match stream {
                    Some(stream) => open = self.take(connection, stream).await.is_ok(),
                    None => open = false,
                },
                size = next(resize) => match size {
                    Some(size) => { tell.send_replace(Some(size)); }
                    None => self.resize = None,
                },
            }
        }
    }

    async fn take(&mut self, connection: &Connection, stream: Stream) -> Result<(), Gone> {
        let kind = stream
            .headers
            .get("streamtype")
            .unwrap_or_default()
            .to_owned();
        let known = matches!(&*kind, "error" | "stdin" | "stdout" | "stderr" | "resize");
        if !known || self.seen.contains(&kind) {
            return connection.reset(stream.id, reset::REFUSED).await;
        }
        connection.welcome(stream.id).await?;
        match &*kind {
            "error" => self.error = Some(stream.outlet),
            "stdin" if self.wanted.stdin => self.stdin = Some(stream.inbox),
            "stdout" if self.wanted.stdout => self.stdout = Some(stream.outlet),
            "stderr" if self.wanted.stderr => self.stderr = Some(stream.outlet),
            "resize" => self.resize = Some(Sizes::new(stream.inbox)),
            // Not asked for in the call: a stream without bytes.
            _ => stream.outlet.end().await?,
        }
        self.seen.push(kind);
        Ok(())
    }
}

async fn next(sizes: Option<&mut Sizes>) -> Option<Size> {
    match sizes {
        Some(sizes) => sizes.next().await,
        None => std::future::pending().await,
    }
}
