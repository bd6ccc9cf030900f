//! Port forwarding over WebSocket channels, as old clients do it: data and error for each port.

use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
};
use tokio_tungstenite::WebSocketStream;

use super::{Client, ForwardError, Place, forward};
use crate::service::streaming::{
    channel::{Activity, Gone, Outlet, inbox},
    websocket::{Coding, Connection},
};

/// Ports of one connection: each takes two channels.
pub(in crate::service::streaming) const PORTS: usize = 32;

/// Serves `ports`, each for one connection.
pub(in crate::service::streaming) async fn serve<T>(
    socket: WebSocketStream<T>,
    coding: Coding,
    ports: &[u16],
    activity: Activity,
    place: impl Fn() -> Result<Place, ForwardError>,
) where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut inboxes, mut data) = (Vec::new(), Vec::new());
    for _ in ports {
        let (sender, inbox) = inbox();
        inboxes.extend([Some(sender), None]);
        data.push(inbox);
    }
    let connection = Connection::new(socket, coding, inboxes, activity);
    // Dropping it breaks off what is still forwarded.
    let mut forwards = JoinSet::new();
    for ((channel, port), inbox) in (0..).step_by(2).zip(ports).zip(data) {
        let outlet = |channel| Outlet::new(connection.queue().clone(), channel);
        let client = Client {
            port: *port,
            inbox,
            outlet: outlet(channel),
            error: outlet(channel + 1),
            reset: connection.gone().clone(),
        };
        let place = place();
        forwards.spawn(async move {
            if introduce(&client).await.is_ok() {
                forward(place, client).await;
            }
        });
    }
    while forwards.join_next().await.is_some() {}
    connection.finish().await;
}

/// Each channel starts with its port.
async fn introduce(client: &Client) -> Result<(), Gone> {
    let port = client.port.to_le_bytes();
    for outlet in [&client.outlet, &client.error] {
        outlet.send(port.to_vec().into()).await?;
    }
    Ok(())
}
