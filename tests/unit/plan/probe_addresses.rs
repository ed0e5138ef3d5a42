//! The addresses to which the nodes of a region send echoes, one for each leader.

use super::*;

/// The probe address of each leader.
fn probes(mesh: &Mesh) -> BTreeMap<String, String> {
    let topology = mesh.topology();
    let leaders = topology.leaders().map(|(_, leader)| leader);
    leaders
        .map(|leader| {
            let probe = leader.probe_ip.map(|ip| ip.to_string());
            (
                leader.node.to_string(),
                probe.unwrap_or_else(|| "none".into()),
            )
        })
        .collect()
}

fn expect(mesh: &Mesh, expected: &[(&str, &str)]) {
    let expected = expected.iter();
    let expected = expected.map(|(name, ip)| ((*name).to_owned(), (*ip).to_owned()));
    assert_eq!(probes(mesh), expected.collect());
}

/// Region a with three nodes and region b with two, two leaders a region.
fn mesh() -> Mesh {
    let nodes = ["a1", "a2", "a3", "b1", "b2"].iter().zip(1..);
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

/// The same with pods of IPv6 alone.
fn ipv6_mesh() -> Mesh {
    let mut mesh = mesh();
    mesh.agreed.subnets = vec![net("fd04::/64")];
    for (node, seed) in mesh.snapshot.nodes.values_mut().zip(1..) {
        node.pod_cidrs = vec![net(&format!("fd42:0:0:{seed}::/64"))];
    }
    mesh
}

#[test]
fn leaders_have_the_highest_free_addresses_and_each_region_the_same_ones() {
    let mesh = mesh();
    let (first, second) = ("10.4.255.254", "10.4.255.253");
    expect(
        &mesh,
        &[("a1", first), ("a2", second), ("b1", first), ("b2", second)],
    );
}

#[test]
fn an_address_in_use_is_skipped() {
    let mut mesh = mesh();
    mesh.node("b1").wireguard_ips = vec![net("10.4.255.254/16")];
    // This one does not lead, and keeps its address.
    mesh.node("a3").wireguard_ips = vec![net("10.4.255.252/16")];
    let (first, second) = ("10.4.255.253", "10.4.255.251");
    expect(
        &mesh,
        &[("a1", first), ("a2", second), ("b1", first), ("b2", second)],
    );
}

#[test]
fn an_ipv6_cluster_has_ipv6_probe_addresses() {
    let first = "fd04::ffff:ffff:ffff:ffff";
    let second = "fd04::ffff:ffff:ffff:fffe";
    expect(
        &ipv6_mesh(),
        &[("a1", first), ("a2", second), ("b1", first), ("b2", second)],
    );
}

#[test]
fn with_both_families_the_probe_addresses_are_ipv4() {
    let mut mesh = mesh();
    mesh.agreed.subnets = vec![net("fd04::/64"), net("10.4.0.0/24")];
    for (node, seed) in mesh.snapshot.nodes.values_mut().zip(1..) {
        node.pod_cidrs.push(net(&format!("fd42:0:0:{seed}::/64")));
    }
    // A node without pods of IPv4.
    mesh.node("b1").pod_cidrs.remove(0);
    let (first, second) = ("10.4.0.254", "10.4.0.253");
    let of_b1 = "fd04::ffff:ffff:ffff:ffff";
    expect(
        &mesh,
        &[("a1", first), ("a2", second), ("b1", of_b1), ("b2", second)],
    );
}

#[test]
fn a_pool_without_room_gives_no_probe_address() {
    let mut mesh = mesh();
    // Six addresses, four leaders.
    mesh.agreed.subnets = vec![net("10.4.0.0/29")];
    let (first, second) = ("10.4.0.6", "10.4.0.5");
    expect(
        &mesh,
        &[("a1", first), ("a2", second), ("b1", first), ("b2", second)],
    );
    mesh.agreed.subnets = vec![net("10.4.0.0/30")];
    expect(
        &mesh,
        &[
            ("a1", "none"),
            ("a2", "none"),
            ("b1", "none"),
            ("b2", "none"),
        ],
    );
    // A pool of IPv4 has none for pods of IPv6.
    let mut mesh = ipv6_mesh();
    mesh.agreed.subnets = vec![net("10.4.0.0/16")];
    expect(
        &mesh,
        &[
            ("a1", "none"),
            ("a2", "none"),
            ("b1", "none"),
            ("b2", "none"),
        ],
    );
}

#[test]
fn beside_a_real_kilo_there_are_no_probe_addresses() {
    let mut mesh = mesh();
    mesh.now = 1_000;
    for node in mesh.snapshot.nodes.values_mut() {
        node.last_seen = Some(990);
    }
    mesh.node("b1").ours = false;
    expect(&mesh, &[("a1", "none"), ("b1", "none")]);
}

#[test]
fn an_only_leader_has_none() {
    let mut mesh = mesh();
    mesh.node("b2").ready = false;
    let (first, second) = ("10.4.255.254", "10.4.255.253");
    expect(&mesh, &[("a1", first), ("a2", second), ("b1", "none")]);
}
