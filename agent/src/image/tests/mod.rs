//! Pulls, removals and prunes against registries of ours, and against Debian's docker-registry.
#![allow(clippy::unwrap_used)]

mod docker_registry;
mod fake;
mod hostile;
mod system;
mod wire;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::Duration;

use fake::{Fake, image, image_for, index, noise, tar};

use super::manifest::Compression::{Gzip, None as Plain, Zstd};
use super::*;
use crate::event::{EventKind, EventLog};
use crate::store::Tables;

/// Images in a directory of their own.
struct Node {
    images: Images,
    store: Store,
    rootfs: Rootfs,
    dir: tempfile::TempDir,
}

/// Nobody uses anything.
const NOBODY: Holders<'static> = Holders {
    image: &|_, _| None,
    layers: &|_| HashSet::new(),
};

/// For registries that go silent on purpose.
fn impatient() -> ImageChapterConfig {
    ImageChapterConfig {
        stall_timeout: Duration::from_millis(400),
        ..quick()
    }
}

/// Little back-off, so that tests of failures are short.
fn quick() -> ImageChapterConfig {
    ImageChapterConfig {
        first_backoff: Duration::from_millis(5),
        attempts: 3,
        ..ImageChapterConfig::default()
    }
}

impl Node {
    fn new() -> Node {
        Node::with(quick())
    }

    fn with(config: ImageChapterConfig) -> Node {
        Node::open(tempfile::tempdir().unwrap(), config)
    }

    fn open(dir: tempfile::TempDir, config: ImageChapterConfig) -> Node {
        // Whichever test of the process is first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let tables = Tables::new().with::<Image>().with::<Layer>();
        let store = Store::open(&dir.path().join("store.db"), tables).unwrap();
        let rootfs = Rootfs::open(dir.path(), store.clone()).unwrap();
        let images = Images::new(store.clone(), rootfs.clone(), dir.path(), config).unwrap();
        Node {
            images,
            store,
            rootfs,
            dir,
        }
    }

    fn pull(&self, reference: &ImageRef) -> Pull {
        self.pull_as(reference, RegistryAuth::Anonymous)
    }

    fn pull_as(&self, reference: &ImageRef, auth: RegistryAuth) -> Pull {
        let platform = "linux/amd64".parse().unwrap();
        self.images.pull(PullRequest {
            reference: reference.clone().into(),
            auth,
            platform,
            face: Face::Native,
        })
    }

    fn image(&self, name: &str) -> Option<Arc<Image>> {
        self.images.find(&self.store.snapshot(), name).unwrap()
    }

    fn read(&self, name: &str, path: &str) -> Option<Vec<u8>> {
        let at = self.store.snapshot();
        let image = self.images.find(&at, name).unwrap().unwrap();
        let layers = self.images.layers(&at, &image).unwrap();
        self.rootfs.read_file(&layers, path, 1 << 20).unwrap()
    }

    /// Waits until what runs in the background is done; panics if it never is.
    async fn until(&self, what: &str, holds: impl Fn(&Node) -> bool) {
        for _ in 0..1000 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never: {what}");
    }

    /// Nothing is on disk that no record explains, but partial blobs.
    fn is_clean(&self) -> bool {
        let at = self.store.snapshot();
        let mut recorded: Vec<u32> = at.all::<Layer>().map(|layer| layer.dir).collect();
        recorded.sort_unstable();
        let found = self.rootfs.inventory().unwrap();
        let blobs: BTreeSet<Digest> = self
            .images
            .inner
            .content
            .list()
            .unwrap()
            .into_iter()
            .map(|(d, _)| d)
            .collect();
        found.layers == recorded && found.unfinished.is_empty() && blobs == blobs_in_use(&at)
    }

