//! The seccomp profile of containers that ask for the runtime's default.
//!
//! An allow-list: what is not named answers EPERM, and never kills. It follows the contract that
//! images are built against: everything ordinary programs use; nothing that loads code into the
//! kernel, sets its clocks, mounts, traces below the kernel's own checks or enters namespaces.
//! Groups open with the capability that the kernel asks for anyway. io_uring stays closed: it runs
//! system calls that no filter sees.

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall,
    LinuxSyscallBuilder,
};

/// `CLONE_NEW*` as clone(2) takes them: mount, cgroup, uts, ipc, user, pid, network.
const NAMESPACES: u64 = 0x7e02_0000;
/// And `CLONE_NEWTIME`, whose bit only unshare(2) takes.
const NAMESPACES_AND_TIME: u64 = NAMESPACES | 0x80;
/// Values of personality(2) that change nothing dangerous: Linux, Linux32, each with the old
/// version number, and the question.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// Reaches the hypervisor past every network policy.
const AF_VSOCK: u64 = 40;

const ENOSYS: u32 = 38;
const EPERM: u32 = 1;

/// The default profile for a container whose bounding set is `capabilities`.
pub fn default_profile(capabilities: &Capabilities) -> LinuxSeccomp {
    let may = |capability| capabilities.contains(&capability);
    let mut rules = vec![
        allow(FILES),
        allow(FILE_METADATA),
        allow(EVENTS),
        allow(MEMORY),
        allow(PROCESSES),
        allow(IDENTITY),
        allow(SCHEDULING),
        allow(SIGNALS),
        allow(TIME),
        allow(IPC),
        allow(SOCKETS),
        allow(SANDBOXING),
        allow(MACHINE),
        allow_if("socket", 0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None),
    ];
    for value in PERSONALITIES {
        rules.push(allow_if(
            "personality",
            0,
            LinuxSeccompOperator::ScmpCmpEq,
            value,
            None,
        ));
    }
    for (capability, names) in GATED {
        if may(*capability) {
            rules.push(allow(names));
        }
    }
    if may(Capability::SysAdmin) {
        rules.push(allow("clone clone3 unshare"));
    } else {
        let none_of = LinuxSeccompOperator::ScmpCmpMaskedEq;
        rules.push(allow_if("clone", 0, none_of, NAMESPACES, Some(0)));
        rules.push(allow_if(
            "unshare",
            0,
            none_of,
            NAMESPACES_AND_TIME,
            Some(0),
        ));
        // Its flags are in memory, where no filter looks; libc falls back to clone on ENOSYS.
        rules.push(rule(
            "clone3",
            LinuxSeccompAction::ScmpActErrno,
            Some(ENOSYS),
            None,
        ));
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(architectures())
        .syscalls(rules)
        .build()
        .expect("all required fields are set")
}

fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    }
}

fn allow(names: &str) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow, None, None)
}

fn allow_if(
    name: &str,
    index: usize,
    op: LinuxSeccompOperator,
    value: u64,
    value_two: Option<u64>,
) -> LinuxSyscall {
    let mut condition = LinuxSeccompArgBuilder::default()
        .index(index)
        .op(op)
        .value(value);
    if let Some(value_two) = value_two {
        condition = condition.value_two(value_two);
    }
    let condition = condition.build().expect("all required fields are set");
    rule(
        name,
        LinuxSeccompAction::ScmpActAllow,
        None,
        Some(condition),
    )
}

fn rule(
    names: &str,
    action: LinuxSeccompAction,
    errno: Option<u32>,
    condition: Option<LinuxSeccompArg>,
) -> LinuxSyscall {
    let names: Vec<_> = names.split_whitespace().map(str::to_owned).collect();
    let mut rule = LinuxSyscallBuilder::default().names(names).action(action);
    if let Some(errno) = errno {
        rule = rule.errno_ret(errno);
    }
    if let Some(condition) = condition {
        rule = rule.args(vec![condition]);
    }
    rule.build().expect("all required fields are set")
}

// Names of system calls, separated by blanks.

/// Opening, reading, writing, naming.
const FILES: &str = "\
    _llseek access arm_fadvise64_64 arm_sync_file_range chdir close close_range \
    copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fadvise64_64 \
    fallocate fchdir fcntl fcntl64 fdatasync flock fsync ftruncate ftruncate64 getcwd \
    getdents getdents64 ioctl link linkat lseek mkdir mkdirat mknod mknodat open openat \
    openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead \
    readlink readlinkat readv rename renameat renameat2 rmdir sendfile sendfile64 splice \
    symlink symlinkat sync sync_file_range sync_file_range2 syncfs tee truncate \
    truncate64 unlink unlinkat vmsplice write writev";

/// Modes, owners, times, extended attributes, what is mounted.
const FILE_METADATA: &str = "\
    cachestat chmod chown chown32 fchmod fchmodat fchmodat2 fchown fchown32 fchownat \
    fgetxattr flistxattr fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs \
    fstatfs64 futimesat getxattr getxattrat lchown lchown32 lgetxattr listmount \
    listxattr listxattrat llistxattr lremovexattr lsetxattr lstat lstat64 \
    name_to_handle_at newfstatat removexattr removexattrat setxattr setxattrat stat \
    stat64 statfs statfs64 statmount statx umask utime utimensat utimensat_time64 utimes";

