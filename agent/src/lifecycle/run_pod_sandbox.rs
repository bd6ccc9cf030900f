//! RunPodSandbox: a cgroup, namespaces, a place in the network and a shim.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    Lifecycle, LifecycleError, files,
    sandbox::{Sandbox, SandboxConfig, SandboxState},
};
use crate::{
    blocking,
    cgroup::{CgroupDriver, CgroupPath},
    clock::Time,
    event::{EventDraft, EventKind},
    handler::{Features, Handler as _},
    id::SandboxId,
    network::{
        Attachment, Mode, NetworkPlan,
        cni::{Cached, PodFacts},
        is_address,
    },
    operation::{Context, OnRestart, Operation, OperationKey, Over, Subject},
    rootfs::IdMapsMissing,
    store::{Changes, Snapshot},
};

impl Lifecycle {
    /// Makes a sandbox and brings it up; an equal request under way is joined.
    ///
    /// # Errors
    /// `UnknownHandler`, `NameTaken`, `Network` before any side effect; everything else with all
    /// undone.
    pub async fn run_pod_sandbox(
        self: &Arc<Self>,
        config: SandboxConfig,
    ) -> Result<SandboxId, LifecycleError> {
        if !self.handler.knows(&config.handler) {
            return Err(LifecycleError::UnknownHandler {
                name: config.handler,
                known: self.handler.known(),
            });
        }
        if config.id_map.is_some()
            && let Err(source) = self.maps_ids(&config.handler).await
        {
            return Err(LifecycleError::UserNamespaces {
                handler: config.handler,
                source,
            });
        }
        self.networks.prepare(&config.network).await?;
        let run = RunPodSandbox {
            id: SandboxId::random(),
            config,
            planned: None,
        };
        Ok(self.operations.run(run, Arc::clone(self)).await?)
    }

    async fn maps_ids(&self, handler: &str) -> Result<(), IdMapsMissing> {
        if !self.handler.maps_ids(handler).await {
            return Err(IdMapsMissing::Handler);
        }
        self.id_maps.clone()
    }

