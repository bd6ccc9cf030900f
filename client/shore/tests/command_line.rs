//! The built `shore` as scripts use it: its standard streams and its exit codes.
//!
//! The other side is a small server of the lifecycle service on a unix socket with two pods, whose
//! `Exec` runs the command as a process of this host: real pipes, real exit codes.

use std::{
    io::{Read as _, Write as _},
    path::PathBuf,
    pin::Pin,
    process::{Command, Output, Stdio},
    time::Duration,
};

use futures_util::{Stream, StreamExt as _};
use longshore_client::proto::{
    self, Container, ContainerState, ExecExit, ExecRequest, ExecResponse, ExecStarted, LogEntry,
    LogStream, LogsRequest, LogsResponse, Sandbox, SandboxState, exec_request, exec_response,
    lifecycle_service_server::{LifecycleService, LifecycleServiceServer},
};
use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, tcgetattr},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
    sync::mpsc,
};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt as _};

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Agent;

/// Verbs that these tests have no use for.
macro_rules! absent {
    ($($verb:ident($request:ident) -> $response:ident;)*) => {
        $(fn $verb<'a, 'b>(
            &'a self,
            _: Request<proto::$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<proto::$response>, Status>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($verb))) })
        })*
    };
}

#[tonic::async_trait]
impl LifecycleService for Agent {
    type ExecStream = Streamed<ExecResponse>;
    type AttachStream = Streamed<proto::AttachResponse>;
    type LogsStream = Streamed<LogsResponse>;
    type StatsStream = Streamed<proto::StatsResponse>;

    absent! {
        run_sandbox(RunSandboxRequest) -> RunSandboxResponse;
        stop_sandbox(StopSandboxRequest) -> StopSandboxResponse;
        remove_sandbox(RemoveSandboxRequest) -> RemoveSandboxResponse;
        get_sandbox(GetSandboxRequest) -> GetSandboxResponse;
        create_container(CreateContainerRequest) -> CreateContainerResponse;
        start_container(StartContainerRequest) -> StartContainerResponse;
        stop_container(StopContainerRequest) -> StopContainerResponse;
        signal_container(SignalContainerRequest) -> SignalContainerResponse;
        remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
        get_container(GetContainerRequest) -> GetContainerResponse;
        wait_container(WaitContainerRequest) -> WaitContainerResponse;
    }

    async fn list_sandboxes(
        &self,
        _: Request<proto::ListSandboxesRequest>,
    ) -> Result<Response<proto::ListSandboxesResponse>, Status> {
        let pod = |id: &str, name: &str| Sandbox {
            id: id.repeat(64),
            name: name.into(),
            state: SandboxState::Ready.into(),
            ..Default::default()
        };
        Ok(Response::new(proto::ListSandboxesResponse {
            sandboxes: vec![pod("a", "web"), pod("b", "db")],
            ..Default::default()
        }))
    }

    async fn list_containers(
        &self,
        request: Request<proto::ListContainersRequest>,
    ) -> Result<Response<proto::ListContainersResponse>, Status> {
        let container = |id: &str, name: &str, pod: &str| Container {
            id: id.repeat(64),
            name: name.into(),
            sandbox_id: pod.repeat(64),
            image: "docker.io/library/busybox:latest".into(),
            state: ContainerState::Running.into(),
            ..Default::default()
        };
        // A page each, so that the client has to ask again.
        let (found, next) = match request.into_inner().page_token.as_str() {
            "" => (container("c", "app", "a"), "2"),
            _ => (container("d", "app", "b"), ""),
        };
        Ok(Response::new(proto::ListContainersResponse {
            containers: vec![found],
            next_page_token: next.into(),
        }))
    }

