//! The agent's end of the wire to one shim, and the shim as a process.
//!
//! ```text
//!  request() --frame--> outbox --> writer task ==socket==> shim
//!     ^ oneshot by stream                                   |
//!     +------------ reader task <=========socket============+
//!                      | exits -> events   exec exits -> their oneshot
//! ```
//! Frames are written whole by one task, so that a caller that gives up leaves no half frame.
//! When the connection breaks, the reader task looks whether the process is gone, and connects
//! anew if it is not: only if that fails too is the shim reported lost. A shim serves the newest
//! of its agents; one that was replaced does not fight for its place.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream as StdStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{ChildStderr, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use longshore_shim::wire::{self, Answer, Ask, Fact, FrameKind, HEADER_BYTES, Header};
use longshore_sys::{
    fd::{self, PeerCredentials},
    pidfd,
};
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{HandlerError, ShimEvent, ShimNews, oci};
use crate::{
    blocking,
    id::{ContainerId, SandboxId},
};

/// For requests that only touch the shim's own memory, or send a signal.
const QUICK: Duration = Duration::from_secs(10);
/// For requests that mount, execute or wait for processes to die: past this something hangs.
const SLOW: Duration = Duration::from_secs(120);
/// For ending all in a pod: the shim itself gives its processes ten seconds to die.
const SHUTDOWN: Duration = Duration::from_secs(15);
/// Between the shim's closing words, or SIGKILL, and its end.
const GOING: Duration = Duration::from_secs(5);
/// Between the end of a connection and that of the process, if the one is for the other.
const CUT_OFF: Duration = Duration::from_millis(500);
/// A connection made again that is closed within this time was taken over by another agent.
const TAKEN_OVER: Duration = Duration::from_secs(10);
/// Attempts to connect again to a shim that runs.
const REDIALS: u32 = 5;
/// Frames waiting to be written.
const OUTBOX: usize = 64;
/// Name of the process, which is how it is found again.
const NAME: &str = "longshore-shim";
const SOCKET: &str = "shim.sock";
const SIGKILL: i32 = 9;

/// The shim's program, in memory.
#[derive(Debug)]
pub(super) struct ShimProgram {
    image: Arc<OwnedFd>,
}

impl ShimProgram {
    /// Reads the program from `path`, or from beside the agent's own.
    pub(super) fn load(path: Option<&Path>) -> Result<Self, HandlerError> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => fs::read_link("/proc/self/exe")
                .unwrap_or_default()
                .with_file_name(NAME),
        };
        fs::read(&path)
            .and_then(|content| fd::sealed_memfd(NAME, &content))
            .map(|image| Self {
                image: Arc::new(image),
            })
            .map_err(|source| HandlerError::ShimMissing { path, source })
    }

    /// Starts a shim and returns the first connection to it.
    pub(super) async fn spawn(
        &self,
        sandbox: &SandboxId,
        dir: &Path,
    ) -> Result<StdStream, HandlerError> {
        let image = self.image.clone();
        let (sandbox, dir) = (sandbox.clone(), dir.to_owned());
        blocking::run("start shim", move || {
            spawn(&image, &sandbox, &dir).map_err(|(step, source)| HandlerError::Spawn {
                sandbox,
                step,
                source,
            })
        })
        .await
    }
}

fn spawn(
    image: &OwnedFd,
    sandbox: &SandboxId,
    dir: &Path,
) -> Result<StdStream, (&'static str, io::Error)> {
    let (ours, theirs) = StdStream::pair().map_err(|e| ("socketpair", e))?;
    let mut child = Command::new(format!("/proc/self/fd/{}", image.as_raw_fd()))
        .arg0(NAME)
        .arg("--sandbox")
        .arg(sandbox.as_str())
        .arg("--dir")
        .arg(dir)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| ("execute", e))?;
    // It forks away from us and exits once its socket is there.
    let waited = pidfd::open(child.id().cast_signed())
        .and_then(|process| wait_gone(&process, QUICK))
        .map_err(|e| ("wait", e))?;
    if !waited {
        // Our own child, not waited for yet: the pid is still its.
        let _ = child.kill();
        let _ = child.wait();
        return Err(("come up", io::ErrorKind::TimedOut.into()));
    }
    let status = child.wait().map_err(|e| ("wait", e))?;
    if status.success() {
        Ok(ours)
    } else {
        let words = last_words(child.stderr.take());
        Err(("come up", io::Error::other(format!("{status}{words}"))))
    }
}

/// What a shim said before it failed; what is in the pipe by now is all.
fn last_words(stderr: Option<ChildStderr>) -> String {
    let mut said = [0; 1000];
    let count = stderr
        .and_then(|mut stderr| {
            fd::set_nonblocking(&stderr, true).ok()?;
            stderr.read(&mut said).ok()
        })
        .unwrap_or(0);
    match String::from_utf8_lossy(&said[..count]).trim() {
        "" => String::new(),
        words => format!(": {words}"),
    }
}

/// Connects to the socket of a running shim.
pub(super) async fn dial(sandbox: &SandboxId, dir: &Path) -> Result<StdStream, HandlerError> {
    let at = dir.to_owned();
    let connected = blocking::run("connect to shim", move || connect(&at)).await;
    let (stream, peer) = connected.map_err(|e| HandlerError::ShimLost {
        sandbox: sandbox.clone(),
        reason: format!("connect: {e}"),
    })?;
    if peer.uid != 0 && peer.uid != rustix::process::geteuid().as_raw() {
        return Err(HandlerError::Impostor {
            path: dir.join(SOCKET),
            uid: peer.uid,
        });
    }
    Ok(stream)
}

