//! Limits of version 1 controllers, set through `cgroups-rs`; hybrid hosts too.

use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use cgroups_rs::{
    FreezerState,
    fs::{
        MaxValue,
        blkio::BlkIoController,
        cpu::CpuController,
        cpuset::CpuSetController,
        devices::{DevicePermissions, DeviceType, DevicesController},
        error::{Error as ControllerError, ErrorKind},
        freezer::FreezerController,
        hugetlb::HugeTlbController,
        memory::MemController,
        pid::PidController,
    },
};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use super::{
    CgroupError, CgroupPath,
    devices::{Access, DeviceKind, DeviceRule},
    file,
    hierarchy::Hierarchies,
};

/// How long a subtree may take to freeze; one with a task stuck in the kernel never does.
const FREEZE_PATIENCE: Duration = Duration::from_millis(200);

/// Applies what is set in `resources`, except devices.
pub(super) fn apply(
    hierarchies: &Hierarchies,
    path: &CgroupPath,
    resources: &LinuxResources,
) -> Result<(), CgroupError> {
    let dir = |controller: &'static str, field: &'static str| {
        hierarchies
            .v1_dir(controller, path)
            .ok_or(CgroupError::ControllerMissing { controller, field })
    };
    if resources
        .unified()
        .as_ref()
        .is_some_and(|unified| !unified.is_empty())
    {
        return Err(CgroupError::BadResource {
            field: "resources.unified".to_owned(),
            reason: "is for cgroup version 2, and this host is on version 1",
        });
    }
    if let Some(cpu) = resources.cpu() {
        if cpu.cpus().is_some() || cpu.mems().is_some() {
            apply_cpuset(dir("cpuset", "resources.cpu.cpus")?, cpu)?;
        }
        if has_cpu_limit(cpu) {
            apply_cpu(&dir("cpu", "resources.cpu")?, cpu)?;
        }
    }
    if let Some(memory) = resources.memory()
        && has_memory_limit(memory)
    {
        apply_memory(&dir("memory", "resources.memory")?, memory)?;
    }
    if let Some(pids) = resources.pids() {
        let dir = dir("pids", "resources.pids")?;
        let max = match pids.limit() {
            limit if limit > 0 => MaxValue::Value(limit),
            _ => MaxValue::Max,
        };
        PidController::new(dir.clone(), PathBuf::new(), false)
            .set_pid_max(max)
            .map_err(|e| refused(&dir, e))?;
    }
    if let Some(io) = resources.block_io() {
        apply_io(&dir("blkio", "resources.block_io")?, io)?;
    }
    apply_hugepages(
        hierarchies.v1_dir("hugetlb", path),
        resources.hugepage_limits().as_deref().unwrap_or_default(),
    )
}

/// Gives a new cpuset the CPUs and memory nodes of its parent: empty ones take no task.
pub(super) fn inherit_cpuset(parent: &Path, dir: &Path) -> Result<(), CgroupError> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let own = dir.join(name);
        if file::read(&own)?.trim().is_empty() {
            file::write(&own, file::read(&parent.join(name))?.trim())?;
        }
    }
    Ok(())
}

/// Denies and allows devices as the rules say, in order.
pub(super) fn restrict_devices(dir: &Path, rules: &[DeviceRule]) -> Result<(), CgroupError> {
    let controller = DevicesController::new(dir.to_owned(), PathBuf::new());
    for rule in rules {
        let kinds: &[DeviceType] = match rule.kind {
            // The kernel takes `a` for everything at once and ignores the rest of the line.
            DeviceKind::All if rule.covers_all() => &[DeviceType::All],
            DeviceKind::All => &[DeviceType::Block, DeviceType::Char],
            DeviceKind::Block => &[DeviceType::Block],
            DeviceKind::Char => &[DeviceType::Char],
        };
        let number = |number: Option<u32>| number.map_or(-1, i64::from);
        let access = permissions(rule.access);
        for &kind in kinds {
            let (major, minor) = (number(rule.major), number(rule.minor));
            if rule.allow {
                controller.allow_device(kind, major, minor, &access)
            } else {
                controller.deny_device(kind, major, minor, &access)
            }
            .map_err(|e| refused(dir, e))?;
        }
    }
    Ok(())
}

