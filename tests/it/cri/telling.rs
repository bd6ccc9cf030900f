//! What is told: status, verbose info, streamed lists, metrics.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1 as cri;
use longshore_tests::pods::{Bench, pod, resources, script};
use serde_json::Value;

/// CRI contract 10.1, 10.2 and 10.3: status with handlers and features; the keys that tools read of
/// verbose answers; a configuration that changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verbose_answers_have_the_keys_that_tools_read() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let status = bench
        .runtime
        .status(cri::StatusRequest { verbose: true })
        .await?
        .into_inner();
    let config: Value = serde_json::from_str(status.info.get("config").context("config")?)?;
    let state = config["stateDir"].as_str().context("stateDir")?;
    assert!(std::path::Path::new(state).is_dir(), "{state}");
    let names: BTreeSet<_> = status
        .runtime_handlers
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    assert!(names.contains(""), "{names:?}");
    for handler in &status.runtime_handlers {
        let features = handler.features.context("features")?;
        assert!(
            features.recursive_read_only_mounts || !handler.name.is_empty(),
            "{handler:?}"
        );
    }
    let features = status.features.context("features")?;
    assert!(features.supplemental_groups_policy && features.mount_options);
    let plain = bench
        .runtime
        .status(cri::StatusRequest { verbose: false })
        .await?
        .into_inner();
    assert!(plain.info.is_empty());
    for pod_cidr in ["", "10.244.0.0/24"] {
        let network_config = Some(cri::NetworkConfig {
            pod_cidr: pod_cidr.to_owned(),
        });
        let runtime_config = Some(cri::RuntimeConfig { network_config });
        let request = cri::UpdateRuntimeConfigRequest { runtime_config };
        bench.runtime.update_runtime_config(request).await?;
    }

    let pod = bench.run(pod("verbose")).await?;
    let mut config = script("main", &toolbox, "exec sleep 10000");
    config.envs = vec![cri::KeyValue {
        key: "A".to_owned(),
        value: b"b".to_vec(),
    }];
    let id = bench.launch(&pod, config).await?;
    let request = cri::ContainerStatusRequest {
        container_id: id.clone(),
        verbose: true,
    };
    let answer = bench.runtime.container_status(request).await?.into_inner();
    let info: Value = serde_json::from_str(answer.info.get("info").context("info")?)?;
    let pid = info["pid"].as_u64().context("pid")?;
    assert!(std::path::Path::new(&format!("/proc/{pid}")).is_dir());
    assert_eq!(info["sandboxID"], pod.id);
    assert_eq!(info["removing"], false);
    assert_eq!(info["config"]["metadata"]["name"], "main");
    assert_eq!(info["config"]["envs"][0]["key"], "A");
    assert_eq!(info["runtimeSpec"]["process"]["args"][0], "sh");
    for key in [
        "snapshotter",
        "snapshotKey",
        "runtimeType",
        "runtimeOptions",
    ] {
        assert!(!info[key].is_null(), "{key}");
    }
    let request = cri::ImageStatusRequest {
        image: Some(cri::ImageSpec {
            image: toolbox,
            ..Default::default()
        }),
        verbose: true,
    };
    let answer = bench.images.image_status(request).await?.into_inner();
    let info: Value = serde_json::from_str(answer.info.get("info").context("info")?)?;
    assert_eq!(info["imageSpec"]["config"]["Cmd"][0], "/bin/page-server");
    bench.finish().await
}

