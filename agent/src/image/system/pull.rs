//! A pull from a remote: what the reference means there, metadata, root tree, commit.
//!
//! ```text
//! catalog     index (and products), asked for anew if a build goes away meanwhile
//! adopt       the very build is here already: it only gets the name
//! metadata    small, in memory
//! root tree   partial blob, hash alone and together with the metadata, unpack while it arrives
//! commit      as for any image
//! ```

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, watch};

use super::catalog::{Content, Item, Product, Version};
use super::metadata::Metadata;
use super::reference::{Reference, RemoteRef};
use super::{About, SYSTEM_LABEL, describe, name_by_digest};
use crate::blocking;
use crate::id::{Digest, Face, ImageId};
use crate::image::content::Partial;
use crate::image::error::ImageError;
use crate::image::image::Image;
use crate::image::manifest::{self, Platform};
use crate::image::progress::{LayerProgress, LayerState, Progress, PullStage};
use crate::image::pull_image::{
    CHUNKS, CancelOnDrop, PullRequest, Pulled, Resolved, commit, is_whole,
};
use crate::image::source::lxc;
use crate::image::source::remotes::Remote;
use crate::image::stream::{LayerStream, Packing, TarStream};
use crate::image::unpacking::{self, ReadyRoot, RootDigests};
use crate::image::{Inner, move_tag};
use crate::rootfs::{LayerError, Limits, RootShape, SmallFiles, read_small_files};
use crate::store::Changes;

/// Largest metadata, compressed and not: honest ones have a few kilobytes.
pub(in crate::image) const METADATA_MAX_BYTES: u64 = 4 << 20;
const METADATA_CONTENT_MAX_BYTES: u64 = 16 << 20;
const METADATA_ENTRIES_MAX: u64 = 4096;
/// What a root tree may unpack to: so many times its size, and this much for the small ones.
/// Trees of distributions take three to six times as much.
const ROOT_RATIO_MAX: u64 = 200;
const ROOT_SMALL_BYTES: u64 = 64 << 20;

/// Pulls `reference`, which is the one of `request`.
pub(in crate::image) async fn run(
    inner: &Arc<Inner>,
    request: &PullRequest,
    reference: &RemoteRef,
    progress: &Progress,
) -> Result<Pulled, ImageError> {
    let remote = inner.remotes.get(reference.remote())?;
    let mut again = false;
    loop {
        progress.stage(PullStage::Resolving);
        let catalog = remote.catalog().await?;
        let host = remote.server.host();
        let (product, version) = catalog.resolve(reference, &request.platform, host)?;
        let wish = Wish {
            inner,
            request,
            remote: &remote,
            product,
            version,
            progress,
        };
        match wish.fulfil().await {
            // Servers drop old builds while their indexes are on their way to us.
            Err(ImageError::NotFound { .. }) if !again => {
                remote.server.forget();
                again = true;
            }
            result => return result,
        }
    }
}

/// One build that someone wants.
struct Wish<'a> {
    inner: &'a Arc<Inner>,
    request: &'a PullRequest,
    remote: &'a Remote,
    product: &'a Product,
    version: &'a Version,
    progress: &'a Progress,
}

/// The files of a build.
struct Files {
    metadata: Option<File>,
    root: File,
    fingerprint: Option<Digest>,
}

struct File {
    path: String,
    size_bytes: u64,
    digest: Option<Digest>,
}

impl From<&Item> for File {
    fn from(item: &Item) -> File {
        File {
            path: item.path.clone(),
            size_bytes: item.size_bytes,
            digest: Some(item.digest.clone()),
        }
    }
}

