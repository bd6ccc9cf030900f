//! Planning an attachment: pure, so that every conflict is refused before any side effect.
//!
//! A plan holds all that attaching needs; its claims go into the commit of the intent, which
//! settles races that planning could not see.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    cni,
    error::NetworkError,
    ipam::Pool,
    ports::{self, Families, PortMapping},
    record::Network,
};
use crate::{id::SandboxId, store::Snapshot};

/// Whose network a sandbox uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Its own network namespace, attached to a network.
    #[default]
    Pod,
    /// The host's network namespace: no addresses and no ports of its own.
    Host,
    /// Its own network namespace with nothing in it but loopback.
    None,
}

/// What a sandbox asks of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxNetwork {
    /// Whose network.
    pub mode: Mode,
    /// Name of the network; empty means the default one.
    #[serde(default)]
    pub network: String,
    /// Ports to publish; ignored unless the mode is `Pod`.
    #[serde(default)]
    pub ports: Vec<PortMapping>,
    /// Wished addresses, at most one of a family; a family without one gets the next free.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Who holds its addresses, and goes on holding them without it; none is the sandbox itself.
    #[serde(default)]
    pub keeper: Option<String>,
}

/// Everything that attaching a sandbox needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPlan {
    /// Whose network; all else is empty unless it is `Pod`.
    pub mode: Mode,
    /// Name of the network.
    pub network: String,
    /// Name of the bridge in the host.
    pub bridge: String,
    /// The sandbox's addresses with the subnet's prefix length, IPv4 first.
    pub addresses: Vec<IpNet>,
    /// The default gateways, in the same order.
    pub gateways: Vec<IpAddr>,
    /// Hardware address of the sandbox's interface.
    pub mac: Option<Mac>,
    /// In bytes.
    pub mtu: u32,
    /// Ports to publish; none has host port 0.
    pub ports: Vec<PortMapping>,
    /// What the plugins of CNI do instead of us; all but mode and network is empty then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<Arc<cni::Plan>>,
}

impl NetworkPlan {
    /// What the commit of the intent has to claim.
    pub fn claims(&self) -> Vec<String> {
        let addresses = self
            .addresses
            .iter()
            .map(|net| address_claim(&self.network, net.addr()));
        addresses
            .chain(self.ports.iter().map(PortMapping::claim))
            .collect()
    }

    /// The plan of a sandbox without a network of ours.
    pub(super) fn bare(mode: Mode) -> Self {
        Self {
            mode,
            network: String::new(),
            bridge: String::new(),
            addresses: Vec::new(),
            gateways: Vec::new(),
            mac: None,
            mtu: 0,
            ports: Vec::new(),
            cni: None,
        }
    }

    /// The plan of a sandbox that plugins attach: addresses and ports are theirs to choose.
    pub(super) fn plugins(plan: cni::Plan) -> Self {
        Self {
            network: plan.list.name.clone(),
            cni: Some(Arc::new(plan)),
            ..Self::bare(Mode::Pod)
        }
    }

    /// What the commit of the intent has to keep, so that detaching needs nothing else.
    pub fn record(&self, sandbox: &SandboxId) -> Option<cni::Cached> {
        let plan = self.cni.as_ref()?;
        Some(cni::Cached::planned(sandbox, plan))
    }
}

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Derived from the address, so that neighbour caches stay right when an address is given to
    /// another sandbox. Locally administered, unicast.
    pub(super) fn of(address: IpAddr) -> Self {
        let [a, b, c, d] = match address {
            IpAddr::V4(ip) => ip.octets(),
            IpAddr::V6(ip) => {
                let [.., a, b, c, d] = ip.octets();
                [a, b, c, d]
            }
        };
        Self([0x02, 0x4c, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| u8::from_str_radix(part, 16).ok())
            .collect();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a hardware address"))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// Who holds what, as planning asks for it.
pub(super) trait Claims {
    fn holder(&self, key: &str) -> Option<String>;
    fn with_prefix(&self, prefix: &str) -> Vec<(String, String)>;
}

impl Claims for Snapshot {
    fn holder(&self, key: &str) -> Option<String> {
        self.claim(key)
    }

    fn with_prefix(&self, prefix: &str) -> Vec<(String, String)> {
        self.claims(prefix).collect()
    }
}

impl Claims for BTreeMap<String, String> {
    fn holder(&self, key: &str) -> Option<String> {
        self.get(key).cloned()
    }

    fn with_prefix(&self, prefix: &str) -> Vec<(String, String)> {
        self.range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, holder)| (key.clone(), holder.clone()))
            .collect()
    }
}

/// What planning has to know of the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostFacts {
    pub(super) ipv6: bool,
    pub(super) mtu: u32,
}

