//! What people write for a distribution's image: `images:debian/bookworm`.
//!
//! ```text
//! REMOTE:OS/RELEASE[/VARIANT][/ARCHITECTURE][@SERIAL|@sha256:FINGERPRINT]
//! ```
//! No reference of a registry looks like it: there, what follows a colon before the first slash is
//! the number of a port.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::catalog::platform_of;
use crate::id::Digest;
use crate::image::manifest::Platform;
use crate::image::reference::{ImageRef, RefPart, ReferenceError};

/// What a pull may ask for: an image of a registry, or of a remote.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    /// By docker's rules.
    Registry(ImageRef),
    /// A distribution's image.
    Remote(RemoteRef),
}

impl Reference {
    /// Returns the name by which the image is found afterwards; none by a digest.
    pub(crate) fn tag(&self) -> Option<String> {
        match self {
            Reference::Registry(reference) => {
                reference.tag().is_some().then(|| reference.to_string())
            }
            Reference::Remote(reference) => reference.pin.is_none().then(|| reference.to_string()),
        }
    }

    /// Returns the name of the same image by a digest.
    pub(crate) fn at_digest(&self, digest: &Digest) -> String {
        match self {
            Reference::Registry(reference) => reference.at_digest(digest).to_string(),
            Reference::Remote(reference) => format!("{}@{digest}", reference.without_pin()),
        }
    }
}

impl From<ImageRef> for Reference {
    fn from(reference: ImageRef) -> Reference {
        Reference::Registry(reference)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reference::Registry(reference) => reference.fmt(f),
            Reference::Remote(reference) => reference.fmt(f),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if RemoteRef::is_one(text) {
            text.parse().map(Reference::Remote)
        } else {
            text.parse().map(Reference::Registry)
        }
    }
}

/// An image of a remote; `Display` parses back to an equal value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RemoteRef {
    remote: String,
    /// Without the architecture; two to four words.
    alias: Vec<String>,
    architecture: Option<String>,
    pin: Option<Pin>,
}

/// Which of the versions is meant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Pin {
    /// Of that time, e.g. `20261124_05:24`.
    Serial(String),
    /// With this digest of metadata and root tree together.
    Fingerprint(Digest),
}

impl RemoteRef {
    /// Tells whether `text` can only mean an image of a remote.
    pub fn is_one(text: &str) -> bool {
        let first = text.split('/').next().unwrap_or(text);
        if first.len() == text.len() || first.starts_with('[') {
            return false;
        }
        first.split_once(':').is_some_and(|(_, after)| {
            !after.is_empty() && !after.bytes().all(|b| b.is_ascii_digit())
        })
    }

    /// Returns the name of the remote, as configured.
    pub fn remote(&self) -> &str {
        &self.remote
    }

    /// Returns the alias without remote and architecture, e.g. `debian/bookworm`.
    pub fn alias(&self) -> String {
        self.alias.join("/")
    }

    /// Returns what the reference says about the platform, else `otherwise`.
    pub(crate) fn platform(&self, otherwise: &Platform) -> Platform {
        let said = self.architecture.as_deref().and_then(platform_of);
        said.unwrap_or_else(|| otherwise.clone())
    }

    pub(crate) fn pin(&self) -> Option<&Pin> {
        self.pin.as_ref()
    }

    fn without_pin(&self) -> RemoteRef {
        RemoteRef {
            pin: None,
            ..self.clone()
        }
    }
}

impl fmt::Display for RemoteRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.remote, self.alias())?;
        if let Some(architecture) = &self.architecture {
            write!(f, "/{architecture}")?;
        }
        match &self.pin {
            Some(Pin::Serial(serial)) => write!(f, "@{serial}"),
            Some(Pin::Fingerprint(digest)) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl From<RemoteRef> for String {
    fn from(reference: RemoteRef) -> String {
        reference.to_string()
    }
}

impl TryFrom<String> for RemoteRef {
    type Error = ReferenceError;

    fn try_from(text: String) -> Result<Self, ReferenceError> {
        text.parse()
    }
}

impl FromStr for RemoteRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let bad = |part, value: &str, expected| {
            Err(ReferenceError {
                part,
                value: value.to_owned(),
                expected,
            })
        };
        let form = "expected REMOTE:OS/RELEASE[/VARIANT][/ARCHITECTURE]";
        let Some((remote, rest)) = text.split_once(':') else {
            return bad(RefPart::Reference, text, form);
        };
        if !is_remote_name(remote) {
            let expected = "a remote is named by 1 to 32 of a-z, 0-9 and inner hyphens";
            return bad(RefPart::Remote, remote, expected);
        }
        let (path, pin) = match rest.split_once('@') {
            Some((path, pin)) => (path, Some(pin)),
            None => (rest, None),
        };
        let mut alias: Vec<String> = path.split('/').map(str::to_owned).collect();
        if let Some(odd) = alias.iter().find(|word| !is_word(word)) {
            let expected = "expected letters, digits, `.`, `_`, `+` and hyphens between slashes";
            return bad(RefPart::Repository, odd, expected);
        }
        let architecture = match alias.last() {
            Some(last) if alias.len() > 2 && platform_of(last).is_some() => alias.pop(),
            _ => None,
        };
        if !(2..=4).contains(&alias.len()) {
            return bad(RefPart::Repository, path, form);
        }
        let pin = match pin {
            None => None,
            Some(text) if text.starts_with("sha256:") => match text.parse() {
                Ok(digest) => Some(Pin::Fingerprint(digest)),
                Err(_) => {
                    let expected = "expected sha256: and 64 lowercase hexadecimal digits";
                    return bad(RefPart::Digest, text, expected);
                }
            },
            Some(text) if is_serial(text) => Some(Pin::Serial(text.to_owned())),
            Some(text) => {
                let expected = "expected a serial such as 20261124_05:24, or sha256: and 64 digits";
                return bad(RefPart::Tag, text, expected);
            }
        };
        Ok(RemoteRef {
            remote: remote.to_owned(),
            alias,
            architecture,
            pin,
        })
    }
}

