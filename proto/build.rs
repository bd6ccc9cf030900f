//! Compiles the `.proto` files without protoc and keeps their descriptors for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let cri = protox::compile(["cri/runtime/v1/runtime.proto"], ["."])?;
    fs::write(out.join("cri.descriptors"), cri.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(cri)?;
    println!("cargo::rerun-if-changed=cri");
    Ok(())
}
