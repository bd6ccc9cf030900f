//! Exec and attach over WebSocket: the first byte of a message is the channel.

use std::future::Future;

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};
use tokio_tungstenite::WebSocketStream;

use super::{Client, Wanted, outcome::ErrorStyle, size::Sizes};
use crate::service::streaming::{
    channel::{Activity, Outlet, inbox},
    websocket::{Coding, Connection},
};

const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;
const ERROR: u32 = 3;

/// Serves one client with `run`, to the goodbye.
pub(in crate::service::streaming) async fn serve<T, F>(
    socket: WebSocketStream<T>,
    coding: Coding,
    wanted: Wanted,
    style: ErrorStyle,
    activity: Activity,
    run: impl FnOnce(Client) -> F,
) where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = ()>,
{
    let (to_stdin, stdin) = inbox();
    let (to_resize, resize) = inbox();
    let inboxes = vec![Some(to_stdin), None, None, None, Some(to_resize)];
    let connection = Connection::new(socket, coding, inboxes, activity);
    let outlet = |channel| Outlet::new(connection.queue().clone(), channel);
    let (tell, sizes) = watch::channel(None);
    let client = Client {
        stdin: wanted.stdin.then_some(stdin),
        stdout: wanted.stdout.then(|| outlet(STDOUT)),
        stderr: wanted.stderr.then(|| outlet(STDERR)),
        error: outlet(ERROR),
        sizes,
        style,
        gone: connection.gone().clone(),
    };
    // Clients of the old protocols take the first message as the sign that all is set up.
    let first = [&client.stdout, &client.stderr]
        .into_iter()
        .flatten()
        .next();
    if first.unwrap_or(&client.error).send_empty().await.is_ok() {
        let mut resize = Sizes::new(resize);
        let follow = async {
            while let Some(size) = resize.next().await {
                tell.send_replace(Some(size));
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = run(client) => {}
            () = follow => {}
        }
    }
    connection.finish().await;
}

// The channel of input is the first of the inboxes.
const _: () = assert!(STDIN == 0);
