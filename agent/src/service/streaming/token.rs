//! Tokens: what a URL of ours grants, once.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng as _;

/// Time a client has to use its URL.
const LIFE: Duration = Duration::from_secs(60);
/// Tokens that may wait at once.
pub(super) const LIMIT: usize = 1000;

/// Grants that wait for their client, by token.
pub(super) struct Tokens<G>(Mutex<HashMap<String, Waiting<G>>>);

struct Waiting<G> {
    grant: G,
    until: Instant,
}

/// There are as many tokens as there may be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UsedUp;

impl<G> Tokens<G> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    /// Keeps `grant` for the first who brings the token within a minute.
    pub(super) fn issue(&self, grant: G) -> Result<String, UsedUp> {
        self.issue_at(grant, Instant::now())
    }

    /// The grant of a token, which is used up by this.
    pub(super) fn redeem(&self, token: &str) -> Option<G> {
        self.redeem_at(token, Instant::now())
    }

    fn issue_at(&self, grant: G, now: Instant) -> Result<String, UsedUp> {
        let mut waiting = self.0.lock().expect("no panic while this lock is held");
        if waiting.len() >= LIMIT {
            waiting.retain(|_, waiting| waiting.until > now);
            if waiting.len() >= LIMIT {
                return Err(UsedUp);
            }
        }
        let token = random();
        let until = now + LIFE;
        waiting.insert(token.clone(), Waiting { grant, until });
        Ok(token)
    }

    fn redeem_at(&self, token: &str, now: Instant) -> Option<G> {
        let waiting = self
            .0
            .lock()
            .expect("no panic while this lock is held")
            .remove(token)?;
        (waiting.until > now).then_some(waiting.grant)
    }
}

/// 128 random bits: who has not been given the URL does not find it.
fn random() -> String {
    let mut raw = [0; 16];
    rand::rng().fill_bytes(&mut raw);
    URL_SAFE_NO_PAD.encode(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once() {
        let tokens = Tokens::new();
        let token = tokens.issue(7).expect("room");
        assert_eq!(tokens.redeem("another"), None);
        assert_eq!(tokens.redeem(&token), Some(7));
        assert_eq!(tokens.redeem(&token), None);
    }

    #[test]
    fn a_token_lives_for_a_minute() {
        let tokens = Tokens::new();
        let now = Instant::now();
        let early = tokens.issue_at(1, now).expect("room");
        let late = tokens.issue_at(2, now).expect("room");
        assert_eq!(
            tokens.redeem_at(&early, now + Duration::from_secs(59)),
            Some(1)
        );
        assert_eq!(tokens.redeem_at(&late, now + Duration::from_secs(60)), None);
    }

    #[test]
    fn a_thousand_wait_and_expired_ones_make_room() {
        let tokens = Tokens::new();
        let now = Instant::now();
        for grant in 0..LIMIT {
            tokens.issue_at(grant, now).expect("room");
        }
        assert_eq!(tokens.issue_at(0, now), Err(UsedUp));
        assert!(tokens.issue_at(0, now + LIFE).is_ok());
    }

    #[test]
    fn tokens_fit_a_path_segment() {
        let token = random();
        assert_eq!(token.len(), 22);
        assert!(
            token
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        );
        assert_ne!(token, random());
    }
}
