//! Compiles the `.proto` files without protoc and keeps their descriptors for reflection.

use std::{env, error::Error, fs, path::PathBuf};

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

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (name, files) in [("cri", CRI), ("longshore", LONGSHORE)] {
        let mut compiler = protox::Compiler::new(["."])?;
        compiler.include_imports(true).open_files(files)?;
        // Reflection sends these: without comments, and encoded by the compiler, since a prost type
        // would drop the options that it does not know.
        compiler.include_source_info(false);
        let reflected = compiler.encode_file_descriptor_set();
        fs::write(out.join(format!("{name}.descriptors")), reflected)?;
        compiler.include_source_info(true);
        let descriptors = compiler.file_descriptor_set();
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
