//! Compiles the `.proto` files without protoc and keeps their descriptors for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

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
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (name, files) in [("cri", CRI), ("longshore", LONGSHORE)] {
        let descriptors = protox::compile(files, ["."])?;
        let mut bare = descriptors.clone();
        for file in &mut bare.file {
            // Reflection sends these on request; nobody there reads comments.
            file.source_code_info = None;
        }
        fs::write(
            out.join(format!("{name}.descriptors")),
            bare.encode_to_vec(),
        )?;
        tonic_prost_build::configure()
            // Output of processes and logs is passed on without a copy.
            .bytes(".longshore.v1")
            // Secrets: `secret.rs` prints them without their content.
            .skip_debug([
                ".runtime.v1.AuthConfig",
                ".longshore.v1.RegistryAuth",
                ".longshore.v1.BasicAuth",
            ])
            .compile_fds(descriptors)?;
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cri");
    println!("cargo::rerun-if-changed=longshore");
    Ok(())
}
