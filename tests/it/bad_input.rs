//! Hundreds of requests that are wrong in one thing each, to every RPC.
//!
//! Each must be refused with the code and the field that the table says, in a moment, and nothing
//! may have changed: no record, no event, no file, no kernel object.

use std::{collections::HashMap, future::Future, pin::Pin};

use anyhow::{Context as _, Result};
use longshore_proto::{
    cri::v1::{self as cri, runtime_service_client::RuntimeServiceClient},
    longshore::v1::{
        self as api, event_service_client::EventServiceClient,
        image_service_client::ImageServiceClient, lifecycle_service_client::LifecycleServiceClient,
        network_service_client::NetworkServiceClient,
        operation_service_client::OperationServiceClient,
    },
};
use longshore_tests::pods::{Bench, Pod, container, options, pod, resources, security};
use prost::Message as _;
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt as _;

type Answer = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// One wrong request and what must come of it.
struct Case {
    rpc: &'static str,
    what: String,
    codes: &'static [Code],
    /// Path of the field in `BadRequest`; empty where there is none to name.
    field: String,
    answer: Answer,
}

#[derive(Default)]
struct Table {
    cases: Vec<Case>,
}

const INVALID: &[Code] = &[Code::InvalidArgument];
const UNKNOWN: &[Code] = &[Code::NotFound];
const UNIMPLEMENTED: &[Code] = &[Code::Unimplemented];

impl Table {
    fn add<T: Send + 'static>(
        &mut self,
        rpc: &'static str,
        what: impl Into<String>,
        codes: &'static [Code],
        field: impl Into<String>,
        call: impl Future<Output = Result<Response<T>, Status>> + Send + 'static,
    ) {
        self.cases.push(Case {
            rpc,
            what: what.into(),
            codes,
            field: field.into(),
            answer: Box::pin(async move { call.await.map(drop) }),
        });
    }
}

/// What is no id of anything: shown, sent, and whether it is malformed rather than unknown.
fn wrong_ids() -> Vec<(&'static str, String, bool)> {
    vec![
        ("no id", String::new(), true),
        ("an id of control characters", "a\nb".to_owned(), true),
        ("an id with a NUL", "abc\0def".to_owned(), true),
        ("an id of a megabyte", "a".repeat(1 << 20), true),
        ("an id of 129 characters", "a".repeat(129), true),
        ("an unknown id", "0".repeat(64), false),
        ("a path as an id", "../../../etc/passwd".to_owned(), false),
        ("an absolute path as an id", "/etc/passwd".to_owned(), false),
        ("a name as an id", "not-hex".to_owned(), false),
        ("an id in capitals", "ABCDEF".to_owned(), false),
        (
            "an id of another alphabet",
            "идентификатор".to_owned(),
            false,
        ),
    ]
}

/// Adds the wrong ids for an RPC that must know its subject.
macro_rules! ids {
    ($table:expr, $client:expr, $rpc:ident, $request:ident, $field:ident, $with:expr) => {
        for (what, id, malformed) in wrong_ids() {
            let mut client = $client.clone();
            #[allow(clippy::needless_update)]
            let request = $request {
                $field: id,
                ..$with
            };
            let (codes, field) = if malformed {
                (INVALID, stringify!($field))
            } else {
                (UNKNOWN, "")
            };
            $table.add(stringify!($rpc), what, codes, field, async move {
                client.$rpc(request).await
            });
        }
    };
}

/// Adds the malformed ids for an RPC to which an unknown subject is a finished one.
macro_rules! lenient_ids {
    ($table:expr, $client:expr, $rpc:ident, $request:ident, $field:ident, $with:expr) => {
        for (what, id, malformed) in wrong_ids() {
            if malformed {
                let mut client = $client.clone();
                #[allow(clippy::needless_update)]
                let request = $request {
                    $field: id,
                    ..$with
                };
                $table.add(
                    stringify!($rpc),
                    what,
                    INVALID,
                    stringify!($field),
                    async move { client.$rpc(request).await },
                );
            }
        }
    };
}

type PodChange = fn(&mut cri::PodSandboxConfig);
type ContainerChange = fn(&mut cri::ContainerConfig);

fn one_port(config: &mut cri::PodSandboxConfig) -> &mut cri::PortMapping {
    config.port_mappings = vec![cri::PortMapping {
        container_port: 80,
        host_port: 18080,
        ..Default::default()
    }];
    &mut config.port_mappings[0]
}

fn sysctl(config: &mut cri::PodSandboxConfig, name: &str, value: &str) {
    config.linux.get_or_insert_default().sysctls =
        HashMap::from([(name.to_owned(), value.to_owned())]);
}

fn dns(config: &mut cri::PodSandboxConfig) -> &mut cri::DnsConfig {
    config.dns_config.get_or_insert_default()
}

fn metadata(config: &mut cri::PodSandboxConfig) -> &mut cri::PodSandboxMetadata {
    config.metadata.get_or_insert_default()
}

const CONTEXT: &str = "config.linux.security_context";

