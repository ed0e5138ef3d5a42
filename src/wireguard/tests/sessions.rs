//! Sessions over time: rekeying, restarts, several owners of a prefix, changes of peers.

use super::*;
use crate::wireguard::key::PresharedKey;
use crate::wireguard::timestamp::Store;
use crate::wireguard::timestamp_store::StoreWriter;
use crate::wireguard::uapi::{AllowedIp, KeyUpdate, PeerSet};

#[test]
fn no_packet_is_lost_while_keys_change() {
    let mut world = World::connected_pair();
    let mut sent = Vec::new();
    for n in 0..6000_u32 {
        let one = packet(1, 2, &n.to_be_bytes());
        world.send(0, &one);
        world.send(1, &packet(2, 1, &n.to_be_bytes()));
        sent.push(one);
        world.now = world.now + Duration::from_millis(100);
        world.settle();
    }
    assert_eq!(world.hosts[1].delivered, sent);
    assert_eq!(world.hosts[0].delivered.len(), 6000);
    let handshakes = world.count(2);
    assert!((5..=7).contains(&handshakes), "{handshakes} in ten minutes");
}

#[test]
fn an_initiator_that_only_receives_renews_the_keys() {
    let mut world = World::connected_pair();
    for n in 0..6000_u32 {
        // Only the responder sends.
        world.send(1, &packet(2, 1, &n.to_be_bytes()));
        world.now = world.now + Duration::from_millis(100);
        world.settle();
    }
    assert_eq!(world.hosts[0].delivered.len(), 6000);
}

#[test]
fn a_host_that_restarts_has_a_session_with_its_first_packet() {
    let mut world = World::connected_pair();
    let mut restarted = Host::new(1);
    // Its timestamps continue.
    let floor = Timestamp::from_unix(seconds(100));
    *restarted.core.timestamps.lock().unwrap() = TimestampSequence::new(floor, None);
    std::mem::swap(&mut world.hosts[0], &mut restarted);
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, config(2))], world.now);
    }
    world.now = world.now + seconds(1);
    world.assert_connected();
}

#[test]
fn a_host_whose_clock_went_back_without_a_floor_is_refused() {
    // The control for the test above: without the floor it fails.
    let mut world = World::connected_pair();
    world.hosts[0] = Host::new(1);
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, config(2))], world.now);
    }
    world.now = world.now + seconds(1);
    world.send(0, &packet(1, 2, b"hello"));
    world.settle();
    assert_eq!(world.hosts[1].drops(Dropped::Replayed), 1);
}

/// A disk that writes nothing until the other end of `held` is dropped.
struct Hanging {
    held: std::sync::mpsc::Receiver<()>,
    written: Arc<Mutex<Option<Timestamp>>>,
}

impl Store for Hanging {
    fn keep_own(&self, mark: Timestamp) {
        let _ = self.held.recv();
        *self.written.lock().unwrap() = Some(mark);
    }

    fn keep_accepted(&self, _: &Accepted) {
        let _ = self.held.recv();
    }
}

