//! Wall time, CPU time of the whole machine, and memory of processes.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use longshore_tests::host::pids;
use rustix::time::{ClockId, clock_gettime};

/// One measured call.
pub(crate) struct Cost {
    pub(crate) wall_ms: f64,
    pub(crate) cpu_ms: f64,
}

/// Measures one call.
pub(crate) struct Stopwatch {
    started: Instant,
    cpu: Duration,
}

impl Stopwatch {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self {
            cpu: others_cpu()?,
            started: Instant::now(),
        })
    }

    pub(crate) fn stop(self) -> Result<Cost> {
        let wall = self.started.elapsed();
        let cpu = others_cpu()?.saturating_sub(self.cpu);
        Ok(Cost {
            wall_ms: wall.as_secs_f64() * 1e3,
            cpu_ms: cpu.as_secs_f64() * 1e3,
        })
    }
}

/// CPU time of the machine less that of this process.
fn others_cpu() -> Result<Duration> {
    let own = clock_gettime(ClockId::ProcessCPUTime);
    let own = Duration::new(own.tv_sec.try_into()?, own.tv_nsec.try_into()?);
    Ok(machine_cpu()?.saturating_sub(own))
}

fn machine_cpu() -> Result<Duration> {
    if let Ok(text) = fs::read_to_string("/sys/fs/cgroup/cpuacct/cpuacct.usage") {
        return Ok(Duration::from_nanos(text.trim().parse()?));
    }
    let text = fs::read_to_string("/sys/fs/cgroup/cpu.stat")
        .context("neither cgroup v1 nor v2 counts CPU time")?;
    let usage = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .context("cpu.stat without usage_usec")?;
    Ok(Duration::from_micros(usage.parse()?))
}

/// Costs by name of the call.
#[derive(Default)]
pub(crate) struct Samples {
    costs: BTreeMap<String, Vec<Cost>>,
}

impl Samples {
    pub(crate) fn add(&mut self, name: &str, cost: Cost) {
        self.costs.entry(name.to_owned()).or_default().push(cost);
    }

    pub(crate) fn merge(&mut self, other: Self) {
        for (name, costs) in other.costs {
            self.costs.entry(name).or_default().extend(costs);
        }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.costs.keys().cloned().collect()
    }

    /// Median of the wall times, mean of the CPU times.
    pub(crate) fn cost(&self, name: &str) -> Option<Cost> {
        let costs = self.costs.get(name)?;
        let mut walls: Vec<f64> = costs.iter().map(|cost| cost.wall_ms).collect();
        walls.sort_by(f64::total_cmp);
        let count = f64::from(u32::try_from(costs.len()).ok()?);
        Some(Cost {
            wall_ms: *walls.get(walls.len() / 2)?,
            cpu_ms: costs.iter().map(|cost| cost.cpu_ms).sum::<f64>() / count,
        })
    }
}

/// Proportional set size of all processes whose command line begins with such a program.
pub(crate) fn pss_kib(program: &str) -> Result<u64> {
    let mut sum = 0;
    for pid in pids()? {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let first = command.split('\0').next().unwrap_or_default();
        if first.contains(program) {
            sum += field(&format!("/proc/{pid}/smaps_rollup"), "Pss:").unwrap_or_default();
        }
    }
    Ok(sum)
}

/// Resident set size of one process.
pub(crate) fn rss_kib(pid: u32) -> Result<u64> {
    field(&format!("/proc/{pid}/status"), "VmRSS:").context("VmRSS of the daemon")
}

fn field(path: &str, name: &str) -> Option<u64> {
    fs::read_to_string(path)
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix(name))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}
