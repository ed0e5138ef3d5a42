//! The UDP port that the tunnel listens on: `--port`, or another one where a router on the way keeps that from a
//! leader behind NAT. Pure: the time is passed in.
//!
//! A router that masquerades keeps a host's port, unless another of its hosts has that port towards the same
//! destination. A node that led the region for a moment leaves such a mapping behind. Its successor gets another
//! port there, and a router with Linux gives it that port towards its next destinations, too
//! (`find_appropriate_src` in `net/netfilter/nf_nat_core.c`). Who sees the leader from elsewhere publishes the port
//! that it sees, the leader behind the other NAT calls that one, and both routers drop what they do not expect.
//! The leaders' initiations keep these mappings alive, so this does not end. A port that no other node of the region
//! has used has no such mapping.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::decision::{Decision, Facts};
use crate::topology::{Leader, Mode, NodeName, Origin};
use crate::wireguard::key::PublicKey;
use crate::wireguard::{PeerStats, Stats};

/// How long a leader sends initiations to a peer without an answer before it takes another port: two attempts
/// of each side at every candidate.
const UNANSWERED: Duration = Duration::from_secs(10);
/// The same for the leader with the greater key: what the other's change brings shows before that. It may bring
/// nothing, since the port that a router gave this leader stays the same towards the other's new one.
const SECOND: Duration = Duration::from_secs(15);
/// The pause before the next change, doubled with each: sessions with peers behind NAT stop for the second or
/// two until those peers hear of the new port.
const PAUSE: Duration = Duration::from_secs(300);
/// Changes at most while a node leads. Where none of them helps, a NAT gives each destination another port.
const MAX_CHANGES: usize = 4;
/// A node that has not led for so long listens on `--port` again.
const KEPT: Duration = Duration::from_secs(60);
/// The first of the ports to choose from, and how many they are (RFC 6335, section 6: dynamic ports).
const FIRST_PORT: u16 = 49_152;
const PORTS: u16 = 16_384;

/// What the choice depends on.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Look {
    /// This node leads by Selvedge's algorithm, and its operator forced no endpoint.
    pub may_choose: bool,
    /// Others see this node at an address that it does not have, a session with another leader is alive, and
    /// no peer ever called this node unasked: there is neither a forwarded port nor a broken uplink.
    pub is_behind_nat: bool,
    /// The leaders behind NAT that other leaders see and that never shook hands with this node, but through a relay: a
    /// relay that answers is no reason to give up the direct path, and the sessions through it outlive the change.
    pub unanswered: BTreeSet<PublicKey>,
}

impl Look {
    /// What the last pass and the tunnel say.
    pub fn new(facts: &Facts, decision: &Decision, stats: &Stats, me: &NodeName) -> Self {
        let topology = &decision.topology;
        let own = facts.snapshot.nodes.get(me);
        let is_alive = |key: &PublicKey| facts.alive.contains_key(key);
        let is_unanswered = |leader: &Leader| {
            let id = leader.peer_id();
            let candidates = decision.candidates.get(&id).map_or(&[][..], Vec::as_slice);
            let has = |origin| candidates.iter().any(|at| at.origin == origin);
            let peer = stats.peers.get(&id);
            let is_met = |peer: &PeerStats| {
                peer.last_handshake.is_some() && !facts.only_relayed.contains(&peer.public_key)
            };
            peer.is_some_and(|peer| !is_met(peer))
                && has(Origin::Discovered)
                && !has(Origin::Forced)
        };
        let leaders = || topology.leaders().map(|(_, leader)| leader);
        let unanswered = leaders().filter(|leader| is_unanswered(leader));
        Self {
            may_choose: topology.mode == Mode::Native
                && topology.is_leader(me)
                && own.is_some_and(|own| !own.endpoint_forced),
            is_behind_nat: !decision.seen.is_empty()
                && leaders().any(|leader| is_alive(&leader.public_key()))
                && facts.callers.is_empty(),
            unanswered: unanswered.map(Leader::public_key).collect(),
        }
    }
}

/// A change of the port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PortChange {
    /// The port until now.
    pub from: u16,
    /// The port from now on.
    pub to: u16,
    /// The peer that never answered on the old one; `None` for the way back to `--port`.
    pub peer: Option<PublicKey>,
}

impl PortChange {
    /// One line in the log.
    pub fn log(&self) {
        let Self { from, to, peer } = self;
        match peer {
            Some(peer) => {
                tracing::info!(%peer, from, to, "leader behind NAT does not answer: listening on another UDP port");
            }
            None => tracing::info!(from, to, "no longer the leader: listening on --port again"),
        }
    }
}