#[test]
fn handshakes_go_on_while_the_disk_hangs() {
    let mut world = World::pair();
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let written = Arc::new(Mutex::new(None));
    let disk = Hanging {
        held,
        written: written.clone(),
    };
    let floor = Timestamp::default();
    let writer = StoreWriter::start(floor, Arc::default(), Box::new(disk)).unwrap();
    *world.hosts[0].core.timestamps.lock().unwrap() = TimestampSequence::new(floor, Some(writer));
    // The first handshake, and three rekeys.
    for _ in 0..4 {
        world.send(0, &packet(1, 2, b"hello"));
        world.settle();
        world.assert_connected();
        world.now = world.now + seconds(121);
    }
    assert!(world.count(2) >= 4, "{} handshakes", world.count(2));
    assert_eq!(*written.lock().unwrap(), None);

    drop(hold);
    let used = world.hosts[0]
        .core
        .timestamps
        .lock()
        .unwrap()
        .next(Timestamp::from_unix(seconds(1)));
    drop(world);
    // The end of a device waits only briefly.
    for _ in 0..3000 {
        if written.lock().unwrap().is_some_and(|mark| mark >= used) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("every mark that was written is earlier than {used:?}");
}

#[test]
fn a_peer_that_moved_is_found_at_its_candidate() {
    let mut world = World::connected_pair();
    // Host 2 has moved, and host 1 still sends to its old address.
    world.hosts[1].wire.address = address(9);
    world.send(0, &packet(1, 2, b"lost"));
    world.settle();
    assert_eq!(world.hosts[1].delivered.len(), 0);

    let id = world.hosts[1].id();
    world.now = world.now + seconds(1);
    world.hosts[0].core.try_candidates(&id, &[address(9)]);
    world.settle();

    let way = world.hosts[0].peer(&world.hosts[1]).way();
    assert_eq!(way.map(Way::remote), Some(address(9)));
    world.assert_connected();
}

#[test]
fn a_wrong_candidate_does_not_move_the_endpoint() {
    let mut world = World::connected_pair();
    let id = world.hosts[1].id();
    for _ in 0..20 {
        world.hosts[0].core.try_candidates(&id, &[address(9)]);
        world.send(0, &packet(1, 2, b"on the way"));
        world.pass(seconds(1));
    }
    assert_eq!(world.hosts[1].delivered.len(), 20);
    let way = world.hosts[0].peer(&world.hosts[1]).way();
    assert_eq!(way.map(Way::remote), Some(address(2)));
}

#[test]
fn a_handshake_begins_after_15_seconds_without_an_answer() {
    let mut world = World::connected_pair();
    let handshakes = world.count(1);
    world.send(0, &packet(1, 2, b"lost"));
    world.under_way.clear();
    world.pass_with(seconds(14), |_| false);
    assert_eq!(world.count(1), handshakes);
    world.pass_with(seconds(2), |_| false);
    assert_eq!(world.count(1), handshakes + 1);
}

#[test]
fn both_sides_may_begin_at_the_same_time() {
    for order in 0..2 {
        let mut world = World::pair();
        world.send(0, &packet(1, 2, b"from one"));
        world.send(1, &packet(2, 1, b"from two"));
        world.work();
        if order == 1 {
            world.under_way.make_contiguous().reverse();
        }
        world.settle();
        world.pass(seconds(6));
        assert_eq!(world.hosts[1].delivered, [packet(1, 2, b"from one")]);
        assert_eq!(world.hosts[0].delivered, [packet(2, 1, b"from two")]);
        world.assert_connected();
    }
}

#[test]
fn peers_with_different_preshared_keys_have_no_session() {
    let mut world = World::of([1, 2]);
    let with = |n, key| PeerConfig {
        preshared_key: Some(PresharedKey([key; 32])),
        ..config(n)
    };
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, with(2, 1))], world.now);
        two.set_peers(&[(one, with(1, 2))], world.now);
    }
    world.send(0, &packet(1, 2, b"hello"));
    world.settle();
    assert_eq!(world.count(4), 0);
    {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        two.set_peers(&[(one, with(1, 1))], world.now);
        one.set_peers(&[(two, with(2, 1))], world.now);
    }
    world.pass(seconds(12));
    world.assert_connected();
}

#[test]
fn several_peers_may_own_a_prefix_and_each_flow_stays_with_one_of_them() {
    let mut world = World::of([1, 2, 3]);
    {
        let [one, two, three] = world.hosts.as_slice() else {
            unreachable!()
        };
        let shared = |n| config(n).with_allowed_ips([net("10.0.9.0/24")].into());
        one.set_peers(&[(two, shared(2)), (three, shared(3))], world.now);
        two.set_peers(&[(one, config(1))], world.now);
        three.set_peers(&[(one, config(1))], world.now);
    }
    world.settle();
    let before = world.log.len();
    for _ in 0..2 {
        for n in 0..40 {
            world.send(
                0,
                &packet(1, 9, b"x")
                    .iter()
                    .enumerate()
                    .map(|(at, &byte)| if at == 21 { n } else { byte })
                    .collect::<Vec<_>>(),
            );
        }
    }
    world.settle();
    let to = |n| {
        world.log[before..]
            .iter()
            .filter(|datagram| datagram.kind() == 4 && datagram.to == address(n))
            .count()
    };
    assert!(to(2) > 10 && to(3) > 10, "{} and {}", to(2), to(3));
    assert_eq!(
        world.hosts[1].delivered.len() % 2,
        0,
        "a flow was sent to two peers"
    );
    assert_eq!(
        world.hosts[1].delivered.len() + world.hosts[2].delivered.len(),
        80
    );

    // Packets with that source are accepted from each.
    for host in [1, 2] {
        world.send(host, &packet(9, 1, b"back"));
    }
    world.settle();
    assert_eq!(world.hosts[0].delivered.len(), 2);
}

