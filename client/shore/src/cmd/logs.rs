//! `logs`: what a container wrote, and goes on writing.

use std::io::{self, Write};

use anyhow::Result;
use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use longshore_client::{
    Client, Error, Retry,
    proto::{LogEntry, LogStream, LogsRequest},
};

use super::run;
use crate::{
    app::App,
    complete::{First, Live},
    exit_code::ExitCode,
    find::Things,
    human,
    output::json,
    parse,
    session::End,
};

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Go on until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Only this many last lines
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = tail)]
    tail: Lines,
    /// Only what was written since: 10m, or 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Timestamp>,
    /// Show when each line was written
    #[arg(short, long)]
    timestamps: bool,
    #[arg(value_name = "CONTAINER", add = ArgValueCompleter::new(First(Live::Containers)))]
    container: String,
}

/// A number of lines, or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lines(Option<u64>);

fn tail(text: &str) -> Result<Lines, String> {
    match text {
        "all" | "-1" => Ok(Lines(None)),
        text => text
            .parse()
            .map(|lines| Lines(Some(lines)))
            .map_err(|_| format!("`{text}` is no number of lines: write 100, or all")),
    }
}

fn since(text: &str) -> Result<Timestamp, String> {
    parse::instant(text, Timestamp::now())
}

impl Logs {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let things = Things::read(&client).await?;
        let request = LogsRequest {
            container_id: things.find_container(&self.container)?.id.clone(),
            follow: self.follow,
            since: self.since.map(human::wire_time),
            tail_lines: self.tail.0,
            streams: Vec::new(),
        };
        let mut printer = Printer::new(self.timestamps);
        read(&client, request, |entry| {
            if app.output.for_programs() {
                app.output.item(&json(entry)?)
            } else {
                Ok(printer.show(entry)?)
            }
        })
        .await?;
        Ok(ExitCode::OK)
    }
}

fn put(mut to: impl Write, text: &[u8]) -> io::Result<()> {
    to.write_all(text)?;
    to.flush()
}

/// Shows the whole log until the container has ended, for a `run` that could not be attached.
pub(crate) async fn until_exit(client: &Client, id: &str) -> Result<End> {
    let request = LogsRequest {
        container_id: id.to_owned(),
        follow: true,
        ..Default::default()
    };
    let mut printer = Printer::new(false);
    read(client, request, |entry| Ok(printer.show(entry)?)).await?;
    Ok(End::Exited(run::wait(client, id).await?))
}

/// Hands each entry to `show`; a log that is followed goes on after a restart of the agent, from
/// the last entry seen.
async fn read(
    client: &Client,
    mut request: LogsRequest,
    mut show: impl FnMut(&LogEntry) -> Result<()>,
) -> Result<()> {
    let mut attempt = 1;
    loop {
        let mut lifecycle = client.lifecycle();
        let opened = client.call(lifecycle.logs(request.clone())).await;
        let error = match opened {
            Ok(mut stream) => loop {
                match stream.message().await {
                    Ok(Some(message)) => {
                        attempt = 1;
                        for entry in &message.entries {
                            show(entry)?;
                            request.since = entry.time.map(just_after).or(request.since);
                            request.tail_lines = None;
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => break Error::from_status(client.address(), status),
                }
            },
            Err(error) => error,
        };
        match Retry::PATIENT.wait_after(attempt, None) {
            Some(wait) if request.follow && error.is_unavailable() => {
                tokio::time::sleep(wait).await
            }
            _ => return Err(error.into()),
        }
        attempt += 1;
    }
}

/// The next instant that a log can tell apart.
fn just_after(time: prost_types::Timestamp) -> prost_types::Timestamp {
    if time.nanos >= 999_999_999 {
        prost_types::Timestamp {
            seconds: time.seconds + 1,
            nanos: 0,
        }
    } else {
        prost_types::Timestamp {
            nanos: time.nanos + 1,
            ..time
        }
    }
}

/// Puts the pieces of long lines together again, on each stream for itself.
#[derive(Debug)]
struct Printer {
    timestamps: bool,
    /// Whether the last piece of stdout, of stderr, left its line open.
    open: [bool; 2],
}

impl Printer {
    fn new(timestamps: bool) -> Self {
        Self {
            timestamps,
            open: [false; 2],
        }
    }

    /// Writes `entry` to where the container wrote it.
    fn show(&mut self, entry: &LogEntry) -> io::Result<()> {
        let text = self.print(entry);
        if entry.stream() == LogStream::Stderr {
            put(io::stderr().lock(), &text)
        } else {
            put(io::stdout().lock(), &text)
        }
    }

    fn print(&mut self, entry: &LogEntry) -> Vec<u8> {
        let open = &mut self.open[usize::from(entry.stream() == LogStream::Stderr)];
        let mut text = Vec::with_capacity(entry.data.len() + 40);
        if self.timestamps
            && !*open
            && let Some(time) = human::time(entry.time)
        {
            text.extend_from_slice(format!("{time:.9} ").as_bytes());
        }
        text.extend_from_slice(&entry.data);
        if !entry.partial {
            text.push(b'\n');
        }
        *open = entry.partial;
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(stream: LogStream, data: &'static str, partial: bool) -> LogEntry {
        LogEntry {
            time: Some(prost_types::Timestamp {
                seconds: 1,
                nanos: 5,
            }),
            stream: stream.into(),
            data: data.into(),
            partial,
        }
    }

    #[test]
    fn pieces_of_a_line_become_one_with_one_time() {
        let mut printer = Printer::new(true);
        let mut print = |entry| String::from_utf8(printer.print(&entry)).expect("text");
        assert_eq!(
            print(entry(LogStream::Stdout, "ab", true)),
            "1970-01-01T00:00:01.000000005Z ab"
        );
        assert_eq!(
            print(entry(LogStream::Stderr, "x", false)),
            "1970-01-01T00:00:01.000000005Z x\n"
        );
        assert_eq!(print(entry(LogStream::Stdout, "cd", false)), "cd\n");
    }

    #[test]
    fn lines_and_the_instant_after() {
        assert_eq!(tail("all"), Ok(Lines(None)));
        assert_eq!(tail("0"), Ok(Lines(Some(0))));
        assert!(tail("some").is_err());
        let at = |seconds, nanos| prost_types::Timestamp { seconds, nanos };
        assert_eq!(just_after(at(1, 5)), at(1, 6));
        assert_eq!(just_after(at(1, 999_999_999)), at(2, 0));
    }
}
