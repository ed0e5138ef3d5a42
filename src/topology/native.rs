//! Our own algorithm: Kilo's segments and order of leaders, with claims judged, sticky WireGuard
//! addresses and leaders that are known to be there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::address::{is_host_of, is_public, is_unicast, nth};
use super::claims::{Belief, Claims, dedup};
use super::excluded::{Field, Reason, Subject};
use super::{
    Endpoint, Granularity, InterfaceAddr, Member, Node, NodeName, Outsider, Segment, SegmentName,
    Settings, Snapshot, Topology, Whereabouts,
};
use crate::wireguard::key::PublicKey;

/// Seconds between the keepalives of a node behind NAT or a firewall that has no annotation: less than the 30
/// seconds after which common NATs forget a UDP mapping.
const NAT_KEEPALIVE: u16 = 25;

/// Computes the topology of a mesh in which every agent is ours.
pub(super) fn topology(snapshot: &Snapshot, settings: &Settings) -> Topology {
    let granularity = settings.granularity;
    let mut claims = Claims::new(snapshot, settings, |node| segment_name(node, granularity));

    let mut members = BTreeMap::<SegmentName, Vec<&Node>>::new();
    let mut outsiders = Vec::new();
    let mut expected = BTreeMap::<SegmentName, Vec<&NodeName>>::new();
    for node in snapshot.nodes.values() {
        let belief = &claims.nodes[&node.name];
        if belief.is_meshed() {
            let name = segment_name(node, granularity);
            members.entry(name).or_default().push(node);
        } else {
            outsiders.push(outsider(node, belief, granularity));
            let name = expected_segment_name(node, granularity);
            expected.entry(name).or_default().push(&node.name);
        }
    }
    let leaders = members
        .iter()
        .map(|(name, nodes)| (name, leader(nodes)))
        .collect::<BTreeMap<_, _>>();
    let mut wireguard_ips = wireguard_ips(&mut claims, settings, &leaders, &expected);
    let discovered = discovered_endpoints(&leaders);

    let segments = members.iter().filter_map(|(name, nodes)| {
        let leader = leaders[name];
        let public_key = leader.public_key?;
        let subject = Subject::Node(leader.name.clone());
        let address = leader
            .endpoint
            .as_ref()
            .and_then(|endpoint| claims.endpoint_address(&subject, endpoint));
        let behind_nat = leader
            .persistent_keepalive
            .is_some_and(|seconds| seconds > 0)
            || !has_public_endpoint(leader);
        Some(Segment {
            name: name.clone(),
            group: group_name(leader, granularity),
            leader: leader.name.clone(),
            public_key,
            endpoint: leader.endpoint.clone(),
            address,
            discovered: discovered.get(&public_key).copied().filter(|_| behind_nat),
            behind_nat,
            persistent_keepalive: keepalive(leader),
            wireguard_ips: wireguard_ips.remove(&leader.name).unwrap_or_default(),
            allowed_location_ips: allowed_location_ips(nodes, &claims.nodes),
            nodes: nodes
                .iter()
                .map(|node| member(node, &claims.nodes[&node.name]))
                .collect(),
        })
    });
    let segments = segments.collect();
    let peers = std::mem::take(&mut claims.peers);
    let whereabouts = peers
        .iter()
        .map(|peer| {
            let subject = Subject::Peer(peer.name.clone());
            let endpoint = peer.endpoint.as_ref();
            let whereabouts = Whereabouts {
                address: endpoint.and_then(|endpoint| claims.endpoint_address(&subject, endpoint)),
                discovered: discovered.get(&peer.public_key).copied(),
            };
            (peer.public_key, whereabouts)
        })
        .collect();
    claims.excluded.sort();
    claims.overlaps.sort();

    Topology {
        granularity,
        subnets: settings.subnets.clone(),
        segments,
        outsiders,
        peers,
        whereabouts,
        excluded: claims.excluded,
        overlaps: claims.overlaps,
        ..Topology::default()
    }
}

