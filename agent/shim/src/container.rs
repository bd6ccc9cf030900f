//! One container: made, started, ended, and what may be asked of it meanwhile.
//!
//! ```text
//!   Building --Ready--> Created --start--> Starting --execve--> Running --exit--> Ended
//!      |                   |                  |                                     ^
//!      +--Failed: gone     +------ exit ------|-------------------------------------+
//!                                             +--Failed: Ended without an exit -----+
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use longshore_sys::clone::Cloned;
use longshore_sys::{fd, pidfd};
use rustix::fs::{Mode, OFlags};

use crate::cgroup;
use crate::init::{self, ChildStdio};
use crate::log::LogFile;
use crate::oci::Oci;
use crate::pod::{fork_in, namespace_bits, open_pid_ns};
use crate::poll::{Interest, Poll, Token};
use crate::report;
use crate::stdio::Stdio;
use crate::wire::{
    CgroupPlan, ContainerPlan, ContainerReport, ExitStatus, Failure, NamespaceFrom, NamespaceKind,
    UserNamespace,
};

/// Who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asker {
    pub(crate) connection: u32,
    pub(crate) stream: u32,
}

/// Where in its life a container is.
#[derive(Debug)]
pub(crate) enum Phase {
    Building(Asker),
    Created,
    Starting(Asker),
    Running,
    Ended,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) serial: u32,
    pub(crate) id: String,
    pub(crate) phase: Phase,
    pub(crate) started: bool,
    /// Its first process; 0 once that ended.
    pub(crate) pid: i32,
    pub(crate) pidfd: Option<OwnedFd>,
    /// Where its processes live; `None` for the shim's own pid namespace.
    pub(crate) pid_ns: Option<OwnedFd>,
    /// Its first process is first in the namespace too: with it, all others end.
    pub(crate) owns_pid_ns: bool,
    pub(crate) cgroup: CgroupPlan,
    /// Its pod's; an exec needs to know.
    pub(crate) user_namespace: Option<UserNamespace>,
    pub(crate) report: Option<OwnedFd>,
    pub(crate) stdio: Stdio,
    pub(crate) takes_input: bool,
    pub(crate) exit: Option<ExitStatus>,
    /// The agent has committed the exit.
    pub(crate) acknowledged: bool,
    pub(crate) deleting: Option<Asker>,
    /// Built by an OCI runtime, which is called for more than its creation.
    pub(crate) oci: Option<Oci>,
}

/// What a container is made from.
pub(crate) struct Making<'a> {
    pub(crate) serial: u32,
    pub(crate) id: &'a str,
    pub(crate) plan: &'a ContainerPlan,
    pub(crate) log: Option<OwnedFd>,
    /// The pid namespace to live in; `None` for a new one or the shim's own.
    pub(crate) pid_ns: Option<OwnedFd>,
    pub(crate) home: &'a Home,
    pub(crate) asker: Asker,
}

/// What every child is born from.
#[derive(Debug)]
pub(crate) struct Home {
    /// The shim's own pid namespace, to come back to.
    pub(crate) pid_ns: OwnedFd,
    /// OOM score adjustment that the shim was started with: a plan without one means this.
    pub(crate) oom_score_adj: i32,
}

