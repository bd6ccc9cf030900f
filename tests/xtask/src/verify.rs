//! `cargo verify`: every check that this machine can make, and a list of those it cannot.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    time::Instant,
};

use crate::{
    debian, packages, page,
    run::{Run, Step, Workspace, is_root},
};

/// Debian packages of the guest, beside what its kernel and init bring.
const GUEST_PACKAGES: &str = "nftables iproute2 libseccomp2 procps libcap2-bin util-linux";

/// What was left out, and why.
#[derive(Default)]
struct Skipped(Vec<String>);

impl Skipped {
    fn add(&mut self, what: &str, why: impl std::fmt::Display) {
        self.0.push(format!("{what}: {why}"));
    }
}

struct Wishes {
    quick: bool,
    lab_only: bool,
    no_lab: bool,
}

impl Wishes {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut wishes = Self {
            quick: false,
            lab_only: false,
            no_lab: false,
        };
        for arg in args {
            match arg.as_str() {
                "--quick" => wishes.quick = true,
                "--lab" => wishes.lab_only = true,
                "--no-lab" => wishes.no_lab = true,
                other => return Err(format!("unknown option {other}")),
            }
        }
        if wishes.lab_only && (wishes.no_lab || wishes.quick) {
            return Err("--lab excludes --no-lab and --quick".to_owned());
        }
        Ok(wishes)
    }
}

pub(crate) fn verify(args: &[String]) -> Step {
    let wishes = Wishes::parse(args)?;
    let workspace = Workspace::find()?;
    let started = Instant::now();
    let mut skipped = Skipped::default();
    packages::install(packages::BUILD, true)?;
    if !wishes.quick {
        packages::install(packages::TESTS, false)?;
    }
    if !wishes.lab_only {
        checks(&workspace, &mut skipped)?;
    }
    build(&workspace)?;
    if !wishes.lab_only {
        tests(&workspace, &wishes, &mut skipped)?;
    }
    if wishes.no_lab || wishes.quick {
        skipped.add("end-to-end tests on cgroup v2 in the lab", "as asked");
    } else {
        lab(&workspace, wishes.lab_only, &mut skipped)?;
    }
    println!("\nverified in {} s", started.elapsed().as_secs());
    if skipped.0.is_empty() {
        println!("nothing was left out");
    } else {
        println!("left out:");
        for line in &skipped.0 {
            println!("  {line}");
        }
    }
    Ok(())
}

/// What needs no program of ours to run.
fn checks(workspace: &Workspace, skipped: &mut Skipped) -> Step {
    workspace.cargo("fmt").args(["--all", "--check"]).check()?;
    workspace
        .cargo("clippy")
        .args([
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])
        .check()?;
    if packages::find("cargo-deny").is_some() {
        workspace
            .cargo("deny")
            .args(["--offline", "--workspace", "--config"])
            .arg(workspace.root.join(".deny.toml"))
            .args(["check", "bans", "licenses", "sources"])
            .check()?;
    } else {
        skipped.add(
            "licences and sources of dependencies",
            "cargo-deny is not installed",
        );
    }
    if packages::find("buf").is_some() {
        let mut lint = Run::new("buf").arg("lint");
        lint.0.current_dir(workspace.root.join("proto"));
        lint.check()?;
    } else {
        skipped.add("lint of the proto files", "buf is not installed");
    }
    Ok(())
}

fn build(workspace: &Workspace) -> Step {
    workspace
        .cargo("build")
        .args(["--workspace", "--all-targets"])
        .check()?;
    page(workspace)
}

