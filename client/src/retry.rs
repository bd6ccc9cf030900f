//! Repeating a call that changed nothing.

use std::time::Duration;

/// How often, and how patiently, a safe call is repeated while the agent is unavailable.
///
/// An agent that restarts is away for some tens of milliseconds; the waits double from `first` to
/// `longest`, so a restart costs little and a dead agent is reported within `attempts` waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// How many times the call is made at most, the first one included.
    pub attempts: u32,
    /// The wait before the second attempt.
    pub first: Duration,
    /// No wait is longer than this.
    pub longest: Duration,
}

impl Retry {
    /// Calls once.
    pub const NEVER: Self = Self {
        attempts: 1,
        first: Duration::ZERO,
        longest: Duration::ZERO,
    };

    /// About a minute: for what follows an agent through its restarts, as a watch or a pull.
    pub const PATIENT: Self = Self {
        attempts: 35,
        first: Duration::from_millis(50),
        longest: Duration::from_secs(2),
    };

    /// The wait after the attempt numbered `attempt` (from 1) failed; `None` when it was the last.
    ///
    /// `asked` is what the agent itself asked for in its error, and wins when it is longer.
    #[must_use]
    pub fn wait_after(&self, attempt: u32, asked: Option<Duration>) -> Option<Duration> {
        if attempt >= self.attempts {
            return None;
        }
        let factor = 1_u32
            .checked_shl(attempt.saturating_sub(1))
            .unwrap_or(u32::MAX);
        let own = self.first.saturating_mul(factor).min(self.longest);
        Some(asked.map_or(own, |asked| own.max(asked.min(self.longest))))
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 5,
            first: Duration::from_millis(50),
            longest: Duration::from_secs(2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_then_end() {
        let retry = Retry {
            attempts: 4,
            first: Duration::from_millis(100),
            longest: Duration::from_millis(300),
        };
        let waits: Vec<_> = (1..=4)
            .map(|attempt| retry.wait_after(attempt, None).map(|wait| wait.as_millis()))
            .collect();
        assert_eq!(waits, [Some(100), Some(200), Some(300), None]);
    }

    #[test]
    fn the_agents_wish_is_kept_but_bounded() {
        let retry = Retry::default();
        let asked = Some(Duration::from_millis(700));
        assert_eq!(retry.wait_after(1, asked), asked);
        assert_eq!(
            retry.wait_after(1, Some(Duration::from_secs(3600))),
            Some(retry.longest)
        );
        assert_eq!(Retry::NEVER.wait_after(1, asked), None);
    }

    #[test]
    fn a_great_attempt_number_does_not_overflow() {
        let retry = Retry {
            attempts: u32::MAX,
            ..Retry::default()
        };
        assert_eq!(retry.wait_after(200, None), Some(retry.longest));
    }
}
