//! Images: pulled by all names, in all packings, from all kinds of registries, right and wrong.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    images::{self, Image, ImageBuilder, Layer, LayerBuilder, Packing},
    node::{ImageService, Node},
    pods::{Bench, pod, pull, wait_for},
    registry::{Auth, Ca, Fault, On, Registry, push_to},
    skip,
};
use serde_json::json;
use tar::EntryType;
use tonic::Code;

fn spec(image: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    })
}

async fn status(images: &mut ImageService, name: &str) -> Result<Option<cri::Image>> {
    let request = cri::ImageStatusRequest {
        image: spec(name),
        verbose: false,
    };
    Ok(images.image_status(request).await?.into_inner().image)
}

async fn list(images: &mut ImageService) -> Result<Vec<cri::Image>> {
    Ok(images
        .list_images(cri::ListImagesRequest::default())
        .await?
        .into_inner()
        .images)
}

async fn remove(images: &mut ImageService, name: &str) -> Result<()> {
    images
        .remove_image(cri::RemoveImageRequest { image: spec(name) })
        .await?;
    Ok(())
}

/// An agent and a registry beside it, nothing pulled.
async fn fresh(config: &str) -> Result<(Node, Registry)> {
    let mut node = Node::start_configured(config).await?;
    let registry = Registry::start(node.machine().listen("127.0.0.1:0")?)?;
    node.mark_clean()?;
    Ok((node, registry))
}

/// CRI contract 13.1, 13.2 and 13.5: names, and what removing does to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_found_by_each_of_its_names() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    let image = images::tiny("names");
    registry.push("some/thing:v1", &image);
    let tagged = registry.reference("some/thing:v1");
    assert_eq!(pull(&mut images, &tagged, None).await?, image.id);
    let digested = format!("{}@{}", registry.reference("some/thing"), image.digest);
    let hex = image.id.trim_start_matches("sha256:");
    for name in [tagged.as_str(), &digested, &image.id, hex, &hex[..12]] {
        let found = status(&mut images, name)
            .await?
            .with_context(|| format!("no status of {name}"))?;
        assert_eq!(found.id, image.id, "{name}");
        assert_eq!(found.repo_tags, [tagged.as_str()], "{name}");
        assert_eq!(found.repo_digests, [digested.as_str()], "{name}");
        assert!(found.size > 0, "{name}");
    }
    assert!(
        status(&mut images, &registry.reference("some/thing:v2"))
            .await?
            .is_none()
    );
    // Pulled by digest it has no new tag.
    assert_eq!(pull(&mut images, &digested, None).await?, image.id);
    assert_eq!(list(&mut images).await?.len(), 1);
    remove(&mut images, &image.id).await?;
    assert!(list(&mut images).await?.is_empty());
    // Again is fine, and so is one that never was.
    remove(&mut images, &image.id).await?;
    remove(&mut images, "never/was:there").await?;
    node.finish().await
}

/// CRI contract 13.2: a pull by digest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulled_by_digest_alone_it_has_no_tag() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    let image = images::tiny("digest");
    registry.push("only/digest:x", &image);
    let digested = format!("{}@{}", registry.reference("only/digest"), image.digest);
    pull(&mut images, &digested, None).await?;
    let found = status(&mut images, &digested).await?.context("a status")?;
    assert!(found.repo_tags.is_empty(), "{:?}", found.repo_tags);
    assert_eq!(found.repo_digests, [digested]);
    remove(&mut images, &image.id).await?;
    node.finish().await
}