impl Wish<'_> {
    async fn fulfil(&self) -> Result<Pulled, ImageError> {
        if let Some(pulled) = self.adopt().await? {
            return Ok(pulled);
        }
        let files = self.files().await?;
        // Another pull may be fetching the same build for another name.
        let key = files.fingerprint.as_ref().or(files.root.digest.as_ref());
        let slot = key.map(|key| self.inner.unpacking.slot(key));
        let _held = match &slot {
            Some(slot) => Some(slot.lock().await),
            None => None,
        };
        if let Some(pulled) = self.adopt().await? {
            return Ok(pulled);
        }
        self.progress.layers(first_progress(&files));
        self.progress.stage(PullStage::Fetching);
        let (metadata, before) = self.metadata(&files).await?;
        let root = self.root(&files, before, metadata.is_none()).await?;
        self.progress.stage(PullStage::Committing);
        self.commit(metadata, root).await
    }

    /// Finds the build among the images that are here as a whole, and names it.
    async fn adopt(&self) -> Result<Option<Pulled>, ImageError> {
        let label = |image: &Image, name: &str| {
            let key = format!("{SYSTEM_LABEL}{name}");
            image.config.labels.get(&key).cloned()
        };
        let (serial, source) = (&self.version.serial, self.source()?);
        let is_it = |image: &Image| match self.version.fingerprint() {
            Some(digest) => label(image, "fingerprint").as_deref() == Some(digest.hex()),
            None => {
                label(image, "serial").as_ref() == Some(serial)
                    && image.config.labels.get("org.opencontainers.image.source") == Some(&source)
            }
        };
        let at = self.inner.store.snapshot();
        let Some(image) = at.all::<Image>().find(|image| is_it(image)) else {
            return Ok(None);
        };
        if !is_whole(self.inner, &image).await {
            return Ok(None);
        }
        let _planning = self.inner.planning.lock().await;
        let at = self.inner.store.snapshot();
        let Some(before) = at.get::<Image>(image.id.as_str()) else {
            return Ok(None);
        };
        let Some(manifest_digest) = before.manifests.keys().next().cloned() else {
            return Ok(None);
        };
        let (reference, face) = (&self.request.reference, self.request.face);
        let mut image = Image::clone(&before);
        image.faces.insert(face);
        let by_digest = name_by_digest(reference, &image.config, &manifest_digest);
        image.digests.insert(by_digest);
        let new_tag = reference.tag().filter(|tag| image.tags.insert(tag.clone()));
        let changed = image != *before;
        if changed {
            let changes = match new_tag {
                Some(tag) => move_tag(&at, &tag, &image.id, face),
                None => Changes::new(),
            };
            let changes = changes.put(image.clone()).durable();
            self.inner.store.commit(changes).await?;
        }
        Ok(Some(self.pulled(image.id, manifest_digest, changed)))
    }

    fn pulled(&self, image: ImageId, manifest_digest: Digest, changed: bool) -> Pulled {
        Pulled {
            image,
            reference: self.request.reference.clone(),
            manifest_digest,
            index_digest: None,
            changed,
        }
    }

    /// Where the build is: the URL of its root tree, or of its directory.
    fn source(&self) -> Result<String, ImageError> {
        let path = match &self.version.content {
            Content::Pair { root, .. } => &root.path,
            Content::Unified(item) => &item.path,
            Content::Directory(path) => path,
            Content::Foreign(_) => return Ok(String::new()),
        };
        Ok(self.remote.server.url(path)?.to_string())
    }

    async fn files(&self) -> Result<Files, ImageError> {
        match &self.version.content {
            Content::Pair {
                metadata,
                root,
                fingerprint,
            } => Ok(Files {
                metadata: Some(metadata.into()),
                root: root.into(),
                fingerprint: fingerprint.clone(),
            }),
            Content::Unified(item) => Ok(Files {
                metadata: None,
                root: item.into(),
                fingerprint: None,
            }),
            Content::Directory(directory) => {
                let sums = lxc::sums(&self.remote.server, directory).await?;
                let file = async |name: &str| {
                    let path = format!("{directory}/{name}");
                    Ok::<_, ImageError>(File {
                        size_bytes: self.remote.server.size(&path).await?,
                        digest: sums.get(name).cloned(),
                        path,
                    })
                };
                Ok(Files {
                    metadata: Some(file(lxc::METADATA).await?),
                    root: file(lxc::ROOT).await?,
                    fingerprint: None,
                })
            }
            Content::Foreign(kinds) => Err(ImageError::RootPacking {
                packing: kinds.join(", "),
            }),
        }
    }

    /// Fetches the metadata; returns it with the hash that the root tree goes on with.
    async fn metadata(&self, files: &Files) -> Result<(Option<Metadata>, Sha256), ImageError> {
        let mut before = Sha256::new();
        let Some(file) = &files.metadata else {
            return Ok((None, before));
        };
        let server = &self.remote.server;
        let digest = file.digest.as_ref();
        let bytes = server
            .small_file(&file.path, file.size_bytes, digest, METADATA_MAX_BYTES)
            .await?;
        self.progress.fetched(0, file.size_bytes);
        before.update(&bytes);
        let is_lxc = matches!(self.version.content, Content::Directory(_));
        let read = move || {
            let files = read_metadata(bytes)?;
            if is_lxc {
                Metadata::of_lxc(&files)
            } else {
                Metadata::of_image(&files)
            }
        };
        let metadata = blocking::run("read metadata of an image", read).await?;
        self.progress.layer_state(0, LayerState::Done);
        Ok((Some(metadata), before))
    }

    async fn root(
        &self,
        files: &Files,
        before: Sha256,
        unified: bool,
    ) -> Result<ReadyRoot, ImageError> {
        let n = usize::from(files.metadata.is_some());
        let shape = if unified {
            RootShape::RootOrUnified
        } else {
            RootShape::Root
        };
        let expected = RootDigests {
            file: files.root.digest.clone(),
            combined: files.fingerprint.clone(),
        };
        let partial = self.open_partial(&files.root).await?;
        let resumed = partial
            .as_ref()
            .is_some_and(|partial| partial.have_bytes() > 0);
        let first = self
            .stream(n, &files.root, &expected, before.clone(), shape, partial)
            .await;
        let root = match first {
            // What an earlier try had left on disk may be what is wrong: it is gone now.
            Err(error @ (ImageError::DigestMismatch { .. } | ImageError::Root { .. }))
                if resumed && !is_ours(&error) =>
            {
                tracing::warn!(%error, "partial blob is damaged and fetched anew");
                self.remove_partial(&files.root).await?;
                let partial = self.open_partial(&files.root).await?;
                self.stream(n, &files.root, &expected, before, shape, partial)
                    .await?
            }
            other => other?,
        };
        self.progress.layer_state(n, LayerState::Done);
        Ok(root)
    }

    async fn open_partial(&self, file: &File) -> Result<Option<Partial>, ImageError> {
        let Some(digest) = file.digest.clone() else {
            return Ok(None);
        };
        let (content, size_bytes) = (Arc::clone(&self.inner.content), file.size_bytes);
        blocking::run("open partial blob", move || {
            content.partial(&digest, size_bytes)
        })
        .await
    }

    async fn remove_partial(&self, file: &File) -> Result<(), ImageError> {
        let Some(digest) = file.digest.clone() else {
            return Ok(());
        };
        let content = Arc::clone(&self.inner.content);
        blocking::run("remove partial blob", move || {
            content.remove_partial(&digest)
        })
        .await
    }

    /// Fetches and unpacks side by side.
    async fn stream(
        &self,
        n: usize,
        file: &File,
        expected: &RootDigests,
        before: Sha256,
        shape: RootShape,
        partial: Option<Partial>,
    ) -> Result<ReadyRoot, ImageError> {
        let offset = partial.as_ref().map_or(0, Partial::have_bytes);
        self.progress.fetched(n, offset);
        let (chunks, incoming) = mpsc::channel(CHUNKS);
        let (begun, has_begun) = watch::channel(offset == file.size_bytes);
        let fetch = async {
            // Its end tells the unpacker that nothing more comes.
            let (chunks, begun) = (chunks, begun);
            let on_progress = |at| {
                begun.send_if_modified(|begun| !std::mem::replace(begun, true));
                self.progress.fetched(n, at);
            };
            let server = &self.remote.server;
            server
                .stream(&file.path, file.size_bytes, offset, &chunks, &on_progress)
                .await
        };
        let source = RootSource {
            partial,
            incoming,
            size_bytes: file.size_bytes,
            before,
        };
        let unpack = unpack(self.inner, source, expected.clone(), shape, has_begun);
        match tokio::join!(fetch, unpack) {
            // The unpacker stopped listening, and knows why.
            (Err(ImageError::Cancelled) | Ok(()), unpacked) => unpacked,
            (Err(error), _) => Err(error),
        }
    }

    async fn commit(
        &self,
        metadata: Option<Metadata>,
        root: ReadyRoot,
    ) -> Result<Pulled, ImageError> {
        let metadata = match (metadata, &root.beside) {
            (Some(metadata), _) => metadata,
            (None, Some(files)) => Metadata::of_image(files)?,
            (None, None) => Metadata::of_image(&SmallFiles::new())?,
        };
        let Product {
            os,
            release,
            variant,
            requirements,
            ..
        } = self.product;
        let about = About {
            os: os.clone(),
            release: release.clone(),
            variant: variant.clone(),
            serial: self.version.serial.clone(),
            source: Some(self.source()?),
            requirements: requirements.clone(),
            ..metadata.about()
        };
        let platform = self.product.platform().unwrap_or_else(Platform::host);
        let named = (Some(self.request.reference.clone()), self.request.face);
        let image = commit_root(self.inner, named, &about, &metadata, &platform, root).await?;
        Ok(self.pulled(image.id, image.manifest_digest, image.changed))
    }
}

