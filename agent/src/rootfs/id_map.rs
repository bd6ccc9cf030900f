//! Whether layers can be shown with other owners than they have on disk.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use longshore_sys::user::{Holder, IdMapping, can_map_ids};

/// First Linux whose overlay takes id-mapped layers.
const OVERLAY: (u32, u32) = (5, 19);

/// Why no sandbox of this host can have a user namespace.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IdMapsMissing {
    /// The sandbox's handler is an OCI runtime that does not say that it has them.
    #[error("this handler's program does not say that it has them (its command `features`)")]
    Handler,
    /// None can be made.
    #[error("no user namespace can be made (sysctl user.max_user_namespaces is {limit})")]
    Namespaces {
        /// How many there may be, as the kernel says.
        limit: String,
        /// What the kernel said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The kernel is too old.
    #[error("Linux {release} is older than {}.{}, whose overlay takes id-mapped layers", OVERLAY.0, OVERLAY.1)]
    Kernel {
        /// What runs.
        release: String,
    },
    /// The layers are on a file system without id-mapped mounts.
    #[error("the file system of {} has no id-mapped mounts", path.display())]
    FileSystem {
        /// Where the layers are.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: Arc<io::Error>,
    },
}

/// Looks whether layers at `dir` can be id-mapped, by doing it out of sight. Blocking.
///
/// # Errors
/// What is missing.
pub fn can_map_layers(dir: &Path) -> Result<(), IdMapsMissing> {
    let any = [IdMapping {
        inside: 0,
        outside: 100_000,
        length: 65_536,
    }];
    let user_ns = Holder::start(&any, &any, 0).and_then(|holder| holder.open("user"));
    let user_ns = user_ns.map_err(|source| IdMapsMissing::Namespaces {
        limit: fs::read_to_string("/proc/sys/user/max_user_namespaces")
            .map_or_else(|_| "missing".to_owned(), |text| text.trim().to_owned()),
        source: Arc::new(source),
    })?;
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    if version(&release) < Some(OVERLAY) {
        return Err(IdMapsMissing::Kernel { release });
    }
    can_map_ids(dir, false, &user_ns).map_err(|source| IdMapsMissing::FileSystem {
        path: dir.to_owned(),
        source: Arc::new(source),
    })
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_known_by_their_release() {
        for (release, new_enough) in [
            ("5.15.0-91-generic", false),
            ("5.19.0", true),
            ("6.1.0-18-amd64", true),
            ("linux", false),
        ] {
            assert_eq!(version(release) >= Some(OVERLAY), new_enough, "{release}");
        }
    }

    #[test]
    fn a_file_system_without_support_is_told() {
        let error = can_map_layers(Path::new("/proc")).expect_err("proc has none");
        // On a host that may make no user namespaces, that comes first.
        assert!(!matches!(error, IdMapsMissing::Kernel { .. }), "{error}");
    }
}
