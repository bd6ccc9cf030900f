//! StopSystem, RestartSystem, FreezeSystem: asking an init to halt, in its own words, once it listens.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    super::{Lifecycle, LifecycleError, container::Container},
    System,
    view::SystemState,
};
use crate::{blocking, handler::Handler as _};

/// `SIGRTMIN+3`: systemd halts. Source: systemd(1), "Signals".
pub(super) const HALT_SYSTEMD: i32 = 37;
/// SIGPWR: so does init of System V and of OpenRC. Source: init(8).
const HALT_SYSV: i32 = 30;
/// SIGUSR2: so does busybox's init, by powering off. Source: `init/init.c` of busybox.
const HALT_BUSYBOX: i32 = 12;
/// SIGCONT: so does runit's stage 2, as its `stopit` says. Source: runit(8).
const HALT_RUNIT: i32 = 18;

/// A signal that comes before its handler is lost, or fatal: how long the handler is waited for.
const HANDLER_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// An init that was busy is asked once more.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// How a system container is to be stopped.
#[derive(Clone, Copy, Debug, Default)]
pub struct Halt {
    /// Its init is not asked.
    pub force: bool,
    /// Between the asking and SIGKILL; none is its own.
    pub timeout: Option<Duration>,
}

impl Lifecycle {
    /// Stops a system container; stopped is fine.
    ///
    /// # Errors
    /// `NotFound`; what could not be ended.
    pub async fn stop_system(
        self: &Arc<Self>,
        name: &str,
        halt: Halt,
    ) -> Result<Arc<System>, LifecycleError> {
        let system = self.system(name)?;
        // A start under way is undone: nothing of it runs then.
        self.operations
            .preempt_named(&super::subject(&system.id), "start_system")
            .await;
        if let Some((_, Some(container))) = self.run_of(&self.store.snapshot(), &system) {
            self.halting.begin(&container.id);
            let ended = self.halt(&system, &container, halt).await;
            if ended.is_err() {
                self.halting.forget(&container.id);
            }
            ended?;
            self.end_system(&system.id, &container.id).await?;
        }
        // What an init that ended by itself has left while nobody looked.
        if self.run_of(&self.store.snapshot(), &system).is_some() {
            self.end_run(&system).await?;
        }
        self.system(system.id.as_str())
    }

    /// Stops a system container and starts it again.
    ///
    /// # Errors
    /// As of both.
    pub async fn restart_system(
        self: &Arc<Self>,
        name: &str,
        halt: Halt,
    ) -> Result<Arc<System>, LifecycleError> {
        let system = self.stop_system(name, halt).await?;
        self.start_system(system.id.as_str()).await
    }

    /// Stops all in a system container from running; all of it stands still then.
    ///
    /// # Errors
    /// `NotFound`; `State` unless it runs; `Cgroup` if it does not come to rest.
    pub async fn freeze_system(&self, name: &str) -> Result<Arc<System>, LifecycleError> {
        let (system, container) =
            self.running(name, |state| matches!(state, SystemState::Running { .. }))?;
        let (cgroups, path) = (Arc::clone(&self.cgroups), container.cgroup.clone());
        blocking::run("freeze", move || cgroups.freeze(&path)).await?;
        Ok(system)
    }

    /// Lets all in a frozen system container run again.
    ///
    /// # Errors
    /// `NotFound`; `State` unless it is frozen; `Cgroup`.
    pub async fn unfreeze_system(&self, name: &str) -> Result<Arc<System>, LifecycleError> {
        let (system, container) =
            self.running(name, |state| matches!(state, SystemState::Frozen { .. }))?;
        self.thaw(&container).await?;
        Ok(system)
    }

    fn running(
        &self,
        name: &str,
        wanted: impl Fn(&SystemState) -> bool,
    ) -> Result<(Arc<System>, Arc<Container>), LifecycleError> {
        let system = self.system(name)?;
        let at = self.store.snapshot();
        let state = self.system_state(&at, &system);
        let needed = match state {
            SystemState::Frozen { .. } => "RUNNING",
            SystemState::Running { .. } => "FROZEN",
            _ => "RUNNING",
        };
        match self.run_of(&at, &system) {
            Some((_, Some(container))) if wanted(&state) => Ok((system, container)),
            _ => Err(system.wrong_state(&state, needed)),
        }
    }

