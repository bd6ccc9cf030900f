//! The container node agent.
