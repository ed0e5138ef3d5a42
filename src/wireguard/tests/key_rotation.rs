//! Keys and preshared keys that are replaced while packets pass.

use super::*;
use crate::wireguard::key::PresharedKey;

const OLD: u8 = 1;
const NEW: u8 = 51;

fn private(seed: u8) -> PrivateKey {
    PrivateKey([seed; 32])
}

fn public(seed: u8) -> PublicKey {
    private(seed).public_key()
}

/// Host 1 as host 2 configures it: with this current key, and these others.
fn known_as(current: u8, also: &[u8]) -> PeerConfig {
    PeerConfig {
        public_key: public(current),
        also_keys: also.iter().map(|seed| public(*seed)).collect(),
        ..config(1)
    }
}

impl World {
    /// Host 2 knows these keys of host 1.
    fn learn(&self, current: u8, also: &[u8]) {
        let peers = BTreeMap::from([(PeerId::new("node/one"), known_as(current, also))]);
        self.hosts[1].core.set_peers(&peers, self.now);
    }

    /// Host 1 has these keys.
    fn use_keys(&mut self, current: u8, also: Option<u8>) {
        let keys = [current].into_iter().chain(also).map(private);
        self.hosts[0].core.set_identities(keys);
        self.hosts[0].key = private(current);
    }

    /// Host 1 tries a handshake with host 2 under this key.
    fn try_key(&self, seed: u8) {
        let id = self.hosts[1].id();
        self.hosts[0].core.try_identity(&id, public(seed));
    }

    /// The own key under which host 1 seals.
    fn sealing_key(&self) -> PublicKey {
        let peer = self.hosts[0].peer(&self.hosts[1]);
        peer.session().as_ref().unwrap().pair().own
    }

    /// Whether host 1 with the key of this seed alone gets an answer to an initiation.
    fn is_answered(&mut self, seed: u8) -> bool {
        // An earlier initiation is held for its key no longer.
        self.pass(seconds(6));
        let other = Host::new(9);
        other.core.set_private_key(Some(private(seed)));
        let floor = Timestamp::from_unix(self.now.as_duration());
        *other.core.timestamps.lock().unwrap() = TimestampSequence::new(floor, None);
        other.set_peers(&[(&self.hosts[1], config(2))], self.now);
        self.hosts.push(other);
        let before = self.count(2);
        self.settle();
        self.hosts.pop();
        self.count(2) > before
    }
}

/// Two hosts with a session. Host 2 calls host 1 `node/one`.
fn connected() -> World {
    let mut world = World::pair();
    world.learn(OLD, &[]);
    world.assert_connected();
    world.pass(seconds(1));
    world
}

/// Sends numbered packets both ways, each under way for a step of 10 ms, while the world changes.
struct Load {
    next: u32,
    in_flight: Vec<Datagram>,
}

impl Load {
    fn run(&mut self, world: &mut World, steps: u32) {
        for _ in 0..steps {
            let number = self.next.to_be_bytes();
            self.next += 1;
            world.send(0, &packet(1, 2, &number));
            world.send(1, &packet(2, 1, &number));
            world.work();
            let arriving = std::mem::take(&mut self.in_flight);
            self.in_flight = world.under_way.drain(..).collect();
            world.log.clear();
            world.now = world.now + Duration::from_millis(10);
            for datagram in &arriving {
                world.deliver(datagram);
            }
        }
    }
}

#[test]
fn a_key_is_replaced_under_load_and_no_numbered_packet_is_lost() {
    let mut world = connected();
    let mut load = Load {
        next: 0,
        in_flight: Vec::new(),
    };
    load.run(&mut world, 5_000);
    // Announced.
    world.use_keys(OLD, Some(NEW));
    load.run(&mut world, 5_000);
    world.learn(OLD, &[NEW]);
    load.run(&mut world, 5_000);
    assert_eq!(world.sealing_key(), public(OLD));
    world.try_key(NEW);
    load.run(&mut world, 5_000);
    assert_eq!(world.sealing_key(), public(NEW));
    // Switched, with the other side later.
    world.use_keys(NEW, Some(OLD));
    load.run(&mut world, 5_000);
    world.learn(NEW, &[OLD]);
    load.run(&mut world, 5_000);
    // Retired, with the other side later.
    world.use_keys(NEW, None);
    load.run(&mut world, 5_000);
    world.learn(NEW, &[]);
    load.run(&mut world, 65_000);
    world.under_way.extend(load.in_flight);
    world.settle();
    for (host, from, to) in [(1, 1, 2), (0, 2, 1)] {
        let expected: Vec<_> = (0..100_000_u32)
            .map(|number| packet(from, to, &number.to_be_bytes()))
            .collect();
        let delivered = &world.hosts[host].delivered;
        assert_eq!(delivered.len(), expected.len(), "host {host}");
        assert!(*delivered == expected, "host {host}");
    }
}

