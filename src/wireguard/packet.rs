//! IP headers: the fields that the tunnel reads.
//!
//! Pure. The bytes may be anything.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU8;

/// The bytes of an IPv4 header without options.
pub const IPV4_HEADER: usize = 20;
/// The bytes of an IPv6 header.
pub const IPV6_HEADER: usize = 40;
/// The bytes of a UDP header.
pub const UDP_HEADER: usize = 8;
/// The bytes of an ICMP error before the packet that it quotes.
pub const ICMP_HEADER: usize = 8;
/// Every link carries IPv6 packets of this many bytes (RFC 8200, 5).
pub const LEAST_IPV6: u16 = 1280;
/// The protocol number of TCP.
pub const TCP: u8 = 6;
/// The protocol number of UDP.
pub const UDP: u8 = 17;

/// The bytes of the headers of a UDP packet, without IPv4 options and IPv6 extensions.
pub const fn udp_headers(is_v6: bool) -> usize {
    let ip = if is_v6 { IPV6_HEADER } else { IPV4_HEADER };
    ip + UDP_HEADER
}

/// The fields of the header of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The bytes of the packet.
    pub length: usize,
    /// The bytes of the header, with IPv4 options, without IPv6 extensions.
    pub header: usize,
    /// The protocol of what follows the header; an IPv6 extension counts as one.
    pub protocol: u8,
    /// Whether the packet is a fragment, so that no ports can be read from it.
    pub fragment: bool,
    /// The two bits of explicit congestion notification.
    pub ecn: Ecn,
}

/// Explicit congestion notification (RFC 3168, 5).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(u8)]
pub enum Ecn {
    /// The sender does not support it.
    #[default]
    NotCapable = 0,
    /// Capable, code point 01.
    Ect1 = 1,
    /// Capable, code point 10.
    Ect0 = 2,
    /// The packet has met congestion.
    Congested = 3,
}

impl Ecn {
    /// The code point in the low bits of a TOS or traffic class.
    pub const fn from_bits(tos: u8) -> Self {
        match tos & 3 {
            0 => Self::NotCapable,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Congested,
        }
    }

    /// The mark of a packet with this one in its outer header (RFC 6040, 4.2); `None` drops it.
    pub const fn decapsulate(self, inner: Self) -> Option<Self> {
        match (self, inner) {
            (Self::Congested, Self::NotCapable) => None,
            (Self::Congested, _) => Some(Self::Congested),
            (Self::Ect1, Self::Ect0) => Some(Self::Ect1),
            (Self::NotCapable | Self::Ect0 | Self::Ect1, _) => Some(inner),
        }
    }
}

/// Whether a datagram may be cut into fragments.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Fragments {
    /// By this host and by routers, since the size of the path is not known.
    #[default]
    Allowed,
    /// Nowhere (IPv4: the flag "don't fragment").
    None,
    /// It is larger than the path: this host cuts IPv6 to what every path takes, and routers cut IPv4.
    Small,
}

/// The fields of the outer header of a datagram that depend on the packet in it, or on the path.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Outer {
    /// The congestion bits (RFC 6040, 4.1).
    pub ecn: Ecn,
    /// The hop limit; `None` leaves it to the system.
    pub hops: Option<NonZeroU8>,
    /// Whether it may be fragmented.
    pub fragments: Fragments,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl Header {
    /// Reads the header of a packet, which may be followed by padding.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        Self::parse_piece(packet).filter(|header| header.length <= packet.len())
    }

    /// Reads the header from the first piece of a packet.
    pub fn parse_piece(piece: &[u8]) -> Option<Self> {
        match piece.first()? >> 4 {
            4 => Self::parse_v4(piece),
            6 => Self::parse_v6(piece),
            _ => None,
        }
    }

    fn parse_v4(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; IPV4_HEADER] = packet.first_chunk()?;
        let header = usize::from(fixed[0] & 15) * 4;
        let length = usize::from(u16_at(fixed, 2)?);
        if header < IPV4_HEADER || length < header {
            return None;
        }
        let [.., s0, s1, s2, s3, d0, d1, d2, d3] = *fixed;
        Some(Self {
            source: Ipv4Addr::new(s0, s1, s2, s3).into(),
            destination: Ipv4Addr::new(d0, d1, d2, d3).into(),
            length,
            header,
            protocol: fixed[9],
            // More fragments, or an offset.
            fragment: u16_at(fixed, 6)? & 0x3fff != 0,
            ecn: Ecn::from_bits(fixed[1]),
        })
    }

    fn parse_v6(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; IPV6_HEADER] = packet.first_chunk()?;
        let length = IPV6_HEADER + usize::from(u16_at(fixed, 4)?);
        let source: [u8; 16] = *fixed[8..].first_chunk()?;
        let destination: [u8; 16] = *fixed[24..].first_chunk()?;
        Some(Self {
            source: Ipv6Addr::from(source).into(),
            destination: Ipv6Addr::from(destination).into(),
            length,
            header: IPV6_HEADER,
            protocol: fixed[6],
            fragment: fixed[6] == 44,
            ecn: Ecn::from_bits(fixed[1] >> 4),
        })
    }

    /// A number that is the same for all packets of a flow, in one direction.
    pub fn flow_hash(&self, packet: &[u8]) -> u64 {
        let ports = match self.protocol {
            TCP | UDP if !self.fragment => packet.get(self.header..self.header + 4),
            _ => None,
        };
        let mut hash = Fnv::default();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                hash.write(&source.octets());
                hash.write(&destination.octets());
            }
            (source, destination) => {
                for address in [source, destination] {
                    if let IpAddr::V6(address) = address {
                        hash.write(&address.octets());
                    }
                }
            }
        }
        // Only the first fragment has ports, so the ports of fragments do not count.
        hash.write(&[self.protocol]);
        hash.write(ports.unwrap_or_default());
        hash.0
    }
}

