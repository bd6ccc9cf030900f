//! CreateSystem: a name, ids, and a writable layer above an image; nothing runs yet.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    super::{
        Lifecycle, LifecycleError, container::Container, create_container::layers, sandbox::IdMap,
    },
    System, SystemConfig, SystemError,
    ids::Granted,
};
use crate::{
    blocking,
    clock::Time,
    event::{EventDraft, EventKind},
    id::{ContainerId, Face, ImageId},
    operation::{Context, OnRestart, Operation, OperationKey, Subject},
    rootfs::Layer,
    store::{Changes, Snapshot},
};

/// Where images have their init, in the order in which it is looked for.
const INITS: [&str; 5] = [
    "/sbin/init",
    "/usr/lib/systemd/systemd",
    "/lib/systemd/systemd",
    "/bin/init",
    "/init",
];

impl Lifecycle {
    /// Makes a system container; an equal request with its key is answered with the same.
    ///
    /// # Errors
    /// `ImageMissing`, `NameTaken`, `UserNamespaces`, `System` before any side effect; everything
    /// else with all undone.
    pub async fn create_system(
        self: &Arc<Self>,
        config: SystemConfig,
    ) -> Result<Arc<System>, LifecycleError> {
        if !["", super::super::NATIVE_HANDLER].contains(&config.handler.as_str()) {
            let handler = config.handler;
            return Err(SystemError::Handler { handler }.into());
        }
        if let Err(source) = self.id_maps.clone() {
            let handler = super::super::NATIVE_HANDLER.to_owned();
            return Err(LifecycleError::UserNamespaces { handler, source });
        }
        let at = self.store.snapshot();
        let image =
            self.images
                .find(&at, &config.image)?
                .ok_or_else(|| LifecycleError::ImageMissing {
                    reference: config.image.clone(),
                })?;
        let layers = layers(&at, &image)?;
        let (init, granted) = self.plan_system(&config, &layers).await?;
        let create = CreateSystem {
            id: ContainerId::random(),
            config,
            image_id: image.id.clone(),
            layers,
            init,
            granted,
            chosen: None,
        };
        let id = self.operations.run(create, Arc::clone(self)).await?;
        self.system(id.as_str())
    }

    async fn plan_system(
        &self,
        config: &SystemConfig,
        layers: &[Layer],
    ) -> Result<(Vec<String>, Granted), LifecycleError> {
        let (rootfs, layers, config) = (self.rootfs.clone(), layers.to_vec(), config.clone());
        blocking::run("plan system container", move || {
            let granted = Granted::read()?;
            let candidates: Vec<String> = match config.init.first() {
                Some(wished) => vec![wished.clone()],
                None => INITS.map(str::to_owned).to_vec(),
            };
            for candidate in &candidates {
                if rootfs.is_program(&layers, candidate)? {
                    let mut init = config.init;
                    if init.is_empty() {
                        init.push(candidate.clone());
                    }
                    return Ok((init, granted));
                }
            }
            let image = config.image;
            Err(SystemError::NoInit { image, candidates }.into())
        })
        .await
    }
}

/// The operation.
#[derive(Clone, Serialize, Deserialize)]
pub(in super::super) struct CreateSystem {
    id: ContainerId,
    config: SystemConfig,
    image_id: ImageId,
    layers: Vec<Layer>,
    init: Vec<String>,
    granted: Granted,
    /// Ids, and whether others may have the same.
    chosen: Option<(IdMap, bool)>,
}

#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Step {
    Root,
}

impl CreateSystem {
    fn chosen(&self) -> (IdMap, bool) {
        self.chosen.expect("steps follow the intent, which chooses")
    }
}

impl Operation for CreateSystem {
    const NAME: &'static str = "create_system";
    const ON_RESTART: OnRestart = OnRestart::Unwind;
    type Step = Step;
    const STEPS: &'static [&'static [Step]] = &[&[Step::Root]];
    type Domain = Lifecycle;
    type Fact = ();
    type Output = ContainerId;
    type Error = LifecycleError;

    fn key(&self) -> OperationKey {
        OperationKey(serde_json::to_string(&self.config).expect("configurations have string keys"))
    }

    /// The name, not the new id: a retry of the same wish has another id.
    fn subject(&self) -> Subject {
        Subject(System::name_claim(&self.config.name))
    }

    fn standing(&self, at: &Snapshot) -> Option<ContainerId> {
        let system = super::find(at, &self.config.name)?;
        (!self.config.idempotency_key.is_empty() && system.config == self.config)
            .then(|| system.id.clone())
    }

    fn intent(&mut self, at: &Snapshot, _: &Lifecycle) -> Result<Changes, LifecycleError> {
        let name = System::name_claim(&self.config.name);
        if let Some(holder) = at.claim(&name) {
            let name = format!("{:?} of a system container", self.config.name);
            return Err(LifecycleError::NameTaken { name, holder });
        }
        // The image may have gone since it was looked up.
        if let Some(gone) = self
            .layers
            .iter()
            .find(|layer| at.get::<Layer>(layer.diff_id.as_str()).is_none())
        {
            return Err(LifecycleError::ImageMissing {
                reference: format!("{} (layer {})", self.image_id, gone.diff_id),
            });
        }
        let (ids, shared, changes) = self.granted.choose(at, &self.id)?;
        self.chosen = Some((ids, shared));
        let holder = System::holder(&self.id);
        let changes = changes.claim(name, &holder);
        let mut seen = std::collections::BTreeSet::new();
        let layers = self
            .layers
            .iter()
            .filter(|layer| seen.insert(&layer.diff_id));
        let changes = layers.fold(changes, |changes, layer| {
            changes.claim(Container::layer_claim(layer, &self.id), &holder)
        });
        Ok(changes.durable())
    }

    async fn apply(
        &self,
        Step::Root: Step,
        on: &Arc<Lifecycle>,
        _: &Context,
    ) -> Result<Option<()>, LifecycleError> {
        let (rootfs, id) = (on.rootfs.clone(), self.id.clone());
        let (ids, _) = self.chosen();
        blocking::run("create writable layer", move || {
            rootfs.create_writable(&id, (ids.host_uid, ids.host_gid))
        })
        .await?;
        Ok(None)
    }

    async fn undo(&self, Step::Root: Step, on: &Arc<Lifecycle>) -> Result<(), LifecycleError> {
        on.remove_system_files(&self.id).await
    }

    fn outcome(&self, _: Vec<()>, _: &Snapshot) -> (Changes, ContainerId) {
        let (ids, shares_ids) = self.chosen();
        let system = System {
            id: self.id.clone(),
            config: self.config.clone(),
            image_id: self.image_id.clone(),
            layers: self.layers.clone(),
            init: self.init.clone(),
            ids,
            shares_ids,
            created_at: Time::now(),
            addresses: Vec::new(),
            starts: 0,
            last_exit: None,
        };
        let event = system.event(EventKind::SystemCreated);
        let changes = Changes::new().put(system).event(event).durable();
        (changes, self.id.clone())
    }

    fn unwound(&self, _: Option<&LifecycleError>, _: &Snapshot) -> Changes {
        Changes::new().release_holder(System::holder(&self.id))
    }
}

impl System {
    /// An event about it.
    pub(super) fn event(&self, kind: EventKind) -> EventDraft {
        EventDraft::new(kind, Face::Native)
            .attribute("name", &self.config.name)
            .attribute("system_id", self.id.as_str())
    }
}
