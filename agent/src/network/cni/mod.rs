//! Networks of CNI: a list of plugins, executed by the specification.
//!
//! ```text
//!  conf.rs (folder -> list)  arguments.rs (pod -> args, capabilities)
//!        \                      /
//!         Plan, committed with the intent as an Attachment record
//!                   |
//!  plugin.rs (one run)  ->  result.rs (hostile answers)  ->  the record's result
//! ```
//!
//! The record is what DEL needs: the list and the arguments as they were, and the result of the
//! last plugin that answered. It is written before the first plugin runs and after each, and goes
//! once every plugin's DEL has succeeded; so neither a changed folder, nor a killed agent, nor a
//! reboot makes us forget what plugins made.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::Mutex as AsyncMutex;

mod arguments;
mod conf;
mod error;
mod plugin;
mod result;

pub use self::{
    arguments::{IPS_ANNOTATION, MAC_ANNOTATION, PodFacts},
    conf::{Chosen, ConfList, Found, Verb, Version},
    error::CniError,
};
use self::{plugin::Run, result::Answer};
use super::{bridge::Attachment, error::NetworkError, netlink::INSIDE, plan::SandboxNetwork};
use crate::{
    blocking,
    id::SandboxId,
    operation::Context,
    store::{Changes, Record, Snapshot, Store},
};

/// How long plugins may take to say whether they can serve.
const STATUS_LIMIT: Duration = Duration::from_secs(5);
/// How long DEL of a plugin may take while the agent starts.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long plugins of an agent that died have to end by themselves.
const STRAY_GRACE: Duration = Duration::from_secs(5);
/// How long such an answer is believed.
const STATUS_AGE: Duration = Duration::from_secs(5);

/// `[network.cni]` in the configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CniConfig {
    /// Where network configurations are. The first valid file by name is the network; a change is
    /// noticed without a restart.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// How long one plugin may take before it is killed.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub timeout: Duration,
    /// Tell plugins (from version 1.1 on) at the start of the agent which attachments exist, so
    /// that they drop all others of the network. Only for a host where no other runtime and no
    /// other agent uses the same network.
    pub gc: bool,
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            timeout: Duration::from_secs(60),
            gc: false,
        }
    }
}

impl CniConfig {
    /// Refuses what can't work.
    pub(super) fn validate(&self) -> Result<(), NetworkError> {
        let refuse = |key, reason: &str| {
            let reason = reason.to_owned();
            Err(NetworkError::Config { key, reason })
        };
        if !self.conf_dir.is_absolute() {
            return refuse("network.cni.conf_dir", "must be an absolute path");
        }
        let usable = |dir: &Path| dir.is_absolute() && !dir.to_string_lossy().contains(':');
        if self.bin_dirs.is_empty() || !self.bin_dirs.iter().all(|dir| usable(dir)) {
            return refuse(
                "network.cni.bin_dirs",
                "must be absolute paths without ':', at least one",
            );
        }
        if self.timeout < Duration::from_secs(1) {
            return refuse("network.cni.timeout", "must be at least 1s");
        }
        Ok(())
    }
}

/// All that attaching and detaching a pod needs, as it was when the pod was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The list.
    pub list: ConfList,
    /// `CNI_ARGS`.
    pub args: String,
    /// Arguments by capability.
    pub capabilities: Map<String, Value>,
    /// Where the pod's network namespace is bound.
    pub netns: PathBuf,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// No plugin has run.
    Planned,
    /// Plugins run, or ran and something failed.
    Adding,
    /// Every plugin has answered.
    Attached,
    /// DEL has begun.
    Removing,
}

/// What plugins made, or may have made, for a sandbox: the result cache of the specification.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cached {
    /// Whose.
    pub sandbox: SandboxId,
    /// By what.
    pub plan: Arc<Plan>,
    /// How far.
    pub progress: Progress,
    /// What the last plugin that answered ADD said.
    pub result: Option<Value>,
}

impl Record for Cached {
    const TABLE: &'static str = "cni_attachment";

    fn id(&self) -> String {
        self.sandbox.to_string()
    }
}

impl Cached {
    pub(super) fn planned(sandbox: &SandboxId, plan: &Arc<Plan>) -> Self {
        Self {
            sandbox: sandbox.clone(),
            plan: Arc::clone(plan),
            progress: Progress::Planned,
            result: None,
        }
    }

    /// The end of an intent whose plugins have not run: no DEL will drop the record.
    pub fn forget_planned(at: &Snapshot, sandbox: &SandboxId, changes: Changes) -> Changes {
        match at.get::<Self>(sandbox.as_str()) {
            Some(cached) if cached.progress == Progress::Planned => {
                changes.delete::<Self>(sandbox.as_str())
            }
            _ => changes,
        }
    }

