//! Tunnels in tunnels, and how deep they may nest.
//!
//! A datagram of one tunnel may be a packet of another. If routes lead it back into the first tunnel, it
//! loops, grows by a header each time, is cut into fragments beyond the MTU, and every fragment loops and
//! grows: one echo request becomes as much traffic as the host can produce. The kernel's WireGuard counts its
//! recursion on the stack. Here only the outer header links a datagram to the packet in it. So the hop limit
//! of that header counts: a datagram around a tunnel's datagram has a lower hop limit, in steps that leave
//! room for the longest internet paths, and is dropped when none is left.
//!
//! The steps also hide how many hops the inner datagram has made. Its size shows that it is one.

use std::num::NonZeroU8;

use super::packet::{Header, UDP, UDP_HEADER};

/// The hops that each tunnel around another takes. Seven tunnels may nest if the innermost begins with 64
/// hops, and the first around it has 56; the longest paths on the internet have some 40.
const STEP: u8 = 8;
/// The highest hop limit of a datagram around a tunnel's datagram.
const MOST: u8 = 64 - STEP;

/// The protocol number of IPv6's fragment header.
const IPV6_FRAGMENT: u8 = 44;

/// The effect of a packet on the datagram around it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Nesting {
    /// The packet is no tunnel's datagram: the hop limit is the system's.
    Outermost,
    /// The packet is a tunnel's datagram or may hold a piece of one: the hop limit is this.
    Within(NonZeroU8),
    /// The packet is a tunnel's datagram within too many tunnels.
    TooDeep,
}

impl Nesting {
    /// The effect of a packet whose header has been read.
    pub(super) fn of(packet: &[u8], ip: &Header) -> Self {
        if !is_datagram(packet, ip) {
            return Self::Outermost;
        }
        let hops = packet.get(if ip.source.is_ipv4() { 8 } else { 7 });
        Self::around(hops.copied().unwrap_or(0))
    }

    /// The effect of a tunnel's datagram with this hop limit.
    pub(super) fn around(hops: u8) -> Self {
        let hops = hops.saturating_sub(1) / STEP * STEP;
        NonZeroU8::new(hops.min(MOST)).map_or(Self::TooDeep, Self::Within)
    }

    /// The hop limit of the datagram, where it is not the system's.
    pub(super) fn hops(self) -> Option<NonZeroU8> {
        match self {
            Self::Within(hops) => Some(hops),
            Self::Outermost | Self::TooDeep => None,
        }
    }
}

/// Whether a packet is a WireGuard message in UDP (paper, 5.4), or a fragment of UDP, which may be a piece of
/// one.
fn is_datagram(packet: &[u8], ip: &Header) -> bool {
    match ip.protocol {
        UDP if ip.fragment => true,
        UDP => matches!(
            packet.get(ip.header + UDP_HEADER..ip.header + UDP_HEADER + 4),
            Some([1..=4, 0, 0, 0])
        ),
        IPV6_FRAGMENT => ip.source.is_ipv6() && packet.get(ip.header) == Some(&UDP),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(hops: u8, protocol: u8, fragment: u8, body: &[u8]) -> Vec<u8> {
        let length = u8::try_from(20 + body.len()).unwrap();
        let header = [
            0x45, 0, 0, length, 0, 0, 0, fragment, hops, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        [&header[..], body].concat()
    }

    fn v6(hops: u8, next: u8, body: &[u8]) -> Vec<u8> {
        let length = u8::try_from(body.len()).unwrap();
        let header = [0x60, 0, 0, 0, 0, length, next, hops];
        [&header[..], &[1; 32], body].concat()
    }

    fn of(packet: &[u8]) -> Nesting {
        Nesting::of(packet, &Header::parse(packet).unwrap())
    }

    const MESSAGE: [u8; 40] = {
        let mut bytes = [0; 40];
        bytes[UDP_HEADER] = 4;
        bytes
    };

    #[test]
    fn each_tunnel_lowers_the_hop_limit_until_none_is_left() {
        for packet in [v4, |hops, protocol, _, body: &[u8]| {
            v6(hops, protocol, body)
        }] {
            let mut hops = 64;
            let mut steps = Vec::new();
            while let Nesting::Within(left) = of(&packet(hops, UDP, 0, &MESSAGE)) {
                hops = left.get();
                steps.push(hops);
            }
            assert_eq!(steps, [56, 48, 40, 32, 24, 16, 8]);
            assert_eq!(of(&packet(8, UDP, 0, &MESSAGE)), Nesting::TooDeep);
        }
    }

    #[test]
    fn the_outer_header_hides_the_hops_of_the_inner_datagram() {
        for hops in [57, 60, 64, 128, 255] {
            assert_eq!(of(&v4(hops, UDP, 0, &MESSAGE)).hops(), NonZeroU8::new(56));
        }
    }

    #[test]
    fn other_packets_leave_the_hop_limit_to_the_system() {
        let mut query = MESSAGE;
        query[UDP_HEADER + 3] = 1;
        for packet in [
            v4(1, UDP, 0, &query),
            v4(1, UDP, 0, &MESSAGE[..UDP_HEADER + 3]),
            v4(1, 6, 0, &MESSAGE),
            v4(1, 6, 3, &MESSAGE),
            v6(1, UDP, &query),
            v6(1, IPV6_FRAGMENT, &[6; 20]),
        ] {
            assert_eq!(of(&packet), Nesting::Outermost, "{packet:?}");
        }
    }

    #[test]
    fn any_fragment_of_udp_counts_as_a_datagram() {
        assert_eq!(of(&v4(64, UDP, 3, &[7; 40])).hops(), NonZeroU8::new(56));
        assert_eq!(of(&v4(8, UDP, 3, &[7; 40])), Nesting::TooDeep);
        assert_eq!(
            of(&v6(64, IPV6_FRAGMENT, &[UDP; 20])).hops(),
            NonZeroU8::new(56)
        );
    }
}
