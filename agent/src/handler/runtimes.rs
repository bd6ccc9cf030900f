//! OCI runtimes of this host that a pod can name as its handler, and what each really can.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt as _, process::Command, sync::OnceCell, time::timeout};
use tracing::{info, warn};

use super::HandlerError;

/// Name of the engine in the shim, which is the default handler.
pub const NATIVE: &str = "native";

/// Offered without configuration where they are installed.
const USUAL: [&str; 2] = ["crun", "runc"];

/// Looked through after `PATH`: services often have a short one.
const USUAL_DIRS: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// For saying what it can, which takes a runtime milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most that a runtime may say of itself; runc says 10 KiB.
const FEATURES_BYTES: u64 = 1 << 20;

/// `[handlers.NAME]` of `longshored.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuntimeConfig {
    /// How it is spoken to.
    pub kind: RuntimeKind,
    /// Its program. Unset: what is found under the handler's name.
    pub path: Option<PathBuf>,
}

/// How a runtime is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// By the command line of the OCI runtimes: `create`, `start`, `exec`, `delete`.
    #[default]
    Oci,
}

/// What a handler can, beyond what all can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Mounts that are read-only with all below them.
    pub recursive_readonly: bool,
    /// User namespaces with mapped ids.
    pub user_namespaces: bool,
}

/// One runtime.
#[derive(Debug)]
pub(super) struct Runtime {
    pub(super) name: String,
    pub(super) program: PathBuf,
    features: OnceCell<Features>,
}

/// All of this host.
#[derive(Debug, Default)]
pub(super) struct Runtimes(BTreeMap<String, Runtime>);

impl Runtimes {
    /// Finds those that are configured, and the usual ones where they are installed.
    pub(super) fn find(config: &BTreeMap<String, RuntimeConfig>) -> Result<Self, HandlerError> {
        let mut found = BTreeMap::new();
        for (name, wish) in config {
            check_name(name)?;
            let program = match &wish.path {
                Some(path) => executable(path)
                    .map(|()| path.clone())
                    .map_err(|source| missing(name, path.clone(), source))?,
                None => search(name)
                    .ok_or_else(|| missing(name, name.into(), io::ErrorKind::NotFound.into()))?,
            };
            found.insert(name.clone(), program);
        }
        for name in USUAL {
            if !found.contains_key(name)
                && let Some(program) = search(name)
            {
                found.insert(name.to_owned(), program);
            }
        }
        Ok(Self(
            found
                .into_iter()
                .map(|(name, program)| {
                    let features = OnceCell::new();
                    let runtime = Runtime {
                        name: name.clone(),
                        program,
                        features,
                    };
                    (name, runtime)
                })
                .collect(),
        ))
    }

    pub(super) fn get(&self, name: &str) -> Option<&Runtime> {
        self.0.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Runtime> {
        self.0.values()
    }
}

impl Runtime {
    /// What it says that it can; nothing if it says nothing.
    pub(super) async fn features(&self) -> Features {
        *self
            .features
            .get_or_init(|| async {
                match ask(&self.program).await {
                    Ok(said) => parse(&said).unwrap_or_else(|error| {
                        warn!(handler = self.name, %error, "features are not understood");
                        Features::default()
                    }),
                    Err(error) => {
                        info!(handler = self.name, %error, "does not tell its features");
                        Features::default()
                    }
                }
            })
            .await
    }
}

fn check_name(name: &str) -> Result<(), HandlerError> {
    let expected = if name == NATIVE {
        "is the engine of this agent and needs no program"
    } else if name.is_empty()
        || name.len() > 63
        || !name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte))
    {
        "must be lower-case letters, digits, `-` and `.`, at most 63"
    } else {
        return Ok(());
    };
    Err(HandlerError::BadName {
        name: name.to_owned(),
        expected,
    })
}

fn missing(name: &str, path: PathBuf, source: io::Error) -> HandlerError {
    HandlerError::RuntimeMissing {
        handler: name.to_owned(),
        path,
        source,
    }
}

fn executable(path: &Path) -> io::Result<()> {
    if !path.is_absolute() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "is not an absolute path",
        ));
    }
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a file"));
    }
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK)?;
    Ok(())
}

fn search(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(USUAL_DIRS.map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|program| executable(program).is_ok())
}

