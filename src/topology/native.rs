//! Selvedge's algorithm: Kilo's segments and order of leaders, with judged claims, WireGuard addresses that
//! stay, and leaders that are Ready.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::address::{is_public, is_unicast};
use super::alias::{Aliases, aliases};
use super::candidates::Announcements;
use super::claims::{Accepted, Claims, dedup};
use super::excluded::{Field, Object, Reason};
use super::pool::Pools;
use super::region::{Regions, membership};
use super::{
    Candidate, Claim, Endpoint, Granularity, Leader, LeaderCount, Member, Node, NodeName, Origin,
    Outsider, PeerAddresses, Resolved, Segment, SegmentName, Settings, Snapshot, Topology,
};
use crate::liveness;
use crate::wireguard::key::PublicKey;

/// Seconds between the keepalives of a node behind NAT or a firewall that has no annotation: less than the 30
/// seconds after which common NATs forget a UDP mapping.
const NAT_KEEPALIVE: u16 = 25;

/// Seconds after a region's oldest record within which its members count as equally old: a region that
/// starts as a whole settles by name, whichever agent was first.
const SETTLING: i64 = 60;

/// Computes the topology of a mesh by Selvedge's algorithm. The nodes in `foreign` run a real `kg` that
/// the operator did not allow. They are treated as any other.
pub(super) fn topology(
    snapshot: &Snapshot,
    settings: &Settings,
    resolved: &Resolved,
    foreign: Vec<NodeName>,
) -> Topology {
    let granularity = settings.granularity;
    let mut claims = Claims::new(snapshot, settings, resolved, |node, accepted| {
        segment_name(node, accepted, granularity)
    });
    for name in &foreign {
        let object = Object::Node(name.clone());
        claims.exclude(object, Field::Algorithm, Reason::NotBesideKilo);
    }

    let mut members = BTreeMap::<SegmentName, Vec<&Node>>::new();
    let mut outsiders = Vec::new();
    let mut expected = BTreeMap::<SegmentName, Vec<&NodeName>>::new();
    for node in snapshot.nodes.values() {
        let accepted = &claims.nodes[&node.name];
        if accepted.is_meshed() {
            let name = segment_name(node, accepted, granularity);
            members.entry(name).or_default().push(node);
        } else {
            outsiders.push(outsider(node, accepted, &claims.regions, granularity));
            let name = expected_segment_name(node, accepted, &claims.regions, granularity);
            expected.entry(name).or_default().push(&node.name);
        }
    }
    let elected = members
        .iter()
        .map(|(name, nodes)| (name, elect(name, nodes, settings.leaders_per_region)))
        .collect::<BTreeMap<_, _>>();
    let pools = Pools::new(&mut claims, settings, &elected, &expected);
    let aliases = aliases(&mut claims, settings);
    let observers = observers(&elected);
    let discovered = discovered_endpoints(&observers);
    let announcements = Announcements::new(snapshot, &claims, observers);

    let mut leader = |probe_place: Option<usize>, node: &Node| {
        let object = Object::Node(node.name.clone());
        let public_key = node.public_key?;
        let address = node
            .endpoint
            .as_ref()
            .and_then(|endpoint| claims.endpoint_address(&object, endpoint));
        let others = &claims.nodes[&node.name].other_keys;
        let keys: Vec<_> = std::iter::once(public_key)
            .chain(others.iter().copied())
            .collect();
        let candidates = announcements.of_leader(node, &keys, address, &claims);
        let seen = keys.iter().find_map(|key| discovered.get(key)).copied();
        let behind_nat = is_behind_nat(node, &candidates);
        Some(Leader {
            node: node.name.clone(),
            keys,
            endpoint: node.endpoint.clone(),
            address,
            discovered: seen.filter(|_| behind_nat),
            candidates,
            behind_nat,
            persistent_keepalive: keepalive(node, behind_nat),
            keepalive_forced: node.persistent_keepalive.is_some(),
            wireguard_ips: pools.wireguard_ips(&node.name),
            probe_ip: probe_place
                .and_then(|place| pools.probe_ip(place, &claims.nodes[&node.name].pod_cidrs)),
        })
    };
    let leaders = elected.values().map(|nodes| {
        // By name: the order of the leaders changes when one records its lead. With it the addresses would change,
        // and for a moment nothing would be known of the paths.
        let place = |node: &Node| nodes.iter().filter(|other| other.name < node.name).count();
        let leaders = nodes.iter().map(|node| (place(node), node));
        let is_only = nodes.len() == 1;
        let leaders = leaders.filter_map(|(place, node)| leader((!is_only).then_some(place), node));
        leaders.collect::<Vec<_>>()
    });
    let leaders = leaders.collect::<Vec<_>>();
    let segments = members.iter().zip(leaders);
    let segments = segments.filter_map(|((name, nodes), leaders)| {
        let first = nodes.first().filter(|_| !leaders.is_empty())?;
        Some(Segment {
            name: name.clone(),
            group: group_name(first, &claims.nodes[&first.name], granularity),
            leaders,
            allowed_location_ips: allowed_location_ips(nodes, &claims.nodes),
            nodes: nodes
                .iter()
                .map(|node| member(node, &claims.nodes[&node.name], &aliases))
                .collect(),
        })
    });
    let segments = segments.collect();
    let peers = std::mem::take(&mut claims.peers);
    let peer_addresses = peers
        .iter()
        .map(|peer| {
            let object = Object::Peer(peer.name.clone());
            let endpoint = peer.endpoint.as_ref();
            let address = endpoint.and_then(|endpoint| claims.endpoint_address(&object, endpoint));
            let peer_addresses = PeerAddresses {
                address,
                discovered: discovered.get(&peer.public_key).copied(),
                candidates: announcements.of_peer(&peer.public_key, address),
            };
            (peer.public_key, peer_addresses)
        })
        .collect();
    claims.excluded.sort();
    claims.overlaps.sort();

    Topology {
        foreign,
        granularity,
        subnets: settings.subnets.clone(),
        alias_pools: settings.alias_pools.clone(),
        segments,
        not_relaying: snapshot
            .nodes
            .values()
            .filter(|node| node.relay_forbidden)
            .map(|node| node.name.clone())
            .collect(),
        outsiders,
        peers,
        peer_addresses,
        excluded: claims.excluded,
        overlaps: claims.overlaps,
        ..Topology::default()
    }
}

