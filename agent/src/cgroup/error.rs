//! What can go wrong with cgroups.

use std::{io, path::Path, path::PathBuf};

/// A cgroup could not be made, limited, read, emptied or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup file system is mounted: the host needs one.
    #[error("no cgroup file system is mounted")]
    NoHierarchy,
    /// A system's init has nowhere to follow its processes.
    #[error(
        "no cgroup hierarchy lets an init follow its processes: mount cgroup2, or version 1 with \
         `-o none,name=systemd`"
    )]
    NoTracking,
    /// A path, mostly a `cgroup_parent`, that is not a plain path below the hierarchy root.
    #[error("cgroup path {path:?}: {reason}")]
    BadPath {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The systemd driver on a host without systemd.
    #[error(
        "cgroup.driver = \"systemd\" needs systemd as process 1, which this host has not \
         (no /run/systemd/system); \"cgroupfs\" works on any host"
    )]
    NoSystemd,
    /// systemd refused to start a pod's scope or to stop our slice, or is not to be reached.
    #[error("systemd refuses {unit}")]
    Systemd {
        /// The unit.
        unit: String,
        /// What the bus says.
        source: Box<zbus::Error>,
    },
    /// systemd took the order for a pod's scope and did not carry it out.
    #[error("systemd has not placed the supervisor in {unit} after {waited_ms} ms")]
    NoScope {
        /// The scope.
        unit: String,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The cgroup is not there, or not any more.
    #[error("cgroup {path} does not exist")]
    Absent {
        /// Its directory.
        path: PathBuf,
    },
    /// The kernel refused to make, list or remove a cgroup or to read one of its files.
    #[error("{call} {path}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused a value.
    #[error("write {value:?} to {file}")]
    Refused {
        /// The file.
        file: PathBuf,
        /// The value.
        value: String,
        /// Why not.
        source: io::Error,
    },
    /// A limit was asked for whose controller this host does not have.
    #[error("this host has no cgroup controller {controller:?}, which {field} needs")]
    ControllerMissing {
        /// The controller.
        controller: &'static str,
        /// The field of the OCI resources.
        field: &'static str,
    },
    /// An OCI runtime would move what it starts out of the cgroup that names it: the freezer cannot
    /// be hidden from it without hiding other controllers.
    #[error(
        "the freezer is mounted together with other controllers ({controllers}), which OCI runtimes need"
    )]
    SharedFreezer {
        /// All of that hierarchy.
        controllers: String,
    },
    /// A memory limit below what is in use already.
    #[error("memory limit {limit} is below the current usage {usage}")]
    BelowUsage {
        /// Bytes asked for.
        limit: i64,
        /// Bytes in use.
        usage: u64,
    },
    /// A resource value that cannot be meant.
    #[error("{field} {reason}")]
    BadResource {
        /// The field of the OCI resources.
        field: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Processes that SIGKILL did not end in time: stuck in the kernel.
    #[error("cgroup {path} still has processes {pids:?} after {waited_ms} ms of killing")]
    StillBusy {
        /// The cgroup.
        path: PathBuf,
        /// Who is there.
        pids: Vec<i32>,
        /// How long it was tried.
        waited_ms: u64,
    },
    /// A file of the kernel that does not look as it should.
    #[error("{file} holds {content:?}")]
    Malformed {
        /// The file.
        file: PathBuf,
        /// Its content, cut.
        content: String,
    },
}

impl CgroupError {
    pub(super) fn call(call: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::Absent {
                path: path.to_owned(),
            },
            _ => Self::Call {
                call,
                path: path.to_owned(),
                source,
            },
        }
    }

    pub(super) fn refused(file: &Path, value: &str, source: io::Error) -> Self {
        Self::Refused {
            file: file.to_owned(),
            value: value.to_owned(),
            source,
        }
    }

    pub(super) fn malformed(file: &Path, content: &str) -> Self {
        Self::Malformed {
            file: file.to_owned(),
            content: content.chars().take(100).collect(),
        }
    }

    /// The error number of the kernel, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { source, .. } | Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
