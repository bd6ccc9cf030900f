//! Seccomp, AppArmor, SELinux, hidden and read-only paths.

use oci_spec::runtime::{Capabilities, LinuxSeccomp};

use super::{
    super::{
        container::{AppArmorWish, ContainerConfig, SeccompWish, Security},
        sandbox::SandboxConfig,
    },
    HostFacts, SpecError,
};
use crate::{handler::seccomp, id::Face};

/// The profile of containers that do not say, if the host has it loaded.
const APPARMOR_DEFAULT: &str = "longshore-default";

/// CRI says of each sandbox whether its containers may be privileged; the native face of each
/// container only.
pub(super) fn check_privileged(
    config: &ContainerConfig,
    sandbox: &SandboxConfig,
) -> Result<(), SpecError> {
    if config.security.privileged && sandbox.face == Face::Cri && !sandbox.privileged {
        return Err(SpecError::PrivilegedInUnprivilegedSandbox);
    }
    Ok(())
}

/// Paths that are hidden, and paths that are read-only; privileged containers see all.
pub(super) fn paths(security: &Security) -> Result<(Vec<String>, Vec<String>), SpecError> {
    if security.privileged {
        return Ok((Vec::new(), Vec::new()));
    }
    for (field, paths) in [
        ("security.masked_paths", &security.masked_paths),
        ("security.readonly_paths", &security.readonly_paths),
    ] {
        if let Some(path) = paths
            .iter()
            .find(|path| !path.starts_with('/') || path.contains('\0'))
        {
            return Err(SpecError::invalid(field, path, "an absolute path"));
        }
    }
    Ok((
        security.masked_paths.clone(),
        security.readonly_paths.clone(),
    ))
}

/// The filter of system calls. `bounding` decides what the default profile lets through.
pub(super) fn seccomp(
    security: &Security,
    bounding: &Capabilities,
    host: &HostFacts,
) -> Result<Option<LinuxSeccomp>, SpecError> {
    if security.privileged || security.seccomp == SeccompWish::Unconfined {
        return Ok(None);
    }
    if !host.seccomp {
        return Err(SpecError::SeccompMissing);
    }
    let failed = |profile: String| {
        |source: serde_json::Error| SpecError::SeccompProfile {
            profile,
            source: source.into(),
        }
    };
    match &security.seccomp {
        SeccompWish::Unconfined => Ok(None),
        SeccompWish::Default => Ok(Some(seccomp::default_profile(bounding))),
        SeccompWish::Localhost(path) if !path.is_absolute() => Err(SpecError::invalid(
            "security.seccomp.localhost",
            path.display(),
            "an absolute path",
        )),
        SeccompWish::Localhost(path) => serde_json::from_slice(&host.seccomp_profile)
            .map(Some)
            .map_err(failed(path.display().to_string())),
        SeccompWish::Inline(profile) => serde_json::from_value(profile.clone())
            .map(Some)
            .map_err(failed("inline".to_owned())),
    }
}

/// The AppArmor profile to change to. Without a wish a host that lacks the default profile has
/// none, as a host without AppArmor.
pub(super) fn apparmor(security: &Security, host: &HostFacts) -> Result<Option<String>, SpecError> {
    if security.privileged {
        return Ok(None);
    }
    let is_loaded = |profile: &str| {
        host.apparmor
            .iter()
            .flatten()
            .any(|loaded| loaded == profile)
    };
    match &security.apparmor {
        AppArmorWish::Unconfined => Ok(None),
        AppArmorWish::Default => {
            Ok(is_loaded(APPARMOR_DEFAULT).then(|| APPARMOR_DEFAULT.to_owned()))
        }
        AppArmorWish::Localhost(name) => {
            let profile = name.strip_prefix("localhost/").unwrap_or(name);
            if profile.is_empty() {
                return Err(SpecError::invalid(
                    "security.apparmor.localhost",
                    name,
                    "the name of a loaded profile",
                ));
            }
            if host.apparmor.is_none() {
                return Err(SpecError::AppArmorMissing {
                    profile: profile.to_owned(),
                });
            }
            if !is_loaded(profile) {
                return Err(SpecError::AppArmorProfile {
                    profile: profile.to_owned(),
                });
            }
            Ok(Some(profile.to_owned()))
        }
    }
}

