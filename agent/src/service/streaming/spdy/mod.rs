//! SPDY/3.1 as Kubernetes clients speak it: the server's side of one connection.
//!
//! ```text
//!  socket --> reader task: Decoder --> Stream (inbox)  --> accept()
//!  socket <-- writer task: Encoder <-- queue of Out    <-- outlets
//! ```
//! Invariants
//! - Streams share one connection without flow control. A stream whose inbox is full holds up the
//!   reader, hence the client; before that, each has a megabyte of its own.
//! - Every header block passes the inflater, whatever becomes of its stream.
//! - When the client leaves, every stream's `reset` is cancelled.

mod dictionary;
mod frame;
mod headers;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf},
    sync::mpsc,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

#[cfg(not(test))]
use self::frame::Encoder;
#[cfg(test)]
pub(super) use self::frame::Encoder;
use self::frame::{Decoder, Frame, FrameError};
#[cfg(test)]
pub(super) use self::headers::Inflater;
pub(super) use self::{frame::reset, headers::Headers};
use super::channel::{Activity, Gone, Inbox, InboxSender, Out, Outlet, inbox, queue};

/// Streams of one connection at once.
const STREAMS: usize = 4096;
/// Streams that wait to be accepted.
const INCOMING: usize = 16;
/// Bytes that are read at once.
const READ: usize = 64 << 10;
/// Bytes that are gathered before they are written.
const WRITE: usize = 64 << 10;
/// Time a client has to close the connection after our goodbye. Closing it first, with its bytes
/// unread, would take from it what it has not read yet.
const LINGER: Duration = Duration::from_secs(5);

/// A client's connection.
pub(super) struct Connection {
    incoming: mpsc::Receiver<Stream>,
    queue: mpsc::Sender<Out>,
    gone: CancellationToken,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
}

/// A stream that a client opened; it waits to be accepted or refused.
pub(super) struct Stream {
    /// Its number.
    pub(super) id: u32,
    /// What the client says of it.
    pub(super) headers: Headers,
    /// Bytes from the client.
    pub(super) inbox: Inbox,
    /// Bytes to the client.
    pub(super) outlet: Outlet,
    /// Cancelled when the client breaks it off or is gone.
    pub(super) reset: CancellationToken,
}

