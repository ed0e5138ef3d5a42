//! Two regions behind NAT in full: a public server behind 1:1 NAT, three agents behind one NAT, with an operator's
//! annotations. Worked out by hand from Kilo's rules; both algorithms give the same.

use selvedge::graph;
use selvedge::showconf::{Shape, showconf};
use selvedge::topology::Object;

use super::golden::{Difference, annotations, wireguard, with_a_real_kilo};
use super::*;

const MASTER: &str = "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=";
const AGENT_01: &str = "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=";

/// Segments by name: location:default .1, location:nd .2.
fn mesh() -> Mesh {
    two_regions().with(|mesh| {
        let master = mesh.node("node-master");
        master.internal_ips = vec![ip("172.16.0.10")];
        master.private_ip = Some(net("172.16.0.10/24"));
    })
}

fn both() -> [Mesh; 2] {
    [mesh(), with_a_real_kilo(mesh(), "node-agent-03")]
}

const MASTERS: golden::Node<'_> = golden::Node {
    name: "node-master",
    cluster_address: "10.42.0.0",
    others: &["10.4.0.2"],
    region_pods: &[],
    kilo: "
        10.4.0.0/16 dev kilo0 proto kernel scope link src 10.4.0.1
        10.42.1.0/24 via 10.4.0.2 dev kilo0 proto static src 172.16.0.10 onlink
        10.42.2.0/24 via 10.4.0.2 dev kilo0 proto static src 172.16.0.10 onlink
        10.42.3.0/24 via 10.4.0.2 dev kilo0 proto static src 172.16.0.10 onlink
        192.168.50.11 via 10.4.0.2 dev kilo0 proto static src 172.16.0.10 onlink
        192.168.50.12 via 10.4.0.2 dev kilo0 proto static src 172.16.0.10 onlink
        192.168.50.13 via 10.4.0.2 dev kilo0 proto static src 172.16.0.10 onlink",
    endpoints: &[],
};

const LEADERS: golden::Node<'_> = golden::Node {
    name: "node-agent-01",
    cluster_address: "10.42.1.0",
    others: &["10.4.0.1"],
    region_pods: &["10.42.2.0/24", "10.42.3.0/24"],
    kilo: "
        10.4.0.0/16 dev kilo0 proto kernel scope link src 10.4.0.2
        10.42.0.0/24 via 10.4.0.1 dev kilo0 proto static src 192.168.50.11 onlink
        172.16.0.10 via 10.4.0.1 dev kilo0 proto static src 192.168.50.11 onlink
        from all to 192.168.50.12 iif kilo0 lookup 1107
        from all to 192.168.50.13 iif kilo0 lookup 1107
        table 1107 192.168.50.12 via 10.42.2.0 dev flannel.1 proto static onlink
        table 1107 192.168.50.13 via 10.42.3.0 dev flannel.1 proto static onlink",
    endpoints: &[],
};

const FOLLOWERS: [golden::Node<'_>; 2] = [
    golden::Node {
        name: "node-agent-02",
        cluster_address: "10.42.2.0",
        others: &[],
        region_pods: &["10.42.1.0/24", "10.42.3.0/24"],
        kilo: "
            10.4.0.1 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.12 onlink
            10.4.0.2 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.12 onlink
            10.42.0.0/24 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.12 onlink
            172.16.0.10 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.12 onlink",
        endpoints: &[],
    },
    golden::Node {
        name: "node-agent-03",
        cluster_address: "10.42.3.0",
        others: &[],
        region_pods: &["10.42.1.0/24", "10.42.2.0/24"],
        kilo: "
            10.4.0.1 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.13 onlink
            10.4.0.2 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.13 onlink
            10.42.0.0/24 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.13 onlink
            172.16.0.10 via 10.42.1.0 dev flannel.1 proto static src 192.168.50.13 onlink",
        endpoints: &[],
    },
];

#[test]
fn routes_are_kilos_but_for_these_differences() {
    use Difference::*;
    for mesh in both() {
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
        MASTERS.check(&mesh, &leads);
        LEADERS.check(&mesh, &[&leads[..], &[OneRuleForMembers]].concat());
        for follower in FOLLOWERS {
            follower.check(&mesh, &everywhere);
        }
    }
}

