//! Running one plugin: found, started in a process group of its own, fed, read within bounds, and
//! killed with all that it started when its time is over.
//!
//! A plugin that an agent before this one had started may still run. It is found by the sandbox's
//! id in its environment, which whatever it starts inherits.
//!
//! Source: CNI specification, section 2.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{conf::Verb, error::CniError, result};
use crate::id::SandboxId;

/// Most that a plugin may answer.
const ANSWER_BYTES: usize = 1 << 20;
/// What is kept of its messages.
const MESSAGE_BYTES: usize = 16 << 10;
/// How long its output is waited for once it has ended: what it started may hold the pipes.
const DRAIN: Duration = Duration::from_secs(1);
/// How long a killed process may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// A program that was written a moment ago may still be open for writing.
const BUSY_TRIES: u32 = 10;
/// Where programs that plugins run are, if the agent's environment does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One run of a plugin.
pub(super) struct Run<'a> {
    pub(super) plugin: &'a str,
    pub(super) network: &'a str,
    pub(super) verb: Verb,
    pub(super) bin_dirs: &'a [PathBuf],
    /// The `CNI_` part of the environment, without command and path.
    pub(super) environment: &'a [(&'static str, String)],
    pub(super) input: Vec<u8>,
    pub(super) limit: Duration,
    pub(super) cancelled: Option<&'a CancellationToken>,
}

/// The program of this name, in the first folder that has it.
pub(super) fn find(plugin: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    folders
        .iter()
        .map(|folder| folder.join(plugin))
        .find(|file| {
            fs::metadata(file)
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

/// Folders as people and plugins read them.
pub(super) fn joined(folders: &[PathBuf]) -> OsString {
    // Settings refuse a folder with a colon in its name.
    std::env::join_paths(folders).unwrap_or_default()
}

/// Kills a plugin's process group unless it is told that there is no need.
struct Group(Option<Pid>);

impl Group {
    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // Nobody of it is left: then all is well.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Run<'_> {
    /// Runs it to its end; answers what it wrote to standard output.
    pub(super) async fn run(self) -> Result<Vec<u8>, CniError> {
        let program = find(self.plugin, self.bin_dirs).ok_or_else(|| CniError::PluginMissing {
            plugin: self.plugin.to_owned(),
            network: self.network.to_owned(),
            folders: joined(self.bin_dirs).to_string_lossy().into_owned(),
        })?;
        let mut child = self.start(&program).await?;
        // Not reaped yet, so the id is its own.
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let mut group = Group(pid);
        let mut output = Output::default();
        let ended = tokio::select! {
            ended = self.talk(&mut child, &mut output) => Some(ended),
            () = sleep(self.limit) => None,
            () = cancelled(self.cancelled) => {
                group.kill();
                reap(&mut child).await;
                return Err(CniError::Cancelled {
                    plugin: self.plugin.to_owned(),
                    network: self.network.to_owned(),
                    verb: self.verb,
                });
            }
        };
        match ended {
            None => {
                group.kill();
                reap(&mut child).await;
                Err(CniError::Deadline {
                    plugin: self.plugin.to_owned(),
                    network: self.network.to_owned(),
                    verb: self.verb,
                    after: self.limit,
                })
            }
            Some(Ok(status)) if status.success() && !output.too_long() => {
                // What it left running in good order is its own matter.
                group.0 = None;
                Ok(output.answer)
            }
            Some(Ok(_)) if output.too_long() => {
                group.kill();
                reap(&mut child).await;
                Err(CniError::Answer {
                    plugin: self.plugin.to_owned(),
                    network: self.network.to_owned(),
                    verb: self.verb,
                    reason: format!("more than {ANSWER_BYTES} bytes"),
                })
            }
            Some(Ok(status)) => Err(self.failure(status, &output)),
            Some(Err(source)) => {
                group.kill();
                reap(&mut child).await;
                Err(self.cannot("wait for", source))
            }
        }
    }

    fn cannot(&self, action: &'static str, source: io::Error) -> CniError {
        CniError::Run {
            plugin: self.plugin.to_owned(),
            network: self.network.to_owned(),
            verb: self.verb,
            action,
            source,
        }
    }

    async fn start(&self, program: &Path) -> Result<tokio::process::Child, CniError> {
        let mut command = Command::new(program);
        command
            .env("CNI_COMMAND", self.verb.as_str())
            .env("CNI_PATH", joined(self.bin_dirs))
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            // These are between the service manager and us.
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_USEC")
            .env_remove("LISTEN_FDS")
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if std::env::var_os("PATH").is_none_or(|path| path.is_empty()) {
            command.env("PATH", PATH);
        }
        let mut tries = 0;
        loop {
            match command.spawn() {
                Err(error)
                    if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES =>
                {
                    tries += 1;
                    sleep(Duration::from_millis(20)).await;
                }
                spawned => return spawned.map_err(|error| self.cannot("start", error)),
            }
        }
    }

    /// Feeds it and reads it until it has ended.
    async fn talk(
        &self,
        child: &mut tokio::process::Child,
        output: &mut Output,
    ) -> io::Result<ExitStatus> {
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A plugin that reads nothing is no failure of ours.
                let _ = stdin.write_all(&self.input).await;
            }
        };
        let Output { answer, messages } = output;
        let read = async {
            tokio::join!(feed, answers(stdout, answer), said(stderr, messages));
        };
        tokio::pin!(read);
        let (status, all_read) = tokio::select! {
            status = child.wait() => (status?, false),
            () = &mut read => (child.wait().await?, true),
        };
        if !all_read {
            // What a child of it holds open is not waited for.
            let _ = timeout(DRAIN, &mut read).await;
        }
        Ok(status)
    }

    fn failure(&self, status: ExitStatus, output: &Output) -> CniError {
        let (plugin, network) = (self.plugin.to_owned(), self.network.to_owned());
        match result::failure(&output.answer) {
            Some(failure) => CniError::Plugin {
                plugin,
                network,
                verb: self.verb,
                code: failure.code,
                msg: failure.msg,
                details: failure.details,
            },
            None => {
                let said = match output.messages.trim_ascii() {
                    [] => &output.answer,
                    said => said,
                };
                CniError::Silent {
                    plugin,
                    network,
                    verb: self.verb,
                    status: status.to_string(),
                    said: result::shorten(&String::from_utf8_lossy(said)),
                }
            }
        }
    }
}

/// What a plugin wrote.
#[derive(Default)]
struct Output {
    answer: Vec<u8>,
    messages: Vec<u8>,
}

impl Output {
    fn too_long(&self) -> bool {
        self.answer.len() > ANSWER_BYTES
    }
}

/// Reads until the end, or until it is too much.
async fn answers(pipe: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    if let Some(pipe) = pipe {
        // Cut off by an error, it is not valid.
        let _ = pipe.take(ANSWER_BYTES as u64 + 1).read_to_end(into).await;
    }
}

/// Keeps the beginning and reads all, so that the plugin never waits for us.
async fn said(pipe: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        let room = MESSAGE_BYTES.saturating_sub(into.len());
        into.extend_from_slice(&buffer[..length.min(room)]);
    }
}

