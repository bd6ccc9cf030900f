//! The caller's deadline: an answer that says where the time went comes just before it.

use std::{future::Future, time::Duration};

use tonic::{Status, metadata::MetadataMap};

use super::{error::NativeError, refused};
use crate::{clock::Time, service::deadline};

/// The answer takes time too: this much before the deadline the wait ends.
const MARGIN: Duration = Duration::from_millis(50);

/// Time that a call has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadline(Option<Duration>);

impl Deadline {
    /// Reads it from the metadata of a call.
    pub(super) fn of(metadata: &MetadataMap) -> Self {
        Self(deadline::wished(metadata.as_ref()))
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

#[cfg(test)]
mod tests {
    use super::*;

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
