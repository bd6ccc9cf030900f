//! What a system container has shown on its console: kept on disk, so that it can be read when it is
//! stopped. While it runs its shim has the end of it too, for who attaches.

use futures_util::StreamExt as _;
use tokio::sync::watch;

use super::{
    super::{
        Lifecycle, LifecycleError,
        container::LogWish,
        logs::{self, LogError, LogOptions},
        spec,
    },
    System,
};
use crate::id::ContainerId;

/// Rotated files beside the one that is written to.
const KEPT_FILES: u32 = 1;

impl Lifecycle {
    /// The end of what a system container has shown on its console, as it was written; at most
    /// 128 KiB, and with `lines` at most so many of them.
    ///
    /// # Errors
    /// `NotFound`; `File` if the log can't be read.
    pub async fn system_console(
        &self,
        name: &str,
        lines: Option<u64>,
    ) -> Result<Vec<u8>, LifecycleError> {
        let system = self.system(name)?;
        self.read_console(&system.id, lines).await
    }

    pub(super) fn console_log(&self, id: &ContainerId) -> LogWish {
        LogWish {
            path: self.logs_dir.join(System::log_name(id)),
            rotate_bytes: u64::from(spec::CONSOLE_BYTES) * 2,
            keep_files: KEPT_FILES,
            owned: false,
        }
    }

    /// The last lines for an error's words; empty if they can't be had.
    pub(super) async fn console_lines(&self, id: &ContainerId, lines: u64) -> String {
        let shown = self.read_console(id, Some(lines)).await.unwrap_or_default();
        let text = String::from_utf8_lossy(&shown);
        text.replace('\r', "")
            .chars()
            .filter(|c| *c == '\n' || !c.is_control())
            .collect()
    }

    async fn read_console(
        &self,
        id: &ContainerId,
        lines: Option<u64>,
    ) -> Result<Vec<u8>, LifecycleError> {
        let options = LogOptions {
            follow: false,
            since: None,
            tail_lines: lines,
            stdout: true,
            stderr: true,
        };
        let path = self.logs_dir.join(System::log_name(id));
        let (_never, running) = watch::channel(false);
        let mut entries = Box::pin(logs::read(path, options, running));
        let most = spec::CONSOLE_BYTES as usize;
        let mut shown = Vec::new();
        while let Some(entry) = entries.next().await {
            match entry {
                Ok(entry) => {
                    shown.extend_from_slice(&entry.data);
                    if !entry.partial {
                        shown.push(b'\n');
                    }
                    if shown.len() > most * 2 {
                        shown.drain(..shown.len() - most);
                    }
                }
                // It was never started.
                Err(LogError::Missing { .. }) => break,
                Err(LogError::Read { path, source }) => {
                    return Err(LifecycleError::file("read log", path)(source));
                }
            }
        }
        let over = shown.len().saturating_sub(most);
        shown.drain(..over);
        Ok(shown)
    }
}
