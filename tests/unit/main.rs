//! All tests that need neither root nor the programs of `lab/build.sh`: `make unit`.
//!
//! One binary, so that it is linked once. What a module needs of root or of a real API server is in
//! `tests/root`.

mod agent_sim;
mod api;
mod bad_input;
mod cli;
mod cluster_strategy;
mod documents;
mod echo_net;
mod echoes;
mod failover;
mod fake_kernel;
mod fuzz_corpus;
mod graph_and_showconf;
mod imports;
mod kilo_flags;
mod kilo_model;
mod manifests;
mod mesh;
mod no_allocation;
mod plan;
mod reconcile;
mod refused;
