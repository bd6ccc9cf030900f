//! Where images come from: registries, their mirrors, and who we are there.
//!
//! The wire is spoken on `reqwest`, not on `oci-client`, because that client (0.18) reads manifests
//! without a limit, hides Retry-After and failed token requests, does not renew a token that ends in
//! the middle of a pull, and remembers the first caller's credentials for all later ones.

pub(crate) mod auth;
pub(crate) mod hosts;
pub(crate) mod registry;
pub(crate) mod rounds;
