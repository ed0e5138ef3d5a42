//! What the agent asks about the node itself: where it leads out, what its addresses are.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Context as _;
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};

use super::{Kernel, link, list, route};

const MAIN: u32 = 254;

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
}

/// How the kernel would send a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Path {
    /// The link.
    pub link: String,
    /// The source address.
    pub src: Option<IpAddr>,
    /// The gateway.
    pub via: Option<IpAddr>,
}

impl Kernel {
    /// The link of the best default route, IPv4 first; `None` where there is no default route.
    ///
    /// The tunnel's MTU follows from this link's.
    pub fn uplink(&self) -> anyhow::Result<Option<Uplink>> {
        let mut netlink = self.netlink();
        for v6 in [false, true] {
            let routes = list::routes(&mut netlink, v6, MAIN)?;
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
            let links = list::links(&mut netlink)?;
            let Some(found) = links.into_iter().find(|link| link.index == index) else {
                continue;
            };
            let addresses = list::addresses(&mut netlink, index)?;
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

    /// The addresses on the node's own links: without loopback and link-local ones, those of the
    /// tunnel, of flannel's devices, of the pods' bridge and of dummy links. Other bridges may well
    /// hold the node's own address.
    pub fn node_addresses(&self) -> anyhow::Result<Vec<LocalAddress>> {
        let mut netlink = self.netlink();
        let links = list::links(&mut netlink)?;
        let addresses = list::addresses(&mut netlink, 0)?;
        let of = |address: &link::Address| {
            let link = links.iter().find(|link| link.index == address.index)?;
            let skipped = self.is_overlay(link);
            (!skipped && !address.link_local && !address.net.addr().is_loopback()).then(|| {
                LocalAddress {
                    link: link.name.clone(),
                    net: address.net,
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
        let links = list::links(&mut netlink)?;
        let real = links
            .iter()
            .filter(|link| link.ethernet && !self.is_overlay(link));
        let real = real.map(|link| link.index).collect::<BTreeSet<_>>();
        let mut connected = BTreeSet::new();
        for v6 in [false, true] {
            for message in list::routes(&mut netlink, v6, MAIN)? {
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

    /// Whether the address is one of the node's own, on whatever link.
    pub fn is_local(&self, ip: IpAddr) -> anyhow::Result<bool> {
        let addresses = list::addresses(&mut self.netlink(), 0)?;
        Ok(addresses.iter().any(|address| address.net.addr() == ip))
    }

    /// How a packet with this mark (0 is none) would be sent; `None` where it would not.
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
            // The route is unreachable, prohibit or blackhole (invalid), or there is none at all.
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
        let names = list::links(&mut netlink)?
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
