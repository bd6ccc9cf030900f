//! The bridge network: a bridge with the gateways' addresses, and a pair of links per sandbox.
//!
//! ```text
//!   sandbox's namespace         host
//!   eth0 (address, default)  —  ls<sandbox> (port, hairpin)  —  ls-<instance> (gateway)
//! ```
//!
//! Names come from ids, aliases name the owner: `<instance>/<sandbox>` for a port,
//! `<instance>/network/<name>` for a bridge. All calls block, and belong to the network namespace
//! of the calling thread.

use std::{
    fs::File,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt},
};
use serde::{Deserialize, Serialize};

use super::{
    error::NetworkError,
    host,
    ipam::Pool,
    netlink::{self, INSIDE, Link, Netlink, Veth, in_netns},
    nft::{Nft, Published, RuleNetwork},
    plan::{HostFacts, Mac, Mode, NetworkPlan},
    ports::{HostAddress, PortMapping, Protocol},
    record::{Network, NetworkChapterConfig},
};
use crate::id::{InstanceId, SandboxId};

/// How long a link may live after its namespace before we delete it ourselves.
const LINK_GONE_WITHIN: Duration = Duration::from_secs(2);

/// How long a link may take to pass traffic before we go on all the same.
const RUNNING_WITHIN: Duration = Duration::from_millis(100);

/// What attaching made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Name of the interface in the sandbox.
    pub interface: String,
    /// Name of its other end in the host; empty without a network of ours.
    pub host_interface: String,
    /// Addresses with the subnet's prefix length, IPv4 first.
    pub addresses: Vec<IpNet>,
    /// Default gateways, in the same order.
    pub gateways: Vec<std::net::IpAddr>,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// In bytes.
    pub mtu: u32,
    /// What the plugins of CNI answered, if they attached it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
}

/// What the kernel has of this instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Ends of sandboxes' links in the host: whose, and the name.
    pub links: Vec<(SandboxId, String)>,
    /// Host ports.
    pub ports: Vec<Published>,
    /// Names of bridges.
    pub bridges: Vec<String>,
}

/// Name of the bridge that the configuration asks for.
pub(super) fn name(
    instance: &InstanceId,
    config: &NetworkChapterConfig,
    kept: Option<&Network>,
) -> String {
    match config.choose(instance, kept, |_| true) {
        Ok(network) => network.bridge,
        Err(_) => String::new(),
    }
}

fn port_name(sandbox: &SandboxId) -> String {
    format!("ls{}", &sandbox.as_str()[..12])
}

fn port_alias(instance: &InstanceId, sandbox: &SandboxId) -> String {
    format!("{instance}/{sandbox}")
}

fn bridge_alias(instance: &InstanceId, network: &Network) -> String {
    format!("{instance}/network/{}", network.name)
}

fn pool(network: &Network, host: HostFacts) -> Pool {
    Pool {
        v4: network.ipv4,
        v6: network.ipv6.filter(|_| host.ipv6),
    }
}

/// Makes the kernel what the store says: bridges, rules, and the ports and elements of the
/// sandboxes that live; removes what else is there of this instance.
pub(super) fn rebuild(
    instance: &InstanceId,
    nft: &Nft,
    networks: &[Network],
    host: HostFacts,
    live: &[(SandboxId, NetworkPlan)],
) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open()?;
    let rules: Vec<_> = networks
        .iter()
        .map(|network| RuleNetwork {
            bridge: network.bridge.clone(),
            ipv4: network.ipv4,
            ipv6: network.ipv6.filter(|_| host.ipv6),
        })
        .collect();
    let published: Vec<_> = live
        .iter()
        .flat_map(|(sandbox, plan)| published(sandbox, plan))
        .collect();
    // Before the bridge, so that route_localnet is never without its guard.
    nft.rebuild(&rules, &published)?;
    for network in networks {
        ensure(instance, &mut netlink, network, host)?;
    }
    repair_links(instance, &mut netlink, networks, live)
}

