//! How often the kernel killed for memory: read before an exit is made known, so that its reason
//! is right from the first moment.

use std::path::Path;

use super::{CgroupError, CgroupPath, CgroupVersion, Cgroups, file};

impl Cgroups {
    /// Processes that were killed in this cgroup (on version 2 and below) because a memory limit
    /// was reached, here or above. 0 if the cgroup or the memory controller is absent.
    ///
    /// Source: `memory.oom_control` of version 1, `memory.events` of version 2.
    pub fn oom_kills(&self, path: &CgroupPath) -> Result<u64, CgroupError> {
        let (dir, name) = match self.version() {
            CgroupVersion::V1 => (self.v1_dir("memory", path), "memory.oom_control"),
            CgroupVersion::V2 => (self.hierarchies.unified_dir(path), "memory.events"),
        };
        match dir {
            Some(dir) => count(&dir.join(name)),
            None => Ok(0),
        }
    }
}

fn count(file: &Path) -> Result<u64, CgroupError> {
    let text = file::read_if_there(file)?;
    // Kernels before 4.13 have no such line on version 1.
    Ok(text
        .and_then(|text| file::keyed(&text, "oom_kill"))
        .unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_counted() {
        for (text, kills) in [
            ("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", Some(3)),
            (
                "low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n",
                Some(1),
            ),
            ("oom_kill_disable 0\nunder_oom 0\n", None),
        ] {
            assert_eq!(file::keyed(text, "oom_kill"), kills, "{text}");
        }
        assert_eq!(count(Path::new("/nonexistent/memory.events")).ok(), Some(0));
    }
}
