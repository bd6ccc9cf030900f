//! Who we are at a registry: credentials that cannot be printed, challenges, and the token cache.
//!
//! Credentials live in memory only, for as long as a pull needs them. Tokens are cached per
//! (endpoint, repository, credentials), so no caller is ever served with another's token.

use std::collections::HashMap;
use std::fmt;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::image::reference::ImageRef;

/// A text that never appears in `Debug`, logs, errors or the store.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// Gives the text to the one place that sends it.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Secret)
    }
}

/// What a caller gives to get at an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RegistryAuth {
    /// Nothing.
    #[default]
    Anonymous,
    /// A user and a password, sent to the registry or exchanged for a token as it asks.
    Basic {
        /// The user.
        username: String,
        /// Its password.
        password: Secret,
    },
    /// An OAuth2 refresh token, exchanged for an access token.
    Identity {
        /// The refresh token.
        token: Secret,
    },
    /// A bearer token that is sent as it is.
    Bearer {
        /// The token.
        token: Secret,
    },
}

/// Credentials as CRI's `AuthConfig` and docker's config files spell them; empty means not given.
#[derive(Clone, Default)]
pub struct AuthParts {
    /// User, with `password`.
    pub username: String,
    /// Password of `username`.
    pub password: String,
    /// Base64 of `user:password`.
    pub auth: String,
    /// The registry these are for, a host or a URL.
    pub server_address: String,
    /// OAuth2 refresh token.
    pub identity_token: String,
    /// Bearer token.
    pub registry_token: String,
}

/// Why credentials can't be used. The value itself is never shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("auth: {reason}")]
pub struct AuthError {
    /// What is wrong.
    pub reason: &'static str,
}

impl RegistryAuth {
    /// Chooses the credentials for `reference` in the order that CRI clients rely on.
    ///
    /// Those for another `server_address` count as none.
    ///
    /// # Errors
    /// `auth` that is not base64 of `user:password`.
    pub fn from_parts(parts: &AuthParts, reference: &ImageRef) -> Result<RegistryAuth, AuthError> {
        if !parts.server_address.is_empty()
            && !same_host(&parts.server_address, reference.registry())
        {
            return Ok(RegistryAuth::Anonymous);
        }
        if !parts.username.is_empty() {
            return Ok(RegistryAuth::Basic {
                username: parts.username.clone(),
                password: Secret::new(&parts.password),
            });
        }
        if !parts.identity_token.is_empty() {
            return Ok(RegistryAuth::Identity {
                token: Secret::new(&parts.identity_token),
            });
        }
        if !parts.auth.is_empty() {
            return decode_auth(&parts.auth);
        }
        if !parts.registry_token.is_empty() {
            return Ok(RegistryAuth::Bearer {
                token: Secret::new(&parts.registry_token),
            });
        }
        Ok(RegistryAuth::Anonymous)
    }

    /// Returns a value that is equal for equal credentials and tells nothing about them.
    pub(crate) fn key(&self) -> AuthKey {
        /// Fresh per process, so a key found in a core dump can't be compared with a dictionary.
        static SALT: LazyLock<[u8; 32]> = LazyLock::new(rand::random);
        let mut hash = Sha256::new();
        hash.update(*SALT);
        let mut part = |text: &str| {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        };
        match self {
            RegistryAuth::Anonymous => part("anonymous"),
            RegistryAuth::Basic { username, password } => {
                part("basic");
                part(username);
                part(password.reveal());
            }
            RegistryAuth::Identity { token } => {
                part("identity");
                part(token.reveal());
            }
            RegistryAuth::Bearer { token } => {
                part("bearer");
                part(token.reveal());
            }
        }
        AuthKey(hash.finalize().into())
    }
}

/// Stands for credentials in keys.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct AuthKey([u8; 32]);

fn decode_auth(text: &str) -> Result<RegistryAuth, AuthError> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .map_err(|_| AuthError {
            reason: "`auth` is not base64",
        })?;
    let text = String::from_utf8(bytes).map_err(|_| AuthError {
        reason: "`auth` is not UTF-8",
    })?;
    let (username, password) = text.split_once(':').ok_or(AuthError {
        reason: "`auth` is not base64 of `user:password`",
    })?;
    Ok(RegistryAuth::Basic {
        username: username.to_owned(),
        // Docker's config files are padded with NULs by some credential helpers.
        password: Secret::new(password.trim_end_matches('\0')),
    })
}

