//! What can go wrong with networks, by what a caller or operator would do about it.

use std::{io, net::IpAddr, path::PathBuf};

use ipnet::IpNet;

use super::{
    cni::CniError,
    ports::{HostAddress, Protocol},
};
use crate::store::StoreError;

/// Why a network could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no network with this name.
    #[error("network {network:?} is not known")]
    UnknownNetwork {
        /// The wished name.
        network: String,
    },
    /// The host port is in use.
    #[error("host port {port}/{protocol} on {address} is taken by {holder}")]
    PortTaken {
        /// Host port.
        port: u16,
        /// Transport protocol.
        protocol: Protocol,
        /// Host address that was asked for.
        address: HostAddress,
        /// Who has it: a claim's holder, `this request`, or `a process of the host`.
        holder: String,
    },
    /// A port mapping that can't mean anything.
    #[error("port mapping {index}: {reason}")]
    PortInvalid {
        /// Place in the list of the request, from 0.
        index: usize,
        /// What is wrong, and what would be valid.
        reason: &'static str,
    },
    /// A wished address has another holder.
    #[error("address {address} of network {network:?} is taken by {holder}")]
    AddressTaken {
        /// Name of the network.
        network: String,
        /// The wished address.
        address: IpAddr,
        /// Who has it.
        holder: String,
    },
    /// A wished address can't be given out: outside of the subnet, or reserved in it.
    #[error("address {address} can't be given out by network {network:?}")]
    AddressInvalid {
        /// Name of the network.
        network: String,
        /// The wished address.
        address: IpAddr,
    },
    /// All addresses of the network are taken.
    #[error("network {network:?} has no free address left")]
    PoolEmpty {
        /// Name of the network.
        network: String,
        /// How many addresses it can give out.
        limit: u64,
    },
    /// A configured subnet is already reachable in another way.
    #[error("subnet {subnet} overlaps {route} on link {link:?}")]
    SubnetOverlap {
        /// The configured subnet.
        subnet: IpNet,
        /// The route, or the address as a route, that the host has.
        route: IpNet,
        /// Where that route points to.
        link: String,
    },
    /// None of the candidate subnets is free on this host.
    #[error("no candidate subnet is free on this host; configure network.ipv4")]
    NoSubnet,
    /// The configuration contradicts itself or what exists.
    #[error("configuration {key}: {reason}")]
    Config {
        /// Key in the file, e.g. `network.ipv4`.
        key: &'static str,
        /// What is wrong, and what would be valid.
        reason: String,
    },
    /// The kernel or host lacks something that is needed.
    #[error("{feature} is missing: {hint}")]
    Missing {
        /// What is missing.
        feature: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A name in the kernel is taken by something that is not ours.
    #[error("link {link:?} exists and is not this agent's")]
    ForeignLink {
        /// Name of the link.
        link: String,
    },
    /// The networks have not been started.
    #[error("networks are not started yet")]
    NotStarted,
    /// The kernel refused a call.
    #[error("{call} ({subject})")]
    Kernel {
        /// What was asked, e.g. `RTM_NEWLINK`.
        call: &'static str,
        /// The link, address, or table it was asked for.
        subject: String,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A file of procfs, or a namespace, could not be read or written.
    #[error("{call} {path:?}")]
    File {
        /// `read`, `write` or `enter`.
        call: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A network of CNI.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// The store refused the change.
    #[error("network record not committed")]
    Store(#[from] StoreError),
}

impl NetworkError {
    pub(super) fn kernel(
        call: &'static str,
        subject: impl Into<String>,
        source: io::Error,
    ) -> Self {
        Self::Kernel {
            call,
            subject: subject.into(),
            source,
        }
    }

    pub(super) fn file(
        call: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::File {
            call,
            path: path.into(),
            source: source.into(),
        }
    }

    /// The errno of a kernel call or file access, if that is what failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } | Self::File { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
