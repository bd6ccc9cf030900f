//! Exec and Attach: two streams around a session.
//!
//! ```text
//!  caller: start  stdin, sizes ...  end        agent: started  output ...  exit
//!            |         |                                |         ^          ^
//!          open --> write (waits for the process)    copy x 2 (wait for the caller)
//! ```
//! Everything of a dialogue is one task. It ends with the response stream: dropping it drops the
//! session, which kills an exec and lets go of a container.

use std::{
    future::Future,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use longshore_proto::longshore::v1 as pb;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Native, Streamed, error::NativeError, parse, refused, render};
use crate::{
    id::{ContainerId, Face},
    lifecycle::{
        container::Container,
        session::{Output, Session, SessionExit, Stdin},
    },
    service::edge,
};

/// Messages to a caller who does not read yet; each is at most one read of a pipe.
const BUFFERED: usize = 4;
/// After the end of a process, its output is complete when nothing came for this long: a child that
/// it left behind may hold the pipe for ever.
const QUIET: Duration = Duration::from_millis(100);

/// What a caller sends.
pub(super) enum Frame<S> {
    Start(S),
    Stdin(Bytes),
    CloseStdin,
    Resize(pb::TerminalSize),
    Nothing,
}

/// The words of one of the two RPCs.
pub(super) trait Dialogue: Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;
    type Start: Send;

    fn frame(request: Self::Request) -> Frame<Self::Start>;

    /// Checks the start and connects.
    fn open(
        native: &Native,
        start: Self::Start,
    ) -> impl Future<Output = Result<(Session, ContainerId), Status>> + Send;

    fn started(session: &Session) -> Self::Response;

    fn stdout(bytes: Bytes) -> Self::Response;

    fn stderr(bytes: Bytes) -> Self::Response;

    fn exit(native: &Native, container: &ContainerId, exit: SessionExit) -> Self::Response;
}

/// Runs a dialogue on its own task.
pub(super) fn run<D: Dialogue>(
    native: Native,
    requests: Streaming<D::Request>,
) -> Streamed<D::Response> {
    let (out, responses) = mpsc::channel(BUFFERED);
    tokio::spawn(async move {
        let caller = out.clone();
        // Either arm may be dropped: what holds a session gives it back when it is.
        tokio::select! {
            result = talk::<D>(&native, requests, &out) => {
                if let Err(status) = result {
                    // A caller who left needs no reason.
                    let _ = out.send(Err(status)).await;
                }
            }
            () = caller.closed() => {}
        }
    });
    Box::pin(ReceiverStream::new(responses))
}

type Out<D> = mpsc::Sender<Result<<D as Dialogue>::Response, Status>>;

async fn talk<D: Dialogue>(
    native: &Native,
    mut requests: Streaming<D::Request>,
    out: &Out<D>,
) -> Result<(), Status> {
    let unexpected = || refused(NativeError::Unexpected { expected: "start" });
    let start = match requests.message().await?.map(D::frame) {
        Some(Frame::Start(start)) => start,
        _ => return Err(unexpected()),
    };
    let (session, container) = D::open(native, start).await?;
    send::<D>(out, D::started(&session)).await?;
    let Session {
        stdin,
        stdout,
        stderr,
        mut control,
        ..
    } = session;
    let (sizes, mut resizes) = mpsc::channel(1);
    let progress = Progress::default();
    let input = listen::<D>(requests, stdin, sizes);
    let output = async {
        tokio::join!(
            copy::<D>(stdout, D::stdout, out, &progress),
            copy::<D>(stderr, D::stderr, out, &progress),
        )
    };
    tokio::pin!(input, output);
    let (mut listening, mut copying) = (true, true);
    let exit = loop {
        // Waiting for the exit and for sizes may be dropped and begun again; the others go on.
        tokio::select! {
            heard = &mut input, if listening => {
                heard?;
                listening = false;
            }
            _ = &mut output, if copying => copying = false,
            Some(Resize { columns, rows, done }) = resizes.recv() => {
                if let Err(error) = control.resize(columns, rows).await {
                    tracing::debug!(container_id = %container, error = &error as &dyn std::error::Error, "not resized");
                }
                // Nobody waits for it once the caller is gone.
                let _ = done.send(());
            }
            exit = control.exit() => break exit,
        }
    };
    while copying {
        let before = progress.chunks();
        // Output first: what is there counts as progress even if the time is up as well.
        tokio::select! {
            biased;
            _ = &mut output => copying = false,
            () = tokio::time::sleep(QUIET) => copying = !progress.is_quiet_since(before),
        }
    }
    send::<D>(out, D::exit(native, &container, exit)).await
}