#[test]
fn an_initiation_under_either_key_is_answered_and_under_a_retired_one_not() {
    let mut world = connected();
    assert!(world.is_answered(OLD));
    assert!(!world.is_answered(NEW));
    world.learn(OLD, &[NEW]);
    assert!(world.is_answered(NEW));
    world.learn(NEW, &[OLD]);
    assert!(world.is_answered(OLD));
    world.learn(NEW, &[]);
    // A copy of the old key is worth nothing now.
    assert!(!world.is_answered(OLD));
}

#[test]
fn an_initiation_to_either_own_key_is_answered_and_to_a_retired_one_not() {
    for (current, also, called, answers) in [
        (OLD, None, OLD, true),
        (OLD, Some(NEW), NEW, true),
        (NEW, Some(OLD), OLD, true),
        (NEW, None, OLD, false),
    ] {
        let mut world = World::of([1, 2]);
        world.use_keys(current, also);
        {
            let [one, two] = world.hosts.as_slice() else {
                unreachable!()
            };
            let silent = PeerConfig {
                endpoint: None,
                ..config(2)
            };
            one.set_peers(&[(two, silent)], world.now);
        }
        world.learn(called, &[]);
        world.settle();
        assert_eq!(world.count(2) == 1, answers, "{called} of {current}");
    }
}

#[test]
fn sides_that_know_different_keys_find_a_pair_that_both_have() {
    // Host 2 was away: it knows the old key, or knew the new one when it was announced.
    for (current, also, known, known_also) in [
        (NEW, Some(OLD), OLD, None),
        (NEW, None, OLD, Some(NEW)),
        (OLD, Some(NEW), NEW, None),
    ] {
        for caller in [0, 1] {
            let mut world = World::pair();
            world.use_keys(current, also);
            world.learn(known, known_also.as_slice());
            // The other side cannot call.
            let other = 1 - caller;
            let silent = move |datagram: &Datagram| {
                datagram.kind() != 1 || datagram.from == address(u8::try_from(caller).unwrap() + 1)
            };
            world.send(
                caller,
                &packet(
                    1 + u8::try_from(caller).unwrap(),
                    1 + u8::try_from(other).unwrap(),
                    b"hello",
                ),
            );
            world.pass_with(seconds(7), silent);
            let case = (current, also, known, known_also, caller);
            assert_eq!(world.hosts[other].delivered.len(), 1, "{case:?}");
        }
    }
}

#[test]
fn a_trial_without_an_answer_changes_nothing() {
    let mut world = connected();
    world.use_keys(OLD, Some(NEW));
    let sessions = world.count(2);
    // Host 2 does not know the key.
    world.try_key(NEW);
    world.pass(seconds(20));
    assert_eq!(world.count(2), sessions);
    let peer = world.hosts[0].peer(&world.hosts[1]);
    assert_eq!(peer.timers.waiting_since(), None);
    let initiations = world.count(1);
    world.assert_connected();
    assert_eq!(world.count(1), initiations);
    assert_eq!(world.sealing_key(), public(OLD));
}

#[test]
fn sessions_under_a_key_that_stays_go_on() {
    let mut world = connected();
    let handshakes = world.count(1);
    world.learn(OLD, &[NEW]);
    world.use_keys(OLD, Some(NEW));
    world.use_keys(NEW, Some(OLD));
    world.learn(NEW, &[OLD]);
    world.assert_connected();
    assert_eq!(world.count(1), handshakes);
    assert_eq!(world.sealing_key(), public(OLD));
    // Without the key, its session ends.
    world.use_keys(NEW, None);
    world.assert_connected();
    assert_eq!(world.count(1), handshakes + 1);
    assert_eq!(world.sealing_key(), public(NEW));
}

