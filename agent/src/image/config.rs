//! The `[image]` chapter of the configuration.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::source::hosts::HostsConfig;
use super::source::remotes::RemotesConfig;
use super::source::rounds::Timing;
use crate::rootfs::Limits;

/// How images are pulled and kept.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageChapterConfig {
    /// Registries and mirrors, by host.
    pub hosts: HostsConfig,
    /// Servers of distributions' images, by name.
    pub remotes: RemotesConfig,
    /// Layers of one pull that are fetched and unpacked at once; at least 1.
    pub parallel_layers: usize,
    /// How long connecting to a registry may take.
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    /// How long a registry may send nothing before the request has failed.
    #[serde(deserialize_with = "duration")]
    pub stall_timeout: Duration,
    /// How often a request is tried at each endpoint before it has failed; at least 1.
    pub attempts: u32,
    /// Pause before the second try; it doubles with each one, up to 10 s.
    #[serde(deserialize_with = "duration")]
    pub first_backoff: Duration,
    /// Keep compressed layers after unpacking, so that a push sends the very same bytes.
    pub keep_blobs: bool,
    /// Partial blobs that no pull has touched for so long are removed at the next start.
    #[serde(deserialize_with = "duration")]
    pub partial_blob_age: Duration,
    /// Most content that one layer may unpack to.
    #[serde(deserialize_with = "size")]
    pub layer_content_max: u64,
    /// Most files, directories and links in one layer.
    pub layer_entries_max: u64,
}

impl Default for ImageChapterConfig {
    fn default() -> Self {
        let limits = Limits::default();
        ImageChapterConfig {
            hosts: HostsConfig::default(),
            remotes: RemotesConfig::default(),
            parallel_layers: 4,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            attempts: 4,
            first_backoff: Duration::from_millis(200),
            keep_blobs: false,
            partial_blob_age: Duration::from_secs(24 * 3600),
            layer_content_max: limits.content_bytes,
            layer_entries_max: limits.entries,
        }
    }
}

impl ImageChapterConfig {
    pub(super) fn timing(&self) -> Timing {
        Timing {
            connect: self.connect_timeout,
            stall: self.stall_timeout,
            attempts: self.attempts.max(1),
            first_backoff: self.first_backoff,
        }
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            content_bytes: self.layer_content_max,
            entries: self.layer_entries_max,
            ..Limits::default()
        }
    }
}

/// Reads `"30s"`, `"1m 30s"`, `"500ms"`.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    jiff::fmt::serde::unsigned_duration::required::deserialize(deserializer)
}

/// Reads `"64GiB"`, `"512MiB"`, `"1000B"` or a number of bytes.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    let text = match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => return Ok(bytes),
        Size::Text(text) => text,
    };
    parse_size(&text).ok_or_else(|| {
        serde::de::Error::custom(format!("`{text}` is not a size such as \"16MiB\""))
    })
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_chapter_is_read_with_units_and_without_unknown_keys() {
        let text = r#"
            parallel_layers = 2
            stall_timeout = "90s"
            first_backoff = "50ms"
            layer_content_max = "2GiB"
            [hosts."docker.io"]
            mirrors = ["localhost:5000"]
        "#;
        let config: ImageChapterConfig = toml::from_str(text).unwrap();
        assert_eq!(config.parallel_layers, 2);
        assert_eq!(config.stall_timeout, Duration::from_secs(90));
        assert_eq!(config.first_backoff, Duration::from_millis(50));
        assert_eq!(config.layer_content_max, 2 << 30);
        assert_eq!(config.limits().content_bytes, 2 << 30);
        assert_eq!(config.hosts.0["docker.io"].mirrors, ["localhost:5000"]);
        assert_eq!(
            toml::from_str::<ImageChapterConfig>("").unwrap(),
            ImageChapterConfig::default()
        );
        for bad in [
            "parallel = 1",
            "stall_timeout = \"-1s\"",
            "layer_content_max = \"2XB\"",
            "stall_timeout = 3",
        ] {
            assert!(toml::from_str::<ImageChapterConfig>(bad).is_err(), "{bad}");
        }
    }
}