/// Compares a server address (host or URL, as docker writes them) with a reference's registry.
fn same_host(address: &str, registry: &str) -> bool {
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = address.split('/').next().unwrap_or(address);
    let canonical = |host: &str| match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_ascii_lowercase(),
    };
    canonical(host) == canonical(registry)
}

/// What a 401 asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// Reads `WWW-Authenticate` values; bearer is preferred where both are offered.
    pub(crate) fn parse<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
        let mut basic = None;
        for header in headers {
            for (scheme, params) in split_challenges(header) {
                if scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Challenge::Basic);
                } else if scheme.eq_ignore_ascii_case("bearer") {
                    let get = |name: &str| {
                        params
                            .iter()
                            .find(|(key, _)| key.eq_ignore_ascii_case(name))
                            .map(|(_, value)| value.clone())
                    };
                    if let Some(realm) = get("realm") {
                        return Some(Challenge::Bearer {
                            realm,
                            service: get("service"),
                            scope: get("scope"),
                        });
                    }
                }
            }
        }
        basic
    }
}

type Params = Vec<(String, String)>;

/// RFC 9110 section 11.6.1: schemes and their comma-separated parameters share one list.
fn split_challenges(header: &str) -> Vec<(String, Params)> {
    let mut found: Vec<(String, Params)> = Vec::new();
    let mut rest = header.trim_start();
    while !rest.is_empty() {
        rest = rest.trim_start_matches([',', ' ', '\t']);
        let end = rest.find([' ', '\t', '=', ',']).unwrap_or(rest.len());
        let word = &rest[..end];
        rest = rest[end..].trim_start();
        if word.is_empty() {
            // A stray `=`: give up on the rest rather than loop.
            return found;
        }
        let Some(after) = rest.strip_prefix('=') else {
            found.push((word.to_owned(), Vec::new()));
            continue;
        };
        let (value, after) = parameter_value(after.trim_start());
        rest = after;
        if let Some((_, params)) = found.last_mut() {
            params.push((word.to_owned(), value));
        }
    }
    found
}

fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

/// What is sent with requests to one (endpoint, repository) for one set of credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Grant {
    /// `Authorization: Basic` from the credentials themselves.
    Basic,
    Bearer(Secret),
}

/// The reply of a token server; both spellings of the token are in use.
#[derive(Deserialize)]
pub(crate) struct TokenReply {
    #[serde(default)]
    token: Option<Secret>,
    #[serde(default)]
    access_token: Option<Secret>,
    #[serde(default)]
    expires_in: Option<u64>,
}

impl TokenReply {
    /// Returns the token and for how long it may be cached.
    pub(crate) fn into_token(self) -> Option<(Secret, Duration)> {
        let token = self
            .token
            .or(self.access_token)
            .filter(|token| !token.reveal().is_empty())?;
        // The token specification says 60 s if nothing is said; a tenth is kept for clocks and flight.
        let seconds = self.expires_in.unwrap_or(60).clamp(1, 3600);
        Some((token, Duration::from_millis(seconds * 900)))
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    pub(crate) endpoint: String,
    pub(crate) repository: String,
    pub(crate) auth: AuthKey,
}

/// Most cached grants; the soonest to expire goes first.
const CACHED_GRANTS_MAX: usize = 1024;

/// Grants by (endpoint, repository, credentials), each with its end.
#[derive(Default)]
pub(crate) struct TokenCache {
    grants: Mutex<HashMap<TokenKey, (Grant, Instant)>>,
}

impl TokenCache {
    pub(crate) fn get(&self, key: &TokenKey) -> Option<Grant> {
        let grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        grants
            .get(key)
            .filter(|(_, until)| *until > Instant::now())
            .map(|(grant, _)| grant.clone())
    }

    pub(crate) fn put(&self, key: TokenKey, grant: Grant, lasts: Duration) {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        if grants.len() >= CACHED_GRANTS_MAX {
            let now = Instant::now();
            grants.retain(|_, (_, until)| *until > now);
            if grants.len() >= CACHED_GRANTS_MAX
                && let Some(first) = grants
                    .iter()
                    .min_by_key(|(_, (_, until))| *until)
                    .map(|(key, _)| key.clone())
            {
                grants.remove(&first);
            }
        }
        grants.insert(key, (grant, Instant::now() + lasts));
    }

