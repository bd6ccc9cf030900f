//! Records of the chapters -> CRI messages.

use std::collections::{BTreeMap, HashMap};

use longshore_proto::cri::v1 as cri;

use super::{json::json, parse, signal};
use crate::{
    agent::Agent,
    cgroup::{Pressure, PressureLine},
    image::Image,
    lifecycle::{
        Lifecycle,
        container::{Container, ContainerState, Resources},
        sandbox::{PidMode, Sandbox},
        stats::{ContainerUse, InterfaceUse, SandboxUse},
    },
    network::Mode,
    rootfs::Usage,
};

fn map(entries: &BTreeMap<String, String>) -> HashMap<String, String> {
    entries.clone().into_iter().collect()
}

fn sandbox_metadata(sandbox: &Sandbox) -> Option<cri::PodSandboxMetadata> {
    let key = &sandbox.config.key;
    Some(cri::PodSandboxMetadata {
        name: key.name.clone(),
        uid: key.uid.clone(),
        namespace: key.namespace.clone(),
        attempt: key.attempt,
    })
}

pub(super) fn sandbox_state(sandbox: &Sandbox) -> cri::PodSandboxState {
    if sandbox.is_ready() {
        cri::PodSandboxState::SandboxReady
    } else {
        cri::PodSandboxState::SandboxNotready
    }
}

/// A sandbox in a list.
pub(super) fn sandbox(sandbox: &Sandbox) -> cri::PodSandbox {
    cri::PodSandbox {
        id: sandbox.id.to_string(),
        metadata: sandbox_metadata(sandbox),
        state: sandbox_state(sandbox).into(),
        created_at: sandbox.created_at.unix_ns(),
        labels: map(&sandbox.config.labels),
        annotations: map(&sandbox.config.annotations),
        runtime_handler: sandbox.config.handler.clone(),
    }
}

/// A sandbox on its own.
pub(super) fn sandbox_status(sandbox: &Sandbox) -> cri::PodSandboxStatus {
    let config = &sandbox.config;
    let requested: cri::PodSandboxConfig = parse::kept(&config.request);
    let userns_options = requested
        .linux
        .and_then(|linux| linux.security_context)
        .and_then(|context| context.namespace_options)
        .and_then(|options| options.userns_options);
    let node = |host: bool| {
        if host {
            cri::NamespaceMode::Node
        } else {
            cri::NamespaceMode::Pod
        }
    };
    let options = cri::NamespaceOption {
        network: node(config.network.mode == Mode::Host).into(),
        pid: match config.pid {
            PidMode::Pod => cri::NamespaceMode::Pod,
            PidMode::Host => cri::NamespaceMode::Node,
            PidMode::Container | PidMode::Target(_) => cri::NamespaceMode::Container,
        }
        .into(),
        ipc: node(config.host_ipc).into(),
        target_id: String::new(),
        userns_options,
    };
    cri::PodSandboxStatus {
        id: sandbox.id.to_string(),
        metadata: sandbox_metadata(sandbox),
        state: sandbox_state(sandbox).into(),
        created_at: sandbox.created_at.unix_ns(),
        network: Some(network_status(sandbox)),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(options),
            }),
        }),
        labels: map(&config.labels),
        annotations: map(&config.annotations),
        runtime_handler: config.handler.clone(),
    }
}

fn network_status(sandbox: &Sandbox) -> cri::PodSandboxNetworkStatus {
    let mut addresses = sandbox
        .attachment
        .iter()
        .flat_map(|attachment| &attachment.addresses)
        .map(|net| net.addr().to_string());
    cri::PodSandboxNetworkStatus {
        ip: addresses.next().unwrap_or_default(),
        additional_ips: addresses.map(|ip| cri::PodIp { ip }).collect(),
    }
}

pub(super) fn container_state(container: &Container) -> cri::ContainerState {
    match container.state {
        ContainerState::Created { .. } => cri::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited(_) => cri::ContainerState::ContainerExited,
    }
}

fn container_metadata(container: &Container) -> Option<cri::ContainerMetadata> {
    Some(cri::ContainerMetadata {
        name: container.config.name.clone(),
        attempt: container.config.attempt,
    })
}

