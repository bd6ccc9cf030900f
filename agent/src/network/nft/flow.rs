//! Flows of connection tracking that outlive a change of the published ports.
//!
//! A flow keeps the translation that it began with. So a client that goes on sending datagrams
//! would never reach a port that is published later, or would reach the address of a sandbox that
//! is gone, which another one may have by then; and one with a connection to a sandbox that is
//! gone would wait for long. Such flows are ended: their next packet is looked up anew.
//!
//! Finding them means walking the kernel's whole table (20 ms for its usual 262,144 buckets), so
//! it is done beside the request, at most every [`PAUSE`], and for all that has become due.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use ipnet::IpNet;
use netlink_bindings::{
    conntrack,
    traits::{NetlinkRequest, Protocol as NetlinkProtocol},
};
use netlink_socket2::NetlinkSocket;
use rustix::io::Errno;

use super::{
    super::{
        error::NetworkError,
        netlink::Netlink,
        ports::{HostAddress, Protocol},
    },
    Published, dump, family, is,
};

/// Changes within this time share a walk.
const PAUSE: Duration = Duration::from_millis(100);

/// Up to this many addresses and ports are looked for one by one, in the kernel; more of them by
/// reading all flows.
const FEW: usize = 4;

/// Ends flows that a change has made wrong, on a thread that ends when nothing is due.
pub(super) struct Sweeper {
    table: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    due: Due,
    running: bool,
}

/// What has to be looked at.
#[derive(Default)]
struct Due {
    /// Ports that led to these addresses were withdrawn.
    addresses: BTreeSet<IpAddr>,
    /// These UDP ports were published: port, IPv4.
    ports: BTreeSet<(u16, bool)>,
    /// Anything may have happened with these while no agent ran.
    pools: Vec<IpNet>,
}

impl Sweeper {
    pub(super) fn new(table: &str) -> Self {
        Self {
            table: table.to_owned(),
            state: Arc::default(),
        }
    }

    pub(super) fn published(&self, new: &[Published]) {
        let udp = new.iter().filter(|one| one.protocol == Protocol::Udp);
        let ports: Vec<_> = udp
            .map(|one| (one.host_port, one.address.is_ipv4()))
            .collect();
        if !ports.is_empty() {
            self.due(|due| due.ports.extend(ports));
        }
    }

    pub(super) fn withdrawn(&self, gone: &[Published]) {
        let addresses = gone.iter().map(|one| one.address);
        self.due(|due| due.addresses.extend(addresses));
    }

    pub(super) fn started(&self, pools: Vec<IpNet>) {
        self.due(|due| due.pools = pools);
    }

