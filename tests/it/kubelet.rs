//! A kubelet's life: what a node's kubelet asks, as often and in the order it asks, for many pods
//! at once, while a second view watches that no answer is ever wrong.
//!
//! ```text
//! every 1 s   ListPodSandbox, ListContainers          every 10 s  ContainerStatus of each that
//! every 2 s   the same, ready and running only                    runs, a log rotated, stats
//! every 5 s   Status                                  always      events, connected anew
//! ```
//! Pods: steady ones with probes in time and too late, crash loops with back-off, and ones that
//! come and go, gracefully and by force. A short one runs with the other tests; the long one is
//! `LONGSHORE_KUBELET_PODS=60 LONGSHORE_KUBELET_SECONDS=600 cargo nextest run kubelet --no-capture`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    env, fs,
    future::Future,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use longshore_proto::cri::v1::{self as cri, ContainerEventType, ContainerState, PodSandboxState};
use longshore_tests::{
    node::{ImageService, Runtime},
    pods::{Bench, Pod, container, pod, read_log, script},
};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};
use tonic::{Code, Status};

/// What kubelet allows nearly every call.
const PATIENCE: Duration = Duration::from_secs(120);
/// Counts, so that a lost line shows.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";
/// Ends well when asked to.
const POLITE: &str = "trap 'exit 0' TERM; while :; do sleep 0.05; done";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubelets_life() -> Result<()> {
    let pods = setting("LONGSHORE_KUBELET_PODS", 12)?;
    let life = Duration::from_secs(setting("LONGSHORE_KUBELET_SECONDS", 15)?);
    let bench = Bench::start().await?;
    let kubelet = Arc::new(Kubelet {
        runtime: bench.node.runtime(),
        images: bench.node.images(),
        image: bench.toolbox.clone(),
        logs: bench.node.log_dir(),
        until: Instant::now() + life,
        truth: Mutex::default(),
        times: Mutex::default(),
        steady: Mutex::default(),
        ends: AtomicUsize::new(0),
    });
    let mut lives = JoinSet::new();
    // All at once, as after the start of a node.
    for index in 0..usize::try_from(pods)? {
        let kubelet = Arc::clone(&kubelet);
        lives.spawn(async move {
            let told = match index % 4 {
                0 => kubelet.steady(index, 1).await,
                1 => kubelet.steady(index, 5).await,
                2 => kubelet.crash_loop(index).await,
                _ => kubelet.come_and_go(index).await,
            };
            told.with_context(|| format!("pod {index}"))
        });
    }
    let mut views = JoinSet::new();
    views.spawn(Arc::clone(&kubelet).relist());
    views.spawn(Arc::clone(&kubelet).housekeeping());
    views.spawn(Arc::clone(&kubelet).rotation());
    views.spawn(Arc::clone(&kubelet).health());
    views.spawn(Arc::clone(&kubelet).events());
    while let Some(told) = lives.join_next().await {
        told??;
    }
    while let Some(told) = views.join_next().await {
        told??;
    }
    let ends = kubelet.ends.load(Ordering::Relaxed);
    println!("{pods} pods, {} s, {ends} containers ended", life.as_secs());
    println!("{}", kubelet.report());
    ensure!(ends > 0, "no container ever ended");
    bench.node.fsck_clean().await?;
    bench.finish().await
}

fn setting(name: &str, default: u64) -> Result<u64> {
    match env::var(name) {
        Ok(value) => value.parse().with_context(|| format!("{name}={value:?}")),
        Err(_) => Ok(default),
    }
}

struct Kubelet {
    runtime: Runtime,
    images: ImageService,
    image: String,
    logs: PathBuf,
    until: Instant,
    truth: Mutex<Truth>,
    times: Mutex<BTreeMap<&'static str, Vec<Duration>>>,
    /// Logs to rotate, with the number of times it was done.
    steady: Mutex<HashMap<String, (PathBuf, u32)>>,
    ends: AtomicUsize,
}

/// Pods and containers as they must be seen.
#[derive(Default)]
struct Truth {
    /// Rises with every change.
    tick: u64,
    things: HashMap<String, Thing>,
    /// Creates under way, whose ids nobody knows yet.
    creating: usize,
    created_at: u64,
}

struct Thing {
    /// States that it may be seen in; none if it must not be seen.
    allowed: &'static [i32],
    /// A call that changes it is under way.
    busy: bool,
    since: u64,
    pod: bool,
}

