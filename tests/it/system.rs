//! System containers: a real init, its console, its end and its beginning again.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use longshore_proto::{
    cri::v1 as cri,
    longshore::v1::{
        self as api, SystemState as State, lifecycle_service_client::LifecycleServiceClient,
        system_service_client::SystemServiceClient,
    },
};
use longshore_tests::{
    images::{ImageBuilder, Layer, LayerBuilder, Packing},
    pods::{Bench, WAIT_LIMIT, wait_for},
    skip,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

/// Commands of busybox that guests use.
const APPLETS: [&str; 30] = [
    "sh", "cat", "cut", "echo", "env", "grep", "halt", "hostname", "id", "kill", "ln", "ls",
    "mkdir", "mount", "mv", "poweroff", "ps", "reboot", "rm", "sed", "sleep", "sort", "stat",
    "sync", "touch", "tr", "true", "tty", "umount", "wc",
];

const INITTAB: &str = "\
::sysinit:/etc/rc
::respawn:-/bin/sh
::shutdown:/bin/echo going down
::ctrlaltdel:/bin/true
";

const RC: &str = "\
#!/bin/sh
echo booted >>/boots
echo \"welcome to $(hostname), boot $(wc -l </boots)\"
";

/// A guest whose init is busybox's, or what `init` says.
fn busybox_guest(init: Option<&str>) -> Result<Layer> {
    let given = std::env::var_os("LONGSHORE_BUSYBOX").map(PathBuf::from);
    let busybox = given
        .into_iter()
        .chain(["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from))
        .find(|path| path.exists())
        .context("no busybox on this host")?;
    let mut layer = LayerBuilder::new();
    for dir in [
        "bin", "sbin", "etc", "root", "proc", "sys", "dev", "run", "tmp", "var", "mnt",
    ] {
        layer = layer.dir(dir);
    }
    layer = layer.copy(&busybox, "bin/busybox")?;
    for applet in APPLETS {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    layer = match init {
        None => layer.symlink("sbin/init", "../bin/busybox"),
        Some(script) => layer.file("sbin/init", 0o755, format!("#!/bin/sh\n{script}\n")),
    };
    Ok(layer
        .file("etc/inittab", 0o644, INITTAB)
        .file("etc/rc", 0o755, RC)
        .file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n")
        .file("etc/group", 0o644, "root:x:0:\ntty:x:5:\n")
        .file("etc/hostname", 0o644, "builder\n")
        .file("etc/resolv.conf", 0o644, "nameserver 192.0.2.1\n")
        .build())
}

struct Guests {
    bench: Bench,
    systems: SystemServiceClient<Channel>,
}

impl Guests {
    /// None where busybox is missing, which is told.
    async fn start(test: &str) -> Result<Option<Self>> {
        let Ok(layer) = busybox_guest(None) else {
            skip(test, "no busybox (package busybox-static)");
            return Ok(None);
        };
        let mut bench = Bench::start().await?;
        let image = ImageBuilder::new(vec![layer]).build();
        bench.offer("guest:1", &image).await?;
        Ok(Some(Self {
            systems: SystemServiceClient::new(bench.node.channel()),
            bench,
        }))
    }

    fn reconnect(&mut self) {
        self.bench.reconnect();
        self.systems = SystemServiceClient::new(self.bench.node.channel());
    }

    fn config(&self, name: &str) -> api::SystemConfig {
        api::SystemConfig {
            name: name.to_owned(),
            image: self.bench.registry.reference("guest:1"),
            ..Default::default()
        }
    }

    async fn offer(&mut self, name: &str, init: &str) -> Result<String> {
        let image = ImageBuilder::new(vec![busybox_guest(Some(init))?]).build();
        self.bench.offer(name, &image).await?;
        Ok(self.bench.registry.reference(name))
    }

    async fn create(&mut self, config: api::SystemConfig) -> Result<api::System, Status> {
        let request = api::CreateSystemRequest {
            config: Some(config),
            ..Default::default()
        };
        let made = self.systems.create_system(request).await?.into_inner();
        Ok(made.system.unwrap_or_default())
    }

    async fn boot(&mut self, name: &str) -> Result<api::System, Status> {
        let request = api::StartSystemRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        let started = self.systems.start_system(request).await?.into_inner();
        Ok(started.system.unwrap_or_default())
    }

    /// Makes one and starts it.
    async fn run(&mut self, name: &str) -> Result<api::System> {
        let config = self.config(name);
        self.create(config).await?;
        Ok(self.boot(name).await?)
    }

    async fn stop(&mut self, name: &str) -> Result<api::System, Status> {
        let request = api::StopSystemRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        let stopped = self.systems.stop_system(request).await?.into_inner();
        Ok(stopped.system.unwrap_or_default())
    }

    async fn remove(&mut self, name: &str, force: bool) -> Result<(), Status> {
        let request = api::RemoveSystemRequest {
            name: name.to_owned(),
            force,
            ..Default::default()
        };
        self.systems.remove_system(request).await.map(drop)
    }

    async fn get(&mut self, name: &str) -> Result<api::GetSystemResponse, Status> {
        let request = api::GetSystemRequest {
            name: name.to_owned(),
        };
        Ok(self.systems.get_system(request).await?.into_inner())
    }

    async fn system(&mut self, name: &str) -> Result<api::System, Status> {
        Ok(self.get(name).await?.system.unwrap_or_default())
    }

    async fn wait_for_state(&mut self, name: &str, state: State) -> Result<api::System> {
        wait_for(&format!("{name} to be {state:?}"), async || {
            Ok(self.system(name).await?.state() == state)
        })
        .await?;
        Ok(self.system(name).await?)
    }

    /// Waits until the init has been started as often.
    async fn wait_for_starts(&mut self, name: &str, starts: u64) -> Result<api::System> {
        wait_for(&format!("start {starts} of {name}"), async || {
            let system = self.system(name).await?;
            Ok(system.starts >= starts && system.state() == State::Running)
        })
        .await?;
        Ok(self.system(name).await?)
    }

    async fn console(&mut self, name: &str) -> Result<String, Status> {
        let request = api::GetConsoleLogRequest {
            name: name.to_owned(),
            tail_lines: None,
        };
        let log = self.systems.get_console_log(request).await?.into_inner();
        Ok(String::from_utf8_lossy(&log.content).into_owned())
    }

    fn lifecycle(&self) -> LifecycleServiceClient<Channel> {
        LifecycleServiceClient::new(self.bench.node.channel())
    }

    /// Exit code and output of a script inside.
    async fn exec(&mut self, name: &str, script: &str) -> Result<(u32, String)> {
        use api::{exec_request::Frame as Ask, exec_response::Frame as Answer};
        let start = api::ExecStart {
            container_id: self.system(name).await?.container_id,
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            ..Default::default()
        };
        let (send, requests) = mpsc::channel(1);
        let frame = Some(Ask::Start(start));
        send.send(api::ExecRequest { frame }).await?;
        let mut answers = self
            .lifecycle()
            .exec(ReceiverStream::new(requests))
            .await?
            .into_inner();
        let mut output = Vec::new();
        while let Some(answer) = tokio::time::timeout(WAIT_LIMIT, answers.message()).await?? {
            match answer.frame {
                Some(Answer::Stdout(data) | Answer::Stderr(data)) => {
                    output.extend_from_slice(&data);
                }
                Some(Answer::Exit(exit)) => {
                    let output = String::from_utf8_lossy(&output).into_owned();
                    return Ok((exit.code, output));
                }
                _ => {}
            }
        }
        bail!("{script:?} has no exit code")
    }

    async fn sh(&mut self, name: &str, script: &str) -> Result<String> {
        let (code, output) = self.exec(name, script).await?;
        if code != 0 {
            bail!("{script:?} exits with {code}: {output}");
        }
        Ok(output)
    }

    async fn attach(&mut self, name: &str, stdin: bool) -> Result<Viewer> {
        use api::attach_request::Frame as Ask;
        let start = api::AttachStart {
            container_id: self.system(name).await?.container_id,
            stdin,
            terminal_size: None,
            replay: true,
        };
        let (send, requests) = mpsc::channel(16);
        let frame = Some(Ask::Start(start));
        send.send(api::AttachRequest { frame }).await?;
        let mut lifecycle = self.lifecycle();
        let answers = lifecycle.attach(ReceiverStream::new(requests)).await?;
        Ok(Viewer {
            send,
            answers: answers.into_inner(),
            seen: Vec::new(),
        })
    }

    async fn finish(mut self) -> Result<()> {
        let request = api::ListSystemsRequest::default();
        let listed = self.systems.list_systems(request).await?.into_inner();
        for system in listed.systems {
            self.remove(&system.name, true).await?;
        }
        self.bench.node.fsck_clean().await?;
        self.bench.finish().await
    }
}

/// Somebody at a console.
struct Viewer {
    send: mpsc::Sender<api::AttachRequest>,
    answers: tonic::Streaming<api::AttachResponse>,
    seen: Vec<u8>,
}

impl Viewer {
    async fn types(&self, text: &str) -> Result<()> {
        let frame = api::attach_request::Frame::Stdin(Bytes::from(text.to_owned()));
        let frame = Some(frame);
        Ok(self.send.send(api::AttachRequest { frame }).await?)
    }

    async fn sees(&mut self, text: &str) -> Result<()> {
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let next = tokio::time::timeout(WAIT_LIMIT, self.answers.message()).await;
            let answer = next
                .with_context(|| format!("{text:?} is not shown, but {:?}", self.text()))??
                .with_context(|| format!("the console ends before {text:?}: {:?}", self.text()))?;
            if let Some(api::attach_response::Frame::Stdout(data)) = answer.frame {
                self.seen.extend_from_slice(&data);
            }
        }
        Ok(())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}

fn environ(pid: u32) -> Result<Vec<String>> {
    let raw = fs::read(format!("/proc/{pid}/environ"))?;
    let text = String::from_utf8_lossy(&raw).into_owned();
    Ok(text.split_terminator('\0').map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_keeps_what_it_wrote_and_its_address_over_stop_and_start() -> Result<()> {
    let Some(mut guests) = Guests::start("system::a_guest_keeps").await? else {
        return Ok(());
    };
    let config = guests.config("web");
    let made = guests.create(config).await?;
    assert_eq!(
        (made.state(), made.pid, made.starts),
        (State::Stopped, 0, 0)
    );
    let first = guests.boot("web").await?;
    assert_eq!(first.state(), State::Running);
    assert_eq!(first.starts, 1);
    let address = first.addresses.first().context("an address")?.clone();
    let own_uid = made.ids.unwrap_or_default().first_uid;
    assert_eq!(fs::metadata(format!("/proc/{}", first.pid))?.uid(), own_uid);
    let environ = environ(first.pid)?;
    assert_eq!(environ.len(), 2, "{environ:?}");
    assert_eq!(environ[0], "container=lxc");
    let uuid = environ[1].clone();
    for (script, expected) in [
        ("id -u; hostname; cat /etc/hostname", "0\nweb\nweb\n"),
        (
            "cat /proc/self/uid_map | tr -s ' '",
            &format!(" 0 {own_uid} 65536\n"),
        ),
        ("grep -c 127.0.1.1.web /etc/hosts", "1\n"),
        ("grep -c 192.0.2.1 /etc/resolv.conf || true", "0\n"),
        ("cat /proc/1/comm", "init\n"),
        (
            "echo $HOME $USER $PATH $container",
            "/root root /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin lxc\n",
        ),
        (
            "cat /proc/self/status | grep -e NoNewPrivs | tr -s '\\t' ' '",
            "NoNewPrivs: 0\n",
        ),
        ("stat -c %u /dev /root /sbin/init", "0\n0\n0\n"),
        ("mount | grep -c ' /sys type sysfs (ro,'", "1\n"),
        (
            "echo kept >/root/kept; ln -sf /nowhere /etc/resolv.conf; echo own >/etc/hostname",
            "",
        ),
    ] {
        assert_eq!(guests.sh("web", script).await?, expected, "{script}");
    }
    let boot_id = guests
        .sh("web", "cat /proc/sys/kernel/random/boot_id")
        .await?;
    assert_ne!(
        boot_id,
        fs::read_to_string("/proc/sys/kernel/random/boot_id")?
    );
    // It is nothing of CRI's.
    let pods = guests
        .bench
        .runtime
        .list_pod_sandbox(cri::ListPodSandboxRequest::default());
    assert_eq!(pods.await?.into_inner().items, []);
    // Not while it runs.
    let refused = guests.remove("web", false).await.expect_err("it runs");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("RUNNING"), "{refused:?}");
    let refused = guests.boot("web").await.expect_err("it runs");
    assert_eq!(refused.code(), Code::FailedPrecondition);

    let stopped = guests.stop("web").await?;
    assert_eq!((stopped.state(), stopped.pid), (State::Stopped, 0));
    let exit = stopped.last_exit.context("an exit")?;
    // SIGINT is how the kernel tells a power-off.
    assert_eq!(exit.signal, 2, "{exit:?}");
    let console = guests.console("web").await?;
    assert!(console.contains("welcome to web, boot 1"), "{console}");
    assert!(console.contains("going down"), "{console}");
    assert_eq!(guests.stop("web").await?.state(), State::Stopped);

    let second = guests.boot("web").await?;
    assert_eq!(second.starts, 2);
    assert_eq!(second.addresses.first(), Some(&address));
    assert_ne!(second.container_id, first.container_id);
    for (script, expected) in [
        (
            "cat /root/kept /etc/hostname; wc -l </boots",
            "kept\nown\n2\n",
        ),
        ("ls -l /etc/resolv.conf | grep -c nowhere", "1\n"),
    ] {
        assert_eq!(guests.sh("web", script).await?, expected, "{script}");
    }
    assert_ne!(
        guests
            .sh("web", "cat /proc/sys/kernel/random/boot_id")
            .await?,
        boot_id
    );
    assert_eq!(self::environ(second.pid)?[1], uuid);
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poweroff_inside_stops_and_reboot_inside_begins_again() -> Result<()> {
    let Some(mut guests) = Guests::start("system::poweroff_inside").await? else {
        return Ok(());
    };
    let first = guests.run("guest").await?;
    guests.sh("guest", "reboot").await?;
    let second = guests.wait_for_starts("guest", 2).await?;
    assert_ne!(second.pid, first.pid);
    assert_eq!(second.sandbox_id, first.sandbox_id);
    assert_eq!(second.addresses, first.addresses);
    assert_eq!(second.host_interface, first.host_interface);
    wait_for("the second boot", async || {
        Ok(guests.sh("guest", "wc -l </boots").await? == "2\n")
    })
    .await?;
    guests.sh("guest", "poweroff").await?;
    let stopped = guests.wait_for_state("guest", State::Stopped).await?;
    assert_eq!(stopped.starts, 2);
    // Restarting is stopping and starting.
    guests.boot("guest").await?;
    let request = api::RestartSystemRequest {
        name: "guest".to_owned(),
        ..Default::default()
    };
    let again = guests.systems.restart_system(request).await?.into_inner();
    assert_eq!(again.system.context("a system")?.starts, 4);
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_an_init_that_does_not_listen_yet() -> Result<()> {
    let Some(mut guests) = Guests::start("system::a_stop_waits").await? else {
        return Ok(());
    };
    // The first signal would be lost: as process 1 it ignores what it has no handler for.
    let late = "sleep 1; trap 'echo halted; exit 0' USR2; while :; do sleep 0.05; done";
    let image = guests.offer("late:1", late).await?;
    let deaf = guests
        .offer("deaf:1", "while :; do sleep 0.05; done")
        .await?;
    for (name, image) in [("late", image), ("deaf", deaf)] {
        let mut config = guests.config(name);
        config.image = image;
        config.stop_timeout = Some(prost_types::Duration {
            seconds: if name == "late" { 60 } else { 1 },
            nanos: 0,
        });
        guests.create(config).await?;
        guests.boot(name).await?;
    }
    let since = Instant::now();
    let exit = guests.stop("late").await?.last_exit.context("an exit")?;
    assert_eq!((exit.code, exit.signal), (0, 0), "{exit:?}");
    assert!(since.elapsed() < Duration::from_secs(50));
    assert!(guests.console("late").await?.contains("halted"));
    // Nobody waits for ever for one that never listens.
    let exit = guests.stop("deaf").await?.last_exit.context("an exit")?;
    assert_eq!(exit.signal, 9, "{exit:?}");
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_guest_stands_still_and_can_be_stopped() -> Result<()> {
    let Some(mut guests) = Guests::start("system::a_frozen_guest").await? else {
        return Ok(());
    };
    guests.run("guest").await?;
    let freeze = || api::FreezeSystemRequest {
        name: "guest".to_owned(),
        ..Default::default()
    };
    let unfreeze = || api::UnfreezeSystemRequest {
        name: "guest".to_owned(),
        ..Default::default()
    };
    let refused = guests.systems.unfreeze_system(unfreeze()).await;
    assert_eq!(
        refused.expect_err("it runs").code(),
        Code::FailedPrecondition
    );
    let frozen = guests.systems.freeze_system(freeze()).await?.into_inner();
    assert_eq!(frozen.system.context("a system")?.state(), State::Frozen);
    let refused = guests
        .exec("guest", "true")
        .await
        .expect_err("it is frozen");
    assert!(format!("{refused:#}").contains("FROZEN"), "{refused:#}");
    let thawed = guests
        .systems
        .unfreeze_system(unfreeze())
        .await?
        .into_inner();
    assert_eq!(thawed.system.context("a system")?.state(), State::Running);
    assert_eq!(guests.sh("guest", "echo again").await?, "again\n");
    guests.systems.freeze_system(freeze()).await?;
    let exit = guests.stop("guest").await?.last_exit.context("an exit")?;
    assert_eq!(exit.signal, 2, "it was thawed and asked: {exit:?}");
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_console_shows_what_was_to_many_and_outlives_the_agent() -> Result<()> {
    let Some(mut guests) = Guests::start("system::a_console").await? else {
        return Ok(());
    };
    guests.run("guest").await?;
    let mut writer = guests.attach("guest", true).await?;
    writer.sees("welcome to guest, boot 1").await?;
    // Its shell could take the console as its own terminal.
    writer.types("tty; echo from-$((40 + 2))\n").await?;
    writer.sees("from-42").await?;
    assert!(!writer.text().contains("job control"), "{}", writer.text());
    let mut reader = guests.attach("guest", false).await?;
    reader.sees("from-42").await?;
    writer.types("echo both-$((1 + 1))\n").await?;
    reader.sees("both-2").await?;
    drop((writer, reader));
    guests.bench.crash().await?;
    guests.reconnect();
    let mut writer = guests.attach("guest", true).await?;
    writer.sees("both-2").await?;
    writer.types("echo after-$((2 + 1))\n").await?;
    writer.sees("after-3").await?;
    drop(writer);
    guests.stop("guest").await?;
    assert!(guests.console("guest").await?.contains("after-3"));
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_no_agent_saw_is_dealt_with_by_the_next() -> Result<()> {
    let Some(mut guests) = Guests::start("system::an_end").await? else {
        return Ok(());
    };
    for name in ["off", "again", "on"] {
        guests.run(name).await?;
    }
    let on = guests.system("on").await?;
    for (name, command) in [("off", "poweroff"), ("again", "reboot")] {
        guests
            .sh(name, &format!("(sleep 1; {command}) >/dev/null 2>&1 &"))
            .await?;
    }
    guests.bench.node.kill()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    guests.bench.node.launch().await?;
    guests.reconnect();
    guests.wait_for_state("off", State::Stopped).await?;
    guests.wait_for_starts("again", 2).await?;
    let still = guests.system("on").await?;
    assert_eq!((still.state(), still.pid), (State::Running, on.pid));
    assert_eq!(guests.sh("on", "echo here").await?, "here\n");
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_cannot_be_had_says_why_and_leaves_nothing() -> Result<()> {
    let Some(mut guests) = Guests::start("system::a_guest_that_cannot").await? else {
        return Ok(());
    };
    let toolbox = guests.bench.toolbox.clone();
    let dying = guests
        .offer("dying:1", "echo no root device found; exit 3")
        .await?;
    let clean = guests.bench.node.snapshot()?;
    for (change, code, words) in [
        (
            Box::new(|c: &mut api::SystemConfig| c.image = toolbox.clone())
                as Box<dyn Fn(&mut api::SystemConfig)>,
            Code::FailedPrecondition,
            "/sbin/init",
        ),
        (
            Box::new(|c| c.image = "registry.invalid/x:1".to_owned()),
            Code::NotFound,
            "is not present",
        ),
        (
            Box::new(|c| c.handler = "runc".to_owned()),
            Code::Unimplemented,
            "native",
        ),
        (
            Box::new(|c| c.name = "a_b".to_owned()),
            Code::InvalidArgument,
            "config.name",
        ),
        (
            Box::new(|c| c.init = vec!["/sbin/nothing".to_owned()]),
            Code::FailedPrecondition,
            "/sbin/nothing",
        ),
        (
            Box::new(|c| {
                c.network = Some(api::SandboxNetwork {
                    mode: api::NetworkMode::Host.into(),
                    ..Default::default()
                })
            }),
            Code::InvalidArgument,
            "config.network.mode",
        ),
    ] {
        let mut config = guests.config("guest");
        change(&mut config);
        let error = guests.create(config).await.expect_err(words);
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message().contains(words), "{error:?}");
    }
    assert!(clean.difference(&guests.bench.node.snapshot()?).is_empty());
    let mut config = guests.config("dying");
    config.image = dying;
    guests.create(config).await?;
    let error = guests.boot("dying").await.expect_err("its init ends");
    assert_eq!(error.code(), Code::FailedPrecondition);
    for words in ["exit code 3", "no root device found", "dying"] {
        assert!(error.message().contains(words), "{error:?}");
    }
    let left = guests.system("dying").await?;
    assert_eq!(
        (left.state(), left.sandbox_id.as_str()),
        (State::Stopped, "")
    );
    let missing = guests.boot("nobody").await.expect_err("there is none");
    assert_eq!(missing.code(), Code::NotFound);
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_can_neither_see_nor_raise_its_limits() -> Result<()> {
    let Some(mut guests) = Guests::start("system::a_guest_can_neither").await? else {
        return Ok(());
    };
    let mut config = guests.config("guest");
    config.resources = Some(api::Resources {
        memory_limit_bytes: 64 << 20,
        pids_limit: 50,
        ..Default::default()
    });
    let volume = guests.bench.node.dir().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("file"), "of the host's root\n")?;
    config.mounts = vec![api::Mount {
        target: "/mnt".to_owned(),
        source: Some(api::mount::Source::Bind(api::BindMount {
            host_path: volume.to_string_lossy().into_owned(),
            ..Default::default()
        })),
        ..Default::default()
    }];
    let made = guests.create(config).await?;
    guests.boot("guest").await?;
    // Its own part of the tree is its own, and nothing above.
    let raise = "\
        mkdir -p /run/cg && {\n\
          mount -t cgroup2 none /run/cg 2>/dev/null || true\n\
          mkdir /run/cg/sub && echo divided\n\
          for f in /run/cg/memory.max /run/cg/pids.max /run/cg/cgroup.freeze; do\n\
            [ -e $f ] && (echo max >$f) 2>/dev/null && echo raised $f\n\
          done\n\
          mkdir -p /run/m && mount -t cgroup -o memory none /run/m 2>/dev/null && {\n\
            mkdir /run/m/sub && echo divided-memory >&2\n\
            (echo -1 >/run/m/memory.limit_in_bytes) 2>/dev/null && echo raised memory\n\
          }\n\
          mkdir -p /run/p && mount -t cgroup -o pids none /run/p 2>/dev/null && {\n\
            (echo max >/run/p/pids.max) 2>/dev/null && echo raised pids\n\
          }\n\
        } ; true";
    let said = guests.sh("guest", raise).await?;
    assert!(said.contains("divided"), "{said}");
    assert!(!said.contains("raised"), "{said}");
    for (script, expected) in [
        (
            "mount -o remount,rw /sys 2>/dev/null; (echo 1 >/sys/kernel/profiling) 2>/dev/null || echo refused",
            "refused\n",
        ),
        (
            "(echo 1 >/proc/sys/kernel/panic) 2>/dev/null || echo refused",
            "refused\n",
        ),
        (
            "(echo b >/proc/sysrq-trigger) 2>/dev/null || echo refused",
            "refused\n",
        ),
        (
            "echo 1 >/proc/sys/net/ipv4/ip_forward && cat /proc/sys/net/ipv4/ip_forward",
            "1\n",
        ),
        ("kill -9 1; echo alive", "alive\n"),
        (
            "cat /mnt/file; stat -c '%u %g' /mnt/file; echo more >>/mnt/file && echo written",
            "of the host's root\n0 0\nwritten\n",
        ),
    ] {
        let (_, said) = guests.exec("guest", script).await?;
        assert_eq!(said, expected, "{script}");
    }
    let bomb = "i=0; while [ $i -lt 80 ]; do sleep 5 & i=$((i + 1)); done";
    let (code, said) = guests.exec("guest", bomb).await?;
    assert!(code != 0 && said.contains("fork"), "{code}: {said}");
    assert_eq!(fs::metadata(volume.join("file"))?.uid(), 0);
    let uses = guests.get("guest").await?.usage.context("usage")?;
    assert!(
        uses.memory_bytes > 0 && uses.memory_bytes <= 64 << 20,
        "{uses:?}"
    );
    assert!(uses.tasks > 1 && uses.tasks <= 50, "{uses:?}");
    // What it wrote belongs to its own root.
    let upper = upper(&guests, &made.id);
    let uid = made.ids.unwrap_or_default().first_uid;
    assert_eq!(fs::metadata(upper.join("boots"))?.uid(), uid);
    guests.finish().await
}

fn upper(guests: &Guests, id: &str) -> PathBuf {
    let containers = guests.bench.node.data_dir().join("containers");
    containers.join(id).join("upper")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_guest_has_ids_of_its_own_and_names_are_unique() -> Result<()> {
    let Some(mut guests) = Guests::start("system::each_guest").await? else {
        return Ok(());
    };
    let mut all = Vec::new();
    for name in ["b", "a", "c"] {
        let config = guests.config(name);
        let ids = guests.create(config).await?.ids.context("ids")?;
        assert_eq!(ids.length, 65_536);
        all.push(ids);
    }
    let mut firsts: Vec<_> = all.iter().map(|ids| ids.first_uid).collect();
    firsts.sort_unstable();
    // A host that gives root one range only has all of them share it, and tells.
    let apart = firsts.windows(2).all(|pair| pair[1] - pair[0] >= 65_536);
    assert!(all.iter().all(|ids| ids.shared != apart), "{all:?}");
    let config = guests.config("a");
    let taken = guests.create(config.clone()).await.expect_err("taken");
    assert_eq!(taken.code(), Code::AlreadyExists);
    // A retry with its key is the same wish.
    let request = api::CreateSystemRequest {
        config: Some(api::SystemConfig {
            name: "d".to_owned(),
            ..config
        }),
        idempotency_key: "once".to_owned(),
    };
    let one = guests
        .systems
        .create_system(request.clone())
        .await?
        .into_inner();
    guests.bench.crash().await?;
    guests.reconnect();
    let two = guests.systems.create_system(request).await?.into_inner();
    assert_eq!(one.system.context("one")?.id, two.system.context("two")?.id);
    let listed = guests
        .systems
        .list_systems(api::ListSystemsRequest::default())
        .await?;
    let names: Vec<_> = listed
        .into_inner()
        .systems
        .into_iter()
        .map(|one| one.name)
        .collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    guests.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debian_boots_its_systemd_to_running() -> Result<()> {
    const TEST: &str = "system::debian_boots_its_systemd_to_running";
    let Some(tar) = std::env::var_os("LONGSHORE_DEBIAN_TAR") else {
        skip(
            TEST,
            "no LONGSHORE_DEBIAN_TAR (cargo verify makes one by debootstrap)",
        );
        return Ok(());
    };
    let Some(mut guests) = Guests::start(TEST).await? else {
        return Ok(());
    };
    let layer = Layer {
        tar: fs::read(tar)?.into(),
        packing: Packing::Plain,
    };
    let image = ImageBuilder::new(vec![layer]).build();
    guests.bench.offer("debian:1", &image).await?;
    let mut config = guests.config("debian");
    config.image = guests.bench.registry.reference("debian:1");
    guests.create(config).await?;
    let first = guests.boot("debian").await?;
    // Asked at once: whatever stage it is in, it hears.
    let since = Instant::now();
    let exit = guests.stop("debian").await?.last_exit.context("an exit")?;
    assert_eq!(
        exit.signal,
        2,
        "{exit:?}\n{}",
        guests.console("debian").await?
    );
    assert!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
    guests.boot("debian").await?;
    wait_for("systemd to answer", async || {
        let (code, said) = guests
            .exec("debian", "systemctl is-system-running --wait")
            .await?;
        if code != 0 && !said.contains("Failed to connect") && said.trim() != "offline" {
            let failed = guests
                .exec("debian", "systemctl --failed; journalctl -p3 -b --no-pager")
                .await?;
            bail!(
                "it is {said}: {}\n{}",
                failed.1,
                guests.console("debian").await?
            );
        }
        Ok(code == 0)
    })
    .await?;
    for (script, expected) in [
        ("systemctl is-system-running", "running\n".to_owned()),
        ("hostname", "debian\n".to_owned()),
        ("systemd-detect-virt", "lxc\n".to_owned()),
        (
            "ip -4 -o address show eth0 | grep -c ' inet '",
            "1\n".to_owned(),
        ),
        ("su nobody -s /bin/sh -c 'id -un'", "nobody\n".to_owned()),
    ] {
        assert_eq!(guests.sh("debian", script).await?, expected, "{script}");
    }
    let before = guests.system("debian").await?;
    assert_eq!(before.addresses, first.addresses);
    let mut viewer = guests.attach("debian", true).await?;
    viewer.sees("debian login:").await?;
    drop(viewer);
    guests.sh("debian", "systemctl reboot").await?;
    let after = guests.wait_for_starts("debian", before.starts + 1).await?;
    assert_eq!(after.addresses, before.addresses);
    assert_ne!(after.pid, before.pid);
    guests.stop("debian").await?;
    guests.finish().await
}
