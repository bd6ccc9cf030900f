//! One more process in a running container, and its deadline.

use std::os::fd::OwnedFd;

use longshore_sys::clone::Cloned;
use longshore_sys::pidfd;

use crate::cgroup;
use crate::container::{Asker, Container, Home, ended, open_cgroup};
use crate::exit::boot_ns;
use crate::init::{self, ChildStdio, Target};
use crate::pod::fork_in;
use crate::poll::{Interest, Poll, Token};
use crate::report;
use crate::wire::{self, CgroupPlan, Failure};

/// An exec, from its clone until it is reaped.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) serial: u32,
    pub(crate) id: u64,
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) cgroup: CgroupPlan,
    pub(crate) report: Option<OwnedFd>,
    /// Who waits to hear that the program runs; taken when answered.
    pub(crate) asker: Option<Asker>,
    /// The controlling side of its terminal, until it is handed over with the answer.
    pub(crate) terminal: Option<OwnedFd>,
    /// Boot clock, nanoseconds.
    pub(crate) deadline_ns: Option<u64>,
    pub(crate) timed_out: bool,
}

impl Exec {
    /// Clones the process, which joins the container; its reports come through the poll.
    pub(crate) fn make(
        poll: &Poll,
        serial: u32,
        ask: &wire::Exec,
        container: &Container,
        stdio: ChildStdio,
        home: &Home,
        asker: Asker,
    ) -> Result<Self, Failure> {
        let failed = |name: &str, error: std::io::Error| Failure {
            step: name.into(),
            errno: error.raw_os_error().unwrap_or(libc::EINVAL),
        };
        let target = Target {
            process: container.running()?,
            user_namespace: container.user_namespace.as_ref(),
        };
        let cgroup_dir = open_cgroup(&ask.cgroup)?;
        let (report, childs_report) =
            report::channel().map_err(|error| failed("socketpair", error))?;
        poll.watch(&report, Token::ExecReport(serial), Interest::Read)
            .map_err(|error| failed("epoll_ctl", error))?;
        let pid_ns = container.pid_ns.as_ref().map(std::os::fd::AsFd::as_fd);
        // SAFETY: the shim has one thread, and `run_exec` does not return.
        let cloned = unsafe { fork_in(pid_ns, &home.pid_ns, 0, cgroup_dir.as_ref()) };
        let (pid, pidfd) = match cloned {
            Ok(Cloned::Child) => init::run_exec(
                &ask.process,
                &ask.cgroup,
                target,
                home.oom_score_adj,
                &childs_report,
                &stdio,
            ),
            Ok(Cloned::Parent { pid, pidfd }) => (pid, pidfd),
            Err(error) => {
                poll.forget(&report);
                // What a pid namespace says whose first process has ended, before that is reaped.
                if pid_ns.is_some() && error.raw_os_error() == Some(libc::ENOMEM) {
                    return Err(ended());
                }
                return Err(failed("clone", error));
            }
        };
        Ok(Self {
            serial,
            id: ask.exec_id,
            pid,
            pidfd,
            cgroup: ask.cgroup.clone(),
            report: Some(report),
            asker: Some(asker),
            terminal: None,
            deadline_ns: (ask.timeout_ms != 0)
                .then(|| boot_ns().saturating_add(ask.timeout_ms.saturating_mul(1_000_000))),
            timed_out: false,
        })
    }

    /// Kills it and what it started.
    pub(crate) fn kill(&self) {
        let _ = pidfd::send_signal(&self.pidfd, libc::SIGKILL);
        cgroup::kill_leaf(&self.cgroup);
    }

    pub(crate) fn close_report(&mut self, poll: &Poll) {
        if let Some(report) = self.report.take() {
            poll.forget(&report);
        }
    }
}
