//! A new agent finds what the one before it left: shims, exits, and what was begun.

use std::sync::Arc;

use futures_util::future::join_all;
use longshore_shim::wire::Welcome;
use tracing::{info, warn};

use super::{
    Lifecycle, LifecycleError,
    container::{Container, ContainerState},
    create_container::CreateContainer,
    exit,
    remove_container::RemoveContainer,
    remove_pod_sandbox::RemovePodSandbox,
    run_pod_sandbox::RunPodSandbox,
    sandbox::Sandbox,
    start_container::StartContainer,
    stop_pod_sandbox::StopPodSandbox,
    system::{CreateSystem, EndSystem, RemoveSystem, StartSystem},
};
use crate::{
    clock::Time,
    event::{EventDraft, EventKind},
    handler::Handler as _,
    store::Changes,
};

impl Lifecycle {
    /// Connects to every shim, takes in what ended meanwhile, and finishes or undoes what was
    /// begun. With `rebooted` nothing of the kernel's is left, and sandboxes are lost.
    ///
    /// # Errors
    /// `Store`; a single sandbox that can't be recovered is reported as lost instead.
    pub async fn recover(self: &Arc<Self>, rebooted: bool) -> Result<(), LifecycleError> {
        let snapshot = self.store.snapshot();
        // One whose stop was cut short still has its shim, and with it the exits to come.
        let live: Vec<_> = snapshot
            .all::<Sandbox>()
            .filter(|sandbox| sandbox.shim_pid != 0)
            .collect();
        let recovered = join_all(live.iter().map(|sandbox| async {
            if rebooted {
                self.lost_by_reboot(sandbox).await
            } else {
                self.reconnect(sandbox).await
            }
        }))
        .await;
        recovered.into_iter().collect::<Result<(), _>>()?;
        // Creates first: what they leave is what stop and remove would trip over.
        self.operations.recover::<CreateContainer>(self).await;
        self.operations.recover::<RunPodSandbox>(self).await;
        self.operations.recover::<StartContainer>(self).await;
        self.operations.recover::<RemoveContainer>(self).await;
        self.operations.recover::<StopPodSandbox>(self).await;
        self.operations.recover::<RemovePodSandbox>(self).await;
        // What these are made of is settled.
        self.operations.recover::<CreateSystem>(self).await;
        self.operations.recover::<StartSystem>(self).await;
        self.operations.recover::<EndSystem>(self).await;
        self.operations.recover::<RemoveSystem>(self).await;
        self.end_missed_systems().await;
        Ok(())
    }

    async fn lost_by_reboot(&self, sandbox: &Sandbox) -> Result<(), LifecycleError> {
        let changes = exit::lost(&self.store.snapshot(), sandbox, "the host was restarted");
        self.store.commit(changes).await?;
        Ok(())
    }

    async fn reconnect(&self, sandbox: &Sandbox) -> Result<(), LifecycleError> {
        match self
            .handler
            .reconnect(&sandbox.id, &self.sandbox_dir(&sandbox.id))
            .await
        {
            Ok(welcome) => self.reconcile(sandbox, &welcome).await,
            Err(error) => {
                warn!(sandbox_id = %sandbox.id, error = &error as &dyn std::error::Error, "no shim answers");
                if let Err(error) = self
                    .mark_lost(sandbox, "its supervisor was gone when the agent started")
                    .await
                {
                    warn!(sandbox_id = %sandbox.id, error = &error as &dyn std::error::Error, "lost sandbox not cleaned up; stop it again");
                }
                Ok(())
            }
        }
    }

    /// Compares the store with what the shim knows. Exits arrive as events of their own.
    async fn reconcile(&self, sandbox: &Sandbox, welcome: &Welcome) -> Result<(), LifecycleError> {
        let containers = self.containers_of(&self.store.snapshot(), &sandbox.id);
        info!(sandbox_id = %sandbox.id, containers = containers.len(), "shim found");
        for container in containers {
            if container.exit().is_some() {
                continue;
            }
            let known = welcome
                .containers
                .iter()
                .find(|report| report.container_id == container.id.as_str());
            match known {
                None => {
                    self.container_lost(&container, "its supervisor does not know it")
                        .await?
                }
                Some(report) if report.started => self.adopt_start(&container, report.pid).await?,
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// The agent died between the start and its commit.
    async fn adopt_start(&self, container: &Container, pid: i32) -> Result<(), LifecycleError> {
        if container.is_running() {
            return Ok(());
        }
        let mut container = container.clone();
        container.state = ContainerState::Running {
            pid,
            started_at: Time::now().not_before(container.created_at),
        };
        let event = EventDraft::new(EventKind::ContainerStarted, container.config.face)
            .sandbox(&container.sandbox_id)
            .container(&container.id);
        self.store
            .commit(Changes::new().update(container).event(event))
            .await?;
        Ok(())
    }
}
