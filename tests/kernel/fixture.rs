//! A node under test, and states for it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use selvedge::diff::{Change, KernelChange, diff};
use selvedge::kernel::Kernel;
use selvedge::state::{
    BACKSTOP_METRIC, Firewall, Guard, Link, NextHop, RelayDoor, Route, RouteKey, Rule, Ruleset,
    Scope, State, Table,
};
use selvedge_lab::netns::Namespace;

/// A node with flannel and its network: `eth0`, `cni0`, `flannel.1`, and the tunnel's link.
pub(crate) struct Node {
    pub(crate) namespace: Namespace,
}

impl Node {
    pub(crate) fn new(label: &str) -> Self {
        let namespace = Namespace::new(label).unwrap();
        namespace
            .sh("
                # Addresses are what they will be at once.
                sysctl -q net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0
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

    /// A node with the tunnel's link.
    pub(crate) fn with_tunnel(label: &str) -> Self {
        let node = Self::new(label);
        node.run("ip tuntap add kilo0 mode tun");
        node
    }

    pub(crate) fn run(&self, line: &str) -> String {
        self.namespace.run(line).unwrap()
    }

    pub(crate) fn sh(&self, script: &str) -> String {
        self.namespace.sh(script).unwrap()
    }

    /// Runs `work` in the node's namespace, with its kernel.
    pub(crate) fn with<T: Send>(&self, work: impl FnOnce(&Kernel) -> T + Send) -> T {
        self.namespace
            .within(|| work(&Kernel::open("kilo0").unwrap()))
    }
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

pub(crate) fn hop(via: Option<&str>, dev: &str, onlink: bool) -> NextHop {
    NextHop {
        via: via.map(ip),
        dev: dev.to_owned(),
        onlink,
    }
}

pub(crate) fn unicast<'a>(hops: impl IntoIterator<Item = &'a NextHop>, src: Option<&str>) -> Route {
    Route::Unicast {
        next_hops: hops.into_iter().cloned().collect(),
        src: src.map(ip),
        mtu: Some(1420),
    }
}

pub(crate) fn key(table: Table, dst: &str, metric: u32) -> RouteKey {
    RouteKey {
        table,
        dst: net(dst),
        metric,
    }
}

/// A leader's state with every kind of object.
pub(crate) fn leader() -> State {
    let v4 = Some("10.42.1.0");
    let v6 = Some("fd42:0:0:1::");
    let tunnel = hop(Some("10.4.0.1"), "kilo0", true);
    let flannel = hop(Some("10.42.2.0"), "flannel.1", true);
    let tunnel_v6 = hop(Some("fd04::1"), "kilo0", true);
    let other_v6 = hop(Some("fd04::3"), "kilo0", true);
    let other = hop(Some("10.4.0.3"), "kilo0", true);
    let plain = hop(None, "kilo0", false);
    let routes = [
        (key(Table::Mesh, "10.42.0.0/24", 0), unicast([&tunnel], v4)),
        (
            key(Table::Mesh, "10.42.0.0/24", BACKSTOP_METRIC),
            Route::Unreachable,
        ),
        (key(Table::Mesh, "10.42.1.0/24", 0), Route::Throw),
        (key(Table::Mesh, "10.42.3.0/24", 0), unicast([&flannel], v4)),
        (
            key(Table::Mesh, "10.42.4.0/24", 0),
            unicast([&tunnel, &other], v4),
        ),
        (key(Table::Mesh, "10.5.0.1/32", 0), unicast([&plain], v4)),
        (
            key(Table::Pods, "203.0.113.10/32", 0),
            unicast([&plain], v4),
        ),
        (
            key(Table::Members, "192.168.50.12/32", 0),
            unicast([&flannel], v4),
        ),
        (
            key(Table::Members, "192.168.50.13/32", 0),
            unicast([&flannel, &plain], None),
        ),
        (
            key(Table::Mesh, "fd42::/64", 512),
            unicast([&tunnel_v6], v6),
        ),
        (
            key(Table::Mesh, "fd42::/64", BACKSTOP_METRIC),
            Route::Unreachable,
        ),
        (key(Table::Mesh, "fd42:0:0:1::/64", 512), Route::Throw),
        (
            key(Table::Mesh, "fd42:0:0:4::/64", 512),
            unicast([&tunnel_v6, &other_v6], v6),
        ),
        (key(Table::Mesh, "fd05::1/128", 512), unicast([&plain], v6)),
    ];
    let rule = |priority, v6, table| Rule {
        priority,
        v6,
        from: None,
        iif: None,
        fwmark: None,
        not: false,
        table,
    };
    let mut rules = BTreeSet::new();
    for v6 in [false, true] {
        let network = if v6 { "fd42::/56" } else { "10.42.0.0/16" };
        rules.extend([
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
            Rule {
                fwmark: Some(0x51e0_0000),
                not: true,
                ..rule(5194, v6, Table::Mesh.id())
            },
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
pub(crate) fn firewall() -> Firewall {
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
        mesh_nodes: nets(&["10.4.0.1/32", "fd04::1/128"]),
        region_pods: nets(&["10.42.2.0/24", "10.42.3.0/24", "fd42:0:0:2::/64"]),
        region_nodes: nets(&["192.168.50.12/32", "2001:db8:50::12/128"]),
        alias_pools: BTreeSet::new(),
        region_aliases: [].into(),
        probes: ["10.4.255.254", "10.4.255.253"].map(ip).into(),
        local_pods: nets(&["10.42.1.0/24", "fd42:0:0:1::/64"]),
        leader: true,
        fail_closed: true,
        masquerade_sources: nets(&["10.5.0.1/32"]),
        masquerade_destinations: nets(&["172.16.0.0/24"]),
        known: nets(&["10.42.0.0/16", "203.0.113.10/32"]),
        guard: Guard {
            hops: ["10.42.2.0", "192.168.50.12", "fd42:0:0:2::"]
                .map(ip)
                .into(),
            far: nets(&[
                "10.4.0.1/32",
                "10.4.255.253/32",
                "10.4.255.254/32",
                "10.5.0.1/32",
                "fd04::1/128",
            ]),
            far_from_pods: nets(&["203.0.113.10/32"]),
            near: nets(&[
                "10.42.1.0/24",
                "10.42.2.0/24",
                "10.42.3.0/24",
                "fd42:0:0:1::/64",
                "fd42:0:0:2::/64",
            ]),
            wide: nets(&["10.42.0.0/16", "fd42::/56"]),
            cluster: nets(&["10.42.0.0/16", "fd42::/56"]),
        },
        vxlan_sources: nets(&["192.168.50.0/24", "2001:db8:50::12/128"]),
        region_devices: ["eth0", "flannel.1"].map(str::to_owned).into(),
        peer_internet: false,
        relay: RelayDoor {
            from: ["10.4.0.1", "10.4.0.3", "fd04::1"].map(ip).into(),
            to: ["10.4.0.1", "fd04::1"].map(ip).into(),
        },
    }
}

/// Brings the kernel to the desired state; panics with all failures.
pub(crate) fn reach(kernel: &Kernel, desired: &State) -> Vec<KernelChange> {
    let changes = diff(&kernel.observe().unwrap(), desired);
    let changes = changes.iter().filter_map(Change::of_kernel).cloned();
    let changes: Vec<_> = changes.collect();
    apply(kernel, &changes);
    changes
}

pub(crate) fn apply(kernel: &Kernel, changes: &[KernelChange]) {
    let failed: Vec<String> = kernel
        .apply_all(&changes.iter().collect::<Vec<_>>())
        .iter()
        .map(|(change, error)| format!("{change}: {error:#}"))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// The commands that lead from the observed to the desired state.
pub(crate) fn commands(kernel: &Kernel, desired: &State) -> Vec<String> {
    diff(&kernel.observe().unwrap(), desired)
        .iter()
        .map(Change::to_string)
        .collect()
}