/// Pods that are wrong in one thing: what, how, and the field.
fn wrong_pods() -> Vec<(&'static str, PodChange, String)> {
    let options_field = |name: &str| format!("{CONTEXT}.namespace_options.{name}");
    vec![
        (
            "no metadata",
            |c| c.metadata = None,
            "config.metadata".to_owned(),
        ),
        (
            "no name",
            |c| metadata(c).name.clear(),
            "config.metadata.name".to_owned(),
        ),
        (
            "no uid",
            |c| metadata(c).uid.clear(),
            "config.metadata.uid".to_owned(),
        ),
        (
            "no namespace",
            |c| metadata(c).namespace.clear(),
            "config.metadata.namespace".to_owned(),
        ),
        (
            "a huge name",
            |c| metadata(c).name = "n".repeat(5_000),
            "config.metadata.name".to_owned(),
        ),
        (
            "a name with a newline",
            |c| metadata(c).name = "a\nb".to_owned(),
            "config.metadata.name".to_owned(),
        ),
        (
            "a uid with a NUL",
            |c| metadata(c).uid = "a\0b".to_owned(),
            "config.metadata.uid".to_owned(),
        ),
        (
            "a huge label",
            |c| drop(c.labels.insert("k".to_owned(), "v".repeat(1 << 20))),
            "config.labels".to_owned(),
        ),
        (
            "a huge annotation",
            |c| drop(c.annotations.insert("k".to_owned(), "v".repeat(1 << 20))),
            "config.labels".to_owned(),
        ),
        (
            "a long hostname",
            |c| c.hostname = "h".repeat(65),
            "config.hostname".to_owned(),
        ),
        (
            "a hostname with a slash",
            |c| c.hostname = "../etc".to_owned(),
            "config.hostname".to_owned(),
        ),
        (
            "a hostname with a space",
            |c| c.hostname = "a b".to_owned(),
            "config.hostname".to_owned(),
        ),
        (
            "a hostname with a newline",
            |c| c.hostname = "a\nb".to_owned(),
            "config.hostname".to_owned(),
        ),
        (
            "a hostname like an option",
            |c| c.hostname = "-rf".to_owned(),
            "config.hostname".to_owned(),
        ),
        (
            "a hostname in the host's network",
            |c| options(c).network = 2,
            "config.hostname".to_owned(),
        ),
        (
            "a relative log directory",
            |c| c.log_directory = "logs".to_owned(),
            "config.log_directory".to_owned(),
        ),
        (
            "a log directory that climbs",
            |c| c.log_directory = "/var/log/../../etc".to_owned(),
            "config.log_directory".to_owned(),
        ),
        (
            "a huge log directory",
            |c| c.log_directory = format!("/{}", "l".repeat(5_000)),
            "config.log_directory".to_owned(),
        ),
        (
            "a log directory with a NUL",
            |c| c.log_directory = "/var/\0".to_owned(),
            "config.log_directory".to_owned(),
        ),
        (
            "a host port beyond ports",
            |c| one_port(c).host_port = 65_536,
            "config.port_mappings[0].host_port".to_owned(),
        ),
        (
            "a huge host port",
            |c| one_port(c).host_port = i32::MAX,
            "config.port_mappings[0].host_port".to_owned(),
        ),
        (
            "a container port beyond ports",
            |c| one_port(c).container_port = 70_000,
            "config.port_mappings[0].container_port".to_owned(),
        ),
        (
            "a negative container port",
            |c| one_port(c).container_port = -1,
            "config.port_mappings[0].container_port".to_owned(),
        ),
        (
            "no container port",
            |c| one_port(c).container_port = 0,
            "config.port_mappings[0].container_port".to_owned(),
        ),
        (
            "an unknown protocol",
            |c| one_port(c).protocol = 9,
            "config.port_mappings[0].protocol".to_owned(),
        ),
        (
            "a negative protocol",
            |c| one_port(c).protocol = -1,
            "config.port_mappings[0].protocol".to_owned(),
        ),
        (
            "a host ip that is a name",
            |c| one_port(c).host_ip = "localhost".to_owned(),
            "config.port_mappings[0].host_ip".to_owned(),
        ),
        (
            "a host ip with a length",
            |c| one_port(c).host_ip = "10.0.0.0/8".to_owned(),
            "config.port_mappings[0].host_ip".to_owned(),
        ),
        (
            "a dns server that is a name",
            |c| dns(c).servers = vec!["ns.example".to_owned()],
            "config.dns_config.servers[0]".to_owned(),
        ),
        (
            "a dns server that is a line",
            |c| dns(c).servers = vec!["1.1.1.1\noptions x".to_owned()],
            "config.dns_config.servers[0]".to_owned(),
        ),
        (
            "an empty search domain",
            |c| dns(c).searches = vec![String::new()],
            "config.dns_config.searches[0]".to_owned(),
        ),
        (
            "a search domain that is a line",
            |c| dns(c).searches = vec!["a\nnameserver 6.6.6.6".to_owned()],
            "config.dns_config.searches[0]".to_owned(),
        ),
        (
            "two words in a dns option",
            |c| dns(c).options = vec!["a b".to_owned()],
            "config.dns_config.options[0]".to_owned(),
        ),
        (
            "a huge dns option",
            |c| dns(c).options = vec!["o".repeat(300)],
            "config.dns_config.options[0]".to_owned(),
        ),
        (
            "a sysctl of the host",
            |c| sysctl(c, "vm.swappiness", "1"),
            "config.linux.sysctls[vm.swappiness]".to_owned(),
        ),
        (
            "a sysctl that climbs",
            |c| sysctl(c, "net/../vm/swappiness", "1"),
            "config.linux.sysctls[net/../vm/swappiness]".to_owned(),
        ),
        (
            "a sysctl that climbs in dots",
            |c| sysctl(c, "net....vm.swappiness", "1"),
            "config.linux.sysctls[net....vm.swappiness]".to_owned(),
        ),
        (
            "a sysctl without a name",
            |c| sysctl(c, "", "1"),
            "config.linux.sysctls[]".to_owned(),
        ),
        (
            "a sysctl value of two lines",
            |c| sysctl(c, "kernel.sem", "1\n2"),
            "config.linux.sysctls[kernel.sem]".to_owned(),
        ),
        (
            "a sysctl of a network that is the host's",
            |c| {
                c.hostname.clear();
                options(c).network = 2;
                sysctl(c, "net.core.somaxconn", "1");
            },
            "config.linux.sysctls[net.core.somaxconn]".to_owned(),
        ),
        (
            "a sysctl of an ipc that is the host's",
            |c| {
                options(c).ipc = 2;
                sysctl(c, "kernel.msgmax", "1");
            },
            "config.linux.sysctls[kernel.msgmax]".to_owned(),
        ),
        (
            "a cgroup parent that climbs",
            |c| c.linux.get_or_insert_default().cgroup_parent = "/a/../../b".to_owned(),
            "config.linux.cgroup_parent".to_owned(),
        ),
        (
            "a cgroup parent with a NUL",
            |c| c.linux.get_or_insert_default().cgroup_parent = "/a\0".to_owned(),
            "config.linux.cgroup_parent".to_owned(),
        ),
        (
            "an unknown network mode",
            |c| options(c).network = 77,
            options_field("network"),
        ),
        (
            "a negative network mode",
            |c| options(c).network = -1,
            options_field("network"),
        ),
        (
            "network CONTAINER",
            |c| options(c).network = 1,
            options_field("network"),
        ),
        (
            "network TARGET",
            |c| options(c).network = 3,
            options_field("network"),
        ),
        (
            "an unknown pid mode",
            |c| options(c).pid = 77,
            options_field("pid"),
        ),
        ("pid TARGET", |c| options(c).pid = 3, options_field("pid")),
        (
            "an unknown ipc mode",
            |c| options(c).ipc = 77,
            options_field("ipc"),
        ),
        (
            "ipc CONTAINER",
            |c| options(c).ipc = 1,
            options_field("ipc"),
        ),
        (
            "an unknown user namespace mode",
            |c| {
                options(c).userns_options = Some(cri::UserNamespace {
                    mode: 9,
                    ..Default::default()
                })
            },
            options_field("userns_options.mode"),
        ),
        (
            "user namespace CONTAINER",
            |c| {
                options(c).userns_options = Some(cri::UserNamespace {
                    mode: 1,
                    ..Default::default()
                })
            },
            options_field("userns_options.mode"),
        ),
        (
            "user namespace NODE with mappings",
            |c| {
                options(c).userns_options = Some(cri::UserNamespace {
                    mode: 2,
                    uids: vec![cri::IdMapping {
                        host_id: 1,
                        container_id: 0,
                        length: 1,
                    }],
                    gids: Vec::new(),
                })
            },
            options_field("userns_options.uids"),
        ),
        (
            "a group without a user",
            |c| {
                c.linux
                    .get_or_insert_default()
                    .security_context
                    .get_or_insert_default()
                    .run_as_group = Some(cri::Int64Value { value: 1 });
            },
            format!("{CONTEXT}.run_as_user"),
        ),
    ]
}

fn one_mount(config: &mut cri::ContainerConfig) -> &mut cri::Mount {
    config.mounts = vec![cri::Mount {
        container_path: "/x".to_owned(),
        host_path: "/tmp".to_owned(),
        ..Default::default()
    }];
    &mut config.mounts[0]
}

fn one_device(config: &mut cri::ContainerConfig) -> &mut cri::Device {
    config.devices = vec![cri::Device {
        container_path: "/dev/x".to_owned(),
        host_path: "/dev/null".to_owned(),
        permissions: "rw".to_owned(),
    }];
    &mut config.devices[0]
}

fn one_env(config: &mut cri::ContainerConfig, key: &str, value: &[u8]) {
    config.envs = vec![cri::KeyValue {
        key: key.to_owned(),
        value: value.to_vec(),
    }];
}

fn profile(profile_type: i32, localhost_ref: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile {
        profile_type,
        localhost_ref: localhost_ref.to_owned(),
    })
}

fn number(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}

