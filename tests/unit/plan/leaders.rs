//! The election of leaders, and the changes of another leader.

use super::*;

fn leader_of(mesh: &Mesh, region: &str) -> String {
    let topology = mesh.topology();
    let mut segments = topology.segments.iter();
    let segment = segments.find(|s| s.name.to_string() == format!("location:{region}"));
    segment.unwrap().primary().node.0.clone()
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
        let mut mesh = two_regions();
        assert_eq!(leader_of(&mesh, "nd"), "node-agent-01");
        lose(&mut mesh);
        assert_eq!(leader_of(&mesh, "nd"), "node-agent-02");
    }
}

#[test]
fn where_no_node_is_ready_the_operators_choice_still_leads() {
    let mut mesh = two_regions();
    for node in mesh.snapshot.nodes.values_mut() {
        node.ready = false;
    }
    assert_eq!(leader_of(&mesh, "nd"), "node-agent-01");
}

#[test]
fn leaders_are_elected_in_kilos_order() {
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
fn followers_move_to_a_new_leader_without_an_interruption() {
    let before = two_regions();
    let mut after = before.clone();
    after.node("node-agent-01").ready = false;

    let changes = |me: &str| lines(&diff(&before.state(me), &after.state(me)));
    insta::assert_snapshot!(changes("node-agent-03"), @"
    nft -f -
    ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
    ip route replace table 5130 10.4.0.3 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.3 metric 4278198272 proto 118
    ip route replace table 5130 10.42.0.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
    ip route replace table 5131 203.0.113.10 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420 proto 118
    ip route del table 5130 10.4.0.2 metric 4278198272 proto 118
    ip route del table 5130 10.4.0.2 proto 118
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
    ip rule add pref 5190 from all iif kilo0 lookup 5132 proto 118
    ip route del table 5130 10.4.0.2 metric 4278198272 proto 118
    ip route del table 5130 10.4.0.2 proto 118
    ");
    insta::assert_snapshot!(changes("node-agent-01"), @"
    nft -f -
    ip route replace table 5130 10.4.0.1 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 10.4.0.3 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.4.0.3 metric 4278198272 proto 118
    ip route replace table 5130 10.42.0.0/24 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
    ip route replace table 5131 203.0.113.10 via 10.42.2.0 dev flannel.1 onlink src 10.42.1.0 mtu 1420 proto 118
    ip rule del pref 5190 from all iif kilo0 lookup 5132 proto 118
    ip route del table 5132 192.168.50.13 proto 118
    ip route del table 5132 192.168.50.12 proto 118
    wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= remove
    ip addr del 10.4.0.2/32 dev kilo0
    ip addr del 10.42.1.0/32 dev kilo0
    ip link set kilo0 down
    ");
    insta::assert_snapshot!(changes("node-master"), @"
    wg set kilo0 peer h/wYe0dl8DAI8SLTR2E+bEkgxVvTFwS0ArNTXESFtFw= endpoint 192.168.50.12:51820 persistent-keepalive 25 allowed-ips 10.4.0.3/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
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
    ip route del table 5130 192.168.50.12 metric 4278198272 proto 118
    ip route del table 5130 192.168.50.12 proto 118
    ip route del table 5130 10.4.0.2 metric 4278198272 proto 118
    ip route del table 5130 10.4.0.2 proto 118
    wg set kilo0 peer jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w= remove
    ");
}
