//! Which leader elsewhere relays to a region that this leader does not reach directly. Pure, time passed in.
//!
//! A relay carries the tunnel's datagrams, which are encrypted end to end. Each end chooses on its own, by what it
//! sees:
//!
//! - It relays to a segment only while no leader of that segment answers directly, for [`SILENT`] after the last
//!   direct answer, or for [`NEVER`] where there never was one, and while no other leader of the own region says that
//!   it reaches the segment directly.
//! - A relay is a leader of a third region whose path is up (or returning, where no other is) and direct, and whose
//!   echoes say that it reaches the segment directly and relays to it. So a datagram passes one relay.
//! - Regions come in the operator's order of preference, then the lowest round-trip time counts, then the name.
//!   Another relay must be better by [`BETTER`] for [`SETTLED`]; a relay that is lost is replaced at once.
//! - A relay over which no answer comes for [`TRIAL`] is left for another one, and comes last for [`DISTRUST`].
//! - A direct path that answers for [`HELD`] ends the relay. Until then datagrams that are under way are still
//!   accepted. Where another leader of the region has the direct path, [`HELD_FOR_REGION`] is enough.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::liveness::PathState;
use crate::topology::{NodeName, SegmentName};
use crate::wireguard::PeerId;

/// How long a segment has been down before a relay is chosen. When a leader has died, those elsewhere notice it within the
/// interval of their echoes, say so with the next one, and then none of them relays to it.
const SILENT: Duration = Duration::from_millis(1_100);
/// The same for a leader that never answered: its direct candidates come first. Its path is down after two seconds.
const NEVER: Duration = Duration::from_secs(5);
const NEVER_SINCE_DOWN: Duration = Duration::from_secs(3);
/// How long a segment is reached directly before its relay ends: longer than the tunnel's counters take to show which
/// way the path goes, and than datagrams are under way.
const HELD: Duration = Duration::from_secs(3);
/// The same where another leader of the own region reaches it directly: the nodes of the region know from the next
/// echoes.
const HELD_FOR_REGION: Duration = Duration::from_secs(1);
/// By how much another relay must be nearer, in time and as a share of the present round-trip time.
const BETTER: (Duration, f64) = (Duration::from_millis(5), 0.7);
/// For how long it must be so.
const SETTLED: Duration = Duration::from_secs(10);
/// How long a relay is given until an answer comes through it: two handshakes.
const TRIAL: Duration = Duration::from_secs(11);
/// How long a relay that brought no answer comes last.
const DISTRUST: Duration = Duration::from_secs(60);
/// How often round-trip times are compared.
const LOOK: Duration = Duration::from_secs(1);

/// The path to a leader elsewhere, as far as it decides on relays.
#[derive(Clone, Debug)]
pub struct Way {
    /// The leader.
    pub node: NodeName,
    /// Its segment.
    pub segment: SegmentName,
    /// Segments of one group reach each other without the tunnel.
    pub group: SegmentName,
    /// What the echoes say.
    pub state: PathState,
    /// Since when.
    pub since: Instant,
    /// The smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// Whether the tunnel's datagrams go through a relay.
    pub relayed: bool,
    /// The operator's preference for this leader as a relay, the lowest first; `None` if it may not relay.
    pub rank: Option<usize>,
    /// The segments that it says it relays to.
    pub relays_to: BTreeSet<SegmentName>,
}

impl Way {
    fn is_direct(&self) -> bool {
        self.state.answers() && !self.relayed
    }

    /// Since when it may be silent for long enough.
    fn lost_at(&self) -> Instant {
        let patience = match (self.rtt, self.state) {
            (None, PathState::Unknown) => NEVER,
            (None, _) => NEVER_SINCE_DOWN,
            (Some(_), _) => SILENT,
        };
        self.since + patience
    }
}

/// The relay to a segment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Relay {
    /// The leader that relays.
    pub peer: PeerId,
    /// Since when.
    pub since: Instant,
}

/// The relay of a segment, and what speaks for its end.
#[derive(Clone, Debug)]
struct Choice {
    relay: Relay,
    /// Since when no path of the segment answers.
    unanswered: Option<Instant>,
    /// Since when the segment needs no relay.
    needless: Option<Instant>,
    /// Another relay that is better, and since when.
    better: Option<(PeerId, Instant)>,
}

impl Choice {
    fn new(peer: PeerId, now: Instant) -> Self {
        Self {
            relay: Relay { peer, since: now },
            unanswered: None,
            needless: None,
            better: None,
        }
    }
}

/// The relays of one leader.
#[derive(Clone, Debug, Default)]
pub struct Relays {
    chosen: BTreeMap<SegmentName, Choice>,
    /// Relays that brought no answer, and until when they come last.
    failed: BTreeMap<(SegmentName, PeerId), Instant>,
    due: Option<Instant>,
}

