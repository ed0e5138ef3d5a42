//! The addresses that are inside a region, so that flannel may send VXLAN there in clear.
//!
//! A label alone does not put a node into a region, because a kubelet may label its own Node. The networks of a
//! region are those that the operator declares (`--region-cidr`), else the link network of its oldest member.
//! A member outside of them is reached through a tunnel of its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::address::is_public;
use super::{Claim, InterfaceAddr, Node, RegionName, SegmentName, Settings};

/// The networks of all regions that have any.
#[derive(Debug, Default)]
pub(super) struct Regions {
    networks: BTreeMap<RegionName, Vec<IpNet>>,
}

impl Regions {
    /// `members` are the nodes that take part, each with its own private address.
    pub(super) fn new<'a>(
        settings: &Settings,
        members: impl IntoIterator<Item = (&'a Node, InterfaceAddr)>,
    ) -> Self {
        let mut eldest = BTreeMap::new();
        for (node, address) in members {
            let rank = (
                node.ledger.rank(&membership(node)),
                node.created,
                &node.name,
            );
            let entry = eldest.entry(&node.region).or_insert((rank, address));
            if rank < entry.0 {
                *entry = (rank, address);
            }
        }
        let mut networks = settings.region_networks.clone();
        networks.retain(|_, networks| !networks.is_empty());
        for (region, (_, address)) in eldest {
            let found = || vec![link_network(address)];
            networks.entry(region.clone()).or_insert_with(found);
        }
        Self { networks }
    }

    /// The networks of a region; `None` where they are not known.
    pub(super) fn networks(&self, region: &RegionName) -> Option<&[IpNet]> {
        self.networks.get(region).map(Vec::as_slice)
    }

    /// Whether an address is in the networks of a region. Where those are not known, it is not.
    pub(super) fn contain(&self, region: &RegionName, ip: IpAddr) -> bool {
        let networks = self.networks(region).unwrap_or_default();
        networks.iter().any(|network| network.contains(&ip))
    }

    /// The address with the part of its link's network that is inside the region's networks: a node cannot
    /// widen its region by what it publishes about its link.
    pub(super) fn clip(&self, region: &RegionName, address: InterfaceAddr) -> InterfaceAddr {
        let networks = self.networks(region).unwrap_or_default();
        let ip = address.addr();
        let containing = networks.iter().filter(|network| network.contains(&ip));
        let length = containing.map(IpNet::prefix_len).max();
        let own = address.prefix_len();
        let length = length.map_or(own, |net| net.max(own));
        IpNet::new(ip, length).unwrap_or(address)
    }
}

/// The claim that a node makes by its label: membership in its region.
pub(super) fn membership(node: &Node) -> Claim {
    Claim::Region(SegmentName::Location(node.region.clone()))
}

/// The network of a node's link. Where the link has one address alone, as in clouds that route everything, it
/// is the private block that contains the address.
fn link_network(address: InterfaceAddr) -> IpNet {
    if address.prefix_len() < address.max_prefix_len() {
        return address.trunc();
    }
    let ip = address.addr();
    let block = PRIVATE_V4.iter().map(|net| IpNet::V4(*net));
    let mut blocks = block.chain([IpNet::V6(UNIQUE_LOCAL)]);
    let block = blocks.find(|block| block.contains(&ip) && !is_public(ip));
    block.unwrap_or(address)
}

/// RFC 1918, and RFC 6598 of carriers.
const PRIVATE_V4: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
];
/// RFC 4193.
const UNIQUE_LOCAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_of_one_address_stands_for_its_private_block() {
        for (address, network) in [
            ("192.168.50.11/24", "192.168.50.0/24"),
            ("10.0.0.2/32", "10.0.0.0/8"),
            ("172.20.0.2/32", "172.16.0.0/12"),
            ("192.168.1.2/32", "192.168.0.0/16"),
            ("100.64.1.1/32", "100.64.0.0/10"),
            ("fd12::1/128", "fc00::/7"),
            ("203.0.113.9/32", "203.0.113.9/32"),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(link_network(address).to_string(), network, "{address}");
        }
    }

    #[test]
    fn a_nodes_link_network_does_not_widen_its_region() {
        let region = RegionName("nd".into());
        let network = "192.168.50.0/24".parse().unwrap();
        let regions = Regions {
            networks: [(region.clone(), vec![network])].into(),
        };
        let clip = |address: &str| regions.clip(&region, address.parse().unwrap()).to_string();
        assert_eq!(clip("192.168.50.66/8"), "192.168.50.66/24");
        assert_eq!(clip("192.168.50.66/28"), "192.168.50.66/28");
    }
}
