//! simplestreams: an index, documents of products, files beside them.
//!
//! Documents come from strangers: their size is bounded, what is odd in an item makes that item
//! unusable, and what is odd about a document is an error that tells its URL and how it begins.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::remotes::{bad_index, is_plain};
use super::server::Server;
use crate::id::Digest;
use crate::image::error::ImageError;
use crate::image::system::catalog::{Catalog, Content, Item, Product, Version};
use crate::image::system::reference::is_serial;

const INDEX: &str = "streams/v1/index.json";
const INDEX_MAX_BYTES: u64 = 1 << 20;
const PRODUCTS_MAX_BYTES: u64 = 32 << 20;
/// Documents of products that one index may lead to.
const DOCUMENTS_MAX: usize = 16;
/// Kinds of metadata, best first.
const METADATA: [&str; 2] = ["incus.tar.xz", "lxd.tar.xz"];
const UNIFIED: [&str; 2] = ["incus_combined.tar.gz", "lxd_combined.tar.gz"];

#[derive(Deserialize)]
struct IndexDocument {
    format: String,
    index: BTreeMap<String, IndexEntry>,
}

#[derive(Deserialize)]
struct IndexEntry {
    #[serde(default)]
    datatype: String,
    path: String,
    #[serde(default)]
    products: Vec<String>,
}

#[derive(Deserialize)]
struct ProductsDocument {
    format: String,
    products: BTreeMap<String, ProductEntry>,
}

#[derive(Deserialize)]
struct ProductEntry {
    #[serde(default)]
    aliases: String,
    #[serde(default)]
    arch: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    release: String,
    #[serde(default)]
    release_title: String,
    #[serde(default)]
    variant: String,
    #[serde(default)]
    requirements: serde_json::Value,
    #[serde(default)]
    versions: BTreeMap<String, VersionEntry>,
}

#[derive(Deserialize)]
struct VersionEntry {
    #[serde(default)]
    items: BTreeMap<String, ItemEntry>,
}

#[derive(Deserialize)]
struct ItemEntry {
    #[serde(default)]
    ftype: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    sha256: String,
    #[serde(default)]
    size: serde_json::Value,
    #[serde(default)]
    combined_sha256: String,
    #[serde(default)]
    combined_rootxz_sha256: String,
}

/// Asks for everything that a server offers.
///
/// # Errors
/// Of the wire, `BadIndex`, `TooLarge`.
pub(crate) async fn catalog(server: &Server) -> Result<Catalog, ImageError> {
    let expected = "simplestreams index";
    let url = server.url(INDEX)?.to_string();
    let Some(bytes) = server.document(INDEX, INDEX_MAX_BYTES).await? else {
        return Err(bad_index(&url, expected, "it is not there", b""));
    };
    let paths = document_paths(&url, &bytes)?;
    let mut catalog = Catalog::default();
    for path in paths {
        let url = server.url(&path)?.to_string();
        let Some(bytes) = server.document(&path, PRODUCTS_MAX_BYTES).await? else {
            return Err(bad_index(
                &url,
                "simplestreams products",
                "it is not there",
                b"",
            ));
        };
        catalog.products.extend(products(&url, &bytes)?);
    }
    Ok(catalog.sorted())
}

/// Paths of the documents with images.
fn document_paths(url: &str, bytes: &[u8]) -> Result<Vec<String>, ImageError> {
    let bad = |reason: String| bad_index(url, "simplestreams index", reason, bytes);
    let index: IndexDocument =
        serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
    if index.format != "index:1.0" {
        return Err(bad(format!("its format is {:?}", short(&index.format))));
    }
    let images =
        |entry: &IndexEntry| entry.datatype == "image-downloads" && !entry.products.is_empty();
    let paths: Vec<String> = index
        .index
        .into_values()
        .filter(images)
        .map(|entry| entry.path)
        .collect();
    if paths.len() > DOCUMENTS_MAX {
        return Err(bad(format!(
            "it leads to more than {DOCUMENTS_MAX} documents"
        )));
    }
    Ok(paths)
}

fn products(url: &str, bytes: &[u8]) -> Result<Vec<Product>, ImageError> {
    let bad = |reason: String| bad_index(url, "simplestreams products", reason, bytes);
    let document: ProductsDocument =
        serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
    if document.format != "products:1.0" {
        return Err(bad(format!("its format is {:?}", short(&document.format))));
    }
    Ok(document
        .products
        .into_values()
        .filter_map(product)
        .collect())
}