const READY: &[i32] = &[PodSandboxState::SandboxReady as i32];
const NOT_READY: &[i32] = &[PodSandboxState::SandboxNotready as i32];
const CREATED: &[i32] = &[ContainerState::ContainerCreated as i32];
const RUNNING: &[i32] = &[ContainerState::ContainerRunning as i32];
const EXITED: &[i32] = &[ContainerState::ContainerExited as i32];
/// Of one that ends by itself.
const STARTED: &[i32] = &[
    ContainerState::ContainerRunning as i32,
    ContainerState::ContainerExited as i32,
];

impl Truth {
    fn begin(&mut self, id: &str) {
        self.tick += 1;
        if let Some(thing) = self.things.get_mut(id) {
            thing.busy = true;
        }
    }

    fn is(&mut self, id: &str, pod: bool, allowed: &'static [i32]) {
        self.tick += 1;
        let thing = Thing {
            allowed,
            busy: false,
            since: self.tick,
            pod,
        };
        self.things.insert(id.to_owned(), thing);
    }

    /// What in a list, asked for at `from`, was wrong all the time since then.
    fn wrong(&self, from: u64, pods: bool, seen: &HashMap<String, i32>) -> Vec<String> {
        let mut wrong = Vec::new();
        for (id, thing) in &self.things {
            if thing.busy || thing.since > from || thing.pod != pods {
                continue;
            }
            match seen.get(id) {
                Some(state) if thing.allowed.contains(state) => {}
                None if thing.allowed.is_empty() => {}
                found => wrong.push(format!("{id}: {found:?}, not {:?}", thing.allowed)),
            }
        }
        if self.creating == 0 && self.created_at <= from {
            let strange = seen.keys().filter(|id| !self.things.contains_key(*id));
            wrong.extend(strange.map(|id| format!("{id}: nobody made it")));
        }
        wrong
    }
}

/// What every life has.
impl Kubelet {
    fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Waits, but not beyond the end.
    async fn rest(&self, time: Duration) {
        sleep(time.min(self.until.saturating_duration_since(Instant::now()))).await;
    }

    async fn timed<T>(
        &self,
        name: &'static str,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Status> {
        let began = Instant::now();
        let answer = tokio::time::timeout(PATIENCE, call)
            .await
            .map_err(|_| Status::deadline_exceeded(format!("{name}: kubelet's patience")))?;
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.entry(name).or_default().push(began.elapsed());
        answer.map(tonic::Response::into_inner)
    }

    fn report(&self) -> String {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let mut lines = vec![format!(
            "{:24}{:>8}{:>10}{:>10}{:>10} ms",
            "", "calls", "median", "p99", "longest"
        )];
        for (name, times) in &mut *times {
            times.sort();
            let at = |share: usize| times[(times.len() - 1) * share / 100];
            lines.push(format!(
                "{name:24}{:>8}{:>10.2}{:>10.2}{:>10.2}",
                times.len(),
                ms(at(50)),
                ms(at(99)),
                ms(at(100))
            ));
        }
        lines.join("\n")
    }

