//! What is mounted in a container: the usual ones, the sandbox's files, and what is wished.
//!
//! A wish on the place of a usual one replaces it; one on `/dev` replaces all below that too. All
//! are sorted by depth, so that no mount hides one that was asked for below it.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Mount;

use super::{
    super::{
        container::{ContainerConfig, MountSource, MountWish, Propagation},
        sandbox::IdMap,
    },
    HostFacts, SpecError, SpecInput, id_map,
    process::absolute,
};
use crate::{cgroup::CgroupVersion, image::ImageConfig};

const OPTIONS: [&str; 3] = ["noexec", "nosuid", "nodev"];

/// All mounts, in the order in which they are made.
pub(super) fn mounts(input: &SpecInput<'_>) -> Result<Vec<Mount>, SpecError> {
    let wished = input
        .config
        .mounts
        .iter()
        .map(|wish| self::wished(wish, input.sandbox.id_map, input.host))
        .collect::<Result<Vec<_>, _>>()?;
    let is_wished = |path: &Path| wished.iter().any(|wish| wish.destination() == path);
    let own_dev = is_wished(Path::new("/dev"));
    let mut all: Vec<Mount> = usual(input)
        .into_iter()
        .chain(files(input))
        .chain(volumes(input))
        .filter(|usual| {
            let target = usual.destination();
            !(is_wished(target) || own_dev && target.starts_with("/dev"))
        })
        .collect();
    all.extend(wished);
    sort(&mut all);
    Ok(all)
}

/// So that no mount hides one below it; equals stay in order.
pub(super) fn sort(mounts: &mut [Mount]) {
    mounts.sort_by_key(|mount| mount.destination().components().count());
}

