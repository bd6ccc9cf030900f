//! Containers that an OCI runtime's command line (runc, crun, youki) builds for the shim.
//!
//! ```text
//!  shim --clone--> call: own mount namespace --execve--> runtime create | start | exec | delete
//!   |                                                       |
//!   |<-- the container's first process, or an exec's: orphans come to their subreaper
//!   |<-- pid file, terminal through a console socket, log through a pipe, exit code
//! ```
//! A call never holds the loop up: it is a child like others, whose end is waited for with a time
//! limit. What it started is a child too once the call has ended, and may have ended by then.
//! Signals, stdio, logs and exits are the shim's own, as with the engine; nothing that the runtime
//! keeps is needed to kill or to clean up.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use longshore_sys::clone::{self, Cloned};
use longshore_sys::pidfd::{self, Ended};
use longshore_sys::{fd, path};
use rustix::fs::{AtFlags, MemfdFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::cgroup;
use crate::container::{Asker, Container, Making, Phase, Pipes};
use crate::exec::Exec;
use crate::exit::boot_ns;
use crate::init::runtime::{self, Bundle, Invocation};
use crate::init::{ChildStdio, terminal};
use crate::pod::{namespace_bits, open_pid_ns};
use crate::report::{self, Report};
use crate::shim::{Shim, at_step};
use crate::wire::{
    self, Answer, CgroupPlan, Failure, HiddenHierarchy, NamespaceFrom, NamespaceKind, OciFailure,
    Process, ProcessPlan, UserNamespace,
};

/// Most that is kept of what a runtime says.
const SAID_BYTES: usize = 32 << 10;

/// Most ends kept of children that nobody has named yet.
const MAX_STRAYS: usize = 4096;

const SECOND_NS: u64 = 1_000_000_000;

/// What later calls for a container need.
#[derive(Clone, Debug)]
pub(crate) struct Oci {
    program: String,
    dir: PathBuf,
    hidden: Vec<HiddenHierarchy>,
    /// The first process ended while `start` was under way: that is answered first.
    held_end: Option<Ended>,
    /// The start failed, which was told: its end is not told once more.
    pub(crate) unstarted: bool,
}

/// A runtime's command under way.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) pid: i32,
    pidfd: OwnedFd,
    verb: Verb,
    /// Name of the program.
    runtime: String,
    /// Serial of the container.
    container: u32,
    /// Says why, if the runtime could not even be executed.
    report: OwnedFd,
    /// Read end of what it logs.
    log: OwnedFd,
    deadline_ns: u64,
    overdue: bool,
}

#[derive(Debug)]
enum Verb {
    Create {
        asker: Asker,
        cgroup: CgroupPlan,
        pipes: Pipes,
        console: Option<Console>,
    },
    Start(Asker),
    Exec(Box<Starting>),
    Delete,
}

/// An exec whose process is still to come.
#[derive(Debug)]
struct Starting {
    asker: Asker,
    id: u64,
    serial: u32,
    cgroup: CgroupPlan,
    console: Option<Console>,
    pid_file: PathBuf,
    /// Boot clock, nanoseconds.
    deadline_ns: Option<u64>,
    timed_out: bool,
}

impl Verb {
    fn command(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Start(_) => "start",
            Self::Exec(_) => "exec",
            Self::Delete => "delete",
        }
    }

    /// Seconds after which a runtime hangs: it mounts, waits for the kernel and executes, on a
    /// host that may be busy.
    fn limit_s(&self) -> u64 {
        match self {
            Self::Create { .. } | Self::Start(_) | Self::Exec(_) => 30,
            Self::Delete => 10,
        }
    }
}

/// What is common to all calls.
struct Calling<'a> {
    oci: &'a Oci,
    args: Vec<String>,
    stdio: &'a ChildStdio,
    named: Vec<&'a OwnedFd>,
    freezer_tasks: Option<String>,
    bundle: Option<Bundle<'a>>,
    user: Option<(&'a UserNamespace, &'a ProcessPlan)>,
    /// Version 2 directory to be born into.
    cgroup_dir: Option<OwnedFd>,
}

