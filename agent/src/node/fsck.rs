//! Store against host, both ways: what is there and nobody knows of, and what is known and gone.
//!
//! Safe while pods run: what an operation under way holds is not looked at, and only what bears
//! this instance or lies in its directories is touched.

use std::{collections::HashSet, fs, path::Path, sync::Arc};

use crate::{
    agent::Agent,
    blocking,
    handler::Handler as _,
    id::{ContainerId, Face, SandboxId},
    lifecycle::{container::Container, sandbox::Sandbox},
    rootfs::Layer,
    store::Snapshot,
};

/// In which way store and host disagree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// It is there, and no record knows of it.
    Leftover,
    /// A record knows of it, and it is not there.
    Missing,
}

/// One disagreement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// In which way.
    pub kind: DifferenceKind,
    /// What sort of thing, as `cgroup` or `layer`.
    pub subject_type: &'static str,
    /// Which one.
    pub subject: String,
    /// How this comes about.
    pub cause: &'static str,
    /// What a repair does; empty if a person is needed.
    pub repair: &'static str,
    /// How the repair went, if one was asked for.
    pub repaired: Option<Result<(), String>>,
}

impl Difference {
    fn leftover(
        subject_type: &'static str,
        subject: impl ToString,
        cause: &'static str,
        repair: &'static str,
    ) -> Self {
        Self {
            kind: DifferenceKind::Leftover,
            subject_type,
            subject: subject.to_string(),
            cause,
            repair,
            repaired: None,
        }
    }

    fn missing(
        subject_type: &'static str,
        subject: impl ToString,
        cause: &'static str,
        repair: &'static str,
    ) -> Self {
        Self {
            kind: DifferenceKind::Missing,
            ..Self::leftover(subject_type, subject, cause, repair)
        }
    }
}

const CRASHED: &str = "left by an agent that ended in the middle of an operation, or made by hand";

/// Compares, and repairs if asked.
pub async fn run(agent: &Arc<Agent>, repair: bool) -> Vec<Difference> {
    let mut differences = Vec::new();
    // Between reading the host and the store an operation may end: only what differs both before
    // and after it does.
    let busy = busy(agent);
    let known = Known::new(&agent.store.snapshot(), busy);
    cgroups(agent, &known, repair, &mut differences).await;
    sandbox_dirs(agent, &known, repair, &mut differences).await;
    links(agent, &known, &mut differences).await;
    layers(agent, &known, repair, &mut differences).await;
    sandboxes(agent, &known, repair, &mut differences).await;
    differences
}

/// Sandboxes and containers that the store knows, or that an operation is making or removing.
struct Known {
    sandboxes: HashSet<SandboxId>,
    containers: HashSet<ContainerId>,
    ready: Vec<Arc<Sandbox>>,
    layer_dirs: HashSet<u32>,
    busy: bool,
}

impl Known {
    fn new(at: &Snapshot, busy: bool) -> Self {
        let mut sandboxes: HashSet<_> = at
            .all::<Sandbox>()
            .map(|sandbox| sandbox.id.clone())
            .collect();
        let mut containers: HashSet<_> = at
            .all::<Container>()
            .map(|container| container.id.clone())
            .collect();
        // Claims name what is being made.
        for (_, holder) in at.claims("") {
            match holder.split_once('/') {
                Some(("sandbox", id)) => sandboxes.extend(id.parse::<SandboxId>()),
                Some(("container", id)) => containers.extend(id.parse::<ContainerId>()),
                _ => {}
            }
        }
        Self {
            sandboxes,
            containers,
            ready: at
                .all::<Sandbox>()
                .filter(|sandbox| sandbox.is_ready())
                .collect(),
            layer_dirs: at.all::<Layer>().map(|layer| layer.dir).collect(),
            busy,
        }
    }
}

/// Something is being unpacked, so an unknown layer may become known.
fn busy(agent: &Agent) -> bool {
    !agent.images.running_pulls().is_empty()
}

async fn cgroups(agent: &Arc<Agent>, known: &Known, repair: bool, found: &mut Vec<Difference>) {
    let cgroups = Arc::clone(&agent.cgroups);
    let Ok(present) = blocking::run("list cgroups", move || cgroups.inventory()).await else {
        return;
    };
    for path in present {
        let name = path.as_str().rsplit('/').next().unwrap_or_default();
        let is_known = name
            .parse::<SandboxId>()
            .is_ok_and(|id| known.sandboxes.contains(&id))
            || name
                .parse::<ContainerId>()
                .is_ok_and(|id| known.containers.contains(&id));
        if is_known {
            continue;
        }
        let mut difference = Difference::leftover(
            "cgroup",
            path.as_str(),
            CRASHED,
            "kill what is in it and remove it",
        );
        if repair {
            let cgroups = Arc::clone(&agent.cgroups);
            let removed = blocking::run("remove cgroup", move || cgroups.remove(&path)).await;
            difference.repaired = Some(removed.map_err(|error| error.to_string()));
        }
        found.push(difference);
    }
}

