//! `attach`: this terminal, connected to the first process of a container.

use anyhow::Result;
use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use futures_util::{Stream, StreamExt as _, stream::BoxStream};
use longshore_client::{
    Address, Client, Error,
    proto::{
        AttachRequest, AttachResponse, AttachStart, CloseStdin, TerminalSize, attach_request,
        attach_response,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::run;
use crate::{
    app::App,
    complete::{First, Live},
    exit_code::ExitCode,
    find::Things,
    human,
    session::{self, Chunk, End, Input, Session},
    terminal::{self, DetachKeys},
};

/// The keys of docker, which fingers know.
pub(crate) const DETACH_KEYS: &str = "ctrl-p,ctrl-q";

/// An attached container: where input goes, and what comes out.
pub(crate) struct Connection {
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) outputs: BoxStream<'static, Result<Chunk>>,
}

/// Connects; the agent has said that it worked when this returns.
pub(crate) async fn connect(
    client: &Client,
    id: &str,
    stdin: bool,
    terminal_size: Option<TerminalSize>,
) -> Result<Connection, Error> {
    let start = AttachStart {
        container_id: id.to_owned(),
        stdin,
        terminal_size,
        replay: false,
    };
    begin(client, start).await
}

/// The same, with all that can be said.
pub(crate) async fn begin(client: &Client, start: AttachStart) -> Result<Connection, Error> {
    let (inputs, queue) = session::inputs();
    let start = futures_util::stream::iter([attach_request::Frame::Start(start)]);
    let requests = start
        .chain(ReceiverStream::new(queue).map(request))
        .map(|frame| AttachRequest { frame: Some(frame) });
    let mut lifecycle = client.lifecycle();
    let mut answers = client.call(lifecycle.attach(requests)).await?;
    // The first message says that it is attached; a refusal may come in its place.
    let address = client.address().clone();
    let read = |status| Error::from_status(&address, status);
    if answers.message().await.map_err(read)?.is_none() {
        return Err(Error::Incomplete {
            address: client.address().clone(),
            expected: "the container was attached",
        });
    }
    Ok(Connection {
        inputs,
        outputs: chunks(client.address().clone(), answers).boxed(),
    })
}

/// One row more than there is: the true size, which a session sends first, then makes a program that
/// has drawn its screen draw it anew.
pub(crate) fn taller(size: TerminalSize) -> TerminalSize {
    TerminalSize {
        rows: size.rows + 1,
        ..size
    }
}

fn request(input: Input) -> attach_request::Frame {
    match input {
        Input::Stdin(bytes) => attach_request::Frame::Stdin(bytes.into()),
        Input::CloseStdin => attach_request::Frame::CloseStdin(CloseStdin {}),
        Input::Resize { columns, rows } => {
            attach_request::Frame::Resize(TerminalSize { columns, rows })
        }
    }
}

fn chunks(
    address: Address,
    answers: impl Stream<Item = Result<AttachResponse, tonic::Status>>,
) -> impl Stream<Item = Result<Chunk>> {
    answers.map(move |answer| {
        let answer = answer.map_err(|status| Error::from_status(&address, status))?;
        Ok(match answer.frame {
            Some(attach_response::Frame::Stdout(bytes)) => Chunk::Stdout(bytes),
            Some(attach_response::Frame::Stderr(bytes)) => Chunk::Stderr(bytes),
            Some(attach_response::Frame::Exit(exit)) => {
                Chunk::Exited(i32::try_from(exit.code).unwrap_or(255))
            }
            Some(attach_response::Frame::Started(_)) | None => Chunk::Nothing,
        })
    })
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// Only show what it writes
    #[arg(long)]
    no_stdin: bool,
    /// Keys that leave it running
    #[arg(long, value_name = "KEYS", default_value = DETACH_KEYS, value_parser = DetachKeys::parse)]
    detach_keys: DetachKeys,
    #[arg(value_name = "CONTAINER", add = ArgValueCompleter::new(First(Live::Containers)))]
    container: String,
}

impl Attach {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let things = Things::read(&client).await?;
        let container = things.find_container(&self.container)?;
        let stdin = container.stdin && !self.no_stdin;
        let size = terminal::size()
            .filter(|_| container.tty)
            .map(|(columns, rows)| taller(TerminalSize { columns, rows }));
        let connection = connect(&client, &container.id, stdin, size).await?;
        let session = Session {
            stdin,
            tty: container.tty,
            detach: self.detach_keys,
            signals: None,
        };
        match session.run(connection.inputs, connection.outputs).await? {
            End::Exited(code) => Ok(ExitCode::of_process(code)),
            End::Closed => Ok(ExitCode::of_process(
                run::wait(&client, &container.id).await?,
            )),
            End::Detached => {
                terminal::note(&format!("{} runs on", human::short_id(&container.id)));
                Ok(ExitCode::OK)
            }
            End::Interrupted(signal) => Ok(ExitCode::of_process(128 + signal)),
        }
    }
}
