//! Packets to a peer whose path carries a known size: padding, fragments and ICMP errors.

use super::*;
use crate::wireguard::config::PeerMtu;
use crate::wireguard::icmp::Answer;
use crate::wireguard::transmit::{Refused, send_alone};

/// Bytes of WireGuard around a packet.
const AROUND: usize = 32;

/// Two hosts with a session. Host 1 sends packets of this size to host 2.
fn pair_with(mtu: PeerMtu) -> World {
    let world = World::connected_pair();
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    let v6 = |n: u8| net(&format!("fd00::{n}/128"));
    let mut other = config(2);
    other.mtu = mtu;
    other.routes.insert(v6(2));
    one.set_peers(&[(two, other)], world.now);
    world
}

/// A packet of so many bytes from host 1 to host 2.
fn of_length(length: usize) -> Vec<u8> {
    packet(1, 2, &vec![0; length - 28])
}

fn v6_of_length(length: usize) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, 17, 64];
    let payload = u16::try_from(length - 40).unwrap();
    packet[4..6].copy_from_slice(&payload.to_be_bytes());
    for host in [1, 2] {
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host]);
    }
    packet.resize(length, 0);
    packet
}

/// Host 1 reads this from its link; the ICMP error, or the datagrams.
fn send(world: &mut World, vnet: gso::VnetHeader, packet: &[u8]) -> Result<Vec<Datagram>, Refused> {
    let before = world.log.len();
    let bytes = [&vnet.to_bytes()[..], packet].concat();
    let Host {
        core,
        wire,
        transmit,
        ..
    } = &mut world.hosts[0];
    let sent = transmit.packet(core, wire, &bytes, world.now);
    transmit.flush(core, wire, world.now);
    world.collect();
    sent.map(|()| world.log[before..].to_vec())
}

fn send_one(world: &mut World, packet: &[u8]) -> Result<Datagram, Refused> {
    let sent = send(world, gso::VnetHeader::default(), packet)?;
    assert_eq!(sent.len(), 1);
    Ok(sent[0].clone())
}

/// A TCP packet of the kernel that stands for several of this size.
fn joined(segments: usize, length: usize) -> (gso::VnetHeader, Vec<u8>) {
    let payload = length - 40;
    let mut packet = packet(1, 2, &vec![0; 12 + segments * payload]);
    packet[9] = 6;
    packet[32] = 5 << 4;
    let size = u16::try_from(payload).unwrap().to_ne_bytes();
    let [start, offset] = [20_u16, 16].map(u16::to_ne_bytes);
    let vnet = [
        1, 1, 40, 0, size[0], size[1], start[0], start[1], offset[0], offset[1],
    ];
    let (vnet, _) = gso::VnetHeader::read(&vnet).unwrap();
    (vnet, packet)
}

#[test]
fn a_datagram_to_a_peer_with_a_measured_path_is_never_larger_than_the_path_nor_fragmented() {
    let mut world = pair_with(PeerMtu::Path(1219));
    for length in [28, 500, 1200, 1209, 1217, 1218, 1219] {
        let sent = send_one(&mut world, &of_length(length)).unwrap();
        let padded = length.next_multiple_of(16).min(1219);
        assert_eq!(sent.bytes.len(), padded + AROUND, "{length}");
        assert_eq!(sent.fragments, Fragments::None);
    }
    let refused = send_one(&mut world, &of_length(1220));
    assert_eq!(refused, Err(Refused(Some(Answer::TooBig(1219)))));
    assert_eq!(world.hosts[0].core.drops.count(Dropped::TooBig), 1);
}

#[test]
fn a_joined_packet_with_segments_larger_than_the_path_is_refused_as_a_whole() {
    let mut world = pair_with(PeerMtu::Path(1220));
    let (vnet, packet) = joined(5, 1220);
    let sent = send(&mut world, vnet, &packet).unwrap();
    assert_eq!(sent.len(), 5);
    assert!(sent.iter().all(|one| one.bytes.len() == 1220 + AROUND));
    let (vnet, packet) = joined(5, 1221);
    let refused = send(&mut world, vnet, &packet);
    assert_eq!(refused, Err(Refused(Some(Answer::TooBig(1220)))));
}

