//! StopPodSandbox: containers end, the network is taken down, the shim goes.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use super::{
    Lifecycle, LifecycleError,
    container::{Container, ContainerState},
    files,
    sandbox::{Sandbox, SandboxState},
};
use crate::{
    blocking,
    event::{EventDraft, EventKind},
    handler::Handler as _,
    id::{Face, SandboxId},
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    store::{Changes, Snapshot},
};

impl Lifecycle {
    /// Stops a sandbox: its containers get `grace` (none: each its own) to end. Unknown or stopped
    /// is fine; a repeated call finishes what an earlier one could not.
    ///
    /// # Errors
    /// `Ambiguous`; what could not be taken down, and the sandbox is not ready any more.
    pub async fn stop_pod_sandbox(
        self: &Arc<Self>,
        face: Face,
        id: &str,
        grace: Option<Duration>,
    ) -> Result<(), LifecycleError> {
        let sandbox = match self.find_sandbox(&self.store.snapshot(), face, id) {
            Err(LifecycleError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let stop = StopPodSandbox {
            id: sandbox.id.clone(),
            grace,
        };
        Ok(self.operations.run(stop, Arc::clone(self)).await?)
    }

    /// Containers of a sandbox, by id.
    pub fn containers_of(&self, at: &Snapshot, sandbox: &SandboxId) -> Vec<Arc<Container>> {
        at.all::<Container>()
            .filter(|container| container.sandbox_id == *sandbox)
            .collect()
    }

    /// Ends every container of a sandbox, also those being made or waiting for their start.
    pub(super) async fn end_containers(
        &self,
        sandbox: &SandboxId,
        grace: Option<Duration>,
    ) -> Result<(), LifecycleError> {
        self.handler
            .end_if_silent(sandbox, &self.sandbox_dir(sandbox))
            .await?;
        self.operations
            .preempt(&format!("container-name/{sandbox}/"))
            .await;
        let containers = self.containers_of(&self.store.snapshot(), sandbox);
        let ended = join_all(containers.iter().map(|container| async move {
            match container.state {
                ContainerState::Created { .. } => self.kill_container(container).await,
                _ => self.end_container(container, grace).await,
            }
        }))
        .await;
        ended.into_iter().collect()
    }

    /// Ends the shim, and with it what waits for its start.
    pub(super) async fn end_shim(&self, sandbox: &SandboxId) -> Result<(), LifecycleError> {
        Ok(self
            .handler
            .end_pod(sandbox, &self.sandbox_dir(sandbox))
            .await?)
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct StopPodSandbox {
    pub(super) id: SandboxId,
    pub(super) grace: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Containers,
    Detach,
    Shim,
    Namespaces,
}

impl Operation for StopPodSandbox {
    const NAME: &'static str = "stop_pod_sandbox";
    const ON_RESTART: OnRestart = OnRestart::Resume;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[
        &[Step::Containers],
        &[Step::Detach, Step::Shim],
        &[Step::Namespaces],
    ];
    type Domain = Lifecycle;
    type Fact = ();
    type Output = ();
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(format!("stop/{}/{:?}", self.id, self.grace))
    }

    fn subject(&self) -> Subject {
        sandbox_subject(&self.id)
    }

    /// From here on no container can be made or started in it.
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
        match step {
            Step::Containers => on.end_containers(&self.id, self.grace).await?,
            Step::Detach => on.networks.detach(&self.id, Some(context)).await?,
            Step::Shim => on.end_shim(&self.id).await?,
            Step::Namespaces => {
                let dir = on.sandbox_dir(&self.id);
                blocking::run("release sandbox namespaces", move || files::release(&dir)).await?;
                on.settle(&self.id);
            }
        }
        Ok(None)
    }

    async fn undo(&self, _: Step, _: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        Ok(())
    }

    /// Addresses and ports are free once nothing answers on them; the name stays until removal.
    fn outcome(&self, _: Vec<()>, at: &Snapshot) -> (Changes, ()) {
        let Some(sandbox) = at.get::<Sandbox>(self.id.as_str()) else {
            return (Changes::new(), ());
        };
        let mut sandbox = Sandbox::clone(&sandbox);
        if sandbox.attachment.is_none() && sandbox.shim_pid == 0 {
            return (Changes::new(), ());
        }
        sandbox.attachment = None;
        sandbox.shim_pid = 0;
        let event =
            EventDraft::new(EventKind::SandboxStopped, sandbox.config.face).sandbox(&self.id);
        let changes = sandbox
            .released_claims()
            .into_iter()
            .fold(Changes::new(), Changes::release);
        (changes.update(sandbox).event(event), ())
    }

    fn unwound(&self, _: Option<&LifecycleError>, _: &Snapshot) -> Changes {
        Changes::new()
    }
}

/// What verbs of a made sandbox hold.
pub(super) fn sandbox_subject(id: &SandboxId) -> Subject {
    Subject(format!("sandbox/{id}"))
}
