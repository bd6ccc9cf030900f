//! Against the real shim and the kernel: pods of one busybox, in a directory of their own.

use std::{
    fs,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use longshore_sys::fd::pipe;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};

use super::*;
use crate::{
    cgroup::{CgroupChapterConfig, Cgroups},
    id::InstanceId,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A node without the rest of the agent.
struct Node {
    handler: Arc<NativeHandler>,
    cgroups: Arc<Cgroups>,
    events: mpsc::Receiver<ShimEvent>,
    dir: TempDir,
    shim: PathBuf,
}

struct Pod {
    id: SandboxId,
    dir: PathBuf,
    pid: i32,
}

impl Node {
    /// `None`, with the reason printed, where this cannot run.
    fn new(test: &str) -> Option<Self> {
        let skip = |reason: &str| {
            eprintln!("{test}: skipped, {reason}");
            None
        };
        if !rustix::process::geteuid().is_root() {
            return skip("needs root");
        }
        if !Path::new("/bin/busybox").exists() {
            return skip("needs a static /bin/busybox");
        }
        let own = std::env::current_exe().expect("this program has a path");
        let shim = match std::env::var_os("LONGSHORE_SHIM") {
            Some(path) => PathBuf::from(path),
            // target/debug/deps/<test> -> target/debug/longshore-shim
            None => own.ancestors().nth(2)?.join("longshore-shim"),
        };
        if !shim.exists() {
            return skip("needs longshore-shim to be built");
        }
        let cgroups = Cgroups::new(&InstanceId::random(), &CgroupChapterConfig::default())
            .expect("this host has cgroups");
        let cgroups = Arc::new(cgroups);
        let handler = Self::handler(&shim, &cgroups);
        let events = handler.events().expect("not taken yet");
        let dir = tempfile::tempdir().expect("a directory");
        let layer = dir.path().join("layers/1");
        for name in ["bin", "proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(layer.join(name)).expect("a layer");
        }
        fs::copy("/bin/busybox", layer.join("bin/busybox")).expect("busybox");
        for name in [
            "sh", "sleep", "cat", "echo", "id", "stty", "true", "kill", "head",
        ] {
            std::os::unix::fs::symlink("busybox", layer.join("bin").join(name)).expect("a link");
        }
        Some(Self {
            handler,
            cgroups,
            events,
            dir,
            shim,
        })
    }

    fn handler(shim: &Path, cgroups: &Arc<Cgroups>) -> Arc<NativeHandler> {
        let config = HandlerChapterConfig {
            shim: Some(shim.to_owned()),
        };
        Arc::new(
            NativeHandler::new(&config, &Default::default(), cgroups.clone())
                .expect("the shim is there"),
        )
    }

    async fn pod(&self) -> Pod {
        let id = SandboxId::random();
        let dir = self.dir.path().join("sandboxes").join(id.as_str());
        fs::create_dir_all(&dir).expect("a run directory");
        let pid = Handler::start_pod(&*self.handler, &id, &dir)
            .await
            .expect("a shim");
        Pod { id, dir, pid }
    }

    fn cgroup(&self, pod: &Pod, container: &ContainerId) -> CgroupPath {
        self.cgroups
            .pod(None, &pod.id)
            .expect("a path")
            .child(container)
    }

    fn request(&self, pod: &Pod, process: Value) -> CreateRequest {
        let container_id = ContainerId::random();
        let cgroup = self.cgroup(pod, &container_id);
        self.cgroups.create(&cgroup, None).expect("a cgroup");
        let at = |name: &str| {
            let dir = self.dir.path().join(name).join(container_id.as_str());
            fs::create_dir_all(&dir).expect("a directory");
            dir
        };
        CreateRequest {
            handler: String::new(),
            sandbox_id: pod.id.clone(),
            spec: spec(process),
            env: None,
            root: RootInput {
                mount_point: at("roots"),
                layers_dir: self.dir.path().join("layers"),
                lower: vec!["1".to_owned()],
                upper: at("upper"),
                work: at("work"),
                durable: false,
            },
            cgroup,
            pid: PidMode::New,
            log: None,
            stdin: false,
            stdin_once: false,
            system: None,
            container_id,
        }
    }

    /// A running container.
    async fn run(&self, pod: &Pod, args: Value) -> ContainerId {
        let request = self.request(pod, process(args));
        let id = request.container_id.clone();
        let pid = Handler::create(&*self.handler, request)
            .await
            .expect("created");
        assert!(pid > 0);
        self.handler.start(&pod.id, &id).await.expect("started");
        id
    }

    fn exec(&self, pod: &Pod, container: &ContainerId, process: Value) -> ExecRequest {
        ExecRequest {
            handler: String::new(),
            sandbox_id: pod.id.clone(),
            container_id: container.clone(),
            process: serde_json::from_value(process).expect("valid OCI JSON"),
            env: None,
            seccomp: None,
            cgroup: self.cgroup(pod, container),
            streams: Streams::default(),
            timeout: None,
        }
    }

    async fn next_event(&mut self) -> ShimEvent {
        timeout(PATIENCE, self.events.recv())
            .await
            .expect("an event in time")
            .expect("the handler lives")
    }

    async fn end(self, pods: impl IntoIterator<Item = Pod>) {
        for pod in pods {
            Handler::end_pod(&*self.handler, &pod.id, &pod.dir)
                .await
                .expect("ended");
            assert!(!runs(pod.pid), "shim {} still runs", pod.pid);
            assert!(!pod.dir.join("shim.sock").exists());
        }
        let root = self.cgroups.root().clone();
        self.cgroups.remove(&root).expect("nothing is left");
    }
}

impl Drop for Node {
    /// What a failed test leaves.
    fn drop(&mut self) {
        let sandboxes = self.dir.path().join("sandboxes");
        for (sandbox, _) in shim::running(&sandboxes) {
            let _ = shim::kill(&sandbox, &sandboxes.join(sandbox.as_str()));
        }
        let _ = self.cgroups.remove(&self.cgroups.root().clone());
    }
}

/// A process that ended may wait for whoever adopted it to take note.
fn runs(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

fn process(args: Value) -> Value {
    let all = ["CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"];
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": all, "permitted": all, "effective": all},
    })
}

