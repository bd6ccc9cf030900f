//! Harness and end-to-end tests: a real agent, real registry, real kernel objects.
