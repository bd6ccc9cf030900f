//! Mounts of a container: sources opened on the host, targets resolved inside the root.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use longshore_sys::mount::{self, Attributes, Flags, Overlay};
use longshore_sys::path::{self, Missing};
use rustix::fs::{CWD, FileType};

use super::{Step, at, resolve, root, user};
use crate::wire::{ContainerPlan, Mount, NamespaceFrom, NamespaceKind, Propagation, Rootfs};

fn is_bind(mount: &Mount) -> bool {
    mount.fs_type.is_empty()
}

/// Whether `/dev` is the caller's own, with nodes that are not ours to make.
pub(super) fn brings_own_dev(mounts: &[Mount]) -> bool {
    mounts
        .iter()
        .any(|mount| is_bind(mount) && mount.target.trim_end_matches('/') == "/dev")
}

/// Clones the sources of all bind mounts as detached trees, with their final attributes.
pub(super) fn open_sources(
    mounts: &[Mount],
    user_ns: Option<BorrowedFd<'_>>,
) -> Step<Vec<Option<OwnedFd>>> {
    let open = |mount: &Mount| {
        let tree = at(open_source(mount), || format!("open {}", mount.source))?;
        if mount.id_mapped {
            let user_ns = user::needed(user_ns)?;
            at(mount::map_ids(&tree, mount.recursive, user_ns), || {
                format!("id-map {}", mount.source)
            })?;
        }
        Ok(tree)
    };
    mounts
        .iter()
        .map(|mount| is_bind(mount).then(|| open(mount)).transpose())
        .collect()
}

fn open_source(mount: &Mount) -> io::Result<OwnedFd> {
    let tree = mount::clone_tree(CWD, &mount.source, mount.recursive)?;
    let own = Attributes {
        propagation: propagation_bits(mount.propagation()),
        ..Attributes::default()
    };
    mount::set_attributes(&tree, true, own)?;
    let wanted = mount::attributes_of(mount.flags);
    if wanted.set | wanted.clear != 0 {
        mount::set_attributes(&tree, false, wanted)?;
    }
    if mount.recursive_readonly {
        let readonly = Attributes {
            set: libc::MOUNT_ATTR_RDONLY,
            ..Attributes::default()
        };
        mount::set_attributes(&tree, true, readonly)?;
    }
    Ok(tree)
}

/// Mounts the overlays among them as detached trees, with their final attributes: their layers can
/// be reached with the host's rights only. In a mount namespace of this process's own.
pub(super) fn open_overlays(
    mounts: &[Mount],
    rootfs: &Rootfs,
    sources: &mut [Option<OwnedFd>],
) -> Step<()> {
    for (mount, source) in mounts.iter().zip(sources) {
        if mount.fs_type == "overlay"
            && let Some(lower) = lower_dirs(&mount.data)
        {
            let tree = open_overlay(mount, &lower, Path::new(&rootfs.mount_point));
            *source = Some(at(tree, || format!("mount {}", mount.target))?);
        }
    }
    Ok(())
}

/// A read-only overlay of any number of directories, as an image mounted as a volume is: their whole
/// names could be more than the one page that mount(2) takes.
fn open_overlay(mount: &Mount, lower: &[PathBuf], point: &Path) -> io::Result<OwnedFd> {
    let parent = lower
        .first()
        .and_then(|first| {
            first
                .ancestors()
                .skip(1)
                .find(|parent| lower.iter().all(|dir| dir.starts_with(parent)))
        })
        .unwrap_or(Path::new("/"));
    let names: Vec<String> = lower
        .iter()
        .filter_map(|dir| Some(dir.strip_prefix(parent).ok()?.to_str()?.to_owned()))
        .collect();
    let overlay = Overlay {
        layers_dir: parent,
        lower: &names,
        writable: None,
        volatile: false,
    };
    let tree = root::mount_overlay(&overlay, point)?;
    let own = Attributes {
        propagation: propagation_bits(mount.propagation()),
        ..mount::attributes_of(mount.flags)
    };
    mount::set_attributes(&tree, false, own)?;
    Ok(tree)
}

fn propagation_bits(propagation: Propagation) -> u64 {
    match propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    }
}

/// Mounts everything, in order.
pub(super) fn mount_all(
    plan: &ContainerPlan,
    root: &OwnedFd,
    sources: Vec<Option<OwnedFd>>,
) -> Step<()> {
    for (mount, source) in plan.mounts.iter().zip(sources) {
        let done = match (source, mount.fs_type.as_str()) {
            (Some(tree), _) => attach(&tree, root, &mount.target),
            (None, "cgroup") => mount_cgroups(plan, mount, root),
            (None, _) => mount_new(mount, root),
        };
        at(done, || format!("mount {}", mount.target))?;
    }
    Ok(())
}

