//! What a container writes above the layers of its image.

use std::path::PathBuf;

use rustix::{
    fd::AsFd,
    fs::{AtFlags, Gid, Mode, OFlags, Uid, chmodat, chownat, mkdirat, openat},
    io::Errno,
};

use super::{Rootfs, RootfsError, Usage, remove, usage, volume::VOLUMES};
use crate::id::ContainerId;

pub(super) struct Writable {
    pub(super) dir: PathBuf,
    pub(super) upper: PathBuf,
    pub(super) work: PathBuf,
}

impl Rootfs {
    pub(super) fn writable(&self, container: &ContainerId) -> Writable {
        let dir = self.inner.containers.path.join(container.as_str());
        Writable {
            upper: dir.join("upper"),
            work: dir.join("work"),
            dir,
        }
    }

    /// Makes an empty writable layer whose root directory belongs to `owner` (user, group);
    /// repeating it changes nothing.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn create_writable(
        &self,
        container: &ContainerId,
        owner: (u32, u32),
    ) -> Result<(), RootfsError> {
        let place = &self.inner.containers;
        let id = container.as_str();
        // The upper directory is the container's root directory, so its mode is not ours alone.
        for (name, mode) in [
            (id.to_owned(), 0o700),
            (format!("{id}/upper"), 0o755),
            (format!("{id}/work"), 0o700),
        ] {
            let mode = Mode::from_raw_mode(mode);
            match mkdirat(&place.fd, &*name, mode) {
                Ok(()) => chmodat(&place.fd, &*name, mode, AtFlags::empty())
                    .map_err(RootfsError::kernel("fchmodat", place.path.join(name)))?,
                Err(Errno::EXIST) => {}
                Err(error) => {
                    return Err(RootfsError::kernel("mkdirat", place.path.join(name))(error));
                }
            }
        }
        // Without owners on disk that a user namespace maps, its root could not even look into it.
        let upper = format!("{id}/upper");
        let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
        chownat(
            &place.fd,
            &*upper,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(RootfsError::kernel("fchownat", place.path.join(upper)))
    }

    /// Removes a writable layer; absent is fine, repeating it too; blocking.
    ///
    /// # Errors
    /// `Busy` while something is mounted in it, `Kernel`.
    pub fn remove_writable(&self, container: &ContainerId) -> Result<(), RootfsError> {
        let place = &self.inner.containers;
        remove::remove_tree(place.fd.as_fd(), container.as_str()).map_err(|error| match error {
            Errno::BUSY => RootfsError::Busy {
                container: container.clone(),
            },
            error => RootfsError::kernel("unlinkat", self.writable(container).dir)(error),
        })
    }

    /// What a container has written: its upper directory and its volumes, files with several names
    /// counted once.
    ///
    /// Nothing if there is no such writable layer. Blocking: it walks the trees.
    ///
    /// # Errors
    /// `Changing` if the container moves directories about faster than they are counted;
    /// `Kernel`.
    pub fn writable_usage(&self, container: &ContainerId) -> Result<Usage, RootfsError> {
        let upper = self.tree_usage(container, "upper")?;
        let volumes = self.tree_usage(container, VOLUMES)?;
        Ok(Usage {
            bytes: upper.bytes + volumes.bytes,
            inodes: upper.inodes + volumes.inodes,
        })
    }

    fn tree_usage(&self, container: &ContainerId, part: &str) -> Result<Usage, RootfsError> {
        let path = self.writable(container).dir.join(part);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = format!("{container}/{part}");
        let dir = match openat(&self.inner.containers.fd, name, flags, Mode::empty()) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return Ok(Usage::default()),
            Err(error) => return Err(RootfsError::kernel("openat", path)(error)),
        };
        match usage::of_tree(&dir) {
            Ok(Some(usage)) => Ok(usage),
            Ok(None) => Err(RootfsError::Changing { path }),
            Err(error) => Err(RootfsError::kernel("getdents64", path)(error)),
        }
    }
}
