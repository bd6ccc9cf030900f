//! `shore`: the command line of Longshore.
//!
//! ```text
//! main.rs  command line -> App -> cmd/<noun>.rs -> exit code
//!            parse.rs    text -> values                 find.rs      name or prefix -> id
//!            session.rs  terminal <-> container          progress.rs  a pull's bars
//!            output.rs   tables, JSON, YAML              error.rs     what to do about it
//! ```
//! A verb is one file in `cmd/`: its arguments, then the story.
#![forbid(unsafe_code)]

mod app;
mod cmd;
mod complete;
mod error;
mod exit_code;
mod find;
mod human;
mod output;
mod parse;
mod progress;
mod session;
mod terminal;

use clap::{CommandFactory as _, Parser as _};

use crate::{app::App, cmd::Cli, exit_code::ExitCode};

fn main() -> std::process::ExitCode {
    clap_complete::CompleteEnv::with_factory(Cli::command).complete();
    let cli = Cli::parse();
    let code = match run(cli) {
        Ok(code) => code,
        Err(error) => {
            error::report(&error);
            error::exit_code(&error)
        }
    };
    code.into()
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(cli.command.run(&App::new(cli.global)));
    // A read of the terminal that nobody waits for any more must not hold the way out.
    runtime.shutdown_background();
    code
}
