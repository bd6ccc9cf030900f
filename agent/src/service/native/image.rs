//! ImageService.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::stream;
use longshore_proto::longshore::v1::{
    self as pb, image_service_server::ImageService, import_image_request::Part as ImportPart,
};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Native, Streamed,
    error::NativeError,
    idempotency::{self, Change as _},
    page::Page,
    parse, refused, render,
};
use crate::{
    id::{Face, ImageId},
    image::{
        Image, ImageError, PruneRequest, PrunedKind, PullRequest, Reference, RemoteImage, Removal,
        RemoveRequest,
    },
    lifecycle::container::Container,
    service::status::ToStatus as _,
    store::Snapshot,
};

/// At most ten pictures of a pull in a second.
const PICTURE_EVERY: Duration = Duration::from_millis(100);
const PULL: &str = "PullImage";

impl Native {
    fn image(&self, at: &Snapshot, name: &str) -> Result<Arc<Image>, Status> {
        parse::image("image", name).map_err(refused)?;
        self.agent
            .images
            .find(at, name)
            .map_err(refused)?
            .ok_or_else(|| {
                refused(ImageError::Unknown {
                    name: name.to_owned(),
                })
            })
    }

    /// A pull as a stream: pictures, then its result. Dropping it leaves the pull.
    fn pull(
        &self,
        request: PullRequest,
        done: impl FnOnce(&pb::PulledImage) + Send + 'static,
    ) -> Streamed<pb::PullImageResponse> {
        let (pull, cancelled) = self.begin_pull(request);
        let mut progress = pull.progress();
        progress.mark_changed();
        let mut ticks = tokio::time::interval(PICTURE_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let state = Some((pull, cancelled, progress, ticks, done));
        Box::pin(stream::unfold(state, |state| async {
            let (pull, cancelled, mut progress, mut ticks, done) = state?;
            let picture = async {
                loop {
                    ticks.tick().await;
                    if progress.changed().await.is_err() {
                        // The pull has ended; its result follows.
                        std::future::pending::<()>().await;
                    }
                    let picture = render::progress(&progress.borrow_and_update());
                    if let Some(picture) = picture {
                        return picture;
                    }
                }
            };
            // Whichever comes first; the result counts even if a picture is there as well.
            let result = tokio::select! {
                biased;
                result = pull.wait() => result.map_err(|error| error.to_status()),
                () = cancelled.ended() => Err(cancelled.status()),
                picture = picture => {
                    let update = pb::pull_image_response::Update::Progress(picture);
                    let next = Some((pull, cancelled, progress, ticks, done));
                    return Some((Ok(said(update)), next));
                }
            };
            cancelled.finish(result.as_ref().err());
            let answer = result.map(|pulled| {
                let pulled = render::pulled(&pulled);
                done(&pulled);
                said(pb::pull_image_response::Update::Result(pulled))
            });
            Some((answer, None))
        }))
    }

    async fn remove(
        self,
        request: pb::RemoveImageRequest,
    ) -> Result<pb::RemoveImageResponse, Status> {
        parse::image("image", &request.image).map_err(refused)?;
        let at = self.agent.store.snapshot();
        let Some(image) = self
            .agent
            .images
            .find(&at, &request.image)
            .map_err(refused)?
        else {
            return Ok(pb::RemoveImageResponse::default());
        };
        let protected = |holder: &str| {
            refused(NativeError::Protected {
                image: image.id.to_string(),
                holder: holder.to_owned(),
            })
        };
        if image.pinned {
            return Err(protected("pin"));
        }
        let removal = RemoveRequest {
            only_this_name: is_named_by(&image, &request.image),
            name: request.image,
            face: Face::Native,
        };
        let removed = self
            .agent
            .images
            .remove(&removal, self.lifecycle().holders(Face::Native))
            .await
            .map_err(refused)?;
        match removed {
            Removal::Absent => Ok(pb::RemoveImageResponse::default()),
            // Ours has gone; another face's is not ours to take.
            Removal::KeptFor(_, Face::Cri | Face::Native)
                if image.faces.contains(&Face::Native) =>
            {
                Ok(pb::RemoveImageResponse::default())
            }
            Removal::KeptFor(_, Face::Cri) => Err(protected("face/cri")),
            Removal::KeptFor(_, Face::Native) => Err(protected("face/native")),
            Removal::Removed(id) => Ok(pb::RemoveImageResponse {
                removed_references: image.names().map(str::to_owned).collect(),
                removed_image_id: id.to_string(),
            }),
            Removal::Untagged(id) => Ok(pb::RemoveImageResponse {
                removed_references: lost_names(
                    &image,
                    self.agent
                        .store
                        .snapshot()
                        .get::<Image>(id.as_str())
                        .as_deref(),
                ),
                removed_image_id: String::new(),
            }),
        }
    }

    async fn prune(
        self,
        request: pb::PruneImagesRequest,
    ) -> Result<pb::PruneImagesResponse, Status> {
        let before = self.agent.store.snapshot();
        let prune = PruneRequest {
            face: Face::Native,
            all: true,
            dry_run: request.dry_run,
        };
        let pruned = self
            .agent
            .images
            .prune(&prune, self.lifecycle().holders(Face::Native))
            .await
            .map_err(refused)?;
        let mut gone = HashMap::new();
        let mut reclaimed_bytes = 0;
        for one in &pruned {
            match &one.kind {
                PrunedKind::Image { id, .. } => drop(gone.insert(id.clone(), ())),
                PrunedKind::Layer(_) => reclaimed_bytes += one.bytes,
                PrunedKind::Blob(_) | PrunedKind::PartialBlob(_) => {}
            }
        }
        let decisions = self
            .agent
            .images
            .list(&before)
            .iter()
            .map(|image| self.decision(&before, image, gone.contains_key(&image.id)))
            .collect();
        Ok(pb::PruneImagesResponse {
            decisions,
            reclaimed_bytes,
        })
    }

    fn decision(&self, at: &Snapshot, image: &Image, removed: bool) -> pb::PruneDecision {
        let holder = user(at, &image.id);
        let other_face = image.faces.iter().find(|face| **face != Face::Native);
        let (reason, holder) = match (removed, holder, image.pinned, other_face) {
            (true, ..) if image.tags.is_empty() => (pb::PruneReason::Untagged, String::new()),
            (true, ..) => (pb::PruneReason::Unused, String::new()),
            (false, Some(holder), ..) => (pb::PruneReason::InUse, holder),
            (false, None, true, _) => (pb::PruneReason::Pinned, "pin".to_owned()),
            (false, None, false, Some(Face::Cri | Face::Native)) => {
                (pb::PruneReason::OtherFace, "face/cri".to_owned())
            }
            (false, None, false, None) => (pb::PruneReason::Busy, String::new()),
        };
        let references = if image.tags.is_empty() {
            image.digests.iter().cloned().collect()
        } else {
            image.tags.iter().cloned().collect()
        };
        pb::PruneDecision {
            image_id: image.id.to_string(),
            references,
            removed,
            reason: reason.into(),
            holder,
            size_bytes: image.size_bytes,
        }
    }
}

fn note(broken: &Mutex<Option<Status>>, status: Status) {
    *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
}

fn said(update: pb::pull_image_response::Update) -> pb::PullImageResponse {
    pb::PullImageResponse {
        update: Some(update),
    }
}

/// The text is one of the image's names, not its id.
fn is_named_by(image: &Image, text: &str) -> bool {
    text.parse::<Reference>()
        .map(|reference| reference.to_string())
        .is_ok_and(|name| image.tags.contains(&name) || image.digests.contains(&name))
}

fn lost_names(before: &Image, after: Option<&Image>) -> Vec<String> {
    before
        .names()
        .filter(|name| after.is_none_or(|after| !after.names().any(|kept| kept == *name)))
        .map(str::to_owned)
        .collect()
}

/// A container that uses the image.
fn user(at: &Snapshot, id: &ImageId) -> Option<String> {
    at.all::<Container>()
        .find(|container| container.image_id == *id)
        .map(|container| Container::holder(&container.id))
}

#[tonic::async_trait]
impl ImageService for Native {
    type PullImageStream = Streamed<pb::PullImageResponse>;
    type ExportImageStream = Streamed<pb::ExportImageResponse>;

