//! `graph` and `showconf` for known clusters. The commands on a real API server: `tests/root/kilo_commands.rs`.
//!
//! The expected texts are worked out by hand from Kilo's rules (segments by name, leaders, addresses by
//! position, allowed IPs by node), not taken from the program's output. One thing differs from Kilo
//! everywhere: a node without a private address is reached by its public one through the tunnel too.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use selvedge::showconf::{Shape, showconf};
use selvedge::topology::{Granularity, NodeName, Object, Topology};
use selvedge::{graph, showconf};

use crate::mesh::Mesh;

fn two_regions() -> Topology {
    topology(
        include_str!("../testdata/two-regions.yaml"),
        Granularity::Location,
    )
}

fn six_clouds(granularity: Granularity) -> Topology {
    topology(include_str!("../testdata/six-clouds.yaml"), granularity)
}

fn mixed(granularity: Granularity) -> Topology {
    topology(include_str!("../testdata/mixed.yaml"), granularity)
}

fn topology(yaml: &str, granularity: Granularity) -> Topology {
    let mut mesh = Mesh::from_yaml(yaml).unwrap();
    mesh.agreed.granularity = granularity;
    mesh.topology()
}

fn of_node(topology: &Topology, name: &str) -> String {
    let object = Object::Node(NodeName(name.into()));
    showconf(topology, &object, &Shape::default()).unwrap()
}

fn of_peer(topology: &Topology, name: &str) -> String {
    showconf(topology, &Object::Peer(name.into()), &Shape::default()).unwrap()
}

fn node_as_peer(topology: &Topology, name: &str, output: showconf::Output) -> String {
    let shape = Shape {
        as_peer: true,
        output,
        ..Shape::default()
    };
    showconf(topology, &Object::Node(NodeName(name.into())), &shape).unwrap()
}

/// A public master and three agents behind one NAT.
mod two_regions {
    use super::*;

    #[test]
    fn the_master_sends_to_where_it_saw_the_other_leader() {
        assert_eq!(
            of_node(&two_regions(), "node-master"),
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
    }

    #[test]
    fn the_leader_behind_nat_keeps_its_mapping() {
        assert_eq!(
            of_node(&two_regions(), "node-agent-01"),
            "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.0.0/24, 203.0.113.10/32, 10.4.0.1/32
Endpoint = 203.0.113.10:51820
PersistentKeepalive = 25
PublicKey = ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=
"
        );
    }
}

/// Six nodes in five regions, all leaders with public endpoints.
mod six_clouds {
    use super::*;

    /// The leaders of the five regions, by name of the region: aliyun .1, baidu .2, ctyun .3,
    /// huaweicloud .4, tencentcloud .5.
    #[test]
    fn every_leader_has_the_four_other_regions() {
        assert_eq!(
            of_node(&six_clouds(Granularity::Location), "ty1.k3s"),
            "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.3.0/24, 172.21.143.136/32, 10.4.0.1/32
Endpoint = 203.0.113.4:51820
PersistentKeepalive = 20
PublicKey = RAyS4OlTyOQgrCH0FpECbagUDdsEc74bSrbQMCJrDsk=

[Peer]
AllowedIPs = 10.42.4.0/24, 192.168.64.4/32, 10.42.5.0/24, 192.168.64.5/32, 10.4.0.2/32
Endpoint = 203.0.113.5:51820
PersistentKeepalive = 20
PublicKey = w0YlUwb86Dv8Mx3BNW+c4RdzOMJnRJgmFds9iKEolDo=

[Peer]
AllowedIPs = 10.42.1.0/24, 192.168.7.226/32, 10.4.0.4/32
Endpoint = 203.0.113.2:51820
PersistentKeepalive = 20
PublicKey = XVf2EaXrbXTJDAE7LTlh3YtDkqpsXnTEv8c361teFfw=

[Peer]
AllowedIPs = 10.42.2.0/24, 172.17.0.3/32, 10.4.0.5/32
Endpoint = 203.0.113.3:51820
PersistentKeepalive = 20
PublicKey = 2qIH31BY62v4Mo4zMteu6LSuS0bmvPAhlnwP9IUMyJU=
"
        );
    }

