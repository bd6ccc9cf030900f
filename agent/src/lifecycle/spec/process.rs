//! The first process of a container, and execs beside it.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    BoxBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process, Spec,
};

use super::{
    super::container::{ContainerConfig, RlimitWish, User},
    SpecError,
    environment::Environment,
};
use crate::image::ImageConfig;

/// Where commands are looked for, where nobody says.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_TERM: &str = "xterm";
/// SIGTERM.
const DEFAULT_STOP_SIGNAL: i32 = 15;
/// The highest real-time signal.
const LAST_SIGNAL: i32 = 64;
const NO_NUL: &str = "text without a NUL character";

/// One more process for a running container.
#[derive(Clone, Debug, Default)]
pub struct ExecProcess {
    /// Program and arguments.
    pub command: Vec<String>,
    /// On top of the container's; values are any octets.
    pub env: Vec<(String, Vec<u8>)>,
    /// None is the container's.
    pub working_dir: Option<String>,
    /// None is the container's.
    pub user: Option<User>,
    /// On a terminal.
    pub tty: bool,
    /// Size of the terminal: columns, rows.
    pub size: Option<(u16, u16)>,
}

/// The process of an exec: all that the wish does not say equals the container's first process.
///
/// # Errors
/// `NoCommand`, `InvalidValue`.
pub fn exec_process(base: &Spec, wish: ExecProcess) -> Result<Process, SpecError> {
    let mut process = base.process().clone().ok_or_else(|| {
        SpecError::invalid("process", "missing", "in the container's specification")
    })?;
    let mut env = Environment::of(&process);
    if let Some(user) = &wish.user {
        // Unless the wish says so itself, below.
        env.set("HOME", user.home.clone());
        process.set_user(oci_user(user));
    }
    if wish.tty && !env.has("TERM") {
        env.set("TERM", DEFAULT_TERM);
    }
    add_wished(&mut env, wish.env)?;
    let size = wish.size.filter(|_| wish.tty).map(|(columns, rows)| {
        BoxBuilder::default()
            .width(u64::from(columns))
            .height(u64::from(rows))
            .build()
            .expect("all fields are given")
    });
    if let Some(dir) = wish.working_dir.filter(|dir| !dir.is_empty()) {
        process.set_cwd(absolute("working_dir", &dir)?);
    }
    process
        .set_args(Some(runnable(wish.command)?))
        .set_env(Some(env.encoded()))
        .set_terminal(Some(wish.tty))
        .set_console_size(size);
    Ok(process)
}

/// What a container runs.
///
/// ```text
///  command  args    runs
///     -       -     image entrypoint + image cmd
///     -      set    image entrypoint + args
///    set      ?     command + args; nothing of the image
/// ```
pub(super) fn args(
    config: &ContainerConfig,
    image: &ImageConfig,
) -> Result<Vec<String>, SpecError> {
    if !config.command.is_empty() {
        return runnable([&config.command[..], &config.args].concat());
    }
    // An entrypoint of one empty word is how a Dockerfile takes it away.
    let entrypoint = match &image.entrypoint[..] {
        [only] if only.is_empty() => &[],
        entrypoint => entrypoint,
    };
    let args = if config.args.is_empty() {
        &image.cmd
    } else {
        &config.args
    };
    runnable([entrypoint, args].concat())
}

fn runnable(args: Vec<String>) -> Result<Vec<String>, SpecError> {
    if args.first().is_none_or(String::is_empty) {
        return Err(SpecError::NoCommand);
    }
    match args.iter().find(|arg| arg.contains('\0')) {
        Some(arg) => Err(SpecError::invalid("command", arg, NO_NUL)),
        None => Ok(args),
    }
}

/// PATH, HOSTNAME, the image's, then the container's; a terminal's type and the user's home unless
/// one of them says so.
pub(super) fn environment(
    config: &ContainerConfig,
    image: &ImageConfig,
    hostname: &str,
    user: &User,
) -> Result<Environment, SpecError> {
    let mut env = Environment::default();
    env.set("PATH", DEFAULT_PATH);
    env.set("HOSTNAME", hostname);
    if config.tty {
        env.set("TERM", DEFAULT_TERM);
    }
    for entry in &image.env {
        // Without a value it is no variable, and an image has no place for an error to be seen.
        if let Some((name, value)) = entry.split_once('=').filter(|(name, _)| !name.is_empty())
            && !entry.contains('\0')
        {
            env.set(name, value);
        }
    }
    add_wished(&mut env, config.env.iter().cloned())?;
    if !env.has("HOME") {
        env.set("HOME", user.home.clone());
    }
    Ok(env)
}

/// What the container says, and nothing else.
pub(super) fn own_environment(config: &ContainerConfig) -> Result<Environment, SpecError> {
    let mut env = Environment::default();
    add_wished(&mut env, config.env.iter().cloned())?;
    Ok(env)
}

