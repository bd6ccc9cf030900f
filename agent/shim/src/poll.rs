//! The one epoll instance, and what its events are about.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::time::Timespec;

/// One of a container's output streams; a terminal has only the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout = 0,
    Stderr = 1,
}

/// What became ready. Numbers are serials of connections, containers, execs and clients, never
/// used again, so an event for something that is gone finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Listener,
    Signals,
    Connection(u32),
    ContainerReport(u32),
    ExecReport(u32),
    Output(u32, Stream),
    Input(u32),
    Client(u32, u32),
}

impl Token {
    fn encode(self) -> u64 {
        let pack = |kind: u64, first: u32, second: u32| {
            kind << 60 | u64::from(second & 0x0fff_ffff) << 32 | u64::from(first)
        };
        match self {
            Self::Listener => pack(0, 0, 0),
            Self::Signals => pack(1, 0, 0),
            Self::Connection(serial) => pack(2, serial, 0),
            Self::ContainerReport(serial) => pack(3, serial, 0),
            Self::ExecReport(serial) => pack(4, serial, 0),
            Self::Output(serial, stream) => pack(5, serial, stream as u32),
            Self::Input(serial) => pack(6, serial, 0),
            Self::Client(serial, client) => pack(7, serial, client),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "each part takes its own bits"
    )]
    fn decode(word: u64) -> Self {
        let (first, second) = (word as u32, (word >> 32) as u32 & 0x0fff_ffff);
        match word >> 60 {
            0 => Self::Listener,
            1 => Self::Signals,
            2 => Self::Connection(first),
            3 => Self::ContainerReport(first),
            4 => Self::ExecReport(first),
            5 if second == 0 => Self::Output(first, Stream::Stdout),
            5 => Self::Output(first, Stream::Stderr),
            6 => Self::Input(first),
            _ => Self::Client(first, second),
        }
    }
}

/// What to wait for; errors and hang-ups are always told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Nothing,
    Read,
    Write,
    ReadWrite,
}

impl Interest {
    fn flags(self) -> EventFlags {
        match self {
            Self::Nothing => EventFlags::empty(),
            Self::Read => EventFlags::IN,
            Self::Write => EventFlags::OUT,
            Self::ReadWrite => EventFlags::IN | EventFlags::OUT,
        }
    }
}

/// The epoll instance. Descriptors are taken out before they are closed: a child that was cloned
/// a moment ago may still hold a copy, which would keep the registration alive.
#[derive(Debug)]
pub(crate) struct Poll {
    epoll: OwnedFd,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
        })
    }

    pub(crate) fn watch(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        let data = EventData::new_u64(token.encode());
        Ok(epoll::add(&self.epoll, fd, data, interest.flags())?)
    }

    pub(crate) fn rewatch(
        &self,
        fd: impl AsFd,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        let data = EventData::new_u64(token.encode());
        Ok(epoll::modify(&self.epoll, fd, data, interest.flags())?)
    }

    /// Takes a descriptor out; that it was not in is fine.
    pub(crate) fn forget(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits for events, at most `limit` long, and puts them into `ready`.
    pub(crate) fn wait(&self, ready: &mut Vec<Token>, limit: Option<Duration>) -> io::Result<()> {
        let mut events: Vec<Event> = Vec::with_capacity(16);
        let limit = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        match epoll::wait(&self.epoll, spare_capacity(&mut events), limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        ready.extend(events.iter().map(|event| {
            let data = event.data;
            Token::decode(data.u64())
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_a_round_trip() {
        for token in [
            Token::Listener,
            Token::Signals,
            Token::Connection(u32::MAX),
            Token::ContainerReport(7),
            Token::ExecReport(u32::MAX),
            Token::Output(9, Stream::Stdout),
            Token::Output(u32::MAX, Stream::Stderr),
            Token::Input(3),
            Token::Client(u32::MAX, 0x0fff_ffff),
        ] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
