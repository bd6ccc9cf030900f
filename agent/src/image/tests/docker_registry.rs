//! The same against Debian's docker-registry: a registry that is not ours.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use super::fake::TestImage;
use super::*;

const PROGRAM: &str = "docker-registry";

/// A running docker-registry; it ends with the value.
struct DockerRegistry {
    child: Child,
    port: u16,
    scheme: &'static str,
    ca: Option<PathBuf>,
    _dir: tempfile::TempDir,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl DockerRegistry {
    /// Starts one; `None`, with the reason printed, where it is not installed.
    async fn start(tls: bool) -> Option<DockerRegistry> {
        if Command::new(PROGRAM).arg("--version").output().is_err() {
            eprintln!("skipped: {PROGRAM} is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let storage = dir.path().join("data");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\nhttp:\n  addr: 127.0.0.1:{port}\n",
            storage.display()
        );
        let ca = tls.then(|| make_certificates(dir.path()));
        if tls {
            let place = dir.path().display();
            config += &format!(
                "  tls:\n    certificate: {place}/server.pem\n    key: {place}/server.key\n"
            );
        }
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let child = Command::new(PROGRAM)
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .env("OTEL_TRACES_EXPORTER", "none")
            .spawn()
            .unwrap();
        let scheme = if tls { "https" } else { "http" };
        let registry = DockerRegistry {
            child,
            port,
            scheme,
            ca,
            _dir: dir,
        };
        for _ in 0..600 {
            if tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
            {
                return Some(registry);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{PROGRAM} does not listen");
    }

    fn reference(&self, rest: &str) -> ImageRef {
        format!("127.0.0.1:{}/{rest}", self.port).parse().unwrap()
    }

    fn client(&self) -> reqwest::Client {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut builder = reqwest::Client::builder().no_proxy();
        if let Some(ca) = &self.ca {
            let pem = std::fs::read(ca).unwrap();
            builder = builder.tls_certs_merge([reqwest::Certificate::from_pem(&pem).unwrap()]);
        }
        builder.build().unwrap()
    }

    async fn push(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in image.layers.iter().chain([&image.config]) {
            self.push_blob(repository, blob).await;
        }
        self.push_manifest(repository, tag, fake::OCI_MANIFEST, &image.manifest)
            .await;
    }

    async fn push_blob(&self, repository: &str, blob: &[u8]) {
        let client = self.client();
        let begin = format!(
            "{}://127.0.0.1:{}/v2/{repository}/blobs/uploads/",
            self.scheme, self.port
        );
        let begun = client.post(begin).send().await.unwrap();
        let place = begun.headers()["location"].to_str().unwrap().to_owned();
        let place = format!("{place}&digest={}", Digest::of(blob));
        let put = client.put(place).body(blob.to_vec()).send().await.unwrap();
        assert_eq!(put.status(), 201);
    }

    async fn push_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) {
        let place = format!(
            "{}://127.0.0.1:{}/v2/{repository}/manifests/{tag}",
            self.scheme, self.port
        );
        let request = self
            .client()
            .put(place)
            .header("content-type", media_type)
            .body(bytes.to_vec());
        let put = request.send().await.unwrap();
        assert_eq!(put.status(), 201, "{}", put.text().await.unwrap());
    }
}

/// Makes an authority, and a certificate for 127.0.0.1 signed by it; returns the authority's file.
fn make_certificates(dir: &Path) -> PathBuf {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "authority of a test");
    let authority = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(params, key);
    let server_key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let server = params.signed_by(&server_key, &issuer).unwrap();
    std::fs::write(dir.join("server.pem"), server.pem()).unwrap();
    std::fs::write(dir.join("server.key"), server_key.serialize_pem()).unwrap();
    std::fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    dir.join("ca.pem")
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_serves_oci_and_docker_images() {
    let Some(registry) = DockerRegistry::start(false).await else {
        return;
    };
    let node = Node::new();
    let test = three_layers();
    registry.push("some/app", "1", &test).await;
    let reference = registry.reference("some/app:1");
    let pulled = node.pull(&reference).wait().await.unwrap();
    assert_eq!(pulled.manifest_digest, Digest::of(&test.manifest));
    assert_eq!(node.read(&reference.to_string(), "etc/b").unwrap(), b"two");
    assert!(!node.pull(&reference).wait().await.unwrap().changed);
    let error = node
        .pull(&registry.reference("some/app:2"))
        .wait()
        .await
        .unwrap_err();
    assert!(matches!(*error, ImageError::NotFound { .. }), "{error}");
    let error = node
        .pull(&registry.reference("none:2"))
        .wait()
        .await
        .unwrap_err();
    assert!(matches!(*error, ImageError::NotFound { .. }), "{error}");

    // The same layer in docker's types, below a manifest list.
    let amd = image(&[(tar(&[("arch", b"amd64")]), Gzip)]);
    for blob in [&amd.config, &amd.layers[0]] {
        registry.push_blob("docker", blob).await;
    }
    let kind = "application/vnd.docker.distribution.manifest.v2+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": kind,
        "config": fake::descriptor("application/vnd.docker.container.image.v1+json", &amd.config),
        "layers": [fake::descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", &amd.layers[0])],
    });
    let manifest = manifest.to_string().into_bytes();
    registry
        .push_manifest("docker", "plain", kind, &manifest)
        .await;
    let list = "application/vnd.docker.distribution.manifest.list.v2+json";
    let mut entry = fake::descriptor(kind, &manifest);
    entry["platform"] = serde_json::json!({"os": "linux", "architecture": "amd64"});
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": list, "manifests": [entry]})
        .to_string();
    registry
        .push_manifest("docker", "list", list, index.as_bytes())
        .await;
    let listed = node
        .pull(&registry.reference("docker:list"))
        .wait()
        .await
        .unwrap();
    let plain = node
        .pull(&registry.reference("docker:plain"))
        .wait()
        .await
        .unwrap();
    assert_eq!(listed.image, plain.image);
    assert_eq!(listed.index_digest, Some(Digest::of(index.as_bytes())));
    assert_eq!(node.image(plain.image.as_str()).unwrap().tags.len(), 2);
    assert!(node.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_over_tls_needs_its_authority() {
    let Some(registry) = DockerRegistry::start(true).await else {
        return;
    };
    let test = three_layers();
    registry.push("app", "1", &test).await;
    let reference = registry.reference("app:1");
    let host = reference.registry().to_owned();
    let with = |table: HostConfig| {
        Node::with(ImageChapterConfig {
            hosts: HostsConfig([(host.clone(), table)].into()),
            ..quick()
        })
    };
    let node = with(HostConfig {
        ca: registry.ca.clone(),
        ..HostConfig::default()
    });
    node.pull(&reference).wait().await.unwrap();
    assert_eq!(node.read(&reference.to_string(), "etc/b").unwrap(), b"two");
    let node = with(HostConfig {
        skip_verify: true,
        ..HostConfig::default()
    });
    node.pull(&reference).wait().await.unwrap();
    let node = with(HostConfig {
        plain_http: Some(false),
        ..HostConfig::default()
    });
    let error = node.pull(&reference).wait().await.unwrap_err();
    match &*error {
        ImageError::Tls { endpoint, .. } => assert_eq!(*endpoint, format!("https://{host}")),
        other => panic!("{other:?}"),
    }
    let node = with(HostConfig {
        ca: Some("/nonexistent.pem".into()),
        ..HostConfig::default()
    });
    let error = node.pull(&reference).wait().await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_tool_pushes_is_pulled() {
    let Some(registry) = DockerRegistry::start(false).await else {
        return;
    };
    let test = image(&[
        (tar(&[("etc/a", b"one")]), Gzip),
        (tar(&[("etc/b", &noise(11, 100_000))]), Gzip),
    ]);
    registry.push("oci", "1", &test).await;
    // Skopeo rewrites the manifest in docker's types.
    let place = |rest: &str| format!("docker://127.0.0.1:{}/{rest}", registry.port);
    let copied = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet", "--format", "v2s2"])
        .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
        .args([place("oci:1"), place("docker:2")])
        .output();
    let Ok(copied) = copied else {
        eprintln!("skipped: skopeo is not installed");
        return;
    };
    let said = String::from_utf8_lossy(&copied.stderr);
    assert!(copied.status.success(), "{said}");
    let node = Node::new();
    let reference = registry.reference("docker:2");
    node.pull(&reference).wait().await.unwrap();
    let read = |path| node.read(&reference.to_string(), path).unwrap();
    assert_eq!(read("etc/a"), b"one");
    assert_eq!(read("etc/b"), noise(11, 100_000));
}
