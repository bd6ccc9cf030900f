//! LifecycleService.

use std::sync::Arc;

use longshore_proto::longshore::v1::{self as pb, lifecycle_service_server::LifecycleService};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Native, Streamed,
    deadline::Deadline,
    dialogue::{self, Attach, Exec},
    error::{NativeError, refused_config},
    if_found,
    page::{Page, newest_first},
    parse, refused, render,
    stats::{self, Sampler, Wish},
};
use crate::{
    clock::Time,
    id::{ContainerId, Digest, Face},
    lifecycle::{
        container::{Container, LogWish},
        sandbox::Sandbox,
    },
    service::edge,
    store::Snapshot,
};

impl Native {
    fn render_sandbox(&self, at: &Snapshot, sandbox: &Sandbox) -> pb::Sandbox {
        let count = self.lifecycle().containers_of(at, &sandbox.id).len();
        render::sandbox(sandbox, count)
    }

    /// Where a new container's log goes.
    ///
    /// By name, so that an equal wish is an equal operation; ids are not known yet.
    fn log(
        &self,
        wished: Option<&pb::LogConfig>,
        sandbox: &Sandbox,
        name: &str,
        key: &str,
    ) -> Option<LogWish> {
        let directory = sandbox.config.log_directory.as_deref();
        let name = match (directory, name) {
            (_, "") => spare_name(key, 16),
            (Some(_), name) => name.to_owned(),
            (None, name) => format!("{}-{name}", &sandbox.id.as_str()[..16]),
        };
        let place = parse::LogPlace {
            directory,
            logs_dir: &self.lifecycle().logs_dir,
            name,
            defaults: &self.lifecycle().config,
        };
        parse::log(wished, place)
    }

    async fn run(self, request: pb::RunSandboxRequest) -> Result<pb::RunSandboxResponse, Status> {
        let key = request.idempotency_key;
        let wished = request.config.unwrap_or_default();
        let mut config = parse::sandbox(wished, || spare_name(&key, 12)).map_err(refused)?;
        config.idempotency_key = key;
        let id = self
            .lifecycle()
            .run_pod_sandbox(config)
            .await
            .map_err(|error| refused_config(&error))?;
        let sandbox = self.sandbox("sandbox_id", id.as_str())?;
        Ok(pb::RunSandboxResponse {
            sandbox: Some(self.render_sandbox(&self.agent.store.snapshot(), &sandbox)),
        })
    }

    async fn create(
        self,
        request: pb::CreateContainerRequest,
    ) -> Result<pb::CreateContainerResponse, Status> {
        edge::id("sandbox_id", &request.sandbox_id).map_err(refused)?;
        let wished = request
            .config
            .ok_or_else(|| refused(NativeError::missing("config")))?;
        let log = wished.log;
        let mut config = parse::container(wished).map_err(refused)?;
        let sandbox = self.sandbox("sandbox_id", &request.sandbox_id)?;
        let key = request.idempotency_key;
        config.log = self.log(log.as_ref(), &sandbox, &config.name, &key);
        config.idempotency_key = key;
        let id = self
            .lifecycle()
            .create_container(sandbox.id.as_str(), config)
            .await
            .map_err(|error| refused_config(&error))?;
        Ok(pb::CreateContainerResponse {
            container: Some(self.rendered(&id)?),
        })
    }

    fn rendered(&self, id: &ContainerId) -> Result<pb::Container, Status> {
        Ok(render::container(
            &*self.container("container_id", id.as_str())?,
        ))
    }

    async fn start(
        self,
        request: pb::StartContainerRequest,
    ) -> Result<pb::StartContainerResponse, Status> {
        let container = self.container("container_id", &request.container_id)?;
        self.lifecycle()
            .start_container(Face::Native, container.id.as_str())
            .await
            .map_err(refused)?;
        Ok(pb::StartContainerResponse {
            container: Some(self.rendered(&container.id)?),
        })
    }

