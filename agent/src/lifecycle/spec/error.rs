//! Why a wish can't be turned into a specification.

use std::{error::Error, io, path::PathBuf};

/// A wish that can't be fulfilled, by field; nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Neither the container nor its image says what to run.
    #[error("no command specified: neither the container nor its image has one")]
    NoCommand,
    /// A user by name that the image does not have.
    #[error("user {name:?} is not in the image's /etc/passwd; a number would do")]
    UnknownUser {
        /// As asked.
        name: String,
    },
    /// A group by name that the image does not have.
    #[error("group {name:?} is not in the image's /etc/group; a number would do")]
    UnknownGroup {
        /// As asked.
        name: String,
    },
    /// A group alone says nothing about the user.
    #[error("group {gid} is specified without a user")]
    GroupWithoutUser {
        /// As asked.
        gid: u32,
    },
    /// A field with a value that has no meaning there.
    #[error("{field} is {value:?}, but must be {expected}")]
    InvalidValue {
        /// The field's path.
        field: String,
        /// As asked, cut to a few hundred characters.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// The source of a bind mount can't be used.
    #[error("cannot use {} as the source of a mount", path.display())]
    MountSource {
        /// Path on the host, as asked.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Mounts can't spread the way that was asked.
    #[error("propagation {wanted} of the mount of {} needs a source on a {needed} mount", path.display())]
    MountPropagation {
        /// Path on the host, as asked.
        path: PathBuf,
        /// `HOST_TO_CONTAINER` or `BIDIRECTIONAL`.
        wanted: &'static str,
        /// `shared` or `shared or slave`.
        needed: &'static str,
    },
    /// The source of a mount can't be shown with other owners.
    #[error("the {file_system} at {} has no id-mapped mounts", path.display())]
    IdMappedMount {
        /// Path on the host of the mount that can't.
        path: PathBuf,
        /// Its file system.
        file_system: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A recursively read-only mount can't be had. The first word is one that CRI clients look for.
    #[error("RROUnsupported: the recursively read-only mount at {} {reason}", target.display())]
    RecursiveReadonly {
        /// Path in the container.
        target: PathBuf,
        /// What it needs.
        reason: &'static str,
    },
    /// The image asks for a volume where none can be.
    #[error(
        "the image asks for a volume at {path:?}, which belongs to the kernel or is the root; mount something there to replace it"
    )]
    ImageVolumePath {
        /// As the image has it.
        path: String,
    },
    /// No such capability.
    #[error(
        "capability {name:?} is not known to this kernel; names are those of capabilities(7) without CAP_, or ALL"
    )]
    UnknownCapability {
        /// As asked.
        name: String,
    },
    /// A device of the host can't be used.
    #[error("cannot use device {}", path.display())]
    Device {
        /// Path on the host, as asked.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// A device of the Container Device Interface can't be had.
    #[error(transparent)]
    Cdi(#[from] super::CdiError),
    /// The kernel has no seccomp.
    #[error("this kernel has no seccomp; only containers without a profile (unconfined) can run")]
    SeccompMissing,
    /// A seccomp profile can't be read or has no meaning.
    #[error("cannot use the seccomp profile {profile}")]
    SeccompProfile {
        /// Its path, or `inline`.
        profile: String,
        /// What is wrong with it.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A profile is asked for on a host without AppArmor.
    #[error("AppArmor profile {profile:?} is asked for, but AppArmor is not enabled on this host")]
    AppArmorMissing {
        /// As asked.
        profile: String,
    },
    /// A profile that is not loaded.
    #[error("AppArmor profile {profile:?} is not loaded on this host")]
    AppArmorProfile {
        /// As asked.
        profile: String,
    },
    /// A label is asked for on a host where it would have to be enforced.
    #[error("an SELinux label is asked for on a host with SELinux, which is not built in")]
    SelinuxUnsupported,
    /// A privileged container asks for more than its sandbox has.
    #[error("a privileged container needs a privileged sandbox")]
    PrivilegedInUnprivilegedSandbox,
}

impl SpecError {
    /// A value that has no meaning in its field.
    pub(super) fn invalid(
        field: impl Into<String>,
        value: impl ToString,
        expected: &'static str,
    ) -> Self {
        Self::InvalidValue {
            field: field.into(),
            value: value.to_string().chars().take(200).collect(),
            expected,
        }
    }
}