/// Freezes a subtree.
///
/// # Errors
/// `Call` if it does not come to rest in time; it is thawed again then.
pub(super) fn freeze(dir: &Path) -> Result<(), CgroupError> {
    let freezer = FreezerController::new(dir.to_owned(), PathBuf::new(), false);
    let since = Instant::now();
    loop {
        // Writing again picks up what was forked while the freeze was under way.
        freezer.freeze().map_err(|e| refused(dir, e))?;
        if matches!(freezer.state(), Ok(FreezerState::Frozen)) {
            return Ok(());
        }
        if since.elapsed() > FREEZE_PATIENCE {
            thaw(dir)?;
            return Err(CgroupError::call(
                "freeze",
                dir,
                io::ErrorKind::TimedOut.into(),
            ));
        }
        thread::sleep(Duration::from_micros(500));
    }
}

/// Thaws a subtree.
pub(super) fn thaw(dir: &Path) -> Result<(), CgroupError> {
    FreezerController::new(dir.to_owned(), PathBuf::new(), false)
        .thaw()
        .map_err(|e| refused(dir, e))
}

fn apply_cpuset(dir: PathBuf, cpu: &LinuxCpu) -> Result<(), CgroupError> {
    let controller = CpuSetController::new(dir.clone(), PathBuf::new(), false);
    if let Some(cpus) = cpu.cpus() {
        controller.set_cpus(cpus).map_err(|e| refused(&dir, e))?;
    }
    if let Some(mems) = cpu.mems() {
        controller.set_mems(mems).map_err(|e| refused(&dir, e))?;
    }
    Ok(())
}

fn has_cpu_limit(cpu: &LinuxCpu) -> bool {
    cpu.shares().is_some()
        || cpu.quota().is_some()
        || cpu.period().is_some()
        || cpu.burst().is_some()
        || cpu.idle().is_some()
}

fn apply_cpu(dir: &Path, cpu: &LinuxCpu) -> Result<(), CgroupError> {
    let controller = CpuController::new(dir.to_owned(), PathBuf::new(), false);
    let check = |result: Result<(), ControllerError>| result.map_err(|e| refused(dir, e));
    if let Some(shares) = cpu.shares().filter(|&shares| shares > 0) {
        check(controller.set_shares(shares))?;
    }
    let quota = cpu.quota().filter(|&quota| quota != 0);
    let period = cpu.period().filter(|&period| period > 0);
    // The ratio may at no time exceed the parent's, so which of the two goes first depends.
    let mut period_set = true;
    if let Some(period) = period {
        match check(controller.set_cfs_period(period)) {
            Err(e) if e.errno() == Some(EINVAL) && quota.is_some() => period_set = false,
            result => result?,
        }
    }
    if let Some(quota) = quota {
        check(controller.set_cfs_quota(quota))?;
    }
    if let Some(period) = period.filter(|_| !period_set) {
        check(controller.set_cfs_period(period))?;
    }
    // The library knows neither of these.
    if let Some(burst) = cpu.burst() {
        file::write(&dir.join("cpu.cfs_burst_us"), &burst.to_string())?;
    }
    if let Some(idle) = cpu.idle() {
        file::write(&dir.join("cpu.idle"), &idle.to_string())?;
    }
    Ok(())
}

fn has_memory_limit(memory: &LinuxMemory) -> bool {
    memory.limit().is_some()
        || memory.swap().is_some()
        || memory.reservation().is_some()
        || memory.swappiness().is_some()
        || memory.disable_oom_killer().is_some()
}

/// One of the two memory limits, in the order they are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemoryLimit {
    /// `memory.limit_in_bytes`
    Memory(i64),
    /// `memory.memsw.limit_in_bytes`: memory and swap together.
    Both(i64),
}