fn connect(dir: &Path) -> io::Result<(StdStream, PeerCredentials)> {
    // Addresses end at 107 bytes, which the path of a run directory may be longer than.
    let dir = File::open(dir)?;
    let stream = StdStream::connect(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))?;
    let peer = fd::peer_credentials(&stream)?;
    Ok((stream, peer))
}

/// Removes the socket of a shim that is gone.
pub(super) fn remove_socket(dir: &Path) -> Result<(), HandlerError> {
    let path = dir.join(SOCKET);
    match fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(HandlerError::Step {
            step: format!("remove {}", path.display()),
            errno: source.raw_os_error().unwrap_or(0),
            source: Some(source),
        }),
    }
}

/// Kills the shims of a sandbox, found by their command lines; none is fine.
pub(super) fn kill(sandbox: &SandboxId, dir: &Path) -> Result<(), HandlerError> {
    for (found, found_dir, pid) in processes() {
        if found != *sandbox || found_dir != dir {
            continue;
        }
        let Ok(process) = pidfd::open(pid) else {
            continue;
        };
        // The pid may have changed hands since; from here on the descriptor holds it.
        if command_line(pid).is_none_or(|(id, at)| id != *sandbox || at != dir) {
            continue;
        }
        let ended = pidfd::send_signal(&process, SIGKILL)
            .or_else(|e| match e.raw_os_error() {
                Some(ESRCH) => Ok(()),
                _ => Err(e),
            })
            .and_then(|()| wait_gone(&process, GOING));
        match ended {
            Ok(true) => {}
            Ok(false) => {
                return Err(HandlerError::ShimSilent {
                    sandbox: sandbox.clone(),
                    request: "SIGKILL",
                    waited_ms: millis(GOING),
                });
            }
            Err(source) => {
                return Err(HandlerError::Step {
                    step: format!("kill shim {pid}"),
                    errno: source.raw_os_error().unwrap_or(0),
                    source: Some(source),
                });
            }
        }
    }
    Ok(())
}

/// Shims of pods whose run directories are directly below `sandboxes`.
pub(super) fn running(sandboxes: &Path) -> Vec<(SandboxId, i32)> {
    processes()
        .filter(|(_, dir, _)| dir.parent() == Some(sandboxes))
        .map(|(sandbox, _, pid)| (sandbox, pid))
        .collect()
}

fn processes() -> impl Iterator<Item = (SandboxId, PathBuf, i32)> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            let (sandbox, dir) = command_line(pid)?;
            // Anybody may call himself so; only ours run from that memory file.
            let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            program
                .to_str()?
                .starts_with(&format!("/memfd:{NAME}"))
                .then_some((sandbox, dir, pid))
        })
}

fn command_line(pid: i32) -> Option<(SandboxId, PathBuf)> {
    parse_command_line(&fs::read(format!("/proc/{pid}/cmdline")).ok()?)
}

fn parse_command_line(raw: &[u8]) -> Option<(SandboxId, PathBuf)> {
    let text = std::str::from_utf8(raw).ok()?;
    let words: Vec<_> = text.split_terminator('\0').collect();
    match words.as_slice() {
        [NAME, "--sandbox", sandbox, "--dir", dir] => Some((sandbox.parse().ok()?, dir.into())),
        _ => None,
    }
}

/// Waits until a process has ended; `false` if it has not in time.
fn wait_gone(process: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut polled = [PollFd::new(process, PollFlags::IN)];
        match poll(&mut polled, Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// One shim as the agent knows it.
pub(super) struct Shim {
    sandbox: SandboxId,
    dir: PathBuf,
    process: OwnedFd,
    events: mpsc::Sender<ShimEvent>,
    next_stream: AtomicU32,
    /// No loss is to be reported: the agent itself ends this shim or connects anew.
    closing: AtomicBool,
    open: Mutex<Open>,
}

/// What is under way.
#[derive(Default)]
struct Open {
    outbox: Option<mpsc::Sender<Outgoing>>,
    replies: HashMap<u32, oneshot::Sender<Incoming>>,
    execs: HashMap<u64, ExpectedExec>,
}

struct ExpectedExec {
    exited: oneshot::Sender<wire::ExecExited>,
    on_end: Box<dyn FnOnce() + Send>,
}

struct Outgoing {
    frame: Vec<u8>,
    fds: Vec<OwnedFd>,
}

struct Incoming {
    reply: wire::Reply,
    fds: Vec<OwnedFd>,
}

impl fmt::Debug for Shim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shim")
            .field("sandbox", &self.sandbox)
            .finish_non_exhaustive()
    }
}

