//! Limits on the unified tree: OCI's version 1 words turned into files and values, then written.

use std::{collections::BTreeSet, fs, io, path::Path};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};
use tracing::{debug, warn};

use super::{
    CgroupError,
    devices::{self, DeviceRule},
    file,
};

/// One value for one file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    file: String,
    value: String,
    /// Without this file the setting is dropped instead of refused.
    optional: bool,
}

/// Enables those of `wanted` that are available in `dir` for its children.
///
/// What cannot be enabled is left out: only a limit that needs it fails later.
pub(super) fn enable_controllers(dir: &Path, wanted: &[&str]) -> Result<(), CgroupError> {
    let available = file::read(&dir.join("cgroup.controllers"))?;
    let control = dir.join("cgroup.subtree_control");
    let enabled = file::read(&control)?;
    let missing = missing(&available, &enabled, wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let all: Vec<_> = missing.iter().map(|name| format!("+{name}")).collect();
    match file::write_raw(&control, &all.join(" ")) {
        Ok(()) => return Ok(()),
        // Processes in the root of a container's view of the tree; the real root is exempt.
        Err(e) if e.raw_os_error() == Some(EBUSY) && is_mount_root(dir) => evacuate(dir)?,
        Err(e) => debug!(dir = %dir.display(), error = %e, "controllers one by one"),
    }
    for setting in all {
        if let Err(error) = file::write_raw(&control, &setting) {
            warn!(dir = %dir.display(), controller = setting, %error, "controller stays off");
        }
    }
    Ok(())
}

/// Applies what is set in `resources`, except devices; `unified` last.
pub(super) fn apply(dir: &Path, resources: &LinuxResources) -> Result<(), CgroupError> {
    for setting in settings(resources)? {
        let target = dir.join(&setting.file);
        match file::write(&target, &setting.value) {
            Ok(()) => {}
            Err(CgroupError::Absent { .. }) if dir.exists() => {
                if !setting.optional {
                    return Err(missing_file(&setting.file));
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Restricts devices by a program attached to the cgroup; repeating it replaces the program.
pub(super) fn restrict_devices(dir: &Path, rules: &[DeviceRule]) -> Result<(), CgroupError> {
    let cgroup = fs::File::open(dir).map_err(|source| CgroupError::call("open", dir, source))?;
    longshore_sys::bpf::set_device_filter(&cgroup, &devices::program(rules))
        .map_err(|source| CgroupError::call("attach a device program to", dir, source))
}

fn missing<'a>(available: &str, enabled: &str, wanted: &[&'a str]) -> Vec<&'a str> {
    let available: BTreeSet<_> = available.split_whitespace().collect();
    let enabled: BTreeSet<_> = enabled.split_whitespace().collect();
    wanted
        .iter()
        .copied()
        .filter(|name| available.contains(name) && !enabled.contains(name))
        .collect()
}

fn is_mount_root(dir: &Path) -> bool {
    dir.parent()
        .is_none_or(|parent| !parent.join("cgroup.controllers").exists())
}

/// Moves the processes of `dir` to a leaf of it.
fn evacuate(dir: &Path) -> Result<(), CgroupError> {
    let leaf = dir.join("longshored");
    match fs::create_dir(&leaf) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(CgroupError::call("mkdir", &leaf, source)),
    }
    // What forks meanwhile is caught by the next round.
    for _ in 0..10 {
        let pids = file::read(&dir.join("cgroup.procs"))?;
        if pids.trim().is_empty() {
            return Ok(());
        }
        for pid in pids.lines() {
            if let Err(error) = file::write_raw(&leaf.join("cgroup.procs"), pid) {
                debug!(pid, %error, "process stays");
            }
        }
    }
    Ok(())
}

fn missing_file(name: &str) -> CgroupError {
    let (controller, field) = match name.split('.').next() {
        Some("cpu") => ("cpu", "resources.cpu"),
        Some("cpuset") => ("cpuset", "resources.cpu.cpus"),
        Some("memory") => ("memory", "resources.memory"),
        Some("pids") => ("pids", "resources.pids"),
        Some("io") => ("io", "resources.block_io"),
        Some("hugetlb") => ("hugetlb", "resources.hugepage_limits"),
        _ => {
            return CgroupError::BadResource {
                field: format!("resources.unified[{name:?}]"),
                reason: "is no file of this kernel's cgroups",
            };
        }
    };
    CgroupError::ControllerMissing { controller, field }
}

/// All values to write, in order. Pure.
fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, CgroupError> {
    let mut out = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &mut out);
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut out)?;
    }
    if let Some(pids) = resources.pids() {
        out.push(setting("pids.max", max_if(pids.limit() <= 0, pids.limit())));
    }
    if let Some(io) = resources.block_io() {
        io_settings(io, &mut out);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(CgroupError::BadResource {
                field: "resources.hugepage_limits".to_owned(),
                reason: "has a page size that is no size",
            });
        }
        out.push(Setting {
            // kubelet sends a 0 for each size; where nothing counts them, that is no loss.
            optional: limit.limit() == 0,
            ..setting(
                &format!("hugetlb.{size}.max"),
                max_if(limit.limit() < 0, limit.limit()),
            )
        });
    }
    if let Some(unified) = resources.unified() {
        let mut unified: Vec<_> = unified.iter().collect();
        unified.sort();
        for (name, value) in unified {
            out.push(unified_setting(name, value)?);
        }
    }
    Ok(out)
}