/// Where the bytes of a root tree come from.
pub(in crate::image) struct RootSource {
    pub(in crate::image) partial: Option<Partial>,
    pub(in crate::image) incoming: mpsc::Receiver<Bytes>,
    pub(in crate::image) size_bytes: u64,
    /// What came before, for the digest of all.
    pub(in crate::image) before: Sha256,
}

/// Unpacks a root tree while it arrives, as soon as something has `begun` to.
pub(in crate::image) async fn unpack(
    inner: &Arc<Inner>,
    source: RootSource,
    expected: RootDigests,
    shape: RootShape,
    mut begun: watch::Receiver<bool>,
) -> Result<ReadyRoot, ImageError> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let _cancel = CancelOnDrop(Arc::clone(&cancelled));
    let (rootfs, limits) = (inner.rootfs.clone(), root_limits(inner, source.size_bytes));
    let work = move || {
        let partial = source
            .partial
            .map(|partial| partial.reader().map(|file| (partial, file)))
            .transpose()?;
        let stream = LayerStream::new(partial, source.incoming, source.size_bytes);
        let stream = stream.combined_with(source.before);
        unpacking::unpack_root_tree(rootfs, stream, &expected, shape, &limits, &cancelled)
    };
    // A server that does not answer must not hold a place in the lane.
    if begun.wait_for(|begun| *begun).await.is_err() {
        return Err(ImageError::Cancelled);
    }
    let place = inner.unpackers.acquire().await;
    let _place = place.map_err(|_| ImageError::Cancelled)?;
    blocking::run_bulk("unpack root tree", work).await
}

