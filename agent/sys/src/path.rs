//! Paths from outside, walked beneath a descriptor so that no link leads out of a root.
//!
//! Two ways: one openat2(2) when the path must exist already, and a walk of one component at a
//! time when missing parts are to be made. The walk keeps a stack of descriptors, opens each
//! component without following it, reads links itself and answers `..` from its own stack, so a
//! tree that somebody else changes meanwhile can mislead it inside the root but never out of it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Links followed before a path is refused, as the kernel has it.
const MAX_LINKS: usize = 40;

/// What to make when a path does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Nothing: the error is `ENOENT`.
    Refuse,
    /// Directories all the way.
    MakeDir(u32),
    /// Directories (mode 0755) and an empty regular file at the end.
    MakeFile(u32),
}

/// Opens `path` as if `root` were `/`: links and `..` stay inside, magic links are refused.
///
/// # Errors
/// What openat2(2) answers.
pub fn open_in_root(
    root: impl AsFd,
    path: impl AsRef<Path>,
    flags: OFlags,
    mode: u32,
) -> io::Result<OwnedFd> {
    open(
        root,
        path.as_ref(),
        flags,
        mode,
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Opens `path` below `dir`; a path or link that leads out is an error (`EXDEV`).
///
/// # Errors
/// What openat2(2) answers.
pub fn open_beneath(
    dir: impl AsFd,
    path: impl AsRef<Path>,
    flags: OFlags,
    mode: u32,
) -> io::Result<OwnedFd> {
    open(
        dir,
        path.as_ref(),
        flags,
        mode,
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Opens `path` below `dir` where no component may be a link at all (`ELOOP`).
///
/// # Errors
/// What openat2(2) answers.
pub fn open_no_links(
    dir: impl AsFd,
    path: impl AsRef<Path>,
    flags: OFlags,
    mode: u32,
) -> io::Result<OwnedFd> {
    open(
        dir,
        path.as_ref(),
        flags,
        mode,
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
}

fn open(
    dir: impl AsFd,
    path: &Path,
    flags: OFlags,
    mode: u32,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    // openat2 refuses mode bits unless the call may create something.
    let creates = flags.intersects(OFlags::CREATE) || flags.contains(OFlags::TMPFILE);
    let mode = if creates {
        Mode::from_bits_truncate(mode)
    } else {
        Mode::empty()
    };
    loop {
        match rustix::fs::openat2(&dir, path, flags | OFlags::CLOEXEC, mode, resolve) {
            // A rename or mount somewhere raced with a `..`: the kernel asks to try again.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Walks to `path` inside `root` and makes what is missing; returns an `O_PATH` descriptor.
///
/// An existing last component is returned whatever its kind; links are followed inside the root,
/// also dangling ones, whose target is then made.
///
/// # Errors
/// `ENOTDIR`, `ELOOP`, and what openat(2), mkdirat(2) answer.
pub fn resolve_in_root(
    root: impl AsFd,
    path: impl AsRef<Path>,
    missing: Missing,
) -> io::Result<OwnedFd> {
    let mut stack = vec![rustix::fs::openat(
        &root,
        ".",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?];
    let mut pending: Vec<OsString> = Vec::new();
    push_components(&mut pending, path.as_ref().as_os_str());
    let mut links = 0;
    while let Some(name) = pending.pop() {
        let here = stack.last().expect("the root is never popped");
        if name == ".." {
            if stack.len() > 1 {
                stack.pop();
            }
            continue;
        }
        let last = pending.is_empty();
        let next = match open_component(here, &name) {
            Ok(next) => next,
            Err(Errno::NOENT) => {
                make_component(here, &name, last, missing)?;
                open_component(here, &name)?
            }
            Err(error) => return Err(error.into()),
        };
        match FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) {
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = rustix::fs::readlinkat(&next, "", Vec::new())?.into_bytes();
                if target.first() == Some(&b'/') {
                    stack.truncate(1);
                }
                push_components(&mut pending, &OsString::from_vec(target));
            }
            FileType::Directory => stack.push(next),
            _ if last => return Ok(next),
            _ => return Err(Errno::NOTDIR.into()),
        }
    }
    Ok(stack.pop().expect("the root is never popped"))
}

/// Makes a directory and its parents inside `root`; returns it opened with `O_PATH`.
///
/// # Errors
/// As [`resolve_in_root`]; `ENOTDIR` if something else is there.
pub fn make_dir_in_root(root: impl AsFd, path: impl AsRef<Path>, mode: u32) -> io::Result<OwnedFd> {
    let fd = resolve_in_root(root, path, Missing::MakeDir(mode))?;
    match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
        FileType::Directory => Ok(fd),
        _ => Err(Errno::NOTDIR.into()),
    }
}

/// Opens the directory that holds `path`'s last component inside `root`, making missing parents;
/// returns it with the component's name.
///
/// # Errors
/// As [`make_dir_in_root`]; `EINVAL` for a path without a last name.
pub fn parent_in_root(root: impl AsFd, path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
    let parent = path.parent().unwrap_or(Path::new(""));
    Ok((make_dir_in_root(root, parent, 0o755)?, name))
}

/// Path under which another call reaches what `fd` has open, without walking any name again.
pub fn fd_path(fd: impl AsFd) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Pushes the components so that the first is popped first; `.` and empty ones vanish.
fn push_components(pending: &mut Vec<OsString>, path: &OsStr) {
    pending.extend(
        path.as_bytes()
            .split(|&byte| byte == b'/')
            .rev()
            .filter(|part| !part.is_empty() && *part != b".")
            .map(|part| OsString::from_vec(part.to_vec())),
    );
}

fn open_component(dir: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(
        dir,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn make_component(dir: &OwnedFd, name: &OsStr, last: bool, missing: Missing) -> io::Result<()> {
    let made = match missing {
        Missing::Refuse => Err(Errno::NOENT),
        Missing::MakeFile(mode) if last => rustix::fs::openat(
            dir,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_bits_truncate(mode),
        )
        .map(drop),
        Missing::MakeDir(mode) if last => {
            rustix::fs::mkdirat(dir, name, Mode::from_bits_truncate(mode))
        }
        Missing::MakeDir(_) | Missing::MakeFile(_) => {
            rustix::fs::mkdirat(dir, name, Mode::from_bits_truncate(0o755))
        }
    };
    match made {
        // Somebody else made it meanwhile: as good as ours.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let fd = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .expect("open");
        (dir, fd)
    }

    #[test]
    fn missing_parts_are_made_inside_the_root_whatever_the_links_say() {
        let cases: &[(&str, &str, &str, &str)] = &[
            // link, its target, path asked for, path that must exist afterwards
            ("unused", "x", "/a/b/c", "a/b/c"),
            ("abs", "/else/where", "/abs/x", "else/where/x"),
            ("up", "../../../../up-target", "up/x", "up-target/x"),
            ("dots", "x", "../../../d/../e", "e"),
            ("dangling", "gone", "/dangling", "gone"),
        ];
        for (link, target, path, expected) in cases {
            let (dir, fd) = root();
            symlink(target, dir.path().join(link)).expect("symlink");
            make_dir_in_root(&fd, path, 0o755).expect(path);
            assert!(dir.path().join(expected).is_dir(), "{path}");
        }
    }

    #[test]
    fn a_loop_of_links_is_refused() {
        let (dir, fd) = root();
        symlink("b", dir.path().join("a")).expect("symlink");
        symlink("a", dir.path().join("b")).expect("symlink");
        let error = make_dir_in_root(&fd, "a/x", 0o755).expect_err("loop");
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_is_made_at_the_end_and_not_followed_through() {
        let (dir, fd) = root();
        resolve_in_root(&fd, "/etc/resolv.conf", Missing::MakeFile(0o644)).expect("make");
        assert!(dir.path().join("etc/resolv.conf").is_file());
        let error = make_dir_in_root(&fd, "/etc/resolv.conf/x", 0o755).expect_err("a file");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn opening_beneath_refuses_what_in_root_confines() {
        let (dir, fd) = root();
        fs::write(dir.path().join("file"), "inside").expect("write");
        symlink("/file", dir.path().join("link")).expect("symlink");
        open_in_root(&fd, "link", OFlags::RDONLY, 0).expect("confined");
        let error = open_beneath(&fd, "link", OFlags::RDONLY, 0).expect_err("leads out");
        assert_eq!(error.raw_os_error(), Some(libc::EXDEV));
        let error = open_no_links(&fd, "link", OFlags::RDONLY, 0).expect_err("a link");
        assert!(matches!(
            error.raw_os_error(),
            Some(libc::ELOOP | libc::EXDEV)
        ));
    }
}