/// Waiting for descriptors; asynchronous I/O of the older kind.
const EVENTS: &str = "\
    _newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait \
    epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 fanotify_mark \
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy \
    io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit poll ppoll \
    ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4 timerfd_create \
    timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64";

const MEMORY: &str = "\
    brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock \
    mlock2 mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap \
    pkey_alloc pkey_free pkey_mprotect remap_file_pages";

const PROCESSES: &str = "\
    execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait \
    futex_waitv futex_wake get_robust_list get_thread_area getpgid getpgrp getpid \
    getppid getsid gettid kill pidfd_open pidfd_send_signal prctl process_mrelease \
    ptrace restart_syscall rseq set_robust_list set_thread_area set_tid_address setpgid \
    setsid tgkill tkill vfork wait4 waitid waitpid";

/// Users, groups, capabilities.
const IDENTITY: &str = "\
    capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups \
    getgroups32 getresgid getresgid32 getresuid getresuid32 getuid getuid32 setfsgid \
    setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setregid \
    setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setuid \
    setuid32";

/// Priorities and limits.
const SCHEDULING: &str = "\
    getcpu getpriority getrlimit getrusage ioprio_get ioprio_set prlimit64 \
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr \
    sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 \
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield \
    setpriority setrlimit ugetrlimit";

const SIGNALS: &str = "\
    pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn \
    rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaction \
    sigaltstack signal sigpending sigprocmask sigreturn sigsuspend";

/// Reading clocks, sleeping, timers. The kernel itself guards what adjusts a clock.
const TIME: &str = "\
    adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 \
    clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer \
    gettimeofday nanosleep setitimer time timer_create timer_delete timer_getoverrun \
    timer_gettime timer_gettime64 timer_settime timer_settime64 times";

/// System V and POSIX message queues, semaphores, shared memory.
const IPC: &str = "\
    ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 \
    mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget \
    semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget";

/// All but `socket` itself, which has a condition.
const SOCKETS: &str = "\
    accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom \
    recvmmsg recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown \
    socketcall socketpair";

/// Giving up rights.
const SANDBOXING: &str = "landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp";

/// The machine, and what some architectures need.
const MACHINE: &str = "arch_prctl breakpoint cacheflush getrandom modify_ldt set_tls sysinfo uname";

/// Opened by a capability.
const GATED: &[(Capability, &str)] = &[
    (Capability::DacReadSearch, "open_by_handle_at"),
    (
        Capability::SysAdmin,
        "\
         bpf fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount \
         mount_setattr move_mount open_tree open_tree_attr perf_event_open quotactl \
         quotactl_fd setdomainname sethostname setns syslog umount umount2",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (
        Capability::SysModule,
        "delete_module finit_module init_module",
    ),
    (Capability::SysPacct, "acct"),
    (
        Capability::SysPtrace,
        "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev",
    ),
    (Capability::SysRawio, "ioperm iopl"),
    (
        Capability::SysTime,
        "clock_settime clock_settime64 settimeofday stime",
    ),
    (Capability::SysTtyConfig, "vhangup"),
    (
        Capability::SysNice,
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    (Capability::Syslog, "syslog"),
    (Capability::Bpf, "bpf"),
    (Capability::Perfmon, "perf_event_open"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn allowed(capabilities: &[Capability]) -> BTreeSet<String> {
        default_profile(&capabilities.iter().copied().collect())
            .syscalls()
            .iter()
            .flatten()
            .filter(|rule| rule.action() == LinuxSeccompAction::ScmpActAllow)
            .flat_map(|rule| rule.names().clone())
            .collect()
    }

    #[test]
    fn no_name_is_listed_twice_or_in_two_groups() {
        let groups = [
            FILES,
            FILE_METADATA,
            EVENTS,
            MEMORY,
            PROCESSES,
            IDENTITY,
            SCHEDULING,
            SIGNALS,
            TIME,
            IPC,
            SOCKETS,
            SANDBOXING,
            MACHINE,
        ];
        let mut seen = BTreeSet::new();
        for name in groups.iter().flat_map(|names| names.split_whitespace()) {
            assert!(seen.insert(name), "{name} twice");
        }
        for (_, names) in GATED {
            for name in names.split_whitespace() {
                assert!(!seen.contains(name), "{name} is gated and free");
            }
        }
    }

    #[test]
    fn capabilities_open_their_groups_and_nothing_else() {
        let plain = allowed(&[]);
        for denied in [
            "mount",
            "setns",
            "bpf",
            "reboot",
            "chroot",
            "clone3",
            "init_module",
            "io_uring_setup",
            "keyctl",
            "kexec_load",
            "userfaultfd",
            "open_by_handle_at",
            "mbind",
            "syslog",
        ] {
            assert!(!plain.contains(denied), "{denied} without any capability");
        }
        for (capability, names) in GATED {
            let with = allowed(&[*capability]);
            for name in names.split_whitespace() {
                assert!(with.contains(name), "{name} with {capability}");
            }
            if *capability != Capability::SysAdmin {
                let opened: BTreeSet<_> = with.difference(&plain).map(String::as_str).collect();
                assert_eq!(opened, names.split_whitespace().collect(), "{capability}");
            }
        }
        assert!(allowed(&[Capability::SysAdmin]).contains("clone3"));
    }
}
