//! Images: what a reference means, how its content gets here, and when it goes.
//!
//! ```text
//! pull_image     resolve -> fetch + unpack all layers while they stream -> commit
//!   source/      registries, mirrors, credentials, remotes  (the network)
//!   system/      distributions' images: root trees that become images of one layer
//!   stream       partial blob, channel, hash, decompress    (a blocking lane)
//!   unpacking    each layer once, whoever wants it          (rootfs)
//! list_remote_images   what remotes offer
//! import_image   files that a caller sends
//! export_image   the same, the other way round
//! remove_image   names, record, and layers that nobody else uses
//! gc             the same for what nobody asked for, with reasons
//! content        manifests, configurations, partial blobs   (blobs/)
//! ```
//! Invariants: an [`Image`] record exists only when all of its layers are durable, and comes in the
//! same commit as theirs. Records are changed under one lock (`planning`), so a name has one meaning.
//! Secrets are in memory only, in types that can't be printed.

mod config;
mod content;
mod error;
mod export_image;
mod gc;
#[allow(clippy::module_inception)] // the record, named for what it is
mod image;
mod import_image;
mod lease;
mod list_remote_images;
mod manifest;
mod progress;
mod pull_image;
mod reference;
mod remove_image;
mod source;
mod stream;
mod system;
mod unpacking;

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;

pub use self::config::ImageChapterConfig;
pub use self::error::{EndpointFailure, ImageError};
pub use self::export_image::{Export, ExportPacking};
pub use self::gc::{PruneRequest, Pruned, PrunedKind};
pub use self::image::{Image, ImageConfig};
pub use self::import_image::{ImportRequest, ImportSizes, Imported};
pub use self::list_remote_images::{RemoteFilter, RemoteImage};
pub use self::manifest::{Platform, PlatformError};
pub use self::progress::{LayerProgress, LayerState, PullProgress, PullStage};
pub use self::pull_image::{Pull, PullRequest, Pulled, RunningPull};
pub use self::reference::{ImageRef, RefPart, ReferenceError};
pub use self::remove_image::{Removal, RemoveRequest};
pub use self::source::auth::{AuthError, AuthParts, RegistryAuth, Secret};
pub use self::source::hosts::{HostConfig, HostsConfig};
pub use self::source::remotes::{Protocol, RemoteConfig, RemotesConfig};
pub use self::system::SYSTEM_LABEL;
pub use self::system::metadata::Template;
pub use self::system::reference::{Reference, RemoteRef};

use self::content::Content;
use self::lease::Leases;
use self::pull_image::{PullKey, Running};
use self::source::http::Http;
use self::source::registry::Registries;
use self::source::remotes::Remotes;
use self::unpacking::Unpacking;
use crate::blocking;
use crate::event::{EventDraft, EventKind};
use crate::id::{Digest, Face, ImageId};
use crate::rootfs::{Layer, Rootfs};
use crate::store::{Changes, Snapshot, Store};

/// Shortest text that is taken for the beginning of an id, in hexadecimal digits.
const ID_PREFIX_MIN: usize = 3;
/// Layers of all pulls that are unpacked at once.
const UNPACKERS_MAX: usize = 6;
const AMBIGUOUS_MATCHES_MAX: usize = 10;

/// The images of this node; clones share it.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    rootfs: Rootfs,
    content: Arc<Content>,
    registries: Arc<Registries>,
    remotes: Remotes,
    config: ImageChapterConfig,
    data_dir: PathBuf,
    /// Held from looking at records to having changed them.
    planning: tokio::sync::Mutex<()>,
    leases: Leases,
    unpacking: Unpacking,
    /// Fewer than the bulk lane has places: registries that stop in the middle of a layer must not
    /// keep removals and commits out of it.
    unpackers: tokio::sync::Semaphore,
    pulls: Mutex<HashMap<PullKey, Weak<Running>>>,
    /// Imports under way.
    imports: AtomicUsize,
}

/// Who counts on images and their layers, beside the images themselves.
///
/// Both are asked with the state that is being changed, so they see what the change sees.
#[derive(Clone, Copy)]
pub struct Holders<'a> {
    /// Who uses this image, e.g. `container/<id>`; removal is then refused.
    pub image: &'a (dyn Fn(&Snapshot, &ImageId) -> Option<String> + Send + Sync),
    /// Diff IDs of the layers that containers are mounted on; they stay, whatever becomes of images.
    pub layers: &'a (dyn Fn(&Snapshot) -> HashSet<Digest> + Send + Sync),
}

/// What images take on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFsUsage {
    /// The directory whose file system is meant.
    pub path: PathBuf,
    /// Bytes of unpacked layers, manifests and configurations.
    pub used_bytes: u64,
    /// Inodes of unpacked layers.
    pub inodes: u64,
}

