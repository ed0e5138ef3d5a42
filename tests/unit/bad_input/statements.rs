//! False statements of a node about itself, and their effect on the mesh: five nodes as in the lab, one of which
//! lies. Each case has a control, which shows the effect without the record or the declaration that decides.

use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::state::{Route, Table};
use selvedge::topology::{Claim, Ledger, Mode, Node, RegionName, Segment, SegmentName};

use super::*;
use crate::mesh::{With, addr, ip, key, net, node, peer_with, recorded};

/// The time at which all agents of the lab had recorded their claims, in Unix seconds.
const SETTLED: i64 = 1_700_000_000;

fn location(name: &str) -> SegmentName {
    SegmentName::Location(RegionName(name.into()))
}

/// Master is public; a1 and a2 are in nd, b1 and b2 in third, each behind a NAT. a1 and b1 lead.
fn lab() -> Mesh {
    let mut mesh = Mesh::new([
        node("master", "cloud", 1, "203.0.113.10/24").with(|node| node.endpoint_forced = true),
        node("a1", "nd", 2, "192.168.50.11/24"),
        node("a2", "nd", 3, "192.168.50.12/24"),
        node("b1", "third", 4, "192.168.77.21/24"),
        node("b2", "third", 5, "192.168.77.22/24"),
    ]);
    let wireguard = [
        ("a1", "10.4.0.1/16"),
        ("b1", "10.4.0.2/16"),
        ("master", "10.4.0.3/16"),
    ];
    for (name, address) in wireguard {
        mesh.node(name).wireguard_ips = vec![net(address)];
    }
    for node in mesh.snapshot.nodes.values_mut() {
        let mut claims = recorded(node, SETTLED)
            .iter()
            .map(|(c, at)| (c.clone(), at))
            .collect::<Vec<_>>();
        if ["a1", "b1"].contains(&node.name.0.as_str()) {
            claims.push((
                Claim::Lead(SegmentName::Location(node.region.clone())),
                SETTLED + 30,
            ));
        }
        node.ledger = Ledger::new(claims);
    }
    mesh.now = SETTLED + 1000;
    mesh.agreed.beside_kilo = false;
    mesh
}

/// The segment of a node.
fn segment(mesh: &Mesh, name: &str) -> Segment {
    let topology = mesh.topology();
    topology.segment_of(&NodeName(name.into())).unwrap().clone()
}

/// The nodes for which an address is carried.
fn carried_for(mesh: &Mesh, address: &str) -> Vec<String> {
    let address = ip(address);
    let segments = mesh.topology().segments;
    let nodes = segments.iter().flat_map(|segment| &segment.nodes);
    let nodes = nodes.filter(|node| node.addresses.contains(&address));
    nodes.map(|node| node.name.to_string()).collect()
}

/// The addresses to which a node may send VXLAN.
fn near(mesh: &Mesh, me: &str) -> BTreeSet<IpAddr> {
    match mesh.state(me).firewall.unwrap() {
        selvedge::state::Ruleset::Planned(firewall) => firewall.region_underlay,
        selvedge::state::Ruleset::Installed(_) => panic!("a plan holds what is planned"),
    }
}

/// All reports about a node, in one text.
fn said(mesh: &Mesh, name: &str) -> String {
    let topology = mesh.topology();
    let excluded = topology.excluded.iter().map(ToString::to_string);
    let overlaps = topology.overlaps.iter().map(ToString::to_string);
    let all = excluded.chain(overlaps);
    let about = all.filter(|text| text.starts_with(&format!("node {name}:")));
    about.collect::<Vec<_>>().join("\n")
}

