//! A server of images: files below one URL, by HTTP.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use reqwest::header;
use reqwest::{Method, Response, StatusCode, Url};
use tokio::sync::mpsc;

use super::hosts::{Endpoint, HostsConfig};
use super::http::{Http, PROGRESS_BYTES, Stop, size_mismatch};
use super::rounds::{Failure, Rounds, Subject};
use crate::id::Digest;
use crate::image::error::ImageError;

/// Documents that are remembered, and how large one may be: an index is worth its memory, as it
/// spares the next caller all of it.
const REMEMBERED_MAX: usize = 4;
const REMEMBERED_MAX_BYTES: usize = 4 << 20;

/// One server; it remembers its index.
pub(crate) struct Server {
    http: Arc<Http>,
    url: Url,
    /// The one place to ask.
    endpoints: [Endpoint; 1],
    remembered: Mutex<HashMap<String, Remembered>>,
}

/// A document with what makes the next request for it cheap.
#[derive(Clone)]
struct Remembered {
    etag: header::HeaderValue,
    bytes: Bytes,
}

impl Server {
    /// Returns the server at `url`, spoken to as `hosts` has it for its host.
    ///
    /// # Errors
    /// What is wrong with the URL.
    pub(crate) fn new(http: Arc<Http>, url: &str, hosts: &HostsConfig) -> Result<Server, String> {
        let parsed = Url::parse(url).map_err(|error| format!("url `{url}`: {error}"))?;
        let plain = parsed.query().is_none()
            && parsed.fragment().is_none()
            && parsed.username().is_empty()
            && parsed.password().is_none();
        if !plain || !parsed.has_host() {
            return Err(format!("url `{url}` is not https://host[:port][/path]"));
        }
        let endpoint = hosts.endpoint_of(&parsed)?;
        Ok(Server {
            http,
            url: parsed,
            endpoints: [endpoint],
            remembered: Mutex::default(),
        })
    }

    /// Returns the name of the host, for errors.
    pub(crate) fn host(&self) -> &str {
        &self.endpoints[0].authority
    }

