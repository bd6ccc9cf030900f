//! CreateContainer: a cgroup, a writable layer and a process that waits for its start.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    Lifecycle, LifecycleError,
    container::{Container, ContainerConfig, ContainerState, LogWish, User},
    files,
    sandbox::{PidMode, Sandbox},
    spec::{self, SpecInput},
    volumes::Volumes,
};
use crate::{
    blocking,
    cgroup::CgroupPath,
    clock::Time,
    event::{EventDraft, EventKind},
    handler::Handler as _,
    handler::{CreateRequest, LogInput, RootInput},
    id::{ContainerId, ImageId, SandboxId},
    image::Image,
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    rootfs::Layer,
    store::{Changes, Snapshot},
};

/// Longest `/etc/passwd` or `/etc/group` of an image that is read.
const USER_FILE_BYTES: usize = 1 << 20;

impl Lifecycle {
    /// Makes a container in a ready sandbox; it does not run yet.
    ///
    /// # Errors
    /// `NotFound`, `State`, `ImageMissing`, `ImageVolume`, `NameTaken`, `Spec` before any side
    /// effect; everything else with all undone.
    pub async fn create_container(
        self: &Arc<Self>,
        sandbox_id: &str,
        mut config: ContainerConfig,
    ) -> Result<ContainerId, LifecycleError> {
        let at = self.store.snapshot();
        let sandbox = self.find_sandbox(&at, config.face, sandbox_id)?;
        ready(&sandbox)?;
        let image =
            self.images
                .find(&at, &config.image)?
                .ok_or_else(|| LifecycleError::ImageMissing {
                    reference: config.image.clone(),
                })?;
        let id = ContainerId::random();
        if config.name.is_empty() {
            config.name = id.as_str()[..12].to_owned();
        }
        if let Some(PidMode::Target(target)) = &config.pid {
            let target = self.find_container(&at, config.face, target.as_str())?;
            config.pid = Some(PidMode::Target(target.id.clone()));
        }
        let layers = layers(&at, &image)?;
        let volumes = match config.system {
            // An init mounts what it wants by itself.
            Some(_) => Volumes::default(),
            None => self.plan_volumes(&at, &config, &image)?,
        };
        let built = self
            .build_spec(&sandbox, &config, &id, &image, &layers, &volumes)
            .await?;
        let create = CreateContainer {
            id,
            sandbox_id: sandbox.id.clone(),
            image_id: image.id.clone(),
            layers,
            volumes,
            cgroup: CgroupPath::clone(&sandbox.cgroup),
            owner: sandbox
                .config
                .id_map
                .map_or((0, 0), |ids| (ids.host_uid, ids.host_gid)),
            user: built.user,
            stop_signal: built.stop_signal,
            pid: built.pid,
            spec: built.spec,
            config,
        }
        .below(&sandbox);
        Ok(self.operations.run(create, Arc::clone(self)).await?)
    }

    async fn build_spec(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
        id: &ContainerId,
        image: &Image,
        layers: &[Layer],
        volumes: &Volumes,
    ) -> Result<spec::Built, LifecycleError> {
        let rootfs = self.rootfs.clone();
        let sandbox_dir = self.sandbox_dir(&sandbox.id);
        let cgroup_version = self.cgroups.version();
        let (sandbox, config, id) = (sandbox.clone(), config.clone(), id.clone());
        let (image, layers) = (image.clone(), layers.to_vec());
        let volumes = volumes.clone();
        let cdi_dirs = self.config.cdi_spec_dirs.clone();
        blocking::run("plan container", move || {
            let passwd = rootfs.read_file(&layers, "etc/passwd", USER_FILE_BYTES)?;
            let group = rootfs.read_file(&layers, "etc/group", USER_FILE_BYTES)?;
            // Before what may make directories of the host.
            let images = volumes.directories(&rootfs, &config)?;
            let cdi =
                spec::resolve_cdi(&config.cdi_devices, &cdi_dirs).map_err(spec::SpecError::from)?;
            let mut host = spec::gather(&config, &sandbox.config, &sandbox_dir)?;
            (host.images, host.cdi) = (images, cdi);
            host.volumes = volumes.own(&rootfs, &id);
            let input = SpecInput {
                sandbox_id: &sandbox.id,
                sandbox: &sandbox.config,
                hostname: &sandbox.config.hostname,
                sandbox_dir: &sandbox_dir,
                container_id: &id,
                config: &config,
                image: &image.config,
                passwd: passwd.as_deref(),
                group: group.as_deref(),
                host: &host,
                cgroup: &sandbox.cgroup.child(&id),
                cgroup_version,
            };
            Ok(spec::build(&input)?)
        })
        .await
    }
}

/// Refuses a sandbox that is not ready.
pub(super) fn ready(sandbox: &Sandbox) -> Result<(), LifecycleError> {
    if sandbox.is_ready() {
        return Ok(());
    }
    Err(LifecycleError::State {
        kind: "sandbox",
        id: sandbox.id.to_string(),
        state: "SANDBOX_NOTREADY",
        wanted: "SANDBOX_READY",
    })
}