/// CRI contract 13.2: an index.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_index_the_image_for_this_platform_is_taken() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    for docker in [false, true] {
        let layer = LayerBuilder::new()
            .file("for", 0o644, format!("here {docker}"))
            .build();
        let here = ImageBuilder::new(vec![layer.clone()]).build();
        let elsewhere = ImageBuilder::new(vec![layer])
            .architecture("riscv64")
            .build();
        registry.push("multi:here", &here);
        registry.push("multi:elsewhere", &elsewhere);
        let (media_type, bytes) = images::index(&[&elsewhere, &here], docker);
        let digest = registry.put_manifest("multi", "all", media_type, bytes);
        assert_eq!(
            pull(&mut images, &registry.reference("multi:all"), None).await?,
            here.id
        );
        // The index's digest names the image later, too.
        let name = format!("{}@{digest}", registry.reference("multi"));
        assert_eq!(
            status(&mut images, &name)
                .await?
                .context("by index digest")?
                .id,
            here.id
        );
        let (media_type, bytes) = images::index(&[&elsewhere], docker);
        registry.put_manifest("multi", "other", media_type, bytes);
        let refused = pull(&mut images, &registry.reference("multi:other"), None).await;
        let error = refused.expect_err("nothing for this platform").to_string();
        assert!(error.contains("riscv64"), "names what there is: {error}");
        remove(&mut images, &here.id).await?;
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_packing_unpacks_to_the_same_files() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("packing")).await?;
    let base = images::toolbox_layer()?;
    for docker in [false, true] {
        for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
            let text = format!("{packing:?} {docker}");
            let layer = LayerBuilder::new()
                .file("packed", 0o644, &text)
                .build()
                .packed(packing);
            let mut image = ImageBuilder::new(vec![base.clone(), layer]);
            if docker {
                image = image.docker();
            }
            let name = format!("packing:{}", text.replace(' ', "-").to_lowercase());
            bench.registry.push(&name, &image.build());
            let reference = bench.registry.reference(&name);
            bench.pull(&reference).await.with_context(|| text.clone())?;
            let config = longshore_tests::pods::script("read", &reference, "cat /packed");
            let (_, output) = bench.run_to_end(&pod, config).await?;
            assert_eq!(output.trim_end(), text);
        }
    }
    for image in list(&mut bench.images).await? {
        remove(&mut bench.images, &image.id).await?;
    }
    bench.remove(&pod).await?;
    bench.node.fsck_clean().await?;
    let layers = fs::read_dir(bench.node.data_dir().join("layers"))?.count();
    assert_eq!(layers, 0, "layers outlive their images");
    bench.node.mark_clean()?;
    bench.finish().await
}

