//! After clone, before execve of an OCI runtime: what it sees of the host, and what it does not.
//!
//! ```text
//!   session, cgroup of the freezer
//!   clone the sources that the runtime can't take by itself
//!   mounts slave, hide hierarchies
//!   create only: root, staged sources, pid namespace, config.json
//!   stdio, execve
//! ```
//! Each call has a mount namespace of its own, from which the runtime clones the container's: the
//! host sees none of these mounts, and they end with the last process in them, however it ends.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use longshore_sys::mount::{self, PropagationFlags};
use longshore_sys::{fd, path, proc};
use rustix::fs::{FileType, Mode, OFlags};

use super::{
    ChildStdio, NeverReturn, Step, at, close_foreign_fds, end, mounts, root, settings, user,
};
use crate::wire::{HiddenHierarchy, Mount, ProcessPlan, Rootfs, Staged, UserNamespace};

/// Where runtimes find the helpers that they call themselves.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Enough for a few directories and files.
const DECOY_BYTES: u64 = 256 << 10;

/// A call of a runtime.
pub(crate) struct Invocation<'a> {
    pub(crate) program: &'a str,
    pub(crate) args: &'a [String],
    pub(crate) hidden: &'a [HiddenHierarchy],
    /// File of the freezer's cgroup, or of an exec's leaf in it, that all it starts shall be in.
    pub(crate) freezer_tasks: Option<String>,
    pub(crate) oom_score_adj: i32,
    pub(crate) stdio: &'a ChildStdio,
    /// Descriptors that the arguments name by number.
    pub(crate) named: &'a [BorrowedFd<'a>],
    pub(crate) bundle: Option<Bundle<'a>>,
    /// Who shall own its stdio, if the container has a user namespace.
    pub(crate) user: Option<(&'a UserNamespace, &'a ProcessPlan)>,
}

/// What `create` needs.
pub(crate) struct Bundle<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) config: &'a [u8],
    pub(crate) rootfs: &'a Rootfs,
    pub(crate) staged: &'a [Staged],
    pub(crate) pid_ns: Option<BorrowedFd<'a>>,
}

/// Becomes the runtime; called in the child, which has a mount namespace of its own.
pub(crate) fn run(invocation: &Invocation<'_>, channel: &OwnedFd) -> ! {
    let _guard = NeverReturn;
    let pid_ns = invocation
        .bundle
        .as_ref()
        .and_then(|bundle| bundle.pid_ns)
        .map(|pid_ns| pid_ns.as_raw_fd());
    let named = invocation.named.iter().map(|fd| fd.as_raw_fd());
    let keep = invocation.stdio.raw().chain(named).chain(pid_ns);
    let result = close_foreign_fds(keep.chain([channel.as_raw_fd()]))
        .and_then(|()| become_runtime(invocation));
    end(channel, result)
}

fn become_runtime(invocation: &Invocation<'_>) -> Step<Infallible> {
    proc::reset_signals();
    rustix::process::umask(Mode::from_bits_truncate(0o022));
    // A group of its own, to be killed by.
    at(proc::new_session(), || "setsid".into())?;
    // A runtime that builds on without its shim would leave a container to nobody.
    at(proc::set_parent_death_signal(libc::SIGKILL), || {
        "parent death signal".into()
    })?;
    if let Some(tasks) = &invocation.freezer_tasks {
        at(fs::write(tasks, "0"), || format!("join {tasks}"))?;
    }
    at(proc::set_oom_score_adj(invocation.oom_score_adj), || {
        "oom_score_adj".into()
    })?;
    let null = at(
        rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()),
        || "open /dev/null".into(),
    )?;
    mount_all(invocation)?;
    let stdio = invocation.stdio;
    if let Some((user, process)) = invocation.user {
        user::give_stdio(user, process, stdio);
    }
    let given = [&stdio.stdin, &stdio.stdout, &stdio.stderr];
    at(
        settings::replace_stdio(given.map(|fd| fd.as_ref().unwrap_or(&null))),
        || "dup2".into(),
    )?;
    for named in invocation.named {
        at(fd::set_cloexec(named, false), || "fcntl".into())?;
    }
    execute(invocation)
}

fn mount_all(invocation: &Invocation<'_>) -> Step<()> {
    let bundle = invocation.bundle.as_ref();
    // Cloned while they are still peers of the host's: a clone of a slave could not spread back.
    let staged: Vec<Mount> = bundle
        .iter()
        .flat_map(|bundle| bundle.staged)
        .map(|staged| staged.mount.clone())
        .collect();
    let user_ns = bundle
        .and(invocation.user)
        .map(|(user, _)| user::open(user))
        .transpose()?;
    let user_ns = user_ns.as_ref().map(AsFd::as_fd);
    let mut sources = mounts::open_sources(&staged, user_ns)?;
    at(
        mount::set_propagation("/", PropagationFlags::DOWNSTREAM | PropagationFlags::REC),
        || "make mounts slave".into(),
    )?;
    for hidden in invocation.hidden {
        at(hide(hidden), || format!("hide {}", hidden.mount))?;
    }
    let Some(bundle) = bundle else {
        return Ok(());
    };
    if let Some(user_ns) = user_ns {
        user::map_layers(bundle.rootfs, user_ns)?;
    }
    mounts::open_overlays(&staged, bundle.rootfs, &mut sources)?;
    root::attach_root(bundle.rootfs, &root::overlay(bundle.rootfs)?)?;
    let place = bundle.dir.join("mounts");
    for (staged, tree) in bundle.staged.iter().zip(sources) {
        let put = tree
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
            .and_then(|tree| stage(&place, &staged.name, &tree));
        at(put, || format!("stage {}", staged.mount.source))?;
    }
    if let Some(pid_ns) = bundle.pid_ns {
        at(bind_pid_ns(bundle.dir, pid_ns), || {
            "bind pid namespace".into()
        })?;
    }
    at(
        write_new(&bundle.dir.join("config.json"), bundle.config),
        || "write config.json".into(),
    )
}

/// Puts a directory in the place of a hierarchy in which a runtime may make and write what it
/// likes. Runtimes that look whether the container is frozen read that it is not.
fn hide(hidden: &HiddenHierarchy) -> io::Result<()> {
    let mount = Path::new(&hidden.mount);
    rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH)?;
    mount::tmpfs(mount, DECOY_BYTES, 0o755)?;
    fs::create_dir_all(&hidden.dir)?;
    fs::write(Path::new(&hidden.dir).join("freezer.state"), "THAWED\n")
}

fn stage(dir: &Path, name: &str, tree: &OwnedFd) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let place = dir.join(name);
    match FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode) {
        FileType::Directory => fs::create_dir(&place)?,
        _ => write_new(&place, b"")?,
    }
    let target = rustix::fs::open(&place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(tree, &target)
}

fn bind_pid_ns(dir: &Path, pid_ns: BorrowedFd<'_>) -> io::Result<()> {
    let place = dir.join("pidns");
    write_new(&place, b"")?;
    mount::bind(Path::new(&path::fd_path(pid_ns)), &place, false)
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)
}

fn execute(invocation: &Invocation<'_>) -> Step<Infallible> {
    let text = |text: &str| at(CString::new(text), || "argument".into());
    let program = text(invocation.program)?;
    let args = std::iter::once(&invocation.program)
        .copied()
        .chain(invocation.args.iter().map(String::as_str))
        .map(text)
        .collect::<Step<Vec<_>>>()?;
    let error = proc::execve(&program, &args, &[text(PATH)?]);
    Err(super::failure(
        &error,
        format!("execve {}", invocation.program),
    ))
}