/// Kilo has no route to the host of a leader behind NAT until a node has observed that leader.
#[test]
fn before_a_leader_behind_nat_is_observed_pods_reach_its_host() {
    use Difference::*;
    for mut mesh in both() {
        mesh.node("node-master").discovered_endpoints.clear();
        let kilo = MASTERS
            .kilo
            .lines()
            .filter(|line| !line.contains("192.168.50.11"));
        let kilo: Vec<_> = kilo.collect();
        let master = golden::Node {
            kilo: kilo.join("\n").leak(),
            endpoints: &[("192.168.50.11", "via 10.4.0.2 dev kilo0 onlink")],
            ..MASTERS
        };
        master.check(
            &mesh,
            &[
                OwnTables,
                ClusterSource,
                Mtu,
                Backstop,
                OwnPodsStay,
                NetworkEnds,
                FixedRules,
                OneRoutePerAddress,
                EndpointForPods,
            ],
        );
    }
}

#[test]
fn tunnels_are_kilos_where_the_operator_sets_the_keepalive_interval() {
    let names = [(MASTER, "node-master"), (AGENT_01, "node-agent-01")];
    let names = names.map(|(key, name)| (key.to_owned(), name)).into();
    for mut mesh in both() {
        // Kilo's default. Ours is to send keepalives until they are known to be unnecessary.
        mesh.node("node-master").persistent_keepalive = Some(0);
        assert_eq!(
            wireguard(&mesh.state("node-master"), &names),
            "listen 51820\n\
             address 10.4.0.1/32\n\
             node-agent-01 at 198.51.100.7:24276 every 0: 10.4.0.2/32 10.42.1.0/24 10.42.2.0/24 \
             10.42.3.0/24 192.168.50.11/32 192.168.50.12/32 192.168.50.13/32\n"
        );
        assert_eq!(
            wireguard(&mesh.state("node-agent-01"), &names),
            "listen 51820\n\
             address 10.4.0.2/32\n\
             node-master at 203.0.113.10:51820 every 25: 10.4.0.1/32 10.42.0.0/24 172.16.0.10/32\n"
        );
        for follower in ["node-agent-02", "node-agent-03"] {
            assert_eq!(wireguard(&mesh.state(follower), &names), "listen 51820\n");
        }
    }
}

#[test]
fn annotations_are_kilos_with_our_mark() {
    let nd = AGENT_01.parse().unwrap();
    let seen = [(nd, "198.51.100.7:24276")];
    let version = env!("CARGO_PKG_VERSION");
    let mesh = mesh();
    assert_eq!(
        annotations(&mesh, "node-master", &seen),
        format!(
            "kilo.squat.ai/discovered-endpoints: {{\"{AGENT_01}\":{{\"IP\":\"198.51.100.7\",\"Port\":24276,\"Zone\":\"\"}}}}\n\
             kilo.squat.ai/endpoint: 203.0.113.10:51820\n\
             kilo.squat.ai/granularity: location\n\
             kilo.squat.ai/internal-ip: 172.16.0.10/24\n\
             kilo.squat.ai/key: {MASTER}\n\
             kilo.squat.ai/wireguard-ip: 10.4.0.1/16\n\
             selvedge.dev/agent: {version}\n"
        )
    );
    assert_eq!(
        annotations(&mesh, "node-agent-01", &[]),
        format!(
            "kilo.squat.ai/endpoint: 192.168.50.11:51820\n\
             kilo.squat.ai/granularity: location\n\
             kilo.squat.ai/internal-ip: 192.168.50.11/24\n\
             kilo.squat.ai/key: {AGENT_01}\n\
             kilo.squat.ai/wireguard-ip: 10.4.0.2/16\n\
             selvedge.dev/agent: {version}\n\
             selvedge.dev/candidates: 192.168.50.11:51820\n"
        )
    );
}

