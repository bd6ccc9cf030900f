//! What GNU tar makes of an archive of GNU tar is what we make of it.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
};

use rustix::fs::{CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, mknodat, setxattr};

use super::{Host, list};

fn tar(dir: &Path, arguments: &[&str]) {
    let output = Command::new("tar")
        .current_dir(dir)
        .args(arguments)
        .output()
        .expect("GNU tar is installed");
    assert!(
        output.status.success(),
        "tar {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A tree with everything that a layer has.
fn make_tree(root: &Path) {
    let long = root
        .join("l".repeat(120))
        .join("m".repeat(200))
        .join("n".repeat(255));
    for dir in ["bin", "tmp", "var/lib/gr\u{fc}n", "dev", "empty"] {
        fs::create_dir_all(root.join(dir)).expect("new directory");
    }
    fs::create_dir_all(&long).expect("new directory");
    for (path, content) in [
        ("bin/su", "set-user-ID".to_owned()),
        ("bin/ping", "with a capability".to_owned()),
        ("var/lib/gr\u{fc}n/\u{732b}", "unicode".to_owned()),
        ("var/big", "0123456789abcdef".repeat(70_000)),
        ("var/block", "x".repeat(512)),
        ("var/none", String::new()),
        ("var/owned", "by a large number".to_owned()),
    ] {
        fs::write(root.join(path), content).expect("new file");
    }
    fs::write(long.join("f"), "deep").expect("new file");
    fs::hard_link(root.join("bin/su"), root.join("bin/sudo")).expect("new link");
    fs::hard_link(root.join("bin/su"), root.join("var/su")).expect("new link");
    symlink("../bin/su", root.join("var/link")).expect("new link");
    symlink("t".repeat(300), root.join("var/long-link")).expect("new link");
    let sparse = fs::File::create(root.join("var/sparse")).expect("new file");
    for offset in (0..40).map(|part| part * 1_000_000) {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &[b's'; 5000], offset)
            .expect("room for it");
    }
    sparse.set_len(50_000_000).expect("room for it");
    for (path, kind, major, minor) in [
        ("dev/null", FileType::CharacterDevice, 1, 3),
        ("dev/loop", FileType::BlockDevice, 7, 200),
        ("dev/fifo", FileType::Fifo, 0, 0),
    ] {
        let device = rustix::fs::makedev(major, minor);
        mknodat(CWD, root.join(path), kind, Mode::RUSR, device).expect("we are root");
    }
    std::os::unix::fs::chown(root.join("var/owned"), Some(3_000_000_000), Some(70_000))
        .expect("we are root");
    std::os::unix::fs::lchown(root.join("var/link"), Some(12), Some(34)).expect("we are root");
    for (path, mode) in [
        ("bin/su", 0o4755),
        ("tmp", 0o1777),
        ("empty", 0o2570),
        ("var/none", 0),
        ("bin/ping", 0o755),
    ] {
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).expect("ours");
    }
}

fn set_attributes(root: &Path) {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    for (path, name, value) in [
        ("bin/ping", "security.capability", &capability[..]),
        ("bin/ping", "user.note", b"a\0b=c\n"),
        ("tmp", "user.dir", b"1"),
    ] {
        setxattr(root.join(path), name, value, XattrFlags::empty()).expect("it takes attributes");
    }
}

/// Times that differ from each other and from now, deepest first.
fn set_times(root: &Path) {
    let mut paths: Vec<String> = list(root).into_keys().collect();
    paths.sort_by_key(|path| std::cmp::Reverse(path.len()));
    let mut pending = vec![root.to_owned()];
    let mut all = Vec::new();
    while let Some(path) = pending.pop() {
        if path.is_dir() && !path.is_symlink() {
            pending.extend(
                fs::read_dir(&path)
                    .expect("a directory")
                    .map(|entry| entry.expect("a readable directory").path()),
            );
        }
        all.push(path);
    }
    for (at, path) in all.iter().rev().enumerate() {
        let time = Timespec {
            tv_sec: 1_000_000_000 + at as i64,
            tv_nsec: 123_456_700 + at as i64,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(CWD, path, &times, flags).expect("ours");
    }
}

fn check(format: &[&str], with_attributes: bool) {
    let host = Host::new();
    let (source, expected) = (host.path().join("source"), host.path().join("expected"));
    fs::create_dir(&source).expect("new directory");
    fs::create_dir(&expected).expect("new directory");
    make_tree(&source);
    if with_attributes {
        set_attributes(&source);
    }
    set_times(&source);
    let archive = host.path().join("archive.tar");
    let archive_name = archive.to_str().expect("our own name");
    let mut create = vec!["--create", "--file", archive_name, "--numeric-owner"];
    create.extend(format);
    create.push(".");
    tar(&source, &create);
    let attributes = ["--xattrs", "--xattrs-include=*"];
    let extract = [
        "--extract",
        "--file",
        archive_name,
        "--preserve-permissions",
        "--same-owner",
        "--numeric-owner",
        attributes[0],
        attributes[1],
    ];
    tar(&expected, &extract);
    let bytes = fs::read(&archive).expect("tar made it");
    host.unpack("1", &bytes)
        .unwrap_or_else(|error| panic!("{format:?}: {error:?}"));
    let (mut ours, mut theirs) = (host.list("1"), list(&expected));
    for path in theirs.keys() {
        assert!(ours.contains_key(path), "{format:?}: no {path}");
    }
    for (path, ours) in &mut ours {
        let theirs = theirs
            .remove(path)
            .unwrap_or_else(|| panic!("{format:?}: also {path}"));
        assert_eq!(*ours, theirs, "{format:?}: {path}");
    }
    let sparse = fs::metadata(host.path().join("layers/1/var/sparse")).expect("unpacked");
    if format.contains(&"--sparse") {
        assert!(
            sparse.blocks() * 512 < 1_000_000,
            "{format:?}: {}",
            sparse.blocks()
        );
    }
}

#[test]
fn gnu_format() {
    check(&["--format=gnu"], false);
}

#[test]
fn gnu_format_with_holes() {
    check(&["--format=gnu", "--sparse"], false);
}

#[test]
fn pax_format() {
    check(&["--format=posix", "--xattrs", "--xattrs-include=*"], true);
}

#[test]
fn pax_format_with_holes() {
    for version in ["0.0", "0.1", "1.0"] {
        let version = format!("--sparse-version={version}");
        check(
            &[
                "--format=posix",
                "--sparse",
                &version,
                "--xattrs",
                "--xattrs-include=*",
            ],
            true,
        );
    }
}
