//! What can go wrong with images. A variant is a different thing to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::manifest::Platform;
use super::reference::ReferenceError;
use super::source::auth::AuthError;
use crate::id::{Digest, ImageId};
use crate::rootfs::{LayerError, RootfsError};
use crate::store::StoreError;

/// Why an image verb failed. Nothing secret is ever in it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The text is no image reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The credentials can't be used as they are.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// No endpoint of the registry answered as a registry.
    #[error("registry {host} is not available: {}", Attempts(tried))]
    RegistryUnavailable {
        /// The registry, as in the reference.
        host: String,
        /// Each endpoint that was tried, with what happened there.
        tried: Vec<EndpointFailure>,
    },
    /// An endpoint's certificate or handshake was refused.
    #[error("TLS with {endpoint} failed: {reason}")]
    Tls {
        /// Scheme, host and port.
        endpoint: String,
        /// What the TLS library says.
        reason: String,
    },
    /// The registry keeps asking us to slow down.
    #[error("registry {host} limits our requests{}", RetryAfter(retry_after))]
    RateLimited {
        /// The registry, as in the reference.
        host: String,
        /// When it says to come back.
        retry_after: Option<Duration>,
    },
    /// The registry wants other credentials.
    #[error("access to {reference} denied by {host}: {reason}")]
    Denied {
        /// What was asked for.
        reference: String,
        /// Who refused: the registry or its token server.
        host: String,
        /// What it says.
        reason: String,
    },
    /// The registry does not have it.
    #[error("{reference} not found at {host}")]
    NotFound {
        /// What was asked for.
        reference: String,
        /// Who answered.
        host: String,
    },
    /// The registry answered with something that no registry should.
    #[error("registry {host} answered unexpectedly to {request}: {reason}")]
    UnexpectedAnswer {
        /// The registry, as in the reference.
        host: String,
        /// What was asked for.
        request: String,
        /// Status or defect.
        reason: String,
    },
    /// Nothing arrived for too long.
    #[error("no progress from {host} for {}s while fetching {what}", after.as_secs_f32())]
    Stalled {
        /// The registry, as in the reference.
        host: String,
        /// What was being fetched.
        what: String,
        /// The limit that was reached.
        after: Duration,
    },
    /// The image exists, but not for this platform.
    #[error("{reference} is not built for {wanted}; it has {}", List(available))]
    NoPlatform {
        /// The image.
        reference: String,
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        available: Vec<Platform>,
    },
    /// The image has a manifest of schema version 1, which names content that can't be verified.
    #[error(
        "{reference} has a manifest of schema 1, which is not supported: push it again with a current tool"
    )]
    Schema1 {
        /// The image.
        reference: String,
    },
    /// A manifest or configuration is not what its media type promises.
    #[error("{what} is malformed: {reason}")]
    Malformed {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A media type that this agent does not know.
    #[error("{what} has media type `{media_type}`, which is not supported")]
    UnsupportedMediaType {
        /// Which blob.
        what: String,
        /// Its type.
        media_type: String,
    },
    /// A layer that the registry does not distribute itself.
    #[error("layer {digest} is not distributed by registries (media type `{media_type}`)")]
    ForeignLayer {
        /// The layer.
        digest: Digest,
        /// Its type.
        media_type: String,
    },
    /// A document is larger than this agent accepts.
    #[error("{what} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// Which document.
        what: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// Content does not have the digest by which it was asked for.
    #[error("{what} has digest {actual} instead of {expected}")]
    DigestMismatch {
        /// Which content.
        what: String,
        /// By which digest it was named.
        expected: Digest,
        /// What it has.
        actual: Digest,
    },
    /// Content does not have the size that its descriptor says.
    #[error("{what} has {actual_bytes} bytes instead of {expected_bytes}")]
    SizeMismatch {
        /// Which content.
        what: String,
        /// As described.
        expected_bytes: u64,
        /// As received, or where reading stopped.
        actual_bytes: u64,
    },
    /// Manifest and configuration disagree about the layers.
    #[error("the manifest has {layers} layers, the configuration {diff_ids}")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// A layer could not be unpacked.
    #[error("cannot unpack layer {digest}")]
    Layer {
        /// The compressed layer.
        digest: Digest,
        /// Why.
        source: LayerError,
    },
    /// The root tree of a system container's image could not be unpacked.
    #[error("cannot unpack the root tree")]
    Root {
        /// Why.
        source: LayerError,
    },
    /// The root tree comes in a form that this agent does not read.
    #[error(
        "the root tree comes as {packing}, which this agent does not read: it reads tar, as it is or as gzip, xz, lzma or zstd"
    )]
    RootPacking {
        /// Which form.
        packing: String,
    },
    /// The root tree has nothing that could be its first process.
    #[error("the root tree has no init: /sbin/init is not there, or leads to no file")]
    NoInit,
    /// The image is not one that can be exported as a distribution's.
    #[error("image {image} is no distribution's image: {reason}")]
    NotSystem {
        /// The image.
        image: ImageId,
        /// What it lacks.
        reason: &'static str,
    },
    /// An export could not be packed, or its caller has gone.
    #[error("cannot export the image")]
    Export {
        /// Why.
        source: io::Error,
    },
    /// No remote has this name.
    #[error(
        "no remote `{name}` is configured in image.remotes; there {}",
        Remotes(known)
    )]
    UnknownRemote {
        /// As asked for.
        name: String,
        /// Those that are.
        known: Vec<String>,
    },
    /// A remote can't be used as it is configured.
    #[error("image.remotes.{remote}: {reason}")]
    RemoteConfig {
        /// Which table.
        remote: String,
        /// What is wrong there.
        reason: String,
    },
    /// A server of images answered with something else than the index that it should have.
    #[error("{url} is no {expected}: {reason}; it begins with \"{begins}\"")]
    BadIndex {
        /// What was asked for.
        url: String,
        /// What should be there, e.g. `simplestreams index`.
        expected: &'static str,
        /// What is wrong with it.
        reason: String,
        /// Its first bytes, escaped.
        begins: String,
    },
    /// The directories of layers refused.
    #[error("cannot {action}")]
    Rootfs {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: RootfsError,
    },
    /// The store refused.
    #[error("cannot record the image")]
    Store(#[from] StoreError),
    /// A blob could not be kept or read.
    #[error("cannot {action} {}", path.display())]
    Content {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A prefix of an id that several images share.
    #[error("`{prefix}` is ambiguous: {}", List(matches))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// The images with such an id, at most ten.
        matches: Vec<ImageId>,
    },
    /// There is no such image here.
    #[error("image `{name}` is not on this node")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// A container uses the image.
    #[error("image {image} is used by {holder}")]
    InUse {
        /// The image.
        image: ImageId,
        /// By whom, e.g. `container/<id>`.
        holder: String,
    },
    /// The configuration of registries can't be used.
    #[error("image.hosts.\"{host}\": {reason}")]
    Config {
        /// Which table.
        host: String,
        /// What is wrong.
        reason: String,
    },
    /// The pull was cancelled or the agent stops.
    #[error("the pull was cancelled")]
    Cancelled,
}

/// What happened at one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointFailure {
    /// Scheme, host and port.
    pub endpoint: String,
    /// What happened.
    pub reason: String,
}

struct Attempts<'a>(&'a [EndpointFailure]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, EndpointFailure { endpoint, reason }) in self.0.iter().enumerate() {
            let separator = if n == 0 { "" } else { "; " };
            write!(f, "{separator}{endpoint}: {reason}")?;
        }
        Ok(())
    }
}

struct Remotes<'a>(&'a [String]);

impl fmt::Display for Remotes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("is none"),
            known => write!(f, "are: {}", known.join(", ")),
        }
    }
}

struct RetryAfter<'a>(&'a Option<Duration>);

impl fmt::Display for RetryAfter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(after) => write!(f, " and asks to come back in {}s", after.as_secs()),
            None => Ok(()),
        }
    }
}

struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (n, item) in self.0.iter().enumerate() {
            let separator = if n == 0 { "" } else { ", " };
            write!(f, "{separator}{item}")?;
        }
        Ok(())
    }
}
