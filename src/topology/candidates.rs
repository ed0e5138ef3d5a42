//! The candidates of each leader and each VPN peer: the addresses at which the cluster's objects say that it may
//! be reached.
//!
//! A leader sends a handshake to each candidate and uses one that answers, so a wrong candidate costs a few
//! datagrams and nothing else. Which candidate answers is not part of the topology.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::claims::Claims;
use super::{Candidate, Claim, Endpoint, Node, NodeName, Origin, Snapshot};
use crate::wireguard::key::PublicKey;

/// The most addresses at which leaders observe one peer: one for each mapping of its NAT.
const MAX_DISCOVERED: usize = 8;

/// The addresses that all nodes announce for themselves, and those at which leaders observe others.
pub(super) struct Announcements<'a> {
    /// The nodes that announce an address and port.
    announced: BTreeMap<SocketAddr, Vec<Announcement<'a>>>,
    /// The nodes that have an address as their own.
    holders: BTreeMap<IpAddr, Vec<Announcement<'a>>>,
    /// The addresses at which leaders observe each key, in the order of the leaders.
    discovered: BTreeMap<PublicKey, Vec<SocketAddr>>,
}

/// One node's announcement of an address. Of several for one address the least counts: the operator's, then
/// that of the node whose claim was recorded first, then the oldest object's.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Announcement<'a> {
    rank: Rank,
    recorded: (bool, i64),
    created: i64,
    node: &'a NodeName,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Rank {
    Forced,
    /// The endpoint, or the node's own address.
    Own,
    /// One of the further candidates. An address that several nodes list belongs to none of them.
    Listed,
}

impl<'a> Announcements<'a> {
    /// Collects the announcements and, in the order of `leaders`, their observations.
    pub(super) fn new<'b>(
        snapshot: &'a Snapshot,
        claims: &Claims<'a>,
        leaders: impl IntoIterator<Item = &'b Node>,
    ) -> Self {
        let mut announcements = Self {
            announced: BTreeMap::new(),
            holders: BTreeMap::new(),
            discovered: BTreeMap::new(),
        };
        for node in snapshot.nodes.values() {
            let by = |rank, recorded| Announcement {
                rank,
                recorded,
                created: node.created,
                node: &node.name,
            };
            for (address, rank) in announced(node) {
                let all = announcements.announced.entry(address).or_default();
                // An endpoint has no record of its own, and a key may be replaced.
                all.push(by(rank, node.ledger.seniority()));
            }
            let accepted = &claims.nodes[&node.name];
            let private = accepted.private_ip.map(|private| private.addr());
            for ip in accepted.addresses.iter().copied().chain(private) {
                let all = announcements.holders.entry(ip).or_default();
                all.push(by(Rank::Own, node.ledger.rank(&Claim::Address(ip))));
            }
        }
        let seen = leaders
            .into_iter()
            .flat_map(|leader| &leader.discovered_endpoints);
        for (key, address) in seen.filter(|(_, address)| claims.may_be_endpoint(address.ip())) {
            let places = announcements.discovered.entry(*key).or_default();
            if !places.contains(address) && places.len() < MAX_DISCOVERED {
                places.push(*address);
            }
        }
        announcements
    }

    /// The candidates of a leader, the likeliest first. `address` is its endpoint, resolved and judged.
    ///
    /// Observed addresses come before announced ones, because a packet has passed there.
    pub(super) fn of_leader(
        &self,
        leader: &Node,
        keys: &[PublicKey],
        address: Option<SocketAddr>,
        claims: &Claims<'_>,
    ) -> Vec<Candidate> {
        let own = self.own(leader, address, claims);
        let announced: BTreeSet<_> = own.iter().map(|candidate| candidate.address).collect();
        let seen: Vec<_> = self
            .seen(keys)
            .filter(|seen| !announced.contains(seen))
            .collect();
        let port = address.or_else(|| leader.candidates.first().copied());
        let port_kept = port.into_iter().flat_map(|own| {
            let moved = seen.iter().filter(move |seen| seen.port() != own.port());
            moved.map(move |seen| SocketAddr::new(seen.ip(), own.port()))
        });
        let discovered = seen
            .iter()
            .map(|address| (*address, Origin::Discovered))
            .chain(port_kept.map(|address| (address, Origin::PortKept)))
            .map(|(address, origin)| Candidate { address, origin });
        if leader.endpoint_forced {
            distinct(own.iter().copied().chain(discovered))
        } else {
            distinct(discovered.chain(own.iter().copied()))
        }
    }

    /// The candidates of a VPN peer: the address in its object, then those at which leaders observed it.
    pub(super) fn of_peer(&self, key: &PublicKey, address: Option<SocketAddr>) -> Vec<Candidate> {
        let own = address.map(|address| (address, Origin::Forced));
        let seen = self.seen(std::slice::from_ref(key));
        let seen = seen.map(|address| (address, Origin::Discovered));
        let all = own.into_iter().chain(seen);
        distinct(all.map(|(address, origin)| Candidate { address, origin }))
    }

    /// The observed addresses of a peer with these keys, in the order of the keys.
    fn seen(&self, keys: &[PublicKey]) -> impl Iterator<Item = SocketAddr> + use<> {
        let places = keys.iter().filter_map(|key| self.discovered.get(key));
        let mut seen = Vec::new();
        for place in places.flatten() {
            if !seen.contains(place) {
                seen.push(*place);
            }
        }
        seen.into_iter()
    }

    fn own(
        &self,
        leader: &Node,
        address: Option<SocketAddr>,
        claims: &Claims<'_>,
    ) -> Vec<Candidate> {
        let origin = if leader.endpoint_forced {
            Origin::Forced
        } else {
            Origin::Endpoint
        };
        // An address that a name resolves to is announced by no node, so no other node can claim it.
        let is_own = |address: &SocketAddr| {
            claims.may_be_endpoint(address.ip()) && self.is_of(&leader.name, address)
        };
        let named = matches!(leader.endpoint, Some(Endpoint::Dns { .. }));
        let endpoint = address.filter(|address| named || is_own(address));
        let others = leader
            .candidates
            .iter()
            .filter(|_| !leader.endpoint_forced)
            .filter(|address| is_own(address))
            .map(|address| (*address, Origin::Announced));
        let all = endpoint.map(|address| (address, origin));
        let all = all.into_iter().chain(others);
        distinct(all.map(|(address, origin)| Candidate { address, origin }))
    }

    /// Whether a node may announce an address. A younger node takes nothing from an older one by announcing
    /// the older one's endpoint or address.
    fn is_of(&self, node: &NodeName, address: &SocketAddr) -> bool {
        let announced = self.announced.get(address).into_iter().flatten();
        let holders = self.holders.get(&address.ip()).into_iter().flatten();
        let mut claims: Vec<_> = announced.chain(holders).copied().collect();
        claims.sort();
        match claims[..] {
            // The address of a name is not announced.
            [] => true,
            [first, _, ..] if first.rank == Rank::Listed => false,
            [first, ..] => first.node == node,
        }
    }
}

