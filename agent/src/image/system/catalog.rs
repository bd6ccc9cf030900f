//! What a remote offers, whichever protocol it speaks: products, each with versions.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::reference::{Pin, RemoteRef};
use crate::id::Digest;
use crate::image::error::ImageError;
use crate::image::manifest::Platform;

/// Everything that a remote offers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Catalog {
    pub(crate) products: Vec<Product>,
}

/// One distribution's release, for one processor, in one variant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) os: String,
    pub(crate) release: String,
    pub(crate) release_title: String,
    pub(crate) variant: String,
    /// As the remote spells it.
    pub(crate) architecture: String,
    /// e.g. `debian/bookworm`; lower case.
    pub(crate) aliases: Vec<String>,
    pub(crate) requirements: BTreeMap<String, String>,
    /// Newest first, never empty.
    pub(crate) versions: Vec<Version>,
}

/// One build of a product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) serial: String,
    pub(crate) content: Content,
}

/// Where a version's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// Metadata and root tree, each with its digest.
    Pair {
        metadata: Item,
        root: Item,
        /// Digest of both together.
        fingerprint: Option<Digest>,
    },
    /// Both in one file.
    Unified(Item),
    /// Files whose sizes and digests are not in the catalog: a directory of the LXC layout.
    Directory(String),
    /// No form that this agent reads; those that there are.
    Foreign(Vec<String>),
}

/// A file of a remote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    /// From the top of the server.
    pub(crate) path: String,
    pub(crate) digest: Digest,
    pub(crate) size_bytes: u64,
}

impl Version {
    /// Digest of metadata and root tree together, if the catalog tells it.
    pub(crate) fn fingerprint(&self) -> Option<&Digest> {
        match &self.content {
            Content::Pair { fingerprint, .. } => fingerprint.as_ref(),
            Content::Unified(item) => Some(&item.digest),
            Content::Directory(_) | Content::Foreign(_) => None,
        }
    }

    /// What a pull fetches; 0 if the catalog does not tell.
    pub(crate) fn size_bytes(&self) -> u64 {
        match &self.content {
            Content::Pair { metadata, root, .. } => {
                metadata.size_bytes.saturating_add(root.size_bytes)
            }
            Content::Unified(item) => item.size_bytes,
            Content::Directory(_) | Content::Foreign(_) => 0,
        }
    }
}

impl Product {
    fn is_called(&self, alias: &str) -> bool {
        if self.aliases.iter().any(|own| own == alias) {
            return true;
        }
        let releases = [&self.release, &self.release_title].map(|text| text.to_lowercase());
        let (os, variant) = (self.os.to_lowercase(), self.variant.to_lowercase());
        releases.iter().any(|release| {
            alias == format!("{os}/{release}/{variant}")
                || (variant == "default" && alias == format!("{os}/{release}"))
        })
    }

    pub(crate) fn platform(&self) -> Option<Platform> {
        platform_of(&self.architecture)
    }
}

impl Catalog {
    /// Puts versions and products in order; what has no version goes.
    pub(crate) fn sorted(mut self) -> Catalog {
        for product in &mut self.products {
            product
                .versions
                .sort_by(|one, other| other.serial.cmp(&one.serial));
        }
        self.products.retain(|product| !product.versions.is_empty());
        self.products.sort_by_key(|product| {
            let Product {
                os,
                release,
                variant,
                architecture,
                ..
            } = product;
            [os, release, variant, architecture].map(String::clone)
        });
        self
    }

    /// Returns what `reference` means on `wanted`.
    ///
    /// # Errors
    /// `NotFound`, or `NoPlatform` with what there is.
    pub(crate) fn resolve(
        &self,
        reference: &RemoteRef,
        wanted: &Platform,
        host: &str,
    ) -> Result<(&Product, &Version), ImageError> {
        let alias = reference.alias().to_lowercase();
        let wanted = reference.platform(wanted);
        let called: Vec<&Product> = self
            .products
            .iter()
            .filter(|product| product.is_called(&alias))
            .collect();
        let not_found = || ImageError::NotFound {
            reference: reference.to_string(),
            host: host.to_owned(),
        };
        if called.is_empty() {
            return Err(not_found());
        }
        let fits = |product: &&&Product| {
            let distance = wanted.distance(&product.platform()?)?;
            Some((distance, Reverse(product.versions.first()?.serial.clone())))
        };
        let best = called.iter().filter(|product| fits(product).is_some());
        let Some(product) = best.min_by_key(fits) else {
            let mut available: Vec<Platform> = called
                .iter()
                .filter_map(|product| product.platform())
                .collect();
            available.sort();
            available.dedup();
            return Err(ImageError::NoPlatform {
                reference: reference.to_string(),
                wanted,
                available,
            });
        };
        let version = match reference.pin() {
            None => product.versions.first(),
            Some(Pin::Serial(serial)) => product.versions.iter().find(|one| one.serial == *serial),
            Some(Pin::Fingerprint(digest)) => product
                .versions
                .iter()
                .find(|one| one.fingerprint() == Some(digest)),
        };
        version
            .map(|version| (*product, version))
            .ok_or_else(not_found)
    }
}