    async fn thaw(&self, container: &Container) -> Result<(), LifecycleError> {
        let (cgroups, path) = (Arc::clone(&self.cgroups), container.cgroup.clone());
        Ok(blocking::run("thaw", move || cgroups.resume(&path)).await?)
    }

    /// Asks, waits, kills.
    async fn halt(
        &self,
        system: &System,
        container: &Container,
        halt: Halt,
    ) -> Result<(), LifecycleError> {
        if !container.is_running() {
            return Ok(());
        }
        let timeout = halt.timeout.unwrap_or(system.config.stop_timeout);
        if !halt.force && !timeout.is_zero() {
            // What is frozen hears nothing.
            self.thaw(container).await?;
            let patience = tokio::time::timeout(timeout, self.exited(&container.id));
            let ended = tokio::select! {
                ended = patience => ended.is_ok(),
                // Never ends by itself.
                () = self.ask_to_halt(system, container) => false,
            };
            if ended {
                return Ok(());
            }
        }
        self.kill_container(container).await
    }

    /// Sends the halt signal again and again, once the init has a handler for it.
    async fn ask_to_halt(&self, system: &System, container: &Container) {
        let pid = container.pid().unwrap_or_default();
        let until = Instant::now() + HANDLER_PATIENCE;
        loop {
            let configured = system.config.halt_signal;
            let asked = blocking::run("look at init", move || Asked::of(pid, configured)).await;
            let Some(asked) = asked else {
                // Its exit is on the way.
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            };
            if !asked.heard && Instant::now() < until {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            let sent = self
                .handler
                .signal(&container.sandbox_id, &container.id, asked.signal)
                .await;
            if let Err(error) = sent {
                tracing::debug!(system_id = %system.id, error = &error as &dyn std::error::Error, "halt signal not sent");
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }
}

/// Which signal halts an init, and whether it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    signal: i32,
    pub(super) heard: bool,
}

impl Asked {
    /// None if the process is gone. Blocking.
    pub(super) fn of(pid: i32, configured: Option<i32>) -> Option<Self> {
        let signals = Signals::of(pid)?;
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let program = program.file_name().unwrap_or_default().to_string_lossy();
        let signal = configured.unwrap_or_else(|| halt_signal(&program, signals));
        Some(Self {
            signal,
            heard: signals.contains(signal),
        })
    }
}

/// The program tells which init it is; one that we do not know may still listen as systemd does.
fn halt_signal(program: &str, signals: Signals) -> i32 {
    match program {
        "systemd" => HALT_SYSTEMD,
        "busybox" => HALT_BUSYBOX,
        "runit" | "runit-init" => HALT_RUNIT,
        _ if signals.contains(HALT_SYSTEMD) => HALT_SYSTEMD,
        _ => HALT_SYSV,
    }
}

/// Signals that a process has taken: it has a handler, or blocks them to read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signals(u64);

impl Signals {
    /// None if the process is gone. Blocking.
    fn of(pid: i32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        Self::parse(&status)
    }

    /// Source: proc_pid_status(5).
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            u64::from_str_radix(line.trim(), 16).ok()
        };
        Some(Self(field("SigBlk:")? | field("SigCgt:")?))
    }

    fn contains(self, signal: i32) -> bool {
        (1..=64).contains(&signal) && self.0 >> (signal - 1) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_taken_by_handler_or_mask() {
        let status = "Name:\tinit\nSigBlk:\t0000000000000001\nSigIgn:\tffffffffffffffff\n\
                      SigCgt:\t0000001000000800\n";
        let signals = Signals::parse(status).expect("both masks are there");
        for (signal, expected) in [
            (1, true),
            (12, true),
            (37, true),
            (2, false),
            (0, false),
            (65, false),
        ] {
            assert_eq!(signals.contains(signal), expected, "{signal}");
        }
        assert_eq!(Signals::parse("Name:\tinit\n"), None);
    }

    #[test]
    fn each_init_is_asked_in_its_own_words() {
        let (none, rtmin_3) = (Signals(0), Signals(1 << 36));
        for (program, signals, expected) in [
            ("systemd", none, 37),
            ("busybox", rtmin_3, 12),
            ("runit", none, 18),
            ("init", rtmin_3, 37),
            ("init", none, 30),
        ] {
            assert_eq!(halt_signal(program, signals), expected, "{program}");
        }
    }
}
