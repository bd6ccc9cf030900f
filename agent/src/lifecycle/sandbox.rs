//! The record of a pod sandbox.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    cgroup::CgroupPath,
    clock::Time,
    id::{Face, SandboxId},
    network::{Attachment, NetworkPlan, SandboxNetwork, is_address},
    store::Record,
};

/// What makes a sandbox unique among those of its face.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SandboxKey {
    /// Kubernetes namespace; empty for native ones.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Kubernetes uid; empty for native ones.
    pub uid: String,
    /// How often it was tried before.
    pub attempt: u32,
}

/// Which process ids a container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PidMode {
    /// Its own only.
    Container,
    /// Those of all containers in the sandbox.
    Pod,
    /// All of the host.
    Host,
    /// Those of another container of the same sandbox.
    Target(crate::id::ContainerId),
}

/// Ids of a sandbox that has a user namespace of its own: the first `length` ones inside are those
/// on the host from `host_uid` and `host_gid` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// Root's user id on the host.
    pub host_uid: u32,
    /// Root's group id on the host.
    pub host_gid: u32,
    /// How many of either.
    pub length: u32,
}

impl std::fmt::Display for IdMap {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (uid, gid, length) = (self.host_uid, self.host_gid, self.length);
        write!(out, "users 0:{uid}:{length}, groups 0:{gid}:{length}")
    }
}

/// What `/etc/resolv.conf` says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of name servers, in order.
    pub servers: Vec<String>,
    /// Domains to search, in order.
    pub searches: Vec<String>,
    /// Options, as `ndots:5`.
    pub options: Vec<String>,
}

/// How a sandbox is wished, by either face.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// The API that asks.
    pub face: Face,
    /// Unique within the face.
    pub key: SandboxKey,
    /// Kept, never interpreted.
    pub labels: BTreeMap<String, String>,
    /// Kept, never interpreted.
    pub annotations: BTreeMap<String, String>,
    /// Host name inside; empty takes the first twelve digits of the id. Not with host network.
    pub hostname: String,
    /// Its place in the network.
    pub network: SandboxNetwork,
    /// None copies the host's `resolv.conf`.
    pub dns: Option<Dns>,
    /// Kernel parameters of its namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// What containers see that do not say otherwise.
    pub pid: PidMode,
    /// Shares System V IPC, POSIX queues and `/dev/shm` with the host.
    pub host_ipc: bool,
    /// Has a user namespace with these ids; none is the host's.
    pub id_map: Option<IdMap>,
    /// Where the logs of its containers go; absolute.
    pub log_directory: Option<PathBuf>,
    /// Name of the runtime handler; empty is the default.
    pub handler: String,
    /// Cgroup above the sandbox's, absolute; none is the agent's own.
    pub cgroup_parent: Option<String>,
    /// Containers may be privileged.
    pub privileged: bool,
    /// It is a run of this system container, which keeps its addresses.
    #[serde(default)]
    pub system: Option<crate::id::ContainerId>,
    /// What a caller of `longshore.v1` repeats with a retry; empty for none. In CRI the name is it.
    #[serde(default)]
    pub idempotency_key: String,
    /// The request as its face knows it, for verbose answers.
    pub request: serde_json::Value,
}

impl SandboxConfig {
    /// An equal request is the same one again: CRI's clients name what they make anew (uid,
    /// attempt) and repeat a call whose answer they never got; our own send a key.
    #[must_use]
    pub fn repeatable(&self) -> bool {
        self.face == Face::Cri || !self.idempotency_key.is_empty()
    }
}

/// A pod sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// How it was wished.
    pub config: SandboxConfig,
    /// When it was made.
    pub created_at: Time,
    /// Its cgroup, above those of its containers.
    pub cgroup: CgroupPath,
    /// What was claimed for it in the network.
    pub plan: NetworkPlan,
    /// What it has in the network; none once stopped or with the host's network.
    pub attachment: Option<Attachment>,
    /// Pid of its shim in the host.
    pub shim_pid: i32,
    /// How it stands.
    pub state: SandboxState,
}

/// How a sandbox stands.
///
/// ```text
/// (run) --> Ready --stop--> Stopped --remove--> gone
///             \--shim died, host restarted--> Lost --remove--> gone
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Containers can be made and run.
    Ready,
    /// A stop began (and may not have ended yet).
    Stopped,
    /// Its shim died or the host was restarted.
    Lost {
        /// What happened.
        reason: String,
    },
}

impl Record for Sandbox {
    const TABLE: &'static str = "sandbox";

    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Sandbox {
    /// Containers can be made and run.
    pub fn is_ready(&self) -> bool {
        self.state == SandboxState::Ready
    }

    /// What others may have once it is stopped.
    pub fn released_claims(&self) -> Vec<String> {
        let keeps = |key: &String| self.config.system.is_some() && is_address(key);
        let mut claims = self.plan.claims();
        claims.retain(|key| !keeps(key));
        claims
    }

    /// Who holds the claims of this sandbox.
    pub fn holder(id: &SandboxId) -> String {
        format!("sandbox/{id}")
    }
}

impl SandboxKey {
    /// The claim that makes the key unique within its face.
    pub fn claim(&self, face: Face) -> String {
        let face = match face {
            Face::Cri => "cri",
            Face::Native => "native",
        };
        // JSON keeps the parts apart whatever they contain.
        let parts = serde_json::json!([face, self.namespace, self.name, self.uid, self.attempt]);
        format!("sandbox-name/{parts}")
    }
}
