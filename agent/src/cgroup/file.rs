//! Cgroup files: small, read in one piece, written in one call.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::Path,
};

use super::CgroupError;

/// Reads a whole file.
pub(super) fn read(file: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(file).map_err(|source| CgroupError::call("read", file, source))
}

/// Reads a whole file; `None` if it is not there.
pub(super) fn read_if_there(file: &Path) -> Result<Option<String>, CgroupError> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        // A file of a cgroup that is being removed answers ENODEV.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(ENODEV) => {
            Ok(None)
        }
        // Pressure files exist while PSI is turned off at boot.
        Err(e) if e.raw_os_error() == Some(EOPNOTSUPP) => Ok(None),
        Err(source) => Err(CgroupError::call("read", file, source)),
    }
}

/// Reads one number.
pub(super) fn read_number(file: &Path) -> Result<u64, CgroupError> {
    let text = read(file)?;
    text.trim()
        .parse()
        .map_err(|_| CgroupError::malformed(file, &text))
}

/// Reads one number; `None` if the file is not there or says `max`.
pub(super) fn read_limit(file: &Path) -> Result<Option<u64>, CgroupError> {
    match read_if_there(file)? {
        None => Ok(None),
        Some(text) if text.trim() == "max" => Ok(None),
        Some(text) => text
            .trim()
            .parse()
            .map(Some)
            .map_err(|_| CgroupError::malformed(file, &text)),
    }
}

/// Writes a value in one call; the file must exist.
pub(super) fn write(file: &Path, value: &str) -> Result<(), CgroupError> {
    write_raw(file, value).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => CgroupError::call("open", file, source),
        _ => CgroupError::refused(file, value, source),
    })
}

pub(super) fn write_raw(file: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(file)?
        .write_all(value.as_bytes())
}

/// The value of `key` in a file of `key value` lines.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

const ENODEV: i32 = 19;
const EOPNOTSUPP: i32 = 95;