impl Connection {
    /// Speaks with the client at the other end of `socket`.
    pub(super) fn new<T>(socket: T, activity: Activity) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (from, to) = tokio::io::split(socket);
        let (queue, outgoing) = queue();
        let (arrived, incoming) = mpsc::channel(INCOMING);
        let gone = CancellationToken::new();
        let streams = Arc::new(Mutex::new(Streams::default()));
        let reader = Reader {
            from,
            activity: activity.clone(),
            streams: Arc::clone(&streams),
            arrived,
            queue: queue.clone(),
            gone: gone.clone(),
        };
        let writer = Writer {
            to,
            activity,
            streams,
            encoder: Encoder::new(),
        };
        let left = gone.clone();
        Self {
            incoming,
            queue,
            reader: AbortOnDropHandle::new(tokio::spawn(async move {
                let gone = reader.gone.clone();
                if let Err(error) = reader.run().await {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "client connection ended"
                    );
                }
                gone.cancel();
            })),
            writer: AbortOnDropHandle::new(tokio::spawn(async move {
                if writer.run(outgoing).await.is_err() {
                    left.cancel();
                }
            })),
            gone,
        }
    }

    /// The next stream that the client opens; none when it is gone. Cancelling loses nothing.
    pub(super) async fn accept(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// Takes a stream: the client waits for this before it opens the next.
    pub(super) async fn welcome(&self, id: u32) -> Result<(), Gone> {
        self.put(Out::Accept(id)).await
    }

    /// Refuses a stream or breaks it off.
    pub(super) async fn reset(&self, id: u32, status: u32) -> Result<(), Gone> {
        self.put(Out::Reset(id, status)).await
    }

    /// Cancelled when the client is gone.
    pub(super) fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Says goodbye after everything that was sent, and lets the client close.
    pub(super) async fn finish(self) {
        let Self {
            incoming,
            queue,
            gone,
            reader,
            writer,
        } = self;
        // The reader waits for nobody to accept while it reads on.
        drop(incoming);
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

    async fn put(&self, out: Out) -> Result<(), Gone> {
        self.queue.send(out).await.map_err(|_| Gone)
    }
}

/// Streams that are not closed in both directions.
#[derive(Default)]
struct Streams {
    open: HashMap<u32, Open>,
    last: u32,
}

struct Open {
    /// None after the client's last byte.
    inbox: Option<InboxSender>,
    /// False after our last byte.
    sending: bool,
    reset: CancellationToken,
}

impl Streams {
    fn client_ended(&mut self, id: u32) {
        if let Some(open) = self.open.get_mut(&id) {
            open.inbox = None;
            if !open.sending {
                self.open.remove(&id);
            }
        }
    }

    fn we_ended(&mut self, id: u32) {
        if let Some(open) = self.open.get_mut(&id) {
            open.sending = false;
            if open.inbox.is_none() {
                self.open.remove(&id);
            }
        }
    }

    fn reset(&mut self, id: u32) {
        if let Some(open) = self.open.remove(&id) {
            open.reset.cancel();
        }
    }
}

/// What becomes of a stream that a client wants to open.
enum Opening {
    New(Stream),
    Refused(u32),
}

struct Reader<T> {
    from: ReadHalf<T>,
    activity: Activity,
    streams: Arc<Mutex<Streams>>,
    arrived: mpsc::Sender<Stream>,
    queue: mpsc::Sender<Out>,
    gone: CancellationToken,
}

/// Why nothing more is read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("cannot read")]
    Io(#[from] io::Error),
    #[error("the client breaks the protocol")]
    Frame(#[from] FrameError),
}

impl<T: AsyncRead + AsyncWrite> Reader<T> {
    /// Reads until the client is gone.
    async fn run(mut self) -> Result<(), ReadError> {
        let mut decoder = Decoder::new();
        let mut buffer = BytesMut::with_capacity(READ);
        loop {
            while let Some(frame) = decoder.next(&mut buffer)? {
                if self.handle(frame).await.is_err() {
                    return Ok(());
                }
            }
            buffer.reserve(READ);
            let read = tokio::select! {
                read = self.from.read_buf(&mut buffer) => read?,
                () = self.gone.cancelled() => return Ok(()),
            };
            if read == 0 {
                return Ok(());
            }
            self.activity.touch();
        }
    }

    async fn handle(&mut self, frame: Frame) -> Result<(), Gone> {
        match frame {
            Frame::Open { id, fin, headers } => match self.open(id, fin, headers) {
                // Nobody accepts any more after our goodbye.
                Opening::New(stream) => {
                    let _ = self.arrived.send(stream).await;
                }
                Opening::Refused(status) => self.say(Out::Reset(id, status)).await,
            },
            Frame::Data { id, fin, bytes } => {
                let inbox = self
                    .streams()
                    .open
                    .get(&id)
                    .and_then(|open| open.inbox.clone());
                if let Some(inbox) = inbox {
                    inbox.put(bytes, &self.queue, &self.gone).await?;
                }
                if fin {
                    self.streams().client_ended(id);
                }
            }
            Frame::Reset { id } => self.streams().reset(id),
            Frame::Ping { id } => self.say(Out::Echo(id)).await,
            // It opens no more streams; those that are open go on until it closes.
            Frame::GoAway => {}
        }
        Ok(())
    }

    fn open(&self, id: u32, fin: bool, headers: Headers) -> Opening {
        let mut streams = self.streams();
        if id.is_multiple_of(2) || id <= streams.last {
            return Opening::Refused(reset::PROTOCOL);
        }
        streams.last = id;
        if streams.open.len() >= STREAMS {
            return Opening::Refused(reset::REFUSED);
        }
        let (sender, inbox) = inbox();
        let reset = self.gone.child_token();
        streams.open.insert(
            id,
            Open {
                inbox: (!fin).then_some(sender),
                sending: true,
                reset: reset.clone(),
            },
        );
        Opening::New(Stream {
            id,
            headers,
            inbox,
            outlet: Outlet::new(self.queue.clone(), id),
            reset,
        })
    }

    async fn say(&mut self, out: Out) {
        // After our goodbye nothing is said any more.
        let _ = self.queue.send(out).await;
    }

    fn streams(&self) -> std::sync::MutexGuard<'_, Streams> {
        self.streams
            .lock()
            .expect("no panic while this lock is held")
    }
}

struct Writer<T> {
    to: WriteHalf<T>,
    activity: Activity,
    streams: Arc<Mutex<Streams>>,
    encoder: Encoder,
}

impl<T: AsyncRead + AsyncWrite> Writer<T> {
    /// Writes until our goodbye.
    async fn run(mut self, mut outgoing: mpsc::Receiver<Out>) -> io::Result<()> {
        let mut wire = BytesMut::new();
        while let Some(out) = outgoing.recv().await {
            let mut last = self.encode(&mut wire, out);
            while wire.len() < WRITE
                && !last
                && let Ok(out) = outgoing.try_recv()
            {
                last = self.encode(&mut wire, out);
            }
            self.to.write_all(&wire).await?;
            self.activity.touch();
            wire.clear();
            if last {
                break;
            }
        }
        self.to.shutdown().await
    }

    /// Appends it; true if it is the last.
    fn encode(&mut self, wire: &mut BytesMut, out: Out) -> bool {
        let mut streams = self
            .streams
            .lock()
            .expect("no panic while this lock is held");
        match out {
            Out::Data(id, bytes) => {
                // A stream that was reset takes no more bytes, and the client knows.
                if streams.open.get(&id).is_some_and(|open| open.sending) {
                    self.encoder.data(wire, id, false, &bytes);
                }
            }
            Out::End(id) => {
                if streams.open.get(&id).is_some_and(|open| open.sending) {
                    streams.we_ended(id);
                    self.encoder.data(wire, id, true, &[]);
                }
            }
            Out::Accept(id) => self.encoder.reply(wire, id),
            Out::Reset(id, status) => {
                streams.reset(id);
                self.encoder.reset(wire, id, status);
            }
            Out::Echo(id) => self.encoder.ping(wire, id),
            Out::Beat => self.encoder.beat(wire),
            Out::Goodbye => {
                self.encoder.go_away(wire, streams.last);
                return true;
            }
        }
        false
    }
}
