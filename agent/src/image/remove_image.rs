//! RemoveImage: names, then the record, then layers and blobs that nobody else uses.
//!
//! The record goes first, in one commit with those of its layers; directories follow, and the next
//! start takes what a killed agent leaves of them. Layers below running containers stay: they go with
//! the last container, through `release_layers`.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use super::error::ImageError;
use super::image::Image;
use super::{Holders, Images, Inner, blobs_in_use, blobs_of, find};
use crate::blocking;
use crate::event::{EventDraft, EventKind};
use crate::id::{Digest, Face, ImageId};
use crate::rootfs::Layer;
use crate::store::{Changes, Snapshot};

/// A wish to be rid of an image.
#[derive(Debug, Clone)]
pub struct RemoveRequest {
    /// Id, reference or beginning of an id.
    pub name: String,
    /// For whom: another face keeps what it uses.
    pub face: Face,
    /// Given one tag of several: remove only that name.
    pub only_this_name: bool,
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// There was no such image.
    Absent,
    /// The image is gone.
    Removed(ImageId),
    /// The image has lost this name and keeps others.
    Untagged(ImageId),
    /// The image stays for another face.
    KeptFor(ImageId, Face),
}

impl Images {
    /// Removes an image, or one of its names; that it is not here is fine.
    ///
    /// # Errors
    /// `Reference` and `Ambiguous` for the name, `InUse` with the holder, `Store`, `Rootfs`.
    pub async fn remove(
        &self,
        request: &RemoveRequest,
        holders: Holders<'_>,
    ) -> Result<Removal, ImageError> {
        let inner = &self.inner;
        let planning = inner.planning.lock().await;
        let at = inner.store.snapshot();
        let Some(image) = find(&at, &request.name)? else {
            return Ok(Removal::Absent);
        };
        let id = image.id.clone();
        if let Some(other) = image
            .faces
            .iter()
            .find(|face| **face != request.face)
            .copied()
        {
            if image.faces.contains(&request.face) {
                let mut left = Image::clone(&image);
                left.faces.remove(&request.face);
                inner
                    .store
                    .commit(Changes::new().put(left).durable())
                    .await?;
            }
            return Ok(Removal::KeptFor(id, other));
        }
        if let Some(tag) = one_of_many_tags(&image, request) {
            let mut left = Image::clone(&image);
            left.tags.remove(&tag);
            let changes = Changes::new()
                .put(left)
                .event(untagged(&image.id, request.face, &tag))
                .durable();
            inner.store.commit(changes).await?;
            return Ok(Removal::Untagged(id));
        }
        if let Some(holder) = (holders.image)(&at, &id) {
            return Err(ImageError::InUse { image: id, holder });
        }
        let dropped = drop_images(inner, &at, &[image], request.face, holders).await?;
        drop(planning);
        dropped.delete(inner).await?;
        Ok(Removal::Removed(id))
    }

    /// Removes layers that no image and no container uses any more, e.g. after the last container of
    /// a removed image went. Returns how many bytes that freed.
    ///
    /// # Errors
    /// `Store`, `Rootfs`.
    pub async fn release_layers(&self, holders: Holders<'_>) -> Result<u64, ImageError> {
        let inner = &self.inner;
        let planning = inner.planning.lock().await;
        let at = inner.store.snapshot();
        let dropped = drop_images(inner, &at, &[], Face::Native, holders).await?;
        drop(planning);
        let freed = dropped.layers.iter().map(|layer| layer.size_bytes).sum();
        dropped.delete(inner).await?;
        Ok(freed)
    }
}

/// Returns the tag that alone is meant by the request.
fn one_of_many_tags(image: &Image, request: &RemoveRequest) -> Option<String> {
    if !request.only_this_name || image.tags.len() < 2 {
        return None;
    }
    let name = request.name.parse::<super::Reference>().ok()?.to_string();
    image.tags.contains(&name).then_some(name)
}

