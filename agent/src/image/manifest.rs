//! Manifests and configurations: from bytes whose digest is verified to what a pull needs.
//!
//! Everything here comes from strangers, so each document is of exactly one kind, each type is one
//! that we know, and each count agrees. The raw bytes are what is stored; these are parsed copies.
//!
//! Source: OCI image specification 1.1 (index, manifest, descriptor, config); docker's image
//! manifest version 2, schema 2.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};
use serde::{Deserialize, Serialize};

use super::error::ImageError;
use super::image::ImageConfig;
use crate::id::Digest;

/// Largest manifest or index, as registries have it too.
pub(crate) const MANIFEST_MAX_BYTES: u64 = 4 << 20;
/// Largest image configuration.
pub(crate) const CONFIG_MAX_BYTES: u64 = 8 << 20;
/// Most layers: what overlayfs takes on every kernel that we support.
pub(crate) const LAYERS_MAX: usize = 500;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1";

/// What a manifest request accepts.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// An operating system and a processor that an image is built for, e.g. `linux/arm64/v8`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// As Go names it, e.g. `linux`.
    pub os: String,
    /// As Go names it, e.g. `amd64`.
    pub architecture: String,
    /// e.g. `v7`.
    pub variant: Option<String>,
}

impl Platform {
    /// Returns the platform of this machine.
    pub fn host() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "riscv64" => "riscv64",
            other => other,
        };
        Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: None,
        }
    }

    /// Returns how well something built for `offered` runs here: 0 is best, `None` not at all.
    pub(crate) fn distance(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        let level = |platform: &Platform| match (&platform.variant, platform.architecture.as_str())
        {
            (Some(variant), _) if !variant.is_empty() => {
                variant.strip_prefix('v')?.parse::<u32>().ok()
            }
            (_, "arm") => Some(7),
            (_, "arm64") => Some(8),
            _ => Some(1),
        };
        match (level(self), level(offered)) {
            // A processor runs what is built for its elders.
            (Some(have), Some(need)) => have.checked_sub(need),
            _ => (self.variant == offered.variant).then_some(0),
        }
    }

    /// Indexes carry attestations as manifests for a platform that nothing has.
    fn is_real(&self) -> bool {
        self.os != "unknown" && self.architecture != "unknown"
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) if !variant.is_empty() => write!(f, "/{variant}"),
            _ => Ok(()),
        }
    }
}

/// The text is not `os/architecture[/variant]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("platform `{value}` is not os/architecture[/variant], e.g. linux/amd64")]
pub struct PlatformError {
    /// The text.
    pub value: String,
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let parts: Vec<&str> = text.split('/').collect();
        let valid = |part: &&str| {
            !part.is_empty() && part.len() <= 64 && part.bytes().all(|b| b.is_ascii_alphanumeric())
        };
        let error = || PlatformError {
            value: text.chars().take(80).collect(),
        };
        if !parts.iter().all(valid) {
            return Err(error());
        }
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant.to_owned())),
            _ => return Err(error()),
        };
        Ok(Platform {
            os: os.into(),
            architecture: architecture.into(),
            variant,
        })
    }
}

/// Content by digest and size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) digest: Digest,
    pub(crate) size_bytes: u64,
}

/// How a layer's tar is wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
    /// Also the older lzma; no layer of a registry has it.
    Xz,
}

/// One layer as the manifest names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerDescriptor {
    pub(crate) blob: Descriptor,
    pub(crate) compression: Compression,
}

/// A manifest of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    /// Base first.
    pub(crate) layers: Vec<LayerDescriptor>,
}

/// An entry of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub(crate) digest: Digest,
    pub(crate) platform: Option<Platform>,
}

/// What a manifest request is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Index(Vec<IndexEntry>),
    Manifest(Manifest),
}

