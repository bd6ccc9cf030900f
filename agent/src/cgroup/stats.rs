//! What a cgroup uses: a handful of small files, no directory is walked.
//!
//! [`Cgroups::stats`] is what a list of containers needs and is kept to the fewest files;
//! [`Cgroups::metrics`] adds what only a metrics scrape wants.

use std::path::{Path, PathBuf};

use super::{CgroupError, CgroupPath, CgroupVersion, Cgroups, file};

/// What a cgroup uses now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CgroupStats {
    /// CPU time of all that ever ran in it, nanoseconds.
    pub cpu_usage_ns: u64,
    /// Memory charged to it, page cache included.
    pub memory_usage_bytes: u64,
    /// Usage without inactive file pages: what the kernel cannot simply drop.
    pub memory_working_set_bytes: u64,
    /// Anonymous memory.
    pub memory_rss_bytes: u64,
    /// Its limit, if it has one.
    pub memory_limit_bytes: Option<u64>,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that waited for a disk.
    pub major_page_faults: u64,
    /// Swap in use; `None` without swap accounting.
    pub swap_usage_bytes: Option<u64>,
    /// Swap that may be used; `None` for no limit or no accounting.
    pub swap_limit_bytes: Option<u64>,
    /// Threads.
    pub tasks: u64,
    /// Time spent waiting for resources; version 2 only, and only if the kernel measures it.
    pub pressure: Option<PressureStats>,
}

/// Waiting for each resource.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PressureStats {
    /// For a CPU.
    pub cpu: Pressure,
    /// For memory.
    pub memory: Pressure,
    /// For a disk.
    pub io: Pressure,
}

/// Waiting for one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// At least one task waited.
    pub some: PressureLine,
    /// All tasks waited.
    pub full: PressureLine,
}

/// A share of wall time lost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PressureLine {
    /// In all, nanoseconds.
    pub total_ns: u64,
    /// Per cent of the last 10 seconds.
    pub avg10: f64,
    /// Per cent of the last 60 seconds.
    pub avg60: f64,
    /// Per cent of the last 300 seconds.
    pub avg300: f64,
}

/// All that can be read of a cgroup.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CgroupMetrics {
    /// The common part.
    pub stats: CgroupStats,
    /// CPU time in user mode, nanoseconds.
    pub cpu_user_ns: u64,
    /// CPU time in the kernel, nanoseconds.
    pub cpu_system_ns: u64,
    /// Periods of the CPU quota that have passed.
    pub cpu_periods: u64,
    /// Periods in which the quota was used up.
    pub cpu_throttled_periods: u64,
    /// Time lost to the quota, nanoseconds.
    pub cpu_throttled_ns: u64,
    /// `cpu.shares`, or the weight of version 2 as it is.
    pub cpu_shares: Option<u64>,
    /// CPU quota in a period, microseconds.
    pub cpu_quota_us: Option<u64>,
    /// Period of the quota, microseconds.
    pub cpu_period_us: Option<u64>,
    /// Page cache.
    pub memory_cache_bytes: u64,
    /// Mapped files.
    pub memory_mapped_file_bytes: u64,
    /// The kernel's own memory for it.
    pub memory_kernel_bytes: u64,
    /// Highest usage so far; 0 where the kernel does not keep it.
    pub memory_max_usage_bytes: u64,
    /// Times that the limit was hit.
    pub memory_failures: u64,
    /// Soft limit (version 1) or low protection (version 2).
    pub memory_reservation_bytes: Option<u64>,
    /// Memory and swap together (version 1) or their sum (version 2).
    pub memory_swap_limit_bytes: Option<u64>,
    /// Processes killed because a memory limit was reached.
    pub oom_kills: u64,
    /// Processes.
    pub processes: u64,
    /// Threads allowed.
    pub tasks_limit: Option<u64>,
    /// Time spent waiting for resources, on hybrid hosts too.
    pub pressure: Option<PressureStats>,
    /// Disks used, by device number.
    pub io: Vec<IoUsage>,
    /// Huge pages by size; empty without their controller.
    pub hugepages: Vec<HugepageUsage>,
}

