//! Against the kernel: own cgroups under a name that nobody else has, gone at the end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use super::*;

const NOBODY: [i32; 0] = [];

/// Our own root on this host, removed at the end whatever happens.
struct Ours {
    cgroups: Cgroups,
    /// Controllers that were enabled on the unified tree's root for the test.
    enabled: Option<PathBuf>,
}

impl Drop for Ours {
    fn drop(&mut self) {
        let removed = self.cgroups.remove(&self.cgroups.root.clone());
        if let Some(control) = &self.enabled {
            let _ = fs::write(control, "-hugetlb");
        }
        if !thread::panicking() {
            removed.expect("the test's cgroups can be removed");
        }
    }
}

fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("{test}: skipped, needs root");
    }
    root
}

/// As the host is.
fn ours(test: &str) -> Option<Ours> {
    if !is_root(test) {
        return None;
    }
    let cgroups = Cgroups::new(&InstanceId::random(), &CgroupChapterConfig::default())
        .expect("this host has cgroups");
    Some(Ours {
        cgroups,
        enabled: None,
    })
}

/// The unified tree alone, as on a version 2 host, with the controllers that a hybrid one leaves it.
fn unified_only(test: &str, wanted: &'static [&'static str]) -> Option<Ours> {
    if !is_root(test) {
        return None;
    }
    let found = Hierarchies::detect().expect("this host has cgroups");
    let hybrid = found.version() == CgroupVersion::V1;
    let Some(mount) = found.unified else {
        eprintln!("{test}: skipped, needs a cgroup2 mount");
        return None;
    };
    let cgroups = Cgroups {
        driver: CgroupDriver::Cgroupfs,
        root: CgroupPath(format!("longshore-{}", InstanceId::random())),
        swap_accounting: false,
        wanted,
        hierarchies: Hierarchies {
            v1: vec![],
            unified: Some(mount.clone()),
        },
    };
    let ours = Ours {
        cgroups,
        enabled: (hybrid && !wanted.is_empty()).then(|| mount.join("cgroup.subtree_control")),
    };
    ours.cgroups.make(&ours.cgroups.root).expect("a root");
    Some(ours)
}

impl Ours {
    fn container(&self, resources: serde_json::Value) -> CgroupPath {
        let pod = self
            .cgroups
            .pod(None, &SandboxId::random())
            .expect("a path below our root");
        let container = pod.child(&ContainerId::random());
        self.cgroups.create(&pod, None).expect("a pod");
        self.cgroups
            .create(&container, Some(&parse(resources)))
            .expect("a container");
        container
    }

