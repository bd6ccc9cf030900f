//! Generated types and services of CRI `runtime.v1` and of `longshore.v1`.
//!
//! The `.proto` files are the documentation; what is written by hand here is only what the
//! generator cannot know: reasons as text, and secrets that do not print.
#![forbid(unsafe_code)]

mod reason;
mod secret;

/// Kubernetes' Container Runtime Interface.
pub mod cri {
    /// `runtime.v1`.
    pub mod v1 {
        #![allow(
            missing_docs,
            clippy::all,
            reason = "generated; the signals have no comments"
        )]
        tonic::include_proto!("runtime.v1");

        /// Encoded `FileDescriptorSet` of this package, for server reflection.
        pub const FILE_DESCRIPTOR_SET: &[u8] =
            include_bytes!(concat!(env!("OUT_DIR"), "/cri.descriptors"));
    }
}

/// Longshore's own API.
pub mod longshore {
    /// `longshore.v1`.
    pub mod v1 {
        #![allow(clippy::all, reason = "generated")]
        tonic::include_proto!("longshore.v1");

        /// Encoded `FileDescriptorSet` of this package with what it imports, for server reflection.
        pub const FILE_DESCRIPTOR_SET: &[u8] =
            include_bytes!(concat!(env!("OUT_DIR"), "/longshore.descriptors"));

        /// Value of `google.rpc.ErrorInfo.domain` beside each [`ErrorReason`].
        pub const ERROR_DOMAIN: &str = "longshore";
    }
}
