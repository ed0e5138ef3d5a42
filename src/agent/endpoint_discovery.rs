//! Which candidate endpoints of each peer are tried, and when; and whether a peer still answers. Pure: the
//! time is passed in.
//!
//! No candidate is believed by its look or its origin. A peer without a session gets one
//! handshake initiation at all of its candidates, and the first that answers is used, as with ICE (RFC 8445).
//! A peer that stops answering is noticed by the tunnel's counters, and its candidates are tried again beside
//! the traffic to the present endpoint, which only an answer moves. The initiation also opens the NAT on this
//! side. While a peer is behind a relay its other candidates are tried all the time, so that the direct path is found as
//! soon as there is one. The candidate through a relay is tried alone: the peer answers the first copy of an initiation,
//! and the relay's copy may overtake the others.
//!
//! Peers behind NAT learn from what others publish that they have moved, and call each peer once, so
//! that the routers of both sides let the answers in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::liveness::{self, Signs};
use crate::topology::{Candidate, Origin, Topology};
use crate::wireguard::Answer;
use crate::wireguard::key::PublicKey;

/// Between two attempts, as between the initiations of WireGuard (paper, 6.1: REKEY_TIMEOUT).
const AGAIN: Duration = Duration::from_secs(5);
/// After an attempt at all candidates without an answer one of them is tried alone: the peer takes the first
/// copy of an initiation, and the path on which that came may not carry the answer.
const ALONE: Duration = Duration::from_secs(2);
/// From this attempt on they are further apart: less than the 30 seconds after which a NAT forgets an
/// unanswered flow, so that the two sides' attempts meet.
const PATIENT: u32 = 6;
const SELDOM: Duration = Duration::from_secs(25);
/// Candidates that are tried at once, the likeliest first.
const MAX_TRIED: usize = crate::wireguard::MAX_CANDIDATES;

/// What the topology says of each key: found out once, since with a tunnel from every node to every other
/// there are as many peers as segments to look through at every look at the tunnel.
#[derive(Clone, Debug, Default)]
pub struct Keys(BTreeMap<PublicKey, Known>);

#[derive(Clone, Copy, Debug)]
struct Known {
    /// The seconds between the keepalives that the peer sends unprompted; 0 for none.
    keepalive: u16,
    is_leader: bool,
}

impl Keys {
    /// The leaders' keys and those of VPN peers.
    pub fn new(topology: &Topology) -> Self {
        let mut keys = BTreeMap::new();
        for (_, leader) in topology.leaders() {
            for key in &leader.keys {
                keys.entry(*key).or_insert(Known {
                    keepalive: leader.persistent_keepalive,
                    is_leader: true,
                });
            }
        }
        for peer in &topology.peers {
            keys.entry(peer.public_key).or_insert_with(|| Known {
                keepalive: peer.persistent_keepalive,
                is_leader: false,
            });
        }
        Self(keys)
    }

    fn keepalive(&self, key: &PublicKey) -> u16 {
        self.0.get(key).map_or(0, |known| known.keepalive)
    }

    /// Whether it is a leader's key.
    pub fn is_leader(&self, key: &PublicKey) -> bool {
        self.0.get(key).is_some_and(|known| known.is_leader)
    }
}

/// The tunnel's counters of a peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sign {
    /// Where it sends.
    pub endpoint: Option<SocketAddr>,
    /// The bytes that came from the peer.
    pub received: u64,
    /// Since the last handshake; `None` where there was none.
    pub age: Option<Duration>,
    /// How long data or an initiation was sent and nothing came back; `None` where nothing is awaited.
    pub unanswered: Option<Duration>,
    /// The last answer to an initiation of this side.
    pub answer: Option<Answer>,
    /// Whether it sends through a relay.
    pub relayed: bool,
}

/// What came of a candidate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Outcome {
    /// The candidate.
    pub candidate: Candidate,
    /// Whether the tunnel sends there.
    pub in_use: bool,
    /// Its last answer, if it ever answered: how long that took, and how long ago it was.
    pub answered: Option<(Duration, Duration)>,
    /// How long ago it was last tried.
    pub tried: Option<Duration>,
}

/// Every peer of the tunnel, and what came of its candidates.
#[derive(Debug, Default)]
pub struct EndpointDiscovery {
    peers: BTreeMap<PublicKey, Peer>,
    /// Where other leaders see this node; `None` before the first observation.
    own: Option<BTreeSet<SocketAddr>>,
}

#[derive(Debug)]
struct Peer {
    received: u64,
    /// When it was last heard, or else first looked at.
    at: Instant,
    sign: Sign,
    /// The likeliest first.
    candidates: Vec<Tried>,
    /// Whether something came while it was suspect, and from where it was expected.
    patient: bool,
    was_suspect: bool,
    attempts: u32,
    next: Instant,
    /// Which candidate to try alone next, if the attempt at all of them brings no answer.
    alone: Option<usize>,
    rotation: usize,
    /// When the candidate through a relay was last tried.
    relay_tried: Option<Instant>,
    /// Whether it ever had a session without a relay.
    was_direct: bool,
}

