//! What can go wrong between a caller and an agent, with the agent's own reasons as data.

use std::{collections::BTreeMap, error::Error as _, fmt, io, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{Address, AddressError, Reason, proto::ERROR_DOMAIN};

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address cannot be one.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Nobody answered there: no agent, no permission, or no way to it.
    #[error("cannot reach the agent at {address}: {problem}")]
    Unreachable {
        /// Where the agent was expected.
        address: Address,
        /// The operating system's answer, if it was asked.
        kind: Option<io::ErrorKind>,
        /// The first cause, in words.
        problem: String,
    },
    /// The agent did not answer in time; what was asked may still happen.
    #[error("the agent at {address} did not answer within {after:?}")]
    Deadline {
        /// Who was asked.
        address: Address,
        /// How long the caller waited.
        after: Duration,
    },
    /// The agent answered that it will not or cannot.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// A stream ended before what it was for.
    #[error("the agent at {address} ended the stream before {expected}")]
    Incomplete {
        /// Who was asked.
        address: Address,
        /// What was still to come.
        expected: &'static str,
    },
}

/// A field of the request that cannot be as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field in the request, as in `config.port_mappings[0].host_port`.
    pub field: String,
    /// What it may be.
    pub description: String,
}

/// The agent's answer when it does not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The gRPC status code.
    pub code: Code,
    /// One sentence for people.
    pub message: String,
    /// The stable reason, if this library's release knows it.
    pub reason: Option<Reason>,
    /// The reason as the agent wrote it; empty if it gave none.
    pub reason_name: String,
    /// Facts that belong to the reason: ids, holders, limits.
    pub facts: BTreeMap<String, String>,
    /// The request's fields that were wrong.
    pub violations: Vec<Violation>,
    /// When the agent thinks that trying again makes sense.
    pub retry_after: Option<Duration>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() {
            write!(f, "the agent refused: {}", self.code.description())
        } else {
            f.write_str(&self.message)
        }
    }
}

impl Error {
    /// Reads an agent's status, with the details of `google.rpc` in it.
    #[must_use]
    pub fn from_status(address: &Address, status: Status) -> Self {
        // An answer from the wire has no source: what has one was made on this side, because the
        // connection failed or broke.
        if let Some(source) = status.source() {
            return Self::unreachable(address, source);
        }
        Self::Refused(Box::new(Refusal::from(&status)))
    }

    /// Says that the way to `address` failed with `error`, or with what is at the root of it.
    pub(crate) fn unreachable(
        address: &Address,
        error: &(dyn std::error::Error + 'static),
    ) -> Self {
        let mut kind = None;
        let mut root = error;
        loop {
            kind = kind.or_else(|| root.downcast_ref::<io::Error>().map(io::Error::kind));
            match root.source() {
                Some(source) => root = source,
                None => break,
            }
        }
        Self::Unreachable {
            address: address.clone(),
            kind,
            problem: root.to_string(),
        }
    }

    /// The refusal, if the agent answered at all.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// The stable reason, if the agent gave one that is known here.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        self.refusal().and_then(|refusal| refusal.reason)
    }

    /// Whether the same call may succeed in a moment: the agent is away, starting or draining.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused(refusal) => refusal.code == Code::Unavailable,
            _ => false,
        }
    }

    /// Whether the thing asked for does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.refusal()
            .is_some_and(|refusal| refusal.code == Code::NotFound)
    }
}

impl From<&Status> for Refusal {
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info();
        let reason_name = info.map(|info| info.reason.clone()).unwrap_or_default();
        let ours = info.is_some_and(|info| info.domain == ERROR_DOMAIN);
        Self {
            code: status.code(),
            message: status.message().to_owned(),
            reason: if ours {
                Reason::from_reason(&reason_name)
            } else {
                None
            },
            reason_name,
            facts: info
                .map(|info| info.metadata.clone().into_iter().collect())
                .unwrap_or_default(),
            violations: details
                .bad_request()
                .map(|request| {
                    request
                        .field_violations
                        .iter()
                        .map(|violation| Violation {
                            field: violation.field.clone(),
                            description: violation.description.clone(),
                        })
                        .collect()
                })
                .unwrap_or_default(),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn the_agents_details_come_back_as_data() {
        let mut details = ErrorDetails::new();
        details
            .set_error_info(
                "HOST_PORT_TAKEN",
                ERROR_DOMAIN,
                [("holder".to_owned(), "sandbox/abc".to_owned())],
            )
            .add_bad_request_violation("config.network.ports[0].host_port", "choose another")
            .set_retry_info(Some(Duration::from_secs(2)));
        let status = Status::with_error_details(Code::FailedPrecondition, "taken", details);
        let error = Error::from_status(&Address::default(), status);

        assert_eq!(error.reason(), Some(Reason::HostPortTaken));
        assert_eq!(error.to_string(), "taken");
        let refusal = error.refusal().expect("the agent answered");
        assert_eq!(refusal.facts["holder"], "sandbox/abc");
        assert_eq!(
            refusal.violations[0].field,
            "config.network.ports[0].host_port"
        );
        assert_eq!(refusal.retry_after, Some(Duration::from_secs(2)));
        assert!(!error.is_unavailable());
    }

    #[test]
    fn a_reason_of_a_later_release_or_another_domain_stays_text() {
        for (reason, domain) in [
            ("WHAT_IS_NEW", ERROR_DOMAIN),
            ("HOST_PORT_TAKEN", "example.org"),
        ] {
            let mut details = ErrorDetails::new();
            details.set_error_info(reason, domain, []);
            let status = Status::with_error_details(Code::Aborted, "", details);
            let refusal = Refusal::from(&status);
            assert_eq!(refusal.reason, None);
            assert_eq!(refusal.reason_name, reason);
        }
    }

    #[test]
    fn a_status_without_details_is_a_refusal_with_its_code() {
        let error = Error::from_status(&Address::default(), Status::not_found("no container x"));
        assert!(error.is_not_found());
        assert_eq!(error.reason(), None);
        let silent = Refusal::from(&Status::new(Code::Internal, ""));
        assert_eq!(silent.to_string(), "the agent refused: Internal error");
    }
}
