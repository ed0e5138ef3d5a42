//! Whom a node sends echoes to, and whose it answers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use selvedge::policy::Relaying;
use selvedge::probe::{Targets, targets};
use selvedge::topology::{Mode, Topology};

use super::*;
use crate::mesh::{Mesh, ip, leaders};

/// Region nd has three nodes, of which two lead; node-master is alone in its region.
fn main_scenario() -> (Mesh, Topology) {
    let text = include_str!("../../testdata/two-regions.yaml");
    let mut mesh = Mesh::from_yaml(text).unwrap();
    mesh.agreed.leaders_per_region = leaders(2);
    let topology = mesh.topology();
    (mesh, topology)
}

fn of(mesh: &Mesh, topology: &Topology, name: &str) -> Targets {
    let name = NodeName(name.into());
    let flannel = mesh.flannel(&name);
    targets(topology, &name, Some(&flannel), true, None, &Relaying::Auto)
}

#[test]
fn a_member_sends_echoes_through_each_leader_of_its_region() {
    let (mesh, topology) = main_scenario();
    let found = of(&mesh, &topology, "node-agent-03");
    assert_eq!(found.own, Some(ip("10.42.3.0")));
    let leaders: Vec<_> = found.leaders.values().copied().collect();
    assert_eq!(leaders, [ip("10.4.255.254"), ip("10.4.255.253")]);
    assert_eq!(found.lead, None);
    assert_eq!(found.segments.len(), 1);
    assert!(found.diverted().is_empty());
}

#[test]
fn a_leader_answers_the_nodes_of_its_region_and_sends_echoes_to_leaders_elsewhere() {
    let (mesh, topology) = main_scenario();
    let found = of(&mesh, &topology, "node-agent-01");
    let lead = found.lead.as_ref().unwrap();
    let members: Vec<_> = lead.members.keys().copied().collect();
    assert_eq!(members, [ip("10.42.2.0"), ip("10.42.3.0")]);
    let peers: Vec<_> = lead.peers.values().map(|far| far.node.0.as_str()).collect();
    assert_eq!(peers, ["node-master"]);
    assert_eq!(found.leaders.len(), 1);
    let own = topology.leader(&NodeName("node-agent-01".into())).unwrap();
    let diverted = [own.probe_ip.unwrap(), own.wireguard_ips[0]];
    assert_eq!(found.diverted(), diverted.into());

    let far = of(&mesh, &topology, "node-master").lead.unwrap();
    assert_eq!(far.peers.len(), 2);
    assert!(far.members.is_empty());
}

#[test]
fn beside_kilos_algorithm_and_without_flannel_there_are_no_echoes() {
    let (mesh, mut topology) = main_scenario();
    let name = NodeName("node-agent-01".into());
    let of = |flannel, name| targets(&topology, name, flannel, true, None, &Relaying::Auto);
    assert_eq!(of(None, &name), Targets::default());
    let stranger = NodeName("stranger".into());
    let flannel = mesh.flannel(&name);
    assert_eq!(of(Some(&flannel), &stranger), Targets::default());
    topology.mode = Mode::Kilo(vec![name]);
    assert_eq!(
        self::of(&mesh, &topology, "node-agent-01"),
        Targets::default()
    );
}

#[test]
fn the_generation_follows_from_the_list_of_regions_alone() {
    let list = |names: &[&str]| Targets {
        segments: names.iter().map(|name| segment(name)).collect(),
        ..Targets::default()
    };
    let one = list(&["b", "c"]);
    let same = Targets {
        own: Some(ip("10.42.1.0")),
        ..one.clone()
    };
    assert_eq!(one.generation(), same.generation());
    assert_ne!(one.generation(), list(&["b"]).generation());
    assert_ne!(one.generation(), list(&["b", "c", "d"]).generation());
    // It is the same for every version and every machine.
    assert_eq!(list(&[]).generation(), 0xe3b0_c442_98fc_1c14);
}
