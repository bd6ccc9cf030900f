//! SystemService.

use std::{sync::Arc, time::Duration};

use longshore_proto::longshore::v1::{self as pb, system_service_server::SystemService};
use tonic::{Request, Response, Status};

use super::{
    Native,
    error::{NativeError, refused_config},
    page::Page,
    parse, refused, render,
};
use crate::{
    lifecycle::system::{Halt, System},
    service::edge,
};

impl Native {
    fn render_system(&self, system: Arc<System>) -> pb::System {
        let at = self.agent.store.snapshot();
        render::system(&self.lifecycle().system_view(&at, system))
    }

    /// The system container as it is once a change of it is done.
    fn changed(&self, system: &System) -> Result<pb::System, Status> {
        let system = self.lifecycle().system(system.id.as_str());
        Ok(self.render_system(system.map_err(refused)?))
    }
}

/// Reads how a system container is to be stopped.
fn halt(force: bool, timeout: Option<&prost_types::Duration>) -> Result<Halt, Status> {
    let timeout: Option<Duration> =
        parse::optional_duration("timeout", timeout).map_err(refused)?;
    if force && timeout.is_some() {
        return Err(refused(NativeError::conflict("timeout", "force")));
    }
    Ok(Halt { force, timeout })
}

fn named(name: &str) -> Result<(), Status> {
    edge::required("name", name).map_err(refused)?;
    edge::text("name", name, 64).map_err(refused)
}

#[tonic::async_trait]
impl SystemService for Native {
    async fn create_system(
        &self,
        request: Request<pb::CreateSystemRequest>,
    ) -> Result<Response<pb::CreateSystemResponse>, Status> {
        let work = |native: Self, request: pb::CreateSystemRequest| async move {
            let wished = request
                .config
                .ok_or_else(|| refused(NativeError::missing("config")))?;
            let mut config = parse::system(wished).map_err(refused)?;
            config.idempotency_key = request.idempotency_key;
            let system = native
                .lifecycle()
                .create_system(config)
                .await
                .map_err(|error| refused_config(&error))?;
            Ok(pb::CreateSystemResponse {
                system: Some(native.render_system(system)),
            })
        };
        self.change("CreateSystem", request, work).await
    }

    async fn start_system(
        &self,
        request: Request<pb::StartSystemRequest>,
    ) -> Result<Response<pb::StartSystemResponse>, Status> {
        let work = |native: Self, request: pb::StartSystemRequest| async move {
            named(&request.name)?;
            let started = native.lifecycle().start_system(&request.name).await;
            let system = native.changed(&*started.map_err(refused)?)?;
            Ok(pb::StartSystemResponse {
                system: Some(system),
            })
        };
        self.change("StartSystem", request, work).await
    }

    async fn stop_system(
        &self,
        request: Request<pb::StopSystemRequest>,
    ) -> Result<Response<pb::StopSystemResponse>, Status> {
        let work = |native: Self, request: pb::StopSystemRequest| async move {
            named(&request.name)?;
            let halt = halt(request.force, request.timeout.as_ref())?;
            let stopped = native.lifecycle().stop_system(&request.name, halt).await;
            let system = native.changed(&*stopped.map_err(refused)?)?;
            Ok(pb::StopSystemResponse {
                system: Some(system),
            })
        };
        self.change("StopSystem", request, work).await
    }

    async fn restart_system(
        &self,
        request: Request<pb::RestartSystemRequest>,
    ) -> Result<Response<pb::RestartSystemResponse>, Status> {
        let work = |native: Self, request: pb::RestartSystemRequest| async move {
            named(&request.name)?;
            let halt = halt(request.force, request.timeout.as_ref())?;
            let restarted = native.lifecycle().restart_system(&request.name, halt).await;
            let system = native.changed(&*restarted.map_err(refused)?)?;
            Ok(pb::RestartSystemResponse {
                system: Some(system),
            })
        };
        self.change("RestartSystem", request, work).await
    }

    async fn remove_system(
        &self,
        request: Request<pb::RemoveSystemRequest>,
    ) -> Result<Response<pb::RemoveSystemResponse>, Status> {
        let work = |native: Self, request: pb::RemoveSystemRequest| async move {
            named(&request.name)?;
            native
                .lifecycle()
                .remove_system(&request.name, request.force)
                .await
                .map_err(refused)?;
            Ok(pb::RemoveSystemResponse {})
        };
        self.change("RemoveSystem", request, work).await
    }

    async fn freeze_system(
        &self,
        request: Request<pb::FreezeSystemRequest>,
    ) -> Result<Response<pb::FreezeSystemResponse>, Status> {
        let work = |native: Self, request: pb::FreezeSystemRequest| async move {
            named(&request.name)?;
            let frozen = native.lifecycle().freeze_system(&request.name).await;
            let system = native.changed(&*frozen.map_err(refused)?)?;
            Ok(pb::FreezeSystemResponse {
                system: Some(system),
            })
        };
        self.change("FreezeSystem", request, work).await
    }

    async fn unfreeze_system(
        &self,
        request: Request<pb::UnfreezeSystemRequest>,
    ) -> Result<Response<pb::UnfreezeSystemResponse>, Status> {
        let work = |native: Self, request: pb::UnfreezeSystemRequest| async move {
            named(&request.name)?;
            let thawed = native.lifecycle().unfreeze_system(&request.name).await;
            let system = native.changed(&*thawed.map_err(refused)?)?;
            Ok(pb::UnfreezeSystemResponse {
                system: Some(system),
            })
        };
        self.change("UnfreezeSystem", request, work).await
    }

    async fn get_system(
        &self,
        request: Request<pb::GetSystemRequest>,
    ) -> Result<Response<pb::GetSystemResponse>, Status> {
        let request = request.into_inner();
        named(&request.name)?;
        let system = self.lifecycle().system(&request.name).map_err(refused)?;
        let at = self.agent.store.snapshot();
        let view = self.lifecycle().system_view(&at, system);
        let usage = self.lifecycle().system_use(&view).await.map_err(refused)?;
        Ok(Response::new(pb::GetSystemResponse {
            system: Some(render::system(&view)),
            config: Some(render::system_config(&view.system)),
            usage: Some(render::system_usage(&usage)),
        }))
    }

    async fn list_systems(
        &self,
        request: Request<pb::ListSystemsRequest>,
    ) -> Result<Response<pb::ListSystemsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::new("systems", request.page_size, &request.page_token).map_err(refused)?;
        let state = parse::system_state(request.state).map_err(refused)?;
        let at = self.agent.store.snapshot();
        let found = self
            .lifecycle()
            .systems(&at)
            .into_iter()
            .filter(|view| state.is_none_or(|state| render::system_state(&view.state) == state))
            .filter(|view| {
                parse::labels_match(&request.label_selector, &view.system.config.labels)
            });
        let (systems, next_page_token) = page.cut(found, |view| view.system.config.name.clone());
        Ok(Response::new(pb::ListSystemsResponse {
            systems: systems.iter().map(render::system).collect(),
            next_page_token,
        }))
    }

    async fn get_console_log(
        &self,
        request: Request<pb::GetConsoleLogRequest>,
    ) -> Result<Response<pb::GetConsoleLogResponse>, Status> {
        let request = request.into_inner();
        named(&request.name)?;
        let content = self
            .lifecycle()
            .system_console(&request.name, request.tail_lines)
            .await
            .map_err(refused)?;
        Ok(Response::new(pb::GetConsoleLogResponse {
            content: content.into(),
        }))
    }
}