impl Shim {
    /// Introduces the agent on a fresh connection and keeps it.
    pub(super) async fn connect(
        sandbox: &SandboxId,
        dir: &Path,
        stream: StdStream,
        events: mpsc::Sender<ShimEvent>,
    ) -> Result<(Arc<Self>, wire::Welcome), HandlerError> {
        let (link, welcome, early) = greet(sandbox, stream).await?;
        let process = pidfd::open(welcome.pid).map_err(|e| HandlerError::ShimLost {
            sandbox: sandbox.clone(),
            reason: format!("pid {}: {e}", welcome.pid),
        })?;
        let shim = Arc::new(Self {
            sandbox: sandbox.clone(),
            dir: dir.to_owned(),
            process,
            events,
            next_stream: AtomicU32::new(3),
            closing: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let link = shim.adopt(link);
        for fact in early {
            shim.tell(fact);
        }
        tokio::spawn(watch(Arc::downgrade(&shim), link));
        Ok((shim, welcome))
    }

    /// Asks for something whose answer is that it is done.
    pub(super) async fn request_done(
        &self,
        ask: Ask,
        fds: Vec<OwnedFd>,
    ) -> Result<(), HandlerError> {
        let name = name(&ask);
        match self.request(ask, fds).await? {
            (Answer::Done(_), _) => Ok(()),
            _ => Err(self.lost(format!("unfitting answer to {name}"))),
        }
    }

    /// Asks for a process; returns its pid and the descriptors that came with it.
    pub(super) async fn request_process(
        &self,
        ask: Ask,
        fds: Vec<OwnedFd>,
    ) -> Result<(i32, Vec<OwnedFd>), HandlerError> {
        let name = name(&ask);
        match self.request(ask, fds).await? {
            (Answer::Process(process), fds) => Ok((process.pid, fds)),
            _ => Err(self.lost(format!("unfitting answer to {name}"))),
        }
    }

    /// Registers an exec before it is asked for, so that no exit can be missed. `on_end` runs
    /// once it ended, was given up, or the shim is lost.
    pub(super) fn expect_exec(
        &self,
        exec_id: u64,
        on_end: impl FnOnce() + Send + 'static,
    ) -> oneshot::Receiver<wire::ExecExited> {
        let (exited, exit) = oneshot::channel();
        self.open().execs.insert(
            exec_id,
            ExpectedExec {
                exited,
                on_end: Box::new(on_end),
            },
        );
        exit
    }

    /// An exec that did not come to be.
    pub(super) fn give_up_exec(&self, exec_id: u64) {
        let expected = self.open().execs.remove(&exec_id);
        if let Some(expected) = expected {
            (expected.on_end)();
        }
    }

    /// Lets go of the connection; the shim itself goes on.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.unlink();
    }

    /// Asks the shim to end all, and waits until it is gone; `false` if it is not.
    pub(super) async fn shut_down(self: Arc<Self>) -> bool {
        self.closing.store(true, Ordering::Release);
        let asked = self
            .request(Ask::Shutdown(wire::Empty {}), Vec::new())
            .await;
        let patience = match asked {
            Ok(_) => GOING,
            Err(error @ HandlerError::ShimSilent { .. }) => {
                warn!(sandbox_id = %self.sandbox, %error, "shim will be killed");
                return false;
            }
            // Its end may have cut off the answer; it is gone at once then.
            Err(_) => CUT_OFF,
        };
        let wait = move || wait_gone(&self.process, patience);
        blocking::run("wait for shim", wait).await.unwrap_or(false)
    }

    async fn request(
        &self,
        ask: Ask,
        fds: Vec<OwnedFd>,
    ) -> Result<(Answer, Vec<OwnedFd>), HandlerError> {
        let patience = patience(&ask);
        let request = name(&ask);
        tokio::select! {
            answer = self.request_within(patience, ask, fds) => answer,
            waited = self.silence(), if patience > QUICK => Err(HandlerError::ShimSilent {
                sandbox: self.sandbox.clone(),
                request,
                waited_ms: millis(waited),
            }),
        }
    }

    /// Ends when the shim leaves even that unanswered which takes it no time: then it is not slow,
    /// it hangs.
    async fn silence(&self) -> Duration {
        let began = Instant::now();
        loop {
            sleep(QUICK).await;
            if !self.answers().await {
                return began.elapsed();
            }
        }
    }

    /// Whether the shim serves, or is gone and known to be: everything but silence.
    pub(super) async fn answers(&self) -> bool {
        // Ids of execs begin far above.
        let probe = Ask::KillExec(wire::KillExec { exec_id: 0 });
        let answer = self.request_within(QUICK, probe, Vec::new()).await;
        !matches!(answer, Err(HandlerError::ShimSilent { .. }))
    }

    async fn request_within(
        &self,
        patience: Duration,
        ask: Ask,
        fds: Vec<OwnedFd>,
    ) -> Result<(Answer, Vec<OwnedFd>), HandlerError> {
        let (name, container) = (name(&ask), container(&ask));
        // Odd numbers, as ttrpc has them; 0 is for events.
        let stream = self.next_stream.fetch_add(2, Ordering::Relaxed);
        let request = wire::Request {
            fds: u32::try_from(fds.len()).expect("a handful"),
            ask: Some(ask),
        };
        let (reply, answered) = oneshot::channel();
        let outbox = {
            let mut open = self.open();
            let outbox = open.outbox.clone();
            if outbox.is_some() {
                open.replies.insert(stream, reply);
            }
            outbox.ok_or_else(|| self.lost("not connected"))?
        };
        let _forget = Forget { shim: self, stream };
        let frame = wire::frame(FrameKind::Request, stream, &request);
        let exchange = async {
            outbox.send(Outgoing { frame, fds }).await.ok()?;
            answered.await.ok()
        };
        let incoming = timeout(patience, exchange)
            .await
            .map_err(|_| HandlerError::ShimSilent {
                sandbox: self.sandbox.clone(),
                request: name,
                waited_ms: millis(patience),
            })?
            .ok_or_else(|| self.lost(format!("connection broke during {name}")))?;
        match incoming.reply.answer {
            Some(Answer::Failed(failure)) => Err(self.failed(failure, container)),
            Some(Answer::OciFailed(failure)) => Err(oci::failure(&failure)),
            Some(answer) => Ok((answer, incoming.fds)),
            None => Err(self.lost(format!("empty answer to {name}"))),
        }
    }

    fn failed(&self, failure: wire::Failure, container: Option<ContainerId>) -> HandlerError {
        match container {
            Some(container) if failure.step == "unknown container" => {
                HandlerError::UnknownContainer {
                    sandbox: self.sandbox.clone(),
                    container,
                }
            }
            _ => step(failure),
        }
    }

    fn lost(&self, reason: impl Into<String>) -> HandlerError {
        HandlerError::ShimLost {
            sandbox: self.sandbox.clone(),
            reason: reason.into(),
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().expect("no panic while this lock is held")
    }

    fn adopt(&self, link: Link) -> Reader {
        let (outbox, queued) = mpsc::channel(OUTBOX);
        self.open().outbox = Some(outbox);
        tokio::spawn(write(link.stream.clone(), queued));
        Reader(link)
    }

    /// Ends all that is under way.
    fn unlink(&self) {
        let Open { execs, .. } = std::mem::take(&mut *self.open());
        for expected in execs.into_values() {
            (expected.on_end)();
        }
    }

    fn deliver(&self, message: Received) {
        match message {
            Received::Reply(stream, incoming) => {
                let waiting = self.open().replies.remove(&stream);
                // Nobody waits any more: its descriptors are closed here.
                if let Some(waiting) = waiting {
                    let _ = waiting.send(incoming);
                }
            }
            Received::Fact(fact) => self.tell(fact),
        }
    }

    fn tell(&self, fact: Fact) {
        match fact {
            Fact::Exited(exited) => self.report(ShimNews::Exited(exited)),
            Fact::ExecExited(exited) => {
                let expected = self.open().execs.remove(&exited.exec_id);
                // Else it is an exec of an earlier agent, whose caller is gone.
                if let Some(expected) = expected {
                    let _ = expected.exited.send(exited);
                    (expected.on_end)();
                }
            }
        }
    }

    fn report(&self, what: ShimNews) {
        let event = ShimEvent {
            sandbox_id: self.sandbox.clone(),
            what,
        };
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            // Waiting here would hold up replies that the reader of events may wait for. At
            // most one such task per container of the node that has ended.
            let events = self.events.clone();
            tokio::spawn(async move { events.send(event).await });
        }
    }
}

/// Takes a request that nobody waits for any more off the list.
struct Forget<'a> {
    shim: &'a Shim,
    stream: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shim.open().replies.remove(&self.stream);
    }
}