impl Relays {
    /// The paths are these now. `siblings` are the segments that another leader of the own region reaches directly.
    pub fn handle_ways(
        &mut self,
        now: Instant,
        ways: &BTreeMap<PeerId, Way>,
        siblings: &BTreeSet<SegmentName>,
    ) {
        self.failed.retain(|_, until| *until > now);
        let mut segments = BTreeMap::<&SegmentName, Vec<&Way>>::new();
        for way in ways.values() {
            segments.entry(&way.segment).or_default().push(way);
        }
        let mut before = std::mem::take(&mut self.chosen);
        self.due = None;
        for (segment, to) in segments {
            let before = before.remove(segment);
            let chosen = if to.iter().any(|way| way.is_direct()) {
                before.and_then(|choice| self.hold(now, choice, HELD))
            } else if siblings.contains(segment) {
                before.and_then(|choice| self.hold(now, choice, HELD_FOR_REGION))
            } else {
                self.choose(now, &to, ways, before)
            };
            if let Some(choice) = chosen {
                self.chosen.insert(segment.clone(), choice);
            }
        }
    }

    /// When [`Self::handle_ways`] is to be called although no path has changed.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// The relay to a segment.
    pub fn relay(&self, segment: &SegmentName) -> Option<&Relay> {
        self.chosen.get(segment).map(|choice| &choice.relay)
    }

    /// The leader that relays to each segment that has a relay.
    pub fn peers(&self) -> BTreeMap<SegmentName, PeerId> {
        let chosen = self.chosen.iter();
        chosen
            .map(|(segment, choice)| (segment.clone(), choice.relay.peer.clone()))
            .collect()
    }

    /// Keeps a relay for a while that is not needed any more.
    fn hold(&mut self, now: Instant, mut choice: Choice, held: Duration) -> Option<Choice> {
        let end = *choice.needless.get_or_insert(now) + held;
        (choice.unanswered, choice.better) = (None, None);
        (end > now).then(|| {
            self.wake(end);
            choice
        })
    }

    /// The relay to the segment of some leaders, none of which answers directly.
    fn choose(
        &mut self,
        now: Instant,
        to: &[&Way],
        ways: &BTreeMap<PeerId, Way>,
        before: Option<Choice>,
    ) -> Option<Choice> {
        let target = to.first()?;
        let lost = to.iter().map(|way| way.lost_at()).max()?;
        if before.is_none() && lost > now {
            self.wake(lost);
            return None;
        }
        let before = before.map(|mut choice| {
            choice.needless = None;
            let answers = to.iter().any(|way| way.state.answers());
            let since = *choice.unanswered.get_or_insert(now);
            if answers {
                choice.unanswered = None;
            } else if now.saturating_duration_since(since) >= TRIAL {
                let relay = (target.segment.clone(), choice.relay.peer.clone());
                self.failed.insert(relay, now + DISTRUST);
                choice.unanswered = None;
            }
            choice
        });
        let rank = |id: &PeerId, way: &Way| {
            let relay = (target.segment.clone(), id.clone());
            let failed = self.failed.contains_key(&relay);
            // A path that flapped serves where no other does.
            let flaps = way.state == PathState::Returning;
            Some((failed || flaps, way.rank?))
        };
        let able = ways.iter().filter_map(|(id, way)| {
            let is_able = matches!(way.state, PathState::Up | PathState::Returning)
                && !way.relayed
                && way.group != target.group
                && way.relays_to.contains(&target.segment);
            Some((rank(id, way).filter(|_| is_able)?, way, id))
        });
        let able = able.collect::<Vec<_>>();
        let distance = |way: &Way| way.rtt.unwrap_or(Duration::MAX);
        let best = able
            .iter()
            .min_by_key(|(rank, way, _)| (*rank, distance(way), &way.node));
        let Some((best_rank, best, id)) = best else {
            let is_used = before.as_ref().is_some_and(|choice| {
                let way = ways.get(&choice.relay.peer);
                way.is_some_and(|way| way.state == PathState::Draining)
            });
            return before.filter(|_| is_used);
        };
        self.wake(now + LOOK);
        let present = before.and_then(|choice| {
            let mut able = able.iter();
            let (rank, way, _) = able.find(|(_, _, id)| **id == choice.relay.peer)?;
            Some((choice, *rank, *way))
        });
        let Some((mut choice, rank, present)) = present else {
            return Some(Choice::new((*id).clone(), now));
        };
        // One that failed is left for one that has not.
        if rank.0 && !best_rank.0 {
            return Some(Choice::new((*id).clone(), now));
        }
        let (least, share) = BETTER;
        let is_nearer = distance(best) + least <= distance(present)
            && distance(best) <= distance(present).mul_f64(share);
        if *best_rank < rank || is_nearer {
            let known = choice.better.take().filter(|(peer, _)| peer == *id);
            let (peer, since) = known.unwrap_or_else(|| ((*id).clone(), now));
            if now.saturating_duration_since(since) >= SETTLED {
                return Some(Choice::new(peer, now));
            }
            choice.better = Some((peer, since));
        } else {
            choice.better = None;
        }
        Some(choice)
    }

    fn wake(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

#[cfg(test)]
mod tests;
