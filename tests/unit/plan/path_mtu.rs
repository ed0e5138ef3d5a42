//! The MTUs of links, routes and peers, where the paths between regions are measured.

use std::collections::BTreeMap;

use selvedge::liveness::{Cause, PathState};
use selvedge::state::Route;
use selvedge::topology::Mode;
use selvedge::wireguard::{PeerId, PeerMtu};

use super::*;

/// The main scenario with two leaders in region nd and paths that are measured, below links of 1,500 bytes.
fn measured() -> Mesh {
    let mut mesh = two_regions();
    mesh.agreed.leaders_per_region = leaders(2);
    mesh.local.path_mtu = Some(1440);
    mesh
}

fn id(node: &str) -> PeerId {
    PeerId::new(format!("node/{node}"))
}

/// The MTU of a node's route to a prefix.
fn route_mtu(mesh: &Mesh, me: &str, prefix: &str) -> Option<u32> {
    let state = mesh.state(me);
    let mut routes = state.routes.iter();
    let route = routes.find_map(|(key, route)| match route {
        Route::Unicast { mtu, .. } if key.dst == net(prefix) => Some(*mtu),
        Route::Unicast { .. } | Route::Throw | Route::Unreachable | Route::Blackhole => None,
    });
    assert!(route.is_some(), "{me} has no route to {prefix}");
    route.flatten()
}

fn peer_mtus(mesh: &Mesh, me: &str) -> BTreeMap<PeerId, PeerMtu> {
    let peers = mesh.state(me).peers.into_iter();
    peers.map(|(id, peer)| (id, peer.mtu)).collect()
}

#[test]
fn a_leaders_route_has_the_mtu_of_the_smallest_path_that_it_may_take_and_each_peer_its_own() {
    let mut mesh = measured();
    mesh.mtus = [(id("node-agent-01"), 1440), (id("node-agent-02"), 1340)].into();
    assert_eq!(route_mtu(&mesh, "node-master", "10.42.3.0/24"), Some(1340));
    let expected = [
        (id("node-agent-01"), PeerMtu::Path(1440)),
        (id("node-agent-02"), PeerMtu::Path(1340)),
    ];
    assert_eq!(peer_mtus(&mesh, "node-master"), expected.into());
    // A path that carries nothing does not count.
    let down = PathState::Down(Cause::Silent);
    mesh.verdicts.peers = [
        (id("node-agent-01"), PathState::Up),
        (id("node-agent-02"), down),
    ]
    .into();
    assert_eq!(route_mtu(&mesh, "node-master", "10.42.3.0/24"), Some(1440));
}

#[test]
fn a_path_has_the_configured_mtu_until_it_is_measured() {
    let mut mesh = measured();
    assert_eq!(route_mtu(&mesh, "node-master", "10.42.3.0/24"), Some(1420));
    mesh.mtus = [(id("node-agent-01"), 1440)].into();
    assert_eq!(route_mtu(&mesh, "node-master", "10.42.3.0/24"), Some(1420));
}

#[test]
fn a_members_routes_have_the_mtu_of_flannels_device() {
    let mesh = measured();
    assert_eq!(route_mtu(&mesh, "node-agent-03", "10.42.0.0/24"), None);
    // Its neighbours' WireGuard addresses are no way to another region.
    assert_eq!(route_mtu(&mesh, "node-agent-03", "10.4.0.2/32"), Some(1420));
}

#[test]
fn every_nodes_link_carries_what_the_largest_path_does() {
    let mut mesh = measured();
    mesh.mtus = [(id("node-agent-01"), 1220)].into();
    for node in ["node-master", "node-agent-01", "node-agent-03"] {
        assert_eq!(mesh.state(node).link.unwrap().mtu, 1440);
    }
}

#[test]
fn a_fixed_mtu_is_the_mtu_of_everything() {
    let mut mesh = measured();
    mesh.mtus = [(id("node-agent-01"), 1220)].into();
    mesh.local.path_mtu = None;
    for (node, prefix) in [
        ("node-master", "10.42.3.0/24"),
        ("node-agent-03", "10.42.0.0/24"),
    ] {
        assert_eq!(route_mtu(&mesh, node, prefix), Some(1420));
        assert_eq!(mesh.state(node).link.unwrap().mtu, 1420);
    }
    let mtus = peer_mtus(&mesh, "node-master");
    assert!(mtus.values().all(|mtu| *mtu == PeerMtu::Link), "{mtus:?}");
}

#[test]
fn external_peers_keep_the_configured_mtu_whatever_the_link_carries() {
    let mut mesh = measured();
    mesh.add_peers([vpn_peer("office", 100, &["10.6.0.0/24"])]);
    assert_eq!(route_mtu(&mesh, "node-master", "10.6.0.0/24"), Some(1420));
    let office = &peer_mtus(&mesh, "node-master")[&PeerId::new("peer/office")];
    assert_eq!(*office, PeerMtu::Configured(1420));
}

#[test]
fn beside_a_real_kilo_nothing_is_measured() {
    let mut mesh = two_regions();
    mesh.local.path_mtu = Some(8940);
    mesh.mtus = [(id("node-agent-01"), 1220)].into();
    mesh.now = 1_000;
    for node in mesh.snapshot.nodes.values_mut() {
        node.last_seen = Some(1_000);
    }
    let of_kilo = mesh
        .snapshot
        .nodes
        .get_mut(&NodeName("node-agent-01".into()));
    of_kilo.unwrap().ours = false;
    let topology = mesh.topology();
    assert!(matches!(topology.mode, Mode::Kilo(_)));
    assert_eq!(mesh.state("node-master").link.unwrap().mtu, 1420);
    let mtus = peer_mtus(&mesh, "node-master");
    assert!(mtus.values().all(|mtu| *mtu == PeerMtu::Link), "{mtus:?}");
}