    /// Runs a shell script as the engine would: the process attaches itself, then executes.
    fn run(&self, plan: &wire::CgroupPlan, script: &str) -> Child {
        let mut files = plan.v1_tasks.clone();
        if !plan.v1_freezer_leaf.is_empty() {
            files.push(format!("{}/tasks", plan.v1_freezer_leaf));
        }
        if !plan.v2_dir.is_empty() {
            files.push(format!("{}/cgroup.procs", plan.v2_dir));
        }
        let join: String = files
            .iter()
            .map(|file| format!("echo 0 > {file} || exit 99\n"))
            .collect();
        Command::new("/bin/sh")
            .arg("-c")
            .arg(format!("{join}\n{script}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell")
    }

    fn file(&self, controller: &str, path: &CgroupPath, name: &str) -> Option<String> {
        let dir = match self.cgroups.version() {
            CgroupVersion::V1 => self.cgroups.v1_dir(controller, path),
            CgroupVersion::V2 => self.cgroups.hierarchies.unified_dir(path),
        };
        let text = fs::read_to_string(dir?.join(name)).ok()?;
        Some(text.trim().to_owned())
    }
}

fn parse(resources: serde_json::Value) -> LinuxResources {
    serde_json::from_value(resources).expect("the test writes valid OCI JSON")
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < Duration::from_secs(20), "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn runs(child: &mut Child) -> bool {
    child.try_wait().expect("our own child").is_none()
}

#[test]
fn a_cgroup_is_made_joined_read_emptied_and_removed_in_every_hierarchy() {
    let Some(ours) = ours("a_cgroup_is_made") else {
        return;
    };
    let container = ours.container(json!({}));
    let dirs: Vec<_> = ours.cgroups.hierarchies.dirs(&container).collect();
    assert!(dirs.iter().all(|dir| dir.is_dir()), "{dirs:?}");
    assert_eq!(
        ours.cgroups.processes(&container).expect("readable"),
        NOBODY
    );

    let mut child = ours.run(&ours.cgroups.plan(&container), "exec sleep 1000");
    let pid = child.id().cast_signed();
    for dir in &dirs {
        wait_until("the process is in every hierarchy", || {
            kill::processes(dir).expect("readable") == [pid]
        });
    }
    let stats = ours.cgroups.stats(&container).expect("readable");
    assert!(stats.cpu_usage_ns > 0);
    if ours.cgroups.controllers().contains(&"memory") {
        assert!(stats.memory_usage_bytes > 0);
        assert!(stats.memory_working_set_bytes <= stats.memory_usage_bytes);
        assert_eq!(stats.memory_limit_bytes, None);
    }
    if ours.cgroups.controllers().contains(&"pids") {
        assert_eq!(stats.tasks, 1);
    }
    let metrics = ours.cgroups.metrics(&container).expect("readable");
    assert_eq!(metrics.processes, 1);
    assert_eq!(metrics.oom_kills, 0);

    let listed = ours.cgroups.inventory().expect("readable");
    assert!(listed.contains(&container), "{listed:?}");
    assert_eq!(listed.len(), 2, "{listed:?}");

    ours.cgroups.kill(&container).expect("killed");
    assert_eq!(
        ours.cgroups.processes(&container).expect("readable"),
        NOBODY
    );
    assert!(!runs(&mut child));
    ours.cgroups.remove(&container).expect("removed");
    assert!(dirs.iter().all(|dir| !dir.exists()), "{dirs:?}");
    ours.cgroups.remove(&container).expect("removed twice");
    ours.cgroups.kill(&container).expect("nothing to kill");
    assert!(matches!(
        ours.cgroups.stats(&container),
        Err(CgroupError::Absent { .. })
    ));
}

#[test]
fn limits_reach_the_kernel_and_are_changed_in_both_directions() {
    let Some(ours) = ours("limits_reach_the_kernel") else {
        return;
    };
    let present = ours.cgroups.controllers();
    if !["cpu", "cpuset", "memory", "pids"]
        .iter()
        .all(|name| present.contains(name))
    {
        eprintln!("limits_reach_the_kernel: skipped, this host has only {present:?}");
        return;
    }
    const MIB: i64 = 1 << 20;
    let memory = |limit: i64, swap: i64| json!({"memory": {"limit": limit, "swap": swap}});
    let container = ours.container(json!({
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0"},
        "memory": {"limit": 64 * MIB, "swap": 128 * MIB},
        "pids": {"limit": 42},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
    }));
    let stats = || ours.cgroups.stats(&container).expect("readable");
    assert_eq!(stats().memory_limit_bytes, Some(64 << 20));
    let metrics = ours.cgroups.metrics(&container).expect("readable");
    assert_eq!(metrics.tasks_limit, Some(42));
    assert_eq!(metrics.cpu_quota_us, Some(50_000));
    assert_eq!(metrics.cpu_period_us, Some(100_000));
    let expected_shares = match ours.cgroups.version() {
        CgroupVersion::V1 => 512,
        CgroupVersion::V2 => v2::weight_of_shares(512),
    };
    assert_eq!(metrics.cpu_shares, Some(expected_shares));
    assert_eq!(
        ours.file("cpuset", &container, "cpuset.cpus").as_deref(),
        Some("0")
    );
    for (limit, swap) in [(256, 512), (32, 32), (512, 512), (16, 64)] {
        ours.cgroups
            .update(&container, &parse(memory(limit * MIB, swap * MIB)))
            .expect("limits may go up and down");
        assert_eq!(
            stats().memory_limit_bytes,
            Some((limit * MIB).unsigned_abs())
        );
        if ours.cgroups.swap_accounting() {
            assert_eq!(
                stats().swap_limit_bytes,
                Some(((swap - limit) * MIB).unsigned_abs())
            );
        }
    }
    ours.cgroups
        .update(&container, &parse(memory(-1, -1)))
        .expect("no limit");
    assert_eq!(stats().memory_limit_bytes, None);
    ours.cgroups
        .update(&container, &parse(json!({"cpu": {"quota": -1}})))
        .expect("no quota");
    let metrics = ours.cgroups.metrics(&container).expect("readable");
    assert_eq!(metrics.cpu_quota_us, None);
    for bad in [
        json!({"memory": {"limit": 64 * MIB, "swap": 32 * MIB}}),
        json!({"cpu": {"cpus": "4000-5000"}}),
        json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}),
    ] {
        assert!(
            ours.cgroups
                .update(&container, &parse(bad.clone()))
                .is_err(),
            "{bad}"
        );
    }
}

