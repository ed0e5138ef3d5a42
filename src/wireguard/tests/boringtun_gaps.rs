//! What boringtun 0.7.1 leaves to its embedder, or does differently from the protocol.

use super::*;

#[test]
fn handshakes_go_on_with_a_peer_that_did_not_answer_for_an_hour() {
    let mut world = World::pair();
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    let config = PeerConfig {
        persistent_keepalive: keepalive(25),
        ..config(2)
    };
    one.set_peers(&[(two, config)], world.now);
    world.pass_with(seconds(3600), |_| false);

    let before = world.count(1);
    world.pass_with(seconds(60), |_| false);
    assert!(world.count(1) > before, "no more initiations");
    world.pass(seconds(60));
    assert!(
        world.hosts[1]
            .peer(&world.hosts[0])
            .last_handshake()
            .is_some()
    );
    world.assert_connected();
}

#[test]
fn an_idle_tunnel_carries_packets_after_an_hour() {
    let mut world = World::connected_pair();
    world.pass(seconds(3600));
    world.assert_connected();
}

#[test]
fn a_session_after_a_long_silence_lasts_its_full_time() {
    let mut world = World::pair();
    world.now = world.now + seconds(7200);
    world.assert_connected();
    let handshakes = world.count(1);
    world.pass(seconds(119));
    world.assert_connected();
    assert_eq!(world.count(1), handshakes);
}

#[test]
fn a_forged_datagram_of_any_length_is_dropped() {
    let mut world = World::connected_pair();
    let genuine = world
        .log
        .iter()
        .rfind(|datagram| datagram.kind() == 4 && datagram.to == address(2))
        .unwrap()
        .clone();
    for length in [16, 31, 32, 33, 9000, 65_507] {
        let mut forged = genuine.clone();
        forged.bytes.resize(length, 0xee);
        forged.bytes[8] = 99;
        world.deliver(&forged);
    }
    assert_eq!(world.hosts[1].drops(Dropped::Unauthentic), 4);
    assert_eq!(world.hosts[1].drops(Dropped::Malformed), 2);
    world.assert_connected();
}

#[test]
fn a_handshake_begins_as_soon_as_a_peer_is_configured() {
    let mut world = World::pair();
    world.work();
    assert_eq!(world.count(1), 2, "both have an endpoint of the other");
}

#[test]
fn replayed_initiations_are_dropped_and_cost_other_peers_nothing() {
    let mut world = World::pair();
    world.work();
    let initiation = world
        .log
        .iter()
        .find(|datagram| datagram.to == address(2))
        .unwrap()
        .clone();
    world.settle();
    let replies = world.log.len();
    for n in 0..400 {
        world.now = world.now + Duration::from_millis(21);
        let from = (Ipv4Addr::new(198, 51, 100, 1), 1000 + n).into();
        world.deliver(&Datagram {
            from,
            ..initiation.clone()
        });
        world.settle();
    }
    assert_eq!(world.log.len(), replies, "a replay got an answer");
    assert_eq!(world.hosts[1].drops(Dropped::Replayed), 400);
    world.assert_connected();
}

#[test]
fn under_load_a_cookie_is_required_that_is_valid_for_one_address_and_port() {
    let mut world = World::pair_with_one_endpoint();
    world.work();
    let initiation = world
        .log
        .iter()
        .find(|datagram| datagram.to == address(2))
        .unwrap()
        .clone();
    world.under_way.clear();
    let mut noise = initiation.clone();
    noise.bytes[20] ^= 1;
    noise.from = address(9);
    for _ in 0..600 {
        world.deliver(&noise);
    }
    world.deliver(&initiation);
    world.settle_with(|datagram| datagram.kind() == 3);
    let cookies: Vec<_> = world
        .log
        .iter()
        .filter(|datagram| datagram.kind() == 3)
        .collect();
    assert_eq!(cookies.len(), 1, "the others carry no valid MAC");
    assert!(cookies[0].bytes.len() < initiation.bytes.len());

    // With the cookie the same host gets an answer, and from another port it gets none.
    let before = world.count(2);
    world.pass_with(seconds(1), |datagram| datagram.kind() == 1);
    assert_eq!(world.count(2), before + 1);
    let with_cookie = world
        .log
        .iter()
        .rfind(|datagram| datagram.to == address(2) && datagram.kind() == 1)
        .unwrap();
    assert_ne!(with_cookie.bytes[132..], [0; 16]);
}