impl Container {
    /// Clones the first process, which begins to build; its reports come through the poll.
    pub(crate) fn make(poll: &Poll, making: Making<'_>) -> Result<Self, Failure> {
        let plan = making.plan;
        let flags = clone_flags(plan)?;
        let owns_pid_ns = flags & libc::CLONE_NEWPID != 0;
        // A user namespace is entered first, and if another process goes on there, the cgroup is
        // for that one.
        let in_user_ns = plan.user_namespace.is_some();
        let flags = if in_user_ns { 0 } else { flags };
        let cgroup_dir = if in_user_ns && owns_pid_ns {
            None
        } else {
            open_cgroup(&plan.cgroup)?
        };
        let pipes = Pipes::new(plan).map_err(|error| step(&error, "pipe"))?;
        let (report, childs_report) =
            report::channel().map_err(|error| step(&error, "socketpair"))?;
        let pid_ns = making.pid_ns.as_ref().map(AsFd::as_fd);
        // SAFETY: the shim has one thread, and `run_first` does not return.
        let cloned = unsafe {
            fork_in(
                pid_ns,
                &making.home.pid_ns,
                namespace_bits(flags),
                cgroup_dir.as_ref(),
            )
        };
        let (pid, pidfd) = match cloned.map_err(|error| step(&error, "clone"))? {
            Cloned::Child => init::run_first(
                plan,
                making.home.oom_score_adj,
                &childs_report,
                &pipes.childs,
            ),
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        drop(childs_report);
        let mut container = Self::building(making, owns_pid_ns);
        container.pid = pid;
        container.pidfd = Some(pidfd);
        if let Err(error) = container.connect(poll, report, pipes) {
            container.kill();
            container.abandon(poll);
            return Err(step(&error, "connect stdio"));
        }
        Ok(container)
    }

    /// One whose first process is still to come.
    pub(crate) fn building(making: Making<'_>, owns_pid_ns: bool) -> Self {
        let plan = making.plan;
        let log = making
            .log
            .zip(plan.log.as_ref())
            .map(|(file, log)| LogFile::new(file, log));
        Self {
            serial: making.serial,
            id: making.id.to_owned(),
            phase: Phase::Building(making.asker),
            started: false,
            pid: 0,
            pidfd: None,
            pid_ns: making.pid_ns,
            owns_pid_ns,
            cgroup: plan.cgroup.clone(),
            user_namespace: plan.user_namespace.clone(),
            report: None,
            stdio: Stdio::new(
                making.serial,
                log,
                plan.stdin_once,
                plan.console_bytes as usize,
            ),
            takes_input: plan.stdin,
            exit: None,
            acknowledged: false,
            deleting: None,
            oci: None,
        }
    }

    fn connect(&mut self, poll: &Poll, report: OwnedFd, pipes: Pipes) -> io::Result<()> {
        poll.watch(&report, Token::ContainerReport(self.serial), Interest::Read)?;
        self.report = Some(report);
        if self.owns_pid_ns && self.user_namespace.is_none() {
            self.pid_ns = Some(open_pid_ns(self.pid)?);
        }
        if let Some((stdout, stderr)) = pipes.outputs {
            self.stdio.set_pipes(poll, pipes.input, stdout, stderr)?;
        }
        Ok(())
    }

    /// Goes on with the process that has taken the first one's place in a user namespace.
    pub(crate) fn succeed(&mut self, pid: i32, pidfd: OwnedFd) -> io::Result<()> {
        self.pid = pid;
        self.pidfd = Some(pidfd);
        self.pid_ns = Some(open_pid_ns(pid)?);
        Ok(())
    }

    pub(crate) fn report(&self) -> ContainerReport {
        ContainerReport {
            container_id: self.id.clone(),
            pid: self.pid,
            started: self.started,
            exit: self.exit,
        }
    }

    /// The first process, while it runs the container's program.
    pub(crate) fn running(&self) -> Result<BorrowedFd<'_>, Failure> {
        match (&self.phase, &self.pidfd) {
            (Phase::Running, Some(pidfd)) => Ok(pidfd.as_fd()),
            _ => Err(ended()),
        }
    }

    /// Kills what there is of it.
    pub(crate) fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            // It may have ended already.
            let _ = pidfd::send_signal(pidfd, libc::SIGKILL);
        }
        if !self.owns_pid_ns {
            cgroup::kill(&self.cgroup);
        }
    }

    /// Waits until the first process is gone and lets go of all that belongs to it. Only for one
    /// that never ran its program: it ends at once.
    pub(crate) fn abandon(&mut self, poll: &Poll) {
        if let Some(pidfd) = self.pidfd.take() {
            let _ = pidfd::send_signal(&pidfd, libc::SIGKILL);
            // ECHILD if the reaping has come first.
            let _ = pidfd::wait(&pidfd, true);
        }
        self.pid = 0;
        self.close_report(poll);
        self.stdio.close(poll);
        self.phase = Phase::Ended;
    }

    pub(crate) fn close_report(&mut self, poll: &Poll) {
        if let Some(report) = self.report.take() {
            poll.forget(&report);
        }
    }
}

fn step(error: &io::Error, name: &str) -> Failure {
    Failure {
        step: name.into(),
        errno: error.raw_os_error().unwrap_or(libc::EINVAL),
    }
}

