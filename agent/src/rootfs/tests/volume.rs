//! A volume begins as what the image shows at its path, and is the container's own from then on.

use std::{
    fs,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::Path,
};

use longshore_sys::mount::overlay_for_reading;
use proptest::{collection::vec, prelude::*};

use super::{
    super::{Layer, RootfsError, visible},
    archive::Archive,
    list,
    merged::{archive, layer},
    store::Agent,
};
use crate::id::ContainerId;

fn container(agent: &Agent) -> ContainerId {
    let id = ContainerId::random();
    agent.rootfs.create_writable(&id, (0, 0)).expect("room");
    id
}

/// The root of these layers as the kernel's overlay shows it.
fn overlay(agent: &Agent, layers: &[Layer]) -> super::Listing {
    let lower: Vec<String> = visible(layers).map(|layer| layer.dir.to_string()).collect();
    let root = overlay_for_reading(&agent.dir.path().join("layers"), &lower).expect("overlayfs");
    list(Path::new(&format!("/proc/self/fd/{}/.", root.as_raw_fd())))
}

#[test]
fn a_volume_begins_with_what_the_image_has_there() {
    let agent = Agent::new();
    let base = Archive::default()
        .dir("data")
        .file("data/gone", "old")
        .file("data/kept", "base")
        .hard("data/again", "data/kept")
        .link("data/out", "/etc/passwd")
        .entry(b'6', "data/fifo", "", b"")
        .device(b'3', "data/null", 1, 3)
        .pax(&[("SCHILY.xattr.user.colour", b"red")])
        .entry(b'0', "data/marked", "", b"marked")
        .file("data/deep/er/file", "deep")
        .link("var", "data")
        .file("plain", "file");
    let top = Archive::default()
        .file("data/.wh.gone", "")
        .file("data/deep/.wh..wh..opq", "")
        .file("data/deep/new", "new");
    let layers = [agent.layer(base), agent.layer(top)];
    let id = container(&agent);

    for (number, path) in ["/data", "/var", "/data/deep"].into_iter().enumerate() {
        agent
            .rootfs
            .create_volume(&id, number, &layers, path)
            .expect(path);
    }
    let volume = agent.rootfs.volume(&id, 0);
    let shown = list(&volume);
    let below: super::Listing = overlay(&agent, &layers)
        .into_iter()
        .filter_map(|(path, what)| {
            let path = path.strip_prefix("data")?;
            Some((path.trim_start_matches('/').to_owned(), what))
        })
        .collect();
    assert_eq!(shown, below);
    assert!(shown["marked"].contains("user.colour"), "{shown:?}");
    assert_eq!(list(&agent.rootfs.volume(&id, 1)), shown, "through a link");
    assert_eq!(
        list(&agent.rootfs.volume(&id, 2))
            .into_keys()
            .collect::<Vec<_>>(),
        ["", "new"]
    );
    let inode = |name| fs::metadata(volume.join(name)).expect("there").ino();
    assert_eq!(inode("kept"), inode("again"));
    fs::write(volume.join("kept"), "changed").expect("writable");
    assert_eq!(
        agent
            .rootfs
            .read_file(&layers, "data/kept", 99)
            .expect("readable"),
        Some(b"base".to_vec())
    );

    agent
        .rootfs
        .create_volume(&id, 3, &layers, "/not/there")
        .expect("empty");
    let empty = fs::metadata(agent.rootfs.volume(&id, 3)).expect("made");
    assert_eq!((empty.mode() & 0o7777, empty.uid()), (0o755, 0));
    let refused = agent.rootfs.create_volume(&id, 4, &layers, "/plain");
    assert!(matches!(refused, Err(RootfsError::NotADirectory { .. })));

    let usage = agent.rootfs.writable_usage(&id).expect("readable");
    assert!(usage.inodes > 12, "volumes count: {usage:?}");
    agent.rootfs.remove_writable(&id).expect("removed");
    assert!(!volume.exists());
}

#[test]
fn directories_of_an_image_are_found_inside_it() {
    let agent = Agent::new();
    let layers = [
        agent.layer(
            Archive::default()
                .file("usr/share/a", "a")
                .link("share", "/usr/share")
                .link("out", "../../../../usr")
                .file("hidden/x", "x")
                .file("file", ""),
        ),
        agent.layer(
            Archive::default()
                .file("usr/share/b", "b")
                .file("hidden/.wh..wh..opq", ""),
        ),
    ];
    let found = |path: &str| {
        let dirs = agent.rootfs.directories(&layers, path).expect(path)?;
        let top = agent.dir.path().join("layers");
        let below = |dir: &std::path::PathBuf| {
            let dir = dir.strip_prefix(&top).expect("a layer's");
            dir.to_string_lossy().into_owned()
        };
        Some(dirs.iter().map(below).collect::<Vec<_>>().join(" "))
    };
    for (path, expected) in [
        ("", Some("2 1")),
        ("usr/share", Some("2/usr/share 1/usr/share")),
        ("share", Some("2/usr/share 1/usr/share")),
        ("out/share", Some("2/usr/share 1/usr/share")),
        ("hidden", Some("2/hidden")),
        ("none", None),
        ("file/below", None),
    ] {
        assert_eq!(found(path).as_deref(), expected, "{path}");
    }
    let refused = agent.rootfs.directories(&layers, "file");
    assert!(matches!(refused, Err(RootfsError::NotADirectory { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_copy_is_what_overlayfs_shows(stacks in vec(layer(), 2..5)) {
        let agent = Agent::new();
        let mut layers = Vec::new();
        for (at, steps) in stacks.iter().enumerate() {
            layers.extend(agent.try_layer(&archive(steps, &at.to_string())));
        }
        // Of a single layer, the copy of its mount shows whiteouts.
        prop_assume!(visible(&layers).count() > 1);
        let id = container(&agent);
        agent.rootfs.create_volume(&id, 0, &layers, "").expect("copied");
        prop_assert_eq!(list(&agent.rootfs.volume(&id, 0)), overlay(&agent, &layers));
    }
}
