//! Pods, where other chapters' tests do not look.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1::{self as cri, NamespaceMode, PodSandboxState};
use longshore_tests::pods::{Bench, Pod, host_network_pod, options, pod, script};
use serde_json::{Value, json};

async fn info(bench: &Bench, id: &str) -> Result<Value> {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: id.to_owned(),
        verbose: true,
    };
    let answer = bench
        .runtime
        .clone()
        .pod_sandbox_status(request)
        .await?
        .into_inner();
    assert!(answer.timestamp > 0);
    let keys: Vec<_> = answer.info.keys().collect();
    assert_eq!(keys, ["info"]);
    Ok(serde_json::from_str(&answer.info["info"])?)
}

/// CRI contract 2.7: status repeats the request, names an address while there is one, and tells the
/// containers together with the time.
/// CRI contract 2.8 and 10.2: changed resources of a pod are kept, over a restart too, and shown.
/// CRI contract 2.5 and 2.6: both calls can be repeated; a removal stops what runs, and frees the name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_tells_what_was_asked_and_what_became_of_it() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let mut config = pod("told");
    options(&mut config).ipc = NamespaceMode::Node.into();
    config
        .annotations
        .insert("odd/key".to_owned(), "value with\nlines".to_owned());
    config.linux.get_or_insert_default().overhead = Some(cri::LinuxContainerResources {
        cpu_shares: 10,
        ..Default::default()
    });
    let pod = bench.run(config.clone()).await?;
    let status = bench.pod_status(&pod).await?;
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(
        (&status.labels, &status.annotations),
        (&config.labels, &config.annotations)
    );
    let shown = status
        .linux
        .context("linux")?
        .namespaces
        .context("namespaces")?
        .options;
    let shown = shown.context("options")?;
    assert_eq!(
        (shown.network(), shown.pid(), shown.ipc()),
        (
            NamespaceMode::Pod,
            NamespaceMode::Container,
            NamespaceMode::Node
        )
    );
    let ip = status.network.context("a network")?.ip;
    assert!(!ip.is_empty());

    let told = info(&bench, &pod.id).await?;
    assert!(told["pid"].as_u64().is_some_and(|pid| pid > 0), "{told}");
    assert_eq!(told["netNamespaceClosed"], false);
    assert_eq!(told["config"]["metadata"]["name"], "told");
    assert_eq!(
        told["config"]["linux"]["overhead"],
        json!({"cpu_shares": 10})
    );
    assert_eq!(
        told["cniResult"]["Interfaces"]["eth0"]["IPConfigs"][0]["IP"],
        ip
    );
    let netns = &told["runtimeSpec"]["linux"]["namespaces"][0];
    assert_eq!(netns["type"], "network");
    let path = netns["path"].as_str().context("a path")?.to_owned();
    assert!(
        bench
            .machine()
            .mountinfo()
            .iter()
            .any(|line| line.contains(&path)),
        "{path}"
    );

    let update =
        |overhead: Option<i64>, memory: Option<i64>| cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: pod.id.clone(),
            overhead: overhead.map(|cpu_shares| cri::LinuxContainerResources {
                cpu_shares,
                ..Default::default()
            }),
            resources: memory.map(|memory_limit_in_bytes| cri::LinuxContainerResources {
                memory_limit_in_bytes,
                ..Default::default()
            }),
        };
    bench
        .runtime
        .update_pod_sandbox_resources(update(None, Some(1 << 30)))
        .await?;
    bench
        .runtime
        .update_pod_sandbox_resources(update(Some(20), None))
        .await?;
    bench
        .runtime
        .update_pod_sandbox_resources(update(Some(20), None))
        .await?;
    bench.crash().await?;
    let linux = info(&bench, &pod.id).await?["config"]["linux"].clone();
    assert_eq!(linux["overhead"], json!({"cpu_shares": 20}));
    assert_eq!(
        linux["resources"],
        json!({"memory_limit_in_bytes": 1 << 30})
    );

    let running = bench
        .launch(&pod, script("main", &toolbox, "exec sleep 10000"))
        .await?;
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let answer = bench
        .runtime
        .pod_sandbox_status(request)
        .await?
        .into_inner();
    assert!(answer.info.is_empty(), "only if it is asked for");
    assert_eq!(answer.containers_statuses.len(), 1);
    assert_eq!(answer.containers_statuses[0].id, running);

    for _ in 0..2 {
        bench.stop(&pod).await?;
    }
    let status = bench.pod_status(&pod).await?;
    assert_eq!(status.state(), PodSandboxState::SandboxNotready);
    assert_eq!(
        status.network.context("a network")?.ip,
        "",
        "its namespace is gone"
    );
    assert_eq!(bench.status(&running).await?.exit_code, 137);
    let told = info(&bench, &pod.id).await?;
    assert_eq!(
        (&told["netNamespaceClosed"], &told["state"]),
        (&json!(true), &json!("stopped"))
    );
    let story: Vec<_> = told["timeline"]
        .as_array()
        .context("a timeline")?
        .iter()
        .filter_map(|one| one["event"].as_str())
        .collect();
    assert_eq!(
        story,
        [
            "sandbox_created",
            "sandbox_started",
            "container_created",
            "container_started",
            "container_exited",
            "sandbox_stopped"
        ]
    );
    let late = bench.create(&pod, script("late", &toolbox, "true")).await;
    assert!(late.is_err(), "a stopped pod takes no container");

    // The same name again, right after, with a container that runs while its pod is removed.
    let remove = |id: &str| cri::RemovePodSandboxRequest {
        pod_sandbox_id: id.to_owned(),
    };
    bench.runtime.remove_pod_sandbox(remove(&pod.id)).await?;
    let again = bench.run(config).await?;
    let running = bench
        .launch(&again, script("main", &toolbox, "exec sleep 10000"))
        .await?;
    for _ in 0..2 {
        bench.runtime.remove_pod_sandbox(remove(&again.id)).await?;
    }
    assert!(
        bench.status(&running).await.is_err(),
        "it went with its pod"
    );
    bench.finish().await
}

