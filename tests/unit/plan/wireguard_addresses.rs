//! WireGuard addresses from the pool, which nodes keep.

use super::*;

fn addresses(mesh: &Mesh) -> BTreeMap<String, String> {
    let topology = mesh.topology();
    let leaders = topology.leaders().map(|(_, leader)| leader);
    leaders
        .map(|leader| (leader.node.to_string(), leader.wireguard_ips[0].to_string()))
        .collect()
}

fn regions(names: &[&str]) -> Mesh {
    let nodes = names.iter().enumerate().map(|(index, name)| {
        let seed = u8::try_from(index).unwrap() + 1;
        node(name, name, seed, &format!("192.168.{seed}.1/24"))
    });
    Mesh::new(nodes)
}

#[test]
fn a_new_mesh_has_kilos_wireguard_addresses() {
    let mesh = regions(&["d", "b", "a", "c"]);
    let expected = [
        ("a", "10.4.0.1"),
        ("b", "10.4.0.2"),
        ("c", "10.4.0.3"),
        ("d", "10.4.0.4"),
    ];
    assert_eq!(
        addresses(&mesh),
        expected.map(|(n, a)| (n.to_owned(), a.to_owned())).into()
    );
}

#[test]
fn the_addresses_of_a_new_mesh_do_not_depend_on_the_order_of_the_agents() {
    let complete = addresses(&regions(&["a", "b", "c"]));
    for first in ["a", "b", "c"] {
        let mut mesh = regions(&["a", "b", "c"]);
        for other in ["a", "b", "c"].into_iter().filter(|name| *name != first) {
            let node = mesh.node(other);
            // Before its agent started. The kubelet sets the status.
            (node.public_key, node.private_ip) = (None, None);
        }
        assert_eq!(addresses(&mesh).get(first), complete.get(first));
    }
}

#[test]
fn a_requested_address_is_kept_for_a_node_whose_agent_starts_later() {
    let mut mesh = regions(&["a", "b"]);
    mesh.node("b").wireguard_ips = vec![net("10.4.0.1/16")];
    mesh.node("b").public_key = None;
    assert_eq!(addresses(&mesh)["a"], "10.4.0.2");
}

#[test]
fn a_node_that_joins_or_leaves_renumbers_no_other() {
    let mut mesh = regions(&["b", "d"]);
    mesh.node("b").wireguard_ips = vec![net("10.4.0.1/16")];
    mesh.node("d").wireguard_ips = vec![net("10.4.0.2/16")];
    let newcomers = [
        node("a", "a", 8, "192.168.8.1/24"),
        node("c", "c", 9, "192.168.9.1/24"),
    ];
    let newcomers = newcomers.map(|node| (node.name.clone(), node));
    mesh.snapshot.nodes.extend(newcomers);
    mesh.snapshot.nodes.remove(&NodeName("b".into()));

    let expected = [("a", "10.4.0.1"), ("c", "10.4.0.3"), ("d", "10.4.0.2")];
    assert_eq!(
        addresses(&mesh),
        expected.map(|(n, a)| (n.to_owned(), a.to_owned())).into()
    );
}

/// Two regions of two nodes, with two leaders each.
fn pairs() -> Mesh {
    let nodes = ["a1", "a2", "b1", "b2"].iter().zip(1..);
    let nodes = nodes.map(|(name, seed)| {
        let subnet = name.as_bytes()[0] - b'a';
        node(
            name,
            &name[..1],
            seed,
            &format!("192.168.{subnet}.{seed}/24"),
        )
    });
    let mut mesh = Mesh::new(nodes);
    mesh.agreed.leaders_per_region = leaders(2);
    mesh
}

#[test]
fn the_primaries_of_a_new_mesh_have_kilos_addresses_and_the_second_leaders_those_behind_them() {
    let expected = [
        ("a1", "10.4.0.1"),
        ("a2", "10.4.0.3"),
        ("b1", "10.4.0.2"),
        ("b2", "10.4.0.4"),
    ];
    let complete = addresses(&pairs());
    assert_eq!(
        complete,
        expected.map(|(n, a)| (n.to_owned(), a.to_owned())).into()
    );

    // The agents of the others start later.
    for first in [&["a1"][..], &["b1"], &["a1", "b1"], &["b1", "b2"]] {
        let mut mesh = pairs();
        let others = ["a1", "a2", "b1", "b2"].into_iter();
        for other in others.filter(|name| !first.contains(name)) {
            let node = mesh.node(other);
            (node.public_key, node.private_ip) = (None, None);
        }
        for (name, ip) in addresses(&mesh) {
            assert_eq!(complete[&name], ip, "{name} after {first:?}");
        }
    }
}

#[test]
fn a_second_leader_renumbers_no_other() {
    let mut mesh = pairs();
    mesh.agreed.leaders_per_region = leaders(1);
    let before = addresses(&mesh);
    for (name, ip) in &before {
        mesh.node(name).wireguard_ips = vec![net(&format!("{ip}/16"))];
    }
    for count in [2, 3, 8] {
        mesh.agreed.leaders_per_region = leaders(count);
        let mut after = addresses(&mesh);
        assert_eq!(after.len(), 4);
        after.retain(|name, _| before.contains_key(name));
        assert_eq!(after, before);
    }
}

#[test]
fn of_two_equal_requests_the_older_nodes_is_granted() {
    let mut mesh = regions(&["b", "a"]);
    for name in ["a", "b"] {
        mesh.node(name).wireguard_ips = vec![net("10.4.0.7/16")];
    }
    let expected = [("a", "10.4.0.1"), ("b", "10.4.0.7")];
    assert_eq!(
        addresses(&mesh),
        expected.map(|(n, a)| (n.to_owned(), a.to_owned())).into()
    );
    let excluded = mesh.topology().excluded;
    let sentences = excluded.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        sentences,
        ["node a: left out WireGuard address 10.4.0.7: claimed by node b before"]
    );
}

#[test]
fn addresses_that_no_host_can_have_are_not_granted() {
    for wish in ["10.5.0.1/16", "10.4.0.0/16", "10.4.255.255/16"] {
        let mut mesh = regions(&["a"]);
        mesh.node("a").wireguard_ips = vec![net(wish)];
        assert_eq!(addresses(&mesh)["a"], "10.4.0.1", "{wish}");
        assert_eq!(mesh.topology().excluded.len(), 1, "{wish}");
    }
}

#[test]
fn a_leader_works_without_a_wireguard_address() {
    let mut mesh = regions(&["a", "b", "c"]);
    mesh.agreed.subnets = vec![net("10.4.0.0/30")];

    let topology = mesh.topology();
    assert!(topology.segments[2].primary().wireguard_ips.is_empty());
    insta::assert_snapshot!(topology.excluded[0], @"node c: left out WireGuard address 10.4.0.0: no address is left in --subnet; choose a larger one");
    insta::assert_snapshot!(routes(&mesh, "a"), @"
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5131 192.168.2.1 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5131 192.168.3.1 dev kilo0 src 10.42.1.0 mtu 1420
    ");
}
