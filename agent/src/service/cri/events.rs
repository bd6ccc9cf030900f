//! GetContainerEvents: CRI's view of the event log, from the subscription on.

use futures_util::stream;
use longshore_proto::cri::v1 as cri;

use super::{Cri, Streamed, render};
use crate::{
    clock::Time,
    event::{Event, EventDraft, EventKind, Watch},
    id::Face,
    lifecycle::sandbox::Sandbox,
    service::status::ToStatus as _,
};

impl Cri {
    /// Events of CRI's own sandboxes and containers, without end.
    pub(super) fn events(&self, watch: Watch) -> Streamed<cri::ContainerEventResponse> {
        let cri = self.clone();
        Box::pin(stream::unfold(Some((cri, watch)), |state| async {
            let (cri, mut watch) = state?;
            loop {
                match watch.next().await {
                    Ok(event) => {
                        if let Some(message) = cri.event(&event) {
                            return Some((Ok(message), Some((cri, watch))));
                        }
                    }
                    Err(error) => return Some((Err(error.to_status()), None)),
                }
            }
        }))
    }

    fn event(&self, event: &Event) -> Option<cri::ContainerEventResponse> {
        let what = &event.what;
        if what.face != Face::Cri {
            return None;
        }
        let kind = match what.kind {
            EventKind::SandboxCreated | EventKind::ContainerCreated => {
                cri::ContainerEventType::ContainerCreatedEvent
            }
            EventKind::SandboxStarted | EventKind::ContainerStarted => {
                cri::ContainerEventType::ContainerStartedEvent
            }
            EventKind::SandboxStopped | EventKind::SandboxLost | EventKind::ContainerExited => {
                cri::ContainerEventType::ContainerStoppedEvent
            }
            EventKind::SandboxRemoved | EventKind::ContainerRemoved => {
                cri::ContainerEventType::ContainerDeletedEvent
            }
            EventKind::AgentStarted
            | EventKind::ContainerOom
            | EventKind::ContainerUpdated
            | EventKind::ImagePulled
            | EventKind::ImageTagged
            | EventKind::ImageUntagged
            | EventKind::ImageRemoved
            | EventKind::NetworkCreated
            | EventKind::NetworkDeleted
            | EventKind::SystemCreated
            | EventKind::SystemStarted
            | EventKind::SystemRebooted
            | EventKind::SystemStopped
            | EventKind::SystemRemoved => return None,
        };
        let sandbox_id = what.sandbox_id.as_ref()?;
        // Kubelet keeps the answer with the latest time, of these and of PodSandboxStatus. The time of
        // the event's commit may be before that of a status which does not have it yet; this one is
        // after every such status, and before what this answer does not know.
        let created_at = Time::now().unix_ns();
        let at = self.agent.store.snapshot();
        let sandbox = at.get::<Sandbox>(sandbox_id.as_str());
        Some(cri::ContainerEventResponse {
            container_id: what
                .container_id
                .as_ref()
                .map_or_else(|| sandbox_id.to_string(), ToString::to_string),
            container_event_type: kind.into(),
            created_at,
            pod_sandbox_status: match sandbox {
                Some(sandbox) => Some(render::sandbox_status(&sandbox)),
                None => removed(what),
            },
            containers_statuses: self.statuses_of(&at, sandbox_id),
        })
    }
}

/// What is still known of a sandbox that is gone. Kubelet passes over events that name no pod.
fn removed(what: &EventDraft) -> Option<cri::PodSandboxStatus> {
    let known = |name| what.attributes.get(name).cloned();
    Some(cri::PodSandboxStatus {
        id: what.sandbox_id.as_ref()?.to_string(),
        metadata: Some(cri::PodSandboxMetadata {
            name: known("name")?,
            namespace: known("namespace")?,
            uid: known("uid")?,
            attempt: known("attempt")?.parse().ok()?,
        }),
        state: cri::PodSandboxState::SandboxNotready.into(),
        ..Default::default()
    })
}
