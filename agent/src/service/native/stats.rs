//! Stats: what sandboxes and containers use, read again and again for one caller.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::stream;
use longshore_proto::longshore::v1 as pb;
use tokio::time::{Interval, MissedTickBehavior};

use super::{Native, Streamed, parse, render};
use crate::{
    blocking,
    cgroup::{CgroupMetrics, CgroupPath, Pressure, PressureLine},
    clock::Time,
    id::{ContainerId, SandboxId},
    lifecycle::{LifecycleError, container::Container, sandbox::Sandbox, stats::InterfaceUse},
};

/// A writable layer is walked to measure it: not more often than this.
const WRITABLE_EVERY: Duration = Duration::from_secs(10);

/// Whose use is wanted; everybody's if nobody is named.
#[derive(Default)]
pub(super) struct Wish {
    pub(super) sandboxes: HashSet<SandboxId>,
    pub(super) containers: HashSet<ContainerId>,
    pub(super) labels: HashMap<String, String>,
}

impl Wish {
    fn is_named(&self) -> bool {
        !(self.sandboxes.is_empty() && self.containers.is_empty())
    }

    fn wants_sandbox(&self, sandbox: &Sandbox) -> bool {
        (!self.is_named() || self.sandboxes.contains(&sandbox.id))
            && parse::labels_match(&self.labels, &sandbox.config.labels)
    }

    fn wants_container(&self, container: &Container) -> bool {
        let named = self.sandboxes.contains(&container.sandbox_id)
            || self.containers.contains(&container.id);
        (!self.is_named() || named) && parse::labels_match(&self.labels, &container.config.labels)
    }
}

/// Reads for one caller, and remembers what rates need.
pub(super) struct Sampler {
    native: Native,
    wish: Wish,
    /// CPU time at the message before, by id.
    cpu: HashMap<String, (Time, u64)>,
    writable: HashMap<ContainerId, (Instant, pb::FilesystemUsage)>,
}

impl Sampler {
    pub(super) fn new(native: Native, wish: Wish) -> Self {
        Self {
            native,
            wish,
            cpu: HashMap::new(),
            writable: HashMap::new(),
        }
    }

    /// One message now.
    pub(super) async fn sample(&mut self) -> pb::StatsResponse {
        let at = self.native.agent.store.snapshot();
        let sandboxes: Vec<_> = at
            .all::<Sandbox>()
            .filter(|sandbox| sandbox.is_ready() && self.wish.wants_sandbox(sandbox))
            .collect();
        let containers: Vec<_> = at
            .all::<Container>()
            .filter(|container| container.is_running() && self.wish.wants_container(container))
            .collect();
        let before = std::mem::take(&mut self.cpu);
        let time = Time::now();
        let mut response = pb::StatsResponse {
            time: Some(render::timestamp(time)),
            ..Default::default()
        };
        for sandbox in sandboxes {
            let stats = self.sandbox(&sandbox, &before).await;
            response.sandboxes.extend(there(stats));
        }
        for container in &containers {
            let stats = self.container(container, &before).await;
            response.containers.extend(there(stats));
        }
        self.writable
            .retain(|id, _| containers.iter().any(|container| container.id == *id));
        response
    }

    async fn sandbox(
        &mut self,
        sandbox: &Sandbox,
        before: &HashMap<String, (Time, u64)>,
    ) -> Result<pb::SandboxStats, LifecycleError> {
        let metrics = self.metrics(&sandbox.cgroup).await?;
        let interfaces = self.native.lifecycle().interfaces(sandbox).await?;
        Ok(pb::SandboxStats {
            sandbox_id: sandbox.id.to_string(),
            name: sandbox.config.key.name.clone(),
            cpu: Some(self.cpu(sandbox.id.as_str(), &metrics, before)),
            memory: Some(memory(&metrics)),
            pids: Some(pids(&metrics)),
            io: Some(io(&metrics)),
            interfaces: interfaces
                .iter()
                .map(|(name, usage)| interface(name, usage))
                .collect(),
        })
    }

    async fn container(
        &mut self,
        container: &Container,
        before: &HashMap<String, (Time, u64)>,
    ) -> Result<pb::ContainerStats, LifecycleError> {
        let metrics = self.metrics(&container.cgroup).await?;
        let writable_layer = self.writable(container).await?;
        Ok(pb::ContainerStats {
            container_id: container.id.to_string(),
            name: container.config.name.clone(),
            sandbox_id: container.sandbox_id.to_string(),
            cpu: Some(self.cpu(container.id.as_str(), &metrics, before)),
            memory: Some(memory(&metrics)),
            pids: Some(pids(&metrics)),
            io: Some(io(&metrics)),
            writable_layer: Some(writable_layer),
        })
    }

    async fn metrics(&self, path: &CgroupPath) -> Result<CgroupMetrics, LifecycleError> {
        let (cgroups, path) = (Arc::clone(&self.native.agent.cgroups), path.clone());
        Ok(blocking::run("read cgroup", move || cgroups.metrics(&path)).await?)
    }

    async fn writable(
        &mut self,
        container: &Container,
    ) -> Result<pb::FilesystemUsage, LifecycleError> {
        if let Some((at, known)) = self.writable.get(&container.id)
            && at.elapsed() < WRITABLE_EVERY
        {
            return Ok(known.clone());
        }
        let (rootfs, id) = (self.native.agent.rootfs.clone(), container.id.clone());
        let usage =
            blocking::run("measure writable layer", move || rootfs.writable_usage(&id)).await?;
        let data_dir = self.native.agent.config.data_dir.clone();
        let whole = super::node::filesystem_size(&data_dir).await;
        let usage = render::filesystem(Time::now(), &data_dir, usage.bytes, usage.inodes, whole);
        self.writable
            .insert(container.id.clone(), (Instant::now(), usage.clone()));
        Ok(usage)
    }