/// The image as the client named it.
fn image_spec(container: &Container) -> cri::ImageSpec {
    let requested: cri::ContainerConfig = parse::kept(&container.config.request);
    let image = requested.image.unwrap_or_default();
    cri::ImageSpec {
        image: container.config.image_name.clone(),
        user_specified_image: image.user_specified_image,
        annotations: image.annotations,
        ..Default::default()
    }
}

/// A container in a list.
pub(super) fn container(container: &Container) -> cri::Container {
    cri::Container {
        id: container.id.to_string(),
        pod_sandbox_id: container.sandbox_id.to_string(),
        metadata: container_metadata(container),
        image: Some(image_spec(container)),
        image_ref: container.image_id.to_string(),
        state: container_state(container).into(),
        created_at: container.created_at.unix_ns(),
        labels: map(&container.config.labels),
        annotations: map(&container.config.annotations),
        image_id: container.image_id.to_string(),
    }
}

/// A container on its own.
pub(super) fn container_status(container: &Container) -> cri::ContainerStatus {
    let config = &container.config;
    let requested: cri::ContainerConfig = parse::kept(&config.request);
    let exit = container.exit();
    cri::ContainerStatus {
        id: container.id.to_string(),
        metadata: container_metadata(container),
        state: container_state(container).into(),
        created_at: container.created_at.unix_ns(),
        started_at: container
            .started_at()
            .map_or(0, crate::clock::Time::unix_ns),
        finished_at: exit.map_or(0, |exit| exit.finished_at.unix_ns()),
        exit_code: exit.map_or(0, |exit| exit.code),
        image: Some(image_spec(container)),
        image_ref: container.image_id.to_string(),
        reason: exit.map_or_else(String::new, |exit| exit.reason.cri_word().to_owned()),
        message: exit.map_or_else(String::new, |exit| {
            exit.message.chars().take(4096).collect()
        }),
        labels: map(&config.labels),
        annotations: map(&config.annotations),
        mounts: mounts(container, requested.mounts),
        log_path: config
            .log
            .as_ref()
            .map_or_else(String::new, |log| log.path.to_string_lossy().into_owned()),
        resources: Some(cri::ContainerResources {
            linux: Some(resources(&config.resources, config.oom_score_adj)),
            windows: None,
        }),
        image_id: container.image_id.to_string(),
        user: Some(cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: container.user.uid.into(),
                gid: container.user.gid.into(),
                supplemental_groups: container
                    .user
                    .supplemental_gids
                    .iter()
                    .map(|gid| i64::from(*gid))
                    .collect(),
            }),
        }),
        stop_signal: signal::value(container.stop_signal).into(),
    }
}

/// The mounts that were asked for; those of images with what they were resolved to in both fields,
/// because clients that collect images look into either.
fn mounts(container: &Container, mut mounts: Vec<cri::Mount>) -> Vec<cri::Mount> {
    for image in mounts.iter_mut().filter_map(|mount| mount.image.as_mut()) {
        if let Some(id) = container.mounted_images.get(&image.image) {
            image.image = id.to_string();
            image.image_ref = id.to_string();
        }
    }
    mounts
}

fn resources(limits: &Resources, oom_score_adj: Option<i32>) -> cri::LinuxContainerResources {
    let unsigned = |value: Option<u64>| value.map_or(0, u64::cast_signed);
    cri::LinuxContainerResources {
        cpu_period: unsigned(limits.cpu_period_us),
        cpu_quota: limits.cpu_quota_us.unwrap_or(0),
        cpu_shares: unsigned(limits.cpu_shares),
        memory_limit_in_bytes: limits.memory_limit_bytes.unwrap_or(0),
        oom_score_adj: oom_score_adj.unwrap_or(0).into(),
        cpuset_cpus: limits.cpuset_cpus.clone().unwrap_or_default(),
        cpuset_mems: limits.cpuset_mems.clone().unwrap_or_default(),
        hugepage_limits: limits
            .hugepages
            .iter()
            .map(|(page_size, limit)| cri::HugepageLimit {
                page_size: page_size.clone(),
                limit: *limit,
            })
            .collect(),
        unified: limits.unified.clone().into_iter().collect(),
        memory_swap_limit_in_bytes: limits.memory_swap_limit_bytes.unwrap_or(0),
    }
}

