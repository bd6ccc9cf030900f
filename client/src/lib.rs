//! Client of one or many Longshore agents.
