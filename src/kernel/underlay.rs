//! The node's own network below the mesh: its uplink, addresses, connected networks and paths.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Context as _;
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};

use super::{Rtnetlink, dump, link, route};
use crate::state::{MAIN, Scope};

/// The link the node reaches the internet through.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses, without link-local ones.
    pub addresses: Vec<IpNet>,
}

/// An address of the node's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LocalAddress {
    /// The link it is on.
    pub link: String,
    /// The address with the length of its link's prefix.
    pub net: IpNet,
    /// Whether other nodes may reach the tunnel at it: a stable address of global scope, on a link that
    /// leads out of this node.
    pub offered: bool,
}

/// The kernel's choice for a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Path {
    /// The link.
    pub link: String,
    /// The source address.
    pub src: Option<IpAddr>,
    /// The gateway.
    pub via: Option<IpAddr>,
}

impl Rtnetlink {
    /// The link of the best default route, IPv4 first; `None` where there is no default route.
    ///
    /// The tunnel's MTU follows from this link's.
    pub fn uplink(&self) -> anyhow::Result<Option<Uplink>> {
        let mut netlink = self.netlink();
        for v6 in [false, true] {
            let routes = dump::routes(&mut netlink, v6, MAIN)?;
            let best = routes
                .iter()
                .filter(|route| {
                    route.header.destination_prefix_length == 0
                        && route.header.kind == RouteType::Unicast
                })
                .filter_map(|route| Some((metric(route), link_of(route)?)))
                .min();
            let Some((_, index)) = best else {
                continue;
            };
            let links = dump::links(&mut netlink)?;
            let Some(found) = links.into_iter().find(|link| link.index == index) else {
                continue;
            };
            let addresses = dump::addresses(&mut netlink, index)?;
            return Ok(Some(Uplink {
                name: found.name,
                mtu: found.mtu,
                addresses: addresses
                    .into_iter()
                    .filter(|address| !address.link_local)
                    .map(|address| address.net)
                    .collect(),
            }));
        }
        Ok(None)
    }

    /// The addresses on the node's own links: without loopback and link-local ones, and without those of the
    /// tunnel, of flannel's devices, of the pods' bridge and of dummy links. Other bridges may hold the
    /// node's own address.
    pub fn node_addresses(&self) -> anyhow::Result<Vec<LocalAddress>> {
        let mut netlink = self.netlink();
        let links = dump::links(&mut netlink)?;
        let addresses = dump::addresses(&mut netlink, 0)?;
        let of = |address: &link::Address| {
            let link = links.iter().find(|link| link.index == address.index)?;
            let skipped = self.is_overlay(link);
            let global = address.scope == Scope::Global && address.stable;
            (!skipped && !address.link_local && !address.net.addr().is_loopback()).then(|| {
                LocalAddress {
                    link: link.name.clone(),
                    net: address.net,
                    offered: global && leads_out(link, address.net, &links),
                }
            })
        };
        Ok(addresses.iter().filter_map(of).collect())
    }

    /// The networks this node is connected to: the prefixes of its links, and the routers and hosts that
    /// it reaches without a router where a link's own prefix is a single address.
    ///
    /// Left out are the tunnel's, flannel's and dummy links, the pods' bridge, and links that are tunnels
    /// themselves.
    pub fn connected(&self) -> anyhow::Result<BTreeSet<IpNet>> {
        let mut netlink = self.netlink();
        let links = dump::links(&mut netlink)?;
        let real = links
            .iter()
            .filter(|link| link.ethernet && !self.is_overlay(link));
        let real = real.map(|link| link.index).collect::<BTreeSet<_>>();
        let mut connected = BTreeSet::new();
        for v6 in [false, true] {
            for message in dump::routes(&mut netlink, v6, MAIN)? {
                if message.header.kind != RouteType::Unicast {
                    continue;
                }
                let index = link_of(&message);
                if !index.is_some_and(|index| real.contains(&index)) {
                    continue;
                }
                let is_default = message.header.destination_prefix_length == 0;
                connected.extend(match gateway(&message) {
                    Some(router) => is_default.then(|| IpNet::from(router)),
                    None => route::destination(&message).filter(|_| !is_default),
                });
            }
        }
        connected.retain(|net| !is_link_local(net.addr()));
        Ok(connected)
    }

    /// Whether a link is the tunnel's, flannel's, the pods' bridge, or a dummy: kube-proxy puts every
    /// service's address on one.
    fn is_overlay(&self, link: &link::Found) -> bool {
        let kind = link.kind.as_deref();
        link.name == self.interface
            || link.name.starts_with("flannel")
            || kind == Some("dummy")
            || (kind == Some("bridge") && link.name == super::nft::POD_BRIDGE)
    }

    /// Whether the address is one of the node's own, on any link.
    pub fn is_local(&self, ip: IpAddr) -> anyhow::Result<bool> {
        let addresses = dump::addresses(&mut self.netlink(), 0)?;
        Ok(addresses.iter().any(|address| address.net.addr() == ip))
    }

