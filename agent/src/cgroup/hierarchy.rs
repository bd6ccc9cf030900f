//! Which cgroup hierarchies this host has and where they are mounted.

use std::path::{Path, PathBuf};

use super::{CgroupError, CgroupPath, file};

/// The cgroup API that carries the controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// Controllers are mounted as version 1; an empty unified tree may be beside them (hybrid).
    V1,
    /// One unified tree.
    V2,
}

/// All hierarchies of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchies {
    /// Version 1, `cpuset` first: its values must stand before a task joins.
    pub(super) v1: Vec<V1Hierarchy>,
    /// The unified tree.
    pub(super) unified: Option<PathBuf>,
}

/// One mounted version 1 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct V1Hierarchy {
    pub(super) mount: PathBuf,
    /// Controllers that share it; empty for a named one.
    pub(super) controllers: Vec<String>,
}

const V1_CONTROLLERS: &[&str] = &[
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

impl Hierarchies {
    /// Reads what is mounted in the mount namespace of this process.
    pub(super) fn detect() -> Result<Self, CgroupError> {
        Self::parse(&file::read(Path::new("/proc/self/mountinfo"))?)
    }

    /// Parses `/proc/self/mountinfo`; see proc(5).
    pub(super) fn parse(mountinfo: &str) -> Result<Self, CgroupError> {
        let mut v1: Vec<V1Hierarchy> = Vec::new();
        let mut unified: Option<PathBuf> = None;
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let (Some(point), Some(fs_type), Some(options)) = (
                left.split(' ').nth(4),
                right.split(' ').next(),
                right.split(' ').nth(2),
            ) else {
                continue;
            };
            let point = PathBuf::from(unescape(point));
            match fs_type {
                // The same tree may be mounted again elsewhere; any of them will do.
                "cgroup2" => {
                    unified.get_or_insert(point);
                }
                "cgroup" => {
                    let controllers: Vec<String> = options
                        .split(',')
                        .filter(|option| V1_CONTROLLERS.contains(option))
                        .map(str::to_owned)
                        .collect();
                    let named = options.split(',').any(|option| option.starts_with("name="));
                    let known = v1.iter().any(|known| {
                        known.mount == point
                            || (!controllers.is_empty() && known.controllers == controllers)
                    });
                    if (named || !controllers.is_empty()) && !known {
                        v1.push(V1Hierarchy {
                            mount: point,
                            controllers,
                        });
                    }
                }
                _ => {}
            }
        }
        v1.sort_by_key(|hierarchy| !hierarchy.has("cpuset"));
        if v1.is_empty() && unified.is_none() {
            return Err(CgroupError::NoHierarchy);
        }
        Ok(Self { v1, unified })
    }

    pub(super) fn version(&self) -> CgroupVersion {
        let has_controllers = self.v1.iter().any(|one| !one.controllers.is_empty());
        match (has_controllers, &self.unified) {
            (false, Some(_)) => CgroupVersion::V2,
            _ => CgroupVersion::V1,
        }
    }

    /// Directory of `path` in the version 1 hierarchy of `controller`.
    pub(super) fn v1_dir(&self, controller: &str, path: &CgroupPath) -> Option<PathBuf> {
        self.v1
            .iter()
            .find(|one| one.has(controller))
            .map(|one| path.below(&one.mount))
    }

    /// Directory of `path` in the unified tree.
    pub(super) fn unified_dir(&self, path: &CgroupPath) -> Option<PathBuf> {
        self.unified.as_deref().map(|mount| path.below(mount))
    }

    /// Directories of `path` in all hierarchies, the unified one first: emptying it there
    /// mostly empties the others.
    pub(super) fn dirs(&self, path: &CgroupPath) -> impl Iterator<Item = PathBuf> {
        self.mounts().map(move |mount| path.below(mount))
    }

    pub(super) fn mounts(&self) -> impl Iterator<Item = &Path> {
        self.unified
            .iter()
            .map(PathBuf::as_path)
            .chain(self.v1.iter().map(|one| one.mount.as_path()))
    }
}

impl V1Hierarchy {
    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|one| one == controller)
    }
}

/// Undoes the octal escapes of mountinfo.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset,clone_children
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
99 31 0:32 / /mnt/again rw - cgroup cgroup rw,memory
";

    #[test]
    fn hybrid_host_is_version_1_with_cpuset_first_and_no_hierarchy_twice() {
        let found = Hierarchies::parse(HYBRID).expect("hierarchies are there");
        let mounts: Vec<_> = found.v1.iter().map(|one| one.mount.clone()).collect();
        assert_eq!(
            mounts,
            [
                "/sys/fs/cgroup/cpuset",
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/systemd",
            ]
            .map(PathBuf::from)
        );
        assert_eq!(found.unified, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(found.version(), CgroupVersion::V1);
        assert_eq!(
            found.v1_dir("cpuacct", &CgroupPath("a/b".into())),
            Some("/sys/fs/cgroup/cpu,cpuacct/a/b".into())
        );
        assert_eq!(found.v1_dir("pids", &CgroupPath("a".into())), None);
    }

    #[test]
    fn version_follows_where_the_controllers_are() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let named = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
        let memory = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        for (mountinfo, version) in [
            (v2.to_owned(), CgroupVersion::V2),
            (format!("{v2}{named}"), CgroupVersion::V2),
            (memory.to_owned(), CgroupVersion::V1),
            (format!("{v2}{memory}"), CgroupVersion::V1),
        ] {
            let found = Hierarchies::parse(&mountinfo).expect("a hierarchy is there");
            assert_eq!(found.version(), version, "{mountinfo}");
        }
        assert!(matches!(
            Hierarchies::parse("22 27 0:21 / /proc rw - proc proc rw\n"),
            Err(CgroupError::NoHierarchy)
        ));
    }

    #[test]
    fn mount_points_with_spaces_are_read() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/mnt/a\"), r"/mnt/a\");
    }
}