/// Orders the two limits so that memory alone never exceeds both: raised, the sum goes first;
/// lowered, memory does. `current_both` is `None` without swap accounting.
fn memory_order(
    limit: Option<i64>,
    swap: Option<i64>,
    current_both: Option<u64>,
) -> Vec<MemoryLimit> {
    let Some(current_both) = current_both else {
        return limit.map(MemoryLimit::Memory).into_iter().collect();
    };
    // Unlimited memory under a limited sum is not unlimited.
    let swap = swap.or(limit.filter(|&limit| limit < 0));
    match (limit, swap) {
        (None, None) => vec![],
        (Some(limit), None) => vec![MemoryLimit::Memory(limit)],
        (None, Some(swap)) => vec![MemoryLimit::Both(swap)],
        (Some(limit), Some(swap)) => {
            let raises = swap < 0 || u64::try_from(limit).is_ok_and(|limit| limit > current_both);
            if raises {
                vec![MemoryLimit::Both(swap), MemoryLimit::Memory(limit)]
            } else {
                vec![MemoryLimit::Memory(limit), MemoryLimit::Both(swap)]
            }
        }
    }
}

fn apply_memory(dir: &Path, memory: &LinuxMemory) -> Result<(), CgroupError> {
    let controller = MemController::new(dir.to_owned(), PathBuf::new(), false);
    let check = |result: Result<(), ControllerError>| result.map_err(|e| refused(dir, e));
    let limit = memory.limit().filter(|&limit| limit != 0);
    let swap = memory.swap().filter(|&swap| swap != 0);
    if let (Some(limit), Some(swap)) = (limit, swap)
        && swap > 0
        && limit > swap
    {
        return Err(CgroupError::BadResource {
            field: "resources.memory.swap".to_owned(),
            reason: "is memory and swap together and must not be below the memory limit",
        });
    }
    // Without swap accounting the swap limit is dropped, and `check` says so.
    let current_both = file::read_limit(&dir.join("memory.memsw.limit_in_bytes"))?;
    for step in memory_order(limit, swap, current_both) {
        match step {
            MemoryLimit::Memory(limit) => match check(controller.set_limit(limit)) {
                // It does not fit, even after reclaim.
                Err(e) if e.errno() == Some(EBUSY) => {
                    let usage = file::read_number(&dir.join("memory.usage_in_bytes"))?;
                    return Err(CgroupError::BelowUsage { limit, usage });
                }
                result => result?,
            },
            MemoryLimit::Both(both) => check(controller.set_memswap_limit(both))?,
        }
    }
    if let Some(reservation) = memory.reservation().filter(|&bytes| bytes != 0) {
        check(controller.set_soft_limit(reservation))?;
    }
    if let Some(swappiness) = memory.swappiness() {
        check(controller.set_swappiness(swappiness))?;
    }
    if memory.disable_oom_killer() == Some(true) {
        check(controller.disable_oom_killer())?;
    }
    Ok(())
}

fn apply_io(dir: &Path, io: &LinuxBlockIo) -> Result<(), CgroupError> {
    if let Some(weight) = io.weight().filter(|&weight| weight > 0) {
        // Which file there is depends on the scheduler; the library knows the older only.
        let bfq = dir.join("blkio.bfq.weight");
        if bfq.exists() {
            file::write(&bfq, &weight.to_string())?;
        } else {
            file::write(&dir.join("blkio.weight"), &weight.to_string())?;
        }
    }
    let controller = BlkIoController::new(dir.to_owned(), PathBuf::new(), false);
    type Throttle = fn(&BlkIoController, u64, u64, u64) -> Result<(), ControllerError>;
    let throttles: [(_, Throttle); 4] = [
        (
            io.throttle_read_bps_device(),
            BlkIoController::throttle_read_bps_for_device,
        ),
        (
            io.throttle_write_bps_device(),
            BlkIoController::throttle_write_bps_for_device,
        ),
        (
            io.throttle_read_iops_device(),
            BlkIoController::throttle_read_iops_for_device,
        ),
        (
            io.throttle_write_iops_device(),
            BlkIoController::throttle_write_iops_for_device,
        ),
    ];
    for (devices, throttle) in throttles {
        for device in devices.iter().flatten() {
            let number = |number: i64| {
                u64::try_from(number).map_err(|_| CgroupError::BadResource {
                    field: "resources.block_io".to_owned(),
                    reason: "has a negative device number",
                })
            };
            let (major, minor) = (number(device.major())?, number(device.minor())?);
            throttle(&controller, major, minor, device.rate()).map_err(|e| refused(dir, e))?;
        }
    }
    Ok(())
}

