//! Which endpoint is tried next, when, and what to say when none is left.
//!
//! A round tries each endpoint once, so a dead mirror costs no waiting. Between rounds there is a
//! back-off, longer each time, and at least what a registry asked for. An endpoint that gave a final
//! answer is not asked again; the answer of the last endpoint, the registry itself, is the one that
//! counts.

use std::time::Duration;

use super::hosts::Endpoint;
use crate::image::error::{EndpointFailure, ImageError};

/// Longest wait that a registry may ask for before we call it an error instead.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Time limits of the wire.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    pub(crate) connect: Duration,
    /// Nothing received for this long is an error.
    pub(crate) stall: Duration,
    /// Rounds over all endpoints.
    pub(crate) attempts: u32,
    pub(crate) first_backoff: Duration,
}

/// What one try at one endpoint ended in.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No connection, a broken one, or a 5xx.
    Unreachable(String),
    Tls(String),
    /// 429, or 503 with Retry-After.
    Busy(Option<Duration>),
    Stalled,
    /// 401 and 403.
    Refused(String),
    /// 404.
    Missing,
    /// The body ended at this byte.
    Short(u64),
    /// 416: nothing is there beyond the offset that we asked for.
    Beyond,
    Odd(String),
    /// Content that is not what was asked for.
    Wrong(Box<ImageError>),
}

impl Failure {
    fn is_final(&self) -> bool {
        match self {
            Failure::Unreachable(_) | Failure::Busy(_) | Failure::Stalled | Failure::Short(_) => {
                false
            }
            Failure::Tls(_)
            | Failure::Refused(_)
            | Failure::Missing
            | Failure::Beyond
            | Failure::Odd(_)
            | Failure::Wrong(_) => true,
        }
    }

    fn describe(&self) -> String {
        match self {
            Failure::Unreachable(reason) | Failure::Odd(reason) => reason.clone(),
            Failure::Tls(reason) => format!("TLS: {reason}"),
            Failure::Busy(_) => "too many requests".to_owned(),
            Failure::Stalled => "no progress".to_owned(),
            Failure::Refused(reason) => format!("access denied: {reason}"),
            Failure::Missing => "not found".to_owned(),
            Failure::Short(at) => format!("the content ended after {at} bytes"),
            Failure::Beyond => "the content is shorter than described".to_owned(),
            Failure::Wrong(error) => error.to_string(),
        }
    }
}

/// What is being asked for, for the words of errors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    /// The registry, as in the reference.
    pub(crate) host: &'a str,
    /// The reference, for not found and denied.
    pub(crate) reference: &'a str,
    /// e.g. `layer sha256:...`.
    pub(crate) what: &'a str,
    /// Size as described, if it is.
    pub(crate) size_bytes: Option<u64>,
}

/// The tries of one request.
pub(crate) struct Rounds<'a> {
    endpoints: &'a [Endpoint],
    /// Indices into `endpoints`, in the order of a round.
    order: Vec<usize>,
    failures: Vec<Option<Failure>>,
    /// Next place in `order`.
    next: usize,
    round: u32,
    timing: Timing,
    subject: Subject<'a>,
}

impl<'a> Rounds<'a> {
    /// Begins with `preferred`, then goes on in the order of the configuration.
    pub(crate) fn new(
        endpoints: &'a [Endpoint],
        preferred: usize,
        timing: Timing,
        subject: Subject<'a>,
    ) -> Self {
        let mut order: Vec<usize> = (0..endpoints.len()).collect();
        order.sort_by_key(|index| *index != preferred);
        let failures = endpoints.iter().map(|_| None).collect();
        Rounds {
            endpoints,
            order,
            failures,
            next: 0,
            round: 0,
            timing,
            subject,
        }
    }