#[test]
fn a_memory_limit_below_usage_is_refused() {
    let Some(ours) = ours("a_memory_limit_below_usage") else {
        return;
    };
    if !ours.cgroups.controllers().contains(&"memory") {
        eprintln!("a_memory_limit_below_usage: skipped, no memory controller");
        return;
    }
    let container = ours.container(json!({}));
    // tail keeps its input, which has no line end, in memory.
    let hoard = "(head -c 20000000 /dev/zero; sleep 1000) | tail";
    let mut child = ours.run(&ours.cgroups.plan(&container), hoard);
    wait_until("memory is used", || {
        ours.cgroups
            .stats(&container)
            .is_ok_and(|stats| stats.memory_usage_bytes > 16_000_000)
    });
    let refused = ours
        .cgroups
        .update(&container, &parse(json!({"memory": {"limit": 4_000_000}})));
    assert!(
        matches!(
            refused,
            Err(CgroupError::BelowUsage {
                limit: 4_000_000,
                ..
            })
        ),
        "{refused:?}"
    );
    ours.cgroups.kill(&container).expect("killed");
    assert!(!runs(&mut child));
}

#[test]
fn a_kill_for_memory_is_counted() {
    let Some(ours) = ours("a_kill_for_memory") else {
        return;
    };
    if !ours.cgroups.controllers().contains(&"memory") {
        eprintln!("a_kill_for_memory: skipped, no memory controller");
        return;
    }
    let container = ours.container(json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}}));
    let mut child = ours.run(
        &ours.cgroups.plan(&container),
        "head -c 100000000 /dev/zero | tail > /dev/null",
    );
    child.wait().expect("our own child");
    assert!(ours.cgroups.oom_kills(&container).expect("readable") >= 1);
}

#[test]
fn a_fork_bomb_dies() {
    let Some(ours) = ours("a_fork_bomb") else {
        return;
    };
    a_fork_bomb_dies_in(&ours);
}

#[test]
fn a_fork_bomb_dies_on_version_1_alone() {
    let Some(mut ours) = ours("a_fork_bomb_v1") else {
        return;
    };
    if ours.cgroups.version() != CgroupVersion::V1 {
        eprintln!("a_fork_bomb_v1: skipped, needs version 1");
        return;
    }
    let root = ours.cgroups.root.clone();
    let unified = ours.cgroups.hierarchies.unified.take();
    a_fork_bomb_dies_in(&ours);
    if let Some(mount) = unified {
        fs::remove_dir(root.below(&mount)).expect("the root was made there too");
    }
}

fn a_fork_bomb_dies_in(ours: &Ours) {
    let container = ours.container(json!({"pids": {"limit": 60}}));
    let bomb = "while :; do (while :; do sleep 0.01 & done) & done";
    let mut child = ours.run(&ours.cgroups.plan(&container), bomb);
    wait_until("it has multiplied", || {
        ours.cgroups
            .processes(&container)
            .is_ok_and(|pids| pids.len() > 20)
    });
    ours.cgroups.kill(&container).expect("killed");
    assert_eq!(
        ours.cgroups.processes(&container).expect("readable"),
        NOBODY
    );
    wait_until("the first one is dead", || !runs(&mut child));
    ours.cgroups.remove(&container).expect("removed");
}

#[test]
fn a_paused_container_does_not_run_and_can_be_killed() {
    let Some(ours) = ours("a_paused_container") else {
        return;
    };
    let container = ours.container(json!({}));
    let mut child = ours.run(&ours.cgroups.plan(&container), "while :; do :; done");
    let usage = || {
        ours.cgroups
            .stats(&container)
            .expect("readable")
            .cpu_usage_ns
    };
    wait_until("it runs", || usage() > 1_000_000);
    ours.cgroups.pause(&container).expect("paused");
    wait_until("it has come to rest", || {
        let before = usage();
        thread::sleep(Duration::from_millis(30));
        usage() == before
    });
    let at_rest = usage();
    ours.cgroups.resume(&container).expect("resumed");
    wait_until("it runs again", || usage() > at_rest);
    ours.cgroups.pause(&container).expect("paused");
    ours.cgroups.remove(&container).expect("removed");
    wait_until("it is dead", || !runs(&mut child));
}

