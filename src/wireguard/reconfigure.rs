//! What a device is told: by the agent as a whole, by `wg` as changes.
//!
//! A change to a live peer leaves its sessions alone unless it is the key that changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::{Arc, MutexGuard, PoisonError};

use boringtun::noise::handshake::Handshake;
use boringtun::x25519;
use ipnet::IpNet;

use super::admission::Job;
use super::clock::Time;
use super::config::{MAX_CANDIDATES, PeerConfig};
use super::core::{Configured, ConfiguredPeer, Core, Identity};
use super::handshake::forget_handshakes;
use super::key::{PresharedKey, PrivateKey, PublicKey};
use super::peer::{HandshakeState, Peer};
use super::table::Table;
use super::uapi::{AllowedIp, KeyUpdate, PeerGet, PeerSet};

/// More peers than this do not come and go within minutes.
const MAX_REMOVED: usize = 1024;

impl Core {
    fn configured(&self) -> MutexGuard<'_, Configured> {
        self.configured
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes these the peers, and leaves alone what is as it should be.
    ///
    /// A peer with the device's own key is left out, as in the kernel.
    pub(super) fn set_peers(&self, peers: &BTreeMap<PublicKey, PeerConfig>, now: Time) {
        let mut configured = self.configured();
        let gone: Vec<_> = configured
            .peers
            .keys()
            .filter(|key| !peers.contains_key(key))
            .copied()
            .collect();
        for key in gone {
            self.remove_peer(&mut configured, &key);
        }
        configured.allowed_ips.clear();
        for (&key, config) in peers {
            if self.is_own(&key) {
                continue;
            }
            let known = self.peer(&mut configured, key);
            if known.endpoint != config.endpoint {
                known.endpoint = config.endpoint;
                if let Some(endpoint) = config.endpoint {
                    known.peer.set_endpoint(endpoint);
                    // Whoever keeps a way through a NAT open opens one to the new place at once: the
                    // peer may be waiting before it.
                    if config.persistent_keepalive.is_some() && known.peer.has_session() {
                        self.jobs.push(Job::Keepalive(known.peer.clone()));
                    }
                }
            }
            let peer = known.peer.clone();
            set_preshared_key(&mut peer.handshake(), config.preshared_key.clone());
            self.set_keepalive(
                &peer,
                config.persistent_keepalive.map_or(0, NonZeroU16::get),
                now,
            );
            for net in &config.allowed_ips {
                configured
                    .allowed_ips
                    .entry(net.trunc())
                    .or_default()
                    .insert(key);
            }
        }
        self.publish(&configured);
        // A tunnel that is wanted is brought up before its first packet, which then need not wait.
        for known in configured.peers.values() {
            if known.endpoint.is_some()
                && known.peer.last_initiation().is_none()
                && !known.peer.has_session()
            {
                self.ask_handshake(&known.peer, now);
            }
        }
    }