fn attach(tree: &OwnedFd, root: &OwnedFd, target: &str) -> io::Result<()> {
    let missing = match FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode) {
        FileType::Directory => Missing::MakeDir(0o755),
        _ => Missing::MakeFile(0o644),
    };
    mount::attach(tree, resolve(root, target, missing)?)
}

fn mount_new(mount: &Mount, root: &OwnedFd) -> io::Result<()> {
    let target = path::make_dir_in_root(root, &mount.target, 0o755)?;
    mount_on(
        &target,
        &mount.source,
        &mount.fs_type,
        mount.flags,
        &mount.data,
    )?;
    if mount.propagation() != Propagation::Private {
        let own = Attributes {
            propagation: propagation_bits(mount.propagation()),
            ..Attributes::default()
        };
        mount::set_attributes(resolve(root, &mount.target, Missing::Refuse)?, false, own)?;
    }
    Ok(())
}

/// The directories of an overlay that has lower ones only; `None` if it has other options too.
///
/// Source: kernel, overlayfs.rst: colons within a name are escaped by a backslash.
fn lower_dirs(data: &str) -> Option<Vec<PathBuf>> {
    let mut dirs = vec![String::new()];
    let mut letters = data.strip_prefix("lowerdir=")?.chars();
    while let Some(letter) = letters.next() {
        let letter = match letter {
            ',' => return None,
            ':' => {
                dirs.push(String::new());
                continue;
            }
            '\\' => letters.next()?,
            letter => letter,
        };
        dirs.last_mut()?.push(letter);
    }
    dirs.iter()
        .all(|dir| dir.starts_with('/'))
        .then(|| dirs.into_iter().map(PathBuf::from).collect())
}

/// mount(2) with a descriptor as target: the host's `/proc` is still the one in sight, and
/// `/proc/self/fd` leads to exactly what was resolved.
fn mount_on(
    target: &OwnedFd,
    source: &str,
    fs_type: &str,
    flags: u64,
    data: &str,
) -> io::Result<()> {
    let flags =
        Flags::from_bits_retain(u32::try_from(flags).map_err(|_| rustix::io::Errno::INVAL)?);
    mount::mount(source, path::fd_path(target), fs_type, flags, data)
}

/// A cgroup hierarchy that the host has mounted.
struct Hierarchy {
    mount_point: String,
    /// Empty for version 2, else the options that name it: `cpu,cpuacct`, `none,name=systemd`.
    options: String,
}

/// The OCI mount type `cgroup`: version 2's single tree, or a directory with one mount for each
/// hierarchy, as the host shows them.
fn mount_cgroups(plan: &ContainerPlan, mount: &Mount, root: &OwnedFd) -> io::Result<()> {
    let hierarchies = hierarchies()?;
    let own_namespace = plan.namespaces.iter().any(|ns| {
        ns.kind() == NamespaceKind::Cgroup && matches!(ns.from, Some(NamespaceFrom::New(_)))
    });
    let target = path::make_dir_in_root(root, &mount.target, 0o755)?;
    if hierarchies
        .iter()
        .all(|hierarchy| hierarchy.options.is_empty())
    {
        return mount_on(&target, "cgroup", "cgroup2", mount.flags, "");
    }
    let writable = mount.flags & !libc::MS_RDONLY;
    mount_on(&target, "tmpfs", "tmpfs", writable, "mode=755,size=64k")?;
    let top = resolve(root, &mount.target, Missing::Refuse)?;
    let paths = std::fs::read_to_string("/proc/self/cgroup")?;
    for hierarchy in &hierarchies {
        let Some(name) = hierarchy.mount_point.rsplit('/').next() else {
            continue;
        };
        let place = path::make_dir_in_root(&top, name, 0o755)?;
        if own_namespace {
            let fs_type = if hierarchy.options.is_empty() {
                "cgroup2"
            } else {
                "cgroup"
            };
            mount_on(&place, "cgroup", fs_type, mount.flags, &hierarchy.options)?;
        } else if let Some(own) = own_cgroup(&paths, &hierarchy.options) {
            let tree = mount::clone_tree(CWD, format!("{}{own}", hierarchy.mount_point), false)?;
            mount::set_attributes(
                &tree,
                false,
                Attributes {
                    propagation: libc::MS_PRIVATE,
                    ..mount::attributes_of(mount.flags)
                },
            )?;
            mount::attach(&tree, &place)?;
        }
    }
    let top_flags = Attributes {
        set: mount::attributes_of(mount.flags).set,
        ..Attributes::default()
    };
    mount::set_attributes(&top, false, top_flags)
}

