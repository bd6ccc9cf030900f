//! The wire of registries: manifests and blobs of one repository, from whichever endpoint has them.
//!
//! ```text
//! Registries    clients and tokens, one per agent
//!   Repository  one pull's view: endpoints of its registry, credentials
//!     Rounds    the tries of one request (rounds.rs)
//! ```
//! Source: OCI distribution specification 1.1; distribution's token specification; RFC 9110.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::mpsc;

use super::auth::{AuthKey, Challenge, Grant, RegistryAuth, TokenCache, TokenKey, TokenReply};
use super::hosts::{Endpoint, HostsConfig, is_loopback};
use super::http::{Http, PROGRESS_BYTES, Stop, check_size, size_mismatch};
use super::rounds::{Failure, Rounds, Subject};
use crate::id::Digest;
use crate::image::error::ImageError;
use crate::image::manifest::{self, Descriptor};
use crate::image::reference::ImageRef;

const TOKEN_REPLY_MAX_BYTES: u64 = 1 << 20;
/// A basic grant is not a token; it only remembers which scheme a registry asked for.
const BASIC_GRANT_LASTS: Duration = Duration::from_secs(3600);

/// Connections and tokens of all registries, shared by all pulls.
pub(crate) struct Registries {
    hosts: HostsConfig,
    http: Arc<Http>,
    tokens: TokenCache,
}

/// A manifest as it came, with what is known about it.
#[derive(Debug, Clone)]
pub(crate) struct RawManifest {
    pub(crate) bytes: Bytes,
    pub(crate) digest: Digest,
    /// From Content-Type, for documents that do not name their type.
    pub(crate) media_type: Option<String>,
}

impl Registries {
    pub(crate) fn new(hosts: HostsConfig, http: Arc<Http>) -> Registries {
        Registries {
            hosts,
            http,
            tokens: TokenCache::default(),
        }
    }

    /// Returns `reference`'s repository as seen with `auth`; nothing is sent yet.
    pub(crate) fn repository(
        self: &Arc<Self>,
        reference: &ImageRef,
        auth: &RegistryAuth,
    ) -> Result<Repository, ImageError> {
        Ok(Repository {
            endpoints: self.hosts.endpoints(reference.registry())?,
            registries: Arc::clone(self),
            shown: reference.to_string(),
            registry: reference.registry().to_owned(),
            repository: reference.repository().to_owned(),
            auth: auth.clone(),
            auth_key: auth.key(),
            preferred: AtomicUsize::new(0),
        })
    }
}

/// One pull's view of a repository.
pub(crate) struct Repository {
    registries: Arc<Registries>,
    /// The reference, for errors.
    shown: String,
    registry: String,
    repository: String,
    auth: RegistryAuth,
    auth_key: AuthKey,
    /// Mirrors, then the registry itself; never empty.
    endpoints: Vec<Endpoint>,
    /// The endpoint that answered last: content is asked for where the manifest was.
    preferred: AtomicUsize,
}

/// One request below `/v2/<repository>/`.
struct Ask<'a> {
    method: Method,
    path: String,
    manifest: bool,
    offset: u64,
    subject: Subject<'a>,
}

impl Repository {
    fn http(&self) -> &Http {
        &self.registries.http
    }

