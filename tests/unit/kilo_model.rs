//! An independent model of Kilo's algorithm, slow and obvious, written from a description of `kg` and not from our
//! code.
//!
//! While a real `kg` is in the mesh, our agents must compute the same topology: where two disagree on a leader,
//! traffic is lost. The model works on text and bit masks, rule by rule, and counts how often the random clusters
//! exercise each rule.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use selvedge::topology::{
    Endpoint, ExternalPeer, Granularity, Mode, Node, NodeName, Segment, Topology,
};
use selvedge::wireguard::key::PresharedKey;

mod each_node;
mod reading;

use crate::cluster_strategy::{nodes, peers};
use crate::mesh::{Mesh, With, addr, ip, net, node};
use each_node::{annotations_are_kilos, entries_are_kilos};

/// The rules of the model, named by their outcome.
const RULES: [&str; 38] = [
    "a node without an endpoint is not ready",
    "a node without a key is not ready",
    "a node without pods is not ready",
    "a node that was not seen for a minute is not ready",
    "nodes of a location share a segment",
    "a node without a private address is a segment",
    "in a full mesh every node is a segment",
    "an annotated public node leads",
    "an annotated node leads where none is public too",
    "a public node leads where none is annotated",
    "the first by name leads where none is either",
    "carrier-grade NAT is public",
    "an endpoint whose name resolves may be public",
    "an endpoint whose name does not resolve is not public",
    "a leader with keepalives is where it was seen",
    "a leader with keepalives and no observer is at its own endpoint",
    "a leader without keepalives is where it says though it was seen elsewhere",
    "of two observers the first by segment and name counts",
    "what a node sees itself counts first",
    "every entry has the node's own keepalive",
    "a node without keepalives sends none to a peer that does",
    "a node listens on the port of its endpoint",
    "a node that does not lead has no entries",
    "a peer without allowed IPs is not ready",
    "of equal claims of peers the first by name counts",
    "a peer that lost all its claims stays",
    "a peer with keepalives is where it was seen",
    "a peer without keepalives is where it says though it was seen elsewhere",
    "a peer has its preshared key",
    "a location's address that another location claims is dropped, the later one's stays",
    "a location's address inside other allowed IPs is dropped",
    "a location's address that is a WireGuard address given by then is dropped",
    "a location's address that is a WireGuard address not yet given stays",
    "a location's address that overlaps a peer's is dropped",
    "a location's network that holds nodes stays",
    "a location's address stays",
    // Not Kilo's, which accepts any address.
    "an address that is the node's own is carried",
    "an address that is not the node's own, or is another's, is not carried",
];