/// Expects that the others keep their state: no peer of theirs loses a prefix except the liar's own.
fn expect_nothing_taken(before: &Mesh, after: &Mesh, liar: &str) {
    let (old, new) = (before.topology(), after.topology());
    let liar = &before.snapshot.nodes[&NodeName(liar.into())];
    let own = liar.internal_ips.iter().copied().map(IpNet::from);
    let own = own
        .chain(liar.pod_cidrs.iter().copied())
        .collect::<BTreeSet<_>>();
    for me in before.names().filter(|name| **name != liar.name) {
        let (old, new) = (
            before.plan(&old, me).unwrap(),
            after.plan(&new, me).unwrap(),
        );
        for (id, peer) in &old.peers {
            let now = &new.peers[id];
            assert_eq!(peer.endpoint, now.endpoint, "a peer of {me}");
            let kept = peer.routes.difference(&own);
            let lost = kept.filter(|net| !now.routes.contains(*net));
            assert_eq!(
                lost.collect::<Vec<_>>(),
                Vec::<&IpNet>::new(),
                "a peer of {me}"
            );
        }
        assert_eq!(old.addresses, new.addresses, "addresses of {me}");
    }
}

#[test]
fn a_node_that_looks_like_kilo_does_not_choose_the_algorithm() {
    let liar = |mesh: &mut Mesh| {
        let now = mesh.now;
        let a2 = mesh.node("a2");
        a2.ours = false;
        a2.last_seen = Some(now);
        a2.private_ip = Some(net("203.0.113.66/32"));
    };
    let before = lab();
    let mut mesh = before.clone();
    liar(&mut mesh);

    let topology = mesh.topology();
    assert_eq!(topology.mode, Mode::Native);
    assert_eq!(topology.foreign, [NodeName("a2".into())]);
    assert!(
        said(&mesh, "a2").contains("--beside-kilo"),
        "{}",
        said(&mesh, "a2")
    );
    assert!(carried_for(&mesh, "203.0.113.66").is_empty());
    expect_nothing_taken(&before, &mesh, "a2");

    // The control: the operator allows Kilo's algorithm, and it decides.
    mesh.agreed.beside_kilo = true;
    assert_eq!(
        mesh.topology().mode,
        Mode::Kilo(vec![NodeName("a2".into())])
    );
}

#[test]
fn a_last_seen_time_in_the_future_counts_as_absent() {
    let mut mesh = lab();
    mesh.agreed.beside_kilo = true;
    let now = mesh.now;
    for (last_seen, kilo) in [(9_999_999_999, false), (now + 61, false), (now + 60, true)] {
        let a2 = mesh.node("a2");
        a2.ours = false;
        a2.last_seen = Some(last_seen);
        let mode = mesh.topology().mode;
        assert_eq!(matches!(mode, Mode::Kilo(_)), kilo, "{last_seen}");
    }
}

#[test]
fn beside_kilo_a_node_gets_no_address_that_is_not_its_own() {
    let mut mesh = lab();
    mesh.agreed.beside_kilo = true;
    let now = mesh.now;
    for node in mesh.snapshot.nodes.values_mut() {
        node.last_seen = Some(now);
    }
    mesh.node("a2").ours = false;
    let own = "192.168.50.12";
    assert_eq!(carried_for(&mesh, own), ["a2"]);

    // An address of the internet, of the cluster, of another node.
    for stolen in ["203.0.113.66/32", "10.43.0.1/32", "192.168.77.21/24"] {
        mesh.node("a2").private_ip = Some(net(stolen));
        let address = net(stolen).addr().to_string();
        let holders = carried_for(&mesh, &address);
        assert!(
            !holders.contains(&"a2".to_owned()),
            "{stolen} is carried for {holders:?}"
        );
        assert!(!said(&mesh, "a2").is_empty(), "{stolen}");
    }
    // The same in the kubelet's status, for an address that b1 holds.
    mesh.node("a2").internal_ips = vec![ip("192.168.77.21")];
    mesh.node("a2").created = 0;
    assert!(!carried_for(&mesh, "192.168.77.21").contains(&"a2".to_owned()));
}

