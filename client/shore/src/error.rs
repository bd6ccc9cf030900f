//! Errors as a person at a terminal needs them: what did not work, which part of the request, and
//! what to do about it.

use std::io;

use longshore_client::{ADDRESS_VARIABLE, Error, Reason, Refusal};
use tonic::Code;

use crate::{exit_code::ExitCode, terminal};

/// What `shore` itself finds wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    /// The command line asks for what cannot be.
    #[error("{0}")]
    Usage(String),
    /// Nothing has this name or id.
    #[error("there is no {kind} `{name}`")]
    NotFound { kind: &'static str, name: String },
    /// More than one thing has it.
    #[error("`{name}` could be {count} {kind}s: {some}")]
    Ambiguous {
        kind: &'static str,
        name: String,
        count: usize,
        some: String,
    },
    /// The state of things does not allow it.
    #[error("{0}")]
    State(String),
    /// What was waited for went wrong.
    #[error("{0}")]
    Failed(String),
    /// Every node was reported on by itself; this is what is left to say.
    #[error("no agent answered")]
    NoAgent,
    /// `run` did not get as far as a running container.
    #[error(transparent)]
    Run(anyhow::Error),
}

/// The exit code that belongs to `error`.
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    if closed_pipe(error) {
        return ExitCode::OK;
    }
    if let Some(problem) = error.downcast_ref::<Problem>() {
        return match problem {
            Problem::Usage(_) => ExitCode::USAGE,
            Problem::NotFound { .. } => ExitCode::NOT_FOUND,
            Problem::Ambiguous { .. } | Problem::State(_) => ExitCode::CONFLICT,
            Problem::Failed(_) => ExitCode::FAILURE,
            Problem::NoAgent => ExitCode::UNAVAILABLE,
            Problem::Run(inner) => match agent_error(inner).map(ExitCode::of_error) {
                Some(code @ (ExitCode::NO_SUCH_COMMAND | ExitCode::CANNOT_EXECUTE)) => code,
                _ => ExitCode::RUN_REFUSED,
            },
        };
    }
    agent_error(error).map_or(ExitCode::FAILURE, ExitCode::of_error)
}

/// Whether the reader of our output went away, as `head` does: no failure of ours.
pub(crate) fn closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Tells a person on standard error; a reader that went away is no news.
pub(crate) fn report(error: &anyhow::Error) {
    if !closed_pipe(error) {
        terminal::note(render(error, terminal::colours(&io::stderr())).trim_end());
    }
}

/// `error` in lines: the sentence, the fields that were wrong, and what to do.
pub(crate) fn render(error: &anyhow::Error, colours: bool) -> String {
    let (red, bold, plain) = if colours {
        ("\u{1b}[31m", "\u{1b}[1m", "\u{1b}[0m")
    } else {
        ("", "", "")
    };
    let inner = match error.downcast_ref::<Problem>() {
        Some(Problem::Run(inner)) => inner,
        _ => error,
    };
    let mut text = format!("{red}shore:{plain} {inner:#}\n");
    let agent = agent_error(inner);
    if let Some(refusal) = agent.and_then(Error::refusal) {
        for violation in &refusal.violations {
            text.push_str(&format!(
                "  {bold}{}{plain}: {}\n",
                violation.field, violation.description
            ));
        }
    }
    let hint = match (inner.downcast_ref::<Problem>(), agent) {
        (Some(problem), _) => problem_hint(problem),
        (None, Some(agent)) => agent_hint(agent),
        (None, None) => None,
    };
    if let Some(hint) = hint {
        text.push_str(&format!("  {bold}try:{plain} {hint}\n"));
    }
    text
}

fn agent_error(error: &anyhow::Error) -> Option<&Error> {
    if let Some(Problem::Run(inner)) = error.downcast_ref::<Problem>() {
        return agent_error(inner);
    }
    error
        .chain()
        .find_map(|error| error.downcast_ref::<Error>())
}