/// Containers that are wrong in one thing.
fn wrong_containers() -> Vec<(&'static str, ContainerChange, String)> {
    let context = |name: &str| format!("{CONTEXT}.{name}");
    let resource = |name: &str| format!("config.linux.resources.{name}");
    vec![
        (
            "no metadata",
            |c| c.metadata = None,
            "config.metadata".to_owned(),
        ),
        (
            "no name",
            |c| c.metadata.get_or_insert_default().name.clear(),
            "config.metadata.name".to_owned(),
        ),
        (
            "a huge name",
            |c| c.metadata.get_or_insert_default().name = "n".repeat(5_000),
            "config.metadata.name".to_owned(),
        ),
        (
            "a name with a control character",
            |c| c.metadata.get_or_insert_default().name = "a\tb".to_owned(),
            "config.metadata.name".to_owned(),
        ),
        (
            "no image",
            |c| c.image = None,
            "config.image.image".to_owned(),
        ),
        (
            "an empty image",
            |c| c.image.get_or_insert_default().image.clear(),
            "config.image.image".to_owned(),
        ),
        (
            "a huge image",
            |c| c.image.get_or_insert_default().image = "i".repeat(5_000),
            "config.image.image".to_owned(),
        ),
        (
            "a huge label",
            |c| drop(c.labels.insert("k".to_owned(), "v".repeat(1 << 20))),
            "config.labels".to_owned(),
        ),
        (
            "an empty program",
            |c| c.command = vec![String::new()],
            "config.command[0]".to_owned(),
        ),
        (
            "a command with a NUL",
            |c| c.command = vec!["a".to_owned(), "b\0".to_owned()],
            "config.command[1]".to_owned(),
        ),
        (
            "an argument with a NUL",
            |c| c.args = vec!["b\0".to_owned()],
            "config.args[0]".to_owned(),
        ),
        (
            "a variable without a name",
            |c| one_env(c, "", b"x"),
            "config.envs[0].key".to_owned(),
        ),
        (
            "a variable with =",
            |c| one_env(c, "A=B", b"x"),
            "config.envs[0].key".to_owned(),
        ),
        (
            "a variable with a NUL",
            |c| one_env(c, "A\0", b"x"),
            "config.envs[0].key".to_owned(),
        ),
        (
            "a value with a NUL",
            |c| one_env(c, "A", b"x\0y"),
            "config.envs[0].value".to_owned(),
        ),
        (
            "a relative working directory",
            |c| c.working_dir = "srv".to_owned(),
            "config.working_dir".to_owned(),
        ),
        (
            "a huge working directory",
            |c| c.working_dir = format!("/{}", "w".repeat(5_000)),
            "config.working_dir".to_owned(),
        ),
        (
            "an absolute log path",
            |c| c.log_path = "/etc/passwd".to_owned(),
            "config.log_path".to_owned(),
        ),
        (
            "a log path that climbs",
            |c| c.log_path = "../../etc/passwd".to_owned(),
            "config.log_path".to_owned(),
        ),
        (
            "a log path that climbs later",
            |c| c.log_path = "a/b/../../../c".to_owned(),
            "config.log_path".to_owned(),
        ),
        (
            "a log path with a NUL",
            |c| c.log_path = "a\0b".to_owned(),
            "config.log_path".to_owned(),
        ),
        (
            "an unknown stop signal",
            |c| c.stop_signal = 9_999,
            "config.stop_signal".to_owned(),
        ),
        (
            "a negative stop signal",
            |c| c.stop_signal = -1,
            "config.stop_signal".to_owned(),
        ),
        (
            "no container path",
            |c| one_mount(c).container_path.clear(),
            "config.mounts[0].container_path".to_owned(),
        ),
        (
            "a relative container path",
            |c| one_mount(c).container_path = "x".to_owned(),
            "config.mounts[0].container_path".to_owned(),
        ),
        (
            "a container path that climbs",
            |c| one_mount(c).container_path = "/x/../../y".to_owned(),
            "config.mounts[0].container_path".to_owned(),
        ),
        (
            "no host path",
            |c| one_mount(c).host_path.clear(),
            "config.mounts[0].host_path".to_owned(),
        ),
        (
            "a relative host path",
            |c| one_mount(c).host_path = "tmp".to_owned(),
            "config.mounts[0].host_path".to_owned(),
        ),
        (
            "a host path that climbs",
            |c| one_mount(c).host_path = "/tmp/../etc".to_owned(),
            "config.mounts[0].host_path".to_owned(),
        ),
        (
            "a host path with a NUL",
            |c| one_mount(c).host_path = "/tmp\0".to_owned(),
            "config.mounts[0].host_path".to_owned(),
        ),
        (
            "an unknown propagation",
            |c| one_mount(c).propagation = 9,
            "config.mounts[0].propagation".to_owned(),
        ),
        (
            "a negative propagation",
            |c| one_mount(c).propagation = -3,
            "config.mounts[0].propagation".to_owned(),
        ),
        (
            "recursively read-only and writable",
            |c| one_mount(c).recursive_read_only = true,
            "config.mounts[0].recursive_read_only".to_owned(),
        ),
        (
            "recursively read-only and shared",
            |c| {
                let mount = one_mount(c);
                (mount.recursive_read_only, mount.readonly, mount.propagation) = (true, true, 2);
            },
            "config.mounts[0].recursive_read_only".to_owned(),
        ),
        (
            "an unknown mount option",
            |c| one_mount(c).mount_options = vec!["suid".to_owned()],
            "config.mounts[0].mount_options[0]".to_owned(),
        ),
        (
            "no device path",
            |c| one_device(c).host_path.clear(),
            "config.devices[0].host_path".to_owned(),
        ),
        (
            "a relative device path",
            |c| one_device(c).host_path = "null".to_owned(),
            "config.devices[0].host_path".to_owned(),
        ),
        (
            "a device path that climbs",
            |c| one_device(c).host_path = "/dev/../etc/shadow".to_owned(),
            "config.devices[0].host_path".to_owned(),
        ),
        (
            "a device target that climbs",
            |c| one_device(c).container_path = "/dev/../../x".to_owned(),
            "config.devices[0].container_path".to_owned(),
        ),
        (
            "unknown device permissions",
            |c| one_device(c).permissions = "rx".to_owned(),
            "config.devices[0].permissions".to_owned(),
        ),
        (
            "too many device permissions",
            |c| one_device(c).permissions = "rwmr".to_owned(),
            "config.devices[0].permissions".to_owned(),
        ),
        (
            "a negative period",
            |c| resources(c).cpu_period = -1,
            resource("cpu_period"),
        ),
        (
            "a strange quota",
            |c| resources(c).cpu_quota = -2,
            resource("cpu_quota"),
        ),
        (
            "negative shares",
            |c| resources(c).cpu_shares = -1,
            resource("cpu_shares"),
        ),
        (
            "a strange memory limit",
            |c| resources(c).memory_limit_in_bytes = -2,
            resource("memory_limit_in_bytes"),
        ),
        (
            "the least memory limit",
            |c| resources(c).memory_limit_in_bytes = i64::MIN,
            resource("memory_limit_in_bytes"),
        ),
        (
            "a strange swap limit",
            |c| resources(c).memory_swap_limit_in_bytes = -2,
            resource("memory_swap_limit_in_bytes"),
        ),
        (
            "an oom score too high",
            |c| resources(c).oom_score_adj = 1_001,
            resource("oom_score_adj"),
        ),
        (
            "an oom score too low",
            |c| resources(c).oom_score_adj = -1_001,
            resource("oom_score_adj"),
        ),
        (
            "a huge oom score",
            |c| resources(c).oom_score_adj = i64::MAX,
            resource("oom_score_adj"),
        ),
        (
            "cpus in words",
            |c| resources(c).cpuset_cpus = "all".to_owned(),
            resource("cpuset_cpus"),
        ),
        (
            "cpus of two lines",
            |c| resources(c).cpuset_cpus = "0\n1".to_owned(),
            resource("cpuset_cpus"),
        ),
        (
            "nodes in words",
            |c| resources(c).cpuset_mems = "../0".to_owned(),
            resource("cpuset_mems"),
        ),
        (
            "a unified key that climbs",
            |c| {
                drop(
                    resources(c)
                        .unified
                        .insert("../../memory.max".to_owned(), "1".to_owned()),
                )
            },
            resource("unified"),
        ),
        (
            "a unified key without a controller",
            |c| {
                drop(
                    resources(c)
                        .unified
                        .insert("memory".to_owned(), "1".to_owned()),
                )
            },
            resource("unified"),
        ),
        (
            "an empty unified key",
            |c| drop(resources(c).unified.insert(String::new(), "1".to_owned())),
            resource("unified"),
        ),
        (
            "a strange page size",
            |c| {
                resources(c).hugepage_limits = vec![cri::HugepageLimit {
                    page_size: "../2".to_owned(),
                    limit: 1,
                }]
            },
            resource("hugepage_limits[0].page_size"),
        ),
        (
            "a negative user",
            |c| security(c).run_as_user = number(-1),
            context("run_as_user"),
        ),
        (
            "a huge user",
            |c| security(c).run_as_user = number(i64::MAX),
            context("run_as_user"),
        ),
        (
            "a negative group",
            |c| {
                security(c).run_as_user = number(0);
                security(c).run_as_group = number(-1);
            },
            context("run_as_group"),
        ),
        (
            "a group without a user",
            |c| security(c).run_as_group = number(1),
            context("run_as_user"),
        ),
        (
            "a user name with a newline",
            |c| security(c).run_as_username = "root\nx".to_owned(),
            context("run_as_username"),
        ),
        (
            "a negative more group",
            |c| security(c).supplemental_groups = vec![1, -2],
            context("supplemental_groups[1]"),
        ),
        (
            "an unknown groups policy",
            |c| security(c).supplemental_groups_policy = 5,
            context("supplemental_groups_policy"),
        ),
        (
            "an empty capability",
            |c| {
                security(c).capabilities = Some(cri::Capability {
                    add_capabilities: vec![String::new()],
                    ..Default::default()
                })
            },
            context("capabilities.add_capabilities[0]"),
        ),
        (
            "a huge capability",
            |c| {
                security(c).capabilities = Some(cri::Capability {
                    drop_capabilities: vec!["C".repeat(100)],
                    ..Default::default()
                })
            },
            context("capabilities.drop_capabilities[0]"),
        ),
        (
            "a relative masked path",
            |c| security(c).masked_paths = vec!["proc/x".to_owned()],
            context("masked_paths[0]"),
        ),
        (
            "a masked path that climbs",
            |c| security(c).masked_paths = vec!["/proc/../x".to_owned()],
            context("masked_paths[0]"),
        ),
        (
            "a relative read-only path",
            |c| security(c).readonly_paths = vec!["x".to_owned()],
            context("readonly_paths[0]"),
        ),
        (
            "an unknown seccomp type",
            |c| security(c).seccomp = profile(9, ""),
            context("seccomp.profile_type"),
        ),
        (
            "a local seccomp profile without a path",
            |c| security(c).seccomp = profile(2, ""),
            context("seccomp.localhost_ref"),
        ),
        (
            "a relative seccomp profile",
            |c| security(c).seccomp = profile(2, "x.json"),
            context("seccomp.localhost_ref"),
        ),
        (
            "a seccomp profile that climbs",
            |c| security(c).seccomp = profile(2, "/a/../b"),
            context("seccomp.localhost_ref"),
        ),
        (
            "a path beside the default seccomp profile",
            |c| security(c).seccomp = profile(0, "/x"),
            context("seccomp.localhost_ref"),
        ),
        (
            "an unknown apparmor type",
            |c| security(c).apparmor = profile(9, ""),
            context("apparmor.profile_type"),
        ),
        (
            "a local apparmor profile without a name",
            |c| security(c).apparmor = profile(2, ""),
            context("apparmor.localhost_ref"),
        ),
        (
            "an unknown pid mode",
            |c| security(c).namespace_options.get_or_insert_default().pid = 44,
            context("namespace_options.pid"),
        ),
        (
            "a target that is no id",
            |c| {
                let options = security(c).namespace_options.get_or_insert_default();
                (options.pid, options.target_id) = (3, "../x".to_owned());
            },
            context("namespace_options.target_id"),
        ),
        (
            "no target",
            |c| security(c).namespace_options.get_or_insert_default().pid = 3,
            context("namespace_options.target_id"),
        ),
    ]
}