/// Where the image asks for volumes, sorted: nowhere where a mount is wished, nor where every
/// container has a mount.
///
/// # Errors
/// `ImageVolumePath` where a directory would hide what confines the container.
pub fn image_volumes(
    image: &ImageConfig,
    config: &ContainerConfig,
) -> Result<Vec<PathBuf>, SpecError> {
    const OF_EACH: [&str; 5] = [
        "/dev/shm",
        "/dev/mqueue",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
    ];
    const OF_THE_KERNEL: [&str; 3] = ["/dev", "/proc", "/sys"];
    let wished = config
        .mounts
        .iter()
        .map(|wish| absolute("mounts.target", &wish.target.to_string_lossy()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut targets = std::collections::BTreeSet::new();
    for path in &image.volumes {
        // Images may name a path as from their root.
        let target = absolute("image.volumes", &format!("/{path}"))?;
        if wished.contains(&target) || OF_EACH.iter().any(|usual| target == Path::new(usual)) {
            continue;
        }
        let is_kernels = OF_THE_KERNEL.iter().any(|top| target.starts_with(top));
        if is_kernels || target == Path::new("/") {
            return Err(SpecError::ImageVolumePath { path: path.clone() });
        }
        targets.insert(target);
    }
    Ok(targets.into_iter().collect())
}

fn volumes(input: &SpecInput<'_>) -> impl Iterator<Item = Mount> {
    let ids = input.sandbox.id_map;
    input.host.volumes.iter().map(move |(target, source)| {
        let volume = mount(target, "bind", source, &["rbind", "rprivate", "rw"]);
        mapped(volume, ids)
    })
}

/// Content of images has the owners that it has in an image. An overlay's are mapped by its layers.
fn mapped(mut mount: Mount, ids: Option<IdMap>) -> Mount {
    if mount.typ().as_deref() == Some("bind") {
        mount
            .set_uid_mappings(ids.map(id_map::uids))
            .set_gid_mappings(ids.map(id_map::gids));
    }
    mount
}

/// How much of the host's mounts the container's root must hear of.
pub(super) fn root_propagation(wished: &[MountWish]) -> Option<String> {
    let has = |propagation| wished.iter().any(|wish| wish.propagation == propagation);
    if has(Propagation::Bidirectional) {
        Some("rshared".to_owned())
    } else if has(Propagation::HostToContainer) {
        Some("rslave".to_owned())
    } else {
        None
    }
}

/// Source: OCI runtime specification, config-linux.md, "Default Filesystems"; values as Docker has
/// them.
fn usual(input: &SpecInput<'_>) -> Vec<Mount> {
    let privileged = input.config.security.privileged;
    let kernel = if privileged { "rw" } else { "ro" };
    let shm = if input.sandbox.host_ipc {
        PathBuf::from("/dev/shm")
    } else {
        input.sandbox_dir.join("shm")
    };
    // Group 5 owns terminals, where there is such a group.
    let mut terminals = vec![
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
    ];
    if input.sandbox.id_map.is_none_or(|ids| ids.length > 5) {
        terminals.push("gid=5");
    }
    let mut cgroup_options = vec!["nosuid", "noexec", "nodev", "relatime", kernel];
    // Version 2 has a cgroup namespace or, without one, must repeat the host's own options; for
    // version 1 the engine shows the container's own directory of each hierarchy.
    let cgroup_type = match input.cgroup_version {
        CgroupVersion::V1 => "cgroup",
        CgroupVersion::V2 => {
            cgroup_options.extend(input.host.cgroup2_options.iter().map(String::as_str));
            "cgroup2"
        }
    };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount("/dev/pts", "devpts", "devpts", &terminals),
        mount(
            "/dev/shm",
            "bind",
            shm,
            &["rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"],
        ),
        // In the host's IPC namespace this is the host's.
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        sys(input, kernel),
    ];
    if shows_sys_of_host(input) && input.cgroup_version == CgroupVersion::V2 {
        // The kernel mounts no file system on itself: mount(2), EBUSY.
        mounts.push(mount("/sys/fs/cgroup", "tmpfs", "tmpfs", &["mode=755"]));
    }
    mounts.push(mount(
        "/sys/fs/cgroup",
        cgroup_type,
        "cgroup",
        &cgroup_options,
    ));
    mounts
}

/// A user namespace without a network namespace of its own may not mount sysfs.
fn shows_sys_of_host(input: &SpecInput<'_>) -> bool {
    input.sandbox.id_map.is_some() && super::is_host_network(input)
}

fn sys(input: &SpecInput<'_>, access: &str) -> Mount {
    let options = ["nosuid", "noexec", "nodev"];
    if shows_sys_of_host(input) {
        let bound = ["rbind", "rprivate", "rro"];
        return mount("/sys", "bind", "/sys", &[&bound[..], &options].concat());
    }
    mount(
        "/sys",
        "sysfs",
        "sysfs",
        &[&options[..], &[access]].concat(),
    )
}

/// The sandbox's files, read-only exactly when the root is.
fn files(input: &SpecInput<'_>) -> impl Iterator<Item = Mount> {
    let access = if input.config.security.readonly_rootfs {
        "ro"
    } else {
        "rw"
    };
    ["hostname", "hosts", "resolv.conf"]
        .into_iter()
        .map(move |name| {
            let target = Path::new("/etc").join(name);
            mount(
                target,
                "bind",
                input.sandbox_dir.join(name),
                &["rbind", "rprivate", access],
            )
        })
}

pub(super) fn wished(
    wish: &MountWish,
    ids: Option<IdMap>,
    host: &HostFacts,
) -> Result<Mount, SpecError> {
    let field = |name: &str| format!("mounts[{}].{name}", wish.target.display());
    let target = match wish.target.to_str() {
        Some(target) => absolute("mounts.target", target)?,
        None => {
            return Err(SpecError::invalid(
                "mounts.target",
                wish.target.display(),
                "UTF-8",
            ));
        }
    };
    if target == Path::new("/") {
        return Err(SpecError::invalid(
            "mounts.target",
            wish.target.display(),
            "a path below /",
        ));
    }
    check_recursive_readonly(wish, host)?;
    let mut options: Vec<&str> = Vec::new();
    for option in &wish.options {
        match OPTIONS.iter().find(|known| *known == option) {
            Some(known) => options.push(known),
            None => {
                return Err(SpecError::invalid(
                    field("options"),
                    option,
                    "noexec, nosuid or nodev",
                ));
            }
        }
    }
    options.push(match (wish.readonly, wish.recursive_readonly) {
        (false, _) => "rw",
        (true, false) => "ro",
        (true, true) => "rro",
    });
    match &wish.source {
        MountSource::Bind {
            path, recursive, ..
        } => {
            let facts = host
                .sources
                .get(path)
                .ok_or_else(|| SpecError::MountSource {
                    path: path.clone(),
                    source: std::io::ErrorKind::NotFound.into(),
                })?;
            let propagation = propagation(wish.propagation, path, facts.shared, facts.slave)?;
            let bind = if *recursive { "rbind" } else { "bind" };
            let mount = mount(
                target,
                "bind",
                &facts.path,
                &[&[bind, propagation], &options[..]].concat(),
            );
            Ok(mapped(mount, wish.id_map))
        }
        MountSource::Image { .. } => {
            propagation(wish.propagation, &wish.target, false, false)?;
            if !wish.readonly {
                return Err(SpecError::invalid(
                    field("readonly"),
                    false,
                    "true, since an image is shared by all that use it",
                ));
            }
            let dirs = host.images.get(&wish.target).map(Vec::as_slice);
            // Nothing is below it: the mount's own flag is all there is.
            options.retain(|option| !["ro", "rro"].contains(option));
            options.push("ro");
            Ok(mapped(
                image(target, dirs.unwrap_or_default(), options)?,
                ids,
            ))
        }
        MountSource::Tmpfs { size_bytes, mode } => {
            // Nothing of the host is in it that could spread.
            propagation(wish.propagation, Path::new("tmpfs"), false, false)?;
            if mode.is_some_and(|mode| mode > 0o7777) {
                return Err(SpecError::invalid(
                    field("mode"),
                    mode.unwrap_or_default(),
                    "permission bits, at most 07777",
                ));
            }
            let size = size_bytes.map(|bytes| format!("size={bytes}"));
            let mode = mode.map(|mode| format!("mode={mode:o}"));
            options.extend(size.as_deref());
            options.extend(mode.as_deref());
            // A new file system has nothing below it: the mount's own flag is all there is.
            options
                .iter_mut()
                .filter(|option| **option == "rro")
                .for_each(|option| *option = "ro");
            Ok(mount(target, "tmpfs", "tmpfs", &options))
        }
    }
}

/// A directory of an image. With one layer it is that layer's own, since an overlay must have two.
///
/// Source: kernel, overlayfs.rst, "Multiple lower layers".
fn image(target: PathBuf, dirs: &[PathBuf], mut options: Vec<&str>) -> Result<Mount, SpecError> {
    match dirs {
        [] => {
            options.push("size=4k");
            Ok(mount(target, "tmpfs", "tmpfs", &options))
        }
        [single] => {
            options.extend(["bind", "rprivate"]);
            Ok(mount(target, "bind", text(single)?, &options))
        }
        many => {
            let mut lower = String::from("lowerdir=");
            for (at, dir) in many.iter().enumerate() {
                if at > 0 {
                    lower.push(':');
                }
                for letter in text(dir)?.chars() {
                    if matches!(letter, '\\' | ',' | ':') {
                        lower.push('\\');
                    }
                    lower.push(letter);
                }
            }
            let options = [&options[..], &[&*lower]].concat();
            Ok(mount(target, "overlay", "overlay", &options))
        }
    }
}

fn text(path: &Path) -> Result<&str, SpecError> {
    path.to_str().ok_or_else(|| {
        let shown = path.as_os_str().as_bytes().escape_ascii();
        SpecError::invalid("mounts.image_sub_path", shown, "a path in UTF-8")
    })
}

fn propagation(
    wish: Propagation,
    path: &Path,
    shared: bool,
    slave: bool,
) -> Result<&'static str, SpecError> {
    let refused = |wanted, needed| SpecError::MountPropagation {
        path: path.to_owned(),
        wanted,
        needed,
    };
    match wish {
        Propagation::Private => Ok("rprivate"),
        Propagation::HostToContainer if shared || slave => Ok("rslave"),
        Propagation::HostToContainer => Err(refused("HOST_TO_CONTAINER", "shared or slave")),
        Propagation::Bidirectional if shared => Ok("rshared"),
        Propagation::Bidirectional => Err(refused("BIDIRECTIONAL", "shared")),
    }
}

