//! Peers that keep their name while their key changes.

use super::*;
use crate::wireguard::uapi::PeerSet;

/// Host `n` by a name that is not its key.
fn named(peers: &[(&str, PeerConfig)]) -> BTreeMap<PeerId, PeerConfig> {
    let peers = peers.iter().cloned();
    peers
        .map(|(name, config)| (PeerId::new(name), config))
        .collect()
}

/// Two hosts with a session, the second of which is `node/two` to the first.
fn named_pair() -> World {
    let mut world = World::pair();
    let peers = named(&[("node/two", config(2))]);
    world.hosts[0].core.set_peers(&peers, world.now);
    world.assert_connected();
    // Host 2 accepts no second initiation within 20 milliseconds.
    world.pass(seconds(1));
    world
}

/// Host 2 goes on with another key.
fn change_key(world: &mut World, seed: u8) -> PublicKey {
    let key = PrivateKey([seed; 32]);
    world.hosts[1].core.set_private_key(Some(key.clone()));
    world.hosts[1].key = key;
    world.hosts[1].public()
}

#[test]
fn a_peer_whose_key_changes_keeps_its_prefixes_endpoint_and_counters() {
    let mut world = named_pair();
    // The peer has roamed, so its endpoint is not the configured one.
    world.hosts[1].wire.address = address(9);
    world.send(1, &packet(2, 1, b"from elsewhere"));
    world.settle();
    let before = world.hosts[0].peer(&world.hosts[1]);
    assert_eq!(before.way().map(Way::remote), Some(address(9)));

    let public_key = change_key(&mut world, 7);
    let exchanged = named(&[(
        "node/two",
        PeerConfig {
            public_key,
            ..config(2)
        },
    )]);
    world.hosts[0].core.set_peers(&exchanged, world.now);

    let core = &world.hosts[0].core;
    assert_eq!(core.peer_configs(), exchanged);
    let table = core.table.load_full();
    let routed = table.route(ip("10.0.2.1"), || 0).unwrap();
    assert_eq!(
        (routed.id().as_str(), routed.key()),
        ("node/two", public_key)
    );
    assert!(table.accepts(ip("10.0.2.1"), routed));
    assert_eq!(routed.way().map(Way::remote), Some(address(9)));
    assert!(routed.rx_bytes() > 0 && routed.rx_bytes() == before.rx_bytes());
    assert_eq!(table.peers.len(), 1);
    world.settle();
    world.assert_connected();
}

#[test]
fn the_key_that_was_replaced_opens_no_packet_and_gets_no_answer() {
    let mut world = named_pair();
    world.send(1, &packet(2, 1, b"sealed before"));
    let late = world.under_way.pop_front().unwrap();
    let public_key = PrivateKey([7; 32]).public_key();
    let exchanged = named(&[(
        "node/two",
        PeerConfig {
            public_key,
            ..config(2)
        },
    )]);
    world.hosts[0].core.set_peers(&exchanged, world.now);

    world.deliver(&late);
    assert_eq!(world.hosts[0].delivered, Vec::<Vec<u8>>::new());
    assert_eq!(world.hosts[0].drops(Dropped::UnknownIndex), 1);
    // Host 2 still has the old key and is unknown now.
    let answers = world.count(2);
    world.pass(seconds(30));
    assert_eq!(world.count(2), answers);
}

#[test]
fn a_handshake_begins_as_soon_as_the_key_of_a_peer_changes() {
    let mut world = named_pair();
    let before = world.count(1);
    let public_key = PrivateKey([7; 32]).public_key();
    let exchanged = PeerConfig {
        public_key,
        ..config(2)
    };
    let exchanged = named(&[("node/two", exchanged)]);
    world.hosts[0].core.set_peers(&exchanged, world.now);
    world.work();
    assert_eq!(world.count(1), before + 1);
}

#[test]
fn a_packet_that_waits_for_a_session_is_sent_under_the_new_key() {
    let mut world = World::pair();
    let peers = named(&[("node/two", config(2))]);
    world.hosts[0].core.set_peers(&peers, world.now);
    let public_key = change_key(&mut world, 7);
    // The handshake with the old key fails.
    world.send(0, &packet(1, 2, b"waits"));
    world.settle_with(|_| false);

    let exchanged = named(&[(
        "node/two",
        PeerConfig {
            public_key,
            ..config(2)
        },
    )]);
    world.hosts[0].core.set_peers(&exchanged, world.now);
    world.settle();
    assert_eq!(world.hosts[1].delivered, [packet(1, 2, b"waits")]);
}

