//! Kilo's algorithm, to the letter (`pkg/mesh/topology.go`), for a mesh in which a real `kg` still runs.
//!
//! Every agent must come to the same segments, leaders and addresses as `kg` does; two that disagree
//! on a leader are a black hole. So claims change neither segments nor leaders here. Node addresses are
//! judged all the same: one that is not the node's own, is reserved or is another node's costs that one
//! route and nothing of what the agents must agree on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;

use super::address::{is_public_to_kilo, nth, overlap};
use super::claims::{Belief, Claims};
use super::excluded::Field;
use super::{
    ExternalPeer, Granularity, Leader, Member, Mode, Node, NodeName, Outsider, Resolved, Segment,
    SegmentName, Settings, Snapshot, Topology, Whereabouts,
};
use crate::wireguard::key::PublicKey;

/// Seconds after its last check-in at which Kilo forgets a node.
const READY_WINDOW: i64 = 60;
/// Seconds by which another node's clock may be ahead. A check-in from a later time counts as none.
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

/// A node has an endpoint, a key and pods, and was seen in the last minute: integer seconds of the
/// reader's clock. A clock that is a little ahead stays longer; Kilo lets it be ahead by any time.
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
    // Kilo knows no other: where ours would be `cross`, real agents can only be in `location`.
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

    // Kilo knows one pool, of IPv4.
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
    let whereabouts = peers.iter().map(|peer| {
        let endpoint = peer.endpoint.as_ref();
        let discovered = discovered.get(&peer.public_key).copied();
        let whereabouts = Whereabouts {
            address: endpoint.and_then(|endpoint| endpoint.resolve(resolved)),
            discovered: discovered.filter(|_| peer.persistent_keepalive != 0),
            candidates: Vec::new(),
        };
        (peer.public_key, whereabouts)
    });
    let whereabouts = whereabouts.collect();
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
        whereabouts,
        excluded,
        overlaps,
        ..Topology::default()
    }
}

/// Nodes without a private address stand alone.
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

/// The annotated one, a public one, the first; the nodes are sorted by name.
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
fn member(node: &Node, belief: &Belief) -> Member {
    let private = node.private_ip.map(|ip| ip.addr());
    let judged = private.filter(|ip| belief.addresses.contains(ip));
    Member {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        pod_cidrs: node.pod_cidrs.first().copied().into_iter().collect(),
        addresses: judged.into_iter().collect(),
        underlay: belief.underlay.clone(),
        flannel_ips: belief.flannel_ips.clone(),
        private_ip: node
            .private_ip
            .and(belief.private_ip)
            .filter(|private| Some(private.addr()) == node.private_ip.map(|ip| ip.addr())),
    }
}

fn outsider(node: &Node, belief: &Belief, granularity: Granularity) -> Outsider {
    // A node that is not ready may not have told its private address yet.
    let group = match granularity {
        Granularity::Full => SegmentName::Node(node.name.clone()),
        Granularity::Location | Granularity::Cross => SegmentName::Location(node.region.clone()),
    };
    Outsider {
        name: node.name.clone(),
        endpoint: node.endpoint.clone(),
        group,
        pod_cidrs: node.pod_cidrs.clone(),
        underlay: belief.underlay.clone(),
        flannel_ips: belief.flannel_ips.clone(),
    }
}

/// What the nodes published, the first by segment and name.
fn discovered_endpoints<'a>(
    nodes: impl Iterator<Item = &'a Node>,
) -> BTreeMap<PublicKey, SocketAddr> {
    let mut discovered = BTreeMap::new();
    for (key, address) in nodes.flat_map(|node| &node.discovered_endpoints) {
        discovered.entry(*key).or_insert(*address);
    }
    discovered
}

/// Kilo knows one peer of each key, the last it heard of; the first by name is as
/// good, and everybody agrees on it.
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
                    // WireGuard addresses are given on the way: later segments have none yet.
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
