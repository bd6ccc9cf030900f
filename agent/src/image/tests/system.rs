//! Distributions' images from servers of ours: right, wrong, and hostile.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use serde_json::json;

use super::fake::{Seen, compress, ranged, status};
use super::*;
use crate::image::manifest::Compression::{self, Xz};
use crate::rootfs::LayerError;

/// A server of images; its files are by path.
struct Shop {
    fake: Fake,
    files: Arc<Mutex<HashMap<String, Bytes>>>,
}

impl Shop {
    async fn start() -> Shop {
        let fake = Fake::start().await;
        let files: Arc<Mutex<HashMap<String, Bytes>>> = Arc::default();
        let served = Arc::clone(&files);
        fake.hook(move |seen| {
            let found = served.lock().unwrap().get(&seen.path).cloned();
            Some(found.map_or_else(|| status(404), |bytes| answer(seen, bytes)))
        });
        Shop { fake, files }
    }

    fn put(&self, path: &str, bytes: impl Into<Bytes>) {
        self.files
            .lock()
            .unwrap()
            .insert(path.to_owned(), bytes.into());
    }

    fn remove(&self, path: &str) {
        self.files.lock().unwrap().remove(path);
    }

    /// Offers products, each version of them with items.
    fn offer(&self, products: serde_json::Value) {
        let index = json!({"format": "index:1.0", "index": {"images": {
            "datatype": "image-downloads", "path": "streams/v1/images.json",
            "format": "products:1.0", "products": ["x"]}}});
        self.put("/streams/v1/index.json", index.to_string());
        let document = json!({"content_id": "images", "datatype": "image-downloads",
            "format": "products:1.0", "products": products});
        self.put("/streams/v1/images.json", document.to_string());
    }

    /// Offers one build of `debian/bookworm` as metadata and root tree.
    fn offer_pair(&self, metadata: &[u8], root: &[u8]) {
        self.put("/images/meta", metadata.to_vec());
        self.put("/images/root", root.to_vec());
        self.offer(debian(pair(metadata, root)));
    }

    fn node(&self, protocol: Protocol) -> Node {
        let url = format!("http://{}", self.fake.host);
        let remotes = [("images".to_owned(), RemoteConfig { url, protocol })];
        Node::with(ImageChapterConfig {
            remotes: RemotesConfig(remotes.into()),
            ..quick()
        })
    }

    /// Requests for anything but indexes.
    fn fetched(&self) -> Vec<Seen> {
        let seen = self.fake.seen().into_iter();
        seen.filter(|seen| seen.path.starts_with("/images/"))
            .collect()
    }
}

fn answer(seen: &Seen, bytes: Bytes) -> axum::response::Response {
    if seen.method == "HEAD" {
        return axum::response::Response::builder()
            .header("content-length", bytes.len())
            .body(axum::body::Body::empty())
            .unwrap();
    }
    ranged(seen, bytes)
}

fn item(ftype: &str, path: &str, bytes: &[u8]) -> serde_json::Value {
    json!({"ftype": ftype, "path": path, "sha256": Digest::of(bytes).hex(), "size": bytes.len()})
}

fn pair(metadata: &[u8], root: &[u8]) -> serde_json::Value {
    let mut meta = item("incus.tar.xz", "images/meta", metadata);
    meta["combined_rootxz_sha256"] = json!(Digest::of(&[metadata, root].concat()).hex());
    json!({"incus.tar.xz": meta, "root.tar.xz": item("root.tar.xz", "images/root", root)})
}

fn debian(items: serde_json::Value) -> serde_json::Value {
    json!({"debian:bookworm:amd64:default": {
        "aliases": "debian/bookworm/default,debian/bookworm,debian/12", "arch": "amd64",
        "os": "Debian", "release": "bookworm", "release_title": "12", "variant": "default",
        "requirements": {"cgroup": "v1"}, "versions": {"20261124_05:24": {"items": items}}}})
}

const YAML: &str = "architecture: x86_64\ncreation_date: 1764000000\n\
    properties: {description: Debian bookworm, os: Debian, release: bookworm, serial: '1'}\n\
    templates: {/etc/hostname: {when: [create, copy], template: hostname.tpl}}\n";

