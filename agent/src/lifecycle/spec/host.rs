//! What a specification needs to know of the host. All I/O of this chapter part is here, and all
//! of it before the pure part.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, Metadata},
    io,
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use longshore_sys::{caps, user::can_map_ids};

use super::{
    super::{
        container::{AppArmorWish, ContainerConfig, MountSource, Propagation, SeccompWish},
        files,
        sandbox::SandboxConfig,
    },
    SpecError,
    cdi::CdiEdits,
    mountinfo::MountInfo,
};

/// What the host has, as far as one container needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Name of the host.
    pub hostname: String,
    /// Sources of bind mounts, by the path that was asked for.
    pub sources: BTreeMap<PathBuf, SourceFacts>,
    /// Directories of layers, topmost first, that a mount of an image is made of, by the target of
    /// the mount.
    pub images: BTreeMap<PathBuf, Vec<PathBuf>>,
    /// Directories of the container's own that hold the volumes its image asks for, by target.
    pub volumes: BTreeMap<PathBuf, PathBuf>,
    /// What the devices of the Container Device Interface ask for.
    pub cdi: CdiEdits,
    /// Devices by the path that was asked for: one node, or those below a directory.
    pub devices: BTreeMap<PathBuf, Vec<DeviceNode>>,
    /// All device nodes of the host, for a privileged container.
    pub all_devices: Vec<DeviceNode>,
    /// Highest capability of the kernel.
    pub last_capability: u32,
    /// Options of the host's cgroup2 mount that a further mount must repeat, for a privileged
    /// container: without a cgroup namespace it would reset them for the whole host.
    pub cgroup2_options: Vec<String>,
    /// The kernel has `mount_setattr(2)`.
    pub recursive_readonly: bool,
    /// The kernel has seccomp.
    pub seccomp: bool,
    /// The seccomp profile that the container names by path.
    pub seccomp_profile: Vec<u8>,
    /// Loaded AppArmor profiles; none if it is not enabled.
    pub apparmor: Option<Vec<String>>,
    /// SELinux is enabled.
    pub selinux: bool,
}

/// The source of a bind mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFacts {
    /// Its path with all links resolved.
    pub path: PathBuf,
    /// Mounts made below it on the host are passed on to copies of its mount, and back.
    pub shared: bool,
    /// Mounts reach it from another one.
    pub slave: bool,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// Below the path asked for; empty for that itself.
    pub below: PathBuf,
    /// A block device, else a character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Looks at the host for what `config` names; makes missing sources of mounts where that is asked.
/// Blocking.
///
/// # Errors
/// `MountSource`, `Device`, `SeccompProfile` for what is not there; `IdMappedMount` for what can't
/// be mapped.
pub fn gather(
    config: &ContainerConfig,
    sandbox: &SandboxConfig,
    sandbox_dir: &Path,
) -> Result<HostFacts, SpecError> {
    // Nothing of a wish that is refused anyway may be made.
    super::check_privileged(config, sandbox)?;
    let privileged = config.security.privileged;
    let spreads = config
        .mounts
        .iter()
        .any(|mount| mount.propagation != Propagation::Private);
    let mounts = if spreads || privileged {
        MountInfo::read()
    } else {
        MountInfo::default()
    };
    let mut facts = HostFacts {
        hostname: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        last_capability: caps::last(),
        recursive_readonly: has_mount_setattr(),
        seccomp: has_seccomp(),
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        ..HostFacts::default()
    };
    if !privileged {
        facts.apparmor = apparmor(&config.security.apparmor);
        if let SeccompWish::Localhost(path) = &config.security.seccomp {
            facts.seccomp_profile = seccomp_profile(path)?;
        }
    }
    for device in &config.devices {
        let nodes = devices(&device.host_path)?;
        facts.devices.insert(device.host_path.clone(), nodes);
    }
    if privileged {
        facts.all_devices = devices(Path::new("/dev"))?;
        facts.cgroup2_options = mounts.cgroup2_options();
    }
    // Last, because it may make directories.
    for mount in &config.mounts {
        if let MountSource::Bind {
            path,
            create,
            recursive,
        } = &mount.source
        {
            let source =
                source(path, *create, &mounts).map_err(|source| SpecError::MountSource {
                    path: path.clone(),
                    source,
                })?;
            if mount.id_map.is_some() && mount.id_map == sandbox.id_map {
                check_id_map(
                    &source.path,
                    *recursive,
                    &files::namespace(sandbox_dir, "user"),
                )?;
            }
            facts.sources.insert(path.clone(), source);
        }
    }
    Ok(facts)
}

