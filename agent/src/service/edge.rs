//! Refusals of the edge itself: fields that can't be understood, before any chapter is asked.

use longshore_proto::longshore::v1::ErrorReason;

/// Why a request is refused as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EdgeError {
    /// A field is malformed or out of range.
    #[error("{field}: {value:?} is not valid, expected {expected}")]
    Invalid {
        /// Path of the field, `config.port_mappings[0].host_port`.
        field: String,
        /// As sent, cut to 100 characters.
        value: String,
        /// What would be valid.
        expected: String,
    },
    /// A required field is missing.
    #[error("{field} is required")]
    Missing {
        /// Path of the field.
        field: String,
    },
    /// Two fields exclude each other.
    #[error("{field} excludes {other}")]
    Conflict {
        /// Path of one field.
        field: String,
        /// Path of the other.
        other: String,
    },
    /// A mount that can't be had as asked, told with the word that CRI clients look for.
    #[error("{word}: {source}")]
    Mount {
        /// `RROUnsupported` or `ImageVolumeMountFailed`.
        word: &'static str,
        /// What is wrong.
        source: Box<EdgeError>,
    },
    /// This agent does not do it.
    #[error("{feature} is not supported: {missing}")]
    Unsupported {
        /// What was asked.
        feature: &'static str,
        /// What is missing.
        missing: &'static str,
    },
}

impl EdgeError {
    /// A malformed field.
    pub fn invalid(
        field: impl Into<String>,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field: field.into(),
            value: value.to_string().chars().take(100).collect(),
            expected: expected.into(),
        }
    }

    /// A missing field.
    pub fn missing(field: impl Into<String>) -> Self {
        Self::Missing {
            field: field.into(),
        }
    }

    /// The stable reason.
    pub fn reason(&self) -> ErrorReason {
        match self {
            Self::Invalid { .. } => ErrorReason::InvalidField,
            Self::Missing { .. } => ErrorReason::MissingField,
            Self::Conflict { .. } => ErrorReason::ConflictingFields,
            Self::Mount { source, .. } => source.reason(),
            Self::Unsupported { .. } => ErrorReason::NotImplemented,
        }
    }
}

/// Requires a value that is not empty.
pub fn required(field: &str, value: &str) -> Result<(), EdgeError> {
    if value.is_empty() {
        return Err(EdgeError::missing(field));
    }
    Ok(())
}

/// Requires text of at most `limit` bytes without control characters.
pub fn text(field: &str, value: &str, limit: usize) -> Result<(), EdgeError> {
    if value.len() > limit {
        return Err(EdgeError::invalid(
            field,
            format!("{} bytes", value.len()),
            format!("at most {limit} bytes"),
        ));
    }
    if value.chars().any(char::is_control) {
        return Err(EdgeError::invalid(
            field,
            value.escape_default(),
            "text without control characters",
        ));
    }
    Ok(())
}

/// Requires an absolute path without `..`, of at most 4096 bytes.
pub fn absolute_path(field: &str, value: &str) -> Result<(), EdgeError> {
    text(field, value, 4096)?;
    if !value.starts_with('/') || value.split('/').any(|part| part == "..") {
        return Err(EdgeError::invalid(
            field,
            value,
            "an absolute path without `..`",
        ));
    }
    Ok(())
}

/// Most bytes of labels and annotations together.
pub const LABEL_BYTES: usize = 256 << 10;

/// Requires labels and annotations of a bearable size.
pub fn labels<'a>(
    field: &str,
    entries: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<(), EdgeError> {
    let size: usize = entries.map(|(key, value)| key.len() + value.len()).sum();
    if size > LABEL_BYTES {
        return Err(EdgeError::invalid(
            field,
            format!("{size} bytes"),
            format!("at most {LABEL_BYTES} bytes in all"),
        ));
    }
    Ok(())
}

/// Requires an id or a prefix of one: up to 128 characters without control characters.
pub fn id(field: &str, value: &str) -> Result<(), EdgeError> {
    required(field, value)?;
    text(field, value, 128)
}
