//! What a sandbox's user namespace asks of its containers.

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use super::{
    super::{
        container::{IdMapWish, MountSource, Propagation, User},
        sandbox::{IdMap, PidMode},
    },
    SpecError, SpecInput,
};

/// Users of the namespace.
pub(super) fn uids(ids: IdMap) -> Vec<LinuxIdMapping> {
    mapping(ids.host_uid, ids.length)
}

/// Groups of the namespace.
pub(super) fn gids(ids: IdMap) -> Vec<LinuxIdMapping> {
    mapping(ids.host_gid, ids.length)
}

fn mapping(host: u32, length: u32) -> Vec<LinuxIdMapping> {
    let mapping = LinuxIdMappingBuilder::default()
        .container_id(0u32)
        .host_id(host)
        .size(length)
        .build();
    vec![mapping.expect("all fields are set")]
}

/// Checks what can't be had with a user namespace, and what can't be had without.
pub(super) fn check(input: &SpecInput<'_>, user: &User, pid: &PidMode) -> Result<(), SpecError> {
    let own = input.sandbox.id_map;
    let is_as_said = match input.config.id_map {
        IdMapWish::AsSandbox => true,
        IdMapWish::Host => own.is_none(),
        IdMapWish::Mapped(ids) => own == Some(ids),
    };
    if !is_as_said {
        let wished = match input.config.id_map {
            IdMapWish::Mapped(ids) => ids.to_string(),
            _ => "NODE".to_owned(),
        };
        let expected = "that of the sandbox";
        return Err(SpecError::invalid(
            "namespace_options.userns_options",
            wished,
            expected,
        ));
    }
    for mount in &input.config.mounts {
        let field = |name: &str| format!("mounts[{}].{name}", mount.target.display());
        if let Some(wished) = mount.id_map
            && own != Some(wished)
        {
            let expected = "the map of the sandbox's own user namespace";
            return Err(SpecError::invalid(field("uidMappings"), wished, expected));
        }
        if mount.id_map.is_some() && matches!(mount.source, MountSource::Tmpfs { .. }) {
            let expected = "none: a new file system has the sandbox's own ids";
            return Err(SpecError::invalid(field("uidMappings"), "a map", expected));
        }
        if own.is_some() && mount.propagation == Propagation::Bidirectional {
            let expected = "PRIVATE or HOST_TO_CONTAINER in a sandbox with a user namespace";
            return Err(SpecError::invalid(
                field("propagation"),
                "BIDIRECTIONAL",
                expected,
            ));
        }
    }
    let Some(ids) = own else {
        return Ok(());
    };
    if *pid == PidMode::Host {
        let expected = "POD, CONTAINER or TARGET in a sandbox with a user namespace";
        return Err(SpecError::invalid(
            "namespace_options.pid",
            "NODE",
            expected,
        ));
    }
    let wished = [("run_as_user", user.uid), ("run_as_group", user.gid)];
    let groups = user.supplemental_gids.iter();
    let groups = groups.map(|gid| ("supplemental_groups", *gid));
    match wished
        .into_iter()
        .chain(groups)
        .find(|(_, id)| *id >= ids.length)
    {
        Some((field, id)) => Err(SpecError::invalid(
            field,
            id,
            "an id that the sandbox's user namespace maps",
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            SourceFacts,
            testing::{Wish, built},
        },
        *,
    };
    use crate::lifecycle::container::{MountWish, UserWish};

    const IDS: IdMap = IdMap {
        host_uid: 100_000,
        host_gid: 200_000,
        length: 65_536,
    };

    fn mapped() -> Wish {
        let mut wish = Wish::new();
        wish.sandbox.id_map = Some(IDS);
        wish.config.id_map = IdMapWish::Mapped(IDS);
        let facts = SourceFacts {
            path: "/real".into(),
            shared: true,
            slave: false,
        };
        wish.host.sources.insert("/host".into(), facts);
        wish.config.mounts = vec![MountWish {
            target: "/v".into(),
            source: MountSource::Bind {
                path: "/host".into(),
                create: false,
                recursive: true,
            },
            readonly: false,
            recursive_readonly: false,
            propagation: Propagation::Private,
            options: vec![],
            selinux_relabel: false,
            id_map: Some(IDS),
        }];
        wish
    }

    #[test]
    fn the_namespace_and_its_maps_are_in_the_specification() {
        let spec = built(&mapped()).expect("valid").spec;
        let spec = serde_json::to_value(spec).expect("is JSON");
        let linux = &spec["linux"];
        let user = serde_json::json!({"type": "user", "path": "/run/sandbox/ns/user"});
        assert!(
            linux["namespaces"]
                .as_array()
                .is_some_and(|list| list.contains(&user))
        );
        let map =
            |host: u32| serde_json::json!([{"containerID": 0, "hostID": host, "size": 65536}]);
        assert_eq!(linux["uidMappings"], map(100_000));
        assert_eq!(linux["gidMappings"], map(200_000));
        let volume = spec["mounts"]
            .as_array()
            .and_then(|mounts| mounts.iter().find(|mount| mount["destination"] == "/v"))
            .expect("is there");
        assert_eq!(volume["uidMappings"], map(100_000));
        assert_eq!(volume["gidMappings"], map(200_000));

        let spec = built(&Wish::new()).expect("valid").spec;
        let linux = spec.linux().as_ref().expect("is there");
        assert_eq!((linux.uid_mappings(), linux.gid_mappings()), (&None, &None));
    }

    #[test]
    fn what_can_not_be_had_is_refused_by_field() {
        let user = |uid: u32| UserWish {
            uid: Some(uid),
            ..UserWish::default()
        };
        type Case = (fn(&mut Wish), &'static str);
        let other = "namespace_options.userns_options";
        let cases: [Case; 9] = [
            (|w| w.config.id_map = IdMapWish::Host, other),
            (
                |w| w.config.id_map = IdMapWish::Mapped(IdMap { host_gid: 0, ..IDS }),
                other,
            ),
            (
                |w| {
                    w.sandbox.id_map = None;
                    w.config.mounts.clear();
                    w.config.id_map = IdMapWish::Mapped(IDS);
                },
                other,
            ),
            (
                |w| {
                    w.sandbox.id_map = None;
                    w.config.id_map = IdMapWish::Host;
                },
                "mounts[/v].uidMappings",
            ),
            (
                |w| w.config.mounts[0].id_map = Some(IdMap { length: 1, ..IDS }),
                "mounts[/v].uidMappings",
            ),
            (
                |w| {
                    w.config.mounts[0].source = MountSource::Tmpfs {
                        size_bytes: None,
                        mode: None,
                    };
                },
                "mounts[/v].uidMappings",
            ),
            (
                |w| w.config.mounts[0].propagation = Propagation::Bidirectional,
                "mounts[/v].propagation",
            ),
            (
                |w| w.config.pid = Some(PidMode::Host),
                "namespace_options.pid",
            ),
            (
                |w| w.config.user.supplemental_gids = vec![65_536],
                "supplemental_groups",
            ),
        ];
        for (change, expected) in cases {
            let mut wish = mapped();
            change(&mut wish);
            match built(&wish) {
                Err(SpecError::InvalidValue { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        let mut wish = mapped();
        wish.config.user = user(65_535);
        built(&wish).expect("the last that is mapped");
        wish.config.user = user(65_536);
        built(&wish).expect_err("the first that is not");
    }
}
