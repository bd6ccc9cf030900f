//! Fits an OCI specification to a runtime's command line. Pure.
//!
//! The specification stays as it is, but for what the shim does by itself: the root is put together
//! where the runtime finds it, limits are set on the cgroup already, namespaces of the pod have a
//! path. What spreads mounts to the host is taken from where the shim has put it, and so is all that
//! a pod with a user namespace has of the host: the shim maps its owners, and no path to it must be
//! open to the pod's root.

use std::path::Path;

use longshore_shim::wire;
use oci_spec::runtime::{
    Capabilities, Linux, LinuxCapabilities, LinuxNamespace, LinuxNamespaceType, LinuxResources,
    Mount, Process, Spec,
};
use serde::Deserialize;

use super::{
    HandlerError, PidMode, RootInput,
    lower::{self, bad, unsupported},
    runtimes::Features,
};

/// What every runtime of version 1 accepts: some compare more of it than the first number.
const VERSION: &str = "1.0.2";

/// Most characters of what a runtime says that an error repeats.
const SAID_CHARS: usize = 1000;

/// What a bundle is made from.
pub(super) struct Input<'a> {
    pub(super) spec: &'a Spec,
    pub(super) env: Option<Vec<Vec<u8>>>,
    pub(super) root: &'a RootInput,
    pub(super) pid: &'a PidMode,
    pub(super) features: Features,
    /// Capabilities that this agent holds.
    pub(super) held: u64,
    pub(super) cgroup: wire::CgroupPlan,
    pub(super) log: Option<wire::Log>,
    pub(super) stdin: bool,
    pub(super) stdin_once: bool,
}

/// A container, for the shim to have built.
#[derive(Debug)]
pub(super) struct Lowered {
    pub(super) plan: wire::ContainerPlan,
    pub(super) dir: String,
    pub(super) config: Vec<u8>,
    pub(super) staged: Vec<wire::Staged>,
}

/// Lowers a container.
pub(super) fn container(input: Input<'_>) -> Result<Lowered, HandlerError> {
    let mut spec = input.spec.clone();
    let linux = spec.linux().clone().unwrap_or_default();
    refuse_unsupported(&spec, &linux, input.features)?;
    let rootfs = lower::rootfs(input.root)?;
    let dir = input
        .root
        .mount_point
        .parent()
        .ok_or_else(|| bad("root", "has no directory of its own"))?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| bad("process", "is missing"))?;
    let plan = wire::ContainerPlan {
        cgroup: input.cgroup,
        namespaces: lower::namespaces(namespaces, input.pid)?,
        user_namespace: lower::user_namespace(&linux)?,
        rootfs,
        process: process_plan(process),
        stdin: input.stdin,
        stdin_once: input.stdin_once,
        log: input.log,
        ..wire::ContainerPlan::default()
    };
    let mut staged = Vec::new();
    let mounts = spec.mounts().clone().unwrap_or_default();
    let mounts = mounts
        .into_iter()
        .map(|mount| stage(mount, plan.user_namespace.as_ref(), dir, &mut staged))
        .collect::<Result<Vec<_>, _>>()?;
    let process = fitted_process(process, input.env, input.held)?;
    if let Some(root) = spec.root_mut() {
        root.set_path(input.root.mount_point.clone());
    }
    let has_new_uts = namespaces
        .iter()
        .any(|one| one.typ() == LinuxNamespaceType::Uts && one.path().is_none());
    if !has_new_uts {
        // A name given here would be set in the pod's namespace, or be refused without one.
        spec.set_hostname(None);
    }
    let linux = fitted(linux, input.pid, dir);
    spec.set_version(VERSION.to_owned())
        .set_mounts(Some(mounts))
        .set_process(Some(process))
        .set_linux(Some(linux));
    Ok(Lowered {
        plan,
        dir: lower::text("root", dir)?,
        config: json(&spec),
        staged,
    })
}

/// Lowers an exec.
pub(super) fn process(
    process: &Process,
    env: Option<Vec<Vec<u8>>>,
    held: u64,
) -> Result<(wire::ProcessPlan, Vec<u8>), HandlerError> {
    let process = fitted_process(process, env, held)?;
    Ok((process_plan(&process), json(&process)))
}