/// Cgroup mounts of the host below `/sys/fs/cgroup`.
fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    Ok(parse_hierarchies(&std::fs::read_to_string(
        "/proc/self/mountinfo",
    )?))
}

/// Source: proc_pid_mountinfo(5).
fn parse_hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    /// Options of the super block that are not the names of controllers.
    const NO_CONTROLLER: [&str; 9] = [
        "rw",
        "ro",
        "xattr",
        "noprefix",
        "clone_children",
        "nsdelegate",
        "release_agent",
        "cpuset_v2_mode",
        "none",
    ];
    mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mount_point = left.split(' ').nth(4)?;
            let mut right = right.split(' ');
            let (fs_type, super_options) = (right.next()?, right.nth(1)?);
            let options = match fs_type {
                "cgroup2" => String::new(),
                "cgroup" => {
                    let named: Vec<&str> = super_options
                        .split(',')
                        .filter(|word| {
                            !NO_CONTROLLER.contains(&word.split('=').next().unwrap_or(""))
                        })
                        .collect();
                    let named = named.join(",");
                    // A named hierarchy without controllers must say so.
                    if named.starts_with("name=") {
                        format!("none,{named}")
                    } else {
                        named
                    }
                }
                _ => return None,
            };
            mount_point
                .starts_with("/sys/fs/cgroup")
                .then(|| Hierarchy {
                    mount_point: mount_point.to_owned(),
                    options,
                })
        })
        .collect()
}

/// Path of this process in a hierarchy. Source: cgroups(7), `/proc/PID/cgroup`.
fn own_cgroup<'a>(paths: &'a str, options: &str) -> Option<&'a str> {
    let wanted = options.strip_prefix("none,").unwrap_or(options);
    paths.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        (controllers == wanted).then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let text = "\
25 22 0:22 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
26 25 0:23 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
27 25 0:24 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
28 25 0:25 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
29 25 0:26 / /mnt/elsewhere rw - cgroup cgroup rw,memory
30 25 0:27 / /proc rw - proc proc rw
";
        let found: Vec<_> = parse_hierarchies(text)
            .into_iter()
            .map(|hierarchy| (hierarchy.mount_point, hierarchy.options))
            .collect();
        let expected = [
            ("/sys/fs/cgroup/unified", ""),
            ("/sys/fs/cgroup/systemd", "none,name=systemd"),
            ("/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct"),
        ];
        assert_eq!(
            found,
            expected.map(|(point, options)| (point.to_owned(), options.to_owned()))
        );
    }

    #[test]
    fn own_path_is_found_by_the_names_of_the_hierarchy() {
        let text = "3:cpu,cpuacct:/a/b\n1:name=systemd:/s\n0::/u\n";
        for (options, expected) in [
            ("cpu,cpuacct", Some("/a/b")),
            ("none,name=systemd", Some("/s")),
            ("", Some("/u")),
            ("memory", None),
        ] {
            assert_eq!(own_cgroup(text, options), expected, "{options}");
        }
    }

    #[test]
    fn layers_of_an_overlay_are_read_from_its_options() {
        for (data, expected) in [
            ("lowerdir=/l/1:/l/2/sub", Some(vec!["/l/1", "/l/2/sub"])),
            (
                "lowerdir=/l/a\\:b\\,c:/l/d\\\\",
                Some(vec!["/l/a:b,c", "/l/d\\"]),
            ),
            ("lowerdir=/l/1,upperdir=/u,workdir=/w", None),
            ("lowerdir=relative:/l/2", None),
            ("upperdir=/u", None),
            ("lowerdir=/l/1\\", None),
        ] {
            let expected = expected.map(|dirs| dirs.into_iter().map(PathBuf::from).collect());
            assert_eq!(lower_dirs(data), expected, "{data}");
        }
    }

    #[test]
    fn only_a_bind_over_dev_brings_its_own_nodes() {
        let mount = |target: &str, fs_type: &str| Mount {
            target: target.into(),
            fs_type: fs_type.into(),
            ..Mount::default()
        };
        assert!(brings_own_dev(&[mount("/dev/", "")]));
        assert!(!brings_own_dev(&[
            mount("/dev", "tmpfs"),
            mount("/dev/shm", "")
        ]));
    }
}
