//! Raw kernel interfaces: every unsafe block of the agent, without domain words.
