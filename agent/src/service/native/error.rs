//! Refusals of this face alone, and those of the chapters with this face's field paths.

use std::sync::Arc;

use longshore_proto::longshore::v1::ErrorReason;
use tonic::{Code, Status};

use crate::{
    cgroup::CgroupError,
    handler::HandlerError,
    image::ImageError,
    lifecycle::{LifecycleError, logs::LogError, spec::SpecError},
    network::NetworkError,
    service::{
        edge::EdgeError,
        status::{ToStatus, Verdict},
    },
};

/// Why a request of `longshore.v1` is refused before any chapter is asked.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum NativeError {
    /// A field can't be understood.
    #[error(transparent)]
    Edge(#[from] EdgeError),
    /// A number, length or size is outside its range.
    #[error("{field}: {value} is not within {minimum} and {maximum}")]
    OutOfRange {
        field: String,
        value: String,
        minimum: String,
        maximum: String,
    },
    /// The page token was not given out by this list.
    #[error("page_token is not one that this list gave out")]
    PageToken,
    /// A message of a stream came out of order.
    #[error("unexpected message on the stream, expected {expected}")]
    Unexpected { expected: &'static str },
    /// The key belongs to another wish.
    #[error("idempotency key {key:?} was used for a different {method} request")]
    KeyReused { key: String, method: &'static str },
    /// No such operation.
    #[error("operation {id:?} not found")]
    NoOperation { id: String },
    /// It can only be finished.
    #[error("operation {id} ({name}) cannot be cancelled")]
    NotCancellable { id: String, name: String },
    /// It was cancelled by a call.
    #[error("operation {id} was cancelled")]
    Cancelled { id: String },
    /// No such handler.
    #[error("handler {handler:?} is not known; known are {}", known.join(", "))]
    NoHandler { handler: String, known: Vec<String> },
    /// Somebody else wants the image.
    #[error("image {image} is kept by {holder}")]
    Protected { image: String, holder: String },
    /// The caller's time is up; what it asked for goes on.
    #[error("the deadline passed in {stage} after {seconds:.3} s; the work goes on")]
    Deadline { stage: String, seconds: f64 },
    /// A log can't be read on.
    #[error(transparent)]
    Log(Arc<LogError>),
}

impl NativeError {
    /// A number outside its range.
    pub(super) fn range(
        field: impl Into<String>,
        value: impl ToString,
        minimum: impl ToString,
        maximum: impl ToString,
    ) -> Self {
        Self::OutOfRange {
            field: field.into(),
            value: value.to_string(),
            minimum: minimum.to_string(),
            maximum: maximum.to_string(),
        }
    }

    /// A malformed field.
    pub(super) fn invalid(
        field: impl Into<String>,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        EdgeError::invalid(field, value, expected).into()
    }

    /// A missing field.
    pub(super) fn missing(field: impl Into<String>) -> Self {
        EdgeError::missing(field).into()
    }

    /// Two fields that exclude each other.
    pub(super) fn conflict(field: impl Into<String>, other: impl Into<String>) -> Self {
        EdgeError::Conflict {
            field: field.into(),
            other: other.into(),
        }
        .into()
    }
}

impl ToStatus for NativeError {
    fn verdict(&self) -> Verdict {
        let invalid = |reason| Verdict::new(Code::InvalidArgument, reason);
        match self {
            Self::Edge(error) => error.verdict(),
            Self::OutOfRange {
                field,
                value,
                minimum,
                maximum,
            } => invalid(ErrorReason::OutOfRange)
                .fact("field", field)
                .fact("value", value)
                .fact("minimum", minimum)
                .fact("maximum", maximum),
            Self::PageToken => invalid(ErrorReason::InvalidPageToken).fact("field", "page_token"),
            Self::Unexpected { expected } => {
                invalid(ErrorReason::UnexpectedMessage).fact("expected", expected)
            }
            Self::KeyReused { key, method } => {
                Verdict::new(Code::AlreadyExists, ErrorReason::IdempotencyKeyReused)
                    .fact("key", key)
                    .fact("holder", method)
            }
            Self::NoOperation { id } => {
                Verdict::new(Code::NotFound, ErrorReason::OperationNotFound).fact("id", id)
            }
            Self::NotCancellable { id, name } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::NotCancellable)
                    .fact("id", id)
                    .fact("name", name)
            }
            Self::Cancelled { id } => {
                Verdict::new(Code::Cancelled, ErrorReason::Cancelled).fact("operation_id", id)
            }
            Self::NoHandler { handler, known } => invalid(ErrorReason::UnknownHandler)
                .fact("handler", handler)
                .fact("known", known.join(", "))
                .fact("field", "config.handler"),
            Self::Protected { image, holder } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageProtected)
                    .fact("image", image)
                    .fact("holder", holder)
            }
            Self::Deadline { stage, seconds } => {
                Verdict::new(Code::DeadlineExceeded, ErrorReason::Deadline)
                    .fact("stage", stage)
                    .fact("stage_seconds", seconds)
            }
            Self::Log(_) => {
                Verdict::new(Code::Internal, ErrorReason::System).fact("step", "read log")
            }
        }
    }
}

/// A refused configuration: chapters name fields in CRI's words, or their own.
pub(super) fn refused_config(error: &LifecycleError) -> Status {
    if let LifecycleError::UnknownHandler { name, known } = error.root() {
        return NativeError::NoHandler {
            handler: name.clone(),
            known: known.clone(),
        }
        .to_status();
    }
    let field = match error.root() {
        LifecycleError::Spec(error) => spec_field(error),
        LifecycleError::Network(NetworkError::PortInvalid { index, .. }) => {
            Some(format!("network.ports[{index}]"))
        }
        LifecycleError::Image(ImageError::Reference(_)) => Some("image".to_owned()),
        LifecycleError::Cgroup(error) | LifecycleError::Handler(HandlerError::Cgroup(error)) => {
            cgroup_field(error)
        }
        LifecycleError::Handler(HandlerError::Seccomp { .. }) => {
            Some("security.seccomp.profile_json".to_owned())
        }
        _ => None,
    };
    match field {
        Some(field) => NativeError::invalid(
            format!("config.{field}"),
            error.root(),
            "a value that this host can apply",
        )
        .to_status(),
        None => error.to_status(),
    }
}

fn spec_field(error: &SpecError) -> Option<String> {
    match error {
        SpecError::InvalidValue { field, .. } => {
            let field = field.to_string();
            Some(field.strip_prefix("config.").unwrap_or(&field).to_owned())
        }
        SpecError::GroupWithoutUser { .. } => Some("user".to_owned()),
        SpecError::RecursiveReadonly { .. } => Some("mounts".to_owned()),
        SpecError::UnknownCapability { .. } => Some("security.add_capabilities".to_owned()),
        SpecError::SeccompProfile { .. } => Some("security.seccomp.profile_json".to_owned()),
        SpecError::PrivilegedInUnprivilegedSandbox => Some("security.privileged".to_owned()),
        _ => None,
    }
}

fn cgroup_field(error: &CgroupError) -> Option<String> {
    match error {
        CgroupError::BadResource { field, .. } => Some(format!("resources.{field}")),
        CgroupError::Refused { .. } => Some("resources".to_owned()),
        _ => None,
    }
}
