//! The report as text for a terminal.

use std::fmt::{self, Write as _};

use super::{Flannel, LeaderPath, Peer, Report, Tunnel};
use crate::text;

/// The report for a terminal, in the style of `wg show`.
pub fn render(report: &Report) -> String {
    let mut out = String::new();
    write_report(&mut out, report).expect("a String accepts every write");
    text::lines(&out).into_owned()
}

fn write_report(out: &mut String, report: &Report) -> fmt::Result {
    write_node(out, report)?;
    write_tunnel(out, &report.tunnel)?;
    for peer in &report.peers {
        write_peer(out, peer)?;
    }
    write_paths(out, &report.paths)?;
    write_mesh(out, report)
}

fn write_paths(out: &mut String, paths: &[LeaderPath]) -> fmt::Result {
    if !paths.is_empty() {
        writeln!(out, "\npaths:")?;
    }
    for path in paths {
        let way = if path.kind == "leader" {
            "through"
        } else {
            "to"
        };
        let cause = match path.cause.as_deref() {
            Some("not_forwarding") => " (does not forward)",
            Some(_) => " (no answers)",
            None => "",
        };
        write!(
            out,
            "  {way} {} ({}): {}{cause} since {} s",
            path.name, path.region, path.state, path.since
        )?;
        if let Some(rtt) = path.rtt_us {
            write!(out, ", round trip {}.{:03} ms", rtt / 1_000, rtt % 1_000)?;
        }
        if let Some(loss) = path.loss_permille {
            write!(out, ", loss {}.{} %", loss / 10, loss % 10)?;
        }
        match (path.mtu, path.mtu_since) {
            (Some(mtu), Some(since)) if path.mtu_confirmed => {
                write!(out, ", mtu {mtu} since {since} s")?;
            }
            (Some(mtu), _) => write!(out, ", mtu {mtu} (not confirmed)")?,
            (None, _) => {}
        }
        if let Some(via) = &path.via {
            let (leader, region, since) = (&via.leader, &via.region, via.since);
            write!(out, ", via {leader} ({region}) since {since} s")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn write_node(out: &mut String, report: &Report) -> fmt::Result {
    let ready = if report.ready { "ready" } else { "NOT ready" };
    writeln!(out, "node: {} ({ready}, {})", report.node, report.role)?;
    for problem in &report.problems {
        writeln!(out, "  problem: {problem}")?;
    }
    writeln!(out, "  version: {}", report.version)?;
    if let Some(segment) = &report.segment {
        writeln!(
            out,
            "  segment: {segment}, led by {}",
            report.leader.as_deref().unwrap_or("no leader")
        )?;
    }
    writeln!(
        out,
        "  mesh: granularity {}, {}",
        report.granularity, report.mode
    )?;
    let server = report
        .api
        .server
        .clone()
        .unwrap_or_else(|| "not reached".into());
    let cached = if report.api.cached {
        ", working from the cache"
    } else {
        ""
    };
    writeln!(out, "  api server: {server}{cached}")?;
    if let Some(error) = &report.api.error {
        writeln!(out, "  api error: {error}")?;
    }
    write_flannel(out, report.flannel.as_ref())?;
    if report.relays {
        writeln!(out, "  relays between regions that do not reach each other")?;
    }
    if report.fail_open {
        writeln!(
            out,
            "  traffic of a region whose tunnel is down leaves IN CLEAR (--on-tunnel-down=open)"
        )?;
    }
    Ok(())
}

fn write_flannel(out: &mut String, flannel: Option<&Flannel>) -> fmt::Result {
    match flannel {
        Some(flannel) => {
            let direct = if flannel.direct_routing {
                " with DirectRouting"
            } else {
                ""
            };
            writeln!(
                out,
                "  flannel: {}{direct}, network {}, this node {}, mtu {}, {}",
                flannel.backend,
                flannel.networks.join(" "),
                flannel.subnets.join(" "),
                flannel.mtu,
                if flannel.links.is_empty() {
                    none()
                } else {
                    flannel.links.join(" ")
                },
            )?;
        }
        None => writeln!(out, "  flannel: not up yet")?,
    }
    Ok(())
}

fn write_tunnel(out: &mut String, tunnel: &Tunnel) -> fmt::Result {
    writeln!(out, "\ninterface: {}", tunnel.interface)?;
    let age = tunnel.key_age.map(|age| match age {
        0..7_200 => format!(" (in use for {} min)", age / 60),
        7_200..172_800 => format!(" (in use for {} h)", age / 3600),
        _ => format!(" (in use for {} days)", age / 86_400),
    });
    writeln!(
        out,
        "  public key: {}{}",
        tunnel.public_key,
        age.unwrap_or_default()
    )?;
    let awaited = tunnel.key_awaits.unwrap_or(0);
    if let Some(next) = &tunnel.next_key {
        writeln!(
            out,
            "  next key: {next} (announced, {awaited} leaders have not answered under it)"
        )?;
    }
    if let Some(previous) = &tunnel.previous_key {
        writeln!(
            out,
            "  previous key: {previous} (still accepted, {awaited} peers have not moved)"
        )?;
    }
    if let Some(port) = tunnel.listen_port {
        let reason = tunnel.port_reason.iter();
        let reason: String = reason.map(|reason| format!(" ({reason})")).collect();
        writeln!(out, "  listening port: {port}{reason}")?;
    }
    if let Some(mtu) = tunnel.mtu {
        let measures = if tunnel.measures_mtu {
            " (each path has its own)"
        } else {
            ""
        };
        writeln!(out, "  mtu: {mtu}{measures}")?;
    }
    if !tunnel.addresses.is_empty() {
        writeln!(out, "  addresses: {}", tunnel.addresses.join(", "))?;
    }
    writeln!(
        out,
        "  own endpoint: {}",
        tunnel.endpoint.clone().unwrap_or_else(none)
    )?;
    Ok(())
}

fn write_peer(out: &mut String, peer: &Peer) -> fmt::Result {
    writeln!(out, "\npeer: {} ({})", peer.name, peer.public_key)?;
    writeln!(
        out,
        "  endpoint: {}",
        peer.endpoint.clone().unwrap_or_else(none)
    )?;
    for candidate in &peer.candidates {
        let outcome = candidate.outcome();
        writeln!(
            out,
            "  candidate: {} ({}): {outcome}",
            candidate.address, candidate.origin
        )?;
    }
    writeln!(out, "  allowed ips: {}", peer.allowed_ips.join(", "))?;
    match peer.handshake_age {
        Some(age) => writeln!(out, "  latest handshake: {age} s ago")?,
        None => writeln!(out, "  latest handshake: never")?,
    }
    if peer.both_behind_nat && peer.is_silent() {
        writeln!(
            out,
            "  not reachable: both behind NAT, and at least one NAT maps each destination to another port"
        )?;
    }
    writeln!(
        out,
        "  transfer: {} B received, {} B sent",
        peer.received, peer.sent
    )?;
    if peer.persistent_keepalive > 0 {
        writeln!(
            out,
            "  persistent keepalive: every {} s",
            peer.persistent_keepalive
        )?;
    }
    Ok(())
}

/// The other segments, and what the mesh leaves out.
fn write_mesh(out: &mut String, report: &Report) -> fmt::Result {
    if !report.segments.is_empty() {
        writeln!(out, "\nsegments:")?;
    }
    for segment in &report.segments {
        writeln!(
            out,
            "  {}: led by {} ({}), endpoint {}, nodes {}",
            segment.name,
            segment.leader,
            segment.wireguard_ips.join(" "),
            segment.endpoint.clone().unwrap_or_else(none),
            segment.nodes.join(" "),
        )?;
    }
    if !report.aliases.is_empty() {
        writeln!(out, "\naliases:")?;
    }
    for alias in &report.aliases {
        let (node, alias, address) = (&alias.node, &alias.alias, &alias.address);
        writeln!(out, "  {node}: {alias} for {address}")?;
    }
    if !report.outsiders.is_empty() {
        writeln!(out, "\noutside the mesh: {}", report.outsiders.join(" "))?;
    }
    if !report.excluded.is_empty() {
        writeln!(out, "\nleft out:")?;
    }
    for excluded in &report.excluded {
        writeln!(out, "  {excluded}")?;
    }
    if !report.connected.is_empty() {
        writeln!(out, "\nleft to connected networks:")?;
    }
    for connected in &report.connected {
        writeln!(out, "  {connected}")?;
    }
    Ok(())
}

fn none() -> String {
    "none".to_owned()
}
