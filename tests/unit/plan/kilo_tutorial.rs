//! Kilo's tutorial: logical groups, a full mesh, and both mixed.

use super::*;

pub(crate) fn nodes() -> [Node; 4] {
    [
        node("a1", "gcp", 1, "10.138.0.1/20"),
        node("a2", "gcp", 2, "10.138.0.2/20"),
        node("b1", "aws", 3, "172.31.0.1/20"),
        node("b2", "aws", 4, "172.31.0.2/20"),
    ]
    .map(|node| {
        let seed = node.pod_cidrs[0].to_string();
        let seed = seed.split('.').nth(2).unwrap();
        let endpoint = addr(&format!("203.0.113.{seed}:51820"));
        node.with(|node| node.endpoint = endpoint)
    })
}

fn segments(mesh: &Mesh) -> String {
    let segments = mesh.topology().segments.into_iter();
    let lines = segments.map(|s| {
        let nets = s
            .allowed_ips()
            .map(|net| net.to_string())
            .collect::<Vec<_>>();
        format!(
            "{} led by {}: {}\n",
            s.name,
            s.primary().node,
            nets.join(", ")
        )
    });
    lines.collect()
}

#[test]
fn full_mesh() {
    let mut mesh = Mesh::new(nodes());
    mesh.agreed.granularity = Granularity::Full;
    insta::assert_snapshot!(segments(&mesh), @"
    node:a1 led by a1: 10.42.1.0/24, 10.138.0.1/32, 10.4.0.1/32
    node:a2 led by a2: 10.42.2.0/24, 10.138.0.2/32, 10.4.0.2/32
    node:b1 led by b1: 10.42.3.0/24, 172.31.0.1/32, 10.4.0.3/32
    node:b2 led by b2: 10.42.4.0/24, 172.31.0.2/32, 10.4.0.4/32
    ");
    insta::assert_snapshot!(routes(&mesh, "a1"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.4.0.4 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.4 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.138.0.2 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.31.0.1 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.31.0.2 via 10.4.0.4 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ");
    assert_eq!(
        firewall(&mesh, "a1").region_underlay,
        [ip("10.138.0.1")].into()
    );
}

#[test]
fn mixed_by_location_annotations() {
    // The tutorial annotates every AWS node with a location of its own.
    let [a1, a2, mut b1, mut b2] = nodes();
    b1.region.0 = "b1".into();
    b2.region.0 = "b2".into();
    let mesh = Mesh::new([a1, a2, b1, b2]);
    insta::assert_snapshot!(segments(&mesh), @"
    location:b1 led by b1: 10.42.3.0/24, 172.31.0.1/32, 10.4.0.1/32
    location:b2 led by b2: 10.42.4.0/24, 172.31.0.2/32, 10.4.0.2/32
    location:gcp led by a1: 10.42.1.0/24, 10.138.0.1/32, 10.42.2.0/24, 10.138.0.2/32, 10.4.0.3/32
    ");
    insta::assert_snapshot!(routes(&mesh, "a2"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.3 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 172.31.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 172.31.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ");
    insta::assert_snapshot!(routes(&mesh, "b2"), @"
    ip route replace table 5130 throw 10.42.4.0/24
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.138.0.1 via 10.4.0.3 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.138.0.2 via 10.4.0.3 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 172.31.0.1 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ");
}

#[test]
fn cross_links_every_node_to_every_node_elsewhere() {
    let mut mesh = Mesh::new(nodes());
    mesh.agreed.granularity = Granularity::Cross;
    insta::assert_snapshot!(segments(&mesh), @"
    node:a1 led by a1: 10.42.1.0/24, 10.138.0.1/32, 10.4.0.1/32
    node:a2 led by a2: 10.42.2.0/24, 10.138.0.2/32, 10.4.0.2/32
    node:b1 led by b1: 10.42.3.0/24, 172.31.0.1/32, 10.4.0.3/32
    node:b2 led by b2: 10.42.4.0/24, 172.31.0.2/32, 10.4.0.4/32
    ");
    insta::assert_snapshot!(routes(&mesh, "a1"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 10.4.0.2 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.4.0.4 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.4 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.31.0.1 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.31.0.2 via 10.4.0.4 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ");
    let state = mesh.state("a1");
    assert_eq!(
        state
            .peers
            .values()
            .map(|peer| peer.public_key)
            .collect::<Vec<_>>(),
        [key(3), key(4)]
    );
    assert_eq!(
        firewall(&mesh, "a1").region_underlay,
        [ip("10.138.0.1"), ip("10.138.0.2")].into()
    );
}

#[test]
fn each_node_without_a_private_address_is_a_segment_of_its_own() {
    let [mut a1, mut a2, b1, b2] = nodes();
    (a1.private_ip, a2.private_ip) = (None, None);
    (a1.internal_ips, a2.internal_ips) = (vec![ip("203.0.113.1")], vec![ip("203.0.113.2")]);
    let mut mesh = Mesh::new([a1, a2, b1, b2]);
    mesh.agreed.internal_cidrs = vec![net("203.0.113.0/24")];
    insta::assert_snapshot!(segments(&mesh), @"
    location:aws led by b1: 10.42.3.0/24, 172.31.0.1/32, 10.42.4.0/24, 172.31.0.2/32, 10.4.0.1/32
    node:a1 led by a1: 10.42.1.0/24, 203.0.113.1/32, 10.4.0.2/32
    node:a2 led by a2: 10.42.2.0/24, 203.0.113.2/32, 10.4.0.3/32
    ");
    insta::assert_snapshot!(routes(&mesh, "a1"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.31.0.1 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.31.0.2 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5131 203.0.113.2 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ");
}