async fn cancelled(token: Option<&CancellationToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}

/// A killed process is gone at once unless the kernel holds it; then it is left to the kernel.
async fn reap(child: &mut tokio::process::Child) {
    let _ = timeout(GONE_WITHIN, child.wait()).await;
}

/// Waits for `grace` until every process that a plugin started for this sandbox has ended, then
/// kills what is left, and waits until it is gone.
///
/// # Errors
/// `TimedOut` if one can't be killed.
pub(super) fn end_strays(sandbox: &SandboxId, grace: Duration) -> io::Result<()> {
    let mark = format!("CNI_CONTAINERID={sandbox}");
    let began = Instant::now();
    while began.elapsed() < grace + GONE_WITHIN {
        let mut left = pids()?;
        left.retain(|pid| is_marked(*pid, &mark));
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() >= grace {
            for pid in left {
                tracing::warn!(pid, sandbox_id = %sandbox, "outlived its plugin's time, killed");
                kill_marked(pid, &mark);
            }
        }
        thread::sleep(STRAY_PAUSE);
    }
    Err(io::ErrorKind::TimedOut.into())
}

const STRAY_PAUSE: Duration = Duration::from_millis(20);

fn pids() -> io::Result<Vec<i32>> {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    Ok(fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own)
        .collect())
}

/// A zombie has no environment any more.
fn is_marked(pid: i32, mark: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ")).is_ok_and(|all| {
        all.split(|byte| *byte == 0)
            .any(|one| one == mark.as_bytes())
    })
}

fn kill_marked(pid: i32, mark: &str) {
    // Looked at again once it is held: the number may be another process's by now.
    if let Ok(process) = longshore_sys::pidfd::open(pid)
        && is_marked(pid, mark)
    {
        let _ = longshore_sys::pidfd::send_signal(&process, Signal::KILL.as_raw());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn with(script: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("ours");
            fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
            Self(dir)
        }

        async fn run(&self, input: usize, limit: Duration) -> Result<String, CniError> {
            let folders = [self.0.path().join("none"), self.0.path().to_owned()];
            let run = Run {
                plugin: "ours",
                network: "net",
                verb: Verb::Add,
                bin_dirs: &folders,
                environment: &[],
                input: vec![b'x'; input],
                limit,
                cancelled: None,
            };
            Ok(String::from_utf8(run.run().await?).unwrap())
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn pipes_hold_nobody() {
        let check = async |script: &str, input: usize, expected: &str| {
            let began = Instant::now();
            let output = Folder::with(script).run(input, LONG).await.unwrap();
            assert_eq!(output, expected, "{script}");
            assert!(began.elapsed() < LONG / 2, "{script}");
        };
        check("cat", 1000, &"x".repeat(1000)).await;
        // Neither reads what it is given nor waits until its messages are read.
        check("echo a; head -c 1000000 /dev/zero >&2", 3_000_000, "a\n").await;
        // What it leaves behind holds the pipes open.
        check("echo b; sleep 45 & echo c", 0, "b\nc\n").await;
        // It ends long after it has said all.
        check("echo d; exec >&- 2>&-; sleep 1", 0, "d\n").await;
    }

    #[tokio::test]
    async fn an_end_that_is_not_well_is_told() {
        let of = async |script: &str, limit| Folder::with(script).run(0, limit).await.unwrap_err();
        let error = of("sleep 100", Duration::from_millis(200)).await;
        assert!(matches!(error, CniError::Deadline { .. }), "{error}");
        let error = of("exit 7", LONG).await;
        assert!(
            matches!(&error, CniError::Silent { status, said, .. } if status.contains('7') && said.is_empty()),
            "{error}"
        );
        let folder = Folder::with("");
        fs::write(folder.0.path().join("ours"), "#!/no/such/shell\n").unwrap();
        let error = folder.run(0, LONG).await.unwrap_err();
        assert!(matches!(error, CniError::Run { .. }), "{error}");
        fs::remove_file(folder.0.path().join("ours")).unwrap();
        let error = folder.run(0, LONG).await.unwrap_err();
        assert!(
            matches!(&error, CniError::PluginMissing { folders, .. } if folders.contains(':')),
            "{error}"
        );
    }
}
