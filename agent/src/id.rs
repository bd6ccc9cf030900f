//! Identifiers: valid and path-safe by construction, so that no later code checks them again.

use std::{fmt, str::FromStr};

use rand::Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Text that is not an identifier of the wished kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {expected}")]
pub struct InvalidId {
    /// The text, cut to 100 characters.
    pub value: String,
    /// What would be valid.
    pub expected: &'static str,
}

impl InvalidId {
    fn new(value: &str, expected: &'static str) -> Self {
        Self {
            value: value.chars().take(100).collect(),
            expected,
        }
    }
}

fn is_lower_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn random_hex(bytes: usize) -> String {
    let mut raw = vec![0_u8; bytes];
    rand::rng().fill_bytes(&mut raw);
    hex::encode(raw)
}

/// Defines an identifier of a fixed number of lowercase hexadecimal digits.
macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $digits:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new one that nobody else has.
            pub fn random() -> Self {
                Self(random_hex($digits / 2))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                if is_lower_hex(text, $digits) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidId::new(text, $expected))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

hex_id!(
    /// One data directory: made once, and part of every name that its agent gives to the kernel.
    InstanceId,
    8,
    "an instance id (8 lowercase hexadecimal digits)"
);
hex_id!(
    /// A pod sandbox.
    SandboxId,
    64,
    "a sandbox id (64 lowercase hexadecimal digits)"
);
hex_id!(
    /// A container.
    ContainerId,
    64,
    "a container id (64 lowercase hexadecimal digits)"
);
hex_id!(
    /// A running or finished operation.
    OperationId,
    32,
    "an operation id (32 lowercase hexadecimal digits)"
);

/// A SHA-256 content digest, `sha256:` and 64 lowercase hexadecimal digits.
///
/// Source: OCI image specification, descriptor.md, "Digests".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Digest of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self::from_sha256(Sha256::digest(content).into())
    }

    /// Digest from a finished hash.
    pub fn from_sha256(hash: [u8; 32]) -> Self {
        Self(format!("sha256:{}", hex::encode(hash)))
    }

    /// The hexadecimal digits without the algorithm.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The whole text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        match text.strip_prefix("sha256:") {
            Some(digits) if is_lower_hex(digits, 64) => Ok(Self(text.to_owned())),
            _ => Err(InvalidId::new(
                text,
                "a digest (`sha256:` and 64 lowercase hexadecimal digits)",
            )),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image: the digest of its configuration blob.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageId(pub Digest);

impl ImageId {
    /// The whole text, `sha256:…`.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for ImageId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        text.parse().map(Self)
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The API that made a record. Each face lists and removes only its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Face {
    /// CRI `runtime.v1`.
    Cri,
    /// `longshore.v1`.
    Native,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_lowercase_hex_is_an_id() {
        let good = "ab".repeat(32);
        assert_eq!(
            good.parse::<SandboxId>().map(String::from),
            Ok(good.clone())
        );
        for bad in [
            "",
            "../etc",
            &good[1..],
            &good.to_uppercase(),
            &format!("{good}0"),
        ] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn random_ids_are_valid_and_differ() {
        let (one, two) = (ContainerId::random(), ContainerId::random());
        assert_ne!(one, two);
        assert_eq!(one.as_str().parse(), Ok(one.clone()));
    }

    #[test]
    fn digest_of_nothing_is_the_known_one() {
        assert_eq!(
            Digest::of(b"").hex(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert!("sha256:xyz".parse::<Digest>().is_err());
        assert!(
            "md5:d41d8cd98f00b204e9800998ecf8427e"
                .parse::<Digest>()
                .is_err()
        );
    }
}
