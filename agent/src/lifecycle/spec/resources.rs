//! Limits, from the wish to the OCI specification. Zero and empty mean that nothing is wished.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources};

use super::{super::container::Resources, SpecError};
use crate::cgroup::CgroupVersion;

/// Limits in OCI form; devices are not part of them. Unset limits are left out, so the same serves
/// an update. Says nothing of sense and range: [`check_resources`].
///
/// Source: OCI runtime specification, config-linux.md; CRI `LinuxContainerResources`.
pub fn linux_resources(wish: &Resources) -> LinuxResources {
    let mut out = LinuxResources::default();
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(unsigned(wish.cpu_shares))
        .set_quota(signed(wish.cpu_quota_us))
        .set_period(unsigned(wish.cpu_period_us))
        .set_cpus(text(wish.cpuset_cpus.as_deref()))
        .set_mems(text(wish.cpuset_mems.as_deref()));
    if cpu != LinuxCpu::default() {
        out.set_cpu(Some(cpu));
    }
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(signed(wish.memory_limit_bytes))
        .set_swap(swap(wish))
        .set_reservation(signed(wish.memory_reservation_bytes));
    if memory != LinuxMemory::default() {
        out.set_memory(Some(memory));
    }
    if let Some(limit) = signed(wish.pids_limit) {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        out.set_pids(Some(pids));
    }
    if !wish.hugepages.is_empty() {
        out.set_hugepage_limits(Some(wish.hugepages.iter().map(hugepage).collect()));
    }
    if !wish.unified.is_empty() {
        out.set_unified(Some(wish.unified.clone().into_iter().collect()));
    }
    out
}

/// Refuses limits that no kernel could mean, before anything is done.
///
/// # Errors
/// `InvalidValue` by field.
pub fn check_resources(wish: &Resources, version: CgroupVersion) -> Result<(), SpecError> {
    range(
        "resources.cpu_period_us",
        unsigned(wish.cpu_period_us),
        |period| (1_000..=1_000_000).contains(&period),
        "from 1000 to 1000000",
    )?;
    range(
        "resources.cpu_quota_us",
        signed(wish.cpu_quota_us),
        |quota| !(0..1_000).contains(&quota),
        "at least 1000, or negative for no limit",
    )?;
    range(
        "resources.cpu_shares",
        unsigned(wish.cpu_shares),
        |shares| shares <= 262_144,
        "from 2 to 262144",
    )?;
    for (field, list) in [
        ("resources.cpuset_cpus", &wish.cpuset_cpus),
        ("resources.cpuset_mems", &wish.cpuset_mems),
    ] {
        range(
            field,
            text(list.as_deref()),
            |list| is_cpu_list(&list),
            "a list like 0-2,7",
        )?;
    }
    let limit = signed(wish.memory_limit_bytes).filter(|&limit| limit > 0);
    if let (Some(limit), Some(swap)) = (limit, signed(wish.memory_swap_limit_bytes))
        && (0..limit).contains(&swap)
    {
        return Err(SpecError::invalid(
            "resources.memory_swap_limit_bytes",
            swap,
            "memory and swap together, so at least the memory limit",
        ));
    }
    for (size, _) in &wish.hugepages {
        range(
            "resources.hugepages.page_size",
            Some(size),
            |size| is_page_size(size),
            "a size like 2MB or 1GB",
        )?;
    }
    for (name, value) in &wish.unified {
        range(
            "resources.unified",
            Some(name),
            |name| is_file_name(name),
            "the plain name of a cgroup file, like memory.high",
        )?;
        range(
            &format!("resources.unified[{name:?}]"),
            Some(value),
            |value| !value.contains('\0'),
            "text without NUL",
        )?;
    }
    if version == CgroupVersion::V1
        && let Some((name, _)) = wish.unified.first_key_value()
    {
        return Err(SpecError::invalid(
            "resources.unified",
            name,
            "empty: this host has cgroups of version 1",
        ));
    }
    Ok(())
}

/// Memory and swap together; with a memory limit alone there is no swap. The cgroup chapter drops
/// it where the kernel does not account for swap.
fn swap(wish: &Resources) -> Option<i64> {
    signed(wish.memory_swap_limit_bytes).or_else(|| signed(wish.memory_limit_bytes))
}

fn hugepage((page_size, limit): &(String, u64)) -> LinuxHugepageLimit {
    let mut out = LinuxHugepageLimit::default();
    out.set_page_size(page_size.clone())
        .set_limit(i64::try_from(*limit).unwrap_or(i64::MAX));
    out
}

fn range<T: ToString + Clone>(
    field: &str,
    value: Option<T>,
    is_valid: impl FnOnce(T) -> bool,
    expected: &'static str,
) -> Result<(), SpecError> {
    match value {
        Some(value) if !is_valid(value.clone()) => Err(SpecError::invalid(field, value, expected)),
        _ => Ok(()),
    }
}

fn unsigned(value: Option<u64>) -> Option<u64> {
    value.filter(|&value| value != 0)
}

fn signed(value: Option<i64>) -> Option<i64> {
    value.filter(|&value| value != 0)
}

fn text(value: Option<&str>) -> Option<String> {
    value.filter(|value| !value.is_empty()).map(str::to_owned)
}

