//! Cutting and joining are inverse, and packets that cannot be joined stay separate.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

/// A packet as a sender makes it, with right checksums.
fn packet(v6: bool, protocol: u8, port: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let transport_header = if protocol == TCP {
        TCP_HEADER
    } else {
        UDP_HEADER
    };
    let length = transport_header + payload.len();
    let (source, destination): (IpAddr, IpAddr) = if v6 {
        (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into())
    } else {
        (
            Ipv4Addr::new(10, 0, 0, 1).into(),
            Ipv4Addr::new(10, 0, 0, 2).into(),
        )
    };
    let mut packet = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, protocol, 0, 0];
            header.extend(source.octets());
            header.extend(destination.octets());
            put(&mut header, 2, clamp(IPV4_HEADER + length));
            let sum = checksum::finish(checksum::sum(&header));
            put(&mut header, 10, sum);
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
            header.extend(source.octets());
            header.extend(destination.octets());
            put(&mut header, 4, clamp(length));
            header
        }
        _ => unreachable!("both are of one family"),
    };
    let transport = packet.len();
    packet.extend(port.to_be_bytes());
    packet.extend(80_u16.to_be_bytes());
    let checksum = if protocol == TCP {
        packet.extend(sequence.to_be_bytes());
        packet.extend(1_u32.to_be_bytes());
        packet.extend([0x50, flags, 1, 0, 0, 0, 0, 0]);
        TCP_CHECKSUM
    } else {
        packet.extend(clamp(length).to_be_bytes());
        packet.extend([0, 0]);
        UDP_CHECKSUM
    };
    packet.extend(payload);
    let pseudo = checksum::pseudo_header(source, destination, protocol, length);
    let sum = checksum::finish(pseudo + checksum::sum(&packet[transport..]));
    put(&mut packet, transport + checksum, sum);
    packet
}

fn join(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut arena = packets.concat();
    let (mut coalescer, mut start, mut joined) = (Coalescer::default(), 0, Vec::new());
    for packet in packets {
        let range = start..start + packet.len();
        coalescer.push(&arena, range.clone(), &Header::parse(packet).unwrap());
        start = range.end;
    }
    coalescer.finish(&mut arena, |pieces, count| {
        assert_eq!(pieces.len(), count + 1);
        joined.push(
            pieces
                .iter()
                .flat_map(|piece| piece.iter().copied())
                .collect::<Vec<u8>>(),
        );
    });
    assert!(coalescer.is_empty());
    joined
}

fn split(bytes: &[u8]) -> Vec<Vec<u8>> {
    let (vnet, packet) = VnetHeader::read(bytes).unwrap();
    let split = Split::new(&vnet, packet, &Header::parse(packet).unwrap()).unwrap();
    let one = |n| {
        let mut out = vec![0; split.length(n)];
        split.write(n, &mut out);
        out
    };
    (0..split.count()).map(one).collect()
}

fn assert_valid(packet: &[u8]) {
    let header = Header::parse(packet).unwrap();
    assert_eq!(header.length, packet.len());
    if header.source.is_ipv4() {
        assert_eq!(checksum::fold(checksum::sum(&packet[..20])), 0xffff);
    }
    assert!(Flow::of(packet, &header).unwrap().checksum_is_right(packet));
}

#[test]
fn segments_are_joined_to_one_packet_and_cut_to_the_same_segments() {
    for v6 in [false, true] {
        for protocol in [TCP, UDP] {
            let sizes = [1000_usize, 1000, 1000, 17];
            let mut sequence = u32::MAX - 1500;
            let mut packets = Vec::new();
            for (n, size) in sizes.into_iter().enumerate() {
                let flags = if n == 3 { ACK | PSH } else { ACK };
                let payload = vec![u8::try_from(n).unwrap() + 1; size];
                packets.push(packet(v6, protocol, 9, sequence, flags, &payload));
                sequence = sequence.wrapping_add(u32::try_from(size).unwrap());
            }

            let joined = join(&packets);
            assert_eq!(joined.len(), 1, "v6 {v6}, protocol {protocol}");
            let apart = split(&joined[0]);
            apart.iter().for_each(|packet| assert_valid(packet));
            let mut expected = packets.clone();
            if !v6 {
                for (n, packet) in expected.iter_mut().enumerate() {
                    put(packet, 4, 7 + clamp(n));
                    put(packet, 10, 0);
                    let sum = checksum::finish(checksum::sum(&packet[..20]));
                    put(packet, 10, sum);
                }
            }
            assert_eq!(apart, expected);
        }
    }
}

