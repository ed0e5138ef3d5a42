//! Which port a leader listens on, second by second.
#![expect(
    clippy::disallowed_methods,
    reason = "an instant can only be had from the clock"
)]

use std::sync::Arc;

use super::*;
use crate::topology::{Candidate, Node, Segment, SegmentName, Topology};
use crate::wireguard::PeerStats;

const CONFIGURED: u16 = 51_820;
const PEER: PublicKey = PublicKey([7; 32]);
/// Less than [`PEER`]. Its first choices are 49152 + 0x0102, + 0x0304, + 0x0506.
const OWN: PublicKey = PublicKey([
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
    27, 28, 29, 30, 31, 32,
]);
const FIRST: u16 = FIRST_PORT + 0x0102;
const NEXT: u16 = FIRST_PORT + 0x0304;

struct World {
    port: ListenPort,
    start: Instant,
    look: Look,
}

impl World {
    /// A leader behind NAT that one leader behind another NAT does not answer.
    fn new(own: PublicKey) -> Self {
        Self {
            port: ListenPort::new(CONFIGURED, own),
            start: Instant::now(),
            look: Look {
                may_choose: true,
                is_behind_nat: true,
                unanswered: [PEER].into(),
            },
        }
    }

    fn at(&mut self, seconds: u64) -> Option<PortChange> {
        let now = self.start + Duration::from_secs(seconds);
        self.port.handle_look(&self.look, now)
    }

    /// The changes of so many seconds: when, and to which port.
    fn run(&mut self, seconds: std::ops::Range<u64>) -> Vec<(u64, u16)> {
        seconds
            .filter_map(|second| Some((second, self.at(second)?.to)))
            .collect()
    }
}

#[test]
fn a_peer_that_never_answers_leads_to_another_port() {
    let mut world = World::new(OWN);
    assert_eq!(world.run(0..10), []);
    let change = PortChange {
        from: CONFIGURED,
        to: FIRST,
        peer: Some(PEER),
    };
    assert_eq!(world.at(10), Some(change));
    assert_eq!(world.port.port(), FIRST);
    assert_eq!(world.port.reason(), Some(Some(PEER)));
    world.look.unanswered.clear();
    assert_eq!(world.run(11..2000), [], "it is kept once the peer answers");
    assert_eq!(world.port.port(), FIRST);
}

#[test]
fn the_leader_with_the_greater_key_waits_for_what_the_other_change_brings() {
    let greater = PublicKey([8; 32]);
    let mut world = World::new(greater);
    assert_eq!(world.run(0..15), []);
    assert!(world.at(15).is_some());
}

#[test]
fn further_changes_are_ever_more_seldom_and_end() {
    let mut world = World::new(OWN);
    let changes = world.run(0..20_000);
    let times: Vec<_> = changes.iter().map(|(second, _)| *second).collect();
    assert_eq!(times, [10, 310, 910, 2110]);
    let ports: BTreeSet<_> = changes.iter().map(|(_, port)| *port).collect();
    assert_eq!(ports.len(), MAX_CHANGES, "{changes:?}");
}

#[test]
fn nothing_changes_where_the_port_may_be_of_use() {
    let keeps = |change: fn(&mut Look)| {
        let mut world = World::new(OWN);
        change(&mut world.look);
        world.run(0..100).is_empty()
    };
    assert!(keeps(|look| look.is_behind_nat = false));
    assert!(keeps(|look| look.may_choose = false));
    assert!(keeps(|look| look.unanswered.clear()));
}

#[test]
fn a_peer_that_answers_in_time_is_counted_from_zero_later() {
    let mut world = World::new(OWN);
    assert_eq!(world.run(0..9), []);
    world.look.unanswered.clear();
    assert_eq!(world.at(9), None);
    world.look.unanswered = [PEER].into();
    assert_eq!(world.run(10..20), []);
    assert!(world.at(20).is_some());
}

#[test]
fn a_port_of_another_process_is_passed_over() {
    let mut world = World::new(OWN);
    assert_eq!(world.port.handle_taken(CONFIGURED), None);
    assert_eq!(world.run(0..11), [(10, FIRST)]);
    let change = world.port.handle_taken(FIRST).unwrap();
    assert_eq!((change.from, change.to), (FIRST, NEXT));
    assert_eq!(world.port.handle_taken(FIRST), None, "told once more");
}

#[test]
fn a_node_that_no_longer_leads_returns_to_its_port_after_a_while() {
    let mut world = World::new(OWN);
    assert_eq!(world.run(0..11), [(10, FIRST)]);
    world.look.may_choose = false;
    assert_eq!(world.run(11..70), []);
    assert_eq!(world.run(70..200), [(70, CONFIGURED)]);
    world.look.may_choose = true;
    assert_eq!(world.run(200..211), [(210, FIRST)]);
}

