//! A peer as it is configured, by the embedder or through the UAPI socket.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;

use super::key::{PresharedKey, PublicKey};
use super::packet::udp_headers;
use super::protocol::OVERHEAD;

/// The most candidate endpoints that one initiation is sent to.
pub const MAX_CANDIDATES: usize = 16;

/// The UDP port of relayed datagrams, at both WireGuard addresses. It is fixed: the relay forwards the datagrams
/// as packets, and no socket has this port.
pub const RELAY_PORT: u16 = 51_820;

/// The most keys of a peer beside its current one.
pub const MAX_ALSO_KEYS: usize = 2;

/// The name of a peer. It stays the same while the peer's key, endpoint and prefixes change.
///
/// The device compares names and does not read them. The plan calls a leader `node/<name>` and an
/// external peer `peer/<name>`. A peer that `wg` adds is called by its public key in base64.
#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PeerId(Arc<str>);

impl PeerId {
    /// A peer of this name.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&PublicKey> for PeerId {
    fn from(key: &PublicKey) -> Self {
        Self::new(key.to_string())
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The bytes that a datagram has beside the packet that it carries: the headers of IP and UDP, and WireGuard's header
/// and tag.
pub const fn overhead(is_v6: bool) -> u32 {
    (udp_headers(is_v6) + OVERHEAD) as u32
}

/// The size of the packets that are sent to a peer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum PeerMtu {
    /// The link's MTU. As with the kernel's WireGuard, datagrams may be fragmented on their way.
    #[default]
    Link,
    /// Padding makes no packet longer than this many bytes. Datagrams may be fragmented on their way.
    Configured(u16),
    /// The path carries packets of this many bytes, and of no more. A datagram is not fragmented: a longer packet is
    /// refused, and its sender gets an ICMP error.
    ///
    /// One exception: an IPv6 packet of up to 1,280 bytes is sent in any case, in fragments if need be, since each
    /// link below IPv6 must carry it (RFC 8200, 5).
    Path(u16),
}

/// How a peer is reached.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerWay {
    /// The IP address of its endpoint.
    pub address: IpAddr,
    /// The relay to it, if there is one: then the address is the peer's WireGuard address.
    pub relay: Option<PeerId>,
    /// Bytes of messages sent to it, as in `PeerStats::tx_bytes`.
    pub sent: u64,
}

/// A peer as it is configured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerConfig {
    /// The peer's key. No two peers of a device have the same one.
    pub public_key: PublicKey,
    /// Further keys of the same peer, at most [`MAX_ALSO_KEYS`], while it replaces its key: it may begin and answer
    /// handshakes under each. Those that are the device's own or another peer's current key do not count.
    pub also_keys: BTreeSet<PublicKey>,
    /// Where to send until a message of the peer comes from another address.
    pub endpoint: Option<SocketAddr>,
    /// The key mixed into handshakes.
    pub preshared_key: Option<PresharedKey>,
    /// A second one, accepted in answers of the peer beside the first, so that the two sides need not change
    /// theirs at the same time. With it and without a first one, handshakes without a preshared key are accepted
    /// too.
    pub next_preshared_key: Option<PresharedKey>,
    /// Seconds between keepalives; `None` is off.
    pub persistent_keepalive: Option<NonZeroU16>,
    /// The destinations that are sent to it.
    pub routes: BTreeSet<IpNet>,
    /// The sources that packets from it may have.
    pub accepts: BTreeSet<IpNet>,
    /// WireGuard addresses of other peers, to which their datagrams travel through this peer, a relay. An address
    /// belongs to one peer: of several the first by name counts. The endpoint of such another peer is its address
    /// and [`RELAY_PORT`].
    pub relays_to: BTreeSet<IpAddr>,
    /// WireGuard addresses of other peers, whose datagrams may come through this peer.
    pub relayed_from: BTreeSet<IpAddr>,
    /// The size of the packets that are sent to it.
    pub mtu: PeerMtu,
}

impl PeerConfig {
    /// A peer of this key, without endpoint, keepalives and prefixes.
    pub const fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            also_keys: BTreeSet::new(),
            endpoint: None,
            preshared_key: None,
            next_preshared_key: None,
            persistent_keepalive: None,
            routes: BTreeSet::new(),
            accepts: BTreeSet::new(),
            relays_to: BTreeSet::new(),
            relayed_from: BTreeSet::new(),
            mtu: PeerMtu::Link,
        }
    }

    /// The same peer with these prefixes alone, as both routes and accepted sources.
    #[must_use]
    pub fn with_allowed_ips(self, prefixes: BTreeSet<IpNet>) -> Self {
        Self {
            routes: prefixes.clone(),
            accepts: prefixes,
            ..self
        }
    }

    /// The prefixes as `wg` shows them: it knows no difference between routes and accepted sources.
    pub fn allowed_ips(&self) -> impl Iterator<Item = &IpNet> {
        self.routes.union(&self.accepts)
    }
}

impl fmt::Display for PeerConfig {
    /// The arguments of `wg set` behind the key. A preshared key is only mentioned. Relayed addresses, the path MTU and
    /// further keys are in a shell's comment: `wg` has no words for them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.preshared_key.is_some() {
            f.write_str(" preshared-key (hidden)")?;
        }
        if let Some(endpoint) = self.endpoint {
            write!(f, " endpoint {endpoint}")?;
        }
        if let Some(seconds) = self.persistent_keepalive {
            write!(f, " persistent-keepalive {seconds}")?;
        }
        f.write_str(" allowed-ips ")?;
        list(f, self.allowed_ips())?;
        if self.next_preshared_key.is_some() {
            f.write_str(" # next preshared-key (hidden)")?;
        }
        if !self.also_keys.is_empty() {
            f.write_str(" # other keys ")?;
            list(f, &self.also_keys)?;
        }
        if !self.relays_to.is_empty() {
            f.write_str(" # relays to ")?;
            list(f, &self.relays_to)?;
        }
        if !self.relayed_from.is_empty() {
            f.write_str(" # relayed from ")?;
            list(f, &self.relayed_from)?;
        }
        match self.mtu {
            PeerMtu::Link | PeerMtu::Configured(_) => Ok(()),
            PeerMtu::Path(bytes) => write!(f, " # path mtu {bytes}"),
        }
    }
}

fn list<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    items: impl IntoIterator<Item = T>,
) -> fmt::Result {
    for (index, item) in items.into_iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        write!(f, "{comma}{item}")?;
    }
    Ok(())
}
