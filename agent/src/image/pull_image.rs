//! PullImage: resolve, fetch and unpack while it streams, commit.
//!
//! ```text
//! pull() --equal one running?--yes--> join it
//!    |no
//!    v
//! resolve    HEAD: unchanged? done. Else index -> manifest -> configuration, each verified
//! lease      the layers, so that no removal takes them meanwhile
//! layers     in parallel: in the store, in another pull's hands, or fetch -> verify -> unpack
//! commit     layers durable, blobs written, then records and event in one commit
//! ```
//! Content is addressed by digest, so there is nothing to undo: repetition is resume. A pull ends
//! with its last waiter; only the commit, once begun, is carried through.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::AbortHandle;

use super::content::Partial;
use super::error::ImageError;
use super::image::{Image, ImageConfig};
use super::lease::Lease;
use super::manifest::{self, Document, LayerDescriptor, Manifest, Platform};
use super::progress::{LayerProgress, LayerState, Progress, PullProgress, PullStage};
use super::reference::ImageRef;
use super::source::auth::{AuthKey, RegistryAuth};
use super::source::registry::Repository;
use super::stream::LayerStream;
use super::system::reference::Reference;
use super::unpacking::{self, ReadyLayer};
use super::{Images, Inner, move_tag, system};
use crate::blocking;
use crate::clock::Time;
use crate::event::{EventDraft, EventKind};
use crate::id::{Digest, Face, ImageId};
use crate::rootfs::{Layer, LayerError};
use crate::store::Changes;

/// Chunks between the network and the unpacker; each is what one read of a socket gave.
pub(super) const CHUNKS: usize = 16;
/// Indexes within indexes: more than anyone has a use for.
const INDEX_DEPTH_MAX: usize = 3;
const TAG_DEFAULT: &str = "latest";

/// A wish for an image.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// Which image.
    pub reference: Reference,
    /// Who asks the registry; a remote asks nobody.
    pub auth: RegistryAuth,
    /// Built for what; [`Platform::host`] unless someone knows better.
    pub platform: Platform,
    /// Whose image it will be.
    pub face: Face,
}

/// What a pull brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The image.
    pub image: ImageId,
    /// What was asked for.
    pub reference: Reference,
    /// The manifest of this platform.
    pub manifest_digest: Digest,
    /// What the reference itself means, where that is an index.
    pub index_digest: Option<Digest>,
    /// Whether anything here changed.
    pub changed: bool,
}

/// Equal keys are the same wish of the same caller.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct PullKey {
    reference: Reference,
    platform: Platform,
    auth: AuthKey,
    face: Face,
}

type Outcome = Option<Result<Pulled, Arc<ImageError>>>;

/// A pull under way; its task ends with it.
pub(super) struct Running {
    key: PullKey,
    started_at: Time,
    progress: watch::Receiver<PullProgress>,
    outcome: watch::Receiver<Outcome>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A waiter for a pull. The pull stops at the next chunk when its last waiter is dropped.
pub struct Pull {
    running: Arc<Running>,
    joined: bool,
}

impl Pull {
    /// Returns a value that follows the pull.
    pub fn progress(&self) -> watch::Receiver<PullProgress> {
        self.running.progress.clone()
    }

    /// Tells whether an equal pull was running already.
    pub fn joined(&self) -> bool {
        self.joined
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// What the pull ended in, shared by all who wait for it.
    pub async fn wait(&self) -> Result<Pulled, Arc<ImageError>> {
        let mut outcome = self.running.outcome.clone();
        // An error here means that the task ended without an outcome: the agent stops.
        match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome
                .clone()
                .unwrap_or_else(|| Err(Arc::new(ImageError::Cancelled))),
            Err(_) => Err(Arc::new(ImageError::Cancelled)),
        }
    }
}

/// A pull under way, for lists.
#[derive(Debug, Clone)]
pub struct RunningPull {
    /// Which image.
    pub reference: Reference,
    /// For which platform.
    pub platform: Platform,
    /// For whom.
    pub face: Face,
    /// Since when.
    pub started_at: Time,
    /// How far it is.
    pub progress: PullProgress,
}

impl Images {
    /// Begins to pull an image, or joins a running pull that is equal; call it within a runtime.
    pub fn pull(&self, request: PullRequest) -> Pull {
        let key = PullKey {
            reference: request.reference.clone(),
            platform: request.platform.clone(),
            auth: request.auth.key(),
            face: request.face,
        };
        let mut pulls = self
            .inner
            .pulls
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = pulls.get(&key).and_then(std::sync::Weak::upgrade)
            && running.outcome.borrow().is_none()
        {
            return Pull {
                running,
                joined: true,
            };
        }
        pulls.retain(|_, running| running.strong_count() > 0);
        let (progress, watched) = Progress::new();
        let (sender, outcome) = watch::channel(None);
        let inner = Arc::clone(&self.inner);
        let task = tokio::spawn(async move {
            let result = run(&inner, &request, &progress).await;
            tell(&request, &result);
            sender.send_replace(Some(result.map_err(Arc::new)));
        });
        let running = Arc::new(Running {
            key: key.clone(),
            started_at: Time::now(),
            progress: watched,
            outcome,
            task: task.abort_handle(),
        });
        pulls.insert(key, Arc::downgrade(&running));
        Pull {
            running,
            joined: false,
        }
    }