    async fn exec(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let Some(exec_request::Frame::Start(start)) =
            requests.message().await?.and_then(|first| first.frame)
        else {
            return Err(Status::invalid_argument("start comes first"));
        };
        let child = tokio::process::Command::new(&start.command[0])
            .args(&start.command[1..])
            .envs(&start.env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            let mut details = ErrorDetails::new();
            details.set_error_info("COMMAND_NOT_FOUND", "longshore", []);
            let text = format!("there is no `{}` in the container", start.command[0]);
            return Err(Status::with_error_details(Code::NotFound, text, details));
        };
        let (sender, answers) = mpsc::channel(8);
        let mut stdin = child.stdin.take().filter(|_| start.stdin);
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                match (request.frame, &mut stdin) {
                    (Some(exec_request::Frame::Stdin(bytes)), Some(stdin)) => {
                        let _ = stdin.write_all(&bytes).await;
                    }
                    (Some(exec_request::Frame::CloseStdin(_)), _) => stdin = None,
                    _ => {}
                }
            }
        });
        tokio::spawn(async move {
            let send = |frame| {
                let message = ExecResponse { frame: Some(frame) };
                let sender = sender.clone();
                async move { sender.send(Ok(message)).await.is_ok() }
            };
            send(exec_response::Frame::Started(ExecStarted { pid: 1 })).await;
            let mut stdout = child.stdout.take().expect("piped");
            let mut stderr = child.stderr.take().expect("piped");
            let out = async {
                let mut buffer = vec![0; 4096];
                while let Ok(count @ 1..) = stdout.read(&mut buffer).await {
                    send(exec_response::Frame::Stdout(
                        buffer[..count].to_vec().into(),
                    ))
                    .await;
                }
            };
            let err = async {
                let mut text = Vec::new();
                let _ = stderr.read_to_end(&mut text).await;
                send(exec_response::Frame::Stderr(text.into())).await;
            };
            tokio::join!(out, err);
            let code = child.wait().await.ok().and_then(|status| status.code());
            let exit = ExecExit {
                code: u32::try_from(code.unwrap_or(255)).unwrap_or(255),
                ..Default::default()
            };
            send(exec_response::Frame::Exit(exit)).await;
        });
        Ok(Response::new(ReceiverStream::new(answers).boxed()))
    }

    async fn attach(
        &self,
        _: Request<Streaming<proto::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented("attach"))
    }

    async fn logs(&self, _: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let entry = |stream: LogStream, data: &'static str, partial| LogEntry {
            stream: stream.into(),
            data: data.into(),
            partial,
            ..Default::default()
        };
        let entries = vec![
            entry(LogStream::Stdout, "one ", true),
            entry(LogStream::Stderr, "bad", false),
            entry(LogStream::Stdout, "line", false),
        ];
        let all = [Ok(LogsResponse { entries })];
        Ok(Response::new(futures_util::stream::iter(all).boxed()))
    }

    async fn stats(
        &self,
        _: Request<proto::StatsRequest>,
    ) -> Result<Response<Self::StatsStream>, Status> {
        Err(Status::unimplemented("stats"))
    }
}

struct Node {
    _directory: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
    socket: PathBuf,
}

fn node() -> Node {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("agent.sock");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let listener = {
        let _inside = runtime.enter();
        UnixListener::bind(&socket).expect("a free path")
    };
    runtime.spawn(
        Server::builder()
            .add_service(LifecycleServiceServer::new(Agent))
            .serve_with_incoming(UnixListenerStream::new(listener)),
    );
    Node {
        _directory: directory,
        _runtime: runtime,
        socket,
    }
}

