//! Every name in our protocols has a comment, and longshore.v1 keeps the rules of `buf lint` and of
//! its own; so a machine without `buf` notices too.

use std::collections::{BTreeMap, BTreeSet};

use prost_reflect::prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

const CRI: &[&str] = &["cri/runtime/v1/runtime.proto"];
const LONGSHORE: &[&str] = &[
    "longshore/v1/error.proto",
    "longshore/v1/event.proto",
    "longshore/v1/face.proto",
    "longshore/v1/image.proto",
    "longshore/v1/lifecycle.proto",
    "longshore/v1/network.proto",
    "longshore/v1/node.proto",
    "longshore/v1/operation.proto",
    "longshore/v1/system.proto",
];

/// Files of one API, with comments.
fn compile(files: &[&str]) -> Vec<FileDescriptorProto> {
    let set: FileDescriptorSet =
        protox::compile(files, [env!("CARGO_MANIFEST_DIR")]).expect("the build compiled it too");
    let ours = |file: &FileDescriptorProto| files.contains(&file.name());
    set.file.into_iter().filter(ours).collect()
}

/// Everything in a file that can have a comment: path as in `SourceCodeInfo`, and name.
fn names(file: &FileDescriptorProto) -> Vec<(Vec<i32>, String)> {
    let mut out = Vec::new();
    for (at, service) in (0..).zip(&file.service) {
        out.push((vec![6, at], service.name().to_owned()));
        for (rpc, method) in (0..).zip(&service.method) {
            out.push((
                vec![6, at, 2, rpc],
                format!("{}.{}", service.name(), method.name()),
            ));
        }
    }
    for (at, message) in (0..).zip(&file.message_type) {
        of_message(vec![4, at], "", message, &mut out);
    }
    for (at, enumeration) in (0..).zip(&file.enum_type) {
        of_enum(vec![5, at], "", enumeration, &mut out);
    }
    out
}

fn of_message(
    path: Vec<i32>,
    outer: &str,
    message: &DescriptorProto,
    out: &mut Vec<(Vec<i32>, String)>,
) {
    if message
        .options
        .as_ref()
        .is_some_and(|options| options.map_entry())
    {
        return;
    }
    let name = format!("{outer}{}", message.name());
    let inner = format!("{name}.");
    let below = |number, at| [path.as_slice(), &[number, at]].concat();
    for (at, field) in (0..).zip(&message.field) {
        out.push((below(2, at), format!("{inner}{}", field.name())));
    }
    for (at, oneof) in (0..).zip(&message.oneof_decl) {
        // `optional` makes a oneof of its own, which nobody wrote.
        let written = message
            .field
            .iter()
            .any(|field| field.oneof_index == Some(at) && !field.proto3_optional());
        if written {
            out.push((below(8, at), format!("{inner}{}", oneof.name())));
        }
    }
    for (at, nested) in (0..).zip(&message.nested_type) {
        of_message(below(3, at), &inner, nested, out);
    }
    for (at, enumeration) in (0..).zip(&message.enum_type) {
        of_enum(below(4, at), &inner, enumeration, out);
    }
    out.push((path, name));
}

fn of_enum(
    path: Vec<i32>,
    outer: &str,
    enumeration: &EnumDescriptorProto,
    out: &mut Vec<(Vec<i32>, String)>,
) {
    let name = format!("{outer}{}", enumeration.name());
    for (at, value) in (0..).zip(&enumeration.value) {
        out.push((
            [path.as_slice(), &[2, at]].concat(),
            format!("{name}.{}", value.name()),
        ));
    }
    out.push((path, name));
}

/// Names without a comment, and comments that would not come out as one in documentation.
fn undocumented(file: &FileDescriptorProto) -> Vec<String> {
    let info = file.source_code_info.as_ref().expect("compiled with it");
    let comments: BTreeMap<&[i32], &str> = info
        .location
        .iter()
        .map(|location| (location.path.as_slice(), location.leading_comments()))
        .collect();
    let ends = |text: &str| text.trim_end().ends_with(['.', ':']);
    names(file)
        .into_iter()
        .filter(|(path, _)| {
            let text = comments.get(path.as_slice()).copied().unwrap_or_default();
            let indented = text.lines().any(|line| line.starts_with("    "));
            text.trim().is_empty() || !ends(text) || indented
        })
        .map(|(_, name)| name)
        .collect()
}

#[test]
fn everything_in_longshore_has_a_comment() {
    for file in compile(LONGSHORE) {
        let found = undocumented(&file);
        assert!(found.is_empty(), "{}: {found:#?}", file.name());
    }
}

#[test]
fn everything_in_cri_has_a_comment() {
    for file in compile(CRI) {
        let mut found = undocumented(&file);
        // The signals say what they are by their names.
        found.retain(|name| !name.starts_with("Signal.SIGNAL_SIG"));
        assert!(found.is_empty(), "{}: {found:#?}", file.name());
    }
}

