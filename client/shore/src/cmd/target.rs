//! `stop` and `rm`: pods, and containers alone.
//!
//! A container that `run` made in a pod of its own stands for that pod, as people expect: stopping
//! it gives its ports back, removing it leaves nothing.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use longshore_client::{
    Client, idempotency_key,
    proto::{
        Container, ContainerState, RemoveContainerRequest, RemoveSandboxRequest, Sandbox,
        StopContainerRequest, StopSandboxRequest,
    },
};

use super::each;
use crate::{
    app::App,
    complete::{Every, Live},
    error::Problem,
    exit_code::ExitCode,
    find::{RUN_ANNOTATION, Target, Things},
    human, parse,
};

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Time to end by themselves before they are killed; 0 kills at once
    #[arg(short, long, visible_alias = "timeout", value_name = "TIME", value_parser = parse::duration)]
    time: Option<Duration>,
    #[arg(required = true, value_name = "POD|CONTAINER", add = ArgValueCompleter::new(Every(Live::Targets)))]
    targets: Vec<String>,
}

impl Stop {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let things = &Things::read(client).await?;
        let timeout = self.time.map(human::wire_duration);
        each(app, &self.targets, |name| async move {
            match things.find(name)? {
                Target::Pod(pod) => stop_pod(client, pod, timeout).await,
                Target::Container(container) => stop_container(client, container, timeout).await,
            }
            .with_context(|| format!("stopping {name}"))?;
            Ok(name.to_owned())
        })
        .await
    }
}

async fn stop_pod(
    client: &Client,
    pod: Sandbox,
    timeout: Option<prost_types::Duration>,
) -> Result<()> {
    let request = StopSandboxRequest {
        idempotency_key: idempotency_key(),
        sandbox_id: pod.id,
        timeout,
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().stop_sandbox(request).await
        })
        .await?;
    Ok(())
}

async fn stop_container(
    client: &Client,
    container: Container,
    timeout: Option<prost_types::Duration>,
) -> Result<()> {
    let request = StopContainerRequest {
        idempotency_key: idempotency_key(),
        container_id: container.id,
        timeout,
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().stop_container(request).await
        })
        .await?;
    Ok(())
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// Also what runs: it is killed
    #[arg(short, long)]
    force: bool,
    #[arg(required = true, value_name = "POD|CONTAINER", add = ArgValueCompleter::new(Every(Live::Targets)))]
    targets: Vec<String>,
}

impl Rm {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let things = &Things::read(client).await?;
        let force = self.force;
        each(app, &self.targets, |name| async move {
            match things.find(name)? {
                Target::Pod(pod) => {
                    let force = force || may_go(things, &pod, name)?;
                    remove_pod(client, pod, force).await
                }
                Target::Container(container) => remove_container(client, container, force).await,
            }
            .with_context(|| format!("removing {name}"))?;
            Ok(name.to_owned())
        })
        .await
    }
}

/// Whether a pod that `run` made may be removed though it is up: its container has ended, so the
/// pod is only what is left of it. One that still runs is refused in words that fit.
fn may_go(things: &Things, pod: &Sandbox, name: &str) -> Result<bool> {
    if !pod.annotations.contains_key(RUN_ANNOTATION) {
        return Ok(false);
    }
    let running = things.containers.iter().any(|one| {
        one.sandbox_id == pod.id
            && matches!(
                one.state(),
                ContainerState::Running | ContainerState::Unknown
            )
    });
    if running {
        return Err(Problem::State(format!(
            "{name} is running: `shore stop {name}` first, or `shore rm -f {name}` to kill it"
        ))
        .into());
    }
    Ok(true)
}

async fn remove_pod(client: &Client, pod: Sandbox, force: bool) -> Result<()> {
    let request = RemoveSandboxRequest {
        idempotency_key: idempotency_key(),
        sandbox_id: pod.id,
        force,
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().remove_sandbox(request).await
        })
        .await?;
    Ok(())
}

async fn remove_container(client: &Client, container: Container, force: bool) -> Result<()> {
    let request = RemoveContainerRequest {
        idempotency_key: idempotency_key(),
        container_id: container.id,
        force,
    };
    client
        .repeat(request, |client, request| async move {
            client.lifecycle().remove_container(request).await
        })
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_run_made_goes_without_force_once_its_container_has_ended() {
        let mut pod = Sandbox {
            id: "p".into(),
            ..Default::default()
        };
        let container = |state: ContainerState| Container {
            sandbox_id: "p".into(),
            state: state.into(),
            ..Default::default()
        };
        let things = |state| Things {
            pods: Vec::new(),
            containers: vec![container(state)],
        };
        let ended = things(ContainerState::Exited);
        assert!(!may_go(&ended, &pod, "web").expect("left to the agent"));
        pod.annotations.insert(RUN_ANNOTATION.into(), String::new());
        assert!(may_go(&ended, &pod, "web").expect("it has ended"));
        let error = may_go(&things(ContainerState::Running), &pod, "web").expect_err("it runs");
        assert!(error.to_string().contains("shore stop web"), "{error}");
    }
}