#[test]
fn a_further_key_belongs_to_one_peer_and_never_to_the_device() {
    let world = World::of([1, 2]);
    let own = world.hosts[0].public();
    let peer = |current: u8, also: &[PublicKey]| PeerConfig {
        also_keys: also.iter().copied().collect(),
        ..PeerConfig::new(public(current))
    };
    let peers = BTreeMap::from([
        (PeerId::new("a"), peer(60, &[own, public(61), public(70)])),
        (PeerId::new("b"), peer(61, &[public(70), public(71)])),
    ]);
    let core = &world.hosts[0].core;
    core.set_peers(&peers, world.now);
    let configured = core.peer_configs();
    assert_eq!(configured[&PeerId::new("a")].also_keys, [public(70)].into());
    assert_eq!(configured[&PeerId::new("b")].also_keys, [public(71)].into());
    let table = core.table.load();
    assert_eq!(table.peers.len(), 2);
    let id = |seed: u8| {
        table
            .peer_of(&public(seed))
            .map(|peer| peer.id().to_string())
    };
    assert_eq!(id(61).as_deref(), Some("b"));
    assert_eq!(id(70).as_deref(), Some("a"));
    assert_eq!(table.peer_of(&own).map(|peer| peer.id()), None);
}

/// A preshared key, or none for 0.
fn preshared(seed: u8) -> Option<PresharedKey> {
    (seed != 0).then_some(PresharedKey([seed; 32]))
}

impl World {
    /// A host has these preshared keys for its peer.
    fn share(&self, host: usize, first: u8, next: u8) {
        let mut peers = self.hosts[host].core.peer_configs();
        for peer in peers.values_mut() {
            peer.preshared_key = preshared(first);
            peer.next_preshared_key = preshared(next);
        }
        self.hosts[host].core.set_peers(&peers, self.now);
        assert_eq!(self.hosts[host].core.peer_configs(), peers);
    }

    /// Whether a new handshake succeeds that this host begins.
    fn agrees(&mut self, caller: usize) -> bool {
        self.pass(seconds(6));
        let before = self.hosts[caller].peer(&self.hosts[1 - caller]);
        let before = before.last_handshake();
        let peer = self.hosts[caller].peer(&self.hosts[1 - caller]);
        self.now = self.now + seconds(6);
        self.hosts[caller].core.ask_handshake(&peer, self.now);
        self.settle();
        peer.last_handshake() > before
    }
}

#[test]
fn a_preshared_key_is_introduced_replaced_and_withdrawn_in_any_order_of_the_sides() {
    // In each step one side is first and then the other; every state in between has handshakes both ways.
    let steps = [
        (0, 1),
        (1, 0),
        (1, 2),
        (2, 1),
        (2, 0),
        (2, 3),
        (3, 2),
        (3, 0),
    ];
    for first in [0, 1] {
        let mut world = World::connected_pair();
        for (step, (current, next)) in steps.into_iter().enumerate() {
            // The last step of an introduction and of a replacement withdraws what is not used any more.
            let is_clean = next == 0 && current == 1;
            for host in [first, 1 - first] {
                world.share(host, current, next);
                let is_done = host != first;
                for caller in [0, 1] {
                    let agrees = world.agrees(caller);
                    assert!(
                        agrees || is_clean && !is_done,
                        "step {step}, caller {caller}"
                    );
                }
                world.assert_connected();
            }
        }
    }
}

#[test]
fn no_handshake_without_the_preshared_key_succeeds_where_it_is_required() {
    for caller in [0, 1] {
        let mut world = World::connected_pair();
        world.share(0, 1, 0);
        assert!(!world.agrees(caller));
        world.share(1, 2, 3);
        assert!(!world.agrees(caller));
        world.share(1, 2, 1);
        // Host 2 accepts it, and answers with another one.
        assert_eq!(world.agrees(caller), caller == 1);
    }
}
