//! What each node of a known cluster does, as commands that a network engineer can review.
//!
//! Backstops (`unreachable …`) stand beside every route to another region; where a test is about
//! something else they are left out, and `tests/reconcile.rs` shows that none is missing.

use std::collections::{BTreeMap, BTreeSet};

use selvedge::diff::diff;
use selvedge::flannel::Backend;
use selvedge::plan::{Firewall, Ruleset, State};
use selvedge::topology::{Granularity, Node, NodeName};

#[expect(dead_code, reason = "every test binary uses its own part")]
mod mesh;

use mesh::{Mesh, With, addr, ip, key, lines, net, node, vpn_peer};

/// The routes, in all tables.
const ROUTES: &[&str] = &["ip route replace table", "ip -6 route replace table"];

fn scenario_000() -> Mesh {
    Mesh::from_yaml(include_str!("testdata/two-regions.yaml")).unwrap()
}

/// Routes without their backstops.
fn routes(mesh: &Mesh, me: &str) -> String {
    let all = mesh.commands_of(me, ROUTES);
    let lines = all.lines().filter(|line| !line.contains("unreachable"));
    lines
        .map(|line| line.replace(" proto 118", "") + "\n")
        .collect()
}

fn firewall(mesh: &Mesh, me: &str) -> Firewall {
    match mesh.state(me).firewall {
        Some(Ruleset::Planned(firewall)) => *firewall,
        other => panic!("no plan: {other:?}"),
    }
}

mod scenario_000 {
    use super::*;

