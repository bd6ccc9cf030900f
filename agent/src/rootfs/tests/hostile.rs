//! Archives that want something they must not get, and archives that only look like it.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use super::{
    super::{HeaderFault, LayerError, LimitKind, Limits, PathFault, remove, unpack},
    Host,
    archive::{Archive, header},
};

fn new() -> Archive {
    Archive::default()
}

/// The archive must be refused with an error that `expected` knows, and leave no trace.
fn refused(what: &str, archive: &[u8], expected: impl Fn(&LayerError) -> bool) {
    let host = Host::new();
    match host.unpack("1", archive) {
        Ok(_) => panic!("{what}: was unpacked: {:#?}", host.list("1")),
        Err(error) => assert!(expected(&error), "{what}: {error:?}"),
    }
    let layers = host.layer("other").path().parent().map(Path::to_owned);
    let layers = fs::File::open(layers.expect("it has a parent")).expect("a directory");
    let gone = remove::remove_tree(rustix::fd::AsFd::as_fd(&layers), "1");
    assert_eq!(gone, Ok(()), "{what}");
    assert_eq!(host.outside().len(), 2, "{what}");
    assert!(!host.path().join("layers/1").exists(), "{what}");
}

/// The archive must unpack to exactly these paths, each with the start of its description.
fn unpacks(what: &str, archive: &[u8], expected: &[(&str, &str)]) -> Host {
    let host = Host::new();
    let unpacked = host
        .unpack("1", archive)
        .unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let mut listing = host.list("1");
    assert_eq!(unpacked.inodes, usage_inodes(&host), "{what}");
    listing.remove("");
    for (path, start) in expected {
        let found = listing
            .remove(*path)
            .unwrap_or_else(|| panic!("{what}: no {path} in {listing:#?}"));
        assert!(
            found.starts_with(start),
            "{what}: {path} is {found}, not {start}"
        );
    }
    assert!(listing.is_empty(), "{what}: also {listing:#?}");
    host
}

/// Inodes of the layer.
fn usage_inodes(host: &Host) -> u64 {
    let mut inodes = std::collections::HashSet::new();
    let mut pending = vec![host.path().join("layers/1")];
    while let Some(path) = pending.pop() {
        let meta = fs::symlink_metadata(&path).expect("it was listed");
        if !inodes.insert(meta.ino()) {
            continue;
        }
        if meta.is_dir() {
            pending.extend(
                fs::read_dir(&path)
                    .expect("a directory")
                    .map(|entry| entry.expect("a readable directory").path()),
            );
        }
    }
    inodes.len() as u64
}

fn path_fault(wanted: PathFault) -> impl Fn(&LayerError) -> bool {
    move |error| matches!(error, LayerError::Path { fault, .. } if *fault == wanted)
}

fn header_fault(wanted: HeaderFault) -> impl Fn(&LayerError) -> bool {
    move |error| matches!(error, LayerError::Header { fault, .. } if *fault == wanted)
}

#[test]
fn names_never_lead_out() {
    for name in [
        "../outside/x",
        "a/../../outside/x",
        "..",
        "a/..",
        "/../x",
        "./../x",
    ] {
        let dot_dot = path_fault(PathFault::DotDot);
        refused(name, &new().file(name, "x").end(), &dot_dot);
        refused(name, &new().dir(name).end(), &dot_dot);
        refused(name, &new().link(name, "x").end(), &dot_dot);
        refused(name, &new().file("f", "x").hard(name, "f").end(), &dot_dot);
    }
    unpacks(
        "absolute names count from the root",
        &new().file("/etc/passwd", "x").dir("//a//./b/").end(),
        &[
            ("etc", "dir 0755 0:0 0.0"),
            ("etc/passwd", "file 1"),
            ("a", "dir"),
            ("a/b", "dir"),
        ],
    );
}

#[test]
fn names_have_a_form() {
    let long = "n".repeat(256);
    refused(
        "component",
        &new().file(&long, "").end(),
        path_fault(PathFault::ComponentTooLong),
    );
    let deep = "d/".repeat(2048);
    refused(
        "path",
        &new().file(&format!("{deep}x"), "").end(),
        path_fault(PathFault::TooLong),
    );
    refused(
        "NUL in PAX",
        &new().pax(&[("path", b"a\0b")]).file("x", "").end(),
        path_fault(PathFault::Nul),
    );
    refused(
        "no name",
        &new().file("", "").end(),
        path_fault(PathFault::Empty),
    );
    refused(
        "file for root",
        &new().file("./", "x").end(),
        path_fault(PathFault::Root),
    );
    refused(
        "link for root",
        &new().link("/", "/etc").end(),
        path_fault(PathFault::Root),
    );
    let longest = format!("{}/x", "n".repeat(255));
    unpacks(
        "255 bytes",
        &new().file(&longest, "").end(),
        &[(&longest[..255], "dir"), (&longest, "file 0")],
    );
    let deepest = "d/".repeat(2047) + "d";
    let host = Host::new();
    host.unpack("1", &new().file(&deepest, "x").end())
        .expect("4095 bytes fit");
}