/// Checks the wish for an SELinux label. Without SELinux a label has no effect, and the same pod
/// must run on both kinds of host; with it the label would have to be enforced, which we can't.
pub(super) fn check_selinux(security: &Security, host: &HostFacts) -> Result<(), SpecError> {
    let Some([level, kind, role, user]) = &security.selinux else {
        return Ok(());
    };
    if !is_level(level) {
        return Err(SpecError::invalid(
            "security.selinux.level",
            level,
            "empty or like s0, s0-s0, s0:c1,c2",
        ));
    }
    let says_something = [level, kind, role, user]
        .iter()
        .any(|part| !part.is_empty());
    if host.selinux && says_something && !security.privileged {
        return Err(SpecError::SelinuxUnsupported);
    }
    Ok(())
}

/// `s0`, `s0-s0`, each with categories like `:c1,c5.c9`.
fn is_level(level: &str) -> bool {
    if level.is_empty() {
        return true;
    }
    let Some(rest) = level.strip_prefix("s0") else {
        return false;
    };
    let rest = rest.strip_prefix("-s0").unwrap_or(rest);
    let Some(categories) = rest.strip_prefix(':') else {
        return rest.is_empty();
    };
    categories.split([',', '.']).all(|category| {
        category.strip_prefix('c').is_some_and(|number| {
            (1..=4).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit())
        })
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Capability;
    use serde_json::json;

    use super::{super::testing::Wish, *};

    fn host() -> HostFacts {
        Wish::new().host
    }

    #[test]
    fn only_cri_asks_the_sandbox_for_privilege() {
        for (face, sandbox_may, privileged, expected) in [
            (Face::Cri, false, false, true),
            (Face::Cri, false, true, false),
            (Face::Cri, true, true, true),
            (Face::Native, false, true, true),
        ] {
            let mut wish = Wish::new();
            wish.sandbox.face = face;
            wish.sandbox.privileged = sandbox_may;
            wish.config.security.privileged = privileged;
            assert_eq!(
                check_privileged(&wish.config, &wish.sandbox).is_ok(),
                expected
            );
        }
    }

    #[test]
    fn paths_are_as_given_and_none_if_privileged() {
        let mut security = Security {
            masked_paths: vec!["/proc/kcore".to_owned()],
            readonly_paths: vec!["/proc/sys".to_owned()],
            ..Security::default()
        };
        let (masked, readonly) = paths(&security).expect("valid");
        assert_eq!(
            (masked, readonly),
            (
                security.masked_paths.clone(),
                security.readonly_paths.clone()
            )
        );
        security.privileged = true;
        assert_eq!(paths(&security).expect("valid"), (vec![], vec![]));
        for wrong in ["", "proc", "/a\0"] {
            let security = Security {
                readonly_paths: vec![wrong.to_owned()],
                ..Security::default()
            };
            paths(&security).expect_err(wrong);
        }
    }

    #[test]
    fn seccomp_profiles() {
        let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]});
        let parsed: LinuxSeccomp = serde_json::from_value(profile.clone()).expect("valid");
        let bounding = Capabilities::from([Capability::SysChroot]);
        let text = |text: &str| text.as_bytes().to_vec();
        for (wish, privileged, content, expected) in [
            (
                SeccompWish::Default,
                false,
                vec![],
                Ok(Some(seccomp::default_profile(&bounding))),
            ),
            (SeccompWish::Default, true, vec![], Ok(None)),
            (SeccompWish::Unconfined, false, vec![], Ok(None)),
            (
                SeccompWish::Localhost("/p.json".into()),
                false,
                text(&profile.to_string()),
                Ok(Some(parsed.clone())),
            ),
            (
                SeccompWish::Localhost("/p.json".into()),
                false,
                text("{"),
                Err("cannot use the seccomp profile /p.json"),
            ),
            (
                SeccompWish::Localhost("p.json".into()),
                false,
                text("{}"),
                Err("security.seccomp.localhost is \"p.json\""),
            ),
            (
                SeccompWish::Localhost("/p.json".into()),
                true,
                text("{"),
                Ok(None),
            ),
            (
                SeccompWish::Inline(profile),
                false,
                vec![],
                Ok(Some(parsed)),
            ),
            (
                SeccompWish::Inline(json!({"defaultAction": 5})),
                false,
                vec![],
                Err("cannot use the seccomp profile inline"),
            ),
        ] {
            let security = Security {
                privileged,
                seccomp: wish,
                ..Security::default()
            };
            let host = HostFacts {
                seccomp_profile: content,
                ..host()
            };
            match (super::seccomp(&security, &bounding, &host), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(error), Err(expected)) => {
                    assert!(error.to_string().starts_with(expected), "{error}")
                }
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        }
    }

    #[test]
    fn a_kernel_without_seccomp_runs_unconfined_containers_only() {
        let host = HostFacts {
            seccomp: false,
            ..host()
        };
        let with = |seccomp| Security {
            seccomp,
            ..Security::default()
        };
        let none = Capabilities::new();
        assert!(matches!(
            super::seccomp(&with(SeccompWish::Default), &none, &host),
            Err(SpecError::SeccompMissing)
        ));
        assert!(super::seccomp(&with(SeccompWish::Unconfined), &none, &host).is_ok());
    }

    #[test]
    fn apparmor_profiles() {
        let on = |profiles: &[&str]| Some(profiles.iter().map(|&name| name.to_owned()).collect());
        let local = |name: &str| AppArmorWish::Localhost(name.to_owned());
        for (wish, loaded, expected) in [
            (AppArmorWish::Default, None, Ok(None)),
            (AppArmorWish::Default, on(&[]), Ok(None)),
            (
                AppArmorWish::Default,
                on(&[APPARMOR_DEFAULT]),
                Ok(Some(APPARMOR_DEFAULT)),
            ),
            (AppArmorWish::Unconfined, on(&[APPARMOR_DEFAULT]), Ok(None)),
            (local("mine"), on(&["mine"]), Ok(Some("mine"))),
            (local("localhost/mine"), on(&["mine"]), Ok(Some("mine"))),
            (
                local("mine"),
                on(&["other"]),
                Err("AppArmor profile \"mine\" is not loaded"),
            ),
            (
                local("mine"),
                None,
                Err("AppArmor profile \"mine\" is asked for, but AppArmor is not enabled"),
            ),
            (
                local("localhost/"),
                on(&["mine"]),
                Err("security.apparmor.localhost"),
            ),
        ] {
            let security = Security {
                apparmor: wish.clone(),
                ..Security::default()
            };
            let host = HostFacts {
                apparmor: loaded,
                ..host()
            };
            match (apparmor(&security, &host), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found.as_deref(), expected, "{wish:?}"),
                (Err(error), Err(expected)) => {
                    assert!(error.to_string().starts_with(expected), "{error}")
                }
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        }
    }

    #[test]
    fn selinux_labels() {
        for (level, expected) in [
            ("", true),
            ("s0", true),
            ("s0-s0", true),
            ("s0:c1,c2", true),
            ("s0-s0:c0.c1023", true),
            ("s1", false),
            ("s0:", false),
            ("s0:c", false),
            ("s0:c1,", false),
            ("s0:c12345", false),
            ("s0-s1", false),
            ("s0 ", false),
        ] {
            let security = Security {
                selinux: Some([level, "", "", ""].map(str::to_owned)),
                ..Security::default()
            };
            assert_eq!(
                check_selinux(&security, &host()).is_ok(),
                expected,
                "{level:?}"
            );
            if expected {
                let enforcing = HostFacts {
                    selinux: true,
                    ..host()
                };
                assert_eq!(
                    check_selinux(&security, &enforcing).is_ok(),
                    level.is_empty()
                );
            }
        }
    }
}
