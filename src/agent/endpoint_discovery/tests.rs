//! What is tried when, second by second.
#![expect(
    clippy::disallowed_methods,
    reason = "an instant can only be had from the clock"
)]

use super::*;
use crate::topology::{ExternalPeer, Leader, Member, RegionName, Segment, SegmentName};

const KEY: PublicKey = PublicKey([7; 32]);

fn place(last: u8) -> SocketAddr {
    ([203, 0, 113, last], 51820).into()
}

fn candidate(last: u8, origin: Origin) -> Candidate {
    Candidate {
        address: place(last),
        origin,
    }
}

fn discovered(last: u8) -> Candidate {
    candidate(last, Origin::Discovered)
}

fn segment(key: PublicKey, persistent_keepalive: u16) -> Segment {
    let name = SegmentName::Location(RegionName("elsewhere".into()));
    Segment {
        name: name.clone(),
        group: name,
        leaders: vec![Leader {
            node: crate::topology::NodeName("leader".into()),
            keys: vec![key],
            endpoint: None,
            address: None,
            discovered: None,
            candidates: vec![],
            behind_nat: persistent_keepalive > 0,
            persistent_keepalive,
            keepalive_forced: false,
            wireguard_ips: vec![],
            probe_ip: None,
        }],
        nodes: Vec::<Member>::new(),
        allowed_location_ips: vec![],
    }
}

fn laptop(persistent_keepalive: u16) -> ExternalPeer {
    ExternalPeer {
        name: "laptop".into(),
        created: 0,
        public_key: KEY,
        preshared_key: None,
        endpoint: None,
        persistent_keepalive,
        allowed_ips: vec![],
    }
}

fn of_leader(keepalive: u16) -> Keys {
    Keys::new(&Topology {
        segments: vec![segment(KEY, keepalive)],
        ..Topology::default()
    })
}

fn of_laptop(keepalive: u16) -> Keys {
    Keys::new(&Topology {
        peers: vec![laptop(keepalive)],
        ..Topology::default()
    })
}

/// One peer, what the tunnel tells of it, and where it may be.
struct World {
    discovery: EndpointDiscovery,
    keys: Keys,
    start: Instant,
    received: u64,
    endpoint: Option<SocketAddr>,
    /// When the last handshake was, in seconds.
    handshake: Option<u64>,
    /// Since when an answer is awaited, in seconds.
    sent: Option<u64>,
    answer: Option<Answer>,
    candidates: Vec<Candidate>,
}

impl World {
    /// A peer with a session, at its only candidate.
    fn new(keys: Keys) -> Self {
        Self {
            discovery: EndpointDiscovery::default(),
            keys,
            start: Instant::now(),
            received: 100,
            endpoint: Some(place(1)),
            handshake: Some(0),
            sent: None,
            answer: None,
            candidates: vec![discovered(1)],
        }
    }

    /// A peer that was never heard.
    fn unheard(keys: Keys, candidates: &[Candidate]) -> Self {
        Self {
            received: 0,
            endpoint: candidates.first().map(|candidate| candidate.address),
            handshake: None,
            candidates: candidates.to_vec(),
            ..Self::new(keys)
        }
    }

    /// Whether it is there, and where it is tried, at a time in seconds.
    fn at(&mut self, seconds: u64) -> (bool, Vec<SocketAddr>) {
        let now = self.start + Duration::from_secs(seconds);
        let since = |at: u64| Duration::from_secs(seconds.saturating_sub(at));
        let sign = Sign {
            endpoint: self.endpoint,
            received: self.received,
            age: self.handshake.map(since),
            unanswered: self.sent.map(since),
            answer: self.answer,
            relayed: self.endpoint == Some(behind_relay()),
        };
        let (discovery, keys) = (&mut self.discovery, &self.keys);
        let there = discovery.handle_sign(KEY, sign, &self.candidates, keys, now);
        (there, discovery.poll_search(&KEY, keys, now))
    }

