//! `selvedge connect`: an external peer on this machine, kept in step with the cluster.
//!
//! Registers a `Peer`, runs a tunnel device of its own, and routes the cluster's addresses into it. What
//! the machine should look like is a [`State`](crate::state::State), as with the agent, so that routes
//! are compared with the kernel's and nothing but the own tables is touched. Unlike the agent it only
//! looks at the cluster from time to time.

mod command;
mod plan;
mod registration;

pub use command::{Args, run};