fn add_wished(
    env: &mut Environment,
    wished: impl IntoIterator<Item = (String, Vec<u8>)>,
) -> Result<(), SpecError> {
    for (name, value) in wished {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(SpecError::invalid(
                "env",
                name,
                "a name that is not empty and has no '=' and no NUL",
            ));
        }
        if value.contains(&0) {
            let value = String::from_utf8_lossy(&value);
            return Err(SpecError::invalid(
                format!("env[{name:?}]"),
                value,
                "a value without NUL",
            ));
        }
        env.set(name, value);
    }
    Ok(())
}

/// Where it starts: the container's, else the image's, else the root.
pub(super) fn working_dir(
    config: &ContainerConfig,
    image: &ImageConfig,
) -> Result<PathBuf, SpecError> {
    if !config.working_dir.is_empty() {
        return absolute("working_dir", &config.working_dir);
    }
    let from_image = Path::new("/").join(&image.working_dir);
    absolute("image.working_dir", &from_image.to_string_lossy())
}

/// A path in the container, without `.`, `..` and doubled slashes. It is still resolved inside the
/// container's root later: links may lead anywhere there, and nowhere else.
pub(super) fn absolute(field: &str, path: &str) -> Result<PathBuf, SpecError> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(SpecError::invalid(field, path, "an absolute path"));
    }
    let mut clean = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    Ok(clean)
}

pub(super) fn oci_user(user: &User) -> oci_spec::runtime::User {
    let mut oci = oci_spec::runtime::User::default();
    oci.set_uid(user.uid)
        .set_gid(user.gid)
        .set_additional_gids(Some(user.supplemental_gids.clone()));
    oci
}

/// Limits of processes; none is set that is not asked for.
pub(super) fn rlimits(wished: &[RlimitWish]) -> Result<Vec<PosixRlimit>, SpecError> {
    let mut limits: Vec<PosixRlimit> = Vec::new();
    for wish in wished {
        let kind: PosixRlimitType = wish.name.parse().map_err(|_| {
            SpecError::invalid(
                "rlimits.name",
                &wish.name,
                "RLIMIT_NOFILE or another of getrlimit(2)",
            )
        })?;
        if wish.soft > wish.hard {
            return Err(SpecError::invalid(
                format!("rlimits[{}].soft", wish.name),
                wish.soft,
                "at most the hard limit",
            ));
        }
        if limits.iter().any(|limit| limit.typ() == kind) {
            return Err(SpecError::invalid("rlimits.name", &wish.name, "there once"));
        }
        let limit = PosixRlimitBuilder::default()
            .typ(kind)
            .soft(wish.soft)
            .hard(wish.hard)
            .build()
            .expect("all fields are given");
        limits.push(limit);
    }
    Ok(limits)
}

/// The signal that asks it to stop: the container's, else the image's, else SIGTERM.
pub(super) fn stop_signal(config: &ContainerConfig, image: &ImageConfig) -> Result<i32, SpecError> {
    match config.stop_signal {
        Some(signal) if (1..=LAST_SIGNAL).contains(&signal) => Ok(signal),
        Some(signal) => Err(SpecError::invalid(
            "stop_signal",
            signal,
            "a signal number from 1 to 64",
        )),
        // What an image says wrongly must not keep it from running.
        None => Ok(image
            .stop_signal
            .as_deref()
            .and_then(signal)
            .unwrap_or(DEFAULT_STOP_SIGNAL)),
    }
}

