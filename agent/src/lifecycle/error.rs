//! What can go wrong with sandboxes and containers.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use super::{spec::SpecError, system::SystemError};
use crate::{
    cgroup::CgroupError,
    handler::HandlerError,
    image::ImageError,
    network::NetworkError,
    operation::OperationError,
    rootfs::{IdMapsMissing, RootfsError},
    store::StoreError,
};

/// Why a verb did not do it. Nothing of it remains unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// No such object, or it belongs to another face.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// `sandbox`, `container` or `system container`.
        kind: &'static str,
        /// As asked.
        id: String,
    },
    /// A prefix that several objects share.
    #[error("{kind} id prefix {prefix:?} is ambiguous: {} begin with it", matches)]
    Ambiguous {
        /// `sandbox` or `container`.
        kind: &'static str,
        /// As asked.
        prefix: String,
        /// How many.
        matches: usize,
    },
    /// The name belongs to another object.
    #[error("name {name} is reserved for {holder}")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        holder: String,
    },
    /// The object is in a state in which this can't be done.
    #[error("{kind} {id} is in {state} state, {wanted} is needed")]
    State {
        /// `sandbox` or `container`.
        kind: &'static str,
        /// Which.
        id: String,
        /// Its state in CRI's words, `CONTAINER_EXITED`.
        state: &'static str,
        /// The state needed.
        wanted: &'static str,
    },
    /// No such runtime handler.
    #[error("runtime handler {name:?} is not known; known are {}", known.join(", "))]
    UnknownHandler {
        /// As asked.
        name: String,
        /// What would be valid.
        known: Vec<String>,
    },
    /// This host or the handler has no user namespaces for sandboxes.
    #[error("user namespaces are not supported by runtime handler {handler:?} here")]
    UserNamespaces {
        /// The handler.
        handler: String,
        /// What is missing.
        #[source]
        source: IdMapsMissing,
    },
    /// The image is not on this host.
    #[error("image {reference:?} is not present; pull it first")]
    ImageMissing {
        /// As asked.
        reference: String,
    },
    /// An image can't be mounted as a volume. The first word is one that CRI clients look for.
    #[error("ImageVolumeMountFailed: cannot mount image {reference:?} at {}", target.display())]
    ImageVolume {
        /// As asked.
        reference: String,
        /// Path in the container.
        target: PathBuf,
        /// Why.
        #[source]
        source: Box<LifecycleError>,
    },
    /// An image has nothing at the path of it that is to be mounted.
    #[error("the image has no {sub_path:?}")]
    SubPathMissing {
        /// As asked.
        sub_path: String,
    },
    /// The container has no stdin, terminal or log to do this with.
    #[error("container {id} has no {what}")]
    Lacks {
        /// Which container.
        id: String,
        /// `stdin`, `terminal`, `log`.
        what: &'static str,
    },
    /// The command ran longer than it may; it and what it started were killed.
    #[error("the command was killed after {}", humane(*.after))]
    ExecTimeout {
        /// Its time.
        after: Duration,
    },
    /// What only system containers can fail with.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The wish can't be turned into a container.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Finding the image failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The network refused or failed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The cgroup failed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The writable layer failed.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The shim or the engine failed.
    #[error(transparent)]
    Handler(#[from] HandlerError),
    /// A namespace of the sandbox could not be made or let go.
    #[error("cannot set up the namespaces of the sandbox: {step}")]
    Namespace {
        /// What was being done.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file of the agent could not be made, read or removed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Cancelled or pre-empted, and undone.
    #[error("{operation} was cancelled")]
    Cancelled {
        /// The verb.
        operation: &'static str,
    },
    /// A bug ended the verb.
    #[error("{operation} died")]
    Died {
        /// The verb.
        operation: &'static str,
    },
    /// The error of an operation that several callers share.
    #[error(transparent)]
    Shared(Arc<LifecycleError>),
}

impl LifecycleError {
    /// The error itself, whether shared or not.
    pub fn root(&self) -> &Self {
        match self {
            Self::Shared(error) => error.root(),
            own => own,
        }
    }

    /// Adds what was tried to an error of the file system.
    pub(super) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

impl From<OperationError<Self>> for LifecycleError {
    fn from(error: OperationError<Self>) -> Self {
        match error {
            OperationError::Domain(error) => Arc::try_unwrap(error).unwrap_or_else(Self::Shared),
            OperationError::Store {
                source: StoreError::Claimed { key, holder },
                ..
            } => Self::NameTaken { name: key, holder },
            OperationError::Store { source, .. } => Self::Store(source),
            OperationError::Cancelled { operation } => Self::Cancelled { operation },
            OperationError::Died { operation } => Self::Died { operation },
        }
    }
}

fn humane(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}
