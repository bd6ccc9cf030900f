//! The event loop: one thread, level-triggered, nothing here waits but `Poll::wait`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use longshore_sys::pidfd::{self, Ended};
use longshore_sys::{fd, proc};
use rustix::net::SocketFlags;

use crate::connection::{Connection, Hangup};
use crate::container::{Asker, Container, Home, Phase};
use crate::exec::Exec;
use crate::exit::{self, Exits, boot_ns};
use crate::oci::Call;
use crate::pod::PodInit;
use crate::poll::{Interest, Poll, Token};
use crate::report::{self, Report};
use crate::stdio::READ_BYTES;
use crate::wire::{Answer, Empty, Event, ExecExited, Exited, Fact, Failure, Process, Reply};

/// Connections held at once; one is the agent's, the others are on their way to replace it.
const MAX_CONNECTIONS: usize = 8;

/// Quiet time after which memory is given back.
const QUIET: Duration = Duration::from_millis(200);

/// Everything a shim holds.
pub(crate) struct Shim {
    pub(crate) poll: Poll,
    pub(crate) dir: PathBuf,
    pub(crate) home: Home,
    pub(crate) exits: Exits,
    pub(crate) containers: Vec<Container>,
    pub(crate) execs: Vec<Exec>,
    pub(crate) calls: Vec<Call>,
    /// Children that ended while calls were under way, until one of those names them.
    pub(crate) strays: Vec<(i32, Ended)>,
    pub(crate) pod_init: Option<PodInit>,
    pub(crate) connections: Vec<Connection>,
    pub(crate) stopping: Option<Stopping>,
    listener: OwnedFd,
    signals: OwnedFd,
    next_serial: u32,
    scratch: Vec<u8>,
    /// Something was done since memory was last given back.
    busy: bool,
}

/// A shutdown under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopping {
    pub(crate) asker: Asker,
    /// Boot clock: what has not ended by then is left to whoever owns the cgroups.
    pub(crate) deadline_ns: u64,
}

/// What a shim is made from, before it has one thread of its own to live in.
pub(crate) struct Parts {
    pub(crate) dir: PathBuf,
    pub(crate) listener: OwnedFd,
    pub(crate) agent: OwnedFd,
    pub(crate) exits: Exits,
    pub(crate) home: Home,
}

impl Shim {
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        let poll = Poll::new()?;
        // The others are taken so that a stray signal to the pod's helpers ends no pod.
        let signals = proc::signal_fd(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
        fd::set_nonblocking(&parts.listener, true)?;
        poll.watch(&parts.listener, Token::Listener, Interest::Read)?;
        poll.watch(&signals, Token::Signals, Interest::Read)?;
        let mut shim = Self {
            poll,
            dir: parts.dir,
            home: parts.home,
            exits: parts.exits,
            containers: Vec::new(),
            execs: Vec::new(),
            calls: Vec::new(),
            strays: Vec::new(),
            pod_init: None,
            connections: Vec::new(),
            stopping: None,
            listener: parts.listener,
            signals,
            next_serial: 0,
            scratch: Vec::new(),
            busy: true,
        };
        shim.take_connection(parts.agent);
        Ok(shim)
    }