    #[test]
    fn the_first_by_name_leads_a_region_of_two_equals() {
        let topology = six_clouds(Granularity::Location);
        let object = Object::Node(NodeName("bd2.k3s".into()));
        assert_eq!(
            showconf(&topology, &object, &Shape::default())
                .unwrap_err()
                .to_string(),
            "Node \"bd2.k3s\" is not a leader node; \"bd1.k3s\" leads location:baidu"
        );
        assert_eq!(
            node_as_peer(&topology, "bd1.k3s", showconf::Output::Yaml),
            "\
apiVersion: kilo.squat.ai/v1alpha1
kind: Peer
metadata:
  name: bd1.k3s
spec:
  allowedIPs:
  - 10.42.4.0/24
  - 192.168.64.4/32
  - 10.42.5.0/24
  - 192.168.64.5/32
  - 10.4.0.2/32
  endpoint:
    dnsOrIP:
      ip: 203.0.113.5
    port: 51820
  publicKey: w0YlUwb86Dv8Mx3BNW+c4RdzOMJnRJgmFds9iKEolDo=
"
        );
    }

    #[test]
    fn in_a_full_mesh_every_node_is_a_segment() {
        let topology = six_clouds(Granularity::Full);
        // By name of the node: ali1 .1, bd1 .2, bd2 .3, hw1 .4, tx1 .5, ty1 .6.
        let conf = of_node(&topology, "ali1.k3s");
        let allowed: Vec<_> = conf
            .lines()
            .filter(|line| line.starts_with("AllowedIPs"))
            .collect();
        assert_eq!(
            allowed,
            [
                "AllowedIPs = 10.42.4.0/24, 192.168.64.4/32, 10.4.0.2/32",
                "AllowedIPs = 10.42.5.0/24, 192.168.64.5/32, 10.4.0.3/32",
                "AllowedIPs = 10.42.1.0/24, 192.168.7.226/32, 10.4.0.4/32",
                "AllowedIPs = 10.42.2.0/24, 172.17.0.3/32, 10.4.0.5/32",
                "AllowedIPs = 10.42.0.0/24, 192.168.1.226/32, 10.4.0.6/32",
            ]
        );
    }

