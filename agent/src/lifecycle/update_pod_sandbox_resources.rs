//! UpdatePodSandboxResources: what the caller has set on the cgroup above the pod, kept to be shown.

use super::{Lifecycle, LifecycleError, sandbox::Sandbox};
use crate::{id::Face, store::Changes};

impl Lifecycle {
    /// Keeps a changed request; the cgroups above the sandbox's are the caller's own, and those of
    /// its containers change with UpdateContainerResources.
    ///
    /// # Errors
    /// `NotFound`, `Ambiguous`, `Store`.
    ///
    /// Source: CRI contract 2.8.
    pub async fn update_pod_sandbox_resources(
        &self,
        face: Face,
        id: &str,
        change: impl FnOnce(&serde_json::Value) -> serde_json::Value,
    ) -> Result<(), LifecycleError> {
        let sandbox = self.find_sandbox(&self.store.snapshot(), face, id)?;
        let mut changed = Sandbox::clone(&sandbox);
        changed.config.request = change(&sandbox.config.request);
        self.store.commit(Changes::new().update(changed)).await?;
        Ok(())
    }
}
