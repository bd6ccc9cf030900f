//! What plugins are told of a pod: `CNI_ARGS`, and the arguments of capabilities.
//!
//! Source: CNI conventions (capabilities); CRI, network of a sandbox; Kubernetes, resource
//! quantities.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::{
    super::{
        plan::{Mac, SandboxNetwork},
        ports::PortMapping,
    },
    error::CniError,
};
use crate::id::SandboxId;

/// Bits a second into the pod.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// Bits a second out of the pod.
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Wished addresses, separated by commas, with or without prefix length; for plugins that declare
/// the capability `ips`.
pub const IPS_ANNOTATION: &str = "cni.longshore/ips";
/// Wished hardware address; for plugins that declare the capability `mac`.
pub const MAC_ANNOTATION: &str = "cni.longshore/mac";

/// Kubernetes takes bandwidths from 1k to 1P.
const BANDWIDTH: std::ops::RangeInclusive<u128> = 1_000..=1_000_000_000_000_000;
/// Bits that may pass at once: as much as the plugin can count, as its peers say.
const BURST: u32 = u32::MAX;

/// What is known of a pod beside its wish for a network.
#[derive(Clone, Debug, Default)]
pub struct PodFacts {
    /// Kubernetes namespace; may be empty.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Kubernetes uid; may be empty.
    pub uid: String,
    /// Annotations of the pod.
    pub annotations: BTreeMap<String, String>,
    /// Name servers, search domains and options, if the pod has its own.
    pub dns: Option<[Vec<String>; 3]>,
    /// The pod's cgroup.
    pub cgroup: String,
    /// Where its network namespace will be bound.
    pub netns: PathBuf,
}

/// `CNI_ARGS` as Kubernetes' plugins read it.
pub(super) fn cni_args(sandbox: &SandboxId, pod: &PodFacts) -> Result<String, CniError> {
    let mut args = "IgnoreUnknown=1".to_owned();
    for (key, field, value) in [
        (
            "K8S_POD_NAMESPACE",
            "metadata.namespace",
            pod.namespace.as_str(),
        ),
        ("K8S_POD_NAME", "metadata.name", &pod.name),
        ("K8S_POD_INFRA_CONTAINER_ID", "id", sandbox.as_str()),
        ("K8S_POD_UID", "metadata.uid", &pod.uid),
    ] {
        if value.contains([';', '=']) || value.contains(char::is_control) {
            return Err(refused(
                field,
                value,
                "without ';', '=' and control characters",
            ));
        }
        if !value.is_empty() {
            args.push_str(&format!(";{key}={value}"));
        }
    }
    Ok(args)
}

/// Arguments by capability; a plugin gets those that it declares.
pub(super) fn capabilities(
    wish: &SandboxNetwork,
    pod: &PodFacts,
) -> Result<Map<String, Value>, CniError> {
    let mut all = Map::new();
    let ports: Vec<_> = wish
        .ports
        .iter()
        .filter(|port| port.host_port != 0)
        .map(port)
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".into(), ports.into());
    }
    if let Some(bandwidth) = bandwidth(pod)? {
        all.insert("bandwidth".into(), bandwidth);
    }
    if let Some([servers, searches, options]) = &pod.dns {
        let dns = json!({"servers": servers, "searches": searches, "options": options});
        all.insert("dns".into(), dns);
    }
    let ips = ips(wish, pod)?;
    if !ips.is_empty() {
        all.insert("ips".into(), ips.into());
    }
    if let Some(text) = pod.annotations.get(MAC_ANNOTATION) {
        let mac: Mac = text
            .parse()
            .map_err(|_| annotation(MAC_ANNOTATION, text, "six bytes as 02:11:22:33:44:55"))?;
        all.insert("mac".into(), mac.to_string().into());
    }
    if !pod.cgroup.is_empty() {
        all.insert("cgroupPath".into(), pod.cgroup.clone().into());
    }
    Ok(all)
}

fn refused(field: impl Into<String>, value: &str, expected: &'static str) -> CniError {
    CniError::Argument {
        field: field.into(),
        value: value.to_owned(),
        expected,
    }
}

fn annotation(key: &str, value: &str, expected: &'static str) -> CniError {
    refused(format!("annotations[{key:?}]"), value, expected)
}

fn port(mapping: &PortMapping) -> Value {
    let mut port = json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": mapping.protocol.to_string(),
    });
    if let Some(ip) = mapping.host_ip {
        port["hostIP"] = ip.to_string().into();
    }
    port
}

fn bandwidth(pod: &PodFacts) -> Result<Option<Value>, CniError> {
    let mut rates = Map::new();
    for (key, rate, burst) in [
        (INGRESS, "ingressRate", "ingressBurst"),
        (EGRESS, "egressRate", "egressBurst"),
    ] {
        let Some(text) = pod.annotations.get(key) else {
            continue;
        };
        let bits = quantity(text)
            .filter(|bits| BANDWIDTH.contains(bits))
            .and_then(|bits| u64::try_from(bits).ok())
            .ok_or_else(|| annotation(key, text, "bits a second from 1k to 1P, as 10M"))?;
        rates.insert(rate.into(), bits.into());
        rates.insert(burst.into(), BURST.into());
    }
    Ok((!rates.is_empty()).then(|| rates.into()))
}

