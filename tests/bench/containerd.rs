//! Debian's containerd with runc and the CNI plugins, on a machine of its own.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    host::{can_run, pids, remove_cgroups},
    machine::Machine,
    node::{Runtime, connect},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

/// A running containerd; ends with everything of its own when dropped.
pub(crate) struct Containerd {
    dir: TempDir,
    child: Child,
}

impl Containerd {
    pub(crate) async fn start(machine: &Machine, sandbox_image: &str) -> Result<Self> {
        if !can_run("containerd", &["--version"]) || !can_run("runc", &["--version"]) {
            bail!("install the Debian packages  containerd runc containernetworking-plugins");
        }
        let dir = tempfile::Builder::new().prefix("cd-").tempdir()?;
        // Its shims, network namespaces and CNI results have fixed places: ours are in memory.
        for place in ["/run", "/var/lib/cni"] {
            if !Path::new(place).exists() {
                fs::create_dir_all(place)?;
            }
            machine.output("mount", &["-t", "tmpfs", "tmpfs", place])?;
        }
        fs::create_dir_all(dir.path().join("net.d"))?;
        fs::create_dir_all(dir.path().join("logs"))?;
        fs::write(
            dir.path().join("net.d/10-bench.conflist"),
            conflist(dir.path()),
        )?;
        let config = dir.path().join("config.toml");
        fs::write(&config, configuration(dir.path(), sandbox_image))?;
        let log = File::create(dir.path().join("containerd.log"))?;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = machine.spawn(command)?;
        let this = Self { dir, child };
        this.await_ready().await?;
        Ok(this)
    }

    async fn await_ready(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let tried = async {
                let channel = connect(&self.socket()).await?;
                let request = cri::StatusRequest::default();
                let status = Runtime::new(channel)
                    .status(request)
                    .await?
                    .into_inner()
                    .status;
                let ready = status.is_some_and(|status| {
                    status.conditions.iter().all(|condition| condition.status)
                });
                anyhow::ensure!(ready, "not ready");
                Ok(())
            };
            match tried.await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end => {
                    let log = fs::read_to_string(self.dir.path().join("containerd.log"))
                        .unwrap_or_default();
                    let tail: Vec<_> = log.lines().rev().take(10).collect();
                    return Err(error).with_context(|| format!("containerd: {}", tail.join("\n")));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("containerd.sock")
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _dead = self.child.kill();
        let _reaped = self.child.wait();
        let place = self.dir.path().to_string_lossy().into_owned();
        for pid in pids().unwrap_or_default() {
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if command.contains(&place)
                && let Ok(pid) = i32::try_from(pid)
            {
                let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let _busy = remove_cgroups(crate::CGROUP);
    }
}

fn configuration(dir: &Path, sandbox_image: &str) -> String {
    let dir = dir.display();
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{dir}/containerd.sock"
[ttrpc]
address = "{dir}/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{sandbox_image}"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{dir}/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "runc"
SystemdCgroup = false
"#
    )
}

/// A bridge with addresses, as ours; masquerade needs iptables and is left out: in its favour.
fn conflist(dir: &Path) -> String {
    format!(
        r#"{{
  "cniVersion": "0.4.0",
  "name": "bench",
  "plugins": [{{
    "type": "bridge",
    "bridge": "bench0",
    "isGateway": true,
    "ipMasq": false,
    "hairpinMode": true,
    "ipam": {{
      "type": "host-local",
      "dataDir": "{}/ipam",
      "ranges": [[{{"subnet": "10.77.0.0/16"}}]],
      "routes": [{{"dst": "0.0.0.0/0"}}]
    }}
  }}]
}}
"#,
        dir.display()
    )
}
