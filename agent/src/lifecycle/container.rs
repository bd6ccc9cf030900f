//! The record of a container.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::sandbox::PidMode;
use crate::{
    cgroup::CgroupPath,
    clock::Time,
    id::{ContainerId, Face, ImageId, SandboxId},
    rootfs::Layer,
    store::Record,
};

/// Who a container runs as, before names are looked up in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserWish {
    /// User name or number, also as the image's `user[:group]`; wins over `uid`. None and no
    /// `uid` take the image's.
    pub name: Option<String>,
    /// User number.
    pub uid: Option<u32>,
    /// Group number; overrides the primary group.
    pub gid: Option<u32>,
    /// Further groups.
    pub supplemental_gids: Vec<u32>,
    /// Do not add the groups of the image's `/etc/group`.
    pub strict_groups: bool,
}

/// Who a container runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User number.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplemental groups, sorted, the primary one included as in CRI's status.
    pub supplemental_gids: Vec<u32>,
    /// Home directory, for the environment.
    pub home: String,
}

/// How later mounts spread, as mount(8) names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// From the host into the container (`rslave`).
    HostToContainer,
    /// Both ways (`rshared`).
    Bidirectional,
}

/// What a mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// A file or directory of the host, links resolved; made as a directory if missing and so
    /// asked.
    Bind {
        /// Absolute path.
        path: PathBuf,
        /// Make a missing one.
        create: bool,
        /// Also mounts below it.
        recursive: bool,
    },
    /// A directory of another image on this host, read-only.
    Image {
        /// Id or reference, as asked.
        reference: String,
        /// Directory in the image, links followed inside it; empty is the whole.
        sub_path: String,
    },
    /// An empty file system in memory.
    Tmpfs {
        /// Limit in bytes; none is the kernel's half of the memory.
        size_bytes: Option<u64>,
        /// Permission bits of its root.
        mode: Option<u32>,
    },
}

/// A mount beyond the usual ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountWish {
    /// Absolute path in the container.
    pub target: PathBuf,
    /// What it shows.
    pub source: MountSource,
    /// The mount itself is read-only.
    pub readonly: bool,
    /// Mounts below it are read-only too; needs `readonly` and private propagation.
    pub recursive_readonly: bool,
    /// How later mounts spread.
    pub propagation: Propagation,
    /// `noexec`, `nosuid`, `nodev` to add.
    pub options: Vec<String>,
    /// Label the source for the container where SELinux is active.
    pub selinux_relabel: bool,
    /// Show owners as the sandbox's user namespace has them: must be its own map.
    pub id_map: Option<super::sandbox::IdMap>,
}

/// What a container says of its sandbox's user namespace: another one can't be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdMapWish {
    /// It does not say.
    #[default]
    AsSandbox,
    /// It has none.
    Host,
    /// It has these ids.
    Mapped(super::sandbox::IdMap),
}

/// A device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceWish {
    /// Path on the host: a device node, or a directory of them.
    pub host_path: PathBuf,
    /// Path in the container.
    pub container_path: PathBuf,
    /// Some of `rwm`.
    pub permissions: String,
}

/// Limits; none means no limit of that kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Length of a CPU period, microseconds.
    pub cpu_period_us: Option<u64>,
    /// CPU time per period, microseconds.
    pub cpu_quota_us: Option<i64>,
    /// Weight, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// CPUs, as `0-2,7`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes.
    pub cpuset_mems: Option<String>,
    /// Memory.
    pub memory_limit_bytes: Option<i64>,
    /// Memory and swap together; -1 is unlimited.
    pub memory_swap_limit_bytes: Option<i64>,
    /// Soft limit.
    pub memory_reservation_bytes: Option<i64>,
    /// Processes and threads.
    pub pids_limit: Option<i64>,
    /// Limits of huge pages: page size as `2MB`, bytes.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup v2 files and their values.
    pub unified: BTreeMap<String, String>,
}

/// Which system calls are filtered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeccompWish {
    /// Our default profile.
    #[default]
    Default,
    /// None.
    Unconfined,
    /// A profile in OCI's JSON form on the host.
    Localhost(PathBuf),
    /// A profile in OCI's JSON form.
    Inline(serde_json::Value),
}

/// An AppArmor profile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppArmorWish {
    /// The runtime's default where AppArmor is active.
    #[default]
    Default,
    /// None.
    Unconfined,
    /// A loaded profile.
    Localhost(String),
}

