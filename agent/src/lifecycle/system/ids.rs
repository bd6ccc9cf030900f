//! Ranges of the host's ids, one for each system container.
//!
//! Source: subuid(5), subgid(5). What the host grants root there is divided into ranges of 65536, the
//! least that a system's own service users need; where neither file has a line, a range far above
//! any user's is taken.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use super::{System, SystemError};
use crate::{
    id::ContainerId,
    lifecycle::sandbox::IdMap,
    store::{Changes, Snapshot},
};

/// Ids of a system container.
const LENGTH: u32 = 65_536;
/// Where neither file says anything: first id and how many.
const DEFAULT: Range = Range {
    first: 1_000_000,
    count: 1_000_000_000,
};
/// Whose lines count, by name and number.
const OWNER: (&str, &str) = ("root", "0");

const USERS: &str = "/etc/subuid";
const GROUPS: &str = "/etc/subgid";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    first: u32,
    count: u32,
}

/// What the host grants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Granted {
    users: Vec<Range>,
    groups: Vec<Range>,
}

impl Granted {
    /// Reads both files. Blocking.
    ///
    /// # Errors
    /// `HalfConfigured`, `TooFewIds`, `BadIdLine`, `IdFile`.
    pub(super) fn read() -> Result<Self, SystemError> {
        let read = |file: &'static str| match fs::read_to_string(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(|source| SystemError::IdFile {
                path: Path::new(file).to_owned(),
                source,
            }),
        };
        Self::parse(&read(USERS)?, &read(GROUPS)?)
    }

    fn parse(users: &str, groups: &str) -> Result<Self, SystemError> {
        let (users, groups) = (parse(users, USERS)?, parse(groups, GROUPS)?);
        let half = |present, missing| SystemError::HalfConfigured {
            owner: OWNER.0.to_owned(),
            present,
            missing,
        };
        let granted = match (users.is_empty(), groups.is_empty()) {
            (true, true) => Self {
                users: vec![DEFAULT],
                groups: vec![DEFAULT],
            },
            (false, true) => return Err(half(USERS, GROUPS)),
            (true, false) => return Err(half(GROUPS, USERS)),
            (false, false) => Self { users, groups },
        };
        for (file, ranges) in [(USERS, &granted.users), (GROUPS, &granted.groups)] {
            if starts(ranges).next().is_none() {
                return Err(SystemError::TooFewIds {
                    file,
                    owner: OWNER.0.to_owned(),
                });
            }
        }
        Ok(granted)
    }

    fn maps(&self) -> impl Iterator<Item = IdMap> {
        starts(&self.users)
            .zip(starts(&self.groups))
            .map(|(host_uid, host_gid)| IdMap {
                host_uid,
                host_gid,
                length: LENGTH,
            })
    }

    /// Chooses a range that nobody has; the only one there is may be shared. The claims go into the
    /// commit of the intent.
    ///
    /// # Errors
    /// `IdsExhausted`.
    pub(super) fn choose(
        &self,
        at: &Snapshot,
        system: &ContainerId,
    ) -> Result<(IdMap, bool, Changes), SystemError> {
        let mut maps = self.maps();
        if let (Some(only), None) = (maps.next(), maps.next()) {
            return Ok((only, true, Changes::new()));
        }
        let free = self.maps().find(|map| {
            claims(*map)
                .into_iter()
                .all(|claim| at.claim(&claim).is_none())
        });
        let map = free.ok_or_else(|| SystemError::IdsExhausted {
            count: self.maps().count() as u64,
            owner: OWNER.0.to_owned(),
        })?;
        let holder = System::holder(system);
        let changes = claims(map)
            .into_iter()
            .fold(Changes::new(), |changes, claim| {
                changes.claim(claim, &holder)
            });
        Ok((map, false, changes))
    }
}

fn claims(map: IdMap) -> [String; 2] {
    [
        format!("ids/user/{}", map.host_uid),
        format!("ids/group/{}", map.host_gid),
    ]
}

/// First ids of all the ranges of [`LENGTH`] that fit.
fn starts(ranges: &[Range]) -> impl Iterator<Item = u32> {
    ranges.iter().flat_map(|range| {
        let first = range.first;
        (0..range.count / LENGTH).map(move |number| first + number * LENGTH)
    })
}

fn parse(text: &str, file: &'static str) -> Result<Vec<Range>, SystemError> {
    let mut ranges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split(':');
        if !words
            .next()
            .is_some_and(|owner| [OWNER.0, OWNER.1].contains(&owner))
        {
            continue;
        }
        let mut next = || words.next().and_then(|word| word.parse::<u32>().ok());
        let range = next().zip(next()).filter(|_| words.next().is_none());
        match range {
            // The last id of all means "none" to the kernel.
            Some((first, count)) if first.checked_add(count).is_some() => {
                ranges.push(Range { first, count });
            }
            _ => {
                return Err(SystemError::BadIdLine {
                    file,
                    line: number + 1,
                    text: line.chars().take(100).collect(),
                });
            }
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_what_both_files_grant_root() {
        let users = "# who\njo:7:70000\nroot:100000:131072\n0:500000:65536\n";
        let groups = "root:200000:65535\nroot:300000:200000\n";
        let granted = Granted::parse(users, groups).expect("valid");
        let maps: Vec<_> = granted
            .maps()
            .map(|map| (map.host_uid, map.host_gid, map.length))
            .collect();
        assert_eq!(
            maps,
            [
                (100_000, 300_000, LENGTH),
                (165_536, 365_536, LENGTH),
                (500_000, 431_072, LENGTH),
            ]
        );
    }

    #[test]
    fn without_any_line_ids_far_above_users_are_taken() {
        for (users, groups) in [("", ""), ("jo:1:70000\n", "\n")] {
            let granted = Granted::parse(users, groups).expect("valid");
            let first = granted.maps().next().expect("there are some");
            assert_eq!((first.host_uid, first.host_gid), (1_000_000, 1_000_000));
            assert!(granted.maps().count() > 10_000);
        }
    }

    #[test]
    fn what_cannot_be_meant_is_told_by_file_and_line() {
        for (users, groups, expected) in [
            (
                "root:1:65536\n",
                "",
                "/etc/subuid gives \"root\" ids and /etc/subgid",
            ),
            (
                "",
                "root:1:65536\n",
                "/etc/subgid gives \"root\" ids and /etc/subuid",
            ),
            (
                "root:1:1000\n",
                "root:1:65536\n",
                "/etc/subuid gives \"root\" no 65536",
            ),
            ("a:1:2\nroot:x:1\n", "", "/etc/subuid, line 2"),
            ("root:4294967295:65536\n", "", "/etc/subuid, line 1"),
            ("root:1:2:3\n", "", "/etc/subuid, line 1"),
        ] {
            let error = Granted::parse(users, groups).expect_err(users).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
