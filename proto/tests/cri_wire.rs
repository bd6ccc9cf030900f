//! CRI on the wire: what `runtime.proto` compiles to, against the table of facts `runtime.v1.tsv`.
//!
//! Both are turned into one line for each fact, so a difference either way is shown as such, and
//! anything that the table has no word for (a oneof, a reserved range, an import) is an extra line.

use std::collections::BTreeSet;

use longshore_proto::cri::v1::FILE_DESCRIPTOR_SET;
use prost_reflect::{
    Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, FileDescriptor, Kind,
    MessageDescriptor, MethodDescriptor, Syntax,
};

const TABLE: &str = include_str!("runtime.v1.tsv");
const COLUMNS: usize = 7;

type Facts = BTreeSet<String>;

/// One line: kind, owner, name, number, type, modifier, JSON name.
fn fact(cells: [&str; COLUMNS]) -> String {
    cells.join("\t")
}

/// Facts of the table; the column `since` is history and not compared.
fn of_table(table: &str) -> Facts {
    let rows = table
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty());
    rows.skip(1)
        .map(|row| {
            let mut cells = row.split('\t').chain(std::iter::repeat(""));
            fact(std::array::from_fn(|_| {
                cells.next().expect("the tail never ends")
            }))
        })
        .collect()
}

fn of_descriptors(pool: &DescriptorPool) -> Facts {
    let mut facts = Facts::new();
    pool.files().for_each(|file| of_file(&file, &mut facts));
    for service in pool.services() {
        facts.extend(service.methods().map(|method| of_method(&method)));
    }
    pool.all_messages()
        .filter(|message| !message.is_map_entry())
        .for_each(|message| of_message(&message, &mut facts));
    pool.all_enums()
        .for_each(|enumeration| of_enum(&enumeration, &mut facts));
    facts.extend(
        pool.all_extensions()
            .map(|extension| extra("extension", extension.full_name())),
    );
    facts
}

/// A fact that the table never has.
fn extra(kind: &str, what: &str) -> String {
    fact([kind, what, "", "", "", "", ""])
}

fn of_file(file: &FileDescriptor, facts: &mut Facts) {
    let syntax = match file.syntax() {
        Syntax::Proto3 => "proto3",
        Syntax::Proto2 => "proto2",
    };
    facts.insert(fact([
        "file",
        file.package_name(),
        "syntax",
        "",
        syntax,
        "",
        "",
    ]));
    facts.extend(
        file.dependencies()
            .map(|import| extra("import", import.name())),
    );
}

fn of_method(method: &MethodDescriptor) -> String {
    let streamed = |message: MessageDescriptor, streams| {
        format!(
            "{}{}",
            if streams { "stream " } else { "" },
            message.full_name()
        )
    };
    fact([
        "rpc",
        method.parent_service().full_name(),
        method.name(),
        "",
        &streamed(method.input(), method.is_client_streaming()),
        &streamed(method.output(), method.is_server_streaming()),
        "",
    ])
}

fn of_message(message: &MessageDescriptor, facts: &mut Facts) {
    let name = message.full_name();
    facts.insert(fact(["message", name, "", "", "", "", ""]));
    facts.extend(
        message
            .oneofs()
            .map(|oneof| extra("oneof", oneof.full_name())),
    );
    facts.extend(
        message
            .reserved_ranges()
            .map(|range| extra("reserved", &format!("{name} {range:?}"))),
    );
    facts.extend(
        message
            .reserved_names()
            .map(|word| extra("reserved", &format!("{name} {word}"))),
    );
    facts.extend(
        message
            .extension_ranges()
            .map(|range| extra("extensions", &format!("{name} {range:?}"))),
    );
    facts.extend(message.fields().map(|field| of_field(name, &field)));
}

fn of_field(owner: &str, field: &FieldDescriptor) -> String {
    let options = field.options();
    let flags = ["deprecated", "debug_redact"].into_iter().filter(|flag| {
        options
            .get_field_by_name(flag)
            .and_then(|value| value.as_bool())
            .unwrap_or_default()
    });
    let presence = matches!(field.kind(), Kind::Message(_)) || !field.supports_presence();
    let modifiers: Vec<_> = flags.chain((!presence).then_some("optional")).collect();
    fact([
        "field",
        owner,
        field.name(),
        &field.number().to_string(),
        &type_of(field),
        &modifiers.join(","),
        field.json_name(),
    ])
}

/// A type as the table writes it: `map<K,V>`, `repeated T`, `required T` or `T`.
fn type_of(field: &FieldDescriptor) -> String {
    let kind = field.kind();
    if field.is_map() {
        let entry = kind.as_message().expect("a map is a list of entries");
        return format!(
            "map<{},{}>",
            name_of(&entry.map_entry_key_field().kind()),
            name_of(&entry.map_entry_value_field().kind())
        );
    }
    let label = match field.cardinality() {
        Cardinality::Optional => "",
        Cardinality::Required => "required ",
        Cardinality::Repeated => "repeated ",
    };
    format!("{label}{}", name_of(&kind))
}

fn name_of(kind: &Kind) -> String {
    match kind {
        Kind::Double => "double",
        Kind::Float => "float",
        Kind::Int32 => "int32",
        Kind::Int64 => "int64",
        Kind::Uint32 => "uint32",
        Kind::Uint64 => "uint64",
        Kind::Sint32 => "sint32",
        Kind::Sint64 => "sint64",
        Kind::Fixed32 => "fixed32",
        Kind::Fixed64 => "fixed64",
        Kind::Sfixed32 => "sfixed32",
        Kind::Sfixed64 => "sfixed64",
        Kind::Bool => "bool",
        Kind::String => "string",
        Kind::Bytes => "bytes",
        Kind::Message(message) => message.full_name(),
        Kind::Enum(enumeration) => enumeration.full_name(),
    }
    .to_owned()
}

