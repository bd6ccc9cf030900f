//! WebSocket connections of Kubernetes clients: channels in messages, or a SPDY connection inside.
//!
//! ```text
//!  channels   message = channel byte + bytes; base64: digit + text
//!             v5 only: 255, channel = no more bytes on that channel
//!  tunnel     messages joined = the byte stream of a SPDY connection
//! ```

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
    time::{interval, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::channel::{Activity, Gone, InboxSender, Out, PIECE, queue};

/// Longest message that is taken.
const MESSAGE_BYTES: usize = 4 << 20;
/// Time a client has to close the connection after our goodbye.
pub(super) const LINGER: Duration = Duration::from_secs(5);
/// Unread bytes between a tunnel and the connection inside.
const TUNNEL_BYTES: usize = 64 << 10;
/// As long as nothing is read, a pong is sent this often: clients count on it for life.
const PONG: Duration = Duration::from_secs(5);
/// Stands for a channel in the message that closes one.
const CLOSE_CHANNEL: u8 = 255;

/// Bounds for every connection.
pub(super) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(32 << 10)
        .write_buffer_size(0)
        .max_message_size(Some(MESSAGE_BYTES))
        .max_frame_size(Some(MESSAGE_BYTES))
}

/// How bytes are put in messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    /// As they are.
    Binary,
    /// As they are, and channels can be closed: v5.
    BinaryHalfClose,
    /// As text.
    Base64,
}

impl Coding {
    fn encode(self, channel: u32, bytes: &[u8]) -> Message {
        let channel = u8::try_from(channel).unwrap_or(CLOSE_CHANNEL);
        match self {
            Self::Binary | Self::BinaryHalfClose => {
                let mut message = BytesMut::with_capacity(1 + bytes.len());
                message.extend_from_slice(&[channel]);
                message.extend_from_slice(bytes);
                Message::Binary(message.freeze())
            }
            Self::Base64 => {
                let mut text = String::with_capacity(1 + bytes.len() * 4 / 3 + 4);
                text.push(char::from(b'0'.saturating_add(channel)));
                STANDARD.encode_string(bytes, &mut text);
                Message::text(text)
            }
        }
    }

    /// Channel and bytes; none for what is neither.
    fn decode(self, message: &[u8]) -> Option<Said> {
        let (first, rest) = message.split_first()?;
        match self {
            Self::BinaryHalfClose if *first == CLOSE_CHANNEL => {
                Some(Said::End(usize::from(*rest.first()?)))
            }
            // A copy: a slice would keep the buffer of the connection alive.
            Self::Binary | Self::BinaryHalfClose => Some(Said::Data(
                usize::from(*first),
                Bytes::copy_from_slice(rest),
            )),
            Self::Base64 => {
                let channel = usize::from(first.checked_sub(b'0')?);
                Some(Said::Data(channel, STANDARD.decode(rest).ok()?.into()))
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Said {
    Data(usize, Bytes),
    End(usize),
}

/// A client's connection with channels.
pub(super) struct Connection {
    queue: mpsc::Sender<Out>,
    gone: CancellationToken,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
}

impl Connection {
    /// Puts bytes of channel `n` into `inboxes[n]`, and drops those of others.
    pub(super) fn new<T>(
        socket: WebSocketStream<T>,
        coding: Coding,
        inboxes: Vec<Option<InboxSender>>,
        activity: Activity,
    ) -> Self
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (to, from) = socket.split();
        let (queue, outgoing) = queue();
        let gone = CancellationToken::new();
        let reader = Reader {
            from,
            coding,
            inboxes,
            activity: activity.clone(),
            queue: queue.clone(),
            gone: gone.clone(),
        };
        let (left, lost) = (gone.clone(), gone.clone());
        Self {
            queue,
            gone,
            reader: AbortOnDropHandle::new(tokio::spawn(async move {
                reader.run().await;
                left.cancel();
            })),
            writer: AbortOnDropHandle::new(tokio::spawn(async move {
                if write(to, coding, outgoing, activity).await.is_err() {
                    lost.cancel();
                }
            })),
        }
    }

    /// Where messages to the client go.
    pub(super) fn queue(&self) -> &mpsc::Sender<Out> {
        &self.queue
    }

    /// Cancelled when the client is gone.
    pub(super) fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Says goodbye after everything that was sent, and lets the client close.
    pub(super) async fn finish(self) {
        let Self {
            queue,
            gone,
            reader,
            writer,
        } = self;
        let orderly = async {
            if queue.send(Out::Goodbye).await.is_ok() && writer.await.is_ok() {
                // Whether it has closed or had its time, it's over.
                let _ = timeout(LINGER, reader).await;
            }
        };
        tokio::select! {
            () = orderly => {}
            () = gone.cancelled() => {}
        }
    }
}

struct Reader<T> {
    from: SplitStream<WebSocketStream<T>>,
    coding: Coding,
    inboxes: Vec<Option<InboxSender>>,
    activity: Activity,
    queue: mpsc::Sender<Out>,
    gone: CancellationToken,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Reader<T> {
    /// Reads until the client is gone. Pings are answered by the library while this reads.
    async fn run(mut self) {
        while let Some(message) = self.from.next().await {
            self.activity.touch();
            let message = match message {
                Ok(Message::Binary(bytes)) => bytes,
                Ok(Message::Text(text)) => text.into(),
                Ok(Message::Close(_)) => {
                    self.gone.cancel();
                    continue;
                }
                Ok(_) => continue,
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "client connection ended"
                    );
                    return;
                }
            };
            if self.handle(&message).await.is_err() {
                return;
            }
        }
    }

    async fn handle(&mut self, message: &[u8]) -> Result<(), Gone> {
        match self.coding.decode(message) {
            Some(Said::Data(channel, bytes)) => {
                if let Some(Some(inbox)) = self.inboxes.get(channel) {
                    inbox.put(bytes, &self.queue, &self.gone).await?;
                }
            }
            Some(Said::End(channel)) => {
                if let Some(inbox) = self.inboxes.get_mut(channel) {
                    *inbox = None;
                }
            }
            None => {}
        }
        Ok(())
    }
}

/// Writes until our goodbye.
async fn write<T>(
    mut to: SplitSink<WebSocketStream<T>, Message>,
    coding: Coding,
    mut outgoing: mpsc::Receiver<Out>,
    activity: Activity,
) -> Result<(), tungstenite::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(out) = outgoing.recv().await {
        let message = match out {
            Out::Data(channel, bytes) => coding.encode(channel, &bytes),
            Out::Beat => Message::Pong(Bytes::new()),
            Out::Goodbye => break,
            // The end of a channel is told by the end of the connection; the rest is SPDY's.
            Out::End(_) | Out::Accept(_) | Out::Reset(..) | Out::Echo(_) => continue,
        };
        to.send(message).await?;
        activity.touch();
    }
    to.send(goodbye()).await
}

fn goodbye() -> Message {
    Message::Close(Some(CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    }))
}