/// CRI contract 13.4: credentials.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_open_registries_that_ask_for_them() -> Result<()> {
    let (node, _) = fresh("").await?;
    let mut images = node.images();
    let user = || ("ada".to_owned(), "s3cret-word".to_owned());
    let image = images::tiny("private");
    let basic = cri::AuthConfig {
        username: "ada".to_owned(),
        password: "s3cret-word".to_owned(),
        ..Default::default()
    };
    let encoded = cri::AuthConfig {
        // ada:s3cret-word
        auth: "YWRhOnMzY3JldC13b3Jk".to_owned(),
        ..Default::default()
    };
    let wrong = cri::AuthConfig {
        password: "guess".to_owned(),
        ..basic.clone()
    };
    for auth in [
        Auth::Basic(user().0, user().1),
        Auth::Token(Some(user())),
        Auth::Token(None),
    ] {
        let open = matches!(auth, Auth::Token(None));
        let registry =
            Registry::start_with(node.machine().listen("127.0.0.1:0")?, auth.clone(), None)?;
        registry.push("private:1", &image);
        let reference = registry.reference("private:1");
        let anonymous = pull(&mut images, &reference, None).await;
        assert_eq!(anonymous.is_ok(), open, "{auth:?}: {anonymous:?}");
        if !open {
            let refused = pull(&mut images, &reference, Some(wrong.clone())).await;
            let error = refused.expect_err("a wrong password").to_string();
            assert!(
                !error.contains("guess"),
                "the error tells the password: {error}"
            );
            for right in [&basic, &encoded] {
                pull(&mut images, &reference, Some(right.clone()))
                    .await
                    .with_context(|| format!("{auth:?}"))?;
                remove(&mut images, &image.id).await?;
            }
        }
        remove(&mut images, &image.id).await?;
    }
    let log = fs::read_to_string(node.log_path())?;
    let store = fs::read(node.data_dir().join("store.db"))?;
    for secret in ["s3cret-word", "YWRhOnMzY3JldC13b3Jk"] {
        assert!(!log.contains(secret), "the log tells the password");
        assert!(
            !contains(&store, secret.as_bytes()),
            "the store keeps the password"
        );
    }
    node.finish().await
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_is_spoken_to_whom_the_configuration_trusts() -> Result<()> {
    let machine = longshore_tests::machine::Machine::start()?;
    let ca = Ca::for_names(&["localhost", "127.0.0.1"])?;
    let registry = Registry::start_with(
        machine.listen("127.0.0.1:0")?,
        Auth::Token(None),
        Some(ca.clone()),
    )?;
    let dir = tempfile::tempdir()?;
    let pem = dir.path().join("ca.pem");
    fs::write(&pem, &ca.pem)?;
    let trusted = format!("127.0.0.1:{}", registry.address().port());
    let config = format!(
        "[image.hosts.\"{trusted}\"]\nplain_http = false\nca = {:?}\n",
        pem.to_string_lossy()
    );
    let mut node = Node::start_with(longshore_tests::node::Options {
        config,
        machine: Some(machine),
        ..Default::default()
    })
    .await?;
    node.mark_clean()?;
    let mut images = node.images();
    let image = images::tiny("tls");
    registry.push("tls:1", &image);
    assert_eq!(
        pull(&mut images, &format!("{trusted}/tls:1"), None).await?,
        image.id
    );
    remove(&mut images, &image.id).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_nobody_vouches_for_is_refused() -> Result<()> {
    let machine = longshore_tests::machine::Machine::start()?;
    let ca = Ca::for_names(&["127.0.0.1"])?;
    let registry = Registry::start_with(machine.listen("127.0.0.1:0")?, Auth::Anonymous, Some(ca))?;
    let config = format!(
        "[image.hosts.\"{}\"]\nplain_http = false\n",
        registry.address()
    );
    let mut node = Node::start_with(longshore_tests::node::Options {
        config,
        machine: Some(machine),
        ..Default::default()
    })
    .await?;
    node.mark_clean()?;
    registry.push("tls:1", &images::tiny("tls"));
    let refused = pull(&mut node.images(), &registry.reference("tls:1"), None).await;
    assert!(refused.is_err());
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirrors_are_asked_in_order_and_names_stay() -> Result<()> {
    let machine = longshore_tests::machine::Machine::start()?;
    let down = machine.listen("127.0.0.1:0")?.local_addr()?;
    let first = Registry::start(machine.listen("127.0.0.1:0")?)?;
    let second = Registry::start(machine.listen("127.0.0.1:0")?)?;
    let config = format!(
        "[image.hosts.\"registry.example\"]\nmirrors = [\"http://{down}\", \"http://{}\", \"http://{}\"]\n",
        first.address(),
        second.address()
    );
    let mut node = Node::start_with(longshore_tests::node::Options {
        config,
        machine: Some(machine),
        ..Default::default()
    })
    .await?;
    node.mark_clean()?;
    let mut images = node.images();
    let image = images::tiny("mirrored");
    second.push("team/app:1", &image);
    assert_eq!(
        pull(&mut images, "registry.example/team/app:1", None).await?,
        image.id
    );
    let found = status(&mut images, "registry.example/team/app:1")
        .await?
        .context("a status")?;
    assert_eq!(found.repo_tags, ["registry.example/team/app:1"]);
    assert!(!first.seen().is_empty(), "the first mirror was not asked");
    remove(&mut images, &image.id).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_pulls_join_and_shared_layers_are_fetched_once() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let base = LayerBuilder::new()
        .file("base", 0o644, noise(1 << 20))
        .build();
    let first = ImageBuilder::new(vec![
        base.clone(),
        LayerBuilder::new().file("a", 0o644, "a").build(),
    ])
    .build();
    let second = ImageBuilder::new(vec![
        base,
        LayerBuilder::new().file("b", 0o644, "b").build(),
    ])
    .build();
    registry.push("shared:a", &first);
    registry.push("shared:b", &second);
    registry.fault(On::Blobs, Fault::Delay(Duration::from_millis(300)), None);
    let reference = registry.reference("shared:a");
    let pulls = (0..4).map(|_| {
        let (mut images, reference) = (node.images(), reference.clone());
        tokio::spawn(async move { pull(&mut images, &reference, None).await })
    });
    for pulled in futures_util::future::join_all(pulls).await {
        assert_eq!(pulled??, first.id);
    }
    assert_eq!(
        registry.blob_fetches(),
        3,
        "two layers and a config, once each"
    );
    let mut images = node.images();
    pull(&mut images, &registry.reference("shared:b"), None).await?;
    assert_eq!(registry.blob_fetches(), 5, "the base was fetched again");
    remove(&mut images, &first.id).await?;
    remove(&mut images, &second.id).await?;
    node.finish().await
}

/// Bytes that do not compress, the same each time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_without_waiters_stops_and_the_next_one_succeeds() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    let image = ImageBuilder::new(vec![
        LayerBuilder::new()
            .file("big", 0o644, noise(4 << 20))
            .build(),
    ])
    .build();
    registry.push("slow:1", &image);
    registry.fault(
        On::Digest(image.blobs[0].0.clone()),
        Fault::Slow(Duration::from_millis(200)),
        None,
    );
    let reference = registry.reference("slow:1");
    let waited =
        tokio::time::timeout(Duration::from_secs(2), pull(&mut images, &reference, None)).await;
    assert!(waited.is_err(), "4 MiB at 320 KiB/s came in two seconds");
    assert!(list(&mut images).await?.is_empty());
    registry.heal();
    assert_eq!(pull(&mut images, &reference, None).await?, image.id);
    remove(&mut images, &image.id).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_stumbles_is_asked_again() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    for (fault, times) in [
        (Fault::Status(429, Some(1)), 1),
        (Fault::Status(503, None), 1),
        (Fault::Truncate(100_000), 2),
        (Fault::NoRanges, 5),
    ] {
        let text = format!("{fault:?}");
        let layer = LayerBuilder::new()
            .file(&text, 0o644, noise(1 << 20))
            .build();
        let image = ImageBuilder::new(vec![layer]).build();
        registry.push("stumbles:1", &image);
        registry.fault(On::Digest(image.blobs[0].0.clone()), fault, Some(times));
        let pulled = pull(&mut images, &registry.reference("stumbles:1"), None).await;
        assert_eq!(pulled.with_context(|| text.clone())?, image.id);
        registry.heal();
        remove(&mut images, &image.id).await?;
    }
    let resumed = registry.seen().iter().any(|seen| seen.range.is_some());
    assert!(resumed, "a cut blob was fetched from its beginning");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_lies_is_found_out() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    let honest = || {
        let layer = LayerBuilder::new().file("x", 0o644, noise(100_000)).build();
        ImageBuilder::new(vec![layer]).build()
    };
    type Lie = (&'static str, Box<dyn Fn(&Registry, Image) -> Image>);
    let lies: Vec<Lie> = vec![
        (
            "wrong bytes",
            Box::new(|registry, image| {
                registry.fault(
                    On::Digest(image.blobs[0].0.clone()),
                    Fault::WrongBytes,
                    None,
                );
                image
            }),
        ),
        (
            "a longer layer",
            Box::new(|registry, image| {
                let length = image.blobs[0].1.len() + 10_000;
                registry.fault(
                    On::Digest(image.blobs[0].0.clone()),
                    Fault::WrongLength(length),
                    None,
                );
                image
            }),
        ),
        (
            "a shorter layer",
            Box::new(|registry, image| {
                registry.fault(
                    On::Digest(image.blobs[0].0.clone()),
                    Fault::WrongLength(50_000),
                    None,
                );
                image
            }),
        ),
        (
            "a wrong config",
            Box::new(|registry, image| {
                registry.fault(On::Digest(image.id.clone()), Fault::WrongBytes, None);
                image
            }),
        ),
        (
            "a size in the manifest that is too small",
            Box::new(|_, image| {
                image.with_manifest(|manifest| manifest["layers"][0]["size"] = json!(10))
            }),
        ),
        (
            "a size in the manifest that is huge",
            Box::new(|_, image| {
                image.with_manifest(|manifest| manifest["layers"][0]["size"] = json!(u64::MAX / 4))
            }),
        ),
        (
            "a digest that is no digest",
            Box::new(|_, image| {
                image.with_manifest(|manifest| {
                    manifest["layers"][0]["digest"] = json!("sha256:../../../etc/passwd")
                })
            }),
        ),
        (
            "a layer that is not there",
            Box::new(|_, image| {
                image.with_manifest(|manifest| {
                    manifest["layers"][0]["digest"] = json!(format!("sha256:{}", "0".repeat(64)));
                })
            }),
        ),
        (
            "one layer too many",
            Box::new(|_, image| {
                image.with_manifest(|manifest| {
                    let layer = manifest["layers"][0].clone();
                    manifest["layers"]
                        .as_array_mut()
                        .expect("a list")
                        .push(layer);
                })
            }),
        ),
        (
            "a wrong diff id",
            Box::new(|_, image| {
                let config = String::from_utf8_lossy(&image.blobs[1].1)
                    .replace(&image.diff_ids[0][7..15], "00000000");
                let id = longshore_tests::registry::digest_of(config.as_bytes());
                let mut image = image.with_manifest(|manifest| {
                    manifest["config"]["digest"] = json!(id);
                });
                image.blobs[1] = (id.clone(), config.into());
                image.id = id;
                image
            }),
        ),
        (
            "a manifest that is no JSON",
            Box::new(|_, mut image| {
                image.manifest = "{\"schemaVersion\": 2".into();
                image
            }),
        ),
        (
            "a layer that is no tar",
            Box::new(|_, _| {
                let layer = Layer {
                    tar: noise(70_000).into(),
                    packing: Packing::Gzip,
                };
                ImageBuilder::new(vec![layer]).build()
            }),
        ),
        (
            "an unknown media type",
            Box::new(|_, image| {
                image.with_manifest(|manifest| {
                    manifest["layers"][0]["mediaType"] = json!("application/x-rpm")
                })
            }),
        ),
    ];
    for (what, lie) in lies {
        let image = lie(&registry, honest());
        registry.push("liar:1", &image);
        let pulled = pull(&mut images, &registry.reference("liar:1"), None).await;
        let error = pulled.expect_err(what);
        assert_ne!(code(&error), Some(Code::Internal), "{what}: {error:#}");
        registry.heal();
        assert!(list(&mut images).await?.is_empty(), "{what}");
    }
    expect_no_layers(&node)?;
    prune(&node).await?;
    node.finish().await
}

