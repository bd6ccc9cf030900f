//! Crash points: places where a test may end the process.
//!
//! Without the feature `crash-points` this is nothing.

/// Passes a point; with the feature, dies here by SIGKILL if `LONGSHORE_CRASH_AT` names it.
///
/// Names are `<operation>/<step or commit>/<before|after>`, as `LONGSHORE_CRASH_LIST` prints them.
#[cfg(feature = "crash-points")]
pub(super) fn point(operation: &str, step: &dyn std::fmt::Debug, edge: &str) {
    let name = format!("{operation}/{step:?}/{edge}");
    if let Some(list) = std::env::var_os("LONGSHORE_CRASH_LIST") {
        use std::io::Write as _;
        let listed = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(list)
            .and_then(|mut file| writeln!(file, "{name}"));
        if let Err(error) = listed {
            tracing::error!(%error, point = name, "cannot list a crash point");
        }
    }
    if std::env::var("LONGSHORE_CRASH_AT").is_ok_and(|at| at == name) {
        let me = rustix::process::getpid();
        // Nothing may run after this point, so the result does not matter.
        let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
        std::thread::park();
    }
}

/// Passes a point.
#[cfg(not(feature = "crash-points"))]
#[inline]
pub(super) fn point(_operation: &str, _step: &dyn std::fmt::Debug, _edge: &str) {}
