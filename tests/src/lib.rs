//! Harness and end-to-end tests: a real agent, real registry, real kernel objects.
//!
//! ```text
//!  Machine   a network and a mount namespace of its own, standing for a host
//!   +- Node      a real longshored in it, with its own directories; killed, restarted, stopped
//!   +- Registry  our OCI registry, listening on the machine's loopback
//!   +- Remote    our server of distributions' images, beside it
//!  Host      what the kernel and the disk hold of all that, before and after
//!  Pods      the requests that most tests send, and what they wait for
//! ```
#![forbid(unsafe_code)]

use std::{
    env,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use anyhow::{Context as _, Result, bail};

pub mod host;
pub mod images;
pub mod machine;
pub mod node;
pub mod pods;
pub mod registry;
pub mod remote;

/// Chooses the TLS provider; harmless when repeated.
pub fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _other_was_first = rustls::crypto::aws_lc_rs::default_provider().install_default();
    });
}

/// The folder with the built programs: `LONGSHORE_BIN_DIR`, or the one that this program is in.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("LONGSHORE_BIN_DIR") {
        return Ok(dir.into());
    }
    let program = env::current_exe()?;
    let mut dir = program.parent().context("a program is in a folder")?;
    if dir.ends_with("deps") {
        dir = dir.parent().context("deps is in a folder")?;
    }
    Ok(dir.to_owned())
}

/// Says why a test does not run here, on standard error and in the file `LONGSHORE_SKIPS`.
pub fn skip(test: &str, why: &str) {
    eprintln!("skipped {test}: {why}");
    if let Some(path) = env::var_os("LONGSHORE_SKIPS")
        && let Ok(mut file) = File::options().create(true).append(true).open(path)
    {
        // Said on standard error already.
        let _full = writeln!(file, "{test}: {why}");
    }
}

/// A built program of the workspace.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = bin_dir()?.join(name);
    if !path.exists() {
        bail!(
            "{} is not there: run `cargo build --workspace` first, or `cargo verify`, which does",
            path.display()
        );
    }
    Ok(path)
}

/// The statically linked page server, built here if need be.
pub fn page_server() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LONGSHORE_PAGE_SERVER") {
        return Ok(path.into());
    }
    let target = bin_dir()?;
    let target = target
        .parent()
        .context("the profile folder is in the target folder")?;
    let path = target.join("static/release/page-server");
    if !path.exists() {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("page/Cargo.toml");
        let built = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args([
                "rustc",
                "--quiet",
                "--release",
                "--bin",
                "page-server",
                "--manifest-path",
            ])
            .arg(manifest)
            .arg("--target-dir")
            .arg(target.join("static"))
            .args(["--", "-C", "target-feature=+crt-static"])
            .env_remove("RUSTFLAGS")
            .status()
            .context("run cargo to build the page server")?;
        if !built.success() {
            bail!("the page server does not build: {built}");
        }
    }
    Ok(path)
}
