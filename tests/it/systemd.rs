//! Under systemd as process 1, on cgroup v2: its cgroup driver, and the unit that `docs/` offers.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use longshore_proto::cri::v1::{
    self as cri, PodSandboxState, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use longshore_tests::{
    host, images,
    node::{Runtime, connect},
    pods::{Bench, container, pod, pull, resources, script, unique, wait_for},
    program,
    registry::Registry,
    skip,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tonic::Code;

const TREE: &str = "/sys/fs/cgroup";

fn systemctl(args: &[&str]) -> Result<String> {
    let output = Command::new("systemctl").args(args).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn has_systemd() -> bool {
    let has = Path::new("/run/systemd/system").is_dir()
        && Path::new(TREE).join("cgroup.controllers").exists();
    if !has {
        skip("systemd", "systemd is not process 1 on cgroup v2");
    }
    has
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_are_scopes_in_the_slice_that_kubelet_names() -> Result<()> {
    if !has_systemd() {
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

/// The unit of `docs/`, installed under a name of its own and with directories of its own.
struct Unit {
    name: String,
    file: PathBuf,
    dir: TempDir,
}

impl Unit {
    fn install() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ls-").tempdir()?;
        let text = include_str!("../../docs/longshored.service");
        let start = "ExecStart=/usr/local/bin/longshored";
        let watchdog = "WatchdogSec=60";
        ensure!(text.contains(start) && text.contains(watchdog), "{text}");
        let started = format!(
            "ExecStart={} --data-dir {dir}/data --run-dir {dir}/run",
            program("longshored")?.display(),
            dir = dir.path().display(),
        );
        let text = text
            .replace(start, &started)
            .replace(watchdog, "WatchdogSec=15");
        let name = format!("longshored-test{}.service", std::process::id());
        let file = Path::new("/run/systemd/system").join(&name);
        fs::write(&file, text)?;
        systemctl(&["daemon-reload"])?;
        Ok(Self { name, file, dir })
    }

    /// Fails unless the order is carried out.
    fn order(&self, verb: &str) -> Result<()> {
        let output = Command::new("systemctl")
            .args([verb, &self.name])
            .output()?;
        if !output.status.success() {
            let log = Command::new("journalctl")
                .args(["--no-pager", "-n", "50", "-u", &self.name])
                .output()?;
            bail!(
                "{verb}: {}{}",
                String::from_utf8_lossy(&output.stderr),
                String::from_utf8_lossy(&log.stdout)
            );
        }
        Ok(())
    }

    fn pid(&self) -> Result<i32> {
        Ok(systemctl(&["show", "--value", "-p", "MainPID", &self.name])?.parse()?)
    }

    /// Kills the agent, and waits for the next.
    async fn signal(&self, signal: Signal) -> Result<()> {
        let before = self.pid()?;
        kill(Pid::from_raw(before), signal)?;
        wait_for("the next agent serves", async || {
            let active = systemctl(&["is-active", &self.name])? == "active";
            Ok(active && ![0, before].contains(&self.pid()?))
        })
        .await
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/longshore.sock")
    }

    /// No waiting: what systemd calls active serves.
    async fn runtime(&self) -> Result<Runtime> {
        Ok(RuntimeServiceClient::new(connect(&self.socket()).await?))
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // After a test that failed, its pods too.
        let _gone = systemctl(&["stop", &self.name]);
        let _gone = systemctl(&["kill", "--signal=KILL", "--kill-whom=all", &self.name]);
        let _gone = fs::remove_file(&self.file);
        let _gone = systemctl(&["daemon-reload"]);
    }
}

/// First process of the only container.
fn first_process(tree: &Path) -> Result<String> {
    let mut dirs = vec![tree.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            }
        }
        for pid in fs::read_to_string(dir.join("cgroup.procs"))?.lines() {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if command.starts_with(b"sleep\0") {
                return Ok(pid.to_owned());
            }
        }
    }
    bail!("no container below {}", tree.display())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_unit_of_the_docs_keeps_pods_through_all_that_befalls_the_agent() -> Result<()> {
    if !has_systemd() {
        return Ok(());
    }
    let links =
        || -> Result<Vec<u8>> { Ok(Command::new("ip").args(["-br", "link"]).output()?.stdout) };
    let links_before = links()?;
    let registry = Registry::start(TcpListener::bind("127.0.0.1:0")?)?;
    registry.push("toolbox:1", &images::toolbox()?);
    let toolbox = registry.reference("toolbox:1");
    let unit = Unit::install()?;
    unit.order("start")?;
    let mut runtime = unit.runtime().await?;
    let tree = Path::new(TREE).join("system.slice").join(&unit.name);
    let agent = fs::read_to_string(tree.join("agent/cgroup.procs"))?;
    assert_eq!(agent.trim(), unit.pid()?.to_string());

    let mut image_service = ImageServiceClient::new(connect(&unit.socket()).await?);
    pull(&mut image_service, &toolbox, None).await?;
    let mut config = pod("lasting");
    config.log_directory = unit.dir.path().join("logs").display().to_string();
    let run = cri::RunPodSandboxRequest {
        config: Some(config.clone()),
        ..Default::default()
    };
    let sandbox = runtime.run_pod_sandbox(run).await?.into_inner();
    let create = cri::CreateContainerRequest {
        pod_sandbox_id: sandbox.pod_sandbox_id.clone(),
        config: Some(container("main", &toolbox, &["sleep", "10000"])),
        sandbox_config: Some(config),
    };
    let container_id = runtime
        .create_container(create)
        .await?
        .into_inner()
        .container_id;
    let start = cri::StartContainerRequest {
        container_id: container_id.clone(),
    };
    runtime.start_container(start).await?;
    let process = first_process(&tree)?;

    let lives = async || -> Result<()> {
        assert_eq!(first_process(&tree)?, process);
        let exec = cri::ExecSyncRequest {
            container_id: container_id.clone(),
            cmd: ["echo", "well"].map(str::to_owned).to_vec(),
            timeout: 60,
        };
        let answer = unit.runtime().await?.exec_sync(exec).await?.into_inner();
        ensure!(answer.stdout == b"well\n", "{answer:?}");
        Ok(())
    };
    lives().await?;
    unit.order("restart")?;
    lives().await.context("after a restart")?;
    unit.signal(Signal::SIGKILL).await?;
    lives().await.context("after SIGKILL")?;
    unit.signal(Signal::SIGSTOP).await?;
    lives().await.context("after the watchdog")?;
    systemctl(&["daemon-reload"])?;
    lives().await.context("after daemon-reload")?;
    unit.order("stop")?;
    assert_eq!(first_process(&tree)?, process, "while there is no agent");
    unit.order("start")?;
    lives().await.context("after a stop")?;

    let mut runtime = unit.runtime().await?;
    let pod_sandbox_id = sandbox.pod_sandbox_id;
    let stop = cri::StopPodSandboxRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
    };
    runtime.stop_pod_sandbox(stop).await?;
    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id };
    runtime.remove_pod_sandbox(remove).await?;
    unit.order("stop")?;
    wait_for("the unit's cgroup is gone", async || Ok(!tree.exists())).await?;
    assert_eq!(host::cgroups("longshore-")?, Vec::<String>::new());
    wait_for("its links are gone", async || Ok(links()? == links_before)).await
}
