//! A small OCI registry: what the demo, the tests and the benchmark pull from.
//!
//! Serves manifests and blobs from memory or from files of an OCI image layout, with ranges, basic
//! or bearer-token authentication, HTTP or HTTPS, counts what it was asked for, and goes wrong in
//! the ways that registries do: slow, cut off, stalled, lying, overloaded.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use futures_util::stream;
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpStream, task::JoinHandle};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::images::Image;

/// `sha256:` and the digest of `bytes`.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Who may pull.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// Everyone.
    #[default]
    Anonymous,
    /// Who sends this user name and password with each request.
    Basic(String, String),
    /// Who fetched a token; `None`: tokens are given to everyone, as public registries do.
    Token(Option<(String, String)>),
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The answer comes this late.
    Delay(Duration),
    /// The connection ends after so many bytes of the body, below its announced length.
    Truncate(usize),
    /// The body stops after so many bytes, and the connection stays.
    Stall(usize),
    /// The first byte of the body is another.
    WrongBytes,
    /// The body is this long instead: shorter or longer than the manifest says, and honest HTTP.
    WrongLength(usize),
    /// This status; 429 and 503 with `Retry-After` in seconds, if set.
    Status(u16, Option<u32>),
    /// Chunks of 64 KiB, each this late.
    Slow(Duration),
    /// `Range` is ignored and the whole blob sent.
    NoRanges,
}

/// Which requests a fault meets.
#[derive(Clone, Debug)]
pub enum On {
    /// Every manifest.
    Manifests,
    /// Every blob.
    Blobs,
    /// The blob or manifest with this digest.
    Digest(String),
    /// Every token request.
    Tokens,
}

struct Armed {
    on: On,
    fault: Fault,
    left: Option<u32>,
}

/// One request, as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `GET` or `HEAD`.
    pub method: String,
    /// Path without query.
    pub path: String,
    /// `Range`, if any.
    pub range: Option<String>,
    /// Whether credentials came with it.
    pub authorized: bool,
    /// The status that was sent.
    pub status: u16,
}

#[derive(Clone)]
enum Content {
    Memory(Bytes),
    File(PathBuf),
}

#[derive(Default)]
struct Shelf {
    /// (repository, tag or digest) -> media type, bytes.
    manifests: BTreeMap<(String, String), (String, Bytes)>,
    blobs: HashMap<String, Content>,
    faults: Vec<Armed>,
    seen: Vec<Seen>,
    tokens: HashMap<String, String>,
}

struct Shared {
    auth: Auth,
    scheme: &'static str,
    address: SocketAddr,
    shelf: Mutex<Shelf>,
    next_token: AtomicU64,
}

impl Shared {
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().expect("no holder panics")
    }
}

/// Certificate authority of an HTTPS registry.
#[derive(Clone)]
pub struct Ca {
    /// The authority's certificate, for the client's trust store.
    pub pem: String,
    config: Arc<rustls::ServerConfig>,
}

impl Ca {
    /// Makes an authority and a server certificate for `names` (host names or addresses).
    pub fn for_names(names: &[&str]) -> Result<Self> {
        let key = rcgen::KeyPair::generate()?;
        let mut params = rcgen::CertificateParams::new(Vec::new())?;
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "Longshore test authority");
        let authority = params.self_signed(&key)?;
        let issuer = rcgen::Issuer::new(params, key);
        let server_key = rcgen::KeyPair::generate()?;
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let server = rcgen::CertificateParams::new(names)?.signed_by(&server_key, &issuer)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![server.der().clone()],
                rustls::pki_types::PrivateKeyDer::Pkcs8(server_key.serialize_der().into()),
            )?;
        Ok(Self {
            pem: authority.pem(),
            config: Arc::new(config),
        })
    }
}