/// What a container may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// All capabilities, no filter, every device.
    pub privileged: bool,
    /// Capabilities to add, without `CAP_`, upper case; `ALL` first.
    pub add_capabilities: Vec<String>,
    /// Capabilities to drop.
    pub drop_capabilities: Vec<String>,
    /// Capabilities to keep across execve without file capabilities.
    pub ambient_capabilities: Vec<String>,
    /// Set-user-ID programs gain nothing.
    pub no_new_privs: bool,
    /// The root is read-only.
    pub readonly_rootfs: bool,
    /// Hidden paths.
    pub masked_paths: Vec<String>,
    /// Read-only paths.
    pub readonly_paths: Vec<String>,
    /// System calls.
    pub seccomp: SeccompWish,
    /// AppArmor.
    pub apparmor: AppArmorWish,
    /// SELinux level, type, role, user; empty parts inherit.
    pub selinux: Option<[String; 4]>,
}

/// A resource limit of processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RlimitWish {
    /// `RLIMIT_NOFILE` and its kin.
    pub name: String,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Where a container's output goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogWish {
    /// The file, absolute.
    pub path: PathBuf,
    /// Size at which the shim rotates; 0 leaves rotation to the caller.
    pub rotate_bytes: u64,
    /// Rotated files to keep.
    pub keep_files: u32,
    /// The file goes with the container.
    pub owned: bool,
}

/// A run of a system container: its first process is an init, and what it writes stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemRun {
    /// The system container; its writable layer bears this id.
    pub system: ContainerId,
    /// Its first: files that tell who it is are written over the image's.
    pub first: bool,
}

/// How a container is wished, by either face.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// The API that asks.
    pub face: Face,
    /// Name within the sandbox.
    pub name: String,
    /// How often it was tried before.
    pub attempt: u32,
    /// Kept, never interpreted.
    pub labels: BTreeMap<String, String>,
    /// Kept, never interpreted.
    pub annotations: BTreeMap<String, String>,
    /// The image as asked: id or reference.
    pub image: String,
    /// The image as the user wrote it, for status; empty takes `image`.
    pub image_name: String,
    /// Replaces the image's entrypoint.
    pub command: Vec<String>,
    /// Replaces the image's cmd.
    pub args: Vec<String>,
    /// On top of the image's; values are any octets.
    pub env: Vec<(String, Vec<u8>)>,
    /// Empty takes the image's.
    pub working_dir: String,
    /// Who it runs as.
    pub user: UserWish,
    /// Beyond the usual ones.
    pub mounts: Vec<MountWish>,
    /// Of the host.
    pub devices: Vec<DeviceWish>,
    /// Of the Container Device Interface, by qualified name.
    #[serde(default)]
    pub cdi_devices: Vec<String>,
    /// Limits.
    pub resources: Resources,
    /// What it may do.
    pub security: Security,
    /// Limits of its processes.
    pub rlimits: Vec<RlimitWish>,
    /// None takes the sandbox's.
    pub pid: Option<PidMode>,
    /// What it takes its sandbox's user namespace to be.
    #[serde(default)]
    pub id_map: IdMapWish,
    /// On a terminal.
    pub tty: bool,
    /// With a stdin.
    pub stdin: bool,
    /// That ends with the first client.
    pub stdin_once: bool,
    /// Signal number that asks it to stop; none takes the image's, else SIGTERM.
    pub stop_signal: Option<i32>,
    /// Between that signal and SIGKILL when the caller does not say.
    pub stop_timeout: Duration,
    /// None keeps no log.
    pub log: Option<LogWish>,
    /// OOM score adjustment.
    pub oom_score_adj: Option<i32>,
    /// It is a run of a system container.
    #[serde(default)]
    pub system: Option<SystemRun>,
    /// What a caller of `longshore.v1` repeats with a retry; empty for none. In CRI the name is it.
    #[serde(default)]
    pub idempotency_key: String,
    /// The request as its face knows it, for verbose answers.
    pub request: serde_json::Value,
}

impl ContainerConfig {
    /// An equal request is the same one again: CRI's clients name what they make anew (uid,
    /// attempt) and repeat a call whose answer they never got; our own send a key.
    #[must_use]
    pub fn repeatable(&self) -> bool {
        self.face == Face::Cri || !self.idempotency_key.is_empty()
    }
}

