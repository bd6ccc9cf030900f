//! The tree that a layer becomes: every path is resolved below its root, and nothing else exists.
//!
//! A parent directory is usually one `openat2` away (no symbolic links, beneath the root) or among
//! the few that were used last. Where links of the layer itself are on the way, or directories
//! that the archive never mentioned, [`Tree::walk`] goes component by component over held
//! descriptors: absolute links and `..` in links end at the root, as they would after chroot(2).
//! Nobody else can reach the tree meanwhile: it lies in a directory of mode 0700.

use std::{collections::VecDeque, ffi::OsStr, os::unix::ffi::OsStrExt, path::PathBuf, rc::Rc};

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{
        AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, XattrFlags, fsetxattr, fstat, mkdirat,
        mknodat, openat, openat2, readlinkat, statat, unlinkat,
    },
    io::Errno,
};

use super::{
    error::{LayerError, LimitKind, PathFault},
    remove::remove_tree,
};

/// On a directory: nothing of lower layers shows through. Source: kernel, overlayfs.rst.
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";

/// As the kernel allows when it follows links by itself.
const MAX_LINKS: u32 = 40;

/// Descriptors kept for the directories used last.
const CACHED: usize = 32;

/// Longest path, without the NUL that ends it for the kernel, and longest component.
pub(super) const MAX_PATH: usize = 4095;
const MAX_COMPONENT: usize = 255;

/// A directory of the layer.
pub(super) struct Dir {
    fd: OwnedFd,
    /// From the root, without links; empty for the root.
    path: Box<[u8]>,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Dir {
    pub(super) fn is_root(&self) -> bool {
        self.path.is_empty()
    }

    /// Path of `name` in this directory.
    pub(super) fn join(&self, name: &[u8]) -> Vec<u8> {
        match &*self.path {
            b"" => name.to_vec(),
            path => [path, b"/", name].concat(),
        }
    }
}

/// See the module.
pub(super) struct Tree {
    root: Rc<Dir>,
    /// By path as written in the archive, used last first.
    cache: VecDeque<(Box<[u8]>, Rc<Dir>)>,
    /// Directories that the archive did not mention when they were needed.
    implied: Vec<Vec<u8>>,
    /// How many components of link targets may be followed, in all and from now on.
    link_steps: u64,
    link_steps_left: u64,
    /// Inodes made.
    inodes: u64,
    /// Something that had been unpacked was removed again.
    replaced: bool,
}

impl Tree {
    pub(super) fn new(root: OwnedFd, link_steps: u64) -> Self {
        let path = Box::default();
        Self {
            root: Rc::new(Dir { fd: root, path }),
            cache: VecDeque::new(),
            implied: Vec::new(),
            link_steps,
            link_steps_left: link_steps,
            inodes: 1,
            replaced: false,
        }
    }

    /// Takes the paths of directories made only because something is in them.
    pub(super) fn take_implied(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.implied)
    }

    /// Inodes made; `None` if some were removed again, so that only a walk can tell.
    pub(super) fn inodes(&self) -> Option<u64> {
        (!self.replaced).then_some(self.inodes)
    }

    pub(super) fn count_inode(&mut self) {
        self.inodes += 1;
    }

    /// The directory at `path` (clean: no `.`, no `..`, no doubled slash), made if it is missing.
    pub(super) fn directory(&mut self, path: &[u8]) -> Result<Rc<Dir>, LayerError> {
        if path.is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        if let Some(at) = self.cache.iter().position(|(known, _)| **known == *path) {
            if at > 0
                && let Some(hit) = self.cache.remove(at)
            {
                self.cache.push_front(hit);
            }
            return Ok(Rc::clone(&self.cache[0].1));
        }
        let dir = Rc::new(match open_plain(&self.root, path) {
            Ok(fd) => Dir {
                fd,
                path: path.into(),
            },
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => self.walk(path)?,
            Err(error) => return Err(failed("openat2", path)(error)),
        });
        self.cache.truncate(CACHED - 1);
        self.cache.push_front((path.into(), Rc::clone(&dir)));
        Ok(dir)
    }