impl Node {
    #[track_caller]
    fn shore(&self, words: &[&str], stdin: &str) -> Ended {
        let mut child = Command::new(env!("CARGO_BIN_EXE_shore"))
            .args(words)
            .env("LONGSHORE_ADDRESS", &self.socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it was built");
        let mut input = child.stdin.take().expect("piped");
        // A command that does not read its input may be gone before it is written.
        let _ = input.write_all(stdin.as_bytes());
        drop(input);
        let Output {
            status,
            stdout,
            stderr,
        } = child.wait_with_output().expect("it ends");
        Ended {
            code: status.code(),
            stdout: String::from_utf8(stdout).expect("text"),
            stderr: String::from_utf8(stderr).expect("text"),
        }
    }
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

#[test]
fn exec_passes_streams_and_exit_code_on() {
    let node = node();
    let script = "echo out; echo err >&2; exit 7";
    let ended = node.shore(&["exec", "web/app", "sh", "-c", script], "");
    assert_eq!(ended.code, Some(7), "{ended:?}");
    assert_eq!(
        (ended.stdout.as_str(), ended.stderr.as_str()),
        ("out\n", "err\n")
    );
}

#[test]
fn exec_with_stdin_reads_to_its_end_and_more_than_one_message() {
    let text = "0123456789abcdef".repeat(20_000);
    let ended = node().shore(&["exec", "-i", "ccc", "cat"], &text);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(
        ended.stdout == text,
        "{} bytes came back",
        ended.stdout.len()
    );
}

#[test]
fn a_terminal_is_raw_while_a_command_runs_and_as_before_after_it() {
    let node = node();
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours)
        .and_then(|()| unlockpt(&ours))
        .expect("it is ours");
    let path = ptsname(&ours, Vec::new()).expect("it has a name");
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let theirs = rustix::fs::open(path, flags, Mode::empty()).expect("the other end");
    let raw = || {
        let mode = tcgetattr(&theirs).expect("a terminal");
        !mode
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    };
    assert!(!raw());
    let stdio = || Stdio::from(theirs.try_clone().expect("a descriptor"));
    // `head` reads two bytes and ends; Ctrl-C among them is a byte like any other.
    let mut child = Command::new(env!("CARGO_BIN_EXE_shore"))
        .args(["exec", "-it", "web/app", "head", "-c", "2"])
        .env("LONGSHORE_ADDRESS", &node.socket)
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .expect("it was built");
    while !raw() {
        assert_eq!(child.try_wait().expect("ours"), None, "it ended too early");
        std::thread::sleep(Duration::from_millis(5));
    }
    rustix::io::write(&ours, b"x\x03").expect("it is open");
    let mut seen = [0; 2];
    std::fs::File::from(ours.try_clone().expect("a descriptor"))
        .read_exact(&mut seen)
        .expect("it is open");
    assert_eq!(&seen, b"x\x03");
    assert_eq!(child.wait().expect("ours").code(), Some(0));
    assert!(!raw(), "the terminal was left raw");
}

#[test]
fn a_command_that_is_not_there_ends_with_127_and_says_so() {
    let ended = node().shore(&["exec", "web/app", "/no/such/command"], "");
    assert_eq!(ended.code, Some(127), "{ended:?}");
    assert!(
        ended.stderr.contains("there is no `/no/such/command`"),
        "{ended:?}"
    );
}

#[test]
fn a_name_of_nothing_and_a_name_of_two_have_their_own_codes() {
    let node = node();
    let ended = node.shore(&["exec", "nope", "true"], "");
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(ended.stderr.contains("shore ps -a"), "{ended:?}");
    let ended = node.shore(&["logs", "app"], "");
    assert_eq!(ended.code, Some(4), "{ended:?}");
    assert!(ended.stderr.contains("web/app"), "{ended:?}");
}

#[test]
fn lists_cross_pages_and_are_data_for_programs() {
    let node = node();
    let ended = node.shore(&["ps", "-o", "json"], "");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let data: serde_json::Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!(data.as_array().map(Vec::len), Some(2));
    assert_eq!(data[1]["state"], "CONTAINER_STATE_RUNNING");
    let ended = node.shore(&["ps"], "");
    assert!(!ended.stdout.contains('\u{1b}'), "{ended:?}");
    assert!(ended.stdout.contains("busybox:latest"), "{ended:?}");
    let ended = node.shore(&["ps", "-q"], "");
    assert_eq!(ended.stdout.lines().count(), 2);
}

#[test]
fn many_nodes_give_their_rows_and_one_that_is_gone_gives_its_error() {
    let node = node();
    let nodes = format!(
        "here={},gone=/nonexistent/agent.sock",
        node.socket.display()
    );
    let ended = node.shore(&["-H", &nodes, "ps"], "");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(
        ended.stdout.contains("NODE") && ended.stdout.contains("here"),
        "{ended:?}"
    );
    assert!(
        ended.stderr.contains("gone: cannot reach the agent"),
        "{ended:?}"
    );
}

#[test]
fn logs_go_where_they_were_written_with_their_lines_whole() {
    let ended = node().shore(&["logs", "web/app"], "");
    assert_eq!(
        (ended.stdout.as_str(), ended.stderr.as_str()),
        ("one line\n", "bad\n")
    );
}

#[test]
fn live_names_are_completed() {
    let node = node();
    let output = Command::new(env!("CARGO_BIN_EXE_shore"))
        .args(["--", "shore", "logs", "a"])
        .env("LONGSHORE_ADDRESS", &node.socket)
        .env("COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "2")
        .output()
        .expect("it was built");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "app");
}