/// Traffic with one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoUsage {
    /// Major device number.
    pub major: u32,
    /// Minor device number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugepageUsage {
    /// Size as the kernel names it, e.g. `2MB`.
    pub page_size: String,
    /// In use.
    pub usage_bytes: u64,
    /// Highest usage so far.
    pub max_usage_bytes: u64,
}

/// Version 1 says "no limit" with a huge number rounded to pages.
const V1_UNLIMITED: u64 = 1 << 62;

impl Cgroups {
    /// Reads what a list of containers needs.
    ///
    /// # Errors
    /// `Absent` if the cgroup is not there. A controller that the host lacks leaves zeros.
    pub fn stats(&self, path: &CgroupPath) -> Result<CgroupStats, CgroupError> {
        match self.version() {
            CgroupVersion::V1 => self.v1_stats(path),
            CgroupVersion::V2 => v2_stats(&self.require_unified(path)?),
        }
    }

    /// Reads all there is.
    ///
    /// # Errors
    /// `Absent` if the cgroup is not there.
    pub fn metrics(&self, path: &CgroupPath) -> Result<CgroupMetrics, CgroupError> {
        let stats = self.stats(path)?;
        let mut metrics = match self.version() {
            CgroupVersion::V1 => self.v1_metrics(path)?,
            CgroupVersion::V2 => v2_metrics(&self.require_unified(path)?)?,
        };
        metrics.oom_kills = self.oom_kills(path)?;
        // On hybrid hosts too: pressure needs no controller.
        metrics.pressure = match (stats.pressure, self.hierarchies.unified_dir(path)) {
            (None, Some(dir)) => pressure(&dir)?,
            (known, _) => known,
        };
        metrics.processes = self.processes(path)?.len() as u64;
        if self.version() == CgroupVersion::V2 {
            metrics.memory_swap_limit_bytes = stats
                .swap_limit_bytes
                .zip(stats.memory_limit_bytes)
                .map(|(swap, memory)| swap.saturating_add(memory));
        }
        metrics.stats = stats;
        Ok(metrics)
    }

    /// Bytes charged to a cgroup now; 0 without a memory controller.
    pub(super) fn memory_usage(&self, path: &CgroupPath) -> Result<u64, CgroupError> {
        let (dir, name) = match self.version() {
            CgroupVersion::V1 => (self.v1_dir("memory", path), "memory.usage_in_bytes"),
            CgroupVersion::V2 => (self.hierarchies.unified_dir(path), "memory.current"),
        };
        match dir {
            Some(dir) => number_or_zero(&dir.join(name)),
            None => Ok(0),
        }
    }

    fn require_unified(&self, path: &CgroupPath) -> Result<PathBuf, CgroupError> {
        self.hierarchies
            .unified_dir(path)
            .ok_or(CgroupError::NoHierarchy)
    }

    fn v1_stats(&self, path: &CgroupPath) -> Result<CgroupStats, CgroupError> {
        let mut stats = CgroupStats::default();
        if let Some(dir) = self.v1_dir("cpuacct", path) {
            stats.cpu_usage_ns = file::read_number(&dir.join("cpuacct.usage"))?;
        }
        if let Some(dir) = self.v1_dir("memory", path) {
            let stat = file::read(&dir.join("memory.stat"))?;
            let usage = file::read_number(&dir.join("memory.usage_in_bytes"))?;
            stats.fill_memory(usage, &stat, &V1_WORDS);
            // Nothing above has a limit, so this one has none: a file less to read.
            if limited(file::keyed(&stat, "hierarchical_memory_limit")).is_some() {
                stats.memory_limit_bytes =
                    limited(file::read_limit(&dir.join("memory.limit_in_bytes"))?);
            }
            if self.swap_accounting {
                stats.swap_usage_bytes = file::keyed(&stat, "total_swap");
            }
            if self.swap_accounting
                && let Some(memory) = stats.memory_limit_bytes
            {
                let both = limited(file::read_limit(&dir.join("memory.memsw.limit_in_bytes"))?);
                stats.swap_limit_bytes = both.map(|both| both.saturating_sub(memory));
            }
        }
        if let Some(dir) = self.v1_dir("pids", path) {
            stats.tasks = file::read_number(&dir.join("pids.current"))?;
        }
        Ok(stats)
    }

