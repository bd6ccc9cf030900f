//! The record of a network and its configuration.

use std::{fmt, str::FromStr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize, de::Error as _};

use super::{cni::CniConfig, error::NetworkError};
use crate::{
    id::{Digest, InstanceId},
    store::Record,
};

/// A network: what was chosen when it was made stays, so that addresses keep their meaning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Name of the bridge in the host, at most 15 bytes.
    pub bridge: String,
    /// IPv4 subnet; none means that it has no IPv4.
    pub ipv4: Option<Ipv4Net>,
    /// IPv6 subnet; none means that it has no IPv6.
    pub ipv6: Option<Ipv6Net>,
}

impl Record for Network {
    const TABLE: &'static str = "network";

    fn id(&self) -> String {
        self.name.clone()
    }
}

/// `[network]` in the configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkChapterConfig {
    /// Name of the network that sandboxes get unless they ask for another one.
    pub name: String,
    /// Name of its bridge, at most 15 bytes; `auto` is `ls-` and the instance.
    pub bridge: String,
    /// IPv4 subnet: `auto` (the first of a list that overlaps no route of the host), `none`, or
    /// a subnet such as `10.88.0.0/16`. Once chosen it stays.
    pub ipv4: Wished<Ipv4Net>,
    /// IPv6 subnet: `auto` (a unique local one, derived from the instance), `none`, or a subnet.
    pub ipv6: Wished<Ipv6Net>,
    /// MTU of the sandboxes' interfaces in bytes; 0 means that of the host's default route.
    pub mtu: u32,
    /// Who attaches sandboxes that name no network.
    pub mode: Serving,
    /// Plugins.
    pub cni: CniConfig,
}

/// Who attaches sandboxes that name no network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Serving {
    /// The plugins of CNI when a configuration is there, else the built-in network.
    #[default]
    Auto,
    /// The built-in network.
    BuiltIn,
    /// The plugins of CNI; no network of ours is made.
    Cni,
}

impl Default for NetworkChapterConfig {
    fn default() -> Self {
        Self {
            name: "default".to_owned(),
            bridge: "auto".to_owned(),
            ipv4: Wished::Auto,
            ipv6: Wished::Auto,
            mtu: 0,
            mode: Serving::Auto,
            cni: CniConfig::default(),
        }
    }
}

/// A subnet that the configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wished<Net> {
    /// Choose one.
    Auto,
    /// Do without this family.
    None,
    /// This one.
    This(Net),
}

impl<Net: fmt::Display> Serialize for Wished<Net> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::None => serializer.serialize_str("none"),
            Self::This(net) => serializer.collect_str(net),
        }
    }
}

impl<'de, Net: FromStr> Deserialize<'de> for Wished<Net> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            net => net.parse().map(Self::This).map_err(|_| {
                D::Error::custom(format!("{text:?} is not `auto`, `none` or a subnet"))
            }),
        }
    }
}

/// Private subnets that are tried in this order: first those that few others take by default.
///
/// Source: RFC 1918.
const CANDIDATES: [&str; 8] = [
    "10.88.0.0/16",
    "10.89.0.0/16",
    "10.188.0.0/16",
    "10.214.0.0/16",
    "172.28.0.0/16",
    "172.30.0.0/16",
    "192.168.208.0/20",
    "192.168.80.0/20",
];

impl NetworkChapterConfig {
    /// Refuses what can't work, before anything is made.
    ///
    /// # Errors
    /// `Config` with the key and what would be valid.
    pub fn validate(&self) -> Result<(), NetworkError> {
        let refuse = |key, reason: &str| {
            let reason = reason.to_owned();
            Err(NetworkError::Config { key, reason })
        };
        let word = |text: &str| {
            !text.is_empty()
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && !text.starts_with(['.', '-'])
        };
        if !word(&self.name) || self.name.len() > 63 {
            return refuse(
                "network.name",
                "must be 1 to 63 letters, digits, '-', '_' or '.'",
            );
        }
        if !word(&self.bridge) || self.bridge.len() > 15 {
            return refuse(
                "network.bridge",
                "must be `auto` or 1 to 15 letters, digits, '-', '_' or '.'",
            );
        }
        if self.ipv4 == Wished::None && self.ipv6 == Wished::None {
            return refuse("network.ipv6", "a network needs at least one family");
        }
        if let Wished::This(net) = self.ipv4
            && (net.prefix_len() > 30 || net.prefix_len() < 8)
        {
            return refuse("network.ipv4", "must have a prefix length of 8 to 30");
        }
        if let Wished::This(net) = self.ipv6
            && (net.prefix_len() > 126 || net.prefix_len() < 16)
        {
            return refuse("network.ipv6", "must have a prefix length of 16 to 126");
        }
        if self.mtu != 0 && !(1280..=65535).contains(&self.mtu) {
            return refuse("network.mtu", "must be 0 or 1280 to 65535");
        }
        self.cni.validate()
    }

