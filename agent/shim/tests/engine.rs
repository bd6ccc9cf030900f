//! The built shim on the real kernel, driven by the wire: containers from a root made of busybox.
//!
//! Needs root, and `/bin/busybox` linked statically (Debian: busybox-static); without them each
//! test prints why it is skipped.

#![allow(clippy::expect_used)]

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use longshore_shim::wire::*;
use longshore_sys::{caps, fd};
use prost::Message;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// A pod with one shim.
struct Pod {
    dir: tempfile::TempDir,
    socket: UnixStream,
    inbox: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    events: VecDeque<Fact>,
    stream: u32,
    pid: i32,
    cgroups: Vec<PathBuf>,
}

fn can_run() -> bool {
    let root =
        fs::read_to_string("/proc/self/status").is_ok_and(|text| text.contains("\nUid:\t0\t0\t"));
    if !root || !Path::new("/bin/busybox").exists() {
        println!("skipped: needs root and a static /bin/busybox");
        return false;
    }
    true
}

impl Pod {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        make_layer(&dir.path().join("layers/1"));
        fs::create_dir(dir.path().join("run")).expect("mkdir");
        let (ours, shims) = UnixStream::pair().expect("socketpair");
        let status = Command::new(env!("CARGO_BIN_EXE_longshore-shim"))
            .args(["--sandbox", "test", "--dir"])
            .arg(dir.path().join("run"))
            .stdin(Stdio::from(OwnedFd::from(shims)))
            .status()
            .expect("launch");
        assert!(status.success());
        let mut pod = Self {
            dir,
            socket: ours,
            inbox: Vec::new(),
            fds: VecDeque::new(),
            events: VecDeque::new(),
            stream: 1,
            pid: 0,
            cgroups: Vec::new(),
        };
        pod.hello();
        pod
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    fn text(&self, below: &str) -> String {
        self.path(below).to_str().expect("text").to_owned()
    }

    fn hello(&mut self) -> Welcome {
        match self.ask(Ask::Hello(Hello { version: VERSION }), &[]).0 {
            Answer::Welcome(welcome) => {
                self.pid = welcome.pid;
                welcome
            }
            other => panic!("{other:?}"),
        }
    }

    fn reconnect(&mut self) -> Welcome {
        self.socket = UnixStream::connect(self.path("run/shim.sock")).expect("connect");
        self.inbox.clear();
        self.hello()
    }