#[test]
fn links_never_lead_out() {
    for target in [
        "/",
        "..",
        "../..",
        "../../outside",
        "/../../outside",
        "/proc/self/root",
    ] {
        let through = new()
            .link("out", target)
            .file("out/secret", "overwritten")
            .end();
        let host = Host::new();
        // Inside of the root the name may exist or be made; outside nothing changes.
        host.unpack("1", &through)
            .unwrap_or_else(|error| panic!("{target}: {error:?}"));
    }
    let host = Host::new();
    let outside = host.path().join("outside").display().to_string();
    for (at, archive) in [
        new().link("out", &outside).file("out/secret", "x"),
        new().link("out", &outside).dir("out/new/"),
        new().link("out", &outside).device(b'3', "out/null", 1, 3),
        new().link("out", &outside).link("out/link", "x"),
        new().link("out", &outside).file("out/.wh.secret", ""),
        new().link("out", &outside).file("out/.wh..wh..opq", ""),
        new()
            .link("a", &outside)
            .link("b", "a")
            .file("b/secret", "x"),
        new().link("out", &outside).file("out", "replaces the link"),
        new()
            .link("out", &outside)
            .dir("out")
            .file("out/secret", "x"),
        new()
            .link("out", &format!("{outside}/secret"))
            .file("out", "replaces the link"),
        new()
            .dir("d")
            .file("d/f", "")
            .link("d", &outside)
            .file("d/secret", "x"),
        new()
            .file("d/f", "")
            .link("d", &outside)
            .file("d/f", "x")
            .dir("d/n"),
    ]
    .into_iter()
    .enumerate()
    {
        host.unpack(&format!("link-{at}"), &archive.end())
            .unwrap_or_else(|error| panic!("{at}: {error:?}"));
    }
    let hard = new().link("out", &outside).hard("h", "out/secret").end();
    refused("hard link through a link", &hard, |error| {
        matches!(error, LayerError::LinkTarget { .. })
    });
    let looped = new().link("a", "b").link("b", "a").file("a/f", "");
    refused("loop", &looped.end(), |error| {
        matches!(error, LayerError::SymlinkLoop { .. })
    });
}

#[test]
fn links_inside_are_followed_to_directories() {
    unpacks(
        "merged /usr",
        &new()
            .dir("usr/lib")
            .link("lib", "usr/lib")
            .file("lib/x", "1")
            .file("lib/y", "2")
            .end(),
        &[
            ("usr", "dir"),
            ("usr/lib", "dir 0755 0:0 1000.0"),
            ("lib", "link usr/lib"),
            ("usr/lib/x", "file 1"),
            ("usr/lib/y", "file 1"),
        ],
    );
    unpacks(
        "a link to a directory of a lower layer: made here",
        &new().link("bin", "/usr/bin").file("bin/sh", "#").end(),
        &[
            ("bin", "link /usr/bin"),
            ("usr", "dir 0755 0:0 0.0"),
            ("usr/bin", "dir"),
            ("usr/bin/sh", "file 1"),
        ],
    );
    unpacks(
        "up and down",
        &new()
            .dir("a/b")
            .link("a/b/up", "../../../../c/./")
            .file("a/b/up/f", "")
            .end(),
        &[
            ("a", "dir"),
            ("a/b", "dir"),
            ("a/b/up", "link ../../../../c/./"),
            ("c", "dir"),
            ("c/f", "file 0"),
        ],
    );
    unpacks(
        "a link to the root",
        &new()
            .link("a", "/")
            .file("a/f", "")
            .hard("a/g", "a/f")
            .end(),
        &[("a", "link /"), ("f", "file 0"), ("g", "file 0")],
    );
    refused(
        "below a file",
        &new().file("a", "").file("a/b", "").end(),
        |error| matches!(error, LayerError::ParentNotDirectory { path } if path == Path::new("a")),
    );
}