impl Shim {
    /// Begins to build a container.
    pub(crate) fn create_oci(
        &mut self,
        asker: Asker,
        create: &wire::Create,
        of: &wire::OciContainer,
        log: Option<OwnedFd>,
        pid_ns: Option<OwnedFd>,
    ) -> Result<(), Failure> {
        let plan = &create.plan;
        let oci = Oci {
            program: of.program.clone(),
            dir: of.dir.clone().into(),
            hidden: of.hidden.clone(),
            held_end: None,
            unstarted: false,
        };
        let pipes = Pipes::new(plan).map_err(|error| at_step("pipe", &error))?;
        let console = Console::wanted(plan.process.terminal, &oci.dir)?;
        let mut args = vec![
            "create".to_owned(),
            "--bundle".to_owned(),
            text(&oci.dir),
            "--pid-file".to_owned(),
            text(&oci.dir.join("pid")),
        ];
        args.extend(Console::args(console.as_ref()));
        args.push(create.container_id.clone());
        let call = self.call(Calling {
            oci: &oci,
            args,
            stdio: &pipes.childs,
            named: Console::target(console.as_ref()).into_iter().collect(),
            freezer_tasks: freezer_tasks(&plan.cgroup),
            bundle: Some(Bundle {
                dir: &oci.dir,
                config: &of.config,
                rootfs: &plan.rootfs,
                staged: &of.staged,
                pid_ns: pid_ns.as_ref().map(AsFd::as_fd),
            }),
            cgroup_dir: unified_beside_v1(&plan.cgroup)?,
            user: plan
                .user_namespace
                .as_ref()
                .map(|user| (user, &plan.process)),
        })?;
        let serial = self.new_serial();
        let making = Making {
            serial,
            id: &create.container_id,
            plan,
            log,
            pid_ns,
            home: &self.home,
            asker,
        };
        let owns_pid_ns = plan.namespaces.iter().any(|namespace| {
            namespace.kind() == NamespaceKind::Pid
                && matches!(namespace.from, Some(NamespaceFrom::New(_)))
        });
        let mut container = Container::building(making, owns_pid_ns);
        container.oci = Some(oci);
        self.containers.push(container);
        let pipes = Pipes {
            // The runtime's end is its own now.
            childs: ChildStdio::default(),
            ..pipes
        };
        let verb = Verb::Create {
            asker,
            cgroup: plan.cgroup.clone(),
            pipes,
            console,
        };
        self.follow(call, verb, serial);
        Ok(())
    }

    /// Begins to start a created container.
    pub(crate) fn start_oci(&mut self, serial: u32, asker: Asker) -> Result<(), Failure> {
        let (oci, id) = self.oci(serial)?;
        let call = self.call(Calling {
            args: vec!["start".to_owned(), id],
            ..Calling::plain(&oci)
        })?;
        if let Some(container) = self.by_serial(serial) {
            container.phase = Phase::Starting(asker);
        }
        self.follow(call, Verb::Start(asker), serial);
        Ok(())
    }

    /// Begins to run one more process.
    pub(crate) fn exec_oci(
        &mut self,
        container: u32,
        ask: &wire::Exec,
        process: &wire::OciProcess,
        stdio: &ChildStdio,
        asker: Asker,
    ) -> Result<(), Failure> {
        let (oci, id) = self.oci(container)?;
        let console = Console::wanted(ask.process.terminal, &oci.dir)?;
        let file = process_file(&process.process).map_err(|error| at_step("memfd", &error))?;
        let pid_file = oci.dir.join(format!("exec-{:x}.pid", ask.exec_id));
        let mut args = vec![
            "exec".to_owned(),
            "--detach".to_owned(),
            "--process".to_owned(),
            proc_path(&file),
            "--pid-file".to_owned(),
            text(&pid_file),
        ];
        if !process.leaf.is_empty() {
            args.extend(["--cgroup".to_owned(), process.leaf.clone()]);
        }
        args.extend(Console::args(console.as_ref()));
        args.push(id);
        let target = Console::target(console.as_ref());
        let user = self
            .by_serial(container)
            .and_then(|container| container.user_namespace.clone());
        let call = self.call(Calling {
            args,
            user: user.as_ref().map(|user| (user, &ask.process)),
            stdio,
            named: target.into_iter().chain([&file]).collect(),
            freezer_tasks: freezer_tasks(&ask.cgroup),
            cgroup_dir: unified_beside_v1(&ask.cgroup)?,
            ..Calling::plain(&oci)
        })?;
        let serial = self.new_serial();
        let starting = Starting {
            asker,
            id: ask.exec_id,
            serial,
            cgroup: ask.cgroup.clone(),
            console,
            pid_file,
            deadline_ns: (ask.timeout_ms != 0)
                .then(|| boot_ns().saturating_add(ask.timeout_ms.saturating_mul(1_000_000))),
            timed_out: false,
        };
        self.follow(call, Verb::Exec(Box::new(starting)), container);
        Ok(())
    }