#[test]
fn a_public_address_in_a_status_is_carried_only_when_the_operator_declares_it() {
    let victim = "198.51.100.66";
    let mut mesh = lab();
    mesh.node("a2").internal_ips = vec![ip(victim)];

    assert!(carried_for(&mesh, victim).is_empty());
    assert!(
        said(&mesh, "a2").contains("--internal-cidr"),
        "{}",
        said(&mesh, "a2")
    );
    for me in ["master", "b1", "b2"] {
        let routes = mesh.state(me).routes;
        let routed = routes.keys().any(|key| key.dst.contains(&ip(victim)));
        assert!(!routed, "{me} routes it");
    }

    // The controls: each way to declare it.
    mesh.agreed.internal_cidrs = vec![net("198.51.100.66/32")];
    assert_eq!(carried_for(&mesh, victim), ["a2"]);
    mesh.agreed.internal_cidrs.clear();
    mesh.node("a2").endpoint = addr("198.51.100.66:51820");
    assert!(
        carried_for(&mesh, victim).is_empty(),
        "a published endpoint declares nothing"
    );
    mesh.node("a2").endpoint_forced = true;
    assert_eq!(carried_for(&mesh, victim), ["a2"]);
}

#[test]
fn an_older_node_takes_no_address_from_a_newer_one_that_holds_it() {
    let before = lab();
    let mut mesh = before.clone();
    // b1 is newer than a2, whose kubelet now names b1's address.
    let a2 = mesh.node("a2");
    a2.internal_ips = vec![ip("192.168.77.21")];
    a2.ledger = Ledger::new([(Claim::Address(ip("192.168.77.21")), SETTLED + 500)]);

    assert_eq!(carried_for(&mesh, "192.168.77.21"), ["b1"]);
    expect_nothing_taken(&before, &mesh, "a2");
    // Without a record a2 loses too.
    mesh.node("a2").ledger = Ledger::default();
    assert_eq!(carried_for(&mesh, "192.168.77.21"), ["b1"]);

    // The control: where nothing is recorded, the older object wins.
    mesh.node("b1").ledger = Ledger::default();
    assert_eq!(carried_for(&mesh, "192.168.77.21"), ["a2"]);
}

#[test]
fn an_old_node_takes_no_address_from_a_peer() {
    let mut mesh = lab();
    mesh.add_peers([crate::mesh::vpn_peer("laptop", 9, &["10.5.0.1/32"])
        .with(|peer| peer.created = SETTLED + 100)]);
    let allowed = |mesh: &Mesh| mesh.topology().peers[0].allowed_ips.clone();
    assert_eq!(allowed(&mesh), [net("10.5.0.1/32")]);

    let a2 = mesh.node("a2");
    a2.internal_ips = vec![ip("10.5.0.1")];
    assert_eq!(allowed(&mesh), [net("10.5.0.1/32")]);
    assert!(carried_for(&mesh, "10.5.0.1").is_empty());

    // The control: an address that a node held before the peer came.
    mesh.node("a2").ledger = Ledger::new([(Claim::Address(ip("10.5.0.1")), SETTLED)]);
    assert_eq!(carried_for(&mesh, "10.5.0.1"), ["a2"]);
}

#[test]
fn of_a_status_with_twenty_thousand_addresses_two_count() {
    let addresses = (0..20_000u32).map(|number| {
        let [_, b, c, d] = number.to_be_bytes();
        json!({"type": "InternalIP", "address": format!("10.{b}.{c}.{d}")})
    });
    let mut objects = objects();
    let few = objects.clone();
    let node = object(&mut objects, "node-agent-02");
    let mut all = node["status"]["addresses"].as_array().unwrap().clone();
    all.extend(addresses);
    node["status"]["addresses"] = json!(all);

    let owner = Object::Node(NodeName("node-agent-02".into()));
    expect_only("20,000 addresses", &objects, &few, &owner);
    let parsed = serde_json::from_value(object(&mut objects, "node-agent-02").clone()).unwrap();
    let (node, rejected) = node::parse(&parsed, &ParseSettings::default());
    assert_eq!(node.unwrap().internal_ips, [ip("192.168.50.12")]);
    assert_eq!(rejected.len(), 1, "{rejected:?}");
}

