//! The container node agent: images, networks, sandboxes and containers of one host.
//!
//! `ARCHITECTURE.md` beside this crate's manifest has the map, the arrows and the invariants.
#![forbid(unsafe_code)]

pub mod agent;
pub mod blocking;
pub mod cgroup;
pub mod clock;
pub mod config;
pub mod event;
pub mod handler;
pub mod id;
pub mod image;
pub mod lifecycle;
pub mod network;
pub mod node;
pub mod operation;
pub mod rootfs;
pub mod service;
pub mod signal;
pub mod store;
