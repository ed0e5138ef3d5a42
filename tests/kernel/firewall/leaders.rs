//! Several leaders of a region: echoes through a leader, and packets that would go from one leader to the other
//! and back.

use selvedge::state::Firewall;
use selvedge_lab::netns::Namespace;

use super::mesh::Mesh;
use crate::fixture::firewall;

/// The leader's address for echoes.
const PROBE: &str = "10.4.255.254";

/// A mesh in which the leader's probe address leads into `kilo0`, behind which an agent answers.
fn with_a_probe_address(label: &str) -> Mesh {
    let mesh = Mesh::new(label);
    let route = format!("ip route add {PROBE} dev kilo0");
    mesh.leader.run(&route).unwrap();
    let agent = format!("ip addr add {PROBE}/32 dev lo");
    mesh.far.run(&agent).unwrap();
    // The other node's address in the pod network.
    mesh.near.run("ip addr add 10.42.2.0/32 dev lo").unwrap();
    mesh
}

#[test]
fn an_echo_of_a_node_passes_its_leader_both_ways_and_is_not_tracked() {
    let mesh = with_a_probe_address("echo");
    mesh.masquerade_as_flannel("iptables");
    let seen = || mesh.seen_by(&mesh.far, "10.42.2.0", PROBE);
    let tracked = || {
        let listed = mesh.leader.sh("conntrack -L -p udp 2>/dev/null");
        listed.unwrap().lines().count()
    };
    let control = seen();
    assert!(control.is_some() && control.as_deref() != Some("10.42.2.0"));
    assert_eq!(tracked(), 1, "control");
    mesh.leader.run("conntrack -F").unwrap();

    mesh.install(&firewall());

    assert_eq!(seen().as_deref(), Some("10.42.2.0"));
    assert_eq!(tracked(), 0);
}

#[test]
fn no_pod_sends_to_a_probe_address() {
    let mesh = with_a_probe_address("noecho");
    let arrives =
        |from: &Namespace, source: &str| mesh.delivered(from, source, &mesh.far, PROBE, 3785);
    // A pod of the region's other node, a host of the region, and a pod of the leader.
    let own = (&mesh.pod, "10.42.1.5");
    let attempts = [
        (&mesh.near, "10.42.2.5"),
        (&mesh.near, "192.168.50.12"),
        own,
    ];
    for (from, source) in attempts {
        assert!(arrives(from, source), "control: {source}");
    }
    mesh.install(&firewall());
    for (from, source) in attempts {
        assert!(!arrives(from, source), "{source}");
    }
    assert_eq!(mesh.counters().pod_drops, 3);
    assert!(arrives(&mesh.near, "10.42.2.0"), "the other node itself");

    // A node that does not lead forwards none, and sends its own.
    mesh.install(&Firewall {
        leader: false,
        ..firewall()
    });
    assert!(!arrives(own.0, own.1));
    assert_eq!(mesh.counters().pod_drops, 1);
}

#[test]
fn a_packet_that_would_go_back_to_the_region_is_dropped() {
    let mesh = Mesh::new("loop");
    // Another leader of the region, to which this one sends because its own tunnel is down.
    let other = Namespace::new("loopo").unwrap();
    mesh.leader.veth("flannel.1", &other, "eth0").unwrap();
    mesh.leader
        .sh("
            ip route add 10.42.2.0 dev flannel.1
            ip route replace 10.42.0.0/24 via 10.42.2.0 dev flannel.1 onlink
        ")
        .unwrap();
    other
        .sh("
            ip addr add 10.42.2.0/32 dev lo
            ip addr add 10.42.0.5/32 dev lo
        ")
        .unwrap();
    let arrives =
        |from: &Namespace, source: &str| mesh.delivered(from, source, &other, "10.42.0.5", 4000);
    let member = || arrives(&mesh.near, "192.168.50.12");
    assert!(member(), "control");

    mesh.install(&firewall());

    assert!(!member());
    let counters = mesh.counters();
    assert_eq!((counters.loop_drops, counters.leak_drops), (1, 0));
    assert!(arrives(&mesh.pod, "10.42.1.5"), "a pod of the leader");
}
