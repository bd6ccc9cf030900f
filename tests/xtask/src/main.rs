//! Stands behind `cargo demo`, `cargo verify` and `cargo xtask bench`.
//!
//! Has no dependencies, so it builds in a moment on a machine where nothing else would build yet,
//! and can say, or install, what is missing there.
#![forbid(unsafe_code)]

mod debian;
mod packages;
mod run;
mod verify;

use std::{env, os::unix::process::CommandExt as _, process::ExitCode};

use run::{Step, Workspace};

const HELP: &str = "\
cargo demo [--once]               the main job, shown: pulls, runs, talks to and removes a pod
cargo verify [OPTIONS]            all checks and tests that this machine can run
    --quick                       without the end-to-end tests and the lab
    --lab                         only the end-to-end tests in the lab (cgroup v2, a virtual machine)
    --no-lab                      without the lab
cargo xtask bench [OPTIONS]       cost of pods and execs, beside containerd
    --rounds N                    rounds of each (20)
    --pods N                      idle pods for the memory figures (20)
cargo xtask page                  the static page server alone
cargo xtask packages              the Debian packages that are missing for all of this
";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let result = match args.first().map(String::as_str) {
        Some("demo") => demo(&args[1..]),
        Some("verify") => verify::verify(&args[1..]),
        Some("bench") => bench(&args[1..]),
        Some("page") => Workspace::find().and_then(|workspace| page(&workspace)),
        Some("packages") => {
            packages::list();
            Ok(())
        }
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("which command?\n{HELP}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Builds the static page server, in a target folder of its own: its flags would rebuild the rest.
fn page(workspace: &Workspace) -> Step {
    workspace
        .cargo("rustc")
        .args([
            "--quiet",
            "--release",
            "--package",
            "longshore-page",
            "--bin",
            "page-server",
            "--target-dir",
        ])
        .arg(workspace.target.join("static"))
        .args(["--", "-C", "target-feature=+crt-static"])
        .env_remove("RUSTFLAGS")
        .check()
}

fn demo(args: &[String]) -> Step {
    run::need_root("the demo makes namespaces, cgroups and a bridge")?;
    let workspace = Workspace::find()?;
    packages::install(packages::BUILD, true)?;
    packages::install(packages::DEMO, true)?;
    eprintln!("building (the first time takes some minutes)");
    workspace
        .cargo("build")
        .args(["--workspace", "--bins"])
        .check()?;
    page(&workspace)?;
    // Takes our place, so that Ctrl-C reaches the demo alone and it can clean up.
    let error = workspace
        .program("debug", "longshore-demo")
        .args(args)
        .0
        .exec();
    Err(format!("longshore-demo: {error}"))
}

fn bench(args: &[String]) -> Step {
    run::need_root("the benchmark runs two container engines")?;
    let workspace = Workspace::find()?;
    packages::install(packages::BUILD, true)?;
    packages::install(packages::DEMO, true)?;
    packages::install(packages::BENCH, false)?;
    workspace
        .cargo("build")
        .args(["--release", "--workspace", "--bins"])
        .check()?;
    page(&workspace)?;
    let error = workspace
        .program("release", "longshore-bench")
        .args(args)
        .0
        .exec();
    Err(format!("longshore-bench: {error}"))
}