/// Reads from a shim until it is gone. Holds no strong reference while it waits: a shim that the
/// handler forgot closes.
async fn watch(shim: Weak<Shim>, mut reader: Reader) {
    let mut redialled_at: Option<Instant> = None;
    loop {
        let broke = loop {
            match reader.0.next().await {
                Ok(message) => match shim.upgrade() {
                    Some(shim) => shim.deliver(message),
                    None => return,
                },
                Err(broke) => break broke,
            }
        };
        let Some(shim) = shim.upgrade() else {
            return;
        };
        shim.unlink();
        if shim.closing.load(Ordering::Acquire) {
            return;
        }
        debug!(sandbox_id = %shim.sandbox, reason = %broke, "connection to shim broke");
        let was_short = redialled_at.is_some_and(|at| at.elapsed() < TAKEN_OVER);
        if was_short && !wait_gone(&shim.process, Duration::ZERO).unwrap_or(false) {
            warn!(sandbox_id = %shim.sandbox, "another agent has taken over the shim");
            return;
        }
        match redial(&shim).await {
            Redialled::Connected(again) => {
                redialled_at = Some(Instant::now());
                reader = again;
            }
            Redialled::Lost { process_gone } => {
                if !shim.closing.load(Ordering::Acquire) {
                    shim.report(ShimNews::Lost { process_gone });
                }
                return;
            }
        }
    }
}

enum Redialled {
    Connected(Reader),
    Lost { process_gone: bool },
}

async fn redial(shim: &Arc<Shim>) -> Redialled {
    for attempt in 0..REDIALS {
        // The socket closes a moment before the process has ended.
        if wait_gone(&shim.process, Duration::ZERO).unwrap_or(false) {
            return Redialled::Lost { process_gone: true };
        }
        sleep(Duration::from_millis(20 << attempt)).await;
        let greeted = match dial(&shim.sandbox, &shim.dir).await {
            Ok(stream) => greet(&shim.sandbox, stream).await,
            Err(e) => Err(e),
        };
        match greeted {
            Ok((link, _, early)) => {
                let reader = shim.adopt(link);
                for fact in early {
                    shim.tell(fact);
                }
                return Redialled::Connected(reader);
            }
            Err(error) => debug!(sandbox_id = %shim.sandbox, %error, "connect to shim again"),
        }
    }
    let process_gone = wait_gone(&shim.process, Duration::ZERO).unwrap_or(false);
    Redialled::Lost { process_gone }
}