    async fn stop(
        self,
        request: pb::StopContainerRequest,
    ) -> Result<pb::StopContainerResponse, Status> {
        edge::id("container_id", &request.container_id).map_err(refused)?;
        let grace =
            parse::optional_duration("timeout", request.timeout.as_ref()).map_err(refused)?;
        let at = self.agent.store.snapshot();
        let found = self
            .lifecycle()
            .find_container(&at, Face::Native, &request.container_id);
        let Some(container) = if_found(found).map_err(refused)? else {
            return Ok(pb::StopContainerResponse::default());
        };
        self.lifecycle()
            .stop_container(Face::Native, container.id.as_str(), grace)
            .await
            .map_err(refused)?;
        let stopped = self
            .agent
            .store
            .snapshot()
            .get::<Container>(container.id.as_str());
        Ok(pb::StopContainerResponse {
            container: stopped.map(|container| render::container(&container)),
        })
    }

    fn stats_wish(&self, request: pb::StatsRequest) -> Result<Wish, Status> {
        let mut wish = Wish {
            labels: request.label_selector,
            ..Wish::default()
        };
        for (index, id) in request.sandbox_ids.iter().enumerate() {
            let sandbox = self.sandbox(&format!("sandbox_ids[{index}]"), id)?;
            wish.sandboxes.insert(sandbox.id.clone());
        }
        for (index, id) in request.container_ids.iter().enumerate() {
            let container = self.container(&format!("container_ids[{index}]"), id)?;
            wish.containers.insert(container.id.clone());
        }
        Ok(wish)
    }

    fn matching_sandboxes(
        &self,
        at: &Snapshot,
        request: &pb::ListSandboxesRequest,
    ) -> Result<Vec<Arc<Sandbox>>, Status> {
        let (state, face) = (
            parse::sandbox_state(request.state).map_err(refused)?,
            parse::face(request.face).map_err(refused)?,
        );
        let candidates = match request.sandbox_id.as_str() {
            "" => at.all::<Sandbox>().collect(),
            id => {
                edge::id("sandbox_id", id).map_err(refused)?;
                self.one_sandbox(at, id)?.into_iter().collect::<Vec<_>>()
            }
        };
        Ok(candidates
            .into_iter()
            .filter(|sandbox| request.name.is_empty() || sandbox.config.key.name == request.name)
            .filter(|sandbox| state.is_none_or(|state| render::sandbox_state(sandbox) == state))
            .filter(|sandbox| face.is_none_or(|face| sandbox.config.face == face))
            .filter(|sandbox| parse::labels_match(&request.label_selector, &sandbox.config.labels))
            .collect())
    }

    fn matching_containers(
        &self,
        at: &Snapshot,
        request: &pb::ListContainersRequest,
    ) -> Result<Vec<Arc<Container>>, Status> {
        let (state, face) = (
            parse::container_state(request.state).map_err(refused)?,
            parse::face(request.face).map_err(refused)?,
        );
        let sandbox = match request.sandbox_id.as_str() {
            "" => None,
            id => {
                edge::id("sandbox_id", id).map_err(refused)?;
                match self.one_sandbox(at, id)? {
                    Some(sandbox) => Some(sandbox.id.clone()),
                    None => return Ok(Vec::new()),
                }
            }
        };
        let candidates = match request.container_id.as_str() {
            "" => at.all::<Container>().collect(),
            id => {
                edge::id("container_id", id).map_err(refused)?;
                let found = self.lifecycle().find_container(at, Face::Native, id);
                if_found(found)
                    .map_err(refused)?
                    .into_iter()
                    .collect::<Vec<_>>()
            }
        };
        Ok(candidates
            .into_iter()
            .filter(|container| {
                sandbox
                    .as_ref()
                    .is_none_or(|id| container.sandbox_id == *id)
            })
            .filter(|container| request.name.is_empty() || container.config.name == request.name)
            .filter(|container| {
                state.is_none_or(|state| render::container_state(container) == state)
            })
            .filter(|container| face.is_none_or(|face| container.config.face == face))
            .filter(|container| {
                parse::labels_match(&request.label_selector, &container.config.labels)
            })
            .collect())
    }

    pub(super) fn one_sandbox(
        &self,
        at: &Snapshot,
        id: &str,
    ) -> Result<Option<Arc<Sandbox>>, Status> {
        if_found(self.lifecycle().find_sandbox(at, Face::Native, id)).map_err(refused)
    }
}

/// A name that nobody else has, and that a retry with its idempotency key has again.
fn spare_name(key: &str, digits: usize) -> String {
    let name = match key {
        "" => ContainerId::random().to_string(),
        key => Digest::of(key.as_bytes()).hex().to_owned(),
    };
    name[..digits].to_owned()
}