    /// The part of a plugin's environment that names the attachment.
    fn environment(&self, netns: &Path) -> [(&'static str, String); 4] {
        [
            ("CNI_CONTAINERID", self.sandbox.to_string()),
            ("CNI_NETNS", netns.to_string_lossy().into_owned()),
            ("CNI_IFNAME", INSIDE.to_owned()),
            ("CNI_ARGS", self.plan.args.clone()),
        ]
    }
}

/// Networks of CNI, and the attachments to them.
pub(super) struct Cni {
    config: CniConfig,
    store: Store,
    found: Mutex<Found>,
    /// One at a time for each sandbox, as the specification wants it; true once this agent has run
    /// plugins for it.
    busy: Mutex<HashMap<SandboxId, Arc<AsyncMutex<bool>>>>,
    health: AsyncMutex<Option<Health>>,
    /// Nothing is served before what an agent before us left is undone.
    starting: AtomicBool,
}

/// An answer to STATUS that is still believed.
struct Health {
    asked: Instant,
    of: Arc<Chosen>,
    answer: Result<(), String>,
}

impl Cni {
    pub(super) fn new(config: CniConfig, store: Store) -> Self {
        Self {
            config,
            store,
            found: Mutex::default(),
            busy: Mutex::default(),
            health: AsyncMutex::default(),
            starting: AtomicBool::new(true),
        }
    }

    /// From now on DEL may take as long as everything else.
    pub(super) fn started(&self) {
        self.starting.store(false, Ordering::Relaxed);
    }

    /// Reads the folder again.
    pub(super) async fn refresh(&self) -> Found {
        let folder = self.config.conf_dir.clone();
        let read = blocking::run("read CNI configuration", move || conf::read(&folder)).await;
        let now = read.unwrap_or_else(|error| Found {
            chosen: None,
            refused: vec![(self.config.conf_dir.clone(), error.to_string())],
        });
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.chosen != now.chosen {
            let file = now
                .chosen
                .as_ref()
                .map(|chosen| chosen.file.display().to_string());
            tracing::info!(file, "CNI configuration changed");
        }
        if found.refused != now.refused {
            for (file, reason) in &now.refused {
                tracing::warn!(file = %file.display(), reason, "CNI configuration can't be used");
            }
        }
        found.clone_from(&now);
        now
    }

    /// The folder as it was last read.
    pub(super) fn found(&self) -> Found {
        self.found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// There is no valid configuration.
    pub(super) fn missing(&self, found: &Found) -> CniError {
        CniError::NoConf {
            folder: self.config.conf_dir.clone(),
            refused: found.refusals(),
        }
    }

    /// Decides what plugins are told; pure.
    pub(super) fn plan(
        chosen: &Chosen,
        sandbox: &SandboxId,
        wish: &SandboxNetwork,
        pod: &PodFacts,
    ) -> Result<Plan, CniError> {
        Ok(Plan {
            list: chosen.list.clone(),
            args: arguments::cni_args(sandbox, pod)?,
            capabilities: arguments::capabilities(wish, pod)?,
            netns: pod.netns.clone(),
        })
    }

    /// Programs of a list that no folder has.
    pub(super) fn missing_programs<'a>(&self, list: &'a ConfList) -> Vec<&'a str> {
        let mut missing: Vec<_> = list
            .programs()
            .filter(|program| plugin::find(program, &self.config.bin_dirs).is_none())
            .collect();
        missing.dedup();
        missing
    }

    /// ADD of every plugin, in order; what answered is in the store before the next one runs.
    pub(super) async fn add(
        &self,
        sandbox: &SandboxId,
        plan: &Arc<Plan>,
        context: Option<&Context>,
    ) -> Result<Attachment, NetworkError> {
        let turn = self.turn(sandbox);
        let mut ran = turn.lock().await;
        // Before the first: of a list that is not all there nothing is run.
        if let Some(program) = self.missing_programs(&plan.list).first() {
            return Err(self.plugin_missing(program, &plan.list).into());
        }
        let mut cached = Cached::planned(sandbox, plan);
        cached.progress = Progress::Adding;
        self.commit(&cached).await?;
        *ran = true;
        let mut last = None;
        for index in 0..plan.list.plugins.len() {
            let answer = self.add_one(&cached, index, context).await?;
            cached.result = Some(answer.raw.clone());
            if index + 1 == plan.list.plugins.len() {
                cached.progress = Progress::Attached;
            }
            self.commit(&cached).await?;
            last = Some(answer);
        }
        let answer = last.expect("a list has plugins");
        Ok(attachment(answer))
    }

