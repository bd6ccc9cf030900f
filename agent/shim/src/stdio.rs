//! Stdio of one container: its pipes or terminal, its log, and the clients attached to it.
//!
//! ```text
//!   container --stdout, stderr--> [ shim ] --> log
//!                                    |-------> client (bounded queue each)
//!   container <------- stdin ------- [    ] <- client
//! ```
//! Output is read whether anybody wants it or not. A client that reads slower than the container
//! writes holds it back once [`FULL_QUEUE_BYTES`] wait for it; one that then reads nothing at all
//! for [`STUCK_NS`] is detached, so nobody holds a container up for longer. Input is read from
//! clients only as fast as the container takes it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use longshore_sys::fd;
use rustix::io::Errno;
use rustix::pty::OpenptFlags;

use crate::exit::boot_ns;
use crate::log::{LogFile, Partial};
use crate::poll::{Interest, Poll, Stream, Token};

/// Bytes waiting for a client at which the container is held back.
const FULL_QUEUE_BYTES: usize = 1 << 20;

/// How long a full client may take nothing.
const STUCK_NS: u64 = 3_000_000_000;

/// Most bytes taken from a container at its end: more than pipe and terminal hold, but not for
/// ever if something else goes on writing.
const MAX_DRAIN_BYTES: usize = 4 << 20;

/// Bytes read at once.
pub(crate) const READ_BYTES: usize = 64 << 10;

/// Stdio of one container.
#[derive(Debug)]
pub(crate) struct Stdio {
    owner: u32,
    outputs: [Option<OwnedFd>; 2],
    partials: [Partial; 2],
    terminal: Option<Terminal>,
    input: Option<Input>,
    stdin_once: bool,
    log: Option<LogFile>,
    /// The end of what a console has shown.
    shown: Ring,
    clients: Vec<Client>,
    next_client: u32,
    /// Outputs are not read until the clients have caught up.
    held_back: bool,
}

/// What keeps a terminal usable while the program is between two openings of it.
#[derive(Debug)]
struct Terminal {
    /// The program's side, held open so that reading does not end. Gone once the program is.
    program: Option<OwnedFd>,
}

#[derive(Debug)]
struct Input {
    fd: OwnedFd,
    queue: VecDeque<u8>,
}

/// One descriptor of an attached client.
#[derive(Debug)]
struct Client {
    serial: u32,
    fd: OwnedFd,
    role: Role,
}

#[derive(Debug)]
enum Role {
    Reads {
        stream: Stream,
        queue: VecDeque<u8>,
        /// Nothing more will come: it is closed once the queue is empty.
        closing: bool,
        /// Boot clock when it last took something, or had nothing to take.
        took_ns: u64,
    },
    Writes,
}

impl Stdio {
    /// Takes the shim's ends of a container's pipes.
    pub(crate) fn new(
        owner: u32,
        log: Option<LogFile>,
        stdin_once: bool,
        ring_bytes: usize,
    ) -> Self {
        Self {
            owner,
            outputs: [None, None],
            partials: [Partial::default(), Partial::default()],
            terminal: None,
            input: None,
            stdin_once,
            log,
            shown: Ring::new(ring_bytes),
            clients: Vec::new(),
            next_client: 0,
            held_back: false,
        }
    }

    /// Takes the shim's ends of pipes and begins to read.
    pub(crate) fn set_pipes(
        &mut self,
        poll: &Poll,
        input: Option<OwnedFd>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    ) -> std::io::Result<()> {
        if let Some(fd) = input {
            fd::set_nonblocking(&fd, true)?;
            self.input = Some(Input {
                fd,
                queue: VecDeque::new(),
            });
        }
        self.set_output(poll, Stream::Stdout, stdout)?;
        self.set_output(poll, Stream::Stderr, stderr)
    }

    /// Takes the controlling side of a terminal and begins to read.
    pub(crate) fn set_terminal(
        &mut self,
        poll: &Poll,
        controlling: OwnedFd,
        takes_input: bool,
    ) -> std::io::Result<()> {
        self.terminal = Some(Terminal {
            program: open_program_side(controlling.as_fd()).ok(),
        });
        if takes_input {
            // A copy of its own: epoll then tells reading and writing apart.
            let fd = controlling.try_clone()?;
            self.input = Some(Input {
                fd,
                queue: VecDeque::new(),
            });
        }
        self.set_output(poll, Stream::Stdout, controlling)
    }

