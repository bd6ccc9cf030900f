//! Cgroups of pods and containers: made, limited, read, emptied, removed.
//!
//! ```text
//!  <parent>/                      longshore-<instance>, or CRI's cgroup_parent
//!    <sandbox id>/                limits of the pod
//!      <container id>/            limits of the container; its first process
//!        exec-<id>/               names what one exec started (freezer or unified tree only)
//! ```
//! A system container's processes, and its execs, are in `<container id>/payload/`, whose limits
//! nobody inside can see: see [`Cgroups::delegate`].
//!
//! The same path stands in every hierarchy: each version 1 controller, named hierarchies, and the
//! unified tree, on hybrid hosts too, where it carries no controller but gives `cgroup.kill` and
//! pressure readings. On version 2 a cgroup with processes has no controllers
//! enabled for its children; so pods, which have them enabled, hold no process of their own, and
//! containers, which hold processes, have none enabled.
//!
//! A process attaches itself (the shim's child writes `0` to the files of [`Cgroups::plan`]);
//! nothing here ever moves one, with one exception: inside a container, where the root of the
//! mount is not the real root, the processes there go to a leaf, or no controller could be enabled.
//!
//! Where the line to `cgroups-rs` is: its controllers set version 1 limits ([`v1`]) and freeze.
//! Finding mounts, making and removing directories, version 2, killing, and all readings are plain
//! file access here: the library looks at `/sys/fs/cgroup` only, knows no hybrid host, reads 30
//! files where 8 do, and its removal moves live processes to the root.
//!
//! Everything here blocks; callers go through [`crate::blocking`].
//!
//! Written down in cgroups(7) and the kernel's `admin-guide/cgroup-v1` and `cgroup-v2`.

mod delegate;
mod devices;
mod error;
mod file;
mod hierarchy;
mod kill;
mod oom;
mod stats;
mod systemd;
#[cfg(test)]
mod tests;
mod v1;
mod v2;

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use longshore_shim::wire;
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use tracing::warn;

pub use error::CgroupError;
pub use hierarchy::CgroupVersion;
pub use stats::{
    CgroupMetrics, CgroupStats, HugepageUsage, IoUsage, Pressure, PressureLine, PressureStats,
};

use crate::id::{ContainerId, InstanceId, SandboxId};
use hierarchy::Hierarchies;

/// `[cgroup]` of `longshored.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CgroupChapterConfig {
    /// Who makes the cgroups of pods. CRI's `cgroup_parent` is a path for the one and a slice for
    /// the other; kubelet asks which (`RuntimeConfig`).
    pub driver: CgroupDriver,
    /// Cgroup below which `longshore-<instance>` is made, relative to the root of each hierarchy.
    /// Unset: the unit's subtree if systemd delegated one and placed the agent in a leaf of it
    /// (`Delegate=yes`, `DelegateSubgroup=`), else the root. With the systemd driver the slice of
    /// the pods; unset: `longshore-<instance>.slice`.
    pub parent: Option<String>,
}

/// Who makes the cgroups of pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// The agent.
    #[default]
    Cgroupfs,
    /// systemd makes a scope of each pod, and hands it over.
    Systemd,
}

/// A cgroup, by its path relative to the root of each hierarchy; never empty, no `..`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CgroupPath(String);

/// Something of this host that takes a capability away from containers; for `check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupFinding {
    /// Swap limits are dropped: the kernel does not account for swap (`swapaccount=1`).
    NoSwapAccounting,
    /// Limits of this controller are refused.
    NoController(&'static str),
    /// Devices of containers are not restricted: the version 1 controller is missing.
    NoDeviceFilter,
}

/// The cgroups of this host, and where ours are.
#[derive(Debug)]
pub struct Cgroups {
    hierarchies: Hierarchies,
    driver: CgroupDriver,
    root: CgroupPath,
    swap_accounting: bool,
    /// Controllers to enable on version 2.
    wanted: &'static [&'static str],
}

