//! Removes trees that an image or a container has shaped.
//!
//! Only held descriptors and single names are used, so neither links nor depth matter: a path
//! longer than PATH_MAX is never formed, and at most [`MAX_OPEN`] directories are open. A tree
//! that is deeper is first moved up, to the top of what is being removed.

use std::{ffi::CStr, mem::MaybeUninit};

use rustix::{
    fd::{BorrowedFd, OwnedFd},
    fs::{
        AtFlags, FileType, IFlags, Mode, OFlags, RawDir, ResolveFlags, ioctl_getflags,
        ioctl_setflags, openat, openat2, renameat, statat, unlinkat,
    },
    io::Errno,
    path::Arg,
};

/// Directories open at a time.
const MAX_OPEN: usize = 32;

/// Bytes of directory entries read at a time.
const ENTRIES: usize = 16 << 10;

/// Removes `name` in `parent` and everything below it; absent is fine.
///
/// # Errors
/// The first one of the kernel, `BUSY` for a mount point; what could be removed before it is
/// gone. Nothing in a mounted file system is touched.
pub(super) fn remove_tree(parent: BorrowedFd<'_>, name: impl Arg + Copy) -> Result<(), Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(Errno::PERM) if allow_removal(parent, name)? => return remove_tree(parent, name),
        // What POSIX wishes for a directory.
        Err(Errno::PERM) if is_directory(parent, name)? => {}
        Err(error) => return Err(error),
    }
    let top = open_dir(parent, name)?;
    let mut removal = Removal { top, moved: 0 };
    loop {
        let progress = removal.empty(None, 1)?;
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) if progress => {}
            Err(Errno::PERM) if allow_removal(parent, name)? => {}
            Err(error) => return Err(error),
        }
    }
}

struct Removal {
    top: OwnedFd,
    /// Deep directories that were moved up.
    moved: u64,
}

impl Removal {
    /// Removes the entries that `dir` (the top if none) lists; whether there were any.
    fn empty(&mut self, dir: Option<&OwnedFd>, open: usize) -> Result<bool, Errno> {
        let mut buffer = Box::<[u8]>::new_uninit_slice(ENTRIES);
        let own = openat(
            dir.unwrap_or(&self.top),
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut progress = false;
        let mut entries = RawDir::new(&own, &mut buffer[..] as &mut [MaybeUninit<u8>]);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            progress = true;
            if entry.file_type() != FileType::Directory {
                match unlinkat(&own, name, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    // Not every file system tells the type.
                    Err(Errno::ISDIR) => {}
                    Err(Errno::PERM) if allow_removal(own_fd(&own), name)? => {
                        unlinkat(&own, name, AtFlags::empty())?;
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            self.directory(&own, name, open)?;
        }
        Ok(progress)
    }

    fn directory(&mut self, dir: &OwnedFd, name: &CStr, open: usize) -> Result<(), Errno> {
        if open >= MAX_OPEN {
            return self.move_up(dir, name);
        }
        let child = open_dir(own_fd(dir), name)?;
        loop {
            let progress = self.empty(Some(&child), open + 1)?;
            match unlinkat(dir, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::NOTEMPTY | Errno::EXIST) if progress => {}
                Err(Errno::PERM) if allow_removal(own_fd(dir), name)? => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn move_up(&mut self, dir: &OwnedFd, name: &CStr) -> Result<(), Errno> {
        loop {
            self.moved += 1;
            match renameat(dir, name, &self.top, format!("moved-{}", self.moved)) {
                Ok(()) => return Ok(()),
                // Something has that name.
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                Err(Errno::PERM) if allow_removal(own_fd(dir), name)? => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn own_fd(fd: &OwnedFd) -> BorrowedFd<'_> {
    rustix::fd::AsFd::as_fd(fd)
}

/// Never opens what is mounted on `name`: its content is somebody else's.
fn open_dir(parent: BorrowedFd<'_>, name: impl Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(parent, name, flags, Mode::empty(), resolve).map_err(|error| match error {
        Errno::XDEV => Errno::BUSY,
        other => other,
    })
}

fn is_directory(parent: BorrowedFd<'_>, name: impl Arg) -> Result<bool, Errno> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Takes `chattr +i` and `+a` from `name` and its directory; whether there was any to take.
fn allow_removal(parent: BorrowedFd<'_>, name: impl Arg + Copy) -> Result<bool, Errno> {
    let mut changed = false;
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut unlock = |name: &CStr, dir: BorrowedFd<'_>| -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = openat(dir, name, flags, Mode::empty())?;
        let Ok(old) = ioctl_getflags(&fd) else {
            return Ok(());
        };
        let locks = IFlags::IMMUTABLE | IFlags::APPEND;
        if old.intersects(locks) {
            ioctl_setflags(&fd, old - locks)?;
            changed = true;
        }
        Ok(())
    };
    unlock(c".", parent)?;
    // Other kinds can't have the flags, and opening a device does things.
    if matches!(kind, FileType::RegularFile | FileType::Directory) {
        name.into_with_c_str(|name| unlock(name, parent))?;
    }
    Ok(changed)
}