    fn v1_metrics(&self, path: &CgroupPath) -> Result<CgroupMetrics, CgroupError> {
        let mut metrics = CgroupMetrics::default();
        if let Some(dir) = self.v1_dir("cpuacct", path) {
            metrics.cpu_user_ns = number_or_zero(&dir.join("cpuacct.usage_user"))?;
            metrics.cpu_system_ns = number_or_zero(&dir.join("cpuacct.usage_sys"))?;
        }
        if let Some(dir) = self.v1_dir("cpu", path) {
            let stat = file::read(&dir.join("cpu.stat"))?;
            metrics.cpu_periods = file::keyed(&stat, "nr_periods").unwrap_or(0);
            metrics.cpu_throttled_periods = file::keyed(&stat, "nr_throttled").unwrap_or(0);
            metrics.cpu_throttled_ns = file::keyed(&stat, "throttled_time").unwrap_or(0);
            metrics.cpu_shares = file::read_limit(&dir.join("cpu.shares"))?;
            metrics.cpu_period_us = file::read_limit(&dir.join("cpu.cfs_period_us"))?;
            metrics.cpu_quota_us = file::read_if_there(&dir.join("cpu.cfs_quota_us"))?
                .and_then(|quota| quota.trim().parse().ok());
        }
        if let Some(dir) = self.v1_dir("memory", path) {
            metrics.fill_memory(&file::read(&dir.join("memory.stat"))?, &V1_WORDS);
            metrics.memory_kernel_bytes = number_or_zero(&dir.join("memory.kmem.usage_in_bytes"))?;
            metrics.memory_max_usage_bytes =
                number_or_zero(&dir.join("memory.max_usage_in_bytes"))?;
            metrics.memory_failures = number_or_zero(&dir.join("memory.failcnt"))?;
            metrics.memory_reservation_bytes =
                limited(file::read_limit(&dir.join("memory.soft_limit_in_bytes"))?);
            metrics.memory_swap_limit_bytes =
                limited(file::read_limit(&dir.join("memory.memsw.limit_in_bytes"))?);
        }
        if let Some(dir) = self.v1_dir("blkio", path) {
            metrics.io = v1_io(
                &text_or_empty(&dir.join("blkio.throttle.io_service_bytes_recursive"))?,
                &text_or_empty(&dir.join("blkio.throttle.io_serviced_recursive"))?,
            );
        }
        if let Some(dir) = self.v1_dir("pids", path) {
            metrics.tasks_limit = file::read_limit(&dir.join("pids.max"))?;
        }
        if let Some(dir) = self.v1_dir("hugetlb", path) {
            metrics.hugepages = hugepages(&dir, "usage_in_bytes", "max_usage_in_bytes")?;
        }
        Ok(metrics)
    }
}

/// How the versions name the same things in `memory.stat`.
struct Words {
    inactive_file: &'static str,
    rss: &'static str,
    page_faults: &'static str,
    major_page_faults: &'static str,
    cache: &'static str,
    mapped_file: &'static str,
}

const V1_WORDS: Words = Words {
    inactive_file: "total_inactive_file",
    rss: "total_rss",
    page_faults: "total_pgfault",
    major_page_faults: "total_pgmajfault",
    cache: "total_cache",
    mapped_file: "total_mapped_file",
};

const V2_WORDS: Words = Words {
    inactive_file: "inactive_file",
    rss: "anon",
    page_faults: "pgfault",
    major_page_faults: "pgmajfault",
    cache: "file",
    mapped_file: "file_mapped",
};

impl CgroupStats {
    fn fill_memory(&mut self, usage: u64, stat: &str, words: &Words) {
        let value = |word| file::keyed(stat, word).unwrap_or(0);
        self.memory_usage_bytes = usage;
        self.memory_working_set_bytes = usage.saturating_sub(value(words.inactive_file));
        self.memory_rss_bytes = value(words.rss);
        self.page_faults = value(words.page_faults);
        self.major_page_faults = value(words.major_page_faults);
    }
}