fn tests(workspace: &Workspace, wishes: &Wishes, skipped: &mut Skipped) -> Step {
    let skips = workspace.target.join("skipped-tests");
    let _fresh = fs::remove_file(&skips);
    let nextest = workspace.cargo("nextest").arg("--version").works();
    let mut run = if nextest {
        workspace.cargo("nextest").args(["run", "--workspace"])
    } else {
        workspace
            .cargo("test")
            .args(["--workspace", "--all-targets", "--no-fail-fast"])
    };
    if wishes.quick {
        skipped.add("end-to-end tests", "as asked");
        run = if nextest {
            run.args(["-E", "not binary(it)"])
        } else {
            run.args(["--lib", "--bins"])
        };
    } else if !is_root() {
        return Err(
            "the tests make namespaces and cgroups: run them as root (or --quick)".to_owned(),
        );
    } else {
        match debian::root_tar(workspace) {
            Ok(tar) => run = run.env("LONGSHORE_DEBIAN_TAR", tar),
            Err(why) => skipped.add("the Debian root file system as an image", why),
        }
    }
    if !wishes.quick {
        match python(workspace) {
            Ok(python) => run = run.env("LONGSHORE_PYTHON", python),
            Err(why) => skipped.add("a Python client generated from the proto files", why),
        }
    }
    let before = world();
    run.env("LONGSHORE_PAGE_SERVER", workspace.page_server())
        .env("LONGSHORE_BIN_DIR", workspace.target.join("debug"))
        .env("LONGSHORE_SKIPS", &skips)
        .check()?;
    if nextest {
        workspace
            .cargo("test")
            .args(["--quiet", "--workspace", "--doc"])
            .check()?;
    }
    let left: Vec<_> = world().difference(&before).cloned().collect();
    if !left.is_empty() {
        return Err(format!("the tests leave behind:\n  {}", left.join("\n  ")));
    }
    read_skips(&skips, "", skipped);
    Ok(())
}

/// A Python with grpcio-tools, kept in the target folder.
fn python(workspace: &Workspace) -> Result<PathBuf, String> {
    let dir = workspace.target.join("python");
    let python = dir.join("bin/python");
    let ready = || Run::new(&python).args(["-c", "import grpc_tools"]).works();
    if !ready() {
        Run::new("python3").args(["-m", "venv"]).arg(&dir).check()?;
        Run::new(&python)
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "grpcio-tools",
            ])
            .check()?;
    }
    if ready() {
        Ok(python)
    } else {
        Err("grpcio-tools does not install".to_owned())
    }
}

fn read_skips(path: &Path, place: &str, skipped: &mut Skipped) {
    let lines: BTreeSet<_> = fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect();
    for line in lines {
        skipped.0.push(format!("{place}{line}"));
    }
}

/// What a test run must leave as it was: mounts, links, rules, and everything with our name.
fn world() -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let mut add =
        |kind: &str, text: String| all.extend(text.lines().map(|line| format!("{kind}: {line}")));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    add("mount", mounts);
    let links = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    add(
        "link",
        links
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned() + "\n"))
            .collect(),
    );
    if let Some(nft) = packages::find("nft") {
        add(
            "nft",
            Run::new(nft)
                .args(["list", "tables"])
                .output()
                .unwrap_or_default(),
        );
    }
    let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
    let mut cgroups = String::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().contains("longshore-") {
                    cgroups.push_str(&format!("{}\n", entry.path().display()));
                }
                dirs.push(entry.path());
            }
        }
    }
    add("cgroup", cgroups);
    let mut processes = String::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.bytes().all(|byte| byte.is_ascii_digit()) && comm.starts_with("longshore") {
            processes.push_str(&format!("{name} {comm}"));
        }
    }
    add("process", processes);
    all
}

