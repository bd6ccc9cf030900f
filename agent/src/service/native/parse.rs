//! `longshore.v1` messages -> requests of the chapters. From here on nothing can be invalid.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use longshore_proto::longshore::v1 as pb;
use prost::Message;

use super::error::NativeError;
use crate::{
    clock::Time,
    id::Face,
    image::{
        ExportPacking, ImageRef, ImportRequest, ImportSizes, Platform, Reference, RegistryAuth,
        RemoteFilter, Secret,
    },
    lifecycle::{
        AttachWish, ExecWish, LifecycleChapterConfig,
        container::{
            AppArmorWish, ContainerConfig, DeviceWish, IdMapWish, LogWish, MountSource, MountWish,
            Propagation, Resources, RlimitWish, SeccompWish, Security, UserWish,
        },
        sandbox::{Dns, PidMode, SandboxConfig, SandboxKey},
        system::{Autostart, SystemConfig},
    },
    network::{Mode, PortMapping, Protocol, SandboxNetwork},
    service::edge,
    signal,
};

type Parsed<T> = Result<T, NativeError>;

/// Time between stop signal and SIGKILL when nobody says.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// A whole system takes longer to halt than a program.
const SYSTEM_STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of labels and annotations together.
const LABEL_BYTES: usize = 64 << 10;
/// Longest name of a sandbox or container.
const NAME_BYTES: usize = 63;
/// Longest seccomp profile.
const PROFILE_BYTES: usize = 1 << 20;
/// Most bytes of stdin in one message.
pub(super) const STDIN_BYTES: usize = 1 << 20;
/// Shortest time between two messages of statistics.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

/// Paths that a container does not see unless it says otherwise.
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// Paths that a container cannot write unless it says otherwise.
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Resource limits of processes.
///
/// Source: getrlimit(2).
const RLIMITS: [&str; 16] = [
    "AS",
    "CORE",
    "CPU",
    "DATA",
    "FSIZE",
    "LOCKS",
    "MEMLOCK",
    "MSGQUEUE",
    "NICE",
    "NOFILE",
    "NPROC",
    "RSS",
    "RTPRIO",
    "RTTIME",
    "SIGPENDING",
    "STACK",
];

type Maps = Vec<u8>;

/// Maps are encoded in a different order each time; they are taken out, and come back sorted.
pub(super) fn sandbox_without_maps(mut config: pb::SandboxConfig) -> (pb::SandboxConfig, Maps) {
    let maps = sorted([
        std::mem::take(&mut config.labels),
        std::mem::take(&mut config.annotations),
        std::mem::take(&mut config.sysctls),
    ]);
    (config, maps)
}

/// As [`sandbox_without_maps`].
pub(super) fn container_without_maps(
    mut config: pb::ContainerConfig,
) -> (pb::ContainerConfig, Maps) {
    let maps = sorted([
        std::mem::take(&mut config.labels),
        std::mem::take(&mut config.annotations),
        std::mem::take(&mut config.env),
    ]);
    (config, maps)
}

/// As [`sandbox_without_maps`].
pub(super) fn system_without_maps(mut config: pb::SystemConfig) -> (pb::SystemConfig, Maps) {
    let labels = std::mem::take(&mut config.labels);
    (config, sorted([labels, HashMap::new(), HashMap::new()]))
}

fn sorted(maps: [HashMap<String, String>; 3]) -> Maps {
    let maps = maps.map(|map| map.into_iter().collect::<BTreeMap<_, _>>());
    serde_json::to_vec(&maps).expect("maps of text are JSON")
}

/// Keeps a message for verbose answers; equal messages are kept equally, since equal wishes join.
fn keep(message: &impl Message) -> serde_json::Value {
    serde_json::Value::String(BASE64_STANDARD.encode(message.encode_to_vec()))
}

/// A kept message; its default if it is of another kind.
pub(super) fn kept<M: Message + Default>(value: &serde_json::Value) -> M {
    value
        .as_str()
        .and_then(|text| BASE64_STANDARD.decode(text).ok())
        .and_then(|bytes| M::decode(bytes.as_slice()).ok())
        .unwrap_or_default()
}

/// `RunSandboxRequest`; `spare_name` is for one that has no name.
pub(super) fn sandbox(
    config: pb::SandboxConfig,
    spare_name: impl FnOnce() -> String,
) -> Parsed<SandboxConfig> {
    name("config.name", &config.name)?;
    labels(&config.labels, &config.annotations)?;
    let network = network(config.network.as_ref())?;
    hostname(&config.hostname, network.mode)?;
    edge::text("config.handler", &config.handler, 128)?;
    let name = if config.name.is_empty() {
        spare_name()
    } else {
        config.name.clone()
    };
    let hostname = match (network.mode, config.hostname.as_str()) {
        (Mode::Host, _) => String::new(),
        (_, "") => name.clone(),
        (_, wished) => wished.to_owned(),
    };
    Ok(SandboxConfig {
        face: Face::Native,
        key: SandboxKey {
            namespace: String::new(),
            name,
            uid: String::new(),
            attempt: 0,
        },
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        hostname,
        dns: config.dns.as_ref().map(dns).transpose()?,
        sysctls: sysctls(&config.sysctls, network.mode, config.host_ipc)?,
        network,
        pid: pid_mode(config.pid_mode)?,
        host_ipc: config.host_ipc,
        id_map: None,
        log_directory: log_directory(&config.log_directory)?,
        handler: config.handler.clone(),
        cgroup_parent: None,
        privileged: true,
        system: None,
        idempotency_key: String::new(),
        request: keep(&sandbox_without_maps(config).0),
    })
}

/// A name as sandboxes and containers have them; empty is for the agent to choose.
pub(super) fn name(field: &str, name: &str) -> Parsed<()> {
    let valid =
        |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.' | '_');
    let begins_well =
        |name: &str| name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    if name.is_empty() || (name.len() <= NAME_BYTES && name.chars().all(valid) && begins_well(name))
    {
        return Ok(());
    }
    Err(NativeError::invalid(
        field,
        name.escape_default(),
        "1 to 63 of a-z, 0-9, `-`, `.` and `_`, beginning with a letter or digit",
    ))
}

fn labels(labels: &HashMap<String, String>, annotations: &HashMap<String, String>) -> Parsed<()> {
    let size = |map: &HashMap<String, String>| -> usize {
        map.iter().map(|(key, value)| key.len() + value.len()).sum()
    };
    for (field, map) in [
        ("config.labels", labels),
        ("config.annotations", annotations),
    ] {
        if map.contains_key("") {
            return Err(NativeError::invalid(field, "", "keys that are not empty"));
        }
    }
    match (size(labels), size(annotations)) {
        (ours, others) if ours + others <= LABEL_BYTES => Ok(()),
        (ours, others) if ours >= others => Err(NativeError::range(
            "config.labels",
            ours + others,
            0,
            LABEL_BYTES,
        )),
        (ours, others) => Err(NativeError::range(
            "config.annotations",
            ours + others,
            0,
            LABEL_BYTES,
        )),
    }
}

fn unknown_value<T>(field: impl Into<String>, value: i32, expected: &str) -> Parsed<T> {
    Err(NativeError::invalid(
        field,
        value,
        format!("a value of {expected}"),
    ))
}

fn network(wished: Option<&pb::SandboxNetwork>) -> Parsed<SandboxNetwork> {
    let Some(wished) = wished else {
        return Ok(SandboxNetwork::default());
    };
    let mode = match pb::NetworkMode::try_from(wished.mode) {
        Ok(pb::NetworkMode::Unspecified | pb::NetworkMode::Pod) => Mode::Pod,
        Ok(pb::NetworkMode::Host) => Mode::Host,
        Ok(pb::NetworkMode::None) => Mode::None,
        Err(_) => return unknown_value("config.network.mode", wished.mode, "NetworkMode"),
    };
    edge::text("config.network.network", &wished.network, 63)?;
    if mode != Mode::Pod {
        if !wished.network.is_empty() {
            return Err(NativeError::conflict(
                "config.network.network",
                "config.network.mode",
            ));
        }
        if !wished.ports.is_empty() {
            return Err(NativeError::conflict(
                "config.network.ports",
                "config.network.mode",
            ));
        }
    }
    Ok(SandboxNetwork {
        mode,
        network: wished.network.clone(),
        ports: wished
            .ports
            .iter()
            .enumerate()
            .map(|(index, port)| self::port(port, &format!("config.network.ports[{index}]")))
            .collect::<Parsed<_>>()?,
        addresses: Vec::new(),
        keeper: None,
    })
}

