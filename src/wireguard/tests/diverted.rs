//! Echoes: which packets are diverted to the embedder, and what it sends to a peer itself.

use super::*;
use crate::wireguard::divert::{Diverted, ECHO_PORT, Origin};
use crate::wireguard::transmit::send_alone;

/// A UDP packet from 10.0.`from`.1 to 10.0.`to`.1 at a port.
fn to_port(from: u8, to: u8, port: u16) -> Vec<u8> {
    let mut packet = packet(from, to, b"echo");
    packet[22..24].copy_from_slice(&port.to_be_bytes());
    packet
}

fn echo(from: u8, to: u8) -> Vec<u8> {
    to_port(from, to, ECHO_PORT)
}

/// Two hosts with a session. Host 2 diverts echoes to 10.0.2.1 and to an IPv6 address.
fn diverting_pair() -> World {
    let world = World::connected_pair();
    let core = &world.hosts[1].core;
    core.diversion
        .set_addresses([ip("10.0.2.1"), ip("fd00::2")].into());
    world
}

fn from_link(packet: Vec<u8>) -> Diverted {
    let origin = Origin::Link;
    Diverted { origin, packet }
}

fn from_peer(peer: &Host, packet: Vec<u8>) -> Diverted {
    let origin = Origin::Peer(peer.id());
    Diverted { origin, packet }
}

/// A host sends a packet of its own to the other one of a pair.
fn send_own(world: &mut World, from: usize, packet: &[u8]) -> bool {
    let [sender, receiver] = [&world.hosts[from], &world.hosts[1 - from]];
    let peer = sender.core.peer(&receiver.id()).unwrap();
    let (core, wire) = (&sender.core, &sender.wire);
    let sent = send_alone(core, wire, &peer, packet, None, world.now);
    world.collect();
    sent
}

#[test]
fn an_echo_of_a_peer_is_diverted_and_does_not_reach_the_link() {
    let mut world = diverting_pair();
    let peer = world.hosts[1].peer(&world.hosts[0]);
    let before = peer.rx_bytes();
    world.send(0, &echo(1, 2));
    world.settle();

    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    assert!(two.core.diversion.signal.take(), "the embedder is called");
    let expected = [from_peer(one, echo(1, 2))];
    assert_eq!(two.core.diversion.take(), expected);
    assert_eq!(two.core.diversion.take(), []);
    assert_eq!(two.delivered, Vec::<Vec<u8>>::new());
    // Padded to 32 bytes, with header and tag.
    assert_eq!(peer.rx_bytes() - before, 64);
}

#[test]
fn a_diverted_echo_is_data_so_a_peer_that_gets_no_reply_gets_a_keepalive() {
    let mut world = diverting_pair();
    world.pass(seconds(30));
    world.send(0, &echo(1, 2));
    world.settle();
    let before = world.log.len();
    world.pass(seconds(11));
    let keepalives = world.log[before..]
        .iter()
        .filter(|datagram| datagram.from == address(2) && datagram.bytes.len() == 32);
    assert_eq!(keepalives.count(), 1);
}

#[test]
fn an_echo_from_the_link_is_diverted_and_not_sent() {
    let mut world = World::connected_pair();
    let addresses = [ip("10.0.2.1"), ip("10.9.9.9")];
    let core = &world.hosts[0].core;
    core.diversion.set_addresses(addresses.into());
    world.send(0, &echo(1, 2));
    assert_eq!(world.under_way, []);
    let core = world.hosts[0].core.clone();
    assert_eq!(core.diversion.take(), [from_link(echo(1, 2))]);

    // An address that belongs to no peer.
    let mut probe = packet_between([10, 0, 1, 1].into(), [10, 9, 9, 9].into(), b"echo");
    probe[22..24].copy_from_slice(&ECHO_PORT.to_be_bytes());
    world.send(0, &probe);
    assert_eq!(core.diversion.take(), [from_link(probe)]);
    assert!(core.diversion.signal.take());
    assert_eq!(world.hosts[0].drops(Dropped::NoPeer), 0);
}

