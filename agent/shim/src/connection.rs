//! One connection of an agent: frames in, frames out, descriptors beside them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use longshore_sys::fd;
use prost::Message;

use crate::poll::{Interest, Poll, Token};
use crate::wire::{
    self, Event, FrameKind, HEADER_BYTES, Header, MAX_FRAME_BYTES, MAX_FRAME_FDS, Reply, Request,
};

/// Bytes that may wait for an agent that does not read; beyond that it is disconnected, and
/// learns all again when it comes back.
const MAX_QUEUE_BYTES: usize = MAX_FRAME_BYTES;

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) serial: u32,
    /// It has said hello: its wishes are served.
    pub(crate) greeted: bool,
    socket: OwnedFd,
    inbox: Inbox,
    outbox: VecDeque<Outgoing>,
    queued_bytes: usize,
    interest: Interest,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
    fds: Vec<OwnedFd>,
}

/// A wish, with what came beside it.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) stream: u32,
    pub(crate) request: Request,
    pub(crate) fds: VecDeque<OwnedFd>,
}

/// The peer broke the protocol or went away.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Hangup;

impl Connection {
    pub(crate) fn new(poll: &Poll, serial: u32, socket: OwnedFd) -> io::Result<Self> {
        fd::set_nonblocking(&socket, true)?;
        poll.watch(&socket, Token::Connection(serial), Interest::Read)?;
        Ok(Self {
            serial,
            greeted: false,
            socket,
            inbox: Inbox::default(),
            outbox: VecDeque::new(),
            queued_bytes: 0,
            interest: Interest::Read,
        })
    }

    /// Reads what has come and returns the whole requests in it.
    pub(crate) fn receive(&mut self, scratch: &mut [u8]) -> Result<Vec<Incoming>, Hangup> {
        match fd::recv_with_fds(&self.socket, scratch, MAX_FRAME_FDS) {
            Ok((0, _)) => Err(Hangup),
            Ok((count, fds)) => self.inbox.take(&scratch[..count], fds),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                Ok(Vec::new())
            }
            Err(_) => Err(Hangup),
        }
    }

    pub(crate) fn reply(&mut self, stream: u32, reply: &Reply, fds: Vec<OwnedFd>) {
        self.push(wire::frame(FrameKind::Reply, stream, reply), fds);
    }

    pub(crate) fn event(&mut self, event: &Event) {
        self.push(wire::frame(FrameKind::Event, 0, event), Vec::new());
    }

    fn push(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        self.queued_bytes += bytes.len();
        self.outbox.push_back(Outgoing {
            bytes,
            written: 0,
            fds,
        });
    }

    /// Writes what the socket takes.
    pub(crate) fn flush(&mut self, poll: &Poll) -> Result<(), Hangup> {
        while let Some(front) = self.outbox.front_mut() {
            let beside: Vec<BorrowedFd<'_>> = front.fds.iter().map(AsFd::as_fd).collect();
            match fd::send_with_fds(&self.socket, &front.bytes[front.written..], &beside) {
                Ok(count) => {
                    front.fds.clear();
                    front.written += count;
                    self.queued_bytes -= count;
                    if front.written == front.bytes.len() {
                        self.outbox.pop_front();
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) if self.queued_bytes <= MAX_QUEUE_BYTES => break,
                    _ => return Err(Hangup),
                },
            }
        }
        let interest = if self.outbox.is_empty() {
            Interest::Read
        } else {
            Interest::ReadWrite
        };
        if interest != self.interest {
            poll.rewatch(&self.socket, Token::Connection(self.serial), interest)
                .map_err(|_| Hangup)?;
            self.interest = interest;
        }
        Ok(())
    }

    pub(crate) fn close(self, poll: &Poll) {
        poll.forget(&self.socket);
    }
}