/// The byte stream inside of a connection, carried until either side ends.
pub(super) fn tunnel<T>(socket: WebSocketStream<T>) -> (DuplexStream, AbortOnDropHandle<()>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (near, far) = tokio::io::duplex(TUNNEL_BYTES);
    let carry = tokio::spawn(async move {
        let (mut to, mut from) = socket.split();
        let (mut inside, mut outside) = tokio::io::split(far);
        let stalled = AtomicBool::new(false);
        let inward = async {
            while let Some(Ok(message)) = from.next().await {
                let bytes = match message {
                    Message::Binary(bytes) => bytes,
                    Message::Close(_) => break,
                    _ => continue,
                };
                stalled.store(true, Ordering::Relaxed);
                if outside.write_all(&bytes).await.is_err() {
                    // The inner connection has ended; what the client still says is nobody's.
                    continue;
                }
                stalled.store(false, Ordering::Relaxed);
            }
            // The inner connection sees the end; it may be gone already.
            let _ = outside.shutdown().await;
            while from.next().await.is_some_and(|message| message.is_ok()) {}
        };
        let outward = async {
            let mut pong = interval(PONG);
            loop {
                let mut buffer = BytesMut::with_capacity(PIECE);
                // Both arms may be cancelled: reads take whole pieces.
                tokio::select! {
                    read = inside.read_buf(&mut buffer) => match read {
                        Ok(0) | Err(_) => return to.send(goodbye()).await,
                        Ok(_) => to.send(Message::Binary(buffer.freeze())).await?,
                    },
                    _ = pong.tick() => if stalled.load(Ordering::Relaxed) {
                        to.send(Message::Pong(Bytes::new())).await?;
                    },
                }
            }
        };
        let _ = tokio::join!(inward, outward);
    });
    (near, AbortOnDropHandle::new(carry))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_name_their_channel() {
        let cases: [(Coding, &[u8], Option<Said>); 9] = [
            (
                Coding::Binary,
                b"\0in",
                Some(Said::Data(0, Bytes::from_static(b"in"))),
            ),
            (Coding::Binary, b"\0", Some(Said::Data(0, Bytes::new()))),
            (Coding::Binary, b"", None),
            (
                Coding::Binary,
                b"\xff\0",
                Some(Said::Data(255, Bytes::from_static(b"\0"))),
            ),
            (Coding::BinaryHalfClose, b"\xff\0", Some(Said::End(0))),
            (Coding::BinaryHalfClose, b"\xff", None),
            (
                Coding::Base64,
                b"0aW4=",
                Some(Said::Data(0, Bytes::from_static(b"in"))),
            ),
            (Coding::Base64, b"0a?", None),
            (Coding::Base64, b"\x01aW4=", None),
        ];
        for (coding, message, expected) in cases {
            assert_eq!(coding.decode(message), expected, "{coding:?} {message:?}");
        }
    }

    #[test]
    fn output_names_its_channel() {
        assert_eq!(
            Coding::Binary.encode(1, b"out"),
            Message::Binary(Bytes::from_static(b"\x01out"))
        );
        assert_eq!(Coding::Base64.encode(1, b"in"), Message::text("1aW4="));
        assert_eq!(Coding::Base64.encode(3, b""), Message::text("3"));
    }

    proptest! {
        #[test]
        fn any_message_is_taken_or_dropped(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for coding in [Coding::Binary, Coding::BinaryHalfClose, Coding::Base64] {
                let _ = coding.decode(&bytes);
            }
        }
    }
}
