//! Network configurations: which file is chosen, what a list must be, and what a plugin is handed.
//!
//! The folder's files that end in `.conflist`, `.conf` or `.json` are looked at by name; the first
//! that is valid is the network. It is read again each time it is asked for, so that a change is
//! noticed without a restart and without a watch that could miss one.
//!
//! Source: CNI specification, sections 1 and 3.

use std::{
    fmt, fs, io,
    io::Read as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::CniError;

/// Largest file that is read.
const FILE_BYTES: u64 = 1 << 20;
/// Longest list.
const PLUGINS: usize = 32;

/// Versions of the specification, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Version {
    /// Rich results and lists.
    #[serde(rename = "0.3.0")]
    V0_3_0,
    /// The same.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// CHECK, and `prevResult` for DEL.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// Addresses without a version.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// GC and STATUS.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];

    /// As in a configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version with this text, if we speak it.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == text)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a plugin is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Compare with the result of ADD.
    Check,
    /// Drop what belongs to no attachment.
    Gc,
    /// Can ADD be served?
    Status,
}

impl Verb {
    /// Value of `CNI_COMMAND`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
        }
    }

    /// The first version that has it.
    const fn since(self) -> Version {
        match self {
            Self::Add | Self::Del => Version::V0_3_0,
            Self::Check => Version::V0_4_0,
            Self::Gc | Self::Status => Version::V1_1_0,
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A list of plugins that make a network, in the order of ADD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfList {
    /// Name of the network.
    pub name: String,
    /// The version that is spoken.
    pub version: Version,
    /// No CHECK.
    #[serde(default)]
    pub disable_check: bool,
    /// No GC.
    #[serde(default)]
    pub disable_gc: bool,
    /// As configured; each has a `type`.
    pub plugins: Vec<Map<String, Value>>,
}

impl ConfList {
    /// Understands a file's text; `single` means that it is one plugin without a list around it.
    ///
    /// # Errors
    /// What is wrong, and what would be valid.
    pub fn parse(text: &[u8], single: bool) -> Result<Self, String> {
        let Value::Object(mut object) =
            serde_json::from_slice(text).map_err(|error| format!("is no JSON: {error}"))?
        else {
            return Err("is not a JSON object".to_owned());
        };
        let name = match object.get("name") {
            Some(Value::String(name)) if is_name(name) => name.clone(),
            other => {
                return Err(format!(
                    "name = {}: letters, digits, '.', '_' and '-' are needed, the first a letter or digit",
                    shown(other)
                ));
            }
        };
        let version = version(&object)?;
        let disable_check = flag(&object, "disableCheck")?;
        let disable_gc = flag(&object, "disableGC")?;
        let plugins = if single {
            if !object.contains_key("type") {
                return Err(
                    "type is missing; a list of plugins belongs into a .conflist".to_owned(),
                );
            }
            vec![object]
        } else {
            match object.remove("plugins") {
                Some(Value::Array(plugins)) => plugins
                    .into_iter()
                    .enumerate()
                    .map(|(index, plugin)| match plugin {
                        Value::Object(plugin) => Ok(plugin),
                        other => Err(format!("plugins[{index}] = {other} is not an object")),
                    })
                    .collect::<Result<Vec<_>, _>>()?,
                other => return Err(format!("plugins = {} is not a list", shown(other.as_ref()))),
            }
        };
        if plugins.is_empty() || plugins.len() > PLUGINS {
            return Err(format!(
                "plugins has {} entries: 1 to {PLUGINS} are needed",
                plugins.len()
            ));
        }
        for (index, plugin) in plugins.iter().enumerate() {
            validate(plugin).map_err(|reason| format!("plugins[{index}]: {reason}"))?;
        }
        Ok(Self {
            name,
            version,
            disable_check,
            disable_gc,
            plugins,
        })
    }

    /// Whether this network is asked to do it.
    pub fn serves(&self, verb: Verb) -> bool {
        let switched_off = match verb {
            Verb::Check => self.disable_check,
            Verb::Gc => self.disable_gc,
            Verb::Add | Verb::Del | Verb::Status => false,
        };
        self.version >= verb.since() && !switched_off
    }

    /// Types of the plugins, in order.
    pub fn types(&self) -> impl DoubleEndedIterator<Item = &str> + ExactSizeIterator {
        self.plugins.iter().map(type_of)
    }

    /// Every program that the list names: its plugins, and those that give them addresses.
    pub fn programs(&self) -> impl Iterator<Item = &str> {
        let ipam = |plugin| Map::get(plugin, "ipam")?.get("type")?.as_str();
        self.plugins
            .iter()
            .flat_map(move |plugin| [Some(type_of(plugin)), ipam(plugin)])
            .flatten()
            .filter(|program| !program.is_empty())
    }

    /// Some capability is passed to a plugin of this network.
    pub fn declares(&self, capability: &str) -> bool {
        self.plugins
            .iter()
            .any(|plugin| declared(plugin, capability))
    }

    /// What plugin number `index` reads from standard input: its own configuration, the network's
    /// name and version, the arguments of the capabilities that it declares, and what plugins
    /// before it made.
    pub(super) fn execution(
        &self,
        index: usize,
        capabilities: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Map<String, Value> {
        let mut conf = self.plugins[index].clone();
        let runtime: Map<_, _> = capabilities
            .iter()
            .filter(|(name, _)| declared(&conf, name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        conf.remove("capabilities");
        conf.remove("prevResult");
        conf.insert("name".into(), self.name.clone().into());
        conf.insert("cniVersion".into(), self.version.as_str().into());
        if !runtime.is_empty() {
            conf.insert("runtimeConfig".into(), runtime.into());
        }
        if let Some(previous) = previous {
            conf.insert("prevResult".into(), previous.clone());
        }
        conf
    }
}

fn declared(plugin: &Map<String, Value>, capability: &str) -> bool {
    plugin
        .get("capabilities")
        .and_then(|all| all.get(capability))
        .is_some_and(|one| one == &Value::Bool(true))
}

pub(super) fn type_of(plugin: &Map<String, Value>) -> &str {
    plugin
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The highest version that the file offers and we speak.
fn version(object: &Map<String, Value>) -> Result<Version, String> {
    let mut offered = Vec::new();
    match object.get("cniVersion") {
        None => {}
        Some(Value::String(one)) => offered.push(one.as_str()),
        Some(other) => return Err(format!("cniVersion = {other} is not a text")),
    }
    match object.get("cniVersions") {
        None => {}
        Some(Value::Array(more)) => offered.extend(more.iter().filter_map(Value::as_str)),
        Some(other) => return Err(format!("cniVersions = {other} is not a list")),
    }
    let best = offered.iter().filter_map(|text| Version::parse(text)).max();
    best.ok_or_else(|| {
        format!(
            "cniVersion = {}: one of {} is needed",
            shown(object.get("cniVersion")),
            Version::ALL.map(Version::as_str).join(", ")
        )
    })
}

/// Versions before 1.1 say these as text, too.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("{key} = {other} is neither true nor false")),
    }
}

fn validate(plugin: &Map<String, Value>) -> Result<(), String> {
    match plugin.get("type") {
        Some(Value::String(name)) if is_program(name) => {}
        other => return Err(format!("type = {} is not a program's name", shown(other))),
    }
    match plugin.get("capabilities") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(all)) if all.values().all(Value::is_boolean) => Ok(()),
        Some(other) => Err(format!(
            "capabilities = {other}: each must be true or false"
        )),
    }
}

/// A network's name, by the specification.
fn is_name(name: &str) -> bool {
    name.len() <= 255
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// A name within a folder, and no way out of it.
fn is_program(name: &str) -> bool {
    !["", ".", ".."].contains(&name) && name.len() <= 255 && !name.contains(['/', '\0'])
}

fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "(missing)".to_owned(), Value::to_string)
}

/// A configuration, and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The file.
    pub file: PathBuf,
    /// Its text.
    pub source: String,
    /// What it means.
    pub list: ConfList,
}

