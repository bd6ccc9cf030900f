//! The chains and rules, as data.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use netlink_bindings::nftables::{MetaKeys, PayloadBase, VerdictCode};

use super::{RuleNetwork, family, map::Map};

pub(super) struct Chain {
    pub(super) name: &'static str,
    /// Type, hook, priority.
    pub(super) base: Option<(&'static str, u32, i32)>,
}

pub(super) fn chains() -> [Chain; 6] {
    let base = |name, kind, hook, priority| Chain {
        name,
        base: Some((kind, hook, priority)),
    };
    let plain = |name| Chain { name, base: None };
    [
        plain("publish"),
        plain("leave"),
        base("guard", "filter", 0, -300),
        base("prerouting", "nat", 0, -100),
        base("output", "nat", 3, -100),
        base("postrouting", "nat", 4, 100),
    ]
}

/// `RTN_LOCAL`: an address of the host.
const LOCAL: u32 = 2;
/// `IPS_DST_NAT`: the connection's destination was translated.
const DST_NAT: u32 = 1 << 5;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`: two flows at the same moment don't get the same port.
pub(super) const RANDOM_FULLY: u32 = 1 << 4;
/// First of the 32-bit registers; four of them are one 128-bit register.
pub(super) const REGISTER: u32 = 8;
/// Where a map's value goes: behind the longest key (6 registers).
pub(super) const VALUE: u32 = REGISTER + 6;

/// One expression of a rule, as far as ours need them.
pub(super) enum Expr {
    /// Loads a meta key.
    Meta(MetaKeys, u32),
    /// Loads `len` bytes of the packet: base, offset, len, register.
    Payload(PayloadBase, u32, u32, u32),
    /// Compares the first register with these bytes.
    Is(Vec<u8>),
    IsNot(Vec<u8>),
    /// Masks the first register.
    Mask(Vec<u8>),
    /// Loads the kind of the destination address.
    DestinationType,
    /// Loads the connection's status bits.
    ConnectionStatus,
    /// Replaces a key in the first registers by the map's value, or ends the rule.
    Lookup(Map),
    /// Translates the destination to the map's value.
    Translate(Map),
    Masquerade,
    Verdict(VerdictCode, Option<&'static str>),
}

use Expr::{
    ConnectionStatus, DestinationType, Is, IsNot, Lookup, Mask, Masquerade, Meta, Payload,
    Translate, Verdict,
};

pub(super) type Rule = Vec<Expr>;

pub(super) fn rules(networks: &[RuleNetwork]) -> Vec<(&'static str, Rule)> {
    let mut rules: Vec<(&'static str, Rule)> = Vec::new();
    for network in networks {
        // Only what was routed to 127.0.0.0/8 on purpose may come from a bridge that has
        // route_localnet; see CVE-2020-8558.
        for offset in [DESTINATION4, SOURCE4] {
            let mut rule = from_link(&network.bridge);
            rule.extend(in_v4(offset, loopback4()));
            rule.push(Verdict(VerdictCode::Drop, None));
            rules.push(("guard", rule));
        }
    }
    for chain in ["prerouting", "output"] {
        rules.push((
            chain,
            vec![
                DestinationType,
                Is(LOCAL.to_ne_bytes().to_vec()),
                Verdict(VerdictCode::Goto, Some("publish")),
            ],
        ));
    }
    // A packet to ::1 could be translated, but its answer could not.
    let mut rule = in_v6(DESTINATION6, Ipv6Net::from(Ipv6Addr::LOCALHOST));
    rule.push(Verdict(VerdictCode::Return, None));
    rules.push(("publish", rule));
    rules.extend(Map::ALL.map(|map| ("publish", translate(map))));
    for network in networks {
        rules.extend(postrouting(network));
    }
    for network in networks {
        let here = network.ipv4.map(|net| in_v4(DESTINATION4, net));
        let here6 = network.ipv6.map(|net| in_v6(DESTINATION6, net));
        for mut rule in here.into_iter().chain(here6) {
            rule.push(Verdict(VerdictCode::Return, None));
            rules.push(("leave", rule));
        }
    }
    for mut rule in [
        in_v4(DESTINATION4, multicast4()),
        in_v6(DESTINATION6, multicast6()),
    ] {
        rule.push(Verdict(VerdictCode::Return, None));
        rules.push(("leave", rule));
    }
    rules.push(("leave", vec![Masquerade]));
    rules
}

fn postrouting(network: &RuleNetwork) -> Vec<(&'static str, Rule)> {
    let mut rules = Vec::new();
    let translated = || {
        [
            ConnectionStatus,
            Mask(DST_NAT.to_ne_bytes().to_vec()),
            IsNot(vec![0; 4]),
        ]
    };
    if let Some(net) = network.ipv4 {
        let mut rule = in_v4(SOURCE4, net);
        rule.extend(in_v4(DESTINATION4, net));
        rule.extend(translated());
        rule.push(Masquerade);
        rules.push(("postrouting", rule));

        let mut rule = to_link(&network.bridge);
        rule.extend(in_v4(SOURCE4, loopback4()));
        rule.push(Masquerade);
        rules.push(("postrouting", rule));

        let mut rule = in_v4(SOURCE4, net);
        rule.push(Verdict(VerdictCode::Goto, Some("leave")));
        rules.push(("postrouting", rule));
    }
    if let Some(net) = network.ipv6 {
        let mut rule = in_v6(SOURCE6, net);
        rule.extend(in_v6(DESTINATION6, net));
        rule.extend(translated());
        rule.push(Masquerade);
        rules.push(("postrouting", rule));

        let mut rule = in_v6(SOURCE6, net);
        rule.push(Verdict(VerdictCode::Goto, Some("leave")));
        rules.push(("postrouting", rule));
    }
    rules
}

fn translate(map: Map) -> Rule {
    let (nfproto, daddr) = if map.is_v4() {
        (family::IPV4, DESTINATION4)
    } else {
        (family::IPV6, DESTINATION6)
    };
    let length = u32::try_from(map.address_len()).expect("4 or 16");
    let mut rule = vec![
        Meta(MetaKeys::Nfproto, REGISTER),
        Is(vec![nfproto]),
        Meta(MetaKeys::L4Proto, REGISTER),
    ];
    let mut next = REGISTER + 1;
    if !map.is_any() {
        rule.push(Payload(PayloadBase::NetworkHeader, daddr, length, next));
        next += length / 4;
    }
    // TCP, UDP and SCTP all have the destination port there.
    rule.push(Payload(PayloadBase::TransportHeader, 2, 2, next));
    rule.extend([Lookup(map), Translate(map)]);
    rule
}

/// Offsets of the addresses in the IP headers.
const SOURCE4: u32 = 12;
const DESTINATION4: u32 = 16;
const SOURCE6: u32 = 8;
const DESTINATION6: u32 = 24;

fn loopback4() -> Ipv4Net {
    Ipv4Net::new(Ipv4Addr::new(127, 0, 0, 0), 8).expect("8 is a prefix length")
}

fn multicast4() -> Ipv4Net {
    Ipv4Net::new(Ipv4Addr::new(224, 0, 0, 0), 4).expect("4 is a prefix length")
}

fn multicast6() -> Ipv6Net {
    Ipv6Net::new(Ipv6Addr::from(0xff_u128 << 120), 8).expect("8 is a prefix length")
}

fn in_v4(offset: u32, net: Ipv4Net) -> Rule {
    vec![
        Meta(MetaKeys::Nfproto, REGISTER),
        Is(vec![family::IPV4]),
        Payload(PayloadBase::NetworkHeader, offset, 4, REGISTER),
        Mask(net.netmask().octets().to_vec()),
        Is(net.network().octets().to_vec()),
    ]
}

fn in_v6(offset: u32, net: Ipv6Net) -> Rule {
    vec![
        Meta(MetaKeys::Nfproto, REGISTER),
        Is(vec![family::IPV6]),
        Payload(PayloadBase::NetworkHeader, offset, 16, REGISTER),
        Mask(net.netmask().octets().to_vec()),
        Is(net.network().octets().to_vec()),
    ]
}

fn from_link(name: &str) -> Rule {
    vec![Meta(MetaKeys::Iifname, REGISTER), Is(link_name(name))]
}

fn to_link(name: &str) -> Rule {
    vec![Meta(MetaKeys::Oifname, REGISTER), Is(link_name(name))]
}

fn link_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}
