//! The one door to rtnetlink: links, addresses and routes of one network namespace.
//!
//! A socket belongs to the namespace that its thread is in when it is opened, and goes on talking
//! to that one. Messages that belong together are sent in one write: the kernel works through
//! them before the write returns, so a killed agent never leaves half of a batch.
//!
//! Source: netlink(7), rtnetlink(7).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd},
};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridge, InfoBridgePort, InfoData, InfoKind,
        InfoPortData, InfoPortKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
        State,
    },
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::{error::NetworkError, plan::Mac};

/// Name of a sandbox's interface, as CRI clients expect it.
pub(super) const INSIDE: &str = "eth0";

/// Runs `work` on a thread of its own in the namespace `netns`; the thread ends with it.
///
/// `before` runs on that thread while it is still in the caller's namespace.
pub(super) fn in_netns<S, T: Send>(
    netns: BorrowedFd<'_>,
    before: impl FnOnce() -> Result<S, NetworkError> + Send,
    work: impl FnOnce(S) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let inside = move || {
        let state = before()?;
        move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))
            .map_err(|errno| NetworkError::kernel("setns", "network", errno.into()))?;
        work(state)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, inside)
            .map_err(|error| NetworkError::kernel("clone", "netns thread", error))?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// A link as far as we care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// `bridge`, `veth`, ...; empty for devices without a kind.
    pub(super) kind: String,
    pub(super) alias: Option<String>,
    /// Index of the bridge it is a port of.
    pub(super) controller: Option<u32>,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// Up at the other end too, and known to be.
    pub(super) running: bool,
}

/// A route as far as we care.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Route {
    pub(super) destination: IpNet,
    /// Index of the outgoing link; none for blackholes and the like.
    pub(super) link: Option<u32>,
    /// Learned from a router advertisement.
    pub(super) advertised: bool,
    /// Lower is preferred.
    pub(super) metric: u32,
}

/// One message of a batch.
pub(super) struct Change {
    call: &'static str,
    subject: String,
    message: RouteNetlinkMessage,
    flags: u16,
    /// This errno is as good as success.
    fine: Option<Errno>,
}

impl Change {
    fn new(call: &'static str, subject: impl Into<String>, message: RouteNetlinkMessage) -> Self {
        Self {
            call,
            subject: subject.into(),
            message,
            flags: 0,
            fine: None,
        }
    }

    fn create(self) -> Self {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        Self { flags, ..self }
    }

    fn replace(self) -> Self {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        Self { flags, ..self }
    }

    fn or(self, errno: Errno) -> Self {
        let fine = Some(errno);
        Self { fine, ..self }
    }
}

/// Makes a bridge that is up; it has a fixed hardware address, so that neighbours' caches stay
/// right while ports come and go.
pub(super) fn create_bridge(name: &str, alias: &str, mac: Mac, mtu: u32) -> Vec<Change> {
    // Without a querier, snooping only costs: all ports belong to us.
    let create = LinkBridge::new(name)
        .down()
        .address(mac.0.to_vec())
        .mtu(mtu)
        .append_info_data(InfoBridge::MulticastSnooping(false))
        .build();
    // The kernel ignores an alias in the creating message.
    let alias = named(name).alias(alias).build();
    vec![
        Change::new("RTM_NEWLINK", name, RouteNetlinkMessage::NewLink(create)).create(),
        Change::new("RTM_SETLINK", name, RouteNetlinkMessage::SetLink(alias)),
    ]
}

/// A pair of interfaces: one in the host as a port of a bridge, `eth0` in a namespace.
pub(super) struct Veth<'a> {
    pub(super) host: &'a str,
    pub(super) alias: &'a str,
    pub(super) bridge: u32,
    pub(super) mac: Mac,
    pub(super) mtu: u32,
}

