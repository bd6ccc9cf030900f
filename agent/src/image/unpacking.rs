//! Layers on their way into the store: each is unpacked once, whoever wants it.
//!
//! ```text
//! slot(diff ID) --lock--> here already? in the store? else fetch and unpack
//!      |                        |
//!      +---- Weak<ReadyLayer> <-+   shared by all pulls that want it
//! ```
//! A pull that fails or is cancelled lets go of the slot, and the next that waits for it begins with
//! what is on disk of the blob. A ready layer that nobody records is removed with its last holder;
//! after SIGKILL the next start removes it.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::content::Partial;
use super::error::ImageError;
use super::manifest::{Compression, LayerDescriptor};
use super::stream::{LayerStream, Packing, TarStream};
use super::system::Init;
use crate::blocking;
use crate::id::Digest;
use crate::rootfs::{
    Layer, LayerDir, LayerError, Limits, RootShape, Rootfs, SmallFiles, Unpacked, UnpackedRoot,
    unpack, unpack_root,
};

/// The layers being unpacked, by diff ID.
#[derive(Default)]
pub(crate) struct Unpacking {
    slots: Mutex<HashMap<Digest, Weak<Slot>>>,
}

/// Locked by the pull that unpacks the layer.
pub(crate) type Slot = tokio::sync::Mutex<Weak<ReadyLayer>>;

impl Unpacking {
    pub(crate) fn slot(&self, diff_id: &Digest) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(diff_id).and_then(Weak::upgrade) {
            return slot;
        }
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(Slot::default());
        slots.insert(diff_id.clone(), Arc::downgrade(&slot));
        slot
    }
}

/// A layer that is unpacked and not yet recorded.
pub(crate) struct ReadyLayer {
    rootfs: Rootfs,
    state: Mutex<State>,
    /// The compressed blob, for a later push or for the next try of a pull that fails.
    partial: Mutex<Option<Partial>>,
}

enum State {
    Unpacked(LayerDir, Unpacked),
    /// Being made durable: whoever wants it now shares it.
    Finishing,
    /// Durable under its number; removed with the last holder.
    Finished(Layer),
    /// In the store, and no longer ours.
    Recorded,
    Gone,
}

impl ReadyLayer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its diff ID, unless it is on its way into the store.
    pub(crate) fn diff_id(&self) -> Option<Digest> {
        match &*self.state() {
            State::Unpacked(_, unpacked) => Some(unpacked.diff_id.clone()),
            State::Finished(layer) => Some(layer.diff_id.clone()),
            State::Finishing | State::Recorded | State::Gone => None,
        }
    }

    /// Tells whether it can still become a record.
    pub(crate) fn is_usable(&self) -> bool {
        !matches!(*self.state(), State::Gone)
    }

    /// Tells that the store has it.
    pub(crate) fn recorded(&self) {
        let mut state = self.state();
        if matches!(*state, State::Finished(_)) {
            *state = State::Recorded;
        }
    }

    /// Tells that the store has the same layer from elsewhere; removes this one; blocking.
    pub(crate) fn superseded(&self) {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Recorded) {
            State::Unpacked(dir, _) => self.rootfs.discard_layer(dir),
            State::Finished(layer) => {
                if let Err(error) = self.rootfs.remove_layer(layer.dir) {
                    tracing::warn!(dir = layer.dir, %error, "an unrecorded layer stays until the next start");
                }
            }
            other => *state = other,
        }
    }

    pub(crate) fn take_partial(&self) -> Option<Partial> {
        self.partial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Drop for ReadyLayer {
    fn drop(&mut self) {
        let state = std::mem::replace(&mut *self.state(), State::Gone);
        let rootfs = self.rootfs.clone();
        let remove: Box<dyn FnOnce() + Send> = match state {
            State::Finishing | State::Recorded | State::Gone => return,
            State::Unpacked(dir, _) => Box::new(move || rootfs.discard_layer(dir)),
            State::Finished(layer) => Box::new(move || {
                if let Err(error) = rootfs.remove_layer(layer.dir) {
                    tracing::warn!(dir = layer.dir, %error, "an unrecorded layer stays until the next start");
                }
            }),
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(blocking::run_bulk("remove layer", remove))),
            Err(_) => remove(),
        }
    }
}

