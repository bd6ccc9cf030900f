//! How registries are spoken to: credentials, mirrors, retries, ranges, redirects.

use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::response::Response;
use base64::Engine as _;
use http::header;

use super::fake::{Seen, Then, broken_after, ranged, status};
use super::*;

fn small() -> fake::TestImage {
    image(&[(tar(&[("f", b"content")]), Gzip)])
}

fn basic() -> RegistryAuth {
    RegistryAuth::Basic {
        username: "user".into(),
        password: Secret::new("hunter2"),
    }
}

fn challenge(value: &str) -> Response {
    let body = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    Response::builder()
        .status(401)
        .header(header::WWW_AUTHENTICATE, value)
        .body(Body::from(body))
        .unwrap()
}

fn json(text: &str) -> Response {
    Response::new(Body::from(text.to_owned()))
}

/// A registry behind a token server of its own; tokens are `t1`, `t2`, ... and the newest is good.
fn with_tokens(
    fake: &Fake,
    accepts: impl Fn(&Seen) -> bool + Send + Sync + 'static,
) -> Arc<AtomicUsize> {
    let issued = Arc::new(AtomicUsize::new(0));
    let (count, host) = (Arc::clone(&issued), fake.host.clone());
    fake.hook(move |seen| {
        if seen.path == "/token" {
            if !accepts(seen) {
                return Some(status(401));
            }
            let n = count.fetch_add(1, Ordering::Relaxed) + 1;
            return Some(json(&format!(r#"{{"token":"t{n}","expires_in":300}}"#)));
        }
        let good = format!("Bearer t{}", count.load(Ordering::Relaxed));
        if seen.authorization.as_deref() == Some(&good) {
            return None;
        }
        let scope = "repository:app:pull";
        Some(challenge(&format!(
            "Bearer realm=\"http://{host}/token\",service=\"svc\",scope=\"{scope}\""
        )))
    });
    issued
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_tokens_are_fetched_once_and_cached() {
    let (fake, node) = (Fake::start().await, Node::new());
    fake.put("1", &three_layers());
    let issued = with_tokens(&fake, |seen| {
        seen.authorization.is_none()
            && seen.query.contains("service=svc")
            && seen.query.contains("scope=repository%3Aapp%3Apull")
    });
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    node.pull(&reference).wait().await.unwrap();
    assert_eq!(issued.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ends_within_a_pull_is_renewed() {
    let (fake, node) = (Fake::start().await, Node::new());
    fake.put("1", &small());
    let issued = with_tokens(&fake, |_| true);
    let reference = fake.reference("app:1");
    node.pull(&reference).wait().await.unwrap();
    // As if the server had forgotten it: only the next one is good.
    issued.fetch_add(1, Ordering::Relaxed);
    assert!(!node.pull(&reference).wait().await.unwrap().changed);
    assert_eq!(issued.load(Ordering::Relaxed), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_and_identity_tokens_are_exchanged_for_tokens() {
    let expected = format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode("user:hunter2")
    );
    let identity = RegistryAuth::Identity {
        token: Secret::new("refresh-me"),
    };
    type Accepts = Box<dyn Fn(&Seen) -> bool + Send + Sync>;
    let table: [(RegistryAuth, Accepts); 2] = [
        (
            basic(),
            Box::new(move |seen| seen.authorization.as_deref() == Some(&expected)),
        ),
        (
            identity,
            Box::new(|seen| {
                seen.method == "POST"
                    && seen.body.contains("grant_type=refresh_token")
                    && seen.body.contains("refresh_token=refresh-me")
            }),
        ),
    ];
    for (auth, accepts) in table {
        let (fake, node) = (Fake::start().await, Node::new());
        fake.put("1", &small());
        with_tokens(&fake, accepts);
        let reference = fake.reference("app:1");
        node.pull_as(&reference, auth).wait().await.unwrap();
        // Nobody else gets in with that token.
        let error = node.pull(&reference).wait().await.unwrap_err();
        assert!(matches!(*error, ImageError::Denied { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_and_given_tokens_are_sent_as_they_are() {
    let password = format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode("user:hunter2")
    );
    let table = [
        (basic(), password, "Basic realm=\"x\""),
        (
            RegistryAuth::Bearer {
                token: Secret::new("given"),
            },
            "Bearer given".to_owned(),
            "Bearer realm=\"http://HOST/token\"",
        ),
    ];
    for (auth, expected, asks) in table {
        let (fake, node) = (Fake::start().await, Node::new());
        fake.put("1", &small());
        let asks = asks.replace("HOST", &fake.host);
        fake.hook(move |seen| {
            (seen.authorization.as_deref() != Some(&expected)).then(|| challenge(&asks))
        });
        let reference = fake.reference("app:1");
        node.pull_as(&reference, auth).wait().await.unwrap();
        for wrong in [
            RegistryAuth::Anonymous,
            RegistryAuth::Basic {
                username: "user".into(),
                password: Secret::new("secret-guess"),
            },
            RegistryAuth::Bearer {
                token: Secret::new("secret-guess"),
            },
        ] {
            let error = node.pull_as(&reference, wrong).wait().await.unwrap_err();
            assert!(matches!(*error, ImageError::Denied { .. }), "{error}");
            assert!(!format!("{error} {error:?}").contains("secret-guess"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_reach_neither_disk_nor_mirrors_nor_redirects() {
    let (mirror, other, fake) = (
        Fake::start().await,
        Fake::start().await,
        Fake::start().await,
    );
    let test = small();
    fake.put("1", &test);
    other.put("1", &test);
    let (elsewhere, layer) = (
        other.host.clone(),
        format!("/blobs/{}", Digest::of(&test.layers[0])),
    );
    fake.hook(move |seen| {
        if seen.authorization.is_none() {
            return Some(challenge("Basic realm=\"x\""));
        }
        let place = format!("http://{elsewhere}{}", seen.path);
        seen.path.ends_with(&layer).then(|| {
            Response::builder()
                .status(307)
                .header(header::LOCATION, place)
                .body(Body::empty())
                .unwrap()
        })
    });
    mirror.hook(|_| Some(challenge("Basic realm=\"x\"")));
    let node = Node::with(with_mirrors(&fake.host, &[&mirror.host]));
    node.pull_as(&fake.reference("app:1"), basic())
        .wait()
        .await
        .unwrap();
    assert!(
        !mirror.seen().is_empty()
            && mirror
                .seen()
                .iter()
                .all(|seen| seen.authorization.is_none())
    );
    assert_eq!(other.seen().len(), 1);
    assert!(other.seen()[0].authorization.is_none());
    for entry in walk(node.dir.path()) {
        let bytes = std::fs::read(&entry).unwrap();
        assert!(
            !bytes.windows(7).any(|window| window == b"hunter2"),
            "{}",
            entry.display()
        );
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            files.extend(walk(&entry.path()));
        } else if entry.file_type().unwrap().is_file() {
            files.push(entry.path());
        }
    }
    files
}

fn with_mirrors(host: &str, mirrors: &[&str]) -> ImageChapterConfig {
    let mirrors = mirrors.iter().map(|mirror| (*mirror).to_owned()).collect();
    let table = HostConfig {
        mirrors,
        ..HostConfig::default()
    };
    ImageChapterConfig {
        hosts: HostsConfig([(host.to_owned(), table)].into()),
        ..quick()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_first_and_fall_back_in_order() {
    let (empty, broken, full) = (
        Fake::start().await,
        Fake::start().await,
        Fake::start().await,
    );
    full.put("1", &small());
    broken.hook(|_| Some(status(500)));
    // The registry itself does not even exist.
    let node = Node::with(with_mirrors(
        "registry.invalid",
        &["127.0.0.1:1", &empty.host, &broken.host, &full.host],
    ));
    let reference: ImageRef = "registry.invalid/some/app:1".parse().unwrap();
    node.pull(&reference).wait().await.unwrap();
    assert!(node.image("registry.invalid/some/app:1").is_some());
    assert_eq!(full.seen()[0].path, "/v2/some/app/manifests/1");
    // Content comes from where the manifest was.
    assert_eq!((empty.seen().len(), broken.seen().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_mirror_is_passed_over() {
    let (liar, fake) = (Fake::start().await, Fake::start().await);
    let test = small();
    fake.put("1", &test);
    let digest = Digest::of(&test.manifest);
    liar.hook(|_| Some(json("{}")));
    let node = Node::with(with_mirrors(&fake.host, &[&liar.host]));
    node.pull(&fake.reference(&format!("app@{digest}")))
        .wait()
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_apart() {
    let reference = |text: &str| text.parse::<ImageRef>().unwrap();
    let node = Node::new();
    let error = node
        .pull(&reference("127.0.0.1:1/app:1"))
        .wait()
        .await
        .unwrap_err();
    match &*error {
        ImageError::RegistryUnavailable { host, tried } => {
            assert_eq!((host.as_str(), tried.len()), ("127.0.0.1:1", 1));
            assert!(error.to_string().contains("refused"), "{error}");
        }
        other => panic!("{other}"),
    }
    let fake = Fake::start().await;
    let error = node
        .pull(&fake.reference("app:absent"))
        .wait()
        .await
        .unwrap_err();
    assert!(
        matches!(&*error, ImageError::NotFound { reference, .. } if reference.ends_with("app:absent")),
        "{error}"
    );
    fake.hook(|_| Some(status(403)));
    let error = node
        .pull(&fake.reference("app:1"))
        .wait()
        .await
        .unwrap_err();
    assert!(matches!(*error, ImageError::Denied { .. }), "{error}");
    fake.hook(|_| Some(status(500)));
    let error = node
        .pull(&fake.reference("app:1"))
        .wait()
        .await
        .unwrap_err();
    assert!(
        matches!(*error, ImageError::RegistryUnavailable { .. }),
        "{error}"
    );
    fake.hook(|_| Some(status(418)));
    let error = node
        .pull(&fake.reference("app:1"))
        .wait()
        .await
        .unwrap_err();
    assert!(
        matches!(*error, ImageError::UnexpectedAnswer { .. }),
        "{error}"
    );
    // HTTPS to a server that speaks HTTP.
    let table = HostConfig {
        plain_http: Some(false),
        ..HostConfig::default()
    };
    let hosts = HostsConfig([(fake.host.clone(), table)].into());
    let node = Node::with(ImageChapterConfig { hosts, ..quick() });
    let error = node
        .pull(&fake.reference("app:1"))
        .wait()
        .await
        .unwrap_err();
    assert!(matches!(*error, ImageError::Tls { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_registries_are_asked_again_as_late_as_they_wish() {
    let (fake, node) = (Fake::start().await, Node::new());
    fake.put("1", &small());
    let left = AtomicUsize::new(2);
    fake.hook(move |_| {
        let refuse = left
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_ok();
        refuse.then(|| {
            Response::builder()
                .status(429)
                .header("retry-after", "1")
                .body(Body::empty())
                .unwrap()
        })
    });
    let begun = std::time::Instant::now();
    node.pull(&fake.reference("app:1")).wait().await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(2));

    fake.hook(|_| {
        Some(
            Response::builder()
                .status(429)
                .header("retry-after", "86400")
                .body(Body::empty())
                .unwrap(),
        )
    });
    let error = node
        .pull(&fake.reference("app:other"))
        .wait()
        .await
        .unwrap_err();
    let day = Duration::from_secs(86_400);
    assert!(
        matches!(*error, ImageError::RateLimited { retry_after: Some(after), .. } if after == day),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_streams_go_on_by_range() {
    for ranges in [true, false] {
        let (fake, node) = (Fake::start().await, Node::new());
        let test = image(&[(tar(&[("f", &noise(5, 500_000))]), Gzip)]);
        fake.put("1", &test);
        let layer = Bytes::from(test.layers[0].clone());
        let path = format!("/blobs/{}", Digest::of(&layer));
        let tries = AtomicUsize::new(0);
        fake.hook(move |seen| {
            if !seen.path.ends_with(&path) {
                return None;
            }
            match tries.fetch_add(1, Ordering::Relaxed) {
                0 => Some(broken_after(
                    layer.slice(..200_000),
                    layer.len(),
                    Then::Break,
                )),
                1 => Some(status(502)),
                // A server without ranges sends all of it again.
                _ if ranges => Some(ranged(seen, layer.clone())),
                _ => Some(Response::new(Body::from(layer.clone()))),
            }
        });
        node.pull(&fake.reference("app:1")).wait().await.unwrap();
        let asked: Vec<_> = fake
            .seen()
            .into_iter()
            .filter_map(|seen| seen.range)
            .collect();
        assert_eq!(asked.len(), 2);
        assert!(node.is_clean());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_registry_is_an_error_with_its_limit() {
    let (fake, node) = (Fake::start().await, Node::with(impatient()));
    let test = image(&[(tar(&[("f", &noise(6, 100_000))]), Gzip)]);
    fake.put("1", &test);
    let layer = Bytes::from(test.layers[0].clone());
    let path = format!("/blobs/{}", Digest::of(&layer));
    fake.hook(move |seen| {
        let is_layer = seen.path.ends_with(&path);
        is_layer.then(|| broken_after(Bytes::new(), layer.len(), Then::Hang))
    });
    let error = node
        .pull(&fake.reference("app:1"))
        .wait()
        .await
        .unwrap_err();
    match &*error {
        ImageError::Stalled { host, what, after } => {
            assert_eq!((host, *after), (&fake.host, impatient().stall_timeout));
            assert!(what.starts_with("layer sha256:"));
        }
        other => panic!("{other}"),
    }
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_registries_hold_up_no_other_pull_and_no_removal() {
    let (silent, fake, node) = (Fake::start().await, Fake::start().await, Node::new());
    let layers: Vec<_> = (0..12)
        .map(|n| (tar(&[("f", &noise(20 + n, 100_000))]), Gzip))
        .collect();
    let test = image(&layers);
    silent.put("1", &test);
    let lengths: Vec<usize> = test.layers.iter().map(Vec::len).collect();
    let paths: Vec<String> = test
        .layers
        .iter()
        .map(|layer| Digest::of(layer).to_string())
        .collect();
    silent.hook(move |seen| {
        let n = paths.iter().position(|path| seen.path.ends_with(path))?;
        Some(broken_after(Bytes::new(), lengths[n], Then::Hang))
    });
    let held: Vec<Pull> = (0..3)
        .map(|n| node.pull(&silent.reference(&format!("app{n}:1"))))
        .collect();
    node.until("three pulls hang", |node| {
        let fetching = |pull: &RunningPull| pull.progress.stage == PullStage::Fetching;
        node.images
            .running_pulls()
            .iter()
            .filter(|pull| fetching(pull))
            .count()
            == 3
    })
    .await;
    fake.put("1", &small());
    let reference = fake.reference("app:1");
    let limit = Duration::from_secs(30);
    tokio::time::timeout(limit, node.pull(&reference).wait())
        .await
        .unwrap()
        .unwrap();
    tokio::time::timeout(limit, node.remove(&reference.to_string()))
        .await
        .unwrap();
    drop(held);
    node.until("all is cleaned up", Node::is_clean).await;
}
