//! Image references as people write them, made exact by docker's rules.
//!
//! ```text
//! busybox                          docker.io/library/busybox:latest
//! localhost:5000/a/b:1             localhost:5000/a/b:1
//! [::1]:5000/a@sha256:<64 hex>     [::1]:5000/a@sha256:<64 hex>
//! a:1@sha256:<64 hex>              docker.io/library/a@sha256:<64 hex>   (the digest wins)
//! ```
//! A value of [`ImageRef`] is always complete: a host, a repository, and either a tag or a digest.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
const OFFICIAL_PREFIX: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Longest host plus repository, in bytes; registries and file systems stop there too.
const NAME_MAX_BYTES: usize = 255;
const TAG_MAX_BYTES: usize = 128;

/// A complete image reference: registry, repository, and a tag or a digest.
///
/// `Display` gives the full name with its host, and parses back to an equal value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    registry: String,
    repository: String,
    version: Version,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Version {
    Tag(String),
    Digest(Digest),
}

/// Which part of a reference is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefPart {
    /// The whole text.
    Reference,
    /// Host and port before the first slash.
    Registry,
    /// The name of a remote, before the colon.
    Remote,
    /// The path between host and tag.
    Repository,
    /// What follows the colon.
    Tag,
    /// What follows the at sign.
    Digest,
}

impl fmt::Display for RefPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RefPart::Reference => "reference",
            RefPart::Registry => "registry",
            RefPart::Remote => "remote",
            RefPart::Repository => "repository",
            RefPart::Tag => "tag",
            RefPart::Digest => "digest",
        })
    }
}

/// Why a text is no image reference: the part, its value, and what is valid there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image {part} `{}` is not valid: {expected}", shorten(value))]
pub struct ReferenceError {
    /// The offending part.
    pub part: RefPart,
    /// Its text.
    pub value: String,
    /// What is valid there.
    pub expected: &'static str,
}

/// Keeps a hostile text from filling a log line.
fn shorten(value: &str) -> String {
    if value.chars().count() <= 80 {
        return value.to_owned();
    }
    let head: String = value.chars().take(77).collect();
    format!("{head}...")
}

impl ImageRef {
    /// Returns the registry as written in names: host and optional port, e.g. `docker.io`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Returns the path at the registry, e.g. `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns registry and repository, e.g. `docker.io/library/busybox`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// Returns the tag, unless this reference is by digest.
    pub fn tag(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(tag) => Some(tag),
            Version::Digest(_) => None,
        }
    }

    /// Returns the digest, if this reference is by digest.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.version {
            Version::Tag(_) => None,
            Version::Digest(digest) => Some(digest),
        }
    }

    /// Returns the same repository at `digest`.
    pub fn at_digest(&self, digest: &Digest) -> ImageRef {
        ImageRef {
            version: Version::Digest(digest.clone()),
            ..self.clone()
        }
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            registry,
            repository,
            version,
        } = self;
        match version {
            Version::Tag(tag) => write!(f, "{registry}/{repository}:{tag}"),
            Version::Digest(digest) => write!(f, "{registry}/{repository}@{digest}"),
        }
    }
}

impl From<ImageRef> for String {
    fn from(reference: ImageRef) -> String {
        reference.to_string()
    }
}

impl TryFrom<String> for ImageRef {
    type Error = ReferenceError;
    fn try_from(text: String) -> Result<Self, ReferenceError> {
        text.parse()
    }
}