/// How often each rule decided something.
#[derive(Default)]
struct Hits(RefCell<BTreeMap<&'static str, usize>>);

impl Hits {
    fn hit(&self, rule: &'static str) {
        assert!(RULES.contains(&rule), "{rule:?} is not listed");
        *self.0.borrow_mut().entry(rule).or_default() += 1;
    }

    fn when(&self, condition: bool, rule: &'static str) {
        if condition {
            self.hit(rule);
        }
    }
}

/// An IPv4 prefix: first address and mask.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Net(u32, u32);

impl Net {
    fn parse(text: &str) -> Self {
        let (address, length) = text.split_once('/').expect("a prefix");
        let address = u32::from(address.parse::<Ipv4Addr>().expect("IPv4"));
        let mask = match length.parse::<u32>().expect("a length") {
            0 => 0,
            length => u32::MAX << (32 - length),
        };
        Self(address & mask, mask)
    }

    fn contains(self, address: u32) -> bool {
        address & self.1 == self.0
    }

    fn intersects(self, other: Self) -> bool {
        self.contains(other.0) || other.contains(self.0)
    }
}

/// A segment of the model.
#[derive(Debug, PartialEq)]
struct ModelSegment {
    name: String,
    leader: String,
    nodes: Vec<String>,
    wireguard_ip: String,
    allowed_ips: Vec<String>,
    allowed_location_ips: Vec<String>,
    keepalive: u16,
    /// The endpoint for others that have not observed the leader themselves.
    endpoint: Option<SocketAddr>,
}

/// Kilo's `Node.Ready`: a node that was not seen for a minute is gone.
fn is_ready(node: &Node, now: i64, hits: &Hits) -> bool {
    let endpoint = node.endpoint.is_some();
    let key = node.public_key.is_some();
    let pods = !node.pod_cidrs.is_empty();
    let fresh = now - node.last_seen.unwrap_or(0) < 60;
    hits.when(!endpoint && key && pods && fresh, RULES[0]);
    hits.when(endpoint && !key && pods && fresh, RULES[1]);
    hits.when(endpoint && key && !pods && fresh, RULES[2]);
    hits.when(endpoint && key && pods && !fresh, RULES[3]);
    endpoint && key && pods && fresh
}

/// Kilo's `isPublic`.
fn is_public(address: IpAddr) -> bool {
    let IpAddr::V4(address) = address else {
        panic!("the clusters of this test are IPv4")
    };
    let private = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"];
    !private
        .iter()
        .any(|net| Net::parse(net).contains(u32::from(address)))
}

fn resolve(endpoint: &Endpoint, names: &BTreeMap<String, IpAddr>) -> Option<SocketAddr> {
    match endpoint {
        Endpoint::Addr(address) => Some(*address),
        Endpoint::Dns { host, port } => {
            let address = names.get(host)?;
            Some(SocketAddr::new(*address, *port))
        }
    }
}

/// Kilo's `NewTopology` with its parts.
fn model(mesh: &Mesh, hits: &Hits) -> Vec<ModelSegment> {
    let names = &mesh.resolved;
    // The addresses are judged by our rules, the rest follows Kilo's.
    let judged = mesh.topology();
    let ready = mesh.snapshot.nodes.values();
    let ready = ready.filter(|node| is_ready(node, mesh.now, hits));

    // Segments by name; nodes in them by name.
    let mut segments = BTreeMap::<String, Vec<&Node>>::new();
    for node in ready {
        let own = format!("node:{}", node.name.0);
        let name = if mesh.agreed.granularity == Granularity::Full {
            hits.hit("in a full mesh every node is a segment");
            own
        } else if node.private_ip.is_none() {
            hits.hit("a node without a private address is a segment");
            own
        } else {
            format!("location:{}", node.region.0)
        };
        segments.entry(name).or_default().push(node);
    }
    for nodes in segments.values_mut() {
        nodes.sort_by(|a, b| a.name.0.as_bytes().cmp(b.name.0.as_bytes()));
    }

    for nodes in segments.values() {
        hits.when(nodes.len() > 1, "nodes of a location share a segment");
    }

    // Observed endpoints, the first observer by segment and node.
    let mut discovered = BTreeMap::new();
    for nodes in segments.values() {
        for node in nodes {
            for (key, address) in &node.discovered_endpoints {
                match discovered.get(key) {
                    None => drop(discovered.insert(*key, *address)),
                    Some(first) => hits.when(
                        first != address,
                        "of two observers the first by segment and name counts",
                    ),
                }
            }
        }
    }

    let mut result = Vec::new();
    let mut location_ips = Vec::new();
    for (position, (name, nodes)) in segments.iter().enumerate() {
        // The leader.
        let public = |node: &Node| {
            let annotated = node.endpoint.as_ref().expect("ready");
            let is_name = matches!(annotated, Endpoint::Dns { .. });
            let endpoint = resolve(annotated, names);
            let public = endpoint.is_some_and(|endpoint| is_public(endpoint.ip()));
            let cgnat = |at: SocketAddr| at.ip() == ip("100.64.0.9");
            hits.when(endpoint.is_some_and(cgnat), "carrier-grade NAT is public");
            hits.when(
                is_name && public,
                "an endpoint whose name resolves may be public",
            );
            hits.when(
                endpoint.is_none(),
                "an endpoint whose name does not resolve is not public",
            );
            public
        };
        let several = nodes.len() > 1;
        let mut index = 0;
        if let Some(found) = nodes.iter().position(|node| node.leader && public(node)) {
            hits.when(several && found > 0, "an annotated public node leads");
            index = found;
        } else if let Some(found) = nodes.iter().position(|node| node.leader) {
            hits.when(
                several && found > 0,
                "an annotated node leads where none is public too",
            );
            index = found;
        } else if let Some(found) = nodes.iter().position(|node| public(node)) {
            hits.when(
                several && found > 0,
                "a public node leads where none is annotated",
            );
            index = found;
        } else {
            hits.when(several, "the first by name leads where none is either");
        }
        let leader = nodes[index];

        // WireGuard addresses: network address + k, k from 1.
        let first = u32::from(Ipv4Addr::new(10, 4, 0, 0));
        let wireguard_ip = Ipv4Addr::from(first + u32::try_from(position).expect("few") + 1);

        // Allowed IPs.
        let mut allowed_ips = Vec::new();
        for node in nodes {
            allowed_ips.push(node.pod_cidrs[0].to_string());
            if let Some(private) = node.private_ip {
                let own = judged
                    .member(&node.name)
                    .is_some_and(|member| member.addresses.contains(&private.addr()));
                hits.when(own, "an address that is the node's own is carried");
                hits.when(
                    !own,
                    "an address that is not the node's own, or is another's, is not carried",
                );
                if own {
                    allowed_ips.push(format!("{}/32", private.addr()));
                }
            }
        }
        allowed_ips.push(format!("{wireguard_ip}/32"));

        // The union of the location IPs, sorted as text among the allowed IPs.
        let mut offered = Vec::new();
        for node in nodes {
            for net in &node.allowed_location_ips {
                offered.push(net.to_string());
            }
        }
        offered.sort();
        offered.dedup();
        location_ips.push(offered);

        let keepalive = leader.persistent_keepalive.unwrap_or(0);
        let key = leader.public_key.expect("ready");
        let annotated = resolve(leader.endpoint.as_ref().expect("ready"), names);
        let endpoint = match (discovered.get(&key), keepalive != 0) {
            (Some(seen), true) => {
                hits.hit("a leader with keepalives is where it was seen");
                Some(*seen)
            }
            (None, true) => {
                hits.hit("a leader with keepalives and no observer is at its own endpoint");
                annotated
            }
            (Some(_), false) => {
                hits.hit(
                    "a leader without keepalives is where it says though it was seen elsewhere",
                );
                annotated
            }
            (None, false) => annotated,
        };
        result.push(ModelSegment {
            name: name.clone(),
            leader: leader.name.0.clone(),
            nodes: nodes.iter().map(|node| node.name.0.clone()).collect(),
            wireguard_ip: wireguard_ip.to_string(),
            allowed_ips,
            allowed_location_ips: Vec::new(),
            keepalive,
            endpoint,
        });
    }

    // Overlapping location IPs: in the order of segments, each against the present state of the others.
    let unheard = Hits::default();
    let peer_nets = model_peers(mesh, &unheard)
        .into_iter()
        .flat_map(|(_, nets)| nets);
    let peer_nets = peer_nets.map(|net| Net::parse(&net)).collect::<Vec<_>>();
    for index in 0..result.len() {
        let mut kept = Vec::new();
        for item in &location_ips[index] {
            let net = Net::parse(item);
            let mut dropped = false;
            for (other, items) in location_ips.iter().enumerate() {
                if other != index && items.iter().any(|item| Net::parse(item).intersects(net)) {
                    hits.when(
                        other > index,
                        "a location's address that another location claims is dropped, the later one's stays",
                    );
                    dropped = true;
                }
            }
            for (other, segment) in result.iter().enumerate() {
                for allowed in &segment.allowed_ips {
                    // Later segments have no WireGuard address yet.
                    let not_yet =
                        other > index && *allowed == format!("{}/32", segment.wireguard_ip);
                    if Net::parse(allowed).contains(net.0) {
                        let wireguard = *allowed == format!("{}/32", segment.wireguard_ip);
                        hits.hit(match (wireguard, not_yet) {
                            (_, true) => "a location's address that is a WireGuard address not yet given stays",
                            (true, false) => "a location's address that is a WireGuard address given by then is dropped",
                            (false, false) => "a location's address inside other allowed IPs is dropped",
                        });
                        dropped |= !not_yet;
                    }
                }
            }
            if peer_nets.iter().any(|peer| peer.intersects(net)) {
                hits.hit("a location's address that overlaps a peer's is dropped");
                dropped = true;
            }
            if !dropped {
                let mut nodes = result.iter().flat_map(|segment| &segment.allowed_ips);
                let wide = nodes.any(|allowed| net.contains(Net::parse(allowed).0));
                hits.when(wide, "a location's network that holds nodes stays");
                hits.when(!wide, "a location's address stays");
                kept.push(item.clone());
            }
        }
        location_ips[index].clone_from(&kept);
        result[index].allowed_location_ips = kept;
    }
    result
}

/// By name; an equal CIDR belongs to the first.
fn model_peers(mesh: &Mesh, hits: &Hits) -> Vec<(String, Vec<String>)> {
    let mut peers = Vec::new();
    let mut keys = Vec::new();
    let mut claimed = Vec::new();
    for peer in mesh.snapshot.peers.values() {
        if peer.allowed_ips.is_empty() {
            hits.hit("a peer without allowed IPs is not ready");
            continue;
        }
        // Of two with one key Kilo keeps the last it received; all of our agents keep the first by name.
        if keys.contains(&peer.public_key) {
            continue;
        }
        keys.push(peer.public_key);
        let mut nets = Vec::new();
        for net in &peer.allowed_ips {
            let net = net.to_string();
            if claimed.contains(&net) {
                hits.hit("of equal claims of peers the first by name counts");
            } else {
                claimed.push(net.clone());
                nets.push(net);
            }
        }
        hits.when(nets.is_empty(), "a peer that lost all its claims stays");
        peers.push((peer.name.clone(), nets));
    }
    peers
}

/// The peers' endpoints: of one with keepalives, the endpoint of the first observer by segment and node;
/// of any other, the endpoint in its object.
fn model_peer_addresses(
    mesh: &Mesh,
    segments: &[ModelSegment],
    hits: &Hits,
) -> BTreeMap<String, Option<SocketAddr>> {
    let mut places = BTreeMap::new();
    for (name, _) in model_peers(mesh, &Hits::default()) {
        let peer = &mesh.snapshot.peers[&name];
        let mut place = peer
            .endpoint
            .as_ref()
            .and_then(|endpoint| resolve(endpoint, &mesh.resolved));
        let mut seen = None;
        for node in segments.iter().flat_map(|segment| &segment.nodes) {
            let node = &mesh.snapshot.nodes[&NodeName(node.clone())];
            if seen.is_none() {
                seen = node.discovered_endpoints.get(&peer.public_key).copied();
            }
        }
        if peer.persistent_keepalive != 0 && seen.is_some() {
            hits.hit("a peer with keepalives is where it was seen");
            place = seen;
        } else if seen.is_some() {
            hits.hit("a peer without keepalives is where it says though it was seen elsewhere");
        }
        places.insert(name, place);
    }
    places
}

/// Our segment in the model's terms.
fn as_model(segment: &Segment) -> ModelSegment {
    let [leader] = &segment.leaders[..] else {
        panic!("Kilo has one leader of a segment: {segment:?}");
    };
    let seen = leader.discovered.filter(|_| leader.behind_nat);
    ModelSegment {
        name: segment.name.to_string(),
        leader: leader.node.0.clone(),
        nodes: segment
            .nodes
            .iter()
            .map(|node| node.name.0.clone())
            .collect(),
        wireguard_ip: leader.wireguard_ips[0].to_string(),
        allowed_ips: segment
            .node_allowed_ips()
            .map(|net| net.to_string())
            .collect(),
        allowed_location_ips: segment
            .allowed_location_ips
            .iter()
            .map(ToString::to_string)
            .collect(),
        keepalive: leader.persistent_keepalive,
        endpoint: seen.or(leader.address),
    }
}

/// A cluster in which one node certainly runs a real `kg`.
fn mixed() -> impl Strategy<Value = Mesh> {
    let ours = proptest::collection::vec(any::<bool>(), 10);
    let heard = proptest::collection::btree_map(0..14u8, 1..4u16, 0..4);
    // Most checked in within the minute, so that there are segments of several nodes.
    let ages = proptest::collection::vec(0..70_i64, 10);
    let more = (any::<bool>(), ours, heard, 0..8u8, ages);
    (nodes(), peers(), more).prop_map(|(nodes, peers, (full, ours, heard, bare, ages))| {
        let mut mesh = Mesh::new(nodes);
        let peers = peers.into_iter().enumerate().map(|(index, mut peer)| {
            peer.preshared_key = (index % 2 == 0).then_some(PresharedKey([7; 32]));
            peer
        });
        mesh.add_peers(peers);
        let heard = heard.into_iter().map(|(seed, port)| {
            let at = SocketAddr::new(ip("198.51.100.9"), 50_000 + port);
            (crate::mesh::key(seed), at)
        });
        mesh.observed = heard.collect();
        if full {
            mesh.agreed.granularity = Granularity::Full;
        }
        mesh.now = 1_000_000;
        mesh.resolved = [("a.example".to_owned(), ip("203.0.113.4"))].into();
        for ((node, ours), age) in mesh.snapshot.nodes.values_mut().zip(ours).zip(ages) {
            node.ours = ours;
            node.last_seen = Some(1_000_000 - age);
            node.pod_cidrs.truncate(1);
        }
        if let Some(node) = mesh
            .snapshot
            .nodes
            .get_mut(&NodeName(format!("node-{bare}")))
        {
            node.pod_cidrs.clear();
        }
        let kilo = node("kilo", "r1", 12, "192.168.9.9/24").with(|node| {
            node.ours = false;
            node.last_seen = Some(999_990);
        });
        mesh.snapshot.nodes.insert(kilo.name.clone(), kilo);
        mesh
    })
}

#[test]
fn beside_a_real_kilo_the_topology_is_kilos() {
    let hits = Hits::default();
    let mut runner = TestRunner::new(config());
    let result = runner.run(&mixed(), |mesh| {
        let topology = mesh.topology();
        prop_assert!(matches!(topology.mode, Mode::Kilo(_)));
        let expected = model(&mesh, &hits);
        let ours = topology.segments.iter().map(as_model).collect::<Vec<_>>();
        prop_assert_eq!(&ours, &expected);
        let peers = topology.peers.iter().map(|peer: &ExternalPeer| {
            let nets = peer.allowed_ips.iter().map(ToString::to_string);
            (peer.name.clone(), nets.collect::<Vec<_>>())
        });
        prop_assert_eq!(peers.collect::<Vec<_>>(), model_peers(&mesh, &hits));
        let places = topology.peers.iter().map(|peer| {
            let place = &topology.peer_addresses[&peer.public_key];
            (peer.name.clone(), place.discovered.or(place.address))
        });
        let places = places.collect::<BTreeMap<_, _>>();
        prop_assert_eq!(places, model_peer_addresses(&mesh, &expected, &hits));
        for me in mesh.names() {
            entries_are_kilos(&mesh, &topology, &expected, me, &hits)?;
            annotations_are_kilos(&mesh, &topology, &expected, me)?;
        }
        Ok(())
    });
    result.unwrap();
    let hits = hits.0.into_inner();
    let untouched = RULES.iter().filter(|rule| !hits.contains_key(**rule));
    assert_eq!(untouched.collect::<Vec<_>>(), Vec::<&&str>::new());
}

fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        // PROPTEST_CASES asks for more.
        cases: ProptestConfig::default().cases.max(1000),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    /// The address that an agent publishes for its node is judged beside Kilo too.
    #[test]
    fn beside_a_real_kilo_each_node_address_is_judged(mesh in mixed()) {
        let topology = mesh.topology();
        let mut owners = BTreeMap::new();
        for member in topology.segments.iter().flat_map(|segment| &segment.nodes) {
            let node = &mesh.snapshot.nodes[&member.name];
            for ip in &member.addresses {
                prop_assert!(node.internal_ips.contains(ip), "{} has no {}", member.name, ip);
                prop_assert_eq!(owners.insert(*ip, &member.name), None);
            }
        }
        // An address that no other node or peer claims is never refused.
        let kilo = NodeName("kilo".into());
        let owner = owners.get(&ip("192.168.9.9"));
        let keys = mesh.snapshot.nodes.values().filter_map(|node| node.public_key);
        let peers = mesh.snapshot.peers.values().map(|peer| peer.public_key);
        let same = keys.chain(peers).filter(|key| *key == crate::mesh::key(12)).count();
        prop_assert!(same > 1 || owner == Some(&&kilo), "{:?}", owner);
    }

    /// Kilo's claims may collide; a tunnel device still has one owner for each prefix.
    #[test]
    fn beside_a_real_kilo_no_allowed_ip_has_two_owners(mesh in mixed()) {
        let topology = mesh.topology();
        for me in mesh.names() {
            let Some(state) = mesh.plan(&topology, me) else { continue };
            let nets = state.peers.values().flat_map(|peer| &peer.routes);
            let nets = nets.collect::<Vec<_>>();
            let distinct = nets.iter().collect::<std::collections::BTreeSet<_>>();
            prop_assert_eq!(nets.len(), distinct.len());
        }
    }
}

