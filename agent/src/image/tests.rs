//! Pulls against real and hostile registries.
