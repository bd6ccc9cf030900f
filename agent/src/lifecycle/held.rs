//! What sandboxes and containers hold: images, layers, networks, and what an unknown one left.

use std::{collections::HashSet, path::PathBuf, sync::Arc};

use super::{
    Lifecycle, LifecycleError, container::Container, files, sandbox::Sandbox, system::System,
};
use crate::{
    blocking,
    handler::Handler as _,
    id::{Digest, Face, ImageId, SandboxId},
    image::Holders,
    network::{Mode, NetworkPlan},
    store::Snapshot,
};

impl Lifecycle {
    /// Who counts on images and layers when `face` wants to remove some.
    ///
    /// CRI removes an image whose containers live on, as its peers do; their layers stay.
    pub fn holders(&self, face: Face) -> Holders<'static> {
        Holders {
            image: match face {
                Face::Cri => &held_by_others,
                Face::Native => &held_by_anyone,
            },
            layers: &held_layers,
        }
    }

    /// Plans of the sandboxes whose network namespaces still exist.
    pub fn live_networks(&self, at: &Snapshot) -> Vec<(SandboxId, NetworkPlan)> {
        at.all::<Sandbox>()
            .filter(|sandbox| sandbox.is_ready() && sandbox.config.network.mode == Mode::Pod)
            .filter(|sandbox| {
                longshore_sys::ns::is_bound(&files::namespace(
                    &self.sandbox_dir(&sandbox.id),
                    "net",
                ))
            })
            .map(|sandbox| (sandbox.id.clone(), sandbox.plan.clone()))
            .collect()
    }

    /// Removes layers that nothing uses any more, after a container of a removed image went.
    pub(super) async fn release_layers(&self, container: &Container) {
        self.release_layers_of(container.images()).await;
    }

    /// The same, by the images.
    pub(super) async fn release_layers_of(&self, mut images: impl Iterator<Item = &ImageId>) {
        let at = self.store.snapshot();
        if images.all(|image| at.get::<crate::image::Image>(image.as_str()).is_some()) {
            return;
        }
        if let Err(error) = self.images.release_layers(self.holders(Face::Native)).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "layers of a removed image are left; prune them"
            );
        }
    }

    /// Removes what a sandbox that no record knows of has left on the host.
    ///
    /// # Errors
    /// The first part that could not be removed; the others are tried all the same.
    pub async fn remove_leftover(self: &Arc<Self>, id: &SandboxId) -> Result<(), LifecycleError> {
        let dir = self.sandbox_dir(id);
        let ended = self.handler.end_pod(id, &dir).await;
        let detached = self.networks.detach(id, None).await;
        let removed = remove_files(dir).await;
        self.settle(id);
        ended?;
        detached?;
        removed
    }

    /// Sees to it that a sandbox's link goes with its namespace; the kernel takes some 30 ms, for
    /// which no caller waits: an address may be given out again before.
    pub(super) fn settle(self: &Arc<Self>, id: &SandboxId) {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        tokio::spawn(async move {
            if let Err(error) = lifecycle.networks.settle(&id).await {
                tracing::warn!(sandbox_id = %id, error = &error as &dyn std::error::Error, "a link is left; fsck tells");
            }
        });
    }
}

async fn remove_files(dir: PathBuf) -> Result<(), LifecycleError> {
    blocking::run("remove sandbox directory", move || files::remove(&dir)).await
}

fn holder(at: &Snapshot, image: &ImageId, face: impl Fn(Face) -> bool) -> Option<String> {
    let of_system = at
        .all::<System>()
        .find(|system: &Arc<System>| face(Face::Native) && system.image_id == *image);
    if let Some(system) = of_system {
        return Some(System::holder(&system.id));
    }
    at.all::<Container>()
        .find(|container: &Arc<Container>| {
            face(container.config.face) && container.images().any(|held| held == image)
        })
        .map(|container| Container::holder(&container.id))
}

fn held_by_others(at: &Snapshot, image: &ImageId) -> Option<String> {
    holder(at, image, |face| face != Face::Cri)
}

fn held_by_anyone(at: &Snapshot, image: &ImageId) -> Option<String> {
    holder(at, image, |_| true)
}

/// Claims name the layers of containers, also of those that are being made.
fn held_layers(at: &Snapshot) -> HashSet<Digest> {
    at.claims("layer/")
        .filter_map(|(key, _)| {
            let hex = key.split('/').nth(1)?.to_owned();
            format!("sha256:{hex}").parse().ok()
        })
        .collect()
}