async fn sandbox_dirs(
    agent: &Arc<Agent>,
    known: &Known,
    repair: bool,
    found: &mut Vec<Difference>,
) {
    let dir = agent.lifecycle.sandboxes_dir.clone();
    for name in names(&dir) {
        let id = name.parse::<SandboxId>();
        if id.as_ref().is_ok_and(|id| known.sandboxes.contains(id)) {
            continue;
        }
        let path = dir.join(&name);
        let mut difference = Difference::leftover(
            "sandbox directory",
            path.display(),
            CRASHED,
            "end its shim, release its namespaces and remove it",
        );
        if let (true, Ok(id)) = (repair, id) {
            difference.repaired = Some(
                agent
                    .lifecycle
                    .remove_leftover(&id)
                    .await
                    .map_err(|error| error.to_string()),
            );
        }
        found.push(difference);
    }
}

async fn links(agent: &Arc<Agent>, known: &Known, found: &mut Vec<Difference>) {
    let Ok(present) = agent.networks.inventory().await else {
        return;
    };
    for (sandbox, link) in present.links {
        if !known.sandboxes.contains(&sandbox) {
            found.push(Difference::leftover(
                "link",
                link,
                CRASHED,
                "removed with its sandbox's directory, or at the next start of the agent",
            ));
        }
    }
    for port in present.ports {
        if !known.sandboxes.contains(&port.sandbox) {
            found.push(Difference::leftover(
                "host port",
                format!("{port:?}"),
                CRASHED,
                "removed with its sandbox's directory, or at the next start of the agent",
            ));
        }
    }
}

async fn layers(agent: &Arc<Agent>, known: &Known, repair: bool, found: &mut Vec<Difference>) {
    let rootfs = agent.rootfs.clone();
    let Ok(present) = blocking::run("list layers", move || rootfs.inventory()).await else {
        return;
    };
    let there: HashSet<u32> = present.layers.iter().copied().collect();
    for dir in present.layers {
        if known.busy || known.layer_dirs.contains(&dir) {
            continue;
        }
        let mut difference = Difference::leftover(
            "layer",
            dir,
            "a pull ended before its image was committed",
            "remove it",
        );
        if repair {
            let rootfs = agent.rootfs.clone();
            let removed =
                blocking::run_bulk("remove layer", move || rootfs.remove_layer(dir)).await;
            difference.repaired = Some(removed.map_err(|error| error.to_string()));
        }
        found.push(difference);
    }
    for dir in known.layer_dirs.difference(&there) {
        found.push(Difference::missing("layer", dir, "removed by hand", ""));
    }
    for id in present.writables {
        if known.containers.contains(&id) {
            continue;
        }
        let mut difference = Difference::leftover("writable layer", &id, CRASHED, "remove it");
        if repair {
            let rootfs = agent.rootfs.clone();
            let removed =
                blocking::run_bulk("remove writable layer", move || rootfs.remove_writable(&id))
                    .await;
            difference.repaired = Some(removed.map_err(|error| error.to_string()));
        }
        found.push(difference);
    }
    for path in present.strange {
        found.push(Difference::leftover(
            "file",
            path.display(),
            "made by hand",
            "",
        ));
    }
}

/// Ready sandboxes must have a shim and namespaces.
async fn sandboxes(agent: &Arc<Agent>, known: &Known, repair: bool, found: &mut Vec<Difference>) {
    let shims: HashSet<SandboxId> = agent
        .handler
        .inventory(&agent.lifecycle.sandboxes_dir)
        .await
        .into_iter()
        .map(|(sandbox, _)| sandbox)
        .collect();
    for sandbox in &known.ready {
        if shims.contains(&sandbox.id) {
            continue;
        }
        let still_ready = agent
            .store
            .snapshot()
            .get::<Sandbox>(sandbox.id.as_str())
            .is_some_and(|sandbox| sandbox.is_ready());
        if !still_ready {
            continue;
        }
        let mut difference = Difference::missing(
            "shim",
            &sandbox.id,
            "its process was killed",
            "stop the sandbox",
        );
        if repair {
            let stopped = agent
                .lifecycle
                .stop_pod_sandbox(
                    Face::Native,
                    sandbox.id.as_str(),
                    Some(std::time::Duration::ZERO),
                )
                .await;
            difference.repaired = Some(stopped.map_err(|error| error.to_string()));
        }
        found.push(difference);
    }
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