    fn partial_files(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("blobs/partial"))
            .unwrap()
            .count()
    }

    async fn remove(&self, name: &str) -> Removal {
        self.remove_for(name, Face::Native).await
    }

    async fn remove_for(&self, name: &str, face: Face) -> Removal {
        let request = RemoveRequest {
            name: name.to_owned(),
            face,
            only_this_name: false,
        };
        self.images.remove(&request, NOBODY).await.unwrap()
    }
}

fn three_layers() -> fake::TestImage {
    image(&[
        (tar(&[("etc/a", b"one"), ("etc/b", b"one")]), Gzip),
        (tar(&[("etc/b", b"two"), ("big", &noise(1, 300_000))]), Zstd),
        (tar(&[("etc/.wh.a", b""), ("etc/c", b"three")]), Plain),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_brings_layers_config_names_and_one_event() {
    let (fake, node) = (Fake::start().await, Node::new());
    let test = three_layers();
    fake.put("1", &test);
    let reference = fake.reference("some/app:1");
    let pull = node.pull(&reference);
    let pulled = pull.wait().await.unwrap();
    assert_eq!(pulled.image.to_string(), test.id());
    assert!(pulled.changed && pulled.index_digest.is_none());
    let progress = pull.progress().borrow().clone();
    assert_eq!(progress.stage, PullStage::Done);
    assert!(
        progress
            .layers
            .iter()
            .all(|layer| layer.state == LayerState::Done)
    );

    let found = node.image(&reference.to_string()).unwrap();
    assert_eq!(found.tags, BTreeSet::from([reference.to_string()]));
    let by_digest = reference.at_digest(&Digest::of(&test.manifest)).to_string();
    assert_eq!(found.digests, BTreeSet::from([by_digest.clone()]));
    assert_eq!(
        (&*found.config.user, &*found.config.env),
        ("7:8", &["A=b".to_owned()][..])
    );
    let compressed: usize = test.layers.iter().map(Vec::len).sum();
    assert_eq!(found.size_bytes, (compressed + test.config.len()) as u64);

    assert_eq!(node.read(&by_digest, "etc/a"), None);
    assert_eq!(node.read(&by_digest, "etc/b").unwrap(), b"two");
    assert_eq!(node.read(&by_digest, "etc/c").unwrap(), b"three");
    assert_eq!(
        node.images.raw_config(&found.id).await.unwrap(),
        test.config
    );
    assert!(node.is_clean());
    assert_eq!(node.partial_files(), 0);

    let mut events = EventLog::new(node.store.clone())
        .watch(Some(crate::event::Cursor::default()))
        .unwrap();
    let kinds = [
        events.next().await.unwrap().what.kind,
        events.next().await.unwrap().what.kind,
    ];
    assert_eq!(kinds, [EventKind::ImageTagged, EventKind::ImagePulled]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_present_tag_is_asked_for_again_and_nothing_is_fetched() {
    let (fake, node) = (Fake::start().await, Node::new());
    fake.put("1", &three_layers());
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    fake.forget_seen();
    let again = node.pull(&reference).wait().await.unwrap();
    assert!(!again.changed);
    let methods: Vec<String> = fake.seen().iter().map(|seen| seen.method.clone()).collect();
    assert_eq!(methods, ["HEAD"]);
    // A registry that does not name digests costs one more manifest, and no blob.
    fake.hook(|seen| (seen.method == "HEAD").then(|| fake::status(405)));
    assert!(!node.pull(&reference).wait().await.unwrap().changed);
    assert_eq!(fake.blob_requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_tag_is_taken_from_the_old_image() {
    let (fake, node) = (Fake::start().await, Node::new());
    let (old, new) = (
        image(&[(tar(&[("v", b"1")]), Gzip)]),
        image(&[(tar(&[("v", b"2")]), Gzip)]),
    );
    let reference = fake.reference("app:1");
    fake.put("1", &old);
    node.pull(&reference).wait().await.unwrap();
    fake.put("1", &new);
    assert!(node.pull(&reference).wait().await.unwrap().changed);
    assert_eq!(
        node.image(&reference.to_string()).unwrap().id.to_string(),
        new.id()
    );
    let left = node.image(&old.id()).unwrap();
    assert!(left.tags.is_empty() && left.digests.len() == 1);
    let mut events = EventLog::new(node.store.clone())
        .watch(Some(crate::event::Cursor::default()))
        .unwrap();
    let mut kinds = Vec::new();
    for _ in 0..5 {
        kinds.push(events.next().await.unwrap().what.kind);
    }
    assert_eq!(
        kinds[2..],
        [
            EventKind::ImageUntagged,
            EventKind::ImageTagged,
            EventKind::ImagePulled
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_the_platform_and_both_digests_resolve() {
    let (fake, node) = (Fake::start().await, Node::new());
    let amd = image(&[(tar(&[("arch", b"amd64")]), Gzip)]);
    let arm = image_for("arm64", &[(tar(&[("arch", b"arm64")]), Gzip)]);
    fake.put("amd", &amd);
    fake.put("arm", &arm);
    let index = index(&BTreeMap::from([("amd64", &amd), ("arm64", &arm)]));
    fake.put_manifest("multi", fake::OCI_INDEX, &index);
    let reference = fake.reference("app:multi");
    let pulled = node.pull(&reference).wait().await.unwrap();
    assert_eq!(pulled.index_digest, Some(Digest::of(&index)));
    assert_eq!(pulled.manifest_digest, Digest::of(&amd.manifest));
    for digest in [Digest::of(&index), Digest::of(&amd.manifest)] {
        let name = reference.at_digest(&digest).to_string();
        assert_eq!(
            node.image(&name).unwrap().id.to_string(),
            amd.id(),
            "{name}"
        );
    }
    assert!(!node.pull(&reference).wait().await.unwrap().changed);

    // The same index for another platform is another image.
    let wanted: Platform = "linux/arm64".parse().unwrap();
    let request = |platform: &str| PullRequest {
        reference: reference.clone().into(),
        auth: RegistryAuth::Anonymous,
        platform: platform.parse().unwrap(),
        face: Face::Native,
    };
    let pulled = node
        .images
        .pull(request("linux/arm64"))
        .wait()
        .await
        .unwrap();
    assert_eq!(pulled.image.to_string(), arm.id());
    let error = node
        .images
        .pull(request("linux/s390x"))
        .wait()
        .await
        .unwrap_err();
    match &*error {
        ImageError::NoPlatform { available, .. } => {
            assert!(available.contains(&wanted) && available.len() == 2)
        }
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_digest_has_no_tag() {
    let (fake, node) = (Fake::start().await, Node::new());
    let test = three_layers();
    fake.put("1", &test);
    let reference: ImageRef = format!("{}/app:1@{}", fake.host, Digest::of(&test.manifest))
        .parse()
        .unwrap();
    node.pull(&reference).wait().await.unwrap();
    let found = node.image(&reference.to_string()).unwrap();
    assert!(found.tags.is_empty() && found.digests.len() == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_layers_are_fetched_once() {
    let (fake, node) = (Fake::start().await, Node::new());
    let base = (tar(&[("base", b"x")]), Gzip);
    let (one, two) = (
        image(&[base.clone(), (tar(&[("one", b"1")]), Gzip)]),
        image(&[base.clone(), (tar(&[("two", b"2")]), Gzip), base.clone()]),
    );
    fake.put("one", &one);
    fake.put("two", &two);
    node.pull(&fake.reference("a:one")).wait().await.unwrap();
    fake.forget_seen();
    let pull = node.pull(&fake.reference("b:two"));
    pull.wait().await.unwrap();
    let states: Vec<LayerState> = pull
        .progress()
        .borrow()
        .layers
        .iter()
        .map(|layer| layer.state)
        .collect();
    assert_eq!(
        states,
        [LayerState::Present, LayerState::Done, LayerState::Present]
    );
    assert_eq!(fake.blob_requests(), 2); // configuration and one layer
    assert_eq!(node.rootfs.inventory().unwrap().layers.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_pulls_join_and_others_share_the_unpacking() {
    let (fake, node) = (Fake::start().await, Node::with(impatient()));
    let test = image(&[(tar(&[("f", &noise(2, 200_000))]), Gzip)]);
    fake.put("1", &test);
    fake.put("2", &test);
    let gate = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (open, layer) = (Arc::clone(&gate), Bytes::from(test.layers[0].clone()));
    let path = format!("/blobs/{}", Digest::of(&layer));
    fake.hook(move |seen| {
        let hold = seen.path.ends_with(&path) && !open.load(std::sync::atomic::Ordering::Relaxed);
        hold.then(|| fake::broken_after(layer.slice(..50_000), layer.len(), fake::Then::Hang))
    });
    let reference = fake.reference("app:1");
    let first = node.pull(&reference);
    let second = node.pull(&reference);
    assert!(!first.joined() && second.joined());
    let other = node.pull(&fake.reference("other:2"));
    assert!(!other.joined());
    assert_eq!(node.images.running_pulls().len(), 2);
    gate.store(true, std::sync::atomic::Ordering::Relaxed);
    let (first, second, other) = tokio::join!(first.wait(), second.wait(), other.wait());
    assert_eq!(first.unwrap(), second.unwrap());
    other.unwrap();
    assert_eq!(node.rootfs.inventory().unwrap().layers.len(), 1);
    assert!(node.images.running_pulls().is_empty());
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_ends_with_its_last_waiter_and_resumes_by_range() {
    let (fake, node) = (Fake::start().await, Node::new());
    let test = image(&[(tar(&[("f", &noise(3, 400_000))]), Gzip)]);
    fake.put("1", &test);
    let layer = Bytes::from(test.layers[0].clone());
    let path = format!("/blobs/{}", Digest::of(&layer));
    let (held, suffix) = (layer.clone(), path.clone());
    fake.hook(move |seen| {
        let is_layer = seen.path.ends_with(&suffix);
        is_layer.then(|| fake::broken_after(held.slice(..100_000), held.len(), fake::Then::Hang))
    });
    let reference = fake.reference("app:1");
    let (first, second) = (node.pull(&reference), node.pull(&reference));
    let mut progress = first.progress();
    progress
        .wait_for(|now| {
            now.layers
                .first()
                .is_some_and(|layer| layer.fetched_bytes > 0)
        })
        .await
        .ok();
    drop(first);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(node.images.running_pulls().len(), 1, "one still waits");
    // The unpacker is another thread: all that was sent has reached the disk when the file says so.
    let size = |node: &Node| {
        let files = std::fs::read_dir(node.dir.path().join("blobs/partial")).unwrap();
        files
            .flatten()
            .map(|file| file.metadata().unwrap().len())
            .sum::<u64>()
    };
    node.until("the partial blob grows", |node| size(node) == 100_000)
        .await;
    drop(second);
    node.until("all is cleaned up", |node| node.is_clean())
        .await;
    assert!(node.images.running_pulls().is_empty());
    assert_eq!(node.partial_files(), 1);

    fake.unhook();
    fake.forget_seen();
    // A restart between the two changes nothing.
    let Node {
        images,
        store,
        rootfs,
        dir,
    } = node;
    drop((images, store, rootfs));
    let node = Node::open(dir, quick());
    node.images.recover().await.unwrap();
    node.pull(&reference).wait().await.unwrap();
    let ranges: Vec<_> = fake
        .seen()
        .into_iter()
        .filter(|seen| seen.path.ends_with(&path))
        .map(|s| s.range)
        .collect();
    assert_eq!(ranges, [Some("bytes=100000-".to_owned())]);
    assert_eq!(node.partial_files(), 0);
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_partial_blob_is_fetched_anew() {
    let (fake, node) = (Fake::start().await, Node::new());
    let test = image(&[(tar(&[("f", &noise(4, 100_000))]), Gzip)]);
    fake.put("1", &test);
    let partial = node
        .dir
        .path()
        .join("blobs/partial")
        .join(Digest::of(&test.layers[0]).hex());
    std::fs::write(partial, vec![0; 10_000]).unwrap();
    node.pull(&fake.reference("app:1")).wait().await.unwrap();
    assert_eq!(node.partial_files(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_are_kept_where_configured() {
    let fake = Fake::start().await;
    let node = Node::with(ImageChapterConfig {
        keep_blobs: true,
        ..quick()
    });
    let test = three_layers();
    fake.put("1", &test);
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    let wanted: BTreeSet<Digest> = test.layers.iter().map(|layer| Digest::of(layer)).collect();
    assert_eq!(node.image(&reference.to_string()).unwrap().blobs, wanted);
    assert!(node.is_clean());
    node.remove(&reference.to_string()).await;
    assert!(node.is_clean());
    assert!(node.images.inner.content.list().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_layer_directory_is_repaired_by_the_next_pull() {
    let (fake, node) = (Fake::start().await, Node::new());
    fake.put("1", &three_layers());
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    let at = node.store.snapshot();
    let lost = at.all::<Layer>().next().unwrap();
    node.rootfs.remove_layer(lost.dir).unwrap();
    let id = node.image(&reference.to_string()).unwrap().id.clone();
    let found = node.images.inventory().await.unwrap();
    assert_eq!(found.missing_layers, [(id, lost.diff_id.clone())]);
    node.pull(&reference).wait().await.unwrap();
    assert_eq!(node.read(&reference.to_string(), "etc/b").unwrap(), b"two");
    assert_eq!(
        node.images.inventory().await.unwrap(),
        ImageInventory::default()
    );
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_found_by_id_reference_and_prefix() {
    let (fake, node) = (Fake::start().await, Node::new());
    let mut ids = Vec::new();
    for n in 0..40_u8 {
        let test = image(&[(tar(&[("n", &[n])]), Plain)]);
        fake.put(&format!("t{n}"), &test);
        node.pull(&fake.reference(&format!("app:t{n}")))
            .wait()
            .await
            .unwrap();
        ids.push(test.id());
    }
    let at = node.store.snapshot();
    let find = |name: &str| node.images.find(&at, name);
    let hex = ids[0].strip_prefix("sha256:").unwrap();
    for name in [
        &ids[0],
        hex,
        &hex[..16],
        &format!("sha256:{}", &hex[..12]),
        &format!("{}/app:t0", fake.host),
    ] {
        assert_eq!(
            find(name).unwrap().unwrap().id.to_string(),
            ids[0],
            "{name}"
        );
    }
    assert!(find("busybox").unwrap().is_none());
    assert!(find(&"0".repeat(64)).unwrap().is_none());
    assert!(matches!(find("UPPER"), Err(ImageError::Reference(_))));
    assert!(matches!(find(""), Err(ImageError::Reference(_))));
    assert_eq!(node.images.list(&at).len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ambiguous_prefix_names_its_matches() {
    let node = Node::new();
    let (fake, test) = (Fake::start().await, three_layers());
    fake.put("1", &test);
    node.pull(&fake.reference("app:1")).wait().await.unwrap();
    // A second record with nearly the same id.
    let mut twin = Image::clone(&node.image(&test.id()).unwrap());
    let mut hex = twin.id.0.hex().to_owned();
    let last = if hex.ends_with('0') { '1' } else { '0' };
    hex.replace_range(63.., &last.to_string());
    twin.id = format!("sha256:{hex}").parse().unwrap();
    twin.tags.clear();
    node.store.commit(Changes::new().put(twin)).await.unwrap();
    match node.images.find(&node.store.snapshot(), &hex[..20]) {
        Err(ImageError::Ambiguous { matches, .. }) => assert_eq!(matches.len(), 2),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_takes_names_records_layers_and_blobs() {
    let (fake, node) = (Fake::start().await, Node::new());
    let base = (tar(&[("base", b"x")]), Gzip);
    fake.put(
        "one",
        &image(&[base.clone(), (tar(&[("one", b"1")]), Gzip)]),
    );
    fake.put("two", &image(&[base, (tar(&[("two", b"2")]), Gzip)]));
    let (one, two) = (fake.reference("a:one"), fake.reference("a:two"));
    node.pull(&one).wait().await.unwrap();
    node.pull(&two).wait().await.unwrap();
    assert!(matches!(
        node.remove(&one.to_string()).await,
        Removal::Removed(_)
    ));
    assert_eq!(node.remove(&one.to_string()).await, Removal::Absent);
    assert_eq!(
        node.rootfs.inventory().unwrap().layers.len(),
        2,
        "the shared one stays"
    );
    assert_eq!(node.read(&two.to_string(), "base").unwrap(), b"x");
    assert!(node.is_clean());
    node.remove(&two.to_string()).await;
    assert!(node.rootfs.inventory().unwrap().layers.is_empty());
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_of_containers_outlive_their_image() {
    let (fake, node) = (Fake::start().await, Node::new());
    let test = three_layers();
    fake.put("1", &test);
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    let held: HashSet<Digest> = test.diff_ids[..2].iter().cloned().collect();
    let request = RemoveRequest {
        name: reference.to_string(),
        face: Face::Native,
        only_this_name: false,
    };
    let used = |_: &Snapshot, _: &ImageId| Some("container/x".to_owned());
    let holders = Holders {
        image: &used,
        layers: &|_| HashSet::new(),
    };
    match node.images.remove(&request, holders).await {
        Err(ImageError::InUse { holder, .. }) => assert_eq!(holder, "container/x"),
        other => panic!("{other:?}"),
    }
    let layers = |_: &Snapshot| held.clone();
    let holders = Holders {
        image: &|_, _| None,
        layers: &layers,
    };
    node.images.remove(&request, holders).await.unwrap();
    assert_eq!(node.rootfs.inventory().unwrap().layers.len(), 2);
    assert!(node.is_clean());
    assert_eq!(node.images.release_layers(holders).await.unwrap(), 0);
    assert!(node.images.release_layers(NOBODY).await.unwrap() > 0);
    assert!(node.rootfs.inventory().unwrap().layers.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_tags_can_go_alone_and_faces_keep_what_they_use() {
    let (fake, node) = (Fake::start().await, Node::new());
    let test = three_layers();
    fake.put("1", &test);
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    let other: ImageRef = "mine/app:2".parse().unwrap();
    node.images
        .tag(&reference.to_string(), &other, Face::Native)
        .await
        .unwrap();
    assert!(matches!(
        node.images.tag("absent", &other, Face::Native).await,
        Err(ImageError::Unknown { .. })
    ));
    let by_digest = other.at_digest(&Digest::of(b""));
    assert!(matches!(
        node.images
            .tag(&reference.to_string(), &by_digest, Face::Native)
            .await,
        Err(ImageError::Reference(_))
    ));
    let request = RemoveRequest {
        name: reference.to_string(),
        face: Face::Native,
        only_this_name: true,
    };
    assert!(matches!(
        node.images.remove(&request, NOBODY).await.unwrap(),
        Removal::Untagged(_)
    ));
    assert!(node.image(&reference.to_string()).is_none());
    assert_eq!(node.image("mine/app:2").unwrap().id.to_string(), test.id());

    assert!(node.image(&test.id()).unwrap().is_pinned_for(Face::Cri));
    assert!(matches!(
        node.remove_for(&test.id(), Face::Cri).await,
        Removal::KeptFor(_, Face::Native)
    ));
    let request = PullRequest {
        reference: reference.clone().into(),
        auth: RegistryAuth::Anonymous,
        platform: "linux/amd64".parse().unwrap(),
        face: Face::Cri,
    };
    node.images.pull(request).wait().await.unwrap();
    assert!(matches!(
        node.remove_for(&test.id(), Face::Native).await,
        Removal::KeptFor(_, Face::Cri)
    ));
    assert!(!node.image(&test.id()).unwrap().is_pinned_for(Face::Cri));
    assert!(matches!(
        node.remove_for(&test.id(), Face::Cri).await,
        Removal::Removed(_)
    ));
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn prune_tells_reasons_first_and_takes_what_it_told() {
    let (fake, node) = (Fake::start().await, Node::new());
    let (old, new) = (
        image(&[(tar(&[("v", b"1")]), Gzip)]),
        image(&[(tar(&[("v", b"2")]), Gzip)]),
    );
    let reference = fake.reference("app:1");
    for test in [&old, &new] {
        fake.put("1", test);
        node.pull(&reference).wait().await.unwrap();
    }
    std::fs::write(
        node.dir
            .path()
            .join("blobs/partial")
            .join(Digest::of(b"p").hex()),
        b"half",
    )
    .unwrap();
    let request = |all, dry_run| PruneRequest {
        face: Face::Native,
        all,
        dry_run,
    };
    let told = node
        .images
        .prune(&request(false, true), NOBODY)
        .await
        .unwrap();
    assert!(node.image(&old.id()).is_some());
    let image = told.iter().find(
        |pruned| matches!(&pruned.kind, PrunedKind::Image { id, .. } if id.to_string() == old.id()),
    );
    assert_eq!(image.unwrap().reason, "it has no tag");
    assert!(told.iter().any(
        |pruned| pruned.kind == PrunedKind::Layer(old.diff_ids[0].clone()) && pruned.bytes > 0
    ));
    assert!(told.iter().any(
        |pruned| pruned.kind == PrunedKind::PartialBlob(Digest::of(b"p")) && pruned.bytes == 4
    ));
    assert_eq!(
        told.iter()
            .filter(|pruned| matches!(pruned.kind, PrunedKind::Blob(_)))
            .count(),
        2
    );

    assert_eq!(
        node.images
            .prune(&request(false, false), NOBODY)
            .await
            .unwrap(),
        told
    );
    assert!(node.image(&old.id()).is_none() && node.image(&new.id()).is_some());
    assert!(node.is_clean());
    assert_eq!(node.partial_files(), 0);

    let used = |_: &Snapshot, _: &ImageId| Some("container/x".to_owned());
    let holders = Holders {
        image: &used,
        layers: &|_| HashSet::new(),
    };
    assert_eq!(
        node.images
            .prune(&request(true, false), holders)
            .await
            .unwrap(),
        []
    );
    node.images
        .prune(&request(true, false), NOBODY)
        .await
        .unwrap();
    assert!(node.images.list(&node.store.snapshot()).is_empty());
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_takes_what_a_killed_agent_left() {
    let (fake, node) = (Fake::start().await, Node::new());
    fake.put("1", &three_layers());
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    let blobs = node.dir.path().join("blobs");
    let make = |path: &Path| std::fs::write(path, b"x").unwrap();
    make(&blobs.join("sha256").join(Digest::of(b"orphan").hex()));
    make(&blobs.join("sha256/tmp-1"));
    make(&blobs.join("partial").join(Digest::of(b"half").hex()));
    std::fs::create_dir_all(node.dir.path().join("layers/tmp-0000000000000001/x")).unwrap();
    std::fs::create_dir_all(node.dir.path().join("layers/77/x")).unwrap();
    node.images.recover().await.unwrap();
    assert!(node.is_clean());
    assert_eq!(
        node.partial_files(),
        1,
        "a fresh partial blob is worth keeping"
    );
    assert_eq!(node.read(&reference.to_string(), "etc/b").unwrap(), b"two");
    let usage = node.images.fs_usage(&node.store.snapshot());
    assert!(usage.used_bytes >= 300_000 && usage.inodes > 0 && usage.path == node.dir.path());
}