    /// Asks which manifest `tag` means, without fetching it. `None` if the registry does not say.
    pub(crate) async fn tag_digest(&self, tag: &str) -> Result<Option<Digest>, ImageError> {
        let subject = self.subject("manifest", None);
        let ask = Ask {
            method: Method::HEAD,
            path: format!("manifests/{tag}"),
            manifest: true,
            offset: 0,
            subject,
        };
        let mut rounds = self.rounds(subject);
        loop {
            let index = rounds.next().await?;
            match self.try_ask(&self.endpoints[index], &ask).await {
                Ok(response) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(content_digest(response.headers()));
                }
                Err(failure) => rounds.failed(index, failure),
            }
        }
    }

    /// Fetches a manifest by tag or digest; its digest is verified.
    pub(crate) async fn manifest(
        &self,
        tag: &str,
        digest: Option<&Digest>,
    ) -> Result<RawManifest, ImageError> {
        let version = digest.map_or(tag, Digest::as_str);
        let what = format!("manifest {version}");
        let subject = self.subject(&what, None);
        let ask = Ask {
            method: Method::GET,
            path: format!("manifests/{version}"),
            manifest: true,
            offset: 0,
            subject,
        };
        let mut rounds = self.rounds(subject);
        loop {
            let index = rounds.next().await?;
            match self
                .try_manifest(&self.endpoints[index], &ask, digest)
                .await
            {
                Ok(manifest) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(manifest);
                }
                Err(failure) => rounds.failed(index, failure),
            }
        }
    }

    async fn try_manifest(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        digest: Option<&Digest>,
    ) -> Result<RawManifest, Failure> {
        let response = self.try_ask(endpoint, ask).await?;
        let named = digest
            .cloned()
            .or_else(|| content_digest(response.headers()));
        let media_type = response
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let media_type =
            media_type.map(|value| value.split(';').next().unwrap_or(value).trim().to_owned());
        let bytes = self
            .http()
            .read_all(response, manifest::MANIFEST_MAX_BYTES, ask.subject.what)
            .await?;
        let actual = Digest::of(&bytes);
        match named {
            Some(expected) if expected != actual => {
                Err(Failure::Wrong(Box::new(ImageError::DigestMismatch {
                    what: ask.subject.what.to_owned(),
                    expected,
                    actual,
                })))
            }
            _ => Ok(RawManifest {
                bytes,
                digest: actual,
                media_type,
            }),
        }
    }

    /// Fetches a whole blob into memory; size and digest are verified.
    pub(crate) async fn small_blob(
        &self,
        what: &str,
        descriptor: &Descriptor,
        limit_bytes: u64,
    ) -> Result<Bytes, ImageError> {
        if descriptor.size_bytes > limit_bytes {
            return Err(ImageError::TooLarge {
                what: what.to_owned(),
                limit_bytes,
            });
        }
        let subject = self.subject(what, Some(descriptor.size_bytes));
        let ask = self.blob_ask(&descriptor.digest, 0, subject);
        let mut rounds = self.rounds(subject);
        loop {
            let index = rounds.next().await?;
            match self
                .try_small_blob(&self.endpoints[index], &ask, descriptor)
                .await
            {
                Ok(bytes) => return Ok(bytes),
                Err(failure) => rounds.failed(index, failure),
            }
        }
    }

    async fn try_small_blob(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        descriptor: &Descriptor,
    ) -> Result<Bytes, Failure> {
        let response = self.try_ask(endpoint, ask).await?;
        let what = ask.subject.what;
        let size_bytes = descriptor.size_bytes;
        if let Some(length) = response.content_length() {
            check_size(what, size_bytes, length)?;
        }
        let bytes = match self.http().read_all(response, size_bytes, what).await {
            Err(Failure::Wrong(_)) => return Err(size_mismatch(what, size_bytes, size_bytes + 1)),
            read => read?,
        };
        check_size(what, size_bytes, bytes.len() as u64)?;
        let actual = Digest::of(&bytes);
        if actual != descriptor.digest {
            return Err(Failure::Wrong(Box::new(ImageError::DigestMismatch {
                what: what.to_owned(),
                expected: descriptor.digest.clone(),
                actual,
            })));
        }
        Ok(bytes)
    }

    /// Streams a blob from `offset` to its end into `out`, going on by range after a broken connection.
    ///
    /// The size is verified, the digest is the receiver's: only it has what came before `offset`.
    /// `on_progress` is told the place in the blob after each chunk.
    pub(crate) async fn stream_blob(
        &self,
        what: &str,
        descriptor: &Descriptor,
        offset: u64,
        out: &mpsc::Sender<Bytes>,
        on_progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), ImageError> {
        let subject = self.subject(what, Some(descriptor.size_bytes));
        let mut rounds = self.rounds(subject);
        let (mut at, mut rewarded_at) = (offset, offset);
        while at < descriptor.size_bytes {
            let index = rounds.next().await?;
            let ask = self.blob_ask(&descriptor.digest, at, subject);
            let copied = match self.try_ask(&self.endpoints[index], &ask).await {
                Ok(response) => {
                    self.http()
                        .copy(response, subject, &mut at, out, on_progress)
                        .await
                }
                // The registry has exactly what we have, which is not what was described.
                Err(Failure::Beyond) => {
                    Err(Stop::Failed(size_mismatch(what, descriptor.size_bytes, at)))
                }
                Err(failure) => Err(Stop::Failed(failure)),
            };
            match copied {
                Ok(()) => self.preferred.store(index, Ordering::Relaxed),
                Err(Stop::NobodyListens) => return Err(ImageError::Cancelled),
                Err(Stop::Failed(failure)) => rounds.failed(index, failure),
            }
            if at >= rewarded_at + PROGRESS_BYTES {
                rewarded_at = at;
                rounds.progressed();
            }
        }
        Ok(())
    }

    fn subject<'a>(&'a self, what: &'a str, size_bytes: Option<u64>) -> Subject<'a> {
        Subject {
            host: &self.registry,
            reference: &self.shown,
            what,
            size_bytes,
        }
    }

    fn rounds<'a>(&'a self, subject: Subject<'a>) -> Rounds<'a> {
        Rounds::new(
            &self.endpoints,
            self.preferred.load(Ordering::Relaxed),
            self.http().timing(),
            subject,
        )
    }

    fn blob_ask<'a>(&self, digest: &Digest, offset: u64, subject: Subject<'a>) -> Ask<'a> {
        Ask {
            method: Method::GET,
            path: format!("blobs/{digest}"),
            manifest: false,
            offset,
            subject,
        }
    }

    /// Asks one endpoint once, after proving who we are if it wants to know.
    async fn try_ask(&self, endpoint: &Endpoint, ask: &Ask<'_>) -> Result<Response, Failure> {
        let client = self.http().client(endpoint).await?;
        let url = format!("{}/v2/{}/{}", endpoint.base(), self.repository, ask.path);
        let key = TokenKey {
            endpoint: endpoint.base(),
            repository: self.repository.clone(),
            auth: if endpoint.trusted {
                self.auth_key
            } else {
                RegistryAuth::Anonymous.key()
            },
        };
        let auth = if endpoint.trusted {
            &self.auth
        } else {
            &RegistryAuth::Anonymous
        };
        let mut grant = match auth {
            RegistryAuth::Bearer { token } => Some(Grant::Bearer(token.clone())),
            _ => self.registries.tokens.get(&key),
        };
        let mut renewed = false;
        loop {
            let mut request = client.request(ask.method.clone(), &url);
            if ask.manifest {
                request = request.header(header::ACCEPT, manifest::ACCEPT);
            } else {
                // Bytes as they are: a transfer encoding would break size and digest.
                request = request.header(header::ACCEPT_ENCODING, "identity");
            }
            if ask.offset > 0 {
                request = request.header(header::RANGE, format!("bytes={}-", ask.offset));
            }
            let response = self
                .http()
                .send(authorize(request, grant.as_ref(), auth))
                .await?;
            let asked_us =
                response.status() == StatusCode::UNAUTHORIZED && same_place(response.url(), &url);
            if !asked_us || renewed {
                return self.http().check_status(response).await;
            }
            if let Some(refused) = &grant {
                self.registries.tokens.forget(&key, refused);
            }
            let Some(challenge) = challenge_of(&response) else {
                return self.http().check_status(response).await;
            };
            let (renewed_grant, lasts) = match challenge {
                Challenge::Basic => match auth {
                    RegistryAuth::Basic { .. } => (Grant::Basic, BASIC_GRANT_LASTS),
                    _ => {
                        return Err(Failure::Refused(
                            "it wants a user and a password".to_owned(),
                        ));
                    }
                },
                // A token given by the caller can't be renewed.
                Challenge::Bearer { .. } if matches!(auth, RegistryAuth::Bearer { .. }) => {
                    return self.http().check_status(response).await;
                }
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                } => {
                    let scope =
                        scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                    self.fetch_token(endpoint, auth, &realm, service.as_deref(), &scope)
                        .await?
                }
            };
            self.registries
                .tokens
                .put(key.clone(), renewed_grant.clone(), lasts);
            grant = Some(renewed_grant);
            renewed = true;
        }
    }

    async fn fetch_token(
        &self,
        endpoint: &Endpoint,
        auth: &RegistryAuth,
        realm: &str,
        service: Option<&str>,
        scope: &str,
    ) -> Result<(Grant, Duration), Failure> {
        let url = Url::parse(realm)
            .map_err(|_| Failure::Odd(format!("its token server `{realm}` is not a URL")))?;
        let client = self.token_client(endpoint, &url).await?;
        let mut params = vec![("scope", scope)];
        params.extend(service.map(|service| ("service", service)));
        let request = match auth {
            RegistryAuth::Identity { token } => {
                params.push(("grant_type", "refresh_token"));
                params.push(("client_id", "longshore"));
                params.push(("refresh_token", token.reveal()));
                let body = form(&params);
                client
                    .post(url)
                    .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(body)
            }
            _ => {
                let mut url = url;
                url.query_pairs_mut().extend_pairs(&params);
                authorize(client.get(url), Some(&Grant::Basic), auth)
            }
        };
        let response = self.http().send(request).await?;
        let response = match self.http().check_status(response).await {
            Ok(response) => response,
            Err(Failure::Missing) => {
                return Err(Failure::Odd("its token server does not exist".to_owned()));
            }
            Err(failure) => return Err(failure),
        };
        let bytes = self
            .http()
            .read_all(response, TOKEN_REPLY_MAX_BYTES, "token")
            .await?;
        // The decoder's own message may quote the token.
        let reply: TokenReply = serde_json::from_slice(&bytes)
            .map_err(|_| Failure::Odd("its token server's answer is not a token".to_owned()))?;
        let (token, lasts) = reply
            .into_token()
            .ok_or_else(|| Failure::Odd("its token server gave no token".to_owned()))?;
        Ok((Grant::Bearer(token), lasts))
    }

    /// Returns the client for a token server, which is configured like any other host.
    async fn token_client(
        &self,
        endpoint: &Endpoint,
        url: &Url,
    ) -> Result<reqwest::Client, Failure> {
        let authority = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (Some(host), None) => host.to_owned(),
            (None, _) => return Err(Failure::Odd("its token server has no host".to_owned())),
        };
        let refuse = |reason: &str| {
            Err(Failure::Odd(format!(
                "its token server {authority} {reason}"
            )))
        };
        if is_loopback(&authority) && !endpoint.is_loopback() {
            return refuse("is a loopback address");
        }
        if authority == endpoint.authority && url.scheme() == endpoint.scheme {
            return self.http().client(endpoint).await;
        }
        let configured = self
            .registries
            .hosts
            .endpoints(&authority)
            .ok()
            .and_then(|mut found| found.pop());
        let Some(place) = configured else {
            return refuse("is not a valid host");
        };
        if url.scheme() != "https" && place.scheme != "http" {
            return refuse("speaks plain HTTP, which only its own table in image.hosts can allow");
        }
        self.http().client(&place).await
    }
}

