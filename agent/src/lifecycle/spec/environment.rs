//! Environment variables: values are any octets, the OCI specification's are text.
//!
//! Octets that are not UTF-8 are written as two noncharacters each, which Unicode sets aside for
//! such use inside a program: U+FDD0 + high half, U+FDE0 + low half. A value that has noncharacters
//! of its own has their octets written so, too; thus every value comes back as it was.

use oci_spec::runtime::Process;

const HIGH: u32 = 0xFDD0;
const LOW: u32 = 0xFDE0;

/// Variables in the order in which their names came up; the last value of a name counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Environment(Vec<(String, Vec<u8>)>);

impl Environment {
    /// The environment of a process whose specification this chapter wrote.
    pub(super) fn of(process: &Process) -> Self {
        let mut env = Self::default();
        for entry in process.env().iter().flatten() {
            if let Some((name, value)) = entry.split_once('=') {
                // `=` never is part of an encoded octet.
                env.set(String::from_utf8_lossy(&decode(name)), decode(value));
            }
        }
        env
    }

    pub(super) fn set(&mut self, name: impl Into<String>, value: impl Into<Vec<u8>>) {
        let (name, value) = (name.into(), value.into());
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => self.0.push((name, value)),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| known == name)
    }

    /// `NAME=value` as text.
    pub(super) fn encoded(&self) -> Vec<String> {
        self.0
            .iter()
            .map(|(name, value)| format!("{}={}", encode(name.as_bytes()), encode(value)))
            .collect()
    }
}

/// The environment of a process as octets, if its text stands for other octets than its own; none
/// if the text can be taken as it is.
pub fn env_bytes(process: &Process) -> Option<Vec<Vec<u8>>> {
    let env = process.env().as_deref().unwrap_or_default();
    env.iter()
        .any(|entry| entry.contains(is_noncharacter))
        .then(|| env.iter().map(|entry| decode(entry)).collect())
}

fn is_noncharacter(c: char) -> bool {
    (HIGH..LOW + 16).contains(&u32::from(c))
}

fn encode(value: &[u8]) -> String {
    let mut text = String::with_capacity(value.len());
    for chunk in value.utf8_chunks() {
        for c in chunk.valid().chars() {
            if is_noncharacter(c) {
                encode_octets(c.encode_utf8(&mut [0; 4]).as_bytes(), &mut text);
            } else {
                text.push(c);
            }
        }
        encode_octets(chunk.invalid(), &mut text);
    }
    text
}

fn encode_octets(octets: &[u8], text: &mut String) {
    for &octet in octets {
        for half in [HIGH + u32::from(octet >> 4), LOW + u32::from(octet & 15)] {
            text.push(char::from_u32(half).expect("noncharacters are scalar values"));
        }
    }
}

/// Undoes [`encode`]; halves that are alone, which it never writes, stay as they are.
fn decode(text: &str) -> Vec<u8> {
    let mut value = Vec::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    let half = |c: char, first: u32| u32::from(c).checked_sub(first).filter(|&half| half < 16);
    while let Some(c) = rest.next() {
        let pair = half(c, HIGH).zip(rest.peek().and_then(|&low| half(low, LOW)));
        match pair.and_then(|(high, low)| u8::try_from(high << 4 | low).ok()) {
            Some(octet) => {
                rest.next();
                value.push(octet);
            }
            None => value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_text_stays_as_it_is() {
        for text in ["", "plain", "with = and\nnewline", "grüße 🦀"] {
            assert_eq!(encode(text.as_bytes()), text);
            assert_eq!(decode(text), text.as_bytes());
        }
    }

    #[test]
    fn an_environment_with_other_octets_comes_back_whole() {
        let mut env = Environment::default();
        env.set("A", "first");
        env.set("RAW", vec![0xff, b'x', 0x80]);
        env.set("A", "last");
        let mut process = Process::default();
        process.set_env(Some(env.encoded()));
        assert_eq!(
            env_bytes(&process).expect("not text"),
            [b"A=last".to_vec(), b"RAW=\xffx\x80".to_vec()]
        );
        assert_eq!(Environment::of(&process), env);

        process.set_env(Some(vec!["A=b".to_owned()]));
        assert_eq!(env_bytes(&process), None);
    }

    proptest! {
        #[test]
        fn every_value_comes_back(value in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(decode(&encode(&value)), value);
        }

        #[test]
        fn every_text_comes_back(text in "[\u{fdc0}-\u{fdff}a=]{0,16}") {
            prop_assert_eq!(decode(&encode(text.as_bytes())), text.into_bytes());
        }
    }
}
