//! Byte channels between a client's connection and what serves it, the same for SPDY and WebSocket.
//!
//! ```text
//!  reader --> InboxSender ~~> Inbox          one per channel, bounded in bytes
//!  writer <-- queue of Out <~~ Outlet        one queue per connection, bounded in messages, fair
//! ```
//! Neither protocol has flow control of its own, so a full inbox holds up the connection's reader,
//! and thereby the client; a client that does not read holds up its outlets, and so the process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

/// Bytes of one channel that wait for their reader.
const INBOX_BYTES: usize = 1 << 20;
/// What a waiting piece costs beside its bytes, so that many small ones are bounded too.
const PIECE_COST: usize = 128;
/// Messages that wait to be written to one connection; each has at most [`PIECE`] bytes.
const QUEUE: usize = 8;
/// Longest piece that is sent at once: no channel keeps the connection for long.
pub(super) const PIECE: usize = 32 << 10;
/// While the reader is held up, something harmless is sent this often: a client that is gone
/// answers with a reset, one that is there sees life.
const BEAT: Duration = Duration::from_secs(5);

/// What is written to a client.
#[derive(Debug)]
pub(super) enum Out {
    /// Bytes of a channel.
    Data(u32, Bytes),
    /// No more bytes of a channel.
    End(u32),
    /// A stream of the client is accepted. SPDY only.
    Accept(u32),
    /// A stream is refused or broken off. SPDY only.
    Reset(u32, u32),
    /// Answer to a ping. SPDY only: WebSocket has its own.
    Echo(u32),
    /// Nothing, but on the wire.
    Beat,
    /// The connection ends.
    Goodbye,
}

/// The client is gone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// What waits to be written to one connection.
pub(super) fn queue() -> (mpsc::Sender<Out>, mpsc::Receiver<Out>) {
    mpsc::channel(QUEUE)
}

/// Where bytes for one channel of the client go.
#[derive(Clone, Debug)]
pub(super) struct Outlet {
    queue: mpsc::Sender<Out>,
    channel: u32,
}

impl Outlet {
    pub(super) fn new(queue: mpsc::Sender<Out>, channel: u32) -> Self {
        Self { queue, channel }
    }

    /// Sends all of `bytes`, in pieces; waits while the client reads slower than this.
    pub(super) async fn send(&self, mut bytes: Bytes) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE));
            self.put(Out::Data(self.channel, piece)).await?;
        }
        Ok(())
    }

    /// Sends a message without bytes, which some protocols give a meaning.
    pub(super) async fn send_empty(&self) -> Result<(), Gone> {
        self.put(Out::Data(self.channel, Bytes::new())).await
    }

    /// No more bytes.
    pub(super) async fn end(&self) -> Result<(), Gone> {
        self.put(Out::End(self.channel)).await
    }

    async fn put(&self, out: Out) -> Result<(), Gone> {
        self.queue.send(out).await.map_err(|_| Gone)
    }
}

/// Bytes of one channel, from the client.
#[derive(Debug)]
pub(super) struct Inbox {
    pieces: mpsc::UnboundedReceiver<(Bytes, OwnedSemaphorePermit)>,
}

impl Inbox {
    /// The next bytes; none at the end. Cancelling loses nothing.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        self.pieces.recv().await.map(|(bytes, _room)| bytes)
    }
}

/// The connection's side of an [`Inbox`]; dropping it is the end of the bytes.
#[derive(Clone, Debug)]
pub(super) struct InboxSender {
    // Bounded by `room`, in bytes rather than in pieces.
    pieces: mpsc::UnboundedSender<(Bytes, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
}

/// An empty inbox.
pub(super) fn inbox() -> (InboxSender, Inbox) {
    let (sender, pieces) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(INBOX_BYTES));
    (
        InboxSender {
            pieces: sender,
            room,
        },
        Inbox { pieces },
    )
}