/// Number of a signal by number or name, with or without `SIG`, any case.
///
/// Source: signal(7), numbers of x86 and ARM; real-time signals start at 34 as in glibc.
fn signal(text: &str) -> Option<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    const RTMIN: i32 = 34;
    let upper = text.trim().to_ascii_uppercase();
    if upper.bytes().all(|b| b.is_ascii_digit()) {
        return upper
            .parse()
            .ok()
            .filter(|signal| (1..=LAST_SIGNAL).contains(signal));
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(at) = NAMES.iter().position(|known| *known == name) {
        return i32::try_from(at + 1).ok();
    }
    let offset = |text: &str, sign: char| -> Option<i32> {
        match text.strip_prefix(sign) {
            None => text.is_empty().then_some(0),
            Some(number) if number.bytes().all(|b| b.is_ascii_digit()) => number.parse().ok(),
            Some(_) => None,
        }
    };
    match name {
        "IOT" => Some(6),
        "CLD" => Some(17),
        "POLL" => Some(29),
        name => match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
            (Some(rest), _) => RTMIN.checked_add(offset(rest, '+')?),
            (_, Some(rest)) => LAST_SIGNAL.checked_sub(offset(rest, '-')?),
            _ => None,
        }
        .filter(|signal| (RTMIN..=LAST_SIGNAL).contains(signal)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::lifecycle::spec::testing::{config, image};

    fn texts(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn command_and_args_replace_what_the_image_runs() {
        for (command, own_args, entrypoint, cmd, expected) in [
            (
                &[][..],
                &[][..],
                &["e"][..],
                &["c"][..],
                Some(&["e", "c"][..]),
            ),
            (&[], &["a"], &["e"], &["c"], Some(&["e", "a"])),
            (&["x"], &["a"], &["e"], &["c"], Some(&["x", "a"])),
            (&["x"], &[], &["e"], &["c"], Some(&["x"])),
            (&[], &["a"], &[], &["c"], Some(&["a"])),
            (&[], &[], &[], &["c", "d"], Some(&["c", "d"])),
            (&[], &[], &[""], &["c"], Some(&["c"])),
            (&[], &[], &[], &[], None),
            (&[""], &["a"], &["e"], &["c"], None),
        ] {
            let mut config = config();
            config.command = texts(command);
            config.args = texts(own_args);
            let mut image = image();
            image.entrypoint = texts(entrypoint);
            image.cmd = texts(cmd);
            let found = args(&config, &image);
            match expected {
                Some(expected) => assert_eq!(found.expect("runs"), expected),
                None => assert!(matches!(found, Err(SpecError::NoCommand))),
            }
        }
        let mut config = config();
        config.command = texts(&["a", "b\0c"]);
        assert!(matches!(
            args(&config, &image()),
            Err(SpecError::InvalidValue { .. })
        ));
    }

    #[test]
    fn the_last_value_of_a_variable_counts() {
        let user = User {
            home: "/home/u".to_owned(),
            ..User::default()
        };
        let path = format!("PATH={DEFAULT_PATH}");
        for (image_env, own, tty, expected) in [
            (
                &[][..],
                vec![],
                false,
                vec![path.as_str(), "HOSTNAME=pod", "HOME=/home/u"],
            ),
            (
                &[],
                vec![],
                true,
                vec![&path, "HOSTNAME=pod", "TERM=xterm", "HOME=/home/u"],
            ),
            (
                &["PATH=/p", "TERM=vt100", "A=1", "noise", "=x"],
                vec![("A", "2"), ("HOSTNAME", "mine"), ("B", ""), ("A", "3=3")],
                true,
                vec![
                    "PATH=/p",
                    "HOSTNAME=mine",
                    "TERM=vt100",
                    "A=3=3",
                    "B=",
                    "HOME=/home/u",
                ],
            ),
            (
                &["HOME=/img"],
                vec![],
                false,
                vec![&path, "HOSTNAME=pod", "HOME=/img"],
            ),
            (
                &[],
                vec![("HOME", "/a\nb:x:0:0")],
                false,
                vec![&path, "HOSTNAME=pod", "HOME=/a\nb:x:0:0"],
            ),
        ] {
            let mut config = config();
            config.tty = tty;
            config.env = own
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()))
                .collect();
            let mut image = image();
            image.env = texts(image_env);
            let env = environment(&config, &image, "pod", &user).expect("valid");
            assert_eq!(env.encoded(), expected);
        }
    }

    #[test]
    fn variables_that_cannot_be_are_refused() {
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0")] {
            let mut config = config();
            config.env = vec![(name.to_owned(), value.as_bytes().to_vec())];
            environment(&config, &image(), "pod", &User::default()).expect_err(name);
        }
    }

    #[test]
    fn working_directory() {
        for (own, of_image, expected) in [
            ("", "", Some("/")),
            ("", "/w", Some("/w")),
            ("", "w/x", Some("/w/x")),
            ("/o", "/w", Some("/o")),
            ("/o/../../p/./q/", "/w", Some("/p/q")),
            ("rel", "/w", None),
            ("/a\0", "/w", None),
        ] {
            let mut config = config();
            config.working_dir = own.to_owned();
            let mut image = image();
            image.working_dir = of_image.to_owned();
            let found = working_dir(&config, &image).ok();
            assert_eq!(
                found.as_deref(),
                expected.map(Path::new),
                "{own:?} {of_image:?}"
            );
        }
    }

    #[test]
    fn stop_signals() {
        for (own, of_image, expected) in [
            (None, None, Some(15)),
            (None, Some("SIGINT"), Some(2)),
            (None, Some("nonsense"), Some(15)),
            (Some(9), Some("SIGINT"), Some(9)),
            (Some(0), None, None),
            (Some(65), None, None),
            (Some(-1), None, None),
        ] {
            let mut config = config();
            config.stop_signal = own;
            let mut image = image();
            image.stop_signal = of_image.map(str::to_owned);
            assert_eq!(
                stop_signal(&config, &image).ok(),
                expected,
                "{own:?} {of_image:?}"
            );
        }
        for (text, expected) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("sigKill", Some(9)),
            ("SIGSYS", Some(31)),
            ("CLD", Some(17)),
            ("28", Some(28)),
            ("0", None),
            ("65", None),
            ("", None),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMAX", Some(64)),
            ("RTMAX-14", Some(50)),
            ("RTMAX-40", None),
            ("RTMIN+31", None),
            ("RTMIN-1", None),
            ("RTMIN++1", None),
            ("SIGSIGTERM", None),
        ] {
            assert_eq!(signal(text), expected, "{text}");
        }
    }

    #[test]
    fn limits_are_set_as_asked() {
        let wish = |name: &str, soft, hard| RlimitWish {
            name: name.to_owned(),
            soft,
            hard,
        };
        let found = rlimits(&[
            wish("RLIMIT_NOFILE", 10, 20),
            wish("RLIMIT_CORE", 0, u64::MAX),
        ])
        .expect("valid");
        assert_eq!(
            serde_json::to_value(found).expect("is JSON"),
            json!([
                {"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": u64::MAX},
            ])
        );
        assert_eq!(rlimits(&[]).expect("none"), []);
        for wrong in [
            vec![wish("NOFILE", 1, 2)],
            vec![wish("RLIMIT_FUN", 1, 2)],
            vec![wish("RLIMIT_NOFILE", 3, 2)],
            vec![wish("RLIMIT_NOFILE", 1, 2), wish("RLIMIT_NOFILE", 1, 3)],
        ] {
            assert!(rlimits(&wrong).is_err(), "{wrong:?}");
        }
    }

    fn base() -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "process": {
                "terminal": true,
                "user": {"uid": 1, "gid": 2, "additionalGids": [2, 3]},
                "args": ["init"],
                "env": ["PATH=/p", "HOME=/home/one", "RAW=\u{fddf}\u{fdef}"],
                "cwd": "/w",
                "noNewPrivileges": true,
                "oomScoreAdj": 5,
                "apparmorProfile": "p",
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}],
                "capabilities": {"bounding": ["CAP_KILL"]},
            },
        }))
        .expect("valid OCI JSON")
    }

    #[test]
    fn an_exec_equals_the_first_process_but_for_what_is_wished() {
        let base = base();
        let wish = ExecProcess {
            command: texts(&["id"]),
            ..ExecProcess::default()
        };
        let found = exec_process(&base, wish.clone()).expect("runs");
        let mut expected = base.process().clone().expect("has one");
        expected
            .set_args(Some(texts(&["id"])))
            .set_terminal(Some(false));
        assert_eq!(found, expected);

        let found = exec_process(
            &base,
            ExecProcess {
                env: vec![
                    ("PATH".to_owned(), b"/q".to_vec()),
                    ("X".to_owned(), b"\xff".to_vec()),
                ],
                working_dir: Some("/else".to_owned()),
                user: Some(User {
                    uid: 7,
                    gid: 8,
                    supplemental_gids: vec![8, 9],
                    home: "/home/seven".to_owned(),
                }),
                tty: true,
                size: Some((80, 24)),
                ..wish
            },
        )
        .expect("runs");
        expected
            .set_terminal(Some(true))
            .set_console_size(
                BoxBuilder::default()
                    .width(80_u64)
                    .height(24_u64)
                    .build()
                    .ok(),
            )
            .set_cwd("/else".into())
            .set_env(Some(texts(&[
                "PATH=/q",
                "HOME=/home/seven",
                "RAW=\u{fddf}\u{fdef}",
                "TERM=xterm",
                "X=\u{fddf}\u{fdef}",
            ])));
        expected
            .user_mut()
            .set_uid(7)
            .set_gid(8)
            .set_additional_gids(Some(vec![8, 9]));
        assert_eq!(found, expected);
    }

    #[test]
    fn an_exec_that_cannot_be_is_refused() {
        let wish = |change: fn(&mut ExecProcess)| {
            let mut wish = ExecProcess {
                command: texts(&["id"]),
                ..ExecProcess::default()
            };
            change(&mut wish);
            exec_process(&base(), wish)
        };
        assert!(matches!(
            wish(|w| w.command.clear()),
            Err(SpecError::NoCommand)
        ));
        assert!(wish(|w| w.working_dir = Some("rel".to_owned())).is_err());
        assert!(wish(|w| w.env = vec![("=".to_owned(), vec![])]).is_err());
        assert!(
            exec_process(
                &Spec::default().set_process(None).clone(),
                ExecProcess::default()
            )
            .is_err()
        );
        let sized =
            wish(|w| w.size = Some((1, 1))).expect("the size is of no use without a terminal");
        assert_eq!(sized.console_size(), None);
    }
}
