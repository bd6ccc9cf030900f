//! UpdateContainerResources: limits change while it runs, or before it starts.

use std::sync::Arc;

use super::{
    Lifecycle, LifecycleError,
    container::{Container, Resources},
    spec,
    start_container::wrong_state,
};
use crate::{
    blocking,
    event::{EventDraft, EventKind},
    id::Face,
    store::Changes,
};

impl Lifecycle {
    /// Changes the limits that `wish` sets; the others stay.
    ///
    /// # Errors
    /// `NotFound`; `State` once it has exited; `Cgroup` if the kernel refuses, and then the old
    /// limits are in force.
    pub async fn update_container(
        &self,
        face: Face,
        id: &str,
        wish: &Resources,
    ) -> Result<(), LifecycleError> {
        let container = self.find_container(&self.store.snapshot(), face, id)?;
        if container.exit().is_some() {
            return Err(wrong_state(&container, "CONTAINER_RUNNING"));
        }
        let mut merged = container.config.resources.clone();
        merge(&mut merged, wish);
        spec::check_resources(&merged, self.cgroups.version())?;
        // All limits are written: some of the kernel's depend on each other.
        let before = spec::linux_resources(&container.config.resources);
        let changed = spec::linux_resources(&merged);
        let (cgroups, path) = (Arc::clone(&self.cgroups), container.cgroup.clone());
        blocking::run("update cgroup", move || {
            cgroups.update(&path, &changed).inspect_err(|_| {
                if let Err(error) = cgroups.update(&path, &before) {
                    tracing::warn!(
                        cgroup = path.as_str(),
                        error = &error as &dyn std::error::Error,
                        "old limits not restored"
                    );
                }
            })
        })
        .await?;
        // The state may have moved meanwhile: only the limits are taken from the older reading.
        let Some(current) = self
            .store
            .snapshot()
            .get::<Container>(container.id.as_str())
        else {
            return Ok(());
        };
        let mut current = Container::clone(&current);
        merge(&mut current.config.resources, wish);
        let event = EventDraft::new(EventKind::ContainerUpdated, current.config.face)
            .sandbox(&current.sandbox_id)
            .container(&current.id);
        self.store
            .commit(Changes::new().update(current).event(event))
            .await?;
        Ok(())
    }
}

fn merge(current: &mut Resources, wish: &Resources) {
    fn take<T: Clone>(current: &mut Option<T>, wish: &Option<T>) {
        if wish.is_some() {
            current.clone_from(wish);
        }
    }
    take(&mut current.cpu_period_us, &wish.cpu_period_us);
    take(&mut current.cpu_quota_us, &wish.cpu_quota_us);
    take(&mut current.cpu_shares, &wish.cpu_shares);
    take(&mut current.cpuset_cpus, &wish.cpuset_cpus);
    take(&mut current.cpuset_mems, &wish.cpuset_mems);
    take(&mut current.memory_limit_bytes, &wish.memory_limit_bytes);
    take(
        &mut current.memory_swap_limit_bytes,
        &wish.memory_swap_limit_bytes,
    );
    take(
        &mut current.memory_reservation_bytes,
        &wish.memory_reservation_bytes,
    );
    take(&mut current.pids_limit, &wish.pids_limit);
    if !wish.hugepages.is_empty() {
        current.hugepages.clone_from(&wish.hugepages);
    }
    current.unified.extend(wish.unified.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unset_limits_stay() {
        let mut current = Resources {
            cpu_shares: Some(100),
            memory_limit_bytes: Some(1 << 20),
            ..Resources::default()
        };
        let wish = Resources {
            memory_limit_bytes: Some(2 << 20),
            ..Resources::default()
        };
        merge(&mut current, &wish);
        assert_eq!(
            (current.cpu_shares, current.memory_limit_bytes),
            (Some(100), Some(2 << 20))
        );
    }
}