#[test]
fn two_peers_may_exchange_their_keys() {
    let mut world = World::of([1, 2, 3]);
    let [one, two, three] = world.hosts.as_slice() else {
        unreachable!()
    };
    two.set_peers(&[(one, config(1))], world.now);
    three.set_peers(&[(one, config(1))], world.now);
    let first = named(&[("node/a", config(2)), ("node/b", config(3))]);
    one.core.set_peers(&first, world.now);
    world.settle();
    world.pass(seconds(1));
    let second = named(&[("node/a", config(3)), ("node/b", config(2))]);
    world.hosts[0].core.set_peers(&second, world.now);
    world.settle();

    assert_eq!(world.hosts[0].core.peer_configs(), second);
    let table = world.hosts[0].core.table.load_full();
    assert_eq!(
        table.peers[&world.hosts[2].public()].id().as_str(),
        "node/a"
    );
    for (host, n) in [(1, 2), (2, 3)] {
        world.send(0, &packet(1, n, b"still there"));
        world.settle();
        assert_eq!(world.hosts[host].delivered, [packet(1, n, b"still there")]);
    }
}

#[test]
fn of_two_names_with_one_key_the_first_counts() {
    let world = World::of([1]);
    let core = &world.hosts[0].core;
    let twice = named(&[("node/a", config(2)), ("node/b", config(2))]);
    core.set_peers(&twice, world.now);
    assert_eq!(core.peer_configs(), named(&[("node/a", config(2))]));
    // Without the first, the second has the key.
    let second = named(&[("node/b", config(2))]);
    core.set_peers(&second, world.now);
    assert_eq!(core.peer_configs(), second);
}

#[test]
fn by_uapi_a_peer_is_known_by_its_key_whatever_its_name() {
    let mut world = named_pair();
    let handshakes = world.count(1);
    let core = &world.hosts[0].core;
    let key = world.hosts[1].public();
    let shorter = PeerSet {
        persistent_keepalive: Some(5),
        ..PeerSet::new(key)
    };
    let other = PublicKey([3; 32]);
    core.change_peers(false, vec![shorter, PeerSet::new(other)], world.now);

    let expected = PeerConfig {
        persistent_keepalive: keepalive(5),
        ..config(2)
    };
    let mut expected = named(&[("node/two", expected)]);
    expected.insert(PeerId::from(&other), PeerConfig::new(other));
    assert_eq!(core.peer_configs(), expected);
    world.assert_connected();
    assert_eq!(world.count(1), handshakes, "its session goes on");

    let gone = PeerSet {
        remove: true,
        ..PeerSet::new(key)
    };
    let core = &world.hosts[0].core;
    core.change_peers(false, vec![gone], world.now);
    assert!(!core.peer_configs().contains_key(&PeerId::new("node/two")));
}

#[test]
fn a_source_is_accepted_only_from_its_peer_wherever_it_is_routed() {
    let mut world = named_pair();
    let apart = PeerConfig {
        routes: [net("10.0.9.0/24")].into(),
        ..config(2)
    };
    let peers = named(&[("node/two", apart)]);
    world.hosts[0].core.set_peers(&peers, world.now);
    let table = world.hosts[0].core.table.load_full();
    assert!(table.route(ip("10.0.2.1"), || 0).is_none());
    let peer = table.route(ip("10.0.9.1"), || 0).unwrap();
    assert!(table.accepts(ip("10.0.2.1"), peer));
    assert!(!table.accepts(ip("10.0.9.1"), peer));

    world.send(1, &packet(2, 1, b"accepted"));
    world.settle();
    assert_eq!(
        world.hosts[0].delivered.pop(),
        Some(packet(2, 1, b"accepted"))
    );
    world.send(
        1,
        &packet_between([10, 0, 9, 1].into(), [10, 0, 1, 1].into(), b"not"),
    );
    world.settle();
    assert_eq!(world.hosts[0].drops(Dropped::ForeignSource), 1);
}
