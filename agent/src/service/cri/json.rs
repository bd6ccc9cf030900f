//! CRI messages as JSON with the names of their fields, as tools find them in verbose answers.

use std::sync::OnceLock;

use longshore_proto::cri::v1::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| {
        DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the build has made the descriptors")
    })
}

/// The message `name` of CRI as a JSON object; fields with their default value are left out.
pub(super) fn json(name: &str, message: &impl Message) -> serde_json::Value {
    let described = pool()
        .get_message_by_name(&format!("runtime.v1.{name}"))
        .expect("the message is CRI's");
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false);
    DynamicMessage::decode(described, message.encode_to_vec().as_slice())
        .ok()
        .and_then(|message| {
            message
                .serialize_with_options(serde_json::value::Serializer, &options)
                .ok()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use longshore_proto::cri::v1 as cri;
    use serde_json::json;

    #[test]
    fn names_and_numbers_are_those_of_the_protocol() {
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "main".to_owned(),
                attempt: 2,
            }),
            envs: vec![cri::KeyValue {
                key: "A".to_owned(),
                value: b"b".to_vec(),
            }],
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: 1 << 40,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            super::json("ContainerConfig", &config),
            json!({
                "metadata": {"name": "main", "attempt": 2},
                "envs": [{"key": "A", "value": "Yg=="}],
                "linux": {"resources": {"memory_limit_in_bytes": 1_i64 << 40}},
            })
        );
    }
}