/// Images as the disk has them, for comparing it with the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageInventory {
    /// Complete blobs that no image needs; a prune takes them.
    pub orphan_blobs: Vec<Digest>,
    /// Manifests, configurations and kept layers that should be here; a pull brings them back.
    pub missing_blobs: Vec<(ImageId, Digest)>,
    /// Layers whose directory should be here, by diff ID; a pull brings them back.
    pub missing_layers: Vec<(ImageId, Digest)>,
    /// What unfinished pulls have fetched, with sizes in bytes; a pull goes on with it.
    pub partial_blobs: Vec<(Digest, u64)>,
}

impl Images {
    /// Opens the images of `data_dir`; blocking. Call [`Images::recover`] before the first pull.
    ///
    /// # Errors
    /// `Config` for hosts and `RemoteConfig` for remotes that can't be used, `Content`.
    pub fn new(
        store: Store,
        rootfs: Rootfs,
        data_dir: &Path,
        config: ImageChapterConfig,
    ) -> Result<Images, ImageError> {
        config.hosts.check()?;
        let http = Arc::new(Http::new(config.timing()));
        let remotes = Remotes::new(&config.remotes, &config.hosts, &http)?;
        let registries = Registries::new(config.hosts.clone(), http);
        let inner = Inner {
            store,
            rootfs,
            content: Content::open(data_dir)?,
            registries: Arc::new(registries),
            remotes,
            config,
            data_dir: data_dir.to_owned(),
            planning: tokio::sync::Mutex::default(),
            leases: Leases::default(),
            unpacking: Unpacking::default(),
            unpackers: tokio::sync::Semaphore::new(UNPACKERS_MAX),
            pulls: Mutex::default(),
            imports: AtomicUsize::new(0),
        };
        Ok(Images {
            inner: Arc::new(inner),
        })
    }

