//! The one door to nf_tables and connection tracking: the table `inet longshore-<instance>`.
//!
//! ```text
//! map publish4      { protocol . port            : address . port }   one of each per family:
//! map publish4_at   { protocol . address . port  : address . port }   any or one host address
//!
//! guard         raw         what claims to be 127.0.0.0/8 but comes from a bridge of ours: drop
//! prerouting    dstnat      to an address of the host: goto publish
//! output        dstnat      the same, for the host's own packets (127.0.0.1 too, but not ::1)
//! publish                   look the packet up in the maps, translate
//! postrouting   srcnat      leaving a pool for the world: masquerade; translated and staying in
//!                           the pool (hairpin), or from 127.0.0.0/8 to a bridge: masquerade too
//! ```
//!
//! Publishing a port is adding a map element; its comment is the sandbox's id, so withdrawing
//! needs no memory. Every change is one transaction. The table stays when the agent ends, and is
//! replaced as a whole, without a gap, when it starts.
//!
//! An accept here can't overrule a drop in the FORWARD chain of somebody else's table; those are
//! found by [`Nft::forward_drops`] and reported.
//!
//! Source: nft(8); Linux, include/uapi/linux/netfilter/{nf_tables,nfnetlink_conntrack}.h.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Mutex, MutexGuard, PoisonError},
};

use ipnet::{Ipv4Net, Ipv6Net};
use netlink_bindings::{
    conntrack,
    nftables::{
        Chained, ChainedFinal, CmpOps, CtKeys, IterableSetelemAttrs, MetaKeys, Nfgenmsg,
        PayloadBase, PushExprAttrs, PushExprListAttrs, PushRuleAttrs, Request, SetFlags,
        VerdictCode,
    },
    traits::{NetlinkChained, NetlinkRequest, Protocol as NetlinkProtocol, Pusher},
    utils::{RequestBuf, finalize_nested_header, push_header, push_nested_header},
};
use netlink_socket2::NetlinkSocket;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::{io::Errno, net::sockopt};

use super::{
    error::NetworkError,
    ports::{HostAddress, Protocol},
};
use crate::id::{InstanceId, SandboxId};

/// A host port that leads into a sandbox, as the kernel has it: one element of a map.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Published {
    /// Whose port it is.
    pub sandbox: SandboxId,
    /// Transport protocol.
    pub protocol: Protocol,
    /// `AnyV4`, `AnyV6`, or one address; never `Any`, which is two elements.
    pub host: HostAddress,
    /// Port of the host.
    pub host_port: u16,
    /// Address of the sandbox.
    pub address: IpAddr,
    /// Port of the sandbox.
    pub port: u16,
}

/// What the rules have to know of a network.
#[derive(Clone, Debug)]
pub(super) struct RuleNetwork {
    pub(super) bridge: String,
    pub(super) ipv4: Option<Ipv4Net>,
    pub(super) ipv6: Option<Ipv6Net>,
}

/// A base chain of another table that drops what it does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ForeignChain {
    pub(super) family: &'static str,
    pub(super) table: String,
    pub(super) chain: String,
}

/// Elements of one message: an attribute can't be longer than 64 KiB, an element takes 140 bytes.
const ELEMENTS_PER_MESSAGE: usize = 256;

/// `NFPROTO_*`, the families of nf_tables.
mod family {
    pub(super) const UNSPEC: u8 = 0;
    pub(super) const INET: u8 = 1;
    pub(super) const IPV4: u8 = 2;
    pub(super) const IPV6: u8 = 10;
}

/// The agent's own table.
pub(super) struct Nft {
    table: String,
    /// A dump would miss elements if another thread of ours changed a map meanwhile.
    one_at_a_time: Mutex<()>,
}

impl Nft {
    pub(super) fn new(instance: &InstanceId) -> Self {
        Self {
            table: format!("longshore-{instance}"),
            one_at_a_time: Mutex::new(()),
        }
    }

