//! Completion of live names: what the agent has, offered by the shell.
//!
//! A shell waits for this, so it is short: no answer within [`PATIENCE`] offers nothing.

use std::{ffi::OsStr, future::Future, time::Duration};

use clap_complete::engine::{CompletionCandidate, ValueCompleter};
use longshore_client::{
    Address, Client, Retry,
    proto::{
        ListContainersRequest, ListImagesRequest, ListNetworksRequest, ListOperationsRequest,
        ListSandboxesRequest, ListSystemsRequest,
    },
};

use crate::human::{familiar, plain, short_id};

const PATIENCE: Duration = Duration::from_millis(700);

/// What a word on the command line can be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Live {
    Containers,
    Pods,
    /// Either of the two.
    Targets,
    Images,
    Networks,
    Operations,
    Systems,
    /// Everything that `inspect` knows.
    Anything,
}

/// Completes every word of the argument.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Every(pub(crate) Live);

/// Completes the first word only: what follows is the container's command line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct First(pub(crate) Live);

impl ValueCompleter for Every {
    fn complete(&self, current: &OsStr) -> Vec<CompletionCandidate> {
        candidates(self.0, current)
    }
}

impl ValueCompleter for First {
    fn complete(&self, current: &OsStr) -> Vec<CompletionCandidate> {
        candidates(self.0, current)
    }

    fn complete_at(&self, index: usize, current: &OsStr) -> Vec<CompletionCandidate> {
        if index == 0 {
            self.complete(current)
        } else {
            Vec::new()
        }
    }
}

fn candidates(live: Live, current: &OsStr) -> Vec<CompletionCandidate> {
    let Some(current) = current.to_str() else {
        return Vec::new();
    };
    let mut found =
        ask(move |client| async move { names(&client, live).await }).unwrap_or_default();
    found.retain(|(name, _)| name.starts_with(current));
    found.sort();
    found.dedup();
    found
        .into_iter()
        .map(|(name, help)| CompletionCandidate::new(name).help(Some(help.into())))
        .collect()
}

fn ask<T, Fut>(question: impl FnOnce(Client) -> Fut) -> Option<T>
where
    Fut: Future<Output = Option<T>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let address = Address::from_env().ok()?;
    runtime.block_on(async {
        let answer = async {
            let client = Client::connect(&address).await.ok()?;
            question(client.with_retry(Retry::NEVER)).await
        };
        tokio::time::timeout(PATIENCE, answer).await.ok().flatten()
    })
}

async fn names(client: &Client, live: Live) -> Option<Vec<(String, String)>> {
    let mut found = Vec::new();
    if matches!(live, Live::Containers | Live::Targets | Live::Anything) {
        for container in client
            .all_containers(ListContainersRequest::default())
            .await
            .ok()?
        {
            let state = container.state().as_str_name();
            let help = format!("{} {}", container.image, plain(state, "CONTAINER_STATE_"));
            found.push((short_id(&container.id).to_owned(), help.clone()));
            found.push((container.name, help));
        }
    }
    if matches!(live, Live::Pods | Live::Targets | Live::Anything) {
        for pod in client
            .all_sandboxes(ListSandboxesRequest::default())
            .await
            .ok()?
        {
            let help = format!("pod {}", plain(pod.state().as_str_name(), "SANDBOX_STATE_"));
            found.push((short_id(&pod.id).to_owned(), help.clone()));
            found.push((pod.name, help));
        }
    }
    if matches!(live, Live::Images | Live::Anything) {
        for image in client.all_images(ListImagesRequest::default()).await.ok()? {
            found.extend(image.tags.iter().map(|tag| {
                (
                    familiar(tag).to_owned(),
                    format!("image {}", short_id(&image.id)),
                )
            }));
        }
    }
    if matches!(live, Live::Networks | Live::Anything) {
        for network in client
            .all_networks(ListNetworksRequest::default())
            .await
            .ok()?
        {
            found.push((network.name, format!("network {}", network.bridge)));
        }
    }
    if matches!(live, Live::Systems) {
        for system in client
            .all_systems(ListSystemsRequest::default())
            .await
            .ok()?
        {
            let state = plain(system.state().as_str_name(), "SYSTEM_STATE_");
            found.push((system.name, format!("{} {state}", system.image)));
        }
    }
    if matches!(live, Live::Operations) {
        for operation in client
            .all_operations(ListOperationsRequest::default())
            .await
            .ok()?
        {
            found.push((
                operation.id,
                format!("{} {}", operation.name, operation.subject),
            ));
        }
    }
    Some(found)
}
