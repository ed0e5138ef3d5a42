//! The handshakes with a peer: one for each pair of an own key and a key of the peer.
//!
//! Each side has one key, or two while it is replaced. A handshake is bound to its pair by its first message, so
//! each pair has a state of its own, and a handshake under one pair disturbs none under another. The first pair is
//! that of the current keys.

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::{Handshake, SessionKeys};
use boringtun::noise::{Packet, parse_incoming_packet};
use boringtun::x25519;

use super::identity::{Identities, Identity};
use super::key::{PresharedKey, PublicKey};
use super::timestamp::Tai64n;

/// The keys under which a handshake is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pair {
    /// The key of the device.
    pub own: PublicKey,
    /// The key of the peer.
    pub peer: PublicKey,
}

/// The handshake under one pair of keys.
pub(super) struct Pairing {
    pub(super) pair: Pair,
    pub(super) noise: Handshake,
}

/// The preshared keys of a peer, which the second message of a handshake mixes in.
#[derive(Clone, Default, Eq, PartialEq)]
pub(super) struct Preshared {
    /// Goes into answers, and is accepted in the peer's; `None` is a handshake without one.
    pub(super) first: Option<PresharedKey>,
    /// Another one that is accepted in answers of the peer.
    pub(super) next: Option<PresharedKey>,
}

impl Preshared {
    fn first(&self) -> Option<[u8; 32]> {
        self.first.as_ref().map(|key| key.0)
    }

    /// Those that are accepted in an answer.
    fn accepted(&self) -> impl Iterator<Item = Option<[u8; 32]>> {
        let next = self.next.as_ref().map(|key| Some(key.0));
        std::iter::once(self.first()).chain(next)
    }
}

/// The handshakes with a peer. Empty while the device has no key and after the peer was removed.
#[derive(Default)]
pub(super) struct Pairings {
    all: Vec<Pairing>,
    preshared: Preshared,
    /// The initiations since the last completed handshake.
    initiations: usize,
}

impl Pairings {
    /// Makes these the keys, the current ones first. A pair that was there keeps its state.
    pub(super) fn set_keys(
        &mut self,
        identities: &Identities,
        peer_keys: &[PublicKey],
        last_accepted: impl Fn(&PublicKey) -> Tai64n,
    ) {
        let mut before = std::mem::take(&mut self.all);
        for own in identities.iter() {
            for peer in peer_keys {
                let pair = Pair {
                    own: own.public,
                    peer: *peer,
                };
                let known = before.iter().position(|known| known.pair == pair);
                let pairing = known.map(|index| before.swap_remove(index));
                self.all.push(pairing.unwrap_or_else(|| {
                    let mut noise = handshake(own, peer, self.preshared.first());
                    noise.set_last_timestamp(last_accepted(peer));
                    Pairing { pair, noise }
                }));
            }
        }
        self.initiations = 0;
    }

    /// Removes every pair, so that no handshake begins.
    pub(super) fn remove(&mut self) {
        self.all.clear();
    }

    /// Abandons every handshake that is under way.
    pub(super) fn clear(&mut self) {
        for pairing in &mut self.all {
            pairing.noise.clear();
        }
    }

    pub(super) fn preshared(&self) -> &Preshared {
        &self.preshared
    }

    /// Changes the preshared keys. Sessions stay.
    pub(super) fn set_preshared(&mut self, preshared: Preshared) {
        if self.preshared == preshared {
            return;
        }
        self.preshared = preshared;
        let first = self.preshared.first();
        for pairing in &mut self.all {
            pairing.noise.set_preshared_key(first);
        }
    }

    /// The handshake under these keys.
    pub(super) fn get(&mut self, pair: Pair) -> Option<&mut Handshake> {
        let mut pairings = self.all.iter_mut();
        let pairing = pairings.find(|pairing| pairing.pair == pair)?;
        Some(&mut pairing.noise)
    }

    /// The handshake for the next initiation: that of the current keys and, while none completes, every second
    /// time another one. So two sides that know different keys of each other find a pair that both know.
    pub(super) fn for_initiation(&mut self) -> Option<&mut Pairing> {
        let turn = self.initiations;
        self.initiations = turn.wrapping_add(1);
        let others = self.all.len().checked_sub(1)?;
        let index = match (turn % 2, others) {
            (0, _) | (_, 0) => 0,
            _ => 1 + turn / 2 % others,
        };
        self.all.get_mut(index)
    }

    /// The handshake under an own key and the current key of the peer.
    pub(super) fn with_own(&mut self, own: &PublicKey) -> Option<&mut Pairing> {
        let mut pairings = self.all.iter_mut();
        pairings.find(|pairing| pairing.pair.own == *own)
    }

    /// A handshake completed: the next initiation is under the current keys.
    pub(super) fn completed(&mut self) {
        self.initiations = 0;
    }

    /// Forgets the cookies of the peer.
    pub(super) fn clear_cookies(&mut self) {
        for pairing in &mut self.all {
            pairing.noise.clear_cookie();
        }
    }

    /// The indices of the initiations that still wait for an answer.
    pub(super) fn awaiting(&self) -> Vec<u32> {
        let pairings = self.all.iter();
        let indices = pairings.flat_map(|pairing| pairing.noise.awaiting());
        indices.flatten().collect()
    }

    /// Takes an answer to an own initiation under the key that it is addressed to.
    pub(super) fn receive_response(
        &mut self,
        message: &[u8],
        own: &PublicKey,
    ) -> Result<(Pair, SessionKeys), WireGuardError> {
        let index = match parse_incoming_packet(message)? {
            Packet::HandshakeResponse(response) => response.receiver_idx,
            Packet::HandshakeInit(_) | Packet::PacketCookieReply(_) | Packet::PacketData(_) => {
                return Err(WireGuardError::InvalidPacket);
            }
        };
        let mut pairings = self.all.iter_mut();
        let awaits = |pairing: &&mut Pairing| pairing.noise.awaiting().contains(&Some(index));
        let pairing = pairings.find(awaits);
        let pairing = pairing.filter(|pairing| pairing.pair.own == *own);
        let Pairing { pair, noise } = pairing.ok_or(WireGuardError::UnexpectedPacket)?;
        let mut result = Err(WireGuardError::UnexpectedPacket);
        for preshared in self.preshared.accepted() {
            let Packet::HandshakeResponse(response) = parse_incoming_packet(message)? else {
                return Err(WireGuardError::InvalidPacket);
            };
            noise.set_preshared_key(preshared);
            result = noise.receive_handshake_response(response);
            if result.is_ok() {
                break;
            }
        }
        noise.set_preshared_key(self.preshared.first());
        result.map(|keys| (*pair, keys))
    }

    /// Takes a cookie for the last initiation under one of the pairs.
    pub(super) fn receive_cookie(&mut self, message: &[u8]) -> Result<(), WireGuardError> {
        let mut result = Err(WireGuardError::UnexpectedPacket);
        for pairing in &mut self.all {
            let Packet::PacketCookieReply(reply) = parse_incoming_packet(message)? else {
                return Err(WireGuardError::InvalidPacket);
            };
            match pairing.noise.receive_cookie_reply(reply) {
                Err(WireGuardError::WrongIndex | WireGuardError::UnexpectedPacket) => {}
                done => {
                    result = done;
                    break;
                }
            }
        }
        result
    }
}

fn handshake(own: &Identity, peer: &PublicKey, preshared: Option<[u8; 32]>) -> Handshake {
    Handshake::new(
        own.secret.clone(),
        x25519::PublicKey::from(own.public.0),
        x25519::PublicKey::from(peer.0),
        preshared,
    )
}