/// CRI contract 2.3 and 6: what a pod's namespaces and files hold, by mode; names of hosts, resolvers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_and_namespaces_of_a_pod_follow_its_modes() -> Result<()> {
    let mut bench = Bench::start().await?;
    let mut config = pod("");
    if let Some(metadata) = config.metadata.as_mut() {
        metadata.name = "nameless".to_owned();
    }
    config.dns_config = Some(cri::DnsConfig {
        servers: vec!["10.1.2.3".to_owned(), "fd00::1".to_owned()],
        searches: vec!["a.test".to_owned(), "b.test".to_owned()],
        options: vec!["ndots:3".to_owned(), "edns0".to_owned()],
    });
    let text = "hostname; cat /etc/hostname; echo $HOSTNAME; cat /etc/resolv.conf; \
        stat -f -c %T /dev/shm; stat -c %a /dev/shm; grep ' /dev/shm ' /proc/mounts | cut -d' ' -f4 | tr , '\\n' | grep ^no | sort | tr '\\n' ' '";
    let pod = bench.run(config).await?;
    let name = &pod.id[..12];
    let (_, output) = bench.run_script(&pod, text).await?;
    assert_eq!(
        output,
        format!(
            "{name}\n{name}\n{name}\nsearch a.test b.test\nnameserver 10.1.2.3\nnameserver fd00::1\n\
             options ndots:3 edns0\ntmpfs\n1777\nnodev noexec nosuid "
        )
    );
    // One /dev/shm and one IPC namespace per pod.
    let (_, _) = bench.run_script(&pod, "echo shared >/dev/shm/x").await?;
    let (_, output) = bench
        .run_script(
            &pod,
            "cat /dev/shm/x; readlink /proc/self/ns/ipc /proc/self/ns/net /proc/self/ns/uts",
        )
        .await?;
    let (_, again) = bench
        .run_script(
            &pod,
            "cat /dev/shm/x; readlink /proc/self/ns/ipc /proc/self/ns/net /proc/self/ns/uts",
        )
        .await?;
    assert!(
        output.starts_with("shared\n") && output == again,
        "{output}{again}"
    );

    let node = bench.run(host_network_pod("node")).await?;
    let text = "readlink /proc/self/ns/net /proc/self/ns/uts; hostname";
    let (_, output) = bench.run_script(&node, text).await?;
    let of =
        |pid: &str, kind: &str| fs::read_link(Path::new("/proc").join(pid).join("ns").join(kind));
    let agent = bench.node.pid().to_string();
    let expected = format!(
        "{}\n{}\n{}",
        of(&agent, "net")?.display(),
        of(&agent, "uts")?.display(),
        fs::read_to_string("/proc/sys/kernel/hostname")?
    );
    assert_eq!(output, expected);
    let status = bench.pod_status(&node).await?;
    assert_eq!(
        status.network.unwrap_or_default().ip,
        "",
        "the caller knows it"
    );
    bench.finish().await
}

/// CRI contract 2.4: a user namespace is the pod's own or the host's, with mappings that fit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn user_namespaces_that_cannot_be_are_refused() -> Result<()> {
    let mut bench = Bench::start().await?;
    let range = |host_id, container_id, length| cri::IdMapping {
        host_id,
        container_id,
        length,
    };
    for (mode, uids, what) in [
        (
            NamespaceMode::Container,
            vec![],
            "CONTAINER is no mode of it",
        ),
        (NamespaceMode::Target, vec![], "TARGET is no mode of it"),
        (
            NamespaceMode::Node,
            vec![range(1, 0, 1)],
            "the host's has no mappings",
        ),
    ] {
        let mut config = pod("userns");
        options(&mut config).userns_options = Some(cri::UserNamespace {
            mode: mode.into(),
            gids: uids.clone(),
            uids,
        });
        let refused = bench.run(config).await;
        assert!(refused.is_err(), "{what}");
    }
    // As kubelet always sends it.
    let mut config = pod("userns");
    options(&mut config).userns_options = Some(cri::UserNamespace {
        mode: NamespaceMode::Node.into(),
        ..Default::default()
    });
    let pod: Pod = bench.run(config).await?;
    let (_, output) = bench.run_script(&pod, "cat /proc/self/uid_map").await?;
    let map: Vec<_> = output.split_whitespace().collect();
    assert_eq!(map, ["0", "0", "4294967295"]);
    bench.finish().await
}