    /// Returns the endpoint to try now, after waiting as long as it takes.
    ///
    /// # Errors
    /// What the request ends in, when nothing is left to try.
    pub(crate) async fn next(&mut self) -> Result<usize, ImageError> {
        loop {
            while let Some(&index) = self.order.get(self.next) {
                self.next += 1;
                if !self.failures[index].as_ref().is_some_and(Failure::is_final) {
                    return Ok(index);
                }
            }
            self.round += 1;
            self.next = 0;
            let open = self
                .failures
                .iter()
                .flatten()
                .any(|failure| !failure.is_final());
            if !open || self.round >= self.timing.attempts {
                return Err(self.conclude());
            }
            let Some(pause) = self.pause() else {
                return Err(self.conclude());
            };
            tokio::time::sleep(pause).await;
        }
    }

    pub(crate) fn failed(&mut self, index: usize, failure: Failure) {
        tracing::debug!(
            endpoint = self.endpoints[index].base(),
            what = self.subject.what,
            error = failure.describe(),
            "registry request failed"
        );
        self.failures[index] = Some(failure);
    }

    /// Content came: the tries begin anew, so a long blob over a poor line arrives in the end.
    pub(crate) fn progressed(&mut self) {
        self.round = 0;
    }

    /// Returns how long to wait before the next round, `None` when a registry asks for too much.
    fn pause(&self) -> Option<Duration> {
        let asked = self
            .failures
            .iter()
            .flatten()
            .filter_map(|failure| match failure {
                Failure::Busy(after) => *after,
                _ => None,
            });
        // Someone else's endpoint may be free sooner, so the least demand counts.
        let asked = asked.min().unwrap_or_default();
        if asked > RETRY_AFTER_MAX {
            return None;
        }
        let backoff = self
            .timing
            .first_backoff
            .saturating_mul(1 << (self.round - 1).min(16))
            .min(BACKOFF_MAX);
        // Jitter: agents that lost the same registry at once do not come back at once.
        Some(backoff.mul_f32(rand::random_range(0.75..1.25)).max(asked))
    }

    fn conclude(&mut self) -> ImageError {
        let Subject {
            host,
            reference,
            what,
            size_bytes,
        } = self.subject;
        let (host, what) = (host.to_owned(), what.to_owned());
        let last = self.failures.len().saturating_sub(1);
        let upstream = self.failures.get_mut(last).and_then(Option::take);
        match upstream {
            Some(Failure::Missing) => ImageError::NotFound {
                reference: reference.to_owned(),
                host,
            },
            Some(Failure::Refused(reason)) => ImageError::Denied {
                reference: reference.to_owned(),
                host,
                reason,
            },
            Some(Failure::Tls(reason)) => ImageError::Tls {
                endpoint: self.endpoints[last].base(),
                reason,
            },
            Some(Failure::Busy(retry_after)) => ImageError::RateLimited { host, retry_after },
            Some(Failure::Stalled) => ImageError::Stalled {
                host,
                what,
                after: self.timing.stall,
            },
            Some(Failure::Short(actual_bytes)) => match size_bytes {
                Some(expected_bytes) => ImageError::SizeMismatch {
                    what,
                    expected_bytes,
                    actual_bytes,
                },
                None => ImageError::UnexpectedAnswer {
                    host,
                    request: what,
                    reason: "the content ended early".into(),
                },
            },
            Some(Failure::Beyond) => ImageError::UnexpectedAnswer {
                host,
                request: what,
                reason: "the content is shorter than described".into(),
            },
            Some(Failure::Odd(reason)) => ImageError::UnexpectedAnswer {
                host,
                request: what,
                reason,
            },
            Some(Failure::Wrong(error)) => *error,
            other => {
                self.failures[last] = other;
                let tried =
                    self.endpoints
                        .iter()
                        .zip(&self.failures)
                        .filter_map(|(endpoint, failure)| {
                            failure.as_ref().map(|failure| EndpointFailure {
                                endpoint: endpoint.base(),
                                reason: failure.describe(),
                            })
                        });
                ImageError::RegistryUnavailable {
                    host,
                    tried: tried.collect(),
                }
            }
        }
    }
}