#[test]
fn hard_links_stay_in_their_layer() {
    let target = |error: &LayerError| matches!(error, LayerError::LinkTarget { .. });
    refused("missing", &new().hard("a", "etc/passwd").end(), target);
    refused("host", &new().hard("a", "/etc/passwd").end(), target);
    refused(
        "to a directory",
        &new().dir("d").hard("a", "d").end(),
        target,
    );
    refused("to the root", &new().hard("a", "/").end(), target);
    refused("to itself", &new().hard("a", "a").end(), target);
    refused(
        "whiteout",
        &new().file(".wh.f", "").hard("a", "f").end(),
        target,
    );
    refused(
        "into itself",
        &new().file("d/f", "").hard("d", "d/f").end(),
        target,
    );
    refused(
        "upwards",
        &new().hard("a", "../outside/secret").end(),
        path_fault(PathFault::DotDot),
    );
    unpacks(
        "good ones",
        &new()
            .file("f", "one")
            .hard("d/g", "f")
            .hard("f", "f")
            .hard("f", "d/g")
            .link("s", "nowhere")
            .hard("t", "s")
            .end(),
        &[
            ("f", "file 3 "),
            ("d", "dir"),
            ("d/g", "file 3 "),
            ("s", "link nowhere"),
            ("t", "link nowhere"),
        ],
    );
}

#[test]
fn whiteouts_are_names_of_lower_files() {
    let whiteout = |error: &LayerError| matches!(error, LayerError::Whiteout { .. });
    for name in [
        ".wh.",
        ".wh..",
        ".wh...",
        "a/.wh.",
        ".wh../x",
        ".wh.a/b",
        "d/.wh.a/b",
        ".wh..wh.x",
        ".wh..wh..opq/x",
        "d/.wh..wh.aufs",
    ] {
        refused(name, &new().file(name, "").end(), whiteout);
    }
    let host = unpacks(
        "good ones",
        &new()
            .file(".wh.gone", "")
            .file("d/.wh.gone", "")
            .dir("o/")
            .file("o/.wh..wh..opq", "")
            .file("a.wh.b", "")
            .end(),
        &[
            ("gone", "char 0/0"),
            ("d", "dir"),
            ("d/gone", "char 0/0"),
            ("o", "dir 0755 0:0 1000.000000000 trusted.overlay.opaque=y"),
            ("a.wh.b", "file"),
        ],
    );
    assert!(!host.list("1")[""].contains("opaque"));
    unpacks(
        "what AUFS left behind",
        &new()
            .dir(".wh..wh.plnk")
            .file(".wh..wh.aufs", "")
            .file(".wh..wh.plnk/1.2", "x")
            .end(),
        &[],
    );
    let host = Host::new();
    let unpacked = host
        .unpack("1", &new().file(".wh..wh..opq", "").end())
        .expect("the root may be opaque");
    assert!(unpacked.opaque);
}

#[test]
fn whiteouts_spare_their_own_layer() {
    let opaque = "dir 0755 0:0 1000.000000000 trusted.overlay.opaque=y";
    unpacks(
        "file first",
        &new().file("a", "new").file(".wh.a", "").end(),
        &[("a", "file 3")],
    );
    unpacks(
        "whiteout first",
        &new().file(".wh.a", "").file("a", "new").end(),
        &[("a", "file 3")],
    );
    unpacks(
        "directory first",
        &new().dir("d").file("d/f", "").file(".wh.d", "").end(),
        &[("d", opaque), ("d/f", "file 0")],
    );
    unpacks(
        "whiteout first, then the directory",
        &new().file(".wh.d", "").dir("d").file("d/f", "").end(),
        &[("d", opaque), ("d/f", "file 0")],
    );
    unpacks(
        "whiteout first, then only a child",
        &new().file(".wh.d", "").file("d/f", "").end(),
        &[
            ("d", "dir 0755 0:0 0.000000000 trusted.overlay.opaque=y"),
            ("d/f", "file 0"),
        ],
    );
    unpacks(
        "twice",
        &new().file(".wh.a", "").file(".wh.a", "").end(),
        &[("a", "char 0/0")],
    );
}

