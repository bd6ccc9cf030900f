//! One file per noun, one struct per verb: its arguments, then `run`.

mod attach;
mod completion;
mod container;
mod events;
mod exec;
mod image;
mod inspect;
mod logs;
mod network;
mod node;
mod operation;
mod pod;
mod run;
mod stats;
mod system;
mod target;

use std::future::Future;

use anyhow::Result;
use clap::{
    Parser, Subcommand,
    builder::styling::{AnsiColor, Styles},
};
use futures_util::future::join_all;

use crate::{
    app::{App, Global},
    error,
    exit_code::ExitCode,
};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// Runs and looks after containers on Longshore nodes.
#[derive(Debug, Parser)]
#[command(
    name = "shore",
    version,
    styles = STYLES,
    disable_help_subcommand = true,
    after_help = "Pods and containers are named by id, by the beginning of an id, by name, or as POD/CONTAINER.\n\
                  Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 agent unavailable;\n\
                  run, exec and attach end with the container's own, and run with 125 if it could not start."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) global: Global,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new container, pulling the image if it is missing
    Run(run::Run),
    /// Make a container without starting it
    Create(run::Create),
    /// Start containers that were made and not yet started
    Start(container::Start),
    /// List containers
    Ps(container::Ps),
    /// List pods
    Pods(pod::Pods),
    /// Run a command in a running container
    Exec(exec::Exec),
    /// Connect to a running container
    Attach(attach::Attach),
    /// Show what a container wrote
    Logs(logs::Logs),
    /// Stop pods or containers
    Stop(target::Stop),
    /// Send a signal to containers
    Kill(container::Kill),
    /// Wait until containers have ended, and print their exit codes
    Wait(container::Wait),
    /// Remove pods or containers
    Rm(target::Rm),
    /// Show all about pods, containers, images and networks
    Inspect(inspect::Inspect),
    /// Show what pods and containers use
    Stats(stats::Stats),
    /// Show what happens
    Events(events::Events),

    /// Pull images
    Pull(image::Pull),
    /// List images, and what remotes offer
    #[command(visible_alias = "image")]
    Images(image::Images),
    /// Give an image one more name
    Tag(image::Tag),
    /// Remove names of images, and images with their last name
    Rmi(image::Rmi),
    /// Remove images that nothing uses
    Prune(image::Prune),

    /// Run whole systems: a distribution's own init, with an address and a console
    System(system::System),
    /// List networks and who has which addresses
    Network(network::Network),
    /// Show and control what the agent is doing
    Operations(operation::Operations),
    /// Show the agent and its host
    Info(node::Info),
    /// Show what images and containers take on disk
    Df(node::Df),
    /// Find what is amiss with host and configuration
    Check(node::Check),
    /// Compare what the agent knows with what there is
    Fsck(node::Fsck),
    /// Print what makes a shell complete shore's commands and live names
    Completion(completion::Completion),
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        match self {
            Self::Run(command) => command.run(app).await,
            Self::Create(command) => command.run(app).await,
            Self::Start(command) => command.run(app).await,
            Self::Ps(command) => command.run(app).await,
            Self::Pods(command) => command.run(app).await,
            Self::Exec(command) => command.run(app).await,
            Self::Attach(command) => command.run(app).await,
            Self::Logs(command) => command.run(app).await,
            Self::Stop(command) => command.run(app).await,
            Self::Kill(command) => command.run(app).await,
            Self::Wait(command) => command.run(app).await,
            Self::Rm(command) => command.run(app).await,
            Self::Inspect(command) => command.run(app).await,
            Self::Stats(command) => command.run(app).await,
            Self::Events(command) => command.run(app).await,
            Self::Pull(command) => command.run(app).await,
            Self::Images(command) => command.run(app).await,
            Self::Tag(command) => command.run(app).await,
            Self::Rmi(command) => command.run(app).await,
            Self::Prune(command) => command.run(app).await,
            Self::System(command) => command.run(app).await,
            Self::Network(command) => command.run(app).await,
            Self::Operations(command) => command.run(app).await,
            Self::Info(command) => command.run(app).await,
            Self::Df(command) => command.run(app).await,
            Self::Check(command) => command.run(app).await,
            Self::Fsck(command) => command.run(app).await,
            Self::Completion(command) => command.run(),
        }
    }
}

/// Does `work` for each name at once; prints a line of each that worked in the order of the names,
/// and the errors of the others. The exit code is that of the first error.
async fn each<'a, F, Fut>(app: &App, names: &'a [String], work: F) -> Result<ExitCode>
where
    F: Fn(&'a str) -> Fut,
    Fut: Future<Output = Result<String>>,
{
    let results = join_all(names.iter().map(|name| work(name))).await;
    let mut code = ExitCode::OK;
    for result in results {
        match result {
            Ok(line) => app.output.line(&line)?,
            Err(error) => {
                error::report(&error);
                if code == ExitCode::OK {
                    code = error::exit_code(&error);
                }
            }
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_fits_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_every_command_stand_anywhere_before_a_containers_own() {
        for words in [
            "shore -o json ps -a",
            "shore ps -a -o json",
            "shore network ls -o yaml",
            "shore -H /run/a.sock,b=tcp://b:1 pods",
            "shore logs -fn 10 web -t --since 10m",
            "shore stop -t 5 web db",
            "shore kill -s HUP web",
            "shore events --all -k container-exited",
            "shore system create web debian:12 -m 512m --autostart",
            "shore system exec web -- ls -l",
            "shore system ls -f",
            "shore system stop -t 5 web db",
        ] {
            Cli::try_parse_from(words.split(' ')).expect(words);
        }
        for words in [
            "shore",
            "shore ps -o xml",
            "shore rm",
            "shore -H nowhere ps",
        ] {
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{words}");
        }
    }
}