fn code(error: &anyhow::Error) -> Option<Code> {
    error
        .downcast_ref::<tonic::Status>()
        .map(tonic::Status::code)
}

/// What failed pulls fetched is kept for the next attempt, a day at most, or until this.
async fn prune(node: &Node) -> Result<()> {
    use longshore_proto::longshore::v1::{
        PruneImagesRequest, image_service_client::ImageServiceClient,
    };
    let mut client = ImageServiceClient::new(node.channel());
    client.prune_images(PruneImagesRequest::default()).await?;
    Ok(())
}

fn expect_no_layers(node: &Node) -> Result<()> {
    let left: Vec<_> = fs::read_dir(node.data_dir().join("layers"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    anyhow::ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_layers_leave_nothing_outside_and_end_in_an_error() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    let canary = node.dir().join("canary");
    fs::create_dir(&canary)?;
    fs::write(canary.join("untouched"), "as it was")?;
    let outside = canary.to_string_lossy().into_owned();
    let up = format!("{}{}", "../".repeat(20), outside.trim_start_matches('/'));
    let new = LayerBuilder::new;
    let root = (0, 0);
    let hostile: Vec<(&str, LayerBuilder)> = vec![
        (
            "a parent path",
            new().entry(
                EntryType::Regular,
                &format!("{up}/evil"),
                None,
                0o644,
                root,
                b"evil",
            ),
        ),
        (
            "an inner parent path",
            new().dir("a").file(&format!("a/{up}/evil"), 0o644, "evil"),
        ),
        (
            "a hard link outside",
            new()
                .hardlink("evil", &format!("{outside}/untouched"))
                .file("evil", 0o644, "evil"),
        ),
        (
            "a hard link to a parent path",
            new().hardlink("evil", &format!("{up}/untouched")),
        ),
        (
            "a hard link to nothing",
            new().hardlink("evil", "not/there"),
        ),
        ("a whiteout of the parent", new().file(".wh...", 0o644, "")),
        (
            "a whiteout without a name",
            new().dir("a").file("a/.wh.", 0o644, ""),
        ),
        (
            "a name with a NUL in a PAX header",
            new().file("a\0b", 0o644, ""),
        ),
        (
            "an unknown type",
            new().entry(EntryType::new(b'Z'), "odd", None, 0o644, root, b"odd"),
        ),
        (
            "a file below a file",
            new().file("f", 0o644, "").file("f/g", 0o644, "evil"),
        ),
    ];
    let mut refused = 0;
    for (what, layer) in hostile {
        let image = ImageBuilder::new(vec![layer.build()]).build();
        registry.push("hostile:1", &image);
        match pull(&mut images, &registry.reference("hostile:1"), None).await {
            // Made harmless is as good as refused; what counts is below.
            Ok(id) => remove(&mut images, &id).await?,
            Err(error) => {
                refused += 1;
                assert_ne!(code(&error), Some(Code::Internal), "{what}: {error:#}");
            }
        }
        expect_canary(&canary).with_context(|| what.to_owned())?;
    }
    assert!(refused >= 5, "only {refused} were refused");
    // Symbolic links are harmless by themselves: what follows through them must stay inside.
    let through = [
        (
            "an absolute link",
            new()
                .symlink("out", &outside)
                .file("out/evil", 0o644, "evil"),
        ),
        (
            "a relative link",
            new().symlink("out", &up).file("out/evil", 0o644, "evil"),
        ),
        (
            "chained links",
            new()
                .symlink("a", "b")
                .symlink("b", &outside)
                .file("a/evil", 0o644, "evil"),
        ),
        (
            "a link as a directory",
            new()
                .symlink("d", &outside)
                .dir("d")
                .file("d/evil", 0o644, "evil"),
        ),
        (
            "a link replaced by a whiteout",
            new()
                .symlink("d", &outside)
                .file("d/.wh.untouched", 0o644, ""),
        ),
        ("an opaque link", new().symlink("d", &outside).opaque("d")),
        (
            "a hard link through a link",
            new().symlink("d", &outside).hardlink("evil", "d/untouched"),
        ),
        (
            "a link to proc",
            new()
                .symlink("p", "/proc/self/root")
                .file(&format!("p{outside}/evil"), 0o644, "evil"),
        ),
    ];
    for (what, layer) in through {
        let image = ImageBuilder::new(vec![layer.build()]).build();
        registry.push("hostile:2", &image);
        if let Ok(id) = pull(&mut images, &registry.reference("hostile:2"), None).await {
            remove(&mut images, &id).await?;
        }
        expect_canary(&canary).with_context(|| what.to_owned())?;
    }
    expect_no_layers(&node)?;
    prune(&node).await?;
    node.finish().await
}

fn expect_canary(dir: &Path) -> Result<()> {
    let names: Vec<_> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    assert_eq!(names, ["untouched"]);
    assert_eq!(fs::read_to_string(dir.join("untouched"))?, "as it was");
    Ok(())
}

/// CRI contract 13.3 and 13.4: absent images.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_said_to_be_not_there() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    let missing = pull(&mut images, &registry.reference("no/such:image"), None)
        .await
        .expect_err("not there");
    assert_eq!(code(&missing), Some(Code::NotFound), "{missing:#}");
    let closed = node.machine().listen("127.0.0.1:0")?.local_addr()?;
    let down = pull(&mut images, &format!("{closed}/no:one"), None)
        .await
        .expect_err("nobody listens");
    let status = down.downcast_ref::<tonic::Status>().context("a status")?;
    assert_eq!(status.code(), Code::Unknown, "{status:?}");
    assert!(
        status.message().starts_with("RegistryUnavailable"),
        "{status:?}"
    );
    node.finish().await
}

/// CRI contract 13.2 and 11.4: users of images; the file system.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_users_of_images_and_the_filesystem_are_reported() -> Result<()> {
    let (node, registry) = fresh("").await?;
    let mut images = node.images();
    for (user, uid, name) in [
        ("1002", Some(1002), ""),
        ("www-data", None, "www-data"),
        ("1003:1004", Some(1003), ""),
        ("www-data:1004", None, "www-data"),
    ] {
        let layer = LayerBuilder::new().file("user", 0o644, user).build();
        let image = ImageBuilder::new(vec![layer]).set("User", user).build();
        registry.push("user:1", &image);
        pull(&mut images, &registry.reference("user:1"), None).await?;
        let found = status(&mut images, &image.id).await?.context("a status")?;
        assert_eq!(found.uid.map(|uid| uid.value), uid, "{user}");
        assert_eq!(found.username, name, "{user}");
    }
    let usage = images
        .image_fs_info(cri::ImageFsInfoRequest {})
        .await?
        .into_inner();
    let filesystem = usage.image_filesystems.first().context("a filesystem")?;
    let mountpoint = filesystem.fs_id.clone().unwrap_or_default().mountpoint;
    assert!(Path::new(&mountpoint).is_dir(), "{mountpoint}");
    assert!(filesystem.used_bytes.is_some_and(|used| used.value > 0));
    assert!(filesystem.inodes_used.is_some_and(|used| used.value > 0));
    assert!(!usage.container_filesystems.is_empty());
    // The tag moved on each time; what is left of the others goes by id.
    let filter = cri::ListImagesRequest {
        filter: Some(cri::ImageFilter {
            image: spec(&registry.reference("user:1")),
        }),
    };
    assert_eq!(
        images.list_images(filter).await?.into_inner().images.len(),
        1
    );
    for image in list(&mut images).await? {
        remove(&mut images, &image.id).await?;
    }
    node.finish().await
}

