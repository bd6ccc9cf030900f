//! Killing all that lives in a cgroup: the one thing that the shim does to cgroups by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::wire::CgroupPlan;

/// Waits for the freezer before signals are sent all the same, a millisecond each.
const FREEZE_TRIES: u32 = 20;

/// Kills everything in the cgroup that a plan names; what is gone already is fine.
///
/// An exec's leaf in the version 1 freezer comes first, since its version 2 directory may then
/// be the whole container's.
pub(crate) fn kill(plan: &CgroupPlan) {
    if !plan.v1_freezer_leaf.is_empty() {
        kill_v1(Path::new(&plan.v1_freezer_leaf));
    } else if !plan.v2_dir.is_empty() {
        // Fork-proof by the kernel's promise. Source: cgroup-v2.rst, cgroup.kill (Linux 5.14).
        let _ = fs::write(Path::new(&plan.v2_dir).join("cgroup.kill"), "1");
    } else if let Some(freezer) = freezer_dir(&plan.v1_tasks) {
        kill_v1(&freezer);
    }
}

/// Kills what an exec has started, if its leaf names that; without one the cgroup is all of the
/// container's.
pub(crate) fn kill_leaf(plan: &CgroupPlan) {
    if !plan.v1_freezer_leaf.is_empty() || plan.v1_tasks.is_empty() {
        kill(plan);
    }
}

/// The freezer's directory among the `tasks` files of a plan.
pub(crate) fn freezer_dir(tasks: &[String]) -> Option<PathBuf> {
    tasks
        .iter()
        .find(|path| path.split('/').any(|part| part == "freezer"))
        .and_then(|path| Path::new(path).parent())
        .map(Path::to_owned)
}

/// Nothing in a frozen cgroup can fork or end, so the list of pids is complete and none is used
/// again between reading and signalling. The signal acts with the thaw.
fn kill_v1(dir: &Path) {
    let state = dir.join("freezer.state");
    let frozen = fs::write(&state, "FROZEN").is_ok() && wait_frozen(&state);
    // Not frozen: a race with fork is possible, so look again until nothing new is found.
    for _ in 0..if frozen { 1 } else { 5 } {
        if kill_tree(dir) == 0 {
            break;
        }
    }
    let _ = fs::write(&state, "THAWED");
}

fn wait_frozen(state: &Path) -> bool {
    for _ in 0..FREEZE_TRIES {
        match fs::read_to_string(state) {
            Ok(text) if text.trim() == "FROZEN" => return true,
            Ok(_) => sleep(Duration::from_millis(1)),
            Err(_) => return false,
        }
        // A task that could not be frozen at the first try is tried again only when asked.
        let _ = fs::write(state, "FROZEN");
    }
    false
}

/// Signals all below a directory and returns how many there were.
fn kill_tree(dir: &Path) -> usize {
    let mut count = 0;
    let own = std::process::id().cast_signed();
    let listed = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in listed.lines().filter_map(|line| line.parse::<i32>().ok()) {
        if pid > 1 && pid != own {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            count += 1;
        }
    }
    let children = fs::read_dir(dir).into_iter().flatten().flatten();
    for child in children {
        if child.file_type().is_ok_and(|kind| kind.is_dir()) {
            count += kill_tree(&child.path());
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_freezer_is_found_among_the_hierarchies() {
        let tasks = |list: &[&str]| {
            list.iter()
                .map(|path| (*path).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            freezer_dir(&tasks(&[
                "/sys/fs/cgroup/cpuset/a/tasks",
                "/sys/fs/cgroup/freezer/a/tasks"
            ])),
            Some(PathBuf::from("/sys/fs/cgroup/freezer/a"))
        );
        assert_eq!(freezer_dir(&tasks(&["/sys/fs/cgroup/cpu/a/tasks"])), None);
    }
}