    fn set_output(&mut self, poll: &Poll, stream: Stream, fd: OwnedFd) -> std::io::Result<()> {
        fd::set_nonblocking(&fd, true)?;
        poll.watch(&fd, Token::Output(self.owner, stream), Interest::Read)?;
        self.outputs[stream as usize] = Some(fd);
        Ok(())
    }

    /// Stops or resumes reading outputs as the queues demand. A held back output is taken out of
    /// the poll, which would tell a hang-up again and again.
    fn hold_back_or_resume(&mut self, poll: &Poll) {
        let full = self
            .clients
            .iter()
            .any(|client| client.stuck_at_ns().is_some());
        if full == self.held_back {
            return;
        }
        self.held_back = full;
        for (fd, stream) in self.outputs.iter().zip([Stream::Stdout, Stream::Stderr]) {
            match fd {
                Some(fd) if full => poll.forget(fd),
                // Cannot fail but for want of memory.
                Some(fd) => drop(poll.watch(fd, Token::Output(self.owner, stream), Interest::Read)),
                None => {}
            }
        }
    }

    /// Boot clock when a client will have to be detached.
    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        self.clients.iter().filter_map(Client::stuck_at_ns).min()
    }

    /// Detaches clients that take nothing.
    pub(crate) fn detach_stuck(&mut self, poll: &Poll, now_ns: u64) {
        let stuck = |client: &Client| client.stuck_at_ns().is_some_and(|at| at <= now_ns);
        if self.clients.iter().any(stuck) {
            self.clients.retain(|client| {
                if stuck(client) {
                    poll.forget(&client.fd);
                }
                !stuck(client)
            });
            self.hold_back_or_resume(poll);
        }
    }

    /// The controlling side of the terminal.
    pub(crate) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.terminal.as_ref()?;
        self.outputs[0].as_ref().map(AsFd::as_fd)
    }

    /// Goes on with another log file; `false` if this container has no log.
    pub(crate) fn reopen_log(&mut self, file: OwnedFd) -> bool {
        self.log.as_mut().map(|log| log.reopen(file)).is_some()
    }

    /// Reads once from a stream that is ready.
    pub(crate) fn on_output(&mut self, poll: &Poll, stream: Stream, scratch: &mut [u8]) {
        self.read_once(poll, stream, scratch);
    }

    /// Takes all that the container has written so far, because it ended.
    pub(crate) fn drain(&mut self, poll: &Poll, scratch: &mut [u8]) {
        if let Some(terminal) = &mut self.terminal {
            terminal.program = None;
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            let mut taken = 0;
            while taken < MAX_DRAIN_BYTES {
                match self.read_once(poll, stream, scratch) {
                    0 => break,
                    count => taken += count,
                }
            }
        }
        // What descendants write from here on goes to the log only.
        for client in &mut self.clients {
            if let Role::Reads { closing, .. } = &mut client.role {
                *closing = true;
            }
        }
        self.close_input(poll);
        self.sweep_clients(poll);
    }

    /// Bytes read; 0 when there are none now or any more.
    fn read_once(&mut self, poll: &Poll, stream: Stream, scratch: &mut [u8]) -> usize {
        let Some(fd) = &self.outputs[stream as usize] else {
            return 0;
        };
        match rustix::io::read(fd, &mut *scratch) {
            Ok(0) => self.end_output(poll, stream),
            Ok(count) => {
                self.deliver(poll, stream, &scratch[..count]);
                return count;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::IO) if self.reopen_program_side() => {}
            Err(_) => self.end_output(poll, stream),
        }
        0
    }

    /// A program may hang up its own terminal (an init does so before it runs a getty): opening
    /// the other side once more makes it usable again. Not so when the program has ended.
    fn reopen_program_side(&mut self) -> bool {
        let (Some(terminal), Some(controlling)) = (&mut self.terminal, &self.outputs[0]) else {
            return false;
        };
        if terminal.program.is_none() {
            return false;
        }
        terminal.program = open_program_side(controlling.as_fd()).ok();
        terminal.program.is_some()
    }

    fn deliver(&mut self, poll: &Poll, stream: Stream, chunk: &[u8]) {
        if let Some(log) = &mut self.log {
            log.append(stream, &mut self.partials[stream as usize], chunk);
        }
        self.shown.push(chunk);
        for client in &mut self.clients {
            client.offer(poll, self.owner, stream, chunk);
        }
        self.sweep_clients(poll);
    }

    fn end_output(&mut self, poll: &Poll, stream: Stream) {
        if let Some(fd) = self.outputs[stream as usize].take() {
            poll.forget(&fd);
        }
        if let Some(log) = &mut self.log {
            log.finish(stream, &mut self.partials[stream as usize]);
        }
        for client in &mut self.clients {
            if let Role::Reads {
                stream: of,
                closing,
                ..
            } = &mut client.role
            {
                *closing |= *of == stream;
            }
        }
        self.sweep_clients(poll);
    }

    /// Connects one descriptor of a client that gets the output of `stream` from now on, or with
    /// what a console has shown before it.
    pub(crate) fn attach_reader(
        &mut self,
        poll: &Poll,
        fd: OwnedFd,
        stream: Stream,
        replay: bool,
    ) -> std::io::Result<()> {
        let queue = match stream {
            Stream::Stdout if replay => self.shown.bytes.clone(),
            _ => VecDeque::new(),
        };
        let has_more = !queue.is_empty();
        let role = Role::Reads {
            stream,
            queue,
            closing: self.outputs[stream as usize].is_none(),
            took_ns: boot_ns(),
        };
        self.attach(poll, fd, role, Interest::Nothing)?;
        if let (true, Some(client)) = (has_more, self.clients.last_mut()) {
            client.pump(poll, self.owner);
        }
        self.sweep_clients(poll);
        Ok(())
    }

    /// Connects one descriptor of a client that gives input.
    pub(crate) fn attach_writer(&mut self, poll: &Poll, fd: OwnedFd) -> std::io::Result<()> {
        // Without a stdin the descriptor is closed at once, which the client sees.
        match &self.input {
            Some(input) if input.queue.is_empty() => {
                self.attach(poll, fd, Role::Writes, Interest::Read)
            }
            Some(_) => self.attach(poll, fd, Role::Writes, Interest::Nothing),
            None => Ok(()),
        }
    }

    fn attach(
        &mut self,
        poll: &Poll,
        fd: OwnedFd,
        role: Role,
        interest: Interest,
    ) -> std::io::Result<()> {
        fd::set_nonblocking(&fd, true)?;
        let serial = self.next_client & 0x0fff_ffff;
        self.next_client = self.next_client.wrapping_add(1);
        poll.watch(&fd, Token::Client(self.owner, serial), interest)?;
        self.clients.push(Client { serial, fd, role });
        Ok(())
    }

    /// A client's descriptor is ready.
    pub(crate) fn on_client(&mut self, poll: &Poll, serial: u32, scratch: &mut [u8]) {
        let Some(at) = self
            .clients
            .iter()
            .position(|client| client.serial == serial)
        else {
            return;
        };
        match self.clients[at].role {
            Role::Reads { .. } => {
                let client = &mut self.clients[at];
                client.pump(poll, self.owner);
                self.sweep_clients(poll);
            }
            Role::Writes => self.take_input(poll, at, scratch),
        }
    }

    fn take_input(&mut self, poll: &Poll, at: usize, scratch: &mut [u8]) {
        match rustix::io::read(&self.clients[at].fd, &mut *scratch) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(count) if count > 0 => {
                if let Some(input) = &mut self.input {
                    input.queue.extend(&scratch[..count]);
                }
                self.pump_input(poll);
            }
            _ => {
                let client = self.clients.swap_remove(at);
                poll.forget(&client.fd);
                if self.stdin_once && self.terminal.is_none() {
                    self.close_input(poll);
                }
            }
        }
    }

    /// The container's stdin takes more.
    pub(crate) fn on_input(&mut self, poll: &Poll) {
        self.pump_input(poll);
    }

    fn pump_input(&mut self, poll: &Poll) {
        let Some(input) = &mut self.input else {
            return;
        };
        if write_queue(&input.fd, &mut input.queue).is_err() {
            self.close_input(poll);
            return;
        }
        let waits = !input.queue.is_empty();
        poll.forget(&input.fd);
        if waits {
            // Cannot fail but for want of memory, and then input stalls until the next write.
            let _ = poll.watch(&input.fd, Token::Input(self.owner), Interest::Write);
        }
        let interest = if waits {
            Interest::Nothing
        } else {
            Interest::Read
        };
        for client in self
            .clients
            .iter()
            .filter(|client| matches!(client.role, Role::Writes))
        {
            let _ = poll.rewatch(
                &client.fd,
                Token::Client(self.owner, client.serial),
                interest,
            );
        }
    }

    /// Closes the container's stdin, and with it the clients that feed it. A terminal has no
    /// end of input to give: only its clients go.
    pub(crate) fn close_input(&mut self, poll: &Poll) {
        if let Some(input) = self.input.take() {
            poll.forget(&input.fd);
        }
        self.clients.retain(|client| {
            let keep = !matches!(client.role, Role::Writes);
            if !keep {
                poll.forget(&client.fd);
            }
            keep
        });
    }

    /// Drops the clients that are done with.
    fn sweep_clients(&mut self, poll: &Poll) {
        self.clients.retain(|client| {
            let done = match &client.role {
                Role::Reads { queue, closing, .. } => *closing && queue.is_empty(),
                Role::Writes => false,
            };
            if done {
                poll.forget(&client.fd);
            }
            !done
        });
        self.hold_back_or_resume(poll);
    }

    /// Lets go of everything.
    pub(crate) fn close(&mut self, poll: &Poll) {
        self.end_output(poll, Stream::Stdout);
        self.end_output(poll, Stream::Stderr);
        self.close_input(poll);
        for client in self.clients.drain(..) {
            poll.forget(&client.fd);
        }
    }
}

