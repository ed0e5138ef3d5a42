//! What Kilo's own `kgctl showconf` printed for the main scenario, and what it got wrong.

use super::*;
use crate::topology::{Member, RegionName, SegmentName};

const MASTER_KEY: &str = "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=";
const AGENT_KEY: &str = "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=";
const OFFICE_KEY: &str = "oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";
const LAPTOP_KEY: &str = "zGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";
const PSK: &str = "PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=";

fn member(name: &str, pods: &str, address: &str) -> Member {
    let address: IpNet = address.parse().unwrap();
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

fn segment(
    region: &str,
    key: &str,
    wireguard_ip: &str,
    endpoint: &str,
    nodes: Vec<Member>,
) -> Segment {
    let name = SegmentName::Location(RegionName(region.into()));
    let endpoint = crate::cluster::annotation::endpoint(endpoint).unwrap();
    let address = match &endpoint {
        Endpoint::Addr(address) => Some(*address),
        Endpoint::Dns { .. } => None,
    };
    Segment {
        group: name.clone(),
        name,
        leaders: vec![Leader {
            node: nodes[0].name.clone(),
            keys: vec![key.parse().unwrap()],
            endpoint: Some(endpoint),
            address,
            discovered: address,
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

fn peer(name: &str, key: &str, endpoint: Option<&str>, allowed_ips: &[&str]) -> ExternalPeer {
    ExternalPeer {
        name: name.into(),
        created: 0,
        public_key: key.parse().unwrap(),
        preshared_key: None,
        endpoint: endpoint.map(|text| crate::cluster::annotation::endpoint(text).unwrap()),
        persistent_keepalive: 0,
        allowed_ips: allowed_ips.iter().map(|net| net.parse().unwrap()).collect(),
    }
}

/// A public master, three agents behind one NAT, two peers of which one lost its prefix.
fn scenario() -> Topology {
    let cloud = member("node-master", "10.42.0.0/24", "172.16.0.10/24");
    let lan = vec![
        member("node-agent-01", "10.42.1.0/24", "192.168.50.11/24"),
        member("node-agent-02", "10.42.2.0/24", "192.168.50.12/24"),
        member("node-agent-03", "10.42.3.0/24", "192.168.50.13/24"),
    ];
    let mut nd = segment("nd", AGENT_KEY, "10.4.0.2", "192.168.50.11:51820", lan);
    nd.leaders[0].persistent_keepalive = 25;
    nd.leaders[0].behind_nat = true;
    nd.leaders[0].discovered = Some("198.51.100.7:24276".parse().unwrap());
    let mut office = peer(
        "office",
        OFFICE_KEY,
        Some("vpn.example.com:51999"),
        &["10.6.0.0/24", "10.5.0.1/32"],
    );
    office.preshared_key = Some(PSK.parse().unwrap());
    let mut laptop = peer("zlaptop", LAPTOP_KEY, None, &[]);
    laptop.persistent_keepalive = 10;
    Topology {
        subnets: vec!["10.4.0.0/16".parse().unwrap()],
        segments: vec![
            segment(
                "default",
                MASTER_KEY,
                "10.4.0.1",
                "203.0.113.10:51820",
                vec![cloud],
            ),
            nd,
        ],
        peers: vec![office, laptop],
        ..Topology::default()
    }
}

fn node(name: &str, shape: &Shape) -> Result<String, NothingToShow> {
    showconf(&scenario(), &Object::Node(NodeName(name.into())), shape)
}

fn as_peer(output: Output) -> Shape {
    Shape {
        as_peer: true,
        output,
        ..Shape::default()
    }
}

#[test]
fn a_leaders_configuration_is_byte_for_byte_kilos() {
    let expected = "\
[Interface]
ListenPort = 51820

[Peer]
AllowedIPs = 10.42.1.0/24, 192.168.50.11/32, 10.42.2.0/24, 192.168.50.12/32, 10.42.3.0/24, 192.168.50.13/32, 10.4.0.2/32
Endpoint = 198.51.100.7:24276
PersistentKeepalive = 0
PublicKey = jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=

[Peer]
AllowedIPs = 10.6.0.0/24, 10.5.0.1/32
Endpoint = vpn.example.com:51999
PersistentKeepalive = 0
PresharedKey = PSKwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
PublicKey = oGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=

[Peer]
PersistentKeepalive = 0
PublicKey = zGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
";
    assert_eq!(node("node-master", &Shape::default()).unwrap(), expected);
}

/// A WireGuard configuration has one peer for each destination, so what leaders share stands at the primary.
#[test]
fn each_leader_of_another_segment_is_a_peer_with_its_own_addresses() {
    let mut topology = scenario();
    let nd = &mut topology.segments[1];
    nd.leaders.push(Leader {
        node: nd.nodes[1].name.clone(),
        keys: vec![LAPTOP_KEY.parse().unwrap()],
        discovered: Some("198.51.100.7:24277".parse().unwrap()),
        wireguard_ips: vec!["10.4.0.3".parse().unwrap()],
        ..nd.leaders[0].clone()
    });
    let object = Object::Node(NodeName("node-master".into()));
    let whole = showconf(&topology, &object, &Shape::default()).unwrap();
    let expected = "\
[Peer]
AllowedIPs = 10.42.1.0/24, 192.168.50.11/32, 10.42.3.0/24, 192.168.50.13/32, 10.4.0.2/32
Endpoint = 198.51.100.7:24276
PersistentKeepalive = 0
PublicKey = jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=

[Peer]
AllowedIPs = 10.42.2.0/24, 192.168.50.12/32, 10.4.0.3/32
Endpoint = 198.51.100.7:24277
PersistentKeepalive = 0
PublicKey = zGFwdG9wUHVibGljS2V5Rm9yRG9jc09ubHkwMDAwMDA=
";
    assert!(whole.contains(expected), "{whole}");

    // An external peer talks to the primary alone.
    let external = |topology: &Topology| {
        let object = Object::Peer("office".into());
        showconf(topology, &object, &Shape::default()).unwrap()
    };
    let one = external(&scenario());
    let added = ", 10.4.0.2/32, 10.4.0.3/32";
    assert_eq!(external(&topology), one.replace(", 10.4.0.2/32", added));
}

#[test]
fn a_leader_as_a_peer_shows_its_own_endpoint_and_no_keepalive() {
    let expected = "\
[Peer]
AllowedIPs = 10.42.1.0/24, 192.168.50.11/32, 10.42.2.0/24, 192.168.50.12/32, 10.42.3.0/24, 192.168.50.13/32, 10.4.0.2/32
Endpoint = 192.168.50.11:51820
PersistentKeepalive = 0
PublicKey = jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=
";
    assert_eq!(
        node("node-agent-01", &as_peer(Output::Wireguard)).unwrap(),
        expected
    );
}

#[test]
fn a_leader_as_a_peer_object_is_byte_for_byte_kilos() {
    let shape = Shape {
        allowed_ips: ["10.43.0.0/16", "10.42.1.0/24"]
            .map(|net| net.parse().unwrap())
            .into(),
        ..as_peer(Output::Yaml)
    };
    let expected = "\
apiVersion: kilo.squat.ai/v1alpha1
kind: Peer
metadata:
  name: node-agent-01
spec:
  allowedIPs:
  - 10.42.1.0/24
  - 192.168.50.11/32
  - 10.42.2.0/24
  - 192.168.50.12/32
  - 10.42.3.0/24
  - 192.168.50.13/32
  - 10.4.0.2/32
  - 10.43.0.0/16
  endpoint:
    dnsOrIP:
      ip: 192.168.50.11
    port: 51820
  publicKey: jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=
";
    assert_eq!(node("node-agent-01", &shape).unwrap(), expected);
}

#[test]
fn json_has_kilos_order_of_keys_and_no_line_break_at_the_end() {
    let expected = r#"{
  "kind": "Peer",
  "apiVersion": "kilo.squat.ai/v1alpha1",
  "metadata": {
    "name": "node-master"
  },
  "spec": {
    "allowedIPs": [
      "10.42.0.0/24",
      "172.16.0.10/32",
      "10.4.0.1/32"
    ],
    "endpoint": {
      "dnsOrIP": {
        "ip": "203.0.113.10"
      },
      "port": 51820
    },
    "publicKey": "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs="
  }
}"#;
    assert_eq!(
        node("node-master", &as_peer(Output::Json)).unwrap(),
        expected
    );
}

#[test]
fn a_peers_configuration_is_byte_for_byte_kilos() {
    let mut topology = scenario();
    topology.peers.remove(0);
    let expected = "\
[Peer]
AllowedIPs = 10.42.0.0/24, 172.16.0.10/32, 10.4.0.1/32
Endpoint = 203.0.113.10:51820
PersistentKeepalive = 10
PublicKey = ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=

[Peer]
AllowedIPs = 10.42.1.0/24, 192.168.50.11/32, 10.42.2.0/24, 192.168.50.12/32, 10.42.3.0/24, 192.168.50.13/32, 10.4.0.2/32
Endpoint = 198.51.100.7:24276
PersistentKeepalive = 10
PublicKey = jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=
";
    let object = Object::Peer("zlaptop".into());
    assert_eq!(
        showconf(&topology, &object, &Shape::default()).unwrap(),
        expected
    );
}

#[test]
fn a_peers_preshared_key_goes_to_the_segments_and_to_no_other_peer() {
    let object = Object::Peer("zlaptop".into());
    let of_laptop = showconf(&scenario(), &object, &Shape::default()).unwrap();
    assert!(!of_laptop.contains("PresharedKey"));

    let object = Object::Peer("office".into());
    let of_office = showconf(&scenario(), &object, &Shape::default()).unwrap();
    assert_eq!(
        of_office
            .matches(&format!("PresharedKey = {PSK}\n"))
            .count(),
        2
    );
    assert_eq!(of_office.matches("[Peer]").count(), 3);
}

#[test]
fn keepalives_are_seconds_and_names_stay_names_in_a_peer_object() {
    let yaml = |name: &str| {
        let object = Object::Peer(name.into());
        showconf(&scenario(), &object, &as_peer(Output::Yaml)).unwrap()
    };
    assert!(yaml("zlaptop").contains("  persistentKeepalive: 10\n"));
    assert!(!yaml("zlaptop").contains("endpoint"));
    assert!(yaml("office").contains("      dns: vpn.example.com\n    port: 51999\n"));
}

#[test]
fn a_node_that_does_not_lead_is_an_error_that_names_the_leader() {
    assert_eq!(
        node("node-agent-02", &Shape::default())
            .unwrap_err()
            .to_string(),
        "Node \"node-agent-02\" is not a leader node; \"node-agent-01\" leads location:nd"
    );
    assert_eq!(
        node("absent", &Shape::default()).unwrap_err().to_string(),
        "did not find any node named \"absent\" in the cluster"
    );
    let object = Object::Peer("absent".into());
    assert_eq!(
        showconf(&scenario(), &object, &Shape::default())
            .unwrap_err()
            .to_string(),
        "did not find any peer named \"absent\" in the cluster"
    );
}

#[test]
fn the_listening_port_is_the_nodes_own() {
    let mut topology = scenario();
    topology.segments[0].leaders[0].endpoint =
        Some(crate::cluster::annotation::endpoint("vpn.example.com:4500").unwrap());
    let object = Object::Node(NodeName("node-master".into()));
    let shown = |shape: &Shape| showconf(&topology, &object, shape).unwrap();

    assert!(shown(&Shape::default()).starts_with("[Interface]\nListenPort = 4500\n\n"));
    let port = Shape {
        listen_port: Some(1),
        ..Shape::default()
    };
    assert!(shown(&port).starts_with("[Interface]\nListenPort = 1\n\n"));
}

#[test]
fn yaml_scalars_read_back_as_the_same_string() {
    for text in [
        "laptop",
        "abba",
        "123",
        "1e3",
        "0x1f",
        "1.5",
        "10.42.1.0/24",
        "fd00::/64",
        "fd00::",
        "1:2:3:4:5:6:7:8",
        "true",
        "no",
        "n",
        "2001-01-01",
        "a.b-c",
        "10.5.0.1",
    ] {
        let yaml = format!("name: {}\n", scalar(text));
        let read: std::collections::BTreeMap<String, serde_yaml_ng::Value> =
            serde_yaml_ng::from_str(&yaml).unwrap();
        assert_eq!(read["name"].as_str(), Some(text), "{yaml}");
    }
    assert_eq!(scalar("abba"), "abba");
    assert_eq!(scalar("1:2:3:4:5:6:7:8"), "\"1:2:3:4:5:6:7:8\"");
    assert_eq!(scalar("10.42.1.0/24"), "10.42.1.0/24");
}
