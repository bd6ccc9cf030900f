//! CRI's RuntimeService.

use std::{collections::HashMap, sync::Arc, time::Duration};

use longshore_proto::cri::v1::{self as cri, runtime_service_server::RuntimeService};
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt as _;

use super::{
    Cri, Streamed, chunks,
    filter::{self, Wish},
    parse, render,
};
use crate::{
    cgroup::CgroupDriver,
    clock::Time,
    id::Face,
    lifecycle::{LifecycleError, container::Container, sandbox::Sandbox, stats::ContainerUse},
    service::{
        edge::{self, EdgeError},
        status::ToStatus,
        streaming::{AttachGrant, ExecGrant, PortForwardGrant},
    },
};

/// What the kubelet reads of a node without a network.
const NETWORK_NOT_READY: &str = "NetworkPluginNotReady";
/// The protocol version that kubelet asks for and is answered with.
const KUBELET_API_VERSION: &str = "0.1.0";

fn refused(error: impl ToStatus) -> Status {
    error.to_status()
}

fn id(field: &str, value: &str) -> Result<(), Status> {
    edge::id(field, value).map_err(refused)
}

/// A command that does not exist. NotFound would say that the container does not, which clients
/// act upon; the peers answer Unknown (CRI contract 1.4).
fn refused_command(error: LifecycleError) -> Status {
    let status = error.to_status();
    if status.code() != Code::NotFound || !matches!(error.root(), LifecycleError::Handler(_)) {
        return status;
    }
    // The details repeat the code: clients in Go call an answer in which the two differ Internal.
    let details = status.get_error_details();
    Status::with_error_details(Code::Unknown, status.message(), details)
}

fn unsupported<T>(feature: &'static str, missing: &'static str) -> Result<T, Status> {
    Err(refused(EdgeError::Unsupported { feature, missing }))
}

impl Cri {
    fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Status> {
        self::id("pod_sandbox_id", id)?;
        let at = self.agent.store.snapshot();
        self.agent
            .lifecycle
            .find_sandbox(&at, Face::Cri, id)
            .map_err(refused)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        self::id("container_id", id)?;
        let at = self.agent.store.snapshot();
        self.agent
            .lifecycle
            .find_container(&at, Face::Cri, id)
            .map_err(refused)
    }

    fn list_sandboxes(&self, wish: &Wish) -> Vec<Arc<Sandbox>> {
        filter::sandboxes(&self.agent.lifecycle, &self.agent.store.snapshot(), wish)
    }

    fn list(&self, wish: &Wish) -> Vec<Arc<Container>> {
        filter::containers(&self.agent.lifecycle, &self.agent.store.snapshot(), wish)
    }

    fn mountpoint(&self) -> String {
        self.agent.config.data_dir.to_string_lossy().into_owned()
    }

    /// Readings of many containers; one that goes away meanwhile is left out.
    async fn container_stats_of(&self, wish: &Wish) -> Vec<cri::ContainerStats> {
        let mountpoint = self.mountpoint();
        let mut stats = Vec::new();
        for container in self.list(wish) {
            match self.agent.lifecycle.container_use(container).await {
                Ok(used) => stats.push(render::container_stats(&used, &mountpoint)),
                Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "no stats"),
            }
        }
        stats
    }

    async fn sandbox_stats_of(&self, wish: &Wish) -> Vec<cri::PodSandboxStats> {
        let mountpoint = self.mountpoint();
        let mut stats = Vec::new();
        for sandbox in self
            .list_sandboxes(wish)
            .into_iter()
            .filter(|s| s.is_ready())
        {
            match self.agent.lifecycle.sandbox_use(sandbox).await {
                Ok(used) => stats.push(render::sandbox_stats(&used, &mountpoint)),
                Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "no stats"),
            }
        }
        stats
    }

    fn status_info(&self) -> HashMap<String, String> {
        let agent = &self.agent;
        let config = serde_json::json!({
            "instance": agent.instance,
            "stateDir": agent.config.run_dir,
            "rootDir": agent.config.data_dir,
            "cgroupRoot": agent.cgroups.root(),
            "controllers": agent.cgroups.controllers(),
        });
        let (networks, loaded) = render::cni_status(agent);
        HashMap::from([
            ("config".to_owned(), config.to_string()),
            ("cniconfig".to_owned(), networks.to_string()),
            ("lastCNILoadStatus".to_owned(), loaded),
        ])
    }
}

