//! What a client and we agree on before a connection is upgraded. Pure.

use http::{HeaderMap, HeaderName, StatusCode, header};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{remote_command::ErrorStyle, websocket::Coding};

/// The header in which SPDY clients say what they speak.
const PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// What we speak, for a client that speaks nothing of it.
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

const COMMAND_SPDY: [(&str, ErrorStyle); 4] = [
    ("v4.channel.k8s.io", ErrorStyle::Status),
    ("v3.channel.k8s.io", ErrorStyle::Text),
    ("v2.channel.k8s.io", ErrorStyle::Text),
    ("channel.k8s.io", ErrorStyle::Text),
];

const COMMAND_WEBSOCKET: [(&str, (Coding, ErrorStyle)); 6] = [
    ("", (Coding::Binary, ErrorStyle::Text)),
    ("channel.k8s.io", (Coding::Binary, ErrorStyle::Text)),
    ("base64.channel.k8s.io", (Coding::Base64, ErrorStyle::Text)),
    ("v4.channel.k8s.io", (Coding::Binary, ErrorStyle::Status)),
    (
        "v4.base64.channel.k8s.io",
        (Coding::Base64, ErrorStyle::Status),
    ),
    (
        "v5.channel.k8s.io",
        (Coding::BinaryHalfClose, ErrorStyle::Status),
    ),
];

const FORWARD_SPDY: [(&str, ()); 1] = [("portforward.k8s.io", ())];

const FORWARD_WEBSOCKET: [(&str, Forward); 6] = [
    ("SPDY/3.1+portforward.k8s.io", Forward::Tunnel),
    ("", Forward::Channels(Coding::Binary)),
    ("channel.k8s.io", Forward::Channels(Coding::Binary)),
    ("base64.channel.k8s.io", Forward::Channels(Coding::Base64)),
    ("v4.channel.k8s.io", Forward::Channels(Coding::Binary)),
    (
        "v4.base64.channel.k8s.io",
        Forward::Channels(Coding::Base64),
    ),
];

/// How ports are forwarded over WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forward {
    /// As a SPDY connection inside.
    Tunnel,
    /// On two channels for each port.
    Channels(Coding),
}

/// What is agreed, by the protocol that carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreed<S, W> {
    /// SPDY/3.1.
    Spdy(S),
    /// WebSocket.
    WebSocket(W),
}

/// Why a client is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) text: &'static str,
    /// Said beside.
    pub(super) header: Option<(HeaderName, String)>,
}

/// How commands are served.
pub(super) type AgreedCommand = Agreed<ErrorStyle, (Coding, ErrorStyle)>;
/// How ports are forwarded.
pub(super) type AgreedForward = Agreed<(), Forward>;

/// Headers of the answer that upgrades the connection.
pub(super) type Answer = Vec<(HeaderName, String)>;

/// Agrees on how a command is served.
pub(super) fn command(headers: &HeaderMap) -> Result<(AgreedCommand, Answer), Refusal> {
    agree(headers, &COMMAND_SPDY, &COMMAND_WEBSOCKET)
}

/// Agrees on how ports are forwarded.
pub(super) fn port_forward(headers: &HeaderMap) -> Result<(AgreedForward, Answer), Refusal> {
    agree(headers, &FORWARD_SPDY, &FORWARD_WEBSOCKET)
}

