//! The language of graphviz, byte for byte as Kilo's `kgctl graph` and `/graph?format=dot`.
//!
//! Scripts parse this output, so its odd spots (blank lines, a line break inside a peer's label) are
//! kept.

use std::fmt::Write as _;

use super::{Group, groups, joined, tunnels};
use crate::text::is_unsafe;
use crate::topology::{ExternalPeer, Leader, Member, Segment, SegmentName, Topology};

/// Draws the mesh in DOT.
pub fn dot(topology: &Topology) -> String {
    let mut out = String::from("digraph kilo {\n");
    line(
        &mut out,
        format_args!("label={};", quoted(&joined(&topology.subnets, ", "))),
    );
    for attribute in ["labelloc=t;", "outputorder=nodesfirst;", "overlap=false;"] {
        line(&mut out, format_args!("{attribute}"));
    }
    edges(&mut out, topology);

    let mut subgraphs: Vec<_> = groups(topology).iter().map(location).collect();
    subgraphs.push(peers(&topology.peers));
    // By their own names, as Kilo's library for graphs sorts them, not by those of the segments.
    subgraphs.sort();
    for (_, body) in subgraphs {
        out.push_str(&body);
    }
    out.push_str("\n}\n");
    out
}

fn edges(out: &mut String, topology: &Topology) {
    let mut edge = |from: &str, to: &str, attributes: &str| {
        line(
            out,
            format_args!("{}->{}[ {attributes} ];", quoted(from), quoted(to)),
        );
    };
    for segment in &topology.segments {
        let followers = segment.nodes.iter();
        let followers = followers.filter(|node| segment.leader(&node.name).is_none());
        for leader in &segment.leaders {
            for member in followers.clone() {
                edge(&leader.node.0, &member.name.0, "dir=both");
            }
        }
    }
    for (one, other) in tunnels(topology) {
        edge(&one.node.0, &other.node.0, "dir=both");
    }
    for leader in topology.segments.iter().map(Segment::primary) {
        for peer in &topology.peers {
            edge(&leader.node.0, &peer.name, "dir=both, style=dashed");
        }
    }
}

/// A subgraph with the name it is sorted by.
fn location(group: &Group<'_>) -> (String, String) {
    let nodes = group.nodes.iter().map(|(member, leads)| {
        let rank = leads.map_or("", |_| "rank=1, ");
        format!(
            "{} [ label={}, {rank}shape=ellipse ];",
            quoted(&member.name.0),
            quoted(&node_label(group.name, member, *leads)),
        )
    });
    subgraph(
        format!("cluster_location_{}", group.name),
        &group.name.to_string(),
        nodes,
    )
}

fn peers(peers: &[ExternalPeer]) -> (String, String) {
    let nodes = peers.iter().map(|peer| {
        let endpoint = peer.endpoint.as_ref().map(ToString::to_string);
        let label = format!("{}\n{}", peer.name, endpoint.unwrap_or_default());
        let label = quoted(&label);
        let unclosed = label.strip_suffix('"').unwrap_or(&label);
        format!(
            "{} [ label={unclosed}\n\", shape=ellipse ];",
            quoted(&peer.name)
        )
    });
    subgraph("cluster_peers".into(), "peers", nodes)
}

fn subgraph(name: String, label: &str, nodes: impl Iterator<Item = String>) -> (String, String) {
    let mut out = String::new();
    line(&mut out, format_args!("subgraph {} {{", quoted(&name)));
    line(&mut out, format_args!("label={};", quoted(label)));
    line(&mut out, format_args!("style=\"dashed,rounded\";"));
    for node in nodes {
        line(&mut out, format_args!("{node}"));
    }
    out.push_str("\n}\n;\n");
    (name, out)
}

fn node_label(group: &SegmentName, member: &Member, leads: Option<&Leader>) -> String {
    let mut lines = vec![group.to_string(), member.name.to_string()];
    lines.extend(member.pod_cidrs.iter().map(ToString::to_string));
    lines.extend(member.private_ip.map(|net| net.addr().to_string()));
    if let Some(leader) = leads {
        lines.extend(leader.wireguard_ips.iter().map(ToString::to_string));
        lines.extend(leader.endpoint.as_ref().map(ToString::to_string));
    }
    lines.join("\n")
}

/// One indented line; there is one level of indentation, however deep.
fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "\t{text}").expect("writing to a string does not fail");
}

/// A quoted string of DOT, whose line breaks are a backslash and an n.
fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if is_unsafe(c) => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
