//! Root file systems: layers, unpacked once each, and what containers write above them.
//!
//! ```text
//!  DATA/layers/7/              one layer, by number; named by its `Layer` record
//!  DATA/layers/tmp-…/          being unpacked, or being removed
//!  DATA/containers/<id>/upper  what a container wrote
//!  DATA/containers/<id>/work   overlayfs' own
//!  DATA/containers/<id>/volumes/0  a volume that its image asks for
//! ```
//! - A numbered directory is complete and durable; it is reachable once a record names it, and
//!   its content never changes.
//! - Everything without a record is garbage after a restart: [`Rootfs::recover`] removes it.
//! - Both directories have mode 0700: set-user-ID programs and devices of images are nothing
//!   that users of the host can reach.
//! - Mounting is not done here: [`RootPlan`] says how, the shim's child does it.

mod canonical;
mod error;
mod id_map;
mod layer;
mod merge;
mod mount;
mod remove;
mod system;
mod tar;
mod tree;
mod usage;
mod volume;
mod writable;

use std::{
    ffi::OsString,
    io,
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{
        AtFlags, Mode, OFlags, RenameFlags, fchmod, fsync, mkdirat, openat, renameat_with, statat,
        syncfs,
    },
    io::Errno,
};

pub use self::{
    error::{HeaderFault, LayerError, LimitKind, PathFault, RootfsError},
    id_map::{IdMapsMissing, can_map_layers},
    layer::{Layer, LayerDir, Limits, Unpacked, unpack},
    mount::RootPlan,
    system::{RootShape, SmallFiles, UnpackedRoot, read_small_files, unpack_root},
    usage::Usage,
};
use crate::{
    id::ContainerId,
    store::{Snapshot, Store},
};

/// Prefix of what is in a layer's way to or from its number.
const UNFINISHED: &str = "tmp-";

/// Root file systems below one data directory; clones share it.
#[derive(Clone)]
pub struct Rootfs {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    layers: Place,
    containers: Place,
    /// The number that the next layer tries first.
    next: Mutex<u32>,
}

/// A directory of ours.
struct Place {
    path: PathBuf,
    fd: OwnedFd,
}

impl Place {
    fn open(path: PathBuf) -> Result<Self, RootfsError> {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path);
        made.map_err(|error| kernel_error("mkdir", &path, &error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(RootfsError::kernel("open", &path))?;
        // Whoever made it before us.
        fchmod(&fd, Mode::RWXU).map_err(RootfsError::kernel("fchmod", &path))?;
        Ok(Self { path, fd })
    }

    fn names(&self) -> Result<Vec<OsString>, RootfsError> {
        let list = || -> io::Result<Vec<OsString>> {
            std::fs::read_dir(&self.path)?
                .map(|entry| Ok(entry?.file_name()))
                .collect()
        };
        list().map_err(|error| kernel_error("getdents64", &self.path, &error))
    }

    fn sync(&self) -> Result<(), RootfsError> {
        fsync(&self.fd).map_err(RootfsError::kernel("fsync", &self.path))
    }
}

/// What is on disk, for comparing it with the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Numbers of finished layers.
    pub layers: Vec<u32>,
    /// Names of layers being unpacked or removed.
    pub unfinished: Vec<String>,
    /// Containers with a writable layer.
    pub writables: Vec<ContainerId>,
    /// What should not be there.
    pub strange: Vec<PathBuf>,
}

