//! How a command ended, as its client is told on the error stream.

use bytes::Bytes;
use serde_json::json;

/// How a command or an attachment ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With 0, or an attachment with its container.
    Success,
    /// With another code.
    ExitCode(i32),
    /// It could not be run.
    Failed(String),
}

/// What a version of the protocol puts on the error stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::service::streaming) enum ErrorStyle {
    /// Text, and only on failure: before v4.
    Text,
    /// A status in JSON, always: v4 and later.
    Status,
}

impl Outcome {
    /// The bytes of the error stream; none if it stays empty.
    pub(super) fn render(&self, style: ErrorStyle) -> Option<Bytes> {
        match style {
            ErrorStyle::Text => self.message().map(Bytes::from),
            ErrorStyle::Status => Some(Bytes::from(self.status().to_string())),
        }
    }

    fn message(&self) -> Option<String> {
        match self {
            Self::Success => None,
            Self::ExitCode(code) => Some(format!(
                "command terminated with non-zero exit code: exit status {code}"
            )),
            Self::Failed(text) => Some(format!("Internal error occurred: {text}")),
        }
    }

    fn status(&self) -> serde_json::Value {
        match self {
            Self::Success => json!({ "status": "Success" }),
            Self::ExitCode(code) => json!({
                "status": "Failure",
                "message": self.message(),
                "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
            }),
            Self::Failed(text) => json!({
                "status": "Failure",
                "message": self.message(),
                "reason": "InternalError",
                "details": { "causes": [{ "message": text }] },
                "code": 500,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_stream_of_each_version() {
        let failed = Outcome::Failed("no such file".into());
        let cases = [
            (Outcome::Success, ErrorStyle::Text, None),
            (
                Outcome::Success,
                ErrorStyle::Status,
                Some(r#"{"status":"Success"}"#),
            ),
            (
                Outcome::ExitCode(3),
                ErrorStyle::Text,
                Some("command terminated with non-zero exit code: exit status 3"),
            ),
            (
                Outcome::ExitCode(3),
                ErrorStyle::Status,
                Some(
                    r#"{"status":"Failure","message":"command terminated with non-zero exit code: exit status 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#,
                ),
            ),
            (
                failed.clone(),
                ErrorStyle::Text,
                Some("Internal error occurred: no such file"),
            ),
            (
                failed,
                ErrorStyle::Status,
                Some(
                    r#"{"status":"Failure","message":"Internal error occurred: no such file","reason":"InternalError","details":{"causes":[{"message":"no such file"}]},"code":500}"#,
                ),
            ),
        ];
        for (outcome, style, expected) in cases {
            let found = outcome.render(style);
            let parsed = |bytes: &[u8]| match style {
                ErrorStyle::Text => String::from_utf8_lossy(bytes).into_owned().into(),
                ErrorStyle::Status => serde_json::from_slice(bytes).expect("JSON"),
            };
            let found: Option<serde_json::Value> = found.map(|bytes| parsed(&bytes));
            assert_eq!(
                found,
                expected.map(|text| parsed(text.as_bytes())),
                "{outcome:?} {style:?}"
            );
        }
    }
}
