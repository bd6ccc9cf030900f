//! The Debian packages that the build and the tests need: installed where we may, else named.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use crate::run::{Run, Step, is_root};

/// One package, and how to see that it is there without asking dpkg: other systems have none.
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) there: Probe,
}

pub(crate) enum Probe {
    /// A program in PATH or in the folders of root.
    Program(&'static str),
    /// A file.
    File(&'static str),
    /// A module of python3.
    Module(&'static str),
    /// A library that pkg-config knows.
    Library(&'static str),
}

const fn program(name: &'static str, program: &'static str) -> Package {
    Package {
        name,
        there: Probe::Program(program),
    }
}

/// Without these nothing builds.
pub(crate) const BUILD: &[Package] = &[
    program("gcc", "cc"),
    Package {
        name: "libc6-dev",
        there: Probe::File("/usr/include/stdio.h"),
    },
    program("pkg-config", "pkg-config"),
    Package {
        name: "libseccomp-dev",
        there: Probe::Library("libseccomp"),
    },
];

/// What shows that nothing is left: links, addresses, rules.
pub(crate) const DEMO: &[Package] = &[program("iproute2", "ip"), program("nftables", "nft")];

/// What the end-to-end tests compare with, or put into their images.
pub(crate) const TESTS: &[Package] = &[
    program("iproute2", "ip"),
    program("nftables", "nft"),
    program("docker-registry", "docker-registry"),
    program("debootstrap", "debootstrap"),
    program("procps", "ps"),
    program("libcap2-bin", "capsh"),
    program("util-linux", "unshare"),
    program("busybox-static", "busybox"),
    program("runc", "runc"),
    program("crun", "crun"),
    Package {
        name: "containernetworking-plugins",
        there: Probe::File("/usr/lib/cni/bridge"),
    },
    program("iptables", "iptables"),
    program("python3", "python3"),
    Package {
        name: "python3-venv",
        there: Probe::Module("ensurepip"),
    },
];

/// The peer of the benchmark.
pub(crate) const BENCH: &[Package] = &[
    program("containerd", "containerd"),
    program("runc", "runc"),
    Package {
        name: "containernetworking-plugins",
        there: Probe::File("/usr/lib/cni/bridge"),
    },
];

/// Whether a program is in PATH or in the folders of root.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| {
            fs::metadata(file)
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

fn is_there(package: &Package) -> bool {
    match package.there {
        Probe::Program(name) => find(name).is_some(),
        Probe::File(path) => Path::new(path).exists(),
        Probe::Module(name) => Run::new("python3")
            .args(["-c", &format!("import {name}")])
            .works(),
        Probe::Library(name) => Run::new("pkg-config").args(["--exists", name]).works(),
    }
}

fn missing(packages: &[Package]) -> Vec<&'static str> {
    packages
        .iter()
        .filter(|package| !is_there(package))
        .map(|package| package.name)
        .collect()
}

/// Installs what is missing, or says what it is; an error only if it is `needed`.
pub(crate) fn install(packages: &[Package], needed: bool) -> Step {
    let names = missing(packages);
    if names.is_empty() {
        return Ok(());
    }
    if is_root() && find("apt-get").is_some() {
        match apt(&names) {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("{error}"),
        }
    }
    let wish = format!("missing: install the Debian packages  {}", names.join(" "));
    if needed {
        Err(wish)
    } else {
        eprintln!("{wish}");
        Ok(())
    }
}

/// `policy-rc.d` keeps packages from starting their services: tests start their own.
const POLICY: &str = "/usr/sbin/policy-rc.d";

fn apt(names: &[&str]) -> Step {
    let guard = !Path::new(POLICY).exists()
        && fs::write(POLICY, "#!/bin/sh\nexit 101\n").is_ok()
        && fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)).is_ok();
    let install = || {
        Run::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(names)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .check()
    };
    let result = install().or_else(|_| {
        // No package lists yet, or old ones.
        Run::new("apt-get").args(["update", "-qq"]).check()?;
        install()
    });
    if guard {
        let _gone = fs::remove_file(POLICY);
    }
    result
}

/// Prints what is missing, by use.
pub(crate) fn list() {
    for (label, packages) in [
        ("build", BUILD),
        ("demo", DEMO),
        ("tests", TESTS),
        ("benchmark", BENCH),
    ] {
        let names = missing(packages);
        let shown = if names.is_empty() {
            "nothing missing".to_owned()
        } else {
            names.join(" ")
        };
        println!("{label}: {shown}");
    }
}