    /// Asks and waits for the answer; events that come first are kept.
    fn ask(&mut self, ask: Ask, fds: &[BorrowedFd<'_>]) -> (Answer, Vec<OwnedFd>) {
        let stream = self.send(ask, fds);
        self.answer(stream)
    }

    fn send(&mut self, ask: Ask, fds: &[BorrowedFd<'_>]) -> u32 {
        let stream = self.stream;
        self.stream += 2;
        let request = Request {
            fds: fds.len() as u32,
            ask: Some(ask),
        };
        let bytes = frame(FrameKind::Request, stream, &request);
        let sent = fd::send_with_fds(&self.socket, &bytes, fds).expect("send");
        self.socket.write_all(&bytes[sent..]).expect("send");
        stream
    }

    fn answer(&mut self, stream: u32) -> (Answer, Vec<OwnedFd>) {
        loop {
            let (header, payload) = self.frame();
            if header.kind == FrameKind::Event {
                self.keep_event(&payload);
                continue;
            }
            assert_eq!(header.stream, stream);
            let reply = Reply::decode(payload.as_slice()).expect("reply");
            let fds = self.fds.drain(..reply.fds as usize).collect();
            return (reply.answer.expect("an answer"), fds);
        }
    }

    fn keep_event(&mut self, payload: &[u8]) {
        let event = Event::decode(payload).expect("event");
        self.events.push_back(event.fact.expect("a fact"));
    }

    fn frame(&mut self) -> (Header, Vec<u8>) {
        self.socket
            .set_read_timeout(Some(PATIENCE))
            .expect("timeout");
        loop {
            if let Some((header, rest)) = self.inbox.split_first_chunk::<HEADER_BYTES>() {
                let header = Header::decode(*header).expect("header");
                if let Some(payload) = rest.get(..header.length as usize) {
                    let payload = payload.to_vec();
                    self.inbox.drain(..HEADER_BYTES + payload.len());
                    return (header, payload);
                }
            }
            let mut buffer = [0; 4096];
            let (count, fds) = fd::recv_with_fds(&self.socket, &mut buffer, 16).expect("receive");
            assert_ne!(count, 0, "the shim hung up");
            self.inbox.extend_from_slice(&buffer[..count]);
            self.fds.extend(fds);
        }
    }

    fn event(&mut self) -> Fact {
        loop {
            if let Some(fact) = self.events.pop_front() {
                return fact;
            }
            let (header, payload) = self.frame();
            assert_eq!(header.kind, FrameKind::Event);
            self.keep_event(&payload);
        }
    }

    fn exited(&mut self, id: &str) -> ExitStatus {
        match self.event() {
            Fact::Exited(exited) => {
                assert_eq!(exited.container_id, id);
                exited.status
            }
            other => panic!("{other:?}"),
        }
    }

    fn exec_exited(&mut self, id: u64) -> ExecExited {
        match self.event() {
            Fact::ExecExited(exited) => {
                assert_eq!(exited.exec_id, id);
                exited
            }
            other => panic!("{other:?}"),
        }
    }

    /// A plan like that of a plain pod's container.
    fn plan(&mut self, id: &str, script: &str) -> ContainerPlan {
        for part in ["upper", "work", "rootfs"] {
            let dir = self.path(&format!("{id}/{part}"));
            // A volatile overlay cannot be mounted again on what an earlier one has left.
            let _absent = fs::remove_dir_all(&dir);
            fs::create_dir_all(dir).expect("mkdir");
        }
        let mount = |target: &str, source: &str, fs_type: &str, flags: u64, data: &str| Mount {
            target: target.into(),
            source: source.into(),
            fs_type: fs_type.into(),
            flags,
            data: data.into(),
            ..Mount::default()
        };
        let secure = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;
        ContainerPlan {
            cgroup: self.cgroup(id),
            namespaces: [
                NamespaceKind::Mount,
                NamespaceKind::Pid,
                NamespaceKind::Uts,
                NamespaceKind::Ipc,
                NamespaceKind::Network,
                NamespaceKind::Cgroup,
            ]
            .map(new_namespace)
            .to_vec(),
            hostname: "inside".into(),
            rootfs: Rootfs {
                mount_point: self.text(&format!("{id}/rootfs")),
                lower: vec!["1".into()],
                layers_dir: self.text("layers"),
                upper: self.text(&format!("{id}/upper")),
                work: self.text(&format!("{id}/work")),
                durable: false,
            },
            mounts: vec![
                mount("/proc", "proc", "proc", secure, ""),
                mount(
                    "/dev",
                    "tmpfs",
                    "tmpfs",
                    libc::MS_NOSUID | libc::MS_STRICTATIME,
                    "mode=755,size=65536k",
                ),
                mount(
                    "/dev/pts",
                    "devpts",
                    "devpts",
                    libc::MS_NOSUID | libc::MS_NOEXEC,
                    "newinstance,ptmxmode=0666,mode=0620,gid=5",
                ),
                mount("/dev/mqueue", "mqueue", "mqueue", secure, ""),
                mount("/sys", "sysfs", "sysfs", secure | libc::MS_RDONLY, ""),
                mount(
                    "/sys/fs/cgroup",
                    "cgroup",
                    "cgroup",
                    secure | libc::MS_RDONLY,
                    "",
                ),
            ],
            devices: [
                ("null", 3),
                ("zero", 5),
                ("full", 7),
                ("random", 8),
                ("urandom", 9),
            ]
            .map(|(name, minor)| Device {
                path: format!("/dev/{name}"),
                major: 1,
                minor,
                mode: 0o666,
                ..Device::default()
            })
            .to_vec(),
            masked_paths: [
                "/proc/kcore",
                "/proc/acpi",
                "/proc/keys",
                "/sys/firmware",
                "/proc/none",
            ]
            .map(str::to_owned)
            .to_vec(),
            readonly_paths: ["/proc/sys", "/proc/sysrq-trigger"]
                .map(str::to_owned)
                .to_vec(),
            process: process(script),
            ..ContainerPlan::default()
        }
    }

    /// Cgroups of a container, made where this host has them.
    fn cgroup(&mut self, id: &str) -> CgroupPlan {
        let mut plan = CgroupPlan::default();
        let name = format!("longshore-test-{}-{id}", self.pid);
        for controller in ["cpuset", "freezer", "pids"] {
            let top = Path::new("/sys/fs/cgroup").join(controller);
            if !top.join("tasks").exists() {
                continue;
            }
            let dir = top.join(&name);
            fs::create_dir_all(&dir).expect("mkdir");
            if controller == "cpuset" {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let value = fs::read(top.join(file)).expect("read");
                    fs::write(dir.join(file), value).expect("write");
                }
            }
            plan.v1_tasks
                .push(dir.join("tasks").to_str().expect("text").into());
            self.cgroups.push(dir);
        }
        for top in ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
            if Path::new(top).join("cgroup.procs").exists()
                && Path::new(top).join("cgroup.controllers").exists()
            {
                let dir = Path::new(top).join(&name);
                fs::create_dir_all(&dir).expect("mkdir");
                plan.v2_dir = dir.to_str().expect("text").into();
                self.cgroups.push(dir);
                break;
            }
        }
        plan
    }

    /// The container's cgroups with a leaf below for one exec.
    fn exec_cgroup(&mut self, id: &str, exec: u64) -> CgroupPlan {
        let mut plan = self.cgroup(id);
        let leaf = |dir: &Path| {
            let leaf = dir.join(format!("exec-{exec}"));
            fs::create_dir_all(&leaf).expect("mkdir");
            leaf
        };
        let freezer = plan.v1_tasks.iter().find(|path| path.contains("/freezer/"));
        if let Some(freezer) = freezer {
            let dir = leaf(Path::new(freezer).parent().expect("a parent"));
            plan.v1_freezer_leaf = dir.to_str().expect("text").into();
            self.cgroups.push(dir);
        } else if !plan.v2_dir.is_empty() {
            let dir = leaf(Path::new(&plan.v2_dir));
            plan.v2_dir = dir.to_str().expect("text").into();
            self.cgroups.push(dir);
        }
        plan
    }

