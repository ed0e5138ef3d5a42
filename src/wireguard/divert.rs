//! Packets that the device hands to its embedder: echoes, which prove that a path carries packets.
//!
//! An echo is a UDP packet to [`ECHO_PORT`] at one of the diverted addresses. It comes from a peer, which
//! must own its source, or from the link. The device takes it off the path of the other packets, so the
//! kernel of this host must have forwarded an echo that comes from the link, and no socket of this host
//! needs to exist.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use super::config::PeerId;
use super::events::Signal;
use super::packet::{Header, UDP, UDP_HEADER};

/// The UDP port of echoes (RFC 5881, 4: BFD echo).
pub const ECHO_PORT: u16 = 3785;

/// The most packets that wait to be taken.
const MAX_QUEUED: usize = 1024;
/// The most bytes of a diverted packet: the least MTU of IPv6 (RFC 8200, 5). It bounds the memory of the queue.
const MAX_LENGTH: usize = 1280;

/// Where a diverted packet came from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Origin {
    /// A peer, which owns the packet's source address.
    Peer(PeerId),
    /// The TUN link: this host sent or forwarded it.
    Link,
}

/// A packet that was diverted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Diverted {
    /// Where it came from.
    pub origin: Origin,
    /// The whole IP packet, without padding. The device does not verify the checksum of UDP.
    pub packet: Vec<u8>,
}

/// The addresses whose echoes are diverted, and the packets that wait to be taken.
#[derive(Default)]
pub(super) struct Diversion {
    addresses: ArcSwap<BTreeSet<IpAddr>>,
    queue: Mutex<Vec<Diverted>>,
    /// Whether the embedder must be called.
    pub(super) signal: Signal,
}

impl Diversion {
    fn queue(&self) -> MutexGuard<'_, Vec<Diverted>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes these the diverted addresses.
    pub(super) fn set_addresses(&self, addresses: BTreeSet<IpAddr>) {
        self.addresses.store(Arc::new(addresses));
    }

    /// Whether a packet is an echo to a diverted address. Its beginning is enough.
    ///
    /// Other packets cost a comparison of their protocol, and UDP packets one of their port.
    #[inline]
    pub(super) fn takes(&self, ip: &Header, packet: &[u8]) -> bool {
        ip.protocol == UDP && !ip.fragment && self.is_echo(ip, packet)
    }

    fn is_echo(&self, ip: &Header, packet: &[u8]) -> bool {
        let port = packet.get(ip.header + 2..ip.header + 4);
        port == Some(&ECHO_PORT.to_be_bytes())
            && ip.length >= ip.header + UDP_HEADER
            && self.addresses.load().contains(&ip.destination)
    }

    /// Queues a packet; false if it is too long or too many wait.
    pub(super) fn push(&self, origin: Origin, packet: &[u8]) -> bool {
        if packet.len() > MAX_LENGTH {
            return false;
        }
        let mut queue = self.queue();
        let fits = queue.len() < MAX_QUEUED;
        if fits {
            let packet = packet.to_vec();
            queue.push(Diverted { origin, packet });
        }
        fits
    }

    /// Takes the packets that wait, in their order.
    pub(super) fn take(&self) -> Vec<Diverted> {
        std::mem::take(&mut *self.queue())
    }
}
