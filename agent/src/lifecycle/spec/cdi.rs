//! Devices of the Container Device Interface: what a vendor's files say has to change in a container
//! so that it can use one of them.
//!
//! Files are read anew for each container that names a device, so one written a moment ago counts,
//! and one that went does not. A file that can't be read or means nothing is passed over: it is
//! told only to whom asks for a device that then isn't there.
//!
//! Own types, a few lines each: the crate that the vendors keep brings a second argument parser, a
//! JSON schema engine, an unmaintained YAML reader and errors without facts.
//!
//! Source: CDI specification, versions 0.3.0 to 1.1.0 (SPEC.md and the changes between them).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{
    Hook, Hooks, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec,
};
use serde::Deserialize;

use super::{environment::Environment, host::device_node, mounts::sort};

/// Prefix of annotations whose values name devices, as device plugins without the field send them.
const ANNOTATION: &str = "cdi.k8s.io/";

/// Longest file that is read.
const FILE_BYTES: u64 = 4 << 20;

/// Most files of one directory that are read.
const FILES: usize = 1000;

/// A device that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// No file has it.
    #[error("CDI device {name} is in no file of {}{}", joined(dirs), told(broken))]
    Unresolvable {
        /// As asked.
        name: String,
        /// Where files are looked for.
        dirs: Vec<PathBuf>,
        /// Files that could not be used.
        broken: Vec<String>,
    },
    /// Several files of one directory have it, and none of a later one decides.
    #[error("CDI device {name} is in several files: {}", joined(files))]
    Ambiguous {
        /// As asked.
        name: String,
        /// Which.
        files: Vec<PathBuf>,
    },
    /// Its file asks for something that this agent does not do.
    #[error("CDI device {name} needs {feature}, which is not built in")]
    Unsupported {
        /// As asked.
        name: String,
        /// Name of the edit.
        feature: &'static str,
    },
    /// Its file asks for something that has no meaning.
    #[error("CDI device {name}: {edit} {value:?} is not valid, expected {expected}")]
    Edit {
        /// As asked.
        name: String,
        /// Which edit.
        edit: &'static str,
        /// As the file has it.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// A device node of it is not on the host.
    #[error("CDI device {name}: cannot use device node {}", path.display())]
    Node {
        /// As asked.
        name: String,
        /// Path on the host.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn joined(paths: &[PathBuf]) -> String {
    let shown: Vec<_> = paths.iter().map(|path| path.to_string_lossy()).collect();
    shown.join(", ")
}

fn told(broken: &[String]) -> String {
    if broken.is_empty() {
        return String::new();
    }
    format!("; not usable are {}", broken.join("; "))
}

/// All devices that a container names, in its field and in its annotations, each once.
///
/// # Errors
/// The first name that is none.
pub fn cdi_devices<'a>(
    field: &[String],
    annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Vec<String>, String> {
    let mut devices: Vec<String> = Vec::new();
    let listed = annotations
        .into_iter()
        .filter(|(key, _)| key.starts_with(ANNOTATION))
        .flat_map(|(_, value)| value.split(','));
    for name in field.iter().map(String::as_str).chain(listed) {
        split(name).ok_or(name)?;
        if !devices.iter().any(|known| known == name) {
            devices.push(name.to_owned());
        }
    }
    Ok(devices)
}

/// Kind and device of a qualified name.
fn split(name: &str) -> Option<(&str, &str)> {
    let (kind, device) = name.split_once('=')?;
    (is_kind(kind) && is_word(device, "_-.:", char::is_alphanumeric)).then_some((kind, device))
}

fn is_kind(kind: &str) -> bool {
    kind.split_once('/').is_some_and(|(vendor, class)| {
        is_word(vendor, "_-.", char::is_alphabetic) && is_word(class, "_-.", char::is_alphabetic)
    })
}

/// ASCII letters, digits and `others`, which neither begin nor end it.
fn is_word(text: &str, others: &str, first: fn(char) -> bool) -> bool {
    let within = |c: char| c.is_ascii_alphanumeric() || others.contains(c);
    text.chars().all(within)
        && text.starts_with(first)
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
}

/// A file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    cdi_version: String,
    kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Device {
    name: String,
    #[serde(default, rename = "annotations")]
    _annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<Node>,
    hooks: Vec<HookEdit>,
    mounts: Vec<MountEdit>,
    intel_rdt: Option<serde_json::Value>,
    #[serde(rename = "additionalGids")]
    additional_gids: Vec<u32>,
    net_devices: Vec<serde_json::Value>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Node {
    path: String,
    #[serde(default)]
    host_path: Option<String>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    major: Option<i64>,
    #[serde(default)]
    minor: Option<i64>,
    #[serde(default)]
    file_mode: Option<u32>,
    #[serde(default)]
    permissions: Option<String>,
    #[serde(default)]
    uid: Option<u32>,
    #[serde(default)]
    gid: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MountEdit {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HookEdit {
    hook_name: String,
    path: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<String>>,
    #[serde(default)]
    timeout: Option<i64>,
}

/// Whether files of this version can be read.
fn is_known(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    let mut next = || numbers.next().flatten();
    matches!(
        (next(), next(), next(), version.split('.').count()),
        (Some(0), Some(3..=8), Some(0), 3) | (Some(1), Some(0..=1), Some(0), 3)
    )
}

/// What is to change in a container, device by device; all that had to be asked of the host is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CdiEdits {
    env: Vec<(String, String)>,
    nodes: Vec<(LinuxDevice, Option<LinuxDeviceCgroup>)>,
    mounts: Vec<Mount>,
    hooks: Vec<(HookKind, Hook)>,
    gids: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HookKind {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

/// Finds `devices` in the files of `dirs`, of which later ones go before, and what they ask for.
/// Blocking.
///
/// # Errors
/// `Unresolvable`, `Ambiguous` for devices, `Unsupported`, `Edit`, `Node` for what they ask for.
pub fn resolve(devices: &[String], dirs: &[PathBuf]) -> Result<CdiEdits, CdiError> {
    let mut edits = CdiEdits::default();
    if devices.is_empty() {
        return Ok(edits);
    }
    let catalog = Catalog::read(dirs);
    let mut whole = BTreeSet::new();
    for name in devices {
        let (file, device) = catalog.find(name, dirs)?;
        // What a file asks for as a whole counts once, before the first of its devices.
        if whole.insert(file) {
            edits.add(name, &catalog.files[file].file.container_edits)?;
        }
        let device = &catalog.files[file].file.devices[device];
        edits.add(name, &device.container_edits)?;
    }
    Ok(edits)
}

struct Read {
    path: PathBuf,
    /// Number of its directory.
    rank: usize,
    file: File,
}

/// All files that could be read.
struct Catalog {
    files: Vec<Read>,
    broken: Vec<String>,
}

impl Catalog {
    fn read(dirs: &[PathBuf]) -> Self {
        let mut catalog = Self {
            files: Vec::new(),
            broken: Vec::new(),
        };
        for (rank, dir) in dirs.iter().enumerate() {
            for path in names(dir) {
                match read_file(&path) {
                    Ok(file) => catalog.files.push(Read { path, rank, file }),
                    Err(reason) => {
                        let told = format!("{} ({reason})", path.display());
                        catalog.broken.push(told);
                    }
                }
            }
        }
        catalog
    }

    /// Numbers of the file and of the device in it.
    fn find(&self, name: &str, dirs: &[PathBuf]) -> Result<(usize, usize), CdiError> {
        let (kind, device) = split(name).unwrap_or_default();
        let mut found: Vec<(usize, usize)> = Vec::new();
        for (number, read) in self.files.iter().enumerate() {
            let at = read.file.devices.iter().position(|one| one.name == device);
            let Some(at) = at.filter(|_| read.file.kind == kind) else {
                continue;
            };
            // Directories come in rising order.
            if found
                .last()
                .is_some_and(|(last, _)| self.files[*last].rank < read.rank)
            {
                found.clear();
            }
            found.push((number, at));
        }
        match found[..] {
            [one] => Ok(one),
            [] => Err(CdiError::Unresolvable {
                name: name.to_owned(),
                dirs: dirs.to_vec(),
                broken: self.broken.clone(),
            }),
            _ => Err(CdiError::Ambiguous {
                name: name.to_owned(),
                files: found
                    .iter()
                    .map(|(file, _)| self.files[*file].path.clone())
                    .collect(),
            }),
        }
    }
}

/// Files of a directory that can be of devices, sorted; a missing directory has none.
fn names(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|end| end == "json" || end == "yaml")
        })
        .take(FILES)
        .collect();
    paths.sort();
    paths
}

fn read_file(path: &Path) -> Result<File, String> {
    let metadata = fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() || metadata.len() > FILE_BYTES {
        return Err("it is not a regular file of at most 4 MiB".to_owned());
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    // JSON is tried first, because YAML's reading of it differs in the odd case.
    let file: File = if path.extension().is_some_and(|end| end == "json") {
        serde_json::from_str(&text).map_err(|error| error.to_string())?
    } else {
        serde_saphyr::from_str(&text).map_err(|error| error.to_string())?
    };
    if !is_known(&file.cdi_version) {
        return Err(format!(
            "version {:?} is not one from 0.3.0 to 1.1.0",
            file.cdi_version
        ));
    }
    if !is_kind(&file.kind) {
        return Err(format!(
            "kind {:?} is not of the form vendor.com/class",
            file.kind
        ));
    }
    let mut seen = BTreeSet::new();
    for device in &file.devices {
        if split(&format!("{}={}", file.kind, device.name)).is_none() {
            return Err(format!("{:?} is not a name of a device", device.name));
        }
        if !seen.insert(&device.name) {
            return Err(format!("device {:?} is in it twice", device.name));
        }
    }
    Ok(file)
}

impl CdiEdits {
    fn add(&mut self, name: &str, edits: &Edits) -> Result<(), CdiError> {
        let unsupported = |feature| CdiError::Unsupported {
            name: name.to_owned(),
            feature,
        };
        if edits.intel_rdt.is_some() {
            return Err(unsupported("intelRdt"));
        }
        if !edits.net_devices.is_empty() {
            return Err(unsupported("netDevices"));
        }
        let invalid = |edit, value: &str, expected| CdiError::Edit {
            name: name.to_owned(),
            edit,
            value: value.chars().take(200).collect(),
            expected,
        };
        for entry in &edits.env {
            match entry.split_once('=') {
                Some((key, value)) if !key.is_empty() && !entry.contains('\0') => {
                    self.env.push((key.to_owned(), value.to_owned()));
                }
                _ => return Err(invalid("env", entry, "NAME=value")),
            }
        }
        for wish in &edits.device_nodes {
            self.nodes.push(node(name, wish, invalid)?);
        }
        for wish in &edits.mounts {
            self.mounts.push(mount(wish, invalid)?);
        }
        for wish in &edits.hooks {
            self.hooks.push(hook(wish, invalid)?);
        }
        self.gids
            .extend(edits.additional_gids.iter().filter(|gid| **gid != 0));
        Ok(())
    }

    /// Changes a finished specification; called last, so that a device has the last word.
    pub(super) fn apply(&self, spec: &mut Spec) {
        if let Some(process) = spec.process_mut() {
            let mut env = Environment::of(process);
            for (name, value) in &self.env {
                env.set(name.clone(), value.clone());
            }
            process.set_env(Some(env.encoded()));
            let mut gids = process.user().additional_gids().clone().unwrap_or_default();
            for gid in &self.gids {
                if !gids.contains(gid) {
                    gids.push(*gid);
                }
            }
            process.user_mut().set_additional_gids(Some(gids));
        }
        let owner = spec.process().as_ref().map(|process| {
            let user = process.user();
            (user.uid(), user.gid())
        });
        if let Some(linux) = spec.linux_mut() {
            let mut nodes = linux.devices().clone().unwrap_or_default();
            let mut resources = linux.resources().clone().unwrap_or_default();
            let mut rules = resources.devices().clone().unwrap_or_default();
            for (node, rule) in &self.nodes {
                let mut node = node.clone();
                // Whoever runs in the container is to use it.
                let (uid, gid) = owner.unwrap_or_default();
                let owner = (node.uid().or(Some(uid)), node.gid().or(Some(gid)));
                node.set_uid(owner.0).set_gid(owner.1);
                nodes.retain(|known| known.path() != node.path());
                nodes.push(node);
                rules.extend(rule.clone());
            }
            resources.set_devices((!rules.is_empty()).then_some(rules));
            linux
                .set_devices((!nodes.is_empty()).then_some(nodes))
                .set_resources(Some(resources));
        }
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &self.mounts {
            mounts.retain(|known| known.destination() != mount.destination());
            mounts.push(mount.clone());
        }
        sort(&mut mounts);
        spec.set_mounts(Some(mounts));
        if !self.hooks.is_empty() {
            spec.set_hooks(Some(self.hooks()));
        }
    }

    fn hooks(&self) -> Hooks {
        let of = |kind| {
            let list: Vec<Hook> = self
                .hooks
                .iter()
                .filter(|(known, _)| *known == kind)
                .map(|(_, hook)| hook.clone())
                .collect();
            (!list.is_empty()).then_some(list)
        };
        let mut hooks = Hooks::default();
        hooks
            .set_prestart(of(HookKind::Prestart))
            .set_create_runtime(of(HookKind::CreateRuntime))
            .set_create_container(of(HookKind::CreateContainer))
            .set_start_container(of(HookKind::StartContainer))
            .set_poststart(of(HookKind::Poststart))
            .set_poststop(of(HookKind::Poststop));
        hooks
    }
}

fn plain_path(path: &str) -> bool {
    path.starts_with('/') && !path.contains('\0') && !path.split('/').any(|part| part == "..")
}

fn node(
    name: &str,
    wish: &Node,
    invalid: impl Fn(&'static str, &str, &'static str) -> CdiError,
) -> Result<(LinuxDevice, Option<LinuxDeviceCgroup>), CdiError> {
    if !plain_path(&wish.path) {
        return Err(invalid("deviceNodes.path", &wish.path, "an absolute path"));
    }
    let kind = match wish.kind.as_deref().unwrap_or_default() {
        "" => None,
        "b" => Some(LinuxDeviceType::B),
        "c" | "u" => Some(LinuxDeviceType::C),
        "p" => Some(LinuxDeviceType::P),
        other => return Err(invalid("deviceNodes.type", other, "b, c, u or p")),
    };
    let mut device = LinuxDevice::default();
    device
        .set_path(wish.path.clone().into())
        .set_file_mode(wish.file_mode)
        .set_uid(wish.uid)
        .set_gid(wish.gid);
    let told = wish.major.is_some_and(|major| major != 0) || kind == Some(LinuxDeviceType::P);
    match kind.filter(|_| told) {
        Some(kind) => {
            device
                .set_typ(kind)
                .set_major(wish.major.unwrap_or_default())
                .set_minor(wish.minor.unwrap_or_default());
        }
        None => {
            let path = Path::new(wish.host_path.as_deref().unwrap_or(&wish.path));
            let found = device_node(path).map_err(|source| CdiError::Node {
                name: name.to_owned(),
                path: path.to_owned(),
                source,
            })?;
            let is = if found.block {
                LinuxDeviceType::B
            } else {
                LinuxDeviceType::C
            };
            if kind.is_some_and(|kind| kind != is) {
                let expected = "the type that the host's node has";
                return Err(invalid("deviceNodes.type", &wish.path, expected));
            }
            device
                .set_typ(is)
                .set_major(found.major.into())
                .set_minor(found.minor.into());
        }
    }
    let permissions = match wish.permissions.as_deref().unwrap_or_default() {
        "" => "rwm",
        "none" => "",
        some if some.chars().all(|c| "rwm".contains(c)) => some,
        other => {
            return Err(invalid(
                "deviceNodes.permissions",
                other,
                "some of rwm, or none",
            ));
        }
    };
    let has_rule = !permissions.is_empty() && device.typ() != LinuxDeviceType::P;
    let rule = has_rule.then(|| {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true)
            .set_typ(Some(device.typ()))
            .set_major(Some(device.major()))
            .set_minor(Some(device.minor()))
            .set_access(Some(permissions.to_owned()));
        rule
    });
    Ok((device, rule))
}

fn mount(
    wish: &MountEdit,
    invalid: impl Fn(&'static str, &str, &'static str) -> CdiError,
) -> Result<Mount, CdiError> {
    if !plain_path(&wish.container_path) || wish.container_path == "/" {
        let expected = "an absolute path below /";
        return Err(invalid(
            "mounts.containerPath",
            &wish.container_path,
            expected,
        ));
    }
    if wish.host_path.is_empty() || wish.host_path.contains('\0') {
        return Err(invalid("mounts.hostPath", &wish.host_path, "a path"));
    }
    let mut options = wish.options.clone();
    let kind = wish.kind.clone().filter(|kind| !kind.is_empty());
    let is_bind = |option: &String| option == "bind" || option == "rbind";
    if kind.as_deref().is_none_or(|kind| kind == "bind") && !options.iter().any(is_bind) {
        options.push("bind".to_owned());
    }
    let mut mount = Mount::default();
    mount
        .set_destination(wish.container_path.clone().into())
        .set_source(Some(wish.host_path.clone().into()))
        .set_typ(Some(kind.unwrap_or_else(|| "bind".to_owned())))
        .set_options(Some(options));
    Ok(mount)
}

fn hook(
    wish: &HookEdit,
    invalid: impl Fn(&'static str, &str, &'static str) -> CdiError,
) -> Result<(HookKind, Hook), CdiError> {
    let kind = match wish.hook_name.as_str() {
        "prestart" => HookKind::Prestart,
        "createRuntime" => HookKind::CreateRuntime,
        "createContainer" => HookKind::CreateContainer,
        "startContainer" => HookKind::StartContainer,
        "poststart" => HookKind::Poststart,
        "poststop" => HookKind::Poststop,
        other => {
            return Err(invalid(
                "hooks.hookName",
                other,
                "a hook of the OCI specification",
            ));
        }
    };
    if !plain_path(&wish.path) {
        return Err(invalid("hooks.path", &wish.path, "an absolute path"));
    }
    let mut hook = Hook::default();
    hook.set_path(wish.path.clone().into())
        .set_args(wish.args.clone())
        .set_env(wish.env.clone())
        .set_timeout(wish.timeout);
    Ok((kind, hook))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::testing, *};

    struct Files {
        dir: tempfile::TempDir,
    }

    impl Files {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            for name in ["low", "high"] {
                fs::create_dir(dir.path().join(name)).expect("made");
            }
            Self { dir }
        }

        fn with(self, name: &str, text: impl ToString) -> Self {
            fs::write(self.dir.path().join(name), text.to_string()).expect("written");
            self
        }

        fn dirs(&self) -> Vec<PathBuf> {
            ["low", "high", "missing"]
                .map(|name| self.dir.path().join(name))
                .to_vec()
        }

        fn resolve(&self, names: &[&str]) -> Result<CdiEdits, CdiError> {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            resolve(&names, &self.dirs())
        }

        /// The specification of a plain container with these devices.
        fn spec(&self, names: &[&str]) -> Value {
            let mut wish = testing::Wish::new();
            wish.host.cdi = self.resolve(names).expect("resolvable");
            let built = testing::built(&wish).expect("valid");
            serde_json::to_value(built.spec).expect("is JSON")
        }

        fn refusal(&self, names: &[&str]) -> String {
            self.resolve(names).expect_err("refused").to_string()
        }
    }

    fn one(device: Value) -> Value {
        json!({"cdiVersion": "0.6.0", "kind": "v.com/gpu", "devices": [{"name": "d", "containerEdits": device}]})
    }

    #[test]
    fn names_are_united_and_checked() {
        let field = ["v.com/net=eth0", "v.com/gpu=a:1.2_b-c"].map(str::to_owned);
        let annotations = BTreeMap::from([
            (
                "cdi.k8s.io/a".to_owned(),
                "v.com/gpu=x,v.com/net=eth0".to_owned(),
            ),
            ("other".to_owned(), "not looked at".to_owned()),
        ]);
        assert_eq!(
            cdi_devices(&field, &annotations).expect("valid"),
            ["v.com/net=eth0", "v.com/gpu=a:1.2_b-c", "v.com/gpu=x"]
        );
        for name in [
            "",
            "gpu",
            "v.com/gpu",
            "v.com/gpu=",
            "gpu=x",
            "/gpu=x",
            "v.com/=x",
            "v.com/gpu=-x",
            "v.com/gpu=x-",
            "1v.com/gpu=x",
            "v.com/gpu=x=y",
            "v.com/g/p=x",
            "v.com/gpu=ü",
            "v.com/gpu=x ",
        ] {
            let refused = cdi_devices(&[name.to_owned()], &BTreeMap::new());
            assert_eq!(refused, Err(name.to_owned()));
        }
    }

    #[test]
    fn edits_reach_the_specification() {
        let yaml = "\
cdiVersion: 0.5.0
kind: v.com/gpu
annotations: {a: b}
containerEdits:
  env: [WHOLE=1]
devices:
  - name: x
    containerEdits:
      env: [\"PATH=/gpu\", \"X=a=b\"]
      deviceNodes:
        - path: /dev/gpu
          hostPath: /dev/null
          permissions: r
        - {path: /dev/made, type: c, major: 9, minor: 8, fileMode: 432, uid: 1, gid: 2}
        - {path: /dev/shut, type: b, major: 9, minor: 7, permissions: none}
      mounts:
        - {hostPath: /lib/gpu.so, containerPath: /usr/lib/gpu.so, options: [ro, nosuid]}
        - {hostPath: tmpfs, containerPath: /etc/hosts, type: tmpfs}
      additionalGids: [44, 0]
  - name: y
    containerEdits:
      hooks:
        - {hookName: createContainer, path: /bin/hook, args: [hook, now], timeout: 3}
";
        let files = Files::new().with("low/gpu.yaml", yaml);
        let spec = files.spec(&["v.com/gpu=x", "v.com/gpu=y"]);
        let env: Vec<&str> = spec["process"]["env"]
            .as_array()
            .expect("there")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert_eq!(
            env,
            ["PATH=/gpu", "HOSTNAME=pod", "HOME=/", "WHOLE=1", "X=a=b"]
        );
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([0, 44]));
        assert_eq!(
            spec["linux"]["devices"],
            json!([
                {"path": "/dev/gpu", "type": "c", "major": 1, "minor": 3, "uid": 0, "gid": 0},
                {"path": "/dev/made", "type": "c", "major": 9, "minor": 8, "fileMode": 432, "uid": 1, "gid": 2},
                {"path": "/dev/shut", "type": "b", "major": 9, "minor": 7, "uid": 0, "gid": 0},
            ])
        );
        assert_eq!(
            spec["linux"]["resources"]["devices"],
            json!([
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "r"},
                {"allow": true, "type": "c", "major": 9, "minor": 8, "access": "rwm"},
            ])
        );
        let at = |target: &str| {
            let mounts = spec["mounts"].as_array().expect("there");
            let found: Vec<_> = mounts
                .iter()
                .filter(|one| one["destination"] == target)
                .collect();
            assert_eq!(found.len(), 1, "{target}");
            found[0].clone()
        };
        assert_eq!(at("/etc/hosts")["type"], "tmpfs");
        assert_eq!(
            at("/usr/lib/gpu.so")["options"],
            json!(["ro", "nosuid", "bind"])
        );
        assert_eq!(
            spec["hooks"]["createContainer"],
            json!([{"path": "/bin/hook", "args": ["hook", "now"], "timeout": 3}])
        );
        assert_eq!(files.spec(&[]).get("hooks"), None);
    }

    #[test]
    fn later_directories_go_before_and_equals_refuse() {
        let env = |value: &str| one(json!({"env": [format!("FROM={value}")]}));
        let files = Files::new()
            .with("low/a.json", env("low"))
            .with("low/b.json", env("low"))
            .with("high/a.json", env("high"))
            .with("high/ignored.txt", "{");
        assert_eq!(
            files.resolve(&["v.com/gpu=d"]).expect("found").env,
            [("FROM".to_owned(), "high".to_owned())]
        );
        let files = files.with("high/b.json", env("high"));
        let refusal = files.refusal(&["v.com/gpu=d"]);
        assert!(
            refusal.contains("v.com/gpu=d") && refusal.contains("high/b.json"),
            "{refusal}"
        );
        assert!(!refusal.contains("low/"), "{refusal}");
    }

    #[test]
    fn a_broken_file_only_matters_to_whom_it_could_have_served() {
        let files = Files::new()
            .with("low/good.json", one(json!({"env": ["A=b"]})))
            .with("low/broken.json", "{")
            .with(
                "low/odd.json",
                json!({"cdiVersion": "0.6.0", "kind": "v.com/odd", "devices": [], "surprise": 1}),
            )
            .with(
                "low/new.json",
                json!({"cdiVersion": "2.0.0", "kind": "v.com/new", "devices": []}),
            );
        assert!(files.resolve(&["v.com/gpu=d"]).is_ok());
        let refusal = files.refusal(&["v.com/gpu=d", "v.com/new=x"]);
        for part in [
            "v.com/new=x",
            "broken.json",
            "odd.json (unknown field `surprise`",
            "\"2.0.0\"",
        ] {
            assert!(refusal.contains(part), "{part}: {refusal}");
        }
    }

    #[test]
    fn versions() {
        for (version, known) in [
            ("0.3.0", true),
            ("0.8.0", true),
            ("1.0.0", true),
            ("1.1.0", true),
            ("0.2.0", false),
            ("0.9.0", false),
            ("1.2.0", false),
            ("1.0", false),
            ("v1.0.0", false),
            ("1.0.0.0", false),
            ("", false),
        ] {
            assert_eq!(is_known(version), known, "{version}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_name_of_the_device() {
        for (edits, expected) in [
            (json!({"intelRdt": {"closID": "x"}}), "needs intelRdt"),
            (
                json!({"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}),
                "needs netDevices",
            ),
            (json!({"env": ["NOVALUE"]}), "env \"NOVALUE\""),
            (
                json!({"deviceNodes": [{"path": "/dev/no-such-device"}]}),
                "/dev/no-such-device",
            ),
            (
                json!({"deviceNodes": [{"path": "/dev/null", "type": "b"}]}),
                "deviceNodes.type",
            ),
            (
                json!({"deviceNodes": [{"path": "/dev/null", "type": "x"}]}),
                "deviceNodes.type \"x\"",
            ),
            (
                json!({"deviceNodes": [{"path": "dev/null"}]}),
                "deviceNodes.path",
            ),
            (
                json!({"deviceNodes": [{"path": "/dev/null", "permissions": "x"}]}),
                "deviceNodes.permissions",
            ),
            (
                json!({"mounts": [{"hostPath": "/a", "containerPath": "/a/../b"}]}),
                "mounts.containerPath",
            ),
            (
                json!({"mounts": [{"hostPath": "", "containerPath": "/b"}]}),
                "mounts.hostPath",
            ),
            (
                json!({"hooks": [{"hookName": "never", "path": "/b"}]}),
                "hooks.hookName \"never\"",
            ),
            (
                json!({"hooks": [{"hookName": "poststop", "path": "b"}]}),
                "hooks.path",
            ),
        ] {
            let refusal = Files::new()
                .with("low/a.json", one(edits))
                .refusal(&["v.com/gpu=d"]);
            assert!(refusal.contains("v.com/gpu=d"), "{refusal}");
            assert!(refusal.contains(expected), "{expected}: {refusal}");
        }
    }
}
