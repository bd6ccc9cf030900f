//! `longshored.toml`: one table per chapter, collected. Unknown keys are refused; defaults run.

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    cgroup::CgroupChapterConfig,
    handler::{HandlerChapterConfig, RuntimeConfig},
    image::ImageChapterConfig,
    lifecycle::LifecycleChapterConfig,
    network::NetworkChapterConfig,
};

/// Where the file is looked for unless `--config` says otherwise; it may be missing there.
pub const DEFAULT_PATH: &str = "/etc/longshore/longshored.toml";

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Images, layers, writable layers, the store. Absolute.
    pub data_dir: PathBuf,
    /// Sockets, namespaces, supervisors; gone after a reboot. Absolute.
    pub run_dir: PathBuf,
    /// Where the API is served beside the unix socket.
    pub server: ServerConfig,
    /// Exec, attach and port-forward of CRI.
    pub streaming: StreamingConfig,
    /// Cgroups.
    pub cgroup: CgroupChapterConfig,
    /// The engine of our own.
    pub handler: HandlerChapterConfig,
    /// OCI runtimes by the names that pods give as their handler.
    pub handlers: BTreeMap<String, RuntimeConfig>,
    /// Images.
    pub image: ImageChapterConfig,
    /// Sandboxes and containers.
    pub lifecycle: LifecycleChapterConfig,
    /// Networks.
    pub network: NetworkChapterConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/longshore".into(),
            run_dir: "/run/longshore".into(),
            server: ServerConfig::default(),
            streaming: StreamingConfig::default(),
            cgroup: CgroupChapterConfig::default(),
            handler: HandlerChapterConfig::default(),
            handlers: BTreeMap::new(),
            image: ImageChapterConfig::default(),
            lifecycle: LifecycleChapterConfig::default(),
            network: NetworkChapterConfig::default(),
        }
    }
}

/// Where the API is served beside the unix socket.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// TCP address; without `tls` only loopback addresses.
    pub listen: Option<SocketAddr>,
    /// Mutual TLS for that address.
    pub tls: Option<TlsConfig>,
}

/// Mutual TLS: every client shows a certificate.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM certificate chain of this agent.
    pub certificate: PathBuf,
    /// PEM key of it.
    pub key: PathBuf,
    /// PEM certificates of those who sign clients.
    pub client_ca: PathBuf,
}

/// How CRI's exec, attach and port-forward are served.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamingConfig {
    /// With it, the URLs begin with `https`.
    pub tls: Option<StreamingTlsConfig>,
}

/// What the streaming server shows its clients; a token is what they show it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamingTlsConfig {
    /// PEM certificate chain, for 127.0.0.1.
    pub certificate: PathBuf,
    /// PEM key of it.
    pub key: PathBuf,
}

/// Why the configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: {source}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value is not usable.
    #[error("{field} = {value:?}: {expected}")]
    Value {
        /// Which.
        field: &'static str,
        /// As given.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
}

impl Config {
    /// Reads the file at `path`; without one, the default file if it is there.
    ///
    /// # Errors
    /// `Read` for a named file that is missing, `Parse` with line and column.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, named) = path.map_or((Path::new(DEFAULT_PATH), false), |path| (path, true));
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !named => {
                return Ok(Self::default());
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.into(),
                    source,
                });
            }
        };
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source: Box::new(source),
        })
    }

    /// Checks what a single table can't.
    ///
    /// # Errors
    /// `Value` names the field and what would be valid.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, path) in [("data_dir", &self.data_dir), ("run_dir", &self.run_dir)] {
            if !path.is_absolute() {
                return Err(ConfigError::Value {
                    field,
                    value: path.display().to_string(),
                    expected: "an absolute path is needed",
                });
            }
        }
        match self.server.listen {
            Some(address) if self.server.tls.is_none() && !address.ip().is_loopback() => {
                Err(ConfigError::Value {
                    field: "server.listen",
                    value: address.to_string(),
                    expected: "who reaches this address rules the host: set server.tls, or use a loopback address",
                })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_means_the_defaults() {
        let config: Config = toml::from_str("").expect("empty is valid");
        assert_eq!(config.run_dir, Path::new("/run/longshore"));
        assert!(config.validate().is_ok());
    }

    #[test]
    fn handlers_have_a_name_and_a_program() {
        let config: Config =
            toml::from_str("[handlers.mine]\nkind = 'oci'\npath = '/x'").expect("is valid");
        let mine = config.handlers.get("mine").expect("is there");
        assert_eq!(mine.path.as_deref(), Some(Path::new("/x")));
    }

    #[test]
    fn what_is_unknown_or_dangerous_is_refused() {
        assert!(toml::from_str::<Config>("dara_dir = '/x'").is_err());
        assert!(toml::from_str::<Config>("[network]\nbridg = 'x'").is_err());
        assert!(toml::from_str::<Config>("[handlers.x]\nkind = 'kata'").is_err());
        let open: Config = toml::from_str("[server]\nlisten = '0.0.0.0:4000'").expect("parses");
        assert!(matches!(
            open.validate(),
            Err(ConfigError::Value {
                field: "server.listen",
                ..
            })
        ));
        let relative: Config = toml::from_str("data_dir = 'x'").expect("parses");
        assert!(matches!(
            relative.validate(),
            Err(ConfigError::Value {
                field: "data_dir",
                ..
            })
        ));
    }
}
