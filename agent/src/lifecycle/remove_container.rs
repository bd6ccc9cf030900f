//! RemoveContainer: everything of a container goes, its log only if it is ours.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    Lifecycle, LifecycleError,
    container::{Container, ContainerState},
    files,
    start_container::{container_subject, wrong_state},
};
use crate::{
    blocking,
    cgroup::CgroupPath,
    event::{EventDraft, EventKind},
    handler::Handler as _,
    handler::HandlerError,
    id::{ContainerId, Face, SandboxId},
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    store::{Changes, Snapshot},
};

impl Lifecycle {
    /// Removes a container; with `force` also one that runs. Unknown is fine.
    ///
    /// # Errors
    /// `Ambiguous`; `State` if it runs and `force` is not set; what could not be removed.
    pub async fn remove_container(
        self: &Arc<Self>,
        face: Face,
        id: &str,
        force: bool,
    ) -> Result<(), LifecycleError> {
        let container = match self.find_container(&self.store.snapshot(), face, id) {
            Err(LifecycleError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        if container.is_running() && !force {
            return Err(wrong_state(&container, "CONTAINER_EXITED"));
        }
        let remove = RemoveContainer {
            id: container.id.clone(),
        };
        self.operations.run(remove, Arc::clone(self)).await?;
        self.release_layers(&container).await;
        Ok(())
    }

    /// Ends the process of a container and makes its shim forget it; absent is fine.
    pub(super) async fn delete_process(
        &self,
        sandbox: &SandboxId,
        id: &ContainerId,
    ) -> Result<(), LifecycleError> {
        match self.handler.delete(sandbox, id).await {
            // A lost shim holds nothing any more; the cgroup's removal kills what is left.
            Err(HandlerError::UnknownContainer { .. } | HandlerError::ShimLost { .. }) | Ok(()) => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the writable layer and the mount point; absent is fine.
    pub(super) async fn remove_root(
        &self,
        sandbox: &SandboxId,
        id: &ContainerId,
    ) -> Result<(), LifecycleError> {
        let mount_point = self.mount_point(sandbox, id);
        let (rootfs, id) = (self.rootfs.clone(), id.clone());
        blocking::run_bulk("remove writable layer", move || {
            rootfs.remove_writable(&id)?;
            mount_point.parent().map_or(Ok(()), files::remove_dir)
        })
        .await
    }

    /// Kills what is in the cgroup and removes it; absent is fine.
    pub(super) async fn remove_cgroup(&self, path: &CgroupPath) -> Result<(), LifecycleError> {
        let (cgroups, path) = (Arc::clone(&self.cgroups), path.clone());
        Ok(blocking::run("remove cgroup", move || cgroups.remove(&path)).await?)
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct RemoveContainer {
    pub(super) id: ContainerId,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Kill,
    Delete,
    Cgroup,
    Root,
    Log,
}

impl Operation for RemoveContainer {
    const NAME: &'static str = "remove_container";
    const ON_RESTART: OnRestart = OnRestart::Resume;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[
        &[Step::Kill],
        &[Step::Delete],
        &[Step::Cgroup, Step::Root, Step::Log],
    ];
    type Domain = Lifecycle;
    type Fact = ();
    type Output = ();
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(format!("remove/{}", self.id))
    }

    fn subject(&self) -> Subject {
        container_subject(&self.id)
    }

    fn intent(&mut self, _: &Snapshot, _: &Lifecycle) -> Result<Changes, LifecycleError> {
        Ok(Changes::new())
    }

    async fn apply(
        &self,
        step: Step,
        on: &Arc<Lifecycle>,
        _: &Context,
    ) -> Result<Option<()>, LifecycleError> {
        let Some(container) = on.store.snapshot().get::<Container>(self.id.as_str()) else {
            return Ok(None);
        };
        match step {
            Step::Kill if container.is_running() => on.kill_container(&container).await?,
            Step::Kill => {}
            Step::Delete => {
                on.forget_sample(self.id.as_str());
                on.delete_process(&container.sandbox_id, &self.id).await?;
            }
            Step::Cgroup => on.remove_cgroup(&container.cgroup).await?,
            Step::Root => on.remove_root(&container.sandbox_id, &self.id).await?,
            Step::Log => remove_log(&container).await?,
        }
        Ok(None)
    }

    async fn undo(&self, _: Step, _: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        Ok(())
    }

    fn outcome(&self, _: Vec<()>, at: &Snapshot) -> (Changes, ()) {
        let Some(container) = at.get::<Container>(self.id.as_str()) else {
            return (Changes::new(), ());
        };
        (removed(&container), ())
    }

    fn unwound(&self, _: Option<&LifecycleError>, _: &Snapshot) -> Changes {
        Changes::new()
    }
}

/// The commit of a removal.
fn removed(container: &Container) -> Changes {
    let mut event = EventDraft::new(EventKind::ContainerRemoved, container.config.face)
        .sandbox(&container.sandbox_id)
        .container(&container.id);
    if let ContainerState::Exited(exit) = &container.state {
        event = event.attribute("exit_code", exit.code.to_string());
    }
    Changes::new()
        .delete::<Container>(container.id.as_str())
        .release_holder(Container::holder(&container.id))
        .event(event)
}

/// Removes a log that no caller owns, with its rotated files and directory.
async fn remove_log(container: &Container) -> Result<(), LifecycleError> {
    let Some(log) = container.config.log.clone().filter(|log| log.owned) else {
        return Ok(());
    };
    blocking::run("remove log", move || {
        log.path.parent().map_or(Ok(()), files::remove_dir)
    })
    .await
}
