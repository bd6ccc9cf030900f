//! `completion`: the line or two that make a shell ask `shore` for what comes next.

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use clap_complete::env::Shells;

use crate::exit_code::ExitCode;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shell {
    Bash,
    Elvish,
    Fish,
    Zsh,
}

/// Add to your shell's start-up file: `source <(shore completion bash)`, the same with zsh, or
/// `shore completion fish | source`
#[derive(Debug, Args)]
pub(crate) struct Completion {
    #[arg(value_enum)]
    shell: Shell,
}

impl Completion {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let name = match self.shell {
            Shell::Bash => "bash",
            Shell::Elvish => "elvish",
            Shell::Fish => "fish",
            Shell::Zsh => "zsh",
        };
        let shell = Shells::builtins();
        let shell = shell.completer(name).context("a shell that is built in")?;
        let mut script = Vec::new();
        shell.write_registration("COMPLETE", "shore", "shore", "shore", &mut script)?;
        std::io::Write::write_all(&mut std::io::stdout().lock(), &script)?;
        Ok(ExitCode::OK)
    }
}