/// What to make of a runtime's failure.
pub(super) fn failure(failure: &wire::OciFailure) -> HandlerError {
    let said = logged(&failure.log)
        .unwrap_or_else(|| String::from_utf8_lossy(&failure.stderr).trim().to_owned());
    let message = match (said.as_str(), failure.overdue) {
        ("", _) | (_, true) => failure.end.clone(),
        (said, false) => said.chars().take(SAID_CHARS).collect(),
    };
    HandlerError::Runtime {
        command: failure.command.clone(),
        blame: blame(&message),
        message,
    }
}

/// What is to blame, as far as the words of runtimes tell: the command itself, or something else.
fn blame(message: &str) -> super::Blame {
    let message = message.to_lowercase();
    let has = |part: &str| message.contains(part);
    let about_command = has("executable file") || has("exec: \"") || has("open executable");
    if about_command && (has("not found") || has("no such file")) {
        super::Blame::CommandNotFound
    } else if about_command
        && (has("permission denied") || has("is a directory") || has("operation not permitted"))
    {
        super::Blame::CommandNotExecutable
    } else {
        super::Blame::Other
    }
}

/// The last error among JSON lines.
fn logged(lines: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        #[serde(default)]
        level: String,
        msg: String,
    }
    lines
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Line>(line).ok())
        .filter(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic" | "ERROR"))
        .map(|line| line.msg.trim().to_owned())
        .rfind(|said| !said.is_empty())
}

/// What of a process is the shim's matter.
fn process_plan(process: &Process) -> wire::ProcessPlan {
    wire::ProcessPlan {
        terminal: process.terminal().unwrap_or(false),
        uid: process.user().uid(),
        gid: process.user().gid(),
        ..wire::ProcessPlan::default()
    }
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("a specification has string keys")
}

fn fitted_process(
    process: &Process,
    env: Option<Vec<Vec<u8>>>,
    held: u64,
) -> Result<Process, HandlerError> {
    let mut process = process.clone();
    if let Some(sets) = process.capabilities() {
        let sets = confined(sets, held);
        process.set_capabilities(Some(sets));
    }
    if let Some(env) = env {
        let env = env
            .into_iter()
            .map(|variable| {
                String::from_utf8(variable)
                    .map_err(|_| bad("process.env", "is not UTF-8, which this handler needs"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        process.set_env(Some(env));
    }
    Ok(process)
}

/// What of the wish we hold ourselves, as the engine does it: nobody can give more, and runtimes
/// fail at it.
fn confined(wish: &LinuxCapabilities, held: u64) -> LinuxCapabilities {
    let confine = |set: &Option<Capabilities>| {
        set.as_ref().map(|set| {
            set.iter()
                .copied()
                .filter(|one| held & 1 << lower::number(*one) != 0)
                .collect::<Capabilities>()
        })
    };
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(confine(wish.bounding()))
        .set_permitted(confine(wish.permitted()))
        .set_effective(confine(wish.effective()))
        .set_inheritable(confine(wish.inheritable()))
        .set_ambient(confine(wish.ambient()));
    sets
}

/// Names the command that a failure is to be blamed on, where the runtime does not.
pub(super) fn with_command(error: HandlerError, process: Option<&Process>) -> HandlerError {
    let name = process
        .and_then(|process| process.args().as_ref()?.first())
        .filter(|name| !name.is_empty());
    match (error, name) {
        (
            HandlerError::Runtime {
                command,
                message,
                blame,
            },
            Some(name),
        ) if blame != super::Blame::Other && !message.contains(name.as_str()) => {
            HandlerError::Runtime {
                command,
                message: format!("{message}: {name}"),
                blame,
            }
        }
        (error, _) => error,
    }
}

fn refuse_unsupported(spec: &Spec, linux: &Linux, features: Features) -> Result<(), HandlerError> {
    let has_poststop = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststop().as_ref())
        .is_some_and(|hooks| !hooks.is_empty());
    let has = |kind| {
        linux
            .namespaces()
            .iter()
            .flatten()
            .any(|one| one.typ() == kind)
    };
    let has_recursive_readonly = spec
        .mounts()
        .iter()
        .flatten()
        .flat_map(|mount| mount.options().iter().flatten())
        .any(|option| option == "rro");
    for (is_set, feature) in [
        // A container may go without its runtime being asked.
        (has_poststop, "hooks.poststop"),
        (
            has(LinuxNamespaceType::User) && !features.user_namespaces,
            "user namespaces",
        ),
        (has(LinuxNamespaceType::Time), "time namespaces"),
        (
            has_recursive_readonly && !features.recursive_readonly,
            "recursive read-only mounts",
        ),
        (linux.intel_rdt().is_some(), "linux.intelRdt"),
    ] {
        if is_set {
            return Err(unsupported(feature));
        }
    }
    Ok(())
}

fn fitted(mut linux: Linux, pid: &PidMode, dir: &Path) -> Linux {
    let mut namespaces: Vec<LinuxNamespace> = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|one| one.typ() != LinuxNamespaceType::Pid);
    let path = match pid {
        PidMode::New => Some(None),
        PidMode::Host => None,
        PidMode::Pod | PidMode::Container(_) => Some(Some(dir.join("pidns"))),
    };
    namespaces.extend(path.map(|path| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(LinuxNamespaceType::Pid).set_path(path);
        namespace
    }));
    // Set already, where they also count for what the runtime does not know.
    let mut resources = LinuxResources::default();
    let devices = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().clone());
    resources.set_devices(devices);
    linux
        .set_namespaces(Some(namespaces))
        .set_resources(Some(resources));
    linux
}

