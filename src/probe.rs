//! Echoes through the leaders: which of them forward, and which regions each one reaches. Pure, time passed in.
//!
//! ```text
//!   node ── flannel.1 ──► leader's kernel ──► kilo0 ──► its agent      an echo, to the leader's probe address
//!        ◄── flannel.1 ── leader's kernel ◄── kilo0 ◄── its agent      the answer
//!
//!   leader ── tunnel ──► agent of a leader elsewhere, and back
//! ```
//!
//! An answer through a leader of the own region proves that its node and its agent live and that its kernel forwards
//! both ways. The [`Prober`] sends and answers, [`targets()`] says whose, [`message`] has the wire format, and
//! [`crate::liveness::path`] decides whether a path is up.
//!
//! The verdicts enter the plan of this node alone, never the topology, on which all nodes must agree.

pub mod message;
mod mtus;
pub mod path_mtu;
mod prober;
mod rate;
mod responder;
mod targets;

use std::collections::{BTreeMap, BTreeSet};

pub use self::path_mtu::Sizes;
pub use self::prober::{MtuStats, News, PORT, PathKind, PathStats, Prober, Transmit};
pub use self::responder::Forwarding;
pub use self::targets::{Far, Lead, Targets, targets};
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
