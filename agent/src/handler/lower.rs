//! Lowers an OCI specification to the plan of system calls that the engine follows. Pure.
//!
//! What this handler does not do is refused by name, never left out in silence: a container that
//! runs without what its specification asks for is worse than none.

use std::{collections::BTreeMap, path::Path};

use longshore_shim::wire;
use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespace,
    LinuxNamespaceType, Mount, PosixRlimitType, Process, Spec,
};

use super::{HandlerError, PidMode, RootInput, SystemInput, seccomp::Program};

/// All that a [`wire::ContainerPlan`] is made from.
pub(super) struct Input<'a> {
    pub(super) spec: &'a Spec,
    pub(super) env: Option<Vec<Vec<u8>>>,
    pub(super) root: &'a RootInput,
    pub(super) pid: &'a PidMode,
    pub(super) cgroup: wire::CgroupPlan,
    pub(super) seccomp: Option<&'a Program>,
    pub(super) log: Option<wire::Log>,
    pub(super) stdin: bool,
    pub(super) stdin_once: bool,
    pub(super) system: Option<SystemInput>,
}

/// Lowers a container.
pub(super) fn container(input: Input<'_>) -> Result<wire::ContainerPlan, HandlerError> {
    let spec = input.spec;
    let nothing = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&nothing);
    refuse_unsupported(spec, linux)?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| bad("process", "is missing"))?;
    let system = input.system.unwrap_or_default();
    let namespaces = namespaces(linux.namespaces().as_deref().unwrap_or_default(), input.pid)?;
    let user_namespace = user_namespace(linux)?;
    let mounts = spec
        .mounts()
        .iter()
        .flatten()
        .map(|one| mount(one, user_namespace.as_ref()))
        .collect::<Result<Vec<_>, _>>()?;
    let hostname = if has_new(&namespaces, wire::NamespaceKind::Uts) {
        spec.hostname().clone().unwrap_or_default()
    } else {
        String::new()
    };
    Ok(wire::ContainerPlan {
        cgroup: input.cgroup,
        hostname,
        rootfs: rootfs(input.root)?,
        root_propagation: root_propagation(linux, &mounts)?.into(),
        devices: devices(linux.devices().as_deref().unwrap_or_default(), &mounts)?,
        sysctls: linux
            .sysctl()
            .iter()
            .flatten()
            .collect::<BTreeMap<_, _>>()
            .into_iter()
            .map(|(name, value)| wire::Sysctl {
                name: name.clone(),
                value: value.clone(),
            })
            .collect(),
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        readonly_rootfs: spec
            .root()
            .as_ref()
            .and_then(|root| root.readonly())
            .unwrap_or(false),
        process: self::process(process, input.env, input.seccomp)?,
        stdin: input.stdin,
        stdin_once: input.stdin_once,
        log: input.log,
        namespaces,
        mounts,
        user_namespace,
        console_bytes: system.console_bytes,
        files: system.files,
        writable_paths: system.writable_paths,
    })
}

