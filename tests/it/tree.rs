//! The tree that the agent makes of layers, compared with what `tar` makes of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use longshore_tests::{
    images::{ImageBuilder, Layer, LayerBuilder, Packing},
    pods::{Bench, container, pod},
    registry::digest_of,
    skip,
};

/// Everything about every path below `root` on its filesystem, except what a container gets mounted.
fn describe(root: &Path) -> Result<BTreeMap<String, String>> {
    const MOUNTED: [&str; 6] = [
        "/proc",
        "/sys",
        "/dev",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
    ];
    let mut all = BTreeMap::new();
    let mut first_of_inode: BTreeMap<(u64, u64), String> = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        let mut entries: Vec<PathBuf> = fs::read_dir(&dir)
            .with_context(|| dir.display().to_string())?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        entries.sort();
        for path in entries {
            let name = format!("/{}", path.strip_prefix(root)?.display());
            if MOUNTED.contains(&name.as_str()) {
                continue;
            }
            let meta = fs::symlink_metadata(&path)?;
            let kind = meta.file_type();
            let what = if kind.is_dir() {
                todo.push(path.clone());
                "directory".to_owned()
            } else if kind.is_symlink() {
                format!("link to {}", fs::read_link(&path)?.display())
            } else if kind.is_file() {
                format!(
                    "file of {} bytes, {}",
                    meta.size(),
                    digest_of(&fs::read(&path)?)
                )
            } else if kind.is_char_device() || kind.is_block_device() {
                format!("device {:#x}", meta.rdev())
            } else {
                "special file".to_owned()
            };
            let twin = if kind.is_file() && meta.nlink() > 1 {
                first_of_inode
                    .entry((meta.dev(), meta.ino()))
                    .or_insert_with(|| name.clone())
                    .clone()
            } else {
                String::new()
            };
            let links = if kind.is_dir() { 0 } else { meta.nlink() };
            // A container gets files of its own mounted here, and what they are mounted on is made.
            let modified = if name == "/etc" { 0 } else { meta.mtime() };
            all.insert(
                name,
                format!(
                    "{what}, mode {:o}, owner {}:{}, modified {}, links {links} {twin}, attributes {:?}",
                    meta.mode(),
                    meta.uid(),
                    meta.gid(),
                    modified,
                    attributes(&path)?
                ),
            );
        }
    }
    Ok(all)
}

fn attributes(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut names = vec![0; 4096];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => {
            return Err(error).with_context(|| format!("attributes of {}", path.display()));
        }
    };
    let mut all = BTreeMap::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let name = String::from_utf8_lossy(name).into_owned();
        let mut value = vec![0; 4096];
        let length = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..])?;
        all.insert(name, hex::encode(&value[..length]));
    }
    Ok(all)
}

/// What GNU tar makes of these layers, one over the other; whiteouts are the caller's business.
fn by_tar(layers: &[&Layer], dir: &Path) -> Result<()> {
    for layer in layers {
        let file = dir.with_extension("tar");
        fs::write(&file, &layer.tar)?;
        let status = Command::new("tar")
            .args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"])
            .arg(&file)
            .arg("-C")
            .arg(dir)
            .status()?;
        fs::remove_file(&file)?;
        if !status.success() {
            bail!("tar: {status}");
        }
    }
    Ok(())
}

/// Starts a container of `image` and answers its root as the host sees it.
async fn root_of(
    bench: &mut Bench,
    pod: &longshore_tests::pods::Pod,
    config: longshore_proto::cri::v1::ContainerConfig,
) -> Result<PathBuf> {
    let id = bench.launch(pod, config).await?;
    let request = longshore_proto::cri::v1::ContainerStatusRequest {
        container_id: id,
        verbose: true,
    };
    let response = bench.runtime.container_status(request).await?.into_inner();
    let info: serde_json::Value =
        serde_json::from_str(response.info.get("info").context("verbose info")?)?;
    let pid = info["pid"].as_u64().context("a pid in the verbose info")?;
    Ok(format!("/proc/{pid}/root").into())
}

