//! What longshore.v1 adds to CRI: progress, terminals, cursors, operations, one view of all.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result, bail};
use longshore_proto::longshore::v1::{
    self as api, event_service_client::EventServiceClient,
    image_service_client::ImageServiceClient, lifecycle_service_client::LifecycleServiceClient,
    network_service_client::NetworkServiceClient, node_service_client::NodeServiceClient,
    operation_service_client::OperationServiceClient,
};
use longshore_tests::{
    images::{ImageBuilder, LayerBuilder},
    pods::{Bench, WAIT_LIMIT, wait_for},
    registry::{Fault, On},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, transport::Channel};

type Lifecycle = LifecycleServiceClient<Channel>;

fn lifecycle(bench: &Bench) -> Lifecycle {
    LifecycleServiceClient::new(bench.node.channel())
}

async fn run_sandbox(bench: &Bench, name: &str) -> Result<api::Sandbox> {
    let request = api::RunSandboxRequest {
        config: Some(api::SandboxConfig {
            name: name.to_owned(),
            hostname: name.to_owned(),
            labels: HashMap::from([("of".to_owned(), name.to_owned())]),
            ..Default::default()
        }),
        ..Default::default()
    };
    let response = lifecycle(bench).run_sandbox(request).await?.into_inner();
    response.sandbox.context("a sandbox")
}

async fn run_container(
    bench: &Bench,
    sandbox: &str,
    config: api::ContainerConfig,
) -> Result<api::Container> {
    let request = api::CreateContainerRequest {
        sandbox_id: sandbox.to_owned(),
        config: Some(config),
        ..Default::default()
    };
    let created = lifecycle(bench)
        .create_container(request)
        .await?
        .into_inner()
        .container
        .context("a container")?;
    assert_eq!(created.state(), api::ContainerState::Created);
    let request = api::StartContainerRequest {
        container_id: created.id.clone(),
        ..Default::default()
    };
    let started = lifecycle(bench)
        .start_container(request)
        .await?
        .into_inner();
    started.container.context("a container")
}

fn script(bench: &Bench, name: &str, text: &str) -> api::ContainerConfig {
    api::ContainerConfig {
        name: name.to_owned(),
        image: bench.toolbox.clone(),
        command: ["sh", "-c", text].map(str::to_owned).to_vec(),
        ..Default::default()
    }
}

