//! Six nodes in five clouds, worked out by hand from what Kilo does there beside flannel.
//!
//! Our routes have the same destinations and next hops as Kilo's. They differ in this:
//!
//! - They are in tables of their own, with a protocol number of their own, and not in main, where
//!   flannel would take them back.
//! - Their source is the node's address inside the cluster network and not its private address, and
//!   they carry the tunnel's MTU.
//! - Behind each stands an `unreachable` one, and in front of the own pods a `throw`.
//! - On leaders the WireGuard addresses of the others have routes of their own; Kilo has the network
//!   of the pool on the link for that, in main.
//! - A leader's way to its members' hosts is selected by one rule for the link and not by one for
//!   each address.

use super::*;

/// Name, location, private address, number of its pod CIDR, public address.
const NODES: [(&str, &str, &str, u8, &str); 6] = [
    ("ty1.k3s", "ctyun", "192.168.1.226/24", 0, "203.0.113.1"),
    (
        "hw1.k3s",
        "huaweicloud",
        "192.168.7.226/24",
        1,
        "203.0.113.2",
    ),
    ("tx1.k3s", "tencentcloud", "172.17.0.3/20", 2, "203.0.113.3"),
    ("ali1.k3s", "aliyun", "172.21.143.136/20", 3, "203.0.113.4"),
    ("bd1.k3s", "baidu", "192.168.64.4/20", 4, "203.0.113.5"),
    ("bd2.k3s", "baidu", "192.168.64.5/20", 5, "203.0.113.6"),
];

/// Kilo's routes by node, for the compatibility with flannel and without local routes: what is in
/// one line goes the same way.
const KILO: [(&str, &[(&str, &str)]); 6] = [
    (
        "ty1.k3s",
        &[
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "hw1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "tx1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "ali1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            (
                "10.42.4.0/24 10.42.5.0/24 192.168.64.4 192.168.64.5",
                "via 10.4.0.2 dev kilo0",
            ),
        ],
    ),
    (
        "bd1.k3s",
        &[
            ("10.42.0.0/24 192.168.1.226", "via 10.4.0.3 dev kilo0"),
            ("10.42.1.0/24 192.168.7.226", "via 10.4.0.4 dev kilo0"),
            ("10.42.2.0/24 172.17.0.3", "via 10.4.0.5 dev kilo0"),
            ("10.42.3.0/24 172.21.143.136", "via 10.4.0.1 dev kilo0"),
            // Kilo's table 1107.
            ("192.168.64.5", "via 10.42.5.0 dev flannel.1"),
        ],
    ),
    (
        "bd2.k3s",
        &[(
            "10.4.0.1 10.4.0.2 10.4.0.3 10.4.0.4 10.4.0.5 \
             10.42.0.0/24 10.42.1.0/24 10.42.2.0/24 10.42.3.0/24 \
             172.17.0.3 172.21.143.136 192.168.1.226 192.168.7.226",
            "via 10.42.4.0 dev flannel.1",
        )],
    ),
];

/// Kilo's peers of any leader: those of the other segments.
const PEERS: [(&str, &str); 5] = [
    ("ali1.k3s", "10.42.3.0/24, 172.21.143.136/32, 10.4.0.1/32"),
    (
        "bd1.k3s",
        "10.42.4.0/24, 192.168.64.4/32, 10.42.5.0/24, 192.168.64.5/32, 10.4.0.2/32",
    ),
    ("ty1.k3s", "10.42.0.0/24, 192.168.1.226/32, 10.4.0.3/32"),
    ("hw1.k3s", "10.42.1.0/24, 192.168.7.226/32, 10.4.0.4/32"),
    ("tx1.k3s", "10.42.2.0/24, 172.17.0.3/32, 10.4.0.5/32"),
];

fn six_clouds() -> Mesh {
    Mesh::new(NODES.map(|(name, location, address, pods, public)| {
        node(name, location, pods, address).with(|node| {
            node.public_key = Some(key(100 + pods));
            node.endpoint = addr(&format!("{public}:51820"));
            node.persistent_keepalive = Some(20);
        })
    }))
}

/// The same six nodes, one of them still running a real `kg`.
fn with_a_real_kilo() -> Mesh {
    six_clouds().with(|mesh| {
        mesh.snapshot.now = 1_000;
        for node in mesh.snapshot.nodes.values_mut() {
            node.last_seen = Some(990);
        }
        mesh.node("tx1.k3s").ours = false;
    })
}

#[test]
fn routes_are_kilos() {
    for mesh in [six_clouds(), with_a_real_kilo()] {
        for (me, expected) in KILO {
            let expected = expected.iter().flat_map(|(destinations, way)| {
                let destinations = destinations.split_whitespace();
                destinations.map(move |destination| format!("{destination} {way}"))
            });
            let routes = routes(&mesh, me);
            let ours = routes.lines().filter(|line| !line.contains("throw"));
            let ours = ours.map(|line| {
                let words = line.split_whitespace().skip(5);
                let words = words.take_while(|word| !["src", "onlink", "proto"].contains(word));
                words.collect::<Vec<_>>().join(" ")
            });
            // The others' WireGuard addresses, where Kilo has the pool's network.
            let ours = ours.filter(|way| !way.starts_with("10.4.0.") || !way.contains("kilo0"));
            assert_eq!(
                ours.collect::<BTreeSet<_>>(),
                expected.collect::<BTreeSet<_>>(),
                "{me}"
            );
        }
    }
}

#[test]
fn peers_are_kilos() {
    for mesh in [six_clouds(), with_a_real_kilo()] {
        let topology = mesh.topology();
        let ours = topology.segments.iter().map(|segment| {
            let nets = segment.allowed_ips().map(|net| net.to_string());
            (
                segment.leader.0.as_str(),
                nets.collect::<Vec<_>>().join(", "),
            )
        });
        let expected = PEERS.map(|(leader, nets)| (leader, nets.to_owned()));
        assert_eq!(ours.collect::<Vec<_>>(), expected);

        let state = mesh.state("ty1.k3s");
        assert_eq!(state.peers.len(), 4);
        let baidu = &state.peers[&key(104)];
        assert_eq!(baidu.endpoint, "203.0.113.5:51820".parse().ok());
        assert_eq!(baidu.persistent_keepalive.map(u16::from), Some(20));
        assert_eq!(
            baidu.allowed_ips.iter().copied().collect::<BTreeSet<_>>(),
            PEERS[1].1.split(", ").map(net).collect()
        );
    }
}

#[test]
fn in_a_full_mesh_every_node_is_numbered_by_name() {
    for mesh in [six_clouds(), with_a_real_kilo()] {
        let mesh = mesh.with(|mesh| mesh.agreed.granularity = Granularity::Full);
        let names = mesh.topology().segments.into_iter();
        let names = names.map(|s| format!("{}={}", s.name, s.wireguard_ips[0]));
        let expected = [
            "node:ali1.k3s=10.4.0.1",
            "node:bd1.k3s=10.4.0.2",
            "node:bd2.k3s=10.4.0.3",
            "node:hw1.k3s=10.4.0.4",
            "node:tx1.k3s=10.4.0.5",
            "node:ty1.k3s=10.4.0.6",
        ];
        assert_eq!(names.collect::<Vec<_>>(), expected);
    }
}