/// The port, and what speaks for another.
#[derive(Debug)]
pub struct ListenPort {
    key: PublicKey,
    configured: u16,
    /// The port that was taken instead.
    chosen: Option<u16>,
    /// The peer it was taken for, where this run of the agent took it.
    peer: Option<PublicKey>,
    /// Changes since the node began to lead.
    changes: usize,
    /// Since when each peer does not answer.
    since: BTreeMap<PublicKey, Instant>,
    /// No change before this time.
    not_before: Option<Instant>,
    /// When the node last led.
    led: Option<Instant>,
    has_published: bool,
}

impl ListenPort {
    /// `--port`, for the node with this key.
    pub fn new(configured: u16, key: PublicKey) -> Self {
        Self {
            key,
            configured,
            chosen: None,
            peer: None,
            changes: 0,
            since: BTreeMap::new(),
            not_before: None,
            led: None,
            has_published: false,
        }
    }

    /// The port to publish and to listen on.
    pub fn port(&self) -> u16 {
        self.chosen.unwrap_or(self.configured)
    }

    /// Whether the port is not `--port`, and the peer it was taken for, where that is known.
    pub fn reason(&self) -> Option<Option<PublicKey>> {
        self.chosen.map(|_| self.peer)
    }

    /// Takes the port of the endpoint on this node's Node. The first is that of an earlier run: if that run chose
    /// it, peers know it and routers have a mapping for it, so this run goes on with it.
    pub fn handle_published(&mut self, port: u16, now: Instant) {
        if std::mem::replace(&mut self.has_published, true) {
            return;
        }
        if let Some(index) = self.choices().iter().position(|choice| *choice == port) {
            self.chosen = Some(port);
            self.changes = (index + 1).min(MAX_CHANGES);
            self.not_before = Some(now + PAUSE);
            self.led = Some(now);
        }
    }

    /// Another process has this port, so the next one is taken.
    pub fn handle_taken(&mut self, port: u16) -> Option<PortChange> {
        let taken = self.chosen.filter(|chosen| *chosen == port)?;
        let choices = self.choices();
        let index = choices.iter().position(|choice| *choice == taken)?;
        let to = *choices.get(index + 1)?;
        self.chosen = Some(to);
        Some(PortChange {
            from: taken,
            to,
            peer: self.peer,
        })
    }

    /// Takes a look, and returns the change that follows from it.
    pub fn handle_look(&mut self, look: &Look, now: Instant) -> Option<PortChange> {
        let from = self.port();
        if look.may_choose {
            self.led = Some(now);
        } else if self.led.take_if(|led| is_past(*led, KEPT, now)).is_some() {
            *self = Self {
                has_published: true,
                ..Self::new(self.configured, self.key)
            };
            let to = self.port();
            let peer = None;
            return (to != from).then_some(PortChange { from, to, peer });
        }
        let may_change = look.may_choose && look.is_behind_nat;
        let is_unanswered = |key: &PublicKey| may_change && look.unanswered.contains(key);
        self.since.retain(|key, _| is_unanswered(key));
        for key in look.unanswered.iter().filter(|key| is_unanswered(key)) {
            self.since.entry(*key).or_insert(now);
        }
        let (peer, to) = (self.due(now)?, self.next_port()?);
        self.chosen = Some(to);
        self.peer = Some(peer);
        self.not_before = Some(now + PAUSE * (1 << self.changes));
        self.changes += 1;
        self.since.clear();
        Some(PortChange {
            from,
            to,
            peer: Some(peer),
        })
    }

    /// The peer for which another port is due.
    fn due(&self, now: Instant) -> Option<PublicKey> {
        let may_change = self.changes < MAX_CHANGES && self.not_before.is_none_or(|at| now >= at);
        let patience = |key: &PublicKey| {
            if self.key < *key { UNANSWERED } else { SECOND }
        };
        let mut since = self.since.iter();
        let (key, _) = since.find(|(key, since)| is_past(**since, patience(key), now))?;
        may_change.then_some(*key)
    }

    /// Ports that depend on the key alone: other nodes of the region have others, and the next run has the same.
    fn choices(&self) -> Vec<u16> {
        let (pairs, _) = self.key.0.as_chunks::<2>();
        let port = |pair: &[u8; 2]| FIRST_PORT + u16::from_be_bytes(*pair) % PORTS;
        pairs.iter().map(port).collect()
    }

    fn next_port(&self) -> Option<u16> {
        let mut choices = self.choices().into_iter().skip(self.changes);
        choices.find(|port| *port != self.port() && *port != self.configured)
    }
}

fn is_past(since: Instant, patience: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) >= patience
}

#[cfg(test)]
#[path = "listen_port/tests.rs"]
mod tests;