impl FromStr for ImageRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(bad(
                RefPart::Reference,
                text,
                "expected [registry/]repository[:tag|@digest]",
            ));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(parse_digest(digest)?)),
            None => (text, None),
        };
        let (name, tag) = split_tag(rest);
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let (registry, repository) = split_registry(name);
        check_registry(registry)?;
        check_repository(repository)?;
        if registry == DEFAULT_REGISTRY && is_hex_id(repository) {
            return Err(bad(
                RefPart::Repository,
                repository,
                "64 hexadecimal digits are an image id, not a name",
            ));
        }
        let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
            format!("{OFFICIAL_PREFIX}{repository}")
        } else {
            repository.to_owned()
        };
        if registry.len() + 1 + repository.len() > NAME_MAX_BYTES {
            return Err(bad(
                RefPart::Repository,
                &repository,
                "registry and repository together are at most 255 bytes",
            ));
        }
        let version = match digest {
            Some(digest) => Version::Digest(digest),
            None => Version::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
        };
        Ok(ImageRef {
            registry: registry.to_owned(),
            repository,
            version,
        })
    }
}

fn bad(part: RefPart, value: &str, expected: &'static str) -> ReferenceError {
    ReferenceError {
        part,
        value: value.to_owned(),
        expected,
    }
}

fn parse_digest(text: &str) -> Result<Digest, ReferenceError> {
    text.parse().map_err(|_| {
        bad(
            RefPart::Digest,
            text,
            "expected sha256: and 64 lowercase hexadecimal digits",
        )
    })
}

/// Splits at the last colon, unless a slash follows it: then it belongs to the port.
fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    }
}

/// Docker's rule for what is a host: it has a dot, a colon or an upper-case letter, or is `localhost`.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((host, rest)) if looks_like_host(host) => (canonical_host(host), rest),
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn looks_like_host(text: &str) -> bool {
    text == "localhost"
        || text.contains(['.', ':', '['])
        || text.chars().any(|c| c.is_ascii_uppercase())
}

fn canonical_host(host: &str) -> &str {
    if host == "index.docker.io" {
        DEFAULT_REGISTRY
    } else {
        host
    }
}

fn check_registry(registry: &str) -> Result<(), ReferenceError> {
    let err = |expected| Err(bad(RefPart::Registry, registry, expected));
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let Some((address, after)) = rest.split_once(']') else {
                return err("an IPv6 address needs its closing bracket");
            };
            if address.parse::<Ipv6Addr>().is_err() {
                return err("expected an IPv6 address between the brackets");
            }
            match after.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if after.is_empty() => (None, None),
                None => return err("expected a colon and a port after the bracket"),
            }
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        },
    };
    if let Some(host) = host
        && !host.split('.').all(is_host_label)
    {
        return err("expected letters, digits and inner hyphens between dots");
    }
    if let Some(port) = port
        && (!port.bytes().all(|b| b.is_ascii_digit())
            || port.parse::<u16>().map_or(true, |port| port == 0))
    {
        return err("the port is a number from 1 to 65535");
    }
    Ok(())
}

fn is_host_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn check_repository(repository: &str) -> Result<(), ReferenceError> {
    if repository.split('/').all(is_path_component) {
        return Ok(());
    }
    let expected = if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        "a repository is lower case"
    } else {
        "expected lowercase letters and digits, joined by `.`, `_`, `__` or hyphens, between slashes"
    };
    Err(bad(RefPart::Repository, repository, expected))
}

/// `[a-z0-9]+ ((\. | _ | __ | -+) [a-z0-9]+)*`, from the distribution specification.
fn is_path_component(component: &str) -> bool {
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !word(first) || !word(last) {
        return false;
    }
    bytes
        .split(word)
        .filter(|separator| !separator.is_empty())
        .all(|separator| {
            matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
        })
}

fn check_tag(tag: &str) -> Result<(), ReferenceError> {
    let head = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let valid = tag.len() <= TAG_MAX_BYTES
        && tag.bytes().next().is_some_and(head)
        && tag.bytes().all(|b| head(b) || b == b'.' || b == b'-');
    if valid {
        return Ok(());
    }
    Err(bad(
        RefPart::Tag,
        tag,
        "expected 1 to 128 letters, digits, `_`, `.` and `-`, not beginning with `.` or `-`",
    ))
}

