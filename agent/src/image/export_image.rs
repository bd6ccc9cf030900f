//! ExportImage: a distribution's image as one file that others read too, a unified tarball.
//!
//! ```text
//! metadata.yaml      from the labels of the image, in JSON, which is YAML
//! templates/0.tpl    texts of the templates
//! rootfs/            the layer's canonical tar, below this name
//! ```
//! Equal images give equal files. The layer is leased meanwhile: no removal takes it away.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Images;
use super::error::ImageError;
use super::image::Image;
use super::lease::Lease;
use super::pull_image::CancelOnDrop;
use super::system::SYSTEM_LABEL;
use super::system::catalog::kernel_name_of;
use super::system::metadata::Template;
use crate::blocking;
use crate::id::ImageId;
use crate::rootfs::{Layer, Rootfs};

/// Chunks between the disk and the caller.
const CHUNKS: usize = 8;
const CHUNK_BYTES: usize = 256 << 10;

/// How an exported file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportPacking {
    /// Not at all.
    Plain,
    /// zstd, on level 3.
    Zstd,
    /// gzip, on level 6.
    Gzip,
}

/// The bytes of an export; dropping it ends the export.
pub struct Export {
    chunks: mpsc::Receiver<Result<Bytes, ImageError>>,
    _cancel: CancelOnDrop,
}

impl Export {
    /// Returns the next bytes; `None` at the end.
    ///
    /// # Errors
    /// What ended the export.
    pub async fn next(&mut self) -> Option<Result<Bytes, ImageError>> {
        self.chunks.recv().await
    }
}

impl Images {
    /// Begins to write the image `name_or_id` as a unified tarball.
    ///
    /// # Errors
    /// `Unknown`, `Ambiguous`, `Reference`; `NotSystem` for an image that is none of a distribution.
    pub async fn export(
        &self,
        name_or_id: &str,
        packing: ExportPacking,
    ) -> Result<Export, ImageError> {
        let unknown = || ImageError::Unknown {
            name: name_or_id.to_owned(),
        };
        let (image, layer, lease) = {
            let _planning = self.inner.planning.lock().await;
            let at = self.inner.store.snapshot();
            let image = self.find(&at, name_or_id)?.ok_or_else(unknown)?;
            let [layer] = &self.layers(&at, &image)?[..] else {
                return Err(not_system(&image.id, "it has several layers"));
            };
            let lease = self.inner.leases.take(&image.layers);
            (image, layer.clone(), lease)
        };
        let head = head(&image)?;
        let (sender, chunks) = mpsc::channel(CHUNKS);
        let cancelled = Arc::new(AtomicBool::new(false));
        let cancel = CancelOnDrop(Arc::clone(&cancelled));
        let rootfs = self.inner.rootfs.clone();
        let work = move || {
            let job = Job {
                rootfs,
                layer,
                head,
                packing,
                _lease: lease,
            };
            let out = Chunks {
                sender: sender.clone(),
                buffer: Vec::with_capacity(CHUNK_BYTES),
            };
            if let Err(error) = job.run(out, &cancelled) {
                // A caller that has gone does not read it.
                let _ = sender.blocking_send(Err(error));
            }
        };
        tokio::spawn(blocking::run_bulk("export image", work));
        Ok(Export {
            chunks,
            _cancel: cancel,
        })
    }
}

struct Job {
    rootfs: Rootfs,
    layer: Layer,
    head: Vec<(String, Vec<u8>)>,
    packing: ExportPacking,
    _lease: Lease,
}

