//! The Internet checksum (RFC 1071), in pieces that can be added up.

use std::net::IpAddr;

/// The sum of a stretch of bytes that begins at an even offset.
///
/// Sums of stretches of even length may be added.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    // Added in the host's byte order and swapped once: the sum of swapped words is the swapped sum.
    // Four bytes at a time into eight, which the compiler turns into vector instructions.
    let (words, rest) = bytes.as_chunks::<4>();
    // Wrapping, because a check for overflow, which 16 GiB would have to be summed for, would keep it
    // from doing so.
    let mut total = words.iter().fold(0_u64, |total, &word| {
        total.wrapping_add(u64::from(u32::from_ne_bytes(word)))
    });
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    u64::from(fold(total).to_be())
}

/// A sum in 16 bits.
pub(super) fn fold(sum: u64) -> u16 {
    let mut sum = (sum & 0xffff_ffff) + (sum >> 32);
    // Each step leaves at most one carry more than 16 bits hold: 33, 18, 17, 16.
    for _ in 0..3 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum & 0xffff).unwrap_or(0xffff)
}

/// The checksum of a sum.
pub(super) fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// The sum of the pseudo header of TCP and UDP over IPv4 (RFC 9293, 3.1) or IPv6 (RFC 8200, 8.1).
pub(super) fn pseudo_header(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    length: usize,
) -> u64 {
    let address = |address: IpAddr| match address {
        IpAddr::V4(address) => sum(&address.octets()),
        IpAddr::V6(address) => sum(&address.octets()),
    };
    address(source) + address(destination) + u64::from(protocol) + length as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(bytes: &[u8]) -> u64 {
        bytes
            .chunks(2)
            .map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u64::from(low)))
            .sum()
    }

    #[test]
    fn the_example_of_rfc_1071_adds_up() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)), 0xddf2);
    }

    proptest! {
        #[test]
        fn the_quick_sum_agrees_with_the_plain_one(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let (quick, plain) = (fold(sum(&bytes)), fold(plain(&bytes)));
            // Zero has two forms in ones' complement.
            prop_assert_eq!(quick % 0xffff, plain % 0xffff);
        }
    }
}