impl InboxSender {
    /// Puts `bytes` in, when there is room; drops them if nobody reads any more.
    ///
    /// # Errors
    /// `Gone` when `gone` is cancelled while waiting.
    pub(super) async fn put(
        &self,
        bytes: Bytes,
        queue: &mpsc::Sender<Out>,
        gone: &CancellationToken,
    ) -> Result<(), Gone> {
        if bytes.is_empty() || self.pieces.is_closed() {
            return Ok(());
        }
        let cost = (bytes.len() + PIECE_COST).min(INBOX_BYTES);
        let cost = u32::try_from(cost).expect("an inbox is far below 4 GiB");
        let room = Arc::clone(&self.room).acquire_many_owned(cost);
        tokio::pin!(room);
        let room = loop {
            // The place in the line for room is kept: `room` lives across the turns.
            tokio::select! {
                room = &mut room => break room.expect("this semaphore is never closed"),
                () = gone.cancelled() => return Err(Gone),
                () = sleep(BEAT) => {
                    // A full queue has something better to tell the client.
                    let _ = queue.try_send(Out::Beat);
                }
            }
        };
        // A reader that left wants no more: not an error of the connection.
        let _ = self.pieces.send((bytes, room));
        Ok(())
    }
}

/// When a connection was last used, in either direction.
#[derive(Clone, Debug)]
pub(super) struct Activity {
    began: Instant,
    last_ms: Arc<AtomicU64>,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            last_ms: Arc::default(),
        }
    }

    pub(super) fn touch(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Ends when nothing was sent or received for `limit`.
    pub(super) async fn idle(&self, limit: Duration) {
        loop {
            let idle = self
                .now_ms()
                .saturating_sub(self.last_ms.load(Ordering::Relaxed));
            match limit.checked_sub(Duration::from_millis(idle)) {
                Some(left) if !left.is_zero() => sleep(left).await,
                _ => return,
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_inbox_holds_up_its_sender_until_it_is_read() {
        let (sender, mut inbox) = inbox();
        let (queue, _writer) = queue();
        let gone = CancellationToken::new();
        let piece = Bytes::from(vec![0; INBOX_BYTES / 2]);
        sender
            .put(piece.clone(), &queue, &gone)
            .await
            .expect("room");
        let mut second = Box::pin(sender.put(piece.clone(), &queue, &gone));
        let blocked = tokio::time::timeout(Duration::from_millis(20), &mut second).await;
        assert!(blocked.is_err(), "there is no room");
        assert_eq!(inbox.next().await.expect("bytes").len(), piece.len());
        second.as_mut().await.expect("room again");
        drop(second);
        drop(sender);
        assert_eq!(inbox.next().await.expect("bytes").len(), piece.len());
        assert_eq!(inbox.next().await, None);
    }

    #[tokio::test]
    async fn a_sender_that_waits_sees_the_reader_and_the_client_leave() {
        let (sender, inbox) = inbox();
        let (queue, _writer) = queue();
        let gone = CancellationToken::new();
        let piece = Bytes::from(vec![0; INBOX_BYTES]);
        sender
            .put(piece.clone(), &queue, &gone)
            .await
            .expect("room");
        let waiting = sender.put(piece.clone(), &queue, &gone);
        let (put, ()) = tokio::join!(waiting, async { gone.cancel() });
        assert_eq!(put, Err(Gone));
        let alive = CancellationToken::new();
        let waiting = sender.put(piece.clone(), &queue, &alive);
        let (put, ()) = tokio::join!(waiting, async { drop(inbox) });
        assert_eq!(put, Ok(()));
        assert_eq!(
            sender.put(piece, &queue, &alive).await,
            Ok(()),
            "dropped at once"
        );
    }

    #[tokio::test]
    async fn long_output_goes_out_in_pieces() {
        let (queue, mut writer) = queue();
        let outlet = Outlet::new(queue, 3);
        outlet
            .send(Bytes::from(vec![1; PIECE + 1]))
            .await
            .expect("writer lives");
        outlet.end().await.expect("writer lives");
        let mut lengths = Vec::new();
        while let Ok(out) = writer.try_recv() {
            match out {
                Out::Data(3, bytes) => lengths.push(bytes.len()),
                Out::End(3) => lengths.push(0),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(lengths, [PIECE, 1, 0]);
    }
}