/// The segment of a node that takes part.
///
/// Who has no private address shares no network with others of its location: it is on its own.
fn segment_name(node: &Node, granularity: Granularity) -> SegmentName {
    match granularity {
        Granularity::Location => group_name(node, granularity),
        Granularity::Full | Granularity::Cross => SegmentName::Node(node.name.clone()),
    }
}

/// What a node reaches without the tunnel.
fn group_name(node: &Node, granularity: Granularity) -> SegmentName {
    match granularity {
        Granularity::Location | Granularity::Cross if node.private_ip.is_some() => {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            SegmentName::Node(node.name.clone())
        }
    }
}

fn outsider(node: &Node, belief: &Belief, granularity: Granularity) -> Outsider {
    // Before its agent has told its private address, a node is taken to be where its label says:
    // flannel must go on serving it.
    let group = match granularity {
        Granularity::Location | Granularity::Cross if node.public_key.is_none() => {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            group_name(node, granularity)
        }
    };
    Outsider {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        group,
        pod_cidrs: belief.pod_cidrs.clone(),
        underlay: underlay(node, belief.private_ip),
    }
}

fn member(node: &Node, belief: &Belief) -> Member {
    Member {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        pod_cidrs: belief.pod_cidrs.clone(),
        addresses: belief.addresses.clone(),
        underlay: underlay(node, belief.private_ip),
        private_ip: belief.private_ip,
    }
}

/// Every address under which the nodes of its region may know a node.
pub(super) fn underlay(node: &Node, private_ip: Option<InterfaceAddr>) -> BTreeSet<IpAddr> {
    let lease = node.lease.iter().flat_map(|lease| {
        let v4 = lease.public_ip.map(IpAddr::V4);
        v4.into_iter().chain(lease.public_ipv6.map(IpAddr::V6))
    });
    let private = private_ip.map(|private| private.addr());
    node.internal_ips
        .iter()
        .copied()
        .chain(private)
        .chain(lease)
        .collect()
}

/// Elects among nodes sorted by name: the operator's choice that others can reach, the operator's
/// choice, who can be reached, the first. The name makes the order total.
///
/// Only Ready nodes are eligible; where there is none, the API server may be what cannot reach them.
fn leader<'a>(nodes: &[&'a Node]) -> &'a Node {
    let rank = |node: &&&Node| {
        let public = has_public_endpoint(node);
        (!node.ready, !(node.leader && public), !node.leader, !public)
    };
    nodes
        .iter()
        .min_by_key(rank)
        .expect("a segment has a node, or it would not have been made")
}

/// Whether others can speak to a node first. A name counts, resolved or not: agents that resolve it
/// differently must not disagree on the leader.
fn has_public_endpoint(node: &Node) -> bool {
    match &node.endpoint {
        Some(Endpoint::Addr(address)) => is_public(address.ip()),
        Some(Endpoint::Dns { .. }) => true,
        None => false,
    }
}

fn keepalive(node: &Node) -> u16 {
    node.persistent_keepalive.unwrap_or_else(|| {
        if has_public_endpoint(node) && !may_be_firewalled(node) {
            0
        } else {
            NAT_KEEPALIVE
        }
    })
}

/// Whether a router may keep strangers away from a node's public address. In IPv6 every host has one,
/// and the routers of homes and data centres let in answers alone; what the operator forced is taken to
/// be open.
fn may_be_firewalled(node: &Node) -> bool {
    let found = !node.endpoint_forced;
    found && matches!(&node.endpoint, Some(Endpoint::Addr(address)) if address.is_ipv6())
}

/// The segment a node will be in once its agent has told its private address: the one that its status
/// suggests.
fn expected_segment_name(node: &Node, granularity: Granularity) -> SegmentName {
    let private = node.internal_ips.iter().any(|ip| !is_public(*ip));
    match granularity {
        Granularity::Location if private => SegmentName::Location(node.region.clone()),
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            segment_name(node, granularity)
        }
    }
}