#[test]
fn an_address_that_only_flannels_annotation_names_is_not_in_the_region() {
    let lease = |address: &str| {
        let annotations = [
            ("flannel.alpha.coreos.com/public-ip", address),
            ("flannel.alpha.coreos.com/backend-type", "vxlan"),
            (
                "flannel.alpha.coreos.com/backend-data",
                r#"{"VNI":1,"VtepMAC":"9e:94:f2:d4:ca:3a"}"#,
            ),
            ("flannel.alpha.coreos.com/kube-subnet-manager", "true"),
        ];
        let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned()));
        selvedge::flannel::Lease::parse(&annotations.into(), |_, _, _| {})
    };
    let own = [ip("192.168.50.11"), ip("192.168.50.12")].into();
    let mut mesh = lab();
    assert_eq!(near(&mesh, "a1"), own);

    // The endpoint of master, the address of b1, one of the internet.
    for named in ["203.0.113.10", "192.168.77.21", "198.51.100.66"] {
        mesh.node("a2").lease = lease(named);
        assert!(mesh.node("a2").lease.is_some());
        assert_eq!(near(&mesh, "a1"), own, "{named}");
    }
    // Not even where this node is on one network with that leader.
    mesh.node("a2").lease = lease("203.0.113.10");
    mesh.connected = [net("203.0.113.0/24")].into();
    assert_eq!(near(&mesh, "a1"), own);
    let master = key(1);
    assert_eq!(
        peer_with(&mesh.state("a1"), master).endpoint,
        Some("203.0.113.10:51820".parse().unwrap())
    );

    // The control: flannel uses another interface on a network that a1 is connected to.
    mesh.node("a2").lease = lease("172.31.9.12");
    assert_eq!(near(&mesh, "a1"), own);
    mesh.connected = [net("172.31.9.0/24")].into();
    assert!(near(&mesh, "a1").contains(&ip("172.31.9.12")));
}

/// A node with the label of nd, on another network.
fn stranger(name: &str) -> Node {
    node(name, "nd", 9, "10.99.0.7/24").with(|node| {
        node.created = SETTLED + 500;
        node.ledger = recorded(node, SETTLED + 500);
    })
}

fn with_node(mesh: &Mesh, node: Node) -> Mesh {
    mesh.clone()
        .with(|mesh| drop(mesh.snapshot.nodes.insert(node.name.clone(), node)))
}

#[test]
fn a_node_with_anothers_region_label_gets_a_tunnel_and_no_clear_vxlan() {
    let before = lab();
    // Its name sorts first, so it used to lead the region.
    let mesh = with_node(&before, stranger("a0"));

    let own = segment(&mesh, "a0");
    assert_eq!(own.name, SegmentName::Node(NodeName("a0".into())));
    assert_eq!(segment(&mesh, "a1").primary().node.0, "a1");
    for me in ["a1", "a2"] {
        assert!(!near(&mesh, me).contains(&ip("10.99.0.7")), "{me}");
        let pods = mesh.state(me).routes.into_iter().find(|(key, route)| {
            key.table == Table::Mesh
                && key.dst == net("10.42.9.0/24")
                && matches!(route, Route::Unicast { .. })
        });
        assert!(pods.is_some(), "{me} reaches its pods through the mesh");
    }
    let sentence = said(&mesh, "a0");
    assert!(
        sentence.contains("192.168.50.0/24") && sentence.contains("--region-cidr"),
        "{sentence}"
    );
    for me in ["a1", "a2", "b1", "b2", "master"] {
        let me = NodeName(me.into());
        let (old, new) = (before.topology(), mesh.topology());
        let (old, new) = (
            before.plan(&old, &me).unwrap(),
            mesh.plan(&new, &me).unwrap(),
        );
        assert!(
            old.routes
                .iter()
                .all(|(key, route)| new.routes.get(key) == Some(route))
        );
    }

    // The controls: the operator puts it into the region, by its Node or by the region's networks.
    let located = stranger("a0").with(|node| node.region_declared = true);
    let mesh = with_node(&before, located);
    assert_eq!(segment(&mesh, "a0").name, location("nd"));
    assert!(near(&mesh, "a1").contains(&ip("10.99.0.7")));
    let mut mesh = with_node(&before, stranger("a0"));
    let networks = vec![net("192.168.50.0/24"), net("10.99.0.0/24")];
    mesh.agreed.region_networks = [(RegionName("nd".into()), networks)].into();
    assert_eq!(segment(&mesh, "a0").name, location("nd"));
}

