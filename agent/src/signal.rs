//! Signals by name and number.
//!
//! Source: signal(7); real-time signals count from 34, since the C library keeps two for itself.

/// Names without `SIG`, at their numbers less one.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
const ALIASES: [(&str, i32); 3] = [("IOT", 6), ("CLD", 17), ("POLL", 29)];
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// Number of a signal given as `SIGTERM`, `TERM`, `RTMIN+3` or `15`.
pub fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(at) = NAMES.iter().position(|known| *known == name) {
        return i32::try_from(at + 1).ok();
    }
    if let Some((_, number)) = ALIASES.iter().find(|(alias, _)| *alias == name) {
        return Some(*number);
    }
    let offset = |text: &str| {
        if text.is_empty() {
            return Some(0);
        }
        text.get(1..)?.parse::<i32>().ok()
    };
    let number = if let Some(rest) = name
        .strip_prefix("RTMIN")
        .filter(|rest| rest.is_empty() || rest.starts_with('+'))
    {
        RTMIN + offset(rest)?
    } else if let Some(rest) = name
        .strip_prefix("RTMAX")
        .filter(|rest| rest.is_empty() || rest.starts_with('-'))
    {
        RTMAX - offset(rest)?
    } else {
        return None;
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// Name of a signal, with `SIG`: `SIGTERM`, `SIGRTMIN+3`.
pub fn name(number: i32) -> Option<String> {
    let standard = usize::try_from(number - 1)
        .ok()
        .and_then(|at| NAMES.get(at));
    match (standard, number) {
        (Some(name), _) => Some(format!("SIG{name}")),
        (None, RTMIN) => Some("SIGRTMIN".into()),
        (None, RTMAX) => Some("SIGRTMAX".into()),
        (None, RTMIN..=49) => Some(format!("SIGRTMIN+{}", number - RTMIN)),
        (None, 50..=RTMAX) => Some(format!("SIGRTMAX-{}", RTMAX - number)),
        (None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree() {
        for (text, expected) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-14", Some(50)),
            ("SIGRTMAX", Some(64)),
            ("CLD", Some(17)),
            ("0", None),
            ("65", None),
            ("SIGRTMIN+31", None),
            ("SIGRTMIN-1", None),
            ("NOPE", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
        for signal in (1..=31).chain(34..=64) {
            let name = name(signal).expect("has a name");
            assert_eq!(number(&name), Some(signal), "{name}");
        }
        assert_eq!(name(32), None);
    }
}
