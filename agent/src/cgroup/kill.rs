//! Emptying and removing cgroups.
//!
//! The unified tree kills a whole subtree at once (`cgroup.kill`), also on hybrid hosts. Where it
//! is not there, or where something left it, version 1 freezes the subtree so that nothing can
//! fork away, signals all, thaws, and looks again. Both walk our own subtree only.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process},
};

use super::{CgroupDriver, CgroupError, CgroupPath, Cgroups, file, v1};

/// After this long a process is stuck in the kernel and somebody has to look.
const PATIENCE: Duration = Duration::from_secs(10);

impl Cgroups {
    /// Sends SIGKILL to all in a cgroup and below until it is empty. Absent is fine.
    ///
    /// # Errors
    /// `StillBusy` with the pids if that takes more than ten seconds.
    pub fn kill(&self, path: &CgroupPath) -> Result<(), CgroupError> {
        let since = Instant::now();
        if let Some(dir) = self.hierarchies.unified_dir(path) {
            match file::write(&dir.join("cgroup.kill"), "1") {
                Ok(()) => {
                    // A version 1 freezer holds back even SIGKILL.
                    self.thaw_v1(path);
                    wait_until_empty(&dir, since)?;
                }
                Err(CgroupError::Absent { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        // One version 1 hierarchy stands for all: tasks join and leave them together.
        let v1 = self.v1_dir("freezer", path).or_else(|| {
            let first = self.hierarchies.v1.first()?;
            Some(path.below(&first.mount))
        });
        match v1 {
            Some(dir) => kill_v1(&dir, since),
            None => Ok(()),
        }
    }

    /// Kills all in a cgroup and below, then removes it from all hierarchies. Absent is fine.
    pub fn remove(&self, path: &CgroupPath) -> Result<(), CgroupError> {
        self.kill(path)?;
        let since = Instant::now();
        for dir in self.hierarchies.dirs(path) {
            remove_tree(&dir, since)?;
        }
        if self.driver == CgroupDriver::Systemd {
            self.drop_scope(path);
        }
        Ok(())
    }

    /// Stops all in a cgroup and below from running until [`Self::resume`].
    pub fn pause(&self, path: &CgroupPath) -> Result<(), CgroupError> {
        match self.hierarchies.unified_dir(path) {
            Some(dir) => file::write(&dir.join("cgroup.freeze"), "1"),
            None => v1::freeze(&self.freezer(path)?),
        }
    }

    /// Lets all in a cgroup and below run again.
    pub fn resume(&self, path: &CgroupPath) -> Result<(), CgroupError> {
        match self.hierarchies.unified_dir(path) {
            Some(dir) => file::write(&dir.join("cgroup.freeze"), "0"),
            None => v1::thaw(&self.freezer(path)?),
        }
    }

    fn freezer(&self, path: &CgroupPath) -> Result<PathBuf, CgroupError> {
        self.v1_dir("freezer", path)
            .ok_or(CgroupError::ControllerMissing {
                controller: "freezer",
                field: "pause",
            })
    }

    fn thaw_v1(&self, path: &CgroupPath) {
        if let Some(dir) = self.v1_dir("freezer", path) {
            // Absent, or thawed already: nothing to do. What stays frozen shows up as busy.
            let _ = file::write(&dir.join("freezer.state"), "THAWED");
        }
    }
}

/// Pids of all processes in `dir` and below that are visible here. None if it is absent.
pub(super) fn processes(dir: &Path) -> Result<Vec<i32>, CgroupError> {
    let mut pids = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let Some(listed) = file::read_if_there(&dir.join("cgroup.procs"))? else {
            continue;
        };
        // 0 stands for a process outside of our pid namespace.
        pids.extend(
            listed
                .lines()
                .filter_map(|line| line.parse().ok())
                .filter(|&pid: &i32| pid > 0),
        );
        dirs.extend(children(&dir)?.into_iter().map(|name| dir.join(name)));
    }
    Ok(pids)
}

/// Names of the cgroups in a cgroup. None if it is absent.
pub(super) fn children(dir: &Path) -> Result<Vec<String>, CgroupError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(CgroupError::call("list", dir, source)),
    };
    Ok(entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

/// Waits for `populated 0` in `cgroup.events`, which the kernel announces by POLLPRI.
fn wait_until_empty(dir: &Path, since: Instant) -> Result<(), CgroupError> {
    let events = dir.join("cgroup.events");
    // Announcements come at most every ten milliseconds, so one that soon follows another, as in
    // a cgroup that was just filled, is late: look before it, at growing distances.
    let mut look_after_ns = 300_000;
    loop {
        // Opened anew each time: reading is what arms the next announcement.
        let opened = match File::open(&events) {
            Ok(opened) => opened,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(CgroupError::call("open", &events, source)),
        };
        let Some(content) = read_opened(&opened, &events)? else {
            return Ok(());
        };
        if file::keyed(&content, "populated") != Some(1) {
            return Ok(());
        }
        if since.elapsed() > PATIENCE {
            return Err(still_busy(dir, since));
        }
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: look_after_ns,
        };
        look_after_ns = (look_after_ns * 2).min(100_000_000);
        let mut polled = [PollFd::new(&opened, PollFlags::PRI)];
        match poll(&mut polled, Some(&patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(CgroupError::call("poll", &events, e.into())),
        }
    }
}

fn read_opened(mut opened: &File, path: &Path) -> Result<Option<String>, CgroupError> {
    let mut content = String::new();
    match io::Read::read_to_string(&mut opened, &mut content) {
        Ok(_) => Ok(Some(content)),
        // Removed under our hands.
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(None),
        Err(source) => Err(CgroupError::call("read", path, source)),
    }
}

/// Freezes, signals and thaws until nothing is left. Without a freezer a fork may get away once;
/// the next round has it.
fn kill_v1(dir: &Path, since: Instant) -> Result<(), CgroupError> {
    let mut pause = Duration::from_micros(200);
    loop {
        if processes(dir)?.is_empty() {
            return Ok(());
        }
        if since.elapsed() > PATIENCE {
            return Err(still_busy(dir, since));
        }
        let frozen = v1::freeze(dir).is_ok();
        let signalled = signal_all(dir);
        if frozen {
            v1::thaw(dir)?;
        }
        signalled?;
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn signal_all(dir: &Path) -> Result<(), CgroupError> {
    for pid in processes(dir)? {
        let Some(pid) = Pid::from_raw(pid) else {
            continue;
        };
        match kill_process(pid, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => return Err(CgroupError::call("kill a process of", dir, e.into())),
        }
    }
    Ok(())
}

/// Removes a cgroup and those below. The kernel answers EBUSY for a moment after the last
/// process has gone; what really is in there is killed.
fn remove_tree(dir: &Path, since: Instant) -> Result<(), CgroupError> {
    let mut pause = Duration::from_micros(100);
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty
                ) => {}
            Err(source) => return Err(CgroupError::call("rmdir", dir, source)),
        }
        if since.elapsed() > PATIENCE {
            return Err(still_busy(dir, since));
        }
        let below = children(dir)?;
        if !below.is_empty() {
            for child in below {
                remove_tree(&dir.join(child), since)?;
            }
            continue;
        }
        signal_all(dir)?;
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

fn still_busy(dir: &Path, since: Instant) -> CgroupError {
    CgroupError::StillBusy {
        path: dir.to_owned(),
        pids: processes(dir).unwrap_or_default(),
        waited_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}
