//! From the wish for a container to its OCI runtime specification.
//!
//! ```text
//!  ContainerConfig  SandboxConfig  ImageConfig  passwd, group     host (gather: all the I/O)
//!        \               \             |            /              /
//!         +---------------+------ build (pure) ----+--------------+
//!                                   |
//!                        Built: Spec, user, stop signal, pid namespace
//! ```
//! Invariants
//! - [`build`], [`exec_process`] and [`linux_resources`] read and write nothing but their arguments.
//! - What can't be had is refused here, by field, before anything is made.
//! - The specification says what a container may; where it is made of (root, layers) and its pid
//!   namespace are told to the handler beside it.
//!
//! Sources: OCI runtime specification; CRI api.proto.

mod capabilities;
mod cdi;
mod devices;
mod environment;
mod error;
mod host;
mod id_map;
mod mountinfo;
mod mounts;
mod process;
mod resources;
mod security;
mod system;
mod user;

use std::path::Path;

use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceType, LinuxResources, Process, Root, Spec,
};

use self::security::check_privileged;
pub use self::{
    cdi::{CdiEdits, CdiError, cdi_devices, resolve as resolve_cdi},
    environment::env_bytes,
    error::SpecError,
    host::{DeviceNode, HostFacts, SourceFacts, gather},
    mounts::image_volumes,
    process::{DEFAULT_PATH, ExecProcess, exec_process},
    resources::{check_resources, linux_resources},
    system::{CONSOLE_BYTES, WRITABLE_PATHS, system_environment, system_security},
    user::resolve_user,
};
use super::{
    container::{ContainerConfig, User},
    sandbox::{PidMode, SandboxConfig},
};
use crate::{
    cgroup::{CgroupPath, CgroupVersion},
    id::{ContainerId, SandboxId},
    image::ImageConfig,
    network::Mode,
};

/// Version of the OCI runtime specification that is written.
const OCI_VERSION: &str = "1.2.0";

/// All that a specification is made from.
#[derive(Debug)]
pub struct SpecInput<'a> {
    /// The sandbox.
    pub sandbox_id: &'a SandboxId,
    /// How it was wished.
    pub sandbox: &'a SandboxConfig,
    /// Its host name; empty takes the host's or the first digits of the id.
    pub hostname: &'a str,
    /// Where it keeps namespaces, files and `/dev/shm`.
    pub sandbox_dir: &'a Path,
    /// The container.
    pub container_id: &'a ContainerId,
    /// How it is wished.
    pub config: &'a ContainerConfig,
    /// What it inherits.
    pub image: &'a ImageConfig,
    /// The image's `/etc/passwd`.
    pub passwd: Option<&'a [u8]>,
    /// The image's `/etc/group`.
    pub group: Option<&'a [u8]>,
    /// What [`gather`] saw.
    pub host: &'a HostFacts,
    /// Its cgroup.
    pub cgroup: &'a CgroupPath,
    /// Which version carries the controllers.
    pub cgroup_version: CgroupVersion,
}

/// A container, ready to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Built {
    /// The specification. Its environment is text: [`env_bytes`] has the octets.
    pub spec: Spec,
    /// Who it runs as.
    pub user: User,
    /// Signal number that asks it to stop.
    pub stop_signal: i32,
    /// Which process ids it sees.
    pub pid: PidMode,
}

/// Builds the specification of a container. Pure.
///
/// # Errors
/// By field, before any side effect.
pub fn build(input: &SpecInput<'_>) -> Result<Built, SpecError> {
    let SpecInput {
        config,
        image,
        host,
        ..
    } = *input;
    check_privileged(config, input.sandbox)?;
    security::check_selinux(&config.security, host)?;
    let user = resolve_user(&config.user, &image.user, input.passwd, input.group)?;
    let pid = config.pid.as_ref().unwrap_or(&input.sandbox.pid).clone();
    id_map::check(input, &user, &pid)?;
    let process = first_process(input, &user)?;
    let linux = linux(input, &process, &pid)?;

    let mut root = Root::default();
    // A name only: the root is put together out of sight.
    root.set_path("rootfs".into())
        .set_readonly(Some(config.security.readonly_rootfs));
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_hostname((!is_host_network(input)).then(|| hostname(input)))
        .set_mounts(Some(match &config.system {
            Some(_) => system::mounts(input)?,
            None => mounts::mounts(input)?,
        }))
        .set_process(Some(process))
        .set_linux(Some(linux))
        .set_annotations(None);
    host.cdi.apply(&mut spec);
    Ok(Built {
        spec,
        user,
        stop_signal: process::stop_signal(config, image)?,
        pid,
    })
}

