//! The CRI contract, paragraph by paragraph.
//!
//! `contract.tsv` names the paragraphs. A test says in its doc comment which ones it shows, as in "CRI
//! contract 3.3 and 3.4", wherever in `tests/it` it is. Here are those that no other chapter's tests
//! show on their way; one agent serves several behaviours.

mod calls;
mod containers;
mod devices;
mod endings;
mod sandboxes;
mod streaming;
mod telling;
mod volumes;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use longshore_tests::skip;

fn sources(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// Numbers that doc comments name after the two words; a list goes on over commas, `and` and lines.
fn named(source: &str) -> BTreeSet<String> {
    let docs: Vec<&str> = source
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("///"))
        .collect();
    let mut numbers = BTreeSet::new();
    for part in docs.join(" ").split("CRI contract ").skip(1) {
        for word in part.split_whitespace() {
            let number = word.trim_end_matches([',', ':', '.', ';']);
            let is_number = number.starts_with(|c: char| c.is_ascii_digit())
                && number.chars().all(|c| c.is_ascii_digit() || c == '.');
            if is_number {
                numbers.insert(number.to_owned());
            } else if word != "and" {
                break;
            }
            if word.ends_with([':', '.', ';']) {
                break;
            }
        }
    }
    numbers
}

/// Every paragraph has a test, or a reason why it has none here.
#[test]
fn every_paragraph_has_a_test() -> Result<()> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("it");
    if !tests.is_dir() {
        skip("every_paragraph_has_a_test", "the source is not here");
        return Ok(());
    }
    let mut paths = Vec::new();
    sources(&tests, &mut paths)?;
    let mut shown = BTreeSet::new();
    for path in paths {
        // This file's own comments are about the form.
        if !path.ends_with("cri/mod.rs") {
            shown.extend(named(&fs::read_to_string(path)?));
        }
    }
    let table: BTreeMap<&str, &str> = include_str!("contract.tsv")
        .lines()
        .map(|line| {
            let mut columns = line.split('\t');
            let number = columns.next().unwrap_or_default();
            (number, columns.nth(1).unwrap_or_default())
        })
        .collect();
    let unknown: Vec<_> = shown
        .iter()
        .filter(|one| !table.contains_key(one.as_str()))
        .collect();
    assert!(
        unknown.is_empty(),
        "tests name what the table does not have: {unknown:?}"
    );
    for (number, reason) in table {
        match (shown.contains(number), reason) {
            (true, "") => {}
            (false, "") => panic!("{number} has neither a test nor a reason"),
            (false, reason) => println!("{number} has no test here: {reason}"),
            (true, reason) => panic!("{number} has a test and a reason to have none: {reason}"),
        }
    }
    Ok(())
}
