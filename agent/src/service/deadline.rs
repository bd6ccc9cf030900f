//! The caller's deadline at the edge: what takes longer is told so, in gRPC's words.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, Request, Response};
use tonic::Status;
use tower::{Layer, Service};

/// Reads `grpc-timeout`; a malformed one is none, as for the transport.
///
/// Source: gRPC over HTTP2, "Timeout".
pub(super) fn wished(headers: &HeaderMap) -> Option<Duration> {
    parse(headers.get("grpc-timeout")?.to_str().ok()?)
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number = digits.parse::<u64>().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Answers `DeadlineExceeded` when the caller's time is up. The transport around it would say
/// `Cancelled`, and sometimes be faster than the caller's own clock; it looks at its timer only
/// after what is inside of it, so that this one is heard first.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited(inner)
    }
}

/// A service within its callers' deadlines.
#[derive(Clone, Debug)]
pub(super) struct Limited<S>(S);

impl<S, B, R> Service<Request<B>> for Limited<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    R: Default,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The timer starts here, before that of the transport.
        let time = wished(request.headers()).map(tokio::time::sleep);
        let answer = self.0.call(request);
        Box::pin(async move {
            let Some(time) = time else {
                return answer.await;
            };
            // Dropping the answer is what the caller's own leaving would do.
            tokio::select! {
                biased;
                answer = answer => answer,
                () = time => Ok(Status::deadline_exceeded("the caller's deadline passed").into_http()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn timeouts_are_read_as_the_protocol_has_them() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("99999999m", Some(Duration::from_millis(99_999_999))),
            ("5u", Some(Duration::from_micros(5))),
            ("0n", Some(Duration::ZERO)),
            ("999999999m", None),
            ("", None),
            ("m", None),
            ("-1S", None),
            ("1x", None),
            ("1é", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[tokio::test]
    async fn a_passed_deadline_is_not_a_cancellation() {
        let never = tower::service_fn(|_: Request<()>| {
            std::future::pending::<Result<Response<String>, Infallible>>()
        });
        let request = Request::builder()
            .header("grpc-timeout", "1m")
            .body(())
            .expect("valid");
        let Ok(response) = DeadlineLayer.layer(never).call(request).await;
        let status = Status::from_header_map(response.headers()).expect("a status");
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
    }
}
