//! Store against host, both ways: what is there and nobody knows of, and what is known and gone.
//!
//! Safe while pods run: what an operation under way holds is not looked at, and only what bears
//! this instance or lies in its directories is touched.

use std::{collections::HashSet, fs, path::Path, sync::Arc, time::Duration};

use crate::{
    agent::Agent,
    blocking,
    handler::Handler as _,
    id::{ContainerId, Face, SandboxId},
    lifecycle::{container::Container, sandbox::Sandbox, system::System},
    network::{Inventory, NetworkError},
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

/// How often a link that nobody knows of is looked at again before it is a difference.
const LINK_LOOKS: u32 = 20;
/// Between two looks.
const LINK_PAUSE: Duration = Duration::from_millis(50);

/// Compares, and repairs if asked.
pub async fn run(agent: &Arc<Agent>, repair: bool) -> Vec<Difference> {
    let mut differences = Vec::new();
    let known = Known::new(agent);
    cgroups(agent, &known, repair, &mut differences).await;
    sandbox_dirs(agent, &known, repair, &mut differences).await;
    links(agent, &known, repair, &mut differences).await;
    attachments(agent, &known, repair, &mut differences).await;
    layers(agent, &known, repair, &mut differences).await;
    sandboxes(agent, &known, repair, &mut differences).await;
    differences
}

/// What the store knows: as it was before the host was looked at, and as it is now.
///
/// An object on the host was claimed before it was made, and is forgotten after it was removed. So
/// what is seen there and was in the store neither before nor after belongs to nobody.
struct Known<'a> {
    agent: &'a Agent,
    before: Snapshot,
    /// A pull or an import was under way: its layers are not recorded yet.
    pulling: bool,
}

impl<'a> Known<'a> {
    fn new(agent: &'a Agent) -> Self {
        Self {
            agent,
            before: agent.store.snapshot(),
            pulling: agent.images.is_unpacking(),
        }
    }

    fn sandbox(&self, id: &SandboxId) -> bool {
        self.either(|at| {
            at.get::<Sandbox>(id.as_str()).is_some()
                || at.held_by(&Sandbox::holder(id)).next().is_some()
        })
    }

    fn container(&self, id: &ContainerId) -> bool {
        self.either(|at| {
            at.get::<Container>(id.as_str()).is_some()
                || at.held_by(&Container::holder(id)).next().is_some()
                // A system container's writable layer bears its own id.
                || at.get::<System>(id.as_str()).is_some()
                || at.held_by(&System::holder(id)).next().is_some()
        })
    }

    fn layer(&self, dir: u32) -> bool {
        self.pulling
            || self.agent.images.is_unpacking()
            || self.either(|at| at.all::<Layer>().any(|layer| layer.dir == dir))
    }

    fn either(&self, knows: impl Fn(&Snapshot) -> bool) -> bool {
        knows(&self.before) || knows(&self.agent.store.snapshot())
    }
}

