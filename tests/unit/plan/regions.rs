//! A third region, also with the same subnet, and remote API servers.

use super::*;

fn three_regions() -> Mesh {
    let mut mesh = two_regions();
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
fn a_third_region_behind_its_own_nat_joins() {
    let mesh = three_regions();
    insta::assert_snapshot!(routes(&mesh, "node-master"), @"
    ip route replace table 5130 throw 10.42.0.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.0.0 mtu 1420
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
    ip route replace table 5130 throw 10.42.4.0/24 proto 118
    ip route replace table 5130 throw 10.42.5.0/24 proto 118
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/24 metric 4278198272 proto 118
    ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.1.0/24 metric 4278198272 proto 118
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.2.0/24 metric 4278198272 proto 118
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.3.0/24 metric 4278198272 proto 118
    ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 192.168.50.11 metric 4278198272 proto 118
    ip route replace table 5130 192.168.50.12 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 192.168.50.12 metric 4278198272 proto 118
    ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 192.168.50.13 metric 4278198272 proto 118
    ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5131 unreachable 203.0.113.10 metric 4278198272 proto 118
    ip route replace table 5132 192.168.77.22 via 10.42.5.0 dev flannel.1 onlink proto 118
    ip rule add pref 5190 from all iif kilo0 lookup 5132 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn with_the_same_subnet_pods_are_carried_and_local_traffic_is_not_captured() {
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
    // The older nodes keep their addresses; the newer ones' pods are still reached.
    insta::assert_snapshot!(routes(&mesh, "node-master"), @"
    ip route replace table 5130 throw 10.42.0.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.5.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.11 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.12 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ");
    // No route leads to the node's own subnet in another region, except for the one address that no local node has.
    insta::assert_snapshot!(routes(&mesh, "node-b-01"), @"
    ip route replace table 5130 throw 10.42.4.0/24
    ip route replace table 5130 throw 10.42.5.0/24
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5130 192.168.50.13 via 10.4.0.2 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.4.0 mtu 1420
    ");
    insta::assert_snapshot!(routes(&mesh, "node-agent-02"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.3 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.5.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5131 203.0.113.10 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ");
}

#[test]
fn a_remote_api_server_is_reached_directly_by_the_host_and_by_tunnel_for_pods() {
    let mut mesh = two_regions();
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

/// Another region's node has the address of a printer here, or of this network's router.
#[test]
fn an_address_in_a_connected_network_is_left_to_that_network() {
    let mut mesh = Mesh::new([
        node("a1", "a", 1, "192.168.50.11/24"),
        node("b1", "b", 2, "192.168.1.1/24"),
        node("b2", "b", 3, "192.168.50.77/24"),
        node("b3", "b", 4, "192.168.50.1/24"),
    ]);
    mesh.add_peers([vpn_peer("phone", 9, &["192.168.50.99/32"])]);
    let about = |mesh: &Mesh, what: &str| {
        let lines = mesh.commands_of("a1", ROUTES);
        lines.lines().filter(|line| line.contains(what)).count()
    };
    let contested = ["192.168.50.77", "192.168.50.1/32", "192.168.50.99"];
    // Control: without a network of its own this node carries them all.
    assert!(about(&mesh, "192.168.50.77") > 0 && about(&mesh, "192.168.50.99") > 0);

    mesh.connected = [net("192.168.50.0/24")].into();
    for address in contested {
        assert_eq!(about(&mesh, address), 0, "{address}");
    }
    assert!(about(&mesh, "192.168.1.1") > 0, "all else is carried");
    let me = NodeName("a1".into());
    let topology = mesh.topology();
    let flannel = mesh.flannel(&me);
    let inputs = selvedge::plan::Inputs {
        topology: &topology,
        me: &me,
        flannel: &flannel,
        settings: &mesh.local,
        api_servers: &mesh.api_servers,
        observed: &mesh.observed,
        connected: &mesh.connected,
        other_rules: &mesh.other_rules,
        callers: &mesh.callers,
        verdicts: &mesh.verdicts,
        mtus: &mesh.mtus,
    };
    let caveats = selvedge::plan::caveats(&inputs, &mesh.state("a1"));
    let caveats: Vec<_> = caveats.iter().map(|caveat| format!("{caveat}\n")).collect();
    insta::assert_snapshot!(caveats.concat(), @"
    node b2: 192.168.50.77 is not reached through the tunnel from here, because this node is connected to 192.168.50.0/24
    node b3: 192.168.50.1 is not reached through the tunnel from here, because this node is connected to 192.168.50.0/24
    peer phone: 192.168.50.99 is not reached through the tunnel from here, because this node is connected to 192.168.50.0/24
    ");

    // The tunnel receives from the node at that address: the handshake proves it.
    let leader = mesh
        .topology()
        .segment_of(&NodeName("b2".into()))
        .unwrap()
        .primary()
        .public_key();
    mesh.observed = [(leader, "192.168.50.77:51820".parse().unwrap())].into();
    assert!(about(&mesh, "192.168.50.77") > 0);
}

#[test]
fn wide_location_ips_leave_connected_networks_alone() {
    let mut mesh = Mesh::new([
        node("a1", "a", 1, "10.1.0.1/24"),
        node("b1", "b", 2, "192.168.1.1/24")
            .with(|node| node.allowed_location_ips = vec![net("172.16.0.0/12")]),
    ]);
    mesh.connected = [net("172.16.9.0/24")].into();
    let routes = routes(&mesh, "a1");
    assert!(routes.contains("throw 172.16.9.0/24"), "{routes}");
    assert!(routes.contains(" 172.16.0.0/12 "), "{routes}");
}
