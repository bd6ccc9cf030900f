//! `network`: networks, and who has which addresses.

use anyhow::Result;
use clap::{Args, Subcommand};
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use longshore_client::{
    Client,
    proto::{GetNetworkRequest, ListLeasesRequest, ListNetworksRequest},
};
use serde_json::Value;

use super::pod;
use crate::{
    app::App,
    complete::{Every, Live},
    exit_code::ExitCode,
    find::Things,
    human,
    output::{Column, Table, json, row},
};

#[derive(Debug, Args)]
pub(crate) struct Network {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List networks
    #[command(visible_alias = "list")]
    Ls,
    /// Show all about networks
    Inspect {
        #[arg(required = true, value_name = "NETWORK", add = ArgValueCompleter::new(Every(Live::Networks)))]
        names: Vec<String>,
    },
    /// List which pod has which addresses
    Leases {
        /// Only those of this network
        #[arg(value_name = "NETWORK", add = ArgValueCompleter::new(Every(Live::Networks)))]
        network: Option<String>,
    },
}

impl Network {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        match self.verb {
            None | Some(Verb::Ls) => list(app).await,
            Some(Verb::Inspect { names }) => inspect(app, &app.client().await?, &names).await,
            Some(Verb::Leases { network }) => leases(app, network.unwrap_or_default()).await,
        }
    }
}

async fn list(app: &App) -> Result<ExitCode> {
    let rows = app
        .ask(|client| async move { client.all_networks(ListNetworksRequest::default()).await })
        .await?;
    let networks = || {
        rows.iter()
            .flat_map(|(node, networks)| networks.iter().map(move |one| (node.as_str(), one)))
    };
    if app.output.for_programs() {
        app.output
            .list(networks().map(|(node, one)| (app.many().then_some(node), one)))?;
        return Ok(app.outcome());
    }
    let mut table = Table::new(&[
        Column::text("NAME"),
        Column::text("SUBNETS"),
        Column::number("PODS"),
        Column::text("BRIDGE"),
        Column::text("AGE"),
        Column::wide("GATEWAYS"),
        Column::wide("MTU"),
        Column::wide("MASQUERADE"),
        Column::wide("CNI PLUGINS"),
    ])
    .first(app.node_column());
    let now = Timestamp::now();
    for (node, network) in networks() {
        let joined = |field: fn(&longshore_client::proto::Subnet) -> &str| {
            network
                .subnets
                .iter()
                .map(field)
                .collect::<Vec<_>>()
                .join(", ")
        };
        let mut row = row![
            network.name.as_str(),
            joined(|subnet| &subnet.cidr),
            network.lease_count.to_string(),
            match &network.cni {
                Some(_) => "by CNI",
                None => network.bridge.as_str(),
            },
            human::since(network.created_at, now),
            joined(|subnet| &subnet.gateway),
            network.mtu_bytes.to_string(),
            match (&network.cni, network.masquerade) {
                (Some(_), _) => "",
                (None, true) => "yes",
                (None, false) => "no",
            },
            network
                .cni
                .as_ref()
                .map_or_else(String::new, |cni| cni.plugins.join(", ")),
        ];
        app.name_row(&mut row, node);
        table.push(row);
    }
    app.output.table(&table)?;
    Ok(app.outcome())
}

async fn inspect(app: &App, client: &Client, names: &[String]) -> Result<ExitCode> {
    let mut found = Vec::new();
    for name in names {
        let request = GetNetworkRequest { name: name.clone() };
        let answer = client
            .repeat(request, |client, request| async move {
                client.networks().get_network(request).await
            })
            .await?;
        found.push(json(&answer)?);
    }
    app.output.data(&Value::Array(found))?;
    Ok(ExitCode::OK)
}

async fn leases(app: &App, network: String) -> Result<ExitCode> {
    let client = app.client().await?;
    let request = ListLeasesRequest {
        network,
        ..Default::default()
    };
    let leases = client.all_leases(request).await?;
    if app.output.for_programs() {
        app.output.list(leases.iter().map(|lease| (None, lease)))?;
        return Ok(ExitCode::OK);
    }
    let things = Things::read(&client).await?;
    let mut table = Table::new(&[
        Column::text("NETWORK"),
        Column::text("POD ID"),
        Column::text("NAME"),
        Column::text("ADDRESSES"),
        Column::text("PORTS"),
        Column::wide("MAC"),
        Column::wide("HOST INTERFACE"),
    ]);
    for lease in &leases {
        let id = lease.sandbox_id.as_str();
        table.push(row![
            lease.network.as_str(),
            if app.output.wide() {
                id
            } else {
                human::short_id(id)
            },
            things.pod(id).map_or("-", |pod| pod.name.as_str()),
            lease.addresses.join(", "),
            pod::ports(&lease.ports),
            lease.mac.as_str(),
            lease.host_interface.as_str(),
        ]);
    }
    app.output.table(&table)?;
    Ok(ExitCode::OK)
}
