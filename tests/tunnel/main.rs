//! The tunnel under stress, in network namespaces: a flood of handshakes, sessions that are renewed under load,
//! and everything that a sender without a key can try.
//!
//! One test at a time, since most of them measure.

use std::sync::{Mutex, MutexGuard, PoisonError};

mod echoes;
mod handshake_flood;
#[expect(dead_code, reason = "made for the conformance tests")]
#[path = "../conformance/pair.rs"]
mod pair;
mod session_renewal;
mod strangers;
#[expect(dead_code, reason = "made for the conformance tests")]
#[expect(
    clippy::disallowed_methods,
    reason = "a harness starts programs and waits for them"
)]
#[path = "../conformance/tunnel.rs"]
mod tunnel;

/// Held by each test while it runs. Without it a program that another test starts would hold every socket of
/// this process from its fork until it runs, so a port that a device has left would stay taken.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed is no reason for the others to fail.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
