//! Selvedge: joins the regions of a flannel cluster through WireGuard tunnels between leaders.
//!
//! `Snapshot → Topology → State → Vec<Change>` ([`topology`], [`plan`], [`diff`]) is pure: no clock,
//! no I/O. Around it stands a thin shell that reads the cluster ([`cluster`], [`flannel`]) and the
//! kernel ([`kernel`]) and applies changes ([`agent`]); packets run on threads of their own
//! ([`wireguard`]).

pub mod agent;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod connect;
pub mod diff;
pub mod doctor;
pub mod flannel;
pub mod graph;
pub mod guard;
pub mod kernel;
pub mod plan;
pub mod refusal;
pub mod showconf;
mod start_up;
pub mod status;
pub mod survey;
pub mod telemetry;
pub mod text;
pub mod topology;
pub mod tunnel;
pub mod wireguard;