#[test]
fn a_flood_from_unknown_addresses_does_not_delay_a_peer_at_its_known_address() {
    let mut world = World::pair();
    world.work();
    let to_two = |datagram: &&Datagram| datagram.to == address(2);
    let initiation = world.log.iter().find(to_two).unwrap().clone();
    world.under_way.clear();
    for n in 0..20_000_u16 {
        let from = (Ipv4Addr::from(0xc633_6400 | u32::from(n)), n).into();
        world.deliver(&Datagram {
            from,
            ..initiation.clone()
        });
    }
    let refused =
        [Dropped::QueueFull, Dropped::RateLimited].map(|reason| world.hosts[1].drops(reason));
    assert!(refused.iter().sum::<u64>() > 10_000, "{refused:?}");
    world.deliver(&initiation);
    world.work();
    let answers = |datagram: &&Datagram| datagram.kind() == 2 && datagram.to == address(1);
    assert_eq!(world.log.iter().filter(answers).count(), 1);
}

#[test]
fn an_initiation_is_verified_and_counted_once() {
    let mut world = World::pair();
    world.work();
    world.under_way.retain(|datagram| datagram.to == address(2));
    world.settle_with(|datagram| datagram.to == address(2));
    let peer = world.hosts[1].peer(&world.hosts[0]);
    assert_eq!((peer.rx_bytes(), world.count(2)), (148, 1));
    assert!(
        Dropped::ALL
            .iter()
            .all(|&reason| world.hosts[1].drops(reason) == 0)
    );
}

#[test]
fn packets_may_be_late_by_8192_counters() {
    let mut world = World::connected_pair();
    for n in 0..8192_u32 {
        world.send(0, &packet(1, 2, &n.to_be_bytes()));
    }
    let newest = world.under_way.pop_back().unwrap();
    world.deliver(&newest);
    let late: Vec<_> = world.under_way.drain(..).collect();
    for datagram in late.iter().rev() {
        world.deliver(datagram);
    }
    assert_eq!(world.hosts[1].delivered.len(), 8192);
    assert_eq!(world.hosts[1].drops(Dropped::Replayed), 0);
}

// The end of the counter is tested in `session`, where the counter can be set.

#[test]
fn a_source_is_refused_from_a_peer_that_is_not_its_most_specific_owner() {
    let mut world = World::of([1, 2, 3]);
    {
        let [one, two, three] = world.hosts.as_slice() else {
            unreachable!()
        };
        let wide = config(2).with_allowed_ips([net("10.0.0.0/16")].into());
        let narrow = config(3).with_allowed_ips([net("10.0.3.0/24")].into());
        one.set_peers(&[(two, wide), (three, narrow)], world.now);
        two.set_peers(&[(one, config(1))], world.now);
        three.set_peers(&[(one, config(1))], world.now);
    }
    world.settle();

    world.send(1, &packet(2, 1, b"mine"));
    world.send(1, &packet(3, 1, b"of another"));
    world.send(
        1,
        &packet_between([10, 9, 9, 9].into(), [10, 0, 1, 1].into(), b"of no peer"),
    );
    world.settle();
    assert_eq!(world.hosts[0].delivered, [packet(2, 1, b"mine")]);
    assert_eq!(world.hosts[0].drops(Dropped::ForeignSource), 2);

    world.hosts[0].delivered.clear();
    world.send(2, &packet(3, 1, b"mine"));
    world.settle();
    assert_eq!(world.hosts[0].delivered, [packet(3, 1, b"mine")]);
}

