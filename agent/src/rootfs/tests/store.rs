//! Layers and writable layers as the agent keeps them.

use std::{fs, os::unix::fs::PermissionsExt, sync::atomic::AtomicBool};

use tempfile::TempDir;

use super::{
    super::{Inventory, Layer, Limits, Rootfs, RootfsError, Usage, unpack},
    archive::Archive,
    list,
};
use crate::{
    id::ContainerId,
    store::{Changes, Store, Tables},
};

pub(super) struct Agent {
    pub(super) dir: TempDir,
    store: Store,
    pub(super) rootfs: Rootfs,
}

impl Agent {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tables = Tables::new().with::<Layer>();
        let store = Store::open(&dir.path().join("store.db"), tables).expect("a new store");
        let rootfs = Rootfs::open(dir.path(), store.clone()).expect("a new directory");
        Self { dir, store, rootfs }
    }

    pub(super) fn layer(&self, archive: Archive) -> Layer {
        self.try_layer(&archive.end()).expect("a good archive")
    }

    /// `None` for an archive that is none of a layer.
    pub(super) fn try_layer(&self, archive: &[u8]) -> Option<Layer> {
        let dir = self.rootfs.begin_layer().expect("room");
        let cancelled = AtomicBool::new(false);
        let unpacked = unpack(archive, &dir, &Limits::default(), &cancelled).ok()?;
        Some(self.rootfs.finish_layer(dir, &unpacked).expect("room"))
    }

    fn mode(&self, path: &str) -> u32 {
        let meta = fs::symlink_metadata(self.dir.path().join(path)).expect("it is there");
        meta.permissions().mode() & 0o7777
    }
}

fn new() -> Archive {
    Archive::default()
}

#[tokio::test]
async fn a_layer_lives_from_begin_to_remove() {
    let agent = Agent::new();
    let one = agent.layer(new().file("f", "one"));
    let two = agent.layer(new().file("f", "two"));
    assert_eq!((one.dir, two.dir), (1, 2));
    let changes = Changes::new().put(one.clone()).put(two.clone());
    agent.store.commit(changes).await.expect("room");
    let usage = Usage {
        bytes: one.size_bytes + two.size_bytes,
        inodes: 4,
    };
    assert_eq!(agent.rootfs.fs_usage(), usage);
    let layers = [one.clone(), two.clone()];
    let read = |path| agent.rootfs.read_file(&layers, path, 100);
    assert_eq!(read("/f").expect("readable").as_deref(), Some(&b"two"[..]));
    agent.rootfs.remove_layer(two.dir).expect("ours");
    agent.rootfs.remove_layer(two.dir).expect("absent is fine");
    assert!(agent.rootfs.has_layer(&one) && !agent.rootfs.has_layer(&two));
    let lost = agent.rootfs.read_file(&layers, "/f", 100);
    assert!(
        matches!(lost, Err(RootfsError::LayerLost { dir: 2, .. })),
        "{lost:?}"
    );
    let reopened = Rootfs::open(agent.dir.path(), agent.store.clone()).expect("as before");
    let inventory = Inventory {
        layers: vec![1],
        ..Inventory::default()
    };
    assert_eq!(reopened.inventory().expect("readable"), inventory);
    assert_eq!(
        agent.layer(new()).dir,
        3,
        "numbers are not used again while we run"
    );
}

#[tokio::test]
async fn recovery_removes_what_no_record_names() {
    let agent = Agent::new();
    let kept = agent.layer(new().file("f", "kept"));
    let lost = agent.layer(new().dir("d/d").file("d/f", "no record"));
    agent
        .store
        .commit(Changes::new().put(kept.clone()))
        .await
        .expect("room");
    let begun = agent.rootfs.begin_layer().expect("room");
    let cancelled = AtomicBool::new(false);
    let half = new().file("d/f", "half").cut();
    unpack(
        &half[..half.len() - 1],
        &begun,
        &Limits::default(),
        &cancelled,
    )
    .expect_err("cut short");
    fs::write(agent.dir.path().join("layers/007"), "").expect("new file");
    let inventory = agent.rootfs.inventory().expect("readable");
    assert_eq!(inventory.layers, [kept.dir, lost.dir]);
    assert_eq!(inventory.unfinished.len(), 1);
    assert_eq!(inventory.strange, [agent.dir.path().join("layers/007")]);
    assert_eq!(agent.rootfs.recover().expect("ours"), 2);
    assert_eq!(agent.rootfs.recover().expect("ours"), 0);
    let inventory = agent.rootfs.inventory().expect("readable");
    assert_eq!(
        (inventory.layers, inventory.unfinished),
        (vec![kept.dir], Vec::new())
    );
    assert_eq!(list(&agent.dir.path().join("layers/1")).len(), 2);
}