#[derive(Debug)]
struct Tried {
    candidate: Candidate,
    /// Since when it is known; `None` for what is older than this node's first look at the peer.
    since: Option<Instant>,
    tried: Option<Instant>,
    /// How long the last answer took, and when it came.
    answered: Option<(Duration, Instant)>,
}

impl EndpointDiscovery {
    /// Takes the tunnel's counters and the candidates of a peer; returns whether the peer is alive.
    pub fn handle_sign(
        &mut self,
        key: PublicKey,
        sign: Sign,
        candidates: &[Candidate],
        keys: &Keys,
        now: Instant,
    ) -> bool {
        let is_new = !self.peers.contains_key(&key);
        let peer = self
            .peers
            .entry(key)
            .or_insert_with(|| Peer::new(sign, now));
        if peer.received != sign.received {
            peer.received = sign.received;
            peer.at = now;
            if !sign.relayed {
                peer.attempts = 0;
                peer.alone = None;
            }
            peer.patient |= peer.was_suspect && peer.sign.endpoint == sign.endpoint;
            peer.was_suspect = false;
        }
        if peer.sign.endpoint != sign.endpoint {
            peer.patient = false;
        }
        if sign.relayed && !peer.sign.relayed {
            // The direct candidates have just failed.
            (peer.attempts, peer.alone) = (0, None);
            peer.next = now + AGAIN;
        }
        if peer.sign.relayed && !sign.relayed {
            // The relay stays chosen for a while, and an answer through it would end the direct way.
            peer.relay_tried = Some(now);
        }
        peer.was_direct |= sign.age.is_some() && !sign.relayed;
        peer.sign = sign;
        peer.was_suspect |= peer.is_suspect();
        if peer.take_candidates(candidates, is_new, now) {
            peer.attempts = 0;
            peer.next = now;
        }
        peer.take_answer(sign.answer, now);
        liveness::is_alive(peer.signs(keys.keepalive(&key), now))
    }

    /// The candidates of a peer that are to be tried now, by one initiation.
    pub fn poll_search(&mut self, key: &PublicKey, keys: &Keys, now: Instant) -> Vec<SocketAddr> {
        let Some(peer) = self.peers.get_mut(key) else {
            return Vec::new();
        };
        if now < peer.next {
            return Vec::new();
        }
        let (keepalive, is_leader) = (keys.keepalive(key), keys.is_leader(key));
        let is_lost = match peer.sign.age {
            Some(_) if peer.sign.relayed => true,
            // A VPN peer that this node never heard connects to it, unless its object says where it is.
            None => is_leader || peer.has_forced(),
            Some(_) => {
                let signs = peer.signs(keepalive, now);
                peer.is_suspect() || keepalive > 0 && liveness::is_silent(signs)
            }
        };
        let mut endpoints = peer.to_try(is_lost);
        if !is_leader && !peer.is_suspect() {
            // A laptop that is asleep is not called where it was.
            endpoints.retain(|endpoint| peer.sign.endpoint != Some(*endpoint));
        }
        if endpoints.is_empty() {
            return endpoints;
        }
        let endpoints = peer.attempt(endpoints, now);
        for tried in &mut peer.candidates {
            if endpoints.contains(&tried.candidate.address) {
                tried.tried = Some(now);
            }
        }
        endpoints
    }

    /// Whether to try the candidate through a relay now, alone. It is asked for while a relay is chosen.
    pub fn poll_relay(&mut self, key: &PublicKey, now: Instant) -> bool {
        let Some(peer) = self.peers.get_mut(key).filter(|peer| !peer.sign.relayed) else {
            return false;
        };
        let is_due = peer.relay_tried.is_none_or(|at| now >= at + AGAIN);
        if is_due {
            peer.relay_tried = Some(now);
            // The next initiation would replace this one.
            peer.next = peer.next.max(now + ALONE);
        }
        is_due
    }

