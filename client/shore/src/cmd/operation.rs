//! `operations`: what the agent is doing, where it is stuck, and how to end it.

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use longshore_client::{
    idempotency_key,
    proto::{
        CancelOperationRequest, ListOperationsRequest, Operation, OperationState,
        WaitOperationRequest,
    },
};

use super::each;
use crate::{
    app::App,
    complete::{Every, Live},
    error::Problem,
    exit_code::ExitCode,
    human,
    output::{Cell, Column, Table, Tone, row},
};

#[derive(Debug, Args)]
pub(crate) struct Operations {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List what runs, and what ended a short time ago
    #[command(visible_alias = "list")]
    Ls,
    /// Wait until operations are finished
    Wait {
        #[arg(required = true, value_name = "OPERATION", add = ArgValueCompleter::new(Every(Live::Operations)))]
        ids: Vec<String>,
    },
    /// End operations early; what they did is undone
    Cancel {
        #[arg(required = true, value_name = "OPERATION", add = ArgValueCompleter::new(Every(Live::Operations)))]
        ids: Vec<String>,
    },
}

impl Operations {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        match self.verb {
            None | Some(Verb::Ls) => list(app).await,
            Some(Verb::Wait { ids }) => wait(app, ids).await,
            Some(Verb::Cancel { ids }) => cancel(app, ids).await,
        }
    }
}

async fn list(app: &App) -> Result<ExitCode> {
    let rows = app
        .ask(|client| async move {
            client
                .all_operations(ListOperationsRequest::default())
                .await
        })
        .await?;
    let operations = || {
        rows.iter()
            .flat_map(|(node, found)| found.iter().map(move |one| (node.as_str(), one)))
    };
    if app.output.for_programs() {
        app.output
            .list(operations().map(|(node, one)| (app.many().then_some(node), one)))?;
        return Ok(app.outcome());
    }
    let mut table = Table::new(&[
        Column::text("OPERATION"),
        Column::text("WHAT"),
        Column::text("SUBJECT"),
        Column::text("STATE"),
        Column::text("STAGE"),
        Column::text("SINCE"),
        Column::text("BEGAN"),
        Column::wide("ASKED BY"),
        Column::wide("ERROR"),
    ])
    .first(app.node_column());
    let now = Timestamp::now();
    for (node, operation) in operations() {
        let mut row = operation_row(operation, now, app.output.wide());
        app.name_row(&mut row, node);
        table.push(row);
    }
    app.output.table(&table)?;
    Ok(app.outcome())
}

fn operation_row(operation: &Operation, now: Timestamp, wide: bool) -> Vec<Cell> {
    let subject = match operation.subject.split_once('/') {
        Some((kind @ ("sandbox" | "container"), id)) if !wide => {
            format!("{kind}/{}", human::short_id(id))
        }
        _ => operation.subject.clone(),
    };
    let state = match operation.state() {
        OperationState::Running => Cell::toned("running", Tone::Good),
        OperationState::Unwinding => Cell::toned("unwinding", Tone::Warn),
        OperationState::Succeeded => Cell::toned("succeeded", Tone::Dim),
        OperationState::Failed => Cell::toned("failed", Tone::Bad),
        OperationState::Unspecified => Cell::toned("unknown", Tone::Warn),
    };
    row![
        operation.id.as_str(),
        operation.name.as_str(),
        subject,
        state,
        operation.stage.as_str(),
        human::since(operation.stage_since, now),
        human::since(operation.started_at, now),
        human::plain(operation.face().as_str_name(), "FACE_"),
        human::cut(&operation.error, 80),
    ]
}

async fn wait(app: &App, ids: Vec<String>) -> Result<ExitCode> {
    let client = &app.client().await?;
    each(app, &ids, |id| async move {
        let request = WaitOperationRequest {
            operation_id: id.to_owned(),
        };
        let answer = client
            .repeat(request, |client, request| async move {
                client.operations().wait_operation(request).await
            })
            .await
            .with_context(|| format!("waiting for {id}"))?;
        let operation = answer.operation.unwrap_or_default();
        match operation.state() {
            OperationState::Failed => Err(Problem::Failed(format!(
                "{} of {} failed: {}",
                operation.name, operation.subject, operation.error
            ))
            .into()),
            _ => Ok(id.to_owned()),
        }
    })
    .await
}

async fn cancel(app: &App, ids: Vec<String>) -> Result<ExitCode> {
    let client = &app.client().await?;
    each(app, &ids, |id| async move {
        let request = CancelOperationRequest {
            idempotency_key: idempotency_key(),
            operation_id: id.to_owned(),
        };
        client
            .repeat(request, |client, request| async move {
                client.operations().cancel_operation(request).await
            })
            .await
            .with_context(|| format!("cancelling {id}"))?;
        Ok(id.to_owned())
    })
    .await
}
