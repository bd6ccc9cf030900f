//! Reading through layers by ourselves shows what overlayfs shows.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use longshore_sys::{mount::overlay_for_reading, path::open_in_root};
use proptest::{collection::vec, prelude::*};
use rustix::fs::{Mode, OFlags};

use super::{
    super::{Layer, RootfsError, merge, visible},
    Host,
    archive::Archive,
};

struct Stack {
    host: Host,
    layers: Vec<Layer>,
}

impl Stack {
    fn new(archives_base_first: &[Vec<u8>]) -> Self {
        let host = Host::new();
        let unpack = |(at, archive): (usize, &Vec<u8>)| {
            let dir = at as u32 + 1;
            let unpacked = host.unpack(&dir.to_string(), archive).ok()?;
            Some(Layer {
                diff_id: unpacked.diff_id,
                dir,
                size_bytes: unpacked.size_bytes,
                inodes: unpacked.inodes,
                opaque: unpacked.opaque,
            })
        };
        let layers = archives_base_first
            .iter()
            .enumerate()
            .filter_map(unpack)
            .collect();
        Self { host, layers }
    }

    fn layers_dir(&self) -> PathBuf {
        self.host.path().join("layers")
    }

    fn ours(&self, path: &str) -> Result<Option<Vec<u8>>, RootfsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let open = |layer: &Layer| {
            let path = self.layers_dir().join(layer.dir.to_string());
            let fd = rustix::fs::open(path, flags, Mode::empty()).expect("unpacked");
            merge::Part {
                fd,
                path: layer.dir.to_string().into(),
            }
        };
        merge::read_file(visible(&self.layers).map(open).collect(), path, 1000)
    }

    /// Each path as the kernel's overlay shows it: content, or `None` for no file.
    fn theirs(&self, paths: &[String]) -> Vec<Option<Vec<u8>>> {
        let lower: Vec<String> = visible(&self.layers)
            .map(|layer| layer.dir.to_string())
            .collect();
        let root = overlay_for_reading(&self.layers_dir(), &lower).expect("overlayfs");
        paths
            .iter()
            .map(|path| {
                let opened = open_in_root(&root, Path::new(path), OFlags::RDONLY, 0).ok()?;
                let mut content = Vec::new();
                fs::File::from(opened).read_to_end(&mut content).ok()?;
                Some(content)
            })
            .collect()
    }
}

fn new() -> Archive {
    Archive::default()
}

#[test]
fn files_links_and_whiteouts() {
    let stack = Stack::new(&[
        new()
            .file("etc/passwd", "base")
            .file("etc/group", "base")
            .file("usr/lib/os-release", "name")
            .link("etc/os-release", "../usr/lib/os-release")
            .link("lib", "usr/lib")
            .link("etc/loop", "loop")
            .link("etc/out", "../../../../../etc/passwd")
            .file("opaque/old", "old")
            .file("gone/file", "old")
            .file("file-then-dir", "old")
            .dir("dir-then-file")
            .device(b'3', "null", 1, 3)
            .entry(b'6', "fifo", "", b"")
            .file("big", &"x".repeat(1001))
            .end(),
        new()
            .file("etc/passwd", "top")
            .file("etc/.wh.group", "")
            .file("opaque/.wh..wh..opq", "")
            .file("opaque/new", "new")
            .file(".wh.gone", "")
            .file("file-then-dir/x", "in dir")
            .file("dir-then-file", "file")
            .link("absolute", "/etc/passwd")
            .end(),
    ]);
    let text = |path: &str| {
        let content = stack
            .ours(path)
            .unwrap_or_else(|error| panic!("{path}: {error:?}"))?;
        Some(String::from_utf8(content).expect("text"))
    };
    for (path, expected) in [
        ("/etc/passwd", Some("top")),
        ("etc/passwd", Some("top")),
        ("/etc/group", None),
        ("/etc/os-release", Some("name")),
        ("/lib/os-release", Some("name")),
        ("/etc/out", Some("top")),
        ("/../../etc/passwd", Some("top")),
        ("/absolute", Some("top")),
        ("/opaque/old", None),
        ("/opaque/new", Some("new")),
        ("/gone/file", None),
        ("/file-then-dir/x", Some("in dir")),
        ("/dir-then-file", Some("file")),
        ("/dir-then-file/x", None),
        ("/none", None),
        ("/none/none", None),
        ("/etc/passwd/none", None),
    ] {
        assert_eq!(text(path).as_deref(), expected, "{path}");
    }
    for path in ["/", "/etc", "/null", "/fifo", "/lib"] {
        let result = stack.ours(path);
        assert!(
            matches!(result, Err(RootfsError::NotAFile { .. })),
            "{path}: {result:?}"
        );
    }
    assert!(matches!(
        stack.ours("/etc/loop"),
        Err(RootfsError::SymlinkLoop { .. })
    ));
    assert!(matches!(
        stack.ours("/big"),
        Err(RootfsError::FileTooLarge {
            limit_bytes: 1000,
            ..
        })
    ));
}

#[test]
fn an_opaque_root_hides_all_below() {
    let stack = Stack::new(&[
        new().file("old", "old").end(),
        new().file(".wh..wh..opq", "").file("new", "new").end(),
        new().file("newer", "newer").end(),
    ]);
    assert_eq!(stack.ours("/old").expect("readable"), None);
    assert_eq!(
        stack.ours("/new").expect("readable").as_deref(),
        Some(&b"new"[..])
    );
    assert_eq!(
        stack.ours("/newer").expect("readable").as_deref(),
        Some(&b"newer"[..])
    );
}

/// One entry of a random layer: what, where, link target.
pub(super) type Step = (u8, String, String);

fn name() -> impl Strategy<Value = String> {
    vec(prop_oneof![Just("a"), Just("b"), Just("c")], 1..4).prop_map(|parts| parts.join("/"))
}

pub(super) fn layer() -> impl Strategy<Value = Vec<Step>> {
    let target = prop_oneof![
        name(),
        name().prop_map(|name| format!("/{name}")),
        name().prop_map(|name| format!("../{name}")),
    ];
    vec((0..6_u8, name(), target), 1..8)
}

pub(super) fn archive(steps: &[Step], content: &str) -> Vec<u8> {
    let mut archive = new();
    for (kind, name, target) in steps {
        let (parent, last) = name.rsplit_once('/').unwrap_or(("", name));
        archive = match kind {
            0 | 1 => archive.file(name, &format!("{content}:{name}")),
            2 => archive.dir(name),
            3 => archive.link(name, target),
            4 => archive.file(&format!("{parent}/.wh.{last}"), ""),
            _ => archive.file(&format!("{name}/.wh..wh..opq"), ""),
        };
    }
    archive.end()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn as_overlayfs_shows_it(layers in vec(layer(), 2..5)) {
        let archives: Vec<Vec<u8>> = layers
            .iter()
            .enumerate()
            .map(|(at, steps)| archive(steps, &at.to_string()))
            .collect();
        let stack = Stack::new(&archives);
        prop_assume!(stack.layers.len() > 1);
        let letters = ["a", "b", "c"];
        let mut paths: Vec<String> = letters.map(str::to_owned).to_vec();
        for _ in 0..2 {
            let deeper: Vec<String> = paths
                .iter()
                .flat_map(|path| letters.map(|letter| format!("{path}/{letter}")))
                .collect();
            paths.extend(deeper);
        }
        for (path, theirs) in paths.iter().zip(stack.theirs(&paths)) {
            let ours = stack.ours(path).ok().flatten();
            prop_assert_eq!(ours, theirs, "{}", path);
        }
    }
}
