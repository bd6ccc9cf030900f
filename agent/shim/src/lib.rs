//! The supervisor of one pod. The agent imports [`wire`] and nothing else.

pub mod wire;