/// Controllers that containers use, as version 2 names them.
const CONTROLLERS: &[&str] = &["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

impl Cgroups {
    /// Finds the hierarchies of this host and makes the cgroup that holds the pods.
    ///
    /// # Errors
    /// `NoHierarchy` if nothing is mounted; `Call` if the root cannot be made.
    pub fn new(instance: &InstanceId, config: &CgroupChapterConfig) -> Result<Self, CgroupError> {
        let hierarchies = Hierarchies::detect()?;
        let root = match &config.parent {
            parent if config.driver == CgroupDriver::Systemd => {
                systemd::root(instance, parent.as_deref())?
            }
            Some(parent) => CgroupPath::below_parent(parent, &format!("longshore-{instance}"))?,
            None => {
                match delegated_parent(&hierarchies, &file::read(Path::new("/proc/self/cgroup"))?) {
                    Some(parent) => {
                        CgroupPath::below_parent(&parent, &format!("longshore-{instance}"))?
                    }
                    None => CgroupPath(format!("longshore-{instance}")),
                }
            }
        };
        let mut cgroups = Self {
            hierarchies,
            driver: config.driver,
            root,
            swap_accounting: false,
            wanted: CONTROLLERS,
        };
        match cgroups.driver {
            CgroupDriver::Cgroupfs => cgroups.make(&cgroups.root)?,
            CgroupDriver::Systemd => systemd::start_slice(cgroups.root.name())?,
        }
        cgroups.swap_accounting = cgroups.find_swap_accounting();
        Ok(cgroups)
    }

    /// Which version carries the controllers.
    pub fn version(&self) -> CgroupVersion {
        self.hierarchies.version()
    }

    /// Who makes the cgroups of pods.
    pub fn driver(&self) -> CgroupDriver {
        self.driver
    }

    /// The cgroup that holds pods without a `cgroup_parent`.
    pub fn root(&self) -> &CgroupPath {
        &self.root
    }

    /// Swap of containers can be limited and read.
    pub fn swap_accounting(&self) -> bool {
        self.swap_accounting
    }

    /// Controllers that containers can use, by their version 2 names.
    pub fn controllers(&self) -> Vec<&'static str> {
        match self.version() {
            CgroupVersion::V1 => CONTROLLERS
                .iter()
                .copied()
                .filter(|&name| {
                    let v1_name = if name == "io" { "blkio" } else { name };
                    self.hierarchies.v1.iter().any(|one| one.has(v1_name))
                })
                .collect(),
            CgroupVersion::V2 => {
                let available = self
                    .sample()
                    .and_then(|dir| file::read(&dir.join("cgroup.controllers")).ok())
                    .unwrap_or_default();
                let available: Vec<_> = available.split_whitespace().collect();
                CONTROLLERS
                    .iter()
                    .copied()
                    .filter(|name| available.contains(name))
                    .collect()
            }
        }
    }

    /// What this host lacks.
    pub fn findings(&self) -> Vec<CgroupFinding> {
        let present = self.controllers();
        let mut findings: Vec<_> = CONTROLLERS
            .iter()
            // Huge pages are rare and their absence refuses only what asks for them.
            .filter(|&&name| name != "hugetlb" && !present.contains(&name))
            .map(|&name| CgroupFinding::NoController(name))
            .collect();
        if !self.swap_accounting {
            findings.push(CgroupFinding::NoSwapAccounting);
        }
        if self.version() == CgroupVersion::V1 && self.v1_dir("devices", &self.root).is_none() {
            findings.push(CgroupFinding::NoDeviceFilter);
        }
        findings
    }

    /// Path of a pod's cgroup, below CRI's `cgroup_parent` if there is one.
    ///
    /// # Errors
    /// `BadPath` if the parent has a component `..` or is no plain path; with the systemd driver
    /// if it is no slice.
    pub fn pod(
        &self,
        parent: Option<&str>,
        sandbox: &SandboxId,
    ) -> Result<CgroupPath, CgroupError> {
        let parent = parent.filter(|parent| !parent.is_empty());
        match (self.driver, parent) {
            (CgroupDriver::Systemd, Some(parent)) => {
                systemd::pod(&systemd::slice(parent)?, sandbox)
            }
            (CgroupDriver::Systemd, None) => systemd::pod(&self.root, sandbox),
            (CgroupDriver::Cgroupfs, Some(parent)) => {
                CgroupPath::below_parent(parent, sandbox.as_str())
            }
            (CgroupDriver::Cgroupfs, None) => Ok(CgroupPath(format!("{}/{sandbox}", self.root.0))),
        }
    }

    /// Makes the cgroup of a pod, a path of [`Self::pod`], whose supervisor runs. The one driver
    /// makes it by [`Self::create`] before; the other needs a process to begin with.
    ///
    /// # Errors
    /// `Systemd` and `NoScope` if systemd does not do it.
    pub fn adopt(&self, pod: &CgroupPath, supervisor: i32) -> Result<(), CgroupError> {
        match self.driver {
            CgroupDriver::Cgroupfs => Ok(()),
            CgroupDriver::Systemd => {
                self.start_scope(pod, supervisor)?;
                self.make(pod)
            }
        }
    }

    /// Makes a cgroup in all hierarchies, with its ancestors where they are missing, and limits it.
    ///
    /// `resources.devices` distinguishes: `None` restricts nothing (pods), `Some`, also of nothing,
    /// denies all but the standard devices and what the list says (containers).
    /// Repeating it is harmless. After a failure some of it may be there: [`Self::remove`].
    pub fn create(
        &self,
        path: &CgroupPath,
        resources: Option<&LinuxResources>,
    ) -> Result<(), CgroupError> {
        self.make(path)?;
        let Some(resources) = resources else {
            return Ok(());
        };
        self.apply(path, resources)?;
        match resources.devices() {
            None => Ok(()),
            Some(rules) => self.restrict_devices(path, rules),
        }
    }

    /// Changes limits of an existing cgroup; what is unset stays. Devices stay as they are.
    ///
    /// # Errors
    /// `BelowUsage` for a memory limit below what is in use: the kernel would kill for it.
    pub fn update(&self, path: &CgroupPath, resources: &LinuxResources) -> Result<(), CgroupError> {
        let limit = resources.memory().and_then(|memory| memory.limit());
        if let Some(limit) = limit.filter(|&limit| limit > 0) {
            let usage = self.memory_usage(path)?;
            if usage > limit.unsigned_abs() {
                return Err(CgroupError::BelowUsage { limit, usage });
            }
        }
        self.apply(path, resources)
    }

    /// What a process joins to be in this cgroup.
    pub fn plan(&self, path: &CgroupPath) -> wire::CgroupPlan {
        wire::CgroupPlan {
            v1_tasks: self
                .hierarchies
                .v1
                .iter()
                .map(|one| text(path.below(&one.mount).join("tasks")))
                .collect(),
            v2_dir: self
                .hierarchies
                .unified_dir(path)
                .map(text)
                .unwrap_or_default(),
            v1_freezer_leaf: String::new(),
        }
    }

    /// Makes a leaf that names what an exec starts, and says what its process joins: the leaf in
    /// one hierarchy, and the container's own cgroup in all others.
    ///
    /// The freezer has it on version 1, hybrid too: one directory is enough to kill by.
    pub fn exec_plan(
        &self,
        container: &CgroupPath,
        exec_id: u64,
    ) -> Result<wire::CgroupPlan, CgroupError> {
        let mut plan = self.plan(container);
        let leaf = container.exec_leaf(exec_id);
        if let Some(dir) = self.v1_dir("freezer", &leaf) {
            make_dir(&dir)?;
            let of_container = self
                .v1_dir("freezer", container)
                .map(|dir| dir.join("tasks"));
            plan.v1_tasks
                .retain(|tasks| of_container.as_deref() != Some(Path::new(tasks)));
            plan.v1_freezer_leaf = text(dir);
        } else if let Some(dir) = self.hierarchies.unified_dir(&leaf) {
            make_dir(&dir)?;
            plan.v2_dir = text(dir);
        }
        Ok(plan)
    }

    /// Hierarchies that an OCI runtime is not to see, so that what it starts stays in the cgroups
    /// that the shim puts it into there: the freezer, which names what an exec starts, and the
    /// unified tree of a hybrid host, which some refuse. None on version 2.
    ///
    /// # Errors
    /// `SharedFreezer` if the freezer cannot be hidden without hiding limits.
    pub fn hidden_from_runtimes(
        &self,
        path: &CgroupPath,
    ) -> Result<Vec<wire::HiddenHierarchy>, CgroupError> {
        if self.version() == CgroupVersion::V2 {
            return Ok(Vec::new());
        }
        let freezer = self.hierarchies.v1.iter().find(|one| one.has("freezer"));
        if let Some(freezer) = freezer.filter(|one| one.controllers.len() > 1) {
            return Err(CgroupError::SharedFreezer {
                controllers: freezer.controllers.join(","),
            });
        }
        Ok(freezer
            .map(|freezer| &freezer.mount)
            .into_iter()
            .chain(&self.hierarchies.unified)
            .map(|mount| wire::HiddenHierarchy {
                mount: text(mount.clone()),
                dir: text(path.below(mount)),
            })
            .collect())
    }

    /// The leaf of an exec as an OCI runtime is told it: relative to the container's cgroup; empty
    /// where it stays in the leaf that the shim puts it into.
    pub fn exec_leaf_for_runtimes(&self, exec_id: u64) -> String {
        match self.version() {
            CgroupVersion::V1 => String::new(),
            CgroupVersion::V2 => format!("exec-{exec_id:x}"),
        }
    }

    /// Removes the leaf of an exec. One that still has processes, which the exec left behind,
    /// stays and goes with the container.
    pub fn remove_exec(&self, container: &CgroupPath, exec_id: u64) -> Result<(), CgroupError> {
        let leaf = container.exec_leaf(exec_id);
        let Some(dir) = self
            .v1_dir("freezer", &leaf)
            .or_else(|| self.hierarchies.unified_dir(&leaf))
        else {
            return Ok(());
        };
        match fs::remove_dir(&dir) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(()),
            Err(source) => Err(CgroupError::call("rmdir", &dir, source)),
        }
    }

    /// Pids, in this pid namespace, of all processes in a cgroup and below. None if it is absent.
    pub fn processes(&self, path: &CgroupPath) -> Result<Vec<i32>, CgroupError> {
        let Some(dir) = self.hierarchies.dirs(path).next() else {
            return Ok(Vec::new());
        };
        kill::processes(&dir)
    }

    /// Whether a cgroup is there, in any hierarchy.
    pub fn exists(&self, path: &CgroupPath) -> bool {
        self.hierarchies.dirs(path).any(|dir| dir.is_dir())
    }

    /// The cgroups of pods and containers below our root, in any hierarchy. Those below a
    /// `cgroup_parent` are known from their records only: that tree belongs to somebody else.
    pub fn inventory(&self) -> Result<Vec<CgroupPath>, CgroupError> {
        let mut found = BTreeSet::new();
        for root in self.hierarchies.dirs(&self.root) {
            let pods = match self.driver {
                CgroupDriver::Cgroupfs => kill::children(&root)?
                    .iter()
                    .filter_map(|pod| self.root.child_named(pod))
                    .collect(),
                CgroupDriver::Systemd => self.scopes(&root)?,
            };
            for pod in pods {
                let below = &pod.as_str()[self.root.as_str().len() + 1..];
                for container in kill::children(&root.join(below))? {
                    found.extend(pod.child_named(&container));
                }
                found.insert(pod);
            }
        }
        Ok(found.into_iter().collect())
    }

    /// Removes the cgroup that holds the pods, for an agent that will not come back.
    ///
    /// # Errors
    /// `StillBusy` if processes there can't be ended; `Systemd` if it does not stop the slice.
    pub fn leave(&self) -> Result<(), CgroupError> {
        match self.driver {
            CgroupDriver::Cgroupfs => self.remove(&self.root),
            CgroupDriver::Systemd => systemd::stop(self.root.name()),
        }
    }

    fn v1_dir(&self, controller: &str, path: &CgroupPath) -> Option<PathBuf> {
        self.hierarchies.v1_dir(controller, path)
    }

    fn make(&self, path: &CgroupPath) -> Result<(), CgroupError> {
        for one in &self.hierarchies.v1 {
            let inherits_cpus = one.has("cpuset");
            let mut dir = one.mount.clone();
            for name in path.names() {
                let parent = dir.clone();
                dir.push(name);
                make_dir(&dir)?;
                if inherits_cpus {
                    v1::inherit_cpuset(&parent, &dir)?;
                }
            }
        }
        let Some(mount) = &self.hierarchies.unified else {
            return Ok(());
        };
        let mut dir = mount.clone();
        for name in path.names() {
            // What a slice has enabled is systemd's decision, and for its scopes it is everything.
            let foreign = self.driver == CgroupDriver::Systemd
                && (name.ends_with(".slice") || name.ends_with(".scope"));
            if self.version() == CgroupVersion::V2 && !foreign {
                v2::enable_controllers(&dir, self.wanted)?;
            }
            dir.push(name);
            make_dir(&dir)?;
        }
        Ok(())
    }

    fn apply(&self, path: &CgroupPath, resources: &LinuxResources) -> Result<(), CgroupError> {
        match self.version() {
            CgroupVersion::V1 => v1::apply(&self.hierarchies, path, resources),
            CgroupVersion::V2 => {
                let dir = self
                    .hierarchies
                    .unified_dir(path)
                    .ok_or(CgroupError::NoHierarchy)?;
                v2::apply(&dir, resources)
            }
        }
    }

    fn restrict_devices(
        &self,
        path: &CgroupPath,
        rules: &[oci_spec::runtime::LinuxDeviceCgroup],
    ) -> Result<(), CgroupError> {
        let rules = devices::rules(rules)?;
        match (self.version(), self.v1_dir("devices", path)) {
            (CgroupVersion::V1, Some(dir)) => v1::restrict_devices(&dir, &rules),
            (CgroupVersion::V1, None) => {
                warn!(cgroup = %path, "no devices controller: devices are not restricted");
                Ok(())
            }
            (CgroupVersion::V2, _) => {
                let dir = self
                    .hierarchies
                    .unified_dir(path)
                    .ok_or(CgroupError::NoHierarchy)?;
                v2::restrict_devices(&dir, &rules)
            }
        }
    }

    fn find_swap_accounting(&self) -> bool {
        match self.version() {
            CgroupVersion::V1 => self
                .v1_dir("memory", &self.root)
                .is_some_and(|dir| dir.join("memory.memsw.limit_in_bytes").exists()),
            CgroupVersion::V2 => self
                .sample()
                .is_some_and(|dir| dir.join("memory.swap.max").exists()),
        }
    }

    /// A version 2 cgroup that has what ours have.
    fn sample(&self) -> Option<PathBuf> {
        match self.driver {
            CgroupDriver::Cgroupfs => self.hierarchies.unified_dir(&self.root),
            // A slice has only what units below it need; in this one that is everything.
            CgroupDriver::Systemd => {
                let mount = self.hierarchies.unified.as_ref()?;
                Some(mount.join("system.slice"))
            }
        }
    }
}