    /// Replaces the whole table in one transaction; forgets the flows of ports that are gone.
    pub(super) fn rebuild(
        &self,
        networks: &[RuleNetwork],
        published: &[Published],
    ) -> Result<(), NetworkError> {
        let _guard = self.lock();
        let gone: Vec<_> = self
            .dump()?
            .into_iter()
            .filter(|old| !published.contains(old))
            .collect();
        let mut batch = Batch::new(&self.table);
        batch.replace_table();
        for map in Map::ALL {
            batch.new_map(map);
        }
        for chain in chains() {
            batch.new_chain(&chain);
        }
        for (chain, rule) in rules(networks) {
            batch.new_rule(chain, &rule);
        }
        batch.new_elements(published);
        batch.commit("rebuild").map_err(missing_module)?;
        forget_flows(&gone)
    }

    /// Adds elements; those that exist already are fine.
    pub(super) fn publish(&self, published: &[Published]) -> Result<(), NetworkError> {
        if published.is_empty() {
            return Ok(());
        }
        let _guard = self.lock();
        let mut batch = Batch::new(&self.table);
        batch.new_elements(published);
        batch.commit("publish")?;
        // A client that sent datagrams before keeps its untranslated flow alive by sending on.
        forget_untranslated(published)
    }

    /// Removes all elements of a sandbox and their flows; none is fine.
    pub(super) fn withdraw(&self, sandbox: &SandboxId) -> Result<Vec<Published>, NetworkError> {
        let _guard = self.lock();
        let mut gone = self.dump()?;
        gone.retain(|element| element.sandbox == *sandbox);
        if !gone.is_empty() {
            let mut batch = Batch::new(&self.table);
            batch.delete_elements(&gone);
            batch.commit("withdraw")?;
            forget_flows(&gone)?;
        }
        Ok(gone)
    }

    /// All elements.
    pub(super) fn published(&self) -> Result<Vec<Published>, NetworkError> {
        let _guard = self.lock();
        self.dump()
    }

    /// Removes the table; not there is fine.
    pub(super) fn remove(&self) -> Result<(), NetworkError> {
        let _guard = self.lock();
        let mut batch = Batch::new(&self.table);
        batch.delete_table();
        batch.commit("remove")
    }

    /// Chains of other tables in the forward hook whose policy is to drop.
    pub(super) fn forward_drops(&self) -> Result<Vec<ForeignChain>, NetworkError> {
        const FORWARD: u32 = 2;
        let failed = |error: io::Error| NetworkError::kernel("NFT_MSG_GETCHAIN", "all", error);
        let request = Request::new().op_getchain_dump(&header(family::UNSPEC));
        let mut socket = NetlinkSocket::new();
        let mut replies = socket.request(&request).map_err(failed)?;
        let mut found = Vec::new();
        while let Some(reply) = replies.recv() {
            let (header, chain) = reply.map_err(|error| failed(error.into()))?;
            let forward = chain.get_hook().and_then(|hook| hook.get_num()).ok() == Some(FORWARD);
            let drops = chain.get_policy().ok() == Some(VerdictCode::Drop as u32);
            let (Ok(table), Ok(name)) = (chain.get_table(), chain.get_name()) else {
                continue;
            };
            let table = table.to_string_lossy().into_owned();
            if forward && drops && table != self.table {
                found.push(ForeignChain {
                    family: match header.nfgen_family {
                        family::IPV4 => "ip",
                        family::IPV6 => "ip6",
                        family::INET => "inet",
                        _ => continue,
                    },
                    table,
                    chain: name.to_string_lossy().into_owned(),
                });
            }
        }
        Ok(found)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.one_at_a_time
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn dump(&self) -> Result<Vec<Published>, NetworkError> {
        let mut found = Vec::new();
        let mut socket = NetlinkSocket::new();
        for map in Map::ALL {
            let failed =
                |error: io::Error| NetworkError::kernel("NFT_MSG_GETSETELEM", map.name(), error);
            let mut request = Request::new().op_getsetelem_dump(&header(family::INET));
            request
                .encode()
                .push_table_bytes(self.table.as_bytes())
                .push_set_bytes(map.name().as_bytes());
            let mut replies = socket.request(&request).map_err(failed)?;
            while let Some(reply) = replies.recv() {
                let (_, list) = match reply {
                    Ok(reply) => reply,
                    // No table yet.
                    Err(error) if is(error.as_io_error(), Errno::NOENT) => break,
                    Err(error) => return Err(failed(error.into())),
                };
                if let Ok(elements) = list.get_elements() {
                    found.extend(elements.get_elem().filter_map(|one| map.decode(&one)));
                }
            }
        }
        Ok(found)
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn missing_module(error: NetworkError) -> NetworkError {
    let missing = [
        Errno::NOENT,
        Errno::OPNOTSUPP,
        Errno::AFNOSUPPORT,
        Errno::PROTONOSUPPORT,
    ];
    match error.errno() {
        Some(errno) if missing.iter().any(|one| one.raw_os_error() == errno) => {
            NetworkError::Missing {
                feature: "nf_tables with inet nat",
                hint: "load the modules nf_tables, nft_chain_nat, nft_nat, nft_masq, nft_fib_inet \
                       and nft_ct",
            }
        }
        _ => error,
    }
}

fn header(family: u8) -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.nfgen_family = family;
    header
}

/// The maps: per family, for any host address and for one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Map {
    Any4,
    At4,
    Any6,
    At6,
}

impl Map {
    const ALL: [Self; 4] = [Self::At4, Self::Any4, Self::At6, Self::Any6];

