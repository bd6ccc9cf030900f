//! What can go wrong with system containers alone.

use std::{io, path::PathBuf};

use super::super::container::Exit;

/// Why a verb did not do it; the message is the whole story.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// The image has no init.
    #[error(
        "image {image:?} has no init: none of {} is a program in it; give the path of its init, or \
         take an image of a whole system",
        candidates.join(", ")
    )]
    NoInit {
        /// As asked.
        image: String,
        /// What was looked for.
        candidates: Vec<String>,
    },
    /// Only the engine of this agent can run an init.
    #[error("system containers need the handler \"native\", not {handler:?}")]
    Handler {
        /// As asked.
        handler: String,
    },
    /// The init ended as soon as it had begun.
    #[error("the init of {name} ended at once with {}{}", ending(.exit), console_of(.console))]
    InitEnded {
        /// Which system container.
        name: String,
        /// How.
        exit: Exit,
        /// The last lines of its console; may be empty.
        console: String,
    },
    /// One of the two files says something, and the other does not.
    #[error(
        "{present} gives {owner:?} ids and {missing} gives none: add a line `{owner}:FIRST:65536` there"
    )]
    HalfConfigured {
        /// Whom the ids are for.
        owner: String,
        /// The file with a line.
        present: &'static str,
        /// The file without.
        missing: &'static str,
    },
    /// A range is too short.
    #[error("{file} gives {owner:?} no 65536 ids in a row, which a system needs")]
    TooFewIds {
        /// The file.
        file: &'static str,
        /// Whom the ids are for.
        owner: String,
    },
    /// A line can't be understood.
    #[error("{file}, line {line}: {text:?} is not NAME:FIRST:COUNT")]
    BadIdLine {
        /// The file.
        file: &'static str,
        /// Which line, from 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// Every range belongs to a system container.
    #[error(
        "all {count} id ranges of /etc/subuid and /etc/subgid are taken: give {owner:?} more there"
    )]
    IdsExhausted {
        /// How many there are.
        count: u64,
        /// Whom the ids are for.
        owner: String,
    },
    /// A file with ids can't be read.
    #[error("cannot read {}", path.display())]
    IdFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn ending(exit: &Exit) -> String {
    match exit.signal {
        0 => format!("exit code {}", exit.code),
        signal => format!("signal {signal}"),
    }
}

fn console_of(text: &str) -> String {
    match text.trim_end() {
        "" => "; it wrote nothing to its console".to_owned(),
        text => format!("; the end of its console:\n{text}"),
    }
}
