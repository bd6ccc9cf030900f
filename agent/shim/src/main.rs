//! The supervisor of one pod: outlives the agent, owns stdio, logs and exit codes.
//!
//! `longshore-shim --sandbox ID --dir DIR`, with the agent's first connection on descriptor 0.
//! When the process that was started exits with 0, the shim is up: a grandchild in a session of
//! its own, listening on `DIR/shim.sock`. With another code, standard error says why.

mod ask;
mod cgroup;
mod connection;
mod container;
mod exec;
mod exit;
mod init;
mod log;
mod oci;
mod pod;
mod poll;
mod report;
mod shim;
mod stdio;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use longshore_shim::wire;
use longshore_sys::{clone, fd, proc};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::container::Home;
use crate::exit::Exits;
use crate::shim::{Parts, Shim};

/// Nearly never the one to be killed for memory: it is small, and the pod's exits are with it.
const OOM_SCORE_ADJ: i32 = -999;

fn main() -> ExitCode {
    let Some(dir) = parse_args(std::env::args().skip(1)) else {
        eprintln!("usage: longshore-shim --sandbox ID --dir DIR, with a socket on descriptor 0");
        return ExitCode::from(2);
    };
    match launch(&dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err((step, error)) => {
            eprintln!("longshore-shim: {step}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The sandbox's id is there for whoever reads the process list; the directory says all.
fn parse_args(args: impl Iterator<Item = String>) -> Option<PathBuf> {
    let args: Vec<String> = args.collect();
    match args.as_slice() {
        [sandbox, id, flag, dir] if sandbox == "--sandbox" && flag == "--dir" && !id.is_empty() => {
            let dir = PathBuf::from(dir);
            dir.is_absolute().then_some(dir)
        }
        _ => None,
    }
}

type Step<T> = Result<T, (&'static str, io::Error)>;

fn at<T, E: Into<io::Error>>(result: Result<T, E>, step: &'static str) -> Step<T> {
    result.map_err(|error| (step, error.into()))
}

fn launch(dir: &Path) -> Step<()> {
    // SAFETY: the runtime has opened nothing beyond the three standard descriptors.
    at(unsafe { fd::close_range(3, u32::MAX) }, "close_range")?;
    proc::keep_heap_small();
    at(proc::set_dumpable(false), "not dumpable")?;
    at(fd::peer_credentials(io::stdin()), "descriptor 0")?;
    let oom_score_adj = current_oom_score_adj();
    at(proc::set_oom_score_adj(OOM_SCORE_ADJ), "oom_score_adj")?;
    at(rustix::process::chdir("/"), "chdir")?;
    let parts = Parts {
        listener: at(listen(dir), "listen on shim.sock")?,
        agent: at(io::stdin().as_fd().try_clone_to_owned(), "descriptor 0")?,
        exits: at(Exits::new(dir), "make exits")?,
        home: Home {
            pid_ns: at(pod::open_ns("/proc/self/ns/pid"), "open pid namespace")?,
            oom_score_adj,
        },
        dir: dir.to_owned(),
    };
    if !at(leave(), "leave the agent")? {
        return Ok(());
    }
    at(settle(), "settle")?;
    let mut shim = at(Shim::new(parts), "epoll")?;
    let socket = dir.join("shim.sock");
    let result = shim.run();
    let _ = fs::remove_file(socket);
    at(result, "epoll")
}

fn current_oom_score_adj() -> i32 {
    fs::read_to_string("/proc/self/oom_score_adj")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// The socket is never there with more rights than 0600: it is bound under a mask.
fn listen(dir: &Path) -> io::Result<OwnedFd> {
    let path = dir.join("shim.sock");
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mask = rustix::process::umask(Mode::from_bits_truncate(0o177));
    // A path beyond the 107 bytes of an address is reached through its directory.
    let short = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(dir, short, Mode::empty())?;
    let address = SocketAddrUnix::new(format!(
        "{}/shim.sock",
        longshore_sys::path::fd_path(&opened)
    ))?;
    let bound = rustix::net::bind(&socket, &address);
    rustix::process::umask(mask);
    bound?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}

/// Forks twice; `true` in the process that stays: no child of the agent, no leader of a session,
/// so nothing that it opens becomes its terminal.
fn leave() -> io::Result<bool> {
    // SAFETY: the process has one thread so far.
    if let Some(child) = unsafe { clone::fork_plain() }? {
        let child = rustix::process::Pid::from_raw(child);
        rustix::process::waitpid(child, rustix::process::WaitOptions::empty())?;
        return Ok(false);
    }
    proc::new_session()?;
    // SAFETY: as above.
    if unsafe { clone::fork_plain() }?.is_some() {
        clone::exit_now(0);
    }
    Ok(true)
}

fn settle() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    proc::set_child_subreaper()?;
    proc::set_dumpable(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_exactly_two_options() {
        let parse = |text: &str| parse_args(text.split_whitespace().map(str::to_owned));
        assert_eq!(
            parse("--sandbox a --dir /run/x"),
            Some(PathBuf::from("/run/x"))
        );
        for bad in [
            "",
            "--sandbox a",
            "--dir /run/x --sandbox a",
            "--sandbox a --dir run/x",
            "--sandbox a --dir /x y",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
