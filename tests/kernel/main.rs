//! The kernel side against the real kernel, in network namespaces: run as root.
//!
//! What is asserted is what an operator would look at: `ip`, `nft` and packets.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod firewall;
mod fixture;
mod flannel;
mod guard;
mod leaks;
mod linux;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "../unit/mesh.rs"]
mod mesh;
mod rules;
mod state;
mod underlay;
mod watching;
