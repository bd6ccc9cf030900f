//! A registry that does what a test wants, and images to put into it.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use http::{StatusCode, header};

use crate::id::Digest;
use crate::image::manifest::Compression;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// One request as the registry saw it.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) authorization: Option<String>,
    pub(super) range: Option<String>,
    pub(super) body: String,
}

type Hook = Box<dyn Fn(&Seen) -> Option<Response> + Send + Sync>;

/// The registry; it ends with the test's runtime.
#[derive(Clone)]
pub(super) struct Fake {
    shared: Arc<Shared>,
    /// `127.0.0.1:port`
    pub(super) host: String,
}

#[derive(Default)]
struct Shared {
    manifests: Mutex<HashMap<String, (String, Bytes)>>,
    blobs: Mutex<HashMap<String, Bytes>>,
    seen: Mutex<Vec<Seen>>,
    hook: Mutex<Option<Hook>>,
}

impl Fake {
    pub(super) async fn start() -> Fake {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has free ports");
        let host = listener.local_addr().expect("it is bound").to_string();
        let shared = Arc::new(Shared::default());
        let app = axum::Router::new()
            .fallback(serve)
            .with_state(Arc::clone(&shared));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Fake { shared, host }
    }

    /// Answers instead of the registry wherever `hook` returns something.
    pub(super) fn hook(&self, hook: impl Fn(&Seen) -> Option<Response> + Send + Sync + 'static) {
        *self.shared.hook.lock().expect("no test panics with it") = Some(Box::new(hook));
    }

    pub(super) fn unhook(&self) {
        *self.shared.hook.lock().expect("no test panics with it") = None;
    }

    pub(super) fn put_manifest(&self, version: &str, media_type: &str, bytes: &[u8]) {
        let mut manifests = self
            .shared
            .manifests
            .lock()
            .expect("no test panics with it");
        let value = (media_type.to_owned(), Bytes::copy_from_slice(bytes));
        manifests.insert(version.to_owned(), value.clone());
        manifests.insert(Digest::of(bytes).to_string(), value);
    }

    pub(super) fn put_blob(&self, bytes: &[u8]) {
        let mut blobs = self.shared.blobs.lock().expect("no test panics with it");
        blobs.insert(Digest::of(bytes).to_string(), Bytes::copy_from_slice(bytes));
    }

    /// Offers `image` as `tag` of every repository.
    pub(super) fn put(&self, tag: &str, image: &TestImage) {
        self.put_manifest(tag, OCI_MANIFEST, &image.manifest);
        self.put_blob(&image.config);
        for layer in &image.layers {
            self.put_blob(layer);
        }
    }

    pub(super) fn reference(&self, rest: &str) -> super::ImageRef {
        format!("{}/{rest}", self.host)
            .parse()
            .expect("tests write references")
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.shared
            .seen
            .lock()
            .expect("no test panics with it")
            .clone()
    }

    pub(super) fn forget_seen(&self) {
        self.shared
            .seen
            .lock()
            .expect("no test panics with it")
            .clear();
    }

    /// Returns how many blob requests there were.
    pub(super) fn blob_requests(&self) -> usize {
        self.seen()
            .iter()
            .filter(|seen| seen.path.contains("/blobs/"))
            .count()
    }
}

async fn serve(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20)
        .await
        .unwrap_or_default();
    let text = |name| {
        parts
            .headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let seen = Seen {
        method: parts.method.to_string(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        authorization: text(header::AUTHORIZATION),
        range: text(header::RANGE),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    shared
        .seen
        .lock()
        .expect("no test panics with it")
        .push(seen.clone());
    let hooked = shared
        .hook
        .lock()
        .expect("no test panics with it")
        .as_ref()
        .and_then(|hook| hook(&seen));
    if let Some(response) = hooked {
        return response;
    }
    shared.answer(&seen)
}

impl Shared {
    fn answer(&self, seen: &Seen) -> Response {
        if let Some((_, version)) = seen.path.split_once("/manifests/") {
            let manifests = self.manifests.lock().expect("no test panics with it");
            let Some((media_type, bytes)) = manifests.get(version).cloned() else {
                return status(404);
            };
            return Response::builder()
                .header(header::CONTENT_TYPE, media_type)
                .header("docker-content-digest", Digest::of(&bytes).to_string())
                .body(Body::from(bytes))
                .expect("parts are valid");
        }
        let Some((_, digest)) = seen.path.split_once("/blobs/") else {
            return status(404);
        };
        let Some(bytes) = self
            .blobs
            .lock()
            .expect("no test panics with it")
            .get(digest)
            .cloned()
        else {
            return status(404);
        };
        ranged(seen, bytes)
    }
}

/// Answers with all of `bytes`, or with the rest that was asked for.
pub(super) fn ranged(seen: &Seen, bytes: Bytes) -> Response {
    let start: Option<usize> = seen.range.as_deref().and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse()
            .ok()
    });
    let total = bytes.len();
    match start {
        Some(start) if start >= total => status(416),
        Some(start) => Response::builder()
            .status(StatusCode::PARTIAL_CONTENT)
            .header(
                header::CONTENT_RANGE,
                format!("bytes {start}-{}/{total}", total - 1),
            )
            .body(Body::from(bytes.slice(start..)))
            .expect("parts are valid"),
        None => Response::new(Body::from(bytes)),
    }
}

