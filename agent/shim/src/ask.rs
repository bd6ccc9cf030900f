//! The agent's wishes, one function each.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use longshore_sys::pidfd;
use rustix::io::Errno;

use crate::connection::Incoming;
use crate::container::{Asker, Container, Making, Phase};
use crate::exec::Exec;
use crate::exit::boot_ns;
use crate::init::{ChildStdio, terminal};
use crate::pod::{self, PodInit};
use crate::poll::Stream;
use crate::report;
use crate::shim::{Shim, Stopping, at_step};
use crate::wire::{
    self, Answer, Ask, ContainerPlan, Failure, Named, NamespaceFrom, NamespaceKind, VERSION,
    Welcome,
};

/// How long a shutdown waits for processes that were killed.
const STOP_NS: u64 = 10_000_000_000;

/// A wish either is answered at once, or has left its asker where the answer will come from.
type Served = Result<Option<Answer>, Failure>;

const DONE: Served = Ok(Some(Answer::Done(wire::Empty {})));

impl Shim {
    pub(crate) fn serve(&mut self, connection: u32, incoming: Incoming) {
        let Incoming {
            stream,
            request,
            mut fds,
        } = incoming;
        let asker = Asker { connection, stream };
        let Some(ask) = request.ask else {
            return;
        };
        let greeted = self
            .connection(connection)
            .is_some_and(|connection| connection.greeted);
        if fds.len() != expected_fds(&ask) || greeted == matches!(ask, Ask::Hello(_)) {
            self.disconnect(connection);
            return;
        }
        let served = match ask {
            Ask::Hello(hello) => {
                self.hello(asker, hello);
                return;
            }
            Ask::Create(create) => self.create(asker, &create, fds.pop_front()),
            Ask::Start(named) => self.start(asker, &named),
            Ask::Signal(signal) => self.signal(&signal),
            Ask::Exec(exec) => self.exec(asker, &exec, fds),
            Ask::Attach(attach) => self.attach(&attach, fds),
            Ask::Resize(resize) => self.resize(&resize),
            Ask::CloseStdin(named) => self.close_stdin(&named),
            Ask::ReopenLog(named) => self.reopen_log(&named, fds.pop_front()),
            Ask::AckExit(named) => self.acknowledge_exit(&named),
            Ask::Delete(named) => self.delete(asker, &named),
            Ask::Shutdown(_) => self.shutdown(asker),
            Ask::KillExec(kill) => self.kill_exec(kill),
        };
        match served {
            Ok(Some(answer)) => self.answer(asker, answer, Vec::new()),
            Ok(None) => {}
            Err(failure) => self.fail(asker, failure),
        }
    }

    fn hello(&mut self, asker: Asker, hello: wire::Hello) {
        if hello.version != VERSION && hello.version != VERSION + 1 {
            let failure = at_step("version", &Errno::PROTONOSUPPORT.into());
            self.fail(asker, failure);
            return;
        }
        let older: Vec<u32> = self
            .connections
            .iter()
            .filter(|connection| connection.greeted)
            .map(|connection| connection.serial)
            .collect();
        for serial in older {
            self.disconnect(serial);
        }
        if let Some(connection) = self.connection(asker.connection) {
            connection.greeted = true;
        }
        let welcome = Welcome {
            version: VERSION,
            pid: std::process::id().cast_signed(),
            containers: self.containers.iter().map(Container::report).collect(),
            pod_init_pid: self.pod_init.as_ref().map_or(0, |init| init.pid),
        };
        self.answer(asker, Answer::Welcome(welcome), Vec::new());
        self.tell_kept_exits();
    }

    fn find(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers
            .iter_mut()
            .find(|container| container.id == id)
            .ok_or_else(|| at_step("unknown container", &Errno::NOENT.into()))
    }

    fn create(&mut self, asker: Asker, create: &wire::Create, log: Option<OwnedFd>) -> Served {
        let id = create.container_id.as_str();
        if !is_file_name(id) {
            return Err(at_step("container id", &Errno::INVAL.into()));
        }
        if self.find(id).is_ok() {
            return Err(at_step("container exists", &Errno::EXIST.into()));
        }
        if self.stopping.is_some() {
            return Err(at_step("shutting down", &Errno::CANCELED.into()));
        }
        let pid_ns = self.choose_pid_ns(&create.plan)?;
        if let Some(oci) = &create.oci {
            self.create_oci(asker, create, oci, log, pid_ns)?;
            return Ok(None);
        }
        let serial = self.new_serial();
        let making = Making {
            serial,
            id,
            plan: &create.plan,
            log,
            pid_ns,
            home: &self.home,
            asker,
        };
        self.containers.push(Container::make(&self.poll, making)?);
        Ok(None)
    }

