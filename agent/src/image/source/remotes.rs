//! Servers of distributions' images, by the names that the configuration gives them.
//!
//! ```toml
//! [image.remotes.images]
//! url = "https://images.example"     # may have a path
//! protocol = "simplestreams"         # or "lxc": the layout of LXC's download template
//! ```
//! How a server is spoken to (its CA, plain HTTP) is in the table of its host in `image.hosts`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

use super::hosts::HostsConfig;
use super::http::Http;
use super::server::Server;
use super::{lxc, simplestreams};
use crate::image::error::ImageError;
use crate::image::system::catalog::Catalog;
use crate::image::system::reference::is_remote_name;

/// The tables by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct RemotesConfig(pub BTreeMap<String, RemoteConfig>);

/// One server of images.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteConfig {
    /// Where its files begin.
    pub url: String,
    /// How they lie there.
    #[serde(default)]
    pub protocol: Protocol,
}

/// How the files of a server lie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// `streams/v1/index.json`, and what it leads to.
    #[default]
    Simplestreams,
    /// `meta/1.0/index-system`, and a directory for each build.
    Lxc,
}

/// All remotes of this agent.
pub(crate) struct Remotes(BTreeMap<String, Arc<Remote>>);

/// One of them.
pub(crate) struct Remote {
    pub(crate) name: String,
    pub(crate) protocol: Protocol,
    pub(crate) server: Server,
}

impl Remotes {
    /// # Errors
    /// `RemoteConfig` naming the table and what is wrong there.
    pub(crate) fn new(
        config: &RemotesConfig,
        hosts: &HostsConfig,
        http: &Arc<Http>,
    ) -> Result<Remotes, ImageError> {
        let remote = |(name, config): (&String, &RemoteConfig)| {
            let wrong = |reason| ImageError::RemoteConfig {
                remote: name.clone(),
                reason,
            };
            if !is_remote_name(name) {
                let reason = "a remote is named by 1 to 32 of a-z, 0-9 and inner hyphens";
                return Err(wrong(reason.to_owned()));
            }
            let remote = Remote {
                name: name.clone(),
                protocol: config.protocol,
                server: Server::new(Arc::clone(http), &config.url, hosts).map_err(wrong)?,
            };
            Ok((name.clone(), Arc::new(remote)))
        };
        config
            .0
            .iter()
            .map(remote)
            .collect::<Result<_, _>>()
            .map(Remotes)
    }

    /// # Errors
    /// `UnknownRemote` with those that there are.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Remote>, ImageError> {
        self.0
            .get(name)
            .cloned()
            .ok_or_else(|| ImageError::UnknownRemote {
                name: name.to_owned(),
                known: self.0.keys().cloned().collect(),
            })
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = Arc<Remote>> {
        self.0.values().cloned()
    }
}

impl Remote {
    /// Asks what there is.
    ///
    /// # Errors
    /// Of the wire, `BadIndex`, `TooLarge`.
    pub(crate) async fn catalog(&self) -> Result<Catalog, ImageError> {
        match self.protocol {
            Protocol::Simplestreams => simplestreams::catalog(&self.server).await,
            Protocol::Lxc => lxc::catalog(&self.server).await,
        }
    }
}

/// The error for a document that is not what it should be.
pub(super) fn bad_index(
    url: &str,
    expected: &'static str,
    reason: impl ToString,
    bytes: &[u8],
) -> ImageError {
    let begin = &bytes[..bytes.len().min(32)];
    ImageError::BadIndex {
        url: url.to_owned(),
        expected,
        reason: reason.to_string(),
        begins: begin.escape_ascii().to_string(),
    }
}

/// A word of an index that can stand in names, labels and tables.
pub(super) fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.len() <= 128 && !text.chars().any(|c| c.is_control() || c == '/')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::source::rounds::Timing;

    fn remotes(toml: &str, hosts: &str) -> Result<Remotes, ImageError> {
        let http = Arc::new(Http::new(Timing {
            connect: Duration::from_secs(1),
            stall: Duration::from_secs(1),
            attempts: 1,
            first_backoff: Duration::from_millis(1),
        }));
        Remotes::new(
            &toml::from_str(toml).unwrap(),
            &toml::from_str(hosts).unwrap(),
            &http,
        )
    }

    #[test]
    fn bad_tables_are_refused_with_their_name() {
        for (toml, word) in [
            (
                "[Images]\nurl = 'https://a'",
                "image.remotes.Images: a remote is named",
            ),
            ("[a]\nurl = 'a.example'", "image.remotes.a: url `a.example`"),
            ("[a]\nurl = 'ftp://a'", "neither http"),
            ("[a]\nurl = 'https://u:p@a'", "is not https://host"),
            ("[a]\nurl = 'https://a?x=1'", "is not https://host"),
            (
                "[a]\nurl = 'http://a.example'",
                "plain_http in image.hosts.\"a.example\"",
            ),
        ] {
            let error = remotes(toml, "").err().unwrap().to_string();
            assert!(error.contains(word), "{toml}: {error}");
        }
        let plain = "['a.example']\nplain_http = true";
        assert!(remotes("[a]\nurl = 'http://a.example'", plain).is_ok());
        assert!(remotes("[a]\nurl = 'http://127.0.0.1:1/x'", "").is_ok());
        for unknown in ["[a]\nurl = 'https://a'\nprotocol = 'ftp'", "[a]\nuri = 'x'"] {
            assert!(toml::from_str::<RemotesConfig>(unknown).is_err());
        }
        let all = remotes("[a]\nurl = 'https://a'\n[b]\nurl = 'https://b'", "").unwrap();
        assert_eq!(
            all.get("c").err().unwrap().to_string(),
            "no remote `c` is configured in image.remotes; there are: a, b"
        );
    }

    #[test]
    fn paths_stay_below_the_url() {
        let all = remotes("[a]\nurl = 'https://a.example/top/'", "").unwrap();
        let server = &all.get("a").unwrap().server;
        assert_eq!(
            server
                .url("images/x/20261124_05:24/root fs?.tar")
                .unwrap()
                .as_str(),
            "https://a.example/top/images/x/20261124_05:24/root%20fs%3F.tar"
        );
        assert_eq!(
            server.url("/x").unwrap().as_str(),
            "https://a.example/top/x"
        );
        for bad in ["", "/", "../x", "a/../../x", "a/./b", "a\nb"] {
            assert!(server.url(bad).is_err(), "{bad:?}");
        }
    }
}
