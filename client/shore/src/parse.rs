//! What people write on the command line, turned into values that cannot be wrong.
//!
//! Every function refuses with a sentence that says what would have been right: clap shows it
//! beside the argument's name.

use std::{
    net::IpAddr,
    path::{Component, Path, PathBuf},
    time::Duration,
};

/// What a published port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// `[ADDRESS:]HOST:CONTAINER[/PROTOCOL]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Publish {
    pub(crate) host_ip: Option<IpAddr>,
    pub(crate) host_port: u16,
    pub(crate) container_port: u16,
    pub(crate) protocol: Protocol,
}

pub(crate) fn publish(text: &str) -> Result<Publish, String> {
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((ports, "sctp")) => (ports, Protocol::Sctp),
        Some((_, other)) => return Err(format!("`{other}` is not tcp, udp or sctp")),
    };
    let Some((before, container)) = ports.rsplit_once(':') else {
        return Err(format!("name both ports, host first, as in 8080:{ports}"));
    };
    let (host_ip, host) = match before.rsplit_once(':') {
        None => (None, before),
        Some((address, host)) => {
            let bare = address
                .strip_prefix('[')
                .and_then(|address| address.strip_suffix(']'));
            if bare.is_none() && address.contains(':') {
                return Err("an IPv6 address goes in brackets, as in [fd00::1]:8080:80".into());
            }
            let address = bare.unwrap_or(address);
            let parsed = address
                .parse()
                .map_err(|_| format!("`{address}` is not an IP address"))?;
            (Some(parsed), host)
        }
    };
    Ok(Publish {
        host_ip,
        host_port: port(host)?,
        container_port: port(container)?,
        protocol,
    })
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(0) | Err(_) => Err(format!(
            "`{text}` is not a port: write a number from 1 to 65535"
        )),
        Ok(port) => Ok(port),
    }
}

/// How mounts made later pass between host and container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    Private,
    HostToContainer,
    Bidirectional,
}

/// `SOURCE:TARGET[:ro|rw|rslave|rshared|rprivate]`, options separated by commas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) propagation: Propagation,
}

pub(crate) fn volume(text: &str) -> Result<Volume, String> {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    volume_seen_from(text, &here)
}

fn volume_seen_from(text: &str, here: &Path) -> Result<Volume, String> {
    let mut parts = text.split(':');
    let (Some(source), Some(target)) = (parts.next(), parts.next()) else {
        return Err(
            "name the path here and the path in the container, as in /srv/data:/data".into(),
        );
    };
    let options = parts.next();
    if parts.next().is_some() {
        return Err("too many colons: write SOURCE:TARGET or SOURCE:TARGET:ro".into());
    }
    let source = if source.starts_with('/') {
        PathBuf::from(source)
    } else if source.starts_with("./")
        || source.starts_with("../")
        || source == "."
        || source == ".."
    {
        joined(here, Path::new(source))
    } else {
        return Err(format!(
            "volumes have no names here: write a path, as in /srv/{source} or ./{source}"
        ));
    };
    let target = PathBuf::from(target);
    if !target.is_absolute() || target.components().any(|part| part == Component::ParentDir) {
        return Err(format!(
            "`{}` is not an absolute path in the container",
            target.display()
        ));
    }
    let mut volume = Volume {
        source,
        target,
        read_only: false,
        propagation: Propagation::Private,
    };
    for option in options.into_iter().flat_map(|options| options.split(',')) {
        match option {
            "ro" => volume.read_only = true,
            "rw" => volume.read_only = false,
            "rprivate" | "private" => volume.propagation = Propagation::Private,
            "rslave" | "slave" => volume.propagation = Propagation::HostToContainer,
            "rshared" | "shared" => volume.propagation = Propagation::Bidirectional,
            other => {
                return Err(format!(
                    "`{other}` is not one of ro, rw, rprivate, rslave, rshared"
                ));
            }
        }
    }
    Ok(volume)
}

/// `path` below `here`, with its dots resolved by name alone.
fn joined(here: &Path, path: &Path) -> PathBuf {
    let mut joined = here.to_path_buf();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                joined.pop();
            }
            Component::Normal(name) => joined.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    joined
}

