//! Images made in process: layers, configs, manifests and indexes, right or wrong on purpose.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use serde_json::{Value, json};
use tar::{EntryType, Header};

use crate::{page_server, registry::digest_of};

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Docker image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// This machine's architecture in the words of OCI.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// How a layer's tar is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// One layer: its tar and how it is to be packed.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The uncompressed tar.
    pub tar: Bytes,
    /// How it travels.
    pub packing: Packing,
}

impl Layer {
    /// The layer with another packing.
    pub fn packed(mut self, packing: Packing) -> Self {
        self.packing = packing;
        self
    }

    /// The bytes that travel.
    pub fn blob(&self) -> Bytes {
        match self.packing {
            Packing::Plain => self.tar.clone(),
            Packing::Gzip => {
                let mut out =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                out.write_all(&self.tar).expect("a Vec takes everything");
                out.finish().expect("a Vec takes everything").into()
            }
            Packing::Zstd => zstd::encode_all(&*self.tar, 1)
                .expect("a Vec takes everything")
                .into(),
        }
    }

    fn media_type(&self, docker: bool) -> &'static str {
        match (docker, self.packing) {
            (false, Packing::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (false, Packing::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (false, Packing::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (true, Packing::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (true, Packing::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (true, Packing::Zstd) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        }
    }
}

/// Writes a layer's tar, entry by entry, without asking whether it makes sense.
pub struct LayerBuilder {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for LayerBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl LayerBuilder {
    /// An empty layer.
    pub fn new() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }

    /// One entry with everything given; `path` and `link` go into the header as they are.
    pub fn entry(
        mut self,
        kind: EntryType,
        path: &str,
        link: Option<&str>,
        mode: u32,
        owner: (u64, u64),
        data: &[u8],
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        // set_path refuses `..` and absolute paths: hostile layers are what some tests need.
        let raw = header.as_gnu_mut().expect("a GNU header");
        let mut extensions: Vec<(&str, &[u8])> = Vec::new();
        if path.len() < raw.name.len() {
            raw.name[..path.len()].copy_from_slice(path.as_bytes());
        } else {
            extensions.push(("path", path.as_bytes()));
        }
        if let Some(link) = link {
            if link.len() < raw.linkname.len() {
                raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
            } else {
                extensions.push(("linkpath", link.as_bytes()));
            }
        }
        header.set_cksum();
        self.tar
            .append_pax_extensions(extensions)
            .expect("a Vec takes everything");
        self.tar
            .append(&header, data)
            .expect("a Vec takes everything");
        self
    }

    /// A directory with mode 0755.
    pub fn dir(self, path: &str) -> Self {
        self.dir_mode(path, 0o755)
    }

    /// A directory.
    pub fn dir_mode(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, path, None, mode, (0, 0), &[])
    }

    /// A file of root.
    pub fn file(self, path: &str, mode: u32, data: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, path, None, mode, (0, 0), data.as_ref())
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, Some(target), 0o777, (0, 0), &[])
    }

    /// A hard link to an earlier path.
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, Some(target), 0o644, (0, 0), &[])
    }

    /// A whiteout of `path`.
    pub fn whiteout(self, path: &str) -> Self {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let separator = if parent.is_empty() { "" } else { "/" };
        let hidden = format!("{parent}{separator}.wh.{name}");
        self.file(&hidden, 0o644, "")
    }

    /// Marks `dir` opaque: nothing below this layer shows through.
    pub fn opaque(self, dir: &str) -> Self {
        self.file(&format!("{dir}/.wh..wh..opq"), 0o644, "")
    }

    /// Extended attributes of the next entry.
    pub fn xattrs(mut self, attributes: &[(&str, &[u8])]) -> Self {
        let named: Vec<_> = attributes
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value))
            .collect();
        self.tar
            .append_pax_extensions(named.iter().map(|(name, value)| (name.as_str(), *value)))
            .expect("a Vec takes everything");
        self
    }

    /// A character device.
    pub fn device(mut self, path: &str, major: u32, minor: u32) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Char);
        header.set_path(path).expect("a plain path");
        header.set_mode(0o666);
        header.set_size(0);
        header.set_device_major(major).expect("a GNU header");
        header.set_device_minor(minor).expect("a GNU header");
        header.set_cksum();
        self.tar
            .append(&header, &[][..])
            .expect("a Vec takes everything");
        self
    }

    /// Copies a host file, parents not included.
    pub fn copy(self, source: &Path, path: &str) -> Result<Self> {
        let data = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        let mode = fs::metadata(source)?.permissions().mode() & 0o7777;
        Ok(self.file(path, mode, data))
    }

    /// The layer, packed with gzip.
    pub fn build(self) -> Layer {
        Layer {
            tar: self
                .tar
                .into_inner()
                .expect("a Vec takes everything")
                .into(),
            packing: Packing::Gzip,
        }
    }
}