    /// Like `directory`, but `None` if it is missing.
    pub(super) fn existing_directory(
        &mut self,
        path: &[u8],
    ) -> Result<Option<Rc<Dir>>, LayerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let name = if path.is_empty() { b"." } else { path };
        match openat2(&*self.root, name, flags, Mode::empty(), resolve) {
            // Nothing is missing, so nothing will be made.
            Ok(_) => self.directory(path).map(Some),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(failed("openat2", path)(error)),
        }
    }

    /// Follows `path` component by component, making what is missing.
    fn walk(&mut self, path: &[u8]) -> Result<Dir, LayerError> {
        let mut pending: Vec<Vec<u8>> = components_reversed(path);
        // The way from the root to where we are.
        let mut way: Vec<(OwnedFd, Vec<u8>)> = Vec::new();
        let mut links = 0;
        while let Some(name) = pending.pop() {
            if name == b".." {
                way.pop();
                continue;
            }
            let whole = self.joined(&way, &name, path)?;
            let here = way.last().map_or(self.root.as_fd(), |(fd, _)| fd.as_fd());
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = match openat(here, &*name, flags, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => {
                    mkdirat(here, &*name, Mode::RWXU).map_err(failed("mkdirat", path))?;
                    self.inodes += 1;
                    self.implied.push(whole.clone());
                    openat(here, &*name, flags, Mode::empty()).map_err(failed("openat", path))?
                }
                Err(error) => return Err(failed("openat", path)(error)),
            };
            let stat = fstat(&found).map_err(failed("fstat", path))?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => way.push((found, name)),
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        let path = shown(path);
                        return Err(LayerError::SymlinkLoop { path });
                    }
                    let target = readlinkat(&found, "", Vec::new())
                        .map_err(failed("readlinkat", path))?
                        .into_bytes();
                    if target.starts_with(b"/") {
                        way.clear();
                    }
                    let steps = components_reversed(&target);
                    self.count_link_steps(steps.len() as u64)?;
                    pending.extend(steps);
                }
                _ if is_whiteout(&stat) => {
                    unlinkat(here, &*name, AtFlags::empty()).map_err(failed("unlinkat", path))?;
                    make_opaque_dir(here, &name).map_err(failed("mkdirat", path))?;
                    self.implied.push(whole);
                    pending.push(name);
                }
                _ => {
                    let path = shown(path);
                    return Err(LayerError::ParentNotDirectory { path });
                }
            }
        }
        let path = join_names(&way).into();
        Ok(match way.pop() {
            Some((fd, _)) => Dir { fd, path },
            // The links led back to the root.
            None => Dir {
                fd: open_plain(&self.root, b".").map_err(failed("openat2", b"/"))?,
                path,
            },
        })
    }

    /// Without a bound, each small entry of an archive could ask for a very long walk.
    fn count_link_steps(&mut self, steps: u64) -> Result<(), LayerError> {
        let left = self.link_steps_left.checked_sub(steps);
        self.link_steps_left = left.ok_or(LayerError::TooLarge {
            what: LimitKind::LinkSteps,
            limit: self.link_steps,
        })?;
        Ok(())
    }

    /// Path of `name` after `way`, if it is one that the kernel takes in one call.
    fn joined(
        &self,
        way: &[(OwnedFd, Vec<u8>)],
        name: &[u8],
        asked: &[u8],
    ) -> Result<Vec<u8>, LayerError> {
        let mut whole = join_names(way);
        if !whole.is_empty() {
            whole.push(b'/');
        }
        whole.extend_from_slice(name);
        let fault = if name.len() > MAX_COMPONENT {
            PathFault::ComponentTooLong
        } else if whole.len() > MAX_PATH {
            PathFault::TooLong
        } else {
            return Ok(whole);
        };
        let path = shown(asked);
        Err(LayerError::Path { path, fault })
    }

    /// Makes a directory, or keeps the one that is there; anything else there goes.
    pub(super) fn make_directory(&mut self, dir: &Dir, name: &[u8]) -> Result<(), LayerError> {
        loop {
            match mkdirat(dir, name, Mode::RWXU) {
                Ok(()) => {
                    self.inodes += 1;
                    return Ok(());
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(failed("mkdirat", &dir.join(name))(error)),
            }
            let stat = self.stat(dir, name)?;
            if stat.is_some_and(|stat| is_directory(&stat)) {
                return Ok(());
            }
            self.remove(dir, name)?;
            if stat.is_some_and(|stat| is_whiteout(&stat)) {
                // The lower directory is gone and a new one takes its place.
                make_opaque_dir(dir.as_fd(), name).map_err(failed("mkdirat", &dir.join(name)))?;
                return Ok(());
            }
        }
    }

    /// Hides `name` of lower layers.
    ///
    /// What this layer itself has by that name stays: an ordinary file hides them anyway, a
    /// directory becomes opaque. Source: OCI image specification, layer.md, "Whiteouts".
    pub(super) fn make_whiteout(&mut self, dir: &Dir, name: &[u8]) -> Result<(), LayerError> {
        match mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => {
                self.inodes += 1;
                return Ok(());
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("mknodat", &dir.join(name))(error)),
        }
        match self.stat(dir, name)? {
            Some(stat) if is_directory(&stat) => {
                make_opaque(dir.as_fd(), name).map_err(failed("fsetxattr", &dir.join(name)))
            }
            _ => Ok(()),
        }
    }

    /// Makes room for an entry that replaces an earlier one of the same name.
    pub(super) fn remove(&mut self, dir: &Dir, name: &[u8]) -> Result<(), LayerError> {
        self.replaced = true;
        // A cached descriptor may be of a directory that goes, or behind a link that goes.
        self.cache.clear();
        remove_tree(dir.as_fd(), name).map_err(failed("unlinkat", &dir.join(name)))
    }

    /// What has this name, itself if it is a link.
    pub(super) fn stat(&self, dir: &Dir, name: &[u8]) -> Result<Option<Stat>, LayerError> {
        match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(failed("fstatat", &dir.join(name))(error)),
        }
    }

    /// A directory that was unpacked, for changing it; `None` if something else replaced it.
    pub(super) fn reopen(&self, path: &[u8]) -> Result<Option<OwnedFd>, LayerError> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(&*self.root, path, flags, Mode::empty(), plain()) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(failed("openat2", path)(error)),
        }
    }
}