/// What [`commit_root`] made.
pub(in crate::image) struct Committed {
    pub(in crate::image) id: ImageId,
    pub(in crate::image) manifest_digest: Digest,
    pub(in crate::image) changed: bool,
}

/// Makes an unpacked root tree an image.
pub(in crate::image) async fn commit_root(
    inner: &Arc<Inner>,
    named: (Option<Reference>, Face),
    about: &About,
    metadata: &Metadata,
    platform: &Platform,
    root: ReadyRoot,
) -> Result<Committed, ImageError> {
    let described = describe(about, metadata, platform, &root)?;
    let shown = named
        .0
        .as_ref()
        .map(Reference::to_string)
        .unwrap_or_default();
    let (config, diff_ids) =
        manifest::parse_config(&described.config, &described.parsed, platform, &shown)?;
    let manifest_digest = described.manifest_digest.clone();
    let resolved = Resolved {
        documents: vec![(manifest_digest.clone(), described.manifest.into())],
        manifest_digest: manifest_digest.clone(),
        manifest: described.parsed,
        raw_config: described.config.into(),
        config,
        diff_ids,
    };
    let (id, changed) = commit(inner, named, resolved, vec![root.layer], None).await?;
    Ok(Committed {
        id,
        manifest_digest,
        changed,
    })
}

/// Reads the files of a metadata tarball; blocking.
pub(in crate::image) fn read_metadata(bytes: Bytes) -> Result<SmallFiles, ImageError> {
    let malformed = |reason: String| ImageError::Malformed {
        what: "the image's metadata".to_owned(),
        reason,
    };
    let size_bytes = bytes.len() as u64;
    let (sender, incoming) = mpsc::channel(1);
    // The channel has room for one.
    let _ = sender.try_send(bytes);
    let mut stream = LayerStream::new(None, incoming, size_bytes);
    let broken = |error: std::io::Error| malformed(error.to_string());
    let compression = match stream.packing().map_err(broken)? {
        Packing::Tar(compression) => compression,
        Packing::Foreign(name) => return Err(malformed(format!("it comes as {name}"))),
    };
    let tar = TarStream::new(compression, stream).map_err(broken)?;
    let limits = Limits {
        content_bytes: METADATA_CONTENT_MAX_BYTES,
        entries: METADATA_ENTRIES_MAX,
        trailing_bytes: METADATA_CONTENT_MAX_BYTES,
        ..Limits::default()
    };
    read_small_files(tar, &limits, &AtomicBool::new(false)).map_err(|error| match error {
        LayerError::Source { source, .. } => malformed(source.to_string()),
        other => malformed(other.to_string()),
    })
}

/// What a root tree of `size_bytes` may unpack to.
fn root_limits(inner: &Inner, size_bytes: u64) -> Limits {
    let configured = inner.config.limits();
    let grown = size_bytes.saturating_mul(ROOT_RATIO_MAX);
    let content_bytes = configured
        .content_bytes
        .min(grown.saturating_add(ROOT_SMALL_BYTES));
    Limits {
        content_bytes,
        // A hole counts as content once the tree is a tar.
        file_bytes: content_bytes,
        trailing_bytes: ROOT_SMALL_BYTES,
        ..configured
    }
}

/// What went wrong says something about this machine or this call, not about the bytes.
fn is_ours(error: &ImageError) -> bool {
    let ImageError::Root { source } = error else {
        return false;
    };
    matches!(source, LayerError::Cancelled | LayerError::NoSpace { .. })
}

fn first_progress(files: &Files) -> Vec<LayerProgress> {
    let all = files.metadata.iter().chain([&files.root]);
    all.map(|file| LayerProgress {
        // Nobody has told it: a name that at least is one file's own.
        digest: file
            .digest
            .clone()
            .unwrap_or_else(|| Digest::of(file.path.as_bytes())),
        fetched_bytes: 0,
        total_bytes: file.size_bytes,
        state: LayerState::Waiting,
    })
    .collect()
}