/// The last bytes of a stream.
#[derive(Debug)]
struct Ring {
    most: usize,
    bytes: VecDeque<u8>,
}

impl Ring {
    fn new(most: usize) -> Self {
        Self {
            most,
            bytes: VecDeque::new(),
        }
    }

    fn push(&mut self, chunk: &[u8]) {
        let chunk = &chunk[chunk.len().saturating_sub(self.most)..];
        let over = (self.bytes.len() + chunk.len()).saturating_sub(self.most);
        self.bytes.drain(..over);
        self.bytes.extend(chunk);
    }
}

impl Client {
    fn offer(&mut self, poll: &Poll, owner: u32, of: Stream, chunk: &[u8]) {
        let Role::Reads {
            stream,
            queue,
            closing,
            took_ns,
        } = &mut self.role
        else {
            return;
        };
        if *stream != of || *closing {
            return;
        }
        if queue.is_empty() {
            *took_ns = boot_ns();
        }
        queue.extend(chunk);
        self.pump(poll, owner);
    }

    fn pump(&mut self, poll: &Poll, owner: u32) {
        let Role::Reads {
            queue,
            closing,
            took_ns,
            ..
        } = &mut self.role
        else {
            return;
        };
        let before = queue.len();
        if queue.is_empty() {
            // Woken without anything to write: the reader has gone.
            *closing = true;
            return;
        }
        if write_queue(&self.fd, queue).is_err() {
            queue.clear();
            *closing = true;
            return;
        }
        if queue.len() < before {
            *took_ns = boot_ns();
        }
        let interest = if queue.is_empty() {
            Interest::Nothing
        } else {
            Interest::Write
        };
        let _ = poll.rewatch(&self.fd, Token::Client(owner, self.serial), interest);
    }

