//! Kilo's algorithm, rule by rule (`pkg/mesh/topology.go`), for a mesh in which a real `kg` still runs.
//!
//! Every agent must compute the same segments, leaders and addresses as `kg` does: where two disagree on a
//! leader, traffic is lost. So claims change neither segments nor leaders here. Node addresses are still
//! verified: where one is reserved, another node's or not the node's own, only its route is left out, and
//! agents need not agree on that.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;

use super::address::{is_public_to_kilo, nth, overlap};
use super::claims::{Accepted, Claims};
use super::excluded::Field;
use super::{
    ExternalPeer, Granularity, Leader, Member, Mode, Node, NodeName, Outsider, PeerAddresses,
    Resolved, Segment, SegmentName, Settings, Snapshot, Topology,
};
use crate::wireguard::key::PublicKey;

/// Seconds after its last check-in at which Kilo forgets a node.
const READY_WINDOW: i64 = 60;
/// Seconds by which another node's clock may be ahead. A later check-in does not count.
const MAX_AHEAD: i64 = 60;

/// The nodes on which a real `kg` is alive.
pub(super) fn foreign_nodes(snapshot: &Snapshot, now: i64) -> Vec<NodeName> {
    snapshot
        .nodes
        .values()
        .filter(|node| !node.ours && is_ready(node, now))
        .map(|node| node.name.clone())
        .collect()
}

/// A ready node has an endpoint, a key and pods, and checked in during the last minute, in whole seconds of
/// the reader's clock. A node whose clock is a little ahead stays ready longer. Kilo sets no limit to that.
fn is_ready(node: &Node, now: i64) -> bool {
    node.endpoint.is_some()
        && node.public_key.is_some()
        && !node.pod_cidrs.is_empty()
        && (-MAX_AHEAD..READY_WINDOW).contains(&now.saturating_sub(node.last_seen.unwrap_or(0)))
}

/// Computes the topology as `kg` does.
pub(super) fn topology(
    snapshot: &Snapshot,
    settings: &Settings,
    resolved: &Resolved,
    now: i64,
    foreign: Vec<NodeName>,
) -> Topology {
    // Kilo has no `cross`: where that is set here, real agents can only be in `location`.
    let granularity = match settings.granularity {
        Granularity::Full => Granularity::Full,
        Granularity::Location | Granularity::Cross => Granularity::Location,
    };
    let mut claims = Claims::new(snapshot, settings, resolved, |node, _| {
        segment_name(node, granularity)
    });
    let (ready, others) = snapshot
        .nodes
        .values()
        .partition::<Vec<_>, _>(|node| is_ready(node, now));
    let mut by_segment = BTreeMap::<SegmentName, Vec<&Node>>::new();
    for node in ready {
        let name = segment_name(node, granularity);
        by_segment.entry(name).or_default().push(node);
    }

    // Kilo has one pool, of IPv4.
    let pool = settings.subnets.iter().find(|pool| pool.addr().is_ipv4());
    let discovered = discovered_endpoints(by_segment.values().flatten().copied());
    let mut segments = by_segment
        .iter()
        .zip(1..)
        .filter_map(|((name, nodes), position)| {
            let leader = leader(nodes, resolved);
            let public_key = leader.public_key?;
            let endpoint = leader.endpoint.clone()?;
            let keepalive = leader.persistent_keepalive.unwrap_or(0);
            let leader = Leader {
                node: leader.name.clone(),
                keys: vec![public_key],
                address: endpoint.resolve(resolved),
                endpoint: Some(endpoint),
                discovered: discovered
                    .get(&public_key)
                    .copied()
                    .filter(|_| keepalive != 0),
                // Kilo tries its one endpoint alone.
                candidates: Vec::new(),
                behind_nat: keepalive != 0,
                persistent_keepalive: keepalive,
                keepalive_forced: true,
                wireguard_ips: pool
                    .and_then(|pool| nth(pool, position))
                    .into_iter()
                    .collect(),
                probe_ip: None,
            };
            Some(Segment {
                name: name.clone(),
                group: name.clone(),
                leaders: vec![leader],
                nodes: nodes
                    .iter()
                    .map(|node| member(node, &claims.nodes[&node.name]))
                    .collect(),
                allowed_location_ips: allowed_location_ips(nodes),
            })
        })
        .collect::<Vec<_>>();
    let peers = peers(snapshot);
    let peer_addresses = peers.iter().map(|peer| {
        let endpoint = peer.endpoint.as_ref();
        let discovered = discovered.get(&peer.public_key).copied();
        let peer_addresses = PeerAddresses {
            address: endpoint.and_then(|endpoint| endpoint.resolve(resolved)),
            discovered: discovered.filter(|_| peer.persistent_keepalive != 0),
            candidates: Vec::new(),
        };
        (peer.public_key, peer_addresses)
    });
    let peer_addresses = peer_addresses.collect();
    filter_allowed_location_ips(&mut segments, &peers);
    let mut excluded = std::mem::take(&mut claims.excluded);
    excluded.retain(|excluded| matches!(excluded.field, Field::NodeAddress(_)));
    excluded.sort();
    let mut overlaps = std::mem::take(&mut claims.overlaps);
    overlaps.sort();

    Topology {
        mode: Mode::Kilo(foreign),
        granularity,
        subnets: settings.subnets.clone(),
        segments,
        outsiders: others
            .into_iter()
            .map(|node| outsider(node, &claims.nodes[&node.name], granularity))
            .collect(),
        peers,
        peer_addresses,
        excluded,
        overlaps,
        ..Topology::default()
    }
}

