//! What sandboxes and containers use, read from their cgroups and interfaces when asked.

use std::{collections::BTreeMap, sync::Arc};

use super::{Lifecycle, LifecycleError, container::Container, files, sandbox::Sandbox};
use crate::{
    blocking,
    cgroup::{CgroupMetrics, CgroupPath, CgroupStats},
    clock::Time,
    network::Mode,
    rootfs::Usage,
};

/// CPU time at a moment, kept to tell the rate at the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuSample {
    at: Time,
    usage_ns: u64,
    rate: Option<u64>,
}

/// Samples closer than this keep the earlier rate: over a few microseconds it would be noise.
const SHORTEST_INTERVAL_NS: i64 = 100_000_000;

/// What a container uses.
#[derive(Clone, Debug)]
pub struct ContainerUse {
    /// The container.
    pub container: Arc<Container>,
    /// When it was read.
    pub at: Time,
    /// Its cgroup's readings; none unless it has processes.
    pub cgroup: Option<CgroupStats>,
    /// CPU nanoseconds per second since the reading before; none at the first.
    pub cpu_rate_ns: Option<u64>,
    /// Its writable layer.
    pub writable: Usage,
}

/// What a sandbox uses.
#[derive(Clone, Debug)]
pub struct SandboxUse {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// When it was read.
    pub at: Time,
    /// Its cgroup's readings; none unless it is ready.
    pub cgroup: Option<CgroupStats>,
    /// CPU nanoseconds per second since the reading before.
    pub cpu_rate_ns: Option<u64>,
    /// Its interfaces by name, loopback left out; none with the host's network.
    pub interfaces: BTreeMap<String, InterfaceUse>,
    /// Its containers.
    pub containers: Vec<ContainerUse>,
}

/// What went through an interface, from its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceUse {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets received with an error.
    pub rx_errors: u64,
    /// Packets dropped on the way in.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
    /// Packets dropped on the way out.
    pub tx_dropped: u64,
}

impl Lifecycle {
    /// Reads what a container uses.
    ///
    /// # Errors
    /// `Cgroup`, `Rootfs` when a reading fails though the container is there.
    pub async fn container_use(
        &self,
        container: Arc<Container>,
    ) -> Result<ContainerUse, LifecycleError> {
        let live = container.exit().is_none();
        let cgroup = self.readings(&container.cgroup, live).await?;
        let (rootfs, id) = (self.rootfs.clone(), container.writable().clone());
        let writable =
            blocking::run("measure writable layer", move || rootfs.writable_usage(&id)).await?;
        let at = Time::now();
        Ok(ContainerUse {
            cpu_rate_ns: self.rate(container.id.as_str(), at, cgroup.as_ref()),
            container,
            at,
            cgroup,
            writable,
        })
    }

    /// Reads what a sandbox and its containers use.
    ///
    /// # Errors
    /// As [`Lifecycle::container_use`]; `File` when its interfaces can't be read.
    pub async fn sandbox_use(&self, sandbox: Arc<Sandbox>) -> Result<SandboxUse, LifecycleError> {
        let cgroup = self.readings(&sandbox.cgroup, sandbox.is_ready()).await?;
        let interfaces = self.interfaces(&sandbox).await?;
        let mut containers = Vec::new();
        for container in self.containers_of(&self.store.snapshot(), &sandbox.id) {
            containers.push(self.container_use(container).await?);
        }
        let at = Time::now();
        Ok(SandboxUse {
            cpu_rate_ns: self.rate(sandbox.id.as_str(), at, cgroup.as_ref()),
            sandbox,
            at,
            cgroup,
            interfaces,
            containers,
        })
    }

    /// Everything that the cgroup of a live container tells.
    ///
    /// # Errors
    /// `Cgroup`.
    pub async fn container_metrics(
        &self,
        container: &Container,
    ) -> Result<CgroupMetrics, LifecycleError> {
        let (cgroups, path) = (Arc::clone(&self.cgroups), container.cgroup.clone());
        Ok(blocking::run("read cgroup", move || cgroups.metrics(&path)).await?)
    }

