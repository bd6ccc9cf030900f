//! Blobs on disk, by digest.
//!
//! ```text
//! blobs/sha256/<hex>     manifests and configurations, complete and synced (layers only with keep_blobs)
//! blobs/partial/<hex>    compressed layers as far as they came; kept until their image is recorded,
//!                        so that a pull goes on where it stopped, also after SIGKILL
//! ```
//! All calls block; callers come through `blocking::run`. A partial blob is verified as a whole when
//! it is complete, so it needs no sync: what power loss garbles is fetched again.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::error::ImageError;
use crate::id::Digest;

/// The blobs of one data directory.
pub(crate) struct Content {
    complete: PathBuf,
    partial: PathBuf,
    /// Partial blobs in use: two writers would garble each other's.
    busy: Mutex<HashSet<Digest>>,
}

impl Content {
    pub(crate) fn open(data_dir: &Path) -> Result<Arc<Content>, ImageError> {
        let blobs = data_dir.join("blobs");
        let (complete, partial) = (blobs.join("sha256"), blobs.join("partial"));
        for path in [&complete, &partial] {
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path);
            made.map_err(failed("create", path))?;
        }
        Ok(Arc::new(Content {
            complete,
            partial,
            busy: Mutex::default(),
        }))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.complete.join(digest.hex())
    }

    /// Keeps `bytes`, whose digest the caller has verified; durable on return.
    pub(crate) fn write(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let path = self.path(digest);
        if path.exists() {
            return Ok(());
        }
        let temporary = self.complete.join(format!(
            "tmp-{}-{:08x}",
            digest.hex(),
            rand::random::<u32>()
        ));
        let written = new_file(&temporary).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.complete)?.sync_all()
        });
        written.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            failed("write", &path)(error)
        })
    }

    /// Returns a blob of at most `limit_bytes`, verified again; `None` if it is not here.
    pub(crate) fn read(
        &self,
        digest: &Digest,
        limit_bytes: u64,
    ) -> Result<Option<Vec<u8>>, ImageError> {
        let path = self.path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let mut bytes = Vec::new();
        file.take(limit_bytes + 1)
            .read_to_end(&mut bytes)
            .map_err(failed("read", &path))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            let what = format!("stored blob {}", path.display());
            return Err(ImageError::DigestMismatch {
                what,
                expected: digest.clone(),
                actual,
            });
        }
        Ok(Some(bytes))
    }

    /// Removes a blob; that it is not here is fine.
    pub(crate) fn remove(&self, digest: &Digest) -> Result<(), ImageError> {
        let path = self.path(digest);
        remove_file(&path).map_err(failed("remove", &path))
    }

    /// Returns the complete blobs, each with its size.
    pub(crate) fn list(&self) -> Result<Vec<(Digest, u64)>, ImageError> {
        list(&self.complete).map_err(failed("list", &self.complete))
    }

    /// Returns partial blobs that nobody is fetching, each with its size.
    pub(crate) fn list_partial(&self) -> Result<Vec<(Digest, u64)>, ImageError> {
        let mut found = list(&self.partial).map_err(failed("list", &self.partial))?;
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        found.retain(|(digest, _)| !busy.contains(digest));
        Ok(found)
    }

    /// Removes a partial blob that nobody is fetching.
    pub(crate) fn remove_partial(&self, digest: &Digest) -> Result<(), ImageError> {
        let path = self.partial.join(digest.hex());
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if busy.contains(digest) {
            return Ok(());
        }
        remove_file(&path).map_err(failed("remove", &path))
    }

    /// Removes what a killed agent left half written, and partial blobs older than `age`.
    pub(crate) fn remove_leftovers(&self, age: Duration) -> Result<(), ImageError> {
        let complete = fs::read_dir(&self.complete).map_err(failed("list", &self.complete))?;
        for entry in complete.flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b"tmp-") {
                remove_file(&entry.path()).map_err(failed("remove", &entry.path()))?;
            }
        }
        let partial = fs::read_dir(&self.partial).map_err(failed("list", &self.partial))?;
        for entry in partial.flatten() {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let old = modified.is_ok_and(|at| {
                SystemTime::now()
                    .duration_since(at)
                    .is_ok_and(|passed| passed >= age)
            });
            if old {
                remove_file(&entry.path()).map_err(failed("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    /// Opens the partial blob of a layer to go on with it; `None` while someone else does.
    pub(crate) fn partial(
        self: &Arc<Self>,
        digest: &Digest,
        size_bytes: u64,
    ) -> Result<Option<Partial>, ImageError> {
        if !self
            .busy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(digest.clone())
        {
            return Ok(None);
        }
        let path = self.partial.join(digest.hex());
        // From here on, dropping it gives the name back.
        let mut partial = Partial {
            content: Arc::clone(self),
            digest: digest.clone(),
            path,
            have_bytes: 0,
            file: None,
        };
        let path = &partial.path;
        let opened = OpenOptions::new()
            .append(true)
            .read(true)
            .create(true)
            .mode(0o600)
            .open(path);
        let file = opened.map_err(failed("open", path))?;
        let mut have_bytes = file.metadata().map_err(failed("open", path))?.len();
        if have_bytes > size_bytes {
            file.set_len(0).map_err(failed("truncate", path))?;
            have_bytes = 0;
        }
        partial.have_bytes = have_bytes;
        partial.file = Some(file);
        Ok(Some(partial))
    }
}

/// A partial blob in use. Dropping it leaves the file for the next pull.
pub(crate) struct Partial {
    content: Arc<Content>,
    digest: Digest,
    path: PathBuf,
    /// What was there when it was opened.
    have_bytes: u64,
    file: Option<File>,
}

impl Partial {
    /// Returns how much was there when it was opened.
    pub(crate) fn have_bytes(&self) -> u64 {
        self.have_bytes
    }

    /// Opens it a second time, for reading from its start.
    pub(crate) fn reader(&self) -> Result<File, ImageError> {
        File::open(&self.path).map_err(failed("open", &self.path))
    }

    /// Appends what arrived. A full disk ends the keeping and not the pull: unpacking will tell.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        if let Err(error) = file.write_all(bytes) {
            tracing::warn!(digest = %self.digest, %error, "partial blob is no longer kept");
            self.file = None;
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Removes it: its content is wrong, or no longer needed.
    pub(crate) fn discard(&mut self) {
        self.file = None;
        let _ = fs::remove_file(&self.path);
    }

    /// Makes it a complete blob, durable on return; the caller has verified its digest.
    ///
    /// Returns the digest, or nothing if it was not kept to its end.
    pub(crate) fn complete(mut self) -> Result<Option<Digest>, ImageError> {
        let Some(file) = self.file.take() else {
            return Ok(None);
        };
        let path = self.content.path(&self.digest);
        let moved = file.sync_all().and_then(|()| {
            fs::rename(&self.path, &path)?;
            File::open(&self.content.complete)?.sync_all()
        });
        moved
            .map(|()| Some(self.digest.clone()))
            .map_err(failed("keep", &path))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.content
            .busy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.digest);
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn list(directory: &Path) -> io::Result<Vec<(Digest, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some(digest) = name
            .to_str()
            .and_then(|name| format!("sha256:{name}").parse().ok())
        {
            found.push((digest, entry.metadata()?.len()));
        }
    }
    Ok(found)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Content {
        action,
        path,
        source,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_kept_once_and_verified_when_read() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        let digest = Digest::of(b"hello");
        assert_eq!(content.read(&digest, 10).unwrap(), None);
        content.write(&digest, b"hello").unwrap();
        content.write(&digest, b"hello").unwrap();
        assert_eq!(content.read(&digest, 10).unwrap().unwrap(), b"hello");
        assert_eq!(content.list().unwrap(), [(digest.clone(), 5)]);
        fs::write(content.path(&digest), b"hell0").unwrap();
        assert!(matches!(
            content.read(&digest, 10),
            Err(ImageError::DigestMismatch { .. })
        ));
        content.remove(&digest).unwrap();
        content.remove(&digest).unwrap();
        assert_eq!(content.list().unwrap(), []);
    }

    #[test]
    fn a_partial_blob_has_one_writer_and_outlives_it() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        let digest = Digest::of(b"hello world");
        let mut first = content.partial(&digest, 11).unwrap().unwrap();
        assert!(content.partial(&digest, 11).unwrap().is_none());
        first.append(b"hello");
        drop(first);
        let mut second = content.partial(&digest, 11).unwrap().unwrap();
        assert_eq!(second.have_bytes(), 5);
        assert_eq!(
            io::read_to_string(second.reader().unwrap()).unwrap(),
            "hello"
        );
        second.append(b" world");
        second.complete().unwrap();
        assert_eq!(content.read(&digest, 11).unwrap().unwrap(), b"hello world");
        assert_eq!(content.list_partial().unwrap(), []);
    }

    #[test]
    fn a_partial_blob_that_is_too_long_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        let digest = Digest::of(b"x");
        content
            .partial(&digest, 100)
            .unwrap()
            .unwrap()
            .append(&[0; 50]);
        assert_eq!(
            content.partial(&digest, 49).unwrap().unwrap().have_bytes(),
            0
        );
    }

    #[test]
    fn leftovers_go_and_fresh_partials_stay() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        fs::write(content.complete.join("tmp-abc"), b"x").unwrap();
        let digest = Digest::of(b"x");
        content.partial(&digest, 100).unwrap().unwrap().append(b"y");
        content.remove_leftovers(Duration::from_secs(3600)).unwrap();
        assert!(!content.complete.join("tmp-abc").exists());
        assert_eq!(content.list_partial().unwrap(), [(digest, 1)]);
        content.remove_leftovers(Duration::ZERO).unwrap();
        assert_eq!(content.list_partial().unwrap(), []);
    }
}
