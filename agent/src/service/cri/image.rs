//! CRI's ImageService.

use longshore_proto::cri::v1::{self as cri, image_service_server::ImageService};
use tonic::{Code, Request, Response, Status};

use super::{Cri, Streamed, chunks, render};
use crate::{
    clock::Time,
    id::Face,
    image::{
        AuthParts, Image, ImageError, ImageRef, Platform, PullRequest, RegistryAuth, RemoveRequest,
    },
    rootfs::Usage,
    service::{edge, status::ToStatus},
};

fn refused(error: impl ToStatus) -> Status {
    error.to_status()
}

fn image_name(image: Option<&cri::ImageSpec>) -> Result<String, Status> {
    let name = image.map(|image| image.image.clone()).unwrap_or_default();
    edge::required("image.image", &name).map_err(refused)?;
    edge::text("image.image", &name, 1024).map_err(refused)?;
    Ok(name)
}

/// Words that kubelet looks for at the beginning of a PullImage error; the code must be Unknown
/// for the text to reach it.
fn pull_status(error: &ImageError) -> Status {
    match error {
        ImageError::RegistryUnavailable { .. }
        | ImageError::Tls { .. }
        | ImageError::Stalled { .. } => {
            let status = error.to_status();
            Status::new(
                Code::Unknown,
                format!("RegistryUnavailable: {}", status.message()),
            )
        }
        other => other.to_status(),
    }
}

impl Cri {
    fn images(&self, filter: Option<cri::ImageFilter>) -> Result<Vec<cri::Image>, Status> {
        let at = self.agent.store.snapshot();
        let name = filter
            .and_then(|filter| filter.image)
            .unwrap_or_default()
            .image;
        if name.is_empty() {
            let all = self.agent.images.list(&at);
            return Ok(all.iter().map(|image| render::image(image)).collect());
        }
        // A filter is a lookup: an unknown, ambiguous or malformed name gives an empty list.
        let found = self.agent.images.find(&at, &name).ok().flatten();
        Ok(found.iter().map(|image| render::image(image)).collect())
    }

    async fn image_info(&self, image: &Image) -> Result<serde_json::Value, Status> {
        let raw = self
            .agent
            .images
            .raw_config(&image.id)
            .await
            .map_err(refused)?;
        let spec: serde_json::Value = serde_json::from_slice(&raw).unwrap_or_default();
        Ok(serde_json::json!({ "imageSpec": spec, "layers": image.layers }))
    }
}

fn auth(config: Option<cri::AuthConfig>, reference: &ImageRef) -> Result<RegistryAuth, Status> {
    let config = config.unwrap_or_default();
    let parts = AuthParts {
        username: config.username,
        password: config.password,
        auth: config.auth,
        server_address: config.server_address,
        identity_token: config.identity_token,
        registry_token: config.registry_token,
    };
    RegistryAuth::from_parts(&parts, reference).map_err(|error| refused(ImageError::from(error)))
}

#[tonic::async_trait]
impl ImageService for Cri {
    type StreamImagesStream = Streamed<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Result<Response<cri::ListImagesResponse>, Status> {
        let images = self.images(request.into_inner().filter)?;
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.images(request.into_inner().filter)?;
        Ok(Response::new(chunks(images, |images| {
            cri::StreamImagesResponse { images }
        })))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Result<Response<cri::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let name = image_name(request.image.as_ref())?;
        let at = self.agent.store.snapshot();
        let Some(image) = self.agent.images.find(&at, &name).map_err(refused)? else {
            return Ok(Response::new(cri::ImageStatusResponse::default()));
        };
        let info = if request.verbose {
            render::info(&self.image_info(&image).await?)
        } else {
            std::collections::HashMap::new()
        };
        Ok(Response::new(cri::ImageStatusResponse {
            image: Some(render::image(&image)),
            info,
        }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Result<Response<cri::PullImageResponse>, Status> {
        let request = request.into_inner();
        let name = image_name(request.image.as_ref())?;
        let reference: ImageRef = name
            .parse()
            .map_err(|error| refused(ImageError::Reference(error)))?;
        let auth = auth(request.auth, &reference)?;
        let pull = self.agent.images.pull(PullRequest {
            reference: reference.into(),
            auth,
            platform: Platform::host(),
            face: Face::Cri,
        });
        let pulled = pull.wait().await.map_err(|error| pull_status(&error))?;
        Ok(Response::new(cri::PullImageResponse {
            image_ref: pulled.image.to_string(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Result<Response<cri::RemoveImageResponse>, Status> {
        let name = image_name(request.into_inner().image.as_ref())?;
        let lifecycle = &self.agent.lifecycle;
        let request = RemoveRequest {
            name,
            face: Face::Cri,
            only_this_name: false,
        };
        match self
            .agent
            .images
            .remove(&request, lifecycle.holders(Face::Cri))
            .await
        {
            Ok(_) | Err(ImageError::Unknown { .. }) => {
                Ok(Response::new(cri::RemoveImageResponse {}))
            }
            Err(error) => Err(refused(error)),
        }
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Result<Response<cri::ImageFsInfoResponse>, Status> {
        let usage = self.agent.images.fs_usage(&self.agent.store.snapshot());
        let filesystem = render::filesystem(
            Time::now().unix_ns(),
            usage.path.to_string_lossy().into_owned(),
            Usage {
                bytes: usage.used_bytes,
                inodes: usage.inodes,
            },
        );
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![filesystem.clone()],
            container_filesystems: vec![filesystem],
        }))
    }
}
