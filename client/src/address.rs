//! Where an agent listens, and how that is written.

use std::{fmt, path::PathBuf, str::FromStr};

/// The environment variable that names the agent to talk to.
pub const ADDRESS_VARIABLE: &str = "LONGSHORE_ADDRESS";

/// Where an agent listens when nobody said otherwise.
pub const DEFAULT_SOCKET: &str = "/run/longshore/longshore.sock";

/// The place where one agent listens.
///
/// Written as `unix:///path`, a plain absolute path, `tcp://host:port` or `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// A unix socket; the agent asks the kernel who is calling.
    Unix(PathBuf),
    /// A host and port, `host:port`, with IPv6 addresses in brackets.
    Tcp(String),
}

/// Text that names no place to connect to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an agent's address: {problem}")]
pub struct AddressError {
    /// What was given.
    pub text: String,
    /// What is wrong with it and what would be right.
    pub problem: &'static str,
}

impl Address {
    /// The address from `LONGSHORE_ADDRESS`, or the default socket.
    ///
    /// # Errors
    /// [`AddressError`] if the variable is set to something that is not an address.
    pub fn from_env() -> Result<Self, AddressError> {
        match std::env::var(ADDRESS_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => text.parse(),
            _ => Ok(Self::default()),
        }
    }
}

impl Default for Address {
    fn default() -> Self {
        Self::Unix(PathBuf::from(DEFAULT_SOCKET))
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let text = text.trim();
        let refuse = |problem| AddressError {
            text: text.to_owned(),
            problem,
        };
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.starts_with('/') {
                Ok(Self::Unix(PathBuf::from(path)))
            } else {
                Err(refuse(
                    "a unix socket is an absolute path, as in unix:///run/longshore/longshore.sock",
                ))
            };
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        let Some(place) = text
            .strip_prefix("tcp://")
            .or_else(|| text.strip_prefix("http://"))
        else {
            return Err(refuse(
                "write unix:///path, a path that starts with /, or tcp://host:port",
            ));
        };
        let place = place.trim_end_matches('/');
        let Some((host, port)) = place.rsplit_once(':') else {
            return Err(refuse("the port is missing, as in tcp://node1:7070"));
        };
        let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
        if host.is_empty() || host.contains('/') {
            return Err(refuse("the host is missing, as in tcp://node1:7070"));
        }
        if host.contains(':') && !bracketed {
            return Err(refuse(
                "an IPv6 address goes in brackets, as in tcp://[fd00::1]:7070",
            ));
        }
        if !port.parse::<u16>().is_ok_and(|port| port != 0) {
            return Err(refuse("the port is a number from 1 to 65535"));
        }
        Ok(Self::Tcp(place.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(place) => write!(f, "tcp://{place}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<&str>) {
        let got = text
            .parse::<Address>()
            .ok()
            .map(|address| address.to_string());
        assert_eq!(got.as_deref(), expected, "{text}");
    }

    #[test]
    fn addresses_are_read_as_people_write_them() {
        check("unix:///run/a.sock", Some("unix:///run/a.sock"));
        check("/run/a.sock", Some("unix:///run/a.sock"));
        check(" /run/a.sock\n", Some("unix:///run/a.sock"));
        check("tcp://127.0.0.1:7070", Some("tcp://127.0.0.1:7070"));
        check("http://node1:7070/", Some("tcp://node1:7070"));
        check("tcp://[fd00::1]:7070", Some("tcp://[fd00::1]:7070"));
        check("unix://run/a.sock", None);
        check("run/a.sock", None);
        check("tcp://node1", None);
        check("tcp://:7070", None);
        check("tcp://fd00::1:7070", None);
        check("tcp://node1:0", None);
        check("tcp://node1:70700", None);
        check("https://node1:7070", None);
        check("", None);
    }
}
