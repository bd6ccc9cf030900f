//! Host ports: what a mapping means, its claim, and what it is in conflict with.
//!
//! A claim's key is `port/<protocol>/<port>/<address>`, where the address is `*` for every
//! address of the host, `0.0.0.0` or `::` for every one of a family, or one address. The store
//! keeps equal keys apart; that `*` also excludes `192.0.2.1` is decided here.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::{error::NetworkError, plan::Claims};

/// Transport protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The number in the IP header.
    ///
    /// Source: IANA, Assigned Internet Protocol Numbers.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    pub(super) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.number() == number)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// A port of the host that leads to a port of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Address of the host; none means every address, `0.0.0.0` and `::` every one of a family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// Port of the host; 0 means that nothing is published.
    pub host_port: u16,
    /// Port inside the sandbox, from 1.
    pub container_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

impl PortMapping {
    /// Where on the host it listens.
    pub fn host_address(&self) -> HostAddress {
        HostAddress::from(self.host_ip)
    }

    pub(super) fn claim(&self) -> String {
        format!(
            "port/{}/{}/{}",
            self.protocol,
            self.host_port,
            self.host_address()
        )
    }
}

/// The addresses of the host on which a port is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostAddress {
    /// Every address.
    Any,
    /// Every IPv4 address.
    AnyV4,
    /// Every IPv6 address.
    AnyV6,
    /// This one.
    One(IpAddr),
}

impl HostAddress {
    /// Whether a packet could be meant for both.
    pub fn overlaps(self, other: Self) -> bool {
        match (self, other) {
            (Self::Any, _) | (_, Self::Any) => true,
            (Self::One(one), Self::One(other)) => one == other,
            _ => self.has_v4() == other.has_v4(),
        }
    }

    /// Whether IPv4 packets are meant.
    pub fn has_v4(self) -> bool {
        match self {
            Self::Any | Self::AnyV4 => true,
            Self::AnyV6 => false,
            Self::One(ip) => ip.is_ipv4(),
        }
    }

    /// Whether IPv6 packets are meant.
    pub fn has_v6(self) -> bool {
        match self {
            Self::Any | Self::AnyV6 => true,
            Self::AnyV4 => false,
            Self::One(ip) => ip.is_ipv6(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "*" => Some(Self::Any),
            ip => ip.parse().ok().map(|ip| Self::from(Some(ip))),
        }
    }
}

impl From<Option<IpAddr>> for HostAddress {
    fn from(host_ip: Option<IpAddr>) -> Self {
        match host_ip.map(|ip| ip.to_canonical()) {
            None => Self::Any,
            Some(IpAddr::V4(ip)) if ip.is_unspecified() => Self::AnyV4,
            Some(IpAddr::V6(ip)) if ip.is_unspecified() => Self::AnyV6,
            Some(ip) => Self::One(ip),
        }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::AnyV4 => f.write_str("0.0.0.0"),
            Self::AnyV6 => f.write_str("::"),
            Self::One(ip) => ip.fmt(f),
        }
    }
}

/// The families that a sandbox will have addresses of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Families {
    pub(super) v4: bool,
    pub(super) v6: bool,
}

/// The ports to publish, or the first reason why that can't be.
pub(super) fn admit(
    claims: &impl Claims,
    me: &str,
    wished: &[PortMapping],
    families: Families,
) -> Result<Vec<PortMapping>, NetworkError> {
    let mut admitted: Vec<PortMapping> = Vec::new();
    for (index, wish) in wished.iter().enumerate() {
        if wish.host_port == 0 {
            continue;
        }
        let port = PortMapping {
            host_ip: wish.host_ip.map(|ip| ip.to_canonical()),
            ..*wish
        };
        valid(&port, families).map_err(|reason| NetworkError::PortInvalid { index, reason })?;
        if let Some(holder) = holder(claims, me, &admitted, &port) {
            return Err(NetworkError::PortTaken {
                port: port.host_port,
                protocol: port.protocol,
                address: port.host_address(),
                holder,
            });
        }
        admitted.push(port);
    }
    Ok(admitted)
}

fn valid(port: &PortMapping, families: Families) -> Result<(), &'static str> {
    let address = port.host_address();
    if port.container_port == 0 {
        return Err("container_port must be between 1 and 65535");
    }
    if let HostAddress::One(ip) = address {
        if ip.is_ipv6() && ip.is_loopback() {
            return Err(
                "host_ip ::1 can't be translated by the kernel; use 127.0.0.1 or leave it out",
            );
        }
        if ip.is_multicast() || ip == IpAddr::from([255; 4]) {
            return Err("host_ip must be an address of the host");
        }
    }
    if !(address.has_v4() && families.v4 || address.has_v6() && families.v6) {
        return Err("the network has no address of the family of host_ip");
    }
    Ok(())
}

