//! `exec`: one more command in a running container.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use futures_util::StreamExt as _;
use longshore_client::{
    Client, Error,
    proto::{CloseStdin, ExecRequest, ExecStart, TerminalSize, exec_request, exec_response},
};
use tokio_stream::wrappers::ReceiverStream;

use super::run::handed_over;
use crate::{
    app::App,
    complete::{First, Live},
    error::Problem,
    exit_code::ExitCode,
    find::Things,
    human, parse,
    session::{self, Chunk, End, Input, Session},
    terminal::{self, DetachKeys},
};

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Connect standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable; without =VALUE it is handed over from here
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = parse::pair)]
    env: Vec<parse::Pair>,
    /// Run as this user: NAME or UID, with :GROUP or :GID
    #[arg(short, long)]
    user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// Kill it and what it started after this time
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    timeout: Option<Duration>,
    /// The container, and the command with its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true,
          value_names = ["CONTAINER", "COMMAND"],
          add = ArgValueCompleter::new(First(Live::Containers)))]
    container_and_command: Vec<String>,
}

impl Exec {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        if self.tty && self.interactive && !terminal::interactive() {
            return Err(Problem::Usage(
                "-t needs a terminal, and this is none: leave it out, or run in one".into(),
            )
            .into());
        }
        let client = app.client().await?;
        let things = Things::read(&client).await?;
        let (name, command) = match self.container_and_command.split_first() {
            Some((name, command)) => (name, command),
            None => {
                return Err(Problem::Usage("a container and a command are needed".into()).into());
            }
        };
        let mut env = handed_over(self.env);
        if self.tty {
            env.entry("TERM".into())
                .or_insert_with(|| std::env::var("TERM").unwrap_or_else(|_| "xterm".into()));
        }
        let start = ExecStart {
            container_id: things.find_container(name)?.id.clone(),
            command: command.to_vec(),
            env,
            working_dir: self.workdir.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            tty: self.tty,
            stdin: self.interactive,
            terminal_size: terminal::size()
                .filter(|_| self.tty)
                .map(|(columns, rows)| TerminalSize { columns, rows }),
            timeout: self.timeout.map(human::wire_duration),
        };
        run_in(&client, start, self.timeout).await
    }
}

/// Runs a command in a container, joined to what `shore` itself is joined to.
pub(crate) async fn run_in(
    client: &Client,
    start: ExecStart,
    timeout: Option<Duration>,
) -> Result<ExitCode> {
    let (tty, stdin) = (start.tty, start.stdin);
    let (inputs, queue) = session::inputs();
    let start = futures_util::stream::iter([exec_request::Frame::Start(start)]);
    let requests = start
        .chain(ReceiverStream::new(queue).map(request))
        .map(|frame| ExecRequest { frame: Some(frame) });
    let mut lifecycle = client.lifecycle();
    let answers = client.call(lifecycle.exec(requests)).await?;
    let outputs = answers.map(|answer| {
        let answer = answer.map_err(|status| Error::from_status(client.address(), status))?;
        Ok(chunk(answer.frame, timeout))
    });
    let session = Session {
        stdin,
        tty,
        // Leaving a command kills it: there is nothing to come back to.
        detach: DetachKeys::none(),
        signals: None,
    };
    match session.run(inputs, outputs).await? {
        End::Exited(code) => Ok(ExitCode::of_process(code)),
        End::Interrupted(signal) => Ok(ExitCode::of_process(128 + signal)),
        End::Closed | End::Detached => Err(Error::Incomplete {
            address: client.address().clone(),
            expected: "the command had ended",
        }
        .into()),
    }
}

fn request(input: Input) -> exec_request::Frame {
    match input {
        Input::Stdin(bytes) => exec_request::Frame::Stdin(bytes.into()),
        Input::CloseStdin => exec_request::Frame::CloseStdin(CloseStdin {}),
        Input::Resize { columns, rows } => {
            exec_request::Frame::Resize(TerminalSize { columns, rows })
        }
    }
}

fn chunk(message: Option<exec_response::Frame>, timeout: Option<Duration>) -> Chunk {
    match message {
        Some(exec_response::Frame::Stdout(bytes)) => Chunk::Stdout(bytes),
        Some(exec_response::Frame::Stderr(bytes)) => Chunk::Stderr(bytes),
        Some(exec_response::Frame::Exit(exit)) => {
            if exit.timed_out {
                let after = human::span(timeout.unwrap_or_default());
                terminal::note(&format!(
                    "shore: the command was killed: its {after} were over"
                ));
            }
            Chunk::Exited(i32::try_from(exit.code).unwrap_or(255))
        }
        Some(exec_response::Frame::Started(_)) | None => Chunk::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::cmd::{Cli, Command};

    #[test]
    fn options_end_at_the_container() {
        let cli = Cli::try_parse_from("shore exec -i web ls -t -e".split(' ')).expect("valid");
        let Command::Exec(exec) = cli.command else {
            panic!("not exec")
        };
        assert!(exec.interactive && !exec.tty && exec.env.is_empty());
        assert_eq!(exec.container_and_command, ["web", "ls", "-t", "-e"]);
        assert!(Cli::try_parse_from("shore exec web".split(' ')).is_err());
    }
}