/// Marks the directory `name` as hiding everything of lower layers.
pub(super) fn make_opaque(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(dir, name, flags, Mode::empty())?;
    fsetxattr(fd, OPAQUE, b"y", XattrFlags::empty())
}

fn make_opaque_dir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    mkdirat(dir, name, Mode::RWXU)?;
    make_opaque(dir, name)
}

/// The character device 0/0. Source: kernel, overlayfs.rst, "whiteouts and opaque directories".
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

pub(super) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// A name from an archive, clean: components joined by single slashes; empty for the root.
///
/// An absolute name counts from the root.
pub(super) fn clean(name: &[u8]) -> Result<Vec<u8>, PathFault> {
    if name.is_empty() {
        return Err(PathFault::Empty);
    }
    if name.contains(&0) {
        return Err(PathFault::Nul);
    }
    let mut path = Vec::with_capacity(name.len());
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(PathFault::DotDot),
            _ if component.len() > MAX_COMPONENT => return Err(PathFault::ComponentTooLong),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(component);
    }
    if path.len() > MAX_PATH {
        return Err(PathFault::TooLong);
    }
    Ok(path)
}

/// Directory and last component of a clean path.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// An error of `call` for the entry `path`.
pub(super) fn failed(call: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> LayerError {
    move |error| {
        let path = shown(path);
        match error {
            Errno::NOSPC | Errno::DQUOT => LayerError::NoSpace { path },
            source => LayerError::Kernel { call, path, source },
        }
    }
}

pub(super) fn shown(path: &[u8]) -> PathBuf {
    OsStr::from_bytes(path).into()
}

fn plain() -> ResolveFlags {
    ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV
}

fn open_plain(root: &Dir, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), plain())
}

/// Components of a path or link target, the first one last.
pub(super) fn components_reversed(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|component| !matches!(*component, b"" | b"."))
        .map(<[u8]>::to_vec)
        .rev()
        .collect()
}

fn join_names(way: &[(OwnedFd, Vec<u8>)]) -> Vec<u8> {
    let names: Vec<&[u8]> = way.iter().map(|(_, name)| &**name).collect();
    names.join(&b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_clean_or_are_refused() {
        fn check(name: &[u8], expected: Result<&str, PathFault>) {
            let expected = expected.map(|path| path.as_bytes().to_vec());
            assert_eq!(clean(name), expected, "{}", name.escape_ascii());
        }
        check(b"a", Ok("a"));
        check(b"./a//b/./c/", Ok("a/b/c"));
        check(b"/a/b", Ok("a/b"));
        check(b"./", Ok(""));
        check(b"/", Ok(""));
        check(b"...", Ok("..."));
        check(b"", Err(PathFault::Empty));
        check(b"..", Err(PathFault::DotDot));
        check(b"a/../b", Err(PathFault::DotDot));
        check(b"a/..", Err(PathFault::DotDot));
        check(b"a\0b", Err(PathFault::Nul));
        check(&[b'a'; 255], Ok(&"a".repeat(255)));
        check(&[b'a'; 256], Err(PathFault::ComponentTooLong));
        check("a/".repeat(2048).as_bytes(), Ok(&"a/".repeat(2048)[..4095]));
        check("a/".repeat(2049).as_bytes(), Err(PathFault::TooLong));
    }
}
