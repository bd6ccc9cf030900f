//! One shim per pod, spoken to over its socket: by the native engine in it, or an OCI runtime that it
//! calls.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::future::BoxFuture;
use longshore_shim::wire::{self, Ask};
use oci_spec::runtime::LinuxSeccomp;
use tokio::sync::mpsc;
use tracing::warn;

use super::{
    CreateRequest, Exec, ExecRequest, Features, Handler, HandlerChapterConfig, HandlerError,
    NATIVE, RuntimeConfig, ShimEvent, Streams, lower, oci,
    runtimes::{Runtime, Runtimes},
    seccomp::{Cache, Program},
    shim::{self, Shim, ShimProgram},
};
use crate::{
    blocking,
    cgroup::Cgroups,
    clock::Time,
    id::{ContainerId, SandboxId},
};

/// Events that wait for the one reader; past that each waits on its own.
const EVENTS: usize = 1024;

/// What the engine in the shim can.
const NATIVE_FEATURES: Features = Features {
    recursive_readonly: true,
    user_namespaces: true,
};

/// The engine in the shim, and the OCI runtimes that shims call.
#[derive(Debug)]
pub struct NativeHandler {
    program: ShimProgram,
    cgroups: Arc<Cgroups>,
    profiles: Arc<Cache>,
    runtimes: Runtimes,
    shims: Mutex<HashMap<SandboxId, Arc<Shim>>>,
    next_exec: AtomicU64,
    events: mpsc::Sender<ShimEvent>,
    unread: Mutex<Option<mpsc::Receiver<ShimEvent>>>,
}

impl NativeHandler {
    /// Loads the shim's program into memory, from which all shims run: what is installed may be
    /// replaced meanwhile, and containers cannot reach the file.
    ///
    /// # Errors
    /// `ShimMissing` if it is neither configured nor beside the agent's own; `BadName` and
    /// `RuntimeMissing` for configured runtimes.
    pub fn new(
        config: &HandlerChapterConfig,
        runtimes: &BTreeMap<String, RuntimeConfig>,
        cgroups: Arc<Cgroups>,
    ) -> Result<Self, HandlerError> {
        let (events, unread) = mpsc::channel(EVENTS);
        // Ids must differ from those of earlier agents that the same shim served.
        let first_exec = u64::try_from(Time::now().unix_ns()).unwrap_or(1);
        Ok(Self {
            program: ShimProgram::load(config.shim.as_deref())?,
            cgroups,
            profiles: Arc::new(Cache::default()),
            runtimes: Runtimes::find(runtimes)?,
            shims: Mutex::default(),
            next_exec: AtomicU64::new(first_exec),
            events,
            unread: Mutex::new(Some(unread)),
        })
    }

    /// Names that a pod can give as its handler, the default first.
    pub fn known(&self) -> Vec<String> {
        std::iter::once(NATIVE)
            .chain(self.runtimes.iter().map(|runtime| runtime.name.as_str()))
            .map(str::to_owned)
            .collect()
    }

    /// Whether a pod can have this handler; empty is the default.
    pub fn knows(&self, name: &str) -> bool {
        ["", NATIVE].contains(&name) || self.runtimes.get(name).is_some()
    }

    /// Whether pods of this handler can have user namespaces, if the host can.
    pub async fn maps_ids(&self, name: &str) -> bool {
        match self.runtimes.get(name) {
            None => NATIVE_FEATURES.user_namespaces,
            Some(runtime) => runtime.features().await.user_namespaces,
        }
    }

    /// All handlers with what each can, the default first.
    pub async fn features(&self) -> Vec<(String, Features)> {
        let mut all = vec![(NATIVE.to_owned(), NATIVE_FEATURES)];
        for runtime in self.runtimes.iter() {
            all.push((runtime.name.clone(), runtime.features().await));
        }
        all
    }

    /// The runtime of a pod; `None` for the engine.
    fn runtime(&self, sandbox: &SandboxId, name: &str) -> Result<Option<&Runtime>, HandlerError> {
        if ["", NATIVE].contains(&name) {
            return Ok(None);
        }
        self.runtimes
            .get(name)
            .map(Some)
            .ok_or_else(|| HandlerError::UnknownHandler {
                sandbox: sandbox.clone(),
                handler: name.to_owned(),
            })
    }