/// The check-in time, the empty address of Kilo's Cilium mode, and no WireGuard address on followers.
#[test]
fn beside_a_real_kilo_annotations_are_kilos_with_our_mark() {
    let version = env!("CARGO_PKG_VERSION");
    let mesh = with_a_real_kilo(mesh(), "node-agent-03");
    let master = annotations(&mesh, "node-master", &[]);
    assert!(
        master.contains("kilo.squat.ai/wireguard-ip: 10.4.0.1/16\n"),
        "{master}"
    );
    assert_eq!(
        annotations(&mesh, "node-agent-02", &[]),
        format!(
            "kilo.squat.ai/cni-compatibility-ip: \n\
             kilo.squat.ai/endpoint: 192.168.50.12:51820\n\
             kilo.squat.ai/granularity: location\n\
             kilo.squat.ai/internal-ip: 192.168.50.12/24\n\
             kilo.squat.ai/key: h/wYe0dl8DAI8SLTR2E+bEkgxVvTFwS0ArNTXESFtFw=\n\
             kilo.squat.ai/last-seen: 1000\n\
             kilo.squat.ai/wireguard-ip: \n\
             selvedge.dev/agent: {version} last-seen=1000\n"
        )
    );
}

#[test]
fn showconf_is_kilos() {
    let shown = |mesh: &Mesh, name: &str, as_peer| {
        let shape = Shape {
            as_peer,
            ..Shape::default()
        };
        let object = Object::Node(NodeName(name.into()));
        showconf(&mesh.topology(), &object, &shape).map_err(|error| error.to_string())
    };
    for mesh in both() {
        assert_eq!(
            shown(&mesh, "node-master", false).unwrap(),
            "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.1.0/24, 192.168.50.11/32, 10.42.2.0/24, 192.168.50.12/32, 10.42.3.0/24, 192.168.50.13/32, 10.4.0.2/32
Endpoint = 198.51.100.7:24276
PersistentKeepalive = 0
PublicKey = jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=
"
        );
        assert_eq!(
            shown(&mesh, "node-agent-01", false).unwrap(),
            "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.0.0/24, 172.16.0.10/32, 10.4.0.1/32
Endpoint = 203.0.113.10:51820
PersistentKeepalive = 25
PublicKey = ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=
"
        );
        assert_eq!(
            shown(&mesh, "node-agent-01", true).unwrap(),
            "\
[Peer]
AllowedIPs = 10.42.1.0/24, 192.168.50.11/32, 10.42.2.0/24, 192.168.50.12/32, 10.42.3.0/24, 192.168.50.13/32, 10.4.0.2/32
Endpoint = 192.168.50.11:51820
PersistentKeepalive = 0
PublicKey = jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=
"
        );
        assert_eq!(
            shown(&mesh, "node-agent-03", false).unwrap_err(),
            "Node \"node-agent-03\" is not a leader node; \"node-agent-01\" leads location:nd"
        );
    }
}

#[test]
fn the_graph_is_kilos() {
    for mesh in both() {
        assert_eq!(
            graph::dot(&mesh.topology()),
            r#"digraph kilo {
	label="10.4.0.0/16";
	labelloc=t;
	outputorder=nodesfirst;
	overlap=false;
	"node-agent-01"->"node-agent-02"[ dir=both ];
	"node-agent-01"->"node-agent-03"[ dir=both ];
	"node-master"->"node-agent-01"[ dir=both ];
	subgraph "cluster_location_location:default" {
	label="location:default";
	style="dashed,rounded";
	"node-master" [ label="location:default\nnode-master\n10.42.0.0/24\n172.16.0.10\n10.4.0.1\n203.0.113.10:51820", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_location_location:nd" {
	label="location:nd";
	style="dashed,rounded";
	"node-agent-01" [ label="location:nd\nnode-agent-01\n10.42.1.0/24\n192.168.50.11\n10.4.0.2\n192.168.50.11:51820", rank=1, shape=ellipse ];
	"node-agent-02" [ label="location:nd\nnode-agent-02\n10.42.2.0/24\n192.168.50.12", shape=ellipse ];
	"node-agent-03" [ label="location:nd\nnode-agent-03\n10.42.3.0/24\n192.168.50.13", shape=ellipse ];

}
;
	subgraph "cluster_peers" {
	label="peers";
	style="dashed,rounded";

}
;

}
"#
        );
    }
}