fn port(wished: &pb::PortMapping, at: &str) -> Parsed<PortMapping> {
    let number = |name: &str, value: u32| {
        u16::try_from(value)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| NativeError::range(format!("{at}.{name}"), value, 1, u16::MAX))
    };
    let protocol = match pb::Protocol::try_from(wished.protocol) {
        Ok(pb::Protocol::Unspecified | pb::Protocol::Tcp) => Protocol::Tcp,
        Ok(pb::Protocol::Udp) => Protocol::Udp,
        Ok(pb::Protocol::Sctp) => Protocol::Sctp,
        Err(_) => return unknown_value(format!("{at}.protocol"), wished.protocol, "Protocol"),
    };
    let field = || format!("{at}.host_ip");
    let host_ip = match wished.host_ip.as_str() {
        "" => None,
        text => match text.parse::<IpAddr>() {
            Ok(IpAddr::V6(Ipv6Addr::LOCALHOST)) => {
                return Err(NativeError::invalid(
                    field(),
                    text,
                    "an address that the kernel can translate",
                ));
            }
            Ok(address) => Some(address),
            Err(_) => {
                return Err(NativeError::invalid(
                    field(),
                    text.escape_default(),
                    "an IP address",
                ));
            }
        },
    };
    let host_port = number("host_port", wished.host_port)?;
    Ok(PortMapping {
        host_ip,
        host_port,
        container_port: match wished.container_port {
            0 => host_port,
            port => number("container_port", port)?,
        },
        protocol,
    })
}

fn hostname(name: &str, network: Mode) -> Parsed<()> {
    if name.is_empty() {
        return Ok(());
    }
    if network == Mode::Host {
        return Err(NativeError::conflict(
            "config.hostname",
            "config.network.mode",
        ));
    }
    edge::text("config.hostname", name, 64)?;
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if !name.chars().all(valid) || name.starts_with('-') {
        return Err(NativeError::invalid(
            "config.hostname",
            name,
            "letters, digits, `-`, `.` and `_`",
        ));
    }
    Ok(())
}

fn dns(config: &pb::DnsConfig) -> Parsed<Dns> {
    for (index, server) in config.servers.iter().enumerate() {
        let address = server.split('%').next().unwrap_or_default();
        let field = format!("config.dns.servers[{index}]");
        edge::text(&field, server, 128)?;
        if address.parse::<IpAddr>().is_err() || server.contains(char::is_whitespace) {
            return Err(NativeError::invalid(field, server, "an IP address"));
        }
    }
    for (name, values) in [("searches", &config.searches), ("options", &config.options)] {
        for (index, value) in values.iter().enumerate() {
            let field = format!("config.dns.{name}[{index}]");
            edge::required(&field, value)?;
            edge::text(&field, value, 255)?;
            if value.contains(char::is_whitespace) {
                return Err(NativeError::invalid(field, value, "one word"));
            }
        }
    }
    Ok(Dns {
        servers: config.servers.clone(),
        searches: config.searches.clone(),
        options: config.options.clone(),
    })
}

fn sysctls(
    wished: &HashMap<String, String>,
    network: Mode,
    host_ipc: bool,
) -> Parsed<BTreeMap<String, String>> {
    let mut accepted = BTreeMap::new();
    for (name, value) in wished {
        let field = format!("config.sysctls[{}]", name.escape_default());
        edge::text(&field, name, 256)?;
        edge::text(&field, value, 4096)?;
        let of_ipc = name == "kernel.sem"
            || ["kernel.shm", "kernel.msg", "fs.mqueue."]
                .iter()
                .any(|prefix| name.starts_with(prefix));
        let of_network = name.starts_with("net.");
        if name.contains("..") || name.contains('/') || !(of_ipc || of_network) {
            return Err(NativeError::invalid(
                field,
                name,
                "a namespaced one: kernel.sem, kernel.shm*, kernel.msg*, fs.mqueue.* or net.*",
            ));
        }
        if of_network && network == Mode::Host {
            return Err(NativeError::conflict(field, "config.network.mode"));
        }
        if of_ipc && host_ipc {
            return Err(NativeError::conflict(field, "config.host_ipc"));
        }
        accepted.insert(name.clone(), value.clone());
    }
    Ok(accepted)
}

fn pid_mode(value: i32) -> Parsed<PidMode> {
    match pb::PidMode::try_from(value) {
        Ok(pb::PidMode::Unspecified | pb::PidMode::Container) => Ok(PidMode::Container),
        Ok(pb::PidMode::Pod) => Ok(PidMode::Pod),
        Ok(pb::PidMode::Host) => Ok(PidMode::Host),
        Err(_) => unknown_value("config.pid_mode", value, "PidMode"),
    }
}

fn log_directory(path: &str) -> Parsed<Option<PathBuf>> {
    if path.is_empty() {
        return Ok(None);
    }
    edge::absolute_path("config.log_directory", path)?;
    Ok(Some(path.into()))
}

/// `CreateContainerRequest` without the sandbox, and without the log: see [`log`].
pub(super) fn container(config: pb::ContainerConfig) -> Parsed<ContainerConfig> {
    name("config.name", &config.name)?;
    labels(&config.labels, &config.annotations)?;
    image("config.image", &config.image)?;
    for (field, words) in [
        ("config.command", &config.command),
        ("config.args", &config.args),
    ] {
        self::words(field, words)?;
    }
    if config.command.first().is_some_and(String::is_empty) {
        return Err(NativeError::invalid("config.command[0]", "", "a program"));
    }
    if config.stdin_once && !config.stdin {
        return Err(NativeError::missing("config.stdin"));
    }
    let limits = config.resources.clone().unwrap_or_default();
    Ok(ContainerConfig {
        face: Face::Native,
        name: config.name.clone(),
        attempt: 0,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        image: config.image.clone(),
        image_name: config.image.clone(),
        command: config.command.clone(),
        args: config.args.clone(),
        env: environment("config.env", &config.env)?,
        working_dir: working_dir("config.working_dir", &config.working_dir)?,
        user: UserWish {
            supplemental_gids: config.additional_gids.clone(),
            ..user("config.user", &config.user)?.unwrap_or_default()
        },
        mounts: config
            .mounts
            .iter()
            .enumerate()
            .map(|(index, mount)| self::mount(mount, &format!("config.mounts[{index}]")))
            .collect::<Parsed<_>>()?,
        cdi_devices: Vec::new(),
        devices: config
            .devices
            .iter()
            .enumerate()
            .map(|(index, device)| self::device(device, &format!("config.devices[{index}]")))
            .collect::<Parsed<_>>()?,
        resources: resources(&limits)?,
        security: security(config.security.as_ref())?,
        rlimits: config
            .rlimits
            .iter()
            .enumerate()
            .map(|(index, limit)| rlimit(limit, &format!("config.rlimits[{index}]")))
            .collect::<Parsed<_>>()?,
        id_map: IdMapWish::default(),
        pid: None,
        tty: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        stop_signal: match config.stop_signal.as_str() {
            "" => None,
            text => Some(signal_number("config.stop_signal", text)?),
        },
        stop_timeout: config
            .stop_timeout
            .as_ref()
            .map_or(Ok(STOP_TIMEOUT), |time| {
                duration("config.stop_timeout", time)
            })?,
        log: None,
        oom_score_adj: oom_score_adj(limits.oom_score_adj)?,
        system: None,
        idempotency_key: String::new(),
        request: keep(&container_without_maps(config).0),
    })
}