fn ensure(
    instance: &InstanceId,
    netlink: &mut Netlink,
    network: &Network,
    host: HostFacts,
) -> Result<(), NetworkError> {
    let alias = bridge_alias(instance, network);
    let gateways: Vec<_> = pool(network, host).gateways().collect();
    let Some(first) = gateways.first() else {
        return Err(NetworkError::Missing {
            feature: "IPv6",
            hint: "the network has no IPv4 and the host no IPv6",
        });
    };
    let name = network.bridge.as_str();
    let link = match netlink.link(name)? {
        Some(link) if link.alias.as_deref() == Some(alias.as_str()) => link,
        Some(_) => {
            let link = name.to_owned();
            return Err(NetworkError::ForeignLink { link });
        }
        None => {
            netlink.apply(netlink::create_bridge(
                name,
                &alias,
                Mac::of(first.addr()),
                host.mtu,
            ))?;
            existing(netlink, name)?
        }
    };
    host::prepare_bridge(name, host.ipv6)?;
    let mut changes = Vec::new();
    for address in netlink.addresses(link.index)? {
        let link_local = matches!(address, IpNet::V6(net) if net.addr().is_unicast_link_local());
        if !gateways.contains(&address) && !link_local {
            changes.push(netlink::delete_address(link.index, address));
        }
    }
    if link.mtu != host.mtu {
        changes.push(netlink::set_mtu(name, host.mtu));
    }
    changes.extend(
        gateways
            .iter()
            .map(|net| netlink::add_address(link.index, *net)),
    );
    changes.push(netlink::set_up(name));
    netlink.apply(changes)
}

fn existing(netlink: &mut Netlink, name: &str) -> Result<Link, NetworkError> {
    netlink
        .link(name)?
        .ok_or_else(|| NetworkError::kernel("RTM_GETLINK", name, Errno::NODEV.into()))
}

/// Puts live ports back on their bridges and deletes links that belong to nobody.
fn repair_links(
    instance: &InstanceId,
    netlink: &mut Netlink,
    networks: &[Network],
    live: &[(SandboxId, NetworkPlan)],
) -> Result<(), NetworkError> {
    let links = netlink.links()?;
    let mut changes = Vec::new();
    for link in &links {
        match owner(instance, link) {
            Some(Owner::Sandbox(sandbox)) => {
                let plan = live.iter().find(|(id, _)| *id == sandbox);
                let bridge = plan
                    .and_then(|(_, plan)| links.iter().find(|link| link.name == plan.bridge))
                    .map(|bridge| bridge.index);
                match bridge {
                    Some(bridge) if link.controller == Some(bridge) && link.up => {}
                    Some(bridge) => {
                        let mac = plan.and_then(|(_, plan)| plan.mac);
                        let alias = port_alias(instance, &sandbox);
                        tracing::warn!(link = link.name, %sandbox, "put back on its bridge");
                        changes.extend(netlink::repair_port(&link.name, &alias, bridge));
                        changes
                            .extend(mac.map(|mac| netlink::pin_mac(link.index, &link.name, mac)));
                    }
                    None => {
                        tracing::warn!(link = link.name, %sandbox, "removed: nobody's");
                        changes.push(netlink::delete_link(link.index, &link.name));
                    }
                }
            }
            Some(Owner::Network(name)) => {
                let known = networks
                    .iter()
                    .any(|network| network.name == name && network.bridge == link.name);
                if !known {
                    tracing::warn!(link = link.name, network = name, "removed: nobody's");
                    changes.push(netlink::delete_link(link.index, &link.name));
                }
            }
            None => {}
        }
    }
    netlink.apply(changes)
}

enum Owner {
    Sandbox(SandboxId),
    Network(String),
}

fn owner(instance: &InstanceId, link: &Link) -> Option<Owner> {
    let rest = link
        .alias
        .as_deref()?
        .strip_prefix(instance.as_str())?
        .strip_prefix('/')?;
    match rest.strip_prefix("network/") {
        Some(name) => Some(Owner::Network(name.to_owned())),
        None => rest.parse().ok().map(Owner::Sandbox),
    }
}

/// Attaches the namespace as planned; repeating it changes nothing.
pub(super) fn attach(
    instance: &InstanceId,
    nft: &Nft,
    sandbox: &SandboxId,
    plan: &NetworkPlan,
    netns: &Path,
) -> Result<Attachment, NetworkError> {
    let mut attachment = Attachment {
        interface: String::new(),
        host_interface: String::new(),
        addresses: Vec::new(),
        gateways: Vec::new(),
        mac: None,
        mtu: 0,
        result: None,
    };
    match plan.mode {
        Mode::Host => return Ok(attachment),
        Mode::None => {
            loopback(netns)?;
            return Ok(attachment);
        }
        Mode::Pod => {}
    }
    let published = published(sandbox, plan);
    refuse_ports_in_use(&plan.ports)?;
    refuse_ports_of_rivals(nft, &published)?;
    let host_interface = connect(instance, sandbox, plan, netns)?;
    nft.publish(&published)?;
    // Of two agents at the same moment, one at least sees the other's.
    refuse_ports_of_rivals(nft, &published)?;
    attachment.interface = INSIDE.to_owned();
    attachment.host_interface = host_interface;
    attachment.addresses.clone_from(&plan.addresses);
    attachment.gateways.clone_from(&plan.gateways);
    attachment.mac = plan.mac;
    attachment.mtu = plan.mtu;
    Ok(attachment)
}