fn cpu_settings(cpu: &LinuxCpu, out: &mut Vec<Setting>) {
    if let Some(cpus) = cpu.cpus().as_deref().filter(|text| !text.is_empty()) {
        out.push(setting("cpuset.cpus", cpus));
    }
    if let Some(mems) = cpu.mems().as_deref().filter(|text| !text.is_empty()) {
        out.push(setting("cpuset.mems", mems));
    }
    if let Some(shares) = cpu.shares().filter(|&shares| shares > 0) {
        out.push(setting("cpu.weight", weight_of_shares(shares)));
    }
    let quota = cpu.quota().filter(|&quota| quota != 0);
    let period = cpu.period().filter(|&period| period > 0);
    match (quota, period) {
        (None, None) => {}
        (Some(quota), None) => out.push(setting("cpu.max", max_if(quota < 0, quota))),
        (quota, Some(period)) => {
            let quota = max_if(quota.is_none_or(|quota| quota < 0), quota.unwrap_or(-1));
            out.push(setting("cpu.max", format!("{quota} {period}")));
        }
    }
    if let Some(burst) = cpu.burst() {
        out.push(setting("cpu.max.burst", burst));
    }
    if let Some(idle) = cpu.idle() {
        out.push(setting("cpu.idle", idle));
    }
}

fn memory_settings(memory: &LinuxMemory, out: &mut Vec<Setting>) -> Result<(), CgroupError> {
    let bad = |reason| {
        Err(CgroupError::BadResource {
            field: "resources.memory.swap".to_owned(),
            reason,
        })
    };
    let limit = memory.limit().filter(|&limit| limit != 0);
    let swap = match (limit, memory.swap().filter(|&swap| swap != 0)) {
        (_, None) => None,
        (_, Some(swap)) if swap < 0 => Some("max".to_owned()),
        // OCI's number is memory and swap together, the kernel's is swap alone.
        (Some(limit), Some(swap)) if limit > 0 && swap >= limit => Some((swap - limit).to_string()),
        (Some(limit), Some(_)) if limit > 0 => {
            return bad("is memory and swap together and must not be below the memory limit");
        }
        (_, Some(_)) => return bad("needs a memory limit to be a sum of"),
    };
    if let Some(swap) = swap {
        out.push(Setting {
            optional: true,
            ..setting("memory.swap.max", swap)
        });
    }
    if let Some(limit) = limit {
        out.push(setting("memory.max", max_if(limit < 0, limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|&bytes| bytes != 0) {
        out.push(setting("memory.low", max_if(reservation < 0, reservation)));
    }
    Ok(())
}

fn io_settings(io: &LinuxBlockIo, out: &mut Vec<Setting>) {
    if let Some(weight) = io.weight().filter(|&weight| weight > 0) {
        // 10..=1000 onto 1..=10000.
        let weight = 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990;
        out.push(setting("io.weight", format!("default {weight}")));
    }
    for (key, devices) in [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ] {
        for device in devices.iter().flatten() {
            let rate = match device.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let (major, minor) = (device.major(), device.minor());
            out.push(setting("io.max", format!("{major}:{minor} {key}={rate}")));
        }
    }
}

fn unified_setting(name: &str, value: &str) -> Result<Setting, CgroupError> {
    let bad = |reason| {
        Err(CgroupError::BadResource {
            field: format!("resources.unified[{name:?}]"),
            reason,
        })
    };
    if name.is_empty() || name.contains(|c: char| c == '/' || c.is_control()) || !name.contains('.')
    {
        return bad("is no plain file name");
    }
    if name.starts_with('.') || name.starts_with("cgroup.") {
        return bad("is the agent's to write");
    }
    Ok(setting(name, value))
}

/// `cpu.weight` for `cpu.shares`: 2 is 1, 1024 is 100, 262144 is 10000, and a curve between.
///
/// The straight line used before 2025 put 1024 at 39, below the default of a plain cgroup.
pub(super) fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        shares => {
            #[expect(clippy::cast_precision_loss, reason = "shares are below 2^18 here")]
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 1 and 10000"
            )]
            let weight = 10_f64.powf(exponent).ceil() as u64;
            weight.clamp(1, 10_000)
        }
    }
}

