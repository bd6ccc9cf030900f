//! `longshored check`: configuration and host, each finding explained. Changes nothing.

use std::{fmt, fs, path::Path, sync::Arc};

use crate::{
    cgroup::{CgroupFinding, Cgroups},
    config::Config,
    handler::{HandlerError, NativeHandler},
    id::InstanceId,
    network::{self, Networks},
    rootfs::{IdMapsMissing, can_map_layers},
    store::{Store, Tables},
};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The agent can't do its work.
    Error,
    /// Something works less well or not at all.
    Warning,
    /// Good to know.
    Info,
}

/// One thing that an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about, as `kernel` or `cgroup`.
    pub subject: String,
    /// What is so, and what follows from it.
    pub explanation: String,
    /// What to do; empty if nothing need be done.
    pub remedy: String,
}

impl Finding {
    fn new(
        severity: Severity,
        subject: &str,
        explanation: impl Into<String>,
        remedy: &str,
    ) -> Self {
        Self {
            severity,
            subject: subject.to_owned(),
            explanation: explanation.into(),
            remedy: remedy.to_owned(),
        }
    }

    /// The agent can't do its work.
    pub fn is_fatal(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Info => "ok",
        };
        write!(f, "{word:8}{}: {}", self.subject, self.explanation)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

/// Oldest kernel that has every call which has no fallback: `mount_setattr`, `cgroup.kill`.
const KERNEL_FLOOR: (u32, u32) = (5, 15);

/// Looks at configuration and host; worst findings first.
pub async fn run(config: &Config) -> Vec<Finding> {
    let mut findings = crate::blocking::run("check host", {
        let config = config.clone();
        move || {
            let mut findings = vec![kernel()];
            findings.extend(filesystems());
            findings.extend(namespaces());
            findings.extend(seccomp());
            findings.extend(user_namespaces(&config.data_dir));
            findings.extend(cgroups(&config));
            findings
        }
    })
    .await;
    findings.extend(networks(config).await);
    findings.sort_by_key(|finding| finding.severity);
    findings
}

fn kernel() -> Finding {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    match version(&release) {
        Some(version) if version >= KERNEL_FLOOR => {
            Finding::new(Severity::Info, "kernel", format!("Linux {release}"), "")
        }
        Some(_) => Finding::new(
            Severity::Error,
            "kernel",
            format!(
                "Linux {release} is older than {}.{}",
                KERNEL_FLOOR.0, KERNEL_FLOOR.1
            ),
            "boot a newer kernel",
        ),
        None => Finding::new(
            Severity::Warning,
            "kernel",
            format!("release {release:?} can't be understood"),
            "",
        ),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn filesystems() -> Vec<Finding> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing = |name: &str| {
        !known
            .lines()
            .any(|line| line.split_whitespace().last() == Some(name))
    };
    ["overlay", "tmpfs", "proc", "sysfs", "mqueue", "devpts"]
        .into_iter()
        .filter(|name| *name != "devpts" && missing(name))
        .map(|name| {
            Finding::new(
                Severity::Error,
                "file systems",
                format!("the kernel does not offer {name} now"),
                if name == "overlay" {
                    "modprobe overlay"
                } else {
                    "build it into the kernel"
                },
            )
        })
        .collect()
}

fn namespaces() -> Vec<Finding> {
    ["mnt", "pid", "net", "uts", "ipc", "cgroup"]
        .into_iter()
        .filter(|kind| !Path::new("/proc/self/ns").join(kind).exists())
        .map(|kind| {
            Finding::new(
                Severity::Error,
                "namespaces",
                format!("the kernel has no {kind} namespaces"),
                "build them into the kernel",
            )
        })
        .collect()
}

fn user_namespaces(data_dir: &Path) -> Option<Finding> {
    // Before the first start the directory is not there, but its file system is.
    let place = data_dir.ancestors().find(|place| place.exists())?;
    let missing = can_map_layers(place).err()?;
    Some(Finding::new(
        Severity::Warning,
        "user namespaces",
        format!("sandboxes can't have any: {}", chain(&missing)),
        match missing {
            IdMapsMissing::Handler => "use the handler \"native\"",
            IdMapsMissing::Namespaces { .. } => "raise sysctl user.max_user_namespaces",
            IdMapsMissing::Kernel { .. } => "boot a newer kernel",
            IdMapsMissing::FileSystem { .. } => "put data_dir on ext4, xfs or btrfs",
        },
    ))
}

fn seccomp() -> Option<Finding> {
    (!Path::new("/proc/sys/kernel/seccomp/actions_avail").exists()).then(|| {
        Finding::new(
            Severity::Warning,
            "seccomp",
            "the kernel filters no system calls: only unconfined containers can be made",
            "build CONFIG_SECCOMP_FILTER into the kernel",
        )
    })
}

/// Also tries the shim, which is loaded for an engine that has cgroups. The cgroup that is made
/// for this is removed again.
fn cgroups(config: &Config) -> Vec<Finding> {
    let cgroups = match Cgroups::new(&InstanceId::random(), &config.cgroup) {
        Ok(cgroups) => Arc::new(cgroups),
        Err(error) => return vec![Finding::new(Severity::Error, "cgroup", chain(&error), "")],
    };
    let mut findings = vec![Finding::new(
        Severity::Info,
        "cgroup",
        format!(
            "{:?} with {}",
            cgroups.version(),
            cgroups.controllers().join(", ")
        ),
        "",
    )];
    findings.extend(cgroups.findings().iter().map(cgroup_finding));
    match NativeHandler::new(&config.handler, &config.handlers, Arc::clone(&cgroups)) {
        Ok(handler) => findings.push(Finding::new(
            Severity::Info,
            "handlers",
            handler.known().join(", "),
            "",
        )),
        Err(error @ (HandlerError::RuntimeMissing { .. } | HandlerError::BadName { .. })) => {
            let remedy = "install it, or correct the [handlers] of longshored.toml";
            findings.push(Finding::new(
                Severity::Error,
                "handlers",
                chain(&error),
                remedy,
            ));
        }
        Err(error) => {
            let remedy = "install longshore-shim beside longshored, or set handler.shim";
            findings.push(Finding::new(Severity::Error, "shim", chain(&error), remedy));
        }
    }
    if let Err(error) = cgroups.leave() {
        findings.push(Finding::new(
            Severity::Warning,
            "cgroup",
            chain(&error),
            "remove it by hand",
        ));
    }
    findings
}

fn cgroup_finding(finding: &CgroupFinding) -> Finding {
    match finding {
        CgroupFinding::NoSwapAccounting => Finding::new(
            Severity::Warning,
            "cgroup",
            "swap is not accounted for: swap limits are dropped",
            "boot with swapaccount=1",
        ),
        CgroupFinding::NoController(name) => Finding::new(
            Severity::Warning,
            "cgroup",
            format!("controller {name} is missing: its limits are refused"),
            "mount or enable it",
        ),
        CgroupFinding::NoDeviceFilter => Finding::new(
            Severity::Warning,
            "cgroup",
            "devices of containers are not restricted",
            "mount the devices controller",
        ),
    }
}

/// The network chapter decides on a state: without a running agent's, on an empty one.
async fn networks(config: &Config) -> Vec<Finding> {
    let opened = Store::in_memory(
        Tables::new()
            .with::<network::Network>()
            .with::<network::cni::Cached>(),
    );
    let store = match opened {
        Ok(store) => store,
        Err(error) => {
            return vec![Finding::new(
                Severity::Warning,
                "network",
                chain(&error),
                "",
            )];
        }
    };
    let networks = Networks::new(InstanceId::random(), config.network.clone(), store);
    match networks.check().await {
        Ok(findings) => findings
            .into_iter()
            .map(|finding| {
                let severity = match finding.severity() {
                    network::Severity::Note => Severity::Info,
                    network::Severity::Warning => Severity::Warning,
                    network::Severity::Error => Severity::Error,
                };
                Finding::new(severity, "network", finding.explanation(), "")
            })
            .collect(),
        Err(error) => vec![Finding::new(Severity::Error, "network", chain(&error), "")],
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_understood() {
        for (release, expected) in [
            ("6.1.0-18-amd64", Some((6, 1))),
            ("5.15.0", Some((5, 15))),
            ("6.12+", Some((6, 12))),
            ("linux", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }

    #[tokio::test]
    async fn this_host_can_run_the_tests_and_each_finding_is_explained() {
        let findings = run(&Config::default()).await;
        assert!(findings.iter().any(|finding| finding.subject == "kernel"));
        assert!(
            findings
                .iter()
                .all(|finding| !finding.explanation.is_empty())
        );
    }
}
