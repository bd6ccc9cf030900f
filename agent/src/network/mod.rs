//! Networks of sandboxes: the built-in bridge network, dual stack, without executing a program; and
//! those of CNI's plugins, where the host has a configuration of them (see [`cni`]).
//!
//! ```text
//! plan (pure: addresses and ports by claims)  ->  attach (links, nft elements)  ->  detach
//!   plan.rs ipam.rs ports.rs                      bridge.rs
//!                                                   netlink.rs   the one door to rtnetlink
//! record.rs  configuration and record               nft.rs       the one door to nf_tables
//! host.rs    facts, settings, findings
//! ```
//!
//! Invariants: a conflict is refused in [`Networks::plan`], before any side effect; everything in
//! the kernel bears the instance (names, aliases, the table's name), so undo and inventory need
//! no memory and touch nothing else; [`Networks::start`] rebuilds all of it from the store.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

mod bridge;
pub mod cni;
mod error;
mod host;
mod ipam;
mod netlink;
mod nft;
mod plan;
mod ports;
mod record;
#[cfg(test)]
mod tests;

use ipnet::IpNet;
use tokio::sync::oneshot;

pub use self::{
    bridge::{Attachment, Inventory},
    error::NetworkError,
    host::{Finding, Severity},
    nft::Published,
    plan::{Mac, Mode, NetworkPlan, SandboxNetwork, is_address},
    ports::{HostAddress, PortMapping, Protocol},
    record::{Network, NetworkChapterConfig, Serving, Wished},
};
use self::{
    cni::{Chosen, Cni, CniError, PodFacts},
    host::Host,
    netlink::Netlink,
    nft::Nft,
    plan::HostFacts,
};
use crate::{
    blocking,
    event::{EventDraft, EventKind},
    id::{Face, InstanceId, SandboxId},
    operation::Context,
    store::{Changes, Snapshot, Store},
};

/// How long the end of a failed attempt to attach waits for plugins to undo their work.
const UNDO_WITHIN: Duration = Duration::from_secs(10);
/// Longest pause between attempts of a detachment that failed in the background.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The networks of this agent. Cheap to clone.
#[derive(Clone)]
pub struct Networks(Arc<Inner>);

struct Inner {
    instance: InstanceId,
    config: NetworkChapterConfig,
    store: Store,
    nft: Nft,
    /// Known once the built-in network is up.
    host: Mutex<Option<HostFacts>>,
    /// Held while the built-in network is brought up.
    starting: tokio::sync::Mutex<()>,
    cni: Cni,
}

impl Networks {
    /// Touches nothing yet; see [`Networks::start`].
    pub fn new(instance: InstanceId, config: NetworkChapterConfig, store: Store) -> Self {
        Self(Arc::new(Inner {
            nft: Nft::new(&instance),
            cni: Cni::new(config.cni.clone(), store.clone()),
            instance,
            config,
            store,
            host: Mutex::new(None),
            starting: tokio::sync::Mutex::default(),
        }))
    }

