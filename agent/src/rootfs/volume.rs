//! Volumes that the configuration of an image asks for: a directory of the container's own for each,
//! which begins with what the image has at that path.
//!
//! It is a copy and no overlay, since programs choose volumes for what they write much to, and some
//! of them (a container engine, a database) do not run on an overlay. The copy goes directory by
//! directory over names, never over paths that the image could have linked elsewhere, with a queue
//! in place of recursion: an image may nest its directories as deep as it likes.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::{CString, OsStr},
    fs::File,
    io,
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, RawDir, RawMode, ResolveFlags, Stat, Timespec,
        Timestamps, Uid, XattrFlags, chmodat, chownat, fchmod, fchown, fgetxattr, flistxattr,
        fsetxattr, fstat, futimens, ioctl_ficlone, linkat, mkdirat, mknodat, openat, openat2,
        readlinkat, symlinkat, utimensat,
    },
    io::Errno,
};

use super::{
    Layer, Rootfs, RootfsError,
    merge::{self, Found, Merged, Part},
};
use crate::id::ContainerId;

/// Directory of a container's volumes, beside its writable layer.
pub(super) const VOLUMES: &str = "volumes";

/// Bytes of directory entries read at a time.
const ENTRIES: usize = 16 << 10;

/// Attributes of overlayfs are about layers, not about what they show.
const OVERLAY_ATTRIBUTES: &[u8] = b"trusted.overlay.";

impl Rootfs {
    /// Where the volume `number` of a container is.
    pub fn volume(&self, container: &ContainerId, number: usize) -> PathBuf {
        self.writable(container)
            .dir
            .join(VOLUMES)
            .join(number.to_string())
    }

    /// Makes the volume `number` of a container with what the image has at `path`: owners, modes,
    /// times and attributes included; empty if it has nothing there. It goes with the writable
    /// layer, which must exist. Blocking, as long as the content is large.
    ///
    /// # Errors
    /// `NotADirectory`, `SymlinkLoop`, `LayerLost`, `Kernel`; the writable layer's removal removes
    /// what was made.
    pub fn create_volume(
        &self,
        container: &ContainerId,
        number: usize,
        layers_base_first: &[Layer],
        path: &str,
    ) -> Result<(), RootfsError> {
        let parts = merge::directory(self.open_layers(layers_base_first)?, path)?;
        let place = &self.inner.containers;
        let target = self.volume(container, number);
        let failed = |call| RootfsError::kernel(call, &*target);
        let dir = format!("{container}/{VOLUMES}");
        match mkdirat(&place.fd, &*dir, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("mkdirat")(error)),
        }
        let name = format!("{dir}/{number}");
        let mode = Mode::from_raw_mode(0o755);
        mkdirat(&place.fd, &*name, mode).map_err(failed("mkdirat"))?;
        // Whatever the mask of this process is.
        chmodat(&place.fd, &*name, mode, AtFlags::empty()).map_err(failed("fchmodat"))?;
        let Some(parts) = parts else { return Ok(()) };
        let top = open_dir(&place.fd, Path::new(&name)).map_err(failed("openat2"))?;
        let mut copy = Copy {
            layers: &self.inner.layers.fd,
            top,
            pending: vec![(PathBuf::new(), paths(parts))],
            linked: HashMap::new(),
        };
        copy.run()
            .map_err(|(call, path, error)| RootfsError::kernel(call, target.join(path))(error))
    }
}

/// What failed, where in the volume, and why.
type Failure = (&'static str, PathBuf, Errno);

struct Copy<'a> {
    layers: &'a OwnedFd,
    top: OwnedFd,
    /// Directories to fill, by their path in the volume, and what they are in the layers.
    pending: Vec<(PathBuf, Vec<PathBuf>)>,
    /// Files with several names, by device and inode: the first name.
    linked: HashMap<(u64, u64), PathBuf>,
}

fn paths(parts: Merged) -> Vec<PathBuf> {
    parts.into_iter().map(|part| part.path).collect()
}

fn open_dir(dir: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    openat2(dir, path, flags, Mode::empty(), resolve)
}