    async fn add_one(
        &self,
        cached: &Cached,
        index: usize,
        context: Option<&Context>,
    ) -> Result<Answer, CniError> {
        let list = &cached.plan.list;
        let plugin = conf::type_of(&list.plugins[index]);
        if let Some(context) = context {
            context.stage(stage(Verb::Add, plugin, list));
        }
        let input = list.execution(index, &cached.plan.capabilities, cached.result.as_ref());
        let environment = cached.environment(&cached.plan.netns);
        let run = Run {
            cancelled: context.map(|context| &context.cancelled),
            ..self.run(Verb::Add, plugin, list, &environment, input)
        };
        let output = run.run().await?;
        result::parse(&output, list.version, INSIDE).map_err(|reason| CniError::Answer {
            plugin: plugin.to_owned(),
            network: list.name.clone(),
            verb: Verb::Add,
            reason: result::shorten(&reason),
        })
    }

    /// DEL of every plugin, in reverse, past failures; then the record goes. Repeatable, and fine
    /// if there is none.
    ///
    /// # Errors
    /// The first one; the record stays, and so the next call tries again.
    pub(super) async fn del(
        &self,
        sandbox: &SandboxId,
        context: Option<&Context>,
    ) -> Result<(), NetworkError> {
        let turn = self.turn(sandbox);
        let mut ran = turn.lock().await;
        let Some(cached) = self.cached(sandbox) else {
            self.forget_turn(sandbox);
            return Ok(());
        };
        if cached.progress != Progress::Planned {
            let grace = match *ran {
                true => Duration::ZERO,
                false => STRAY_GRACE,
            };
            self.end_strays(&cached, grace).await?;
            *ran = true;
            self.del_all(&cached, context).await?;
        }
        self.store
            .commit(Changes::new().delete::<Cached>(sandbox.as_str()))
            .await?;
        self.forget_turn(sandbox);
        Ok(())
    }

    /// A plugin that an agent before this one, or an earlier try, has started must not work on
    /// while it is undone. One that has ended well left none.
    ///
    /// Those of an agent before this one get a moment to end by themselves: cut off in the middle
    /// of a DEL, common plugins leave rules that no later DEL finds.
    async fn end_strays(&self, cached: &Cached, grace: Duration) -> Result<(), NetworkError> {
        if cached.progress != Progress::Attached {
            let sandbox = cached.sandbox.clone();
            let ended = blocking::run("end CNI plugins", move || {
                plugin::end_strays(&sandbox, grace)
            })
            .await;
            return ended.map_err(|source| NetworkError::kernel("kill", "CNI plugins", source));
        }
        self.commit(&Cached {
            progress: Progress::Removing,
            ..cached.clone()
        })
        .await
    }

    async fn del_all(&self, cached: &Cached, context: Option<&Context>) -> Result<(), CniError> {
        let list = &cached.plan.list;
        // After a reboot, or when the namespace was lost, plugins free what is theirs without it.
        let netns = match longshore_sys::ns::is_bound(&cached.plan.netns) {
            true => cached.plan.netns.as_path(),
            false => Path::new(""),
        };
        let environment = cached.environment(netns);
        let previous = cached
            .result
            .as_ref()
            .filter(|_| list.version >= Version::V0_4_0);
        let mut failure = Ok(());
        for (index, plugin) in list.types().enumerate().rev() {
            if let Some(context) = context {
                context.stage(stage(Verb::Del, plugin, list));
            }
            let input = list.execution(index, &cached.plan.capabilities, previous);
            let run = Run {
                limit: self.del_limit(),
                ..self.run(Verb::Del, plugin, list, &environment, input)
            };
            if let Err(error) = run.run().await {
                tracing::warn!(sandbox_id = %cached.sandbox, error = &error as &dyn std::error::Error, "not detached");
                failure = failure.and(Err(error));
            }
        }
        failure
    }

    /// A plugin that hangs must not keep the agent from serving.
    fn del_limit(&self) -> Duration {
        match self.starting.load(Ordering::Relaxed) {
            true => self.config.timeout.min(START_LIMIT),
            false => self.config.timeout,
        }
    }

    /// CHECK of every plugin, in order, where the network has it.
    ///
    /// # Errors
    /// The first plugin's that finds something wrong.
    pub(super) async fn check(&self, sandbox: &SandboxId) -> Result<(), CniError> {
        let turn = self.turn(sandbox);
        let _turn = turn.lock().await;
        let Some(cached) = self.cached(sandbox) else {
            self.forget_turn(sandbox);
            return Ok(());
        };
        let list = &cached.plan.list;
        let (Progress::Attached, Some(previous), true) =
            (cached.progress, &cached.result, list.serves(Verb::Check))
        else {
            return Ok(());
        };
        let environment = cached.environment(&cached.plan.netns);
        for (index, plugin) in list.types().enumerate() {
            let input = list.execution(index, &cached.plan.capabilities, Some(previous));
            let run = self.run(Verb::Check, plugin, list, &environment, input);
            run.run().await?;
        }
        Ok(())
    }

