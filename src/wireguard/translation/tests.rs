//! The translation of single packets, with every checksum computed from the start.

use proptest::prelude::*;

use super::*;

const HOST: [&str; 2] = ["192.168.1.11", "fd01::11"];
const ALIAS: [&str; 2] = ["100.80.0.1", "fd80::1"];
const REMOTE: [&str; 2] = ["10.42.7.9", "fd42:7::9"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn translation() -> Translation {
    let translation = Translation::default();
    let pairs = ALIAS.into_iter().zip(HOST);
    translation.set(&pairs.map(|(alias, host)| (ip(alias), ip(host))).collect());
    translation
}

/// An IP packet with the transport header and payload in `body`, with complete checksums.
fn packet(from: &str, to: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    let (from, to) = (ip(from), ip(to));
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let length = u16::try_from(20 + body.len()).unwrap().to_be_bytes();
            let mut header = vec![
                0x45, 0, length[0], length[1], 7, 7, 0, 0, 64, protocol, 0, 0,
            ];
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = u16::try_from(body.len()).unwrap().to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        _ => panic!("two families"),
    };
    packet.extend(body);
    complete(&mut packet);
    packet
}

/// Computes the checksums of a whole packet.
fn complete(packet: &mut [u8]) {
    let header = Header::parse(packet).unwrap();
    if header.source.is_ipv4() {
        packet[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&packet[..header.header]));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let (protocol, at) = transport(packet, &header).unwrap();
    let field = match protocol {
        TCP => at + 16,
        UDP => at + 6,
        ICMP | ICMPV6 => at + 2,
        _ => return,
    };
    packet[field..field + 2].fill(0);
    let pseudo = match protocol {
        ICMP => 0,
        _ => checksum::pseudo_header(
            header.source,
            header.destination,
            protocol,
            packet.len() - at,
        ),
    };
    let sum = checksum::finish(pseudo + checksum::sum(&packet[at..]));
    let sum = if protocol == UDP && sum == 0 {
        0xffff
    } else {
        sum
    };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

fn udp(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap().to_be_bytes();
    [
        &[0x30, 0x39, 0x28, 0x0a, length[0], length[1], 0, 0],
        payload,
    ]
    .concat()
}

fn tcp(payload: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 20];
    body[..4].copy_from_slice(&[0x28, 0x0a, 0x30, 0x39]);
    body[12] = 5 << 4;
    body.extend(payload);
    body
}

/// An ICMP error that quotes a packet.
fn error(kind: u8, quoted: &[u8]) -> Vec<u8> {
    [&[kind, 1, 0, 0, 0, 0, 0, 0], quoted].concat()
}

fn inbound(packet: &[u8]) -> Vec<u8> {
    let mut translated = packet.to_vec();
    let mut header = Header::parse(packet).unwrap();
    translation().inbound(&mut translated, &mut header);
    assert_eq!(Header::parse(&translated), Some(header));
    translated
}

fn outbound(packet: &[u8]) -> Vec<u8> {
    let mut translated = packet.to_vec();
    translation()
        .load()
        .as_ref()
        .unwrap()
        .outbound(&mut translated);
    translated
}

proptest! {
    #[test]
    fn both_directions_are_as_if_the_other_address_had_been_used(
        payload in prop::collection::vec(any::<u8>(), 0..200), v6 in 0_usize..2, protocol in 0_usize..3,
    ) {
        let icmp = [if v6 == 0 { 8 } else { 128 }, 0, 0, 0, 0, 1, 0, 2];
        let (protocol, body) = match protocol {
            0 => (TCP, tcp(&payload)),
            1 => (UDP, udp(&payload)),
            _ => (if v6 == 0 { ICMP } else { ICMPV6 }, [&icmp[..], &payload].concat()),
        };
        let (host, alias, remote) = (HOST[v6], ALIAS[v6], REMOTE[v6]);
        let arriving = inbound(&packet(remote, alias, protocol, &body));
        prop_assert_eq!(arriving, packet(remote, host, protocol, &body));
        let leaving = outbound(&packet(host, remote, protocol, &body));
        prop_assert_eq!(leaving, packet(alias, remote, protocol, &body));
    }

    #[test]
    fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..120), first in 0_usize..3, to_alias: bool) {
        let mut bytes = bytes;
        if let Some(version) = bytes.first_mut() {
            *version = [0x45, 0x60, *version][first];
        }
        if to_alias && bytes.len() >= 40 {
            match ip(ALIAS[first % 2]) {
                IpAddr::V4(alias) => bytes[16..20].copy_from_slice(&alias.octets()),
                IpAddr::V6(alias) => bytes[24..40].copy_from_slice(&alias.octets()),
            }
        }
        translation().load().as_ref().unwrap().outbound(&mut bytes);
        if let Some(mut header) = Header::parse(&bytes) {
            translation().inbound(&mut bytes, &mut header);
        }
    }
}

#[test]
fn an_error_for_the_host_quotes_what_the_host_sent() {
    for v6 in [0, 1] {
        let (host, alias, remote) = (HOST[v6], ALIAS[v6], REMOTE[v6]);
        let (protocol, kind) = [(ICMP, 3), (ICMPV6, 1)][v6];
        let sent = |source| error(kind, &packet(source, remote, UDP, &udp(b"why")));
        let arriving = inbound(&packet(remote, alias, protocol, &sent(alias)));
        assert_eq!(arriving, packet(remote, host, protocol, &sent(host)));
    }
}