fn authorize(
    request: RequestBuilder,
    grant: Option<&Grant>,
    auth: &RegistryAuth,
) -> RequestBuilder {
    match (grant, auth) {
        (Some(Grant::Bearer(token)), _) => {
            match HeaderValue::from_str(&format!("Bearer {}", token.reveal())) {
                Ok(mut value) => {
                    value.set_sensitive(true);
                    request.header(header::AUTHORIZATION, value)
                }
                // A token with line breaks is no token; without it the registry says what it wants.
                Err(_) => request,
            }
        }
        (Some(Grant::Basic), RegistryAuth::Basic { username, password }) => {
            request.basic_auth(username, Some(password.reveal()))
        }
        _ => request,
    }
}

fn form(params: &[(&str, &str)]) -> String {
    let mut url = Url::parse("http://form/").expect("a constant URL is valid");
    url.query_pairs_mut().extend_pairs(params);
    url.query().unwrap_or_default().to_owned()
}

fn challenge_of(response: &Response) -> Option<Challenge> {
    let values = response.headers().get_all(header::WWW_AUTHENTICATE);
    Challenge::parse(values.iter().filter_map(|value| value.to_str().ok()))
}

/// Tells whether an answer came from where we asked, and not from where that sent us.
fn same_place(answered: &Url, asked: &str) -> bool {
    Url::parse(asked).is_ok_and(|asked| {
        asked.host() == answered.host()
            && asked.port_or_known_default() == answered.port_or_known_default()
    })
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    headers
        .get("docker-content-digest")?
        .to_str()
        .ok()?
        .parse()
        .ok()
}