    async fn run_pod(&self, name: &str) -> Result<Pod> {
        let mut config = pod(name);
        let uid = config.metadata.clone().unwrap_or_default().uid;
        config.log_directory = self.logs.join(uid).to_string_lossy().into_owned();
        self.truth().creating += 1;
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            ..Default::default()
        };
        let mut api = self.runtime.clone();
        let made = self.timed("RunPodSandbox", api.run_pod_sandbox(request));
        let made = self.made(made.await.map(|made| made.pod_sandbox_id), true, READY)?;
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: made.clone(),
            verbose: false,
        };
        let mut api = self.runtime.clone();
        let status = api.pod_sandbox_status(request);
        let status = self.timed("PodSandboxStatus", status).await?;
        let status = status.status.context("a status")?;
        ensure!(
            status.state() == PodSandboxState::SandboxReady,
            "{status:?}"
        );
        Ok(Pod { id: made, config })
    }

    /// The end of a create.
    fn made(
        &self,
        made: Result<String, Status>,
        pod: bool,
        allowed: &'static [i32],
    ) -> Result<String, Status> {
        let mut truth = self.truth();
        truth.creating -= 1;
        let id = made?;
        truth.is(&id, pod, allowed);
        truth.created_at = truth.tick;
        Ok(id)
    }

    /// Looks for the image, creates, starts.
    async fn launch(
        &self,
        pod: &Pod,
        mut config: cri::ContainerConfig,
        started: &'static [i32],
    ) -> Result<String> {
        let spec = cri::ImageSpec {
            image: self.image.clone(),
            ..Default::default()
        };
        let request = cri::ImageStatusRequest {
            image: Some(spec),
            verbose: false,
        };
        let mut api = self.images.clone();
        let status = api.image_status(request);
        let image = self.timed("ImageStatus", status).await?.image;
        // By id, and what the user wrote beside it.
        config.image = Some(cri::ImageSpec {
            image: image.context("the image is there")?.id,
            user_specified_image: self.image.clone(),
            ..Default::default()
        });
        self.truth().creating += 1;
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let mut api = self.runtime.clone();
        let made = api.create_container(request);
        let made = self.timed("CreateContainer", made).await;
        let id = self.made(made.map(|made| made.container_id), false, CREATED)?;
        self.truth().begin(&id);
        let request = cri::StartContainerRequest {
            container_id: id.clone(),
        };
        let mut api = self.runtime.clone();
        let start = api.start_container(request);
        self.timed("StartContainer", start).await?;
        self.truth().is(&id, false, started);
        Ok(id)
    }

    async fn status(&self, id: &str) -> Result<cri::ContainerStatus, Status> {
        let request = cri::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let mut api = self.runtime.clone();
        let status = api.container_status(request);
        let status = self.timed("ContainerStatus", status).await?.status;
        status.ok_or_else(|| Status::internal("no status"))
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        self.truth().begin(id);
        let request = cri::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        let mut api = self.runtime.clone();
        let removal = api.remove_container(request);
        self.timed("RemoveContainer", removal).await?;
        self.truth().is(id, false, &[]);
        let gone = self.status(id).await.expect_err("it was removed");
        ensure!(gone.code() == Code::NotFound, "{gone:?}");
        Ok(())
    }

    /// Ends a pod as kubelet does: the containers with their time, the sandbox twice, and the
    /// garbage collector comes later.
    async fn end(&self, pod: &Pod, containers: &[String], grace: i64) -> Result<()> {
        let stops = containers.iter().map(|id| async move {
            self.truth().begin(id);
            let request = cri::StopContainerRequest {
                container_id: id.clone(),
                timeout: grace,
            };
            let mut api = self.runtime.clone();
            let stop = api.stop_container(request);
            self.timed("StopContainer", stop).await?;
            self.truth().is(id, false, EXITED);
            self.ends.fetch_add(1, Ordering::Relaxed);
            anyhow::Ok(())
        });
        futures_util::future::try_join_all(stops).await?;
        for _ in 0..2 {
            self.truth().begin(&pod.id);
            let request = cri::StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            let mut api = self.runtime.clone();
            let stop = api.stop_pod_sandbox(request);
            self.timed("StopPodSandbox", stop).await?;
            self.truth().is(&pod.id, true, NOT_READY);
        }
        for id in containers {
            self.remove_container(id).await?;
        }
        self.rest(Duration::from_millis(500)).await;
        self.truth().begin(&pod.id);
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let mut api = self.runtime.clone();
        let removal = api.remove_pod_sandbox(request);
        self.timed("RemovePodSandbox", removal).await?;
        self.truth().is(&pod.id, true, &[]);
        Ok(())
    }

    async fn probe(&self, id: &str, command: &[&str], timeout: i64) -> Result<i32, Status> {
        let request = cri::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout,
        };
        let mut api = self.runtime.clone();
        let exec = api.exec_sync(request);
        Ok(self.timed("ExecSync", exec).await?.exit_code)
    }
}

/// The lives of pods.
impl Kubelet {
    /// Counts into its log while it is probed; each fifth probe takes longer than it may.
    async fn steady(&self, index: usize, period: u64) -> Result<()> {
        let pod = self.run_pod(&format!("steady-{index}")).await?;
        let counter = script("counter", &self.image, COUNTER);
        let id = self.launch(&pod, counter, RUNNING).await?;
        let log = PathBuf::from(self.status(&id).await?.log_path);
        self.rotated().insert(id.clone(), (log.clone(), 0));
        for round in 0.. {
            self.rest(Duration::from_secs(period)).await;
            if self.over() {
                break;
            }
            if round % 5 == 4 {
                let late = self.probe(&id, &["sleep", "100"], 1).await;
                let code = late.as_ref().map_err(Status::code).copied();
                ensure!(code == Err(Code::DeadlineExceeded), "{late:?}");
            } else {
                let wanted = i32::from(round % 2 == 1) * 3;
                let command = ["sh", "-c", &format!("exit {wanted}")];
                let code = self.probe(&id, &command, 60).await?;
                ensure!(code == wanted, "probe answers {code}, not {wanted}");
            }
        }
        let (_, rotations) = self.rotated().remove(&id).context("its log")?;
        self.end(&pod, &[id], 0).await?;
        whole(&log, rotations)
    }