/// What an image is made of.
#[derive(Clone, Debug, Default)]
pub struct ImageBuilder {
    layers: Vec<Layer>,
    config: serde_json::Map<String, Value>,
    docker: bool,
    architecture: Option<String>,
}

impl ImageBuilder {
    /// An image of these layers, base first.
    pub fn new(layers: Vec<Layer>) -> Self {
        Self {
            layers,
            ..Self::default()
        }
    }

    /// Sets a field of the config's `config` object, e.g. `Cmd`.
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.config.insert(field.to_owned(), value.into());
        self
    }

    /// Uses Docker's media types.
    pub fn docker(mut self) -> Self {
        self.docker = true;
        self
    }

    /// Another architecture than this machine's.
    pub fn architecture(mut self, name: &str) -> Self {
        self.architecture = Some(name.to_owned());
        self
    }

    /// Packs, digests and describes it all.
    pub fn build(self) -> Image {
        let architecture = self
            .architecture
            .unwrap_or_else(|| architecture().to_owned());
        let mut blobs = Vec::new();
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &self.layers {
            let blob = layer.blob();
            let digest = digest_of(&blob);
            descriptors.push(json!({"mediaType": layer.media_type(self.docker), "digest": digest, "size": blob.len()}));
            diff_ids.push(digest_of(&layer.tar));
            blobs.push((digest, blob));
        }
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "created": "2001-09-09T01:46:40Z",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": self.layers.iter().map(|_| json!({"created_by": "longshore-tests"})).collect::<Vec<_>>(),
        });
        let config = Bytes::from(config.to_string());
        let id = digest_of(&config);
        let (media_type, config_type) = if self.docker {
            (
                DOCKER_MANIFEST,
                "application/vnd.docker.container.image.v1+json",
            )
        } else {
            (OCI_MANIFEST, "application/vnd.oci.image.config.v1+json")
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {"mediaType": config_type, "digest": id, "size": config.len()},
            "layers": descriptors,
        });
        blobs.push((id.clone(), config));
        let manifest = Bytes::from(manifest.to_string());
        Image {
            id,
            digest: digest_of(&manifest),
            media_type,
            manifest,
            architecture,
            diff_ids,
            blobs,
        }
    }
}

/// A finished image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of its config.
    pub id: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Media type of its manifest.
    pub media_type: &'static str,
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// In the words of OCI.
    pub architecture: String,
    /// Digests of the uncompressed layers, base first.
    pub diff_ids: Vec<String>,
    /// Digest and bytes of each layer, base first, then of the config.
    pub blobs: Vec<(String, Bytes)>,
}

impl Image {
    /// The manifest with its JSON changed: for manifests that lie.
    pub fn with_manifest(mut self, change: impl FnOnce(&mut Value)) -> Self {
        let mut manifest: Value = serde_json::from_slice(&self.manifest).expect("we wrote it");
        change(&mut manifest);
        self.manifest = manifest.to_string().into();
        self.digest = digest_of(&self.manifest);
        self
    }
}