    fn cpu(
        &mut self,
        id: &str,
        metrics: &CgroupMetrics,
        before: &HashMap<String, (Time, u64)>,
    ) -> pb::CpuStats {
        let (now, usage) = (Time::now(), metrics.stats.cpu_usage_ns);
        self.cpu.insert(id.to_owned(), (now, usage));
        pb::CpuStats {
            usage: Some(render::nanoseconds(usage)),
            user: Some(render::nanoseconds(metrics.cpu_user_ns)),
            system: Some(render::nanoseconds(metrics.cpu_system_ns)),
            throttled: Some(render::nanoseconds(metrics.cpu_throttled_ns)),
            periods: metrics.cpu_periods,
            throttled_periods: metrics.cpu_throttled_periods,
            cores: before
                .get(id)
                .and_then(|before| cores(*before, (now, usage))),
            pressure: pressure(metrics, |all| &all.cpu),
        }
    }
}

/// What can't be read has just gone, and is left out.
fn there<T>(read: Result<T, LifecycleError>) -> Option<T> {
    read.inspect_err(|error| tracing::debug!(error = error as &dyn std::error::Error, "no stats"))
        .ok()
}

/// Processors used on average between two readings; none if no time has passed.
#[expect(clippy::cast_precision_loss, reason = "a rate of two digits")]
fn cores(before: (Time, u64), now: (Time, u64)) -> Option<f64> {
    let elapsed = now.0.unix_ns() - before.0.unix_ns();
    (elapsed > 0).then(|| now.1.saturating_sub(before.1) as f64 / elapsed as f64)
}

fn pressure(
    metrics: &CgroupMetrics,
    of: impl Fn(&crate::cgroup::PressureStats) -> &Pressure,
) -> Option<pb::Pressure> {
    let share = |line: &PressureLine| {
        Some(pb::PressureShare {
            total: Some(render::nanoseconds(line.total_ns)),
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
        })
    };
    let all = metrics
        .pressure
        .as_ref()
        .or(metrics.stats.pressure.as_ref())?;
    let pressure = of(all);
    Some(pb::Pressure {
        some: share(&pressure.some),
        full: share(&pressure.full),
    })
}

fn memory(metrics: &CgroupMetrics) -> pb::MemoryStats {
    let stats = &metrics.stats;
    pb::MemoryStats {
        usage_bytes: stats.memory_usage_bytes,
        working_set_bytes: stats.memory_working_set_bytes,
        rss_bytes: stats.memory_rss_bytes,
        limit_bytes: stats.memory_limit_bytes.unwrap_or(0),
        max_usage_bytes: metrics.memory_max_usage_bytes,
        swap_bytes: stats.swap_usage_bytes.unwrap_or(0),
        page_faults: stats.page_faults,
        major_page_faults: stats.major_page_faults,
        oom_kills: metrics.oom_kills,
        pressure: pressure(metrics, |all| &all.memory),
    }
}

fn pids(metrics: &CgroupMetrics) -> pb::PidsStats {
    pb::PidsStats {
        current: metrics.stats.tasks,
        limit: metrics.tasks_limit.unwrap_or(0),
    }
}

fn io(metrics: &CgroupMetrics) -> pb::IoStats {
    let mut total = pb::IoStats {
        pressure: pressure(metrics, |all| &all.io),
        ..Default::default()
    };
    for device in &metrics.io {
        total.read_bytes += device.read_bytes;
        total.written_bytes += device.write_bytes;
        total.reads += device.reads;
        total.writes += device.writes;
    }
    total
}

fn interface(name: &str, usage: &InterfaceUse) -> pb::InterfaceStats {
    pb::InterfaceStats {
        name: name.to_owned(),
        received_bytes: usage.rx_bytes,
        received_packets: usage.rx_packets,
        receive_errors: usage.rx_errors,
        receive_drops: usage.rx_dropped,
        sent_bytes: usage.tx_bytes,
        sent_packets: usage.tx_packets,
        send_errors: usage.tx_errors,
        send_drops: usage.tx_dropped,
    }
}

/// A message at once, then one each `interval` until the caller leaves; a slow one gets fewer.
pub(super) fn stream(
    sampler: Sampler,
    interval: Duration,
    one_shot: bool,
) -> Streamed<pb::StatsResponse> {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let first: Option<(Sampler, Interval)> = Some((sampler, ticks));
    Box::pin(stream::unfold(first, move |state| async move {
        let (mut sampler, mut ticks) = state?;
        ticks.tick().await;
        let response = sampler.sample().await;
        Some((Ok(response), (!one_shot).then_some((sampler, ticks))))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_usage_over_time() {
        let at = |ms: i64| Time::from_unix_ns(ms * 1_000_000);
        for (before, now, expected) in [
            ((at(0), 0), (at(1000), 500_000_000), Some(0.5)),
            ((at(0), 9), (at(1000), 3), Some(0.0)),
            ((at(5), 0), (at(5), 1), None),
            ((at(5), 0), (at(4), 1), None),
        ] {
            assert_eq!(cores(before, now), expected);
        }
    }
}