/// `a` runs a real `kg`, `b` runs ours.
fn two_nodes() -> Mesh {
    Mesh::new([
        node("a", "a", 1, "192.168.1.1/24").with(|node| node.ours = false),
        node("b", "b", 2, "192.168.2.1/24"),
    ])
    .with(|mesh| {
        mesh.now = 1_000;
        for node in mesh.snapshot.nodes.values_mut() {
            node.last_seen = Some(1_000);
        }
    })
}

#[test]
fn kilos_algorithm_decides_until_the_last_real_kilo_has_been_silent_for_a_minute() {
    let mut mesh = two_nodes();
    let kilo = Mode::Kilo(vec![NodeName("a".into())]);
    for (now, expected) in [(1_000, kilo.clone()), (1_059, kilo), (1_060, Mode::Native)] {
        mesh.now = now;
        assert_eq!(mesh.topology().mode, expected, "at {now}");
    }
}

#[test]
fn changing_over_moves_no_address_and_interrupts_no_tunnel() {
    let mut mesh = two_nodes();
    let before = mesh.topology();
    // The agents have published the addresses that Kilo assigned.
    for (_, leader) in before.leaders() {
        let ip = leader.wireguard_ips[0];
        mesh.node(&leader.node.0).wireguard_ips = vec![net(&format!("{ip}/16"))];
    }
    let old = mesh.state("b");
    mesh.node("a").ours = true;

    assert_eq!(mesh.topology().mode, Mode::Native);
    let changes = selvedge::diff::diff(&old, &mesh.state("b"));
    // A node behind NAT keeps its mapping open with its own keepalives; nothing else changes.
    let changes = changes.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        changes,
        [
            "wg set kilo0 peer AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE= endpoint 192.168.1.1:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.1.0/24,192.168.1.1/32"
        ]
    );
}