    /// Returns the pulls under way, oldest first.
    pub fn running_pulls(&self) -> Vec<RunningPull> {
        let pulls = self
            .inner
            .pulls
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let running = pulls.values().filter_map(std::sync::Weak::upgrade);
        let mut listed: Vec<RunningPull> = running
            .filter(|running| running.outcome.borrow().is_none())
            .map(|running| RunningPull {
                reference: running.key.reference.clone(),
                platform: running.key.platform.clone(),
                face: running.key.face,
                started_at: running.started_at,
                progress: running.progress.borrow().clone(),
            })
            .collect();
        drop(pulls);
        listed.sort_by_key(|pull| pull.started_at);
        listed
    }
}

fn tell(request: &PullRequest, result: &Result<Pulled, ImageError>) {
    let image_ref = request.reference.to_string();
    match result {
        Ok(pulled) => {
            tracing::info!(image_ref, image = %pulled.image, changed = pulled.changed, "image pulled")
        }
        Err(error) => {
            let error = error as &(dyn std::error::Error + 'static);
            tracing::warn!(image_ref, error, "pull failed");
        }
    }
}

async fn run(
    inner: &Arc<Inner>,
    request: &PullRequest,
    progress: &Progress,
) -> Result<Pulled, ImageError> {
    let pulled = match &request.reference {
        Reference::Registry(reference) => run_registry(inner, request, reference, progress).await?,
        Reference::Remote(reference) => {
            system::pull::run(inner, request, reference, progress).await?
        }
    };
    progress.stage(PullStage::Done);
    Ok(pulled)
}

async fn run_registry(
    inner: &Arc<Inner>,
    request: &PullRequest,
    reference: &ImageRef,
    progress: &Progress,
) -> Result<Pulled, ImageError> {
    let source = inner.registries.repository(reference, &request.auth)?;
    if let Some(pulled) = unchanged(inner, request, reference, &source).await? {
        return Ok(pulled);
    }
    let resolved = resolve(inner, request, reference, &source).await?;
    let lease = {
        let _planning = inner.planning.lock().await;
        inner.leases.take(&resolved.diff_ids)
    };
    progress.layers(first_progress(&resolved.manifest));
    progress.stage(PullStage::Fetching);
    let layers = fetch_layers(inner, &source, &resolved, progress).await?;
    progress.stage(PullStage::Committing);
    let manifest_digest = resolved.manifest_digest.clone();
    let outermost = resolved.documents.first().map(|(digest, _)| digest.clone());
    let index_digest = outermost.filter(|digest| *digest != manifest_digest);
    let named = (Some(request.reference.clone()), request.face);
    let (image, changed) = commit(inner, named, resolved, layers, Some(lease)).await?;
    Ok(Pulled {
        image,
        reference: request.reference.clone(),
        manifest_digest,
        index_digest,
        changed,
    })
}

/// Everything that the documents say about the image.
pub(super) struct Resolved {
    /// Raw indexes and the raw manifest, outermost first.
    pub(super) documents: Vec<(Digest, Bytes)>,
    pub(super) manifest_digest: Digest,
    pub(super) manifest: Manifest,
    pub(super) raw_config: Bytes,
    pub(super) config: ImageConfig,
    pub(super) diff_ids: Vec<Digest>,
}

/// The name that an image gets, and whose image it becomes.
pub(super) type Named = (Option<Reference>, Face);

/// Asks the registry whether the name still means an image that is here as a whole.
///
/// A HEAD request costs registries nothing and does not count against their pull limits.
async fn unchanged(
    inner: &Arc<Inner>,
    request: &PullRequest,
    reference: &ImageRef,
    source: &Repository,
) -> Result<Option<Pulled>, ImageError> {
    let name = reference.to_string();
    let at = inner.store.snapshot();
    let is_it = |image: &Arc<Image>| {
        (image.tags.contains(&name) || image.digests.contains(&name))
            && request.platform.distance(&image.config.platform).is_some()
    };
    let Some(image) = at.all::<Image>().find(is_it) else {
        return Ok(None);
    };
    let version = reference
        .digest()
        .map_or(reference.tag().unwrap_or(TAG_DEFAULT), Digest::as_str);
    let digest = match source.tag_digest(version).await {
        Ok(Some(digest)) => digest,
        // Some registries don't know HEAD, and some don't name digests: look at the manifest.
        Ok(None) | Err(ImageError::UnexpectedAnswer { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !image
        .digests
        .contains(&reference.at_digest(&digest).to_string())
        || !is_whole(inner, &image).await
    {
        return Ok(None);
    }
    let Some(manifest_digest) = image.manifests.get(&digest).cloned() else {
        return Ok(None);
    };
    let pulled = |changed| Pulled {
        image: image.id.clone(),
        reference: request.reference.clone(),
        index_digest: (manifest_digest != digest).then(|| digest.clone()),
        manifest_digest: manifest_digest.clone(),
        changed,
    };
    if image.faces.contains(&request.face) {
        return Ok(Some(pulled(false)));
    }
    let _planning = inner.planning.lock().await;
    let Some(now) = inner.store.snapshot().get::<Image>(image.id.as_str()) else {
        return Ok(None);
    };
    let mut now = Image::clone(&now);
    now.faces.insert(request.face);
    inner
        .store
        .commit(Changes::new().put(now).durable())
        .await?;
    Ok(Some(pulled(true)))
}

/// Tells whether all directories of an image are there: a pull repairs one that has lost some.
pub(super) async fn is_whole(inner: &Arc<Inner>, image: &Image) -> bool {
    let (inner, diff_ids) = (Arc::clone(inner), image.layers.clone());
    blocking::run("look for layers", move || {
        let at = inner.store.snapshot();
        let is_here = |id: &Digest| {
            at.get::<Layer>(id.as_str())
                .is_some_and(|layer| inner.rootfs.has_layer(&layer))
        };
        diff_ids.iter().all(is_here)
    })
    .await
}

async fn resolve(
    inner: &Arc<Inner>,
    request: &PullRequest,
    reference: &ImageRef,
    source: &Repository,
) -> Result<Resolved, ImageError> {
    let shown = reference.to_string();
    let mut digest = reference.digest().cloned();
    let mut documents = Vec::new();
    let (manifest_digest, manifest) = loop {
        let tag = reference.tag().unwrap_or(TAG_DEFAULT);
        let raw = source.manifest(tag, digest.as_ref()).await?;
        let what = format!("manifest {}", raw.digest);
        let document = manifest::parse(&raw.bytes, raw.media_type.as_deref(), &shown, &what)?;
        documents.push((raw.digest.clone(), raw.bytes));
        match document {
            Document::Manifest(manifest) => break (raw.digest, manifest),
            Document::Index(_) if documents.len() >= INDEX_DEPTH_MAX => {
                let reason = "indexes are nested too deeply".to_owned();
                return Err(ImageError::Malformed { what, reason });
            }
            Document::Index(entries) => {
                digest = Some(
                    manifest::choose(&entries, &request.platform, &shown)?
                        .digest
                        .clone(),
                );
            }
        }
    };
    let raw_config = config(inner, source, &manifest).await?;
    let (config, diff_ids) =
        manifest::parse_config(&raw_config, &manifest, &request.platform, &shown)?;
    Ok(Resolved {
        documents,
        manifest_digest,
        manifest,
        raw_config,
        config,
        diff_ids,
    })
}

/// Returns the raw configuration, from disk if it is here.
async fn config(
    inner: &Arc<Inner>,
    source: &Repository,
    manifest: &Manifest,
) -> Result<Bytes, ImageError> {
    let (content, digest) = (Arc::clone(&inner.content), manifest.config.digest.clone());
    let read = move || content.read(&digest, manifest::CONFIG_MAX_BYTES);
    // A damaged one is fetched again, and written again once it is removed.
    match blocking::run("read image configuration", read).await {
        Ok(Some(bytes)) => return Ok(bytes.into()),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, "stored image configuration is damaged");
            let (content, digest) = (Arc::clone(&inner.content), manifest.config.digest.clone());
            blocking::run("remove image configuration", move || {
                content.remove(&digest)
            })
            .await?;
        }
    }
    let what = format!("configuration {}", manifest.config.digest);
    source
        .small_blob(&what, &manifest.config, manifest::CONFIG_MAX_BYTES)
        .await
}

fn first_progress(manifest: &Manifest) -> Vec<LayerProgress> {
    let layer = |layer: &LayerDescriptor| LayerProgress {
        digest: layer.blob.digest.clone(),
        fetched_bytes: 0,
        total_bytes: layer.blob.size_bytes,
        state: LayerState::Waiting,
    };
    manifest.layers.iter().map(layer).collect()
}

/// Brings all layers here; what is returned are those that the store does not have yet.
async fn fetch_layers(
    inner: &Arc<Inner>,
    source: &Repository,
    resolved: &Resolved,
    progress: &Progress,
) -> Result<Vec<Arc<ReadyLayer>>, ImageError> {
    let (alive, mut all_ended) = mpsc::channel(1);
    let fetch = LayerFetch {
        inner,
        source,
        progress,
        permits: Semaphore::new(inner.config.parallel_layers.max(1)),
        alive,
    };
    let mut seen = BTreeSet::new();
    let mut wanted = Vec::new();
    for (n, (layer, diff_id)) in resolved
        .manifest
        .layers
        .iter()
        .zip(&resolved.diff_ids)
        .enumerate()
    {
        if seen.insert(diff_id) {
            wanted.push(fetch.obtain(n, layer, diff_id));
        } else {
            progress.layer_state(n, LayerState::Present);
        }
    }
    let result = futures_util::future::try_join_all(wanted).await;
    // Unpackers that were cancelled clean up behind themselves; an error is told after that.
    drop(fetch);
    if result.is_err() {
        let _ = all_ended.recv().await;
    }
    Ok(result?.into_iter().flatten().collect())
}

/// What the layers of one pull have in common.
struct LayerFetch<'a> {
    inner: &'a Arc<Inner>,
    source: &'a Repository,
    progress: &'a Progress,
    permits: Semaphore,
    /// A copy lives in each unpacker.
    alive: mpsc::Sender<()>,
}

/// Tells the unpacker to stop when the pull does.
pub(super) struct CancelOnDrop(pub(super) Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl LayerFetch<'_> {
    /// Brings one layer here; `None` if the store has it.
    async fn obtain(
        &self,
        n: usize,
        layer: &LayerDescriptor,
        diff_id: &Digest,
    ) -> Result<Option<Arc<ReadyLayer>>, ImageError> {
        let permit = self.permits.acquire().await;
        let _permit = permit.map_err(|_| ImageError::Cancelled)?;
        let slot = self.inner.unpacking.slot(diff_id);
        let mut held = slot.lock().await;
        if let Some(ready) = held.upgrade().filter(|ready| ready.is_usable()) {
            self.progress.layer_state(n, LayerState::Present);
            return Ok(Some(ready));
        }
        if self.is_stored(diff_id).await {
            self.progress.layer_state(n, LayerState::Present);
            return Ok(None);
        }
        let ready = Arc::new(self.fetch(n, layer, diff_id).await?);
        *held = Arc::downgrade(&ready);
        self.progress.layer_state(n, LayerState::Done);
        Ok(Some(ready))
    }

    async fn is_stored(&self, diff_id: &Digest) -> bool {
        let Some(layer) = self.inner.store.snapshot().get::<Layer>(diff_id.as_str()) else {
            return false;
        };
        let rootfs = self.inner.rootfs.clone();
        blocking::run("look for layer", move || rootfs.has_layer(&layer)).await
    }

    async fn fetch(
        &self,
        n: usize,
        layer: &LayerDescriptor,
        diff_id: &Digest,
    ) -> Result<ReadyLayer, ImageError> {
        let partial = self.open_partial(layer).await?;
        let resumed = partial
            .as_ref()
            .is_some_and(|partial| partial.have_bytes() > 0);
        let error = match self.stream(n, layer, diff_id, partial).await {
            Ok(ready) => return Ok(ready),
            Err(error) => error,
        };
        // What an earlier try had left on disk may be what is wrong: it is gone now.
        let perhaps_stale = match &error {
            ImageError::DigestMismatch { .. } => true,
            ImageError::Layer { source, .. } => {
                !matches!(source, LayerError::Cancelled | LayerError::NoSpace { .. })
            }
            _ => false,
        };
        if !resumed || !perhaps_stale {
            return Err(error);
        }
        tracing::warn!(digest = %layer.blob.digest, %error, "partial blob is damaged and fetched anew");
        let (content, digest) = (Arc::clone(&self.inner.content), layer.blob.digest.clone());
        blocking::run("remove partial blob", move || {
            content.remove_partial(&digest)
        })
        .await?;
        let partial = self.open_partial(layer).await?;
        self.stream(n, layer, diff_id, partial).await
    }

    async fn open_partial(&self, layer: &LayerDescriptor) -> Result<Option<Partial>, ImageError> {
        let (content, blob) = (Arc::clone(&self.inner.content), layer.blob.clone());
        blocking::run("open partial blob", move || {
            content.partial(&blob.digest, blob.size_bytes)
        })
        .await
    }

    /// Fetches and unpacks side by side.
    async fn stream(
        &self,
        n: usize,
        layer: &LayerDescriptor,
        diff_id: &Digest,
        partial: Option<Partial>,
    ) -> Result<ReadyLayer, ImageError> {
        let size_bytes = layer.blob.size_bytes;
        let offset = partial.as_ref().map_or(0, Partial::have_bytes);
        self.progress.fetched(n, offset);
        let (chunks, incoming) = mpsc::channel(CHUNKS);
        let cancelled = Arc::new(AtomicBool::new(false));
        let _cancel = CancelOnDrop(Arc::clone(&cancelled));
        let (begun, mut has_begun) = watch::channel(offset == size_bytes);
        let fetch = async {
            // Its end tells the unpacker that nothing more comes.
            let (chunks, begun) = (chunks, begun);
            let what = format!("layer {}", layer.blob.digest);
            let on_progress = |at| {
                begun.send_if_modified(|begun| !std::mem::replace(begun, true));
                self.progress.fetched(n, at);
            };
            self.source
                .stream_blob(&what, &layer.blob, offset, &chunks, &on_progress)
                .await
        };
        let unpack = {
            let (rootfs, limits) = (self.inner.rootfs.clone(), self.inner.config.limits());
            let (layer, diff_id, alive) = (layer.clone(), diff_id.clone(), self.alive.clone());
            let work = move || {
                let _alive = alive;
                let partial = partial
                    .map(|partial| partial.reader().map(|file| (partial, file)))
                    .transpose()?;
                let stream = LayerStream::new(partial, incoming, size_bytes);
                unpacking::unpack_layer(rootfs, stream, &layer, &diff_id, &limits, &cancelled)
            };
            async move {
                // A registry that does not answer must not hold a place in the lane.
                if has_begun.wait_for(|begun| *begun).await.is_err() {
                    return Err(ImageError::Cancelled);
                }
                let place = self.inner.unpackers.acquire().await;
                let _place = place.map_err(|_| ImageError::Cancelled)?;
                blocking::run_bulk("unpack layer", work).await
            }
        };
        match tokio::join!(fetch, unpack) {
            // The unpacker stopped listening, and knows why.
            (Err(ImageError::Cancelled) | Ok(()), unpacked) => unpacked,
            (Err(error), _) => Err(error),
        }
    }
}

/// Makes the image durable and visible. It runs on its own task: a commit that has begun must not be
/// forgotten halfway, or the layers of a recorded image would be taken for nobody's.
///
/// Returns the image, and whether anything changed.
pub(super) async fn commit(
    inner: &Arc<Inner>,
    named: Named,
    resolved: Resolved,
    layers: Vec<Arc<ReadyLayer>>,
    lease: Option<Lease>,
) -> Result<(ImageId, bool), ImageError> {
    let inner = Arc::clone(inner);
    let committed = tokio::spawn(async move {
        let _lease = lease;
        let _planning = inner.planning.lock().await;
        let resolved = Arc::new(resolved);
        let records = write(&inner, &layers, &resolved).await?;
        let kept = keep_blobs(&inner, &layers).await?;
        let recorded = record(&inner, &named, &resolved, &records, kept).await?;
        for layer in &layers {
            layer.recorded();
        }
        discard_blobs(&layers).await;
        Ok(recorded)
    });
    committed.await.unwrap_or(Err(ImageError::Cancelled))
}

/// Makes layers, manifests and configuration durable.
async fn write(
    inner: &Arc<Inner>,
    layers: &[Arc<ReadyLayer>],
    resolved: &Arc<Resolved>,
) -> Result<Vec<Layer>, ImageError> {
    let (inner, layers, resolved) = (Arc::clone(inner), layers.to_vec(), Arc::clone(resolved));
    blocking::run_bulk("make image durable", move || {
        // A root tree's diff ID is known only now, and another pull may have been quicker: the layer
        // that the store has stays, as containers may be mounted on it.
        let at = inner.store.snapshot();
        for layer in &layers {
            let stored = layer.diff_id().and_then(|id| at.get::<Layer>(id.as_str()));
            if stored.is_some_and(|stored| inner.rootfs.has_layer(&stored)) {
                layer.superseded();
            }
        }
        let records = unpacking::finish(&inner.rootfs, &layers)?;
        for (digest, bytes) in &resolved.documents {
            inner.content.write(digest, bytes)?;
        }
        inner
            .content
            .write(&resolved.manifest.config.digest, &resolved.raw_config)?;
        Ok(records)
    })
    .await
}

/// Completes the compressed layers where the configuration wants them; returns their digests.
async fn keep_blobs(
    inner: &Arc<Inner>,
    layers: &[Arc<ReadyLayer>],
) -> Result<Vec<Digest>, ImageError> {
    if !inner.config.keep_blobs {
        return Ok(Vec::new());
    }
    let partials: Vec<Partial> = layers
        .iter()
        .filter_map(|layer| layer.take_partial())
        .collect();
    blocking::run_bulk("keep blobs", move || {
        partials
            .into_iter()
            .filter_map(|partial| partial.complete().transpose())
            .collect()
    })
    .await
}

async fn discard_blobs(layers: &[Arc<ReadyLayer>]) {
    let partials: Vec<Partial> = layers
        .iter()
        .filter_map(|layer| layer.take_partial())
        .collect();
    if partials.is_empty() {
        return;
    }
    blocking::run_bulk("drop blobs", move || {
        partials
            .into_iter()
            .for_each(|mut partial| partial.discard())
    })
    .await;
}

async fn record(
    inner: &Inner,
    (reference, face): &Named,
    resolved: &Resolved,
    layers: &[Layer],
    kept: Vec<Digest>,
) -> Result<(ImageId, bool), ImageError> {
    let face = *face;
    let at = inner.store.snapshot();
    let id = ImageId(resolved.manifest.config.digest.clone());
    let before = at.get::<Image>(id.as_str());
    let mut image = before
        .as_deref()
        .cloned()
        .unwrap_or_else(|| new_image(&id, resolved));
    image.faces.insert(face);
    image.blobs.extend(kept);
    for (digest, _) in &resolved.documents {
        image
            .manifests
            .insert(digest.clone(), resolved.manifest_digest.clone());
        let by_digest = reference
            .as_ref()
            .map(|reference| system::name_by_digest(reference, &resolved.config, digest));
        image.digests.extend(by_digest);
    }
    let tag = reference.as_ref().and_then(Reference::tag);
    let new_tag = tag.filter(|tag| image.tags.insert(tag.clone()));
    let changed = !layers.is_empty() || before.as_deref() != Some(&image);
    if !changed {
        return Ok((id, false));
    }
    let mut changes = match new_tag {
        Some(tag) => move_tag(&at, &tag, &id, face),
        None => Changes::new(),
    };
    for layer in layers {
        changes = changes.put(layer.clone());
    }
    let mut event = EventDraft::new(EventKind::ImagePulled, face).image(&id);
    if let Some(reference) = reference {
        event = event.attribute("reference", reference.to_string());
    }
    inner
        .store
        .commit(changes.put(image).event(event).durable())
        .await?;
    Ok((id, true))
}

fn new_image(id: &ImageId, resolved: &Resolved) -> Image {
    let compressed: u64 = resolved
        .manifest
        .layers
        .iter()
        .map(|layer| layer.blob.size_bytes)
        .sum();
    Image {
        id: id.clone(),
        layers: resolved.diff_ids.clone(),
        tags: Default::default(),
        digests: Default::default(),
        manifests: Default::default(),
        blobs: Default::default(),
        config: resolved.config.clone(),
        size_bytes: compressed + resolved.manifest.config.size_bytes,
        pinned: false,
        pulled_at: Time::now(),
        faces: Default::default(),
    }
}
