//! The agent and the API server: a contract that the stand-in keeps as a real kube-apiserver does, then faults
//! that only the stand-in can be made to show.

#![expect(
    clippy::disallowed_methods,
    reason = "tests wait for other programs, by the clock"
)]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod access;
mod bench;
mod contract;
mod faults;
mod on_the_stand_in;
