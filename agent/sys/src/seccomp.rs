//! Loading of compiled seccomp filters.

use std::io;

use crate::check;

/// Bytes of one classic BPF instruction.
pub const INSTRUCTION_BYTES: usize = 8;

/// Loads a classic BPF program for the calling thread and its future children.
///
/// `program` holds instructions of eight bytes in host order; `flags` are
/// `SECCOMP_FILTER_FLAG_*`. Needs no_new_privs or `CAP_SYS_ADMIN`.
///
/// # Errors
/// `InvalidInput` for a program that is empty, too long or no multiple of eight bytes; what
/// seccomp(2) answers.
pub fn load(program: &[u8], flags: u32) -> io::Result<()> {
    let count = u16::try_from(program.len() / INSTRUCTION_BYTES)
        .ok()
        .filter(|count| *count > 0);
    let (Some(length), 0) = (count, program.len() % INSTRUCTION_BYTES) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut filter: Vec<libc::sock_filter> = program
        .chunks_exact(INSTRUCTION_BYTES)
        .map(|code| libc::sock_filter {
            code: u16::from_ne_bytes([code[0], code[1]]),
            jt: code[2],
            jf: code[3],
            k: u32::from_ne_bytes([code[4], code[5], code[6], code[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: length,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: `program` points to `length` instructions that live until the call returns.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_programs_are_refused_before_the_kernel_sees_them() {
        for program in [&[][..], &[0; 7], &[0; 12]] {
            let error = load(program, 0).expect_err("malformed");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
