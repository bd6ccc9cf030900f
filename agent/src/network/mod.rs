//! Networks of sandboxes: the built-in bridge network, dual stack, without executing a program.
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
};

mod bridge;
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

pub use self::{
    bridge::{Attachment, Inventory},
    error::NetworkError,
    host::{Finding, Severity},
    nft::Published,
    plan::{Mac, Mode, NetworkPlan, SandboxNetwork},
    ports::{HostAddress, PortMapping, Protocol},
    record::{Network, NetworkChapterConfig, Wished},
};
use self::{host::Host, netlink::Netlink, nft::Nft, plan::HostFacts};
use crate::{
    blocking,
    event::{EventDraft, EventKind},
    id::{Face, InstanceId, SandboxId},
    store::{Changes, Snapshot, Store},
};

/// The networks of this agent. Cheap to clone.
#[derive(Clone)]
pub struct Networks(Arc<Inner>);

struct Inner {
    instance: InstanceId,
    config: NetworkChapterConfig,
    store: Store,
    nft: Nft,
    /// Known from `start` on.
    host: Mutex<Option<HostFacts>>,
}

impl Networks {
    /// Touches nothing yet; see [`Networks::start`].
    pub fn new(instance: InstanceId, config: NetworkChapterConfig, store: Store) -> Self {
        Self(Arc::new(Inner {
            nft: Nft::new(&instance),
            instance,
            config,
            store,
            host: Mutex::new(None),
        }))
    }

    /// Makes the kernel what the store says; repeating it changes nothing.
    ///
    /// `live` are the sandboxes whose namespaces still exist, with the plans they were attached
    /// by: their links are repaired and their ports published again. What else bears this
    /// instance (after a crash, or a reboot) is removed.
    ///
    /// # Errors
    /// `Config`, `SubnetOverlap` and `NoSubnet` before any side effect; `Missing` if the kernel
    /// lacks something; `Kernel` and `File` if it refuses.
    pub async fn start(&self, live: Vec<(SandboxId, NetworkPlan)>) -> Result<(), NetworkError> {
        self.0.config.validate()?;
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

    /// Plans the attachment of a sandbox: addresses, hardware address, gateways and ports.
    ///
    /// Pure. The caller claims [`NetworkPlan::claims`] for `sandbox/<id>` in the commit of its
    /// intent, which settles what two plans at the same moment could not see.
    ///
    /// # Errors
    /// `PortTaken` and `AddressTaken` name the holder; `PortInvalid`, `AddressInvalid`,
    /// `PoolEmpty`, `UnknownNetwork`; `NotStarted` before [`Networks::start`].
    pub fn plan(
        &self,
        at: &Snapshot,
        sandbox: &SandboxId,
        wish: &SandboxNetwork,
    ) -> Result<NetworkPlan, NetworkError> {
        let host = *self.0.host.lock().unwrap_or_else(PoisonError::into_inner);
        let host = host.ok_or(NetworkError::NotStarted)?;
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
    /// `Kernel` or `File` if a step fails: `detach` undoes those before it.
    pub async fn attach(
        &self,
        sandbox: &SandboxId,
        plan: &NetworkPlan,
        netns: &Path,
    ) -> Result<Attachment, NetworkError> {
        let inner = Arc::clone(&self.0);
        let (sandbox, plan, netns) = (sandbox.clone(), plan.clone(), netns.to_owned());
        blocking::run("attach network", move || {
            bridge::attach(&inner.instance, &inner.nft, &sandbox, &plan, &netns)
        })
        .await
    }

    /// Withdraws the sandbox's ports and ends their flows; by id alone, repeatable, nothing there
    /// is fine.
    ///
    /// The links go with the namespace, which is cheaper than a request to delete them;
    /// [`Networks::settle`] makes sure of it.
    ///
    /// # Errors
    /// `Kernel` if nf_tables refuses.
    pub async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let (inner, sandbox) = (Arc::clone(&self.0), sandbox.clone());
        blocking::run("detach network", move || {
            bridge::detach(&inner.nft, &sandbox)
        })
        .await
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
        let kept = self.default_network(&self.0.store.snapshot());
        let inner = Arc::clone(&self.0);
        blocking::run("check network", move || {
            host::check(&inner.instance, &inner.config, kept.as_deref())
        })
        .await
    }

    /// Removes everything of this instance from the kernel: bridges, links, the table. For an
    /// agent that is uninstalled or ran in a throw-away directory; no sandbox may live.
    ///
    /// # Errors
    /// `Kernel` if something can't be removed.
    pub async fn remove_all(&self) -> Result<(), NetworkError> {
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
