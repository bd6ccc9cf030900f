//! The requests that most tests send, and what they wait for.

use std::{
    cell::Cell,
    collections::HashMap,
    fs,
    net::IpAddr,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use longshore_proto::cri::v1 as cri;

use crate::{
    images::{self, Image},
    machine::Machine,
    node::{ImageService, Node, Runtime},
    registry::Registry,
};

/// How long a test waits for a state: emulated machines are slow.
pub const WAIT_LIMIT: Duration = Duration::from_secs(60);

static NEXT: AtomicU32 = AtomicU32::new(1);

thread_local! {
    static HANDLER: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Handler of the pods of a [`Bench`]: [`with_handler`]'s, or `LONGSHORE_TEST_HANDLER`, so that every
/// test can be run with any; empty is the default.
fn handler() -> String {
    HANDLER
        .get()
        .map(str::to_owned)
        .or_else(|| std::env::var("LONGSHORE_TEST_HANDLER").ok())
        .unwrap_or_default()
}

/// Runs a test whose pods have this handler: those that a [`Bench`] runs on this thread.
pub fn with_handler<T>(handler: &'static str, test: impl FnOnce() -> T) -> T {
    HANDLER.set(Some(handler));
    let result = test();
    HANDLER.set(None);
    result
}

/// The same for a call of a [`Bench`], which is polled on one thread.
pub async fn with_handler_async<T>(handler: &'static str, call: impl Future<Output = T>) -> T {
    let before = HANDLER.replace(Some(handler));
    let result = call.await;
    HANDLER.set(before);
    result
}

/// A number that no other call got.
pub fn unique() -> u32 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A plain pod: its own namespaces, each container with its own pids, as kubelet asks for.
pub fn pod(name: &str) -> cri::PodSandboxConfig {
    let number = unique();
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{number}"),
            namespace: "tests".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        labels: HashMap::from([("test".to_owned(), name.to_owned())]),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    pid: cri::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A pod in the host's network.
pub fn host_network_pod(name: &str) -> cri::PodSandboxConfig {
    let mut config = pod(name);
    // The host's name belongs to the host's network.
    config.hostname.clear();
    options(&mut config).network = cri::NamespaceMode::Node.into();
    config
}

/// The namespace options of a pod, made if need be.
pub fn options(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .namespace_options
        .get_or_insert_default()
}

/// Id on the host of the first user of [`user_namespace`].
pub const MAPPED_UID: u32 = 200_000;
/// Id on the host of its first group.
pub const MAPPED_GID: u32 = 300_000;

/// Ids from 0 on, as many as Kubernetes gives a pod, from `host_id` on.
pub fn id_map(host_id: u32) -> Vec<cri::IdMapping> {
    vec![cri::IdMapping {
        host_id,
        container_id: 0,
        length: 65_536,
    }]
}

/// A user namespace of a pod's own.
pub fn user_namespace() -> cri::UserNamespace {
    cri::UserNamespace {
        mode: cri::NamespaceMode::Pod.into(),
        uids: id_map(MAPPED_UID),
        gids: id_map(MAPPED_GID),
    }
}

/// The security context of a container, made if need be.
pub fn security(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// The resources of a container, made if need be.
pub fn resources(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerResources {
    config
        .linux
        .get_or_insert_default()
        .resources
        .get_or_insert_default()
}

/// A container of `image` that runs `command`.
pub fn container(name: &str, image: &str, command: &[&str]) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: image.to_owned(),
            user_specified_image: image.to_owned(),
            ..Default::default()
        }),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(cri::LinuxContainerConfig {
            security_context: Some(cri::LinuxContainerSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    pid: cri::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// `sh -c script`.
pub fn script(name: &str, image: &str, script: &str) -> cri::ContainerConfig {
    container(name, image, &["sh", "-c", script])
}

/// A node with a registry on its loopback and the toolbox pulled: where most tests begin.
pub struct Bench {
    /// The agent.
    pub node: Node,
    /// The registry, on the node's loopback.
    pub registry: Registry,
    /// Reference of the toolbox.
    pub toolbox: String,
    /// CRI's runtime service.
    pub runtime: Runtime,
    /// CRI's image service.
    pub images: ImageService,
}

impl Bench {
    /// Starts it all, and takes what is there then as clean.
    pub async fn start() -> Result<Self> {
        Self::start_configured("").await
    }

    /// The same with a configuration.
    pub async fn start_configured(config: &str) -> Result<Self> {
        let node = Node::start_configured(config).await?;
        let registry = Registry::start(node.machine().listen("127.0.0.1:0")?)?;
        registry.push("toolbox:1", &images::toolbox()?);
        let toolbox = registry.reference("toolbox:1");
        let mut bench = Self {
            runtime: node.runtime(),
            images: node.images(),
            node,
            registry,
            toolbox,
        };
        let reference = bench.toolbox.clone();
        bench.pull(&reference).await?;
        bench.node.mark_clean()?;
        Ok(bench)
    }

    /// The machine they live on.
    pub fn machine(&self) -> &Machine {
        self.node.machine()
    }

    /// Kills the agent and starts it again.
    pub async fn crash(&mut self) -> Result<()> {
        self.node.crash().await?;
        self.reconnect();
        Ok(())
    }

    /// Takes fresh clients after the agent was started again.
    pub fn reconnect(&mut self) {
        self.runtime = self.node.runtime();
        self.images = self.node.images();
    }

    /// Offers an image and pulls it; answers its id. What that adds is clean.
    pub async fn offer(&mut self, name: &str, image: &Image) -> Result<String> {
        self.registry.push(name, image);
        let reference = self.registry.reference(name);
        let before = self.node.snapshot()?;
        let id = self.pull(&reference).await?;
        self.node.mark_clean_since(&before)?;
        Ok(id)
    }

    /// Pulls a reference; answers the image's id.
    pub async fn pull(&mut self, reference: &str) -> Result<String> {
        pull(&mut self.images, reference, None).await
    }

    /// Runs a pod; logs go to the node's log directory.
    pub async fn run(&mut self, mut config: cri::PodSandboxConfig) -> Result<Pod> {
        if config.log_directory.is_empty() {
            let name = config.metadata.clone().unwrap_or_default().uid;
            config.log_directory = self
                .node
                .log_dir()
                .join(name)
                .to_string_lossy()
                .into_owned();
        }
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler(),
        };
        let id = self
            .runtime
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id;
        Ok(Pod { id, config })
    }

    /// Creates a container.
    pub async fn create(
        &mut self,
        pod: &Pod,
        config: cri::ContainerConfig,
    ) -> Result<String, tonic::Status> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(self
            .runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id)
    }

    /// Starts a container.
    pub async fn start_container(&mut self, id: &str) -> Result<(), tonic::Status> {
        let request = cri::StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime.start_container(request).await.map(drop)
    }

    /// Creates and starts a container; answers its id.
    pub async fn launch(&mut self, pod: &Pod, config: cri::ContainerConfig) -> Result<String> {
        let id = self.create(pod, config).await?;
        self.start_container(&id).await?;
        Ok(id)
    }

    /// Runs a script in the toolbox to its end; answers status and output.
    pub async fn run_script(
        &mut self,
        pod: &Pod,
        text: &str,
    ) -> Result<(cri::ContainerStatus, String)> {
        let config = script(&format!("script-{}", unique()), &self.toolbox.clone(), text);
        self.run_to_end(pod, config).await
    }

    /// Runs a container to its end; answers status and standard output, and removes it.
    pub async fn run_to_end(
        &mut self,
        pod: &Pod,
        config: cri::ContainerConfig,
    ) -> Result<(cri::ContainerStatus, String)> {
        let id = self.launch(pod, config).await?;
        let status = self.wait_exited(&id).await?;
        let output = read_log(Path::new(&status.log_path))?.stdout();
        self.remove_container(&id).await?;
        // Logs outlive their containers: the next one of this name must begin with an empty one.
        fs::remove_file(&status.log_path)?;
        Ok((status, output))
    }

    /// Status of a container.
    pub async fn status(&mut self, id: &str) -> Result<cri::ContainerStatus> {
        let request = cri::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let response = self.runtime.container_status(request).await?.into_inner();
        response.status.context("a status")
    }

    /// Status of a pod.
    pub async fn pod_status(&mut self, pod: &Pod) -> Result<cri::PodSandboxStatus> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let response = self.runtime.pod_sandbox_status(request).await?.into_inner();
        response.status.context("a status")
    }

    /// First address of a pod, and the others.
    pub async fn addresses(&mut self, pod: &Pod) -> Result<Vec<IpAddr>> {
        let network = self
            .pod_status(pod)
            .await?
            .network
            .context("a network status")?;
        let others = network.additional_ips.into_iter().map(|other| other.ip);
        std::iter::once(network.ip)
            .chain(others)
            .filter(|ip| !ip.is_empty())
            .map(|ip| ip.parse().with_context(|| format!("address {ip:?}")))
            .collect()
    }

    /// Waits until a container has exited.
    pub async fn wait_exited(&mut self, id: &str) -> Result<cri::ContainerStatus> {
        let end = Instant::now() + WAIT_LIMIT;
        loop {
            let status = self.status(id).await?;
            if status.state() == cri::ContainerState::ContainerExited {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("container {id} is still {:?}", status.state());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs a command in a container.
    pub async fn exec(
        &mut self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<cri::ExecSyncResponse, tonic::Status> {
        let request = cri::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout,
        };
        Ok(self.runtime.exec_sync(request).await?.into_inner())
    }

    /// Runs a script in a container; answers what it wrote, if it ended well.
    pub async fn exec_ok(&mut self, id: &str, text: &str) -> Result<String> {
        let response = self.exec(id, &["sh", "-c", text], 0).await?;
        let output = String::from_utf8_lossy(&response.stdout).into_owned();
        if response.exit_code != 0 {
            let error = String::from_utf8_lossy(&response.stderr);
            bail!(
                "{text:?} exits with {}: {output}{error}",
                response.exit_code
            );
        }
        Ok(output)
    }

    /// Stops a container.
    pub async fn stop_container(&mut self, id: &str, timeout: i64) -> Result<()> {
        let request = cri::StopContainerRequest {
            container_id: id.to_owned(),
            timeout,
        };
        self.runtime.stop_container(request).await?;
        Ok(())
    }

    /// Removes a container.
    pub async fn remove_container(&mut self, id: &str) -> Result<()> {
        let request = cri::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime.remove_container(request).await?;
        Ok(())
    }

    /// Stops a pod.
    pub async fn stop(&mut self, pod: &Pod) -> Result<()> {
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.runtime.stop_pod_sandbox(request).await?;
        Ok(())
    }

    /// Stops and removes a pod.
    pub async fn remove(&mut self, pod: &Pod) -> Result<()> {
        self.stop(pod).await?;
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.runtime.remove_pod_sandbox(request).await?;
        Ok(())
    }

    /// The end of a test: removes all pods, and expects that nothing is left of them.
    pub async fn finish(mut self) -> Result<()> {
        let pods = self
            .runtime
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await?;
        for item in pods.into_inner().items {
            let pod = Pod {
                id: item.id,
                config: cri::PodSandboxConfig::default(),
            };
            self.remove(&pod).await?;
        }
        self.node.finish().await
    }
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What was asked for.
    pub config: cri::PodSandboxConfig,
}

/// Pulls a reference through CRI; answers the image's id.
pub async fn pull(
    images: &mut ImageService,
    reference: &str,
    auth: Option<cri::AuthConfig>,
) -> Result<String> {
    let request = cri::PullImageRequest {
        image: Some(cri::ImageSpec {
            image: reference.to_owned(),
            ..Default::default()
        }),
        auth,
        sandbox_config: None,
    };
    Ok(images.pull_image(request).await?.into_inner().image_ref)
}

/// A container's log, parsed.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// Its lines.
    pub lines: Vec<LogLine>,
}

/// One line of a log in CRI's format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// RFC 3339 with nanoseconds.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the original line goes on in the next one.
    pub partial: bool,
    /// Without the newline.
    pub text: String,
}

impl Log {
    /// Everything that was written, both streams as they came: between them there is no order.
    pub fn text(&self) -> String {
        Self::join(self.lines.iter())
    }

    /// What was written to standard output.
    pub fn stdout(&self) -> String {
        Self::join(self.lines.iter().filter(|line| line.stream == "stdout"))
    }

    fn join<'a>(lines: impl Iterator<Item = &'a LogLine>) -> String {
        let mut all = String::new();
        for line in lines {
            all.push_str(&line.text);
            if !line.partial {
                all.push('\n');
            }
        }
        all
    }
}

/// Reads a log.
///
/// # Errors
/// If a line is not in CRI's format.
pub fn read_log(path: &Path) -> Result<Log> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    parse_log(&String::from_utf8_lossy(&text))
}

/// Parses a log.
pub fn parse_log(text: &str) -> Result<Log> {
    let mut log = Log::default();
    for line in text.split_terminator('\n') {
        let mut parts = line.splitn(4, ' ');
        let mut part = || parts.next().with_context(|| format!("log line {line:?}"));
        let (time, stream, tag, text) = (part()?, part()?, part()?, part()?);
        if !matches!(stream, "stdout" | "stderr") || !matches!(tag, "F" | "P") || time.len() < 20 {
            bail!("log line {line:?}");
        }
        log.lines.push(LogLine {
            time: time.to_owned(),
            stream: stream.to_owned(),
            partial: tag == "P",
            text: text.to_owned(),
        });
    }
    Ok(log)
}

/// Polls `check` until it is true.
///
/// # Errors
/// With `what` after a minute.
pub async fn wait_for(what: &str, mut check: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + WAIT_LIMIT;
    while !check().await? {
        if Instant::now() > end {
            bail!("never happened: {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_join_partial_lines() {
        let text = "2026-03-04T05:06:07.123456789Z stdout P ab\n2026-03-04T05:06:07.123456790Z stdout F c d\n";
        let log = parse_log(text).expect("well formed");
        assert_eq!(log.text(), "abc d\n");
        assert!(parse_log("2026-03-04T05:06:07.1Z stdin F x\n").is_err());
        assert!(parse_log("nonsense\n").is_err());
    }
}