    fn shim(&self, sandbox: &SandboxId) -> Result<Arc<Shim>, HandlerError> {
        self.connected(sandbox)
            .ok_or_else(|| HandlerError::ShimLost {
                sandbox: sandbox.clone(),
                reason: "not connected".to_owned(),
            })
    }

    fn connected(&self, sandbox: &SandboxId) -> Option<Arc<Shim>> {
        let shims = self.shims.lock().expect("no panic while this lock is held");
        shims.get(sandbox).cloned()
    }

    fn keep(&self, sandbox: &SandboxId, shim: Arc<Shim>) {
        let mut shims = self.shims.lock().expect("no panic while this lock is held");
        if let Some(earlier) = shims.insert(sandbox.clone(), shim) {
            earlier.close();
        }
    }

    fn forget(&self, sandbox: &SandboxId) -> Option<Arc<Shim>> {
        let mut shims = self.shims.lock().expect("no panic while this lock is held");
        shims.remove(sandbox)
    }

    async fn start_pod(&self, sandbox: &SandboxId, dir: &Path) -> Result<i32, HandlerError> {
        let stream = self.program.spawn(sandbox, dir).await?;
        let (shim, welcome) = Shim::connect(sandbox, dir, stream, self.events.clone()).await?;
        self.keep(sandbox, shim);
        Ok(welcome.pid)
    }

    async fn reconnect(
        &self,
        sandbox: &SandboxId,
        dir: &Path,
    ) -> Result<wire::Welcome, HandlerError> {
        let stream = shim::dial(sandbox, dir).await?;
        match Shim::connect(sandbox, dir, stream, self.events.clone()).await {
            Ok((shim, welcome)) => {
                self.keep(sandbox, shim);
                Ok(welcome)
            }
            Err(error) => {
                // Nobody should have to wait for this one once more.
                if matches!(error, HandlerError::ShimSilent { .. }) {
                    let (sandbox, dir) = (sandbox.clone(), dir.to_owned());
                    blocking::run("kill silent shim", move || shim::kill(&sandbox, &dir)).await?;
                }
                Err(error)
            }
        }
    }

    async fn end_pod(&self, sandbox: &SandboxId, dir: &Path) -> Result<(), HandlerError> {
        let known = match self.forget(sandbox) {
            Some(shim) => Some(shim),
            None => match shim::dial(sandbox, dir).await {
                Ok(stream) => Shim::connect(sandbox, dir, stream, self.events.clone())
                    .await
                    .ok()
                    .map(|(shim, _)| shim),
                Err(_) => None,
            },
        };
        if let Some(shim) = known
            && shim.shut_down().await
        {
            return shim::remove_socket(dir);
        }
        let (sandbox, dir) = (sandbox.clone(), dir.to_owned());
        blocking::run("end shim", move || {
            shim::kill(&sandbox, &dir)?;
            shim::remove_socket(&dir)
        })
        .await
    }

    async fn end_if_silent(&self, sandbox: &SandboxId, dir: &Path) -> Result<(), HandlerError> {
        let Some(shim) = self.connected(sandbox) else {
            return Ok(());
        };
        if shim.answers().await {
            return Ok(());
        }
        warn!(sandbox_id = %sandbox, "shim does not answer and will be killed");
        let (sandbox, dir) = (sandbox.clone(), dir.to_owned());
        blocking::run("kill silent shim", move || shim::kill(&sandbox, &dir)).await
    }