/// Just enough of a document to tell its kind.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u32>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// Parses an index or a manifest; `media_type` is what the registry said, `what` names it in errors.
///
/// # Errors
/// `Schema1`, `Malformed`, `UnsupportedMediaType`, `ForeignLayer`.
pub(crate) fn parse(
    bytes: &[u8],
    media_type: Option<&str>,
    reference: &str,
    what: &str,
) -> Result<Document, ImageError> {
    let malformed = |reason: String| ImageError::Malformed {
        what: what.to_owned(),
        reason,
    };
    let probe: Probe =
        serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let named = probe
        .media_type
        .as_deref()
        .filter(|named| !named.is_empty());
    if probe.schema_version == Some(1)
        || probe.fs_layers.is_some()
        || named
            .or(media_type)
            .is_some_and(|named| named.starts_with(SCHEMA_1))
    {
        return Err(ImageError::Schema1 {
            reference: reference.to_owned(),
        });
    }
    // A document that is two things at once means something else to each reader (CVE-2021-41190).
    let is_index = probe.manifests.is_some();
    if is_index && (probe.layers.is_some() || probe.config.is_some()) {
        return Err(malformed(
            "it is an index and a manifest at once".to_owned(),
        ));
    }
    match named {
        None => {}
        Some(OCI_INDEX | DOCKER_INDEX) if is_index => {}
        Some(OCI_MANIFEST | DOCKER_MANIFEST) if !is_index => {}
        Some(OCI_INDEX | DOCKER_INDEX | OCI_MANIFEST | DOCKER_MANIFEST) => {
            return Err(malformed(
                "its media type is that of another document".to_owned(),
            ));
        }
        Some(other) => {
            let media_type = shorten(other);
            return Err(ImageError::UnsupportedMediaType {
                what: what.to_owned(),
                media_type,
            });
        }
    }
    if is_index {
        parse_index(bytes, &malformed).map(Document::Index)
    } else {
        parse_manifest(bytes, what, &malformed).map(Document::Manifest)
    }
}

fn parse_index(
    bytes: &[u8],
    malformed: &dyn Fn(String) -> ImageError,
) -> Result<Vec<IndexEntry>, ImageError> {
    let index: ImageIndex =
        serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let mut entries = Vec::new();
    for entry in index.manifests() {
        let platform = entry.platform().as_ref().map(|platform| Platform {
            os: platform.os().to_string(),
            architecture: platform.architecture().to_string(),
            variant: platform.variant().clone(),
        });
        let digest = entry.digest().to_string().parse().map_err(|_| {
            malformed(format!(
                "digest `{}` is not sha256",
                shorten(entry.digest().as_ref())
            ))
        })?;
        entries.push(IndexEntry { digest, platform });
    }
    Ok(entries)
}

fn parse_manifest(
    bytes: &[u8],
    what: &str,
    malformed: &dyn Fn(String) -> ImageError,
) -> Result<Manifest, ImageError> {
    let manifest: ImageManifest =
        serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let config_type = manifest.config().media_type().to_string();
    if !matches!(
        config_type.as_str(),
        "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
    ) {
        let what = format!("configuration of {what}");
        return Err(ImageError::UnsupportedMediaType {
            what,
            media_type: shorten(&config_type),
        });
    }
    if manifest.layers().len() > LAYERS_MAX {
        return Err(malformed(format!(
            "{} layers, at most {LAYERS_MAX} can be mounted",
            manifest.layers().len()
        )));
    }
    let config = descriptor(manifest.config(), malformed)?;
    let mut layers = Vec::new();
    for layer in manifest.layers() {
        let blob = descriptor(layer, malformed)?;
        let compression = compression(layer.media_type().as_ref(), &blob.digest)?;
        layers.push(LayerDescriptor { blob, compression });
    }
    Ok(Manifest { config, layers })
}

fn descriptor(
    from: &oci_spec::image::Descriptor,
    malformed: &dyn Fn(String) -> ImageError,
) -> Result<Descriptor, ImageError> {
    let digest = from.digest().to_string();
    let digest = digest
        .parse()
        .map_err(|_| malformed(format!("digest `{}` is not sha256", shorten(&digest))))?;
    // Sizes are signed in Go, so nothing honest is larger.
    if i64::try_from(from.size()).is_err() {
        return Err(malformed(format!("{digest} has an impossible size")));
    }
    Ok(Descriptor {
        digest,
        size_bytes: from.size(),
    })
}

