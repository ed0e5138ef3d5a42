//! What an operator would see on the nodes of a lab, and in what two looks differ.

use std::collections::BTreeMap;

use crate::lab::Lab;
use crate::steps::Outcome;

/// The dumps of all nodes, by node and by the command that printed them.
#[derive(Clone, Debug)]
pub struct Dumps(BTreeMap<String, BTreeMap<&'static str, String>>);

impl Dumps {
    /// Dumps every node.
    ///
    /// # Errors
    ///
    /// When one of the commands cannot be run.
    pub fn take(lab: &Lab) -> anyhow::Result<Self> {
        Self::take_of(lab, &lab.node_names())
    }

    /// Dumps some nodes.
    ///
    /// # Errors
    ///
    /// When one of the commands cannot be run.
    pub fn take_of(lab: &Lab, nodes: &[String]) -> anyhow::Result<Self> {
        let dumps = nodes.iter().map(|name| Ok((name.clone(), lab.dump(name)?)));
        Ok(Self(dumps.collect::<anyhow::Result<_>>()?))
    }

    /// How many nodes were dumped, and how many commands printed something on each.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        let commands = self.0.values().map(BTreeMap::len).max();
        (self.0.len(), commands.unwrap_or(0))
    }

    /// The lines that only one of them has, with the command that printed them, on the nodes that were
    /// dumped now.
    #[must_use]
    pub fn difference(&self, earlier: &Self) -> String {
        let mut summary = String::new();
        let only = |place: &str, one: &str, other: &str, sign: char| -> String {
            one.lines()
                .filter(|line| !other.lines().any(|same| same == *line))
                .map(|line| format!("{place}: {sign} {line}\n"))
                .collect()
        };
        for (node, dumps) in &self.0 {
            for (command, now) in dumps {
                let was = earlier.0.get(node).and_then(|dumps| dumps.get(command));
                let was = was.map(String::as_str).unwrap_or_default();
                let place = format!("{node}: {command}");
                summary += &only(&place, was, now, '-');
                summary += &only(&place, now, was, '+');
            }
        }
        summary
    }
}

impl Outcome for Dumps {
    fn detail(&self) -> String {
        String::new()
    }
}