fn source(path: &Path, create: bool, mounts: &MountInfo) -> io::Result<SourceFacts> {
    let wrong = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    if !path.is_absolute() {
        return Err(wrong("it must be an absolute path"));
    }
    let found = match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && create => {
            // Mode as other CRI runtimes make it: old pods rely on it.
            DirBuilder::new().recursive(true).mode(0o755).create(path)?;
            fs::canonicalize(path)?
        }
        found => found?,
    };
    if found.to_str().is_none() {
        return Err(wrong("it leads to a path that is not UTF-8"));
    }
    let (shared, slave) = mounts.propagation_at(&found);
    Ok(SourceFacts {
        path: found,
        shared,
        slave,
    })
}

/// Looks whether a mount and those below it can be id-mapped, by doing it out of sight.
fn check_id_map(path: &Path, recursive: bool, user_ns: &Path) -> Result<(), SpecError> {
    let open = |source| SpecError::MountSource {
        path: user_ns.to_owned(),
        source,
    };
    let user_ns = fs::File::open(user_ns).map_err(open)?;
    let Err(error) = can_map_ids(path, recursive, &user_ns) else {
        return Ok(());
    };
    let mounts = MountInfo::read();
    // Which of several it was the kernel does not say.
    let culprit = mounts
        .points_below(path)
        .find(|point| can_map_ids(point, false, &user_ns).is_err())
        .unwrap_or(path);
    Err(SpecError::IdMappedMount {
        path: culprit.to_owned(),
        file_system: mounts.file_system_at(culprit).to_owned(),
        source: error,
    })
}

/// What below `/dev` belongs to the host's own mounts and terminals; containers have their own.
const OWN_OF_EACH: [&str; 9] = [
    "pts",
    "shm",
    "fd",
    "mqueue",
    ".lxc",
    ".lxd-mounts",
    ".udev",
    "console",
    "ptmx",
];
/// Deepest directory of devices that is looked into.
const DEVICE_DEPTH: usize = 16;
/// Most nodes of one directory tree.
const DEVICE_NODES: usize = 16_384;

/// The device node at `path`, links followed.
pub(super) fn device_node(path: &Path) -> io::Result<DeviceNode> {
    node(Path::new(""), &fs::metadata(path)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it is not a device"))
}

fn devices(path: &Path) -> Result<Vec<DeviceNode>, SpecError> {
    let failed = |source| SpecError::Device {
        path: path.to_owned(),
        source,
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    let mut nodes = Vec::new();
    if metadata.is_dir() {
        walk(path, Path::new(""), 0, &mut nodes).map_err(failed)?;
    } else {
        let node = node(Path::new(""), &metadata).ok_or_else(|| {
            failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a device nor a directory of devices",
            ))
        })?;
        nodes.push(node);
    }
    Ok(nodes)
}

fn walk(dir: &Path, below: &Path, depth: usize, nodes: &mut Vec<DeviceNode>) -> io::Result<()> {
    if depth > DEVICE_DEPTH || nodes.len() > DEVICE_NODES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the directory has too much in it",
        ));
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if OWN_OF_EACH.iter().any(|own| name == *own) || name.to_str().is_none() {
            continue;
        }
        // Devices come and go while we look; links are not followed.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let below = below.join(&name);
        if metadata.is_dir() {
            walk(&entry.path(), &below, depth + 1, nodes)?;
        } else {
            nodes.extend(node(&below, &metadata));
        }
    }
    Ok(())
}

fn node(below: &Path, metadata: &Metadata) -> Option<DeviceNode> {
    let kind = metadata.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return None;
    }
    Some(DeviceNode {
        below: below.to_owned(),
        block: kind.is_block_device(),
        major: rustix::fs::major(metadata.rdev()),
        minor: rustix::fs::minor(metadata.rdev()),
        mode: metadata.permissions().mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

/// Longest profile that is read.
const PROFILE_BYTES: u64 = 4 << 20;

fn seccomp_profile(path: &Path) -> Result<Vec<u8>, SpecError> {
    let failed = |source: io::Error| SpecError::SeccompProfile {
        profile: path.display().to_string(),
        source: source.into(),
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() || metadata.len() > PROFILE_BYTES {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file of at most 4 MiB",
        )));
    }
    fs::read(path).map_err(failed)
}

/// `mount_setattr(2)` came with Linux 5.12.
fn has_mount_setattr() -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (5, 12)
}

/// Source: proc_pid_status(5); the line is there if the kernel was built with seccomp.
fn has_seccomp() -> bool {
    fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| status.lines().any(|line| line.starts_with("Seccomp:")))
}

/// Source: apparmor(7).
fn apparmor(wish: &AppArmorWish) -> Option<Vec<String>> {
    if *wish == AppArmorWish::Unconfined {
        return None;
    }
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled").ok()?;
    if !enabled.starts_with('Y') {
        return None;
    }
    let loaded = fs::read_to_string("/sys/kernel/security/apparmor/profiles").ok()?;
    Some(profiles(&loaded))
}