    /// Interfaces of a sandbox with a network of its own.
    ///
    /// # Errors
    /// `File` when its network namespace is gone though it is ready.
    pub async fn interfaces(
        &self,
        sandbox: &Sandbox,
    ) -> Result<BTreeMap<String, InterfaceUse>, LifecycleError> {
        if !sandbox.is_ready() || sandbox.config.network.mode == Mode::Host {
            return Ok(BTreeMap::new());
        }
        let netns = files::namespace(&self.sandbox_dir(&sandbox.id), "net");
        blocking::run("read interfaces", move || {
            let text = longshore_sys::ns::in_netns(&netns, || {
                std::fs::read_to_string("/proc/thread-self/net/dev")
            })
            .and_then(|read| read)
            .map_err(LifecycleError::file("read interfaces of", netns))?;
            Ok(parse_interfaces(&text))
        })
        .await
    }

    async fn readings(
        &self,
        path: &CgroupPath,
        live: bool,
    ) -> Result<Option<CgroupStats>, LifecycleError> {
        if !live {
            return Ok(None);
        }
        let (cgroups, path) = (Arc::clone(&self.cgroups), path.clone());
        Ok(Some(
            blocking::run("read cgroup", move || cgroups.stats(&path)).await?,
        ))
    }

    fn rate(&self, id: &str, at: Time, readings: Option<&CgroupStats>) -> Option<u64> {
        let mut samples = self
            .samples
            .lock()
            .expect("no panic while this lock is held");
        let Some(readings) = readings else {
            samples.remove(id);
            return None;
        };
        let now = CpuSample {
            at,
            usage_ns: readings.cpu_usage_ns,
            rate: None,
        };
        let next = samples.get(id).map_or(now, |before| sample(*before, now));
        samples.insert(id.to_owned(), next);
        next.rate
    }

    /// Forgets the sample of what is gone.
    pub(super) fn forget_sample(&self, id: &str) {
        self.samples
            .lock()
            .expect("no panic while this lock is held")
            .remove(id);
    }
}

fn sample(before: CpuSample, now: CpuSample) -> CpuSample {
    let interval = now.at.unix_ns() - before.at.unix_ns();
    if interval < SHORTEST_INTERVAL_NS && before.rate.is_some() {
        return before;
    }
    let Ok(interval) = u128::try_from(interval) else {
        return now;
    };
    if interval == 0 {
        return now;
    }
    let used = u128::from(now.usage_ns.saturating_sub(before.usage_ns));
    CpuSample {
        rate: u64::try_from(used * 1_000_000_000 / interval).ok(),
        ..now
    }
}

/// `/proc/net/dev`: two lines of heading, then `name: 16 numbers`.
///
/// Source: proc_pid_net(5).
fn parse_interfaces(text: &str) -> BTreeMap<String, InterfaceUse> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let n: Vec<u64> = numbers
                .split_whitespace()
                .map(|number| number.parse().unwrap_or(0))
                .collect();
            let at = |index: usize| n.get(index).copied().unwrap_or(0);
            let usage = InterfaceUse {
                rx_bytes: at(0),
                rx_packets: at(1),
                rx_errors: at(2),
                rx_dropped: at(3),
                tx_bytes: at(8),
                tx_packets: at(9),
                tx_errors: at(10),
                tx_dropped: at(11),
            };
            Some((name.trim().to_owned(), usage))
        })
        .filter(|(name, _)| name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_without_loopback() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n  \
            eth0:    1500      12    1    2    0     0          0         0      900       9    3    4    0     0       0          0\n";
        let interfaces = parse_interfaces(text);
        assert_eq!(interfaces.len(), 1);
        assert_eq!(
            interfaces["eth0"],
            InterfaceUse {
                rx_bytes: 1500,
                rx_packets: 12,
                rx_errors: 1,
                rx_dropped: 2,
                tx_bytes: 900,
                tx_packets: 9,
                tx_errors: 3,
                tx_dropped: 4,
            }
        );
    }

    #[test]
    fn the_rate_is_usage_over_time() {
        let at = |ms: i64, usage_ns| CpuSample {
            at: Time::from_unix_ns(ms * 1_000_000),
            usage_ns,
            rate: None,
        };
        let half = sample(at(1000, 0), at(3000, 1_000_000_000));
        assert_eq!(half.rate, Some(500_000_000));
        let soon = sample(half, at(3001, 2_000_000_000));
        assert_eq!(
            soon.rate,
            Some(500_000_000),
            "a short interval keeps the rate"
        );
    }
}
