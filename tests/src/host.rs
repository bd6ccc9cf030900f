//! What the kernel and the disk hold, as lists of plain facts that can be compared.
//!
//! A snapshot is exact on purpose: a test compares the one before with the one after, and anything
//! left is a failure that names it. What belongs to others on a busy host is not looked at: each
//! fact is tied to one machine, one instance or one directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::machine::Machine;

/// Facts by kind: `mounts`, `links`, `nft`, ...
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    facts: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Snapshot {
    /// Adds facts of one kind.
    pub fn add(&mut self, kind: &'static str, facts: impl IntoIterator<Item = String>) {
        self.facts.entry(kind).or_default().extend(facts);
    }

    /// The facts of one kind.
    pub fn of(&self, kind: &str) -> impl Iterator<Item = &str> {
        self.facts
            .get(kind)
            .into_iter()
            .flatten()
            .map(String::as_str)
    }

    /// What `later` has more (`+`) and less (`-`).
    pub fn difference(&self, later: &Self) -> Difference {
        let kinds: BTreeSet<_> = self.facts.keys().chain(later.facts.keys()).collect();
        let none = BTreeSet::new();
        let mut lines = Vec::new();
        for kind in kinds {
            let before = self.facts.get(*kind).unwrap_or(&none);
            let after = later.facts.get(*kind).unwrap_or(&none);
            lines.extend(
                after
                    .difference(before)
                    .map(|fact| format!("+ {kind}: {fact}")),
            );
            lines.extend(
                before
                    .difference(after)
                    .map(|fact| format!("- {kind}: {fact}")),
            );
        }
        Difference { lines }
    }

    /// How many facts of each kind there are, for a person.
    pub fn summary(&self) -> String {
        let counts: Vec<_> = self
            .facts
            .iter()
            .map(|(kind, facts)| format!("{} {kind}", facts.len()))
            .collect();
        counts.join(", ")
    }
}

/// Result of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    /// One fact a line.
    pub lines: Vec<String>,
}

impl Difference {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

/// Whose facts a snapshot takes.
#[derive(Clone)]
pub struct Scope {
    /// Where links, rules and mounts are looked up.
    pub machine: Machine,
    /// Part of the names of the cgroups that count: `longshore-1a2b3c4d`, `longshore-` for all, or
    /// empty for none.
    pub cgroups: String,
    /// Processes count that have one of these in their command line, or live in such a cgroup.
    pub commands: Vec<String>,
    /// Directories whose contents count.
    pub dirs: Vec<PathBuf>,
    /// Whether the network namespaces of all processes count.
    pub namespaces: bool,
}

impl Scope {
    /// Takes the snapshot.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let mut all = Snapshot::default();
        let mountinfo = self.machine.mountinfo();
        all.add(
            "mounts",
            mountinfo.iter().filter_map(|line| mount_fact(line)),
        );
        // Nothing may leak out of the machine either.
        let outside = fs::read_to_string("/proc/self/mountinfo")?;
        all.add(
            "mounts outside",
            outside.lines().filter_map(mount_fact).filter(|fact| {
                self.dirs
                    .iter()
                    .any(|dir| fact.starts_with(&*dir.to_string_lossy()))
            }),
        );
        all.add("links", links(&self.machine)?);
        all.add("addresses", addresses(&self.machine)?);
        all.add("routes", routes(&self.machine)?);
        all.add("nft", rules(&self.machine)?);
        all.add("sysctls", sysctls(&self.machine));
        all.add("cgroups", cgroups(&self.cgroups)?);
        all.add("processes", self.processes()?);
        if self.namespaces {
            all.add("network namespaces", network_namespaces()?);
        }
        for dir in &self.dirs {
            let mut files = BTreeSet::new();
            walk(dir, &mut files)?;
            all.add("files", files);
        }
        Ok(all)
    }

    /// Waits until the facts equal `before`, for what the kernel takes down by itself a moment later.
    ///
    /// # Errors
    /// With the difference, if they still differ after `limit`.
    pub fn expect_same(&self, before: &Snapshot, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let difference = before.difference(&self.snapshot()?);
            if difference.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("left over (+) or lost (-):\n{difference}");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn processes(&self) -> Result<Vec<String>> {
        let own = std::process::id();
        let mut found = Vec::new();
        for pid in pids()? {
            if pid != own
                && let Some(command) = self.matching(pid)
            {
                found.push(format!("{pid} {command}"));
            }
        }
        Ok(found)
    }

    /// The pids that count.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let own = std::process::id();
        Ok(pids()?
            .into_iter()
            .filter(|pid| *pid != own && self.matching(*pid).is_some())
            .collect())
    }

    fn matching(&self, pid: u32) -> Option<String> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let command = fs::read(dir.join("cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let by_command = self.commands.iter().any(|part| command.contains(part));
        let by_cgroup = || {
            fs::read_to_string(dir.join("cgroup")).is_ok_and(|groups| {
                groups
                    .lines()
                    .any(|line| !self.cgroups.is_empty() && line.contains(&self.cgroups))
            })
        };
        (by_command || by_cgroup()).then(|| command.trim().to_owned())
    }
}

/// All process ids.
pub fn pids() -> Result<Vec<u32>> {
    Ok(fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// Mount point, type and source of a line of mountinfo.
fn mount_fact(line: &str) -> Option<String> {
    let (left, right) = line.split_once(" - ")?;
    let left: Vec<_> = left.split(' ').collect();
    let right: Vec<_> = right.split(' ').collect();
    Some(format!(
        "{} {} {} root {}",
        left.get(4)?,
        right.first()?,
        right.get(1)?,
        left.get(3)?
    ))
}

fn links(machine: &Machine) -> Result<Vec<String>> {
    let text = machine.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    Ok(text
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect())
}

fn addresses(machine: &Machine) -> Result<Vec<String>> {
    let text = machine.output("ip", &["-o", "addr", "show"])?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let address = words.get(3)?;
            // Link-local addresses come and go with their link, which is counted.
            (!address.starts_with("fe80:")).then(|| format!("{} {address}", words[1]))
        })
        .collect())
}

