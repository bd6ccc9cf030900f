//! Lists as a whole, whatever the size of a page.

use crate::{
    Client, Error,
    proto::{
        Container, Image, Lease, ListContainersRequest, ListImagesRequest, ListLeasesRequest,
        ListNetworksRequest, ListOperationsRequest, ListRemoteImagesRequest, ListSandboxesRequest,
        ListSystemsRequest, Network, Operation, RemoteImage, Sandbox, System,
    },
};

/// The most that the agent puts into one page.
const PAGE_SIZE: u32 = 1000;

macro_rules! lists {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $item:ident: $service:ident.$call:ident.$items:ident;)*) => {
        impl Client {
            $($(#[$doc])*
            ///
            /// The request's own page fields are not used: all pages are fetched.
            ///
            /// # Errors
            /// As the call itself; a page that is lost while the agent restarts is asked for again.
            pub async fn $name(&self, mut request: $request) -> Result<Vec<$item>, Error> {
                request.page_size = PAGE_SIZE;
                request.page_token = String::new();
                let mut all = Vec::new();
                loop {
                    let page = self
                        .repeat(request.clone(), |client, request| async move { client.$service().$call(request).await })
                        .await?;
                    all.extend(page.$items);
                    if page.next_page_token.is_empty() {
                        return Ok(all);
                    }
                    request.page_token = page.next_page_token;
                }
            })*
        }
    };
}

lists! {
    /// All sandboxes that match, newest first.
    all_sandboxes(ListSandboxesRequest) -> Sandbox: lifecycle.list_sandboxes.sandboxes;
    /// All containers that match, newest first.
    all_containers(ListContainersRequest) -> Container: lifecycle.list_containers.containers;
    /// All images that remotes offer and that match, by remote and distribution.
    all_remote_images(ListRemoteImagesRequest) -> RemoteImage: images.list_remote_images.images;
    /// All images that match, by id.
    all_images(ListImagesRequest) -> Image: images.list_images.images;
    /// All networks, by name.
    all_networks(ListNetworksRequest) -> Network: networks.list_networks.networks;
    /// All leases that match, by network and sandbox.
    all_leases(ListLeasesRequest) -> Lease: networks.list_leases.leases;
    /// All system containers that match, by name.
    all_systems(ListSystemsRequest) -> System: systems.list_systems.systems;
    /// All operations that match, oldest first.
    all_operations(ListOperationsRequest) -> Operation: operations.list_operations.operations;
}