/// The segment of a node that takes part.
///
/// A node outside of its region shares no network with the others there, so it is a segment on its own.
fn segment_name(node: &Node, accepted: &Accepted, granularity: Granularity) -> SegmentName {
    match granularity {
        Granularity::Location => group_name(node, accepted, granularity),
        Granularity::Full | Granularity::Cross => SegmentName::Node(node.name.clone()),
    }
}

/// The group of nodes that reach each other without the tunnel.
fn group_name(node: &Node, accepted: &Accepted, granularity: Granularity) -> SegmentName {
    match granularity {
        Granularity::Location | Granularity::Cross if accepted.in_region => {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            SegmentName::Node(node.name.clone())
        }
    }
}

fn outsider(
    node: &Node,
    accepted: &Accepted,
    regions: &Regions,
    granularity: Granularity,
) -> Outsider {
    // flannel must go on serving a node whose agent has not started yet.
    let group = match granularity {
        Granularity::Location | Granularity::Cross
            if node.public_key.is_none() && may_be_inside(node, regions) =>
        {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            group_name(node, accepted, granularity)
        }
    };
    Outsider {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        group,
        pod_cidrs: accepted.pod_cidrs.clone(),
        underlay: accepted.underlay.clone(),
        flannel_ips: accepted.flannel_ips.clone(),
    }
}

/// Whether a node without an agent may be inside its region: by its status, or because the networks of that
/// region are not known yet.
fn may_be_inside(node: &Node, regions: &Regions) -> bool {
    let inside = |ip: &IpAddr| regions.contain(&node.region, *ip);
    node.region_declared
        || regions.networks(&node.region).is_none()
        || node.internal_ips.iter().any(inside)
}

fn member(node: &Node, accepted: &Accepted, aliases: &Aliases) -> Member {
    Member {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        pod_cidrs: accepted.pod_cidrs.clone(),
        addresses: accepted.addresses.clone(),
        aliases: aliases.get(&node.name).cloned().unwrap_or_default(),
        underlay: accepted.underlay.clone(),
        flannel_ips: accepted.flannel_ips.clone(),
        private_ip: accepted.private_ip,
    }
}

