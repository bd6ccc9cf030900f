//! Loading of device programs for cgroups: bpf(2), as far as that needs it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::check;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_PROG_QUERY: libc::c_int = 16;

const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Programs that one cgroup can carry (the kernel's `BPF_CGROUP_MAX_PROGS`).
const MAX_PROGRAMS: usize = 64;

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`; what follows in newer kernels is zero.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// `union bpf_attr` for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    padding: u32,
}

/// `union bpf_attr` for `BPF_PROG_GET_FD_BY_ID`.
#[repr(C)]
#[derive(Default)]
struct ById {
    prog_id: u32,
    next_id: u32,
    open_flags: u32,
}

/// Makes `program` the only one that decides on devices in a version 2 cgroup; programs above it
/// decide as well. There is no moment without any.
///
/// An instruction is eight bytes: `struct bpf_insn` as a little-endian number.
///
/// # Errors
/// `EINVAL` when the verifier refuses the program; what bpf(2) answers.
pub fn set_device_filter(cgroup: impl AsFd, program: &[u64]) -> io::Result<()> {
    let cgroup = cgroup.as_fd();
    let earlier = attached(cgroup)?;
    let loaded = load(program)?;
    attach(BPF_PROG_ATTACH, cgroup, loaded.as_fd())?;
    for id in earlier {
        match by_id(id) {
            Ok(old) => attach(BPF_PROG_DETACH, cgroup, old.as_fd())?,
            // Detached by somebody else meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn load(program: &[u64]) -> io::Result<OwnedFd> {
    let mut attr = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        insns: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        ..Load::default()
    };
    // SAFETY: `insns` and `license` point to memory that outlives the call and is only read.
    let raw = unsafe { bpf(BPF_PROG_LOAD, &mut attr) }?;
    Ok(owned(raw))
}

fn attach(command: libc::c_int, cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Attach {
        target_fd: number(cgroup),
        attach_bpf_fd: number(program),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: if command == BPF_PROG_ATTACH {
            BPF_F_ALLOW_MULTI
        } else {
            0
        },
        replace_bpf_fd: 0,
    };
    // SAFETY: no member points anywhere.
    unsafe { bpf(command, &mut attr) }.map(drop)
}

/// Ids of the device programs of a cgroup itself.
fn attached(cgroup: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_PROGRAMS];
    let mut attr = Query {
        target_fd: number(cgroup),
        attach_type: BPF_CGROUP_DEVICE,
        prog_ids: ids.as_mut_ptr().addr() as u64,
        prog_cnt: u32::try_from(ids.len()).expect("small"),
        ..Query::default()
    };
    // SAFETY: `prog_ids` points to room for `prog_cnt` ids, which outlives the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    let count = usize::try_from(attr.prog_cnt).expect("at most 64");
    Ok(ids[..count.min(MAX_PROGRAMS)].to_vec())
}

fn by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = ById {
        prog_id: id,
        ..ById::default()
    };
    // SAFETY: no member points anywhere.
    let raw = unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attr) }?;
    Ok(owned(raw))
}

/// # Safety
/// Every pointer in `attr` that the kernel follows for this command is valid for it.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is as long as said; what is in it the caller answers for.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    })
}

fn owned(raw: libc::c_long) -> OwnedFd {
    // SAFETY: bpf(2) has just made this descriptor for us; it is close-on-exec.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(raw).expect("descriptors are small")) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("descriptors are not negative")
}