impl CgroupMetrics {
    fn fill_memory(&mut self, stat: &str, words: &Words) {
        let value = |word| file::keyed(stat, word).unwrap_or(0);
        self.memory_cache_bytes = value(words.cache);
        self.memory_mapped_file_bytes = value(words.mapped_file);
    }
}

fn v2_stats(dir: &Path) -> Result<CgroupStats, CgroupError> {
    let mut stats = CgroupStats::default();
    // In every cgroup, also without the cpu controller: so this one tells whether it is there.
    let cpu = file::read(&dir.join("cpu.stat"))?;
    stats.cpu_usage_ns = file::keyed(&cpu, "usage_usec")
        .unwrap_or(0)
        .saturating_mul(1000);
    if let Some(stat) = file::read_if_there(&dir.join("memory.stat"))? {
        let usage = number_or_zero(&dir.join("memory.current"))?;
        stats.fill_memory(usage, &stat, &V2_WORDS);
        stats.memory_limit_bytes = file::read_limit(&dir.join("memory.max"))?;
        stats.swap_usage_bytes = file::read_limit(&dir.join("memory.swap.current"))?;
        stats.swap_limit_bytes = file::read_limit(&dir.join("memory.swap.max"))?;
    }
    stats.tasks = number_or_zero(&dir.join("pids.current"))?;
    stats.pressure = pressure(dir)?;
    Ok(stats)
}

fn v2_metrics(dir: &Path) -> Result<CgroupMetrics, CgroupError> {
    let mut metrics = CgroupMetrics::default();
    let cpu = file::read(&dir.join("cpu.stat"))?;
    let ns = |key| file::keyed(&cpu, key).unwrap_or(0).saturating_mul(1000);
    metrics.cpu_user_ns = ns("user_usec");
    metrics.cpu_system_ns = ns("system_usec");
    metrics.cpu_periods = file::keyed(&cpu, "nr_periods").unwrap_or(0);
    metrics.cpu_throttled_periods = file::keyed(&cpu, "nr_throttled").unwrap_or(0);
    metrics.cpu_throttled_ns = ns("throttled_usec");
    metrics.cpu_shares = file::read_limit(&dir.join("cpu.weight"))?;
    if let Some(max) = file::read_if_there(&dir.join("cpu.max"))? {
        let mut numbers = max.split_whitespace();
        metrics.cpu_quota_us = numbers.next().and_then(|quota| quota.parse().ok());
        metrics.cpu_period_us = numbers.next().and_then(|period| period.parse().ok());
    }
    if let Some(stat) = file::read_if_there(&dir.join("memory.stat"))? {
        metrics.fill_memory(&stat, &V2_WORDS);
        metrics.memory_kernel_bytes = file::keyed(&stat, "kernel").unwrap_or(0);
        metrics.memory_max_usage_bytes = number_or_zero(&dir.join("memory.peak"))?;
        metrics.memory_failures =
            file::keyed(&text_or_empty(&dir.join("memory.events"))?, "max").unwrap_or(0);
        metrics.memory_reservation_bytes =
            file::read_limit(&dir.join("memory.low"))?.filter(|&bytes| bytes > 0);
    }
    metrics.tasks_limit = file::read_limit(&dir.join("pids.max"))?;
    metrics.io = v2_io(&text_or_empty(&dir.join("io.stat"))?);
    metrics.hugepages = hugepages(dir, "current", "max_usage")?;
    Ok(metrics)
}

/// Pressure of a cgroup; `None` where the kernel does not measure it.
fn pressure(dir: &Path) -> Result<Option<PressureStats>, CgroupError> {
    let read = |name: &str| -> Result<Option<Pressure>, CgroupError> {
        Ok(file::read_if_there(&dir.join(name))?.map(|text| parse_pressure(&text)))
    };
    let Some(cpu) = read("cpu.pressure")? else {
        return Ok(None);
    };
    Ok(Some(PressureStats {
        cpu,
        memory: read("memory.pressure")?.unwrap_or_default(),
        io: read("io.pressure")?.unwrap_or_default(),
    }))
}