#[test]
fn a_flow_goes_to_an_owner_that_has_a_session() {
    let mut world = World::of([1, 2, 3]);
    {
        let [one, two, three] = world.hosts.as_slice() else {
            unreachable!()
        };
        let shared = |n| config(n).with_allowed_ips([net("10.0.9.0/24")].into());
        one.set_peers(&[(two, shared(2)), (three, shared(3))], world.now);
        two.set_peers(&[(one, config(1))], world.now);
    }
    world.settle_with(|datagram| datagram.to != address(3));
    for n in 0..20 {
        world.send(0, &packet(1, 9, &[n]));
    }
    world.settle();
    assert_eq!(world.hosts[1].delivered.len(), 20);
}

#[test]
fn a_roamed_endpoint_stays_until_the_configured_one_changes() {
    let mut world = World::connected_pair();
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    let peer = one.peer(two);
    let roamed: SocketAddr = (Ipv4Addr::new(203, 0, 113, 1), 9).into();
    let from = Way::Direct(roamed.into());
    let _ = peer.roam(from, Evidence::Message, |_| false, world.now);

    one.set_peers(&[(two, config(2))], world.now);
    assert_eq!(peer.way().unwrap().remote(), roamed);
    let moved = PeerConfig {
        endpoint: Some(address(7)),
        ..config(2)
    };
    one.set_peers(&[(two, moved)], world.now);
    assert_eq!(peer.way().unwrap().remote(), address(7));
    world.now = world.now + seconds(1);
}

#[test]
fn with_a_persistent_keepalive_a_new_endpoint_gets_a_keepalive_at_once() {
    let mut world = World::connected_pair();
    let elsewhere = |persistent_keepalive| PeerConfig {
        endpoint: Some(address(7)),
        persistent_keepalive,
        ..config(2)
    };
    for (keepalive, expected) in [(None, 0), (NonZeroU16::new(25), 1)] {
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        let already = PeerConfig {
            persistent_keepalive: keepalive,
            ..config(2)
        };
        one.set_peers(&[(two, already)], world.now);
        world.settle();
        world.log.clear();
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, elsewhere(keepalive))], world.now);
        world.settle();
        let there = world.log.iter().filter(|sent| sent.to == address(7));
        assert_eq!(there.count(), expected, "{keepalive:?}");
    }
}

#[test]
fn a_removed_peer_has_no_sessions_and_indices_any_more() {
    let mut world = World::connected_pair();
    world.send(0, &packet(1, 2, b"late"));
    world.hosts[1].core.set_peers(&BTreeMap::new(), world.now);
    world.settle();
    assert_eq!(world.hosts[1].delivered, Vec::<Vec<u8>>::new());
    assert_eq!(world.hosts[1].drops(Dropped::UnknownIndex), 1);
}

#[test]
fn a_changed_private_key_leads_to_a_new_handshake_at_once() {
    let mut world = World::connected_pair();
    let key = PrivateKey([7; 32]);
    world.hosts[0].core.set_private_key(Some(key.clone()));
    world.hosts[0].key = key;
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    two.set_peers(&[(one, config(1))], world.now);
    world.settle();
    world.assert_connected();
}

#[test]
fn the_devices_own_key_is_no_peer() {
    let world = World::of([1]);
    let own = world.hosts[0].public();
    world.hosts[0].set_peers(&[(&world.hosts[0], config(1))], world.now);
    assert!(world.hosts[0].core.table.load().peers.is_empty());
    world.hosts[0]
        .core
        .change_peers(false, vec![PeerSet::new(own)], world.now);
    assert!(world.hosts[0].core.table.load().peers.is_empty());

    let other = PrivateKey([9; 32]);
    world.hosts[0]
        .core
        .change_peers(false, vec![PeerSet::new(other.public_key())], world.now);
    assert_eq!(world.hosts[0].core.table.load().peers.len(), 1);
    world.hosts[0].core.set_private_key(Some(other));
    assert!(world.hosts[0].core.table.load().peers.is_empty());
}

