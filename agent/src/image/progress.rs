//! How far a pull is, as a value that changes and that anyone may watch.

use tokio::sync::watch;

use crate::clock::Time;
use crate::id::Digest;

/// State of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullProgress {
    /// What is being done.
    pub stage: PullStage,
    /// Since when.
    pub since: Time,
    /// Base first; empty until the manifest is known.
    pub layers: Vec<LayerProgress>,
}

/// What a pull is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullStage {
    /// Asking the registry what the reference means.
    Resolving,
    /// Fetching and unpacking layers.
    Fetching,
    /// Making the layers durable and recording the image.
    Committing,
    /// The image is here.
    Done,
}

/// State of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerProgress {
    /// The compressed blob.
    pub digest: Digest,
    /// What has arrived of it.
    pub fetched_bytes: u64,
    /// Its size.
    pub total_bytes: u64,
    /// What is done with it.
    pub state: LayerState,
}

/// What is done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    /// Its turn has not come, or another pull is fetching it.
    Waiting,
    /// Being fetched and unpacked.
    Fetching,
    /// It has arrived; the rest of it is being unpacked.
    Unpacking,
    /// Unpacked by this pull.
    Done,
    /// It was here, or another pull brought it.
    Present,
}

/// The writing end.
#[derive(Clone)]
pub(crate) struct Progress(watch::Sender<PullProgress>);

/// How many bytes make a change worth telling.
const STEP_BYTES: u64 = 256 << 10;

impl Progress {
    pub(crate) fn new() -> (Progress, watch::Receiver<PullProgress>) {
        let first = PullProgress {
            stage: PullStage::Resolving,
            since: Time::now(),
            layers: Vec::new(),
        };
        let (sender, receiver) = watch::channel(first);
        (Progress(sender), receiver)
    }

    pub(crate) fn stage(&self, stage: PullStage) {
        self.0.send_modify(|progress| {
            progress.stage = stage;
            progress.since = Time::now();
        });
    }

    pub(crate) fn layers(&self, layers: Vec<LayerProgress>) {
        self.0.send_modify(|progress| progress.layers = layers);
    }

    pub(crate) fn layer_state(&self, n: usize, state: LayerState) {
        self.0.send_modify(|progress| {
            let Some(layer) = progress.layers.get_mut(n) else {
                return;
            };
            layer.state = state;
            if matches!(state, LayerState::Done | LayerState::Present) {
                layer.fetched_bytes = layer.total_bytes;
            }
        });
    }

    pub(crate) fn fetched(&self, n: usize, bytes: u64) {
        self.0.send_if_modified(|progress| {
            let Some(layer) = progress.layers.get_mut(n) else {
                return false;
            };
            let complete = bytes == layer.total_bytes;
            let first = layer.state == LayerState::Waiting || layer.fetched_bytes == 0;
            let backwards = bytes < layer.fetched_bytes;
            if !complete && !first && !backwards && bytes < layer.fetched_bytes + STEP_BYTES {
                return false;
            }
            layer.fetched_bytes = bytes;
            layer.state = if complete {
                LayerState::Unpacking
            } else {
                LayerState::Fetching
            };
            true
        });
    }
}
