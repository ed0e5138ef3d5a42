//! Echoes through the leaders: which of them forward, and which regions each one reaches. Pure, time passed in.
//!
//! The verdicts enter the plan of this node alone, never the topology, on which all nodes must agree.

use std::collections::{BTreeMap, BTreeSet};

use crate::liveness::PathState;
use crate::topology::{NodeName, SegmentName};
use crate::wireguard::PeerId;

/// What this node's echoes say of the leaders. Without echoes it is empty, and every path is
/// [`PathState::Unknown`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Verdicts {
    /// The paths to leaders of other regions, on a leader.
    pub peers: BTreeMap<PeerId, PathState>,
    /// The paths through the other leaders of the own region.
    pub leaders: BTreeMap<NodeName, RegionLeader>,
}

/// What is known of another leader of the own region.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RegionLeader {
    /// The path through it.
    pub state: PathState,
    /// The segments that it says it does not reach.
    pub unreached: BTreeSet<SegmentName>,
}

impl Verdicts {
    /// The path to a leader of another region.
    pub fn peer(&self, id: &PeerId) -> PathState {
        self.peers.get(id).copied().unwrap_or_default()
    }

    /// The path through another leader of the own region, to a segment.
    pub fn through(&self, leader: &NodeName, to: &SegmentName) -> Option<PathState> {
        let Some(leader) = self.leaders.get(leader) else {
            return Some(PathState::Unknown);
        };
        (!leader.unreached.contains(to)).then_some(leader.state)
    }
}
