//! Which file a command names, and running it.

use std::ffi::{CStr, CString};
use std::io;

use longshore_sys::proc;

use super::{Step, at, settings};
use crate::wire::{Failure, ProcessPlan};

/// Where a command is looked for when the environment has no PATH.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program ready to be executed.
pub(super) struct Program {
    /// Files to try, in order.
    candidates: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// Lowers arguments and environment; fails on a NUL inside of one and without any argument.
pub(super) fn prepare(process: &ProcessPlan) -> Step<Program> {
    let strings = |list: &[Vec<u8>]| -> io::Result<Vec<CString>> {
        list.iter()
            .map(|text| Ok(CString::new(text.as_slice())?))
            .collect()
    };
    let Some(command) = process.args.first() else {
        return Err(Failure {
            step: "execve".into(),
            errno: libc::EINVAL,
        });
    };
    Ok(Program {
        candidates: at(candidates(command, path_of(&process.env)), || {
            "execve".into()
        })?,
        args: at(strings(&process.args), || "execve: arguments".into())?,
        env: at(strings(&process.env), || "execve: environment".into())?,
    })
}

fn path_of(env: &[Vec<u8>]) -> &[u8] {
    env.iter()
        .find_map(|entry| entry.strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH)
}

/// A command with a slash is a path; any other is looked for along `path`, where an empty part
/// means the working directory.
fn candidates(command: &[u8], path: &[u8]) -> io::Result<Vec<CString>> {
    if command.is_empty() {
        return Ok(Vec::new());
    }
    if command.contains(&b'/') {
        return Ok(vec![CString::new(command)?]);
    }
    path.split(|byte| *byte == b':')
        .map(|dir| {
            let dir = if dir.is_empty() { b"." } else { dir };
            Ok(CString::new([dir, b"/", command].concat())?)
        })
        .collect()
}

impl Program {
    /// Replaces this process; returns why that failed.
    ///
    /// As execvp(3): what may not be run is remembered while the search goes on, and told if
    /// nothing else is found.
    pub(super) fn execute(self) -> Failure {
        let mut errno = libc::ENOENT;
        for candidate in &self.candidates {
            let error = proc::execve(candidate, &self.args, &self.env);
            match error.raw_os_error().unwrap_or(libc::EINVAL) {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES if self.candidates.len() > 1 && settings::is_dir(candidate) => {}
                libc::EACCES => errno = libc::EACCES,
                other => {
                    return failed(candidate, other);
                }
            }
        }
        match (self.candidates.as_slice(), self.args.first()) {
            ([only], _) => failed(only, errno),
            (_, Some(command)) => failed(command, errno),
            _ => failed(c"", errno),
        }
    }
}

fn failed(path: &CStr, errno: i32) -> Failure {
    Failure {
        step: format!("execve {}", path.to_string_lossy()),
        errno,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_looked_for_along_path() {
        let cases: &[(&str, &str, &[&str])] = &[
            ("sh", "/bin:/usr/bin", &["/bin/sh", "/usr/bin/sh"]),
            ("sh", "", &["./sh"]),
            ("sh", "/bin::/x", &["/bin/sh", "./sh", "/x/sh"]),
            ("/bin/sh", "/usr/bin", &["/bin/sh"]),
            ("./run", "/usr/bin", &["./run"]),
            ("", "/bin", &[]),
        ];
        for (command, path, expected) in cases {
            let got: Vec<_> = candidates(command.as_bytes(), path.as_bytes())
                .expect("no NUL")
                .into_iter()
                .map(|text| text.into_string().expect("text"))
                .collect();
            assert_eq!(got, *expected, "{command} along {path}");
        }
    }

    #[test]
    fn path_comes_from_the_environment_or_the_default() {
        assert_eq!(path_of(&[b"A=1".to_vec(), b"PATH=/x".to_vec()]), b"/x");
        assert_eq!(path_of(&[b"APATH=/x".to_vec()]), DEFAULT_PATH);
    }

    #[test]
    fn nothing_to_run_and_a_nul_are_refused() {
        let plan = |args: &[&[u8]]| ProcessPlan {
            args: args.iter().map(|arg| arg.to_vec()).collect(),
            ..ProcessPlan::default()
        };
        assert!(prepare(&plan(&[])).is_err());
        assert!(prepare(&plan(&[b"sh", b"a\0b"])).is_err());
    }
}