fn cri_runtime(table: &mut Table, bench: &Bench, pod_: &Pod, id: &str) {
    use cri::{
        AttachRequest, CheckpointContainerRequest, ContainerStatsRequest, ContainerStatusRequest,
        ExecRequest, ExecSyncRequest, PodSandboxStatsRequest, PodSandboxStatusRequest,
        PortForwardRequest, RemoveContainerRequest, RemovePodSandboxRequest,
        ReopenContainerLogRequest, StartContainerRequest, StopContainerRequest,
        StopPodSandboxRequest, UpdateContainerResourcesRequest, UpdatePodSandboxResourcesRequest,
    };
    let client = bench.runtime.clone();
    for (what, change, field) in wrong_pods() {
        let mut config = pod("wrong");
        change(&mut config);
        let mut client = client.clone();
        let request = cri::RunPodSandboxRequest {
            config: Some(config),
            ..Default::default()
        };
        table.add("run_pod_sandbox", what, INVALID, field, async move {
            client.run_pod_sandbox(request).await
        });
    }
    let mut run = |what: &str, request: cri::RunPodSandboxRequest, field: &str| {
        let mut client = client.clone();
        table.add("run_pod_sandbox", what, INVALID, field, async move {
            client.run_pod_sandbox(request).await
        });
    };
    run("no config", cri::RunPodSandboxRequest::default(), "config");
    run(
        "an unknown handler",
        cri::RunPodSandboxRequest {
            config: Some(pod("wrong")),
            runtime_handler: "kata-of-mine".to_owned(),
        },
        "runtime_handler",
    );
    run(
        "a huge handler",
        cri::RunPodSandboxRequest {
            config: Some(pod("wrong")),
            runtime_handler: "h".repeat(9_000),
        },
        "runtime_handler",
    );
    let toolbox = bench.toolbox.clone();
    for (what, change, field) in wrong_containers() {
        let mut config = container("wrong", &toolbox, &["true"]);
        change(&mut config);
        let mut client = client.clone();
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod_.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod_.config.clone()),
        };
        table.add("create_container", what, INVALID, field, async move {
            client.create_container(request).await
        });
    }
    let full = cri::CreateContainerRequest {
        pod_sandbox_id: pod_.id.clone(),
        config: Some(container("wrong", &toolbox, &["true"])),
        sandbox_config: Some(pod_.config.clone()),
    };
    for (what, request, field) in [
        (
            "no config",
            cri::CreateContainerRequest {
                config: None,
                ..full.clone()
            },
            "config",
        ),
        (
            "no sandbox config",
            cri::CreateContainerRequest {
                sandbox_config: None,
                ..full.clone()
            },
            "sandbox_config",
        ),
        (
            "a sandbox config without metadata",
            cri::CreateContainerRequest {
                sandbox_config: Some(cri::PodSandboxConfig::default()),
                ..full.clone()
            },
            "sandbox_config.metadata",
        ),
    ] {
        let mut client = client.clone();
        table.add("create_container", what, INVALID, field, async move {
            client.create_container(request).await
        });
    }
    use cri::CreateContainerRequest;
    ids!(
        table,
        client,
        create_container,
        CreateContainerRequest,
        pod_sandbox_id,
        full.clone()
    );
    ids!(
        table,
        client,
        start_container,
        StartContainerRequest,
        container_id,
        Default::default()
    );
    ids!(
        table,
        client,
        container_status,
        ContainerStatusRequest,
        container_id,
        Default::default()
    );
    ids!(
        table,
        client,
        pod_sandbox_status,
        PodSandboxStatusRequest,
        pod_sandbox_id,
        Default::default()
    );
    ids!(
        table,
        client,
        container_stats,
        ContainerStatsRequest,
        container_id,
        Default::default()
    );
    ids!(
        table,
        client,
        pod_sandbox_stats,
        PodSandboxStatsRequest,
        pod_sandbox_id,
        Default::default()
    );
    ids!(
        table,
        client,
        reopen_container_log,
        ReopenContainerLogRequest,
        container_id,
        Default::default()
    );
    let limits = cri::LinuxContainerResources {
        cpu_shares: 100,
        ..Default::default()
    };
    ids!(
        table,
        client,
        update_container_resources,
        UpdateContainerResourcesRequest,
        container_id,
        UpdateContainerResourcesRequest {
            linux: Some(limits.clone()),
            ..Default::default()
        }
    );
    ids!(
        table,
        client,
        update_pod_sandbox_resources,
        UpdatePodSandboxResourcesRequest,
        pod_sandbox_id,
        Default::default()
    );
    let cmd = vec!["true".to_owned()];
    ids!(
        table,
        client,
        exec_sync,
        ExecSyncRequest,
        container_id,
        ExecSyncRequest {
            cmd: cmd.clone(),
            ..Default::default()
        }
    );
    lenient_ids!(
        table,
        client,
        stop_container,
        StopContainerRequest,
        container_id,
        Default::default()
    );
    lenient_ids!(
        table,
        client,
        remove_container,
        RemoveContainerRequest,
        container_id,
        Default::default()
    );
    lenient_ids!(
        table,
        client,
        stop_pod_sandbox,
        StopPodSandboxRequest,
        pod_sandbox_id,
        Default::default()
    );
    lenient_ids!(
        table,
        client,
        remove_pod_sandbox,
        RemovePodSandboxRequest,
        pod_sandbox_id,
        Default::default()
    );
    for (what, cmd, timeout, field) in [
        ("no command", vec![], 0, "cmd"),
        ("an empty program", vec![String::new()], 0, "cmd[0]"),
        ("a NUL in the command", vec!["a\0".to_owned()], 0, "cmd[0]"),
        ("a negative timeout", vec!["true".to_owned()], -1, "timeout"),
        (
            "the least timeout",
            vec!["true".to_owned()],
            i64::MIN,
            "timeout",
        ),
    ] {
        let mut client = client.clone();
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd,
            timeout,
        };
        table.add("exec_sync", what, INVALID, field, async move {
            client.exec_sync(request).await
        });
    }
    for (what, change, field) in [
        (
            "a negative period",
            cri::LinuxContainerResources {
                cpu_period: -5,
                ..limits.clone()
            },
            "linux.cpu_period",
        ),
        (
            "a strange quota",
            cri::LinuxContainerResources {
                cpu_quota: -5,
                ..limits.clone()
            },
            "linux.cpu_quota",
        ),
        (
            "a strange limit",
            cri::LinuxContainerResources {
                memory_limit_in_bytes: -5,
                ..limits.clone()
            },
            "linux.memory_limit_in_bytes",
        ),
        (
            "cpus in words",
            cri::LinuxContainerResources {
                cpuset_cpus: "one".to_owned(),
                ..limits.clone()
            },
            "linux.cpuset_cpus",
        ),
        (
            "a key that climbs",
            cri::LinuxContainerResources {
                unified: HashMap::from([("a/b.c".to_owned(), "1".to_owned())]),
                ..limits.clone()
            },
            "linux.unified",
        ),
    ] {
        let mut client = client.clone();
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(change),
            ..Default::default()
        };
        table.add(
            "update_container_resources",
            what,
            INVALID,
            field,
            async move { client.update_container_resources(request).await },
        );
    }
    streams(table, &client, pod_, id);
    // What is for later says so.
    let request = CheckpointContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    let mut checkpoint = client.clone();
    table.add(
        "checkpoint_container",
        "not built",
        UNIMPLEMENTED,
        "",
        async move { checkpoint.checkpoint_container(request).await },
    );
    let _ = (
        ExecRequest::default(),
        AttachRequest::default(),
        PortForwardRequest::default(),
    );
}

