//! The systemd driver: each pod is a scope that systemd makes and hands over.
//!
//! ```text
//! <slice>/                             longshore-<instance>.slice, or CRI's cgroup_parent
//!   longshore-<sandbox id>.scope/      made by systemd, Delegate=yes: nobody else writes below
//!     supervisor/                      the shim; the scope lives as long as it
//!     <sandbox id>/                    limits of the pod, and below it its containers
//! ```
//! A scope cannot be empty, so it is asked for with the shim that is to live in it, and goes by
//! itself when the shim has ended and the pod's cgroup is removed. Containers need no call.
//!
//! Source: systemd.scope(5), org.freedesktop.systemd1(5), and systemd's document "Control Group
//! APIs and Delegation".

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use cgroups_rs::systemd::{NO_SUCH_UNIT, PIDS, props::PropertiesBuilder, utils::expand_slice};
use zbus::{blocking::connection, zvariant::Value};

use super::{CgroupError, CgroupPath, CgroupVersion, Cgroups, file, make_dir};
use crate::id::{InstanceId, SandboxId};

/// Present exactly where systemd is process 1: sd_booted(3).
const BOOTED: &str = "/run/systemd/system";
/// Leaf of the scope in which the shim is.
const SUPERVISOR: &str = "supervisor";
/// For a call, and for systemd to do what it was told.
const PATIENCE: Duration = Duration::from_secs(10);

/// The slice of an instance, as a path.
pub(super) fn root(instance: &InstanceId, parent: Option<&str>) -> Result<CgroupPath, CgroupError> {
    if !Path::new(BOOTED).is_dir() {
        return Err(CgroupError::NoSystemd);
    }
    match parent {
        Some(slice) => self::slice(slice),
        None => self::slice(&format!("longshore-{instance}.slice")),
    }
}

/// Where the cgroup of a pod is, below a slice.
pub(super) fn pod(slice: &CgroupPath, sandbox: &SandboxId) -> Result<CgroupPath, CgroupError> {
    CgroupPath::below_parent(slice.as_str(), &format!("{}/{sandbox}", scope(sandbox)))
}

/// The path of a slice: a dash in its name is a level.
///
/// Source: systemd.slice(5).
pub(super) fn slice(name: &str) -> Result<CgroupPath, CgroupError> {
    let bad = || CgroupError::BadPath {
        path: name.chars().take(200).collect(),
        reason: "is no slice, as the systemd driver needs: `a.slice`, `a-b.slice`",
    };
    // kubelet gives the name alone; some give the path that it stands for.
    let unit = name.rsplit('/').next().unwrap_or(name);
    let path = expand_slice(unit).map_err(|_| bad())?;
    if path.is_empty() || (unit != name && path != name.trim_matches('/')) {
        return Err(bad());
    }
    path.parse()
}

fn scope(sandbox: &SandboxId) -> String {
    format!("longshore-{sandbox}.scope")
}

impl Cgroups {
    /// Has systemd make the scope of `pod`, a path of [`Cgroups::pod`], with its shim in it, and
    /// prepares it for cgroups below. Blocks for some milliseconds.
    pub(super) fn start_scope(&self, pod: &CgroupPath, shim: i32) -> Result<(), CgroupError> {
        let above = pod.parent();
        let (Some(scope), Some(slice)) =
            (above.as_ref(), above.as_ref().and_then(CgroupPath::parent))
        else {
            return Err(CgroupError::BadPath {
                path: pod.to_string(),
                reason: "is no path of a pod",
            });
        };
        start(slice.name(), scope.name(), shim)?;
        // systemd's own tree, on hybrid hosts too; on others it has a version 1 hierarchy.
        let tree = self
            .hierarchies
            .unified_dir(scope)
            .or_else(|| self.v1_dir("name=systemd", scope))
            .ok_or(CgroupError::NoHierarchy)?;
        wait_for(&tree.join("cgroup.procs"), shim, scope.name())?;
        if self.version() == CgroupVersion::V2 {
            // A cgroup with processes can't give controllers to those below.
            let leaf = tree.join(SUPERVISOR);
            make_dir(&leaf)?;
            file::write(&leaf.join("cgroup.procs"), &shim.to_string())?;
        }
        Ok(())
    }

    /// Removes what is left of the scope of a pod in hierarchies that are not systemd's.
    pub(super) fn drop_scope(&self, pod: &CgroupPath) {
        let Some(scope) = pod.parent().filter(|path| path.name().ends_with(".scope")) else {
            return;
        };
        for one in &self.hierarchies.v1 {
            // Not there, or still systemd's.
            let _ = fs::remove_dir(scope.below(&one.mount));
        }
    }