/// Brings the namespace's loopback up.
pub(super) fn loopback(netns: &Path) -> Result<(), NetworkError> {
    in_netns(
        open(netns)?.as_fd(),
        || Ok(()),
        |()| Netlink::open()?.apply(vec![netlink::set_up("lo")]),
    )
}

fn open(netns: &Path) -> Result<File, NetworkError> {
    File::open(netns).map_err(|error| NetworkError::file("enter", netns, error))
}

/// Makes the pair of links and all that is inside; on a thread that talks to both namespaces.
fn connect(
    instance: &InstanceId,
    sandbox: &SandboxId,
    plan: &NetworkPlan,
    netns: &Path,
) -> Result<String, NetworkError> {
    let name = port_name(sandbox);
    let alias = port_alias(instance, sandbox);
    let file = open(netns)?;
    let ipv6 = plan.addresses.iter().any(|net| net.addr().is_ipv6());
    in_netns(file.as_fd(), Netlink::open, |mut host| {
        host::prepare_inside(ipv6)?;
        let mut inside = Netlink::open()?;
        let bridge = existing(&mut host, &plan.bridge)?;
        let veth = Veth {
            host: &name,
            alias: &alias,
            bridge: bridge.index,
            mac: plan.mac.unwrap_or(Mac([0x02, 0, 0, 0, 0, 0])),
            mtu: plan.mtu,
        };
        match (host.link(&name)?, inside.link(INSIDE)?) {
            (Some(link), _) if link.alias.as_deref() != Some(alias.as_str()) => {
                return Err(NetworkError::ForeignLink { link: link.name });
            }
            (Some(_), Some(_)) => {
                host.apply(netlink::repair_port(&name, &alias, bridge.index))?;
            }
            (left_over, None) => {
                // From a namespace of an earlier attempt that is not gone yet.
                if let Some(link) = left_over {
                    host.apply(vec![netlink::delete_link(link.index, &name)])?;
                }
                host.apply(netlink::create_veth(&veth, file.as_fd()))?;
            }
            (None, Some(link)) => return Err(NetworkError::ForeignLink { link: link.name }),
        }
        let index = existing(&mut inside, INSIDE)?.index;
        let mut changes = vec![netlink::set_up("lo")];
        changes.extend(
            plan.addresses
                .iter()
                .map(|net| netlink::add_address(index, *net)),
        );
        changes.push(netlink::set_up(INSIDE));
        changes.extend(
            plan.gateways
                .iter()
                .map(|ip| netlink::add_default_route(index, *ip)),
        );
        inside.apply(changes)?;
        let port = wait_until_running(&mut host, &name)?;
        host.apply(vec![netlink::pin_mac(port.index, &name, veth.mac)])
    })?;
    Ok(name)
}

/// The kernel lets a port pass traffic a moment after both ends are up, on a work queue. What is
/// sent before is lost, and a lost question for a neighbour costs a second.
fn wait_until_running(netlink: &mut Netlink, name: &str) -> Result<Link, NetworkError> {
    let deadline = Instant::now() + RUNNING_WITHIN;
    loop {
        let link = existing(netlink, name)?;
        if link.running || Instant::now() >= deadline {
            return Ok(link);
        }
        thread::sleep(Duration::from_micros(100));
    }
}

/// Withdraws the sandbox's ports; its links go with its namespace.
pub(super) fn detach(nft: &Nft, sandbox: &SandboxId) -> Result<(), NetworkError> {
    nft.withdraw(sandbox).map(drop)
}

