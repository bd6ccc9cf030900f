//! Cgroups that an init inside divides as it likes, and whether all in one stand still.
//!
//! The limits are on the directory above. The delegated one belongs to the container's root, with
//! those of its files alone that make and fill cgroups below it: what limits it is the host's.
//!
//! Written down in cgroups(7), "Delegation", and the kernel's `admin-guide/cgroup-v2`.

use std::{
    fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{CgroupError, CgroupPath, Cgroups, file};

/// Files of version 1 that move processes.
const V1_FILES: [&str; 2] = ["cgroup.procs", "tasks"];
/// Files of version 2 that belong to whoever a subtree is delegated to, where the kernel does not
/// list them.
const V2_FILES: [&str; 3] = ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];
/// The kernel's own list.
const DELEGATE: &str = "/sys/kernel/cgroup/delegate";
/// How long a freeze may take before it is given up: a task in the kernel may not stand still.
const FREEZE_PATIENCE: Duration = Duration::from_secs(10);

impl Cgroups {
    /// Makes the payload of a container's cgroup and gives it to `owner` (user, group); repeating it
    /// changes nothing.
    ///
    /// # Errors
    /// `NoTracking` if the host has no hierarchy in which an init could follow its processes;
    /// `Call`.
    pub fn delegate(&self, container: &CgroupPath, owner: (u32, u32)) -> Result<(), CgroupError> {
        if self.hierarchies.unified.is_none() && self.named().is_none() {
            return Err(CgroupError::NoTracking);
        }
        let payload = container.payload();
        self.make(&payload)?;
        for one in &self.hierarchies.v1 {
            give(&payload.below(&one.mount), &V1_FILES, owner)?;
        }
        if let Some(dir) = self.hierarchies.unified_dir(&payload) {
            let listed = fs::read_to_string(DELEGATE).unwrap_or_default();
            let mut files: Vec<&str> = listed.lines().filter(|name| is_plain(name)).collect();
            if files.is_empty() {
                files = V2_FILES.to_vec();
            }
            give(&dir, &files, owner)?;
        }
        Ok(())
    }

    /// Stops all in a cgroup and below from running; all of them stand still when this returns.
    ///
    /// # Errors
    /// `Call` with a time-out if they do not come to rest; they run again then.
    pub fn freeze(&self, path: &CgroupPath) -> Result<(), CgroupError> {
        self.pause(path)?;
        let since = Instant::now();
        while !self.is_frozen(path) {
            if since.elapsed() > FREEZE_PATIENCE {
                self.resume(path)?;
                let dir = PathBuf::from(path.as_str());
                return Err(CgroupError::call(
                    "freeze",
                    &dir,
                    io::ErrorKind::TimedOut.into(),
                ));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Whether all in a cgroup stand still by [`Self::freeze`].
    pub fn is_frozen(&self, path: &CgroupPath) -> bool {
        match self.hierarchies.unified_dir(path) {
            Some(dir) => file::read(&dir.join("cgroup.events"))
                .is_ok_and(|text| file::keyed(&text, "frozen") == Some(1)),
            None => self
                .v1_dir("freezer", path)
                .and_then(|dir| file::read(&dir.join("freezer.state")).ok())
                .is_some_and(|state| state.trim() == "FROZEN"),
        }
    }

    /// The hierarchy in which systemd and its kin follow processes on version 1.
    fn named(&self) -> Option<&Path> {
        let named = self
            .hierarchies
            .v1
            .iter()
            .find(|one| one.controllers.is_empty());
        named.map(|one| one.mount.as_path())
    }
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.contains('/')
}

fn give(dir: &Path, files: &[&str], owner: (u32, u32)) -> Result<(), CgroupError> {
    let (uid, gid) = (Some(owner.0), Some(owner.1));
    chown(dir, uid, gid).map_err(|source| CgroupError::call("chown", dir, source))?;
    for name in files {
        let path = dir.join(name);
        match chown(&path, uid, gid) {
            // What this kernel or this hierarchy does not have.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            given => given.map_err(|source| CgroupError::call("chown", &path, source))?,
        }
    }
    Ok(())
}
