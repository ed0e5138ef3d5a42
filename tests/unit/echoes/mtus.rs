//! The MTUs of paths, measured by the probers of whole meshes.

use std::collections::BTreeSet;

use super::*;

/// Runs for so long, with traffic on every path where `busy`.
fn run(net: &mut Net, time: Duration, busy: bool) {
    let mut sent = 0;
    let end = net.now + time;
    while net.now < end {
        sent += if busy { 1_000_000 } else { 0 };
        net.look(|_, _| sent);
        net.run(millis(250));
    }
}

fn peer(node: &str) -> PeerId {
    PeerId::new(format!("node/{node}"))
}

fn mtu(net: &Net, name: &str, leader: &str) -> u32 {
    news(net, name).mtus[&peer(leader)]
}

fn narrow(net: &mut Net, from: &str, to: &str, mtu: u32) {
    let direction = (from.to_owned(), to.to_owned());
    net.faults.mtus.insert(direction, mtu);
}

fn measured(seed: u64) -> Net {
    let mut net = Net::regions(start(), seed, &[("a", 4), ("b", 4), ("c", 1)]);
    net.measure(1500);
    run(&mut net, seconds(10), true);
    net
}

/// Padded echoes that a node sent.
fn padded(net: &Net, name: &str) -> usize {
    let sent = net.nodes[name].sent.iter();
    sent.filter(|(_, transmit)| matches!(transmit, Transmit::Padded(..)))
        .count()
}

#[test]
fn each_direction_of_each_path_has_its_own_mtu() {
    let mut net = Net::regions(start(), 31, &[("a", 4), ("b", 4), ("c", 1)]);
    narrow(&mut net, "a1", "b1", 1240);
    narrow(&mut net, "b1", "a1", 1340);
    net.measure(1500);
    run(&mut net, seconds(10), true);
    assert_eq!(mtu(&net, "a1", "b1"), 1240);
    assert_eq!(mtu(&net, "b1", "a1"), 1340);
    for (from, to) in [("a1", "b2"), ("a2", "b1"), ("a1", "c1"), ("c1", "a1")] {
        assert_eq!(mtu(&net, from, to), 1440, "{from} to {to}");
    }
    let stats = net.nodes["a1"].prober.stats();
    let shown = stats.iter().filter_map(|path| path.mtu);
    let shown = shown.map(|mtu| (mtu.bytes, mtu.is_confirmed));
    assert_eq!(
        shown.collect::<BTreeSet<_>>(),
        [(1240, true), (1440, true)].into()
    );
}

#[test]
fn a_path_that_shrinks_is_lowered_within_two_seconds_and_no_verdict_changes() {
    for seed in 0..10 {
        let mut net = measured(40 + seed);
        run(&mut net, millis(250 * seed), true);
        narrow(&mut net, "a1", "b1", 1240);
        run(&mut net, seconds(2), true);
        assert!(mtu(&net, "a1", "b1") <= 1240, "seed {seed}");
        run(&mut net, seconds(6), true);
        assert_eq!(mtu(&net, "a1", "b1"), 1240, "seed {seed}");
        assert_eq!(to(&net, "a1", "b1"), PathState::Up);
        assert_eq!(mtu(&net, "a2", "b1"), 1440);
    }
}

#[test]
fn one_packet_in_ten_that_is_lost_lowers_no_path_of_a_mesh_for_ten_minutes() {
    let mut net = measured(50);
    net.faults.loss = 100;
    run(&mut net, seconds(60), true);
    net.nodes.values_mut().for_each(|node| node.news.clear());
    run(&mut net, seconds(600), true);
    for (name, node) in &net.nodes {
        for (_, news) in &node.news {
            let lower = news.mtus.iter().find(|(_, mtu)| **mtu < 1420);
            assert_eq!(lower, None, "{name}");
        }
    }
}

#[test]
fn a_leader_that_dies_lowers_no_path_and_gets_no_padded_echoes() {
    let mut net = measured(51);
    net.faults.dead.insert("b1".into());
    run(&mut net, seconds(3), true);
    assert_eq!(to(&net, "a1", "b1"), SILENT);
    net.node("a1").sent.clear();
    run(&mut net, seconds(30), true);
    assert_eq!(mtu(&net, "a1", "b1"), 1440);
    let sent = net.nodes["a1"].sent.iter();
    let to_dead = sent
        .filter(|(_, transmit)| matches!(transmit, Transmit::Padded(id, ..) if *id == peer("b1")));
    assert_eq!(to_dead.count(), 0);
}

#[test]
fn without_a_range_of_sizes_or_a_way_nothing_is_measured() {
    let mut net = three_regions(52);
    run(&mut net, seconds(5), true);
    assert_eq!(padded(&net, "a1"), 0);
    assert_eq!(news(&net, "a1").mtus, BTreeMap::new());
}

#[test]
fn padded_echoes_keep_their_budget_in_small_and_large_meshes() {
    let fifty: Vec<String> = (0..50).map(|number| format!("r{number:02}-")).collect();
    let large: Vec<(&str, usize)> = fifty.iter().map(|name| (name.as_str(), 2)).collect();
    println!("| paths | padded echoes/s at the start | with traffic | without | all right after |");
    println!("|---|---|---|---|---|");
    for (sizes, name) in [(vec![("a", 5), ("b", 5)], "a1"), (large, "r00-1")] {
        let mut net = Net::some_regions(start(), 53, &sizes, 1);
        net.measure(1500);
        let begun = net.now;
        let is_right = |net: &Net| news(net, name).mtus.values().all(|mtu| *mtu == 1440);
        run(&mut net, seconds(5), true);
        while !is_right(&net) {
            run(&mut net, seconds(1), true);
            assert!(net.now - begun < seconds(60), "not all are right");
        }
        let took = net.now - begun;
        let first = padded(&net, name) as f64 / took.as_secs_f64();
        let mut rate = |busy| {
            run(&mut net, seconds(4), busy);
            net.node(name).sent.clear();
            run(&mut net, seconds(15), busy);
            padded(&net, name) as f64 / 15.0
        };
        let (busy, idle) = (rate(true), rate(false));
        let paths = net.nodes[name].prober.stats().len();
        println!("| {paths} | {first:.1} | {busy:.1} | {idle:.1} | {took:.0?} |");
        assert!(first <= 52.0 && busy <= 41.0 && idle <= 41.0);
    }
}