/// FNV-1a, to spread flows: fast on a dozen bytes, and an attacker gains nothing by choosing its result.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Sets the congestion bits of a packet that [`Header::parse`] accepted, with its checksum.
pub fn set_ecn(packet: &mut [u8], ecn: Ecn) {
    let Some(&[first, second]) = packet.first_chunk() else {
        return;
    };
    if first >> 4 == 6 {
        packet[1] = second & !0x30 | (ecn as u8) << 4;
        return;
    }
    let marked = second & !3 | ecn as u8;
    packet[1] = marked;
    if let Some(checksum) = packet.get_mut(10..12) {
        // RFC 1624: HC' = ~(~HC + ~m + m').
        let old = u16::from_be_bytes([checksum[0], checksum[1]]);
        let mut sum = u32::from(!old)
            + u32::from(!u16::from_be_bytes([first, second]))
            + u32::from(u16::from_be_bytes([first, marked]));
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        let new = !u16::try_from(sum).unwrap_or(0xffff);
        checksum.copy_from_slice(&new.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wireguard::checksum;

    const V4: [u8; 24] = [
        0x45, 0x02, 0, 24, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 53, 0, 54,
    ];

    #[test]
    fn a_header_is_read_only_if_the_packet_is_complete() {
        let header = Header::parse(&V4).unwrap();
        assert_eq!(header.source, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(header.destination, IpAddr::from([10, 0, 0, 2]));
        assert_eq!(
            (header.length, header.header, header.protocol),
            (24, 20, UDP)
        );
        assert_eq!(header.ecn, Ecn::Ect0);

        assert!((0..24).all(|length| Header::parse(&V4[..length]).is_none()));
    }

    #[test]
    fn a_header_longer_than_its_packet_is_refused() {
        let mut packet = V4;
        packet[0] = 0x4f;
        assert_eq!(Header::parse(&packet), None);
        packet[0] = 0x41;
        assert_eq!(Header::parse(&packet), None);
    }

    /// The table of RFC 6040, figure 4, with its "currently unused" cells as forwarded.
    #[test]
    fn congestion_marks_move_to_the_inner_packet_as_in_rfc_6040() {
        use Ecn::{Congested, Ect0, Ect1, NotCapable};
        for (outer, row) in [
            (
                NotCapable,
                [Some(NotCapable), Some(Ect0), Some(Ect1), Some(Congested)],
            ),
            (
                Ect0,
                [Some(NotCapable), Some(Ect0), Some(Ect1), Some(Congested)],
            ),
            (
                Ect1,
                [Some(NotCapable), Some(Ect1), Some(Ect1), Some(Congested)],
            ),
            (
                Congested,
                [None, Some(Congested), Some(Congested), Some(Congested)],
            ),
        ] {
            for (inner, expected) in [NotCapable, Ect0, Ect1, Congested].into_iter().zip(row) {
                assert_eq!(
                    outer.decapsulate(inner),
                    expected,
                    "{outer:?} around {inner:?}"
                );
            }
        }
    }

    #[test]
    fn fragments_of_one_datagram_are_one_flow() {
        let mut first = V4;
        first[6] = 0x20;
        let mut second = V4;
        second[7] = 3;
        second[20] = 99;

        let hash = |packet: &[u8]| Header::parse(packet).unwrap().flow_hash(packet);
        assert_eq!(hash(&first), hash(&second));
        assert_ne!(hash(&first), hash(&V4));
    }

    proptest! {
        #[test]
        fn marking_keeps_the_checksum_right(mut packet in prop::array::uniform20(any::<u8>()), bits in 0_u8..4) {
            packet[0] = 0x45;
            packet[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(&packet));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());

            set_ecn(&mut packet, Ecn::from_bits(bits));
            prop_assert_eq!(packet[1] & 3, bits);
            prop_assert_eq!(checksum::fold(checksum::sum(&packet)), 0xffff);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(packet in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Some(header) = Header::parse(&packet) {
                prop_assert!(header.header <= header.length && header.length <= packet.len());
                header.flow_hash(&packet);
            }
        }
    }
}
