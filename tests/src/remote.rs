//! A server of distributions' images, in both layouts: what agents pull system containers' images from.
//!
//! Serves files from memory with ranges and ETags, tells what it was asked for, and can be slow.

use std::{
    collections::HashMap,
    io::Write as _,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::Result;
use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Response, StatusCode, header},
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::{images::LayerBuilder, registry::digest_of};

/// The build that [`Remote::offer`] gives its images.
pub const SERIAL: &str = "20261124_05:24";

#[derive(Default)]
struct Shelf {
    files: HashMap<String, Bytes>,
    products: serde_json::Map<String, Value>,
    lines: String,
    slow: Option<Duration>,
    seen: Vec<String>,
}

/// A running server; ends when dropped.
pub struct Remote {
    shelf: Arc<Mutex<Shelf>>,
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Remote {
    /// Serves plain HTTP on `listener`, which belongs to the network namespace it was made in.
    ///
    /// # Errors
    /// Outside a tokio runtime, or if the listener cannot be used.
    pub fn start(listener: TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shelf: Arc<Mutex<Shelf>> = Arc::default();
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&shelf));
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                eprintln!("remote: {error}");
            }
        });
        Ok(Self {
            shelf,
            address,
            serving,
        })
    }

    /// What makes an agent know this server as `simple` and as `lxc`.
    pub fn config(&self) -> String {
        let url = format!("http://{}", self.address);
        format!(
            "[image.remotes.simple]\nurl = '{url}'\n[image.remotes.lxc]\nurl = '{url}'\nprotocol = 'lxc'\n"
        )
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().expect("no holder panics")
    }

    /// Offers `tree` as OS/RELEASE for this machine, in both layouts; answers the fingerprint.
    pub fn offer(&self, os: &str, release: &str, tree: &[u8]) -> String {
        self.offer_build(os, release, SERIAL, tree)
    }

    /// [`Remote::offer`] with a serial; the build before stays.
    pub fn offer_build(&self, os: &str, release: &str, serial: &str, tree: &[u8]) -> String {
        let (metadata, root) = (xz(&metadata(os, release)), xz(tree));
        let combined = digest_of(&[&*metadata, &*root].concat());
        let directory = format!("images/{os}/{release}/amd64/default/{serial}");
        let item = |ftype: &str, name: &str, bytes: &[u8]| {
            json!({"ftype": ftype, "path": format!("{directory}/{name}"), "size": bytes.len(),
                "sha256": hex_of(&digest_of(bytes))})
        };
        let mut meta = item("incus.tar.xz", "incus.tar.xz", &metadata);
        meta["combined_rootxz_sha256"] = json!(hex_of(&combined));
        let items = json!({"incus.tar.xz": meta,
            "root.tar.xz": item("root.tar.xz", "rootfs.tar.xz", &root)});
        let flat = LayerBuilder::new()
            .file(
                "config",
                0o644,
                "lxc.include = LXC_TEMPLATE_CONFIG/common.conf\n",
            )
            .file("templates", 0o644, "/etc/hostname\n/etc/hosts\n")
            .build();
        let flat = xz(&flat.tar);
        let sums = format!(
            "{}  meta.tar.xz\n{}  rootfs.tar.xz\n",
            hex_of(&digest_of(&flat)),
            hex_of(&digest_of(&root))
        );
        let mut shelf = self.shelf();
        for (name, bytes) in [
            ("incus.tar.xz", metadata),
            ("rootfs.tar.xz", root),
            ("meta.tar.xz", flat),
            ("SHA256SUMS", sums.into_bytes()),
        ] {
            shelf
                .files
                .insert(format!("/{directory}/{name}"), bytes.into());
        }
        let line = format!("{os};{release};amd64;default;{serial};/{directory}/\n");
        shelf.lines.push_str(&line);
        let product = shelf
            .products
            .entry(format!("{os}:{release}:amd64:default"))
            .or_insert_with(|| {
                json!({"aliases": format!("{os}/{release}/default,{os}/{release}"), "arch": "amd64",
                    "os": os, "release": release, "release_title": release, "variant": "default",
                    "versions": {}})
            });
        product["versions"][serial] = json!({"items": items});
        let products = Value::Object(shelf.products.clone());
        let documents = [
            (
                "/streams/v1/index.json",
                json!({"format": "index:1.0", "index": {"images": {"format": "products:1.0",
                    "datatype": "image-downloads", "path": "streams/v1/images.json",
                    "products": shelf.products.keys().collect::<Vec<_>>()}}})
                .to_string(),
            ),
            (
                "/streams/v1/images.json",
                json!({"content_id": "images", "datatype": "image-downloads",
                    "format": "products:1.0", "products": products})
                .to_string(),
            ),
            ("/meta/1.0/index-system", shelf.lines.clone()),
        ];
        for (path, text) in documents {
            shelf.files.insert(path.to_owned(), text.into());
        }
        combined
    }

    /// Serves `bytes` at `path` instead of what is there.
    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) {
        self.shelf().files.insert(path.to_owned(), bytes.into());
    }

    /// Sends files in pieces of 64 KiB, each this late; or at once again.
    pub fn slow(&self, pause: Option<Duration>) {
        self.shelf().slow = pause;
    }

    /// What was asked for since the last call, as `GET /path`, with ` 304` where nothing was new.
    pub fn take_seen(&self) -> Vec<String> {
        std::mem::take(&mut self.shelf().seen)
    }
}

