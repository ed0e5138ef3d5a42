//! Restores flannel's entries for the nodes of the region after its vxlan device was recreated or an entry
//! was deleted. flannel replays no lease until the other node changes or flannel itself restarts, so those
//! nodes would stay cut off.
//!
//! Only missing entries are added, with the values that flannel would use, so flannel's own later
//! replacement changes nothing. Nodes of other regions get none: traffic to them does not use flannel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::RouteMessageBuilder;

use crate::flannel::{Backend, Flannel, Lease, Mac, Vtep};
use crate::state::NextHop;

/// The metric that the kernel gives an IPv6 route without one. flannel sets none.
const IPV6_METRIC: u32 = 1024;

/// The kernel's state of flannel.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FlannelState {
    /// Its vxlan devices, of any VNI.
    pub vteps: Vec<Vtep>,
    /// The next hops of routes in table main, where there is only one.
    pub next_hops: BTreeMap<IpNet, NextHop>,
    /// The permanent neighbours on its devices, by the device's index.
    pub neighbours: BTreeMap<(u32, IpAddr), Mac>,
    /// The forwarding entries of its devices, by index and hardware address: where VXLAN is sent.
    pub forwarding: BTreeMap<(u32, Mac), BTreeSet<IpAddr>>,
}

/// One entry of flannel's that is missing. `Display` prints what an operator would type.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Repair {
    /// The hardware address behind the gateway to a node's pods.
    Neighbour {
        /// flannel's device.
        vtep: Link,
        /// The gateway: the first address of the node's pod CIDR.
        ip: IpAddr,
        /// The node's `VtepMAC`.
        mac: Mac,
    },
    /// Where VXLAN for a hardware address is sent.
    Forwarding {
        /// flannel's device.
        vtep: Link,
        /// The node's `VtepMAC`.
        mac: Mac,
        /// The node's `public-ip`.
        to: IpAddr,
    },
    /// The route to a node's pods, in table main.
    Route {
        /// flannel's device.
        vtep: Link,
        /// The node's pod CIDR.
        dst: IpNet,
    },
}

/// A link by its index, so that no entry is added to a recreated link, and its name, for people.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// The kernel's index.
    pub index: u32,
    /// The name.
    pub name: String,
}

/// Another node of the region: its pod CIDRs, and its flannel lease.
pub type Member<'a> = (&'a [IpNet], &'a Lease);

/// What is missing to reach the pods of `members` by flannel's vxlan devices. Pure.
pub fn missing(flannel: &Flannel, members: &[Member<'_>], found: &FlannelState) -> Vec<Repair> {
    let mut repairs = Vec::new();
    if flannel.backend != Backend::Vxlan {
        return repairs;
    }
    for (pod_cidrs, lease) in members
        .iter()
        .filter(|(_, lease)| lease.backend == Some(Backend::Vxlan))
    {
        for &dst in *pod_cidrs {
            let v6 = dst.addr().is_ipv6();
            let Some(vtep) = flannel.vteps.iter().find(|vtep| is_for(vtep, v6)) else {
                continue;
            };
            let (mac, to) = if v6 {
                (lease.vtep_mac_v6, lease.public_ipv6.map(IpAddr::from))
            } else {
                (lease.vtep_mac, lease.public_ip.map(IpAddr::from))
            };
            let (Some(mac), Some(to)) = (mac, to) else {
                continue;
            };
            // Not for this device: a node with another VNI, and a prefix outside flannel's network.
            let inside = flannel.networks.iter().any(|net| net.contains(&dst));
            if inside && lease.vni.is_none_or(|vni| vni == vtep.vni) {
                repairs.extend(missing_of(
                    vtep,
                    dst,
                    mac,
                    to,
                    flannel.direct_routing,
                    found,
                ));
            }
        }
    }
    repairs
}

fn is_for(vtep: &Vtep, v6: bool) -> bool {
    vtep.name == crate::flannel::device_name(vtep.vni, v6)
}

fn missing_of(
    vtep: &Vtep,
    dst: IpNet,
    mac: Mac,
    to: IpAddr,
    direct_routing: bool,
    found: &FlannelState,
) -> Vec<Repair> {
    let gateway = dst.network();
    let link = || Link {
        index: vtep.index,
        name: vtep.name.clone(),
    };
    let route = found.next_hops.get(&dst);
    // With DirectRouting, flannel may reach the node without VXLAN. Then another route exists, or will.
    if direct_routing && route.is_none_or(|hop| hop.dev != vtep.name) {
        return Vec::new();
    }
    let mut repairs = Vec::new();
    if !found.neighbours.contains_key(&(vtep.index, gateway)) {
        repairs.push(Repair::Neighbour {
            vtep: link(),
            ip: gateway,
            mac,
        });
    }
    // An entry with another destination is flannel's own, and newer than the annotation.
    if !found.forwarding.contains_key(&(vtep.index, mac)) {
        repairs.push(Repair::Forwarding {
            vtep: link(),
            mac,
            to,
        });
    }
    // Last, as flannel does: the entries that the route needs exist before it is used.
    if route.is_none() {
        repairs.push(Repair::Route { vtep: link(), dst });
    }
    repairs
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Neighbour { vtep, ip, mac } => write!(
                f,
                "ip neigh add {ip} lladdr {} dev {} nud permanent",
                Colons(*mac),
                vtep.name
            ),
            Self::Forwarding { vtep, mac, to } => write!(
                f,
                "bridge fdb add {} dst {to} dev {} self permanent",
                Colons(*mac),
                vtep.name
            ),
            Self::Route { vtep, dst } => write!(
                f,
                "ip route add {dst} via {} dev {} onlink",
                dst.network(),
                vtep.name
            ),
        }
    }
}