pub(super) fn status(code: u16) -> Response {
    Response::builder()
        .status(code)
        .body(Body::empty())
        .expect("parts are valid")
}

/// Sends `bytes`, then nothing for ever, or an end that the announced length forbids.
pub(super) fn broken_after(bytes: Bytes, announced: usize, then: Then) -> Response {
    use futures_util::StreamExt as _;
    let first = futures_util::stream::iter([Ok::<Bytes, std::io::Error>(bytes)]);
    let rest: futures_util::stream::BoxStream<'static, _> = match then {
        Then::Hang => futures_util::stream::pending().boxed(),
        // Later, so that what came before is on its way.
        Then::Break => futures_util::stream::once(async {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            Err(std::io::Error::other("broken on purpose"))
        })
        .boxed(),
    };
    Response::builder()
        .header(header::CONTENT_LENGTH, announced)
        .body(Body::from_stream(first.chain(rest)))
        .expect("parts are valid")
}

pub(super) enum Then {
    Hang,
    Break,
}

/// An image as blobs.
#[derive(Clone)]
pub(super) struct TestImage {
    pub(super) config: Vec<u8>,
    pub(super) manifest: Vec<u8>,
    /// Compressed, base first.
    pub(super) layers: Vec<Vec<u8>>,
    pub(super) diff_ids: Vec<Digest>,
}

impl TestImage {
    pub(super) fn id(&self) -> String {
        Digest::of(&self.config).to_string()
    }
}

/// A tar of regular files.
pub(super) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, name, *content)
            .expect("memory takes it");
    }
    builder.into_inner().expect("memory takes it")
}

pub(super) fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).expect("memory takes it");
            encoder.finish().expect("memory takes it")
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).expect("memory takes it"),
        Compression::Xz => liblzma::encode_all(bytes, 1).expect("memory takes it"),
    }
}

pub(super) fn layer_type(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "application/vnd.oci.image.layer.v1.tar",
        Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        Compression::Xz => "application/vnd.oci.image.layer.v1.tar+xz",
    }
}

/// An image of these layers, each a tar and how to compress it.
pub(super) fn image(layers: &[(Vec<u8>, Compression)]) -> TestImage {
    image_for("amd64", layers)
}

pub(super) fn image_for(architecture: &str, layers: &[(Vec<u8>, Compression)]) -> TestImage {
    let diff_ids: Vec<Digest> = layers.iter().map(|(tar, _)| Digest::of(tar)).collect();
    let blobs: Vec<Vec<u8>> = layers
        .iter()
        .map(|(tar, compression)| compress(tar, *compression))
        .collect();
    let config = serde_json::json!({
        "architecture": architecture, "os": "linux", "created": "2026-01-02T03:04:05Z",
        "config": {"Cmd": ["/bin/true"], "Env": ["A=b"], "User": "7:8", "Labels": {"l": "v"}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string().into_bytes();
    let described: Vec<_> = blobs
        .iter()
        .zip(layers)
        .map(|(blob, (_, compression))| descriptor(layer_type(*compression), blob))
        .collect();
    let manifest = manifest(&config, &described);
    TestImage {
        config,
        manifest,
        layers: blobs,
        diff_ids,
    }
}

pub(super) fn manifest(config: &[u8], layers: &[serde_json::Value]) -> Vec<u8> {
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": layers,
    });
    manifest.to_string().into_bytes()
}

pub(super) fn descriptor(media_type: &str, bytes: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len()})
}

/// An index of one manifest per platform (`os`, `architecture`).
pub(super) fn index(images: &BTreeMap<&str, &TestImage>) -> Vec<u8> {
    let entries: Vec<_> = images
        .iter()
        .map(|(architecture, image)| {
            let mut entry = descriptor(OCI_MANIFEST, &image.manifest);
            entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
            entry
        })
        .collect();
    serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
        .to_string()
        .into_bytes()
}

/// Bytes that no compression makes smaller, the same for the same seed.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}