#[tonic::async_trait]
impl LifecycleService for Native {
    type ExecStream = Streamed<pb::ExecResponse>;
    type AttachStream = Streamed<pb::AttachResponse>;
    type LogsStream = Streamed<pb::LogsResponse>;
    type StatsStream = Streamed<pb::StatsResponse>;

    async fn run_sandbox(
        &self,
        request: Request<pb::RunSandboxRequest>,
    ) -> Result<Response<pb::RunSandboxResponse>, Status> {
        self.change("RunSandbox", request, Self::run).await
    }

    async fn stop_sandbox(
        &self,
        request: Request<pb::StopSandboxRequest>,
    ) -> Result<Response<pb::StopSandboxResponse>, Status> {
        let work = |native: Self, request: pb::StopSandboxRequest| async move {
            edge::id("sandbox_id", &request.sandbox_id).map_err(refused)?;
            let grace =
                parse::optional_duration("timeout", request.timeout.as_ref()).map_err(refused)?;
            native
                .lifecycle()
                .stop_pod_sandbox(Face::Native, &request.sandbox_id, grace)
                .await
                .map_err(refused)?;
            Ok(pb::StopSandboxResponse {})
        };
        self.change("StopSandbox", request, work).await
    }

    async fn remove_sandbox(
        &self,
        request: Request<pb::RemoveSandboxRequest>,
    ) -> Result<Response<pb::RemoveSandboxResponse>, Status> {
        let work = |native: Self, request: pb::RemoveSandboxRequest| async move {
            edge::id("sandbox_id", &request.sandbox_id).map_err(refused)?;
            native
                .lifecycle()
                .remove_pod_sandbox(Face::Native, &request.sandbox_id, request.force)
                .await
                .map_err(refused)?;
            Ok(pb::RemoveSandboxResponse {})
        };
        self.change("RemoveSandbox", request, work).await
    }

    async fn get_sandbox(
        &self,
        request: Request<pb::GetSandboxRequest>,
    ) -> Result<Response<pb::GetSandboxResponse>, Status> {
        let request = request.into_inner();
        let sandbox = self.sandbox("sandbox_id", &request.sandbox_id)?;
        let at = self.agent.store.snapshot();
        let mut containers = self.lifecycle().containers_of(&at, &sandbox.id);
        containers
            .sort_by_key(|container| newest_first(container.created_at, container.id.as_str()));
        let mut response = pb::GetSandboxResponse {
            sandbox: Some(render::sandbox(&sandbox, containers.len())),
            containers: containers
                .iter()
                .map(|container| render::container(container))
                .collect(),
            ..Default::default()
        };
        if request.verbose {
            response.config = render::sandbox_config(&sandbox);
            response.info_json = render::sandbox_info(self.lifecycle(), &sandbox);
        }
        Ok(Response::new(response))
    }

    async fn list_sandboxes(
        &self,
        request: Request<pb::ListSandboxesRequest>,
    ) -> Result<Response<pb::ListSandboxesResponse>, Status> {
        let request = request.into_inner();
        let page =
            Page::new("sandboxes", request.page_size, &request.page_token).map_err(refused)?;
        let at = self.agent.store.snapshot();
        let found = self.matching_sandboxes(&at, &request)?;
        let (sandboxes, next_page_token) = page.cut(found, |sandbox| {
            newest_first(sandbox.created_at, sandbox.id.as_str())
        });
        Ok(Response::new(pb::ListSandboxesResponse {
            sandboxes: sandboxes
                .iter()
                .map(|sandbox| self.render_sandbox(&at, sandbox))
                .collect(),
            next_page_token,
        }))
    }

    async fn create_container(
        &self,
        request: Request<pb::CreateContainerRequest>,
    ) -> Result<Response<pb::CreateContainerResponse>, Status> {
        self.change("CreateContainer", request, Self::create).await
    }

    async fn start_container(
        &self,
        request: Request<pb::StartContainerRequest>,
    ) -> Result<Response<pb::StartContainerResponse>, Status> {
        self.change("StartContainer", request, Self::start).await
    }

    async fn stop_container(
        &self,
        request: Request<pb::StopContainerRequest>,
    ) -> Result<Response<pb::StopContainerResponse>, Status> {
        self.change("StopContainer", request, Self::stop).await
    }