/// Says hello and waits for the welcome; exits may be told before it.
async fn greet(
    sandbox: &SandboxId,
    stream: StdStream,
) -> Result<(Link, wire::Welcome, Vec<Fact>), HandlerError> {
    let lost = |reason: String| HandlerError::ShimLost {
        sandbox: sandbox.clone(),
        reason,
    };
    let mut link = Link::new(stream).map_err(|e| lost(format!("socket: {e}")))?;
    let hello = wire::Request {
        fds: 0,
        ask: Some(Ask::Hello(wire::Hello {
            version: wire::VERSION,
        })),
    };
    let mut early = Vec::new();
    let greeting = async {
        send(
            &link.stream,
            &wire::frame(FrameKind::Request, 1, &hello),
            &[],
        )
        .await
        .map_err(|e| format!("hello: {e}"))?;
        loop {
            match link.next().await.map_err(|broke| broke.to_string())? {
                Received::Fact(fact) => early.push(fact),
                Received::Reply(_, incoming) => break Ok(incoming.reply.answer),
            }
        }
    };
    let answer = timeout(QUICK, greeting)
        .await
        .map_err(|_| HandlerError::ShimSilent {
            sandbox: sandbox.clone(),
            request: "hello",
            waited_ms: millis(QUICK),
        })?
        .map_err(lost)?;
    match answer {
        Some(Answer::Welcome(welcome)) => {
            let older = wire::VERSION.saturating_sub(1).max(1);
            if !(older..=wire::VERSION).contains(&welcome.version) {
                return Err(HandlerError::ShimVersion {
                    sandbox: sandbox.clone(),
                    found: welcome.version,
                    spoken: wire::VERSION,
                });
            }
            Ok((link, welcome, early))
        }
        Some(Answer::Failed(failure)) => Err(step(failure)),
        _ => Err(lost("unfitting answer to hello".to_owned())),
    }
}

fn step(failure: wire::Failure) -> HandlerError {
    HandlerError::Step {
        source: (failure.errno != 0).then(|| io::Error::from_raw_os_error(failure.errno)),
        step: failure.step,
        errno: failure.errno,
    }
}