#[test]
fn later_entries_win() {
    unpacks(
        "each over each",
        &new()
            .file("f", "old")
            .file("f", "new")
            .dir("d")
            .file("d/x", "1")
            .dir("d")
            .file("d/y", "2")
            .dir("gone/deep")
            .file("gone/deep/x", "")
            .file("gone", "now a file")
            .file("f2", "")
            .dir("f2")
            .link("l", "f")
            .file("l", "now a file")
            .file("s", "")
            .link("s", "f")
            .link("dl", "d")
            .dir("dl")
            .file("h", "")
            .hard("h", "f")
            .device(b'3', "n", 1, 3)
            .file("n", "no device")
            .end(),
        &[
            ("f", "file 3 "),
            ("h", "file 3 "),
            ("d", "dir"),
            ("d/x", "file 1"),
            ("d/y", "file 1"),
            ("gone", "file 10"),
            ("f2", "dir"),
            ("l", "file 10"),
            ("s", "link f"),
            ("dl", "dir"),
            ("n", "file 9"),
        ],
    );
    // A link stays a link to what it was made of.
    unpacks(
        "over a file with another name",
        &new()
            .file("a", "old")
            .hard("b", "a")
            .file("a", "newer")
            .end(),
        &[("a", "file 5"), ("b", "file 3")],
    );
    unpacks(
        "a directory again after a file: the attributes of the first do not come back",
        &new()
            .dir("d/e")
            .file("d", "")
            .dir("d")
            .file("d/x", "")
            .end(),
        &[("d", "dir"), ("d/x", "file 0")],
    );
}

#[test]
fn attributes_are_those_of_the_archive() {
    let set = |name: &str, kind: u8, mode: &str, uid: &str, mtime: &str| {
        let (mode, uid, mtime) = (mode.to_owned(), uid.to_owned(), mtime.to_owned());
        (
            header(kind, name.as_bytes(), 0),
            move |block: &mut [u8; 512]| {
                block[100..108].copy_from_slice(format!("{mode:0>7}\0").as_bytes());
                block[108..116].copy_from_slice(format!("{uid:0>7}\0").as_bytes());
                block[116..124].copy_from_slice(b"0000007\0");
                block[136..148].copy_from_slice(format!("{mtime:0>11}\0").as_bytes());
            },
        )
    };
    let mut archive = new();
    for (name, kind, mode, uid, mtime) in [
        ("./", b'5', "711", "1", "1"),
        ("t/", b'5', "1777", "2", "2"),
        ("t/g/", b'5', "2750", "3", "3"),
        ("t/g/f", b'0', "4755", "4", "4"),
        ("t/g/p", b'6', "600", "5", "5"),
        ("t/none", b'0', "0", "0", "6"),
        ("t/type", b'0', "0100644", "0", "7"),
    ] {
        let (block, change) = set(name, kind, mode, uid, mtime);
        archive = archive.raw(block, b"", change);
    }
    let host = unpacks(
        "modes",
        &archive.end(),
        &[
            ("t", "dir 1777 2:7 2.0"),
            ("t/g", "dir 2750 3:7 3.0"),
            (
                "t/g/f",
                &format!("file 0 {} 4755 4:7 4.0", "e3b0c44298fc1c14"),
            ),
            ("t/g/p", "fifo 0600 5:7 5.0"),
            (
                "t/none",
                &format!("file 0 {} 0000 0:7 6.0", "e3b0c44298fc1c14"),
            ),
            (
                "t/type",
                &format!("file 0 {} 0644 0:7 7.0", "e3b0c44298fc1c14"),
            ),
        ],
    );
    assert!(host.list("1")[""].starts_with("dir 0711 1:7 1.0"));
    // Blank fields are zero.
    let blank = new().raw(header(b'0', b"blank", 0), b"", |block| {
        block[100..148].fill(0)
    });
    let spaces = blank.raw(header(b'0', b"spaces", 0), b"", |block| {
        block[100..148].fill(b' ')
    });
    let empty = format!("file 0 {} 0000 0:0 0.0", "e3b0c44298fc1c14");
    unpacks(
        "blank",
        &spaces.end(),
        &[("blank", &empty), ("spaces", &empty)],
    );
    // PAX says it finer.
    let pax = new()
        .pax(&[
            ("path", "gr\u{fc}\u{df}e/\u{732b}".as_bytes()),
            ("uid", b"4000000000"),
            ("gid", b"5"),
            ("mtime", b"-1.25"),
            ("comment", b"ignored"),
        ])
        .file("short", "x");
    let name = "gr\u{fc}\u{df}e/\u{732b}"
        .as_bytes()
        .escape_ascii()
        .to_string();
    let host = unpacks(
        "pax",
        &pax.end(),
        &[
            (&name[.."gr\\xc3\\xbc\\xc3\\x9fe".len()], "dir"),
            (&name, "file 1"),
        ],
    );
    assert!(host.list("1")[&name].ends_with("0644 4000000000:5 -2.750000000"));
}

