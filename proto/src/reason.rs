//! Reasons as they stand in `google.rpc.ErrorInfo`: names without the enum's prefix.

use crate::longshore::v1::ErrorReason;

const PREFIX: &str = "ERROR_REASON_";

impl ErrorReason {
    /// Text for `ErrorInfo.reason`, as `HOST_PORT_TAKEN`.
    #[must_use]
    pub fn as_reason(self) -> &'static str {
        let name = self.as_str_name();
        name.strip_prefix(PREFIX).unwrap_or(name)
    }

    /// Reads `ErrorInfo.reason`; `None` for one that this release does not know.
    #[must_use]
    pub fn from_reason(text: &str) -> Option<Self> {
        Self::from_str_name(&format!("{PREFIX}{text}"))
            .filter(|reason| *reason != Self::Unspecified)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_read_back_from_its_text() {
        for (reason, text) in [
            (ErrorReason::HostPortTaken, "HOST_PORT_TAKEN"),
            (ErrorReason::CursorExpired, "CURSOR_EXPIRED"),
            (ErrorReason::Bug, "BUG"),
        ] {
            assert_eq!(reason.as_reason(), text);
            assert_eq!(ErrorReason::from_reason(text), Some(reason));
        }
    }

    #[test]
    fn an_unknown_reason_is_none() {
        for text in [
            "",
            "UNSPECIFIED",
            "SOMETHING_NEW",
            "ERROR_REASON_BUG",
            "bug",
        ] {
            assert_eq!(ErrorReason::from_reason(text), None, "{text}");
        }
    }
}