#[test]
fn an_error_of_the_host_quotes_what_the_remote_sent() {
    for v6 in [0, 1] {
        let (host, alias, remote) = (HOST[v6], ALIAS[v6], REMOTE[v6]);
        let (protocol, kind) = [(ICMP, 3), (ICMPV6, 1)][v6];
        for transport in [TCP, UDP] {
            let body = if transport == TCP {
                tcp(b"")
            } else {
                udp(b"q")
            };
            let sent = |destination| error(kind, &packet(remote, destination, transport, &body));
            let leaving = outbound(&packet(host, remote, protocol, &sent(host)));
            assert_eq!(leaving, packet(alias, remote, protocol, &sent(alias)));
        }
    }
}

#[test]
fn an_error_of_a_router_before_the_host_quotes_what_the_remote_sent() {
    for (v6, router) in [(0, "10.42.0.0"), (1, "fd42::")] {
        let (protocol, kind) = [(ICMP, 11), (ICMPV6, 2)][v6];
        let sent = |to| error(kind, &packet(REMOTE[v6], to, UDP, &udp(b"too far")));
        let leaving = outbound(&packet(router, REMOTE[v6], protocol, &sent(HOST[v6])));
        assert_eq!(
            leaving,
            packet(router, REMOTE[v6], protocol, &sent(ALIAS[v6]))
        );
    }
}

#[test]
fn an_error_that_quotes_eight_bytes_of_transport_is_complete() {
    let quoted = |to: &str| {
        let mut quoted = packet(REMOTE[0], to, TCP, &tcp(b"payload"));
        quoted.truncate(28);
        error(3, &quoted)
    };
    let leaving = outbound(&packet(HOST[0], REMOTE[0], ICMP, &quoted(HOST[0])));
    assert_eq!(
        leaving,
        packet(ALIAS[0], REMOTE[0], ICMP, &quoted(ALIAS[0]))
    );
}

#[test]
fn a_datagram_without_a_checksum_gets_none() {
    let without = |to| {
        let mut packet = packet(REMOTE[0], to, UDP, &udp(b"fast"));
        packet[26..28].fill(0);
        packet
    };
    assert_eq!(inbound(&without(ALIAS[0])), without(HOST[0]));
}

#[test]
fn fragments_are_those_of_the_translated_packet() {
    let fragments = |to: &str| {
        let whole = packet(REMOTE[0], to, UDP, &udp(&[7; 40]));
        let cut = |range: std::ops::Range<usize>, flags: u16| {
            let body = &whole[20..][range];
            let mut piece = [&whole[..20], body].concat();
            let length = u16::try_from(piece.len()).unwrap();
            piece[2..4].copy_from_slice(&length.to_be_bytes());
            piece[6..8].copy_from_slice(&flags.to_be_bytes());
            piece[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(&piece[..20]));
            piece[10..12].copy_from_slice(&sum.to_be_bytes());
            piece
        };
        [cut(0..24, 0x2000), cut(24..48, 3)]
    };
    let arriving = fragments(ALIAS[0]).map(|piece| inbound(&piece));
    assert_eq!(arriving, fragments(HOST[0]));
}

#[test]
fn extension_headers_of_ipv6_are_passed() {
    let body = |to: &str| {
        // Eight bytes of options, then a first fragment's header, then UDP.
        let inner = packet(REMOTE[1], to, UDP, &udp(b"behind"));
        let options = [FRAGMENT, 0, 1, 4, 0, 0, 0, 0];
        let fragment = [UDP, 0, 0, 1, 0, 0, 0, 9];
        let body = [&options[..], &fragment, &inner[40..]].concat();
        let mut packet = [&inner[..40], &body].concat();
        packet[4..6].copy_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
        packet[6] = DESTINATION_OPTIONS;
        packet
    };
    assert_eq!(inbound(&body(ALIAS[1])), body(HOST[1]));
}

#[test]
fn other_packets_are_left_alone() {
    for v6 in [0, 1] {
        // To the host's own address from the tunnel, of the alias from the link, and between others.
        let foreign = packet(REMOTE[v6], HOST[v6], UDP, &udp(b"x"));
        assert_eq!(inbound(&foreign), foreign);
        let foreign = packet(ALIAS[v6], REMOTE[v6], UDP, &udp(b"x"));
        assert_eq!(outbound(&foreign), foreign);
        let foreign = packet(REMOTE[v6], REMOTE[v6], TCP, &tcp(b"x"));
        assert_eq!(inbound(&foreign), foreign);
        assert_eq!(outbound(&foreign), foreign);
    }
}

#[test]
fn a_pair_of_two_families_is_left_out() {
    let translation = Translation::default();
    translation.set(&[(ip(ALIAS[0]), ip(HOST[1]))].into());
    let mut arriving = packet(REMOTE[0], ALIAS[0], UDP, &udp(b"x"));
    let before = arriving.clone();
    let mut header = Header::parse(&arriving).unwrap();
    translation.inbound(&mut arriving, &mut header);
    assert_eq!(arriving, before);
}
