//! External peers.

use super::*;

fn mesh() -> Mesh {
    let mut mesh = two_regions();
    mesh.add_peers([
        vpn_peer("office", 100, &["10.6.0.0/24", "10.5.0.1/32"])
            .with(|peer| peer.endpoint = addr("198.51.100.80:51999")),
        vpn_peer("zlaptop", 101, &["10.5.0.1/32", "10.5.0.2/32"]),
    ]);
    mesh
}

#[test]
fn every_leader_has_the_external_peers_and_followers_reach_them_through_their_leader() {
    let mesh = mesh();
    insta::assert_snapshot!(mesh.commands_of("node-agent-01", &["wg"]), @"
    wg set kilo0 listen-port 51820
    wg set kilo0 peer ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs= endpoint 203.0.113.10:51820 persistent-keepalive 25 allowed-ips 10.4.0.1/32,10.42.0.0/24,203.0.113.10/32
    wg set kilo0 peer ZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGRkZGQ= endpoint 198.51.100.80:51999 persistent-keepalive 25 allowed-ips 10.5.0.1/32,10.6.0.0/24
    wg set kilo0 peer ZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWU= persistent-keepalive 25 allowed-ips 10.5.0.2/32
    ");
    let about = |me: &str| {
        let routes = routes(&mesh, me);
        let about = routes
            .lines()
            .filter(|l| l.contains(" 10.5.0") || l.contains(" 10.6.0"));
        about.map(|line| format!("{line}\n")).collect::<String>()
    };
    insta::assert_snapshot!(about("node-agent-01"), @"
    ip route replace table 5130 10.5.0.1 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.5.0.2 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.6.0.0/24 dev kilo0 src 10.42.1.0 mtu 1420
    ");
    insta::assert_snapshot!(about("node-agent-02"), @"
    ip route replace table 5130 10.5.0.1 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.5.0.2 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ip route replace table 5130 10.6.0.0/24 via 10.42.1.0 dev flannel.1 onlink src 10.42.2.0 mtu 1420
    ");
}

#[test]
fn of_two_equal_claims_the_older_peer_wins() {
    let excluded = mesh().topology().excluded;
    let sentences = excluded.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        sentences,
        ["peer zlaptop: left out allowed IPs 10.5.0.1/32: claimed by peer office before"]
    );
}

#[test]
fn of_two_equally_old_claims_the_first_by_name_wins() {
    let mut mesh = two_regions();
    mesh.add_peers([
        vpn_peer("b", 100, &["10.5.0.1/32"]),
        vpn_peer("a", 101, &["10.5.0.1/32"]).with(|peer| peer.created = 100),
    ]);
    let topology = mesh.topology();
    assert_eq!(
        topology.excluded[0].to_string(),
        "peer b: left out allowed IPs 10.5.0.1/32: claimed by peer a before"
    );
    assert_eq!(topology.excluded.len(), 1);
}

/// A claim that was left out is judged again: the oldest of the present claims wins.
#[test]
fn when_a_peer_is_deleted_the_next_oldest_claim_wins() {
    let later = |name: &str, seed: u8, nets: &[&str]| vpn_peer(name, seed, nets);
    let mut mesh = mesh();
    mesh.add_peers([
        later("tablet", 102, &["10.5.0.1/32", "10.6.0.128/25"]),
        // The key of another peer.
        later("copy", 103, &["10.5.0.3/32"]).with(|peer| peer.public_key = key(100)),
    ]);
    let owner = |mesh: &Mesh, prefix: &str| {
        let peers = mesh.state("node-master").peers;
        let mut owners = peers
            .values()
            .filter(|peer| peer.routes.contains(&net(prefix)));
        let owner = owners.next().map(|peer| peer.public_key);
        assert!(owners.next().is_none(), "{prefix} has two owners");
        owner
    };
    assert_eq!(owner(&mesh, "10.5.0.1/32"), Some(key(100)));
    assert_eq!(owner(&mesh, "10.6.0.128/25"), None);
    assert_eq!(owner(&mesh, "10.5.0.3/32"), None);

    mesh.snapshot.peers.remove("office");
    assert_eq!(owner(&mesh, "10.5.0.1/32"), Some(key(101)));
    assert_eq!(owner(&mesh, "10.6.0.128/25"), Some(key(102)));
    assert_eq!(owner(&mesh, "10.5.0.3/32"), Some(key(100)));

    mesh.snapshot.peers.remove("zlaptop");
    assert_eq!(owner(&mesh, "10.5.0.1/32"), Some(key(102)));
    assert!(mesh.topology().excluded.is_empty());
}

#[test]
fn traffic_from_external_peers_to_other_destinations_is_masqueraded() {
    let firewall = firewall(&mesh(), "node-agent-01");
    let nets = ["10.5.0.1/32", "10.5.0.2/32", "10.6.0.0/24"].map(net);
    assert_eq!(firewall.masquerade_sources, nets.into());
    let known = [
        "10.42.0.0/24",
        "10.42.1.0/24",
        "192.168.50.12/32",
        "10.43.0.0/16",
        "10.4.0.1/32",
    ];
    assert!(
        known
            .iter()
            .all(|known| firewall.known.contains(&net(known)))
    );
}

#[test]
fn a_roaming_peers_endpoint_is_left_to_the_device() {
    let mut mesh = mesh();
    mesh.observed = [(key(101), "198.51.100.99:4000".parse().unwrap())].into();
    let state = mesh.state("node-master");
    assert_eq!(peer_with(&state, key(101)).endpoint, None);
}
