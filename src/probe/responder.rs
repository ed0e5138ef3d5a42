//! Answers the echoes of others, and keeps what they prove: whether this leader forwards. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::message::Message;
use super::rate::Rate;
use crate::wireguard::PeerId;

/// How long an echo counts as evidence: as long as it takes until a path is down.
const RECENT: Duration = Duration::from_millis(1_500);
/// How long an answer that arrived counts, from the time at which it was sent. Each echo acknowledges the answer to
/// the one before, so a proof is at most two intervals old.
const PROVEN: Duration = Duration::from_millis(1_750);
/// So many answers without an acknowledgement, the first of them so long ago, say that the way back is broken.
const UNACKNOWLEDGED: (usize, Duration) = (3, Duration::from_millis(1_250));
/// A sender that is silent for so long does not keep this node from stopping.
const GONE: Duration = Duration::from_secs(2);
/// The most echoes of one sender that are answered, a second and at once: one whose path fails sends ten.
const ANSWERS: (u32, u32) = (20, 10);
/// Answers that are remembered for each sender: more than are sent in [`PROVEN`].
const REMEMBERED: usize = 64;

/// The sender of an echo.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Sender {
    /// A node of the own region, by its address in the pod network.
    Member(IpAddr),
    /// A leader of another region.
    Peer(PeerId),
}

/// What the echoes of the region say of this leader's forwarding.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Forwarding {
    /// They say nothing: none arrive, or their senders are new.
    #[default]
    Unknown,
    /// It forwards: a node of the region has received an answer through it.
    Works,
    /// Echoes of the region arrive, and none of their senders has received an answer.
    NoWayBack,
    /// No echo of the region arrives any more, while another leader of the region answers this node's.
    NoWayIn,
}

impl Forwarding {
    /// Whether they say that it does not forward.
    pub fn fails(self) -> bool {
        matches!(self, Self::NoWayBack | Self::NoWayIn)
    }
}

/// An answer that was sent.
#[derive(Clone, Copy, Debug)]
struct Answered {
    token: u64,
    at: Instant,
}

#[derive(Debug)]
struct Seen {
    /// Where its last echo came from.
    from: SocketAddr,
    last: Instant,
    rate: Rate,
    /// The last answers, the oldest first.
    answered: VecDeque<Answered>,
    /// When the latest answer was sent of which it is known that it arrived.
    proven: Option<Instant>,
    /// Whether its last echo says that it knows that this node drains.
    knows: bool,
}

/// All senders of echoes.
#[derive(Debug, Default)]
pub(super) struct Responder {
    seen: BTreeMap<Sender, Seen>,
}

impl Responder {
    /// Forgets senders that are none any more.
    pub(super) fn retain(&mut self, is_sender: impl Fn(&Sender) -> bool) {
        self.seen.retain(|sender, _| is_sender(sender));
    }

    /// An echo came from a known sender. Returns whether to answer it.
    pub(super) fn handle_echo(
        &mut self,
        now: Instant,
        sender: Sender,
        from: SocketAddr,
        echo: &Message,
    ) -> bool {
        let seen = self.seen.entry(sender).or_insert_with(|| Seen {
            from,
            last: now,
            rate: Rate::new(ANSWERS.0, ANSWERS.1),
            answered: VecDeque::new(),
            proven: None,
            knows: false,
        });
        if !seen.rate.take(now) {
            return false;
        }
        seen.from = from;
        seen.last = now;
        seen.knows = echo.knows;
        let mut answers = seen.answered.iter();
        if let Some(answer) = answers.find(|answer| answer.token == echo.acknowledged) {
            seen.proven = seen.proven.max(Some(answer.at));
        }
        true
    }

    /// An answer with this token was sent.
    pub(super) fn handle_answered(&mut self, now: Instant, sender: &Sender, token: u64) {
        let Some(seen) = self.seen.get_mut(sender) else {
            return;
        };
        if seen.answered.len() == REMEMBERED {
            seen.answered.pop_front();
        }
        seen.answered.push_back(Answered { token, at: now });
    }

    /// The last echo of each sender that is still there, to be answered once more.
    pub(super) fn recent(&self, now: Instant) -> Vec<(Sender, SocketAddr, u64)> {
        let recent = self.seen.iter().filter(|(_, seen)| !is_gone(seen, now));
        recent
            .filter_map(|(sender, seen)| {
                Some((sender.clone(), seen.from, seen.answered.back()?.token))
            })
            .collect()
    }

    /// Whether every sender that is still there knows that this node drains.
    pub(super) fn all_know(&self, now: Instant) -> bool {
        let mut seen = self.seen.values();
        seen.all(|seen| seen.knows || is_gone(seen, now))
    }

    /// What the members' echoes say. `answering` holds the other leaders of the region that answer this node, by the
    /// addresses that their echoes come from: since when they do without a gap, and the last time.
    pub(super) fn forwarding(
        &self,
        now: Instant,
        answering: &BTreeMap<IpAddr, (Instant, Instant)>,
    ) -> Forwarding {
        let is_recent = |at: Instant| now.saturating_duration_since(at) <= RECENT;
        let members = || {
            self.seen.iter().filter_map(|(sender, seen)| match sender {
                Sender::Member(address) => Some((address, seen)),
                Sender::Peer(_) => None,
            })
        };
        let mut arriving = members()
            .filter(|(_, seen)| is_recent(seen.last))
            .peekable();
        if arriving.peek().is_some() {
            let (mut works, mut fails) = (false, false);
            for (_, seen) in arriving {
                let age = |at: Instant| now.saturating_duration_since(at);
                works |= seen.proven.is_some_and(|at| age(at) <= PROVEN);
                let lost = seen.answered.iter();
                let mut lost = lost.filter(|answer| Some(answer.at) > seen.proven);
                let (least, since) = UNACKNOWLEDGED;
                fails |= lost.next().is_some_and(|first| age(first.at) > since)
                    && lost.count() + 1 >= least;
            }
            return match (works, fails) {
                (true, _) => Forwarding::Works,
                (false, true) => Forwarding::NoWayBack,
                (false, false) => Forwarding::Unknown,
            };
        }
        // A leader that answers is alive and sends echoes to all others: they do not get through.
        let is_shut_out = members().any(|(address, seen)| {
            answering.get(address).is_some_and(|(since, last)| {
                is_recent(*last) && last.saturating_duration_since(seen.last.max(*since)) > RECENT
            })
        });
        if is_shut_out {
            Forwarding::NoWayIn
        } else {
            Forwarding::Unknown
        }
    }
}

fn is_gone(seen: &Seen, now: Instant) -> bool {
    now.saturating_duration_since(seen.last) > GONE
}
