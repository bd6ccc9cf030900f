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

    /// As `BPF_DEVCG_ACC_*`.
    fn bits(self) -> u32 {
        u32::from(self.mknod) | u32::from(self.read) << 1 | u32::from(self.write) << 2
    }
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

/// The rules as a program for version 2, which knows no list: `BPF_PROG_TYPE_CGROUP_DEVICE`.
///
/// The last rule that fits decides, so they are asked from the last to the first. The first one
/// covers everything, and so ends the program; the verifier refuses what cannot be reached.
pub(super) fn program(rules: &[DeviceRule]) -> Vec<u64> {
    use bpf::{ACCESS, ASKED, KIND, MAJOR, MINOR, and, exit_with, jump_if, jump_unless, mov};
    let mut program = bpf::prologue();
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        match rule.kind {
            DeviceKind::All => {}
            DeviceKind::Block => tests.push(jump_unless(KIND, 1)),
            DeviceKind::Char => tests.push(jump_unless(KIND, 2)),
        }
        if rule.access != Access::ALL {
            tests.push(mov(ASKED, ACCESS));
            tests.push(and(ASKED, rule.access.bits()));
            tests.push(if rule.allow {
                // All that is asked for must be allowed.
                bpf::jump_unless_same(ASKED, ACCESS)
            } else {
                // Any of it denied is enough.
                jump_if(ASKED, 0)
            });
        }
        tests.extend(rule.major.map(|major| jump_unless(MAJOR, major)));
        tests.extend(rule.minor.map(|minor| jump_unless(MINOR, minor)));
        let is_last = tests.is_empty();
        // Each jump leads past the two instructions that end the program.
        let length = tests.len();
        for (at, test) in tests.into_iter().enumerate() {
            program.push(bpf::aimed(test, length - at + 1));
        }
        program.extend(exit_with(rule.allow));
        if is_last {
            return program;
        }
    }
    program.extend(exit_with(false));
    program
}

/// The few instructions that [`program`] needs, `struct bpf_insn` as numbers.
mod bpf {
    pub(super) const KIND: u8 = 2;
    pub(super) const ACCESS: u8 = 3;
    pub(super) const MAJOR: u8 = 4;
    pub(super) const MINOR: u8 = 5;
    /// Holds the context until the prologue is over.
    pub(super) const ASKED: u8 = 1;
    const RESULT: u8 = 0;

    const fn instruction(code: u8, to: u8, from: u8, offset: u16, value: u32) -> u64 {
        code as u64
            | (to as u64) << 8
            | (from as u64) << 12
            | (offset as u64) << 16
            | (value as u64) << 32
    }

    /// Loads `struct bpf_cgroup_dev_ctx`: access in the upper, kind in the lower half of a word,
    /// then major and minor.
    pub(super) fn prologue() -> Vec<u64> {
        const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
        const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
        vec![
            instruction(LOAD_WORD, KIND, ASKED, 0, 0),
            and(KIND, 0xffff),
            instruction(LOAD_WORD, ACCESS, ASKED, 0, 0),
            instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
            instruction(LOAD_WORD, MAJOR, ASKED, 4, 0),
            instruction(LOAD_WORD, MINOR, ASKED, 8, 0),
        ]
    }

    pub(super) fn mov(to: u8, from: u8) -> u64 {
        instruction(0xbc, to, from, 0, 0) // BPF_ALU | BPF_MOV | BPF_X
    }

    pub(super) fn and(register: u8, value: u32) -> u64 {
        instruction(0x54, register, 0, 0, value) // BPF_ALU | BPF_AND | BPF_K
    }

    // Numbers of devices are 32 bits without a sign: so are the comparisons.

    pub(super) fn jump_if(register: u8, value: u32) -> u64 {
        instruction(0x16, register, 0, 0, value) // BPF_JMP32 | BPF_JEQ | BPF_K
    }

    pub(super) fn jump_unless(register: u8, value: u32) -> u64 {
        instruction(0x56, register, 0, 0, value) // BPF_JMP32 | BPF_JNE | BPF_K
    }

    pub(super) fn jump_unless_same(left: u8, right: u8) -> u64 {
        instruction(0x5e, left, right, 0, 0) // BPF_JMP32 | BPF_JNE | BPF_X
    }

    /// The same instruction, a jump over the next `count`; others are left alone.
    pub(super) fn aimed(one: u64, count: usize) -> u64 {
        const CLASS: u64 = 0x07;
        const JMP32: u64 = 0x06;
        if one & CLASS == JMP32 {
            one | (count as u64) << 16
        } else {
            one
        }
    }

    pub(super) fn exit_with(allow: bool) -> [u64; 2] {
        [
            instruction(0xb7, RESULT, 0, 0, u32::from(allow)), // BPF_ALU64 | BPF_MOV | BPF_K
            instruction(0x95, 0, 0, 0, 0),                     // BPF_JMP | BPF_EXIT
        ]
    }
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
