//! Links and their addresses as netlink messages, and back. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, Emitable as _};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, InfoData, InfoKind, InfoVxlan, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::{AddressMessageBuilder, LinkUnspec};

use crate::flannel::{Mac, Vtep};
use crate::state::Scope;

/// The attribute that nests a link's settings for each family, and that of its family.
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const NLA_F_NESTED: u16 = 1 << 15;
/// `IPV4_DEVCONF_RP_FILTER`
const RP_FILTER: u16 = 8;

/// A link of any kind.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Found {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// Whether it has hardware addresses: it is neither a tunnel of layer 3 nor a loopback.
    pub(super) ethernet: bool,
    /// Its kind, as `ip -d link` prints it; `None` for hardware.
    pub(super) kind: Option<String>,
    /// The index of the bridge, bond or VRF that it is a port of.
    pub(super) controller: Option<u32>,
    pub(super) mac: Option<Mac>,
    /// Only of vxlan links.
    pub(super) vxlan: Option<Vxlan>,
    /// Its `net.ipv4.conf.….rp_filter`; `None` where it carries no IPv4.
    pub(super) rp_filter: Option<i32>,
    /// Its `net.ipv6.conf.….addr_gen_mode`; `None` where it carries no IPv6.
    pub(super) addr_gen_mode: Option<u8>,
}

/// What only a vxlan link has.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Vxlan {
    pub(super) vni: u32,
    pub(super) port: u16,
    pub(super) local: Option<IpAddr>,
    /// The index of the link below.
    pub(super) parent: Option<u32>,
}

/// An address of a link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Address {
    pub(super) index: u32,
    /// Host bits count.
    pub(super) net: IpNet,
    pub(super) scope: Scope,
    /// Whether the kernel made it: `fe80::/10`.
    pub(super) link_local: bool,
    /// Whether it will stay: not a temporary address of the privacy extensions (RFC 8981), not deprecated,
    /// and past duplicate address detection (RFC 4862).
    pub(super) stable: bool,
}

/// The request for all links, without their statistics.
pub(super) fn to_dump() -> LinkMessage {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    message
}

/// The request for one link.
pub(super) fn to_get(name: &str) -> LinkMessage {
    let mut message = to_dump();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    message
}

/// The message that deletes a link.
pub(super) fn to_index(index: u32) -> LinkMessage {
    LinkUnspec::new_with_index(index).build()
}

/// The message that sets a link's MTU, in bytes.
pub(super) fn to_mtu(index: u32, mtu: u32) -> LinkMessage {
    LinkUnspec::new_with_index(index).mtu(mtu).build()
}

/// The message that sets a link up or down.
pub(super) fn to_up(index: u32, up: bool) -> LinkMessage {
    let message = LinkUnspec::new_with_index(index);
    if up { message.up() } else { message.down() }.build()
}

/// The message that sets one of a link's sysctls, by family and name; `None` where netlink has none
/// for it.
pub(super) fn to_sysctl(index: u32, key: &str, value: &str) -> Option<LinkMessage> {
    let (family, setting) = match key {
        "ipv4/rp_filter" => {
            let value: u32 = value.parse().ok()?;
            let setting = DefaultNla::new(RP_FILTER, value.to_ne_bytes().to_vec());
            (
                AddressFamily::Inet,
                nest(IFLA_INET_CONF | NLA_F_NESTED, &setting),
            )
        }
        "ipv6/addr_gen_mode" => {
            let value: u8 = value.parse().ok()?;
            (
                AddressFamily::Inet6,
                DefaultNla::new(IFLA_INET6_ADDR_GEN_MODE, vec![value]),
            )
        }
        _ => return None,
    };
    let family = nest(u16::from(u8::from(family)) | NLA_F_NESTED, &setting);
    let mut message = to_index(index);
    message.attributes.push(LinkAttribute::Other(nest(
        IFLA_AF_SPEC | NLA_F_NESTED,
        &family,
    )));
    Some(message)
}

fn nest(kind: u16, inner: &DefaultNla) -> DefaultNla {
    let mut bytes = vec![0; inner.buffer_len()];
    inner.emit(&mut bytes);
    DefaultNla::new(kind, bytes)
}

