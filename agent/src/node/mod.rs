//! The host: whether it can do its work, and whether it agrees with the store.

pub mod check;
pub mod fsck;