/// Lowers a process, a container's first or an exec.
pub(super) fn process(
    process: &Process,
    env: Option<Vec<Vec<u8>>>,
    seccomp: Option<&Program>,
) -> Result<wire::ProcessPlan, HandlerError> {
    for (is_set, feature) in [
        (process.io_priority().is_some(), "process.ioPriority"),
        (process.scheduler().is_some(), "process.scheduler"),
        (
            process.exec_cpu_affinity().is_some(),
            "process.execCPUAffinity",
        ),
    ] {
        if is_set {
            return Err(unsupported(feature));
        }
    }
    let args = bytes(process.args().as_deref().unwrap_or_default());
    if args.first().is_none_or(Vec::is_empty) {
        return Err(bad("process.args", "is empty"));
    }
    let env = env.unwrap_or_else(|| bytes(process.env().as_deref().unwrap_or_default()));
    for (field, values) in [("process.args", &args), ("process.env", &env)] {
        if values.iter().any(|value| value.contains(&0)) {
            return Err(bad(field, "has a NUL character"));
        }
    }
    let cwd = text("process.cwd", process.cwd())?;
    if !cwd.starts_with('/') {
        return Err(bad("process.cwd", "is not absolute"));
    }
    let terminal = process.terminal().unwrap_or(false);
    let size = process.console_size().filter(|_| terminal);
    let cells = |cells: u64| u32::try_from(cells).unwrap_or(u32::from(u16::MAX));
    let user = process.user();
    Ok(wire::ProcessPlan {
        args,
        env,
        cwd,
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        capabilities: process
            .capabilities()
            .as_ref()
            .map(|sets| wire::Capabilities {
                bounding: mask(sets.bounding().as_ref()),
                permitted: mask(sets.permitted().as_ref()),
                effective: mask(sets.effective().as_ref()),
                inheritable: mask(sets.inheritable().as_ref()),
                ambient: mask(sets.ambient().as_ref()),
            })
            .unwrap_or_default(),
        no_new_privs: process.no_new_privileges().unwrap_or(false),
        rlimits: process
            .rlimits()
            .iter()
            .flatten()
            .map(|limit| wire::Rlimit {
                resource: resource(limit.typ()),
                soft: limit.soft(),
                hard: limit.hard(),
            })
            .collect(),
        seccomp: seccomp
            .map(|one| one.instructions.clone())
            .unwrap_or_default(),
        seccomp_flags: seccomp.map(|one| one.flags).unwrap_or_default(),
        oom_score_adj: process.oom_score_adj(),
        apparmor_profile: process.apparmor_profile().clone().unwrap_or_default(),
        selinux_label: process.selinux_label().clone().unwrap_or_default(),
        terminal,
        width: size.map(|size| cells(size.width())).unwrap_or_default(),
        height: size.map(|size| cells(size.height())).unwrap_or_default(),
        umask: user.umask(),
    })
}

