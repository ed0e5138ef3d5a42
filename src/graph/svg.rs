//! The mesh as a picture: a card for each region on a circle, tunnels between the leaders' cards.
//!
//! No graphviz and no fonts to measure: text is monospaced, so its width is known.

use std::collections::BTreeMap;
use std::f64::consts::{PI, TAU};
use std::fmt::Write as _;

use super::{Group, groups, joined, tunnels};
use crate::cluster::annotation::format_granularity;
use crate::text::is_unsafe;
use crate::topology::{ExternalPeer, NodeName, Segment, Topology};

/// The width of a monospaced character at 12 px in px; every common font has 0.6 em or a bit more.
const CHAR: f64 = 7.3;
/// The height of a line of text in px.
const LINE: f64 = 17.0;
/// Between a card's border and its text, in px.
const PAD: f64 = 14.0;
/// Left of the text of a node: room for its dot, in px.
const INDENT: f64 = 16.0;
/// Least room between two cards, in px: tunnels must be seen there.
const GAP: f64 = 70.0;
/// Between the cards and the border of the picture, in px.
const MARGIN: f64 = 30.0;

const STYLE: &str = "\
svg{background:#fff;font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}\
text{fill:#1f2933}.t{font-weight:600;fill:#52606d}.l{font-weight:600}.d{fill:#7b8794}\
.c{fill:#f8fafc;stroke:#9aa5b1;stroke-dasharray:5 4}.n{fill:#9aa5b1}.n.l{fill:#2563eb}\
.e{stroke:#2563eb;stroke-width:1.6;stroke-opacity:.55}.p{stroke-dasharray:6 5;stroke:#b45309}\
.v{stroke:#cbd2d9}\
@media(prefers-color-scheme:dark){svg{background:#111827}text{fill:#e5e7eb}.t,.d{fill:#9ca3af}\
.c{fill:#1f2937;stroke:#4b5563}.v{stroke:#4b5563}.e{stroke:#60a5fa}.n.l{fill:#60a5fa}.p{stroke:#f59e0b}}";

/// Draws the mesh as an SVG document.
pub fn svg(topology: &Topology) -> String {
    let groups = groups(topology);
    let mut cards: Vec<Card> = groups.iter().map(Card::of_group).collect();
    if !topology.peers.is_empty() {
        cards.push(Card::of_peers(&topology.peers));
    }
    let (width, height) = place(&mut cards);

    let title = format!(
        "{}, granularity {}",
        joined(&topology.subnets, ", "),
        format_granularity(topology.granularity)
    );
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\">\n\
         <title>Mesh of {title}</title>\n<style>{STYLE}</style>\n",
    );
    // Under the cards, so that a tunnel seems to end at the card's border.
    edges(&mut out, topology, &cards);
    for card in &cards {
        card.draw(&mut out);
    }
    let (x, y) = (MARGIN, MARGIN);
    writeln!(
        out,
        "<text class=\"t\" x=\"{x}\" y=\"{y}\">{title}</text>\n</svg>"
    )
    .expect(STRING);
    out
}

fn edges(out: &mut String, topology: &Topology, cards: &[Card]) {
    // Looked up, not searched for: a full mesh has a tunnel for every two nodes.
    let anchors: BTreeMap<_, _> = cards
        .iter()
        .filter(|card| !card.peers)
        .flat_map(|card| {
            let entries = card.entries.iter().enumerate();
            entries.map(|(entry, node)| (node.name.as_str(), card.anchor(entry)))
        })
        .collect();
    let at = |leader: &NodeName| anchors.get(leader.0.as_str()).copied();
    let mut edge = |from: Option<(f64, f64)>, to: Option<(f64, f64)>, class: &str| {
        if let (Some((x1, y1)), Some((x2, y2))) = (from, to) {
            writeln!(
                out,
                "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
            )
            .expect(STRING);
        }
    };
    for (one, other) in tunnels(topology) {
        edge(at(&one.node), at(&other.node), "e");
    }
    if let Some(peers) = cards.iter().find(|card| card.peers) {
        for leader in topology.segments.iter().map(Segment::primary) {
            edge(at(&leader.node), Some(peers.center()), "e p");
        }
    }
}

