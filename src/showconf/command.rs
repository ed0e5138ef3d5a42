//! The command `selvedge showconf`: flags, one look at the cluster, text on stdout.

use std::io::Write as _;
use std::process::ExitCode;

use ipnet::IpNet;

use super::{Output, Shape, showconf};
use crate::config;
use crate::survey;
use crate::topology::{NodeName, Object};

/// Flags of `selvedge showconf`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What to show: node or peer
    #[arg(value_name = "node|peer", value_parser = ["node", "peer"])]
    kind: String,
    /// Its name
    #[arg(value_name = "NAME")]
    name: String,
    /// Show what another WireGuard device needs to have it as a peer
    #[arg(long)]
    as_peer: bool,
    /// With --as-peer: wireguard, json or yaml
    #[arg(long, short, value_name = "FORMAT", default_value = "wireguard")]
    output: Output,
    /// With --as-peer: further CIDRs behind it (comma separated)
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = survey::cidr)]
    allowed_ips: Vec<IpNet>,
    /// The listening port to show [default: that of the node's endpoint]
    #[arg(long, value_parser = config::port)]
    port: Option<u16>,
    #[command(flatten)]
    cluster: survey::Args,
}

/// Shows the configuration of a node or a peer.
///
/// # Errors
///
/// When the cluster cannot be read or the node or peer has no configuration.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let shape = Shape {
        as_peer: args.as_peer,
        output: args.output,
        allowed_ips: args.allowed_ips.clone(),
        listen_port: args.port,
    };
    if !shape.as_peer && (shape.output != Output::Wireguard || !shape.allowed_ips.is_empty()) {
        // As in Kilo they change nothing then; but that is said.
        let note = "selvedge: --output and --allowed-ips change nothing without --as-peer";
        let _ = writeln!(std::io::stderr(), "{note}");
    }
    let object = match args.kind.as_str() {
        "node" => Object::Node(NodeName(args.name.clone())),
        _ => Object::Peer(args.name.clone()),
    };
    let survey = survey::block_on(async {
        let access = survey::access(&args.cluster).await?;
        survey::survey(&access.client, &args.cluster).await
    })?;
    let text = showconf(&survey.topology, &object, &shape)?;
    // A reader that closed the pipe has read enough.
    let _ = write!(std::io::stdout(), "{text}");
    Ok(ExitCode::SUCCESS)
}