async fn cgroups(agent: &Arc<Agent>, known: &Known<'_>, repair: bool, found: &mut Vec<Difference>) {
    let cgroups = Arc::clone(&agent.cgroups);
    let Ok(present) = blocking::run("list cgroups", move || cgroups.inventory()).await else {
        return;
    };
    for path in present {
        let name = path.as_str().rsplit('/').next().unwrap_or_default();
        let is_known = name.parse::<SandboxId>().is_ok_and(|id| known.sandbox(&id))
            || name
                .parse::<ContainerId>()
                .is_ok_and(|id| known.container(&id));
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
    known: &Known<'_>,
    repair: bool,
    found: &mut Vec<Difference>,
) {
    let dir = agent.lifecycle.sandboxes_dir.clone();
    for name in names(&dir) {
        let id = name.parse::<SandboxId>();
        if id.as_ref().is_ok_and(|id| known.sandbox(id)) {
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

async fn links(agent: &Arc<Agent>, known: &Known<'_>, repair: bool, found: &mut Vec<Difference>) {
    let Ok(present) = settled(agent, known).await else {
        return;
    };
    for (sandbox, link) in present.links {
        if known.sandbox(&sandbox) {
            continue;
        }
        let mut difference = Difference::leftover("link", link, CRASHED, "remove it");
        if repair {
            let removed = agent.networks.settle(&sandbox).await;
            difference.repaired = Some(removed.map_err(|error| error.to_string()));
        }
        found.push(difference);
    }
    for port in present.ports {
        if known.sandbox(&port.sandbox) {
            continue;
        }
        let subject = format!("{} {} of {}", port.protocol, port.host_port, port.sandbox);
        let mut difference = Difference::leftover("host port", subject, CRASHED, "withdraw it");
        if repair {
            let withdrawn = agent.networks.detach(&port.sandbox, None).await;
            difference.repaired = Some(withdrawn.map_err(|error| error.to_string()));
        }
        found.push(difference);
    }
}

/// What plugins of CNI made, both ways: for pods that are gone, and what of a pod they miss.
async fn attachments(
    agent: &Arc<Agent>,
    known: &Known<'_>,
    repair: bool,
    found: &mut Vec<Difference>,
) {
    for sandbox in agent.networks.plugin_attachments() {
        if known.sandbox(&sandbox) {
            found.extend(changed(agent, &sandbox).await);
            continue;
        }
        // Made and gone again while we looked.
        if !agent.networks.plugin_attachments().contains(&sandbox) {
            continue;
        }
        let cause = "a plugin could not undo its work; the log has its words";
        let mut difference =
            Difference::leftover("CNI attachment", &sandbox, cause, "run DEL again");
        if repair {
            let detached = agent.networks.detach(&sandbox, None).await;
            difference.repaired = Some(detached.map_err(|error| error.to_string()));
        }
        found.push(difference);
    }
}

/// What CHECK of a ready sandbox's plugins finds.
async fn changed(agent: &Agent, id: &SandboxId) -> Option<Difference> {
    let is_ready = || {
        let at = agent.store.snapshot();
        at.get::<Sandbox>(id.as_str())
            .is_some_and(|sandbox| sandbox.is_ready())
    };
    if !is_ready() {
        return None;
    }
    let error = agent.networks.check_attachment(id).await.err()?;
    // Not one that was stopped meanwhile.
    is_ready().then(|| {
        let cause = "changed by hand or by another program; run the pod anew";
        Difference::missing("CNI attachment", format!("{id}: {error}"), cause, "")
    })
}

/// The network's inventory once links that are on their way out have gone: the kernel removes them
/// some tens of milliseconds after their namespace.
async fn settled(agent: &Agent, known: &Known<'_>) -> Result<Inventory, NetworkError> {
    for _ in 0..LINK_LOOKS {
        let present = agent.networks.inventory().await?;
        let all_known = present
            .links
            .iter()
            .all(|(sandbox, _)| known.sandbox(sandbox));
        if all_known {
            return Ok(present);
        }
        tokio::time::sleep(LINK_PAUSE).await;
    }
    agent.networks.inventory().await
}

async fn layers(agent: &Arc<Agent>, known: &Known<'_>, repair: bool, found: &mut Vec<Difference>) {
    let rootfs = agent.rootfs.clone();
    let Ok(present) = blocking::run("list layers", move || rootfs.inventory()).await else {
        return;
    };
    let there: HashSet<u32> = present.layers.iter().copied().collect();
    for dir in present.layers {
        if known.layer(dir) {
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
    for layer in known.before.all::<Layer>() {
        // A removal drops the record first.
        let recorded = agent
            .store
            .snapshot()
            .get::<Layer>(layer.diff_id.as_str())
            .is_some();
        if recorded && !there.contains(&layer.dir) {
            let cause = "removed by hand; a pull of its image brings it back";
            found.push(Difference::missing("layer", &layer.diff_id, cause, ""));
        }
    }
    for id in present.writables {
        if known.container(&id) {
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
async fn sandboxes(
    agent: &Arc<Agent>,
    known: &Known<'_>,
    repair: bool,
    found: &mut Vec<Difference>,
) {
    let shims: HashSet<SandboxId> = agent
        .handler
        .inventory(&agent.lifecycle.sandboxes_dir)
        .await
        .into_iter()
        .map(|(sandbox, _)| sandbox)
        .collect();
    for sandbox in known.before.all::<Sandbox>() {
        if !sandbox.is_ready() || shims.contains(&sandbox.id) {
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
                .stop_pod_sandbox(Face::Native, sandbox.id.as_str(), Some(Duration::ZERO))
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
