//! Initiations that arrive before the device knows the key of their sender.

use boringtun::noise::handshake::Handshake;
use boringtun::x25519;

use super::*;

/// Host 1 has sent an initiation to host 2, which does not know its key.
fn early() -> World {
    let mut world = World::of([1, 2]);
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    one.set_peers(&[(two, config(2))], world.now);
    world.settle();
    assert_eq!(world.count(1), 1);
    world
}

/// Host 2 learns the key of host 1, without an endpoint. So it sends nothing of its own.
fn learn(world: &mut World) {
    let [one, two, ..] = world.hosts.as_slice() else {
        unreachable!()
    };
    let anywhere = PeerConfig {
        endpoint: None,
        ..config(1)
    };
    two.set_peers(&[(one, anywhere)], world.now);
    world.settle();
}

/// An initiation to host 2 with the key `claimed`, by a sender that has the key `own`.
pub(super) fn initiation(own: u8, claimed: u8, second: u64) -> Vec<u8> {
    let mut buffer = [0; 148];
    let timestamp = Timestamp::from_unix(seconds(second)).to_tai64n();
    let mut noise = Handshake::new(
        x25519::StaticSecret::from([own; 32]),
        PrivateKey([claimed; 32]).public_key().0.into(),
        PrivateKey([2; 32]).public_key().0.into(),
        None,
    );
    let written = noise.format_handshake_initiation(7, timestamp, &mut buffer);
    written.unwrap().to_vec()
}

fn arrives(world: &mut World, from: SocketAddr, bytes: Vec<u8>) {
    let (to, ecn) = (address(2), Ecn::NotCapable);
    world.deliver(&Datagram {
        from,
        to,
        bytes,
        ecn,
        fragments: Fragments::Allowed,
    });
}

#[test]
fn an_early_initiation_is_answered_as_soon_as_its_key_is_known() {
    let mut world = early();
    assert_eq!(world.hosts[1].drops(Dropped::Unauthentic), 1);
    world.pass(Duration::from_millis(4800));
    assert_eq!(world.count(2), 0, "it is not answered before");

    learn(&mut world);
    assert_eq!((world.count(1), world.count(2)), (1, 1));
    let peer = world.hosts[1].peer(&world.hosts[0]);
    assert_eq!(peer.last_handshake(), Some(world.now));
    assert_eq!(peer.way().map(Way::remote), Some(address(1)));
    world.assert_connected();
    assert_eq!(world.count(1), 1, "a second initiation was sent");
}

#[test]
fn an_early_initiation_is_answered_when_wg_adds_the_key() {
    use crate::wireguard::uapi::PeerSet;
    let mut world = early();
    let change = PeerSet::new(world.hosts[0].public());
    let core = world.hosts[1].core.clone();
    core.change_peers(false, vec![change], world.now);
    world.settle();
    assert_eq!((world.count(1), world.count(2)), (1, 1));
}

#[test]
fn after_five_seconds_an_early_initiation_is_not_answered() {
    let mut world = early();
    world.now = world.now + seconds(5);
    learn(&mut world);
    let answers = |world: &World| world.count(2);
    // The initiation that is repeated now is answered.
    assert_eq!(answers(&world), world.count(1) - 1);
}

#[test]
fn another_key_does_not_answer_an_early_initiation() {
    let mut world = World::of([1, 2, 3]);
    arrives(&mut world, address(1), initiation(1, 1, 1));
    let [_, two, three] = world.hosts.as_slice() else {
        unreachable!()
    };
    let anywhere = PeerConfig::new(three.public());
    two.set_peers(&[(three, anywhere)], world.now);
    world.settle();
    assert_eq!(world.log, []);
}

