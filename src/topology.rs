//! Groups nodes into regions, elects each region's leader and assigns WireGuard addresses.
//!
//! Every agent computes the same [`Topology`] from the same [`Snapshot`], so leaders need no
//! coordination. Nothing here reads a clock, a socket or a file.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::wireguard::key::PublicKey;

/// The name of a Kubernetes Node.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NodeName(pub String);

/// The value of the topology label or the `kilo.squat.ai/location` annotation, trimmed.
///
/// The empty name is the region of all nodes that carry neither.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RegionName(pub String);

/// What shares one leader: the nodes of a location, or a node on its own.
///
/// Ordered and displayed as in Kilo (contract 3.1): every `location:` before every `node:`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SegmentName {
    /// The nodes of a region that reach each other without the tunnel.
    Location(RegionName),
    /// A node that reaches all others through the tunnel.
    Node(NodeName),
}

/// Where a peer can be reached.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Endpoint {
    /// An address and port.
    Addr(SocketAddr),
    /// An RFC 1123 name and port; resolved by the shell, per peer, off the critical path.
    Dns {
        /// The name, lower case.
        host: String,
        /// 1..=65535.
        port: u16,
    },
}

/// An address with the length of its link's prefix; unlike [`IpNet`] in routes, host bits count.
pub type InterfaceAddr = IpNet;

/// A node as its agent, flannel and the operator describe it; every field is already valid.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.creationTimestamp` in Unix seconds: of two equal claims the older wins (ties: by name).
    pub created: i64,
    /// The region, from the `location` annotation or the topology label.
    pub region: RegionName,
    /// `kilo.squat.ai/key`; `None` until an agent has published one.
    pub public_key: Option<PublicKey>,
    /// `force-endpoint`, else `endpoint`.
    pub endpoint: Option<Endpoint>,
    /// Every `InternalIP` of `status.addresses`.
    pub internal_ips: Vec<IpAddr>,
    /// The private address by contract 2.1/2.6: `force-internal-ip`, else `internal-ip`; `None`
    /// where the node has none.
    pub private_ip: Option<InterfaceAddr>,
    /// `spec.podCIDRs`, truncated; at most one of each family.
    pub pod_cidrs: Vec<IpNet>,
    /// The admin's wish or the agent's publication, `kilo.squat.ai/wireguard-ip`.
    pub wireguard_ips: Vec<InterfaceAddr>,
    /// Whether the operator asked for this node to lead (presence of `kilo.squat.ai/leader`).
    pub leader: bool,
    /// Whether the Node's `Ready` condition is true.
    pub ready: bool,
    /// `kilo.squat.ai/persistent-keepalive` in seconds; 0 is off.
    pub persistent_keepalive: u16,
    /// `kilo.squat.ai/allowed-location-ips`, truncated.
    pub allowed_location_ips: Vec<IpNet>,
    /// `kilo.squat.ai/discovered-endpoints`: where this node saw the others.
    pub discovered_endpoints: BTreeMap<PublicKey, SocketAddr>,
    /// `kilo.squat.ai/granularity`, where valid.
    pub granularity: Option<Granularity>,
    /// `kilo.squat.ai/last-seen` in Unix seconds; only Kilo's algorithm uses it.
    pub last_seen: Option<i64>,
    /// Whether the node's agent is Selvedge (it carries our marker annotation).
    pub ours: bool,
    /// What flannel says of the node; `None` while it carries no usable annotations.
    pub lease: Option<crate::flannel::Lease>,
}

/// An external WireGuard peer: a validated `peers.kilo.squat.ai` object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExternalPeer {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.creationTimestamp` in Unix seconds.
    pub created: i64,
    /// `spec.publicKey`.
    pub public_key: PublicKey,
    /// `spec.presharedKey`.
    pub preshared_key: Option<crate::wireguard::key::PresharedKey>,
    /// `spec.endpoint`.
    pub endpoint: Option<Endpoint>,
    /// `spec.persistentKeepalive` in seconds; 0 is off.
    pub persistent_keepalive: u16,
    /// `spec.allowedIPs`, truncated, in the object's order.
    pub allowed_ips: Vec<IpNet>,
}

/// How nodes are grouped (`--mesh-granularity`).
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub enum Granularity {
    /// One leader for each region.
    #[default]
    Location,
    /// Every node reaches every other through a tunnel of its own.
    Full,
    /// Every node has tunnels to the nodes of other regions; inside a region flannel carries on.
    Cross,
}

/// What the cluster looks like at one instant, parsed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Snapshot {
    /// All nodes that could be parsed, whether or not they can take part.
    pub nodes: BTreeMap<NodeName, Node>,
    /// All valid peers by name.
    pub peers: BTreeMap<String, ExternalPeer>,
}