/// Makes the pair, the inner end in `netns`, and the outer end an active port of the bridge.
pub(super) fn create_veth(veth: &Veth<'_>, netns: BorrowedFd<'_>) -> Vec<Change> {
    let inside = named(INSIDE)
        .address(veth.mac.0.to_vec())
        .mtu(veth.mtu)
        .setns_by_fd(netns.as_raw_fd())
        .build();
    let create = LinkVeth::new(veth.host, INSIDE)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(inside)))
        .mtu(veth.mtu)
        .controller(veth.bridge)
        .build();
    let mut changes = vec![
        Change::new(
            "RTM_NEWLINK",
            veth.host,
            RouteNetlinkMessage::NewLink(create),
        )
        .create(),
    ];
    changes.extend(make_port(veth.host, veth.alias));
    changes
}

/// Makes a link an active port of the bridge that it belongs to already.
///
/// Hairpin mode lets a sandbox reach itself through its own host port. The outer end needs no
/// IPv6 address; without one it also sends nothing by itself.
fn make_port(name: &str, alias: &str) -> [Change; 2] {
    let port = named(name)
        .alias(alias)
        .set_port_kind(InfoPortKind::Bridge)
        .set_port_data(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(
            true,
        )]))
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
        )]))
        .build();
    let up = named(name).up().build();
    [
        Change::new("RTM_NEWLINK", name, RouteNetlinkMessage::NewLink(port)),
        Change::new("RTM_SETLINK", name, RouteNetlinkMessage::SetLink(up)),
    ]
}

/// Puts an existing outer end back on its bridge.
pub(super) fn repair_port(name: &str, alias: &str, bridge: u32) -> Vec<Change> {
    let port = named(name).controller(bridge).build();
    let mut changes = vec![Change::new(
        "RTM_SETLINK",
        name,
        RouteNetlinkMessage::SetLink(port),
    )];
    changes.extend(make_port(name, alias));
    changes
}

/// Tells the bridge that this hardware address is behind this port and nowhere else, so that it
/// need not be learned first, and the dying link of an earlier holder can't claim it.
pub(super) fn pin_mac(port: u32, name: &str, mac: Mac) -> Change {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.header.state = NeighbourState::Noarp;
    message.header.flags = NeighbourFlags::Controller | NeighbourFlags::Sticky;
    let address = NeighbourAttribute::LinkLayerAddress(mac.0.to_vec());
    message.attributes.push(address);
    let message = RouteNetlinkMessage::NewNeighbour(message);
    Change::new("RTM_NEWNEIGH", format!("{mac} behind {name}"), message).replace()
}

pub(super) fn set_up(name: &str) -> Change {
    let up = named(name).up().build();
    Change::new("RTM_SETLINK", name, RouteNetlinkMessage::SetLink(up))
}

pub(super) fn set_mtu(name: &str, mtu: u32) -> Change {
    let message = named(name).mtu(mtu).build();
    Change::new("RTM_SETLINK", name, RouteNetlinkMessage::SetLink(message))
}

/// Removes a link; one that is gone already is fine.
pub(super) fn delete_link(index: u32, name: &str) -> Change {
    let message = LinkUnspec::new_with_index(index).build();
    Change::new("RTM_DELLINK", name, RouteNetlinkMessage::DelLink(message)).or(Errno::NODEV)
}

/// Adds an address without waiting for duplicate address detection; one that is there is fine.
pub(super) fn add_address(link: u32, address: IpNet) -> Change {
    let mut message = AddressMessage::default();
    message.header.index = link;
    message.header.prefix_len = address.prefix_len();
    let ip = address.addr();
    message.attributes.push(AddressAttribute::Address(ip));
    message.attributes.push(AddressAttribute::Local(ip));
    match address {
        IpNet::V4(net) => {
            message.header.family = AddressFamily::Inet;
            let broadcast = AddressAttribute::Broadcast(net.broadcast());
            message.attributes.push(broadcast);
        }
        IpNet::V6(_) => {
            message.header.family = AddressFamily::Inet6;
            message.header.flags = AddressHeaderFlags::Nodad;
            let flags = AddressAttribute::Flags(AddressFlags::Nodad);
            message.attributes.push(flags);
        }
    }
    let message = RouteNetlinkMessage::NewAddress(message);
    Change::new("RTM_NEWADDR", address.to_string(), message)
        .create()
        .or(Errno::EXIST)
}