#[test]
fn owners_that_mean_nobody_are_refused() {
    let number = |name| header_fault(HeaderFault::Number(name));
    let big = new().raw(header(b'0', b"f", 0), b"", |block| {
        block[108..116].copy_from_slice(b"\x80\0\0\0\xff\xff\xff\xff");
    });
    refused("uid -1", &big.end(), number("uid"));
    let negative = new().raw(header(b'0', b"f", 0), b"", |block| {
        block[116..124].fill(0xff)
    });
    refused("negative gid", &negative.end(), number("gid"));
    let pax = new().pax(&[("uid", b"4294967295")]).file("f", "");
    refused("uid -1 in PAX", &pax.end(), header_fault(HeaderFault::Pax));
}

#[test]
fn attributes_of_the_host_are_not_the_layers_to_set() {
    for name in [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.x",
    ] {
        let record = format!("SCHILY.xattr.{name}");
        for archive in [
            new().pax(&[(&record, b"y")]).dir("d"),
            new().pax(&[(&record, b"/etc")]).file("f", ""),
            new().pax(&[(&record, b"y")]).dir("./"),
            new().pax(&[(&record, b"y")]).link("l", "x"),
        ] {
            refused(
                name,
                &archive.end(),
                |error| matches!(error, LayerError::Attribute { name: found, .. } if found == name),
            );
        }
    }
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let archive = new()
        .pax(&[
            ("SCHILY.xattr.user.x", b"a\0=\nb"),
            ("SCHILY.xattr.user.empty", b""),
            ("SCHILY.xattr.security.capability", capability),
            (
                "SCHILY.xattr.security.selinux",
                b"system_u:object_r:etc_t:s0",
            ),
            ("SCHILY.xattr.unknown", b"1"),
        ])
        .file("f", "x")
        .pax(&[("SCHILY.xattr.user.d", b"1")])
        .dir("d")
        .file("d/f", "")
        .pax(&[("SCHILY.xattr.user.l", b"1")])
        .link("l", "x");
    let host = Host::new();
    let unpacked = host.unpack("1", &archive.end()).expect("nothing refused");
    assert_eq!(unpacked.skipped_attributes, 3);
    let listing = host.list("1");
    let shown = capability.escape_ascii();
    assert!(
        listing["f"].ends_with(&format!(
            " security.capability={shown} user.empty= user.x=a\\x00=\\nb"
        )),
        "{}",
        listing["f"]
    );
    assert!(listing["d"].ends_with("1000.000000000 user.d=1"));
}

#[test]
fn headers_must_make_sense() {
    let mut spoilt = new().file("f", "x").end();
    spoilt[0] ^= 1;
    refused("checksum", &spoilt, header_fault(HeaderFault::Checksum));
    refused(
        "no tar at all",
        &[b'x'; 2048],
        header_fault(HeaderFault::Checksum),
    );
    for (name, at) in [
        ("mode", 100),
        ("uid", 108),
        ("gid", 116),
        ("size", 124),
        ("mtime", 136),
    ] {
        let archive = new().raw(header(b'0', b"f", 0), b"", |block| block[at] = b'9');
        refused(
            name,
            &archive.end(),
            header_fault(HeaderFault::Number(name)),
        );
    }
    let negative = new().raw(header(b'0', b"f", 0), b"", |block| {
        block[124..136].fill(0xff)
    });
    refused(
        "negative size",
        &negative.end(),
        header_fault(HeaderFault::Number("size")),
    );
    let device = new().raw(header(b'3', b"f", 0), b"", |block| {
        block[329..337].copy_from_slice(b"7777777\0");
    });
    refused(
        "device",
        &device.end(),
        header_fault(HeaderFault::Number("device")),
    );
    refused(
        "pax",
        &new().pax_raw(b"oops").file("f", "").end(),
        header_fault(HeaderFault::Pax),
    );
    let huge = new().raw(header(b'x', b"x", 2 << 20), b"", |_| {});
    refused("pax bomb", &huge.end(), header_fault(HeaderFault::TooLong));
    let huge = new().raw(header(b'L', b"x", 1 << 33), b"", |_| {});
    refused("name bomb", &huge.end(), header_fault(HeaderFault::TooLong));
    for kind in [b'D', b'M', b'N', b'A', b'z', 0xff] {
        refused(
            "type",
            &new().entry(kind, "f", "", b"").end(),
            |error| matches!(error, LayerError::Unsupported { kind: found, .. } if *found == kind),
        );
    }
    let mut lone = new().file("f", "").cut();
    lone.extend([0; 512]);
    lone.extend(new().file("g", "").end());
    refused(
        "lone zero block",
        &lone,
        header_fault(HeaderFault::LoneZeroBlock),
    );
}