/// The calls that answer with a URL: refused, or not offered at all, but never answered.
fn streams(
    table: &mut Table,
    client: &RuntimeServiceClient<tonic::transport::Channel>,
    pod: &Pod,
    id: &str,
) {
    const REFUSED: &[Code] = &[Code::InvalidArgument, Code::Unimplemented];
    const UNKNOWN: &[Code] = &[Code::NotFound, Code::InvalidArgument, Code::Unimplemented];
    let exec = cri::ExecRequest {
        container_id: id.to_owned(),
        cmd: vec!["true".to_owned()],
        stdout: true,
        ..Default::default()
    };
    for (what, request) in [
        (
            "no stream",
            cri::ExecRequest {
                stdout: false,
                ..exec.clone()
            },
        ),
        (
            "tty with stderr",
            cri::ExecRequest {
                tty: true,
                stderr: true,
                ..exec.clone()
            },
        ),
        (
            "no command",
            cri::ExecRequest {
                cmd: Vec::new(),
                ..exec.clone()
            },
        ),
        (
            "no id",
            cri::ExecRequest {
                container_id: String::new(),
                ..exec.clone()
            },
        ),
    ] {
        let mut client = client.clone();
        table.add("exec", what, REFUSED, "", async move {
            client.exec(request).await
        });
    }
    for (what, container_id, _) in wrong_ids() {
        let mut other = client.clone();
        let request = cri::ExecRequest {
            container_id: container_id.clone(),
            ..exec.clone()
        };
        table.add("exec", what, UNKNOWN, "", async move {
            other.exec(request).await
        });
        let mut other = client.clone();
        let request = cri::AttachRequest {
            container_id: container_id.clone(),
            stdout: true,
            ..Default::default()
        };
        table.add("attach", what, UNKNOWN, "", async move {
            other.attach(request).await
        });
        let mut other = client.clone();
        let request = cri::PortForwardRequest {
            pod_sandbox_id: container_id,
            port: vec![80],
        };
        table.add("port_forward", what, UNKNOWN, "", async move {
            other.port_forward(request).await
        });
    }
    for port in [0, -1, 65_536, i32::MAX] {
        let mut client = client.clone();
        let request = cri::PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![port],
        };
        table.add(
            "port_forward",
            format!("port {port}"),
            REFUSED,
            "",
            async move { client.port_forward(request).await },
        );
    }
}

