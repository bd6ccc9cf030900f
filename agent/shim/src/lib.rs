//! The supervisor of one pod: outlives the agent, owns stdio, logs and exit codes.
