//! Prune: what nobody asked to keep, each with the reason why it may go.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::error::ImageError;
use super::image::Image;
use super::remove_image::{drop_images, unused_layers};
use super::{Holders, Images, blobs_of};
use crate::blocking;
use crate::id::{Digest, Face, ImageId};

/// What to prune.
#[derive(Debug, Clone)]
pub struct PruneRequest {
    /// For whom: images that another face uses stay.
    pub face: Face,
    /// All images that no container uses, not only those without a tag.
    pub all: bool,
    /// Only tell what would go.
    pub dry_run: bool,
}

/// Something that went, or would go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pruned {
    /// What it is.
    pub kind: PrunedKind,
    /// Why it may go.
    pub reason: &'static str,
    /// What it takes on disk.
    pub bytes: u64,
}

/// See [`Pruned`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrunedKind {
    /// An image; its bytes are those of its layers, which are listed by themselves, so 0.
    Image {
        /// Which.
        id: ImageId,
        /// Its names.
        names: Vec<String>,
    },
    /// An unpacked layer, by diff ID.
    Layer(Digest),
    /// A complete blob.
    Blob(Digest),
    /// What an unfinished pull had fetched.
    PartialBlob(Digest),
}

impl Images {
    /// Removes images without a tag (or all unused ones), layers and blobs that nobody uses.
    ///
    /// # Errors
    /// `Store`, `Rootfs`, `Content`.
    pub async fn prune(
        &self,
        request: &PruneRequest,
        holders: Holders<'_>,
    ) -> Result<Vec<Pruned>, ImageError> {
        let inner = &self.inner;
        let planning = inner.planning.lock().await;
        let at = inner.store.snapshot();
        let leaving: Vec<Arc<Image>> = at
            .all::<Image>()
            .filter(|image| !image.is_pinned_for(request.face))
            .filter(|image| request.all || image.tags.is_empty())
            .filter(|image| (holders.image)(&at, &image.id).is_none())
            .collect();
        let mut pruned: Vec<Pruned> = leaving.iter().map(|image| pruned_image(image)).collect();
        for layer in unused_layers(inner, &at, &leaving, holders) {
            let kind = PrunedKind::Layer(layer.diff_id.clone());
            pruned.push(Pruned {
                kind,
                reason: "no image and no container uses it",
                bytes: layer.size_bytes,
            });
        }
        let content = Arc::clone(&inner.content);
        let (blobs, partial) = blocking::run("list blobs", move || {
            Ok::<_, ImageError>((content.list()?, content.list_partial()?))
        })
        .await?;
        let mut wanted = BTreeSet::new();
        for image in at.all::<Image>().filter(|image| !leaving.contains(image)) {
            wanted.extend(blobs_of(&image).cloned());
        }
        for (digest, bytes) in blobs
            .into_iter()
            .filter(|(digest, _)| !wanted.contains(digest))
        {
            pruned.push(Pruned {
                kind: PrunedKind::Blob(digest),
                reason: "no image needs it",
                bytes,
            });
        }
        for (digest, bytes) in partial {
            pruned.push(Pruned {
                kind: PrunedKind::PartialBlob(digest),
                reason: "its pull did not finish",
                bytes,
            });
        }
        if request.dry_run {
            return Ok(pruned);
        }
        let dropped = drop_images(inner, &at, &leaving, request.face, holders).await?;
        let (content, listed) = (Arc::clone(&inner.content), pruned.clone());
        blocking::run("remove blobs", move || {
            listed.iter().try_for_each(|pruned| match &pruned.kind {
                PrunedKind::Blob(digest) => content.remove(digest),
                PrunedKind::PartialBlob(digest) => content.remove_partial(digest),
                PrunedKind::Image { .. } | PrunedKind::Layer(_) => Ok(()),
            })
        })
        .await?;
        drop(planning);
        dropped.delete(inner).await?;
        Ok(pruned)
    }
}

fn pruned_image(image: &Image) -> Pruned {
    let names = image.names().map(str::to_owned).collect();
    let reason = if image.tags.is_empty() {
        "it has no tag"
    } else {
        "no container uses it"
    };
    Pruned {
        kind: PrunedKind::Image {
            id: image.id.clone(),
            names,
        },
        reason,
        bytes: 0,
    }
}
