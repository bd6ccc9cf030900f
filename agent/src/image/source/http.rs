//! HTTP as it is spoken to registries and to servers of images: connections, statuses, bodies, and
//! the time limits of each.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{self, HeaderMap};
use reqwest::redirect::Policy;
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::hosts::{Endpoint, is_loopback};
use super::rounds::{Failure, Subject, Timing};
use crate::image::error::ImageError;

const USER_AGENT: &str = concat!("longshore/", env!("CARGO_PKG_VERSION"));
const ERROR_BODY_MAX_BYTES: u64 = 16 << 10;
const REDIRECTS_MAX: usize = 5;
/// Progress that earns a new set of tries: enough that a server can't keep us busy with crumbs.
pub(crate) const PROGRESS_BYTES: u64 = 1 << 20;

/// Connections to all servers, shared by all pulls.
pub(crate) struct Http {
    timing: Timing,
    clients: Mutex<HashMap<ClientKey, reqwest::Client>>,
}

/// What a client is made for; tokens and connections of one host are never used for another.
#[derive(Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    authority: String,
    ca: Option<PathBuf>,
    skip_verify: bool,
}

impl Http {
    pub(crate) fn new(timing: Timing) -> Http {
        Http {
            timing,
            clients: Mutex::default(),
        }
    }

    pub(crate) fn timing(&self) -> Timing {
        self.timing
    }

    pub(crate) async fn client(&self, endpoint: &Endpoint) -> Result<reqwest::Client, Failure> {
        let key = ClientKey {
            authority: endpoint.authority.clone(),
            ca: endpoint.ca.clone(),
            skip_verify: endpoint.skip_verify,
        };
        if let Some(client) = self
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
        {
            return Ok(client.clone());
        }
        // Reads certificates from disk.
        let (endpoint, connect) = (endpoint.clone(), self.timing.connect);
        let client =
            crate::blocking::run("prepare TLS", move || build_client(&endpoint, connect)).await?;
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(clients.entry(key).or_insert(client).clone())
    }

    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        match tokio::time::timeout(self.timing.stall, request.send()).await {
            Err(_) => Err(Failure::Stalled),
            Ok(Err(error)) => Err(classify(error)),
            Ok(Ok(response)) => Ok(response),
        }
    }

    pub(crate) async fn check_status(&self, response: Response) -> Result<Response, Failure> {
        let status = response.status();
        if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
            return Ok(response);
        }
        match status {
            StatusCode::NOT_FOUND => return Err(Failure::Missing),
            StatusCode::RANGE_NOT_SATISFIABLE => return Err(Failure::Beyond),
            StatusCode::TOO_MANY_REQUESTS => {
                return Err(Failure::Busy(retry_after(response.headers())));
            }
            _ => {}
        }
        let after = retry_after(response.headers());
        let reason = self.error_text(response).await;
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Refused(reason),
            StatusCode::SERVICE_UNAVAILABLE if after.is_some() => Failure::Busy(after),
            StatusCode::REQUEST_TIMEOUT => Failure::Unreachable(reason),
            status if status.is_server_error() => Failure::Unreachable(reason),
            _ => Failure::Odd(reason),
        })
    }

    /// Returns the status and, where the body is a registry's error document, its first message.
    async fn error_text(&self, response: Response) -> String {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<OneError>,
        }
        #[derive(Deserialize)]
        struct OneError {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let status = format!("HTTP {}", response.status());
        let Ok(body) = self.read_all(response, ERROR_BODY_MAX_BYTES, "error").await else {
            return status;
        };
        let Ok(errors) = serde_json::from_slice::<Errors>(&body) else {
            return status;
        };
        let Some(OneError { code, message }) = errors.errors.into_iter().next() else {
            return status;
        };
        let text: String = format!("{code} {message}")
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        format!("{status}: {}", text.trim())
    }

    pub(crate) async fn read_all(
        &self,
        mut response: Response,
        limit_bytes: u64,
        what: &str,
    ) -> Result<Bytes, Failure> {
        let too_large = || {
            let what = what.to_owned();
            Failure::Wrong(Box::new(ImageError::TooLarge { what, limit_bytes }))
        };
        let announced = response.content_length();
        if announced.is_some_and(|length| length > limit_bytes) {
            return Err(too_large());
        }
        let mut bytes = Vec::with_capacity(
            announced
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or_default(),
        );
        while let Some(chunk) = self.chunk(&mut response).await? {
            if (bytes.len() + chunk.len()) as u64 > limit_bytes {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }

    async fn chunk(&self, response: &mut Response) -> Result<Option<Bytes>, Failure> {
        match tokio::time::timeout(self.timing.stall, response.chunk()).await {
            Err(_) => Err(Failure::Stalled),
            Ok(Err(error)) => Err(classify(error)),
            Ok(Ok(chunk)) => Ok(chunk),
        }
    }

    /// Copies the body of an answer to a request from `at` on, and moves `at` with it.
    pub(crate) async fn copy(
        &self,
        mut response: Response,
        subject: Subject<'_>,
        at: &mut u64,
        out: &mpsc::Sender<Bytes>,
        on_progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Stop> {
        let (what, size_bytes) = (subject.what, subject.size_bytes.unwrap_or_default());
        let begins_at = body_begins_at(&response, *at)?;
        if let Some(length) = response.content_length() {
            check_size(what, size_bytes, begins_at + length)?;
        }
        // A server without ranges sends all of it again.
        let mut skip = *at - begins_at;
        loop {
            let Some(mut chunk) = self.chunk(&mut response).await? else {
                return if *at == size_bytes {
                    Ok(())
                } else {
                    Err(Stop::Failed(Failure::Short(*at)))
                };
            };
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            let _ = chunk.split_to(usize::try_from(skipped).unwrap_or(usize::MAX));
            if chunk.is_empty() {
                continue;
            }
            let end = *at + chunk.len() as u64;
            if end > size_bytes {
                return Err(Stop::Failed(size_mismatch(what, size_bytes, end)));
            }
            out.send(chunk).await.map_err(|_| Stop::NobodyListens)?;
            *at = end;
            on_progress(end);
            if *at == size_bytes && response.content_length().is_some() {
                return Ok(());
            }
        }
    }
}

/// Why copying a body ended early.
pub(crate) enum Stop {
    NobodyListens,
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failed(failure)
    }
}

fn build_client(endpoint: &Endpoint, connect: Duration) -> Result<reqwest::Client, Failure> {
    let mut builder = reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(connect)
        .tcp_nodelay(true)
        .redirect(Policy::custom(redirect));
    if endpoint.is_loopback() {
        builder = builder.no_proxy();
    }
    if let Some(path) = &endpoint.ca {
        let refuse = |reason: String| Failure::Tls(format!("ca {}: {reason}", path.display()));
        let pem = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
        let certificates =
            reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| refuse(chain(&error)))?;
        if certificates.is_empty() {
            return Err(refuse("no certificate in it".to_owned()));
        }
        builder = builder.tls_certs_merge(certificates);
    }
    if endpoint.skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    builder.build().map_err(|error| Failure::Tls(chain(&error)))
}

