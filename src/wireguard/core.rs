//! The state that the threads of a device share: peers, indices, keys, and the queue of the handshake thread.
//!
//! No I/O and no clock: tests run the same core and carry its datagrams by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::RandomState;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use super::admission::{Job, Jobs};
use super::clock::Time;
use super::config::{PeerId, PeerMtu};
use super::divert::{Diversion, Origin};
use super::drops::{Dropped, Drops};
use super::endpoint_rule::Evidence;
use super::events::{Event, PeerEvents, Signal};
use super::identity::Identities;
use super::indices::Indices;
use super::key::PublicKey;
use super::peer::Peer;
use super::protocol::REKEY_TIMEOUT;
use super::table::Table;
use super::timestamp::{Accepted, Tai64n, Timestamp};
use super::timestamp_sequence::TimestampSequence;
use super::translation::Translation;
use super::way::Way;

/// The most peers whose timestamps are kept, removed ones included. The latest are kept.
const MAX_ACCEPTED: usize = 16_384;

/// After this time without a datagram to an address, no usual NAT or firewall lets in datagrams from it
/// (Linux: `nf_conntrack_udp_timeout_stream`, 120 s; common devices keep a mapping for 30 to 180 s).
pub const UNASKED_AFTER: Duration = Duration::from_secs(180);

/// The state of a device.
pub(super) struct Core {
    pub(super) table: ArcSwap<Table>,
    /// The seed by which flows spread over the owners of a prefix: one for all tables, so that a flow keeps its
    /// owner.
    pub(super) spread: RandomState,
    pub(super) indices: Indices,
    pub(super) drops: Drops,
    /// The echoes for the embedder.
    pub(super) diversion: Diversion,
    /// The aliases of hosts behind this device.
    pub(super) translation: Translation,
    pub(super) identities: ArcSwap<Identities>,
    pub(super) jobs: Jobs,
    /// Whether the embedder must be called for events.
    pub(super) signal: Signal,
    pub(super) configured: Mutex<Configured>,
    pub(super) timestamps: Mutex<TimestampSequence>,
    /// The greatest timestamps of peers, and of those that were removed.
    accepted: Arc<Mutex<Accepted>>,
    /// The wall clock, for timestamps only.
    pub(super) wall: fn() -> Timestamp,
    /// Whether packets of peers to loopback, link-local, multicast and similar addresses are dropped.
    pub(super) unicast_only: bool,
    mtu: AtomicUsize,
    up: AtomicBool,
    started: Time,
}

/// The configuration as it was last set.
#[derive(Default)]
pub(super) struct Configured {
    pub(super) peers: BTreeMap<PeerId, ConfiguredPeer>,
    /// The peer of each key, of those beside the current ones too.
    pub(super) ids: BTreeMap<PublicKey, PeerId>,
    /// The peers that each destination is sent to: one by UAPI, several by the embedder.
    pub(super) routes: BTreeMap<IpNet, BTreeSet<PeerId>>,
    /// The peers that each source is accepted from.
    pub(super) accepts: BTreeMap<IpNet, BTreeSet<PeerId>>,
    /// This device's WireGuard addresses.
    pub(super) own_addresses: BTreeSet<IpAddr>,
    /// When something was last sent to removed peers, the latest `MAX_REMOVED` of them. If such a peer is added
    /// again, its initiations are not unasked, see `PeerStats::heard_unasked`.
    pub(super) removed: BTreeMap<PublicKey, Time>,
}

pub(super) struct ConfiguredPeer {
    pub(super) peer: Arc<Peer>,
    /// The configured endpoint. The peer may have roamed since.
    pub(super) endpoint: Option<SocketAddr>,
    /// As in `PeerConfig`.
    pub(super) relays_to: BTreeSet<IpAddr>,
    pub(super) relayed_from: BTreeSet<IpAddr>,
}