#[test]
fn old_formats_are_read() {
    let v7 = |block: &mut [u8; 512]| block[257..265].fill(0);
    let mut prefixed = header(b'0', b"name", 0);
    prefixed[345..351].copy_from_slice(b"prefix");
    let signed_sum = |mut bytes: Vec<u8>| {
        let block = &mut bytes[..512];
        block[148..156].fill(b' ');
        let sum: i32 = block.iter().map(|byte| i32::from(byte.cast_signed())).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    };
    unpacks(
        "V7 directory and file",
        &new()
            .raw(header(0, b"d/", 0), b"", v7)
            .raw(header(0, b"d/f", 1), b"x", v7)
            .end(),
        &[("d", "dir"), ("d/f", "file 1")],
    );
    unpacks(
        "ustar prefix",
        &new().raw(prefixed, b"", |_| {}).end(),
        &[("prefix", "dir"), ("prefix/name", "file 0")],
    );
    unpacks(
        "signed sum",
        &signed_sum(new().file("\u{fc}", "").end()),
        &[("\\xc3\\xbc", "file 0")],
    );
    unpacks(
        "contiguous",
        &new().entry(b'7', "f", "", b"x").end(),
        &[("f", "file 1")],
    );
    let global = new().raw(
        header(b'g', b"pax_global_header", 13),
        b"13 path=evil\n",
        |_| {},
    );
    unpacks(
        "global header",
        &global.file("f", "").end(),
        &[("f", "file 0")],
    );
    // Links and directories have no content, whatever they say.
    let sized = new()
        .raw(header(b'5', b"d", 4096), b"", |_| {})
        .raw(header(b'2', b"l", 77), b"", |block| block[157] = b'x')
        .file("f", "");
    unpacks(
        "sizes without content",
        &sized.end(),
        &[("d", "dir"), ("l", "link x"), ("f", "file 0")],
    );
}

#[test]
fn the_end_may_be_missing_but_not_early() {
    let whole = new().file("a", "1").file("b", &"x".repeat(1000)).cut();
    unpacks(
        "no zero blocks",
        &whole,
        &[("a", "file 1"), ("b", "file 1000")],
    );
    unpacks("nothing at all", &[], &[]);
    let mut trailing = new().file("a", "1").end();
    trailing.extend(vec![0; 10_000]);
    trailing.extend(b"and something else");
    unpacks("bytes after the end", &trailing, &[("a", "file 1")]);
    for cut in [1, 511, 513, 1000, 1023, 1025, 1536, 1537, 2048 + 100] {
        refused(
            "cut",
            &whole[..cut],
            |error| matches!(error, LayerError::Truncated { offset } if *offset == cut as u64),
        );
    }
    let lying = new()
        .raw(header(b'0', b"f", 1 << 30), b"short", |_| {})
        .end();
    refused("lying size", &lying, |error| {
        matches!(error, LayerError::Truncated { .. })
    });
    let dangling = new().pax(&[("path", b"x")]).end();
    refused("extends nothing", &dangling, |error| {
        matches!(error, LayerError::Truncated { .. })
    });
}

#[test]
fn link_targets_have_a_form() {
    refused(
        "empty",
        &new().link("l", "").end(),
        path_fault(PathFault::Empty),
    );
    let long = "t".repeat(4096);
    refused(
        "long",
        &new().link("l", &long).end(),
        path_fault(PathFault::TooLong),
    );
    let nul = new().pax(&[("linkpath", b"a\0b")]).link("l", "x");
    refused("NUL", &nul.end(), path_fault(PathFault::Nul));
    let nul = new().pax(&[("linkpath", b"a\0b")]).hard("l", "x");
    refused("NUL in a hard link", &nul.end(), path_fault(PathFault::Nul));
    let long = "t/".repeat(2047);
    unpacks(
        "4094 bytes",
        &new().link("l", &long).end(),
        &[("l", &format!("link {long}"))],
    );
}

/// Archive with a GNU sparse file whose header `change` makes.
fn gnu_sparse(content: &[u8], change: impl FnOnce(&mut [u8; 512])) -> Archive {
    new().raw(
        header(b'S', b"sparse", content.len() as u64),
        content,
        |block| {
            block[257..265].copy_from_slice(b"ustar  \0");
            block[345..].fill(0);
            change(block);
        },
    )
}

fn put(block: &mut [u8; 512], at: usize, number: u64) {
    block[at..at + 12].copy_from_slice(format!("{number:011o}\0").as_bytes());
}