    async fn pull_image(
        &self,
        request: Request<pb::PullImageRequest>,
    ) -> Result<Response<Self::PullImageStream>, Status> {
        let request = request.into_inner();
        idempotency::check_key(request.key()).map_err(refused)?;
        let (key, content) = (request.idempotency_key.clone(), request.content());
        let wish = PullRequest {
            reference: parse::wanted(&request).map_err(refused)?,
            auth: parse::auth(request.auth).map_err(refused)?,
            platform: parse::platform(request.platform).map_err(refused)?,
            face: Face::Native,
        };
        if key.is_empty() {
            return Ok(Response::new(self.pull(wish, |_| {})));
        }
        if let Some(pulled) = self
            .idempotency
            .earlier::<pb::PulledImage>(PULL, &key, &content)?
        {
            let update = pb::pull_image_response::Update::Result(pulled);
            return Ok(Response::new(Box::pin(stream::once(async {
                Ok(said(update))
            }))));
        }
        let keys = self.idempotency.clone();
        Ok(Response::new(self.pull(wish, move |pulled| {
            keys.keep(PULL, &key, content, pulled)
        })))
    }

    async fn import_image(
        &self,
        request: Request<Streaming<pb::ImportImageRequest>>,
    ) -> Result<Response<pb::ImportImageResponse>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.part);
        let Some(ImportPart::Target(target)) = first else {
            return Err(refused(NativeError::Unexpected { expected: "target" }));
        };
        let wish = parse::import(target).map_err(refused)?;
        // What ended the stream early is the answer, and not what that did to the import.
        let broken = Mutex::new(None);
        let chunks = stream::unfold(messages, |mut messages| async {
            match messages.message().await {
                Ok(Some(message)) => match message.part {
                    Some(ImportPart::Chunk(chunk)) => return Some((chunk, messages)),
                    _ => note(
                        &broken,
                        refused(NativeError::Unexpected { expected: "chunk" }),
                    ),
                },
                Ok(None) => {}
                Err(status) => note(&broken, status),
            }
            None
        });
        let imported = self.agent.images.import(&wish, Box::pin(chunks)).await;
        if let Some(status) = broken.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(status);
        }
        let imported = imported.map_err(refused)?;
        let image = self.image(&self.agent.store.snapshot(), imported.image.as_str())?;
        Ok(Response::new(pb::ImportImageResponse {
            image: Some(render::image(&image)),
            changed: imported.changed,
        }))
    }

    async fn export_image(
        &self,
        request: Request<pb::ExportImageRequest>,
    ) -> Result<Response<Self::ExportImageStream>, Status> {
        let request = request.into_inner();
        parse::image("image", &request.image).map_err(refused)?;
        let packing = parse::packing(request.packing).map_err(refused)?;
        let export = self.agent.images.export(&request.image, packing).await;
        let chunks = stream::unfold(export.map_err(refused)?, |mut export| async move {
            let chunk = export.next().await?;
            let answer = chunk.map(|chunk| pb::ExportImageResponse { chunk });
            Some((answer.map_err(refused), export))
        });
        Ok(Response::new(Box::pin(chunks)))
    }

    async fn list_remote_images(
        &self,
        request: Request<pb::ListRemoteImagesRequest>,
    ) -> Result<Response<pb::ListRemoteImagesResponse>, Status> {
        let request = request.into_inner();
        let page =
            Page::new("remote images", request.page_size, &request.page_token).map_err(refused)?;
        let filter = parse::remote_filter(request).map_err(refused)?;
        let found = self
            .agent
            .images
            .list_remote(&filter)
            .await
            .map_err(refused)?;
        let (images, next_page_token) = page.cut(found, |image| {
            let RemoteImage {
                remote,
                os,
                release,
                variant,
                architecture,
                ..
            } = image;
            [remote, os, release, variant, architecture]
                .map(String::as_str)
                .join("/")
        });
        Ok(Response::new(pb::ListRemoteImagesResponse {
            images: images.into_iter().map(render::remote_image).collect(),
            next_page_token,
        }))
    }

    async fn list_images(
        &self,
        request: Request<pb::ListImagesRequest>,
    ) -> Result<Response<pb::ListImagesResponse>, Status> {
        let request = request.into_inner();
        let page = Page::new("images", request.page_size, &request.page_token).map_err(refused)?;
        let at = self.agent.store.snapshot();
        let found = if request.image.is_empty() {
            self.agent.images.list(&at)
        } else {
            parse::image("image", &request.image).map_err(refused)?;
            let found = self
                .agent
                .images
                .find(&at, &request.image)
                .map_err(refused)?;
            found.into_iter().collect()
        };
        let found = found
            .into_iter()
            .filter(|image| parse::labels_match(&request.label_selector, &image.config.labels));
        let (images, next_page_token) = page.cut(found, |image| image.id.to_string());
        Ok(Response::new(pb::ListImagesResponse {
            images: images.iter().map(|image| render::image(image)).collect(),
            next_page_token,
        }))
    }

    async fn get_image(
        &self,
        request: Request<pb::GetImageRequest>,
    ) -> Result<Response<pb::GetImageResponse>, Status> {
        let request = request.into_inner();
        let at = self.agent.store.snapshot();
        let image = self.image(&at, &request.image)?;
        let layers = self.agent.images.layers(&at, &image).map_err(refused)?;
        let config_json = if request.verbose {
            let raw = self
                .agent
                .images
                .raw_config(&image.id)
                .await
                .map_err(refused)?;
            String::from_utf8_lossy(&raw).into_owned()
        } else {
            String::new()
        };
        Ok(Response::new(pb::GetImageResponse {
            image: Some(render::image(&image)),
            config: Some(render::image_config(&image.config)),
            layers: layers.iter().map(render::layer).collect(),
            config_json,
            container_ids: at
                .all::<Container>()
                .filter(|container| container.image_id == image.id)
                .map(|container| container.id.to_string())
                .collect(),
        }))
    }

    async fn tag_image(
        &self,
        request: Request<pb::TagImageRequest>,
    ) -> Result<Response<pb::TagImageResponse>, Status> {
        let work = |native: Self, request: pb::TagImageRequest| async move {
            parse::image("image", &request.image).map_err(refused)?;
            let tag = parse::tag(&request.tag).map_err(refused)?;
            let id = native
                .agent
                .images
                .tag(&request.image, &tag, Face::Native)
                .await
                .map_err(refused)?;
            let image = native.image(&native.agent.store.snapshot(), id.as_str())?;
            Ok(pb::TagImageResponse {
                image: Some(render::image(&image)),
            })
        };
        self.change("TagImage", request, work).await
    }

    async fn remove_image(
        &self,
        request: Request<pb::RemoveImageRequest>,
    ) -> Result<Response<pb::RemoveImageResponse>, Status> {
        self.change("RemoveImage", request, Self::remove).await
    }

    async fn prune_images(
        &self,
        request: Request<pb::PruneImagesRequest>,
    ) -> Result<Response<pb::PruneImagesResponse>, Status> {
        self.change("PruneImages", request, Self::prune).await
    }
}