fn parse_pressure(text: &str) -> Pressure {
    let line = |kind: &str| {
        let mut parsed = PressureLine::default();
        let words = text.lines().find_map(|line| {
            let (first, rest) = line.split_once(' ')?;
            (first == kind).then_some(rest)
        });
        for word in words.unwrap_or_default().split(' ') {
            match word.split_once('=') {
                Some(("avg10", value)) => parsed.avg10 = value.parse().unwrap_or(0.0),
                Some(("avg60", value)) => parsed.avg60 = value.parse().unwrap_or(0.0),
                Some(("avg300", value)) => parsed.avg300 = value.parse().unwrap_or(0.0),
                Some(("total", value)) => {
                    parsed.total_ns = value.parse::<u64>().unwrap_or(0).saturating_mul(1000);
                }
                _ => {}
            }
        }
        parsed
    };
    Pressure {
        some: line("some"),
        full: line("full"),
    }
}

/// Parses the two `blkio.throttle` files: `8:0 Read 4096` a line, `Total 4096` last.
fn v1_io(bytes: &str, operations: &str) -> Vec<IoUsage> {
    let mut usage: Vec<IoUsage> = Vec::new();
    let lines = bytes
        .lines()
        .map(|line| (line, true))
        .chain(operations.lines().map(|line| (line, false)));
    for (line, is_bytes) in lines {
        let mut words = line.split(' ');
        let (Some((major, minor)), Some(kind), Some(Ok(value))) = (
            words.next().and_then(device_number),
            words.next(),
            words.next().map(str::parse::<u64>),
        ) else {
            continue;
        };
        let one = of_device(&mut usage, major, minor);
        match (kind, is_bytes) {
            ("Read", true) => one.read_bytes = value,
            ("Write", true) => one.write_bytes = value,
            ("Read", false) => one.reads = value,
            ("Write", false) => one.writes = value,
            _ => {}
        }
    }
    usage
}

/// Parses `io.stat`: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0` a line.
fn v2_io(stat: &str) -> Vec<IoUsage> {
    let mut usage = Vec::new();
    for line in stat.lines() {
        let mut words = line.split(' ');
        let Some((major, minor)) = words.next().and_then(device_number) else {
            continue;
        };
        let one = of_device(&mut usage, major, minor);
        for word in words {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => one.read_bytes = value,
                "wbytes" => one.write_bytes = value,
                "rios" => one.reads = value,
                "wios" => one.writes = value,
                _ => {}
            }
        }
    }
    usage
}