/// The end-to-end suite once more where cgroup v2 is all there is: in a virtual machine.
fn lab(workspace: &Workspace, needed: bool, skipped: &mut Skipped) -> Step {
    let what = "end-to-end tests on cgroup v2 in the lab";
    let lab = workspace.root.join("tests/lab/lab");
    if !is_root() || packages::find("apt-get").is_none() || env::consts::ARCH != "x86_64" {
        let why = "the lab needs root on an amd64 Debian";
        skipped.add(what, why);
        return if needed { Err(why.to_owned()) } else { Ok(()) };
    }
    let setup = Run::new(&lab)
        .arg("setup")
        .env("LAB_PACKAGES", GUEST_PACKAGES)
        .check();
    if let Err(why) = setup {
        skipped.add(what, &why);
        return if needed { Err(why) } else { Ok(()) };
    }
    let suite = suite_program(workspace)?;
    // The guest's own disk for all state; programs come from the share.
    let share = workspace.target.join("lab");
    let _fresh = fs::remove_dir_all(&share);
    fs::create_dir_all(&share).map_err(|error| format!("{}: {error}", share.display()))?;
    let busybox = packages::find("busybox").map(|path| (path, "busybox"));
    let programs = [
        (suite, "it"),
        (workspace.target.join("debug/longshored"), "longshored"),
        (
            workspace.target.join("debug/longshore-shim"),
            "longshore-shim",
        ),
        (workspace.target.join("debug/shore"), "shore"),
        (workspace.page_server(), "page-server"),
    ];
    for (from, name) in programs.into_iter().chain(busybox) {
        let to = share.join(name);
        fs::copy(&from, &to)
            .map_err(|error| format!("{} to {}: {error}", from.display(), to.display()))?;
        if packages::find("strip").is_some() {
            // Smaller programs start sooner over the share; the symbols are on the host.
            let _as_it_was = Run::new("strip").arg("--strip-debug").arg(&to).works();
        }
    }
    let skips = share.join("skipped-tests");
    let script = share.join("suite");
    fs::write(&script, SUITE).map_err(|error| format!("{}: {error}", script.display()))?;
    // The plain machine boots in seconds; what is about systemd runs in one of its own.
    for (machine, tests) in [(None, "--skip systemd::"), (Some("--systemd"), "systemd::")] {
        Run::new(&lab)
            .args(["run", "--mem", "3072", "--timeout", "2700", "--times"])
            .args(machine)
            .arg("--share")
            .arg(&share)
            .args(["--", "sh"])
            .arg(&script)
            .arg(&share)
            .arg(tests)
            .env("LAB_PACKAGES", GUEST_PACKAGES)
            .check()?;
    }
    read_skips(&skips, "in the lab: ", skipped);
    Ok(())
}

/// Runs tests in the guest; `$1` is the share, `$2` says which. As on the host, what fails gets a
/// second try.
const SUITE: &str = r#"
set -e
cd /opt && mkdir -p longshore /var/lib/longshore-tests && cp "$1"/* longshore/
export LONGSHORE_BIN_DIR=/opt/longshore LONGSHORE_PAGE_SERVER=/opt/longshore/page-server
export LONGSHORE_BUSYBOX=/opt/longshore/busybox
export LONGSHORE_TEST_DIR=/var/lib/longshore-tests LONGSHORE_SKIPS="$1/skipped-tests"
export RUST_BACKTRACE=0
it="longshore/it --test-threads=1"
{ $it $2 2>&1 && touch passed; } | tee output
[ -e passed ] && exit 0
failed=$(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' output)
[ -n "$failed" ] || exit 1
echo "a second try for:" $failed
exec $it --exact $failed
"#;

/// The built end-to-end test program.
fn suite_program(workspace: &Workspace) -> Result<PathBuf, String> {
    let listing = workspace
        .cargo("test")
        .args([
            "--quiet",
            "--workspace",
            "--all-targets",
            "--no-run",
            "--message-format=json",
        ])
        .output()?;
    listing
        .lines()
        .filter(|line| line.contains(r#""kind":["test"]"#) && line.contains(r#""name":"it""#))
        .filter_map(|line| {
            let (_, rest) = line.split_once(r#""executable":""#)?;
            Some(PathBuf::from(rest.split_once('"')?.0))
        })
        .next_back()
        .ok_or_else(|| "cargo names no program for the test `it`".to_owned())
}
