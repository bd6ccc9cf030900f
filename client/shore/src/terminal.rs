//! The terminal that `shore` runs in: is it one, its size, raw mode, and the keys that leave it.

use std::{
    env,
    io::{self, IsTerminal, Write as _},
    os::fd::{AsFd, BorrowedFd},
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Whether standard input and output are both a terminal: what `-t` needs.
pub(crate) fn interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Whether standard error is a terminal that can redraw lines: what progress bars need.
pub(crate) fn can_redraw() -> bool {
    io::stderr().is_terminal() && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether `stream` may be coloured: a terminal, and <https://no-color.org> not asked for.
pub(crate) fn colours(stream: &impl IsTerminal) -> bool {
    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
    stream.is_terminal() && !no_color && !dumb
}

/// Tells something beside the result; with standard error gone there is nobody left to tell.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Columns and rows of the terminal, if there is one that knows.
pub(crate) fn size() -> Option<(u32, u32)> {
    let size = tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| (size.ws_col.into(), size.ws_row.into()))
}

/// Raw mode of standard input for as long as this lives.
///
/// Dropping it restores the mode that was found, on every way out but a signal that kills.
#[derive(Debug)]
pub(crate) struct RawMode {
    found: Termios,
}

impl RawMode {
    /// Every byte goes to the container as typed, the keys of job control included.
    pub(crate) fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let found = tcgetattr(&stdin)?;
        let mut raw = found.clone();
        raw.make_raw();
        set(stdin.as_fd(), &raw)?;
        Ok(Self { found })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing better can be done for a terminal that has gone away.
        let _ = set(io::stdin().as_fd(), &self.found);
    }
}

fn set(terminal: BorrowedFd<'_>, mode: &Termios) -> io::Result<()> {
    Ok(tcsetattr(terminal, OptionalActions::Drain, mode)?)
}

/// The keys that leave a container without ending it, as docker writes them: `ctrl-p,ctrl-q`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys {
    keys: Vec<u8>,
    /// The first one twice is sent once, as the escape of a console is.
    doubled: bool,
}

impl DetachKeys {
    /// No keys: there is no way to leave.
    pub(crate) const fn none() -> Self {
        Self {
            keys: Vec::new(),
            doubled: false,
        }
    }

    /// The escape of a console, `^a` or a single letter for control and that letter, then `q`; `none`
    /// for no way to leave.
    pub(crate) fn escape(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::none());
        }
        match text.strip_prefix('^').unwrap_or(text).as_bytes() {
            [letter] if letter.is_ascii_alphabetic() => Ok(Self {
                keys: vec![letter.to_ascii_lowercase() & 0x1f, b'q'],
                doubled: true,
            }),
            _ => Err(format!(
                "`{text}` is no escape: write ^ and a letter, as in ^a, or none"
            )),
        }
    }

    /// Reads a list of `ctrl-<letter>` and single characters, separated by commas.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::none());
        }
        let keys = text.split(',').map(key).collect::<Result<_, _>>()?;
        Ok(Self {
            keys,
            doubled: false,
        })
    }
}

impl std::fmt::Display for DetachKeys {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, key) in self.keys.iter().enumerate() {
            let space = if at == 0 { "" } else { " " };
            match key {
                0..0x20 => write!(out, "{space}Ctrl-{}", char::from(key | 0x60))?,
                key => write!(out, "{space}{}", char::from(*key))?,
            }
        }
        Ok(())
    }
}

fn key(name: &str) -> Result<u8, String> {
    let control = name.strip_prefix("ctrl-").map(str::as_bytes);
    match (control, name.as_bytes()) {
        (Some([letter @ (b'a'..=b'z' | b'@' | b'[' | b']' | b'\\' | b'^' | b'_')]), _) => {
            Ok(letter & 0x1f)
        }
        (None, [byte]) if byte.is_ascii_graphic() => Ok(*byte),
        _ => Err(format!(
            "`{name}` is not a key: write a character, or ctrl- and a letter, as in ctrl-p,ctrl-q"
        )),
    }
}

/// Finds the detach keys in what is typed, also when they come in several reads.
#[derive(Debug)]
pub(crate) struct DetachWatch {
    keys: Vec<u8>,
    doubled: bool,
    matched: usize,
}