    async fn create(&self, request: CreateRequest) -> Result<i32, HandlerError> {
        let (log, fds) = match request.log {
            None => (None, Vec::new()),
            Some(log) => (
                Some(wire::Log {
                    path: log.path.to_string_lossy().into_owned(),
                    rotate_bytes: log.rotate_bytes,
                    keep_files: log.keep,
                }),
                vec![OwnedFd::from(log.file)],
            ),
        };
        let cgroup = self.cgroups.plan(&request.cgroup);
        let (plan, oci) = match self.runtime(&request.sandbox_id, &request.handler)? {
            None => {
                let profile = request
                    .spec
                    .linux()
                    .as_ref()
                    .and_then(|linux| linux.seccomp().clone());
                let seccomp = self.compile(profile).await?;
                let plan = lower::container(lower::Input {
                    spec: &request.spec,
                    env: request.env,
                    root: &request.root,
                    pid: &request.pid,
                    cgroup,
                    seccomp: seccomp.as_deref(),
                    log,
                    stdin: request.stdin,
                    stdin_once: request.stdin_once,
                    system: request.system,
                })?;
                (plan, None)
            }
            Some(_) if request.system.is_some() => {
                return Err(lower::unsupported("system containers"));
            }
            Some(runtime) => {
                let lowered = oci::container(oci::Input {
                    spec: &request.spec,
                    env: request.env,
                    root: &request.root,
                    pid: &request.pid,
                    features: runtime.features().await,
                    held: held_capabilities(),
                    cgroup,
                    log,
                    stdin: request.stdin,
                    stdin_once: request.stdin_once,
                })?;
                let oci = wire::OciContainer {
                    program: runtime.program.to_string_lossy().into_owned(),
                    dir: lowered.dir,
                    config: lowered.config,
                    staged: lowered.staged,
                    hidden: self.cgroups.hidden_from_runtimes(&request.cgroup)?,
                };
                (lowered.plan, Some(oci))
            }
        };
        let ask = Ask::Create(wire::Create {
            container_id: request.container_id.to_string(),
            plan,
            oci,
        });
        let shim = self.shim(&request.sandbox_id)?;
        match shim.request_process(ask, fds).await {
            Ok((pid, _)) => Ok(pid),
            Err(e) => Err(oci::with_command(e, request.spec.process().as_ref())),
        }
    }

    async fn exec(&self, request: ExecRequest) -> Result<Exec, HandlerError> {
        let shim = self.shim(&request.sandbox_id)?;
        let exec_id = self.next_exec.fetch_add(1, Ordering::Relaxed);
        let (process, oci) = match self.runtime(&request.sandbox_id, &request.handler)? {
            None => {
                let seccomp = self.compile(request.seccomp).await?;
                let process = lower::process(&request.process, request.env, seccomp.as_deref())?;
                (process, None)
            }
            Some(_) => {
                let (plan, process) =
                    oci::process(&request.process, request.env, held_capabilities())?;
                let leaf = self.cgroups.exec_leaf_for_runtimes(exec_id);
                (plan, Some(wire::OciProcess { process, leaf }))
            }
        };
        let terminal = process.terminal;
        let (cgroups, cgroup) = (self.cgroups.clone(), request.cgroup.clone());
        let cgroup_plan = blocking::run("make exec cgroup", move || {
            cgroups.exec_plan(&cgroup, exec_id)
        })
        .await?;
        let (cgroups, cgroup) = (self.cgroups.clone(), request.cgroup);
        // However it ends, the leaf goes; one with processes left goes with the container.
        let exit = shim.expect_exec(exec_id, move || {
            let remove = blocking::run("remove exec cgroup", move || {
                if let Err(error) = cgroups.remove_exec(&cgroup, exec_id) {
                    warn!(%cgroup, exec_id, %error, "exec cgroup stays");
                }
            });
            tokio::spawn(remove);
        });
        let Streams {
            stdin,
            stdout,
            stderr,
        } = request.streams;
        let ask = Ask::Exec(wire::Exec {
            container_id: request.container_id.to_string(),
            exec_id,
            process,
            cgroup: cgroup_plan,
            timeout_ms: request.timeout.map_or(0, |timeout| {
                // 0 is for none.
                u64::try_from(timeout.as_millis())
                    .unwrap_or(u64::MAX)
                    .max(1)
            }),
            stdin: stdin.is_some(),
            stdout: stdout.is_some(),
            stderr: stderr.is_some(),
            oci,
        });
        let fds = [stdin, stdout, stderr].into_iter().flatten().collect();
        match shim.request_process(ask, fds).await {
            Ok((pid, mut fds)) => Ok(Exec {
                exec_id,
                pid,
                terminal: if terminal { fds.pop() } else { None },
                exit,
            }),
            Err(e) => {
                shim.give_up_exec(exec_id);
                Err(oci::with_command(e, Some(&request.process)))
            }
        }
    }

