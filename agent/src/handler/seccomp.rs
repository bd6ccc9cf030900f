//! Seccomp profiles: compiled once, by libseccomp, into a program that the shim only loads.
//!
//! The program is a binary tree (optimisation level 2): a linear one of the default profile costs
//! 0.6 ms more per exec to load. Compiling costs 14 ms of CPU, so programs are kept by profile.
//!
//! System calls that are newer than any that a profile names answer ENOSYS instead of what the
//! profile denies with: its author did not know them, and a libc falls back on ENOSYS only.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek},
    sync::{Arc, Mutex},
};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use rustix::fs::MemfdFlags;
use sha2::{Digest as _, Sha256};

pub use super::default_profile::default_profile;

use super::HandlerError;

/// A compiled profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Classic BPF, eight bytes an instruction in host order.
    pub instructions: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

/// Compiled profiles by their content.
#[derive(Debug, Default)]
pub struct Cache {
    programs: Mutex<HashMap<[u8; 32], Arc<Program>>>,
}

/// Profiles of a node are few; past this many the cache starts over.
const CACHED: usize = 64;

impl Cache {
    /// Compiles a profile, or returns it as compiled before. Blocks for the time of compiling.
    pub fn compile(&self, profile: &LinuxSeccomp) -> Result<Arc<Program>, HandlerError> {
        let key = key(profile)?;
        if let Some(known) = self.known(&key) {
            return Ok(known);
        }
        let program = Arc::new(compile(profile)?);
        let mut programs = self
            .programs
            .lock()
            .expect("no panic while this lock is held");
        if programs.len() >= CACHED {
            programs.clear();
        }
        Ok(programs.entry(key).or_insert(program).clone())
    }

    /// A profile that was compiled before.
    pub fn compiled(&self, profile: &LinuxSeccomp) -> Option<Arc<Program>> {
        self.known(&key(profile).ok()?)
    }

    fn known(&self, key: &[u8; 32]) -> Option<Arc<Program>> {
        let programs = self
            .programs
            .lock()
            .expect("no panic while this lock is held");
        programs.get(key).cloned()
    }
}

fn key(profile: &LinuxSeccomp) -> Result<[u8; 32], HandlerError> {
    let json = serde_json::to_vec(profile).map_err(|e| failed("write", &e))?;
    Ok(Sha256::digest(json).into())
}

/// Compiles a profile.
///
/// # Errors
/// `Seccomp` for what cannot be meant; names that this libseccomp does not know are skipped.
pub fn compile(profile: &LinuxSeccomp) -> Result<Program, HandlerError> {
    if profile.listener_path().is_some() {
        return Err(HandlerError::Unsupported {
            feature: "seccomp notification (listenerPath)".to_owned(),
        });
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(|e| failed("default action", &e))?;
    filter
        .set_ctl_optimize(2)
        .map_err(|e| failed("optimise", &e))?;
    // no_new_privs is the engine's to set; libseccomp's own loader is never used.
    for arch in architectures(profile)? {
        filter
            .add_arch(arch)
            .map_err(|e| failed("architecture", &e))?;
    }
    let mut newest = 0;
    for rule in profile.syscalls().iter().flatten() {
        add_rule(&mut filter, rule, default, &mut newest)?;
    }
    let mut instructions = export(&filter)?;
    let denies_unknown = !matches!(default, ScmpAction::Allow | ScmpAction::Log);
    if denies_unknown && newest > 0 {
        let mut with_check = unknown_to_enosys(newest);
        with_check.append(&mut instructions);
        instructions = with_check;
    }
    Ok(Program {
        instructions,
        flags: flags(profile)?,
    })
}

fn add_rule(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
    newest: &mut i32,
) -> Result<(), HandlerError> {
    let action = action(rule.action(), rule.errno_ret())?;
    let compares = compares(rule.args().as_deref().unwrap_or_default())?;
    for name in rule.names() {
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        *newest = (*newest).max(syscall.as_raw_syscall());
        // What the default says already, libseccomp refuses to be told.
        if action == default {
            continue;
        }
        for alternative in &compares {
            filter
                .add_rule_conditional(action, syscall, alternative)
                .map_err(|e| failed(name, &e))?;
        }
    }
    Ok(())
}

/// Conditions of a rule. All must hold, unless one argument has several: then any of them.
fn compares(args: &[LinuxSeccompArg]) -> Result<Vec<Vec<ScmpArgCompare>>, HandlerError> {
    let all = args.iter().map(compare).collect::<Result<Vec<_>, _>>()?;
    let repeats = args
        .iter()
        .enumerate()
        .any(|(at, arg)| args[..at].iter().any(|other| other.index() == arg.index()));
    Ok(if repeats {
        all.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![all]
    })
}

fn compare(arg: &LinuxSeccompArg) -> Result<ScmpArgCompare, HandlerError> {
    let index = u32::try_from(arg.index())
        .ok()
        .filter(|&index| index < 6)
        .ok_or_else(|| HandlerError::Seccomp {
            reason: format!("argument {} of a system call", arg.index()),
        })?;
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // OCI has the mask first and the value to equal second.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(arg.value()),
            arg.value_two().unwrap_or(0),
        ),
    };
    Ok(ScmpArgCompare::new(index, operator, value))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, HandlerError> {
    const EPERM: i32 = 1;
    let number = |errno: Option<u32>| {
        errno.map_or(Ok(EPERM), |errno| {
            i32::try_from(errno)
                .ok()
                .filter(|&errno| errno < 4096)
                .ok_or_else(|| HandlerError::Seccomp {
                    reason: format!("error number {errno}"),
                })
        })
    };
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(number(errno)?),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(number(errno)?).expect("below 4096"))
        }
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(HandlerError::Unsupported {
                feature: "seccomp notification".to_owned(),
            });
        }
    })
}

