//! The caller's deadline: an answer that says where the time went comes just before it.

use std::{future::Future, time::Duration};

use tonic::{Status, metadata::MetadataMap};

use super::{error::NativeError, refused};
use crate::clock::Time;

/// The answer takes time too: this much before the deadline the wait ends.
const MARGIN: Duration = Duration::from_millis(50);

/// Time that a call has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadline(Option<Duration>);

impl Deadline {
    /// Reads `grpc-timeout`; a malformed one is none, as for the transport.
    ///
    /// Source: gRPC over HTTP2, "Timeout".
    pub(super) fn of(metadata: &MetadataMap) -> Self {
        let text = metadata
            .get("grpc-timeout")
            .and_then(|value| value.to_str().ok());
        Self(text.and_then(parse))
    }

    /// Waits for `work` within the deadline; `stage` tells what it is doing, and since when.
    pub(super) async fn limit<T>(
        self,
        stage: impl FnOnce() -> (String, Time),
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        let Some(total) = self.0 else {
            return work.await;
        };
        match tokio::time::timeout(total - MARGIN.min(total / 10), work).await {
            Ok(done) => done,
            Err(_) => {
                let (stage, since) = stage();
                let waited = (Time::now().unix_ns() - since.unix_ns()).max(0);
                Err(refused(NativeError::Deadline {
                    stage,
                    seconds: Duration::from_nanos(waited.cast_unsigned()).as_secs_f64(),
                }))
            }
        }
    }
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number = digits.parse::<u64>().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_protocol_has_them() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("99999999m", Some(Duration::from_millis(99_999_999))),
            ("5u", Some(Duration::from_micros(5))),
            ("0n", Some(Duration::ZERO)),
            ("999999999m", None),
            ("", None),
            ("m", None),
            ("-1S", None),
            ("1x", None),
            ("1é", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[tokio::test]
    async fn the_answer_names_the_stage_before_the_deadline() {
        let deadline = Deadline(Some(Duration::from_millis(20)));
        let stage = || ("attach".to_owned(), Time::from_unix_ns(0));
        let status = deadline
            .limit(stage, std::future::pending::<Result<(), Status>>())
            .await
            .expect_err("time is up");
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        assert!(status.message().contains("attach"), "{status:?}");
    }
}