#[test]
fn a_joined_packet_of_echoes_from_the_link_is_cut() {
    let world = World::connected_pair();
    let core = world.hosts[0].core.clone();
    core.diversion.set_addresses([ip("10.0.2.1")].into());
    // Two datagrams of four bytes as one of eight: needs a checksum, UDP.
    let mut joined = packet(1, 2, b"echoechu");
    joined[22..24].copy_from_slice(&ECHO_PORT.to_be_bytes());
    let field = u16::to_ne_bytes;
    let vnet = [[1, 5], field(28), field(4), field(20), field(6)].concat();
    let bytes = [vnet, joined].concat();
    let Host { wire, transmit, .. } = &mut world.hosts.into_iter().next().unwrap();
    assert_eq!(transmit.packet(&core, wire, &bytes, world.now), Ok(()));
    transmit.flush(&core, wire, world.now);

    assert_eq!(wire.sent.take(), []);
    let payloads: Vec<_> = core
        .diversion
        .take()
        .into_iter()
        .map(|diverted| (diverted.origin, diverted.packet[28..].to_vec()))
        .collect();
    let expected = [b"echo", b"echu"].map(|payload| (Origin::Link, payload.to_vec()));
    assert_eq!(payloads, expected);
}

#[test]
fn other_ports_addresses_protocols_and_fragments_pass() {
    let mut world = diverting_pair();
    let mut tcp = echo(1, 2);
    tcp[9] = 6;
    let mut first_fragment = echo(1, 2);
    first_fragment[6] = 0x20;
    let mut later_fragment = echo(1, 2);
    later_fragment[7] = 1;
    // The source port is that of an echo.
    let mut answer = packet(1, 2, b"echo");
    answer[20..22].copy_from_slice(&ECHO_PORT.to_be_bytes());
    let mut elsewhere = packet_between([10, 0, 1, 1].into(), [10, 0, 2, 9].into(), b"echo");
    elsewhere[22..24].copy_from_slice(&ECHO_PORT.to_be_bytes());
    // The header of UDP does not fit in.
    let mut short = echo(1, 2);
    short[3] = 26;
    short.truncate(26);
    let others = [
        to_port(1, 2, 3784),
        tcp,
        first_fragment,
        later_fragment,
        answer,
        elsewhere,
        short,
    ];
    for other in &others {
        world.send(0, other);
        world.settle();
    }
    assert_eq!(world.hosts[1].delivered, others);
    assert_eq!(world.hosts[1].core.diversion.take(), []);
}

#[test]
fn without_diverted_addresses_an_echo_passes() {
    let mut world = diverting_pair();
    let core = world.hosts[1].core.clone();
    core.diversion.set_addresses([].into());
    world.send(0, &echo(1, 2));
    world.settle();
    assert_eq!(world.hosts[1].delivered, [echo(1, 2)]);
    assert_eq!(core.diversion.take(), []);
}

#[test]
fn an_echo_with_a_source_of_another_peer_is_not_diverted() {
    let mut world = diverting_pair();
    world.send(0, &echo(3, 2));
    world.settle();
    let two = &world.hosts[1];
    assert_eq!(two.core.diversion.take(), []);
    assert_eq!(two.delivered, Vec::<Vec<u8>>::new());
    assert_eq!(two.drops(Dropped::ForeignSource), 1);
}

#[test]
fn an_echo_over_ipv6_is_diverted() {
    let mut world = diverting_pair();
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    let both = |n: u8| {
        let prefixes = [format!("10.0.{n}.0/24"), format!("fd00::{n}/128")];
        config(n).with_allowed_ips(prefixes.iter().map(|prefix| net(prefix)).collect())
    };
    one.set_peers(&[(two, both(2))], world.now);
    two.set_peers(&[(one, both(1))], world.now);
    let mut echo = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
    for n in [1, 2] {
        let mut address = [0; 16];
        (address[0], address[15]) = (0xfd, n);
        echo.extend(address);
    }
    let [high, low] = ECHO_PORT.to_be_bytes();
    echo.extend([0, 7, high, low, 0, 8, 0, 0]);
    world.send(0, &echo);
    world.settle();
    let expected = [from_peer(&world.hosts[0], echo)];
    assert_eq!(world.hosts[1].core.diversion.take(), expected);
}