/// Makes all of `ready` durable at once and returns their records; blocking.
///
/// The caller holds the planning lock, so no other pull finishes the same layers meanwhile.
pub(crate) fn finish(rootfs: &Rootfs, ready: &[Arc<ReadyLayer>]) -> Result<Vec<Layer>, ImageError> {
    let lost = |layer: &Arc<ReadyLayer>| matches!(*layer.state(), State::Finishing | State::Gone);
    if ready.iter().any(lost) {
        // Another pull's commit failed with it.
        return Err(ImageError::Cancelled);
    }
    let mut unfinished = Vec::new();
    let mut records = Vec::new();
    let mut owners = Vec::new();
    for layer in ready {
        let mut state = layer.state();
        match std::mem::replace(&mut *state, State::Finishing) {
            State::Unpacked(dir, unpacked) => {
                unfinished.push((dir, unpacked));
                owners.push(layer);
            }
            State::Finished(record) => {
                records.push(record.clone());
                *state = State::Finished(record);
            }
            other => *state = other,
        }
    }
    if unfinished.is_empty() {
        return Ok(records);
    }
    let finished = match rootfs.finish_layers(unfinished) {
        Ok(finished) => finished,
        Err(error) => {
            for layer in owners {
                *layer.state() = State::Gone;
            }
            return Err(failed("make the layers durable")(error));
        }
    };
    for (layer, record) in owners.into_iter().zip(&finished) {
        *layer.state() = State::Finished(record.clone());
    }
    records.extend(finished);
    Ok(records)
}