/// An image.
pub(super) fn image(image: &Image) -> cri::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let uid = user.parse::<i64>().ok();
    cri::Image {
        id: image.id.to_string(),
        repo_tags: image.tags.iter().cloned().collect(),
        repo_digests: image.digests.iter().cloned().collect(),
        size: image.size_bytes.max(1),
        username: if uid.is_none() {
            user.to_owned()
        } else {
            String::new()
        },
        uid: uid.map(|value| cri::Int64Value { value }),
        spec: Some(cri::ImageSpec {
            image: image.id.to_string(),
            ..Default::default()
        }),
        pinned: image.is_pinned_for(crate::id::Face::Cri),
    }
}

fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn psi(pressure: &Pressure) -> Option<cri::PsiStats> {
    let data = |line: &PressureLine| {
        Some(cri::PsiData {
            total: line.total_ns,
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
        })
    };
    Some(cri::PsiStats {
        full: data(&pressure.full),
        some: data(&pressure.some),
    })
}

/// Use of a file system.
pub(super) fn filesystem(at_ns: i64, mountpoint: String, usage: Usage) -> cri::FilesystemUsage {
    cri::FilesystemUsage {
        timestamp: at_ns,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint }),
        used_bytes: value(usage.bytes),
        inodes_used: value(usage.inodes),
    }
}

/// What a container uses.
pub(super) fn container_stats(used: &ContainerUse, mountpoint: &str) -> cri::ContainerStats {
    let container = &used.container;
    let at = used.at.unix_ns();
    let readings = used.cgroup.as_ref();
    let pressure = readings.and_then(|readings| readings.pressure.as_ref());
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: container.id.to_string(),
            metadata: container_metadata(container),
            labels: map(&container.config.labels),
            annotations: map(&container.config.annotations),
        }),
        cpu: readings.map(|readings| cpu(at, readings, used.cpu_rate_ns)),
        memory: readings.map(|readings| memory(at, readings)),
        writable_layer: Some(filesystem(at, mountpoint.to_owned(), used.writable)),
        swap: readings.and_then(|readings| {
            Some(cri::SwapUsage {
                timestamp: at,
                swap_available_bytes: value(readings.swap_limit_bytes.map_or(0, |limit| {
                    limit.saturating_sub(readings.swap_usage_bytes.unwrap_or(0))
                })),
                swap_usage_bytes: value(readings.swap_usage_bytes?),
            })
        }),
        io: pressure.map(|pressure| cri::IoUsage {
            timestamp: at,
            psi: psi(&pressure.io),
        }),
    }
}

fn cpu(at: i64, readings: &crate::cgroup::CgroupStats, rate: Option<u64>) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp: at,
        usage_core_nano_seconds: value(readings.cpu_usage_ns),
        usage_nano_cores: rate.map(|value| cri::UInt64Value { value }),
        psi: readings
            .pressure
            .as_ref()
            .and_then(|pressure| psi(&pressure.cpu)),
    }
}

fn memory(at: i64, readings: &crate::cgroup::CgroupStats) -> cri::MemoryUsage {
    let available = readings.memory_limit_bytes.map_or(0, |limit| {
        limit.saturating_sub(readings.memory_working_set_bytes)
    });
    cri::MemoryUsage {
        timestamp: at,
        working_set_bytes: value(readings.memory_working_set_bytes),
        available_bytes: value(available),
        usage_bytes: value(readings.memory_usage_bytes),
        rss_bytes: value(readings.memory_rss_bytes),
        page_faults: value(readings.page_faults),
        major_page_faults: value(readings.major_page_faults),
        psi: readings
            .pressure
            .as_ref()
            .and_then(|pressure| psi(&pressure.memory)),
    }
}

