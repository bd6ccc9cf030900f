//! Random archives: no panic, nothing outside, no descriptor left, and removal always works.

use std::fs;

use proptest::{collection::vec, prelude::*};
use rustix::fd::AsFd;

use super::{
    super::{remove::remove_tree, usage},
    Host,
    archive::Archive,
};

fn part() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        8 => prop_oneof![Just("a"), Just("b"), Just("c")],
        1 => prop_oneof![
            Just(".."), Just("."), Just(""), Just(".wh."), Just(".wh.a"), Just(".wh.b"),
            Just(".wh..wh..opq"), Just(".wh..wh.plnk"), Just(".wh..."), Just("outside"),
            Just("\u{732b}"), Just("a\nb"), Just("-rf"),
        ],
    ]
}

fn name() -> impl Strategy<Value = String> {
    (
        prop_oneof![4 => Just(""), 1 => Just("/"), 1 => Just("./")],
        vec(part(), 0..5),
    )
        .prop_map(|(start, parts)| format!("{start}{}", parts.join("/")))
}

#[derive(Clone, Debug)]
struct Step {
    kind: u8,
    name: String,
    link: String,
    size: usize,
    xattr: Option<&'static str>,
}

fn step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        Just(b'0'),
        Just(b'1'),
        Just(b'2'),
        Just(b'5'),
        Just(b'6'),
        Just(b'3'),
        Just(b'4'),
    ];
    let link = prop_oneof![
        name(),
        Just("../../outside".to_owned()),
        Just("/".to_owned())
    ];
    let xattr = prop_oneof![
        9 => Just(None),
        1 => prop_oneof![Just("user.x"), Just("security.x"), Just("trusted.x")].prop_map(Some),
    ];
    (kind, name(), link, 0..2000_usize, xattr).prop_map(|(kind, name, link, size, xattr)| Step {
        kind,
        name,
        link,
        size,
        xattr,
    })
}

fn archive(steps: &[Step]) -> Vec<u8> {
    let mut archive = Archive::default();
    for step in steps {
        if let Some(name) = step.xattr {
            archive = archive.pax(&[(&format!("SCHILY.xattr.{name}"), b"1")]);
        }
        let content = if step.kind == b'0' {
            vec![b'x'; step.size]
        } else {
            Vec::new()
        };
        archive = archive.entry(step.kind, &step.name, &step.link, &content);
    }
    archive.end()
}

/// Unpacks, checks, removes.
fn check(archive: &[u8]) {
    let host = Host::new();
    let result = host.unpack("1", archive);
    let path = host.path().join("layers/1");
    let layer = fs::File::open(&path).expect("it is still there");
    if let Ok(unpacked) = result {
        let usage = usage::of_still_tree(&layer).expect("nobody works there");
        assert_eq!(unpacked.inodes, usage.inodes);
    }
    let layers = fs::File::open(host.path().join("layers")).expect("a directory");
    remove_tree(layers.as_fd(), "1").expect("ours to remove");
    assert!(!path.exists());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn of_good_headers(steps in vec(step(), 0..20)) {
        check(&archive(&steps));
    }

    /// Steps that fail end most archives early; one by one more of them have their turn.
    #[test]
    fn of_good_headers_without_refused_names(steps in vec(step(), 0..40)) {
        let mut kept = Vec::new();
        for step in steps {
            let plain = !step.name.contains("..") && !step.name.contains(".wh.");
            if plain && !step.link.contains("..") && step.xattr != Some("trusted.x") {
                kept.push(step);
            }
        }
        check(&archive(&kept));
    }

    #[test]
    fn of_spoilt_bytes(
        steps in vec(step(), 1..10),
        spoilt in vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..10),
        cut in any::<prop::sample::Index>(),
        cut_it in any::<bool>(),
    ) {
        let mut bytes = archive(&steps);
        for (at, value, mend) in spoilt {
            let at = at.index(bytes.len());
            bytes[at] = value;
            // With a right checksum the other fields are looked at too.
            let block = &mut bytes[at / 512 * 512..][..512];
            if mend {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        if cut_it {
            bytes.truncate(cut.index(bytes.len()));
        }
        check(&bytes);
    }

    #[test]
    fn of_noise(bytes in vec(any::<u8>(), 0..4096)) {
        check(&bytes);
    }
}
