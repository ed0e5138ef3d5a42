//! Groups nodes into regions, elects each region's leaders and assigns WireGuard addresses.
//!
//! Every agent computes the same [`Topology`] from the same [`Snapshot`], so leaders need no
//! coordination. Nothing here reads a clock, a socket or a file. A statement of one node or peer cannot
//! harm another: a statement that is not accepted is left out and named in [`Topology::excluded`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::wireguard::PeerId;
use crate::wireguard::key::PublicKey;

mod address;
mod alias;
mod candidates;
mod claims;
mod excluded;
mod kilo;
mod leader;
mod ledger;
mod native;
mod pool;
mod region;

pub use address::{is_public, is_public_to_kilo, is_unicast, overlap};
pub use excluded::{Conflict, Excluded, Field, Object, Overlap, Reason};
pub use leader::{Candidate, Leader, LeaderCount, Origin};
pub use ledger::{Claim, Ledger, MAX_ENTRIES};

/// The name of a Kubernetes Node.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct NodeName(pub String);

/// The value of the topology label or the `kilo.squat.ai/location` annotation, trimmed.
///
/// The empty name is the region of all nodes that carry neither.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct RegionName(pub String);

/// The name of a [`Segment`]: of the nodes of a location, or of a node on its own.
///
/// Ordered and displayed as in Kilo: every `location:` before every `node:`.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum SegmentName {
    /// The nodes of a region that reach each other without the tunnel.
    Location(RegionName),
    /// A node that reaches all others through the tunnel.
    Node(NodeName),
}

