//! What holds for all calls: ids, codes, sizes, and that reading never waits.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    node::Node,
    pods::{Bench, container, pod, resources, script},
};
use tonic::Code;

/// CRI contract 1.2 and 11.4: a node without anything answers both at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_anything_answers_what_clients_ask_first() -> Result<()> {
    let node = Node::start_configured("").await?;
    let version = node
        .runtime()
        .version(cri::VersionRequest::default())
        .await?
        .into_inner();
    assert_eq!(version.runtime_api_version, "v1");
    let usage = node
        .images()
        .image_fs_info(cri::ImageFsInfoRequest {})
        .await?
        .into_inner();
    for list in [usage.image_filesystems, usage.container_filesystems] {
        let used = list.first().context("one file system")?;
        assert!(used.timestamp > 0);
        let mountpoint = used.fs_id.clone().context("its place")?.mountpoint;
        assert!(std::path::Path::new(&mountpoint).is_dir(), "{mountpoint}");
        assert!(used.used_bytes.is_some() && used.inodes_used.is_some());
    }
    node.finish().await
}

/// CRI contract 1.1: a request of 15 MiB is read; what is refused is a field of it.
/// CRI contract 1.4 and 1.9: what is unknown, call by call.
/// CRI contract 14: what CRIU would be needed for says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(
    clippy::needless_update,
    reason = "one form for requests of one field and of many"
)]
async fn unknown_ids_have_the_codes_that_clients_test() -> Result<()> {
    let bench = Bench::start().await?;
    let unknown = || "f".repeat(64);
    let mut runtime = bench.runtime.clone();
    let request = cri::VersionRequest {
        version: "x".repeat(15 << 20),
    };
    let refused = runtime.version(request).await.expect_err("much too long");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");

    macro_rules! answers {
        ($($call:ident $request:ident { $($field:ident: $value:expr),* } => $code:ident;)*) => {$(
            let request = cri::$request { $($field: $value,)* ..Default::default() };
            let code = runtime.$call(request).await.err().map_or(Code::Ok, |status| status.code());
            assert_eq!(code, Code::$code, stringify!($call));
        )*};
    }
    answers! {
        pod_sandbox_status PodSandboxStatusRequest { pod_sandbox_id: unknown() } => NotFound;
        container_status ContainerStatusRequest { container_id: unknown() } => NotFound;
        start_container StartContainerRequest { container_id: unknown() } => NotFound;
        exec_sync ExecSyncRequest { container_id: unknown(), cmd: vec!["true".into()] } => NotFound;
        exec ExecRequest { container_id: unknown(), cmd: vec!["true".into()], stdout: true } => NotFound;
        attach AttachRequest { container_id: unknown(), stdout: true } => NotFound;
        port_forward PortForwardRequest { pod_sandbox_id: unknown() } => NotFound;
        update_container_resources UpdateContainerResourcesRequest { container_id: unknown() } => NotFound;
        update_pod_sandbox_resources UpdatePodSandboxResourcesRequest { pod_sandbox_id: unknown() } => NotFound;
        reopen_container_log ReopenContainerLogRequest { container_id: unknown() } => NotFound;
        container_stats ContainerStatsRequest { container_id: unknown() } => NotFound;
        pod_sandbox_stats PodSandboxStatsRequest { pod_sandbox_id: unknown() } => NotFound;
        stop_container StopContainerRequest { container_id: unknown() } => Ok;
        remove_container RemoveContainerRequest { container_id: unknown() } => Ok;
        stop_pod_sandbox StopPodSandboxRequest { pod_sandbox_id: unknown() } => Ok;
        remove_pod_sandbox RemovePodSandboxRequest { pod_sandbox_id: unknown() } => Ok;
        checkpoint_container CheckpointContainerRequest { container_id: unknown() } => Unimplemented;
        checkpoint_pod CheckpointPodRequest { pod_sandbox_id: unknown() } => Unimplemented;
        restore_pod RestorePodRequest { } => Unimplemented;
    }
    let refused = runtime
        .checkpoint_container(cri::CheckpointContainerRequest::default())
        .await
        .expect_err("not built in");
    assert!(refused.message().contains("CRIU"), "{refused:?}");
    let image = |name: &str| {
        Some(cri::ImageSpec {
            image: name.to_owned(),
            ..Default::default()
        })
    };
    let mut images = bench.images.clone();
    let request = cri::ImageStatusRequest {
        image: image("not/here:1"),
        verbose: true,
    };
    assert_eq!(images.image_status(request).await?.into_inner().image, None);
    images
        .remove_image(cri::RemoveImageRequest {
            image: image("not/here:1"),
        })
        .await?;
    let request = cri::RunPodSandboxRequest {
        config: Some(pod("handler")),
        runtime_handler: "no-such-handler".to_owned(),
    };
    let refused = runtime
        .run_pod_sandbox(request)
        .await
        .expect_err("no such handler");
    assert!(refused.message().contains("no-such-handler"), "{refused:?}");
    bench.finish().await
}

