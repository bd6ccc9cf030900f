//! The main job by a client that is not ours, generated from our proto files.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};
use longshore_tests::{pods::Bench, skip};

const TEST: &str = "foreign::python_generated_from_our_files_does_the_job";

fn sources() -> Option<PathBuf> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()?
        .join("proto");
    proto
        .join("cri/runtime/v1/runtime.proto")
        .exists()
        .then_some(proto)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_generated_from_our_files_does_the_job() -> Result<()> {
    let Some(python) = env::var_os("LONGSHORE_PYTHON") else {
        skip(
            TEST,
            "no LONGSHORE_PYTHON with grpcio-tools (cargo verify makes one where it can)",
        );
        return Ok(());
    };
    let Some(proto) = sources() else {
        skip(TEST, "the proto files are not here");
        return Ok(());
    };
    let bench = Bench::start().await?;
    let modules = bench.node.dir().join("modules");
    fs::create_dir(&modules)?;
    let mut files = vec![PathBuf::from("cri/runtime/v1/runtime.proto")];
    for entry in fs::read_dir(proto.join("longshore/v1"))? {
        files.push(entry?.path().strip_prefix(&proto)?.to_owned());
    }
    let generated = Command::new(&python)
        .args(["-m", "grpc_tools.protoc", "-I."])
        .arg(format!("--python_out={}", modules.display()))
        .arg(format!("--grpc_python_out={}", modules.display()))
        .args(files)
        .current_dir(&proto)
        .output()?;
    ensure!(
        generated.status.success(),
        "{}",
        String::from_utf8_lossy(&generated.stderr)
    );
    let script = bench.node.dir().join("foreign.py");
    fs::write(&script, include_str!("foreign.py"))?;
    let logs = bench.node.log_dir().join("foreign");
    let mut client = Command::new(python);
    client
        .arg(&script)
        .arg(bench.node.socket())
        .arg(&bench.toolbox)
        .arg(&logs)
        .env("PYTHONPATH", &modules)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let output = tokio::task::spawn_blocking(move || client.output()).await??;
    ensure!(
        output.status.success() && output.stdout == b"done\n",
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    bench.finish().await
}
