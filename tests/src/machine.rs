//! A network and a mount namespace of its own, standing for a host.
//!
//! One thread lives in them and runs what it is told; children that it starts inherit both. The
//! kernel keeps the namespaces as long as the thread, a child, or a child's child lives, so an
//! agent may be killed and started again in the same "host".

use std::{
    collections::BTreeSet,
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, anyhow};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

type Job = Box<dyn FnOnce() + Send>;

struct Inner {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    tid: i32,
    inherited: BTreeSet<String>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            // A panic in there was already reported to whoever waited for the job.
            let _reported = thread.join();
        }
    }
}

/// See the module.
#[derive(Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

impl Machine {
    /// Makes the namespaces, with the loopback up.
    ///
    /// # Errors
    /// Without the rights of root.
    pub fn start() -> Result<Self> {
        let machine = Self::with(true, || -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
                .context("unshare (are you root?)")?;
            let everything = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, everything, None::<&str>)
                .context("make mounts private")?;
            // A host that has a network of CNI would lend it to every agent here.
            let folder = Path::new("/etc/cni/net.d");
            if folder.exists() {
                mount(
                    Some("none"),
                    folder,
                    Some("tmpfs"),
                    MsFlags::empty(),
                    None::<&str>,
                )
                .context("hide /etc/cni/net.d")?;
            }
            let up = Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status()
                .context("run ip (package iproute2)")?;
            if !up.success() {
                return Err(anyhow!("ip link set lo up: {up}"));
            }
            Ok(())
        })?;
        Ok(machine)
    }

    /// The host itself: for a demonstration that others can reach.
    pub fn host() -> Result<Self> {
        Self::with(false, || Ok(()))
    }

    fn with(own: bool, enter: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (tell, ready) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("machine".to_owned())
            .spawn(move || {
                let entered = enter();
                let failed = entered.is_err();
                let tid = rustix::thread::gettid().as_raw_nonzero().get();
                let _gone = tell.send(entered.map(|()| (tid, mounts())));
                if failed {
                    return;
                }
                for job in todo {
                    job();
                }
            })?;
        let (tid, inherited) = ready.recv().context("the machine's thread ended")??;
        Ok(Self {
            inner: Arc::new(Inner {
                jobs: Some(jobs),
                thread: Some(thread),
                tid,
                inherited: if own { inherited } else { BTreeSet::new() },
            }),
        })
    }

    /// Runs `job` inside and waits for it.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, done) = mpsc::channel();
        self.inner
            .jobs
            .as_ref()
            .expect("only drop takes it")
            .send(Box::new(move || {
                let _gone = tell.send(job());
            }))
            .expect("the machine's thread lives as long as we do");
        done.recv().expect("a job in the machine panicked")
    }

    /// Starts a program inside.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let shown = format!("{command:?}");
        self.run(move || command.spawn()).context(shown)
    }

    /// Runs a program inside; answers what it wrote to standard output.
    ///
    /// # Errors
    /// If it cannot be run, or fails; with what it wrote to standard error.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(args);
        let shown = format!("{command:?}");
        let output = self.run(move || command.output()).context(shown.clone())?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            return Err(anyhow!("{shown}: {}: {}", output.status, error.trim()));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Listens inside, on `address`; the listener may be used anywhere.
    pub fn listen(&self, address: &str) -> Result<TcpListener> {
        let address: SocketAddr = address.parse()?;
        Ok(self.run(move || TcpListener::bind(address))?)
    }

    /// Lines of its mountinfo, without those that were copied from the host when it was made: the
    /// host may drop them at any time.
    pub fn mountinfo(&self) -> BTreeSet<String> {
        let now = self.run(mounts);
        now.difference(&self.inner.inherited).cloned().collect()
    }

    /// Path of its network namespace, as long as the machine lives.
    pub fn netns(&self) -> PathBuf {
        format!(
            "/proc/{}/task/{}/ns/net",
            std::process::id(),
            self.inner.tid
        )
        .into()
    }

    /// Lays a cable to another machine: `link` here with `address`, `other_link` there.
    pub fn connect(
        &self,
        link: &str,
        address: &str,
        other: &Self,
        other_link: &str,
        other_address: &str,
    ) -> Result<()> {
        self.output(
            "ip",
            &[
                "link", "add", link, "type", "veth", "peer", "name", other_link,
            ],
        )?;
        let place = other.netns();
        self.output(
            "ip",
            &["link", "set", other_link, "netns", &place.to_string_lossy()],
        )?;
        for (machine, link, address) in [(self, link, address), (other, other_link, other_address)]
        {
            machine.output("ip", &["addr", "add", address, "dev", link, "nodad"])?;
            machine.output("ip", &["link", "set", link, "up"])?;
        }
        Ok(())
    }
}

fn mounts() -> BTreeSet<String> {
    fs::read_to_string("/proc/thread-self/mountinfo")
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Fetches `http://ADDRESS/` from inside `machine`; answers the body.
pub fn fetch_page(machine: &Machine, address: SocketAddr) -> Result<String> {
    use std::{
        io::{Read as _, Write as _},
        net::TcpStream,
        time::Duration,
    };
    machine.run(move || {
        let limit = Duration::from_secs(10);
        let mut stream = TcpStream::connect_timeout(&address, limit)
            .with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(limit))?;
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("read from {address}"))?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        if !head.starts_with("HTTP/1.1 200") {
            return Err(anyhow!("{head}"));
        }
        Ok(body.to_owned())
    })
}
