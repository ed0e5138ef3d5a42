//! ICMP errors for packets that cannot be sent: unreachable, or too big (RFC 792, RFC 4443).
//!
//! The kernel sends them for its own links. For a TUN device it takes every packet as sent. An error has the
//! unreachable address as its source, because only that one is sure to pass the reverse path filter of the
//! link.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use pnet_packet::icmp::{self, IcmpCode, IcmpTypes};
use pnet_packet::icmpv6::{self, Icmpv6Code, Icmpv6Types};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::{Packet as _, ipv4, ipv6};

use super::clock::Time;
use super::packet::{Header, ICMP_HEADER, IPV4_HEADER, IPV6_HEADER};

/// An IPv4 answer is no longer than this (RFC 1812, 4.3.2.3).
const MAX_V4: usize = 576;
/// An IPv6 answer is no longer than the least MTU (RFC 4443, 2.4).
const MAX_V6: usize = 1280;
const TTL: u8 = 64;

/// Host unreachable (RFC 792).
const HOST_UNREACHABLE: u8 = 1;
/// Fragmentation needed and not allowed (RFC 792, RFC 1191).
const FRAGMENTATION_NEEDED: u8 = 4;
/// Address unreachable (RFC 4443).
const ADDRESS_UNREACHABLE: u8 = 3;

/// The kind of an ICMP error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Answer {
    /// No peer has the destination, or the peer has no endpoint.
    Unreachable,
    /// The packet is too big; this many bytes would fit.
    TooBig(u16),
}

/// The error for a packet, unless none is permitted.
pub(super) fn answer(packet: &[u8], answer: Answer) -> Option<Vec<u8>> {
    let ip = Header::parse(packet)?;
    // Only the first fragment gets an error, and no packet to or from a multicast or broadcast address.
    let offset = ip.source.is_ipv4() && packet[6] & 0x1f | packet[7] != 0;
    if offset || !is_one_host(ip.source) || !is_one_host(ip.destination) || is_error(packet, &ip) {
        return None;
    }
    match (ip.source, ip.destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => answer_v4(packet, from, to, answer),
        (IpAddr::V6(from), IpAddr::V6(to)) => answer_v6(packet, from, to, answer),
        _ => None,
    }
}

fn is_one_host(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !address.is_unspecified() && !address.is_multicast() && !address.is_loopback() && !broadcast
}

/// Whether a packet is or may be an ICMP error.
fn is_error(packet: &[u8], ip: &Header) -> bool {
    let kind = packet.get(ip.header).copied();
    match ip.protocol {
        // Everything but echo, timestamp, information and mask.
        1 => !matches!(kind, Some(0 | 8 | 13..=18)),
        58 => kind.is_none_or(|kind| kind < 128),
        // Behind extension headers there may be one.
        0 | 43 | 44 | 60 => ip.source.is_ipv6(),
        _ => false,
    }
}

fn answer_v4(packet: &[u8], from: Ipv4Addr, to: Ipv4Addr, answer: Answer) -> Option<Vec<u8>> {
    let quoted = &packet[..packet.len().min(MAX_V4 - IPV4_HEADER - ICMP_HEADER)];
    let (code, mtu) = match answer {
        Answer::Unreachable => (HOST_UNREACHABLE, 0),
        // A packet that may be fragmented is not too big for its sender.
        Answer::TooBig(_) if packet[6] & 0x40 == 0 => return None,
        Answer::TooBig(mtu) => (FRAGMENTATION_NEEDED, mtu),
    };
    let length = IPV4_HEADER + ICMP_HEADER + quoted.len();
    let mut bytes = vec![0; length];
    {
        let (_, body) = bytes.split_at_mut(IPV4_HEADER);
        body[6..8].copy_from_slice(&mtu.to_be_bytes());
        body[ICMP_HEADER..].copy_from_slice(quoted);
        let mut message = icmp::MutableIcmpPacket::new(body)?;
        message.set_icmp_type(IcmpTypes::DestinationUnreachable);
        message.set_icmp_code(IcmpCode::new(code));
        let checksum = icmp::checksum(&message.to_immutable());
        message.set_checksum(checksum);
    }
    let mut header = ipv4::MutableIpv4Packet::new(&mut bytes)?;
    header.set_version(4);
    header.set_header_length(5);
    // Internetwork control, as routers send (RFC 1812, 4.3.2.5).
    header.set_dscp(48);
    header.set_total_length(u16::try_from(length).ok()?);
    header.set_ttl(TTL);
    header.set_next_level_protocol(IpNextHeaderProtocols::Icmp);
    header.set_source(to);
    header.set_destination(from);
    let checksum = ipv4::checksum(&header.to_immutable());
    header.set_checksum(checksum);
    Some(header.packet().to_vec())
}

