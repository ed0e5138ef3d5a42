//! Draws the mesh: DOT as Kilo's, SVG, and text for a terminal.
//!
//! Everything is rendered here, without graphviz, from the [`Topology`] alone. The present traffic of the tunnels
//! is shown by `selvedge status`. Only the relays that one node uses are added, to the text, where its agent says them.

use std::fmt;
use std::str::FromStr;

use crate::status::Report;
use crate::topology::{Leader, Member, SegmentName, Topology};

mod command;
mod dot;
mod svg;
mod text;

pub use command::{Args, run};
pub use dot::dot;
pub use svg::svg;
pub use text::text;

/// The layouts that `/graph` accepts. They were graphviz's engines in Kilo; here all mean the same.
const LAYOUTS: [&str; 5] = ["circo", "dot", "neato", "twopi", "fdp"];

/// The format of a drawing.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Format {
    /// The language of graphviz, byte for byte as Kilo prints it.
    #[default]
    Dot,
    /// SVG.
    Svg,
    /// Text for a terminal.
    Text,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "dot" | "gv" => Ok(Self::Dot),
            "svg" => Ok(Self::Svg),
            "text" => Ok(Self::Text),
            _ => Err("unknown; possible values are: dot, svg, text".into()),
        }
    }
}

/// A path that goes through a relay, as one node's agent sees it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Relayed {
    /// The leader that uses the relay.
    pub from: String,
    /// The leader that relays, and its region.
    pub via: (String, String),
    /// The leader that is reached.
    pub to: String,
}

/// The relayed paths in an agent's report.
pub fn relayed(report: &Report) -> Vec<Relayed> {
    let paths = report.paths.iter().filter_map(|path| {
        let via = path.via.as_ref()?;
        Some(Relayed {
            from: report.node.clone(),
            via: (via.leader.clone(), via.region.clone()),
            to: path.name.clone(),
        })
    });
    paths.collect()
}

/// Draws the mesh, as text with the relays of one node.
pub fn render(topology: &Topology, format: Format, relayed: &[Relayed]) -> String {
    match format {
        Format::Dot => dot(topology),
        Format::Svg => svg(topology),
        Format::Text => text(topology, relayed),
    }
}

/// An answer to `/graph`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Page {
    /// The value of `Content-Type`.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

/// The reason for which `/graph` fails. Its text is the body of a 500, in Kilo's words.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PageError {
    /// `format` is none of dot, gv, svg and text. Kilo's other formats need graphviz.
    #[error("unsupported format")]
    Format,
    /// `layout` is none of Kilo's.
    #[error("unsupported layout")]
    Layout,
    /// There is nothing to draw.
    #[error("did not find any valid Kilo nodes in the cluster")]
    NoNodes,
}

/// Answers `/graph?format=&layout=`; the default format is SVG.
///
/// # Errors
///
/// For parameters that Kilo refuses too, for formats that only graphviz can make (`format=dot` piped
/// into it does), and for a mesh without nodes.
pub fn page(
    topology: &Topology,
    format: Option<&str>,
    layout: Option<&str>,
    relayed: &[Relayed],
) -> Result<Page, PageError> {
    let format = match format {
        None | Some("") => Format::Svg,
        Some(name) => name.parse().map_err(|_| PageError::Format)?,
    };
    if let Some(name) = layout
        && !name.is_empty()
        && !LAYOUTS.contains(&name)
    {
        return Err(PageError::Layout);
    }
    if topology.segments.is_empty() {
        return Err(PageError::NoNodes);
    }
    Ok(Page {
        content_type: match format {
            Format::Svg => "image/svg+xml",
            Format::Dot | Format::Text => "text/plain; charset=utf-8",
        },
        body: render(topology, format, relayed),
    })
}

/// Nodes that reach each other without a tunnel: one box of the drawing.
struct Group<'a> {
    name: &'a SegmentName,
    /// Its nodes in order, each as a leader too, if it leads.
    nodes: Vec<(&'a Member, Option<&'a Leader>)>,
}

/// The boxes, in the order of the segments.
fn groups(topology: &Topology) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for segment in &topology.segments {
        let nodes = segment.nodes.iter();
        let nodes = nodes.map(|member| (member, segment.leader(&member.name)));
        match groups.iter_mut().find(|group| *group.name == segment.group) {
            Some(group) => group.nodes.extend(nodes),
            None => groups.push(Group {
                name: &segment.group,
                nodes: nodes.collect(),
            }),
        }
    }
    groups
}

/// The tunnels between leaders, each once.
fn tunnels(topology: &Topology) -> impl Iterator<Item = (&Leader, &Leader)> {
    let segments = topology.segments.iter().enumerate();
    segments.flat_map(move |(position, segment)| {
        let leaders = segment.leaders.iter();
        leaders
            .flat_map(move |one| later_leaders(topology, position).map(move |other| (one, other)))
    })
}

/// The leaders in other groups whose segments come after the one at this position.
fn later_leaders(topology: &Topology, position: usize) -> impl Iterator<Item = &Leader> {
    let group = &topology.segments[position].group;
    let later = topology.segments[position + 1..].iter();
    later
        .filter(move |segment| segment.group != *group)
        .flat_map(|segment| &segment.leaders)
}

fn joined<T: fmt::Display>(items: impl IntoIterator<Item = T>, separator: &str) -> String {
    let texts: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    texts.join(separator)
}

#[cfg(test)]
mod tests;
