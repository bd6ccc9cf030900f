//! What the host must have, what we change in it, and what we can only tell the operator.
//!
//! Everything here is about the network namespace of the calling thread.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ipnet::IpNet;

use super::{
    bridge,
    error::NetworkError,
    netlink::{Link, Netlink, Route},
    nft::Nft,
    plan::HostFacts,
    record::{Network, NetworkChapterConfig, Wished},
};
use crate::id::InstanceId;

/// Where the kernel has its network settings.
const SYSCTL: &str = "/proc/sys/net";

/// A route at least this short is a default route, or half of one as VPNs set it.
const DEFAULT_ROUTE_BITS: u8 = 3;

/// Something about the host's network that an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// nf_tables can't be used at all.
    NoNfTables {
        /// Why.
        reason: String,
    },
    /// Another program's table drops forwarded packets by policy.
    ForwardDrop {
        /// `ip`, `ip6` or `inet`.
        family: &'static str,
        /// Name of the table.
        table: String,
        /// Name of the chain.
        chain: String,
    },
    /// The older iptables is in use beside nf_tables; its policy can't be read.
    LegacyIptables,
    /// Packets between sandboxes of one bridge go through the host's iptables rules.
    BridgeFilter {
        /// The setting.
        sysctl: &'static str,
    },
    /// A configured or chosen subnet is also reachable elsewhere.
    SubnetOverlap {
        /// Our subnet.
        subnet: IpNet,
        /// The host's route.
        route: IpNet,
        /// Where the route points to.
        link: String,
    },
    /// The host has no IPv6, so sandboxes have IPv4 only.
    NoIpv6,
    /// Forwarding is off, and the agent will turn it on.
    ForwardingOff {
        /// The setting.
        sysctl: &'static str,
    },
    /// Settings can't be changed by this process.
    ReadOnlySettings,
    /// Plugins of CNI attach sandboxes.
    CniServes {
        /// Name of the network.
        network: String,
        /// Its configuration.
        file: PathBuf,
    },
    /// Plugins of CNI are to attach sandboxes, and there is no valid configuration.
    CniMissing {
        /// Which folder, and what is wrong.
        reason: String,
    },
    /// A configuration of CNI is passed over.
    CniFile {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A plugin that a configuration of CNI names is not installed.
    CniPlugin {
        /// Name of the network.
        network: String,
        /// The program.
        plugin: String,
        /// Where it was looked for.
        folders: Vec<PathBuf>,
    },
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Good to know.
    Note,
    /// Some traffic may not pass.
    Warning,
    /// Networks can't work.
    Error,
}