fn metadata() -> Vec<u8> {
    let files: [(&str, &[u8]); 2] = [
        ("metadata.yaml", YAML.as_bytes()),
        ("templates/hostname.tpl", b"{{ container.name }}\n"),
    ];
    compress(&tar(&files), Xz)
}

/// Entries of an archive in the making; names as they are, however odd.
#[derive(Default)]
struct Tree(Vec<u8>);

impl Tree {
    fn entry(mut self, kind: tar::EntryType, name: &str, link: &str, content: &[u8]) -> Tree {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        let field = &mut header.as_old_mut().linkname;
        field[..link.len()].copy_from_slice(link.as_bytes());
        header.set_mode(0o755);
        header.set_mtime(1_764_000_000);
        header.set_size(content.len() as u64);
        if kind == tar::EntryType::Char {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &[u8]) -> Tree {
        self.entry(tar::EntryType::Regular, name, "", content)
    }

    fn dir(self, name: &str) -> Tree {
        self.entry(tar::EntryType::Directory, name, "", b"")
    }

    fn link(self, name: &str, target: &str) -> Tree {
        self.entry(tar::EntryType::Symlink, name, target, b"")
    }

    fn hard(self, name: &str, target: &str) -> Tree {
        self.entry(tar::EntryType::Link, name, target, b"")
    }

    fn packed(self, compression: Compression) -> Vec<u8> {
        compress(&[self.0, vec![0; 1024]].concat(), compression)
    }
}

/// A tree that could boot, below `top`.
fn guest(top: &str) -> Tree {
    let at = |path: &str| format!("{top}{path}");
    Tree::default()
        .dir(&at("etc/"))
        .file(&at("etc/os-release"), b"ID=debian\n")
        .dir(&at("dev/"))
        .entry(tar::EntryType::Char, &at("dev/null"), "", b"")
        .file(&at("usr/lib/systemd/systemd"), b"\x7fELF")
        .hard(&at("usr/bin/systemd"), &at("usr/lib/systemd/systemd"))
        .file(
            &at("usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so"),
            b"",
        )
        .link(&at("sbin/init"), "/lib/systemd/systemd")
        .link(&at("lib"), "usr/lib")
}

async fn pull_text(node: &Node, text: &str) -> Result<Pulled, Arc<ImageError>> {
    let request = PullRequest {
        reference: text.parse().unwrap(),
        auth: RegistryAuth::Anonymous,
        platform: "linux/amd64".parse().unwrap(),
        face: Face::Native,
    };
    node.images.pull(request).wait().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_of_a_remote_becomes_an_image_of_one_layer() {
    let shop = Shop::start().await;
    shop.offer_pair(&metadata(), &guest("./").packed(Xz));
    let node = shop.node(Protocol::Simplestreams);
    let pulled = pull_text(&node, "images:debian/bookworm").await.unwrap();
    assert!(pulled.changed);
    let image = node.image("images:debian/bookworm").unwrap();
    assert_eq!(image.id, pulled.image);
    assert_eq!(image.config.entrypoint, ["/sbin/init"]);
    assert_eq!(image.config.stop_signal.as_deref(), Some("SIGRTMIN+3"));
    let label = |name: &str| {
        let key = format!("{SYSTEM_LABEL}{name}");
        image.config.labels.get(&key).map(String::as_str)
    };
    for (name, value) in [
        ("os", "Debian"),
        ("release", "bookworm"),
        ("variant", "default"),
        ("serial", "20261124_05:24"),
        ("init", "systemd"),
        ("init-version", "252"),
        ("container", "lxc"),
        ("requirements.cgroup", "v1"),
    ] {
        assert_eq!(label(name), Some(value), "{name}");
    }
    let templates: Vec<Template> = serde_json::from_str(label("templates").unwrap()).unwrap();
    assert_eq!(templates[0].text.as_deref(), Some("{{ container.name }}\n"));
    let reference = "images:debian/bookworm";
    assert_eq!(
        node.read(reference, "/etc/os-release").unwrap(),
        b"ID=debian\n"
    );
    assert_eq!(
        node.read(reference, "/usr/bin/systemd").unwrap(),
        b"\x7fELF"
    );
    assert_eq!(
        node.read(reference, "/dev/null"),
        None,
        "devices are left out"
    );
    assert!(node.is_clean());
    assert_eq!(node.partial_files(), 0);

    // The manifest tells the truth about a tar that is made of the layer.
    let at = node.store.snapshot();
    let [layer] = &node.images.layers(&at, &image).unwrap()[..] else {
        panic!("one layer")
    };
    let raw = node
        .images
        .inner
        .content
        .read(&pulled.manifest_digest, 1 << 20);
    let manifest: serde_json::Value = serde_json::from_slice(&raw.unwrap().unwrap()).unwrap();
    assert_eq!(manifest["layers"][0]["digest"], json!(layer.diff_id));

    // Again, and by another name: nothing is fetched.
    shop.fake.forget_seen();
    assert!(!pull_text(&node, reference).await.unwrap().changed);
    let other = pull_text(&node, "images:debian/12/default/amd64")
        .await
        .unwrap();
    assert!(other.changed && other.image == image.id);
    assert_eq!(shop.fetched().len(), 0);
    assert_eq!(
        node.image("images:debian/12/default/amd64").unwrap().id,
        image.id
    );
    let pinned = format!("images:debian/12@sha256:{}", label("fingerprint").unwrap());
    assert_eq!(pull_text(&node, &pinned).await.unwrap().image, image.id);
    // Its names by digest can be pulled, too.
    let names = node.image(reference).unwrap().digests.clone();
    assert_eq!(names.len(), 3, "{names:?}");
    for name in names {
        assert!(!pull_text(&node, &name).await.unwrap().changed, "{name}");
    }
    assert!(matches!(
        node.remove(image.id.as_str()).await,
        Removal::Removed(_)
    ));
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_tree_is_the_same_layer_however_it_comes() {
    let mut layers = BTreeSet::new();
    for compression in [Plain, Gzip, Zstd, Xz] {
        let shop = Shop::start().await;
        shop.offer_pair(&metadata(), &guest("").packed(compression));
        let node = shop.node(Protocol::Simplestreams);
        pull_text(&node, "images:debian/12").await.unwrap();
        layers.extend(node.image("images:debian/12").unwrap().layers.clone());
    }
    // Metadata after the tree, which is below rootfs/.
    let mut unified = Tree::default().dir("rootfs/").0;
    unified.extend(guest("rootfs/").0);
    let files: [(&str, &[u8]); 2] = [
        ("templates/hostname.tpl", b"x"),
        ("metadata.yaml", YAML.as_bytes()),
    ];
    unified.extend(tar(&files));
    let unified = compress(&unified, Gzip);
    let shop = Shop::start().await;
    shop.put("/images/u", unified.clone());
    let items = json!({"u": item("incus_combined.tar.gz", "images/u", &unified)});
    shop.offer(debian(items));
    let node = shop.node(Protocol::Simplestreams);
    pull_text(&node, "images:debian/12").await.unwrap();
    let image = node.image("images:debian/12").unwrap();
    let fingerprint = &image.config.labels[&format!("{SYSTEM_LABEL}fingerprint")];
    assert_eq!(fingerprint, Digest::of(&unified).hex());
    assert_eq!(node.read("images:debian/12", "/metadata.yaml"), None);
    layers.extend(image.layers.clone());
    // The tree that had no entry for its root has the one that is made up.
    assert!(layers.len() <= 2, "{layers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_names_of_one_build_are_fetched_once() {
    let shop = Shop::start().await;
    shop.offer_pair(
        &metadata(),
        &guest("").file("big", &noise(3, 400_000)).packed(Xz),
    );
    let node = shop.node(Protocol::Simplestreams);
    let (one, other) = tokio::join!(
        pull_text(&node, "images:debian/12"),
        pull_text(&node, "images:debian/bookworm")
    );
    assert_eq!(one.unwrap().image, other.unwrap().image);
    let roots = shop
        .fetched()
        .iter()
        .filter(|seen| seen.path == "/images/root")
        .count();
    assert_eq!(roots, 1);
    node.until("all is cleaned up", Node::is_clean).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_fetch_goes_on_where_it_stopped() {
    use super::fake::{Then, broken_after};
    let shop = Shop::start().await;
    let root = guest("").file("big", &noise(3, 900_000)).packed(Xz);
    shop.offer_pair(&metadata(), &root);
    let files = Arc::clone(&shop.files);
    let begin = Bytes::from(root[..300_000].to_vec());
    let length = root.len();
    shop.fake.hook(move |seen| {
        let Some(bytes) = files.lock().unwrap().get(&seen.path).cloned() else {
            return Some(status(404));
        };
        if seen.path == "/images/root" && seen.range.is_none() {
            return Some(broken_after(begin.clone(), length, Then::Break));
        }
        Some(answer(seen, bytes))
    });
    let node = shop.node(Protocol::Simplestreams);
    pull_text(&node, "images:debian/12").await.unwrap();
    let ranges: Vec<Option<String>> = shop
        .fetched()
        .into_iter()
        .filter(|seen| seen.path == "/images/root")
        .map(|seen| seen.range)
        .collect();
    assert_eq!(ranges, [None, Some("bytes=300000-".to_owned())]);
    assert_eq!(node.partial_files(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_went_away_is_looked_for_in_a_new_index() {
    let shop = Shop::start().await;
    let (meta, root) = (metadata(), guest("").packed(Xz));
    shop.offer_pair(&meta, &root);
    // The first answer still has the older build.
    let mut old = debian(pair(&meta, b"gone"));
    old["debian:bookworm:amd64:default"]["versions"]["20261124_05:24"]["items"]["root.tar.xz"]["path"] =
        json!("images/gone");
    let old = json!({"format": "products:1.0", "products": old}).to_string();
    let (files, asked) = (Arc::clone(&shop.files), Mutex::new(0));
    shop.fake.hook(move |seen| {
        if seen.path == "/streams/v1/images.json" {
            let mut asked = asked.lock().unwrap();
            *asked += 1;
            if *asked == 1 {
                return Some(answer(seen, old.clone().into()));
            }
        }
        let found = files.lock().unwrap().get(&seen.path).cloned();
        Some(found.map_or_else(|| status(404), |bytes| answer(seen, bytes)))
    });
    let node = shop.node(Protocol::Simplestreams);
    pull_text(&node, "images:debian/12").await.unwrap();
    // One that never comes back is an error.
    shop.remove("/images/root");
    node.remove("images:debian/12").await;
    let error = pull_text(&node, "images:debian/12").await.unwrap_err();
    assert!(
        matches!(&*error, ImageError::NotFound { reference, .. } if reference.ends_with("/images/root"))
    );
    node.until("all is cleaned up", Node::is_clean).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_layout_of_lxc_is_read_and_its_sums_are_checked() {
    let shop = Shop::start().await;
    let flat: [(&str, &[u8]); 2] = [("config", b"x"), ("templates", b"/etc/hostname\n")];
    let (meta, root) = (compress(&tar(&flat), Xz), guest("./").packed(Xz));
    let dir = "/images/debian/bookworm/amd64/default/20261124_05:24";
    let line = format!("debian;bookworm;amd64;default;20261124_05:24;{dir}/\n");
    shop.put("/meta/1.0/index-system", line);
    shop.put(&format!("{dir}/meta.tar.xz"), meta.clone());
    shop.put(&format!("{dir}/rootfs.tar.xz"), root.clone());
    let node = shop.node(Protocol::Lxc);
    let pulled = pull_text(&node, "images:debian/bookworm").await.unwrap();
    let image = node.image("images:debian/bookworm").unwrap();
    let label = |name: &str| image.config.labels[&format!("{SYSTEM_LABEL}{name}")].clone();
    assert_eq!(
        label("fingerprint"),
        Digest::of(&[meta.clone(), root.clone()].concat()).hex()
    );
    assert_eq!(
        label("templates"),
        r#"[{"path":"/etc/hostname","when":["create","copy"]}]"#
    );
    shop.fake.forget_seen();
    assert!(
        !pull_text(&node, "images:debian/bookworm")
            .await
            .unwrap()
            .changed
    );
    assert_eq!(shop.fetched().len(), 0);

    let sums = |root: &Digest| {
        let meta = Digest::of(&meta);
        format!(
            "{}  meta.tar.xz\n{}  rootfs.tar.xz\n",
            meta.hex(),
            root.hex()
        )
    };
    node.remove(pulled.image.as_str()).await;
    shop.put(&format!("{dir}/SHA256SUMS"), sums(&Digest::of(b"another")));
    let error = pull_text(&node, "images:debian/bookworm")
        .await
        .unwrap_err();
    assert!(
        matches!(&*error, ImageError::DigestMismatch { what, .. } if what == "root tree"),
        "{error:?}"
    );
    node.until("all is cleaned up", Node::is_clean).await;
    assert_eq!(node.partial_files(), 0, "what is wrong is not kept");
    shop.put(&format!("{dir}/SHA256SUMS"), sums(&Digest::of(&root)));
    let again = pull_text(&node, "images:debian/bookworm").await.unwrap();
    assert_eq!(again.image, pulled.image);
}

/// Pulls what `offer` makes of a shop, which must fail and leave nothing.
async fn fails(offer: impl FnOnce(&Shop)) -> Arc<ImageError> {
    let shop = Shop::start().await;
    offer(&shop);
    let node = shop.node(Protocol::Simplestreams);
    let error = pull_text(&node, "images:debian/bookworm")
        .await
        .expect_err("a lie was believed");
    node.until("all is cleaned up", Node::is_clean).await;
    assert!(node.images.list(&node.store.snapshot()).is_empty());
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_that_would_reach_out_are_refused_or_contained() {
    type Check = fn(&LayerError) -> bool;
    let path: Check = |error| matches!(error, LayerError::Path { .. });
    let link: Check = |error| matches!(error, LayerError::LinkTarget { .. });
    let table: [(Tree, Check); 6] = [
        (guest("").file("../../etc/x", b"x"), path),
        (guest("").file("a/../../x", b"x"), path),
        (guest("").hard("x", "/etc/passwd"), link),
        (guest("").hard("x", "../../../etc/passwd"), path),
        (
            guest("").link("up", "..").hard("x", "up/up/etc/passwd"),
            link,
        ),
        (guest("").file("etc/.wh.passwd", b""), |error| {
            matches!(error, LayerError::Whiteout { .. })
        }),
    ];
    for (n, (tree, check)) in table.into_iter().enumerate() {
        let root = tree.packed(Xz);
        let error = fails(|shop| shop.offer_pair(&metadata(), &root)).await;
        let ImageError::Root { source } = &*error else {
            panic!("{n}: {error:?}")
        };
        assert!(check(source), "{n}: {source:?}");
    }
    // A link may point anywhere; what is written through it stays inside.
    let shop = Shop::start().await;
    let tree = guest("")
        .link("out", "/../../../../tmp")
        .link("again", "out/../out")
        .file("again/longshore-reaches-out", b"x");
    shop.offer_pair(&metadata(), &tree.packed(Xz));
    let node = shop.node(Protocol::Simplestreams);
    pull_text(&node, "images:debian/12").await.unwrap();
    assert!(!Path::new("/tmp/longshore-reaches-out").exists());
    let inside = node.read("images:debian/12", "/tmp/longshore-reaches-out");
    assert_eq!(inside.unwrap(), b"x");
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_of_servers_are_named() {
    let (meta, root) = (metadata(), guest("").packed(Xz));
    let spoil = |key: &'static str, ftype: &'static str, value: serde_json::Value| {
        let (meta, root) = (meta.clone(), root.clone());
        move |shop: &Shop| {
            shop.offer_pair(&meta, &root);
            let mut items = pair(&meta, &root);
            items[ftype][key] = value;
            shop.offer(debian(items));
        }
    };
    let other = Digest::of(b"other").hex().to_owned();
    for (key, ftype, what) in [
        ("sha256", "root.tar.xz", "root tree"),
        ("sha256", "incus.tar.xz", "meta"),
        ("combined_rootxz_sha256", "incus.tar.xz", "together"),
    ] {
        let error = fails(spoil(key, ftype, json!(other))).await;
        match &*error {
            ImageError::DigestMismatch { what: named, .. } => {
                assert!(named.contains(what), "{named}")
            }
            other => panic!("{key} {ftype}: {other:?}"),
        }
    }
    for (ftype, size) in [
        ("root.tar.xz", root.len() - 1),
        ("root.tar.xz", root.len() + 1),
        ("incus.tar.xz", meta.len() - 1),
        ("incus.tar.xz", meta.len() + 1),
    ] {
        let error = fails(spoil("size", ftype, json!(size))).await;
        assert!(
            matches!(&*error, ImageError::SizeMismatch { .. }),
            "{ftype} {size}: {error:?}"
        );
    }
    let error = fails(spoil("size", "incus.tar.xz", json!(1_u64 << 40))).await;
    assert!(matches!(&*error, ImageError::TooLarge { .. }), "{error:?}");
    let error = fails(spoil("path", "root.tar.xz", json!("../../secret"))).await;
    assert!(matches!(&*error, ImageError::Malformed { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_that_are_none_are_refused() {
    let cut = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.len() - 20);
        bytes
    };
    let bomb = guest("").file("zeros", &vec![0; 80 << 20]).packed(Xz);
    assert!(bomb.len() < 1 << 20);
    let small_bomb = compress(&tar(&[("metadata.yaml", &vec![b' '; 20 << 20])]), Xz);
    let good = guest("").packed(Xz);
    type Check = fn(&ImageError) -> bool;
    let table: [(Vec<u8>, Vec<u8>, Check); 8] = [
        (metadata(), bomb, |error| {
            matches!(
                error,
                ImageError::Root {
                    source: LayerError::TooLarge { .. }
                }
            )
        }),
        (metadata(), cut(guest("").packed(Xz)), |error| {
            matches!(
                error,
                ImageError::Root {
                    source: LayerError::Source { .. } | LayerError::Truncated { .. }
                }
            )
        }),
        (
            metadata(),
            b"hsqs and more".to_vec(),
            |error| matches!(error, ImageError::RootPacking { packing } if packing == "squashfs"),
        ),
        (metadata(), tar(&[("bin/sh", b"x")]), |error| {
            matches!(error, ImageError::NoInit)
        }),
        (metadata(), noise(9, 10_000), |error| {
            matches!(
                error,
                ImageError::Root {
                    source: LayerError::Header { .. }
                }
            )
        }),
        (small_bomb, good.clone(), |error| {
            matches!(error, ImageError::Malformed { .. })
        }),
        (cut(metadata()), good.clone(), |error| {
            matches!(error, ImageError::Malformed { .. })
        }),
        (tar(&[("x", b"y")]), good, |error| {
            matches!(error, ImageError::Malformed { .. })
        }),
    ];
    for (n, (meta, root, check)) in table.into_iter().enumerate() {
        let error = fails(|shop| shop.offer_pair(&meta, &root)).await;
        assert!(check(&error), "{n}: {error:?}");
    }
    // Only in forms that are not read: told before anything is fetched.
    let error = fails(|shop| {
        let items = json!({
            "m": item("incus.tar.xz", "images/meta", b"m"),
            "s": item("squashfs", "images/s", b"s"),
        });
        shop.offer(debian(items));
    })
    .await;
    assert!(matches!(&*error, ImageError::RootPacking { packing } if packing == "squashfs"));
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_that_are_none_are_told_with_their_url() {
    let error = fails(|shop| shop.put("/streams/v1/index.json", vec![0; 4096])).await;
    assert!(
        error
            .to_string()
            .contains("/streams/v1/index.json is no simplestreams index")
    );
    let error = fails(|_| {}).await;
    assert!(error.to_string().contains("it is not there"), "{error}");
    let error = fails(|shop| shop.put("/streams/v1/index.json", vec![b' '; 2 << 20])).await;
    assert!(matches!(&*error, ImageError::TooLarge { .. }), "{error:?}");
    let error = fails(|shop| shop.offer(json!({}))).await;
    assert!(matches!(&*error, ImageError::NotFound { .. }), "{error:?}");
    let shop = Shop::start().await;
    let error = pull_text(&shop.node(Protocol::Simplestreams), "other:debian/12").await;
    assert!(matches!(
        &*error.unwrap_err(),
        ImageError::UnknownRemote { .. }
    ));
}
