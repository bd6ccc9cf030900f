//! Which system containers start with the host, and in which order.

use std::sync::Arc;

use tracing::{error, info};

use super::{
    super::{Lifecycle, LifecycleError},
    System,
};

impl Lifecycle {
    /// Starts what is to start by itself, one after the other; what fails holds up nobody. For a host
    /// that was started anew: what somebody has stopped since stays stopped when only the agent is.
    pub async fn autostart_systems(self: Arc<Self>) {
        let at = self.store.snapshot();
        for system in in_order(at.all::<System>().collect()) {
            match self.start_system(system.id.as_str()).await {
                Ok(_) => {
                    info!(system_id = %system.id, name = system.config.name, "started with the host")
                }
                // Somebody was faster, or has removed it.
                Err(LifecycleError::State { .. } | LifecycleError::NotFound { .. }) => continue,
                Err(error) => {
                    error!(system_id = %system.id, name = system.config.name, error = &error as &dyn std::error::Error, "does not start with the host");
                }
            }
            tokio::time::sleep(system.config.autostart.delay).await;
        }
    }
}

fn in_order(mut systems: Vec<Arc<System>>) -> Vec<Arc<System>> {
    systems.retain(|system| system.config.autostart.enabled);
    systems
        .sort_by_cached_key(|system| (system.config.autostart.order, system.config.name.clone()));
    systems
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::id::{ContainerId, Digest};

    fn system(name: &str, enabled: bool, order: i32) -> Arc<System> {
        let time = json!({"secs": 0, "nanos": 0});
        let record = json!({
            "id": ContainerId::random(),
            "config": {
                "name": name, "image": "i", "hostname": name, "labels": {},
                "resources": crate::lifecycle::container::Resources::default(),
                "mounts": [],
                "network": crate::network::SandboxNetwork::default(),
                "dns": null, "init": [], "halt_signal": null, "stop_timeout": time,
                "autostart": {"enabled": enabled, "order": order, "delay": time},
                "handler": "", "idempotency_key": "", "request": null,
            },
            "image_id": Digest::of(b"i"),
            "layers": [], "init": ["/sbin/init"],
            "ids": {"host_uid": 1, "host_gid": 1, "length": 65_536},
            "shares_ids": false,
            "created_at": crate::clock::Time::now(),
            "addresses": [], "starts": 0, "last_exit": null,
        });
        Arc::new(serde_json::from_value(record).expect("the record's own form"))
    }

    #[test]
    fn lower_ones_come_first_and_equal_ones_by_name() {
        let all = vec![
            system("d", true, 5),
            system("c", true, 0),
            system("b", false, -9),
            system("a", true, 0),
            system("e", true, -1),
        ];
        let names: Vec<_> = in_order(all)
            .iter()
            .map(|system| system.config.name.clone())
            .collect();
        assert_eq!(names, ["e", "a", "c", "d"]);
    }
}
