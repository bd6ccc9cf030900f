//! How much a tree takes on disk.
//!
//! The tree may be of any depth and may change meanwhile, since a container works in it. One
//! directory is open at a time; the way back up is `..`, accepted only if it leads to the
//! directory that we came from, so a directory moved elsewhere never leads the walk out.

use std::{
    collections::HashSet,
    ffi::{CStr, CString},
    mem::MaybeUninit,
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{
        AtFlags, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, Stat, fstat, openat, openat2, seek,
        statat,
    },
    io::Errno,
};

use super::tree::is_directory;

/// What something takes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes allocated.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Bytes of directory entries read at a time: after each subdirectory they are read again, so
/// few at a time keep a directory with very many subdirectories quick.
const ENTRIES: usize = 4 << 10;

/// Walks that may fail because the tree changes.
const ATTEMPTS: u32 = 5;

/// Usage of the tree `root`, in which others may work; `None` if it changes too quickly.
pub(super) fn of_tree(root: impl AsFd + Copy) -> Result<Option<Usage>, Errno> {
    for _ in 0..ATTEMPTS {
        if let Some(usage) = walk(root)? {
            return Ok(Some(usage));
        }
    }
    Ok(None)
}

/// Usage of the tree `root`, in which nobody works.
pub(super) fn of_still_tree(root: impl AsFd + Copy) -> Result<Usage, Errno> {
    of_tree(root)?.ok_or(Errno::STALE)
}

/// A directory above the current one.
struct Level {
    device: u64,
    inode: u64,
    /// Where its entries go on.
    cookie: u64,
}

#[derive(Default)]
struct Sum {
    usage: Usage,
    /// Files with several names that were counted.
    linked: HashSet<(u64, u64)>,
}

impl Sum {
    fn add(&mut self, stat: &Stat) {
        let several = stat.st_nlink > 1 && !is_directory(stat);
        if several && !self.linked.insert((stat.st_dev, stat.st_ino)) {
            return;
        }
        self.usage.inodes += 1;
        self.usage.bytes += 512 * stat.st_blocks.cast_unsigned();
    }
}

enum Step {
    Down { name: CString, cookie: u64 },
    Up,
}

/// One walk; `None` if the tree changed under it.
fn walk(root: impl AsFd + Copy) -> Result<Option<Usage>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut here: OwnedFd = openat(root, c".", flags, Mode::empty())?;
    let mut stat = fstat(&here)?;
    let device = stat.st_dev;
    let mut above: Vec<Level> = Vec::new();
    let mut sum = Sum::default();
    sum.add(&stat);
    loop {
        match next_directory(&here, device, &mut sum)? {
            Step::Down { name, cookie } => match open_child(&here, &name) {
                Ok(child) => {
                    above.push(Level {
                        device: stat.st_dev,
                        inode: stat.st_ino,
                        cookie,
                    });
                    stat = fstat(&child)?;
                    here = child;
                }
                // Gone, replaced, or a mount point, whose content is not of this tree.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {
                    seek(&here, SeekFrom::Start(cookie))?;
                }
                Err(error) => return Err(error),
            },
            Step::Up => {
                let Some(level) = above.pop() else {
                    return Ok(Some(sum.usage));
                };
                let parent = match openat(&here, c"..", flags, Mode::empty()) {
                    Ok(parent) => parent,
                    Err(Errno::NOENT) => return Ok(None),
                    Err(error) => return Err(error),
                };
                stat = fstat(&parent)?;
                if (stat.st_dev, stat.st_ino) != (level.device, level.inode) {
                    return Ok(None);
                }
                seek(&parent, SeekFrom::Start(level.cookie))?;
                here = parent;
            }
        }
    }
}

fn open_child(dir: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(dir, name, flags, Mode::empty(), resolve)
}

/// Adds the entries of `dir`, from where it stands, up to and with the next directory.
fn next_directory(dir: &OwnedFd, device: u64, sum: &mut Sum) -> Result<Step, Errno> {
    let mut buffer = [MaybeUninit::uninit(); ENTRIES];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Ok(entry) => entry,
            // The directory was removed.
            Err(Errno::NOENT) => break,
            Err(error) => return Err(error),
        };
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        if stat.st_dev != device {
            // Something mounted here is not of this tree.
            continue;
        }
        sum.add(&stat);
        if is_directory(&stat) {
            return Ok(Step::Down {
                name: name.to_owned(),
                cookie: entry.next_entry_cookie(),
            });
        }
    }
    Ok(Step::Up)
}
