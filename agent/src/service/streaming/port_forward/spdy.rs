//! Port forwarding over SPDY: a pair of streams, error and data, for each connection.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use tokio::{task::JoinSet, time::interval};

use super::{Client, ForwardError, Place, forward};
use crate::service::streaming::{
    channel::Gone,
    spdy::{Connection, Stream, reset},
};

/// Time a client has to complete a pair.
const CREATION: Duration = Duration::from_secs(30);

/// Serves a client's pairs until it is gone; `place` says where ports are at that moment.
pub(in crate::service::streaming) async fn serve(
    mut connection: Connection,
    place: impl Fn() -> Result<Place, ForwardError>,
) {
    let mut halves = Halves::default();
    // Dropping it breaks off what is still forwarded.
    let mut forwards = JoinSet::new();
    let mut tick = interval(Duration::from_secs(1));
    loop {
        // Every arm may be cancelled: streams wait in their queue.
        tokio::select! {
            stream = connection.accept() => {
                let Some(stream) = stream else { break };
                match halves.take(&connection, stream).await {
                    Ok(Some(client)) => { forwards.spawn(forward(place(), client)); }
                    Ok(None) => {}
                    Err(Gone) => break,
                }
            }
            Some(_) = forwards.join_next() => {}
            _ = tick.tick() => if halves.expire(&connection).await.is_err() { break },
        }
    }
    connection.finish().await;
}

/// What makes two streams a pair.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum PairId {
    /// The client says so.
    Request(String),
    /// Old clients do not: the data stream is opened right after this error stream.
    Error(u32),
}

/// Streams that wait for their other half.
#[derive(Default)]
struct Halves(HashMap<PairId, Half>);

struct Half {
    stream: Stream,
    port: u16,
    is_error: bool,
    until: Instant,
}

impl Halves {
    /// Takes or refuses a stream; gives a pair that is complete by it.
    async fn take(
        &mut self,
        connection: &Connection,
        stream: Stream,
    ) -> Result<Option<Client>, Gone> {
        let Some((pair, port, is_error)) = describe(&stream) else {
            connection.reset(stream.id, reset::REFUSED).await?;
            return Ok(None);
        };
        let Some(other) = self.0.remove(&pair) else {
            connection.welcome(stream.id).await?;
            let half = Half {
                stream,
                port,
                is_error,
                until: Instant::now() + CREATION,
            };
            self.0.insert(pair, half);
            return Ok(None);
        };
        if other.is_error == is_error || other.port != port {
            connection.reset(stream.id, reset::REFUSED).await?;
            self.0.insert(pair, other);
            return Ok(None);
        }
        connection.welcome(stream.id).await?;
        let (error, data) = if is_error {
            (stream, other.stream)
        } else {
            (other.stream, stream)
        };
        Ok(Some(Client {
            port,
            inbox: data.inbox,
            outlet: data.outlet,
            error: error.outlet,
            reset: data.reset,
        }))
    }

    /// Gives up on pairs that are not complete in time.
    async fn expire(&mut self, connection: &Connection) -> Result<(), Gone> {
        let now = Instant::now();
        let late: Vec<Half> = self
            .0
            .extract_if(|_, half| half.until <= now)
            .map(|(_, half)| half)
            .collect();
        for half in late {
            if half.is_error {
                let text = format!(
                    "the data stream for port {} was not opened in time",
                    half.port
                );
                half.stream.outlet.send(text.into()).await?;
                half.stream.outlet.end().await?;
            } else {
                connection.reset(half.stream.id, reset::CANCEL).await?;
            }
        }
        Ok(())
    }
}

/// The pair, port and kind of a stream; none if they are not said or not valid.
fn describe(stream: &Stream) -> Option<(PairId, u16, bool)> {
    let headers = &stream.headers;
    let port = headers
        .get("port")?
        .parse()
        .ok()
        .filter(|port| *port != 0)?;
    let is_error = match headers.get("streamtype")? {
        "error" => true,
        "data" => false,
        _ => return None,
    };
    let pair = match headers.get("requestid") {
        Some(request) => PairId::Request(request.to_owned()),
        None if is_error => PairId::Error(stream.id),
        None => PairId::Error(stream.id.checked_sub(2)?),
    };
    Some((pair, port, is_error))
}