impl Finding {
    /// Stable name for scripts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoNfTables { .. } => "no-nf-tables",
            Self::ForwardDrop { .. } => "forward-drop",
            Self::LegacyIptables => "legacy-iptables",
            Self::BridgeFilter { .. } => "bridge-filter",
            Self::SubnetOverlap { .. } => "subnet-overlap",
            Self::NoIpv6 => "no-ipv6",
            Self::ForwardingOff { .. } => "forwarding-off",
            Self::ReadOnlySettings => "read-only-settings",
            Self::CniServes { .. } => "cni-serves",
            Self::CniMissing { .. } => "cni-missing",
            Self::CniFile { .. } => "cni-file",
            Self::CniPlugin { .. } => "cni-plugin",
        }
    }

    /// How much it matters.
    pub fn severity(&self) -> Severity {
        match self {
            Self::NoNfTables { .. }
            | Self::SubnetOverlap { .. }
            | Self::ReadOnlySettings
            | Self::CniMissing { .. }
            | Self::CniPlugin { .. } => Severity::Error,
            Self::ForwardDrop { .. } | Self::LegacyIptables | Self::CniFile { .. } => {
                Severity::Warning
            }
            Self::BridgeFilter { .. }
            | Self::NoIpv6
            | Self::ForwardingOff { .. }
            | Self::CniServes { .. } => Severity::Note,
        }
    }

    /// What it means and what to do.
    pub fn explanation(&self) -> String {
        match self {
            Self::NoNfTables { reason } => format!(
                "nf_tables can't be used ({reason}): host ports and masquerading need it. Load the \
                 modules nf_tables, nft_chain_nat, nft_nat, nft_masq, nft_fib_inet and nft_ct."
            ),
            Self::ForwardDrop {
                family,
                table,
                chain,
            } => format!(
                "chain {chain} of table {family} {table} drops forwarded packets unless a rule \
                 there accepts them (Docker, ufw and firewalld set this up). No other table can \
                 overrule it: accept traffic from and to the bridge there, for Docker in its chain \
                 DOCKER-USER."
            ),
            Self::LegacyIptables => "legacy iptables has a filter table beside nf_tables. If the \
                 policy of its chain FORWARD is DROP (`iptables-legacy -S FORWARD`), accept \
                 traffic from and to the bridge there."
                .to_owned(),
            Self::BridgeFilter { sysctl } => format!(
                "{sysctl} is 1, so even packets between two sandboxes of one bridge pass the \
                 host's iptables rules. That is right for Kubernetes; else set it to 0."
            ),
            Self::SubnetOverlap {
                subnet,
                route,
                link,
            } => format!(
                "subnet {subnet} overlaps {route} on link {link}: one of the two could not be \
                 reached. Choose another subnet in [network]."
            ),
            Self::NoIpv6 => {
                "the host has IPv6 disabled or not built in: sandboxes get IPv4 only.".to_owned()
            }
            Self::ForwardingOff { sysctl } => {
                format!("{sysctl} is 0; the agent sets it to 1 when it starts.")
            }
            Self::ReadOnlySettings => {
                "settings in /proc/sys/net can't be changed: run the agent in a context where \
                 /proc/sys is writable, or set forwarding yourself."
                    .to_owned()
            }
            Self::CniServes { network, file } => format!(
                "sandboxes are attached by the CNI network {network:?} of {}",
                file.display()
            ),
            Self::CniMissing { reason } => format!(
                "{reason}. Sandboxes with a network of their own are refused until there is one; \
                 set network.mode to \"builtin\" to use the built-in network."
            ),
            Self::CniFile { file, reason } => {
                format!(
                    "CNI configuration {} is passed over: {reason}",
                    file.display()
                )
            }
            Self::CniPlugin {
                network,
                plugin,
                folders,
            } => {
                let folders: Vec<_> = folders
                    .iter()
                    .map(|folder| folder.display().to_string())
                    .collect();
                format!(
                    "CNI plugin {plugin:?} of network {network:?} is in none of {}: install it, or \
                     set network.cni.bin_dirs",
                    folders.join(", ")
                )
            }
        }
    }
}

/// What the host has, as planning and starting need it.
pub(super) struct Host {
    pub(super) facts: HostFacts,
    links: Vec<Link>,
    routes: Vec<Route>,
}

impl Host {
    pub(super) fn read(
        netlink: &mut Netlink,
        config: &NetworkChapterConfig,
    ) -> Result<Self, NetworkError> {
        let links = netlink.links()?;
        let routes = netlink.routes()?;
        let mtu = match config.mtu {
            0 => uplink_mtu(&links, &routes).unwrap_or(1500),
            mtu => mtu,
        };
        let facts = HostFacts {
            ipv6: has_ipv6(),
            mtu,
        };
        Ok(Self {
            facts,
            links,
            routes,
        })
    }

    /// The route that `subnet` overlaps, unless it belongs to `own`, a bridge of ours.
    pub(super) fn overlap(&self, subnet: IpNet, own: &str) -> Option<(IpNet, String)> {
        overlap(&self.links, &self.routes, subnet, own)
    }
}

fn overlap(links: &[Link], routes: &[Route], subnet: IpNet, own: &str) -> Option<(IpNet, String)> {
    let name = |index: Option<u32>| {
        let link = links.iter().find(|link| Some(link.index) == index);
        link.map_or("none", |link| link.name.as_str())
    };
    routes
        .iter()
        .filter(|route| route.destination.prefix_len() > DEFAULT_ROUTE_BITS)
        .filter(|route| subnet.contains(&route.destination) || route.destination.contains(&subnet))
        .map(|route| (route.destination, name(route.link)))
        .find(|(_, link)| *link != own)
        .map(|(route, link)| (route, link.to_owned()))
}