/// A source that spreads to the host is cloned by the shim while that is possible, and what a user
/// namespace has of the host is put together with the host's rights.
fn stage(
    mut mount: Mount,
    user: Option<&wire::UserNamespace>,
    dir: &Path,
    staged: &mut Vec<wire::Staged>,
) -> Result<Mount, HandlerError> {
    let mut options = mount.options().clone().unwrap_or_default();
    let has = |name: &str| options.iter().any(|option| option == name);
    let is_bind = has("bind") || has("rbind");
    let is_overlay = mount.typ().as_deref() == Some("overlay");
    let spreads = has("shared") || has("rshared");
    if !(is_bind && spreads || user.is_some() && (is_bind || is_overlay)) {
        return Ok(mount);
    }
    let name = staged.len().to_string();
    staged.push(wire::Staged {
        mount: lower::mount(&mount, user)?,
        name: name.clone(),
    });
    if is_overlay {
        options.retain(|option| !option.starts_with("lowerdir="));
        options.push("bind".to_owned());
    }
    mount
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(dir.join("mounts").join(name)))
        .set_options(Some(options))
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    Ok(mount)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn root() -> RootInput {
        RootInput {
            mount_point: "/run/x/c/rootfs".into(),
            layers_dir: "/data/layers".into(),
            lower: vec!["1".to_owned()],
            upper: "/data/upper".into(),
            work: "/data/work".into(),
            durable: false,
        }
    }

    fn lowered(spec: Value, pid: &PidMode) -> Result<(Lowered, Value), HandlerError> {
        let spec: Spec = serde_json::from_value(spec).expect("the test writes valid OCI JSON");
        let lowered = container(Input {
            spec: &spec,
            env: None,
            root: &root(),
            pid,
            features: Features::default(),
            held: 1,
            cgroup: wire::CgroupPlan::default(),
            log: None,
            stdin: false,
            stdin_once: false,
        })?;
        let config = serde_json::from_slice(&lowered.config).expect("is JSON");
        Ok((lowered, config))
    }

    fn spec() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "hostname": "pod",
            "root": {"path": "rootfs", "readonly": true},
            "process": {"terminal": true, "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/",
                "capabilities": {"effective": ["CAP_CHOWN", "CAP_KILL"]}},
            "mounts": [
                {"destination": "/a", "type": "bind", "source": "/s", "options": ["rbind", "rshared"]},
                {"destination": "/b", "type": "bind", "source": "/s", "options": ["rbind", "rslave"]},
            ],
            "linux": {
                "cgroupsPath": "/longshore-1/s/c",
                "namespaces": [
                    {"type": "mount"},
                    {"type": "uts", "path": "/run/x/ns/uts"},
                    {"type": "pid"},
                ],
                "resources": {
                    "memory": {"limit": 1000},
                    "devices": [{"allow": false, "access": "rwm"}],
                },
            },
        })
    }

    #[test]
    fn a_container_keeps_its_specification_but_for_what_the_shim_does() {
        let (lowered, config) = lowered(spec(), &PidMode::New).expect("lowers");
        assert_eq!(lowered.dir, "/run/x/c");
        assert!(lowered.plan.process.terminal);
        assert_eq!(
            config["root"],
            json!({"path": "/run/x/c/rootfs", "readonly": true})
        );
        assert_eq!(config["hostname"], Value::Null);
        assert_eq!(config["ociVersion"], "1.0.2");
        let sets = &config["process"]["capabilities"];
        assert_eq!(sets["effective"], json!(["CAP_CHOWN"]), "what is held");
        assert_eq!(config["linux"]["cgroupsPath"], "/longshore-1/s/c");
        assert_eq!(
            config["linux"]["resources"],
            json!({"devices": [{"allow": false, "access": "rwm"}]})
        );
        assert_eq!(config["mounts"][0]["source"], "/run/x/c/mounts/0");
        assert_eq!(config["mounts"][1]["source"], "/s");
        let [staged] = &lowered.staged[..] else {
            panic!("{:?}", lowered.staged);
        };
        assert_eq!((&*staged.mount.source, &*staged.name), ("/s", "0"));
        assert!(staged.mount.recursive);
    }

    #[test]
    fn pid_namespaces_are_new_a_path_or_none() {
        let target = crate::id::ContainerId::random();
        let path = json!({"type": "pid", "path": "/run/x/c/pidns"});
        for (mode, expected) in [
            (PidMode::New, Some(json!({"type": "pid"}))),
            (PidMode::Host, None),
            (PidMode::Pod, Some(path.clone())),
            (PidMode::Container(target), Some(path)),
        ] {
            let (_, config) = lowered(spec(), &mode).expect("lowers");
            let namespaces = config["linux"]["namespaces"].as_array().expect("a list");
            let pid = namespaces.iter().find(|one| one["type"] == "pid");
            assert_eq!(pid, expected.as_ref(), "{mode:?}");
        }
    }

    #[test]
    fn what_this_handler_cannot_is_refused() {
        for change in [
            json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "user"}]}}),
            json!({"hooks": {"poststop": [{"path": "/bin/true"}]}}),
            json!({"mounts": [{"destination": "/a", "source": "/s", "options": ["bind", "rro"]}]}),
        ] {
            let mut spec = spec();
            for (key, value) in change.as_object().expect("an object") {
                spec[key] = value.clone();
            }
            let error = lowered(spec, &PidMode::New).expect_err("refused");
            assert!(matches!(error, HandlerError::Unsupported { .. }), "{error}");
        }
    }

    #[test]
    fn environment_must_be_text() {
        let one: Process = serde_json::from_value(
            json!({"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"}),
        )
        .expect("valid");
        let (_, json) = process(&one, Some(vec![b"A=b".to_vec()]), 0).expect("is text");
        let json: Value = serde_json::from_slice(&json).expect("is JSON");
        assert_eq!(json["env"], json!(["A=b"]));
        let refused = process(&one, Some(vec![b"A=\xff".to_vec()]), 0);
        assert!(matches!(refused, Err(HandlerError::BadSpec { .. })));
    }

    #[test]
    fn a_failure_says_what_the_runtime_said() {
        use super::super::Blame;
        let log = br#"{"level":"warning","msg":"w"}
{"level":"error","msg":"runc create failed: exec: \"x\": executable file not found in $PATH"}
not json"#;
        for (log, stderr, overdue, expected, expected_blame) in [
            (
                &log[..],
                "",
                false,
                "runc create failed: exec: \"x\": executable file not found in $PATH",
                Blame::CommandNotFound,
            ),
            (b"", " words\n", false, "words", Blame::Other),
            (b"", "", false, "exit code 1", Blame::Other),
            (&log[..], "words", true, "exit code 1", Blame::Other),
            (
                br#"{"msg":"open executable: Permission denied","level":"error"}"#,
                "",
                false,
                "open executable: Permission denied",
                Blame::CommandNotExecutable,
            ),
        ] {
            let failed = failure(&wire::OciFailure {
                command: "runc create".to_owned(),
                end: "exit code 1".to_owned(),
                log: log.to_vec(),
                stderr: stderr.as_bytes().to_vec(),
                overdue,
            });
            match failed {
                HandlerError::Runtime { message, blame, .. } => {
                    assert_eq!((message.as_str(), blame), (expected, expected_blame));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