    fn tries(&mut self, seconds: std::ops::Range<u64>) -> Vec<(u64, Vec<SocketAddr>)> {
        seconds
            .map(|at| (at, self.at(at).1))
            .filter(|(_, tried)| !tried.is_empty())
            .collect()
    }

    fn heard(&mut self) {
        self.received += 92;
        self.sent = None;
    }
}

fn times(tries: &[(u64, Vec<SocketAddr>)]) -> Vec<u64> {
    tries.iter().map(|(at, _)| *at).collect()
}

#[test]
fn a_leader_that_was_never_heard_is_tried_at_all_its_candidates_and_then_at_each_alone() {
    let candidates = [
        discovered(1),
        candidate(2, Origin::Endpoint),
        candidate(3, Origin::Announced),
    ];
    let mut world = World::unheard(of_leader(25), &candidates);
    let all = vec![place(1), place(2), place(3)];
    let tries = world.tries(0..14);
    let expected = [
        (0, all.clone()),
        (5, all.clone()),
        (7, vec![place(1)]),
        (10, all),
        (12, vec![place(2)]),
    ];
    assert_eq!(tries, expected);
}

#[test]
fn attempts_at_all_candidates_stay_within_what_a_nat_remembers() {
    let candidates = [discovered(1), discovered(2)];
    let mut world = World::unheard(of_leader(25), &candidates);
    let all: Vec<_> = world
        .tries(0..600)
        .into_iter()
        .filter(|(_, tried)| tried.len() == 2)
        .collect();
    let all = times(&all);
    assert_eq!(all[..8], [0, 5, 10, 15, 20, 25, 50, 75]);
    assert!(all.windows(2).all(|pair| pair[1] - pair[0] < 30), "{all:?}");
}

#[test]
fn a_peer_that_does_not_answer_what_was_sent_is_tried_everywhere_after_five_seconds() {
    let mut world = World::new(of_leader(0));
    world.candidates.push(candidate(2, Origin::Announced));
    world.at(0);
    world.sent = Some(10);
    assert_eq!(world.tries(1..15), []);
    assert_eq!(world.at(15).1, [place(1), place(2)]);
    // It answers from its other candidate.
    world.endpoint = Some(place(2));
    world.heard();
    assert_eq!(world.tries(16..200), []);
}

#[test]
fn a_peer_that_only_receives_is_suspected_once() {
    let mut world = World::new(of_leader(0));
    world.at(0);
    // It is sent data without an end, and says something every ten seconds.
    let mut tries = Vec::new();
    for at in 0..200 {
        world.sent = Some(at / 10 * 10);
        if at % 10 == 0 {
            world.received += 32;
        }
        tries.extend((!world.at(at).1.is_empty()).then_some(at));
    }
    assert_eq!(tries, [5]);
}

#[test]
fn an_idle_peer_is_left_alone() {
    let mut world = World::new(of_leader(0));
    assert_eq!(world.tries(0..3600), []);
}

#[test]
fn a_new_candidate_is_tried_at_once_and_again_until_the_peer_is_heard() {
    let mut world = World::new(of_leader(25));
    assert_eq!(world.at(1).1, []);
    world.candidates = vec![discovered(2), candidate(1, Origin::Endpoint)];
    let tries = world.tries(2..50);
    assert_eq!(times(&tries), [2, 7, 12, 17, 22, 27]);
    assert!(tries.iter().all(|(_, tried)| *tried == [place(2)]));

    world.received += 32;
    assert_eq!(world.tries(50..55), []);
}

#[test]
fn what_was_seen_before_the_peer_was_last_heard_is_old() {
    let mut world = World::new(of_leader(25));
    world.at(0);
    world.received += 32;
    world.candidates.push(discovered(2));
    assert_eq!(world.at(1).1, [place(2)]);
    // It answers from where it was.
    world.received += 92;
    assert_eq!(world.tries(2..55), []);
}

