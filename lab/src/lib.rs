//! The test bench of Selvedge: network namespaces, the parts of a flannel cluster that run in
//! them, and the questions a test asks about packets.
//!
//! Tests and `examples/lab` share it; the product never depends on it.

pub mod api;
pub mod apiserver;
pub mod capture;
pub mod claims;
pub mod client;
pub mod controlplane;
pub mod dumps;
pub mod family;
pub mod flannel;
pub mod kg;
pub mod lab;
pub mod leftover;
pub mod matrix;
pub mod netns;
pub mod node;
pub mod pki;
pub mod pod;
pub mod process;
pub mod scratch;
pub mod steps;
pub mod topology;
pub mod traffic;

pub use client::Client;
pub use controlplane::ControlPlane;
pub use lab::Lab;
pub use leftover::teardown;
pub use netns::Namespace;
pub use node::Node;
pub use process::{Process, wait_for};
pub use scratch::{Scratch, scratch};
pub use steps::Steps;
