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
use super::manifest::LayerDescriptor;
use super::stream::{LayerStream, TarStream};
use crate::blocking;
use crate::id::Digest;
use crate::rootfs::{Layer, LayerDir, LayerError, Limits, Rootfs, Unpacked, unpack};

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
    // What can't be read may only be other bytes than were asked for: then that is the error.
    let worth_hashing = matches!(
        outcome,
        Ok(_)
            | Err(LayerError::Source { .. }
                | LayerError::Truncated { .. }
                | LayerError::Header { .. })
    );
    if !worth_hashing {
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

fn failed(action: &'static str) -> impl FnOnce(crate::rootfs::RootfsError) -> ImageError {
    move |source| ImageError::Rootfs { action, source }
}