    fn rotated(&self) -> MutexGuard<'_, HashMap<String, (PathBuf, u32)>> {
        self.steady.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends by itself, and is started again a little later each time; the last dead one is kept.
    async fn crash_loop(&self, index: usize) -> Result<()> {
        let pod = self.run_pod(&format!("crashes-{index}")).await?;
        let mut dead: Option<String> = None;
        let mut pause = Duration::from_millis(200);
        for attempt in 0.. {
            let code = i32::try_from(attempt % 7)? + 1;
            let mut config = script("main", &self.image, &format!("sleep 0.1; exit {code}"));
            config.metadata = Some(cri::ContainerMetadata {
                name: "main".to_owned(),
                attempt,
            });
            config.log_path = format!("main/{attempt}.log");
            let id = self.launch(&pod, config, STARTED).await?;
            let status = loop {
                let status = self.status(&id).await?;
                if status.state() == ContainerState::ContainerExited {
                    break status;
                }
                sleep(Duration::from_millis(50)).await;
            };
            self.truth().is(&id, false, EXITED);
            self.ends.fetch_add(1, Ordering::Relaxed);
            ensure!(status.exit_code == code, "{status:?}");
            ensure!(status.finished_at >= status.started_at, "{status:?}");
            if let Some(older) = dead.replace(id) {
                self.remove_container(&older).await?;
            }
            if self.over() {
                break;
            }
            self.rest(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
        self.end(&pod, dead.as_slice(), 30).await
    }

    /// Is deleted after some seconds, in turn gracefully and by force, and comes again.
    async fn come_and_go(&self, index: usize) -> Result<()> {
        for round in 0.. {
            let pod = self.run_pod(&format!("comes-{index}-{round}")).await?;
            let polite = script("polite", &self.image, POLITE);
            let rude = container("rude", &self.image, &["sleep", "10000"]);
            let mut ids = vec![self.launch(&pod, polite, RUNNING).await?];
            ids.push(self.launch(&pod, rude, RUNNING).await?);
            self.rest(Duration::from_millis(500 + 700 * (index as u64 % 5)))
                .await;
            self.end(&pod, &ids, if round % 2 == 0 { 1 } else { 0 })
                .await?;
            if self.over() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What goes on beside the pods.
impl Kubelet {
    async fn pods(&self, filter: Option<cri::PodSandboxFilter>) -> Result<HashMap<String, i32>> {
        let request = cri::ListPodSandboxRequest { filter };
        let mut api = self.runtime.clone();
        let list = api.list_pod_sandbox(request);
        let items = self.timed("ListPodSandbox", list).await?.items;
        Ok(items.into_iter().map(|pod| (pod.id, pod.state)).collect())
    }

    async fn containers(
        &self,
        filter: Option<cri::ContainerFilter>,
    ) -> Result<HashMap<String, i32>> {
        let request = cri::ListContainersRequest { filter };
        let mut api = self.runtime.clone();
        let list = api.list_containers(request);
        let list = self.timed("ListContainers", list).await?.containers;
        Ok(list.into_iter().map(|one| (one.id, one.state)).collect())
    }

    async fn relist(self: Arc<Self>) -> Result<()> {
        let mut ticks = ticks(1);
        while !self.over() {
            ticks.tick().await;
            let from = self.truth().tick;
            let seen = self.pods(None).await?;
            let wrong = self.truth().wrong(from, true, &seen);
            ensure!(wrong.is_empty(), "ListPodSandbox: {wrong:?}");
            let from = self.truth().tick;
            let seen = self.containers(None).await?;
            let wrong = self.truth().wrong(from, false, &seen);
            ensure!(wrong.is_empty(), "ListContainers: {wrong:?}");
        }
        Ok(())
    }

    async fn housekeeping(self: Arc<Self>) -> Result<()> {
        let mut ticks = ticks(2);
        while !self.over() {
            ticks.tick().await;
            let state = PodSandboxState::SandboxReady.into();
            let filter = cri::PodSandboxFilter {
                state: Some(cri::PodSandboxStateValue { state }),
                ..Default::default()
            };
            let seen = self.pods(Some(filter)).await?;
            ensure!(seen.values().all(|found| *found == state), "{seen:?}");
            let state = ContainerState::ContainerRunning.into();
            let filter = cri::ContainerFilter {
                state: Some(cri::ContainerStateValue { state }),
                ..Default::default()
            };
            let seen = self.containers(Some(filter)).await?;
            ensure!(seen.values().all(|found| *found == state), "{seen:?}");
        }
        Ok(())
    }

    /// Renames each steady log, and has it opened again.
    async fn rotation(self: Arc<Self>) -> Result<()> {
        let mut ticks = ticks(10);
        while !self.over() {
            let running = self.containers(None).await?;
            for id in running.keys() {
                // One that was removed meanwhile is no news.
                match self.status(id).await {
                    Ok(status) => ensure!(status.id == *id, "{status:?} for {id}"),
                    Err(status) => ensure!(status.code() == Code::NotFound, "{status:?}"),
                }
                let Some((log, number)) = self.rotated().get_mut(id).map(|(log, number)| {
                    *number += 1;
                    (log.clone(), *number)
                }) else {
                    continue;
                };
                fs::rename(&log, older(&log, number))?;
                let request = cri::ReopenContainerLogRequest {
                    container_id: id.clone(),
                };
                let mut api = self.runtime.clone();
                let reopened = api.reopen_container_log(request);
                if let Err(status) = self.timed("ReopenContainerLog", reopened).await {
                    // Its pod is on its way out.
                    ensure!(!self.rotated().contains_key(id), "{status:?}");
                }
            }
            ticks.tick().await;
        }
        Ok(())
    }

    async fn health(self: Arc<Self>) -> Result<()> {
        let mut ticks = ticks(5);
        for round in 0.. {
            ticks.tick().await;
            if self.over() {
                break;
            }
            let mut api = self.runtime.clone();
            let status = api.status(cri::StatusRequest::default());
            let status = self.timed("Status", status).await?.status;
            let conditions = status.context("a status")?.conditions;
            ensure!(conditions.iter().all(|one| one.status), "{conditions:?}");
            if round % 2 != 0 {
                continue;
            }
            let version = cri::VersionRequest {
                version: "0.1.0".to_owned(),
            };
            let mut api = self.runtime.clone();
            let version = api.version(version);
            self.timed("Version", version).await?;
            let usage = cri::ImageFsInfoRequest::default();
            let mut api = self.images.clone();
            let usage = api.image_fs_info(usage);
            self.timed("ImageFsInfo", usage).await?;
            let list = cri::ListImagesRequest::default();
            let mut api = self.images.clone();
            let list = api.list_images(list);
            let images = self.timed("ListImages", list).await?.images;
            ensure!(images.len() == 1, "{images:?}");
            let stats = cri::ListContainerStatsRequest::default();
            let mut api = self.runtime.clone();
            let stats = api.list_container_stats(stats);
            self.timed("ListContainerStats", stats).await?;
        }
        Ok(())
    }

    /// Within one connection a container's events come in the order of its life, once each.
    async fn events(self: Arc<Self>) -> Result<()> {
        while !self.over() {
            let mut api = self.runtime.clone();
            let stream = api.get_container_events(cri::GetEventsRequest {});
            let mut stream = self.timed("GetContainerEvents", stream).await?;
            let connected = Instant::now();
            let mut told: HashMap<String, HashSet<i32>> = HashMap::new();
            while connected.elapsed() < Duration::from_secs(5) && !self.over() {
                let Ok(event) =
                    tokio::time::timeout(Duration::from_secs(1), stream.message()).await
                else {
                    continue;
                };
                let Some(event) = event? else {
                    bail!("the stream of events ended");
                };
                let kind = event.container_event_type();
                let earlier = told.entry(event.container_id.clone()).or_default();
                let late = match kind {
                    ContainerEventType::ContainerCreatedEvent => 0,
                    ContainerEventType::ContainerStartedEvent => 1,
                    ContainerEventType::ContainerStoppedEvent => 2,
                    ContainerEventType::ContainerDeletedEvent => 3,
                };
                ensure!(
                    earlier.iter().all(|one| *one < late),
                    "{kind:?} of {} after {earlier:?}",
                    event.container_id
                );
                earlier.insert(late);
            }
        }
        Ok(())
    }
}

fn ticks(seconds: u64) -> tokio::time::Interval {
    let mut ticks = interval(Duration::from_secs(seconds));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn older(log: &Path, number: u32) -> PathBuf {
    log.with_extension(format!("log.{number}"))
}

/// The files of a log together count without a gap.
fn whole(log: &Path, rotations: u32) -> Result<()> {
    let mut expected = 1_u64;
    let files = (1..=rotations).map(|number| older(log, number));
    for file in files.chain([log.to_owned()]) {
        // The last rotation may have come too late for a new file.
        if !file.exists() {
            continue;
        }
        for line in read_log(&file)?.stdout().lines() {
            ensure!(
                line.parse() == Ok(expected),
                "{line:?} in {} where {expected} was due",
                file.display()
            );
            expected += 1;
        }
    }
    ensure!(expected > 1, "nothing in {}", log.display());
    Ok(())
}