/// What a sandbox uses.
pub(super) fn sandbox_stats(used: &SandboxUse, mountpoint: &str) -> cri::PodSandboxStats {
    let at = used.at.unix_ns();
    let readings = used.cgroup.as_ref();
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: used.sandbox.id.to_string(),
            metadata: sandbox_metadata(&used.sandbox),
            labels: map(&used.sandbox.config.labels),
            annotations: map(&used.sandbox.config.annotations),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: readings.map(|readings| cpu(at, readings, used.cpu_rate_ns)),
            memory: readings.map(|readings| memory(at, readings)),
            network: network_usage(at, &used.interfaces),
            process: Some(cri::ProcessUsage {
                timestamp: at,
                process_count: value(readings.map_or(0, |readings| readings.tasks)),
            }),
            containers: used
                .containers
                .iter()
                .map(|used| container_stats(used, mountpoint))
                .collect(),
            io: readings
                .and_then(|readings| readings.pressure.as_ref())
                .map(|pressure| cri::IoUsage {
                    timestamp: at,
                    psi: psi(&pressure.io),
                }),
        }),
        windows: None,
    }
}

/// Nothing for a pod in the host's network. Kubelet takes for granted that what is there has a
/// default interface (CRI contract 11.3).
fn network_usage(
    at: i64,
    interfaces: &BTreeMap<String, InterfaceUse>,
) -> Option<cri::NetworkUsage> {
    let default = interfaces
        .get_key_value("eth0")
        .or_else(|| interfaces.first_key_value())?;
    let others = interfaces.iter().filter(|(name, _)| *name != default.0);
    Some(cri::NetworkUsage {
        timestamp: at,
        default_interface: Some(interface(default.0, default.1)),
        interfaces: others.map(|(name, usage)| interface(name, usage)).collect(),
    })
}

fn interface(name: &str, usage: &InterfaceUse) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: name.to_owned(),
        rx_bytes: value(usage.rx_bytes),
        rx_errors: value(usage.rx_errors),
        tx_bytes: value(usage.tx_bytes),
        tx_errors: value(usage.tx_errors),
    }
}

/// The `info` map of a verbose answer: one key with a JSON object.
pub(super) fn info(object: &serde_json::Value) -> HashMap<String, String> {
    HashMap::from([("info".to_owned(), object.to_string())])
}

/// What is being done with the holder of `subject`, and since when.
fn operation(lifecycle: &Lifecycle, subject: &str) -> serde_json::Value {
    let running = lifecycle.operations.list();
    let Some(found) = running.iter().find(|one| one.subject.0 == subject) else {
        return serde_json::Value::Null;
    };
    serde_json::json!({
        "id": found.id,
        "name": found.name,
        "stage": found.stage.name,
        "startedAt": found.started_at.unix_ns(),
    })
}

/// Most events of a sandbox that are told.
const TIMELINE: usize = 256;

/// What happened in a sandbox and when, as far as the log still has it.
fn timeline(lifecycle: &Lifecycle, sandbox: &Sandbox) -> Vec<serde_json::Value> {
    let events = lifecycle.events.about(&sandbox.id, TIMELINE);
    events
        .into_iter()
        .map(|event| {
            let mut told =
                serde_json::json!({ "at": event.at.unix_ns(), "event": event.what.kind });
            if let Some(container) = &event.what.container_id {
                told["containerID"] = serde_json::json!(container);
            }
            for (name, value) in event.what.attributes {
                told[name] = value.into();
            }
            told
        })
        .collect()
}

