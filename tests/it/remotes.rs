//! Distributions' images: listed and pulled from remotes in both layouts, used like any other.

use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use longshore_proto::longshore::v1::{self as api, image_service_client::ImageServiceClient};
use longshore_tests::{
    images::LayerBuilder,
    machine::Machine,
    node::{Node, Options},
    pods::wait_for,
    remote::{Remote, SERIAL, metadata, xz},
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

type Images = ImageServiceClient<Channel>;

/// An agent that knows a remote by both its layouts, nothing pulled.
async fn fresh() -> Result<(Node, Remote)> {
    let machine = Machine::start()?;
    let remote = Remote::start(machine.listen("127.0.0.1:0")?)?;
    let options = Options {
        config: remote.config(),
        machine: Some(machine),
        ..Options::default()
    };
    let mut node = Node::start_with(options).await?;
    node.mark_clean()?;
    Ok((node, remote))
}

fn client(node: &Node) -> Images {
    ImageServiceClient::new(node.channel())
}

/// A tree that could boot, with a file that tells it from others.
fn tree(text: &str) -> Bytes {
    LayerBuilder::new()
        .dir("etc")
        .file("etc/which", 0o644, text)
        .dir("bin")
        .file("bin/busybox", 0o4755, "\x7fELF")
        .dir("sbin")
        .symlink("sbin/init", "/bin/busybox")
        .device("dev/null", 1, 3)
        .build()
        .tar
}

/// Pulls to the end.
async fn pull(images: &mut Images, reference: &str) -> Result<api::PulledImage, Status> {
    let request = api::PullImageRequest {
        reference: reference.to_owned(),
        ..Default::default()
    };
    let mut stream = images.pull_image(request).await?.into_inner();
    loop {
        match stream.message().await?.and_then(|message| message.update) {
            Some(api::pull_image_response::Update::Progress(_)) => {}
            Some(api::pull_image_response::Update::Result(image)) => return Ok(image),
            None => return Err(Status::internal("the stream ended without a result")),
        }
    }
}

/// Bytes that no compression makes smaller.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

async fn remove(images: &mut Images, image: &str) -> Result<()> {
    let request = api::RemoveImageRequest {
        image: image.to_owned(),
        ..Default::default()
    };
    images.remove_image(request).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_remotes_offer_is_listed_and_pulled() -> Result<()> {
    let (node, remote) = fresh().await?;
    let mut images = client(&node);
    let fingerprint = remote.offer("debian", "bookworm", &tree("bookworm"));
    remote.offer("debian", "trixie", &tree("trixie"));
    remote.offer("alpine", "3.22", &tree("alpine"));
    let list = |os: &str, remote: &str, size| api::ListRemoteImagesRequest {
        os: os.to_owned(),
        remote: remote.to_owned(),
        page_size: size,
        ..Default::default()
    };
    let all = images
        .list_remote_images(list("", "", 0))
        .await?
        .into_inner();
    let shown: Vec<&str> = all.images.iter().map(|image| &*image.reference).collect();
    let expected = [
        "lxc:alpine/3.22",
        "lxc:debian/bookworm",
        "lxc:debian/trixie",
        "simple:alpine/3.22",
        "simple:debian/bookworm",
        "simple:debian/trixie",
    ];
    assert_eq!(shown, expected);
    let page = images
        .list_remote_images(list("Debian", "simple", 1))
        .await?
        .into_inner();
    assert_eq!(
        (page.images.len(), page.next_page_token.is_empty()),
        (1, false)
    );
    let row = &page.images[0];
    assert_eq!(
        (&*row.fingerprint, &*row.serial),
        (&*fingerprint, "20261124_05:24")
    );
    assert!(row.size_bytes > 0 && row.unreadable.is_empty());
    // The index is asked for again, and nothing is sent.
    let seen = remote.take_seen();
    assert_eq!(
        seen.last().map(String::as_str),
        Some("GET /streams/v1/images.json 304")
    );

    let pulled = pull(&mut images, "simple:debian/bookworm").await?;
    assert_eq!(pulled.reference, "simple:debian/bookworm");
    for name in [
        "simple:debian/bookworm",
        &pulled.image_id,
        &pulled.image_id[7..20],
    ] {
        let request = api::GetImageRequest {
            image: name.to_owned(),
            verbose: true,
        };
        let found = images.get_image(request).await?.into_inner();
        let config = found.config.context("a config")?;
        assert_eq!(config.entrypoint, ["/sbin/init"], "{name}");
        assert_eq!(config.stop_signal, "SIGUSR2", "{name}");
        let image = found.image.context("an image")?;
        assert_eq!(image.labels["dev.longshore.system.init"], "busybox");
        let label = &image.labels["dev.longshore.system.fingerprint"];
        assert_eq!(format!("sha256:{label}"), fingerprint);
        assert!(found.config_json.contains(&found.layers[0].diff_id));
    }
    // The other layout has the same tree: its layer is shared.
    let other = pull(&mut images, "lxc:debian/bookworm").await?;
    assert_ne!(other.image_id, pulled.image_id);
    let layers = std::fs::read_dir(node.data_dir().join("layers"))?.count();
    assert_eq!(layers, 1, "the layer is shared");
    node.fsck_clean().await?;
    let pruned = images
        .prune_images(api::PruneImagesRequest::default())
        .await?
        .into_inner();
    assert!(pruned.decisions.iter().all(|decision| decision.removed));
    node.fsck_clean().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_build_takes_the_name() -> Result<()> {
    let (node, remote) = fresh().await?;
    let mut images = client(&node);
    remote.offer("debian", "bookworm", &tree("old"));
    let old = pull(&mut images, "simple:debian/bookworm").await?;
    remote.take_seen();
    let same = pull(&mut images, "simple:debian/bookworm").await?;
    assert_eq!(same, old);
    let seen = remote.take_seen();
    assert!(seen.iter().all(|line| line.ends_with(" 304")), "{seen:?}");
    remote.offer_build("debian", "bookworm", "20261125_05:24", &tree("new"));
    let new = pull(&mut images, "simple:debian/bookworm").await?;
    assert_ne!(new.image_id, old.image_id);
    let request = api::GetImageRequest {
        image: old.image_id.clone(),
        ..Default::default()
    };
    let left = images.get_image(request).await?.into_inner().image;
    assert!(left.context("the old image")?.tags.is_empty());
    // The old build can be had by its serial, and is here already.
    let pinned = pull(&mut images, "simple:debian/bookworm@20261124_05:24").await?;
    assert_eq!(pinned.image_id, old.image_id);
    for image in [old, new] {
        remove(&mut images, &image.image_id).await?;
    }
    node.fsck_clean().await?;
    node.finish().await
}

/// A slow root tree: pictures on the way, a caller that leaves, and what is left for the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_can_be_left_and_goes_on_later() -> Result<()> {
    let (mut node, remote) = fresh().await?;
    let noise = LayerBuilder::new()
        .file("sbin/init", 0o755, noise(3 << 20))
        .build();
    remote.offer("debian", "sid", &noise.tar);
    remote.slow(Some(Duration::from_millis(30)));
    let request = api::PullImageRequest {
        reference: "simple:debian/sid".to_owned(),
        ..Default::default()
    };
    let mut images = client(&node);
    let mut stream = images.pull_image(request).await?.into_inner();
    let mut on_the_way = false;
    while let Some(message) = stream.message().await? {
        let Some(api::pull_image_response::Update::Progress(picture)) = message.update else {
            break;
        };
        let root = picture.layers.get(1);
        if root.is_some_and(|root| root.fetched_bytes > 0 && root.fetched_bytes < root.total_bytes)
        {
            on_the_way = true;
            break;
        }
    }
    assert!(on_the_way, "a picture of a pull on its way");
    drop(stream);
    let layers = node.data_dir().join("layers");
    wait_for("the half of a layer goes", async || {
        Ok(std::fs::read_dir(&layers)?.count() == 0)
    })
    .await?;
    // Killed on its way, the agent goes on with the bytes that it has.
    let mut stream = client(&node)
        .pull_image(api::PullImageRequest {
            reference: "simple:debian/sid".to_owned(),
            ..Default::default()
        })
        .await?
        .into_inner();
    let _first = stream.message().await?;
    node.kill()?;
    drop(stream);
    node.launch().await?;
    remote.slow(None);
    let mut images = client(&node);
    let pulled = pull(&mut images, "simple:debian/sid").await?;
    node.fsck_clean().await?;
    remove(&mut images, &pulled.image_id).await?;
    node.fsck_clean().await?;
    node.finish().await
}

/// Sends `files` in pieces as an import.
async fn import(
    images: &mut Images,
    tag: &str,
    sizes: &[u64],
    files: &[&[u8]],
) -> Result<api::ImportImageResponse, Status> {
    use api::import_image_request::Part;
    let target = Part::Target(api::ImportTarget {
        tag: tag.to_owned(),
        file_sizes: sizes.to_vec(),
        platform: None,
    });
    // Pieces that do not end where files do.
    let all: Vec<u8> = files.concat();
    let chunks = all
        .chunks(1000)
        .map(|piece| Part::Chunk(Bytes::copy_from_slice(piece)));
    let messages: Vec<_> = std::iter::once(target)
        .chain(chunks)
        .map(|part| api::ImportImageRequest { part: Some(part) })
        .collect();
    let answer = images.import_image(tokio_stream::iter(messages)).await;
    answer.map(tonic::Response::into_inner)
}

fn sizes(files: &[&[u8]]) -> Vec<u64> {
    files.iter().map(|file| file.len() as u64).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_imported_in_each_form() -> Result<()> {
    let (node, _remote) = fresh().await?;
    let mut images = client(&node);
    let (meta, root) = (metadata("debian", "bookworm"), tree("imported"));
    let unified = LayerBuilder::new()
        .file(
            "metadata.yaml",
            0o644,
            "architecture: x86_64\ncreation_date: 1764000000\n",
        )
        .dir("rootfs/etc")
        .file("rootfs/etc/which", 0o644, "imported")
        .dir("rootfs/bin")
        .file("rootfs/bin/busybox", 0o4755, "\x7fELF")
        .dir("rootfs/sbin")
        .symlink("rootfs/sbin/init", "/bin/busybox")
        .build()
        .tar;
    let forms: [(&str, Vec<Vec<u8>>); 4] = [
        ("local/split:1", vec![xz(&meta), xz(&root)]),
        ("local/plain:1", vec![root.to_vec()]),
        ("local/plain:2", vec![xz(&root)]),
        ("local/unified:1", vec![xz(&unified)]),
    ];
    let mut layers = std::collections::BTreeSet::new();
    for (tag, files) in &forms {
        let files: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
        let made = import(&mut images, tag, &sizes(&files), &files).await?;
        assert!(made.changed, "{tag}");
        let image = made.image.context("an image")?;
        assert_eq!(image.tags, [format!("docker.io/{tag}")]);
        assert_eq!(
            image.labels["dev.longshore.system.init"], "busybox",
            "{tag}"
        );
        let again = import(&mut images, tag, &sizes(&files), &files).await?;
        assert!(!again.changed, "{tag}");
        let request = api::GetImageRequest {
            image: (*tag).to_owned(),
            ..Default::default()
        };
        let found = images.get_image(request).await?.into_inner();
        layers.insert(found.layers[0].diff_id.clone());
        if *tag == "local/split:1" {
            let os = image.labels.get("dev.longshore.system.os");
            assert_eq!(os.map(String::as_str), Some("debian"));
        }
    }
    assert_eq!(
        layers.len(),
        1,
        "the same tree is the same layer: {layers:?}"
    );
    node.fsck_clean().await?;
    for (tag, _) in &forms {
        remove(&mut images, tag).await?;
    }
    node.fsck_clean().await?;
    assert_eq!(
        std::fs::read_dir(node.data_dir().join("layers"))?.count(),
        0
    );
    node.finish().await
}

/// All bytes of an export.
async fn export(
    images: &mut Images,
    image: &str,
    packing: api::ExportPacking,
) -> Result<Vec<u8>, Status> {
    let request = api::ExportImageRequest {
        image: image.to_owned(),
        packing: packing.into(),
    };
    let mut chunks = images.export_image(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(message) = chunks.message().await? {
        bytes.extend_from_slice(&message.chunk);
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_exported_can_be_imported() -> Result<()> {
    let (node, remote) = fresh().await?;
    let mut images = client(&node);
    let long = "long/".repeat(40);
    let tree = LayerBuilder::new()
        .dir("sbin")
        .file("sbin/init", 0o4755, "x")
        .hardlink("sbin/telinit", "sbin/init")
        .file(&format!("{long}name"), 0o600, noise(700_000))
        .symlink("sbin/far", &format!("/{long}name"))
        .xattrs(&[("user.of", &b"us"[..])])
        .file("etc/marked", 0o644, "y")
        .build();
    remote.offer("debian", "sid", &tree.tar);
    let pulled = pull(&mut images, "simple:debian/sid").await?;
    let diff_id = async |images: &mut Images, image: &str| -> Result<String> {
        let request = api::GetImageRequest {
            image: image.to_owned(),
            ..Default::default()
        };
        let found = images.get_image(request).await?.into_inner();
        Ok(found.layers[0].diff_id.clone())
    };
    let before = diff_id(&mut images, &pulled.image_id).await?;
    for (n, packing) in [
        api::ExportPacking::None,
        api::ExportPacking::Gzip,
        api::ExportPacking::Unspecified,
    ]
    .into_iter()
    .enumerate()
    {
        let file = export(&mut images, "simple:debian/sid", packing).await?;
        let same = export(&mut images, &pulled.image_id, packing).await?;
        assert!(file == same, "equal images give equal files");
        let tag = format!("local/again:{n}");
        let made = import(&mut images, &tag, &sizes(&[&file[..]]), &[&file[..]]).await?;
        let image = made.image.context("an image")?;
        for (name, value) in [("os", "debian"), ("release", "sid"), ("serial", SERIAL)] {
            let label = image.labels.get(&format!("dev.longshore.system.{name}"));
            assert_eq!(label.map(String::as_str), Some(value), "{packing:?}");
        }
        assert!(image.labels["dev.longshore.system.templates"].contains("/etc/hostname"));
        assert_eq!(diff_id(&mut images, &tag).await?, before, "{packing:?}");
    }
    // A caller that leaves in the middle leaves nothing, and an image of a registry is refused.
    let request = api::ExportImageRequest {
        image: pulled.image_id.clone(),
        packing: api::ExportPacking::None.into(),
    };
    let mut chunks = images.export_image(request).await?.into_inner();
    chunks.message().await?.context("a first chunk")?;
    drop(chunks);
    let error = export(&mut images, "no/such", api::ExportPacking::None).await;
    assert_eq!(error.err().context("an error")?.code(), Code::NotFound);
    images
        .prune_images(api::PruneImagesRequest::default())
        .await?;
    wait_for("all layers go", async || {
        let pruned = images
            .prune_images(api::PruneImagesRequest::default())
            .await?;
        drop(pruned);
        Ok(std::fs::read_dir(node.data_dir().join("layers"))?.count() == 0)
    })
    .await?;
    node.fsck_clean().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn imports_that_make_no_sense_leave_nothing() -> Result<()> {
    let (node, _remote) = fresh().await?;
    let mut images = client(&node);
    let (meta, root) = (metadata("debian", "bookworm"), tree("x"));
    let (meta, root): (&[u8], &[u8]) = (&meta, &root);
    let (m, r) = (meta.len() as u64, root.len() as u64);
    let no_init = LayerBuilder::new().dir("etc").build().tar;
    let arm = LayerBuilder::new()
        .file(
            "metadata.yaml",
            0o644,
            "architecture: aarch64\ncreation_date: 1\n",
        )
        .file("rootfs/sbin/init", 0o755, "x")
        .build()
        .tar;
    type Case<'a> = (&'a str, &'a [u64], &'a [&'a [u8]], Code, &'a str);
    let cases: [Case; 11] = [
        ("", &[], &[], Code::InvalidArgument, "file_sizes"),
        ("", &[0], &[], Code::InvalidArgument, "file_sizes"),
        (
            "",
            &[1, 2, 3],
            &[],
            Code::InvalidArgument,
            "one file, or two",
        ),
        ("Not/A:tag:", &[r], &[root], Code::InvalidArgument, "tag"),
        (
            "",
            &[r + 512],
            &[root],
            Code::DataLoss,
            "root tree that was sent",
        ),
        (
            "",
            &[r - 512],
            &[root],
            Code::DataLoss,
            "root tree that was sent",
        ),
        (
            "",
            &[m + 1],
            &[meta, b"x"],
            Code::FailedPrecondition,
            "no init",
        ),
        ("", &[r, m], &[root, meta], Code::DataLoss, "metadata.yaml"),
        (
            "",
            &[7],
            &[b"hsqs..."],
            Code::FailedPrecondition,
            "squashfs",
        ),
        (
            "",
            &[no_init.len() as u64],
            &[&no_init],
            Code::FailedPrecondition,
            "/sbin/init",
        ),
        (
            "",
            &[arm.len() as u64],
            &[&arm],
            Code::NotFound,
            "linux/arm64",
        ),
    ];
    for (n, (tag, sizes, files, code, word)) in cases.into_iter().enumerate() {
        let error = import(&mut images, tag, sizes, files).await.err();
        let error = error.with_context(|| format!("case {n}"))?;
        assert_eq!(error.code(), code, "case {n}: {error:?}");
        assert!(error.message().contains(word), "case {n}: {error:?}");
    }
    // A caller that leaves in the middle.
    let (messages, sent) = tokio::sync::mpsc::channel(4);
    let sent = tokio_stream::wrappers::ReceiverStream::new(sent);
    let mut other = images.clone();
    let running = tokio::spawn(async move { other.import_image(sent).await });
    for part in [
        api::import_image_request::Part::Target(api::ImportTarget {
            file_sizes: vec![r],
            ..Default::default()
        }),
        api::import_image_request::Part::Chunk(Bytes::copy_from_slice(&root[..2048])),
    ] {
        messages
            .send(api::ImportImageRequest { part: Some(part) })
            .await?;
    }
    let layers = node.data_dir().join("layers");
    wait_for("a layer begins", async || {
        Ok(std::fs::read_dir(&layers)?.count() == 1)
    })
    .await?;
    running.abort();
    wait_for("it goes", async || {
        Ok(std::fs::read_dir(&layers)?.count() == 0)
    })
    .await?;
    drop(messages);
    node.fsck_clean().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_pulled_is_refused_by_name() -> Result<()> {
    let (node, remote) = fresh().await?;
    let mut images = client(&node);
    remote.offer("debian", "bookworm", &tree("x"));
    let no_init = LayerBuilder::new().file("etc/passwd", 0o644, "").build();
    remote.offer("none", "1", &no_init.tar);
    let out = LayerBuilder::new()
        .file("../../etc/longshore-out", 0o644, "x")
        .build();
    remote.offer("out", "1", &out.tar);
    remote.offer("lies", "1", &tree("y"));
    remote.put(
        "/images/lies/1/amd64/default/20261124_05:24/rootfs.tar.xz",
        xz(&tree("another")),
    );
    for (reference, code, reason, word) in [
        (
            "other:debian/12",
            Code::InvalidArgument,
            "INVALID_FIELD",
            "lxc, simple",
        ),
        (
            "simple:debian/nope",
            Code::NotFound,
            "REFERENCE_NOT_FOUND",
            "simple:debian/nope",
        ),
        (
            "simple:debian/bookworm/arm64",
            Code::NotFound,
            "PLATFORM_NOT_FOUND",
            "linux/amd64",
        ),
        (
            "simple:debian/bookworm@20200101",
            Code::NotFound,
            "REFERENCE_NOT_FOUND",
            "20200101",
        ),
        (
            "simple:none/1",
            Code::FailedPrecondition,
            "IMAGE_REFUSED",
            "/sbin/init",
        ),
        (
            "simple:out/1",
            Code::DataLoss,
            "CONTENT_INVALID",
            "`..` in a name",
        ),
        (
            "simple:de bian/1",
            Code::InvalidArgument,
            "INVALID_FIELD",
            "letters, digits",
        ),
        (
            "Simple:debian/1",
            Code::InvalidArgument,
            "INVALID_FIELD",
            "a remote is named",
        ),
    ] {
        let error = pull(&mut images, reference)
            .await
            .err()
            .context(reference)?;
        let details = error.get_error_details();
        let found = details.error_info().map(|info| info.reason.clone());
        assert_eq!(
            (error.code(), found.as_deref()),
            (code, Some(reason)),
            "{error:?}"
        );
        assert!(
            error.message().contains(word),
            "{reference}: {}",
            error.message()
        );
    }
    for remote in ["simple", "lxc"] {
        let error = pull(&mut images, &format!("{remote}:lies/1")).await;
        let error = error.err().context("a lie was believed")?;
        assert_eq!(error.code(), Code::DataLoss, "{error:?}");
    }
    remote.put("/streams/v1/index.json", vec![0; 2048]);
    let request = api::ListRemoteImagesRequest {
        remote: "simple".to_owned(),
        ..Default::default()
    };
    let error = images
        .list_remote_images(request)
        .await
        .err()
        .context("an error")?;
    assert!(
        error.message().contains("it begins with \"\\x00\\x00"),
        "{error:?}"
    );
    // What was fetched for nothing is the prune's.
    images
        .prune_images(api::PruneImagesRequest::default())
        .await?;
    node.fsck_clean().await?;
    node.finish().await
}