#[test]
fn packets_that_do_not_continue_the_flow_stay_separate() {
    let data = [7; 100];
    let base = packet(false, TCP, 9, 0, ACK, &data);
    let next = |flags, sequence, payload: &[u8]| packet(false, TCP, 9, sequence, flags, payload);
    let mut corrupt = next(ACK, 100, &data);
    corrupt[60] ^= 1;
    let mut marked = next(ACK, 100, &data);
    crate::wireguard::packet::set_ecn(&mut marked, crate::wireguard::packet::Ecn::Congested);
    for (what, other) in [
        ("a gap", next(ACK, 200, &data)),
        ("a repetition", next(ACK, 0, &data)),
        ("a longer segment", next(ACK, 100, &[7; 101])),
        ("an end", next(ACK | FIN, 100, &data)),
        ("a beginning", next(2, 100, &data)),
        ("an empty acknowledgement", next(ACK, 100, &[])),
        ("a wrong checksum", corrupt),
        ("a congestion mark", marked),
        ("another flow", packet(false, TCP, 10, 100, ACK, &data)),
        ("another protocol", packet(false, UDP, 9, 0, 0, &data)),
    ] {
        let joined = join(&[base.clone(), other.clone()]);
        assert_eq!(joined.len(), 2, "{what}");
        assert_eq!(joined[0][VNET_HEADER..], base, "{what}");
        assert_eq!(joined[1][VNET_HEADER..], other, "{what}");
        assert!(
            joined
                .iter()
                .all(|bytes| bytes[..VNET_HEADER] == [0; VNET_HEADER])
        );
    }
}

#[test]
fn no_packet_overtakes_one_that_could_not_be_joined() {
    let data = [7; 100];
    let packets = [
        packet(false, TCP, 9, 0, ACK, &data),
        packet(false, TCP, 9, 100, ACK, &[]),
        packet(false, TCP, 9, 100, ACK, &data),
        packet(false, TCP, 9, 200, ACK, &data),
    ];
    let joined = join(&packets);
    assert_eq!(joined.len(), 3);
    assert_eq!(joined[1][VNET_HEADER..], packets[1]);
    assert_eq!(split(&joined[2]).len(), 2);
}

#[test]
fn interleaved_flows_are_joined_separately() {
    let packets: Vec<_> = (0..12_u32)
        .map(|n| {
            packet(
                false,
                TCP,
                u16::try_from(n % 3).unwrap(),
                n / 3 * 50,
                ACK,
                &[1; 50],
            )
        })
        .collect();
    let joined = join(&packets);
    assert_eq!(joined.len(), 3);
    assert!(joined.iter().all(|bytes| split(bytes).len() == 4));
}

#[test]
fn no_more_is_joined_than_the_kernel_accepts() {
    let packets: Vec<_> = (0..130_u32)
        .map(|n| packet(true, UDP, 9, 0, 0, &n.to_be_bytes()))
        .collect();
    let joined = join(&packets);
    let counts: Vec<_> = joined.iter().map(|bytes| split(bytes).len()).collect();
    assert_eq!(counts, [64, 64, 2]);

    let large: Vec<_> = (0..50_u32)
        .map(|n| packet(false, TCP, 9, n * 1400, ACK, &[1; 1400]))
        .collect();
    let joined = join(&large);
    assert!(
        joined
            .iter()
            .all(|bytes| bytes.len() <= VNET_HEADER + MAX_PACKET)
    );
    assert_eq!(
        joined.iter().map(|bytes| split(bytes).len()).sum::<usize>(),
        50
    );
}