/// Verbose facts of a sandbox; the names are those that tools know from the peers.
pub(super) fn sandbox_info(lifecycle: &Lifecycle, sandbox: &Sandbox) -> serde_json::Value {
    let dir = lifecycle.sandbox_dir(&sandbox.id);
    let config: cri::PodSandboxConfig = parse::kept(&sandbox.config.request);
    let mut namespaces = Vec::new();
    if sandbox.config.network.mode != Mode::Host {
        let path = dir.join("ns/net");
        namespaces.push(serde_json::json!({ "type": "network", "path": path }));
    }
    serde_json::json!({
        "pid": sandbox.shim_pid,
        "processStatus": if sandbox.is_ready() { "running" } else { "deleted" },
        "netNamespaceClosed": !sandbox.is_ready(),
        "image": "",
        "snapshotter": "",
        "snapshotKey": sandbox.id,
        "runtimeHandler": sandbox.config.handler,
        "runtimeType": "longshore",
        "runtimeOptions": {},
        "config": json("PodSandboxConfig", &config),
        "runtimeSpec": { "linux": { "namespaces": namespaces } },
        "sandboxMetadata": { "ID": sandbox.id, "NetNSPath": dir.join("ns/net") },
        "sandboxID": sandbox.id,
        "cgroup": sandbox.cgroup,
        "directory": dir,
        "network": sandbox.attachment,
        "cniResult": cni_result(sandbox),
        "state": sandbox.state,
        "operation": operation(lifecycle, &format!("sandbox/{}", sandbox.id)),
        "timeline": timeline(lifecycle, sandbox),
    })
}

/// What a pod has in the network, by interface, under the keys that readers of containerd's know.
fn cni_result(sandbox: &Sandbox) -> serde_json::Value {
    let Some(attachment) = &sandbox.attachment else {
        return serde_json::Value::Null;
    };
    let addresses: Vec<_> = attachment
        .addresses
        .iter()
        .enumerate()
        .map(|(index, net)| {
            serde_json::json!({ "IP": net.addr(), "Gateway": attachment.gateways.get(index) })
        })
        .collect();
    let mac = attachment.mac.map(|mac| mac.to_string());
    // The built-in network says neither.
    let said = |name: &str| {
        attachment
            .result
            .as_ref()
            .and_then(|result| result.get(name))
    };
    serde_json::json!({
        "Interfaces": { attachment.interface.as_str(): { "IPConfigs": addresses, "Mac": mac } },
        "DNS": [said("dns")],
        "Routes": said("routes"),
    })
}

/// The folder of CNI and what it says, as readers of containerd's status know it; and how reading
/// it went.
pub(super) fn cni_status(agent: &Agent) -> (serde_json::Value, String) {
    let config = &agent.config.network.cni;
    let networks: Vec<_> = agent
        .networks
        .plugins()
        .iter()
        .map(|chosen| {
            let plugins: Vec<_> = chosen
                .list
                .plugins
                .iter()
                .map(|plugin| {
                    let source = serde_json::Value::Object(plugin.clone()).to_string();
                    serde_json::json!({ "Network": plugin, "Source": source })
                })
                .collect();
            serde_json::json!({
                "Config": {
                    "Name": chosen.list.name,
                    "CNIVersion": chosen.list.version,
                    "Plugins": plugins,
                    "Source": chosen.source,
                    "File": chosen.file,
                },
                "IFName": "eth0",
            })
        })
        .collect();
    let status = serde_json::json!({
        "PluginDirs": config.bin_dirs,
        "PluginConfDir": config.conf_dir,
        "PluginMaxConfNum": 1,
        "Prefix": "eth",
        "Networks": networks,
    });
    let loaded = agent.networks.plugins_refused();
    (status, loaded.unwrap_or_else(|| "OK".to_owned()))
}

/// Verbose facts of a container, likewise.
pub(super) fn container_info(lifecycle: &Lifecycle, container: &Container) -> serde_json::Value {
    let config: cri::ContainerConfig = parse::kept(&container.config.request);
    let operation = operation(lifecycle, &format!("container/{}", container.id));
    serde_json::json!({
        "pid": container.pid().unwrap_or(0),
        "sandboxID": container.sandbox_id,
        "privileged": container.config.security.privileged,
        "removing": operation["name"] == "remove_container",
        "runtimeType": "longshore",
        "runtimeOptions": {},
        "snapshotter": "overlay",
        "snapshotKey": container.id,
        "config": json("ContainerConfig", &config),
        "runtimeSpec": container.spec,
        "cgroup": container.cgroup,
        "images": container.images().collect::<Vec<_>>(),
        "exit": container.exit(),
        "operation": operation,
    })
}