    /// All handlers with what each can on this host, the default first.
    pub async fn handlers(&self) -> Vec<(String, Features)> {
        let mut all = self.handler.features().await;
        for (_, features) in &mut all {
            features.user_namespaces &= self.id_maps.is_ok();
        }
        all
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct RunPodSandbox {
    id: SandboxId,
    config: SandboxConfig,
    planned: Option<Planned>,
}

/// What planning decided, before the intent was committed.
#[derive(Clone, Serialize, Deserialize)]
struct Planned {
    cgroup: CgroupPath,
    network: NetworkPlan,
    hostname: String,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Cgroup,
    Namespaces,
    Attach,
    Shim,
}

pub(super) enum Fact {
    Attached(Attachment),
    Shim(i32),
}

impl RunPodSandbox {
    fn planned(&self) -> &Planned {
        self.planned
            .as_ref()
            .expect("steps follow the intent, which plans")
    }

    fn hostname(&self) -> String {
        if self.config.network.mode == Mode::Host {
            rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned()
        } else if self.config.hostname.is_empty() {
            self.id.as_str()[..12].to_owned()
        } else {
            self.config.hostname.clone()
        }
    }

    /// What plugins may be told of it.
    fn facts(&self, on: &Lifecycle, cgroup: &CgroupPath) -> PodFacts {
        let config = &self.config;
        PodFacts {
            namespace: config.key.namespace.clone(),
            name: config.key.name.clone(),
            uid: config.key.uid.clone(),
            annotations: config.annotations.clone(),
            dns: config
                .dns
                .clone()
                .map(|dns| [dns.servers, dns.searches, dns.options]),
            cgroup: cgroup.as_str().to_owned(),
            netns: files::namespace(&on.sandbox_dir(&self.id), "net"),
        }
    }

    /// Plugins choose the addresses after the files were made.
    async fn name_addresses(
        &self,
        on: &Lifecycle,
        attachment: &Attachment,
    ) -> Result<(), LifecycleError> {
        let dir = on.sandbox_dir(&self.id);
        let hostname = self.planned().hostname.clone();
        let addresses: Vec<_> = attachment.addresses.iter().map(IpNet::addr).collect();
        blocking::run("write hosts", move || {
            files::write_hosts(&dir, &hostname, &addresses)
        })
        .await
    }

    async fn create_files(&self, on: &Lifecycle) -> Result<(), LifecycleError> {
        let dir = on.sandbox_dir(&self.id);
        let config = self.config.clone();
        let planned = self.planned();
        let hostname = planned.hostname.clone();
        let addresses: Vec<IpAddr> = planned.network.addresses.iter().map(IpNet::addr).collect();
        blocking::run("create sandbox namespaces", move || {
            if let Some(logs) = &config.log_directory {
                files::make_dir(logs, 0o755)?;
            }
            files::create(&dir, &config, &hostname, &addresses)
        })
        .await
    }
}

impl Operation for RunPodSandbox {
    const NAME: &'static str = "run_pod_sandbox";
    const ON_RESTART: OnRestart = OnRestart::Unwind;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[
        &[Step::Cgroup, Step::Namespaces],
        &[Step::Attach, Step::Shim],
    ];
    type Domain = Lifecycle;
    type Fact = Fact;
    type Output = SandboxId;
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        // The request itself is left out: equal ones need not be encoded equally.
        let mut config = self.config.clone();
        config.request = serde_json::Value::Null;
        OperationKey(serde_json::to_string(&config).expect("configurations have string keys"))
    }

    /// The name, not the new id: a retry of the same wish has another id.
    fn subject(&self) -> Subject {
        Subject(self.config.key.claim(self.config.face))
    }

    fn over(&self, _running: &str) -> Over {
        Over::Wait
    }

    fn standing(&self, at: &Snapshot) -> Option<SandboxId> {
        let holder = at.claim(&self.subject().0)?;
        let sandbox = at.get::<Sandbox>(holder.strip_prefix("sandbox/")?)?;
        let mut wish = self.clone();
        wish.id = sandbox.id.clone();
        wish.config.request.clone_from(&sandbox.config.request);
        // As the outcome records it.
        wish.config.hostname = wish.hostname();
        (wish.config.repeatable() && sandbox.is_ready() && sandbox.config == wish.config)
            .then(|| sandbox.id.clone())
    }

    fn intent(&mut self, at: &Snapshot, on: &Lifecycle) -> Result<Changes, LifecycleError> {
        let name = self.config.key.claim(self.config.face);
        if let Some(holder) = at.claim(&name) {
            return Err(LifecycleError::NameTaken { name, holder });
        }
        let cgroup = on
            .cgroups
            .pod(self.config.cgroup_parent.as_deref(), &self.id)?;
        let facts = self.facts(on, &cgroup);
        let network = on
            .networks
            .plan(at, &self.id, &self.config.network, &facts)?;
        let holder = Sandbox::holder(&self.id);
        let addresses = self.config.network.keeper.as_ref().unwrap_or(&holder);
        let changes = network.claims().into_iter().fold(
            Changes::new().claim(name, &holder),
            |changes, key| {
                let holder = if is_address(&key) { addresses } else { &holder };
                changes.claim(key, holder)
            },
        );
        let changes = network
            .record(&self.id)
            .into_iter()
            .fold(changes, Changes::put);
        self.planned = Some(Planned {
            cgroup,
            network,
            hostname: self.hostname(),
        });
        Ok(changes)
    }

    async fn apply(
        &self,
        step: Step,
        on: &Arc<Lifecycle>,
        context: &Context,
    ) -> Result<Option<Fact>, LifecycleError> {
        match step {
            Step::Cgroup => {
                if on.cgroups.driver() == CgroupDriver::Cgroupfs {
                    let (cgroups, path) = (Arc::clone(&on.cgroups), self.planned().cgroup.clone());
                    blocking::run("create cgroup", move || cgroups.create(&path, None)).await?;
                }
                Ok(None)
            }
            Step::Namespaces => self.create_files(on).await.map(|()| None),
            Step::Attach => {
                if self.config.network.mode != Mode::Pod {
                    return Ok(None);
                }
                let netns = files::namespace(&on.sandbox_dir(&self.id), "net");
                let attachment = on
                    .networks
                    .attach(&self.id, &self.planned().network, &netns, Some(context))
                    .await?;
                if self.planned().network.cni.is_some() {
                    self.name_addresses(on, &attachment).await?;
                }
                Ok(Some(Fact::Attached(attachment)))
            }
            Step::Shim => {
                let pid = on
                    .handler
                    .start_pod(&self.id, &on.sandbox_dir(&self.id))
                    .await?;
                let (cgroups, path) = (Arc::clone(&on.cgroups), self.planned().cgroup.clone());
                blocking::run("adopt supervisor", move || cgroups.adopt(&path, pid)).await?;
                Ok(Some(Fact::Shim(pid)))
            }
        }
    }

    async fn undo(&self, step: Step, on: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        let dir = on.sandbox_dir(&self.id);
        match step {
            Step::Shim => Ok(on.handler.end_pod(&self.id, &dir).await?),
            Step::Attach => Ok(on.networks.undo_attach(&self.id).await?),
            Step::Namespaces => {
                blocking::run("remove sandbox namespaces", move || files::remove(&dir)).await?;
                on.settle(&self.id);
                Ok(())
            }
            Step::Cgroup => {
                let (cgroups, path) = (Arc::clone(&on.cgroups), self.planned().cgroup.clone());
                Ok(blocking::run("remove cgroup", move || cgroups.remove(&path)).await?)
            }
        }
    }

    fn outcome(&self, facts: Vec<Fact>, _: &Snapshot) -> (Changes, SandboxId) {
        let planned = self.planned();
        let mut sandbox = Sandbox {
            id: self.id.clone(),
            config: self.config.clone(),
            created_at: Time::now(),
            cgroup: planned.cgroup.clone(),
            plan: planned.network.clone(),
            attachment: None,
            shim_pid: 0,
            state: SandboxState::Ready,
        };
        sandbox.config.hostname.clone_from(&planned.hostname);
        for fact in facts {
            match fact {
                Fact::Attached(attachment) => sandbox.attachment = Some(attachment),
                Fact::Shim(pid) => sandbox.shim_pid = pid,
            }
        }
        let face = self.config.face;
        let changes = Changes::new()
            .event(EventDraft::new(EventKind::SandboxCreated, face).sandbox(&self.id))
            .event(EventDraft::new(EventKind::SandboxStarted, face).sandbox(&self.id))
            .put(sandbox);
        (changes, self.id.clone())
    }

    fn unwound(&self, _: Option<&LifecycleError>, at: &Snapshot) -> Changes {
        let changes = Changes::new().release_holder(Sandbox::holder(&self.id));
        Cached::forget_planned(at, &self.id, changes)
    }
}