/// The link in a message.
pub(super) fn from_message(message: &LinkMessage) -> Found {
    let mut found = Found {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        ..Found::default()
    };
    let mut parent = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::Link(index) => parent = Some(*index),
            LinkAttribute::Controller(index) => {
                found.controller = Some(*index).filter(|at| *at != 0)
            }
            LinkAttribute::Address(bytes) => {
                found.mac = <[u8; 6]>::try_from(&bytes[..]).ok().map(Mac);
            }
            LinkAttribute::AfSpecUnspec(families) => {
                for family in families {
                    found.read_settings(family);
                }
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => found.kind = Some(kind_name(kind)),
                        LinkInfo::Data(InfoData::Vxlan(data)) => {
                            found.vxlan = Some(vxlan(data));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if let Some(vxlan) = &mut found.vxlan {
        vxlan.parent = vxlan.parent.or(parent);
    }
    found
}

fn kind_name(kind: &InfoKind) -> String {
    kind.to_string()
}

fn vxlan(data: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan::default();
    for item in data {
        match item {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Local(address) => vxlan.local = Some((*address).into()),
            InfoVxlan::Local6(address) => vxlan.local = Some((*address).into()),
            InfoVxlan::Link(index) => vxlan.parent = Some(*index),
            _ => {}
        }
    }
    vxlan
}

impl Found {
    /// Whether it is a TUN device: one of packets, not of frames, which would have a hardware address.
    pub(super) fn is_tun(&self) -> bool {
        self.kind.as_deref() == Some("tun") && self.mac.is_none()
    }

    /// Whether it is a WireGuard link of the kernel's, which is what Kilo's `kg` makes.
    pub(super) fn is_wireguard(&self) -> bool {
        self.kind.as_deref() == Some("wireguard")
    }

    fn read_settings(&mut self, family: &AfSpecUnspec) {
        match family {
            AfSpecUnspec::Inet(settings) => {
                for setting in settings {
                    if let AfSpecInet::DevConf(settings) = setting {
                        self.rp_filter = Some(settings.rp_filter);
                    }
                }
            }
            AfSpecUnspec::Inet6(settings) => {
                for setting in settings {
                    if let AfSpecInet6::AddrGenMode(mode) = setting {
                        self.addr_gen_mode = Some(mode.into());
                    }
                }
            }
            _ => {}
        }
    }

    /// flannel's device of this link, if it is one: `flannel.<VNI>` or `flannel-v6.<VNI>`.
    pub(super) fn to_vtep(&self, addresses: &[Address], links: &[Self]) -> Option<Vtep> {
        let vxlan = self.vxlan.as_ref()?;
        let v6 = self.name.starts_with("flannel-v6.");
        if self.name != crate::flannel::device_name(vxlan.vni, v6) {
            return None;
        }
        let parent = vxlan.parent.and_then(|parent| {
            let link = links.iter().find(|link| link.index == parent)?;
            Some(link.name.clone())
        });
        Some(Vtep {
            name: self.name.clone(),
            index: self.index,
            vni: vxlan.vni,
            port: vxlan.port,
            mac: self.mac?,
            mtu: self.mtu,
            local: vxlan.local,
            parent,
            addresses: addresses
                .iter()
                .filter(|address| address.index == self.index && !address.link_local)
                .map(|address| address.net)
                .collect(),
        })
    }
}

/// The request for the addresses of a link, or of all.
pub(super) fn to_address_dump(index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message
}

/// The message that adds an address to a link, or deletes it.
pub(super) fn to_address(index: u32, net: IpNet, scope: Scope) -> AddressMessage {
    let mut message = match net {
        IpNet::V4(net) => AddressMessageBuilder::<Ipv4Addr>::new()
            .index(index)
            .address(net.addr(), net.prefix_len())
            .build(),
        IpNet::V6(net) => AddressMessageBuilder::<Ipv6Addr>::new()
            .index(index)
            .address(net.addr(), net.prefix_len())
            .build(),
    };
    match net {
        IpNet::V4(_) if scope == Scope::Link => message.header.scope = AddressScope::Link,
        IpNet::V4(_) => {}
        // No other node is on the link, so no duplicate can be detected; the address is usable at once.
        IpNet::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
    }
    message
}

/// The address in a message.
pub(super) fn from_address(message: &AddressMessage) -> Option<Address> {
    let header = &message.header;
    let mut address = None;
    // The low byte is in the header too, for kernels that know no more flags.
    let mut flags = AddressFlags::from_bits_retain(header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link `Address` is the other end's.
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => address = address.or(Some(*other)),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let net = IpNet::new(address?, header.prefix_len).ok()?;
    let link_local = match net.addr() {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let scope = match (net, header.scope) {
        (IpNet::V6(_), _) | (_, AddressScope::Universe) => Scope::Global,
        _ => Scope::Link,
    };
    Some(Address {
        index: header.index,
        net,
        scope,
        link_local,
        stable: is_stable(net.addr(), flags),
    })
}

/// In IPv4 the flag of a temporary address marks a secondary address, which is as stable as the first.
fn is_stable(ip: IpAddr, flags: AddressFlags) -> bool {
    let passing = AddressFlags::Deprecated
        | AddressFlags::Tentative
        | AddressFlags::Optimistic
        | AddressFlags::Dadfailed;
    !flags.intersects(passing) && (ip.is_ipv4() || !flags.contains(AddressFlags::Secondary))
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Parseable as _;

    use super::*;

    #[test]
    fn an_address_survives_the_round_trip_through_a_message() {
        for (text, scope) in [
            ("10.42.1.0/32", Scope::Global),
            ("10.4.0.1/32", Scope::Link),
            ("fd00:42::/128", Scope::Global),
        ] {
            let net = text.parse().unwrap();
            let message = to_address(7, net, scope);
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            let found = from_address(&AddressMessage::parse(&bytes[..]).unwrap());
            let expected = Address {
                index: 7,
                net,
                scope,
                link_local: false,
                stable: true,
            };
            assert_eq!(found, Some(expected));
        }
    }

    #[test]
    fn temporary_deprecated_and_tentative_addresses_are_not_stable() {
        let v4 = IpAddr::from([192, 0, 2, 1]);
        let v6 = "2001:db8::1".parse().unwrap();
        for (flags, of_v4, of_v6) in [
            (AddressFlags::Permanent, true, true),
            (AddressFlags::Managetempaddr, true, true),
            // IFA_F_SECONDARY and IFA_F_TEMPORARY are one bit.
            (AddressFlags::Secondary, true, false),
            (AddressFlags::Deprecated, false, false),
            (AddressFlags::Tentative, false, false),
            (AddressFlags::Optimistic, false, false),
            (AddressFlags::Dadfailed, false, false),
        ] {
            assert_eq!(is_stable(v4, flags), of_v4, "{flags:?}");
            assert_eq!(is_stable(v6, flags), of_v6, "{flags:?}");
        }
    }

    #[test]
    fn only_a_wireguard_link_of_the_kernel_is_taken_for_kilos() {
        let of_kind = |kind| {
            let mut message = to_index(7);
            message.attributes = vec![
                LinkAttribute::IfName("kilo0".to_owned()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
            ];
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            from_message(&LinkMessage::parse(&bytes[..]).unwrap())
        };
        assert!(of_kind(InfoKind::Wireguard).is_wireguard());
        for other in [
            InfoKind::Tun,
            InfoKind::Bridge,
            InfoKind::Dummy,
            InfoKind::Veth,
        ] {
            assert!(!of_kind(other).is_wireguard());
        }
        assert!(!Found::default().is_wireguard(), "hardware");
    }

    #[test]
    fn flannels_devices_are_recognised_by_name_and_vni() {
        let parent = Found {
            index: 2,
            name: "eth0".to_owned(),
            ..Found::default()
        };
        let link = |name: &str| Found {
            index: 3,
            name: name.to_owned(),
            mac: Some(Mac([2; 6])),
            vxlan: Some(Vxlan {
                vni: 1,
                port: 8472,
                local: None,
                parent: Some(2),
            }),
            ..Found::default()
        };
        let links = [parent];
        let parent = |name| link(name).to_vtep(&[], &links).map(|vtep| vtep.parent);

        assert_eq!(parent("flannel.1"), Some(Some("eth0".to_owned())));
        assert_eq!(parent("flannel-v6.1"), Some(Some("eth0".to_owned())));
        for name in ["flannel.2", "vxlan.calico", "flannel", "flannel.1.1"] {
            assert_eq!(parent(name), None, "{name}");
        }
    }
}
