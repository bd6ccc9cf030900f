//! Logs: a container's log as messages of several entries.

use futures_util::{StreamExt as _, stream};
use longshore_proto::longshore::v1 as pb;
use tokio::sync::watch;
use tonic::Status;

use super::{Native, Streamed, error::NativeError, parse, refused, render};
use crate::{
    id::Face,
    lifecycle::{
        LifecycleError,
        container::Container,
        logs::{self, LogEntry, LogError, LogOptions, LogStream},
    },
};

/// Most entries of one message, each of at most 16 KiB.
const ENTRIES: usize = 64;

impl Native {
    /// The wished part of a container's log.
    pub(super) fn log_stream(
        &self,
        container: &Container,
        request: pb::LogsRequest,
    ) -> Result<Streamed<pb::LogsResponse>, Status> {
        let (stdout, stderr) = parse::log_streams(&request.streams).map_err(refused)?;
        let options = LogOptions {
            follow: request.follow,
            since: request
                .since
                .as_ref()
                .map(|since| parse::time("since", since))
                .transpose()
                .map_err(refused)?,
            tail_lines: request.tail_lines,
            stdout,
            stderr,
        };
        let id = container.id.to_string();
        let log = container
            .config
            .log
            .as_ref()
            .ok_or_else(|| refused(no_log(&id)))?;
        let entries = logs::read(log.path.clone(), options, self.running(container));
        let messages = entries
            .ready_chunks(ENTRIES)
            .flat_map(move |chunk| stream::iter(messages(chunk, &id)));
        Ok(Box::pin(messages))
    }

    /// Becomes false when the container has ended; nobody waits for that once it is not asked.
    fn running(&self, container: &Container) -> watch::Receiver<bool> {
        let (running, receiver) = watch::channel(container.exit().is_none());
        let (lifecycle, id) = (
            std::sync::Arc::clone(self.lifecycle()),
            container.id.clone(),
        );
        if container.exit().is_none() {
            tokio::spawn(async move {
                tokio::select! {
                    // Removed is ended too.
                    _ = lifecycle.wait_container(Face::Native, id.as_str()) => { running.send_replace(false); }
                    () = running.closed() => {}
                }
            });
        }
        receiver
    }
}

fn no_log(id: &str) -> LifecycleError {
    LifecycleError::Lacks {
        id: id.to_owned(),
        what: "log",
    }
}

/// What was read at once: entries, and an error behind them.
fn messages(
    chunk: Vec<Result<LogEntry, LogError>>,
    id: &str,
) -> Vec<Result<pb::LogsResponse, Status>> {
    let mut entries = Vec::with_capacity(chunk.len());
    let mut failed = None;
    for entry in chunk {
        match entry {
            Ok(entry) => entries.push(rendered(entry)),
            Err(LogError::Missing { .. }) => failed = Some(refused(no_log(id))),
            Err(error) => failed = Some(refused(NativeError::Log(std::sync::Arc::new(error)))),
        }
    }
    let mut messages = Vec::new();
    if !entries.is_empty() {
        messages.push(Ok(pb::LogsResponse { entries }));
    }
    messages.extend(failed.map(Err));
    messages
}

fn rendered(entry: LogEntry) -> pb::LogEntry {
    pb::LogEntry {
        time: Some(render::timestamp(entry.time)),
        stream: match entry.stream {
            LogStream::Stdout => pb::LogStream::Stdout,
            LogStream::Stderr => pb::LogStream::Stderr,
        }
        .into(),
        data: entry.data,
        partial: entry.partial,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Time;

    #[test]
    fn entries_come_before_the_error_that_ends_them() {
        let entry = || {
            Ok(LogEntry {
                time: Time::from_unix_ns(1),
                stream: LogStream::Stderr,
                data: "x".into(),
                partial: true,
            })
        };
        let missing = || Err(LogError::Missing { path: "/x".into() });
        let shape = |chunk| -> Vec<Result<usize, tonic::Code>> {
            messages(chunk, "id")
                .into_iter()
                .map(|message| {
                    message
                        .map(|message| message.entries.len())
                        .map_err(|status| status.code())
                })
                .collect()
        };
        assert_eq!(shape(vec![entry(), entry()]), [Ok(2)]);
        assert_eq!(
            shape(vec![entry(), missing()]),
            [Ok(1), Err(tonic::Code::FailedPrecondition)]
        );
        assert_eq!(
            shape(vec![missing()]),
            [Err(tonic::Code::FailedPrecondition)]
        );
    }
}
