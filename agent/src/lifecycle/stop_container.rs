//! StopContainer and Signal: a plain function, since it leaves nothing behind.
//!
//! The stop signal is sent once, however many callers wait; each caller kills when its own time is
//! up, so a second call can only shorten the wait. A caller that goes away kills nothing.

use std::{sync::Arc, time::Duration};

use super::{
    Lifecycle, LifecycleError,
    container::{Container, ContainerState, Exit},
    start_container::wrong_state,
};
use crate::{
    blocking,
    handler::Handler as _,
    id::{ContainerId, Face},
};

/// After SIGKILL to the whole cgroup the exit is a matter of milliseconds, unless a process hangs
/// in the kernel.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

impl Lifecycle {
    /// Asks a container to end, and makes it after `grace` (none: its own). Unknown or not
    /// running is fine.
    ///
    /// # Errors
    /// `Ambiguous`; `Cgroup` or `Handler` if it could not be killed.
    pub async fn stop_container(
        &self,
        face: Face,
        id: &str,
        grace: Option<Duration>,
    ) -> Result<(), LifecycleError> {
        let container = match self.find_container(&self.store.snapshot(), face, id) {
            Err(LifecycleError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        self.end_container(&container, grace).await
    }

    /// Sends a signal to the first process of a running container.
    ///
    /// # Errors
    /// `NotFound`; `State` unless it runs; `Handler`.
    pub async fn signal_container(
        &self,
        face: Face,
        id: &str,
        signal: i32,
    ) -> Result<(), LifecycleError> {
        let container = self.find_container(&self.store.snapshot(), face, id)?;
        if !container.is_running() {
            return Err(wrong_state(&container, "CONTAINER_RUNNING"));
        }
        Ok(self
            .handler
            .signal(&container.sandbox_id, &container.id, signal)
            .await?)
    }

    /// Waits until a container has exited.
    ///
    /// # Errors
    /// `NotFound`, also when it is removed meanwhile.
    pub async fn wait_container(&self, face: Face, id: &str) -> Result<Exit, LifecycleError> {
        let container = self.find_container(&self.store.snapshot(), face, id)?;
        self.exited(&container.id)
            .await
            .ok_or_else(|| LifecycleError::NotFound {
                kind: "container",
                id: id.to_owned(),
            })
    }

    /// Ends a container: signal, patience, SIGKILL to its cgroup.
    pub(super) async fn end_container(
        &self,
        container: &Container,
        grace: Option<Duration>,
    ) -> Result<(), LifecycleError> {
        if !container.is_running() {
            return Ok(());
        }
        let grace = grace.unwrap_or(container.config.stop_timeout);
        if !grace.is_zero() {
            self.ask_to_stop(container).await;
            let patience = tokio::time::timeout(grace, self.exited(&container.id));
            let ended = patience.await;
            if ended.is_ok() {
                return Ok(());
            }
        }
        self.kill_container(container).await
    }

    /// Kills everything in the container's cgroup and waits until its exit is committed.
    pub(super) async fn kill_container(&self, container: &Container) -> Result<(), LifecycleError> {
        let (cgroups, path) = (Arc::clone(&self.cgroups), container.cgroup.clone());
        blocking::run("kill cgroup", move || cgroups.kill(&path)).await?;
        let exited = tokio::time::timeout(KILL_PATIENCE, self.exited(&container.id)).await;
        if exited.is_ok() {
            return Ok(());
        }
        let (cgroups, path) = (Arc::clone(&self.cgroups), container.cgroup.clone());
        let left = blocking::run("list processes", move || cgroups.processes(&path)).await?;
        if left.is_empty() {
            // Nothing runs any more, and whoever should have told how it ended does not.
            self.container_lost(container, "its supervisor did not report its exit")
                .await
        } else {
            Err(wrong_state(container, "CONTAINER_EXITED"))
        }
    }

    /// Sends the stop signal unless another caller did.
    async fn ask_to_stop(&self, container: &Container) {
        let first = {
            let mut stopping = self
                .stopping
                .lock()
                .expect("no panic while this lock is held");
            let callers = stopping.entry(container.id.clone()).or_insert(0);
            *callers += 1;
            *callers == 1
        };
        if first {
            let sent = self
                .handler
                .signal(&container.sandbox_id, &container.id, container.stop_signal)
                .await;
            if let Err(error) = sent {
                // It may have ended just now; if not, SIGKILL follows when the time is up.
                tracing::debug!(container_id = %container.id, error = &error as &dyn std::error::Error, "stop signal not sent");
            }
        }
    }

    /// A container's stop is over: a later start of another attempt begins anew.
    pub(super) fn forget_stop(&self, id: &ContainerId) {
        self.stopping
            .lock()
            .expect("no panic while this lock is held")
            .remove(id);
    }

    /// Waits for the committed exit; none when the container is removed first.
    pub(super) async fn exited(&self, id: &ContainerId) -> Option<Exit> {
        let mut commits = self.store.commits();
        loop {
            commits.mark_unchanged();
            let container = self.store.snapshot().get::<Container>(id.as_str())?;
            if let ContainerState::Exited(exit) = &container.state {
                return Some(exit.clone());
            }
            // The store closes only when the agent ends.
            commits.changed().await.ok()?;
        }
    }
}
