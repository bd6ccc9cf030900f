//! How an operation fails, beside its chapter's own errors.

use std::sync::Arc;

use crate::store::StoreError;

/// Why an operation did not reach its outcome. Cheap to clone: all who joined get it.
#[derive(Debug, thiserror::Error)]
pub enum OperationError<E> {
    /// The chapter refused or a step failed; everything is undone.
    #[error(transparent)]
    Domain(Arc<E>),
    /// The store refused.
    #[error("{operation}: {source}")]
    Store {
        /// The operation.
        operation: &'static str,
        /// Why.
        source: StoreError,
    },
    /// It was cancelled or pre-empted and is undone.
    #[error("{operation} was cancelled")]
    Cancelled {
        /// The operation.
        operation: &'static str,
    },
    /// Its task ended without a result, which is a bug.
    #[error("{operation} died")]
    Died {
        /// The operation.
        operation: &'static str,
    },
}

impl<E> Clone for OperationError<E> {
    fn clone(&self) -> Self {
        match self {
            Self::Domain(error) => Self::Domain(Arc::clone(error)),
            Self::Store { operation, source } => Self::Store {
                operation,
                source: source.clone(),
            },
            Self::Cancelled { operation } => Self::Cancelled { operation },
            Self::Died { operation } => Self::Died { operation },
        }
    }
}