/// A running registry; ends when dropped.
pub struct Registry {
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Registry {
    /// Serves plain HTTP without authentication on `listener`.
    pub fn start(listener: TcpListener) -> Result<Self> {
        Self::start_with(listener, Auth::Anonymous, None)
    }

    /// Serves on `listener`, which belongs to the network namespace it was made in.
    ///
    /// # Errors
    /// Outside a tokio runtime, or if the listener cannot be used.
    pub fn start_with(listener: TcpListener, auth: Auth, tls: Option<Ca>) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            auth,
            scheme: if tls.is_some() { "https" } else { "http" },
            address: listener.local_addr()?,
            shelf: Mutex::default(),
            next_token: AtomicU64::new(1),
        });
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            let served = match tls {
                None => axum::serve(listener, app).await,
                Some(ca) => {
                    let acceptor = TlsAcceptor::from(ca.config);
                    axum::serve(TlsListener { listener, acceptor }, app).await
                }
            };
            if let Err(error) = served {
                eprintln!("registry: {error}");
            }
        });
        Ok(Self { shared, serving })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// `HOST:PORT/name`, a reference that the agent can pull.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.shared.address)
    }

    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.shared.scheme, self.shared.address)
    }

    /// Keeps a blob; answers its digest.
    pub fn put_blob(&self, bytes: impl Into<Bytes>) -> String {
        let bytes = bytes.into();
        let digest = digest_of(&bytes);
        self.put_blob_as(&digest, bytes);
        digest
    }

    /// Keeps a blob under a digest that need not be its own.
    pub fn put_blob_as(&self, digest: &str, bytes: impl Into<Bytes>) {
        self.shared
            .shelf()
            .blobs
            .insert(digest.to_owned(), Content::Memory(bytes.into()));
    }

    /// Keeps a manifest or index under a tag (or any digest) and under its own digest, which it answers.
    pub fn put_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> String {
        let bytes = bytes.into();
        let digest = digest_of(&bytes);
        let mut shelf = self.shared.shelf();
        for name in [reference, &digest] {
            shelf.manifests.insert(
                (repository.to_owned(), name.to_owned()),
                (media_type.to_owned(), bytes.clone()),
            );
        }
        digest
    }

    /// Offers `image` as `name` (`repository:tag`); answers the manifest's digest.
    pub fn push(&self, name: &str, image: &Image) -> String {
        let (repository, tag) = name.rsplit_once(':').unwrap_or((name, "latest"));
        for (digest, blob) in &image.blobs {
            self.put_blob_as(digest, blob.clone());
        }
        self.put_manifest(repository, tag, image.media_type, image.manifest.clone())
    }

    /// Offers all images of an OCI image layout directory under `repository`, by their ref names.
    ///
    /// Blobs are read from the directory as they are asked for.
    pub fn serve_layout(&self, dir: &Path, repository: &str) -> Result<()> {
        let index: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("index.json"))?)
            .context("index.json of the image layout")?;
        for entry in index["manifests"].as_array().into_iter().flatten() {
            let digest = entry["digest"].as_str().context("digest of a manifest")?;
            let media_type = entry["mediaType"]
                .as_str()
                .context("mediaType of a manifest")?;
            let tag = entry["annotations"]["org.opencontainers.image.ref.name"]
                .as_str()
                .unwrap_or("latest");
            let bytes = fs::read(blob_path(dir, digest)?)?;
            self.put_manifest(repository, tag, media_type, bytes);
        }
        for entry in fs::read_dir(dir.join("blobs/sha256"))? {
            let entry = entry?;
            let digest = format!("sha256:{}", entry.file_name().to_string_lossy());
            self.shared
                .shelf()
                .blobs
                .insert(digest, Content::File(entry.path()));
        }
        Ok(())
    }

    /// Lets `fault` happen `times` (`None`: from now on) to the requests that `on` names.
    pub fn fault(&self, on: On, fault: Fault, times: Option<u32>) {
        self.shared.shelf().faults.push(Armed {
            on,
            fault,
            left: times,
        });
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.shared.shelf().faults.clear();
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.shelf().seen.clone()
    }

    /// How many `GET`s of blobs there were.
    pub fn blob_fetches(&self) -> usize {
        self.seen()
            .iter()
            .filter(|seen| seen.method == "GET" && seen.path.contains("/blobs/"))
            .count()
    }
}