impl Rootfs {
    /// Opens or makes the directories below `data_dir`; blocking.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn open(data_dir: &Path, store: Store) -> Result<Self, RootfsError> {
        let layers = Place::open(data_dir.join("layers"))?;
        let containers = Place::open(data_dir.join("containers"))?;
        let numbers = layers
            .names()?
            .into_iter()
            .filter_map(|name| layer_number(&name));
        let next = numbers.max().unwrap_or(0) + 1;
        Ok(Self {
            inner: Arc::new(Inner {
                store,
                layers,
                containers,
                next: Mutex::new(next),
            }),
        })
    }

    /// Removes what an earlier agent left unfinished: layers being unpacked or removed, and
    /// finished ones that no record names. Call it before the first pull; blocking.
    ///
    /// Returns how many directories went.
    ///
    /// # Errors
    /// The first `Kernel` one; the others are removed all the same.
    pub fn recover(&self) -> Result<usize, RootfsError> {
        let snapshot = self.inner.store.snapshot();
        let known: Vec<u32> = snapshot.all::<Layer>().map(|layer| layer.dir).collect();
        let Inventory {
            layers, unfinished, ..
        } = self.inventory()?;
        let lost = layers.into_iter().filter(|dir| !known.contains(dir));
        let names: Vec<String> = unfinished
            .into_iter()
            .chain(lost.map(|dir| dir.to_string()))
            .collect();
        let mut result = Ok(names.len());
        for name in names {
            let path = self.inner.layers.path.join(&name);
            tracing::warn!(path = %path.display(), "removing an unfinished layer");
            if let Err(error) = remove::remove_tree(self.inner.layers.fd.as_fd(), &*name) {
                result = result.and(Err(RootfsError::kernel("unlinkat", path)(error)));
            }
        }
        result
    }

    /// An empty directory to unpack a layer into. It ends with `finish_layer` or
    /// `discard_layer`; a restart removes it.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn begin_layer(&self) -> Result<LayerDir, RootfsError> {
        let layers = &self.inner.layers;
        let path = layers
            .path
            .join(format!("{UNFINISHED}{:016x}", rand::random::<u64>()));
        let name = file_name(&path);
        mkdirat(&layers.fd, name, Mode::RWXU).map_err(RootfsError::kernel("mkdirat", &path))?;
        LayerDir::open(&path).map_err(|error| kernel_error("open", &path, &error))
    }

    /// Makes an unpacked layer durable and gives it its number; blocking.
    ///
    /// The caller commits the record; until then a restart removes the layer.
    ///
    /// # Errors
    /// `Kernel`; the layer is then gone.
    pub fn finish_layer(&self, dir: LayerDir, unpacked: &Unpacked) -> Result<Layer, RootfsError> {
        let mut layers = self.finish_layers(vec![(dir, unpacked.clone())])?;
        Ok(layers.remove(0))
    }

    /// `finish_layer` for several, in order, at the price of one.
    ///
    /// # Errors
    /// `Kernel`; all of them are then gone.
    pub fn finish_layers(
        &self,
        unpacked: Vec<(LayerDir, Unpacked)>,
    ) -> Result<Vec<Layer>, RootfsError> {
        let mut layers = Vec::new();
        let result = self.number_all(&unpacked, &mut layers);
        if let Err(error) = result {
            for (dir, _) in &unpacked {
                self.discard(&dir.path);
            }
            for layer in layers {
                self.discard(&self.inner.layers.path.join(layer.dir.to_string()));
            }
            return Err(error);
        }
        Ok(layers)
    }

    fn number_all(
        &self,
        unpacked: &[(LayerDir, Unpacked)],
        layers: &mut Vec<Layer>,
    ) -> Result<(), RootfsError> {
        // Content before names: a number must never show half of a layer after power loss.
        syncfs(&self.inner.layers.fd)
            .map_err(RootfsError::kernel("syncfs", &self.inner.layers.path))?;
        for (dir, unpacked) in unpacked {
            layers.push(self.give_number(dir, unpacked)?);
        }
        self.inner.layers.sync()
    }

    fn give_number(&self, dir: &LayerDir, unpacked: &Unpacked) -> Result<Layer, RootfsError> {
        let place = &self.inner.layers;
        let mut next = self
            .inner
            .next
            .lock()
            .expect("no panic while this lock is held");
        loop {
            let number = *next;
            *next += 1;
            let (old, new) = (file_name(&dir.path), number.to_string());
            match renameat_with(&place.fd, old, &place.fd, new, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    return Ok(Layer {
                        diff_id: unpacked.diff_id.clone(),
                        dir: number,
                        size_bytes: unpacked.size_bytes,
                        inodes: unpacked.inodes,
                        opaque: unpacked.opaque,
                    });
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(RootfsError::kernel("renameat2", &dir.path)(error)),
            }
        }
    }

    /// Removes a layer that nobody wants any more, unpacked or not; blocking.
    pub fn discard_layer(&self, dir: LayerDir) {
        self.discard(&dir.path);
    }

    fn discard(&self, path: &Path) {
        let removed = remove::remove_tree(self.inner.layers.fd.as_fd(), file_name(path));
        if let Err(error) = removed {
            // The next start tries again.
            tracing::warn!(path = %path.display(), %error, "an unfinished layer stays on disk");
        }
    }

    /// Removes a finished layer, whose record must be gone already; absent is fine; blocking.
    ///
    /// # Errors
    /// `Kernel`; the rest goes with the next start.
    pub fn remove_layer(&self, dir: u32) -> Result<(), RootfsError> {
        let place = &self.inner.layers;
        let name = dir.to_string();
        // A number never shows half of a layer.
        let leaving = format!("{UNFINISHED}{:016x}", rand::random::<u64>());
        match renameat_with(
            &place.fd,
            &*name,
            &place.fd,
            &*leaving,
            RenameFlags::NOREPLACE,
        ) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => {
                return Err(RootfsError::kernel("renameat2", place.path.join(name))(
                    error,
                ));
            }
        }
        remove::remove_tree(place.fd.as_fd(), &*leaving)
            .map_err(RootfsError::kernel("unlinkat", place.path.join(leaving)))
    }

    /// Content of the file `path` as a container over these layers (base first) would see it, so
    /// with whiteouts, opaque directories and links inside the root; `None` if there is none.
    ///
    /// # Errors
    /// `NotAFile` for a directory, device or fifo, `FileTooLarge` above `max_bytes`,
    /// `SymlinkLoop`, `LayerLost`, `Kernel`.
    pub fn read_file(
        &self,
        layers_base_first: &[Layer],
        path: &str,
        max_bytes: usize,
    ) -> Result<Option<Vec<u8>>, RootfsError> {
        merge::read_file(self.open_layers(layers_base_first)?, path, max_bytes)
    }

    /// [`Self::read_file`] with what a container has written above the layers.
    ///
    /// # Errors
    /// As [`Self::read_file`].
    pub fn read_written_file(
        &self,
        container: &ContainerId,
        layers_base_first: &[Layer],
        path: &str,
        max_bytes: usize,
    ) -> Result<Option<Vec<u8>>, RootfsError> {
        let mut merged = self.open_layers(layers_base_first)?;
        let upper = self.writable(container).upper;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&upper, flags, Mode::empty())
            .map_err(RootfsError::kernel("open", &upper))?;
        merged.insert(0, merge::Part { fd, path: upper });
        merge::read_file(merged, path, max_bytes)
    }

    /// Whether `path` of an image is a file that can be executed, links followed inside it.
    ///
    /// # Errors
    /// `SymlinkLoop`, `LayerLost`, `Kernel`.
    pub fn is_program(&self, layers_base_first: &[Layer], path: &str) -> Result<bool, RootfsError> {
        merge::is_program(self.open_layers(layers_base_first)?, path)
    }

    /// The directories of layers that together are the directory `path` of an image, topmost first:
    /// what a read-only overlay of it is made of. Links are followed inside the image; empty is the
    /// whole image. `None` if there is nothing.
    ///
    /// # Errors
    /// `NotADirectory`, `SymlinkLoop`, `LayerLost`, `Kernel`.
    pub fn directories(
        &self,
        layers_base_first: &[Layer],
        path: &str,
    ) -> Result<Option<Vec<PathBuf>>, RootfsError> {
        let found = merge::directory(self.open_layers(layers_base_first)?, path)?;
        let absolute = |part: merge::Part| self.inner.layers.path.join(part.path);
        Ok(found.map(|parts| parts.into_iter().map(absolute).collect()))
    }

    /// Writes small files and, below `rootfs/`, the tree of `layer` to `out` as one tar; blocking.
    ///
    /// # Errors
    /// `LayerLost`, `Layer`, also when `out` takes nothing more.
    pub fn write_unified(
        &self,
        layer: &Layer,
        files: &[(String, Vec<u8>)],
        out: impl io::Write,
        cancelled: &AtomicBool,
    ) -> Result<(), RootfsError> {
        let root = self.open_layer(layer)?.fd;
        canonical::write_unified(root.as_fd(), files, out, cancelled)?;
        Ok(())
    }

    fn open_layers(&self, layers_base_first: &[Layer]) -> Result<merge::Merged, RootfsError> {
        visible(layers_base_first)
            .map(|layer| self.open_layer(layer))
            .collect()
    }

    fn open_layer(&self, layer: &Layer) -> Result<merge::Part, RootfsError> {
        let place = &self.inner.layers;
        let name = layer.dir.to_string();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(&place.fd, &*name, flags, Mode::empty()) {
            Ok(fd) => Ok(merge::Part {
                fd,
                path: name.into(),
            }),
            Err(Errno::NOENT) => Err(RootfsError::LayerLost {
                diff_id: layer.diff_id.clone(),
                dir: layer.dir,
            }),
            Err(error) => Err(RootfsError::kernel("openat", place.path.join(name))(error)),
        }
    }

    /// What all layers take on disk; memory only.
    pub fn fs_usage(&self) -> Usage {
        layers_usage(&self.inner.store.snapshot())
    }

    /// Whether the directory of `layer` is there.
    pub fn has_layer(&self, layer: &Layer) -> bool {
        let name = layer.dir.to_string();
        statat(&self.inner.layers.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Lists what is on disk; blocking.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn inventory(&self) -> Result<Inventory, RootfsError> {
        let mut inventory = Inventory::default();
        for name in self.inner.layers.names()? {
            if let Some(number) = layer_number(&name) {
                inventory.layers.push(number);
            } else if name.as_bytes().starts_with(UNFINISHED.as_bytes()) {
                let name = String::from_utf8_lossy(name.as_bytes()).into_owned();
                inventory.unfinished.push(name);
            } else {
                inventory.strange.push(self.inner.layers.path.join(name));
            }
        }
        for name in self.inner.containers.names()? {
            match name.to_str().map(str::parse) {
                Some(Ok(id)) => inventory.writables.push(id),
                _ => inventory
                    .strange
                    .push(self.inner.containers.path.join(name)),
            }
        }
        inventory.layers.sort_unstable();
        inventory.unfinished.sort_unstable();
        inventory.writables.sort_unstable();
        Ok(inventory)
    }
}

fn layers_usage(snapshot: &Snapshot) -> Usage {
    snapshot
        .all::<Layer>()
        .fold(Usage::default(), |sum, layer| Usage {
            bytes: sum.bytes + layer.size_bytes,
            inodes: sum.inodes + layer.inodes,
        })
}

/// Layers that something can be seen of, topmost first: none below an opaque one.
fn visible(layers_base_first: &[Layer]) -> impl Iterator<Item = &Layer> {
    let lowest = layers_base_first.iter().rposition(|layer| layer.opaque);
    layers_base_first[lowest.unwrap_or(0)..].iter().rev()
}

/// A number as we write it, so that no two names mean the same one.
fn layer_number(name: &OsString) -> Option<u32> {
    let number: u32 = name.to_str()?.parse().ok()?;
    (*number.to_string() == **name).then_some(number)
}

fn file_name(path: &Path) -> &std::ffi::OsStr {
    path.file_name().unwrap_or_default()
}

fn kernel_error(call: &'static str, path: &Path, error: &io::Error) -> RootfsError {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    RootfsError::kernel(call, path)(errno)
}

#[cfg(test)]
mod tests;