/// Each line is a name and a mode in parentheses; names may have spaces.
fn profiles(loaded: &str) -> Vec<String> {
    loaded
        .lines()
        .filter_map(|line| Some(line.rsplit_once(" (")?.0.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::{
        super::testing::{config, sandbox},
        *,
    };
    use crate::lifecycle::container::{DeviceWish, MountWish, Security};

    fn bind(path: &Path, create: bool) -> MountWish {
        MountWish {
            target: "/t".into(),
            source: MountSource::Bind {
                path: path.to_owned(),
                create,
                recursive: true,
            },
            readonly: false,
            recursive_readonly: false,
            propagation: Propagation::Private,
            options: vec![],
            selinux_relabel: false,
            id_map: None,
        }
    }

    fn source_of(path: &Path, create: bool) -> Result<PathBuf, SpecError> {
        let mut config = config();
        config.mounts = vec![bind(path, create)];
        let mut facts = gather(&config, &sandbox(), Path::new("/nowhere"))?;
        Ok(facts.sources.remove(path).expect("was gathered").path)
    }

    #[test]
    fn sources_are_resolved_and_made_as_directories_if_asked() {
        let dir = tempfile::tempdir().expect("a directory");
        let base = fs::canonicalize(dir.path()).expect("exists");
        fs::create_dir(base.join("real")).expect("makes");
        fs::write(base.join("real/file"), "").expect("writes");
        symlink("real", base.join("link")).expect("links");
        symlink("nowhere", base.join("dangling")).expect("links");

        for (path, create, expected) in [
            ("real", false, Some("real")),
            ("link", false, Some("real")),
            ("link/file", false, Some("real/file")),
            ("new/deep", false, None),
            ("link/new/deep", true, Some("real/new/deep")),
            ("dangling", true, None),
            ("real/file/x", true, None),
        ] {
            let found = source_of(&base.join(path), create).ok();
            assert_eq!(found, expected.map(|path| base.join(path)), "{path}");
        }
        let mode = fs::metadata(base.join("real/new/deep"))
            .expect("made")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7022, 0);
        assert!(matches!(
            source_of(Path::new("relative"), true),
            Err(SpecError::MountSource { .. })
        ));
        assert!(!Path::new("relative").exists());
    }

    #[test]
    fn devices_are_found_by_node_by_link_and_by_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        symlink("/dev/null", dir.path().join("link")).expect("links");
        let facts = |path: &Path| {
            let mut config = config();
            config.devices = vec![DeviceWish {
                host_path: path.to_owned(),
                container_path: "/dev/x".into(),
                permissions: "rwm".to_owned(),
            }];
            gather(&config, &sandbox(), Path::new("/nowhere"))
                .map(|mut facts| facts.devices.remove(path).expect("was gathered"))
        };
        for path in [Path::new("/dev/null"), &dir.path().join("link")] {
            let nodes = facts(path).expect("a device");
            assert_eq!(nodes.len(), 1);
            let null = &nodes[0];
            assert_eq!((null.block, null.major, null.minor), (false, 1, 3));
            assert_eq!(null.below, Path::new(""));
        }
        let all = facts(Path::new("/dev")).expect("a directory");
        assert!(all.iter().any(|node| node.below == Path::new("zero")));
        assert!(!all.iter().any(|node| node.below.starts_with("pts")));
        assert_eq!(facts(dir.path()).expect("links are not followed"), []);
        for wrong in ["/dev/there-is-no-such-device", "/proc/version"] {
            assert!(
                matches!(facts(Path::new(wrong)), Err(SpecError::Device { .. })),
                "{wrong}"
            );
        }
    }

    #[test]
    fn nothing_is_made_for_a_wish_that_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = config();
        config.security = Security {
            privileged: true,
            ..Security::default()
        };
        config.mounts = vec![bind(&dir.path().join("new"), true)];
        assert!(matches!(
            gather(&config, &sandbox(), Path::new("/nowhere")),
            Err(SpecError::PrivilegedInUnprivilegedSandbox)
        ));
        assert!(!dir.path().join("new").exists());
    }

    #[test]
    fn a_seccomp_profile_is_a_regular_file() {
        let mut config = config();
        for path in ["/there/is/none", "/proc", "/dev/zero"] {
            config.security.seccomp = SeccompWish::Localhost(path.into());
            let error = gather(&config, &sandbox(), Path::new("/nowhere")).expect_err(path);
            assert!(matches!(error, SpecError::SeccompProfile { .. }));
        }
    }

    #[test]
    fn loaded_profiles_are_read_by_line() {
        assert_eq!(
            profiles("/usr/bin/man (enforce)\nmy profile (one) (complain)\nnoise\n"),
            ["/usr/bin/man", "my profile (one)"]
        );
    }
}