impl Core {
    pub(super) fn new(
        mtu: u32,
        timestamps: TimestampSequence,
        accepted: Arc<Mutex<Accepted>>,
        wall: fn() -> Timestamp,
        now: Time,
    ) -> Self {
        let core = Self {
            table: ArcSwap::from_pointee(Table::default()),
            spread: RandomState::new(),
            indices: Indices::default(),
            drops: Drops::default(),
            diversion: Diversion::default(),
            translation: Translation::default(),
            identities: ArcSwap::default(),
            jobs: Jobs::default(),
            signal: Signal::default(),
            configured: Mutex::default(),
            timestamps: Mutex::new(timestamps),
            accepted,
            wall,
            mtu: AtomicUsize::new(0),
            unicast_only: false,
            up: AtomicBool::new(false),
            started: now,
        };
        core.set_mtu(mtu);
        core
    }

    /// The MTU of the link in bytes.
    pub(super) fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed)
    }

    pub(super) fn set_mtu(&self, mtu: u32) {
        let mtu = usize::try_from(mtu).unwrap_or(usize::MAX);
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Sets whether the link is up; true if that has changed.
    pub(super) fn set_up(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::Relaxed) != up
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Queues a handshake with a peer, unless one has begun within [`REKEY_TIMEOUT`].
    pub(super) fn ask_handshake(&self, peer: &Arc<Peer>, now: Time) {
        let recent = |at| now.since(at) < REKEY_TIMEOUT;
        if peer.last_initiation().is_some_and(recent) {
            return;
        }
        if !peer.handshake_asked.swap(true, Ordering::Relaxed) {
            self.jobs.push(Job::Initiate(peer.clone()));
        }
    }

    /// The greatest timestamp that was accepted from a peer in any run; zero for none.
    pub(super) fn last_accepted(&self, key: &PublicKey) -> Tai64n {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.get(key).copied().unwrap_or_default()
    }

    /// Records the timestamp of an accepted initiation and starts to write it to disk.
    pub(super) fn note_accepted(&self, key: &PublicKey, timestamp: Tai64n) {
        {
            let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
            let before = accepted.insert(*key, timestamp);
            if before.is_none() && accepted.len() > MAX_ACCEPTED {
                let table = self.table.load();
                let removed = accepted
                    .iter()
                    .filter(|(key, _)| table.peer_of(key).is_none());
                let oldest = removed.min_by_key(|(_, timestamp)| **timestamp);
                if let Some((&oldest, _)) = oldest {
                    accepted.remove(&oldest);
                }
            }
        }
        let timestamps = self.timestamps.lock();
        timestamps
            .unwrap_or_else(PoisonError::into_inner)
            .accepted();
    }

    /// Whether no datagram of this device can have let in a message of a peer; see `PeerStats::heard_unasked`.
    pub(super) fn is_unasked(&self, peer: &Peer, from: Way, now: Time) -> bool {
        let Way::Direct(from) = from else {
            return false;
        };
        let is_quiet = |at| now.since(at) >= UNASKED_AFTER;
        is_quiet(self.started)
            && peer.last_sent().is_none_or(is_quiet)
            && self.table.load().peers.values().all(|other| {
                other.last_sent().is_none_or(is_quiet)
                    || other
                        .direct_endpoint()
                        .is_none_or(|endpoint| endpoint.remote.ip() != from.remote.ip())
            })
    }

    /// Moves the endpoint of a peer to the source of an authenticated message of a confirmed session, if the message
    /// proves enough, see [`endpoint_rule`](super::endpoint_rule).
    pub(super) fn roam(&self, peer: &Arc<Peer>, from: Way, evidence: Evidence, now: Time) {
        let has_relay = |address| self.table.load().relays.relay_to(address).is_some();
        let roamed = peer.roam(from, evidence, has_relay, now);
        if roamed.moved {
            self.raise(peer, Event::Endpoint);
        }
        if let Some(endpoint) = from.direct().filter(|_| roamed.look_up) {
            self.jobs.push(Job::Source(peer.clone(), endpoint));
        }
    }

    /// Records that authenticated messages of a peer were received, with `data` or without.
    pub(super) fn received(&self, peer: &Peer, data: bool, now: Time) {
        if peer.timers.received(data, now) {
            self.raise(peer, Event::Heard);
        }
    }

    /// Records that both sides use a session.
    pub(super) fn handshake_completed(&self, peer: &Peer, now: Time) {
        peer.handshake_completed(now);
        self.raise(peer, Event::Handshake);
    }

    /// Records an event and asks for a call to the embedder.
    pub(super) fn raise(&self, peer: &Peer, event: Event) {
        peer.events.add(event);
        if self.signal.set() {
            self.jobs.wake();
        }
    }

    /// Hands an echo to the embedder.
    #[cold]
    pub(super) fn divert(&self, origin: Origin, packet: &[u8]) {
        if !self.diversion.push(origin, packet) {
            self.drops.add(Dropped::NotDiverted, 1);
        }
        if self.diversion.signal.set() {
            self.jobs.wake();
        }
    }

    /// Takes the events of all peers.
    pub(super) fn take_events(&self) -> BTreeMap<PeerId, PeerEvents> {
        let table = self.table.load();
        let peers = table.peers.values();
        peers
            .filter_map(|peer| Some((peer.id().clone(), peer.events.take()?)))
            .collect()
    }

    /// Queues a handshake message for the handshake thread.
    pub(super) fn take_handshake(
        &self,
        message: &[u8],
        from: Way,
        through: Option<&Arc<Peer>>,
        now: Time,
    ) -> Result<(), Dropped> {
        // The last 16 bytes are the second MAC; without a cookie they are zero (paper, 5.4.4).
        let proven = message.last_chunk().is_some_and(|mac2| *mac2 != [0_u8; 16])
            && self
                .identities
                .load()
                .is_proven(message, from.remote(), now.as_duration());
        self.jobs.push_message(message, from, through, proven, now)
    }

    /// Passes the addresses of the peers to the queue of handshakes.
    pub(super) fn note_known_addresses(&self) {
        let table = self.table.load();
        let ways = table.peers.values().filter_map(|peer| peer.way());
        self.jobs
            .set_known(ways.map(|way| way.remote().ip()).collect());
    }

    /// The bytes to append to a packet for a peer: up to a multiple of 16, but never beyond the MTU
    /// (paper, 5.4.6). For a packet longer than the MTU its last piece counts, as in the kernel.
    pub(super) fn padding(&self, mtu: PeerMtu, length: usize) -> usize {
        Self::padding_within(self.mtu_of(mtu), length)
    }

    /// The bytes of the longest packet to a peer. What was measured on another way than the present one may be too much
    /// for a relay, so there is less in any case.
    pub(super) fn mtu_to(&self, peer: &Peer) -> usize {
        let overhead = peer.relay_overhead();
        match peer.mtu() {
            PeerMtu::Path(bytes) => usize::from(bytes).min(self.mtu().saturating_sub(overhead)),
            mtu @ (PeerMtu::Link | PeerMtu::Configured(_)) => {
                self.mtu_of(mtu).saturating_sub(overhead)
            }
        }
    }

    fn mtu_of(&self, mtu: PeerMtu) -> usize {
        match mtu {
            PeerMtu::Link => self.mtu(),
            PeerMtu::Configured(bytes) | PeerMtu::Path(bytes) => usize::from(bytes),
        }
    }

    /// The same for an MTU in bytes.
    pub(super) fn padding_within(mtu: usize, length: usize) -> usize {
        let last = if length > mtu {
            length % mtu.max(1)
        } else {
            length
        };
        last.next_multiple_of(16).min(mtu.max(last)) - last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_padded_to_16_bytes_but_never_beyond_the_mtu() {
        let timestamps = TimestampSequence::new(Timestamp::default(), None);
        let core = Core::new(
            1420,
            timestamps,
            Arc::default(),
            Timestamp::default,
            Time::default(),
        );
        for (length, padded) in [
            (0, 0),
            (1, 16),
            (21, 32),
            (49, 64),
            (1408, 1408),
            (1409, 1420),
            (1420, 1420),
            (1421, 1436),
            (2840, 2840),
            (2839, 2840),
        ] {
            for mtu in [PeerMtu::Link, PeerMtu::Path(1420)] {
                assert_eq!(length + core.padding(mtu, length), padded, "{length}");
            }
        }
        let small = PeerMtu::Configured(1220);
        assert_eq!(1218 + core.padding(small, 1218), 1220);
        core.set_mtu(0);
        assert_eq!(core.padding(PeerMtu::Link, 5), 0);
    }
}
