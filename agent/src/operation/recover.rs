//! After a crash: what was begun is finished or undone before anything new begins.

use std::sync::Arc;

use futures_util::future::join_all;
use tracing::{error, info};

use super::{Intent, Operation, Operations};

impl Operations {
    /// Finishes or undoes every unfinished operation of this kind; side by side, since each holds
    /// a subject of its own.
    ///
    /// An intent that can't be read is left for `fsck` and reported.
    pub async fn recover<O: Operation>(&self, on: &Arc<O::Domain>) {
        let snapshot = self.store.snapshot();
        let interrupted = snapshot
            .all::<Intent>()
            .filter(|intent| intent.name == O::NAME);
        let recovering = interrupted.filter_map(|intent| {
            let operation: O = serde_json::from_value(intent.input.clone())
                .inspect_err(|cause| error!(operation_id = %intent.id, name = O::NAME, error = %cause, "an intent is unreadable"))
                .ok()?;
            let task = self.readmit(&operation, intent.id.clone());
            Some(async move {
                info!(operation_id = %task.context.id, name = O::NAME, subject = %operation.subject(), "recovering");
                self.recovered(&operation, on, &task).await;
            })
        });
        join_all(recovering).await;
    }
}