/// The addresses that a node announces. Where its operator forced one, it is the only one.
fn announced(node: &Node) -> impl Iterator<Item = (SocketAddr, Rank)> + '_ {
    let rank = if node.endpoint_forced {
        Rank::Forced
    } else {
        Rank::Own
    };
    let endpoint = match &node.endpoint {
        Some(Endpoint::Addr(address)) => Some((*address, rank)),
        Some(Endpoint::Dns { .. }) | None => None,
    };
    let others = node.candidates.iter().filter(|_| !node.endpoint_forced);
    endpoint
        .into_iter()
        .chain(others.map(|address| (*address, Rank::Listed)))
}

/// The first candidate of each address.
fn distinct(candidates: impl Iterator<Item = Candidate>) -> Vec<Candidate> {
    let mut taken = BTreeSet::new();
    candidates
        .filter(|candidate| taken.insert(candidate.address))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::topology::{Candidate, NodeName, Origin, Resolved, Settings, Snapshot, Topology};

    /// Ready nodes that hold what their agents published, by name.
    fn snapshot(nodes: &[(&str, serde_json::Value)]) -> Snapshot {
        let node = |(number, (name, annotations)): (usize, &(&str, serde_json::Value))| {
            let mut annotations = annotations.clone();
            annotations["selvedge.dev/agent"] = json!("1.0.0");
            annotations["kilo.squat.ai/key"] = json!(key(name).to_string());
            annotations["kilo.squat.ai/location"] = json!(name.get(..1));
            let address = format!("192.168.{number}.11");
            annotations["kilo.squat.ai/internal-ip"] = json!(format!("{address}/24"));
            let object = json!({
                "metadata": {"name": name, "annotations": annotations},
                "spec": {"podCIDRs": [format!("10.42.{number}.0/24")]},
                "status": {
                    "addresses": [{"type": "InternalIP", "address": address}],
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            });
            let object = serde_json::from_value(object).unwrap();
            let settings = crate::cluster::ParseSettings::default();
            let node = crate::cluster::node::parse(&object, &settings).0.unwrap();
            (node.name.clone(), node)
        };
        Snapshot {
            nodes: nodes.iter().enumerate().map(node).collect(),
            ..Snapshot::default()
        }
    }

    fn key(name: &str) -> crate::wireguard::key::PublicKey {
        let mut key = [7; 32];
        key[..name.len()].copy_from_slice(name.as_bytes());
        crate::wireguard::key::PublicKey(key)
    }

    fn saw(name: &str, at: &str) -> String {
        let seen = [(key(name), at.parse().unwrap())].into();
        crate::cluster::annotation::format_discovered(&seen)
    }

    /// The candidates of each leader, in words.
    fn of(snapshot: &Snapshot, leader: &str) -> Vec<String> {
        let settings = Settings {
            cluster_networks: vec!["10.42.0.0/16".parse().unwrap()],
            ..Settings::default()
        };
        let topology = Topology::new(snapshot, &settings, &Resolved::new(), 0);
        let leader = topology.leader(&NodeName(leader.into())).unwrap();
        let word = |candidate: &Candidate| {
            let origin = match candidate.origin {
                Origin::Forced => "forced",
                Origin::Endpoint => "endpoint",
                Origin::Announced => "announced",
                Origin::Discovered => "discovered",
                Origin::PortKept => "port kept",
            };
            format!("{} {origin}", candidate.address)
        };
        leader.candidates.iter().map(word).collect()
    }

    #[test]
    fn observed_addresses_of_a_leader_come_before_announced_ones() {
        let nodes = [
            (
                "a1",
                json!({
                    "kilo.squat.ai/endpoint": "[2001:db8:50::11]:51820",
                    "selvedge.dev/candidates": "[2001:db8:50::11]:51820,192.168.0.11:51820",
                }),
            ),
            (
                "b1",
                json!({"kilo.squat.ai/discovered-endpoints": saw("a1", "203.0.113.20:1024")}),
            ),
        ];
        let expected = [
            "203.0.113.20:1024 discovered",
            "203.0.113.20:51820 port kept",
            "[2001:db8:50::11]:51820 endpoint",
            "192.168.0.11:51820 announced",
        ];
        assert_eq!(of(&snapshot(&nodes), "a1"), expected);
    }

    #[test]
    fn a_forced_endpoint_is_the_first_candidate_and_the_only_announced_one() {
        let nodes = [
            (
                "a1",
                json!({
                    "kilo.squat.ai/force-endpoint": "203.0.113.7:51820",
                    "selvedge.dev/candidates": "192.168.0.11:51820",
                }),
            ),
            (
                "b1",
                json!({"kilo.squat.ai/discovered-endpoints": saw("a1", "203.0.113.20:51820")}),
            ),
        ];
        let expected = ["203.0.113.7:51820 forced", "203.0.113.20:51820 discovered"];
        assert_eq!(of(&snapshot(&nodes), "a1"), expected);
    }

    #[test]
    fn a_candidate_that_several_nodes_announce_belongs_to_none_of_them() {
        let shared = "203.0.113.20:51820,172.17.0.1:51820";
        let nodes = [
            (
                "a1",
                json!({"selvedge.dev/candidates": format!("{shared},192.168.0.11:51820")}),
            ),
            ("a2", json!({"selvedge.dev/candidates": shared})),
            ("b1", json!({"selvedge.dev/candidates": "172.17.0.1:51820"})),
        ];
        let snapshot = snapshot(&nodes);
        assert_eq!(of(&snapshot, "a1"), ["192.168.0.11:51820 announced"]);
        assert_eq!(of(&snapshot, "b1"), Vec::<String>::new());
    }

    #[test]
    fn a_younger_node_that_announces_an_older_ones_endpoint_takes_nothing_from_it() {
        let nodes = [
            ("a1", json!({"kilo.squat.ai/endpoint": "203.0.113.7:51820"})),
            (
                "b1",
                json!({
                    "kilo.squat.ai/endpoint": "203.0.113.7:51820",
                    "selvedge.dev/candidates": "203.0.113.7:51820",
                }),
            ),
        ];
        let mut snapshot = snapshot(&nodes);
        let expected = ["203.0.113.7:51820 endpoint"];
        assert_eq!(of(&snapshot, "a1"), expected);
        assert_eq!(of(&snapshot, "b1"), Vec::<String>::new());
        let older = snapshot.nodes.values_mut().last().unwrap();
        older.created = -1;
        assert_eq!(of(&snapshot, "b1"), expected);
    }

    #[test]
    fn a_node_that_announces_an_address_of_another_node_takes_nothing_from_it() {
        let nodes = [
            (
                "a1",
                json!({"selvedge.dev/candidates": "192.168.0.11:51820"}),
            ),
            (
                "b1",
                json!({"selvedge.dev/candidates": "192.168.0.11:51820,198.51.100.9:51820"}),
            ),
            (
                "c1",
                json!({"kilo.squat.ai/force-endpoint": "198.51.100.9:51820"}),
            ),
            (
                "d1",
                json!({"kilo.squat.ai/discovered-endpoints": saw("b1", "192.168.0.11:51820")}),
            ),
        ];
        let snapshot = snapshot(&nodes);
        assert_eq!(of(&snapshot, "a1"), ["192.168.0.11:51820 announced"]);
        // An address at which another leader observed its key is still tried.
        assert_eq!(of(&snapshot, "b1"), ["192.168.0.11:51820 discovered"]);
        assert_eq!(of(&snapshot, "c1"), ["198.51.100.9:51820 forced"]);
    }

    #[test]
    fn addresses_inside_the_cluster_networks_are_not_candidates() {
        let nodes = [
            ("a1", json!({"selvedge.dev/candidates": "10.42.0.1:51820"})),
            (
                "b1",
                json!({"kilo.squat.ai/discovered-endpoints": saw("a1", "10.42.1.1:51820")}),
            ),
        ];
        assert_eq!(of(&snapshot(&nodes), "a1"), Vec::<String>::new());
    }
}