/// `SystemConfig`.
pub(super) fn system(config: pb::SystemConfig) -> Parsed<SystemConfig> {
    edge::required("config.name", &config.name)?;
    name("config.name", &config.name)?;
    if config.name.contains('_') {
        let expected = "a name without `_`, which no host name has";
        return Err(NativeError::invalid("config.name", &config.name, expected));
    }
    labels(&config.labels, &HashMap::new())?;
    image("config.image", &config.image)?;
    let network = network(config.network.as_ref())?;
    if network.mode == Mode::Host {
        // Its root would be nobody there, and its init would rearrange the host's.
        let expected = "POD or NONE";
        return Err(NativeError::invalid(
            "config.network.mode",
            "HOST",
            expected,
        ));
    }
    hostname(&config.hostname, network.mode)?;
    words("config.init", &config.init)?;
    if config
        .init
        .first()
        .is_some_and(|init| !init.starts_with('/'))
    {
        return Err(NativeError::invalid(
            "config.init[0]",
            &config.init[0],
            "an absolute path",
        ));
    }
    edge::text("config.handler", &config.handler, 128)?;
    let limits = config.resources.clone().unwrap_or_default();
    if limits.oom_score_adj != 0 {
        return Err(NativeError::invalid(
            "config.resources.oom_score_adj",
            limits.oom_score_adj,
            "0: an init sets those of its services by itself",
        ));
    }
    let autostart = config.autostart.unwrap_or_default();
    Ok(SystemConfig {
        name: config.name.clone(),
        image: config.image.clone(),
        hostname: match config.hostname.as_str() {
            "" => config.name.clone(),
            hostname => hostname.to_owned(),
        },
        labels: config.labels.clone().into_iter().collect(),
        resources: resources(&limits)?,
        mounts: config
            .mounts
            .iter()
            .enumerate()
            .map(|(index, mount)| self::mount(mount, &format!("config.mounts[{index}]")))
            .collect::<Parsed<_>>()?,
        network,
        dns: config.dns.as_ref().map(dns).transpose()?,
        init: config.init.clone(),
        halt_signal: match config.halt_signal.as_str() {
            "" => None,
            text => Some(signal_number("config.halt_signal", text)?),
        },
        stop_timeout: optional_duration("config.stop_timeout", config.stop_timeout.as_ref())?
            .unwrap_or(SYSTEM_STOP_TIMEOUT),
        autostart: Autostart {
            enabled: autostart.enabled,
            order: autostart.order,
            delay: optional_duration("config.autostart.delay", autostart.delay.as_ref())?
                .unwrap_or_default(),
        },
        handler: config.handler.clone(),
        idempotency_key: String::new(),
        request: keep(&system_without_maps(config).0),
    })
}

/// A state in a filter.
pub(super) fn system_state(value: i32) -> Parsed<Option<pb::SystemState>> {
    match pb::SystemState::try_from(value) {
        Ok(pb::SystemState::Unspecified) => Ok(None),
        Ok(state) => Ok(Some(state)),
        Err(_) => unknown_value("state", value, "SystemState"),
    }
}

/// The name of an image: id, beginning of one, or reference.
pub(super) fn image(field: &str, name: &str) -> Parsed<()> {
    edge::required(field, name)?;
    edge::text(field, name, 1024)?;
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    let is_id = hex.len() <= 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match name.parse::<Reference>() {
        Err(error) if !is_id => Err(NativeError::invalid(field, name, error.expected)),
        _ => Ok(()),
    }
}

/// A reference as registries have them.
pub(super) fn reference(field: &str, text: &str) -> Parsed<ImageRef> {
    edge::required(field, text)?;
    edge::text(field, text, 1024)?;
    text.parse().map_err(|error: crate::image::ReferenceError| {
        NativeError::invalid(field, text, error.expected)
    })
}

/// What to pull: an image of a registry or of a remote. A remote asks nobody who they are.
pub(super) fn wanted(request: &pb::PullImageRequest) -> Parsed<Reference> {
    let (field, text) = ("reference", &request.reference);
    edge::required(field, text)?;
    edge::text(field, text, 1024)?;
    let reference = text
        .parse()
        .map_err(|error: crate::image::ReferenceError| {
            NativeError::invalid(field, text, error.expected)
        })?;
    if matches!(reference, Reference::Remote(_)) && request.auth.is_some() {
        return Err(NativeError::invalid(
            "auth",
            "credentials",
            "nothing, as a remote of distributions' images takes none",
        ));
    }
    Ok(reference)
}

/// Which images of remotes are wanted.
pub(super) fn remote_filter(request: pb::ListRemoteImagesRequest) -> Parsed<RemoteFilter> {
    let wish = |field: &str, text: String| {
        edge::text(field, &text, 128)?;
        Ok::<_, NativeError>((!text.is_empty()).then_some(text))
    };
    Ok(RemoteFilter {
        remote: wish("remote", request.remote)?,
        os: wish("os", request.os)?,
        release: wish("release", request.release)?,
        architecture: wish("architecture", request.architecture)?,
        variant: wish("variant", request.variant)?,
    })
}

/// What an import is to become, and of how large files.
pub(super) fn import(target: pb::ImportTarget) -> Parsed<ImportRequest> {
    let tag = if target.tag.is_empty() {
        None
    } else {
        Some(self::tag(&target.tag)?)
    };
    if target.file_sizes.contains(&0) {
        return Err(NativeError::invalid(
            "file_sizes",
            0,
            "files that have bytes",
        ));
    }
    let sizes = match target.file_sizes[..] {
        [] => return Err(NativeError::missing("file_sizes")),
        [one] => ImportSizes::One(one),
        [metadata, root] => ImportSizes::Pair(metadata, root),
        _ => {
            let (field, count) = ("file_sizes", target.file_sizes.len());
            return Err(NativeError::invalid(field, count, "one file, or two"));
        }
    };
    Ok(ImportRequest {
        tag,
        platform: platform(target.platform)?,
        face: Face::Native,
        sizes,
    })
}

/// How an export is packed.
pub(super) fn packing(value: i32) -> Parsed<ExportPacking> {
    match pb::ExportPacking::try_from(value) {
        Ok(pb::ExportPacking::Unspecified | pb::ExportPacking::Zstd) => Ok(ExportPacking::Zstd),
        Ok(pb::ExportPacking::None) => Ok(ExportPacking::Plain),
        Ok(pb::ExportPacking::Gzip) => Ok(ExportPacking::Gzip),
        Err(_) => Err(NativeError::invalid(
            "packing",
            value,
            "a value of ExportPacking",
        )),
    }
}

/// A tag to give: no digest.
pub(super) fn tag(text: &str) -> Parsed<ImageRef> {
    let tag = reference("tag", text)?;
    if tag.tag().is_none() {
        return Err(NativeError::invalid("tag", text, "a tag and no digest"));
    }
    Ok(tag)
}

/// Credentials; none are none.
pub(super) fn auth(auth: Option<pb::RegistryAuth>) -> Parsed<RegistryAuth> {
    use pb::registry_auth::Credential;
    let Some(auth) = auth else {
        return Ok(RegistryAuth::Anonymous);
    };
    let token = |field: &str, text: String| {
        if text.is_empty() {
            return Err(NativeError::missing(field));
        }
        Ok(Secret::new(text))
    };
    match auth.credential {
        None => Err(NativeError::missing("auth.credential")),
        Some(Credential::Basic(basic)) => {
            edge::required("auth.basic.username", &basic.username)?;
            Ok(RegistryAuth::Basic {
                username: basic.username,
                password: Secret::new(basic.password),
            })
        }
        Some(Credential::IdentityToken(text)) => Ok(RegistryAuth::Identity {
            token: token("auth.identity_token", text)?,
        }),
        Some(Credential::RegistryToken(text)) => Ok(RegistryAuth::Bearer {
            token: token("auth.registry_token", text)?,
        }),
    }
}

/// A platform; what is not said is the host's.
pub(super) fn platform(wished: Option<pb::Platform>) -> Parsed<Platform> {
    let mut platform = Platform::host();
    let Some(wished) = wished else {
        return Ok(platform);
    };
    for (field, text) in [
        ("platform.os", &wished.os),
        ("platform.architecture", &wished.architecture),
        ("platform.variant", &wished.variant),
    ] {
        let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if text.len() > 64 || !text.chars().all(valid) {
            return Err(NativeError::invalid(
                field,
                text.escape_default(),
                "a word as `linux`, `amd64` or `v8`",
            ));
        }
    }
    if !wished.os.is_empty() {
        platform.os = wished.os;
    }
    if !wished.architecture.is_empty() {
        platform.architecture = wished.architecture;
    }
    platform.variant = Some(wished.variant).filter(|variant| !variant.is_empty());
    Ok(platform)
}

fn words(field: &str, words: &[String]) -> Parsed<()> {
    match words.iter().position(|word| word.contains('\0')) {
        Some(at) => Err(NativeError::invalid(
            format!("{field}[{at}]"),
            words[at].escape_default(),
            "no NUL",
        )),
        None => Ok(()),
    }
}

fn environment(field: &str, env: &HashMap<String, String>) -> Parsed<Vec<(String, Vec<u8>)>> {
    let sorted: BTreeMap<_, _> = env.iter().collect();
    sorted
        .into_iter()
        .map(|(name, value)| {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(NativeError::invalid(
                    field,
                    name.escape_default(),
                    "names without `=` and NUL",
                ));
            }
            if value.contains('\0') {
                return Err(NativeError::invalid(
                    field,
                    name.escape_default(),
                    "values without NUL",
                ));
            }
            Ok((name.clone(), value.clone().into_bytes()))
        })
        .collect()
}