    fn of(element: &Published) -> Self {
        match (element.host, element.address) {
            (HostAddress::One(_), IpAddr::V4(_)) => Self::At4,
            (_, IpAddr::V4(_)) => Self::Any4,
            (HostAddress::One(_), IpAddr::V6(_)) => Self::At6,
            (_, IpAddr::V6(_)) => Self::Any6,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Any4 => "publish4",
            Self::At4 => "publish4_at",
            Self::Any6 => "publish6",
            Self::At6 => "publish6_at",
        }
    }

    fn is_v4(self) -> bool {
        matches!(self, Self::Any4 | Self::At4)
    }

    fn is_any(self) -> bool {
        matches!(self, Self::Any4 | Self::Any6)
    }

    fn address_len(self) -> usize {
        if self.is_v4() { 4 } else { 16 }
    }

    fn key_len(self) -> usize {
        8 + if self.is_any() { 0 } else { self.address_len() }
    }

    /// The types that nft(8) shows; the kernel only keeps them.
    fn types(self) -> (u32, u32) {
        const PROTOCOL: u32 = 12;
        const PORT: u32 = 13;
        let address = if self.is_v4() { 7 } else { 8 };
        let concat = |types: &[u32]| types.iter().fold(0, |all, one| all << 6 | one);
        let key = if self.is_any() {
            concat(&[PROTOCOL, PORT])
        } else {
            concat(&[PROTOCOL, address, PORT])
        };
        (key, concat(&[address, PORT]))
    }

