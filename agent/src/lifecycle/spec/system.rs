//! What an init of a whole system needs that a program in a container does not.
//!
//! It mounts what it wants to by itself, so it gets little, and nothing in the way: a `/dev` of its
//! own, a `/proc` whose parts are not hidden (the kernel would not let it mount another one), a
//! read-only `/sys` (a writable one makes it wait for udev), and nothing at `/sys/fs/cgroup` on
//! version 1, where each init arranges the hierarchies as it needs them.
//!
//! Sources: systemd's `CONTAINER_INTERFACE.md`; the kernel's `mnt_already_visible()`.

use std::path::Path;

use oci_spec::runtime::Mount;
use serde_json::json;

use super::{
    super::container::{AppArmorWish, SeccompWish, Security},
    SpecError, SpecInput,
    mounts::{mount, sort, wished},
};
use crate::cgroup::CgroupVersion;

/// How much of the console is shown to who attaches.
pub const CONSOLE_BYTES: u32 = 128 << 10;

/// Below what is read-only, these belong to the system's own namespaces.
pub const WRITABLE_PATHS: [&str; 1] = ["/proc/sys/net"];

/// Without a meaning in a user namespace, or an invitation to probe the host.
const DROPPED: [&str; 5] = [
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_TIME",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
];

/// What inits mount and may not: covered, they count as mounted, and no unit fails.
const COVERED: [&str; 7] = [
    "/sys/kernel/debug",
    "/sys/kernel/tracing",
    "/sys/kernel/security",
    "/sys/kernel/config",
    "/sys/fs/pstore",
    "/sys/fs/bpf",
    "/sys/fs/fuse/connections",
];

/// What may be done: all that a user namespace allows.
pub fn system_security() -> Security {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    Security {
        add_capabilities: words(&["ALL"]),
        drop_capabilities: words(&DROPPED),
        masked_paths: words(&COVERED),
        readonly_paths: words(&["/proc/sys", "/proc/sysrq-trigger"]),
        seccomp: SeccompWish::Inline(seccomp()),
        // The default profile is for single programs.
        apparmor: AppArmorWish::Unconfined,
        ..Security::default()
    }
}

/// A list of what is denied: a system's programs use far more than the default profile allows.
/// ENOSYS makes them fall back where EPERM makes them fail.
fn seccomp() -> serde_json::Value {
    const ENOSYS: u32 = 38;
    const MNT_FORCE: u64 = 1;
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [
            "SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32",
            "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_RISCV64",
        ],
        "syscalls": [
            {
                "names": [
                    "delete_module", "finit_module", "init_module", "kexec_file_load",
                    "kexec_load", "open_by_handle_at",
                ],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": ENOSYS,
            },
            {
                "names": ["umount2"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": ENOSYS,
                "args": [{
                    "index": 1, "value": MNT_FORCE, "valueTwo": MNT_FORCE,
                    "op": "SCMP_CMP_MASKED_EQ",
                }],
            },
        ],
    })
}

/// All that process 1 finds in its environment. `container` is how it knows where it is, and
/// `container_uuid` becomes the machine id where there is none yet.
pub fn system_environment(uuid: &str) -> Vec<(String, Vec<u8>)> {
    [("container", "lxc"), ("container_uuid", uuid)]
        .map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()))
        .to_vec()
}

