//! Kinds of addresses, and maps keyed by prefix.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Whether an address can be reached from anywhere: global unicast, not shared by carriers (RFC
/// 6598), not private. The networks for documentation count as public; the lab's internet is made of
/// them.
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            is_unicast(ip) && !v4.is_private() && !(a == 100 && (64..128).contains(&b))
        }
        // 2000::/3, all that IANA has assigned.
        IpAddr::V6(v6) => v6.octets()[0] & 0xe0 == 0x20,
    }
}

/// Whether Kilo takes an address for public: whether it is outside of 10/8, 172.16/12, 192.168/16 and
/// fd00::/16.
pub fn is_public_to_kilo(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_private(),
        IpAddr::V6(v6) => v6.octets()[..2] != [0xfd, 0],
    }
}

/// Whether packets can be sent to an address of another host: it is neither unspecified (in IPv4 all of
/// 0/8, RFC 1122) nor of a loopback, a link, a group or the reserved 240/4, nor IPv4 mapped into IPv6.
pub fn is_unicast(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            !v4.is_loopback() && !v4.is_link_local() && v4.octets()[0] != 0 && v4.octets()[0] < 224
        }
        IpAddr::V6(v6) => {
            !v6.is_unspecified()
                && !v6.is_loopback()
                && !v6.is_multicast()
                && !v6.is_unicast_link_local()
                && v6.to_ipv4_mapped().is_none()
        }
    }
}

/// Whether two networks have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// The address `offset` after the first of a network, if it still lies in it.
pub(super) fn nth(net: &IpNet, offset: u128) -> Option<IpAddr> {
    let ip = match net.network() {
        IpAddr::V4(first) => {
            let offset = u32::try_from(offset).ok()?;
            IpAddr::V4(Ipv4Addr::from(u32::from(first).checked_add(offset)?))
        }
        IpAddr::V6(first) => IpAddr::V6(Ipv6Addr::from(u128::from(first).checked_add(offset)?)),
    };
    net.contains(&ip).then_some(ip)
}

/// The address `offset` before the last of a network, if it still lies in it.
pub(super) fn nth_last(net: &IpNet, offset: u128) -> Option<IpAddr> {
    let ip = match net.broadcast() {
        IpAddr::V4(last) => {
            let offset = u32::try_from(offset).ok()?;
            IpAddr::V4(Ipv4Addr::from(u32::from(last).checked_sub(offset)?))
        }
        IpAddr::V6(last) => IpAddr::V6(Ipv6Addr::from(u128::from(last).checked_sub(offset)?)),
    };
    net.contains(&ip).then_some(ip)
}

/// Whether an address is one a host of the network may have: not the network's own, and in IPv4 not
/// its broadcast address.
pub(super) fn is_host_of(net: &IpNet, ip: IpAddr) -> bool {
    net.contains(&ip) && ip != net.network() && (ip.is_ipv6() || ip != net.broadcast())
}

/// A map from prefixes that also finds the entries that overlap a prefix.
#[derive(Clone, Debug)]
pub(super) struct PrefixMap<T> {
    entries: BTreeMap<IpNet, T>,
    /// The shortest length stored of each family. Look-ups end there.
    shortest: [u8; 2],
}

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            shortest: [u8::MAX; 2],
        }
    }
}

impl<T> PrefixMap<T> {
    /// Inserts a truncated prefix, keeping the value of one that is there.
    pub(super) fn insert(&mut self, net: IpNet, value: T) {
        let shortest = &mut self.shortest[usize::from(net.addr().is_ipv6())];
        *shortest = net.prefix_len().min(*shortest);
        self.entries.entry(net).or_insert(value);
    }

    /// The value of a prefix.
    pub(super) fn get(&self, net: &IpNet) -> Option<&T> {
        self.entries.get(net)
    }

    /// The entry, if any, that contains all of a truncated prefix or is inside of it.
    pub(super) fn overlapping(&self, net: &IpNet) -> Option<(&IpNet, &T)> {
        self.containing(net).or_else(|| self.inside(net))
    }

    /// The shortest entry that contains all of a prefix.
    pub(super) fn containing(&self, net: &IpNet) -> Option<(&IpNet, &T)> {
        let shortest = self.shortest[usize::from(net.addr().is_ipv6())];
        (shortest..=net.prefix_len()).find_map(|length| {
            let parent = IpNet::new(net.addr(), length).ok()?.trunc();
            self.entries.get_key_value(&parent)
        })
    }

    /// The first entry inside of a prefix.
    fn inside(&self, net: &IpNet) -> Option<(&IpNet, &T)> {
        let (first, value) = self.entries.range(net..).next()?;
        net.contains(first).then_some((first, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carrier_grade_nat_and_link_local_addresses_are_not_public() {
        for (ip, public) in [
            ("203.0.113.10", true),
            ("8.8.8.8", true),
            ("2001:db8::1", true),
            ("100.64.0.1", false),
            ("100.128.0.1", true),
            ("169.254.1.1", false),
            ("192.168.1.1", false),
            ("224.0.0.1", false),
            ("fd12::1", false),
            ("fe80::1", false),
        ] {
            assert_eq!(is_public(ip.parse().unwrap()), public, "{ip}");
        }
    }

    #[test]
    fn kilo_takes_carrier_grade_nat_and_link_local_addresses_for_public() {
        for (ip, public) in [
            ("100.64.0.1", true),
            ("169.254.1.1", true),
            ("fd12::1", true),
            ("fd00::1", false),
            ("172.31.0.1", false),
        ] {
            assert_eq!(is_public_to_kilo(ip.parse().unwrap()), public, "{ip}");
        }
    }

    #[test]
    fn overlaps_are_found_in_both_directions() {
        let mut map = PrefixMap::default();
        map.insert("10.42.1.0/24".parse().unwrap(), 'a');
        map.insert("10.44.0.0/16".parse().unwrap(), 'b');

        let overlapping = |net: &str| map.overlapping(&net.parse().unwrap()).map(|(_, v)| *v);
        assert_eq!(overlapping("10.42.1.5/32"), Some('a'));
        assert_eq!(overlapping("10.42.0.0/16"), Some('a'));
        assert_eq!(overlapping("10.44.3.0/24"), Some('b'));
        assert_eq!(overlapping("10.42.2.0/24"), None);
        assert_eq!(overlapping("fd00::/8"), None);
    }
}
