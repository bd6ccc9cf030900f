//! CRI messages -> requests of the chapters. From here on nothing can be invalid.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use longshore_proto::cri::v1 as cri;
use prost::Message;

use crate::{
    id::{ContainerId, Face},
    lifecycle::{
        container::{
            AppArmorWish, ContainerConfig, DeviceWish, IdMapWish, LogWish, MountSource, MountWish,
            Propagation, Resources, SeccompWish, Security, UserWish,
        },
        sandbox::{Dns, IdMap, PidMode, SandboxConfig, SandboxKey},
        spec,
    },
    network::{Mode, PortMapping, Protocol, SandboxNetwork},
    service::edge::{self, EdgeError},
};

type Parsed<T> = Result<T, EdgeError>;

/// Time between stop signal and SIGKILL when nobody says: CRI always does.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps a message as it came, for verbose answers and for what is only repeated.
pub(super) fn keep(message: &impl Message) -> serde_json::Value {
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

/// A kept `PodSandboxConfig` with other resources; what is not given stays.
pub(super) fn with_resources(
    kept: &serde_json::Value,
    overhead: Option<cri::LinuxContainerResources>,
    resources: Option<cri::LinuxContainerResources>,
) -> serde_json::Value {
    let mut config: cri::PodSandboxConfig = self::kept(kept);
    let linux = config.linux.get_or_insert_default();
    linux.overhead = overhead.or(linux.overhead.take());
    linux.resources = resources.or(linux.resources.take());
    keep(&config)
}

/// `RunPodSandboxRequest`.
pub(super) fn sandbox_config(request: cri::RunPodSandboxRequest) -> Parsed<SandboxConfig> {
    let config = request.config.ok_or_else(|| EdgeError::missing("config"))?;
    let key = sandbox_key(config.metadata.as_ref(), "config.metadata")?;
    edge::labels(
        "config.labels",
        config.labels.iter().chain(&config.annotations),
    )?;
    edge::text("runtime_handler", &request.runtime_handler, 128)?;
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    let options = security.namespace_options.clone().unwrap_or_default();
    let at = "config.linux.security_context.namespace_options";
    let id_map = user_namespace(&options, at)?;
    if security.run_as_group.is_some() && security.run_as_user.is_none() {
        return Err(EdgeError::missing(
            "config.linux.security_context.run_as_user",
        ));
    }
    let network = network_mode(options.network, &format!("{at}.network"))?;
    let host_ipc = host_ipc(options.ipc, &format!("{at}.ipc"))?;
    hostname(&config.hostname, network)?;
    Ok(SandboxConfig {
        face: Face::Cri,
        key,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        hostname: config.hostname.clone(),
        network: SandboxNetwork {
            mode: network,
            network: String::new(),
            ports: ports(&config.port_mappings)?,
            addresses: Vec::new(),
            keeper: None,
        },
        dns: config.dns_config.as_ref().map(dns).transpose()?,
        sysctls: sysctls(&linux.sysctls, network, host_ipc)?,
        pid: match namespace_mode(options.pid, &format!("{at}.pid"))? {
            cri::NamespaceMode::Pod => PidMode::Pod,
            cri::NamespaceMode::Container => PidMode::Container,
            cri::NamespaceMode::Node => PidMode::Host,
            cri::NamespaceMode::Target => {
                return Err(EdgeError::invalid(
                    format!("{at}.pid"),
                    "TARGET",
                    "POD, CONTAINER or NODE",
                ));
            }
        },
        host_ipc,
        id_map,
        log_directory: optional_dir("config.log_directory", &config.log_directory)?,
        handler: request.runtime_handler,
        cgroup_parent: cgroup_parent(&linux.cgroup_parent)?,
        privileged: security.privileged,
        system: None,
        idempotency_key: String::new(),
        request: keep(&config),
    })
}

fn sandbox_key(metadata: Option<&cri::PodSandboxMetadata>, at: &str) -> Parsed<SandboxKey> {
    let metadata = metadata.ok_or_else(|| EdgeError::missing(at))?;
    for (name, value) in [
        ("name", &metadata.name),
        ("namespace", &metadata.namespace),
        ("uid", &metadata.uid),
    ] {
        let field = format!("{at}.{name}");
        edge::required(&field, value)?;
        edge::text(&field, value, 512)?;
    }
    Ok(SandboxKey {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        attempt: metadata.attempt,
    })
}

fn namespace_mode(value: i32, field: &str) -> Parsed<cri::NamespaceMode> {
    cri::NamespaceMode::try_from(value).map_err(|_| {
        EdgeError::invalid(
            field,
            value,
            "POD (0), CONTAINER (1), NODE (2) or TARGET (3)",
        )
    })
}

fn network_mode(value: i32, field: &str) -> Parsed<Mode> {
    match namespace_mode(value, field)? {
        cri::NamespaceMode::Pod => Ok(Mode::Pod),
        cri::NamespaceMode::Node => Ok(Mode::Host),
        other => Err(EdgeError::invalid(
            field,
            other.as_str_name(),
            "POD or NODE",
        )),
    }
}

fn host_ipc(value: i32, field: &str) -> Parsed<bool> {
    match namespace_mode(value, field)? {
        cri::NamespaceMode::Pod => Ok(false),
        cri::NamespaceMode::Node => Ok(true),
        other => Err(EdgeError::invalid(
            field,
            other.as_str_name(),
            "POD or NODE",
        )),
    }
}

/// Mode NODE without mappings is what kubelet sends for a pod on the host's ids.
///
/// CRI: mode POD has one mapping each, which covers id 0; the host's processes and IPC can't be
/// shared with it, its network can.
fn user_namespace(options: &cri::NamespaceOption, at: &str) -> Parsed<Option<IdMap>> {
    let Some(user) = &options.userns_options else {
        return Ok(None);
    };
    let field = format!("{at}.userns_options.mode");
    match namespace_mode(user.mode, &field)? {
        cri::NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => Ok(None),
        cri::NamespaceMode::Node => Err(EdgeError::Conflict {
            field: format!("{at}.userns_options.uids"),
            other: field,
        }),
        cri::NamespaceMode::Pod => {
            for (name, mode) in [("pid", options.pid), ("ipc", options.ipc)] {
                if mode == cri::NamespaceMode::Node as i32 {
                    return Err(EdgeError::Conflict {
                        field: format!("{at}.{name}"),
                        other: field,
                    });
                }
            }
            let at = format!("{at}.userns_options");
            id_map(&user.uids, &user.gids, [&at, "uids", "gids"]).map(Some)
        }
        other => Err(EdgeError::invalid(
            field,
            other.as_str_name(),
            "POD or NODE",
        )),
    }
}

/// CRI: a container repeats what its sandbox has.
fn id_map_wish(options: &cri::NamespaceOption) -> Parsed<IdMapWish> {
    let at = "config.linux.security_context.namespace_options";
    let map = user_namespace(options, at)?;
    Ok(match (map, &options.userns_options) {
        (Some(ids), _) => IdMapWish::Mapped(ids),
        (None, Some(_)) => IdMapWish::Host,
        (None, None) => IdMapWish::AsSandbox,
    })
}

/// One mapping of users and one of groups, equally long; `names` are where they are and what they
/// are called there.
fn id_map(uids: &[cri::IdMapping], gids: &[cri::IdMapping], names: [&str; 3]) -> Parsed<IdMap> {
    let [at, uids_name, gids_name] = names;
    let (host_uid, length) = first_ids(uids, &format!("{at}.{uids_name}"))?;
    let gids_field = format!("{at}.{gids_name}");
    let (host_gid, gids_length) = first_ids(gids, &gids_field)?;
    if gids_length != length {
        return Err(EdgeError::invalid(
            format!("{gids_field}[0].length"),
            gids_length,
            format!("{length}, the length of {uids_name}"),
        ));
    }
    Ok(IdMap {
        host_uid,
        host_gid,
        length,
    })
}

fn first_ids(mappings: &[cri::IdMapping], field: &str) -> Parsed<(u32, u32)> {
    let [mapping] = mappings else {
        return Err(EdgeError::invalid(
            field,
            format!("{} mappings", mappings.len()),
            "one mapping",
        ));
    };
    if mapping.container_id != 0 {
        return Err(EdgeError::invalid(
            format!("{field}[0].container_id"),
            mapping.container_id,
            "0: the root of the pod must be mapped",
        ));
    }
    // The last id means that there is none.
    let fits = mapping
        .host_id
        .checked_add(mapping.length)
        .is_some_and(|end| end < u32::MAX);
    if mapping.length == 0 || !fits {
        return Err(EdgeError::invalid(
            format!("{field}[0].length"),
            mapping.length,
            "at least 1, ending below 4294967295 on the host",
        ));
    }
    Ok((mapping.host_id, mapping.length))
}

fn hostname(name: &str, network: Mode) -> Parsed<()> {
    if name.is_empty() {
        return Ok(());
    }
    edge::text("config.hostname", name, 64)?;
    if network == Mode::Host {
        return Err(EdgeError::Conflict {
            field: "config.hostname".into(),
            other: "config.linux.security_context.namespace_options.network".into(),
        });
    }
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if !name.chars().all(valid) || name.starts_with('-') {
        return Err(EdgeError::invalid(
            "config.hostname",
            name,
            "letters, digits, `-`, `.` and `_`",
        ));
    }
    Ok(())
}

fn ports(mappings: &[cri::PortMapping]) -> Parsed<Vec<PortMapping>> {
    let mut ports = Vec::new();
    for (index, mapping) in mappings.iter().enumerate() {
        let at = |name: &str| format!("config.port_mappings[{index}].{name}");
        let protocol = match cri::Protocol::try_from(mapping.protocol) {
            Ok(cri::Protocol::Tcp) => Protocol::Tcp,
            Ok(cri::Protocol::Udp) => Protocol::Udp,
            Ok(cri::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => {
                return Err(EdgeError::invalid(
                    at("protocol"),
                    mapping.protocol,
                    "TCP (0), UDP (1) or SCTP (2)",
                ));
            }
        };
        let port = |name, value: i32| {
            u16::try_from(value)
                .map_err(|_| EdgeError::invalid(at(name), value, "a port from 1 to 65535"))
        };
        let container_port = port("container_port", mapping.container_port)?;
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(
                text.parse::<IpAddr>()
                    .map_err(|_| EdgeError::invalid(at("host_ip"), text, "an IP address"))?,
            ),
        };
        // 0 and below mean that the port is only documented, but it must be a port.
        if mapping.host_port <= 0 {
            continue;
        }
        if container_port == 0 {
            return Err(EdgeError::invalid(
                at("container_port"),
                0,
                "a port from 1 to 65535",
            ));
        }
        ports.push(PortMapping {
            host_ip,
            host_port: port("host_port", mapping.host_port)?,
            container_port,
            protocol,
        });
    }
    Ok(ports)
}

fn dns(config: &cri::DnsConfig) -> Parsed<Dns> {
    for (index, server) in config.servers.iter().enumerate() {
        let address = server.split('%').next().unwrap_or_default();
        if address.parse::<IpAddr>().is_err() {
            return Err(EdgeError::invalid(
                format!("config.dns_config.servers[{index}]"),
                server,
                "an IP address",
            ));
        }
    }
    for (name, values) in [("searches", &config.searches), ("options", &config.options)] {
        for (index, value) in values.iter().enumerate() {
            let field = format!("config.dns_config.{name}[{index}]");
            edge::required(&field, value)?;
            edge::text(&field, value, 255)?;
            if value.contains(char::is_whitespace) {
                return Err(EdgeError::invalid(field, value, "one word"));
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
    wished: &std::collections::HashMap<String, String>,
    network: Mode,
    host_ipc: bool,
) -> Parsed<BTreeMap<String, String>> {
    let mut accepted = BTreeMap::new();
    for (name, value) in wished {
        let field = format!("config.linux.sysctls[{}]", name.escape_default());
        edge::text(&field, value, 4096)?;
        edge::text(&field, name, 256)?;
        let dotted = name.replace('/', ".");
        let of_ipc = dotted == "kernel.sem"
            || ["kernel.shm", "kernel.msg", "fs.mqueue."]
                .iter()
                .any(|prefix| dotted.starts_with(prefix));
        let of_network = dotted.starts_with("net.");
        if dotted.contains("..") || !(of_ipc || of_network) {
            return Err(EdgeError::invalid(
                field,
                name,
                "a namespaced one: kernel.sem, kernel.shm*, kernel.msg*, fs.mqueue.* or net.*",
            ));
        }
        if (of_network && network == Mode::Host) || (of_ipc && host_ipc) {
            return Err(EdgeError::Conflict {
                field,
                other: "config.linux.security_context.namespace_options".into(),
            });
        }
        accepted.insert(name.clone(), value.clone());
    }
    Ok(accepted)
}

fn optional_dir(field: &str, path: &str) -> Parsed<Option<PathBuf>> {
    if path.is_empty() {
        return Ok(None);
    }
    edge::absolute_path(field, path)?;
    Ok(Some(path.into()))
}

fn cgroup_parent(parent: &str) -> Parsed<Option<String>> {
    let field = "config.linux.cgroup_parent";
    if parent.is_empty() {
        return Ok(None);
    }
    edge::text(field, parent, 4096)?;
    if parent.split('/').any(|part| part == "..") {
        return Err(EdgeError::invalid(field, parent, "a path without `..`"));
    }
    Ok(Some(parent.to_owned()))
}

/// `CreateContainerRequest` without the id of the sandbox.
pub(super) fn container_config(request: cri::CreateContainerRequest) -> Parsed<ContainerConfig> {
    edge::id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let config = request.config.ok_or_else(|| EdgeError::missing("config"))?;
    let sandbox = request
        .sandbox_config
        .ok_or_else(|| EdgeError::missing("sandbox_config"))?;
    sandbox_key(sandbox.metadata.as_ref(), "sandbox_config.metadata")?;
    let metadata = config
        .metadata
        .clone()
        .ok_or_else(|| EdgeError::missing("config.metadata"))?;
    edge::required("config.metadata.name", &metadata.name)?;
    edge::text("config.metadata.name", &metadata.name, 512)?;
    edge::labels(
        "config.labels",
        config.labels.iter().chain(&config.annotations),
    )?;
    let image = config.image.clone().unwrap_or_default();
    edge::required("config.image.image", &image.image)?;
    edge::text("config.image.image", &image.image, 1024)?;
    command(&config)?;
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    let options = context.namespace_options.clone();
    Ok(ContainerConfig {
        face: Face::Cri,
        name: metadata.name,
        attempt: metadata.attempt,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        image_name: if image.user_specified_image.is_empty() {
            image.image.clone()
        } else {
            image.user_specified_image.clone()
        },
        image: image.image,
        command: config.command.clone(),
        args: config.args.clone(),
        env: environment(&config.envs)?,
        working_dir: working_dir(&config.working_dir)?,
        user: user(&context)?,
        mounts: mounts(&config.mounts)?,
        devices: devices(&config.devices)?,
        cdi_devices: cdi_devices(&config)?,
        resources: linux
            .resources
            .as_ref()
            .map(|resources| self::resources(resources, "config.linux.resources"))
            .transpose()?
            .unwrap_or_default(),
        security: security(&context)?,
        rlimits: Vec::new(),
        pid: options.as_ref().map(pid_mode).transpose()?,
        id_map: options
            .as_ref()
            .map(id_map_wish)
            .transpose()?
            .unwrap_or_default(),
        tty: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        stop_signal: stop_signal(config.stop_signal)?,
        stop_timeout: STOP_TIMEOUT,
        log: log(&sandbox.log_directory, &config.log_path)?,
        oom_score_adj: linux.resources.as_ref().map(oom_score_adj).transpose()?,
        system: None,
        idempotency_key: String::new(),
        request: keep(&config),
    })
}

fn command(config: &cri::ContainerConfig) -> Parsed<()> {
    for (name, values) in [("command", &config.command), ("args", &config.args)] {
        for (index, value) in values.iter().enumerate() {
            if value.contains('\0') {
                return Err(EdgeError::invalid(
                    format!("config.{name}[{index}]"),
                    value.escape_default(),
                    "no NUL",
                ));
            }
        }
    }
    if config.command.first().is_some_and(String::is_empty) {
        return Err(EdgeError::invalid("config.command[0]", "", "a program"));
    }
    Ok(())
}

fn environment(envs: &[cri::KeyValue]) -> Parsed<Vec<(String, Vec<u8>)>> {
    envs.iter()
        .enumerate()
        .map(|(index, env)| {
            let field = format!("config.envs[{index}]");
            edge::required(&format!("{field}.key"), &env.key)?;
            if env.key.contains(['=', '\0']) {
                return Err(EdgeError::invalid(
                    format!("{field}.key"),
                    env.key.escape_default(),
                    "a name without `=` and NUL",
                ));
            }
            if env.value.contains(&0) {
                return Err(EdgeError::invalid(
                    format!("{field}.value"),
                    "(bytes)",
                    "a value without NUL",
                ));
            }
            Ok((env.key.clone(), env.value.clone()))
        })
        .collect()
}

fn working_dir(path: &str) -> Parsed<String> {
    if !path.is_empty() {
        edge::text("config.working_dir", path, 4096)?;
        if !path.starts_with('/') {
            return Err(EdgeError::invalid(
                "config.working_dir",
                path,
                "an absolute path",
            ));
        }
    }
    Ok(path.to_owned())
}

fn number<T: TryFrom<i64>>(field: &str, value: i64, expected: &'static str) -> Parsed<T> {
    T::try_from(value).map_err(|_| EdgeError::invalid(field, value, expected))
}

fn user(context: &cri::LinuxContainerSecurityContext) -> Parsed<UserWish> {
    let at = |name: &str| format!("config.linux.security_context.{name}");
    let id = |name: &str, value: &Option<cri::Int64Value>| {
        value
            .as_ref()
            .map(|value| number::<u32>(&at(name), value.value, "0 to 4294967295"))
            .transpose()
    };
    let uid = id("run_as_user", &context.run_as_user)?;
    let gid = id("run_as_group", &context.run_as_group)?;
    edge::text(&at("run_as_username"), &context.run_as_username, 256)?;
    let name = Some(context.run_as_username.clone()).filter(|name| !name.is_empty());
    if gid.is_some() && uid.is_none() && name.is_none() {
        return Err(EdgeError::missing(at("run_as_user")));
    }
    let strict_groups =
        match cri::SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy) {
            Ok(cri::SupplementalGroupsPolicy::Merge) => false,
            Ok(cri::SupplementalGroupsPolicy::Strict) => true,
            Err(_) => {
                return Err(EdgeError::invalid(
                    at("supplemental_groups_policy"),
                    context.supplemental_groups_policy,
                    "Merge (0) or Strict (1)",
                ));
            }
        };
    Ok(UserWish {
        name,
        uid,
        gid,
        supplemental_gids: context
            .supplemental_groups
            .iter()
            .enumerate()
            .map(|(index, gid)| {
                number(
                    &at(&format!("supplemental_groups[{index}]")),
                    *gid,
                    "0 to 4294967295",
                )
            })
            .collect::<Parsed<_>>()?,
        strict_groups,
    })
}

fn mounts(wished: &[cri::Mount]) -> Parsed<Vec<MountWish>> {
    wished
        .iter()
        .enumerate()
        .map(|(index, mount)| self::mount(mount, &format!("config.mounts[{index}]")))
        .collect()
}

fn mount(mount: &cri::Mount, at: &str) -> Parsed<MountWish> {
    edge::required(&format!("{at}.container_path"), &mount.container_path)?;
    edge::absolute_path(&format!("{at}.container_path"), &mount.container_path)?;
    let is_mapped = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
    let id_map = is_mapped
        .then(|| {
            let names = [at, "uidMappings", "gidMappings"];
            id_map(&mount.uid_mappings, &mount.gid_mappings, names)
        })
        .transpose()?;
    let propagation = match cri::MountPropagation::try_from(mount.propagation) {
        Ok(cri::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(cri::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(cri::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => {
            return Err(EdgeError::invalid(
                format!("{at}.propagation"),
                mount.propagation,
                "PRIVATE (0), HOST_TO_CONTAINER (1) or BIDIRECTIONAL (2)",
            ));
        }
    };
    if mount.recursive_read_only {
        let only_with = |expected| {
            let field = format!("{at}.recursive_read_only");
            unmountable("RROUnsupported", EdgeError::invalid(field, true, expected))
        };
        if !mount.readonly {
            return Err(only_with("readonly to be set too"));
        }
        if propagation != Propagation::Private {
            return Err(only_with("private propagation"));
        }
    }
    for (index, option) in mount.mount_options.iter().enumerate() {
        if !["noexec", "nodev", "nosuid"].contains(&option.as_str()) {
            return Err(EdgeError::invalid(
                format!("{at}.mount_options[{index}]"),
                option.escape_default(),
                "noexec, nodev or nosuid",
            ));
        }
    }
    Ok(MountWish {
        target: mount.container_path.clone().into(),
        source: mount_source(mount, at, propagation)?,
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_read_only,
        propagation,
        options: mount.mount_options.clone(),
        selinux_relabel: mount.selinux_relabel,
        id_map,
    })
}

/// A mount error with the word that clients look for.
fn unmountable(word: &'static str, source: EdgeError) -> EdgeError {
    EdgeError::Mount {
        word,
        source: Box::new(source),
    }
}

fn mount_source(mount: &cri::Mount, at: &str, propagation: Propagation) -> Parsed<MountSource> {
    let field = |name: &str| format!("{at}.{name}");
    if let Some(image) = mount.image.as_ref().filter(|one| !one.image.is_empty()) {
        return image_source(mount, &image.image, propagation, field)
            .map_err(|error| unmountable("ImageVolumeMountFailed", error));
    }
    // Kubelet repeats the sub path of a host's directory here in every pod that has an image volume;
    // the path of the host has it already.
    if !mount.image_sub_path.is_empty() && mount.host_path.is_empty() {
        return Err(EdgeError::missing(field("image")));
    }
    edge::required(&field("host_path"), &mount.host_path)?;
    edge::absolute_path(&field("host_path"), &mount.host_path)?;
    Ok(MountSource::Bind {
        path: mount.host_path.clone().into(),
        create: true,
        recursive: true,
    })
}

/// CRI `Mount.image`: read-only, in place of a path of the host.
fn image_source(
    mount: &cri::Mount,
    image: &str,
    propagation: Propagation,
    field: impl Fn(&str) -> String,
) -> Parsed<MountSource> {
    edge::text(&field("image.image"), image, 1024)?;
    if !mount.host_path.is_empty() {
        return Err(EdgeError::Conflict {
            field: field("host_path"),
            other: field("image"),
        });
    }
    if !mount.readonly {
        let expected = "true for an image";
        return Err(EdgeError::invalid(field("readonly"), false, expected));
    }
    if propagation != Propagation::Private {
        let expected = "PRIVATE (0) for an image";
        return Err(EdgeError::invalid(
            field("propagation"),
            mount.propagation,
            expected,
        ));
    }
    let sub_path = &mount.image_sub_path;
    edge::text(&field("image_sub_path"), sub_path, 4096)?;
    if sub_path.starts_with('/') || sub_path.split('/').any(|part| part == "..") {
        return Err(EdgeError::invalid(
            field("image_sub_path"),
            sub_path,
            "a relative path without `..`",
        ));
    }
    Ok(MountSource::Image {
        reference: image.to_owned(),
        sub_path: sub_path.clone(),
    })
}

fn devices(wished: &[cri::Device]) -> Parsed<Vec<DeviceWish>> {
    wished
        .iter()
        .enumerate()
        .map(|(index, device)| {
            let at = format!("config.devices[{index}]");
            edge::required(&format!("{at}.host_path"), &device.host_path)?;
            edge::absolute_path(&format!("{at}.host_path"), &device.host_path)?;
            let container_path = if device.container_path.is_empty() {
                &device.host_path
            } else {
                &device.container_path
            };
            edge::absolute_path(&format!("{at}.container_path"), container_path)?;
            if device.permissions.len() > 3
                || !device.permissions.chars().all(|c| "rwm".contains(c))
            {
                return Err(EdgeError::invalid(
                    format!("{at}.permissions"),
                    &device.permissions,
                    "some of `rwm`",
                ));
            }
            Ok(DeviceWish {
                host_path: device.host_path.clone().into(),
                container_path: container_path.into(),
                permissions: if device.permissions.is_empty() {
                    "rwm".into()
                } else {
                    device.permissions.clone()
                },
            })
        })
        .collect()
}

/// CRI `CDI_devices`, and the annotations that stood for it before.
fn cdi_devices(config: &cri::ContainerConfig) -> Parsed<Vec<String>> {
    let field: Vec<String> = config
        .cdi_devices
        .iter()
        .map(|one| one.name.clone())
        .collect();
    let annotations: BTreeMap<_, _> = config.annotations.iter().collect();
    spec::cdi_devices(&field, annotations)
        .map_err(|name| EdgeError::invalid("config.CDI_devices", name, "vendor.com/class=device"))
}

/// Limits; zero and empty mean none.
pub(super) fn resources(wished: &cri::LinuxContainerResources, at: &str) -> Parsed<Resources> {
    let field = |name: &str| format!("{at}.{name}");
    let positive = |name: &str, value: i64| match value {
        0 => Ok(None),
        value if value > 0 => Ok(Some(value)),
        value => Err(EdgeError::invalid(
            field(name),
            value,
            "0 for none, or more",
        )),
    };
    let unsigned = |name: &str, value: i64| Ok(positive(name, value)?.map(i64::cast_unsigned));
    let or_unlimited = |name: &str, value: i64| match value {
        -1 => Ok(Some(-1)),
        value => positive(name, value),
    };
    let list = |name: &str, value: &str| -> Parsed<Option<String>> {
        if value.is_empty() {
            return Ok(None);
        }
        let valid = value.len() <= 1024
            && value
                .chars()
                .all(|c| c.is_ascii_digit() || matches!(c, ',' | '-'));
        if !valid {
            return Err(EdgeError::invalid(
                field(name),
                value.escape_default(),
                "a list as `0-2,7`",
            ));
        }
        Ok(Some(value.to_owned()))
    };
    for (name, value) in &wished.unified {
        let valid = |text: &str| !text.is_empty() && !text.contains(['/', '\0', '\n']);
        if !valid(name) || !name.contains('.') || value.len() > 4096 {
            return Err(EdgeError::invalid(
                field("unified"),
                name.escape_default(),
                "names of cgroup v2 files, as `memory.high`",
            ));
        }
    }
    for (index, page) in wished.hugepage_limits.iter().enumerate() {
        let valid = page.page_size.ends_with('B')
            && page.page_size.chars().all(|c| c.is_ascii_alphanumeric());
        if !valid {
            return Err(EdgeError::invalid(
                field(&format!("hugepage_limits[{index}].page_size")),
                page.page_size.escape_default(),
                "a size as `2MB`",
            ));
        }
    }
    Ok(Resources {
        cpu_period_us: unsigned("cpu_period", wished.cpu_period)?,
        cpu_quota_us: or_unlimited("cpu_quota", wished.cpu_quota)?,
        cpu_shares: unsigned("cpu_shares", wished.cpu_shares)?,
        cpuset_cpus: list("cpuset_cpus", &wished.cpuset_cpus)?,
        cpuset_mems: list("cpuset_mems", &wished.cpuset_mems)?,
        memory_limit_bytes: or_unlimited("memory_limit_in_bytes", wished.memory_limit_in_bytes)?,
        memory_swap_limit_bytes: or_unlimited(
            "memory_swap_limit_in_bytes",
            wished.memory_swap_limit_in_bytes,
        )?,
        memory_reservation_bytes: None,
        pids_limit: None,
        hugepages: wished
            .hugepage_limits
            .iter()
            .map(|page| (page.page_size.clone(), page.limit))
            .collect(),
        unified: wished.unified.clone().into_iter().collect(),
    })
}

fn oom_score_adj(resources: &cri::LinuxContainerResources) -> Parsed<i32> {
    let field = "config.linux.resources.oom_score_adj";
    let value = number::<i32>(field, resources.oom_score_adj, "-1000 to 1000")?;
    if !(-1000..=1000).contains(&value) {
        return Err(EdgeError::invalid(field, value, "-1000 to 1000"));
    }
    Ok(value)
}

fn pid_mode(options: &cri::NamespaceOption) -> Parsed<PidMode> {
    let at = "config.linux.security_context.namespace_options";
    user_namespace(options, at)?;
    Ok(match namespace_mode(options.pid, &format!("{at}.pid"))? {
        cri::NamespaceMode::Pod => PidMode::Pod,
        cri::NamespaceMode::Container => PidMode::Container,
        cri::NamespaceMode::Node => PidMode::Host,
        cri::NamespaceMode::Target => {
            let field = format!("{at}.target_id");
            let target = options.target_id.parse::<ContainerId>().map_err(|_| {
                EdgeError::invalid(
                    field,
                    &options.target_id,
                    "the full id of a container of this sandbox",
                )
            })?;
            PidMode::Target(target)
        }
    })
}

fn security(context: &cri::LinuxContainerSecurityContext) -> Parsed<Security> {
    let at = |name: &str| format!("config.linux.security_context.{name}");
    let capabilities = context.capabilities.clone().unwrap_or_default();
    let names = |field: &str, names: &[String]| -> Parsed<Vec<String>> {
        names
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let field = at(&format!("capabilities.{field}[{index}]"));
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
    for (name, paths) in [
        ("masked_paths", &context.masked_paths),
        ("readonly_paths", &context.readonly_paths),
    ] {
        for (index, path) in paths.iter().enumerate() {
            edge::absolute_path(&at(&format!("{name}[{index}]")), path)?;
        }
    }
    Ok(Security {
        privileged: context.privileged,
        add_capabilities: names("add_capabilities", &capabilities.add_capabilities)?,
        drop_capabilities: names("drop_capabilities", &capabilities.drop_capabilities)?,
        ambient_capabilities: names(
            "add_ambient_capabilities",
            &capabilities.add_ambient_capabilities,
        )?,
        no_new_privs: context.no_new_privs,
        readonly_rootfs: context.readonly_rootfs,
        masked_paths: context.masked_paths.clone(),
        readonly_paths: context.readonly_paths.clone(),
        seccomp: seccomp(context)?,
        apparmor: apparmor(context)?,
        selinux: context
            .selinux_options
            .as_ref()
            .map(|selinux| {
                [
                    selinux.user.clone(),
                    selinux.role.clone(),
                    selinux.r#type.clone(),
                    selinux.level.clone(),
                ]
            })
            .filter(|parts| parts.iter().any(|part| !part.is_empty())),
    })
}

/// The kind of a typed profile, with its reference only where one belongs.
fn profile(profile: &cri::SecurityProfile, at: &str) -> Parsed<cri::security_profile::ProfileType> {
    use cri::security_profile::ProfileType;
    let kind = ProfileType::try_from(profile.profile_type).map_err(|_| {
        EdgeError::invalid(
            format!("{at}.profile_type"),
            profile.profile_type,
            "RuntimeDefault (0), Unconfined (1) or Localhost (2)",
        )
    })?;
    match (kind, profile.localhost_ref.is_empty()) {
        (ProfileType::Localhost, true) => Err(EdgeError::missing(format!("{at}.localhost_ref"))),
        (ProfileType::RuntimeDefault | ProfileType::Unconfined, false) => {
            Err(EdgeError::Conflict {
                field: format!("{at}.localhost_ref"),
                other: format!("{at}.profile_type"),
            })
        }
        _ => Ok(kind),
    }
}

#[expect(deprecated, reason = "older clients set the string form")]
fn seccomp(context: &cri::LinuxContainerSecurityContext) -> Parsed<SeccompWish> {
    use cri::security_profile::ProfileType;
    let at = "config.linux.security_context.seccomp";
    if let Some(typed) = &context.seccomp {
        return Ok(match profile(typed, at)? {
            ProfileType::RuntimeDefault => SeccompWish::Default,
            ProfileType::Unconfined => SeccompWish::Unconfined,
            ProfileType::Localhost => {
                edge::absolute_path(&format!("{at}.localhost_ref"), &typed.localhost_ref)?;
                SeccompWish::Localhost(typed.localhost_ref.clone().into())
            }
        });
    }
    match context.seccomp_profile_path.as_str() {
        "" | "unconfined" => Ok(SeccompWish::Unconfined),
        "runtime/default" | "docker/default" => Ok(SeccompWish::Default),
        other => match other.strip_prefix("localhost/") {
            Some(path) => {
                edge::absolute_path(&format!("{at}_profile_path"), path)?;
                Ok(SeccompWish::Localhost(path.into()))
            }
            None => Err(EdgeError::invalid(
                format!("{at}_profile_path"),
                other,
                "unconfined, runtime/default or localhost/<absolute path>",
            )),
        },
    }
}

#[expect(deprecated, reason = "older clients set the string form")]
fn apparmor(context: &cri::LinuxContainerSecurityContext) -> Parsed<AppArmorWish> {
    use cri::security_profile::ProfileType;
    let at = "config.linux.security_context.apparmor";
    if let Some(typed) = &context.apparmor {
        return Ok(match profile(typed, at)? {
            ProfileType::RuntimeDefault => AppArmorWish::Default,
            ProfileType::Unconfined => AppArmorWish::Unconfined,
            ProfileType::Localhost => AppArmorWish::Localhost(
                typed
                    .localhost_ref
                    .strip_prefix("localhost/")
                    .unwrap_or(&typed.localhost_ref)
                    .to_owned(),
            ),
        });
    }
    match context.apparmor_profile.as_str() {
        "" | "runtime/default" => Ok(AppArmorWish::Default),
        "unconfined" => Ok(AppArmorWish::Unconfined),
        other => match other.strip_prefix("localhost/") {
            Some(name) => Ok(AppArmorWish::Localhost(name.to_owned())),
            None => Err(EdgeError::invalid(
                format!("{at}_profile"),
                other,
                "unconfined, runtime/default or localhost/<profile>",
            )),
        },
    }
}

/// Real-time signals follow the standard ones in the enumeration; the kernel counts from 34.
fn stop_signal(value: i32) -> Parsed<Option<i32>> {
    let signal = cri::Signal::try_from(value)
        .map_err(|_| EdgeError::invalid("config.stop_signal", value, "a value of Signal"))?;
    if signal == cri::Signal::RuntimeDefault {
        return Ok(None);
    }
    super::signal::number(signal).map(Some).ok_or_else(|| {
        EdgeError::invalid(
            "config.stop_signal",
            signal.as_str_name(),
            "a signal that Linux has",
        )
    })
}

fn log(directory: &str, path: &str) -> Parsed<Option<LogWish>> {
    if directory.is_empty() || path.is_empty() {
        return Ok(None);
    }
    edge::absolute_path("sandbox_config.log_directory", directory)?;
    edge::text("config.log_path", path, 4096)?;
    if path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(EdgeError::invalid(
            "config.log_path",
            path,
            "a path below the log directory",
        ));
    }
    Ok(Some(LogWish {
        path: PathBuf::from(directory).join(path),
        rotate_bytes: 0,
        keep_files: 0,
        owned: false,
    }))
}

/// Seconds, not negative.
pub(super) fn seconds(field: &str, value: i64) -> Parsed<Duration> {
    // A longer time than this is as good as none, and its arithmetic cannot overflow.
    const LONGEST: u64 = 100 * 365 * 24 * 3600;
    u64::try_from(value)
        .map(|seconds| Duration::from_secs(seconds.min(LONGEST)))
        .map_err(|_| EdgeError::invalid(field, value, "0 or more seconds"))
}
