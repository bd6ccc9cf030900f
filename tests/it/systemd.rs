//! The systemd cgroup driver; needs systemd as process 1 and cgroup v2.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use longshore_proto::cri::v1::{self as cri, PodSandboxState};
use longshore_tests::{
    pods::{Bench, container, pod, resources, script, unique, wait_for},
    skip,
};
use tonic::Code;

const TREE: &str = "/sys/fs/cgroup";

fn systemctl(args: &[&str]) -> Result<String> {
    let output = Command::new("systemctl").args(args).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_are_scopes_in_the_slice_that_kubelet_names() -> Result<()> {
    if !Path::new("/run/systemd/system").is_dir()
        || !Path::new(TREE).join("cgroup.controllers").exists()
    {
        skip("systemd", "systemd is not process 1 on cgroup v2");
        return Ok(());
    }
    let mut bench = Bench::start_configured("[cgroup]\ndriver = \"systemd\"\n").await?;
    let toolbox = bench.toolbox.clone();
    let config = bench
        .runtime
        .runtime_config(cri::RuntimeConfigRequest {})
        .await?
        .into_inner();
    let driver = config.linux.context("of Linux")?.cgroup_driver();
    assert_eq!(driver, cri::CgroupDriver::Systemd);

    let mut wrong = pod("wrong");
    wrong.linux.get_or_insert_default().cgroup_parent = "/kubepods/pod1".to_owned();
    let refused = bench.run(wrong).await.expect_err("a path is no slice");
    let refused = refused
        .downcast_ref::<tonic::Status>()
        .context("a status")?;
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert!(refused.message().contains(".slice"), "{refused:?}");

    // As kubelet does: the slice of the pod is there before, and is removed after.
    let slice = format!("lstest-pod{}.slice", unique());
    let mut config = pod("kubes");
    config
        .linux
        .get_or_insert_default()
        .cgroup_parent
        .clone_from(&slice);
    let kubes = bench.run(config).await?;
    let mut limited = container("main", &toolbox, &["sleep", "10000"]);
    resources(&mut limited).memory_limit_in_bytes = 64 << 20;
    let main = bench.launch(&kubes, limited).await?;
    let unit = format!("longshore-{}.scope", kubes.id);
    let scope = Path::new(TREE)
        .join("lstest.slice")
        .join(&slice)
        .join(&unit);
    assert_eq!(systemctl(&["is-active", &unit])?, "active");
    let shown = systemctl(&["show", "-p", "Delegate", "-p", "Slice", &unit])?;
    assert!(shown.contains("Delegate=yes"), "{shown}");
    assert!(shown.contains(&format!("Slice={slice}")), "{shown}");
    let limit = fs::read_to_string(scope.join(&kubes.id).join(&main).join("memory.max"))?;
    assert_eq!(limit.trim(), (64 << 20).to_string());
    let supervisors = fs::read_to_string(scope.join("supervisor/cgroup.procs"))?;
    assert_eq!(supervisors.lines().count(), 1, "{supervisors:?}");

    // Everything works as below any other parent.
    assert_eq!(bench.exec_ok(&main, "echo well").await?, "well\n");
    let mut hungry = script("hungry", &toolbox, "exec tail /dev/zero");
    resources(&mut hungry).memory_limit_in_bytes = 20 << 20;
    let hungry = bench.launch(&kubes, hungry).await?;
    assert_eq!(bench.wait_exited(&hungry).await?.reason, "OOMKilled");
    bench.crash().await?;
    assert_eq!(bench.exec_ok(&main, "echo well").await?, "well\n");
    // systemd works on its units without touching what is ours.
    systemctl(&["daemon-reload"])?;
    let own = bench.run(pod("own")).await?;
    let second = container("second", &toolbox, &["sleep", "10000"]);
    bench.launch(&own, second).await?;
    assert_eq!(bench.exec_ok(&main, "echo well").await?, "well\n");
    bench.node.fsck_clean().await?;

    // A scope that an operator stops is a lost pod, no leak.
    let third = bench.run(pod("stopped")).await?;
    systemctl(&[
        "kill",
        "--signal=KILL",
        &format!("longshore-{}.scope", third.id),
    ])?;
    wait_for("the loss is seen", async || {
        let state = bench.pod_status(&third).await?.state();
        Ok(state == PodSandboxState::SandboxNotready)
    })
    .await?;
    for one in [&kubes, &own, &third] {
        bench.remove(one).await?;
    }
    wait_for("the scope is gone", async || Ok(!scope.exists())).await?;
    systemctl(&["stop", &slice, "lstest.slice"])?;
    let left = scope.parent().context("the slice")?;
    ensure!(!left.exists(), "{} is left", left.display());
    bench.finish().await
}
