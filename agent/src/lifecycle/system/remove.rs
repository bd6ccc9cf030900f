//! RemoveSystem: all that it wrote goes, and its name, ids and addresses are free.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    super::{Lifecycle, LifecycleError, files},
    Halt, System, subject,
    view::SystemState,
};
use crate::{
    blocking,
    event::EventKind,
    id::ContainerId,
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    store::{Changes, Snapshot},
};

impl Lifecycle {
    /// Removes a system container; with `force` also one that runs. Unknown is fine.
    ///
    /// # Errors
    /// `State` if it runs and `force` is not set, with nothing touched; what could not be removed.
    pub async fn remove_system(
        self: &Arc<Self>,
        name: &str,
        force: bool,
    ) -> Result<(), LifecycleError> {
        let Ok(system) = self.system(name) else {
            return Ok(());
        };
        if force {
            let halt = Halt {
                force: true,
                timeout: None,
            };
            self.stop_system(system.id.as_str(), halt).await?;
        }
        let remove = RemoveSystem {
            id: system.id.clone(),
        };
        self.operations.run(remove, Arc::clone(self)).await?;
        self.release_layers_of(std::iter::once(&system.image_id))
            .await;
        Ok(())
    }

    /// Removes its writable layer and its console's log; absent ones are fine.
    pub(super) async fn remove_system_files(&self, id: &ContainerId) -> Result<(), LifecycleError> {
        let log = self.logs_dir.join(System::log_name(id));
        let (rootfs, id) = (self.rootfs.clone(), id.clone());
        blocking::run_bulk("remove writable layer", move || {
            rootfs.remove_writable(&id)?;
            log.parent().map_or(Ok(()), files::remove_dir)
        })
        .await
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(in super::super) struct RemoveSystem {
    id: ContainerId,
}

#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Step {
    Run,
    Files,
}

impl Operation for RemoveSystem {
    const NAME: &'static str = "remove_system";
    const ON_RESTART: OnRestart = OnRestart::Resume;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[&[Step::Run], &[Step::Files]];
    type Domain = Lifecycle;
    type Fact = ();
    type Output = ();
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(format!("remove/{}", self.id))
    }

    fn subject(&self) -> Subject {
        subject(&self.id)
    }

    fn intent(&mut self, at: &Snapshot, on: &Lifecycle) -> Result<Changes, LifecycleError> {
        match at.get::<System>(self.id.as_str()) {
            None => Ok(Changes::new()),
            Some(system) => match on.run_state(at, &system) {
                SystemState::Stopped => Ok(Changes::new()),
                state => Err(system.wrong_state(&state, "STOPPED")),
            },
        }
    }

    async fn apply(
        &self,
        step: Step,
        on: &Arc<Lifecycle>,
        _: &Context,
    ) -> Result<Option<()>, LifecycleError> {
        let Ok(system) = on.system(self.id.as_str()) else {
            return Ok(None);
        };
        match step {
            Step::Run => on.end_run(&system).await?,
            Step::Files => on.remove_system_files(&self.id).await?,
        }
        Ok(None)
    }

    async fn undo(&self, _: Step, _: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        Ok(())
    }

    fn outcome(&self, _: Vec<()>, at: &Snapshot) -> (Changes, ()) {
        let Some(system) = at.get::<System>(self.id.as_str()) else {
            return (Changes::new(), ());
        };
        let changes = Changes::new()
            .delete::<System>(self.id.as_str())
            .release_holder(System::holder(&self.id))
            .event(system.event(EventKind::SystemRemoved))
            .durable();
        (changes, ())
    }

    fn unwound(&self, _: Option<&LifecycleError>, _: &Snapshot) -> Changes {
        Changes::new()
    }
}