fn first_process(input: &SpecInput<'_>, user: &User) -> Result<Process, SpecError> {
    let SpecInput {
        config,
        image,
        host,
        ..
    } = *input;
    let env = match config.system {
        Some(_) => process::own_environment(config)?,
        None => process::environment(config, image, &hostname(input), user)?,
    };
    let rlimits = process::rlimits(&config.rlimits)?;
    let mut process = Process::default();
    process
        .set_args(Some(process::args(config, image)?))
        .set_env(Some(env.encoded()))
        .set_cwd(process::working_dir(config, image)?)
        .set_user(process::oci_user(user))
        .set_terminal(Some(config.tty))
        .set_capabilities(Some(capabilities::capabilities(
            &config.security,
            host.last_capability,
        )?))
        .set_rlimits((!rlimits.is_empty()).then_some(rlimits))
        .set_no_new_privileges(Some(config.security.no_new_privs))
        .set_oom_score_adj(Some(oom_score_adj(config.oom_score_adj)?))
        .set_apparmor_profile(security::apparmor(&config.security, host)?);
    Ok(process)
}

/// Always set, so that a container does not inherit what protects the agent.
fn oom_score_adj(wish: Option<i32>) -> Result<i32, SpecError> {
    let score = wish.unwrap_or(0);
    if !(-1000..=1000).contains(&score) {
        return Err(SpecError::invalid(
            "oom_score_adj",
            score,
            "from -1000 to 1000",
        ));
    }
    Ok(score)
}

fn linux(input: &SpecInput<'_>, process: &Process, pid: &PidMode) -> Result<Linux, SpecError> {
    let SpecInput { config, host, .. } = *input;
    let security = &config.security;
    let bounding = process
        .capabilities()
        .as_ref()
        .and_then(|sets| sets.bounding().clone())
        .unwrap_or_default();
    let (masked, readonly) = security::paths(security)?;
    let devices = devices::devices(config, host)?;
    check_resources(&config.resources, input.cgroup_version)?;
    let mut resources: LinuxResources = linux_resources(&config.resources);
    resources.set_devices(Some(devices.rules));

    let mut linux = Linux::default();
    linux
        .set_cgroups_path(Some(Path::new("/").join(input.cgroup.as_str())))
        .set_namespaces(Some(namespaces(input, pid)))
        .set_uid_mappings(input.sandbox.id_map.map(id_map::uids))
        .set_gid_mappings(input.sandbox.id_map.map(id_map::gids))
        .set_devices((!devices.nodes.is_empty()).then_some(devices.nodes))
        .set_resources(Some(resources))
        .set_masked_paths(Some(masked))
        .set_readonly_paths(Some(readonly))
        .set_seccomp(security::seccomp(security, &bounding, host)?)
        .set_rootfs_propagation(mounts::root_propagation(&config.mounts));
    Ok(linux)
}

/// Kinds that are missing are the host's; a shared pid namespace is told beside the specification.
fn namespaces(input: &SpecInput<'_>, pid: &PidMode) -> Vec<LinuxNamespace> {
    use LinuxNamespaceType as Kind;
    let of_sandbox = |name: &str| Some(input.sandbox_dir.join("ns").join(name));
    let has_own_cgroup = (input.cgroup_version == CgroupVersion::V2
        && !input.config.security.privileged)
        || input.config.system.is_some();
    let has_own_network = !is_host_network(input);
    [
        (true, Kind::Mount, None),
        (
            input.sandbox.id_map.is_some(),
            Kind::User,
            of_sandbox("user"),
        ),
        (has_own_network, Kind::Network, of_sandbox("net")),
        (has_own_network, Kind::Uts, of_sandbox("uts")),
        (!input.sandbox.host_ipc, Kind::Ipc, of_sandbox("ipc")),
        (*pid == PidMode::Container, Kind::Pid, None),
        (has_own_cgroup, Kind::Cgroup, None),
    ]
    .into_iter()
    .filter(|(has_own, ..)| *has_own)
    .map(|(_, kind, path)| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path);
        namespace
    })
    .collect()
}