fn refuse_unsupported(spec: &Spec, linux: &Linux) -> Result<(), HandlerError> {
    let has_hooks = spec.hooks().as_ref().is_some_and(|hooks| {
        [
            hooks.create_runtime(),
            hooks.create_container(),
            hooks.start_container(),
            hooks.poststart(),
            hooks.poststop(),
        ]
        .iter()
        .any(|list| list.as_ref().is_some_and(|list| !list.is_empty()))
    });
    let some = |list: Option<usize>| list.is_some_and(|count| count > 0);
    for (is_set, feature) in [
        (has_hooks, "hooks"),
        (spec.domainname().is_some(), "domainname"),
        (linux.intel_rdt().is_some(), "linux.intelRdt"),
        (linux.personality().is_some(), "linux.personality"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy"),
        (
            some(linux.time_offsets().as_ref().map(|offsets| offsets.len())),
            "linux.timeOffsets",
        ),
        (
            some(linux.net_devices().as_ref().map(|devices| devices.len())),
            "linux.netDevices",
        ),
        (linux.mount_label().is_some(), "linux.mountLabel"),
    ] {
        if is_set {
            return Err(unsupported(feature));
        }
    }
    Ok(())
}

pub(super) fn namespaces(
    wished: &[LinuxNamespace],
    pid: &PidMode,
) -> Result<Vec<wire::Namespace>, HandlerError> {
    use wire::NamespaceFrom as From;
    let mut found = BTreeMap::new();
    for wish in wished {
        let kind = match wish.typ() {
            LinuxNamespaceType::Mount => wire::NamespaceKind::Mount,
            LinuxNamespaceType::Cgroup => wire::NamespaceKind::Cgroup,
            LinuxNamespaceType::Uts => wire::NamespaceKind::Uts,
            LinuxNamespaceType::Ipc => wire::NamespaceKind::Ipc,
            LinuxNamespaceType::Network => wire::NamespaceKind::Network,
            // The mode of the request decides.
            LinuxNamespaceType::Pid => continue,
            // Said apart: see `user_namespace`.
            LinuxNamespaceType::User => continue,
            LinuxNamespaceType::Time => return Err(unsupported("time namespaces")),
        };
        let from = match wish.path() {
            Some(path) => From::Path(text("linux.namespaces.path", path)?),
            None => From::New(wire::Empty {}),
        };
        if found.insert(kind, from).is_some() {
            return Err(bad("linux.namespaces", "has a kind twice"));
        }
    }
    // The root is put together in it: without one the host would see its mounts.
    if !matches!(found.get(&wire::NamespaceKind::Mount), Some(From::New(_))) {
        return Err(bad("linux.namespaces", "must have a new mount namespace"));
    }
    let pid = match pid {
        PidMode::New => Some(From::New(wire::Empty {})),
        PidMode::Pod => Some(From::Pod(wire::Empty {})),
        PidMode::Host => None,
        PidMode::Container(id) => Some(From::Container(id.to_string())),
    };
    found.extend(pid.map(|from| (wire::NamespaceKind::Pid, from)));
    Ok(found
        .into_iter()
        .map(|(kind, from)| wire::Namespace {
            kind: kind.into(),
            from: Some(from),
        })
        .collect())
}

/// One that exists: containers of a pod share the one that owns its other namespaces.
pub(super) fn user_namespace(linux: &Linux) -> Result<Option<wire::UserNamespace>, HandlerError> {
    let uid_mappings = id_mappings(linux.uid_mappings().as_deref());
    let gid_mappings = id_mappings(linux.gid_mappings().as_deref());
    let mut wished = linux.namespaces().iter().flatten();
    let Some(wish) = wished.find(|one| one.typ() == LinuxNamespaceType::User) else {
        if uid_mappings.is_empty() && gid_mappings.is_empty() {
            return Ok(None);
        }
        return Err(bad("linux.uidMappings", "needs a user namespace"));
    };
    let path = wish
        .path()
        .as_deref()
        .ok_or_else(|| unsupported("a user namespace without a path"))?;
    if uid_mappings.is_empty() || gid_mappings.is_empty() {
        return Err(bad("linux.uidMappings", "is empty"));
    }
    Ok(Some(wire::UserNamespace {
        path: text("linux.namespaces.path", path)?,
        uid_mappings,
        gid_mappings,
    }))
}

fn id_mappings(mappings: Option<&[LinuxIdMapping]>) -> Vec<wire::IdMapping> {
    mappings
        .unwrap_or_default()
        .iter()
        .map(|one| wire::IdMapping {
            inside: one.container_id(),
            outside: one.host_id(),
            length: one.size(),
        })
        .collect()
}

/// Whether owners of a mount are mapped, which is only done as the container's own ids are.
fn is_id_mapped(mount: &Mount, user: Option<&wire::UserNamespace>) -> Result<bool, HandlerError> {
    let uids = id_mappings(mount.uid_mappings().as_deref());
    let gids = id_mappings(mount.gid_mappings().as_deref());
    if uids.is_empty() && gids.is_empty() {
        return Ok(false);
    }
    match user {
        Some(user) if user.uid_mappings == uids && user.gid_mappings == gids => Ok(true),
        _ => Err(unsupported(
            "an id-mapped mount with other ids than the container's",
        )),
    }
}

fn has_new(namespaces: &[wire::Namespace], kind: wire::NamespaceKind) -> bool {
    namespaces.iter().any(|one| {
        one.kind == i32::from(kind) && matches!(one.from, Some(wire::NamespaceFrom::New(_)))
    })
}

pub(super) fn rootfs(root: &RootInput) -> Result<wire::Rootfs, HandlerError> {
    if root.lower.is_empty() {
        return Err(bad("root", "has no layers"));
    }
    Ok(wire::Rootfs {
        mount_point: text("root", &root.mount_point)?,
        lower: root.lower.clone(),
        layers_dir: text("root", &root.layers_dir)?,
        upper: text("root", &root.upper)?,
        work: text("root", &root.work)?,
        durable: root.durable,
    })
}

/// What one mount option means.
enum Meaning {
    Set(u64),
    Clear(u64),
    Propagation(wire::Propagation),
    Bind,
    RecursiveBind,
    RecursiveReadonly,
    Nothing,
    Unsupported,
    Data,
}

const MS_RDONLY: u64 = 1;
const MS_NOSUID: u64 = 1 << 1;
const MS_NODEV: u64 = 1 << 2;
const MS_NOEXEC: u64 = 1 << 3;
const MS_SYNCHRONOUS: u64 = 1 << 4;
const MS_MANDLOCK: u64 = 1 << 6;
const MS_DIRSYNC: u64 = 1 << 7;
const MS_NOSYMFOLLOW: u64 = 1 << 8;
const MS_NOATIME: u64 = 1 << 10;
const MS_NODIRATIME: u64 = 1 << 11;
const MS_SILENT: u64 = 1 << 15;
const MS_RELATIME: u64 = 1 << 21;
const MS_STRICTATIME: u64 = 1 << 24;
const MS_LAZYTIME: u64 = 1 << 25;

fn meaning(option: &str) -> Meaning {
    use Meaning::{Clear, Set};
    match option {
        "ro" => Set(MS_RDONLY),
        "rw" => Clear(MS_RDONLY),
        "nosuid" => Set(MS_NOSUID),
        "suid" => Clear(MS_NOSUID),
        "nodev" => Set(MS_NODEV),
        "dev" => Clear(MS_NODEV),
        "noexec" => Set(MS_NOEXEC),
        "exec" => Clear(MS_NOEXEC),
        "sync" => Set(MS_SYNCHRONOUS),
        "async" => Clear(MS_SYNCHRONOUS),
        "dirsync" => Set(MS_DIRSYNC),
        "mand" => Set(MS_MANDLOCK),
        "nomand" => Clear(MS_MANDLOCK),
        "nosymfollow" => Set(MS_NOSYMFOLLOW),
        "symfollow" => Clear(MS_NOSYMFOLLOW),
        "noatime" => Set(MS_NOATIME),
        "atime" => Clear(MS_NOATIME),
        "nodiratime" => Set(MS_NODIRATIME),
        "diratime" => Clear(MS_NODIRATIME),
        "relatime" => Set(MS_RELATIME),
        "norelatime" => Clear(MS_RELATIME),
        "strictatime" => Set(MS_STRICTATIME),
        "nostrictatime" => Clear(MS_STRICTATIME),
        "lazytime" => Set(MS_LAZYTIME),
        "nolazytime" => Clear(MS_LAZYTIME),
        "silent" => Set(MS_SILENT),
        "loud" => Clear(MS_SILENT),
        "bind" => Meaning::Bind,
        "rbind" => Meaning::RecursiveBind,
        "rro" => Meaning::RecursiveReadonly,
        "private" | "rprivate" => Meaning::Propagation(wire::Propagation::Private),
        "slave" | "rslave" => Meaning::Propagation(wire::Propagation::Slave),
        "shared" | "rshared" => Meaning::Propagation(wire::Propagation::Shared),
        "defaults" | "remount" => Meaning::Nothing,
        "unbindable" | "runbindable" | "tmpcopyup" | "idmap" | "ridmap" | "rrw" | "rnosuid"
        | "rsuid" | "rnodev" | "rdev" | "rnoexec" | "rexec" | "rnoatime" | "ratime"
        | "rnodiratime" | "rdiratime" | "rrelatime" | "rnorelatime" | "rstrictatime"
        | "rnostrictatime" | "rnosymfollow" | "rsymfollow" => Meaning::Unsupported,
        _ => Meaning::Data,
    }
}

pub(super) fn mount(
    mount: &Mount,
    user: Option<&wire::UserNamespace>,
) -> Result<wire::Mount, HandlerError> {
    let target = text("mounts.destination", mount.destination())?;
    if !target.starts_with('/') {
        return Err(bad("mounts.destination", "is not absolute"));
    }
    let mut bind = mount.typ().as_deref() == Some("bind");
    let mut plan = wire::Mount {
        target,
        id_mapped: is_id_mapped(mount, user)?,
        ..wire::Mount::default()
    };
    let mut data = Vec::new();
    for option in mount.options().iter().flatten() {
        match meaning(option) {
            Meaning::Set(flag) => plan.flags |= flag,
            Meaning::Clear(flag) => plan.flags &= !flag,
            Meaning::Propagation(propagation) => plan.propagation = propagation.into(),
            Meaning::Bind => bind = true,
            Meaning::RecursiveBind => {
                bind = true;
                plan.recursive = true;
            }
            Meaning::RecursiveReadonly => {
                plan.recursive_readonly = true;
                plan.flags |= MS_RDONLY;
            }
            Meaning::Nothing => {}
            Meaning::Unsupported => return Err(unsupported(&format!("mount option {option}"))),
            Meaning::Data => data.push(option.as_str()),
        }
    }
    plan.data = data.join(",");
    if bind {
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        if !source.is_absolute() {
            return Err(bad("mounts.source", "of a bind mount is not absolute"));
        }
        plan.source = text("mounts.source", source)?;
    } else {
        if plan.id_mapped {
            return Err(bad("mounts.uidMappings", "is for bind mounts only"));
        }
        plan.fs_type = mount
            .typ()
            .clone()
            .filter(|fs_type| !fs_type.is_empty() && fs_type != "none")
            .ok_or_else(|| bad("mounts.type", "is missing"))?;
        plan.source = match mount.source() {
            Some(source) => text("mounts.source", source)?,
            None => plan.fs_type.clone(),
        };
    }
    Ok(plan)
}

/// Private, unless the specification or a mount that wants to hear from the host needs more.
fn root_propagation(
    linux: &Linux,
    mounts: &[wire::Mount],
) -> Result<wire::Propagation, HandlerError> {
    use wire::Propagation::{Private, Shared, Slave};
    let own = match linux.rootfs_propagation().as_deref() {
        None | Some("" | "private" | "rprivate") => Private,
        Some("slave" | "rslave") => Slave,
        Some("shared" | "rshared") => Shared,
        Some("unbindable" | "runbindable") => {
            return Err(unsupported("rootfs propagation unbindable"));
        }
        Some(_) => return Err(bad("linux.rootfsPropagation", "is unknown")),
    };
    let needed = mounts.iter().map(wire::Mount::propagation);
    Ok(needed.fold(own, |most, one| most.max(one)))
}

/// What every container has in `/dev`: name, major, minor.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

fn devices(
    wished: &[LinuxDevice],
    mounts: &[wire::Mount],
) -> Result<Vec<wire::Device>, HandlerError> {
    // A /dev from the host has what it has; nodes made there would be made on the host.
    if mounts
        .iter()
        .any(|mount| mount.fs_type.is_empty() && mount.target.trim_end_matches('/') == "/dev")
    {
        return Ok(Vec::new());
    }
    let mut devices: Vec<_> = DEFAULT_DEVICES
        .iter()
        .map(|&(path, major, minor)| wire::Device {
            path: path.to_owned(),
            major,
            minor,
            mode: 0o666,
            ..wire::Device::default()
        })
        .collect();
    for wish in wished {
        let device = device(wish)?;
        match devices.iter_mut().find(|known| known.path == device.path) {
            Some(known) => *known = device,
            None => devices.push(device),
        }
    }
    Ok(devices)
}

fn device(wish: &LinuxDevice) -> Result<wire::Device, HandlerError> {
    let path = text("linux.devices.path", wish.path())?;
    if !path.starts_with('/') || path.split('/').any(|name| name == "..") {
        return Err(bad("linux.devices.path", "is not absolute and plain"));
    }
    let block = match wish.typ() {
        LinuxDeviceType::B => true,
        LinuxDeviceType::C | LinuxDeviceType::U => false,
        LinuxDeviceType::A | LinuxDeviceType::P => {
            return Err(unsupported("device nodes other than block and character"));
        }
    };
    let number = |number: i64| {
        u32::try_from(number).map_err(|_| bad("linux.devices", "has a number out of range"))
    };
    Ok(wire::Device {
        path,
        block,
        major: number(wish.major())?,
        minor: number(wish.minor())?,
        mode: wish.file_mode().unwrap_or(0o666) & 0o7777,
        uid: wish.uid().unwrap_or(0),
        gid: wish.gid().unwrap_or(0),
    })
}

fn mask(set: Option<&Capabilities>) -> u64 {
    set.into_iter()
        .flatten()
        .fold(0, |mask, &one| mask | 1 << number(one))
}

/// Number of a capability, as in `linux/capability.h`.
pub(super) fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

/// Number of a resource limit, as in `asm-generic/resource.h`.
fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

fn bytes(texts: &[String]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

pub(super) fn text(field: &str, path: &Path) -> Result<String, HandlerError> {
    match path.to_str() {
        Some(text) if !text.contains('\0') => Ok(text.to_owned()),
        Some(_) => Err(bad(field, "has a NUL character")),
        None => Err(bad(field, "is not UTF-8")),
    }
}

pub(super) fn bad(field: &str, reason: &'static str) -> HandlerError {
    HandlerError::BadSpec {
        field: field.to_owned(),
        reason,
    }
}

pub(super) fn unsupported(feature: &str) -> HandlerError {
    HandlerError::Unsupported {
        feature: feature.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn root() -> RootInput {
        RootInput {
            mount_point: "/run/x/rootfs".into(),
            layers_dir: "/data/layers".into(),
            lower: vec!["2".to_owned(), "1".to_owned()],
            upper: "/data/upper".into(),
            work: "/data/work".into(),
            durable: false,
        }
    }

    fn lower(changes: Value, pid: &PidMode) -> Result<wire::ContainerPlan, HandlerError> {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        merge(&mut spec, changes);
        let spec: Spec = serde_json::from_value(spec).expect("the test writes valid OCI JSON");
        container(Input {
            spec: &spec,
            env: None,
            root: &root(),
            pid,
            cgroup: wire::CgroupPlan::default(),
            seccomp: None,
            log: None,
            stdin: false,
            stdin_once: false,
            system: None,
        })
    }

    fn merge(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }

    fn plan(changes: Value) -> wire::ContainerPlan {
        lower(changes, &PidMode::New).expect("lowers")
    }

    #[test]
    fn namespaces_come_from_the_specification_and_pid_from_the_mode() {
        use wire::NamespaceFrom::{Container, New, Path, Pod};
        let target = crate::id::ContainerId::random();
        let kinds = json!({"linux": {"namespaces": [
            {"type": "pid", "path": "/ignored"},
            {"type": "mount"},
            {"type": "network", "path": "/run/net"},
            {"type": "uts"},
        ]}});
        for (mode, expected) in [
            (PidMode::New, Some(New(wire::Empty {}))),
            (PidMode::Pod, Some(Pod(wire::Empty {}))),
            (PidMode::Host, None),
            (
                PidMode::Container(target.clone()),
                Some(Container(target.to_string())),
            ),
        ] {
            let plan = lower(kinds.clone(), &mode).expect("lowers");
            let of = |kind: wire::NamespaceKind| {
                plan.namespaces
                    .iter()
                    .find(|one| one.kind == i32::from(kind))
                    .and_then(|one| one.from.clone())
            };
            assert_eq!(of(wire::NamespaceKind::Pid), expected, "{mode:?}");
            assert_eq!(
                of(wire::NamespaceKind::Network),
                Some(Path("/run/net".into()))
            );
            assert_eq!(of(wire::NamespaceKind::Uts), Some(New(wire::Empty {})));
            assert_eq!(of(wire::NamespaceKind::Ipc), None);
        }
    }

    #[test]
    fn host_name_is_set_in_a_new_uts_namespace_only() {
        let with = |uts: Value| {
            plan(json!({
                "hostname": "pod",
                "linux": {"namespaces": [{"type": "mount"}, uts]},
            }))
            .hostname
        };
        assert_eq!(with(json!({"type": "uts"})), "pod");
        assert_eq!(with(json!({"type": "uts", "path": "/run/uts"})), "");
    }

    #[test]
    fn mount_options_become_flags_propagation_and_data() {
        let bind = |options: Value| json!({"destination": "/d", "type": "bind", "source": "/s", "options": options});
        let expected = wire::Mount {
            target: "/d".to_owned(),
            source: "/s".to_owned(),
            ..wire::Mount::default()
        };
        for (mount, expected) in [
            (
                json!({"destination": "/proc", "type": "proc", "options": ["nosuid", "noexec", "nodev"]}),
                wire::Mount {
                    target: "/proc".to_owned(),
                    source: "proc".to_owned(),
                    fs_type: "proc".to_owned(),
                    flags: MS_NOSUID | MS_NOEXEC | MS_NODEV,
                    ..wire::Mount::default()
                },
            ),
            (
                json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                       "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
                wire::Mount {
                    target: "/dev".to_owned(),
                    source: "tmpfs".to_owned(),
                    fs_type: "tmpfs".to_owned(),
                    flags: MS_NOSUID | MS_STRICTATIME,
                    data: "mode=755,size=65536k".to_owned(),
                    ..wire::Mount::default()
                },
            ),
            (
                bind(json!(["rbind", "rprivate", "ro"])),
                wire::Mount {
                    recursive: true,
                    flags: MS_RDONLY,
                    ..expected.clone()
                },
            ),
            (
                bind(json!(["rbind", "rslave", "rro"])),
                wire::Mount {
                    recursive: true,
                    recursive_readonly: true,
                    flags: MS_RDONLY,
                    propagation: wire::Propagation::Slave.into(),
                    ..expected.clone()
                },
            ),
            (
                bind(json!(["bind", "ro", "rw", "rshared"])),
                wire::Mount {
                    propagation: wire::Propagation::Shared.into(),
                    ..expected.clone()
                },
            ),
            (
                json!({"destination": "/d", "source": "/s", "options": ["bind"]}),
                expected,
            ),
        ] {
            assert_eq!(plan(json!({"mounts": [mount]})).mounts, [expected]);
        }
    }

    #[test]
    fn root_propagation_is_what_the_most_demanding_mount_needs() {
        use wire::Propagation::{Private, Shared, Slave};
        for (own, options, expected) in [
            (Value::Null, json!([]), Private),
            (Value::Null, json!(["rslave"]), Slave),
            (json!("rslave"), json!(["rshared"]), Shared),
            (json!("shared"), json!(["rprivate"]), Shared),
        ] {
            let plan = plan(json!({
                "mounts": [{"destination": "/d", "type": "bind", "source": "/s", "options": options}],
                "linux": {"rootfsPropagation": own},
            }));
            assert_eq!(plan.root_propagation(), expected);
        }
    }

    #[test]
    fn default_devices_are_there_and_own_ones_win() {
        let plan = plan(json!({"linux": {"devices": [
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 384, "uid": 7},
            {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
        ]}}));
        assert_eq!(plan.devices.len(), DEFAULT_DEVICES.len() + 1);
        assert_eq!((plan.devices[0].mode, plan.devices[0].uid), (0o600, 7));
        let last = plan.devices.last().expect("there are some");
        assert_eq!((last.block, last.major, last.mode), (true, 8, 0o666));
    }

    #[test]
    fn a_dev_of_the_host_gets_no_nodes() {
        let plan = plan(json!({"mounts": [
            {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"]},
        ]}));
        assert_eq!(plan.devices, []);
    }

    #[test]
    fn a_process_is_lowered_whole() {
        let plan = plan(json!({"process": {
            "terminal": true,
            "consoleSize": {"height": 24, "width": 80},
            "user": {"uid": 1000, "gid": 100, "additionalGids": [4, 5], "umask": 63},
            "args": ["echo", "x"],
            "env": ["A=b"],
            "cwd": "/w",
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "effective": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
            "noNewPrivileges": true,
            "oomScoreAdj": -5,
            "apparmorProfile": "p",
            "selinuxLabel": "l",
        }}));
        assert_eq!(
            plan.process,
            wire::ProcessPlan {
                args: vec![b"echo".to_vec(), b"x".to_vec()],
                env: vec![b"A=b".to_vec()],
                cwd: "/w".to_owned(),
                uid: 1000,
                gid: 100,
                additional_gids: vec![4, 5],
                capabilities: wire::Capabilities {
                    bounding: 1 | 1 << 40,
                    effective: 1 << 5,
                    ..wire::Capabilities::default()
                },
                no_new_privs: true,
                rlimits: vec![wire::Rlimit {
                    resource: 7,
                    soft: 10,
                    hard: 20
                }],
                oom_score_adj: Some(-5),
                apparmor_profile: "p".to_owned(),
                selinux_label: "l".to_owned(),
                terminal: true,
                width: 80,
                height: 24,
                umask: Some(0o77),
                ..wire::ProcessPlan::default()
            }
        );
    }

    #[test]
    fn paths_sysctls_and_root_are_passed_on() {
        let plan = plan(json!({
            "root": {"path": "rootfs", "readonly": true},
            "linux": {
                "sysctl": {"net.b": "2", "net.a": "1"},
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"],
            },
        }));
        let names: Vec<_> = plan.sysctls.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["net.a", "net.b"]);
        assert_eq!(plan.masked_paths, ["/proc/kcore"]);
        assert_eq!(plan.readonly_paths, ["/proc/sys"]);
        assert!(plan.readonly_rootfs);
        assert_eq!(plan.rootfs.lower, ["2", "1"]);
        assert_eq!(plan.rootfs.layers_dir, "/data/layers");
    }

    #[test]
    fn environment_of_any_octets_replaces_the_specification_s() {
        let spec: Process = serde_json::from_value(
            json!({"user": {"uid": 0, "gid": 0}, "args": ["sh"], "env": ["A=b"], "cwd": "/"}),
        )
        .expect("valid");
        let raw = vec![b"A=\xff".to_vec()];
        let plan = process(&spec, Some(raw.clone()), None).expect("lowers");
        assert_eq!(plan.env, raw);
        assert!(process(&spec, Some(vec![b"A=\0".to_vec()]), None).is_err());
    }

    #[test]
    fn what_is_not_done_or_cannot_be_meant_is_refused() {
        let mount = |mount: Value| json!({"mounts": [mount]});
        for changes in [
            json!({"process": {"args": []}}),
            json!({"process": {"args": [""]}}),
            json!({"process": {"cwd": "relative"}}),
            json!({"linux": {"namespaces": []}}),
            json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "user"}]}}),
            json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "uts"}, {"type": "uts"}]}}),
            json!({"linux": {"namespaces": [{"type": "mount", "path": "/x"}]}}),
            json!({"linux": {"rootfsPropagation": "sideways"}}),
            json!({"linux": {"uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}}),
            json!({"hooks": {"poststart": [{"path": "/bin/true"}]}}),
            mount(json!({"destination": "d", "type": "tmpfs"})),
            mount(json!({"destination": "/d"})),
            mount(json!({"destination": "/d", "type": "bind", "source": "rel"})),
            mount(json!({"destination": "/d", "type": "tmpfs", "options": ["idmap"]})),
            json!({"linux": {"devices": [{"path": "/dev/../x", "type": "c", "major": 1, "minor": 3}]}}),
            json!({"linux": {"devices": [{"path": "/dev/p", "type": "p", "major": 0, "minor": 0}]}}),
        ] {
            assert!(lower(changes.clone(), &PidMode::New).is_err(), "{changes}");
        }
    }
}
