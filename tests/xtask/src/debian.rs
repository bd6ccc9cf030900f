//! A real Debian root file system for the tests, made by debootstrap from the host's own mirror.

use std::{fs, path::PathBuf};

use crate::{
    packages::find,
    run::{Run, Workspace},
};

/// An init, so that it can be booted, and what tests ask it by.
const INCLUDED: &str = "--include=systemd-sysv,dbus,udev,iproute2,procps";

/// The tar of a minimal Debian with its init, made once per target folder.
pub(crate) fn root_tar(workspace: &Workspace) -> Result<PathBuf, String> {
    let dir = workspace.target.join("debian");
    let tar = dir.join("system.tar");
    if tar.exists() {
        return Ok(tar);
    }
    if find("debootstrap").is_none() {
        return Err("debootstrap is not installed".to_owned());
    }
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let (suite, mirror) = source()?;
    let root = dir.join("root");
    let unfinished = dir.join("system.tar.part");
    let made = Run::new("debootstrap")
        .args(["--variant=minbase", INCLUDED, &suite])
        .arg(&root)
        .arg(&mirror)
        .check()
        .and_then(|()| {
            // Every machine has one, and a runtime would have to make its mount point.
            let hosts = root.join("etc/hosts");
            fs::write(&hosts, "127.0.0.1\tlocalhost\n")
                .map_err(|error| format!("{}: {error}", hosts.display()))
        })
        .and_then(|()| {
            Run::new("tar")
                .args([
                    "--numeric-owner",
                    "--xattrs",
                    "--exclude=./var/cache/apt",
                    "--exclude=./var/lib/apt",
                    "-cf",
                ])
                .arg(&unfinished)
                .arg("-C")
                .arg(&root)
                .arg(".")
                .check()
        });
    let _gone = fs::remove_dir_all(&root);
    made?;
    fs::rename(&unfinished, &tar).map_err(|error| format!("{}: {error}", tar.display()))?;
    Ok(tar)
}

/// Suite and mirror that the host's apt uses.
fn source() -> Result<(String, String), String> {
    let release = fs::read_to_string("/etc/os-release")
        .map_err(|error| format!("/etc/os-release: {error}"))?;
    let suite = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .ok_or("/etc/os-release names no suite")?
        .to_owned();
    let listing = Run::new("apt-get")
        .args(["indextargets", "--format", "$(SITE) $(SUITE) $(CODENAME)"])
        .output()?;
    let mirror = listing
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (site, _suite, codename) = (words.next()?, words.next()?, words.next()?);
            (codename == suite && !site.contains("security")).then(|| site.to_owned())
        })
        .next()
        .ok_or("apt knows no mirror of this suite (apt-get update?)")?;
    Ok((suite, mirror))
}