/// Unpacks one layer and verifies it; blocking. Nothing is left behind by an error.
///
/// # Errors
/// `DigestMismatch` for the blob or its content, `Layer`, `Rootfs`.
pub(crate) fn unpack_layer(
    rootfs: Rootfs,
    stream: LayerStream,
    layer: &LayerDescriptor,
    diff_id: &Digest,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<ReadyLayer, ImageError> {
    let dir = rootfs.begin_layer().map_err(failed("begin a layer"))?;
    match unpack_into(&dir, stream, layer, diff_id, limits, cancelled) {
        Ok((unpacked, partial)) => {
            let state = Mutex::new(State::Unpacked(dir, unpacked));
            Ok(ReadyLayer {
                rootfs,
                state,
                partial: Mutex::new(partial),
            })
        }
        Err(error) => {
            rootfs.discard_layer(dir);
            Err(error)
        }
    }
}

fn unpack_into(
    dir: &LayerDir,
    stream: LayerStream,
    layer: &LayerDescriptor,
    diff_id: &Digest,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<(Unpacked, Option<Partial>), ImageError> {
    let blob = &layer.blob.digest;
    let layer_error = |source| ImageError::Layer {
        digest: blob.clone(),
        source,
    };
    let mut tar = TarStream::new(layer.compression, stream)
        .map_err(|source| layer_error(LayerError::Source { offset: 0, source }))?;
    let outcome = unpack(&mut tar, dir, limits, cancelled);
    if !is_worth_hashing(&outcome) {
        return Err(outcome.err().map_or(ImageError::Cancelled, layer_error));
    }
    let (actual, mut partial) = tar.into_inner().finish();
    let actual = match (actual, &outcome) {
        (Ok(actual), _) => actual,
        (Err(_), Err(_)) => return Err(outcome.err().map_or(ImageError::Cancelled, layer_error)),
        (Err(source), Ok(_)) => return Err(layer_error(LayerError::Source { offset: 0, source })),
    };
    let mut wrong_content = |error| {
        if let Some(partial) = &mut partial {
            partial.discard();
        }
        Err(error)
    };
    if actual != *blob {
        let what = "layer".to_owned();
        return wrong_content(ImageError::DigestMismatch {
            what,
            expected: blob.clone(),
            actual,
        });
    }
    let unpacked = match outcome {
        Ok(unpacked) => unpacked,
        Err(error) => return wrong_content(layer_error(error)),
    };
    if unpacked.diff_id != *diff_id {
        let what = format!("content of layer {blob}");
        let (expected, actual) = (diff_id.clone(), unpacked.diff_id);
        return wrong_content(ImageError::DigestMismatch {
            what,
            expected,
            actual,
        });
    }
    Ok((unpacked, partial))
}

/// A root tree that is unpacked, with what is to be said about it.
pub(crate) struct ReadyRoot {
    pub(crate) layer: Arc<ReadyLayer>,
    pub(crate) diff_id: Digest,
    /// Length of its canonical tar.
    pub(crate) tar_bytes: u64,
    /// What was beside the tree in its archive.
    pub(crate) beside: Option<SmallFiles>,
    /// What its init is; read from the tree itself.
    pub(crate) init: Init,
    /// Digest of all that came before the file, and the file.
    pub(crate) combined: Digest,
}

/// Which digests the file of a root tree must have; none where its server does not tell.
#[derive(Debug, Clone, Default)]
pub(crate) struct RootDigests {
    pub(crate) file: Option<Digest>,
    pub(crate) combined: Option<Digest>,
}

/// Unpacks a root tree from `stream` and verifies it; blocking. Nothing is left behind by an error.
///
/// # Errors
/// `DigestMismatch`, `RootPacking`, `NoInit`, `Layer`, `Rootfs`.
pub(crate) fn unpack_root_tree(
    rootfs: Rootfs,
    stream: LayerStream,
    expected: &RootDigests,
    shape: RootShape,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<ReadyRoot, ImageError> {
    let dir = rootfs.begin_layer().map_err(failed("begin a layer"))?;
    match unpack_tree_into(&dir, stream, expected, shape, limits, cancelled) {
        Ok((unpacked, init, combined, partial)) => Ok(ReadyRoot {
            diff_id: unpacked.layer.diff_id.clone(),
            tar_bytes: unpacked.tar_bytes,
            beside: unpacked.beside,
            init,
            combined,
            layer: Arc::new(ReadyLayer {
                rootfs,
                state: Mutex::new(State::Unpacked(dir, unpacked.layer)),
                partial: Mutex::new(partial),
            }),
        }),
        Err(error) => {
            rootfs.discard_layer(dir);
            Err(error)
        }
    }
}

fn unpack_tree_into(
    dir: &LayerDir,
    mut stream: LayerStream,
    expected: &RootDigests,
    shape: RootShape,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<(UnpackedRoot, Init, Digest, Option<Partial>), ImageError> {
    let broken = |source| root_error(LayerError::Source { offset: 0, source });
    let (compression, foreign) = match stream.packing().map_err(broken)? {
        Packing::Tar(compression) => (compression, None),
        // Its digest is looked at first: it may not be what was asked for.
        Packing::Foreign(name) => (Compression::None, Some(name)),
    };
    let mut tar = TarStream::new(compression, stream).map_err(broken)?;
    let outcome = match foreign {
        Some(_) => Ok(None),
        None => unpack_root(&mut tar, dir, shape, limits, cancelled).map(Some),
    };
    if !is_worth_hashing(&outcome) {
        return Err(outcome.err().map_or(ImageError::Cancelled, root_error));
    }
    let (digests, mut partial) = tar.into_inner().finish_combined();
    let (file, combined) = match (digests, &outcome) {
        (Ok((file, combined)), _) => (file.clone(), combined.unwrap_or(file)),
        (Err(_), Err(_)) => return Err(outcome.err().map_or(ImageError::Cancelled, root_error)),
        (Err(source), Ok(_)) => return Err(broken(source)),
    };
    let verified = [
        ("root tree", &expected.file, &file),
        (
            "metadata and root tree together",
            &expected.combined,
            &combined,
        ),
    ]
    .into_iter()
    .find_map(|(what, expected, actual)| {
        let expected = expected.as_ref().filter(|expected| *expected != actual)?;
        Some(ImageError::DigestMismatch {
            what: what.to_owned(),
            expected: expected.clone(),
            actual: actual.clone(),
        })
    });
    let unpacked = match (verified, outcome, foreign) {
        (Some(error), ..) => Err(error),
        (None, Err(error), _) => Err(root_error(error)),
        (None, _, Some(packing)) => Err(ImageError::RootPacking {
            packing: packing.to_owned(),
        }),
        (None, Ok(unpacked), None) => unpacked.ok_or(ImageError::Cancelled),
    };
    let found = unpacked.and_then(|unpacked| Ok((Init::find(dir)?, unpacked)));
    match found {
        Ok((init, unpacked)) => Ok((unpacked, init, combined, partial)),
        Err(error) => {
            if let Some(partial) = &mut partial {
                partial.discard();
            }
            Err(error)
        }
    }
}

/// What can't be read may only be other bytes than were asked for: then that is the error.
fn is_worth_hashing<T>(outcome: &Result<T, LayerError>) -> bool {
    matches!(
        outcome,
        Ok(_)
            | Err(LayerError::Source { .. }
                | LayerError::Truncated { .. }
                | LayerError::Header { .. })
    )
}

fn root_error(source: LayerError) -> ImageError {
    ImageError::Root { source }
}

fn failed(action: &'static str) -> impl FnOnce(crate::rootfs::RootfsError) -> ImageError {
    move |source| ImageError::Rootfs { action, source }
}
