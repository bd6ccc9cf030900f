//! A container ended by itself: what its shim reports becomes `Exited`, once, with the true reason.

use std::sync::Arc;

use longshore_shim::wire;
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::{
    Lifecycle, LifecycleError,
    container::{Container, ContainerState, Exit, ExitReason},
    files,
    sandbox::{Sandbox, SandboxState},
    start_container::container_subject,
};
use crate::{
    blocking,
    clock::Time,
    event::{EventDraft, EventKind},
    handler::{Handler as _, HandlerError, ShimEvent, ShimNews},
    id::{ContainerId, SandboxId},
    store::{Changes, Snapshot},
};

/// Exit code of a container that nobody saw end.
const LOST: i32 = 255;

impl Lifecycle {
    /// Takes in what shims report, until the agent ends.
    pub async fn follow_shims(self: Arc<Self>, mut events: mpsc::Receiver<ShimEvent>) {
        while let Some(event) = events.recv().await {
            // Each on its own task: a hung cgroup of one pod must not delay another's exit.
            let lifecycle = Arc::clone(&self);
            tokio::spawn(async move {
                match event.what {
                    ShimNews::Exited(exited) => {
                        lifecycle.container_exited(&event.sandbox_id, exited).await
                    }
                    ShimNews::Lost { .. } => lifecycle.shim_lost(&event.sandbox_id).await,
                }
            });
        }
    }

    async fn container_exited(self: &Arc<Self>, sandbox: &SandboxId, exited: wire::Exited) {
        let Ok(id) = exited.container_id.parse::<ContainerId>() else {
            warn!(sandbox_id = %sandbox, container_id = exited.container_id, "a shim reported the exit of something else");
            return;
        };
        // A start whose outcome is not committed yet would overwrite the exit.
        self.operations
            .wait_for_named(&container_subject(&id), "start_container")
            .await;
        if self
            .store
            .snapshot()
            .get::<Container>(id.as_str())
            .is_none()
        {
            // It may have ended before its creation was committed.
            self.operations
                .settled(&format!("container-name/{sandbox}/"))
                .await;
        }
        let committed = self.commit_exit(&id, &exited.status).await;
        let record = self.store.snapshot().get::<Container>(id.as_str());
        match committed {
            Ok(()) => match self.handler.ack_exit(sandbox, &id).await {
                // A removal was faster; what kept the exit is gone with the container or the pod.
                Ok(())
                | Err(HandlerError::ShimLost { .. } | HandlerError::UnknownContainer { .. }) => {}
                Err(error) => {
                    // The shim repeats it on the next connection.
                    warn!(container_id = %id, error = &error as &dyn std::error::Error, "exit not acknowledged");
                }
            },
            Err(error) => {
                error!(container_id = %id, error = &error as &dyn std::error::Error, "exit not committed")
            }
        }
        if let Some(container) = record.filter(|record| record.exit().is_some()) {
            self.init_exited(&container);
        }
    }

    /// Decides the reason, ends what is left in the cgroup, and commits.
    pub(super) async fn commit_exit(
        &self,
        id: &ContainerId,
        status: &wire::ExitStatus,
    ) -> Result<(), LifecycleError> {
        let Some(container) = self.store.snapshot().get::<Container>(id.as_str()) else {
            return Ok(());
        };
        if container.exit().is_some() {
            return Ok(());
        }
        let (cgroups, path) = (Arc::clone(&self.cgroups), container.cgroup.clone());
        // In a shared pid namespace the other processes of a container outlive its first one.
        let oom_kills = blocking::run("end container cgroup", move || {
            let kills = cgroups.oom_kills(&path).unwrap_or(0);
            if let Err(error) = cgroups.kill(&path) {
                warn!(
                    cgroup = path.as_str(),
                    error = &error as &dyn std::error::Error,
                    "processes are left"
                );
            }
            kills
        })
        .await;
        let exit = exit_of(&container, status, oom_kills > 0);
        info!(container_id = %id, sandbox_id = %container.sandbox_id, code = exit.code, reason = exit.reason.cri_word(), "container exited");
        self.store.commit(exited(&container, exit)).await?;
        self.forget_stop(id);
        Ok(())
    }

    /// The shim of a sandbox died: its containers are ended and the sandbox is not ready any more.
    pub(super) async fn shim_lost(self: &Arc<Self>, id: &SandboxId) {
        let snapshot = self.store.snapshot();
        let Some(sandbox) = snapshot
            .get::<Sandbox>(id.as_str())
            .filter(|s| s.is_ready())
        else {
            return;
        };
        warn!(sandbox_id = %id, "the shim is lost, ending its pod");
        if let Err(error) = self.mark_lost(&sandbox, "its supervisor died").await {
            error!(sandbox_id = %id, error = &error as &dyn std::error::Error, "lost sandbox not cleaned up; stop it again");
        }
        for container in self.containers_of(&self.store.snapshot(), id) {
            self.init_exited(&container);
        }
    }

