//! Where a registry's content is asked for: one table per host, mirrors first.
//!
//! ```toml
//! [image.hosts."docker.io"]
//! mirrors = ["mirror.example:5000", "https://other.example"]   # tried in this order, then the server
//! server = "https://registry-1.docker.io"                      # where the host itself is, if elsewhere
//!
//! [image.hosts."mirror.example:5000"]
//! ca = "/etc/longshore/mirror-ca.pem"       # trusted for this host, beside the system's
//! plain_http = false                        # true: speak HTTP without TLS
//! skip_verify = false                       # true: accept any certificate
//! ```
//! A mirror is asked for the same repository path, with the settings of its own table. Plain HTTP is
//! spoken without being asked for to loopback addresses only.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;

use serde::Deserialize;

use crate::image::error::ImageError;

/// The tables by host, as hosts are written in references (`docker.io`, `localhost:5000`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct HostsConfig(pub BTreeMap<String, HostConfig>);

/// One host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostConfig {
    /// Tried first, in order: `host[:port]`, or with `http://` or `https://` before it.
    pub mirrors: Vec<String>,
    /// Where the host itself is reached, written like a mirror; the host's own name if absent.
    pub server: Option<String>,
    /// Speak HTTP without TLS; unset, it is done for loopback addresses only.
    pub plain_http: Option<bool>,
    /// PEM file of authorities that are trusted for this host, beside those of the system.
    pub ca: Option<PathBuf>,
    /// Accept any certificate of this host.
    pub skip_verify: bool,
    /// As a mirror, also get the credentials that a caller gave for the mirrored registry.
    pub send_credentials: bool,
}

/// A place to ask: scheme and authority, with how to speak to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Endpoint {
    /// `http` or `https`.
    pub(crate) scheme: &'static str,
    /// Host and optional port.
    pub(crate) authority: String,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) skip_verify: bool,
    /// May the caller's credentials go there?
    pub(crate) trusted: bool,
}

impl Endpoint {
    /// Returns scheme and authority.
    pub(crate) fn base(&self) -> String {
        format!("{}://{}", self.scheme, self.authority)
    }

    pub(crate) fn is_loopback(&self) -> bool {
        is_loopback(&self.authority)
    }
}

impl HostsConfig {
    /// Checks every table.
    ///
    /// # Errors
    /// `Config` naming the table and what is wrong there.
    pub fn check(&self) -> Result<(), ImageError> {
        for (host, config) in &self.0 {
            let places = std::iter::once(host)
                .chain(&config.mirrors)
                .chain(&config.server);
            for place in places {
                split_place(place).map_err(|reason| ImageError::Config {
                    host: host.clone(),
                    reason,
                })?;
            }
            if config.plain_http == Some(true) && (config.ca.is_some() || config.skip_verify) {
                let reason = "plain_http excludes ca and skip_verify".to_owned();
                return Err(ImageError::Config {
                    host: host.clone(),
                    reason,
                });
            }
        }
        Ok(())
    }

    /// Returns where to ask for `registry`: its mirrors in order, then itself.
    ///
    /// # Errors
    /// `Config` for a table that `check` would refuse.
    pub(crate) fn endpoints(&self, registry: &str) -> Result<Vec<Endpoint>, ImageError> {
        let empty = HostConfig::default();
        let table = self.0.get(registry).unwrap_or(&empty);
        let config_error = |reason| ImageError::Config {
            host: registry.to_owned(),
            reason,
        };
        let mut endpoints = Vec::new();
        for mirror in &table.mirrors {
            let (_, host) = split_place(mirror).map_err(config_error)?;
            let settings = self.0.get(host).unwrap_or(&empty);
            let trusted = settings.send_credentials;
            endpoints.push(endpoint(mirror, settings, trusted).map_err(config_error)?);
        }
        let server = table
            .server
            .as_deref()
            .unwrap_or(well_known_server(registry));
        endpoints.push(endpoint(server, table, true).map_err(config_error)?);
        Ok(endpoints)
    }
}

impl HostsConfig {
    /// Returns how to speak to the server of `url`, whose scheme says it, within what its table allows.
    ///
    /// # Errors
    /// What is wrong with the scheme.
    pub(crate) fn endpoint_of(&self, url: &reqwest::Url) -> Result<Endpoint, String> {
        let host = url.host_str().unwrap_or_default();
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let empty = HostConfig::default();
        let settings = self.0.get(&authority).unwrap_or(&empty);
        let place = endpoint(&format!("{}://{authority}", url.scheme()), settings, true)
            .map_err(|_| format!("url `{url}` is neither http:// nor https://"))?;
        let plain_allowed = is_loopback(&authority) || settings.plain_http == Some(true);
        if place.scheme == "http" && !plain_allowed {
            return Err(format!(
                "url `{url}` is plain HTTP, which only plain_http in image.hosts.\"{authority}\" can allow"
            ));
        }
        Ok(place)
    }
}

/// Docker Hub is the one registry whose name is not where it is.
fn well_known_server(registry: &str) -> &str {
    if registry == "docker.io" {
        "registry-1.docker.io"
    } else {
        registry
    }
}