/// CRI contract 11.2: a streamed list is the list, and ends.
/// CRI contract 11.3: readings of one container rise, and say when they were taken.
/// CRI contract 12: every metric is described, and each sample has a value for each label.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streamed_lists_and_metrics_are_whole() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    macro_rules! stream {
        ($call:ident, $request:ident, $items:ident) => {{
            let mut stream = bench
                .runtime
                .$call(cri::$request::default())
                .await?
                .into_inner();
            let mut all = Vec::new();
            while let Some(part) = stream.message().await? {
                assert!(!part.$items.is_empty(), "no empty messages");
                all.extend(part.$items);
            }
            all
        }};
    }
    assert!(
        stream!(
            stream_pod_sandboxes,
            StreamPodSandboxesRequest,
            pod_sandboxes
        )
        .is_empty()
    );
    assert!(stream!(stream_containers, StreamContainersRequest, containers).is_empty());
    let one = bench.run(pod("one")).await?;
    let two = bench.run(pod("two")).await?;
    let mut config = script("main", &toolbox, "while :; do :; done");
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    resources(&mut config).cpu_quota = 50_000;
    resources(&mut config).cpu_period = 100_000;
    resources(&mut config).cpu_shares = 512;
    let id = bench.launch(&one, config).await?;
    let idle = bench.create(&two, script("idle", &toolbox, "true")).await?;

    let pods: BTreeSet<_> = stream!(
        stream_pod_sandboxes,
        StreamPodSandboxesRequest,
        pod_sandboxes
    )
    .into_iter()
    .map(|pod| pod.id)
    .collect();
    assert_eq!(pods, BTreeSet::from([one.id.clone(), two.id.clone()]));
    let containers: BTreeSet<_> = stream!(stream_containers, StreamContainersRequest, containers)
        .into_iter()
        .map(|container| container.id)
        .collect();
    assert_eq!(containers, BTreeSet::from([id.clone(), idle]));
    let stats = stream!(
        stream_container_stats,
        StreamContainerStatsRequest,
        container_stats
    );
    assert_eq!(stats.len(), 2);
    assert_eq!(
        stream!(
            stream_pod_sandbox_stats,
            StreamPodSandboxStatsRequest,
            pod_sandbox_stats
        )
        .len(),
        2
    );
    let mut stream = bench
        .images
        .stream_images(cri::StreamImagesRequest::default())
        .await?
        .into_inner();
    let mut streamed = 0;
    while let Some(part) = stream.message().await? {
        streamed += part.images.len();
    }
    let listed = bench
        .images
        .list_images(cri::ListImagesRequest::default())
        .await?
        .into_inner()
        .images;
    assert_eq!(streamed, listed.len());

    let read = async || {
        let request = cri::ContainerStatsRequest {
            container_id: id.clone(),
        };
        let stats = bench
            .runtime
            .clone()
            .container_stats(request)
            .await?
            .into_inner()
            .stats;
        stats.and_then(|stats| stats.cpu).context("cpu")
    };
    let used = |cpu: &cri::CpuUsage| cpu.usage_core_nano_seconds.map_or(0, |used| used.value);
    let first = read().await?;
    longshore_tests::pods::wait_for("time used", async || {
        let next = read().await?;
        assert!(used(&next) >= used(&first) && next.timestamp > first.timestamp);
        Ok(used(&next) > used(&first) + 1_000_000 && next.usage_nano_cores.is_some())
    })
    .await?;

    let described = bench
        .runtime
        .list_metric_descriptors(cri::ListMetricDescriptorsRequest {})
        .await?
        .into_inner()
        .descriptors;
    let labels: BTreeMap<_, _> = described
        .iter()
        .map(|one| (one.name.as_str(), &one.label_keys))
        .collect();
    assert_eq!(labels.len(), described.len(), "each once");
    assert!(
        described
            .iter()
            .all(|one| !one.help.is_empty() && !one.label_keys.is_empty())
    );
    let metrics = stream!(
        stream_pod_sandbox_metrics,
        StreamPodSandboxMetricsRequest,
        pod_sandbox_metrics
    );
    let of_one = metrics
        .iter()
        .find(|metrics| metrics.pod_sandbox_id == one.id)
        .context("the pod's")?;
    assert_eq!(of_one.container_metrics.len(), 1);
    let mut sampled = BTreeSet::new();
    for metric in of_one
        .metrics
        .iter()
        .chain(&of_one.container_metrics[0].metrics)
    {
        let keys = labels
            .get(metric.name.as_str())
            .with_context(|| metric.name.clone())?;
        assert_eq!(keys.len(), metric.label_values.len(), "{}", metric.name);
        // A file system's inodes in all are no count of events, whatever the name ends in.
        let counts = (metric.name.ends_with("_total") || metric.name.ends_with("failcnt"))
            && metric.name != "container_fs_inodes_total";
        assert_eq!(
            metric.metric_type() == cri::MetricType::Counter,
            counts,
            "{}",
            metric.name
        );
        let pod_label = keys.iter().position(|key| key == "pod").context("a pod")?;
        assert_eq!(metric.label_values[pod_label], "one", "{}", metric.name);
        sampled.insert(metric.name.as_str());
    }
    for name in REQUIRED.split_whitespace() {
        let whole = format!("container_{name}");
        assert!(
            labels.contains_key(whole.as_str()),
            "{whole} is not described"
        );
        assert!(sampled.contains(whole.as_str()), "{whole} has no sample");
    }
    for name in OPTIONAL.split_whitespace() {
        assert!(
            labels.contains_key(format!("container_{name}").as_str()),
            "{name} is not described"
        );
    }
    let value = |name: &str| {
        let metrics = &of_one.container_metrics[0].metrics;
        let found = metrics
            .iter()
            .find(|metric| metric.name == format!("container_{name}"));
        found
            .and_then(|metric| metric.value)
            .map(|value| value.value)
    };
    assert_eq!(value("spec_memory_limit_bytes"), Some(64 << 20));
    assert_eq!(
        (value("spec_cpu_period"), value("spec_cpu_shares")),
        (Some(100_000), Some(512))
    );
    assert!(value("fs_limit_bytes").is_some_and(|size| size > 1 << 20));
    bench.finish().await
}

/// Have a sample for each running container or its pod.
const REQUIRED: &str = "
    cpu_usage_seconds_total cpu_user_seconds_total cpu_system_seconds_total cpu_cfs_periods_total
    cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total
    memory_cache memory_failcnt memory_kernel_usage memory_mapped_file memory_max_usage_bytes memory_rss
    memory_swap memory_usage_bytes memory_working_set_bytes memory_failures_total oom_events_total
    fs_inodes_free fs_inodes_total fs_limit_bytes fs_usage_bytes
    network_receive_bytes_total network_receive_errors_total network_receive_packets_total
    network_receive_packets_dropped_total network_transmit_bytes_total network_transmit_errors_total
    network_transmit_packets_total network_transmit_packets_dropped_total
    processes threads threads_max file_descriptors sockets
    spec_cpu_period spec_cpu_shares spec_memory_limit_bytes spec_memory_swap_limit_bytes
    start_time_seconds last_seen";

/// Are described, and sampled where the kernel tells.
const OPTIONAL: &str = "
    hugetlb_usage_bytes hugetlb_max_usage_bytes fs_reads_bytes_total fs_reads_total fs_writes_bytes_total
    fs_writes_total blkio_device_usage_total ulimits_soft spec_cpu_quota spec_memory_reservation_limit_bytes
    pressure_cpu_waiting_seconds_total pressure_cpu_stalled_seconds_total pressure_io_waiting_seconds_total
    pressure_io_stalled_seconds_total pressure_memory_waiting_seconds_total pressure_memory_stalled_seconds_total";