fn expect_same(found: &BTreeMap<String, String>, expected: &BTreeMap<String, String>) {
    let mut differences = Vec::new();
    for (path, what) in expected {
        match found.get(path) {
            None => differences.push(format!("- {path}: {what}")),
            Some(other) if other != what => {
                differences.push(format!("! {path}: {other}\n    should be: {what}"))
            }
            Some(_) => {}
        }
    }
    for path in found.keys().filter(|path| !expected.contains_key(*path)) {
        differences.push(format!("+ {path}"));
    }
    let shown: Vec<_> = differences.iter().take(30).cloned().collect();
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        shown.join("\n")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_entries_become_what_tar_makes_of_them() -> Result<()> {
    let mut bench = Bench::start().await?;
    let base = longshore_tests::images::toolbox_layer()?;
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let long = format!("odd/{}/{}", "long-name-".repeat(20), "x".repeat(200));
    let layer = LayerBuilder::new()
        .dir_mode("odd", 0o1777)
        .entry(
            tar::EntryType::Regular,
            "odd/setuid",
            None,
            0o6755,
            (1000, 50000),
            b"s",
        )
        .file("odd/one", 0o640, "one")
        .hardlink("odd/two", "odd/one")
        .symlink("odd/dangling", "/no/where")
        .dir(&format!("odd/{}", "long-name-".repeat(20)))
        .file(&long, 0o600, "long")
        .xattrs(&[("security.capability", &capability), ("user.note", b"kept")])
        .file("odd/capable", 0o755, "c")
        .device("odd/null", 1, 3)
        .entry(tar::EntryType::Fifo, "odd/fifo", None, 0o622, (0, 0), &[])
        .entry(
            tar::EntryType::Regular,
            "odd/nobody",
            None,
            0o444,
            (65534, 65534),
            b"n",
        )
        .build();
    let image = ImageBuilder::new(vec![base.clone(), layer.clone()]).build();
    bench.offer("odd:1", &image).await?;
    let pod = bench.run(pod("odd")).await?;
    let reference = bench.registry.reference("odd:1");
    let root = root_of(
        &mut bench,
        &pod,
        container("main", &reference, &["sleep", "1000"]),
    )
    .await?;
    let expected = bench.node.dir().join("expected");
    fs::create_dir(&expected)?;
    by_tar(&[&base, &layer], &expected)?;
    expect_same(
        &describe(&root.join("odd"))?,
        &describe(&expected.join("odd"))?,
    );
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whiteouts_and_opaque_directories_hide_what_is_below() -> Result<()> {
    let mut bench = Bench::start().await?;
    let base = longshore_tests::images::toolbox_layer()?;
    let below = LayerBuilder::new()
        .dir("w")
        .dir("w/opaque")
        .file("w/opaque/old", 0o644, "old")
        .dir("w/gone")
        .file("w/gone/inside", 0o644, "old")
        .file("w/file", 0o644, "old")
        .file("w/kept", 0o644, "kept")
        .dir("w/becomes-file")
        .file("w/becomes-file/x", 0o644, "x")
        .file("w/becomes-dir", 0o644, "x")
        .build();
    let above = LayerBuilder::new()
        .dir("w")
        .whiteout("w/gone")
        .whiteout("w/file")
        .dir("w/opaque")
        .opaque("w/opaque")
        .file("w/opaque/new", 0o644, "new")
        .file("w/becomes-file", 0o644, "now a file")
        .dir("w/becomes-dir")
        .file("w/becomes-dir/y", 0o644, "y")
        .whiteout("w/never-was")
        .build()
        .packed(Packing::Zstd);
    let again = LayerBuilder::new()
        .dir("w/gone")
        .file("w/gone/again", 0o644, "again")
        .build();
    let image = ImageBuilder::new(vec![base, below, above, again]).build();
    bench.offer("whiteouts:1", &image).await?;
    let pod = bench.run(pod("whiteouts")).await?;
    let reference = bench.registry.reference("whiteouts:1");
    let config = longshore_tests::pods::script(
        "main",
        &reference,
        "cd /w && find . -type f | sort && cat becomes-file && echo",
    );
    let (_, output) = bench.run_to_end(&pod, config).await?;
    assert_eq!(
        output,
        "./becomes-dir/y\n./becomes-file\n./gone/again\n./kept\n./opaque/new\nnow a file\n"
    );
    bench.finish().await
}

/// A directory's entry, to be repeated in each layer that has something below it.
struct Dir {
    path: String,
    header: tar::Header,
    extensions: Vec<(String, Vec<u8>)>,
}

#[derive(Default)]
struct Part {
    tar: Option<tar::Builder<Vec<u8>>>,
    dirs: BTreeSet<String>,
}

impl Part {
    fn tar(&mut self) -> &mut tar::Builder<Vec<u8>> {
        self.tar
            .get_or_insert_with(|| tar::Builder::new(Vec::new()))
    }

    fn extensions(&mut self, extensions: &[(String, Vec<u8>)]) -> Result<()> {
        let named = extensions
            .iter()
            .filter(|(key, _)| key != "path" && key != "linkpath")
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        Ok(self.tar().append_pax_extensions(named)?)
    }

    /// Adds the directories above `name` that are not here yet, as image builders do.
    fn parents(&mut self, name: &str, dirs: &BTreeMap<String, Dir>) -> Result<()> {
        for (at, _) in name.match_indices('/') {
            if let Some(dir) = dirs.get(&name[..at])
                && self.dirs.insert(name[..at].to_owned())
            {
                self.extensions(&dir.extensions)?;
                self.tar()
                    .append_data(&mut dir.header.clone(), &dir.path, &[][..])?;
            }
        }
        Ok(())
    }
}

/// Splits a tar into `count` layers; a hard link stays with its target.
fn split(tar: &Path, count: usize) -> Result<Vec<Layer>> {
    let mut parts: Vec<Part> = (0..count).map(|_| Part::default()).collect();
    let mut home: BTreeMap<String, usize> = BTreeMap::new();
    let mut dirs: BTreeMap<String, Dir> = BTreeMap::new();
    let total = fs::metadata(tar)?.len();
    let mut archive = tar::Archive::new(fs::File::open(tar)?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let extensions: Vec<(String, Vec<u8>)> = match entry.pax_extensions()? {
            None => Vec::new(),
            Some(list) => list
                .map(|item| {
                    let item = item?;
                    Ok((item.key()?.to_owned(), item.value_bytes().to_owned()))
                })
                .collect::<Result<_>>()?,
        };
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = path
            .trim_start_matches("./")
            .trim_end_matches('/')
            .to_owned();
        if name.is_empty() {
            continue;
        }
        let mut header = entry.header().clone();
        if header.entry_type().is_dir() {
            dirs.insert(
                name.clone(),
                Dir {
                    path: path.clone(),
                    header: header.clone(),
                    extensions: extensions.clone(),
                },
            );
        }
        let link = entry
            .link_name_bytes()
            .map(|link| String::from_utf8_lossy(&link).into_owned());
        let by_place = usize::try_from(entry.raw_header_position() * count as u64 / total.max(1))?
            .min(count - 1);
        let at = match &link {
            Some(target) if header.entry_type().is_hard_link() => *home
                .get(target.trim_start_matches("./"))
                .unwrap_or(&by_place),
            _ => by_place,
        };
        home.insert(name.clone(), at);
        let part = &mut parts[at];
        part.parents(&name, &dirs)?;
        if header.entry_type().is_dir() && !part.dirs.insert(name) {
            continue;
        }
        let mut data = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut data)?;
        part.extensions(&extensions)?;
        match link {
            Some(target) => part.tar().append_link(&mut header, &path, &target)?,
            None => part.tar().append_data(&mut header, &path, &*data)?,
        }
    }
    parts
        .into_iter()
        .map(|mut part| {
            let tar = part
                .tar
                .take()
                .unwrap_or_else(|| tar::Builder::new(Vec::new()));
            Ok(Layer {
                tar: tar.into_inner()?.into(),
                packing: Packing::Gzip,
            })
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_debian_root_file_system_is_what_tar_makes_of_it() -> Result<()> {
    let Some(tar) = std::env::var_os("LONGSHORE_DEBIAN_TAR") else {
        skip(
            "tree::a_debian_root_file_system_is_what_tar_makes_of_it",
            "no LONGSHORE_DEBIAN_TAR (cargo verify makes one by debootstrap)",
        );
        return Ok(());
    };
    let mut bench = Bench::start().await?;
    let layers = split(Path::new(&tar), 8)?;
    let image = ImageBuilder::new(layers.clone()).build();
    bench.offer("debian:1", &image).await?;
    let pod = bench.run(pod("debian")).await?;
    let reference = bench.registry.reference("debian:1");
    let root = root_of(
        &mut bench,
        &pod,
        container("main", &reference, &["sleep", "1000"]),
    )
    .await?;
    let expected = bench.node.dir().join("expected");
    fs::create_dir(&expected)?;
    by_tar(&layers.iter().collect::<Vec<_>>(), &expected)?;
    let (found, expected) = (describe(&root)?, describe(&expected)?);
    assert!(expected.len() > 5_000, "only {} paths", expected.len());
    expect_same(&found, &expected);
    bench.finish().await
}