#[test]
fn sparse_files_get_their_holes() {
    let check = |what: &str, archive: Archive| {
        let host = Host::new();
        host.unpack("1", &archive.end())
            .unwrap_or_else(|error| panic!("{what}: {error:?}"));
        let path = host.path().join("layers/1/sparse");
        let content = fs::read(&path).expect("unpacked");
        assert_eq!(content.len(), 1_000_000, "{what}");
        assert_eq!(&content[..4], b"head", "{what}");
        assert_eq!(&content[500_000..500_004], b"tail", "{what}");
        assert_eq!(
            content.iter().filter(|byte| **byte != 0).count(),
            8,
            "{what}"
        );
        let blocks = fs::metadata(&path).expect("unpacked").blocks();
        assert!(blocks * 512 < 100_000, "{what}: {blocks}");
    };
    check(
        "GNU",
        gnu_sparse(b"headtail", |block| {
            for (at, number) in [
                (386, 0),
                (398, 4),
                (410, 500_000),
                (422, 4),
                (483, 1_000_000),
            ] {
                put(block, at, number);
            }
        }),
    );
    check(
        "PAX 0.0",
        new()
            .pax(&[
                ("GNU.sparse.size", b"1000000"),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.offset", b"0"),
                ("GNU.sparse.numbytes", b"4"),
                ("GNU.sparse.offset", b"500000"),
                ("GNU.sparse.numbytes", b"4"),
            ])
            .file("sparse", "headtail"),
    );
    check(
        "PAX 0.1",
        new()
            .pax(&[
                ("GNU.sparse.size", b"1000000"),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.map", b"0,4,500000,4"),
                ("GNU.sparse.name", b"sparse"),
            ])
            .file("GNUSparseFile.0/sparse", "headtail"),
    );
    let mut content = b"2\n0\n4\n500000\n4\n".to_vec();
    content.resize(512, 0);
    content.extend(b"headtail");
    check(
        "PAX 1.0",
        new()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"sparse"),
                ("GNU.sparse.realsize", b"1000000"),
            ])
            .entry(b'0', "GNUSparseFile.0/sparse", "", &content),
    );
    // A map of many blocks.
    let mut map = [[0; 512]; 2];
    for (at, number) in
        (0..21).flat_map(|slot| [(slot * 24, slot as u64 * 1000), (slot * 24 + 12, 1)])
    {
        put(
            &mut map[0],
            at,
            number + if at % 24 == 0 { 10_000 } else { 0 },
        );
    }
    map[0][504] = 1;
    put(&mut map[1], 0, 90_000);
    put(&mut map[1], 12, 3);
    let archive = gnu_sparse(b"", |block| {
        put(block, 124, 24);
        block[482] = 1;
        put(block, 483, 100_000);
    });
    let archive = archive.content(&map.concat()).content(&[b'x'; 24]);
    let host = unpacks("long map", &archive.end(), &[("sparse", "file 100000")]);
    let content = fs::read(host.path().join("layers/1/sparse")).expect("unpacked");
    assert_eq!(content[30_000], b'x');
    assert_eq!(&content[89_999..90_004], b"\0xxx\0");
}

#[test]
fn sparse_maps_do_not_lie() {
    let sparse = |error: &LayerError| matches!(error, LayerError::Sparse { .. });
    let too_short = gnu_sparse(b"1234", |block| {
        put(block, 398, 4);
        put(block, 483, 3);
    });
    refused("beyond the size", &too_short.end(), sparse);
    let overlap = gnu_sparse(b"12345678", |block| {
        for (at, number) in [(386, 10), (398, 4), (410, 0), (422, 4), (483, 100)] {
            put(block, at, number);
        }
    });
    refused("backwards", &overlap.end(), sparse);
    let more = gnu_sparse(b"1234", |block| {
        put(block, 398, 5);
        put(block, 483, 100);
    });
    refused("more than stored", &more.end(), sparse);
    for map in [
        "0,4,2,4",
        "0,4",
        "0",
        "4,4,0,4",
        "18446744073709551615,2,0,6",
    ] {
        let archive = new()
            .pax(&[
                ("GNU.sparse.size", b"1000"),
                ("GNU.sparse.map", map.as_bytes()),
            ])
            .file("f", "12345678");
        refused(map, &archive.end(), |error| {
            sparse(error) || header_fault(HeaderFault::Pax)(error)
        });
    }
    for content in [
        "",
        "1\n0\n",
        "x\n",
        "99999999999\n",
        "-1\n",
        "1\n0\n8\n",
        "2\n0\n4\n",
        "1 \n",
    ] {
        let archive = new()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.realsize", b"1000"),
            ])
            .file("f", content);
        refused(content, &archive.end(), sparse);
    }
    let archive = new()
        .pax(&[
            ("GNU.sparse.size", b"9223372036854775807"),
            ("GNU.sparse.map", b""),
        ])
        .file("f", "");
    refused("huge hole", &archive.end(), |error| {
        matches!(
            error,
            LayerError::TooLarge {
                what: LimitKind::FileBytes,
                ..
            }
        )
    });
}

