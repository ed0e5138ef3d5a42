//! Agents in two regions with two leaders each, and the echoes between them: what fails is left by every node's own
//! evidence, while no API server says anything.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test prints what it measures, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use selvedge::state::{Route, State};
use selvedge::status::Report;

use super::world::{Place, World};
use crate::mesh::{self, net};

const NODES: [Place; 5] = [
    ("a1", "a", "192.168.50.11", 1),
    ("a2", "a", "192.168.50.12", 2),
    ("a3", "a", "192.168.50.13", 3),
    ("b1", "b", "192.168.60.11", 4),
    ("b2", "b", "192.168.60.12", 5),
];

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// At rest, with the API server away from then on.
fn at_rest() -> World {
    let mut world = World::new(&NODES, &[]);
    world.run(seconds(60));
    assert!(world.all_are_ready());
    world.api_is_up = false;
    world
}

fn state(world: &World, name: &str) -> State {
    world.agents[name].node.kernel.observe()
}

/// The gateways of a node's route to a network.
fn gateways(state: &State, dst: &str) -> BTreeSet<String> {
    let routes = state.routes.iter().filter(|(key, _)| key.dst == net(dst));
    routes
        .flat_map(|(_, route)| match route {
            Route::Unicast { next_hops, .. } => next_hops.clone(),
            Route::Unreachable | Route::Blackhole | Route::Throw => BTreeSet::new(),
        })
        .filter_map(|hop| Some(hop.via?.to_string()))
        .collect()
}

/// Whether a tunnel sends packets for a network to the leader with this key.
fn sends_to(state: &State, number: u8, dst: &str) -> bool {
    let mut peers = state.peers.values();
    peers.any(|peer| peer.public_key == mesh::key(number) && peer.routes.contains(&net(dst)))
}

/// Runs until `is_so`, at most `time`; returns how long it took.
fn until(world: &mut World, time: Duration, is_so: impl Fn(&World) -> bool) -> Duration {
    let begun: Instant = world.now;
    while !is_so(world) {
        assert!(world.now - begun < time, "not within {time:?}");
        world.run(Duration::from_millis(10));
    }
    world.now - begun
}

/// Whether every living node of both regions has left a1.
fn all_left_a1(world: &World) -> bool {
    let a3 = gateways(&state(world, "a3"), "10.42.4.0/24");
    let member = a3 == ["10.42.2.0".to_owned()].into();
    let far = ["b1", "b2"].iter().all(|name| {
        let state = state(world, name);
        // a1's own pods have another way in, if only that leader forwards for them.
        !sends_to(&state, 1, "10.42.3.0/24") && sends_to(&state, 2, "10.42.3.0/24")
    });
    member && far
}

fn path<'r>(report: &'r Report, name: &str) -> &'r selvedge::status::LeaderPath {
    report.paths.iter().find(|path| path.name == name).unwrap()
}

#[test]
fn at_rest_all_leaders_carry_traffic_and_every_path_is_shown() {
    let world = at_rest();
    let both: BTreeSet<_> = ["10.42.1.0", "10.42.2.0"].map(str::to_owned).into();
    assert_eq!(gateways(&state(&world, "a3"), "10.42.4.0/24"), both);
    for name in ["b1", "b2"] {
        let state = state(&world, name);
        assert!(sends_to(&state, 1, "10.42.3.0/24") && sends_to(&state, 2, "10.42.3.0/24"));
    }
    let report = world.report("a1");
    let paths: Vec<_> = report.paths.iter().map(|path| path.name.as_str()).collect();
    assert_eq!(paths, ["a2", "b1", "b2"]);
    assert!(report.paths.iter().all(|path| path.state == "up"));
    assert_eq!(world.report("a3").paths.len(), 2);
}

#[test]
fn a_dead_leader_is_left_by_all_within_two_seconds_without_the_api() {
    let mut world = at_rest();
    world.kill("a1");
    let took = until(&mut world, seconds(2), all_left_a1);
    println!("all nodes left the dead leader after {took:?}");

    let report = world.report("a3");
    assert_eq!(path(&report, "a1").state, "down");
    assert_eq!(path(&report, "a1").cause.as_deref(), Some("silent"));
    assert_eq!(report.failovers["silent"], 1);
    assert!(
        report.ready,
        "another node's death is no problem of this one"
    );
}

/// The MTU of a node's route to a network; `None` where it has none.
fn route_mtu(world: &World, name: &str, dst: &str) -> Option<u32> {
    let state = state(world, name);
    let mut routes = state.routes.iter().filter(|(key, _)| key.dst == net(dst));
    routes.find_map(|(_, route)| match route {
        Route::Unicast { mtu, .. } => *mtu,
        Route::Unreachable | Route::Blackhole | Route::Throw => None,
    })
}