fn is_host_network(input: &SpecInput<'_>) -> bool {
    input.sandbox.network.mode == Mode::Host
}

fn hostname(input: &SpecInput<'_>) -> String {
    if is_host_network(input) {
        input.host.hostname.clone()
    } else if input.hostname.is_empty() {
        input.sandbox_id.as_str()[..12].to_owned()
    } else {
        input.hostname.to_owned()
    }
}

#[cfg(test)]
mod testing;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{
        testing::{Wish, built},
        *,
    };

    fn spec(wish: &Wish) -> Value {
        serde_json::to_value(built(wish).expect("valid").spec).expect("is JSON")
    }

    #[test]
    fn a_plain_container() {
        let wish = Wish::new();
        let built = built(&wish).expect("valid");
        assert_eq!((built.stop_signal, &built.pid), (15, &PidMode::Container));
        assert_eq!(built.user.supplemental_gids, [0]);
        let mut spec = spec(&wish);
        // Each has its own tests.
        let linux = spec["linux"].as_object_mut().expect("is there");
        assert!(linux.remove("seccomp").is_some());
        spec.as_object_mut().expect("an object").remove("mounts");
        let process = spec["process"].as_object_mut().expect("is there");
        assert!(process.remove("capabilities").is_some());
        assert_eq!(
            spec,
            json!({
                "ociVersion": "1.2.0",
                "root": {"path": "rootfs", "readonly": false},
                "hostname": "pod",
                "process": {
                    "terminal": false,
                    "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
                    "args": ["run"],
                    "env": [
                        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                        "HOSTNAME=pod",
                        "HOME=/",
                    ],
                    "cwd": "/",
                    "noNewPrivileges": false,
                    "oomScoreAdj": 0,
                },
                "linux": {
                    "cgroupsPath": "/longshore-0a1b2c3d/pod/container",
                    "namespaces": [
                        {"type": "mount"},
                        {"type": "network", "path": "/run/sandbox/ns/net"},
                        {"type": "uts", "path": "/run/sandbox/ns/uts"},
                        {"type": "ipc", "path": "/run/sandbox/ns/ipc"},
                        {"type": "pid"},
                        {"type": "cgroup"},
                    ],
                    "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                    "maskedPaths": [],
                    "readonlyPaths": [],
                },
            })
        );
    }

    #[test]
    fn namespaces_follow_sandbox_and_container() {
        let kinds = |change: fn(&mut Wish)| {
            let mut wish = Wish::new();
            change(&mut wish);
            let spec = spec(&wish);
            let kinds = spec["linux"]["namespaces"]
                .as_array()
                .expect("are there")
                .iter();
            let names: Vec<_> = kinds.filter_map(|one| one["type"].as_str()).collect();
            names.join(" ")
        };
        let target = ContainerId::random();
        for (found, expected) in [
            (kinds(|_| ()), "mount network uts ipc pid cgroup"),
            (
                kinds(|w| w.sandbox.network.mode = Mode::Host),
                "mount ipc pid cgroup",
            ),
            (
                kinds(|w| w.sandbox.network.mode = Mode::None),
                "mount network uts ipc pid cgroup",
            ),
            (
                kinds(|w| w.sandbox.host_ipc = true),
                "mount network uts pid cgroup",
            ),
            (
                kinds(|w| w.sandbox.pid = PidMode::Pod),
                "mount network uts ipc cgroup",
            ),
            (
                kinds(|w| w.config.pid = Some(PidMode::Host)),
                "mount network uts ipc cgroup",
            ),
            (
                kinds(|w| w.version = CgroupVersion::V1),
                "mount network uts ipc pid",
            ),
            (
                kinds(|w| {
                    w.sandbox.privileged = true;
                    w.config.security.privileged = true;
                }),
                "mount network uts ipc pid",
            ),
        ] {
            assert_eq!(found, expected);
        }
        let mut wish = Wish::new();
        wish.config.pid = Some(PidMode::Target(target.clone()));
        assert_eq!(built(&wish).expect("valid").pid, PidMode::Target(target));
    }

    #[test]
    fn host_name() {
        let found = |change: fn(&mut Wish)| {
            let mut wish = Wish::new();
            change(&mut wish);
            let spec = spec(&wish);
            let env = spec["process"]["env"][1].as_str().map(str::to_owned);
            (
                env.expect("is there"),
                spec["hostname"].as_str().map(str::to_owned),
                wish,
            )
        };
        let (env, name, _) = found(|_| ());
        assert_eq!(
            (env.as_str(), name.as_deref()),
            ("HOSTNAME=pod", Some("pod"))
        );
        let (env, name, _) = found(|w| w.sandbox.network.mode = Mode::Host);
        assert_eq!((env.as_str(), name.as_deref()), ("HOSTNAME=node", None));
        let (env, _, wish) = found(|w| w.hostname.clear());
        assert_eq!(env, format!("HOSTNAME={}", &wish.sandbox_id.as_str()[..12]));
    }

    #[test]
    fn privileged_drops_all_confinement() {
        let mut wish = Wish::new();
        wish.sandbox.privileged = true;
        let security = &mut wish.config.security;
        security.privileged = true;
        security.masked_paths = vec!["/proc/kcore".to_owned()];
        security.readonly_paths = vec!["/proc/sys".to_owned()];
        let spec = spec(&wish);
        let linux = &spec["linux"];
        assert_eq!(linux["maskedPaths"], json!([]));
        assert_eq!(linux["readonlyPaths"], json!([]));
        assert_eq!(linux.get("seccomp"), None);
        assert_eq!(
            linux["resources"]["devices"],
            json!([{"allow": true, "access": "rwm"}])
        );
        let bounding = spec["process"]["capabilities"]["bounding"]
            .as_array()
            .map(Vec::len);
        assert_eq!(bounding, Some(41));
    }

    #[test]
    fn single_wishes_arrive() {
        let changed = |change: fn(&mut ContainerConfig)| {
            let mut wish = Wish::new();
            change(&mut wish.config);
            spec(&wish)
        };
        assert_eq!(
            changed(|c| c.security.no_new_privs = true)["process"]["noNewPrivileges"],
            true
        );
        assert_eq!(
            changed(|c| c.security.readonly_rootfs = true)["root"]["readonly"],
            true
        );
        assert_eq!(
            changed(|c| c.oom_score_adj = Some(-998))["process"]["oomScoreAdj"],
            -998
        );
        assert_eq!(changed(|c| c.tty = true)["process"]["terminal"], true);
        assert_eq!(
            changed(|c| c.resources.pids_limit = Some(9))["linux"]["resources"]["pids"]["limit"],
            9
        );
        let mut wish = Wish::new();
        wish.config.oom_score_adj = Some(1001);
        assert!(built(&wish).is_err());
        wish.config.oom_score_adj = None;
        wish.config.resources.cpu_period_us = Some(5);
        assert!(built(&wish).is_err());
    }

    #[test]
    fn a_specification_survives_being_stored() {
        let mut wish = Wish::new();
        wish.config.env = vec![("RAW".to_owned(), vec![0xff, 0])];
        assert!(built(&wish).is_err(), "no NUL");
        wish.config.env = vec![("RAW".to_owned(), vec![0xff, 0xfe])];
        let built = built(&wish).expect("valid");
        let stored = serde_json::to_string(&built.spec).expect("is JSON");
        let back: Spec = serde_json::from_str(&stored).expect("is JSON");
        assert_eq!(back, built.spec);
        let env = env_bytes(back.process().as_ref().expect("is there")).expect("not text");
        assert!(env.contains(&b"RAW=\xff\xfe".to_vec()));
    }
}
