//! Kilo's tutorial in full: two groups of two nodes, mixed by location annotations and as a full mesh, with a VPN
//! client. Worked out by hand from Kilo's rules; both algorithms give the same. `kilo_tutorial` covers `cross`,
//! which Kilo does not have.

use selvedge::graph;
use selvedge::showconf::{Shape, showconf};
use selvedge::topology::Object;
use selvedge::wireguard::key::PresharedKey;

use super::golden::{Difference, annotations, wireguard, with_a_real_kilo};
use super::kilo_tutorial::nodes;
use super::*;

/// Segments by name: location:b1 .1, location:b2 .2, location:gcp .3, led by a1.
fn mixed() -> Mesh {
    let [a1, a2, mut b1, mut b2] = nodes();
    b1.region.0 = "b1".into();
    b2.region.0 = "b2".into();
    let mut mesh = Mesh::new([a1, a2, b1, b2]);
    mesh.add_peers([laptop()]);
    mesh
}

/// Segments by name: node:a1 .1, node:a2 .2, node:b1 .3, node:b2 .4.
fn full() -> Mesh {
    let mut mesh = Mesh::new(nodes());
    mesh.agreed.granularity = Granularity::Full;
    mesh
}

fn laptop() -> selvedge::topology::ExternalPeer {
    vpn_peer("laptop", 9, &["10.5.0.1/32"])
        .with(|peer| peer.preshared_key = Some(PresharedKey([7; 32])))
}

fn names() -> BTreeMap<String, &'static str> {
    let names = [(1, "a1"), (2, "a2"), (3, "b1"), (4, "b2"), (9, "laptop")];
    names
        .map(|(seed, name)| (key(seed).to_string(), name))
        .into()
}

const MIXED: [golden::Node<'_>; 4] = [
    golden::Node {
        name: "a1",
        cluster_address: "10.42.1.0",
        others: &["10.4.0.1", "10.4.0.2"],
        region_pods: &["10.42.2.0/24"],
        kilo: "
            10.4.0.0/16 dev kilo0 proto kernel scope link src 10.4.0.3
            10.42.3.0/24 via 10.4.0.1 dev kilo0 proto static src 10.138.0.1 onlink
            172.31.0.1 via 10.4.0.1 dev kilo0 proto static src 10.138.0.1 onlink
            10.42.4.0/24 via 10.4.0.2 dev kilo0 proto static src 10.138.0.1 onlink
            172.31.0.2 via 10.4.0.2 dev kilo0 proto static src 10.138.0.1 onlink
            10.5.0.1 dev kilo0 proto static src 10.138.0.1
            from all to 10.138.0.2 iif kilo0 lookup 1107
            table 1107 10.138.0.2 via 10.42.2.0 dev flannel.1 proto static onlink",
        endpoints: &[],
    },
    golden::Node {
        name: "a2",
        cluster_address: "10.42.2.0",
        others: &[],
        region_pods: &["10.42.1.0/24"],
        kilo: "
            10.4.0.1 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink
            10.4.0.2 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink
            10.4.0.3 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink
            10.42.3.0/24 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink
            172.31.0.1 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink
            10.42.4.0/24 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink
            172.31.0.2 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink
            10.5.0.1 via 10.42.1.0 dev flannel.1 proto static src 10.138.0.2 onlink",
        endpoints: &[],
    },
    golden::Node {
        name: "b1",
        cluster_address: "10.42.3.0",
        others: &["10.4.0.2", "10.4.0.3"],
        region_pods: &[],
        kilo: "
            10.4.0.0/16 dev kilo0 proto kernel scope link src 10.4.0.1
            10.42.4.0/24 via 10.4.0.2 dev kilo0 proto static src 172.31.0.1 onlink
            172.31.0.2 via 10.4.0.2 dev kilo0 proto static src 172.31.0.1 onlink
            10.42.1.0/24 via 10.4.0.3 dev kilo0 proto static src 172.31.0.1 onlink
            10.138.0.1 via 10.4.0.3 dev kilo0 proto static src 172.31.0.1 onlink
            10.42.2.0/24 via 10.4.0.3 dev kilo0 proto static src 172.31.0.1 onlink
            10.138.0.2 via 10.4.0.3 dev kilo0 proto static src 172.31.0.1 onlink
            10.5.0.1 dev kilo0 proto static src 172.31.0.1",
        endpoints: &[],
    },
    golden::Node {
        name: "b2",
        cluster_address: "10.42.4.0",
        others: &["10.4.0.1", "10.4.0.3"],
        region_pods: &[],
        kilo: "
            10.4.0.0/16 dev kilo0 proto kernel scope link src 10.4.0.2
            10.42.3.0/24 via 10.4.0.1 dev kilo0 proto static src 172.31.0.2 onlink
            172.31.0.1 via 10.4.0.1 dev kilo0 proto static src 172.31.0.2 onlink
            10.42.1.0/24 via 10.4.0.3 dev kilo0 proto static src 172.31.0.2 onlink
            10.138.0.1 via 10.4.0.3 dev kilo0 proto static src 172.31.0.2 onlink
            10.42.2.0/24 via 10.4.0.3 dev kilo0 proto static src 172.31.0.2 onlink
            10.138.0.2 via 10.4.0.3 dev kilo0 proto static src 172.31.0.2 onlink
            10.5.0.1 dev kilo0 proto static src 172.31.0.2",
        endpoints: &[],
    },
];