/// Gives each leader one address of each pool.
///
/// An annotation is honoured, whoever leads now, so that who joins or leaves renumbers nobody; of
/// two equal ones the older node's. A leader without one gets the lowest free address, in the order
/// of segments, which in a new mesh is what Kilo gives.
///
/// Nodes whose agents have not come up yet keep their places (`expected`, by the segments they will be
/// in), so that the numbers of a new mesh do not depend on which agent was first.
fn wireguard_ips(
    claims: &mut Claims<'_>,
    settings: &Settings,
    leaders: &BTreeMap<&SegmentName, &Node>,
    expected: &BTreeMap<SegmentName, Vec<&NodeName>>,
) -> BTreeMap<NodeName, Vec<IpAddr>> {
    let mut given = BTreeMap::<NodeName, Vec<IpAddr>>::new();
    for pool in &settings.subnets {
        let mut holders = BTreeMap::<IpAddr, &NodeName>::new();
        let mut kept = BTreeMap::<&NodeName, IpAddr>::new();
        for node in claims.by_age() {
            let meshed = claims.nodes[&node.name].is_meshed();
            let wished = node.wireguard_ips.iter().map(InterfaceAddr::addr);
            let Some(ip) = wished
                .into_iter()
                .find(|ip| ip.is_ipv6() == pool.addr().is_ipv6())
            else {
                continue;
            };
            let reason = if !is_host_of(pool, ip) {
                Some(Reason::NotInSubnet)
            } else {
                let holder = holders.get(&ip).copied().cloned();
                holder.map(|holder| Reason::TakenBy(Subject::Node(holder)))
            };
            match reason {
                Some(_) if !meshed => {}
                Some(reason) => {
                    let subject = Subject::Node(node.name.clone());
                    claims.exclude(subject, Field::WireguardIp(ip), reason);
                }
                None => {
                    holders.insert(ip, &node.name);
                    kept.insert(&node.name, ip);
                }
            }
        }

        let mut free = (1..)
            .map_while(|offset| nth(pool, offset))
            .filter(|ip| is_host_of(pool, *ip) && !holders.contains_key(ip));
        let names = leaders.keys().copied().chain(expected.keys());
        for name in names.collect::<BTreeSet<_>>() {
            let Some(leader) = leaders.get(name) else {
                if !expected[name].iter().any(|node| kept.contains_key(node)) {
                    free.next();
                }
                continue;
            };
            match kept.get(&leader.name).copied().or_else(|| free.next()) {
                Some(ip) => given.entry(leader.name.clone()).or_default().push(ip),
                None => {
                    let subject = Subject::Node(leader.name.clone());
                    let field = Field::WireguardIp(pool.network());
                    claims.exclude(subject, field, Reason::SubnetExhausted);
                }
            }
        }
    }
    for ips in given.values_mut() {
        ips.sort();
    }
    given
}

/// Where the leaders saw the others: of two observations that of a public leader, then the older one's.
///
/// A public leader is always reached, so it is the first to see that somebody moved; one behind NAT may
/// never hear it. Who is no leader has no tunnels and saw nobody.
fn discovered_endpoints(
    leaders: &BTreeMap<&SegmentName, &Node>,
) -> BTreeMap<PublicKey, SocketAddr> {
    let mut leaders = leaders.values().collect::<Vec<_>>();
    leaders.sort_by_key(|leader| (!has_public_endpoint(leader), leader.created, &leader.name));
    let mut discovered = BTreeMap::new();
    for (key, address) in leaders
        .iter()
        .flat_map(|leader| &leader.discovered_endpoints)
    {
        if is_unicast(address.ip()) {
            discovered.entry(*key).or_insert(*address);
        }
    }
    discovered
}

/// The union over a segment's nodes, in the order Kilo prints it: as text.
fn allowed_location_ips(
    nodes: &[&Node],
    beliefs: &BTreeMap<&NodeName, Belief>,
) -> Vec<ipnet::IpNet> {
    let mut nets = nodes
        .iter()
        .flat_map(|node| beliefs[&node.name].allowed_location_ips.iter().copied())
        .collect::<Vec<_>>();
    nets.sort_by_cached_key(ToString::to_string);
    dedup(&mut nets);
    nets
}
