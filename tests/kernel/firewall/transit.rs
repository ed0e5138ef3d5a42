//! Packets that come out of the tunnel and would go into it again: external peers' and a relay's, and no others.

use std::net::UdpSocket;
use std::time::Duration;

use selvedge::state::{Firewall, RelayDoor};
use selvedge_lab::netns::Namespace;

use super::bind;
use super::mesh::Mesh;
use crate::fixture::{firewall, ip};

/// A leader, a leader elsewhere, and a third one behind the same tunnel: what the second sends to the third goes through
/// the first.
struct Transit {
    mesh: Mesh,
    third: Namespace,
}

impl Transit {
    fn new(label: &str) -> Self {
        let mesh = Mesh::new(label);
        let third = Namespace::new(&format!("{label}t")).unwrap();
        mesh.far.veth("third", &third, "eth0").unwrap();
        mesh.leader
            .sh("
                sysctl -q net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.kilo0.rp_filter=0
                sysctl -q net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.kilo0.send_redirects=0
                ip route add 10.4.0.3 via 10.4.0.1 dev kilo0
                ip route add 10.42.4.0/24 via 10.4.0.1 dev kilo0
            ")
            .unwrap();
        mesh.far
            .sh("
                # Its packets come back to it on their way to the third.
                sysctl -q net.ipv4.ip_forward=1 net.ipv4.conf.kilo0.accept_local=1
                sysctl -q net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.kilo0.rp_filter=0 net.ipv4.conf.third.rp_filter=0
                ip rule add pref 100 iif kilo0 lookup 100
                ip route add table 100 10.4.0.3 dev third
                ip route add table 100 10.42.4.0/24 via 10.4.0.3 dev third onlink
                ip rule add pref 101 iif third lookup 101
                ip route add table 101 default via 10.4.0.2 dev kilo0 onlink
            ")
            .unwrap();
        third
            .sh("
                sysctl -q net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0
                ip addr add 10.4.0.3/32 dev eth0
                ip addr add 10.42.4.5/32 dev lo
                ip route add 10.4.0.1 dev eth0
                ip route add default via 10.4.0.1 dev eth0
            ")
            .unwrap();
        Self { mesh, third }
    }

    /// Whether a datagram of the second arrives at the third.
    fn arrives(&self, from: (&str, u16), to: (&str, u16)) -> bool {
        let server = self.third.within(|| bind(to.0, to.1));
        server
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        self.mesh.far.within(|| {
            let client = match from.1 {
                0 => UdpSocket::bind((from.0, 0)).unwrap(),
                port => bind(from.0, port),
            };
            client.send_to(b"?", to).unwrap();
        });
        server.recv(&mut [0; 8]).is_ok()
    }

    /// The table of a leader that relays to some of the addresses.
    fn install(&self, to: &[&str]) {
        self.mesh.install(&Firewall {
            relay: RelayDoor {
                from: ["10.4.0.1", "10.4.0.3"].map(ip).into(),
                to: to.iter().map(|address| ip(address)).collect(),
            },
            ..firewall()
        });
    }
}

const RELAYED: [(&str, u16); 2] = [("10.4.0.1", 51_820), ("10.4.0.3", 51_820)];

#[test]
fn a_leader_passes_on_a_relays_datagrams_and_nothing_else_between_two_regions() {
    let transit = Transit::new("transit");
    let others = [
        // A pod to a pod, a node to a pod, and leaders by other ports.
        (("10.42.0.5", 0), ("10.42.4.5", 4000)),
        (("203.0.113.10", 0), ("10.42.4.5", 4000)),
        (("10.4.0.1", 51_820), ("10.4.0.3", 51_821)),
        (("10.4.0.1", 51_821), ("10.4.0.3", 51_820)),
        // What only looks like a relay's.
        (("10.42.0.5", 51_820), ("10.4.0.3", 51_820)),
        (("10.4.0.1", 51_820), ("10.42.4.5", 51_820)),
    ];
    for (from, to) in others.into_iter().chain([RELAYED.into()]) {
        assert!(transit.arrives(from, to), "control: {from:?} to {to:?}");
    }

    transit.install(&["10.4.0.1", "10.4.0.3"]);

    assert!(transit.arrives(RELAYED[0], RELAYED[1]));
    assert_eq!(transit.mesh.counters().transit_drops, 0);
    for (from, to) in others {
        assert!(!transit.arrives(from, to), "{from:?} to {to:?}");
    }
    assert_eq!(transit.mesh.counters().transit_drops, 6);
}

#[test]
fn a_leader_relays_only_to_leaders_that_it_reaches_directly() {
    let transit = Transit::new("onedeep");
    transit.install(&["10.4.0.1"]);
    assert!(!transit.arrives(RELAYED[0], RELAYED[1]));
    assert_eq!(transit.mesh.counters().transit_drops, 1);
    // Another element of a set, and no other table.
    transit.install(&["10.4.0.3"]);
    assert!(transit.arrives(RELAYED[0], RELAYED[1]), "control");
    transit.install(&[]);
    assert!(!transit.arrives(RELAYED[0], RELAYED[1]));
}

#[test]
fn packets_of_external_peers_pass_from_one_region_to_another_both_ways() {
    let transit = Transit::new("vpnthru");
    transit.install(&[]);
    let from_peer = (("10.5.0.1", 0), ("10.42.4.5", 4000));
    assert!(transit.arrives(from_peer.0, from_peer.1));
    // Its answer: the peer is behind the second, too.
    let back = || {
        let mesh = &transit.mesh;
        mesh.delivered(&transit.third, "10.42.4.5", &mesh.far, "10.5.0.1", 4000)
    };
    assert!(back());
    assert_eq!(transit.mesh.counters().transit_drops, 0);
    assert!(!transit.arrives(("10.42.0.5", 0), ("10.42.4.5", 4000)));
}

#[test]
fn a_service_that_a_leader_translates_is_reached_from_another_region() {
    let transit = Transit::new("svcthru");
    // A node port of the leader's, behind which is a pod of a third region.
    transit
        .mesh
        .leader
        .sh("
            nft add table ip kp
            nft 'add chain ip kp pre { type nat hook prerouting priority -100; }'
            nft 'add rule ip kp pre udp dport 30000 dnat to 10.42.4.5'
            nft 'add chain ip kp post { type nat hook postrouting priority 100; }'
            nft 'add rule ip kp post ct status dnat masquerade'
        ")
        .unwrap();
    transit.install(&[]);
    let server = transit.third.within(|| bind("10.42.4.5", 30_000));
    server
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    transit.mesh.far.within(|| {
        let client = UdpSocket::bind(("10.42.0.5", 0)).unwrap();
        client.send_to(b"?", ("10.4.0.2", 30_000)).unwrap();
    });
    assert!(server.recv(&mut [0; 8]).is_ok());
}
