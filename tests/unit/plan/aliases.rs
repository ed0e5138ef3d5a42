//! Aliases: two private regions on one network, and a public one.

use super::*;

/// Regions a and b on 192.168.1.0/24, each with a node .11 that leads, and c with a public node. Aliases are on.
fn overlapping() -> Mesh {
    let mut mesh = Mesh::new([
        node("a1", "a", 1, "192.168.1.11/24"),
        node("a2", "a", 2, "192.168.1.12/24"),
        node("b1", "b", 3, "192.168.1.11/24"),
        node("b2", "b", 4, "192.168.1.13/24"),
        node("c1", "c", 5, "203.0.113.10/24"),
    ]);
    mesh.agreed.alias_pools = vec![net("10.7.0.0/24")];
    mesh
}

fn overlaps(mesh: &Mesh) -> String {
    let topology = mesh.topology();
    let excluded = topology.excluded.iter().map(|text| format!("{text}\n"));
    let excluded = excluded.filter(|text| !text.contains("public address"));
    let overlaps = topology.overlaps.iter().map(|text| format!("{text}\n"));
    excluded.chain(overlaps).collect()
}

/// Each alias with its node and the node's address.
fn aliases(mesh: &Mesh) -> String {
    let topology = mesh.topology();
    let members = topology.segments.iter().flat_map(|segment| &segment.nodes);
    let lines = members.flat_map(|member| {
        let aliases = member.aliases.iter();
        aliases.map(|(alias, address)| format!("{}: {alias} for {address}\n", member.name))
    });
    lines.collect()
}

/// Writes what the agents publish.
fn publish(mesh: &mut Mesh) {
    let topology = mesh.topology();
    for node in mesh.snapshot.nodes.values_mut() {
        node.aliases = topology.alias_annotation(&node.name).unwrap_or_default();
    }
}