    /// No relay is chosen for a peer: the next one is tried at once, and so are the direct candidates, if the peer was
    /// behind one.
    pub fn forget_relay(&mut self, key: &PublicKey, now: Instant) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.relay_tried.take().is_some() && peer.sign.relayed {
            (peer.attempts, peer.alone) = (0, None);
            peer.next = now;
        }
    }

    /// Whether a peer ever had a session without a relay.
    pub fn was_direct(&self, key: &PublicKey) -> bool {
        self.peers.get(key).is_some_and(|peer| peer.was_direct)
    }

    /// Takes where other leaders see this node; true if it has moved.
    pub fn handle_own(&mut self, seen: BTreeSet<SocketAddr>) -> bool {
        if seen.is_empty() {
            return false;
        }
        let has_moved = self
            .own
            .as_ref()
            .is_some_and(|before| !seen.is_subset(before));
        self.own = Some(seen);
        has_moved
    }

    /// What came of the candidates of a peer, the likeliest first.
    pub fn outcomes(&self, key: &PublicKey, now: Instant) -> Vec<Outcome> {
        let Some(peer) = self.peers.get(key) else {
            return Vec::new();
        };
        let outcome = |tried: &Tried| Outcome {
            candidate: tried.candidate,
            in_use: peer.sign.endpoint == Some(tried.candidate.address),
            answered: tried
                .answered
                .map(|(round_trip, at)| (round_trip, now.saturating_duration_since(at))),
            tried: tried.tried.map(|at| now.saturating_duration_since(at)),
        };
        peer.candidates.iter().map(outcome).collect()
    }

    /// Forgets peers that the tunnel no longer has.
    pub fn retain(&mut self, has: impl Fn(&PublicKey) -> bool) {
        self.peers.retain(|key, _| has(key));
    }
}

impl Peer {
    fn new(sign: Sign, now: Instant) -> Self {
        Self {
            received: sign.received,
            at: now,
            sign,
            candidates: Vec::new(),
            patient: false,
            was_suspect: false,
            attempts: 0,
            next: now,
            alone: None,
            rotation: 0,
            relay_tried: None,
            was_direct: false,
        }
    }

    /// Replaces the candidates and keeps the results of those that stay. Returns whether one is new.
    fn take_candidates(&mut self, candidates: &[Candidate], is_new: bool, now: Instant) -> bool {
        let same = |tried: &Tried, candidate: &Candidate| tried.candidate == *candidate;
        let old = &mut self.candidates;
        if old.len() == candidates.len() && old.iter().zip(candidates).all(|(a, b)| same(a, b)) {
            return false;
        }
        let mut before: BTreeMap<_, _> = std::mem::take(old)
            .into_iter()
            .map(|tried| (tried.candidate.address, tried))
            .collect();
        let mut has_news = false;
        self.candidates = candidates
            .iter()
            .take(MAX_TRIED)
            .map(|&candidate| match before.remove(&candidate.address) {
                Some(tried) => Tried { candidate, ..tried },
                None => {
                    has_news = true;
                    Tried {
                        candidate,
                        since: (!is_new).then_some(now),
                        tried: None,
                        answered: None,
                    }
                }
            })
            .collect();
        has_news
    }

    fn take_answer(&mut self, answer: Option<Answer>, now: Instant) {
        let Some(answer) = answer else { return };
        let mut candidates = self.candidates.iter_mut();
        if let Some(tried) = candidates.find(|tried| tried.candidate.address == answer.from) {
            let at = now.checked_sub(answer.ago).unwrap_or(now);
            tried.answered = Some((answer.round_trip, at));
        }
    }

    fn is_suspect(&self) -> bool {
        liveness::is_suspect(self.sign.unanswered, self.patient)
    }

    /// What is known of its answers; `keepalive` as in [`Signs`].
    fn signs(&self, keepalive: u16, now: Instant) -> Signs {
        Signs {
            handshake: self.sign.age,
            received: now.saturating_duration_since(self.at),
            keepalive,
        }
    }

    fn has_forced(&self) -> bool {
        let mut candidates = self.candidates.iter();
        candidates.any(|tried| tried.candidate.origin == Origin::Forced)
    }

    /// Where to try: everywhere if the peer is lost, else at the new candidates.
    fn to_try(&self, is_lost: bool) -> Vec<SocketAddr> {
        // What came in at the same look may be from before: one attempt too many costs nothing.
        let is_news = |tried: &Tried| {
            tried.since.is_some_and(|since| since >= self.at)
                && self.sign.endpoint != Some(tried.candidate.address)
        };
        let tried = self.candidates.iter();
        tried
            .filter(|tried| is_lost || is_news(tried))
            .map(|tried| tried.candidate.address)
            .collect()
    }

    /// Takes note of an attempt, and returns the endpoints at which it is made.
    fn attempt(&mut self, endpoints: Vec<SocketAddr>, now: Instant) -> Vec<SocketAddr> {
        if let Some(index) = self.alone.take() {
            self.next = now + self.pause() - ALONE;
            return vec![endpoints[index % endpoints.len()]];
        }
        self.attempts += 1;
        if endpoints.len() > 1 && self.attempts > 1 {
            self.alone = Some(self.rotation);
            self.rotation = self.rotation.wrapping_add(1);
            self.next = now + ALONE;
        } else {
            self.next = now + self.pause();
        }
        endpoints
    }

    fn pause(&self) -> Duration {
        match self.attempts {
            0..PATIENT => AGAIN,
            _ => SELDOM,
        }
    }
}

#[cfg(test)]
#[path = "endpoint_discovery/tests.rs"]
mod tests;
