//! NodeService.

use std::{fs, path::Path};

use futures_util::stream;
use longshore_proto::longshore::v1::{self as pb, node_service_server::NodeService};
use tonic::{Request, Response, Status};

use super::{Native, Streamed, idempotency, refused, render};
use crate::{
    blocking,
    cgroup::CgroupVersion,
    clock::{self, Time},
    image::{Image, Platform},
    lifecycle::{NATIVE_HANDLER, container::Container, sandbox::Sandbox},
    network::Network,
    node::{check, fsck},
    rootfs::Layer,
};

impl Native {
    fn counts(&self) -> pb::Counts {
        let at = self.agent.store.snapshot();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        pb::Counts {
            sandboxes: count(at.count::<Sandbox>()),
            ready_sandboxes: count(
                at.all::<Sandbox>()
                    .filter(|sandbox| sandbox.is_ready())
                    .count(),
            ),
            containers: count(at.count::<Container>()),
            running_containers: count(
                at.all::<Container>()
                    .filter(|container| container.is_running())
                    .count(),
            ),
            images: count(at.count::<Image>()),
            layers: count(at.count::<Layer>()),
            networks: count(at.count::<Network>()),
            operations: count(
                self.agent.operations.list().len() + self.agent.images.running_pulls().len(),
            ),
        }
    }

    async fn by_container(&self) -> Result<Vec<pb::ContainerUsage>, Status> {
        let mut usages = Vec::new();
        for container in self.agent.store.snapshot().all::<Container>() {
            let (rootfs, id) = (self.agent.rootfs.clone(), container.id.clone());
            let usage =
                blocking::run_bulk("measure writable layer", move || rootfs.writable_usage(&id))
                    .await;
            match usage {
                Ok(usage) => usages.push(pb::ContainerUsage {
                    container_id: container.id.to_string(),
                    used_bytes: usage.bytes,
                    used_inodes: usage.inodes,
                }),
                // It may have been removed since.
                Err(error)
                    if self
                        .agent
                        .store
                        .snapshot()
                        .get::<Container>(container.id.as_str())
                        .is_some() =>
                {
                    return Err(refused(error));
                }
                Err(_) => {}
            }
        }
        Ok(usages)
    }
}

/// Capacity and available bytes of the file system at `path`; nothing if it can't be asked.
pub(super) async fn filesystem_size(path: &Path) -> (u64, u64) {
    let path = path.to_owned();
    blocking::run("statvfs", move || {
        rustix::fs::statvfs(&path).map_or((0, 0), |stat| {
            (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)
        })
    })
    .await
}

/// `PRETTY_NAME` of os-release(5).
fn os_name(text: &str) -> Option<String> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim().trim_matches(['"', '\'']).to_owned())
}

/// `MemTotal` of proc_meminfo(5), in bytes.
fn memory_total(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib << 10)
}

#[tonic::async_trait]
impl NodeService for Native {
    type FsckStream = Streamed<pb::FsckResponse>;

    async fn info(
        &self,
        _: Request<pb::InfoRequest>,
    ) -> Result<Response<pb::InfoResponse>, Status> {
        let agent = &self.agent;
        let (boot_id, os, memory) = blocking::run("read host facts", || {
            (
                clock::boot_id().unwrap_or_default(),
                fs::read_to_string("/etc/os-release").unwrap_or_default(),
                fs::read_to_string("/proc/meminfo").unwrap_or_default(),
            )
        })
        .await;
        let uname = rustix::system::uname();
        Ok(Response::new(pb::InfoResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            instance_id: agent.instance.to_string(),
            boot_id,
            hostname: uname.nodename().to_string_lossy().into_owned(),
            kernel_release: uname.release().to_string_lossy().into_owned(),
            os_name: os_name(&os).unwrap_or_else(|| "Linux".into()),
            architecture: Platform::host().architecture,
            cpus: std::thread::available_parallelism()
                .map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
            memory_bytes: memory_total(&memory).unwrap_or(0),
            cgroup_version: match agent.cgroups.version() {
                CgroupVersion::V1 => pb::CgroupVersion::V1,
                CgroupVersion::V2 => pb::CgroupVersion::V2,
            }
            .into(),
            handlers: agent
                .lifecycle
                .handlers()
                .await
                .into_iter()
                .map(|(name, features)| pb::Handler {
                    default: name == NATIVE_HANDLER,
                    name,
                    recursive_read_only_mounts: features.recursive_readonly,
                    user_namespaces: features.user_namespaces,
                })
                .collect(),
            data_dir: agent.config.data_dir.to_string_lossy().into_owned(),
            run_dir: agent.config.run_dir.to_string_lossy().into_owned(),
            started_at: Some(render::timestamp(self.started_at)),
            counts: Some(self.counts()),
        }))
    }

    async fn check(
        &self,
        _: Request<pb::CheckRequest>,
    ) -> Result<Response<pb::CheckResponse>, Status> {
        let findings = check::run(&self.agent.config).await;
        Ok(Response::new(pb::CheckResponse {
            findings: findings.into_iter().map(render::finding).collect(),
        }))
    }

    async fn usage(
        &self,
        request: Request<pb::UsageRequest>,
    ) -> Result<Response<pb::UsageResponse>, Status> {
        let images = self.agent.images.fs_usage(&self.agent.store.snapshot());
        let whole = filesystem_size(&images.path).await;
        let measured = request.into_inner().containers;
        let by_container = if measured {
            self.by_container().await?
        } else {
            Vec::new()
        };
        let now = Time::now();
        let total = |of: fn(&pb::ContainerUsage) -> u64| by_container.iter().map(of).sum();
        let (bytes, inodes) = (
            total(|usage| usage.used_bytes),
            total(|usage| usage.used_inodes),
        );
        let containers =
            measured.then(|| render::filesystem(now, &images.path, bytes, inodes, whole));
        Ok(Response::new(pb::UsageResponse {
            images: Some(render::filesystem(
                now,
                &images.path,
                images.used_bytes,
                images.inodes,
                whole,
            )),
            containers,
            by_container,
        }))
    }

    async fn fsck(
        &self,
        request: Request<pb::FsckRequest>,
    ) -> Result<Response<Self::FsckStream>, Status> {
        let request = request.into_inner();
        // A repeated repair finds nothing left to repair: the key needs no memory.
        idempotency::check_key(&request.idempotency_key).map_err(refused)?;
        let differences = fsck::run(&self.agent, request.repair).await;
        let messages = differences.into_iter().map(|difference| {
            Ok(pb::FsckResponse {
                difference: Some(render::difference(difference)),
            })
        });
        Ok(Response::new(Box::pin(stream::iter(messages))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_facts_are_read() {
        let os = "NAME=\"Debian\"\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n";
        assert_eq!(os_name(os).as_deref(), Some("Debian GNU/Linux 13 (trixie)"));
        assert_eq!(os_name("PRETTY_NAME=Alpine\n").as_deref(), Some("Alpine"));
        assert_eq!(os_name(""), None);
        assert_eq!(
            memory_total("MemTotal:       16 kB\nMemFree: 1 kB\n"),
            Some(16 << 10)
        );
        assert_eq!(memory_total("nothing"), None);
    }
}
