//! Addresses of a subnet by number: which can be given out, and the next free one.
//!
//! Number 0 is the subnet itself, 1 the gateway (the bridge), and in IPv4 the last one the
//! broadcast address. A sandbox gets the same number in both families where it can. The search
//! begins at a place that the sandbox's id decides, so in a pool that is not nearly full it ends
//! at once, and an address that has just become free is not the next to be given out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Addresses that are numbered in an IPv6 subnet, however large it is.
const V6_POOL_BITS: u8 = 20;

/// The subnets of a network; at least one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pool {
    pub(super) v4: Option<Ipv4Net>,
    pub(super) v6: Option<Ipv6Net>,
}

impl Pool {
    /// The numbers that can be given out are 2 to this, inclusive.
    pub(super) fn last(self) -> u64 {
        let v4 = self
            .v4
            .map(|net| (1_u64 << (32 - net.prefix_len())).saturating_sub(2));
        let v6 = self
            .v6
            .map(|net| (1_u64 << (128 - net.prefix_len()).min(V6_POOL_BITS)) - 1);
        match (v4, v6) {
            (Some(v4), Some(v6)) => v4.min(v6),
            (one, other) => one.or(other).unwrap_or(0),
        }
    }

    /// How many sandboxes can have addresses.
    pub(super) fn size(self) -> u64 {
        self.last().saturating_sub(1)
    }

    /// The addresses with this number, IPv4 first.
    pub(super) fn addresses(self, number: u64) -> impl Iterator<Item = IpNet> {
        let v4 = self.v4.map(|net| IpNet::V4(nth4(net, number)));
        let v6 = self.v6.map(|net| IpNet::V6(nth6(net, number)));
        v4.into_iter().chain(v6)
    }

    /// The bridge's addresses, IPv4 first.
    pub(super) fn gateways(self) -> impl Iterator<Item = IpNet> {
        self.addresses(1)
    }

    /// The number of an address, if it can be given out.
    pub(super) fn number(self, address: IpAddr) -> Option<u64> {
        let number = match (address, self.v4, self.v6) {
            (IpAddr::V4(ip), Some(net), _) if net.contains(&ip) => {
                u64::from(u32::from(ip) - u32::from(net.network()))
            }
            (IpAddr::V6(ip), _, Some(net)) if net.contains(&ip) => {
                u64::try_from(u128::from(ip) - u128::from(net.network())).ok()?
            }
            _ => return None,
        };
        // A wished IPv6 address may lie beyond what the search gives out.
        let last = match address {
            IpAddr::V4(_) => Self { v6: None, ..self }.last(),
            IpAddr::V6(_) => u64::MAX,
        };
        (2..=last).contains(&number).then_some(number)
    }

    /// All numbers once, beginning at the place that `seed` decides.
    pub(super) fn numbers_from(self, seed: u64) -> impl Iterator<Item = u64> {
        let size = self.size();
        let start = if size == 0 { 0 } else { seed % size };
        (0..size).map(move |step| 2 + (start + step) % size)
    }
}

fn nth4(net: Ipv4Net, number: u64) -> Ipv4Net {
    let number = u32::try_from(number).expect("numbers of IPv4 subnets fit");
    let ip = Ipv4Addr::from(u32::from(net.network()).wrapping_add(number));
    Ipv4Net::new(ip, net.prefix_len()).expect("the prefix length is a subnet's")
}

fn nth6(net: Ipv6Net, number: u64) -> Ipv6Net {
    let ip = Ipv6Addr::from(u128::from(net.network()).wrapping_add(u128::from(number)));
    Ipv6Net::new(ip, net.prefix_len()).expect("the prefix length is a subnet's")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(v4: &str, v6: &str) -> Pool {
        Pool {
            v4: v4.parse().ok(),
            v6: v6.parse().ok(),
        }
    }

    #[test]
    fn gateway_network_and_broadcast_are_never_given_out() {
        let check = |v4: &str, v6: &str, size: u64| {
            let pool = pool(v4, v6);
            assert_eq!(pool.size(), size, "{pool:?}");
            let all: std::collections::BTreeSet<_> = pool.numbers_from(77).collect();
            assert_eq!(all.len() as u64, size, "{pool:?}");
            assert!(!all.contains(&0) && !all.contains(&1));
        };
        check("10.88.0.0/16", "", 65_533);
        check("10.88.0.0/30", "", 1);
        check("10.88.0.0/29", "fd00::/64", 5);
        check("", "fd00::/64", (1 << 20) - 2);
        check("", "fd00::/125", 6);
    }

    #[test]
    fn numbers_and_addresses_agree() {
        let pool = pool("10.88.0.0/29", "fd00::/64");
        let texts =
            |number| -> Vec<String> { pool.addresses(number).map(|net| net.to_string()).collect() };
        assert_eq!(texts(1), ["10.88.0.1/29", "fd00::1/64"]);
        assert_eq!(texts(6), ["10.88.0.6/29", "fd00::6/64"]);
        let check = |ip: &str, number: Option<u64>| {
            assert_eq!(pool.number(ip.parse().expect("an address")), number, "{ip}");
        };
        check("10.88.0.0", None);
        check("10.88.0.1", None);
        check("10.88.0.2", Some(2));
        check("10.88.0.6", Some(6));
        check("10.88.0.7", None);
        check("10.88.0.8", None);
        check("fd00::1", None);
        check("fd00::2", Some(2));
        check("fd00:0:0:1::2", None);
    }
}
