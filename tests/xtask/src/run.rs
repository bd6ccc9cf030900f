//! Commands, said and checked.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What each step answers: nothing, or why not.
pub(crate) type Step = Result<(), String>;

/// Where everything is.
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
}

impl Workspace {
    pub(crate) fn find() -> Result<Self, String> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here
            .ancestors()
            .find(|dir| dir.join("Cargo.lock").exists())
            .ok_or("no Cargo.lock above tests/xtask")?
            .to_owned();
        let target = env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| root.join("target"), |dir| root.join(dir));
        Ok(Self { root, target })
    }

    pub(crate) fn cargo(&self, verb: &str) -> Run {
        let mut run = Run::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        run.0.arg(verb).current_dir(&self.root);
        run
    }

    /// A program of ours, with what the test harness looks for in its environment.
    pub(crate) fn program(&self, profile: &str, name: &str) -> Run {
        let dir = self.target.join(profile);
        let mut run = Run::new(dir.join(name));
        run.0
            .env("LONGSHORE_BIN_DIR", &dir)
            .env("LONGSHORE_PAGE_SERVER", self.page_server());
        run
    }

    pub(crate) fn page_server(&self) -> PathBuf {
        self.target.join("static/release/page-server")
    }
}

/// A command that is shown before it runs.
pub(crate) struct Run(pub(crate) Command);

impl Run {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        Self(Command::new(program))
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.arg(arg);
        self
    }

    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.0.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    pub(crate) fn env_remove(mut self, name: &str) -> Self {
        self.0.env_remove(name);
        self
    }

    fn shown(&self) -> String {
        let program = Path::new(self.0.get_program());
        let name = program.file_name().unwrap_or(program.as_os_str());
        let words: Vec<OsString> = std::iter::once(name.to_owned())
            .chain(self.0.get_args().map(OsStr::to_owned))
            .collect();
        words
            .iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Runs it to its end; its output is ours.
    pub(crate) fn check(mut self) -> Step {
        let shown = self.shown();
        eprintln!("$ {shown}");
        match self.0.stdin(Stdio::null()).status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{shown}: {status}")),
            Err(error) => Err(format!("{shown}: {error}")),
        }
    }

    /// Runs it to its end and answers what it wrote to standard output.
    pub(crate) fn output(mut self) -> Result<String, String> {
        let shown = self.shown();
        let output = self
            .0
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| format!("{shown}: {error}"))?;
        if !output.status.success() {
            return Err(format!("{shown}: {}", output.status));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether it runs and succeeds; shows nothing.
    pub(crate) fn works(mut self) -> bool {
        self.0
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }
}

pub(crate) fn is_root() -> bool {
    // The effective uid is the second number of the line.
    fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:"))
            .and_then(|ids| ids.split_whitespace().nth(1))
            == Some("0")
    })
}

pub(crate) fn need_root(why: &str) -> Step {
    if is_root() {
        Ok(())
    } else {
        Err(format!("run it as root: {why}"))
    }
}
