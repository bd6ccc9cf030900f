//! What comes beside a root tree: `metadata.yaml` with its templates, or the flat files of the LXC
//! layout.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::About;
use crate::image::error::ImageError;
use crate::rootfs::SmallFiles;

const METADATA: &str = "metadata.yaml";
/// All templates together: they are kept in a label.
const TEMPLATES_MAX_BYTES: u64 = 256 << 10;
const TEMPLATES_MAX: usize = 64;
/// One text of the metadata.
const TEXT_MAX: usize = 1024;

/// The metadata of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// As its maker spells it; `None` where nothing says.
    pub(crate) architecture: Option<String>,
    /// Seconds since 1970.
    creation_date: Option<i64>,
    properties: BTreeMap<String, String>,
    templates: Vec<Template>,
}

/// A file of the guest that is made from a text when something happens to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Where in the guest, absolute.
    pub path: String,
    /// `create`, `copy`, `rename`, `start`.
    pub when: Vec<String>,
    /// Only if the file is not there yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub create_only: bool,
    /// Who owns the file, inside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Whose group it has, inside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Its mode, octal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// What the text may refer to as `properties`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
    /// The text; `None` for a file of the image itself, in which the word `LXC_NAME` is replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

#[derive(Deserialize)]
struct Document {
    architecture: String,
    creation_date: i64,
    #[serde(default)]
    properties: Option<BTreeMap<String, Option<String>>>,
    #[serde(default)]
    templates: Option<BTreeMap<String, Rule>>,
}

#[derive(Deserialize)]
struct Rule {
    #[serde(default)]
    when: Vec<String>,
    template: String,
    #[serde(default)]
    create_only: bool,
    #[serde(default)]
    uid: Option<u32>,
    #[serde(default)]
    gid: Option<u32>,
    #[serde(default)]
    mode: Option<String>,
    #[serde(default)]
    properties: Option<BTreeMap<String, Option<String>>>,
}

impl Metadata {
    /// Reads `metadata.yaml` and the templates that it names.
    ///
    /// # Errors
    /// `Malformed`, `TooLarge`.
    pub(crate) fn of_image(files: &SmallFiles) -> Result<Metadata, ImageError> {
        let text = files
            .get(METADATA)
            .ok_or_else(|| malformed("the image has no metadata.yaml"))?;
        let text = std::str::from_utf8(text).map_err(|_| malformed("it is not UTF-8"))?;
        let document: Document = serde_saphyr::from_str(text)
            .map_err(|error| malformed(error.to_string().lines().next().unwrap_or_default()))?;
        let rules = document.templates.unwrap_or_default();
        if rules.len() > TEMPLATES_MAX {
            return Err(malformed(format!(
                "it has more than {TEMPLATES_MAX} templates"
            )));
        }
        let mut bytes = 0;
        let mut templates = Vec::new();
        for (path, rule) in rules {
            let template = template(path, rule, files)?;
            bytes += template.text.as_ref().map_or(0, String::len) as u64;
            if bytes > TEMPLATES_MAX_BYTES {
                return Err(ImageError::TooLarge {
                    what: "all templates together".to_owned(),
                    limit_bytes: TEMPLATES_MAX_BYTES,
                });
            }
            templates.push(template);
        }
        Ok(Metadata {
            architecture: Some(checked("architecture", document.architecture)?),
            creation_date: Some(document.creation_date),
            properties: texts("properties", document.properties)?,
            templates,
        })
    }

    /// Reads the metadata of the LXC layout: only its list of templates means something to us.
    ///
    /// # Errors
    /// `Malformed`.
    pub(crate) fn of_lxc(files: &SmallFiles) -> Result<Metadata, ImageError> {
        let text = files
            .get("templates")
            .map(Vec::as_slice)
            .unwrap_or_default();
        let text = std::str::from_utf8(text)
            .map_err(|_| malformed("its list of templates is not UTF-8"))?;
        let paths = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let templates: Result<Vec<Template>, ImageError> = paths
            .map(|path| {
                Ok(Template {
                    path: absolute(path)?,
                    when: vec!["create".to_owned(), "copy".to_owned()],
                    create_only: false,
                    uid: None,
                    gid: None,
                    mode: None,
                    properties: BTreeMap::new(),
                    text: None,
                })
            })
            .take(TEMPLATES_MAX)
            .collect();
        Ok(Metadata {
            templates: templates?,
            ..Metadata::default()
        })
    }