/// A connection, with what has been received of it and is not a whole frame yet.
struct Link {
    stream: Arc<UnixStream>,
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

/// A connection whose other half writes.
struct Reader(Link);

enum Received {
    Reply(u32, Incoming),
    Fact(Fact),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Broke {
    #[error("closed by the shim")]
    Closed,
    #[error("receive: {0}")]
    Io(#[from] io::Error),
    #[error("not the protocol: {0}")]
    Protocol(&'static str),
}

impl Link {
    fn new(stream: StdStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: Arc::new(UnixStream::from_std(stream)?),
            bytes: Vec::new(),
            fds: VecDeque::new(),
        })
    }

    /// The next whole message. Cancel safe: what was received stays here.
    async fn next(&mut self) -> Result<Received, Broke> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            self.stream.readable().await?;
            let mut piece = [0; 4096];
            let received = self.stream.try_io(Interest::READABLE, || {
                fd::recv_with_fds(self.stream.as_fd(), &mut piece, wire::MAX_FRAME_FDS)
            });
            match received {
                Ok((0, _)) => return Err(Broke::Closed),
                Ok((count, fds)) => {
                    self.bytes.extend_from_slice(&piece[..count]);
                    self.fds.extend(fds);
                    if self.fds.len() > wire::MAX_FRAME_FDS {
                        return Err(Broke::Protocol("descriptors that no frame names"));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Takes one whole frame off what was received. Descriptors arrive with the first byte of
    /// their frame, so they are here when it is whole, in the order of the frames.
    fn take(&mut self) -> Result<Option<Received>, Broke> {
        let Some(&header) = self.bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(header).ok_or(Broke::Protocol("frame header"))?;
        let whole = HEADER_BYTES + header.length as usize;
        if self.bytes.len() < whole {
            return Ok(None);
        }
        let payload = &self.bytes[HEADER_BYTES..whole];
        let message = match header.kind {
            FrameKind::Request => return Err(Broke::Protocol("a request from a shim")),
            FrameKind::Reply => {
                let reply = wire::Reply::decode(payload).map_err(|_| Broke::Protocol("reply"))?;
                let named = reply.fds as usize;
                if named > self.fds.len() {
                    return Err(Broke::Protocol("fewer descriptors than named"));
                }
                let fds = self.fds.drain(..named).collect();
                Some(Received::Reply(header.stream, Incoming { reply, fds }))
            }
            FrameKind::Event => wire::Event::decode(payload)
                .map_err(|_| Broke::Protocol("event"))?
                .fact
                .map(Received::Fact),
        };
        self.bytes.drain(..whole);
        if self.bytes.is_empty() {
            if !self.fds.is_empty() {
                return Err(Broke::Protocol("more descriptors than named"));
            }
            // Idle connections are many, and one large frame need not cost for ever.
            self.bytes.shrink_to(4096);
        }
        match message {
            Some(message) => Ok(Some(message)),
            // A fact of a newer shim: nothing that this agent could act on.
            None => self.take(),
        }
    }
}

/// Writes queued frames, one after the other, until the queue or the socket closes.
async fn write(stream: Arc<UnixStream>, mut queued: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { frame, fds }) = queued.recv().await {
        if let Err(error) = send(&stream, &frame, &fds).await {
            // The reader sees the same and tells; what waits for a reply learns it there.
            debug!(%error, "write to shim");
            break;
        }
    }
    // Wakes the reader when the handler let go, and tells the shim.
    let _ = rustix::net::shutdown(stream.as_fd(), rustix::net::Shutdown::Both);
}

async fn send(stream: &UnixStream, frame: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let mut fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut rest = frame;
    while !rest.is_empty() {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            fd::send_with_fds(stream.as_fd(), rest, &fds)
        });
        match sent {
            Ok(count) => {
                rest = &rest[count..];
                fds.clear();
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn name(ask: &Ask) -> &'static str {
    match ask {
        Ask::Hello(_) => "hello",
        Ask::Create(_) => "create",
        Ask::Start(_) => "start",
        Ask::Signal(_) => "signal",
        Ask::Exec(_) => "exec",
        Ask::Attach(_) => "attach",
        Ask::Resize(_) => "resize",
        Ask::CloseStdin(_) => "close stdin",
        Ask::ReopenLog(_) => "reopen log",
        Ask::AckExit(_) => "acknowledge exit",
        Ask::Delete(_) => "delete",
        Ask::Shutdown(_) => "shutdown",
        Ask::KillExec(_) => "kill exec",
    }
}

fn patience(ask: &Ask) -> Duration {
    match ask {
        Ask::Create(_) | Ask::Start(_) | Ask::Exec(_) | Ask::Delete(_) => SLOW,
        Ask::Hello(_)
        | Ask::Signal(_)
        | Ask::Attach(_)
        | Ask::Resize(_)
        | Ask::CloseStdin(_)
        | Ask::ReopenLog(_)
        | Ask::AckExit(_)
        | Ask::KillExec(_) => QUICK,
        Ask::Shutdown(_) => SHUTDOWN,
    }
}

fn container(ask: &Ask) -> Option<ContainerId> {
    let id = match ask {
        Ask::Create(create) => &create.container_id,
        Ask::Start(named) | Ask::CloseStdin(named) | Ask::ReopenLog(named) => &named.container_id,
        Ask::AckExit(named) | Ask::Delete(named) => &named.container_id,
        Ask::Signal(signal) => &signal.container_id,
        Ask::Exec(exec) => &exec.container_id,
        Ask::Attach(attach) => &attach.container_id,
        Ask::Resize(resize) => &resize.container_id,
        Ask::Hello(_) | Ask::Shutdown(_) | Ask::KillExec(_) => return None,
    };
    id.parse().ok()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

const ESRCH: i32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_is_known_by_its_whole_command_line() {
        let id = SandboxId::random();
        let line = |words: &[&str]| {
            let mut raw = words.join("\0").into_bytes();
            raw.push(0);
            raw
        };
        assert_eq!(
            parse_command_line(&line(&[NAME, "--sandbox", id.as_str(), "--dir", "/run/x"])),
            Some((id.clone(), "/run/x".into()))
        );
        for other in [
            &[NAME, "--sandbox", id.as_str(), "--dir"][..],
            &[NAME, "--sandbox", "x", "--dir", "/run/x"],
            &["sh", "--sandbox", id.as_str(), "--dir", "/run/x"],
            &[NAME, "--sandbox", id.as_str(), "--dir", "/run/x", "more"],
            &[],
        ] {
            assert_eq!(parse_command_line(&line(other)), None, "{other:?}");
        }
    }

    fn pair() -> (Link, StdStream) {
        let (ours, theirs) = StdStream::pair().expect("a pair");
        (Link::new(ours).expect("registered"), theirs)
    }

    fn reply(fds: u32) -> wire::Reply {
        wire::Reply {
            fds,
            answer: Some(Answer::Done(wire::Empty {})),
        }
    }

    #[tokio::test]
    async fn frames_are_put_together_from_pieces_with_their_descriptors() {
        let (mut link, theirs) = pair();
        let null = File::open("/dev/null").expect("a device");
        let first = wire::frame(FrameKind::Reply, 3, &reply(2));
        let second = wire::frame(FrameKind::Reply, 5, &reply(1));
        let fds = [null.as_fd(), null.as_fd()];
        fd::send_with_fds(&theirs, &first[..4], &fds).expect("sent");
        fd::send_with_fds(&theirs, &first[4..], &[]).expect("sent");
        fd::send_with_fds(&theirs, &second, &fds[..1]).expect("sent");
        for (expected, count) in [(3, 2), (5, 1)] {
            match link.next().await.expect("a frame") {
                Received::Reply(stream, incoming) => {
                    assert_eq!((stream, incoming.fds.len()), (expected, count));
                }
                Received::Fact(fact) => panic!("{fact:?}"),
            }
        }
        drop(theirs);
        assert!(matches!(link.next().await, Err(Broke::Closed)));
    }

    #[tokio::test]
    async fn a_peer_that_breaks_the_protocol_is_left() {
        let null = File::open("/dev/null").expect("a device");
        let request = wire::Request { fds: 0, ask: None };
        for (frame, fds) in [
            (wire::frame(FrameKind::Reply, 1, &reply(1)), 0),
            (wire::frame(FrameKind::Reply, 1, &reply(0)), 1),
            (wire::frame(FrameKind::Request, 1, &request), 0),
            (vec![0xff; HEADER_BYTES], 0),
            (vec![0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0xff], 0),
        ] {
            let (mut link, theirs) = pair();
            let fds = vec![null.as_fd(); fds];
            fd::send_with_fds(&theirs, &frame, &fds).expect("sent");
            let result = link.next().await;
            assert!(matches!(result, Err(Broke::Protocol(_))), "{frame:?}");
        }
    }

    #[tokio::test]
    async fn large_frames_pass_a_small_socket() {
        let (mut link, theirs) = pair();
        let sender = Link::new(theirs).expect("registered");
        let big = wire::Reply {
            fds: 1,
            answer: Some(Answer::Failed(wire::Failure {
                step: "x".repeat(3 << 20),
                errno: 0,
            })),
        };
        let fds = vec![OwnedFd::from(File::open("/dev/null").expect("a device"))];
        let frame = wire::frame(FrameKind::Reply, 9, &big);
        let (sent, received) = tokio::join!(send(&sender.stream, &frame, &fds), link.next());
        sent.expect("sent whole");
        match received.expect("received whole") {
            Received::Reply(9, incoming) => {
                assert_eq!(incoming.reply, big);
                assert_eq!(incoming.fds.len(), 1);
            }
            _ => panic!("another frame"),
        }
    }

    /// The other end, as a shim of this process's pid.
    struct Peer(Link);

    impl Peer {
        async fn asked(&mut self) -> (u32, Ask) {
            loop {
                if let Some(&header) = self.0.bytes.first_chunk::<HEADER_BYTES>() {
                    let header = Header::decode(header).expect("a header");
                    let whole = HEADER_BYTES + header.length as usize;
                    if self.0.bytes.len() >= whole {
                        let request = wire::Request::decode(&self.0.bytes[HEADER_BYTES..whole])
                            .expect("a request");
                        self.0.bytes.drain(..whole);
                        return (header.stream, request.ask.expect("a wish"));
                    }
                }
                self.0.stream.readable().await.expect("a socket");
                let mut piece = [0; 4096];
                let received = self.0.stream.try_io(Interest::READABLE, || {
                    fd::recv_with_fds(self.0.stream.as_fd(), &mut piece, wire::MAX_FRAME_FDS)
                });
                if let Ok((count, _)) = received {
                    assert!(count > 0, "the agent hung up");
                    self.0.bytes.extend_from_slice(&piece[..count]);
                }
            }
        }

        async fn answer(&self, stream: u32, answer: Answer, fds: &[OwnedFd]) {
            let reply = wire::Reply {
                fds: u32::try_from(fds.len()).expect("few"),
                answer: Some(answer),
            };
            let frame = wire::frame(FrameKind::Reply, stream, &reply);
            send(&self.0.stream, &frame, fds).await.expect("sent");
        }

        async fn tell(&self, fact: Fact) {
            let event = wire::Event { fact: Some(fact) };
            let frame = wire::frame(FrameKind::Event, 0, &event);
            send(&self.0.stream, &frame, &[]).await.expect("sent");
        }

        async fn welcome(&mut self, version: u32) {
            let (stream, ask) = self.asked().await;
            assert!(matches!(ask, Ask::Hello(_)), "{ask:?}");
            let welcome = wire::Welcome {
                version,
                pid: std::process::id().cast_signed(),
                ..wire::Welcome::default()
            };
            self.answer(stream, Answer::Welcome(welcome), &[]).await;
        }
    }

    struct Connected {
        shim: Arc<Shim>,
        peer: Peer,
        events: mpsc::Receiver<ShimEvent>,
        _dir: tempfile::TempDir,
    }

    async fn connected() -> Connected {
        let (ours, theirs) = StdStream::pair().expect("a pair");
        let mut peer = Peer(Link::new(theirs).expect("registered"));
        let dir = tempfile::tempdir().expect("a directory");
        let (sender, events) = mpsc::channel(4);
        let sandbox = SandboxId::random();
        let (shim, ()) = tokio::join!(
            Shim::connect(&sandbox, dir.path(), ours, sender),
            peer.welcome(wire::VERSION)
        );
        Connected {
            shim: shim.expect("connected").0,
            peer,
            events,
            _dir: dir,
        }
    }

    fn kill_exec(exec_id: u64) -> Ask {
        Ask::KillExec(wire::KillExec { exec_id })
    }

    #[tokio::test]
    async fn replies_find_their_requests_in_any_order() {
        let Connected { shim, mut peer, .. } = connected().await;
        let null = || OwnedFd::from(File::open("/dev/null").expect("a device"));
        let requests = (0..40).map(|n| shim.request_process(kill_exec(n), Vec::new()));
        let requests = futures_util::future::join_all(requests);
        let serve = async {
            let mut asked = Vec::new();
            for _ in 0..40 {
                asked.push(peer.asked().await);
            }
            asked.reverse();
            for (stream, ask) in asked {
                let Ask::KillExec(kill) = ask else {
                    panic!("{ask:?}");
                };
                let pid = i32::try_from(kill.exec_id).expect("small");
                let fds: Vec<_> = (0..pid % 3).map(|_| null()).collect();
                let answer = Answer::Process(wire::Process { pid });
                peer.answer(stream, answer, &fds).await;
            }
        };
        let (answers, ()) = tokio::join!(requests, serve);
        for (n, answer) in (0..).zip(answers) {
            let (pid, fds) = answer.expect("answered");
            assert_eq!(
                (pid, fds.len()),
                (n, usize::try_from(n % 3).expect("small"))
            );
        }
    }

    #[tokio::test]
    async fn a_silent_shim_is_told_and_its_late_answer_dropped() {
        let Connected { shim, mut peer, .. } = connected().await;
        let patience = Duration::from_millis(20);
        let silent = shim
            .request_within(patience, kill_exec(1), Vec::new())
            .await
            .err();
        assert!(
            matches!(
                silent,
                Some(HandlerError::ShimSilent {
                    request: "kill exec",
                    waited_ms: 20,
                    ..
                })
            ),
            "{silent:?}"
        );
        let (late, _) = peer.asked().await;
        let done = Answer::Done(wire::Empty {});
        peer.answer(late, done.clone(), &[]).await;
        let serve = async {
            let (stream, _) = peer.asked().await;
            peer.answer(stream, done, &[]).await;
        };
        let (next, ()) = tokio::join!(shim.request_done(kill_exec(2), Vec::new()), serve);
        next.expect("the connection is as good as before");
    }

    #[tokio::test]
    async fn failures_carry_step_and_error_number() {
        let Connected { shim, mut peer, .. } = connected().await;
        let container = ContainerId::random();
        for (step, errno, expected) in [
            ("execve /bin/x", 2, None),
            ("unknown container", 2, Some(container.clone())),
        ] {
            let ask = Ask::Delete(wire::Named {
                container_id: container.to_string(),
            });
            let serve = async {
                let (stream, _) = peer.asked().await;
                let failure = wire::Failure {
                    step: step.to_owned(),
                    errno,
                };
                peer.answer(stream, Answer::Failed(failure), &[]).await;
            };
            let (answer, ()) = tokio::join!(shim.request_done(ask, Vec::new()), serve);
            match answer.expect_err("it failed") {
                HandlerError::Step {
                    step: found,
                    errno: 2,
                    ..
                } => {
                    assert_eq!((found.as_str(), expected), (step, None));
                }
                HandlerError::UnknownContainer { container, .. } => {
                    assert_eq!(Some(container), expected);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn versions_out_of_reach_are_refused() {
        for (version, accepted) in [
            (0, false),
            (wire::VERSION, true),
            (wire::VERSION + 1, false),
        ] {
            let (ours, theirs) = StdStream::pair().expect("a pair");
            let mut peer = Peer(Link::new(theirs).expect("registered"));
            let sandbox = SandboxId::random();
            let (greeted, ()) = tokio::join!(greet(&sandbox, ours), peer.welcome(version));
            match greeted {
                Ok(_) => assert!(accepted, "version {version}"),
                Err(HandlerError::ShimVersion { found, .. }) => {
                    assert!(!accepted, "version {version}");
                    assert_eq!(found, version);
                }
                Err(other) => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn exits_reach_events_and_their_execs_even_when_nobody_reads() {
        let Connected {
            shim,
            peer,
            mut events,
            ..
        } = connected().await;
        let status = wire::ExitStatus::default();
        let (ended, has_ended) = oneshot::channel();
        let exit = shim.expect_exec(5, move || {
            let _ = ended.send(());
        });
        // More than the channel holds: the exec's exit must get past them.
        for n in 0..8 {
            peer.tell(Fact::Exited(wire::Exited {
                container_id: n.to_string(),
                status,
            }))
            .await;
        }
        let exec = wire::ExecExited {
            exec_id: 5,
            status,
            timed_out: true,
        };
        peer.tell(Fact::ExecExited(exec.clone())).await;
        assert_eq!(exit.await.expect("told"), exec);
        has_ended.await.expect("cleaned up");
        let mut told = Vec::new();
        for _ in 0..8 {
            match events.recv().await.expect("an event").what {
                ShimNews::Exited(exited) => told.push(exited.container_id),
                lost @ ShimNews::Lost { .. } => panic!("{lost:?}"),
            }
        }
        told.sort();
        assert_eq!(told, ["0", "1", "2", "3", "4", "5", "6", "7"]);
    }

    #[tokio::test]
    async fn a_broken_connection_fails_what_is_under_way_and_is_reported_once() {
        let Connected {
            shim,
            mut peer,
            mut events,
            ..
        } = connected().await;
        let exit = shim.expect_exec(5, || ());
        let serve = async {
            peer.asked().await;
            drop(peer);
        };
        let (answer, ()) = tokio::join!(shim.request_done(kill_exec(1), Vec::new()), serve);
        assert!(
            matches!(answer, Err(HandlerError::ShimLost { .. })),
            "{answer:?}"
        );
        assert!(exit.await.is_err());
        // The process lives, but nobody listens on a socket in its directory.
        let event = events.recv().await.expect("an event");
        assert_eq!(
            event.what,
            ShimNews::Lost {
                process_gone: false
            }
        );
        let after = shim.request_done(kill_exec(2), Vec::new()).await;
        assert!(
            matches!(after, Err(HandlerError::ShimLost { .. })),
            "{after:?}"
        );
    }

    #[tokio::test]
    async fn a_shim_that_was_let_go_is_not_reported() {
        let Connected {
            shim,
            peer,
            mut events,
            ..
        } = connected().await;
        shim.close();
        drop(shim);
        drop(peer);
        assert_eq!(events.recv().await, None);
    }
}
