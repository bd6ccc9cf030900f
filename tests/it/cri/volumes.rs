//! What of images is mounted beside a container's root.

use std::fs;

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    images::{ImageBuilder, LayerBuilder, toolbox_layer},
    pods::{Bench, pod, script, security},
};
use serde_json::json;
use tonic::Code;

const WORD: &str = "ImageVolumeMountFailed";

fn image_mount(container_path: &str, image: &str, sub_path: &str) -> cri::Mount {
    cri::Mount {
        container_path: container_path.to_owned(),
        readonly: true,
        image: Some(cri::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        image_sub_path: sub_path.to_owned(),
        ..Default::default()
    }
}

/// Pulls an image that is gone again at the end.
async fn borrow(
    bench: &mut Bench,
    name: &str,
    layers: Vec<LayerBuilder>,
) -> Result<(String, String)> {
    let layers = layers.into_iter().map(LayerBuilder::build).collect();
    bench
        .registry
        .push(name, &ImageBuilder::new(layers).build());
    let reference = bench.registry.reference(name);
    let id = bench.pull(&reference).await?;
    Ok((reference, id))
}

async fn remove_image(bench: &mut Bench, image: &str) -> Result<()> {
    let image = cri::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    };
    let request = cri::RemoveImageRequest { image: Some(image) };
    bench.images.remove_image(request).await?;
    Ok(())
}

/// CRI contract 5.2 and 5.3: an image mounted as a volume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_a_read_only_volume() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let base = LayerBuilder::new()
        .dir("assets")
        .dir("assets/deep")
        .file("assets/deep/old", 0o644, "old\n")
        .file("assets/gone", 0o644, "gone\n")
        .file("assets/run", 0o755, "#!/bin/sh\necho it runs\n")
        .symlink("link", "/assets/deep")
        .symlink("out", "../../../../../etc");
    let top = LayerBuilder::new()
        .dir("assets")
        .whiteout("assets/gone")
        .dir("assets/deep")
        .file("assets/deep/new", 0o640, "new\n");
    let (many, many_id) = borrow(&mut bench, "many:1", vec![base, top]).await?;
    let single = vec![LayerBuilder::new().file("one", 0o644, "one\n")];
    let (single, single_id) = borrow(&mut bench, "single:1", single).await?;
    let pod = bench.run(pod("image-volumes")).await?;
    let mounts_of_host = bench.machine().mountinfo();

    let text = "cd /many/assets; ls; cat deep/old deep/new; ./run; touch x 2>/dev/null || echo read-only; \
        ls /sub /linked; cat /one/one; ls -A /out; stat -c %a:%u /sub/new; echo end; exec sleep 10000";
    let mut config = script("main", &toolbox, text);
    config.mounts = vec![
        image_mount("/many", &many, ""),
        image_mount("/sub", &many, "assets/deep"),
        image_mount("/linked", &many_id, "link/"),
        image_mount("/one", &single, ""),
        cri::Mount {
            recursive_read_only: true,
            mount_options: vec!["noexec".to_owned()],
            ..image_mount("/noexec", &many, "assets")
        },
    ];
    // The link stays inside the image, where there is no etc.
    config.mounts.push(image_mount("/out", &many, "out"));
    let error = bench
        .create(&pod, config.clone())
        .await
        .expect_err("no etc in the image");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(
        error.message().starts_with(WORD) && error.message().contains("\"out\""),
        "{error:?}"
    );
    config.mounts.pop();
    config.command[2] = config.command[2].replace("ls -A /out; ", "");
    let id = bench.launch(&pod, config.clone()).await?;
    let log = bench.status(&id).await?.log_path;
    longshore_tests::pods::wait_for("the last line", async || {
        Ok(fs::read_to_string(&log).is_ok_and(|text| text.contains(" end\n")))
    })
    .await?;
    let output = longshore_tests::pods::read_log(log.as_ref())?.stdout();
    assert_eq!(
        output,
        "deep\nrun\nold\nnew\nit runs\nread-only\n/linked:\nnew\nold\n\n/sub:\nnew\nold\none\n640:0\nend\n"
    );
    let refused = bench.exec(&id, &["/noexec/run"], 0).await;
    assert!(refused.is_err(), "noexec is added: {refused:?}");
    assert_eq!(
        bench.machine().mountinfo(),
        mounts_of_host,
        "the host sees none of it"
    );

    let status = bench.status(&id).await?;
    assert_eq!(status.mounts.len(), config.mounts.len());
    for (mount, wished) in status.mounts.iter().zip(&config.mounts) {
        let image = mount.image.clone().context("its image")?;
        let expected = if wished.container_path == "/one" {
            &single_id
        } else {
            &many_id
        };
        assert_eq!((&image.image, &image.image_ref), (expected, expected));
        assert_eq!(mount.image_sub_path, wished.image_sub_path);
    }

    // Both images go while they are mounted: their layers stay until the container has gone.
    remove_image(&mut bench, &many).await?;
    remove_image(&mut bench, &single_id).await?;
    let again = bench
        .exec_ok(&id, "cat /many/assets/deep/old /one/one")
        .await?;
    assert_eq!(again, "old\none\n");
    let error = bench
        .create(&pod, config)
        .await
        .expect_err("the images are gone");
    assert_eq!(error.code(), Code::NotFound, "{error:?}");
    assert!(
        error.message().starts_with(WORD) && error.message().contains(&many),
        "{error:?}"
    );
    bench.crash().await?;
    let again = bench.exec_ok(&id, "cat /sub/old /one/one").await?;
    assert_eq!(again, "old\none\n");
    bench.remove_container(&id).await?;
    bench.finish().await
}

