//! What a sandbox has on the host's file system: its directory, files, namespaces and `/dev/shm`.
//!
//! ```text
//!  RUN/sandboxes/<id>/  ns/net ns/uts ns/ipc   bound namespaces, kept without any process
//!                       ns/user               the one that owns them, if the sandbox has its own
//!                       shm/                   tmpfs that its containers share
//!                       hostname hosts resolv.conf
//!                       shim.sock exits/       the shim's
//!                       containers/<id>/rootfs mount points
//! ```
//! All of it is blocking, repeatable, and found by the sandbox's id alone.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use longshore_sys::{
    mount,
    ns::{self, NewNamespaces, NewUser},
    user::IdMapping,
};

use super::{LifecycleError, sandbox::SandboxConfig};
use crate::network::Mode;

/// Size of `/dev/shm` in bytes, as Docker and CRI runtimes have it.
const SHM_BYTES: u64 = 64 << 20;

/// Makes directory, files, namespaces and `/dev/shm` of a sandbox.
pub(super) fn create(
    dir: &Path,
    config: &SandboxConfig,
    hostname: &str,
    addresses: &[IpAddr],
) -> Result<(), LifecycleError> {
    for each in [dir.to_owned(), dir.join("containers")] {
        make_dir(&each, 0o711)?;
    }
    write(&dir.join("hostname"), format!("{hostname}\n"))?;
    write_hosts(dir, hostname, addresses)?;
    write(&dir.join("resolv.conf"), resolv_conf(config)?)?;
    for name in ["hostname", "hosts", "resolv.conf"] {
        give_to_root(&dir.join(name), config)?;
    }
    if !config.host_ipc {
        let shm = dir.join("shm");
        make_dir(&shm, 0o1777)?;
        mount::tmpfs(&shm, SHM_BYTES, 0o1777)
            .map_err(LifecycleError::file("mount tmpfs on", &shm))?;
        give_to_root(&shm, config)?;
    }
    create_namespaces(dir, config, hostname)
}

/// Names the sandbox's addresses to its containers; without any, as the host does.
pub(super) fn write_hosts(
    dir: &Path,
    hostname: &str,
    addresses: &[IpAddr],
) -> Result<(), LifecycleError> {
    write(&dir.join("hosts"), hosts(hostname, addresses))
}

/// Undoes [`create`]; absent parts are fine. With a live shim in the directory only the files that
/// the shim holds open stay behind.
pub(super) fn remove(dir: &Path) -> Result<(), LifecycleError> {
    release(dir)?;
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(LifecycleError::file("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

/// Lets go of the namespaces and of `/dev/shm`; absent ones are fine.
pub(super) fn release(dir: &Path) -> Result<(), LifecycleError> {
    for name in ["net", "uts", "ipc", "user"] {
        let path = namespace(dir, name);
        ns::release(&path).map_err(LifecycleError::file("release", path))?;
    }
    let shm = dir.join("shm");
    mount::unmount_detach(&shm).map_err(LifecycleError::file("unmount", shm))
}

/// Where the namespace of this kind is bound.
pub(super) fn namespace(dir: &Path, kind: &str) -> PathBuf {
    dir.join("ns").join(kind)
}

fn create_namespaces(
    dir: &Path,
    config: &SandboxConfig,
    hostname: &str,
) -> Result<(), LifecycleError> {
    make_dir(&dir.join("ns"), 0o700)?;
    let host_network = config.network.mode == Mode::Host;
    let mut sysctls: Vec<(String, String)> = Vec::new();
    if !host_network {
        // As other CRI runtimes do: ping and low ports without capabilities.
        for (name, value) in [
            ("net.ipv4.ip_unprivileged_port_start", "0"),
            ("net.ipv4.ping_group_range", "0 2147483647"),
        ] {
            if !config.sysctls.contains_key(name) {
                sysctls.push((name.into(), value.into()));
            }
        }
    }
    sysctls.extend(config.sysctls.clone());
    let wish = NewNamespaces {
        user: config.id_map.map(|ids| NewUser {
            path: namespace(dir, "user"),
            uids: vec![mapping(ids.host_uid, ids.length)],
            gids: vec![mapping(ids.host_gid, ids.length)],
        }),
        net: (!host_network).then(|| namespace(dir, "net")),
        uts: (!host_network).then(|| namespace(dir, "uts")),
        ipc: (!config.host_ipc).then(|| namespace(dir, "ipc")),
        hostname: (!host_network).then(|| hostname.to_owned()),
        sysctls,
    };
    ns::create(&wish).map_err(|error| LifecycleError::Namespace {
        step: error.step,
        source: error.source,
    })
}

fn mapping(outside: u32, length: u32) -> IdMapping {
    IdMapping {
        inside: 0,
        outside,
        length,
    }
}

/// Makes the sandbox's root, who may be nobody on the host, the owner of one of its files.
fn give_to_root(path: &Path, config: &SandboxConfig) -> Result<(), LifecycleError> {
    let Some(ids) = config.id_map else {
        return Ok(());
    };
    std::os::unix::fs::chown(path, Some(ids.host_uid), Some(ids.host_gid))
        .map_err(LifecycleError::file("chown", path))
}

fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    if addresses.is_empty()
        && let Ok(host) = fs::read_to_string("/etc/hosts")
    {
        return host;
    }
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in addresses {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{address}\t{hostname}");
    }
    text
}

fn resolv_conf(config: &SandboxConfig) -> Result<Vec<u8>, LifecycleError> {
    let Some(dns) = &config.dns else {
        let path = Path::new("/etc/resolv.conf");
        return match fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            read => read.map_err(LifecycleError::file("read", path)),
        };
    };
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    Ok(text.into_bytes())
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<(), LifecycleError> {
    fs::write(path, content).map_err(LifecycleError::file("write", path))
}

/// Makes a directory and those above it; one that is there is fine.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<(), LifecycleError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(LifecycleError::file("create directory", path))
}

/// Removes a directory tree; an absent one is fine.
pub(super) fn remove_dir(path: &Path) -> Result<(), LifecycleError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(LifecycleError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}
