//! Prints what happens on a node, from the beginning of what it remembers, and goes on across
//! restarts of the agent.
//!
//! ```console
//! $ cargo run --package longshore-client --example events
//! ```

use longshore_client::{
    Address, Client,
    proto::{Cursor, WatchRequest},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::connect(&Address::from_env()?).await?;
    let mut watch = client.watch(WatchRequest {
        // Epoch and number 0: all that is retained. A program that remembers more than its own
        // lifetime keeps `watch.cursor()` in a file and starts with that.
        cursor: Some(Cursor::default()),
        ..Default::default()
    });
    while let Some(event) = watch.next().await? {
        let cursor = event.cursor.unwrap_or_default();
        println!(
            "{}.{} {:?} {:?}",
            cursor.epoch,
            cursor.number,
            event.kind(),
            event.attributes
        );
    }
    Ok(())
}
