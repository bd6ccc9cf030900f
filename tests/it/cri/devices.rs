//! Devices of the host and of the Container Device Interface.

use std::{collections::HashMap, fs};

use anyhow::Result;
use longshore_proto::cri::v1 as cri;
use longshore_tests::pods::{Bench, pod, script};
use serde_json::json;
use tonic::Code;

fn cdi(name: &str) -> Vec<cri::CdiDevice> {
    vec![cri::CdiDevice {
        name: name.to_owned(),
    }]
}

/// CRI contract 5.6: what a device's file asks for is in the container, from the very next one on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_vendors_are_what_their_files_say() -> Result<()> {
    let files = tempfile::tempdir()?;
    let dir = files.path().to_string_lossy().into_owned();
    let mut bench =
        Bench::start_configured(&format!("[lifecycle]\ncdi_spec_dirs = [{dir:?}]\n")).await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("cdi")).await?;
    let library = files.path().join("lib.so");
    fs::write(&library, "a library\n")?;
    let text = "echo x >/dev/gpu0 && echo usable; stat -c %t:%T:%a /dev/gpu0; cat /usr/lib/gpu.so; \
        echo y 2>/dev/null >/usr/lib/gpu.so || echo read-only; echo $GPU $ALL; id -G";
    let mut config = script("main", &toolbox, text);
    config.cdi_devices = cdi("vendor.test/gpu=zero");
    let error = bench
        .create(&pod, config.clone())
        .await
        .expect_err("no file yet");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    for part in ["vendor.test/gpu=zero", &dir] {
        assert!(error.message().contains(part), "{error:?}");
    }

    fs::write(files.path().join("broken.json"), "{")?;
    let file = json!({
        "cdiVersion": "0.7.0",
        "kind": "vendor.test/gpu",
        "containerEdits": {"env": ["ALL=all"]},
        "devices": [
            {"name": "zero", "containerEdits": {
                "env": ["GPU=zero"],
                "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/null", "fileMode": 0o620, "permissions": "rw"}],
                "mounts": [{"hostPath": library, "containerPath": "/usr/lib/gpu.so", "options": ["ro", "bind"]}],
                "additionalGids": [4711],
            }},
            {"name": "hooked", "containerEdits": {
                "hooks": [{"hookName": "createContainer", "path": "/bin/true"}],
            }},
            {"name": "rdt", "containerEdits": {"intelRdt": {"closID": "x"}}},
        ],
    });
    fs::write(files.path().join("gpu.json"), file.to_string())?;
    let expected = "usable\n1:3:620\na library\nread-only\nzero all\n0 4711\n";
    let (_, output) = bench.run_to_end(&pod, config.clone()).await?;
    assert_eq!(output, expected);
    // As device plugins name them that do not know the field; twice is fine.
    config.annotations = HashMap::from([(
        "cdi.k8s.io/plugin_gpu".to_owned(),
        "vendor.test/gpu=zero,vendor.test/gpu=zero".to_owned(),
    )]);
    let (_, output) = bench.run_to_end(&pod, config.clone()).await?;
    assert_eq!(output, expected);
    config.cdi_devices.clear();
    let (status, output) = bench.run_to_end(&pod, config.clone()).await?;
    assert_eq!(output, expected);
    assert!(status.mounts.is_empty(), "only what was asked for is told");

    config.annotations.clear();
    for (name, code, part) in [
        ("vendor.test/gpu=hooked", Code::Unimplemented, "hooks"),
        ("vendor.test/gpu=rdt", Code::Unimplemented, "intelRdt"),
        (
            "vendor.test/gpu=gone",
            Code::FailedPrecondition,
            "broken.json",
        ),
        ("gpu", Code::InvalidArgument, "config.CDI_devices"),
    ] {
        config.cdi_devices = cdi(name);
        let error = bench.create(&pod, config.clone()).await.expect_err(name);
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message().contains(part), "{error:?}");
    }
    bench.finish().await
}
