//! The probers of several nodes on a fake network: what each proves of the others, and what no stranger can do.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test prints what it measures, and fails by panicking"
)]

mod mtus;
mod targets;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use selvedge::liveness::{Cause, PathState};
use selvedge::probe::message::{Datagram, Kind, LENGTH, Message, datagram, packet};
use selvedge::probe::{Forwarding, News, PORT, PathKind, Transmit};
use selvedge::topology::{NodeName, RegionName, SegmentName};
use selvedge::wireguard::PeerId;

use crate::echo_net::{self, Net};

const SILENT: PathState = PathState::Down(Cause::Silent);

#[expect(clippy::disallowed_methods, reason = "an Instant has no other origin")]
fn start() -> Instant {
    Instant::now()
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Two regions of four nodes and one of one node, at rest.
fn three_regions(seed: u64) -> Net {
    let mut net = Net::regions(start(), seed, &[("a", 4), ("b", 4), ("c", 1)]);
    net.run(seconds(10));
    net
}

fn news(net: &Net, name: &str) -> News {
    let news = net.nodes[name].news.last();
    news.map_or_else(News::default, |(_, news)| news.clone())
}

/// The state of the path from a node through a leader of its region.
fn through(net: &Net, name: &str, leader: &str) -> PathState {
    let leaders = news(net, name).verdicts.leaders;
    leaders[&NodeName(leader.into())].state
}

/// The state of the path from a leader to one of another region.
fn to(net: &Net, name: &str, leader: &str) -> PathState {
    let id = PeerId::new(format!("node/{leader}"));
    news(net, name).verdicts.peers[&id]
}

fn segment(region: &str) -> SegmentName {
    SegmentName::Location(RegionName(region.into()))
}

fn lacks(net: &Net, name: &str, leader: &str, region: &str) -> bool {
    let leader = &news(net, name).verdicts.leaders[&NodeName(leader.into())];
    leader.unreached.contains(&segment(region))
}

/// When the last change of a node's verdicts came.
fn changed(net: &Net, name: &str) -> Instant {
    net.nodes[name].news.last().unwrap().0
}

/// Counts what every node has said so far.
fn told(net: &Net) -> BTreeMap<String, usize> {
    let nodes = net.nodes.iter();
    nodes
        .map(|(name, node)| (name.clone(), node.news.len()))
        .collect()
}

#[test]
fn all_paths_of_a_healthy_mesh_are_up_and_stay_so() {
    let mut net = three_regions(1);
    for name in ["a3", "a4"] {
        assert_eq!(through(&net, name, "a1"), PathState::Up);
        assert_eq!(through(&net, name, "a2"), PathState::Up);
        assert!(news(&net, name).verdicts.peers.is_empty());
    }
    for other in ["b1", "b2", "c1"] {
        assert_eq!(to(&net, "a1", other), PathState::Up);
    }
    assert_eq!(through(&net, "a1", "a2"), PathState::Up);
    let before = told(&net);
    net.run(seconds(120));
    assert_eq!(told(&net), before);
}

#[test]
fn a_dead_leader_is_down_within_two_seconds_for_its_region_and_all_leaders_elsewhere() {
    for seed in 0..10 {
        let mut net = three_regions(seed);
        net.run(millis(seed * 57));
        net.faults.dead.insert("a1".into());
        let died = net.now;
        net.run(seconds(2));
        for name in ["a2", "a3", "a4"] {
            assert_eq!(through(&net, name, "a1"), SILENT, "{name}");
            assert!(changed(&net, name) - died <= millis(1_600));
        }
        for name in ["b1", "b2", "c1"] {
            assert_eq!(to(&net, name, "a1"), SILENT, "{name}");
            assert_eq!(to(&net, name, "a2"), PathState::Up, "{name}");
        }
        assert_eq!(news(&net, "a2").forwarding, Forwarding::Works);

        net.faults.dead.clear();
        net.run(seconds(4));
        assert_eq!(through(&net, "a3", "a1"), PathState::Up);
        assert_eq!(to(&net, "b1", "a1"), PathState::Up);
    }
}

#[test]
fn a_leader_whose_way_back_is_broken_says_so_itself_and_is_avoided_within_three_seconds() {
    let mut net = three_regions(2);
    net.faults.no_way_back.insert("a1".into());
    net.run(seconds(3));
    assert_eq!(through(&net, "a3", "a1"), SILENT);
    assert_eq!(news(&net, "a1").forwarding, Forwarding::NoWayBack);
    let not_forwarding = PathState::Down(Cause::NotForwarding);
    for name in ["b1", "b2", "c1"] {
        assert_eq!(to(&net, name, "a1"), not_forwarding, "{name}");
        assert_eq!(to(&net, name, "a2"), PathState::Up, "{name}");
    }
    assert_eq!(news(&net, "a2").forwarding, Forwarding::Works);

    net.faults.no_way_back.clear();
    net.run(seconds(4));
    assert_eq!(news(&net, "a1").forwarding, Forwarding::Works);
    assert_eq!(to(&net, "b1", "a1"), PathState::Up);
}

#[test]
fn a_leader_that_nothing_gets_into_finds_it_out_by_the_other_leader_that_answers_it() {
    let mut net = three_regions(3);
    net.faults.no_way_in.insert("a1".into());
    net.run(seconds(3));
    assert_eq!(through(&net, "a3", "a1"), SILENT);
    assert_eq!(news(&net, "a1").forwarding, Forwarding::NoWayIn);
    assert_eq!(to(&net, "b1", "a1"), PathState::Down(Cause::NotForwarding));
    assert_eq!(to(&net, "b1", "a2"), PathState::Up);
}

#[test]
fn a_leader_whose_members_all_die_still_counts_as_forwarding() {
    let mut net = three_regions(4);
    for name in ["a2", "a3", "a4"] {
        net.faults.dead.insert(name.into());
    }
    net.run(seconds(60));
    assert_eq!(news(&net, "a1").forwarding, Forwarding::Unknown);
    assert_eq!(to(&net, "b1", "a1"), PathState::Up);
    // And so does one without any.
    assert_eq!(to(&net, "b1", "c1"), PathState::Up);
}

#[test]
fn a_leader_whose_host_does_not_forward_says_so_when_no_echo_arrives() {
    let mut net = three_regions(5);
    let mut targets = net.nodes["c1"].prober.targets().clone();
    targets.lead.as_mut().unwrap().may_forward = false;
    net.set_targets("c1", targets);
    net.run(seconds(1));
    assert_eq!(to(&net, "b1", "c1"), PathState::Down(Cause::NotForwarding));
}

#[test]
fn the_members_learn_which_region_a_leader_does_not_reach() {
    let mut net = three_regions(6);
    for far in ["b1", "b2"] {
        net.faults.broken.insert(("a1".into(), far.into()));
    }
    net.run(seconds(3));
    for name in ["a3", "a2"] {
        assert_eq!(through(&net, name, "a1"), PathState::Up, "{name}");
        assert!(lacks(&net, name, "a1", "b"), "{name}");
        assert!(!lacks(&net, name, "a1", "c"), "{name}");
    }
    assert!(!lacks(&net, "a3", "a2", "b"));
    let verdicts = news(&net, "a3").verdicts;
    let (one, two) = (NodeName("a1".into()), NodeName("a2".into()));
    assert_eq!(verdicts.through(&one, &segment("b")), None);
    assert_eq!(verdicts.through(&two, &segment("b")), Some(PathState::Up));

    // One leader of the region is enough.
    net.faults.broken.remove(&("a1".into(), "b2".into()));
    net.run(seconds(4));
    assert!(!lacks(&net, "a3", "a1", "b"));
}

#[test]
fn a_region_that_never_answered_is_not_reached() {
    let mut net = Net::regions(start(), 7, &[("a", 3), ("b", 1)]);
    net.faults.dead.insert("b1".into());
    net.run(seconds(1));
    assert!(lacks(&net, "a3", "a1", "b"));
    assert_eq!(to(&net, "a1", "b1"), PathState::Unknown);
    net.run(seconds(2));
    assert_eq!(to(&net, "a1", "b1"), SILENT);
}

#[test]
fn a_node_whose_own_uplink_is_down_sees_all_down_and_the_others_blame_it_alone() {
    let mut net = three_regions(8);
    let others: Vec<String> = net
        .nodes
        .keys()
        .filter(|name| *name != "a1")
        .cloned()
        .collect();
    for other in &others {
        net.faults.broken.insert(("a1".into(), other.clone()));
        net.faults.broken.insert((other.clone(), "a1".into()));
    }
    net.run(seconds(3));
    let own = news(&net, "a1");
    assert!(own.verdicts.peers.values().all(|state| *state == SILENT));
    assert!(
        own.verdicts
            .leaders
            .values()
            .all(|leader| leader.state == SILENT)
    );
    assert!(!own.forwarding.fails(), "{:?}", own.forwarding);
    assert_eq!(through(&net, "a3", "a1"), SILENT);
    assert_eq!(through(&net, "a3", "a2"), PathState::Up);
    assert_eq!(to(&net, "b1", "a2"), PathState::Up);
}

#[test]
fn a_direction_that_fails_is_found_by_both_ends_of_a_tunnel() {
    let mut net = three_regions(9);
    net.faults.broken.insert(("b1".into(), "a1".into()));
    net.run(seconds(2));
    assert_eq!(to(&net, "a1", "b1"), SILENT);
    assert_eq!(to(&net, "b1", "a1"), SILENT);
    assert_eq!(to(&net, "a2", "b1"), PathState::Up);
}

#[test]
fn one_packet_in_ten_that_is_lost_changes_no_verdict_for_five_minutes() {
    for seed in 10..12 {
        let mut net = three_regions(seed);
        let before = told(&net);
        net.faults.loss = 100;
        net.run(seconds(300));
        assert_eq!(told(&net), before, "seed {seed}");
    }
}

#[test]
fn a_leader_that_drains_is_known_to_all_at_once_and_knows_when_they_know() {
    let mut net = three_regions(13);
    assert!(net.node("a1").prober.has_other_leader());
    assert!(!net.node("c1").prober.has_other_leader());
    net.drain("a1");
    let now = net.now;
    assert!(!net.node("a1").prober.is_drained(now));
    net.run(millis(5));
    for name in ["a2", "a3", "a4"] {
        assert_eq!(through(&net, name, "a1"), PathState::Draining, "{name}");
    }
    for name in ["b1", "b2", "c1"] {
        assert_eq!(to(&net, name, "a1"), PathState::Draining, "{name}");
    }
    let now = net.now;
    assert!(net.node("a1").prober.is_drained(now));
    // It is said again in every answer.
    net.run(seconds(2));
    assert_eq!(through(&net, "a3", "a1"), PathState::Draining);
    // The next agent of the node does not drain.
    net.faults.dead.insert("a1".into());
    net.run(seconds(3));
    assert_eq!(through(&net, "a3", "a1"), SILENT);
}

#[test]
fn a_dead_node_keeps_no_leader_from_draining() {
    let mut net = three_regions(14);
    net.faults.dead.insert("a4".into());
    net.faults.dead.insert("b2".into());
    net.run(seconds(3));
    net.drain("a1");
    net.run(millis(700));
    let now = net.now;
    assert!(net.node("a1").prober.is_drained(now));
}

/// Breaks both directions between two nodes, or makes them good.
fn break_between(net: &mut Net, one: &str, other: &str, is_broken: bool) {
    for (from, to) in [(one, other), (other, one)] {
        let direction = (from.to_owned(), to.to_owned());
        if is_broken {
            net.faults.broken.insert(direction);
        } else {
            net.faults.broken.remove(&direction);
        }
    }
}

/// The leader that relays for a node to a region.
fn relay(net: &Net, name: &str, to: &str) -> Option<String> {
    let relays = news(net, name).verdicts.relays;
    let relay = relays.get(&segment(to))?;
    Some(relay.as_str().trim_start_matches("node/").to_owned())
}

/// Four regions with one leader each, of which a and b do not reach each other.
fn blocked_pair(seed: u64) -> Net {
    let sizes = [("a", 1), ("b", 1), ("c", 1), ("d", 1)];
    let mut net = Net::regions(start(), seed, &sizes);
    net.run(seconds(10));
    assert_eq!(relay(&net, "a1", "b"), None);
    break_between(&mut net, "a1", "b1", true);
    net
}

#[test]
fn two_leaders_that_lost_each_other_both_choose_a_relay_within_three_seconds() {
    let mut net = blocked_pair(31);
    net.run(seconds(3));
    for (from, to) in [("a1", "b"), ("b1", "a")] {
        let relay = relay(&net, from, to);
        assert!(matches!(relay.as_deref(), Some("c1" | "d1")), "{relay:?}");
    }
    assert_eq!(relay(&net, "c1", "a"), None);
    break_between(&mut net, "a1", "b1", false);
    net.run(seconds(10));
    assert_eq!(relay(&net, "a1", "b"), None);
}

#[test]
fn another_relay_is_chosen_within_two_seconds_after_the_first_has_died() {
    let mut net = blocked_pair(32);
    net.run(seconds(5));
    let first = relay(&net, "a1", "b").unwrap();
    net.faults.dead.insert(first.clone());
    let died = net.now;
    net.run(seconds(2));
    let (at, _) = net.nodes["a1"]
        .news
        .iter()
        .find(|(at, news)| {
            let relay = news.verdicts.relays.get(&segment("b"));
            *at > died && relay.is_some_and(|relay| !relay.as_str().ends_with(&first))
        })
        .unwrap();
    println!("another relay {:?} after the first died", *at - died);
}

#[test]
fn no_relay_is_chosen_for_a_region_that_is_dead() {
    let mut net = blocked_pair(33);
    break_between(&mut net, "a1", "b1", false);
    net.faults.dead.insert("b1".to_owned());
    net.run(seconds(60));
    let chosen = net.nodes["a1"].news.iter();
    let chosen = chosen.filter(|(_, news)| !news.verdicts.relays.is_empty());
    assert_eq!(chosen.count(), 0);
}

#[test]
fn an_agent_that_says_nothing_of_relays_is_none_and_neither_is_one_that_is_forbidden() {
    for forbid in ["c1", "d1"] {
        let mut net = blocked_pair(34);
        let now = net.now;
        let prober = &mut net.node(forbid).prober;
        let mut targets = prober.targets().clone();
        targets.lead.as_mut().unwrap().relays = false;
        prober.handle_targets(now, targets);
        net.run(seconds(5));
        let other = if forbid == "c1" { "d1" } else { "c1" };
        assert_eq!(relay(&net, "a1", "b").as_deref(), Some(other));
        net.faults.dead.insert(other.to_owned());
        net.run(seconds(5));
        assert_eq!(relay(&net, "a1", "b"), None);
    }
}

#[test]
fn a_leader_that_drains_stops_relaying_at_once() {
    let mut net = blocked_pair(35);
    net.run(seconds(5));
    let first = relay(&net, "a1", "b").unwrap();
    net.drain(&first);
    net.run(millis(50));
    assert_ne!(relay(&net, "a1", "b"), Some(first));
}

#[test]
fn the_other_leader_of_the_region_that_reaches_it_is_used_and_no_relay() {
    let sizes = [("a", 2), ("b", 1), ("c", 1)];
    let mut net = Net::regions(start(), 36, &sizes);
    net.run(seconds(10));
    break_between(&mut net, "a1", "b1", true);
    net.run(seconds(20));
    assert_eq!(relay(&net, "a1", "b"), None);
    break_between(&mut net, "a2", "b1", true);
    net.run(seconds(4));
    assert_eq!(relay(&net, "a1", "b").as_deref(), Some("c1"));
    assert_eq!(relay(&net, "a2", "b").as_deref(), Some("c1"));
}

fn echo(token: u64) -> Message {
    Message {
        kind: Kind::Echo,
        draining: false,
        forwards: true,
        knows: false,
        direct: false,
        token,
        acknowledged: 0,
        generation: 0,
        unreached: [0; 64],
    }
}

/// Hands a leader a datagram from its link, and returns the number of answers.
fn answers(net: &mut Net, leader: &str, from: &str, to: &str, payload: &[u8]) -> usize {
    let packet = packet(&Datagram {
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        payload,
    });
    let now = net.now;
    let prober = &mut net.node(leader).prober;
    prober.handle_packet(now, None, &packet.unwrap());
    std::iter::from_fn(|| prober.poll_transmit())
        .inspect(|transmit| {
            let Transmit::Link(answer) = transmit else {
                panic!("not an answer to the region: {transmit:?}");
            };
            let answer = datagram(answer).unwrap();
            assert_eq!(answer.to, from.parse().unwrap());
            assert!(answer.payload.len() <= payload.len(), "amplified");
        })
        .count()
}

#[test]
fn only_well_formed_echoes_of_the_regions_nodes_are_answered() {
    let mut net = three_regions(15);
    let (good, at) = (echo(7).encode(), "10.4.255.254:3785");
    let mut try_one =
        |from: &str, at: &str, payload: &[u8]| answers(&mut net, "a1", from, at, payload);
    assert_eq!(try_one("10.42.2.0:50000", at, &good), 1);
    // A pod, a node of another region, and an address elsewhere.
    assert_eq!(try_one("10.42.2.7:50000", at, &good), 0);
    assert_eq!(try_one("10.43.2.0:50000", at, &good), 0);
    assert_eq!(try_one("192.0.2.1:50000", at, &good), 0);
    // Another port, and the probe address of another leader.
    assert_eq!(try_one("10.42.2.0:50000", "10.4.255.254:3784", &good), 0);
    assert_eq!(try_one("10.42.2.0:50000", "10.4.255.253:3785", &good), 0);
    // Too short, too long, and an answer.
    assert_eq!(try_one("10.42.2.0:50000", at, &good[..LENGTH - 1]), 0);
    assert_eq!(
        try_one("10.42.2.0:50000", at, &[&good[..], &[0; 900]].concat()),
        0
    );
    let answer = Message {
        kind: Kind::Answer,
        ..echo(7)
    };
    assert_eq!(try_one("10.42.2.0:50000", at, &answer.encode()), 0);
}

#[test]
fn a_sender_gets_a_limited_number_of_answers() {
    let mut net = three_regions(16);
    let payload = echo(9).encode();
    let mut count = 0;
    for _ in 0..1_000 {
        net.now += millis(1);
        count += answers(
            &mut net,
            "a1",
            "10.42.2.0:50000",
            "10.4.255.254:3785",
            &payload,
        );
    }
    assert!((20..=31).contains(&count), "{count} answers");
    // Another one is answered.
    assert_eq!(
        answers(&mut net, "a1", "10.42.3.0:1", "10.4.255.254:3785", &payload),
        1
    );
}

/// The token of the last echo that a node sent through its socket to this address.
fn last_token(net: &Net, name: &str, to: SocketAddr) -> Message {
    let sent = net.nodes[name].sent.iter().rev();
    let mut echoes = sent.filter_map(|(_, transmit)| match transmit {
        Transmit::Socket { to: at, payload } if *at == to => Message::parse(payload),
        Transmit::Socket { .. } | Transmit::Link(_) | Transmit::Peer(..) | Transmit::Padded(..) => {
            None
        }
    });
    echoes.next().unwrap()
}

#[test]
fn an_answer_counts_only_from_the_probe_address_with_the_token_of_a_recent_echo() {
    let mut net = three_regions(17);
    net.faults.dead.insert("a1".into());
    let probe: SocketAddr = "10.4.255.254:3785".parse().unwrap();
    net.run(seconds(3));
    assert_eq!(through(&net, "a3", "a1"), SILENT);
    let real = last_token(&net, "a3", probe);
    let forged = |token| Message {
        kind: Kind::Answer,
        token,
        ..real
    };
    let mut hand = |from: &str, message: Message| {
        let now = net.now;
        let prober = &mut net.node("a3").prober;
        let before = prober.refused();
        prober.handle_datagram(now, from.parse().unwrap(), &message.encode());
        prober.refused() > before
    };
    assert!(hand("10.4.255.254:3785", forged(real.token ^ 1)));
    assert!(hand("10.4.255.254:3784", forged(real.token)));
    assert!(
        hand("10.4.255.253:3785", forged(real.token)),
        "another leader"
    );
    assert!(hand("10.42.0.0:3785", forged(real.token)));
    assert!(hand(
        "10.4.255.254:3785",
        Message {
            kind: Kind::Echo,
            ..real
        }
    ));
    // The control.
    assert!(!hand("10.4.255.254:3785", forged(real.token)));
}

#[test]
fn a_bitmap_about_another_list_of_regions_is_ignored() {
    let mut net = three_regions(18);
    let probe: SocketAddr = "10.4.255.254:3785".parse().unwrap();
    for (own_list, expected) in [(false, false), (true, true)] {
        let real = last_token(&net, "a3", probe);
        let mut answer = Message {
            kind: Kind::Answer,
            generation: if own_list {
                real.generation
            } else {
                real.generation ^ 1
            },
            ..real
        };
        answer.set_lacking(0);
        let now = net.now;
        let node = net.node("a3");
        node.prober.handle_datagram(now, probe, &answer.encode());
        if let Some(news) = node.prober.poll_news(now) {
            node.news.push((now, news));
        }
        assert_eq!(lacks(&net, "a3", "a1", "b"), expected);
    }
}

#[test]
fn a_packet_in_the_tunnel_counts_only_from_the_peer_whose_address_it_has() {
    let mut net = three_regions(19);
    let payload = echo(3).encode();
    let mut hand = |peer: &str, from: &str, to: &str| {
        let packet = packet(&Datagram {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            payload: &payload,
        });
        let now = net.now;
        let prober = &mut net.node("a1").prober;
        let id = PeerId::new(peer.to_owned());
        prober.handle_packet(now, Some(&id), &packet.unwrap());
        std::iter::from_fn(|| prober.poll_transmit()).count()
    };
    assert_eq!(hand("node/b1", "10.4.1.1:3785", "10.4.0.1:3785"), 1);
    assert_eq!(hand("node/b2", "10.4.1.1:3785", "10.4.0.1:3785"), 0);
    assert_eq!(hand("peer/laptop", "10.4.1.1:3785", "10.4.0.1:3785"), 0);
    assert_eq!(hand("node/b1", "10.4.1.1:53", "10.4.0.1:3785"), 0);
    // The probe address is for the own region alone.
    assert_eq!(hand("node/b1", "10.4.1.1:3785", "10.4.255.254:3785"), 0);
    assert_eq!(hand("node/b1", "10.42.2.0:3785", "10.4.255.254:3785"), 0);
}

#[test]
fn other_targets_keep_what_is_known_of_the_paths_that_stay() {
    let mut net = three_regions(20);
    let mut targets = net.nodes["a1"].prober.targets().clone();
    let lead = targets.lead.as_mut().unwrap();
    lead.peers.remove(&PeerId::new("node/b2".to_owned()));
    net.set_targets("a1", targets.clone());
    net.run(seconds(1));
    let peers = news(&net, "a1").verdicts.peers;
    assert_eq!(peers.len(), 2);
    assert!(peers.values().all(|state| *state == PathState::Up));
    assert!(net.nodes["a1"].news.iter().all(|(at, news)| {
        *at < net.now - seconds(2)
            || news
                .verdicts
                .peers
                .values()
                .all(|state| *state == PathState::Up)
    }));

    // Another address is another path.
    let lead = targets.lead.as_mut().unwrap();
    let far = lead
        .peers
        .get_mut(&PeerId::new("node/b1".to_owned()))
        .unwrap();
    far.address = "10.4.9.9".parse().unwrap();
    net.set_targets("a1", targets);
    net.run(seconds(1));
    assert_eq!(to(&net, "a1", "b1"), PathState::Unknown);

    net.set_targets("a1", Default::default());
    net.run(seconds(1));
    assert_eq!(news(&net, "a1"), News::default());
    assert_eq!(net.nodes["a1"].prober.poll_timeout(), None);
}

#[test]
fn a_new_order_of_the_leaders_changes_no_verdict_on_them() {
    let mut net = three_regions(21);
    let targets = net.nodes["a3"].prober.targets().clone();
    let states = |net: &Net| ["a1", "a2"].map(|leader| through(net, "a3", leader));
    assert_eq!(states(&net), [PathState::Up; 2]);

    let mut swapped = targets.clone();
    let addresses = targets.leaders.values().rev().copied();
    for (address, other) in swapped.leaders.values_mut().zip(addresses) {
        *address = other;
    }
    assert_ne!(swapped, targets);
    net.set_targets("a3", swapped);
    net.run(millis(1));
    assert_eq!(states(&net), [PathState::Up; 2]);
}

/// Echoes, and echoes and answers, that a node sent in a second.
fn rates(net: &Net, name: &str, time: Duration) -> (f64, f64) {
    let node = &net.nodes[name];
    let is_echo = |transmit: &Transmit| match transmit {
        Transmit::Socket { .. } => true,
        Transmit::Link(_) | Transmit::Padded(..) => false,
        Transmit::Peer(_, packet) => {
            let read = datagram(packet).and_then(|read| Message::parse(read.payload));
            read.is_some_and(|message| message.kind == Kind::Echo)
        }
    };
    let echoes = node.sent.iter().filter(|(_, transmit)| is_echo(transmit));
    let per_second = |count: usize| f64::from(u32::try_from(count).unwrap()) / time.as_secs_f64();
    (per_second(echoes.count()), per_second(node.sent.len()))
}

#[test]
fn the_budget_is_kept_in_small_and_large_meshes() {
    println!("| mesh | node | paths | echoes/s | with answers/s | longest silence until Down |");
    println!("|---|---|---|---|---|---|");
    let hundred: Vec<String> = (0..100).map(|number| format!("r{number:02}-")).collect();
    let large: Vec<(&str, usize)> = hundred.iter().map(|name| (name.as_str(), 50)).collect();
    for (mesh, sizes, names) in [
        (
            "10 nodes in 2 regions",
            vec![("a", 5), ("b", 5)],
            ["a3", "a1"],
        ),
        ("5,000 nodes in 100 regions", large, ["r00-3", "r00-1"]),
    ] {
        let mut net = Net::some_regions(start(), 21, &sizes, 1);
        net.run(seconds(5));
        net.nodes.values_mut().for_each(|node| node.sent.clear());
        let time = seconds(5);
        net.run(time);
        for (role, name) in ["member", "leader"].into_iter().zip(names) {
            let paths = net.nodes[name].prober.stats();
            let (echoes, all) = rates(&net, name, time);
            let silence = net.nodes[name].prober.detection();
            println!(
                "| {mesh} | {role} | {} | {echoes:.1} | {all:.1} | {:.2} s |",
                paths.len(),
                silence.as_secs_f64(),
            );
            assert!(paths.iter().all(|path| path.state == PathState::Up));
            let through = paths.iter().filter(|path| path.kind == PathKind::Leader);
            let through = f64::from(u32::try_from(through.count()).unwrap());
            let limit = if role == "member" {
                2.0 * through
            } else {
                200.0
            };
            assert!(echoes <= limit, "{role}: {echoes} echoes a second");
            assert!(silence <= millis(2_010), "{silence:?}");
        }
    }
}

#[test]
fn a_leader_that_is_cut_off_from_a_large_mesh_keeps_its_budget() {
    let hundred: Vec<String> = (0..100).map(|number| format!("r{number:02}-")).collect();
    let sizes: Vec<(&str, usize)> = hundred.iter().map(|name| (name.as_str(), 2)).collect();
    let mut net = Net::some_regions(start(), 22, &sizes, 1);
    net.run(seconds(5));
    net.nodes.values_mut().for_each(|node| node.sent.clear());
    for name in &hundred {
        for number in 0..2 {
            let direction = (echo_net::name(name, number), "r00-1".to_owned());
            net.faults.broken.insert(direction);
        }
    }
    let time = seconds(4);
    net.run(time);
    let (echoes, _) = rates(&net, "r00-1", time);
    assert!(echoes <= 200.0, "{echoes} echoes a second");
    let states = net.nodes["r00-1"].prober.stats();
    assert!(states.iter().all(|path| path.state == SILENT));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whatever is broken and mended: in the end the verdicts say what is.
    #[test]
    fn the_verdicts_follow_the_network(
        faults in prop::collection::vec((0..9_usize, 0..9_usize, any::<bool>(), 1..4_000_u64), 1..12),
        seed in any::<u64>(),
    ) {
        let mut net = three_regions(seed);
        let names: Vec<String> = net.nodes.keys().cloned().collect();
        for (from, to, breaks, time) in faults {
            let direction = (names[from].clone(), names[to].clone());
            if breaks {
                net.faults.broken.insert(direction);
            } else {
                net.faults.broken.remove(&direction);
            }
            net.run(millis(time));
        }
        // Longer than any damping.
        net.run(seconds(100));
        let is_broken = |one: &str, two: &str| {
            let direction = |from: &str, to: &str| (from.to_owned(), to.to_owned());
            net.faults.broken.contains(&direction(one, two)) || net.faults.broken.contains(&direction(two, one))
        };
        for name in &names {
            for path in net.nodes[name].prober.stats() {
                let expected = if is_broken(name, &path.node.0) { SILENT } else { PathState::Up };
                let is_forwarding = !matches!(path.state, PathState::Down(Cause::NotForwarding));
                prop_assert!(path.state == expected || !is_forwarding, "{} {:?}", name, path);
            }
        }
    }

    /// No bytes make a prober panic, and none but an echo of the region is answered.
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300), peer in any::<bool>()) {
        let mut net = Net::regions(start(), 23, &[("a", 3), ("b", 3)]);
        let now = net.now;
        let prober = &mut net.node("a1").prober;
        let id = PeerId::new("node/b1".to_owned());
        prober.handle_packet(now, peer.then_some(&id), &bytes);
        prober.handle_datagram(now, SocketAddr::new([10, 4, 255, 253].into(), PORT), &bytes);
        prop_assert_eq!(prober.poll_transmit(), None);
    }
}
