//! What every command needs: whom to talk to and how to print.

use std::{
    future::Future,
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Result;
use clap::Args;
use longshore_client::{Address, Client, Error, Fleet, Node, Row};

use crate::{
    error::{Problem, report},
    exit_code::ExitCode,
    output::{Cell, Column, Format, Output},
    parse,
};

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The agent: unix:///path, /path or tcp://host:port. Several (separated by commas, each with an
    /// optional NAME=) for the commands that list.
    #[arg(
        short = 'H',
        long = "address",
        value_name = "ADDRESS",
        env = longshore_client::ADDRESS_VARIABLE,
        value_delimiter = ',',
        default_value = longshore_client::DEFAULT_SOCKET,
        global = true,
        help_heading = "Options of every command"
    )]
    nodes: Vec<NodeArg>,

    /// How to show results.
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        value_enum,
        default_value = "table",
        global = true,
        help_heading = "Options of every command"
    )]
    output: Format,

    /// How long to wait for each of several agents.
    #[arg(
        long,
        value_name = "TIME",
        value_parser = parse::duration,
        default_value = "10s",
        global = true,
        help_heading = "Options of every command"
    )]
    node_timeout: Duration,
}

/// `ADDRESS` or `NAME=ADDRESS`.
#[derive(Debug, Clone)]
struct NodeArg(Node);

impl FromStr for NodeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            // What an empty environment variable means everywhere.
            return Ok(Self(Node::new(Address::default())));
        }
        let parsed = |address: &str| {
            address
                .parse::<Address>()
                .map_err(|error| error.to_string())
        };
        match text.split_once('=') {
            Some((name, address)) if !name.is_empty() && !name.contains('/') => {
                Ok(Self(Node::named(name, parsed(address)?)))
            }
            _ => Ok(Self(Node::new(parsed(text)?))),
        }
    }
}

/// One invocation.
#[derive(Debug)]
pub(crate) struct App {
    nodes: Vec<Node>,
    node_timeout: Duration,
    /// A node did not answer, so what was shown is not all there is.
    partial: AtomicBool,
    pub(crate) output: Output,
}

impl App {
    pub(crate) fn new(global: Global) -> Self {
        Self {
            nodes: global.nodes.into_iter().map(|NodeArg(node)| node).collect(),
            node_timeout: global.node_timeout,
            partial: AtomicBool::new(false),
            output: Output::new(global.output),
        }
    }

    /// The one agent that this command is for, connected.
    pub(crate) async fn client(&self) -> Result<Client> {
        match self.nodes.as_slice() {
            [node] => Ok(Client::connect(&node.address).await?),
            nodes => Err(Problem::Usage(format!(
                "this command is for one agent, and {} were named",
                nodes.len()
            ))
            .into()),
        }
    }

    /// Whether rows need to say whose they are.
    pub(crate) fn many(&self) -> bool {
        self.nodes.len() > 1
    }

    /// The column that says whose a row is, when there are several.
    pub(crate) fn node_column(&self) -> Option<Column> {
        self.many().then(|| Column::text("NODE"))
    }

    /// Puts `node` into the column of [`App::node_column`].
    pub(crate) fn name_row(&self, row: &mut Vec<Cell>, node: &str) {
        if self.many() {
            row.insert(0, node.into());
        }
    }

    /// How a list ends: well only if every node answered.
    pub(crate) fn outcome(&self) -> ExitCode {
        if self.partial.load(Ordering::Relaxed) {
            ExitCode::FAILURE
        } else {
            ExitCode::OK
        }
    }

    /// Asks every agent. One that does not answer is reported on standard error, and its row is
    /// missing; if none answers, that is the error.
    pub(crate) async fn ask<T, F, Fut>(&self, call: F) -> Result<Vec<(String, T)>>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        if let [node] = self.nodes.as_slice() {
            let client = Client::connect(&node.address).await?;
            return Ok(vec![(node.name.clone(), call(client).await?)]);
        }
        let fleet = Fleet::new(self.nodes.clone(), self.node_timeout);
        let mut answers = Vec::new();
        for Row { node, result } in fleet.collect(call).await {
            match result {
                Ok(answer) => answers.push((node.name, answer)),
                Err(error) => {
                    report(&anyhow::Error::from(error).context(node.name));
                    self.partial.store(true, Ordering::Relaxed);
                }
            }
        }
        if answers.is_empty() {
            return Err(Problem::NoAgent.into());
        }
        Ok(answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_may_have_names() {
        let node = |text: &str| text.parse::<NodeArg>().map(|NodeArg(node)| node);
        assert_eq!(
            node("/run/a.sock").expect("valid").name,
            "unix:///run/a.sock"
        );
        assert_eq!(node("a=tcp://h:1").expect("valid").name, "a");
        assert_eq!(
            node("/run/x=y.sock").expect("valid").name,
            "unix:///run/x=y.sock"
        );
        assert_eq!(node("").expect("unset").address, Address::default());
        assert!(node("a=b").is_err());
        assert!(node("b").is_err());
    }
}