    fn decode(self, element: &IterableSetelemAttrs<'_>) -> Option<Published> {
        let key = element.get_key().ok()?.get_value().ok()?;
        let data = element.get_data().ok()?.get_value().ok()?;
        let length = self.address_len();
        if key.len() < self.key_len() || data.len() < length + 2 {
            return None;
        }
        let port = |at: &[u8]| u16::from_be_bytes([at[0], at[1]]);
        let host = match self {
            Self::Any4 => HostAddress::AnyV4,
            Self::Any6 => HostAddress::AnyV6,
            Self::At4 | Self::At6 => HostAddress::One(ip(&key[4..4 + length])?),
        };
        Some(Published {
            sandbox: comment(element.get_userdata().ok()?)?.parse().ok()?,
            protocol: Protocol::from_number(key[0])?,
            host,
            host_port: port(&key[self.key_len() - 4..]),
            address: ip(&data[..length])?,
            port: port(&data[length..]),
        })
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

impl Published {
    /// Each part is padded to 32 bits, as registers are.
    fn key(&self) -> Vec<u8> {
        let mut key = vec![self.protocol.number(), 0, 0, 0];
        if let HostAddress::One(host) = self.host {
            key.extend(octets(host));
        }
        key.extend(self.host_port.to_be_bytes());
        key.extend([0, 0]);
        key
    }

    fn data(&self) -> Vec<u8> {
        let mut data = octets(self.address);
        data.extend(self.port.to_be_bytes());
        data.extend([0, 0]);
        data
    }

    /// User data as nft(8) reads it: type 0 (comment), length, text with its zero.
    fn userdata(&self) -> Vec<u8> {
        let text = self.sandbox.as_str().as_bytes();
        let length = u8::try_from(text.len() + 1).expect("an id has 64 digits");
        [&[0, length], text, &[0]].concat()
    }
}

fn comment(userdata: &[u8]) -> Option<&str> {
    let [0, length, text @ ..] = userdata else {
        return None;
    };
    let text = text.get(..usize::from(*length).checked_sub(1)?)?;
    std::str::from_utf8(text).ok()
}

struct Chain {
    name: &'static str,
    /// Type, hook, priority.
    base: Option<(&'static str, u32, i32)>,
}

fn chains() -> [Chain; 6] {
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
const RANDOM_FULLY: u32 = 1 << 4;
/// First of the 32-bit registers; four of them are one 128-bit register.
const REGISTER: u32 = 8;
/// Where a map's value goes: behind the longest key (6 registers).
const VALUE: u32 = REGISTER + 6;

/// One expression of a rule, as far as ours need them.
enum Expr {
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

type Rule = Vec<Expr>;

fn rules(networks: &[RuleNetwork]) -> Vec<(&'static str, Rule)> {
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

/// A transaction on one table.
struct Batch<'a> {
    table: &'a str,
    chain: Chained<'static>,
    messages: usize,
}

impl<'a> Batch<'a> {
    fn new(table: &'a str) -> Self {
        let mut batch = Self {
            table,
            chain: Chained::new(1),
            messages: 1,
        };
        batch.chain.request().op_batch_begin_do(&nftables());
        batch
    }

    /// Creating it first lets the deletion succeed in any case.
    fn delete_table(&mut self) {
        let header = header(family::INET);
        let create = self.chain.request().set_create();
        create
            .op_newtable_do(&header)
            .encode()
            .push_name_bytes(self.table.as_bytes());
        self.chain
            .request()
            .op_deltable_do(&header)
            .encode()
            .push_name_bytes(self.table.as_bytes());
        self.messages += 2;
    }

    fn replace_table(&mut self) {
        self.delete_table();
        let create = self.chain.request().set_create();
        create
            .op_newtable_do(&header(family::INET))
            .encode()
            .push_name_bytes(self.table.as_bytes());
        self.messages += 1;
    }

    fn new_map(&mut self, map: Map) {
        let (key_type, data_type) = map.types();
        let key_len = u32::try_from(map.key_len()).expect("at most 24");
        let data_len = u32::try_from(map.address_len() + 4).expect("at most 20");
        self.messages += 1;
        let id = u32::try_from(self.messages).expect("few messages");
        let create = self.chain.request().set_create();
        create
            .op_newset_do(&header(family::INET))
            .encode()
            .push_table_bytes(self.table.as_bytes())
            .push_name_bytes(map.name().as_bytes())
            .push_flags(SetFlags::Map as u32)
            .push_key_type(key_type)
            .push_key_len(key_len)
            .push_data_type(data_type)
            .push_data_len(data_len)
            .push_id(id);
    }

    fn new_chain(&mut self, chain: &Chain) {
        self.messages += 1;
        let create = self.chain.request().set_create();
        let mut request = create.op_newchain_do(&header(family::INET));
        let push = request
            .encode()
            .push_table_bytes(self.table.as_bytes())
            .push_name_bytes(chain.name.as_bytes());
        if let Some((kind, hook, priority)) = chain.base {
            push.nested_hook()
                .push_num(hook)
                .push_priority(priority)
                .end_nested()
                .push_policy(VerdictCode::Accept as u32)
                .push_type_bytes(kind.as_bytes());
        }
    }

    fn new_rule(&mut self, chain: &str, rule: &[Expr]) {
        self.messages += 1;
        let create = self.chain.request().set_append().set_create();
        let mut list = create
            .op_newrule_do(&header(family::INET))
            .into_encoder()
            .push_table_bytes(self.table.as_bytes())
            .push_chain_bytes(chain.as_bytes())
            .nested_expressions();
        for expr in rule {
            list = push_expr(list, expr);
        }
        list.end_nested();
    }

    fn new_elements(&mut self, elements: &[Published]) {
        self.elements(elements, true);
    }

    fn delete_elements(&mut self, elements: &[Published]) {
        self.elements(elements, false);
    }

    fn elements(&mut self, elements: &[Published], add: bool) {
        for map in Map::ALL {
            let of_map: Vec<_> = elements.iter().filter(|one| Map::of(one) == map).collect();
            for chunk in of_map.chunks(ELEMENTS_PER_MESSAGE) {
                self.messages += 1;
                let request = self.chain.request();
                let header = header(family::INET);
                let push = if add {
                    let request = request.set_create();
                    request.op_newsetelem_do(&header).into_encoder()
                } else {
                    request.op_delsetelem_do(&header).into_encoder()
                };
                let mut list = push
                    .push_table_bytes(self.table.as_bytes())
                    .push_set_bytes(map.name().as_bytes())
                    .nested_elements();
                for one in chunk {
                    let key = list.nested_elem().nested_key().push_value(&one.key());
                    let mut element = key.end_nested();
                    if add {
                        let data = element.nested_data().push_value(&one.data());
                        element = data.end_nested().push_userdata(&one.userdata());
                    }
                    list = element.end_nested();
                }
                list.end_nested();
            }
        }
    }

    fn commit(mut self, call: &'static str) -> Result<(), NetworkError> {
        self.chain.request().op_batch_end_do(&nftables());
        let batch = self.chain.finalize();
        transact(&batch).map_err(|(place, source)| {
            let subject = match place {
                Some(place) => format!("{}, {} #{place}", self.table, batch.name(place)),
                None => self.table.to_owned(),
            };
            NetworkError::kernel(call, subject, source)
        })
    }
}

/// Sends a batch and waits for the answer to each of its messages; an error comes with the place
/// of the message that caused it.
///
/// Not by the library's socket: it can't make room for a batch of more than 200 KiB, which a start
/// with a thousand published ports is.
fn transact(batch: &ChainedFinal<'_>) -> Result<(), (Option<usize>, io::Error)> {
    let no_place = |error: io::Error| (None, error);
    let bytes = batch.payload();
    let socket = Socket::new(NETLINK_NETFILTER).map_err(no_place)?;
    socket
        .connect(&SocketAddr::new(0, 0))
        .and_then(|()| socket.set_cap_ack(true))
        .map_err(no_place)?;
    // The kernel counts each answer as about 1 KiB.
    let answers = batch.chain_len() * 1024;
    sockopt::set_socket_send_buffer_size_force(&socket, bytes.len() + 4096)
        .and_then(|()| sockopt::set_socket_recv_buffer_size_force(&socket, answers + (64 << 10)))
        .map_err(|errno| no_place(errno.into()))?;
    socket.send(bytes, 0).map_err(no_place)?;
    let mut waiting: BTreeSet<_> = (0..batch.chain_len())
        .filter(|place| batch.supports_ack(*place) == Some(true))
        .collect();
    while !waiting.is_empty() {
        let (datagram, _) = socket.recv_from_full().map_err(no_place)?;
        for answer in NetlinkBuffers::new(&datagram) {
            let Some(place) = batch.get_index(answer.sequence) else {
                continue;
            };
            match answer.error {
                Some(0) => waiting.remove(&place),
                Some(code) => {
                    let error = io::Error::from_raw_os_error(-code);
                    return Err((Some(place), error));
                }
                None => continue,
            };
        }
    }
    Ok(())
}

/// The messages in a datagram, as far as answers need.
struct NetlinkBuffers<'a>(&'a [u8]);

struct Answer {
    sequence: u32,
    error: Option<i32>,
}

impl<'a> NetlinkBuffers<'a> {
    fn new(datagram: &'a [u8]) -> Self {
        Self(datagram)
    }
}

impl Iterator for NetlinkBuffers<'_> {
    type Item = Answer;

    fn next(&mut self) -> Option<Answer> {
        /// `NLMSG_ERROR`, which also acknowledges.
        const ERROR: [u8; 2] = 2_u16.to_ne_bytes();
        let word = |at: usize| Some(<[u8; 4]>::try_from(self.0.get(at..at + 4)?).expect("4 bytes"));
        let length = usize::try_from(u32::from_ne_bytes(word(0)?)).ok()?;
        let answer = Answer {
            sequence: u32::from_ne_bytes(word(8)?),
            error: match self.0.get(4..6)? == ERROR {
                true => Some(i32::from_ne_bytes(word(16)?)),
                false => None,
            },
        };
        let next = length.max(16).next_multiple_of(4).min(self.0.len());
        self.0 = &self.0[next..];
        Some(answer)
    }
}

fn nftables() -> Nfgenmsg {
    let mut header = header(family::UNSPEC);
    // NFNL_SUBSYS_NFTABLES
    header.set_res_id(10);
    header
}

type ExprList<'a> = PushExprListAttrs<PushRuleAttrs<RequestBuf<'a>>>;

fn push_expr<'a>(list: ExprList<'a>, expr: &Expr) -> ExprList<'a> {
    /// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_DADDR`.
    const FIB: (u32, u32) = (3, 1 << 1);
    let elem = list.nested_elem();
    match expr {
        Meta(key, register) => elem
            .nested_data_meta()
            .push_dreg(*register)
            .push_key(*key as u32)
            .end_nested()
            .end_nested(),
        Payload(base, offset, length, register) => elem
            .nested_data_payload()
            .push_dreg(*register)
            .push_base(*base as u32)
            .push_offset(*offset)
            .push_len(*length)
            .end_nested()
            .end_nested(),
        Is(bytes) | IsNot(bytes) => {
            let op = match expr {
                Is(_) => CmpOps::Eq,
                _ => CmpOps::Neq,
            };
            elem.nested_data_cmp()
                .push_sreg(REGISTER)
                .push_op(op as u32)
                .nested_data()
                .push_value(bytes)
                .end_nested()
                .end_nested()
                .end_nested()
        }
        Mask(mask) => elem
            .nested_data_bitwise()
            .push_sreg(REGISTER)
            .push_dreg(REGISTER)
            .push_len(u32::try_from(mask.len()).expect("at most 16"))
            .nested_mask()
            .push_value(mask)
            .end_nested()
            .nested_xor()
            .push_value(&vec![0; mask.len()])
            .end_nested()
            .end_nested()
            .end_nested(),
        DestinationType => elem
            .nested_data_fib()
            .push_dreg(REGISTER)
            .push_result(FIB.0)
            .push_flags(FIB.1)
            .end_nested()
            .end_nested(),
        ConnectionStatus => elem
            .nested_data_ct()
            .push_dreg(REGISTER)
            .push_key(CtKeys::Status as u32)
            .end_nested()
            .end_nested(),
        Lookup(map) => {
            const SET: u16 = 1;
            const SOURCE: u16 = 2;
            const DESTINATION: u16 = 3;
            let name = [map.name().as_bytes(), &[0]].concat();
            raw_expr(
                elem,
                "lookup",
                &[
                    (SET, &name),
                    (SOURCE, &REGISTER.to_be_bytes()),
                    (DESTINATION, &VALUE.to_be_bytes()),
                ],
            )
        }
        Translate(map) => {
            let nfproto = if map.is_v4() {
                family::IPV4
            } else {
                family::IPV6
            };
            let length = u32::try_from(map.address_len()).expect("4 or 16");
            elem.nested_data_nat()
                // NFT_NAT_DNAT
                .push_type(1)
                .push_family(nfproto.into())
                .push_reg_addr_min(VALUE)
                .push_reg_proto_min(VALUE + length / 4)
                .end_nested()
                .end_nested()
        }
        Masquerade => {
            const FLAGS: u16 = 1;
            raw_expr(elem, "masq", &[(FLAGS, &RANDOM_FULLY.to_be_bytes())])
        }
        Verdict(code, chain) => {
            let mut verdict = elem
                .nested_data_immediate()
                .push_dreg(0)
                .nested_data()
                .nested_verdict()
                .push_code(*code as u32);
            if let Some(chain) = chain {
                verdict = verdict.push_chain_bytes(chain.as_bytes());
            }
            verdict.end_nested().end_nested().end_nested().end_nested()
        }
    }
}

/// Writes an expression that the library can't (`masq`), or whose attributes it has in another
/// order than the kernel (`lookup`).
fn raw_expr<'a>(
    elem: PushExprAttrs<ExprList<'a>>,
    name: &str,
    attributes: &[(u16, &[u8])],
) -> ExprList<'a> {
    const NFTA_EXPR_DATA: u16 = 2;
    let mut elem = elem.push_name_bytes(name.as_bytes());
    let bytes = elem.as_vec_mut();
    let data = push_nested_header(bytes, NFTA_EXPR_DATA);
    for (kind, value) in attributes {
        let length = u16::try_from(value.len()).expect("attributes are short");
        push_header(bytes, *kind, length);
        bytes.extend(*value);
    }
    finalize_nested_header(bytes, data);
    elem.end_nested()
}