    /// Ends what runs in a sandbox without shim, and commits that it is lost.
    pub(super) async fn mark_lost(
        &self,
        sandbox: &Sandbox,
        reason: &str,
    ) -> Result<(), LifecycleError> {
        let (cgroups, path) = (Arc::clone(&self.cgroups), sandbox.cgroup.clone());
        let killed = blocking::run("kill cgroup", move || cgroups.kill(&path)).await;
        let detached = self.networks.undo_attach(&sandbox.id).await;
        let ended = self
            .handler
            .end_pod(&sandbox.id, &self.sandbox_dir(&sandbox.id))
            .await;
        let dir = self.sandbox_dir(&sandbox.id);
        let released =
            blocking::run("release sandbox namespaces", move || files::release(&dir)).await;
        self.store
            .commit(lost(&self.store.snapshot(), sandbox, reason))
            .await?;
        killed?;
        detached?;
        ended?;
        released
    }
}

fn exit_of(container: &Container, status: &wire::ExitStatus, oom_killed: bool) -> Exit {
    let signal = i32::try_from(status.signal).unwrap_or(0);
    let code = if signal == 0 {
        i32::try_from(status.code).unwrap_or(LOST)
    } else {
        128 + signal
    };
    let reason = match code {
        // The victim may be a child of pid 1; then pid 1 ends with a code of its own choice.
        _ if oom_killed && code != 0 => ExitReason::OomKilled,
        0 => ExitReason::Completed,
        _ => ExitReason::Error,
    };
    let started_at = container.started_at();
    Exit {
        code: if reason == ExitReason::OomKilled {
            137
        } else {
            code
        },
        signal,
        reason,
        message: String::new(),
        started_at,
        finished_at: Time::from_unix_ns(status.at_unix_ns)
            .not_before(started_at.unwrap_or(container.created_at)),
    }
}

/// The commit of an exit.
fn exited(container: &Container, exit: Exit) -> Changes {
    let event = |kind| {
        EventDraft::new(kind, container.config.face)
            .sandbox(&container.sandbox_id)
            .container(&container.id)
    };
    let mut changes = Changes::new();
    if exit.reason == ExitReason::OomKilled {
        changes = changes.event(event(EventKind::ContainerOom));
    }
    changes = changes.event(
        event(EventKind::ContainerExited)
            .attribute("exit_code", exit.code.to_string())
            .attribute("signal", exit.signal.to_string())
            .attribute("reason", exit.reason.cri_word()),
    );
    let mut container = container.clone();
    container.state = ContainerState::Exited(exit);
    changes.update(container)
}

/// The commit of a loss: the sandbox, and those of its containers that had not ended.
pub(super) fn lost(at: &Snapshot, sandbox: &Sandbox, reason: &str) -> Changes {
    let mut changes = Changes::new();
    for container in at.all::<Container>() {
        if container.sandbox_id == sandbox.id && container.exit().is_none() {
            changes = changes.merge(exited(&container, lost_exit(&container, reason)));
        }
    }
    for key in sandbox.released_claims() {
        changes = changes.release(key);
    }
    let mut sandbox = sandbox.clone();
    sandbox.attachment = None;
    sandbox.shim_pid = 0;
    if !sandbox.is_ready() {
        // Its stop was under way, and this is what there was to stop.
        let event =
            EventDraft::new(EventKind::SandboxStopped, sandbox.config.face).sandbox(&sandbox.id);
        return changes.update(sandbox).event(event);
    }
    sandbox.state = SandboxState::Lost {
        reason: reason.to_owned(),
    };
    let event = EventDraft::new(EventKind::SandboxLost, sandbox.config.face)
        .sandbox(&sandbox.id)
        .attribute("reason", reason);
    changes.update(sandbox).event(event)
}

/// The exit of a container that nobody saw end.
pub(super) fn lost_exit(container: &Container, reason: &str) -> Exit {
    let started_at = container.started_at();
    Exit {
        code: LOST,
        signal: 0,
        reason: ExitReason::Lost,
        message: reason.to_owned(),
        started_at,
        finished_at: Time::now().not_before(started_at.unwrap_or(container.created_at)),
    }
}

impl Lifecycle {
    /// Commits that a container was lost while its sandbox lives on.
    pub(super) async fn container_lost(
        &self,
        container: &Container,
        reason: &str,
    ) -> Result<(), LifecycleError> {
        self.store
            .commit(exited(container, lost_exit(container, reason)))
            .await?;
        Ok(())
    }
}
