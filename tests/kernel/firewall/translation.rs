//! Which sources are translated, what is tracked, and how segments are clamped, with flannel's own rules
//! in place.

use selvedge::state::Firewall;

use super::mesh::Mesh;
use crate::fixture::firewall;

/// How flannel keeps its masquerading rules.
const FLAVOURS: [(&str, &str); 3] = [
    ("iptables-nft", "iptables"),
    ("iptables-legacy", "iptables-legacy"),
    ("nftables", ""),
];

#[test]
fn control_without_the_table_flannel_masquerades_forwarded_packets() {
    let mesh = Mesh::new("control");
    mesh.masquerade_as_flannel("iptables");

    assert_eq!(
        mesh.seen_by(&mesh.far, "10.42.2.5", "10.42.0.5"),
        Some("10.42.1.0".to_owned())
    );
}

#[test]
fn transit_keeps_its_source_and_is_not_tracked_with_each_of_flannels_backends() {
    for (flavour, program) in FLAVOURS {
        let mesh = Mesh::new(&flavour[flavour.len() - 4..]);
        mesh.masquerade_as_flannel(program);
        mesh.install(&firewall());
        let ways = [
            (&mesh.far, "10.42.2.5", "10.42.0.5"),
            (&mesh.far, "192.168.50.12", "10.42.0.5"),
            (&mesh.far, "10.42.2.5", "203.0.113.10"),
            (&mesh.near, "10.42.0.5", "10.42.2.5"),
            (&mesh.near, "10.42.0.5", "192.168.50.12"),
            (&mesh.near, "203.0.113.10", "192.168.50.12"),
        ];
        for (to, from, address) in ways {
            let seen = mesh.seen_by(to, from, address);
            assert_eq!(
                seen.as_deref(),
                Some(from),
                "{flavour}: {from} to {address}"
            );
        }
        let tracked = mesh.leader.sh("conntrack -L -p udp 2>/dev/null").unwrap();
        assert_eq!(tracked, "", "{flavour}");
    }
}

#[test]
fn a_leaders_own_pods_keep_their_source_towards_remote_nodes() {
    for (flavour, program) in FLAVOURS {
        let mesh = Mesh::new(&format!("p{}", &flavour[flavour.len() - 4..]));
        mesh.masquerade_as_flannel(program);
        mesh.install(&firewall());

        let seen = mesh.seen_by(&mesh.far, "10.42.1.5", "203.0.113.10");

        assert_eq!(seen.as_deref(), Some("10.42.1.5"), "{flavour}");
    }
}

#[test]
fn packets_that_kube_proxy_marks_are_masqueraded() {
    let mesh = Mesh::new("marked");
    mesh.leader
        .sh("
            nft add table ip kp
            nft 'add chain ip kp pre { type filter hook prerouting priority -150; }'
            nft 'add rule ip kp pre ip saddr 10.42.1.5 meta mark set 0x4000'
            nft 'add chain ip kp post { type nat hook postrouting priority 100; }'
            nft 'add rule ip kp post mark and 0x4000 == 0x4000 masquerade'
        ")
        .unwrap();
    mesh.install(&firewall());

    let seen = mesh.seen_by(&mesh.far, "10.42.1.5", "10.42.0.5");

    assert_eq!(
        seen.as_deref(),
        Some("10.42.1.0"),
        "the tunnel's first address"
    );
}

#[test]
fn a_leader_that_is_also_a_router_translates_packets_that_do_not_enter_the_tunnel() {
    let mesh = Mesh::new("router");
    // Hosts reach the public address of a remote node directly; here, over the link `wan`.
    mesh.leader
        .sh("
            ip route del 203.0.113.10
            ip route add 203.0.113.10 dev wan
            nft add table ip host
            nft 'add chain ip host post { type nat hook postrouting priority 100; }'
            nft 'add rule ip host post oifname wan masquerade'
        ")
        .unwrap();
    mesh.install(&firewall());

    let seen = mesh.seen_by(&mesh.far, "192.168.50.12", "203.0.113.10");

    assert_eq!(seen.as_deref(), Some("198.51.100.1"));
}

#[test]
fn a_vpn_peer_keeps_its_source_in_the_mesh_and_leaves_it_only_with_peer_internet() {
    let mesh = Mesh::new("vpn");
    mesh.masquerade_as_flannel("iptables");
    mesh.install(&firewall());
    assert_eq!(mesh.seen_by(&mesh.near, "10.5.0.1", "192.0.2.12"), None);
    assert_eq!(mesh.counters().stranger_drops, 1);
    mesh.install(&Firewall {
        peer_internet: true,
        ..firewall()
    });

    let inside = mesh.seen_by(&mesh.near, "10.5.0.1", "10.42.2.5");
    let outside = mesh.seen_by(&mesh.near, "10.5.0.1", "192.0.2.12");

    assert_eq!(inside.as_deref(), Some("10.5.0.1"));
    assert_eq!(outside.as_deref(), Some("192.168.50.11"));
}

#[test]
fn segments_of_tcp_fit_into_the_tunnel() {
    let mesh = Mesh::new("mss");
    mesh.leader
        .run("ip route replace 10.42.0.0/24 via 10.4.0.1 dev kilo0 mtu 1420")
        .unwrap();

    let before = mesh.segment_size("10.42.2.5", "10.42.0.5");
    mesh.install(&firewall());
    let after = mesh.segment_size("10.42.2.5", "10.42.0.5");

    // Timestamps take 12 bytes of each segment.
    assert_eq!((before, after), (1448, 1368));
}