impl CgroupPath {
    /// Path of a container's cgroup below its pod's.
    pub fn child(&self, container: &ContainerId) -> Self {
        Self(format!("{}/{container}", self.0))
    }

    /// Where the processes of a system container are, below its limits: what it may divide as it
    /// likes. See [`Cgroups::delegate`].
    #[must_use]
    pub fn payload(&self) -> Self {
        Self(format!("{}/payload", self.0))
    }

    /// The text, without a leading slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The cgroup above; none for one below the root of the hierarchy.
    fn parent(&self) -> Option<Self> {
        let (above, _) = self.0.rsplit_once('/')?;
        Some(Self(above.to_owned()))
    }

    /// The last component.
    fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    fn below_parent(parent: &str, name: &str) -> Result<Self, CgroupError> {
        format!("{}/{name}", parent.trim_end_matches('/')).parse()
    }

    fn exec_leaf(&self, exec_id: u64) -> Self {
        Self(format!("{}/exec-{exec_id:x}", self.0))
    }

    fn child_named(&self, name: &str) -> Option<Self> {
        format!("{}/{name}", self.0).parse().ok()
    }

    fn below(&self, mount: &Path) -> PathBuf {
        mount.join(&self.0)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }
}

impl FromStr for CgroupPath {
    type Err = CgroupError;