/// Architectures of the profile; the native one is always in the filter.
fn architectures(profile: &LinuxSeccomp) -> Result<Vec<ScmpArch>, HandlerError> {
    let native = ScmpArch::native();
    let mut wanted = Vec::new();
    for arch in profile.architectures().iter().flatten() {
        let arch = match arch {
            Arch::ScmpArchNative => native,
            Arch::ScmpArchX86 => ScmpArch::X86,
            Arch::ScmpArchX86_64 => ScmpArch::X8664,
            Arch::ScmpArchX32 => ScmpArch::X32,
            Arch::ScmpArchArm => ScmpArch::Arm,
            Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
            Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
            // Machines that the agent is not built for.
            _ => continue,
        };
        // Profiles list all that there are; a filter takes only those of one machine.
        if related(native, arch) && arch != native && !wanted.contains(&arch) {
            wanted.push(arch);
        }
    }
    Ok(wanted)
}

/// Programs of `arch` can run on a kernel of `native`.
fn related(native: ScmpArch, arch: ScmpArch) -> bool {
    match native {
        ScmpArch::X8664 => matches!(arch, ScmpArch::X8664 | ScmpArch::X86 | ScmpArch::X32),
        ScmpArch::Aarch64 => matches!(arch, ScmpArch::Aarch64 | ScmpArch::Arm),
        native => native == arch,
    }
}

fn flags(profile: &LinuxSeccomp) -> Result<u32, HandlerError> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            // The engine's child has one thread, and so there is nothing to synchronise.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 1 << 1,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 1 << 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(HandlerError::Unsupported {
                    feature: "seccomp notification (wait killable)".to_owned(),
                });
            }
        };
    }
    Ok(flags)
}

/// Reads the program out through a memory file: libseccomp 2.5 has no other way.
fn export(filter: &ScmpFilterContext) -> Result<Vec<u8>, HandlerError> {
    let read = || -> std::io::Result<(File, Vec<u8>)> {
        let fd = rustix::fs::memfd_create("seccomp", MemfdFlags::CLOEXEC)?;
        Ok((File::from(fd), Vec::new()))
    };
    let (mut file, mut program) = read().map_err(|e| failed("memory file", &e))?;
    filter
        .export_bpf(&file)
        .map_err(|e| failed("compile", &e))?;
    file.rewind()
        .and_then(|()| file.read_to_end(&mut program))
        .map_err(|e| failed("memory file", &e))?;
    if program.is_empty() || program.len() % 8 != 0 || program.len() / 8 > 4096 - 8 {
        return Err(HandlerError::Seccomp {
            reason: format!("program of {} bytes", program.len()),
        });
    }
    Ok(program)
}

