//! VXLAN, DirectRouting, host-gw and both address families.

use super::*;

/// `a` leads two followers, one of them in another subnet, which the operator declares; `b` is a remote region.
fn mesh() -> Mesh {
    Mesh::new([
        node("a1", "a", 1, "192.168.1.1/24").with(|n| n.endpoint = addr("203.0.113.1:51820")),
        node("a2", "a", 2, "192.168.1.2/24"),
        node("a3", "a", 3, "192.168.2.3/24"),
        node("b1", "b", 4, "172.16.0.1/24").with(|n| n.endpoint = addr("203.0.113.4:51820")),
    ])
    .with(|mesh| {
        let networks = vec![
            net("192.168.1.0/24"),
            net("192.168.2.0/24"),
            net("fd00::/16"),
        ];
        mesh.agreed.region_networks =
            [(selvedge::topology::RegionName("a".into()), networks)].into();
    })
}

#[test]
fn with_vxlan_all_traffic_inside_a_region_is_encapsulated() {
    let mesh = mesh();
    insta::assert_snapshot!(routes(&mesh, "a1"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5132 192.168.1.2 via 10.42.2.0 dev flannel.1 onlink
    ip route replace table 5132 192.168.2.3 via 10.42.3.0 dev flannel.1 onlink
    ");
    insta::assert_snapshot!(routes(&mesh, "a3"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ");
}

#[test]
fn with_direct_routing_only_traffic_to_other_subnets_is_encapsulated() {
    let mut mesh = mesh();
    mesh.direct_routing = true;
    insta::assert_snapshot!(routes(&mesh, "a1"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5132 192.168.2.3 via 10.42.3.0 dev flannel.1 onlink
    ");
    insta::assert_snapshot!(routes(&mesh, "a2"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
    ip route replace table 5130 172.16.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420
    ");
    insta::assert_snapshot!(routes(&mesh, "a3"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ");
}

#[test]
fn with_host_gw_nothing_is_encapsulated_and_followers_have_their_address_on_the_tunnels_link() {
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
    wg set kilo0 peer BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ= endpoint 203.0.113.4:51820 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.42.4.0/24,172.16.0.1/32
    nft -f -
    ip route replace table 5130 throw 10.42.1.0/24 proto 118
    ip route replace table 5130 throw 10.42.2.0/24 proto 118
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
    ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
    insta::assert_snapshot!(mesh.commands("a2"), @"
    ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
    sysctl -w net/ipv4/conf/kilo0/rp_filter=2
    ip link set kilo0 up
    ip addr add 10.42.2.0/32 dev kilo0
    wg set kilo0 listen-port 51820
    nft -f -
    ip route replace table 5130 throw 10.42.1.0/24 proto 118
    ip route replace table 5130 throw 10.42.2.0/24 proto 118
    ip route replace table 5130 10.4.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
    ip route replace table 5130 10.4.0.2 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.4.0/24 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
    ip route replace table 5130 172.16.0.1 via 192.168.1.1 dev eth0 src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn with_encapsulate_never_followers_use_the_leaders_own_address_on_the_same_subnet() {
    let mut mesh = mesh();
    mesh.local.encapsulation = selvedge::policy::Encapsulation::Never;
    insta::assert_snapshot!(routes(&mesh, "a2"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 172.16.0.1 via 192.168.1.1 dev eth0 onlink src 10.42.2.0 mtu 1420
    ");
    // Not on the same link: only flannel's next hop is left.
    insta::assert_snapshot!(routes(&mesh, "a3"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ");
}

#[test]
fn encapsulate_always_and_crosssubnet_are_the_same_beside_flannel() {
    use selvedge::flannel::Backend;
    use selvedge::policy::Encapsulation;

    for (backend, direct_routing) in [
        (Backend::Vxlan, false),
        (Backend::Vxlan, true),
        (Backend::HostGw, false),
    ] {
        let mut mesh = mesh();
        mesh.backend = backend;
        mesh.direct_routing = direct_routing;
        for node in ["a1", "a2", "a3", "b1"] {
            mesh.local.encapsulation = Encapsulation::CrossSubnet;
            let follows = mesh.state(node);
            mesh.local.encapsulation = Encapsulation::Always;
            assert_eq!(mesh.state(node), follows, "{node} with {backend:?}");
        }
    }
}

#[test]
fn a_follower_without_flannels_device_refuses_remote_traffic() {
    let mesh = mesh();
    let me = NodeName("a2".into());
    let mut flannel = mesh.flannel(&me);
    flannel.vteps.clear();
    flannel.next_hops.clear();
    let state = mesh.plan_beside(&flannel, &mesh.topology(), &me);
    let routes = lines(&diff(&State::default(), &state.unwrap()));
    assert!(routes.contains("unreachable 10.42.4.0/24"));
    assert!(!routes.contains("via"));
}

#[test]
fn a_route_that_flannel_lost_is_replaced_by_the_one_it_would_install() {
    let mesh = mesh();
    let me = NodeName("a2".into());
    let mut flannel = mesh.flannel(&me);
    flannel.next_hops.clear();
    let state = mesh.plan_beside(&flannel, &mesh.topology(), &me);
    assert_eq!(state, Some(mesh.state("a2")));
}

#[test]
fn dual_stack_has_routes_of_both_families() {
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
    wg set kilo0 peer BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ= endpoint 203.0.113.4:51820 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.42.4.0/24,172.16.0.1/32,fd00:3::1/128,fd04::2/128,fd42:0:0:4::/64
    nft -f -
    ip route replace table 5130 throw 10.42.1.0/24 proto 118
    ip route replace table 5130 throw 10.42.2.0/24 proto 118
    ip route replace table 5130 throw 10.42.3.0/24 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:1::/64 metric 512 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:2::/64 metric 512 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:3::/64 metric 512 proto 118
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
    ip route replace table 5130 172.16.0.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd00:3::1 via fd04::2 dev kilo0 onlink src fd42:0:0:1:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd00:3::1 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd04::2 dev kilo0 src fd42:0:0:1:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd04::2 metric 4278198272 proto 118
    ip -6 route replace table 5130 unreachable fd42::/48 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd42:0:0:4::/64 via fd04::2 dev kilo0 onlink src fd42:0:0:1:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd42:0:0:4::/64 metric 4278198272 proto 118
    ip route replace table 5132 192.168.1.2 via 10.42.2.0 dev flannel.1 onlink proto 118
    ip route replace table 5132 192.168.2.3 via 10.42.3.0 dev flannel.1 onlink proto 118
    ip -6 route replace table 5132 fd00:1::1 via fd42:0:0:2:: dev flannel-v6.1 onlink metric 512 proto 118
    ip -6 route replace table 5132 fd00:2::1 via fd42:0:0:3:: dev flannel-v6.1 onlink metric 512 proto 118
    ip rule add pref 5190 from all iif kilo0 lookup 5132 proto 118
    ip -6 rule add pref 5190 from all iif kilo0 lookup 5132 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip -6 rule add pref 5191 from fd42::/48 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ip -6 rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
    insta::assert_snapshot!(mesh.commands("a2"), @"
    ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
    sysctl -w net/ipv4/conf/kilo0/rp_filter=2
    sysctl -w net/ipv6/conf/kilo0/addr_gen_mode=1
    wg set kilo0 listen-port 51820
    nft -f -
    ip route replace table 5130 throw 10.42.1.0/24 proto 118
    ip route replace table 5130 throw 10.42.2.0/24 proto 118
    ip route replace table 5130 throw 10.42.3.0/24 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:1::/64 metric 512 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:2::/64 metric 512 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:3::/64 metric 512 proto 118
    ip route replace table 5130 10.4.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.1 metric 4278198272 proto 118
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.2 metric 4278198272 proto 118
    ip route replace table 5130 unreachable 10.42.0.0/16 metric 4278198272 proto 118
    ip route replace table 5130 10.42.4.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.42.4.0/24 metric 4278198272 proto 118
    ip route replace table 5130 172.16.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 172.16.0.1 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd00:3::1 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd00:3::1 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd04::1 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd04::1 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd04::2 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd04::2 metric 4278198272 proto 118
    ip -6 route replace table 5130 unreachable fd42::/48 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd42:0:0:4::/64 via fd42:0:0:1:: dev flannel-v6.1 onlink src fd42:0:0:2:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd42:0:0:4::/64 metric 4278198272 proto 118
    ip rule add pref 5191 from 10.42.0.0/16 lookup 5131 proto 118
    ip -6 rule add pref 5191 from fd42::/48 lookup 5131 proto 118
    ip rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ip -6 rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn an_ipv6_cluster_has_no_ipv4_routes() {
    let mut mesh = mesh();
    for (index, node) in mesh.snapshot.nodes.values_mut().enumerate() {
        node.pod_cidrs = vec![net(&format!("fd42:0:0:{}::/64", index + 1))];
    }
    // The underlay is still IPv4.
    insta::assert_snapshot!(mesh.commands("a1"), @"
    ip tuntap add kilo0 mode tun; ip link set kilo0 mtu 1420
    sysctl -w net/ipv4/conf/kilo0/rp_filter=2
    sysctl -w net/ipv6/conf/kilo0/addr_gen_mode=1
    ip link set kilo0 up
    ip addr add fd42:0:0:1::/128 dev kilo0
    wg set kilo0 listen-port 51820
    wg set kilo0 peer BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ= endpoint 203.0.113.4:51820 persistent-keepalive 25 allowed-ips 10.4.0.2/32,fd42:0:0:4::/64
    nft -f -
    ip -6 route replace table 5130 throw fd42:0:0:1::/64 metric 512 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:2::/64 metric 512 proto 118
    ip -6 route replace table 5130 throw fd42:0:0:3::/64 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd42::/48 metric 4278198272 proto 118
    ip -6 route replace table 5130 fd42:0:0:4::/64 dev kilo0 src fd42:0:0:1:: mtu lock 1420 metric 512 proto 118
    ip -6 route replace table 5130 unreachable fd42:0:0:4::/64 metric 4278198272 proto 118
    ip -6 rule add pref 5191 from fd42::/48 lookup 5131 proto 118
    ip -6 rule add pref 5192 not from all fwmark 0x51e00000 lookup 5130 proto 118
    ");
}

#[test]
fn keepalives_go_to_every_peer_that_has_not_opened_a_session_without_them() {
    let keepalive = |endpoint: &str, forced: bool, change: &dyn Fn(&mut Mesh)| {
        let mut mesh = mesh();
        let leader = mesh.snapshot.nodes.get_mut(&NodeName("a1".into())).unwrap();
        leader.endpoint = addr(endpoint);
        leader.endpoint_forced = forced;
        change(&mut mesh);
        let peers = mesh.state("a1").peers;
        peers.into_values().next().unwrap().persistent_keepalive
    };
    let every_25_seconds = std::num::NonZeroU16::new(25);
    for endpoint in [
        "[2001:db8:50::11]:51820",
        "203.0.113.1:51820",
        "192.168.1.1:51820",
    ] {
        for forced in [false, true] {
            assert_eq!(keepalive(endpoint, forced, &|_| {}), every_25_seconds);
        }
    }
    let called = |mesh: &mut Mesh| mesh.callers = [key(4)].into();
    assert_eq!(keepalive("192.168.1.1:51820", false, &called), None);
    let off = |mesh: &mut Mesh| {
        let leader = mesh.snapshot.nodes.get_mut(&NodeName("a1".into())).unwrap();
        leader.persistent_keepalive = Some(0);
    };
    assert_eq!(keepalive("192.168.1.1:51820", false, &off), None);
}