    /// When the image was made, RFC 3339.
    pub(crate) fn created(&self) -> Option<String> {
        let at = jiff::Timestamp::from_second(self.creation_date?).ok()?;
        Some(at.to_string())
    }

    /// What the metadata alone says about the image.
    pub(crate) fn about(&self) -> About {
        let property = |name: &str| self.properties.get(name).cloned().unwrap_or_default();
        About {
            os: property("os"),
            release: property("release"),
            variant: property("variant"),
            serial: property("serial"),
            description: property("description"),
            source: None,
            requirements: BTreeMap::new(),
        }
    }

    /// The templates as JSON; empty if there are none.
    pub(crate) fn templates_json(&self) -> String {
        if self.templates.is_empty() {
            return String::new();
        }
        serde_json::to_string(&self.templates).unwrap_or_default()
    }
}

fn template(path: String, rule: Rule, files: &SmallFiles) -> Result<Template, ImageError> {
    let known = ["create", "copy", "rename", "start"];
    if let Some(odd) = rule
        .when
        .iter()
        .find(|word| !known.contains(&word.as_str()))
    {
        return Err(malformed(format!(
            "template of {path:?} is for `{}`, which is none of {}",
            shown(odd),
            known.join(", ")
        )));
    }
    let name = format!("templates/{}", rule.template);
    let text = files
        .get(&name)
        .and_then(|bytes| String::from_utf8(bytes.clone()).ok());
    let text = text.ok_or_else(|| malformed(format!("the image has no file {}", shown(&name))))?;
    Ok(Template {
        path: absolute(&path)?,
        when: rule.when,
        create_only: rule.create_only,
        uid: rule.uid,
        gid: rule.gid,
        mode: rule.mode.map(|mode| checked("mode", mode)).transpose()?,
        properties: texts("properties of a template", rule.properties)?,
        text: Some(text),
    })
}

fn absolute(path: &str) -> Result<String, ImageError> {
    let plain = path.starts_with('/') && !path.split('/').any(|part| part == "..");
    if !plain || path.contains('\0') || path.len() > TEXT_MAX {
        let path = shown(path);
        return Err(malformed(format!(
            "`{path}` is no absolute path without .."
        )));
    }
    Ok(path.to_owned())
}

fn texts(
    what: &str,
    map: Option<BTreeMap<String, Option<String>>>,
) -> Result<BTreeMap<String, String>, ImageError> {
    let texts = map.unwrap_or_default().into_iter();
    texts
        .map(|(key, value)| {
            Ok((
                checked(what, key)?,
                checked(what, value.unwrap_or_default())?,
            ))
        })
        .collect()
}

/// A text that can stand in labels and logs.
fn checked(what: &str, text: String) -> Result<String, ImageError> {
    if text.len() > TEXT_MAX || text.chars().any(char::is_control) {
        return Err(malformed(format!(
            "{what}: `{}` is longer than {TEXT_MAX} bytes or has control characters",
            shown(&text)
        )));
    }
    Ok(text)
}

fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

fn malformed(reason: impl Into<String>) -> ImageError {
    ImageError::Malformed {
        what: "the image's metadata".to_owned(),
        reason: reason.into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn files(files: &[(&str, &str)]) -> SmallFiles {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), text.as_bytes().to_vec());
        files.iter().map(owned).collect()
    }

    const YAML: &str = "
architecture: x86_64
creation_date: 1764000000
expiry_date: 1766592000
properties:
  os: Ubuntu
  release: 24.10
  variant: default
  serial: '20261124_07:42'
  description: Ubuntu 24.10 amd64
  empty:
templates:
  /etc/hostname:
    when: [create, copy]
    template: hostname.tpl
  /etc/hosts:
    when: [start]
    create_only: true
    template: hosts.tpl
    uid: 0
    mode: 0644
    properties: {a: 1}