#[test]
fn a_leader_that_is_silent_for_two_keepalives_is_tried_everywhere() {
    let mut world = World::new(of_leader(10));
    world.candidates.push(discovered(2));
    world.at(1);
    world.received += 32;
    world.at(2);
    assert_eq!(world.tries(3..27), []);
    assert_eq!(world.at(27).1, [place(1), place(2)]);
}

#[test]
fn a_laptop_that_sleeps_is_not_called_where_it_was() {
    let mut world = World::new(of_laptop(10));
    world.candidates.push(discovered(2));
    world.at(1);
    world.received += 32;
    world.at(2);
    assert_eq!(world.at(27).1, [place(2)]);
}

#[test]
fn a_laptop_that_was_never_heard_is_not_called_and_a_site_with_an_endpoint_is() {
    let mut laptop = World::unheard(of_laptop(10), &[discovered(1)]);
    assert_eq!(laptop.tries(0..60), []);
    let mut site = World::unheard(of_laptop(0), &[candidate(1, Origin::Forced)]);
    site.endpoint = None;
    assert_eq!(site.at(0).1, [place(1)]);
}

#[test]
fn an_idle_session_is_there_however_long_the_other_side_says_nothing() {
    let mut world = World::new(of_leader(10));
    assert!(world.at(0).0);
    assert!(world.at(179).0);
    // Its session has ended, and it was not heard for two keepalives.
    assert!(!world.at(180).0);
    world.received += 32;
    assert!(world.at(181).0);
}

#[test]
fn of_many_candidates_the_likeliest_are_tried() {
    let candidates: Vec<_> = (1..=40).map(discovered).collect();
    let mut world = World::unheard(of_leader(25), &candidates);
    let tried = world.at(0).1;
    assert_eq!(tried.len(), MAX_TRIED);
    assert_eq!(tried[0], place(1));
}

#[test]
fn what_came_of_each_candidate_is_told() {
    let candidates = [discovered(1), candidate(2, Origin::Announced)];
    let mut world = World::unheard(of_leader(25), &candidates);
    world.at(0);
    world.answer = Some(Answer {
        from: place(2),
        round_trip: Duration::from_millis(12),
        ago: Duration::from_secs(3),
    });
    world.endpoint = Some(place(2));
    world.handshake = Some(1);
    world.heard();
    world.at(4);
    let now = world.start + Duration::from_secs(4);
    let outcomes = world.discovery.outcomes(&KEY, now);
    let seconds = Duration::from_secs;
    let told: Vec<_> = outcomes
        .iter()
        .map(|outcome| (outcome.in_use, outcome.answered, outcome.tried))
        .collect();
    let expected = [
        (false, None, Some(seconds(4))),
        (
            true,
            Some((Duration::from_millis(12), seconds(3))),
            Some(seconds(4)),
        ),
    ];
    assert_eq!(told, expected);
}

#[test]
fn a_node_learns_from_others_that_it_has_moved() {
    let mut discovery = EndpointDiscovery::default();
    assert!(!discovery.handle_own([].into()));
    assert!(!discovery.handle_own([place(1)].into()));
    assert!(!discovery.handle_own([place(1)].into()));
    assert!(discovery.handle_own([place(2)].into()));
    // A second observer of the same.
    assert!(!discovery.handle_own([place(2)].into()));
    assert!(discovery.handle_own([place(2), place(3)].into()));
    assert!(!discovery.handle_own([place(3)].into()));
}

#[test]
fn a_key_is_known_for_what_its_first_holder_is() {
    // A peer of a leader's key is left out of the mesh; should one be there, it changes nothing.
    let keys = Keys::new(&Topology {
        segments: vec![segment(KEY, 25)],
        peers: vec![laptop(10)],
        ..Topology::default()
    });
    assert_eq!((keys.keepalive(&KEY), keys.is_leader(&KEY)), (25, true));
    let other = PublicKey([9; 32]);
    assert_eq!((keys.keepalive(&other), keys.is_leader(&other)), (0, false));
}