#[test]
fn at_most_1024_echoes_wait_and_the_rest_and_long_ones_are_counted() {
    let mut world = diverting_pair();
    for _ in 0..1030 {
        world.send(0, &echo(1, 2));
    }
    world.settle();
    assert_eq!(world.hosts[1].drops(Dropped::NotDiverted), 6);
    assert_eq!(world.hosts[1].core.diversion.take().len(), 1024);

    for (length, taken) in [(1280, 1), (1281, 0)] {
        let mut long = packet(1, 2, &vec![7; length - 28]);
        long[22..24].copy_from_slice(&ECHO_PORT.to_be_bytes());
        world.send(0, &long);
        world.settle();
        assert_eq!(world.hosts[1].core.diversion.take().len(), taken);
    }
    assert_eq!(world.hosts[1].drops(Dropped::NotDiverted), 7);
    assert_eq!(world.hosts[1].delivered, Vec::<Vec<u8>>::new());
}

#[test]
fn the_embedder_is_called_once_for_several_echoes() {
    let mut world = diverting_pair();
    for _ in 0..3 {
        world.send(0, &echo(1, 2));
    }
    world.settle();
    let diversion = &world.hosts[1].core.diversion;
    assert!(diversion.signal.take());
    assert!(!diversion.signal.take());
}

#[test]
fn a_packet_of_the_embedder_reaches_the_peer_through_its_session() {
    let mut world = diverting_pair();
    assert!(send_own(&mut world, 0, &echo(1, 2)));
    assert!(send_own(&mut world, 0, &packet(1, 2, b"no echo")));
    world.settle();
    let expected = [from_peer(&world.hosts[0], echo(1, 2))];
    assert_eq!(world.hosts[1].core.diversion.take(), expected);
    assert_eq!(world.hosts[1].delivered, [packet(1, 2, b"no echo")]);
}

#[test]
fn a_packet_of_the_embedder_without_a_session_begins_a_handshake_and_is_not_kept() {
    let mut world = World::pair();
    assert!(!send_own(&mut world, 0, &echo(1, 2)));
    world.settle();
    assert_eq!(world.hosts[1].delivered, Vec::<Vec<u8>>::new());
    assert!(send_own(&mut world, 0, &echo(1, 2)));
    world.settle();
    assert_eq!(world.hosts[1].delivered, [echo(1, 2)]);

    // The session ends, and the next packet begins the next one.
    world.pass(seconds(400));
    let before = world.count(1);
    assert!(!send_own(&mut world, 0, &echo(1, 2)));
    world.settle();
    assert_eq!(world.count(1), before + 1);
    assert!(send_own(&mut world, 0, &echo(1, 2)));
}

#[test]
fn bytes_that_are_not_one_whole_packet_are_not_sent() {
    let mut world = World::connected_pair();
    let packet = echo(1, 2);
    for bytes in [
        &[][..],
        &[0x45],
        &packet[..30],
        &[&packet[..], &[0]].concat(),
    ] {
        assert!(!send_own(&mut world, 0, bytes));
    }
    assert_eq!(world.under_way, []);
}

#[test]
fn packets_of_the_embedder_alone_renew_the_session() {
    let mut world = diverting_pair();
    for n in 0..1000 {
        assert!(send_own(&mut world, 0, &echo(1, 2)), "packet {n}");
        world.pass(Duration::from_millis(500));
        assert_eq!(world.hosts[1].core.diversion.take().len(), 1, "packet {n}");
    }
    let handshakes = world
        .log
        .iter()
        .filter(|datagram| datagram.kind() == 1 && datagram.from == address(1));
    // One every two minutes.
    assert!((4..=6).contains(&handshakes.count()));
}
