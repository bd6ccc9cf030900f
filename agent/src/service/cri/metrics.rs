//! ListMetricDescriptors and ListPodSandboxMetrics: one table says what there is and whence.
//!
//! Values are unsigned integers; seconds are truncated. Label values come in the order of the
//! label keys.

use longshore_proto::cri::v1 as cri;

use super::{Cri, filter};
use crate::{
    cgroup::CgroupMetrics,
    clock::Time,
    lifecycle::{
        container::Container,
        sandbox::Sandbox,
        stats::{ContainerUse, InterfaceUse},
    },
};

const BASE: [&str; 5] = ["pod", "namespace", "container", "id", "image"];
const NS: u64 = 1_000_000_000;

/// What a container's metric is computed from.
struct Reading<'a> {
    used: &'a ContainerUse,
    cgroup: &'a CgroupMetrics,
    processes: &'a Processes,
    /// Of the file system of the writable layers.
    disk: Option<&'a rustix::fs::StatVfs>,
}

/// What `/proc` tells of the processes of a container.
#[derive(Default)]
struct Processes {
    file_descriptors: u64,
    sockets: u64,
    open_files_limit: Option<u64>,
}

/// A metric of a container: further label keys, and its samples as (label values, value).
struct ContainerMetric {
    name: &'static str,
    help: &'static str,
    kind: cri::MetricType,
    labels: &'static [&'static str],
    samples: fn(&Reading<'_>) -> Vec<Sample>,
}

/// Values of further labels, and the value.
type Sample = (Vec<String>, u64);

fn one(value: u64) -> Vec<Sample> {
    vec![(Vec::new(), value)]
}

fn maybe(value: Option<u64>) -> Vec<Sample> {
    value.map_or_else(Vec::new, one)
}