fn holder(
    claims: &impl Claims,
    me: &str,
    admitted: &[PortMapping],
    port: &PortMapping,
) -> Option<String> {
    let address = port.host_address();
    let twice = admitted.iter().any(|other| {
        (other.protocol, other.host_port) == (port.protocol, port.host_port)
            && other.host_address().overlaps(address)
    });
    if twice {
        return Some("this request".to_owned());
    }
    let prefix = format!("port/{}/{}/", port.protocol, port.host_port);
    claims
        .with_prefix(&prefix)
        .into_iter()
        .filter(|(_, holder)| holder != me)
        .find(|(key, _)| {
            HostAddress::parse(&key[prefix.len()..]).is_none_or(|taken| taken.overlaps(address))
        })
        .map(|(_, holder)| holder)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const BOTH: Families = Families { v4: true, v6: true };

    fn tcp(host_ip: &str, host_port: u16) -> PortMapping {
        PortMapping {
            host_ip: (host_ip != "*").then(|| host_ip.parse().expect("an address")),
            host_port,
            container_port: 80,
            protocol: Protocol::Tcp,
        }
    }

    fn taken(keys: &[&str]) -> BTreeMap<String, String> {
        keys.iter()
            .map(|key| ((*key).to_owned(), "sandbox/other".to_owned()))
            .collect()
    }

    #[test]
    fn overlap_is_decided_by_address_and_family() {
        let any = ["*", "0.0.0.0", "::", "192.0.2.1", "2001:db8::1"];
        let table = [
            [true, true, true, true, true],
            [true, true, false, true, false],
            [true, false, true, false, true],
            [true, true, false, true, false],
            [true, false, true, false, true],
        ];
        for (row, one) in any.iter().enumerate() {
            for (column, other) in any.iter().enumerate() {
                let (one, other) = (tcp(one, 1).host_address(), tcp(other, 1).host_address());
                assert_eq!(one.overlaps(other), table[row][column], "{one} {other}");
            }
        }
        assert!(
            !tcp("192.0.2.1", 1)
                .host_address()
                .overlaps(tcp("192.0.2.2", 1).host_address())
        );
    }

    #[test]
    fn conflicts_name_the_holder() {
        let check = |claims: &[&str], wished: &[PortMapping], expected: Result<usize, &str>| {
            let found = admit(&taken(claims), "sandbox/me", wished, BOTH);
            let found = match &found {
                Ok(ports) => Ok(ports.len()),
                Err(NetworkError::PortTaken { holder, .. }) => Err(holder.as_str()),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(found, expected, "{claims:?} {wished:?}");
        };
        check(&[], &[], Ok(0));
        check(&[], &[tcp("*", 80)], Ok(1));
        check(&["port/tcp/8/*"], &[tcp("*", 80)], Ok(1));
        check(&["port/tcp/80/*"], &[tcp("*", 80)], Err("sandbox/other"));
        check(
            &["port/tcp/80/*"],
            &[tcp("127.0.0.1", 80)],
            Err("sandbox/other"),
        );
        check(
            &["port/tcp/80/127.0.0.1"],
            &[tcp("*", 80)],
            Err("sandbox/other"),
        );
        check(&["port/tcp/80/127.0.0.1"], &[tcp("127.0.0.2", 80)], Ok(1));
        check(&["port/tcp/80/::"], &[tcp("0.0.0.0", 80)], Ok(1));
        check(&["port/udp/80/*"], &[tcp("*", 80)], Ok(1));
        check(
            &["port/tcp/80/192.0.2.1"],
            &[tcp("::ffff:192.0.2.1", 80)],
            Err("sandbox/other"),
        );
        check(
            &[],
            &[tcp("*", 80), tcp("192.0.2.1", 80)],
            Err("this request"),
        );
        check(&[], &[tcp("192.0.2.2", 80), tcp("192.0.2.1", 80)], Ok(2));
        check(&["port/tcp/0/*"], &[tcp("*", 0), tcp("*", 0)], Ok(0));
    }

    #[test]
    fn own_claims_are_no_conflict() {
        let claims = BTreeMap::from([("port/tcp/80/*".to_owned(), "sandbox/me".to_owned())]);
        assert!(admit(&claims, "sandbox/me", &[tcp("*", 80)], BOTH).is_ok());
    }

    #[test]
    fn what_can_not_be_translated_is_refused() {
        let check = |wish: PortMapping, families: Families, valid: bool| {
            let found = admit(&taken(&[]), "sandbox/me", &[wish], families);
            assert_eq!(found.is_ok(), valid, "{wish:?} {families:?} {found:?}");
        };
        let v4 = Families {
            v4: true,
            v6: false,
        };
        check(tcp("::1", 80), BOTH, false);
        check(tcp("127.0.0.1", 80), BOTH, true);
        check(tcp("224.0.0.1", 80), BOTH, false);
        check(tcp("255.255.255.255", 80), BOTH, false);
        check(tcp("2001:db8::1", 80), v4, false);
        check(tcp("::", 80), v4, false);
        check(tcp("*", 80), v4, true);
        check(
            PortMapping {
                container_port: 0,
                ..tcp("*", 80)
            },
            BOTH,
            false,
        );
    }
}