/// A node without a private address is a segment on its own.
fn segment_name(node: &Node, granularity: Granularity) -> SegmentName {
    match (granularity, node.private_ip) {
        (Granularity::Location | Granularity::Cross, Some(_)) => {
            SegmentName::Location(node.region.clone())
        }
        (Granularity::Location | Granularity::Cross, None) | (Granularity::Full, _) => {
            SegmentName::Node(node.name.clone())
        }
    }
}

/// The leader of nodes sorted by name: an annotated one, else a public one, else the first.
fn leader<'a>(nodes: &[&'a Node], resolved: &Resolved) -> &'a Node {
    let is_public = |node: &&&Node| {
        let address = node.endpoint.as_ref().and_then(|e| e.resolve(resolved));
        address.is_some_and(|address| is_public_to_kilo(address.ip()))
    };
    let wanted = || nodes.iter().filter(|node| node.leader);
    wanted()
        .find(is_public)
        .or_else(|| wanted().next())
        .or_else(|| nodes.iter().find(is_public))
        .or_else(|| nodes.first())
        .expect("a segment has a node, or it would not have been made")
}

/// Kilo carries the first pod CIDR and the private address of a node.
fn member(node: &Node, accepted: &Accepted) -> Member {
    let private = node.private_ip.map(|ip| ip.addr());
    let judged = private.filter(|ip| accepted.addresses.contains(ip));
    Member {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        pod_cidrs: node.pod_cidrs.first().copied().into_iter().collect(),
        addresses: judged.into_iter().collect(),
        aliases: BTreeMap::new(),
        underlay: accepted.underlay.clone(),
        flannel_ips: accepted.flannel_ips.clone(),
        private_ip: node
            .private_ip
            .and(accepted.private_ip)
            .filter(|private| Some(private.addr()) == node.private_ip.map(|ip| ip.addr())),
    }
}

fn outsider(node: &Node, accepted: &Accepted, granularity: Granularity) -> Outsider {
    // A node that is not ready may not have published its private address yet.
    let group = match granularity {
        Granularity::Full => SegmentName::Node(node.name.clone()),
        Granularity::Location | Granularity::Cross => SegmentName::Location(node.region.clone()),
    };
    Outsider {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        group,
        pod_cidrs: node.pod_cidrs.clone(),
        underlay: accepted.underlay.clone(),
        flannel_ips: accepted.flannel_ips.clone(),
    }
}

/// The endpoints that the nodes published. Of two for one key the first by segment and name counts.
fn discovered_endpoints<'a>(
    nodes: impl Iterator<Item = &'a Node>,
) -> BTreeMap<PublicKey, SocketAddr> {
    let mut discovered = BTreeMap::new();
    for (key, address) in nodes.flat_map(|node| &node.discovered_endpoints) {
        discovered.entry(*key).or_insert(*address);
    }
    discovered
}

/// Kilo keeps one peer of each key, the last it received. Here it is the first by name, so that all agents
/// agree.
fn peers(snapshot: &Snapshot) -> Vec<ExternalPeer> {
    let mut keys = BTreeSet::new();
    let mut claimed = BTreeSet::new();
    snapshot
        .peers
        .values()
        .filter(|peer| !peer.allowed_ips.is_empty() && keys.insert(peer.public_key))
        .cloned()
        .map(|mut peer| {
            peer.allowed_ips.retain(|net| claimed.insert(*net));
            peer
        })
        .collect()
}

fn allowed_location_ips(nodes: &[&Node]) -> Vec<IpNet> {
    let nets = nodes.iter().flat_map(|node| &node.allowed_location_ips);
    let nets = nets.copied().collect::<BTreeSet<_>>();
    let mut nets = nets.into_iter().collect::<Vec<_>>();
    nets.sort_by_cached_key(ToString::to_string);
    nets
}

/// Of two overlapping claims the later segment's stays, as in Kilo.
fn filter_allowed_location_ips(segments: &mut [Segment], peers: &[ExternalPeer]) {
    for index in 0..segments.len() {
        let (earlier, others) = segments.split_at(index);
        let Some((current, later)) = others.split_first() else {
            return;
        };
        let stays = |net: &&IpNet| {
            let claimed_elsewhere = earlier
                .iter()
                .chain(later)
                .flat_map(|segment| &segment.allowed_location_ips)
                .any(|other| overlap(other, net));
            let inside_allowed = segments.iter().enumerate().any(|(at, segment)| {
                let nodes = segment.nodes.iter();
                nodes
                    .flat_map(|node| {
                        let addresses = node.addresses.iter().copied().map(IpNet::from);
                        node.pod_cidrs.iter().copied().chain(addresses)
                    })
                    // Kilo assigns WireGuard addresses during this loop: later segments have none yet.
                    .chain(
                        segment
                            .leaders
                            .iter()
                            .flat_map(Leader::wireguard_nets)
                            .filter(|_| at <= index),
                    )
                    .any(|allowed| allowed.contains(&net.network()))
            });
            let claimed_by_peer = peers
                .iter()
                .flat_map(|peer| &peer.allowed_ips)
                .any(|other| overlap(other, net));
            !claimed_elsewhere && !inside_allowed && !claimed_by_peer
        };
        let kept = current.allowed_location_ips.iter().filter(stays);
        let kept = kept.copied().collect();
        segments[index].allowed_location_ips = kept;
    }
}