fn agree<S: Copy, W: Copy>(
    headers: &HeaderMap,
    spdy: &[(&str, S)],
    websocket: &[(&str, W)],
) -> Result<(Agreed<S, W>, Answer), Refusal> {
    let upgrades =
        words(headers, &header::CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade"));
    let wish = words(headers, &header::UPGRADE)
        .next()
        .filter(|_| upgrades)
        .map(str::to_ascii_lowercase);
    match wish.as_deref() {
        Some("spdy/3.1") => {
            agree_spdy(headers, spdy).map(|(agreed, answer)| (Agreed::Spdy(agreed), answer))
        }
        Some("websocket") => agree_websocket(headers, websocket)
            .map(|(agreed, answer)| (Agreed::WebSocket(agreed), answer)),
        _ => Err(refuse(
            StatusCode::BAD_REQUEST,
            "unable to upgrade: the request has to ask for SPDY/3.1 or websocket",
        )),
    }
}

fn agree_spdy<S: Copy>(headers: &HeaderMap, ours: &[(&str, S)]) -> Result<(S, Answer), Refusal> {
    let mut asked = words(headers, &PROTOCOL).peekable();
    if asked.peek().is_none() {
        return Err(refuse(
            StatusCode::BAD_REQUEST,
            "unable to upgrade: X-Stream-Protocol-Version is required",
        ));
    }
    let Some((name, agreed)) = first_of(asked, ours) else {
        let names: Vec<_> = ours.iter().map(|(name, _)| *name).collect();
        return Err(Refusal {
            header: Some((ACCEPTED, names.join(", "))),
            ..refuse(
                StatusCode::FORBIDDEN,
                "unable to upgrade: unknown protocol version",
            )
        });
    };
    let answer = vec![
        (header::CONNECTION, "Upgrade".into()),
        (header::UPGRADE, "SPDY/3.1".into()),
        (PROTOCOL, name.into()),
    ];
    Ok((agreed, answer))
}

fn agree_websocket<W: Copy>(
    headers: &HeaderMap,
    ours: &[(&str, W)],
) -> Result<(W, Answer), Refusal> {
    if words(headers, &header::SEC_WEBSOCKET_VERSION).next() != Some("13") {
        return Err(Refusal {
            header: Some((header::SEC_WEBSOCKET_VERSION, "13".into())),
            ..refuse(
                StatusCode::BAD_REQUEST,
                "unable to upgrade: unknown WebSocket version",
            )
        });
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).ok_or(refuse(
        StatusCode::BAD_REQUEST,
        "unable to upgrade: Sec-WebSocket-Key is required",
    ))?;
    let mut answer = vec![
        (header::CONNECTION, "Upgrade".into()),
        (header::UPGRADE, "websocket".into()),
        (
            header::SEC_WEBSOCKET_ACCEPT,
            derive_accept_key(key.as_bytes()),
        ),
    ];
    let mut asked = words(headers, &header::SEC_WEBSOCKET_PROTOCOL).peekable();
    // Who asks for none gets what needs no name.
    let found = if asked.peek().is_none() {
        first_of(std::iter::once(""), ours)
    } else {
        first_of(asked, ours)
    };
    let Some((name, agreed)) = found else {
        return Err(refuse(
            StatusCode::FORBIDDEN,
            "unable to upgrade: unknown subprotocol",
        ));
    };
    if !name.is_empty() {
        answer.push((header::SEC_WEBSOCKET_PROTOCOL, name.into()));
    }
    Ok((agreed, answer))
}

/// The first of what a client asks for that is ours: it names the best first.
fn first_of<'a, T: Copy>(
    asked: impl Iterator<Item = &'a str>,
    ours: &[(&'a str, T)],
) -> Option<(&'a str, T)> {
    let mut asked = asked;
    asked.find_map(|name| ours.iter().find(|(known, _)| *known == name).copied())
}

/// The parts of a list that may be in one header or several.
fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|word| !word.is_empty())
}