fn ips(wish: &SandboxNetwork, pod: &PodFacts) -> Result<Vec<String>, CniError> {
    let mut all: Vec<_> = wish.addresses.iter().map(IpAddr::to_string).collect();
    if let Some(text) = pod.annotations.get(IPS_ANNOTATION) {
        for one in text.split(',').map(str::trim) {
            if one.parse::<IpAddr>().is_err() && one.parse::<IpNet>().is_err() {
                return Err(annotation(
                    IPS_ANNOTATION,
                    text,
                    "addresses, separated by commas",
                ));
            }
            all.push(one.to_owned());
        }
    }
    Ok(all)
}

/// A resource quantity, rounded up: `10M`, `1.5Gi`, `2e6`, `500k`.
fn quantity(text: &str) -> Option<u128> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || digits.len() > 18 || fraction.contains('.') {
        return None;
    }
    let mantissa: u128 = digits.parse().ok()?;
    let places = i32::try_from(fraction.len()).ok()?;
    let (factor, tens) = match suffix {
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "" => (1, 0),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        exponent => {
            let exponent = exponent.strip_prefix(['e', 'E'])?;
            (1, exponent.parse().ok()?)
        }
    };
    let tens: i32 = i32::checked_sub(tens, places)?;
    let scale = 10_u128.checked_pow(tens.unsigned_abs())?;
    let value = mantissa.checked_mul(factor)?;
    if tens < 0 {
        Some(value.div_ceil(scale))
    } else {
        value.checked_mul(scale)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::network::ports::Protocol;

    #[test]
    fn quantities_mean_what_kubernetes_means() {
        let check =
            |text: &str, expected: Option<u128>| assert_eq!(quantity(text), expected, "{text}");
        check("10M", Some(10_000_000));
        check("1.5k", Some(1_500));
        check("1Ki", Some(1024));
        check("0.5Mi", Some(524_288));
        check("2e6", Some(2_000_000));
        check("1E", Some(1_000_000_000_000_000_000));
        check("1E3", Some(1_000));
        check("1500m", Some(2));
        check("1.", Some(1));
        check(".5k", Some(500));
        check("7", Some(7));
        check("", None);
        check(".", None);
        check("-1", None);
        check("1.2.3", None);
        check("10 M", None);
        check("10Mb", None);
        check("1e999", None);
        check("e3", None);
    }

    #[test]
    fn a_pod_is_described_as_kubernetes_plugins_expect() {
        let sandbox = SandboxId::random();
        let mut pod = PodFacts {
            namespace: "shop".into(),
            name: "web".into(),
            uid: "u-1".into(),
            ..PodFacts::default()
        };
        assert_eq!(
            cni_args(&sandbox, &pod).unwrap(),
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID={sandbox};K8S_POD_UID=u-1"
            )
        );
        pod.name = "web;K8S_POD_NAMESPACE=kube-system".into();
        let error = cni_args(&sandbox, &pod).unwrap_err();
        assert!(error.to_string().starts_with("metadata.name = "), "{error}");
    }

    #[test]
    fn capabilities_hold_what_the_pod_asks_for() {
        let mut wish = SandboxNetwork::default();
        let mut pod = PodFacts::default();
        assert!(capabilities(&wish, &pod).unwrap().is_empty());
        let mapping = |host_port, host_ip: Option<&str>| PortMapping {
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port: 80,
            protocol: Protocol::Udp,
        };
        wish.ports = vec![
            mapping(0, None),
            mapping(8080, None),
            mapping(8081, Some("127.0.0.1")),
        ];
        pod.cgroup = "/pods/x".into();
        pod.dns = Some([vec!["10.0.0.2".into()], vec![], vec!["ndots:5".into()]]);
        for (key, value) in [
            (INGRESS, "1M"),
            (EGRESS, "2Mi"),
            (IPS_ANNOTATION, "10.1.0.9, fd00::9/64"),
            (MAC_ANNOTATION, "02:00:00:00:00:0A"),
        ] {
            pod.annotations.insert(key.into(), value.into());
        }
        assert_eq!(
            Value::Object(capabilities(&wish, &pod).unwrap()),
            json!({
                "portMappings": [
                    {"hostPort": 8080, "containerPort": 80, "protocol": "udp"},
                    {"hostPort": 8081, "containerPort": 80, "protocol": "udp", "hostIP": "127.0.0.1"},
                ],
                "bandwidth": {
                    "ingressRate": 1_000_000, "ingressBurst": 4_294_967_295_u32,
                    "egressRate": 2_097_152, "egressBurst": 4_294_967_295_u32,
                },
                "dns": {"servers": ["10.0.0.2"], "searches": [], "options": ["ndots:5"]},
                "ips": ["10.1.0.9", "fd00::9/64"],
                "mac": "02:00:00:00:00:0a",
                "cgroupPath": "/pods/x",
            })
        );
        for (key, value) in [
            (INGRESS, "1"),
            (EGRESS, "lots"),
            (IPS_ANNOTATION, "10.1.0.9,"),
            (MAC_ANNOTATION, "02:00"),
        ] {
            let mut wrong = pod.clone();
            wrong.annotations.insert(key.into(), value.into());
            let error = capabilities(&wish, &wrong).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
