//! Which devices a container may use: deny all, then its own rules, then the standard ones.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::CgroupError;

/// Kind of device that a rule covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceKind {
    All,
    Block,
    Char,
}

/// One rule; later ones win.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceRule {
    pub(super) allow: bool,
    pub(super) kind: DeviceKind,
    /// `None` for any.
    pub(super) major: Option<u32>,
    /// `None` for any.
    pub(super) minor: Option<u32>,
    pub(super) access: Access,
}

/// What may be done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) mknod: bool,
}

impl Access {
    const ALL: Self = Self {
        read: true,
        write: true,
        mknod: true,
    };
    const MKNOD: Self = Self {
        read: false,
        write: false,
        mknod: true,
    };
}

impl DeviceRule {
    const DENY_ALL: Self = Self {
        allow: false,
        kind: DeviceKind::All,
        major: None,
        minor: None,
        access: Access::ALL,
    };

    const fn allow(
        kind: DeviceKind,
        major: Option<u32>,
        minor: Option<u32>,
        access: Access,
    ) -> Self {
        Self {
            allow: true,
            kind,
            major,
            minor,
            access,
        }
    }

    /// Covers every device and every use.
    pub(super) fn covers_all(&self) -> bool {
        self.kind == DeviceKind::All
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == Access::ALL
    }
}

/// Any node may be made; null, zero, full, random, urandom, tty, console, ptmx and pts used.
const STANDARD: [DeviceRule; 11] = {
    use DeviceKind::{Block, Char};
    [
        DeviceRule::allow(Char, None, None, Access::MKNOD),
        DeviceRule::allow(Block, None, None, Access::MKNOD),
        DeviceRule::allow(Char, Some(1), Some(3), Access::ALL),
        DeviceRule::allow(Char, Some(1), Some(5), Access::ALL),
        DeviceRule::allow(Char, Some(1), Some(7), Access::ALL),
        DeviceRule::allow(Char, Some(1), Some(8), Access::ALL),
        DeviceRule::allow(Char, Some(1), Some(9), Access::ALL),
        DeviceRule::allow(Char, Some(5), Some(0), Access::ALL),
        DeviceRule::allow(Char, Some(5), Some(1), Access::ALL),
        DeviceRule::allow(Char, Some(5), Some(2), Access::ALL),
        DeviceRule::allow(Char, Some(136), None, Access::ALL),
    ]
};

/// All rules of a container, in order, shortest form: nothing before a rule that covers all.
pub(super) fn rules(wished: &[LinuxDeviceCgroup]) -> Result<Vec<DeviceRule>, CgroupError> {
    let mut rules = vec![DeviceRule::DENY_ALL];
    for wish in wished {
        let rule = rule(wish)?;
        if rule.covers_all() {
            rules.clear();
        }
        rules.push(rule);
    }
    let all_allowed = rules.len() == 1 && rules[0].allow;
    if !all_allowed {
        rules.extend(STANDARD);
    }
    Ok(rules)
}

fn rule(wish: &LinuxDeviceCgroup) -> Result<DeviceRule, CgroupError> {
    let bad = |reason| CgroupError::BadResource {
        field: "resources.devices".to_owned(),
        reason,
    };
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .map(Some)
            .map_err(|_| bad("has a device number out of range")),
    };
    let kind = match wish.typ() {
        None | Some(LinuxDeviceType::A) => DeviceKind::All,
        Some(LinuxDeviceType::B) => DeviceKind::Block,
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => DeviceKind::Char,
        Some(LinuxDeviceType::P) => return Err(bad("has a rule for a pipe")),
    };
    let access = match wish.access().as_deref() {
        None | Some("") => Access::ALL,
        Some(letters) if letters.bytes().all(|letter| b"rwm".contains(&letter)) => Access {
            read: letters.contains('r'),
            write: letters.contains('w'),
            mknod: letters.contains('m'),
        },
        Some(_) => return Err(bad("has an access letter other than r, w, m")),
    };
    Ok(DeviceRule {
        allow: wish.allow(),
        kind,
        major: number(wish.major())?,
        minor: number(wish.minor())?,
        access,
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;

    use super::*;

    fn wish(
        allow: bool,
        kind: LinuxDeviceType,
        number: (i64, i64),
        access: &str,
    ) -> LinuxDeviceCgroup {
        LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(kind)
            .major(number.0)
            .minor(number.1)
            .access(access)
            .build()
            .expect("all fields are set")
    }

    #[test]
    fn nothing_wished_denies_all_but_the_standard_devices() {
        let rules = rules(&[]).expect("valid");
        assert_eq!(rules[0], DeviceRule::DENY_ALL);
        assert_eq!(rules[1..], STANDARD);
    }

    #[test]
    fn allow_all_leaves_nothing_else_to_say() {
        let rules = rules(&[
            wish(true, LinuxDeviceType::C, (10, 200), "rw"),
            wish(true, LinuxDeviceType::A, (-1, -1), "rwm"),
        ])
        .expect("valid");
        assert_eq!(rules.len(), 1);
        assert!(rules[0].allow && rules[0].covers_all());
    }

    #[test]
    fn own_rules_come_between_deny_and_standard() {
        let rules = rules(&[
            wish(false, LinuxDeviceType::A, (-1, -1), "rwm"),
            wish(true, LinuxDeviceType::B, (8, -1), "r"),
        ])
        .expect("valid");
        assert_eq!(rules.len(), 2 + STANDARD.len());
        assert_eq!(
            rules[1],
            DeviceRule {
                allow: true,
                kind: DeviceKind::Block,
                major: Some(8),
                minor: None,
                access: Access {
                    read: true,
                    write: false,
                    mknod: false
                },
            }
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            wish(true, LinuxDeviceType::C, (1, 3), "rx"),
            wish(true, LinuxDeviceType::P, (1, 3), "r"),
            wish(true, LinuxDeviceType::C, (-2, 3), "r"),
            wish(true, LinuxDeviceType::C, (1, 1 << 40), "r"),
        ] {
            assert!(rules(std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
    }
}