    async fn attach(
        &self,
        sandbox: &SandboxId,
        container: &ContainerId,
        streams: Streams,
        replay: bool,
    ) -> Result<(), HandlerError> {
        let ask = Ask::Attach(wire::Attach {
            container_id: container.to_string(),
            stdin: streams.stdin.is_some(),
            stdout: streams.stdout.is_some(),
            stderr: streams.stderr.is_some(),
            replay,
        });
        let fds = [streams.stdin, streams.stdout, streams.stderr];
        self.shim(sandbox)?
            .request_done(ask, fds.into_iter().flatten().collect())
            .await
    }

    async fn ask(&self, sandbox: &SandboxId, ask: Ask) -> Result<(), HandlerError> {
        self.shim(sandbox)?.request_done(ask, Vec::new()).await
    }

    async fn compile(
        &self,
        profile: Option<LinuxSeccomp>,
    ) -> Result<Option<Arc<Program>>, HandlerError> {
        let Some(profile) = profile else {
            return Ok(None);
        };
        if let Some(known) = self.profiles.compiled(&profile) {
            return Ok(Some(known));
        }
        let profiles = self.profiles.clone();
        blocking::run("compile seccomp profile", move || {
            profiles.compile(&profile)
        })
        .await
        .map(Some)
    }
}

/// What shims hold too, which are started by us.
fn held_capabilities() -> u64 {
    longshore_sys::caps::get().map_or(u64::MAX, |held| held.permitted)
}

fn named(container: &ContainerId) -> wire::Named {
    wire::Named {
        container_id: container.to_string(),
    }
}

impl Handler for NativeHandler {
    fn start_pod<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<i32, HandlerError>> {
        Box::pin(self.start_pod(sandbox, dir))
    }

    fn end_pod<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(self.end_pod(sandbox, dir))
    }

    fn end_if_silent<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(self.end_if_silent(sandbox, dir))
    }

    fn reconnect<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        dir: &'a Path,
    ) -> BoxFuture<'a, Result<wire::Welcome, HandlerError>> {
        Box::pin(self.reconnect(sandbox, dir))
    }

    fn create(&self, request: CreateRequest) -> BoxFuture<'_, Result<i32, HandlerError>> {
        Box::pin(self.create(request))
    }

    fn start<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(self.ask(sandbox, Ask::Start(named(container))))
    }

    fn signal<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        signal: i32,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        let ask = Ask::Signal(wire::Signal {
            container_id: container.to_string(),
            signal,
        });
        Box::pin(self.ask(sandbox, ask))
    }

    fn resize<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        width: u32,
        height: u32,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        let ask = Ask::Resize(wire::Resize {
            container_id: container.to_string(),
            width,
            height,
        });
        Box::pin(self.ask(sandbox, ask))
    }

    fn close_stdin<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(self.ask(sandbox, Ask::CloseStdin(named(container))))
    }

    fn reopen_log<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        log: File,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(async move {
            self.shim(sandbox)?
                .request_done(Ask::ReopenLog(named(container)), vec![log.into()])
                .await
        })
    }

    fn ack_exit<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(self.ask(sandbox, Ask::AckExit(named(container))))
    }

    fn delete<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(async move {
            match self.ask(sandbox, Ask::Delete(named(container))).await {
                Err(HandlerError::UnknownContainer { .. }) => Ok(()),
                result => result,
            }
        })
    }

    fn exec(&self, request: ExecRequest) -> BoxFuture<'_, Result<Exec, HandlerError>> {
        Box::pin(self.exec(request))
    }

    fn kill_exec<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        exec_id: u64,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(self.ask(sandbox, Ask::KillExec(wire::KillExec { exec_id })))
    }

    fn attach<'a>(
        &'a self,
        sandbox: &'a SandboxId,
        container: &'a ContainerId,
        streams: Streams,
        replay: bool,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(self.attach(sandbox, container, streams, replay))
    }

    fn events(&self) -> Option<mpsc::Receiver<ShimEvent>> {
        let mut unread = self
            .unread
            .lock()
            .expect("no panic while this lock is held");
        unread.take()
    }

    fn inventory<'a>(&'a self, sandboxes: &'a Path) -> BoxFuture<'a, Vec<(SandboxId, i32)>> {
        let sandboxes: PathBuf = sandboxes.to_owned();
        Box::pin(blocking::run("list shims", move || {
            shim::running(&sandboxes)
        }))
    }
}
