//! Capabilities of the calling thread, as bit masks, and their names.

use std::io;

use crate::check;

/// Names by number, without `CAP_` (capabilities(7)).
pub const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Number of `CAP_SETPCAP`, without which the bounding set cannot shrink.
pub const SETPCAP: u32 = 8;

/// Number of a capability by name, any case, with or without `CAP_`.
pub fn number(name: &str) -> Option<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let at = NAMES.iter().position(|known| *known == bare)?;
    u32::try_from(at).ok()
}

/// Name of a capability, without `CAP_`.
pub fn name(number: u32) -> Option<&'static str> {
    NAMES.get(usize::try_from(number).ok()?).copied()
}

/// Highest capability that the running kernel knows.
pub fn last() -> u32 {
    std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(40)
        .min(63)
}

/// Mask of all capabilities that the running kernel knows.
pub fn all() -> u64 {
    u64::MAX >> (63 - last())
}

/// Three of a thread's sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// What is in force.
    pub effective: u64,
    /// What may be put in force.
    pub permitted: u64,
    /// What execve may pass on.
    pub inheritable: u64,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`
const VERSION: u32 = 0x2008_0522;

/// Reads the calling thread's sets.
///
/// # Errors
/// What capget(2) answers.
pub fn get() -> io::Result<Sets> {
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 takes a header and two data structures, which these are.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok(Sets {
        effective: join(data[0].effective, data[1].effective),
        permitted: join(data[0].permitted, data[1].permitted),
        inheritable: join(data[0].inheritable, data[1].inheritable),
    })
}

/// Sets the calling thread's sets.
///
/// # Errors
/// `EPERM` for more than is permitted; what capset(2) answers.
pub fn set(sets: Sets) -> io::Result<()> {
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "each word takes its half of the mask"
    )]
    let half = |shift: u32| Data {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: as in `get`.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })?;
    Ok(())
}

/// Drops from the calling thread's bounding set whatever is not in `keep`.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`; what prctl(2) answers.
pub fn bound(keep: u64) -> io::Result<()> {
    for number in (0..64).filter(|number| keep & (1 << number) == 0) {
        // SAFETY: prctl with numbers only.
        let result =
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number as libc::c_ulong, 0, 0, 0) };
        match check(libc::c_long::from(result)) {
            Ok(_) => {}
            // Past the last capability that this kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes `ambient` the calling thread's ambient set; each must be permitted and inheritable.
///
/// # Errors
/// `EPERM` for one that is not; what prctl(2) answers.
pub fn set_ambient(ambient: u64) -> io::Result<()> {
    let prctl = |what: libc::c_int, number: libc::c_ulong| {
        // SAFETY: prctl with numbers only.
        check(libc::c_long::from(unsafe {
            libc::prctl(libc::PR_CAP_AMBIENT, what as libc::c_ulong, number, 0, 0)
        }))
    };
    prctl(libc::PR_CAP_AMBIENT_CLEAR_ALL, 0)?;
    for number in (0..64).filter(|number| ambient & (1 << number) != 0) {
        prctl(libc::PR_CAP_AMBIENT_RAISE, number)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_match_both_ways() {
        for (text, expected) in [
            ("CAP_CHOWN", Some(0)),
            ("net_admin", Some(12)),
            ("Cap_Sys_Admin", Some(21)),
            ("CHECKPOINT_RESTORE", Some(40)),
            ("CAP_", None),
            ("ALL", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
        for at in 0..41 {
            assert_eq!(name(at).and_then(number), Some(at));
        }
        assert_eq!(name(41), None);
    }

    #[test]
    fn the_mask_of_all_reaches_the_last() {
        assert_eq!(all().leading_zeros(), 63 - last());
        assert_eq!(all() & 1, 1);
    }

    #[test]
    fn dropped_capabilities_are_gone_from_this_thread_only() {
        std::thread::spawn(|| {
            let before = get().expect("capget");
            set(Sets {
                effective: before.effective & !1,
                permitted: before.permitted & !1,
                inheritable: 0,
            })
            .expect("capset");
            assert_eq!(get().expect("capget").effective & 1, 0);
        })
        .join()
        .expect("thread");
    }
}
