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

mod batch;
mod flow;
mod map;
mod rules;

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_bindings::nftables::{Nfgenmsg, Request, VerdictCode};
use netlink_socket2::NetlinkSocket;
use netlink_sys::Socket;
use rustix::io::Errno;

use self::{batch::Batch, flow::Sweeper, map::Map};
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

impl Published {
    /// Whether a packet could be meant for both.
    fn rivals(&self, other: &Self) -> bool {
        (self.protocol, self.host_port) == (other.protocol, other.host_port)
            && self.host.overlaps(other.host)
    }
}

/// Begins the name of every agent's table.
const PREFIX: &str = "longshore-";

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
    /// Locked through a whole call: a dump would miss elements if another thread of ours changed
    /// a map meanwhile.
    state: Mutex<State>,
    sweeper: Sweeper,
}

struct State {
    sockets: Sockets,
    /// What was asked for, so that it can be made again when another program has flushed it (a
    /// reload of nftables.service does); the truth is the store's.
    networks: Vec<RuleNetwork>,
    published: BTreeSet<Published>,
}

/// Sockets that stay open: closing one waits until the kernel has freed what was deleted, which
/// takes tens of milliseconds.
///
/// Source: Linux, net/netfilter/nf_tables_api.c, `nft_rcv_nl_event`.
struct Sockets {
    /// For dumps.
    asking: NetlinkSocket,
    /// For transactions.
    batches: Option<Socket>,
    sequence: u32,
}

impl Nft {
    /// Opens its sockets when they are first used, in the caller's network namespace.
    pub(super) fn new(instance: &InstanceId) -> Self {
        let table = format!("{PREFIX}{instance}");
        Self {
            sweeper: Sweeper::new(&table),
            table,
            state: Mutex::new(State {
                sockets: Sockets {
                    asking: NetlinkSocket::new(),
                    batches: None,
                    sequence: 1,
                },
                networks: Vec::new(),
                published: BTreeSet::new(),
            }),
        }
    }

    /// Replaces the whole table in one transaction.
    pub(super) fn rebuild(
        &self,
        networks: &[RuleNetwork],
        published: &[Published],
    ) -> Result<(), NetworkError> {
        let mut state = self.lock();
        state.networks = networks.to_vec();
        state.published = published.iter().cloned().collect();
        self.replace(&mut state)
    }

    /// Adds elements; those that exist already are fine. A table that was flushed comes back.
    pub(super) fn publish(&self, published: &[Published]) -> Result<(), NetworkError> {
        if published.is_empty() {
            return Ok(());
        }
        let mut state = self.lock();
        let mut batch = Batch::new(&self.table, &state.sockets);
        batch.new_elements(published);
        match batch.commit("publish", &mut state.sockets) {
            Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => {
                tracing::warn!(table = self.table, "flushed by another program, made again");
                state.published.extend(published.iter().cloned());
                self.replace(&mut state)?;
            }
            Err(error) => return Err(error),
            Ok(()) => state.published.extend(published.iter().cloned()),
        }
        self.sweeper.published(published);
        Ok(())
    }

    /// Removes all elements of a sandbox, and soon their flows; none is fine.
    pub(super) fn withdraw(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let mut state = self.lock();
        state
            .published
            .retain(|element| element.sandbox != *sandbox);
        let mut gone = dump(&mut state.sockets.asking, &self.table)?;
        gone.retain(|element| element.sandbox == *sandbox);
        if gone.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(&self.table, &state.sockets);
        batch.delete_elements(&gone);
        batch.commit("withdraw", &mut state.sockets)?;
        self.sweeper.withdrawn(&gone);
        Ok(())
    }

    /// All elements.
    pub(super) fn published(&self) -> Result<Vec<Published>, NetworkError> {
        dump(&mut self.lock().sockets.asking, &self.table)
    }

    /// The element of another agent on this host that would take packets from one of these, and
    /// that agent's table.
    pub(super) fn rival(
        &self,
        wished: &[Published],
    ) -> Result<Option<(String, Published)>, NetworkError> {
        if wished.is_empty() {
            return Ok(None);
        }
        let failed = |error: io::Error| NetworkError::kernel("NFT_MSG_GETTABLE", "all", error);
        let request = Request::new().op_gettable_dump(&header(family::INET));
        let mut state = self.lock();
        let mut tables = Vec::new();
        let mut replies = state.sockets.asking.request(&request).map_err(failed)?;
        while let Some(reply) = replies.recv() {
            let (_, table) = reply.map_err(|error| failed(error.into()))?;
            if let Ok(name) = table.get_name() {
                tables.push(name.to_string_lossy().into_owned());
            }
        }
        tables.retain(|name| name.starts_with(PREFIX) && *name != self.table);
        for table in tables {
            let mut taken = dump(&mut state.sockets.asking, &table)?;
            taken.retain(|other| wished.iter().any(|wish| wish.rivals(other)));
            if let Some(other) = taken.pop() {
                return Ok(Some((table, other)));
            }
        }
        Ok(None)
    }

    /// Removes the table; not there is fine.
    pub(super) fn remove(&self) -> Result<(), NetworkError> {
        let mut state = self.lock();
        let mut batch = Batch::new(&self.table, &state.sockets);
        batch.delete_table();
        batch.commit("remove", &mut state.sockets)
    }

    /// Chains of other tables in the forward hook whose policy is to drop.
    pub(super) fn forward_drops(&self) -> Result<Vec<ForeignChain>, NetworkError> {
        const FORWARD: u32 = 2;
        let failed = |error: io::Error| NetworkError::kernel("NFT_MSG_GETCHAIN", "all", error);
        let request = Request::new().op_getchain_dump(&header(family::UNSPEC));
        let mut state = self.lock();
        let mut replies = state.sockets.asking.request(&request).map_err(failed)?;
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

    fn replace(&self, state: &mut State) -> Result<(), NetworkError> {
        let mut batch = Batch::new(&self.table, &state.sockets);
        batch.replace_table();
        for map in Map::ALL {
            batch.new_map(map);
        }
        for chain in rules::chains() {
            batch.new_chain(&chain);
        }
        for (chain, rule) in rules::rules(&state.networks) {
            batch.new_rule(chain, &rule);
        }
        let published: Vec<_> = state.published.iter().cloned().collect();
        batch.new_elements(&published);
        batch
            .commit("rebuild", &mut state.sockets)
            .map_err(missing_module)?;
        let pools = state.networks.iter().flat_map(|network| {
            let v4 = network.ipv4.map(IpNet::V4).into_iter();
            v4.chain(network.ipv6.map(IpNet::V6))
        });
        self.sweeper.started(pools.collect());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All elements of a table, or none if there is no such table.
fn dump(socket: &mut NetlinkSocket, table: &str) -> Result<Vec<Published>, NetworkError> {
    let mut found = Vec::new();
    for map in Map::ALL {
        let failed =
            |error: io::Error| NetworkError::kernel("NFT_MSG_GETSETELEM", map.name(), error);
        let mut request = Request::new().op_getsetelem_dump(&header(family::INET));
        request
            .encode()
            .push_table_bytes(table.as_bytes())
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
