//! The agent's dealings with the API server: the same expectations on the stand-in and on a real
//! kube-apiserver, then faults that only the stand-in can be made to show.

#![expect(
    clippy::disallowed_methods,
    reason = "tests wait for other programs, by the clock"
)]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

#[path = "api/access.rs"]
mod access;
#[path = "api/bench.rs"]
mod bench;
#[path = "api/contract.rs"]
mod contract;
#[path = "api/faults.rs"]
mod faults;
