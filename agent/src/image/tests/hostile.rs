//! Registries and images that lie. Each lie ends in its typed error and leaves nothing behind.

use axum::body::Body;
use axum::response::Response;

use super::fake::{OCI_MANIFEST, compress, descriptor, layer_type, manifest, status};
use super::*;

/// Pulls `app:1` of `fake`, which must fail, and checks that nothing is left.
async fn fails(fake: &Fake, node: &Node) -> Arc<ImageError> {
    let error = node
        .pull(&fake.reference("app:1"))
        .wait()
        .await
        .expect_err("a lie was believed");
    node.until("all is cleaned up", Node::is_clean).await;
    assert!(node.images.list(&node.store.snapshot()).is_empty());
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_digests_are_named() {
    let test = image(&[(tar(&[("f", &noise(7, 50_000))]), Gzip)]);
    let mut swapped = test.layers[0].clone();
    let last = swapped.len() / 2;
    swapped[last] ^= 1;
    let table = [
        (
            format!("/blobs/{}", Digest::of(&test.config)),
            vec![b' '; test.config.len()],
            "configuration",
        ),
        (
            format!("/blobs/{}", Digest::of(&test.layers[0])),
            swapped,
            "layer",
        ),
    ];
    for (path, bytes, expected) in table {
        let (fake, node) = (Fake::start().await, Node::new());
        fake.put("1", &test);
        fake.hook(move |seen| {
            seen.path
                .ends_with(&path)
                .then(|| Response::new(Body::from(bytes.clone())))
        });
        match &*fails(&fake, &node).await {
            ImageError::DigestMismatch { what, .. } => {
                assert!(what.starts_with(expected), "{what}")
            }
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(node.partial_files(), 0, "what is wrong is not kept");
    }
    // The manifest, by digest.
    let (fake, node) = (Fake::start().await, Node::new());
    fake.put("1", &test);
    fake.hook(|seen| {
        seen.path
            .contains("/manifests/")
            .then(|| Response::new(Body::from("{}")))
    });
    let reference = fake.reference(&format!("app@{}", Digest::of(&test.manifest)));
    let error = node.pull(&reference).wait().await.unwrap_err();
    assert!(
        matches!(&*error, ImageError::DigestMismatch { what, .. } if what.starts_with("manifest")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_unpacks_to_something_else_is_refused() {
    let (fake, node) = (Fake::start().await, Node::new());
    let (told, given) = (
        image(&[(tar(&[("f", b"good")]), Gzip)]),
        tar(&[("f", b"evil")]),
    );
    let blob = compress(&given, Gzip);
    fake.put("1", &told);
    fake.put_blob(&blob);
    let lie = manifest(&told.config, &[descriptor(layer_type(Gzip), &blob)]);
    fake.put_manifest("1", OCI_MANIFEST, &lie);
    match &*fails(&fake, &node).await {
        ImageError::DigestMismatch {
            what,
            expected,
            actual,
        } => {
            assert!(what.starts_with("content of layer"), "{what}");
            assert_eq!((expected, actual), (&told.diff_ids[0], &Digest::of(&given)));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lying_sizes_are_named() {
    let test = image(&[(tar(&[("f", &noise(8, 50_000))]), Gzip)]);
    let length = test.layers[0].len() as u64;
    for told in [0, 1, length - 1, length + 1, 1 << 50] {
        let (fake, node) = (Fake::start().await, Node::new());
        fake.put("1", &test);
        let mut layer = descriptor(layer_type(Gzip), &test.layers[0]);
        layer["size"] = told.into();
        fake.put_manifest("1", OCI_MANIFEST, &manifest(&test.config, &[layer]));
        let error = fails(&fake, &node).await;
        let named = matches!(&*error, ImageError::SizeMismatch { expected_bytes, .. } if *expected_bytes == told);
        // Of nothing, nothing is fetched: it has the digest of nothing.
        assert!(named || told == 0, "{told}: {error:?}");
    }
    // A configuration that is described as smaller, and one beyond the limit.
    for (told, limit) in [(3_u64, false), (1 << 40, true)] {
        let (fake, node) = (Fake::start().await, Node::new());
        fake.put("1", &test);
        let mut lie: serde_json::Value = serde_json::from_slice(&test.manifest).unwrap();
        lie["config"]["size"] = told.into();
        fake.put_manifest("1", OCI_MANIFEST, lie.to_string().as_bytes());
        match &*fails(&fake, &node).await {
            ImageError::SizeMismatch { .. } if !limit => {}
            ImageError::TooLarge { .. } if limit => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_streams_are_errors_whatever_the_transfer_says() {
    let test = image(&[(tar(&[("f", &noise(9, 50_000))]), Gzip)]);
    let half = Bytes::from(test.layers[0][..20_000].to_vec());
    for chunked in [true, false] {
        let (fake, node) = (Fake::start().await, Node::new());
        fake.put("1", &test);
        let (path, half) = (
            format!("/blobs/{}", Digest::of(&test.layers[0])),
            half.clone(),
        );
        fake.hook(move |seen| {
            if !seen.path.ends_with(&path) {
                return None;
            }
            if seen.range.is_some() {
                return Some(status(416));
            }
            let stream = futures_util::stream::iter([Ok::<Bytes, std::io::Error>(half.clone())]);
            let body = if chunked {
                Body::from_stream(stream)
            } else {
                Body::from(half.clone())
            };
            Some(Response::new(body))
        });
        let error = fails(&fake, &node).await;
        assert!(
            matches!(
                &*error,
                ImageError::SizeMismatch {
                    actual_bytes: 20_000,
                    ..
                }
            ),
            "chunked {chunked}: {error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_archives_and_bombs_are_refused() {
    let whole = tar(&[("f", &noise(10, 50_000))]);
    let bomb = tar(&[("zeros", &vec![0; 20 << 20])]);
    let cut_tar = whole[..30_000].to_vec();
    let escape = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.as_gnu_mut().unwrap().name[..12].copy_from_slice(b"../../escape");
        header.set_cksum();
        builder.append(&header, &b"evil"[..]).unwrap();
        builder.into_inner().unwrap()
    };
    let mut cut_gzip = compress(&whole, Gzip);
    cut_gzip.truncate(20_000);
    let table = [
        ("cut tar", compress(&cut_tar, Gzip), Digest::of(&cut_tar)),
        ("cut gzip", cut_gzip, Digest::of(&whole)),
        ("not gzip", whole.clone(), Digest::of(&whole)),
        ("escape", compress(&escape, Gzip), Digest::of(&escape)),
        ("bomb", compress(&bomb, Gzip), Digest::of(&bomb)),
        ("nothing", Vec::new(), Digest::of(b"")),
    ];
    for (name, blob, diff_id) in table {
        let fake = Fake::start().await;
        let node = Node::with(ImageChapterConfig {
            layer_content_max: 10 << 20,
            ..quick()
        });
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        });
        let config = config.to_string().into_bytes();
        fake.put_blob(&config);
        fake.put_blob(&blob);
        fake.put_manifest(
            "1",
            OCI_MANIFEST,
            &manifest(&config, &[descriptor(layer_type(Gzip), &blob)]),
        );
        let error = fails(&fake, &node).await;
        assert!(
            matches!(
                *error,
                ImageError::Layer { .. } | ImageError::DigestMismatch { .. }
            ),
            "{name}: {error:?}"
        );
        assert!(!node.dir.path().parent().unwrap().join("escape").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_kinds_and_huge_documents_are_checked() {
    let test = image(&[(tar(&[("f", b"x")]), Gzip)]);
    let layer = || descriptor(layer_type(Gzip), &test.layers[0]);
    let typed = |media_type: &str| descriptor(media_type, &test.layers[0]);
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let table: [(Vec<u8>, &str); 6] = [
        (manifest(&test.config, &[layer(), layer()]), "LayerCount"),
        (manifest(&test.config, &[]), "LayerCount"),
        (manifest(&test.config, &[typed(foreign)]), "ForeignLayer"),
        (
            manifest(&test.config, &[typed("application/x-nothing")]),
            "UnsupportedMediaType",
        ),
        (
            br#"{"schemaVersion":1,"name":"app","tag":"1","fsLayers":[]}"#.to_vec(),
            "Schema1",
        ),
        (vec![b' '; (4 << 20) + 1], "TooLarge"),
    ];
    for (bytes, expected) in table {
        let (fake, node) = (Fake::start().await, Node::new());
        fake.put("other", &test);
        fake.put_manifest("1", OCI_MANIFEST, &bytes);
        let error = format!("{:?}", fails(&fake, &node).await);
        assert!(error.starts_with(expected), "{expected}: {error}");
    }
    // Without an announced length, too.
    let (fake, node) = (Fake::start().await, Node::new());
    fake.hook(|_| {
        let endless = futures_util::stream::repeat_with(|| {
            Ok::<Bytes, std::io::Error>(Bytes::from(vec![b' '; 1 << 16]))
        });
        Some(Response::new(Body::from_stream(endless)))
    });
    assert!(matches!(
        *fails(&fake, &node).await,
        ImageError::TooLarge { .. }
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_that_lead_nowhere_end() {
    let (fake, node) = (Fake::start().await, Node::new());
    let mut inner = descriptor(fake::OCI_INDEX, b"{}");
    let mut outer = Vec::new();
    for _ in 0..6 {
        inner["platform"] = serde_json::json!({"os": "linux", "architecture": "amd64"});
        outer = serde_json::json!({"schemaVersion": 2, "manifests": [inner]})
            .to_string()
            .into_bytes();
        fake.put_manifest("nested", fake::OCI_INDEX, &outer);
        inner = descriptor(fake::OCI_INDEX, &outer);
    }
    fake.put_manifest("1", fake::OCI_INDEX, &outer);
    assert!(matches!(
        *fails(&fake, &node).await,
        ImageError::Malformed { .. }
    ));
}
