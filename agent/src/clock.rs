//! Wall time for people, boot time for durations.

use std::{fs, io};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A moment on the wall clock, in nanoseconds since 1970-01-01 UTC.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Time(i64);

impl Time {
    /// Now.
    pub fn now() -> Self {
        Self(nanoseconds(ClockId::Realtime))
    }

    /// From nanoseconds since 1970.
    pub const fn from_unix_ns(ns: i64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since 1970.
    pub const fn unix_ns(self) -> i64 {
        self.0
    }

    /// The later of two moments: a clock that jumps back never makes an end precede its start.
    pub fn not_before(self, earliest: Self) -> Self {
        self.max(earliest)
    }

    /// RFC 3339 in UTC with nanoseconds, as CRI logs write it.
    pub fn to_rfc3339(self) -> String {
        jiff::Timestamp::from_nanosecond(i128::from(self.0))
            .map_or_else(|_| self.0.to_string(), |stamp| format!("{stamp:.9}"))
    }
}

/// Nanoseconds since boot, suspend included: the clock for durations.
pub fn boot_ns() -> u64 {
    u64::try_from(nanoseconds(ClockId::Boottime)).unwrap_or(0)
}

/// Names this boot of the machine; another value means that every kernel object is gone.
///
/// # Errors
/// When `/proc` is not mounted.
///
/// Source: random(4), `/proc/sys/kernel/random/boot_id`.
pub fn boot_id() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned())
}

fn nanoseconds(clock: ClockId) -> i64 {
    let now = clock_gettime(clock);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_has_nine_decimals() {
        assert_eq!(
            Time::from_unix_ns(1_475_798_407_009_166_979).to_rfc3339(),
            "2016-10-07T00:00:07.009166979Z"
        );
    }

    #[test]
    fn boot_time_advances() {
        let first = boot_ns();
        assert!(first > 0 && boot_ns() >= first);
    }
}
