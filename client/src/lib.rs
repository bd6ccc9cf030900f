//! Client of one or many Longshore agents.
//!
//! ```text
//!  Address --> Client --+-- images() lifecycle() networks() ...   the generated services
//!                       +-- repeat()  safe calls, again while the agent is away
//!                       +-- all_*()   lists of every length
//!                       +-- pull()    an image, followed to its end
//!                       +-- watch()   events, read on from a cursor across reconnects
//!  Node...  --> Fleet  ---- call()    the same call on many agents, a row from each
//! ```
//!
//! An agent's errors come back as [`Error::Refused`] with a stable [`Reason`], the facts that belong
//! to it, and the fields of the request that were wrong.
//!
//! ```no_run
//! use longshore_client::{Address, Client, proto::InfoRequest};
//!
//! # async fn example() -> Result<(), longshore_client::Error> {
//! let client = Client::connect(&Address::from_env()?).await?;
//! let info = client
//!     .repeat(InfoRequest {}, |client, request| async move { client.node().info(request).await })
//!     .await?;
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod address;
mod client;
mod error;
mod fleet;
mod pages;
mod pull;
mod retry;
mod watch;

pub use address::{ADDRESS_VARIABLE, Address, AddressError, DEFAULT_SOCKET};
pub use client::{Client, MESSAGE_LIMIT_BYTES, idempotency_key};
pub use error::{Error, Refusal, Violation};
pub use fleet::{Fleet, Node, Row};
pub use pull::{Pull, PullUpdate};
pub use retry::Retry;
pub use watch::Watch;

/// The messages and services of `longshore.v1`.
pub use longshore_proto::longshore::v1 as proto;

/// The agent's stable reasons.
pub use proto::ErrorReason as Reason;
