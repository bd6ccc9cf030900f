//! The record of an image. It exists only when all of its layers are durable.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::manifest::Platform;
use crate::clock::Time;
use crate::id::{Digest, Face, ImageId};
use crate::store::Record;

/// An image on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of the configuration.
    pub id: ImageId,
    /// Diff IDs, base first.
    pub layers: Vec<Digest>,
    /// Full names with their tag, e.g. `docker.io/library/busybox:latest`.
    pub tags: BTreeSet<String>,
    /// Full names with a digest, of the index and of the manifest: `name@sha256:...`.
    pub digests: BTreeSet<String>,
    /// Manifests and indexes that are kept beside the configuration, each with the manifest of this
    /// image that it leads to.
    pub manifests: BTreeMap<Digest, Digest>,
    /// Compressed layers that are kept, if the configuration says so.
    pub blobs: BTreeSet<Digest>,
    /// What containers inherit.
    pub config: ImageConfig,
    /// Configuration and compressed layers together.
    pub size_bytes: u64,
    /// Never taken by a prune.
    pub pinned: bool,
    /// When it was first pulled.
    pub pulled_at: Time,
    /// Whose image it is: removing it for one face leaves it to the others.
    pub faces: BTreeSet<Face>,
}

impl Record for Image {
    const TABLE: &'static str = "image";

    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Image {
    /// Tells whether `face` should leave the image alone: it is pinned, or another face uses it too.
    pub fn is_pinned_for(&self, face: Face) -> bool {
        self.pinned || self.faces.iter().any(|owner| *owner != face)
    }

    /// Returns the names of this image: tags first, then digests.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tags.iter().chain(&self.digests).map(String::as_str)
    }
}

/// What an image says about the containers made from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Command, before `cmd`.
    pub entrypoint: Vec<String>,
    /// Arguments of the entrypoint, or the command if there is none.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Where the command starts; empty means `/`.
    pub working_dir: String,
    /// `user[:group]` by name or number; empty means root.
    pub user: String,
    /// e.g. `SIGTERM` or `15`.
    pub stop_signal: Option<String>,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
    /// `port[/protocol]`.
    pub exposed_ports: BTreeSet<String>,
    /// Paths that want a volume.
    pub volumes: BTreeSet<String>,
    /// What it is built for.
    pub platform: Platform,
    /// When it was built, RFC 3339, as the image says.
    pub created: Option<String>,
}
