//! StartContainer: the waiting process runs its program.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    Lifecycle, LifecycleError,
    container::{Container, ContainerState, Exit, ExitReason},
    create_container::ready,
    sandbox::Sandbox,
};
use crate::{
    clock::Time,
    event::{EventDraft, EventKind},
    handler::Handler as _,
    id::{ContainerId, Face, SandboxId},
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    store::{Changes, Snapshot},
};

/// Exit code of a container whose program could not be executed.
const START_FAILED: i32 = 128;

impl Lifecycle {
    /// Runs the program of a created container; returns once it is executed.
    ///
    /// # Errors
    /// `NotFound`, `State`; `Handler` when it can't be executed, and the container is then exited
    /// with code 128 and reason `StartError`.
    pub async fn start_container(
        self: &Arc<Self>,
        face: Face,
        id: &str,
    ) -> Result<(), LifecycleError> {
        let container = self.find_container(&self.store.snapshot(), face, id)?;
        let start = StartContainer {
            id: container.id.clone(),
            sandbox_id: container.sandbox_id.clone(),
        };
        Ok(self.operations.run(start, Arc::clone(self)).await?)
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct StartContainer {
    id: ContainerId,
    sandbox_id: SandboxId,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Execute,
}

impl Operation for StartContainer {
    const NAME: &'static str = "start_container";
    /// A program that runs is not taken back: the shim knows whether it does.
    const ON_RESTART: OnRestart = OnRestart::Resume;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[&[Step::Execute]];
    type Domain = Lifecycle;
    type Fact = ();
    type Output = ();
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(format!("start/{}", self.id))
    }

    fn subject(&self) -> Subject {
        container_subject(&self.id)
    }

    fn intent(&mut self, at: &Snapshot, _: &Lifecycle) -> Result<Changes, LifecycleError> {
        let container =
            at.get::<Container>(self.id.as_str())
                .ok_or_else(|| LifecycleError::NotFound {
                    kind: "container",
                    id: self.id.to_string(),
                })?;
        if !matches!(container.state, ContainerState::Created { .. }) {
            return Err(wrong_state(&container, "CONTAINER_CREATED"));
        }
        if let Some(sandbox) = at.get::<Sandbox>(self.sandbox_id.as_str()) {
            ready(&sandbox)?;
        }
        Ok(Changes::new())
    }

    async fn apply(
        &self,
        Step::Execute: Step,
        on: &Arc<Lifecycle>,
        _: &Context,
    ) -> Result<Option<()>, LifecycleError> {
        // A start that an earlier agent began may have been found done when its shim answered.
        let waits = on
            .store
            .snapshot()
            .get::<Container>(self.id.as_str())
            .is_some_and(|container| matches!(container.state, ContainerState::Created { .. }));
        if waits {
            on.handler.start(&self.sandbox_id, &self.id).await?;
        }
        Ok(None)
    }

    async fn undo(&self, Step::Execute: Step, _: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        Ok(())
    }

    fn outcome(&self, _: Vec<()>, at: &Snapshot) -> (Changes, ()) {
        let Some(container) = at.get::<Container>(self.id.as_str()) else {
            return (Changes::new(), ());
        };
        let ContainerState::Created { pid } = container.state else {
            return (Changes::new(), ());
        };
        let mut container = Container::clone(&container);
        container.state = ContainerState::Running {
            pid,
            started_at: Time::now().not_before(container.created_at),
        };
        let event = EventDraft::new(EventKind::ContainerStarted, container.config.face)
            .sandbox(&self.sandbox_id)
            .container(&self.id);
        (Changes::new().update(container).event(event), ())
    }

    fn unwound(&self, error: Option<&LifecycleError>, at: &Snapshot) -> Changes {
        let (Some(error), Some(container)) = (error, at.get::<Container>(self.id.as_str())) else {
            return Changes::new();
        };
        if !matches!(container.state, ContainerState::Created { .. }) {
            return Changes::new();
        }
        let mut container = Container::clone(&container);
        container.state = ContainerState::Exited(Exit {
            code: START_FAILED,
            signal: 0,
            reason: ExitReason::StartError,
            message: chain(error),
            started_at: None,
            finished_at: Time::now(),
        });
        let event = EventDraft::new(EventKind::ContainerExited, container.config.face)
            .sandbox(&self.sandbox_id)
            .container(&self.id)
            .attribute("exit_code", START_FAILED.to_string())
            .attribute("reason", ExitReason::StartError.cri_word());
        Changes::new().update(container).event(event)
    }
}

/// What verbs of a made container hold.
pub(super) fn container_subject(id: &ContainerId) -> Subject {
    Subject(format!("container/{id}"))
}

/// Refusal that names the state in CRI's words.
pub(super) fn wrong_state(container: &Container, wanted: &'static str) -> LifecycleError {
    LifecycleError::State {
        kind: "container",
        id: container.id.to_string(),
        state: match container.state {
            ContainerState::Created { .. } => "CONTAINER_CREATED",
            ContainerState::Running { .. } => "CONTAINER_RUNNING",
            ContainerState::Exited(_) => "CONTAINER_EXITED",
        },
        wanted,
    }
}

/// The error with its causes, as one line.
fn chain(error: &LifecycleError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