#[test]
fn a_peer_roams_even_if_its_packet_has_the_source_of_another() {
    let mut world = World::of([1, 2, 3]);
    {
        let [one, two, three] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, config(2)), (three, config(3))], world.now);
        two.set_peers(&[(one, config(1))], world.now);
    }
    world.settle_with(|datagram| datagram.to != address(3));
    world.send(1, &packet(3, 1, b"of another"));
    let mut datagram = world.under_way.pop_front().unwrap();
    datagram.from.set_port(7);
    world.deliver(&datagram);
    assert_eq!(world.hosts[0].delivered, Vec::<Vec<u8>>::new());
    let peer = world.hosts[0].peer(&world.hosts[1]);
    assert_eq!(peer.way().unwrap().remote(), datagram.from);
}

#[test]
fn a_peer_roams_with_every_new_authentic_message_and_with_no_other() {
    let mut world = World::connected_pair();
    let peer = world.hosts[1].peer(&world.hosts[0]);
    let elsewhere = |port| SocketAddr::from((Ipv4Addr::new(203, 0, 113, 7), port));

    world.send(0, &packet(1, 2, b"data"));
    let genuine = world.under_way.pop_front().unwrap();
    let mut forged = Datagram {
        from: elsewhere(1),
        ..genuine.clone()
    };
    forged.bytes[40] ^= 1;
    world.deliver(&forged);
    assert_eq!(peer.way().unwrap().remote(), address(1));
    world.deliver(&Datagram {
        from: elsewhere(2),
        ..genuine.clone()
    });
    assert_eq!(peer.way().unwrap().remote(), elsewhere(2));
    world.deliver(&Datagram {
        from: elsewhere(3),
        ..genuine
    });
    assert_eq!(peer.way().unwrap().remote(), elsewhere(2), "it is a replay");
}

#[test]
fn a_cookie_moves_no_endpoint_and_counts_as_no_traffic() {
    let mut world = World::pair_with_one_endpoint();
    world.work();
    let initiation = world
        .log
        .iter()
        .find(|datagram| datagram.to == address(2))
        .unwrap()
        .clone();
    world.under_way.clear();
    let mut noise = initiation.clone();
    noise.bytes[20] ^= 1;
    noise.from = address(9);
    for _ in 0..600 {
        world.deliver(&noise);
    }
    world.deliver(&initiation);
    world.work();
    let cookie = world.under_way.pop_front().unwrap();
    assert_eq!(cookie.kind(), 3);
    let from = (Ipv4Addr::new(203, 0, 113, 7), 1).into();
    world.deliver(&Datagram { from, ..cookie });
    world.work();
    let peer = world.hosts[0].peer(&world.hosts[1]);
    assert_eq!(
        (peer.way().unwrap().remote(), peer.rx_bytes()),
        (address(2), 0)
    );
}

#[test]
fn packets_are_padded_to_16_bytes_and_delivered_unchanged() {
    let mut world = World::connected_pair();
    for (payload, datagram) in [
        (0, 64),
        (4, 64),
        (5, 80),
        (21, 96),
        (1380, 1440),
        (1385, 1452),
        (1392, 1452),
    ] {
        let sent = packet(1, 2, &vec![7; payload]);
        world.send(0, &sent);
        assert_eq!(
            world.under_way[0].bytes.len(),
            datagram,
            "payload of {payload}"
        );
        world.settle();
        assert_eq!(world.hosts[1].delivered, [sent]);
        world.hosts[1].delivered.clear();
    }
}

#[test]
fn two_peers_with_keepalives_agree_on_one_session() {
    let mut world = World::of([1, 2]);
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        let alive = |n| PeerConfig {
            persistent_keepalive: keepalive(25),
            ..config(n)
        };
        one.set_peers(&[(two, alive(2))], world.now);
        two.set_peers(&[(one, alive(1))], world.now);
    }
    world.pass_with(seconds(400), |_| false);
    let before = world.count(1);
    world.pass(seconds(600));
    // One every two minutes, because of the keepalives. The first ones may collide.
    assert!(
        (4..=9).contains(&(world.count(1) - before)),
        "{}",
        world.count(1) - before
    );
    world.assert_connected();
}