const FULL: [golden::Node<'_>; 2] = [
    golden::Node {
        name: "a1",
        cluster_address: "10.42.1.0",
        others: &["10.4.0.2", "10.4.0.3", "10.4.0.4"],
        region_pods: &[],
        kilo: "
            10.4.0.0/16 dev kilo0 proto kernel scope link src 10.4.0.1
            10.42.2.0/24 via 10.4.0.2 dev kilo0 proto static src 10.138.0.1 onlink
            10.138.0.2 via 10.4.0.2 dev kilo0 proto static src 10.138.0.1 onlink
            10.42.3.0/24 via 10.4.0.3 dev kilo0 proto static src 10.138.0.1 onlink
            172.31.0.1 via 10.4.0.3 dev kilo0 proto static src 10.138.0.1 onlink
            10.42.4.0/24 via 10.4.0.4 dev kilo0 proto static src 10.138.0.1 onlink
            172.31.0.2 via 10.4.0.4 dev kilo0 proto static src 10.138.0.1 onlink",
        endpoints: &[],
    },
    golden::Node {
        name: "b2",
        cluster_address: "10.42.4.0",
        others: &["10.4.0.1", "10.4.0.2", "10.4.0.3"],
        region_pods: &[],
        kilo: "
            10.4.0.0/16 dev kilo0 proto kernel scope link src 10.4.0.4
            10.42.1.0/24 via 10.4.0.1 dev kilo0 proto static src 172.31.0.2 onlink
            10.138.0.1 via 10.4.0.1 dev kilo0 proto static src 172.31.0.2 onlink
            10.42.2.0/24 via 10.4.0.2 dev kilo0 proto static src 172.31.0.2 onlink
            10.138.0.2 via 10.4.0.2 dev kilo0 proto static src 172.31.0.2 onlink
            10.42.3.0/24 via 10.4.0.3 dev kilo0 proto static src 172.31.0.2 onlink
            172.31.0.1 via 10.4.0.3 dev kilo0 proto static src 172.31.0.2 onlink",
        endpoints: &[],
    },
];

#[test]
fn routes_are_kilos_but_for_these_differences() {
    use Difference::*;
    let everywhere = [
        OwnTables,
        ClusterSource,
        Mtu,
        Backstop,
        OwnPodsStay,
        NetworkEnds,
        FixedRules,
    ];
    let leads = [&everywhere[..], &[OneRoutePerAddress]].concat();
    for mesh in [mixed(), with_a_real_kilo(mixed(), "b2")] {
        let [a1, a2, b1, b2] = MIXED;
        a1.check(&mesh, &[&leads[..], &[OneRuleForMembers]].concat());
        a2.check(&mesh, &everywhere);
        b1.check(&mesh, &leads);
        b2.check(&mesh, &leads);
    }
    for mesh in [full(), with_a_real_kilo(full(), "b2")] {
        for node in FULL {
            node.check(&mesh, &leads);
        }
    }
}

