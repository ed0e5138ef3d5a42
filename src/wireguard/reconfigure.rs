//! How a device is configured: by the embedder as a whole, by `wg` as changes.
//!
//! A change to a live peer leaves its sessions alone unless a key changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;

use super::admission::Job;
use super::clock::Time;
use super::config::{MAX_ALSO_KEYS, MAX_CANDIDATES, PeerConfig, PeerId, PeerWay};
use super::core::{Configured, ConfiguredPeer, Core};
use super::handshake::{forget_handshakes, note_awaiting};
use super::identity::Identities;
use super::key::{PresharedKey, PrivateKey, PublicKey};
use super::pairings::{Pair, Preshared};
use super::peer::Peer;
use super::relay_table::Relays;
use super::table::{Owners, Table};
use super::uapi::{AllowedIp, KeyUpdate, PeerGet, PeerSet};
use super::way::Way;

/// More peers than this do not come and go within minutes.
const MAX_REMOVED: usize = 1024;

impl Core {
    fn configured(&self) -> MutexGuard<'_, Configured> {
        self.configured
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes these the peers, and changes only what differs.
    ///
    /// A peer with the device's own key is left out, as in the kernel. Of several peers with one key the
    /// first by name counts.
    pub(super) fn set_peers(&self, peers: &BTreeMap<PeerId, PeerConfig>, now: Time) {
        let mut configured = self.configured();
        let mut keys = BTreeSet::new();
        let is_valid = |(_, config): &(&PeerId, &PeerConfig)| {
            !self.is_own(&config.public_key) && keys.insert(config.public_key)
        };
        let wanted: BTreeMap<_, _> = peers.iter().filter(is_valid).collect();
        let keys = self.keys_of(&wanted, keys);
        let known = configured.peers.keys();
        let gone: Vec<_> = known
            .filter(|id| !wanted.contains_key(id))
            .cloned()
            .collect();
        for id in gone {
            self.remove_peer(&mut configured, &id);
        }
        // Before any key is taken into use: two peers may exchange theirs.
        configured.ids.retain(|key, id| {
            wanted
                .get(&*id)
                .is_some_and(|config| config.public_key == *key)
        });
        configured.routes.clear();
        configured.accepts.clear();
        for (&id, &config) in &wanted {
            let known = self.make_peer(&mut configured, id, &keys[id]);
            known.relays_to.clone_from(&config.relays_to);
            known.relayed_from.clone_from(&config.relayed_from);
        }
        let relays = configured.relays();
        for (&id, &config) in &wanted {
            let known = self.make_peer(&mut configured, id, &keys[id]);
            if known.endpoint != config.endpoint {
                known.endpoint = config.endpoint;
                let way = config.endpoint.map(|endpoint| relays.way_to(endpoint));
                let is_relayed =
                    |way| matches!(way, Way::Relayed(to) if relays.relay_to(to).is_some());
                if let Some(endpoint) = config.endpoint
                    && known.peer.way().is_some_and(is_relayed)
                {
                    // The relay works, and the new endpoint may not.
                    let job = Job::TryCandidates(known.peer.clone(), vec![endpoint]);
                    self.jobs.push(job);
                } else if way.is_some() {
                    known.peer.set_way(way);
                    // A persistent keepalive is there to open the NAT on this side. The new endpoint
                    // needs one at once: the peer may be sending already.
                    if config.persistent_keepalive.is_some() && known.peer.has_session() {
                        self.jobs.push(Job::Keepalive(known.peer.clone()));
                    }
                }
            }
            let peer = known.peer.clone();
            peer.set_mtu(config.mtu);
            peer.handshake().pairings.set_preshared(Preshared {
                first: config.preshared_key.clone(),
                next: config.next_preshared_key.clone(),
            });
            self.set_keepalive(
                &peer,
                config.persistent_keepalive.map_or(0, NonZeroU16::get),
                now,
            );
            own(&mut configured.routes, &config.routes, id);
            own(&mut configured.accepts, &config.accepts, id);
        }
        self.publish(&configured);
        // A tunnel is brought up before its first packet, which then need not wait.
        for known in configured.peers.values() {
            if known.endpoint.is_some()
                && known.peer.last_initiation().is_none()
                && !known.peer.has_session()
            {
                self.ask_handshake(&known.peer, now);
            }
        }
    }

