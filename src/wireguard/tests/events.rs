//! Events for the control plane.

use super::*;
use crate::wireguard::PeerEvents;

/// Takes the events of the only peer of a host; none is an empty set.
fn events(host: &Host) -> PeerEvents {
    let events = host.core.take_events();
    assert!(events.len() <= 1);
    events.into_values().next().unwrap_or_default()
}

/// Two hosts with a session, and every event taken.
fn connected_pair() -> World {
    let world = World::connected_pair();
    for host in &world.hosts {
        host.core.take_events();
        host.core.signal.take();
    }
    world
}

#[test]
fn a_handshake_is_one_event_on_both_sides() {
    let world = World::connected_pair();
    for host in &world.hosts {
        assert!(host.core.signal.take(), "the embedder is called");
        let taken = host.core.take_events();
        assert_eq!(taken.len(), 1);
        assert!(taken.values().all(|events| events.handshake));
        assert_eq!(host.core.take_events(), BTreeMap::new());
        assert!(!host.core.signal.take());
    }
}

#[test]
fn packets_of_a_session_are_no_event() {
    let mut world = connected_pair();
    for _ in 0..20 {
        world.assert_connected();
        world.pass(seconds(1));
    }
    for host in &world.hosts {
        assert!(!host.core.signal.take());
        assert_eq!(host.core.take_events(), BTreeMap::new());
    }
}

#[test]
fn a_message_from_another_address_is_an_endpoint_event() {
    let mut world = connected_pair();
    world.hosts[1].wire.address = address(9);
    world.send(1, &packet(2, 1, b"from elsewhere"));
    world.settle();
    let expected = PeerEvents {
        endpoint: true,
        ..PeerEvents::default()
    };
    assert_eq!(events(&world.hosts[0]), expected);
    // It stays there.
    world.send(1, &packet(2, 1, b"from elsewhere"));
    world.settle();
    assert_eq!(events(&world.hosts[0]), PeerEvents::default());
}

#[test]
fn a_peer_is_silent_after_5_seconds_without_an_answer_and_heard_with_its_next_message() {
    let mut world = connected_pair();
    world.send(0, &packet(1, 2, b"lost"));
    world.pass_with(seconds(4), |_| false);
    assert_eq!(events(&world.hosts[0]), PeerEvents::default());
    world.pass_with(seconds(2), |_| false);
    assert!(world.hosts[0].core.signal.take());
    assert!(events(&world.hosts[0]).silent);
    world.pass_with(seconds(2), |_| false);
    assert_eq!(
        events(&world.hosts[0]),
        PeerEvents::default(),
        "reported once"
    );

    world.send(1, &packet(2, 1, b"here"));
    world.settle();
    assert!(events(&world.hosts[0]).heard);
}

#[test]
fn an_idle_session_expires_after_180_seconds() {
    let mut world = connected_pair();
    world.pass(seconds(179));
    assert_eq!(events(&world.hosts[0]), PeerEvents::default());
    world.pass(seconds(2));
    let expected = PeerEvents {
        expired: true,
        ..PeerEvents::default()
    };
    assert_eq!(events(&world.hosts[0]), expected);
}

#[test]
fn events_coalesce_until_they_are_taken_and_a_removed_peer_has_none() {
    let mut world = World::connected_pair();
    world.pass_with(seconds(1), |_| true);
    world.hosts[1].wire.address = address(9);
    world.send(1, &packet(2, 1, b"from elsewhere"));
    world.settle();
    let taken = world.hosts[0].core.take_events();
    let both = PeerEvents {
        handshake: true,
        endpoint: true,
        ..PeerEvents::default()
    };
    let expected = BTreeMap::from([(world.hosts[1].id(), both)]);
    assert_eq!(taken, expected);

    world.hosts[1].wire.address = address(8);
    world.send(1, &packet(2, 1, b"from elsewhere"));
    world.settle();
    world.hosts[0].set_peers(&[], world.now);
    assert_eq!(world.hosts[0].core.take_events(), BTreeMap::new());
}