#[test]
fn nodes_of_two_regions_on_one_network_get_aliases() {
    let mesh = overlapping();
    insta::assert_snapshot!(aliases(&mesh), @"
    a1: 10.7.0.1 for 192.168.1.11
    a2: 10.7.0.2 for 192.168.1.12
    b1: 10.7.0.3 for 192.168.1.11
    b2: 10.7.0.4 for 192.168.1.13
    ");
    insta::assert_snapshot!(overlaps(&mesh), @"
    node a1: regions that use 192.168.1.0/24 reach it by its alias 10.7.0.1, since 192.168.1.11 is an address of their own
    node a2: regions that use 192.168.1.0/24 reach it by its alias 10.7.0.2, since 192.168.1.12 is an address of their own
    node b1: other regions reach it by its alias 10.7.0.3, since 192.168.1.11 is node a1's address too
    node b2: regions that use 192.168.1.0/24 reach it by its alias 10.7.0.4, since 192.168.1.13 is an address of their own
    ");
}

#[test]
fn without_the_flag_or_beside_kilo_there_are_none() {
    let mut mesh = overlapping();
    publish(&mut mesh);
    mesh.agreed.alias_pools.clear();
    assert_eq!(aliases(&mesh), "");
    let firewall = firewall(&mesh, "b1");
    assert!(firewall.region_aliases.is_empty() && firewall.alias_pools.is_empty());

    let mut mesh = overlapping();
    publish(&mut mesh);
    mesh.node("c1").ours = false;
    mesh.node("c1").last_seen = Some(mesh.now);
    assert_eq!(aliases(&mesh), "");
    assert_eq!(mesh.topology().alias_pools, []);
}

#[test]
fn other_regions_route_aliases_and_accept_them_as_sources() {
    let mesh = overlapping();
    insta::assert_snapshot!(routes(&mesh, "c1"), @"
    ip route replace table 5130 throw 10.42.5.0/24
    ip route replace table 5130 10.4.0.1 dev kilo0 src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.7.0.1 via 10.4.0.1 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.7.0.2 via 10.4.0.1 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.7.0.3 via 10.4.0.2 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.7.0.4 via 10.4.0.2 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.42.1.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.42.2.0/24 via 10.4.0.1 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 192.168.1.12 via 10.4.0.1 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5130 192.168.1.13 via 10.4.0.2 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ip route replace table 5131 192.168.1.11 via 10.4.0.1 dev kilo0 onlink src 10.42.5.0 mtu 1420
    ");
    // Region a has none of b's addresses, and all of b's aliases; its own are left to the nft table.
    let mut mesh = mesh;
    mesh.connected = [net("192.168.1.0/24")].into();
    insta::assert_snapshot!(routes(&mesh, "a1"), @"
    ip route replace table 5130 throw 10.7.0.1
    ip route replace table 5130 throw 10.7.0.2
    ip route replace table 5130 throw 10.42.1.0/24
    ip route replace table 5130 throw 10.42.2.0/24
    ip route replace table 5130 10.4.0.2 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.4.0.3 dev kilo0 src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.7.0.3 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.7.0.4 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.3.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.4.0/24 via 10.4.0.2 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5130 10.42.5.0/24 via 10.4.0.3 dev kilo0 onlink src 10.42.1.0 mtu 1420
    ip route replace table 5132 192.168.1.12 via 10.42.2.0 dev flannel.1 onlink
    ");
    let state = mesh.state("a1");
    let accepts = &peer_with(&state, key(3)).accepts;
    for alias in ["10.7.0.3/32", "10.7.0.4/32"] {
        assert!(accepts.contains(&net(alias)), "{alias}");
    }
    assert!(!accepts.contains(&net("192.168.1.13/32")));
}

#[test]
fn a_follower_routes_remote_aliases_to_its_leader_and_refuses_unknown_ones() {
    let mesh = overlapping();
    let lines = mesh.commands_of("b2", ROUTES);
    let about = lines.lines().filter(|line| line.contains(" 10.7."));
    let about = about.map(|line| format!("{line}\n")).collect::<String>();
    insta::assert_snapshot!(about, @"
    ip route replace table 5130 throw 10.7.0.3 proto 118
    ip route replace table 5130 throw 10.7.0.4 proto 118
    ip route replace table 5130 unreachable 10.7.0.0/24 metric 4278198272 proto 118
    ip route replace table 5130 10.7.0.1 via 10.42.3.0 dev flannel.1 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.7.0.1 metric 4278198272 proto 118
    ip route replace table 5130 10.7.0.2 via 10.42.3.0 dev flannel.1 onlink src 10.42.4.0 mtu 1420 proto 118
    ip route replace table 5130 unreachable 10.7.0.2 metric 4278198272 proto 118
    ");
}

#[test]
fn a_region_serves_the_addresses_behind_its_aliases() {
    let mesh = overlapping();
    // b1's own address is a1's elsewhere. Its leaders forward to it, and its nodes translate its alias themselves.
    let firewall = firewall(&mesh, "b2");
    assert!(firewall.region_nodes.contains(&net("192.168.1.11/32")));
    let pairs = firewall.region_aliases.iter();
    let pairs = pairs.map(|(alias, address)| format!("{alias} {address}"));
    assert_eq!(
        pairs.collect::<Vec<_>>(),
        ["10.7.0.3 192.168.1.11", "10.7.0.4 192.168.1.13"]
    );
    let translated = mesh.topology().aliases_at(&NodeName("b1".into()));
    assert_eq!(translated, firewall.region_aliases);
    // The guard covers the pool, except for what this node translates.
    assert!(firewall.guard.wide.contains(&net("10.7.0.0/24")));
    assert!(firewall.guard.near.contains(&net("10.7.0.3/32")));
}

#[test]
fn a_leader_forwards_to_a_follower_whose_address_is_not_carried() {
    let mut mesh = overlapping();
    mesh.node("b2").created = 0;
    mesh.node("b2").leader = true;
    let lines = routes(&mesh, "b2");
    assert!(lines.contains("table 5132 192.168.1.11 via 10.42.3.0 dev flannel.1"));
}

#[test]
fn an_alias_stays_when_nodes_come_and_the_overlap_ends() {
    let mut mesh = overlapping();
    publish(&mut mesh);
    mesh.snapshot.nodes.remove(&NodeName("a1".into()));
    mesh.snapshot.nodes.remove(&NodeName("a2".into()));
    let newcomer = node("a0", "a", 9, "192.168.1.99/24");
    let name = newcomer.name.clone();
    mesh.snapshot.nodes.insert(name, newcomer);
    insta::assert_snapshot!(aliases(&mesh), @"
    a0: 10.7.0.1 for 192.168.1.99
    b1: 10.7.0.3 for 192.168.1.11
    b2: 10.7.0.4 for 192.168.1.13
    ");
    // Nothing overlaps any more.
    mesh.snapshot.nodes.remove(&NodeName("a0".into()));
    insta::assert_snapshot!(aliases(&mesh), @"
    b1: 10.7.0.3 for 192.168.1.11
    b2: 10.7.0.4 for 192.168.1.13
    ");
    assert_eq!(overlaps(&mesh), "");
}

#[test]
fn a_newcomer_takes_no_alias_that_is_recorded() {
    let mut mesh = overlapping();
    publish(&mut mesh);
    let alias = ip("10.7.0.3");
    let recorded = [(selvedge::topology::Claim::Address(alias), 100)];
    mesh.node("b1").ledger = selvedge::topology::Ledger::new(recorded);
    // Its Node is older, and it claims the same alias now.
    mesh.node("a1").aliases = vec![alias];
    insta::assert_snapshot!(aliases(&mesh), @"
    a1: 10.7.0.1 for 192.168.1.11
    a2: 10.7.0.2 for 192.168.1.12
    b1: 10.7.0.3 for 192.168.1.11
    b2: 10.7.0.4 for 192.168.1.13
    ");
    assert!(overlaps(&mesh).contains("left out alias 10.7.0.3: claimed by node b1 before"));
}

#[test]
fn a_full_pool_and_an_alias_outside_of_it_are_reported() {
    let mut mesh = overlapping();
    mesh.agreed.alias_pools = vec![net("10.7.0.0/30")];
    mesh.node("a2").aliases = vec![ip("10.8.0.1")];
    insta::assert_snapshot!(aliases(&mesh), @"
    a1: 10.7.0.1 for 192.168.1.11
    a2: 10.7.0.2 for 192.168.1.12
    ");
    insta::assert_snapshot!(overlaps(&mesh), @"
    node a2: left out alias 10.8.0.1: not an address for a host inside of --alias-cidr
    node b1: left out node address 192.168.1.11: other regions need an alias for it, and none is left in --alias-cidr; choose a larger pool
    node b2: left out node address 192.168.1.13: other regions need an alias for it, and none is left in --alias-cidr; choose a larger pool
    node a1: regions that use 192.168.1.0/24 reach it by its alias 10.7.0.1, since 192.168.1.11 is an address of their own
    node a2: regions that use 192.168.1.0/24 reach it by its alias 10.7.0.2, since 192.168.1.12 is an address of their own
    node b1: other regions cannot reach it by 192.168.1.11, which is node a1's address too; 10.42.3.0 reaches it from everywhere
    node b2: regions that use 192.168.1.0/24 cannot reach it by 192.168.1.13, an address of their own; 10.42.4.0 reaches it from everywhere
    ");
}

#[test]
fn an_operator_may_give_an_alias_to_any_node() {
    let mut mesh = Mesh::new([
        node("a1", "a", 1, "192.168.1.11/24"),
        node("b1", "b", 2, "192.168.2.11/24"),
    ]);
    mesh.agreed.alias_pools = vec![net("10.7.0.0/24")];
    assert_eq!(aliases(&mesh), "");
    mesh.node("b1").aliases = vec![ip("10.7.0.9")];
    assert_eq!(aliases(&mesh), "b1: 10.7.0.9 for 192.168.2.11\n");
}

#[test]
fn aliases_of_ipv6_need_a_pool_and_pods_of_ipv6() {
    let mut mesh = overlapping();
    mesh.agreed.alias_pools.push(net("fd07::/64"));
    for (name, seed) in [("a1", 1), ("b1", 3)] {
        let node = mesh.node(name);
        node.internal_ips.push(ip("fd01::11"));
        node.pod_cidrs.push(net(&format!("fd42:0:0:{seed}::/64")));
    }
    mesh.node("b2").internal_ips.push(ip("fd01::11"));
    let v6 = aliases(&mesh);
    let v6 = v6.lines().filter(|line| line.contains("fd07"));
    assert_eq!(
        v6.collect::<Vec<_>>(),
        ["a1: fd07::1 for fd01::11", "b1: fd07::2 for fd01::11"]
    );
}

#[test]
fn a_node_that_is_connected_to_the_pool_leaves_it_alone() {
    let mut mesh = overlapping();
    mesh.connected = [net("10.0.0.0/8")].into();
    assert!(!routes(&mesh, "b1").contains("10.7.0"));
    assert!(firewall(&mesh, "b1").region_aliases.is_empty());
}
