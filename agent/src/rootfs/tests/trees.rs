//! Trees that a container shaped: as deep, as linked and as locked as it pleases.

use std::{fs, os::unix::fs::symlink, path::Path};

use longshore_sys::mount::{self, PropagationFlags};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, IFlags, Mode, OFlags, ioctl_setflags, linkat, mkdirat, openat, unlinkat},
    io::Errno,
};

use super::{
    super::{remove::remove_tree, usage},
    Host, stat,
};

fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("a directory")
}

/// Directories `name` within each other, deeper than any path reaches; a file in each tenth.
fn make_deep(root: &Path, name: &str, depth: usize) {
    let mut dir = open(root);
    for level in 0..depth {
        mkdirat(&dir, name, Mode::RWXU).expect("room");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        dir = openat(&dir, name, flags, Mode::empty()).expect("just made");
        if level % 10 == 0 {
            let flags = OFlags::WRONLY | OFlags::CREATE;
            openat(&dir, "file", flags, Mode::RUSR).expect("room");
        }
    }
}

#[test]
fn depth_does_not_matter() {
    let host = Host::new();
    let top = host.path().join("layers/top");
    fs::create_dir(&top).expect("new directory");
    make_deep(&top, "d", 5000);
    // Names that a removal could choose for what it moves.
    make_deep(&top, "moved-1", 100);
    fs::write(top.join("moved-2"), "").expect("new file");
    let usage = usage::of_still_tree(&open(&top)).expect("readable");
    assert_eq!(usage.inodes, 1 + 5000 + 500 + 100 + 10 + 1);
    let layers = open(&host.path().join("layers"));
    assert_eq!(remove_tree(layers.as_fd(), "top"), Ok(()));
    assert_eq!(stat(&top).map(drop), Err(Errno::NOENT));
    assert_eq!(remove_tree(layers.as_fd(), "top"), Ok(()), "absent is fine");
}

#[test]
fn links_are_removed_and_not_followed() {
    let host = Host::new();
    let top = host.path().join("layers/top");
    let outside = host.path().join("outside");
    fs::create_dir_all(top.join("d")).expect("new directory");
    symlink(&outside, top.join("d/link")).expect("new link");
    symlink(outside.join("secret"), top.join("link")).expect("new link");
    let before = host.outside();
    let layers = open(&host.path().join("layers"));
    let usage = usage::of_still_tree(&open(&top)).expect("readable");
    assert_eq!(usage.inodes, 4);
    assert_eq!(remove_tree(layers.as_fd(), "top"), Ok(()));
    // The name itself may be a link, too.
    symlink(&outside, host.path().join("layers/link")).expect("new link");
    assert_eq!(remove_tree(layers.as_fd(), "link"), Ok(()));
    assert_eq!(host.outside(), before);
}

#[test]
fn many_entries_are_removed() {
    let host = Host::new();
    let top = host.path().join("layers/top");
    fs::create_dir(&top).expect("new directory");
    let dir = open(&top);
    let flags = OFlags::WRONLY | OFlags::CREATE;
    openat(&dir, "first", flags, Mode::RUSR).expect("room");
    for name in 0..3000 {
        linkat(
            &dir,
            "first",
            &dir,
            format!("link-{name}"),
            AtFlags::empty(),
        )
        .expect("room");
    }
    for name in 0..300 {
        mkdirat(&dir, format!("dir-{name}"), Mode::RWXU).expect("room");
    }
    let usage = usage::of_still_tree(&dir).expect("readable");
    assert_eq!(usage.inodes, 1 + 1 + 300, "names of one file count once");
    let layers = open(&host.path().join("layers"));
    assert_eq!(remove_tree(layers.as_fd(), "top"), Ok(()));
}

#[test]
fn locked_files_are_removed() {
    let host = Host::new();
    let top = host.path().join("layers/top");
    fs::create_dir_all(top.join("locked/deep")).expect("new directory");
    fs::write(top.join("locked/file"), "").expect("new file");
    fs::write(top.join("file"), "").expect("new file");
    for path in ["file", "locked/file", "locked/deep", "locked", ""] {
        let path = top.join(path);
        let file = fs::File::open(&path).expect("just made");
        match ioctl_setflags(&file, IFlags::IMMUTABLE) {
            Ok(()) => {}
            Err(error) => {
                println!("skipped: no immutable files here: {error}");
                return;
            }
        }
    }
    let layers = open(&host.path().join("layers"));
    assert_eq!(
        unlinkat(&layers, "top/file", AtFlags::empty()),
        Err(Errno::PERM)
    );
    assert_eq!(remove_tree(layers.as_fd(), "top"), Ok(()));
}

#[test]
fn usage_agrees_with_a_plain_walk() {
    let host = Host::new();
    let top = host.path().join("layers/top");
    for dir in 0..40 {
        let dir = top.join(format!("{}/{dir}/x", dir % 7));
        fs::create_dir_all(&dir).expect("new directory");
        for file in 0..dir.as_os_str().len() % 9 {
            fs::write(dir.join(file.to_string()), vec![0; file * 3000]).expect("room");
        }
    }
    let mut expected = (0, 0);
    let mut pending = vec![top.clone()];
    while let Some(path) = pending.pop() {
        let stat = stat(&path).expect("it was listed");
        expected.0 += 1;
        expected.1 += 512 * stat.st_blocks as u64;
        if path.is_dir() {
            pending.extend(
                fs::read_dir(&path)
                    .expect("a directory")
                    .map(|entry| entry.expect("a readable directory").path()),
            );
        }
    }
    let usage = usage::of_still_tree(&open(&top)).expect("readable");
    assert_eq!((usage.inodes, usage.bytes), expected);
}

/// On a thread of its own, in a mount namespace of its own.
fn in_mount_namespace(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let run = || {
            let flags = nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_FS;
            nix::sched::unshare(flags).expect("we are root");
            let private = PropagationFlags::PRIVATE | PropagationFlags::REC;
            mount::set_propagation("/", private).expect("we are root");
            work();
        };
        scope.spawn(run).join().expect("it reports by itself");
    });
}

#[test]
fn what_is_mounted_inside_is_not_of_the_tree() {
    let host = Host::new();
    let top = host.path().join("layers/top");
    let outside = host.path().join("outside");
    for dir in ["a/bind", "a/tmpfs", "b"] {
        fs::create_dir_all(top.join(dir)).expect("new directory");
    }
    let before = host.outside();
    in_mount_namespace(|| {
        // Of the same file system, so the device number tells nothing.
        mount::bind(&outside, &top.join("a/bind"), false).expect("we are root");
        mount::tmpfs(&top.join("a/tmpfs"), 1 << 20, 0o755).expect("we are root");
        fs::write(top.join("a/tmpfs/file"), "kept").expect("room");
        let usage = usage::of_still_tree(&open(&top)).expect("readable");
        assert!((3..=5).contains(&usage.inodes), "{usage:?}");
        let layers = open(&host.path().join("layers"));
        assert_eq!(remove_tree(layers.as_fd(), "top"), Err(Errno::BUSY));
        assert_eq!(host.outside(), before);
        assert!(top.join("a/tmpfs/file").exists());
        mount::unmount_detach(&top.join("a/tmpfs")).expect("mounted");
        mount::unmount_detach(&top.join("a/bind")).expect("mounted");
        assert_eq!(remove_tree(layers.as_fd(), "top"), Ok(()));
    });
    assert_eq!(host.outside(), before);
}