/// Waits until the sandbox's link is gone, as it should be once its namespace is; deletes it if
/// something keeps the namespace alive. A link that is not this sandbox's is not looked at.
pub(super) fn settle(instance: &InstanceId, sandbox: &SandboxId) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open()?;
    let name = port_name(sandbox);
    let deadline = Instant::now() + LINK_GONE_WITHIN;
    let mut pause = Duration::from_millis(1);
    loop {
        let Some(link) = netlink.link(&name)? else {
            return Ok(());
        };
        if link.alias.as_deref() != Some(port_alias(instance, sandbox).as_str()) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            tracing::warn!(link = name, %sandbox, "outlived its sandbox, removed");
            return netlink.apply(vec![netlink::delete_link(link.index, &name)]);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// What of this instance is in the kernel.
pub(super) fn inventory(instance: &InstanceId, nft: &Nft) -> Result<Inventory, NetworkError> {
    let mut inventory = Inventory {
        ports: nft.published()?,
        ..Inventory::default()
    };
    for link in Netlink::open()?.links()? {
        match owner(instance, &link) {
            Some(Owner::Sandbox(sandbox)) => inventory.links.push((sandbox, link.name)),
            Some(Owner::Network(_)) => inventory.bridges.push(link.name),
            None => {}
        }
    }
    Ok(inventory)
}

/// Removes everything of this instance from the kernel.
pub(super) fn remove(instance: &InstanceId, nft: &Nft) -> Result<(), NetworkError> {
    nft.remove()?;
    let mut netlink = Netlink::open()?;
    let ours = netlink
        .links()?
        .into_iter()
        .filter(|link| owner(instance, link).is_some());
    let changes = ours
        .map(|link| netlink::delete_link(link.index, &link.name))
        .collect();
    netlink.apply(changes)
}

/// The map elements that a plan asks for.
fn published(sandbox: &SandboxId, plan: &NetworkPlan) -> Vec<Published> {
    let mut elements = Vec::new();
    for port in &plan.ports {
        for address in plan.addresses.iter().map(IpNet::addr) {
            let host = match (port.host_address(), address.is_ipv4()) {
                (HostAddress::Any, true) => HostAddress::AnyV4,
                (HostAddress::Any, false) => HostAddress::AnyV6,
                (host, true) if host.has_v4() => host,
                (host, false) if host.has_v6() => host,
                _ => continue,
            };
            elements.push(Published {
                sandbox: sandbox.clone(),
                protocol: port.protocol,
                host,
                host_port: port.host_port,
                address,
                port: port.container_port,
            });
        }
    }
    elements
}

/// A translated port would take packets away from a process that listens on it.
fn refuse_ports_in_use(ports: &[PortMapping]) -> Result<(), NetworkError> {
    for port in ports {
        let tries: &[SocketAddr] = &match port.host_address() {
            HostAddress::Any => vec![any_v4(port), any_v6(port)],
            HostAddress::AnyV4 => vec![any_v4(port)],
            HostAddress::AnyV6 => vec![any_v6(port)],
            HostAddress::One(ip) => vec![(ip, port.host_port).into()],
        };
        if tries.iter().any(|at| in_use(port.protocol, *at)) {
            return Err(NetworkError::PortTaken {
                port: port.host_port,
                protocol: port.protocol,
                address: port.host_address(),
                holder: "a process of the host".to_owned(),
            });
        }
    }
    Ok(())
}

/// The first table that sees a packet translates it: a port that another agent of this host has
/// published would lead there, or be taken from it.
fn refuse_ports_of_rivals(nft: &Nft, published: &[Published]) -> Result<(), NetworkError> {
    nft.rival(published)?.map_or(Ok(()), |(table, other)| {
        Err(NetworkError::PortTaken {
            port: other.host_port,
            protocol: other.protocol,
            address: other.host,
            holder: format!("sandbox/{} of the agent with table {table}", other.sandbox),
        })
    })
}

fn any_v4(port: &PortMapping) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port.host_port).into()
}

fn any_v6(port: &PortMapping) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port.host_port).into()
}

/// Whether binding there fails for that reason; a socket that can't even be made tells nothing.
fn in_use(protocol: Protocol, at: SocketAddr) -> bool {
    let (kind, number) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, rustix::net::ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, rustix::net::ipproto::UDP),
        Protocol::Sctp => (SocketType::STREAM, rustix::net::ipproto::SCTP),
    };
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let Ok(socket) = socket_with(family, kind, SocketFlags::CLOEXEC, Some(number)) else {
        return false;
    };
    if at.is_ipv6() && sockopt::set_ipv6_v6only(&socket, true).is_err() {
        return false;
    }
    // Connections of a listener that has ended are no listener.
    if protocol == Protocol::Tcp && sockopt::set_socket_reuseaddr(&socket, true).is_err() {
        return false;
    }
    bind(&socket, &at) == Err(Errno::ADDRINUSE)
}