fn answer_v6(packet: &[u8], from: Ipv6Addr, to: Ipv6Addr, answer: Answer) -> Option<Vec<u8>> {
    let quoted = &packet[..packet.len().min(MAX_V6 - IPV6_HEADER - ICMP_HEADER)];
    let (kind, code, mtu) = match answer {
        Answer::Unreachable => (Icmpv6Types::DestinationUnreachable, ADDRESS_UNREACHABLE, 0),
        Answer::TooBig(mtu) => (Icmpv6Types::PacketTooBig, 0, u32::from(mtu)),
    };
    let length = IPV6_HEADER + ICMP_HEADER + quoted.len();
    let mut bytes = vec![0; length];
    {
        let (_, body) = bytes.split_at_mut(IPV6_HEADER);
        body[4..8].copy_from_slice(&mtu.to_be_bytes());
        body[ICMP_HEADER..].copy_from_slice(quoted);
        let mut message = icmpv6::MutableIcmpv6Packet::new(body)?;
        message.set_icmpv6_type(kind);
        message.set_icmpv6_code(Icmpv6Code::new(code));
        let checksum = icmpv6::checksum(&message.to_immutable(), &to, &from);
        message.set_checksum(checksum);
    }
    let mut header = ipv6::MutableIpv6Packet::new(&mut bytes)?;
    header.set_version(6);
    header.set_payload_length(u16::try_from(length - IPV6_HEADER).ok()?);
    header.set_next_header(IpNextHeaderProtocols::Icmpv6);
    header.set_hop_limit(TTL);
    header.set_source(to);
    header.set_destination(from);
    Some(header.packet().to_vec())
}

/// Limits errors to 50 at once and 100 a second: enough for people and for path MTU discovery, and too few to
/// keep the thread busy.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When the allowance is full again.
    paid: Option<Time>,
}

const COST: Duration = Duration::from_millis(10);
const BURST: Duration = Duration::from_millis(500);

impl Pace {
    /// Whether one more error may be sent now.
    pub(super) fn allows(&mut self, now: Time) -> bool {
        let paid = self.paid.map_or(now, |paid| paid.max(now)) + COST;
        let allowed = paid.since(now) <= BURST;
        if allowed {
            self.paid = Some(paid);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wireguard::checksum;

    fn v4(protocol: u8, body: &[u8]) -> Vec<u8> {
        let length = u8::try_from(20 + body.len()).unwrap();
        let header = [
            0x45, 0, 0, length, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        [&header[..], body].concat()
    }

    fn v6(next: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet[4..6].copy_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
        packet.extend(Ipv6Addr::LOCALHOST.to_bits().wrapping_add(1).to_be_bytes());
        packet.extend(Ipv6Addr::LOCALHOST.to_bits().wrapping_add(2).to_be_bytes());
        packet.extend(body);
        packet
    }

    #[test]
    fn an_error_has_the_unreachable_host_as_its_source() {
        let packet = v4(17, &[0; 40]);
        let told = answer(&packet, Answer::Unreachable).unwrap();
        let ip = Header::parse(&told).unwrap();
        assert_eq!(
            (ip.source, ip.destination),
            ([10, 0, 0, 2].into(), [10, 0, 0, 1].into())
        );
        assert_eq!((ip.length, ip.protocol), (told.len(), 1));
        assert_eq!(told[20..22], [3, 1]);
        assert_eq!(told[28..], packet);
        assert_eq!(checksum::fold(checksum::sum(&told[..20])), 0xffff);
        assert_eq!(checksum::fold(checksum::sum(&told[20..])), 0xffff);

        let packet = v6(17, &[0; 2000]);
        let told = answer(&packet, Answer::TooBig(1280)).unwrap();
        let ip = Header::parse(&told).unwrap();
        assert_eq!((told.len(), ip.length), (1280, 1280));
        assert_eq!(told[40..42], [2, 0]);
        assert_eq!(told[44..48], 1280_u32.to_be_bytes());
        let pseudo = checksum::pseudo_header(ip.source, ip.destination, 58, 1240);
        assert_eq!(checksum::fold(pseudo + checksum::sum(&told[40..])), 0xffff);
    }

    #[test]
    fn no_error_is_sent_for_errors_fragments_and_multicast() {
        let with = |change: fn(&mut Vec<u8>)| {
            let mut packet = v4(17, &[0; 8]);
            change(&mut packet);
            packet
        };
        for (what, packet) in [
            ("an error", v4(1, &[3, 1, 0, 0])),
            ("an error of version 6", v6(58, &[1, 0, 0, 0])),
            ("an empty message", v4(1, &[])),
            ("a later fragment", with(|packet| packet[7] = 3)),
            ("to many", with(|packet| packet[16] = 224)),
            ("to all", with(|packet| packet[16..20].fill(255))),
            ("from nowhere", with(|packet| packet[12..16].fill(0))),
            ("no packet", vec![0x45]),
        ] {
            assert_eq!(answer(&packet, Answer::Unreachable), None, "{what}");
        }
        assert!(
            answer(&v4(1, &[8, 0, 0, 0]), Answer::Unreachable).is_some(),
            "an echo request"
        );
        let fragmentable = with(|packet| packet[6] = 0);
        assert_eq!(answer(&fragmentable, Answer::TooBig(1280)), None);
    }

    #[test]
    fn errors_are_limited() {
        let mut pace = Pace::default();
        let time = |millis: u64| Time::from_duration(Duration::from_millis(1000 + millis));
        assert_eq!((0..1000).filter(|_| pace.allows(time(0))).count(), 50);
        assert_eq!(
            (1..=1000)
                .filter(|&millis| pace.allows(time(millis)))
                .count(),
            100
        );
    }
}