const fn counter(
    name: &'static str,
    help: &'static str,
    samples: fn(&Reading<'_>) -> Vec<Sample>,
) -> ContainerMetric {
    ContainerMetric {
        name,
        help,
        kind: cri::MetricType::Counter,
        labels: &[],
        samples,
    }
}

const fn gauge(
    name: &'static str,
    help: &'static str,
    samples: fn(&Reading<'_>) -> Vec<Sample>,
) -> ContainerMetric {
    ContainerMetric {
        kind: cri::MetricType::Gauge,
        ..counter(name, help, samples)
    }
}

const fn labelled(metric: ContainerMetric, labels: &'static [&'static str]) -> ContainerMetric {
    ContainerMetric { labels, ..metric }
}

fn by_device(reading: &Reading<'_>, value: fn(&crate::cgroup::IoUsage) -> u64) -> Vec<Sample> {
    reading
        .cgroup
        .io
        .iter()
        .map(|io| (vec![format!("{}:{}", io.major, io.minor)], value(io)))
        .collect()
}

fn by_operation(reading: &Reading<'_>) -> Vec<Sample> {
    let mut samples = Vec::new();
    for io in &reading.cgroup.io {
        for (operation, value) in [("Read", io.read_bytes), ("Write", io.write_bytes)] {
            let device = format!("{}:{}", io.major, io.minor);
            let labels = vec![
                device,
                io.major.to_string(),
                io.minor.to_string(),
                operation.to_owned(),
            ];
            samples.push((labels, value));
        }
    }
    samples
}

fn faults(reading: &Reading<'_>) -> Vec<Sample> {
    let stats = &reading.cgroup.stats;
    let mut samples = Vec::new();
    for scope in ["container", "hierarchy"] {
        for (kind, value) in [
            ("pgfault", stats.page_faults),
            ("pgmajfault", stats.major_page_faults),
        ] {
            samples.push((vec![kind.to_owned(), scope.to_owned()], value));
        }
    }
    samples
}

/// File system of the writable layers, by device name as mount shows it.
fn filesystem(value: u64) -> Vec<Sample> {
    vec![(vec!["longshore".to_owned()], value)]
}

fn disk(reading: &Reading<'_>, choose: fn(&rustix::fs::StatVfs) -> u64) -> Vec<Sample> {
    reading
        .disk
        .map_or_else(Vec::new, |stat| filesystem(choose(stat)))
}

fn pressure(
    reading: &Reading<'_>,
    total_ns: fn(&crate::cgroup::PressureStats) -> u64,
) -> Vec<Sample> {
    maybe(
        reading
            .cgroup
            .stats
            .pressure
            .as_ref()
            .map(|pressure| total_ns(pressure) / NS),
    )
}

const CONTAINER_METRICS: &[ContainerMetric] = &[
    counter("container_cpu_usage_seconds_total", "CPU time used.", |r| {
        one(r.cgroup.stats.cpu_usage_ns / NS)
    }),
    counter(
        "container_cpu_user_seconds_total",
        "CPU time used in programs.",
        |r| one(r.cgroup.cpu_user_ns / NS),
    ),
    counter(
        "container_cpu_system_seconds_total",
        "CPU time used in the kernel.",
        |r| one(r.cgroup.cpu_system_ns / NS),
    ),
    counter(
        "container_cpu_cfs_periods_total",
        "Quota periods with something to run.",
        |r| one(r.cgroup.cpu_periods),
    ),
    counter(
        "container_cpu_cfs_throttled_periods_total",
        "Quota periods that were cut short.",
        |r| one(r.cgroup.cpu_throttled_periods),
    ),
    counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Time lost to the quota.",
        |r| one(r.cgroup.cpu_throttled_ns / NS),
    ),
    gauge("container_memory_cache", "Bytes of page cache.", |r| {
        one(r.cgroup.memory_cache_bytes)
    }),
    counter(
        "container_memory_failcnt",
        "Times the memory limit was hit.",
        |r| one(r.cgroup.memory_failures),
    ),
    gauge(
        "container_memory_kernel_usage",
        "Bytes of kernel memory.",
        |r| one(r.cgroup.memory_kernel_bytes),
    ),
    gauge(
        "container_memory_mapped_file",
        "Bytes of mapped files.",
        |r| one(r.cgroup.memory_mapped_file_bytes),
    ),
    gauge(
        "container_memory_max_usage_bytes",
        "Most bytes of memory ever used.",
        |r| one(r.cgroup.memory_max_usage_bytes),
    ),
    gauge("container_memory_rss", "Bytes of anonymous memory.", |r| {
        one(r.cgroup.stats.memory_rss_bytes)
    }),
    gauge("container_memory_swap", "Bytes of swap.", |r| {
        one(r.cgroup.stats.swap_usage_bytes.unwrap_or(0))
    }),
    gauge(
        "container_memory_usage_bytes",
        "Bytes of memory, page cache included.",
        |r| one(r.cgroup.stats.memory_usage_bytes),
    ),
    gauge(
        "container_memory_working_set_bytes",
        "Bytes of memory that can't simply be dropped.",
        |r| one(r.cgroup.stats.memory_working_set_bytes),
    ),
    labelled(
        counter("container_memory_failures_total", "Page faults.", faults),
        &["failure_type", "scope"],
    ),
    counter(
        "container_oom_events_total",
        "Processes killed for memory.",
        |r| one(r.cgroup.oom_kills),
    ),
    labelled(
        gauge(
            "container_hugetlb_usage_bytes",
            "Bytes of huge pages.",
            |r| {
                r.cgroup
                    .hugepages
                    .iter()
                    .map(|h| (vec![h.page_size.clone()], h.usage_bytes))
                    .collect()
            },
        ),
        &["pagesize"],
    ),
    labelled(
        gauge(
            "container_hugetlb_max_usage_bytes",
            "Most bytes of huge pages ever used.",
            |r| {
                r.cgroup
                    .hugepages
                    .iter()
                    .map(|h| (vec![h.page_size.clone()], h.max_usage_bytes))
                    .collect()
            },
        ),
        &["pagesize"],
    ),
    labelled(
        gauge(
            "container_fs_inodes_free",
            "Free inodes of the file system.",
            |r| disk(r, |s| s.f_ffree),
        ),
        &["device"],
    ),
    labelled(
        gauge(
            "container_fs_inodes_total",
            "Inodes of the file system.",
            |r| disk(r, |s| s.f_files),
        ),
        &["device"],
    ),
    labelled(
        gauge(
            "container_fs_limit_bytes",
            "Size of the file system.",
            |r| disk(r, |s| s.f_blocks * s.f_frsize),
        ),
        &["device"],
    ),
    labelled(
        gauge(
            "container_fs_usage_bytes",
            "Bytes of the writable layer.",
            |r| filesystem(r.used.writable.bytes),
        ),
        &["device"],
    ),
    labelled(
        counter(
            "container_fs_reads_bytes_total",
            "Bytes read from devices.",
            |r| by_device(r, |io| io.read_bytes),
        ),
        &["device"],
    ),
    labelled(
        counter("container_fs_reads_total", "Reads from devices.", |r| {
            by_device(r, |io| io.reads)
        }),
        &["device"],
    ),
    labelled(
        counter(
            "container_fs_writes_bytes_total",
            "Bytes written to devices.",
            |r| by_device(r, |io| io.write_bytes),
        ),
        &["device"],
    ),
    labelled(
        counter("container_fs_writes_total", "Writes to devices.", |r| {
            by_device(r, |io| io.writes)
        }),
        &["device"],
    ),
    labelled(
        counter(
            "container_blkio_device_usage_total",
            "Bytes moved by operation.",
            by_operation,
        ),
        &["device", "major", "minor", "operation"],
    ),
    gauge("container_processes", "Processes.", |r| {
        one(r.cgroup.processes)
    }),
    gauge("container_threads", "Threads.", |r| {
        one(r.cgroup.stats.tasks)
    }),
    gauge(
        "container_threads_max",
        "Threads allowed; 0 for no limit.",
        |r| one(r.cgroup.tasks_limit.unwrap_or(0)),
    ),
    gauge(
        "container_file_descriptors",
        "Open files of its processes.",
        |r| one(r.processes.file_descriptors),
    ),
    gauge("container_sockets", "Open sockets of its processes.", |r| {
        one(r.processes.sockets)
    }),
    labelled(
        gauge(
            "container_ulimits_soft",
            "Soft limits of its first process.",
            |r| {
                r.processes.open_files_limit.map_or_else(Vec::new, |limit| {
                    vec![(vec!["max_open_files".to_owned()], limit)]
                })
            },
        ),
        &["ulimit"],
    ),
    gauge(
        "container_spec_cpu_period",
        "Length of a quota period, microseconds.",
        |r| one(r.cgroup.cpu_period_us.unwrap_or(100_000)),
    ),
    gauge("container_spec_cpu_shares", "CPU weight.", |r| {
        // As wished: version 2 keeps a coarser weight.
        let wished = r.used.container.config.resources.cpu_shares;
        one(wished.unwrap_or(1024))
    }),
    gauge(
        "container_spec_cpu_quota",
        "CPU time per period, microseconds.",
        |r| maybe(r.cgroup.cpu_quota_us),
    ),
    gauge(
        "container_spec_memory_limit_bytes",
        "Memory limit; 0 for none.",
        |r| one(r.cgroup.stats.memory_limit_bytes.unwrap_or(0)),
    ),
    gauge(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap; 0 for none.",
        |r| one(r.cgroup.memory_swap_limit_bytes.unwrap_or(0)),
    ),
    gauge(
        "container_spec_memory_reservation_limit_bytes",
        "Soft memory limit.",
        |r| maybe(r.cgroup.memory_reservation_bytes),
    ),
    gauge(
        "container_start_time_seconds",
        "When it was started.",
        |r| {
            one(r
                .used
                .container
                .started_at()
                .map_or(0, |at| at.unix_ns().cast_unsigned() / NS))
        },
    ),
    gauge("container_last_seen", "When it was last looked at.", |r| {
        one(r.used.at.unix_ns().cast_unsigned() / NS)
    }),
    counter(
        "container_pressure_cpu_waiting_seconds_total",
        "Time in which some tasks waited for a CPU.",
        |r| pressure(r, |p| p.cpu.some.total_ns),
    ),
    counter(
        "container_pressure_cpu_stalled_seconds_total",
        "Time in which all tasks waited for a CPU.",
        |r| pressure(r, |p| p.cpu.full.total_ns),
    ),
    counter(
        "container_pressure_io_waiting_seconds_total",
        "Time in which some tasks waited for a device.",
        |r| pressure(r, |p| p.io.some.total_ns),
    ),
    counter(
        "container_pressure_io_stalled_seconds_total",
        "Time in which all tasks waited for a device.",
        |r| pressure(r, |p| p.io.full.total_ns),
    ),
    counter(
        "container_pressure_memory_waiting_seconds_total",
        "Time in which some tasks waited for memory.",
        |r| pressure(r, |p| p.memory.some.total_ns),
    ),
    counter(
        "container_pressure_memory_stalled_seconds_total",
        "Time in which all tasks waited for memory.",
        |r| pressure(r, |p| p.memory.full.total_ns),
    ),
];

