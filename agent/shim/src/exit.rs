//! How things ended: read from the kernel once, kept on disk until the agent has it.
//!
//! `DIR/exits/<container id>` holds one encoded [`Exited`]. It is written before the event is
//! sent and removed by `AckExit`, so an agent that was away, or a shim that died, loses no code.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use longshore_sys::pidfd::Ended;
use prost::Message;
use rustix::time::{ClockId, clock_gettime};

use crate::wire::{ExitStatus, Exited};

/// Adds the moment to how a process ended.
pub(crate) fn status(ended: Ended) -> ExitStatus {
    let wall = clock_gettime(ClockId::Realtime);
    let (code, signal) = match ended {
        Ended::Exited(code) => (u32::from(code), 0),
        Ended::Killed(signal) => (0, signal.unsigned_abs()),
    };
    ExitStatus {
        code,
        signal,
        at_unix_ns: wall
            .tv_sec
            .saturating_mul(1_000_000_000)
            .saturating_add(wall.tv_nsec),
        at_boot_ns: boot_ns(),
    }
}

/// The boot clock, in nanoseconds.
pub(crate) fn boot_ns() -> u64 {
    let boot = clock_gettime(ClockId::Boottime);
    u64::try_from(
        boot.tv_sec
            .saturating_mul(1_000_000_000)
            .saturating_add(boot.tv_nsec),
    )
    .unwrap_or(0)
}

/// The directory of kept exits.
#[derive(Debug)]
pub(crate) struct Exits {
    dir: PathBuf,
}

impl Exits {
    pub(crate) fn new(pod_dir: &Path) -> io::Result<Self> {
        let dir = pod_dir.join("exits");
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// Keeps an exit. A full disk is no reason to lose it: it is still held in memory and sent.
    pub(crate) fn keep(&self, exited: &Exited) {
        let path = self.dir.join(&exited.container_id);
        let temporary = path.with_extension("tmp");
        let _ = fs::write(&temporary, exited.encode_to_vec())
            .and_then(|()| fs::rename(&temporary, &path));
    }

    /// Drops an exit that the agent has committed.
    pub(crate) fn drop(&self, container_id: &str) {
        let _ = fs::remove_file(self.dir.join(container_id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_kept_until_dropped() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let exits = Exits::new(dir.path()).expect("make");
        let exited = Exited {
            container_id: "c".into(),
            status: status(Ended::Killed(9)),
        };
        exits.keep(&exited);
        let bytes = fs::read(dir.path().join("exits/c")).expect("read");
        assert_eq!(Exited::decode(bytes.as_slice()).expect("decode"), exited);
        exits.drop("c");
        exits.drop("c");
        assert_eq!(
            fs::read_dir(dir.path().join("exits"))
                .expect("list")
                .count(),
            0
        );
    }
}
