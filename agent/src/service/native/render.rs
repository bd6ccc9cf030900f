//! Records of the chapters -> `longshore.v1` messages.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::Duration,
};

use longshore_proto::longshore::v1 as pb;

use super::parse;
use crate::{
    clock::Time,
    event::{self, EventKind},
    id::Face,
    image::{
        Image, ImageConfig, LayerProgress, LayerState, Platform, PullProgress, PullStage, Pulled,
        RemoteImage,
    },
    lifecycle::{
        Lifecycle, NATIVE_HANDLER,
        container::{Container, ContainerState, Exit, ExitReason},
        sandbox::{PidMode, Sandbox, SandboxState},
        session::SessionExit,
        system::{Autostart, System, SystemState, SystemUse, SystemView},
    },
    network::{Mode, PortMapping, Protocol},
    node::{check, fsck},
    rootfs::Layer,
};

fn map(entries: &BTreeMap<String, String>) -> HashMap<String, String> {
    entries.clone().into_iter().collect()
}

/// A moment.
pub(super) fn timestamp(at: Time) -> prost_types::Timestamp {
    const SECOND: i64 = 1_000_000_000;
    prost_types::Timestamp {
        seconds: at.unix_ns().div_euclid(SECOND),
        nanos: i32::try_from(at.unix_ns().rem_euclid(SECOND)).unwrap_or(0),
    }
}

