//! A public server and three agents behind NAT, one of them leading.

use super::*;

#[test]
fn the_public_leader_has_tunnels_addresses_and_routes() {
    insta::assert_snapshot!(two_regions().commands("node-master"), @"
    ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
    sysctl -w net/ipv4/conf/kilo0/rp_filter=2
    ip link set kilo0 up
    ip addr add 10.4.0.1/32 dev kilo0 scope link
    ip addr add 10.42.0.0/32 dev kilo0
    wg set kilo0 listen-port 51820
    wg set kilo0 peer jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w= endpoint 198.51.100.7:24276 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
    nft -f -
    ip route replace table 5130 throw 10.42.0.0/24 proto 118
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.1.0/24 metric 4278198272 proto 118
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.2.0/24 metric 4278198272 proto 118
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.3.0/24 metric 4278198272 proto 118
    ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 192.168.50.11 metric 4278198272 proto 118
    ip route replace table 5130 192.168.50.12 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 192.168.50.12 metric 4278198272 proto 118
    ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 192.168.50.13 metric 4278198272 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn the_leader_behind_nat_also_routes_to_its_members() {
    insta::assert_snapshot!(two_regions().commands("node-agent-01"), @"
    ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
    sysctl -w net/ipv4/conf/kilo0/rp_filter=2
    ip link set kilo0 up
    ip addr add 10.4.0.2/32 dev kilo0 scope link
    ip addr add 10.42.1.0/32 dev kilo0
    wg set kilo0 listen-port 51820
    wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
    nft -f -
    ip route replace table 5130 throw 10.42.1.0/24 proto 118
    ip route replace table 5130 throw 10.42.2.0/24 proto 118
    ip route replace table 5130 throw 10.42.3.0/24 proto 118
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
    ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
    ip route replace table 5132 192.168.50.12 via 10.42.2.0 dev flannel.1 onlink proto 118
    ip route replace table 5132 192.168.50.13 via 10.42.3.0 dev flannel.1 onlink proto 118
    ip rule add pref 5190 from all iif kilo0 lookup 5132 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn a_follower_sends_remote_traffic_to_its_leader_by_flannel() {
    insta::assert_snapshot!(two_regions().commands("node-agent-02"), @"
    ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
    sysctl -w net/ipv4/conf/kilo0/rp_filter=2
    wg set kilo0 listen-port 51820
    nft -f -
    ip route replace table 5130 throw 10.42.1.0/24 proto 118
    ip route replace table 5130 throw 10.42.2.0/24 proto 118
    ip route replace table 5130 throw 10.42.3.0/24 proto 118
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
    ip route replace table 5131 203.0.113.10 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn the_plan_is_the_same_without_annotations_of_the_operator() {
    let annotated = two_regions();
    let mut bare = annotated.clone();
    for node in bare.snapshot.nodes.values_mut() {
        node.leader = false;
        node.persistent_keepalive = None;
        // What the agents published when they started.
        node.wireguard_ips.clear();
    }

    // A node with a public address alone is its own segment, sorted after all locations.
    let topology = bare.topology();
    let names = topology.leaders().map(|(segment, leader)| {
        format!(
            "{} {} {:?}\n",
            segment.name, leader.node, leader.wireguard_ips
        )
    });
    insta::assert_snapshot!(names.collect::<String>(), @"
    location:nd node-agent-01 [10.4.0.1]
    node:node-master node-master [10.4.0.2]
    ");
    let peers = |mesh: &Mesh, me: &str| {
        let peers = mesh.state(me).peers.into_values();
        let peers = peers.map(|p| (p.endpoint, p.persistent_keepalive));
        peers.collect::<Vec<_>>()
    };
    for me in ["node-master", "node-agent-01"] {
        assert_eq!(peers(&bare, me), peers(&annotated, me), "{me}");
    }
}

/// The reverse-path check of packets from there has no mark: if the address were routed into the tunnel, the kernel
/// would drop the tunnel's own datagrams.
#[test]
fn the_host_reaches_tunnel_endpoints_directly() {
    let mut mesh = two_regions();
    let about = |mesh: &Mesh| {
        let routes = routes(mesh, "node-master");
        let mut routes = routes.lines().filter(|line| line.contains("192.168.50.11"));
        routes.next().unwrap().to_owned()
    };
    insta::assert_snapshot!(about(&mesh), @"ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420");

    // No node has observed agent-01 yet, so its own endpoint counts.
    mesh.node("node-master").discovered_endpoints.clear();
    insta::assert_snapshot!(about(&mesh), @"ip route replace table 5131 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420");
}

#[test]
fn an_endpoint_on_another_nodes_address_takes_nothing_from_that_node() {
    let mut mesh = two_regions();
    let before = mesh.state("node-master").routes;
    let bad = node("z", "z", 9, "192.168.99.1/24")
        .with(|node| node.endpoint = addr("192.168.50.12:51820"));
    mesh.snapshot.nodes.insert(bad.name.clone(), bad);

    let after = mesh.state("node-master").routes;
    assert!(
        before
            .iter()
            .all(|(key, route)| after.get(key) == Some(route))
    );
}

#[test]
fn a_status_that_names_a_leaders_address_does_not_cut_it_off() {
    let mut mesh = two_regions();
    let nd = mesh.node("node-agent-01").public_key.unwrap();
    mesh.node("node-master").discovered_endpoints.clear();
    mesh.node("node-master")
        .internal_ips
        .push(ip("192.168.50.11"));

    let endpoint = |mesh: &Mesh| peer_with(&mesh.state("node-master"), nd).endpoint;
    let annotated = Some("192.168.50.11:51820".parse().unwrap());
    assert_eq!(endpoint(&mesh), annotated);

    // The control: a region on the same subnet has that address itself.
    let master = mesh.node("node-master");
    master.internal_ips = vec![ip("192.168.50.11")];
    master.private_ip = Some(net("192.168.50.11/24"));
    assert_eq!(endpoint(&mesh), None);
}

#[test]
fn behind_one_to_one_nat_every_region_uses_the_private_address() {
    let mut mesh = two_regions();
    let master = mesh.node("node-master");
    master.internal_ips = vec![ip("172.16.0.10")];
    master.private_ip = Some(net("172.16.0.10/24"));

    insta::assert_snapshot!(routes(&mesh, "node-agent-01"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.16.0.10 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5132 192.168.50.12 via 10.42.2.0 dev flannel.1 onlink
    ip route replace table 5132 192.168.50.13 via 10.42.3.0 dev flannel.1 onlink
    ");
    insta::assert_snapshot!(routes(&mesh, "node-agent-02"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 172.16.0.10 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ");
}

#[test]
fn the_firewall_holds_the_prefixes_of_the_own_and_of_other_regions() {
    insta::assert_debug_snapshot!(firewall(&two_regions(), "node-agent-01"), @r#"
    Firewall {
        tunnel: "kilo0",
        port: 51820,
        vxlan: {
            "flannel.1": 8472,
        },
        region_underlay: {
            192.168.50.11,
            192.168.50.12,
            192.168.50.13,
        },
        remote_pods: {
            10.42.0.0/24,
        },
        remote_nodes: {
            10.4.0.1/32,
            203.0.113.10/32,
        },
        mesh_nodes: {
            10.4.0.1/32,
        },
        region_pods: {
            10.42.2.0/24,
            10.42.3.0/24,
        },
        region_nodes: {
            192.168.50.12/32,
            192.168.50.13/32,
        },
        alias_pools: {},
        region_aliases: {},
        probes: {},
        local_pods: {
            10.42.1.0/24,
        },
        leader: true,
        fail_closed: true,
        masquerade_sources: {},
        masquerade_destinations: {},
        known: {},
        guard: Guard {
            hops: {
                10.42.2.0,
                10.42.3.0,
            },
            far: {
                10.4.0.1/32,
            },
            far_from_pods: {
                203.0.113.10/32,
            },
            near: {
                10.42.1.0/24,
                10.42.2.0/24,
                10.42.3.0/24,
            },
            wide: {
                10.42.0.0/16,
            },
            cluster: {
                10.42.0.0/16,
            },
        },
        vxlan_sources: {
            192.168.50.0/24,
            192.168.50.11/32,
            192.168.50.12/32,
            192.168.50.13/32,
        },
        region_devices: {
            "flannel.1",
        },
        peer_internet: false,
        relay: RelayDoor {
            from: {
                10.4.0.1,
            },
            to: {
                10.4.0.1,
            },
        },
    }
    "#);
}

#[test]
fn a_leader_behind_nat_is_reached_at_its_observed_endpoint() {
    let mut mesh = two_regions();
    let nd = mesh.node("node-agent-01").public_key.unwrap();
    let endpoint = |mesh: &Mesh| peer_with(&mesh.state("node-master"), nd).endpoint;
    let annotated = "192.168.50.11:51820".parse().unwrap();
    let elsewhere = "198.51.100.7:24276".parse().unwrap();
    let here = "198.51.100.7:31000".parse().unwrap();
    mesh.node("node-master").discovered_endpoints.clear();
    assert_eq!(endpoint(&mesh), Some(annotated));

    // A third region's public leader observed it.
    let third = node("z", "z", 9, "203.0.113.30/24")
        .with(|node| node.discovered_endpoints = [(nd, elsewhere)].into());
    mesh.snapshot.nodes.insert(third.name.clone(), third);
    assert_eq!(endpoint(&mesh), Some(elsewhere));

    // This node's own observation comes first.
    mesh.observed = [(nd, here)].into();
    assert_eq!(endpoint(&mesh), Some(here));
}

#[test]
fn leaders_behind_one_router_use_each_others_private_addresses() {
    let mut mesh = two_regions();
    mesh.node("node-agent-03").region = selvedge::topology::RegionName("edge".into());
    let nd = mesh.node("node-agent-01").public_key.unwrap();
    let edge = mesh.node("node-agent-03").public_key.unwrap();
    let seen = |port| format!("198.51.100.7:{port}").parse().unwrap();
    mesh.node("node-master").discovered_endpoints = [(nd, seen(1001)), (edge, seen(1003))].into();

    let endpoint = |me: &str, key| peer_with(&mesh.state(me), key).endpoint;
    let private = |last| Some(format!("192.168.50.{last}:51820").parse().unwrap());
    assert_eq!(endpoint("node-agent-01", edge), private(13));
    assert_eq!(endpoint("node-agent-03", nd), private(11));
    assert_eq!(endpoint("node-master", edge), Some(seen(1003)));
}

#[test]
fn a_public_leaders_observation_comes_before_those_of_others() {
    let mut mesh = two_regions();
    let gone = "203.0.113.40:1001".parse().unwrap();
    let here = "203.0.113.40:1002".parse().unwrap();
    let laptop = vpn_peer("laptop", 9, &["10.5.0.1/32"]);
    let key = laptop.public_key;
    mesh.add_peers([laptop]);
    mesh.node("node-agent-01").discovered_endpoints = [(key, gone)].into();
    mesh.node("node-agent-01").created = 0;
    let seen = &mut mesh.node("node-master").discovered_endpoints;
    seen.insert(key, here);

    assert_eq!(mesh.topology().peer_addresses[&key].discovered, Some(here));
}

#[test]
fn observations_of_followers_do_not_count() {
    let mut mesh = two_regions();
    let nd = mesh.node("node-agent-01").public_key.unwrap();
    let trap = "198.51.100.66:51820".parse().unwrap();
    for name in ["node-agent-02", "node-agent-03"] {
        mesh.node(name).discovered_endpoints = [(nd, trap)].into();
    }

    let state = mesh.state("node-master");
    assert_ne!(peer_with(&state, nd).endpoint, Some(trap));
}

#[test]
fn the_endpoint_of_a_public_leader_is_its_own_statement() {
    let mut mesh = two_regions();
    let master = mesh.node("node-master").public_key.unwrap();
    let trap = "198.51.100.66:51820".parse().unwrap();
    mesh.node("node-agent-01").discovered_endpoints = [(master, trap)].into();

    let state = mesh.state("node-agent-01");
    let endpoint = peer_with(&state, master).endpoint;
    assert_eq!(endpoint, Some("203.0.113.10:51820".parse().unwrap()));
}

#[test]
fn a_node_without_a_key_stays_in_its_region_and_other_regions_refuse_its_pods() {
    let mut mesh = two_regions();
    mesh.node("node-agent-03").public_key = None;
    mesh.node("node-agent-03").private_ip = None;

    let elsewhere = mesh.commands_of("node-master", ROUTES);
    let about = elsewhere
        .lines()
        .filter(|line| line.contains("10.42.3.0/24"));
    assert_eq!(
        about.collect::<Vec<_>>(),
        ["ip route replace table 5130 unreachable 10.42.3.0/24 metric 4278198272 proto 118"]
    );
    let near = mesh.commands_of("node-agent-02", ROUTES);
    let about = near.lines().filter(|line| line.contains("10.42.3.0"));
    assert_eq!(
        about.collect::<Vec<_>>(),
        ["ip route replace table 5130 throw 10.42.3.0/24 proto 118"]
    );
    assert!(
        firewall(&mesh, "node-agent-02")
            .region_underlay
            .contains(&ip("192.168.50.13"))
    );
}

#[test]
fn a_node_without_a_key_refuses_traffic_to_other_regions() {
    let mut mesh = two_regions();
    mesh.node("node-agent-03").public_key = None;

    insta::assert_snapshot!(mesh.commands("node-agent-03"), @"
    ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
    sysctl -w net/ipv4/conf/kilo0/rp_filter=2
    wg set kilo0 listen-port 51820
    nft -f -
    ip route replace table 5130 throw 10.42.1.0/24 proto 118
    ip route replace table 5130 throw 10.42.2.0/24 proto 118
    ip route replace table 5130 throw 10.42.3.0/24 proto 118
    ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
    ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn an_unknown_node_is_left_as_it_is() {
    let mesh = two_regions();
    let mut topology = mesh.topology();
    topology
        .segments
        .retain(|s| s.primary().node.0 != "node-master");

    assert_eq!(mesh.plan(&topology, &NodeName("node-master".into())), None);
}

#[test]
fn with_on_tunnel_down_open_flannel_carries_the_traffic() {
    let mut mesh = two_regions();
    mesh.local.on_tunnel_down = selvedge::policy::OnTunnelDown::Open;

    assert!(!mesh.commands("node-agent-02").contains("unreachable"));
    assert!(!firewall(&mesh, "node-agent-02").fail_closed);
}

#[test]
fn the_tunnel_listens_on_the_port_of_the_nodes_endpoint() {
    let mut mesh = two_regions();
    mesh.node("node-master").endpoint = addr("203.0.113.10:51999");

    let state = mesh.state("node-master");
    assert_eq!(state.listen_port.map(u16::from), Some(51999));
    assert_eq!(firewall(&mesh, "node-master").port, 51999);
}
