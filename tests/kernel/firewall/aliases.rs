//! Aliases of the own region, which this node translates itself, and what the table lets through to their nodes.

use selvedge::kernel::Kernel;
use selvedge::state::Firewall;
use selvedge_lab::netns::Namespace;

use super::install;
use super::mesh::Mesh;
use crate::fixture::{firewall, ip, net};

/// The region's other node has the alias 10.7.0.2, and this one 10.7.0.1.
fn with_aliases() -> Firewall {
    Firewall {
        alias_pools: [net("10.7.0.0/24"), net("fd07::/64")].into(),
        region_aliases: [
            (ip("10.7.0.1"), ip("192.168.50.11")),
            (ip("10.7.0.2"), ip("192.168.50.12")),
            (ip("fd07::2"), ip("2001:db8:50::12")),
        ]
        .into(),
        ..firewall()
    }
}

/// A mesh whose nodes have a default route, as nodes have: without any, nothing is sent to an alias at all.
fn mesh(label: &str) -> Mesh {
    let mesh = Mesh::new(label);
    let route = "ip route add default via 192.168.50.12";
    mesh.leader.sh(route).unwrap();
    mesh
}

/// Whether `from` gets an answer from an alias: a datagram that the address behind it receives and answers.
fn answers(mesh: &Mesh, from: &str, alias: &str, address: &str) -> bool {
    use std::net::UdpSocket;
    use std::time::Duration;

    let (from_ns, at) = (mesh.owner(from), mesh.owner(address));
    let server = at.within(|| UdpSocket::bind((address, 0)).unwrap());
    let port = server.local_addr().unwrap().port();
    let client = from_ns.within(|| UdpSocket::bind((from, 0)).unwrap());
    for socket in [&server, &client] {
        let wait = Some(Duration::from_secs(1));
        socket.set_read_timeout(wait).unwrap();
    }
    from_ns.within(|| client.connect((alias, port)).unwrap());
    client.send(b"?").unwrap();
    let mut buffer = [0; 8];
    let Ok((_, source)) = server.recv_from(&mut buffer) else {
        return false;
    };
    server.send_to(b"!", source).unwrap();
    // A connected socket takes answers of the alias alone.
    client.recv(&mut buffer).is_ok()
}

#[test]
fn hosts_and_pods_of_the_region_reach_its_nodes_by_their_aliases() {
    let mesh = mesh("alias");
    let ways = [
        ("192.168.50.11", "10.7.0.2", "192.168.50.12"),
        ("10.42.1.5", "10.7.0.2", "192.168.50.12"),
        ("192.168.50.11", "10.7.0.1", "192.168.50.11"),
        ("10.42.1.5", "10.7.0.1", "192.168.50.11"),
    ];
    mesh.install(&firewall());
    for (from, alias, address) in ways {
        let reached = answers(&mesh, from, alias, address);
        assert!(!reached, "control without aliases: {from} to {alias}");
    }
    mesh.install(&with_aliases());
    for (from, alias, address) in ways {
        assert!(answers(&mesh, from, alias, address), "{from} to {alias}");
    }
}

#[test]
fn no_pod_reaches_the_ports_of_vxlan_and_the_tunnel_by_an_alias() {
    let mesh = mesh("aport");
    mesh.install(&with_aliases());
    let sent = |alias: &str, at: &Namespace, address: &str, port: u16| {
        let server = at.within(|| super::bind(address, port));
        let wait = Some(std::time::Duration::from_secs(1));
        server.set_read_timeout(wait).unwrap();
        mesh.pod.within(|| {
            let client = std::net::UdpSocket::bind(("10.42.1.5", 0)).unwrap();
            client.send_to(b"?", (alias, port)).unwrap();
        });
        server.recv(&mut [0; 8]).is_ok()
    };
    let other = ("10.7.0.2", &mesh.near, "192.168.50.12");
    let own = ("10.7.0.1", &mesh.leader, "192.168.50.11");
    for (alias, at, address) in [other, own] {
        assert!(
            sent(alias, at, address, 9999),
            "control: another port of {alias}"
        );
        assert!(!sent(alias, at, address, 8472), "VXLAN to {alias}");
    }
    assert!(!sent(own.0, own.1, own.2, 51820), "the own tunnel's port");
    assert!(mesh.counters().pod_drops >= 3);
}

#[test]
fn packets_of_other_regions_reach_a_node_whose_address_they_do_not_know() {
    // The tunnel has put the node's address in the place of its alias. Here no other region knows that address.
    let mesh = Mesh::new("aserv");
    mesh.masquerade_as_flannel("iptables");
    mesh.install(&with_aliases());
    let seen = mesh.seen_by(&mesh.near, "10.42.0.5", "192.168.50.12");
    assert_eq!(seen.as_deref(), Some("10.42.0.5"));
    let tracked = mesh.leader.sh("conntrack -L -p udp 2>/dev/null").unwrap();
    assert_eq!(tracked, "", "flows may return through another leader");
    let vxlan = mesh.delivered(&mesh.far, "10.42.0.5", &mesh.near, "192.168.50.12", 8472);
    assert!(!vxlan, "no VXLAN comes out of the tunnel");
}

#[test]
fn another_alias_changes_the_elements_and_no_rule() {
    use selvedge::kernel::nft::frame;

    let few = with_aliases();
    let mut more = few.clone();
    more.region_aliases
        .insert(ip("10.7.0.3"), ip("192.168.50.13"));
    let none = Firewall {
        region_aliases: [].into(),
        ..few.clone()
    };
    assert_eq!(frame(&few), frame(&more));
    assert_eq!(frame(&few), frame(&none));
    assert_ne!(frame(&few), frame(&firewall()));

    let leader = Namespace::new("aelem").unwrap();
    let listed = |firewall: &Firewall| {
        leader.within(|| install(&Kernel::open("kilo0").unwrap(), firewall));
        let maps = "nft list map inet selvedge aliases4; nft list map inet selvedge aliases6";
        leader.sh(maps).unwrap()
    };
    assert!(!listed(&few).contains("10.7.0.3"));
    let text = listed(&more);
    assert!(text.contains("10.7.0.3 : 192.168.50.13"), "{text}");
    assert!(text.contains("fd07::2 : 2001:db8:50::12"), "{text}");
    assert!(!listed(&none).contains("10.7.0.2"));
}