/// A container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox_id: SandboxId,
    /// How it was wished; resources as they are now.
    pub config: ContainerConfig,
    /// Its image.
    pub image_id: ImageId,
    /// The image's layers, base first; they stay while the container does.
    pub layers: Vec<Layer>,
    /// Images that are mounted in it, by what was asked for; their layers stay as long.
    #[serde(default)]
    pub mounted_images: BTreeMap<String, ImageId>,
    /// When it was made.
    pub created_at: Time,
    /// Its cgroup.
    pub cgroup: CgroupPath,
    /// Who it runs as.
    pub user: User,
    /// Signal number that asks it to stop.
    pub stop_signal: i32,
    /// The OCI runtime specification that it was made from.
    pub spec: oci_spec::runtime::Spec,
    /// How it stands.
    pub state: ContainerState,
}

/// How a container stands, with what is true in that state.
///
/// ```text
/// (create) --> Created --start--> Running --ends--> Exited --remove--> gone
///                 \------start fails, lost-------> Exited
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// Made, not started.
    Created {
        /// Its waiting process in the host.
        pid: i32,
    },
    /// Its program runs.
    Running {
        /// Its process in the host.
        pid: i32,
        /// Since when.
        started_at: Time,
    },
    /// It ended or could not be started.
    Exited(Exit),
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255; 128 and the signal if one ended it.
    pub code: i32,
    /// Signal that ended it, or 0.
    pub signal: i32,
    /// Why.
    pub reason: ExitReason,
    /// Why, in words; may be empty.
    pub message: String,
    /// When its program began; none if it never did.
    pub started_at: Option<Time>,
    /// When it ended; never before `started_at`.
    pub finished_at: Time,
}

/// Why a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// Code 0.
    Completed,
    /// Another code or a signal.
    Error,
    /// The kernel killed it for memory.
    OomKilled,
    /// It could not be started.
    StartError,
    /// Nobody saw it end.
    Lost,
}

impl ExitReason {
    /// The word of CRI's `ContainerStatus.reason`.
    pub const fn cri_word(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::Lost => "Unknown",
        }
    }
}

impl Record for Container {
    const TABLE: &'static str = "container";

    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Container {
    /// Who holds the claims of this container.
    pub fn holder(id: &ContainerId) -> String {
        format!("container/{id}")
    }

    /// Where it runs, below its limits.
    pub fn process_cgroup(&self) -> CgroupPath {
        match self.config.system {
            Some(_) => self.cgroup.payload(),
            None => self.cgroup.clone(),
        }
    }

    /// Whose writable layer it has: its own, or its system container's.
    pub fn writable(&self) -> &ContainerId {
        match &self.config.system {
            Some(run) => &run.system,
            None => &self.id,
        }
    }

    /// Its process, while there is one.
    pub const fn pid(&self) -> Option<i32> {
        match self.state {
            ContainerState::Created { pid } | ContainerState::Running { pid, .. } => Some(pid),
            ContainerState::Exited(_) => None,
        }
    }

    /// Its program runs.
    pub const fn is_running(&self) -> bool {
        matches!(self.state, ContainerState::Running { .. })
    }

    /// How it ended.
    pub const fn exit(&self) -> Option<&Exit> {
        match &self.state {
            ContainerState::Exited(exit) => Some(exit),
            _ => None,
        }
    }

    /// Its own image and those that are mounted in it.
    pub fn images(&self) -> impl Iterator<Item = &ImageId> {
        std::iter::once(&self.image_id).chain(self.mounted_images.values())
    }

    /// When its program began.
    pub const fn started_at(&self) -> Option<Time> {
        match &self.state {
            ContainerState::Created { .. } => None,
            ContainerState::Running { started_at, .. } => Some(*started_at),
            ContainerState::Exited(exit) => exit.started_at,
        }
    }

    /// The claim that makes its name unique in its sandbox.
    pub fn name_claim(sandbox: &SandboxId, name: &str, attempt: u32) -> String {
        format!(
            "container-name/{sandbox}/{}",
            serde_json::json!([name, attempt])
        )
    }

    /// The claim that keeps a layer while this container, or its making, lives.
    pub fn layer_claim(layer: &Layer, id: &ContainerId) -> String {
        format!("layer/{}/{id}", layer.diff_id.hex())
    }
}