pub(super) fn delete_address(link: u32, address: IpNet) -> Change {
    let mut message = AddressMessage::default();
    message.header.index = link;
    message.header.prefix_len = address.prefix_len();
    message.header.family = match address {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    let ip = AddressAttribute::Local(address.addr());
    message.attributes.push(ip);
    let message = RouteNetlinkMessage::DelAddress(message);
    Change::new("RTM_DELADDR", address.to_string(), message).or(Errno::ADDRNOTAVAIL)
}

/// Sends everything of the gateway's family through it; replaces another default route.
pub(super) fn add_default_route(link: u32, gateway: IpAddr) -> Change {
    let message = match gateway {
        IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
            .output_interface(link)
            .gateway(gateway)
            .build(),
        IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
            .output_interface(link)
            .gateway(gateway)
            .build(),
    };
    let message = RouteNetlinkMessage::NewRoute(message);
    Change::new("RTM_NEWROUTE", format!("default via {gateway}"), message).replace()
}

fn named(name: &str) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_name(name)
}

/// A connection to the rtnetlink of one network namespace.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects to the namespace that the calling thread is in.
    pub(super) fn open() -> Result<Self, NetworkError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            // Errors then carry the header only, not the whole message.
            socket.set_cap_ack(true)?;
            Ok(socket)
        };
        let socket = open().map_err(|e| NetworkError::kernel("socket", "NETLINK_ROUTE", e))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Applies all changes in one write; the first that failed is the error.
    ///
    /// The kernel goes on after a failed one, so what follows it may have been applied.
    pub(super) fn apply(&mut self, changes: Vec<Change>) -> Result<(), NetworkError> {
        let first = self.sequence + 1;
        let mut bytes = Vec::new();
        let mut sent = Vec::with_capacity(changes.len());
        for change in changes {
            self.append(
                &mut bytes,
                change.message,
                NLM_F_REQUEST | NLM_F_ACK | change.flags,
            );
            sent.push((change.call, change.subject, change.fine));
        }
        let mut waiting = sent.len();
        let mut failed: Option<(usize, i32)> = None;
        if waiting == 0 {
            return Ok(());
        }
        self.send(&bytes)?;
        while waiting > 0 {
            for message in self.receive()? {
                let Some(place) = message.header.sequence_number.checked_sub(first) else {
                    continue;
                };
                let NetlinkPayload::Error(error) = message.payload else {
                    continue;
                };
                waiting = waiting.saturating_sub(1);
                let place = place as usize;
                let errno = -error.raw_code();
                let fine = sent
                    .get(place)
                    .and_then(|(_, _, fine)| *fine)
                    .is_some_and(|fine| fine.raw_os_error() == errno);
                if errno != 0 && !fine && failed.is_none() {
                    failed = Some((place, errno));
                }
            }
        }
        match failed {
            None => Ok(()),
            Some((place, errno)) => {
                let (call, subject, _) = sent.swap_remove(place);
                let source = io::Error::from_raw_os_error(errno);
                Err(NetworkError::kernel(call, subject, source))
            }
        }
    }

    /// The link with this name.
    pub(super) fn link(&mut self, name: &str) -> Result<Option<Link>, NetworkError> {
        let message = RouteNetlinkMessage::GetLink(named(name).build());
        match self.ask("RTM_GETLINK", name, message, 0) {
            Ok(replies) => Ok(replies.into_iter().find_map(link)),
            Err(error) if error.errno() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links.
    pub(super) fn links(&mut self) -> Result<Vec<Link>, NetworkError> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let replies = self.ask("RTM_GETLINK", "all", message, NLM_F_DUMP)?;
        Ok(replies.into_iter().filter_map(link).collect())
    }

    /// All addresses of one link.
    pub(super) fn addresses(&mut self, index: u32) -> Result<Vec<IpNet>, NetworkError> {
        self.addresses_where(|link| link == index)
    }

    /// All addresses of all links.
    pub(super) fn all_addresses(&mut self) -> Result<Vec<IpNet>, NetworkError> {
        self.addresses_where(|_| true)
    }

    fn addresses_where(&mut self, wish: impl Fn(u32) -> bool) -> Result<Vec<IpNet>, NetworkError> {
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let replies = self.ask("RTM_GETADDR", "all", message, NLM_F_DUMP)?;
        let wished = replies.into_iter().filter_map(|reply| match reply {
            RouteNetlinkMessage::NewAddress(message) if wish(message.header.index) => {
                address(&message)
            }
            _ => None,
        });
        Ok(wished.collect())
    }

    /// All unicast and local routes, of both families and every table; also the addresses of the
    /// host itself, as routes to one address.
    pub(super) fn routes(&mut self) -> Result<Vec<Route>, NetworkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let message = RouteNetlinkMessage::GetRoute(message);
            let replies = self.ask("RTM_GETROUTE", "all", message, NLM_F_DUMP)?;
            routes.extend(replies.into_iter().filter_map(route));
        }
        Ok(routes)
    }

    fn ask(
        &mut self,
        call: &'static str,
        subject: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        let mut bytes = Vec::new();
        self.append(&mut bytes, message, NLM_F_REQUEST | flags);
        let sequence = self.sequence;
        self.send(&bytes)?;
        let mut replies = Vec::new();
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(reply) => {
                        replies.push(reply);
                        if flags & NLM_F_DUMP == 0 {
                            return Ok(replies);
                        }
                    }
                    NetlinkPayload::Error(error) if error.raw_code() != 0 => {
                        return Err(NetworkError::kernel(call, subject, error.to_io()));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(replies),
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetworkError> {
        match self.socket.send(bytes, 0) {
            Ok(_) => Ok(()),
            Err(error) => Err(NetworkError::kernel("send", "NETLINK_ROUTE", error)),
        }
    }

    fn receive(&self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetworkError> {
        let failed = |error| NetworkError::kernel("recv", "NETLINK_ROUTE", error);
        let datagram = loop {
            match self.socket.recv_from_full() {
                Ok((datagram, _)) => break datagram,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        };
        let mut messages = Vec::new();
        let mut rest = datagram.as_slice();
        while rest.len() >= 16 {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            if length < 16 || length > rest.len() {
                return Err(failed(io::ErrorKind::InvalidData.into()));
            }
            // A message of a kind or with an attribute that the decoder does not know is no
            // reason to miss the others; an answer to a change is always decodable.
            if let Ok(message) = NetlinkMessage::deserialize(&rest[..length]) {
                messages.push(message);
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
        Ok(messages)
    }
}

fn link(reply: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = reply else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        alias: None,
        controller: None,
        mac: Vec::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        running: false,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::OperState(state) => link.running = state == State::Up,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind_name(&kind);
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

fn kind_name(kind: &InfoKind) -> String {
    match kind {
        InfoKind::Bridge => "bridge".to_owned(),
        InfoKind::Veth => "veth".to_owned(),
        other => format!("{other}"),
    }
}

fn address(message: &AddressMessage) -> Option<IpNet> {
    let find = |local: bool| {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
    };
    let ip = find(true).or_else(|| find(false))?;
    IpNet::new(ip, message.header.prefix_len).ok()
}

fn route(reply: RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = reply else {
        return None;
    };
    if matches!(
        message.header.kind,
        RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast
    ) {
        return None;
    }
    let mut destination = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut link, mut metric) = (None, 0);
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = ip.into(),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = ip.into(),
            RouteAttribute::Oif(index) => link = Some(index),
            RouteAttribute::Priority(priority) => metric = priority,
            RouteAttribute::MultiPath(hops) => link = hops.first().map(|hop| hop.interface_index),
            _ => {}
        }
    }
    Some(Route {
        destination: IpNet::new(destination, message.header.destination_prefix_length).ok()?,
        link,
        advertised: message.header.protocol == RouteProtocol::Ra,
        metric,
    })
}

/// Makes a plain pair with the inner end `eth0` in `netns`.
#[cfg(test)]
pub(super) fn test_veth(name: &str, netns: BorrowedFd<'_>) -> Vec<Change> {
    let inside = named(INSIDE).setns_by_fd(netns.as_raw_fd()).build();
    let create = LinkVeth::new(name, INSIDE)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(inside)))
        .build();
    vec![Change::new("RTM_NEWLINK", name, RouteNetlinkMessage::NewLink(create)).create()]
}
