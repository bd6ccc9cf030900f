//! StartSystem: a sandbox, a container in it, and an init that stands.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use longshore_shim::wire;
use serde::{Deserialize, Serialize};

use super::{
    super::{
        Lifecycle, LifecycleError,
        container::{Container, ContainerConfig, IdMapWish, MountSource, SystemRun, UserWish},
        sandbox::{Dns, PidMode, Sandbox, SandboxConfig},
        spec,
    },
    System, SystemError,
    halt::{Asked, HALT_SYSTEMD},
    subject,
    view::SystemState,
};
use crate::{
    blocking,
    event::EventKind,
    handler::SystemInput,
    id::{ContainerId, Face, SandboxId},
    network::is_address,
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    store::{Changes, Snapshot},
};

/// How long an init is watched that does not listen to what halts it.
const STANDS_AFTER: Duration = Duration::from_secs(2);
/// Between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Lines of the console that an error quotes.
const QUOTED_LINES: u64 = 20;

/// First line of a file that we write and go on writing as long as it stands there.
const OURS: &str = "# Written by Longshore at each start; without this line it is left as it is.\n";

impl Lifecycle {
    /// Starts a system container; its init stands when this returns.
    ///
    /// # Errors
    /// `NotFound`; `State` unless it is stopped; `System` if its init ends at once; everything else
    /// with all undone.
    pub async fn start_system(self: &Arc<Self>, name: &str) -> Result<Arc<System>, LifecycleError> {
        let system = self.system(name)?;
        let start = StartSystem {
            id: system.id.clone(),
        };
        self.operations.run(start, Arc::clone(self)).await?;
        self.system(system.id.as_str())
    }

    /// Makes its container in its sandbox and lets it run, as far as that has not been done.
    pub(super) async fn boot(
        self: &Arc<Self>,
        system: &System,
        sandbox: &Sandbox,
    ) -> Result<(), LifecycleError> {
        let at = self.store.snapshot();
        let mut standing = None;
        for container in self.containers_of(&at, &sandbox.id) {
            if container.exit().is_some() {
                self.remove_container(Face::Native, container.id.as_str(), false)
                    .await?;
            } else {
                standing = Some(container);
            }
        }
        let id = match standing {
            Some(container) if container.is_running() => return Ok(()),
            Some(container) => container.id.clone(),
            None => {
                self.write_boot_id(&sandbox.id).await?;
                let config = self.run_config(system);
                self.create_container(sandbox.id.as_str(), config).await?
            }
        };
        self.start_container(Face::Native, id.as_str()).await
    }

