//! Selvedge: joins the regions of a flannel cluster through WireGuard tunnels between leaders.
//!
//! `Snapshot → Topology → State → Vec<Change>` ([`topology`], [`plan`], [`diff`]) is pure: no clock,
//! no I/O. A thin shell reads the cluster ([`cluster`], [`flannel`]) and the kernel ([`kernel`]) and
//! applies changes ([`agent`]). Packets run on their own threads ([`wireguard`]).

pub mod agent;
pub mod cli;
mod clock;
pub mod cluster;
pub mod config;
pub mod connect;
pub mod diff;
pub mod doctor;
mod envelope;
pub mod flannel;
pub mod graph;
pub mod guard;
pub mod kernel;
pub mod liveness;
mod node_lock;
pub mod pages;
pub mod plan;
pub mod policy;
mod port_holder;
pub mod preflight;
pub mod probe;
pub mod reconciler;
pub mod refusal;
pub mod resolve;
mod secure_file;
pub mod showconf;
pub mod state;
pub mod status;
pub mod survey;
pub mod telemetry;
pub mod text;
pub mod topology;
mod trim_memory;
pub mod tunnel;
pub mod wireguard;
