//! Behaviour of Linux that the agent relies on, and that the fake kernel in the tests of the diff imitates.
//! It is tested here, so that the fake stays as strict as the real one.

use selvedge::diff::KernelChange;
use selvedge::state::{Route, Table};

use crate::fixture::{Node, apply, commands, hop, key, leader, net, reach, unicast};

/// A leader.
fn leading(label: &str) -> Node {
    let node = Node::with_tunnel(label);
    node.with(|kernel| reach(kernel, &leader()));
    node
}

/// What is missing afterwards.
fn missing(node: &Node) -> String {
    node.with(|kernel| commands(kernel, &leader())).join("\n")
}

#[test]
fn linux_flushes_ipv4_routes_of_all_tables_with_the_links_last_ipv4_address() {
    let node = leading("lastv4");

    // Not when the last but one is deleted.
    node.run("ip addr del 10.4.0.2/32 dev kilo0");
    insta::assert_snapshot!(missing(&node), @"ip addr add 10.4.0.2/32 dev kilo0 scope link");

    node.run("ip addr del 10.42.1.0/32 dev kilo0");
    insta::assert_snapshot!(missing(&node), @r"
    ip addr add 10.4.0.2/32 dev kilo0 scope link
    ip addr add 10.42.1.0/32 dev kilo0
    ip route replace table 5130 10.5.0.1 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 10.42.4.0/24 nexthop via 10.4.0.1 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5131 203.0.113.10 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
    ");
}

#[test]
fn linux_keeps_ipv6_routes_when_the_links_addresses_go() {
    let node = leading("lastv6");
    node.run("ip -6 addr del fd42:0:0:1::/128 dev kilo0");
    node.run("ip -6 addr del fd04::2/128 dev kilo0");
    insta::assert_snapshot!(missing(&node), @r"
    ip addr add fd04::2/128 dev kilo0
    ip addr add fd42:0:0:1::/128 dev kilo0
    ");
}

#[test]
fn linux_flushes_all_routes_through_a_link_that_is_set_down_and_its_ipv6_addresses() {
    let node = leading("down");
    node.run("ip link set kilo0 down");
    node.run("ip link set kilo0 up");
    insta::assert_snapshot!(missing(&node), @r"
    ip addr add fd04::2/128 dev kilo0
    ip addr add fd42:0:0:1::/128 dev kilo0
    ip route replace table 5130 10.5.0.1 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 10.42.4.0/24 nexthop via 10.4.0.1 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip -6 route replace table 5130 fd05::1 dev kilo0 src fd42:0:0:1:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 fd42::/64 via fd04::1 dev kilo0 onlink src fd42:0:0:1:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 fd42:0:0:4::/64 nexthop via fd04::1 dev kilo0 onlink nexthop via fd04::3 dev kilo0 onlink src fd42:0:0:1:: mtu lock 1420 metric 512 proto 118
    ip route replace table 5131 203.0.113.10 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
    ");
}

#[test]
fn linux_deletes_all_routes_through_a_deleted_link_even_if_it_is_one_hop_of_several() {
    let node = leading("deleted");
    node.run("ip link del flannel.1");
    let observed = node.with(|kernel| kernel.observe().unwrap());
    let left = observed
        .routes
        .get(&key(Table::Members, "192.168.50.13/32", 0));
    insta::assert_debug_snapshot!(left, @"None");
    assert!(
        !observed
            .routes
            .contains_key(&key(Table::Mesh, "10.42.3.0/24", 0))
    );
}

#[test]
fn linux_keeps_routes_of_other_tables_when_their_preferred_source_is_deleted() {
    let node = leading("src");
    // It is still on flannel.1; then nowhere.
    node.run("ip addr add 192.0.2.1/32 dev kilo0");
    node.run("ip addr del 10.42.1.0/32 dev kilo0");
    node.run("ip addr del 10.42.1.0/32 dev flannel.1");
    let routes = node.run("ip route show table 5130");
    assert!(routes.contains("src 10.42.1.0"), "{routes}");
}

#[test]
fn linux_refuses_a_route_through_a_link_that_is_down_or_from_a_source_that_is_not_local() {
    let node = Node::with_tunnel("refuse");
    node.with(|kernel| {
        let refuse = |dst: &str, route: Route| {
            let change = KernelChange::ReplaceRoute {
                key: key(Table::Mesh, dst, if dst.contains(':') { 512 } else { 0 }),
                route,
            };
            format!("{:#}", kernel.apply(&change).unwrap_err())
        };
        let down = hop(None, "kilo0", false);
        let up = hop(None, "flannel.1", false);
        let refusals = [
            refuse("10.42.0.0/24", unicast([&down], None)),
            refuse("fd42::/64", unicast([&down], None)),
            refuse("10.42.0.0/24", unicast([&up], Some("192.0.2.1"))),
            refuse("fd42::/64", unicast([&up], Some("2001:db8::1"))),
            // On no link, and without the flag `onlink`.
            refuse(
                "10.42.0.0/24",
                unicast([&hop(Some("10.4.0.1"), "flannel.1", false)], None),
            ),
        ];
        insta::assert_snapshot!(refusals.join("\n"), @r"
        Network is down: Device for nexthop is not up
        Network is down: Nexthop device is not up
        Invalid argument: Invalid prefsrc address
        Invalid argument: Invalid source address
        Network is unreachable: Nexthop has invalid gateway
        ");
        // Routes without a link are not affected.
        apply(
            kernel,
            &[KernelChange::ReplaceRoute {
                key: key(Table::Mesh, "10.42.0.0/24", 0),
                route: Route::Unreachable,
            }],
        );
    });
}

#[test]
fn linux_replaces_a_route_of_any_kind_in_place() {
    let node = leading("replace");
    let one = hop(Some("10.4.0.1"), "kilo0", true);
    let two = hop(Some("10.4.0.3"), "kilo0", true);
    let one_v6 = hop(Some("fd04::1"), "kilo0", true);
    let two_v6 = hop(Some("fd04::3"), "kilo0", true);
    let plain = hop(None, "kilo0", false);
    let forms = [
        (unicast([&one], None), unicast([&one_v6], None)),
        (
            unicast([&one, &two], None),
            unicast([&one_v6, &two_v6], None),
        ),
        (unicast([&plain], None), unicast([&plain], None)),
        (Route::Unreachable, Route::Unreachable),
        (Route::Throw, Route::Throw),
    ];
    node.with(|kernel| {
        for from in &forms {
            for to in &forms {
                for (v4, v6) in [from, to] {
                    let replace = |dst, metric, route: &Route| KernelChange::ReplaceRoute {
                        key: key(Table::Pods, dst, metric),
                        route: route.clone(),
                    };
                    let changes = [replace("10.50.0.0/24", 0, v4), replace("fd50::/64", 512, v6)];
                    apply(kernel, &changes);
                    let observed = kernel.observe().unwrap().routes;
                    assert_eq!(&observed[&key(Table::Pods, "10.50.0.0/24", 0)], v4);
                    assert_eq!(&observed[&key(Table::Pods, "fd50::/64", 512)], v6);
                    // No part of the old route is left.
                    let lines = node.sh("ip -o route show table 5131 to 10.50.0.0/24; ip -o -6 route show table 5131 to fd50::/64");
                    assert_eq!(lines.lines().count(), 2, "{lines}");
                }
            }
        }
    });
}

#[test]
fn linux_drops_a_packet_that_one_table_accepts_and_another_drops() {
    let node = Node::new("accept");
    node.sh("
        nft add table inet host
        nft 'add chain inet host input { type filter hook input priority 10; policy accept; }'
        nft 'add rule inet host input udp dport 51820 drop'
        nft add table inet early
        nft 'add chain inet early input { type filter hook input priority -500; policy accept; }'
        nft 'add rule inet early input udp dport 51820 accept'
    ");
    let delivered = node.namespace.within(|| {
        let server = std::net::UdpSocket::bind("127.0.0.1:51820").unwrap();
        let wait = std::time::Duration::from_millis(200);
        server.set_read_timeout(Some(wait)).unwrap();
        let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"?", "127.0.0.1:51820").unwrap();
        server.recv(&mut [0; 8]).is_ok()
    });
    assert!(!delivered, "or the agent could open its port on every host");
}

#[test]
fn linux_deletes_only_the_route_with_the_same_metric() {
    let node = leading("metric");
    // Two routes to one destination differ by their metric; each is deleted alone.
    let backstop = leader()
        .routes
        .into_keys()
        .find(|key| key.dst == net("fd42::/64") && key.metric != 512)
        .unwrap();
    node.with(|kernel| apply(kernel, &[KernelChange::DeleteRoute(backstop)]));
    insta::assert_snapshot!(missing(&node), @"ip -6 route replace table 5130 unreachable fd42::/64 metric 4278198272 proto 118");
}
