//! The command `selvedge graph`: flags, one look at the cluster, a drawing on stdout.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use super::{Format, relayed, render};
use crate::{config, status, survey};

/// Flags of `selvedge graph`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// dot (for graphviz, as Kilo's), svg or text
    #[arg(long, short, value_name = "FORMAT", default_value = "dot")]
    format: Format,
    /// Changes nothing: a graph has no port
    #[arg(long, hide = true, value_parser = config::port)]
    port: Option<u16>,
    #[command(flatten)]
    cluster: survey::Args,
}

/// Draws the mesh.
///
/// # Errors
///
/// When the cluster cannot be read or no node is in the mesh.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let survey = survey::block_on(async {
        let access = survey::access(&args.cluster).await?;
        survey::survey(&access.client, &args.cluster).await
    })?;
    if survey.topology.segments.is_empty() && args.format != Format::Text {
        anyhow::bail!("did not find any valid Kilo nodes in the cluster");
    }
    // On a node of the mesh its agent knows the relays; elsewhere there is none to ask.
    let report = status::ask(Path::new(status::CONTROL_SOCKET));
    let relayed = report.map(|report| relayed(&report)).unwrap_or_default();
    let mut drawing = render(&survey.topology, args.format, &relayed);
    if args.format == Format::Dot {
        // As Kilo prints it: one blank line at the end.
        drawing.push('\n');
    }
    // A reader that closed the pipe has read enough.
    let _ = write!(std::io::stdout(), "{drawing}");
    Ok(ExitCode::SUCCESS)
}
