//! How a root file system is put together.

use std::path::PathBuf;

use super::{Layer, Rootfs, visible, writable::Writable};
use crate::id::ContainerId;

/// An overlay for one container; whoever makes its mount namespace mounts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootPlan {
    /// Directory that `lower` is relative to.
    pub layers_dir: PathBuf,
    /// Lower directories, topmost first; short, since older kernels take them in one page.
    pub lower: Vec<String>,
    /// What the container writes.
    pub upper: PathBuf,
    /// Overlayfs' own, on the file system of `upper`.
    pub work: PathBuf,
}

impl Rootfs {
    /// The overlay of `container` over these layers, base first.
    ///
    /// Layers below one with an opaque root are left out: overlayfs merges roots whatever they
    /// are marked with.
    pub fn plan(&self, container: &ContainerId, layers_base_first: &[Layer]) -> RootPlan {
        let Writable { upper, work, .. } = self.writable(container);
        RootPlan {
            layers_dir: self.inner.layers.path.clone(),
            lower: visible(layers_base_first)
                .map(|layer| layer.dir.to_string())
                .collect(),
            upper,
            work,
        }
    }
}
