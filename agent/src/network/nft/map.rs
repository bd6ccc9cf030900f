//! The maps and their elements, as bytes.

use std::net::IpAddr;

use netlink_bindings::nftables::IterableSetelemAttrs;

use super::{
    super::ports::{HostAddress, Protocol},
    Published,
};

/// The maps: per family, for any host address and for one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Map {
    Any4,
    At4,
    Any6,
    At6,
}

impl Map {
    pub(super) const ALL: [Self; 4] = [Self::At4, Self::Any4, Self::At6, Self::Any6];

    pub(super) fn of(element: &Published) -> Self {
        match (element.host, element.address) {
            (HostAddress::One(_), IpAddr::V4(_)) => Self::At4,
            (_, IpAddr::V4(_)) => Self::Any4,
            (HostAddress::One(_), IpAddr::V6(_)) => Self::At6,
            (_, IpAddr::V6(_)) => Self::Any6,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Any4 => "publish4",
            Self::At4 => "publish4_at",
            Self::Any6 => "publish6",
            Self::At6 => "publish6_at",
        }
    }

    pub(super) fn is_v4(self) -> bool {
        matches!(self, Self::Any4 | Self::At4)
    }

    pub(super) fn is_any(self) -> bool {
        matches!(self, Self::Any4 | Self::Any6)
    }

    pub(super) fn address_len(self) -> usize {
        if self.is_v4() { 4 } else { 16 }
    }

    pub(super) fn key_len(self) -> usize {
        8 + if self.is_any() { 0 } else { self.address_len() }
    }

    /// The types that nft(8) shows; the kernel only keeps them.
    pub(super) fn types(self) -> (u32, u32) {
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

    pub(super) fn decode(self, element: &IterableSetelemAttrs<'_>) -> Option<Published> {
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
    pub(super) fn key(&self) -> Vec<u8> {
        let mut key = vec![self.protocol.number(), 0, 0, 0];
        if let HostAddress::One(host) = self.host {
            key.extend(octets(host));
        }
        key.extend(self.host_port.to_be_bytes());
        key.extend([0, 0]);
        key
    }

    pub(super) fn data(&self) -> Vec<u8> {
        let mut data = octets(self.address);
        data.extend(self.port.to_be_bytes());
        data.extend([0, 0]);
        data
    }

    /// User data as nft(8) reads it: type 0 (comment), length, text with its zero.
    pub(super) fn userdata(&self) -> Vec<u8> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SandboxId;

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
