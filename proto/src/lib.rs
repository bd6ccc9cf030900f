//! Generated types and services of CRI `runtime.v1` and of `longshore.v1`.
#![forbid(unsafe_code)]

/// Kubernetes' Container Runtime Interface.
pub mod cri {
    /// `runtime.v1`.
    #[allow(missing_docs, clippy::all)]
    pub mod v1 {
        tonic::include_proto!("runtime.v1");
    }
}