fn endpoint(place: &str, settings: &HostConfig, trusted: bool) -> Result<Endpoint, String> {
    let (scheme, authority) = split_place(place)?;
    let wants_tls = settings.ca.is_some() || settings.skip_verify;
    let scheme = match (scheme, settings.plain_http) {
        (Some(scheme), _) => scheme,
        (None, Some(true)) => "http",
        (None, None) if !wants_tls && is_loopback(authority) => "http",
        (None, _) => "https",
    };
    Ok(Endpoint {
        scheme,
        authority: authority.to_owned(),
        ca: settings.ca.clone(),
        skip_verify: settings.skip_verify,
        trusted,
    })
}

fn split_place(place: &str) -> Result<(Option<&'static str>, &str), String> {
    let (scheme, authority) = if let Some(rest) = place.strip_prefix("https://") {
        (Some("https"), rest)
    } else if let Some(rest) = place.strip_prefix("http://") {
        (Some("http"), rest)
    } else {
        (None, place)
    };
    let valid = reqwest::Url::parse(&format!("https://{authority}/"))
        .is_ok_and(|url| url.path() == "/" && url.query().is_none() && url.username().is_empty());
    if authority.is_empty() || authority.contains(['/', '@', '?', '#', ' ']) || !valid {
        return Err(format!(
            "`{place}` is not host[:port], with or without http:// or https:// before it"
        ));
    }
    Ok((scheme, authority))
}

/// Tells whether `authority` (host and optional port) names this machine itself.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    };
    if host == "localhost" {
        return true;
    }
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => address.is_loopback(),
        Ok(IpAddr::V6(address)) => address == Ipv6Addr::LOCALHOST,
        Err(_) => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn bases(toml: &str, registry: &str) -> Vec<String> {
        let hosts: HostsConfig = toml::from_str(toml).unwrap();
        hosts.check().unwrap();
        hosts
            .endpoints(registry)
            .unwrap()
            .iter()
            .map(Endpoint::base)
            .collect()
    }

    #[test]
    fn plain_http_is_for_loopback_unless_configured() {
        let table = [
            ("", "localhost:5000", "http://localhost:5000"),
            ("", "127.0.0.1:5000", "http://127.0.0.1:5000"),
            ("", "127.9.9.9", "http://127.9.9.9"),
            ("", "[::1]:5000", "http://[::1]:5000"),
            ("", "[::2]:5000", "https://[::2]:5000"),
            ("", "10.0.0.1:5000", "https://10.0.0.1:5000"),
            (
                "",
                "localhost.evil.example",
                "https://localhost.evil.example",
            ),
            (
                "",
                "127.0.0.1.evil.example",
                "https://127.0.0.1.evil.example",
            ),
            ("", "docker.io", "https://registry-1.docker.io"),
            (
                "['reg.example']\nplain_http = true",
                "reg.example",
                "http://reg.example",
            ),
            (
                "['reg.example']\nserver = 'http://b'",
                "reg.example",
                "http://b",
            ),
            (
                "['localhost:5000']\nplain_http = false",
                "localhost:5000",
                "https://localhost:5000",
            ),
            (
                "['localhost:5000']\nca = '/ca.pem'",
                "localhost:5000",
                "https://localhost:5000",
            ),
            (
                "['localhost:5000']\nskip_verify = true",
                "localhost:5000",
                "https://localhost:5000",
            ),
        ];
        for (toml, registry, expected) in table {
            assert_eq!(bases(toml, registry), [expected], "{toml} {registry}");
        }
    }

    #[test]
    fn mirrors_come_first_with_their_own_settings() {
        let toml = "
            ['docker.io']
            mirrors = ['m1:5000', 'http://m2', 'localhost:1']
            ['m1:5000']
            plain_http = true
        ";
        assert_eq!(
            bases(toml, "docker.io"),
            [
                "http://m1:5000",
                "http://m2",
                "http://localhost:1",
                "https://registry-1.docker.io"
            ]
        );
        let hosts: HostsConfig = toml::from_str(toml).unwrap();
        let trusted: Vec<bool> = hosts
            .endpoints("docker.io")
            .unwrap()
            .iter()
            .map(|e| e.trusted)
            .collect();
        assert_eq!(trusted, [false, false, false, true]);
    }

    #[test]
    fn bad_tables_are_refused_with_their_name() {
        let table = [
            "['a']\nmirrors = ['http://b/path']",
            "['a']\nmirrors = ['user@b']",
            "['a']\nserver = ''",
            "['a']\nserver = 'ftp://b'",
            "['a/b']\nskip_verify = true",
            "['a']\nplain_http = true\nskip_verify = true",
        ];
        for toml in table {
            let hosts: HostsConfig = toml::from_str(toml).unwrap();
            let error = hosts.check().unwrap_err().to_string();
            assert!(error.starts_with("image.hosts.\"a"), "{toml}: {error}");
        }
        assert!(toml::from_str::<HostsConfig>("['a']\nskipverify = true").is_err());
    }
}
