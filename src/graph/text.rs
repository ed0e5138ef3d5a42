//! The mesh as text for a terminal.

use std::fmt::Write as _;

use super::{Relayed, groups, joined, later_leaders};
use crate::cluster::annotation::format_granularity;
use crate::text::line as shown;
use crate::topology::{Leader, Member, Mode, Topology};

/// Draws the mesh as aligned columns: regions with their nodes, peers, tunnels, the relays of one node, and the nodes
/// that take no part.
pub fn text(topology: &Topology, relayed: &[Relayed]) -> String {
    let mut out = format!(
        "{}, granularity {}{}\n",
        joined(&topology.subnets, ", "),
        format_granularity(topology.granularity),
        match &topology.mode {
            Mode::Native => String::new(),
            Mode::Kilo(nodes) => format!(", by Kilo's rules because of {}", joined(nodes, ", ")),
        }
    );
    if topology.segments.is_empty() {
        out.push_str("\nno node is in the mesh yet\n");
    }
    nodes(&mut out, topology);
    peers(&mut out, topology);
    links(&mut out, topology);
    relays(&mut out, relayed);
    outsiders(&mut out, topology);
    out
}

fn nodes(out: &mut String, topology: &Topology) {
    let groups = groups(topology);
    let mut table = Table::default();
    for group in &groups {
        let last = group.nodes.len() - 1;
        for (i, (member, leads)) in group.nodes.iter().enumerate() {
            let mark = match (leads, i == last) {
                (Some(_), _) => '●',
                (None, false) => '├',
                (None, true) => '└',
            };
            table.row([
                format!("{mark} {}", member.name),
                leads.map_or_else(String::new, |leader| joined(&leader.wireguard_ips, ",")),
                joined(&member.pod_cidrs, ","),
                member
                    .private_ip
                    .map_or_else(String::new, |net| net.addr().to_string()),
                leads.map_or_else(String::new, endpoint),
                aliases(member),
            ]);
        }
    }

    let mut rows = table.lines();
    for group in &groups {
        heading(out, &shown(&group.name.to_string()));
        for row in rows.by_ref().take(group.nodes.len()) {
            writeln!(out, "  {row}").expect(STRING);
        }
    }
}

fn aliases(member: &Member) -> String {
    match member.aliases.is_empty() {
        true => String::new(),
        false => format!("alias {}", joined(member.aliases.keys(), ",")),
    }
}

fn endpoint(leader: &Leader) -> String {
    let annotated = leader.endpoint.as_ref().map(ToString::to_string);
    match leader.discovered {
        Some(seen) if leader.address != Some(seen) => format!("{seen} (seen there, behind NAT)"),
        Some(_) | None => annotated.unwrap_or_else(|| "no endpoint".into()),
    }
}

fn peers(out: &mut String, topology: &Topology) {
    if topology.peers.is_empty() {
        return;
    }
    heading(out, "peers");
    let mut table = Table::default();
    for peer in &topology.peers {
        table.row([
            format!("○ {}", shown(&peer.name)),
            joined(&peer.allowed_ips, ","),
            peer.endpoint
                .as_ref()
                .map_or_else(|| "no endpoint".into(), ToString::to_string),
        ]);
    }
    for row in table.lines() {
        writeln!(out, "  {row}").expect(STRING);
    }
}

fn links(out: &mut String, topology: &Topology) {
    let peers = topology.peers.iter().map(|peer| shown(&peer.name));
    let peers = joined(peers, ", ");
    let mut lines = Vec::new();
    for (position, segment) in topology.segments.iter().enumerate() {
        let others = later_leaders(topology, position).map(|other| &other.node);
        let others = joined(others, ", ");
        for leader in &segment.leaders {
            if !others.is_empty() {
                lines.push(format!("{} ══ {others}", leader.node));
            }
        }
        if !peers.is_empty() {
            lines.push(format!("{} ┄┄ {peers}", segment.primary().node));
        }
    }
    if !lines.is_empty() {
        heading(out, "tunnels");
        for line in lines {
            writeln!(out, "  {line}").expect(STRING);
        }
    }
}

fn relays(out: &mut String, relayed: &[Relayed]) {
    if relayed.is_empty() {
        return;
    }
    heading(out, "relayed, as this node's agent says");
    for path in relayed {
        let (via, region) = (shown(&path.via.0), shown(&path.via.1));
        let (from, to) = (shown(&path.from), shown(&path.to));
        writeln!(out, "  {from} ══ {to} via {via} ({region})").expect(STRING);
    }
}

fn outsiders(out: &mut String, topology: &Topology) {
    if topology.outsiders.is_empty() {
        return;
    }
    heading(out, "not in the mesh");
    let mut table = Table::default();
    for node in &topology.outsiders {
        let group = shown(&node.group.to_string()).into_owned();
        table.row([node.name.to_string(), group, joined(&node.pod_cidrs, ",")]);
    }
    for row in table.lines() {
        writeln!(out, "  {row}").expect(STRING);
    }
}

const STRING: &str = "writing to a string does not fail";

fn heading(out: &mut String, text: &str) {
    writeln!(out, "\n{text}").expect(STRING);
}

/// Rows whose columns start at the same place.
#[derive(Default)]
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells
                .map(|cell: &String| cell.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        self.rows.iter().map(move |row| {
            let cells = row.iter().zip(&widths);
            let line: String = cells
                .map(|(cell, &width)| format!("{cell:width$}  "))
                .collect();
            line.trim_end().to_owned()
        })
    }
}