fn problem_hint(problem: &Problem) -> Option<String> {
    match problem {
        Problem::NotFound { kind, .. } => Some(format!(
            "`shore {}` lists what there is",
            match *kind {
                "pod" => "pods",
                "image" => "images",
                "network" => "network ls",
                "operation" => "operations",
                "system container" => "system ls",
                _ => "ps -a",
            }
        )),
        Problem::Ambiguous { .. } => Some("write more of the id, or the whole name".into()),
        Problem::Usage(_) => Some("add --help to see what the command takes".into()),
        Problem::State(_) | Problem::Failed(_) | Problem::NoAgent | Problem::Run(_) => None,
    }
}

fn agent_hint(error: &Error) -> Option<String> {
    match error {
        Error::Unreachable { kind, .. } => Some(match kind {
            Some(io::ErrorKind::PermissionDenied) => {
                "run it as root: the agent's socket belongs to root alone".into()
            }
            _ => format!(
                "`systemctl start longshored`, or name the agent's address with --address or {ADDRESS_VARIABLE}"
            ),
        }),
        Error::Deadline { .. } => Some(
            "`shore operations` shows what the agent is busy with; --node-timeout waits longer"
                .into(),
        ),
        Error::Refused(refusal) => refusal_hint(refusal),
        Error::Incomplete { .. } => Some(
            "`journalctl -u longshored` says why; the same command again continues what was begun"
                .into(),
        ),
        _ => None,
    }
}

/// What brings a system container into the state that was needed.
fn system_hint(refusal: &Refusal) -> Option<String> {
    let fact = |name: &str| refusal.facts.get(name).map(String::as_str);
    let (name, state, required) = (fact("id")?, fact("state")?, fact("required")?);
    let verb = match (state, required) {
        ("FROZEN", "RUNNING") => "unfreeze",
        (_, "STOPPED") => "stop",
        ("STOPPED", _) => "start",
        _ => return None,
    };
    Some(format!("`shore system {verb} {name}`"))
}