/// A size: a number with an optional unit `b k m g t`, `KiB`…, all binary, as docker has them.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size: write a number and b, k, m, g or t, as in 64m");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower
        .find(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let factor = match unit {
        "" | "b" => 1_u64,
        "k" | "kb" | "ki" | "kib" => 1 << 10,
        "m" | "mb" | "mi" | "mib" => 1 << 20,
        "g" | "gb" | "gi" | "gib" => 1 << 30,
        "t" | "tb" | "ti" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(factor)
            .filter(|&size| i64::try_from(size).is_ok())
            .ok_or_else(|| format!("`{text}` is more than any machine has"));
    }
    let value = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
    if value.is_finite() && value < i64::MAX as f64 {
        Ok(value as u64)
    } else {
        Err(format!("`{text}` is more than any machine has"))
    }
}

/// A number of CPUs in thousandths, as in `0.5` (500).
pub(crate) fn cpus(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a number of CPUs: write 0.01 or more, as in 0.5");
    let value: f64 = text.parse().map_err(|_| wrong())?;
    if (0.01..=100_000.0).contains(&value) {
        Ok((value * 1000.0).round() as u64)
    } else {
        Err(wrong())
    }
}

/// A pair `KEY=VALUE`; `KEY` alone has no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) key: String,
    pub(crate) value: Option<String>,
}

/// `KEY=VALUE`, or `KEY` to hand over the value from the environment of `shore`.
pub(crate) fn pair(text: &str) -> Result<Pair, String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, None),
    };
    if key.is_empty() || key.contains('\0') {
        return Err(format!("`{text}` has no name before the ="));
    }
    Ok(Pair {
        key: key.to_owned(),
        value,
    })
}

/// The lines of an environment file: `KEY=VALUE` or `KEY`; empty lines and `#` lines are skipped.
pub(crate) fn env_file(text: &str) -> Result<Vec<Pair>, String> {
    text.lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line.trim_start()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(number, line)| pair(line).map_err(|problem| format!("line {number}: {problem}")))
        .collect()
}

/// A length of time with a unit, as in `10s`, `5m`, `1h30m`; a bare number means seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|length| Duration::try_from(length).ok())
        .ok_or_else(|| format!("`{text}` is not a length of time: write 10s, 5m or 1h30m"))
}

/// An instant: RFC 3339, seconds since 1970, or a length of time ago (`10m`).
pub(crate) fn instant(text: &str, now: jiff::Timestamp) -> Result<jiff::Timestamp, String> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time);
    }
    if let Some(time) = text
        .parse::<i64>()
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
    {
        return Ok(time);
    }
    duration(text)
        .ok()
        .and_then(|length| now.checked_sub(length).ok())
        .ok_or_else(|| {
            format!("`{text}` is no time: write 10m for ten minutes ago, or 2026-01-31T12:00:00Z")
        })
}