/// A program's first instructions: numbers above `newest`, of the native architecture, are ENOSYS.
fn unknown_to_enosys(newest: i32) -> Vec<u8> {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const NUMBER_AT: u32 = 0; // offsetof(struct seccomp_data, nr)
    const ARCH_AT: u32 = 4; // offsetof(struct seccomp_data, arch)
    const X32_BIT: u32 = 0x4000_0000;
    const ERRNO: u32 = 0x0005_0000; // SECCOMP_RET_ERRNO
    const ENOSYS: u32 = 38;
    const NATIVE: u32 = if cfg!(target_arch = "aarch64") {
        0xc000_00b7 // AUDIT_ARCH_AARCH64
    } else {
        0xc000_003e // AUDIT_ARCH_X86_64
    };
    let newest = u32::try_from(newest).expect("numbers of known system calls are not negative");
    [
        (LOAD, 0, 0, ARCH_AT),
        (EQUAL, 0, 4, NATIVE),
        (LOAD, 0, 0, NUMBER_AT),
        (GREATER, 2, 0, X32_BIT - 1),
        (GREATER, 0, 1, newest),
        (RETURN, 0, 0, ERRNO | ENOSYS),
    ]
    .into_iter()
    .flat_map(|(code, jt, jf, k): (u16, u8, u8, u32)| {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&code.to_ne_bytes());
        bytes[2] = jt;
        bytes[3] = jf;
        bytes[4..].copy_from_slice(&k.to_ne_bytes());
        bytes
    })
    .collect()
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> HandlerError {
    HandlerError::Seccomp {
        reason: format!("{what}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use serde_json::json;

    use super::*;

    const NATIVE: u32 = if cfg!(target_arch = "aarch64") {
        0xc000_00b7
    } else {
        0xc000_003e
    };
    const ALLOW: u32 = 0x7fff_0000;
    const LOG: u32 = 0x7ffc_0000;
    const TRAP: u32 = 0x0003_0000;
    const KILL_PROCESS: u32 = 0x8000_0000;
    const EPERM: u32 = 0x0005_0001;
    const ENOSYS: u32 = 0x0005_0026;

    /// Runs a program as the kernel does, on one system call.
    fn decide(program: &[u8], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend_from_slice(&number.to_ne_bytes());
        data.extend_from_slice(&arch.to_ne_bytes());
        data.extend_from_slice(&[0; 8]);
        for arg in args {
            data.extend_from_slice(&arg.to_ne_bytes());
        }
        let word = |at: u32| {
            let at = at as usize;
            u32::from_ne_bytes(data[at..at + 4].try_into().expect("four bytes"))
        };
        let (mut accumulator, mut at) = (0_u32, 0_usize);
        loop {
            let code = &program[at * 8..at * 8 + 8];
            let k = u32::from_ne_bytes(code[4..].try_into().expect("four bytes"));
            let jump = |holds: bool| usize::from(if holds { code[2] } else { code[3] });
            at += 1;
            match u16::from_ne_bytes([code[0], code[1]]) {
                0x06 => return k,
                0x20 => accumulator = word(k),
                0x54 => accumulator &= k,
                0x05 => at += k as usize,
                0x15 => at += jump(accumulator == k),
                0x25 => at += jump(accumulator > k),
                0x35 => at += jump(accumulator >= k),
                0x45 => at += jump(accumulator & k != 0),
                other => panic!("instruction {other:#x} is not known here"),
            }
        }
    }

    fn number(name: &str) -> u32 {
        let number = ScmpSyscall::from_name(name)
            .expect("a system call")
            .as_raw_syscall();
        u32::try_from(number).expect("of this architecture")
    }

    fn on(program: &Program, name: &str, first: u64) -> u32 {
        decide(
            &program.instructions,
            NATIVE,
            number(name),
            [first, 0, 0, 0, 0, 0],
        )
    }

    fn profile(json: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(json).expect("the test writes valid OCI JSON")
    }

    #[test]
    fn the_default_profile_allows_denies_and_looks_at_arguments() {
        let default = |capabilities: &[oci_spec::runtime::Capability]| {
            compile(&default_profile(&capabilities.iter().copied().collect())).expect("compiles")
        };
        let plain = default(&[]);
        for (name, first, expected) in [
            ("read", 0, ALLOW),
            ("execve", 0, ALLOW),
            ("ptrace", 0, ALLOW),
            ("mount", 0, EPERM),
            ("setns", 0, EPERM),
            ("keyctl", 0, EPERM),
            ("bpf", 0, EPERM),
            ("io_uring_setup", 0, EPERM),
            ("userfaultfd", 0, EPERM),
            ("kexec_load", 0, EPERM),
            ("clone", 0x11, ALLOW),
            ("clone", 0x1000_0011, EPERM),
            ("clone", 0x0002_0011, EPERM),
            ("clone3", 0, ENOSYS),
            ("unshare", 0x400, ALLOW),
            ("unshare", 0x4000_0000, EPERM),
            ("unshare", 0x80, EPERM),
            ("socket", 2, ALLOW),
            ("socket", 16, ALLOW),
            ("socket", 40, EPERM),
            ("personality", 0, ALLOW),
            ("personality", 0x2_0008, ALLOW),
            ("personality", 0xffff_ffff, ALLOW),
            ("personality", 0x4_0000, EPERM),
        ] {
            assert_eq!(on(&plain, name, first), expected, "{name}({first:#x})");
        }
        let admin = default(&[oci_spec::runtime::Capability::SysAdmin]);
        for name in ["mount", "clone3", "setns", "unshare", "clone"] {
            assert_eq!(on(&admin, name, 0x1000_0011), ALLOW, "{name}");
        }
    }

    #[test]
    fn numbers_newer_than_the_profile_are_unknown_not_denied() {
        let plain = compile(&default_profile(&Default::default())).expect("compiles");
        assert_eq!(
            decide(&plain.instructions, NATIVE, 999, [0; 6]),
            ENOSYS,
            "a call of the future"
        );
        // Where the default is to allow, nothing is added.
        let open = compile(&profile(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}],
        })))
        .expect("compiles");
        assert_eq!(decide(&open.instructions, NATIVE, 999, [0; 6]), ALLOW);
        assert_eq!(on(&open, "mkdir", 0), EPERM);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn other_architectures_of_the_machine_are_filtered_too() {
        const I386: u32 = 0x4000_0003;
        const ARM: u32 = 0x4000_0028;
        const X32: u32 = 0x4000_0000;
        let plain = compile(&default_profile(&Default::default())).expect("compiles");
        let on = |arch, number| decide(&plain.instructions, arch, number, [0; 6]);
        assert_eq!(on(I386, 3), ALLOW, "read");
        assert_eq!(on(I386, 21), EPERM, "mount");
        assert_eq!(on(NATIVE, X32), ALLOW, "read of x32");
        assert_eq!(on(NATIVE, X32 | 165), EPERM, "mount of x32");
        assert_eq!(on(ARM, 3), 0, "another machine: the thread is killed");
    }

    #[test]
    fn every_action_and_comparison_of_oci_is_understood() {
        let program = compile(&profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"],
            "syscalls": [
                {"names": ["read", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["write"], "action": "SCMP_ACT_LOG"},
                {"names": ["close"], "action": "SCMP_ACT_TRAP"},
                {"names": ["dup"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                {"names": ["lseek"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 5, "op": "SCMP_CMP_GE"}]},
                {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [
                    {"index": 0, "value": 240, "valueTwo": 16, "op": "SCMP_CMP_MASKED_EQ"},
                ]},
                {"names": ["fchmod"], "action": "SCMP_ACT_ALLOW", "args": [
                    {"index": 0, "value": 3, "op": "SCMP_CMP_EQ"},
                    {"index": 0, "value": 7, "op": "SCMP_CMP_EQ"},
                ]},
            ],
        })))
        .expect("compiles");
        assert_eq!(program.flags, 2);
        for (name, first, expected) in [
            ("read", 0, ALLOW),
            ("write", 0, LOG),
            ("close", 0, TRAP),
            ("dup", 0, KILL_PROCESS),
            ("getpid", 0, 0x0005_0005),
            ("kill", 0, ENOSYS),
            ("lseek", 4, ENOSYS),
            ("lseek", 5, ALLOW),
            ("lseek", 1 << 40, ALLOW),
            ("ioctl", 0x1f, ALLOW),
            ("ioctl", 0x2f, ENOSYS),
            ("fchmod", 3, ALLOW),
            ("fchmod", 7, ALLOW),
            ("fchmod", 4, ENOSYS),
        ] {
            assert_eq!(on(&program, name, first), expected, "{name}({first:#x})");
        }
    }

    #[test]
    fn what_is_not_done_or_cannot_be_meant_is_refused() {
        for json in [
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}),
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5000}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"],
                "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}),
        ] {
            assert!(compile(&profile(json.clone())).is_err(), "{json}");
        }
    }

    #[test]
    fn the_kernel_takes_the_default_profile() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("the_kernel_takes_the_default_profile: skipped, needs root");
            return;
        }
        let program = compile(&default_profile(&Default::default())).expect("compiles");
        // The filter stays with its thread, which ends here.
        thread::spawn(move || {
            longshore_sys::seccomp::load(&program.instructions, program.flags)
                .expect("a valid program");
            let refused =
                rustix::mount::unmount("/nonexistent", rustix::mount::UnmountFlags::empty());
            assert_eq!(refused, Err(rustix::io::Errno::PERM));
            std::fs::read("/proc/self/status").expect("reading goes on");
            thread::spawn(|| ())
                .join()
                .expect("threads come by clone instead of clone3");
        })
        .join()
        .expect("nothing in it failed");
    }

    #[test]
    fn a_profile_is_compiled_once() {
        let cache = Cache::default();
        let profile = default_profile(&Default::default());
        assert!(cache.compiled(&profile).is_none());
        let first = cache.compile(&profile).expect("compiles");
        let second = cache.compile(&profile).expect("is there");
        assert!(Arc::ptr_eq(&first, &second));
        assert!(cache.compiled(&profile).is_some());
    }
}