struct Colons(Mac);

impl fmt::Display for Colons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The request's flags. A repair fails where flannel was quicker, except for a neighbour: the kernel makes
/// an incomplete entry as soon as traffic needs one, so a neighbour is replaced.
pub(super) fn flags(repair: &Repair) -> u16 {
    match repair {
        Repair::Neighbour { .. } => NLM_F_CREATE | NLM_F_REPLACE,
        Repair::Forwarding { .. } | Repair::Route { .. } => NLM_F_CREATE | NLM_F_EXCL,
    }
}

/// The message that makes a repair.
pub(super) fn to_message(repair: &Repair) -> RouteNetlinkMessage {
    match repair {
        Repair::Neighbour { vtep, ip, mac } => {
            let mut message = neighbour(family(*ip), vtep.index, *mac);
            let ip = to_neighbour_address(*ip);
            message.attributes.push(NeighbourAttribute::Destination(ip));
            RouteNetlinkMessage::NewNeighbour(message)
        }
        Repair::Forwarding { vtep, mac, to } => {
            let mut message = neighbour(AddressFamily::Bridge, vtep.index, *mac);
            message.header.flags = NeighbourFlags::Own;
            let to = to_neighbour_address(*to);
            message.attributes.push(NeighbourAttribute::Destination(to));
            RouteNetlinkMessage::NewNeighbour(message)
        }
        Repair::Route { vtep, dst } => {
            RouteNetlinkMessage::NewRoute(to_route(vtep, *dst, dst.network()))
        }
    }
}

/// The route through the gateway that flannel would choose.
fn to_route(vtep: &Link, dst: IpNet, gateway: IpAddr) -> RouteMessage {
    const OF_ONE_FAMILY: &str = "destination and gateway are of one family";
    let message = RouteMessageBuilder::<IpAddr>::new()
        .protocol(RouteProtocol::Boot)
        .output_interface(vtep.index)
        .onlink()
        .destination_prefix(gateway, dst.prefix_len())
        .and_then(|message| message.gateway(gateway))
        .expect(OF_ONE_FAMILY);
    if gateway.is_ipv6() {
        message.priority(IPV6_METRIC).build()
    } else {
        message.build()
    }
}

/// The request for all neighbours, or forwarding entries, of a link.
pub(super) fn to_dump(family: AddressFamily, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.attributes = vec![NeighbourAttribute::IfIndex(index)];
    message
}

fn neighbour(family: AddressFamily, index: u32, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    message
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn to_neighbour_address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }
}

/// The link, addresses and state in a message about a neighbour or a forwarding entry.
pub(super) fn from_message(message: &NeighbourMessage) -> Option<(u32, IpAddr, Mac)> {
    // `bridge` sets NUD_NOARP, too; flannel does not.
    if u16::from(message.header.state) & u16::from(NeighbourState::Permanent) == 0 {
        return None;
    }
    let mut ip = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(address) => ip = to_ip(address),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(&bytes[..]).ok().map(Mac);
            }
            _ => {}
        }
    }
    Some((message.header.ifindex, ip?, mac?))
}