    fn due(&self, add: impl FnOnce(&mut Due)) {
        let mut state = lock(&self.state);
        add(&mut state.due);
        if state.running {
            return;
        }
        let (table, shared) = (self.table.clone(), Arc::clone(&self.state));
        let thread = thread::Builder::new().name("flows".to_owned());
        match thread.spawn(move || work(&table, &shared)) {
            Ok(_) => state.running = true,
            // The next change tries again.
            Err(error) => tracing::warn!(%error, "old flows not ended yet"),
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(table: &str, state: &Mutex<State>) {
    loop {
        thread::sleep(PAUSE);
        let due = {
            let mut state = lock(state);
            let due = std::mem::take(&mut state.due);
            if due.addresses.is_empty() && due.ports.is_empty() && due.pools.is_empty() {
                state.running = false;
                return;
            }
            due
        };
        if let Err(error) = sweep(table, &due) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "old flows of host ports not ended");
        }
    }
}

fn sweep(table: &str, due: &Due) -> Result<(), NetworkError> {
    let mut socket = NetlinkSocket::new();
    let published = dump(&mut socket, table)?;
    let local: BTreeSet<_> = Netlink::open()?
        .all_addresses()?
        .iter()
        .map(IpNet::addr)
        .collect();
    let wrong = |flow: &Flow| {
        let source = flow.reply.source;
        let ours =
            due.addresses.contains(&source) || due.pools.iter().any(|net| net.contains(&source));
        is_wrong(flow, &published, ours, |ip| {
            local.contains(&ip) || ip.is_loopback()
        })
    };
    for filter in filters(due) {
        let failed = |call, error| NetworkError::kernel(call, "flows", error);
        let flows = match flows(&mut socket, &filter) {
            Ok(flows) => flows,
            // Without the module nf_conntrack_netlink old flows end by their timeouts.
            Err(error) if is(&error, Errno::INVAL) || is(&error, Errno::OPNOTSUPP) => {
                return Err(NetworkError::Missing {
                    feature: "nf_conntrack_netlink",
                    hint: "load the module, so that old flows of host ports can be ended",
                });
            }
            Err(error) => return Err(failed("IPCTNL_MSG_CT_GET", error)),
        };
        for flow in flows.iter().filter(|flow| wrong(flow)) {
            let deleted = socket
                .request(&DeleteFlow::new(flow))
                .and_then(|mut reply| reply.recv_ack().map_err(io::Error::from));
            match deleted {
                Ok(()) => {}
                Err(error) if is(&error, Errno::NOENT) => {}
                Err(error) => return Err(failed("IPCTNL_MSG_CT_DELETE", error)),
            }
        }
    }
    Ok(())
}

/// Whether the flow would be translated in another way if it began now.
///
/// `ours` says that it is answered by an address that is or was a sandbox's.
fn is_wrong(
    flow: &Flow,
    published: &[Published],
    ours: bool,
    local: impl Fn(IpAddr) -> bool,
) -> bool {
    let now = published.iter().find(|one| {
        one.protocol.number() == flow.original.protocol
            && one.host_port == flow.original.destination_port
            && one.address.is_ipv4() == flow.original.destination.is_ipv4()
            && match one.host {
                HostAddress::One(host) => host == flow.original.destination,
                _ => local(flow.original.destination),
            }
    });
    let translated = flow.reply.source != flow.original.destination;
    match now {
        Some(now) if translated => {
            (flow.reply.source, flow.reply.source_port) != (now.address, now.port)
        }
        // A connection that a process of the host serves is right, a datagram's flow is not.
        Some(now) => now.protocol == Protocol::Udp,
        None => translated && ours,
    }
}

fn filters(due: &Due) -> Vec<FlowFilter> {
    if due.pools.is_empty() && due.addresses.len() + due.ports.len() <= FEW {
        let addresses = due.addresses.iter().copied().map(FlowFilter::AnsweredBy);
        let ports = due
            .ports
            .iter()
            .map(|(port, v4)| FlowFilter::To(Protocol::Udp, *port, *v4));
        return addresses.chain(ports).collect();
    }
    let families: BTreeSet<bool> = due
        .addresses
        .iter()
        .map(IpAddr::is_ipv4)
        .chain(due.ports.iter().map(|(_, v4)| *v4))
        .chain(due.pools.iter().map(|net| net.addr().is_ipv4()))
        .collect();
    families.into_iter().map(FlowFilter::All).collect()
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

/// What the kernel compares while it walks its table, so that few flows are copied.
enum FlowFilter {
    AnsweredBy(IpAddr),
    /// Protocol, port, IPv4.
    To(Protocol, u16, bool),
    /// IPv4.
    All(bool),
}

/// `CTA_FILTER_F_*`: source address; protocol and destination port.
const BY_SOURCE: u32 = 1;
const BY_PORT: u32 = 1 << 3 | 1 << 5;

fn flows(socket: &mut NetlinkSocket, filter: &FlowFilter) -> io::Result<Vec<Flow>> {
    let v4 = match filter {
        FlowFilter::AnsweredBy(address) => address.is_ipv4(),
        FlowFilter::To(_, _, v4) | FlowFilter::All(v4) => *v4,
    };
    let family = if v4 { family::IPV4 } else { family::IPV6 };
    let mut request = conntrack::Request::new().op_get_dump(&flow_header(family));
    let push = request.encode();
    match filter {
        FlowFilter::All(_) => drop(push),
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
        // Its end writes the lengths.
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
    use crate::id::SandboxId;

    #[test]
    fn a_flow_is_wrong_if_it_would_begin_in_another_way() {
        let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
        let published = |protocol, host: Option<&str>, address: &str| Published {
            sandbox: SandboxId::random(),
            protocol,
            host: match host {
                Some(host) => HostAddress::One(ip(host)),
                None => HostAddress::AnyV4,
            },
            host_port: 53,
            address: ip(address),
            port: 80,
        };
        let check = |to: &str, by: (&str, u16), now: &[Published], ours: bool, wrong: bool| {
            let (protocol, client) = (17, ip("192.0.2.9"));
            let flow = Flow {
                family: family::IPV4,
                zone: None,
                original: Tuple {
                    protocol,
                    source: client,
                    destination: ip(to),
                    source_port: 4000,
                    destination_port: 53,
                },
                reply: Tuple {
                    protocol,
                    source: ip(by.0),
                    destination: client,
                    source_port: by.1,
                    destination_port: 4000,
                },
            };
            let local = |at| at == ip("192.0.2.1");
            let found = is_wrong(&flow, now, ours, local);
            assert_eq!(found, wrong, "{to} {by:?} {now:?} {ours}");
        };
        let (host, pod, other) = ("192.0.2.1", ("10.88.0.2", 80), ("10.88.0.3", 80));
        let now = [published(Protocol::Udp, None, pod.0)];
        // Right, untranslated, of an earlier holder, at an earlier port.
        check(host, pod, &now, true, false);
        check(host, (host, 53), &now, false, true);
        check(host, other, &now, false, true);
        check(host, (pod.0, 81), &now, true, true);
        // Nothing is published any more: only what was ours is wrong.
        check(host, pod, &[], true, true);
        check(host, pod, &[], false, false);
        check(host, (host, 53), &[], true, false);
        // Passing through to another machine's port 53, from a sandbox or not.
        check("198.51.100.1", ("198.51.100.1", 53), &now, false, false);
        // Published on one address only, or for another protocol.
        let one = [published(Protocol::Udp, Some("127.0.0.1"), pod.0)];
        check(host, (host, 53), &one, false, false);
        let tcp = [published(Protocol::Tcp, None, pod.0)];
        check(host, (host, 53), &tcp, false, false);
    }
}