/// A node or a peer on a card.
struct Entry {
    name: String,
    leads: bool,
    details: Vec<String>,
}

/// A region, or all the peers.
struct Card {
    title: String,
    entries: Vec<Entry>,
    peers: bool,
    width: f64,
    height: f64,
    /// The upper left corner.
    x: f64,
    y: f64,
}

impl Card {
    fn of_group(group: &Group<'_>) -> Self {
        let entries = group.nodes.iter().map(|(member, leads)| {
            let mut details = vec![joined(&member.pod_cidrs, ", ")];
            details.extend(member.private_ip.map(|net| net.addr().to_string()));
            if let Some(leader) = leads {
                details.push(joined(&leader.wireguard_ips, ", "));
                details.extend(leader.endpoint.as_ref().map(ToString::to_string));
            }
            Entry {
                name: member.name.to_string(),
                leads: leads.is_some(),
                details,
            }
        });
        Self::new(group.name.to_string(), entries.collect(), false)
    }

    fn of_peers(peers: &[ExternalPeer]) -> Self {
        let entries = peers.iter().map(|peer| {
            let mut details = vec![joined(&peer.allowed_ips, ", ")];
            details.extend(peer.endpoint.as_ref().map(ToString::to_string));
            Entry {
                name: peer.name.clone(),
                leads: false,
                details,
            }
        });
        Self::new("peers".into(), entries.collect(), true)
    }

    fn new(title: String, mut entries: Vec<Entry>, peers: bool) -> Self {
        for entry in &mut entries {
            entry.details.retain(|detail| !detail.is_empty());
        }
        let texts = entries
            .iter()
            .flat_map(|e| e.details.iter().chain([&e.name]));
        let longest = texts.map(|text| text.chars().count()).max().unwrap_or(0);
        let chars = as_f64(longest) * CHAR + INDENT;
        let width = chars.max(as_f64(title.chars().count()) * CHAR) + 2.0 * PAD;
        let lines: usize = entries.iter().map(|e| 1 + e.details.len()).sum();
        let height = as_f64(1 + lines) * LINE + as_f64(entries.len()) * LINE / 2.0 + 2.0 * PAD;
        Self {
            title,
            entries,
            peers,
            width,
            height,
            x: 0.0,
            y: 0.0,
        }
    }

    fn center(&self) -> (f64, f64) {
        (self.x + self.width / 2.0, self.y + self.height / 2.0)
    }

    /// Where tunnels to an entry end: at the middle of the card, at the height of its name.
    fn anchor(&self, entry: usize) -> (f64, f64) {
        (self.center().0, self.top_of(entry) + LINE / 2.0)
    }

    fn top_of(&self, entry: usize) -> f64 {
        let above = &self.entries[..entry];
        let lines: usize = above.iter().map(|e| 1 + e.details.len()).sum();
        self.y + PAD + as_f64(1 + lines) * LINE + as_f64(entry + 1) * LINE / 2.0
    }

    fn draw(&self, out: &mut String) {
        let Self {
            x,
            y,
            width,
            height,
            ..
        } = self;
        writeln!(
            out,
            "<rect class=\"c\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"10\"/>"
        )
        .expect(STRING);
        text(out, "t", x + PAD, y + PAD + LINE * 0.75, &self.title);
        if !self.peers && self.entries.len() > 1 {
            let (from, to) = (self.top_of(0), self.top_of(self.entries.len() - 1));
            let (x, from, to) = (x + PAD + 4.0, from + LINE / 2.0, to + LINE / 2.0);
            writeln!(
                out,
                "<line class=\"v\" x1=\"{x:.1}\" y1=\"{from:.1}\" x2=\"{x:.1}\" y2=\"{to:.1}\"/>"
            )
            .expect(STRING);
        }
        for (i, entry) in self.entries.iter().enumerate() {
            let top = self.top_of(i);
            let (dot, class) = if entry.leads {
                (5.0, "n l")
            } else {
                (3.5, "n")
            };
            writeln!(
                out,
                "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{dot}\"/>",
                x + PAD + 4.0,
                top + LINE / 2.0
            )
            .expect(STRING);
            let (x, class) = (x + PAD + INDENT, if entry.leads { "l" } else { "" });
            text(out, class, x, top + LINE * 0.75, &entry.name);
            for (detail, line) in entry.details.iter().zip(1_u32..) {
                text(out, "d", x, top + LINE * (f64::from(line) + 0.75), detail);
            }
        }
    }
}