fn check_recursive_readonly(wish: &MountWish, host: &HostFacts) -> Result<(), SpecError> {
    if !wish.recursive_readonly {
        return Ok(());
    }
    let reason = if !wish.readonly {
        "must be read-only"
    } else if wish.propagation != Propagation::Private {
        "must have private propagation"
    } else if !host.recursive_readonly {
        "needs Linux 5.12 or newer"
    } else {
        return Ok(());
    };
    Err(SpecError::RecursiveReadonly {
        target: wish.target.clone(),
        reason,
    })
}

pub(super) fn mount(
    target: impl AsRef<Path>,
    kind: &str,
    source: impl AsRef<OsStr>,
    options: &[&str],
) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(target.as_ref().to_owned())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(PathBuf::from(source.as_ref())))
        .set_options(Some(
            options.iter().map(|&option| option.to_owned()).collect(),
        ));
    mount
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            SourceFacts,
            testing::{Wish, built},
        },
        *,
    };

    fn bind(target: &str, path: &str) -> MountWish {
        MountWish {
            target: target.into(),
            source: MountSource::Bind {
                path: path.into(),
                create: false,
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

    fn tmpfs(target: &str, size_bytes: Option<u64>, mode: Option<u32>) -> MountWish {
        MountWish {
            source: MountSource::Tmpfs { size_bytes, mode },
            ..bind(target, "")
        }
    }

    fn with(mounts: Vec<MountWish>) -> Wish {
        let mut wish = Wish::new();
        for path in ["/host/a", "/host/b"] {
            let facts = SourceFacts {
                path: format!("/real{path}").into(),
                shared: false,
                slave: false,
            };
            wish.host.sources.insert(path.into(), facts);
        }
        wish.config.mounts = mounts;
        wish
    }

    /// Mounts as `target type source options`.
    fn lines(wish: &Wish) -> Vec<String> {
        let built = built(wish).expect("valid");
        built
            .spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| {
                format!(
                    "{} {} {} {}",
                    mount.destination().display(),
                    mount.typ().as_deref().unwrap_or(""),
                    mount.source().as_deref().unwrap_or(Path::new("")).display(),
                    mount.options().as_deref().unwrap_or_default().join(",")
                )
            })
            .collect()
    }

    fn line(wish: &Wish, target: &str) -> String {
        let mut found: Vec<_> = lines(wish)
            .into_iter()
            .filter(|line| line.split(' ').next() == Some(target))
            .collect();
        assert_eq!(found.len(), 1, "{target}: {found:?}");
        found.remove(0)
    }

    #[test]
    fn usual_mounts() {
        assert_eq!(
            lines(&Wish::new()),
            [
                "/proc proc proc nosuid,noexec,nodev",
                "/dev tmpfs tmpfs nosuid,strictatime,mode=755,size=65536k",
                "/sys sysfs sysfs nosuid,noexec,nodev,ro",
                "/dev/pts devpts devpts nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5",
                "/dev/shm bind /run/sandbox/shm rbind,rprivate,nosuid,noexec,nodev,rw",
                "/dev/mqueue mqueue mqueue nosuid,noexec,nodev",
                "/etc/hostname bind /run/sandbox/hostname rbind,rprivate,rw",
                "/etc/hosts bind /run/sandbox/hosts rbind,rprivate,rw",
                "/etc/resolv.conf bind /run/sandbox/resolv.conf rbind,rprivate,rw",
                "/sys/fs/cgroup cgroup2 cgroup nosuid,noexec,nodev,relatime,ro",
            ]
        );
    }

    #[test]
    fn what_modes_change() {
        let mut wish = Wish::new();
        wish.sandbox.host_ipc = true;
        wish.config.security.readonly_rootfs = true;
        wish.version = CgroupVersion::V1;
        assert!(line(&wish, "/dev/shm").starts_with("/dev/shm bind /dev/shm "));
        assert!(line(&wish, "/dev/shm").ends_with(",rw"));
        assert!(line(&wish, "/etc/hosts").ends_with(",ro"));
        assert_eq!(
            line(&wish, "/sys/fs/cgroup"),
            "/sys/fs/cgroup cgroup cgroup nosuid,noexec,nodev,relatime,ro"
        );

        let mut wish = Wish::new();
        wish.sandbox.id_map = Some(crate::lifecycle::sandbox::IdMap {
            host_uid: 1000,
            host_gid: 1000,
            length: 5,
        });
        assert!(line(&wish, "/sys").starts_with("/sys sysfs "));
        assert!(line(&wish, "/dev/pts").ends_with(",mode=0620"));
        wish.sandbox.network.mode = crate::network::Mode::Host;
        assert_eq!(
            line(&wish, "/sys"),
            "/sys bind /sys rbind,rprivate,rro,nosuid,noexec,nodev"
        );
        let cgroups: Vec<_> = lines(&wish)
            .into_iter()
            .filter(|line| line.starts_with("/sys/fs/cgroup "))
            .collect();
        assert_eq!(
            cgroups,
            [
                "/sys/fs/cgroup tmpfs tmpfs mode=755",
                "/sys/fs/cgroup cgroup2 cgroup nosuid,noexec,nodev,relatime,ro"
            ]
        );

        let mut wish = Wish::new();
        wish.sandbox.privileged = true;
        wish.config.security.privileged = true;
        wish.host.cgroup2_options = vec!["nsdelegate".to_owned()];
        assert!(line(&wish, "/sys").ends_with(",rw"));
        assert!(line(&wish, "/sys/fs/cgroup").ends_with(",rw,nsdelegate"));
    }

    #[test]
    fn wishes_replace_usual_mounts_and_are_sorted_by_depth() {
        let wish = with(vec![
            bind("/a/b/c", "/host/a"),
            bind("/etc/hosts/", "/host/a"),
            bind("/a", "/host/b"),
            bind("/dev//shm", "/host/a"),
            bind("/a/./b", "/host/b"),
            tmpfs("/a/x/../b", None, None),
        ]);
        assert!(line(&wish, "/etc/hosts").starts_with("/etc/hosts bind /real/host/a"));
        assert!(line(&wish, "/dev/shm").starts_with("/dev/shm bind /real/host/a"));
        let order: Vec<_> = lines(&wish)
            .into_iter()
            .filter(|line| line.starts_with("/a"))
            .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(order, ["/a bind", "/a/b bind", "/a/b tmpfs", "/a/b/c bind"]);
    }

    #[test]
    fn a_dev_of_ones_own_replaces_all_below_it() {
        let wish = with(vec![bind("/dev", "/host/a"), bind("/dev/x", "/host/b")]);
        let below: Vec<_> = lines(&wish)
            .into_iter()
            .filter(|line| line.starts_with("/dev"))
            .collect();
        assert_eq!(
            below,
            [
                "/dev bind /real/host/a rbind,rprivate,rw",
                "/dev/x bind /real/host/b rbind,rprivate,rw",
            ]
        );
        assert!(
            lines(&with(vec![bind("/devices", "/host/a")]))
                .iter()
                .any(|line| line.starts_with("/dev/pts"))
        );
    }

    #[test]
    fn options() {
        let changed = |change: fn(&mut MountWish)| {
            let mut mount = bind("/t", "/host/a");
            change(&mut mount);
            line(&with(vec![mount]), "/t")
        };
        for (found, expected) in [
            (changed(|_| ()), "rbind,rprivate,rw"),
            (changed(|m| m.readonly = true), "rbind,rprivate,ro"),
            (
                changed(|m| {
                    m.readonly = true;
                    m.recursive_readonly = true;
                }),
                "rbind,rprivate,rro",
            ),
            (
                changed(|m| m.options = ["noexec", "nodev", "nosuid"].map(str::to_owned).to_vec()),
                "rbind,rprivate,noexec,nodev,nosuid,rw",
            ),
            (
                changed(|m| {
                    m.source = MountSource::Bind {
                        path: "/host/a".into(),
                        create: false,
                        recursive: false,
                    };
                }),
                "bind,rprivate,rw",
            ),
        ] {
            assert_eq!(found, format!("/t bind /real/host/a {expected}"));
        }
        for (mount, expected) in [
            (tmpfs("/t", None, None), "rw"),
            (
                tmpfs("/t", Some(1024), Some(0o1777)),
                "rw,size=1024,mode=1777",
            ),
            (
                MountWish {
                    readonly: true,
                    recursive_readonly: true,
                    ..tmpfs("/t", None, None)
                },
                "ro",
            ),
        ] {
            assert_eq!(
                line(&with(vec![mount]), "/t"),
                format!("/t tmpfs tmpfs {expected}")
            );
        }
    }

    #[test]
    fn mounts_spread_only_from_where_the_host_lets_them() {
        use Propagation::{Bidirectional, HostToContainer, Private};
        for (propagation, shared, slave, expected) in [
            (Private, false, false, Some(("rprivate", None))),
            (Private, true, true, Some(("rprivate", None))),
            (
                HostToContainer,
                true,
                false,
                Some(("rslave", Some("rslave"))),
            ),
            (
                HostToContainer,
                false,
                true,
                Some(("rslave", Some("rslave"))),
            ),
            (HostToContainer, false, false, None),
            (
                Bidirectional,
                true,
                false,
                Some(("rshared", Some("rshared"))),
            ),
            (Bidirectional, false, true, None),
            (Bidirectional, false, false, None),
        ] {
            let mount = MountWish {
                propagation,
                ..bind("/t", "/host/a")
            };
            let mut wish = with(vec![mount]);
            let facts = wish
                .host
                .sources
                .get_mut(Path::new("/host/a"))
                .expect("is there");
            (facts.shared, facts.slave) = (shared, slave);
            let Some((option, root)) = expected else {
                let error = built(&wish).expect_err("can't spread");
                assert!(
                    matches!(error, SpecError::MountPropagation { .. }),
                    "{error}"
                );
                continue;
            };
            assert!(line(&wish, "/t").ends_with(&format!("rbind,{option},rw")));
            let built = built(&wish).expect("valid");
            let linux = built.spec.linux().clone().expect("is Linux");
            assert_eq!(linux.rootfs_propagation().as_deref(), root);
        }
    }

    #[test]
    fn images_are_mounted_from_their_layers() {
        let image = |dirs: &[&str], options: &[&str]| {
            let mut mount = bind("/t", "");
            mount.source = MountSource::Image {
                reference: "image:1".to_owned(),
                sub_path: String::new(),
            };
            (mount.readonly, mount.recursive_readonly) = (true, true);
            mount.options = options.iter().map(|&option| option.to_owned()).collect();
            let mut wish = with(vec![mount]);
            let dirs = dirs.iter().map(PathBuf::from).collect();
            wish.host.images.insert("/t".into(), dirs);
            wish
        };
        for (dirs, options, expected) in [
            (&[][..], &[][..], "/t tmpfs tmpfs ro,size=4k"),
            (&["/l/1"], &["nodev"], "/t bind /l/1 nodev,ro,bind,rprivate"),
            (
                &["/l/2/a:b", "/l/1/c,d\\"],
                &[],
                "/t overlay overlay ro,lowerdir=/l/2/a\\:b:/l/1/c\\,d\\\\",
            ),
        ] {
            assert_eq!(line(&image(dirs, options), "/t"), expected);
        }
        let mut writable = image(&["/l/1"], &[]);
        writable.config.mounts[0].readonly = false;
        writable.config.mounts[0].recursive_readonly = false;
        assert!(built(&writable).is_err());
    }

    #[test]
    fn volumes_of_the_image_are_where_nothing_else_is() {
        let found = |volumes: &[&str]| {
            let mut image = super::super::testing::image();
            image.volumes = volumes.iter().map(|&path| path.to_owned()).collect();
            let wish = with(vec![bind("/mine/", "/host/a")]);
            image_volumes(&image, &wish.config).map_err(|error| error.to_string())
        };
        assert_eq!(
            found(&[
                "/data/",
                "rel",
                "/mine",
                "/a/../b",
                "/b",
                "/etc/hosts",
                "/dev/shm"
            ]),
            Ok(["/b", "/data", "/rel"].map(PathBuf::from).to_vec())
        );
        for path in ["/", "/..", "/proc", "/sys/fs", "/dev", "/dev/x"] {
            assert!(
                found(&[path]).is_err_and(|error| error.contains(path)),
                "{path}"
            );
        }
        let mut wish = Wish::new();
        wish.host.volumes.insert("/data".into(), "/own/0".into());
        assert_eq!(line(&wish, "/data"), "/data bind /own/0 rbind,rprivate,rw");
    }

    #[test]
    fn what_cannot_be_mounted_is_refused() {
        let option = |option: &str| MountWish {
            options: vec![option.to_owned()],
            ..bind("/t", "/host/a")
        };
        for (mount, expected) in [
            (bind("/", "/host/a"), "mounts.target is \"/\""),
            (bind("/..", "/host/a"), "mounts.target is \"/..\""),
            (bind("rel", "/host/a"), "mounts.target is \"rel\""),
            (bind("/t", "/host/gone"), "cannot use /host/gone"),
            (option("exec"), "mounts[/t].options is \"exec\""),
            (option("size=1"), "mounts[/t].options is \"size=1\""),
            (tmpfs("/t", None, Some(0o10000)), "mounts[/t].mode"),
            (
                MountWish {
                    propagation: Propagation::Bidirectional,
                    ..tmpfs("/t", None, None)
                },
                "propagation BIDIRECTIONAL of the mount of tmpfs",
            ),
        ] {
            let error = built(&with(vec![mount])).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn recursive_readonly_is_refused_with_the_word_that_clients_know() {
        let rro = |change: fn(&mut MountWish)| {
            let mut mount = bind("/t", "/host/a");
            (mount.readonly, mount.recursive_readonly) = (true, true);
            change(&mut mount);
            with(vec![mount])
        };
        let mut old_kernel = rro(|_| ());
        old_kernel.host.recursive_readonly = false;
        for wish in [
            rro(|m| m.readonly = false),
            rro(|m| m.propagation = Propagation::HostToContainer),
            old_kernel,
        ] {
            let error = built(&wish).expect_err("refused").to_string();
            assert!(error.starts_with("RROUnsupported"), "{error}");
        }
    }
}
