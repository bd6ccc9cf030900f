//! The layout of LXC's download template: one index of lines, and a directory for each build.
//!
//! Nothing is signed there; what a directory has of `SHA256SUMS` is what its files are checked
//! against, beside what TLS gives.

use std::collections::BTreeMap;

use super::remotes::{bad_index, is_plain};
use super::server::Server;
use crate::id::Digest;
use crate::image::error::ImageError;
use crate::image::system::catalog::{Catalog, Content, Product, Version};
use crate::image::system::reference::is_serial;

const INDEX: &str = "meta/1.0/index-system";
const INDEX_MAX_BYTES: u64 = 8 << 20;
const SUMS_MAX_BYTES: u64 = 64 << 10;
const EXPECTED: &str = "index of LXC's layout";

/// Names of a build's files.
pub(crate) const METADATA: &str = "meta.tar.xz";
pub(crate) const ROOT: &str = "rootfs.tar.xz";

/// Asks for everything that a server offers.
///
/// # Errors
/// Of the wire, `BadIndex`, `TooLarge`.
pub(crate) async fn catalog(server: &Server) -> Result<Catalog, ImageError> {
    let url = server.url(INDEX)?.to_string();
    let Some(bytes) = server.document(INDEX, INDEX_MAX_BYTES).await? else {
        return Err(bad_index(&url, EXPECTED, "it is not there", b""));
    };
    parse(&url, &bytes)
}

/// Lines of `OS;RELEASE;ARCHITECTURE;VARIANT;BUILD;DIRECTORY`.
fn parse(url: &str, bytes: &[u8]) -> Result<Catalog, ImageError> {
    let bad = |reason: String| bad_index(url, EXPECTED, reason, bytes);
    let text = std::str::from_utf8(bytes).map_err(|error| bad(error.to_string()))?;
    let mut products: BTreeMap<[&str; 4], Vec<Version>> = BTreeMap::new();
    for (n, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let fields: Vec<&str> = line.trim().split(';').collect();
        let [os, release, architecture, variant, serial, directory] = fields[..] else {
            let count = fields.len();
            return Err(bad(format!(
                "line {} has {count} fields instead of 6",
                n + 1
            )));
        };
        let key = [os, release, architecture, variant];
        if !key.into_iter().all(is_plain) || !is_serial(serial) {
            continue;
        }
        products.entry(key).or_default().push(Version {
            serial: serial.to_owned(),
            content: Content::Directory(directory.trim_end_matches('/').to_owned()),
        });
    }
    let product =
        |([os, release, architecture, variant], versions): ([&str; 4], Vec<Version>)| Product {
            os: os.to_owned(),
            release: release.to_owned(),
            release_title: release.to_owned(),
            variant: variant.to_owned(),
            architecture: architecture.to_owned(),
            aliases: Vec::new(),
            requirements: BTreeMap::new(),
            versions,
        };
    let products = products.into_iter().map(product).collect();
    Ok(Catalog { products }.sorted())
}

/// Digests of a build's files, as far as its directory tells them.
///
/// # Errors
/// Of the wire, `TooLarge`.
pub(crate) async fn sums(
    server: &Server,
    directory: &str,
) -> Result<BTreeMap<String, Digest>, ImageError> {
    let path = format!("{directory}/SHA256SUMS");
    let bytes = server.document(&path, SUMS_MAX_BYTES).await?;
    Ok(parse_sums(&bytes.unwrap_or_default()))
}

/// Lines of a digest, blanks (and a star), and a name.
fn parse_sums(bytes: &[u8]) -> BTreeMap<String, Digest> {
    let text = String::from_utf8_lossy(bytes);
    let line = |line: &str| {
        let (hex, name) = line.trim().split_once(char::is_whitespace)?;
        let name = name
            .trim_start()
            .trim_start_matches('*')
            .trim_start_matches("./");
        Some((name.to_owned(), format!("sha256:{hex}").parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_become_products() {
        let text = "debian;bookworm;amd64;default;20261124_05:24;/images/debian/bookworm/amd64/default/20261124_05:24/\n\
            debian;bookworm;amd64;default;20261125_05:24;/images/x/\n\
            \n\
            alpine;3.22;arm64;default;20261124;/images/y\n\
            odd;1;amd64;default;today;/images/z\n";
        let catalog = parse("u", text.as_bytes()).unwrap();
        let shown: Vec<(&str, usize)> = catalog
            .products
            .iter()
            .map(|product| (&*product.os, product.versions.len()))
            .collect();
        assert_eq!(shown, [("alpine", 1), ("debian", 2)]);
        assert_eq!(
            catalog.products[1].versions[0].content,
            Content::Directory("/images/x".to_owned())
        );
    }

    #[test]
    fn what_is_no_index_is_told() {
        for (bytes, reason) in [
            (&[0; 64][..], "line 1 has 1 fields"),
            (b"<html>", "line 1 has 1 fields"),
            (b"a;b;c;d;20261124;/x\na;b;c", "line 2 has 3 fields"),
            (b"\xff\xfe", "invalid utf-8"),
        ] {
            let error = parse("https://h/i", bytes).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert!(error.starts_with("https://h/i is no index"), "{error}");
        }
    }

    #[test]
    fn sums_are_read_in_both_forms() {
        let hex = Digest::of(b"x").hex().to_owned();
        let text = format!("{hex}  rootfs.tar.xz\n{hex} *meta.tar.xz\nnonsense\n12  x\n");
        let sums = parse_sums(text.as_bytes());
        assert_eq!(
            sums.keys().collect::<Vec<_>>(),
            ["meta.tar.xz", "rootfs.tar.xz"]
        );
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse("u", &bytes);
            let _ = parse_sums(&bytes);
        }

        #[test]
        fn lines_never_panic(text in "([a-z0-9.]{0,4};){0,7}[a-z/;.\n]{0,20}") {
            let _ = parse("u", text.as_bytes());
        }
    }
}