    /// Begins to make the runtime forget a container; `false` if there is nothing to wait for.
    fn delete_oci(&mut self, serial: u32) -> bool {
        let Ok((oci, id)) = self.oci(serial) else {
            return false;
        };
        let call = self.call(Calling {
            args: vec!["delete".to_owned(), "--force".to_owned(), id],
            ..Calling::plain(&oci)
        });
        match call {
            Ok(call) => {
                self.follow(call, Verb::Delete, serial);
                true
            }
            Err(_) => false,
        }
    }

    /// Ends the calls for a container.
    pub(crate) fn kill_calls(&self, container: u32) {
        for call in &self.calls {
            if call.container == container && !matches!(call.verb, Verb::Delete) {
                call.kill();
            }
        }
    }

    /// Ends all calls.
    pub(crate) fn kill_all_calls(&self) {
        for call in &self.calls {
            call.kill();
        }
    }

    /// Ends the call for an exec, if that is what is under way.
    pub(crate) fn kill_starting_exec(&self, exec_id: u64) {
        for call in &self.calls {
            if matches!(&call.verb, Verb::Exec(starting) if starting.id == exec_id) {
                call.kill();
            }
        }
    }

    /// Whether a container may be forgotten now; begins what has to be done before that.
    pub(crate) fn let_go_of(&mut self, serial: u32) -> bool {
        if self.calls.iter().any(|call| call.container == serial) {
            return false;
        }
        let Some(container) = self.by_serial(serial) else {
            return true;
        };
        // Its cgroups and directories go by name; this is for what else a runtime may keep.
        container.oci.is_none() || !self.delete_oci(serial)
    }

    /// Boot clock when a call has to be ended.
    pub(crate) fn next_call_deadline_ns(&self) -> Option<u64> {
        self.calls.iter().map(Call::next_deadline_ns).min()
    }

    /// Ends calls whose time is over.
    pub(crate) fn end_overdue_calls(&mut self) {
        let now = boot_ns();
        for call in &mut self.calls {
            if let Verb::Exec(starting) = &mut call.verb
                && starting.deadline_ns.is_some_and(|at| at <= now)
            {
                starting.deadline_ns = None;
                starting.timed_out = true;
                call.kill();
            }
            if call.deadline_ns <= now && !call.overdue {
                call.overdue = true;
                // Once more for what it has started meanwhile, should it not be gone at once.
                call.deadline_ns = now.saturating_add(SECOND_NS);
                call.kill();
            } else if call.deadline_ns <= now {
                call.deadline_ns = now.saturating_add(SECOND_NS);
                call.kill();
            }
        }
    }

    /// A child has ended that is nobody's yet: a call will name it, or it was some helper's.
    pub(crate) fn keep_stray(&mut self, pid: i32, ended: Ended) {
        if !self.calls.is_empty() && self.strays.len() < MAX_STRAYS {
            self.strays.push((pid, ended));
        }
    }

    /// Whether the end of a container's first process waits for an answer to `start`.
    pub(crate) fn hold_end(container: &mut Container, ended: Ended) -> bool {
        match (&container.phase, &mut container.oci) {
            (Phase::Starting(_), Some(oci)) => {
                oci.held_end = Some(ended);
                true
            }
            _ => false,
        }
    }

