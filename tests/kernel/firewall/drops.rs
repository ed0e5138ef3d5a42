//! Which packets are dropped: VXLAN that leaves its region, packets beside the tunnel, from pods, and from
//! outside the mesh.

use std::net::{SocketAddr, UdpSocket};

use selvedge::kernel::Counters;
use selvedge::state::Firewall;
use selvedge_lab::netns::Namespace;

use super::mesh::Mesh;
use crate::fixture::{firewall, nets};

#[test]
fn vxlan_to_other_regions_is_dropped() {
    let mesh = Mesh::new("vxlan");
    let send = |to: &str| {
        let address: SocketAddr = to.parse().unwrap();
        mesh.leader.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"vxlan", address).is_ok()
        })
    };
    assert!(send("203.0.113.10:8472"), "control");
    mesh.install(&firewall());

    assert!(send("192.168.50.12:8472"));
    assert!(send("203.0.113.10:8473"));
    assert!(!send("203.0.113.10:8472"));
    assert_eq!(mesh.counters().leak_drops, 1);

    mesh.install(&Firewall {
        fail_closed: false,
        ..firewall()
    });
    assert!(send("203.0.113.10:8472"));
    let expected = Counters {
        leaks: 1,
        ..Counters::default()
    };
    assert_eq!(mesh.counters(), expected);
}

#[test]
fn packets_to_remote_pods_beside_the_tunnel_are_dropped() {
    let mesh = Mesh::new("beside");
    mesh.leader
        .run("ip route replace 10.42.0.0/24 dev wan")
        .unwrap();
    let arrives = || mesh.seen_by(&mesh.far, "10.42.2.5", "10.42.0.5").is_some();
    assert!(arrives(), "control");

    mesh.install(&firewall());

    assert!(!arrives());
    assert_eq!(mesh.counters().leak_drops, 1);
}

#[test]
fn vxlan_and_wireguard_from_pods_to_nodes_are_dropped() {
    let mesh = Mesh::new("pods");
    let from_pod = |source: &str, to: &str, port: u16| {
        let target = if to == "192.168.50.12" {
            &mesh.near
        } else {
            &mesh.leader
        };
        mesh.delivered(&mesh.pod, source, target, to, port)
    };
    let attempts = [
        ("10.42.1.5", "192.168.50.11", 8472),
        ("10.42.1.5", "192.168.50.11", 51820),
        ("10.42.1.5", "192.168.50.12", 8472),
        // In the name of a node of the region.
        ("192.168.50.13", "192.168.50.11", 8472),
        ("192.168.50.13", "192.168.50.12", 8472),
    ];
    for (source, to, port) in attempts {
        assert!(
            from_pod(source, to, port),
            "control: {source} to {to}:{port}"
        );
    }
    mesh.install(&firewall());
    for (source, to, port) in attempts {
        assert!(!from_pod(source, to, port), "{source} to {to}:{port}");
    }
    assert_eq!(mesh.counters().pod_drops, 5);
    assert!(from_pod("10.42.1.5", "192.168.50.11", 53), "all else goes");
    assert!(mesh.delivered(
        &mesh.near,
        "192.168.50.12",
        &mesh.leader,
        "192.168.50.11",
        8472
    ));
}

#[test]
fn vxlan_out_of_the_tunnel_is_dropped() {
    let mesh = Mesh::new("out");
    let attempts = [
        // A pod of another region, and a VPN peer.
        ("10.42.0.5", "192.168.50.11"),
        ("10.42.0.5", "192.168.50.12"),
        ("10.5.0.1", "192.168.50.11"),
        ("10.5.0.1", "192.168.50.12"),
    ];
    let arrives = |(source, to): (&str, &str), port| {
        mesh.delivered(&mesh.far, source, mesh.owner(to), to, port)
    };
    for attempt in attempts {
        assert!(arrives(attempt, 8472), "control: {attempt:?}");
    }
    mesh.install(&firewall());
    for attempt in attempts {
        assert!(!arrives(attempt, 8472), "{attempt:?}");
        assert!(arrives(attempt, 53), "all else goes: {attempt:?}");
    }
    assert_eq!(mesh.counters().pod_drops, 4);
}

#[test]
fn a_host_outside_the_region_cannot_send_into_the_tunnel() {
    let mesh = Mesh::new("door");
    mesh.near
        .run("ip addr add 192.168.50.77/24 dev eth0")
        .unwrap();
    // A node port of the leader's, behind which is a pod elsewhere.
    mesh.leader
        .sh("
            nft add table ip kp
            nft 'add chain ip kp pre { type nat hook prerouting priority -100; }'
            nft 'add rule ip kp pre udp dport 30000 dnat to 10.42.0.5'
            nft 'add chain ip kp post { type nat hook postrouting priority 100; }'
            nft 'add rule ip kp post ct status dnat masquerade'
        ")
        .unwrap();
    let arrives = |from: &Namespace, source: &str, to: &str| {
        mesh.delivered(from, source, &mesh.far, to, 4000)
    };
    let stranger = |to: &str| arrives(&mesh.near, "192.168.50.77", to);
    assert!(stranger("10.42.0.5"), "control");
    mesh.install(&firewall());

    assert!(!stranger("10.42.0.5"));
    assert_eq!(mesh.counters().stranger_drops, 1);
    assert!(
        arrives(&mesh.near, "192.168.50.12", "10.42.0.5"),
        "a node of the region"
    );
    assert!(
        arrives(&mesh.near, "10.42.2.5", "10.42.0.5"),
        "a pod of the region"
    );
    assert!(
        arrives(&mesh.pod, "10.42.1.5", "10.42.0.5"),
        "a pod of the leader"
    );
    // In the name of a node, by the device of the pods.
    assert!(!arrives(&mesh.pod, "192.168.50.13", "10.42.0.5"));
    let node_port = || {
        mesh.delivered_by(
            &mesh.near,
            "192.168.50.77",
            &mesh.far,
            ("192.168.50.11", 30000),
            30000,
        )
    };
    assert!(node_port(), "what the leader itself translated");
}

#[test]
fn vxlan_from_outside_the_region_is_dropped() {
    let mesh = Mesh::new("vxin");
    let arrives = |from: &Namespace, source: &str, to: &str| {
        mesh.delivered(from, source, &mesh.leader, to, 8472)
    };
    let stranger = || arrives(&mesh.far, "198.51.100.10", "198.51.100.1");
    let member = || arrives(&mesh.near, "192.168.50.12", "192.168.50.11");
    assert!(stranger() && member(), "control");

    mesh.install(&firewall());
    assert!(!stranger());
    assert!(member());

    // The region's only node expects none.
    mesh.install(&Firewall {
        vxlan_sources: nets(&[]),
        ..firewall()
    });
    assert!(!stranger() && !member());
}