#[test]
fn a_wide_link_or_an_older_object_does_not_change_a_regions_networks() {
    let before = lab();
    let liar = stranger("a0").with(|node| {
        node.created = 0;
        node.private_ip = Some(net("10.99.0.7/8"));
    });
    let mesh = with_node(&before, liar.clone());
    assert_eq!(
        segment(&mesh, "a0").name,
        SegmentName::Node(NodeName("a0".into()))
    );
    assert_eq!(segment(&mesh, "a2").name, location("nd"));

    // The control: where no membership is recorded, the oldest object decides the region's network.
    let mut mesh = with_node(&before, liar);
    for node in mesh.snapshot.nodes.values_mut() {
        node.ledger = Ledger::default();
    }
    assert_eq!(segment(&mesh, "a0").name, location("nd"));
}

#[test]
fn a_node_outside_of_the_declared_networks_gets_no_address() {
    let mut mesh = with_node(&lab(), stranger("a9"));
    assert_eq!(carried_for(&mesh, "10.99.0.7"), ["a9"]);
    let nd = RegionName("nd".into());
    mesh.agreed.region_networks = [(nd, vec![net("192.168.50.0/24")])].into();
    assert!(carried_for(&mesh, "10.99.0.7").is_empty());
    assert_eq!(
        segment(&mesh, "a9").name,
        SegmentName::Node(NodeName("a9".into()))
    );
}

#[test]
fn two_subnets_of_a_region_use_tunnels_until_the_operator_declares_them() {
    let mut mesh = Mesh::new([
        node("a1", "nd", 1, "192.168.50.11/24"),
        node("a2", "nd", 2, "192.168.51.12/24"),
        node("b1", "third", 3, "192.168.77.21/24"),
    ]);
    let names = |mesh: &Mesh| {
        let segments = mesh.topology().segments;
        segments
            .iter()
            .map(|s| s.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&mesh), ["location:nd", "location:third", "node:a2"]);
    let a2 = peer_with(&mesh.state("a1"), key(2)).clone();
    assert!(a2.routes.contains(&net("192.168.51.12/32")));

    let networks = vec![net("192.168.50.0/24"), net("192.168.51.0/24")];
    mesh.agreed.region_networks = [(RegionName("nd".into()), networks)].into();
    assert_eq!(names(&mesh), ["location:nd", "location:third"]);
}