/// A signal by name, with or without `SIG`, or by number.
pub(crate) fn signal(text: &str) -> Result<i32, String> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    if let Ok(number @ 1..=64) = text.parse::<i32>() {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES
        .iter()
        .position(|known| *known == name)
        .and_then(|place| i32::try_from(place + 1).ok())
        .ok_or_else(|| format!("`{text}` is no signal: write a name as in TERM, or a number to 64"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn published(text: &str, expected: Option<(Option<&str>, u16, u16, Protocol)>) {
        let expected = expected.map(|(host_ip, host_port, container_port, protocol)| Publish {
            host_ip: host_ip.map(|ip| ip.parse().expect("an address")),
            host_port,
            container_port,
            protocol,
        });
        assert_eq!(publish(text).ok(), expected, "{text}");
    }

    #[test]
    fn ports_are_written_as_docker_does() {
        use Protocol::{Sctp, Tcp, Udp};
        published("8080:80", Some((None, 8080, 80, Tcp)));
        published("53:53/udp", Some((None, 53, 53, Udp)));
        published("1:2/sctp", Some((None, 1, 2, Sctp)));
        published(
            "127.0.0.1:8080:80",
            Some((Some("127.0.0.1"), 8080, 80, Tcp)),
        );
        published(
            "[fd00::1]:8080:80/tcp",
            Some((Some("fd00::1"), 8080, 80, Tcp)),
        );
        for bad in [
            "80",
            "",
            ":80",
            "8080:",
            "0:80",
            "8080:0",
            "70000:80",
            "8080:80/icmp",
            "8080:80/",
            "fd00::1:8080:80",
            "localhost:8080:80",
            "a:b",
            "-1:80",
            "1:2:3:4",
        ] {
            published(bad, None);
        }
    }

    #[track_caller]
    fn mounted(text: &str, expected: Option<(&str, &str, bool, Propagation)>) {
        let expected = expected.map(|(source, target, read_only, propagation)| Volume {
            source: source.into(),
            target: target.into(),
            read_only,
            propagation,
        });
        let got = volume_seen_from(text, Path::new("/home/me"));
        assert_eq!(got.ok(), expected, "{text}");
    }

    #[test]
    fn volumes_are_paths_with_options() {
        use Propagation::{Bidirectional, HostToContainer, Private};
        mounted("/a:/b", Some(("/a", "/b", false, Private)));
        mounted("/a:/b:ro", Some(("/a", "/b", true, Private)));
        mounted("/a:/b:ro,rslave", Some(("/a", "/b", true, HostToContainer)));
        mounted("/a:/b:rshared", Some(("/a", "/b", false, Bidirectional)));
        mounted("./x:/b", Some(("/home/me/x", "/b", false, Private)));
        mounted("../x:/b", Some(("/home/x", "/b", false, Private)));
        mounted(".:/b", Some(("/home/me", "/b", false, Private)));
        for bad in [
            "/a",
            "data:/b",
            "/a:b",
            "/a:/b/../c",
            "/a:/b:rx",
            "/a:/b:ro:x",
            ":/b",
            "",
        ] {
            mounted(bad, None);
        }
    }

    #[test]
    fn sizes_are_binary() {
        for (text, expected) in [
            ("64m", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("1.5g", Some(3 << 29)),
            ("512", Some(512)),
            ("512b", Some(512)),
            ("4K", Some(4096)),
            ("2t", Some(2 << 40)),
            ("", None),
            ("m", None),
            ("64x", None),
            ("-1m", None),
            ("1.2.3m", None),
            ("99999999t", None),
            ("18446744073709551615", None),
        ] {
            assert_eq!(size(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn cpus_are_thousandths() {
        for (text, expected) in [
            ("0.5", Some(500)),
            ("2", Some(2000)),
            ("0.01", Some(10)),
            ("0", None),
            ("-1", None),
            ("half", None),
            ("NaN", None),
        ] {
            assert_eq!(cpus(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn pairs_may_lack_a_value_but_not_a_key() {
        let parsed = |text| pair(text).ok().map(|pair| (pair.key, pair.value));
        assert_eq!(parsed("A=b"), Some(("A".into(), Some("b".into()))));
        assert_eq!(parsed("A=b=c"), Some(("A".into(), Some("b=c".into()))));
        assert_eq!(parsed("A="), Some(("A".into(), Some(String::new()))));
        assert_eq!(parsed("A"), Some(("A".into(), None)));
        assert_eq!(parsed("=b"), None);
        assert_eq!(parsed(""), None);
    }

    #[test]
    fn an_environment_file_names_the_bad_line() {
        let pairs = env_file("# comment\nA=1\n\n  B\n").expect("valid");
        assert_eq!(pairs.len(), 2);
        assert_eq!(pairs[1].key, "B");
        let problem = env_file("A=1\n=2\n").expect_err("no name");
        assert!(problem.starts_with("line 2:"), "{problem}");
    }

    #[test]
    fn times_are_lengths_or_instants() {
        assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert!(duration("-5s").is_err());
        assert!(duration("soon").is_err());

        let now = jiff::Timestamp::from_second(10_000).expect("in range");
        let seen = |text| instant(text, now).ok().map(jiff::Timestamp::as_second);
        assert_eq!(seen("10m"), Some(9_400));
        assert_eq!(seen("5000"), Some(5_000));
        assert_eq!(seen("1970-01-01T01:00:00Z"), Some(3_600));
        assert_eq!(seen("yesterday"), None);
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expected) in [
            ("TERM", Some(15)),
            ("SIGTERM", Some(15)),
            ("sigkill", Some(9)),
            ("9", Some(9)),
            ("SYS", Some(31)),
            ("0", None),
            ("65", None),
            ("NOPE", None),
        ] {
            assert_eq!(signal(text).ok(), expected, "{text}");
        }
    }
}