impl Job {
    fn run(&self, out: Chunks, cancelled: &AtomicBool) -> Result<(), ImageError> {
        let packed = |error: io::Error| ImageError::Export { source: error };
        match self.packing {
            ExportPacking::Plain => {
                let mut out = out;
                self.write(&mut out, cancelled)?;
                out.flush().map_err(packed)
            }
            ExportPacking::Gzip => {
                let mut encoder =
                    flate2::write::GzEncoder::new(out, flate2::Compression::default());
                self.write(&mut encoder, cancelled)?;
                encoder
                    .finish()
                    .and_then(|mut out| out.flush())
                    .map_err(packed)
            }
            ExportPacking::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, 3).map_err(packed)?;
                self.write(&mut encoder, cancelled)?;
                encoder
                    .finish()
                    .and_then(|mut out| out.flush())
                    .map_err(packed)
            }
        }
    }

    fn write(&self, out: &mut impl Write, cancelled: &AtomicBool) -> Result<(), ImageError> {
        let written = self
            .rootfs
            .write_unified(&self.layer, &self.head, out, cancelled);
        written.map_err(|source| ImageError::Rootfs {
            action: "export a layer",
            source,
        })
    }
}

/// Hands bytes to the caller, as fast as it takes them.
struct Chunks {
    sender: mpsc::Sender<Result<Bytes, ImageError>>,
    buffer: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK_BYTES - self.buffer.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.buffer.extend_from_slice(taken);
        if self.buffer.len() == CHUNK_BYTES {
            self.flush()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK_BYTES));
        let sent = self.sender.blocking_send(Ok(full.into()));
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the caller has gone"))
    }
}

/// The small files that come before the tree.
fn head(image: &Image) -> Result<Vec<(String, Vec<u8>)>, ImageError> {
    let labels = &image.config.labels;
    if !labels.keys().any(|key| key.starts_with(SYSTEM_LABEL)) {
        return Err(not_system(&image.id, "it has no labels of one"));
    }
    let label = |name: &str| {
        let value = labels.get(&format!("{SYSTEM_LABEL}{name}"));
        value.cloned().unwrap_or_default()
    };
    let platform = &image.config.platform;
    let created = image.config.created.as_deref().unwrap_or_default();
    let created: i64 = created.parse().map_or(0, jiff::Timestamp::as_second);
    let (os, release, variant, serial) = (
        label("os"),
        label("release"),
        label("variant"),
        label("serial"),
    );
    let title = labels.get("org.opencontainers.image.title").cloned();
    let title = title.unwrap_or_else(|| format!("{os} {release} {}", platform.architecture));
    let mut properties = BTreeMap::from([
        ("architecture", platform.architecture.clone()),
        ("description", title),
        ("os", os),
        ("release", release),
        ("serial", serial),
        ("variant", variant),
    ]);
    properties.retain(|_, value| !value.is_empty());
    let templates: Vec<Template> = serde_json::from_str(&label("templates")).unwrap_or_default();
    let (mut rules, mut texts) = (serde_json::Map::new(), Vec::new());
    for template in templates {
        let Template {
            path,
            when,
            create_only,
            uid,
            gid,
            mode,
            properties,
            text: Some(text),
        } = template
        else {
            // Files in which a word is replaced have no counterpart there.
            continue;
        };
        let name = format!("{}.tpl", texts.len());
        let mut rule = json!({"when": when, "template": name, "create_only": create_only,
            "properties": properties});
        let owners = [("uid", uid.map(Value::from)), ("gid", gid.map(Value::from))];
        for (key, value) in owners.into_iter().chain([("mode", mode.map(Value::from))]) {
            if let Some(value) = value {
                rule[key] = value;
            }
        }
        rules.insert(path, rule);
        texts.push((format!("templates/{name}"), text.into_bytes()));
    }
    let metadata = json!({
        "architecture": kernel_name_of(platform),
        "creation_date": created,
        "properties": properties,
        "templates": rules,
    });
    let mut files = vec![(
        "metadata.yaml".to_owned(),
        format!("{metadata:#}\n").into_bytes(),
    )];
    files.extend(texts);
    Ok(files)
}

fn not_system(image: &ImageId, reason: &'static str) -> ImageError {
    ImageError::NotSystem {
        image: image.clone(),
        reason,
    }
}
