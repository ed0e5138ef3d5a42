//! `selvedge connect`: an external peer on this host, kept in step with the cluster.
//!
//! Registers a `Peer`, runs a tunnel device of its own, and routes the cluster's addresses into it. What
//! the host should look like is a [`State`](crate::state::State), as with the agent, and the same
//! [reconciler](crate::reconciler) makes it so. Unlike the agent it only reads the cluster from time to time.

mod command;
mod plan;
mod registration;

pub use command::{Args, run};