/// Bytes and descriptors on their way to becoming requests.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Inbox {
    fn take(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<Incoming>, Hangup> {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
        let mut requests = Vec::new();
        let mut at = 0;
        while let Some((length, incoming)) = self.next(at)? {
            requests.push(incoming);
            at += length;
        }
        if at == self.bytes.len() {
            self.bytes = Vec::new();
            // Descriptors come with the first byte of their frame, so these belong to none.
            if !self.fds.is_empty() {
                return Err(Hangup);
            }
        } else {
            self.bytes.drain(..at);
        }
        if self.fds.len() > MAX_FRAME_FDS {
            return Err(Hangup);
        }
        Ok(requests)
    }

    /// The request at `at` with the length of its frame; `None` while it is not complete.
    fn next(&mut self, at: usize) -> Result<Option<(usize, Incoming)>, Hangup> {
        let Some((header, rest)) = self.bytes[at..].split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(*header).ok_or(Hangup)?;
        // Streams of the agent are odd, as ttrpc has it; events are 0.
        if header.kind != FrameKind::Request || header.stream == 0 {
            return Err(Hangup);
        }
        let length = header.length as usize;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let request = Request::decode(payload).map_err(|_| Hangup)?;
        let wanted = request.fds as usize;
        if request.ask.is_none() || wanted > MAX_FRAME_FDS || wanted > self.fds.len() {
            return Err(Hangup);
        }
        let fds = self.fds.drain(..wanted).collect();
        let incoming = Incoming {
            stream: header.stream,
            request,
            fds,
        };
        Ok(Some((HEADER_BYTES + length, incoming)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Ask, Empty, Hello};

    fn hello(fds: u32) -> Vec<u8> {
        let request = Request {
            fds,
            ask: Some(Ask::Hello(Hello { version: 1 })),
        };
        wire::frame(FrameKind::Request, 1, &request)
    }

    fn fds(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| fd::pipe().expect("pipe").0).collect()
    }

    #[test]
    fn requests_are_found_in_any_partition_of_the_bytes() {
        let bytes = [hello(0), hello(0), hello(0)].concat();
        for size in 1..bytes.len() {
            let mut inbox = Inbox::default();
            let mut found = 0;
            for chunk in bytes.chunks(size) {
                found += inbox.take(chunk, Vec::new()).expect("well formed").len();
            }
            assert_eq!(found, 3, "in chunks of {size}");
            assert!(inbox.bytes.is_empty());
        }
    }

    #[test]
    fn descriptors_go_to_the_frames_that_name_them() {
        let mut inbox = Inbox::default();
        let bytes = [hello(0), hello(2)].concat();
        assert!(
            inbox
                .take(&bytes[..1], Vec::new())
                .expect("partial")
                .is_empty()
        );
        let requests = inbox.take(&bytes[1..], fds(2)).expect("well formed");
        let counts: Vec<_> = requests.iter().map(|incoming| incoming.fds.len()).collect();
        assert_eq!(counts, [0, 2]);
    }

    #[test]
    fn hostile_frames_end_the_connection() {
        let empty = wire::frame(FrameKind::Request, 1, &Request::default());
        let reply = wire::frame(FrameKind::Reply, 1, &Empty {});
        let event_stream = wire::frame(FrameKind::Request, 0, &Request::default());
        let mut long = hello(0);
        long[0] = 0xff;
        let garbage = wire::Header {
            length: 4,
            stream: 1,
            kind: FrameKind::Request,
        };
        let garbage = [&garbage.encode()[..], &[0xff; 4]].concat();
        let cases: [(&str, Vec<u8>, usize); 8] = [
            ("without a wish", empty, 0),
            ("a reply", reply, 0),
            ("stream of events", event_stream, 0),
            ("too long", long, 0),
            ("no protobuf", garbage, 0),
            ("fewer descriptors", hello(1), 0),
            ("more descriptors", hello(0), 1),
            ("absurd count", hello(u32::MAX), 2),
        ];
        for (name, bytes, beside) in cases {
            let mut inbox = Inbox::default();
            assert!(inbox.take(&bytes, fds(beside)).is_err(), "{name}");
        }
    }
}