/// Plans the attachment of `sandbox`; refuses what is taken, naming the holder.
pub(super) fn plan(
    claims: &impl Claims,
    network: &Network,
    host: HostFacts,
    sandbox: &SandboxId,
    wish: &SandboxNetwork,
) -> Result<NetworkPlan, NetworkError> {
    if wish.mode != Mode::Pod {
        return Ok(NetworkPlan::bare(wish.mode));
    }
    let pool = Pool {
        v4: network.ipv4,
        v6: network.ipv6.filter(|_| host.ipv6),
    };
    let me = format!("sandbox/{sandbox}");
    let keeper = wish.keeper.as_ref().unwrap_or(&me);
    let addresses = addresses(
        claims,
        &network.name,
        pool,
        sandbox,
        keeper,
        &wish.addresses,
    )?;
    let families = Families {
        v4: addresses.iter().any(|net| net.addr().is_ipv4()),
        v6: addresses.iter().any(|net| net.addr().is_ipv6()),
    };
    Ok(NetworkPlan {
        mode: Mode::Pod,
        network: network.name.clone(),
        bridge: network.bridge.clone(),
        gateways: pool.gateways().map(|net| net.addr()).collect(),
        mac: addresses.first().map(|net| Mac::of(net.addr())),
        mtu: host.mtu,
        ports: ports::admit(claims, &me, &wish.ports, families)?,
        addresses,
        cni: None,
    })
}

fn addresses(
    claims: &impl Claims,
    network: &str,
    pool: Pool,
    sandbox: &SandboxId,
    me: &str,
    wished: &[IpAddr],
) -> Result<Vec<IpNet>, NetworkError> {
    let holder = |ip: IpAddr| {
        claims
            .holder(&address_claim(network, ip))
            .filter(|holder| holder != me)
    };
    let mut fixed = Vec::new();
    for &address in wished {
        let twice = fixed
            .iter()
            .any(|(_, other): &(u64, IpAddr)| other.is_ipv4() == address.is_ipv4());
        let number = pool.number(address).filter(|_| !twice);
        let Some(number) = number else {
            let network = network.to_owned();
            return Err(NetworkError::AddressInvalid { network, address });
        };
        if let Some(holder) = holder(address) {
            return Err(NetworkError::AddressTaken {
                network: network.to_owned(),
                address,
                holder,
            });
        }
        fixed.push((number, address));
    }
    // A family without a wished address follows the number of the other one if it can.
    let seed = match fixed.first() {
        Some((number, _)) => number - 2,
        None => seed(sandbox),
    };
    let merged = |number| -> Vec<IpNet> {
        pool.addresses(number)
            .map(|net| {
                let wish = fixed.iter().find(|(_, ip)| same_family(net, *ip));
                wish.map_or(net, |(_, ip)| {
                    IpNet::new(*ip, net.prefix_len()).expect("the prefix length is a subnet's")
                })
            })
            .collect()
    };
    pool.numbers_from(seed)
        .map(merged)
        .find(|nets| nets.iter().all(|net| holder(net.addr()).is_none()))
        .ok_or_else(|| NetworkError::PoolEmpty {
            network: network.to_owned(),
            limit: pool.size(),
        })
}

fn same_family(net: IpNet, ip: IpAddr) -> bool {
    net.addr().is_ipv4() == ip.is_ipv4()
}

/// The ids are random, so their first digits spread sandboxes over the pool.
fn seed(sandbox: &SandboxId) -> u64 {
    u64::from_str_radix(&sandbox.as_str()[..8], 16).expect("an id is hexadecimal")
}

pub(super) fn address_claim(network: &str, address: IpAddr) -> String {
    format!("{ADDRESS}{network}/{address}")
}

/// Whether a claim is for an address.
pub fn is_address(claim: &str) -> bool {
    claim.starts_with(ADDRESS)
}