fn blob_path(dir: &Path, digest: &str) -> Result<PathBuf> {
    match digest.strip_prefix("sha256:") {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Ok(dir.join("blobs/sha256").join(hex))
        }
        _ => bail!("{digest}: not a sha256 digest"),
    }
}

struct TlsListener {
    listener: tokio::net::TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            // A client that does not trust the certificate hangs up: that is its right.
            if let Ok((stream, peer)) = self.listener.accept().await
                && let Ok(stream) = self.acceptor.accept(stream).await
            {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let range = request
        .headers()
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    let authorized = request.headers().contains_key(header::AUTHORIZATION);
    let query = request.uri().query().unwrap_or_default().to_owned();
    let response = route(
        &shared,
        &method,
        &path,
        &query,
        request.headers(),
        range.as_deref(),
    )
    .await;
    shared.shelf().seen.push(Seen {
        method: method.to_string(),
        path,
        range,
        authorized,
        status: response.status().as_u16(),
    });
    response
}

enum Asked<'a> {
    Ping,
    Token,
    Manifest(&'a str, &'a str),
    Blob(&'a str),
}

fn parse(path: &str) -> Option<Asked<'_>> {
    match path {
        "/v2/" | "/v2" => return Some(Asked::Ping),
        "/token" => return Some(Asked::Token),
        _ => {}
    }
    let rest = path.strip_prefix("/v2/")?;
    if let Some((repository, reference)) = rest.rsplit_once("/manifests/") {
        return Some(Asked::Manifest(repository, reference));
    }
    rest.rsplit_once("/blobs/")
        .map(|(_, digest)| Asked::Blob(digest))
}

