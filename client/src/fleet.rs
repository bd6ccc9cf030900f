//! Several agents asked at once.
//!
//! ```text
//!            +-> node a: answer ---> row as soon as it is there
//!  call() ---+-> node b: (slow) ------------------------------> row, or its deadline
//!            +-> node c: refused --> row with the error
//! ```
//!
//! Every node has its own connection, its own deadline and its own row: one that is slow or gone
//! delays nobody else's.

use std::{future::Future, time::Duration};

use futures_util::stream::{FuturesUnordered, Stream, StreamExt};

use crate::{Address, Client, Error};

/// A node: the name that rows are labelled with, and where its agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The name shown to people; the address when nothing better is known.
    pub name: String,
    /// Where the agent listens.
    pub address: Address,
}

impl Node {
    /// A node named by its address.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self {
            name: address.to_string(),
            address,
        }
    }

    /// A node with a name of its own.
    #[must_use]
    pub fn named(name: impl Into<String>, address: Address) -> Self {
        Self {
            name: name.into(),
            address,
        }
    }
}

/// What one node answered.
#[derive(Debug)]
pub struct Row<T> {
    /// Who answered, or did not.
    pub node: Node,
    /// The answer, or why there is none.
    pub result: Result<T, Error>,
}

/// Many agents.
#[derive(Debug, Clone)]
pub struct Fleet {
    nodes: Vec<Node>,
    deadline: Duration,
}

impl Fleet {
    /// A fleet of `nodes`; each call may take `deadline` on each of them, connecting included.
    #[must_use]
    pub fn new(nodes: Vec<Node>, deadline: Duration) -> Self {
        Self { nodes, deadline }
    }

    /// The nodes, in the order they were given.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Makes `call` on every node at once; rows come in the order in which nodes answer.
    ///
    /// A node that does not answer within the deadline has [`Error::Deadline`] in its row.
    pub fn call<T, F, Fut>(&self, call: F) -> impl Stream<Item = Row<T>> + use<T, F, Fut>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        let rows: FuturesUnordered<_> = self
            .nodes
            .iter()
            .map(|node| {
                let node = node.clone();
                let deadline = self.deadline;
                let answer = call(Client::lazy(&node.address));
                async move {
                    let result = match tokio::time::timeout(deadline, answer).await {
                        Ok(result) => result,
                        Err(_) => Err(Error::Deadline {
                            address: node.address.clone(),
                            after: deadline,
                        }),
                    };
                    Row { node, result }
                }
            })
            .collect();
        rows
    }

    /// Makes `call` on every node at once and waits for all; rows in the order of the nodes.
    pub async fn collect<T, F, Fut>(&self, call: F) -> Vec<Row<T>>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        let mut rows: Vec<Row<T>> = self.call(call).collect().await;
        let place = |node: &Node| self.nodes.iter().position(|known| known == node);
        rows.sort_by_key(|row| place(&row.node));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(deadline: Duration) -> Fleet {
        let node = |name: &str| {
            Node::named(
                name,
                Address::Unix(format!("/nonexistent/{name}.sock").into()),
            )
        };
        Fleet::new(vec![node("slow"), node("quick")], deadline)
    }

    #[tokio::test]
    async fn a_slow_node_delays_only_its_own_row() {
        let fleet = fleet(Duration::from_secs(600));
        let (release, released) = tokio::sync::watch::channel(false);
        let rows = fleet.call(|client| {
            let mut released = released.clone();
            async move {
                let name = client.address().to_string();
                if name.contains("slow") {
                    released.wait_for(|&open| open).await.expect("sender lives");
                }
                Ok(name)
            }
        });
        futures_util::pin_mut!(rows);
        let first = rows.next().await.expect("two nodes");
        assert_eq!(first.node.name, "quick");
        release.send(true).expect("receiver lives");
        assert_eq!(rows.next().await.expect("two nodes").node.name, "slow");
        assert!(rows.next().await.is_none());
    }

    #[tokio::test]
    async fn a_node_that_never_answers_has_its_deadline_in_its_row() {
        let rows = fleet(Duration::from_millis(20))
            .collect(|client| async move {
                if client.address().to_string().contains("slow") {
                    std::future::pending::<()>().await;
                }
                Ok(1)
            })
            .await;
        assert_eq!(rows[0].node.name, "slow");
        assert!(matches!(rows[0].result, Err(Error::Deadline { .. })));
        assert!(matches!(rows[1].result, Ok(1)));
    }
}
