//! What plugins answer: results of ADD, and error objects. All of it is hostile until it is parsed.
//!
//! A result is kept as it came, for the plugins that follow and for DEL and CHECK, and read for
//! what a pod's status shows.
//!
//! Source: CNI specification, section 5.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{super::plan::Mac, conf::Version};

/// Most addresses or interfaces in one result.
const ENTRIES: usize = 256;

/// The result of a list of plugins.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    /// As it came, in the version of the network.
    pub(super) raw: Value,
    /// Addresses of the pod's interface: an IPv4 one first, the others as they came.
    pub(super) addresses: Vec<(IpNet, Option<IpAddr>)>,
    pub(super) mac: Option<Mac>,
    pub(super) mtu: u32,
    /// The last interface that is not in the pod, which is its peer with the common plugins.
    pub(super) host_interface: String,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(rename = "cniVersion")]
    version: Option<String>,
    #[serde(default)]
    interfaces: Option<Vec<Interface>>,
    #[serde(default)]
    ips: Option<Vec<Ip>>,
    #[serde(default)]
    #[expect(dead_code, reason = "must be a list of objects")]
    routes: Option<Vec<Map<String, Value>>>,
    #[serde(default)]
    #[expect(dead_code, reason = "must be an object")]
    dns: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    mtu: Option<u32>,
    #[serde(default)]
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    #[serde(default)]
    gateway: Option<String>,
    #[serde(default)]
    interface: Option<i64>,
}

/// Understands the result of an ADD; `interface` is the pod's.
///
/// # Errors
/// What is wrong with it.
pub(super) fn parse(text: &[u8], version: Version, interface: &str) -> Result<Answer, String> {
    if text.trim_ascii().is_empty() {
        return Err("no result".to_owned());
    }
    let raw: Value =
        serde_json::from_slice(text).map_err(|error| format!("what is no JSON: {error}"))?;
    read(raw, version, interface)
}

/// Reads a result that was kept.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(raw: Value, version: Version, interface: &str) -> Result<Answer, String> {
    if !raw.is_object() {
        return Err("no valid result: it is not an object".to_owned());
    }
    let wire = Wire::deserialize(&raw).map_err(|error| format!("no valid result: {error}"))?;
    // A plugin may say nothing, or speak another version than it was asked to.
    let spoken = match wire.version.as_deref() {
        None | Some("") => version,
        Some(text) => Version::parse(text).ok_or_else(|| {
            format!("a result of version {text:?}, where {version} was asked for")
        })?,
    };
    let interfaces = wire.interfaces.unwrap_or_default();
    let ips = wire.ips.unwrap_or_default();
    if interfaces.len() > ENTRIES || ips.len() > ENTRIES {
        return Err(format!("more than {ENTRIES} addresses or interfaces"));
    }
    let inside = |one: &Interface| {
        one.sandbox
            .as_deref()
            .is_some_and(|place| !place.is_empty())
    };
    let own = interfaces
        .iter()
        .find(|one| one.name == interface && inside(one));
    let mut addresses = Vec::new();
    for ip in &ips {
        let address = address(&ip.address)?;
        let gateway = match ip.gateway.as_deref() {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| format!("gateway {text:?}"))?),
        };
        // Without an index it is the pod's; with one, of which interface it says.
        let of = match ip.interface {
            None => None,
            Some(index) => Some(
                usize::try_from(index)
                    .ok()
                    .and_then(|index| interfaces.get(index))
                    .ok_or_else(|| {
                        format!("an address of interface {index}, which is not there")
                    })?,
            ),
        };
        if of.is_none_or(|of| of.name == interface && inside(of)) {
            addresses.push((address, gateway));
        }
    }
    if let Some(first) = addresses.iter().position(|(net, _)| net.addr().is_ipv4()) {
        addresses[..=first].rotate_right(1);
    }
    let mac = match own.and_then(|own| own.mac.as_deref()) {
        None | Some("") => None,
        // Some links have none of six bytes.
        Some(text) => text.parse().ok(),
    };
    Ok(Answer {
        addresses,
        mac,
        mtu: own.and_then(|own| own.mtu).unwrap_or(0),
        host_interface: interfaces
            .iter()
            .rfind(|one| !inside(one))
            .map(|one| one.name.clone())
            .unwrap_or_default(),
        raw: convert(raw, spoken, version),
    })
}