async fn ask(program: &Path) -> io::Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("features")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    // Not reaped yet, so the number is its own.
    let group = child
        .id()
        .and_then(|id| rustix::process::Pid::from_raw(id.cast_signed()));
    let stdout = child.stdout.take().expect("piped above");
    let saying = async {
        let mut said = Vec::new();
        stdout.take(FEATURES_BYTES).read_to_end(&mut said).await?;
        let status = child.wait().await?;
        if status.success() {
            Ok(said)
        } else {
            Err(io::Error::other(status.to_string()))
        }
    };
    let in_time = timeout(PATIENCE, saying).await;
    if in_time.is_err()
        && let Some(group) = group
    {
        // What it has started keeps us waiting, or would outlive it.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    in_time.map_err(|_| io::ErrorKind::TimedOut)?
}

/// Source: OCI runtime specification, features.md.
fn parse(said: &[u8]) -> Result<Features, serde_json::Error> {
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Said {
        mount_options: Vec<String>,
        linux: Linux,
    }
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Linux {
        namespaces: Vec<String>,
    }
    let said: Said = serde_json::from_slice(said)?;
    Ok(Features {
        recursive_readonly: said.mount_options.iter().any(|option| option == "rro"),
        // Owners are mapped by the shim: all that the runtime must do is to join.
        user_namespaces: said.linux.namespaces.iter().any(|one| one == "user"),
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
        path
    }

    fn config(name: &str, path: Option<&Path>) -> BTreeMap<String, RuntimeConfig> {
        let path = path.map(Path::to_owned);
        let kind = RuntimeKind::Oci;
        BTreeMap::from([(name.to_owned(), RuntimeConfig { kind, path })])
    }

    #[test]
    fn what_is_configured_must_be_there_and_have_a_fitting_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let good = program(dir.path(), "mine", "");
        let found = Runtimes::find(&config("mine", Some(&good))).expect("found");
        assert_eq!(found.get("mine").expect("is known").program, good);
        let plain = dir.path().join("plain");
        fs::write(&plain, "").expect("written");
        for (name, path) in [
            ("mine", Some(dir.path().join("absent"))),
            ("mine", Some(plain)),
            ("mine", Some(dir.path().to_owned())),
            ("mine", Some("relative".into())),
            ("no-such-runtime", None),
        ] {
            let error = Runtimes::find(&config(name, path.as_deref())).expect_err("refused");
            match error {
                HandlerError::RuntimeMissing { handler, .. } => assert_eq!(handler, name),
                other => panic!("{other:?}"),
            }
        }
        for name in ["native", "", "a/b", "A"] {
            let error = Runtimes::find(&config(name, Some(&good))).expect_err("refused");
            assert!(matches!(error, HandlerError::BadName { .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn features_are_those_that_the_runtime_tells() {
        let dir = tempfile::tempdir().expect("a directory");
        for (script, expected) in [
            (
                r#"test "$*" = features && echo '{"mountOptions": ["ro", "rro"]}'"#,
                true,
            ),
            (r#"echo '{"mountOptions": ["ro"]}'"#, false),
            (r#"echo '{}'"#, false),
            ("echo nonsense", false),
            (r#"echo '{"mountOptions": ["rro"]}'; exit 1"#, false),
        ] {
            let path = program(dir.path(), "mine", script);
            let found = Runtimes::find(&config("mine", Some(&path))).expect("found");
            let features = found.get("mine").expect("is known").features().await;
            assert_eq!(features.recursive_readonly, expected, "{script}");
        }
    }

    #[tokio::test]
    async fn a_runtime_that_does_not_answer_is_ended_with_what_it_started() {
        let dir = tempfile::tempdir().expect("a directory");
        let note = dir.path().join("started");
        let script = format!("sleep 1000 & echo $! > {}; wait", note.display());
        let path = program(dir.path(), "mine", &script);
        let found = Runtimes::find(&config("mine", Some(&path))).expect("found");
        let features = found.get("mine").expect("is known").features().await;
        assert_eq!(features, Features::default());
        let started = fs::read_to_string(&note).expect("it began");
        let command = format!("/proc/{}/cmdline", started.trim());
        for _ in 0..500 {
            // A zombie has none.
            if fs::read(&command).unwrap_or_default().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{command} is still there");
    }
}