/// A new size; what the caller sends after it waits until it is set.
struct Resize {
    columns: u16,
    rows: u16,
    done: oneshot::Sender<()>,
}

async fn send<D: Dialogue>(out: &Out<D>, response: D::Response) -> Result<(), Status> {
    out.send(Ok(response))
        .await
        .map_err(|_| Status::cancelled("the caller left"))
}

/// How much was copied, and whether somebody waits for the caller.
#[derive(Default)]
struct Progress {
    chunks: AtomicUsize,
    sending: AtomicUsize,
}

impl Progress {
    fn chunks(&self) -> usize {
        self.chunks.load(Ordering::Relaxed)
    }

    fn is_quiet_since(&self, before: usize) -> bool {
        self.chunks() == before && self.sending.load(Ordering::Relaxed) == 0
    }
}

/// Passes output on until its end; a slow caller slows the process.
async fn copy<D: Dialogue>(
    output: Option<Output>,
    frame: fn(Bytes) -> D::Response,
    out: &Out<D>,
    progress: &Progress,
) {
    let Some(mut output) = output else { return };
    while let Some(bytes) = output.next().await {
        progress.chunks.fetch_add(1, Ordering::Relaxed);
        progress.sending.fetch_add(1, Ordering::Relaxed);
        let sent = out.send(Ok(frame(bytes))).await;
        progress.sending.fetch_sub(1, Ordering::Relaxed);
        if sent.is_err() {
            return;
        }
    }
}

/// Takes what the caller sends, as fast as the process reads; its end is the end of stdin.
async fn listen<D: Dialogue>(
    mut requests: Streaming<D::Request>,
    mut stdin: Option<Stdin>,
    sizes: mpsc::Sender<Resize>,
) -> Result<(), Status> {
    while let Some(request) = requests.message().await? {
        match D::frame(request) {
            Frame::Start(_) => {
                let expected = "stdin, close_stdin or resize";
                return Err(refused(NativeError::Unexpected { expected }));
            }
            Frame::Stdin(bytes) => {
                if bytes.len() > parse::STDIN_BYTES {
                    return Err(refused(NativeError::range(
                        "stdin",
                        bytes.len(),
                        0,
                        parse::STDIN_BYTES,
                    )));
                }
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&bytes).await.is_err()
                {
                    // The process reads no more, which is its right.
                    stdin = None;
                }
            }
            Frame::CloseStdin => close(stdin.take()).await,
            Frame::Resize(size) => {
                let (columns, rows) = parse::terminal_size("resize", size).map_err(refused)?;
                let (done, is_set) = oneshot::channel();
                // An error means that the process has ended, and with it all that is left to do.
                if sizes
                    .send(Resize {
                        columns,
                        rows,
                        done,
                    })
                    .await
                    .is_ok()
                {
                    let _ = is_set.await;
                }
            }
            Frame::Nothing => return Err(refused(NativeError::missing("frame"))),
        }
    }
    close(stdin).await;
    Ok(())
}

async fn close(stdin: Option<Stdin>) {
    if let Some(stdin) = stdin {
        stdin.close().await;
    }
}

/// Exec.
pub(super) struct Exec;

impl Dialogue for Exec {
    type Request = pb::ExecRequest;
    type Response = pb::ExecResponse;
    type Start = pb::ExecStart;

    fn frame(request: pb::ExecRequest) -> Frame<pb::ExecStart> {
        use pb::exec_request::Frame as Sent;
        match request.frame {
            Some(Sent::Start(start)) => Frame::Start(start),
            Some(Sent::Stdin(bytes)) => Frame::Stdin(bytes),
            Some(Sent::CloseStdin(_)) => Frame::CloseStdin,
            Some(Sent::Resize(size)) => Frame::Resize(size),
            None => Frame::Nothing,
        }
    }