/// With `--mesh-granularity=full` every node looks at every other, once a second.
#[test]
fn five_thousand_leaders_are_looked_at_in_a_moment() {
    const LEADERS: u16 = 5000;
    let key = |n: u16| PublicKey([n.to_be_bytes(); 16].concat().try_into().unwrap());
    let segments = (1..=LEADERS).map(|n| segment(key(n), 25));
    let keys = Keys::new(&Topology {
        segments: segments.collect(),
        ..Topology::default()
    });
    let candidates: Vec<_> = (1..=8).map(discovered).collect();
    let mut discovery = EndpointDiscovery::default();
    let begun = Instant::now();
    for n in 1..=LEADERS {
        let sign = Sign {
            endpoint: Some(place(1)),
            received: 1,
            age: Some(Duration::ZERO),
            ..Sign::default()
        };
        assert!(discovery.handle_sign(key(n), sign, &candidates, &keys, begun));
        discovery.poll_search(&key(n), &keys, begun);
        discovery.outcomes(&key(n), begun);
    }
    let looked = begun.elapsed();
    assert!(looked < Duration::from_secs(10), "{looked:?}");
}

/// The endpoint of the peer behind a relay.
fn behind_relay() -> SocketAddr {
    "10.4.0.1:51820".parse().unwrap()
}

#[test]
fn direct_candidates_of_a_relayed_peer_are_tried_all_the_time_and_ever_more_seldom() {
    let mut world = World::new(of_leader(25));
    world.candidates = vec![discovered(1), discovered(2)];
    assert_eq!(world.tries(0..10), []);
    world.endpoint = Some(behind_relay());
    let mut tries = Vec::new();
    for at in 10..120 {
        // Traffic comes through the relay.
        world.heard();
        let (there, tried) = world.at(at);
        assert!(there);
        if !tried.is_empty() {
            assert!(!tried.contains(&behind_relay()), "{tried:?}");
            tries.push((at, tried));
        }
    }
    let all: Vec<_> = tries.iter().filter(|(_, tried)| tried.len() == 2).collect();
    let all: Vec<_> = all.iter().map(|(at, _)| *at).collect();
    assert_eq!(all, [15, 20, 25, 30, 35, 40, 65, 90, 115]);
    // Back on the direct path nothing is searched for.
    world.endpoint = Some(place(1));
    world.heard();
    assert_eq!(world.tries(120..124), []);
}

#[test]
fn the_relays_candidate_is_tried_alone_and_again_after_five_seconds() {
    let mut world = World::new(of_leader(25));
    world.sent = Some(0);
    world.at(5);
    let poll = |world: &mut World, at: u64| {
        let now = world.start + Duration::from_secs(at);
        world.discovery.poll_relay(&KEY, now)
    };
    assert!(poll(&mut world, 6));
    assert!(!poll(&mut world, 10));
    assert!(poll(&mut world, 11));
    assert_eq!(world.at(12).1, [], "not beside another initiation");
    world.endpoint = Some(behind_relay());
    world.heard();
    world.at(13);
    assert!(!poll(&mut world, 20), "it is in use");
    // The direct path is back, while the relay is still chosen: an answer through it would end that path.
    world.endpoint = Some(place(1));
    world.heard();
    world.at(21);
    assert!(!poll(&mut world, 25));
    assert!(poll(&mut world, 26));
    world.endpoint = Some(behind_relay());
    world.heard();
    world.at(27);
    assert!(world.discovery.was_direct(&KEY));
}

#[test]
fn a_peer_that_only_a_relay_reaches_was_never_reached_directly() {
    let mut world = World::unheard(of_leader(25), &[discovered(1)]);
    world.at(0);
    assert!(!world.discovery.was_direct(&KEY));
    world.endpoint = Some(behind_relay());
    world.handshake = Some(1);
    world.at(1);
    assert!(!world.discovery.was_direct(&KEY));
    world.endpoint = Some(place(1));
    world.at(2);
    assert!(world.discovery.was_direct(&KEY));
}
