//! What can go wrong with CNI: configurations, plugins, and what plugins answer.

use std::{io, path::PathBuf, time::Duration};

use super::conf::Verb;

/// Why a network of CNI could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// There is no configuration to use.
    #[error(
        "no CNI network: {} has no valid configuration{refused}; a network add-on installs one there",
        folder.display()
    )]
    NoConf {
        /// Where it was looked for.
        folder: PathBuf,
        /// Files there that are not valid, with the reasons; empty, or begins with a colon.
        refused: String,
    },
    /// A configuration can't be used.
    #[error("CNI configuration {}: {reason}", file.display())]
    Conf {
        /// Which file.
        file: PathBuf,
        /// What is wrong, and what would be valid.
        reason: String,
    },
    /// Something of the pod can't be handed to plugins.
    #[error("{field} = {value:?} can't be given to CNI plugins: {expected}")]
    Argument {
        /// Which field or annotation.
        field: String,
        /// As given.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// A plugin is not installed.
    #[error("CNI plugin {plugin:?} of network {network:?} is in none of {folders}")]
    PluginMissing {
        /// Its type.
        plugin: String,
        /// Name of the network.
        network: String,
        /// Where it was looked for.
        folders: String,
    },
    /// A plugin could not be started or talked to.
    #[error("CNI plugin {plugin:?} of network {network:?}: cannot {action} it for {verb}")]
    Run {
        /// Its type.
        plugin: String,
        /// Name of the network.
        network: String,
        /// What it was to do.
        verb: Verb,
        /// `start` or `wait for`.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A plugin answered with an error object.
    #[error(
        "CNI plugin {plugin:?} of network {network:?} failed {verb} with code {code}: {msg}{}",
        after_colon(details)
    )]
    Plugin {
        /// Its type.
        plugin: String,
        /// Name of the network.
        network: String,
        /// What it was to do.
        verb: Verb,
        /// The specification's up to 99, the plugin's own from 100.
        code: u64,
        /// In short.
        msg: String,
        /// At length; may be empty.
        details: String,
    },
    /// A plugin failed without an error object.
    #[error(
        "CNI plugin {plugin:?} of network {network:?} failed {verb} with {status} and no error object{}",
        after_colon(said)
    )]
    Silent {
        /// Its type.
        plugin: String,
        /// Name of the network.
        network: String,
        /// What it was to do.
        verb: Verb,
        /// How it ended.
        status: String,
        /// What it wrote instead, shortened.
        said: String,
    },
    /// A plugin's answer can't be used.
    #[error("CNI plugin {plugin:?} of network {network:?} answered {verb} with {reason}")]
    Answer {
        /// Its type.
        plugin: String,
        /// Name of the network.
        network: String,
        /// What it was to do.
        verb: Verb,
        /// What is wrong with it.
        reason: String,
    },
    /// A plugin did not end in time and was killed.
    #[error("CNI plugin {plugin:?} of network {network:?} did not end {verb} within {} s", after.as_secs_f64())]
    Deadline {
        /// Its type.
        plugin: String,
        /// Name of the network.
        network: String,
        /// What it was to do.
        verb: Verb,
        /// The limit.
        after: Duration,
    },
    /// A plugin was killed because the operation is to unwind.
    #[error("CNI plugin {plugin:?} of network {network:?} was stopped in {verb}")]
    Cancelled {
        /// Its type.
        plugin: String,
        /// Name of the network.
        network: String,
        /// What it was to do.
        verb: Verb,
    },
}

fn after_colon(text: &str) -> String {
    match text {
        "" => String::new(),
        text => format!(": {text}"),
    }
}
