//! `selvedge tunnel`: a plain WireGuard device, driven by `wg`.
//!
//! It stays in the foreground until SIGTERM or SIGINT, or until another program deletes its link. At the
//! end link and socket are removed. The socket appears when the device is ready.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::refusal::Refusal;
use crate::telemetry::{LogFormat, LogLevel, start_logging};
use crate::trim_memory;
use crate::wireguard::{DEFAULT_MTU, Device, Options, uapi};

/// The flags of `selvedge tunnel`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Name of the network interface to make
    pub interface: String,
    /// No effect, since it always stays in the foreground; wg-quick needs the flag
    #[arg(short, long)]
    pub foreground: bool,
    /// MTU of the interface in bytes
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MTU, value_parser = clap::value_parser!(u32).range(68..=65_535))]
    pub mtu: u32,
    /// What is logged: all, debug, info, warn, error or none
    #[arg(long, value_name = "LEVEL", env = "LOG_LEVEL", default_value = "info")]
    pub log_level: LogLevel,
}

/// Runs the device until a signal ends it.
///
/// # Errors
/// One sentence that names what is missing or in the way.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    start_logging(args.log_level, LogFormat::default());
    // Blocked before any thread starts, so that only the wait below takes them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("blocking signals")?;

    let options = Options {
        mtu: args.mtu,
        on_link_gone: Box::new(|| {
            tracing::info!("interface deleted by another program");
            // Fails only for a process that does not exist.
            let _ = kill(Pid::this(), Signal::SIGTERM);
        }),
        ..Options::new(args.interface.clone())
    };
    let device =
        Device::start(options).map_err(|error| Refusal::configuration(error.to_string()))?;
    let device = Arc::new(device);
    let _socket = uapi::serve(&args.interface, device.clone())?;
    trim_memory::release_code();
    tracing::info!(
        interface = args.interface,
        port = device.listen_port(),
        "tunnel ready"
    );

    let signal = signals.wait().context("waiting for a signal")?;
    tracing::info!(%signal, "tunnel stopping");
    Ok(ExitCode::SUCCESS)
}
