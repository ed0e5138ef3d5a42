//! The packet around a relayed datagram: an IP header, a UDP header, and the datagram.
//!
//! Pure. The bytes of a received packet may be anything.

use std::net::IpAddr;
use std::ops::Range;

use super::checksum;
use super::config::RELAY_PORT;
use super::drops::Dropped;
use super::nested::Nesting;
use super::packet::{Header, IPV4_HEADER, Outer, UDP, UDP_HEADER, udp_headers};

/// The hop limit, unless the datagram holds a packet of a tunnel that has fewer left.
const HOPS: u8 = 64;

/// The headers around the datagrams of a run, without what depends on their length.
pub(super) struct Headers {
    source: IpAddr,
    destination: IpAddr,
    outer: Outer,
    /// The sum of the addresses, the protocol and the ports.
    pseudo: u64,
}

impl Headers {
    /// Headers between two addresses of one family, with these congestion bits and hop limit.
    pub(super) fn new(source: IpAddr, destination: IpAddr, outer: Outer) -> Self {
        let ports = u64::from(RELAY_PORT) * 2;
        Self {
            source,
            destination,
            outer,
            pseudo: checksum::pseudo_header(source, destination, UDP, 0) + ports,
        }
    }

    fn hops(&self) -> u8 {
        self.outer.hops.map_or(HOPS, Into::into)
    }

    /// The effect on the datagram to the relay.
    pub(super) fn nesting(&self) -> Nesting {
        Nesting::around(self.hops())
    }

    /// The bytes of the packet around a datagram.
    pub(super) const fn length(&self, datagram: usize) -> usize {
        udp_headers(self.destination.is_ipv6()) + datagram
    }

    /// Appends the packet around a datagram. Both checksums are complete.
    ///
    /// IPv4 would allow a UDP packet without one, but then the relay could not join packets (`gso`).
    pub(super) fn wrap(&self, datagram: &[u8], packet: &mut Vec<u8>) {
        let length = UDP_HEADER + datagram.len();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = [0; IPV4_HEADER];
                header[0] = 0x45;
                header[1] = self.outer.ecn as u8;
                header[2..4].copy_from_slice(&clamp(IPV4_HEADER + length).to_be_bytes());
                // Do not fragment: no fragment would be accepted. So no identification is needed (RFC 6864, 4.1).
                header[6] = 0x40;
                header[8] = self.hops();
                header[9] = UDP;
                header[12..16].copy_from_slice(&source.octets());
                header[16..].copy_from_slice(&destination.octets());
                let sum = checksum::finish(checksum::sum(&header));
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                packet.extend(header);
            }
            (source, destination) => {
                let ecn = self.outer.ecn as u8;
                packet.extend([0x60, ecn << 4, 0, 0]);
                packet.extend(clamp(length).to_be_bytes());
                packet.extend([UDP, self.hops()]);
                for address in [source, destination] {
                    packet.extend(octets_v6(address));
                }
            }
        }
        // The length is in the pseudo header too.
        let sum = self.pseudo + 2 * length as u64 + checksum::sum(datagram);
        let sum = match checksum::finish(sum) {
            // Zero would mean "none" (RFC 768).
            0 => 0xffff,
            sum => sum,
        };
        for field in [RELAY_PORT, RELAY_PORT, clamp(length), sum] {
            packet.extend(field.to_be_bytes());
        }
        packet.extend_from_slice(datagram);
    }
}