fn is_hex_id(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn references_become_full_names() {
        let digest = format!("sha256:{HEX}");
        let table = [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            (
                "docker.io/busybox",
                "docker.io/library/busybox:latest".to_owned(),
            ),
            ("index.docker.io/a/b", "docker.io/a/b:latest".to_owned()),
            ("a/b", "docker.io/a/b:latest".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            ("localhost:5000/a", "localhost:5000/a:latest".to_owned()),
            (
                "127.0.0.1:5000/a/b/c:v1",
                "127.0.0.1:5000/a/b/c:v1".to_owned(),
            ),
            ("[::1]:5000/a:1", "[::1]:5000/a:1".to_owned()),
            ("[2001:db8::1]/a", "[2001:db8::1]/a:latest".to_owned()),
            ("MyHost/a", "MyHost/a:latest".to_owned()),
            (
                "ghcr.io/a/b__c-d.e--f:T_1",
                "ghcr.io/a/b__c-d.e--f:T_1".to_owned(),
            ),
            (
                &format!("a@{digest}"),
                format!("docker.io/library/a@{digest}"),
            ),
            (
                &format!("a:1@{digest}"),
                format!("docker.io/library/a@{digest}"),
            ),
            (&format!("h:80/a:1@{digest}"), format!("h:80/a@{digest}")),
        ];
        for (input, expected) in table {
            let parsed: ImageRef = input.parse().unwrap_or_else(|e| panic!("{input}: {e}"));
            assert_eq!(parsed.to_string(), expected, "{input}");
            assert_eq!(expected.parse::<ImageRef>().unwrap(), parsed, "{input}");
        }
    }

    #[test]
    fn errors_name_the_offending_part() {
        let long = format!("a.b/{}", "x".repeat(260));
        let long_tag = format!("a:{}", "x".repeat(129));
        let table = [
            ("", RefPart::Reference),
            ("Busybox", RefPart::Repository),
            ("a/B", RefPart::Repository),
            ("a//b", RefPart::Repository),
            ("/a", RefPart::Repository),
            ("a/", RefPart::Repository),
            ("../a", RefPart::Registry),
            ("a/../b", RefPart::Repository),
            ("a___b", RefPart::Repository),
            ("-a", RefPart::Repository),
            ("a-", RefPart::Repository),
            ("a b", RefPart::Repository),
            ("a\nb", RefPart::Repository),
            (HEX, RefPart::Repository),
            (&long, RefPart::Repository),
            ("a:", RefPart::Tag),
            ("a:.b", RefPart::Tag),
            ("a:b c", RefPart::Tag),
            (&long_tag, RefPart::Tag),
            ("a@", RefPart::Digest),
            ("a@sha256:12", RefPart::Digest),
            ("a@sha512:12", RefPart::Digest),
            ("a@md5:12@x", RefPart::Digest),
            ("host:0/a", RefPart::Registry),
            ("host:70000/a", RefPart::Registry),
            ("host:+1/a", RefPart::Registry),
            ("host:x/a", RefPart::Registry),
            ("host:/a", RefPart::Registry),
            ("-host.x/a", RefPart::Registry),
            ("[::1/a", RefPart::Registry),
            ("[::g]/a", RefPart::Registry),
            ("[::1]5000/a", RefPart::Registry),
            ("a..b/c", RefPart::Registry),
        ];
        for (input, part) in table {
            let error = input.parse::<ImageRef>().expect_err(input);
            assert_eq!(error.part, part, "{input}: {error}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,300}") {
            let _ = text.parse::<ImageRef>();
        }

        #[test]
        fn what_parses_shows_itself_again(text in "([a-zA-Z0-9.:-]{1,12}/)?[a-z0-9._/-]{1,20}(:[A-Za-z0-9_.-]{1,8})?") {
            if let Ok(parsed) = text.parse::<ImageRef>() {
                let shown = parsed.to_string();
                prop_assert_eq!(shown.parse::<ImageRef>().unwrap(), parsed);
            }
        }
    }
}
