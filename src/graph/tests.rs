//! The drawings of the main scenario, whose DOT is Kilo's own output.

use super::*;
use crate::topology::{ExternalPeer, Granularity, NodeName, RegionName, Segment};
use crate::wireguard::key::PublicKey;

fn member(name: &str, pods: &str, address: &str) -> Member {
    let address: ipnet::IpNet = address.parse().unwrap();
    Member {
        name: NodeName(name.into()),
        endpoint: None,
        pod_cidrs: vec![pods.parse().unwrap()],
        addresses: vec![address.addr()],
        aliases: [].into(),
        underlay: [address.addr()].into(),
        flannel_ips: [].into(),
        private_ip: Some(address),
    }
}

fn segment(region: &str, wireguard_ip: &str, endpoint: &str, nodes: Vec<Member>) -> Segment {
    let name = SegmentName::Location(RegionName(region.into()));
    let address = endpoint.parse().unwrap();
    Segment {
        group: name.clone(),
        name,
        leaders: vec![Leader {
            node: nodes[0].name.clone(),
            keys: vec![PublicKey([1; 32])],
            endpoint: Some(crate::topology::Endpoint::Addr(address)),
            address: Some(address),
            discovered: None,
            behind_nat: false,
            candidates: vec![],
            keepalive_forced: false,
            persistent_keepalive: 0,
            wireguard_ips: vec![wireguard_ip.parse().unwrap()],
            probe_ip: None,
        }],
        nodes,
        allowed_location_ips: vec![],
    }
}

fn peer(name: &str, endpoint: Option<&str>) -> ExternalPeer {
    ExternalPeer {
        name: name.into(),
        created: 0,
        public_key: PublicKey([2; 32]),
        preshared_key: None,
        endpoint: endpoint.map(|text| crate::cluster::annotation::endpoint(text).unwrap()),
        persistent_keepalive: 0,
        allowed_ips: vec!["10.5.0.1/32".parse().unwrap()],
    }
}

fn scenario() -> Topology {
    let cloud = member("node-master", "10.42.0.0/24", "172.16.0.10/24");
    let lan = vec![
        member("node-agent-01", "10.42.1.0/24", "192.168.50.11/24"),
        member("node-agent-02", "10.42.2.0/24", "192.168.50.12/24"),
        member("node-agent-03", "10.42.3.0/24", "192.168.50.13/24"),
    ];
    let mut nd = segment("nd", "10.4.0.2", "192.168.50.11:51820", lan);
    nd.leaders[0].discovered = Some("198.51.100.7:24276".parse().unwrap());
    Topology {
        subnets: vec!["10.4.0.0/16".parse().unwrap()],
        segments: vec![
            segment("default", "10.4.0.1", "203.0.113.10:51820", vec![cloud]),
            nd,
        ],
        peers: vec![
            peer("office", Some("vpn.example.com:51999")),
            peer("zlaptop", None),
        ],
        ..Topology::default()
    }
}

/// Printed by Kilo's own `kgctl graph` for the same cluster.
const KILO: &str = r#"digraph kilo {
	label="10.4.0.0/16";
	labelloc=t;
	outputorder=nodesfirst;
	overlap=false;
	"node-agent-01"->"node-agent-02"[ dir=both ];
	"node-agent-01"->"node-agent-03"[ dir=both ];
	"node-master"->"node-agent-01"[ dir=both ];
	"node-master"->"office"[ dir=both, style=dashed ];
	"node-master"->"zlaptop"[ dir=both, style=dashed ];
	"node-agent-01"->"office"[ dir=both, style=dashed ];
	"node-agent-01"->"zlaptop"[ dir=both, style=dashed ];
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
	"office" [ label="office\nvpn.example.com:51999
", shape=ellipse ];
	"zlaptop" [ label="zlaptop\n
", shape=ellipse ];

}
;

}
"#;

#[test]
fn dot_is_byte_for_byte_what_kilo_prints() {
    assert_eq!(dot(&scenario()), KILO);
}

#[test]
fn dot_has_the_box_of_peers_even_without_peers() {
    let mut topology = scenario();
    topology.peers.clear();

    assert!(dot(&topology).ends_with(
        "\tsubgraph \"cluster_peers\" {\n\tlabel=\"peers\";\n\tstyle=\"dashed,rounded\";\n\n}\n;\n\n}\n"
    ));
}