/// A connection, by its original direction.
struct Flow {
    family: u8,
    zone: Option<u16>,
    original: Tuple,
    reply: Tuple,
}

#[derive(Clone, Copy)]
struct Tuple {
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    source_port: u16,
    destination_port: u16,
}

/// Ends the flows that withdrawn ports had translated.
fn forget_flows(gone: &[Published]) -> Result<(), NetworkError> {
    let mut addresses: Vec<_> = gone.iter().map(|one| one.address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    for address in addresses {
        forget(&FlowFilter::AnsweredBy(address), |flow| {
            gone.iter().any(|one| {
                one.address == address
                    && one.protocol.number() == flow.reply.protocol
                    && one.port == flow.reply.source_port
                    && one.host_port == flow.original.destination_port
            })
        })?;
    }
    Ok(())
}

/// Ends the flows of datagrams to ports that are published from now on.
fn forget_untranslated(published: &[Published]) -> Result<(), NetworkError> {
    for one in published {
        if one.protocol == Protocol::Udp {
            let filter = FlowFilter::To(one.protocol, one.host_port, one.address.is_ipv4());
            forget(&filter, |flow| {
                flow.reply.source != one.address
                    && match one.host {
                        HostAddress::One(host) => flow.original.destination == host,
                        _ => true,
                    }
            })?;
        }
    }
    Ok(())
}

fn forget(filter: &FlowFilter, which: impl Fn(&Flow) -> bool) -> Result<(), NetworkError> {
    let mut socket = NetlinkSocket::new();
    let flows = match flows(&mut socket, filter) {
        Ok(flows) => flows,
        // Without the module nf_conntrack_netlink old flows end by their timeouts.
        Err(error) if is(&error, Errno::INVAL) || is(&error, Errno::OPNOTSUPP) => {
            tracing::warn!(%error, "flows of a host port can't be ended");
            return Ok(());
        }
        Err(error) => return Err(NetworkError::kernel("IPCTNL_MSG_CT_GET", "flows", error)),
    };
    for flow in flows.iter().filter(|flow| which(flow)) {
        let deleted = socket
            .request(&DeleteFlow::new(flow))
            .and_then(|mut reply| reply.recv_ack().map_err(io::Error::from));
        match deleted {
            Ok(()) => {}
            Err(error) if is(&error, Errno::NOENT) => {}
            Err(error) => return Err(NetworkError::kernel("IPCTNL_MSG_CT_DELETE", "flow", error)),
        }
    }
    Ok(())
}

/// What the kernel compares while it walks its table, so that few flows are copied.
enum FlowFilter {
    AnsweredBy(IpAddr),
    To(Protocol, u16, bool),
}

/// `CTA_FILTER_F_*`: source address; protocol and destination port.
const BY_SOURCE: u32 = 1;
const BY_PORT: u32 = 1 << 3 | 1 << 5;

fn flows(socket: &mut NetlinkSocket, filter: &FlowFilter) -> io::Result<Vec<Flow>> {
    let v4 = match filter {
        FlowFilter::AnsweredBy(address) => address.is_ipv4(),
        FlowFilter::To(_, _, v4) => *v4,
    };
    let family = if v4 { family::IPV4 } else { family::IPV6 };
    let mut request = conntrack::Request::new().op_get_dump(&flow_header(family));
    let push = request.encode();
    match filter {
        FlowFilter::AnsweredBy(address) => {
            let tuple = push.nested_tuple_reply().nested_tuple_ip();
            let tuple = match address {
                IpAddr::V4(ip) => tuple.push_ip_v4_src(*ip),
                IpAddr::V6(ip) => tuple.push_ip_v6_src(*ip),
            };
            tuple
                .end_nested()
                .end_nested()
                .nested_filter()
                .push_orig_flags(0)
                .push_reply_flags(BY_SOURCE)
                .end_nested();
        }
        FlowFilter::To(protocol, port, _) => {
            push.nested_tuple_orig()
                .nested_tuple_proto()
                .push_proto_num(protocol.number())
                .push_proto_dst_port(*port)
                .end_nested()
                .end_nested()
                .nested_filter()
                .push_orig_flags(BY_PORT)
                .push_reply_flags(0)
                .end_nested();
        }
    }
    let mut found = Vec::new();
    let mut replies = socket.request(&request)?;
    while let Some(reply) = replies.recv() {
        let (_, attributes) = reply?;
        let tuples = (attributes.get_tuple_orig(), attributes.get_tuple_reply());
        if let (Ok(original), Ok(reply)) = tuples
            && let (Some(original), Some(reply)) = (tuple(&original), tuple(&reply))
        {
            found.push(Flow {
                family,
                zone: attributes.get_zone().ok(),
                original,
                reply,
            });
        }
    }
    Ok(found)
}

fn flow_header(family: u8) -> conntrack::Nfgenmsg {
    let mut header = conntrack::Nfgenmsg::new();
    header.nfgen_family = family;
    header
}

fn tuple(attributes: &conntrack::IterableTupleAttrs<'_>) -> Option<Tuple> {
    let ip = attributes.get_tuple_ip().ok()?;
    let proto = attributes.get_tuple_proto().ok()?;
    let (source, destination) = match (ip.get_ip_v4_src(), ip.get_ip_v4_dst()) {
        (Ok(source), Ok(destination)) => (IpAddr::V4(source), IpAddr::V4(destination)),
        _ => (
            IpAddr::V6(ip.get_ip_v6_src().ok()?),
            IpAddr::V6(ip.get_ip_v6_dst().ok()?),
        ),
    };
    Some(Tuple {
        protocol: proto.get_proto_num().ok()?,
        source,
        destination,
        source_port: proto.get_proto_src_port().ok()?,
        destination_port: proto.get_proto_dst_port().ok()?,
    })
}

/// `IPCTNL_MSG_CT_DELETE`, which the library does not have.
struct DeleteFlow(Vec<u8>);

impl DeleteFlow {
    fn new(flow: &Flow) -> Self {
        let mut payload = flow_header(flow.family).as_slice().to_vec();
        let original = &flow.original;
        let tuple = conntrack::PushConntrackAttrs::new(&mut payload)
            .nested_tuple_orig()
            .nested_tuple_ip();
        let tuple = match (original.source, original.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                tuple.push_ip_v4_src(source).push_ip_v4_dst(destination)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                tuple.push_ip_v6_src(source).push_ip_v6_dst(destination)
            }
            _ => tuple,
        };
        let mut push = tuple
            .end_nested()
            .nested_tuple_proto()
            .push_proto_num(original.protocol)
            .push_proto_src_port(original.source_port)
            .push_proto_dst_port(original.destination_port)
            .end_nested()
            .end_nested();
        if let Some(zone) = flow.zone {
            push = push.push_zone(zone);
        }
        debug_assert!(!push.as_vec().is_empty());
        drop(push);
        Self(payload)
    }
}