/// Elects the leaders of a segment, the primary first, among its nodes sorted by name.
///
/// In this order count: the operator's annotations, the present lead, a public endpoint, a longer stay in the
/// region, and the name, which makes the order total. So no statement of a newcomer takes the lead from a
/// present leader.
///
/// Only Ready nodes are eligible. Where none is Ready all are: the API server may be what cannot reach them.
fn elect<'a>(name: &SegmentName, nodes: &[&'a Node], count: LeaderCount) -> Vec<&'a Node> {
    let lead = Claim::Lead(name.clone());
    let since = |node: &Node| node.ledger.rank(&membership(node));
    let eldest = nodes.iter().map(|node| since(node)).min();
    let settled = eldest.map_or(0, |(_, since)| since.saturating_add(SETTLING));
    let rank = |node: &&Node| {
        let forced = node.endpoint_forced;
        let (unrecorded, since) = since(node);
        (
            !(node.leader && forced),
            !node.leader,
            !forced,
            node.ledger.rank(&lead),
            !has_public_endpoint(node),
            (unrecorded, since.max(settled)),
        )
    };
    let (ready, others): (Vec<_>, Vec<_>) = nodes
        .iter()
        .partition(|node| liveness::may_lead(node.ready));
    let mut leaders = if ready.is_empty() { others } else { ready };
    leaders.sort_by_key(rank);
    leaders.truncate(count.get());
    leaders
}

/// Whether others can open a connection to a node. A name counts, resolved or not: agents that resolve it
/// differently must not disagree on the leader.
fn has_public_endpoint(node: &Node) -> bool {
    match &node.endpoint {
        Some(Endpoint::Addr(address)) => is_public(address.ip()),
        Some(Endpoint::Dns { .. }) => true,
        None => false,
    }
}

/// Whether others observe a leader at an address that it does not have, because a router translates it.
fn is_behind_nat(leader: &Node, candidates: &[Candidate]) -> bool {
    let own: BTreeSet<_> = candidates
        .iter()
        .filter(|candidate| candidate.origin < Origin::Discovered)
        .map(|candidate| candidate.address)
        .collect();
    let mut seen = candidates
        .iter()
        .filter(|candidate| candidate.origin == Origin::Discovered);
    !leader.endpoint_forced && (own.is_empty() || seen.any(|seen| !own.contains(&seen.address)))
}

fn keepalive(node: &Node, behind_nat: bool) -> u16 {
    node.persistent_keepalive
        .unwrap_or(if behind_nat { NAT_KEEPALIVE } else { 0 })
}

/// The segment that a node will be in once its agent has published its private address, by its status.
fn expected_segment_name(
    node: &Node,
    accepted: &Accepted,
    regions: &Regions,
    granularity: Granularity,
) -> SegmentName {
    let private = node.internal_ips.iter().any(|ip| !is_public(*ip));
    match granularity {
        Granularity::Location if private && may_be_inside(node, regions) => {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            segment_name(node, accepted, granularity)
        }
    }
}

/// The leaders in the order in which their observations count: public ones, then the older ones.
///
/// Every peer reaches a public leader, so it is the first to observe a peer's new address; a leader behind NAT
/// may never receive a packet from there. Other nodes have no tunnels and observe nothing.
fn observers<'a>(leaders: &BTreeMap<&SegmentName, Vec<&'a Node>>) -> Vec<&'a Node> {
    let mut leaders = leaders.values().flatten().copied().collect::<Vec<_>>();
    leaders.sort_by_key(|leader| (!has_public_endpoint(leader), leader.created, &leader.name));
    leaders
}

/// The addresses at which the leaders observed the others. Of two observations the first leader's counts.
fn discovered_endpoints(observers: &[&Node]) -> BTreeMap<PublicKey, SocketAddr> {
    let mut discovered = BTreeMap::new();
    for (key, address) in observers
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
    accepted: &BTreeMap<&NodeName, Accepted>,
) -> Vec<ipnet::IpNet> {
    let mut nets = nodes
        .iter()
        .flat_map(|node| accepted[&node.name].allowed_location_ips.iter().copied())
        .collect::<Vec<_>>();
    nets.sort_by_cached_key(ToString::to_string);
    dedup(&mut nets);
    nets
}