/// All mounts, in the order in which they are made.
pub(super) fn mounts(input: &SpecInput<'_>) -> Result<Vec<Mount>, SpecError> {
    let private = ["nosuid", "noexec", "nodev"];
    let terminals = [
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
        "gid=5",
        "max=1026",
    ];
    let boot_id = input.sandbox_dir.join("boot_id");
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &private),
        mount(
            "/proc/sys/kernel/random/boot_id",
            "bind",
            boot_id,
            &["bind", "rprivate", "ro", "nosuid", "noexec", "nodev"],
        ),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=512k"],
        ),
        mount("/dev/pts", "devpts", "devpts", &terminals),
        mount(
            "/dev/shm",
            "tmpfs",
            "tmpfs",
            &["nosuid", "nodev", "mode=1777"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &private),
        mount("/sys", "sysfs", "sysfs", &[&private[..], &["ro"]].concat()),
    ];
    if input.cgroup_version == CgroupVersion::V2 {
        mounts.push(mount(
            "/sys/fs/cgroup",
            "cgroup2",
            "cgroup",
            &[&private[..], &["relatime", "rw"]].concat(),
        ));
    }
    for wish in &input.config.mounts {
        let wished = wished(wish, input.sandbox.id_map, input.host)?;
        let taken = [Path::new("/proc"), Path::new("/sys"), Path::new("/dev")];
        if taken.contains(&wished.destination().as_path()) {
            return Err(SpecError::invalid(
                "mounts.target",
                wished.destination().display(),
                "not what every system has a mount of its own for",
            ));
        }
        mounts.push(wished);
    }
    sort(&mut mounts);
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{
        super::testing::{Wish, built},
        *,
    };
    use crate::{
        handler::seccomp,
        id::ContainerId,
        lifecycle::{container::SystemRun, sandbox::IdMap},
    };

    fn system() -> Wish {
        let mut wish = Wish::new();
        wish.config.system = Some(SystemRun {
            system: ContainerId::random(),
            first: true,
        });
        wish.config.env = system_environment("uuid");
        wish.config.security = system_security();
        wish.config.tty = true;
        wish.image.env = vec!["SECRET=of the image".to_owned()];
        wish.sandbox.id_map = Some(IdMap {
            host_uid: 1_000_000,
            host_gid: 1_000_000,
            length: 65_536,
        });
        wish
    }

    fn spec(wish: &Wish) -> Value {
        serde_json::to_value(built(wish).expect("valid").spec).expect("is JSON")
    }

    fn targets(spec: &Value) -> Vec<&str> {
        let mounts = spec["mounts"].as_array().expect("are there").iter();
        mounts
            .filter_map(|mount| mount["destination"].as_str())
            .collect()
    }

    #[test]
    fn an_init_finds_its_own_environment_and_namespaces() {
        let spec = spec(&system());
        assert_eq!(
            spec["process"]["env"],
            json!(["container=lxc", "container_uuid=uuid"])
        );
        assert_eq!(spec["process"]["noNewPrivileges"], false);
        let kinds: Vec<_> = spec["linux"]["namespaces"]
            .as_array()
            .expect("are there")
            .iter()
            .filter_map(|one| one["type"].as_str())
            .collect();
        assert_eq!(
            kinds,
            ["mount", "user", "network", "uts", "ipc", "pid", "cgroup"]
        );
        let bounding = spec["process"]["capabilities"]["bounding"].to_string();
        assert!(bounding.contains("CAP_SYS_ADMIN"), "{bounding}");
        assert!(!bounding.contains("CAP_SYS_MODULE"), "{bounding}");
    }

    #[test]
    fn version_1_leaves_the_cgroups_to_the_init() {
        for (version, mounted) in [(CgroupVersion::V1, false), (CgroupVersion::V2, true)] {
            let mut wish = system();
            wish.version = version;
            let spec = spec(&wish);
            let targets = targets(&spec);
            assert_eq!(targets.contains(&"/sys/fs/cgroup"), mounted);
            for missing in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
                assert!(!targets.contains(&missing), "{targets:?}");
            }
            let hidden = spec["linux"]["maskedPaths"].to_string();
            assert!(
                !hidden.contains("/proc"),
                "a proc with a hidden part can't be mounted again: {hidden}"
            );
        }
    }

    #[test]
    fn the_list_of_denied_calls_compiles() {
        let SeccompWish::Inline(profile) = system_security().seccomp else {
            panic!("not inline")
        };
        let profile = serde_json::from_value(profile).expect("OCI's form");
        let program = seccomp::compile(&profile).expect("compiles");
        assert!(!program.instructions.is_empty());
    }
}