    /// The keys of each peer, the current one first. Of the others each belongs to one peer.
    fn keys_of<'a>(
        &self,
        wanted: &BTreeMap<&'a PeerId, &PeerConfig>,
        mut taken: BTreeSet<PublicKey>,
    ) -> BTreeMap<&'a PeerId, Vec<PublicKey>> {
        let keys = wanted.iter().map(|(id, config)| {
            let also = config.also_keys.iter().copied();
            let also = also.filter(|key| !self.is_own(key) && taken.insert(*key));
            let also = also.take(MAX_ALSO_KEYS);
            (
                *id,
                std::iter::once(config.public_key).chain(also).collect(),
            )
        });
        keys.collect()
    }

    /// Sets this device's WireGuard addresses.
    pub(super) fn set_own_addresses(&self, addresses: BTreeSet<IpAddr>) {
        let mut configured = self.configured();
        if configured.own_addresses != addresses {
            configured.own_addresses = addresses;
            self.publish(&configured);
        }
    }

    /// The peer of this name.
    pub(super) fn peer(&self, id: &PeerId) -> Option<Arc<Peer>> {
        let configured = self.configured();
        configured.peers.get(id).map(|known| known.peer.clone())
    }

    /// Tries candidate endpoints of a peer. The endpoint changes only when the peer answers from one.
    pub(super) fn try_candidates(&self, id: &PeerId, candidates: &[SocketAddr]) {
        let candidates: Vec<_> = candidates.iter().take(MAX_CANDIDATES).copied().collect();
        if candidates.is_empty() {
            return;
        }
        if let Some(peer) = self.peer(id) {
            self.jobs.push(Job::TryCandidates(peer, candidates));
        }
    }

    /// Applies changes of peers in their order. The device's own key must have been set before.
    pub(super) fn change_peers(&self, replace: bool, changes: Vec<PeerSet>, now: Time) {
        let mut configured = self.configured();
        if replace {
            let named: BTreeSet<_> = changes
                .iter()
                .filter(|change| !change.remove)
                .map(|change| change.public_key)
                .collect();
            let unnamed = configured
                .ids
                .iter()
                .filter(|(key, _)| !named.contains(key));
            let gone: Vec<_> = unnamed.map(|(_, id)| id.clone()).collect();
            for id in gone {
                self.remove_peer(&mut configured, &id);
            }
            // A peer that is named again loses its configuration, but keeps its sessions and the
            // endpoint that they lead to.
            configured.routes.clear();
            configured.accepts.clear();
            for known in configured.peers.values_mut() {
                let mut state = known.peer.handshake();
                state.pairings.set_preshared(Preshared::default());
                drop(state);
                self.set_keepalive(&known.peer, 0, now);
                known.endpoint = None;
                known.relays_to.clear();
                known.relayed_from.clear();
                if !known.peer.has_session() {
                    known.peer.set_way(None);
                }
            }
        }
        for change in changes {
            self.change_peer(&mut configured, change, now);
        }
        self.publish(&configured);
    }

    fn change_peer(&self, configured: &mut Configured, change: PeerSet, now: Time) {
        let key = change.public_key;
        let id = configured.ids.get(&key).cloned();
        if change.remove {
            if let Some(id) = id {
                self.remove_peer(configured, &id);
            }
            return;
        }
        if self.is_own(&key) || change.update_only && id.is_none() {
            return;
        }
        let id = id.unwrap_or_else(|| PeerId::from(&key));
        let known = self.make_peer(configured, &id, &[key]);
        if let Some(endpoint) = change.endpoint {
            known.endpoint = Some(endpoint);
            let way = self.table.load().relays.way_to(endpoint);
            known.peer.set_way(Some(way));
        }
        let peer = known.peer.clone();
        match change.preshared_key {
            KeyUpdate::Keep => {}
            KeyUpdate::Clear => set_preshared_key(&peer, None),
            KeyUpdate::Set(key) => set_preshared_key(&peer, Some(key)),
        }
        if let Some(seconds) = change.persistent_keepalive {
            self.set_keepalive(&peer, seconds, now);
        }
        if change.replace_allowed_ips {
            configured.disown(&id, |_| true);
        }
        for allowed_ip in change.allowed_ips {
            match allowed_ip {
                AllowedIp::Add(net) => {
                    let owner = BTreeSet::from([id.clone()]);
                    configured.routes.insert(net.trunc(), owner.clone());
                    configured.accepts.insert(net.trunc(), owner);
                }
                AllowedIp::Remove(net) => configured.disown(&id, |owned| *owned == net.trunc()),
            }
        }
    }

    /// Changes the device's own key, or takes it away. Every session ends.
    pub(super) fn set_private_key(&self, private: Option<PrivateKey>) {
        self.set_identities(private);
    }

    /// Changes the device's own keys, the current one first. Sessions under the others end.
    pub(super) fn set_identities(&self, keys: impl IntoIterator<Item = PrivateKey>) {
        let mut configured = self.configured();
        let before = self.identities.load();
        let identities = Identities::new(keys, &before);
        if identities.is_same(&before) {
            return;
        }
        for identity in identities.iter() {
            if let Some(own) = configured.ids.get(&identity.public).cloned() {
                self.remove_peer(&mut configured, &own);
            }
        }
        let is_moved =
            before.current().map(|own| own.public) != identities.current().map(|own| own.public);
        let has_stayed = before.iter().any(|own| identities.has(&own.public));
        self.identities.store(Arc::new(identities));
        for known in configured.peers.values() {
            let peer = &known.peer;
            if is_moved && !has_stayed {
                forget_handshakes(self, &mut peer.handshake());
                peer.forget_initiation();
            }
            self.follow_keys(peer);
        }
        self.publish(&configured);
    }

    /// Makes the handshakes of a peer those of the present keys, and ends sessions under others.
    fn follow_keys(&self, peer: &Peer) {
        let identities = self.identities.load();
        let keys = peer.keys();
        let mut state = peer.handshake();
        let accepted = |key: &PublicKey| self.last_accepted(key);
        state.pairings.set_keys(&identities, &keys, accepted);
        note_awaiting(self, &mut state);
        let stays = |pair: Pair| identities.has(&pair.own) && keys.contains(&pair.peer);
        let ended = peer.forget_sessions_of(stays);
        if !ended.is_empty() && !peer.has_session() {
            // The next packet need not wait for the time between two initiations.
            peer.forget_initiation();
        }
        self.indices.retire(ended);
    }

    /// Tries a handshake with a peer under one of the own keys.
    pub(super) fn try_identity(&self, id: &PeerId, own: PublicKey) {
        if let Some(peer) = self.peer(id) {
            self.jobs.push(Job::TryIdentity(peer, own));
        }
    }

    fn is_own(&self, key: &PublicKey) -> bool {
        self.identities.load().has(key)
    }

    /// The peer of this name with these keys, the current one first. Makes the peer if there is none. If it has a
    /// current key that neither list shares with the other, replaces all of its state that depends on the key.
    fn make_peer<'a>(
        &self,
        configured: &'a mut Configured,
        id: &PeerId,
        keys: &[PublicKey],
    ) -> &'a mut ConfiguredPeer {
        let Configured {
            peers,
            ids,
            removed,
            ..
        } = configured;
        let key = keys[0];
        ids.insert(key, id.clone());
        let known = peers.entry(id.clone()).or_insert_with(|| {
            let peer = self.new_peer(id, keys);
            if let Some(at) = removed.remove(&key) {
                peer.note_sent(at);
            }
            ConfiguredPeer {
                peer,
                endpoint: None,
                relays_to: BTreeSet::new(),
                relayed_from: BTreeSet::new(),
            }
        });
        let before = known.peer.keys();
        if before.contains(&key) || keys.contains(&before[0]) {
            if before != keys {
                known.peer.set_keys(keys.to_vec());
                self.follow_keys(&known.peer);
            }
        } else {
            let peer = self.new_peer(id, keys);
            peer.inherit(&known.peer);
            self.shut_down(&known.peer);
            known.peer = peer;
        }
        known
    }

    fn new_peer(&self, id: &PeerId, keys: &[PublicKey]) -> Arc<Peer> {
        let peer = Arc::new(Peer::new(id.clone(), keys.to_vec()));
        self.follow_keys(&peer);
        peer
    }

    fn remove_peer(&self, configured: &mut Configured, id: &PeerId) {
        let Some(known) = configured.peers.remove(id) else {
            return;
        };
        configured.ids.remove(&known.peer.key());
        configured.note_removed(&known.peer);
        configured.disown(id, |_| true);
        self.shut_down(&known.peer);
    }

    /// Ends the sessions and handshakes of a peer that is no longer in use.
    fn shut_down(&self, peer: &Peer) {
        let mut state = peer.handshake();
        forget_handshakes(self, &mut state);
        // A thread that still holds the peer begins no handshake without this.
        state.pairings.remove();
        self.indices.retire(peer.forget_sessions());
        peer.staged().clear();
    }

    fn set_keepalive(&self, peer: &Arc<Peer>, seconds: u16, now: Time) {
        if peer.timers.set_persistent_keepalive(seconds, now) && self.is_up() {
            self.jobs.push(Job::Keepalive(peer.clone()));
        }
    }

    /// Sends a keepalive to each peer with a session, so that it learns where this device sends from now.
    pub(super) fn announce_move(&self) {
        for peer in self.table.load().peers.values() {
            if peer.has_session() {
                self.jobs.push(Job::Keepalive(peer.clone()));
            }
        }
    }

    /// Records that the link went up or down.
    pub(super) fn link_changed(&self, up: bool) {
        if !self.set_up(up) || !up {
            return;
        }
        for peer in self.table.load().peers.values() {
            if peer.timers.persistent_keepalive() != 0 {
                self.jobs.push(Job::Keepalive(peer.clone()));
            }
        }
    }

    fn publish(&self, configured: &Configured) {
        let peers = configured.peers.values();
        let peers = peers.map(|known| (known.peer.key(), known.peer.clone()));
        let others = configured.peers.values().flat_map(|known| {
            let keys = known.peer.keys().into_iter().skip(1);
            keys.map(|key| (key, known.peer.clone()))
        });
        let owners = |ids: &BTreeSet<PeerId>| -> Vec<_> {
            let known = ids.iter().filter_map(|id| configured.peers.get(id));
            known.map(|known| known.peer.clone()).collect()
        };
        let allowed_ips = |prefixes: &BTreeMap<IpNet, BTreeSet<PeerId>>| {
            let owned = prefixes.iter().map(|(&net, ids)| (net, owners(ids)));
            Arc::new(Owners::new(owned.collect()))
        };
        let routes = allowed_ips(&configured.routes);
        let accepts = if configured.accepts == configured.routes {
            routes.clone()
        } else {
            allowed_ips(&configured.accepts)
        };
        let table = Table::new(
            peers.collect(),
            routes,
            accepts,
            configured.relays(),
            self.spread.clone(),
        );
        let table = table.with_other_keys(others.collect());
        let before = self.table.swap(Arc::new(table));
        self.note_known_addresses();
        let is_new = |known: &ConfiguredPeer| {
            let keys = known.peer.keys();
            keys.iter().any(|key| before.peer_of(key).is_none())
        };
        if configured.peers.values().any(is_new) {
            self.jobs.push(Job::KeysAdded);
        }
    }

    /// The peers as they are configured. An endpoint is the configured one, wherever the peer is now.
    pub(super) fn peer_configs(&self) -> BTreeMap<PeerId, PeerConfig> {
        let configured = self.configured();
        let config = |known: &ConfiguredPeer| PeerConfig {
            endpoint: known.endpoint,
            also_keys: known.peer.keys().into_iter().skip(1).collect(),
            preshared_key: preshared(&known.peer).first,
            next_preshared_key: preshared(&known.peer).next,
            persistent_keepalive: NonZeroU16::new(known.peer.timers.persistent_keepalive()),
            relays_to: known.relays_to.clone(),
            relayed_from: known.relayed_from.clone(),
            mtu: known.peer.mtu(),
            ..PeerConfig::new(known.peer.key())
        };
        let peers = configured.peers.iter();
        let mut configs: BTreeMap<_, _> = peers
            .map(|(id, known)| (id.clone(), config(known)))
            .collect();
        for (&net, id) in owned(&configured.routes) {
            if let Some(config) = configs.get_mut(id) {
                config.routes.insert(net);
            }
        }
        for (&net, id) in owned(&configured.accepts) {
            if let Some(config) = configs.get_mut(id) {
                config.accepts.insert(net);
            }
        }
        configs
    }

    /// How each peer with an endpoint is reached.
    pub(super) fn ways(&self) -> BTreeMap<PeerId, PeerWay> {
        let table = self.table.load();
        let way = |peer: &Arc<Peer>| {
            let way = peer.way()?;
            let relay = match way {
                Way::Direct(_) => None,
                Way::Relayed(address) => Some(table.relays.relay_to(address)?.id().clone()),
            };
            let way = PeerWay {
                address: way.remote().ip(),
                relay,
                sent: peer.tx_bytes(),
            };
            Some((peer.id().clone(), way))
        };
        table.peers.values().filter_map(way).collect()
    }

    /// The peers as `wg` shows them, in the order of their keys.
    pub(super) fn peers_for_uapi(&self, unix: impl Fn(Time) -> Duration) -> Vec<PeerGet> {
        let configured = self.configured();
        let mut prefixes: BTreeMap<&PeerId, BTreeSet<IpNet>> = BTreeMap::new();
        for (&net, id) in owned(&configured.routes).chain(owned(&configured.accepts)) {
            prefixes.entry(id).or_default().insert(net);
        }
        let show = |(&key, id): (&PublicKey, &PeerId)| {
            let peer = &configured.peers.get(id)?.peer;
            let allowed_ips = prefixes.remove(id).unwrap_or_default();
            Some(PeerGet {
                public_key: key,
                preshared_key: preshared(peer).first,
                endpoint: peer.way().map(Way::remote),
                last_handshake: peer.last_handshake().map(&unix),
                rx_bytes: peer.rx_bytes(),
                tx_bytes: peer.tx_bytes(),
                persistent_keepalive: peer.timers.persistent_keepalive(),
                allowed_ips: allowed_ips.into_iter().collect(),
            })
        };
        configured.ids.iter().filter_map(show).collect()
    }
}