/// CRI contract 1.6: a unique beginning of an id is as good as the id, for calls and for filters; one
/// that is not unique is an error there and nothing here. Ids are 64 lower-case hexadecimal digits.
/// CRI contract 1.7: labels and annotations come back as they were sent, and all must match.
/// CRI contract 1.8: times are nanoseconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beginnings_of_ids_will_do_while_they_are_unique() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("ids")).await?;
    let odd = HashMap::from([
        ("a/b.c-d".to_owned(), "x=y, {\"z\": \"ü\\n\"}".to_owned()),
        (String::new(), String::new()),
    ]);
    let mut ids = Vec::new();
    // With seventeen, two begin with the same digit.
    for number in 0..17 {
        let mut config = container(&format!("c{number}"), &toolbox, &["true"]);
        config.labels = odd.clone();
        config
            .labels
            .insert("number".to_owned(), number.to_string());
        config.annotations = odd.clone();
        ids.push(bench.create(&pod, config).await?);
    }
    assert!(
        ids.iter()
            .all(|id| id.len() == 64 && id.chars().all(|c| "0123456789abcdef".contains(c)))
    );
    let first = |id: &String| id[..1].to_owned();
    let shared = ids
        .iter()
        .map(first)
        .find(|digit| {
            ids.iter()
                .filter(|id| id.starts_with(digit.as_str()))
                .count()
                > 1
        })
        .context("seventeen ids and sixteen digits")?;
    let error = bench.status(&shared).await.expect_err("ambiguous");
    let error = error.downcast::<tonic::Status>()?;
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    let list = async |filter: cri::ContainerFilter| {
        let request = cri::ListContainersRequest {
            filter: Some(filter),
        };
        let found = bench
            .runtime
            .clone()
            .list_containers(request)
            .await?
            .into_inner()
            .containers;
        anyhow::Ok(found)
    };
    let by_id = |id: &str| cri::ContainerFilter {
        id: id.to_owned(),
        ..Default::default()
    };
    assert!(list(by_id(&shared)).await?.is_empty());
    let found = list(by_id(&ids[4][..20])).await?;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].id, ids[4]);
    let mut runtime = bench.runtime.clone();
    let request = cri::ContainerStatusRequest {
        container_id: ids[4][..20].to_owned(),
        verbose: false,
    };
    let status = runtime.container_status(request).await?.into_inner();
    let status = status.status.context("a status")?;
    let mut labels = odd.clone();
    labels.insert("number".to_owned(), "4".to_owned());
    for (given, sent) in [
        (&status.labels, &labels),
        (&status.annotations, &odd),
        (&found[0].labels, &labels),
        (&found[0].annotations, &odd),
    ] {
        assert_eq!(given, sent);
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let age = now.saturating_sub(Duration::from_nanos(status.created_at.try_into()?));
    assert!(age < Duration::from_secs(300), "{age:?}");

    let with = |pairs: &[(&str, &str)]| cri::ContainerFilter {
        pod_sandbox_id: pod.id[..20].to_owned(),
        label_selector: pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        ..Default::default()
    };
    assert_eq!(list(with(&[])).await?.len(), 17);
    assert_eq!(list(with(&[("", "")])).await?.len(), 17);
    assert_eq!(
        list(with(&[("", ""), ("number", "3")])).await?[0].id,
        ids[3]
    );
    assert!(list(with(&[("", ""), ("number", "99")])).await?.is_empty());
    let mut other = with(&[("number", "3")]);
    other.pod_sandbox_id = "f".repeat(64);
    assert!(list(other).await?.is_empty());
    let mut running = with(&[]);
    running.state = Some(cri::ContainerStateValue {
        state: cri::ContainerState::ContainerRunning.into(),
    });
    assert!(list(running).await?.is_empty());
    bench.finish().await
}

