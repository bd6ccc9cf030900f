//! Files that a root gets before its program runs: its host name, its name servers.
//!
//! The root may have been left by a hostile guest, so all of it happens inside the root and with the
//! rights of its own root: no link is followed, nothing but a plain file is written to.

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use longshore_sys::path;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Step, at};
use crate::wire::File;

/// Writes them all.
pub(super) fn write(files: &[File], root: &OwnedFd) -> Step<()> {
    for file in files {
        at(write_one(file, root), || format!("write {}", file.path))?;
    }
    Ok(())
}

fn write_one(file: &File, root: &OwnedFd) -> io::Result<()> {
    let (parent, name) = path::parent_in_root(root, Path::new(&file.path))?;
    let open = |flags: OFlags| {
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, &name, flags, Mode::from_bits_truncate(file.mode))
    };
    let there = match rustix::fs::statat(&parent, &name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Some(FileType::from_raw_mode(found.st_mode)),
        Err(Errno::NOENT) => None,
        Err(error) => return Err(error.into()),
    };
    match there {
        None => {}
        Some(FileType::RegularFile)
            if file.overwrite || is_ours(open(OFlags::RDONLY)?, &file.content)? => {}
        // A link is somebody's decision, as systemd-resolved's is.
        Some(_) => return Ok(()),
    }
    let opened = open(OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
    std::fs::File::from(opened).write_all(&file.content)
}

/// A file that we wrote is known by its first line.
fn is_ours(file: OwnedFd, content: &[u8]) -> io::Result<bool> {
    let end = content.iter().position(|byte| *byte == b'\n');
    let first = &content[..end.map_or(content.len(), |end| end + 1)];
    let mut found = Vec::new();
    std::fs::File::from(file)
        .take(first.len() as u64)
        .read_to_end(&mut found)?;
    Ok(found == first)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn open_root(dir: &Path) -> OwnedFd {
        rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("opens")
    }

    fn file(path: &str, content: &str, overwrite: bool) -> File {
        File {
            path: path.into(),
            content: content.into(),
            mode: 0o644,
            overwrite,
        }
    }

    #[test]
    fn only_what_is_missing_ours_or_meant_is_written() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let etc = dir.path().join("etc");
        fs::create_dir(&etc).expect("mkdir");
        fs::write(etc.join("ours"), "# ours\nold\n").expect("write");
        fs::write(etc.join("theirs"), "theirs\n").expect("write");
        fs::write(etc.join("meant"), "theirs\n").expect("write");
        let root = open_root(dir.path());
        for (name, overwrite, expected) in [
            ("missing", false, "# ours\nnew\n"),
            ("ours", false, "# ours\nnew\n"),
            ("theirs", false, "theirs\n"),
            ("meant", true, "# ours\nnew\n"),
        ] {
            let wish = file(&format!("/etc/{name}"), "# ours\nnew\n", overwrite);
            write(&[wish], &root).expect("written or left alone");
            let found = fs::read_to_string(etc.join(name)).expect("read");
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn traps_of_a_guest_lead_nowhere() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).expect("mkdir");
        fs::write(outside.join("file"), "of the host").expect("write");
        let root_dir = dir.path().join("root");
        fs::create_dir_all(root_dir.join("etc")).expect("mkdir");
        std::os::unix::fs::symlink(outside.join("file"), root_dir.join("etc/link")).expect("link");
        std::os::unix::fs::symlink(&outside, root_dir.join("dir")).expect("link");
        let fifo = root_dir.join("etc/fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            FileType::Fifo,
            Mode::from_bits_truncate(0o600),
            0,
        )
        .expect("mkfifo");
        let root = open_root(&root_dir);
        for path in ["/etc/link", "/etc/fifo", "/dir/file"] {
            write(&[file(path, "new", true)], &root).expect("left alone");
        }
        let kept = fs::read_to_string(outside.join("file")).expect("read");
        assert_eq!(kept, "of the host");
    }
}