#[test]
fn the_next_run_of_the_agent_keeps_the_published_port() {
    let mut world = World::new(OWN);
    world.port.handle_published(NEXT, world.start);
    world.look.may_choose = false;
    assert_eq!(world.at(0), None, "its topology is not known yet");
    assert_eq!(world.port.port(), NEXT);
    assert_eq!(world.port.reason(), Some(None));
    world.look.may_choose = true;
    let third = FIRST_PORT + 0x0506;
    assert_eq!(world.run(1..400), [(300, third)]);

    // The port of another `--port` is not one of its own choice.
    let mut world = World::new(OWN);
    world.port.handle_published(4500, world.start);
    world.port.handle_published(FIRST, world.start);
    assert_eq!(world.port.port(), CONFIGURED);
}

/// What a look says of a leader `own`, which has a session with `master` and none with `far`.
struct Facets {
    facts: Facts,
    decision: Decision,
    stats: Stats,
}

impl Facets {
    fn new() -> Self {
        let name = |name: &str| NodeName(name.into());
        let leader = |(number, node): (u8, &str)| Leader {
            node: name(node),
            keys: vec![PublicKey([number; 32])],
            endpoint: None,
            address: None,
            discovered: None,
            candidates: vec![],
            behind_nat: true,
            persistent_keepalive: 25,
            keepalive_forced: false,
            wireguard_ips: vec![],
            probe_ip: None,
        };
        let leaders: Vec<_> = [(1, "own"), (2, "master"), (3, "far")].map(leader).into();
        let segment = |leader: &Leader| Segment {
            name: SegmentName::Node(leader.node.clone()),
            group: SegmentName::Node(leader.node.clone()),
            nodes: vec![crate::topology::Member {
                name: leader.node.clone(),
                endpoint: None,
                pod_cidrs: vec![],
                addresses: vec![],
                aliases: [].into(),
                underlay: [].into(),
                flannel_ips: [].into(),
                private_ip: None,
            }],
            leaders: vec![leader.clone()],
            allowed_location_ips: vec![],
        };
        let stats = |leader: &Leader| PeerStats {
            public_key: leader.public_key(),
            pair: None,
            endpoint: None,
            relayed: false,
            rx_bytes: 0,
            tx_bytes: 0,
            last_handshake: (leader.node == name("master")).then_some(Duration::ZERO),
            heard_unasked: None,
            unanswered: None,
            answer: None,
        };
        let at = |text: &str| text.parse().unwrap();
        let candidate = Candidate {
            address: at("203.0.113.30:51820"),
            origin: Origin::Discovered,
        };
        let peers = leaders[1..].iter();
        let mut facts = Facts {
            alive: [(PublicKey([2; 32]), at("203.0.113.10:51820"))].into(),
            ..Facts::default()
        };
        let object = serde_json::json!({"metadata": {"name": "own"}});
        let object = serde_json::from_value(object).unwrap();
        let (own, _) = crate::cluster::node::parse(&object, &Default::default());
        let snapshot = Arc::make_mut(&mut facts.snapshot);
        snapshot.nodes.insert(name("own"), own.unwrap());
        Self {
            facts,
            decision: Decision {
                topology: Arc::new(Topology {
                    segments: leaders.iter().map(segment).collect(),
                    ..Topology::default()
                }),
                candidates: [(leaders[2].peer_id(), vec![candidate])].into(),
                seen: [at("203.0.113.20:51820")].into(),
                ..Decision::default()
            },
            stats: Stats {
                peers: peers.map(|peer| (peer.peer_id(), stats(peer))).collect(),
                ..Stats::default()
            },
        }
    }

    /// Whether a change may follow from it.
    fn may_change(&self) -> bool {
        let me = NodeName("own".into());
        let look = Look::new(&self.facts, &self.decision, &self.stats, &me);
        look.may_choose && look.is_behind_nat && !look.unanswered.is_empty()
    }

    fn own(&mut self) -> &mut Node {
        let snapshot = Arc::make_mut(&mut self.facts.snapshot);
        snapshot.nodes.get_mut(&NodeName("own".into())).unwrap()
    }
}

#[test]
fn a_port_is_chosen_only_where_it_can_help_and_breaks_nothing() {
    assert!(Facets::new().may_change());
    let without = |change: fn(&mut Facets)| {
        let mut facets = Facets::new();
        change(&mut facets);
        !facets.may_change()
    };
    assert!(without(|of| of.own().endpoint_forced = true), "forced");
    assert!(without(|of| of.decision.seen.clear()), "not behind NAT");
    assert!(without(|of| of.facts.alive.clear()), "no uplink");
    let called = |of: &mut Facets| _ = of.facts.callers.insert(PublicKey([9; 32]));
    assert!(without(called), "a peer called unasked");
    assert!(
        without(|of| of.decision.candidates.clear()),
        "no leader sees the far leader"
    );
    let heard = |of: &mut Facets| {
        let far = of
            .stats
            .peers
            .values_mut()
            .find(|peer| peer.public_key == PublicKey([3; 32]));
        far.unwrap().last_handshake = Some(Duration::from_secs(1000));
    };
    assert!(without(heard), "it answered once");
    let forced = |of: &mut Facets| {
        for candidates in of.decision.candidates.values_mut() {
            candidates[0].origin = Origin::Forced;
        }
    };
    assert!(without(forced), "its operator forwards a port");
}