/// A metric of a sandbox, with a sample for each interface.
struct NetworkMetric {
    name: &'static str,
    help: &'static str,
    value: fn(&InterfaceUse) -> u64,
}

const NETWORK_METRICS: &[NetworkMetric] = &[
    NetworkMetric {
        name: "container_network_receive_bytes_total",
        help: "Bytes received.",
        value: |i| i.rx_bytes,
    },
    NetworkMetric {
        name: "container_network_receive_errors_total",
        help: "Packets received with an error.",
        value: |i| i.rx_errors,
    },
    NetworkMetric {
        name: "container_network_receive_packets_total",
        help: "Packets received.",
        value: |i| i.rx_packets,
    },
    NetworkMetric {
        name: "container_network_receive_packets_dropped_total",
        help: "Packets dropped on the way in.",
        value: |i| i.rx_dropped,
    },
    NetworkMetric {
        name: "container_network_transmit_bytes_total",
        help: "Bytes sent.",
        value: |i| i.tx_bytes,
    },
    NetworkMetric {
        name: "container_network_transmit_errors_total",
        help: "Packets that could not be sent.",
        value: |i| i.tx_errors,
    },
    NetworkMetric {
        name: "container_network_transmit_packets_total",
        help: "Packets sent.",
        value: |i| i.tx_packets,
    },
    NetworkMetric {
        name: "container_network_transmit_packets_dropped_total",
        help: "Packets dropped on the way out.",
        value: |i| i.tx_dropped,
    },
];