#[test]
fn a_partial_checksum_is_completed() {
    let whole = packet(false, UDP, 9, 0, 0, &[1, 2, 3]);
    let header = Header::parse(&whole).unwrap();
    let mut partial = whole.clone();
    let pseudo = checksum::pseudo_header(header.source, header.destination, UDP, 11);
    put(&mut partial, 26, checksum::fold(pseudo));
    let vnet = VnetHeader {
        flags: NEEDS_CHECKSUM,
        checksum_start: 20,
        checksum_offset: 6,
        ..VnetHeader::default()
    };
    assert_eq!(split(&[&vnet.to_bytes()[..], &partial].concat()), [whole]);
}

#[test]
fn only_the_first_segment_has_congestion_window_reduced() {
    let packets: Vec<_> = (0..3_u32)
        .map(|n| packet(false, TCP, 9, n * 10, ACK, &[1; 10]))
        .collect();
    let mut joined = join(&packets).remove(0);
    joined[1] |= GSO_ECN;
    joined[VNET_HEADER + 20 + 13] |= CWR;
    let flags: Vec<_> = split(&joined)
        .iter()
        .map(|packet| packet[33] & CWR != 0)
        .collect();
    assert_eq!(flags, [true, false, false]);
}

proptest! {
    #[test]
    fn any_bytes_come_apart_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), shape in 0..3) {
        let mut bytes = bytes;
        // Half of the cases get far enough to be cut.
        if let (true, Some(first)) = (shape > 0, bytes.get_mut(VNET_HEADER)) {
            *first = if shape == 1 { 0x45 } else { 0x60 };
        }
        let Some((vnet, packet)) = VnetHeader::read(&bytes) else { return Ok(()) };
        let Some(ip) = Header::parse(packet) else { return Ok(()) };
        if let Some(split) = Split::new(&vnet, packet, &ip) {
            for n in 0..split.count() {
                let mut out = vec![0; split.length(n)];
                split.write(n, &mut out);
            }
        }
        Coalescer::default().push(packet, 0..ip.length, &ip);
    }

    #[test]
    fn joining_loses_and_invents_nothing(
        choices in prop::collection::vec((0_u16..3, prop_oneof![Just(100_usize), 1_usize..120], any::<bool>(), 0..8), 1..40),
        v6 in any::<bool>(),
    ) {
        let mut sequences = [0_u32; 3];
        let mut packets = Vec::new();
        for (port, size, udp, oddity) in choices {
            let sequence = &mut sequences[usize::from(port)];
            let flags = if oddity == 0 { ACK | PSH } else { ACK };
            if oddity == 1 { *sequence += 5; }
            let protocol = if udp { UDP } else { TCP };
            packets.push(packet(v6, protocol, port, *sequence, flags, &vec![u8::try_from(size).unwrap(); size]));
            if !udp { *sequence += u32::try_from(size).unwrap(); }
        }
        let apart: Vec<Vec<u8>> = join(&packets).iter().flat_map(|bytes| split(bytes)).collect();
        for port in 0_u16..3 {
            for protocol in [TCP, UDP] {
                let transport = if v6 { 40 } else { 20 };
                let of_flow = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
                    let mine = packets.iter().filter(|packet| {
                        packet[transport..transport + 2] == port.to_be_bytes() && Header::parse(packet).unwrap().protocol == protocol
                    });
                    // Identification and header checksum may change.
                    mine.map(|packet| [&packet[..4], &packet[12..]].concat()).collect()
                };
                prop_assert_eq!(of_flow(&apart), of_flow(&packets));
            }
        }
        for packet in &apart {
            assert_valid(packet);
        }
    }
}
