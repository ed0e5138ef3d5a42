//! The tunnel's counters, and the search for peers that follows from them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::super::endpoint_discovery;
use super::super::listen_port::Look;
use super::super::report::Traffic;
use super::{Controller, Effect};
use crate::liveness;
use crate::wireguard::Stats;

impl Controller {
    /// The tunnel's counters are these. Called from time to time, and right before the facts of the kernel
    /// are handed in: a peer that moved a moment ago must not be sent to its old endpoint.
    pub fn handle_tunnel(&mut self, now: Instant, stats: &Stats) {
        self.decided = false;
        self.wait_for_servers(now);
        self.follow_keys(now, stats);
        if self.take_stats(now, stats) {
            self.readiness.handle_unrest(now);
            self.schedule.handle_trigger(now);
        }
        if self.problems().is_empty() {
            self.readiness.handle_no_problems(now, self.unheard());
        }
    }

    /// Whether nothing is awaited that only the tunnel's counters show: the agent has been ready, and every
    /// peer is alive and owes no answer.
    pub fn is_at_rest(&self) -> bool {
        let is_waiting = |peer: &Traffic| peer.is_waiting;
        !self.decided && self.readiness.is_reached() && !self.traffic.values().any(is_waiting)
    }

    /// Takes the counters of all peers, and searches for peers that may have moved. Returns whether an
    /// endpoint or a session changed.
    fn take_stats(&mut self, now: Instant, stats: &Stats) -> bool {
        let (keys, candidates) = (&self.decision.keys, &self.decision.candidates);
        let moved = self.discovery.handle_own(self.decision.seen.clone());
        let mut alive = BTreeMap::new();
        let mut heard = BTreeMap::new();
        let mut callers = BTreeSet::new();
        let (mut relayed, mut only_relayed) = (BTreeSet::new(), BTreeSet::new());
        self.traffic.clear();
        let mut known = BTreeSet::new();
        for (id, peer) in &stats.peers {
            let key = &peer.public_key;
            known.insert(*key);
            let candidates = candidates.get(id).map_or(&[][..], Vec::as_slice);
            let is_relayed = peer.relayed;
            let sign = endpoint_discovery::Sign {
                endpoint: peer.endpoint,
                received: peer.rx_bytes,
                age: peer.last_handshake,
                unanswered: peer.unanswered,
                answer: peer.answer,
                relayed: is_relayed,
            };
            let is_alive = self
                .discovery
                .handle_sign(*key, sign, candidates, keys, now);
            let mut tried = self.discovery.poll_search(key, keys, now);
            let endpoint = peer.endpoint;
            if let Some(endpoint) = endpoint.filter(|_| liveness::is_heard(peer.last_handshake)) {
                if is_relayed {
                    relayed.insert(id.clone());
                } else {
                    heard.insert(*key, endpoint);
                }
                if is_alive {
                    alive.insert(*key, endpoint);
                }
                // Their routers let this node's answers in when it has spoken first.
                let is_tried = tried.contains(&endpoint);
                tried.extend(
                    Some(endpoint)
                        .filter(|_| moved && !candidates.is_empty() && !is_tried && !is_relayed),
                );
            }
            if !self.decision.relayed.contains_key(id) {
                self.discovery.forget_relay(key, now);
            }
            if peer.last_handshake.is_some() && !self.discovery.was_direct(key) {
                only_relayed.insert(*key);
            }
            if peer.heard_unasked.is_some() {
                callers.insert(*key);
            }
            if !tried.is_empty() {
                self.effects.push_back(Effect::FindPeer {
                    id: id.clone(),
                    candidates: tried,
                });
            }
            let traffic = Traffic {
                endpoint: peer.endpoint,
                handshake_age: peer.last_handshake,
                received: peer.rx_bytes,
                sent: peer.tx_bytes,
                is_waiting: !is_alive || peer.unanswered.is_some(),
                candidates: self.discovery.outcomes(key, now),
            };
            self.traffic.insert(*key, traffic);
        }
        self.discovery.retain(|key| known.contains(key));
        self.drops = stats
            .drops
            .iter()
            .map(|(reason, count)| (reason.label().to_owned(), *count))
            .collect();
        let (heard, flapping) = self.flap_damping.handle_observed(&heard, now);
        for peer in flapping {
            tracing::warn!(%peer, "peer endpoint flapping: publishing rate-limited");
        }
        let news =
            self.facts.alive != alive || self.facts.heard != heard || self.facts.callers != callers;
        self.facts.alive = alive;
        self.facts.heard = heard;
        self.facts.callers = callers;
        self.facts.only_relayed = only_relayed;
        if self.facts.relayed != relayed {
            self.facts.relayed = relayed;
            self.follow_targets();
        }
        if self.echoes.is_routed {
            self.try_relays(now);
        }
        self.choose_port(now, stats) || news
    }

    /// Tries the candidates that lead through the relays. The tunnel must know these relays already.
    pub(super) fn try_relays(&mut self, now: Instant) {
        let Some(desired) = &self.decision.desired else {
            return;
        };
        for (id, candidate) in &self.decision.relayed {
            let Some(peer) = desired.peers.get(id) else {
                continue;
            };
            if self.discovery.poll_relay(&peer.public_key, now) {
                self.effects.push_back(Effect::FindPeer {
                    id: id.clone(),
                    candidates: vec![*candidate],
                });
            }
        }
    }

    /// Decides on which UDP port the tunnel listens; true if it is another one from now on.
    fn choose_port(&mut self, now: Instant, stats: &Stats) -> bool {
        let look = Look::new(&self.facts, &self.decision, stats, &self.config.node);
        let change = self.listen_port.handle_look(&look, now);
        if let Some(change) = &change {
            change.log();
        }
        change.is_some()
    }

    /// How many peers have an endpoint and never answered.
    pub(super) fn unheard(&self) -> usize {
        let desired = self.decision.desired.iter();
        desired
            .flat_map(|desired| desired.peers.values())
            .filter(|peer| {
                peer.endpoint.is_some() && !self.facts.heard.contains_key(&peer.public_key)
            })
            .count()
    }
}