/// Registries send blobs elsewhere (reqwest drops credentials on the way to another host); none has
/// a reason to leave TLS, or to send a stranger's client to this machine's own services.
fn redirect(attempt: reqwest::redirect::Attempt<'_>) -> reqwest::redirect::Action {
    if attempt.previous().len() > REDIRECTS_MAX {
        return attempt.error("too many redirects");
    }
    let Some(from) = attempt.previous().last() else {
        return attempt.follow();
    };
    if from.scheme() == "https" && attempt.url().scheme() != "https" {
        return attempt.error("redirect from https to http");
    }
    if url_is_loopback(attempt.url()) && !url_is_loopback(from) {
        return attempt.error("redirect to a loopback address");
    }
    attempt.follow()
}

fn url_is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(is_loopback)
}

/// Seconds or, rarely, a date, which is not worth a calendar: it counts as not said.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers
        .get(header::RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
        .map(Duration::from_secs)
}

/// Returns the place in the blob at which the body begins: 0, or the offset that we asked for.
fn body_begins_at(response: &Response, asked: u64) -> Result<u64, Failure> {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Ok(0);
    }
    let range = response
        .headers()
        .get(header::CONTENT_RANGE)
        .and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| {
        range
            .strip_prefix("bytes ")?
            .split('-')
            .next()?
            .trim()
            .parse::<u64>()
            .ok()
    });
    match start {
        Some(start) if start == asked => Ok(asked),
        _ => Err(Failure::Odd(
            "it sent another range than we asked for".to_owned(),
        )),
    }
}

pub(crate) fn check_size(
    what: &str,
    expected_bytes: u64,
    actual_bytes: u64,
) -> Result<(), Failure> {
    if expected_bytes == actual_bytes {
        return Ok(());
    }
    Err(size_mismatch(what, expected_bytes, actual_bytes))
}

pub(crate) fn size_mismatch(what: &str, expected_bytes: u64, actual_bytes: u64) -> Failure {
    Failure::Wrong(Box::new(ImageError::SizeMismatch {
        what: what.to_owned(),
        expected_bytes,
        actual_bytes,
    }))
}

/// Sorts a client error; URLs are left out, since signed ones are secrets.
fn classify(error: reqwest::Error) -> Failure {
    let error = error.without_url();
    if let Some(reason) = tls_reason(&error) {
        return Failure::Tls(reason);
    }
    if error.is_redirect() || error.is_builder() {
        return Failure::Odd(chain(&error));
    }
    Failure::Unreachable(chain(&error))
}

fn tls_reason(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls.to_string());
        }
        // An io::Error keeps what it carries out of its own source chain.
        let carried = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        if let Some(reason) = carried.and_then(|carried| tls_reason(carried)) {
            return Some(reason);
        }
        next = error.source();
    }
    None
}

/// Returns the last two causes, which say it all: `tcp connect error: Connection refused`.
fn chain(error: &dyn std::error::Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        if texts.last().is_none_or(|last| !last.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    let from = texts.len().saturating_sub(2);
    texts[from..].join(": ")
}
