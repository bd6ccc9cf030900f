//! The shape of the source: which chapter may import which, and where unsafe code may stand.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use longshore_tests::skip;

/// What each chapter of the agent may import from its siblings. Arrows point down and never back.
const ARROWS: &[(&str, &[&str])] = &[
    (
        "service",
        &[
            "lifecycle",
            "image",
            "network",
            "event",
            "operation",
            "node",
            "store",
            "config",
            "agent",
            "rootfs",
            "cgroup",
            "handler",
        ],
    ),
    (
        "lifecycle",
        &[
            "image",
            "rootfs",
            "network",
            "handler",
            "cgroup",
            "operation",
            "event",
            "store",
        ],
    ),
    ("image", &["rootfs", "operation", "event", "store"]),
    ("rootfs", &["store"]),
    ("network", &["operation", "event", "store"]),
    ("handler", &["cgroup"]),
    (
        "node",
        &[
            "rootfs",
            "network",
            "handler",
            "cgroup",
            "store",
            "image",
            "lifecycle",
            "operation",
            "event",
            "config",
        ],
    ),
    ("operation", &["event", "store"]),
    ("event", &["store"]),
    ("store", &[]),
    ("cgroup", &[]),
    ("id", &[]),
    ("clock", &[]),
    ("blocking", &[]),
];

/// Anyone may import these.
const FREE: &[&str] = &["id", "clock", "blocking"];

/// Known and explained exceptions: (file, import).
const EXCEPTIONS: &[(&str, &str)] = &[
    // A commit carries its events; the store knows them as drafts only.
    ("store", "event"),
];

fn root() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    root.join("Cargo.toml").exists().then(|| root.to_owned())
}

fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Chapters that a file's `use crate::` lines and paths name, the part with its own tests left out.
fn imports(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or(text);
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let line = code[..at].rsplit('\n').next().unwrap_or_default();
        if line.trim_start().starts_with("//") {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut word = String::new();
            let mut complete = false;
            for character in group.chars() {
                match character {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    _ if depth > 0 => {}
                    ',' => {
                        found.extend((!complete && !word.is_empty()).then(|| word.clone()));
                        word.clear();
                        complete = false;
                    }
                    // The rest of this path, up to the comma, is inside the chapter.
                    ':' if !complete => {
                        found.push(std::mem::take(&mut word));
                        complete = true;
                    }
                    _ if character.is_alphanumeric() || character == '_' => word.push(character),
                    _ => {}
                }
            }
            found.extend((!complete && !word.is_empty()).then_some(word));
        } else {
            found.push(
                rest.chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect(),
            );
        }
    }
    found
}

#[test]
fn chapters_import_only_what_is_below_them() -> Result<()> {
    let Some(root) = root() else {
        skip("tidy", "the source is not here");
        return Ok(());
    };
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let source = root.join("agent/src");
    let mut turned = Vec::new();
    let mut seen = 0;
    for path in sources(&source)? {
        let place = path.strip_prefix(&source)?;
        let first = place.components().next().context("a component")?;
        let chapter = Path::new(first.as_os_str())
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let Some(may) = allowed.get(chapter.as_str()) else {
            continue;
        };
        seen += 1;
        for import in imports(&fs::read_to_string(&path)?) {
            let known = allowed.contains_key(import.as_str());
            let fine = import == chapter
                || may.contains(&import.as_str())
                || FREE.contains(&import.as_str())
                || EXCEPTIONS.contains(&(chapter.as_str(), import.as_str()));
            if known && !fine {
                turned.push(format!("{}: {chapter} -> {import}", place.display()));
            }
        }
    }
    assert!(seen > 20, "only {seen} files were looked at");
    turned.dedup();
    assert!(
        turned.is_empty(),
        "arrows that turned upward:\n  {}",
        turned.join("\n  ")
    );
    Ok(())
}

#[test]
fn unsafe_code_stands_in_sys_and_shim_only() -> Result<()> {
    let Some(root) = root() else {
        skip("tidy", "the source is not here");
        return Ok(());
    };
    for top in [
        "proto/src/lib.rs",
        "agent/src/lib.rs",
        "agent/src/main.rs",
        "client/src/lib.rs",
        "client/shore/src/main.rs",
        "tests/src/lib.rs",
        "tests/src/bin/demo.rs",
        "tests/bench/main.rs",
        "tests/it/main.rs",
        "tests/page/src/main.rs",
        "tests/xtask/src/main.rs",
    ] {
        let text = fs::read_to_string(root.join(top)).with_context(|| top.to_owned())?;
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{top} does not forbid unsafe code"
        );
    }
    Ok(())
}

#[test]
fn imports_are_found_in_all_their_forms() {
    let text = "use crate::store::Store;\nuse crate::{\n    id::SandboxId,\n    network::{plan::Plan, ports},\n    event, store::table::Row};\n\
        // crate::lifecycle is above us\nfn f() { crate::image::x() }\n#[cfg(test)]\nmod tests { use crate::service; }\n";
    assert_eq!(
        imports(text),
        ["store", "id", "network", "event", "store", "image"]
    );
}