#[test]
fn a_discarded_layer_leaves_nothing() {
    let agent = Agent::new();
    let dir = agent.rootfs.begin_layer().expect("room");
    let cancelled = AtomicBool::new(false);
    let archive = new()
        .dir("d")
        .file("d/f", "x")
        .link("d/l", "/etc")
        .file("../x", "")
        .end();
    unpack(&archive[..], &dir, &Limits::default(), &cancelled).expect_err("it leads out");
    agent.rootfs.discard_layer(dir);
    assert_eq!(
        agent.rootfs.inventory().expect("readable"),
        Inventory::default()
    );
}

#[test]
fn users_of_the_host_reach_nothing() {
    let agent = Agent::new();
    let container = ContainerId::random();
    agent
        .rootfs
        .create_writable(&container, (0, 0))
        .expect("room");
    for (path, mode) in [
        ("layers".to_owned(), 0o700),
        ("containers".to_owned(), 0o700),
        (format!("containers/{container}"), 0o700),
        (format!("containers/{container}/upper"), 0o755),
        (format!("containers/{container}/work"), 0o700),
    ] {
        assert_eq!(agent.mode(&path), mode, "{path}");
    }
    let layer = agent.layer(new().dir("./"));
    assert_eq!(agent.mode(&format!("layers/{}", layer.dir)), 0o755);
}

#[test]
fn a_writable_layer_is_measured_and_removed() {
    let agent = Agent::new();
    let container = ContainerId::random();
    assert_eq!(
        agent.rootfs.writable_usage(&container).expect("absent"),
        Usage::default()
    );
    agent
        .rootfs
        .create_writable(&container, (0, 0))
        .expect("room");
    agent
        .rootfs
        .create_writable(&container, (0, 0))
        .expect("again is fine");
    let plan = agent.rootfs.plan(&container, &[]);
    assert_eq!(
        plan.upper,
        agent
            .dir
            .path()
            .join(format!("containers/{container}/upper"))
    );
    fs::write(plan.upper.join("a"), vec![1; 100_000]).expect("room");
    fs::hard_link(plan.upper.join("a"), plan.upper.join("b")).expect("room");
    std::os::unix::fs::symlink("/", plan.upper.join("l")).expect("room");
    let usage = agent.rootfs.writable_usage(&container).expect("readable");
    assert_eq!(usage.inodes, 3);
    assert!((100_000..200_000).contains(&usage.bytes), "{usage:?}");
    assert_eq!(
        agent.rootfs.inventory().expect("readable").writables,
        std::slice::from_ref(&container)
    );
    agent.rootfs.remove_writable(&container).expect("ours");
    agent
        .rootfs
        .remove_writable(&container)
        .expect("absent is fine");
    assert!(!plan.upper.exists());
}

#[test]
fn a_plan_names_layers_topmost_first() {
    let agent = Agent::new();
    let layers = [
        agent.layer(new().file("a", "")),
        agent.layer(new().file(".wh..wh..opq", "")),
        agent.layer(new().file("b", "")),
    ];
    let container = ContainerId::random();
    let plan = agent.rootfs.plan(&container, &layers);
    assert_eq!(plan.layers_dir, agent.dir.path().join("layers"));
    assert_eq!(plan.lower, ["3", "2"], "nothing below an opaque root");
    assert_eq!(agent.rootfs.plan(&container, &layers[..1]).lower, ["1"]);
}