fn compression(media_type: &str, digest: &Digest) -> Result<Compression, ImageError> {
    match media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Compression::None),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Compression::Gzip),
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Compression::Zstd),
        foreign
            if foreign.starts_with("application/vnd.oci.image.layer.nondistributable.")
                || foreign.starts_with("application/vnd.docker.image.rootfs.foreign.") =>
        {
            Err(ImageError::ForeignLayer {
                digest: digest.clone(),
                media_type: shorten(foreign),
            })
        }
        other => Err(ImageError::UnsupportedMediaType {
            what: format!("layer {digest}"),
            media_type: shorten(other),
        }),
    }
}

fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(128).collect()
}

/// Chooses the entry of an index that runs best on `wanted`.
///
/// # Errors
/// `NoPlatform` with what there is.
pub(crate) fn choose<'a>(
    entries: &'a [IndexEntry],
    wanted: &Platform,
    reference: &str,
) -> Result<&'a IndexEntry, ImageError> {
    let fits = |entry: &&IndexEntry| {
        entry
            .platform
            .as_ref()
            .and_then(|offered| wanted.distance(offered))
    };
    let best = entries
        .iter()
        .filter_map(|entry| Some((fits(&entry)?, entry)))
        .min_by_key(|(distance, _)| *distance);
    if let Some((_, entry)) = best {
        return Ok(entry);
    }
    // One that does not say is taken if it is alone; its configuration is checked later.
    let mut silent = entries.iter().filter(|entry| entry.platform.is_none());
    if let (Some(entry), None) = (silent.next(), silent.next()) {
        return Ok(entry);
    }
    let mut available: Vec<Platform> = entries
        .iter()
        .filter_map(|entry| entry.platform.clone())
        .filter(Platform::is_real)
        .collect();
    available.sort();
    available.dedup();
    available.truncate(64);
    Err(ImageError::NoPlatform {
        reference: reference.to_owned(),
        wanted: wanted.clone(),
        available,
    })
}

