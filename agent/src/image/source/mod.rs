//! Where images come from: registries, their mirrors, who we are there, and servers of distributions'
//! images.
//!
//! The wire is spoken on `reqwest`, not on `oci-client`, because that client (0.18) reads manifests
//! without a limit, hides Retry-After and failed token requests, does not renew a token that ends in
//! the middle of a pull, and remembers the first caller's credentials for all later ones.

pub(crate) mod auth;
pub(crate) mod hosts;
pub(crate) mod http;
pub(crate) mod lxc;
pub(crate) mod registry;
pub(crate) mod remotes;
pub(crate) mod rounds;
pub(crate) mod server;
pub(crate) mod simplestreams;