fn untagged(id: &ImageId, face: Face, name: &str) -> EventDraft {
    EventDraft::new(EventKind::ImageUntagged, face)
        .image(id)
        .attribute("reference", name)
}

/// What is no longer recorded and still on disk.
pub(super) struct Dropped {
    pub(super) layers: Vec<Arc<Layer>>,
    blobs: Vec<Digest>,
}

/// Returns the layers that nobody would use if `images` were gone.
pub(super) fn unused_layers(
    inner: &Inner,
    at: &Snapshot,
    images: &[Arc<Image>],
    holders: Holders<'_>,
) -> Vec<Arc<Layer>> {
    let leaving: HashSet<&ImageId> = images.iter().map(|image| &image.id).collect();
    let mut used = (holders.layers)(at);
    for image in at
        .all::<Image>()
        .filter(|image| !leaving.contains(&image.id))
    {
        used.extend(image.layers.iter().cloned());
    }
    at.all::<Layer>()
        .filter(|layer| !used.contains(&layer.diff_id) && !inner.leases.holds(&layer.diff_id))
        .collect()
}

/// Removes the records of `images` and of all layers that nobody uses then; holding the planning lock.
pub(super) async fn drop_images(
    inner: &Inner,
    at: &Snapshot,
    images: &[Arc<Image>],
    face: Face,
    holders: Holders<'_>,
) -> Result<Dropped, ImageError> {
    let mut layers = unused_layers(inner, at, images, holders);
    if images.is_empty() && layers.is_empty() {
        return Ok(Dropped {
            layers,
            blobs: Vec::new(),
        });
    }
    let mut changes = Changes::new();
    for image in images {
        for tag in &image.tags {
            changes = changes.event(untagged(&image.id, face, tag));
        }
        let removed = EventDraft::new(EventKind::ImageRemoved, face).image(&image.id);
        changes = changes.delete::<Image>(image.id.as_str()).event(removed);
    }
    for layer in &layers {
        changes = changes.delete::<Layer>(layer.diff_id.as_str());
    }
    let after = inner.store.commit(changes.durable()).await?;
    // A container that was admitted meanwhile has its layers back before anything is deleted.
    let held = (holders.layers)(&after);
    let back: Vec<Arc<Layer>> = layers
        .iter()
        .filter(|layer| held.contains(&layer.diff_id))
        .cloned()
        .collect();
    if !back.is_empty() {
        let changes = back.iter().fold(Changes::new(), |changes, layer| {
            changes.put(Layer::clone(layer))
        });
        inner.store.commit(changes.durable()).await?;
        layers.retain(|layer| !held.contains(&layer.diff_id));
    }
    let wanted = blobs_in_use(&after);
    let mut blobs = BTreeSet::new();
    for image in images {
        blobs.extend(
            blobs_of(image)
                .filter(|digest| !wanted.contains(digest))
                .cloned(),
        );
    }
    // Blobs go under the lock: a pull of the same image writes them under it.
    let (content, leaving) = (Arc::clone(&inner.content), blobs.clone());
    blocking::run("remove blobs", move || {
        leaving.iter().try_for_each(|digest| content.remove(digest))
    })
    .await?;
    Ok(Dropped {
        layers,
        blobs: blobs.into_iter().collect(),
    })
}

impl Dropped {
    /// Deletes the directories. It runs to its end also when the caller goes away.
    pub(super) async fn delete(self, inner: &Inner) -> Result<(), ImageError> {
        let rootfs = inner.rootfs.clone();
        tracing::debug!(
            layers = self.layers.len(),
            blobs = self.blobs.len(),
            "removing what no image uses"
        );
        blocking::run_bulk("remove layers", move || {
            let mut result = Ok(());
            for layer in &self.layers {
                let removed = rootfs.remove_layer(layer.dir);
                let failed = |source| ImageError::Rootfs {
                    action: "remove a layer",
                    source,
                };
                result = result.and(removed.map_err(failed));
            }
            result
        })
        .await
    }
}