/// Returns the platform that a distribution or a kernel calls by this name.
pub(crate) fn platform_of(architecture: &str) -> Option<Platform> {
    let (architecture, variant) = match architecture {
        "amd64" | "x86_64" => ("amd64", None),
        "arm64" | "aarch64" => ("arm64", None),
        "armhf" | "armv7l" | "armv7" => ("arm", Some("v7")),
        "armel" | "armv6l" | "armv6" => ("arm", Some("v6")),
        "i386" | "i686" | "386" => ("386", None),
        "ppc64el" | "ppc64le" => ("ppc64le", None),
        "s390x" => ("s390x", None),
        "riscv64" => ("riscv64", None),
        "loong64" | "loongarch64" => ("loong64", None),
        _ => return None,
    };
    Some(Platform {
        os: "linux".to_owned(),
        architecture: architecture.to_owned(),
        variant: variant.map(str::to_owned),
    })
}

/// What a kernel calls the processor of `platform`.
pub(crate) fn kernel_name_of(platform: &Platform) -> &str {
    match (platform.architecture.as_str(), platform.variant.as_deref()) {
        ("amd64", _) => "x86_64",
        ("arm64", _) => "aarch64",
        ("arm", Some("v6")) => "armv6l",
        ("arm", _) => "armv7l",
        ("386", _) => "i686",
        ("loong64", _) => "loongarch64",
        (other, _) => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_has_the_same_platform_by_each_of_its_names() {
        for name in [
            "amd64", "arm64", "armhf", "armel", "i386", "ppc64el", "s390x", "riscv64", "loong64",
        ] {
            let platform = platform_of(name).unwrap();
            assert_eq!(
                platform_of(kernel_name_of(&platform)),
                Some(platform.clone()),
                "{name}"
            );
        }
        assert_eq!(platform_of("default"), None);
    }

    fn version(serial: &str) -> Version {
        Version {
            serial: serial.to_owned(),
            content: Content::Directory("x".to_owned()),
        }
    }

    fn product(release: &str, variant: &str, architecture: &str, serials: &[&str]) -> Product {
        Product {
            os: "Debian".to_owned(),
            release: release.to_owned(),
            release_title: "12".to_owned(),
            variant: variant.to_owned(),
            architecture: architecture.to_owned(),
            aliases: Vec::new(),
            requirements: BTreeMap::new(),
            versions: serials.iter().map(|serial| version(serial)).collect(),
        }
    }

    fn resolve(catalog: &Catalog, text: &str) -> Result<String, String> {
        let host = "linux/amd64".parse().unwrap();
        let found = catalog.resolve(&text.parse().unwrap(), &host, "h");
        found
            .map(|(product, version)| {
                format!(
                    "{}/{} {}",
                    product.variant, product.architecture, version.serial
                )
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn an_alias_is_the_newest_of_its_architecture() {
        let catalog = Catalog {
            products: vec![
                product(
                    "bookworm",
                    "default",
                    "amd64",
                    &["20260101", "20261124_05:24", "20261123"],
                ),
                product("bookworm", "default", "arm64", &["20261125"]),
                product("bookworm", "cloud", "amd64", &["20261120"]),
                product("bookworm", "gone", "amd64", &[]),
                product("trixie", "default", "riscv64", &["20261120"]),
            ],
        }
        .sorted();
        for (text, expected) in [
            ("r:debian/bookworm", "default/amd64 20261124_05:24"),
            ("r:Debian/12", "default/amd64 20261124_05:24"),
            ("r:debian/bookworm/default", "default/amd64 20261124_05:24"),
            ("r:debian/bookworm/arm64", "default/arm64 20261125"),
            ("r:debian/bookworm/aarch64", "default/arm64 20261125"),
            ("r:debian/12/cloud", "cloud/amd64 20261120"),
            ("r:debian/12/cloud/amd64", "cloud/amd64 20261120"),
            ("r:debian/bookworm@20260101", "default/amd64 20260101"),
        ] {
            assert_eq!(resolve(&catalog, text).as_deref(), Ok(expected), "{text}");
        }
        let missing = resolve(&catalog, "r:debian/sid").unwrap_err();
        assert_eq!(missing, "r:debian/sid not found at h");
        assert!(resolve(&catalog, "r:debian/bookworm/gone").is_err());
        assert!(resolve(&catalog, "r:debian/bookworm@20260102").is_err());
        let elsewhere = resolve(&catalog, "r:debian/trixie").unwrap_err();
        assert_eq!(
            elsewhere,
            "r:debian/trixie is not built for linux/amd64; it has linux/riscv64"
        );
    }
}
