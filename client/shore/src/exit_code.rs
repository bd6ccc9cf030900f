//! The exit codes of `shore`: part of its interface, so all of them are here and none changes.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | it failed, or (`fsck`, `check`) something was found |
//! | 2 | the command line cannot be right as it is |
//! | 3 | no such pod, container, image, network or operation |
//! | 4 | the state of things does not allow it, or somebody else holds what was asked for |
//! | 5 | the agent cannot be reached, or is busy or draining |
//! | 125 | `run`: the agent refused before the container started |
//! | 126 | `run`, `exec`: the command is there but cannot be executed |
//! | 127 | `run`, `exec`: the command is not there |
//! | else | `run`, `exec`, `attach`: the container's own; 128 + n when signal n ended it |

use longshore_client::{Error, Reason};
use tonic::Code;

/// A finished invocation's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExitCode(pub(crate) u8);

impl ExitCode {
    pub(crate) const OK: Self = Self(0);
    pub(crate) const FAILURE: Self = Self(1);
    pub(crate) const USAGE: Self = Self(2);
    pub(crate) const NOT_FOUND: Self = Self(3);
    pub(crate) const CONFLICT: Self = Self(4);
    pub(crate) const UNAVAILABLE: Self = Self(5);
    pub(crate) const RUN_REFUSED: Self = Self(125);
    pub(crate) const CANNOT_EXECUTE: Self = Self(126);
    pub(crate) const NO_SUCH_COMMAND: Self = Self(127);

    /// The code of a container's process: what it exited with, as a shell would show it.
    pub(crate) fn of_process(code: i32) -> Self {
        // Exit codes are a byte; anything else is the agent's way to say that it is not known.
        Self(u8::try_from(code).unwrap_or(255))
    }

    /// The code for an error of the agent or of the way to it.
    pub(crate) fn of_error(error: &Error) -> Self {
        match error {
            Error::Address(_) => Self::USAGE,
            Error::Unreachable { .. } | Error::Deadline { .. } => Self::UNAVAILABLE,
            Error::Refused(refusal) => match refusal.reason {
                Some(Reason::CommandNotFound) => Self::NO_SUCH_COMMAND,
                Some(Reason::CommandNotExecutable) => Self::CANNOT_EXECUTE,
                _ => Self::of_code(refusal.code),
            },
            // Incomplete, and what a later release of the client adds.
            _ => Self::FAILURE,
        }
    }

    fn of_code(code: Code) -> Self {
        match code {
            Code::Ok => Self::OK,
            Code::InvalidArgument | Code::OutOfRange => Self::USAGE,
            Code::NotFound => Self::NOT_FOUND,
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Self::CONFLICT,
            Code::Unavailable | Code::ResourceExhausted => Self::UNAVAILABLE,
            Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::PermissionDenied
            | Code::Unimplemented
            | Code::Internal
            | Code::DataLoss
            | Code::Unauthenticated => Self::FAILURE,
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.0)
    }
}