/// Tells whether a remote can have this name.
pub(crate) fn is_remote_name(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let inner = |b: u8| word(b) || b == b'-';
    let bytes = text.as_bytes();
    (1..=32).contains(&bytes.len())
        && bytes.iter().all(|b| inner(*b))
        && bytes.first().is_some_and(|b| word(*b))
        && bytes.last().is_some_and(|b| word(*b))
}

fn is_word(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'+' | b'-');
    (1..=64).contains(&text.len()) && text.bytes().all(word) && !text.starts_with(['.', '-'])
}

/// Eight digits for a date, perhaps more for a time.
pub(crate) fn is_serial(text: &str) -> bool {
    let digit = |b: &u8| b.is_ascii_digit();
    let bytes = text.as_bytes();
    (8..=32).contains(&bytes.len())
        && bytes[..8].iter().all(digit)
        && bytes[8..]
            .iter()
            .all(|b| digit(b) || matches!(b, b'_' | b':' | b'.' | b'-'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn references_of_remotes_and_of_registries_are_told_apart() {
        for (text, remote) in [
            ("images:debian/bookworm", true),
            ("images:debian/12/cloud/amd64", true),
            ("a:b/c", true),
            ("localhost:5000/a", false),
            ("127.0.0.1:5000/a/b:c", false),
            ("[::1]:5000/a", false),
            ("busybox:1.36", false),
            ("debian/bookworm", false),
            ("a/b:c", false),
        ] {
            assert_eq!(RemoteRef::is_one(text), remote, "{text}");
            // What is one is none of the other.
            assert_eq!(text.parse::<ImageRef>().is_err(), remote, "{text}");
        }
    }

    #[test]
    fn the_last_word_is_an_architecture_if_it_is_one() {
        let parsed: RemoteRef = "images:debian/bookworm/cloud/arm64".parse().unwrap();
        assert_eq!(parsed.alias(), "debian/bookworm/cloud");
        let host = "linux/amd64".parse().unwrap();
        assert_eq!(parsed.platform(&host).to_string(), "linux/arm64");
        let parsed: RemoteRef = "images:debian/bookworm/armhf@20261124_05:24"
            .parse()
            .unwrap();
        assert_eq!(parsed.platform(&host).to_string(), "linux/arm/v7");
        assert_eq!(parsed.pin(), Some(&Pin::Serial("20261124_05:24".into())));
        let parsed: RemoteRef = "images:debian/arm64".parse().unwrap();
        assert_eq!(parsed.alias(), "debian/arm64");
        assert_eq!(parsed.platform(&host), host);
    }

    #[test]
    fn errors_name_the_offending_part() {
        let words = ["a"; 6].join("/");
        for (text, part) in [
            ("Images:debian/12", RefPart::Remote),
            ("-a:debian/12", RefPart::Remote),
            ("a_b:debian/12", RefPart::Remote),
            ("images:debian//12", RefPart::Repository),
            ("images:debian/..", RefPart::Repository),
            ("images:debian/a b", RefPart::Repository),
            (&format!("images:{words}"), RefPart::Repository),
            ("images:debian/12@", RefPart::Tag),
            ("images:debian/12@today", RefPart::Tag),
            ("images:debian/12@sha256:12", RefPart::Digest),
        ] {
            let error = text.parse::<RemoteRef>().expect_err(text);
            assert_eq!(error.part, part, "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,200}") {
            let _ = text.parse::<Reference>();
        }

        #[test]
        fn what_parses_shows_itself_again(text in "[a-z-]{1,6}:[a-zA-Z0-9./_-]{1,20}(@[0-9_:]{8,14})?") {
            if let Ok(parsed) = text.parse::<RemoteRef>() {
                prop_assert_eq!(parsed.to_string().parse::<RemoteRef>().unwrap(), parsed);
            }
        }
    }
}
