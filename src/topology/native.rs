//! Our own algorithm: Kilo's segments and order of leaders, with claims judged, sticky WireGuard
//! addresses and leaders that are known to be there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::address::{is_host_of, is_public, is_unicast, nth};
use super::candidates::Offers;
use super::claims::{Belief, Claims, dedup};
use super::excluded::{Field, Reason, Subject};
use super::region::{Regions, place};
use super::{
    Candidate, Claim, Endpoint, Granularity, InterfaceAddr, Leader, Member, Node, NodeName, Origin,
    Outsider, Resolved, Segment, SegmentName, Settings, Snapshot, Topology, Whereabouts,
};
use crate::liveness;
use crate::wireguard::key::PublicKey;

/// Seconds between the keepalives of a node behind NAT or a firewall that has no annotation: less than the 30
/// seconds after which common NATs forget a UDP mapping.
const NAT_KEEPALIVE: u16 = 25;

/// Seconds after a region's oldest record within which its members count as equally old: a region that
/// starts as a whole settles by name, whichever agent was first.
const SETTLING: i64 = 60;

/// Computes the topology of a mesh by our own algorithm. The nodes in `foreign` run a real `kg` that
/// the operator did not allow; they are nodes like any other.
pub(super) fn topology(
    snapshot: &Snapshot,
    settings: &Settings,
    resolved: &Resolved,
    foreign: Vec<NodeName>,
) -> Topology {
    let granularity = settings.granularity;
    let mut claims = Claims::new(snapshot, settings, resolved, |node, belief| {
        segment_name(node, belief, granularity)
    });
    for name in &foreign {
        let subject = Subject::Node(name.clone());
        claims.exclude(subject, Field::Algorithm, Reason::NotBesideKilo);
    }

    let mut members = BTreeMap::<SegmentName, Vec<&Node>>::new();
    let mut outsiders = Vec::new();
    let mut expected = BTreeMap::<SegmentName, Vec<&NodeName>>::new();
    for node in snapshot.nodes.values() {
        let belief = &claims.nodes[&node.name];
        if belief.is_meshed() {
            let name = segment_name(node, belief, granularity);
            members.entry(name).or_default().push(node);
        } else {
            outsiders.push(outsider(node, belief, &claims.regions, granularity));
            let name = expected_segment_name(node, belief, &claims.regions, granularity);
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
    let offers = Offers::new(snapshot, &claims, observers);

    let mut leader = |node: &Node| {
        let subject = Subject::Node(node.name.clone());
        let public_key = node.public_key?;
        let address = node
            .endpoint
            .as_ref()
            .and_then(|endpoint| claims.endpoint_address(&subject, endpoint));
        let candidates = offers.of_leader(node, public_key, address, &claims);
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
    let whereabouts = peers
        .iter()
        .map(|peer| {
            let subject = Subject::Peer(peer.name.clone());
            let endpoint = peer.endpoint.as_ref();
            let address = endpoint.and_then(|endpoint| claims.endpoint_address(&subject, endpoint));
            let whereabouts = Whereabouts {
                address,
                discovered: discovered.get(&peer.public_key).copied(),
                candidates: offers.of_peer(&peer.public_key, address),
            };
            (peer.public_key, whereabouts)
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
        whereabouts,
        excluded: claims.excluded,
        overlaps: claims.overlaps,
        ..Topology::default()
    }
}

/// The segment of a node that takes part.
///
/// One that is not inside its region shares no network with the others there: it is on its own.
fn segment_name(node: &Node, belief: &Belief, granularity: Granularity) -> SegmentName {
    match granularity {
        Granularity::Location => group_name(node, belief, granularity),
        Granularity::Full | Granularity::Cross => SegmentName::Node(node.name.clone()),
    }
}

/// What a node reaches without the tunnel.
fn group_name(node: &Node, belief: &Belief, granularity: Granularity) -> SegmentName {
    match granularity {
        Granularity::Location | Granularity::Cross if belief.near => {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            SegmentName::Node(node.name.clone())
        }
    }
}

fn outsider(node: &Node, belief: &Belief, regions: &Regions, granularity: Granularity) -> Outsider {
    // flannel must go on serving a node whose agent has not come yet.
    let group = match granularity {
        Granularity::Location | Granularity::Cross
            if node.public_key.is_none() && may_be_inside(node, regions) =>
        {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            group_name(node, belief, granularity)
        }
    };
    Outsider {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        group,
        pod_cidrs: belief.pod_cidrs.clone(),
        underlay: belief.underlay.clone(),
        flannel_ips: belief.flannel_ips.clone(),
    }
}

/// Whether a node without an agent is inside its region: by its status, or because nothing tells yet
/// where that region is.
fn may_be_inside(node: &Node, regions: &Regions) -> bool {
    let inside = |ip: &IpAddr| regions.contain(&node.region, *ip);
    node.region_declared
        || regions.networks(&node.region).is_none()
        || node.internal_ips.iter().any(inside)
}

fn member(node: &Node, belief: &Belief) -> Member {
    Member {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        pod_cidrs: belief.pod_cidrs.clone(),
        addresses: belief.addresses.clone(),
        underlay: belief.underlay.clone(),
        flannel_ips: belief.flannel_ips.clone(),
        private_ip: belief.private_ip,
    }
}

/// Elects the leaders of a segment, at present one, among its nodes sorted by name. What the operator annotated comes first, then who leads already:
/// no statement of a newcomer takes the lead from it. Then come an endpoint that others can reach, a
/// longer stay in the region, and the name, which makes the order total.
///
/// Only Ready nodes are eligible; where there is none, the API server may be what cannot reach them.
fn elect<'a>(name: &SegmentName, nodes: &[&'a Node]) -> Vec<&'a Node> {
    let lead = Claim::Lead(name.clone());
    let since = |node: &Node| node.ledger.rank(&place(node));
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

/// Whether others can speak to a node first. A name counts, resolved or not: agents that resolve it
/// differently must not disagree on the leader.
fn has_public_endpoint(node: &Node) -> bool {
    match &node.endpoint {
        Some(Endpoint::Addr(address)) => is_public(address.ip()),
        Some(Endpoint::Dns { .. }) => true,
        None => false,
    }
}

/// Whether others see a leader at an address that it does not have, so that a router translates it.
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

/// The segment a node will be in once its agent has told its private address: the one that its status
/// suggests.
fn expected_segment_name(
    node: &Node,
    belief: &Belief,
    regions: &Regions,
    granularity: Granularity,
) -> SegmentName {
    let private = node.internal_ips.iter().any(|ip| !is_public(*ip));
    match granularity {
        Granularity::Location if private && may_be_inside(node, regions) => {
            SegmentName::Location(node.region.clone())
        }
        Granularity::Location | Granularity::Full | Granularity::Cross => {
            segment_name(node, belief, granularity)
        }
    }
}

/// Gives each leader one address of each pool.
///
/// An annotation is honoured, whichever node leads now, so that a node that joins or leaves renumbers no
/// other; of two equal ones the older claim wins. A leader without one gets the lowest free address, in the order
/// of segments, which in a new mesh is what Kilo gives.
///
/// Nodes whose agents have not come up yet keep their places (`expected`, by the segments they will be
/// in), so that the numbers of a new mesh do not depend on which agent was first.
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
        let mut wishes = Vec::new();
        for node in claims.by_age() {
            let mut wished = node.wireguard_ips.iter().map(InterfaceAddr::addr);
            if let Some(ip) = wished.find(|ip| ip.is_ipv6() == pool.addr().is_ipv6()) {
                let rank = node.ledger.rank(&Claim::Address(ip));
                wishes.push((rank, node.created, &node.name, ip, node));
            }
        }
        wishes.sort_by_key(|(rank, created, name, ..)| (*rank, *created, *name));
        for (.., ip, node) in wishes {
            let meshed = claims.nodes[&node.name].is_meshed();
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
                        let subject = Subject::Node(leader.name.clone());
                        let field = Field::WireguardIp(pool.network());
                        claims.exclude(subject, field, Reason::SubnetExhausted);
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
/// A public leader is always reached, so it is the first to see that somebody moved; one behind NAT may
/// never hear it. Who is no leader has no tunnels and saw nobody.
fn observers<'a>(leaders: &BTreeMap<&SegmentName, Vec<&'a Node>>) -> Vec<&'a Node> {
    let mut leaders = leaders.values().flatten().copied().collect::<Vec<_>>();
    leaders.sort_by_key(|leader| (!has_public_endpoint(leader), leader.created, &leader.name));
    leaders
}

/// Where the leaders saw the others: of two observations the first one's.
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