    /// Returns the URL of a file, by its path from the top of the server.
    ///
    /// # Errors
    /// `Malformed` for a path that leads elsewhere.
    pub(crate) fn url(&self, path: &str) -> Result<Url, ImageError> {
        let words: Vec<&str> = path.split('/').filter(|word| !word.is_empty()).collect();
        let plain =
            |word: &&str| !matches!(*word, "." | "..") && !word.chars().any(char::is_control);
        if words.is_empty() || path.len() > 1024 || !words.iter().all(plain) {
            return Err(ImageError::Malformed {
                what: format!("a path of server {}", self.host()),
                reason: format!(
                    "`{}` leads elsewhere",
                    path.chars()
                        .filter(|c| !c.is_control())
                        .take(80)
                        .collect::<String>()
                ),
            });
        }
        let mut url = self.url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(words);
        }
        Ok(url)
    }

    /// Fetches a document whose digest nobody knows; `None` if it is not there. What an earlier
    /// call got is taken again if the server says that it is still the same.
    ///
    /// # Errors
    /// Of the wire, `TooLarge`, `Malformed` for the path.
    pub(crate) async fn document(
        &self,
        path: &str,
        limit_bytes: u64,
    ) -> Result<Option<Bytes>, ImageError> {
        let url = self.url(path)?;
        let shown = url.to_string();
        let subject = self.subject(&shown, None);
        let mut rounds = self.rounds(subject);
        loop {
            let index = rounds.next().await;
            let index = match index {
                Err(ImageError::NotFound { .. }) => return Ok(None),
                other => other?,
            };
            match self.try_document(&url, path, limit_bytes, &shown).await {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(failure) => rounds.failed(index, failure),
            }
        }
    }

    async fn try_document(
        &self,
        url: &Url,
        path: &str,
        limit_bytes: u64,
        shown: &str,
    ) -> Result<Bytes, Failure> {
        let known = self.remembered().get(path).cloned();
        let client = self.http.client(&self.endpoints[0]).await?;
        let mut request = client.get(url.clone());
        if let Some(known) = &known {
            request = request.header(header::IF_NONE_MATCH, known.etag.clone());
        }
        let response = self.http.send(request).await?;
        if let (StatusCode::NOT_MODIFIED, Some(known)) = (response.status(), known) {
            return Ok(known.bytes);
        }
        let response = self.http.check_status(response).await?;
        let etag = response.headers().get(header::ETAG).cloned();
        let bytes = self.http.read_all(response, limit_bytes, shown).await?;
        let mut remembered = self.remembered();
        remembered.remove(path);
        if let Some(etag) = etag
            && bytes.len() <= REMEMBERED_MAX_BYTES
            && remembered.len() < REMEMBERED_MAX
        {
            let bytes = bytes.clone();
            remembered.insert(path.to_owned(), Remembered { etag, bytes });
        }
        drop(remembered);
        Ok(bytes)
    }

    fn remembered(&self) -> MutexGuard<'_, HashMap<String, Remembered>> {
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all documents, so that the next call gets them anew.
    pub(crate) fn forget(&self) {
        self.remembered().clear();
    }

    /// Asks how large a file is, which a server of files knows.
    ///
    /// # Errors
    /// Of the wire; `UnexpectedAnswer` if it does not say.
    pub(crate) async fn size(&self, path: &str) -> Result<u64, ImageError> {
        let url = self.url(path)?;
        let shown = url.to_string();
        let mut rounds = self.rounds(self.subject(&shown, None));
        loop {
            let index = rounds.next().await?;
            let tried = match self.ask(Method::HEAD, &url, 0).await {
                // A HEAD's own body is empty, so the header is what counts.
                Ok(response) => response
                    .headers()
                    .get(header::CONTENT_LENGTH)
                    .and_then(|value| value.to_str().ok()?.parse().ok())
                    .ok_or_else(|| {
                        Failure::Odd("it does not say how large the file is".to_owned())
                    }),
                Err(failure) => Err(failure),
            };
            match tried {
                Ok(size) => return Ok(size),
                Err(failure) => rounds.failed(index, failure),
            }
        }
    }

    /// Fetches a small file into memory; its size is verified, and its digest if one is known.
    ///
    /// # Errors
    /// Of the wire, `TooLarge`, `SizeMismatch`, `DigestMismatch`.
    pub(crate) async fn small_file(
        &self,
        path: &str,
        size_bytes: u64,
        digest: Option<&Digest>,
        limit_bytes: u64,
    ) -> Result<Bytes, ImageError> {
        let what = self.url(path)?.to_string();
        if size_bytes > limit_bytes {
            return Err(ImageError::TooLarge { what, limit_bytes });
        }
        let Some(bytes) = self.document_once(path, size_bytes).await? else {
            return Err(ImageError::NotFound {
                reference: what,
                host: self.host().to_owned(),
            });
        };
        if bytes.len() as u64 != size_bytes {
            return Err(ImageError::SizeMismatch {
                what,
                expected_bytes: size_bytes,
                actual_bytes: bytes.len() as u64,
            });
        }
        let actual = Digest::of(&bytes);
        match digest {
            Some(expected) if *expected != actual => Err(ImageError::DigestMismatch {
                what,
                expected: expected.clone(),
                actual,
            }),
            _ => Ok(bytes),
        }
    }

    /// A document that is not remembered; one that is too long is of the wrong size.
    async fn document_once(
        &self,
        path: &str,
        size_bytes: u64,
    ) -> Result<Option<Bytes>, ImageError> {
        let url = self.url(path)?;
        let shown = url.to_string();
        let mut rounds = self.rounds(self.subject(&shown, Some(size_bytes)));
        loop {
            let index = match rounds.next().await {
                Err(ImageError::NotFound { .. }) => return Ok(None),
                other => other?,
            };
            let read = match self.ask(Method::GET, &url, 0).await {
                Ok(response) => self.http.read_all(response, size_bytes, &shown).await,
                Err(failure) => Err(failure),
            };
            match read {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(Failure::Wrong(_)) => {
                    rounds.failed(index, size_mismatch(&shown, size_bytes, size_bytes + 1));
                }
                Err(failure) => rounds.failed(index, failure),
            }
        }
    }

    /// Streams a file from `offset` to its end into `out`, going on by range after a broken
    /// connection. The size is verified, the digest is the receiver's.
    ///
    /// # Errors
    /// Of the wire, `SizeMismatch`, `Cancelled` when nobody listens.
    pub(crate) async fn stream(
        &self,
        path: &str,
        size_bytes: u64,
        offset: u64,
        out: &mpsc::Sender<Bytes>,
        on_progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), ImageError> {
        let url = self.url(path)?;
        let shown = url.to_string();
        let subject = self.subject(&shown, Some(size_bytes));
        let mut rounds = self.rounds(subject);
        let (mut at, mut rewarded_at) = (offset, offset);
        while at < size_bytes {
            let index = rounds.next().await?;
            let copied = match self.ask(Method::GET, &url, at).await {
                Ok(response) => {
                    let copy = self.http.copy(response, subject, &mut at, out, on_progress);
                    copy.await
                }
                // It has exactly what we have, which is not what was described.
                Err(Failure::Beyond) => Err(Stop::Failed(size_mismatch(&shown, size_bytes, at))),
                Err(failure) => Err(Stop::Failed(failure)),
            };
            match copied {
                Ok(()) => {}
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

    async fn ask(&self, method: Method, url: &Url, offset: u64) -> Result<Response, Failure> {
        let client = self.http.client(&self.endpoints[0]).await?;
        let mut request = client
            .request(method, url.clone())
            .header(header::ACCEPT_ENCODING, "identity");
        if offset > 0 {
            request = request.header(header::RANGE, format!("bytes={offset}-"));
        }
        let response = self.http.send(request).await?;
        self.http.check_status(response).await
    }

    fn subject<'a>(&'a self, what: &'a str, size_bytes: Option<u64>) -> Subject<'a> {
        Subject {
            host: self.host(),
            reference: what,
            what,
            size_bytes,
        }
    }

    fn rounds<'a>(&'a self, subject: Subject<'a>) -> Rounds<'a> {
        Rounds::new(&self.endpoints, 0, self.http.timing(), subject)
    }
}
