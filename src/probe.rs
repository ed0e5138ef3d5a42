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
//! Leaders also say to each other which segments they reach directly, and [`relay`] chooses by that which of them relays
//! to a segment that a leader does not reach itself.
//!
//! The verdicts enter the plan of this node alone, never the topology, on which all nodes must agree.

pub mod message;
mod mtus;
pub mod path_mtu;
mod prober;
mod rate;
pub mod relay;
mod responder;
mod targets;

use std::collections::{BTreeMap, BTreeSet};

pub use self::path_mtu::Sizes;
pub use self::prober::{MtuStats, News, PORT, PathKind, PathStats, Prober, Transmit, Via};
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
    /// The leaders that relay to the segments that this leader does not reach directly.
    pub relays: BTreeMap<SegmentName, PeerId>,
}

/// What is known of another leader of the own region.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RegionLeader {
    /// The path through it.
    pub state: PathState,
    /// The segments that it says it does not reach.
    pub unreached: BTreeSet<SegmentName>,
    /// The segments that it says it reaches directly, on a leader; `None` where it says nothing of relays.
    pub direct: Option<BTreeSet<SegmentName>>,
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

    /// Whether another leader of the own region is up and reaches a segment without a relay.
    pub fn reaches_directly(&self, leader: &NodeName, to: &SegmentName) -> bool {
        let Some(leader) = self.leaders.get(leader) else {
            return false;
        };
        let is_direct = leader.direct.as_ref();
        leader.state == PathState::Up
            && !leader.unreached.contains(to)
            && is_direct.is_none_or(|direct| direct.contains(to))
    }
}