#[test]
fn tunnels_are_kilos_where_the_operator_sets_the_keepalive_interval() {
    // Kilo's default. Ours is to send keepalives until they are known to be unnecessary.
    let without = |mut mesh: Mesh| {
        for node in mesh.snapshot.nodes.values_mut() {
            node.persistent_keepalive = Some(0);
        }
        mesh
    };
    let (mixed, full) = (|| without(mixed()), || without(full()));
    for mesh in [mixed(), with_a_real_kilo(mixed(), "b2")] {
        assert_eq!(
            wireguard(&mesh.state("a1"), &names()),
            "listen 51820\n\
             address 10.4.0.3/32\n\
             b1 at 203.0.113.3:51820 every 0: 10.4.0.1/32 10.42.3.0/24 172.31.0.1/32\n\
             b2 at 203.0.113.4:51820 every 0: 10.4.0.2/32 10.42.4.0/24 172.31.0.2/32\n\
             laptop at nowhere every 0 psk: 10.5.0.1/32\n"
        );
        assert_eq!(
            wireguard(&mesh.state("b1"), &names()),
            "listen 51820\n\
             address 10.4.0.1/32\n\
             a1 at 203.0.113.1:51820 every 0: 10.4.0.3/32 10.42.1.0/24 10.42.2.0/24 10.138.0.1/32 10.138.0.2/32\n\
             b2 at 203.0.113.4:51820 every 0: 10.4.0.2/32 10.42.4.0/24 172.31.0.2/32\n\
             laptop at nowhere every 0 psk: 10.5.0.1/32\n"
        );
        assert_eq!(wireguard(&mesh.state("a2"), &names()), "listen 51820\n");
    }
    for mesh in [full(), with_a_real_kilo(full(), "b2")] {
        assert_eq!(
            wireguard(&mesh.state("a2"), &names()),
            "listen 51820\n\
             address 10.4.0.2/32\n\
             a1 at 203.0.113.1:51820 every 0: 10.4.0.1/32 10.42.1.0/24 10.138.0.1/32\n\
             b1 at 203.0.113.3:51820 every 0: 10.4.0.3/32 10.42.3.0/24 172.31.0.1/32\n\
             b2 at 203.0.113.4:51820 every 0: 10.4.0.4/32 10.42.4.0/24 172.31.0.2/32\n"
        );
    }
}

/// By default the agent publishes the endpoint that it found. Here it is the operator's.
#[test]
fn annotations_are_kilos_with_our_mark() {
    let forced = |mut mesh: Mesh| {
        for node in mesh.snapshot.nodes.values_mut() {
            node.endpoint_forced = true;
        }
        mesh
    };
    let version = env!("CARGO_PKG_VERSION");
    // The endpoint of a client that starts the handshake is published once it is observed.
    assert_eq!(
        annotations(&forced(mixed()), "a1", &[(key(9), "198.51.100.77:4000")]),
        format!(
            "kilo.squat.ai/discovered-endpoints: {{\"{}\":{{\"IP\":\"198.51.100.77\",\"Port\":4000,\"Zone\":\"\"}}}}\n\
             kilo.squat.ai/endpoint: 203.0.113.1:51820\n\
             kilo.squat.ai/granularity: location\n\
             kilo.squat.ai/internal-ip: 10.138.0.1/20\n\
             kilo.squat.ai/key: {}\n\
             kilo.squat.ai/wireguard-ip: 10.4.0.3/16\n\
             selvedge.dev/agent: {version}\n",
            key(9),
            key(1)
        )
    );
    assert_eq!(
        annotations(&forced(full()), "b2", &[]),
        format!(
            "kilo.squat.ai/endpoint: 203.0.113.4:51820\n\
             kilo.squat.ai/granularity: full\n\
             kilo.squat.ai/internal-ip: 172.31.0.2/20\n\
             kilo.squat.ai/key: {}\n\
             kilo.squat.ai/wireguard-ip: 10.4.0.4/16\n\
             selvedge.dev/agent: {version}\n",
            key(4)
        )
    );
}