fn to_ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some((*ip).into()),
        NeighbourAddress::Inet6(ip) => Some((*ip).into()),
        // Of a forwarding entry, whose family is neither.
        NeighbourAddress::Other(bytes) => {
            let v4 = <[u8; 4]>::try_from(&bytes[..]).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(&bytes[..]).map(IpAddr::from))
                .ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x8e, 0x4d, 0x2a, 0x67, 0xf4, 0xa5]);

    fn flannel() -> Flannel {
        let vtep = |name: &str, index| Vtep {
            name: name.to_owned(),
            index,
            vni: 1,
            port: 8472,
            mac: Mac([2; 6]),
            mtu: 1450,
            local: None,
            parent: Some("eth0".to_owned()),
            addresses: Vec::new(),
        };
        Flannel {
            backend: Backend::Vxlan,
            direct_routing: false,
            networks: vec![
                "10.42.0.0/16".parse().unwrap(),
                "fd42::/56".parse().unwrap(),
            ],
            subnets: Vec::new(),
            mtu: 1450,
            vteps: vec![vtep("flannel.1", 3), vtep("flannel-v6.1", 4)],
            next_hops: BTreeMap::new(),
        }
    }

    fn pods() -> Vec<IpNet> {
        vec![
            "10.42.2.0/24".parse().unwrap(),
            "fd42:0:0:2::/64".parse().unwrap(),
        ]
    }

    fn lease() -> Lease {
        Lease {
            backend: Some(Backend::Vxlan),
            vni: Some(1),
            vtep_mac: Some(MAC),
            vtep_mac_v6: Some(Mac([6; 6])),
            public_ip: Some([192, 168, 50, 12].into()),
            public_ipv6: Some("2001:db8:50::12".parse().unwrap()),
        }
    }

    fn commands(flannel: &Flannel, pods: &[IpNet], found: &FlannelState) -> String {
        let repairs = missing(flannel, &[(pods, &lease())], found);
        let lines: Vec<String> = repairs.iter().map(Repair::to_string).collect();
        lines.join("\n")
    }

    fn v4_route(dev: &str) -> FlannelState {
        let hop = NextHop {
            via: Some([10, 42, 2, 0].into()),
            dev: dev.to_owned(),
            onlink: true,
        };
        FlannelState {
            next_hops: [("10.42.2.0/24".parse().unwrap(), hop)].into(),
            ..FlannelState::default()
        }
    }

    #[test]
    fn a_recreated_device_gets_every_entry_that_flannel_would_add() {
        insta::assert_snapshot!(commands(&flannel(), &pods(), &FlannelState::default()), @r"
        ip neigh add 10.42.2.0 lladdr 8e:4d:2a:67:f4:a5 dev flannel.1 nud permanent
        bridge fdb add 8e:4d:2a:67:f4:a5 dst 192.168.50.12 dev flannel.1 self permanent
        ip route add 10.42.2.0/24 via 10.42.2.0 dev flannel.1 onlink
        ip neigh add fd42:0:0:2:: lladdr 06:06:06:06:06:06 dev flannel-v6.1 nud permanent
        bridge fdb add 06:06:06:06:06:06 dst 2001:db8:50::12 dev flannel-v6.1 self permanent
        ip route add fd42:0:0:2::/64 via fd42:0:0:2:: dev flannel-v6.1 onlink
        ");
    }

    #[test]
    fn an_existing_entry_is_left_alone_even_if_it_differs() {
        let mut found = v4_route("flannel.1");
        found
            .neighbours
            .insert((3, [10, 42, 2, 0].into()), Mac([9; 6]));
        found
            .forwarding
            .insert((3, MAC), [IpAddr::from([192, 0, 2, 1])].into());
        let v4 = &pods()[..1];
        assert_eq!(commands(&flannel(), v4, &found), "");

        // Entries of a link with another index do not count.
        let mut recreated = flannel();
        recreated.vteps[0].index = 9;
        assert_eq!(commands(&recreated, v4, &found).lines().count(), 2);
    }

    #[test]
    fn a_node_that_flannel_reaches_directly_gets_no_vxlan_entries() {
        let mut direct = flannel();
        direct.direct_routing = true;
        let v4 = &pods()[..1];
        assert_eq!(commands(&direct, v4, &v4_route("eth0")), "");
        assert_eq!(commands(&direct, v4, &FlannelState::default()), "");
        // A node that it reaches through VXLAN gets the other entries.
        let rest = commands(&direct, v4, &v4_route("flannel.1"));
        assert_eq!(rest.lines().count(), 2, "{rest}");

        let mut host_gw = flannel();
        host_gw.backend = Backend::HostGw;
        assert_eq!(commands(&host_gw, v4, &FlannelState::default()), "");
    }

    #[test]
    fn a_node_that_flannel_would_ignore_gets_no_entries() {
        let found = FlannelState::default();
        let broken: [fn(&mut Lease); 4] = [
            |lease| lease.backend = None,
            |lease| lease.backend = Some(Backend::HostGw),
            |lease| lease.vni = Some(2),
            |lease| (lease.vtep_mac, lease.public_ipv6) = (None, None),
        ];
        for spoil in broken {
            let mut lease = lease();
            spoil(&mut lease);
            assert_eq!(missing(&flannel(), &[(&pods(), &lease)], &found), vec![]);
        }
        let elsewhere = ["10.99.0.0/24".parse().unwrap()];
        assert_eq!(commands(&flannel(), &elsewhere, &found), "");
    }
}