impl Copy<'_> {
    fn run(&mut self) -> Result<(), Failure> {
        let mut filled = Vec::new();
        while let Some((path, sources)) = self.pending.pop() {
            self.fill(&path, &sources)
                .map_err(|(call, error)| (call, path.clone(), error))?;
            filled.extend(sources.into_iter().next().map(|source| (path, source)));
        }
        // Only now: filling a directory changes its times.
        for (path, source) in filled {
            let times = || -> Result<(), Errno> {
                let stat = fstat(open_dir(self.layers, &source)?)?;
                futimens(open_dir(&self.top, &path)?, &times(&stat))
            };
            times().map_err(|error| ("futimens", path, error))?;
        }
        Ok(())
    }

    /// Fills one directory and gives it the attributes of its topmost source.
    fn fill(&mut self, path: &Path, sources: &[PathBuf]) -> Result<(), (&'static str, Errno)> {
        let here = open_dir(&self.top, path).map_err(|error| ("openat2", error))?;
        let mut parts = Merged::new();
        let mut names = BTreeSet::new();
        for source in sources {
            let fd = open_dir(self.layers, source).map_err(|error| ("openat2", error))?;
            add_names(&fd, &mut names).map_err(|error| ("getdents64", error))?;
            let path = source.clone();
            parts.push(Part { fd, path });
        }
        if let Some(first) = parts.first() {
            let stat = fstat(&first.fd).map_err(|error| ("fstat", error))?;
            attributes(first.fd.as_fd(), here.as_fd(), &stat)?;
        }
        for name in names {
            match merge::look_up(&parts, name.as_bytes()).map_err(|error| ("openat", error))? {
                Found::Nothing => {}
                Found::Directory(merged) => {
                    mkdirat(&here, &name, Mode::RWXU).map_err(|error| ("mkdirat", error))?;
                    let below = path.join(OsStr::from_bytes(name.as_bytes()));
                    self.pending.push((below, paths(merged)));
                }
                Found::Other { fd, kind } => self.copy(&here, path, &name, &fd, kind)?,
            }
        }
        Ok(())
    }

    /// Copies what is no directory.
    fn copy(
        &mut self,
        here: &OwnedFd,
        path: &Path,
        name: &CString,
        source: &OwnedFd,
        kind: FileType,
    ) -> Result<(), (&'static str, Errno)> {
        let stat = fstat(source).map_err(|error| ("fstat", error))?;
        if stat.st_nlink > 1 {
            let whole = path.join(OsStr::from_bytes(name.as_bytes()));
            match self.linked.get(&(stat.st_dev, stat.st_ino)) {
                Some(first) => {
                    return linkat(&self.top, first, here, name, AtFlags::empty())
                        .map_err(|error| ("linkat", error));
                }
                None => self.linked.insert((stat.st_dev, stat.st_ino), whole),
            };
        }
        match kind {
            FileType::RegularFile => return copy_file(here, name, source, &stat),
            FileType::Symlink => readlinkat(source, "", Vec::new())
                .and_then(|target| symlinkat(&target, here, name))
                .map_err(|error| ("symlinkat", error))?,
            kind => {
                mknodat(here, name, kind, Mode::from_raw_mode(0o600), stat.st_rdev)
                    .map_err(|error| ("mknodat", error))?;
            }
        }
        let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        chownat(here, name, Some(owner.0), Some(owner.1), flags)
            .map_err(|error| ("fchownat", error))?;
        if kind != FileType::Symlink {
            chmodat(here, name, mode(&stat), AtFlags::empty())
                .map_err(|error| ("fchmodat", error))?;
        }
        utimensat(here, name, &times(&stat), flags).map_err(|error| ("utimensat", error))
    }
}

fn copy_file(
    here: &OwnedFd,
    name: &CString,
    source: &OwnedFd,
    stat: &Stat,
) -> Result<(), (&'static str, Errno)> {
    // It was looked up without opening it: nothing but a regular file may be opened.
    let again = format!("/proc/self/fd/{}", source.as_raw_fd());
    let from = rustix::fs::open(again, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| ("open", error))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let to =
        openat(here, name, flags, Mode::RUSR | Mode::WUSR).map_err(|error| ("openat", error))?;
    let (mut from, mut to) = (File::from(from), File::from(to));
    // A file system that shares extents takes no time and no space.
    if ioctl_ficlone(&to, &from).is_err() {
        io::copy(&mut from, &mut to)
            .map_err(|error| ("copy", Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    }
    attributes(from.as_fd(), to.as_fd(), stat)?;
    futimens(&to, &times(stat)).map_err(|error| ("futimens", error))
}

/// The owner first, because chown(2) takes set-user-ID bits and capabilities away.
fn attributes(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    stat: &Stat,
) -> Result<(), (&'static str, Errno)> {
    let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchown(to, Some(owner.0), Some(owner.1)).map_err(|error| ("fchown", error))?;
    fchmod(to, mode(stat)).map_err(|error| ("fchmod", error))?;
    let mut names = vec![0; 64 << 10];
    let length = match flistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => 0,
        Err(error) => return Err(("flistxattr", error)),
    };
    names.truncate(length);
    let mut value = Vec::new();
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        if name.starts_with(OVERLAY_ATTRIBUTES) {
            continue;
        }
        value.resize(64 << 10, 0);
        let length = fgetxattr(from, name, &mut value[..]).map_err(|error| ("fgetxattr", error))?;
        match fsetxattr(to, name, &value[..length], XattrFlags::empty()) {
            Ok(()) => {}
            // As the layer's own unpacking has it; layers and volumes are on one file system.
            Err(Errno::NOTSUP) if name != b"security.capability" => {}
            Err(error) => return Err(("fsetxattr", error)),
        }
    }
    Ok(())
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(RawMode::from(stat.st_mode) & 0o7777)
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.cast_signed(),
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

fn add_names(dir: &OwnedFd, names: &mut BTreeSet<CString>) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); ENTRIES];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_owned();
        if &*name != c"." && &*name != c".." {
            names.insert(name);
        }
    }
    Ok(())
}
