//! What can go wrong with a layer and with root file systems.

use std::{io, path::PathBuf};

use rustix::io::Errno;

use crate::id::{ContainerId, Digest};

/// A layer that can't be unpacked.
///
/// `Source`, `Cancelled`, `NoSpace` and `Kernel` say something about this machine; every other
/// variant is about the image, and trying again does not help.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream that the layer comes from failed.
    #[error("read the layer's stream at byte {offset}")]
    Source {
        /// Bytes that had been read before.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// Whoever wanted the layer does not want it any more.
    #[error("unpacking was cancelled")]
    Cancelled,
    /// The stream ends inside of a header or of a file's content.
    #[error("the archive ends early, at byte {offset}")]
    Truncated {
        /// Where it ends.
        offset: u64,
    },
    /// A header that no tar format explains.
    #[error("bad header before byte {offset} of the archive: {fault}")]
    Header {
        /// End of the header.
        offset: u64,
        /// What is wrong with it.
        fault: HeaderFault,
    },
    /// A name that can't be given to a file of the image.
    #[error("entry {path:?}: {fault}")]
    Path {
        /// The name as written in the archive.
        path: PathBuf,
        /// What is wrong with it.
        fault: PathFault,
    },
    /// An entry of a type that layers do not have.
    #[error("entry {path:?} has the unsupported type {kind:#04x}")]
    Unsupported {
        /// The entry.
        path: PathBuf,
        /// Type flag of its header.
        kind: u8,
    },
    /// A whiteout that names nothing that a lower layer could have.
    #[error("whiteout {path:?} names no file")]
    Whiteout {
        /// The entry.
        path: PathBuf,
    },
    /// A file of this layer stands where the entry needs a directory.
    #[error("entry {path:?} lies below something that is not a directory")]
    ParentNotDirectory {
        /// The entry's directory.
        path: PathBuf,
    },
    /// Symbolic links of the layer that lead nowhere.
    #[error("too many symbolic links on the way to {path:?}")]
    SymlinkLoop {
        /// Where to.
        path: PathBuf,
    },
    /// A hard link to something that this layer does not have, or that can't have one.
    #[error("hard link {path:?} to {target:?}, which is no file of this layer")]
    LinkTarget {
        /// The entry.
        path: PathBuf,
        /// What it links to.
        target: PathBuf,
    },
    /// An extended attribute through which a layer would steer the host's overlay.
    #[error("entry {path:?} sets the reserved attribute {name:?}")]
    Attribute {
        /// The entry.
        path: PathBuf,
        /// Name of the attribute.
        name: String,
    },
    /// The map of a sparse file contradicts itself or the entry's size.
    #[error("entry {path:?} has an impossible map of holes")]
    Sparse {
        /// The entry.
        path: PathBuf,
    },
    /// The layer is larger than layers may be.
    #[error("the layer has more than {limit} {what}")]
    TooLarge {
        /// What there is too much of.
        what: LimitKind,
        /// The limit.
        limit: u64,
    },
    /// The file system with the layers is full.
    #[error("no space for {path:?}")]
    NoSpace {
        /// The entry.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("{call} for {path:?}")]
    Kernel {
        /// System call.
        call: &'static str,
        /// The entry.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
}

/// See [`LayerError::Header`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// Sum of the bytes.
    #[error("the checksum does not match")]
    Checksum,
    /// A numeric field, by name.
    #[error("field `{0}` is not a number in range")]
    Number(&'static str),
    /// Records of a PAX header.
    #[error("malformed PAX records")]
    Pax,
    /// A long name or PAX header beyond [`super::Limits::header_bytes`].
    #[error("an extended header is too long")]
    TooLong,
    /// A header block right after a block of zeros.
    #[error("a lone block of zeros")]
    LoneZeroBlock,
}

/// See [`LayerError::Path`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathFault {
    /// No name at all.
    #[error("the name is empty")]
    Empty,
    /// A component `..`.
    #[error("`..` in a name")]
    DotDot,
    /// A NUL byte.
    #[error("a NUL byte in a name")]
    Nul,
    /// More than 255 bytes between two slashes.
    #[error("a component of the name is longer than 255 bytes")]
    ComponentTooLong,
    /// More than 4095 bytes.
    #[error("the name is longer than 4095 bytes")]
    TooLong,
    /// Something other than a directory for the root.
    #[error("the root can only be a directory")]
    Root,
}

/// See [`LayerError::TooLarge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitKind {
    /// [`super::Limits::content_bytes`].
    #[error("bytes of content")]
    ContentBytes,
    /// [`super::Limits::file_bytes`].
    #[error("bytes in one file")]
    FileBytes,
    /// [`super::Limits::entries`].
    #[error("entries")]
    Entries,
    /// [`super::Limits::directory_name_bytes`].
    #[error("bytes of directory names and attributes")]
    DirectoryNames,
    /// [`super::Limits::link_steps`].
    #[error("steps through symbolic links")]
    LinkSteps,
    /// [`super::Limits::trailing_bytes`].
    #[error("bytes after the end of the archive")]
    TrailingBytes,
}

/// A root file system that can't be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A layer can't be unpacked.
    #[error("unpack layer")]
    Layer(#[from] LayerError),
    /// The kernel refused.
    #[error("{call} {path:?}")]
    Kernel {
        /// System call, or what several of them are for.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
    /// A layer's directory is gone although a record says that it is there.
    #[error("layer {diff_id} has lost its directory {dir}")]
    LayerLost {
        /// The layer.
        diff_id: Digest,
        /// Number of its directory.
        dir: u32,
    },
    /// The path names something that has no content.
    #[error("{path:?} of the image is not a regular file")]
    NotAFile {
        /// As asked for.
        path: PathBuf,
    },
    /// The path names something that is no directory.
    #[error("{path:?} of the image is not a directory")]
    NotADirectory {
        /// As asked for.
        path: PathBuf,
    },
    /// The file is larger than the caller wants.
    #[error("{path:?} of the image has more than {limit_bytes} bytes")]
    FileTooLarge {
        /// As asked for.
        path: PathBuf,
        /// What the caller wants at most.
        limit_bytes: u64,
    },
    /// Symbolic links of the image that lead nowhere.
    #[error("too many symbolic links on the way to {path:?} of the image")]
    SymlinkLoop {
        /// As asked for.
        path: PathBuf,
    },
    /// A container's directory, mounted or in use, can't be removed yet.
    #[error("the writable layer of {container} is in use")]
    Busy {
        /// Whose.
        container: ContainerId,
    },
    /// A tree that changed too quickly to be measured.
    #[error("{path:?} changes while it is measured")]
    Changing {
        /// The tree.
        path: PathBuf,
    },
}

impl RootfsError {
    pub(super) fn kernel(
        call: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(Errno) -> Self {
        let path = path.into();
        move |source| Self::Kernel { call, path, source }
    }
}
