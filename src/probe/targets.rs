//! Which echoes this node sends, and whose it answers, as the topology says. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ring::digest::{SHA256, digest};

use super::path_mtu::Sizes;
use crate::flannel::Flannel;
use crate::policy::Relaying;
use crate::topology::{Leader, Mode, NodeName, Segment, SegmentName, Topology};
use crate::wireguard::PeerId;

/// Whom this node sends echoes to, and whose it answers. Empty where no echoes are sent.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Targets {
    /// This node's address in the pod network, from which it sends echoes through the leaders of its region;
    /// `None` where it sends none.
    pub own: Option<IpAddr>,
    /// The segment of this node.
    pub segment: Option<SegmentName>,
    /// The probe addresses of the other leaders of the own region.
    pub leaders: BTreeMap<NodeName, IpAddr>,
    /// The segments of other regions, in order.
    pub segments: Vec<SegmentName>,
    /// All segments, in order.
    pub all_segments: Vec<SegmentName>,
    /// What this node does as a leader.
    pub lead: Option<Lead>,
}

/// The part of a leader.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Lead {
    /// The address at which it answers the nodes of its region.
    pub probe_ip: Option<IpAddr>,
    /// The addresses in the pod network of the region's other nodes.
    pub members: BTreeMap<IpAddr, NodeName>,
    /// The leaders of other regions.
    pub peers: BTreeMap<PeerId, Far>,
    /// Whether the host's settings and firewall let it forward, as far as the agent knows.
    pub may_forward: bool,
    /// The sizes that paths to leaders of other regions may have; `None` where they are not measured.
    pub sizes: Option<Sizes>,
    /// Whether the operator lets it relay between other regions.
    pub relays: bool,
    /// The leaders to which the tunnel's datagrams go through a relay.
    pub relayed: BTreeSet<PeerId>,
}

/// A leader of another region.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Far {
    /// Its node.
    pub node: NodeName,
    /// The segment that it leads.
    pub segment: SegmentName,
    /// Segments of one group reach each other without the tunnel.
    pub group: SegmentName,
    /// The operator's preference for it as a relay, the lowest first; `None` if it may not relay.
    pub relay_rank: Option<usize>,
    /// Its WireGuard address.
    pub address: IpAddr,
    /// This node's WireGuard address of the same family.
    pub own: IpAddr,
}

impl Targets {
    /// The addresses to which echoes and answers come through the device.
    pub fn diverted(&self) -> BTreeSet<IpAddr> {
        let lead = self.lead.iter();
        lead.flat_map(|lead| {
            let own = lead.peers.values().map(|far| far.own);
            own.chain(lead.probe_ip)
        })
        .collect()
    }

    /// This node's WireGuard addresses, at which the tunnel's datagrams come through a relay.
    pub fn own_addresses(&self) -> BTreeSet<IpAddr> {
        let lead = self.lead.iter();
        lead.flat_map(|lead| lead.peers.values().map(|far| far.own))
            .collect()
    }

    /// A number for the list of remote segments, the same on every node with the same list.
    pub fn generation(&self) -> u64 {
        generation(&self.segments)
    }

    /// The same for the list of all segments.
    pub fn generation_of_all(&self) -> u64 {
        generation(&self.all_segments)
    }
}

fn generation(segments: &[SegmentName]) -> u64 {
    let names = segments.iter().map(ToString::to_string);
    // No name contains a line break: the API admits none in a label or an object's name.
    let text = names.collect::<Vec<_>>().join("\n");
    let digest = digest(&SHA256, text.as_bytes());
    let first = digest.as_ref().first_chunk();
    first.map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// The targets of a node. `may_forward` is what the agent knows of the host's settings and firewall, `sizes` are those
/// that a path's MTU may have, where it is to be measured, and `relaying` is `--relay`.
///
/// None beside Kilo's algorithm, without flannel, and for a node that takes no part in the mesh.
pub fn targets(
    topology: &Topology,
    me: &NodeName,
    flannel: Option<&Flannel>,
    may_forward: bool,
    sizes: Option<Sizes>,
    relaying: &Relaying,
) -> Targets {
    let (Mode::Native, Some(segment), Some(flannel)) =
        (&topology.mode, topology.segment_of(me), flannel)
    else {
        return Targets::default();
    };
    let remotes = || {
        let segments = topology.segments.iter();
        segments.filter(|other| other.group != segment.group)
    };
    let mut segments = remotes()
        .map(|other| other.name.clone())
        .collect::<Vec<_>>();
    segments.sort();
    let all = topology.segments.iter();
    let mut all_segments = all.map(|other| other.name.clone()).collect::<Vec<_>>();
    all_segments.sort();

    let others = segment.leaders.iter().filter(|leader| leader.node != *me);
    let leaders = others
        .filter_map(|leader| Some((leader.node.clone(), leader.probe_ip?)))
        .collect::<BTreeMap<_, _>>();
    let family = leaders.values().next().map(IpAddr::is_ipv6);
    let own = family.and_then(|v6| first(&flannel.subnets, v6));
    Targets {
        own,
        leaders: leaders
            .into_iter()
            .filter(|(_, ip)| own.is_some_and(|own| own.is_ipv6() == ip.is_ipv6()))
            .collect(),
        segments,
        all_segments,
        lead: segment.leader(me).map(|lead| Lead {
            probe_ip: lead.probe_ip,
            members: members(segment, lead),
            peers: remotes()
                .flat_map(|remote| remote.leaders.iter().map(move |leader| (remote, leader)))
                .filter_map(|(remote, leader)| {
                    let relay_rank = relay_rank(topology, relaying, remote, leader);
                    Some((leader.peer_id(), far(remote, leader, lead, relay_rank)?))
                })
                .collect(),
            may_forward,
            sizes,
            relays: relay_rank(topology, relaying, segment, lead).is_some(),
            relayed: BTreeSet::new(),
        }),
        segment: Some(segment.name.clone()),
    }
}

/// The addresses from which the other nodes of a segment send echoes to one of its leaders.
fn members(segment: &Segment, lead: &Leader) -> BTreeMap<IpAddr, NodeName> {
    let Some(probe_ip) = lead.probe_ip else {
        return BTreeMap::new();
    };
    let others = segment.nodes.iter().filter(|node| node.name != lead.node);
    others
        .filter_map(|node| {
            let address = first(&node.pod_cidrs, probe_ip.is_ipv6())?;
            Some((address, node.name.clone()))
        })
        .collect()
}

/// The preference for a leader as a relay; `None` where it may not relay.
fn relay_rank(
    topology: &Topology,
    relaying: &Relaying,
    segment: &Segment,
    leader: &Leader,
) -> Option<usize> {
    let rank = relaying.rank(segment.region());
    rank.filter(|_| !topology.not_relaying.contains(&leader.node))
}

fn far(remote: &Segment, leader: &Leader, own: &Leader, relay_rank: Option<usize>) -> Option<Far> {
    let pairs = leader.wireguard_ips.iter().filter_map(|address| {
        let mut ips = own.wireguard_ips.iter();
        let own = ips.find(|own| own.is_ipv6() == address.is_ipv6())?;
        Some((*address, *own))
    });
    let (address, own) = pairs.into_iter().next()?;
    Some(Far {
        node: leader.node.clone(),
        segment: remote.name.clone(),
        group: remote.group.clone(),
        relay_rank,
        address,
        own,
    })
}

/// The address of flannel's device: the first one of the node's network of this family.
fn first(nets: &[IpNet], v6: bool) -> Option<IpAddr> {
    let mut nets = nets.iter().map(IpNet::network);
    nets.find(|address| address.is_ipv6() == v6)
}
