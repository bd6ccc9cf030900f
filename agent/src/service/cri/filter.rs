//! List filters: all set fields must match; an unknown or ambiguous id gives an empty list.

use std::{collections::HashMap, sync::Arc};

use longshore_proto::cri::v1 as cri;

use super::render;
use crate::{
    id::Face,
    lifecycle::{Lifecycle, container::Container, sandbox::Sandbox},
    store::Snapshot,
};

/// Wishes of a list.
#[derive(Default)]
pub(super) struct Wish {
    pub(super) id: String,
    pub(super) sandbox: String,
    pub(super) state: Option<i32>,
    pub(super) labels: HashMap<String, String>,
}

impl From<Option<cri::PodSandboxFilter>> for Wish {
    fn from(filter: Option<cri::PodSandboxFilter>) -> Self {
        let filter = filter.unwrap_or_default();
        Self {
            id: filter.id,
            state: filter.state.map(|state| state.state),
            labels: filter.label_selector,
            ..Self::default()
        }
    }
}

impl From<Option<cri::PodSandboxStatsFilter>> for Wish {
    fn from(filter: Option<cri::PodSandboxStatsFilter>) -> Self {
        let filter = filter.unwrap_or_default();
        Self {
            id: filter.id,
            labels: filter.label_selector,
            ..Self::default()
        }
    }
}

impl From<Option<cri::ContainerFilter>> for Wish {
    fn from(filter: Option<cri::ContainerFilter>) -> Self {
        let filter = filter.unwrap_or_default();
        Self {
            id: filter.id,
            sandbox: filter.pod_sandbox_id,
            state: filter.state.map(|state| state.state),
            labels: filter.label_selector,
        }
    }
}

impl From<Option<cri::ContainerStatsFilter>> for Wish {
    fn from(filter: Option<cri::ContainerStatsFilter>) -> Self {
        let filter = filter.unwrap_or_default();
        Self {
            id: filter.id,
            sandbox: filter.pod_sandbox_id,
            labels: filter.label_selector,
            ..Self::default()
        }
    }
}

impl Wish {
    fn labels_match(&self, labels: &std::collections::BTreeMap<String, String>) -> bool {
        self.labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// Sandboxes of CRI that match, newest first.
pub(super) fn sandboxes(lifecycle: &Lifecycle, at: &Snapshot, wish: &Wish) -> Vec<Arc<Sandbox>> {
    let candidates: Vec<_> = if wish.id.is_empty() {
        at.all::<Sandbox>().collect()
    } else {
        lifecycle
            .find_sandbox(at, Face::Cri, &wish.id)
            .into_iter()
            .collect()
    };
    let mut found: Vec<_> = candidates
        .into_iter()
        .filter(|sandbox| sandbox.config.face == Face::Cri)
        .filter(|sandbox| {
            wish.state
                .is_none_or(|state| state == i32::from(render::sandbox_state(sandbox)))
        })
        .filter(|sandbox| wish.labels_match(&sandbox.config.labels))
        .collect();
    found.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at));
    found
}

/// Containers of CRI that match, newest first.
pub(super) fn containers(lifecycle: &Lifecycle, at: &Snapshot, wish: &Wish) -> Vec<Arc<Container>> {
    let candidates: Vec<_> = if wish.id.is_empty() {
        at.all::<Container>().collect()
    } else {
        lifecycle
            .find_container(at, Face::Cri, &wish.id)
            .into_iter()
            .collect()
    };
    let sandbox = if wish.sandbox.is_empty() {
        None
    } else {
        match lifecycle.find_sandbox(at, Face::Cri, &wish.sandbox) {
            Ok(sandbox) => Some(sandbox.id.clone()),
            Err(_) => return Vec::new(),
        }
    };
    let mut found: Vec<_> = candidates
        .into_iter()
        .filter(|container| container.config.face == Face::Cri)
        .filter(|container| {
            sandbox
                .as_ref()
                .is_none_or(|id| container.sandbox_id == *id)
        })
        .filter(|container| {
            wish.state
                .is_none_or(|state| state == i32::from(render::container_state(container)))
        })
        .filter(|container| wish.labels_match(&container.config.labels))
        .collect();
    found.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    found
}