    fn from_str(path: &str) -> Result<Self, CgroupError> {
        let bad = |reason| {
            Err(CgroupError::BadPath {
                path: path.chars().take(200).collect(),
                reason,
            })
        };
        if path.contains(|c: char| c.is_control()) {
            return bad("has a control character");
        }
        let mut names = Vec::new();
        for component in Path::new(path).components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => names.push(name.to_str().expect("it was text")),
                Component::ParentDir | Component::Prefix(_) => return bad("must not have `..`"),
            }
        }
        match names.as_slice() {
            [] => bad("is the root of the hierarchy"),
            names if names.iter().any(|name| name.len() > 255) => {
                bad("has a component longer than 255 bytes")
            }
            names => Ok(Self(names.join("/"))),
        }
    }
}

impl TryFrom<String> for CgroupPath {
    type Error = CgroupError;

    fn try_from(path: String) -> Result<Self, CgroupError> {
        path.parse()
    }
}

impl From<CgroupPath> for String {
    fn from(path: CgroupPath) -> Self {
        path.0
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes a directory; `false` if it was there.
fn make_dir(dir: &Path) -> Result<bool, CgroupError> {
    match fs::create_dir(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(CgroupError::call("mkdir", dir, source)),
    }
}

/// The cgroup above our own, if systemd gave it to us with all below.
///
/// Only if the agent sits in a leaf: were it in the unit's own cgroup, a restart of the unit
/// could not be placed there while pods below have controllers enabled.
fn delegated_parent(hierarchies: &Hierarchies, own_cgroups: &str) -> Option<String> {
    if hierarchies.version() != CgroupVersion::V2 {
        return None;
    }
    let own = own_cgroups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))?;
    let parent = Path::new(own).parent()?.to_str()?.trim_start_matches('/');
    if parent.is_empty() {
        return None;
    }
    let dir = hierarchies.unified.as_ref()?.join(parent);
    let delegated = ["user.delegate", "trusted.delegate"].iter().any(|name| {
        let mut value = [0_u8; 8];
        matches!(rustix::fs::getxattr(&dir, *name, &mut value), Ok(n) if value[..n] == *b"1")
    });
    delegated.then(|| parent.to_owned())
}

fn text(path: PathBuf) -> String {
    path.into_os_string()
        .into_string()
        .unwrap_or_else(|raw| raw.to_string_lossy().into_owned())
}
