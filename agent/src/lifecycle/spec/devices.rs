//! Devices of a container: nodes to make and what may be done with them.

use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{
    super::container::{ContainerConfig, DeviceWish},
    HostFacts, SpecError,
    host::DeviceNode,
    process::absolute,
};

/// Nodes and rules. What every container has (null, zero, ptys and so on) is not listed: the engine
/// makes and the cgroup allows them always.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) nodes: Vec<LinuxDevice>,
    pub(super) rules: Vec<LinuxDeviceCgroup>,
}

pub(super) fn devices(config: &ContainerConfig, host: &HostFacts) -> Result<Devices, SpecError> {
    let privileged = config.security.privileged;
    let mut devices = Devices {
        nodes: Vec::new(),
        rules: vec![all(privileged)],
    };
    if privileged {
        for node in &host.all_devices {
            devices.add_node(Path::new("/dev"), node);
        }
    }
    for wish in &config.devices {
        check_permissions(wish)?;
        let nodes = host
            .devices
            .get(&wish.host_path)
            .ok_or_else(|| SpecError::Device {
                path: wish.host_path.clone(),
                source: std::io::ErrorKind::NotFound.into(),
            })?;
        let target = target(wish)?;
        for node in nodes {
            devices.add_node(&target, node);
            if !privileged {
                devices.rules.push(rule(node, &wish.permissions));
            }
        }
    }
    Ok(devices)
}

impl Devices {
    /// A later node at the same path wins.
    fn add_node(&mut self, target: &Path, node: &DeviceNode) {
        // Joining an empty path would add a slash.
        let path = if node.below.as_os_str().is_empty() {
            target.to_owned()
        } else {
            target.join(&node.below)
        };
        let mut device = LinuxDevice::default();
        device
            .set_path(path)
            .set_typ(kind(node))
            .set_major(node.major.into())
            .set_minor(node.minor.into())
            .set_file_mode(Some(node.mode))
            .set_uid(Some(node.uid))
            .set_gid(Some(node.gid));
        match self
            .nodes
            .iter_mut()
            .find(|known| known.path() == device.path())
        {
            Some(known) => *known = device,
            None => self.nodes.push(device),
        }
    }
}

fn target(wish: &DeviceWish) -> Result<std::path::PathBuf, SpecError> {
    let path = if wish.container_path.as_os_str().is_empty() {
        &wish.host_path
    } else {
        &wish.container_path
    };
    let target = match path.to_str() {
        Some(text) => absolute("devices.container_path", text)?,
        None => {
            return Err(SpecError::invalid(
                "devices.container_path",
                path.display(),
                "UTF-8",
            ));
        }
    };
    if target == Path::new("/") {
        return Err(SpecError::invalid(
            "devices.container_path",
            path.display(),
            "a path below /",
        ));
    }
    Ok(target)
}

fn check_permissions(wish: &DeviceWish) -> Result<(), SpecError> {
    let text = &wish.permissions;
    let is_valid = !text.is_empty()
        && text.chars().all(|c| "rwm".contains(c))
        && "rwm".chars().all(|c| text.matches(c).count() <= 1);
    if is_valid {
        return Ok(());
    }
    Err(SpecError::invalid(
        format!("devices[{}].permissions", wish.host_path.display()),
        text,
        "some of the letters r, w and m",
    ))
}

fn kind(node: &DeviceNode) -> LinuxDeviceType {
    if node.block {
        LinuxDeviceType::B
    } else {
        LinuxDeviceType::C
    }
}

fn rule(node: &DeviceNode, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true)
        .set_typ(Some(kind(node)))
        .set_major(Some(node.major.into()))
        .set_minor(Some(node.minor.into()))
        .set_access(Some(access.to_owned()));
    rule
}

fn all(allow: bool) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_access(Some("rwm".to_owned()));
    rule
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::testing::Wish, *};

    fn node(below: &str, block: bool, major: u32, minor: u32) -> DeviceNode {
        DeviceNode {
            below: below.into(),
            block,
            major,
            minor,
            mode: 0o660,
            uid: 0,
            gid: 6,
        }
    }

    fn wish(host_path: &str, container_path: &str, permissions: &str) -> Wish {
        let mut wish = Wish::new();
        wish.host
            .devices
            .insert("/dev/fuse".into(), vec![node("", false, 10, 229)]);
        wish.host.devices.insert(
            "/dev/disks".into(),
            vec![node("a", true, 8, 0), node("by/b", true, 8, 16)],
        );
        wish.host.all_devices = vec![node("fuse", false, 10, 229), node("sda", true, 8, 0)];
        wish.config.devices = vec![DeviceWish {
            host_path: host_path.into(),
            container_path: container_path.into(),
            permissions: permissions.to_owned(),
        }];
        wish
    }

    fn json_of(wish: &Wish) -> (Value, Value) {
        let devices = devices(&wish.config, &wish.host).expect("valid");
        let value = |value: Result<Value, _>| value.expect("is JSON");
        (
            value(serde_json::to_value(devices.nodes)),
            value(serde_json::to_value(devices.rules)),
        )
    }

    #[test]
    fn one_node_with_its_rule() {
        for (container_path, expected) in [
            ("/dev/fuse", "/dev/fuse"),
            ("", "/dev/fuse"),
            ("/x/../y", "/y"),
        ] {
            let (nodes, rules) = json_of(&wish("/dev/fuse", container_path, "mr"));
            assert_eq!(
                nodes,
                json!([{"path": expected, "type": "c", "major": 10, "minor": 229, "fileMode": 0o660, "uid": 0, "gid": 6}])
            );
            assert_eq!(
                rules,
                json!([
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "mr"},
                ])
            );
        }
    }

    #[test]
    fn a_directory_is_all_its_nodes() {
        let (nodes, rules) = json_of(&wish("/dev/disks", "/d", "r"));
        assert_eq!(nodes[0]["path"], "/d/a");
        assert_eq!(nodes[1]["path"], "/d/by/b");
        assert_eq!(rules.as_array().map(Vec::len), Some(3));
    }

    #[test]
    fn privileged_has_every_device() {
        let mut wish = wish("/dev/fuse", "/dev/sda", "r");
        wish.config.security.privileged = true;
        let (nodes, rules) = json_of(&wish);
        assert_eq!(rules, json!([{"allow": true, "access": "rwm"}]));
        assert_eq!(nodes.as_array().map(Vec::len), Some(2));
        assert_eq!(
            (&nodes[1]["path"], &nodes[1]["major"]),
            (&json!("/dev/sda"), &json!(10))
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (host, container, permissions, expected) in [
            (
                "/dev/fuse",
                "rel",
                "rwm",
                "devices.container_path is \"rel\"",
            ),
            ("/dev/fuse", "/", "rwm", "devices.container_path is \"/\""),
            (
                "/dev/fuse",
                "/dev/fuse",
                "",
                "devices[/dev/fuse].permissions is \"\"",
            ),
            (
                "/dev/fuse",
                "/dev/fuse",
                "rx",
                "devices[/dev/fuse].permissions is \"rx\"",
            ),
            (
                "/dev/fuse",
                "/dev/fuse",
                "rr",
                "devices[/dev/fuse].permissions is \"rr\"",
            ),
            (
                "/dev/none",
                "/dev/none",
                "rwm",
                "cannot use device /dev/none",
            ),
        ] {
            let wish = wish(host, container, permissions);
            let error = devices(&wish.config, &wish.host)
                .expect_err(expected)
                .to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