pub(super) fn layers(at: &Snapshot, image: &Image) -> Result<Vec<Layer>, LifecycleError> {
    image
        .layers
        .iter()
        .map(|diff_id| {
            at.get::<Layer>(diff_id.as_str())
                .map(|layer| Layer::clone(&layer))
                .ok_or_else(|| LifecycleError::ImageMissing {
                    reference: format!("{} (layer {diff_id})", image.id),
                })
        })
        .collect()
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct CreateContainer {
    id: ContainerId,
    sandbox_id: SandboxId,
    config: ContainerConfig,
    image_id: ImageId,
    layers: Vec<Layer>,
    #[serde(default)]
    volumes: Volumes,
    cgroup: CgroupPath,
    /// Of the root directory, on the host.
    #[serde(default)]
    owner: (u32, u32),
    user: User,
    stop_signal: i32,
    pid: PidMode,
    spec: oci_spec::runtime::Spec,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Cgroup,
    Root,
    Create,
}

impl CreateContainer {
    fn below(mut self, sandbox: &Sandbox) -> Self {
        self.cgroup = sandbox.cgroup.child(&self.id);
        self
    }

    async fn create_cgroup(&self, on: &Lifecycle) -> Result<(), LifecycleError> {
        let (cgroups, path) = (Arc::clone(&on.cgroups), self.cgroup.clone());
        let resources = self
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().clone());
        let delegated_to = self.config.system.as_ref().map(|_| self.owner);
        Ok(blocking::run("create cgroup", move || {
            cgroups.create(&path, resources.as_ref())?;
            delegated_to.map_or(Ok(()), |owner| cgroups.delegate(&path, owner))
        })
        .await?)
    }

    async fn create_root(&self, on: &Lifecycle) -> Result<(), LifecycleError> {
        let (rootfs, id) = (on.rootfs.clone(), self.id.clone());
        let mount_point = on.mount_point(&self.sandbox_id, &self.id);
        let owner = self.config.system.is_none().then_some(self.owner);
        blocking::run("create writable layer", move || {
            if let Some(owner) = owner {
                rootfs.create_writable(&id, owner)?;
            }
            files::make_dir(&mount_point, 0o711)
        })
        .await?;
        let (rootfs, id) = (on.rootfs.clone(), self.id.clone());
        let (layers, volumes) = (self.layers.clone(), self.volumes.clone());
        volumes.fill(rootfs, id, layers).await
    }

    /// All layers that must stay while the container does, each once.
    fn held_layers(&self) -> impl Iterator<Item = &Layer> {
        let mut seen = BTreeSet::new();
        self.layers
            .iter()
            .chain(self.volumes.layers())
            .filter(move |layer| seen.insert(&layer.diff_id))
    }

    async fn create_process(&self, on: &Lifecycle) -> Result<i32, LifecycleError> {
        let log = match self.config.log.clone() {
            Some(wish) => Some(blocking::run("open log", move || open_log(&wish)).await?),
            None => None,
        };
        let run = self.config.system.as_ref();
        let root = on
            .rootfs
            .plan(run.map_or(&self.id, |run| &run.system), &self.layers);
        let (system, cgroup) = match run {
            None => (None, self.cgroup.clone()),
            Some(run) => {
                let input = on.system_input(&self.sandbox_id, run).await?;
                (Some(input), self.cgroup.payload())
            }
        };
        let request = CreateRequest {
            handler: on.handler_of(&self.sandbox_id)?,
            sandbox_id: self.sandbox_id.clone(),
            container_id: self.id.clone(),
            spec: self.spec.clone(),
            root: RootInput {
                mount_point: on.mount_point(&self.sandbox_id, &self.id),
                layers_dir: root.layers_dir,
                lower: root.lower,
                upper: root.upper,
                work: root.work,
                durable: system.is_some(),
            },
            env: spec_env(&self.spec),
            cgroup,
            pid: engine_pid(&self.pid),
            log,
            stdin: self.config.stdin,
            stdin_once: self.config.stdin_once,
            system,
        };
        Ok(on.handler.create(request).await?)
    }
}

/// The environment as octets.
fn spec_env(spec: &oci_spec::runtime::Spec) -> Option<Vec<Vec<u8>>> {
    spec.process().as_ref().and_then(spec::env_bytes)
}

fn engine_pid(pid: &PidMode) -> crate::handler::PidMode {
    match pid {
        PidMode::Container => crate::handler::PidMode::New,
        PidMode::Pod => crate::handler::PidMode::Pod,
        PidMode::Host => crate::handler::PidMode::Host,
        PidMode::Target(id) => crate::handler::PidMode::Container(id.clone()),
    }
}

/// Opens the log for appending; nothing but a file may be there.
pub(super) fn open_log(wish: &LogWish) -> Result<LogInput, LifecycleError> {
    if let Some(dir) = wish.path.parent() {
        files::make_dir(dir, 0o755)?;
    }
    Ok(LogInput {
        file: open_log_file(&wish.path)?,
        path: wish.path.clone(),
        rotate_bytes: wish.rotate_bytes,
        keep: wish.keep_files,
    })
}

