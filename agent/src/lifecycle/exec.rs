//! Exec: one more process in a running container, connected to a client.

use std::{sync::Arc, time::Duration};

use rustix::io::Errno;
use tracing::Instrument as _;

use super::{
    Lifecycle, LifecycleError,
    container::{Container, UserWish},
    session::{self, Kind, Session, SessionControl},
    spec::{self, ExecProcess},
    start_container::wrong_state,
};
use crate::{
    blocking,
    handler::{ExecRequest, Handler as _, HandlerError, Streams},
    id::Face,
};

/// What to run. Everything that is not said equals the container's first process.
#[derive(Clone, Debug, Default)]
pub struct ExecWish {
    /// Program and arguments; not empty.
    pub command: Vec<String>,
    /// On top of the container's.
    pub env: Vec<(String, Vec<u8>)>,
    /// None is the container's.
    pub working_dir: Option<String>,
    /// None is the container's.
    pub user: Option<UserWish>,
    /// On a terminal.
    pub tty: bool,
    /// With input.
    pub stdin: bool,
    /// Output is wanted.
    pub stdout: bool,
    /// Errors are wanted; a terminal has none of its own.
    pub stderr: bool,
    /// Size of the terminal: columns, rows.
    pub size: Option<(u16, u16)>,
    /// After which it and all that it started is killed.
    pub timeout: Option<Duration>,
}

impl Lifecycle {
    /// Runs a command in a running container.
    ///
    /// # Errors
    /// `NotFound`; `State` unless it runs; `Spec`; `Handler` when it can't be executed.
    pub async fn exec(
        self: &Arc<Self>,
        face: Face,
        id: &str,
        wish: ExecWish,
    ) -> Result<Session, LifecycleError> {
        let container = self.find_container(&self.store.snapshot(), face, id)?;
        if !container.is_running() {
            return Err(wrong_state(&container, "CONTAINER_RUNNING"));
        }
        let frozen = container.config.system.is_some() && self.cgroups.is_frozen(&container.cgroup);
        if frozen {
            return Err(LifecycleError::State {
                kind: "system container",
                id: container.config.name.clone(),
                state: "FROZEN",
                wanted: "RUNNING",
            });
        }
        // On a task of its own: a caller who leaves half way would leave a process behind. A session
        // that nobody takes ends what it is about.
        let lifecycle = Arc::clone(self);
        let starting = async move { lifecycle.exec_in(&container, wish).await };
        match tokio::spawn(starting.in_current_span()).await {
            Ok(session) => session,
            Err(failed) => match failed.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The agent ends, and with it whoever asked.
                Err(_) => std::future::pending().await,
            },
        }
    }

    async fn exec_in(
        self: &Arc<Self>,
        container: &Container,
        wish: ExecWish,
    ) -> Result<Session, LifecycleError> {
        let user = match wish.user.clone() {
            Some(user) => Some(self.exec_user(container, user).await?),
            None => None,
        };
        let process = spec::exec_process(
            &container.spec,
            ExecProcess {
                command: wish.command,
                env: match container.config.system {
                    Some(_) => system_env(wish.env, user.is_none()),
                    None => wish.env,
                },
                working_dir: wish.working_dir,
                user,
                tty: wish.tty,
                size: wish.size,
            },
        )?;
        let mut streams = Streams::default();
        let (mut stdin, mut stdout, mut stderr) = (None, None, None);
        if !wish.tty {
            if wish.stdin {
                let (theirs, ours) = session::input()?;
                (streams.stdin, stdin) = (Some(theirs), Some(ours));
            }
            if wish.stdout {
                let (theirs, ours) = session::output()?;
                (streams.stdout, stdout) = (Some(theirs), Some(ours));
            }
            if wish.stderr {
                let (theirs, ours) = session::output()?;
                (streams.stderr, stderr) = (Some(theirs), Some(ours));
            }
        }
        let env = spec::env_bytes(&process);
        let exec = self
            .handler
            .exec(ExecRequest {
                handler: self.handler_of(&container.sandbox_id)?,
                sandbox_id: container.sandbox_id.clone(),
                container_id: container.id.clone(),
                process,
                env,
                seccomp: container
                    .spec
                    .linux()
                    .as_ref()
                    .and_then(|linux| linux.seccomp().clone()),
                cgroup: container.process_cgroup(),
                streams,
                timeout: wish.timeout,
            })
            .await
            .map_err(|error| refusal(container, error))?;
        let mut size = None;
        if let Some(master) = exec.terminal {
            let (input, output, fd) = session::terminal(master)?;
            stdin = wish.stdin.then_some(input);
            stdout = Some(output);
            size = Some(fd);
        }
        let kind = Kind::Exec {
            exec_id: exec.exec_id,
            terminal: size,
            exit: Some(exec.exit),
        };
        Ok(Session {
            pid: Some(exec.pid),
            tty: wish.tty,
            stdin,
            stdout,
            stderr,
            control: SessionControl::new(
                Arc::clone(self),
                container.sandbox_id.clone(),
                container.id.clone(),
                kind,
            ),
        })
    }

    async fn exec_user(
        &self,
        container: &Container,
        wish: UserWish,
    ) -> Result<super::container::User, LifecycleError> {
        let (rootfs, layers) = (self.rootfs.clone(), container.layers.clone());
        // Of a system as it is now; of any other container as its image was.
        let written = container.config.system.is_some();
        let writable = written.then(|| container.writable().clone());
        blocking::run("read users", move || {
            let read = |path| match &writable {
                Some(id) => rootfs.read_written_file(id, &layers, path, 1 << 20),
                None => rootfs.read_file(&layers, path, 1 << 20),
            };
            let (passwd, group) = (read("etc/passwd")?, read("etc/group")?);
            Ok(spec::resolve_user(
                &wish,
                "",
                passwd.as_deref(),
                group.as_deref(),
            )?)
        })
        .await
    }
}

/// A login's variables, where the wish does not say: an init's own are no use to anybody.
fn system_env(mut env: Vec<(String, Vec<u8>)>, is_root: bool) -> Vec<(String, Vec<u8>)> {
    let usual = [
        ("PATH", spec::DEFAULT_PATH, true),
        ("LANG", "C.UTF-8", true),
        ("HOME", "/root", is_root),
        ("USER", "root", is_root),
    ];
    for (name, value, wanted) in usual {
        if wanted && !env.iter().any(|(known, _)| known == name) {
            env.push((name.to_owned(), value.as_bytes().to_vec()));
        }
    }
    env
}

/// A container that ended while the command was on its way into it is no fault of the engine.
fn refusal(container: &Container, error: HandlerError) -> LifecycleError {
    if error.errno() == Some(Errno::SRCH.raw_os_error()) {
        return LifecycleError::State {
            kind: "container",
            id: container.id.to_string(),
            state: "CONTAINER_EXITED",
            wanted: "CONTAINER_RUNNING",
        };
    }
    error.into()
}