const ADDRESS: &str = "address/";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::ports::Protocol;

    const HOST: HostFacts = HostFacts {
        ipv6: true,
        mtu: 1500,
    };

    fn network(v4: &str, v6: &str) -> Network {
        Network {
            name: "default".to_owned(),
            bridge: "ls-00000001".to_owned(),
            ipv4: v4.parse().ok(),
            ipv6: v6.parse().ok(),
        }
    }

    fn sandbox(first: u32) -> SandboxId {
        format!("{first:08x}{}", "0".repeat(56))
            .parse()
            .expect("an id")
    }

    fn wish(addresses: &[&str]) -> SandboxNetwork {
        SandboxNetwork {
            addresses: addresses
                .iter()
                .map(|ip| ip.parse().expect("an address"))
                .collect(),
            ..SandboxNetwork::default()
        }
    }

    fn claim_all(claims: &mut BTreeMap<String, String>, plan: &NetworkPlan, id: &SandboxId) {
        for key in plan.claims() {
            let before = claims.insert(key, format!("sandbox/{id}"));
            assert_eq!(before, None, "an address was given out twice");
        }
    }

    #[test]
    fn a_plan_has_both_families_and_claims_them() {
        let network = network("10.88.0.0/16", "fd00:1::/64");
        let ask = SandboxNetwork {
            ports: vec![PortMapping {
                host_ip: None,
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Tcp,
            }],
            ..wish(&[])
        };
        let plan = plan(&BTreeMap::new(), &network, HOST, &sandbox(1), &ask).expect("free");
        assert_eq!(
            plan.claims(),
            [
                "address/default/10.88.0.3",
                "address/default/fd00:1::3",
                "port/tcp/8080/*"
            ]
        );
        assert_eq!(plan.mac.expect("has one").to_string(), "02:4c:0a:58:00:03");
        assert_eq!(plan.addresses[0].to_string(), "10.88.0.3/16");
        assert_eq!(plan.gateways[1].to_string(), "fd00:1::1");
        let text = serde_json::to_string(&plan).expect("plans are data");
        assert_eq!(
            serde_json::from_str::<NetworkPlan>(&text).expect("same type"),
            plan
        );
    }

    #[test]
    fn each_address_is_given_out_once_and_then_the_pool_is_empty() {
        let network = network("10.88.0.0/28", "fd00:1::/64");
        let mut claims = BTreeMap::new();
        for first in 0..13 {
            let id = sandbox(first * 7);
            let plan = plan(&claims, &network, HOST, &id, &wish(&[])).expect("free");
            claim_all(&mut claims, &plan, &id);
        }
        let refused = plan(&claims, &network, HOST, &sandbox(99), &wish(&[]));
        assert!(
            matches!(refused, Err(NetworkError::PoolEmpty { limit: 13, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn families_follow_the_network_and_the_host() {
        let check = |v4: &str, v6: &str, ipv6: bool, expected: &[&str]| {
            let host = HostFacts { ipv6, ..HOST };
            let plan = plan(
                &BTreeMap::new(),
                &network(v4, v6),
                host,
                &sandbox(0),
                &wish(&[]),
            );
            let found = plan.map(|plan| {
                plan.addresses
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
            });
            assert_eq!(
                found.ok(),
                Some(expected.iter().map(ToString::to_string).collect())
            );
        };
        check(
            "10.88.0.0/16",
            "fd00::/64",
            true,
            &["10.88.0.2/16", "fd00::2/64"],
        );
        check("10.88.0.0/16", "fd00::/64", false, &["10.88.0.2/16"]);
        check("10.88.0.0/16", "", true, &["10.88.0.2/16"]);
        check("", "fd00::/64", true, &["fd00::2/64"]);
    }

    #[test]
    fn wished_addresses_are_given_or_refused() {
        let network = network("10.88.0.0/16", "fd00::/64");
        let claims = BTreeMap::from([
            (
                "address/default/10.88.0.9".to_owned(),
                "sandbox/x".to_owned(),
            ),
            ("address/default/fd00::7".to_owned(), "sandbox/x".to_owned()),
        ]);
        let check = |wished: &[&str], expected: Result<&[&str], &str>| {
            let found = plan(&claims, &network, HOST, &sandbox(0), &wish(wished));
            let found = match found {
                Ok(plan) => Ok(plan
                    .addresses
                    .iter()
                    .map(|net| net.addr().to_string())
                    .collect::<Vec<_>>()),
                Err(NetworkError::AddressTaken { holder, .. }) => Err(holder),
                Err(NetworkError::AddressInvalid { .. }) => Err("invalid".to_owned()),
                Err(other) => panic!("{other}"),
            };
            let expected = expected
                .map(|all| all.iter().map(ToString::to_string).collect())
                .map_err(ToOwned::to_owned);
            assert_eq!(found, expected, "{wished:?}");
        };
        check(&["10.88.0.5"], Ok(&["10.88.0.5", "fd00::5"]));
        check(&["10.88.0.7"], Ok(&["10.88.0.7", "fd00::8"]));
        // 2 + 2 * 65533: beyond the IPv4 pool, so counted around it.
        check(&["fd00::1:fffc"], Ok(&["10.88.0.2", "fd00::1:fffc"]));
        check(&["10.88.1.1", "fd00::2"], Ok(&["10.88.1.1", "fd00::2"]));
        check(&["10.88.0.9"], Err("sandbox/x"));
        check(&["10.88.0.1"], Err("invalid"));
        check(&["10.88.255.255"], Err("invalid"));
        check(&["10.99.0.5"], Err("invalid"));
        check(&["10.88.0.5", "10.88.0.6"], Err("invalid"));
    }

    #[test]
    fn host_and_none_claim_nothing() {
        let network = network("10.88.0.0/16", "");
        for mode in [Mode::Host, Mode::None] {
            let ask = SandboxNetwork { mode, ..wish(&[]) };
            let plan = plan(&BTreeMap::new(), &network, HOST, &sandbox(0), &ask).expect("plans");
            assert_eq!(plan.claims(), Vec::<String>::new());
        }
    }
}