#[test]
fn limits_are_kept() {
    let archive = new()
        .file("a", "12345678")
        .dir("directory")
        .file("b", "12345678")
        .end();
    let mut trailing = archive.clone();
    trailing.extend(vec![0; 1 << 20]);
    let linked = new()
        .link("l", "d/d/d/d")
        .file("l/f", "")
        .link("m", "l")
        .file("m/f", "")
        .end();
    type Set = fn(&mut Limits);
    let sets: [(LimitKind, Set, &[u8]); 6] = [
        (
            LimitKind::LinkSteps,
            |limits| limits.link_steps = 8,
            &linked,
        ),
        (
            LimitKind::ContentBytes,
            |limits| limits.content_bytes = 15,
            &archive,
        ),
        (
            LimitKind::FileBytes,
            |limits| limits.file_bytes = 7,
            &archive,
        ),
        (LimitKind::Entries, |limits| limits.entries = 2, &archive),
        (
            LimitKind::DirectoryNames,
            |limits| limits.directory_name_bytes = 8,
            &archive,
        ),
        (
            LimitKind::TrailingBytes,
            |limits| limits.trailing_bytes = 1 << 19,
            &trailing,
        ),
    ];
    for (wanted, set, archive) in sets {
        let host = Host::new();
        let mut limits = Limits::default();
        set(&mut limits);
        let result = unpack(archive, &host.layer("1"), &limits, &AtomicBool::new(false));
        assert!(
            matches!(&result, Err(LayerError::TooLarge { what, .. }) if *what == wanted),
            "{wanted}: {result:?}"
        );
    }
    // A size that only the header has fails before a byte of it is written.
    let bomb = new().raw(header(b'0', b"f", 1 << 40), b"", |_| {});
    refused("bomb", &bomb.end(), |error| {
        matches!(
            error,
            LayerError::TooLarge {
                what: LimitKind::ContentBytes,
                ..
            }
        )
    });
}

#[test]
fn cancelling_stops_between_reads() {
    struct Endless<'a> {
        reads: u32,
        cancelled: &'a AtomicBool,
    }
    impl std::io::Read for Endless<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.reads += 1;
            assert!(self.reads < 1000, "goes on after it was cancelled");
            if self.reads == 50 {
                self.cancelled.store(true, Ordering::Relaxed);
            }
            let length = buffer.len().min(512);
            buffer[..length].fill(0);
            if self.reads == 1 {
                let archive = new().raw(header(b'0', b"f", 1 << 32), b"", |_| {}).cut();
                buffer[..512].copy_from_slice(&archive);
            }
            Ok(length)
        }
    }
    let host = Host::new();
    let cancelled = AtomicBool::new(false);
    let source = Endless {
        reads: 0,
        cancelled: &cancelled,
    };
    let result = unpack(source, &host.layer("1"), &Limits::default(), &cancelled);
    assert!(matches!(result, Err(LayerError::Cancelled)), "{result:?}");
}

#[test]
fn a_failing_source_is_told_apart() {
    struct Failing;
    impl std::io::Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
    }
    let host = Host::new();
    let cancelled = AtomicBool::new(false);
    let result = unpack(Failing, &host.layer("1"), &Limits::default(), &cancelled);
    assert!(
        matches!(result, Err(LayerError::Source { offset: 0, .. })),
        "{result:?}"
    );
}

#[test]
fn devices_are_real() {
    unpacks(
        "devices",
        &new()
            .device(b'3', "null", 1, 3)
            .device(b'4', "d/loop", 7, 200)
            .device(b'3', "big", 4095, 1_048_575)
            .device(b'3', "whiteout", 0, 0)
            .end(),
        &[
            ("null", "char 1/3 0644"),
            ("d", "dir"),
            ("d/loop", "block 7/200"),
            ("big", "char 4095/1048575"),
            ("whiteout", "char 0/0"),
        ],
    );
}

#[test]
fn paths_beyond_the_limit_through_links_are_refused() {
    // Each link doubles what a name can reach.
    let deep = "d/".repeat(1500) + "d";
    let archive = new().dir(&deep).link("l", &deep).dir(&format!("l/{deep}"));
    refused(
        "through a link",
        &archive.end(),
        path_fault(PathFault::TooLong),
    );
}