/// Everything that is measured.
pub(super) fn descriptors() -> Vec<cri::MetricDescriptor> {
    let descriptor = |name: &str, help: &str, labels: &[&str]| cri::MetricDescriptor {
        name: name.to_owned(),
        help: help.to_owned(),
        label_keys: BASE
            .iter()
            .chain(labels)
            .map(|key| (*key).to_owned())
            .collect(),
    };
    let containers = CONTAINER_METRICS
        .iter()
        .map(|metric| descriptor(metric.name, metric.help, metric.labels));
    let networks = NETWORK_METRICS
        .iter()
        .map(|metric| descriptor(metric.name, metric.help, &["interface"]));
    containers.chain(networks).collect()
}

impl Cri {
    /// Readings of all ready sandboxes.
    pub(super) async fn metrics(&self) -> Vec<cri::PodSandboxMetrics> {
        let lifecycle = &self.agent.lifecycle;
        let sandboxes = filter::sandboxes(
            lifecycle,
            &self.agent.store.snapshot(),
            &filter::Wish::default(),
        );
        let mut all = Vec::new();
        for sandbox in sandboxes.into_iter().filter(|sandbox| sandbox.is_ready()) {
            let interfaces = lifecycle.interfaces(&sandbox).await.unwrap_or_default();
            let base = sandbox_labels(&sandbox);
            let metrics = NETWORK_METRICS.iter().flat_map(|metric| {
                let base = base.clone();
                interfaces.iter().map(move |(name, usage)| {
                    let mut labels = base.clone();
                    labels.push(name.clone());
                    sample(
                        metric.name,
                        cri::MetricType::Counter,
                        labels,
                        (metric.value)(usage),
                    )
                })
            });
            all.push(cri::PodSandboxMetrics {
                pod_sandbox_id: sandbox.id.to_string(),
                metrics: metrics.collect(),
                container_metrics: self.container_metrics(&sandbox).await,
            });
        }
        all
    }