fn working_dir(field: &str, path: &str) -> Parsed<String> {
    if !path.is_empty() {
        edge::text(field, path, 4096)?;
        if !path.starts_with('/') {
            return Err(NativeError::invalid(field, path, "an absolute path"));
        }
    }
    Ok(path.to_owned())
}

/// `name` or `uid`, either with `:group` or `:gid`.
fn user(field: &str, text: &str) -> Parsed<Option<UserWish>> {
    if text.is_empty() {
        return Ok(None);
    }
    edge::text(field, text, 256)?;
    let parts: Vec<_> = text.split(':').collect();
    let well_formed = parts.len() <= 2
        && parts
            .iter()
            .all(|part| !part.is_empty() && !part.contains(char::is_whitespace))
        && parts.iter().all(|part| {
            // What looks like a number must be one that the kernel has.
            !part.starts_with(['-', '+'])
                && (!part.bytes().all(|b| b.is_ascii_digit()) || part.parse::<u32>().is_ok())
        });
    if !well_formed {
        return Err(NativeError::invalid(
            field,
            text,
            "`name` or `uid`, either with `:group` or `:gid`",
        ));
    }
    Ok(Some(UserWish {
        name: Some(text.to_owned()),
        ..UserWish::default()
    }))
}

fn mount(mount: &pb::Mount, at: &str) -> Parsed<MountWish> {
    use pb::mount::Source;
    let target = format!("{at}.target");
    edge::required(&target, &mount.target)?;
    edge::absolute_path(&target, &mount.target)?;
    let mut options = Vec::new();
    if mount.noexec {
        options.push("noexec".to_owned());
    }
    let source = mount
        .source
        .as_ref()
        .ok_or_else(|| NativeError::missing(format!("{at}.source")))?;
    let (source, propagation, recursive_readonly) = match source {
        Source::Bind(bind) => bind_mount(bind, mount.readonly, at)?,
        Source::Tmpfs(tmpfs) => {
            for (option, unless) in [("nosuid", mount.suid), ("nodev", mount.dev)] {
                if !unless {
                    options.push(option.to_owned());
                }
            }
            (tmpfs_mount(tmpfs, at)?, Propagation::Private, false)
        }
    };
    Ok(MountWish {
        target: mount.target.clone().into(),
        source,
        readonly: mount.readonly,
        recursive_readonly,
        propagation,
        options,
        selinux_relabel: false,
        id_map: None,
    })
}

fn bind_mount(
    bind: &pb::BindMount,
    readonly: bool,
    at: &str,
) -> Parsed<(MountSource, Propagation, bool)> {
    let field = |name: &str| format!("{at}.bind.{name}");
    edge::required(&field("host_path"), &bind.host_path)?;
    edge::absolute_path(&field("host_path"), &bind.host_path)?;
    let propagation = match pb::MountPropagation::try_from(bind.propagation) {
        Ok(pb::MountPropagation::Unspecified | pb::MountPropagation::Private) => {
            Propagation::Private
        }
        Ok(pb::MountPropagation::HostToContainer) => Propagation::HostToContainer,
        Ok(pb::MountPropagation::Bidirectional) => Propagation::Bidirectional,
        Err(_) => return unknown_value(field("propagation"), bind.propagation, "MountPropagation"),
    };
    if bind.recursive_readonly && !readonly {
        return Err(NativeError::missing(format!("{at}.readonly")));
    }
    if bind.recursive_readonly && propagation != Propagation::Private {
        return Err(NativeError::conflict(
            field("recursive_readonly"),
            field("propagation"),
        ));
    }
    let source = MountSource::Bind {
        path: bind.host_path.clone().into(),
        create: false,
        recursive: true,
    };
    Ok((source, propagation, bind.recursive_readonly))
}

fn tmpfs_mount(tmpfs: &pb::TmpfsMount, at: &str) -> Parsed<MountSource> {
    if tmpfs.mode > 0o7777 {
        return Err(NativeError::invalid(
            format!("{at}.tmpfs.mode"),
            format!("{:#o}", tmpfs.mode),
            "permission bits, as 0o1777",
        ));
    }
    Ok(MountSource::Tmpfs {
        size_bytes: Some(tmpfs.size_bytes).filter(|size| *size != 0),
        mode: Some(if tmpfs.mode == 0 { 0o1777 } else { tmpfs.mode }),
    })
}

fn device(device: &pb::Device, at: &str) -> Parsed<DeviceWish> {
    let field = |name: &str| format!("{at}.{name}");
    edge::required(&field("host_path"), &device.host_path)?;
    edge::absolute_path(&field("host_path"), &device.host_path)?;
    let container_path = match device.container_path.as_str() {
        "" => &device.host_path,
        path => {
            edge::absolute_path(&field("container_path"), path)?;
            &device.container_path
        }
    };
    if device.permissions.len() > 3 || !device.permissions.chars().all(|c| "rwm".contains(c)) {
        return Err(NativeError::invalid(
            field("permissions"),
            device.permissions.escape_default(),
            "some of `rwm`",
        ));
    }
    Ok(DeviceWish {
        host_path: device.host_path.clone().into(),
        container_path: container_path.into(),
        permissions: match device.permissions.as_str() {
            "" => "rwm".into(),
            some => some.to_owned(),
        },
    })
}

fn resources(limits: &pb::Resources) -> Parsed<Resources> {
    let field = |name: &str| format!("config.resources.{name}");
    let some = |value: u64| Some(value).filter(|value| *value != 0);
    let signed = |name: &str, value: u64| {
        some(value)
            .map(|value| {
                i64::try_from(value)
                    .map_err(|_| NativeError::range(field(name), value, 0, i64::MAX))
            })
            .transpose()
    };
    let list = |name: &str, value: &str| -> Parsed<Option<String>> {
        let valid = value.len() <= 1024
            && value
                .chars()
                .all(|c| c.is_ascii_digit() || matches!(c, ',' | '-'));
        if !valid {
            return Err(NativeError::invalid(
                field(name),
                value.escape_default(),
                "a list as `0-3,6`",
            ));
        }
        Ok(Some(value.to_owned()).filter(|value| !value.is_empty()))
    };
    let (cpu_period_us, cpu_quota_us, cpu_shares) = cpu(limits)?;
    let memory_limit_bytes = signed("memory_limit_bytes", limits.memory_limit_bytes)?;
    Ok(Resources {
        cpu_period_us,
        cpu_quota_us,
        cpu_shares,
        cpuset_cpus: list("cpuset_cpus", &limits.cpuset_cpus)?,
        cpuset_mems: list("cpuset_mems", &limits.cpuset_mems)?,
        memory_limit_bytes,
        memory_swap_limit_bytes: swap_limit(limits, memory_limit_bytes)?,
        memory_reservation_bytes: signed(
            "memory_reservation_bytes",
            limits.memory_reservation_bytes,
        )?,
        pids_limit: signed("pids_limit", limits.pids_limit)?,
        hugepages: Vec::new(),
        unified: BTreeMap::new(),
    })
}

/// Period, quota and shares.
fn cpu(limits: &pb::Resources) -> Parsed<(Option<u64>, Option<i64>, Option<u64>)> {
    const DEFAULT_PERIOD_US: u64 = 100_000;
    const SHORTEST_US: u64 = 1000;
    let field = |name: &str| format!("config.resources.{name}");
    let microseconds = |name: &str, wished: &Option<prost_types::Duration>, most: u64| {
        let Some(wished) = wished else {
            return Ok(None);
        };
        let field = field(name);
        match u64::try_from(duration(&field, wished)?.as_micros()).unwrap_or(u64::MAX) {
            0 => Ok(None),
            us if (SHORTEST_US..=most).contains(&us) => Ok(Some(us)),
            us => Err(NativeError::range(
                field,
                format!("{us} us"),
                "1000 us",
                format!("{most} us"),
            )),
        }
    };
    let period = microseconds("cpu_period", &limits.cpu_period, 1_000_000)?;
    let quota = microseconds(
        "cpu_quota",
        &limits.cpu_quota,
        i64::MAX.unsigned_abs() / 1000,
    )?;
    let shares = match limits.cpu_shares {
        0 => None,
        shares @ 2..=262_144 => Some(shares),
        shares => return Err(NativeError::range(field("cpu_shares"), shares, 2, 262_144)),
    };
    if limits.cpu_millis == 0 {
        let quota = quota.map(u64::cast_signed);
        return Ok((period.or(quota.map(|_| DEFAULT_PERIOD_US)), quota, shares));
    }
    if shares.is_some() {
        return Err(NativeError::conflict(
            field("cpu_millis"),
            field("cpu_shares"),
        ));
    }
    if quota.is_some() {
        return Err(NativeError::conflict(
            field("cpu_millis"),
            field("cpu_quota"),
        ));
    }
    let (millis, period) = (
        u64::from(limits.cpu_millis),
        period.unwrap_or(DEFAULT_PERIOD_US),
    );
    let quota = (millis * period / 1000).max(SHORTEST_US).cast_signed();
    Ok((
        Some(period),
        Some(quota),
        Some((millis * 1024 / 1000).clamp(2, 262_144)),
    ))
}