/// What is left of some input after looking for the detach keys.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Typed {
    /// Bytes for the container.
    pub(crate) forward: Vec<u8>,
    /// The keys were pressed; what came after them is dropped.
    pub(crate) detach: bool,
}

impl DetachWatch {
    pub(crate) fn new(keys: &DetachKeys) -> Self {
        Self {
            keys: keys.keys.clone(),
            doubled: keys.doubled,
            matched: 0,
        }
    }

    /// Takes the next bytes; a beginning of the keys is held back until it is known to be none.
    pub(crate) fn feed(&mut self, input: &[u8]) -> Typed {
        let mut forward = Vec::with_capacity(input.len());
        if self.keys.is_empty() {
            forward.extend_from_slice(input);
            return Typed {
                forward,
                detach: false,
            };
        }
        for &byte in input {
            if self.doubled && self.matched == 1 && byte == self.keys[0] {
                forward.push(byte);
                self.matched = 0;
                continue;
            }
            if byte == self.keys[self.matched] {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return Typed {
                        forward,
                        detach: true,
                    };
                }
                continue;
            }
            forward.extend_from_slice(&self.keys[..self.matched]);
            self.matched = usize::from(byte == self.keys[0]);
            if self.matched == 0 {
                forward.push(byte);
            } else if self.keys.len() == 1 {
                return Typed {
                    forward,
                    detach: true,
                };
            }
        }
        Typed {
            forward,
            detach: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_written_as_docker_does() {
        assert_eq!(DetachKeys::parse("ctrl-p,ctrl-q"), Ok(plain(&[16, 17])));
        assert_eq!(DetachKeys::parse("~,."), Ok(plain(b"~.")));
        assert_eq!(DetachKeys::parse("ctrl-]"), Ok(plain(&[0x1d])));
        assert_eq!(DetachKeys::parse(""), Ok(plain(&[])));
        for bad in ["ctrl-", "ctrl-pp", "control-p", "ctrl-p,", "ctrl-1", " "] {
            assert!(DetachKeys::parse(bad).is_err(), "{bad}");
        }
    }

    fn plain(keys: &[u8]) -> DetachKeys {
        DetachKeys {
            keys: keys.to_vec(),
            doubled: false,
        }
    }

    fn watch() -> DetachWatch {
        DetachWatch::new(&plain(&[16, 17]))
    }

    #[test]
    fn the_escape_of_a_console_can_be_typed_and_sent() {
        let watch = || DetachWatch::new(&DetachKeys::escape("^a").expect("an escape"));
        check(&mut watch(), b"ls\x01q", b"ls", true);
        check(&mut watch(), b"\x01\x01q", b"\x01q", false);
        check(&mut watch(), b"\x01x", b"\x01x", false);
        check(&mut watch(), b"\x01\x01\x01q", b"\x01", true);
        assert_eq!(DetachKeys::escape("none"), Ok(DetachKeys::none()));
        assert_eq!(DetachKeys::escape("b"), DetachKeys::escape("^B"));
        for bad in ["", "^", "^1", "ab"] {
            assert!(DetachKeys::escape(bad).is_err(), "{bad}");
        }
    }

    #[track_caller]
    fn check(watch: &mut DetachWatch, input: &[u8], forward: &[u8], detach: bool) {
        let expected = Typed {
            forward: forward.to_vec(),
            detach,
        };
        assert_eq!(watch.feed(input), expected);
    }

    #[test]
    fn keys_in_one_read_and_in_two_both_detach() {
        check(&mut watch(), b"ls\x10\x11rest", b"ls", true);
        let mut watch = watch();
        check(&mut watch, b"\x10", b"", false);
        check(&mut watch, b"\x11", b"", true);
    }

    #[test]
    fn half_of_the_keys_reaches_the_container_late_but_whole() {
        let mut watch = watch();
        check(&mut watch, b"a\x10", b"a", false);
        check(&mut watch, b"b", b"\x10b", false);
        check(&mut watch, b"\x10\x10\x11", b"\x10", true);
    }

    #[test]
    fn without_keys_everything_is_forwarded() {
        let mut watch = DetachWatch::new(&DetachKeys::none());
        check(&mut watch, b"\x10\x11", b"\x10\x11", false);
    }
}