/// References that are none.
const REFERENCES: &[&str] = &[
    "",
    " ",
    "host.example/UPPER",
    "a//b",
    "/leading",
    "trailing/",
    "name:",
    "name:tag:tag",
    "name:-tag",
    "name@sha256:short",
    "name@md5:d41d8cd98f00b204e9800998ecf8427e",
    "../../etc/passwd",
    "host:port/name",
    "host:99999/name",
    "http://host/name",
    "na\nme",
    "na\0me",
    "name:tag@",
];

fn cri_images(table: &mut Table, bench: &Bench) {
    let client = bench.images.clone();
    let spec = |image: &str| {
        Some(cri::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        })
    };
    for reference in REFERENCES
        .iter()
        .map(|text| (*text).to_owned())
        .chain([format!("name:{}", "t".repeat(300)), "n".repeat(5_000)])
    {
        let mut client = client.clone();
        let request = cri::PullImageRequest {
            image: spec(&reference),
            ..Default::default()
        };
        let what: String = format!("{reference:?}").chars().take(60).collect();
        table.add("pull_image", what, INVALID, "image.image", async move {
            client.pull_image(request).await
        });
    }
    let mut pull = client.clone();
    table.add(
        "pull_image",
        "no image",
        INVALID,
        "image.image",
        async move { pull.pull_image(cri::PullImageRequest::default()).await },
    );
    for (what, auth) in [
        (
            "auth that is no base64",
            cri::AuthConfig {
                auth: "%%%".to_owned(),
                ..Default::default()
            },
        ),
        (
            "auth without a colon",
            cri::AuthConfig {
                auth: "YWJj".to_owned(),
                ..Default::default()
            },
        ),
    ] {
        let mut client = client.clone();
        let request = cri::PullImageRequest {
            image: spec("127.0.0.1:1/x:1"),
            auth: Some(auth),
            ..Default::default()
        };
        table.add("pull_image", what, INVALID, "auth.auth", async move {
            client.pull_image(request).await
        });
    }
    let mut status = client.clone();
    table.add(
        "image_status",
        "no image",
        INVALID,
        "image.image",
        async move {
            status
                .image_status(cri::ImageStatusRequest::default())
                .await
        },
    );
    let mut remove = client.clone();
    table.add(
        "remove_image",
        "no image",
        INVALID,
        "image.image",
        async move {
            remove
                .remove_image(cri::RemoveImageRequest::default())
                .await
        },
    );
}

type SandboxChange = fn(&mut api::SandboxConfig);
type NativeChange = fn(&mut api::ContainerConfig);

fn native_port(config: &mut api::SandboxConfig) -> &mut api::PortMapping {
    let network = config.network.get_or_insert_default();
    network.ports = vec![api::PortMapping {
        host_port: 18080,
        container_port: 80,
        ..Default::default()
    }];
    &mut network.ports[0]
}

fn wrong_sandboxes() -> Vec<(&'static str, SandboxChange, &'static str)> {
    vec![
        ("a huge name", |c| c.name = "n".repeat(5_000), "config.name"),
        (
            "a name with a newline",
            |c| c.name = "a\nb".to_owned(),
            "config.name",
        ),
        (
            "a long hostname",
            |c| c.hostname = "h".repeat(65),
            "config.hostname",
        ),
        (
            "a hostname with a slash",
            |c| c.hostname = "a/b".to_owned(),
            "config.hostname",
        ),
        (
            "a huge label",
            |c| drop(c.labels.insert("k".to_owned(), "v".repeat(1 << 20))),
            "config.labels",
        ),
        (
            "an unknown network mode",
            |c| c.network.get_or_insert_default().mode = 9,
            "config.network.mode",
        ),
        (
            "a negative network mode",
            |c| c.network.get_or_insert_default().mode = -1,
            "config.network.mode",
        ),
        ("an unknown pid mode", |c| c.pid_mode = 9, "config.pid_mode"),
        (
            "no host port",
            |c| native_port(c).host_port = 0,
            "config.network.ports[0].host_port",
        ),
        (
            "a host port beyond ports",
            |c| native_port(c).host_port = 65_536,
            "config.network.ports[0].host_port",
        ),
        (
            "a huge container port",
            |c| native_port(c).container_port = u32::MAX,
            "config.network.ports[0].container_port",
        ),
        (
            "an unknown protocol",
            |c| native_port(c).protocol = 9,
            "config.network.ports[0].protocol",
        ),
        (
            "a host ip that is a name",
            |c| native_port(c).host_ip = "localhost".to_owned(),
            "config.network.ports[0].host_ip",
        ),
        (
            "a dns server that is a name",
            |c| c.dns.get_or_insert_default().servers = vec!["x".to_owned()],
            "config.dns.servers[0]",
        ),
        (
            "a sysctl of the host",
            |c| drop(c.sysctls.insert("vm.swappiness".to_owned(), "1".to_owned())),
            "config.sysctls[vm.swappiness]",
        ),
        (
            "a relative log directory",
            |c| c.log_directory = "logs".to_owned(),
            "config.log_directory",
        ),
        (
            "an unknown handler",
            |c| c.handler = "kata-of-mine".to_owned(),
            "config.handler",
        ),
    ]
}

