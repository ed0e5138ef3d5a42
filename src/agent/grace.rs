//! Keeps the last region of a node whose label or annotation is missing for a moment. Pure: the time is
//! passed in.
//!
//! Cloud controllers and `kubectl label --overwrite` scripts remove the region label and set it again.
//! Between the two the node has no region, and following that at once costs every region of the node its
//! routes. A Node that is deleted gets no grace, and neither does a change from one region to another.
//!
//! Each agent counts from when it first saw the node without a region, so the agents change over within
//! the time that a watch takes. An agent that is started meanwhile knows the last region from its cache.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::topology::{NodeName, RegionName, Snapshot};

/// How long a node without a region stays in its last one. Longer than a controller or a script needs to
/// set the label again, short enough for an operator who meant it.
pub const GRACE: Duration = Duration::from_secs(30);

/// The last region of every node.
#[derive(Debug, Default)]
pub struct Grace {
    nodes: BTreeMap<NodeName, Last>,
}

#[derive(Clone, Debug)]
struct Last {
    region: RegionName,
    /// Whether the operator placed the node there.
    declared: bool,
    /// Since when the node has had no region; none while it has one.
    missing: Option<Instant>,
}

impl Grace {
    /// Puts the nodes of a snapshot that lost their region into their last one, for as long as the grace
    /// lasts.
    ///
    /// The snapshot is copied only when a node lost its region.
    pub fn handle_snapshot(&mut self, snapshot: &mut Arc<Snapshot>, now: Instant) {
        self.nodes
            .retain(|name, _| snapshot.nodes.contains_key(name));
        let mut moved = Vec::new();
        for (name, node) in &snapshot.nodes {
            if !node.region.0.is_empty() {
                let last = Last {
                    region: node.region.clone(),
                    declared: node.region_declared,
                    missing: None,
                };
                if let Some(known) = self.nodes.get_mut(name) {
                    *known = last;
                } else {
                    self.nodes.insert(name.clone(), last);
                }
                continue;
            }
            let Some(last) = self.nodes.get_mut(name) else {
                continue;
            };
            let since = *last.missing.get_or_insert(now);
            if now.saturating_duration_since(since) < GRACE {
                moved.push((name.clone(), last.region.clone(), last.declared));
            } else {
                self.nodes.remove(name);
            }
        }
        put_back(snapshot, moved);
    }

    /// Puts the same nodes of what is remembered over a restart into their last region.
    pub fn keep(&self, snapshot: &mut Arc<Snapshot>) {
        let kept = self.nodes.iter();
        let kept = kept.filter(|(_, last)| last.missing.is_some());
        let kept = kept.map(|(name, last)| (name.clone(), last.region.clone(), last.declared));
        put_back(snapshot, kept.collect());
    }

    /// When the next grace ends, so that the snapshot has to be looked at again.
    pub fn poll_deadline(&self) -> Option<Instant> {
        let missing = self.nodes.values().filter_map(|last| last.missing);
        missing.min().map(|since| since + GRACE)
    }
}

/// Puts nodes into regions: the node, its region, and whether the operator placed it there.
fn put_back(snapshot: &mut Arc<Snapshot>, nodes: Vec<(NodeName, RegionName, bool)>) {
    if nodes.is_empty() {
        return;
    }
    let snapshot = Arc::make_mut(snapshot);
    for (name, region, declared) in nodes {
        if let Some(node) = snapshot.nodes.get_mut(&name) {
            node.region = region;
            node.region_declared = declared;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Node;

    #[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
    fn start() -> Instant {
        Instant::now()
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn snapshot(nodes: &[(&str, &str)]) -> Arc<Snapshot> {
        let nodes = nodes.iter().map(|(name, region)| {
            let name = NodeName((*name).to_owned());
            let node = Node {
                name: name.clone(),
                region: RegionName((*region).to_owned()),
                ..node()
            };
            (name, node)
        });
        Arc::new(Snapshot {
            nodes: nodes.collect(),
            ..Snapshot::default()
        })
    }

    fn node() -> Node {
        let object = serde_json::json!({"metadata": {"name": "x"}});
        let object = serde_json::from_value(object).unwrap();
        crate::cluster::node::parse(&object, &crate::cluster::ParseSettings::default())
            .0
            .unwrap()
    }

    /// The region that node a2 counts in.
    fn region(grace: &mut Grace, nodes: &[(&str, &str)], now: Instant) -> String {
        let mut snapshot = snapshot(nodes);
        grace.handle_snapshot(&mut snapshot, now);
        let node = &snapshot.nodes[&NodeName("a2".to_owned())];
        node.region.0.clone()
    }

    #[test]
    fn a_label_that_is_removed_and_set_again_moves_no_node() {
        let (mut grace, t0) = (Grace::default(), start());
        assert_eq!(region(&mut grace, &[("a2", "nd")], t0), "nd");
        assert_eq!(grace.poll_deadline(), None);

        assert_eq!(region(&mut grace, &[("a2", "")], t0 + seconds(5)), "nd");
        assert_eq!(grace.poll_deadline(), Some(t0 + seconds(35)));
        let mut saved = snapshot(&[("a2", "")]);
        grace.keep(&mut saved);
        assert_eq!(
            saved,
            snapshot(&[("a2", "nd")]),
            "an agent that restarts knows it"
        );
        assert_eq!(region(&mut grace, &[("a2", "")], t0 + seconds(34)), "nd");

        assert_eq!(region(&mut grace, &[("a2", "nd")], t0 + seconds(34)), "nd");
        assert_eq!(grace.poll_deadline(), None);
        // The next removal has a grace of its own.
        assert_eq!(region(&mut grace, &[("a2", "")], t0 + seconds(60)), "nd");
        assert_eq!(grace.poll_deadline(), Some(t0 + seconds(90)));
    }

    #[test]
    fn a_label_that_stays_away_takes_effect_after_the_grace() {
        let (mut grace, t0) = (Grace::default(), start());
        region(&mut grace, &[("a2", "nd")], t0);
        region(&mut grace, &[("a2", "")], t0);
        assert_eq!(region(&mut grace, &[("a2", "")], t0 + GRACE), "");
        assert_eq!(grace.poll_deadline(), None);
        assert_eq!(region(&mut grace, &[("a2", "")], t0 + seconds(31)), "");
    }

    #[test]
    fn another_region_is_followed_at_once() {
        let (mut grace, t0) = (Grace::default(), start());
        region(&mut grace, &[("a2", "nd")], t0);
        assert_eq!(region(&mut grace, &[("a2", "third")], t0), "third");
        region(&mut grace, &[("a2", "")], t0);
        assert_eq!(region(&mut grace, &[("a2", "nd")], t0 + seconds(1)), "nd");
    }

    #[test]
    fn a_node_that_is_deleted_and_made_anew_has_no_last_region() {
        let (mut grace, t0) = (Grace::default(), start());
        region(&mut grace, &[("a2", "nd")], t0);
        grace.handle_snapshot(&mut snapshot(&[]), t0);
        assert_eq!(region(&mut grace, &[("a2", "")], t0 + seconds(1)), "");
    }

    #[test]
    fn a_node_that_never_had_a_region_waits_for_nothing() {
        let (mut grace, t0) = (Grace::default(), start());
        assert_eq!(region(&mut grace, &[("a2", "")], t0), "");
        assert_eq!(grace.poll_deadline(), None);
    }
}
