//! Asks several agents at once what runs on them; a slow one delays only its own row.
//!
//! ```console
//! $ cargo run --package longshore-client --example two_nodes -- /run/a/longshore.sock tcp://127.0.0.1:7070
//! ```

use std::{pin::pin, time::Duration};

use futures_util::StreamExt as _;
use longshore_client::{Fleet, Node, Row, proto::ListContainersRequest};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let nodes = std::env::args()
        .skip(1)
        .map(|text| text.parse().map(Node::new))
        .collect::<Result<Vec<_>, _>>()?;
    let fleet = Fleet::new(nodes, Duration::from_secs(5));
    let rows = fleet.call(|client| async move {
        client
            .all_containers(ListContainersRequest::default())
            .await
    });
    let mut rows = pin!(rows);
    while let Some(Row { node, result }) = rows.next().await {
        match result {
            Ok(containers) => println!("{}: {} containers", node.name, containers.len()),
            Err(error) => println!("{}: {error}", node.name),
        }
    }
    Ok(())
}
