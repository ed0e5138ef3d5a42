//! Three agents in two regions with one leader each: `a1` and `a2` are one region, `b1` is another.

use std::time::Duration;

use selvedge::diff::{Change, KernelChange};
use selvedge::status::Role;
use selvedge::wireguard::PeerConfig;

use super::world::{Place, World};
use crate::mesh::{self, net};

const NODES: [Place; 3] = [
    ("a1", "a", "192.168.50.11", 1),
    ("a2", "a", "192.168.50.12", 2),
    ("b1", "b", "192.168.60.11", 3),
];

fn world() -> World {
    World::new(&NODES, &["--leaders-per-region=1"])
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn three_agents_come_to_one_mesh_and_rest() {
    let mut world = world();
    world.run(seconds(8));

    let reports: Vec<_> = NODES
        .iter()
        .map(|node| world.report(node.0).problems)
        .collect();
    assert!(world.all_are_ready(), "{reports:?}");
    assert_eq!(world.leaders(), ["a1".to_owned(), "b1".to_owned()].into());
    assert_eq!(world.report("a1").role, Role::Leader);
    assert_eq!(world.report("a2").role, Role::Follower);
    for (name, remote) in [
        ("a1", "10.42.3.0/24"),
        ("a2", "10.42.3.0/24"),
        ("b1", "10.42.2.0/24"),
    ] {
        assert!(
            world.has_route(name, remote),
            "{name} has no route to {remote}"
        );
    }

    // At rest nothing is written and nothing is changed.
    let (objects, attempts) = (
        world.objects.clone(),
        world.agents["a1"].node.attempts.borrow().clone(),
    );
    world.run(seconds(20));
    assert_eq!(*world.agents["a1"].node.attempts.borrow(), attempts);
    // But for the lead, which is recorded after half a minute.
    world.run(seconds(40));
    assert_ne!(world.objects["a1"], objects["a1"]);
    assert_eq!(world.objects["a2"], objects["a2"]);
}

#[test]
fn another_leader_is_followed_by_all_within_a_second() {
    let mut world = world();
    world.run(seconds(60));
    assert!(world.leaders().contains("a1"));

    world.set_ready("a1", false);
    world.run(seconds(1));

    assert_eq!(world.leaders(), ["a2".to_owned(), "b1".to_owned()].into());
    let peers = |world: &World| world.agents["b1"].node.kernel.observe().peers;
    let keys = |peers: &mut dyn Iterator<Item = &PeerConfig>| {
        peers.map(|peer| peer.public_key).collect::<Vec<_>>()
    };
    let peers_now = peers(&world);
    let mut with_routes = peers_now.values().filter(|peer| !peer.routes.is_empty());
    assert_eq!(keys(&mut with_routes), [mesh::key(2)]);
    assert_eq!(
        peers_now.len(),
        2,
        "what the former leader still sends is accepted"
    );
    world.run(seconds(5));
    assert_eq!(keys(&mut peers(&world).values()), [mesh::key(2)]);
    assert_eq!(world.report("b1").role, Role::Leader);
    assert!(
        world.report("b1").ready,
        "{:?}",
        world.report("b1").problems
    );
}

#[test]
fn an_outage_of_the_api_holds_up_no_repair_and_changes_nothing() {
    let mut world = world();
    world.run(seconds(10));
    let before = world.agents["b1"].node.kernel.observe();

    world.api_is_up = false;
    world.run(seconds(120));
    assert_eq!(world.agents["b1"].node.kernel.observe(), before);

    let now = world.now;
    let b1 = world.agents.get_mut("b1").unwrap();
    let route = *before.routes.keys().next().unwrap();
    b1.node
        .kernel
        .apply(&Change::Kernel(KernelChange::DeleteRoute(route)))
        .unwrap();
    b1.controller.handle_trigger(now);
    world.run(Duration::from_millis(100));
    assert_eq!(world.agents["b1"].node.kernel.observe(), before);

    world.api_is_up = true;
    world.set_ready("a1", false);
    world.run(seconds(2));
    assert!(world.leaders().contains("a2"));
}

#[test]
fn a_change_that_fails_is_tried_again_alone() {
    let mut world = world();
    world.run(seconds(10));
    let b1 = world.agents.get_mut("b1").unwrap();
    let routes = b1.node.kernel.observe().routes;
    let bad = *routes
        .keys()
        .find(|key| key.dst == net("10.42.1.0/24"))
        .unwrap();
    let good = *routes
        .keys()
        .find(|key| key.dst == net("10.42.2.0/24"))
        .unwrap();
    for key in [bad, good] {
        b1.node
            .kernel
            .apply(&Change::Kernel(KernelChange::DeleteRoute(key)))
            .unwrap();
    }
    b1.node.refused = Some(bad);
    b1.node.attempts.borrow_mut().clear();
    let now = world.now;
    world
        .agents
        .get_mut("b1")
        .unwrap()
        .controller
        .handle_trigger(now);

    world.run(seconds(20));

    let b1 = &world.agents["b1"];
    let state = b1.node.kernel.observe();
    assert!(state.routes.contains_key(&good) && !state.routes.contains_key(&bad));
    let attempts = b1.node.attempts.borrow().clone();
    let of_good = attempts
        .iter()
        .filter(|(change, _)| change.contains("10.42.2.0/24"));
    assert_eq!(of_good.map(|(_, count)| *count).collect::<Vec<_>>(), [1]);
    let of_bad: Vec<_> = attempts.values().filter(|count| **count > 1).collect();
    // 0.1, 0.2, 0.4, 0.8, 1.6, 3.2 and then every 5 seconds.
    assert_eq!(of_bad.len(), 1, "{attempts:?}");
    assert!((7..=12).contains(of_bad[0]), "{attempts:?}");
    let report = world.report("b1");
    assert!(
        report
            .problems
            .iter()
            .any(|problem| problem.contains("10.42.1.0/24"))
    );

    world.agents.get_mut("b1").unwrap().node.refused = None;
    world.run(seconds(6));
    assert!(
        world.agents["b1"]
            .node
            .kernel
            .observe()
            .routes
            .contains_key(&bad)
    );
    assert!(
        world.report("b1").ready,
        "{:?}",
        world.report("b1").problems
    );
}