/// Memory and swap together; the memory's limit alone allows no swap.
fn swap_limit(limits: &pb::Resources, memory: Option<i64>) -> Parsed<Option<i64>> {
    let field = "config.resources.memory_swap_limit_bytes";
    match (limits.memory_swap_limit_bytes, memory) {
        (0, memory) => Ok(memory),
        (u64::MAX, _) => Ok(Some(-1)),
        (_, None) => Err(NativeError::missing("config.resources.memory_limit_bytes")),
        (swap, Some(memory)) => i64::try_from(swap)
            .ok()
            .filter(|swap| *swap >= memory)
            .map(Some)
            .ok_or_else(|| NativeError::range(field, swap, memory, i64::MAX)),
    }
}

fn oom_score_adj(value: i32) -> Parsed<Option<i32>> {
    if !(-1000..=1000).contains(&value) {
        return Err(NativeError::range(
            "config.resources.oom_score_adj",
            value,
            -1000,
            1000,
        ));
    }
    Ok(Some(value).filter(|value| *value != 0))
}

fn security(wished: Option<&pb::Security>) -> Parsed<Security> {
    let wished = wished.cloned().unwrap_or_default();
    let names = |field: &str, names: &[String]| -> Parsed<Vec<String>> {
        names
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let field = format!("config.security.{field}[{index}]");
                edge::required(&field, name)?;
                edge::text(&field, name, 64)?;
                let upper = name.to_ascii_uppercase();
                Ok(upper
                    .strip_prefix("CAP_")
                    .map(str::to_owned)
                    .unwrap_or(upper))
            })
            .collect()
    };
    let paths = |field: &str, paths: Option<&pb::PathSet>, usual: &[&str]| -> Parsed<Vec<String>> {
        let Some(set) = paths else {
            return Ok(usual.iter().map(|path| (*path).to_owned()).collect());
        };
        for (index, path) in set.paths.iter().enumerate() {
            let field = format!("config.security.{field}.paths[{index}]");
            edge::required(&field, path)?;
            edge::absolute_path(&field, path)?;
        }
        Ok(set.paths.clone())
    };
    Ok(Security {
        privileged: wished.privileged,
        add_capabilities: names("add_capabilities", &wished.add_capabilities)?,
        drop_capabilities: names("drop_capabilities", &wished.drop_capabilities)?,
        ambient_capabilities: Vec::new(),
        no_new_privs: wished.no_new_privs,
        readonly_rootfs: wished.readonly_rootfs,
        masked_paths: paths("masked_paths", wished.masked_paths.as_ref(), &MASKED_PATHS)?,
        readonly_paths: paths(
            "readonly_paths",
            wished.readonly_paths.as_ref(),
            &READONLY_PATHS,
        )?,
        seccomp: seccomp(wished.seccomp.as_ref())?,
        apparmor: AppArmorWish::Default,
        selinux: None,
    })
}

fn seccomp(wished: Option<&pb::Seccomp>) -> Parsed<SeccompWish> {
    let Some(wished) = wished else {
        return Ok(SeccompWish::Default);
    };
    let (mode, profile) = (
        "config.security.seccomp.mode",
        "config.security.seccomp.profile_json",
    );
    let given = !wished.profile_json.is_empty();
    match pb::SeccompMode::try_from(wished.mode) {
        Ok(pb::SeccompMode::Default | pb::SeccompMode::Unconfined) if given => {
            Err(NativeError::conflict(profile, mode))
        }
        Ok(pb::SeccompMode::Unspecified) if !given => Ok(SeccompWish::Default),
        Ok(pb::SeccompMode::Default) => Ok(SeccompWish::Default),
        Ok(pb::SeccompMode::Unconfined) => Ok(SeccompWish::Unconfined),
        Ok(pb::SeccompMode::Custom) if !given => Err(NativeError::missing(profile)),
        Ok(pb::SeccompMode::Unspecified | pb::SeccompMode::Custom) => {
            if wished.profile_json.len() > PROFILE_BYTES {
                return Err(NativeError::range(
                    profile,
                    wished.profile_json.len(),
                    0,
                    PROFILE_BYTES,
                ));
            }
            serde_json::from_str::<oci_spec::runtime::LinuxSeccomp>(&wished.profile_json)
                .and_then(|_| serde_json::from_str(&wished.profile_json))
                .map(SeccompWish::Inline)
                .map_err(|error| NativeError::invalid(profile, error, "OCI's linux.seccomp object"))
        }
        Err(_) => unknown_value(mode, wished.mode, "SeccompMode"),
    }
}

fn rlimit(limit: &pb::Rlimit, at: &str) -> Parsed<RlimitWish> {
    edge::required(&format!("{at}.name"), &limit.name)?;
    let upper = limit.name.to_ascii_uppercase();
    let name = upper.strip_prefix("RLIMIT_").unwrap_or(&upper);
    if !RLIMITS.contains(&name) {
        return Err(NativeError::invalid(
            format!("{at}.name"),
            limit.name.escape_default(),
            "a limit as `nofile` or `RLIMIT_NOFILE`",
        ));
    }
    if limit.soft > limit.hard {
        return Err(NativeError::range(
            format!("{at}.soft"),
            limit.soft,
            0,
            limit.hard,
        ));
    }
    Ok(RlimitWish {
        name: format!("RLIMIT_{name}"),
        soft: limit.soft,
        hard: limit.hard,
    })
}

/// Where the log of a container goes if nobody says.
pub(super) struct LogPlace<'a> {
    /// The sandbox's directory for logs.
    pub(super) directory: Option<&'a Path>,
    /// The agent's.
    pub(super) logs_dir: &'a Path,
    /// Of one container among all of its directory.
    pub(super) name: String,
    /// Sizes.
    pub(super) defaults: &'a LifecycleChapterConfig,
}

/// How the log is kept: `<directory>/<name>/0.log`, of which the agent's goes with the container.
pub(super) fn log(wished: Option<&pb::LogConfig>, place: LogPlace<'_>) -> Option<LogWish> {
    let wished = wished.copied().unwrap_or_default();
    if wished.disabled {
        return None;
    }
    let or = |value, default| if value == 0 { default } else { value };
    Some(LogWish {
        path: place
            .directory
            .unwrap_or(place.logs_dir)
            .join(place.name)
            .join("0.log"),
        rotate_bytes: or(wished.rotate_bytes, place.defaults.log_rotate_bytes),
        keep_files: if wished.keep_files == 0 {
            place.defaults.log_keep_files
        } else {
            wished.keep_files
        },
        owned: place.directory.is_none(),
    })
}

/// Number of a signal given as `SIGHUP`, `HUP` or `1`.
pub(super) fn signal_number(field: &str, text: &str) -> Parsed<i32> {
    edge::required(field, text)?;
    signal::number(text).ok_or_else(|| {
        NativeError::invalid(
            field,
            text.escape_default(),
            "a signal as `SIGHUP`, `HUP` or `1`",
        )
    })
}

/// A time that is not negative.
pub(super) fn duration(field: &str, wished: &prost_types::Duration) -> Parsed<Duration> {
    // A longer time than this is as good as none, and its arithmetic cannot overflow.
    const LONGEST_SECONDS: u64 = 100 * 365 * 24 * 3600;
    let invalid = || {
        NativeError::invalid(
            field,
            format!("{} s {} ns", wished.seconds, wished.nanos),
            "0 s or more",
        )
    };
    let seconds = u64::try_from(wished.seconds).map_err(|_| invalid())?;
    let nanos = u32::try_from(wished.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)
        .ok_or_else(invalid)?;
    Ok(Duration::new(seconds.min(LONGEST_SECONDS), nanos))
}

/// A time that may be missing.
pub(super) fn optional_duration(
    field: &str,
    wished: Option<&prost_types::Duration>,
) -> Parsed<Option<Duration>> {
    wished.map(|time| duration(field, time)).transpose()
}