/// Puts the cards on a circle so wide that none touches another; returns the picture's size.
fn place(cards: &mut [Card]) -> (f64, f64) {
    let widest = cards.iter().map(|card| card.width).fold(0.0, f64::max);
    let tallest = cards.iter().map(|card| card.height).fold(0.0, f64::max);
    let count = as_f64(cards.len());
    let radius = match cards.len() {
        0 | 1 => 0.0,
        2 => (widest + GAP) / 2.0,
        _ => (widest.hypot(tallest) + GAP) / (2.0 * (PI / count).sin()),
    };
    // Two stand side by side; more begin at the top and go round with the clock.
    let start = if cards.len() == 2 { PI } else { -PI / 2.0 };
    for (card, i) in cards.iter_mut().zip(0_u32..) {
        let angle = start + f64::from(i) * TAU / count;
        card.x = radius * angle.cos() - card.width / 2.0;
        card.y = radius * angle.sin() - card.height / 2.0;
    }

    let left = cards.iter().map(|card| card.x).fold(0.0, f64::min);
    let top = cards.iter().map(|card| card.y).fold(0.0, f64::min);
    for card in cards.iter_mut() {
        card.x += MARGIN - left;
        card.y += MARGIN + 2.0 * LINE - top;
    }
    let right = cards.iter().map(|card| card.x + card.width);
    let bottom = cards.iter().map(|card| card.y + card.height);
    (
        right.fold(300.0, f64::max) + MARGIN,
        bottom.fold(LINE, f64::max) + MARGIN,
    )
}

fn text(out: &mut String, class: &str, x: f64, y: f64, text: &str) {
    let class = match class {
        "" => String::new(),
        class => format!(" class=\"{class}\""),
    };
    writeln!(
        out,
        "<text{class} x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
        escaped(text)
    )
    .expect(STRING);
}

/// Text fit for XML, which has no place for control characters, nor this picture for marks that turn text.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c if is_unsafe(c) => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Counts of characters, lines and cards, which are far below the limits of u32.
fn as_f64(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

const STRING: &str = "writing to a string does not fail";

#[cfg(test)]
mod tests {
    use super::*;

    fn card(chars: usize, entries: usize) -> Card {
        let entry = |i| Entry {
            name: format!("node-{i}"),
            leads: i == 0,
            details: vec!["x".repeat(chars); 3],
        };
        Card::new(
            "location:a".into(),
            (0..entries).map(entry).collect(),
            false,
        )
    }

    #[test]
    fn cards_never_overlap_and_stay_inside_the_picture() {
        for count in 1..40 {
            let mut cards: Vec<_> = (0..count).map(|i| card(5 + i, 1 + i % 7)).collect();

            let (width, height) = place(&mut cards);

            for (i, a) in cards.iter().enumerate() {
                assert!(a.x >= 0.0 && a.x + a.width <= width, "{count} cards: {i}");
                assert!(a.y >= 0.0 && a.y + a.height <= height, "{count} cards: {i}");
                for b in &cards[i + 1..] {
                    let apart = a.x + a.width <= b.x
                        || b.x + b.width <= a.x
                        || a.y + a.height <= b.y
                        || b.y + b.height <= a.y;
                    assert!(apart, "{count} cards: {i} touches another");
                }
            }
        }
    }
}