/// Parses a configuration and checks it against its manifest; returns it with the diff IDs, base first.
///
/// # Errors
/// `Malformed`, `LayerCount`, `NoPlatform`.
pub(crate) fn parse_config(
    bytes: &[u8],
    manifest: &Manifest,
    wanted: &Platform,
    reference: &str,
) -> Result<(ImageConfig, Vec<Digest>), ImageError> {
    let what = format!("configuration {}", manifest.config.digest);
    let malformed = |reason: String| ImageError::Malformed {
        what: what.clone(),
        reason,
    };
    let parsed: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let offered = Platform {
        os: parsed.os().to_string(),
        architecture: parsed.architecture().to_string(),
        variant: parsed.variant().clone(),
    };
    if wanted.distance(&offered).is_none() {
        let reference = reference.to_owned();
        return Err(ImageError::NoPlatform {
            reference,
            wanted: wanted.clone(),
            available: vec![offered],
        });
    }
    let mut diff_ids = Vec::new();
    for text in parsed.rootfs().diff_ids() {
        diff_ids.push(
            text.parse()
                .map_err(|_| malformed(format!("diff ID `{}` is not sha256", shorten(text))))?,
        );
    }
    if diff_ids.len() != manifest.layers.len() {
        return Err(ImageError::LayerCount {
            layers: manifest.layers.len(),
            diff_ids: diff_ids.len(),
        });
    }
    let mut contents: BTreeMap<&Digest, &Digest> = BTreeMap::new();
    for (layer, diff_id) in manifest.layers.iter().zip(&diff_ids) {
        if contents
            .insert(&layer.blob.digest, diff_id)
            .is_some_and(|other| other != diff_id)
        {
            return Err(malformed(format!(
                "layer {} has two diff IDs",
                layer.blob.digest
            )));
        }
    }
    let defaults = parsed.config().clone().unwrap_or_default();
    let config = ImageConfig {
        entrypoint: defaults.entrypoint().clone().unwrap_or_default(),
        cmd: defaults.cmd().clone().unwrap_or_default(),
        env: defaults.env().clone().unwrap_or_default(),
        working_dir: defaults.working_dir().clone().unwrap_or_default(),
        user: defaults.user().clone().unwrap_or_default(),
        stop_signal: defaults.stop_signal().clone(),
        labels: defaults
            .labels()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        exposed_ports: defaults.exposed_ports().iter().flatten().cloned().collect(),
        volumes: defaults.volumes().iter().flatten().cloned().collect(),
        platform: offered,
        created: parsed.created().clone(),
    };
    Ok((config, diff_ids))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    #[test]
    fn platforms_fit_their_elders() {
        let table = [
            ("linux/amd64", "linux/amd64", Some(0)),
            ("linux/amd64", "linux/amd64/v1", Some(0)),
            ("linux/amd64", "linux/amd64/v3", None),
            ("linux/amd64/v3", "linux/amd64/v2", Some(1)),
            ("linux/amd64", "linux/arm64", None),
            ("linux/amd64", "windows/amd64", None),
            ("linux/arm64", "linux/arm64/v8", Some(0)),
            ("linux/arm64/v8", "linux/arm64", Some(0)),
            ("linux/arm", "linux/arm/v7", Some(0)),
            ("linux/arm/v7", "linux/arm/v6", Some(1)),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/mips/odd", "linux/mips/odd", Some(0)),
            ("linux/mips/odd", "linux/mips", None),
        ];
        for (wanted, offered, expected) in table {
            assert_eq!(
                platform(wanted).distance(&platform(offered)),
                expected,
                "{wanted} on {offered}"
            );
        }
        for bad in [
            "",
            "linux",
            "linux/",
            "a/b/c/d",
            "linux/am d64",
            "linux/../x",
        ] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_best_entry_of_an_index_is_chosen() {
        let entry = |n: u8, text: Option<&str>| IndexEntry {
            digest: digest(n),
            platform: text.map(platform),
        };
        let arms = [
            entry(1, Some("linux/arm/v5")),
            entry(2, Some("linux/arm/v6")),
            entry(3, Some("linux/arm/v7")),
            entry(4, Some("unknown/unknown")),
        ];
        let chosen = |wanted: &str, from: &[IndexEntry]| {
            choose(from, &platform(wanted), "x").map(|e| e.digest.clone())
        };
        assert_eq!(chosen("linux/arm/v7", &arms).unwrap(), digest(3));
        assert_eq!(chosen("linux/arm/v6", &arms).unwrap(), digest(2));
        let error = chosen("linux/amd64", &arms).unwrap_err().to_string();
        assert_eq!(
            error,
            "x is not built for linux/amd64; it has linux/arm/v5, linux/arm/v6, linux/arm/v7"
        );
        assert_eq!(chosen("linux/amd64", &[entry(1, None)]).unwrap(), digest(1));
        assert!(chosen("linux/amd64", &[entry(1, None), entry(2, None)]).is_err());
        assert!(chosen("linux/amd64", &[]).is_err());
    }

    fn document(text: &str) -> Result<Document, String> {
        parse(text.as_bytes(), None, "x", "manifest").map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn documents_are_of_one_known_kind() {
        let config = format!(
            r#""config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":3}}"#,
            digest(1)
        );
        let layer = |kind: &str| {
            format!(
                r#"{{"mediaType":"{kind}","digest":"{}","size":3}}"#,
                digest(2)
            )
        };
        let manifest =
            |layers: &str| format!(r#"{{"schemaVersion":2,{config},"layers":[{layers}]}}"#);
        assert!(matches!(document(&manifest("")), Ok(Document::Manifest(_))));
        for (kind, expected) in [
            ("application/vnd.oci.image.layer.v1.tar", Compression::None),
            (
                "application/vnd.oci.image.layer.v1.tar+gzip",
                Compression::Gzip,
            ),
            (
                "application/vnd.oci.image.layer.v1.tar+zstd",
                Compression::Zstd,
            ),
            (
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                Compression::Gzip,
            ),
        ] {
            let Ok(Document::Manifest(parsed)) = document(&manifest(&layer(kind))) else {
                panic!("{kind}")
            };
            assert_eq!(parsed.layers[0].compression, expected);
        }
        let refused = [
            (
                manifest(&layer(
                    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                )),
                "ForeignLayer",
            ),
            (
                manifest(&layer(
                    "application/vnd.oci.image.layer.nondistributable.v1.tar",
                )),
                "ForeignLayer",
            ),
            (
                manifest(&layer("application/vnd.oci.image.layer.v1.tar+lzma")),
                "UnsupportedMediaType",
            ),
            (
                manifest(&format!(
                    r#"{{"mediaType":"x","digest":"sha512:{}","size":3}}"#,
                    "a".repeat(128)
                )),
                "Malformed",
            ),
            (
                manifest(&format!(
                    r#"{{"mediaType":"x","digest":"{}","size":-3}}"#,
                    digest(2)
                )),
                "Malformed",
            ),
            (
                manifest(&format!(
                    r#"{{"mediaType":"x","digest":"{}","size":{}}}"#,
                    digest(2),
                    u64::MAX
                )),
                "Malformed",
            ),
            (
                format!(r#"{{"schemaVersion":2,{config},"layers":[],"manifests":[]}}"#),
                "Malformed",
            ),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), "Schema1"),
            (
                r#"{"schemaVersion":2,"mediaType":"application/x","layers":[]}"#.to_owned(),
                "UnsupportedMediaType",
            ),
            (
                format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}",{config},"layers":[]}}"#),
                "Malformed",
            ),
            (r#"{"schemaVersion":2}"#.to_owned(), "Malformed"),
            ("[]".to_owned(), "Malformed"),
            (String::new(), "Malformed"),
            ("<html>".to_owned(), "Malformed"),
            (
                manifest(
                    &vec![layer("application/vnd.oci.image.layer.v1.tar"); LAYERS_MAX + 1]
                        .join(","),
                ),
                "Malformed",
            ),
            (
                format!(
                    r#"{{"schemaVersion":2,"layers":[],"config":{{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":"{}","size":1}}}}"#,
                    digest(1)
                ),
                "UnsupportedMediaType",
            ),
        ];
        for (text, expected) in refused {
            let error = document(&text).unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn configurations_agree_with_their_manifest() {
        let layer = |n: u8| LayerDescriptor {
            blob: Descriptor {
                digest: digest(n),
                size_bytes: 1,
            },
            compression: Compression::None,
        };
        let manifest = |layers: Vec<LayerDescriptor>| Manifest {
            config: Descriptor {
                digest: digest(0),
                size_bytes: 1,
            },
            layers,
        };
        let config = |arch: &str, diff_ids: &[Digest]| {
            let ids: Vec<String> = diff_ids.iter().map(|id| format!("\"{id}\"")).collect();
            format!(
                r#"{{"architecture":"{arch}","os":"linux","config":{{"Cmd":["a"],"Env":null,"Volumes":{{"/v":{{}}}}}},
                    "rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
                ids.join(",")
            )
        };
        let check = |text: &str, manifest: &Manifest| {
            parse_config(text.as_bytes(), manifest, &platform("linux/amd64"), "x")
        };
        let (parsed, ids) =
            check(&config("amd64", &[digest(9)]), &manifest(vec![layer(1)])).unwrap();
        assert_eq!((parsed.cmd, ids), (vec!["a".to_owned()], vec![digest(9)]));
        assert_eq!(parsed.volumes.iter().collect::<Vec<_>>(), ["/v"]);
        let refused = [
            (
                config("arm64", &[digest(9)]),
                manifest(vec![layer(1)]),
                "NoPlatform",
            ),
            (
                config("amd64", &[digest(9), digest(8)]),
                manifest(vec![layer(1)]),
                "LayerCount",
            ),
            (config("amd64", &[]), manifest(vec![layer(1)]), "LayerCount"),
            (
                config("amd64", &[digest(8), digest(9)]),
                manifest(vec![layer(1), layer(1)]),
                "Malformed",
            ),
            ("{}".to_owned(), manifest(vec![]), "Malformed"),
        ];
        for (text, manifest, expected) in refused {
            let error = format!("{:?}", check(&text, &manifest).unwrap_err());
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
