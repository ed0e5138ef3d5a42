//! Selvedge's algorithm: Kilo's segments and order of leaders, with judged claims, WireGuard addresses that
//! stay, and leaders that are Ready.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::address::{is_host_of, is_public, is_unicast, nth};
use super::candidates::Announcements;
use super::claims::{Accepted, Claims, dedup};
use super::excluded::{Field, Object, Reason};
use super::region::{Regions, membership};
use super::{
    Candidate, Claim, Endpoint, Granularity, InterfaceAddr, Leader, Member, Node, NodeName, Origin,
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
        .map(|(name, nodes)| (name, elect(name, nodes)))
        .collect::<BTreeMap<_, _>>();
    let mut wireguard_ips = wireguard_ips(&mut claims, settings, &elected, &expected);
    let observers = observers(&elected);
    let discovered = discovered_endpoints(&observers);
    let announcements = Announcements::new(snapshot, &claims, observers);

    let mut leader = |node: &Node| {
        let object = Object::Node(node.name.clone());
        let public_key = node.public_key?;
        let address = node
            .endpoint
            .as_ref()
            .and_then(|endpoint| claims.endpoint_address(&object, endpoint));
        let candidates = announcements.of_leader(node, public_key, address, &claims);
        let behind_nat = is_behind_nat(node, &candidates);
        Some(Leader {
            node: node.name.clone(),
            keys: vec![public_key],
            endpoint: node.endpoint.clone(),
            address,
            discovered: discovered.get(&public_key).copied().filter(|_| behind_nat),
            candidates,
            behind_nat,
            persistent_keepalive: keepalive(node, behind_nat),
            keepalive_forced: node.persistent_keepalive.is_some(),
            wireguard_ips: wireguard_ips.remove(&node.name).unwrap_or_default(),
        })
    };
    let leaders = elected.values().map(|nodes| {
        let leaders = nodes.iter().filter_map(|node| leader(node));
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
                .map(|node| member(node, &claims.nodes[&node.name]))
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
        segments,
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

fn member(node: &Node, accepted: &Accepted) -> Member {
    Member {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        pod_cidrs: accepted.pod_cidrs.clone(),
        addresses: accepted.addresses.clone(),
        underlay: accepted.underlay.clone(),
        flannel_ips: accepted.flannel_ips.clone(),
        private_ip: accepted.private_ip,
    }
}

/// Elects the leaders of a segment, at present one, among its nodes sorted by name.
///
/// In this order count: the operator's annotations, the present lead, a public endpoint, a longer stay in the
/// region, and the name, which makes the order total. So no statement of a newcomer takes the lead from the
/// present leader.
///
/// Only Ready nodes are eligible. Where none is Ready all are: the API server may be what cannot reach them.
fn elect<'a>(name: &SegmentName, nodes: &[&'a Node]) -> Vec<&'a Node> {
    let lead = Claim::Lead(name.clone());
    let since = |node: &Node| node.ledger.rank(&membership(node));
    let eldest = nodes.iter().map(|node| since(node)).min();
    let settled = eldest.map_or(0, |(_, since)| since.saturating_add(SETTLING));
    let rank = |node: &&&Node| {
        let forced = node.endpoint_forced;
        let (unrecorded, since) = since(node);
        (
            !liveness::may_lead(node.ready),
            !(node.leader && forced),
            !node.leader,
            !forced,
            node.ledger.rank(&lead),
            !has_public_endpoint(node),
            (unrecorded, since.max(settled)),
        )
    };
    let primary = nodes.iter().min_by_key(rank);
    primary.copied().into_iter().collect()
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

/// Gives each leader one address of each pool.
///
/// A requested address is given to its node, whether or not it leads now, so that a node that joins or leaves
/// renumbers no other. Of two equal requests the older claim wins. A leader without a request gets the lowest
/// free address, in the order of segments: in a new mesh that is the address Kilo gives.
///
/// An address is left free for each segment of nodes whose agents have not started yet (`expected`), so that
/// the addresses of a new mesh do not depend on the order in which agents start.
fn wireguard_ips(
    claims: &mut Claims<'_>,
    settings: &Settings,
    leaders: &BTreeMap<&SegmentName, Vec<&Node>>,
    expected: &BTreeMap<SegmentName, Vec<&NodeName>>,
) -> BTreeMap<NodeName, Vec<IpAddr>> {
    let mut given = BTreeMap::<NodeName, Vec<IpAddr>>::new();
    for pool in &settings.subnets {
        let mut holders = BTreeMap::<IpAddr, &NodeName>::new();
        let mut kept = BTreeMap::<&NodeName, IpAddr>::new();
        let mut requests = Vec::new();
        for node in claims.by_age() {
            let mut requested = node.wireguard_ips.iter().map(InterfaceAddr::addr);
            if let Some(ip) = requested.find(|ip| ip.is_ipv6() == pool.addr().is_ipv6()) {
                let rank = node.ledger.rank(&Claim::Address(ip));
                requests.push((rank, node.created, &node.name, ip, node));
            }
        }
        requests.sort_by_key(|(rank, created, name, ..)| (*rank, *created, *name));
        for (.., ip, node) in requests {
            let meshed = claims.nodes[&node.name].is_meshed();
            let reason = if !is_host_of(pool, ip) {
                Some(Reason::NotInSubnet)
            } else {
                let holder = holders.get(&ip).copied().cloned();
                holder.map(|holder| Reason::TakenBy(Object::Node(holder)))
            };
            match reason {
                Some(_) if !meshed => {}
                Some(reason) => {
                    let object = Object::Node(node.name.clone());
                    claims.exclude(object, Field::WireguardIp(ip), reason);
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
            let Some(leaders) = leaders.get(name) else {
                if !expected[name].iter().any(|node| kept.contains_key(node)) {
                    free.next();
                }
                continue;
            };
            for leader in leaders {
                match kept.get(&leader.name).copied().or_else(|| free.next()) {
                    Some(ip) => given.entry(leader.name.clone()).or_default().push(ip),
                    None => {
                        let object = Object::Node(leader.name.clone());
                        let field = Field::WireguardIp(pool.network());
                        claims.exclude(object, field, Reason::SubnetExhausted);
                    }
                }
            }
        }
    }
    for ips in given.values_mut() {
        ips.sort();
    }
    given
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