impl Configured {
    fn relays(&self) -> Relays {
        let peers = self.peers.values();
        let peers = peers.map(|known| (&known.peer, &known.relays_to, &known.relayed_from));
        Relays::new(peers, self.own_addresses.clone())
    }

    fn note_removed(&mut self, peer: &Peer) {
        let Some(at) = peer.last_sent() else {
            return;
        };
        self.removed.insert(peer.key(), at);
        if self.removed.len() > MAX_REMOVED
            && let Some((&oldest, _)) = self.removed.iter().min_by_key(|(_, at)| **at)
        {
            self.removed.remove(&oldest);
        }
    }

    /// Takes prefixes from a peer.
    fn disown(&mut self, id: &PeerId, which: impl Fn(&IpNet) -> bool) {
        for prefixes in [&mut self.routes, &mut self.accepts] {
            prefixes.retain(|net, owners| {
                if which(net) {
                    owners.remove(id);
                }
                !owners.is_empty()
            });
        }
    }
}

/// Gives prefixes to a peer, beside those that have them already.
fn own(owners: &mut BTreeMap<IpNet, BTreeSet<PeerId>>, prefixes: &BTreeSet<IpNet>, id: &PeerId) {
    for net in prefixes {
        owners.entry(net.trunc()).or_default().insert(id.clone());
    }
}

/// Every prefix with each of its owners.
fn owned(prefixes: &BTreeMap<IpNet, BTreeSet<PeerId>>) -> impl Iterator<Item = (&IpNet, &PeerId)> {
    let owners = prefixes.iter();
    owners.flat_map(|(net, ids)| ids.iter().map(move |id| (net, id)))
}

fn set_preshared_key(peer: &Peer, first: Option<PresharedKey>) {
    let preshared = Preshared { first, next: None };
    peer.handshake().pairings.set_preshared(preshared);
}

fn preshared(peer: &Peer) -> Preshared {
    peer.handshake().pairings.preshared().clone()
}
