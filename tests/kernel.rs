//! The kernel side against the real kernel, in network namespaces: run as root.
//!
//! What is asserted is what an operator would look at: `ip`, `nft` and pings. Behaviour of the kernel
//! that the fake in the tests of the diff imitates is measured here, in tests named `linux_…`.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::diff::{Change, diff};
use selvedge::kernel::Kernel;
use selvedge::plan::{
    BACKSTOP_METRIC, Firewall, Link, NextHop, Route, RouteKey, Rule, Ruleset, Scope, State, Table,
};
use selvedge_lab::netns::Namespace;

/// A node as flannel and its network make it: `eth0`, `cni0`, `flannel.1`, and the tunnel's link.
struct Node {
    namespace: Namespace,
}

impl Node {
    fn new(label: &str) -> Self {
        let namespace = Namespace::new(label).unwrap();
        namespace
            .sh("
                ip link add eth0 type veth peer name wire
                ip link set wire up
                ip addr add 192.168.50.11/24 dev eth0
                ip link set eth0 up
                ip -6 addr add 2001:db8:50::11/64 dev eth0 nodad
                ip route add default via 192.168.50.1
                ip link add flannel.1 mtu 1450 address 9e:94:f2:d4:ca:3a type vxlan id 1 local 192.168.50.11 dev eth0 dstport 8472 nolearning
                ip addr add 10.42.1.0/32 dev flannel.1
                ip link set flannel.1 up
                ip link add flannel-v6.1 mtu 1430 type vxlan id 1 local 2001:db8:50::11 dev eth0 dstport 8472 nolearning
                ip -6 addr add fd42:0:0:1::/128 dev flannel-v6.1 nodad
                ip link set flannel-v6.1 up
                ip link add cni0 type bridge
                ip addr add 10.42.1.1/24 dev cni0
                ip link set cni0 up
                ip neigh add 10.42.2.0 lladdr 8e:4d:2a:67:f4:a5 dev flannel.1 nud permanent
                bridge fdb add 8e:4d:2a:67:f4:a5 dst 192.168.50.12 dev flannel.1 self permanent
                ip route add 10.42.2.0/24 via 10.42.2.0 dev flannel.1 onlink
            ")
            .unwrap();
        Self { namespace }
    }

    /// A node whose tunnel's link exists, too.
    fn with_tunnel(label: &str) -> Self {
        let node = Self::new(label);
        node.run("ip tuntap add kilo0 mode tun");
        node
    }

    fn run(&self, line: &str) -> String {
        self.namespace.run(line).unwrap()
    }

    fn sh(&self, script: &str) -> String {
        self.namespace.sh(script).unwrap()
    }

    /// Runs `work` inside, with the kernel of this node.
    fn with<T: Send>(&self, work: impl FnOnce(&Kernel) -> T + Send) -> T {
        self.namespace
            .within(|| work(&Kernel::open("kilo0").unwrap()))
    }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

fn hop(via: Option<&str>, dev: &str, onlink: bool) -> NextHop {
    NextHop {
        via: via.map(ip),
        dev: dev.to_owned(),
        onlink,
    }
}

fn unicast(hops: &[NextHop], src: Option<&str>) -> Route {
    Route::Unicast {
        next_hops: hops.iter().cloned().collect(),
        src: src.map(ip),
        mtu: Some(1420),
    }
}

fn key(table: Table, dst: &str, metric: u32) -> RouteKey {
    RouteKey {
        table,
        dst: net(dst),
        metric,
    }
}

/// A state with every kind of everything, as a leader might have it.
fn leader() -> State {
    let v4 = Some("10.42.1.0");
    let v6 = Some("fd42:0:0:1::");
    let tunnel = hop(Some("10.4.0.1"), "kilo0", true);
    let flannel = hop(Some("10.42.2.0"), "flannel.1", true);
    let tunnel_v6 = hop(Some("fd04::1"), "kilo0", true);
    let other_v6 = hop(Some("fd04::3"), "kilo0", true);
    let other = hop(Some("10.4.0.3"), "kilo0", true);
    let plain = hop(None, "kilo0", false);
    let routes = [
        (
            key(Table::Mesh, "10.42.0.0/24", 0),
            unicast(&[tunnel.clone()], v4),
        ),
        (
            key(Table::Mesh, "10.42.0.0/24", BACKSTOP_METRIC),
            Route::Unreachable,
        ),
        (key(Table::Mesh, "10.42.1.0/24", 0), Route::Throw),
        (
            key(Table::Mesh, "10.42.3.0/24", 0),
            unicast(&[flannel.clone()], v4),
        ),
        (
            key(Table::Mesh, "10.42.4.0/24", 0),
            unicast(&[tunnel, other], v4),
        ),
        (
            key(Table::Mesh, "10.5.0.1/32", 0),
            unicast(&[plain.clone()], v4),
        ),
        (
            key(Table::Pods, "203.0.113.10/32", 0),
            unicast(&[plain.clone()], v4),
        ),
        (
            key(Table::Members, "192.168.50.12/32", 0),
            unicast(&[flannel.clone()], v4),
        ),
        (
            key(Table::Members, "192.168.50.13/32", 0),
            unicast(&[flannel, plain.clone()], None),
        ),
        (
            key(Table::Mesh, "fd42::/64", 512),
            unicast(&[tunnel_v6.clone()], v6),
        ),
        (
            key(Table::Mesh, "fd42::/64", BACKSTOP_METRIC),
            Route::Unreachable,
        ),
        (key(Table::Mesh, "fd42:0:0:1::/64", 512), Route::Throw),
        (
            key(Table::Mesh, "fd42:0:0:4::/64", 512),
            unicast(&[tunnel_v6, other_v6], v6),
        ),
        (key(Table::Mesh, "fd05::1/128", 512), unicast(&[plain], v6)),
    ];
    let rule = |priority, v6, table| Rule {
        priority,
        v6,
        from: None,
        iif: None,
        fwmark: None,
        table,
    };
    let mut rules = BTreeSet::new();
    for v6 in [false, true] {
        let network = if v6 { "fd42::/56" } else { "10.42.0.0/16" };
        rules.extend([
            Rule {
                fwmark: Some(0x51e0_0000),
                ..rule(5190, v6, 254)
            },
            Rule {
                iif: Some("kilo0".to_owned()),
                ..rule(5191, v6, Table::Members.id())
            },
            Rule {
                iif: Some("lo".to_owned()),
                from: Some(net(network)),
                ..rule(5192, v6, Table::Members.id())
            },
            Rule {
                from: Some(net(network)),
                ..rule(5193, v6, Table::Pods.id())
            },
            rule(5194, v6, Table::Mesh.id()),
        ]);
    }
    State {
        link: Some(Link {
            name: "kilo0".to_owned(),
            mtu: 1420,
            up: true,
        }),
        addresses: [
            (net("10.42.1.0/32"), Scope::Global),
            (net("10.4.0.2/32"), Scope::Link),
            (net("fd42:0:0:1::/128"), Scope::Global),
            (net("fd04::2/128"), Scope::Global),
        ]
        .into(),
        routes: routes.into(),
        rules,
        firewall: Some(Ruleset::Planned(Box::new(firewall()))),
        sysctls: [
            ("net/ipv4/conf/kilo0/rp_filter", "2"),
            ("net/ipv6/conf/kilo0/addr_gen_mode", "1"),
        ]
        .map(|(path, value)| (path.to_owned(), value.to_owned()))
        .into(),
        ..State::default()
    }
}

/// The firewall of a leader with an IPv6 side.
fn firewall() -> Firewall {
    Firewall {
        tunnel: "kilo0".to_owned(),
        port: 51820,
        vxlan: [("flannel.1", 8472), ("flannel-v6.1", 8472)]
            .map(|(name, port)| (name.to_owned(), port))
            .into(),
        region_underlay: ["192.168.50.11", "192.168.50.12", "2001:db8:50::12"]
            .map(ip)
            .into(),
        remote_pods: nets(&["10.42.0.0/24", "10.42.4.0/24", "fd42::/64"]),
        remote_nodes: nets(&["203.0.113.10/32", "10.4.0.1/32", "fd04::1/128"]),
        region_pods: nets(&["10.42.2.0/24", "10.42.3.0/24", "fd42:0:0:2::/64"]),
        region_nodes: nets(&["192.168.50.12/32", "2001:db8:50::12/128"]),
        local_pods: nets(&["10.42.1.0/24", "fd42:0:0:1::/64"]),
        leader: true,
        fail_closed: true,
        masquerade_sources: nets(&["10.5.0.1/32"]),
        masquerade_destinations: nets(&["172.16.0.0/24"]),
        known: nets(&["10.42.0.0/16", "203.0.113.10/32"]),
    }
}

/// Makes the kernel as desired; panics with all that failed.
fn reach(kernel: &Kernel, desired: &State) -> Vec<Change> {
    let changes = diff(&kernel.observe().unwrap(), desired);
    apply(kernel, &changes);
    changes
}

fn apply(kernel: &Kernel, changes: &[Change]) {
    let failed: Vec<String> = kernel
        .apply_all(changes)
        .iter()
        .map(|(change, error)| format!("{change}: {error:#}"))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// The commands that lead from what is there to what should be.
fn commands(kernel: &Kernel, desired: &State) -> Vec<String> {
    diff(&kernel.observe().unwrap(), desired)
        .iter()
        .map(Change::to_string)
        .collect()
}

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
    fd05::1 dev kilo0 proto 118 src fd42:0:0:1:: metric 512 linkdown mtu 1420 pref medium
    fd42::/64 via fd04::1 dev kilo0 proto 118 src fd42:0:0:1:: metric 512 onlink linkdown mtu 1420 pref medium
    unreachable fd42::/64 dev lo proto 118 metric 4278198272 pref medium
    throw fd42:0:0:1::/64 dev lo proto 118 metric 512 pref medium
    fd42:0:0:4::/64 proto 118 src fd42:0:0:1:: metric 512 mtu 1420 pref medium
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
    5190:	from all fwmark 0x51e00000 lookup main proto 118
    5191:	from all iif kilo0 lookup 5132 proto 118
    5192:	from 10.42.0.0/16 iif lo lookup 5132 proto 118
    5193:	from 10.42.0.0/16 lookup 5131 proto 118
    5194:	from all lookup 5130 proto 118
    32766:	from all lookup main
    32767:	from all lookup default
    0:	from all lookup local
    5190:	from all fwmark 0x51e00000 lookup main proto 118
    5191:	from all iif kilo0 lookup 5132 proto 118
    5192:	from fd42::/56 iif lo lookup 5132 proto 118
    5193:	from fd42::/56 lookup 5131 proto 118
    5194:	from all lookup 5130 proto 118
    32766:	from all lookup main
    ");
}

#[test]
fn every_change_may_be_made_twice() {
    let node = Node::with_tunnel("twice");
    node.with(|kernel| {
        let there = diff(&kernel.observe().unwrap(), &leader());
        apply(kernel, &there);
        apply(kernel, &there);
        assert_eq!(kernel.observe().unwrap(), leader());

        let back = diff(&kernel.observe().unwrap(), &State::default());
        apply(kernel, &back);
        apply(kernel, &back);
        assert_eq!(kernel.observe().unwrap(), State::default());
    });
}

#[test]
fn a_change_that_cannot_be_made_is_told_and_holds_up_no_other() {
    let node = Node::with_tunnel("errors");
    node.with(|kernel| {
        let replace = |dst: &str, hop| Change::ReplaceRoute {
            key: key(Table::Mesh, dst, 0),
            route: unicast(&[hop], None),
        };
        // The link is down, the other does not exist, the third has no such source.
        let changes = [
            replace("10.42.0.0/24", hop(None, "kilo0", false)),
            replace("10.42.3.0/24", hop(None, "kilo9", false)),
            Change::ReplaceRoute {
                key: key(Table::Mesh, "10.42.4.0/24", 0),
                route: unicast(&[hop(None, "flannel.1", false)], Some("192.0.2.1")),
            },
            replace("10.42.5.0/24", hop(Some("10.42.2.0"), "flannel.1", true)),
        ];
        let failed: Vec<String> = kernel
            .apply_all(&changes)
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
fn routes_of_others_in_our_tables_are_seen_and_removed() {
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
        ip route del table 5130 10.42.8.0/24 proto 118
        ip route del table 5130 10.42.9.0/24 proto 118
        ip -6 route del table 5131 fd42:9::/64 metric 7 proto 118
        ip route del table 5132 10.42.7.0/24 proto 118
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
fn cleanup_leaves_everything_as_it_was() {
    const DUMP: &str = "
        ip rule; ip -6 rule
        ip route show table all; ip -6 route show table all
        ip link; ip addr; ip neigh; bridge fdb
        nft list ruleset; iptables-save | grep -v '^#'; iptables-legacy-save | grep -v '^#'
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
    assert_eq!(after, before);
}

#[test]
fn a_link_that_is_no_tunnel_is_left_alone() {
    let node = Node::new("nolink");
    node.run("ip link add kilo0 type bridge");
    node.with(|kernel| {
        assert_eq!(kernel.observe().unwrap().link, None);
        assert!(kernel.cleanup().is_empty());
        let error = kernel.check(5190..=5194).unwrap_err();
        insta::assert_snapshot!(error, @"there is a link kilo0 already, of the kind bridge: delete it (ip link del kilo0), or choose another name with --interface");
        assert_eq!(selvedge::refusal::exit_code(&error), 78);
    });
    node.run("ip link show kilo0");
}

#[test]
fn what_others_use_is_refused_at_the_start() {
    let node = Node::with_tunnel("refused");
    let refusals = [
        "ip rule add pref 5191 lookup 99",
        "ip -6 rule add pref 5194 to fd00::/8 lookup 5130",
        "ip rule add pref 100 lookup 5131",
        "ip route add 10.42.9.0/24 dev cni0 table 5130",
        "ip -6 route add fd42:9::/64 dev cni0 table 5132 proto static",
    ]
    .map(|command| {
        node.run(command);
        let refusal = node.with(|kernel| kernel.check(5190..=5194).unwrap_err());
        node.run(&command.replace(" add ", " del "));
        assert_eq!(selvedge::refusal::exit_code(&refusal), 78);
        format!("{command}\n  {refusal}")
    });
    insta::assert_snapshot!(refusals.join("\n"), @r"
    ip rule add pref 5191 lookup 99
      the routing rule priority 5191 is used by another program (lookup 99): choose another base for the priorities 5190 to 5194 with --rule-priority
    ip -6 rule add pref 5194 to fd00::/8 lookup 5130
      the routing rule priority 5194 is used by another program (lookup 5130): choose another base for the priorities 5190 to 5194 with --rule-priority
    ip rule add pref 100 lookup 5131
      the routing table 5131 is used by another program's rule (priority 100): delete the rule
    ip route add 10.42.9.0/24 dev cni0 table 5130
      the routing table 5130 holds another program's route (to 10.42.9.0/24, protocol 3): delete it
    ip -6 route add fd42:9::/64 dev cni0 table 5132 proto static
      the routing table 5132 holds another program's route (to fd42:9::/64, protocol 4): delete it
    ");

    node.with(|kernel| {
        reach(kernel, &leader());
        // Its own are no reason: this is a restart.
        kernel.check(5190..=5194).unwrap();
    });
}