fn apply_hugepages(dir: Option<PathBuf>, limits: &[LinuxHugepageLimit]) -> Result<(), CgroupError> {
    let Some(dir) = dir else {
        // kubelet sends a 0 for each size; where nothing counts them, that is no loss.
        return match limits.iter().find(|limit| limit.limit() != 0) {
            None => Ok(()),
            Some(_) => Err(CgroupError::ControllerMissing {
                controller: "hugetlb",
                field: "resources.hugepage_limits",
            }),
        };
    };
    if limits.is_empty() {
        return Ok(());
    }
    let controller = HugeTlbController::new(dir.clone(), PathBuf::new(), false);
    for limit in limits {
        let size = limit.page_size();
        if !controller.size_supported(size) {
            if limit.limit() == 0 {
                continue;
            }
            return Err(CgroupError::BadResource {
                field: "resources.hugepage_limits".to_owned(),
                reason: "has a page size that this host does not have",
            });
        }
        let bytes = u64::try_from(limit.limit()).unwrap_or(u64::MAX >> 1);
        controller
            .set_limit_in_bytes(size, bytes)
            .map_err(|e| refused(&dir, e))?;
    }
    Ok(())
}

fn permissions(access: Access) -> Vec<DevicePermissions> {
    [
        (access.read, DevicePermissions::Read),
        (access.write, DevicePermissions::Write),
        (access.mknod, DevicePermissions::MkNod),
    ]
    .into_iter()
    .filter_map(|(wanted, permission)| wanted.then_some(permission))
    .collect()
}

/// The library's error with its file, value and error number made visible.
fn refused(dir: &Path, error: ControllerError) -> CgroupError {
    let source = error
        .source()
        .and_then(|cause| cause.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error)
        .map_or_else(
            || io::Error::other(error.to_string()),
            io::Error::from_raw_os_error,
        );
    match error.kind() {
        ErrorKind::WriteFailed(name, value) => {
            let file = dir.join(name);
            match source.kind() {
                // The library opens with O_CREAT, which cgroupfs refuses for what is not there.
                io::ErrorKind::PermissionDenied if !dir.exists() => CgroupError::Absent {
                    path: dir.to_owned(),
                },
                _ => CgroupError::refused(&file, value, source),
            }
        }
        ErrorKind::ReadFailed(name) => CgroupError::call("read", &dir.join(name), source),
        _ => CgroupError::call("use", dir, source),
    }
}

const EINVAL: i32 = 22;
const EBUSY: i32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_never_exceeds_memory_and_swap_on_the_way() {
        use MemoryLimit::{Both, Memory};
        let unlimited = Some(9_223_372_036_854_771_712);
        for (limit, swap, current, expected) in [
            (
                Some(100),
                Some(200),
                unlimited,
                vec![Memory(100), Both(200)],
            ),
            (
                Some(100),
                Some(100),
                Some(200),
                vec![Memory(100), Both(100)],
            ),
            (
                Some(300),
                Some(400),
                Some(200),
                vec![Both(400), Memory(300)],
            ),
            (Some(300), Some(-1), Some(400), vec![Both(-1), Memory(300)]),
            (Some(-1), None, Some(400), vec![Both(-1), Memory(-1)]),
            (Some(100), None, unlimited, vec![Memory(100)]),
            (None, Some(500), Some(400), vec![Both(500)]),
            (Some(100), Some(200), None, vec![Memory(100)]),
            (None, None, Some(400), vec![]),
        ] {
            assert_eq!(
                memory_order(limit, swap, current),
                expected,
                "limit {limit:?}, swap {swap:?}, now {current:?}"
            );
        }
    }
}