    /// A call has ended.
    pub(crate) fn on_call_end(&mut self, at: usize, ended: Ended) {
        let mut call = self.calls.remove(at);
        let failure = call.failure(ended);
        let container = call.container;
        match call.verb {
            Verb::Create {
                asker,
                cgroup,
                pipes,
                console,
            } => {
                let made = match failure {
                    None => self.take_first(container, asker, pipes, console),
                    Some(failure) => Err(with_stderr(failure, &pipes)),
                };
                if let Err(answer) = made {
                    // What it may have left, above all if it was killed.
                    cgroup::kill(&cgroup);
                    self.give_up(container, asker, answer);
                }
            }
            Verb::Start(asker) => self.started(container, asker, failure),
            Verb::Exec(starting) => self.take_exec(container, *starting, failure),
            Verb::Delete => {
                if let Some(container) = self.by_serial(container) {
                    container.oci = None;
                }
            }
        }
        if self.calls.is_empty() {
            self.strays.clear();
        }
        self.finish_deleting(container);
    }

    /// Takes over the first process of a container.
    fn take_first(
        &mut self,
        serial: u32,
        asker: Asker,
        pipes: Pipes,
        console: Option<Console>,
    ) -> Result<(), Answer> {
        let failed = |step: &str, error: &io::Error| Answer::Failed(at_step(step, error));
        let Some(oci) = self.by_serial(serial).and_then(|one| one.oci.clone()) else {
            return Ok(());
        };
        let pid = read_pid(&oci.dir.join("pid")).map_err(|error| failed("pid file", &error))?;
        let adopted = self
            .adopt(pid)
            .map_err(|error| failed("adopt the first process", &error))?;
        let terminal = console
            .map(Console::take)
            .transpose()
            .map_err(|error| failed("terminal", &error))?;
        let poll = &self.poll;
        let Some(container) = self.containers.iter_mut().find(|one| one.serial == serial) else {
            return Ok(());
        };
        container.phase = Phase::Created;
        let ended = match adopted {
            Adopted::Runs(pidfd) => {
                container.pid = pid;
                container.pidfd = Some(pidfd);
                if container.owns_pid_ns {
                    container.pid_ns = open_pid_ns(pid).ok();
                }
                None
            }
            Adopted::Ended(ended) => Some(ended),
        };
        let connected = match (terminal, pipes.outputs) {
            (Some(terminal), _) => {
                container
                    .stdio
                    .set_terminal(poll, terminal, container.takes_input)
            }
            (None, Some((stdout, stderr))) => {
                container.stdio.set_pipes(poll, pipes.input, stdout, stderr)
            }
            (None, None) => Ok(()),
        };
        connected.map_err(|error| failed("connect stdio", &error))?;
        self.answer(asker, Answer::Process(Process { pid }), Vec::new());
        if let Some(ended) = ended {
            self.on_container_end(serial, ended);
        }
        Ok(())
    }

    fn started(&mut self, serial: u32, asker: Asker, failure: Option<OciFailure>) {
        let Some(container) = self.by_serial(serial) else {
            return;
        };
        let held = container.oci.as_mut().and_then(|oci| oci.held_end.take());
        match failure {
            None => {
                container.phase = Phase::Running;
                container.started = true;
                self.done(asker);
            }
            Some(failure) => {
                container.phase = Phase::Created;
                container.kill();
                container.acknowledged = true;
                if let Some(oci) = &mut container.oci {
                    oci.unstarted = true;
                }
                self.answer(asker, Answer::OciFailed(failure), Vec::new());
            }
        }
        if let Some(ended) = held {
            self.on_container_end(serial, ended);
        }
    }

