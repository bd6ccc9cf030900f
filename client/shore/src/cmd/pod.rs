//! Pods: list.

use anyhow::Result;
use clap::{Args, ValueEnum};
use jiff::Timestamp;
use longshore_client::proto::{ListSandboxesRequest, PortMapping, Protocol, Sandbox, SandboxState};

use crate::{
    app::App,
    exit_code::ExitCode,
    human,
    output::{Cell, Column, Table, Tone, row},
    parse,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum State {
    Ready,
    NotReady,
}

#[derive(Debug, Args)]
pub(crate) struct Pods {
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// Only pods of this name
    #[arg(long)]
    name: Option<String>,
    /// Only pods in this state
    #[arg(long, value_enum)]
    state: Option<State>,
    /// Only pods with this label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse::pair)]
    labels: Vec<parse::Pair>,
}

impl Pods {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let state = match self.state {
            None => SandboxState::Unspecified,
            Some(State::Ready) => SandboxState::Ready,
            Some(State::NotReady) => SandboxState::NotReady,
        };
        let request = ListSandboxesRequest {
            name: self.name.clone().unwrap_or_default(),
            state: state.into(),
            label_selector: super::container::labels(&self.labels),
            ..Default::default()
        };
        let rows = app
            .ask(|client| {
                let request = request.clone();
                async move { client.all_sandboxes(request).await }
            })
            .await?;
        let pods = || {
            rows.iter()
                .flat_map(|(node, pods)| pods.iter().map(move |pod| (node.as_str(), pod)))
        };
        if self.quiet {
            for (_, pod) in pods() {
                app.output.line(&pod.id)?;
            }
        } else if app.output.for_programs() {
            app.output
                .list(pods().map(|(node, pod)| (app.many().then_some(node), pod)))?;
        } else {
            let mut table = Table::new(&[
                Column::text("POD ID"),
                Column::text("NAME"),
                Column::text("STATE"),
                Column::text("AGE"),
                Column::number("CONTAINERS"),
                Column::text("IP"),
                Column::text("PORTS"),
                Column::wide("NAMESPACE"),
                Column::wide("NETWORK"),
                Column::wide("HANDLER"),
                Column::wide("MADE BY"),
            ])
            .first(app.node_column());
            let now = Timestamp::now();
            for (node, pod) in pods() {
                let mut row = pod_row(pod, now, app.output.wide());
                app.name_row(&mut row, node);
                table.push(row);
            }
            app.output.table(&table)?;
        }
        Ok(app.outcome())
    }
}

fn pod_row(pod: &Sandbox, now: Timestamp, wide: bool) -> Vec<Cell> {
    let network = pod.network.clone().unwrap_or_default();
    let addresses: Vec<&str> = network
        .addresses
        .iter()
        .map(|address| address.split('/').next().unwrap_or(address))
        .collect();
    let shown = if wide { addresses.len() } else { 1 };
    let where_in = match network.mode() {
        longshore_client::proto::NetworkMode::Host => "host".to_owned(),
        longshore_client::proto::NetworkMode::None => "none".to_owned(),
        _ => network.network.clone(),
    };
    row![
        if wide {
            pod.id.as_str()
        } else {
            human::short_id(&pod.id)
        },
        pod.name.as_str(),
        state(pod),
        human::since(pod.created_at, now),
        pod.container_count.to_string(),
        addresses[..shown.min(addresses.len())].join(","),
        ports(&network.ports),
        dash(&pod.pod_namespace),
        where_in,
        pod.handler.as_str(),
        human::plain(pod.face().as_str_name(), "FACE_"),
    ]
}

fn state(pod: &Sandbox) -> Cell {
    match pod.state() {
        SandboxState::Ready => Cell::toned("ready", Tone::Good),
        SandboxState::NotReady if pod.state_message.is_empty() => {
            Cell::toned("not ready", Tone::Dim)
        }
        SandboxState::NotReady => Cell::toned(
            format!("not ready: {}", human::cut(&pod.state_message, 40)),
            Tone::Bad,
        ),
        SandboxState::Unspecified => Cell::toned("unknown", Tone::Warn),
    }
}

fn dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// Ports as they lead in, as in `8080->80/tcp`.
pub(crate) fn ports(ports: &[PortMapping]) -> String {
    ports
        .iter()
        .map(|port| {
            let protocol = match port.protocol() {
                Protocol::Unspecified | Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Sctp => "sctp",
            };
            let host = match port.host_ip.as_str() {
                "" => String::new(),
                address if address.contains(':') => format!("[{address}]:"),
                address => format!("{address}:"),
            };
            let inside = match port.container_port {
                0 => port.host_port,
                inside => inside,
            };
            format!("{host}{}->{inside}/{protocol}", port.host_port)
        })
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_show_where_they_lead() {
        let port = |host_ip: &str, host_port, container_port, protocol: Protocol| PortMapping {
            host_ip: host_ip.into(),
            host_port,
            container_port,
            protocol: protocol.into(),
        };
        assert_eq!(
            ports(&[
                port("", 8080, 80, Protocol::Tcp),
                port("127.0.0.1", 53, 0, Protocol::Udp),
                port("fd00::1", 1, 2, Protocol::Sctp),
            ]),
            "8080->80/tcp, 127.0.0.1:53->53/udp, [fd00::1]:1->2/sctp"
        );
    }
}