    /// Waits until the init of a run listens to what halts it, or has run for a while.
    async fn await_init(&self, system: &System, id: &ContainerId) -> Result<(), LifecycleError> {
        let until = tokio::time::Instant::now() + STANDS_AFTER;
        loop {
            let at = self.store.snapshot();
            let container = at
                .get::<Container>(id.as_str())
                .ok_or_else(|| not_found(&system.config.name))?;
            if let Some(exit) = container.exit() {
                return Err(SystemError::InitEnded {
                    name: system.config.name.clone(),
                    exit: exit.clone(),
                    console: self.console_lines(&system.id, QUOTED_LINES).await,
                }
                .into());
            }
            let pid = container.pid().unwrap_or_default();
            let halt = system.config.halt_signal;
            let asked = blocking::run("look at init", move || Asked::of(pid, halt)).await;
            if asked.is_some_and(|asked| asked.heard) || tokio::time::Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What a start gives its sandbox.
    async fn sandbox_config(&self, system: &System) -> Result<SandboxConfig, LifecycleError> {
        let config = &system.config;
        let mut network = config.network.clone();
        if network.addresses.is_empty() {
            network.addresses.clone_from(&system.addresses);
        }
        network.keeper = Some(System::holder(&system.id));
        let dns = match config.dns.clone() {
            Some(dns) => dns,
            None => blocking::run("read resolv.conf", host_dns).await,
        };
        Ok(SandboxConfig {
            face: Face::Native,
            key: system.sandbox_key(),
            labels: config.labels.clone(),
            annotations: Default::default(),
            hostname: config.hostname.clone(),
            network,
            dns: Some(dns),
            // Pods have none that are privileged; a system has users of its own.
            sysctls: [("net.ipv4.ip_unprivileged_port_start", "1024")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            pid: PidMode::Container,
            host_ipc: false,
            id_map: Some(system.ids),
            log_directory: None,
            handler: String::new(),
            cgroup_parent: None,
            privileged: false,
            system: Some(system.id.clone()),
            idempotency_key: String::new(),
            request: serde_json::Value::Null,
        })
    }

    fn run_config(&self, system: &System) -> ContainerConfig {
        let config = &system.config;
        let mut mounts = config.mounts.clone();
        for mount in &mut mounts {
            // Root inside is to be able to use what it is given.
            if matches!(mount.source, MountSource::Bind { .. }) {
                mount.id_map = Some(system.ids);
            }
        }
        ContainerConfig {
            face: Face::Native,
            name: config.name.clone(),
            attempt: 0,
            labels: config.labels.clone(),
            annotations: Default::default(),
            image: system.image_id.to_string(),
            image_name: config.image.clone(),
            command: system.init.clone(),
            args: Vec::new(),
            env: spec::system_environment(&system.uuid()),
            working_dir: "/".to_owned(),
            user: UserWish {
                uid: Some(0),
                strict_groups: true,
                ..UserWish::default()
            },
            mounts,
            devices: Vec::new(),
            cdi_devices: Vec::new(),
            resources: config.resources.clone(),
            security: spec::system_security(),
            rlimits: Vec::new(),
            pid: None,
            id_map: IdMapWish::Mapped(system.ids),
            tty: true,
            stdin: true,
            stdin_once: false,
            stop_signal: Some(config.halt_signal.unwrap_or(HALT_SYSTEMD)),
            stop_timeout: config.stop_timeout,
            log: Some(self.console_log(&system.id)),
            oom_score_adj: None,
            system: Some(SystemRun {
                system: system.id.clone(),
                first: system.starts == 0,
            }),
            idempotency_key: String::new(),
            request: serde_json::Value::Null,
        }
    }

    /// One for each run: without it a journal takes all of them for one.
    async fn write_boot_id(&self, sandbox: &SandboxId) -> Result<(), LifecycleError> {
        let path = self.sandbox_dir(sandbox).join("boot_id");
        blocking::run("write boot id", move || {
            let fresh = Path::new("/proc/sys/kernel/random/uuid");
            let id = std::fs::read(fresh).map_err(LifecycleError::file("read", fresh))?;
            std::fs::write(&path, id).map_err(LifecycleError::file("write", &path))
        })
        .await
    }

    /// What the init of a run gets beside its specification.
    pub(in super::super) async fn system_input(
        &self,
        sandbox: &SandboxId,
        run: &SystemRun,
    ) -> Result<SystemInput, LifecycleError> {
        let (dir, first) = (self.sandbox_dir(sandbox), run.first);
        let files =
            blocking::run("read sandbox files", move || identity_files(&dir, first)).await?;
        Ok(SystemInput {
            files,
            writable_paths: spec::WRITABLE_PATHS.map(str::to_owned).to_vec(),
            console_bytes: spec::CONSOLE_BYTES,
        })
    }
}

/// Who it is and whom it asks for names, as the sandbox has it. After the first start its own
/// administrator may know better.
fn identity_files(sandbox_dir: &Path, first: bool) -> Result<Vec<wire::File>, LifecycleError> {
    let read = |name: &str| {
        let path = sandbox_dir.join(name);
        std::fs::read_to_string(&path).map_err(LifecycleError::file("read", path))
    };
    let file = |name: &str, content: String, overwrite| wire::File {
        path: format!("/etc/{name}"),
        content: content.into_bytes(),
        mode: 0o644,
        overwrite,
    };
    let resolv = format!("{OURS}{}", read("resolv.conf")?);
    let mut all = vec![file("resolv.conf", resolv, first)];
    if first {
        let hostname = read("hostname")?;
        let hosts = format!(
            "127.0.0.1\tlocalhost\n127.0.1.1\t{}\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\n\
             ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
            hostname.trim_end()
        );
        all.push(file("hostname", hostname, true));
        all.push(file("hosts", hosts, true));
    }
    Ok(all)
}

/// The host's name servers, those behind its local stub if that is all that it names: loopback is
/// another one inside.
fn host_dns() -> Dns {
    let read = |path: &str| parse_dns(&std::fs::read_to_string(path).unwrap_or_default());
    let dns = read("/etc/resolv.conf");
    if dns.servers.iter().all(|server| is_loopback(server)) {
        let behind = read("/run/systemd/resolve/resolv.conf");
        if !behind.servers.is_empty() {
            return behind;
        }
    }
    dns
}

fn is_loopback(server: &str) -> bool {
    server
        .parse::<IpAddr>()
        .is_ok_and(|address| address.is_loopback())
}

/// Source: resolv.conf(5).
fn parse_dns(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(words.next()),
            Some("search" | "domain") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

pub(super) fn not_found(name: &str) -> LifecycleError {
    LifecycleError::NotFound {
        kind: "system container",
        id: name.chars().take(128).collect(),
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(in super::super) struct StartSystem {
    id: ContainerId,
}

#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Step {
    Sandbox,
    Container,
    Init,
}

impl StartSystem {
    fn run(&self, on: &Lifecycle) -> Result<(Arc<System>, Arc<Sandbox>), LifecycleError> {
        let system = on.system(self.id.as_str())?;
        let sandbox = on
            .run_of(&on.store.snapshot(), &system)
            .map(|(sandbox, _)| sandbox)
            .ok_or_else(|| not_found(&system.config.name))?;
        Ok((system, sandbox))
    }
}

impl Operation for StartSystem {
    const NAME: &'static str = "start_system";
    const ON_RESTART: OnRestart = OnRestart::Unwind;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] =
        &[&[Step::Sandbox], &[Step::Container], &[Step::Init]];
    type Domain = Lifecycle;
    type Fact = ();
    type Output = ();
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(format!("start/{}", self.id))
    }

    fn subject(&self) -> Subject {
        subject(&self.id)
    }

    fn intent(&mut self, at: &Snapshot, on: &Lifecycle) -> Result<Changes, LifecycleError> {
        let system = at
            .get::<System>(self.id.as_str())
            .ok_or_else(|| not_found(self.id.as_str()))?;
        match on.run_state(at, &system) {
            SystemState::Stopped => Ok(Changes::new()),
            state => Err(system.wrong_state(&state, "STOPPED")),
        }
    }

    async fn apply(
        &self,
        step: Step,
        on: &Arc<Lifecycle>,
        context: &Context,
    ) -> Result<Option<()>, LifecycleError> {
        match step {
            Step::Sandbox => {
                let system = on.system(self.id.as_str())?;
                // What the last run may have left, as one that the host's restart ended.
                on.end_run(&system).await?;
                let config = on.sandbox_config(&system).await?;
                on.run_pod_sandbox(config).await?;
            }
            Step::Container => {
                let (system, sandbox) = self.run(on)?;
                on.boot(&system, &sandbox).await?;
            }
            Step::Init => {
                let (system, sandbox) = self.run(on)?;
                let containers = on.containers_of(&on.store.snapshot(), &sandbox.id);
                let container = containers
                    .first()
                    .ok_or_else(|| not_found(&system.config.name))?;
                let operation = Self::NAME;
                tokio::select! {
                    stands = on.await_init(&system, &container.id) => stands?,
                    // Both may be dropped: they only look.
                    () = context.cancelled.cancelled() => {
                        return Err(LifecycleError::Cancelled { operation });
                    }
                }
            }
        }
        Ok(None)
    }

    async fn undo(&self, step: Step, on: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        match (step, on.system(self.id.as_str())) {
            // All of a run goes with its sandbox.
            (Step::Sandbox, Ok(system)) => on.end_run(&system).await,
            _ => Ok(()),
        }
    }

    fn outcome(&self, _: Vec<()>, at: &Snapshot) -> (Changes, ()) {
        let Some(system) = at.get::<System>(self.id.as_str()) else {
            return (Changes::new(), ());
        };
        let mut system = System::clone(&system);
        system.starts += 1;
        let sandbox = at
            .claim(&system.sandbox_claim())
            .and_then(|holder| at.get::<Sandbox>(holder.strip_prefix("sandbox/")?));
        if let Some(sandbox) = sandbox.filter(|sandbox| sandbox.plan.cni.is_none()) {
            system.addresses = sandbox
                .plan
                .addresses
                .iter()
                .map(|net| net.addr())
                .collect();
        }
        let event = system.event(EventKind::SystemStarted);
        let changes = system.release_stale_addresses(at);
        (changes.update(system).event(event).durable(), ())
    }

    fn unwound(&self, _: Option<&LifecycleError>, at: &Snapshot) -> Changes {
        let system = at.get::<System>(self.id.as_str());
        system.map_or_else(Changes::new, |system| system.release_stale_addresses(at))
    }
}

impl System {
    /// Gives back what a start claimed and the record does not name: it failed, or another network
    /// has taken the first one's place.
    fn release_stale_addresses(&self, at: &Snapshot) -> Changes {
        let is_own = |claim: &str| {
            let address = claim.rsplit('/').next().and_then(|text| text.parse().ok());
            address.is_some_and(|address: IpAddr| self.addresses.contains(&address))
        };
        at.held_by(&Self::holder(&self.id))
            .filter(|claim| is_address(claim) && !is_own(claim))
            .fold(Changes::new(), |changes, claim| changes.release(claim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_resolver_does() {
        let text = "# c\nnameserver 10.0.0.1\nsearch a.example b.example\n\
                    nameserver fd00::1\noptions ndots:2 edns0\ndomain c.example\n";
        assert_eq!(
            parse_dns(text),
            Dns {
                servers: vec!["10.0.0.1".into(), "fd00::1".into()],
                searches: vec!["c.example".into()],
                options: vec!["ndots:2".into(), "edns0".into()],
            }
        );
        assert!(is_loopback("127.0.0.53") && is_loopback("::1") && !is_loopback("10.0.0.1"));
    }

    #[test]
    fn only_the_first_start_says_who_it_is() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("hostname"), "web\n").expect("write");
        std::fs::write(dir.path().join("resolv.conf"), "nameserver 10.0.0.1\n").expect("write");
        let names = |first| -> Vec<(String, bool)> {
            identity_files(dir.path(), first)
                .expect("files")
                .into_iter()
                .map(|file| (file.path, file.overwrite))
                .collect()
        };
        let expected = [
            ("/etc/resolv.conf", true),
            ("/etc/hostname", true),
            ("/etc/hosts", true),
        ];
        assert_eq!(
            names(true),
            expected.map(|(path, over)| (path.to_owned(), over))
        );
        assert_eq!(names(false), [("/etc/resolv.conf".to_owned(), false)]);
    }
}