    /// Boot clock when it counts as stuck; `None` while it is not full.
    fn stuck_at_ns(&self) -> Option<u64> {
        match &self.role {
            Role::Reads { queue, took_ns, .. } if queue.len() >= FULL_QUEUE_BYTES => {
                Some(took_ns.saturating_add(STUCK_NS))
            }
            _ => None,
        }
    }
}

/// Writes what the descriptor takes now; an error means that it takes nothing any more.
fn write_queue(fd: &OwnedFd, queue: &mut VecDeque<u8>) -> Result<(), Errno> {
    while !queue.is_empty() {
        match rustix::io::write(fd, queue.as_slices().0) {
            Ok(count) => {
                queue.drain(..count);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    *queue = VecDeque::new();
    Ok(())
}

fn open_program_side(controlling: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::pty::ioctl_tiocgptpeer(
        controlling,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_end() {
        for (most, chunks, expected) in [
            (4, &["ab", "cde"][..], "bcde"),
            (4, &["abcdefgh"][..], "efgh"),
            (4, &["a", ""][..], "a"),
            (0, &["abc"][..], ""),
        ] {
            let mut ring = Ring::new(most);
            for chunk in chunks {
                ring.push(chunk.as_bytes());
            }
            assert_eq!(ring.bytes, expected.as_bytes(), "{most} of {chunks:?}");
        }
    }
}