/// CRI contract 5.2: what cannot be mounted of an image is refused before anything is made, with the
/// word that clients look for (1.5).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_image_volumes_are_refused_by_name() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("image-volumes")).await?;
    let good = image_mount("/volume", &toolbox, "etc");
    let host = bench.node.dir().join("never-made");
    for (mount, code, part) in [
        (
            cri::Mount {
                readonly: false,
                ..good.clone()
            },
            Code::InvalidArgument,
            "config.mounts[0].readonly",
        ),
        (
            cri::Mount {
                host_path: host.to_string_lossy().into_owned(),
                ..good.clone()
            },
            Code::InvalidArgument,
            "config.mounts[0].host_path",
        ),
        (
            cri::Mount {
                propagation: 2,
                ..good.clone()
            },
            Code::InvalidArgument,
            "config.mounts[0].propagation",
        ),
        (
            image_mount("/v", &toolbox, "/etc"),
            Code::InvalidArgument,
            "image_sub_path",
        ),
        (
            image_mount("/v", &toolbox, "a/../../etc"),
            Code::InvalidArgument,
            "image_sub_path",
        ),
        (
            image_mount("/v", &toolbox, "no/such"),
            Code::FailedPrecondition,
            "\"no/such\"",
        ),
        (
            image_mount("/v", &toolbox, "etc/passwd"),
            Code::FailedPrecondition,
            "not a directory",
        ),
        (
            image_mount("/v", "not/pulled:1", ""),
            Code::NotFound,
            "not/pulled:1",
        ),
        (
            image_mount("/v", "Not A Reference", ""),
            Code::InvalidArgument,
            "Not A Reference",
        ),
    ] {
        let mut config = script("main", &toolbox, "true");
        config.mounts = vec![mount];
        let error = bench.create(&pod, config).await.expect_err(part);
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message().starts_with(WORD), "{error:?}");
        assert!(error.message().contains(part), "{error:?}");
    }
    assert!(!host.exists());
    // A sub path of nothing is told by its field.
    let mut config = script("main", &toolbox, "true");
    config.mounts = vec![cri::Mount {
        image: None,
        ..good.clone()
    }];
    let error = bench.create(&pod, config).await.expect_err("no source");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    assert!(
        error.message().contains("config.mounts[0].image is"),
        "{error:?}"
    );
    // The name is free; beside an image kubelet gives paths of the host a sub path too, and means none.
    let beside = bench.node.dir().join("beside");
    fs::create_dir_all(&beside)?;
    fs::write(beside.join("seen"), "")?;
    let mut config = script("main", &toolbox, "ls /volume /beside");
    let of_host = cri::Mount {
        container_path: "/beside".to_owned(),
        host_path: beside.to_string_lossy().into_owned(),
        image: None,
        ..good.clone()
    };
    config.mounts = vec![good, of_host];
    let (_, output) = bench.run_to_end(&pod, config).await?;
    assert!(output.contains("passwd\n"), "{output}");
    assert!(output.contains("seen\n"), "{output}");
    bench.finish().await
}

