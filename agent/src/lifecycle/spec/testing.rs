//! A plain wish for tests to change.

use std::{collections::BTreeMap, path::Path, time::Duration};

use super::{Built, HostFacts, SpecError, SpecInput, build};
use crate::{
    cgroup::{CgroupPath, CgroupVersion},
    id::{ContainerId, Face, SandboxId},
    image::ImageConfig,
    lifecycle::{
        container::{ContainerConfig, IdMapWish, Resources, Security, UserWish},
        sandbox::{PidMode, SandboxConfig, SandboxKey},
    },
    network::SandboxNetwork,
};

pub(super) struct Wish {
    pub(super) sandbox_id: SandboxId,
    pub(super) sandbox: SandboxConfig,
    pub(super) hostname: String,
    pub(super) config: ContainerConfig,
    pub(super) image: ImageConfig,
    pub(super) host: HostFacts,
    pub(super) version: CgroupVersion,
}

impl Wish {
    pub(super) fn new() -> Self {
        let mut image = image();
        image.cmd = vec!["run".to_owned()];
        Self {
            sandbox_id: SandboxId::random(),
            sandbox: sandbox(),
            hostname: "pod".to_owned(),
            config: config(),
            image,
            host: HostFacts {
                hostname: "node".to_owned(),
                last_capability: 40,
                recursive_readonly: true,
                seccomp: true,
                ..HostFacts::default()
            },
            version: CgroupVersion::V2,
        }
    }
}

pub(super) fn built(wish: &Wish) -> Result<Built, SpecError> {
    build(&SpecInput {
        sandbox_id: &wish.sandbox_id,
        sandbox: &wish.sandbox,
        hostname: &wish.hostname,
        sandbox_dir: Path::new("/run/sandbox"),
        container_id: &ContainerId::random(),
        config: &wish.config,
        image: &wish.image,
        passwd: None,
        group: None,
        host: &wish.host,
        cgroup: &CgroupPath::try_from("longshore-0a1b2c3d/pod/container".to_owned())
            .expect("a plain path"),
        cgroup_version: wish.version,
    })
}

pub(super) fn sandbox() -> SandboxConfig {
    SandboxConfig {
        face: Face::Cri,
        key: SandboxKey {
            namespace: "default".to_owned(),
            name: "pod".to_owned(),
            uid: "uid".to_owned(),
            attempt: 0,
        },
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        hostname: "pod".to_owned(),
        network: SandboxNetwork::default(),
        dns: None,
        sysctls: BTreeMap::new(),
        pid: PidMode::Container,
        host_ipc: false,
        id_map: None,
        log_directory: None,
        handler: String::new(),
        cgroup_parent: None,
        privileged: false,
        system: None,
        idempotency_key: String::new(),
        request: serde_json::Value::Null,
    }
}

pub(super) fn config() -> ContainerConfig {
    ContainerConfig {
        face: Face::Cri,
        name: "container".to_owned(),
        attempt: 0,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        image: "image".to_owned(),
        image_name: String::new(),
        command: vec![],
        args: vec![],
        env: vec![],
        working_dir: String::new(),
        user: UserWish::default(),
        mounts: vec![],
        devices: vec![],
        cdi_devices: vec![],
        resources: Resources::default(),
        security: Security::default(),
        rlimits: vec![],
        pid: None,
        id_map: IdMapWish::default(),
        tty: false,
        stdin: false,
        stdin_once: false,
        stop_signal: None,
        stop_timeout: Duration::from_secs(10),
        log: None,
        oom_score_adj: None,
        system: None,
        idempotency_key: String::new(),
        request: serde_json::Value::Null,
    }
}

pub(super) fn image() -> ImageConfig {
    serde_json::from_value(serde_json::json!({
        "entrypoint": [],
        "cmd": [],
        "env": [],
        "working_dir": "",
        "user": "",
        "stop_signal": null,
        "labels": {},
        "exposed_ports": [],
        "volumes": [],
        "platform": {"os": "linux", "architecture": "amd64", "variant": null},
        "created": null,
    }))
    .expect("the record's own form")
}