    /// GC of every plugin, past failures: what they keep beyond our attachments goes.
    ///
    /// # Errors
    /// The first one.
    pub(super) async fn gc(&self, list: &ConfList) -> Result<(), CniError> {
        if !list.serves(Verb::Gc) {
            return Ok(());
        }
        let valid: Vec<_> = self
            .store
            .snapshot()
            .all::<Cached>()
            .filter(|cached| cached.plan.list.name == list.name)
            .map(|cached| json!({"containerID": cached.sandbox, "ifname": INSIDE}))
            .collect();
        let mut failure = Ok(());
        for (index, plugin) in list.types().enumerate() {
            let mut input = list.execution(index, &Map::new(), None);
            input.insert("cni.dev/valid-attachments".into(), valid.clone().into());
            let run = self.run(Verb::Gc, plugin, list, &[], input);
            if let Err(error) = run.run().await {
                failure = failure.and(Err(error));
            }
        }
        failure
    }

    /// Whether the plugins can serve an ADD, as they say themselves where the network asks them.
    ///
    /// # Errors
    /// Why not, in words.
    pub(super) async fn status(&self, chosen: &Arc<Chosen>) -> Result<(), String> {
        if let Some(program) = self.missing_programs(&chosen.list).first() {
            return Err(self.plugin_missing(program, &chosen.list).to_string());
        }
        if !chosen.list.serves(Verb::Status) {
            return Ok(());
        }
        let mut health = self.health.lock().await;
        if let Some(known) = &*health
            && known.of == *chosen
            && known.asked.elapsed() < STATUS_AGE
        {
            return known.answer.clone();
        }
        let answer = self
            .ask(&chosen.list)
            .await
            .map_err(|error| error.to_string());
        *health = Some(Health {
            asked: Instant::now(),
            of: Arc::clone(chosen),
            answer: answer.clone(),
        });
        answer
    }

    async fn ask(&self, list: &ConfList) -> Result<(), CniError> {
        for (index, plugin) in list.types().enumerate() {
            let input = list.execution(index, &Map::new(), None);
            let run = Run {
                limit: self.config.timeout.min(STATUS_LIMIT),
                ..self.run(Verb::Status, plugin, list, &[], input)
            };
            run.run().await?;
        }
        Ok(())
    }

    pub(super) fn cached(&self, sandbox: &SandboxId) -> Option<Arc<Cached>> {
        self.store.snapshot().get::<Cached>(sandbox.as_str())
    }

    async fn commit(&self, cached: &Cached) -> Result<(), NetworkError> {
        self.store
            .commit(Changes::new().put(cached.clone()))
            .await?;
        Ok(())
    }

    fn run<'a>(
        &'a self,
        verb: Verb,
        plugin: &'a str,
        list: &'a ConfList,
        environment: &'a [(&'static str, String)],
        input: Map<String, Value>,
    ) -> Run<'a> {
        Run {
            plugin,
            network: &list.name,
            verb,
            bin_dirs: &self.config.bin_dirs,
            environment,
            input: Value::Object(input).to_string().into_bytes(),
            limit: self.config.timeout,
            cancelled: None,
        }
    }

    fn plugin_missing(&self, plugin: &str, list: &ConfList) -> CniError {
        CniError::PluginMissing {
            plugin: plugin.to_owned(),
            network: list.name.clone(),
            folders: plugin::joined(&self.config.bin_dirs)
                .to_string_lossy()
                .into_owned(),
        }
    }

    fn turn(&self, sandbox: &SandboxId) -> Arc<AsyncMutex<bool>> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(busy.entry(sandbox.clone()).or_default())
    }

    /// Whoever waits for it has it still, and finds no record.
    fn forget_turn(&self, sandbox: &SandboxId) {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.remove(sandbox);
    }
}

fn stage(verb: Verb, plugin: &str, list: &ConfList) -> String {
    format!("CNI {verb} {plugin} of network {}", list.name)
}

/// What a pod's status shows of a result.
fn attachment(answer: Answer) -> Attachment {
    Attachment {
        interface: INSIDE.to_owned(),
        host_interface: answer.host_interface,
        addresses: answer.addresses.iter().map(|(net, _)| *net).collect(),
        gateways: answer
            .addresses
            .iter()
            .filter_map(|(_, gateway)| *gateway)
            .collect(),
        mac: answer.mac,
        mtu: answer.mtu,
        result: Some(answer.raw),
    }
}