fn address(text: &str) -> Result<IpNet, String> {
    text.parse()
        .map_err(|_| format!("address {text:?}, where one with a prefix length is needed"))
}

/// Says it in the network's version: before 1.0 an address had a version of its own.
fn convert(mut raw: Value, from: Version, to: Version) -> Value {
    if let Some(object) = raw.as_object_mut() {
        object.insert("cniVersion".into(), to.as_str().into());
    }
    let numbered = |version| version < Version::V1_0_0;
    if numbered(from) != numbered(to)
        && let Some(Value::Array(ips)) = raw.get_mut("ips")
    {
        for ip in ips.iter_mut().filter_map(Value::as_object_mut) {
            if numbered(to) {
                let six = ip
                    .get("address")
                    .and_then(Value::as_str)
                    .is_some_and(|address| address.contains(':'));
                ip.insert("version".into(), if six { "6" } else { "4" }.into());
            } else {
                ip.remove("version");
            }
        }
    }
    raw
}

/// A plugin's error object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Failure {
    pub(super) code: u64,
    #[serde(default)]
    pub(super) msg: String,
    #[serde(default)]
    pub(super) details: String,
}

/// The error object in what a failed plugin wrote, if there is one.
pub(super) fn failure(text: &[u8]) -> Option<Failure> {
    let object: Map<String, Value> = serde_json::from_slice(text).ok()?;
    let mut failure = Failure::deserialize(&Value::Object(object)).ok()?;
    failure.msg = shorten(&failure.msg);
    failure.details = shorten(&failure.details);
    Some(failure)
}