#[test]
fn a_packet_of_ipv6_that_each_link_must_carry_is_sent_in_fragments_on_a_smaller_path() {
    let mut world = pair_with(PeerMtu::Path(1220));
    let sent = send_one(&mut world, &v6_of_length(1220)).unwrap();
    assert_eq!(sent.fragments, Fragments::None);
    let sent = send_one(&mut world, &v6_of_length(1280)).unwrap();
    assert_eq!(sent.fragments, Fragments::Small);
    // The sender would ignore a smaller size.
    let refused = send_one(&mut world, &v6_of_length(1281));
    assert_eq!(refused, Err(Refused(Some(Answer::TooBig(1280)))));
}

#[test]
fn a_peer_whose_path_is_not_measured_gets_packets_of_any_size() {
    for mtu in [PeerMtu::Link, PeerMtu::Configured(1400)] {
        let mut world = pair_with(mtu);
        let sent = send_one(&mut world, &of_length(1410)).unwrap();
        assert_eq!(sent.fragments, Fragments::Allowed);
    }
    let mut world = pair_with(PeerMtu::Configured(1400));
    let sent = send_one(&mut world, &of_length(1393)).unwrap();
    assert_eq!(sent.bytes.len(), 1400 + AROUND, "padding stops at the MTU");
}

#[test]
fn a_packet_that_waited_for_a_session_and_no_longer_fits_is_dropped() {
    let mut world = World::pair();
    for length in [1300, 100] {
        world.send(0, &of_length(length));
    }
    let mut other = config(2);
    other.mtu = PeerMtu::Path(1220);
    let [one, two] = world.hosts.as_slice() else {
        unreachable!()
    };
    one.set_peers(&[(two, other)], world.now);
    world.settle();
    assert_eq!(world.hosts[1].delivered, [of_length(100)]);
    assert_eq!(world.hosts[0].core.drops.count(Dropped::TooBig), 1);
}

#[test]
fn a_padded_packet_arrives_without_its_padding_whatever_the_mtu() {
    let mut world = pair_with(PeerMtu::Path(1220));
    let packet = of_length(124);
    for length in [1240, 8940, 60] {
        let before = world.log.len();
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        let peer = one.peer(two);
        let (core, wire) = (&one.core, &one.wire);
        let padded = Some(length);
        assert!(send_alone(core, wire, &peer, &packet, padded, world.now));
        world.settle();
        assert_eq!(world.log[before].bytes.len(), length.max(124) + AROUND);
        assert_eq!(world.log[before].fragments, Fragments::None);
        assert_eq!(world.hosts[1].delivered.pop(), Some(packet.clone()));
    }
}

#[test]
fn the_mtu_of_a_peer_is_shown_as_it_was_set() {
    for mtu in [
        PeerMtu::Link,
        PeerMtu::Configured(1420),
        PeerMtu::Path(8940),
    ] {
        let world = pair_with(mtu);
        let configs = world.hosts[0].core.peer_configs();
        assert_eq!(configs[&world.hosts[1].id()].mtu, mtu);
    }
}

#[test]
fn a_path_that_refuses_a_size_at_once_counts_the_loss_and_logs_nothing() {
    let mut world = pair_with(PeerMtu::Path(1420));
    world.hosts[0].wire.errno.set(Some(libc::EMSGSIZE));
    send(&mut world, gso::VnetHeader::default(), &of_length(1400)).unwrap();
    let drops = &world.hosts[0].core.drops;
    assert_eq!(drops.count(Dropped::TooBig), 1);
    assert_eq!(drops.count(Dropped::SendFailed), 0);
}
