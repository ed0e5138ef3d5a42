//! Which peer relays to whom, and what is accepted from whom. Pure. Who relays is for the embedder to decide, see
//! `PeerConfig::relays_to`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::config::RELAY_PORT;
use super::packet::Header;
use super::peer::Peer;
use super::relay_packet::is_relay_packet;
use super::way::Way;

/// Who relays to whom, and what is accepted from whom.
#[derive(Default)]
pub(super) struct Relays {
    /// The peer that relays to each WireGuard address.
    to: BTreeMap<IpAddr, Arc<Peer>>,
    /// The peers through which the datagrams from each WireGuard address may come.
    from: BTreeMap<IpAddr, Vec<Arc<Peer>>>,
    /// This device's WireGuard addresses.
    own: BTreeSet<IpAddr>,
}

impl Relays {
    /// Of several peers that relay to one address the first counts.
    pub(super) fn new<'a>(
        peers: impl Iterator<Item = (&'a Arc<Peer>, &'a BTreeSet<IpAddr>, &'a BTreeSet<IpAddr>)>,
        own: BTreeSet<IpAddr>,
    ) -> Self {
        let mut relays = Self {
            own,
            ..Self::default()
        };
        for (peer, relays_to, relayed_from) in peers {
            for &address in relays_to {
                relays.to.entry(address).or_insert_with(|| peer.clone());
            }
            for &address in relayed_from {
                relays.from.entry(address).or_default().push(peer.clone());
            }
        }
        relays
    }

    /// The peer that relays to an address.
    pub(super) fn relay_to(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        self.to.get(&address)
    }

    /// Whether a relayed datagram may come from an address through a peer.
    pub(super) fn admits(&self, source: IpAddr, through: &Arc<Peer>) -> bool {
        let admitted = self.from.get(&source);
        admitted.is_some_and(|peers| peers.iter().any(|peer| Arc::ptr_eq(peer, through)))
    }

    /// Whether a packet from a peer or to one is a relayed datagram to this device. Its beginning is enough.
    #[inline]
    pub(super) fn is_for_this_device(&self, ip: &Header, packet: &[u8]) -> bool {
        is_relay_packet(ip, packet) && self.own.contains(&ip.destination)
    }

    /// Whether a packet is a relayed datagram to another device that this one reaches through a relay itself.
    pub(super) fn is_for_another(&self, ip: &Header, packet: &[u8]) -> bool {
        is_relay_packet(ip, packet) && self.to.contains_key(&ip.destination)
    }

    /// The way to a configured or candidate endpoint. The WireGuard address of a peer that may be relayed is reached
    /// through a relay only, also while there is none.
    pub(super) fn way_to(&self, endpoint: SocketAddr) -> Way {
        let address = endpoint.ip();
        let is_relayed = endpoint.port() == RELAY_PORT
            && (self.to.contains_key(&address) || self.from.contains_key(&address));
        if is_relayed {
            Way::Relayed(address)
        } else {
            Way::Direct(endpoint.into())
        }
    }

    /// The source of relayed datagrams to an address.
    pub(super) fn source_for(&self, destination: IpAddr) -> Option<IpAddr> {
        let is_v6 = destination.is_ipv6();
        self.own.iter().copied().find(|own| own.is_ipv6() == is_v6)
    }
}