fn routes(machine: &Machine) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for family in ["-4", "-6"] {
        let text = machine.output("ip", &[family, "route", "show", "table", "all"])?;
        all.extend(
            text.lines()
                .filter(|line| !line.contains("fe80:") && !line.contains("ff00::"))
                .map(|line| {
                    // Whether a bridge has a carrier is told by what is attached to it.
                    let line = line.split(" expires ").next().unwrap_or(line);
                    line.replace(" linkdown", "").trim().to_owned()
                }),
        );
    }
    Ok(all)
}

/// Every object of the rule set without handles and counters.
fn rules(machine: &Machine) -> Result<Vec<String>> {
    let text = machine
        .output("nft", &["-j", "list", "ruleset"])
        .context("package nftables")?;
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut listing: Value = serde_json::from_str(&text).context("output of nft -j")?;
    let mut all = Vec::new();
    for object in listing["nftables"].as_array_mut().into_iter().flatten() {
        if object.get("metainfo").is_none() {
            strip(object);
            all.push(object.to_string());
        }
    }
    Ok(all)
}

fn strip(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| {
                !matches!(key.as_str(), "handle" | "packets" | "bytes" | "expires")
            });
            map.values_mut().for_each(strip);
        }
        Value::Array(list) => list.iter_mut().for_each(strip),
        _ => {}
    }
}

/// The two switches of the whole host that a bridge network needs.
const FORWARDING: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

fn sysctls(machine: &Machine) -> Vec<String> {
    machine.run(|| {
        FORWARDING
            .iter()
            .filter_map(|name| {
                let value = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
                Some(format!("{name} = {}", value.trim()))
            })
            .collect()
    })
}

/// Mount points of the cgroup hierarchies.
pub fn hierarchies() -> Result<Vec<PathBuf>> {
    Ok(fs::read_to_string("/proc/self/mountinfo")?
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right
                .starts_with("cgroup")
                .then(|| left.split(' ').nth(4).map(PathBuf::from))?
        })
        .collect())
}

/// Cgroups in any hierarchy whose path has `part` in it.
pub fn cgroups(part: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    if part.is_empty() {
        return Ok(found);
    }
    for root in hierarchies()? {
        let mut todo = vec![root];
        while let Some(dir) = todo.pop() {
            let Ok(entries) = fs::read_dir(&dir) else {
                // Gone since it was listed.
                continue;
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    let path = entry.path();
                    if path.to_string_lossy().contains(part) {
                        found.push(path.to_string_lossy().into_owned());
                    }
                    todo.push(path);
                }
            }
        }
    }
    Ok(found)
}

fn network_namespaces() -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for pid in pids()? {
        if let Ok(link) = fs::read_link(format!("/proc/{pid}/ns/net")) {
            all.insert(link.to_string_lossy().into_owned());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    all.extend(
        mounts
            .lines()
            .filter(|line| line.contains(" - nsfs "))
            .filter_map(|line| line.split(' ').nth(3).map(str::to_owned)),
    );
    Ok(all)
}

/// Every path below `dir` with its kind; the database's own files are left out, since it makes and
/// drops its journal as it likes.
fn walk(dir: &Path, into: &mut BTreeSet<String>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("store.db") {
            continue;
        }
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let mark = if kind.is_dir() {
            "dir"
        } else if kind.is_symlink() {
            "link"
        } else if kind.is_socket() {
            "socket"
        } else {
            "file"
        };
        into.insert(format!("{} ({mark})", entry.path().display()));
        if kind.is_dir() {
            walk(&entry.path(), into)?;
        }
    }
    Ok(())
}

/// Removes empty cgroups whose path has `part` in it, deepest first: what a killed test leaves.
pub fn remove_cgroups(part: &str) -> Result<()> {
    let mut found = cgroups(part)?;
    found.sort_by_key(|path| std::cmp::Reverse(path.len()));
    for path in found {
        // A busy one stays and shows up in the next comparison.
        let _busy = fs::remove_dir(path);
    }
    Ok(())
}

/// Whether a program of the host runs with `args` at all; for what a test can do without.
pub fn can_run(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .output()
        .is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_what_came_and_what_went() {
        let mut before = Snapshot::default();
        before.add("links", ["lo".to_owned(), "br0".to_owned()]);
        let mut after = Snapshot::default();
        after.add("links", ["lo".to_owned()]);
        after.add("mounts", ["/x".to_owned()]);
        assert_eq!(
            before.difference(&after).lines,
            ["- links: br0", "+ mounts: /x"]
        );
        assert!(before.difference(&before).is_empty());
    }

    #[test]
    fn mount_lines_become_facts() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(
            mount_fact(line).as_deref(),
            Some("/mnt2 ext3 /dev/root root /mnt1")
        );
    }
}
