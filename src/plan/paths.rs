//! Which of several leaders packets take, by this node's verdicts on the paths through them.
//!
//! Up comes before Returning, then come Unknown, Draining and Down: a path that answers again, though it flapped, is
//! better than one that never answered. All paths of the best class that is there are used. Where all are Down the verdicts make no difference: this node's own uplink may be down.
//!
//! A direct path to a leader elsewhere comes before one through a relay, among paths of one class.
//!
//! What no verdict changes: the prefixes of each route, what the tunnel accepts from a leader, and the nft table.
//!
//! Two hosts judge on their own, so for a moment, or longer where a path is broken in one direction, the packets of
//! a connection and its answers take different leaders:
//!
//! - Through another leader of the own region answers reach a member by flannel's device, whichever leader it sends to.
//!   That is the device of its own route, so a strict reverse-path check accepts them.
//! - On a leader packets out of the tunnel pass a loose check (`sysctls`), and transit is not tracked.
//! - A leader's own pods: the other region sends to that leader itself unless its path is Down or Draining, else through
//!   another leader of the region. The answers then arrive by flannel's device. Where this leader still sends
//!   into its own tunnel, a strict check of flannel's device drops them, until this leader finds the same path Down and
//!   sends through the other leader too. With a loose check (`rp_filter=2`) they are accepted at once. So a path that is
//!   new or has just come back serves that leader's own pods at once: its own packets take it too.
//! - A member's packets never leave a leader towards another node of the region: the nft table drops them. So a
//!   leader that reaches a region only through another leader serves its own pods and host, and its answers to echoes
//!   tell the members to send to the other leader.

use std::collections::{BTreeMap, BTreeSet};

use super::site::{Role, Site};
use crate::liveness::PathState;
use crate::probe::Verdicts;
use crate::state::NextHop;
use crate::topology::{Leader, Segment};

/// The items whose paths are of the best class that is there.
fn best<T>(judged: impl IntoIterator<Item = (T, PathState)>) -> Vec<T> {
    let judged = judged.into_iter();
    best_of(judged.map(|(item, state)| (item, state, false)))
}

/// The same, where some of the paths go through a relay.
fn best_of<T>(judged: impl IntoIterator<Item = (T, PathState, bool)>) -> Vec<T> {
    let class = |state| match state {
        PathState::Up => 0,
        PathState::Returning => 1,
        PathState::Unknown => 2,
        PathState::Draining => 3,
        PathState::Down(_) => 4,
    };
    let judged = judged.into_iter();
    let judged = judged.map(|(item, state, relayed)| (item, (class(state), relayed)));
    let judged = judged.collect::<Vec<_>>();
    let best = judged.iter().map(|(_, class)| *class).min();
    let judged = judged.into_iter();
    judged
        .filter(|(_, class)| Some(*class) == best)
        .map(|(item, _)| item)
        .collect()
}

fn is_down(state: PathState) -> bool {
    matches!(state, PathState::Down(_))
}

/// The verdicts that count. Where no echo at all comes back, this node's own uplink is down, and they say nothing of
/// other nodes.
pub(super) fn trusted(verdicts: &Verdicts) -> &Verdicts {
    static NONE: Verdicts = Verdicts {
        peers: BTreeMap::new(),
        leaders: BTreeMap::new(),
        relays: BTreeMap::new(),
    };
    let leaders = verdicts.leaders.values().map(|leader| leader.state);
    let mut all = verdicts.peers.values().copied().chain(leaders);
    if all.all(is_down) { &NONE } else { verdicts }
}