/// An address or a name at which a peer can be reached.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
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
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Node {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.creationTimestamp` in Unix seconds. Of two equal claims the older wins; on a tie the name
    /// decides.
    pub created: i64,
    /// The region, from the `location` annotation or the topology label.
    pub region: RegionName,
    /// Whether the region is from the `location` annotation, which the operator sets. A kubelet sets the label.
    pub region_declared: bool,
    /// `kilo.squat.ai/key`; `None` until an agent has published one.
    pub public_key: Option<PublicKey>,
    /// `selvedge.dev/next-key` and `selvedge.dev/previous-key`: keys that the node has beside the one above while
    /// it replaces it.
    #[serde(default, skip_serializing_if = "OtherKeys::is_empty")]
    pub other_keys: OtherKeys,
    /// `force-endpoint`, else `endpoint`.
    pub endpoint: Option<Endpoint>,
    /// Whether the endpoint is from `force-endpoint`, which the operator sets. Then the node's agent publishes
    /// no other.
    pub endpoint_forced: bool,
    /// The first `InternalIP` of each family in `status.addresses`: at most two.
    pub internal_ips: Vec<IpAddr>,
    /// The first `ExternalIP`s of `status.addresses`, a few of each family. The node's own agent may
    /// publish one as its endpoint.
    pub external_ips: Vec<IpAddr>,
    /// The private address: `force-internal-ip`, else `internal-ip`; `None`
    /// where the node has none.
    pub private_ip: Option<InterfaceAddr>,
    /// Whether the private address is from `force-internal-ip`, which may also say that there is none.
    pub private_ip_forced: bool,
    /// `spec.podCIDRs`, truncated; at most one of each family.
    pub pod_cidrs: Vec<IpNet>,
    /// `kilo.squat.ai/wireguard-ip`: requested by the operator or published by the agent.
    pub wireguard_ips: Vec<InterfaceAddr>,
    /// `selvedge.dev/alias`, at most one of each family: requested by the operator or published by the agent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<IpAddr>,
    /// Whether the operator asked for this node to lead (presence of `kilo.squat.ai/leader`).
    pub leader: bool,
    /// Whether the Node's `Ready` condition is true.
    pub ready: bool,
    /// `kilo.squat.ai/persistent-keepalive` in seconds; 0 is off, `None` leaves it to the agent.
    pub persistent_keepalive: Option<u16>,
    /// `kilo.squat.ai/allowed-location-ips`, truncated.
    pub allowed_location_ips: Vec<IpNet>,
    /// `kilo.squat.ai/discovered-endpoints`: the addresses at which this node observed the others.
    pub discovered_endpoints: BTreeMap<PublicKey, SocketAddr>,
    /// `selvedge.dev/candidates`: the addresses that this node's agent announces for its tunnel, beside
    /// [`Self::endpoint`].
    #[serde(default)]
    pub candidates: Vec<SocketAddr>,
    /// `kilo.squat.ai/granularity`, where valid.
    pub granularity: Option<Granularity>,
    /// `kilo.squat.ai/last-seen` in Unix seconds; only Kilo's algorithm uses it.
    pub last_seen: Option<i64>,
    /// Whether the node's agent is Selvedge: the last agent that wrote to the Node left our mark.
    pub ours: bool,
    /// `selvedge.dev/since`: the time of each of the node's claims.
    pub ledger: Ledger,
    /// Whether the operator keeps the node from relaying between other regions (`selvedge.dev/relay: "false"`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub relay_forbidden: bool,
    /// flannel's annotations of the node; `None` where they are missing or unusable.
    pub lease: Option<crate::flannel::Lease>,
}

/// The keys of a node beside its current one.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct OtherKeys {
    /// The one that is to replace the current one.
    pub next: Option<PublicKey>,
    /// The one that the current one replaced, for as long as it is still used.
    pub previous: Option<PublicKey>,
}

impl OtherKeys {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = PublicKey> {
        self.next.into_iter().chain(self.previous)
    }
}

impl Node {
    /// Whether a key is one of the node's.
    pub fn has_key(&self, key: &PublicKey) -> bool {
        self.public_key == Some(*key) || self.other_keys.iter().any(|other| other == *key)
    }
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
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Granularity {
    /// A few leaders for each region.
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

/// The last good address of every name in an [`Endpoint::Dns`].
pub type Resolved = BTreeMap<String, IpAddr>;

/// The flags that must be the same for every agent of the cluster. Agents with different ones would disagree
/// on the topology.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Settings {
    /// `--mesh-granularity`.
    pub granularity: Granularity,
    /// `--leaders-per-region`. Kilo's algorithm has one.
    pub leaders_per_region: LeaderCount,
    /// `--subnet`: the pools of WireGuard addresses, at most one a family.
    pub subnets: Vec<IpNet>,
    /// `--alias-cidr`: the pools of aliases, at most one a family; empty turns them off. Kilo's algorithm has none.
    pub alias_pools: Vec<IpNet>,
    /// `--service-cidr`: never routed into the tunnel.
    pub service_cidrs: Vec<IpNet>,
    /// `--internal-cidr`: a node's address inside of these is accepted even if its status does not name it
    /// or if it is public.
    pub internal_cidrs: Vec<IpNet>,
    /// `--region-cidr`: the networks of regions. A node with an address outside of its region's networks is
    /// not in that region. A region that is not named here has its oldest member's link network.
    pub region_networks: BTreeMap<RegionName, Vec<IpNet>>,
    /// `--beside-kilo`: whether Kilo's algorithm decides while a real `kg` is in the mesh.
    pub beside_kilo: bool,
    /// flannel's networks; a pod CIDR outside of them is not believed. Empty where unknown.
    pub cluster_networks: Vec<IpNet>,
}

/// The algorithm that decides.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// Selvedge's.
    #[default]
    Native,
    /// Kilo's, rule by rule, because these nodes run a real `kg`.
    Kilo(Vec<NodeName>),
}

/// A node of a [`Segment`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Member {
    /// The node.
    pub name: NodeName,
    /// Its endpoint as annotated; the tunnel listens on its port.
    pub endpoint: Option<Endpoint>,
    /// The pod CIDRs that are carried for it.
    pub pod_cidrs: Vec<IpNet>,
    /// The node addresses that are carried for it.
    pub addresses: Vec<IpAddr>,
    /// Addresses by which other regions reach it, each with its own address that it stands for: at most one a family.
    /// The leaders of its segment translate.
    pub aliases: BTreeMap<IpAddr, IpAddr>,
    /// Its own addresses in its region, carried or not, that were accepted. VXLAN may be sent there.
    pub underlay: BTreeSet<IpAddr>,
    /// Addresses that only flannel's annotations name and no other node is known to have. A node sends VXLAN
    /// to those that are in a network it is connected to.
    pub flannel_ips: BTreeSet<IpAddr>,
    /// The private address with its subnet.
    pub private_ip: Option<InterfaceAddr>,
}

/// Nodes that share their leaders.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Its name.
    pub name: SegmentName,
    /// Segments of one group reach each other without the tunnel. Differs from the name only with
    /// [`Granularity::Cross`].
    pub group: SegmentName,
    /// The nodes that carry its traffic, the primary first. Never empty.
    pub leaders: Vec<Leader>,
    /// Its nodes by name, the leaders among them.
    pub nodes: Vec<Member>,
    /// What of its nodes' `allowed-location-ips` is carried, in the order Kilo prints it.
    pub allowed_location_ips: Vec<IpNet>,
}

/// A node that takes no part in the mesh: it has no key yet, or was excluded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Outsider {
    /// The node.
    pub name: NodeName,
    /// Its endpoint as annotated; the tunnel will listen on its port.
    pub endpoint: Option<Endpoint>,
    /// The group it would be in.
    pub group: SegmentName,
    /// Its pod CIDRs. Nodes of other regions refuse traffic to them.
    pub pod_cidrs: Vec<IpNet>,
    /// Its accepted addresses. VXLAN may be sent there inside the region.
    pub underlay: BTreeSet<IpAddr>,
    /// As in [`Member::flannel_ips`].
    pub flannel_ips: BTreeSet<IpAddr>,
}

/// The addresses at which an external peer can be reached.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PeerAddresses {
    /// Its endpoint, resolved.
    pub address: Option<SocketAddr>,
    /// The address at which a leader last observed it.
    pub discovered: Option<SocketAddr>,
    /// Both, and those at which other leaders observed it. Each is tried.
    pub candidates: Vec<Candidate>,
}

/// The segments of the mesh, their leaders, and the destinations that are carried for each node and peer.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Topology {
    /// The algorithm that decided.
    pub mode: Mode,
    /// Nodes that seem to run a real `kg` although `--beside-kilo` is off. They are treated as any other.
    pub foreign: Vec<NodeName>,
    /// The granularity in force.
    pub granularity: Granularity,
    /// The pools of WireGuard addresses.
    pub subnets: Vec<IpNet>,
    /// The pools of aliases, in which each address is an alias or none.
    pub alias_pools: Vec<IpNet>,
    /// All segments, in Kilo's order.
    pub segments: Vec<Segment>,
    /// The nodes that the operator keeps from relaying between other regions.
    pub not_relaying: BTreeSet<NodeName>,
    /// Nodes that take no part, by name.
    pub outsiders: Vec<Outsider>,
    /// The external peers by name, their allowed IPs reduced to those that are carried.
    pub peers: Vec<ExternalPeer>,
    /// The addresses of those peers.
    pub peer_addresses: BTreeMap<PublicKey, PeerAddresses>,
    /// The statements that were left out, with the reasons.
    pub excluded: Vec<Excluded>,
    /// Node addresses by which some other region does not reach their nodes.
    pub overlaps: Vec<Overlap>,
}

impl Topology {
    /// Computes the topology: Kilo's where the operator allows it and a real `kg` is in the mesh, else
    /// ours. No node can choose the algorithm.
    ///
    /// `now` is the reader's clock in Unix seconds. Only Kilo's algorithm looks at it.
    pub fn new(snapshot: &Snapshot, settings: &Settings, resolved: &Resolved, now: i64) -> Self {
        let foreign = kilo::foreign_nodes(snapshot, now);
        if settings.beside_kilo && !foreign.is_empty() {
            kilo::topology(snapshot, settings, resolved, now, foreign)
        } else {
            native::topology(snapshot, settings, resolved, foreign)
        }
    }

    /// The segment a node is in; `None` for an [`Outsider`].
    pub fn segment_of(&self, node: &NodeName) -> Option<&Segment> {
        self.segments
            .iter()
            .find(|segment| segment.nodes.iter().any(|member| member.name == *node))
    }

    /// The node as a member of its segment.
    pub fn member(&self, node: &NodeName) -> Option<&Member> {
        let nodes = &self.segment_of(node)?.nodes;
        nodes.iter().find(|member| member.name == *node)
    }

    /// The node as one that takes no part in the mesh.
    pub fn outsider(&self, node: &NodeName) -> Option<&Outsider> {
        self.outsiders.iter().find(|other| other.name == *node)
    }

    /// The node as a leader of its segment; `None` where it does not lead.
    pub fn leader(&self, node: &NodeName) -> Option<&Leader> {
        self.segment_of(node)?.leader(node)
    }

    /// Whether a node leads its segment.
    pub fn is_leader(&self, node: &NodeName) -> bool {
        self.leader(node).is_some()
    }

    /// All leaders in the order of their segments, each with its segment.
    pub fn leaders(&self) -> impl Iterator<Item = (&Segment, &Leader)> {
        self.segments
            .iter()
            .flat_map(|segment| segment.leaders.iter().map(move |leader| (segment, leader)))
    }

    /// The aliases that a node's tunnel translates, with the addresses of their nodes: those of its segment.
    pub fn aliases_at(&self, node: &NodeName) -> BTreeMap<IpAddr, IpAddr> {
        let nodes = self.segment_of(node).into_iter();
        let nodes = nodes.flat_map(|segment| &segment.nodes);
        let aliases = nodes.flat_map(|member| &member.aliases);
        aliases.map(|(alias, address)| (*alias, *address)).collect()
    }

    /// What a node's agent should have in its `alias` annotation; `None` for a node that is no member.
    pub fn alias_annotation(&self, node: &NodeName) -> Option<Vec<IpAddr>> {
        let member = self.member(node)?;
        Some(member.aliases.keys().copied().collect())
    }

    /// What a node's agent should have in its `wireguard-ip` annotation; `None` to leave it alone.
    ///
    /// A node that does not lead keeps what it has, so that its address is still its own when it
    /// leads again; Kilo empties it.
    pub fn wireguard_annotation(&self, node: &NodeName) -> Option<Vec<InterfaceAddr>> {
        let segment = self.segment_of(node)?;
        let Some(leader) = segment.leader(node) else {
            return matches!(self.mode, Mode::Kilo(_)).then(Vec::new);
        };
        let with_mesh_mask = |ip: &IpAddr| {
            let pool = self.subnets.iter().find(|pool| pool.contains(ip))?;
            IpNet::new(*ip, pool.prefix_len()).ok()
        };
        let ips = leader.wireguard_ips.iter();
        Some(ips.filter_map(with_mesh_mask).collect())
    }
}

impl Endpoint {
    /// The address, if it is one or the name has been resolved.
    pub fn resolve(&self, resolved: &Resolved) -> Option<SocketAddr> {
        match self {
            Self::Addr(address) => Some(*address),
            Self::Dns { host, port } => resolved
                .get(host)
                .map(|address| SocketAddr::new(*address, *port)),
        }
    }

    /// 1..=65535.
    pub fn port(&self) -> u16 {
        match self {
            Self::Addr(address) => address.port(),
            Self::Dns { port, .. } => *port,
        }
    }
}

impl ExternalPeer {
    /// The peer's name in a tunnel device.
    pub fn peer_id(&self) -> PeerId {
        PeerId::new(format!("peer/{}", self.name))
    }
}

impl Segment {
    /// The first of the leaders: the one that Kilo's formats name, which hold one leader of a segment.
    pub fn primary(&self) -> &Leader {
        let primary = self.leaders.first();
        primary.expect("a segment has a leader, or it would not have been made")
    }

    /// The name of its region without Kilo's prefix, or of its only node where it is none of a region.
    pub fn region(&self) -> &str {
        match &self.group {
            SegmentName::Location(region) => &region.0,
            SegmentName::Node(node) => &node.0,
        }
    }

    /// A node as a leader of this segment; `None` where it does not lead.
    pub fn leader(&self, node: &NodeName) -> Option<&Leader> {
        self.leaders.iter().find(|leader| leader.node == *node)
    }

    /// A node as a member of this segment.
    pub fn member(&self, node: &NodeName) -> Option<&Member> {
        self.nodes.iter().find(|member| member.name == *node)
    }

    /// All destinations inside the segment, in the order Kilo prints them: by node its pod CIDRs and
    /// addresses, then the WireGuard addresses, then the `allowed-location-ips`.
    ///
    /// Packets with these sources may come from each of the leaders.
    pub fn allowed_ips(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.node_allowed_ips()
            .chain(self.allowed_location_ips.iter().copied())
    }

    /// [`Self::allowed_ips`] without the `allowed-location-ips`, as `showconf --as-peer` has it.
    pub fn node_allowed_ips(&self) -> impl Iterator<Item = IpNet> + '_ {
        let wireguard_ips = self.leaders.iter().flat_map(Leader::wireguard_nets);
        self.nodes
            .iter()
            .flat_map(Member::allowed_ips)
            .chain(wireguard_ips)
    }

    /// The destinations that other segments send to one of the leaders, in the same order, while they use some
    /// leaders, and send to some themselves (`direct`) what is their own.
    ///
    /// A used leader's are all of [`Self::allowed_ips`] but those of the direct leaders: the tunnel spreads flows over
    /// the leaders that share a destination, and a direct leader's own addresses are for it alone. Those of a
    /// leader that is neither are shared by the used ones.
    pub fn routes_to<'s>(
        &'s self,
        leader: &'s Leader,
        used: &'s [&Leader],
        direct: &'s [&Leader],
    ) -> impl Iterator<Item = IpNet> + 's {
        let is_among = |leaders: &[&Leader], node: &NodeName| {
            leaders.iter().any(|leader| leader.node == *node)
        };
        let is_used = is_among(used, &leader.node);
        let gets = move |node: &NodeName| match is_among(direct, node) {
            true => *node == leader.node,
            false => is_used,
        };
        let nodes = self.nodes.iter().filter(move |node| gets(&node.name));
        let leaders = self.leaders.iter().filter(move |other| gets(&other.node));
        let locations = self.allowed_location_ips.iter().copied();
        nodes
            .flat_map(Member::allowed_ips)
            .chain(leaders.flat_map(Leader::wireguard_nets))
            .chain(locations.filter(move |_| is_used))
    }
}

impl Member {
    /// The pod CIDRs, addresses and aliases that are carried for the node.
    pub fn allowed_ips(&self) -> impl Iterator<Item = IpNet> + '_ {
        let pods = self.pod_cidrs.iter().copied();
        let addresses = self.addresses.iter().chain(self.aliases.keys());
        pods.chain(addresses.copied().map(IpNet::from))
    }

    /// The addresses of the node itself that packets from other regions have inside of its own: the carried ones, and
    /// those behind its aliases.
    pub fn served_addresses(&self) -> BTreeSet<IpAddr> {
        let addresses = self.addresses.iter().chain(self.aliases.values());
        addresses.copied().collect()
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RegionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Location(region) => write!(f, "location:{region}"),
            Self::Node(node) => write!(f, "node:{node}"),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("Selvedge's own algorithm"),
            Self::Kilo(nodes) => {
                let nodes = nodes.iter().map(ToString::to_string).collect::<Vec<_>>();
                let nodes = nodes.join(", ");
                write!(f, "Kilo's algorithm, because Kilo runs on {nodes}")
            }
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(address) => write!(f, "{address}"),
            Self::Dns { host, port } => write!(f, "{host}:{port}"),
        }
    }
}