    #[test]
    fn the_public_leader_has_tunnels_addresses_and_routes() {
        insta::assert_snapshot!(scenario_000().commands("node-master"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        ip link set kilo0 up
        ip addr add 10.4.0.1/32 dev kilo0 scope link
        ip addr add 10.42.0.0/32 dev kilo0
        wg set kilo0 listen-port 51820
        wg set kilo0 peer jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w= endpoint 198.51.100.7:24276 allowed-ips 10.4.0.2/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
        nft -f -
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.0.0/24 proto 118
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
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ");
    }

    #[test]
    fn the_leader_behind_nat_also_hands_on_to_its_members() {
        insta::assert_snapshot!(scenario_000().commands("node-agent-01"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        ip link set kilo0 up
        ip addr add 10.4.0.2/32 dev kilo0 scope link
        ip addr add 10.42.1.0/32 dev kilo0
        wg set kilo0 listen-port 51820
        wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
        nft -f -
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
        ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.1.0/24 proto 118
        ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
        ip route replace table 5132 192.168.50.12 via 10.42.2.0 dev flannel.1 onlink proto 118
        ip route replace table 5132 192.168.50.13 via 10.42.3.0 dev flannel.1 onlink proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5191 from all iif kilo0 lookup 5132 proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ");
    }

    #[test]
    fn a_follower_sends_everything_to_its_leader_by_flannel() {
        insta::assert_snapshot!(scenario_000().commands("node-agent-02"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        wg set kilo0 listen-port 51820
        nft -f -
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
        ip route replace table 5130 10.42.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.2.0/24 proto 118
        ip route replace table 5131 203.0.113.10 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ");
    }

    #[test]
    fn it_works_the_same_without_any_annotation_of_the_operator() {
        let annotated = scenario_000();
        let mut bare = annotated.clone();
        for node in bare.snapshot.nodes.values_mut() {
            node.leader = false;
            node.persistent_keepalive = None;
            // What the agents published when they started.
            node.wireguard_ips.clear();
        }

        // A node with a public address alone is its own segment, sorted after all locations.
        let names = bare.topology().segments;
        let names = names
            .iter()
            .map(|s| format!("{} {} {:?}\n", s.name, s.leader, s.wireguard_ips));
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

    /// The check of what arrives from there knows no mark: routed into the tunnel, the tunnel's own
    /// datagrams would be dropped.
    #[test]
    fn where_the_tunnel_sends_to_the_host_goes_directly() {
        let mut mesh = scenario_000();
        let about = |mesh: &Mesh| {
            let routes = routes(mesh, "node-master");
            let mut routes = routes.lines().filter(|line| line.contains("192.168.50.11"));
            routes.next().unwrap().to_owned()
        };
        insta::assert_snapshot!(about(&mesh), @"ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420");

        // Nobody has seen agent-01 yet, so it is where it says.
        mesh.node("node-master").discovered_endpoints.clear();
        insta::assert_snapshot!(about(&mesh), @"ip route replace table 5131 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420");
    }

    #[test]
    fn an_endpoint_on_somebody_elses_address_takes_nothing_from_them() {
        let mut mesh = scenario_000();
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
    fn a_leader_elsewhere_is_not_looked_for_on_a_node_of_the_own_region() {
        let mut mesh = scenario_000();
        let nd = mesh.node("node-agent-01").public_key.unwrap();
        mesh.node("node-master").discovered_endpoints.clear();
        mesh.node("node-master")
            .internal_ips
            .push(ip("192.168.50.11"));

        assert_eq!(mesh.state("node-master").peers[&nd].endpoint, None);
    }

    #[test]
    fn behind_one_to_one_nat_the_private_address_is_for_everybody() {
        let mut mesh = scenario_000();
        let master = mesh.node("node-master");
        master.internal_ips = vec![ip("172.16.0.10")];
        master.private_ip = Some(net("172.16.0.10/24"));

        insta::assert_snapshot!(routes(&mesh, "node-agent-01"), @"
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 throw 10.42.1.0/24
        ip route replace table 5130 172.16.0.10 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5132 192.168.50.12 via 10.42.2.0 dev flannel.1 onlink
        ip route replace table 5132 192.168.50.13 via 10.42.3.0 dev flannel.1 onlink
        ");
        insta::assert_snapshot!(routes(&mesh, "node-agent-02"), @"
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.42.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 throw 10.42.2.0/24
        ip route replace table 5130 172.16.0.10 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ");
    }

    #[test]
    fn the_firewall_knows_who_is_near_and_who_is_not() {
        insta::assert_debug_snapshot!(firewall(&scenario_000(), "node-agent-01"), @r#"
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
            region_pods: {
                10.42.2.0/24,
                10.42.3.0/24,
            },
            region_nodes: {
                192.168.50.12/32,
                192.168.50.13/32,
            },
            local_pods: {
                10.42.1.0/24,
            },
            leader: true,
            fail_closed: true,
            masquerade_sources: {},
            masquerade_destinations: {},
            known: {},
        }
        "#);
    }

    #[test]
    fn a_leader_behind_nat_is_sent_to_where_it_was_seen() {
        let mut mesh = scenario_000();
        let nd = mesh.node("node-agent-01").public_key.unwrap();
        let endpoint = |mesh: &Mesh| mesh.state("node-master").peers[&nd].endpoint;
        let annotated = "192.168.50.11:51820".parse().unwrap();
        let elsewhere = "198.51.100.7:24276".parse().unwrap();
        let here = "198.51.100.7:31000".parse().unwrap();
        mesh.node("node-master").discovered_endpoints.clear();
        assert_eq!(endpoint(&mesh), Some(annotated));

        // A third region's public leader saw it.
        let third = node("z", "z", 9, "203.0.113.30/24")
            .with(|node| node.discovered_endpoints = [(nd, elsewhere)].into());
        mesh.snapshot.nodes.insert(third.name.clone(), third);
        assert_eq!(endpoint(&mesh), Some(elsewhere));

        // What this node hears itself is better.
        mesh.observed = [(nd, here)].into();
        assert_eq!(endpoint(&mesh), Some(here));
    }

    #[test]
    fn followers_are_not_believed_what_they_saw() {
        let mut mesh = scenario_000();
        let nd = mesh.node("node-agent-01").public_key.unwrap();
        let trap = "198.51.100.66:51820".parse().unwrap();
        for name in ["node-agent-02", "node-agent-03"] {
            mesh.node(name).discovered_endpoints = [(nd, trap)].into();
        }

        let peer = &mesh.state("node-master").peers[&nd];
        assert_ne!(peer.endpoint, Some(trap));
    }

    #[test]
    fn nobody_says_where_a_public_leader_is_but_itself() {
        let mut mesh = scenario_000();
        let master = mesh.node("node-master").public_key.unwrap();
        let trap = "198.51.100.66:51820".parse().unwrap();
        mesh.node("node-agent-01").discovered_endpoints = [(master, trap)].into();

        let peer = &mesh.state("node-agent-01").peers[&master];
        assert_eq!(peer.endpoint, Some("203.0.113.10:51820".parse().unwrap()));
    }

    #[test]
    fn without_a_key_a_node_stays_near_and_its_pods_are_refused_elsewhere() {
        let mut mesh = scenario_000();
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
        assert!(!mesh.commands("node-agent-02").contains("10.42.3.0"));
        assert!(
            firewall(&mesh, "node-agent-02")
                .region_underlay
                .contains(&ip("192.168.50.13"))
        );
    }

    #[test]
    fn before_it_has_a_key_a_node_refuses_what_is_meant_for_other_regions() {
        let mut mesh = scenario_000();
        mesh.node("node-agent-03").public_key = None;

        insta::assert_snapshot!(mesh.commands("node-agent-03"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        wg set kilo0 listen-port 51820
        nft -f -
        ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
        ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.3.0/24 proto 118
        ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ");
    }

    #[test]
    fn a_node_the_cluster_does_not_know_is_left_as_it_is() {
        let mesh = scenario_000();
        let mut topology = mesh.topology();
        topology.segments.retain(|s| s.leader.0 != "node-master");

        assert_eq!(mesh.plan(&topology, &NodeName("node-master".into())), None);
    }

    #[test]
    fn open_on_request_means_that_flannel_takes_over() {
        let mut mesh = scenario_000();
        mesh.local.on_tunnel_down = selvedge::config::OnTunnelDown::Open;

        assert!(!mesh.commands("node-agent-02").contains("unreachable"));
        assert!(!firewall(&mesh, "node-agent-02").fail_closed);
    }

    #[test]
    fn the_tunnel_listens_on_the_port_of_the_nodes_endpoint() {
        let mut mesh = scenario_000();
        mesh.node("node-master").endpoint = addr("203.0.113.10:51999");

        let state = mesh.state("node-master");
        assert_eq!(state.listen_port.map(u16::from), Some(51999));
        assert_eq!(firewall(&mesh, "node-master").port, 51999);
    }
}

mod leaders {
    use super::*;

    fn leader_of(mesh: &Mesh, region: &str) -> String {
        let topology = mesh.topology();
        let mut segments = topology.segments.iter();
        let segment = segments.find(|s| s.name.to_string() == format!("location:{region}"));
        segment.unwrap().leader.0.clone()
    }

    #[test]
    fn a_leader_that_is_not_ready_or_has_no_key_or_is_gone_is_replaced() {
        let lost: [fn(&mut Mesh); 3] = [
            |mesh| mesh.node("node-agent-01").ready = false,
            |mesh| mesh.node("node-agent-01").public_key = None,
            |mesh| {
                mesh.snapshot
                    .nodes
                    .remove(&NodeName("node-agent-01".into()));
            },
        ];
        for lose in lost {
            let mut mesh = scenario_000();
            assert_eq!(leader_of(&mesh, "nd"), "node-agent-01");
            lose(&mut mesh);
            assert_eq!(leader_of(&mesh, "nd"), "node-agent-02");
        }
    }

    #[test]
    fn where_no_node_is_ready_the_operators_choice_goes_on() {
        let mut mesh = scenario_000();
        for node in mesh.snapshot.nodes.values_mut() {
            node.ready = false;
        }
        assert_eq!(leader_of(&mesh, "nd"), "node-agent-01");
    }

    #[test]
    fn they_are_chosen_in_kilos_order() {
        let name = |change: fn(&mut Vec<Node>)| {
            let mut nodes = ["a", "b", "c"].map(|name| {
                let seed = name.as_bytes()[0] - b'a';
                node(name, "r", seed, &format!("192.168.0.{seed}/24"))
            });
            let mut list = nodes.to_vec();
            change(&mut list);
            nodes.clone_from_slice(&list);
            leader_of(&Mesh::new(nodes), "r")
        };
        assert_eq!(name(|_| ()), "a");
        assert_eq!(name(|n| n[1].endpoint = addr("203.0.113.1:1")), "b");
        assert_eq!(
            name(|n| {
                n[1].endpoint = addr("203.0.113.1:1");
                n[2].leader = true;
            }),
            "c"
        );
        assert_eq!(
            name(|n| {
                n[1].leader = true;
                n[2].leader = true;
                n[2].endpoint = addr("203.0.113.1:1");
            }),
            "c"
        );
    }

    #[test]
    fn followers_move_to_a_new_leader_without_a_hole() {
        let before = scenario_000();
        let mut after = before.clone();
        after.node("node-agent-01").ready = false;

        let changes = |me: &str| lines(&diff(&before.state(me), &after.state(me)));
        insta::assert_snapshot!(changes("node-agent-03"), @"
        ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
        ip route replace table 5130 10.4.0.3 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.3 metric 4278198272 proto 118
        ip route replace table 5130 10.42.0.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
        ip route replace table 5131 203.0.113.10 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
        ip route del table 5130 10.4.0.2 proto 118
        ip route del table 5130 10.4.0.2 metric 4278198272 proto 118
        ");
        insta::assert_snapshot!(changes("node-agent-02"), @"
        ip link set kilo0 up
        ip addr add 10.4.0.3/32 dev kilo0 scope link
        ip addr add 10.42.2.0/32 dev kilo0
        wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
        nft -f -
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5132 192.168.50.11 via 10.42.1.0 dev flannel.1 onlink proto 118
        ip route replace table 5132 192.168.50.13 via 10.42.3.0 dev flannel.1 onlink proto 118
        ip rule add pref 5191 from all iif kilo0 lookup 5132 proto 118
        ip route del table 5130 10.4.0.2 proto 118
        ip route del table 5130 10.4.0.2 metric 4278198272 proto 118
        ");
        insta::assert_snapshot!(changes("node-agent-01"), @"
        nft -f -
        ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 10.4.0.3 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.3 metric 4278198272 proto 118
        ip route replace table 5130 10.42.0.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5131 203.0.113.10 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
        ip rule del pref 5191 from all iif kilo0 lookup 5132 proto 118
        ip route del table 5132 192.168.50.12 proto 118
        ip route del table 5132 192.168.50.13 proto 118
        wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= remove
        ip addr del 10.4.0.2/32 dev kilo0
        ip addr del 10.42.1.0/32 dev kilo0
        ip link set kilo0 down
        ");
        insta::assert_snapshot!(changes("node-master"), @"
        wg set kilo0 peer h/wYe0dl8DAI8SLTR2E+bEkgxVvTFwS0ArNTXESFtFw= endpoint 192.168.50.12:51820 allowed-ips 10.4.0.3/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
        nft -f -
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.3 metric 4278198272 proto 118
        ip route replace table 5130 10.42.1.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5130 192.168.50.11 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5130 192.168.50.13 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5131 192.168.50.12 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420 proto 118
        ip route replace table 5131 unreachable 192.168.50.12 metric 4278198272 proto 118
        ip route del table 5130 10.4.0.2 proto 118
        ip route del table 5130 10.4.0.2 metric 4278198272 proto 118
        ip route del table 5130 192.168.50.12 proto 118
        ip route del table 5130 192.168.50.12 metric 4278198272 proto 118
        wg set kilo0 peer jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w= remove
        ");
    }
}

mod wireguard_addresses {
    use super::*;

    fn addresses(mesh: &Mesh) -> BTreeMap<String, String> {
        let topology = mesh.topology();
        let segments = topology.segments.into_iter();
        segments
            .map(|s| (s.leader.0, s.wireguard_ips[0].to_string()))
            .collect()
    }

    fn regions(names: &[&str]) -> Mesh {
        let nodes = names.iter().enumerate().map(|(index, name)| {
            let seed = u8::try_from(index).unwrap() + 1;
            node(name, name, seed, &format!("192.168.{seed}.1/24"))
        });
        Mesh::new(nodes)
    }

    #[test]
    fn a_new_mesh_is_numbered_as_kilo_does() {
        let mesh = regions(&["d", "b", "a", "c"]);
        let expected = [
            ("a", "10.4.0.1"),
            ("b", "10.4.0.2"),
            ("c", "10.4.0.3"),
            ("d", "10.4.0.4"),
        ];
        assert_eq!(
            addresses(&mesh),
            expected.map(|(n, a)| (n.to_owned(), a.to_owned())).into()
        );
    }

    #[test]
    fn who_joins_or_leaves_renumbers_nobody() {
        let mut mesh = regions(&["b", "d"]);
        mesh.node("b").wireguard_ips = vec![net("10.4.0.1/16")];
        mesh.node("d").wireguard_ips = vec![net("10.4.0.2/16")];
        let newcomers = [
            node("a", "a", 8, "192.168.8.1/24"),
            node("c", "c", 9, "192.168.9.1/24"),
        ];
        let newcomers = newcomers.map(|node| (node.name.clone(), node));
        mesh.snapshot.nodes.extend(newcomers);
        mesh.snapshot.nodes.remove(&NodeName("b".into()));

        let expected = [("a", "10.4.0.1"), ("c", "10.4.0.3"), ("d", "10.4.0.2")];
        assert_eq!(
            addresses(&mesh),
            expected.map(|(n, a)| (n.to_owned(), a.to_owned())).into()
        );
    }

    #[test]
    fn of_two_equal_wishes_the_older_nodes_is_granted() {
        let mut mesh = regions(&["b", "a"]);
        for name in ["a", "b"] {
            mesh.node(name).wireguard_ips = vec![net("10.4.0.7/16")];
        }
        let expected = [("a", "10.4.0.1"), ("b", "10.4.0.7")];
        assert_eq!(
            addresses(&mesh),
            expected.map(|(n, a)| (n.to_owned(), a.to_owned())).into()
        );
        let excluded = mesh.topology().excluded;
        let sentences = excluded.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            sentences,
            ["node a: left out WireGuard address 10.4.0.7: claimed by node b before"]
        );
    }

    #[test]
    fn addresses_that_no_host_can_have_are_not_granted() {
        for wish in ["10.5.0.1/16", "10.4.0.0/16", "10.4.255.255/16"] {
            let mut mesh = regions(&["a"]);
            mesh.node("a").wireguard_ips = vec![net(wish)];
            assert_eq!(addresses(&mesh)["a"], "10.4.0.1", "{wish}");
            assert_eq!(mesh.topology().excluded.len(), 1, "{wish}");
        }
    }

    #[test]
    fn without_one_a_leader_still_works() {
        let mut mesh = regions(&["a", "b", "c"]);
        mesh.agreed.subnets = vec![net("10.4.0.0/30")];

        let topology = mesh.topology();
        assert!(topology.segments[2].wireguard_ips.is_empty());
        insta::assert_snapshot!(topology.excluded[0], @"node c: left out WireGuard address 10.4.0.0: no address is left in --subnet; choose a larger one");
        insta::assert_snapshot!(routes(&mesh, "a"), @"
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 throw 10.42.1.0/24
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.42.3.0/24 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5131 192.168.2.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5131 192.168.3.1 dev kilo0 src 10.42.1.0 mtu 1420
        ");
    }
}

mod backends {
    use super::*;

    /// `a` leads two followers, one of them in another subnet; `b` is elsewhere.
    fn mesh() -> Mesh {
        Mesh::new([
            node("a1", "a", 1, "192.168.1.1/24").with(|n| n.endpoint = addr("203.0.113.1:51820")),
            node("a2", "a", 2, "192.168.1.2/24"),
            node("a3", "a", 3, "192.168.2.3/24"),
            node("b1", "b", 4, "172.16.0.1/24").with(|n| n.endpoint = addr("203.0.113.4:51820")),
        ])
    }

    #[test]
    fn with_vxlan_everything_inside_a_region_is_encapsulated() {
        let mesh = mesh();
        insta::assert_snapshot!(routes(&mesh, "a1"), @"
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 throw 10.42.1.0/24
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5132 192.168.1.2 via 10.42.2.0 dev flannel.1 onlink
        ip route replace table 5132 192.168.2.3 via 10.42.3.0 dev flannel.1 onlink
        ");
        insta::assert_snapshot!(routes(&mesh, "a3"), @"
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 throw 10.42.3.0/24
        ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ");
    }

    #[test]
    fn with_direct_routing_only_other_subnets_are() {
        let mut mesh = mesh();
        mesh.direct_routing = true;
        insta::assert_snapshot!(routes(&mesh, "a1"), @"
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 throw 10.42.1.0/24
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5132 192.168.2.3 via 10.42.3.0 dev flannel.1 onlink
        ");
        insta::assert_snapshot!(routes(&mesh, "a2"), @"
        ip route replace table 5130 10.4.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
        ip route replace table 5130 throw 10.42.2.0/24
        ip route replace table 5130 10.42.4.0/24 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
        ip route replace table 5130 172.16.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
        ");
        insta::assert_snapshot!(routes(&mesh, "a3"), @"
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 throw 10.42.3.0/24
        ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ");
    }

    #[test]
    fn with_host_gw_nothing_is_and_followers_hold_their_address_on_the_tunnels_link() {
        let mut mesh = mesh();
        mesh.snapshot.nodes.remove(&NodeName("a3".into()));
        mesh.backend = Backend::HostGw;
        insta::assert_snapshot!(mesh.commands("a1"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        ip link set kilo0 up
        ip addr add 10.4.0.1/32 dev kilo0 scope link
        ip addr add 10.42.1.0/32 dev kilo0
        wg set kilo0 listen-port 51820
        wg set kilo0 peer BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ= endpoint 203.0.113.4:51820 allowed-ips 10.4.0.2/32,10.42.4.0/24,172.16.0.1/32
        nft -f -
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.1.0/24 proto 118
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
        ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ");
        insta::assert_snapshot!(mesh.commands("a2"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        ip link set kilo0 up
        ip addr add 10.42.2.0/32 dev kilo0
        wg set kilo0 listen-port 51820
        nft -f -
        ip route replace table 5130 10.4.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
        ip route replace table 5130 10.4.0.2 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.2.0/24 proto 118
        ip route replace table 5130 10.42.4.0/24 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
        ip route replace table 5130 172.16.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ");
    }

    #[test]
    fn never_encapsulating_goes_to_the_leaders_own_address_where_it_is_near() {
        let mut mesh = mesh();
        mesh.local.encapsulation = selvedge::config::Encapsulation::Never;
        insta::assert_snapshot!(routes(&mesh, "a2"), @"
        ip route replace table 5130 10.4.0.1 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 throw 10.42.2.0/24
        ip route replace table 5130 10.42.4.0/24 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 172.16.0.1 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
        ");
        // Not on the same link: flannel's way is the only one.
        insta::assert_snapshot!(routes(&mesh, "a3"), @"
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 throw 10.42.3.0/24
        ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ");
    }

    #[test]
    fn a_follower_without_flannels_device_refuses_rather_than_leaks() {
        let mesh = mesh();
        let topology = mesh.topology();
        let me = NodeName("a2".into());
        let mut flannel = mesh.flannel(&me);
        flannel.vteps.clear();
        flannel.next_hops.clear();
        let state = selvedge::plan::plan(&selvedge::plan::Inputs {
            topology: &topology,
            me: &me,
            flannel: &flannel,
            settings: &mesh.local,
            api_servers: &BTreeSet::new(),
            observed: &BTreeMap::new(),
        });
        let routes = lines(&diff(&State::default(), &state.unwrap()));
        assert!(routes.contains("unreachable 10.42.4.0/24"));
        assert!(!routes.contains("via"));
    }

    #[test]
    fn a_route_that_flannel_lost_is_taken_to_come_back() {
        let mesh = mesh();
        let topology = mesh.topology();
        let me = NodeName("a2".into());
        let mut flannel = mesh.flannel(&me);
        flannel.next_hops.clear();
        let state = selvedge::plan::plan(&selvedge::plan::Inputs {
            topology: &topology,
            me: &me,
            flannel: &flannel,
            settings: &mesh.local,
            api_servers: &BTreeSet::new(),
            observed: &BTreeMap::new(),
        });
        assert_eq!(state, Some(mesh.state("a2")));
    }

    #[test]
    fn dual_stack_takes_both_ways() {
        let mut mesh = mesh();
        mesh.agreed.subnets.push(net("fd04::/64"));
        for (index, node) in mesh.snapshot.nodes.values_mut().enumerate() {
            node.pod_cidrs
                .push(net(&format!("fd42:0:0:{}::/64", index + 1)));
            node.internal_ips.push(ip(&format!("fd00:{index}::1")));
        }
        insta::assert_snapshot!(mesh.commands("a1"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        sysctl -w net/ipv6/conf/kilo0/addr_gen_mode=1
        ip link set kilo0 up
        ip addr add 10.4.0.1/32 dev kilo0 scope link
        ip addr add 10.42.1.0/32 dev kilo0
        ip addr add fd04::1/128 dev kilo0
        ip addr add fd42:0:0:1::/128 dev kilo0
        wg set kilo0 listen-port 51820
        wg set kilo0 peer BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ= endpoint 203.0.113.4:51820 allowed-ips 10.4.0.2/32,10.42.4.0/24,172.16.0.1/32,fd00:3::1/128,fd04::2/128,fd42:0:0:4::/64
        nft -f -
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.1.0/24 proto 118
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
        ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
        ip -6 route replace table 5130 fd00:3::1 via fd04::2 dev kilo0 onlink src fd42:0:0:1:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd00:3::1 metric 4278198272 proto 118
        ip -6 route replace table 5130 fd04::2 dev kilo0 src fd42:0:0:1:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd04::2 metric 4278198272 proto 118
        ip -6 route replace table 5130 throw fd42:0:0:1::/64 metric 512 proto 118
        ip -6 route replace table 5130 fd42:0:0:4::/64 via fd04::2 dev kilo0 onlink src fd42:0:0:1:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd42:0:0:4::/64 metric 4278198272 proto 118
        ip route replace table 5132 192.168.1.2 via 10.42.2.0 dev flannel.1 onlink proto 118
        ip route replace table 5132 192.168.2.3 via 10.42.3.0 dev flannel.1 onlink proto 118
        ip -6 route replace table 5132 fd00:1::1 via fd42:0:0:2:: dev flannel-v6.1 onlink metric 512 proto 118
        ip -6 route replace table 5132 fd00:2::1 via fd42:0:0:3:: dev flannel-v6.1 onlink metric 512 proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip -6 rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5191 from all iif kilo0 lookup 5132 proto 118
        ip -6 rule add pref 5191 from all iif kilo0 lookup 5132 proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip -6 rule add pref 5192 from fd42::/48 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ip -6 rule add pref 5193 from all lookup 5130 proto 118
        ");
        insta::assert_snapshot!(mesh.commands("a2"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        sysctl -w net/ipv6/conf/kilo0/addr_gen_mode=1
        wg set kilo0 listen-port 51820
        nft -f -
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.2.0/24 proto 118
        ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
        ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
        ip -6 route replace table 5130 fd00:3::1 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd00:3::1 metric 4278198272 proto 118
        ip -6 route replace table 5130 fd04::1 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd04::1 metric 4278198272 proto 118
        ip -6 route replace table 5130 fd04::2 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd04::2 metric 4278198272 proto 118
        ip -6 route replace table 5130 throw fd42:0:0:2::/64 metric 512 proto 118
        ip -6 route replace table 5130 fd42:0:0:4::/64 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd42:0:0:4::/64 metric 4278198272 proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip -6 rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip -6 rule add pref 5192 from fd42::/48 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ip -6 rule add pref 5193 from all lookup 5130 proto 118
        ");
    }

    #[test]
    fn an_ipv6_cluster_has_nothing_of_ipv4() {
        let mut mesh = mesh();
        for (index, node) in mesh.snapshot.nodes.values_mut().enumerate() {
            node.pod_cidrs = vec![net(&format!("fd42:0:0:{}::/64", index + 1))];
        }
        // The underlay is IPv4 all the same.
        insta::assert_snapshot!(mesh.commands("a1"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        sysctl -w net/ipv6/conf/kilo0/addr_gen_mode=1
        ip link set kilo0 up
        ip addr add fd42:0:0:1::/128 dev kilo0
        wg set kilo0 listen-port 51820
        wg set kilo0 peer BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ= endpoint 203.0.113.4:51820 allowed-ips 10.4.0.2/32,fd42:0:0:4::/64
        nft -f -
        ip -6 route replace table 5130 throw fd42:0:0:1::/64 metric 512 proto 118
        ip -6 route replace table 5130 fd42:0:0:4::/64 dev kilo0 src fd42:0:0:1:: mtu 1420 metric 512 proto 118
        ip -6 route replace table 5130 unreachable fd42:0:0:4::/64 metric 4278198272 proto 118
        ip -6 rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip -6 rule add pref 5192 from fd42::/48 lookup 5131 proto 118
        ip -6 rule add pref 5193 from all lookup 5130 proto 118
        ");
    }
}

mod regions {
    use super::*;

    fn three_regions() -> Mesh {
        let mut mesh = scenario_000();
        mesh.snapshot.nodes.extend(
            [
                node("node-b-01", "home", 4, "192.168.77.21/24"),
                node("node-b-02", "home", 5, "192.168.77.22/24"),
            ]
            .map(|node| {
                let node = node.with(|node| node.created = 1 << 40);
                (node.name.clone(), node)
            }),
        );
        mesh
    }

    #[test]
    fn a_third_behind_its_own_nat_joins() {
        let mesh = three_regions();
        insta::assert_snapshot!(routes(&mesh, "node-master"), @"
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.0.0 mtu 1420
        ip route replace table 5130 throw 10.42.0.0/24
        ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.5.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 192.168.50.12 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 192.168.77.22 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5131 192.168.77.21 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ");
        insta::assert_snapshot!(mesh.commands("node-b-01"), @"
        ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
        sysctl -w net/ipv4/conf/kilo0/rp_filter=2
        ip link set kilo0 up
        ip addr add 10.4.0.3/32 dev kilo0 scope link
        ip addr add 10.42.4.0/32 dev kilo0
        wg set kilo0 listen-port 51820
        wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
        wg set kilo0 peer jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w= endpoint 198.51.100.7:24276 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
        nft -f -
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
        ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
        ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.1.0/24 metric 4278198272 proto 118
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.2.0/24 metric 4278198272 proto 118
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 10.42.3.0/24 metric 4278198272 proto 118
        ip route replace table 5130 throw 10.42.4.0/24 proto 118
        ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 192.168.50.11 metric 4278198272 proto 118
        ip route replace table 5130 192.168.50.12 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 192.168.50.12 metric 4278198272 proto 118
        ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5130 unreachable 192.168.50.13 metric 4278198272 proto 118
        ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
        ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
        ip route replace table 5132 192.168.77.22 via 10.42.5.0 dev flannel.1 onlink proto 118
        ip rule add pref 5190 from all fwmark 0x51e00000 lookup main proto 118
        ip rule add pref 5191 from all iif kilo0 lookup 5132 proto 118
        ip rule add pref 5192 from 10.42.0.0/16 lookup 5131 proto 118
        ip rule add pref 5193 from all lookup 5130 proto 118
        ");
    }

    #[test]
    fn with_the_same_subnet_pods_are_carried_and_nothing_near_is_captured() {
        let mut mesh = three_regions();
        for (name, address) in [
            ("node-b-01", "192.168.50.11/24"),
            ("node-b-02", "192.168.50.12/24"),
        ] {
            let node = mesh.node(name);
            node.private_ip = Some(net(address));
            node.internal_ips = vec![net(address).addr()];
            node.endpoint = addr(&format!("{}:51820", net(address).addr()));
        }

        let overlaps = mesh.topology().overlaps;
        let overlaps = overlaps.iter().map(|overlap| format!("{overlap}\n"));
        insta::assert_snapshot!(overlaps.collect::<String>(), @"
        node node-b-01: other regions cannot reach it by 192.168.50.11, which is node node-agent-01's address too; 10.42.4.0 reaches it from everywhere
        node node-b-02: other regions cannot reach it by 192.168.50.12, which is node node-agent-02's address too; 10.42.5.0 reaches it from everywhere
        ");
        // The older nodes keep what they had; the newer ones' pods are reached all the same.
        insta::assert_snapshot!(routes(&mesh, "node-master"), @"
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.0.0 mtu 1420
        ip route replace table 5130 throw 10.42.0.0/24
        ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 10.42.5.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 192.168.50.12 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
        ");
        // Nobody's own subnet is looked for elsewhere, except the one address nobody here has.
        insta::assert_snapshot!(routes(&mesh, "node-b-01"), @"
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5130 throw 10.42.4.0/24
        ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ");
        insta::assert_snapshot!(routes(&mesh, "node-agent-02"), @"
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.4.0.3 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.42.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 throw 10.42.2.0/24
        ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.42.5.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5131 203.0.113.10 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ");
    }

    #[test]
    fn an_api_server_elsewhere_is_reached_directly_by_the_host_and_by_tunnel_for_pods() {
        let mut mesh = scenario_000();
        let master = mesh.node("node-master");
        master.internal_ips = vec![ip("172.16.0.10")];
        master.private_ip = Some(net("172.16.0.10/24"));
        mesh.api_servers = [ip("172.16.0.10")].into();

        let routes = routes(&mesh, "node-agent-02");
        let about = routes.lines().filter(|line| line.contains("172.16.0.10"));
        assert_eq!(
            about.collect::<Vec<_>>(),
            [
                "ip route replace table 5131 172.16.0.10 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420"
            ]
        );
    }
}

mod locations {
    use super::*;

    /// `a` offers its storage network and an address; `b` is elsewhere.
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
    fn what_a_location_offers_is_carried_but_nothing_near_is_captured() {
        let mut mesh = mesh();
        mesh.api_servers = [ip("192.168.9.9")].into();
        insta::assert_snapshot!(routes(&mesh, "b1"), @"
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.6.0.1 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.42.1.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 throw 10.42.2.0/24
        ip route replace table 5130 192.168.0.0/16 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 throw 192.168.1.1
        ip route replace table 5130 throw 192.168.2.0/24
        ip route replace table 5130 throw 192.168.2.1
        ip route replace table 5130 throw 192.168.2.2
        ip route replace table 5130 throw 192.168.9.9
        ip route replace table 5131 192.168.1.1 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5131 192.168.9.9 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5132 192.168.2.2 via 10.42.3.0 dev flannel.1 onlink
        ");
        insta::assert_snapshot!(routes(&mesh, "b2"), @"
        ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 10.6.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 10.42.1.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 throw 10.42.3.0/24
        ip route replace table 5130 192.168.0.0/16 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 192.168.1.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ip route replace table 5130 throw 192.168.2.0/24
        ip route replace table 5130 throw 192.168.2.1
        ip route replace table 5130 throw 192.168.2.2
        ip route replace table 5130 throw 192.168.9.9
        ip route replace table 5131 192.168.9.9 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
        ");
    }

    #[test]
    fn what_goes_to_it_is_masqueraded_by_its_leader() {
        let mesh = mesh();
        let firewall = firewall(&mesh, "a1");
        assert_eq!(
            firewall.masquerade_destinations,
            [net("10.6.0.1/32"), net("192.168.0.0/16")].into()
        );
        assert!(firewall.known.contains(&net("192.168.2.1/32")));
        assert!(
            super::firewall(&mesh, "b1")
                .masquerade_destinations
                .is_empty()
        );
    }

    #[test]
    fn of_two_overlapping_claims_the_older_one_stays() {
        let mut mesh = mesh();
        mesh.node("b2").allowed_location_ips = vec![net("10.6.0.0/24"), net("10.7.0.0/24")];

        let topology = mesh.topology();
        assert_eq!(
            topology.segments[1].allowed_location_ips,
            [net("10.7.0.0/24")]
        );
        insta::assert_snapshot!(topology.excluded[0], @"node b2: left out allowed location IPs 10.6.0.0/24: claimed by node a1 before");
    }
}

mod peers {
    use super::*;

    fn mesh() -> Mesh {
        let mut mesh = scenario_000();
        mesh.add_peers([
            vpn_peer("office", 100, &["10.6.0.0/24", "10.5.0.1/32"])
                .with(|peer| peer.endpoint = addr("198.51.100.80:51999")),
            vpn_peer("zlaptop", 101, &["10.5.0.1/32", "10.5.0.2/32"]),
        ]);
        mesh
    }

    #[test]
    fn every_leader_has_them_and_followers_go_through_theirs() {
        let mesh = mesh();
        insta::assert_snapshot!(mesh.commands_of("node-agent-01", &["wg"]), @"
        wg set kilo0 listen-port 51820
        wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
        wg set kilo0 peer ZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGQ= endpoint 198.51.100.80:51999 persistent-keepalive 25 allowed-ips 10.5.0.1/32,10.6.0.0/24
        wg set kilo0 peer ZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWU= persistent-keepalive 25 allowed-ips 10.5.0.2/32
        ");
        let about = |me: &str| {
            let routes = routes(&mesh, me);
            let about = routes
                .lines()
                .filter(|l| l.contains(" 10.5.0") || l.contains(" 10.6.0"));
            about.map(|line| format!("{line}\n")).collect::<String>()
        };
        insta::assert_snapshot!(about("node-agent-01"), @"
        ip route replace table 5130 10.5.0.1 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.5.0.2 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.6.0.0/24 dev kilo0 src 10.42.1.0 mtu 1420
        ");
        insta::assert_snapshot!(about("node-agent-02"), @"
        ip route replace table 5130 10.5.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.5.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.6.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ");
    }

    #[test]
    fn of_two_equal_claims_the_older_peers_stays() {
        let excluded = mesh().topology().excluded;
        let sentences = excluded.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            sentences,
            ["peer zlaptop: left out allowed IPs 10.5.0.1/32: claimed by peer office before"]
        );
    }

    #[test]
    fn what_they_send_elsewhere_is_masqueraded() {
        let firewall = firewall(&mesh(), "node-agent-01");
        let nets = ["10.5.0.1/32", "10.5.0.2/32", "10.6.0.0/24"].map(net);
        assert_eq!(firewall.masquerade_sources, nets.into());
        let known = [
            "10.42.0.0/24",
            "10.42.1.0/24",
            "192.168.50.12/32",
            "10.43.0.0/16",
            "10.4.0.1/32",
        ];
        assert!(
            known
                .iter()
                .all(|known| firewall.known.contains(&net(known)))
        );
    }

    #[test]
    fn a_roaming_peers_endpoint_is_left_to_the_device() {
        let mut mesh = mesh();
        mesh.observed = [(key(101), "198.51.100.99:4000".parse().unwrap())].into();
        let peers = mesh.state("node-master").peers;
        assert_eq!(peers[&key(101)].endpoint, None);
    }
}

/// Kilo's tutorial: logical groups, a full mesh, and both mixed.
mod scenario_002 {
    use super::*;

    fn nodes() -> [Node; 4] {
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
            format!("{} led by {}: {}\n", s.name, s.leader, nets.join(", "))
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
        ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.4.0.4 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 throw 10.42.1.0/24
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
        ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.4.0.3 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 throw 10.42.2.0/24
        ip route replace table 5130 10.42.3.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 172.31.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ip route replace table 5130 172.31.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
        ");
        insta::assert_snapshot!(routes(&mesh, "b2"), @"
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.42.1.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420
        ip route replace table 5130 throw 10.42.4.0/24
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
        ip route replace table 5130 10.4.0.2 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.4.0.4 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 throw 10.42.1.0/24
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.4 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 172.31.0.1 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 172.31.0.2 via 10.4.0.4 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ");
        let state = mesh.state("a1");
        assert_eq!(
            state.peers.keys().copied().collect::<Vec<_>>(),
            [key(3), key(4)]
        );
        assert_eq!(
            firewall(&mesh, "a1").region_underlay,
            [ip("10.138.0.1"), ip("10.138.0.2")].into()
        );
    }

    #[test]
    fn nodes_without_a_private_address_are_each_on_their_own() {
        let [mut a1, mut a2, b1, b2] = nodes();
        (a1.private_ip, a2.private_ip) = (None, None);
        (a1.internal_ips, a2.internal_ips) = (vec![ip("203.0.113.1")], vec![ip("203.0.113.2")]);
        let mesh = Mesh::new([a1, a2, b1, b2]);
        insta::assert_snapshot!(segments(&mesh), @"
        location:aws led by b1: 10.42.3.0/24, 172.31.0.1/32, 10.42.4.0/24, 172.31.0.2/32, 10.4.0.1/32
        node:a1 led by a1: 10.42.1.0/24, 203.0.113.1/32, 10.4.0.2/32
        node:a2 led by a2: 10.42.2.0/24, 203.0.113.2/32, 10.4.0.3/32
        ");
        insta::assert_snapshot!(routes(&mesh, "a1"), @"
        ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.1.0 mtu 1420
        ip route replace table 5130 throw 10.42.1.0/24
        ip route replace table 5130 10.42.2.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.42.3.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 10.42.4.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 172.31.0.1 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5130 172.31.0.2 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ip route replace table 5131 203.0.113.2 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
        ");
    }
}