    /// A handle on the pid namespace to be born into, if it is neither new nor the shim's.
    fn choose_pid_ns(&mut self, plan: &ContainerPlan) -> Result<Option<OwnedFd>, Failure> {
        let failed = |error: std::io::Error| at_step("pid namespace", &error);
        let from = plan
            .namespaces
            .iter()
            .find(|namespace| namespace.kind() == NamespaceKind::Pid)
            .and_then(|namespace| namespace.from.as_ref());
        match from {
            None | Some(NamespaceFrom::New(_)) => Ok(None),
            Some(NamespaceFrom::Pod(_)) => {
                if self.pod_init.is_none() {
                    self.pod_init = Some(PodInit::spawn(&self.dir, plan)?);
                }
                let init = self.pod_init.as_ref().expect("made above");
                init.pid_ns.try_clone().map(Some).map_err(failed)
            }
            Some(NamespaceFrom::Container(id)) => {
                let target = self.find(id)?;
                let alive = target.pid != 0;
                match &target.pid_ns {
                    Some(pid_ns) if alive => pid_ns.try_clone().map(Some).map_err(failed),
                    None if alive => Ok(None),
                    _ => Err(at_step("container is not running", &Errno::SRCH.into())),
                }
            }
            Some(NamespaceFrom::Path(path)) => pod::open_ns(path).map(Some).map_err(failed),
        }
    }

    fn start(&mut self, asker: Asker, named: &Named) -> Served {
        let container = self.find(&named.container_id)?;
        if container.oci.is_some() && matches!(container.phase, Phase::Created) {
            let serial = container.serial;
            self.start_oci(serial, asker)?;
            return Ok(None);
        }
        match (&container.phase, &container.report) {
            (Phase::Created, Some(report)) => {
                report::start(report).map_err(|error| at_step("start", &error))?;
                container.phase = Phase::Starting(asker);
                Ok(None)
            }
            _ => Err(at_step("container is not created", &Errno::INVAL.into())),
        }
    }

    fn signal(&mut self, signal: &wire::Signal) -> Served {
        let container = self.find(&signal.container_id)?;
        let Some(process) = &container.pidfd else {
            return Err(at_step("container is not running", &Errno::SRCH.into()));
        };
        pidfd::send_signal(process, signal.signal).map_err(|error| at_step("signal", &error))?;
        DONE
    }

    fn exec(&mut self, asker: Asker, ask: &wire::Exec, mut fds: VecDeque<OwnedFd>) -> Served {
        if self.stopping.is_some() {
            return Err(at_step("shutting down", &Errno::CANCELED.into()));
        }
        let mut next = |wanted: bool| if wanted { fds.pop_front() } else { None };
        let stdio = ChildStdio {
            stdin: next(ask.stdin),
            stdout: next(ask.stdout),
            stderr: next(ask.stderr),
        };
        if let Some(process) = &ask.oci {
            let container = self.find(&ask.container_id)?;
            container.running()?;
            let serial = container.serial;
            self.exec_oci(serial, ask, process, &stdio, asker)?;
            return Ok(None);
        }
        let serial = self.new_serial();
        let container = self
            .containers
            .iter()
            .find(|container| container.id == ask.container_id)
            .ok_or_else(|| at_step("unknown container", &Errno::NOENT.into()))?;
        let exec = Exec::make(&self.poll, serial, ask, container, stdio, &self.home, asker)?;
        self.execs.push(exec);
        Ok(None)
    }

    fn attach(&mut self, ask: &wire::Attach, mut fds: VecDeque<OwnedFd>) -> Served {
        let at = self
            .containers
            .iter()
            .position(|container| container.id == ask.container_id)
            .ok_or_else(|| at_step("unknown container", &Errno::NOENT.into()))?;
        let container = &mut self.containers[at];
        if matches!(container.phase, Phase::Ended) {
            return Err(at_step("container is not running", &Errno::SRCH.into()));
        }
        let failed = |error: std::io::Error| at_step("attach", &error);
        let stdio = &mut container.stdio;
        let mut next = |wanted: bool| if wanted { fds.pop_front() } else { None };
        let (stdin, stdout, stderr) = (next(ask.stdin), next(ask.stdout), next(ask.stderr));
        // Readers first: what the new input brings about is for them.
        for (fd, stream) in [(stdout, Stream::Stdout), (stderr, Stream::Stderr)] {
            if let Some(fd) = fd {
                stdio
                    .attach_reader(&self.poll, fd, stream, ask.replay)
                    .map_err(failed)?;
            }
        }
        if let Some(fd) = stdin {
            stdio.attach_writer(&self.poll, fd).map_err(failed)?;
        }
        DONE
    }

