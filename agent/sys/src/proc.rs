//! The calling process: what it passes on, who may look into it, how it ends.

use std::io;

use crate::check;

fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take numbers only.
    check(libc::c_long::from(unsafe {
        libc::prctl(option, value, 0, 0, 0)
    }))?;
    Ok(())
}

/// Hides the process from ptrace(2) and its `/proc` entries from its own user.
///
/// # Errors
/// What prctl(2) answers.
pub fn set_dumpable(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, libc::c_ulong::from(on))
}

/// Orphans below this process become its children.
///
/// # Errors
/// What prctl(2) answers.
pub fn set_child_subreaper() -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1)
}

/// No execve grants more than the caller has, for good.
///
/// # Errors
/// What prctl(2) answers.
pub fn set_no_new_privs() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// Keeps the permitted set over a change away from uid 0, until the next execve.
///
/// # Errors
/// What prctl(2) answers.
pub fn set_keep_caps(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, libc::c_ulong::from(on))
}

/// Sets the name that `ps` shows, at most 15 bytes of it.
///
/// # Errors
/// What prctl(2) answers.
pub fn set_name(name: &std::ffi::CStr) -> io::Result<()> {
    Ok(rustix::thread::set_name(name)?)
}

/// Puts every signal back to its default action and unblocks all: what a program expects to start with.
pub fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no code. The kernel refuses the two that cannot be changed and
        // the C library refuses its own two, which it has not touched in a single-threaded process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Blocks `signals` for the calling thread and returns a descriptor that delivers them,
/// non-blocking and close-on-exec.
///
/// # Errors
/// What signalfd(2) answers.
pub fn signal_fd(signals: &[i32]) -> io::Result<std::os::fd::OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset, and outlives the calls that read it.
    let raw = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        check(libc::c_long::from(libc::sigprocmask(
            libc::SIG_BLOCK,
            &raw const set,
            std::ptr::null_mut(),
        )))?;
        check(libc::c_long::from(libc::signalfd(
            -1,
            &raw const set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        )))?
    };
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { crate::fd::adopt(i32::try_from(raw).expect("descriptors are small")) })
}

/// Makes this process the leader of a new session, without a terminal.
///
/// # Errors
/// `EPERM` for a process group leader.
pub fn new_session() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// Makes `terminal` the controlling terminal of the session that the caller leads.
///
/// # Errors
/// What `TIOCSCTTY` answers.
pub fn set_controlling_terminal(terminal: impl std::os::fd::AsFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: TIOCSCTTY takes a number.
    check(libc::c_long::from(unsafe {
        libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0)
    }))?;
    Ok(())
}

/// Replaces the program; returns only the reason why that failed.
///
/// Strings are NUL-terminated by their type.
pub fn execve(
    path: &std::ffi::CStr,
    args: &[std::ffi::CString],
    env: &[std::ffi::CString],
) -> io::Error {
    let pointers = |list: &[std::ffi::CString]| {
        list.iter()
            .map(|text| text.as_ptr())
            .chain([std::ptr::null()])
            .collect::<Vec<_>>()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with null and point to strings that live until the call returns.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Sets a resource limit (`RLIMIT_*` number) of the calling process.
///
/// # Errors
/// What prlimit64(2) answers.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` outlives the call; the old value is not asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            &raw const limit,
            std::ptr::null::<libc::rlimit64>(),
        )
    })?;
    Ok(())
}

/// A resource limit (`RLIMIT_*` number) of the calling process: soft, hard.
///
/// # Errors
/// What prlimit64(2) answers.
pub fn rlimit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` outlives the call; no new value is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            std::ptr::null::<libc::rlimit64>(),
            &raw mut limit,
        )
    })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Sets the OOM score adjustment; one below what the caller may set becomes the lowest it may.
///
/// # Errors
/// What reading or writing `/proc/self/oom_score_adj` answers, but not `EACCES`.
pub fn set_oom_score_adj(value: i32) -> io::Result<()> {
    const PATH: &str = "/proc/self/oom_score_adj";
    match std::fs::write(PATH, value.to_string()) {
        // Lowering needs CAP_SYS_RESOURCE, and what we have is already above the wish.
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => Ok(()),
        result => result,
    }
}

/// Hands freed heap pages back to the kernel.
pub fn trim_heap() {
    // SAFETY: malloc_trim may be called at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets the heap give memory back early and keeps it in one arena: for processes that are mostly idle.
pub fn keep_heap_small() {
    // SAFETY: mallopt takes numbers.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 16 << 10);
        libc::mallopt(libc::M_TOP_PAD, 0);
    }
}

/// Bounds the number of malloc arenas: each thread that allocates may otherwise keep its own.
pub fn bound_heap_arenas(arenas: i32) {
    // SAFETY: mallopt takes numbers.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, arenas);
    }
}

/// Children that end vanish without being waited for.
pub fn ignore_children() {
    // SAFETY: SIG_IGN installs no code.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// This signal comes when the parent's thread that made this process ends.
///
/// # Errors
/// What prctl(2) answers.
pub fn set_parent_death_signal(signal: i32) -> io::Result<()> {
    prctl(
        libc::PR_SET_PDEATHSIG,
        libc::c_ulong::from(signal.unsigned_abs()),
    )
}

/// Puts the calling thread into a pid namespace as far as its future children are concerned.
///
/// # Errors
/// What setns(2) answers.
pub fn set_children_pid_namespace(namespace: impl std::os::fd::AsFd) -> io::Result<()> {
    use rustix::thread::LinkNameSpaceType;
    rustix::thread::move_into_link_name_space(
        namespace.as_fd(),
        Some(LinkNameSpaceType::ProcessID),
    )?;
    Ok(())
}