/// What the folder holds.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The network.
    pub chosen: Option<Arc<Chosen>>,
    /// Files that come before it, or all if there is none, and why they can't be used.
    pub refused: Vec<(PathBuf, String)>,
}

impl Found {
    /// The refused files as an error's words.
    pub(super) fn refusals(&self) -> String {
        self.refused
            .iter()
            .map(|(file, reason)| format!(": {} {reason}", file.display()))
            .collect()
    }
}

/// Reads the folder; a missing one is empty.
///
/// # Errors
/// `Conf` if the folder can't be listed.
pub(super) fn read(folder: &Path) -> Result<Found, CniError> {
    let unreadable = |error: io::Error| CniError::Conf {
        file: folder.to_owned(),
        reason: error.to_string(),
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::default()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if let Some("conflist" | "conf" | "json") = ending {
            files.push(path);
        }
    }
    files.sort();
    let mut found = Found::default();
    for file in files {
        match load(&file) {
            Ok(chosen) => {
                found.chosen = Some(Arc::new(chosen));
                break;
            }
            Err(reason) => found.refused.push((file, reason)),
        }
    }
    Ok(found)
}

fn load(file: &Path) -> Result<Chosen, String> {
    let text = text(file).map_err(|error| error.to_string())?;
    let single = file.extension().is_none_or(|ending| ending != "conflist");
    Ok(Chosen {
        file: file.to_owned(),
        list: ConfList::parse(text.as_bytes(), single)?,
        source: text,
    })
}