#[test]
fn a_newcomer_whose_name_sorts_first_does_not_take_the_lead() {
    let inside = |node: Node| {
        let address = net("192.168.50.5/24");
        node.with(|node| {
            node.private_ip = Some(address);
            node.internal_ips = vec![address.addr()];
            node.ledger = recorded(node, SETTLED + 500);
        })
    };
    let before = lab();
    let newcomer = inside(stranger("a0"));
    let mesh = with_node(&before, newcomer.clone());
    assert_eq!(segment(&mesh, "a0").name, location("nd"));
    assert_eq!(segment(&mesh, "a0").primary().node.0, "a1");

    // Nor when it publishes a public endpoint, or states that it led before.
    let public = newcomer
        .clone()
        .with(|node| node.endpoint = addr("198.51.100.9:51820"));
    let mut mesh = with_node(&before, public);
    assert_eq!(segment(&mesh, "a0").primary().node.0, "a1");
    let a0 = mesh.node("a0");
    let claims = a0
        .ledger
        .iter()
        .map(|(claim, at)| (claim.clone(), at))
        .collect::<Vec<_>>();
    let lead = (Claim::Lead(location("nd")), SETTLED + 500);
    a0.ledger = Ledger::new(claims.into_iter().chain([lead]));
    assert_eq!(segment(&mesh, "a0").primary().node.0, "a1");

    // Nor when the leader is gone and another node of the region is there.
    mesh.node("a1").ready = false;
    mesh.node("a0").endpoint = None;
    mesh.node("a0").ledger = newcomer.ledger.clone();
    assert_eq!(segment(&mesh, "a0").primary().node.0, "a2");

    // The operator's annotation counts at once.
    let mut mesh = with_node(&before, newcomer.clone());
    mesh.node("a0").leader = true;
    assert_eq!(segment(&mesh, "a0").primary().node.0, "a0");
    let mut mesh = with_node(&before, newcomer.clone());
    mesh.node("a0").endpoint_forced = true;
    assert_eq!(segment(&mesh, "a0").primary().node.0, "a0");

    // The control: where nothing is recorded, the name decides.
    let mut mesh = with_node(&before, newcomer);
    for node in mesh.snapshot.nodes.values_mut() {
        node.ledger = Ledger::default();
    }
    assert_eq!(segment(&mesh, "a0").primary().node.0, "a0");
}

#[test]
fn in_a_region_that_starts_as_a_whole_the_first_by_name_leads() {
    let mut mesh = lab();
    for (name, since) in [("a1", SETTLED + 60), ("a2", SETTLED)] {
        let node = mesh.node(name);
        node.ledger = recorded(node, since);
    }
    assert_eq!(segment(&mesh, "a1").primary().node.0, "a1");
    // A minute later it is a newcomer.
    let a1 = mesh.node("a1");
    a1.ledger = recorded(a1, SETTLED + 61);
    assert_eq!(segment(&mesh, "a1").primary().node.0, "a2");
}

#[test]
fn an_older_node_takes_no_key_from_a_newer_one_that_holds_it() {
    let before = lab();
    let mut mesh = before.clone();
    // a2 is older than b1.
    let a2 = mesh.node("a2");
    a2.public_key = Some(key(4));
    let rest = a2
        .ledger
        .iter()
        .map(|(claim, at)| (claim.clone(), at))
        .collect::<Vec<_>>();
    let stolen = (Claim::Key(key(4)), SETTLED + 500);
    a2.ledger = Ledger::new(rest.into_iter().chain([stolen]));

    assert_eq!(segment(&mesh, "b1").primary().public_key(), key(4));
    assert_eq!(segment(&mesh, "b1").primary().node.0, "b1");
    assert!(mesh.topology().outsider(&NodeName("a2".into())).is_some());
    assert!(
        said(&mesh, "a2").contains("node b1"),
        "{}",
        said(&mesh, "a2")
    );
    expect_nothing_taken(&before, &mesh, "a2");

    // The control: where nothing is recorded, the older object gets the key, and b1 is excluded from the mesh.
    for node in mesh.snapshot.nodes.values_mut() {
        node.ledger = Ledger::default();
    }
    assert!(mesh.topology().outsider(&NodeName("b1".into())).is_some());
}

#[test]
fn an_older_node_takes_no_wireguard_address_from_a_leader() {
    let mut mesh = lab();
    // a2 is older than b1, and leads a region of its own now.
    let a2 = mesh.node("a2");
    a2.region = RegionName("other".into());
    a2.wireguard_ips = vec![net("10.4.0.2/16")];
    assert_eq!(
        segment(&mesh, "b1").primary().wireguard_ips,
        [ip("10.4.0.2")]
    );

    // The control: without records the older object renumbers b1.
    for node in mesh.snapshot.nodes.values_mut() {
        node.ledger = Ledger::default();
    }
    assert_eq!(
        segment(&mesh, "a2").primary().wireguard_ips,
        [ip("10.4.0.2")]
    );
    assert_ne!(
        segment(&mesh, "b1").primary().wireguard_ips,
        [ip("10.4.0.2")]
    );
}
