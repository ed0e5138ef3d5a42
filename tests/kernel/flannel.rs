//! flannel's state in the kernel is read, and restored when its device was recreated.

use std::net::IpAddr;

use selvedge::flannel::{Backend, Flannel, Lease, Mac};
use selvedge::kernel::flannel_repair::{self, FlannelState};

use crate::fixture::{Node, hop, ip, net};

const NEIGHBOUR: Mac = Mac([0x8e, 0x4d, 0x2a, 0x67, 0xf4, 0xa5]);

fn read(node: &Node) -> FlannelState {
    let networks = [net("10.42.0.0/16"), net("fd42::/56")];
    node.with(|kernel| kernel.rtnetlink.flannel(&networks).unwrap())
}

fn flannel(found: &FlannelState) -> Flannel {
    Flannel {
        backend: Backend::Vxlan,
        direct_routing: false,
        networks: vec![net("10.42.0.0/16"), net("fd42::/56")],
        subnets: vec![net("10.42.1.0/24"), net("fd42:0:0:1::/64")],
        mtu: 1450,
        vteps: found.vteps.clone(),
        next_hops: found.next_hops.clone(),
    }
}

/// The other node of the region.
fn lease() -> Lease {
    Lease {
        backend: Some(Backend::Vxlan),
        vni: Some(1),
        vtep_mac: Some(NEIGHBOUR),
        vtep_mac_v6: Some(Mac([6; 6])),
        public_ip: Some([192, 168, 50, 12].into()),
        public_ipv6: Some("2001:db8:50::12".parse().unwrap()),
    }
}

#[test]
fn flannels_devices_and_entries_are_read() {
    let node = Node::new("read");
    node.sh("
        ip link add vxlan9 type vxlan id 9 dev eth0 dstport 4789
        ip route add 10.99.0.0/24 via 192.168.50.1
        ip route add 10.42.3.0/24 via 192.168.50.13
        ip route add 10.42.4.0/24 via 192.168.50.14 proto bird
    ");

    let found = read(&node);

    let [v4, v6] = &found.vteps[..] else {
        panic!("{:?}", found.vteps);
    };
    assert_eq!((v4.name.as_str(), v4.vni, v4.port), ("flannel.1", 1, 8472));
    assert_eq!(v4.mac, Mac([0x9e, 0x94, 0xf2, 0xd4, 0xca, 0x3a]));
    assert_eq!((v4.mtu, v4.local), (1450, Some(ip("192.168.50.11"))));
    assert_eq!(v4.parent.as_deref(), Some("eth0"));
    assert_eq!(v4.addresses, [net("10.42.1.0/32")]);
    assert_eq!(
        (v6.name.as_str(), v6.local),
        ("flannel-v6.1", Some(ip("2001:db8:50::11")))
    );
    assert_eq!(v6.addresses, [net("fd42:0:0:1::/128")]);
    assert_eq!(
        found.next_hops,
        [
            (
                net("10.42.2.0/24"),
                hop(Some("10.42.2.0"), "flannel.1", true)
            ),
            (
                net("10.42.3.0/24"),
                hop(Some("192.168.50.13"), "eth0", false)
            ),
        ]
        .into()
    );
    assert_eq!(
        found.neighbours,
        [((v4.index, ip("10.42.2.0")), NEIGHBOUR)].into()
    );
    let to: IpAddr = ip("192.168.50.12");
    assert_eq!(found.forwarding[&(v4.index, NEIGHBOUR)], [to].into());
}

#[test]
fn a_recreated_device_gets_flannels_entries_back() {
    const DUMP: &str = "
        ip route | grep flannel; ip neigh show dev flannel.1
        bridge fdb show dev flannel.1 | grep -v 33:33 | grep -v 01:00
    ";
    let node = Node::new("repair");
    let before = node.sh(DUMP);
    let pods = [net("10.42.2.0/24"), net("fd42:0:0:2::/64")];
    let missing = |found: &FlannelState| {
        flannel_repair::missing(&flannel(found), &[(&pods, &lease())], found)
    };
    let v6 = missing(&read(&node));
    assert_eq!(
        v6.len(),
        3,
        "the fixture has nothing of IPv6 for the other node: {v6:?}"
    );

    node.sh("
        ip link del flannel.1
        ip link add flannel.1 mtu 1450 address 9e:94:f2:d4:ca:3a type vxlan id 1 local 192.168.50.11 dev eth0 dstport 8472 nolearning
        ip addr add 10.42.1.0/32 dev flannel.1
        ip link set flannel.1 up
    ");
    let repairs = missing(&read(&node));
    node.with(|kernel| {
        assert!(kernel.rtnetlink.repair(&repairs).is_empty());
        // flannel may have been quicker.
        assert!(kernel.rtnetlink.repair(&repairs).is_empty());
    });

    assert_eq!(node.sh(DUMP), before);
    assert_eq!(missing(&read(&node)), vec![]);
    insta::assert_snapshot!(node.sh("ip -6 route show dev flannel-v6.1 | grep via; ip -6 neigh show dev flannel-v6.1; bridge fdb show dev flannel-v6.1 | grep dst"), @r"
    fd42:0:0:2::/64 via fd42:0:0:2:: metric 1024 onlink pref medium
    fd42:0:0:2:: lladdr 06:06:06:06:06:06 PERMANENT 
    06:06:06:06:06:06 dst 2001:db8:50::12 self permanent
    ");

    // flannel's own later replacement changes nothing.
    node.run("ip route replace 10.42.2.0/24 via 10.42.2.0 dev flannel.1 onlink");
    assert_eq!(node.sh(DUMP), before);
}

#[test]
fn a_deleted_entry_is_restored_even_while_traffic_needs_it() {
    let node = Node::new("entry");
    let pods = [net("10.42.2.0/24")];
    let dump =
        || node.sh("ip neigh show dev flannel.1; bridge fdb show dev flannel.1 | grep dst || true");
    let before = dump();
    for damage in [
        "ip neigh del 10.42.2.0 dev flannel.1",
        "bridge fdb del 8e:4d:2a:67:f4:a5 dst 192.168.50.12 dev flannel.1",
    ] {
        node.run(damage);
        // A packet makes the kernel add an incomplete neighbour.
        node.sh("ping -c 1 -W 1 10.42.2.9 >/dev/null || true");
        assert_ne!(dump(), before, "{damage}");

        let found = read(&node);
        let repairs = flannel_repair::missing(&flannel(&found), &[(&pods, &lease())], &found);
        assert!(node.with(|kernel| kernel.rtnetlink.repair(&repairs).is_empty()));

        assert_eq!(dump(), before, "{damage}");
    }
}

#[test]
fn a_repair_for_a_deleted_link_fails() {
    let node = Node::new("late");
    let pods = [net("fd42:0:0:2::/64")];
    let found = read(&node);
    let repairs = flannel_repair::missing(&flannel(&found), &[(&pods, &lease())], &found);
    node.run("ip link del flannel-v6.1");

    let failed = node.with(|kernel| kernel.rtnetlink.repair(&repairs).len());

    assert_eq!(failed, 3);
}