    fn create(&mut self, id: &str, mut plan: ContainerPlan) -> Result<i32, Failure> {
        let log_path = self.path(&format!("{id}/log"));
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .expect("open");
        plan.log.get_or_insert_with(|| Log {
            path: log_path.to_str().expect("text").into(),
            ..Log::default()
        });
        let create = Create {
            oci: None,
            container_id: id.into(),
            plan,
        };
        match self.ask(Ask::Create(create), &[log.as_fd()]).0 {
            Answer::Process(process) => Ok(process.pid),
            Answer::Failed(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    fn simple(&mut self, ask: Ask) -> Result<(), Failure> {
        match self.ask(ask, &[]).0 {
            Answer::Done(_) => Ok(()),
            Answer::Failed(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    fn start(&mut self, id: &str) -> Result<(), Failure> {
        self.simple(Ask::Start(named(id)))
    }

    /// Creates and starts.
    fn run(&mut self, id: &str, script: &str) -> i32 {
        let plan = self.plan(id, script);
        let pid = self.create(id, plan).expect("create");
        self.start(id).expect("start");
        pid
    }

    fn delete(&mut self, id: &str) {
        self.simple(Ask::Delete(named(id))).expect("delete");
    }

    /// Stream, tag and text of each line of a log.
    fn log(&self, id: &str) -> Vec<(String, String, String)> {
        let text = fs::read_to_string(self.path(&format!("{id}/log"))).expect("read");
        text.lines()
            .map(|line| {
                let parts: Vec<&str> = line.splitn(4, ' ').collect();
                (parts[1].into(), parts[2].into(), parts[3].into())
            })
            .collect()
    }

    /// Waits until the log has a line with this text.
    fn wait_for(&self, id: &str, text: &str) {
        let begin = Instant::now();
        while !self.log(id).iter().any(|(_, _, line)| line.contains(text)) {
            assert!(
                begin.elapsed() < PATIENCE,
                "no {text} in {:?}",
                self.log(id)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a command to its end; its exit and its output.
    fn exec(
        &mut self,
        id: &str,
        exec_id: u64,
        script: &str,
        timeout_ms: u64,
    ) -> (ExecExited, String) {
        let (read, write) = fd::pipe().expect("pipe");
        let exec = Exec {
            container_id: id.into(),
            exec_id,
            process: process(script),
            cgroup: self.exec_cgroup(id, exec_id),
            timeout_ms,
            stdout: true,
            ..Exec::default()
        };
        match self.ask(Ask::Exec(exec), &[write.as_fd()]).0 {
            Answer::Process(_) => {}
            other => panic!("{other:?}"),
        }
        drop(write);
        let exited = self.exec_exited(exec_id);
        let mut text = String::new();
        fs::File::from(read)
            .read_to_string(&mut text)
            .expect("read");
        (exited, text)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.simple(Ask::Shutdown(Empty {})).expect("shutdown");
            let begin = Instant::now();
            while Path::new(&format!("/proc/{}/stat", self.pid)).exists() && !is_zombie(self.pid) {
                assert!(begin.elapsed() < PATIENCE, "the shim does not end");
                std::thread::sleep(Duration::from_millis(2));
            }
            assert!(!self.path("run/shim.sock").exists());
            let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
            assert!(
                !mounts.contains(self.dir.path().to_str().expect("text")),
                "mounts are left"
            );
        } else if let Some(pid) = rustix::process::Pid::from_raw(self.pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        // Leaves before what holds them.
        self.cgroups
            .sort_by_key(|dir| std::cmp::Reverse(dir.components().count()));
        self.cgroups.dedup();
        for dir in &self.cgroups {
            if std::thread::panicking() {
                let listed = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                for pid in listed.lines().filter_map(|pid| pid.parse().ok()) {
                    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            let begin = Instant::now();
            while dir.exists() && fs::remove_dir(dir).is_err() {
                if begin.elapsed() > PATIENCE {
                    assert!(std::thread::panicking(), "{} is not empty", dir.display());
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

fn is_zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| text.contains("State:\tZ"))
}

fn new_namespace(kind: NamespaceKind) -> Namespace {
    Namespace {
        kind: kind.into(),
        from: Some(NamespaceFrom::New(Empty {})),
    }
}

fn named(id: &str) -> Named {
    Named {
        container_id: id.into(),
    }
}

/// Capabilities as a plain container has them.
const MASK: u64 = 0xa804_25fb;

fn process(script: &str) -> ProcessPlan {
    ProcessPlan {
        args: [&b"sh"[..], b"-c", script.as_bytes()]
            .map(<[u8]>::to_vec)
            .to_vec(),
        env: vec![b"PATH=/usr/bin:/bin".to_vec(), b"HOME=/root".to_vec()],
        cwd: "/".into(),
        capabilities: Capabilities {
            bounding: MASK,
            permitted: MASK,
            effective: MASK,
            ..Capabilities::default()
        },
        oom_score_adj: Some(100),
        ..ProcessPlan::default()
    }
}

/// A root with busybox.
fn make_layer(dir: &Path) {
    for name in ["bin", "etc", "tmp", "root"] {
        fs::create_dir_all(dir.join(name)).expect("mkdir");
    }
    fs::copy("/bin/busybox", dir.join("bin/busybox")).expect("copy");
    let list = Command::new("/bin/busybox")
        .arg("--list")
        .output()
        .expect("list");
    for name in String::from_utf8(list.stdout).expect("text").lines() {
        if name != "busybox" {
            symlink("busybox", dir.join("bin").join(name)).expect("symlink");
        }
    }
    fs::write(dir.join("bin/script"), "echo no permission").expect("write");
}

fn lines(log: &[(String, String, String)]) -> Vec<(&str, &str, &str)> {
    log.iter()
        .map(|(a, b, c)| (a.as_str(), b.as_str(), c.as_str()))
        .collect()
}

#[test]
fn a_container_runs_logs_and_tells_its_exit() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let plan = pod.plan("c", "echo out; echo err >&2; hostname; printf tail; exit 7");
    let pid = pod.create("c", plan).expect("create");
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    pod.start("c").expect("start");
    let status = pod.exited("c");
    assert_eq!((status.code, status.signal), (7, 0));
    assert!(status.at_unix_ns > 0 && status.at_boot_ns > 0);
    let log = pod.log("c");
    let out: Vec<_> = lines(&log)
        .into_iter()
        .filter(|line| line.0 == "stdout")
        .collect();
    assert_eq!(
        out,
        [
            ("stdout", "F", "out"),
            ("stdout", "F", "inside"),
            ("stdout", "P", "tail")
        ]
    );
    assert!(lines(&log).contains(&("stderr", "F", "err")));
    assert!(pod.path("run/exits/c").exists());
    pod.simple(Ask::AckExit(named("c"))).expect("acknowledge");
    assert!(!pod.path("run/exits/c").exists());
    pod.delete("c");
    pod.delete("c");
}

#[test]
fn signals_and_their_exits_are_exact() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    pod.run(
        "a",
        "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done",
    );
    pod.wait_for("a", "ready");
    let signal = |id: &str, signal| {
        Ask::Signal(Signal {
            container_id: id.into(),
            signal,
        })
    };
    pod.simple(signal("a", libc::SIGTERM)).expect("signal");
    assert_eq!(pod.exited("a").code, 3);
    assert!(pod.simple(signal("a", libc::SIGTERM)).is_err());
    pod.run("b", "sleep 1000");
    pod.simple(signal("b", libc::SIGKILL)).expect("signal");
    let status = pod.exited("b");
    assert_eq!((status.code, status.signal), (0, 9));
    assert!(pod.simple(signal("none", 9)).is_err());
}

#[test]
fn what_a_container_sees_is_its_own() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    fs::create_dir(pod.path("volume")).expect("mkdir");
    fs::write(pod.path("volume/inside"), "x").expect("write");
    fs::write(pod.path("file"), "content of a file").expect("write");
    let script = r#"
        echo "pid $$"
        echo "fds $(ls /proc/self/fd | tr '\n' ' ')"
        echo "kcore $(head -c 10 /proc/kcore | wc -c)"
        echo "acpi $(ls /proc/acpi | wc -l) firmware $(ls /sys/firmware | wc -l)"
        echo 1 > /proc/sys/vm/drop_caches || echo "sys is read-only"
        cat /etc/from-host; echo
        echo x > /vol/new && echo "volume is writable"
        touch /ro/new || echo "ro is read-only"
        echo "cwd $(pwd)"
        ls -l /dev/fd /dev/stdin /dev/ptmx | sed 's/.* \//\//'
        echo x > /dev/null && echo "null works"
        echo "somaxconn $(cat /proc/sys/net/core/somaxconn)"
        echo "env $(env | sort | tr '\n' ' ')"
        echo "adj $(cat /proc/self/oom_score_adj)"
        echo "limit $(ulimit -n)"
        echo "umask $(umask)"
        echo "cgroups $(ls /sys/fs/cgroup | wc -l)"
        echo "own $(grep -c ':/$' /proc/self/cgroup)"
        echo "parents $(ls / | tr '\n' ' ')"
        echo "mounts $(grep -c ' / ' /proc/self/mountinfo)"
    "#;
    let mut plan = pod.plan("c", script);
    let bind = |target: &str, source: String, flags: u64| Mount {
        target: target.into(),
        source,
        recursive: true,
        flags,
        ..Mount::default()
    };
    plan.mounts.push(bind("/vol", pod.text("volume"), 0));
    plan.mounts
        .push(bind("/ro/deep/../", pod.text("volume"), libc::MS_RDONLY));
    plan.mounts
        .push(bind("/etc/from-host", pod.text("file"), libc::MS_RDONLY));
    plan.process.cwd = "/made/for/me".into();
    plan.process.rlimits.push(Rlimit {
        resource: 7,
        soft: 333,
        hard: 444,
    });
    plan.sysctls.push(Sysctl {
        name: "net.core.somaxconn".into(),
        value: "77".into(),
    });
    pod.create("c", plan).expect("create");
    pod.start("c").expect("start");
    pod.exited("c");
    let log = pod.log("c");
    let has = |text: &str| {
        assert!(
            log.iter().any(|(_, _, line)| line == text),
            "{text} is not in {log:#?}"
        );
    };
    has("pid 1");
    has("fds 0 1 2 3 ");
    has("kcore 0");
    has("acpi 0 firmware 0");
    has("sys is read-only");
    has("content of a file");
    has("volume is writable");
    has("ro is read-only");
    has("cwd /made/for/me");
    has("null works");
    has("somaxconn 77");
    has("env HOME=/root PATH=/usr/bin:/bin PWD=/made/for/me SHLVL=1 ");
    has("adj 100");
    has("limit 333");
    has("umask 0022");
    assert!(pod.path("volume/new").exists());
}

#[test]
fn readonly_root_stays_writable_where_mounted() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let mut plan = pod.plan(
        "c",
        "touch /x || echo refused; touch /dev/x && echo allowed",
    );
    plan.readonly_rootfs = true;
    pod.create("c", plan).expect("create");
    pod.start("c").expect("start");
    pod.exited("c");
    let log = pod.log("c");
    assert!(lines(&log).contains(&("stdout", "F", "refused")), "{log:?}");
    assert!(lines(&log).contains(&("stdout", "F", "allowed")), "{log:?}");
}

#[test]
fn failures_name_their_step_and_leave_nothing() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let mut plan = pod.plan("a", "true");
    plan.mounts[0].fs_type = "nosuchfs".into();
    let failure = pod.create("a", plan).expect_err("no such file system");
    assert_eq!(
        (failure.step.as_str(), failure.errno),
        ("mount /proc", libc::ENODEV)
    );
    let mut plan = pod.plan("b", "true");
    plan.mounts.push(Mount {
        target: "/x".into(),
        source: "/no/such/source".into(),
        ..Mount::default()
    });
    let failure = pod.create("b", plan).expect_err("no such source");
    assert_eq!(
        (failure.step.as_str(), failure.errno),
        ("open /no/such/source", libc::ENOENT)
    );
    // Each has a writable layer of its own: a volatile one is never mounted twice.
    for (name, args, step, errno) in [
        ("c1", &["nosuch"][..], "execve nosuch", libc::ENOENT),
        ("c2", &["/bin/nosuch"], "execve /bin/nosuch", libc::ENOENT),
        ("c3", &["/bin/script"], "execve /bin/script", libc::EACCES),
        ("c4", &["script"], "execve script", libc::EACCES),
        ("c5", &["/etc"], "execve /etc", libc::EACCES),
    ] {
        let mut plan = pod.plan(name, "");
        plan.process.args = args.iter().map(|arg| arg.as_bytes().to_vec()).collect();
        pod.create(name, plan).expect("create");
        let failure = pod.start(name).expect_err("cannot run");
        assert_eq!((failure.step.as_str(), failure.errno), (step, errno));
        pod.delete(name);
    }
    let mut plan = pod.plan("d", "true");
    plan.process.cwd = "/bin/busybox".into();
    let failure = pod.create("d", plan).expect_err("a file");
    assert_eq!(
        (failure.step.as_str(), failure.errno),
        ("mkdir /bin/busybox", libc::ENOTDIR)
    );
    let mut plan = pod.plan("e", "true");
    plan.process.cwd = "/proc/self/fd/4".into();
    assert!(pod.create("e", plan).is_err());
    assert!(pod.hello_state().is_empty());
}

impl Pod {
    /// What a new connection is told of containers.
    fn hello_state(&mut self) -> Vec<ContainerReport> {
        self.reconnect().containers
    }
}

/// The lines of `/proc/self/status` that make up a process's rights.
const RIGHTS: &str = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|Seccomp_filters):' /proc/self/status; \
                      cat /proc/self/cgroup | grep -v -e freezer -e '^0:'; ulimit -n; cat /proc/self/oom_score_adj; ls /proc/self/fd";

/// A filter that allows everything but kill, which it answers with EPERM.
fn filter() -> Vec<u8> {
    let code = |code: u16, jt: u8, jf: u8, k: u32| {
        let mut out = code.to_ne_bytes().to_vec();
        out.extend([jt, jf]);
        out.extend(k.to_ne_bytes());
        out
    };
    [
        code(0x20, 0, 0, 0),
        code(0x15, 0, 1, u32::try_from(libc::SYS_kill).expect("small")),
        code(0x06, 0, 0, 0x0005_0000 | 1),
        code(0x06, 0, 0, 0x7fff_0000),
    ]
    .concat()
}

#[test]
fn an_exec_has_exactly_the_rights_of_the_first_process() {
    if !can_run() {
        return;
    }
    for (number, (uid, no_new_privs, seccomp)) in [
        (0, false, false),
        (0, false, true),
        (0, true, true),
        (1000, false, true),
        (1000, true, true),
        (1000, true, false),
    ]
    .into_iter()
    .enumerate()
    {
        let mut pod = Pod::new();
        let settle = |plan: &mut ProcessPlan| {
            plan.uid = uid;
            plan.gid = uid;
            plan.additional_gids = vec![uid, 77];
            plan.no_new_privs = no_new_privs;
            if seccomp {
                plan.seccomp = filter();
            }
            plan.rlimits = vec![Rlimit {
                resource: 7,
                soft: 100,
                hard: 200,
            }];
        };
        let mut plan = pod.plan(
            "c",
            &format!("{RIGHTS}; kill -0 $$ || echo denied; echo end; sleep 1000"),
        );
        settle(&mut plan.process);
        pod.create("c", plan).expect("create");
        pod.start("c").expect("start");
        pod.wait_for("c", "end");
        let first: Vec<String> = pod
            .log("c")
            .into_iter()
            .filter(|line| line.0 == "stdout")
            .map(|line| line.2)
            .collect();
        let (read, write) = fd::pipe().expect("pipe");
        let mut exec = Exec {
            container_id: "c".into(),
            exec_id: 1,
            process: process(&format!("{RIGHTS}; kill -0 $$ || echo denied; echo end")),
            cgroup: pod.exec_cgroup("c", 1),
            stdout: true,
            ..Exec::default()
        };
        settle(&mut exec.process);
        let answer = pod.ask(Ask::Exec(exec), &[write.as_fd()]).0;
        assert!(matches!(answer, Answer::Process(_)), "{answer:?}");
        drop(write);
        pod.exec_exited(1);
        let mut text = String::new();
        fs::File::from(read)
            .read_to_string(&mut text)
            .expect("read");
        assert_eq!(first, text.lines().collect::<Vec<_>>(), "case {number}");
        let value = |name: &str| {
            let line = first
                .iter()
                .find(|line| line.starts_with(name))
                .expect("there");
            line[name.len()..].trim().to_owned()
        };
        let effective = if uid == 0 { MASK & caps::all() } else { 0 };
        assert_eq!(value("CapEff:"), format!("{effective:016x}"));
        assert_eq!(value("CapBnd:"), format!("{MASK:016x}"));
        assert_eq!(value("CapInh:"), "0000000000000000");
        assert_eq!(value("CapAmb:"), "0000000000000000");
        assert_eq!(value("NoNewPrivs:"), u8::from(no_new_privs).to_string());
        assert_eq!(value("Seccomp:"), if seccomp { "2" } else { "0" });
        assert_eq!(first.contains(&"denied".to_owned()), seccomp);
    }
}

#[test]
fn execs_tell_their_exit_and_their_failure() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let plan = pod.plan("c", "sleep 1000");
    pod.create("c", plan).expect("create");
    let exec = |pod: &mut Pod, id: u64, args: &[&str]| {
        let mut exec = Exec {
            container_id: "c".into(),
            exec_id: id,
            process: process(""),
            cgroup: pod.exec_cgroup("c", id),
            ..Exec::default()
        };
        exec.process.args = args.iter().map(|arg| arg.as_bytes().to_vec()).collect();
        pod.ask(Ask::Exec(exec), &[]).0
    };
    assert!(
        matches!(exec(&mut pod, 1, &["true"]), Answer::Failed(_)),
        "not started yet"
    );
    pod.start("c").expect("start");
    // The first process is a shell for a moment.
    let (exited, text) = pod.exec(
        "c",
        2,
        "until ps -o comm | grep -q '^sleep$'; do :; done; \
         echo hello; hostname; ps -o comm | grep -c '^sleep$'; exit 5",
        0,
    );
    assert_eq!((exited.status.code, exited.timed_out), (5, false));
    assert_eq!(text, "hello\ninside\n1\n");
    let (exited, _) = pod.exec("c", 3, "kill -KILL $$", 0);
    assert_eq!(exited.status.signal, 9);
    match exec(&mut pod, 4, &["nosuch"]) {
        Answer::Failed(failure) => assert_eq!(failure.errno, libc::ENOENT),
        other => panic!("{other:?}"),
    }
    assert!(matches!(exec(&mut pod, 5, &["true"]), Answer::Process(_)));
    assert_eq!(pod.exec_exited(5).status.code, 0);
    // The container's end takes what still runs with it.
    assert!(matches!(
        exec(&mut pod, 6, &["sleep", "1000"]),
        Answer::Process(_)
    ));
    pod.delete("c");
    assert_eq!(pod.exec_exited(6).status.signal, 9);
}

#[test]
fn an_overdue_exec_ends_with_all_that_it_started() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    pod.run("c", "sleep 1000");
    let script = "(setsid sleep 2000 &) ; (trap '' TERM; sleep 2000) & echo started; sleep 2000";
    let (exited, text) = pod.exec("c", 1, script, 300);
    assert!(exited.timed_out);
    assert_eq!((exited.status.signal, text.as_str()), (9, "started\n"));
    // The pipe is at its end, so nothing that held it is left; and a moment later no process is: the
    // dying close their files first.
    let left = (2..100)
        .map(|id| {
            std::thread::sleep(Duration::from_millis(20));
            let script = "ps -o stat,comm | grep -v '^Z' | grep -c 'sleep$'";
            pod.exec("c", id, script, 0).1
        })
        .find(|text| text == "1\n");
    assert!(left.is_some(), "more than the container's own is left");
}

#[test]
fn an_exec_is_killed_on_request() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    pod.run("c", "sleep 1000");
    let exec = Exec {
        container_id: "c".into(),
        exec_id: 9,
        process: process("sleep 2000 & sleep 2000"),
        cgroup: pod.exec_cgroup("c", 9),
        ..Exec::default()
    };
    assert!(matches!(
        pod.ask(Ask::Exec(exec), &[]).0,
        Answer::Process(_)
    ));
    pod.simple(Ask::KillExec(KillExec { exec_id: 9 }))
        .expect("kill");
    let exited = pod.exec_exited(9);
    assert_eq!((exited.status.signal, exited.timed_out), (9, false));
    pod.simple(Ask::KillExec(KillExec { exec_id: 9 }))
        .expect("gone is fine");
}

/// Reads until `text` has come.
fn read_until(from: &OwnedFd, text: &str) -> String {
    let mut got = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let ends = |got: &[u8]| {
        got[got.len().saturating_sub(200)..]
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    };
    while !ends(&got) {
        match rustix::io::read(from, &mut *buffer) {
            Ok(0) => panic!("the end after {} bytes", got.len()),
            Ok(count) => got.extend_from_slice(&buffer[..count]),
            Err(error) => panic!("{error} after {} bytes", got.len()),
        }
    }
    String::from_utf8_lossy(&got).into_owned()
}

#[test]
fn clients_attach_at_once_and_a_slow_one_stalls_nobody() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let mut plan = pod.plan("c", "while read line; do [ $line = flood ] && yes | head -c 5000000; echo \"got $line\"; done; echo end");
    plan.stdin = true;
    plan.stdin_once = true;
    pod.create("c", plan).expect("create");
    let attach = |stdin, stdout| {
        Ask::Attach(Attach {
            container_id: "c".into(),
            stdin,
            stdout,
            stderr: false,
            replay: false,
        })
    };
    let (slow_read, slow_write) = fd::pipe().expect("pipe");
    assert!(matches!(
        pod.ask(attach(false, true), &[slow_write.as_fd()]).0,
        Answer::Done(_)
    ));
    drop(slow_write);
    pod.start("c").expect("start");
    let (in_read, in_write) = fd::pipe().expect("pipe");
    let (out_read, out_write) = fd::pipe().expect("pipe");
    let answer = pod
        .ask(attach(true, true), &[in_read.as_fd(), out_write.as_fd()])
        .0;
    assert!(matches!(answer, Answer::Done(_)));
    drop((in_read, out_write));
    rustix::io::write(&in_write, b"hello\n").expect("write");
    assert_eq!(read_until(&out_read, "got hello\n"), "got hello\n");
    rustix::io::write(&in_write, b"flood\n").expect("write");
    let flood = read_until(&out_read, "got flood\n");
    assert_eq!(flood.len(), 5_000_000 + "got flood\n".len());
    drop(in_write);
    read_until(&out_read, "end\n");
    assert_eq!(pod.exited("c").code, 0);
    let mut rest = String::new();
    fs::File::from(out_read)
        .read_to_string(&mut rest)
        .expect("the end");
    assert_eq!(rest, "");
    let mut part = Vec::new();
    fs::File::from(slow_read)
        .read_to_end(&mut part)
        .expect("detached, so at its end");
    assert!(part.len() < 5_000_000);
    assert!(pod.log("c").iter().any(|line| line.2 == "end"));
}

#[test]
fn terminals_work_for_first_processes_and_execs() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let mut plan = pod.plan("c", "tty; stty size; read line; echo \"got $line\"; stty size; echo end > /dev/console; read line");
    plan.stdin = true;
    plan.process.terminal = true;
    (plan.process.width, plan.process.height) = (100, 40);
    pod.create("c", plan).expect("create");
    let (in_read, in_write) = fd::pipe().expect("pipe");
    let (out_read, out_write) = fd::pipe().expect("pipe");
    let attach = Ask::Attach(Attach {
        container_id: "c".into(),
        stdin: true,
        stdout: true,
        stderr: false,
        replay: false,
    });
    assert!(matches!(
        pod.ask(attach, &[in_read.as_fd(), out_write.as_fd()]).0,
        Answer::Done(_)
    ));
    drop((in_read, out_write));
    pod.start("c").expect("start");
    let text = read_until(&out_read, "40 100\r\n");
    assert!(
        text.starts_with("/dev/pts/0\r\n") || text.starts_with("/dev/console\r\n"),
        "{text}"
    );
    pod.simple(Ask::Resize(Resize {
        container_id: "c".into(),
        width: 81,
        height: 25,
    }))
    .expect("resize");
    rustix::io::write(&in_write, b"hello\n").expect("write");
    let text = read_until(&out_read, "end\r\n");
    assert!(text.contains("got hello\r\n25 81\r\n"), "{text}");

    let mut exec = Exec {
        container_id: "c".into(),
        exec_id: 1,
        process: process("tty; stty size; read x; echo \"x=$x\"; exit 4"),
        cgroup: pod.exec_cgroup("c", 1),
        ..Exec::default()
    };
    exec.process.terminal = true;
    (exec.process.width, exec.process.height) = (70, 20);
    let (answer, mut fds) = pod.ask(Ask::Exec(exec), &[]);
    assert!(matches!(answer, Answer::Process(_)), "{answer:?}");
    let terminal = fds.pop().expect("a terminal");
    read_until(&terminal, "/dev/pts/1\r\n20 70\r\n");
    rustix::io::write(&terminal, b"y\n").expect("write");
    read_until(&terminal, "x=y\r\n");
    assert_eq!(pod.exec_exited(1).status.code, 4);

    rustix::io::write(&in_write, b"\n").expect("write");
    assert_eq!(pod.exited("c").code, 0);
    let log = pod.log("c");
    assert!(
        lines(&log).contains(&("stdout", "F", "got hello")),
        "{log:?}"
    );
}

#[test]
fn exits_survive_the_agent_and_logs_go_on() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    pod.run("a", "echo begun; sleep 0.2; echo later; exit 42");
    pod.run("b", "sleep 1000");
    pod.wait_for("a", "begun");
    pod.socket
        .shutdown(std::net::Shutdown::Both)
        .expect("drop the connection");
    pod.wait_for("a", "later");
    let begin = Instant::now();
    while !pod.path("run/exits/a").exists() {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..2 {
        let welcome = pod.reconnect();
        let seen: Vec<_> = welcome
            .containers
            .iter()
            .map(|report| {
                (
                    report.container_id.as_str(),
                    report.started,
                    report.exit.map(|exit| exit.code),
                    report.pid != 0,
                )
            })
            .collect();
        assert_eq!(
            seen,
            [("a", true, Some(42), false), ("b", true, None, true)]
        );
        assert_eq!(
            pod.exited("a").code,
            42,
            "told on each connection until acknowledged"
        );
    }
    pod.simple(Ask::AckExit(named("a"))).expect("acknowledge");
    pod.reconnect();
    pod.simple(Ask::CloseStdin(named("b")))
        .expect("no other event comes first");
    assert!(pod.events.is_empty());
}

#[test]
fn a_new_hello_replaces_the_old_connection_and_malformed_peers_only_lose_theirs() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    pod.run("a", "sleep 1000");
    let mut hostile = UnixStream::connect(pod.path("run/shim.sock")).expect("connect");
    hostile.write_all(&[0xff; 64]).expect("write");
    assert_eq!(hostile.read(&mut [0; 16]).unwrap_or(0), 0, "hung up");
    pod.simple(Ask::CloseStdin(named("a")))
        .expect("not disturbed");
    let mut old = pod.socket.try_clone().expect("clone");
    pod.reconnect();
    assert_eq!(old.read(&mut [0; 16]).unwrap_or(0), 0, "replaced");
    pod.delete("a");
}

#[test]
fn a_shared_pid_namespace_has_its_own_first_process() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let shared = Namespace {
        kind: NamespaceKind::Pid.into(),
        from: Some(NamespaceFrom::Pod(Empty {})),
    };
    for (id, script) in [
        ("a", "echo pid $$; (sleep 3000 &); sleep 0.1; exit 1"),
        (
            "b",
            "ls /proc/1/root/ | wc -l; ls /proc/1/fd; touch /proc/1/root/x || echo empty; sleep 1000",
        ),
    ] {
        let mut plan = pod.plan(id, script);
        plan.namespaces[1] = shared.clone();
        pod.create(id, plan).expect("create");
        pod.start(id).expect("start");
    }
    assert_eq!(pod.exited("a").code, 1);
    pod.wait_for("b", "empty");
    assert!(!pod.log("a").iter().any(|line| line.2 == "pid 1"));
    // The orphan of the ended container is still there, until that container is deleted.
    let (_, text) = pod.exec("b", 1, "ps -o args | grep -c '^[s]leep 3000'", 0);
    assert_eq!(text, "1\n");
    pod.delete("a");
    let (_, text) = pod.exec(
        "b",
        2,
        "while ps -o args | grep -q '^[s]leep 3000'; do :; done; ps -o comm | grep -c '^pod-init$'",
        0,
    );
    assert_eq!(text, "1\n");
    let mut plan = pod.plan("d", "ps -o args | grep -c '^[s]leep 1000'; exit 0");
    plan.namespaces[1].from = Some(NamespaceFrom::Container("b".into()));
    pod.create("d", plan).expect("create");
    pod.start("d").expect("start");
    pod.exited("d");
    assert_eq!(pod.log("d")[0].2, "1");
    assert_ne!(pod.reconnect().pod_init_pid, 0);
}

#[test]
fn logs_rotate_by_themselves_and_reopen_on_request() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let mut plan = pod.plan("c", "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo filled; read x; echo after");
    plan.stdin = true;
    plan.log = Some(Log {
        path: pod.text("c/log"),
        rotate_bytes: 20_000,
        keep_files: 2,
    });
    pod.create("c", plan).expect("create");
    pod.start("c").expect("start");
    let begin = Instant::now();
    let all = |pod: &Pod| {
        ["c/log.2", "c/log.1", "c/log"]
            .map(|name| fs::read_to_string(pod.path(name)).unwrap_or_default())
            .concat()
    };
    while !all(&pod).contains("filled") {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(pod.path("c/log.2").exists() && !pod.path("c/log.3").exists());
    let new = fs::File::create(pod.path("c/new")).expect("create");
    assert!(matches!(
        pod.ask(Ask::ReopenLog(named("c")), &[new.as_fd()]).0,
        Answer::Done(_)
    ));
    pod.simple(Ask::CloseStdin(named("c"))).expect("close");
    pod.exited("c");
    assert!(
        fs::read_to_string(pod.path("c/new"))
            .expect("read")
            .ends_with("stdout F after\n")
    );
}

#[test]
fn a_created_container_that_is_never_started_goes_without_a_trace() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    let plan = pod.plan("c", "echo never");
    let pid = pod.create("c", plan).expect("create");
    pod.delete("c");
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(pod.log("c").is_empty());
    assert!(pod.start("c").is_err());
}

#[test]
fn an_idle_shim_is_small() {
    if !can_run() {
        return;
    }
    let mut pod = Pod::new();
    pod.run("c", "sleep 1000");
    pod.exec("c", 1, "true", 0);
    std::thread::sleep(Duration::from_millis(500));
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", pod.pid)).expect("read");
    let pss = rollup
        .lines()
        .find(|line| line.starts_with("Pss:"))
        .expect("there");
    println!("{pss}");
}