fn of_enum(enumeration: &EnumDescriptor, facts: &mut Facts) {
    let name = enumeration.full_name();
    facts.extend(
        enumeration
            .reserved_ranges()
            .map(|range| extra("reserved", &format!("{name} {range:?}"))),
    );
    facts.extend(
        enumeration
            .reserved_names()
            .map(|word| extra("reserved", &format!("{name} {word}"))),
    );
    facts.extend(enumeration.values().map(|value| {
        fact([
            "enum",
            name,
            value.name(),
            &value.number().to_string(),
            "",
            "",
            "",
        ])
    }));
}

/// What one side has and the other has not: `-` only in the table, `+` only in the descriptors.
fn differences(table: &Facts, descriptors: &Facts) -> Vec<String> {
    let missing = table
        .difference(descriptors)
        .map(|fact| format!("- {fact}"));
    let surplus = descriptors
        .difference(table)
        .map(|fact| format!("+ {fact}"));
    missing.chain(surplus).collect()
}

fn compiled() -> Facts {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the build made it");
    of_descriptors(&pool)
}

#[test]
fn cri_is_what_the_table_says_and_nothing_more() {
    let found = differences(&of_table(TABLE), &compiled());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_table_is_whole() {
    let table = of_table(TABLE);
    let count = |kind: &str| table.iter().filter(|fact| fact.starts_with(kind)).count();
    assert_eq!(
        [
            count("rpc\t"),
            count("message\t"),
            count("field\t"),
            count("enum\t")
        ],
        [43, 175, 478, 95]
    );
}

/// Each of these changes to the table must show up as one fact gone and one too many, or as one of
/// the two.
#[test]
fn a_changed_fact_is_noticed() {
    let compiled = compiled();
    let swaps = [
        (
            "file\truntime.v1\tsyntax\t\tproto3",
            "file\truntime.v1\tsyntax\t\tproto2",
            2,
        ),
        (
            "VersionResponse\truntime_version\t3\tstring",
            "VersionResponse\truntime_version\t4\tstring",
            2,
        ),
        (
            "ExecSyncRequest\ttimeout\t3\tint64",
            "ExecSyncRequest\ttimeout\t3\tint32",
            2,
        ),
        (
            "DNSConfig\tservers\t1\trepeated string",
            "DNSConfig\tservers\t1\tstring",
            2,
        ),
        (
            "\tsysctls\t3\tmap<string,string>",
            "\tsysctls\t3\tmap<string,bytes>",
            2,
        ),
        ("\tCDIDevices\t", "\tcdiDevices\t", 2),
        (
            "AuthConfig\tpassword\t2\tstring\tdebug_redact",
            "AuthConfig\tpassword\t2\tstring\t",
            2,
        ),
        (
            "\tstring\tdeprecated\tapparmorProfile",
            "\tstring\t\tapparmorProfile",
            2,
        ),
        (
            "stream runtime.v1.ContainerEventResponse",
            "runtime.v1.ContainerEventResponse",
            2,
        ),
        (
            "runtime.v1.ImageService\tPullImage\t",
            "runtime.v1.RuntimeService\tPullImage\t",
            2,
        ),
        ("\tTARGET\t3", "\tTARGET\t4", 2),
        (
            "runtime.v1.SecurityProfile.ProfileType\tLocalhost",
            "runtime.v1.ProfileType\tLocalhost",
            2,
        ),
        (
            "message\truntime.v1.GetEventsRequest\t\t\t\t\t\t1.25\n",
            "",
            1,
        ),
        (
            "message\truntime.v1.GetEventsRequest",
            "field\truntime.v1.Image\tvolume\t9\tbool\t\tvolume\t1.38\nmessage\truntime.v1.GetEventsRequest",
            1,
        ),
    ];
    for (old, new, expected) in swaps {
        assert!(TABLE.contains(old), "the table has no {old:?}");
        let changed = TABLE.replacen(old, new, 1);
        let found = differences(&of_table(&changed), &compiled);
        assert_eq!(found.len(), expected, "{old:?}: {found:#?}");
    }
}

/// What the table has no word for is noticed too.
#[test]
fn surplus_in_the_descriptors_is_noticed() {
    let directory = std::env::temp_dir().join(format!("longshore-proto-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory for the test");
    let source = "syntax = \"proto3\"; package runtime.v1;
        import \"google/protobuf/empty.proto\";
        message M { oneof o { string a = 1; } optional bool b = 2; reserved 3; reserved \"c\"; google.protobuf.Empty e = 4; }
        enum E { Z = 0; reserved 1; }";
    std::fs::write(directory.join("m.proto"), source).expect("written");
    let set = protox::compile(["m.proto"], [&directory]).expect("it compiles");
    std::fs::remove_dir_all(&directory).expect("removed");
    let facts = of_descriptors(&DescriptorPool::from_file_descriptor_set(set).expect("valid"));
    for expected in [
        "import\tgoogle/protobuf/empty.proto\t\t\t\t\t",
        "oneof\truntime.v1.M.o\t\t\t\t\t",
        "reserved\truntime.v1.M 3..4\t\t\t\t\t",
        "reserved\truntime.v1.M c\t\t\t\t\t",
        "reserved\truntime.v1.E 1..=1\t\t\t\t\t",
        "field\truntime.v1.M\tb\t2\tbool\toptional\tb",
        "message\tgoogle.protobuf.Empty\t\t\t\t\t",
    ] {
        assert!(facts.contains(expected), "no {expected:?} in {facts:#?}");
    }
}