    /// Serves until a shutdown is done.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        loop {
            ready.clear();
            self.poll.wait(&mut ready, self.patience())?;
            if ready.is_empty() {
                self.give_memory_back();
            } else {
                self.busy = true;
            }
            for token in &ready {
                self.dispatch(*token);
            }
            self.end_overdue_execs();
            self.end_overdue_calls();
            self.detach_stuck_clients();
            let stopped = self.finish_stopping();
            self.flush_connections();
            if stopped {
                return Ok(());
            }
        }
    }

    /// How long nothing may happen before there is something to do.
    fn patience(&self) -> Option<Duration> {
        let now = boot_ns();
        let deadlines = self.execs.iter().filter_map(|exec| exec.deadline_ns);
        let stopping = self.stopping.map(|stopping| stopping.deadline_ns);
        let stuck = self
            .containers
            .iter()
            .filter_map(|container| container.stdio.next_deadline_ns());
        let until = deadlines
            .chain(stuck)
            .chain(stopping)
            .chain(self.next_call_deadline_ns())
            .min()
            .map(|at| Duration::from_nanos(at.saturating_sub(now)));
        let quiet = self.busy.then_some(QUIET);
        until.into_iter().chain(quiet).min()
    }

    fn give_memory_back(&mut self) {
        if self.busy {
            self.scratch = Vec::new();
            proc::trim_heap();
            self.busy = false;
        }
    }

    fn dispatch(&mut self, token: Token) {
        match token {
            Token::Listener => self.accept(),
            Token::Signals => {
                self.drop_signals();
                self.reap();
            }
            Token::Connection(serial) => self.on_connection(serial),
            Token::ContainerReport(serial) => self.on_container_report(serial),
            Token::ExecReport(serial) => self.on_exec_report(serial),
            Token::Output(serial, stream) => self.with_stdio(serial, |stdio, poll, scratch| {
                stdio.on_output(poll, stream, scratch);
            }),
            Token::Input(serial) => self.with_stdio(serial, |stdio, poll, _| stdio.on_input(poll)),
            Token::Client(serial, client) => self.with_stdio(serial, |stdio, poll, scratch| {
                stdio.on_client(poll, client, scratch);
            }),
        }
    }

    fn with_stdio(
        &mut self,
        serial: u32,
        work: impl FnOnce(&mut crate::stdio::Stdio, &Poll, &mut [u8]),
    ) {
        let mut scratch = self.take_scratch();
        if let Some(container) = self
            .containers
            .iter_mut()
            .find(|container| container.serial == serial)
        {
            work(&mut container.stdio, &self.poll, &mut scratch);
        }
        self.scratch = scratch;
    }

    /// The one buffer for reading; given back to `self.scratch` by the caller. Zeroed pages come
    /// from the kernel only when they are written to.
    fn take_scratch(&mut self) -> Vec<u8> {
        let scratch = std::mem::take(&mut self.scratch);
        if scratch.is_empty() {
            vec![0; READ_BYTES]
        } else {
            scratch
        }
    }

    pub(crate) fn new_serial(&mut self) -> u32 {
        self.next_serial = self.next_serial.wrapping_add(1);
        self.next_serial
    }

    // Connections.

    fn accept(&mut self) {
        let Ok(socket) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) else {
            return;
        };
        let own = rustix::process::getuid().as_raw();
        let trusted =
            fd::peer_credentials(&socket).is_ok_and(|peer| peer.uid == 0 || peer.uid == own);
        if trusted && self.connections.len() < MAX_CONNECTIONS {
            self.take_connection(socket);
        }
    }

    fn take_connection(&mut self, socket: OwnedFd) {
        let serial = self.new_serial();
        if let Ok(connection) = Connection::new(&self.poll, serial, socket) {
            self.connections.push(connection);
        }
    }

    fn on_connection(&mut self, serial: u32) {
        let mut scratch = self.take_scratch();
        let received = match self.connection(serial) {
            Some(connection) => connection.receive(&mut scratch),
            None => Ok(Vec::new()),
        };
        self.scratch = scratch;
        match received {
            Ok(requests) => {
                for incoming in requests {
                    // A malformed wish among them has ended the connection.
                    if self.connection(serial).is_some() {
                        self.serve(serial, incoming);
                    }
                }
            }
            Err(Hangup) => self.disconnect(serial),
        }
    }

    pub(crate) fn connection(&mut self, serial: u32) -> Option<&mut Connection> {
        self.connections
            .iter_mut()
            .find(|connection| connection.serial == serial)
    }

    pub(crate) fn disconnect(&mut self, serial: u32) {
        if let Some(at) = self
            .connections
            .iter()
            .position(|connection| connection.serial == serial)
        {
            self.connections.remove(at).close(&self.poll);
        }
    }

    fn flush_connections(&mut self) {
        let mut lost = Vec::new();
        for connection in &mut self.connections {
            if connection.flush(&self.poll).is_err() {
                lost.push(connection.serial);
            }
        }
        for serial in lost {
            self.disconnect(serial);
        }
    }

    /// Answers; nobody hears it if the one who asked has gone.
    pub(crate) fn answer(&mut self, asker: Asker, answer: Answer, fds: Vec<OwnedFd>) {
        let reply = Reply {
            fds: u32::try_from(fds.len()).expect("at most one"),
            answer: Some(answer),
        };
        if let Some(connection) = self.connection(asker.connection) {
            connection.reply(asker.stream, &reply, fds);
        }
    }

    pub(crate) fn done(&mut self, asker: Asker) {
        self.answer(asker, Answer::Done(Empty {}), Vec::new());
    }

    pub(crate) fn fail(&mut self, asker: Asker, failure: Failure) {
        self.answer(asker, Answer::Failed(failure), Vec::new());
    }

    fn tell(&mut self, fact: Fact) {
        let event = Event { fact: Some(fact) };
        if let Some(connection) = self
            .connections
            .iter_mut()
            .find(|connection| connection.greeted)
        {
            connection.event(&event);
        }
    }

    /// Tells once more what has not been acknowledged.
    pub(crate) fn tell_kept_exits(&mut self) {
        let kept: Vec<Exited> = self
            .containers
            .iter()
            .filter(|container| !container.acknowledged)
            .filter_map(|container| {
                Some(Exited {
                    container_id: container.id.clone(),
                    status: container.exit?,
                })
            })
            .collect();
        for exited in kept {
            self.tell(Fact::Exited(exited));
        }
    }

    // Children.

    fn drop_signals(&mut self) {
        // Which signals came does not matter: the children say themselves what happened.
        let mut sink = [0; 1024];
        while rustix::io::read(&self.signals, &mut sink).is_ok_and(|count| count > 0) {}
    }

    fn reap(&mut self) {
        while let Ok(Some((pid, ended))) = pidfd::reap_any() {
            self.on_end(pid, ended);
        }
    }

    fn on_end(&mut self, pid: i32, ended: Ended) {
        if let Some(at) = self.calls.iter().position(|call| call.pid == pid) {
            self.on_call_end(at, ended);
        } else if let Some(container) = self
            .containers
            .iter_mut()
            .find(|container| container.pid == pid)
        {
            let serial = container.serial;
            if Self::hold_end(container, ended) {
                return;
            }
            // Its last words come first: why it failed, or that it had come as far as execve.
            self.on_container_report(serial);
            // Unless it was a forerunner, whose last word was who takes its place.
            let has_successor = self
                .containers
                .iter()
                .any(|container| container.serial == serial && ![0, pid].contains(&container.pid));
            if !has_successor {
                self.on_container_end(serial, ended);
            }
        } else if let Some(exec) = self.execs.iter().find(|exec| exec.pid == pid) {
            let serial = exec.serial;
            self.on_exec_report(serial);
            self.on_exec_end(serial, ended);
        } else if self.pod_init.as_ref().is_some_and(|init| init.pid == pid) {
            // All containers in its namespace end with it, each with its own exit.
            self.pod_init = None;
        } else {
            self.keep_stray(pid, ended);
        }
    }

    fn on_container_report(&mut self, serial: u32) {
        loop {
            let Some(container) = self
                .containers
                .iter_mut()
                .find(|container| container.serial == serial)
            else {
                return;
            };
            let Some(news) = container.report.as_ref().and_then(report::read) else {
                return;
            };
            match (news, &container.phase) {
                (Report::Born(pid, pidfd), Phase::Building(asker)) => {
                    let asker = *asker;
                    if let Err(error) = container.succeed(pid, pidfd) {
                        let why = Answer::Failed(at_step("pid namespace", &error));
                        self.give_up(serial, asker, why);
                        return;
                    }
                }
                (Report::Ready(terminal), Phase::Building(asker)) => {
                    let (asker, pid) = (*asker, container.pid);
                    container.phase = Phase::Created;
                    if let Some(terminal) = terminal {
                        let input = container.takes_input;
                        if let Err(error) =
                            container.stdio.set_terminal(&self.poll, terminal, input)
                        {
                            self.give_up(
                                serial,
                                asker,
                                Answer::Failed(at_step("terminal", &error)),
                            );
                            return;
                        }
                    }
                    self.answer(asker, Answer::Process(Process { pid }), Vec::new());
                }
                (Report::Failed(failure), Phase::Building(asker)) => {
                    let asker = *asker;
                    self.give_up(serial, asker, Answer::Failed(failure));
                    return;
                }
                (Report::Closed, Phase::Building(asker)) => {
                    let asker = *asker;
                    self.give_up(
                        serial,
                        asker,
                        Answer::Failed(at_step(
                            "container's first process was killed",
                            &no_error(),
                        )),
                    );
                    return;
                }
                (Report::Failed(failure), Phase::Starting(asker)) => {
                    let asker = *asker;
                    container.abandon(&self.poll);
                    self.fail(asker, failure);
                    self.finish_deleting(serial);
                    return;
                }
                (Report::Closed, Phase::Starting(asker)) => {
                    let asker = *asker;
                    container.phase = Phase::Running;
                    container.started = true;
                    container.close_report(&self.poll);
                    self.done(asker);
                    return;
                }
                // It died before anybody started it: the end itself is told when it is reaped.
                (Report::Failed(_) | Report::Closed, _) => {
                    container.close_report(&self.poll);
                    return;
                }
                (Report::Ready(_) | Report::Born(..), _) => {}
            }
        }
    }

    /// Forgets a container that could not be built, and says why.
    pub(crate) fn give_up(&mut self, serial: u32, asker: Asker, why: Answer) {
        if let Some(at) = self
            .containers
            .iter()
            .position(|container| container.serial == serial)
        {
            let mut container = self.containers.remove(at);
            container.abandon(&self.poll);
            if let Some(deleting) = container.deleting {
                self.done(deleting);
            }
        }
        self.answer(asker, why, Vec::new());
    }

    pub(crate) fn on_container_end(&mut self, serial: u32, ended: Ended) {
        let mut scratch = self.take_scratch();
        let container = self
            .containers
            .iter_mut()
            .find(|container| container.serial == serial)
            // One that failed to start has been dealt with, and has no exit.
            .filter(|container| !matches!(container.phase, Phase::Ended));
        if let Some(container) = container {
            let status = exit::status(ended);
            container.stdio.drain(&self.poll, &mut scratch);
            container.pid = 0;
            container.pidfd = None;
            container.pid_ns = None;
            container.phase = Phase::Ended;
            container.exit = Some(status);
            container.close_report(&self.poll);
            let told = container.oci.as_ref().is_some_and(|oci| oci.unstarted);
            if container.deleting.is_none() && !told {
                let exited = Exited {
                    container_id: container.id.clone(),
                    status,
                };
                self.exits.keep(&exited);
                self.tell(Fact::Exited(exited));
            }
        }
        self.scratch = scratch;
        self.finish_deleting(serial);
    }

    /// Completes a delete that waited for the end.
    pub(crate) fn finish_deleting(&mut self, serial: u32) {
        let done = |container: &Container| {
            container.serial == serial
                && container.deleting.is_some()
                && matches!(container.phase, Phase::Ended)
        };
        if !self.containers.iter().any(done) || !self.let_go_of(serial) {
            return;
        }
        let Some(at) = self.containers.iter().position(done) else {
            return;
        };
        let mut container = self.containers.remove(at);
        container.kill();
        container.stdio.close(&self.poll);
        self.exits.drop(&container.id);
        if let Some(asker) = container.deleting {
            self.done(asker);
        }
    }

    fn on_exec_report(&mut self, serial: u32) {
        loop {
            let Some(at) = self.execs.iter().position(|exec| exec.serial == serial) else {
                return;
            };
            let exec = &mut self.execs[at];
            let Some(news) = exec.report.as_ref().and_then(report::read) else {
                return;
            };
            match news {
                Report::Ready(terminal) => exec.terminal = terminal,
                // Nobody takes the place of an exec.
                Report::Born(..) => {}
                Report::Failed(failure) => {
                    let mut exec = self.execs.remove(at);
                    exec.close_report(&self.poll);
                    // It ends at once; ECHILD if the reaping has come first.
                    let _ = pidfd::wait(&exec.pidfd, true);
                    if let Some(asker) = exec.asker {
                        self.fail(asker, failure);
                    }
                    return;
                }
                Report::Closed => {
                    exec.close_report(&self.poll);
                    let process = Process { pid: exec.pid };
                    let terminal: Vec<OwnedFd> = exec.terminal.take().into_iter().collect();
                    if let Some(asker) = exec.asker.take() {
                        self.answer(asker, Answer::Process(process), terminal);
                    }
                    return;
                }
            }
        }
    }

    fn on_exec_end(&mut self, serial: u32, ended: Ended) {
        let Some(at) = self.execs.iter().position(|exec| exec.serial == serial) else {
            return;
        };
        let exec = self.execs.remove(at);
        self.tell_exec_end(exec.id, ended, exec.timed_out);
    }

    pub(crate) fn tell_exec_end(&mut self, exec_id: u64, ended: Ended, timed_out: bool) {
        self.tell(Fact::ExecExited(ExecExited {
            exec_id,
            status: exit::status(ended),
            timed_out,
        }));
    }

    fn end_overdue_execs(&mut self) {
        let now = boot_ns();
        for exec in &mut self.execs {
            if exec.deadline_ns.is_some_and(|at| at <= now) {
                exec.deadline_ns = None;
                exec.timed_out = true;
                exec.kill();
            }
        }
    }

    fn detach_stuck_clients(&mut self) {
        let now = boot_ns();
        for container in &mut self.containers {
            container.stdio.detach_stuck(&self.poll, now);
        }
    }

    /// Whether a shutdown has come to its end; answers it then.
    fn finish_stopping(&mut self) -> bool {
        let Some(stopping) = self.stopping else {
            return false;
        };
        let ended = self.execs.is_empty()
            && self.calls.is_empty()
            && self.pod_init.is_none()
            && self
                .containers
                .iter()
                .all(|container| matches!(container.phase, Phase::Ended));
        if !ended && boot_ns() < stopping.deadline_ns {
            return false;
        }
        if ended {
            self.done(stopping.asker);
        } else {
            self.fail(
                stopping.asker,
                at_step("a process does not end", &no_error()),
            );
        }
        true
    }
}

fn no_error() -> io::Error {
    io::Error::from_raw_os_error(0)
}

pub(crate) fn at_step(step: &str, error: &io::Error) -> Failure {
    Failure {
        step: step.into(),
        errno: error.raw_os_error().unwrap_or(libc::EINVAL),
    }
}