/// A moment.
pub(super) fn time(field: &str, wished: &prost_types::Timestamp) -> Parsed<Time> {
    if !(0..1_000_000_000).contains(&wished.nanos) {
        return Err(NativeError::invalid(
            field,
            format!("{} ns", wished.nanos),
            "0 to 999999999 ns",
        ));
    }
    let ns = wished
        .seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(wished.nanos.into());
    Ok(Time::from_unix_ns(ns))
}

/// Time from one message of statistics to the next.
pub(super) fn interval(wished: Option<&prost_types::Duration>) -> Parsed<Duration> {
    match optional_duration("interval", wished)? {
        None => Ok(Duration::from_secs(1)),
        Some(interval) if interval >= SHORTEST_INTERVAL => Ok(interval),
        Some(interval) => Err(NativeError::range(
            "interval",
            format!("{interval:?}"),
            "100ms",
            "100 years",
        )),
    }
}

/// Columns and rows.
pub(super) fn terminal_size(field: &str, size: pb::TerminalSize) -> Parsed<(u16, u16)> {
    let cells = |name: &str, value: u32| {
        u16::try_from(value)
            .ok()
            .filter(|cells| *cells != 0)
            .ok_or_else(|| NativeError::range(format!("{field}.{name}"), value, 1, u16::MAX))
    };
    Ok((cells("columns", size.columns)?, cells("rows", size.rows)?))
}

/// `ExecStart` without the container.
pub(super) fn exec(start: pb::ExecStart) -> Parsed<ExecWish> {
    if start.command.first().is_none_or(String::is_empty) {
        return Err(NativeError::missing("start.command"));
    }
    words("start.command", &start.command)?;
    if start.terminal_size.is_some() && !start.tty {
        return Err(NativeError::missing("start.tty"));
    }
    let size = start
        .terminal_size
        .map(|size| terminal_size("start.terminal_size", size))
        .transpose()?;
    let working_dir = working_dir("start.working_dir", &start.working_dir)?;
    Ok(ExecWish {
        env: environment("start.env", &start.env)?,
        working_dir: Some(working_dir).filter(|path| !path.is_empty()),
        user: user("start.user", &start.user)?,
        tty: start.tty,
        stdin: start.stdin,
        stdout: true,
        stderr: !start.tty,
        size: size.or(start.tty.then_some((80, 24))),
        timeout: optional_duration("start.timeout", start.timeout.as_ref())?
            .filter(|time| !time.is_zero()),
        command: start.command,
    })
}

/// `AttachStart` without the container.
pub(super) fn attach(start: &pb::AttachStart) -> Parsed<AttachWish> {
    Ok(AttachWish {
        stdin: start.stdin,
        stdout: true,
        stderr: true,
        replay: start.replay,
        size: start
            .terminal_size
            .map(|size| terminal_size("start.terminal_size", size))
            .transpose()?,
    })
}

/// A face in a filter.
pub(super) fn face(value: i32) -> Parsed<Option<Face>> {
    match pb::Face::try_from(value) {
        Ok(pb::Face::Unspecified) => Ok(None),
        Ok(pb::Face::Cri) => Ok(Some(Face::Cri)),
        Ok(pb::Face::Native) => Ok(Some(Face::Native)),
        Err(_) => unknown_value("face", value, "Face"),
    }
}

/// A state of sandboxes in a filter.
pub(super) fn sandbox_state(value: i32) -> Parsed<Option<pb::SandboxState>> {
    match pb::SandboxState::try_from(value) {
        Ok(pb::SandboxState::Unspecified) => Ok(None),
        Ok(state) => Ok(Some(state)),
        Err(_) => unknown_value("state", value, "SandboxState"),
    }
}

/// A state of containers in a filter.
pub(super) fn container_state(value: i32) -> Parsed<Option<pb::ContainerState>> {
    match pb::ContainerState::try_from(value) {
        Ok(pb::ContainerState::Unspecified) => Ok(None),
        Ok(state) => Ok(Some(state)),
        Err(_) => unknown_value("state", value, "ContainerState"),
    }
}

/// Kinds of events in a filter.
pub(super) fn event_kinds(values: &[i32]) -> Parsed<Vec<pb::EventKind>> {
    values
        .iter()
        .enumerate()
        .map(|(index, value)| match pb::EventKind::try_from(*value) {
            Ok(pb::EventKind::Unspecified) | Err(_) => {
                unknown_value(format!("kinds[{index}]"), *value, "EventKind")
            }
            Ok(kind) => Ok(kind),
        })
        .collect()
}

/// Streams of a log in a filter: stdout and stderr.
pub(super) fn log_streams(values: &[i32]) -> Parsed<(bool, bool)> {
    let mut wanted = (values.is_empty(), values.is_empty());
    for (index, value) in values.iter().enumerate() {
        match pb::LogStream::try_from(*value) {
            Ok(pb::LogStream::Stdout) => wanted.0 = true,
            Ok(pb::LogStream::Stderr) => wanted.1 = true,
            Ok(pb::LogStream::Unspecified) | Err(_) => {
                return unknown_value(format!("streams[{index}]"), *value, "LogStream");
            }
        }
    }
    Ok(wanted)
}

