//! The one event loop: snapshot, kernel event, timer or signal → plan → apply.

pub mod address;
pub mod control;
pub mod keyfile;
pub mod preflight;
pub mod publication;
pub mod reconcile;
pub mod report;
pub mod resolve;
pub mod schedule;

use std::process::ExitCode;

use crate::config::Config;
use crate::telemetry;

/// Runs the agent until it is told to stop.
pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    telemetry::start_logging(config.log_level, config.log_format);
    for note in &config.notes {
        tracing::info!("{note}");
    }
    Ok(ExitCode::SUCCESS)
}