fn octets_v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn clamp(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

/// Whether a packet is UDP to [`RELAY_PORT`] and no fragment. Its beginning is enough.
#[inline]
pub(super) fn is_relay_packet(ip: &Header, packet: &[u8]) -> bool {
    ip.protocol == UDP
        && !ip.fragment
        && packet.get(ip.header + 2..ip.header + 4) == Some(&RELAY_PORT.to_be_bytes())
}

/// The range of the datagram in a packet for which [`is_relay_packet`] is true. The datagram authenticates itself, so the
/// checksum is not looked at.
///
/// # Errors
/// The reason why it is dropped: a length that does not fit, or another source port.
pub(super) fn open(ip: &Header, packet: &[u8]) -> Result<Range<usize>, Dropped> {
    let start = ip.header + UDP_HEADER;
    let udp = packet.get(ip.header..start).ok_or(Dropped::Malformed)?;
    if udp[..2] != RELAY_PORT.to_be_bytes() {
        return Err(Dropped::ForeignRelay);
    }
    let length = ip.length.checked_sub(ip.header);
    let is_whole = length.is_some_and(|length| udp[4..6] == clamp(length).to_be_bytes());
    if is_whole && start < ip.length {
        Ok(start..ip.length)
    } else {
        Err(Dropped::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU8;

    use proptest::prelude::*;

    use super::super::packet::Ecn;
    use super::*;

    fn wrap(v6: bool, outer: Outer, datagram: &[u8]) -> Vec<u8> {
        let addresses = if v6 {
            ["fd00::1", "fd00::2"]
        } else {
            ["10.4.0.1", "10.4.0.2"]
        };
        let [source, destination] = addresses.map(|address| address.parse().unwrap());
        let mut packet = Vec::new();
        Headers::new(source, destination, outer).wrap(datagram, &mut packet);
        packet
    }

    fn udp_sum(packet: &[u8], ip: &Header) -> u16 {
        let udp = &packet[ip.header..];
        let pseudo = checksum::pseudo_header(ip.source, ip.destination, UDP, udp.len());
        checksum::fold(pseudo + checksum::sum(udp))
    }

    proptest! {
        #[test]
        fn a_datagram_comes_out_of_its_packet_and_the_checksums_are_right(
            datagram in prop::collection::vec(any::<u8>(), 1..2000),
            v6: bool,
        ) {
            let packet = wrap(v6, Outer::default(), &datagram);
            let ip = Header::parse(&packet).unwrap();
            prop_assert_eq!(ip.length, packet.len());
            prop_assert_eq!(packet.len(), udp_headers(v6) + datagram.len());
            prop_assert!(is_relay_packet(&ip, &packet));
            prop_assert_eq!(udp_sum(&packet, &ip), 0xffff);
            if !v6 {
                prop_assert_eq!(checksum::fold(checksum::sum(&packet[..IPV4_HEADER])), 0xffff);
                prop_assert_eq!(packet[6..8].to_vec(), vec![0x40, 0]);
            }
            prop_assert_eq!(&packet[open(&ip, &packet).unwrap()], &datagram[..]);
        }

        #[test]
        fn any_bytes_are_opened_or_refused(packet in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Some(ip) = Header::parse(&packet)
                && is_relay_packet(&ip, &packet)
                && let Ok(range) = open(&ip, &packet)
            {
                prop_assert!(!range.is_empty() && range.end <= packet.len());
            }
        }
    }

    #[test]
    fn a_checksum_of_zero_is_sent_as_its_other_form() {
        // The two bytes are chosen such that the sum of everything is zero.
        let sum = |bytes: [u8; 2]| {
            let packet = wrap(false, Outer::default(), &bytes);
            [packet[26], packet[27]]
        };
        let of_zeros = sum([0, 0]);
        assert_eq!(sum(of_zeros), [0xff, 0xff]);
    }

    #[test]
    fn the_packet_has_the_congestion_bits_and_the_hop_limit_of_the_datagram_in_it() {
        let outer = Outer {
            ecn: Ecn::Ect0,
            hops: NonZeroU8::new(40),
            ..Outer::default()
        };
        for v6 in [false, true] {
            let packet = wrap(v6, outer, b"datagram");
            assert_eq!(Header::parse(&packet).unwrap().ecn, Ecn::Ect0);
            assert_eq!(packet[if v6 { 7 } else { 8 }], 40);
            let packet = wrap(v6, Outer::default(), b"datagram");
            assert_eq!(packet[if v6 { 7 } else { 8 }], HOPS);
        }
    }

    #[test]
    fn another_port_a_fragment_and_a_wrong_length_are_refused() {
        let packet = wrap(false, Outer::default(), b"datagram");
        let parse = |packet: &[u8]| Header::parse(packet).unwrap();
        let change = |at: usize, value: u8| {
            let mut changed = packet.clone();
            changed[at] = value;
            changed
        };
        let from_another = change(21, 7);
        assert_eq!(
            open(&parse(&from_another), &from_another),
            Err(Dropped::ForeignRelay)
        );
        let to_another = change(23, 7);
        assert!(!is_relay_packet(&parse(&to_another), &to_another));
        let fragment = change(6, 0x20);
        assert!(!is_relay_packet(&parse(&fragment), &fragment));
        for length in [0, 7, 15, 17, 200] {
            let changed = change(25, length);
            assert_eq!(open(&parse(&changed), &changed), Err(Dropped::Malformed));
        }
        let empty = wrap(false, Outer::default(), b"");
        assert_eq!(open(&parse(&empty), &empty), Err(Dropped::Malformed));
    }
}