/// A symbolic link or a device in the place of the log is refused: whoever can write to the log
/// directory must not make us write elsewhere.
pub(super) fn open_log_file(path: &Path) -> Result<File, LifecycleError> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(LifecycleError::file("open log", path))?;
    let metadata = file
        .metadata()
        .map_err(LifecycleError::file("open log", path))?;
    if !metadata.is_file() || metadata.permissions().mode() == 0 {
        let refusal = std::io::Error::from(std::io::ErrorKind::InvalidInput);
        return Err(LifecycleError::file("open log (not a regular file)", path)(
            refusal,
        ));
    }
    Ok(file)
}

impl Operation for CreateContainer {
    const NAME: &'static str = "create_container";
    const ON_RESTART: OnRestart = OnRestart::Unwind;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[&[Step::Cgroup, Step::Root], &[Step::Create]];
    type Domain = Lifecycle;
    type Fact = i32;
    type Output = ContainerId;
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        // The request itself is left out: equal ones need not be encoded equally.
        let mut config = self.config.clone();
        config.request = serde_json::Value::Null;
        let config = serde_json::to_string(&config).expect("configurations have string keys");
        OperationKey(format!("{}/{config}", self.sandbox_id))
    }

    fn subject(&self) -> Subject {
        // The name, not the new id: a retry of the same wish has another id.
        Subject(Container::name_claim(
            &self.sandbox_id,
            &self.config.name,
            self.config.attempt,
        ))
    }

    fn standing(&self, at: &Snapshot) -> Option<ContainerId> {
        let holder = at.claim(&self.subject().0)?;
        let container = at.get::<Container>(holder.strip_prefix("container/")?)?;
        let mut wish = self.config.clone();
        wish.request.clone_from(&container.config.request);
        (wish.repeatable()
            && matches!(container.state, ContainerState::Created { .. })
            && container.image_id == self.image_id
            && container.config == wish)
            .then(|| container.id.clone())
    }

    fn intent(&mut self, at: &Snapshot, _: &Lifecycle) -> Result<Changes, LifecycleError> {
        let sandbox = at.get::<Sandbox>(self.sandbox_id.as_str()).ok_or_else(|| {
            LifecycleError::NotFound {
                kind: "sandbox",
                id: self.sandbox_id.to_string(),
            }
        })?;
        ready(&sandbox)?;
        let name = Container::name_claim(&self.sandbox_id, &self.config.name, self.config.attempt);
        if let Some(holder) = at.claim(&name) {
            return Err(LifecycleError::NameTaken { name, holder });
        }
        // The image may have gone since it was looked up.
        if let Some(gone) = self
            .held_layers()
            .find(|layer| at.get::<Layer>(layer.diff_id.as_str()).is_none())
        {
            return Err(LifecycleError::ImageMissing {
                reference: format!("{} (layer {})", self.image_id, gone.diff_id),
            });
        }
        let holder = Container::holder(&self.id);
        let changes = Changes::new().claim(name, &holder);
        Ok(self.held_layers().fold(changes, |changes, layer| {
            changes.claim(Container::layer_claim(layer, &self.id), &holder)
        }))
    }

    async fn apply(
        &self,
        step: Step,
        on: &Arc<Lifecycle>,
        _: &Context,
    ) -> Result<Option<i32>, LifecycleError> {
        match step {
            Step::Cgroup => self.create_cgroup(on).await.map(|()| None),
            Step::Root => self.create_root(on).await.map(|()| None),
            Step::Create => self.create_process(on).await.map(Some),
        }
    }

    async fn undo(&self, step: Step, on: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        match step {
            Step::Create => on.delete_process(&self.sandbox_id, &self.id).await,
            Step::Root => on.remove_root(&self.sandbox_id, &self.id).await,
            Step::Cgroup => on.remove_cgroup(&self.cgroup).await,
        }
    }

    fn outcome(&self, facts: Vec<i32>, _: &Snapshot) -> (Changes, ContainerId) {
        let pid = facts.first().copied().unwrap_or_default();
        let container = Container {
            id: self.id.clone(),
            sandbox_id: self.sandbox_id.clone(),
            config: self.config.clone(),
            image_id: self.image_id.clone(),
            layers: self.layers.clone(),
            mounted_images: self.volumes.mounted_images(),
            created_at: Time::now(),
            cgroup: self.cgroup.clone(),
            user: self.user.clone(),
            stop_signal: self.stop_signal,
            spec: self.spec.clone(),
            state: ContainerState::Created { pid },
        };
        let event = EventDraft::new(EventKind::ContainerCreated, self.config.face)
            .sandbox(&self.sandbox_id)
            .container(&self.id);
        (Changes::new().put(container).event(event), self.id.clone())
    }

    fn unwound(&self, _: Option<&LifecycleError>, _: &Snapshot) -> Changes {
        Changes::new().release_holder(Container::holder(&self.id))
    }
}