    /// Takes over an exec.
    fn take_exec(&mut self, of: u32, starting: Starting, failure: Option<OciFailure>) {
        let asker = starting.asker;
        let pid = read_pid(&starting.pid_file);
        let _ = fs::remove_file(&starting.pid_file);
        if starting.timed_out || failure.is_some() {
            cgroup::kill_leaf(&starting.cgroup);
        }
        if starting.timed_out {
            // It had its time, whatever it did with it.
            let pid = pid.unwrap_or_default();
            self.answer(asker, Answer::Process(Process { pid }), Vec::new());
            self.tell_exec_end(starting.id, Ended::Killed(libc::SIGKILL), true);
            return;
        }
        if let Some(failure) = failure {
            match self
                .by_serial(of)
                .map(|container| container.running().err())
            {
                // It ended while the command was on its way into it.
                Some(Some(ended)) => self.fail(asker, ended),
                _ => self.answer(asker, Answer::OciFailed(failure), Vec::new()),
            }
            return;
        }
        let taken = pid.and_then(|pid| {
            let adopted = self.adopt(pid)?;
            let terminal = starting.console.map(Console::take).transpose()?;
            Ok((pid, adopted, terminal))
        });
        let (pid, adopted, terminal) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                cgroup::kill_leaf(&starting.cgroup);
                self.fail(asker, at_step("adopt the process", &error));
                return;
            }
        };
        let terminal = terminal.into_iter().collect();
        self.answer(asker, Answer::Process(Process { pid }), terminal);
        match adopted {
            Adopted::Ended(ended) => self.tell_exec_end(starting.id, ended, false),
            Adopted::Runs(pidfd) => self.execs.push(Exec {
                serial: starting.serial,
                id: starting.id,
                pid,
                pidfd,
                cgroup: starting.cgroup,
                report: None,
                asker: None,
                terminal: None,
                deadline_ns: starting.deadline_ns,
                timed_out: false,
            }),
        }
    }

    /// Takes over a process that a runtime has left to us, dead or alive.
    fn adopt(&mut self, pid: i32) -> io::Result<Adopted> {
        if let Some(at) = self.strays.iter().position(|(stray, _)| *stray == pid) {
            return Ok(Adopted::Ended(self.strays.remove(at).1));
        }
        let pidfd = pidfd::open(pid)?;
        // Also tells whether it is our child at all.
        Ok(match pidfd::wait(&pidfd, false)? {
            None => Adopted::Runs(pidfd),
            Some(ended) => Adopted::Ended(ended),
        })
    }

    fn by_serial(&mut self, serial: u32) -> Option<&mut Container> {
        self.containers.iter_mut().find(|one| one.serial == serial)
    }

    fn oci(&mut self, serial: u32) -> Result<(Oci, String), Failure> {
        self.by_serial(serial)
            .and_then(|container| Some((container.oci.clone()?, container.id.clone())))
            .ok_or_else(|| at_step("container is not a runtime's", &no_such()))
    }

    fn call(&self, calling: Calling<'_>) -> Result<Called, Failure> {
        let failed = |step: &'static str| move |error: io::Error| at_step(step, &error);
        let (report, childs_report) = report::channel().map_err(failed("socketpair"))?;
        let (log, childs_log) = fd::pipe().map_err(failed("pipe"))?;
        fd::set_nonblocking(&log, true).map_err(failed("pipe"))?;
        let mut args = vec![
            "--root".to_owned(),
            text(&calling.oci.dir.join("state")),
            "--log".to_owned(),
            proc_path(&childs_log),
            "--log-format".to_owned(),
            "json".to_owned(),
        ];
        args.extend(calling.args);
        let named: Vec<_> = calling
            .named
            .into_iter()
            .chain([&childs_log])
            .map(AsFd::as_fd)
            .collect();
        let invocation = Invocation {
            program: &calling.oci.program,
            args: &args,
            hidden: &calling.oci.hidden,
            freezer_tasks: calling.freezer_tasks,
            oom_score_adj: self.home.oom_score_adj,
            stdio: calling.stdio,
            named: &named,
            bundle: calling.bundle,
            user: calling.user,
        };
        let namespaces = namespace_bits(libc::CLONE_NEWNS);
        let cgroup_dir = calling.cgroup_dir.as_ref().map(AsFd::as_fd);
        // SAFETY: the shim has one thread, and `runtime::run` does not return.
        match unsafe { clone::fork(namespaces, cgroup_dir) }.map_err(failed("clone"))? {
            Cloned::Child => runtime::run(&invocation, &childs_report),
            Cloned::Parent { pid, pidfd } => Ok(Called {
                runtime: Path::new(&calling.oci.program)
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default(),
                pid,
                pidfd,
                report,
                log,
            }),
        }
    }

    fn follow(&mut self, called: Called, verb: Verb, container: u32) {
        self.calls.push(Call {
            pid: called.pid,
            pidfd: called.pidfd,
            deadline_ns: boot_ns().saturating_add(verb.limit_s() * SECOND_NS),
            verb,
            runtime: called.runtime,
            container,
            report: called.report,
            log: called.log,
            overdue: false,
        });
    }
}