fn text(file: &Path) -> io::Result<String> {
    // A FIFO would hold us.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(file)?;
    if !opened.metadata()?.is_file() {
        return Err(io::Error::other("is not a file"));
    }
    let mut text = String::new();
    opened.take(FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES {
        return Err(io::Error::other(format!(
            "is larger than {FILE_BYTES} bytes"
        )));
    }
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_understood_and_what_is_wrong_is_named() {
        let check = |text: &str, single: bool, wrong: Option<&str>| {
            let found = ConfList::parse(text.as_bytes(), single);
            match (&found, wrong) {
                (Ok(_), None) => {}
                (Err(reason), Some(part)) if reason.contains(part) => {}
                _ => panic!("{text}: {found:?}"),
            }
        };
        let list = |rest: &str| format!(r#"{{"name":"n","cniVersion":"1.0.0"{rest}}}"#);
        check(&list(r#","plugins":[{"type":"bridge"}]"#), false, None);
        check(&list(r#","type":"bridge""#), true, None);
        check(
            &list(r#","plugins":[{"type":"bridge"}]"#),
            true,
            Some("type is missing"),
        );
        check(
            &list(r#","type":"bridge""#),
            false,
            Some("plugins = (missing)"),
        );
        check(&list(r#","plugins":[]"#), false, Some("0 entries"));
        check(&list(r#","plugins":[7]"#), false, Some("plugins[0] = 7"));
        check(
            &list(r#","plugins":[{"type":"../sh"}]"#),
            false,
            Some("plugins[0]: type"),
        );
        check(
            &list(r#","plugins":[{"type":".."}]"#),
            false,
            Some("plugins[0]: type"),
        );
        check(
            &list(r#","plugins":[{"type":7}]"#),
            false,
            Some("plugins[0]: type = 7"),
        );
        check(
            &list(r#","plugins":[{"type":"a","capabilities":{"x":1}}]"#),
            false,
            Some("capabilities"),
        );
        check(
            &list(r#","disableCheck":"no","plugins":[{"type":"a"}]"#),
            false,
            Some("disableCheck"),
        );
        check("[]", false, Some("not a JSON object"));
        check("", false, Some("no JSON"));
        check(r#"{"name":"-n","cniVersion":"1.0.0"}"#, false, Some("name"));
        check(
            r#"{"name":"n/m","cniVersion":"1.0.0"}"#,
            false,
            Some("name"),
        );
        check(
            r#"{"name":"n","plugins":[]}"#,
            false,
            Some("cniVersion = (missing)"),
        );
        check(
            r#"{"name":"n","cniVersion":"0.2.0","type":"a"}"#,
            true,
            Some("0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"),
        );
    }

    #[test]
    fn the_best_offered_version_is_spoken_and_decides_the_verbs() {
        let of = |text: &str| ConfList::parse(text.as_bytes(), true).unwrap();
        let list =
            of(r#"{"name":"n","cniVersion":"0.3.1","cniVersions":["0.4.0","9.0.0"],"type":"a"}"#);
        assert_eq!(list.version, Version::V0_4_0);
        assert!(list.serves(Verb::Check) && !list.serves(Verb::Gc));
        let list = of(
            r#"{"name":"n","cniVersion":"1.1.0","disableGC":true,"disableCheck":"TRUE","type":"a"}"#,
        );
        assert!(list.serves(Verb::Status) && !list.serves(Verb::Gc) && !list.serves(Verb::Check));
        let kept: ConfList = serde_json::from_str(&serde_json::to_string(&list).unwrap()).unwrap();
        assert_eq!(kept, list);
    }

    #[test]
    fn a_plugin_gets_its_own_capabilities_alone() {
        let list = ConfList::parse(
            br#"{"name":"n","cniVersion":"1.0.0","plugins":[
                {"type":"a","ipam":{"type":"pool"},"prevResult":{"stale":1}},
                {"type":"b","capabilities":{"mac":true,"ips":false,"dns":true}}]}"#,
            false,
        )
        .unwrap();
        assert_eq!(list.programs().collect::<Vec<_>>(), ["a", "pool", "b"]);
        assert!(list.declares("mac") && !list.declares("ips"));
        let Value::Object(args) = serde_json::json!({"mac": "m", "ips": ["i"]}) else {
            unreachable!()
        };
        assert_eq!(
            Value::Object(list.execution(0, &args, None)),
            serde_json::json!({"type":"a","ipam":{"type":"pool"},"name":"n","cniVersion":"1.0.0"})
        );
        assert_eq!(
            Value::Object(list.execution(1, &args, Some(&serde_json::json!({"ips":[]})))),
            serde_json::json!({"type":"b","name":"n","cniVersion":"1.0.0",
                "runtimeConfig":{"mac":"m"},"prevResult":{"ips":[]}})
        );
    }

    #[test]
    fn the_first_valid_file_by_name_is_the_network() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(&dir.path().join("none")).unwrap().chosen.is_none());
        let single = |name: &str| format!(r#"{{"name":"{name}","cniVersion":"1.0.0","type":"a"}}"#);
        let file = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        file("00-first.txt", &single("text"));
        file("50-last.json", &single("last"));
        fs::create_dir(dir.path().join("05-dir.conf")).unwrap();
        file("10-broken.conflist", "{");
        file("20-good.conf", &single("good"));
        let found = read(dir.path()).unwrap();
        assert_eq!(found.chosen.as_ref().unwrap().list.name, "good");
        assert_eq!(found.refused.len(), 2, "{found:?}");
        assert!(found.refusals().contains("10-broken.conflist is no JSON"));
        file("20-good.conf", &"x".repeat(2 << 20));
        let found = read(dir.path()).unwrap();
        assert_eq!(found.chosen.unwrap().list.name, "last");
        assert!(found.refused[2].1.contains("larger"), "{:?}", found.refused);
    }
}