#[test]
fn a_sender_without_the_key_that_it_claims_takes_no_place() {
    let mut world = World::of([1, 2]);
    for second in [100, 200] {
        arrives(&mut world, address(9), initiation(9, 1, second));
        world.settle();
    }
    assert_eq!(world.hosts[1].drops(Dropped::Unauthentic), 2);
    learn(&mut world);
    assert_eq!(world.log, []);

    // Nor does it take the place of the owner of the key, with a later timestamp.
    let mut world = World::of([1, 2]);
    arrives(&mut world, address(1), initiation(1, 1, 1));
    world.settle();
    arrives(&mut world, address(9), initiation(9, 1, 100));
    world.settle();
    learn(&mut world);
    let answered: Vec<_> = world.log.iter().map(|datagram| datagram.to).collect();
    assert_eq!(answered, [address(1)]);
}

#[test]
fn the_seventeenth_early_initiation_is_dropped() {
    let mut world = World::of(std::array::from_fn::<u8, 19, _>(|n| {
        u8::try_from(n).unwrap() + 1
    }));
    for n in 3..=19 {
        arrives(&mut world, address(n), initiation(n, n, 1));
        world.settle();
    }
    assert_eq!(world.hosts[1].drops(Dropped::Unauthentic), 17);
    let senders = world.hosts[2..]
        .iter()
        .map(|host| (host, PeerConfig::new(host.public())));
    let senders: Vec<_> = senders.collect();
    world.hosts[1].set_peers(&senders, world.now);
    world.work();
    let answered: Vec<_> = world.log.iter().map(|datagram| datagram.to).collect();
    assert_eq!(answered, (3..=18).map(address).collect::<Vec<_>>());
    assert!(world.log.iter().all(|datagram| datagram.kind() == 2));
}

#[test]
fn a_recorded_initiation_of_a_removed_peer_is_not_held() {
    let mut world = World::of([1, 2]);
    let recorded = initiation(1, 1, 50);
    learn(&mut world);
    arrives(&mut world, address(1), recorded.clone());
    world.settle();
    assert_eq!(world.count(2), 1);

    world.hosts[1].set_peers(&[], world.now);
    world.pass(seconds(1));
    arrives(&mut world, address(9), recorded);
    world.settle();
    learn(&mut world);
    assert_eq!(world.count(2), 1);
    // A later one is.
    world.hosts[1].set_peers(&[], world.now);
    world.pass(seconds(1));
    arrives(&mut world, address(1), initiation(1, 1, 51));
    world.settle();
    learn(&mut world);
    assert_eq!(world.count(2), 2);
}

/// Host 2 is under load, if at all, when an initiation with a valid cookie arrives. Returns the answers after it
/// learns the key.
fn answers_under_load(loaded: bool) -> usize {
    let mut world = early();
    // Only the initiation with the cookie counts here, not the first one.
    world.pass_with(seconds(5) - Duration::from_millis(200), |_| false);
    let noise = |world: &mut World| {
        let mut initiation = vec![7; 148];
        initiation[..4].copy_from_slice(&[1, 0, 0, 0]);
        for _ in 0..600 {
            arrives(world, address(9), initiation.clone());
        }
    };
    noise(&mut world);
    let repeated = loop {
        world.now = world.now + Duration::from_millis(50);
        world.work();
        if let Some(repeated) = world.under_way.pop_front() {
            break repeated;
        }
    };
    noise(&mut world);
    world.deliver(&repeated);
    world.work();
    let cookie = world.under_way.pop_front().unwrap();
    assert_eq!(cookie.kind(), 3);
    world.deliver(&cookie);
    // The initiation with the cookie.
    let proven = loop {
        world.now = world.now + Duration::from_millis(10);
        world.work();
        if let Some(proven) = world.under_way.pop_front() {
            break proven;
        }
    };
    assert_eq!(proven.kind(), 1);
    if loaded {
        noise(&mut world);
    } else {
        world.now = world.now + seconds(2);
    }
    world.deliver(&proven);
    world.work();
    learn(&mut world);
    world.count(2)
}

#[test]
fn under_load_no_initiation_is_held() {
    assert_eq!(answers_under_load(true), 0);
    assert_eq!(answers_under_load(false), 1, "the control");
}