/// `None` for a product that can't be named.
fn product(entry: ProductEntry) -> Option<Product> {
    let ProductEntry {
        aliases,
        arch,
        os,
        release,
        release_title,
        variant,
        requirements,
        versions,
    } = entry;
    let variant = if variant.is_empty() {
        "default".to_owned()
    } else {
        variant
    };
    let release_title = if release_title.is_empty() {
        release.clone()
    } else {
        release_title
    };
    if ![&arch, &os, &release, &variant]
        .into_iter()
        .all(|text| is_plain(text))
    {
        return None;
    }
    let aliases = aliases
        .split(',')
        .map(str::trim)
        .filter(|alias| !alias.is_empty());
    let requirements = match requirements {
        serde_json::Value::Object(map) => map
            .into_iter()
            .filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())))
            .filter(|(key, value)| is_plain(key) && is_plain(value))
            .collect(),
        _ => BTreeMap::new(),
    };
    let versions = versions
        .into_iter()
        .filter(|(serial, _)| is_serial(serial))
        .filter_map(|(serial, version)| {
            let content = content(&version.items.into_values().collect::<Vec<_>>())?;
            Some(Version { serial, content })
        });
    Some(Product {
        os,
        release,
        release_title,
        variant,
        architecture: arch,
        aliases: aliases.take(64).map(str::to_lowercase).collect(),
        requirements,
        versions: versions.collect(),
    })
}

/// What a version's files are to us; `None` if none is for containers.
fn content(items: &[ItemEntry]) -> Option<Content> {
    let find = |ftype: &str| {
        let entry = items.iter().find(|entry| entry.ftype == ftype)?;
        Some((entry, item(entry)?))
    };
    let metadata = METADATA.into_iter().find_map(find);
    if let (Some((entry, metadata)), Some((_, root))) = (metadata, find("root.tar.xz")) {
        let combined = [&entry.combined_rootxz_sha256, &entry.combined_sha256];
        return Some(Content::Pair {
            metadata,
            root,
            fingerprint: combined.into_iter().find_map(|hex| digest(hex)),
        });
    }
    if let Some((_, item)) = UNIFIED.into_iter().find_map(find) {
        return Some(Content::Unified(item));
    }
    let kinds = items.iter().map(|entry| short(&entry.ftype));
    let kinds: Vec<String> = kinds
        .filter(|kind| !kind.ends_with(".img") && !METADATA.contains(&kind.as_str()))
        .collect();
    kinds
        .iter()
        .any(|kind| kind == "squashfs" || kind.starts_with("root"))
        .then_some(Content::Foreign(kinds))
}

fn item(entry: &ItemEntry) -> Option<Item> {
    // Sizes are signed in Go, so nothing honest is larger.
    let size_bytes = match &entry.size {
        serde_json::Value::String(text) => text.parse().ok()?,
        other => other.as_i64().and_then(|size| u64::try_from(size).ok())?,
    };
    Some(Item {
        path: entry.path.clone(),
        digest: digest(&entry.sha256)?,
        size_bytes,
    })
}

fn digest(hex: &str) -> Option<Digest> {
    format!("sha256:{hex}").parse().ok()
}

fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(40).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn hex(n: u8) -> String {
        Digest::of(&[n]).hex().to_owned()
    }

    fn document() -> serde_json::Value {
        json!({ "content_id": "images", "datatype": "image-downloads", "format": "products:1.0",
        "products": {
            "debian:bookworm:amd64:default": {
                "aliases": "debian/bookworm/default,Debian/bookworm", "arch": "amd64",
                "os": "Debian", "release": "bookworm", "release_title": "12", "variant": "default",
                "requirements": {"cgroup": "v1", "odd": 3},
                "versions": {
                    "20261124_05:24": {"items": {
                        "incus.tar.xz": {"ftype": "incus.tar.xz", "path": "images/m", "sha256": hex(1),
                            "size": 10, "combined_sha256": hex(9), "combined_rootxz_sha256": hex(3)},
                        "root.tar.xz": {"ftype": "root.tar.xz", "path": "images/r", "sha256": hex(2), "size": "20"},
                        "disk-kvm.img": {"ftype": "disk-kvm.img", "path": "x", "sha256": hex(4), "size": 1},
                    }},
                    "20261123": {"items": {
                        "lxd.tar.xz": {"ftype": "lxd.tar.xz", "path": "m", "sha256": hex(1), "size": 10},
                        "root.squashfs": {"ftype": "squashfs", "path": "s", "sha256": hex(5), "size": 7},
                    }},
                    "20261122": {"items": {
                        "u": {"ftype": "incus_combined.tar.gz", "path": "u", "sha256": hex(6), "size": 7},
                    }},
                    "20261121": {"items": {
                        "d": {"ftype": "disk1.img", "path": "u", "sha256": hex(6), "size": 7},
                    }},
                    "latest": {"items": {}},
                }},
            "no:name": {"arch": "amd64", "os": "", "release": "x"},
            "bad/name": {"arch": "amd64", "os": "a/b", "release": "x"},
        }})
    }

    #[test]
    fn products_and_their_versions_are_read() {
        let bytes = document().to_string();
        let found = products("u", bytes.as_bytes()).unwrap();
        let catalog = Catalog { products: found }.sorted();
        let [product] = &catalog.products[..] else {
            panic!("{catalog:?}")
        };
        assert_eq!(
            product.aliases,
            ["debian/bookworm/default", "debian/bookworm"]
        );
        assert_eq!(product.requirements.len(), 1);
        let serials: Vec<&str> = product.versions.iter().map(|one| &*one.serial).collect();
        assert_eq!(serials, ["20261124_05:24", "20261123", "20261122"]);
        assert_eq!(product.versions[0].fingerprint(), Some(&Digest::of(&[3])));
        assert_eq!(product.versions[0].size_bytes(), 30);
        let squashfs = Content::Foreign(vec!["squashfs".to_owned()]);
        assert_eq!(product.versions[1].content, squashfs);
        assert!(matches!(&product.versions[2].content, Content::Unified(item) if item.path == "u"));
    }

    #[test]
    fn an_item_without_a_digest_or_size_is_none() {
        for (key, value) in [
            ("sha256", json!("12")),
            ("sha256", json!("../x")),
            ("size", json!(-1)),
            ("size", json!("many")),
            ("size", json!(null)),
        ] {
            let mut document = document();
            let versions = &mut document["products"]["debian:bookworm:amd64:default"]["versions"];
            versions["20261124_05:24"]["items"]["root.tar.xz"][key] = value.clone();
            let found = products("u", document.to_string().as_bytes()).unwrap();
            let version = &Catalog { products: found }.sorted().products[0].versions[0];
            assert!(
                matches!(version.content, Content::Foreign(_)),
                "{key} {value}: {version:?}"
            );
        }
    }

    #[test]
    fn what_is_no_index_is_told_with_its_url_and_begin() {
        let error = document_paths("https://h/x", &[0; 100])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("https://h/x is no simplestreams index: "),
            "{error}"
        );
        assert!(error.ends_with("it begins with \"\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\""), "{error}");
        for bad in [
            "",
            "[]",
            "{}",
            "<html>",
            r#"{"format":"index:2.0","index":{}}"#,
        ] {
            assert!(document_paths("u", bad.as_bytes()).is_err(), "{bad}");
            assert!(products("u", bad.as_bytes()).is_err(), "{bad}");
        }
        let deep = "[".repeat(100_000);
        assert!(products("u", deep.as_bytes()).is_err());
    }

    #[test]
    fn documents_without_images_are_skipped() {
        let index = json!({"format": "index:1.0", "index": {
            "a": {"datatype": "image-downloads", "path": "a.json", "products": ["x"]},
            "b": {"datatype": "image-downloads", "path": "b.json", "products": []},
            "c": {"datatype": "content-download", "path": "c.json", "products": ["x"]},
        }});
        let paths = document_paths("u", index.to_string().as_bytes()).unwrap();
        assert_eq!(paths, ["a.json"]);
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = document_paths("u", &bytes);
            let _ = products("u", &bytes);
        }

        #[test]
        fn what_is_spoilt_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = document().to_string().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(found) = products("u", &bytes) {
                let catalog = Catalog { products: found }.sorted();
                for product in catalog.products {
                    prop_assert!(!product.versions.is_empty());
                }
            }
        }
    }
}