    fn resize(&mut self, resize: &wire::Resize) -> Served {
        let container = self.find(&resize.container_id)?;
        let Some(controlling) = container.stdio.terminal() else {
            return Err(at_step("container has no terminal", &Errno::NOTTY.into()));
        };
        rustix::termios::tcsetwinsize(
            controlling.as_fd(),
            terminal::size(resize.width, resize.height),
        )
        .map_err(|error| at_step("resize", &error.into()))?;
        DONE
    }

    fn close_stdin(&mut self, named: &Named) -> Served {
        self.find(&named.container_id)?;
        let container = self
            .containers
            .iter_mut()
            .find(|container| container.id == named.container_id);
        if let Some(container) = container {
            container.stdio.close_input(&self.poll);
        }
        DONE
    }

    fn reopen_log(&mut self, named: &Named, file: Option<OwnedFd>) -> Served {
        let container = self.find(&named.container_id)?;
        if file.is_some_and(|file| container.stdio.reopen_log(file)) {
            DONE
        } else {
            Err(at_step("container has no log", &Errno::NOENT.into()))
        }
    }

    fn acknowledge_exit(&mut self, named: &Named) -> Served {
        self.find(&named.container_id)?.acknowledged = true;
        self.exits.drop(&named.container_id);
        DONE
    }

    fn delete(&mut self, asker: Asker, named: &Named) -> Served {
        // Unknown: forgotten already, as wished.
        let Ok(container) = self.find(&named.container_id) else {
            return DONE;
        };
        let serial = container.serial;
        if container.deleting.is_some() {
            return Err(at_step(
                "container is being deleted",
                &Errno::ALREADY.into(),
            ));
        }
        container.deleting = Some(asker);
        container.kill();
        self.kill_calls(serial);
        self.finish_deleting(serial);
        Ok(None)
    }

    fn shutdown(&mut self, asker: Asker) -> Served {
        self.stopping = Some(Stopping {
            asker,
            deadline_ns: boot_ns().saturating_add(STOP_NS),
        });
        self.kill_all_calls();
        for exec in &self.execs {
            exec.kill();
        }
        for container in &self.containers {
            container.kill();
        }
        if let Some(init) = &self.pod_init {
            // It may have ended already.
            let _ = pidfd::send_signal(&init.pidfd, libc::SIGKILL);
        }
        Ok(None)
    }

    fn kill_exec(&mut self, kill: wire::KillExec) -> Served {
        // One that has ended is killed already.
        if let Some(exec) = self.execs.iter().find(|exec| exec.id == kill.exec_id) {
            exec.kill();
        }
        self.kill_starting_exec(kill.exec_id);
        DONE
    }
}

/// Descriptors that must come beside a wish.
fn expected_fds(ask: &Ask) -> usize {
    match ask {
        Ask::Create(create) => usize::from(create.plan.log.is_some()),
        Ask::Exec(exec) if exec.process.terminal => 0,
        Ask::Exec(exec) => [exec.stdin, exec.stdout, exec.stderr]
            .into_iter()
            .map(usize::from)
            .sum(),
        Ask::Attach(attach) => [attach.stdin, attach.stdout, attach.stderr]
            .into_iter()
            .map(usize::from)
            .sum(),
        Ask::ReopenLog(_) => 1,
        _ => 0,
    }
}

/// Ids become names of files.
fn is_file_name(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 128
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_files() {
        for (id, expected) in [
            ("0123abc", true),
            ("a-b_c", true),
            ("", false),
            ("..", false),
            ("a/b", false),
            ("a.tmp", false),
        ] {
            assert_eq!(is_file_name(id), expected, "{id}");
        }
        assert!(!is_file_name(&"x".repeat(129)));
    }

    #[test]
    fn each_wish_says_how_many_descriptors_it_brings() {
        let mut exec = wire::Exec {
            stdin: true,
            stderr: true,
            ..wire::Exec::default()
        };
        assert_eq!(expected_fds(&Ask::Exec(exec.clone())), 2);
        exec.process.terminal = true;
        assert_eq!(expected_fds(&Ask::Exec(exec)), 0);
        assert_eq!(expected_fds(&Ask::ReopenLog(Named::default())), 1);
        assert_eq!(expected_fds(&Ask::Create(wire::Create::default())), 0);
    }
}