async fn remove_sandbox(bench: &Bench, id: &str) -> Result<()> {
    let request = api::RemoveSandboxRequest {
        sandbox_id: id.to_owned(),
        force: true,
        ..Default::default()
    };
    lifecycle(bench).remove_sandbox(request).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_job_through_our_own_api() -> Result<()> {
    let bench = Bench::start().await?;
    let sandbox = run_sandbox(&bench, "native").await?;
    assert_eq!(
        (sandbox.state(), sandbox.face()),
        (api::SandboxState::Ready, api::Face::Native)
    );
    let network = sandbox.network.clone().context("a network")?;
    assert_eq!(network.addresses.len(), 2);
    let text = "echo one; echo two >&2; sleep 0.1; echo three; exit 9";
    let container = run_container(&bench, &sandbox.id, script(&bench, "main", text)).await?;
    let request = api::WaitContainerRequest {
        container_id: container.id.clone(),
    };
    let exit = lifecycle(&bench)
        .wait_container(request)
        .await?
        .into_inner()
        .exit
        .context("an exit")?;
    assert_eq!((exit.code, exit.reason()), (9, api::ExitReason::Error));
    let request = api::LogsRequest {
        container_id: container.id.clone(),
        follow: true,
        ..Default::default()
    };
    let mut logs = lifecycle(&bench).logs(request).await?.into_inner();
    let mut entries = Vec::new();
    while let Some(part) = logs.message().await? {
        entries.extend(part.entries);
    }
    let text: Vec<_> = entries
        .iter()
        .map(|entry| String::from_utf8_lossy(&entry.data).trim_end().to_owned())
        .collect();
    assert_eq!(text.len(), 3, "following ends with the container: {text:?}");
    assert_eq!(text.last().map(String::as_str), Some("three"));
    let request = api::LogsRequest {
        container_id: container.id.clone(),
        tail_lines: Some(1),
        ..Default::default()
    };
    let mut logs = lifecycle(&bench).logs(request).await?.into_inner();
    let part = logs.message().await?.context("a part")?;
    assert_eq!(part.entries.len(), 1);
    let request = api::GetContainerRequest {
        container_id: container.id[..12].to_owned(),
        verbose: true,
    };
    let got = lifecycle(&bench).get_container(request).await?.into_inner();
    assert_eq!(got.container.context("a container")?.id, container.id);
    assert!(got.oci_spec_json.starts_with('{'));
    // CRI does not see what is not its own, whatever it asks.
    let mut runtime = bench.runtime.clone();
    let pods = runtime
        .list_pod_sandbox(longshore_proto::cri::v1::ListPodSandboxRequest::default())
        .await?;
    assert!(pods.into_inner().items.is_empty());
    let request = longshore_proto::cri::v1::ContainerStatusRequest {
        container_id: container.id.clone(),
        verbose: false,
    };
    assert_eq!(
        runtime
            .container_status(request)
            .await
            .expect_err("another face")
            .code(),
        Code::NotFound
    );
    let info = NodeServiceClient::new(bench.node.channel())
        .info(api::InfoRequest {})
        .await?
        .into_inner();
    assert_eq!(info.counts.context("counts")?.sandboxes, 1);
    let leases = NetworkServiceClient::new(bench.node.channel())
        .list_leases(api::ListLeasesRequest::default())
        .await?
        .into_inner()
        .leases;
    assert_eq!(leases.len(), 1);
    assert_eq!(leases[0].sandbox_id, sandbox.id);
    remove_sandbox(&bench, &sandbox.id).await?;
    remove_sandbox(&bench, &sandbox.id).await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_reports_its_progress() -> Result<()> {
    let bench = Bench::start().await?;
    let data: Vec<u8> = (0..500_000_u32)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let layer = LayerBuilder::new().file("data", 0o644, &data).build();
    let image = ImageBuilder::new(vec![layer]).build();
    bench.registry.push("progress:1", &image);
    bench.registry.fault(
        On::Digest(image.blobs[0].0.clone()),
        Fault::Slow(Duration::from_millis(10)),
        None,
    );
    let request = api::PullImageRequest {
        reference: bench.registry.reference("progress:1"),
        ..Default::default()
    };
    let mut client = ImageServiceClient::new(bench.node.channel());
    let mut stream = client.pull_image(request).await?.into_inner();
    let mut seen = Vec::new();
    let mut result = None;
    while let Some(response) = stream.message().await? {
        match response.update.context("an update")? {
            api::pull_image_response::Update::Progress(progress) => {
                seen.extend(
                    progress
                        .layers
                        .first()
                        .map(|layer| (layer.fetched_bytes, layer.total_bytes)),
                );
            }
            api::pull_image_response::Update::Result(pulled) => result = Some(pulled),
        }
    }
    let pulled = result.context("a result")?;
    assert_eq!(
        (pulled.image_id.as_str(), pulled.manifest_digest.as_str()),
        (&*image.id, &*image.digest)
    );
    let total = image.blobs[0].1.len() as u64;
    assert!(
        seen.iter()
            .any(|(fetched, of)| *fetched > 0 && *fetched < total && *of == total),
        "{seen:?}"
    );
    assert!(
        seen.windows(2).all(|pair| pair[0].0 <= pair[1].0),
        "progress goes back: {seen:?}"
    );
    let request = api::TagImageRequest {
        image: image.id.clone(),
        tag: "local/name:2".to_owned(),
        ..Default::default()
    };
    let tagged = client
        .tag_image(request)
        .await?
        .into_inner()
        .image
        .context("an image")?;
    assert_eq!(tagged.tags.len(), 2, "{:?}", tagged.tags);
    let prune = |dry_run| api::PruneImagesRequest {
        dry_run,
        ..Default::default()
    };
    let dry = client.prune_images(prune(true)).await?.into_inner();
    let decision = dry
        .decisions
        .iter()
        .find(|decision| decision.image_id == image.id)
        .context("a decision")?;
    assert!(decision.size_bytes > 0 && decision.reason() != api::PruneReason::Unspecified);
    let request = api::RemoveImageRequest {
        image: image.id.clone(),
        ..Default::default()
    };
    assert_eq!(
        client
            .remove_image(request)
            .await?
            .into_inner()
            .removed_image_id,
        image.id
    );
    bench.finish().await
}

/// One running exec: what to send, and what came.
struct Session {
    send: mpsc::Sender<api::ExecRequest>,
    receive: tonic::Streaming<api::ExecResponse>,
    output: Vec<u8>,
}

impl Session {
    async fn start(bench: &Bench, start: api::ExecStart) -> Result<Self> {
        let (send, requests) = mpsc::channel(16);
        send.send(request(api::exec_request::Frame::Start(start)))
            .await?;
        let receive = lifecycle(bench)
            .exec(ReceiverStream::new(requests))
            .await?
            .into_inner();
        Ok(Self {
            send,
            receive,
            output: Vec::new(),
        })
    }

    async fn send(&self, message: api::exec_request::Frame) -> Result<()> {
        Ok(self.send.send(request(message)).await?)
    }

    /// Reads until the output has `text` in it.
    async fn expect(&mut self, text: &str) -> Result<()> {
        while !String::from_utf8_lossy(&self.output).contains(text) {
            if let Some(exit) = self.step().await? {
                bail!(
                    "ended with {exit:?} before {text:?} came: {:?}",
                    self.text()
                );
            }
        }
        Ok(())
    }

    async fn exit(mut self) -> Result<(api::ExecExit, String)> {
        loop {
            if let Some(exit) = self.step().await? {
                return Ok((exit, self.text()));
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    async fn step(&mut self) -> Result<Option<api::ExecExit>> {
        let message = tokio::time::timeout(WAIT_LIMIT, self.receive.message())
            .await
            .with_context(|| format!("nothing comes after {:?}", self.text()))??
            .context("the stream ended without an exit")?;
        match message.frame {
            Some(
                api::exec_response::Frame::Stdout(data) | api::exec_response::Frame::Stderr(data),
            ) => {
                self.output.extend_from_slice(&data);
                Ok(None)
            }
            Some(api::exec_response::Frame::Exit(exit)) => Ok(Some(exit)),
            _ => Ok(None),
        }
    }
}

fn request(message: api::exec_request::Frame) -> api::ExecRequest {
    api::ExecRequest {
        frame: Some(message),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interactive_exec_has_a_terminal_that_resizes() -> Result<()> {
    use api::exec_request::Frame;
    let bench = Bench::start().await?;
    let sandbox = run_sandbox(&bench, "terminal").await?;
    let container =
        run_container(&bench, &sandbox.id, script(&bench, "main", "sleep 10000")).await?;
    let command = |text: &str| ["sh", "-c", text].map(str::to_owned).to_vec();
    let mut session = Session::start(
        &bench,
        api::ExecStart {
            container_id: container.id.clone(),
            command: vec!["sh".to_owned()],
            tty: true,
            stdin: true,
            terminal_size: Some(api::TerminalSize {
                columns: 91,
                rows: 33,
            }),
            ..Default::default()
        },
    )
    .await?;
    session
        .send(Frame::Stdin(b"stty size; echo rea\"\"dy\n".to_vec().into()))
        .await?;
    session.expect("33 91").await?;
    session.expect("ready").await?;
    session
        .send(Frame::Resize(api::TerminalSize {
            columns: 120,
            rows: 40,
        }))
        .await?;
    session
        .send(Frame::Stdin(b"stty size\n".to_vec().into()))
        .await?;
    session.expect("40 120").await?;
    session
        .send(Frame::Stdin(b"exit 17\n".to_vec().into()))
        .await?;
    let (exit, _) = session.exit().await?;
    assert_eq!((exit.code, exit.signal, exit.timed_out), (17, 0, false));
    // Without a terminal: input until it is closed, output in two streams, all of it.
    let session = Session::start(
        &bench,
        api::ExecStart {
            container_id: container.id.clone(),
            command: command("wc -c; echo err >&2"),
            stdin: true,
            ..Default::default()
        },
    )
    .await?;
    for _ in 0..64 {
        session
            .send(Frame::Stdin(vec![b'x'; 16 << 10].into()))
            .await?;
    }
    session.send(Frame::CloseStdin(api::CloseStdin {})).await?;
    let (exit, output) = session.exit().await?;
    assert_eq!(exit.code, 0);
    assert!(
        output.contains(&(64 * (16 << 10)).to_string()) && output.contains("err"),
        "{output}"
    );
    // A deadline that the shim keeps.
    let session = Session::start(
        &bench,
        api::ExecStart {
            container_id: container.id.clone(),
            command: command("sleep 5555 & sleep 5555"),
            timeout: Some(prost_types::Duration {
                seconds: 1,
                nanos: 0,
            }),
            ..Default::default()
        },
    )
    .await?;
    let (exit, _) = session.exit().await?;
    assert!(exit.timed_out, "{exit:?}");
    // A caller that goes away takes its command along.
    let mut session = Session::start(
        &bench,
        api::ExecStart {
            container_id: container.id.clone(),
            command: command("echo up; exec sleep 6666"),
            ..Default::default()
        },
    )
    .await?;
    session.expect("up").await?;
    drop(session);
    let bench_ref = &bench;
    wait_for("the abandoned exec to end", async || {
        let session = Session::start(
            bench_ref,
            api::ExecStart {
                container_id: container.id.clone(),
                command: command("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"),
                ..Default::default()
            },
        )
        .await?;
        Ok(!session.exit().await?.1.contains("sleep 6666"))
    })
    .await?;
    remove_sandbox(&bench, &sandbox.id).await?;
    bench.finish().await
}

/// CRI contract 8.3: attach, by the same engine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attach_talks_to_the_first_process() -> Result<()> {
    use api::{attach_request::Frame as Ask, attach_response::Frame as Answer};
    let bench = Bench::start().await?;
    let sandbox = run_sandbox(&bench, "attach").await?;
    let mut config = script(
        &bench,
        "main",
        "while read line; do echo got $line; done; exit 4",
    );
    config.stdin = true;
    config.stdin_once = true;
    let container = run_container(&bench, &sandbox.id, config).await?;
    let (send, requests) = mpsc::channel(16);
    let ask = |message| api::AttachRequest {
        frame: Some(message),
    };
    send.send(ask(Ask::Start(api::AttachStart {
        container_id: container.id.clone(),
        stdin: true,
        terminal_size: None,
        replay: false,
    })))
    .await?;
    let mut receive = lifecycle(&bench)
        .attach(ReceiverStream::new(requests))
        .await?
        .into_inner();
    send.send(ask(Ask::Stdin(b"hello\n".to_vec().into())))
        .await?;
    let mut output = Vec::new();
    let mut exit = None;
    let mut closed = false;
    while let Some(response) = tokio::time::timeout(WAIT_LIMIT, receive.message()).await?? {
        match response.frame {
            Some(Answer::Stdout(data)) => output.extend_from_slice(&data),
            Some(Answer::Exit(found)) => exit = Some(found),
            _ => {}
        }
        if !closed && String::from_utf8_lossy(&output).contains("got hello") {
            send.send(ask(Ask::CloseStdin(api::CloseStdin {}))).await?;
            closed = true;
        }
    }
    assert_eq!(exit.context("an exit")?.code, 4);
    remove_sandbox(&bench, &sandbox.id).await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_goes_on_where_it_was_after_a_restart() -> Result<()> {
    let mut bench = Bench::start().await?;
    let all = |cursor| api::WatchRequest {
        cursor: Some(cursor),
        past_only: true,
        ..Default::default()
    };
    let sandbox = run_sandbox(&bench, "watched").await?;
    let first = watch(&bench, all(api::Cursor::default())).await?;
    let last = first.last().context("events")?.cursor.context("a cursor")?;
    assert!(first.iter().any(|event| event.sandbox_id == sandbox.id));
    bench.crash().await?;
    remove_sandbox(&bench, &sandbox.id).await?;
    let second = watch(&bench, all(last)).await?;
    let kinds: Vec<_> = second.iter().map(api::Event::kind).collect();
    assert_eq!(
        kinds.first(),
        Some(&api::EventKind::AgentStarted),
        "{kinds:?}"
    );
    assert_eq!(
        kinds.last(),
        Some(&api::EventKind::SandboxRemoved),
        "{kinds:?}"
    );
    // Together they are all there is, in order, without gaps within an epoch.
    let whole = watch(&bench, all(api::Cursor::default())).await?;
    let cursors = |events: &[api::Event]| {
        events
            .iter()
            .filter_map(|event| event.cursor)
            .map(|cursor| (cursor.epoch, cursor.number))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        cursors(&whole),
        [cursors(&first), cursors(&second)].concat()
    );
    for pair in cursors(&whole).windows(2) {
        assert!(
            pair[0].0 < pair[1].0 || pair[0].1 + 1 == pair[1].1,
            "a gap: {pair:?}"
        );
    }
    let filtered = api::WatchRequest {
        kinds: vec![api::EventKind::SandboxRemoved.into()],
        ..all(api::Cursor::default())
    };
    assert_eq!(watch(&bench, filtered).await?.len(), 1);
    let future = watch(
        &bench,
        all(api::Cursor {
            epoch: 1 << 40,
            number: 1,
        }),
    )
    .await
    .expect_err("of the future");
    assert_eq!(
        future
            .downcast_ref::<tonic::Status>()
            .map(tonic::Status::code),
        Some(Code::OutOfRange)
    );
    bench.finish().await
}

async fn watch(bench: &Bench, request: api::WatchRequest) -> Result<Vec<api::Event>> {
    let mut client = EventServiceClient::new(bench.node.channel());
    let mut stream = client.watch(request).await?.into_inner();
    let mut events = Vec::new();
    while let Some(response) = tokio::time::timeout(WAIT_LIMIT, stream.message()).await?? {
        events.extend(response.event);
    }
    Ok(events)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_can_be_seen_and_idempotency_keys_hold() -> Result<()> {
    let mut bench = Bench::start().await?;
    let wish = |name: &str| api::RunSandboxRequest {
        idempotency_key: "one-wish".to_owned(),
        config: Some(api::SandboxConfig {
            name: name.to_owned(),
            ..Default::default()
        }),
    };
    let first = lifecycle(&bench)
        .run_sandbox(wish("once"))
        .await?
        .into_inner()
        .sandbox
        .context("a sandbox")?;
    let again = lifecycle(&bench)
        .run_sandbox(wish("once"))
        .await?
        .into_inner()
        .sandbox
        .context("a sandbox")?;
    assert_eq!(first.id, again.id);
    let other = lifecycle(&bench)
        .run_sandbox(wish("twice"))
        .await
        .expect_err("another wish");
    assert_eq!(other.code(), Code::AlreadyExists, "{other:?}");
    let mut operations = OperationServiceClient::new(bench.node.channel());
    let list = operations
        .list_operations(api::ListOperationsRequest::default())
        .await?
        .into_inner()
        .operations;
    let run = list
        .iter()
        .find(|operation| operation.subject == format!("sandbox/{}", first.id));
    let run = run.with_context(|| format!("{list:?}"))?;
    assert_eq!(
        (run.name.as_str(), run.state()),
        ("run_pod_sandbox", api::OperationState::Succeeded)
    );
    let request = api::WaitOperationRequest {
        operation_id: run.id.clone(),
    };
    operations.wait_operation(request).await?;
    let request = api::GetOperationRequest {
        operation_id: "no-such".to_owned(),
    };
    assert_eq!(
        operations
            .get_operation(request)
            .await
            .expect_err("unknown")
            .code(),
        Code::NotFound
    );
    // A key outlives the agent; an equal wish without one is another wish.
    bench.node.kill()?;
    bench.node.launch().await?;
    bench.reconnect();
    let retried = lifecycle(&bench)
        .run_sandbox(wish("once"))
        .await?
        .into_inner()
        .sandbox
        .context("a sandbox")?;
    assert_eq!(retried.id, first.id);
    let mut bare = wish("once");
    bare.idempotency_key.clear();
    let taken = lifecycle(&bench)
        .run_sandbox(bare)
        .await
        .expect_err("the name is taken");
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken:?}");
    remove_sandbox(&bench, &first.id).await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_come_in_pages_and_stats_in_a_stream() -> Result<()> {
    let bench = Bench::start().await?;
    let mut ids = Vec::new();
    for number in 0..5 {
        ids.push(run_sandbox(&bench, &format!("page-{number}")).await?.id);
    }
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let request = api::ListSandboxesRequest {
            page_size: 2,
            page_token: token,
            ..Default::default()
        };
        let page = lifecycle(&bench)
            .list_sandboxes(request)
            .await?
            .into_inner();
        assert!(page.sandboxes.len() <= 2);
        found.extend(page.sandboxes.into_iter().map(|sandbox| sandbox.id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    found.sort();
    let mut all = ids.clone();
    all.sort();
    assert_eq!(found, all);
    let container = run_container(&bench, &ids[0], script(&bench, "main", "sleep 10000")).await?;
    let request = api::StatsRequest {
        container_ids: vec![container.id.clone()],
        interval: Some(prost_types::Duration {
            seconds: 0,
            nanos: 200_000_000,
        }),
        ..Default::default()
    };
    let mut stream = lifecycle(&bench).stats(request).await?.into_inner();
    for _ in 0..2 {
        let stats = tokio::time::timeout(WAIT_LIMIT, stream.message())
            .await??
            .context("stats")?;
        let of = stats
            .containers
            .iter()
            .find(|stats| stats.container_id == container.id)
            .context("of it")?;
        assert!(of.memory.is_some_and(|memory| memory.usage_bytes > 0));
    }
    drop(stream);
    for id in ids {
        remove_sandbox(&bench, &id).await?;
    }
    bench.finish().await
}

/// A repair in the middle of it must neither see nor touch what is being made or going away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fsck_that_repairs_lets_pods_come_and_go() -> Result<()> {
    let bench = Bench::start().await?;
    let churn = async {
        for round in 0..10 {
            let names = ["a", "b", "c"].map(|name| format!("{name}{round}"));
            let sandboxes = futures_util::future::try_join_all(
                names.iter().map(|name| run_sandbox(&bench, name)),
            )
            .await?;
            for sandbox in sandboxes {
                remove_sandbox(&bench, &sandbox.id).await?;
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    let repairs = async {
        loop {
            let request = api::FsckRequest {
                repair: true,
                ..Default::default()
            };
            let mut differences = NodeServiceClient::new(bench.node.channel())
                .fsck(request)
                .await?
                .into_inner();
            if let Some(found) = differences.message().await? {
                bail!("fsck finds {found:?}");
            }
        }
    };
    tokio::select! {
        ended = churn => ended?,
        never = repairs => { let () = never?; }
    }
    bench.node.fsck_clean().await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_reflection_answer() -> Result<()> {
    let bench = Bench::start().await?;
    // By their wire form: an empty health request, and an answer whose first field is SERVING.
    let mut client = tonic::client::Grpc::new(bench.node.channel());
    client.ready().await?;
    let codec = tonic_prost_codec();
    let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let response: tonic::Response<Health> =
        client.unary(tonic::Request::new(()), path, codec).await?;
    assert_eq!(response.into_inner().status, 1);
    bench.finish().await
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct Health {
    #[prost(int32, tag = "1")]
    status: i32,
}

fn tonic_prost_codec() -> tonic_prost::ProstCodec<(), Health> {
    tonic_prost::ProstCodec::default()
}
