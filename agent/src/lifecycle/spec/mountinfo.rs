//! The host's mounts, as far as a container's own need to know them.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// Options of cgroup2 that belong to the hierarchy, not to the mount.
const CGROUP2_OPTIONS: [&str; 6] = [
    "nsdelegate",
    "favordynmods",
    "memory_localevents",
    "memory_recursiveprot",
    "memory_hugetlb_accounting",
    "pids_localevents",
];

/// Mounts in the order of the table.
#[derive(Debug, Default)]
pub(super) struct MountInfo(Vec<Line>);

#[derive(Debug)]
struct Line {
    point: PathBuf,
    file_system: String,
    shared: bool,
    slave: bool,
    /// Only of a cgroup2 mount.
    cgroup2: Option<Vec<String>>,
}

impl MountInfo {
    /// This process's mounts; none if they can't be read.
    pub(super) fn read() -> Self {
        Self::parse(&fs::read("/proc/self/mountinfo").unwrap_or_default())
    }

    /// Source: proc_pid_mountinfo(5).
    fn parse(table: &[u8]) -> Self {
        Self(table.split(|&b| b == b'\n').filter_map(line).collect())
    }

    /// Whether the mount that `path` is on is shared, and whether it is a slave.
    pub(super) fn propagation_at(&self, path: &Path) -> (bool, bool) {
        self.mount_of(path)
            .map_or((false, false), |line| (line.shared, line.slave))
    }

    /// Type of the file system that `path` is on.
    pub(super) fn file_system_at(&self, path: &Path) -> &str {
        self.mount_of(path)
            .map_or("file system", |line| line.file_system.as_str())
    }

    /// Where something is mounted below `path`.
    pub(super) fn points_below(&self, path: &Path) -> impl Iterator<Item = &Path> {
        let points = self.0.iter().map(|line| line.point.as_path());
        points.filter(move |point| *point != path && point.starts_with(path))
    }

    fn mount_of(&self, path: &Path) -> Option<&Line> {
        // Of several mounts at one point the last covers the others.
        self.0
            .iter()
            .filter(|line| path.starts_with(&line.point))
            .max_by_key(|line| line.point.components().count())
    }

    pub(super) fn cgroup2_options(&self) -> Vec<String> {
        self.0
            .iter()
            .find_map(|line| line.cgroup2.clone())
            .unwrap_or_default()
    }
}

fn line(line: &[u8]) -> Option<Line> {
    let mut fields = line.split(|&b| b == b' ');
    let point = path(fields.nth(4)?);
    let _options = fields.next()?;
    let (mut shared, mut slave) = (false, false);
    for field in fields.by_ref().take_while(|field| *field != b"-") {
        shared |= field.starts_with(b"shared:");
        slave |= field.starts_with(b"master:");
    }
    let file_system = String::from_utf8_lossy(fields.next()?).into_owned();
    let cgroup2 = (file_system == "cgroup2").then(|| {
        let options = String::from_utf8_lossy(fields.nth(1).unwrap_or_default());
        let kept = options
            .split(',')
            .filter(|option| CGROUP2_OPTIONS.contains(option));
        kept.map(str::to_owned).collect()
    });
    Some(Line {
        point,
        file_system,
        shared,
        slave,
        cgroup2,
    })
}

/// Blanks and backslashes are written as octal numbers.
fn path(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = field
            .get(at + 1..at + 4)
            .filter(|_| field[at] == b'\\')
            .and_then(|digits| {
                let text = std::str::from_utf8(digits).ok()?;
                u8::from_str_radix(text, 8).ok()
            });
        out.push(octal.unwrap_or(field[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
31 22 8:2 / /mnt/my\\040disk rw master:5 - ext4 /dev/sda2 rw
32 22 8:3 / /mnt/private rw - xfs /dev/sda3 rw
33 22 8:4 / /mnt/over rw shared:3 - xfs /dev/sda4 rw
34 33 8:5 / /mnt/over rw - xfs /dev/sda5 rw
35 22 8:6 / /mnt/both rw shared:4 master:2 propagate_from:1 - xfs /dev/sda6 rw
broken line
";

    #[test]
    fn propagation_is_that_of_the_innermost_last_mount() {
        let mounts = MountInfo::parse(TABLE);
        for (path, expected) in [
            ("/", (true, false)),
            ("/home/x", (true, false)),
            ("/mnt/my disk/x", (false, true)),
            ("/mnt/private", (false, false)),
            ("/mnt/privateer", (true, false)),
            ("/mnt/over/x", (false, false)),
            ("/mnt/both", (true, true)),
        ] {
            assert_eq!(mounts.propagation_at(Path::new(path)), expected, "{path}");
        }
        assert_eq!(
            MountInfo::default().propagation_at(Path::new("/")),
            (false, false)
        );
    }

    #[test]
    fn options_of_the_cgroup_hierarchy_are_kept() {
        assert_eq!(
            MountInfo::parse(TABLE).cgroup2_options(),
            ["nsdelegate", "memory_recursiveprot"]
        );
    }
}
