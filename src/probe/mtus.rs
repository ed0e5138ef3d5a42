//! The MTUs of all paths to leaders of other regions: which are measured, and with how many echoes. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::path_mtu::{Ask, Limits, PathMtu, Sizes};
use super::rate::Rate;
use crate::liveness::path::Path;
use crate::wireguard::{OVERHEAD, PeerId, PeerWay};

/// Padded echoes, and the small ones beside them, that all paths together send at most, a second and at once.
const BUDGET: (u32, u32) = (40, 10);
/// A path with so many bytes a second carries traffic: more than echoes and keepalives.
const TRAFFIC: u64 = 4_000;
/// For how long traffic counts.
const RECENT: Duration = Duration::from_secs(3);

/// The measured paths.
#[derive(Debug)]
pub(super) struct Mtus {
    paths: BTreeMap<PeerId, Measured>,
    budget: Rate,
}

#[derive(Debug)]
struct Measured {
    path: PathMtu,
    /// The endpoint's address and the relay.
    way: (IpAddr, Option<PeerId>),
    /// What was sent to the peer until the last look, and when that was.
    sent: u64,
    looked: Instant,
    /// Bytes of padded echoes since then.
    own: u64,
    /// When traffic was last seen.
    busy: Option<Instant>,
}

impl Default for Mtus {
    fn default() -> Self {
        Self {
            paths: BTreeMap::new(),
            budget: Rate::new(BUDGET.0, BUDGET.1),
        }
    }
}

impl Mtus {
    /// Forgets paths that are none any more.
    pub(super) fn retain(&mut self, is_path: impl Fn(&PeerId) -> bool) {
        self.paths.retain(|id, _| is_path(id));
    }

    /// The peers are reached so now. Returns whether a path's MTU may be another.
    pub(super) fn handle_ways(
        &mut self,
        now: Instant,
        sizes: Sizes,
        ways: &BTreeMap<PeerId, PeerWay>,
        is_path: impl Fn(&PeerId) -> bool,
    ) -> bool {
        let before = self.mtus();
        let ways = || ways.iter().filter(|(id, _)| is_path(id));
        // Relays first: what they carry limits the others.
        for (id, way) in ways().filter(|(_, way)| way.relay.is_none()) {
            let limits = Limits::direct(way.address, sizes);
            self.handle_way(now, id, way, limits);
        }
        for (id, way) in ways() {
            let relay = way.relay.as_ref().and_then(|id| self.paths.get(id));
            // One relay deep.
            let Some(relay) = relay.filter(|relay| relay.way.1.is_none()) else {
                continue;
            };
            let (limits, carried) = (*relay.path.limits(), relay.path.mtu());
            let limits = Limits::relayed(way.address, sizes, &limits, carried);
            self.handle_way(now, id, way, limits);
        }
        before != self.mtus()
    }

    fn handle_way(&mut self, now: Instant, id: &PeerId, way: &PeerWay, limits: Limits) {
        let place = (way.address, way.relay.clone());
        let Some(known) = self.paths.get_mut(id) else {
            let known = Measured {
                path: PathMtu::new(now, limits),
                way: place,
                sent: way.sent,
                looked: now,
                own: 0,
                busy: None,
            };
            self.paths.insert(id.clone(), known);
            return;
        };
        if known.way == place {
            known.path.handle_limits(now, limits);
        } else {
            known.way = place;
            known.path.handle_move(now, limits);
        }
        let millis = now.saturating_duration_since(known.looked).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX).max(1);
        let sent = way.sent.saturating_sub(known.sent + known.own);
        if sent.saturating_mul(1_000) / millis >= TRAFFIC {
            known.busy = Some(now);
        }
        (known.sent, known.looked, known.own) = (way.sent, now, 0);
        let is_recent = |at: Instant| now.saturating_duration_since(at) < RECENT;
        known.path.set_busy(now, known.busy.is_some_and(is_recent));
    }

    /// What small echoes say of a path.
    pub(super) fn follow(&mut self, now: Instant, id: &PeerId, echoes: &Path) {
        if let Some(known) = self.paths.get_mut(id) {
            known.path.set_quality(echoes.overdue(), echoes.loss());
            known.path.set_alive(now, echoes.state().answers());
        }
    }

    /// The time of [`Self::poll_timeout`] has come: what to send, as far as the budget allows, and whether a path's MTU is
    /// another. [`Self::handle_sent`] must follow for each.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> (Vec<(PeerId, Ask)>, bool) {
        let mut changed = false;
        let mut due = Vec::new();
        for (id, known) in &mut self.paths {
            let before = known.path.mtu();
            let at = known.path.poll_timeout();
            known.path.handle_timeout(now);
            changed |= known.path.mtu() != before;
            if let Some(ask) = known.path.poll_ask(now) {
                due.push((at, id.clone(), ask));
            }
        }
        due.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        let mut asks = Vec::new();
        for (_, id, ask) in due {
            if !self.budget.take(now) {
                break;
            }
            if ask.beside.is_some() {
                // The pair goes together.
                self.budget.take(now);
            }
            asks.push((id, ask));
        }
        (asks, changed)
    }

    /// The echoes of an ask were sent, with these tokens.
    pub(super) fn handle_sent(
        &mut self,
        now: Instant,
        id: &PeerId,
        ask: Ask,
        tokens: (u64, Option<u64>),
    ) {
        if let Some(known) = self.paths.get_mut(id) {
            for size in [Some(ask.size), ask.beside].into_iter().flatten() {
                known.own += u64::from(size) + OVERHEAD as u64;
            }
            known.path.handle_sent(now, tokens.0, tokens.1);
        }
    }

    /// An answer with this token came from a peer: whether it is to one of these echoes, and whether the MTU is another.
    pub(super) fn handle_answer(&mut self, now: Instant, id: &PeerId, token: u64) -> Option<bool> {
        let known = self.paths.get_mut(id)?;
        let before = known.path.mtu();
        let is_ours = known.path.handle_answer(now, token);
        is_ours.then(|| known.path.mtu() != before)
    }

    /// When [`Self::handle_timeout`] is to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let paths = self.paths.values();
        let first = paths.filter_map(|known| known.path.poll_timeout()).min()?;
        let ready = self.budget.poll_ready();
        Some(ready.map_or(first, |ready| first.max(ready)))
    }

    /// The path to a peer, if it is measured.
    pub(super) fn get(&self, id: &PeerId) -> Option<&PathMtu> {
        self.paths.get(id).map(|known| &known.path)
    }

    /// The MTU of each path.
    pub(super) fn mtus(&self) -> BTreeMap<PeerId, u32> {
        let paths = self.paths.iter();
        paths
            .map(|(id, known)| (id.clone(), known.path.mtu()))
            .collect()
    }
}