fn spec(process: Value) -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "hostname": "test",
        "process": process,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"},
        ]},
    }))
    .expect("valid OCI JSON")
}

fn read_all(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd)
        .read_to_string(&mut text)
        .expect("readable text");
    text
}

/// Runs an exec to its end; returns its exit and what it wrote.
async fn output(node: &Node, mut request: ExecRequest) -> (wire::ExecExited, String) {
    let (read, write) = pipe().expect("a pipe");
    request.streams.stdout = Some(write);
    let reading = tokio::task::spawn_blocking(move || read_all(read));
    let exec = Handler::exec(&*node.handler, request).await.expect("runs");
    let exit = timeout(PATIENCE, exec.exit)
        .await
        .expect("ends in time")
        .expect("the shim lives");
    (exit, reading.await.expect("read"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_lives_and_its_exit_is_told_until_acknowledged() {
    let Some(mut node) = Node::new("a_container_lives") else {
        return;
    };
    let pod = node.pod().await;
    let id = node.run(&pod, json!(["sh", "-c", "exit 7"])).await;
    let event = node.next_event().await;
    assert_eq!(event.sandbox_id, pod.id);
    let ShimNews::Exited(exited) = event.what else {
        panic!("{event:?}");
    };
    assert_eq!(exited.container_id, id.to_string());
    assert_eq!((exited.status.code, exited.status.signal), (7, 0));

    let welcome = Handler::reconnect(&*node.handler, &pod.id, &pod.dir)
        .await
        .expect("the shim answers");
    assert_eq!(welcome.pid, pod.pid);
    assert_eq!(welcome.containers.len(), 1);
    assert!(welcome.containers[0].exit.is_some());
    let again = node.next_event().await;
    assert!(matches!(again.what, ShimNews::Exited(_)), "{again:?}");

    node.handler.ack_exit(&pod.id, &id).await.expect("known");
    node.handler.delete(&pod.id, &id).await.expect("deleted");
    node.handler
        .delete(&pod.id, &id)
        .await
        .expect("deleted twice");
    let unknown = node.handler.start(&pod.id, &id).await;
    assert!(
        matches!(unknown, Err(HandlerError::UnknownContainer { .. })),
        "{unknown:?}"
    );
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_program_is_told_by_step_and_error_number() {
    let Some(node) = Node::new("a_missing_program") else {
        return;
    };
    let pod = node.pod().await;
    let request = node.request(&pod, process(json!(["/no/such/program"])));
    let id = request.container_id.clone();
    let started = match Handler::create(&*node.handler, request).await {
        Ok(_) => node.handler.start(&pod.id, &id).await,
        Err(e) => Err(e),
    };
    let Err(HandlerError::Step { step, errno, .. }) = &started else {
        panic!("{started:?}");
    };
    assert!(step.contains("/no/such/program"), "{step}");
    assert_eq!(*errno, 2);
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn execs_run_side_by_side_and_end_as_they_should() {
    let Some(node) = Node::new("execs_run") else {
        return;
    };
    let pod = node.pod().await;
    let id = node.run(&pod, json!(["sleep", "1000"])).await;

    let (exit, said) = output(
        &node,
        node.exec(&pod, &id, process(json!(["sh", "-c", "echo out; exit 3"]))),
    )
    .await;
    assert_eq!((exit.status.code, said.as_str()), (3, "out\n"));
    assert!(!exit.timed_out);

    let many = (0..16).map(|n| {
        let request = node.exec(&pod, &id, process(json!(["echo", n.to_string()])));
        output(&node, request)
    });
    for (n, (exit, said)) in futures_util::future::join_all(many)
        .await
        .into_iter()
        .enumerate()
    {
        assert_eq!((exit.status.code, said), (0, format!("{n}\n")));
    }

    let missing = Handler::exec(
        &*node.handler,
        node.exec(&pod, &id, process(json!(["nothing-of-that-name"]))),
    )
    .await;
    assert!(
        matches!(missing, Err(HandlerError::Step { errno: 2, .. })),
        "{missing:?}"
    );
    let other = ContainerId::random();
    let mut unknown = node.exec(&pod, &other, process(json!(["true"])));
    unknown.cgroup = node.cgroup(&pod, &id);
    let unknown = Handler::exec(&*node.handler, unknown).await;
    assert!(
        matches!(unknown, Err(HandlerError::UnknownContainer { .. })),
        "{unknown:?}"
    );
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_and_all_that_it_started_end_at_its_deadline_or_by_wish() {
    let Some(node) = Node::new("an_exec_and_all") else {
        return;
    };
    let pod = node.pod().await;
    let id = node.run(&pod, json!(["sleep", "1000"])).await;
    let tree = json!(["sh", "-c", "sleep 1000 & sleep 1000"]);

    let mut request = node.exec(&pod, &id, process(tree.clone()));
    request.timeout = Some(Duration::from_millis(100));
    // The pipe ends only once everybody who holds it is dead.
    let (exit, _) = output(&node, request).await;
    assert!(exit.timed_out);
    assert_eq!(exit.status.signal, 9);

    let (read, write) = pipe().expect("a pipe");
    let mut request = node.exec(&pod, &id, process(tree));
    request.streams.stdout = Some(write);
    let exec = Handler::exec(&*node.handler, request).await.expect("runs");
    node.handler
        .kill_exec(&pod.id, exec.exec_id)
        .await
        .expect("killed");
    let exit = timeout(PATIENCE, exec.exit).await.expect("ends in time");
    assert_eq!(exit.expect("the shim lives").status.signal, 9);
    tokio::task::spawn_blocking(move || read_all(read))
        .await
        .expect("all of it is dead");

    // A process gives up its descriptors a moment before its cgroup.
    let cgroup = node.cgroup(&pod, &id);
    let only_the_first = async {
        while node.cgroups.processes(&cgroup).expect("readable").len() > 1 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, only_the_first)
        .await
        .expect("the container's own process is left");
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_comes_back_with_the_reply() {
    let Some(node) = Node::new("a_terminal") else {
        return;
    };
    let pod = node.pod().await;
    let id = node.run(&pod, json!(["sleep", "1000"])).await;
    let mut on_terminal = process(json!(["stty", "size"]));
    on_terminal["terminal"] = json!(true);
    on_terminal["consoleSize"] = json!({"height": 24, "width": 80});
    let exec = Handler::exec(&*node.handler, node.exec(&pod, &id, on_terminal))
        .await
        .expect("runs");
    let terminal = exec.terminal.expect("a terminal");
    let said = tokio::task::spawn_blocking(move || {
        let mut said = Vec::new();
        // A terminal without a program answers EIO at the end.
        let _ = File::from(terminal).read_to_end(&mut said);
        String::from_utf8_lossy(&said).into_owned()
    })
    .await
    .expect("read");
    assert_eq!(said.trim(), "24 80");
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seccomp_profile_holds_in_first_process_and_exec() {
    let Some(node) = Node::new("the_seccomp_profile") else {
        return;
    };
    let pod = node.pod().await;
    let profile = seccomp::default_profile(&Default::default());
    let mut request = node.request(&pod, process(json!(["sleep", "1000"])));
    request
        .spec
        .linux_mut()
        .as_mut()
        .expect("it is Linux")
        .set_seccomp(Some(profile.clone()));
    let id = request.container_id.clone();
    let pid = Handler::create(&*node.handler, request)
        .await
        .expect("created");
    node.handler.start(&pod.id, &id).await.expect("started");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    let mut request = node.exec(
        &pod,
        &id,
        process(json!([
            "sh",
            "-c",
            "while read k v; do [ $k = Seccomp: ] && echo $v; done < /proc/self/status"
        ])),
    );
    request.seccomp = Some(profile);
    let (_, said) = output(&node, request).await;
    assert_eq!(said, "2\n");
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_dies_is_reported_and_its_requests_fail() {
    let Some(mut node) = Node::new("a_shim_that_dies") else {
        return;
    };
    let pod = node.pod().await;
    let id = node.run(&pod, json!(["sleep", "1000"])).await;
    let exec = Handler::exec(
        &*node.handler,
        node.exec(&pod, &id, process(json!(["sleep", "1000"]))),
    )
    .await
    .expect("runs");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pod.pid).expect("a pid"),
        rustix::process::Signal::KILL,
    )
    .expect("our own shim");
    let event = node.next_event().await;
    assert_eq!(
        event,
        ShimEvent {
            sandbox_id: pod.id.clone(),
            what: ShimNews::Lost { process_gone: true },
        }
    );
    assert!(exec.exit.await.is_err());
    let after = node.handler.signal(&pod.id, &id, 15).await;
    assert!(
        matches!(after, Err(HandlerError::ShimLost { .. })),
        "{after:?}"
    );
    let again = Handler::reconnect(&*node.handler, &pod.id, &pod.dir).await;
    assert!(
        matches!(again, Err(HandlerError::ShimLost { .. })),
        "{again:?}"
    );
    node.cgroups
        .kill(&node.cgroup(&pod, &id))
        .expect("the cgroup outlives the shim");
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_agent_finds_the_pod_and_ends_it_by_id_alone() {
    let Some(mut node) = Node::new("another_agent") else {
        return;
    };
    let pod = node.pod().await;
    let hung = node.pod().await;
    let id = node.run(&pod, json!(["sleep", "1000"])).await;
    // The first agent dies.
    node.handler = Node::handler(&node.shim, &node.cgroups);
    let sandboxes = node.dir.path().join("sandboxes");
    let mut listed = node.handler.inventory(&sandboxes).await;
    listed.sort();
    let mut expected = vec![(pod.id.clone(), pod.pid), (hung.id.clone(), hung.pid)];
    expected.sort();
    assert_eq!(listed, expected);

    let welcome = Handler::reconnect(&*node.handler, &pod.id, &pod.dir)
        .await
        .expect("the shim answers");
    assert_eq!(welcome.containers[0].container_id, id.to_string());
    assert!(welcome.containers[0].started);
    node.handler
        .signal(&pod.id, &id, 9)
        .await
        .expect("it is known");

    // A shim whose socket is gone is found by its command line.
    fs::remove_file(hung.dir.join("shim.sock")).expect("it was there");
    for attempt in ["killed", "ended twice"] {
        Handler::end_pod(&*node.handler, &hung.id, &hung.dir)
            .await
            .expect(attempt);
        assert!(!runs(hung.pid));
    }

    // One that was never connected to is asked to end.
    node.handler = Node::handler(&node.shim, &node.cgroups);
    Handler::end_pod(&*node.handler, &pod.id, &pod.dir)
        .await
        .expect("ended");
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_do_not_fight_for_a_shim() {
    let Some(node) = Node::new("agents_do_not_fight") else {
        return;
    };
    let pod = node.pod().await;
    let second = Node::handler(&node.shim, &node.cgroups);
    Handler::reconnect(&*second, &pod.id, &pod.dir)
        .await
        .expect("the shim answers");
    // Whoever lost its place tries once, and then one of them has it for good.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let other = SandboxId::random();
    let nobody = ContainerId::random();
    let mut served = 0;
    for handler in [&node.handler, &second] {
        for _ in 0..3 {
            match handler.signal(&pod.id, &nobody, 1).await {
                Err(HandlerError::UnknownContainer { .. }) => served += 1,
                Err(HandlerError::ShimLost { .. }) => {}
                answer => panic!("{answer:?}"),
            }
        }
    }
    assert_eq!(served, 3, "exactly one is served");
    let unconnected = node.handler.signal(&other, &nobody, 1).await;
    assert!(matches!(unconnected, Err(HandlerError::ShimLost { .. })));
    node.end([pod]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attached_clients_reach_stdin_and_output() {
    let Some(node) = Node::new("attached_clients") else {
        return;
    };
    let pod = node.pod().await;
    let mut request = node.request(&pod, process(json!(["cat"])));
    request.stdin = true;
    request.stdin_once = true;
    let log_path = node.dir.path().join("log");
    request.log = Some(LogInput {
        file: File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .expect("a log"),
        path: log_path.clone(),
        rotate_bytes: 0,
        keep: 0,
    });
    let id = request.container_id.clone();
    Handler::create(&*node.handler, request)
        .await
        .expect("created");
    let (stdin, mut to_stdin) = pipe().expect("a pipe");
    let (from_stdout, stdout) = pipe().expect("a pipe");
    let streams = Streams {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: None,
    };
    Handler::attach(&*node.handler, &pod.id, &id, streams, false)
        .await
        .expect("attached");
    node.handler.start(&pod.id, &id).await.expect("started");
    rustix::io::write(&mut to_stdin, b"hello\n").expect("written");
    drop(to_stdin);
    let said = tokio::task::spawn_blocking(move || read_all(from_stdout))
        .await
        .expect("read");
    assert_eq!(said, "hello\n");
    let log = fs::read_to_string(&log_path).expect("a log");
    assert!(log.ends_with(" stdout F hello\n"), "{log:?}");
    node.end([pod]).await;
}
