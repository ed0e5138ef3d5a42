//! The candidates that a leader tries for each of its peers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::topology::{Candidate, NodeName, Origin, Topology};
use crate::wireguard::PeerId;

/// The candidates of each peer, the likeliest first.
pub type Candidates = BTreeMap<PeerId, Vec<Candidate>>;

/// The candidates of every peer that this node can use; none where it does not lead.
///
/// An address of this node's own region is no candidate for a leader of another one: two regions may use the
/// same subnet. Two regions that others observe at one address are behind one router, which may not route a
/// packet back inside, so they use each other's private addresses.
pub fn candidates(topology: &Topology, me: &NodeName) -> Candidates {
    let Some(own) = topology.segment_of(me) else {
        return Candidates::new();
    };
    let Some(leader) = own.leader(me) else {
        return Candidates::new();
    };
    let neighbours = topology.segments.iter();
    let neighbours = neighbours.filter(|segment| segment.group == own.group);
    let own_region: BTreeSet<_> = neighbours
        .flat_map(|segment| &segment.nodes)
        .flat_map(|node| &node.underlay)
        .collect();
    let own_router: BTreeSet<_> = observed_addresses(&leader.candidates)
        .map(|at| at.ip())
        .collect();
    let mut candidates: Candidates = topology
        .leaders()
        .filter(|(segment, _)| segment.group != own.group)
        .map(|(_, leader)| {
            let candidates = leader.candidates.iter().copied();
            let useful = candidates.filter(|candidate| {
                let ip = candidate.address.ip();
                let is_behind_own_router = is_outside(candidate) && own_router.contains(&ip);
                !(own_region.contains(&ip) || is_behind_own_router)
            });
            (leader.peer_id(), useful.collect())
        })
        .collect();
    for peer in &topology.peers {
        let peer_addresses = topology.peer_addresses.get(&peer.public_key);
        let useful = peer_addresses
            .into_iter()
            .flat_map(|peer_addresses| peer_addresses.candidates.iter().copied())
            .filter(|candidate| {
                candidate.origin == Origin::Forced || !own_region.contains(&candidate.address.ip())
            });
        candidates
            .entry(peer.peer_id())
            .or_insert_with(|| useful.collect());
    }
    candidates
}

/// The addresses among a leader's candidates at which other leaders observed it.
pub fn observed_addresses(candidates: &[Candidate]) -> impl Iterator<Item = SocketAddr> + '_ {
    candidates
        .iter()
        .filter(|candidate| candidate.origin == Origin::Discovered)
        .map(|candidate| candidate.address)
}

/// Whether a candidate is an address of a router, found by other leaders.
fn is_outside(candidate: &Candidate) -> bool {
    matches!(candidate.origin, Origin::Discovered | Origin::PortKept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Leader, Member, RegionName, Segment, SegmentName};
    use crate::wireguard::key::PublicKey;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// A region of one leader, at 192.168.`key`.11 and its candidates.
    fn segment(name: &str, key: u8, candidates: &[(&str, Origin)]) -> Segment {
        let group = SegmentName::Location(RegionName(name.into()));
        let candidate = |(address, origin): &(&str, Origin)| Candidate {
            address: at(address),
            origin: *origin,
        };
        Segment {
            name: group.clone(),
            group,
            leaders: vec![Leader {
                node: NodeName(name.into()),
                keys: vec![PublicKey([key; 32])],
                endpoint: None,
                address: None,
                discovered: None,
                candidates: candidates.iter().map(candidate).collect(),
                behind_nat: true,
                persistent_keepalive: 25,
                keepalive_forced: false,
                wireguard_ips: vec![],
                probe_ip: None,
            }],
            nodes: vec![Member {
                name: NodeName(name.into()),
                endpoint: None,
                pod_cidrs: vec![],
                addresses: vec![],
                aliases: [].into(),
                underlay: [[192, 168, key, 11].into()].into(),
                flannel_ips: [].into(),
                private_ip: None,
            }],
            allowed_location_ips: vec![],
        }
    }

    fn addresses(candidates: &Candidates, leader: &str) -> Vec<SocketAddr> {
        let of_leader = candidates[&PeerId::new(format!("node/{leader}"))].iter();
        of_leader.map(|candidate| candidate.address).collect()
    }

    #[test]
    fn regions_behind_one_router_use_each_others_private_addresses() {
        let topology = Topology {
            segments: vec![
                segment("home", 2, &[("203.0.113.2:1", Origin::Discovered)]),
                segment(
                    "beside",
                    4,
                    &[
                        ("203.0.113.2:4", Origin::Discovered),
                        ("203.0.113.2:51820", Origin::PortKept),
                        ("192.168.4.11:51820", Origin::Announced),
                    ],
                ),
                segment("office", 3, &[("203.0.113.3:3", Origin::Discovered)]),
            ],
            ..Topology::default()
        };
        let candidates = candidates(&topology, &NodeName("home".into()));
        assert_eq!(addresses(&candidates, "beside"), [at("192.168.4.11:51820")]);
        assert_eq!(addresses(&candidates, "office"), [at("203.0.113.3:3")]);
        assert_eq!(candidates.len(), 2, "its own segment is not among them");
    }

    #[test]
    fn an_address_of_the_own_region_is_no_candidate_for_a_leader_of_another() {
        let topology = Topology {
            segments: vec![
                segment("home", 2, &[]),
                segment(
                    "same-subnet",
                    3,
                    &[
                        ("192.168.2.11:51820", Origin::Endpoint),
                        ("203.0.113.3:3", Origin::Discovered),
                    ],
                ),
            ],
            ..Topology::default()
        };
        let candidates = candidates(&topology, &NodeName("home".into()));
        assert_eq!(addresses(&candidates, "same-subnet"), [at("203.0.113.3:3")]);
    }

    #[test]
    fn a_node_that_does_not_lead_tries_no_candidates() {
        let topology = Topology {
            segments: vec![segment("home", 2, &[])],
            ..Topology::default()
        };
        assert!(candidates(&topology, &NodeName("follower".into())).is_empty());
    }
}