fn refuse(status: StatusCode, text: &'static str) -> Refusal {
    Refusal {
        status,
        text,
        header: None,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .fold(HeaderMap::new(), |mut all, (name, value)| {
                all.append(name, value);
                all
            })
    }

    #[test]
    fn spdy_takes_the_first_of_the_client_that_is_ours() {
        let base = [("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
        let version = |value| ("x-stream-protocol-version", value);
        let cases: [(&[_], Result<ErrorStyle, u16>, &str); 6] = [
            (
                &[
                    version("v5.channel.k8s.io"),
                    version("v4.channel.k8s.io"),
                    version("v3.channel.k8s.io"),
                ],
                Ok(ErrorStyle::Status),
                "v4.channel.k8s.io",
            ),
            (
                &[version("v2.channel.k8s.io, v4.channel.k8s.io")],
                Ok(ErrorStyle::Text),
                "v2.channel.k8s.io",
            ),
            (
                &[version("channel.k8s.io")],
                Ok(ErrorStyle::Text),
                "channel.k8s.io",
            ),
            (&[version("v9.channel.k8s.io")], Err(403), ""),
            (&[version("portforward.k8s.io")], Err(403), ""),
            (&[], Err(400), ""),
        ];
        for (extra, expected, name) in cases {
            let found = command(&headers(&[&base, extra].concat()));
            match (found, expected) {
                (Ok((agreed, answer)), Ok(style)) => {
                    assert_eq!(agreed, Agreed::Spdy(style), "{extra:?}");
                    assert!(answer.contains(&(PROTOCOL, name.into())), "{answer:?}");
                }
                (Err(refusal), Err(status)) => {
                    assert_eq!(refusal.status, status, "{extra:?}");
                    let accepted = refusal.header.map(|(_, names)| names);
                    assert_eq!(
                        accepted.as_deref(),
                        (status == 403).then_some("v4.channel.k8s.io, v3.channel.k8s.io, v2.channel.k8s.io, channel.k8s.io")
                    );
                }
                (found, expected) => panic!("{extra:?}: {found:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn websockets_are_agreed_by_subprotocol() {
        let base = [
            ("connection", "keep-alive, upgrade"),
            ("upgrade", "WebSocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let cases = [
            (None, Ok((Coding::Binary, ErrorStyle::Text)), None),
            (
                Some("v5.channel.k8s.io"),
                Ok((Coding::BinaryHalfClose, ErrorStyle::Status)),
                Some("v5.channel.k8s.io"),
            ),
            (
                Some("v9.channel.k8s.io, v4.base64.channel.k8s.io"),
                Ok((Coding::Base64, ErrorStyle::Status)),
                Some("v4.base64.channel.k8s.io"),
            ),
            (Some("soap"), Err(403), None),
        ];
        for (asked, expected, name) in cases {
            let extra: Vec<_> = asked
                .map(|asked| ("sec-websocket-protocol", asked))
                .into_iter()
                .collect();
            let found = command(&headers(&[&base, &extra[..]].concat()));
            match (found, expected) {
                (Ok((agreed, answer)), Ok(expected)) => {
                    assert_eq!(agreed, Agreed::WebSocket(expected));
                    // The example of RFC 6455, section 1.3.
                    assert!(answer.contains(&(
                        header::SEC_WEBSOCKET_ACCEPT,
                        "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".into()
                    )));
                    let chosen = answer
                        .iter()
                        .find(|(name, _)| name == header::SEC_WEBSOCKET_PROTOCOL);
                    assert_eq!(chosen.map(|(_, name)| &**name), name);
                }
                (Err(refusal), Err(status)) => assert_eq!(refusal.status, status),
                (found, expected) => panic!("{asked:?}: {found:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn ports_are_forwarded_over_spdy_alone_or_inside() {
        let spdy = headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "portforward.k8s.io"),
        ]);
        assert_eq!(
            port_forward(&spdy).map(|(agreed, _)| agreed),
            Ok(Agreed::Spdy(()))
        );
        let inside = headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "AAAA"),
            ("sec-websocket-protocol", "SPDY/3.1+portforward.k8s.io"),
        ]);
        assert_eq!(
            port_forward(&inside).map(|(agreed, _)| agreed),
            Ok(Agreed::WebSocket(Forward::Tunnel))
        );
    }

    #[test]
    fn requests_without_upgrade_are_refused() {
        let cases: [&[_]; 4] = [
            &[],
            &[("upgrade", "SPDY/3.1")],
            &[("connection", "Upgrade"), ("upgrade", "h2c")],
            &[("connection", "Upgrade"), ("upgrade", "websocket")],
        ];
        for case in cases {
            let refusal = command(&headers(case)).expect_err("nothing to upgrade to");
            assert_eq!(refusal.status, StatusCode::BAD_REQUEST, "{case:?}");
        }
    }
}