fn refusal_hint(refusal: &Refusal) -> Option<String> {
    if refusal.reason == Some(Reason::SystemState) {
        return system_hint(refusal);
    }
    let holder = refusal.facts.get("holder");
    if let (Some(holder), Code::FailedPrecondition | Code::AlreadyExists) = (holder, refusal.code) {
        return Some(format!(
            "it is held by {holder}; `shore inspect {}` shows it",
            holder.rsplit('/').next().unwrap_or(holder)
        ));
    }
    if let (Some(operation), Code::Aborted) = (refusal.facts.get("operation_id"), refusal.code) {
        return Some(format!(
            "`shore operations wait {operation}` and then again"
        ));
    }
    match refusal.code {
        Code::PermissionDenied | Code::Unauthenticated => {
            Some("ask whoever runs this node for a certificate with that role".into())
        }
        Code::Unavailable | Code::ResourceExhausted => Some(match refusal.retry_after {
            Some(wait) => format!(
                "again in {}",
                crate::human::span(wait.max(std::time::Duration::from_secs(1)))
            ),
            None => "again in a moment".into(),
        }),
        Code::Unimplemented => Some(
            "`shore info` shows the agent's version, and `longshored check` what its host lacks"
                .into(),
        ),
        Code::DataLoss => {
            Some("`shore fsck` compares what the agent knows with what there is".into())
        }
        Code::Internal | Code::Unknown => {
            Some("`journalctl -u longshored` has the whole story".into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use longshore_client::{Address, Violation};

    use super::*;

    fn refusal(code: Code) -> Refusal {
        Refusal {
            code,
            message: "host port 8080/tcp is taken".into(),
            reason: None,
            reason_name: String::new(),
            facts: BTreeMap::new(),
            violations: Vec::new(),
            retry_after: None,
        }
    }

    fn refused(refusal: Refusal) -> anyhow::Error {
        Error::Refused(Box::new(refusal)).into()
    }

    #[test]
    fn a_refusal_names_the_field_and_what_is_valid() {
        let mut refusal = refusal(Code::InvalidArgument);
        refusal.violations.push(Violation {
            field: "config.ports[0].host_port".into(),
            description: "is 70000; valid is 1 to 65535".into(),
        });
        let error = refused(refusal);
        assert_eq!(
            render(&error, false),
            "shore: host port 8080/tcp is taken\n  config.ports[0].host_port: is 70000; valid is 1 to 65535\n"
        );
        assert_eq!(exit_code(&error), ExitCode::USAGE);
    }

    #[test]
    fn a_conflict_names_its_holder_and_how_to_see_it() {
        let mut refusal = refusal(Code::FailedPrecondition);
        refusal.facts.insert("holder".into(), "sandbox/abc".into());
        let error = refused(refusal);
        assert!(
            render(&error, false).contains("try: it is held by sandbox/abc; `shore inspect abc`")
        );
        assert_eq!(exit_code(&error), ExitCode::CONFLICT);
    }

    #[test]
    fn a_system_container_in_another_state_says_what_to_do() {
        for (state, required, expected) in [
            ("RUNNING", "STOPPED", "try: `shore system stop web`"),
            ("STOPPED", "RUNNING", "try: `shore system start web`"),
            ("FROZEN", "RUNNING", "try: `shore system unfreeze web`"),
        ] {
            let mut refusal = refusal(Code::FailedPrecondition);
            refusal.reason = Some(Reason::SystemState);
            for (name, value) in [("id", "web"), ("state", state), ("required", required)] {
                refusal.facts.insert(name.into(), value.into());
            }
            let text = render(&refused(refusal), false);
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn an_agent_that_is_not_there_says_where_to_look() {
        let error: anyhow::Error = Error::Unreachable {
            address: Address::default(),
            kind: Some(io::ErrorKind::NotFound),
            problem: "No such file or directory (os error 2)".into(),
        }
        .into();
        let text = render(&error, false);
        assert!(text.starts_with(
            "shore: cannot reach the agent at unix:///run/longshore/longshore.sock: No such file"
        ));
        assert!(text.contains("try: `systemctl start longshored`"), "{text}");
        assert_eq!(exit_code(&error), ExitCode::UNAVAILABLE);
    }

    #[test]
    fn context_does_not_hide_the_agents_code() {
        let error = refused(refusal(Code::NotFound)).context("pulling busybox");
        assert_eq!(exit_code(&error), ExitCode::NOT_FOUND);
        assert!(render(&error, false).starts_with("shore: pulling busybox: host port"));
    }

    #[test]
    fn run_that_was_refused_ends_with_dockers_code_and_the_same_words() {
        let error: anyhow::Error = Problem::Run(refused(refusal(Code::NotFound))).into();
        assert_eq!(exit_code(&error), ExitCode::RUN_REFUSED);
        assert_eq!(
            render(&error, false),
            "shore: host port 8080/tcp is taken\n"
        );
    }

    #[test]
    fn every_code_has_an_exit_code_that_scripts_can_tell_apart() {
        for (code, expected) in [
            (Code::InvalidArgument, ExitCode::USAGE),
            (Code::NotFound, ExitCode::NOT_FOUND),
            (Code::AlreadyExists, ExitCode::CONFLICT),
            (Code::Aborted, ExitCode::CONFLICT),
            (Code::Unavailable, ExitCode::UNAVAILABLE),
            (Code::Internal, ExitCode::FAILURE),
            (Code::PermissionDenied, ExitCode::FAILURE),
        ] {
            assert_eq!(exit_code(&refused(refusal(code))), expected, "{code:?}");
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let error = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(exit_code(&error.context("writing")), ExitCode::OK);
    }

    #[test]
    fn colours_come_only_when_wanted() {
        let error = refused(refusal(Code::NotFound));
        assert!(!render(&error, false).contains('\u{1b}'));
        assert!(render(&error, true).contains('\u{1b}'));
    }
}
