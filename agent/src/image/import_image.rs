//! ImportImage: files that a caller sends become an image.
//!
//! ```text
//! one file     metadata.yaml, rootfs/ and templates/ in it: a unified image; else a root tree alone
//! two files    metadata, then the root tree
//! ```
//! Nothing is kept before it is verified and complete: the bytes go from the caller into the unpacker.
//! A caller that leaves, or that sends nothing for too long, leaves nothing behind.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, watch};

use super::error::ImageError;
use super::manifest::Platform;
use super::pull_image::CHUNKS;
use super::reference::ImageRef;
use super::system::About;
use super::system::catalog::platform_of;
use super::system::metadata::Metadata;
use super::system::pull::{METADATA_MAX_BYTES, RootSource, commit_root, read_metadata, unpack};
use super::system::reference::Reference;
use super::unpacking::{ReadyRoot, RootDigests};
use super::{Images, Inner};
use crate::blocking;
use crate::id::{Face, ImageId};
use crate::rootfs::RootShape;

/// What a caller sends.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// The name that the image gets.
    pub tag: Option<ImageRef>,
    /// What the image must run on; what a root tree alone is taken for.
    pub platform: Platform,
    /// Whose image it will be.
    pub face: Face,
    /// How large each file is: one, or metadata and root tree.
    pub sizes: ImportSizes,
}

/// How large the files of an import are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportSizes {
    /// A unified image, or a root tree alone.
    One(u64),
    /// Metadata and root tree.
    Pair(u64, u64),
}

/// What an import made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The image.
    pub image: ImageId,
    /// Whether anything here changed.
    pub changed: bool,
}

impl Images {
    /// Makes an image of the files that `chunks` are, one after the other.
    ///
    /// # Errors
    /// `SizeMismatch` for files of other sizes, `Stalled`, `Malformed`, `NoPlatform`, `RootPacking`,
    /// `NoInit`, `Root`, `Store`, `Content`.
    pub async fn import(
        &self,
        request: &ImportRequest,
        chunks: impl Stream<Item = Bytes> + Send + Unpin,
    ) -> Result<Imported, ImageError> {
        let inner = &self.inner;
        let _running = Importing::begin(inner);
        let mut sent = Sent {
            chunks: Box::pin(chunks),
            rest: Bytes::new(),
            stall: inner.config.stall_timeout,
        };
        let mut before = Sha256::new();
        let (metadata, size_bytes) = match request.sizes {
            ImportSizes::One(size) => (None, size),
            ImportSizes::Pair(metadata, root) => {
                let bytes = sent.whole("metadata", metadata).await?;
                before.update(&bytes);
                let read = move || Metadata::of_image(&read_metadata(bytes)?);
                let metadata = blocking::run("read metadata of an image", read).await?;
                (Some(metadata), root)
            }
        };
        let shape = match metadata {
            Some(_) => RootShape::Root,
            None => RootShape::RootOrUnified,
        };
        let root = sent.unpack(inner, size_bytes, before, shape).await?;
        sent.ends(size_bytes).await?;
        let metadata = match (metadata, &root.beside) {
            (Some(metadata), _) => metadata,
            (None, Some(files)) => Metadata::of_image(files)?,
            (None, None) => Metadata::default(),
        };
        let about = metadata.about();
        let platform = platform(&metadata, &about, request)?;
        let named = (request.tag.clone().map(Reference::Registry), request.face);
        let image = commit_root(inner, named, &about, &metadata, &platform, root).await?;
        tracing::info!(image = %image.id, changed = image.changed, "image imported");
        Ok(Imported {
            image: image.id,
            changed: image.changed,
        })
    }

    /// Tells whether layers are being unpacked that no record names yet.
    pub fn is_unpacking(&self) -> bool {
        self.inner.imports.load(Ordering::SeqCst) > 0 || !self.running_pulls().is_empty()
    }
}

