//! The routing policy rules of other programs on real hosts, and the place of the agent's among them.

use std::collections::BTreeSet;

use selvedge::diff::KernelChange;
use selvedge::kernel::Kernel;
use selvedge::plan::place;
use selvedge::state::{OtherAction, Route, Rule, Table};

use crate::fixture::{Node, apply, hop, ip, key, net, unicast};

const MARK: u32 = 0x51e0_0000;

/// A leader whose VPN has a device and a table of its own.
fn leader(label: &str) -> Node {
    let node = Node::with_tunnel(label);
    node.sh("
        ip link set kilo0 up
        ip addr add 10.42.1.0/32 dev kilo0
        ip route add 10.42.0.0/24 via 10.42.0.0 dev flannel.1 onlink
        ip link add vpn type bridge
        ip link set vpn up
        ip route add default dev vpn table 7120
    ");
    node.with(|kernel| {
        let route = unicast([&hop(None, "kilo0", false)], Some("10.42.1.0"));
        let key = key(Table::Mesh, "10.42.0.0/24", 0);
        apply(kernel, &[KernelChange::ReplaceRoute { key, route }]);
        let key = crate::fixture::key(Table::Mesh, "10.42.0.0/16", 4_278_198_272);
        let route = Route::Unreachable;
        apply(kernel, &[KernelChange::ReplaceRoute { key, route }]);
    });
    node
}

fn mesh_rule(priority: u32) -> Rule {
    Rule {
        priority,
        v6: false,
        from: None,
        iif: None,
        fwmark: Some(MARK),
        not: true,
        table: Table::Mesh.id(),
    }
}

/// Adds the rule for the mesh's table at its place, and returns the priority of the first.
fn settle(kernel: &Kernel) -> u32 {
    let others = kernel.rtnetlink.other_rules().unwrap();
    let pods = net("10.42.0.0/16");
    let place = place(5190, &others, || std::iter::once(&pods));
    assert_eq!(place.obstacle, None);
    apply(kernel, &[KernelChange::AddRule(mesh_rule(place.first + 2))]);
    place.first
}

fn link(kernel: &Kernel, to: &str, mark: u32) -> Option<String> {
    kernel
        .rtnetlink
        .path_to(ip(to), mark)
        .unwrap()
        .map(|path| path.link)
}

#[test]
fn a_vpns_rules_apply_to_the_tunnels_datagrams_and_not_to_the_mesh() {
    let node = leader("vpn");
    node.sh("
        ip rule add pref 100 lookup main suppress_prefixlength 0
        ip rule add pref 110 not fwmark 0x1bd00 lookup 7120
    ");
    node.with(|kernel| {
        // Control: at the former priorities flannel's route is found first.
        apply(kernel, &[KernelChange::AddRule(mesh_rule(5192))]);
        assert_eq!(link(kernel, "10.42.0.5", 0).as_deref(), Some("flannel.1"));
        apply(kernel, &[KernelChange::DeleteRule(mesh_rule(5192))]);

        assert_eq!(settle(kernel), 97);
        assert_eq!(link(kernel, "10.42.0.5", 0).as_deref(), Some("kilo0"));
        // As the datagrams of any socket.
        assert_eq!(link(kernel, "203.0.113.10", MARK).as_deref(), Some("vpn"));
        assert_eq!(link(kernel, "203.0.113.10", 0).as_deref(), Some("vpn"));

        node.sh("ip rule del pref 100; ip rule del pref 110");
        let others = kernel.rtnetlink.other_rules().unwrap();
        let pods = net("10.42.0.0/16");
        assert_eq!(place(5190, &others, || std::iter::once(&pods)).first, 5190);
    });
}

#[test]
fn rules_of_every_kind_are_decoded() {
    let node = leader("kinds2");
    node.sh("
        ip route add local default dev lo table 2005
        ip rule add pref 9 fwmark 0x200/0xf00 lookup 2005
        ip rule add pref 300 to 172.31.0.0/16 lookup 7120
        ip rule add pref 400 prohibit from 192.0.2.0/24
        ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main
        ip rule add pref 5270 lookup 52
        ip -6 rule add pref 600 to fd00::/8 lookup 7120
    ");
    node.with(|kernel| {
        let others = kernel.rtnetlink.other_rules().unwrap();
        let actions: BTreeSet<_> = others
            .iter()
            .filter(|rule| !rule.v6)
            .map(|rule| (rule.priority, rule.action))
            .collect();
        assert_eq!(
            actions,
            [
                (0, OtherAction::Deliver),
                (9, OtherAction::Deliver),
                (300, OtherAction::Lookup(7120)),
                (400, OtherAction::Refuse),
                (5210, OtherAction::Lookup(254)),
                (5270, OtherAction::Lookup(52)),
            ]
            .into()
        );
        assert_eq!(settle(kernel), 5190);
        assert_eq!(link(kernel, "10.42.0.5", 0).as_deref(), Some("kilo0"));
    });
}

#[test]
fn the_agent_goes_before_a_cnis_table_and_rules_for_a_device() {
    for rule in [
        "ip rule add pref 512 lookup 7120",
        "ip rule add pref 512 iif eth0 lookup 7120",
        "ip rule add pref 512 from 192.168.50.11 lookup 7120",
        "ip rule add pref 512 goto 32766",
    ] {
        let node = leader("passed");
        node.run(rule);
        node.with(|kernel| {
            assert_eq!(settle(kernel), 509, "{rule}");
            assert_eq!(
                link(kernel, "10.42.0.5", 0).as_deref(),
                Some("kilo0"),
                "{rule}"
            );
        });
    }
}

#[test]
fn a_rule_that_leaves_no_priority_before_it_is_named() {
    let node = leader("noroom");
    node.run("ip rule add pref 0 lookup 7120");
    node.with(|kernel| {
        let others = kernel.rtnetlink.other_rules().unwrap();
        let pods = net("10.42.0.0/16");
        let place = place(5190, &others, || std::iter::once(&pods));
        let obstacle = place.obstacle.unwrap().to_string();
        assert_eq!(obstacle, "ip rule pref 0 lookup 7120");
    });
}

#[test]
fn connected_networks_are_those_of_real_links_and_single_routers() {
    let node = leader("connect");
    let connected = || node.with(|kernel| kernel.rtnetlink.connected().unwrap());
    assert_eq!(
        connected(),
        ["192.168.50.0/24", "192.168.50.1/32", "2001:db8:50::/64"]
            .map(net)
            .into()
    );
    node.sh("
        ip route del default
        ip addr flush dev eth0
        ip addr add 192.0.2.7/32 dev eth0
        ip route add 172.31.1.1 dev eth0
        ip route add default via 172.31.1.1
    ");
    let routers = connected();
    assert!(routers.contains(&net("172.31.1.1/32")), "{routers:?}");
    assert!(
        !routers.iter().any(|network| network.prefix_len() < 32),
        "{routers:?}"
    );
}
