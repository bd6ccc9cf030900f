//! Pulls an image and shows how far it is.
//!
//! ```console
//! $ cargo run --package longshore-client --example pull -- docker.io/library/busybox
//! ```

use longshore_client::{
    Address, Client, PullUpdate,
    proto::{LayerState, PullImageRequest},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let reference = std::env::args().nth(1).ok_or("usage: pull REFERENCE")?;
    let client = Client::connect(&Address::from_env()?).await?;
    let mut pull = client.pull(PullImageRequest {
        reference,
        ..Default::default()
    });
    loop {
        match pull.next().await? {
            PullUpdate::Progress(progress) => {
                let there = |layer: &&longshore_client::proto::LayerProgress| {
                    matches!(layer.state(), LayerState::Done | LayerState::Present)
                };
                let done = progress.layers.iter().filter(there).count();
                let bytes: u64 = progress
                    .layers
                    .iter()
                    .map(|layer| layer.fetched_bytes)
                    .sum();
                println!("{done} of {} layers, {bytes} bytes", progress.layers.len());
            }
            PullUpdate::Done(image) => {
                println!("{} is {}", image.reference, image.image_id);
                return Ok(());
            }
        }
    }
}