async fn route(
    shared: &Shared,
    method: &Method,
    path: &str,
    query: &str,
    headers: &HeaderMap,
    range: Option<&str>,
) -> Response {
    if method != Method::GET && method != Method::HEAD {
        return failure(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "this registry is read-only",
        );
    }
    let Some(asked) = parse(path) else {
        return failure(StatusCode::NOT_FOUND, "NAME_UNKNOWN", path);
    };
    let faults = meet(shared, &asked);
    for fault in &faults {
        match fault {
            Fault::Delay(time) => tokio::time::sleep(*time).await,
            Fault::Status(code, retry_after) => {
                let code = StatusCode::from_u16(*code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                let mut response = failure(code, "TOOMANYREQUESTS", "as the test wishes");
                if let Some(seconds) = retry_after {
                    response
                        .headers_mut()
                        .insert(header::RETRY_AFTER, (*seconds).into());
                }
                return response;
            }
            _ => {}
        }
    }
    if !matches!(asked, Asked::Token)
        && let Some(refusal) = refuse(shared, &asked, headers)
    {
        return refusal;
    }
    match asked {
        Asked::Ping => {
            ([("Docker-Distribution-Api-Version", "registry/2.0")], "{}").into_response()
        }
        Asked::Token => token(shared, query, headers),
        Asked::Manifest(repository, reference) => {
            let found = shared
                .shelf()
                .manifests
                .get(&(repository.to_owned(), reference.to_owned()))
                .cloned();
            match found {
                None => failure(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", reference),
                Some((media_type, bytes)) => body(bytes, &media_type, None, &faults, method),
            }
        }
        Asked::Blob(digest) => {
            let found = shared.shelf().blobs.get(digest).cloned();
            let bytes = match found {
                None => return failure(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", digest),
                Some(Content::Memory(bytes)) => bytes,
                Some(Content::File(path)) => match tokio::fs::read(&path).await {
                    Ok(bytes) => bytes.into(),
                    Err(error) => {
                        let what = format!("{}: {error}", path.display());
                        return failure(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &what);
                    }
                },
            };
            body(bytes, "application/octet-stream", range, &faults, method)
        }
    }
}

/// The faults that this request meets; each use counts.
fn meet(shared: &Shared, asked: &Asked<'_>) -> Vec<Fault> {
    let mut met = Vec::new();
    for armed in &mut shared.shelf().faults {
        let hit = match (&armed.on, asked) {
            (On::Manifests, Asked::Manifest(..))
            | (On::Blobs, Asked::Blob(_))
            | (On::Tokens, Asked::Token) => true,
            (On::Digest(digest), Asked::Manifest(_, asked) | Asked::Blob(asked)) => digest == asked,
            _ => false,
        };
        if hit && armed.left != Some(0) {
            armed.left = armed.left.map(|left| left - 1);
            met.push(armed.fault.clone());
        }
    }
    met
}

fn refuse(shared: &Shared, asked: &Asked<'_>, headers: &HeaderMap) -> Option<Response> {
    let sent = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let challenge = match &shared.auth {
        Auth::Anonymous => return None,
        Auth::Basic(user, password) => {
            if sent == Some(&basic(user, password)) {
                return None;
            }
            "Basic realm=\"longshore\"".to_owned()
        }
        Auth::Token(_) => {
            let repository = match asked {
                Asked::Manifest(repository, _) => (*repository).to_owned(),
                _ => "*".to_owned(),
            };
            if let Some(token) = sent.and_then(|sent| sent.strip_prefix("Bearer "))
                && shared.shelf().tokens.contains_key(token)
            {
                return None;
            }
            format!(
                "Bearer realm=\"{}://{}/token\",service=\"longshore\",scope=\"repository:{repository}:pull\"",
                shared.scheme, shared.address
            )
        }
    };
    let mut response = failure(
        StatusCode::UNAUTHORIZED,
        "UNAUTHORIZED",
        "authentication required",
    );
    response.headers_mut().insert(
        header::WWW_AUTHENTICATE,
        challenge.parse().expect("made of visible characters"),
    );
    Some(response)
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64.encode(format!("{user}:{password}")))
}

fn token(shared: &Shared, query: &str, headers: &HeaderMap) -> Response {
    let sent = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    if let Auth::Token(Some((user, password))) = &shared.auth
        && sent != Some(&basic(user, password))
    {
        return failure(
            StatusCode::UNAUTHORIZED,
            "UNAUTHORIZED",
            "wrong user name or password",
        );
    }
    let token = format!(
        "token-{}",
        shared.next_token.fetch_add(1, Ordering::Relaxed)
    );
    shared
        .shelf()
        .tokens
        .insert(token.clone(), query.to_owned());
    axum::Json(serde_json::json!({"token": token, "access_token": token, "expires_in": 300}))
        .into_response()
}

fn failure(status: StatusCode, code: &str, message: &str) -> Response {
    let body = serde_json::json!({"errors": [{"code": code, "message": message}]});
    (status, axum::Json(body)).into_response()
}

fn body(
    bytes: Bytes,
    media_type: &str,
    range: Option<&str>,
    faults: &[Fault],
    method: &Method,
) -> Response {
    let total = bytes.len();
    let no_ranges = faults.iter().any(|fault| matches!(fault, Fault::NoRanges));
    let digest = digest_of(&bytes);
    let mut response = Response::builder()
        .header(header::CONTENT_TYPE, media_type)
        .header(header::ACCEPT_RANGES, "bytes")
        .header("Docker-Content-Digest", digest);
    let mut part = bytes;
    if let Some(range) = range.filter(|_| !no_ranges) {
        match parse_range(range, total) {
            Some((from, to)) => {
                part = part.slice(from..to);
                response = response.status(StatusCode::PARTIAL_CONTENT).header(
                    header::CONTENT_RANGE,
                    format!("bytes {from}-{}/{total}", to.saturating_sub(1)),
                );
            }
            None => {
                return response
                    .status(StatusCode::RANGE_NOT_SATISFIABLE)
                    .header(header::CONTENT_RANGE, format!("bytes */{total}"))
                    .body(Body::empty())
                    .expect("a valid response");
            }
        }
    }
    let mut pace = None;
    let mut cut = None;
    for fault in faults {
        match fault {
            Fault::WrongBytes if !part.is_empty() => {
                let mut wrong = part.to_vec();
                wrong[0] ^= 0xff;
                part = wrong.into();
            }
            Fault::WrongLength(length) => {
                let mut wrong = part.to_vec();
                wrong.resize(*length, 0);
                part = wrong.into();
            }
            Fault::Truncate(after) => cut = Some((*after, false)),
            Fault::Stall(after) => cut = Some((*after, true)),
            Fault::Slow(each) => pace = Some(*each),
            _ => {}
        }
    }
    response = response.header(header::CONTENT_LENGTH, part.len());
    if method == Method::HEAD {
        return response.body(Body::empty()).expect("a valid response");
    }
    let body = match (cut, pace) {
        (None, None) => Body::from(part),
        (Some((after, stall)), _) => {
            let sent = part.slice(..after.min(part.len()));
            Body::from_stream(stream::unfold(Some(sent), move |state| async move {
                match state {
                    Some(sent) => Some((Ok(sent), None)),
                    None if stall => std::future::pending().await,
                    None => {
                        // What was sent must be on its way before the connection breaks.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        Some((Err(io::Error::other("cut off, as the test wishes")), None))
                    }
                }
            }))
        }
        (None, Some(each)) => Body::from_stream(stream::unfold(part, move |mut rest| async move {
            if rest.is_empty() {
                return None;
            }
            tokio::time::sleep(each).await;
            let chunk = rest.split_to(rest.len().min(64 << 10));
            Some((Ok::<_, io::Error>(chunk), rest))
        })),
    };
    response.body(body).expect("a valid response")
}

/// `bytes=A-B`, `bytes=A-` or `bytes=-N` as a half-open range within `total`.
fn parse_range(range: &str, total: usize) -> Option<(usize, usize)> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (from, to) = match (from, to) {
        ("", last) => (total.checked_sub(last.parse().ok()?)?, total),
        (from, "") => (from.parse().ok()?, total),
        (from, to) => (
            from.parse().ok()?,
            to.parse::<usize>().ok()?.checked_add(1)?.min(total),
        ),
    };
    (from < to && to <= total).then_some((from, to))
}

/// Pushes `image` as `name` (`repository:tag`) to any registry that takes uploads, at `url`.
pub async fn push_to(url: &str, name: &str, image: &Image) -> Result<()> {
    let client = reqwest::Client::new();
    let (repository, tag) = name.rsplit_once(':').unwrap_or((name, "latest"));
    for (digest, blob) in &image.blobs {
        let start = client
            .post(format!("{url}/v2/{repository}/blobs/uploads/"))
            .header(header::CONTENT_LENGTH, 0)
            .send()
            .await?
            .error_for_status()?;
        let location = start
            .headers()
            .get(header::LOCATION)
            .context("the registry names no upload location")?
            .to_str()?
            .to_owned();
        let location = if location.starts_with('/') {
            format!("{url}{location}")
        } else {
            location
        };
        let separator = if location.contains('?') { '&' } else { '?' };
        client
            .put(format!("{location}{separator}digest={digest}"))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(blob.clone())
            .send()
            .await?
            .error_for_status()?;
    }
    client
        .put(format!("{url}/v2/{repository}/manifests/{tag}"))
        .header(header::CONTENT_TYPE, image.media_type)
        .body(image.manifest.clone())
        .send()
        .await?
        .error_for_status()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_stay_within_the_blob() {
        let check = |range, expected| assert_eq!(parse_range(range, 10), expected, "{range}");
        check("bytes=0-3", Some((0, 4)));
        check("bytes=4-", Some((4, 10)));
        check("bytes=-3", Some((7, 10)));
        check("bytes=8-99", Some((8, 10)));
        check("bytes=10-", None);
        check("bytes=-11", None);
        check("bytes=x-", None);
        check("lines=1-2", None);
    }

    #[test]
    fn paths_name_what_is_asked() {
        assert!(matches!(parse("/v2/"), Some(Asked::Ping)));
        assert!(matches!(
            parse("/v2/a/b/manifests/1"),
            Some(Asked::Manifest("a/b", "1"))
        ));
        assert!(matches!(
            parse("/v2/a/blobs/sha256:00"),
            Some(Asked::Blob("sha256:00"))
        ));
        assert!(parse("/v1/").is_none());
    }
}
