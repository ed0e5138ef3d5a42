//! A segment with several leaders. The election names one leader so far; the plan takes a list.

use selvedge::topology::{Leader, Topology};

use super::*;
use crate::fake_kernel::FakeKernel;

/// The main scenario, with node-agent-02 as a second leader of region nd.
fn two_leaders() -> (Mesh, Topology) {
    let mesh = two_regions();
    let mut topology = mesh.topology();
    let name = NodeName("node-agent-02".into());
    let second = &mesh.snapshot.nodes[&name];
    let mut segments = topology.segments.iter_mut();
    let nd = segments.find(|segment| segment.nodes.len() == 3).unwrap();
    nd.leaders.push(Leader {
        node: name,
        keys: second.public_key.into_iter().collect(),
        wireguard_ips: vec![ip("10.4.0.3")],
        ..nd.primary().clone()
    });
    (mesh, topology)
}

fn state(mesh: &Mesh, topology: &Topology, me: &str) -> State {
    let state = mesh.plan(topology, &NodeName(me.into()));
    state.expect("the cluster knows the node")
}

/// The commands of a fresh node that begin with one of these words, without backstops.
fn commands(mesh: &Mesh, topology: &Topology, me: &str, wanted: &[&str]) -> String {
    let changes = diff(&State::default(), &state(mesh, topology, me));
    let text = lines(&changes).replace(" proto 118", "");
    let wanted = |line: &&str| wanted.iter().any(|start| line.starts_with(start));
    let lines = text.lines().filter(wanted);
    lines
        .filter(|line| !line.contains("unreachable"))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn a_remote_leader_has_a_peer_for_each_leader_and_routes_over_all_of_them() {
    let (mesh, topology) = two_leaders();
    let wanted = ["wg set kilo0 peer", "ip route replace table"];
    insta::assert_snapshot!(commands(&mesh, &topology, "node-master", &wanted), @"
    wg set kilo0 peer h/wYe0dl8DAI8SLTR2E+bEkgxVvTFwS0ArNTXESFtFw= endpoint 198.51.100.7:24276 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.4.0.3/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
    wg set kilo0 peer jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w= endpoint 198.51.100.7:24276 persistent-keepalive 25 allowed-ips 10.4.0.2/32,10.4.0.3/32,10.42.1.0/24,10.42.2.0/24,10.42.3.0/24,192.168.50.11/32,192.168.50.12/32,192.168.50.13/32
    ip route replace table 5130 throw 10.42.0.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.11 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.12 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ip route replace table 5130 192.168.50.13 nexthop via 10.4.0.2 dev kilo0 onlink nexthop via 10.4.0.3 dev kilo0 onlink src 10.42.0.0 mtu 1420
    ");
}

#[test]
fn a_follower_spreads_its_flows_over_the_leaders_of_its_segment() {
    let (mesh, topology) = two_leaders();
    let wanted = ["wg set kilo0 peer", "ip route replace table"];
    insta::assert_snapshot!(commands(&mesh, &topology, "node-agent-03", &wanted), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 nexthop via 10.42.1.0 dev flannel.1 onlink nexthop via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.4.0.3 via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 nexthop via 10.42.1.0 dev flannel.1 onlink nexthop via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ip route replace table 5131 203.0.113.10 nexthop via 10.42.1.0 dev flannel.1 onlink nexthop via 10.42.2.0 dev flannel.1 onlink src 10.42.3.0 mtu 1420
    ");
}

#[test]
fn each_leader_has_its_own_address_and_reaches_the_other_leaders_by_flannel() {
    let (mesh, topology) = two_leaders();
    let wanted = ["ip addr add", "wg set kilo0 peer", "ip route replace table"];
    insta::assert_snapshot!(commands(&mesh, &topology, "node-agent-02", &wanted), @"
    ip addr add 10.4.0.3/32 dev kilo0 scope link
    ip addr add 10.42.2.0/32 dev kilo0
    wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 throw 10.42.3.0/24
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.4.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.42.0.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5131 203.0.113.10 via 10.4.0.1 dev kilo0 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5132 192.168.50.11 via 10.42.1.0 dev flannel.1 onlink
    ip route replace table 5132 192.168.50.13 via 10.42.3.0 dev flannel.1 onlink
    ");
}

#[test]
fn leaders_share_the_destinations_that_are_not_their_own_and_each_may_send_from_all() {
    let (mesh, topology) = two_leaders();
    let nets = |texts: &[&str]| texts.iter().map(|text| net(text)).collect::<BTreeSet<_>>();
    let shared = nets(&["10.42.3.0/24", "192.168.50.13/32"]);
    let first = nets(&["10.4.0.2/32", "10.42.1.0/24", "192.168.50.11/32"]);
    let second = nets(&["10.4.0.3/32", "10.42.2.0/24", "192.168.50.12/32"]);

    let state = state(&mesh, &topology, "node-master");
    let [one, two] = [&first, &second].map(|own| own.union(&shared).copied().collect());
    let routes = state.peers.values().map(|peer| &peer.routes);
    assert_eq!(routes.collect::<Vec<_>>(), [&one, &two]);
    let all = one.union(&two).copied().collect();
    assert!(state.peers.values().all(|peer| peer.accepts == all));
}

#[test]
fn a_kernel_takes_the_change_to_two_leaders_and_back() {
    let (mesh, two) = two_leaders();
    let one = mesh.topology();
    for me in mesh.names() {
        let mut kernel = FakeKernel::before_the_agent(&mesh, me);
        for topology in [&one, &two, &one] {
            let desired = mesh.plan(topology, me).unwrap();
            for change in diff(&kernel.observe(), &desired) {
                kernel.apply(&change).unwrap();
            }
            assert_eq!(kernel.observe(), desired, "{me}");
        }
    }
}