    /// Removes what an earlier agent left half done: layers and blobs without an image.
    ///
    /// Fresh partial blobs stay, so that a retried pull goes on with them.
    ///
    /// # Errors
    /// `Rootfs`, `Content`, `Store`.
    pub async fn recover(&self) -> Result<(), ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking::run_bulk("recover images", move || {
            let failed = |source| ImageError::Rootfs {
                action: "remove unfinished layers",
                source,
            };
            inner.rootfs.recover().map_err(failed)?;
            inner
                .content
                .remove_leftovers(inner.config.partial_blob_age)?;
            let wanted = blobs_in_use(&inner.store.snapshot());
            for (digest, _) in inner.content.list()? {
                if !wanted.contains(&digest) {
                    inner.content.remove(&digest)?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Returns the image that `name_or_id` means: an id with or without `sha256:`, a reference, or
    /// the beginning of an id that no other image shares.
    ///
    /// # Errors
    /// `Reference` for a text that is none of these, `Ambiguous`.
    pub fn find(&self, at: &Snapshot, name_or_id: &str) -> Result<Option<Arc<Image>>, ImageError> {
        find(at, name_or_id)
    }

    /// Returns all images, by id.
    pub fn list(&self, at: &Snapshot) -> Vec<Arc<Image>> {
        at.all::<Image>().collect()
    }

    /// Returns the layers of `image`, base first.
    ///
    /// # Errors
    /// `Unknown` if a layer has no record, which no commit leaves behind.
    pub fn layers(&self, at: &Snapshot, image: &Image) -> Result<Vec<Layer>, ImageError> {
        let layer = |diff_id: &Digest| {
            at.get::<Layer>(diff_id.as_str())
                .map(|layer| Layer::clone(&layer))
        };
        let layers: Option<Vec<Layer>> = image.layers.iter().map(layer).collect();
        layers.ok_or_else(|| ImageError::Unknown {
            name: image.id.to_string(),
        })
    }

    /// Returns the configuration of an image as it came, verified again.
    ///
    /// # Errors
    /// `Unknown`, `DigestMismatch`, `Content`.
    pub async fn raw_config(&self, id: &ImageId) -> Result<Bytes, ImageError> {
        let (content, digest) = (Arc::clone(&self.inner.content), id.0.clone());
        let read = move || content.read(&digest, manifest::CONFIG_MAX_BYTES);
        let bytes = blocking::run("read image configuration", read).await?;
        bytes.map(Bytes::from).ok_or_else(|| ImageError::Unknown {
            name: id.to_string(),
        })
    }

    /// Gives an image another name, taking the name from the image that had it.
    ///
    /// # Errors
    /// `Unknown` if there is no such image, `Reference` if the name has a digest instead of a tag.
    pub async fn tag(
        &self,
        name_or_id: &str,
        target: &ImageRef,
        face: Face,
    ) -> Result<ImageId, ImageError> {
        if target.tag().is_none() {
            let expected = "a new name has a tag and no digest";
            let (part, value) = (RefPart::Tag, target.to_string());
            return Err(ReferenceError {
                part,
                value,
                expected,
            }
            .into());
        }
        let _planning = self.inner.planning.lock().await;
        let at = self.inner.store.snapshot();
        let unknown = || ImageError::Unknown {
            name: name_or_id.to_owned(),
        };
        let mut image = Image::clone(&*find(&at, name_or_id)?.ok_or_else(unknown)?);
        let id = image.id.clone();
        let name = target.to_string();
        if image.tags.insert(name.clone()) | image.faces.insert(face) {
            let changes = move_tag(&at, &name, &id, face).put(image).durable();
            self.inner.store.commit(changes).await?;
        }
        Ok(id)
    }

    /// Compares the disk with the records.
    ///
    /// # Errors
    /// `Content` if a directory can't be read.
    pub async fn inventory(&self) -> Result<ImageInventory, ImageError> {
        // A commit writes blobs before their record.
        let _planning = self.inner.planning.lock().await;
        let inner = Arc::clone(&self.inner);
        blocking::run("list images", move || {
            let at = inner.store.snapshot();
            let here: BTreeSet<Digest> = inner
                .content
                .list()?
                .into_iter()
                .map(|(digest, _)| digest)
                .collect();
            let wanted = blobs_in_use(&at);
            let mut inventory = ImageInventory {
                orphan_blobs: here.difference(&wanted).cloned().collect(),
                partial_blobs: inner.content.list_partial()?,
                ..ImageInventory::default()
            };
            for image in at.all::<Image>() {
                let blobs = blobs_of(&image).filter(|digest| !here.contains(digest));
                inventory
                    .missing_blobs
                    .extend(blobs.map(|digest| (image.id.clone(), digest.clone())));
                let is_here = |id: &Digest| {
                    at.get::<Layer>(id.as_str())
                        .is_some_and(|layer| inner.rootfs.has_layer(&layer))
                };
                let layers = image.layers.iter().filter(|diff_id| !is_here(diff_id));
                inventory
                    .missing_layers
                    .extend(layers.map(|diff_id| (image.id.clone(), diff_id.clone())));
            }
            Ok(inventory)
        })
        .await
    }

    /// Returns what images take on disk, from memory.
    pub fn fs_usage(&self, at: &Snapshot) -> ImageFsUsage {
        let layers = self.inner.rootfs.fs_usage();
        let kept: u64 = at
            .all::<Image>()
            .filter(|image| !image.blobs.is_empty())
            .map(|image| image.size_bytes)
            .sum();
        ImageFsUsage {
            path: self.inner.data_dir.clone(),
            used_bytes: layers.bytes + kept,
            inodes: layers.inodes,
        }
    }
}

fn find(at: &Snapshot, name_or_id: &str) -> Result<Option<Arc<Image>>, ImageError> {
    let hex = name_or_id.strip_prefix("sha256:").unwrap_or(name_or_id);
    if let Some(image) = at.get::<Image>(&format!("sha256:{hex}")) {
        return Ok(Some(image));
    }
    let reference = name_or_id.parse::<Reference>();
    if let Ok(reference) = &reference {
        let name = reference.to_string();
        let named =
            |image: &Arc<Image>| image.tags.contains(&name) || image.digests.contains(&name);
        if let Some(image) = at.all::<Image>().find(named) {
            return Ok(Some(image));
        }
    }
    let is_prefix = (ID_PREFIX_MIN..=64).contains(&hex.len())
        && hex
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if !is_prefix {
        return reference.map(|_| None).map_err(ImageError::Reference);
    }
    let prefix = format!("sha256:{hex}");
    let mut matches: Vec<Arc<Image>> = at
        .by_prefix::<Image>(&prefix)
        .take(AMBIGUOUS_MATCHES_MAX)
        .collect();
    if matches.len() > 1 {
        let matches = matches.iter().map(|image| image.id.clone()).collect();
        return Err(ImageError::Ambiguous {
            prefix: name_or_id.to_owned(),
            matches,
        });
    }
    Ok(matches.pop())
}

/// Changes that make `name` mean `id` alone; the record of `id` itself is the caller's.
fn move_tag(at: &Snapshot, name: &str, id: &ImageId, face: Face) -> Changes {
    let mut changes = Changes::new();
    for other in at
        .all::<Image>()
        .filter(|other| other.id != *id && other.tags.contains(name))
    {
        let mut other = Image::clone(&other);
        other.tags.remove(name);
        let event = EventDraft::new(EventKind::ImageUntagged, face)
            .image(&other.id)
            .attribute("reference", name);
        changes = changes.put(other).event(event);
    }
    changes.event(
        EventDraft::new(EventKind::ImageTagged, face)
            .image(id)
            .attribute("reference", name),
    )
}

/// Complete blobs that some image needs.
fn blobs_in_use(at: &Snapshot) -> BTreeSet<Digest> {
    let mut wanted = BTreeSet::new();
    for image in at.all::<Image>() {
        wanted.extend(blobs_of(&image).cloned());
    }
    wanted
}

/// Complete blobs that `image` needs.
fn blobs_of(image: &Image) -> impl Iterator<Item = &Digest> {
    std::iter::once(&image.id.0)
        .chain(image.manifests.keys())
        .chain(&image.blobs)
}