    /// Pods below our slice that are there.
    pub(super) fn scopes(&self, slice: &Path) -> Result<Vec<CgroupPath>, CgroupError> {
        let mut found = Vec::new();
        for name in super::kill::children(slice)? {
            let sandbox = name
                .strip_prefix("longshore-")
                .and_then(|rest| rest.strip_suffix(".scope"));
            let Some(sandbox) = sandbox.and_then(|id| id.parse::<SandboxId>().ok()) else {
                continue;
            };
            if slice.join(&name).join(sandbox.as_str()).is_dir() {
                found.push(pod(&self.root, &sandbox)?);
            }
        }
        Ok(found)
    }
}

fn start(slice: &str, scope: &str, shim: i32) -> Result<(), CgroupError> {
    let mut properties = PropertiesBuilder::default_cgroup(slice, scope)
        .description(format!("Longshore pod {scope}"))
        .build();
    properties.push((PIDS, Value::from(vec![shim.unsigned_abs()])));
    // A failed scope is forgotten like one that ended.
    properties.push(("CollectMode", Value::from("inactive-or-failed")));
    let none: Vec<(&str, Vec<(&str, Value<'_>)>)> = Vec::new();
    call("StartTransientUnit", &(scope, "fail", properties, none)).map_err(refused(scope))
}

/// Starts a slice, which may be empty; running already is fine.
pub(super) fn start_slice(slice: &str) -> Result<(), CgroupError> {
    call("StartUnit", &(slice, "replace")).map_err(refused(slice))
}

/// Ends a slice and all in it; not there is fine.
pub(super) fn stop(slice: &str) -> Result<(), CgroupError> {
    match call("StopUnit", &(slice, "replace")) {
        Err(zbus::Error::MethodError(name, ..)) if name.as_str() == NO_SUCH_UNIT => Ok(()),
        done => done.map_err(refused(slice)),
    }
}

fn refused(unit: &str) -> impl FnOnce(zbus::Error) -> CgroupError {
    |source| CgroupError::Systemd {
        unit: unit.to_owned(),
        source: Box::new(source),
    }
}

fn call(
    method: &str,
    body: &(impl serde::Serialize + zbus::zvariant::DynamicType),
) -> zbus::Result<()> {
    let bus = connection::Builder::system()?
        .method_timeout(PATIENCE)
        .build()?;
    bus.call_method(
        Some("org.freedesktop.systemd1"),
        "/org/freedesktop/systemd1",
        Some("org.freedesktop.systemd1.Manager"),
        method,
        body,
    )?;
    Ok(())
}

/// The call only queues a job; it is done when the process is where it was sent.
fn wait_for(procs: &Path, pid: i32, unit: &str) -> Result<(), CgroupError> {
    let since = Instant::now();
    let wanted = pid.to_string();
    let mut pause = Duration::from_micros(500);
    while !fs::read_to_string(procs).is_ok_and(|pids| pids.lines().any(|one| one == wanted)) {
        if since.elapsed() > PATIENCE {
            return Err(CgroupError::NoScope {
                unit: unit.to_owned(),
                waited_ms: u64::try_from(PATIENCE.as_millis()).unwrap_or(u64::MAX),
            });
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_paths() {
        for (name, path) in [
            ("a.slice", Some("a.slice")),
            ("a-b.slice", Some("a.slice/a-b.slice")),
            ("/a.slice/a-b.slice", Some("a.slice/a-b.slice")),
            (
                "kubepods-burstable-pod1_2.slice",
                Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
            ),
            ("/kubepods/pod1", None),
            ("b.slice/a-b.slice", None),
            ("a--b.slice", None),
            ("-.slice", None),
            ("../a.slice", None),
            (".slice", None),
            ("", None),
        ] {
            let found = slice(name).ok();
            assert_eq!(found.as_ref().map(CgroupPath::as_str), path, "{name}");
        }
    }

    #[test]
    fn a_pod_is_below_its_scope() {
        let sandbox = SandboxId::random();
        let slice = slice("kube-x.slice").expect("a slice");
        let path = pod(&slice, &sandbox).expect("a path");
        let wanted = format!("kube.slice/kube-x.slice/longshore-{sandbox}.scope/{sandbox}");
        assert_eq!(path.as_str(), wanted);
        let scope = path.parent().expect("a parent");
        assert_eq!(scope.name(), super::scope(&sandbox));
        assert_eq!(scope.parent(), Some(slice));
    }
}