    async fn signal_container(
        &self,
        request: Request<pb::SignalContainerRequest>,
    ) -> Result<Response<pb::SignalContainerResponse>, Status> {
        let work = |native: Self, request: pb::SignalContainerRequest| async move {
            edge::id("container_id", &request.container_id).map_err(refused)?;
            let signal = parse::signal_number("signal", &request.signal).map_err(refused)?;
            native
                .lifecycle()
                .signal_container(Face::Native, &request.container_id, signal)
                .await
                .map_err(refused)?;
            Ok(pb::SignalContainerResponse {})
        };
        self.change("SignalContainer", request, work).await
    }

    async fn remove_container(
        &self,
        request: Request<pb::RemoveContainerRequest>,
    ) -> Result<Response<pb::RemoveContainerResponse>, Status> {
        let work = |native: Self, request: pb::RemoveContainerRequest| async move {
            edge::id("container_id", &request.container_id).map_err(refused)?;
            native
                .lifecycle()
                .remove_container(Face::Native, &request.container_id, request.force)
                .await
                .map_err(refused)?;
            Ok(pb::RemoveContainerResponse {})
        };
        self.change("RemoveContainer", request, work).await
    }

    async fn get_container(
        &self,
        request: Request<pb::GetContainerRequest>,
    ) -> Result<Response<pb::GetContainerResponse>, Status> {
        let request = request.into_inner();
        let container = self.container("container_id", &request.container_id)?;
        let mut response = pb::GetContainerResponse {
            container: Some(render::container(&container)),
            ..Default::default()
        };
        if request.verbose {
            response.config = render::container_config(&container);
            response.oci_spec_json =
                serde_json::to_string(&container.spec).expect("specifications have string keys");
            response.info_json = render::container_info(self.lifecycle(), &container);
        }
        Ok(Response::new(response))
    }

    async fn list_containers(
        &self,
        request: Request<pb::ListContainersRequest>,
    ) -> Result<Response<pb::ListContainersResponse>, Status> {
        let request = request.into_inner();
        let page =
            Page::new("containers", request.page_size, &request.page_token).map_err(refused)?;
        let found = self.matching_containers(&self.agent.store.snapshot(), &request)?;
        let (containers, next_page_token) = page.cut(found, |container| {
            newest_first(container.created_at, container.id.as_str())
        });
        Ok(Response::new(pb::ListContainersResponse {
            containers: containers
                .iter()
                .map(|container| render::container(container))
                .collect(),
            next_page_token,
        }))
    }

    async fn wait_container(
        &self,
        request: Request<pb::WaitContainerRequest>,
    ) -> Result<Response<pb::WaitContainerResponse>, Status> {
        let deadline = Deadline::of(request.metadata());
        let container = self.container("container_id", &request.into_inner().container_id)?;
        let since = Time::now();
        let waiting = async {
            let exit = self
                .lifecycle()
                .wait_container(Face::Native, container.id.as_str())
                .await;
            exit.map_err(refused)
        };
        let exit = deadline
            .limit(
                || ("wait for the container's exit".to_owned(), since),
                waiting,
            )
            .await?;
        Ok(Response::new(pb::WaitContainerResponse {
            exit: Some(render::exit(&exit)),
            finished_at: Some(render::timestamp(exit.finished_at)),
        }))
    }

    async fn exec(
        &self,
        request: Request<Streaming<pb::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        // Answered before the first message comes: a caller may wait for that before it sends.
        Ok(Response::new(dialogue::run::<Exec>(
            self.clone(),
            request.into_inner(),
        )))
    }

    async fn attach(
        &self,
        request: Request<Streaming<pb::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        Ok(Response::new(dialogue::run::<Attach>(
            self.clone(),
            request.into_inner(),
        )))
    }

    async fn logs(
        &self,
        request: Request<pb::LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let container = self.container("container_id", &request.container_id)?;
        self.log_stream(&container, request).map(Response::new)
    }

    async fn stats(
        &self,
        request: Request<pb::StatsRequest>,
    ) -> Result<Response<Self::StatsStream>, Status> {
        let request = request.into_inner();
        let interval = parse::interval(request.interval.as_ref()).map_err(refused)?;
        let one_shot = request.one_shot;
        let sampler = Sampler::new(self.clone(), self.stats_wish(request)?);
        Ok(Response::new(stats::stream(sampler, interval, one_shot)))
    }
}
