//! The record of a system container.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::super::{
    container::{Exit, MountWish, Resources},
    sandbox::{Dns, IdMap, SandboxKey},
};
use crate::{
    clock::Time,
    id::{ContainerId, Face, ImageId},
    network::SandboxNetwork,
    rootfs::Layer,
    store::Record,
};

/// How a system container is wished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemConfig {
    /// Unique among system containers; also its host name unless that is given.
    pub name: String,
    /// The image as asked: id or reference.
    pub image: String,
    /// Host name inside.
    pub hostname: String,
    /// Kept, never interpreted.
    pub labels: BTreeMap<String, String>,
    /// Limits, of which nothing inside can see or raise any.
    pub resources: Resources,
    /// Of the host, with the owners that the system has.
    pub mounts: Vec<MountWish>,
    /// Its place in the network; the addresses of its first start stay its own.
    pub network: SandboxNetwork,
    /// What its `/etc/resolv.conf` says; none is what the host's does.
    pub dns: Option<Dns>,
    /// Program and arguments of process 1; empty finds the image's.
    pub init: Vec<String>,
    /// Signal number that halts it; none is the one that its init takes.
    pub halt_signal: Option<i32>,
    /// Between that and SIGKILL when the caller does not say.
    pub stop_timeout: Duration,
    /// Whether it starts with the host.
    pub autostart: Autostart,
    /// Name of the runtime handler; empty is the default.
    pub handler: String,
    /// What a caller repeats with a retry; empty for none.
    pub idempotency_key: String,
    /// The request as its face knows it, for answers.
    pub request: serde_json::Value,
}

/// When a system container starts without being asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Autostart {
    /// It does.
    pub enabled: bool,
    /// Lower ones first; equal ones by name.
    pub order: i32,
    /// Between its start and the next one's.
    pub delay: Duration,
}

/// A system container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct System {
    /// Its id, and that of its writable layer.
    pub id: ContainerId,
    /// How it was wished.
    pub config: SystemConfig,
    /// Its image, which stays while it does.
    pub image_id: ImageId,
    /// The image's layers, base first.
    pub layers: Vec<Layer>,
    /// Program and arguments of process 1.
    pub init: Vec<String>,
    /// Its ids on the host.
    pub ids: IdMap,
    /// Other system containers may have the same ids: the host grants no others.
    pub shares_ids: bool,
    /// When it was made.
    pub created_at: Time,
    /// Its addresses, once it was started.
    pub addresses: Vec<IpAddr>,
    /// How often it was started or rebooted.
    pub starts: u64,
    /// How it ended last.
    pub last_exit: Option<Exit>,
}

impl Record for System {
    const TABLE: &'static str = "system";

    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl System {
    /// Who holds its claims.
    pub fn holder(id: &ContainerId) -> String {
        format!("system/{id}")
    }

    /// The claim that makes its name unique.
    pub fn name_claim(name: &str) -> String {
        format!("system-name/{name}")
    }

    /// What its sandbox is found by.
    pub fn sandbox_key(&self) -> SandboxKey {
        SandboxKey {
            namespace: String::new(),
            name: self.config.name.clone(),
            uid: self.id.to_string(),
            attempt: 0,
        }
    }

    /// The claim of its sandbox.
    pub(super) fn sandbox_claim(&self) -> String {
        self.sandbox_key().claim(Face::Native)
    }

    /// Stays the same over its whole life, in the form of a UUID.
    pub fn uuid(&self) -> String {
        let id = self.id.as_str();
        [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..32]].join("-")
    }

    /// Where its console is written to, below the directory of all logs.
    pub(super) fn log_name(id: &ContainerId) -> PathBuf {
        PathBuf::from(format!("system-{id}")).join("console.log")
    }
}
