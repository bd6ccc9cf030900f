//! Real directories, as root: what an archive says, and what the file system shows after it.

mod archive;
mod gnu_tar;
mod hostile;
mod merged;
mod random;
mod store;
mod trees;
mod volume;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use rustix::{fs::Stat, io::Errno};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::{LayerDir, LayerError, Limits, Unpacked, unpack};

/// A directory with things that no layer may touch, and room for layers.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).expect("new directory");
        fs::write(outside.join("secret"), "untouched").expect("new file");
        fs::create_dir(dir.path().join("layers")).expect("new directory");
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn layer(&self, name: &str) -> LayerDir {
        let path = self.dir.path().join("layers").join(name);
        fs::create_dir(&path).expect("new directory");
        LayerDir::open(&path).expect("it was just made")
    }

    fn outside(&self) -> Listing {
        list(&self.dir.path().join("outside"))
    }

    /// Unpacks into a layer of this name; nothing else may change, whatever comes of it.
    fn unpack(&self, name: &str, archive: &[u8]) -> Result<Unpacked, LayerError> {
        let layer = self.layer(name);
        let others = || {
            let layer = Path::new("layers").join(name);
            let mut others = list_without(self.path(), &layer);
            // The layer itself was made in it.
            others.remove("layers");
            others
        };
        let before = others();
        let result = unpack(archive, &layer, &Limits::default(), &AtomicBool::new(false));
        assert_eq!(others(), before, "something outside of the layer changed");
        if let Ok(unpacked) = &result {
            let digest = <[u8; 32]>::from(Sha256::digest(archive));
            assert_eq!(unpacked.diff_id.hex(), hex::encode(digest));
        }
        result
    }

    fn list(&self, name: &str) -> Listing {
        list(&self.dir.path().join("layers").join(name))
    }
}

type Listing = BTreeMap<String, String>;

/// Every inode below `root`, the root as the empty path, and all that can be told about it.
fn list(root: &Path) -> Listing {
    list_without(root, Path::new("no such name"))
}

fn list_without(root: &Path, left_out: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        if path == left_out {
            continue;
        }
        let full = root.join(&path);
        let Ok(meta) = fs::symlink_metadata(&full) else {
            // Overlayfs lists the whiteouts of a directory that only one layer has.
            continue;
        };
        if meta.is_dir() {
            for entry in fs::read_dir(&full).expect("a directory") {
                pending.push(path.join(entry.expect("a readable directory").file_name()));
            }
        }
        let name = path.as_os_str().as_bytes().escape_ascii().to_string();
        listing.insert(name, describe(&full, &meta));
    }
    listing
}

fn describe(path: &Path, meta: &fs::Metadata) -> String {
    let kind = meta.file_type();
    let content = if kind.is_file() {
        let content = fs::read(path).expect("a readable file");
        let links = if meta.nlink() > 1 {
            format!(" links={}", meta.nlink())
        } else {
            String::new()
        };
        format!(
            "file {} {}{links}",
            meta.size(),
            hex::encode(&Sha256::digest(content)[..8])
        )
    } else if kind.is_symlink() {
        let target = fs::read_link(path).expect("a link");
        format!("link {}", target.as_os_str().as_bytes().escape_ascii())
    } else if kind.is_dir() {
        "dir".to_owned()
    } else if kind.is_fifo() {
        "fifo".to_owned()
    } else {
        let name = if kind.is_char_device() {
            "char"
        } else {
            "block"
        };
        let (major, minor) = (
            rustix::fs::major(meta.rdev()),
            rustix::fs::minor(meta.rdev()),
        );
        format!("{name} {major}/{minor}")
    };
    let mode = if kind.is_symlink() {
        0
    } else {
        meta.mode() & 0o7777
    };
    let xattrs = xattrs(path);
    format!(
        "{content} {mode:04o} {}:{} {}.{:09}{xattrs}",
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
    )
}

fn xattrs(path: &Path) -> String {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut shown: Vec<String> = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 4096];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).expect("it was listed");
            format!(
                " {}={}",
                name.escape_ascii(),
                value[..length].escape_ascii()
            )
        })
        .collect();
    shown.sort();
    shown.concat()
}

fn stat(path: &Path) -> Result<Stat, Errno> {
    rustix::fs::lstat(path)
}