/// An index of images by platform.
pub fn index(images: &[&Image], docker: bool) -> (&'static str, Bytes) {
    let media_type = if docker { DOCKER_LIST } else { OCI_INDEX };
    let manifests: Vec<_> = images
        .iter()
        .map(|image| {
            json!({
                "mediaType": image.media_type,
                "digest": image.digest,
                "size": image.manifest.len(),
                "platform": {"os": "linux", "architecture": image.architecture},
            })
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
    (media_type, index.to_string().into())
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    daemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
    www-data:x:33:33:www-data:/var/www:/bin/false\n\
    member:x:1000:1000::/home/member:/bin/sh\n\
    nobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\n\
    daemon:x:1:\n\
    www-data:x:33:\n\
    member:x:1000:\n\
    of-the-image:x:50000:member\n\
    nogroup:x:65534:\n";

/// Programs of the host that the toolbox takes along where they exist; `sh` must.
const TOOLS: &[&str] = &[
    "sh",
    "ls",
    "cat",
    "echo",
    "sleep",
    "id",
    "env",
    "hostname",
    "stat",
    "ps",
    "grep",
    "sed",
    "head",
    "tail",
    "wc",
    "dd",
    "mkdir",
    "rm",
    "ln",
    "chmod",
    "chown",
    "touch",
    "true",
    "false",
    "date",
    "mount",
    "umount",
    "uname",
    "readlink",
    "sort",
    "tr",
    "seq",
    "kill",
    "tee",
    "yes",
    "timeout",
    "df",
    "test",
    "printf",
    "tty",
    "stty",
    "cut",
    "ip",
    "capsh",
    "unshare",
    "nproc",
    "sha256sum",
    "find",
    "mknod",
    "du",
    "setsid",
    "nice",
    "basename",
    "sync",
];

fn find_tool(name: &str) -> Option<PathBuf> {
    ["/bin", "/usr/bin", "/sbin", "/usr/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.exists())
}

/// Interpreters and shared libraries of `programs`, as the dynamic linker finds them: name -> file.
fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd")
        .args(programs)
        .output()
        .context("run ldd (package libc-bin)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found: BTreeSet<_> = text
        .lines()
        .filter_map(|line| {
            let (before, _address) = line.rsplit_once(" (0x")?;
            let path = before
                .rsplit_once("=> ")
                .map_or(before, |(_, path)| path)
                .trim();
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect();
    if found.is_empty() {
        bail!(
            "ldd names no library: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(found)
}

/// The layer with a shell's worth of the host's own tools, users and groups, and the page server.
pub fn toolbox_layer() -> Result<Layer> {
    let mut layer = LayerBuilder::new();
    for dir in [
        "bin", "etc", "root", "home", "proc", "sys", "dev", "mnt", "usr", "usr/bin", "var",
        "var/run", "srv",
    ] {
        layer = layer.dir(dir);
    }
    layer = layer.dir_mode("tmp", 0o1777);
    let tools: BTreeMap<&str, PathBuf> = TOOLS
        .iter()
        .filter_map(|name| Some((*name, find_tool(name)?)))
        .collect();
    if !tools.contains_key("sh") {
        bail!("no /bin/sh on this host");
    }
    let programs: Vec<_> = tools.values().cloned().collect();
    for (name, source) in &tools {
        layer = layer.copy(source, &format!("bin/{name}"))?;
    }
    let mut parents = BTreeSet::new();
    for library in libraries(&programs)? {
        let path = library.to_string_lossy().into_owned();
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            if parents.insert(path[..at].to_owned()) {
                layer = layer.dir(&path[..at]);
            }
        }
        layer = layer.copy(&library, path)?;
    }
    layer = layer
        .file("etc/passwd", 0o644, PASSWD)
        .file("etc/group", 0o644, GROUP)
        .file(
            "etc/nsswitch.conf",
            0o644,
            "passwd: files\ngroup: files\nhosts: files dns\n",
        );
    let layer = layer.copy(&page_server()?, "bin/page-server")?;
    Ok(layer.build())
}

/// A shell's worth of tools; runs `page-server` if nothing else is asked for.
pub fn toolbox() -> Result<Image> {
    Ok(ImageBuilder::new(vec![toolbox_layer()?])
        .set("Cmd", json!(["/bin/page-server"]))
        .set("Env", json!(["PATH=/bin:/usr/bin", "FROM_IMAGE=yes"]))
        .set("ExposedPorts", json!({"8080/tcp": {}}))
        .build())
}

/// Nothing but the static page server: one small file.
pub fn page_image() -> Result<Image> {
    let layer = LayerBuilder::new()
        .dir("bin")
        .copy(&page_server()?, "bin/page-server")?
        .build();
    Ok(ImageBuilder::new(vec![layer])
        .set("Entrypoint", json!(["/bin/page-server"]))
        .build())
}

/// What holds the namespaces of a pod for engines that need a process for it.
pub fn pause_image() -> Result<Image> {
    let layer = LayerBuilder::new()
        .dir("bin")
        .copy(&page_server()?, "bin/page-server")?
        .build();
    Ok(ImageBuilder::new(vec![layer])
        .set("Entrypoint", json!(["/bin/page-server", "--pause"]))
        .build())
}

/// The smallest image that is one: a text file.
pub fn tiny(text: &str) -> Image {
    ImageBuilder::new(vec![LayerBuilder::new().file("text", 0o644, text).build()])
        .set("Cmd", json!(["/text"]))
        .build()
}

/// Writes `image` as an OCI image layout directory.
pub fn write_layout(image: &Image, tag: &str, dir: &Path) -> io::Result<()> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let name = |digest: &str| blobs.join(digest.trim_start_matches("sha256:"));
    for (digest, blob) in &image.blobs {
        fs::write(name(digest), blob)?;
    }
    fs::write(name(&image.digest), &image.manifest)?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": image.media_type,
            "digest": image.digest,
            "size": image.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }],
    });
    fs::write(dir.join("index.json"), index.to_string())
}