/// CRI contract 8.1: the edges of ExecSync. A command that is missing is not a missing container.
/// CRI contract 8.2: URLs are given only where there is something to connect.
/// CRI contract 9.1: each URL has a token of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_and_urls_have_their_edges() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("edges")).await?;
    let mut config = script("main", &toolbox, "exec sleep 10000");
    config.envs = vec![cri::KeyValue {
        key: "OCTETS".to_owned(),
        value: b"a\xff\xfe\nb=".to_vec(),
    }];
    config.tty = true;
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    let id = bench.create(&pod, config).await?;
    let early = bench
        .exec(&id, &["true"], 0)
        .await
        .expect_err("not started");
    assert_ne!(early.code(), Code::NotFound, "{early:?}");
    bench.start_container(&id).await?;
    for command in ["/no/such", "no-such"] {
        let missing = bench.exec(&id, &[command], 0).await.expect_err("missing");
        assert_eq!(missing.code(), Code::Unknown, "{missing:?}");
        assert!(missing.message().contains(command), "{missing:?}");
    }
    let none = bench.exec(&id, &[], 0).await.expect_err("no command");
    assert_eq!(none.code(), Code::InvalidArgument, "{none:?}");
    let octets = bench
        .exec(&id, &["sh", "-c", "printf %s \"$OCTETS\""], 5)
        .await?;
    assert_eq!(
        (&*octets.stdout, octets.exit_code),
        (&b"a\xff\xfe\nb="[..], 0)
    );
    let failing = bench
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 7"], 0)
        .await?;
    assert_eq!(
        (&*failing.stdout, &*failing.stderr, failing.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 7)
    );
    let late = bench
        .exec(&id, &["sleep", "10000"], 1)
        .await
        .expect_err("too long");
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late:?}");

    let mut urls = Vec::new();
    for _ in 0..2 {
        let request = cri::ExecRequest {
            container_id: id.clone(),
            cmd: vec!["true".to_owned()],
            stdout: true,
            ..Default::default()
        };
        urls.push(bench.runtime.exec(request).await?.into_inner().url);
    }
    let request = cri::AttachRequest {
        container_id: id.clone(),
        stdout: true,
        tty: true,
        ..Default::default()
    };
    urls.push(bench.runtime.attach(request).await?.into_inner().url);
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![80],
    };
    urls.push(bench.runtime.port_forward(request).await?.into_inner().url);
    for (url, kind) in urls.iter().zip(["exec", "exec", "attach", "portforward"]) {
        let (_, path) = url.split_once("://").context("a scheme")?;
        let parts: Vec<_> = path.split('/').collect();
        assert_eq!((parts.len(), parts[1]), (3, kind), "{url}");
        let is_url_safe = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        assert!(
            parts[2].len() >= 8 && parts[2].chars().all(is_url_safe),
            "{url}"
        );
    }
    urls.sort();
    urls.dedup();
    assert_eq!(urls.len(), 4);
    let exec = |tty, stdin, stdout, stderr| cri::ExecRequest {
        container_id: id.clone(),
        cmd: vec!["true".to_owned()],
        tty,
        stdin,
        stdout,
        stderr,
    };
    for request in [
        exec(false, false, false, false),
        exec(true, false, true, true),
    ] {
        let refused = bench.runtime.exec(request).await.expect_err("streams");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    }
    bench.stop_container(&id, 0).await?;
    assert!(
        bench
            .runtime
            .exec(exec(false, false, true, false))
            .await
            .is_err(),
        "it has ended"
    );
    let ended = bench
        .exec(&id, &["true"], 0)
        .await
        .expect_err("it has ended");
    assert_ne!(ended.code(), Code::NotFound, "{ended:?}");
    bench.stop(&pod).await?;
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![80],
    };
    assert!(
        bench.runtime.port_forward(request).await.is_err(),
        "the pod is not ready"
    );
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let refused = bench
        .runtime
        .pod_sandbox_stats(request)
        .await
        .expect_err("not ready");
    assert_ne!(refused.code(), Code::NotFound, "{refused:?}");
    bench.finish().await
}
