//! The wire format of echoes and answers, and the IP packets around them. Pure.
//!
//! Every message has the same length, so no answer is longer than its echo:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | `SVEC` |
//! | 4 | 1 | version, 1 |
//! | 5 | 1 | kind: 1 echo, 2 answer |
//! | 6 | 1 | flags: 1 draining, 2 forwards, 4 knows that the receiver drains, 8 the bitmap is about direct paths |
//! | 7 | 1 | zero |
//! | 8 | 8 | the token: random in an echo, repeated in its answer |
//! | 16 | 8 | the token of the last answer that the sender has received over this path; 0 before the first |
//! | 24 | 8 | the generation of the list that the bitmap is about |
//! | 32 | 64 | bitmap: bit *i* (of byte *i* / 8, the lowest first) is set if segment *i* is not reached |
//!
//! An answer's bitmap is about the remote segments of the sender's region. An echo has one with flag 8 alone, which
//! leaders set, about all segments: to a node of the own region it marks those that the sender does not reach directly,
//! to a leader elsewhere those to which it does not relay.
//!
//! Numbers are big-endian. A message of another length, version or kind is refused.

use std::net::{IpAddr, SocketAddr};

use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::{ipv4, ipv6, udp};

use crate::wireguard::packet::{Header, IPV4_HEADER, IPV6_HEADER, UDP, UDP_HEADER};

/// The bytes of a message.
pub const LENGTH: usize = 96;
/// One bit for each segment. Segments beyond it count as reached.
pub type Bitmap = [u8; 64];

const MAGIC: [u8; 4] = *b"SVEC";
const VERSION: u8 = 1;
const DRAINING: u8 = 1;
const FORWARDS: u8 = 2;
const KNOWS: u8 = 4;
const DIRECT: u8 = 8;
const HOP_LIMIT: u8 = 64;
/// Network control (RFC 4594, 3.1): echoes are not dropped before the traffic that they speak for.
const DSCP: u8 = 48;

/// The kind of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Asks for an answer.
    Echo,
    /// Answers an echo.
    Answer,
}

/// An echo or an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    /// Which of them.
    pub kind: Kind,
    /// Whether the sender is about to stop.
    pub draining: bool,
    /// Whether the sender forwards for its region.
    pub forwards: bool,
    /// Whether the sender knows that the receiver is about to stop.
    pub knows: bool,
    /// Whether the bitmap of an echo is about the direct paths of its sender. Without it an echo has no bitmap.
    pub direct: bool,
    /// The token.
    pub token: u64,
    /// The token of the last answer that the sender has received; 0 before the first.
    pub acknowledged: u64,
    /// The generation of the list that the bitmap is about.
    pub generation: u64,
    /// The segments that are not reached.
    pub unreached: Bitmap,
}

impl Message {
    /// The bytes of the message.
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self.kind {
            Kind::Echo => 1,
            Kind::Answer => 2,
        };
        let draining = if self.draining { DRAINING } else { 0 };
        let forwards = if self.forwards { FORWARDS } else { 0 };
        let knows = if self.knows { KNOWS } else { 0 };
        let direct = if self.direct { DIRECT } else { 0 };
        let mut bytes = Vec::with_capacity(LENGTH);
        bytes.extend(MAGIC);
        bytes.extend([VERSION, kind, draining | forwards | knows | direct, 0]);
        bytes.extend(self.token.to_be_bytes());
        bytes.extend(self.acknowledged.to_be_bytes());
        bytes.extend(self.generation.to_be_bytes());
        bytes.extend(self.unreached);
        bytes
    }

    /// Reads a message; `None` where the bytes are none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LENGTH] = bytes.try_into().ok()?;
        let number = |at: usize| {
            let (number, _) = bytes[at..].split_first_chunk()?;
            Some(u64::from_be_bytes(*number))
        };
        if bytes[..4] != MAGIC || bytes[4] != VERSION {
            return None;
        }
        let kind = match bytes[5] {
            1 => Kind::Echo,
            2 => Kind::Answer,
            _ => return None,
        };
        Some(Self {
            kind,
            draining: bytes[6] & DRAINING != 0,
            forwards: bytes[6] & FORWARDS != 0,
            knows: bytes[6] & KNOWS != 0,
            direct: bytes[6] & DIRECT != 0,
            token: number(8)?,
            acknowledged: number(16)?,
            generation: number(24)?,
            unreached: bytes[32..].try_into().ok()?,
        })
    }

    /// A bitmap in which no segment is marked.
    pub const NOTHING: Bitmap = [0; 64];

    /// Whether the bitmap has a bit for the segment of this number.
    pub fn covers(&self, segment: usize) -> bool {
        segment / 8 < self.unreached.len()
    }

    /// Whether the segment of this number is marked as not reached.
    pub fn lacks(&self, segment: usize) -> bool {
        let byte = self.unreached.get(segment / 8);
        byte.is_some_and(|byte| byte & 1 << (segment % 8) != 0)
    }

    /// Marks the segment of this number as not reached.
    pub fn set_lacking(&mut self, segment: usize) {
        Self::mark(&mut self.unreached, segment);
    }

    /// Marks the segment of this number in a bitmap.
    pub fn mark(bitmap: &mut Bitmap, segment: usize) {
        if let Some(byte) = bitmap.get_mut(segment / 8) {
            *byte |= 1 << (segment % 8);
        }
    }
}

