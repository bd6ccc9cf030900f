//! Namespaces: made, held by bind mounts, entered, let go.
//!
//! All work happens on a thread of its own that ends afterwards, so that no thread of the caller
//! ever changes its namespaces.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::check;
use crate::user::{Holder, IdMapping, outside};

/// What to make. A kind without a path is not unshared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewNamespaces {
    /// The user namespace that the others belong to; none leaves them with the caller's.
    pub user: Option<NewUser>,
    /// File over which the network namespace is bound.
    pub net: Option<PathBuf>,
    /// File over which the UTS namespace is bound.
    pub uts: Option<PathBuf>,
    /// File over which the IPC namespace is bound.
    pub ipc: Option<PathBuf>,
    /// Host name; only with `uts`.
    pub hostname: Option<String>,
    /// Kernel parameters, dotted (or slashed) name and value, written inside.
    pub sysctls: Vec<(String, String)>,
}

/// A user namespace to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewUser {
    /// File over which it is bound.
    pub path: PathBuf,
    /// Its users.
    pub uids: Vec<IdMapping>,
    /// Its groups.
    pub gids: Vec<IdMapping>,
}

/// A step that did not work.
#[derive(Debug)]
pub struct NsError {
    /// What was being done, e.g. `unshare`, `bind /run/x/ns/net`, `sysctl net.core.somaxconn`.
    pub step: String,
    /// The kernel's answer.
    pub source: io::Error,
}

impl std::fmt::Display for NsError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.step)
    }
}

impl std::error::Error for NsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

fn step<T, E: Into<io::Error>>(
    result: Result<T, E>,
    name: impl FnOnce() -> String,
) -> Result<T, NsError> {
    result.map_err(|error| NsError {
        step: name(),
        source: error.into(),
    })
}

/// Makes the namespaces, sets them up (host name, `lo` up, sysctls) and binds them on their
/// paths, whose files are made. After an error nothing of it remains.
///
/// # Errors
/// The step and the kernel's answer.
pub fn create(wish: &NewNamespaces) -> Result<(), NsError> {
    let result = on_own_thread(|| create_here(wish));
    if result.is_err() {
        for (_, path) in wish.paths() {
            // The first error is the one to tell; what is left is found by the caller's inventory.
            let _ = release(path);
        }
    }
    result
}

impl NewNamespaces {
    fn paths(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let user = self.user.as_ref().map(|user| ("user", user.path.as_path()));
        [("net", &self.net), ("uts", &self.uts), ("ipc", &self.ipc)]
            .into_iter()
            .filter_map(|(kind, path)| path.as_deref().map(|path| (kind, path)))
            .chain(user)
    }
}

fn create_here(wish: &NewNamespaces) -> Result<(), NsError> {
    let mut flags = UnshareFlags::empty();
    flags.set(UnshareFlags::NEWNET, wish.net.is_some());
    flags.set(UnshareFlags::NEWUTS, wish.uts.is_some());
    flags.set(UnshareFlags::NEWIPC, wish.ipc.is_some());
    let holder = match &wish.user {
        Some(user) => Some(hold(user, flags)?),
        None => {
            step(unshare(flags), || "unshare".into())?;
            None
        }
    };
    if let (Some(name), true) = (&wish.hostname, wish.uts.is_some()) {
        step(rustix::system::sethostname(name.as_bytes()), || {
            format!("sethostname {name}")
        })?;
    }
    if wish.net.is_some() {
        step(loopback_up(), || "bring lo up".into())?;
    }
    let root = wish.user.as_ref().and_then(|user| outside(&user.uids, 0));
    for (name, value) in &wish.sysctls {
        step(write_sysctl_as(root, name, value), || {
            format!("sysctl {name}")
        })?;
    }
    for (kind, path) in wish.paths() {
        let named = || format!("bind {}", path.display());
        if let Some(parent) = path.parent() {
            step(fs::create_dir_all(parent), named)?;
        }
        step(fs::File::create(path), named)?;
        let source = match (&holder, kind) {
            // This thread has stayed in its own.
            (Some(holder), "user") => holder.path(kind),
            _ => format!("/proc/thread-self/ns/{kind}"),
        };
        step(rustix::mount::mount_bind(source, path), named)?;
    }
    Ok(())
}

/// Makes a user namespace and the others below it, which the calling thread enters. A process of
/// many threads can neither make nor enter the first itself.
fn hold(user: &NewUser, others: UnshareFlags) -> Result<Holder, NsError> {
    let bits = libc::c_int::try_from(others.bits()).expect("flags of unshare fit");
    let holder = step(Holder::start(&user.uids, &user.gids, bits), || {
        "make a user namespace".into()
    })?;
    for (flag, kind, link) in [
        (UnshareFlags::NEWNET, "net", LinkNameSpaceType::Network),
        (
            UnshareFlags::NEWUTS,
            "uts",
            LinkNameSpaceType::HostNameAndNISDomainName,
        ),
        (
            UnshareFlags::NEWIPC,
            "ipc",
            LinkNameSpaceType::InterProcessCommunication,
        ),
    ] {
        if others.contains(flag) {
            let entered = holder.open(kind).and_then(|ns| {
                let ns = std::os::fd::AsFd::as_fd(&ns);
                Ok(rustix::thread::move_into_link_name_space(ns, Some(link))?)
            });
            step(entered, || format!("setns {kind}"))?;
        }
    }
    Ok(holder)
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    if flags.is_empty() {
        return Ok(());
    }
    let bits = libc::c_int::try_from(flags.bits()).expect("flags of unshare fit");
    // SAFETY: only namespaces of this thread change; no file table or memory is unshared, so no
    // descriptor or pointer of another thread is touched.
    check(libc::c_long::from(unsafe { libc::unshare(bits) }))?;
    Ok(())
}

