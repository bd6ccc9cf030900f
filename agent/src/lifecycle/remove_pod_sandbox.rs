//! RemovePodSandbox: stops if need be, removes containers, and then everything of the sandbox.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use super::{
    Lifecycle, LifecycleError, files,
    remove_container::RemoveContainer,
    sandbox::{Sandbox, SandboxState},
    stop_pod_sandbox::sandbox_subject,
};
use crate::{
    blocking,
    event::{EventDraft, EventKind},
    id::{Face, SandboxId},
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    store::{Changes, Snapshot},
};

impl Lifecycle {
    /// Removes a sandbox with its containers; with `force` also one that is ready. Unknown is fine.
    ///
    /// # Errors
    /// `Ambiguous`; `State` if it is ready and `force` is not set; what could not be removed.
    pub async fn remove_pod_sandbox(
        self: &Arc<Self>,
        face: Face,
        id: &str,
        force: bool,
    ) -> Result<(), LifecycleError> {
        let sandbox = match self.find_sandbox(&self.store.snapshot(), face, id) {
            Err(LifecycleError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        if sandbox.is_ready() {
            if !force {
                return Err(LifecycleError::State {
                    kind: "sandbox",
                    id: sandbox.id.to_string(),
                    state: "SANDBOX_READY",
                    wanted: "SANDBOX_NOTREADY",
                });
            }
            // On its own, so that watchers see the sandbox stop before it goes.
            self.stop_pod_sandbox(face, sandbox.id.as_str(), Some(Duration::ZERO))
                .await?;
        }
        let remove = RemovePodSandbox {
            id: sandbox.id.clone(),
        };
        Ok(self.operations.run(remove, Arc::clone(self)).await?)
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct RemovePodSandbox {
    id: SandboxId,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Containers,
    Detach,
    Shim,
    Files,
    Cgroup,
}

impl RemovePodSandbox {
    /// Containers first: their directories, layers and records are their own operation's matter.
    async fn remove_containers(&self, on: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        on.end_containers(&self.id, Some(Duration::ZERO)).await?;
        let containers = on.containers_of(&on.store.snapshot(), &self.id);
        let removed = join_all(containers.iter().map(|container| {
            let remove = RemoveContainer {
                id: container.id.clone(),
            };
            on.operations.run(remove, Arc::clone(on))
        }))
        .await;
        removed
            .into_iter()
            .try_for_each(|one| one.map_err(LifecycleError::from))?;
        for container in &containers {
            on.release_layers(container).await;
        }
        Ok(())
    }
}

impl Operation for RemovePodSandbox {
    const NAME: &'static str = "remove_pod_sandbox";
    const ON_RESTART: OnRestart = OnRestart::Resume;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[
        &[Step::Containers],
        &[Step::Detach, Step::Shim],
        &[Step::Files, Step::Cgroup],
    ];
    type Domain = Lifecycle;
    type Fact = ();
    type Output = ();
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(format!("remove/{}", self.id))
    }

    fn subject(&self) -> Subject {
        sandbox_subject(&self.id)
    }

    fn intent(&mut self, at: &Snapshot, _: &Lifecycle) -> Result<Changes, LifecycleError> {
        let Some(sandbox) = at.get::<Sandbox>(self.id.as_str()).filter(|s| s.is_ready()) else {
            return Ok(Changes::new());
        };
        let mut sandbox = Sandbox::clone(&sandbox);
        sandbox.state = SandboxState::Stopped;
        Ok(Changes::new().put(sandbox))
    }

    async fn apply(
        &self,
        step: Step,
        on: &Arc<Lifecycle>,
        context: &Context,
    ) -> Result<Option<()>, LifecycleError> {
        let Some(sandbox) = on.store.snapshot().get::<Sandbox>(self.id.as_str()) else {
            return Ok(None);
        };
        match step {
            Step::Containers => self.remove_containers(on).await?,
            Step::Detach => on.networks.detach(&self.id, Some(context)).await?,
            Step::Shim => on.end_shim(&self.id).await?,
            Step::Files => {
                let dir = on.sandbox_dir(&self.id);
                blocking::run("remove sandbox directory", move || files::remove(&dir)).await?;
                on.settle(&self.id);
            }
            Step::Cgroup => {
                on.forget_sample(self.id.as_str());
                on.remove_cgroup(&sandbox.cgroup).await?;
            }
        }
        Ok(None)
    }

    async fn undo(&self, _: Step, _: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        Ok(())
    }

    fn outcome(&self, _: Vec<()>, at: &Snapshot) -> (Changes, ()) {
        let Some(sandbox) = at.get::<Sandbox>(self.id.as_str()) else {
            return (Changes::new(), ());
        };
        let changes = Changes::new()
            .delete::<Sandbox>(self.id.as_str())
            .release_holder(Sandbox::holder(&self.id))
            .event(removed(&sandbox));
        (changes, ())
    }

    fn unwound(&self, _: Option<&LifecycleError>, _: &Snapshot) -> Changes {
        Changes::new()
    }
}

/// With the name: when it is told, there is no record to ask any more.
fn removed(sandbox: &Sandbox) -> EventDraft {
    let (config, key) = (&sandbox.config, &sandbox.config.key);
    EventDraft::new(EventKind::SandboxRemoved, config.face)
        .sandbox(&sandbox.id)
        .attribute("name", &key.name)
        .attribute("namespace", &key.namespace)
        .attribute("uid", &key.uid)
        .attribute("attempt", key.attempt.to_string())
}