/// A UDP datagram in an IP packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Datagram<'a> {
    /// The sender.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
    /// What it carries.
    pub payload: &'a [u8],
}

/// The UDP datagram in an IP packet; `None` for anything else, fragments among it.
///
/// The checksum is not verified: the kernel leaves it to the link to fill in, and the token, or the tunnel, says
/// more.
pub fn datagram(packet: &[u8]) -> Option<Datagram<'_>> {
    let ip = Header::parse(packet)?;
    if ip.protocol != UDP || ip.fragment {
        return None;
    }
    let segment = packet.get(ip.header..ip.length)?;
    let (header, rest) = segment.split_at_checked(UDP_HEADER)?;
    let number = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let length = usize::from(number(4)).checked_sub(UDP_HEADER)?;
    Some(Datagram {
        from: SocketAddr::new(ip.source, number(0)),
        to: SocketAddr::new(ip.destination, number(2)),
        payload: rest.get(..length)?,
    })
}

/// The IP packet of a UDP datagram; `None` if the addresses are of two families, or it is too long.
pub fn packet(datagram: &Datagram<'_>) -> Option<Vec<u8>> {
    let Datagram { from, to, payload } = datagram;
    let length = UDP_HEADER + payload.len();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut bytes = vec![0; IPV4_HEADER + length];
            let (_, body) = bytes.split_at_mut(IPV4_HEADER);
            write_udp(body, datagram, |message| {
                udp::ipv4_checksum(message, &source, &destination)
            })?;
            let total = u16::try_from(bytes.len()).ok()?;
            let mut header = ipv4::MutableIpv4Packet::new(&mut bytes)?;
            header.set_version(4);
            header.set_header_length(5);
            header.set_dscp(DSCP);
            header.set_total_length(total);
            header.set_flags(ipv4::Ipv4Flags::DontFragment);
            header.set_ttl(HOP_LIMIT);
            header.set_next_level_protocol(IpNextHeaderProtocols::Udp);
            header.set_source(source);
            header.set_destination(destination);
            let checksum = ipv4::checksum(&header.to_immutable());
            header.set_checksum(checksum);
            Some(bytes)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut bytes = vec![0; IPV6_HEADER + length];
            let (_, body) = bytes.split_at_mut(IPV6_HEADER);
            write_udp(body, datagram, |message| {
                udp::ipv6_checksum(message, &source, &destination)
            })?;
            let mut header = ipv6::MutableIpv6Packet::new(&mut bytes)?;
            header.set_version(6);
            header.set_traffic_class(DSCP << 2);
            header.set_payload_length(u16::try_from(length).ok()?);
            header.set_next_header(IpNextHeaderProtocols::Udp);
            header.set_hop_limit(HOP_LIMIT);
            header.set_source(source);
            header.set_destination(destination);
            Some(bytes)
        }
        _ => None,
    }
}