#[test]
fn an_exec_leaf_names_what_it_started() {
    for ours in [ours("an_exec_leaf"), unified_only("an_exec_leaf", &[])]
        .into_iter()
        .flatten()
    {
        let container = ours.container(json!({}));
        let mut first = ours.run(&ours.cgroups.plan(&container), "exec sleep 1000");
        let plan = ours.cgroups.exec_plan(&container, 77).expect("a leaf");
        let leaf = if plan.v1_freezer_leaf.is_empty() {
            PathBuf::from(&plan.v2_dir)
        } else {
            PathBuf::from(&plan.v1_freezer_leaf)
        };
        assert!(leaf.ends_with("exec-4d"), "{leaf:?}");
        let mut exec = ours.run(&plan, "sleep 1000 & exec sleep 1000");
        wait_until("both of the exec are in the leaf", || {
            kill::processes(&leaf).expect("readable").len() == 2
        });
        wait_until("all are in the container", || {
            kill::processes(leaf.parent().expect("the container's"))
                .expect("readable")
                .len()
                == 3
        });
        ours.cgroups
            .remove_exec(&container, 77)
            .expect("one in use stays");
        assert!(leaf.exists());
        ours.cgroups
            .kill(&container.exec_leaf(77))
            .expect("the leaf alone is killed");
        wait_until("the exec is dead", || !runs(&mut exec));
        assert!(runs(&mut first));
        wait_until("the leaf can go", || {
            ours.cgroups.remove_exec(&container, 77).expect("removable");
            !leaf.exists()
        });
        ours.cgroups
            .remove_exec(&container, 77)
            .expect("removed twice");
        ours.cgroups.remove(&container).expect("removed");
        wait_until("the container is dead", || !runs(&mut first));
    }
}

#[test]
fn devices_that_are_not_allowed_cannot_be_opened() {
    for ours in [ours("devices"), unified_only("devices", &[])]
        .into_iter()
        .flatten()
    {
        let device = tempfile::tempdir().expect("a directory");
        let node = device.path().join("kmsg");
        let container = ours.container(json!({"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"},
        ]}));
        let script = format!(
            "mknod {node} c 1 11 && echo made
             (: < {node}) 2>/dev/null && echo read
             (: >> {node}) 2>/dev/null && echo written
             (: < /dev/full) 2>/dev/null && echo full
             (: < /dev/mem) 2>/dev/null && echo mem
             : > /dev/null && echo null",
            node = node.display()
        );
        let child = ours.run(&ours.cgroups.plan(&container), &script);
        let said = child.wait_with_output().expect("our own child");
        assert_eq!(
            String::from_utf8_lossy(&said.stdout),
            "made\nwritten\nfull\nnull\n",
            "{:?}",
            ours.cgroups.version()
        );
        // Repeating it with other rules replaces them.
        if ours.cgroups.version() == CgroupVersion::V2 {
            ours.cgroups
                .create(
                    &container,
                    Some(&parse(
                        json!({"devices": [{"allow": true, "access": "rwm"}]}),
                    )),
                )
                .expect("repeatable");
            let script = format!("(: < {node}) && echo read", node = node.display());
            let child = ours.run(&ours.cgroups.plan(&container), &script);
            let said = child.wait_with_output().expect("our own child");
            assert_eq!(String::from_utf8_lossy(&said.stdout), "read\n");
        }
    }
}