fn running(container: &Container) -> Result<(), Status> {
    if container.is_running() {
        return Ok(());
    }
    Err(refused(LifecycleError::State {
        kind: "container",
        id: container.id.to_string(),
        state: render::container_state(container).as_str_name(),
        wanted: "CONTAINER_RUNNING",
    }))
}

fn ready(sandbox: &Sandbox) -> Result<(), Status> {
    if sandbox.is_ready() {
        return Ok(());
    }
    Err(refused(LifecycleError::State {
        kind: "sandbox",
        id: sandbox.id.to_string(),
        state: "SANDBOX_NOTREADY",
        wanted: "SANDBOX_READY",
    }))
}

/// At least one stream, and no error stream beside a terminal.
fn streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<(), Status> {
    if tty && stderr {
        return Err(refused(EdgeError::Conflict {
            field: "stderr".into(),
            other: "tty".into(),
        }));
    }
    if !(stdin || stdout || stderr) {
        return Err(refused(EdgeError::invalid(
            "stdout",
            false,
            "one of stdin, stdout and stderr",
        )));
    }
    Ok(())
}

fn command(cmd: &[String]) -> Result<(), Status> {
    let program = cmd
        .first()
        .ok_or_else(|| refused(EdgeError::missing("cmd")))?;
    edge::required("cmd[0]", program).map_err(refused)?;
    if let Some(at) = cmd.iter().position(|word| word.contains('\0')) {
        return Err(refused(EdgeError::invalid(
            format!("cmd[{at}]"),
            cmd[at].escape_default(),
            "no NUL",
        )));
    }
    Ok(())
}

#[tonic::async_trait]
impl RuntimeService for Cri {
    type StreamPodSandboxesStream = Streamed<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Streamed<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Streamed<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Streamed<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Streamed<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Streamed<cri::ContainerEventResponse>;