#[test]
fn a_changed_keepalive_or_preshared_key_leaves_the_session_alone() {
    use crate::wireguard::key::PresharedKey;
    let mut world = World::connected_pair();
    let handshakes = world.count(1);
    let changed = |n| PeerConfig {
        persistent_keepalive: keepalive(7),
        preshared_key: Some(PresharedKey([9; 32])),
        ..config(n)
    };
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, changed(2))], world.now);
        two.set_peers(&[(one, changed(1))], world.now);
    }
    world.assert_connected();
    assert_eq!(world.count(1), handshakes);
    world.pass(seconds(200));
    assert!(
        world.count(1) > handshakes,
        "the next handshake has the new key"
    );
    world.assert_connected();
}

#[test]
fn nothing_is_ever_sent_to_a_key_of_small_order() {
    let mut world = World::of([1]);
    for low in [0_u8, 1] {
        let mut key = [0; 32];
        key[0] = low;
        let peer = PeerConfig {
            public_key: PublicKey(key),
            persistent_keepalive: keepalive(1),
            ..config(2)
        };
        let peers = BTreeMap::from([(PeerId::new("low"), peer)]);
        world.hosts[0].core.set_peers(&peers, world.now);
        world.send(0, &packet(1, 2, b"hello"));
        world.pass(seconds(30));
    }
    assert_eq!(world.log, []);
}

#[test]
fn at_most_50_initiations_of_a_peer_per_second_are_answered() {
    let mut world = World::of([1, 2]);
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, config(2))], world.now);
        two.set_peers(&[(one, config(1))], world.now);
    }
    // A host that sends initiations without a pause.
    for _ in 0..1000 {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        let peer = one.peer(two);
        peer.forget_initiation();
        one.core.ask_handshake(&peer, world.now);
        world.work();
        world.under_way.retain(|datagram| datagram.to == address(2));
        while let Some(datagram) = world.under_way.pop_front() {
            world.deliver(&datagram);
        }
        world.now = world.now + Duration::from_millis(1);
    }
    world.work();
    let answers = world
        .log
        .iter()
        .filter(|datagram| datagram.kind() == 2 && datagram.from == address(2))
        .count();
    assert!((45..=51).contains(&answers), "{answers}");
}

#[test]
fn the_indices_of_a_peer_cannot_be_linked() {
    let mut world = World::connected_pair();
    world.pass(seconds(1));
    for _ in 0..3 {
        world.pass(seconds(130));
        world.assert_connected();
    }
    let senders = world
        .log
        .iter()
        .filter(|datagram| datagram.kind() == 1 && datagram.from == address(1));
    let indices: Vec<u32> = senders
        .map(|datagram| u32::from_le_bytes(datagram.bytes[4..8].try_into().unwrap()))
        .collect();
    assert!(indices.len() >= 3);
    assert!(
        indices.windows(2).all(|pair| pair[0] >> 8 != pair[1] >> 8),
        "{indices:x?}"
    );
}

#[test]
fn few_packets_wait_for_a_dead_peer_and_the_newest_arrive_when_it_is_back() {
    let mut world = World::pair();
    for n in 0..1000_u32 {
        world.send(0, &packet(1, 2, &n.to_be_bytes()));
    }
    assert_eq!(world.hosts[0].drops(Dropped::NoSession), 1000 - 128);
    world.settle();
    let expected: Vec<_> = (1000 - 128..1000_u32)
        .map(|n| packet(1, 2, &n.to_be_bytes()))
        .collect();
    assert_eq!(world.hosts[1].delivered, expected);
}

#[test]
fn packets_that_waited_too_long_are_dropped() {
    let mut world = World::pair();
    world.send(0, &packet(1, 2, b"old"));
    world.pass_with(seconds(120), |_| false);
    assert_eq!(world.hosts[0].drops(Dropped::NoSession), 1);
    world.assert_connected();
}
