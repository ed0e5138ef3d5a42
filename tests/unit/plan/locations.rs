//! `allowed-location-ips`.

use super::*;

/// `a` has its storage network and an address as location IPs; `b` is a remote region.
fn mesh() -> Mesh {
    Mesh::new([
        node("a1", "a", 1, "192.168.1.1/24").with(|n| {
            n.allowed_location_ips = vec![net("10.6.0.1/32"), net("192.168.0.0/16")];
        }),
        node("b1", "b", 2, "192.168.2.1/24"),
        node("b2", "b", 3, "192.168.2.2/24"),
    ])
}

#[test]
fn location_ips_are_carried_and_local_traffic_is_not_captured() {
    let mut mesh = mesh();
    mesh.api_servers = [ip("192.168.9.9")].into();
    insta::assert_snapshot!(routes(&mesh, "b1"), @"
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 throw 192.168.1.1
    ip route replace table 5130 throw 192.168.2.0/24
    ip route replace table 5130 throw 192.168.2.1
    ip route replace table 5130 throw 192.168.2.2
    ip route replace table 5130 throw 192.168.9.9
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.6.0.1 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 192.168.0.0/16 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5131 192.168.1.1 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5131 192.168.9.9 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5132 192.168.2.2 via 10.42.3.0 dev flannel.1 onlink
    ");
    insta::assert_snapshot!(routes(&mesh, "b2"), @"
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 throw 192.168.2.0/24
    ip route replace table 5130 throw 192.168.2.1
    ip route replace table 5130 throw 192.168.2.2
    ip route replace table 5130 throw 192.168.9.9
    ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.6.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 192.168.0.0/16 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 192.168.1.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5131 192.168.9.9 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ");
}

#[test]
fn traffic_to_location_ips_is_masqueraded_by_the_nodes_of_the_region() {
    let mut mesh = mesh();
    mesh.snapshot
        .nodes
        .extend([node("a2", "a", 4, "192.168.1.2/24")].map(|node| (node.name.clone(), node)));
    // For every node of the region with the network behind it: its hosts need not know the leader.
    for me in ["a1", "a2"] {
        let firewall = firewall(&mesh, me);
        assert_eq!(
            firewall.masquerade_destinations,
            [net("10.6.0.1/32"), net("192.168.0.0/16")].into()
        );
        assert!(firewall.known.contains(&net("192.168.2.1/32")));
    }
    for me in ["b1", "b2"] {
        assert!(firewall(&mesh, me).masquerade_destinations.is_empty());
    }
}

#[test]
fn of_two_overlapping_claims_the_older_one_wins() {
    let mut mesh = mesh();
    mesh.node("b2").allowed_location_ips = vec![net("10.6.0.0/24"), net("10.7.0.0/24")];

    let topology = mesh.topology();
    assert_eq!(
        topology.segments[1].allowed_location_ips,
        [net("10.7.0.0/24")]
    );
    insta::assert_snapshot!(topology.excluded[0], @"node b2: left out allowed location IPs 10.6.0.0/24: claimed by node a1 before");
}