    async fn version(
        &self,
        request: Request<cri::VersionRequest>,
    ) -> Result<Response<cri::VersionResponse>, Status> {
        edge::text("version", &request.into_inner().version, 64).map_err(refused)?;
        Ok(Response::new(cri::VersionResponse {
            version: KUBELET_API_VERSION.into(),
            runtime_name: "longshore".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Result<Response<cri::RunPodSandboxResponse>, Status> {
        let config = parse::sandbox_config(request.into_inner()).map_err(refused)?;
        let id = self
            .agent
            .lifecycle
            .run_pod_sandbox(config)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::RunPodSandboxResponse {
            pod_sandbox_id: id.to_string(),
        }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Result<Response<cri::StopPodSandboxResponse>, Status> {
        let request = request.into_inner();
        id("pod_sandbox_id", &request.pod_sandbox_id)?;
        self.agent
            .lifecycle
            .stop_pod_sandbox(Face::Cri, &request.pod_sandbox_id, Some(Duration::ZERO))
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Result<Response<cri::RemovePodSandboxResponse>, Status> {
        let request = request.into_inner();
        id("pod_sandbox_id", &request.pod_sandbox_id)?;
        self.agent
            .lifecycle
            .remove_pod_sandbox(Face::Cri, &request.pod_sandbox_id, true)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Result<Response<cri::PodSandboxStatusResponse>, Status> {
        let request = request.into_inner();
        // Before the snapshot: whatever this answer does not know yet has a later time.
        let timestamp = Time::now().unix_ns();
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        let info = if request.verbose {
            render::info(&render::sandbox_info(&self.agent.lifecycle, &sandbox))
        } else {
            HashMap::new()
        };
        let at = self.agent.store.snapshot();
        Ok(Response::new(cri::PodSandboxStatusResponse {
            status: Some(render::sandbox_status(&sandbox)),
            info,
            containers_statuses: self.statuses_of(&at, &sandbox.id),
            timestamp,
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Result<Response<cri::ListPodSandboxResponse>, Status> {
        let wish = request.into_inner().filter.into();
        let items = self
            .list_sandboxes(&wish)
            .iter()
            .map(|s| render::sandbox(s))
            .collect();
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let wish = request.into_inner().filter.into();
        let items = self
            .list_sandboxes(&wish)
            .iter()
            .map(|s| render::sandbox(s))
            .collect();
        Ok(Response::new(chunks(items, |pod_sandboxes| {
            cri::StreamPodSandboxesResponse { pod_sandboxes }
        })))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Result<Response<cri::CreateContainerResponse>, Status> {
        let request = request.into_inner();
        let sandbox = request.pod_sandbox_id.clone();
        let config = parse::container_config(request).map_err(refused)?;
        let id = self
            .agent
            .lifecycle
            .create_container(&sandbox, config)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::CreateContainerResponse {
            container_id: id.to_string(),
        }))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Result<Response<cri::StartContainerResponse>, Status> {
        let request = request.into_inner();
        id("container_id", &request.container_id)?;
        self.agent
            .lifecycle
            .start_container(Face::Cri, &request.container_id)
            .await
            .map_err(refused_command)?;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Result<Response<cri::StopContainerResponse>, Status> {
        let request = request.into_inner();
        id("container_id", &request.container_id)?;
        // Negative is as good as zero: one of the peers takes it so, and clients rely on it.
        let grace = parse::seconds("timeout", request.timeout.max(0)).map_err(refused)?;
        self.agent
            .lifecycle
            .stop_container(Face::Cri, &request.container_id, Some(grace))
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Result<Response<cri::RemoveContainerResponse>, Status> {
        let request = request.into_inner();
        id("container_id", &request.container_id)?;
        self.agent
            .lifecycle
            .remove_container(Face::Cri, &request.container_id, true)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Result<Response<cri::ListContainersResponse>, Status> {
        let wish = request.into_inner().filter.into();
        let containers = self
            .list(&wish)
            .iter()
            .map(|c| render::container(c))
            .collect();
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let wish = request.into_inner().filter.into();
        let containers = self
            .list(&wish)
            .iter()
            .map(|c| render::container(c))
            .collect();
        Ok(Response::new(chunks(containers, |containers| {
            cri::StreamContainersResponse { containers }
        })))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Result<Response<cri::ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        let info = if request.verbose {
            render::info(&render::container_info(&self.agent.lifecycle, &container))
        } else {
            HashMap::new()
        };
        Ok(Response::new(cri::ContainerStatusResponse {
            status: Some(render::container_status(&container)),
            info,
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Result<Response<cri::UpdateContainerResourcesResponse>, Status> {
        let request = request.into_inner();
        id("container_id", &request.container_id)?;
        let wish =
            parse::resources(&request.linux.unwrap_or_default(), "linux").map_err(refused)?;
        self.agent
            .lifecycle
            .update_container(Face::Cri, &request.container_id, &wish)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Result<Response<cri::ReopenContainerLogResponse>, Status> {
        let request = request.into_inner();
        id("container_id", &request.container_id)?;
        self.agent
            .lifecycle
            .reopen_container_log(Face::Cri, &request.container_id)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Result<Response<cri::ExecSyncResponse>, Status> {
        let request = request.into_inner();
        id("container_id", &request.container_id)?;
        command(&request.cmd)?;
        let timeout = parse::seconds("timeout", request.timeout).map_err(refused)?;
        let output = self
            .agent
            .lifecycle
            .exec_sync(
                Face::Cri,
                &request.container_id,
                request.cmd,
                (!timeout.is_zero()).then_some(timeout),
            )
            .await
            .map_err(refused_command)?;
        Ok(Response::new(cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.exit_code,
        }))
    }

    async fn exec(
        &self,
        request: Request<cri::ExecRequest>,
    ) -> Result<Response<cri::ExecResponse>, Status> {
        let request = request.into_inner();
        streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        command(&request.cmd)?;
        let container = self.container(&request.container_id)?;
        running(&container)?;
        let grant = ExecGrant {
            container: container.id.clone(),
            command: request.cmd,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let url = self
            .agent
            .streaming()
            .await
            .map_err(refused)?
            .exec(grant)
            .map_err(refused)?;
        Ok(Response::new(cri::ExecResponse { url }))
    }

    async fn attach(
        &self,
        request: Request<cri::AttachRequest>,
    ) -> Result<Response<cri::AttachResponse>, Status> {
        let request = request.into_inner();
        streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let container = self.container(&request.container_id)?;
        running(&container)?;
        let grant = AttachGrant {
            container: container.id.clone(),
            tty: container.config.tty,
            // A client may ask for the input of a container that has none; there is nothing to forward then.
            stdin: request.stdin && container.config.stdin,
            stdout: request.stdout,
            stderr: request.stderr && !container.config.tty,
        };
        let url = self
            .agent
            .streaming()
            .await
            .map_err(refused)?
            .attach(grant)
            .map_err(refused)?;
        Ok(Response::new(cri::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Result<Response<cri::PortForwardResponse>, Status> {
        let request = request.into_inner();
        let sandbox = self.sandbox(&request.pod_sandbox_id)?;
        ready(&sandbox)?;
        let ports = request
            .port
            .iter()
            .enumerate()
            .map(|(index, port)| {
                u16::try_from(*port)
                    .ok()
                    .filter(|port| *port != 0)
                    .ok_or_else(|| {
                        refused(EdgeError::invalid(
                            format!("port[{index}]"),
                            port,
                            "a port from 1 to 65535",
                        ))
                    })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let grant = PortForwardGrant {
            sandbox: sandbox.id.clone(),
            ports,
        };
        let url = self
            .agent
            .streaming()
            .await
            .map_err(refused)?
            .port_forward(grant)
            .map_err(refused)?;
        Ok(Response::new(cri::PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Result<Response<cri::ContainerStatsResponse>, Status> {
        let container = self.container(&request.into_inner().container_id)?;
        let used: ContainerUse = self
            .agent
            .lifecycle
            .container_use(container)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::ContainerStatsResponse {
            stats: Some(render::container_stats(&used, &self.mountpoint())),
        }))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Result<Response<cri::ListContainerStatsResponse>, Status> {
        let stats = self
            .container_stats_of(&request.into_inner().filter.into())
            .await;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let stats = self
            .container_stats_of(&request.into_inner().filter.into())
            .await;
        Ok(Response::new(chunks(stats, |container_stats| {
            cri::StreamContainerStatsResponse { container_stats }
        })))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Result<Response<cri::PodSandboxStatsResponse>, Status> {
        let sandbox = self.sandbox(&request.into_inner().pod_sandbox_id)?;
        ready(&sandbox)?;
        let used = self
            .agent
            .lifecycle
            .sandbox_use(sandbox)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::PodSandboxStatsResponse {
            stats: Some(render::sandbox_stats(&used, &self.mountpoint())),
        }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Result<Response<cri::ListPodSandboxStatsResponse>, Status> {
        let stats = self
            .sandbox_stats_of(&request.into_inner().filter.into())
            .await;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let stats = self
            .sandbox_stats_of(&request.into_inner().filter.into())
            .await;
        Ok(Response::new(chunks(stats, |pod_sandbox_stats| {
            cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        })))
    }

    async fn update_runtime_config(
        &self,
        _: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<cri::UpdateRuntimeConfigResponse>, Status> {
        // The built-in network chooses its own subnet; whoever installs CNI's configuration puts a
        // pod CIDR into it.
        Ok(Response::new(cri::UpdateRuntimeConfigResponse {}))
    }

    async fn status(
        &self,
        request: Request<cri::StatusRequest>,
    ) -> Result<Response<cri::StatusResponse>, Status> {
        let ready = self.agent.networks.ready().await;
        let network = cri::RuntimeCondition {
            r#type: "NetworkReady".into(),
            status: ready.is_ok(),
            reason: ready
                .as_ref()
                .err()
                .map_or("", |_| NETWORK_NOT_READY)
                .into(),
            message: ready.err().unwrap_or_default(),
        };
        let runtime = cri::RuntimeCondition {
            r#type: "RuntimeReady".into(),
            status: true,
            ..Default::default()
        };
        let info = if request.into_inner().verbose {
            self.status_info()
        } else {
            HashMap::new()
        };
        let mut handlers = self.agent.lifecycle.handlers().await;
        // The first is the default, which CRI knows by an empty name.
        if let Some((_, features)) = handlers.first() {
            handlers.insert(0, (String::new(), *features));
        }
        let runtime_handlers = handlers
            .into_iter()
            .map(|(name, features)| cri::RuntimeHandler {
                name,
                features: Some(cri::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: features.recursive_readonly,
                    user_namespaces: features.user_namespaces,
                }),
            })
            .collect();
        Ok(Response::new(cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: vec![runtime, network],
            }),
            info,
            runtime_handlers,
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: self.agent.lifecycle.id_maps.is_ok(),
                mount_options: true,
            }),
        }))
    }

    async fn checkpoint_container(
        &self,
        _: Request<cri::CheckpointContainerRequest>,
    ) -> Result<Response<cri::CheckpointContainerResponse>, Status> {
        unsupported("CheckpointContainer", "CRIU is not driven by this release")
    }

    async fn checkpoint_pod(
        &self,
        _: Request<cri::CheckpointPodRequest>,
    ) -> Result<Response<cri::CheckpointPodResponse>, Status> {
        unsupported("CheckpointPod", "CRIU is not driven by this release")
    }

    async fn restore_pod(
        &self,
        _: Request<cri::RestorePodRequest>,
    ) -> Result<Response<cri::RestorePodResponse>, Status> {
        unsupported("RestorePod", "CRIU is not driven by this release")
    }

    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        let watch = self.agent.events.watch(None).map_err(refused)?;
        Ok(Response::new(self.events(watch)))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Result<Response<cri::ListMetricDescriptorsResponse>, Status> {
        Ok(Response::new(cri::ListMetricDescriptorsResponse {
            descriptors: super::metrics::descriptors(),
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<cri::ListPodSandboxMetricsResponse>, Status> {
        let pod_metrics = self.metrics().await;
        Ok(Response::new(cri::ListPodSandboxMetricsResponse {
            pod_metrics,
        }))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let metrics = self.metrics().await;
        Ok(Response::new(chunks(metrics, |pod_sandbox_metrics| {
            cri::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        })))
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Result<Response<cri::RuntimeConfigResponse>, Status> {
        let driver = match self.agent.cgroups.driver() {
            CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
            CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
        };
        Ok(Response::new(cri::RuntimeConfigResponse {
            linux: Some(cri::LinuxRuntimeConfiguration {
                cgroup_driver: driver.into(),
            }),
        }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<cri::UpdatePodSandboxResourcesResponse>, Status> {
        let request = request.into_inner();
        for (field, limits) in [
            ("overhead", &request.overhead),
            ("resources", &request.resources),
        ] {
            if let Some(limits) = limits {
                parse::resources(limits, field).map_err(refused)?;
            }
        }
        id("pod_sandbox_id", &request.pod_sandbox_id)?;
        let change = |kept: &serde_json::Value| {
            parse::with_resources(kept, request.overhead.clone(), request.resources.clone())
        };
        self.agent
            .lifecycle
            .update_pod_sandbox_resources(Face::Cri, &request.pod_sandbox_id, change)
            .await
            .map_err(refused)?;
        Ok(Response::new(cri::UpdatePodSandboxResourcesResponse {}))
    }
}
