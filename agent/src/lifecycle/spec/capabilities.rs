//! Which capabilities a container's processes have.

use longshore_sys::caps;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use super::{super::container::Security, SpecError};

/// What pods rely on: the set of containerd and Docker.
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// All sets of a container's first process.
///
/// `ALL` first, then single additions, then single drops. Inheritable and ambient stay empty
/// unless ambient ones are asked for: inheritable ones survive where nobody expects them.
pub(super) fn capabilities(security: &Security, last: u32) -> Result<LinuxCapabilities, SpecError> {
    let add = names(&security.add_capabilities, last)?;
    let drop = names(&security.drop_capabilities, last)?;
    let ambient = names(&security.ambient_capabilities, last)?;

    let mut set: Capabilities = if security.privileged {
        known(last)
    } else {
        let mut set: Capabilities = DEFAULT.into_iter().collect();
        if add.all {
            set = known(last);
        }
        if drop.all {
            set.clear();
        }
        set.extend(add.single);
        for dropped in drop.single {
            set.remove(&dropped);
        }
        set
    };
    let mut kept: Capabilities = ambient.single.into_iter().collect();
    if ambient.all {
        kept = known(last);
    }
    set.extend(kept.iter().copied());

    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(set.clone()))
        .set_permitted(Some(set.clone()))
        .set_effective(Some(set))
        .set_inheritable(Some(kept.clone()))
        .set_ambient(Some(kept));
    Ok(sets)
}

#[derive(Default)]
struct Names {
    all: bool,
    single: Vec<Capability>,
}

fn names(wished: &[String], last: u32) -> Result<Names, SpecError> {
    let mut names = Names::default();
    for name in wished {
        if name.eq_ignore_ascii_case("ALL") {
            names.all = true;
            continue;
        }
        let known = caps::number(name)
            .filter(|&number| number <= last)
            .and_then(capability)
            .ok_or_else(|| SpecError::UnknownCapability {
                name: name.chars().take(100).collect(),
            })?;
        names.single.push(known);
    }
    Ok(names)
}

fn known(last: u32) -> Capabilities {
    (0..=last).filter_map(capability).collect()
}

fn capability(number: u32) -> Option<Capability> {
    caps::name(number)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(add: &[&str], drop: &[&str], expected: &[&str]) {
        let texts = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let security = Security {
            add_capabilities: texts(add),
            drop_capabilities: texts(drop),
            ..Security::default()
        };
        let sets = capabilities(&security, 40).expect("known names");
        for set in [sets.bounding(), sets.permitted(), sets.effective()] {
            assert_eq!(sorted(set.as_ref()), expected, "{add:?} {drop:?}");
        }
        for set in [sets.inheritable(), sets.ambient()] {
            assert_eq!(sorted(set.as_ref()), [""; 0]);
        }
    }

    fn sorted(set: Option<&Capabilities>) -> Vec<String> {
        let mut names: Vec<_> = set.into_iter().flatten().map(ToString::to_string).collect();
        names.sort();
        names
    }

    #[test]
    fn every_number_has_its_capability() {
        for number in 0..=40 {
            let name = caps::name(number).expect("41 are known");
            assert_eq!(
                capability(number).map(|one| one.to_string()).as_deref(),
                Some(name)
            );
        }
        assert_eq!(known(40).len(), 41);
        assert_eq!(known(36).len(), 37);
    }

    #[test]
    fn all_comes_first_then_additions_then_drops() {
        let all: Vec<_> = sorted(Some(&known(40)));
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let without =
            |name: &str| -> Vec<&str> { all.iter().copied().filter(|one| *one != name).collect() };
        let default = [
            "AUDIT_WRITE",
            "CHOWN",
            "DAC_OVERRIDE",
            "FOWNER",
            "FSETID",
            "KILL",
            "MKNOD",
            "NET_BIND_SERVICE",
            "NET_RAW",
            "SETFCAP",
            "SETGID",
            "SETPCAP",
            "SETUID",
            "SYS_CHROOT",
        ];
        check(&[], &[], &default);
        check(&["ALL"], &[], &all);
        check(&["all"], &["KILL"], &without("KILL"));
        check(&[], &["ALL"], &[]);
        check(&["chown", "CAP_SYS_TIME"], &["ALL"], &["CHOWN", "SYS_TIME"]);
        check(&["ALL"], &["ALL"], &[]);
        check(&["KILL"], &["KILL", "ALL"], &[]);
        check(
            &[],
            &["net_raw"],
            &[
                "AUDIT_WRITE",
                "CHOWN",
                "DAC_OVERRIDE",
                "FOWNER",
                "FSETID",
                "KILL",
                "MKNOD",
                "NET_BIND_SERVICE",
                "SETFCAP",
                "SETGID",
                "SETPCAP",
                "SETUID",
                "SYS_CHROOT",
            ],
        );
    }

    #[test]
    fn ambient_ones_are_in_all_sets() {
        let security = Security {
            drop_capabilities: vec!["ALL".to_owned()],
            ambient_capabilities: vec!["NET_ADMIN".to_owned()],
            ..Security::default()
        };
        let sets = capabilities(&security, 40).expect("known");
        for set in [
            sets.bounding(),
            sets.permitted(),
            sets.effective(),
            sets.inheritable(),
            sets.ambient(),
        ] {
            assert_eq!(sorted(set.as_ref()), ["NET_ADMIN"]);
        }
    }

    #[test]
    fn privileged_has_all_that_the_kernel_knows() {
        let security = Security {
            privileged: true,
            drop_capabilities: vec!["ALL".to_owned()],
            ..Security::default()
        };
        let sets = capabilities(&security, 38).expect("known");
        assert_eq!(sets.bounding().as_ref().map(Capabilities::len), Some(39));
        assert_eq!(sets.inheritable().as_ref().map(Capabilities::len), Some(0));
    }

    #[test]
    fn unknown_names_are_refused() {
        for (name, last) in [("FLY", 40), ("", 40), ("CAP_", 40), ("BPF", 38)] {
            let security = Security {
                drop_capabilities: vec![name.to_owned()],
                ..Security::default()
            };
            let error = capabilities(&security, last).expect_err("unknown");
            assert!(matches!(error, SpecError::UnknownCapability { name: found } if found == name));
        }
    }
}