    #[test]
    fn with_cross_the_two_of_one_region_have_no_tunnel_between_them() {
        let topology = six_clouds(Granularity::Cross);
        let conf = of_node(&topology, "bd1.k3s");
        assert_eq!(conf.matches("[Peer]").count(), 4);
        assert!(!conf.contains("10.42.5.0/24"), "{conf}");
        let dot = graph::dot(&topology);
        assert!(!dot.contains(r#""bd1.k3s"->"bd2.k3s""#), "{dot}");
        assert!(
            dot.contains(r#""ali1.k3s"->"bd2.k3s"[ dir=both ];"#),
            "{dot}"
        );
    }

    #[test]
    fn the_graph_joins_every_two_leaders() {
        assert_eq!(
            graph::dot(&six_clouds(Granularity::Location)),
            r#"digraph kilo {
	label="10.4.0.0/16";
	labelloc=t;
	outputorder=nodesfirst;
	overlap=false;
	"bd1.k3s"->"bd2.k3s"[ dir=both ];
	"ali1.k3s"->"bd1.k3s"[ dir=both ];
	"ali1.k3s"->"ty1.k3s"[ dir=both ];
	"ali1.k3s"->"hw1.k3s"[ dir=both ];
	"ali1.k3s"->"tx1.k3s"[ dir=both ];
	"bd1.k3s"->"ty1.k3s"[ dir=both ];
	"bd1.k3s"->"hw1.k3s"[ dir=both ];
	"bd1.k3s"->"tx1.k3s"[ dir=both ];
	"ty1.k3s"->"hw1.k3s"[ dir=both ];
	"ty1.k3s"->"tx1.k3s"[ dir=both ];
	"hw1.k3s"->"tx1.k3s"[ dir=both ];
	subgraph "cluster_location_location:aliyun" {
	label="location:aliyun";
	style="dashed,rounded";
	"ali1.k3s" [ label="location:aliyun\nali1.k3s\n10.42.3.0/24\n172.21.143.136\n10.4.0.1\n203.0.113.4:51820", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_location_location:baidu" {
	label="location:baidu";
	style="dashed,rounded";
	"bd1.k3s" [ label="location:baidu\nbd1.k3s\n10.42.4.0/24\n192.168.64.4\n10.4.0.2\n203.0.113.5:51820", rank=1, shape=ellipse ];
	"bd2.k3s" [ label="location:baidu\nbd2.k3s\n10.42.5.0/24\n192.168.64.5", shape=ellipse ];

}
;
	subgraph "cluster_location_location:ctyun" {
	label="location:ctyun";
	style="dashed,rounded";
	"ty1.k3s" [ label="location:ctyun\nty1.k3s\n10.42.0.0/24\n192.168.1.226\n10.4.0.3\n203.0.113.1:51820", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_location_location:huaweicloud" {
	label="location:huaweicloud";
	style="dashed,rounded";
	"hw1.k3s" [ label="location:huaweicloud\nhw1.k3s\n10.42.1.0/24\n192.168.7.226\n10.4.0.4\n203.0.113.2:51820", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_location_location:tencentcloud" {
	label="location:tencentcloud";
	style="dashed,rounded";
	"tx1.k3s" [ label="location:tencentcloud\ntx1.k3s\n10.42.2.0/24\n172.17.0.3\n10.4.0.5\n203.0.113.3:51820", rank=1, shape=ellipse ];

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

/// Logical groups, a node behind NAT, a node with a public address only, two external peers.
mod mixed {
    use super::*;

    /// Segments by name: location:edge-1 .1, location:gcp .2, node:cloud-1 .3.
    #[test]
    fn a_leader_has_the_other_groups_and_the_peers() {
        assert_eq!(
            of_node(&mixed(Granularity::Location), "gcp-1"),
            "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.3.0/24, 192.168.1.10/32, 10.4.0.1/32
Endpoint = 198.51.100.9:1030
PersistentKeepalive = 0
PublicKey = 5EAbyJiZmEvnGx+RSzGO4zTfDWZq/SnPRvGi6h7Dmqg=

[Peer]
AllowedIPs = 10.42.4.0/24, 203.0.113.24/32, 10.4.0.3/32
Endpoint = 203.0.113.24:4500
PersistentKeepalive = 0
PublicKey = jurow/se8vIa1EQzH8oPFeG7Yrh1nehDG0XrZvNl2MM=

[Peer]
AllowedIPs = 10.5.0.1/32
PersistentKeepalive = 0
PresharedKey = PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
PublicKey = zGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=

[Peer]
AllowedIPs = 10.6.0.0/24
Endpoint = vpn.example.com:51999
PersistentKeepalive = 0
PublicKey = oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
"
        );
    }

    #[test]
    fn the_public_node_listens_on_its_own_port_and_carries_what_the_group_offers() {
        let conf = of_node(&mixed(Granularity::Location), "cloud-1");
        assert!(
            conf.starts_with("[Interface]\nListenPort = 4500\n"),
            "{conf}"
        );
        assert!(
            conf.contains(
                "AllowedIPs = 10.42.1.0/24, 10.132.0.2/32, 10.42.2.0/24, 10.132.0.3/32, 10.4.0.2/32, 10.90.0.0/24\n\
                 Endpoint = 203.0.113.21:51820\n"
            ),
            "{conf}"
        );
    }

    #[test]
    fn an_external_peer_gets_all_groups_and_the_other_peers() {
        assert_eq!(
            of_peer(&mixed(Granularity::Location), "laptop"),
            "\
[Peer]
AllowedIPs = 10.42.3.0/24, 192.168.1.10/32, 10.4.0.1/32
Endpoint = 198.51.100.9:1030
PersistentKeepalive = 10
PresharedKey = PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
PublicKey = 5EAbyJiZmEvnGx+RSzGO4zTfDWZq/SnPRvGi6h7Dmqg=

[Peer]
AllowedIPs = 10.42.1.0/24, 10.132.0.2/32, 10.42.2.0/24, 10.132.0.3/32, 10.4.0.2/32, 10.90.0.0/24
Endpoint = 203.0.113.21:51820
PersistentKeepalive = 10
PresharedKey = PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
PublicKey = ddPsy/I/5kCfQa2EKRxAhnXegJpDpUHn2p26dtpdq8M=

[Peer]
AllowedIPs = 10.42.4.0/24, 203.0.113.24/32, 10.4.0.3/32
Endpoint = 203.0.113.24:4500
PersistentKeepalive = 10
PresharedKey = PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
PublicKey = jurow/se8vIa1EQzH8oPFeG7Yrh1nehDG0XrZvNl2MM=

[Peer]
AllowedIPs = 10.6.0.0/24
Endpoint = vpn.example.com:51999
PersistentKeepalive = 10
PublicKey = oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
"
        );
    }

    #[test]
    fn the_graph_has_a_box_for_each_group() {
        assert_eq!(
            graph::dot(&mixed(Granularity::Location)),
            r#"digraph kilo {
	label="10.4.0.0/16";
	labelloc=t;
	outputorder=nodesfirst;
	overlap=false;
	"gcp-1"->"gcp-2"[ dir=both ];
	"edge-1"->"gcp-1"[ dir=both ];
	"edge-1"->"cloud-1"[ dir=both ];
	"gcp-1"->"cloud-1"[ dir=both ];
	"edge-1"->"laptop"[ dir=both, style=dashed ];
	"edge-1"->"office"[ dir=both, style=dashed ];
	"gcp-1"->"laptop"[ dir=both, style=dashed ];
	"gcp-1"->"office"[ dir=both, style=dashed ];
	"cloud-1"->"laptop"[ dir=both, style=dashed ];
	"cloud-1"->"office"[ dir=both, style=dashed ];
	subgraph "cluster_location_location:edge-1" {
	label="location:edge-1";
	style="dashed,rounded";
	"edge-1" [ label="location:edge-1\nedge-1\n10.42.3.0/24\n192.168.1.10\n10.4.0.1\n192.168.1.10:51820", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_location_location:gcp" {
	label="location:gcp";
	style="dashed,rounded";
	"gcp-1" [ label="location:gcp\ngcp-1\n10.42.1.0/24\n10.132.0.2\n10.4.0.2\n203.0.113.21:51820", rank=1, shape=ellipse ];
	"gcp-2" [ label="location:gcp\ngcp-2\n10.42.2.0/24\n10.132.0.3", shape=ellipse ];

}
;
	subgraph "cluster_location_node:cloud-1" {
	label="node:cloud-1";
	style="dashed,rounded";
	"cloud-1" [ label="node:cloud-1\ncloud-1\n10.42.4.0/24\n10.4.0.3\n203.0.113.24:4500", rank=1, shape=ellipse ];

}
;
	subgraph "cluster_peers" {
	label="peers";
	style="dashed,rounded";
	"laptop" [ label="laptop\n
", shape=ellipse ];
	"office" [ label="office\nvpn.example.com:51999
", shape=ellipse ];

}
;

}
"#
        );
    }

    #[test]
    fn in_a_full_mesh_groups_mean_nothing() {
        let topology = mixed(Granularity::Full);
        let names: Vec<_> = topology
            .segments
            .iter()
            .map(|s| s.name.to_string())
            .collect();
        assert_eq!(
            names,
            ["node:cloud-1", "node:edge-1", "node:gcp-1", "node:gcp-2"]
        );
        assert!(of_node(&topology, "gcp-2").contains("10.42.1.0/24, 10.132.0.2/32, 10.4.0.3/32"));
    }
}
