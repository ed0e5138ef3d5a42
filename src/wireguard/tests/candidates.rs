//! Candidate endpoints of a peer, and unasked initiations.

use super::super::UNASKED_AFTER;
use super::*;

fn endpoint(world: &World, of: usize, at: usize) -> Option<SocketAddr> {
    let way = world.hosts[at].peer(&world.hosts[of]).way();
    way.map(Way::remote)
}

#[test]
fn one_initiation_is_sent_to_all_candidates_and_the_one_that_answers_is_used() {
    let mut world = World::connected_pair();
    world.hosts[1].wire.address = address(9);
    let id = world.hosts[1].id();
    world.now = world.now + seconds(1);
    let before = world.log.len();
    world.hosts[0]
        .core
        .try_candidates(&id, &[address(7), address(8), address(9)]);
    world.work();

    let sent: Vec<_> = world.log[before..].to_vec();
    let places: Vec<_> = sent.iter().map(|datagram| datagram.to).collect();
    assert_eq!(places, [address(7), address(8), address(9)]);
    assert!(sent.iter().all(|datagram| datagram.bytes == sent[0].bytes));
    assert_eq!(
        endpoint(&world, 1, 0),
        Some(address(2)),
        "moved without an answer"
    );

    world.settle();
    assert_eq!(endpoint(&world, 1, 0), Some(address(9)));
    world.assert_connected();
}

#[test]
fn a_second_copy_of_an_initiation_moves_no_endpoint() {
    let mut world = World::connected_pair();
    let id = world.hosts[1].id();
    world.now = world.now + seconds(1);
    world.hosts[0]
        .core
        .try_candidates(&id, &[address(2), address(9)]);
    world.work();
    let mut copies: Vec<_> = world.under_way.drain(..).collect();
    // Both candidates lead to the same host, which sees host 1 at another address through the second.
    copies[1].to = address(2);
    copies[1].from = address(7);
    for copy in copies {
        world.deliver(&copy);
        world.now = world.now + seconds(1);
        world.settle();
    }
    assert_eq!(world.hosts[1].drops(Dropped::Replayed), 1);
    assert_eq!(endpoint(&world, 0, 1), Some(address(1)));
    world.assert_connected();
}

/// Host 2 begins a handshake with host 1, which has no endpoint of host 2. Returns when host 1 had an unasked
/// initiation.
fn unasked(world: &mut World) -> Option<Time> {
    world.send(1, &packet(2, 1, b"hello"));
    world.settle();
    world.hosts[0].peer(&world.hosts[1]).heard_unasked()
}

fn pair_without_an_endpoint_of_host_2() -> World {
    let world = World::of([1, 2]);
    let anywhere = PeerConfig {
        endpoint: None,
        ..config(2)
    };
    world.hosts[0].set_peers(&[(&world.hosts[1], anywhere)], world.now);
    world.hosts[1].set_peers(&[(&world.hosts[0], config(1))], world.now);
    world
}

#[test]
fn an_initiation_from_an_address_that_was_never_sent_to_is_unasked() {
    let mut world = pair_without_an_endpoint_of_host_2();
    assert_eq!(unasked(&mut world), Some(world.now));
}

#[test]
fn an_initiation_after_one_to_a_candidate_is_not_unasked() {
    let mut world = pair_without_an_endpoint_of_host_2();
    let id = world.hosts[1].id();
    // A wrong candidate: the initiation of the peer may come through a mapping that this one made.
    world.hosts[0].core.try_candidates(&id, &[address(9)]);
    world.settle();
    world.pass(UNASKED_AFTER.checked_sub(seconds(1)).unwrap());
    assert_eq!(unasked(&mut world), None);
}

#[test]
fn after_minutes_of_silence_an_initiation_is_unasked() {
    let mut world = World::connected_pair();
    // Until neither side sends anything: sessions end after three minutes.
    world.pass(seconds(600));
    let before = world.hosts[0].peer(&world.hosts[1]).heard_unasked();
    assert_eq!(before, None);
    assert_eq!(unasked(&mut world), Some(world.now));
}

#[test]
fn no_initiation_is_unasked_shortly_after_the_start() {
    let mut world = pair_without_an_endpoint_of_host_2();
    world.now = Time::from_duration(UNASKED_AFTER.checked_sub(seconds(1)).unwrap());
    assert_eq!(unasked(&mut world), None);
}

#[test]
fn no_initiation_is_unasked_shortly_after_a_peer_was_removed_and_added_again() {
    let mut world = World::connected_pair();
    let anywhere = PeerConfig {
        endpoint: None,
        ..config(2)
    };
    world.hosts[0].set_peers(&[], world.now);
    world.hosts[0].set_peers(&[(&world.hosts[1], anywhere)], world.now);
    world.hosts[1].set_peers(&[], world.now);
    world.hosts[1].set_peers(&[(&world.hosts[0], config(1))], world.now);
    world.now = world.now + seconds(1);
    assert_eq!(unasked(&mut world), None);
}

#[test]
fn no_initiation_is_unasked_from_the_address_of_another_peer() {
    let mut world = World::of([1, 2, 3]);
    let [one, two, three] = world.hosts.as_slice() else {
        unreachable!()
    };
    let anywhere = PeerConfig {
        endpoint: None,
        ..config(2)
    };
    let mut behind_it = config(3);
    behind_it.endpoint = Some((address(2).ip(), 4242).into());
    one.set_peers(&[(two, anywhere), (three, behind_it)], world.now);
    two.set_peers(&[(one, config(1))], world.now);
    world.send(0, &packet(1, 3, b"out"));
    world.work();
    assert_eq!(unasked(&mut world), None);
}
