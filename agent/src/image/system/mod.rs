//! Images of distributions, for system containers: root trees that become OCI images of one layer.
//!
//! ```text
//!  remote:debian/bookworm --catalog--> metadata + root tree     (simplestreams, or the LXC layout)
//!  files of an import ---------------> unified, a pair, or a root tree alone
//!                                          |
//!                           unpack, verify, look for init  (unpacking.rs)
//!                                          v
//!  describe: a configuration, a manifest, one layer -> committed like any pulled image
//! ```
//! What the image is, is in the labels of its configuration, `dev.longshore.system.*`, so that it
//! stays with the image wherever it goes. The layer is the canonical tar of the tree
//! (`rootfs/canonical.rs`): the manifest is complete, and the tar is made again when it is asked for.

pub(crate) mod catalog;
mod init;
pub(crate) mod metadata;
pub(crate) mod pull;
pub(crate) mod reference;

use std::collections::BTreeMap;

use serde_json::json;

pub(crate) use self::init::Init;
use self::metadata::Metadata;
use self::reference::Reference;
use super::error::ImageError;
use super::image::ImageConfig;
use super::manifest::{self, Document, Manifest, Platform};
use super::unpacking::ReadyRoot;
use crate::id::Digest;

/// Beginning of the labels that say what a system container's image is.
pub const SYSTEM_LABEL: &str = "dev.longshore.system.";

/// The name by digest that an image gets: a remote knows it by its fingerprint, which a pull takes,
/// a registry by its manifest.
pub(crate) fn name_by_digest(
    reference: &Reference,
    config: &ImageConfig,
    manifest: &Digest,
) -> String {
    let fingerprint = match reference {
        Reference::Remote(_) => config.labels.get(&format!("{SYSTEM_LABEL}fingerprint")),
        Reference::Registry(_) => None,
    };
    let fingerprint = fingerprint.and_then(|hex| format!("sha256:{hex}").parse().ok());
    reference.at_digest(fingerprint.as_ref().unwrap_or(manifest))
}

/// What is known about an image beside its root tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct About {
    pub(crate) os: String,
    pub(crate) release: String,
    pub(crate) variant: String,
    pub(crate) serial: String,
    pub(crate) description: String,
    /// Where it came from.
    pub(crate) source: Option<String>,
    /// What it needs of its host, e.g. `cgroup` = `v1`.
    pub(crate) requirements: BTreeMap<String, String>,
}

/// An image as documents.
pub(crate) struct Described {
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) manifest_digest: Digest,
    pub(crate) parsed: Manifest,
}

/// Writes the documents of an image; equal content has equal documents.
///
/// # Errors
/// `Malformed`, if labels or names are too long for a configuration.
pub(crate) fn describe(
    about: &About,
    metadata: &Metadata,
    platform: &Platform,
    root: &ReadyRoot,
) -> Result<Described, ImageError> {
    let created = metadata.created();
    let labels = labels(about, metadata, root);
    let mut config = json!({
        "architecture": platform.architecture,
        "os": platform.os,
        "config": { "Entrypoint": ["/sbin/init"], "Labels": labels },
        "rootfs": { "type": "layers", "diff_ids": [root.diff_id] },
        "history": [{ "created_by": "root tree of a distribution's image" }],
    });
    if let Some(variant) = &platform.variant {
        config["variant"] = json!(variant);
    }
    if let Some(created) = &created {
        config["created"] = json!(created);
    }
    if let Some(signal) = root.init.stop_signal {
        config["config"]["StopSignal"] = json!(signal);
    }
    let config = config.to_string().into_bytes();
    if config.len() as u64 > manifest::CONFIG_MAX_BYTES {
        return Err(ImageError::TooLarge {
            what: "what the image says about itself".to_owned(),
            limit_bytes: manifest::CONFIG_MAX_BYTES,
        });
    }
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config), "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": root.diff_id, "size": root.tar_bytes,
        }],
        "annotations": labels.iter().filter(|(key, _)| key.starts_with("org.opencontainers."))
            .collect::<BTreeMap<_, _>>(),
    })
    .to_string()
    .into_bytes();
    let manifest_digest = Digest::of(&manifest);
    let what = format!("manifest {manifest_digest}");
    let Document::Manifest(parsed) = manifest::parse(&manifest, None, &what, &what)? else {
        let reason = "it is an index".to_owned();
        return Err(ImageError::Malformed { what, reason });
    };
    Ok(Described {
        config,
        manifest,
        manifest_digest,
        parsed,
    })
}

fn labels(about: &About, metadata: &Metadata, root: &ReadyRoot) -> BTreeMap<String, String> {
    let own = |name: &str| format!("{SYSTEM_LABEL}{name}");
    let oci = |name: &str| format!("org.opencontainers.image.{name}");
    let mut labels = BTreeMap::from([
        (own("os"), about.os.clone()),
        (own("release"), about.release.clone()),
        (own("variant"), about.variant.clone()),
        (own("serial"), about.serial.clone()),
        (own("fingerprint"), root.combined.hex().to_owned()),
        (own("init"), root.init.name.to_owned()),
        (
            own("init-version"),
            root.init.version.clone().unwrap_or_default(),
        ),
        // Images made for LXC look for this word in the environment of their first process.
        (own("container"), "lxc".to_owned()),
        (own("templates"), metadata.templates_json()),
        (oci("title"), about.description.clone()),
        (oci("version"), about.serial.clone()),
        (oci("source"), about.source.clone().unwrap_or_default()),
        (oci("created"), metadata.created().unwrap_or_default()),
    ]);
    for (key, value) in &about.requirements {
        labels.insert(own(&format!("requirements.{key}")), value.clone());
    }
    labels.retain(|_, value| !value.is_empty());
    labels
}