    /// The path of a packet with this mark (0 is none); `None` if it would not be sent.
    pub fn path_to(&self, ip: IpAddr, mark: u32) -> anyhow::Result<Option<Path>> {
        let mut request = RouteMessage::default();
        request.header = route::to_dump(ip.is_ipv6(), 0).header;
        request.header.destination_prefix_length = if ip.is_ipv6() { 128 } else { 32 };
        request
            .attributes
            .push(RouteAttribute::Destination(ip.into()));
        if mark != 0 {
            request.attributes.push(RouteAttribute::Mark(mark));
        }
        let mut netlink = self.netlink();
        let answers = match netlink.get(RouteNetlinkMessage::GetRoute(request)) {
            Ok(answers) => answers,
            // The route is unreachable, prohibit or blackhole (invalid), or there is no route.
            Err(refused)
                if [
                    libc::EHOSTUNREACH,
                    libc::ENETUNREACH,
                    libc::EACCES,
                    libc::EINVAL,
                ]
                .contains(&refused.errno()) =>
            {
                return Ok(None);
            }
            Err(refused) => return Err(refused).with_context(|| format!("asking the way to {ip}")),
        };
        let names = dump::links(&mut netlink)?
            .into_iter()
            .map(|link| (link.index, link.name))
            .collect();
        Ok(answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(message) => {
                let hop = route::next_hops(message, &names).pop_first()?;
                Some(Path {
                    link: hop.dev,
                    src: source(message),
                    via: hop.via,
                })
            }
            _ => None,
        }))
    }
}

/// Whether a link with this address leads out of the node, by its kind: not to pods, not into a tunnel, and
/// not into another routing domain, which the tunnel's socket does not see.
fn leads_out(link: &link::Found, net: IpNet, links: &[link::Found]) -> bool {
    let controller = link.controller.and_then(|index| {
        let mut links = links.iter();
        links.find(|other| other.index == index)
    });
    if controller.is_some_and(|controller| controller.kind.as_deref() == Some("vrf")) {
        return false;
    }
    match link.kind.as_deref() {
        // On a host, the end of a container's link has at most a gateway's single address. A node that is a
        // container has its own address, in a network, on such a link.
        Some("veth") => net.prefix_len() < net.max_prefix_len(),
        // Bridges of hypervisors, docker and CNI plugins have only ports of virtual machines and pods.
        Some("bridge") => {
            let mut ports = links.iter();
            ports.any(|port| port.controller == Some(link.index) && is_network_card(port))
        }
        Some(_) | None => is_network_card(link),
    }
}

/// Whether a link is hardware, or a virtual link on hardware: a bond, a VLAN, a line to a provider.
fn is_network_card(link: &link::Found) -> bool {
    const KINDS: [&str; 9] = [
        "bond", "hsr", "ipvlan", "macsec", "macvlan", "ppp", "team", "vlan", "wwan",
    ];
    link.kind
        .as_deref()
        .is_none_or(|kind| KINDS.contains(&kind))
}

fn metric(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        })
        .unwrap_or(0)
}

/// The first link a route leads through.
fn link_of(message: &RouteMessage) -> Option<u32> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
            _ => None,
        })
}

/// The router of a route with one next hop.
fn gateway(message: &RouteMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Gateway(address) => route::to_ip(address),
            _ => None,
        })
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn source(message: &RouteMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::PrefSource(address) => route::to_ip(address),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_links_that_lead_out_of_the_node_are_offered() {
        let mut links = Vec::new();
        let mut add = |name: &str, kind: Option<&str>, controller: Option<u32>| {
            links.push(link::Found {
                index: u32::try_from(links.len()).unwrap() + 1,
                name: name.to_owned(),
                kind: kind.map(str::to_owned),
                controller,
                ..link::Found::default()
            });
        };
        add("eth0", None, None);
        add("bond0", Some("bond"), None);
        add("eth0.7", Some("vlan"), None);
        add("ppp0", Some("ppp"), None);
        add("br0", Some("bridge"), None);
        add("eth1", None, Some(5));
        let leading = links_that_lead_out(&links);
        assert_eq!(leading, ["eth0", "bond0", "eth0.7", "ppp0", "br0", "eth1"]);

        let mut links = Vec::new();
        let mut add = |name: &str, kind: &str, controller: Option<u32>| {
            links.push(link::Found {
                index: u32::try_from(links.len()).unwrap() + 1,
                name: name.to_owned(),
                kind: (!kind.is_empty()).then(|| kind.to_owned()),
                controller,
                ..link::Found::default()
            });
        };
        add("docker0", "bridge", None);
        add("veth1", "veth", Some(1));
        add("virbr0", "bridge", None);
        add("vnet0", "tun", Some(3));
        add("blue", "vrf", None);
        add("eth2", "", Some(5));
        for kind in [
            "tun",
            "wireguard",
            "vxlan",
            "geneve",
            "gre",
            "sit",
            "dummy",
            "xfrm",
            "ifb",
        ] {
            add(kind, kind, None);
        }
        let leading = links_that_lead_out(&links);
        // A veth with an address in a network is the uplink of a node that is a container.
        assert_eq!(leading, ["veth1"]);
        assert!(!leads_out(
            &links[1],
            "192.0.2.1/32".parse().unwrap(),
            &links
        ));
    }

    fn links_that_lead_out(links: &[link::Found]) -> Vec<&str> {
        let net = "192.0.2.1/24".parse().unwrap();
        let leading = links.iter().filter(|link| leads_out(link, net, links));
        leading.map(|link| link.name.as_str()).collect()
    }
}