fn hex_of(digest: &str) -> &str {
    digest.trim_start_matches("sha256:")
}

/// A metadata tarball, not compressed.
pub fn metadata(os: &str, release: &str) -> Bytes {
    let yaml = format!(
        "architecture: x86_64\ncreation_date: 1764000000\nexpiry_date: 1766592000\n\
         properties:\n  architecture: amd64\n  description: {os} {release} amd64\n  name: {os}-{release}\n  \
         os: {os}\n  release: {release}\n  serial: '{SERIAL}'\n  variant: default\n\
         templates:\n  /etc/hostname:\n    when: [create, copy]\n    template: hostname.tpl\n"
    );
    LayerBuilder::new()
        .file("metadata.yaml", 0o644, yaml)
        .dir("templates")
        .file("templates/hostname.tpl", 0o644, "{{ container.name }}\n")
        .build()
        .tar
}

/// Compresses as distributions do.
pub fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut out = liblzma::write::XzEncoder::new(Vec::new(), 1);
    out.write_all(bytes).expect("a Vec takes everything");
    out.finish().expect("a Vec takes everything")
}

async fn answer(State(shelf): State<Arc<Mutex<Shelf>>>, request: Request) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let mut shelf = shelf.lock().expect("no holder panics");
    let found = shelf.files.get(&path).cloned();
    let slow = shelf.slow;
    let headers = request.headers();
    let response = match &found {
        None => status(StatusCode::NOT_FOUND),
        Some(bytes) if is_same(headers, bytes) => status(StatusCode::NOT_MODIFIED),
        Some(bytes) if request.method() == "HEAD" => Response::builder()
            .header(header::CONTENT_LENGTH, bytes.len())
            .body(Body::empty()),
        Some(bytes) => send(
            headers,
            bytes,
            slow.filter(|_| path.starts_with("/images/")),
        ),
    };
    let response = response.unwrap_or_else(|_| Response::new(Body::empty()));
    let same = if response.status() == StatusCode::NOT_MODIFIED {
        " 304"
    } else {
        ""
    };
    shelf
        .seen
        .push(format!("{} {path}{same}", request.method()));
    response
}

type Built = Result<Response<Body>, axum::http::Error>;

fn status(status: StatusCode) -> Built {
    Response::builder().status(status).body(Body::empty())
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", hex_of(&digest_of(bytes)))
}

fn is_same(headers: &HeaderMap, bytes: &[u8]) -> bool {
    headers
        .get(header::IF_NONE_MATCH)
        .is_some_and(|value| value.as_bytes() == etag(bytes).as_bytes())
}

fn send(headers: &HeaderMap, bytes: &Bytes, slow: Option<Duration>) -> Built {
    let range = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let (total, rest) = (
        bytes.len(),
        bytes.slice(start.unwrap_or_default().min(bytes.len())..),
    );
    let mut response = Response::builder().header(header::ETAG, etag(bytes));
    if let Some(start) = start {
        let range = format!("bytes {start}-{}/{total}", total - 1);
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, range);
    }
    let Some(pause) = slow else {
        return response.body(Body::from(rest));
    };
    let pieces: Vec<Bytes> = (0..rest.len())
        .step_by(64 << 10)
        .map(|at| rest.slice(at..rest.len().min(at + (64 << 10))))
        .collect();
    let late = stream::iter(pieces).then(move |piece| async move {
        tokio::time::sleep(pause).await;
        Ok::<_, std::io::Error>(piece)
    });
    response
        .header(header::CONTENT_LENGTH, rest.len())
        .body(Body::from_stream(late))
}