/// CRI contract 5.4: a volume of the image's configuration is a directory of the container's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_of_the_image_begin_with_its_content() -> Result<()> {
    let mut bench = Bench::start().await?;
    let layer = LayerBuilder::new()
        .dir_mode("data", 0o1770)
        .entry(
            tar::EntryType::Regular,
            "data/seed",
            None,
            0o600,
            (33, 33),
            b"seed\n",
        )
        .symlink("var/link", "/data");
    let image = ImageBuilder::new(vec![toolbox_layer()?, layer.build()])
        .set(
            "Volumes",
            json!({"/data": {}, "/new/": {}, "/var/link": {}, "/mine": {}, "/dev/shm": {}}),
        )
        .build();
    bench.offer("volumes:1", &image).await?;
    let reference = bench.registry.reference("volumes:1");
    let pod = bench.run(pod("volumes")).await?;
    let mine = bench.node.dir().join("mine");
    fs::create_dir_all(&mine)?;
    let text = "cat /data/seed; stat -c %u:%a /data/seed; stat -c %a /data /new; \
        touch /data/more /new/file && echo writable; ls /mine; ls /data; grep -c ' /dev/shm tmpfs' /proc/mounts";
    let mut config = script("main", &reference, text);
    security(&mut config).readonly_rootfs = true;
    config.mounts = vec![cri::Mount {
        container_path: "/mine".to_owned(),
        host_path: mine.to_string_lossy().into_owned(),
        ..Default::default()
    }];
    // Each container begins anew.
    for _ in 0..2 {
        let (status, output) = bench.run_to_end(&pod, config.clone()).await?;
        assert_eq!(output, "seed\n33:600\n1770\n755\nwritable\nmore\nseed\n1\n");
        assert_eq!(status.mounts.len(), 1, "only what was asked for is told");
    }
    // They count as what the container has written.
    let id = bench
        .launch(
            &pod,
            script(
                "writer",
                &reference,
                "head -c 3000000 /dev/zero >/new/big; exec sleep 10000",
            ),
        )
        .await?;
    longshore_tests::pods::wait_for("the volume in the statistics", async || {
        let request = cri::ContainerStatsRequest {
            container_id: id.clone(),
        };
        let stats = bench
            .runtime
            .clone()
            .container_stats(request)
            .await?
            .into_inner()
            .stats;
        let layer = stats.and_then(|stats| stats.writable_layer);
        Ok(layer
            .and_then(|layer| layer.used_bytes)
            .is_some_and(|used| used.value >= 3_000_000))
    })
    .await?;
    // None takes the place of what confines a container.
    let image = ImageBuilder::new(vec![toolbox_layer()?])
        .set("Volumes", json!({"/proc/sys": {}}))
        .build();
    bench.offer("volumes:2", &image).await?;
    let hostile = bench.registry.reference("volumes:2");
    let error = bench
        .create(&pod, script("main", &hostile, "true"))
        .await
        .expect_err("hides /proc");
    assert!(error.message().contains("/proc/sys"), "{error:?}");
    bench.finish().await
}