impl<'a> Site<'a> {
    /// The leaders of the own segment that a follower sends to for a remote segment: the best of those that reach it.
    /// Where none says that it does, the best of all: one that finds a way later tells so later.
    pub(super) fn leaders_towards(&self, remote: &Segment) -> Vec<&'a Leader> {
        let verdicts = self.verdicts;
        let leaders = self.segment.map_or(&[][..], |segment| &segment.leaders);
        let reaching = leaders.iter().filter_map(|leader| {
            // What a leader said before its path went down does not count.
            let state = verdicts.through(&leader.node, &remote.name)?;
            (!is_down(state)).then_some((leader, state))
        });
        let reaching = best(reaching);
        if !reaching.is_empty() {
            return reaching;
        }
        best(
            leaders
                .iter()
                .map(|leader| (leader, self.path_through(leader))),
        )
    }

    /// The leaders of a remote segment that this leader's tunnel sends to.
    pub(super) fn leaders_of(&self, remote: &'a Segment) -> Vec<&'a Leader> {
        let leaders = remote.leaders.iter();
        best_of(leaders.map(|leader| {
            let state = self.verdicts.peer(&leader.peer_id());
            (leader, state, self.is_relayed(leader))
        }))
    }

    /// The leaders of a remote segment to which this leader's tunnel sends what is for their own pods and hosts: those
    /// that it uses, and those that may become used, because their path is new or has just come back.
    pub(super) fn direct_leaders_of(&self, remote: &'a Segment) -> Vec<&'a Leader> {
        let used = self.leaders_of(remote);
        let leaders = remote.leaders.iter();
        let direct = leaders.filter(|leader| {
            let is_used = used.iter().any(|used| used.node == leader.node);
            let state = self.verdicts.peer(&leader.peer_id());
            is_used || matches!(state, PathState::Unknown | PathState::Returning)
        });
        direct.collect()
    }

    /// The next hops of a leader that reaches no leader of a remote segment, or none yet, to those leaders of its own
    /// segment that do without a relay; empty where it sends into its own tunnel.
    pub(super) fn detour(&self, remote: &Segment, v6: bool) -> BTreeSet<NextHop> {
        let verdicts = self.verdicts;
        let reaches = |leader: &Leader| self.answers(remote, leader);
        let cut_off = !remote.leaders.iter().any(reaches);
        let (Some(segment), true) = (self.segment, cut_off) else {
            return BTreeSet::new();
        };
        let others = segment.leaders.iter().filter(|other| {
            other.node != *self.inputs.me && verdicts.reaches_directly(&other.node, &remote.name)
        });
        self.hops_to(others, v6)
    }

    /// The next hops to external peers. They talk to one leader of each region, the primary, and answers must come from
    /// there. Only where the path through it is down another one is tried.
    pub(super) fn peer_hops(&self, v6: bool) -> BTreeSet<NextHop> {
        let leaders = match (self.role, self.segment) {
            (Role::Outsider, _) | (_, None) => return BTreeSet::new(),
            (Role::Leader(_) | Role::Follower, Some(segment)) => segment.leaders.iter(),
        };
        let mut hops = leaders.filter_map(|leader| {
            let is_own = leader.node == *self.inputs.me;
            let hops = if is_own {
                [self.tunnel()].into()
            } else {
                self.hops_to([leader], v6)
            };
            let is_usable = is_own || !is_down(self.path_through(leader));
            (!hops.is_empty()).then_some((hops, is_usable))
        });
        let first = hops.next();
        match first {
            Some((_, true)) | None => first,
            Some(_) => hops.find(|(_, is_usable)| *is_usable).or(first),
        }
        .map(|(hops, _)| hops)
        .unwrap_or_default()
    }

    /// The path through another leader of the own segment, to any segment.
    fn path_through(&self, leader: &Leader) -> PathState {
        let known = self.verdicts.leaders.get(&leader.node);
        known.map(|leader| leader.state).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::liveness::Cause;

    #[test]
    fn all_paths_of_the_best_class_are_used() {
        use PathState::{Down, Draining, Returning, Unknown, Up};

        let down = Down(Cause::Silent);
        for (states, expected) in [
            (&[Up, Unknown, Up][..], &[0, 2][..]),
            (&[Unknown, Draining, down], &[0]),
            (&[Draining, down], &[0]),
            (&[Returning, down, Draining], &[0]),
            (&[Unknown, Returning], &[1]),
            (&[down, Down(Cause::NotForwarding)], &[0, 1]),
            (&[], &[]),
        ] {
            assert_eq!(best(states.iter().copied().enumerate()), expected);
        }
    }
}