fn write_udp(
    body: &mut [u8],
    datagram: &Datagram<'_>,
    checksum: impl Fn(&udp::UdpPacket<'_>) -> u16,
) -> Option<()> {
    let length = u16::try_from(body.len()).ok()?;
    let mut message = udp::MutableUdpPacket::new(body)?;
    message.set_source(datagram.from.port());
    message.set_destination(datagram.to.port());
    message.set_length(length);
    message.set_payload(datagram.payload);
    let sum = checksum(&message.to_immutable());
    // Zero says that there is none (RFC 768).
    message.set_checksum(if sum == 0 { u16::MAX } else { sum });
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> Message {
        let mut message = Message {
            kind: Kind::Answer,
            draining: true,
            forwards: false,
            knows: true,
            direct: true,
            token: 0x0102_0304_0506_0708,
            acknowledged: 9,
            generation: 0xa0,
            unreached: [0; 64],
        };
        message.set_lacking(0);
        message.set_lacking(11);
        message
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let bytes = message().encode();
        assert_eq!(bytes.len(), LENGTH);
        assert_eq!(bytes[..8], *b"SVEC\x01\x02\x0d\x00");
        assert_eq!(bytes[8..16], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!((bytes[23], bytes[31]), (9, 0xa0));
        assert_eq!((bytes[32], bytes[33], bytes[34]), (1, 8, 0));
        assert_eq!(Message::parse(&bytes), Some(message()));
        assert!(message().lacks(11) && !message().lacks(12));
    }

    #[test]
    fn a_segment_beyond_the_bitmap_counts_as_reached() {
        let mut message = message();
        message.set_lacking(512);
        assert!(!message.lacks(512));
    }

    #[test]
    fn other_lengths_versions_and_kinds_are_refused() {
        let good = message().encode();
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Message::parse(&bytes)
        };
        assert_eq!(with(0, b's'), None);
        assert_eq!(with(4, 2), None);
        assert_eq!(with(5, 0), None);
        assert_eq!(with(5, 3), None);
        assert_eq!(Message::parse(&good[..LENGTH - 1]), None);
        assert_eq!(Message::parse(&[&good[..], &[0]].concat()), None);
        assert_eq!(Message::parse(&[]), None);
    }

    #[test]
    fn a_packet_has_the_checksums_that_a_kernel_verifies() {
        let payload = message().encode();
        for (from, to) in [
            ("10.4.255.254:3785", "10.42.3.0:40000"),
            ("[fd00::fe]:3785", "[fd42:3::]:40000"),
        ] {
            let sent = Datagram {
                from: address(from),
                to: address(to),
                payload: &payload,
            };
            let bytes = packet(&sent).unwrap();
            assert_eq!(datagram(&bytes), Some(sent));
            let header = Header::parse(&bytes).unwrap().header;
            let body = udp::UdpPacket::new(&bytes[header..]).unwrap();
            let expected = match (sent.from.ip(), sent.to.ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    let ip = ipv4::Ipv4Packet::new(&bytes).unwrap();
                    assert_eq!(ip.get_checksum(), ipv4::checksum(&ip));
                    udp::ipv4_checksum(&body, &from, &to)
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => udp::ipv6_checksum(&body, &from, &to),
                _ => unreachable!(),
            };
            assert_eq!(body.get_checksum(), expected);
        }
    }

    #[test]
    fn addresses_of_two_families_make_no_packet() {
        let mixed = Datagram {
            from: address("10.4.0.1:1"),
            to: address("[fd00::1]:1"),
            payload: &[],
        };
        assert_eq!(packet(&mixed), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = datagram(&bytes);
            if let Some(message) = Message::parse(&bytes) {
                prop_assert_eq!(bytes.len(), LENGTH);
                let _ = message.encode();
            }
        }

        #[test]
        fn what_is_written_is_read_again(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            v6 in any::<bool>(),
            ports in any::<(u16, u16)>(),
        ) {
            let (from, to) = if v6 { ("fd00::1", "fd00::2") } else { ("10.4.0.1", "10.42.1.0") };
            let sent = Datagram {
                from: SocketAddr::new(from.parse().unwrap(), ports.0),
                to: SocketAddr::new(to.parse().unwrap(), ports.1),
                payload: &payload,
            };
            let bytes = packet(&sent).unwrap();
            prop_assert_eq!(datagram(&bytes), Some(sent));
            prop_assert_eq!(datagram(&bytes[..bytes.len() - 1]), None);
        }
    }
}
