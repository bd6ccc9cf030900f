//! Containers: list, start, signal, wait.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use longshore_client::{
    idempotency_key,
    proto::{
        Container, ContainerState, Exit, ExitReason, ListContainersRequest, ListSandboxesRequest,
        SignalContainerRequest, StartContainerRequest, WaitContainerRequest,
    },
};

use super::{each, pod};
use crate::{
    app::App,
    complete::{Every, Live},
    exit_code::ExitCode,
    find::Things,
    human,
    output::{Cell, Column, Table, Tone, row},
    parse,
};

/// Labels to select by; one without a value selects the empty value.
pub(crate) fn labels(pairs: &[parse::Pair]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|pair| (pair.key.clone(), pair.value.clone().unwrap_or_default()))
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum State {
    Created,
    Running,
    Exited,
    Unknown,
}

impl From<State> for ContainerState {
    fn from(state: State) -> Self {
        match state {
            State::Created => Self::Created,
            State::Running => Self::Running,
            State::Exited => Self::Exited,
            State::Unknown => Self::Unknown,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Also containers that do not run
    #[arg(short, long)]
    all: bool,
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// Only containers in this state
    #[arg(long, value_enum)]
    state: Option<State>,
    /// Only containers of this name
    #[arg(long)]
    name: Option<String>,
    /// Only containers of this pod
    #[arg(long, value_name = "POD", add = ArgValueCompleter::new(Every(Live::Pods)))]
    pod: Option<String>,
    /// Only containers with this label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse::pair)]
    labels: Vec<parse::Pair>,
}

impl Ps {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let request = ListContainersRequest {
            name: self.name.clone().unwrap_or_default(),
            state: self
                .state
                .map_or(0, |state| ContainerState::from(state).into()),
            label_selector: labels(&self.labels),
            ..Default::default()
        };
        let rows = app
            .ask(|client| {
                let request = request.clone();
                async move {
                    let (pods, containers) = tokio::try_join!(
                        client.all_sandboxes(ListSandboxesRequest::default()),
                        client.all_containers(request),
                    )?;
                    Ok(Things { pods, containers })
                }
            })
            .await?;
        let mut shown: Vec<(&str, &Things, &Container)> = Vec::new();
        let mut missing = None;
        for (node, things) in &rows {
            let pod = match self
                .pod
                .as_deref()
                .map(|name| things.find_pod(name))
                .transpose()
            {
                Ok(pod) => pod,
                Err(error) => {
                    missing = Some(error);
                    continue;
                }
            };
            let wanted = |one: &&Container| {
                let state = self.all || self.state.is_some() || alive(one);
                state && pod.is_none_or(|pod| pod.id == one.sandbox_id)
            };
            shown.extend(
                things
                    .containers
                    .iter()
                    .filter(wanted)
                    .map(|one| (node.as_str(), things, one)),
            );
        }
        if let (true, Some(error)) = (shown.is_empty(), missing) {
            return Err(error);
        }
        if self.quiet {
            for (_, _, container) in shown {
                app.output.line(&container.id)?;
            }
        } else if app.output.for_programs() {
            app.output.list(
                shown
                    .into_iter()
                    .map(|(node, _, one)| (app.many().then_some(node), one)),
            )?;
        } else {
            app.output.table(&table(app, &shown))?;
        }
        Ok(app.outcome())
    }
}

/// Whether a list of what runs has it: also when its shim does not answer just now.
fn alive(container: &Container) -> bool {
    matches!(
        container.state(),
        ContainerState::Running | ContainerState::Unknown
    )
}

fn table(app: &App, shown: &[(&str, &Things, &Container)]) -> Table {
    let mut table = Table::new(&[
        Column::text("CONTAINER ID"),
        Column::text("IMAGE"),
        Column::text("STATUS"),
        Column::text("AGE"),
        Column::text("POD"),
        Column::text("NAME"),
        Column::text("PORTS"),
        Column::wide("POD ID"),
        Column::wide("IMAGE ID"),
        Column::wide("PID"),
        Column::wide("MADE BY"),
    ])
    .first(app.node_column());
    let now = Timestamp::now();
    let wide = app.output.wide();
    let id = |id: &str| {
        if wide {
            id.to_owned()
        } else {
            human::short_id(id).to_owned()
        }
    };
    for (node, things, container) in shown {
        let pod = things.pod(&container.sandbox_id);
        let network = pod.and_then(|pod| pod.network.clone()).unwrap_or_default();
        let mut row = row![
            id(&container.id),
            human::familiar(&container.image),
            status(container, now),
            human::since(container.created_at, now),
            pod.map_or("-", |pod| pod.name.as_str()),
            container.name.as_str(),
            pod::ports(&network.ports),
            container.sandbox_id.as_str(),
            container.image_id.as_str(),
            if container.pid == 0 {
                "-".to_owned()
            } else {
                container.pid.to_string()
            },
            human::plain(container.face().as_str_name(), "FACE_"),
        ];
        app.name_row(&mut row, node);
        table.push(row);
    }
    table
}

/// The state with what belongs to it, as in `up 5m` or `exited (137, out of memory) 3m ago`.
fn status(container: &Container, now: Timestamp) -> Cell {
    match container.state() {
        ContainerState::Created => Cell::toned("created", Tone::Dim),
        ContainerState::Running => Cell::toned(
            format!("up {}", human::since(container.started_at, now)),
            Tone::Good,
        ),
        ContainerState::Exited => {
            let exit = container.exit.clone().unwrap_or_default();
            let text = format!(
                "exited ({}) {} ago",
                ended(&exit),
                human::since(container.finished_at, now)
            );
            let tone = if exit.code == 0 { Tone::Dim } else { Tone::Bad };
            Cell::toned(text, tone)
        }
        ContainerState::Unknown | ContainerState::Unspecified => Cell::toned("unknown", Tone::Warn),
    }
}

/// An exit code with the reason, where the code alone does not tell it.
pub(crate) fn ended(exit: &Exit) -> String {
    match exit.reason() {
        ExitReason::OomKilled => format!("{}, out of memory", exit.code),
        ExitReason::StartError => format!("{}, did not start", exit.code),
        ExitReason::Lost => format!("{}, lost", exit.code),
        _ if exit.signal != 0 => format!("{}, signal {}", exit.code, exit.signal),
        _ => exit.code.to_string(),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Start {
    #[arg(required = true, value_name = "CONTAINER", add = ArgValueCompleter::new(Every(Live::Containers)))]
    containers: Vec<String>,
}

impl Start {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let things = &Things::read(client).await?;
        each(app, &self.containers, |name| async move {
            let request = StartContainerRequest {
                idempotency_key: idempotency_key(),
                container_id: things.find_container(name)?.id.clone(),
            };
            client
                .repeat(request, |client, request| async move {
                    client.lifecycle().start_container(request).await
                })
                .await
                .with_context(|| format!("starting {name}"))?;
            Ok(name.to_owned())
        })
        .await
    }
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = parse::signal)]
    signal: i32,
    #[arg(required = true, value_name = "CONTAINER", add = ArgValueCompleter::new(Every(Live::Containers)))]
    containers: Vec<String>,
}