/// `CLONE_*` bits of the namespaces that are made for a container, but the cgroup one.
pub(crate) fn clone_flags(plan: &ContainerPlan) -> Result<libc::c_int, Failure> {
    let mut flags = 0;
    for namespace in &plan.namespaces {
        let new = matches!(namespace.from, Some(NamespaceFrom::New(_)));
        flags |= match namespace.kind() {
            NamespaceKind::Mount if new => libc::CLONE_NEWNS,
            NamespaceKind::Pid if new => libc::CLONE_NEWPID,
            NamespaceKind::Network if new => libc::CLONE_NEWNET,
            NamespaceKind::Uts if new => libc::CLONE_NEWUTS,
            NamespaceKind::Ipc if new => libc::CLONE_NEWIPC,
            NamespaceKind::User | NamespaceKind::Mount => {
                return Err(Failure {
                    step: format!("namespace {:?}", namespace.kind()),
                    errno: libc::ENOSYS,
                });
            }
            _ => 0,
        };
    }
    if flags & libc::CLONE_NEWNS == 0 {
        return Err(Failure {
            step: "a container needs a mount namespace".into(),
            errno: libc::EINVAL,
        });
    }
    Ok(flags)
}

/// Opens the version 2 cgroup to be born into.
pub(crate) fn open_cgroup(plan: &CgroupPlan) -> Result<Option<OwnedFd>, Failure> {
    if plan.v2_dir.is_empty() {
        return Ok(None);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(plan.v2_dir.as_str(), flags, Mode::empty())
        .map(Some)
        .map_err(|error| step(&error.into(), &format!("open {}", plan.v2_dir)))
}

/// Both ends of a container's stdio, without a terminal.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    pub(crate) childs: ChildStdio,
    pub(crate) input: Option<OwnedFd>,
    pub(crate) outputs: Option<(OwnedFd, OwnedFd)>,
}

impl Pipes {
    pub(crate) fn new(plan: &ContainerPlan) -> io::Result<Self> {
        if plan.process.terminal {
            return Ok(Self::default());
        }
        let (stdin, input) = if plan.stdin {
            let (read, write) = fd::pipe()?;
            (Some(read), Some(write))
        } else {
            (None, None)
        };
        let (out_read, stdout) = fd::pipe()?;
        let (err_read, stderr) = fd::pipe()?;
        Ok(Self {
            childs: ChildStdio {
                stdin,
                stdout: Some(stdout),
                stderr: Some(stderr),
            },
            input,
            outputs: Some((out_read, err_read)),
        })
    }
}

/// Why nothing can join a container.
pub(crate) fn ended() -> Failure {
    Failure {
        step: "container is not running".into(),
        errno: libc::ESRCH,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Empty, Namespace};

    fn plan(namespaces: &[(NamespaceKind, NamespaceFrom)]) -> ContainerPlan {
        ContainerPlan {
            namespaces: namespaces
                .iter()
                .map(|(kind, from)| Namespace {
                    kind: (*kind).into(),
                    from: Some(from.clone()),
                })
                .collect(),
            ..ContainerPlan::default()
        }
    }

    #[test]
    fn only_new_namespaces_are_cloned_and_a_mount_namespace_is_a_must() {
        use NamespaceFrom::{New, Path, Pod};
        let mount = (NamespaceKind::Mount, New(Empty {}));
        type Case<'a> = (&'a [(NamespaceKind, NamespaceFrom)], Option<i32>);
        let cases: [Case<'_>; 5] = [
            (&[], None),
            (std::slice::from_ref(&mount), Some(libc::CLONE_NEWNS)),
            (
                &[
                    mount.clone(),
                    (NamespaceKind::Pid, Pod(Empty {})),
                    (NamespaceKind::Network, Path("/x".into())),
                    (NamespaceKind::Cgroup, New(Empty {})),
                ],
                Some(libc::CLONE_NEWNS),
            ),
            (
                &[
                    mount.clone(),
                    (NamespaceKind::Pid, New(Empty {})),
                    (NamespaceKind::Uts, New(Empty {})),
                ],
                Some(libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS),
            ),
            (&[mount.clone(), (NamespaceKind::User, New(Empty {}))], None),
        ];
        for (namespaces, expected) in cases {
            let got = clone_flags(&plan(namespaces)).ok();
            assert_eq!(got, expected, "{namespaces:?}");
        }
    }
}
