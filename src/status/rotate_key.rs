//! `selvedge rotate-key`: asks this node's agent for another WireGuard key.

use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{CONTROL_SOCKET, connect};
use crate::refusal::Refusal;
use crate::text;

/// The line that asks for another key.
pub const ROTATE_KEY: &str = "rotate-key\n";

/// Arguments of `selvedge rotate-key`.
#[derive(clap::Args, Clone, Debug)]
pub struct RotateKeyArgs {
    /// The agent's control socket
    #[arg(long, value_name = "PATH", default_value = CONTROL_SOCKET)]
    control_socket: PathBuf,
}

/// Has the agent begin. The replacement goes on in the background.
pub fn run_rotate_key(args: RotateKeyArgs) -> anyhow::Result<ExitCode> {
    rotate_key(&args.control_socket)?;
    // A reader may close the pipe early.
    let _ = writeln!(
        io::stdout(),
        "The agent replaces its key now: selvedge status shows how far that is."
    );
    Ok(ExitCode::SUCCESS)
}

/// Asks the agent behind a control socket for another key.
///
/// # Errors
/// No agent answers, or it says why it makes none.
pub fn rotate_key(socket: &Path) -> anyhow::Result<()> {
    let mut stream = connect(socket)?;
    stream.write_all(ROTATE_KEY.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.is_empty() {
        return Ok(());
    }
    Err(Refusal::configuration(text::message(&answer)).into())
}