    async fn open(native: &Native, start: pb::ExecStart) -> Result<(Session, ContainerId), Status> {
        edge::id("start.container_id", &start.container_id).map_err(refused)?;
        let id = start.container_id.clone();
        let wish = parse::exec(start).map_err(refused)?;
        let container = native.container("start.container_id", &id)?;
        let session = native
            .lifecycle()
            .exec(Face::Native, container.id.as_str(), wish)
            .await
            .map_err(refused)?;
        Ok((session, container.id.clone()))
    }

    fn started(session: &Session) -> pb::ExecResponse {
        let pid = session
            .pid
            .and_then(|pid| u32::try_from(pid).ok())
            .unwrap_or(0);
        said(pb::exec_response::Frame::Started(pb::ExecStarted { pid }))
    }

    fn stdout(bytes: Bytes) -> pb::ExecResponse {
        said(pb::exec_response::Frame::Stdout(bytes))
    }

    fn stderr(bytes: Bytes) -> pb::ExecResponse {
        said(pb::exec_response::Frame::Stderr(bytes))
    }

    fn exit(_: &Native, _: &ContainerId, exit: SessionExit) -> pb::ExecResponse {
        said(pb::exec_response::Frame::Exit(render::exec_exit(exit)))
    }
}

fn said(frame: pb::exec_response::Frame) -> pb::ExecResponse {
    pb::ExecResponse { frame: Some(frame) }
}

/// Attach.
pub(super) struct Attach;

impl Dialogue for Attach {
    type Request = pb::AttachRequest;
    type Response = pb::AttachResponse;
    type Start = pb::AttachStart;

    fn frame(request: pb::AttachRequest) -> Frame<pb::AttachStart> {
        use pb::attach_request::Frame as Sent;
        match request.frame {
            Some(Sent::Start(start)) => Frame::Start(start),
            Some(Sent::Stdin(bytes)) => Frame::Stdin(bytes),
            Some(Sent::CloseStdin(_)) => Frame::CloseStdin,
            Some(Sent::Resize(size)) => Frame::Resize(size),
            None => Frame::Nothing,
        }
    }

    async fn open(
        native: &Native,
        start: pb::AttachStart,
    ) -> Result<(Session, ContainerId), Status> {
        edge::id("start.container_id", &start.container_id).map_err(refused)?;
        let wish = parse::attach(&start).map_err(refused)?;
        let container = native.container("start.container_id", &start.container_id)?;
        let session = native
            .lifecycle()
            .attach(Face::Native, container.id.as_str(), wish)
            .await
            .map_err(refused)?;
        Ok((session, container.id.clone()))
    }

    fn started(session: &Session) -> pb::AttachResponse {
        heard(pb::attach_response::Frame::Started(pb::AttachStarted {
            tty: session.tty,
        }))
    }

    fn stdout(bytes: Bytes) -> pb::AttachResponse {
        heard(pb::attach_response::Frame::Stdout(bytes))
    }

    fn stderr(bytes: Bytes) -> pb::AttachResponse {
        heard(pb::attach_response::Frame::Stderr(bytes))
    }

    fn exit(native: &Native, container: &ContainerId, exit: SessionExit) -> pb::AttachResponse {
        let record = native
            .agent
            .store
            .snapshot()
            .get::<Container>(container.as_str());
        let known = record.as_ref().and_then(|container| container.exit());
        heard(pb::attach_response::Frame::Exit(known.map_or_else(
            || pb::Exit {
                code: u32::try_from(exit.code).unwrap_or(255),
                signal: u32::try_from(exit.signal).unwrap_or(0),
                reason: pb::ExitReason::Lost.into(),
                message: "the container was removed".to_owned(),
            },
            render::exit,
        )))
    }
}

fn heard(frame: pb::attach_response::Frame) -> pb::AttachResponse {
    pb::AttachResponse { frame: Some(frame) }
}