fn uplink_mtu(links: &[Link], routes: &[Route]) -> Option<u32> {
    let uplink = routes
        .iter()
        .filter(|route| route.destination.prefix_len() == 0 && route.link.is_some())
        .min_by_key(|route| (route.destination.addr().is_ipv6(), route.metric))?;
    let link = links.iter().find(|link| Some(link.index) == uplink.link)?;
    // Loopback can carry the unreachable default route of IPv6.
    (link.name != "lo").then_some(link.mtu)
}

/// Whether links made from now on can have IPv6.
fn has_ipv6() -> bool {
    ["all", "default"]
        .iter()
        .all(|of| read(&format!("ipv6/conf/{of}/disable_ipv6")).as_deref() == Some("0"))
}

/// Turns forwarding on, without cutting the host off.
///
/// A host that forwards IPv6 ignores router advertisements unless `accept_ra` is 2, and would
/// lose its own default route when the advertised one expires.
///
/// Source: Linux, Documentation/networking/ip-sysctl.rst.
pub(super) fn prepare(host: &Host) -> Result<(), NetworkError> {
    set("ipv4/ip_forward", "1")?;
    if !host.facts.ipv6 {
        return Ok(());
    }
    for link in &host.links {
        let advertised = |route: &Route| route.advertised && route.link == Some(link.index);
        let accept = format!("ipv6/conf/{}/accept_ra", link.name);
        if host.routes.iter().any(advertised) && read(&accept).as_deref() == Some("1") {
            set(&accept, "2")?;
        }
    }
    set("ipv6/conf/all/forwarding", "1")
}

/// Settings of a bridge: the host's 127.0.0.1 may be translated through it (the nft table guards
/// what that opens), and it takes no addresses or routes from what is attached to it.
pub(super) fn prepare_bridge(name: &str, ipv6: bool) -> Result<(), NetworkError> {
    set(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
    if ipv6 {
        set(&format!("ipv6/conf/{name}/accept_ra"), "0")?;
        set(&format!("ipv6/conf/{name}/accept_dad"), "0")?;
    }
    Ok(())
}

/// Settings of a sandbox's namespace, before its interface is made: no router advertisements, no
/// waiting for duplicate address detection.
pub(super) fn prepare_inside(ipv6: bool) -> Result<(), NetworkError> {
    if ipv6 {
        set("ipv6/conf/default/accept_ra", "0")?;
        set("ipv6/conf/default/accept_dad", "0")?;
    }
    Ok(())
}

/// Looks at the host and changes nothing.
pub(super) fn check(
    instance: &InstanceId,
    config: &NetworkChapterConfig,
    kept: Option<&Network>,
) -> Result<Vec<Finding>, NetworkError> {
    let mut netlink = Netlink::open()?;
    let host = Host::read(&mut netlink, config)?;
    let mut findings = Vec::new();
    match Nft::new(instance).forward_drops() {
        Err(error) => findings.push(Finding::NoNfTables {
            reason: match std::error::Error::source(&error) {
                Some(source) => source.to_string(),
                None => error.to_string(),
            },
        }),
        Ok(chains) => findings.extend(chains.into_iter().map(|chain| Finding::ForwardDrop {
            family: chain.family,
            table: chain.table,
            chain: chain.chain,
        })),
    }
    let legacy = fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    if legacy.lines().any(|table| table == "filter") {
        findings.push(Finding::LegacyIptables);
    }
    for (file, sysctl) in [
        (
            "bridge/bridge-nf-call-iptables",
            "net.bridge.bridge-nf-call-iptables",
        ),
        (
            "bridge/bridge-nf-call-ip6tables",
            "net.bridge.bridge-nf-call-ip6tables",
        ),
    ] {
        if read(file).as_deref() == Some("1") {
            findings.push(Finding::BridgeFilter { sysctl });
        }
    }
    findings.extend(subnet_findings(instance, config, kept, &host));
    findings.extend(setting_findings(&host));
    Ok(findings)
}

fn subnet_findings(
    instance: &InstanceId,
    config: &NetworkChapterConfig,
    kept: Option<&Network>,
    host: &Host,
) -> Vec<Finding> {
    let own = bridge::name(instance, config, kept);
    let wished = [
        match config.ipv4 {
            Wished::This(net) => Some(IpNet::from(net)),
            _ => kept.and_then(|kept| kept.ipv4).map(IpNet::from),
        },
        match config.ipv6 {
            Wished::This(net) => Some(IpNet::from(net)),
            _ => kept.and_then(|kept| kept.ipv6).map(IpNet::from),
        },
    ];
    let overlaps = wished.into_iter().flatten().filter_map(|subnet| {
        let (route, link) = host.overlap(subnet, &own)?;
        Some(Finding::SubnetOverlap {
            subnet,
            route,
            link,
        })
    });
    overlaps.collect()
}

fn setting_findings(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut off = Vec::new();
    if read("ipv4/ip_forward").as_deref() == Some("0") {
        off.push("net.ipv4.ip_forward");
    }
    if host.facts.ipv6 {
        if read("ipv6/conf/all/forwarding").as_deref() == Some("0") {
            off.push("net.ipv6.conf.all.forwarding");
        }
    } else {
        findings.push(Finding::NoIpv6);
    }
    let writable = fs::OpenOptions::new()
        .write(true)
        .open(Path::new(SYSCTL).join("ipv4/ip_forward"))
        .is_ok();
    if !writable {
        findings.push(Finding::ReadOnlySettings);
    }
    findings.extend(
        off.into_iter()
            .map(|sysctl| Finding::ForwardingOff { sysctl }),
    );
    findings
}

fn read(name: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new(SYSCTL).join(name)).ok()?;
    Some(text.trim_end().to_owned())
}