    /// Forgets a grant that was refused, unless another request has renewed it meanwhile.
    pub(crate) fn forget(&self, key: &TokenKey, refused: &Grant) {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        if grants.get(key).is_some_and(|(grant, _)| grant == refused) {
            grants.remove(key);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn reference() -> ImageRef {
        "reg.example:5000/a/b:1".parse().unwrap()
    }

    #[test]
    fn nothing_secret_is_printed() {
        let values = [
            RegistryAuth::Basic {
                username: "u".into(),
                password: Secret::new("hunter2"),
            },
            RegistryAuth::Identity {
                token: Secret::new("hunter2"),
            },
            RegistryAuth::Bearer {
                token: Secret::new("hunter2"),
            },
        ];
        for value in values {
            assert!(!format!("{value:?}").contains("hunter2"));
        }
    }

    #[test]
    fn parts_are_chosen_in_order() {
        let user = base64::engine::general_purpose::STANDARD.encode("u:p:q\0\0");
        let basic = |u: &str, p: &str| RegistryAuth::Basic {
            username: u.into(),
            password: Secret::new(p),
        };
        let parts = AuthParts::default;
        let table = [
            (parts(), RegistryAuth::Anonymous),
            (
                AuthParts {
                    username: "a".into(),
                    password: "b".into(),
                    ..parts()
                },
                basic("a", "b"),
            ),
            (
                AuthParts {
                    auth: user.clone(),
                    ..parts()
                },
                basic("u", "p:q"),
            ),
            (
                AuthParts {
                    username: "a".into(),
                    server_address: "other.example".into(),
                    ..parts()
                },
                RegistryAuth::Anonymous,
            ),
            (
                AuthParts {
                    username: "a".into(),
                    server_address: "https://reg.example:5000/v2/".into(),
                    ..parts()
                },
                basic("a", ""),
            ),
            (
                AuthParts {
                    identity_token: "i".into(),
                    auth: user,
                    ..parts()
                },
                RegistryAuth::Identity {
                    token: Secret::new("i"),
                },
            ),
            (
                AuthParts {
                    registry_token: "r".into(),
                    ..parts()
                },
                RegistryAuth::Bearer {
                    token: Secret::new("r"),
                },
            ),
        ];
        for (parts, expected) in table {
            assert_eq!(RegistryAuth::from_parts(&parts, &reference()), Ok(expected));
        }
        for auth in ["!!", "bm9jb2xvbg=="] {
            let parts = AuthParts {
                auth: auth.into(),
                ..AuthParts::default()
            };
            let error = RegistryAuth::from_parts(&parts, &reference()).unwrap_err();
            assert!(!error.to_string().contains(auth));
        }
    }

    #[test]
    fn equal_credentials_have_equal_keys_and_others_do_not() {
        let basic = |u: &str, p: &str| {
            RegistryAuth::Basic {
                username: u.into(),
                password: Secret::new(p),
            }
            .key()
        };
        assert!(basic("a", "b") == basic("a", "b"));
        assert!(basic("a", "bc") != basic("ab", "c"));
        assert!(basic("", "") != RegistryAuth::Anonymous.key());
    }

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        };
        let table: [(&[&str], Option<Challenge>); 8] = [
            (&[], None),
            (&["Basic realm=\"x\""], Some(Challenge::Basic)),
            (
                &["Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:a:pull,push\""],
                Some(bearer(
                    "https://a/t",
                    Some("s"),
                    Some("repository:a:pull,push"),
                )),
            ),
            (
                &["bearer realm=https://a/t , service=s"],
                Some(bearer("https://a/t", Some("s"), None)),
            ),
            (
                &["Basic realm=\"x\", Bearer realm=\"r\""],
                Some(bearer("r", None, None)),
            ),
            (
                &["Basic realm=x", "Bearer realm=\"a\\\"b\""],
                Some(bearer("a\"b", None, None)),
            ),
            (&["Bearer service=\"s\""], None),
            (&["=,=\"", "Negotiate"], None),
        ];
        for (headers, expected) in table {
            assert_eq!(
                Challenge::parse(headers.iter().copied()),
                expected,
                "{headers:?}"
            );
        }
    }
}