#[test]
fn the_unified_tree_alone_kills_and_removes_what_a_container_made_below_itself() {
    let Some(ours) = unified_only("the_unified_tree", &[]) else {
        return;
    };
    assert_eq!(ours.cgroups.version(), CgroupVersion::V2);
    let container = ours.container(json!({}));
    let dir = ours
        .cgroups
        .hierarchies
        .unified_dir(&container)
        .expect("a unified tree");
    let script = format!(
        "mkdir -p {dir}/own/deep && echo 0 > {dir}/own/deep/cgroup.procs && sleep 1000",
        dir = dir.display()
    );
    let mut child = ours.run(&ours.cgroups.plan(&container), &script);
    wait_until("it has moved", || {
        !kill::processes(&dir.join("own"))
            .expect("readable")
            .is_empty()
    });
    assert!(
        !ours
            .cgroups
            .processes(&container)
            .expect("readable")
            .is_empty()
    );
    let stats = ours.cgroups.stats(&container).expect("readable");
    assert!(stats.cpu_usage_ns > 0);
    ours.cgroups.remove(&container).expect("removed");
    assert!(!dir.exists());
    wait_until("it is dead", || !runs(&mut child));
}

#[test]
fn controllers_of_version_2_are_enabled_above_containers_and_not_in_them() {
    let Some(ours) = unified_only("controllers_of_version_2", CONTROLLERS) else {
        return;
    };
    let container = ours.container(json!({}));
    let dir = ours
        .cgroups
        .hierarchies
        .unified_dir(&container)
        .expect("a unified tree");
    let enabled = |dir: &Path| {
        fs::read_to_string(dir.join("cgroup.subtree_control"))
            .expect("readable")
            .trim()
            .to_owned()
    };
    let present = ours.cgroups.controllers();
    for name in &present {
        assert!(
            enabled(dir.parent().expect("the pod's")).contains(name),
            "{name}"
        );
    }
    assert_eq!(enabled(&dir), "");
    if present.contains(&"hugetlb") && dir.join("hugetlb.2MB.max").exists() {
        ours.cgroups
            .update(
                &container,
                &parse(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}]})),
            )
            .expect("the controller is there");
        assert_eq!(
            ours.file("hugetlb", &container, "hugetlb.2MB.max")
                .as_deref(),
            Some("4194304")
        );
    }
    if !present.contains(&"memory") {
        let refused = ours
            .cgroups
            .update(&container, &parse(json!({"memory": {"limit": 1 << 30}})));
        assert!(
            matches!(
                refused,
                Err(CgroupError::ControllerMissing {
                    controller: "memory",
                    ..
                })
            ),
            "{refused:?}"
        );
    }
}

#[test]
fn a_parent_is_a_plain_path_below_the_root() {
    let sandbox = SandboxId::random();
    for (parent, expected) in [
        (
            "/kubepods/besteffort/podx",
            Some("kubepods/besteffort/podx/"),
        ),
        (
            "/kubepods/besteffort/podx/",
            Some("kubepods/besteffort/podx/"),
        ),
        ("a.slice", Some("a.slice/")),
        ("/a/./b", Some("a/b/")),
        ("//a//b", Some("a/b/")),
        ("/", Some("")),
        ("/a/../b", None),
        ("..", None),
        ("/a\nb", None),
        ("/a\0b", None),
    ] {
        let found = CgroupPath::below_parent(parent, sandbox.as_str()).ok();
        let expected = expected.map(|prefix| CgroupPath(format!("{prefix}{sandbox}")));
        assert_eq!(found, expected, "{parent:?}");
    }
    for bad in ["", "/", ".", "a/..", &"x".repeat(300)] {
        assert!(bad.parse::<CgroupPath>().is_err(), "{bad:?}");
    }
}

#[test]
fn a_subtree_from_systemd_is_used_if_the_agent_sits_in_a_leaf_of_it() {
    let Some(ours) = unified_only("a_subtree_from_systemd", &[]) else {
        return;
    };
    let unit = ours.cgroups.root.child_named("unit").expect("a path");
    ours.cgroups.make(&unit).expect("made");
    let own = format!("12:pids:/elsewhere\n0::/{unit}/agent\n");
    let parent = |own: &str| delegated_parent(&ours.cgroups.hierarchies, own);
    assert_eq!(parent(&own), None, "nothing is delegated yet");
    let dir = ours
        .cgroups
        .hierarchies
        .unified_dir(&unit)
        .expect("a unified tree");
    rustix::fs::setxattr(
        &dir,
        "trusted.delegate",
        b"1",
        rustix::fs::XattrFlags::empty(),
    )
    .expect("cgroups take attributes");
    assert_eq!(parent(&own), Some(unit.to_string()));
    assert_eq!(parent(&format!("0::/{unit}\n")), None, "the unit's own");
    assert_eq!(parent("0::/\n"), None);
}