    /// The record that this configuration asks for.
    ///
    /// `kept` is the record that exists; what it chose by itself stays chosen. `free` says
    /// whether a candidate overlaps nothing on the host.
    ///
    /// # Errors
    /// `NoSubnet` if no candidate is free.
    pub(super) fn choose(
        &self,
        instance: &InstanceId,
        kept: Option<&Network>,
        free: impl Fn(Ipv4Net) -> bool,
    ) -> Result<Network, NetworkError> {
        let ipv4 = match (self.ipv4, kept.and_then(|kept| kept.ipv4)) {
            (Wished::None, _) => None,
            (Wished::This(net), _) => Some(net.trunc()),
            (Wished::Auto, Some(net)) => Some(net),
            (Wished::Auto, None) => Some(
                CANDIDATES
                    .iter()
                    .map(|text| text.parse().expect("a literal subnet"))
                    .find(|net| free(*net))
                    .ok_or(NetworkError::NoSubnet)?,
            ),
        };
        let ipv6 = match (self.ipv6, kept.and_then(|kept| kept.ipv6)) {
            (Wished::None, _) => None,
            (Wished::This(net), _) => Some(net.trunc()),
            (Wished::Auto, Some(net)) => Some(net),
            (Wished::Auto, None) => Some(unique_local(instance, &self.name)),
        };
        let bridge = match (self.bridge.as_str(), kept) {
            ("auto", Some(kept)) => kept.bridge.clone(),
            ("auto", None) => format!("ls-{instance}"),
            (name, _) => name.to_owned(),
        };
        Ok(Network {
            name: self.name.clone(),
            bridge,
            ipv4,
            ipv6,
        })
    }
}

/// A unique local /64: the instance is as random as the 40 bits of a global id want.
///
/// Source: RFC 4193, section 3.2.
fn unique_local(instance: &InstanceId, network: &str) -> Ipv6Net {
    let digest = Digest::of(format!("{instance}/{network}").as_bytes());
    let bits = u128::from_str_radix(&digest.hex()[..14], 16).expect("a digest is hexadecimal");
    let prefix = (0xfd_u128 << 120) | (bits << 64);
    Ipv6Net::new(prefix.into(), 64).expect("64 is a prefix length")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance() -> InstanceId {
        "0badcafe".parse().expect("an id")
    }

    #[test]
    fn defaults_run_and_round_trip() {
        let config: NetworkChapterConfig = toml::from_str("").expect("all keys have defaults");
        assert_eq!(config, NetworkChapterConfig::default());
        config.validate().expect("defaults are valid");
        let text = toml::to_string(&config).expect("configuration is data");
        assert_eq!(
            toml::from_str::<NetworkChapterConfig>(&text).expect("same type"),
            config
        );
        assert!(toml::from_str::<NetworkChapterConfig>("ipv5 = 'auto'").is_err());
        assert!(toml::from_str::<NetworkChapterConfig>("ipv4 = '10.0.0.0'").is_err());
    }

    #[test]
    fn impossible_configuration_names_its_key() {
        let check = |text: &str, key: Option<&str>| {
            let config: NetworkChapterConfig = toml::from_str(text).expect("parses");
            let found = match config.validate() {
                Ok(()) => None,
                Err(NetworkError::Config { key, .. }) => Some(key),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(found, key, "{text}");
        };
        check("ipv4 = '10.1.0.0/24'", None);
        check("ipv4 = '10.1.0.0/31'", Some("network.ipv4"));
        check("ipv6 = 'fd00::/127'", Some("network.ipv6"));
        check("ipv4 = 'none'", None);
        check("ipv4 = 'none'\nipv6 = 'none'", Some("network.ipv6"));
        check(
            "bridge = 'a-name-too-long-for-linux'",
            Some("network.bridge"),
        );
        check("bridge = '../x'", Some("network.bridge"));
        check("name = ''", Some("network.name"));
        check("name = 'a/b'", Some("network.name"));
        check("mtu = 500", Some("network.mtu"));
        check("mode = 'cni'\n[cni]\ntimeout = '5s'", None);
        check("[cni]\nconf_dir = 'net.d'", Some("network.cni.conf_dir"));
        check("[cni]\nbin_dirs = []", Some("network.cni.bin_dirs"));
        check("[cni]\nbin_dirs = ['/a:/b']", Some("network.cni.bin_dirs"));
        check("[cni]\ntimeout = '10ms'", Some("network.cni.timeout"));
    }

    #[test]
    fn candidates_fall_through_and_choices_stay() {
        let config = NetworkChapterConfig::default();
        let first = config.choose(&instance(), None, |_| true).expect("free");
        assert_eq!(first.bridge, "ls-0badcafe");
        assert_eq!(
            first.ipv4.map(|net| net.to_string()).as_deref(),
            Some("10.88.0.0/16")
        );
        let v6 = first.ipv6.expect("has one");
        assert!(
            v6.to_string().starts_with("fd") && v6.prefix_len() == 64,
            "{v6}"
        );

        let taken: Ipv4Net = "10.88.0.0/15".parse().expect("a subnet");
        let second = config
            .choose(&instance(), None, |net| !taken.contains(&net))
            .expect("free");
        assert_eq!(
            second.ipv4.map(|net| net.to_string()).as_deref(),
            Some("10.188.0.0/16")
        );

        let kept = config.choose(&instance(), Some(&second), |_| true);
        assert_eq!(kept.ok(), Some(second));
        let none = config.choose(&instance(), None, |_| false);
        assert!(matches!(none, Err(NetworkError::NoSubnet)));
    }
}
