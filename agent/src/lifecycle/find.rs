//! Finding sandboxes and containers by id or unique prefix, as a face sees them.

use std::sync::Arc;

use super::{Lifecycle, LifecycleError, container::Container, sandbox::Sandbox};
use crate::{
    id::Face,
    store::{Record, Snapshot},
};

impl Lifecycle {
    /// The sandbox with this id or unique prefix.
    ///
    /// # Errors
    /// `NotFound`, `Ambiguous`.
    pub fn find_sandbox(
        &self,
        at: &Snapshot,
        face: Face,
        id: &str,
    ) -> Result<Arc<Sandbox>, LifecycleError> {
        unique(at, "sandbox", id, |sandbox: &Sandbox| {
            sees(face, sandbox.config.face)
        })
    }

    /// The container with this id or unique prefix.
    ///
    /// # Errors
    /// `NotFound`, `Ambiguous`.
    pub fn find_container(
        &self,
        at: &Snapshot,
        face: Face,
        id: &str,
    ) -> Result<Arc<Container>, LifecycleError> {
        unique(at, "container", id, |container: &Container| {
            sees(face, container.config.face)
        })
    }
}

/// CRI sees its own objects only, the native face all.
pub(super) fn sees(face: Face, owner: Face) -> bool {
    face == Face::Native || owner == face
}

fn unique<R: Record>(
    at: &Snapshot,
    kind: &'static str,
    id: &str,
    visible: impl Fn(&R) -> bool,
) -> Result<Arc<R>, LifecycleError> {
    let not_found = || LifecycleError::NotFound {
        kind,
        id: id.chars().take(128).collect(),
    };
    if let Some(exact) = at.get::<R>(id).filter(|record| visible(record)) {
        return Ok(exact);
    }
    if id.is_empty() {
        return Err(not_found());
    }
    let mut found = at.by_prefix::<R>(id).filter(|record| visible(record));
    let first = found.next().ok_or_else(not_found)?;
    match found.count() {
        0 => Ok(first),
        more => Err(LifecycleError::Ambiguous {
            kind,
            prefix: id.chars().take(128).collect(),
            matches: more + 1,
        }),
    }
}