fn device_number(word: &str) -> Option<(u32, u32)> {
    let (major, minor) = word.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn of_device(usage: &mut Vec<IoUsage>, major: u32, minor: u32) -> &mut IoUsage {
    let at = usage
        .iter()
        .position(|one| (one.major, one.minor) == (major, minor))
        .unwrap_or_else(|| {
            usage.push(IoUsage {
                major,
                minor,
                ..IoUsage::default()
            });
            usage.len() - 1
        });
    &mut usage[at]
}

/// Sizes differ by machine; these are all that Linux has on x86-64 and arm64.
const HUGEPAGE_SIZES: &[&str] = &["64KB", "2MB", "32MB", "512MB", "1GB", "16GB"];

fn hugepages(dir: &Path, usage: &str, max: &str) -> Result<Vec<HugepageUsage>, CgroupError> {
    let mut found = Vec::new();
    for size in HUGEPAGE_SIZES {
        let Some(usage_bytes) = file::read_limit(&dir.join(format!("hugetlb.{size}.{usage}")))?
        else {
            continue;
        };
        found.push(HugepageUsage {
            page_size: (*size).to_owned(),
            usage_bytes,
            max_usage_bytes: number_or_zero(&dir.join(format!("hugetlb.{size}.{max}")))?,
        });
    }
    Ok(found)
}

fn limited(limit: Option<u64>) -> Option<u64> {
    limit.filter(|&limit| limit < V1_UNLIMITED)
}

fn number_or_zero(file: &Path) -> Result<u64, CgroupError> {
    Ok(file::read_limit(file)?.unwrap_or(0))
}

fn text_or_empty(file: &Path) -> Result<String, CgroupError> {
    Ok(file::read_if_there(file)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_lines_are_read_in_nanoseconds() {
        let parsed = parse_pressure(
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\n\
             full avg10=0.00 avg60=0.00 avg300=0.10 total=7\n",
        );
        assert_eq!(
            parsed,
            Pressure {
                some: PressureLine {
                    total_ns: 1_234_000,
                    avg10: 1.5,
                    avg60: 0.25,
                    avg300: 0.0
                },
                full: PressureLine {
                    total_ns: 7000,
                    avg10: 0.0,
                    avg60: 0.0,
                    avg300: 0.1
                },
            }
        );
        assert_eq!(parse_pressure("").full, PressureLine::default());
    }

    #[test]
    fn disk_traffic_of_both_versions_is_the_same_thing() {
        let expected = vec![
            IoUsage {
                major: 8,
                minor: 0,
                read_bytes: 4096,
                write_bytes: 512,
                reads: 1,
                writes: 2,
            },
            IoUsage {
                major: 254,
                minor: 16,
                read_bytes: 1,
                ..IoUsage::default()
            },
        ];
        assert_eq!(
            v1_io(
                "8:0 Read 4096\n8:0 Write 512\n8:0 Sync 0\n8:0 Total 4608\n254:16 Read 1\nTotal 4609\n",
                "8:0 Read 1\n8:0 Write 2\nTotal 3\n",
            ),
            expected
        );
        assert_eq!(
            v2_io(
                "8:0 rbytes=4096 wbytes=512 rios=1 wios=2 dbytes=0 dios=0\n\
                 254:16 rbytes=1 wbytes=0 rios=0 wios=0\n",
            ),
            expected
        );
        assert_eq!(v1_io("Total 0\n", ""), vec![]);
    }

    #[test]
    fn version_2_files_become_stats() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, content) in [
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 3\nnr_throttled 1\nthrottled_usec 9\n",
            ),
            (
                "memory.stat",
                "anon 100\nfile 50\nkernel 7\nfile_mapped 20\ninactive_file 30\npgfault 11\npgmajfault 2\n",
            ),
            ("memory.current", "160\n"),
            ("memory.max", "1000\n"),
            ("memory.swap.current", "5\n"),
            ("memory.swap.max", "max\n"),
            ("memory.peak", "200\n"),
            ("memory.low", "0\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 0\noom_kill 0\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("cpu.max", "max 100000\n"),
            ("cpu.weight", "100\n"),
            ("io.stat", ""),
        ] {
            std::fs::write(dir.path().join(name), content).expect("a file in it");
        }
        let stats = v2_stats(dir.path()).expect("all files are there");
        assert_eq!(
            stats,
            CgroupStats {
                cpu_usage_ns: 1_500_000,
                memory_usage_bytes: 160,
                memory_working_set_bytes: 130,
                memory_rss_bytes: 100,
                memory_limit_bytes: Some(1000),
                page_faults: 11,
                major_page_faults: 2,
                swap_usage_bytes: Some(5),
                swap_limit_bytes: None,
                tasks: 3,
                pressure: None,
            }
        );
        let metrics = v2_metrics(dir.path()).expect("all files are there");
        assert_eq!(metrics.tasks_limit, None);
        assert_eq!(metrics.cpu_user_ns, 1_000_000);
        assert_eq!(metrics.cpu_throttled_ns, 9000);
        assert_eq!(metrics.cpu_quota_us, None);
        assert_eq!(metrics.cpu_period_us, Some(100_000));
        assert_eq!(metrics.memory_failures, 4);
        assert_eq!(metrics.memory_max_usage_bytes, 200);
        assert_eq!(metrics.memory_kernel_bytes, 7);
        assert_eq!(metrics.memory_reservation_bytes, None);
        assert!(matches!(
            v2_stats(&dir.path().join("gone")),
            Err(CgroupError::Absent { .. })
        ));
    }
}