/// A filter by labels is met.
pub(super) fn labels_match(
    wished: &HashMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    wished
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    type SandboxChange = fn(&mut pb::SandboxConfig);
    type ContainerChange = fn(&mut pb::ContainerConfig);

    fn run(change: SandboxChange) -> Parsed<SandboxConfig> {
        let mut config = pb::SandboxConfig::default();
        change(&mut config);
        sandbox(config, || "spare".to_owned())
    }

    fn create(change: ContainerChange) -> Parsed<ContainerConfig> {
        let mut config = pb::ContainerConfig {
            image: "busybox".to_owned(),
            ..Default::default()
        };
        change(&mut config);
        container(config)
    }

    /// The field that an error names; empty for a success.
    fn field<T>(parsed: Parsed<T>) -> String {
        use crate::service::edge::EdgeError;
        match parsed {
            Ok(_) => String::new(),
            Err(
                NativeError::OutOfRange { field, .. }
                | NativeError::Edge(
                    EdgeError::Invalid { field, .. }
                    | EdgeError::Missing { field }
                    | EdgeError::Conflict { field, .. },
                ),
            ) => field,
            Err(other) => panic!("{other:?}"),
        }
    }

    fn ports(config: &mut pb::SandboxConfig) -> &mut pb::PortMapping {
        let network = config.network.get_or_insert_default();
        network.ports = vec![pb::PortMapping {
            host_port: 8080,
            ..Default::default()
        }];
        &mut network.ports[0]
    }

    fn sysctl(config: &mut pb::SandboxConfig, name: &str) {
        config.sysctls.insert(name.to_owned(), "1".to_owned());
    }

    #[test]
    fn sandboxes_are_refused_by_field() {
        let cases: &[(SandboxChange, &str)] = &[
            (|_| {}, ""),
            (|c| c.name = "a.b-c_9".to_owned(), ""),
            (|c| c.name = "-a".to_owned(), "config.name"),
            (|c| c.name = "A".to_owned(), "config.name"),
            (|c| c.name = "n".repeat(64), "config.name"),
            (|c| c.name = "a\nb".to_owned(), "config.name"),
            (
                |c| drop(c.labels.insert("k".to_owned(), "v".repeat(65 << 10))),
                "config.labels",
            ),
            (
                |c| drop(c.annotations.insert("k".to_owned(), "v".repeat(65 << 10))),
                "config.annotations",
            ),
            (
                |c| drop(c.labels.insert(String::new(), String::new())),
                "config.labels",
            ),
            (|c| c.hostname = "h".repeat(65), "config.hostname"),
            (|c| c.hostname = "a/b".to_owned(), "config.hostname"),
            (
                |c| {
                    c.hostname = "h".to_owned();
                    c.network
                        .get_or_insert_default()
                        .set_mode(pb::NetworkMode::Host);
                },
                "config.hostname",
            ),
            (
                |c| c.network.get_or_insert_default().mode = 9,
                "config.network.mode",
            ),
            (
                |c| {
                    ports(c);
                    c.network
                        .get_or_insert_default()
                        .set_mode(pb::NetworkMode::None);
                },
                "config.network.ports",
            ),
            (
                |c| ports(c).host_port = 0,
                "config.network.ports[0].host_port",
            ),
            (
                |c| ports(c).host_port = 65_536,
                "config.network.ports[0].host_port",
            ),
            (
                |c| ports(c).container_port = 65_536,
                "config.network.ports[0].container_port",
            ),
            (
                |c| ports(c).protocol = 9,
                "config.network.ports[0].protocol",
            ),
            (
                |c| ports(c).host_ip = "localhost".to_owned(),
                "config.network.ports[0].host_ip",
            ),
            (
                |c| ports(c).host_ip = "::1".to_owned(),
                "config.network.ports[0].host_ip",
            ),
            (|c| ports(c).host_ip = "127.0.0.1".to_owned(), ""),
            (
                |c| c.dns.get_or_insert_default().servers = vec!["x".to_owned()],
                "config.dns.servers[0]",
            ),
            (
                |c| c.dns.get_or_insert_default().servers = vec!["fe80::1%eth0".to_owned()],
                "",
            ),
            (
                |c| c.dns.get_or_insert_default().options = vec!["a b".to_owned()],
                "config.dns.options[0]",
            ),
            (
                |c| sysctl(c, "vm.swappiness"),
                "config.sysctls[vm.swappiness]",
            ),
            (|c| sysctl(c, "net.ipv4.ip_forward"), ""),
            (
                |c| {
                    sysctl(c, "kernel.sem");
                    c.host_ipc = true;
                },
                "config.sysctls[kernel.sem]",
            ),
            (|c| c.pid_mode = 9, "config.pid_mode"),
            (
                |c| c.log_directory = "logs".to_owned(),
                "config.log_directory",
            ),
            (
                |c| c.log_directory = "/a/../b".to_owned(),
                "config.log_directory",
            ),
            (|c| c.handler = "h".repeat(129), "config.handler"),
        ];
        for (number, (change, expected)) in cases.iter().enumerate() {
            assert_eq!(field(run(*change)), *expected, "case {number}");
        }
    }

    #[test]
    fn a_sandbox_gets_the_defaults_of_the_contract() {
        let config = run(|c| ports(c).host_port = 8080).expect("valid");
        assert_eq!(
            (config.key.name.as_str(), config.hostname.as_str()),
            ("spare", "spare")
        );
        assert_eq!(
            (config.pid, config.network.mode),
            (PidMode::Container, Mode::Pod)
        );
        assert_eq!(config.network.ports[0].container_port, 8080);
        let host = run(|c| {
            c.network
                .get_or_insert_default()
                .set_mode(pb::NetworkMode::Host)
        })
        .expect("valid");
        assert_eq!(host.hostname, "", "the host's own");
    }

    #[test]
    fn equal_wishes_are_parsed_equally() {
        let wish = || pb::SandboxConfig {
            labels: (0..50).map(|n| (format!("k{n}"), String::new())).collect(),
            ..Default::default()
        };
        let parsed = || sandbox(wish(), || "x".to_owned()).expect("valid");
        assert_eq!(parsed(), parsed(), "or equal requests would not join");
        let kept: pb::SandboxConfig = kept(&parsed().request);
        assert!(kept.labels.is_empty(), "they are in the record already");
    }

    fn bind(config: &mut pb::ContainerConfig) -> &mut pb::Mount {
        config.mounts = vec![pb::Mount {
            target: "/x".to_owned(),
            source: Some(pb::mount::Source::Bind(pb::BindMount {
                host_path: "/tmp".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        }];
        &mut config.mounts[0]
    }

    fn bound(config: &mut pb::ContainerConfig, change: fn(&mut pb::BindMount)) {
        if let Some(pb::mount::Source::Bind(bind)) = &mut bind(config).source {
            change(bind);
        }
    }

    fn limits(config: &mut pb::ContainerConfig) -> &mut pb::Resources {
        config.resources.get_or_insert_default()
    }

    fn seccomp_of(config: &mut pb::ContainerConfig, mode: i32, profile: &str) {
        config.security.get_or_insert_default().seccomp = Some(pb::Seccomp {
            mode,
            profile_json: profile.to_owned(),
        });
    }

    fn time(seconds: i64, nanos: i32) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds, nanos })
    }

    #[test]
    fn containers_are_refused_by_field() {
        let cases: &[(ContainerChange, &str)] = &[
            (|_| {}, ""),
            (|c| c.name = "a\nb".to_owned(), "config.name"),
            (|c| c.image.clear(), "config.image"),
            (|c| c.image = "UPPER".to_owned(), "config.image"),
            (|c| c.image = "sha256:abc".to_owned(), ""),
            (|c| c.command = vec!["a\0".to_owned()], "config.command[0]"),
            (|c| c.command = vec![String::new()], "config.command[0]"),
            (
                |c| c.args = vec!["a".to_owned(), "\0".to_owned()],
                "config.args[1]",
            ),
            (
                |c| drop(c.env.insert("A=B".to_owned(), String::new())),
                "config.env",
            ),
            (
                |c| drop(c.env.insert("A".to_owned(), "\0".to_owned())),
                "config.env",
            ),
            (|c| c.working_dir = "srv".to_owned(), "config.working_dir"),
            (|c| c.user = "a:b:c".to_owned(), "config.user"),
            (|c| c.user = "a:".to_owned(), "config.user"),
            (|c| c.user = "-1".to_owned(), "config.user"),
            (|c| c.user = "4294967296".to_owned(), "config.user"),
            (|c| c.user = "1000:wheel".to_owned(), ""),
            (|c| c.stdin_once = true, "config.stdin"),
            (
                |c| bind(c).target = "x".to_owned(),
                "config.mounts[0].target",
            ),
            (
                |c| bind(c).target = "/x/../../y".to_owned(),
                "config.mounts[0].target",
            ),
            (|c| bind(c).source = None, "config.mounts[0].source"),
            (
                |c| bound(c, |b| b.host_path = "tmp".to_owned()),
                "config.mounts[0].bind.host_path",
            ),
            (
                |c| bound(c, |b| b.propagation = 9),
                "config.mounts[0].bind.propagation",
            ),
            (
                |c| bound(c, |b| b.recursive_readonly = true),
                "config.mounts[0].readonly",
            ),
            (
                |c| {
                    bound(c, |b| {
                        b.recursive_readonly = true;
                        b.set_propagation(pb::MountPropagation::Bidirectional);
                    });
                    c.mounts[0].readonly = true;
                },
                "config.mounts[0].bind.recursive_readonly",
            ),
            (
                |c| {
                    bind(c).source = Some(pb::mount::Source::Tmpfs(pb::TmpfsMount {
                        size_bytes: 0,
                        mode: 0o10000,
                    }));
                },
                "config.mounts[0].tmpfs.mode",
            ),
            (
                |c| {
                    c.devices = vec![pb::Device {
                        host_path: "/dev/null".to_owned(),
                        permissions: "x".to_owned(),
                        ..Default::default()
                    }];
                },
                "config.devices[0].permissions",
            ),
            (
                |c| limits(c).oom_score_adj = 1001,
                "config.resources.oom_score_adj",
            ),
            (
                |c| limits(c).cpuset_cpus = "all".to_owned(),
                "config.resources.cpuset_cpus",
            ),
            (|c| limits(c).cpu_shares = 1, "config.resources.cpu_shares"),
            (
                |c| limits(c).cpu_quota = time(0, 999_000),
                "config.resources.cpu_quota",
            ),
            (
                |c| limits(c).cpu_period = time(2, 0),
                "config.resources.cpu_period",
            ),
            (
                |c| {
                    limits(c).cpu_millis = 500;
                    limits(c).cpu_shares = 2;
                },
                "config.resources.cpu_millis",
            ),
            (
                |c| limits(c).memory_limit_bytes = u64::MAX,
                "config.resources.memory_limit_bytes",
            ),
            (
                |c| limits(c).memory_swap_limit_bytes = 5,
                "config.resources.memory_limit_bytes",
            ),
            (
                |c| {
                    limits(c).memory_limit_bytes = 6;
                    limits(c).memory_swap_limit_bytes = 5;
                },
                "config.resources.memory_swap_limit_bytes",
            ),
            (|c| seccomp_of(c, 9, ""), "config.security.seccomp.mode"),
            (
                |c| seccomp_of(c, 3, ""),
                "config.security.seccomp.profile_json",
            ),
            (
                |c| seccomp_of(c, 0, "[]"),
                "config.security.seccomp.profile_json",
            ),
            (
                |c| seccomp_of(c, 2, "{}"),
                "config.security.seccomp.profile_json",
            ),
            (
                |c| seccomp_of(c, 3, "{\"defaultAction\":\"SCMP_ACT_ALLOW\"}"),
                "",
            ),
            (
                |c| {
                    c.security.get_or_insert_default().masked_paths = Some(pb::PathSet {
                        paths: vec!["x".to_owned()],
                    });
                },
                "config.security.masked_paths.paths[0]",
            ),
            (
                |c| c.security.get_or_insert_default().add_capabilities = vec![String::new()],
                "config.security.add_capabilities[0]",
            ),
            (
                |c| {
                    c.rlimits = vec![pb::Rlimit {
                        name: "RLIMIT_LUCK".to_owned(),
                        soft: 1,
                        hard: 1,
                    }];
                },
                "config.rlimits[0].name",
            ),
            (
                |c| {
                    c.rlimits = vec![pb::Rlimit {
                        name: "nofile".to_owned(),
                        soft: 2,
                        hard: 1,
                    }];
                },
                "config.rlimits[0].soft",
            ),
            (
                |c| c.stop_signal = "SIGNOPE".to_owned(),
                "config.stop_signal",
            ),
            (|c| c.stop_timeout = time(-1, 0), "config.stop_timeout"),
            (|c| c.stop_timeout = time(0, -1), "config.stop_timeout"),
            (|c| c.stop_timeout = time(i64::MAX, 0), ""),
        ];
        for (number, (change, expected)) in cases.iter().enumerate() {
            assert_eq!(field(create(*change)), *expected, "case {number}");
        }
    }

    #[test]
    fn a_container_gets_the_defaults_of_the_contract() {
        let config = create(|_| {}).expect("valid");
        assert_eq!(config.security.masked_paths, MASKED_PATHS);
        assert_eq!(config.security.readonly_paths, READONLY_PATHS);
        assert_eq!(config.security.seccomp, SeccompWish::Default);
        assert_eq!(
            (config.pid, config.stop_signal, config.stop_timeout),
            (None, None, STOP_TIMEOUT)
        );
        let open = create(|c| {
            c.security = Some(pb::Security {
                masked_paths: Some(pb::PathSet::default()),
                readonly_paths: Some(pb::PathSet::default()),
                ..Default::default()
            });
        })
        .expect("valid");
        assert!(open.security.masked_paths.is_empty() && open.security.readonly_paths.is_empty());
        let tmpfs = create(|c| {
            bind(c).source = Some(pb::mount::Source::Tmpfs(pb::TmpfsMount::default()));
        })
        .expect("valid");
        assert_eq!(tmpfs.mounts[0].options, ["nosuid", "nodev"]);
        let limit = create(|c| {
            c.rlimits = vec![pb::Rlimit {
                name: "nofile".to_owned(),
                soft: 1,
                hard: u64::MAX,
            }];
        })
        .expect("valid");
        assert_eq!(limit.rlimits[0].name, "RLIMIT_NOFILE");
    }

    #[test]
    fn limits_become_what_the_kernel_takes() {
        let check =
            |change: ContainerChange,
             expected: (Option<u64>, Option<i64>, Option<u64>, Option<i64>)| {
                let found = create(change).expect("valid").resources;
                let found = (
                    found.cpu_period_us,
                    found.cpu_quota_us,
                    found.cpu_shares,
                    found.memory_swap_limit_bytes,
                );
                assert_eq!(found, expected);
            };
        check(|_| {}, (None, None, None, None));
        check(
            |c| limits(c).cpu_millis = 500,
            (Some(100_000), Some(50_000), Some(512), None),
        );
        check(
            |c| limits(c).cpu_millis = 1,
            (Some(100_000), Some(1000), Some(2), None),
        );
        check(
            |c| limits(c).cpu_quota = time(0, 20_000_000),
            (Some(100_000), Some(20_000), None, None),
        );
        check(
            |c| limits(c).memory_limit_bytes = 7,
            (None, None, None, Some(7)),
        );
        check(
            |c| {
                limits(c).memory_limit_bytes = 7;
                limits(c).memory_swap_limit_bytes = u64::MAX;
            },
            (None, None, None, Some(-1)),
        );
    }

    #[test]
    fn a_log_goes_with_the_container_unless_the_sandbox_says_where() {
        let defaults = LifecycleChapterConfig::default();
        let place = |directory| LogPlace {
            directory,
            logs_dir: Path::new("/data/logs"),
            name: "n".to_owned(),
            defaults: &defaults,
        };
        let ours = log(None, place(None)).expect("a log");
        assert_eq!(
            (ours.path.as_path(), ours.owned),
            (Path::new("/data/logs/n/0.log"), true)
        );
        assert_eq!(ours.rotate_bytes, defaults.log_rotate_bytes);
        let wish = pb::LogConfig {
            rotate_bytes: 5,
            ..Default::default()
        };
        let theirs = log(Some(&wish), place(Some(Path::new("/var/log/x")))).expect("a log");
        assert_eq!(
            (theirs.path.as_path(), theirs.owned),
            (Path::new("/var/log/x/n/0.log"), false)
        );
        assert_eq!(
            (theirs.rotate_bytes, theirs.keep_files),
            (5, defaults.log_keep_files)
        );
        let none = pb::LogConfig {
            disabled: true,
            ..Default::default()
        };
        assert_eq!(log(Some(&none), place(None)), None);
    }

    #[test]
    fn an_exec_is_refused_by_field() {
        let check = |change: fn(&mut pb::ExecStart), expected: &str| {
            let mut start = pb::ExecStart {
                command: vec!["true".to_owned()],
                ..Default::default()
            };
            change(&mut start);
            assert_eq!(field(exec(start)), expected);
        };
        check(|_| {}, "");
        check(|s| s.command.clear(), "start.command");
        check(|s| s.working_dir = "x".to_owned(), "start.working_dir");
        check(|s| s.timeout = time(-1, 0), "start.timeout");
        check(|s| s.user = ":".to_owned(), "start.user");
        check(
            |s| s.terminal_size = Some(pb::TerminalSize::default()),
            "start.tty",
        );
        check(
            |s| {
                s.tty = true;
                s.terminal_size = Some(pb::TerminalSize {
                    columns: 1,
                    rows: 65_536,
                });
            },
            "start.terminal_size.rows",
        );
        let terminal = exec(pb::ExecStart {
            command: vec!["sh".to_owned()],
            tty: true,
            timeout: time(0, 0),
            ..Default::default()
        })
        .expect("valid");
        assert_eq!(
            (terminal.size, terminal.stderr, terminal.timeout),
            (Some((80, 24)), false, None)
        );
    }

    #[test]
    fn filters_and_the_rest_are_refused_by_field() {
        assert_eq!(field(face(9)), "face");
        assert_eq!(field(sandbox_state(9)), "state");
        assert_eq!(field(container_state(99)), "state");
        assert_eq!(field(event_kinds(&[1, 99])), "kinds[1]");
        assert_eq!(field(event_kinds(&[0])), "kinds[0]");
        assert_eq!(field(log_streams(&[1, 0])), "streams[1]");
        assert_eq!(log_streams(&[]).ok(), Some((true, true)));
        assert_eq!(log_streams(&[2]).ok(), Some((false, true)));
        assert_eq!(field(interval(time(0, 99_000_000).as_ref())), "interval");
        assert_eq!(interval(None).ok(), Some(Duration::from_secs(1)));
        assert_eq!(field(tag("a@sha256:00")), "tag");
        assert_eq!(field(tag(&format!("a@sha256:{}", "0".repeat(64)))), "tag");
        assert_eq!(field(reference("reference", "a//b")), "reference");
        assert_eq!(field(signal_number("signal", "")), "signal");
        assert_eq!(field(signal_number("signal", "TERM\n")), "signal");
        let platform = |os: &str| {
            super::platform(Some(pb::Platform {
                os: os.to_owned(),
                ..Default::default()
            }))
        };
        assert_eq!(field(platform("li nux")), "platform.os");
        assert_eq!(platform("").ok(), Some(Platform::host()));
    }

    #[test]
    fn credentials_do_not_print() {
        use pb::registry_auth::Credential;
        let parse = |credential| auth(Some(pb::RegistryAuth { credential }));
        let basic = parse(Some(Credential::Basic(pb::BasicAuth {
            username: "me".to_owned(),
            password: "hunter2".to_owned(),
        })));
        assert!(!format!("{basic:?}").contains("hunter2"));
        assert_eq!(field(parse(None)), "auth.credential");
        assert_eq!(
            field(parse(Some(Credential::RegistryToken(String::new())))),
            "auth.registry_token"
        );
        assert_eq!(auth(None).ok(), Some(RegistryAuth::Anonymous));
    }
}