/// For errors and logs: printable, and not longer than a person reads.
pub(super) fn shorten(text: &str) -> String {
    const LONGEST: usize = 1024;
    let mut short: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LONGEST)
        .collect();
    if text.trim().chars().count() > LONGEST {
        short.push('…');
    }
    short
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn at(value: &Value, version: Version) -> Result<Answer, String> {
        parse(value.to_string().as_bytes(), version, "eth0")
    }

    #[test]
    fn addresses_of_the_pod_are_told_from_others() {
        let answer = at(
            &json!({
                "cniVersion": "1.0.0",
                "interfaces": [
                    {"name": "cni0", "mac": "02:00:00:00:00:01"},
                    {"name": "veth1"},
                    {"name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1400, "sandbox": "/n"},
                    {"name": "net1", "sandbox": "/n"},
                ],
                "ips": [
                    {"address": "fd00::5/64", "gateway": "fd00::1", "interface": 2},
                    {"address": "192.0.2.9/24", "interface": 3},
                    {"address": "192.0.2.1/24", "interface": 0},
                    {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2},
                    {"address": "10.2.0.5/16"},
                ],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dns": {"nameservers": ["10.1.0.1"]},
            }),
            Version::V1_0_0,
        )
        .unwrap();
        let shown: Vec<_> = answer
            .addresses
            .iter()
            .map(|(net, gateway)| (net.to_string(), gateway.map(|ip| ip.to_string())))
            .collect();
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            shown,
            [
                ("10.1.0.5/16".to_owned(), some("10.1.0.1")),
                ("fd00::5/64".to_owned(), some("fd00::1")),
                ("10.2.0.5/16".to_owned(), None),
            ]
        );
        assert_eq!(answer.mac.unwrap().to_string(), "02:00:00:00:00:02");
        assert_eq!(
            (answer.mtu, answer.host_interface.as_str()),
            (1400, "veth1")
        );
    }

    #[test]
    fn what_is_wrong_with_a_result_is_said() {
        let check = |text: &str, part: &str| {
            let error = parse(text.as_bytes(), Version::V1_0_0, "eth0").unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        };
        check("", "no result");
        check("  \n", "no result");
        check("done.", "no JSON");
        check("[]", "no valid result");
        check("7", "no valid result");
        check(
            r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.1/8"}}"#,
            "\"0.2.0\"",
        );
        check(r#"{"cniVersion":"2.0.0"}"#, "\"2.0.0\"");
        check(r#"{"cniVersion":1}"#, "no valid result");
        check(r#"{"ips":[{"address":"10.0.0.1"}]}"#, "prefix length");
        check(r#"{"ips":[{"address":"x/8"}]}"#, "\"x/8\"");
        check(
            r#"{"ips":[{"address":"10.0.0.1/8","gateway":"y"}]}"#,
            "\"y\"",
        );
        check(
            r#"{"ips":[{"address":"10.0.0.1/8","interface":0}]}"#,
            "interface 0",
        );
        check(
            r#"{"ips":[{"address":"10.0.0.1/8","interface":-1}]}"#,
            "interface -1",
        );
        check(r#"{"interfaces":[{}]}"#, "name");
        let many = vec![json!({"address": "10.0.0.1/8"}); ENTRIES + 1];
        check(&json!({ "ips": many }).to_string(), "more than");
        let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        check(&nested, "no JSON");
    }

    #[test]
    fn a_result_is_handed_on_in_the_networks_version() {
        let new = json!({"cniVersion": "1.0.0", "ips": [{"address": "fd00::1/64"}]});
        let old = at(&new, Version::V0_3_1).unwrap().raw;
        assert_eq!(
            old,
            json!({"cniVersion": "0.3.1", "ips": [{"version": "6", "address": "fd00::1/64"}]})
        );
        assert_eq!(at(&old, Version::V1_0_0).unwrap().raw, new);
        let silent = at(&json!({"ips": null, "dns": null}), Version::V1_1_0).unwrap();
        assert_eq!(silent.raw["cniVersion"], "1.1.0");
        assert!(silent.addresses.is_empty());
    }

    #[test]
    fn error_objects_are_found_and_bounded() {
        let text = json!({"cniVersion": "1.0.0", "code": 11, "msg": "try\nlater", "details": "x".repeat(5000)});
        let found = failure(text.to_string().as_bytes()).unwrap();
        assert_eq!((found.code, found.msg.as_str()), (11, "try later"));
        assert_eq!(found.details.chars().count(), 1025);
        for text in [
            "",
            "garbage",
            "{}",
            r#"{"code":-1}"#,
            r#"{"code":"7"}"#,
            "[7]",
        ] {
            assert_eq!(failure(text.as_bytes()), None, "{text}");
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[0-9a-f:./]{0,20}".prop_map(Value::from),
            Just(json!("10.0.0.5/24")),
            Just(json!("eth0")),
            Just(json!("1.0.0")),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec(
                    (
                        prop::sample::select(vec![
                            "cniVersion",
                            "interfaces",
                            "ips",
                            "routes",
                            "dns",
                            "name",
                            "mac",
                            "sandbox",
                            "address",
                            "gateway",
                            "interface",
                            "version",
                            "mtu",
                            "code",
                            "msg",
                            "details",
                        ]),
                        inner
                    ),
                    0..6
                )
                .prop_map(|pairs| {
                    let object: Map<String, Value> = pairs
                        .into_iter()
                        .map(|(key, value)| (key.to_owned(), value))
                        .collect();
                    Value::from(object)
                }),
            ]
        })
    }

    proptest! {
        /// No answer of a plugin is a panic, and one that is taken is taken again when it is read
        /// back from the store.
        #[test]
        fn any_answer_is_a_result_or_an_error(value in json_value(), version in 0..5_usize) {
            let version = Version::ALL[version];
            let _ = failure(value.to_string().as_bytes());
            if let Ok(answer) = at(&value, version) {
                let again = read(answer.raw.clone(), version, "eth0").expect("was taken before");
                prop_assert_eq!(again, answer);
            }
        }

        #[test]
        fn any_bytes_are_a_result_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes, Version::V1_0_0, "eth0");
            let _ = failure(&bytes);
        }
    }
}
