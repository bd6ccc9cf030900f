//! The edge: the one place that knows protobuf, gRPC and HTTP.
//!
//! ```text
//!  RUN/longshore.sock, tcp:// --> layers (panics, time)  --> cri/     runtime.v1
//!                                                        --> native/  longshore.v1
//!                                                        --> health, reflection (v1, v1alpha)
//! ```
//! Each method is parse, call, render. Every domain error becomes a status in [`status`].

mod authority;
mod cri;
mod deadline;
pub mod edge;
mod native;
mod server;
pub mod status;
pub mod streaming;

pub use self::server::{ServeError, serve};
