//! Aliases on the way through two devices.

use super::*;

const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
const ALIAS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 77);
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

/// Two hosts with a session. Behind host 2 is a node with an alias.
fn pair_with_an_alias() -> World {
    let world = World::connected_pair();
    let aliases = BTreeMap::from([(ALIAS.into(), NODE.into())]);
    world.hosts[1].core.translation.set(&aliases);
    world
}

/// What a host's link got after another sent a packet.
fn carried(world: &mut World, from: usize, packet: &[u8]) -> Vec<Vec<u8>> {
    world.send(from, packet);
    world.settle();
    std::mem::take(&mut world.hosts[1 - from].delivered)
}

#[test]
fn a_node_is_reached_by_its_alias_and_answers_with_it() {
    let mut world = pair_with_an_alias();
    let question = carried(&mut world, 0, &packet_between(REMOTE, ALIAS, b"kubelet?"));
    assert_eq!(question, [packet_between(REMOTE, NODE, b"kubelet?")]);
    let answer = carried(&mut world, 1, &packet_between(NODE, REMOTE, b"yes"));
    assert_eq!(answer, [packet_between(ALIAS, REMOTE, b"yes")]);
    assert_eq!(world.hosts[0].drops(Dropped::ForeignSource), 0);
}

#[test]
fn without_its_alias_a_nodes_address_is_a_foreign_source() {
    let mut world = World::connected_pair();
    let answer = carried(&mut world, 1, &packet_between(NODE, REMOTE, b"yes"));
    assert_eq!(answer, Vec::<Vec<u8>>::new());
    assert_eq!(world.hosts[0].drops(Dropped::ForeignSource), 1);
}

#[test]
fn each_segment_of_a_joined_packet_is_translated() {
    let mut world = pair_with_an_alias();
    // Two datagrams of eight bytes as one of sixteen: needs a checksum, UDP.
    let joined = packet_between(NODE, REMOTE, b"segment1segment2");
    let field = u16::to_ne_bytes;
    let vnet = [[1, 5], field(28), field(8), field(20), field(6)].concat();
    let Host {
        core,
        wire,
        transmit,
        ..
    } = &mut world.hosts[1];
    let sent = transmit.packet(core, wire, &[vnet, joined].concat(), world.now);
    assert_eq!(sent, Ok(()));
    transmit.flush(core, wire, world.now);
    world.collect();
    world.settle();

    let delivered = world.hosts[0].delivered.concat();
    let source = ALIAS.octets();
    assert!(delivered.windows(4).any(|bytes| bytes == source));
    assert!(!delivered.windows(4).any(|bytes| bytes == NODE.octets()));
    assert_eq!(world.hosts[0].drops(Dropped::ForeignSource), 0);
}

#[test]
fn packets_that_waited_for_a_session_are_translated_too() {
    let mut world = World::pair();
    let aliases = BTreeMap::from([(ALIAS.into(), NODE.into())]);
    world.hosts[1].core.translation.set(&aliases);
    let answer = carried(&mut world, 1, &packet_between(NODE, REMOTE, b"first"));
    assert_eq!(answer, [packet_between(ALIAS, REMOTE, b"first")]);
}
