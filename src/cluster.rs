//! Access to the Kubernetes API: finding a server, watching Nodes and Peers, publishing.
//!
//! What the objects mean together is not decided here ([`crate::topology`] does), and nothing the
//! data plane does waits for the API.

pub mod annotation;
pub mod node;
mod object;
pub mod peer;
mod rejected;

pub use node::ParseSettings;
pub use rejected::{Object, Rejected, quote};