/// CRI contract 13.5: an image goes while its container runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_container_keeps_its_image() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(pod("keeps")).await?;
    let toolbox = bench.toolbox.clone();
    let id = bench
        .launch(
            &pod,
            longshore_tests::pods::container("main", &toolbox, &["sleep", "1000"]),
        )
        .await?;
    // CRI lets an image in use go by name or refuse; either way the container goes on.
    let _either = remove(&mut bench.images, &toolbox).await;
    assert_eq!(bench.exec_ok(&id, "echo still").await?, "still\n");
    let state = bench.status(&id).await?.state();
    assert_eq!(state, cri::ContainerState::ContainerRunning);
    bench.remove(&pod).await?;
    for image in list(&mut bench.images).await? {
        remove(&mut bench.images, &image.id).await?;
    }
    wait_for(
        "the layers of an image without containers to go",
        async || Ok(fs::read_dir(bench.node.data_dir().join("layers"))?.count() == 0),
    )
    .await?;
    bench.node.mark_clean()?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debians_registry_serves_us_too() -> Result<()> {
    if !longshore_tests::host::can_run("docker-registry", &["--version"]) {
        skip(
            "images::debians_registry_serves_us_too",
            "docker-registry is not installed",
        );
        return Ok(());
    }
    let (node, _) = fresh("").await?;
    let mut images = node.images();
    let address = node.machine().listen("127.0.0.1:0")?.local_addr()?;
    let config = node.dir().join("registry.yml");
    fs::write(
        &config,
        format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: \"{address}\"}}\n",
            node.dir().join("registry").display()
        ),
    )?;
    let mut command = std::process::Command::new("docker-registry");
    command
        .arg("serve")
        .arg(&config)
        .stdout(std::process::Stdio::null());
    let mut server = node.machine().spawn(command)?;
    let machine = node.machine().clone();
    wait_for("docker-registry to answer", async || {
        let machine = machine.clone();
        Ok(machine.run(move || std::net::TcpStream::connect(address).is_ok()))
    })
    .await?;
    let image = ImageBuilder::new(
        (0..4)
            .map(|number| {
                LayerBuilder::new()
                    .file(&format!("f{number}"), 0o644, noise(300_000 + number))
                    .build()
            })
            .collect(),
    )
    .build();
    // The registry listens inside the machine, so the push comes from a thread in there.
    let pushed = {
        let image = image.clone();
        machine.run(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(push_to(
                &format!("http://{address}"),
                "real/image:1",
                &image,
            ))
        })
    };
    let result = match pushed {
        Ok(()) => pull(&mut images, &format!("{address}/real/image:1"), None).await,
        Err(error) => Err(error.context("push to docker-registry")),
    };
    server.kill()?;
    server.wait()?;
    assert_eq!(result?, image.id);
    remove(&mut images, &image.id).await?;
    node.finish().await
}
