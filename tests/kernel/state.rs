//! Changes are applied and read back, and other programs' state is left alone.

use selvedge::diff::{Change, KernelChange, diff};
use selvedge::state::{State, Table};

use crate::fixture::{Node, apply, commands, hop, key, leader, reach, unicast};

#[test]
fn every_kind_of_state_is_reached_and_read_back() {
    let node = Node::with_tunnel("kinds");
    node.with(|kernel| {
        let desired = leader();

        reach(kernel, &desired);

        let observed = kernel.observe().unwrap();
        assert_eq!(observed.routes, desired.routes);
        assert_eq!(observed, desired);
        assert_eq!(commands(kernel, &desired), Vec::<String>::new());
    });
    insta::assert_snapshot!(node.sh("ip route show table 5130; ip -6 route show table 5130"), @r"
    10.5.0.1 dev kilo0 proto 118 scope link src 10.42.1.0 linkdown mtu 1420 
    10.42.0.0/24 via 10.4.0.1 dev kilo0 proto 118 src 10.42.1.0 onlink linkdown mtu 1420 
    unreachable 10.42.0.0/24 proto 118 metric 4278198272 
    throw 10.42.1.0/24 proto 118 
    10.42.3.0/24 via 10.42.2.0 dev flannel.1 proto 118 src 10.42.1.0 onlink mtu 1420 
    10.42.4.0/24 proto 118 src 10.42.1.0 linkdown mtu 1420 
    	nexthop via 10.4.0.1 dev kilo0 weight 1 onlink linkdown 
    	nexthop via 10.4.0.3 dev kilo0 weight 1 onlink linkdown 
    fd05::1 dev kilo0 proto 118 src fd42:0:0:1:: metric 512 linkdown mtu lock 1420 pref medium
    fd42::/64 via fd04::1 dev kilo0 proto 118 src fd42:0:0:1:: metric 512 onlink linkdown mtu lock 1420 pref medium
    unreachable fd42::/64 dev lo proto 118 metric 4278198272 pref medium
    throw fd42:0:0:1::/64 dev lo proto 118 metric 512 pref medium
    fd42:0:0:4::/64 proto 118 src fd42:0:0:1:: metric 512 mtu lock 1420 pref medium
    	nexthop via fd04::1 dev kilo0 weight 1 onlink linkdown 
    	nexthop via fd04::3 dev kilo0 weight 1 onlink linkdown
    ");
    insta::assert_snapshot!(node.sh("ip route show table 5131; ip route show table 5132"), @r"
    203.0.113.10 dev kilo0 proto 118 scope link src 10.42.1.0 linkdown mtu 1420 
    192.168.50.12 via 10.42.2.0 dev flannel.1 proto 118 src 10.42.1.0 onlink mtu 1420 
    192.168.50.13 proto 118 mtu 1420 
    	nexthop dev kilo0 weight 1 linkdown 
    	nexthop via 10.42.2.0 dev flannel.1 weight 1 onlink
    ");
    insta::assert_snapshot!(node.sh("ip rule; ip -6 rule"), @r"
    0:	from all lookup local
    5191:	from all iif kilo0 lookup 5132 proto 118
    5192:	from 10.42.0.0/16 iif lo lookup 5132 proto 118
    5193:	from 10.42.0.0/16 lookup 5131 proto 118
    5194:	not from all fwmark 0x51e00000 lookup 5130 proto 118
    32766:	from all lookup main
    32767:	from all lookup default
    0:	from all lookup local
    5191:	from all iif kilo0 lookup 5132 proto 118
    5192:	from fd42::/56 iif lo lookup 5132 proto 118
    5193:	from fd42::/56 lookup 5131 proto 118
    5194:	not from all fwmark 0x51e00000 lookup 5130 proto 118
    32766:	from all lookup main
    ");
}

#[test]
fn every_change_can_be_made_twice() {
    let node = Node::with_tunnel("twice");
    node.with(|kernel| {
        let of_kernel = |desired: &State| -> Vec<KernelChange> {
            let changes = diff(&kernel.observe().unwrap(), desired);
            let changes = changes.iter().filter_map(Change::of_kernel);
            changes.cloned().collect()
        };
        let there = of_kernel(&leader());
        apply(kernel, &there);
        apply(kernel, &there);
        assert_eq!(kernel.observe().unwrap(), leader());

        let back = of_kernel(&State::default());
        apply(kernel, &back);
        apply(kernel, &back);
        assert_eq!(kernel.observe().unwrap(), State::default());
    });
}

#[test]
fn a_failed_change_is_reported_and_does_not_stop_the_others() {
    let node = Node::with_tunnel("errors");
    node.with(|kernel| {
        let replace = |dst: &str, hop| KernelChange::ReplaceRoute {
            key: key(Table::Mesh, dst, 0),
            route: unicast([&hop], None),
        };
        // The first link is down, the second does not exist, the third has no such source.
        let changes = [
            replace("10.42.0.0/24", hop(None, "kilo0", false)),
            replace("10.42.3.0/24", hop(None, "kilo9", false)),
            KernelChange::ReplaceRoute {
                key: key(Table::Mesh, "10.42.4.0/24", 0),
                route: unicast([&hop(None, "flannel.1", false)], Some("192.0.2.1")),
            },
            replace("10.42.5.0/24", hop(Some("10.42.2.0"), "flannel.1", true)),
        ];
        let failed: Vec<String> = kernel
            .apply_all(&changes.iter().collect::<Vec<_>>())
            .iter()
            .map(|(change, error)| format!("{change}: {error:#}"))
            .collect();
        insta::assert_snapshot!(failed.join("\n"), @r"
        ip route replace table 5130 10.42.3.0/24 dev kilo9 mtu 1420 proto 118: there is no link kilo9
        ip route replace table 5130 10.42.0.0/24 dev kilo0 mtu 1420 proto 118: Network is down: Device for nexthop is not up
        ip route replace table 5130 10.42.4.0/24 dev flannel.1 src 192.0.2.1 mtu 1420 proto 118: Invalid argument: Invalid prefsrc address
        ");
        assert_eq!(kernel.observe().unwrap().routes.len(), 1);
    });
}

#[test]
fn other_programs_routes_in_the_agents_tables_are_removed() {
    let node = Node::with_tunnel("foreign");
    node.sh("
        ip route add 10.42.9.0/24 dev cni0 table 5130
        ip route add blackhole 10.42.8.0/24 table 5130
        ip route add prohibit fd42:9::/64 table 5131 metric 7
        ip route add 10.42.7.0/24 dev cni0 advmss 1000 table 5132
        ip route add 10.42.9.0/24 dev cni0 table 999
        ip rule add pref 999 lookup 999
    ");
    node.with(|kernel| {
        insta::assert_snapshot!(commands(kernel, &State::default()).join("\n"), @r"
        ip route del table 5132 10.42.7.0/24 proto 118
        ip -6 route del table 5131 fd42:9::/64 metric 7 proto 118
        ip route del table 5130 10.42.9.0/24 proto 118
        ip route del table 5130 10.42.8.0/24 proto 118
        ip link del kilo0
        ");
        assert!(kernel.cleanup().is_empty());
    });
    assert_eq!(
        node.sh("ip route show table all | grep -c 'table 513' || true")
            .trim(),
        "0"
    );
    assert_ne!(node.run("ip route show table 999"), "");
    assert!(node.run("ip rule").contains("999:"));
}

#[test]
fn cleanup_restores_every_dump() {
    const DUMP: &str = "
        ip rule; ip -6 rule
        ip route show table all; ip -6 route show table all
        ip link; ip addr; ip neigh; bridge fdb
        nft --stateless list ruleset
        iptables-save | sed 's/\\[.*//; /^#/d'; iptables-legacy-save | sed 's/\\[.*//; /^#/d'
        sysctl -a 2>/dev/null | grep -v -e '^net.netfilter.nf_conntrack_count' -e random -e '^fs' -e '^kernel'
    ";
    let node = Node::new("cleanup");
    node.sh("
        iptables -t nat -N FLANNEL-POSTRTG
        iptables -t nat -A POSTROUTING -j FLANNEL-POSTRTG
        iptables-legacy -t nat -N KUBE-MARK
        nft add table ip flannel-ipv4
        ip rule add pref 100 to 10.99.0.0/16 lookup 99
        ip route add 10.99.0.0/16 dev eth0 table 99
    ");
    let before = node.sh(DUMP);
    node.run("ip tuntap add kilo0 mode tun");
    node.with(|kernel| {
        reach(kernel, &leader());
        assert_ne!(node.sh(DUMP), before);

        let failed = kernel.cleanup();

        assert!(failed.is_empty(), "{failed:?}");
    });
    let after = node.sh(DUMP);
    let differs = after.lines().zip(before.lines()).find(|(a, b)| a != b);
    assert_eq!(differs, None);
    assert_eq!(after.len(), before.len());
}

#[test]
fn a_link_that_is_no_tunnel_is_not_changed() {
    let node = Node::new("nolink");
    node.run("ip link add kilo0 type bridge");
    node.with(|kernel| {
        assert_eq!(kernel.observe().unwrap().link, None);
        assert!(kernel.cleanup().is_empty());
        let error = kernel.rtnetlink.check().unwrap_err();
        insta::assert_snapshot!(error, @"there is a link kilo0 already, of the kind bridge: delete it (ip link del kilo0), or choose another name with --interface");
        assert_eq!(selvedge::refusal::exit_code(&error), 78);
    });
    node.run("ip link show kilo0");
}

#[test]
fn tables_and_links_of_other_programs_are_refused_at_the_start() {
    let node = Node::with_tunnel("refused");
    let refusals = [
        "ip -6 rule add pref 5194 to fd00::/8 lookup 5130",
        "ip rule add pref 100 lookup 5131",
        "ip route add 10.42.9.0/24 dev cni0 table 5130",
        "ip -6 route add fd42:9::/64 dev cni0 table 5132 proto static",
    ]
    .map(|command| {
        node.run(command);
        let refusal = node.with(|kernel| kernel.rtnetlink.check().unwrap_err());
        node.run(&command.replace(" add ", " del "));
        assert_eq!(selvedge::refusal::exit_code(&refusal), 78);
        format!("{command}\n  {refusal}")
    });
    insta::assert_snapshot!(refusals.join("\n"), @r"
    ip -6 rule add pref 5194 to fd00::/8 lookup 5130
      the routing table 5130 is used by another program's rule (priority 5194): delete the rule
    ip rule add pref 100 lookup 5131
      the routing table 5131 is used by another program's rule (priority 100): delete the rule
    ip route add 10.42.9.0/24 dev cni0 table 5130
      the routing table 5130 holds another program's route (to 10.42.9.0/24, protocol 3): delete it
    ip -6 route add fd42:9::/64 dev cni0 table 5132 proto static
      the routing table 5132 holds another program's route (to fd42:9::/64, protocol 4): delete it
    ");

    node.with(|kernel| {
        reach(kernel, &leader());
        // The agent's own are accepted: this is a restart.
        kernel.rtnetlink.check().unwrap();
    });
}