impl Kill {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let things = &Things::read(client).await?;
        each(app, &self.containers, |name| async move {
            let request = SignalContainerRequest {
                idempotency_key: idempotency_key(),
                container_id: things.find_container(name)?.id.clone(),
                signal: self.signal.to_string(),
            };
            client
                .repeat(request, |client, request| async move {
                    client.lifecycle().signal_container(request).await
                })
                .await
                .with_context(|| format!("sending a signal to {name}"))?;
            Ok(name.to_owned())
        })
        .await
    }
}

#[derive(Debug, Args)]
pub(crate) struct Wait {
    #[arg(required = true, value_name = "CONTAINER", add = ArgValueCompleter::new(Every(Live::Containers)))]
    containers: Vec<String>,
}

impl Wait {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = &app.client().await?;
        let things = &Things::read(client).await?;
        each(app, &self.containers, |name| async move {
            let request = WaitContainerRequest {
                container_id: things.find_container(name)?.id.clone(),
            };
            let ended = client
                .repeat(request, |client, request| async move {
                    client.lifecycle().wait_container(request).await
                })
                .await
                .with_context(|| format!("waiting for {name}"))?;
            if app.output.for_programs() {
                return Ok(crate::output::json(&ended)?.to_string());
            }
            Ok(ended.exit.unwrap_or_default().code.to_string())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(state: ContainerState, exit: Option<Exit>) -> Container {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        Container {
            state: state.into(),
            exit,
            started_at: at(100),
            finished_at: at(200),
            ..Default::default()
        }
    }

    #[test]
    fn a_status_says_since_when_and_why() {
        let now = Timestamp::from_second(260).expect("in range");
        let exit = |code, signal, reason: ExitReason| {
            Some(Exit {
                code,
                signal,
                reason: reason.into(),
                message: String::new(),
            })
        };
        use ContainerState::{Created, Exited, Running, Unknown};
        for (state, exit, expected) in [
            (Created, None, "created"),
            (Running, None, "up 2m"),
            (
                Exited,
                exit(0, 0, ExitReason::Completed),
                "exited (0) 60s ago",
            ),
            (
                Exited,
                exit(137, 9, ExitReason::OomKilled),
                "exited (137, out of memory) 60s ago",
            ),
            (
                Exited,
                exit(143, 15, ExitReason::Error),
                "exited (143, signal 15) 60s ago",
            ),
            (
                Exited,
                exit(128, 0, ExitReason::StartError),
                "exited (128, did not start) 60s ago",
            ),
            (Unknown, None, "unknown"),
        ] {
            let cell = format!("{:?}", status(&container(state, exit), now));
            assert!(cell.contains(&format!("{expected:?}")), "{cell}");
        }
    }
}
