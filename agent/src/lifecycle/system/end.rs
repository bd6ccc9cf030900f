//! After a run's init has ended: a reboot begins another run in the same sandbox, anything else ends
//! it. Whoever caused the end, this is what follows; a new agent looks for what the last one missed.

use std::{sync::Arc, time::Duration};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tracing::{error, info};

use super::{
    super::{
        Lifecycle, LifecycleError,
        container::{Container, Exit},
    },
    System, subject,
};
use crate::{
    event::EventKind,
    id::{ContainerId, Face},
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    store::{Changes, Snapshot},
};

impl Lifecycle {
    /// Does what follows the exit of a system container's init, beside the caller.
    pub(in super::super) fn init_exited(self: &Arc<Self>, container: &Container) {
        let Some(run) = &container.config.system else {
            return;
        };
        let (lifecycle, system, id) = (Arc::clone(self), run.system.clone(), container.id.clone());
        tokio::spawn(async move {
            if let Err(error) = lifecycle.end_system(&system, &id).await {
                error!(system_id = %system, error = &error as &dyn std::error::Error, "the run of a system container is not ended; stop it again");
            }
        });
    }

    /// Ends or reboots; a run that has been dealt with is left alone.
    pub(super) async fn end_system(
        self: &Arc<Self>,
        system: &ContainerId,
        container: &ContainerId,
    ) -> Result<(), LifecycleError> {
        let Some(exit) = self
            .store
            .snapshot()
            .get::<Container>(container.as_str())
            .and_then(|container| container.exit().cloned())
        else {
            return Ok(());
        };
        let end = EndSystem {
            id: system.clone(),
            container: container.clone(),
            reboot: is_reboot(&exit) && !self.halting.contains(container),
            exit,
        };
        let ended = self.operations.run(end, Arc::clone(self)).await;
        self.halting.forget(container);
        Ok(ended?)
    }

    /// Looks for runs whose init ended while no agent was there.
    pub(in super::super) async fn end_missed_systems(self: &Arc<Self>) {
        let at = self.store.snapshot();
        for system in at.all::<System>() {
            let Some((sandbox, container)) = self.run_of(&at, &system) else {
                continue;
            };
            let result = match container {
                Some(container) if container.exit().is_some() => {
                    self.end_system(&system.id, &container.id).await
                }
                Some(container) if container.is_running() && sandbox.is_ready() => Ok(()),
                // The host was started anew, or a start was undone half way.
                _ => self.end_run(&system).await,
            };
            if let Err(error) = result {
                error!(system_id = %system.id, error = &error as &dyn std::error::Error, "the run of a system container is not ended; stop it again");
            }
        }
    }

    /// Ends and removes whatever there is of a run; nothing is fine.
    pub(super) async fn end_run(self: &Arc<Self>, system: &System) -> Result<(), LifecycleError> {
        let Some((sandbox, _)) = self.run_of(&self.store.snapshot(), system) else {
            return Ok(());
        };
        let id = sandbox.id.as_str();
        self.stop_pod_sandbox(Face::Native, id, Some(Duration::ZERO))
            .await?;
        self.remove_pod_sandbox(Face::Native, id, true).await
    }
}

/// How the kernel tells what the last process of a pid namespace asked reboot(2) for: SIGHUP is a
/// restart, SIGINT a halt or power-off.
fn is_reboot(exit: &Exit) -> bool {
    exit.signal == Signal::HUP.as_raw()
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(in super::super) struct EndSystem {
    id: ContainerId,
    /// Whose end it follows.
    container: ContainerId,
    exit: Exit,
    reboot: bool,
}

#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Step {
    Run,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Fact {
    Rebooted,
    Stopped,
}

impl Operation for EndSystem {
    const NAME: &'static str = "end_system";
    const ON_RESTART: OnRestart = OnRestart::Resume;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[&[Step::Run]];
    type Domain = Lifecycle;
    type Fact = Fact;
    type Output = ();
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(format!("end/{}", self.container))
    }

    fn subject(&self) -> Subject {
        subject(&self.id)
    }

    fn intent(&mut self, _: &Snapshot, _: &Lifecycle) -> Result<Changes, LifecycleError> {
        Ok(Changes::new())
    }

    async fn apply(
        &self,
        Step::Run: Step,
        on: &Arc<Lifecycle>,
        _: &Context,
    ) -> Result<Option<Fact>, LifecycleError> {
        let Ok(system) = on.system(self.id.as_str()) else {
            return Ok(None);
        };
        let at = on.store.snapshot();
        let Some((sandbox, container)) = on.run_of(&at, &system) else {
            return Ok(None);
        };
        // Another run has taken its place, or an earlier attempt at this one had begun it.
        let other = container.filter(|container| container.id != self.container);
        if other.is_some_and(|other| other.is_running()) {
            return Ok(None);
        }
        if self.reboot && sandbox.is_ready() {
            match on.boot(&system, &sandbox).await {
                Ok(()) => return Ok(Some(Fact::Rebooted)),
                Err(error) => {
                    info!(system_id = %self.id, error = &error as &dyn std::error::Error, "cannot be rebooted");
                }
            }
        }
        on.end_run(&system).await?;
        Ok(Some(Fact::Stopped))
    }

    async fn undo(&self, _: Step, _: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        Ok(())
    }

    fn outcome(&self, facts: Vec<Fact>, at: &Snapshot) -> (Changes, ()) {
        let (Some(fact), Some(system)) = (facts.first(), at.get::<System>(self.id.as_str())) else {
            return (Changes::new(), ());
        };
        let mut system = System::clone(&system);
        system.last_exit = Some(self.exit.clone());
        let kind = match fact {
            Fact::Rebooted => {
                system.starts += 1;
                EventKind::SystemRebooted
            }
            Fact::Stopped => EventKind::SystemStopped,
        };
        let event = system
            .event(kind)
            .attribute("exit_code", self.exit.code.to_string())
            .attribute("signal", self.exit.signal.to_string());
        (Changes::new().update(system).event(event).durable(), ())
    }

    fn unwound(&self, _: Option<&LifecycleError>, _: &Snapshot) -> Changes {
        Changes::new()
    }
}