#[test]
fn by_uapi_a_prefix_has_one_owner_and_a_live_peer_keeps_its_session() {
    let mut world = World::connected_pair();
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    let handshakes = world.count(1);
    let other = PublicKey([3; 32]);
    let take = PeerSet {
        allowed_ips: vec![AllowedIp::Add(net("10.0.2.0/24"))],
        ..PeerSet::new(other)
    };
    one.core.change_peers(false, vec![take], world.now);
    let shown = one.core.peers_for_uapi(|at| at.as_duration());
    assert_eq!(
        shown
            .iter()
            .map(|peer| (peer.public_key, peer.allowed_ips.len()))
            .collect::<BTreeMap<_, _>>(),
        BTreeMap::from([(two.public(), 0), (other, 1)])
    );

    let back = PeerSet {
        preshared_key: KeyUpdate::Clear,
        allowed_ips: vec![AllowedIp::Add(net("10.0.2.0/24"))],
        ..PeerSet::new(two.public())
    };
    one.core.change_peers(true, vec![back], world.now);
    assert_eq!(one.core.table.load().peers.len(), 1);
    world.assert_connected();
    assert_eq!(world.count(1), handshakes);
}

#[test]
fn update_only_creates_no_peer_and_a_removed_prefix_is_refused_to_others() {
    let world = World::of([1]);
    let core = &world.hosts[0].core;
    let (one, two) = (PublicKey([3; 32]), PublicKey([4; 32]));
    let change = |key, allowed_ips| PeerSet {
        allowed_ips,
        ..PeerSet::new(key)
    };
    core.change_peers(
        false,
        vec![PeerSet {
            update_only: true,
            ..PeerSet::new(one)
        }],
        world.now,
    );
    assert!(core.table.load().peers.is_empty());

    core.change_peers(
        false,
        vec![
            change(one, vec![AllowedIp::Add(net("10.0.0.0/8"))]),
            PeerSet::new(two),
        ],
        world.now,
    );
    core.change_peers(
        false,
        vec![change(two, vec![AllowedIp::Remove(net("10.0.0.0/8"))])],
        world.now,
    );
    assert!(
        core.table.load().route(ip("10.1.1.1"), || 0).is_some(),
        "it was not its to give away"
    );
    core.change_peers(
        false,
        vec![change(one, vec![AllowedIp::Remove(net("10.0.0.0/8"))])],
        world.now,
    );
    assert!(core.table.load().route(ip("10.1.1.1"), || 0).is_none());
}

#[test]
fn of_the_outer_header_only_congestion_marks_reach_the_inner_packet() {
    let mut world = World::connected_pair();
    let marked = |bits| {
        let mut marked = packet(1, 2, b"x");
        // A DSCP, which must not be in the outer header.
        marked[1] = 0xb8;
        marked[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&marked[..20]));
        marked[10..12].copy_from_slice(&sum.to_be_bytes());
        crate::wireguard::packet::set_ecn(&mut marked, Ecn::from_bits(bits));
        marked
    };
    world.send(0, &marked(2));
    let mut datagram = world.under_way.pop_front().unwrap();
    assert_eq!(datagram.ecn, Ecn::Ect0);
    datagram.ecn = Ecn::Congested;
    world.deliver(&datagram);
    assert_eq!(world.hosts[1].delivered.pop().unwrap(), marked(3));

    world.send(0, &marked(0));
    let mut datagram = world.under_way.pop_front().unwrap();
    datagram.ecn = Ecn::Congested;
    world.deliver(&datagram);
    assert_eq!(world.hosts[1].delivered, Vec::<Vec<u8>>::new());
    assert_eq!(world.hosts[1].drops(Dropped::Congested), 1);
}

#[test]
fn setting_the_same_peers_again_has_no_effect() {
    let mut world = World::connected_pair();
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    let peers = peers_of(&[(two, config(2))]);
    let sent = world.log.len();
    for _ in 0..10 {
        one.core.set_peers(&peers, world.now);
    }
    world.work();
    assert_eq!(world.log.len(), sent);
    world.assert_connected();
}
