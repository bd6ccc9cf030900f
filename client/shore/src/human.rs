//! Ages, sizes, times and shares, as people read them.

use std::time::Duration;

use jiff::Timestamp;

/// How many digits of an id people see.
const SHORT_ID: usize = 12;

/// `id` without its algorithm and cut to twelve digits.
pub(crate) fn short_id(id: &str) -> &str {
    let digits = id.rsplit_once(':').map_or(id, |(_, digits)| digits);
    digits.get(..SHORT_ID).unwrap_or(digits)
}

/// A length of time in its largest whole unit, as in `42s`, `5m`, `3h`, `12d`.
pub(crate) fn span(length: Duration) -> String {
    let seconds = length.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How long ago `then` was; a clock that went backwards shows as `0s`.
pub(crate) fn age(then: Timestamp, now: Timestamp) -> String {
    span(Duration::try_from(now.duration_since(then)).unwrap_or_default())
}

/// A size with three significant digits and a binary unit, as in `1.23MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = count as f64;
    // 999.5 and more would be shown with four digits.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{}", UNITS[unit])
}

/// A share of one, as in `12.5%`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// An instant as RFC 3339 in UTC with whole seconds.
pub(crate) fn instant(time: Timestamp) -> String {
    format!("{time:.0}")
}

/// An instant of the protocol; `None` if it is unset or no instant at all.
pub(crate) fn time(time: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    let time = time?;
    Timestamp::new(time.seconds, time.nanos).ok()
}

/// The age of an instant of the protocol; a dash if it is unset.
pub(crate) fn since(then: Option<prost_types::Timestamp>, now: Timestamp) -> String {
    time(then).map_or_else(|| "-".to_owned(), |then| age(then, now))
}

/// A length of time for the protocol.
pub(crate) fn wire_duration(length: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(length.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(length.subsec_nanos()).unwrap_or_default(),
    }
}

/// An instant for the protocol.
pub(crate) fn wire_time(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.as_second(),
        nanos: time.subsec_nanosecond(),
    }
}

/// The value of an enum as a word: `CONTAINER_STATE_RUNNING` is `running`.
pub(crate) fn plain(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix)
        .unwrap_or(name)
        .replace('_', " ")
        .to_lowercase()
}

/// A reference without the registry that everybody leaves out.
pub(crate) fn familiar(reference: &str) -> &str {
    let Some(rest) = reference.strip_prefix("docker.io/") else {
        return reference;
    };
    rest.strip_prefix("library/").unwrap_or(rest)
}

/// `text` cut to `width` characters, with an ellipsis where something is missing.
pub(crate) fn cut(text: &str, width: usize) -> String {
    let text = text.replace(['\n', '\t', '\r'], " ");
    if text.chars().count() <= width {
        return text;
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_shown_in_their_largest_unit() {
        for (seconds, expected) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7_199, "119m"),
            (7_200, "2h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (864_000, "10d"),
        ] {
            assert_eq!(span(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn an_age_is_never_negative() {
        let now = Timestamp::from_second(1_000).expect("in range");
        let later = Timestamp::from_second(1_060).expect("in range");
        assert_eq!(age(now, later), "60s");
        assert_eq!(age(later, now), "0s");
    }

    #[test]
    fn sizes_have_three_digits() {
        for (count, expected) in [
            (0, "0B"),
            (999, "999B"),
            (1_000, "0.98KiB"),
            (1_024, "1.00KiB"),
            (10_240, "10.0KiB"),
            (1_048_576, "1.00MiB"),
            (104_857_600, "100MiB"),
            (1_047_527_424, "999MiB"),
            (u64::MAX, "16.0EiB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
    }

    #[test]
    fn shares_instants_and_ids() {
        assert_eq!(percent(0.125), "12.5%");
        let time = Timestamp::from_millisecond(1_700_000_000_987).expect("in range");
        assert_eq!(instant(time), "2023-11-14T22:13:20Z");
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short_id("0123456789abcdef"), "0123456789ab");
        assert_eq!(short_id("abc"), "abc");
    }

    #[test]
    fn long_text_is_cut_with_an_ellipsis() {
        assert_eq!(cut("echo hello", 20), "echo hello");
        assert_eq!(cut("echo\nhello", 20), "echo hello");
        assert_eq!(cut("echo hello", 5), "echo…");
    }

    #[test]
    fn names_of_values_and_images_are_shortened() {
        assert_eq!(
            plain("CONTAINER_STATE_RUNNING", "CONTAINER_STATE_"),
            "running"
        );
        assert_eq!(
            plain("SANDBOX_STATE_NOT_READY", "SANDBOX_STATE_"),
            "not ready"
        );
        assert_eq!(
            familiar("docker.io/library/busybox:latest"),
            "busybox:latest"
        );
        assert_eq!(familiar("docker.io/me/app:1"), "me/app:1");
        assert_eq!(familiar("ghcr.io/me/app:1"), "ghcr.io/me/app:1");
    }
}