fn is_cpu_list(list: &str) -> bool {
    list.split(',').all(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.trim().parse::<u32>(), last.trim().parse::<u32>()) {
            (Ok(first), Ok(last)) => first <= last,
            _ => false,
        }
    })
}

fn is_page_size(size: &str) -> bool {
    let digits = size.len() - size.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    (1..=12).contains(&digits) && matches!(&size[digits..], "KB" | "MB" | "GB")
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn wish(change: impl FnOnce(&mut Resources)) -> Resources {
        let mut wish = Resources::default();
        change(&mut wish);
        wish
    }

    #[test]
    fn limits_become_oci_limits_and_zero_is_unset() {
        for (wish, expected) in [
            (Resources::default(), json!({})),
            (
                wish(|r| {
                    r.cpu_shares = Some(0);
                    r.cpu_quota_us = Some(0);
                    r.cpu_period_us = Some(0);
                    r.cpuset_cpus = Some(String::new());
                    r.memory_limit_bytes = Some(0);
                    r.memory_swap_limit_bytes = Some(0);
                    r.pids_limit = Some(0);
                }),
                json!({}),
            ),
            (
                wish(|r| {
                    r.cpu_shares = Some(2);
                    r.cpu_quota_us = Some(-1);
                    r.cpu_period_us = Some(100_000);
                    r.cpuset_cpus = Some("0-1".to_owned());
                    r.cpuset_mems = Some("0".to_owned());
                }),
                json!({"cpu": {"shares": 2, "quota": -1, "period": 100_000, "cpus": "0-1", "mems": "0"}}),
            ),
            (
                wish(|r| r.memory_limit_bytes = Some(1 << 20)),
                json!({"memory": {"limit": 1 << 20, "swap": 1 << 20}}),
            ),
            (
                wish(|r| r.memory_limit_bytes = Some(-1)),
                json!({"memory": {"limit": -1, "swap": -1}}),
            ),
            (
                wish(|r| {
                    r.memory_limit_bytes = Some(1 << 20);
                    r.memory_swap_limit_bytes = Some(-1);
                    r.memory_reservation_bytes = Some(5);
                }),
                json!({"memory": {"limit": 1 << 20, "swap": -1, "reservation": 5}}),
            ),
            (
                wish(|r| r.pids_limit = Some(7)),
                json!({"pids": {"limit": 7}}),
            ),
            (
                wish(|r| r.hugepages = vec![("2MB".to_owned(), 0), ("1GB".to_owned(), u64::MAX)]),
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": i64::MAX}]}),
            ),
            (
                wish(|r| {
                    r.unified.insert("memory.high".to_owned(), "5".to_owned());
                }),
                json!({"unified": {"memory.high": "5"}}),
            ),
        ] {
            let found: Value = serde_json::to_value(linux_resources(&wish)).expect("is JSON");
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn ranges() {
        use CgroupVersion::{V1, V2};
        let good = |change: fn(&mut Resources)| check_resources(&wish(change), V2).expect("valid");
        good(|_| ());
        good(|r| r.cpu_period_us = Some(1_000));
        good(|r| r.cpu_quota_us = Some(1_000));
        good(|r| r.cpu_quota_us = Some(-1));
        good(|r| r.cpu_shares = Some(262_144));
        good(|r| r.cpuset_cpus = Some("0-2,7".to_owned()));
        good(|r| r.hugepages = vec![("2MB".to_owned(), 0)]);
        good(|r| {
            r.memory_limit_bytes = Some(100);
            r.memory_swap_limit_bytes = Some(100);
        });
        good(|r| {
            r.unified.insert("memory.high".to_owned(), "max".to_owned());
        });
        let bad = |field: &str, version, change: fn(&mut Resources)| {
            let error = check_resources(&wish(change), version).expect_err(field);
            assert!(error.to_string().starts_with(field), "{error}");
        };
        bad("resources.cpu_period_us is \"999\"", V2, |r| {
            r.cpu_period_us = Some(999)
        });
        bad("resources.cpu_period_us", V2, |r| {
            r.cpu_period_us = Some(1_000_001)
        });
        bad("resources.cpu_quota_us", V2, |r| r.cpu_quota_us = Some(999));
        bad("resources.cpu_shares", V2, |r| r.cpu_shares = Some(262_145));
        for list in ["a", "2-1", "1,", "-", "0-1-2"] {
            let wish = Resources {
                cpuset_mems: Some(list.to_owned()),
                ..Resources::default()
            };
            check_resources(&wish, V2).expect_err(list);
        }
        bad("resources.memory_swap_limit_bytes", V2, |r| {
            r.memory_limit_bytes = Some(100);
            r.memory_swap_limit_bytes = Some(99);
        });
        for size in ["", "2", "MB", "2mb", "2MB/../x", "é"] {
            let wish = Resources {
                hugepages: vec![(size.to_owned(), 0)],
                ..Resources::default()
            };
            check_resources(&wish, V2).expect_err(size);
        }
        for name in ["", "..", ".x", "a/b", "../x", "a\0"] {
            let wish = Resources {
                unified: [(name.to_owned(), String::new())].into(),
                ..Resources::default()
            };
            check_resources(&wish, V2).expect_err(name);
        }
        bad("resources.unified", V1, |r| {
            r.unified.insert("memory.high".to_owned(), "max".to_owned());
        });
    }
}