#[test]
fn showconf_is_kilos() {
    let shown =
        |mesh: &Mesh, object| showconf(&mesh.topology(), &object, &Shape::default()).unwrap();
    let of_node = |mesh: &Mesh, name: &str| shown(mesh, Object::Node(NodeName(name.into())));
    let psk = PresharedKey([7; 32]).0;
    let psk = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, psk);
    let (a1, b1, b2, laptop) = (key(1), key(3), key(4), key(9));
    for mesh in [mixed(), with_a_real_kilo(mixed(), "b2")] {
        assert_eq!(
            of_node(&mesh, "a1"),
            format!(
                "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.3.0/24, 172.31.0.1/32, 10.4.0.1/32
Endpoint = 203.0.113.3:51820
PersistentKeepalive = 0
PublicKey = {b1}

[Peer]
AllowedIPs = 10.42.4.0/24, 172.31.0.2/32, 10.4.0.2/32
Endpoint = 203.0.113.4:51820
PersistentKeepalive = 0
PublicKey = {b2}

[Peer]
AllowedIPs = 10.5.0.1/32
PersistentKeepalive = 0
PresharedKey = {psk}
PublicKey = {laptop}
"
            )
        );
        assert_eq!(
            shown(&mesh, Object::Peer("laptop".into())),
            format!(
                "\
[Peer]
AllowedIPs = 10.42.3.0/24, 172.31.0.1/32, 10.4.0.1/32
Endpoint = 203.0.113.3:51820
PersistentKeepalive = 0
PresharedKey = {psk}
PublicKey = {b1}

[Peer]
AllowedIPs = 10.42.4.0/24, 172.31.0.2/32, 10.4.0.2/32
Endpoint = 203.0.113.4:51820
PersistentKeepalive = 0
PresharedKey = {psk}
PublicKey = {b2}

[Peer]
AllowedIPs = 10.42.1.0/24, 10.138.0.1/32, 10.42.2.0/24, 10.138.0.2/32, 10.4.0.3/32
Endpoint = 203.0.113.1:51820
PersistentKeepalive = 0
PresharedKey = {psk}
PublicKey = {a1}
"
            )
        );
    }
    for mesh in [full(), with_a_real_kilo(full(), "b2")] {
        assert_eq!(
            of_node(&mesh, "a2"),
            format!(
                "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.1.0/24, 10.138.0.1/32, 10.4.0.1/32
Endpoint = 203.0.113.1:51820
PersistentKeepalive = 0
PublicKey = {a1}

[Peer]
AllowedIPs = 10.42.3.0/24, 172.31.0.1/32, 10.4.0.3/32
Endpoint = 203.0.113.3:51820
PersistentKeepalive = 0
PublicKey = {b1}

[Peer]
AllowedIPs = 10.42.4.0/24, 172.31.0.2/32, 10.4.0.4/32
Endpoint = 203.0.113.4:51820
PersistentKeepalive = 0
PublicKey = {b2}
"
            )
        );
    }
}

#[test]
fn the_graph_is_kilos() {
    for mesh in [mixed(), with_a_real_kilo(mixed(), "b2")] {
        assert_eq!(
            graph::dot(&mesh.topology()),
            r#"digraph kilo {
	label="10.4.0.0/16";
	labelloc=t;
	outputorder=nodesfirst;
	overlap=false;
	"a1"->"a2"[ dir=both ];
	"b1"->"b2"[ dir=both ];
	"b1"->"a1"[ dir=both ];
	"b2"->"a1"[ dir=both ];
	"b1"->"laptop"[ dir=both, style=dashed ];
	"b2"->"laptop"[ dir=both, style=dashed ];
	"a1"->"laptop"[ dir=both, style=dashed ];
	subgraph "cluster_location_location:b1" {
	label="location:b1";
	style="dashed,rounded";
	"b1" [ label="location:b1\nb1\n10.42.3.0/24\n172.31.0.1\n10.4.0.1\n203.0.113.3:51820", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_location_location:b2" {
	label="location:b2";
	style="dashed,rounded";
	"b2" [ label="location:b2\nb2\n10.42.4.0/24\n172.31.0.2\n10.4.0.2\n203.0.113.4:51820", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_location_location:gcp" {
	label="location:gcp";
	style="dashed,rounded";
	"a1" [ label="location:gcp\na1\n10.42.1.0/24\n10.138.0.1\n10.4.0.3\n203.0.113.1:51820", rank=1, shape=ellipse ];
	"a2" [ label="location:gcp\na2\n10.42.2.0/24\n10.138.0.2", shape=ellipse ];

}
;
	subgraph "cluster_peers" {
	label="peers";
	style="dashed,rounded";
	"laptop" [ label="laptop\n
", shape=ellipse ];

}
;

}
"#
        );
    }
}