/// What the image runs on, which must be what the caller wants.
fn platform(
    metadata: &Metadata,
    about: &About,
    request: &ImportRequest,
) -> Result<Platform, ImageError> {
    let Some(architecture) = &metadata.architecture else {
        return Ok(request.platform.clone());
    };
    let platform = platform_of(architecture).ok_or_else(|| ImageError::Malformed {
        what: "the image's metadata".to_owned(),
        reason: format!("architecture `{architecture}` is none that is known"),
    })?;
    if request.platform.distance(&platform).is_none() {
        return Err(ImageError::NoPlatform {
            reference: format!("the imported image ({})", about.description),
            wanted: request.platform.clone(),
            available: vec![platform],
        });
    }
    Ok(platform)
}

/// An import under way, as long as it lives.
struct Importing<'a>(&'a Inner);

impl<'a> Importing<'a> {
    fn begin(inner: &'a Arc<Inner>) -> Self {
        inner.imports.fetch_add(1, Ordering::SeqCst);
        Self(inner)
    }
}

impl Drop for Importing<'_> {
    fn drop(&mut self) {
        self.0.imports.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The bytes of all files, one after the other.
struct Sent<'a> {
    chunks: Pin<Box<dyn Stream<Item = Bytes> + Send + 'a>>,
    /// What came with the end of the file before.
    rest: Bytes,
    stall: std::time::Duration,
}

impl Sent<'_> {
    /// The next bytes, at most `wanted`; `None` at the end of all.
    async fn next(&mut self, what: &str, wanted: u64) -> Result<Option<Bytes>, ImageError> {
        while self.rest.is_empty() {
            let next = tokio::time::timeout(self.stall, self.chunks.next()).await;
            let next = next.map_err(|_| ImageError::Stalled {
                host: "the caller".to_owned(),
                what: what.to_owned(),
                after: self.stall,
            })?;
            match next {
                Some(chunk) => self.rest = chunk,
                None => return Ok(None),
            }
        }
        let length = usize::try_from(wanted)
            .unwrap_or(usize::MAX)
            .min(self.rest.len());
        Ok(Some(self.rest.split_to(length)))
    }

    /// A small file.
    async fn whole(&mut self, what: &str, size_bytes: u64) -> Result<Bytes, ImageError> {
        if size_bytes > METADATA_MAX_BYTES {
            return Err(ImageError::TooLarge {
                what: what.to_owned(),
                limit_bytes: METADATA_MAX_BYTES,
            });
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size_bytes {
            let left = size_bytes - bytes.len() as u64;
            match self.next(what, left).await? {
                Some(chunk) => bytes.extend_from_slice(&chunk),
                None => return Err(short(what, size_bytes, bytes.len() as u64)),
            }
        }
        Ok(bytes.into())
    }

    async fn unpack(
        &mut self,
        inner: &Arc<Inner>,
        size_bytes: u64,
        before: Sha256,
        shape: RootShape,
    ) -> Result<ReadyRoot, ImageError> {
        let (sender, incoming) = mpsc::channel(CHUNKS);
        let (begun, has_begun) = watch::channel(false);
        let what = "root tree";
        let feed = async {
            let (sender, begun) = (sender, begun);
            let mut at = 0;
            while at < size_bytes {
                let Some(chunk) = self.next(what, size_bytes - at).await? else {
                    return Err(short(what, size_bytes, at));
                };
                at += chunk.len() as u64;
                begun.send_replace(true);
                if sender.send(chunk).await.is_err() {
                    return Err(ImageError::Cancelled);
                }
            }
            begun.send_replace(true);
            Ok(())
        };
        let source = RootSource {
            partial: None,
            incoming,
            size_bytes,
            before,
        };
        let unpack = unpack(inner, source, RootDigests::default(), shape, has_begun);
        match tokio::join!(feed, unpack) {
            // The unpacker stopped listening, and knows why.
            (Err(ImageError::Cancelled) | Ok(()), unpacked) => unpacked,
            (Err(error), _) => Err(error),
        }
    }

    /// Requires that nothing more comes.
    async fn ends(&mut self, size_bytes: u64) -> Result<(), ImageError> {
        match self.next("the end", u64::MAX).await? {
            None => Ok(()),
            Some(more) => Err(short(
                "root tree",
                size_bytes,
                size_bytes + more.len() as u64,
            )),
        }
    }
}

fn short(what: &str, expected_bytes: u64, actual_bytes: u64) -> ImageError {
    ImageError::SizeMismatch {
        what: format!("{what} that was sent"),
        expected_bytes,
        actual_bytes,
    }
}