#[test]
fn every_file_of_longshore_is_looked_at() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/longshore/v1");
    let found: BTreeSet<String> = std::fs::read_dir(directory)
        .expect("it is there")
        .map(|entry| {
            entry
                .expect("readable")
                .file_name()
                .into_string()
                .expect("our names are UTF-8")
        })
        .map(|name| format!("longshore/v1/{name}"))
        .collect();
    assert_eq!(
        found,
        LONGSHORE.iter().map(|&file| file.to_owned()).collect()
    );
}

/// `HostPort` from `host_port`, `HOST_PORT` from `HostPort`, and the like.
fn snake(camel: &str) -> String {
    let mut out = String::new();
    for letter in camel.chars() {
        if letter.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(letter.to_ascii_lowercase());
    }
    out
}

fn is_snake(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part
                .chars()
                .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit())
    };
    name.split('_').all(part)
}

fn is_pascal(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_uppercase())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric())
}

#[test]
fn messages_and_enums_of_longshore_are_named_by_the_rules() {
    for file in compile(LONGSHORE) {
        assert_eq!(file.package(), "longshore.v1", "{}", file.name());
        for message in &file.message_type {
            assert!(is_pascal(message.name()), "{}", message.name());
            for field in &message.field {
                assert!(
                    is_snake(field.name()),
                    "{}.{}",
                    message.name(),
                    field.name()
                );
            }
        }
        for enumeration in &file.enum_type {
            let name = enumeration.name();
            assert!(is_pascal(name), "{name}");
            let prefix = format!("{}_", snake(name).to_uppercase());
            let first = enumeration.value.first().expect("an enum has values");
            assert_eq!(
                (first.name(), first.number()),
                (format!("{prefix}UNSPECIFIED").as_str(), 0)
            );
            for value in &enumeration.value {
                assert!(value.name().starts_with(&prefix), "{name}.{}", value.name());
            }
        }
    }
}

fn services() -> Vec<(ServiceDescriptorProto, BTreeMap<String, DescriptorProto>)> {
    let files = compile(LONGSHORE);
    let messages: BTreeMap<_, _> = files
        .iter()
        .flat_map(|file| &file.message_type)
        .map(|message| (format!(".longshore.v1.{}", message.name()), message.clone()))
        .collect();
    files
        .into_iter()
        .flat_map(|file| file.service)
        .map(|service| (service, messages.clone()))
        .collect()
}

#[test]
fn rpcs_of_longshore_have_requests_and_responses_of_their_own() {
    let mut seen = BTreeSet::new();
    for (service, _) in services() {
        assert!(service.name().ends_with("Service"), "{}", service.name());
        for method in &service.method {
            let name = method.name();
            assert!(is_pascal(name), "{name}");
            assert_eq!(method.input_type(), format!(".longshore.v1.{name}Request"));
            assert_eq!(
                method.output_type(),
                format!(".longshore.v1.{name}Response")
            );
            assert!(seen.insert(name.to_owned()), "{name} is in two services");
        }
    }
}

#[test]
fn lists_of_longshore_have_pages_and_changes_have_idempotency_keys() {
    // Calls that change something; the streams Exec and Attach cannot be repeated.
    let changes = [
        "Run", "Stop", "Remove", "Create", "Start", "Signal", "Pull", "Tag", "Prune", "Cancel",
        "Fsck", "Restart", "Freeze", "Unfreeze",
    ];
    for (service, messages) in services() {
        for method in &service.method {
            let name = method.name();
            let fields = |message: &str| -> BTreeSet<String> {
                messages[message]
                    .field
                    .iter()
                    .map(|field| field.name().to_owned())
                    .collect()
            };
            let (request, response) = (fields(method.input_type()), fields(method.output_type()));
            let list = name.starts_with("List");
            assert_eq!(
                list,
                request.contains("page_size") && request.contains("page_token"),
                "{name}"
            );
            assert_eq!(list, response.contains("next_page_token"), "{name}");
            let change = changes.iter().any(|verb| name.starts_with(verb));
            assert_eq!(change, request.contains("idempotency_key"), "{name}");
        }
    }
}

#[test]
fn every_import_of_longshore_is_used() {
    for file in compile(LONGSHORE) {
        assert!(
            file.public_dependency.is_empty() && file.weak_dependency.is_empty(),
            "{}",
            file.name()
        );
        let types: BTreeSet<&str> = file
            .message_type
            .iter()
            .flat_map(|message| {
                message
                    .field
                    .iter()
                    .chain(message.nested_type.iter().flat_map(|entry| &entry.field))
            })
            .map(|field| field.type_name())
            .collect();
        let declares = |path: &str| -> BTreeSet<String> {
            let set =
                protox::compile([path], [env!("CARGO_MANIFEST_DIR")]).expect("an import compiles");
            let file = set
                .file
                .into_iter()
                .find(|file| file.name() == path)
                .expect("it was asked for");
            let messages = file
                .message_type
                .iter()
                .map(|message| message.name().to_owned());
            let enums = file
                .enum_type
                .iter()
                .map(|enumeration| enumeration.name().to_owned());
            messages
                .chain(enums)
                .map(|name| format!(".{}.{name}", file.package()))
                .collect()
        };
        for import in &file.dependency {
            let used = declares(import)
                .iter()
                .any(|name| types.contains(name.as_str()));
            assert!(used, "{} imports {import}", file.name());
        }
    }
}
