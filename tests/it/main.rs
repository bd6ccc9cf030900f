//! End-to-end tests: a real agent on a machine of its own, a real registry, a real kernel.
//!
//! Each test ends with the comparison of everything the agent could have left behind.
#![forbid(unsafe_code)]

mod bad_input;
mod cni;
mod crash;
mod cri;
mod foreign;
mod handlers;
mod images;
mod kubelet;
mod lifecycle;
mod native;
mod network;
mod remotes;
mod system;
mod systemd;
mod tidy;
mod tree;
mod two_agents;
mod user_namespaces;
