//! `stats`: what pods and containers use, as a table that renews itself.

use std::io::{self, IsTerminal as _};

use anyhow::Result;
use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use longshore_client::{
    Error,
    proto::{
        ContainerStats, CpuStats, IoStats, MemoryStats, PidsStats, SandboxStats, StatsRequest,
        StatsResponse,
    },
};

use crate::{
    app::App,
    complete::{Every, Live},
    exit_code::ExitCode,
    find::{Target, Things},
    human,
    output::{Cell, Column, Table, json, row},
    parse,
};

#[derive(Debug, Args)]
pub(crate) struct Stats {
    /// Show once and end
    #[arg(long)]
    no_stream: bool,
    /// Show pods in place of their containers
    #[arg(short, long)]
    pods: bool,
    /// Time from one reading to the next
    #[arg(long, value_name = "TIME", value_parser = parse::duration, default_value = "1s")]
    interval: std::time::Duration,
    /// Only these
    #[arg(value_name = "POD|CONTAINER", add = ArgValueCompleter::new(Every(Live::Targets)))]
    targets: Vec<String>,
}

impl Stats {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let things = Things::read(&client).await?;
        let mut request = StatsRequest {
            interval: Some(human::wire_duration(self.interval)),
            ..Default::default()
        };
        for name in &self.targets {
            match things.find(name)? {
                Target::Pod(pod) => request.sandbox_ids.push(pod.id),
                Target::Container(container) => request.container_ids.push(container.id),
            }
        }
        let mut lifecycle = client.lifecycle();
        let mut stream = client.call(lifecycle.stats(request)).await?;
        // Use of processors is a difference of two readings: the first has none to show.
        let mut first = true;
        let renew = !self.no_stream && io::stdout().is_terminal();
        while let Some(reading) = stream
            .message()
            .await
            .map_err(|status| Error::from_status(client.address(), status))?
        {
            if std::mem::take(&mut first) && self.no_stream {
                continue;
            }
            if app.output.for_programs() && self.no_stream {
                app.output.data(&json(&reading)?)?;
            } else if app.output.for_programs() {
                app.output.item(&json(&reading)?)?;
            } else {
                if renew {
                    // To the upper left, and away with what is below: the table is drawn anew.
                    app.output.text("\u{1b}[H\u{1b}[J")?;
                }
                app.output
                    .table(&self.table(&things, &reading, app.output.wide()))?;
            }
            if self.no_stream {
                break;
            }
        }
        Ok(ExitCode::OK)
    }

    fn table(&self, things: &Things, reading: &StatsResponse, wide: bool) -> Table {
        let mut table = Table::new(&[
            Column::text("ID"),
            Column::text("NAME"),
            Column::number("CPU"),
            Column::number("MEMORY"),
            Column::number("LIMIT"),
            Column::number("MEM"),
            Column::number("PIDS"),
            Column::number("READ"),
            Column::number("WRITTEN"),
            Column::number("NET IN"),
            Column::number("NET OUT"),
        ]);
        let pod_of = |id: &str| reading.sandboxes.iter().find(|pod| pod.sandbox_id == id);
        if self.pods {
            for pod in &reading.sandboxes {
                table.push(pod_row(pod, wide));
            }
        } else {
            for container in &reading.containers {
                let name = match things.pod(&container.sandbox_id) {
                    Some(pod) if pod.name != container.name => {
                        format!("{}/{}", pod.name, container.name)
                    }
                    _ => container.name.clone(),
                };
                table.push(container_row(
                    container,
                    name,
                    pod_of(&container.sandbox_id),
                    wide,
                ));
            }
        }
        table
    }
}

fn container_row(
    container: &ContainerStats,
    name: String,
    pod: Option<&SandboxStats>,
    wide: bool,
) -> Vec<Cell> {
    let mut row = row![id(&container.container_id, wide), name];
    row.extend(used(
        container.cpu.as_ref(),
        container.memory.as_ref(),
        container.pids.as_ref(),
        container.io.as_ref(),
    ));
    // The network is the pod's, shared by its containers.
    row.extend(traffic(pod));
    row
}

fn pod_row(pod: &SandboxStats, wide: bool) -> Vec<Cell> {
    let mut row = row![id(&pod.sandbox_id, wide), pod.name.as_str()];
    row.extend(used(
        pod.cpu.as_ref(),
        pod.memory.as_ref(),
        pod.pids.as_ref(),
        pod.io.as_ref(),
    ));
    row.extend(traffic(Some(pod)));
    row
}

fn id(id: &str, wide: bool) -> &str {
    if wide { id } else { human::short_id(id) }
}

fn used(
    cpu: Option<&CpuStats>,
    memory: Option<&MemoryStats>,
    pids: Option<&PidsStats>,
    io: Option<&IoStats>,
) -> Vec<Cell> {
    let dash = || "-".to_owned();
    let working = memory.map(|memory| memory.working_set_bytes);
    let limit = memory
        .map(|memory| memory.limit_bytes)
        .filter(|limit| *limit > 0);
    let share = working
        .zip(limit)
        .map(|(working, limit)| human::percent(working as f64 / limit as f64));
    row![
        cpu.and_then(|cpu| cpu.cores)
            .map_or_else(dash, human::percent),
        working.map_or_else(dash, human::bytes),
        limit.map_or_else(dash, human::bytes),
        share.unwrap_or_else(dash),
        pids.map_or_else(dash, |pids| pids.current.to_string()),
        io.map_or_else(dash, |io| human::bytes(io.read_bytes)),
        io.map_or_else(dash, |io| human::bytes(io.written_bytes)),
    ]
}

fn traffic(pod: Option<&SandboxStats>) -> Vec<Cell> {
    let Some(pod) = pod.filter(|pod| !pod.interfaces.is_empty()) else {
        return row!["-", "-"];
    };
    let received = pod
        .interfaces
        .iter()
        .map(|interface| interface.received_bytes);
    let sent = pod.interfaces.iter().map(|interface| interface.sent_bytes);
    row![human::bytes(received.sum()), human::bytes(sent.sum())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_a_dash_and_shares_need_a_limit() {
        let shown = |cells: Vec<Cell>| {
            let columns = vec![Column::text("X"); cells.len()];
            let mut table = Table::new(&columns);
            table.push(cells);
            let text = table.render(false, false);
            let row = text.lines().last().expect("a row").to_owned();
            row.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(shown(used(None, None, None, None)), vec!["-"; 7]);
        let memory = MemoryStats {
            working_set_bytes: 16 << 20,
            limit_bytes: 64 << 20,
            ..Default::default()
        };
        let cpu = CpuStats {
            cores: Some(1.5),
            ..Default::default()
        };
        let row = shown(used(Some(&cpu), Some(&memory), None, None));
        assert_eq!(row[..4], ["150.0%", "16.0MiB", "64.0MiB", "25.0%"]);
    }
}