impl NetlinkRequest for DeleteFlow {
    type ReplyType<'buf> = ();

    fn protocol(&self) -> NetlinkProtocol {
        const SUBSYSTEM: u16 = 1;
        const DELETE: u16 = 2;
        NetlinkProtocol::Raw {
            protonum: conntrack::PROTONUM,
            request_type: SUBSYSTEM << 8 | DELETE,
        }
    }

    fn flags(&self) -> u16 {
        0
    }

    fn payload(&self) -> &[u8] {
        &self.0
    }

    fn decode_reply(_: &[u8]) -> Self::ReplyType<'_> {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(host: &str, address: &str) -> Published {
        Published {
            sandbox: SandboxId::random(),
            protocol: Protocol::Udp,
            host: HostAddress::from(Some(host.parse().expect("an address"))),
            host_port: 8080,
            address: address.parse().expect("an address"),
            port: 80,
        }
    }

    #[test]
    fn keys_and_values_have_the_length_that_the_map_declares() {
        for (host, address) in [
            ("0.0.0.0", "10.88.0.2"),
            ("192.0.2.1", "10.88.0.2"),
            ("::", "fd00::2"),
            ("2001:db8::1", "fd00::2"),
        ] {
            let one = published(host, address);
            let map = Map::of(&one);
            assert_eq!(one.key().len(), map.key_len(), "{host}");
            assert_eq!(one.data().len(), map.address_len() + 4, "{host}");
            assert_eq!(comment(&one.userdata()), Some(one.sandbox.as_str()));
        }
    }

    #[test]
    fn foreign_user_data_is_no_comment() {
        for data in [&[][..], &[0], &[0, 0], &[1, 2, b'a', 0], &[0, 200, b'a', 0]] {
            assert_eq!(comment(data), None, "{data:?}");
        }
    }
}