/// Nanoseconds as a duration.
pub(super) fn nanoseconds(ns: u64) -> prost_types::Duration {
    let time = Duration::from_nanos(ns);
    prost_types::Duration {
        seconds: time.as_secs().cast_signed(),
        nanos: time.subsec_nanos().cast_signed(),
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Which API made it.
pub(super) fn face(face: Face) -> pb::Face {
    match face {
        Face::Cri => pb::Face::Cri,
        Face::Native => pb::Face::Native,
    }
}

/// A sandbox's state.
pub(super) fn sandbox_state(sandbox: &Sandbox) -> pb::SandboxState {
    if sandbox.is_ready() {
        pb::SandboxState::Ready
    } else {
        pb::SandboxState::NotReady
    }
}

fn handler(name: &str) -> String {
    match name {
        "" => NATIVE_HANDLER.to_owned(),
        name => name.to_owned(),
    }
}

/// A sandbox.
pub(super) fn sandbox(sandbox: &Sandbox, container_count: usize) -> pb::Sandbox {
    let config = &sandbox.config;
    pb::Sandbox {
        id: sandbox.id.to_string(),
        name: config.key.name.clone(),
        state: sandbox_state(sandbox).into(),
        state_message: match &sandbox.state {
            SandboxState::Ready | SandboxState::Stopped => String::new(),
            SandboxState::Lost { reason } => reason.clone(),
        },
        created_at: Some(timestamp(sandbox.created_at)),
        labels: map(&config.labels),
        annotations: map(&config.annotations),
        network: Some(network_status(sandbox)),
        handler: handler(&config.handler),
        face: face(config.face).into(),
        container_count: count(container_count),
        pod_namespace: config.key.namespace.clone(),
        pod_uid: config.key.uid.clone(),
        attempt: config.key.attempt,
    }
}

fn network_mode(mode: Mode) -> pb::NetworkMode {
    match mode {
        Mode::Pod => pb::NetworkMode::Pod,
        Mode::Host => pb::NetworkMode::Host,
        Mode::None => pb::NetworkMode::None,
    }
}

fn network_status(sandbox: &Sandbox) -> pb::SandboxNetworkStatus {
    let attachment = sandbox.attachment.as_ref();
    pb::SandboxNetworkStatus {
        mode: network_mode(sandbox.config.network.mode).into(),
        network: sandbox.plan.network.clone(),
        interface: attachment.map(|a| a.interface.clone()).unwrap_or_default(),
        addresses: attachment
            .iter()
            .flat_map(|a| &a.addresses)
            .map(ToString::to_string)
            .collect(),
        gateways: attachment
            .iter()
            .flat_map(|a| &a.gateways)
            .map(ToString::to_string)
            .collect(),
        mac: attachment
            .and_then(|a| a.mac)
            .map(|mac| mac.to_string())
            .unwrap_or_default(),
        ports: published(sandbox),
    }
}

/// Host ports that lead into it, by us or by plugins.
pub(super) fn published(sandbox: &Sandbox) -> Vec<pb::PortMapping> {
    let ports = match sandbox.plan.cni {
        Some(_) => &sandbox.config.network.ports,
        None => &sandbox.plan.ports,
    };
    let ports = ports.iter().filter(|port| port.host_port != 0);
    ports.map(port).collect()
}

/// A host port.
pub(super) fn port(mapping: &PortMapping) -> pb::PortMapping {
    pb::PortMapping {
        host_ip: mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        host_port: mapping.host_port.into(),
        container_port: mapping.container_port.into(),
        protocol: match mapping.protocol {
            Protocol::Tcp => pb::Protocol::Tcp,
            Protocol::Udp => pb::Protocol::Udp,
            Protocol::Sctp => pb::Protocol::Sctp,
        }
        .into(),
    }
}

/// How a sandbox was wished, with the defaults that were chosen; none for those of CRI.
pub(super) fn sandbox_config(sandbox: &Sandbox) -> Option<pb::SandboxConfig> {
    let config = &sandbox.config;
    if config.face != Face::Native {
        return None;
    }
    let wished: pb::SandboxConfig = parse::kept(&config.request);
    Some(pb::SandboxConfig {
        name: config.key.name.clone(),
        labels: map(&config.labels),
        annotations: map(&config.annotations),
        hostname: match config.network.mode {
            Mode::Host => String::new(),
            Mode::Pod | Mode::None => config.hostname.clone(),
        },
        network: Some(pb::SandboxNetwork {
            mode: network_mode(config.network.mode).into(),
            network: sandbox.plan.network.clone(),
            ports: config.network.ports.iter().map(port).collect(),
        }),
        sysctls: map(&config.sysctls),
        pid_mode: match config.pid {
            PidMode::Container | PidMode::Target(_) => pb::PidMode::Container,
            PidMode::Pod => pb::PidMode::Pod,
            PidMode::Host => pb::PidMode::Host,
        }
        .into(),
        handler: handler(&config.handler),
        ..wished
    })
}

/// Where a sandbox lives, for people.
pub(super) fn sandbox_info(lifecycle: &Lifecycle, sandbox: &Sandbox) -> String {
    let dir = lifecycle.sandbox_dir(&sandbox.id);
    serde_json::json!({
        "shimPid": sandbox.shim_pid,
        "cgroup": sandbox.cgroup,
        "netns": dir.join("ns/net"),
        "directory": dir,
        "bridge": sandbox.plan.bridge,
        "hostInterface": sandbox.attachment.as_ref().map(|attachment| &attachment.host_interface),
    })
    .to_string()
}

/// A container's state.
pub(super) fn container_state(container: &Container) -> pb::ContainerState {
    match container.state {
        ContainerState::Created { .. } => pb::ContainerState::Created,
        ContainerState::Running { .. } => pb::ContainerState::Running,
        ContainerState::Exited(_) => pb::ContainerState::Exited,
    }
}

/// A container.
pub(super) fn container(container: &Container) -> pb::Container {
    let config = &container.config;
    pb::Container {
        id: container.id.to_string(),
        name: config.name.clone(),
        sandbox_id: container.sandbox_id.to_string(),
        image: match config.image_name.as_str() {
            "" => config.image.clone(),
            name => name.to_owned(),
        },
        image_id: container.image_id.to_string(),
        state: container_state(container).into(),
        created_at: Some(timestamp(container.created_at)),
        started_at: container.started_at().map(timestamp),
        finished_at: container.exit().map(|exit| timestamp(exit.finished_at)),
        exit: container.exit().map(exit),
        pid: match container.state {
            ContainerState::Running { pid, .. } => u32::try_from(pid).unwrap_or(0),
            ContainerState::Created { .. } | ContainerState::Exited(_) => 0,
        },
        labels: map(&config.labels),
        annotations: map(&config.annotations),
        face: face(config.face).into(),
        tty: config.tty,
        stdin: config.stdin,
        attempt: config.attempt,
    }
}

/// How a container ended.
pub(super) fn exit(exit: &Exit) -> pb::Exit {
    pb::Exit {
        code: u32::try_from(exit.code).unwrap_or(255),
        signal: u32::try_from(exit.signal).unwrap_or(0),
        reason: match exit.reason {
            ExitReason::Completed => pb::ExitReason::Completed,
            ExitReason::Error => pb::ExitReason::Error,
            ExitReason::OomKilled => pb::ExitReason::OomKilled,
            ExitReason::StartError => pb::ExitReason::StartError,
            ExitReason::Lost => pb::ExitReason::Lost,
        }
        .into(),
        message: exit.message.clone(),
    }
}

/// How an exec ended.
pub(super) fn exec_exit(exit: SessionExit) -> pb::ExecExit {
    pb::ExecExit {
        code: u32::try_from(exit.code).unwrap_or(255),
        signal: u32::try_from(exit.signal).unwrap_or(0),
        timed_out: exit.timed_out,
    }
}

/// How a container was wished, with the defaults that were chosen; none for those of CRI.
pub(super) fn container_config(container: &Container) -> Option<pb::ContainerConfig> {
    let config = &container.config;
    if config.face != Face::Native {
        return None;
    }
    let wished: pb::ContainerConfig = parse::kept(&config.request);
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let security = wished.security.clone().unwrap_or_default();
    let paths = |paths: &[String]| {
        Some(pb::PathSet {
            paths: paths.to_vec(),
        })
    };
    Some(pb::ContainerConfig {
        name: config.name.clone(),
        env: config
            .env
            .iter()
            .map(|(name, value)| (name.clone(), text(value)))
            .collect(),
        security: Some(pb::Security {
            masked_paths: paths(&config.security.masked_paths),
            readonly_paths: paths(&config.security.readonly_paths),
            ..security
        }),
        stop_signal: crate::signal::name(container.stop_signal).unwrap_or_default(),
        stop_timeout: Some(nanoseconds(
            u64::try_from(config.stop_timeout.as_nanos()).unwrap_or(u64::MAX),
        )),
        log: Some(match &config.log {
            None => pb::LogConfig {
                disabled: true,
                ..Default::default()
            },
            Some(log) => pb::LogConfig {
                disabled: false,
                rotate_bytes: log.rotate_bytes,
                keep_files: log.keep_files,
            },
        }),
        labels: map(&config.labels),
        annotations: map(&config.annotations),
        ..wished
    })
}

/// Where a container lives, for people.
pub(super) fn container_info(lifecycle: &Lifecycle, container: &Container) -> String {
    let root = lifecycle
        .sandbox_dir(&container.sandbox_id)
        .join("containers")
        .join(container.id.as_str())
        .join("rootfs");
    serde_json::json!({
        "pid": container.pid().unwrap_or(0),
        "cgroup": container.cgroup,
        "logPath": container.config.log.as_ref().map(|log| &log.path),
        "root": root,
        "layers": container.layers.iter().map(|layer| layer.dir).collect::<Vec<_>>(),
        "user": container.user,
    })
    .to_string()
}

fn platform(platform: &Platform) -> pb::Platform {
    pb::Platform {
        os: platform.os.clone(),
        architecture: platform.architecture.clone(),
        variant: platform.variant.clone().unwrap_or_default(),
    }
}

/// An image.
pub(super) fn image(image: &Image) -> pb::Image {
    let built_at = image
        .config
        .created
        .as_deref()
        .and_then(|text| text.parse::<jiff::Timestamp>().ok());
    pb::Image {
        id: image.id.to_string(),
        tags: image.tags.iter().cloned().collect(),
        digests: image.digests.iter().cloned().collect(),
        size_bytes: image.size_bytes,
        pinned: image.pinned,
        pulled_at: Some(timestamp(image.pulled_at)),
        faces: image
            .faces
            .iter()
            .map(|owner| face(*owner).into())
            .collect(),
        labels: map(&image.config.labels),
        built_at: built_at.map(|at| prost_types::Timestamp {
            seconds: at
                .as_nanosecond()
                .div_euclid(1_000_000_000)
                .try_into()
                .unwrap_or(0),
            nanos: at
                .as_nanosecond()
                .rem_euclid(1_000_000_000)
                .try_into()
                .unwrap_or(0),
        }),
        platform: Some(platform(&image.config.platform)),
    }
}

/// What an image says about running it.
pub(super) fn image_config(config: &ImageConfig) -> pb::ImageConfig {
    pb::ImageConfig {
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        env: config.env.clone(),
        working_dir: config.working_dir.clone(),
        user: config.user.clone(),
        stop_signal: config.stop_signal.clone().unwrap_or_default(),
        exposed_ports: config.exposed_ports.iter().cloned().collect(),
        volumes: config.volumes.iter().cloned().collect(),
    }
}

/// A layer of an image.
pub(super) fn layer(layer: &Layer) -> pb::ImageLayer {
    pb::ImageLayer {
        diff_id: layer.diff_id.to_string(),
        unpacked_bytes: layer.size_bytes,
        inodes: layer.inodes,
    }
}

/// How far a pull is; none at its very end, which is the result.
pub(super) fn progress(progress: &PullProgress) -> Option<pb::PullProgress> {
    let stage = match progress.stage {
        PullStage::Resolving => pb::PullStage::Resolving,
        PullStage::Fetching => pb::PullStage::Fetching,
        PullStage::Committing => pb::PullStage::Committing,
        PullStage::Done => return None,
    };
    Some(pb::PullProgress {
        stage: stage.into(),
        layers: progress.layers.iter().map(layer_progress).collect(),
    })
}

fn layer_progress(layer: &LayerProgress) -> pb::LayerProgress {
    pb::LayerProgress {
        digest: layer.digest.to_string(),
        state: match layer.state {
            LayerState::Waiting => pb::LayerState::Waiting,
            LayerState::Fetching => pb::LayerState::Fetching,
            LayerState::Unpacking => pb::LayerState::Unpacking,
            LayerState::Done => pb::LayerState::Done,
            LayerState::Present => pb::LayerState::Present,
        }
        .into(),
        fetched_bytes: layer.fetched_bytes,
        total_bytes: layer.total_bytes,
    }
}

/// What a remote offers.
pub(super) fn remote_image(image: RemoteImage) -> pb::RemoteImage {
    pb::RemoteImage {
        remote: image.remote,
        reference: image.reference.map(String::from).unwrap_or_default(),
        os: image.os,
        release: image.release,
        release_title: image.release_title,
        architecture: image.architecture,
        variant: image.variant,
        serial: image.serial,
        fingerprint: image
            .fingerprint
            .map(|digest| digest.to_string())
            .unwrap_or_default(),
        size_bytes: image.size_bytes,
        unreadable: image.unreadable,
        aliases: image.aliases,
    }
}

/// What a pull brought.
pub(super) fn pulled(pulled: &Pulled) -> pb::PulledImage {
    let digest = pulled
        .index_digest
        .as_ref()
        .unwrap_or(&pulled.manifest_digest);
    pb::PulledImage {
        image_id: pulled.image.to_string(),
        reference: pulled.reference.to_string(),
        manifest_digest: digest.to_string(),
    }
}

/// How a system container stands.
pub(super) fn system_state(state: &SystemState) -> pb::SystemState {
    match state {
        SystemState::Stopped => pb::SystemState::Stopped,
        SystemState::Starting => pb::SystemState::Starting,
        SystemState::Running { .. } => pb::SystemState::Running,
        SystemState::Stopping => pb::SystemState::Stopping,
        SystemState::Frozen { .. } => pb::SystemState::Frozen,
    }
}

/// A system container.
pub(super) fn system(view: &SystemView) -> pb::System {
    let system = &view.system;
    let config = &system.config;
    let (pid, since) = match view.state {
        SystemState::Running { pid, since } | SystemState::Frozen { pid, since } => {
            (u32::try_from(pid).unwrap_or(0), Some(timestamp(since)))
        }
        _ => (0, None),
    };
    let sandbox = view.sandbox.as_ref().filter(|sandbox| sandbox.is_ready());
    let attachment = sandbox.and_then(|sandbox| sandbox.attachment.as_ref());
    let text = |ip: &std::net::IpAddr| ip.to_string();
    pb::System {
        id: system.id.to_string(),
        name: config.name.clone(),
        state: system_state(&view.state).into(),
        pid,
        addresses: attachment
            .iter()
            .flat_map(|attachment| &attachment.addresses)
            .map(|net| net.addr().to_string())
            .collect(),
        gateways: attachment
            .iter()
            .flat_map(|attachment| &attachment.gateways)
            .map(text)
            .collect(),
        mac: attachment
            .and_then(|attachment| attachment.mac)
            .map(|mac| mac.to_string())
            .unwrap_or_default(),
        host_interface: attachment
            .map(|attachment| attachment.host_interface.clone())
            .unwrap_or_default(),
        sandbox_id: sandbox.map(|one| one.id.to_string()).unwrap_or_default(),
        container_id: view
            .container
            .as_ref()
            .map(|container| container.id.to_string())
            .unwrap_or_default(),
        image: config.image.clone(),
        image_id: system.image_id.to_string(),
        created_at: Some(timestamp(system.created_at)),
        started_at: since,
        autostart: Some(autostart(&config.autostart)),
        ids: Some(pb::IdRange {
            first_uid: system.ids.host_uid,
            first_gid: system.ids.host_gid,
            length: system.ids.length,
            shared: system.shares_ids,
        }),
        labels: map(&config.labels),
        starts: system.starts,
        last_exit: system.last_exit.as_ref().map(exit),
        last_exit_at: system
            .last_exit
            .as_ref()
            .map(|exit| timestamp(exit.finished_at)),
    }
}

fn autostart(autostart: &Autostart) -> pb::Autostart {
    pb::Autostart {
        enabled: autostart.enabled,
        order: autostart.order,
        delay: prost_types::Duration::try_from(autostart.delay).ok(),
    }
}

/// How a system container was wished, with the defaults that were chosen.
pub(super) fn system_config(system: &System) -> pb::SystemConfig {
    let wished: pb::SystemConfig = parse::kept(&system.config.request);
    pb::SystemConfig {
        hostname: system.config.hostname.clone(),
        labels: map(&system.config.labels),
        init: system.init.clone(),
        stop_timeout: prost_types::Duration::try_from(system.config.stop_timeout).ok(),
        autostart: Some(autostart(&system.config.autostart)),
        handler: handler(&system.config.handler),
        ..wished
    }
}

/// What a system container uses.
pub(super) fn system_usage(usage: &SystemUse) -> pb::SystemUsage {
    let cgroup = &usage.cgroup;
    let link = usage.interface.unwrap_or_default();
    pb::SystemUsage {
        cpu_ns: cgroup.stats.cpu_usage_ns,
        disk_read_bytes: cgroup.io.iter().map(|disk| disk.read_bytes).sum(),
        disk_write_bytes: cgroup.io.iter().map(|disk| disk.write_bytes).sum(),
        memory_bytes: cgroup.stats.memory_usage_bytes,
        kernel_memory_bytes: cgroup.memory_kernel_bytes,
        swap_bytes: cgroup.stats.swap_usage_bytes.unwrap_or(0),
        tasks: cgroup.stats.tasks,
        tx_bytes: link.tx_bytes,
        rx_bytes: link.rx_bytes,
        written_bytes: usage.disk.bytes,
    }
}

/// The kind of an event; none for those that this protocol does not have.
pub(super) fn event_kind(kind: EventKind) -> Option<pb::EventKind> {
    Some(match kind {
        EventKind::AgentStarted => pb::EventKind::AgentStarted,
        EventKind::SandboxCreated => pb::EventKind::SandboxCreated,
        EventKind::SandboxStarted => pb::EventKind::SandboxStarted,
        EventKind::SandboxStopped => pb::EventKind::SandboxStopped,
        EventKind::SandboxRemoved => pb::EventKind::SandboxRemoved,
        EventKind::SandboxLost => pb::EventKind::SandboxLost,
        EventKind::ContainerCreated => pb::EventKind::ContainerCreated,
        EventKind::ContainerStarted => pb::EventKind::ContainerStarted,
        EventKind::ContainerExited => pb::EventKind::ContainerExited,
        EventKind::ContainerOom => pb::EventKind::ContainerOom,
        EventKind::ContainerUpdated => return None,
        EventKind::ContainerRemoved => pb::EventKind::ContainerRemoved,
        EventKind::ImagePulled => pb::EventKind::ImagePulled,
        EventKind::ImageTagged => pb::EventKind::ImageTagged,
        EventKind::ImageUntagged => pb::EventKind::ImageUntagged,
        EventKind::ImageRemoved => pb::EventKind::ImageRemoved,
        EventKind::NetworkCreated => pb::EventKind::NetworkCreated,
        EventKind::NetworkDeleted => pb::EventKind::NetworkDeleted,
        EventKind::SystemCreated => pb::EventKind::SystemCreated,
        EventKind::SystemStarted => pb::EventKind::SystemStarted,
        EventKind::SystemRebooted => pb::EventKind::SystemRebooted,
        EventKind::SystemStopped => pb::EventKind::SystemStopped,
        EventKind::SystemRemoved => pb::EventKind::SystemRemoved,
    })
}

/// A place in the order of events.
pub(super) fn cursor(cursor: event::Cursor) -> pb::Cursor {
    pb::Cursor {
        epoch: cursor.epoch,
        number: cursor.number,
    }
}

/// An event; none if this protocol does not have its kind.
pub(super) fn event(event: &event::Event) -> Option<pb::Event> {
    let what = &event.what;
    let kind = event_kind(what.kind)?;
    let mut attributes = map(&what.attributes);
    if kind == pb::EventKind::SandboxLost
        && let Some(cause) = attributes.remove("reason")
    {
        attributes.insert("cause".to_owned(), cause);
    }
    if attributes.get("signal").is_some_and(|signal| signal == "0") {
        attributes.remove("signal");
    }
    Some(pb::Event {
        cursor: Some(cursor(event.cursor)),
        time: Some(timestamp(event.at)),
        kind: kind.into(),
        face: face(what.face).into(),
        sandbox_id: what
            .sandbox_id
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        container_id: what
            .container_id
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        image_id: what
            .image_id
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        attributes,
    })
}

/// A finding about the host.
pub(super) fn finding(finding: check::Finding) -> pb::Finding {
    pb::Finding {
        severity: match finding.severity {
            check::Severity::Error => pb::Severity::Error,
            check::Severity::Warning => pb::Severity::Warning,
            check::Severity::Info => pb::Severity::Info,
        }
        .into(),
        subject: finding.subject,
        explanation: finding.explanation,
        remedy: finding.remedy,
    }
}

/// A difference between store and host.
pub(super) fn difference(difference: fsck::Difference) -> pb::Difference {
    pb::Difference {
        kind: match difference.kind {
            fsck::DifferenceKind::Leftover => pb::DifferenceKind::Leftover,
            fsck::DifferenceKind::Missing => pb::DifferenceKind::Missing,
        }
        .into(),
        subject_type: difference.subject_type.to_owned(),
        subject: difference.subject,
        cause: difference.cause.to_owned(),
        repair: difference.repair.to_owned(),
        repaired: matches!(difference.repaired, Some(Ok(()))),
        error: match difference.repaired {
            Some(Err(error)) => error,
            Some(Ok(())) | None => String::new(),
        },
    }
}

/// Use of a file system, with what statvfs(3) says of it.
pub(super) fn filesystem(
    at: Time,
    mountpoint: &Path,
    bytes: u64,
    inodes: u64,
    whole: (u64, u64),
) -> pb::FilesystemUsage {
    pb::FilesystemUsage {
        mountpoint: mountpoint.to_string_lossy().into_owned(),
        used_bytes: bytes,
        used_inodes: inodes,
        capacity_bytes: whole.0,
        available_bytes: whole.1,
        time: Some(timestamp(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_split_also_before_1970() {
        for (ns, seconds, nanos) in [
            (1_500_000_000, 1, 500_000_000),
            (0, 0, 0),
            (-1, -1, 999_999_999),
        ] {
            let stamp = timestamp(Time::from_unix_ns(ns));
            assert_eq!((stamp.seconds, stamp.nanos), (seconds, nanos), "{ns}");
        }
        let time = nanoseconds(u64::MAX);
        assert!(time.seconds > 0 && (0..1_000_000_000).contains(&time.nanos));
    }

    #[test]
    fn events_keep_the_words_of_the_contract() {
        let event = |kind, name, value: &str| {
            let what = event::EventDraft::new(kind, Face::Cri).attribute(name, value);
            let event = event::Event {
                cursor: event::Cursor {
                    epoch: 1,
                    number: 2,
                },
                at: Time::from_unix_ns(3),
                what,
            };
            super::event(&event).map(|event| event.attributes)
        };
        let one =
            |name: &str, value: &str| Some(HashMap::from([(name.to_owned(), value.to_owned())]));
        assert_eq!(
            event(EventKind::SandboxLost, "reason", "x"),
            one("cause", "x")
        );
        assert_eq!(
            event(EventKind::ContainerExited, "signal", "0"),
            Some(HashMap::new())
        );
        assert_eq!(
            event(EventKind::ContainerExited, "signal", "9"),
            one("signal", "9")
        );
        assert_eq!(event(EventKind::ContainerUpdated, "x", "y"), None);
    }
}
