//! NetworkService.

use longshore_proto::longshore::v1::{self as pb, network_service_server::NetworkService};
use tonic::{Request, Response, Status};

use super::{Native, page::Page, refused, render};
use crate::{
    blocking,
    lifecycle::sandbox::Sandbox,
    network::{Network, NetworkError, cni::Chosen},
    service::edge,
    store::Snapshot,
};

impl Native {
    async fn render_network(&self, at: &Snapshot, network: &Network) -> pb::Network {
        pb::Network {
            name: network.name.clone(),
            bridge: network.bridge.clone(),
            subnets: subnets(network),
            mtu_bytes: self.mtu(network).await,
            masquerade: true,
            lease_count: leases(at, &network.name, false),
            created_at: None,
            cni: None,
        }
    }

    /// All networks by name: ours, and the one that plugins make, which comes first under its name.
    async fn networks(&self, at: &Snapshot) -> Vec<pb::Network> {
        self.agent.networks.refresh().await;
        let mut all = Vec::new();
        all.extend(
            self.agent
                .networks
                .plugins()
                .map(|chosen| plugin_network(at, &chosen)),
        );
        for network in self.agent.networks.list(at) {
            all.push(self.render_network(at, &network).await);
        }
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all.dedup_by(|later, first| later.name == first.name);
        all
    }

    async fn network(&self, at: &Snapshot, name: &str) -> Result<pb::Network, NetworkError> {
        let found = self.networks(at).await;
        found
            .into_iter()
            .find(|network| network.name == name)
            .ok_or_else(|| NetworkError::UnknownNetwork {
                network: name.to_owned(),
            })
    }

    /// As the kernel has it; the wished one while the bridge is not there.
    async fn mtu(&self, network: &Network) -> u32 {
        let path = format!("/sys/class/net/{}/mtu", network.bridge);
        let read = blocking::run("read mtu", move || std::fs::read_to_string(path)).await;
        read.ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(self.agent.config.network.mtu)
    }
}

fn leases(at: &Snapshot, network: &str, by_plugins: bool) -> u32 {
    let leases = at.all::<Sandbox>().filter(|sandbox| {
        sandbox.attachment.is_some()
            && sandbox.plan.network == network
            && sandbox.plan.cni.is_some() == by_plugins
    });
    u32::try_from(leases.count()).unwrap_or(u32::MAX)
}

fn plugin_network(at: &Snapshot, chosen: &Chosen) -> pb::Network {
    pb::Network {
        name: chosen.list.name.clone(),
        lease_count: leases(at, &chosen.list.name, true),
        cni: Some(pb::CniNetwork {
            file: chosen.file.to_string_lossy().into_owned(),
            version: chosen.list.version.to_string(),
            plugins: chosen.list.types().map(str::to_owned).collect(),
        }),
        ..pb::Network::default()
    }
}

/// IPv4 first; the host has the first address of each.
fn subnets(network: &Network) -> Vec<pb::Subnet> {
    let v4 = network.ipv4.map(|net| pb::Subnet {
        cidr: net.to_string(),
        gateway: std::net::Ipv4Addr::from(u32::from(net.network()) + 1).to_string(),
    });
    let v6 = network.ipv6.map(|net| pb::Subnet {
        cidr: net.to_string(),
        gateway: std::net::Ipv6Addr::from(u128::from(net.network()) + 1).to_string(),
    });
    v4.into_iter().chain(v6).collect()
}

/// What an attached sandbox has of its network.
fn lease(sandbox: &Sandbox) -> Option<pb::Lease> {
    let attachment = sandbox.attachment.as_ref()?;
    if sandbox.plan.network.is_empty() {
        return None;
    }
    Some(pb::Lease {
        network: sandbox.plan.network.clone(),
        sandbox_id: sandbox.id.to_string(),
        addresses: attachment
            .addresses
            .iter()
            .map(|net| net.addr().to_string())
            .collect(),
        mac: attachment
            .mac
            .map(|mac| mac.to_string())
            .unwrap_or_default(),
        host_interface: attachment.host_interface.clone(),
        ports: render::published(sandbox),
    })
}

#[tonic::async_trait]
impl NetworkService for Native {
    async fn get_network(
        &self,
        request: Request<pb::GetNetworkRequest>,
    ) -> Result<Response<pb::GetNetworkResponse>, Status> {
        let mut name = request.into_inner().name;
        edge::text("name", &name, 63).map_err(refused)?;
        if name.is_empty() {
            name = match self.agent.networks.plugins() {
                Some(chosen) => chosen.list.name.clone(),
                None => self.agent.config.network.name.clone(),
            };
        }
        let at = self.agent.store.snapshot();
        let network = self.network(&at, &name).await.map_err(refused)?;
        Ok(Response::new(pb::GetNetworkResponse {
            network: Some(network),
        }))
    }

    async fn list_networks(
        &self,
        request: Request<pb::ListNetworksRequest>,
    ) -> Result<Response<pb::ListNetworksResponse>, Status> {
        let request = request.into_inner();
        let page =
            Page::new("networks", request.page_size, &request.page_token).map_err(refused)?;
        let at = self.agent.store.snapshot();
        let all = self.networks(&at).await;
        let (networks, next_page_token) = page.cut(all, |network| network.name.clone());
        Ok(Response::new(pb::ListNetworksResponse {
            networks,
            next_page_token,
        }))
    }

    async fn list_leases(
        &self,
        request: Request<pb::ListLeasesRequest>,
    ) -> Result<Response<pb::ListLeasesResponse>, Status> {
        let request = request.into_inner();
        let page = Page::new("leases", request.page_size, &request.page_token).map_err(refused)?;
        let at = self.agent.store.snapshot();
        edge::text("network", &request.network, 63).map_err(refused)?;
        if !request.network.is_empty() {
            self.network(&at, &request.network).await.map_err(refused)?;
        }
        let sandboxes: Vec<_> = match request.sandbox_id.as_str() {
            "" => at.all::<Sandbox>().collect(),
            id => {
                edge::id("sandbox_id", id).map_err(refused)?;
                self.one_sandbox(&at, id)?.into_iter().collect()
            }
        };
        let found = sandboxes
            .iter()
            .filter_map(|sandbox| lease(sandbox))
            .filter(|lease| request.network.is_empty() || lease.network == request.network);
        let (leases, next_page_token) = page.cut(found, |lease| {
            format!("{}/{}", lease.network, lease.sandbox_id)
        });
        Ok(Response::new(pb::ListLeasesResponse {
            leases,
            next_page_token,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gateway_is_the_first_address() {
        let network = Network {
            name: "n".into(),
            bridge: "b".into(),
            ipv4: "10.88.0.0/16".parse().ok(),
            ipv6: "fd00:1::/64".parse().ok(),
        };
        let shown: Vec<_> = subnets(&network)
            .into_iter()
            .map(|net| (net.cidr, net.gateway))
            .collect();
        let expected = [("10.88.0.0/16", "10.88.0.1"), ("fd00:1::/64", "fd00:1::1")];
        assert_eq!(
            shown,
            expected.map(|(cidr, gateway)| (cidr.to_owned(), gateway.to_owned()))
        );
    }
}