/// Lets go of a namespace that [`create`] bound on `path`: unmounted and removed; absent is fine.
///
/// # Errors
/// What umount2(2) or unlink(2) answer, but not that there was nothing.
pub fn release(path: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    // A path may have been bound twice if a creator was killed between its steps.
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: there, but no mount point.
            Err(Errno::NOENT | Errno::INVAL | Errno::NOTDIR) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_file(path) {
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// Whether `path` is a bound namespace, rather than missing or the bare file.
pub fn is_bound(path: &Path) -> bool {
    /// `NSFS_MAGIC` of linux/magic.h.
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|found| u64::try_from(found.f_type) == Ok(NSFS_MAGIC))
}

/// Runs `work` inside the network namespace at `path`, on a thread that ends afterwards.
///
/// # Errors
/// What opening or entering the namespace answers; `work` reports on its own.
pub fn in_netns<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let ns = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    on_own_thread(move || {
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&ns),
            Some(LinkNameSpaceType::Network),
        )?;
        drop(ns);
        Ok(work())
    })
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Sets `lo` up in the calling thread's network namespace.
///
/// # Errors
/// What socket(2) or the ioctls answer.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = from.cast_signed();
    }
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: `request` is an `ifreq` with a NUL-terminated name, alive during the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request)
    }))?;
    // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags =
        flags | libc::c_short::try_from(libc::IFF_UP).expect("IFF_UP is 1");
    // SAFETY: as above.
    check(libc::c_long::from(unsafe {
        libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request)
    }))?;
    Ok(())
}

/// Path of a kernel parameter below `/proc/sys`; `None` for a name that would lead elsewhere.
///
/// As in sysctl(8), whichever of `.` and `/` comes first separates, and the other is part of a
/// name: `net.ipv4.conf.eth0/1.forwarding`.
pub fn sysctl_path(name: &str) -> Option<String> {
    let first = name.find(['.', '/'])?;
    let path: String = if name.as_bytes()[first] == b'.' {
        name.chars()
            .map(|letter| match letter {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    } else {
        name.to_owned()
    };
    path.split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..")
        .then_some(path)
}

/// Writes a kernel parameter through `/proc/sys`, in the calling thread's namespaces.
///
/// # Errors
/// `EINVAL` for a malformed name, and what open(2) and write(2) answer.
pub fn write_sysctl(name: &str, value: &str) -> io::Result<()> {
    let path = sysctl_path(name).ok_or(rustix::io::Errno::INVAL)?;
    fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/sys/{path}"))
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
}

/// As [`write_sysctl`]; a parameter that only `root` of its namespaces may write is written with
/// that effective id. For a thread that ends afterwards.
fn write_sysctl_as(root: Option<u32>, name: &str, value: &str) -> io::Result<()> {
    let root = match (write_sysctl(name, value), root) {
        (Err(error), Some(root)) if error.raw_os_error() == Some(libc::EACCES) => root,
        (result, _) => return result,
    };
    let become_user = |uid: u32| {
        let own = rustix::process::getuid();
        let uid = rustix::process::Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(own, uid, own)
    };
    become_user(root)?;
    let written = write_sysctl(name, value);
    become_user(0)?;
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sysctls_become_paths() {
        let cases = [
            ("net.ipv4.ip_forward", Some("net/ipv4/ip_forward")),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                Some("net/ipv4/conf/eth0.1/forwarding"),
            ),
            ("net/ipv4/ip_forward", Some("net/ipv4/ip_forward")),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                Some("net/ipv4/conf/eth0.1/forwarding"),
            ),
            ("kernel/../../etc/passwd", None),
            ("a..b", None),
            ("plain", None),
            ("", None),
        ];
        for (name, expected) in cases {
            assert_eq!(sysctl_path(name).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn namespaces_are_set_up_held_and_let_go() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = |kind: &str| dir.path().join("ns").join(kind);
        let mapping = IdMapping {
            inside: 0,
            outside: 100_000,
            length: 10,
        };
        let user = NewUser {
            path: path("user"),
            uids: vec![mapping],
            gids: vec![mapping],
        };
        for user in [None, Some(user)] {
            let owned = user.is_some();
            let wish = NewNamespaces {
                user,
                net: Some(path("net")),
                uts: Some(path("uts")),
                ipc: Some(path("ipc")),
                hostname: Some("held".into()),
                sysctls: vec![
                    ("net.ipv4.ip_unprivileged_port_start".into(), "7".into()),
                    ("kernel.shm_rmid_forced".into(), "1".into()),
                ],
            };
            create(&wish).expect("create");
            assert!(is_bound(&path("net")));
            assert_eq!(is_bound(&path("user")), owned);
            let (port, flags) = in_netns(&path("net"), || {
                (
                    fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start"),
                    fs::read_to_string("/proc/thread-self/net/dev"),
                )
            })
            .expect("enter");
            assert_eq!(port.expect("read").trim(), "7");
            assert!(flags.expect("read").contains("lo:"));
            for kind in ["net", "uts", "ipc", "user"] {
                release(&path(kind)).expect("release");
                release(&path(kind)).expect("absent is fine");
                assert!(!path(kind).exists());
            }
        }
    }

    #[test]
    fn a_failed_creation_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("net");
        let error = create(&NewNamespaces {
            net: Some(path.clone()),
            sysctls: vec![("net.no_such_thing".into(), "1".into())],
            ..NewNamespaces::default()
        })
        .expect_err("unknown sysctl");
        assert_eq!(error.step, "sysctl net.no_such_thing");
        assert!(!path.exists());
    }
}
