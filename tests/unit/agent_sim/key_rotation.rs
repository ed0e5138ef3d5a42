//! Nodes that replace their keys, with whole controllers: `a1` and `a2` are one region, `b1` is another.

use std::time::Duration;

use selvedge::agent::key_rotation::OwnKeys;
use selvedge::topology::OtherKeys;
use selvedge::wireguard::PeerId;
use selvedge::wireguard::key::PublicKey;
use serde_json::json;

use super::world::{Place, World};
use crate::mesh;

const NODES: [Place; 3] = [
    ("a1", "a", "192.168.50.11", 1),
    ("a2", "a", "192.168.50.12", 2),
    ("b1", "b", "192.168.60.11", 3),
];

fn world() -> World {
    let mut world = World::new(&NODES, &["--leaders-per-region=1", "--key-overlap=10m"]);
    world.run(seconds(60));
    assert!(world.all_are_ready());
    world
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn annotation(world: &World, node: &str, key: &str) -> Option<String> {
    let value = &world.objects[node]["metadata"]["annotations"][key];
    value.as_str().map(str::to_owned)
}

/// The keys under which a node's tunnel knows another one, the current one first.
fn known(world: &World, node: &str, of: &str) -> Vec<PublicKey> {
    let peers = world.agents[node].node.kernel.observe().peers;
    let peer = &peers[&PeerId::new(format!("node/{of}"))];
    let also = peer.also_keys.iter().copied();
    std::iter::once(peer.public_key).chain(also).collect()
}

#[test]
fn all_nodes_replace_their_keys_and_no_tunnel_ever_lacks_one_that_works() {
    let mut world = world();
    for (name, ..) in NODES {
        world.rotate_key(name);
    }
    let mut overlapped = false;
    for _ in 0..600 {
        world.run(Duration::from_millis(150));
        for (node, far) in [("a1", "b1"), ("b1", "a1")] {
            let OwnKeys {
                current, others, ..
            } = world.agents[far].keys;
            let known = known(&world, node, far);
            assert!(
                known.contains(&current) || others.iter().any(|key| known.contains(&key)),
                "{node} knows {known:?} of {far}"
            );
            overlapped |= known.len() == 2;
            let key = annotation(&world, far, "kilo.squat.ai/key").unwrap();
            let mut own = std::iter::once(current).chain(others.iter());
            assert!(
                own.any(|own| own.to_string() == key),
                "Kilo's annotation holds a key that works"
            );
        }
    }
    assert!(overlapped);
    for (name, .., number) in NODES {
        let keys = world.agents[name].keys;
        assert_eq!(keys.current, mesh::key(number + 100), "{name}");
        assert_eq!(keys.others, OtherKeys::default(), "{name}");
        for other in ["selvedge.dev/next-key", "selvedge.dev/previous-key"] {
            assert_eq!(annotation(&world, name, other), None, "{name}");
        }
        assert!(
            world.report(name).ready,
            "{:?}",
            world.report(name).problems
        );
    }
    assert_eq!(known(&world, "a1", "b1"), [mesh::key(103)]);
    assert_eq!(world.leaders(), ["a1".to_owned(), "b1".to_owned()].into());
}

#[test]
fn another_node_takes_neither_the_next_nor_the_old_key_of_a_leader() {
    for when in [3, 22] {
        let mut world = world();
        world.rotate_key("a1");
        world.run(seconds(when));
        let keys = world.agents["a1"].keys;
        let others: Vec<_> = keys.others.iter().collect();
        assert_eq!(others.len(), 1, "after {when} s");
        // b1's agent is hostile and names both of them.
        let annotations = &mut world.objects.get_mut("b1").unwrap()["metadata"]["annotations"];
        annotations["selvedge.dev/next-key"] = json!(keys.current.to_string());
        annotations["selvedge.dev/previous-key"] = json!(others[0].to_string());
        world.kill("b1");
        world.touch();
        world.run(seconds(1));
        let leaders = world.agents["a2"].shown.leaders();
        for (_, leader) in leaders {
            let expected = match leader.node.0.as_str() {
                "a1" => vec![keys.current, others[0]],
                _ => vec![mesh::key(3)],
            };
            assert_eq!(leader.keys, expected, "{}", leader.node);
        }
    }
}

#[test]
fn the_replacement_waits_while_the_api_server_is_away_and_goes_on_then() {
    let mut world = world();
    world.rotate_key("a1");
    world.run(seconds(3));
    world.api_is_up = false;
    // A leader that is away holds up the end, not the rest.
    world.kill("b1");
    world.run(seconds(30));
    let keys = world.agents["a1"].keys;
    assert!(keys.others != OtherKeys::default());
    world.api_is_up = true;
    world.run(seconds(330));
    let keys = world.agents["a1"].keys;
    assert_eq!(keys.current, mesh::key(101));
    assert_eq!(keys.others.previous, Some(mesh::key(1)));
    let report = world.report("a1");
    assert_eq!(report.tunnel.previous_key, Some(mesh::key(1).to_string()));
    assert_eq!(report.tunnel.key_awaits, Some(1));
    // After the longest overlap it is over.
    world.run(seconds(600));
    assert_eq!(world.agents["a1"].keys.others, OtherKeys::default());
}