#[test]
fn text_shows_leaders_members_peers_and_tunnels() {
    insta::assert_snapshot!(text(&scenario(), &[]), @r"
    10.4.0.0/16, granularity location

    location:default
      ● node-master    10.4.0.1  10.42.0.0/24  172.16.0.10    203.0.113.10:51820

    location:nd
      ● node-agent-01  10.4.0.2  10.42.1.0/24  192.168.50.11  198.51.100.7:24276 (seen there, behind NAT)
      ├ node-agent-02            10.42.2.0/24  192.168.50.12
      └ node-agent-03            10.42.3.0/24  192.168.50.13

    peers
      ○ office   10.5.0.1/32  vpn.example.com:51999
      ○ zlaptop  10.5.0.1/32  no endpoint

    tunnels
      node-master ══ node-agent-01
      node-master ┄┄ office, zlaptop
      node-agent-01 ┄┄ office, zlaptop
    ");
}

/// The same with node-agent-02 as a second leader.
fn two_leaders() -> Topology {
    let mut topology = scenario();
    let nd = &mut topology.segments[1];
    nd.leaders.push(Leader {
        node: nd.nodes[1].name.clone(),
        discovered: None,
        wireguard_ips: vec!["10.4.0.3".parse().unwrap()],
        ..nd.leaders[0].clone()
    });
    topology
}

#[test]
fn every_leader_is_marked_and_external_peers_are_drawn_at_the_primary() {
    insta::assert_snapshot!(text(&two_leaders(), &[]), @r"
    10.4.0.0/16, granularity location

    location:default
      ● node-master    10.4.0.1  10.42.0.0/24  172.16.0.10    203.0.113.10:51820

    location:nd
      ● node-agent-01  10.4.0.2  10.42.1.0/24  192.168.50.11  198.51.100.7:24276 (seen there, behind NAT)
      ● node-agent-02  10.4.0.3  10.42.2.0/24  192.168.50.12  192.168.50.11:51820
      └ node-agent-03            10.42.3.0/24  192.168.50.13

    peers
      ○ office   10.5.0.1/32  vpn.example.com:51999
      ○ zlaptop  10.5.0.1/32  no endpoint

    tunnels
      node-master ══ node-agent-01, node-agent-02
      node-master ┄┄ office, zlaptop
      node-agent-01 ┄┄ office, zlaptop
    ");
    let drawn = dot(&two_leaders());
    let edges = drawn.lines().filter(|line| line.contains("->"));
    let edges = edges.map(|line| line.trim().replace('"', ""));
    insta::assert_snapshot!(edges.collect::<Vec<_>>().join("\n"), @r"
    node-agent-01->node-agent-03[ dir=both ];
    node-agent-02->node-agent-03[ dir=both ];
    node-master->node-agent-01[ dir=both ];
    node-master->node-agent-02[ dir=both ];
    node-master->office[ dir=both, style=dashed ];
    node-master->zlaptop[ dir=both, style=dashed ];
    node-agent-01->office[ dir=both, style=dashed ];
    node-agent-01->zlaptop[ dir=both, style=dashed ];
    ");
    assert_eq!(drawn.matches("rank=1").count(), 3);
}

#[test]
fn nodes_of_one_group_have_no_tunnel_between_them() {
    let mut topology = scenario();
    topology.granularity = Granularity::Cross;
    let mut second = segment(
        "default",
        "10.4.0.3",
        "203.0.113.11:51820",
        vec![member("node-two", "10.42.4.0/24", "172.16.0.11/24")],
    );
    second.name = SegmentName::Node(NodeName("node-two".into()));
    topology.segments.push(second);

    let drawn = dot(&topology);

    assert!(!drawn.contains("\"node-master\"->\"node-two\""));
    assert!(drawn.contains("\"node-agent-01\"->\"node-two\""));
    assert_eq!(
        drawn
            .matches("subgraph \"cluster_location_location:default\"")
            .count(),
        1
    );
}

/// Reads a picture as a browser does, and lists all of its text.
fn texts(svg: &str) -> Vec<String> {
    let document = roxmltree::Document::parse(svg).unwrap_or_else(|error| panic!("{error}: {svg}"));
    let root = document.root_element();
    assert_eq!(root.tag_name().name(), "svg");
    assert_eq!(
        root.tag_name().namespace(),
        Some("http://www.w3.org/2000/svg")
    );
    let text = document.descendants().filter(roxmltree::Node::is_text);
    text.filter_map(|node| node.text())
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_picture_is_xml_and_names_every_node() {
    let texts = texts(&svg(&scenario())).join("\n");
    for name in [
        "node-master",
        "node-agent-03",
        "zlaptop",
        "location:nd",
        "10.4.0.2",
    ] {
        assert!(texts.contains(name), "{name} is missing in {texts}");
    }
}

#[test]
fn hostile_names_break_no_drawing() {
    let mut topology = scenario();
    topology.segments[1].group =
        SegmentName::Location(RegionName("a\"]<script>&\u{1b}[31m\nb\\".into()));

    let drawn = svg(&topology);
    assert!(!drawn.contains("<script>"));
    let texts = texts(&drawn).join("\n");
    assert!(texts.contains("a\"]<script>&"), "{texts}");
    assert!(!text(&topology, &[]).contains('\u{1b}'));
    assert!(dot(&topology).contains(r#"label="location:a\"]<script>&"#));
}

#[test]
fn the_page_refuses_what_kilos_refuses_in_its_words() {
    let ask = |format, layout| page(&scenario(), format, layout, &[]);
    assert_eq!(ask(None, None).unwrap().content_type, "image/svg+xml");
    assert_eq!(ask(Some("dot"), Some("neato")).unwrap().body, KILO);
    assert_eq!(ask(Some("gv"), None).unwrap().body, KILO);
    assert_eq!(ask(Some("doc"), None), Err(PageError::Format));
    assert_eq!(ask(Some("png"), None), Err(PageError::Format));
    assert_eq!(ask(None, Some("round")), Err(PageError::Layout));
    assert_eq!(
        page(&Topology::default(), None, None, &[]),
        Err(PageError::NoNodes)
    );
    assert_eq!(PageError::Format.to_string(), "unsupported format");
}

#[test]
fn an_empty_mesh_can_be_drawn() {
    for format in [Format::Dot, Format::Svg, Format::Text] {
        assert!(!render(&Topology::default(), format, &[]).is_empty());
    }
}

#[test]
fn the_relays_of_the_node_are_drawn_as_text() {
    let relayed = Relayed {
        from: "node-master".into(),
        via: ("edge-01".into(), "location:edge".into()),
        to: "node-agent-01".into(),
    };
    let drawn = text(&scenario(), &[relayed]);
    let line = "  node-master ══ node-agent-01 via edge-01 (location:edge)";
    assert!(drawn.lines().any(|drawn| drawn == line), "{drawn}");
}