    /// Makes the kernel what the store says; repeating it changes nothing.
    ///
    /// `live` are the sandboxes whose namespaces still exist, with the plans they were attached
    /// by: their links are repaired and their ports published again. What else bears this
    /// instance (after a crash, or a reboot) is removed. Where plugins serve, and no sandbox of the
    /// built-in network lives, that network is not made before one asks for it by name.
    ///
    /// # Errors
    /// `Config`, `SubnetOverlap` and `NoSubnet` before any side effect; `Missing` if the kernel
    /// lacks something; `Kernel` and `File` if it refuses.
    pub async fn start(&self, mut live: Vec<(SandboxId, NetworkPlan)>) -> Result<(), NetworkError> {
        self.0.config.validate()?;
        // What plugins made, they keep.
        live.retain(|(_, plan)| plan.cni.is_none());
        self.refresh().await;
        let serving = self.serving();
        if !live.is_empty() || matches!(serving, Ok(None)) {
            self.bring_up(live).await?;
        } else if let Err(error) = self.remove_all().await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "an unused built-in network is left"
            );
        }
        if let (Ok(Some(chosen)), true) = (serving, self.0.config.cni.gc)
            && let Err(error) = self.0.cni.gc(&chosen.list).await
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "GC of CNI failed");
        }
        Ok(())
    }

    /// Looks at CNI's folder again, and brings the built-in network up if `wish` needs it.
    ///
    /// # Errors
    /// As [`Networks::start`]; `Cni` if plugins are to serve and have no valid configuration.
    pub async fn prepare(&self, wish: &SandboxNetwork) -> Result<(), NetworkError> {
        if wish.mode != Mode::Pod {
            return Ok(());
        }
        self.refresh().await;
        match self.plugins_for(wish)? {
            Some(_) => Ok(()),
            None => self.bring_up(Vec::new()).await,
        }
    }

    /// Looks at CNI's folder again, unless it is not to be used.
    pub async fn refresh(&self) {
        if self.0.config.mode != Serving::BuiltIn {
            self.0.cni.refresh().await;
        }
    }

    /// Brings the built-in network up unless it is.
    async fn bring_up(&self, live: Vec<(SandboxId, NetworkPlan)>) -> Result<(), NetworkError> {
        let _alone = self.0.starting.lock().await;
        if self.host().is_some() {
            return Ok(());
        }
        let kept = self.default_network(&self.0.store.snapshot());
        let inner = Arc::clone(&self.0);
        let before = kept.clone();
        let (host, network) =
            blocking::run("read host network", move || inner.choose(before.as_deref())).await?;
        let facts = host.facts;
        let networks = self.keep(kept.as_deref(), network).await?;
        let inner = Arc::clone(&self.0);
        blocking::run("rebuild networks", move || {
            host::prepare(&host)?;
            bridge::rebuild(&inner.instance, &inner.nft, &networks, facts, &live)
        })
        .await?;
        *self.0.host.lock().unwrap_or_else(PoisonError::into_inner) = Some(facts);
        Ok(())
    }

    /// None until the built-in network is up.
    fn host(&self) -> Option<HostFacts> {
        *self.0.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network of CNI that serves sandboxes which name none; none if the built-in one does.
    ///
    /// A folder with configurations of which none is valid is no reason to put pods into another
    /// network than the operator meant.
    fn serving(&self) -> Result<Option<Arc<Chosen>>, CniError> {
        let found = self.0.cni.found();
        match (self.0.config.mode, &found.chosen) {
            (Serving::BuiltIn, _) => Ok(None),
            (_, Some(chosen)) => Ok(Some(Arc::clone(chosen))),
            (Serving::Auto, None) if found.refused.is_empty() => Ok(None),
            (_, None) => Err(self.0.cni.missing(&found)),
        }
    }

    /// The network of CNI that this wish means; none if it means the built-in one.
    fn plugins_for(&self, wish: &SandboxNetwork) -> Result<Option<Arc<Chosen>>, NetworkError> {
        let serving = self.serving();
        match wish.network.as_str() {
            "" => Ok(serving?),
            name => match serving {
                Ok(Some(chosen)) if chosen.list.name == name => Ok(Some(chosen)),
                _ if self.0.config.mode == Serving::Cni => Err(NetworkError::UnknownNetwork {
                    network: name.to_owned(),
                }),
                _ => Ok(None),
            },
        }
    }

    /// Looks whether sandboxes can be attached now.
    ///
    /// # Errors
    /// Why not, in words.
    ///
    /// Source: CRI, condition `NetworkReady`.
    pub async fn ready(&self) -> Result<(), String> {
        self.refresh().await;
        match self.serving() {
            Ok(Some(chosen)) => self.0.cni.status(&chosen).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The network of CNI that serves, as far as its folder was last read.
    pub fn plugins(&self) -> Option<Arc<Chosen>> {
        self.serving().ok().flatten()
    }

    /// Why the folder of CNI, as it was last read, gives no network or skips files; none if all
    /// is well.
    pub fn plugins_refused(&self) -> Option<String> {
        let found = self.0.cni.found();
        (!found.refused.is_empty()).then(|| self.0.cni.missing(&found).to_string())
    }

    /// Plans the attachment of a sandbox: addresses, hardware address, gateways and ports.
    ///
    /// Pure. The caller claims [`NetworkPlan::claims`] for `sandbox/<id>` in the commit of its
    /// intent, which settles what two plans at the same moment could not see, and puts
    /// [`NetworkPlan::record`] into it.
    ///
    /// # Errors
    /// `Cni` if plugins are to serve and can't, or can't be told of this pod. `PortTaken` and `AddressTaken` name the holder; `PortInvalid`, `AddressInvalid`,
    /// `PoolEmpty`, `UnknownNetwork`; `NotStarted` before [`Networks::start`].
    pub fn plan(
        &self,
        at: &Snapshot,
        sandbox: &SandboxId,
        wish: &SandboxNetwork,
        pod: &PodFacts,
    ) -> Result<NetworkPlan, NetworkError> {
        if wish.mode != Mode::Pod {
            return Ok(NetworkPlan::bare(wish.mode));
        }
        if let Some(chosen) = self.plugins_for(wish)? {
            return Ok(NetworkPlan::plugins(Cni::plan(
                &chosen, sandbox, wish, pod,
            )?));
        }
        let host = self.host().ok_or(NetworkError::NotStarted)?;
        let name = match wish.network.as_str() {
            "" => self.0.config.name.as_str(),
            name => name,
        };
        let network = self.get(at, name)?;
        plan::plan(at, &network, host, sandbox, wish)
    }

    /// Attaches the namespace at `netns` as planned; repeating it changes nothing.
    ///
    /// For a sandbox in the host's network it does nothing, and `netns` may be anything.
    ///
    /// # Errors
    /// `PortTaken` if a process of the host listens on a port, before any side effect;
    /// `Kernel`, `File` or `Cni` if a step fails: `detach` undoes those before it.
    pub async fn attach(
        &self,
        sandbox: &SandboxId,
        plan: &NetworkPlan,
        netns: &Path,
        context: Option<&Context>,
    ) -> Result<Attachment, NetworkError> {
        if let Some(plan) = &plan.cni {
            self.loopback(netns).await?;
            return self.0.cni.add(sandbox, plan, context).await;
        }
        let inner = Arc::clone(&self.0);
        let (sandbox, plan, netns) = (sandbox.clone(), plan.clone(), netns.to_owned());
        blocking::run("attach network", move || {
            bridge::attach(&inner.instance, &inner.nft, &sandbox, &plan, &netns)
        })
        .await
    }

    /// Plugins are not asked to do it.
    async fn loopback(&self, netns: &Path) -> Result<(), NetworkError> {
        let netns = netns.to_owned();
        blocking::run("bring loopback up", move || bridge::loopback(&netns)).await
    }

    /// Withdraws the sandbox's ports and ends their flows, or has its plugins undo what they did;
    /// by id alone, repeatable, nothing there is fine.
    ///
    /// The links go with the namespace, which is cheaper than a request to delete them;
    /// [`Networks::settle`] makes sure of it.
    ///
    /// # Errors
    /// `Kernel` if nf_tables refuses; `Cni` if a plugin does, and the next call tries again.
    pub async fn detach(
        &self,
        sandbox: &SandboxId,
        context: Option<&Context>,
    ) -> Result<(), NetworkError> {
        if self.0.cni.cached(sandbox).is_some() {
            return self.0.cni.del(sandbox, context).await;
        }
        if self.host().is_none() {
            return Ok(());
        }
        let (inner, sandbox) = (Arc::clone(&self.0), sandbox.clone());
        blocking::run("detach network", move || {
            bridge::detach(&inner.nft, &sandbox)
        })
        .await
    }

    /// Detaches what a failed attempt to attach, or a lost sandbox, has left. What plugins can't
    /// undo at once is tried again in the background, and by `fsck`: neither the caller, who is to
    /// learn why it failed, nor the pod's name waits for it.
    ///
    /// # Errors
    /// `Kernel` if nf_tables refuses.
    pub async fn undo_attach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        if self.0.cni.cached(sandbox).is_none() {
            return self.detach(sandbox, None).await;
        }
        let tried = self.detach_until_done(sandbox);
        // Whether it worked or not: it is seen to.
        let _ = tokio::time::timeout(UNDO_WITHIN, tried).await;
        Ok(())
    }

    /// Tries until it works; the first attempt is over when the receiver is answered.
    fn detach_until_done(&self, sandbox: &SandboxId) -> oneshot::Receiver<()> {
        let (networks, sandbox) = (self.clone(), sandbox.clone());
        let (tried, first) = oneshot::channel();
        tokio::spawn(async move {
            let mut tried = Some(tried);
            let mut pause = Duration::from_secs(1);
            while let Err(error) = networks.detach(&sandbox, None).await {
                tracing::warn!(sandbox_id = %sandbox, error = &error as &dyn std::error::Error, "not detached, tried again later");
                drop(tried.take());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        });
        first
    }

    /// The agent has recovered: what plugins made for sandboxes that are not `known` is detached
    /// in the background.
    pub fn recovered(&self, known: impl Fn(&SandboxId) -> bool) {
        self.0.cni.started();
        for sandbox in self.plugin_attachments() {
            if !known(&sandbox) {
                drop(self.detach_until_done(&sandbox));
            }
        }
    }

    /// Sandboxes for which plugins made something, or may have.
    pub fn plugin_attachments(&self) -> Vec<SandboxId> {
        let at = self.0.store.snapshot();
        at.all::<cni::Cached>()
            .map(|cached| cached.sandbox.clone())
            .collect()
    }

    /// Has the plugins of an attached sandbox look whether all is as they made it.
    ///
    /// # Errors
    /// `Cni` of the first plugin that finds something wrong.
    pub async fn check_attachment(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        Ok(self.0.cni.check(sandbox).await?)
    }

    /// Waits, after the namespace was dropped, until the sandbox's link is gone, and deletes it if
    /// something keeps the namespace alive. Repeatable.
    ///
    /// The kernel takes 10 to 50 ms for it, so this belongs beside a request, not into it: nothing
    /// depends on it, the sandbox's addresses may be given out before.
    ///
    /// # Errors
    /// `Kernel` if rtnetlink refuses.
    pub async fn settle(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let (inner, sandbox) = (Arc::clone(&self.0), sandbox.clone());
        blocking::run("settle network", move || {
            bridge::settle(&inner.instance, &sandbox)
        })
        .await
    }

    /// What the kernel has of this instance, for `fsck`.
    ///
    /// # Errors
    /// `Kernel` if it can't be read.
    pub async fn inventory(&self) -> Result<Inventory, NetworkError> {
        let inner = Arc::clone(&self.0);
        blocking::run("network inventory", move || {
            bridge::inventory(&inner.instance, &inner.nft)
        })
        .await
    }

    /// Looks at the host's network without changing it; needs no start.
    ///
    /// # Errors
    /// `Config` for an invalid configuration; `Kernel` if rtnetlink can't be used.
    pub async fn check(&self) -> Result<Vec<Finding>, NetworkError> {
        self.0.config.validate()?;
        self.refresh().await;
        let mut findings = self.plugin_findings();
        if !matches!(self.serving(), Ok(None)) {
            return Ok(findings);
        }
        let kept = self.default_network(&self.0.store.snapshot());
        let inner = Arc::clone(&self.0);
        let built_in = blocking::run("check network", move || {
            host::check(&inner.instance, &inner.config, kept.as_deref())
        })
        .await?;
        findings.extend(built_in);
        Ok(findings)
    }

    fn plugin_findings(&self) -> Vec<Finding> {
        let found = self.0.cni.found();
        let refused = found.refused.iter().map(|(file, reason)| Finding::CniFile {
            file: file.clone(),
            reason: reason.clone(),
        });
        let mut findings: Vec<_> = refused.collect();
        match self.serving() {
            Ok(None) => {}
            Ok(Some(chosen)) => {
                findings.push(Finding::CniServes {
                    network: chosen.list.name.clone(),
                    file: chosen.file.clone(),
                });
                let missing = self.0.cni.missing_programs(&chosen.list);
                findings.extend(missing.into_iter().map(|program| Finding::CniPlugin {
                    network: chosen.list.name.clone(),
                    plugin: program.to_owned(),
                    folders: self.0.config.cni.bin_dirs.clone(),
                }));
            }
            Err(error) => findings.push(Finding::CniMissing {
                reason: error.to_string(),
            }),
        }
        findings
    }

    /// Removes everything of this instance from the kernel: bridges, links, the table. For an
    /// agent that is uninstalled or ran in a throw-away directory; no sandbox may live.
    ///
    /// # Errors
    /// `Kernel` if something can't be removed.
    pub async fn remove_all(&self) -> Result<(), NetworkError> {
        // Its record comes before anything of it.
        if self.0.store.snapshot().count::<Network>() == 0 {
            return Ok(());
        }
        let inner = Arc::clone(&self.0);
        blocking::run("remove networks", move || {
            bridge::remove(&inner.instance, &inner.nft)
        })
        .await
    }

    /// All networks, by name.
    pub fn list(&self, at: &Snapshot) -> Vec<Arc<Network>> {
        at.all::<Network>().collect()
    }

    /// The network with this name.
    ///
    /// # Errors
    /// `UnknownNetwork`.
    pub fn get(&self, at: &Snapshot, name: &str) -> Result<Arc<Network>, NetworkError> {
        at.get::<Network>(name)
            .ok_or_else(|| NetworkError::UnknownNetwork {
                network: name.to_owned(),
            })
    }

    fn default_network(&self, at: &Snapshot) -> Option<Arc<Network>> {
        at.get::<Network>(&self.0.config.name)
    }

    /// Commits the network if it is new or changed; returns all there are.
    async fn keep(
        &self,
        kept: Option<&Network>,
        network: Network,
    ) -> Result<Vec<Network>, NetworkError> {
        let mut at = self.0.store.snapshot();
        if kept != Some(&network) {
            let used = format!("address/{}/", network.name);
            if kept.is_some() && at.claims(&used).next().is_some() {
                return Err(NetworkError::Config {
                    key: "network.ipv4, network.ipv6, network.bridge",
                    reason: "can't change while sandboxes have addresses of the network".to_owned(),
                });
            }
            let mut changes = Changes::new().put(network.clone()).durable();
            if kept.is_none() {
                let event = EventDraft::new(EventKind::NetworkCreated, Face::Native);
                changes = changes.event(event.attribute("network", network.name.as_str()));
            }
            at = self.0.store.commit(changes).await?;
        }
        Ok(at
            .all::<Network>()
            .map(|network| (*network).clone())
            .collect())
    }
}

impl Inner {
    /// Reads the host and chooses the default network, refusing what overlaps.
    fn choose(&self, kept: Option<&Network>) -> Result<(Host, Network), NetworkError> {
        let host = Host::read(&mut Netlink::open()?, &self.config)?;
        let own = bridge::name(&self.instance, &self.config, kept);
        let free = |net| host.overlap(IpNet::V4(net), &own).is_none();
        let network = self.config.choose(&self.instance, kept, free)?;
        let subnets = network.ipv4.map(IpNet::V4).into_iter();
        for subnet in subnets.chain(network.ipv6.map(IpNet::V6)) {
            let Some((route, link)) = host.overlap(subnet, &own) else {
                continue;
            };
            // A subnet in use is kept: refusing to start would not help its sandboxes.
            if kept == Some(&network) {
                tracing::warn!(%subnet, %route, link, "subnet overlaps a route of the host");
                continue;
            }
            return Err(NetworkError::SubnetOverlap {
                subnet,
                route,
                link,
            });
        }
        Ok((host, network))
    }
}
