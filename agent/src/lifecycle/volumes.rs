//! What of images is mounted in a container beside its root: other images that it asks for, and
//! directories of its own where its image asks for volumes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Lifecycle, LifecycleError,
    container::{ContainerConfig, MountSource},
    create_container::layers,
    spec,
};
use crate::{
    blocking,
    id::{ContainerId, ImageId},
    image::Image,
    rootfs::{Layer, Rootfs},
    store::Snapshot,
};

/// Both kinds.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Volumes {
    /// Images to mount, by what the wish names them.
    images: BTreeMap<String, MountedImage>,
    /// Where the image asks for volumes, by their numbers.
    own: Vec<PathBuf>,
}

#[derive(Clone, Serialize, Deserialize)]
struct MountedImage {
    id: ImageId,
    layers: Vec<Layer>,
}

impl Lifecycle {
    /// Finds the images that `config` mounts, and the volumes that `image` asks for.
    ///
    /// # Errors
    /// `ImageVolume`, `Spec`.
    pub(super) fn plan_volumes(
        &self,
        at: &Snapshot,
        config: &ContainerConfig,
        image: &Image,
    ) -> Result<Volumes, LifecycleError> {
        let mut images = BTreeMap::new();
        for (target, reference, _) in image_mounts(config) {
            let found = self
                .mounted_image(at, reference)
                .map_err(image_volume(reference, target))?;
            images.insert(reference.to_owned(), found);
        }
        Ok(Volumes {
            images,
            own: spec::image_volumes(&image.config, config)?,
        })
    }

    fn mounted_image(
        &self,
        at: &Snapshot,
        reference: &str,
    ) -> Result<MountedImage, LifecycleError> {
        let missing = || LifecycleError::ImageMissing {
            reference: reference.to_owned(),
        };
        let image = self.images.find(at, reference)?.ok_or_else(missing)?;
        Ok(MountedImage {
            id: image.id.clone(),
            layers: layers(at, &image)?,
        })
    }
}

/// Target, reference and sub path of the mounts that are of images.
fn image_mounts(config: &ContainerConfig) -> impl Iterator<Item = (&Path, &str, &str)> {
    config
        .mounts
        .iter()
        .filter_map(|mount| match &mount.source {
            MountSource::Image {
                reference,
                sub_path,
            } => Some((&*mount.target, &**reference, &**sub_path)),
            MountSource::Bind { .. } | MountSource::Tmpfs { .. } => None,
        })
}

fn image_volume(reference: &str, target: &Path) -> impl FnOnce(LifecycleError) -> LifecycleError {
    move |source| LifecycleError::ImageVolume {
        reference: reference.to_owned(),
        target: target.to_owned(),
        source: Box::new(source),
    }
}

impl Volumes {
    /// Layers of the images.
    pub(super) fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.images.values().flat_map(|image| &image.layers)
    }

    /// The images, by what the wish names them.
    pub(super) fn mounted_images(&self) -> BTreeMap<String, ImageId> {
        self.images
            .iter()
            .map(|(reference, image)| (reference.clone(), image.id.clone()))
            .collect()
    }

    /// What each mount of an image is made of, by its target. Sub paths are resolved here, in layers
    /// that never change, so that the mount itself walks no link of an image. Blocking.
    ///
    /// # Errors
    /// `ImageVolume`.
    pub(super) fn directories(
        &self,
        rootfs: &Rootfs,
        config: &ContainerConfig,
    ) -> Result<BTreeMap<PathBuf, Vec<PathBuf>>, LifecycleError> {
        let mut mounts = BTreeMap::new();
        for (target, reference, sub_path) in image_mounts(config) {
            let layers = self.images.get(reference).map(|image| &*image.layers);
            let found = rootfs.directories(layers.unwrap_or_default(), sub_path);
            let dirs = found
                .map_err(LifecycleError::from)
                .and_then(|dirs| {
                    dirs.ok_or_else(|| LifecycleError::SubPathMissing {
                        sub_path: sub_path.to_owned(),
                    })
                })
                .map_err(image_volume(reference, target))?;
            mounts.insert(target.to_owned(), dirs);
        }
        Ok(mounts)
    }

    /// Directories of the container's own volumes, by target.
    pub(super) fn own(&self, rootfs: &Rootfs, id: &ContainerId) -> BTreeMap<PathBuf, PathBuf> {
        self.own
            .iter()
            .enumerate()
            .map(|(number, target)| (target.clone(), rootfs.volume(id, number)))
            .collect()
    }

    /// Makes the container's own volumes with what its image has there; its writable layer exists.
    ///
    /// # Errors
    /// `Rootfs`.
    pub(super) async fn fill(
        self,
        rootfs: Rootfs,
        id: ContainerId,
        layers: Vec<Layer>,
    ) -> Result<(), LifecycleError> {
        if self.own.is_empty() {
            return Ok(());
        }
        blocking::run_bulk("fill volumes", move || {
            for (number, target) in self.own.iter().enumerate() {
                // Targets are made from text.
                let path = target.to_string_lossy();
                rootfs.create_volume(&id, number, &layers, &path)?;
            }
            Ok(())
        })
        .await
    }
}
