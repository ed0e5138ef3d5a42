//! A region that a leader reaches through a relay: peers, routes and the firewall of the three ends.

use std::net::{IpAddr, SocketAddr};

use selvedge::liveness::{Cause, PathState};
use selvedge::policy::Relaying;
use selvedge::probe::Verdicts;
use selvedge::state::{RelayDoor, Route};
use selvedge::topology::{RegionName, SegmentName};
use selvedge::wireguard::{PeerConfig, PeerId};

use super::*;

const DOWN: PathState = PathState::Down(Cause::Silent);

/// Regions a, b, c and d of one node each; b has two leaders.
fn mesh() -> Mesh {
    let mut mesh = Mesh::new([
        node("a1", "a", 1, "192.168.1.11/24"),
        node("b1", "b", 2, "192.168.2.11/24"),
        node("b2", "b", 3, "192.168.2.12/24"),
        node("c1", "c", 4, "192.168.3.11/24"),
        node("d1", "d", 5, "192.168.4.11/24"),
    ]);
    mesh.agreed.leaders_per_region = leaders(2);
    mesh
}

fn id(name: &str) -> PeerId {
    PeerId::new(format!("node/{name}"))
}

fn region(name: &str) -> SegmentName {
    SegmentName::Location(RegionName(name.into()))
}

/// The WireGuard address of a leader.
fn at(mesh: &Mesh, name: &str) -> IpAddr {
    let topology = mesh.topology();
    topology
        .leader(&NodeName(name.into()))
        .unwrap()
        .wireguard_ips[0]
}

/// a1 reaches c1 and d1, and c1 relays to region b.
fn relayed(mesh: &mut Mesh) {
    mesh.verdicts = Verdicts {
        peers: [
            (id("b1"), DOWN),
            (id("b2"), DOWN),
            (id("c1"), PathState::Up),
            (id("d1"), PathState::Up),
        ]
        .into(),
        relays: [(region("b"), id("c1"))].into(),
        ..Verdicts::default()
    };
}

/// The tunnel receives from a leader through a relay.
fn observe(mesh: &mut Mesh, name: &str) {
    let endpoint = SocketAddr::new(at(mesh, name), 51820);
    let key = mesh.snapshot.nodes[&NodeName(name.into())].public_key;
    mesh.observed.insert(key.unwrap(), endpoint);
}

fn peer(mesh: &Mesh, me: &str, name: &str) -> PeerConfig {
    mesh.state(me).peers[&id(name)].clone()
}

/// The MTU of a route of a1.
fn mtu(mesh: &Mesh, dst: &str) -> Option<u32> {
    let state = mesh.state("a1");
    let route = state
        .routes
        .iter()
        .find(|(key, _)| key.dst == net(dst) && key.metric == 0);
    match route {
        Some((_, Route::Unicast { mtu, .. })) => *mtu,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_relay_gets_the_addresses_of_the_regions_leaders_and_its_peers_may_come_through_all_that_are_reached()
 {
    let mut mesh = mesh();
    relayed(&mut mesh);
    let b: BTreeSet<_> = ["b1", "b2"].map(|name| at(&mesh, name)).into();
    let relay = peer(&mesh, "a1", "c1");
    assert_eq!((relay.relays_to, &relay.relayed_from), (b.clone(), &b));
    let other = peer(&mesh, "a1", "d1");
    assert_eq!((other.relays_to, &other.relayed_from), ([].into(), &b));
    for name in ["b1", "b2"] {
        let far = peer(&mesh, "a1", name);
        assert!(far.relays_to.is_empty() && far.relayed_from.is_empty());
        assert!(far.endpoint.is_some(), "a direct candidate");
    }
}

#[test]
fn routes_to_a_relayed_region_carry_sixty_bytes_less() {
    let mut mesh = mesh();
    assert_eq!(mtu(&mesh, "10.42.2.0/24"), Some(1420));
    relayed(&mut mesh);
    assert_eq!(mtu(&mesh, "10.42.2.0/24"), Some(1360));
    assert_eq!(mtu(&mesh, "10.42.4.0/24"), Some(1420));
    // The relay is not chosen any more, and datagrams still go through it.
    mesh.verdicts.relays.clear();
    observe(&mut mesh, "b1");
    observe(&mut mesh, "b2");
    assert_eq!(mtu(&mesh, "10.42.2.0/24"), Some(1360));
}

#[test]
fn ipv6_addresses_take_eighty_bytes() {
    let mut mesh = mesh();
    mesh.agreed.subnets = vec![net("fd04::/64")];
    for node in mesh.snapshot.nodes.values_mut() {
        let seed = node.pod_cidrs[0].to_string();
        let seed = seed.split('.').nth(2).unwrap();
        node.pod_cidrs.push(net(&format!("fd42:0:0:{seed}::/64")));
    }
    relayed(&mut mesh);
    assert!(at(&mesh, "b1").is_ipv6());
    assert_eq!(mtu(&mesh, "10.42.2.0/24"), Some(1340));
}

#[test]
fn a_relayed_endpoint_is_the_devices_alone() {
    let mut mesh = mesh();
    relayed(&mut mesh);
    observe(&mut mesh, "b1");
    assert_eq!(peer(&mesh, "a1", "b1").endpoint, None);
}

#[test]
fn a_leader_that_is_reached_directly_is_preferred_to_one_behind_a_relay() {
    let mut mesh = mesh();
    relayed(&mut mesh);
    observe(&mut mesh, "b1");
    for name in ["b1", "b2"] {
        mesh.verdicts.peers.insert(id(name), PathState::Up);
    }
    let shared = net("192.168.2.11/32");
    assert!(!peer(&mesh, "a1", "b1").routes.contains(&shared));
    assert!(peer(&mesh, "a1", "b2").routes.contains(&shared));
    mesh.verdicts.peers.insert(id("b2"), DOWN);
    assert!(peer(&mesh, "a1", "b1").routes.contains(&shared), "control");
}

#[test]
fn a_relays_firewall_passes_datagrams_to_leaders_that_it_reaches_directly() {
    let mut mesh = mesh();
    let all: BTreeSet<_> = ["a1", "b1", "b2", "d1"].map(|name| at(&mesh, name)).into();
    let door = |mesh: &Mesh| firewall(mesh, "c1").relay;
    assert_eq!(
        door(&mesh),
        RelayDoor {
            from: all.clone(),
            to: all.clone()
        }
    );
    observe(&mut mesh, "b1");
    assert!(!door(&mesh).to.contains(&at(&mesh, "b1")));
    assert_eq!(door(&mesh).from, all);
}

#[test]
fn the_operator_forbids_a_node_or_a_region_to_relay() {
    let forbid: [fn(&mut Mesh); 3] = [
        |mesh| mesh.node("c1").relay_forbidden = true,
        |mesh| mesh.local.relaying = Relaying::Off,
        |mesh| mesh.local.relaying = Relaying::Regions(vec!["d".into()]),
    ];
    for forbid in forbid {
        let mut mesh = mesh();
        relayed(&mut mesh);
        forbid(&mut mesh);
        assert_eq!(firewall(&mesh, "c1").relay, RelayDoor::default());
        assert!(peer(&mesh, "a1", "c1").relayed_from.is_empty());
    }
}