/// Sets a value that is not set already, so that a right host works where /proc/sys is read-only.
fn set(name: &str, value: &str) -> Result<(), NetworkError> {
    if read(name).as_deref() == Some(value) {
        return Ok(());
    }
    let path = Path::new(SYSCTL).join(name);
    let result: io::Result<()> = fs::write(&path, value);
    result.map_err(|error| NetworkError::file("write", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, mtu: u32) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: String::new(),
            alias: None,
            controller: None,
            mac: Vec::new(),
            mtu,
            up: true,
            running: true,
        }
    }

    fn route(destination: &str, link: u32, metric: u32) -> Route {
        Route {
            destination: destination.parse().expect("a subnet"),
            link: Some(link),
            advertised: false,
            metric,
        }
    }

    #[test]
    fn overlap_names_the_route_and_spares_default_routes_and_our_own_bridge() {
        let links = [
            link(1, "lo", 65536),
            link(2, "eth0", 1500),
            link(3, "ls-x", 1500),
        ];
        let check = |routes: &[Route], expected: Option<&str>| {
            let subnet = "10.88.0.0/16".parse().expect("a subnet");
            let found = overlap(&links, routes, subnet, "ls-x").map(|(route, _)| route.to_string());
            assert_eq!(found.as_deref(), expected, "{routes:?}");
        };
        check(&[], None);
        check(&[route("0.0.0.0/0", 2, 0)], None);
        check(&[route("0.0.0.0/1", 2, 0)], None);
        check(&[route("10.0.0.0/8", 2, 0)], Some("10.0.0.0/8"));
        check(&[route("10.88.3.0/24", 2, 0)], Some("10.88.3.0/24"));
        check(&[route("10.88.0.5/32", 1, 0)], Some("10.88.0.5/32"));
        check(&[route("10.89.0.0/16", 2, 0)], None);
        check(&[route("10.88.0.0/16", 3, 0)], None);
        check(&[route("fd00::/8", 2, 0)], None);
        check(
            &[route("10.88.0.0/16", 3, 0), route("10.88.0.0/24", 2, 0)],
            Some("10.88.0.0/24"),
        );
    }

    #[test]
    fn mtu_is_that_of_the_preferred_default_route() {
        let links = [
            link(1, "lo", 65536),
            link(2, "eth0", 1500),
            link(3, "wg0", 1420),
        ];
        let check = |routes: &[Route], expected: Option<u32>| {
            assert_eq!(uplink_mtu(&links, routes), expected, "{routes:?}");
        };
        check(&[], None);
        check(&[route("10.0.0.0/8", 2, 0)], None);
        check(&[route("0.0.0.0/0", 2, 100)], Some(1500));
        check(
            &[route("0.0.0.0/0", 2, 100), route("0.0.0.0/0", 3, 50)],
            Some(1420),
        );
        check(
            &[route("::/0", 3, 1), route("0.0.0.0/0", 2, 100)],
            Some(1500),
        );
        check(&[route("::/0", 1, 1)], None);
    }
}