fn max_if(unlimited: bool, value: i64) -> String {
    if unlimited {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

fn setting(file: &str, value: impl ToString) -> Setting {
    Setting {
        file: file.to_owned(),
        value: value.to_string(),
        optional: false,
    }
}

const EBUSY: i32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn check(resources: serde_json::Value, expected: &[(&str, &str)]) {
        let resources: LinuxResources =
            serde_json::from_value(resources).expect("the test writes valid OCI JSON");
        let settings = settings(&resources).expect("valid");
        let found: Vec<_> = settings
            .iter()
            .map(|one| (one.file.as_str(), one.value.as_str()))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn oci_resources_become_version_2_files() {
        use serde_json::json;
        check(json!({}), &[]);
        check(json!({"cpu": {"shares": 1024}}), &[("cpu.weight", "100")]);
        check(
            json!({"cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": ""}}),
            &[],
        );
        check(
            json!({"cpu": {"quota": 50000, "period": 100_000}}),
            &[("cpu.max", "50000 100000")],
        );
        check(json!({"cpu": {"quota": -1}}), &[("cpu.max", "max")]);
        check(
            json!({"cpu": {"period": 50000}}),
            &[("cpu.max", "max 50000")],
        );
        check(
            json!({"cpu": {"cpus": "0-1", "mems": "0", "burst": 10, "idle": 1}}),
            &[
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
                ("cpu.max.burst", "10"),
                ("cpu.idle", "1"),
            ],
        );
        check(
            json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 500}}),
            &[
                ("memory.swap.max", "500"),
                ("memory.max", "1000"),
                ("memory.low", "500"),
            ],
        );
        check(
            json!({"memory": {"limit": 1000, "swap": 1000}}),
            &[("memory.swap.max", "0"), ("memory.max", "1000")],
        );
        check(
            json!({"memory": {"limit": -1, "swap": -1}}),
            &[("memory.swap.max", "max"), ("memory.max", "max")],
        );
        check(json!({"pids": {"limit": 0}}), &[("pids.max", "max")]);
        check(json!({"pids": {"limit": 7}}), &[("pids.max", "7")]);
        check(
            json!({"blockIO": {
                "weight": 1000,
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1024}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
            }}),
            &[
                ("io.weight", "default 10000"),
                ("io.max", "8:0 rbps=1024"),
                ("io.max", "8:16 wiops=max"),
            ],
        );
        check(
            json!({
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                "unified": {"memory.oom.group": "1", "memory.high": "5"},
            }),
            &[
                ("hugetlb.2MB.max", "0"),
                ("memory.high", "5"),
                ("memory.oom.group", "1"),
            ],
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for resources in [
            serde_json::json!({"memory": {"limit": 1000, "swap": 500}}),
            serde_json::json!({"memory": {"swap": 500}}),
            serde_json::json!({"unified": {"../x.y": "1"}}),
            serde_json::json!({"unified": {"a/b.c": "1"}}),
            serde_json::json!({"unified": {"cgroup.procs": "1"}}),
            serde_json::json!({"unified": {"": "1"}}),
            serde_json::json!({"hugepageLimits": [{"pageSize": "../2MB", "limit": 0}]}),
        ] {
            let parsed: LinuxResources =
                serde_json::from_value(resources.clone()).expect("valid OCI JSON");
            assert!(settings(&parsed).is_err(), "{resources}");
        }
    }

    #[test]
    fn shares_become_weights_on_the_curve() {
        for (shares, weight) in [
            (0, 1),
            (1, 1),
            (2, 1),
            (3, 2),
            (102, 17),
            (1024, 100),
            (2048, 174),
            (262_143, 10_000),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight_of_shares(shares), weight, "{shares} shares");
        }
    }

    #[test]
    fn only_available_controllers_that_are_off_are_enabled() {
        assert_eq!(
            missing(
                "cpuset cpu io memory pids\n",
                "memory\n",
                &["cpu", "memory", "hugetlb"]
            ),
            ["cpu"]
        );
        assert_eq!(missing("", "", &["cpu"]), Vec::<&str>::new());
    }
}