#[test]
fn followers_empty_their_wireguard_ip_beside_kilo_and_keep_it_otherwise() {
    let mut mesh = two_nodes();
    let follower = node("b2", "b", 3, "192.168.2.2/24").with(|node| node.last_seen = Some(1_000));
    mesh.snapshot.nodes.insert(follower.name.clone(), follower);

    let annotation = |mesh: &Mesh, name: &str| {
        let topology = Topology::new(&mesh.snapshot, &mesh.agreed, &mesh.resolved, mesh.now);
        topology.wireguard_annotation(&NodeName(name.into()))
    };
    assert_eq!(annotation(&mesh, "b"), Some(vec![net("10.4.0.2/16")]));
    assert_eq!(annotation(&mesh, "b2"), Some(vec![]));

    mesh.node("a").ours = true;
    assert_eq!(annotation(&mesh, "b"), Some(vec![net("10.4.0.2/16")]));
    assert_eq!(annotation(&mesh, "b2"), None);
}

#[test]
fn a_node_that_kilo_ignores_makes_no_changes() {
    let mut mesh = two_nodes();
    mesh.node("b").last_seen = Some(0);
    let me = NodeName("b".into());
    assert_eq!(mesh.plan(&mesh.topology(), &me), None);
}

#[test]
fn an_unresolved_name_is_not_a_public_endpoint_for_kilo() {
    let mut mesh = two_nodes();
    let other = node("b2", "b", 3, "192.168.2.2/24").with(|node| {
        node.last_seen = Some(1_000);
        node.endpoint = addr("203.0.113.9:51820");
    });
    mesh.snapshot.nodes.insert(other.name.clone(), other);
    mesh.node("b").endpoint = Some(Endpoint::Dns {
        host: "b.example".into(),
        port: 51820,
    });
    let leader = |mesh: &Mesh| mesh.topology().segments[1].primary().node.0.clone();
    assert_eq!(leader(&mesh), "b2");

    mesh.resolved = [("b.example".to_owned(), ip("203.0.113.2"))].into();
    assert_eq!(leader(&mesh), "b");
}