";

    #[test]
    fn metadata_and_its_templates_are_read() {
        let files = files(&[
            ("metadata.yaml", YAML),
            ("templates/hostname.tpl", "{{ container.name }}\n"),
            ("templates/hosts.tpl", "127.0.1.1 x\n"),
        ]);
        let metadata = Metadata::of_image(&files).unwrap();
        assert_eq!(metadata.architecture.as_deref(), Some("x86_64"));
        assert_eq!(metadata.created().unwrap(), "2025-11-24T16:00:00Z");
        let about = metadata.about();
        assert_eq!(
            (about.os.as_str(), about.release.as_str()),
            ("Ubuntu", "24.10")
        );
        let templates: Vec<Template> = serde_json::from_str(&metadata.templates_json()).unwrap();
        assert_eq!(templates, metadata.templates);
        assert_eq!(templates[0].path, "/etc/hostname");
        assert_eq!(templates[0].text.as_deref(), Some("{{ container.name }}\n"));
        assert_eq!(templates[1].mode.as_deref(), Some("0644"));
        assert!(templates[1].create_only);
    }

    #[test]
    fn the_layout_of_lxc_has_a_list_of_files() {
        let files = files(&[
            ("config", "x"),
            ("templates", "/etc/hostname\n\n/etc/hosts\n"),
        ]);
        let metadata = Metadata::of_lxc(&files).unwrap();
        let paths: Vec<&str> = metadata.templates.iter().map(|one| &*one.path).collect();
        assert_eq!(paths, ["/etc/hostname", "/etc/hosts"]);
        let outside = SmallFiles::from([("templates".to_owned(), b"../etc/passwd".to_vec())]);
        assert!(Metadata::of_lxc(&outside).is_err());
    }

    #[test]
    fn bad_metadata_is_refused_with_the_reason() {
        let rule = |path: &str, rule: &str| {
            format!("architecture: a\ncreation_date: 1\ntemplates:\n  {path}: {rule}\n")
        };
        let table = [
            ("".to_owned(), "unexpected end"),
            ("architecture: x86_64".to_owned(), "creation_date"),
            (
                "architecture: a\ncreation_date: never".to_owned(),
                "line|never|number",
            ),
            (rule("/../etc", "{template: t}"), "absolute path"),
            (rule("etc", "{template: t}"), "absolute path"),
            (rule("/etc/x", "{template: ../../etc/passwd}"), "no file"),
            (
                rule("/etc/x", "{template: t, when: [boot]}"),
                "none of create",
            ),
            (
                format!(
                    "architecture: a\ncreation_date: 1\nproperties: {{os: {}}}",
                    "x".repeat(2000)
                ),
                "longer than",
            ),
        ];
        for (yaml, expected) in table {
            let files = files(&[("metadata.yaml", &yaml), ("templates/t", "x")]);
            let error = Metadata::of_image(&files).unwrap_err().to_string();
            let named = expected.split('|').any(|word| error.contains(word));
            assert!(named, "{yaml}: {error}");
        }
        assert!(Metadata::of_image(&SmallFiles::new()).is_err());
    }

    #[test]
    fn aliases_that_grow_are_refused() {
        let mut yaml =
            "architecture: x\ncreation_date: 1\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for n in 1..9 {
            let many = vec![format!("*a{}", n - 1); 10].join(",");
            yaml.push_str(&format!("a{n}: &a{n} [{many}]\n"));
        }
        let files = files(&[("metadata.yaml", &yaml)]);
        assert!(matches!(
            Metadata::of_image(&files),
            Err(ImageError::Malformed { .. })
        ));
    }

    proptest! {
        #[test]
        fn reading_never_panics(yaml in "(architecture: x86_64\n)?(creation_date: -?[0-9]{1,20}\n)?.{0,200}") {
            let _ = Metadata::of_image(&files(&[("metadata.yaml", &yaml)]));
        }

        #[test]
        fn what_is_spoilt_never_panics(at in 0..YAML.len(), byte in any::<u8>()) {
            let mut bytes = YAML.as_bytes().to_vec();
            bytes[at] = byte;
            let files = SmallFiles::from([("metadata.yaml".to_owned(), bytes)]);
            let _ = Metadata::of_image(&files);
        }
    }
}