    /// Tries candidate endpoints of a peer. It stays where it is until it answers from one of them.
    pub(super) fn look_for(&self, key: &PublicKey, candidates: &[SocketAddr]) {
        let candidates: Vec<_> = candidates.iter().take(MAX_CANDIDATES).copied().collect();
        if candidates.is_empty() {
            return;
        }
        if let Some(peer) = self.table.load().peers.get(key) {
            self.jobs.push(Job::LookFor(peer.clone(), candidates));
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
            let gone: Vec<_> = configured
                .peers
                .keys()
                .filter(|key| !named.contains(key))
                .copied()
                .collect();
            for key in gone {
                self.remove_peer(&mut configured, &key);
            }
            // A peer that is named again begins anew, but for what is alive: its sessions, and where
            // they lead.
            configured.allowed_ips.clear();
            for known in configured.peers.values_mut() {
                set_preshared_key(&mut known.peer.handshake(), None);
                self.set_keepalive(&known.peer, 0, now);
                known.endpoint = None;
                if !known.peer.has_session() {
                    known.peer.forget_endpoint();
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
        if change.remove {
            return self.remove_peer(configured, &key);
        }
        if self.is_own(&key) || change.update_only && !configured.peers.contains_key(&key) {
            return;
        }
        let known = self.peer(configured, key);
        if let Some(endpoint) = change.endpoint {
            known.endpoint = Some(endpoint);
            known.peer.set_endpoint(endpoint);
        }
        let peer = known.peer.clone();
        match change.preshared_key {
            KeyUpdate::Keep => {}
            KeyUpdate::Clear => set_preshared_key(&mut peer.handshake(), None),
            KeyUpdate::Set(key) => set_preshared_key(&mut peer.handshake(), Some(key)),
        }
        if let Some(seconds) = change.persistent_keepalive {
            self.set_keepalive(&peer, seconds, now);
        }
        if change.replace_allowed_ips {
            configured.disown(&key, |_| true);
        }
        for allowed_ip in change.allowed_ips {
            match allowed_ip {
                AllowedIp::Add(net) => {
                    configured
                        .allowed_ips
                        .insert(net.trunc(), BTreeSet::from([key]));
                }
                AllowedIp::Remove(net) => configured.disown(&key, |owned| *owned == net.trunc()),
            }
        }
    }

    /// Changes the device's own key, or takes it away. Every session ends.
    pub(super) fn set_private_key(&self, private: Option<PrivateKey>) {
        let mut configured = self.configured();
        let before = self.identity.load();
        if before.as_ref().map(|identity| &identity.private) == private.as_ref() {
            return;
        }
        let identity = private.map(|private| Arc::new(Identity::new(private)));
        if let Some(identity) = &identity {
            self.remove_peer(&mut configured, &identity.public);
        }
        self.identity.store(identity.clone());
        for known in configured.peers.values() {
            let peer = &known.peer;
            let mut state = peer.handshake();
            forget_handshakes(self, &mut state);
            state.noise = identity
                .as_ref()
                .map(|identity| self.noise(identity, peer, &state));
            self.indices.retire(peer.forget_sessions());
            peer.forget_initiation();
        }
        self.publish(&configured);
    }

    fn is_own(&self, key: &PublicKey) -> bool {
        self.identity
            .load()
            .as_ref()
            .is_some_and(|identity| identity.public == *key)
    }

    /// The peer of this key, made if there is none.
    fn peer<'a>(&self, configured: &'a mut Configured, key: PublicKey) -> &'a mut ConfiguredPeer {
        let Configured { peers, removed, .. } = configured;
        peers.entry(key).or_insert_with(|| {
            let peer = Arc::new(Peer::new(key));
            if let Some(at) = removed.remove(&key) {
                peer.note_sent(at);
            }
            if let Some(identity) = self.identity.load().as_ref() {
                let mut state = peer.handshake();
                state.noise = Some(self.noise(identity, &peer, &state));
            }
            ConfiguredPeer {
                peer,
                endpoint: None,
            }
        })
    }

    fn remove_peer(&self, configured: &mut Configured, key: &PublicKey) {
        let Some(known) = configured.peers.remove(key) else {
            return;
        };
        configured.note_removed(&known.peer);
        configured.disown(key, |_| true);
        let peer = known.peer;
        let mut state = peer.handshake();
        forget_handshakes(self, &mut state);
        // Whoever still holds the peer finds nothing to shake hands with.
        state.noise = None;
        self.indices.retire(peer.forget_sessions());
        peer.staged().clear();
    }

    fn noise(&self, identity: &Identity, peer: &Peer, state: &HandshakeState) -> Handshake {
        let mut noise = Handshake::new(
            identity.secret.clone(),
            x25519::PublicKey::from(identity.public.0),
            x25519::PublicKey::from(peer.key().0),
            state.preshared_key.as_ref().map(|key| key.0),
        );
        noise.set_last_timestamp(self.last_accepted(peer.key()));
        noise
    }

    fn set_keepalive(&self, peer: &Arc<Peer>, seconds: u16, now: Time) {
        if peer.timers.set_persistent_keepalive(seconds, now) && self.is_up() {
            self.jobs.push(Job::Keepalive(peer.clone()));
        }
    }

    /// Takes note that the link went up or down.
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
        let peers = configured
            .peers
            .iter()
            .map(|(&key, known)| (key, known.peer.clone()));
        let owners = |keys: &BTreeSet<PublicKey>| {
            let known = keys.iter().filter_map(|key| configured.peers.get(key));
            known.map(|known| known.peer.clone()).collect()
        };
        let allowed_ips = configured
            .allowed_ips
            .iter()
            .map(|(&net, keys)| (net, owners(keys)));
        let table = Table::new(peers.collect(), allowed_ips.collect());
        self.table.store(Arc::new(table));
        self.note_known_addresses();
    }

    /// The peers as `wg` shows them.
    pub(super) fn peers_for_uapi(
        &self,
        unix: impl Fn(Time) -> std::time::Duration,
    ) -> Vec<PeerGet> {
        let configured = self.configured();
        let mut owned: BTreeMap<PublicKey, Vec<IpNet>> = BTreeMap::new();
        for (&net, keys) in &configured.allowed_ips {
            for key in keys {
                owned.entry(*key).or_default().push(net);
            }
        }
        let show = |(&key, known): (&PublicKey, &ConfiguredPeer)| {
            let peer = &known.peer;
            PeerGet {
                public_key: key,
                preshared_key: peer.handshake().preshared_key.clone(),
                endpoint: peer.endpoint().map(|endpoint| endpoint.remote),
                last_handshake: peer.last_handshake().map(&unix),
                rx_bytes: peer.rx_bytes(),
                tx_bytes: peer.tx_bytes(),
                persistent_keepalive: peer.timers.persistent_keepalive(),
                allowed_ips: owned.remove(&key).unwrap_or_default(),
            }
        };
        configured.peers.iter().map(show).collect()
    }
}

impl Configured {
    fn note_removed(&mut self, peer: &Peer) {
        let Some(at) = peer.last_sent() else {
            return;
        };
        self.removed.insert(*peer.key(), at);
        if self.removed.len() > MAX_REMOVED
            && let Some((&oldest, _)) = self.removed.iter().min_by_key(|(_, at)| **at)
        {
            self.removed.remove(&oldest);
        }
    }

    /// Takes prefixes from a peer.
    fn disown(&mut self, key: &PublicKey, which: impl Fn(&IpNet) -> bool) {
        self.allowed_ips.retain(|net, owners| {
            if which(net) {
                owners.remove(key);
            }
            !owners.is_empty()
        });
    }
}

fn set_preshared_key(state: &mut HandshakeState, key: Option<PresharedKey>) {
    if state.preshared_key != key {
        if let Some(noise) = &mut state.noise {
            noise.set_preshared_key(key.as_ref().map(|key| key.0));
        }
        state.preshared_key = key;
    }
}