/// A call that is under way, to be followed.
struct Called {
    runtime: String,
    pid: i32,
    pidfd: OwnedFd,
    report: OwnedFd,
    log: OwnedFd,
}

impl<'a> Calling<'a> {
    fn plain(oci: &'a Oci) -> Self {
        Self {
            oci,
            args: Vec::new(),
            stdio: &NO_STDIO,
            named: Vec::new(),
            freezer_tasks: None,
            bundle: None,
            user: None,
            cgroup_dir: None,
        }
    }
}

static NO_STDIO: ChildStdio = ChildStdio {
    stdin: None,
    stdout: None,
    stderr: None,
};

enum Adopted {
    Runs(OwnedFd),
    Ended(Ended),
}

impl Call {
    /// Kills the runtime and what it has started: it leads a process group of its own, and what
    /// has left that is in the cgroup.
    fn kill(&self) {
        let _ = pidfd::send_signal(&self.pidfd, libc::SIGKILL);
        // Not reaped yet, so the number is still its.
        if let Some(group) = rustix::process::Pid::from_raw(self.pid) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        match &self.verb {
            Verb::Create { cgroup, .. } => cgroup::kill(cgroup),
            Verb::Exec(starting) => cgroup::kill_leaf(&starting.cgroup),
            Verb::Start(_) | Verb::Delete => {}
        }
    }

    fn next_deadline_ns(&self) -> u64 {
        match &self.verb {
            Verb::Exec(starting) => starting
                .deadline_ns
                .map_or(self.deadline_ns, |at| at.min(self.deadline_ns)),
            _ => self.deadline_ns,
        }
    }

    /// Why it did not do what it was called for.
    fn failure(&mut self, ended: Ended) -> Option<OciFailure> {
        let end = match ended {
            _ if self.overdue => format!("no end within {} s", self.verb.limit_s()),
            Ended::Exited(0) => return None,
            Ended::Exited(code) => match report::read(&self.report) {
                Some(Report::Failed(failure)) => {
                    let why = io::Error::from_raw_os_error(failure.errno);
                    format!("{}: {why}", failure.step)
                }
                _ => format!("exit code {code}"),
            },
            Ended::Killed(signal) => format!("killed by signal {signal}"),
        };
        Some(OciFailure {
            command: format!("{} {}", self.runtime, self.verb.command()),
            end,
            log: read_now(&self.log),
            stderr: Vec::new(),
            overdue: self.overdue,
        })
    }
}

fn with_stderr(mut failure: OciFailure, pipes: &Pipes) -> Answer {
    if let Some((_, stderr)) = &pipes.outputs
        && fd::set_nonblocking(stderr, true).is_ok()
    {
        failure.stderr = read_now(stderr);
    }
    Answer::OciFailed(failure)
}

/// What is in a pipe now, as far as it is kept.
fn read_now(pipe: &OwnedFd) -> Vec<u8> {
    let mut said = vec![0; SAID_BYTES];
    let count = rustix::io::read(pipe, &mut said).unwrap_or(0);
    said.truncate(count);
    said
}

/// The socket through which a runtime hands over a terminal. It has no name any more when the
/// runtime is called: what it is given leads to the socket itself, and no path is too long.
#[derive(Debug)]
struct Console {
    listener: OwnedFd,
    target: OwnedFd,
}

impl Console {
    fn wanted(terminal: bool, dir: &Path) -> Result<Option<Self>, Failure> {
        terminal
            .then(|| Self::new(dir).map_err(|error| at_step("console socket", &error)))
            .transpose()
    }