/// Runs for so long with traffic on every path.
fn run_busy(world: &mut World, time: Duration) {
    let end = world.now + time;
    let mut sent = 0;
    while world.now < end {
        sent += 1_000_000;
        world.net.look(|_, _| sent);
        world.run(Duration::from_millis(250));
    }
}

#[test]
fn a_path_that_shrinks_lowers_the_leaders_routes_and_its_peer_within_seconds_without_the_api() {
    let mut world = at_rest();
    run_busy(&mut world, seconds(10));
    assert_eq!(route_mtu(&world, "b1", "10.42.3.0/24"), Some(1440));
    for (from, to) in [("a1", "b1"), ("b1", "a1")] {
        let direction = (from.to_owned(), to.to_owned());
        world.net.faults.mtus.insert(direction, 1240);
    }
    run_busy(&mut world, seconds(8));
    assert_eq!(route_mtu(&world, "a1", "10.42.5.0/24"), Some(1240));
    assert_eq!(route_mtu(&world, "a2", "10.42.5.0/24"), Some(1440));
    // A member has flannel's MTU, and learns the path's from its leader.
    assert_eq!(route_mtu(&world, "a3", "10.42.5.0/24"), None);
    let peers = state(&world, "a1").peers;
    let mtus: BTreeSet<_> = peers
        .values()
        .map(|peer| format!("{:?}", peer.mtu))
        .collect();
    let expected = ["Path(1240)", "Path(1440)"].map(str::to_owned);
    assert_eq!(mtus, expected.into());
    let report = world.report("a1");
    assert!(report.tunnel.measures_mtu);
    assert_eq!(path(&report, "b1").mtu, Some(1240));
    assert!(path(&report, "b1").mtu_confirmed && path(&report, "b1").mtu_since < Some(8));
    assert_eq!(path(&report, "b2").mtu, Some(1440));
    assert_eq!(path(&report, "a2").mtu, None);
}

#[test]
fn a_leader_that_does_not_forward_is_left_by_all_within_three_seconds_and_says_so() {
    for way_back in [true, false] {
        let mut world = at_rest();
        let faults = &mut world.net.faults;
        let broken = if way_back {
            &mut faults.no_way_back
        } else {
            &mut faults.no_way_in
        };
        broken.insert("a1".to_owned());
        let took = until(&mut world, seconds(3), all_left_a1);
        println!("all nodes left the leader that does not forward after {took:?}");
        assert_eq!(
            path(&world.report("b1"), "a1").cause.as_deref(),
            Some("not_forwarding")
        );
        let report = world.report("a1");
        assert!(!report.ready);
        let problems = report.problems.join("\n");
        assert!(
            problems.contains("does not forward for its region"),
            "{problems}"
        );

        world.net.faults = Default::default();
        world.run(seconds(10));
        assert!(!all_left_a1(&world));
        assert!(world.all_are_ready());
    }
}

#[test]
fn a_region_that_one_leader_does_not_reach_is_reached_through_the_other() {
    let mut world = at_rest();
    for far in ["b1", "b2"] {
        world
            .net
            .faults
            .broken
            .insert(("a1".to_owned(), far.to_owned()));
    }
    let only: BTreeSet<_> = ["10.42.2.0".to_owned()].into();
    until(&mut world, seconds(3), |world| {
        gateways(&state(world, "a3"), "10.42.4.0/24") == only
    });
    assert_eq!(path(&world.report("a3"), "a1").state, "up");
}

#[test]
fn a_leader_that_drains_is_left_by_all_at_once() {
    let mut world = at_rest();
    world.net.now = world.now;
    world.net.drain("a1");
    let took = until(&mut world, seconds(1), all_left_a1);
    assert!(took <= Duration::from_millis(50), "{took:?}");
}

#[test]
fn one_packet_in_ten_that_is_lost_changes_nothing_for_five_minutes() {
    let mut world = at_rest();
    let before: Vec<_> = NODES.iter().map(|place| state(&world, place.0)).collect();
    world.net.faults.loss = 100;
    let end = world.now + seconds(300);
    while world.now < end {
        world.run(seconds(1));
        let now: Vec<_> = NODES.iter().map(|place| state(&world, place.0)).collect();
        assert!(now == before, "{:?} before the end", end - world.now);
    }
    assert!(world.report("a1").failovers.is_empty());
}

#[test]
fn a_node_without_a_network_of_its_own_keeps_what_it_has() {
    let mut world = at_rest();
    let before = state(&world, "a3");
    for place in NODES.iter().filter(|place| place.0 != "a3") {
        world
            .net
            .faults
            .broken
            .insert((place.0.to_owned(), "a3".to_owned()));
    }
    world.run(seconds(10));
    assert_eq!(state(&world, "a3"), before);
    let report = world.report("a3");
    assert!(report.paths.iter().all(|path| path.state == "down"));
}