fn wrong_native_containers() -> Vec<(&'static str, NativeChange, &'static str)> {
    fn native_mount(config: &mut api::ContainerConfig) -> &mut api::Mount {
        config.mounts = vec![api::Mount {
            target: "/x".to_owned(),
            source: Some(api::mount::Source::Bind(api::BindMount {
                host_path: "/tmp".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        }];
        &mut config.mounts[0]
    }
    vec![
        (
            "a name with a newline",
            |c| c.name = "a\nb".to_owned(),
            "config.name",
        ),
        ("no image", |c| c.image.clear(), "config.image"),
        (
            "a NUL in the command",
            |c| c.command = vec!["a\0".to_owned()],
            "config.command[0]",
        ),
        (
            "a variable with =",
            |c| drop(c.env.insert("A=B".to_owned(), String::new())),
            "config.env",
        ),
        (
            "a relative working directory",
            |c| c.working_dir = "srv".to_owned(),
            "config.working_dir",
        ),
        (
            "a relative target",
            |c| native_mount(c).target = "x".to_owned(),
            "config.mounts[0].target",
        ),
        (
            "a target that climbs",
            |c| native_mount(c).target = "/x/../../y".to_owned(),
            "config.mounts[0].target",
        ),
        (
            "no source",
            |c| native_mount(c).source = None,
            "config.mounts[0].source",
        ),
        (
            "a relative host path",
            |c| {
                native_mount(c).source = Some(api::mount::Source::Bind(api::BindMount {
                    host_path: "tmp".to_owned(),
                    ..Default::default()
                }))
            },
            "config.mounts[0].bind.host_path",
        ),
        (
            "an unknown propagation",
            |c| {
                native_mount(c).source = Some(api::mount::Source::Bind(api::BindMount {
                    host_path: "/tmp".to_owned(),
                    propagation: 9,
                    ..Default::default()
                }))
            },
            "config.mounts[0].bind.propagation",
        ),
        (
            "an oom score too high",
            |c| c.resources.get_or_insert_default().oom_score_adj = 1_001,
            "config.resources.oom_score_adj",
        ),
        (
            "cpus in words",
            |c| c.resources.get_or_insert_default().cpuset_cpus = "all".to_owned(),
            "config.resources.cpuset_cpus",
        ),
        (
            "an unknown seccomp mode",
            |c| {
                c.security.get_or_insert_default().seccomp = Some(api::Seccomp {
                    mode: 9,
                    ..Default::default()
                })
            },
            "config.security.seccomp.mode",
        ),
        (
            "a custom seccomp profile that is none",
            |c| {
                c.security.get_or_insert_default().seccomp = Some(api::Seccomp {
                    mode: 3,
                    ..Default::default()
                })
            },
            "config.security.seccomp.profile_json",
        ),
        (
            "an unknown rlimit",
            |c| {
                c.rlimits = vec![api::Rlimit {
                    name: "RLIMIT_LUCK".to_owned(),
                    soft: 1,
                    hard: 1,
                }]
            },
            "config.rlimits[0].name",
        ),
        (
            "a soft limit above the hard one",
            |c| {
                c.rlimits = vec![api::Rlimit {
                    name: "NOFILE".to_owned(),
                    soft: 2,
                    hard: 1,
                }]
            },
            "config.rlimits[0].soft",
        ),
        (
            "an unknown stop signal",
            |c| c.stop_signal = "SIGNOPE".to_owned(),
            "config.stop_signal",
        ),
        (
            "a negative stop timeout",
            |c| {
                c.stop_timeout = Some(prost_types::Duration {
                    seconds: -1,
                    nanos: 0,
                })
            },
            "config.stop_timeout",
        ),
    ]
}

fn native(table: &mut Table, bench: &Bench, sandbox: &str, id: &str) {
    use api::{
        CreateContainerRequest, GetContainerRequest, GetImageRequest, GetSandboxRequest,
        LogsRequest, RemoveContainerRequest, RemoveSandboxRequest, SignalContainerRequest,
        StartContainerRequest, StopContainerRequest, StopSandboxRequest, WaitContainerRequest,
    };
    let channel = bench.node.channel();
    let client = LifecycleServiceClient::new(channel.clone()).max_encoding_message_size(64 << 20);
    for (what, change, field) in wrong_sandboxes() {
        let mut config = api::SandboxConfig {
            name: "wrong".to_owned(),
            ..Default::default()
        };
        change(&mut config);
        let mut client = client.clone();
        let request = api::RunSandboxRequest {
            config: Some(config),
            ..Default::default()
        };
        table.add("run_sandbox", what, INVALID, field, async move {
            client.run_sandbox(request).await
        });
    }
    let full = CreateContainerRequest {
        sandbox_id: sandbox.to_owned(),
        config: Some(api::ContainerConfig {
            name: "wrong".to_owned(),
            image: bench.toolbox.clone(),
            command: vec!["true".to_owned()],
            ..Default::default()
        }),
        ..Default::default()
    };
    for (what, change, field) in wrong_native_containers() {
        let mut request = full.clone();
        change(request.config.get_or_insert_default());
        let mut client = client.clone();
        table.add(
            "native create_container",
            what,
            INVALID,
            field,
            async move { client.create_container(request).await },
        );
    }
    for (what, request, field) in [
        (
            "no config",
            CreateContainerRequest {
                config: None,
                ..full.clone()
            },
            "config",
        ),
        (
            "a huge idempotency key",
            CreateContainerRequest {
                idempotency_key: "k".repeat(129),
                ..full.clone()
            },
            "idempotency_key",
        ),
    ] {
        let mut client = client.clone();
        table.add(
            "native create_container",
            what,
            INVALID,
            field,
            async move { client.create_container(request).await },
        );
    }
    ids!(
        table,
        client,
        create_container,
        CreateContainerRequest,
        sandbox_id,
        full.clone()
    );
    ids!(
        table,
        client,
        start_container,
        StartContainerRequest,
        container_id,
        Default::default()
    );
    ids!(
        table,
        client,
        get_container,
        GetContainerRequest,
        container_id,
        Default::default()
    );
    ids!(
        table,
        client,
        wait_container,
        WaitContainerRequest,
        container_id,
        Default::default()
    );
    ids!(
        table,
        client,
        get_sandbox,
        GetSandboxRequest,
        sandbox_id,
        Default::default()
    );
    ids!(
        table,
        client,
        logs,
        LogsRequest,
        container_id,
        Default::default()
    );
    ids!(
        table,
        client,
        signal_container,
        SignalContainerRequest,
        container_id,
        SignalContainerRequest {
            signal: "TERM".to_owned(),
            ..Default::default()
        }
    );
    lenient_ids!(
        table,
        client,
        stop_container,
        StopContainerRequest,
        container_id,
        Default::default()
    );
    lenient_ids!(
        table,
        client,
        remove_container,
        RemoveContainerRequest,
        container_id,
        Default::default()
    );
    lenient_ids!(
        table,
        client,
        stop_sandbox,
        StopSandboxRequest,
        sandbox_id,
        Default::default()
    );
    lenient_ids!(
        table,
        client,
        remove_sandbox,
        RemoveSandboxRequest,
        sandbox_id,
        Default::default()
    );
    for signal in ["", "NOPE", "SIGSIG", "-9", "999", "TERM\n"] {
        let mut client = client.clone();
        let request = SignalContainerRequest {
            container_id: id.to_owned(),
            signal: signal.to_owned(),
            ..Default::default()
        };
        table.add(
            "signal_container",
            format!("{signal:?}"),
            INVALID,
            "signal",
            async move { client.signal_container(request).await },
        );
    }
    for (what, timeout) in [
        (
            "a negative timeout",
            prost_types::Duration {
                seconds: -1,
                nanos: 0,
            },
        ),
        (
            "negative nanoseconds",
            prost_types::Duration {
                seconds: 0,
                nanos: -1,
            },
        ),
    ] {
        let mut client = client.clone();
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: Some(timeout),
            ..Default::default()
        };
        table.add(
            "native stop_container",
            what,
            INVALID,
            "timeout",
            async move { client.stop_container(request).await },
        );
    }
    let mut exec = |what: &str,
                    codes: &'static [Code],
                    field: &str,
                    messages: Vec<api::exec_request::Frame>| {
        let mut client = client.clone();
        let messages: Vec<_> = messages
            .into_iter()
            .map(|message| api::ExecRequest {
                frame: Some(message),
            })
            .collect();
        table.add("native exec", what, codes, field, async move {
            let mut stream = client
                .exec(Request::new(tokio_stream::iter(messages)))
                .await?
                .into_inner();
            while stream.message().await?.is_some() {}
            Ok(Response::new(()))
        });
    };
    use api::exec_request::Frame;
    let start = api::ExecStart {
        container_id: id.to_owned(),
        command: vec!["true".to_owned()],
        ..Default::default()
    };
    exec("nothing at all", INVALID, "", vec![]);
    exec(
        "stdin before the start",
        INVALID,
        "",
        vec![Frame::Stdin(b"x".to_vec().into())],
    );
    exec(
        "no command",
        INVALID,
        "start.command",
        vec![Frame::Start(api::ExecStart {
            command: Vec::new(),
            ..start.clone()
        })],
    );
    exec(
        "no container",
        INVALID,
        "start.container_id",
        vec![Frame::Start(api::ExecStart {
            container_id: String::new(),
            ..start.clone()
        })],
    );
    exec(
        "an unknown container",
        UNKNOWN,
        "",
        vec![Frame::Start(api::ExecStart {
            container_id: "0".repeat(64),
            ..start.clone()
        })],
    );
    exec(
        "a relative directory",
        INVALID,
        "start.working_dir",
        vec![Frame::Start(api::ExecStart {
            working_dir: "x".to_owned(),
            ..start.clone()
        })],
    );
    exec(
        "a negative timeout",
        INVALID,
        "start.timeout",
        vec![Frame::Start(api::ExecStart {
            timeout: Some(prost_types::Duration {
                seconds: -1,
                nanos: 0,
            }),
            ..start
        })],
    );
    let images = ImageServiceClient::new(channel.clone());
    for reference in REFERENCES {
        let mut images = images.clone();
        let request = api::PullImageRequest {
            reference: (*reference).to_owned(),
            ..Default::default()
        };
        table.add(
            "native pull_image",
            format!("{reference:?}"),
            INVALID,
            "reference",
            async move {
                let mut stream = images.pull_image(request).await?.into_inner();
                while stream.message().await?.is_some() {}
                Ok(Response::new(()))
            },
        );
    }
    for (what, image, codes, field) in [
        ("no image", "", INVALID, "image"),
        ("an unknown image", "not/here:1", UNKNOWN, ""),
    ] {
        let mut images = images.clone();
        let request = GetImageRequest {
            image: image.to_owned(),
            ..Default::default()
        };
        table.add("get_image", what, codes, field, async move {
            images.get_image(request).await
        });
    }
    for tag in ["", "UPPER", "a@sha256:00", "a//b"] {
        let mut images = images.clone();
        let request = api::TagImageRequest {
            image: bench.toolbox.clone(),
            tag: tag.to_owned(),
            ..Default::default()
        };
        table.add(
            "tag_image",
            format!("{tag:?}"),
            INVALID,
            "tag",
            async move { images.tag_image(request).await },
        );
    }
    let mut pages = client.clone();
    table.add(
        "list_sandboxes",
        "a page token of its own making",
        INVALID,
        "page_token",
        async move {
            pages
                .list_sandboxes(api::ListSandboxesRequest {
                    page_token: "\u{1}not one".to_owned(),
                    ..Default::default()
                })
                .await
        },
    );
    let mut pages = client.clone();
    table.add(
        "list_containers",
        "an unknown state",
        INVALID,
        "state",
        async move {
            pages
                .list_containers(api::ListContainersRequest {
                    state: 99,
                    ..Default::default()
                })
                .await
        },
    );
    let mut networks = NetworkServiceClient::new(channel.clone());
    table.add(
        "get_network",
        "an unknown network",
        UNKNOWN,
        "",
        async move {
            networks
                .get_network(api::GetNetworkRequest {
                    name: "no-such".to_owned(),
                })
                .await
        },
    );
    for wanted in ["no-such", "../x"] {
        let mut operations = OperationServiceClient::new(channel.clone());
        table.add("get_operation", wanted, UNKNOWN, "", async move {
            operations
                .get_operation(api::GetOperationRequest {
                    operation_id: wanted.to_owned(),
                })
                .await
        });
    }
    let mut events = EventServiceClient::new(channel);
    table.add(
        "watch",
        "an unknown kind",
        INVALID,
        "kinds[0]",
        async move {
            let request = api::WatchRequest {
                kinds: vec![99],
                past_only: true,
                ..Default::default()
            };
            let mut stream = events.watch(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok(Response::new(()))
        },
    );
}

/// The last event, the ids of everything, and what the kernel holds.
async fn state(bench: &mut Bench) -> Result<(Option<api::Cursor>, Vec<String>)> {
    let mut events = EventServiceClient::new(bench.node.channel());
    let request = api::WatchRequest {
        cursor: Some(api::Cursor::default()),
        past_only: true,
        ..Default::default()
    };
    let mut stream = events.watch(request).await?.into_inner();
    let mut last = None;
    while let Some(response) = stream.message().await? {
        last = response.event.and_then(|event| event.cursor).or(last);
    }
    let mut ids = Vec::new();
    let mut lifecycle = LifecycleServiceClient::new(bench.node.channel());
    let sandboxes = lifecycle
        .list_sandboxes(api::ListSandboxesRequest {
            page_size: 1000,
            ..Default::default()
        })
        .await?;
    ids.extend(
        sandboxes
            .into_inner()
            .sandboxes
            .into_iter()
            .map(|sandbox| sandbox.id),
    );
    let containers = lifecycle
        .list_containers(api::ListContainersRequest {
            page_size: 1000,
            ..Default::default()
        })
        .await?;
    ids.extend(
        containers
            .into_inner()
            .containers
            .into_iter()
            .map(|container| container.id),
    );
    let images = bench
        .images
        .list_images(cri::ListImagesRequest::default())
        .await?;
    ids.extend(images.into_inner().images.into_iter().map(|image| image.id));
    ids.sort();
    Ok((last, ids))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_requests_are_refused_by_field_and_change_nothing() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod_ = bench.run(pod("victim")).await?;
    let id = bench
        .launch(&pod_, container("main", &toolbox, &["sleep", "10000"]))
        .await?;
    let request = api::RunSandboxRequest {
        config: Some(api::SandboxConfig {
            name: "native-victim".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut lifecycle = LifecycleServiceClient::new(bench.node.channel());
    let sandbox = lifecycle
        .run_sandbox(request)
        .await?
        .into_inner()
        .sandbox
        .context("a sandbox")?
        .id;
    let empty = bench.node.log_dir();
    bench.node.mark_clean()?;
    let before = state(&mut bench).await?;

    let mut table = Table::default();
    cri_runtime(&mut table, &bench, &pod_, &id);
    cri_images(&mut table, &bench);
    native(&mut table, &bench, &sandbox, &id);
    let count = table.cases.len();
    assert!(count > 300, "only {count} wrong requests");
    let mut wrong = Vec::new();
    for case in table.cases {
        let label = format!("{}, {}", case.rpc, case.what);
        let status =
            match tokio::time::timeout(longshore_tests::pods::WAIT_LIMIT, case.answer).await {
                Err(_) => {
                    wrong.push(format!("{label}: no answer"));
                    continue;
                }
                Ok(Ok(())) => {
                    wrong.push(format!("{label}: accepted"));
                    continue;
                }
                Ok(Err(status)) => status,
            };
        // What clients in Go compare: where the details name another code, the answer is Internal.
        if !status.details().is_empty() {
            let told = tonic_types::Status::decode(status.details())?;
            let named = (Code::from(told.code), told.message.as_str());
            if named != (status.code(), status.message()) {
                wrong.push(format!("{label}: {status:?}, and {named:?} in its details"));
            }
        }
        if !case.codes.contains(&status.code()) {
            wrong.push(format!(
                "{label}: {:?} {}",
                status.code(),
                status.message().chars().take(200).collect::<String>()
            ));
            continue;
        }
        let named: Vec<_> = status
            .get_details_bad_request()
            .map(|details| {
                details
                    .field_violations
                    .into_iter()
                    .map(|violation| violation.field)
                    .collect()
            })
            .unwrap_or_default();
        if !case.field.is_empty() && !named.contains(&case.field) {
            wrong.push(format!(
                "{label}: names {named:?} instead of {}: {}",
                case.field,
                status.message()
            ));
        }
        if status.message().len() > 2_000 {
            wrong.push(format!(
                "{label}: a message of {} bytes",
                status.message().len()
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {count} are not refused as they should be:\n  {}",
        wrong.len(),
        wrong.join("\n  ")
    );

    assert_eq!(state(&mut bench).await?, before);
    bench.node.expect_clean()?;
    bench.node.fsck_clean().await?;
    assert!(empty.is_dir());
    assert_eq!(bench.exec_ok(&id, "echo untouched").await?, "untouched\n");
    let request = api::RemoveSandboxRequest {
        sandbox_id: sandbox,
        force: true,
        ..Default::default()
    };
    lifecycle.remove_sandbox(request).await?;
    bench.remove(&pod_).await?;
    // The baseline had both pods in it.
    bench.node.mark_clean()?;
    bench.finish().await
}