    fn new(dir: &Path) -> io::Result<Self> {
        const NAME: &str = "console";
        let dir = rustix::fs::open(
            dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(format!("{}/{NAME}", path::fd_path(&dir)))?;
        let mask = rustix::process::umask(Mode::from_bits_truncate(0o177));
        let bound = rustix::net::bind(&listener, &address);
        rustix::process::umask(mask);
        bound?;
        let target = rustix::fs::openat(
            &dir,
            NAME,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        );
        rustix::fs::unlinkat(&dir, NAME, AtFlags::empty())?;
        rustix::net::listen(&listener, 1)?;
        Ok(Self {
            listener,
            target: target?,
        })
    }

    fn target(this: Option<&Self>) -> Option<&OwnedFd> {
        this.map(|console| &console.target)
    }

    fn args(this: Option<&Self>) -> Vec<String> {
        this.map(|console| vec!["--console-socket".to_owned(), proc_path(&console.target)])
            .unwrap_or_default()
    }

    /// The terminal's controlling side, which was sent before the runtime ended.
    fn take(self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let sender = rustix::net::accept_with(&self.listener, flags)?;
        let (_, mut fds) = fd::recv_with_fds(&sender, &mut [0; 256], 1)?;
        let terminal = fds.pop().ok_or(io::ErrorKind::UnexpectedEof)?;
        terminal::verify_multiplexer(&terminal)?;
        Ok(terminal)
    }
}

/// A file that only this call sees.
fn process_file(process: &[u8]) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("process.json", MemfdFlags::CLOEXEC)?;
    let mut rest = process;
    while !rest.is_empty() {
        rest = &rest[rustix::io::write(&file, rest)?..];
    }
    Ok(file)
}

/// Name of a descriptor in the process that inherits it.
fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn no_such() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

/// Reads a pid file, of which no more is read than a pid has.
fn read_pid(path: &Path) -> io::Result<i32> {
    let mut content = String::new();
    fs::File::open(path)?
        .take(20)
        .read_to_string(&mut content)?;
    content
        .trim()
        .parse()
        .ok()
        .filter(|pid| *pid > 0)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The file that moves a process into the freezer's cgroup of a plan: the runtime does not see
/// that hierarchy, so what it starts stays there.
fn freezer_tasks(plan: &CgroupPlan) -> Option<String> {
    if plan.v1_freezer_leaf.is_empty() {
        cgroup::freezer_dir(&plan.v1_tasks).map(|dir| text(&dir.join("tasks")))
    } else {
        Some(format!("{}/tasks", plan.v1_freezer_leaf))
    }
}

/// On a hybrid host the unified tree is hidden too, and has no rules against processes in inner
/// cgroups; on version 2 a runtime refuses a cgroup that is not empty.
fn unified_beside_v1(plan: &CgroupPlan) -> Result<Option<OwnedFd>, Failure> {
    if plan.v1_tasks.is_empty() {
        Ok(None)
    } else {
        crate::container::open_cgroup(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_files_hold_one_positive_number() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("pid");
        for (content, expected) in [
            ("17", Some(17)),
            ("17\n", Some(17)),
            ("", None),
            ("0", None),
            ("-1", None),
            ("1 2", None),
            ("99999999999999999999999", None),
        ] {
            fs::write(&file, content).expect("written");
            assert_eq!(read_pid(&file).ok(), expected, "{content:?}");
        }
    }

    #[test]
    fn a_console_hands_over_a_terminal_and_nothing_else() {
        use std::os::unix::net::UnixStream;
        let dir = tempfile::tempdir().expect("temporary directory");
        let deep = dir.path().join("x".repeat(120));
        fs::create_dir(&deep).expect("made");
        let pty = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/pts/ptmx")
            .expect("a terminal");
        let null = fs::File::open("/dev/null").expect("a device");
        for (sent, accepted) in [(&pty, true), (&null, false)] {
            let console = Console::new(&deep).expect("made");
            assert_eq!(fs::read_dir(&deep).expect("listed").count(), 0);
            let sender = UnixStream::connect(proc_path(&console.target)).expect("connected");
            fd::send_with_fds(&sender, b"pts", &[sent.as_fd()]).expect("sent");
            drop(sender);
            assert_eq!(console.take().is_ok(), accepted);
        }
        let unused = Console::new(&deep).expect("made");
        assert!(unused.take().is_err());
    }
}
