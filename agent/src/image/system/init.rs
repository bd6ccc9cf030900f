//! Which init a root tree has, and how it is asked to halt.

use crate::image::error::ImageError;
use crate::rootfs::{LayerDir, LayerError};

/// The first process of a root tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Init {
    /// `systemd`, `openrc`, `busybox`, `runit`, `sysvinit` or `other`.
    pub(crate) name: &'static str,
    pub(crate) version: Option<String>,
    /// What makes it halt; `None` where that is not known.
    pub(crate) stop_signal: Option<&'static str>,
}

const INIT: &str = "/sbin/init";
const OPENRC: [&str; 3] = ["/sbin/openrc", "/usr/sbin/openrc", "/usr/bin/openrc"];

impl Init {
    /// Looks at what `/sbin/init` is, all links followed inside the root.
    ///
    /// # Errors
    /// `NoInit`, `Root`.
    pub(crate) fn find(root: &LayerDir) -> Result<Init, ImageError> {
        let resolve = |path: &str| {
            root.resolve_file(path).map_err(|source| ImageError::Root {
                source: LayerError::Kernel {
                    call: "openat2",
                    path: path.into(),
                    source,
                },
            })
        };
        let program = resolve(INIT)?.ok_or(ImageError::NoInit)?;
        let program = program.file_name().and_then(|name| name.to_str());
        let mut has_openrc = false;
        for path in OPENRC {
            has_openrc |= resolve(path)?.is_some();
        }
        let of = |name, stop_signal| Init {
            name,
            version: None,
            stop_signal,
        };
        Ok(match program.unwrap_or_default() {
            "systemd" => Init {
                version: systemd_version(root),
                ..of("systemd", Some("SIGRTMIN+3"))
            },
            "busybox" if has_openrc => of("openrc", Some("SIGUSR2")),
            "busybox" => of("busybox", Some("SIGUSR2")),
            "openrc-init" => of("openrc", None),
            "runit" | "runit-init" => of("runit", Some("SIGCONT")),
            "init" | "sysvinit" if resolve("/etc/inittab")?.is_some() => {
                let name = if has_openrc { "openrc" } else { "sysvinit" };
                of(name, Some("SIGPWR"))
            }
            _ => of("other", None),
        })
    }
}

/// systemd's own library has the version in its name.
fn systemd_version(root: &LayerDir) -> Option<String> {
    let mut places = vec![
        "/usr/lib/systemd".to_owned(),
        "/usr/lib64/systemd".to_owned(),
    ];
    let below = |parent: &str| {
        let names = root.names(parent).into_iter();
        let names = names.filter_map(|name| name.into_string().ok());
        names
            .filter(|name| name.ends_with("-linux-gnu") || name.contains("-linux-"))
            .map(|name| format!("{parent}/{name}/systemd"))
            .collect::<Vec<_>>()
    };
    places.extend(below("/usr/lib"));
    places.extend(below("/lib"));
    places.iter().find_map(|place| {
        root.names(place).iter().find_map(|name| {
            let rest = name.to_str()?.strip_prefix("libsystemd-shared-")?;
            let end = rest.find(|c: char| !c.is_ascii_digit())?;
            (end > 0).then(|| rest[..end].to_owned())
        })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A tree of files, and of links written as `path -> target`.
    fn find(tree: &[&str]) -> Result<Init, ImageError> {
        let dir = tempfile::tempdir().unwrap();
        for one in tree {
            let (path, target) = match one.split_once(" -> ") {
                Some((path, target)) => (path, Some(target)),
                None => (*one, None),
            };
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match target {
                Some(target) => symlink(target, path).unwrap(),
                None => std::fs::write(path, "").unwrap(),
            }
        }
        Init::find(&LayerDir::open(dir.path()).unwrap())
    }

    #[test]
    fn each_init_is_known_by_what_its_link_leads_to() {
        let table: [(&[&str], &str, Option<&str>); 8] = [
            (
                &[
                    "usr/lib/systemd/systemd",
                    "sbin/init -> /usr/lib/systemd/systemd",
                ],
                "systemd",
                Some("SIGRTMIN+3"),
            ),
            (
                &["bin/busybox", "sbin/init -> ../bin/busybox", "sbin/openrc"],
                "openrc",
                Some("SIGUSR2"),
            ),
            (
                &["bin/busybox", "sbin/init -> /bin/busybox"],
                "busybox",
                Some("SIGUSR2"),
            ),
            (
                &[
                    "usr/bin/runit-init",
                    "usr/sbin/init -> ../bin/runit-init",
                    "sbin -> usr/sbin",
                ],
                "runit",
                Some("SIGCONT"),
            ),
            (&["sbin/init", "etc/inittab"], "sysvinit", Some("SIGPWR")),
            (
                &["sbin/openrc-init", "sbin/init -> openrc-init"],
                "openrc",
                None,
            ),
            (&["sbin/init"], "other", None),
            // More `..` than there are directories end at the root, as in the guest itself.
            (&["init", "sbin/init -> ../../../../init"], "other", None),
        ];
        for (tree, name, signal) in table {
            let init = find(tree).unwrap();
            assert_eq!((init.name, init.stop_signal), (name, signal), "{tree:?}");
        }
    }

    #[test]
    fn the_version_of_systemd_is_read_from_its_library() {
        let systemd = [
            "usr/lib/systemd/systemd",
            "sbin/init -> /usr/lib/systemd/systemd",
        ];
        for (library, version) in [
            (
                "usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so",
                Some("252"),
            ),
            (
                "usr/lib64/systemd/libsystemd-shared-258.1-1.fc43.so",
                Some("258"),
            ),
            ("usr/lib/systemd/libsystemd-shared-.so", None),
        ] {
            let init = find(&[systemd[0], systemd[1], library]).unwrap();
            assert_eq!(init.version.as_deref(), version, "{library}");
        }
    }

    #[test]
    fn without_an_init_there_is_no_image() {
        for tree in [
            &["bin/sh"][..],
            &["sbin/init -> /nowhere"],
            &["sbin/init -> init"],
            &["sbin/init/x"],
            &["sbin/init -> /proc/self/exe"],
        ] {
            assert!(matches!(find(tree), Err(ImageError::NoInit)), "{tree:?}");
        }
    }
}
