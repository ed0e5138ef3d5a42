//! A leader of a segment, and the addresses at which it may be reached.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::str::FromStr;

use ipnet::IpNet;

use super::{Endpoint, NodeName};
use crate::wireguard::PeerId;
use crate::wireguard::key::PublicKey;

/// A node that carries the traffic of its segment through its own tunnel, and what other nodes need to
/// know to reach it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Leader {
    /// The node. It is a member of the segment too.
    pub node: NodeName,
    /// Its keys, the current one first. A leader has at least one.
    pub keys: Vec<PublicKey>,
    /// Its endpoint as annotated.
    pub endpoint: Option<Endpoint>,
    /// [`Self::endpoint`], resolved.
    pub address: Option<SocketAddr>,
    /// The address at which another leader observed it, for a leader behind NAT.
    pub discovered: Option<SocketAddr>,
    /// Every address at which it may be reached, the likeliest first. Each is tried.
    pub candidates: Vec<Candidate>,
    /// Whether other leaders observe it at an address that it does not have itself.
    pub behind_nat: bool,
    /// Seconds between the keepalives that it sends to each of its peers; 0 is off.
    pub persistent_keepalive: u16,
    /// Whether the operator set that interval. Otherwise the leader sends keepalives to every peer that
    /// has not yet reached it without them.
    pub keepalive_forced: bool,
    /// Its WireGuard addresses, at most one of each family, IPv4 first.
    pub wireguard_ips: Vec<IpAddr>,
    /// The address to which other nodes of its segment send echoes, so that its kernel must forward them into
    /// the tunnel's link. It has a meaning inside the segment alone: other segments use the same addresses. `None`
    /// for an only leader, beside which there is no choice, in Kilo's mode, and where the pool has no room.
    pub probe_ip: Option<IpAddr>,
}

/// The number of leaders of each region (`--leaders-per-region`), 1 to [`Self::MAX`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LeaderCount(NonZeroU8);

impl LeaderCount {
    /// Each leader has a tunnel to every leader of the other regions, so more would cost much and help little.
    pub const MAX: u8 = 8;

    /// `None` outside of 1 to [`Self::MAX`].
    pub const fn new(count: u8) -> Option<Self> {
        match NonZeroU8::new(count) {
            Some(count) if count.get() <= Self::MAX => Some(Self(count)),
            _ => None,
        }
    }

    /// 1 to [`Self::MAX`].
    pub fn get(self) -> usize {
        usize::from(self.0.get())
    }
}

impl Default for LeaderCount {
    /// Two.
    fn default() -> Self {
        Self(NonZeroU8::MIN.saturating_add(1))
    }
}

impl FromStr for LeaderCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let count = text.parse().ok().and_then(Self::new);
        count.ok_or_else(|| format!("must be a number in the range 1 to {}", Self::MAX))
    }
}

impl Leader {
    /// The current key.
    pub fn public_key(&self) -> PublicKey {
        let key = self.keys.first();
        *key.expect("a node without a key takes no part in the election")
    }

    /// What is known of the leader by one of its keys, the current one first.
    pub fn find_in<'a, T>(&self, by_key: &'a BTreeMap<PublicKey, T>) -> Option<&'a T> {
        self.keys.iter().find_map(|key| by_key.get(key))
    }

    /// The leader's name in a tunnel device.
    pub fn peer_id(&self) -> PeerId {
        Self::id_of(&self.node)
    }

    /// The name in a tunnel device of a node that leads.
    pub fn id_of(node: &NodeName) -> PeerId {
        PeerId::new(format!("node/{node}"))
    }

    /// The WireGuard addresses as prefixes.
    pub(super) fn wireguard_nets(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.wireguard_ips.iter().copied().map(IpNet::from)
    }
}

/// An address at which a peer may be reached.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Candidate {
    /// The address and port that a handshake is sent to.
    pub address: SocketAddr,
    /// The source of the address.
    pub origin: Origin,
}

/// The source of a candidate. RFC 8445 calls the first three host candidates, the fourth server-reflexive
/// and the last a predicted one.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Origin {
    /// The operator: `force-endpoint`, or a Peer's `spec.endpoint`.
    Forced,
    /// The node's agent: `endpoint`.
    Endpoint,
    /// The node's agent: `candidates`.
    Announced,
    /// Another leader, which received packets from there.
    Discovered,
    /// The address is that of a [`Self::Discovered`] one, the port is the leader's own: a NAT that had to
    /// choose another port towards one observer may keep the port towards others.
    PortKept,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forced => "set by the operator",
            Self::Endpoint => "endpoint",
            Self::Announced => "announced",
            Self::Discovered => "discovered by a leader",
            Self::PortKept => "discovered address, own port",
        })
    }
}