    /// A container that goes away meanwhile is left out.
    async fn container_metrics(&self, sandbox: &Sandbox) -> Vec<cri::ContainerMetrics> {
        let lifecycle = &self.agent.lifecycle;
        let mut all = Vec::new();
        for container in lifecycle.containers_of(&self.agent.store.snapshot(), &sandbox.id) {
            if !container.is_running() {
                continue;
            }
            let Ok(cgroup) = lifecycle.container_metrics(&container).await else {
                continue;
            };
            let Ok(used) = lifecycle.container_use(container).await else {
                continue;
            };
            let (cgroups, path) = (self.agent.cgroups.clone(), used.container.cgroup.clone());
            let data_dir = self.agent.config.data_dir.clone();
            let (processes, disk) = crate::blocking::run("read processes", move || {
                let processes = processes(&cgroups.processes(&path).unwrap_or_default());
                (processes, rustix::fs::statvfs(&data_dir).ok())
            })
            .await;
            let reading = Reading {
                used: &used,
                cgroup: &cgroup,
                processes: &processes,
                disk: disk.as_ref(),
            };
            all.push(render(sandbox, &reading));
        }
        all
    }
}

fn render(sandbox: &Sandbox, reading: &Reading<'_>) -> cri::ContainerMetrics {
    let base = container_labels(sandbox, &reading.used.container);
    let metrics = CONTAINER_METRICS.iter().flat_map(|metric| {
        (metric.samples)(reading).into_iter().map(|(more, value)| {
            let labels = base.iter().cloned().chain(more).collect();
            sample(metric.name, metric.kind, labels, value)
        })
    });
    cri::ContainerMetrics {
        container_id: reading.used.container.id.to_string(),
        metrics: metrics.collect(),
    }
}

fn sample(name: &str, kind: cri::MetricType, label_values: Vec<String>, value: u64) -> cri::Metric {
    cri::Metric {
        name: name.to_owned(),
        timestamp: Time::now().unix_ns(),
        metric_type: kind.into(),
        label_values,
        value: Some(cri::UInt64Value { value }),
    }
}

fn sandbox_labels(sandbox: &Sandbox) -> Vec<String> {
    let key = &sandbox.config.key;
    vec![
        key.name.clone(),
        key.namespace.clone(),
        "POD".to_owned(),
        sandbox.id.to_string(),
        String::new(),
    ]
}

fn container_labels(sandbox: &Sandbox, container: &Container) -> Vec<String> {
    let key = &sandbox.config.key;
    vec![
        key.name.clone(),
        key.namespace.clone(),
        container.config.name.clone(),
        container.id.to_string(),
        container.config.image_name.clone(),
    ]
}

/// Counts open files and sockets; a process that has ended counts nothing.
fn processes(pids: &[i32]) -> Processes {
    let mut found = Processes::default();
    for (index, pid) in pids.iter().enumerate() {
        if index == 0 {
            found.open_files_limit = open_files_limit(*pid);
        }
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.flatten() {
            found.file_descriptors += 1;
            let is_socket = std::fs::read_link(entry.path())
                .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
            found.sockets += u64::from(is_socket);
        }
    }
    found
}

/// Soft limit of open files, from `/proc/PID/limits`.
fn open_files_limit(pid: i32) -> Option<u64> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_metric_has_labels_and_a_name_of_its_own() {
        let descriptors = descriptors();
        let names: HashSet<_> = descriptors.iter().map(|d| d.name.clone()).collect();
        assert_eq!(names.len(), descriptors.len());
        assert_eq!(descriptors.len(), 56);
        assert!(
            descriptors
                .iter()
                .all(|d| d.label_keys.len() >= BASE.len() && !d.help.is_empty())
        );
    }
}
