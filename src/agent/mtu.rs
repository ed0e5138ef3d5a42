//! The sizes that the tunnel begins with. Pure; `probe::path_mtu` measures the paths.

use crate::config::Mtu;
use crate::probe::Sizes;
use crate::probe::path_mtu::ETHERNET;
use crate::wireguard::overhead;
use crate::wireguard::packet::LEAST_IPV6;

/// What the tunnel adds to a packet at most. IPv4 outside takes less, but an endpoint may move from one family to the
/// other. Kilo takes off as much.
const OVERHEAD: u32 = overhead(true);
/// The most that `auto` gives a path before it is measured, and external peers: 1,500 bytes without the overhead, the
/// MTU of `wg-quick`.
///
/// The MTU of a NIC says nothing of the path beyond the first router. With 9,000 bytes on the NIC and
/// 1,500 between the regions a tunnel of 8,920 has every full packet fragmented, and gets none through
/// where fragments are dropped.
const MOST: u32 = ETHERNET - OVERHEAD;
/// The most that a TUN link takes, with room for the tunnel's headers.
const LARGEST: u32 = 65_455;
/// What every host takes over IPv4 (RFC 791, section 3.1), and the least that `--mtu` takes.
const LEAST_IPV4: u32 = 576;

/// The MTU in bytes that is used where the path is not measured, and until it is.
///
/// `underlay` is the MTU of the link that leads out, where it is known; `ipv6` tells whether the tunnel
/// carries IPv6.
pub fn of(choice: Mtu, underlay: Option<u32>, ipv6: bool) -> u32 {
    // Below it the kernel turns IPv6 off on a link.
    let least = if ipv6 { LEAST_IPV6.into() } else { LEAST_IPV4 };
    match (choice, underlay) {
        (Mtu::Bytes(bytes), _) => bytes,
        (Mtu::Auto, Some(underlay)) => underlay.saturating_sub(OVERHEAD).clamp(least, MOST),
        (Mtu::Auto, None) => MOST,
    }
}

/// The sizes that a measured path may have; `None` where the operator has fixed the MTU.
///
/// Together with [`of`]: `underlay` and `ipv6` are the same.
pub fn sizes(choice: Mtu, underlay: Option<u32>, ipv6: bool) -> Option<Sizes> {
    (choice == Mtu::Auto).then(|| Sizes {
        start: of(choice, underlay, ipv6),
        // Where it is not known, it is usually Ethernet's.
        underlay: underlay.unwrap_or(ETHERNET),
    })
}

/// The MTU in bytes of a link that carries what the largest measured path does.
pub fn most(sizes: Sizes) -> u32 {
    let most = sizes.underlay.saturating_sub(overhead(false));
    most.clamp(sizes.start, LARGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nic_of_9000_bytes_does_not_make_a_tunnel_of_8920() {
        assert_eq!(of(Mtu::Auto, Some(9000), false), 1420);
        assert_eq!(of(Mtu::Auto, Some(1500), false), 1420);
        assert_eq!(of(Mtu::Auto, None, false), 1420);
    }

    #[test]
    fn a_small_underlay_makes_a_small_tunnel() {
        assert_eq!(of(Mtu::Auto, Some(1400), true), 1320);
        // VXLAN within VXLAN: the underlay is a cloud's overlay of 1,450 bytes.
        assert_eq!(of(Mtu::Auto, Some(1450), true), 1370);
        // With IPv6 inside the link needs 1,280; without it nothing has to be fragmented.
        assert_eq!(of(Mtu::Auto, Some(1300), true), 1280);
        assert_eq!(of(Mtu::Auto, Some(1300), false), 1220);
        assert_eq!(of(Mtu::Auto, Some(0), false), 576);
    }

    #[test]
    fn the_operator_may_say_more() {
        assert_eq!(of(Mtu::Bytes(8920), Some(9000), false), 8920);
        assert_eq!(of(Mtu::Bytes(8920), None, true), 8920);
    }

    #[test]
    fn a_measured_path_may_carry_what_the_link_does_and_a_fixed_mtu_measures_none() {
        let jumbo = sizes(Mtu::Auto, Some(9000), false).unwrap();
        assert_eq!(
            (jumbo.start, jumbo.underlay, most(jumbo)),
            (1420, 9000, 8940)
        );
        let usual = sizes(Mtu::Auto, None, true).unwrap();
        assert_eq!((usual.start, most(usual)), (1420, 1440));
        let small = sizes(Mtu::Auto, Some(1300), true).unwrap();
        assert_eq!((small.start, most(small)), (1280, 1280));
        assert_eq!(sizes(Mtu::Bytes(8920), Some(9000), false), None);
    }
}
