//! Reports changes in the kernel that affect the agent.
//!
//! An event says only that the agent has to look: the agent reads the state again, and finds nothing to do
//! if it made the change itself. Open the monitor before the first look, or a change in between is missed.

use std::collections::BTreeMap;
use std::io;

use anyhow::Context as _;
use netlink_packet_core::{NetlinkDeserializable, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::RouteMessage;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use rtnetlink::MulticastGroup;

use super::netlink::{Netlink, messages};
use super::nfnetlink::NftMessage;
use super::{dump, link, nft, route};
use crate::state::{MAIN, Table};

/// The groups of rtnetlink that the monitor subscribes to.
const ROUTE_GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv6Rule,
];
/// `NFNLGRP_NFTABLES`
const NFTABLES_GROUP: u32 = 7;
/// Room for notifications about some thousand of the agent's own routes, in bytes.
const RECEIVE_BUFFER: usize = 4 << 20;

/// What a change in the kernel affects.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// The node's plan: the agent's own link, addresses, routes, rules and nft table, flannel's devices and
    /// routes, or the node's other addresses, links and default routes.
    pub plan: bool,
    /// Other programs' nft tables. The agent makes none of them, but they may drop its packets.
    pub firewall: bool,
}

/// The kernel's notifications for one network namespace.
pub struct Monitor {
    route: TokioSocket,
    nftables: TokioSocket,
    classifier: Classifier,
}

impl Monitor {
    /// Subscribes; `interface` is the tunnel's link, whether or not it exists yet.
    ///
    /// Needs a tokio runtime.
    pub fn open(interface: &str) -> anyhow::Result<Self> {
        let route = subscribe(NETLINK_ROUTE, &ROUTE_GROUPS.map(|group| group as u32))
            .context("subscribing to rtnetlink")?;
        let nftables =
            subscribe(NETLINK_NETFILTER, &[NFTABLES_GROUP]).context("subscribing to nf_tables")?;
        let mut classifier = Classifier {
            interface: interface.to_owned(),
            links: BTreeMap::new(),
        };
        let mut netlink = Netlink::open(NETLINK_ROUTE).context("opening a socket to rtnetlink")?;
        for found in dump::links(&mut netlink)? {
            classifier.remember(found);
        }
        Ok(Self {
            route,
            nftables,
            classifier,
        })
    }

    /// Waits for a change that affects the agent. Changes that arrived together are one event.
    ///
    /// Cancel-safe: a dropped call loses no event.
    pub async fn changed(&mut self) -> io::Result<Event> {
        loop {
            let mut event = Event::default();
            tokio::select! {
                first = self.route.recv_from_full() => {
                    drain(&self.route, first, &mut event, |message, event| {
                        event.plan |= self.classifier.affects_plan(message);
                    })?;
                }
                first = self.nftables.recv_from_full() => {
                    drain(&self.nftables, first, &mut event, |message: &NftMessage, event| {
                        event.plan |= message.is_about(nft::TABLE);
                        event.firewall |= message.is_about_another_than(nft::TABLE);
                    })?;
                }
            }
            if event != Event::default() {
                return Ok(event);
            }
        }
    }
}

/// Classifies the messages of one datagram, of rtnetlink or of nf_tables, without knowledge of any link.
pub fn classify(interface: &str, datagram: &[u8]) -> Event {
    let mut classifier = Classifier {
        interface: interface.to_owned(),
        links: BTreeMap::new(),
    };
    let mut event = Event::default();
    messages(datagram, |_, payload| {
        if let NetlinkPayload::InnerMessage(message) = payload {
            event.plan |= classifier.affects_plan(&message);
        }
    });
    messages(datagram, |_, payload: NetlinkPayload<NftMessage>| {
        if let NetlinkPayload::InnerMessage(message) = payload {
            event.plan |= message.is_about(nft::TABLE);
        }
    });
    event
}

fn subscribe(protocol: isize, groups: &[u32]) -> io::Result<TokioSocket> {
    let mut subscriber = TokioSocket::new(protocol)?;
    let socket = subscriber.socket_mut();
    socket.bind(&SocketAddr::new(0, 0))?;
    // Up to the system's limit; less is no error.
    let _ = socket.set_rx_buf_sz(RECEIVE_BUFFER);
    for group in groups {
        socket.add_membership(*group)?;
    }
    Ok(subscriber)
}

/// Reads the first datagram and all others that have arrived.
fn drain<M: NetlinkDeserializable>(
    subscriber: &TokioSocket,
    first: io::Result<(Vec<u8>, SocketAddr)>,
    event: &mut Event,
    mut classify: impl FnMut(&M, &mut Event),
) -> io::Result<()> {
    let mut next = first;
    loop {
        match next {
            Ok((bytes, _)) => messages(&bytes, |_, payload| {
                if let NetlinkPayload::InnerMessage(message) = payload {
                    classify(&message, event);
                }
            }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Notifications were lost: anything may have changed.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                *event = Event {
                    plan: true,
                    firewall: true,
                };
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        next = subscriber.socket_ref().recv_from_full();
    }
}

/// Decides which messages of rtnetlink affect the plan.
#[derive(Debug)]
struct Classifier {
    interface: String,
    /// The last known state of each link.
    links: BTreeMap<u32, KnownLink>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct KnownLink {
    name: String,
    mtu: u32,
    up: bool,
}

impl Classifier {
    fn affects_plan(&mut self, message: &Message) -> bool {
        match message {
            Message::NewLink(message) => self.link(message),
            Message::DelLink(message) => {
                // A link that came while notifications were lost is known from this message alone.
                let known = self.links.remove(&message.header.index);
                let name = known.map_or_else(|| link::from_message(message).name, |link| link.name);
                self.is_watched(&name)
            }
            Message::NewAddress(message) | Message::DelAddress(message) => {
                match link::from_address(message) {
                    // On the tunnel's link, on flannel's devices, or one of the node's own.
                    Some(address) => !address.link_local,
                    None => false,
                }
            }
            Message::NewRoute(message) | Message::DelRoute(message) => route_affects_plan(message),
            Message::NewRule(_) | Message::DelRule(_) => true,
            // A neighbour or a forwarding entry. Those of pods come and go on other links; flannel adds
            // its own.
            Message::DelNeighbour(message) => {
                let known = self.links.get(&message.header.ifindex);
                known.is_some_and(|link| is_flannels(&link.name))
            }
            _ => false,
        }
    }

    /// A link is new or changed.
    fn link(&mut self, message: &LinkMessage) -> bool {
        let found = link::from_message(message);
        let known = self.links.get(&found.index);
        // Ports of bridges belong to pods, which come and go.
        let port = message
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::Controller(_)));
        let changed = known.is_some_and(|known| known.mtu != found.mtu || known.up != found.up);
        // A new link matters when it gets an address.
        let affects = self.is_watched(&found.name) || (changed && !port);
        self.remember(found);
        affects
    }

    fn remember(&mut self, found: link::Found) {
        let link::Found {
            index,
            name,
            mtu,
            up,
            ..
        } = found;
        self.links.insert(index, KnownLink { name, mtu, up });
    }

    /// Whether every change of the link counts: it is the tunnel's or one of flannel's.
    fn is_watched(&self, name: &str) -> bool {
        name == self.interface || is_flannels(name)
    }
}

fn is_flannels(link: &str) -> bool {
    link.starts_with("flannel.") || link.starts_with("flannel-v6.")
}

fn route_affects_plan(message: &RouteMessage) -> bool {
    let id = route::table(message);
    let is_own = Table::ALL.iter().any(|table| table.id() == id);
    let is_default = message.header.destination_prefix_length == 0;
    is_own || (id == MAIN && (is_default || route::may_be_flannels(message)))
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::neighbour::NeighbourMessage;
    use netlink_packet_route::route::{RouteAttribute, RouteProtocol};

    use super::*;
    use crate::state::Scope;

    fn classifier() -> Classifier {
        let mut classifier = Classifier {
            interface: "kilo0".to_owned(),
            links: BTreeMap::new(),
        };
        for (index, name) in [(2, "eth0"), (3, "flannel.1"), (4, "cni0"), (7, "kilo0")] {
            classifier.remember(link::Found {
                index,
                name: name.to_owned(),
                mtu: 1500,
                up: true,
                ..link::Found::default()
            });
        }
        classifier
    }

    fn link_message(index: u32, name: &str, mtu: u32) -> LinkMessage {
        let mut message = link::to_up(index, true);
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(mtu),
        ];
        message
    }

    #[test]
    fn a_link_counts_if_it_is_the_tunnels_flannels_or_changed() {
        let mut classifier = classifier();
        let mut affects = |message| classifier.affects_plan(&message);

        assert!(affects(Message::NewLink(link_message(7, "kilo0", 1420))));
        assert!(affects(Message::DelLink(link::to_index(3))));
        assert!(affects(Message::NewLink(link_message(
            9,
            "flannel.1",
            1450
        ))));
        assert!(affects(Message::NewLink(link_message(2, "eth0", 1400))));
        assert!(!affects(Message::NewLink(link_message(2, "eth0", 1400))));
        assert!(!affects(Message::NewLink(link_message(11, "veth1", 1450))));
    }

    #[test]
    fn the_deletion_of_an_unknown_flannel_link_counts() {
        let message = Message::DelLink(link_message(12, "flannel.1", 1450));
        assert!(classifier().affects_plan(&message));
    }

    #[test]
    fn a_pods_link_that_comes_up_does_not_count() {
        let mut classifier = classifier();
        classifier.affects_plan(&Message::NewLink(link_message(11, "veth1", 1500)));
        let mut port = link_message(11, "veth1", 1450);
        port.attributes.push(LinkAttribute::Controller(4));
        assert!(!classifier.affects_plan(&Message::NewLink(port)));
    }

    #[test]
    fn an_address_counts_unless_it_is_link_local() {
        let mut classifier = classifier();
        let mut affects = |index, net: &str| {
            let message = link::to_address(index, net.parse().unwrap(), Scope::Global);
            classifier.affects_plan(&Message::DelAddress(message))
        };
        assert!(affects(7, "10.42.1.0/32"));
        assert!(affects(3, "10.42.1.0/32"));
        assert!(affects(2, "192.168.50.11/24"));
        assert!(!affects(2, "fe80::1/64"));
    }

    #[test]
    fn only_a_deleted_neighbour_of_flannels_counts() {
        let mut classifier = classifier();
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 3;
        assert!(!classifier.affects_plan(&Message::NewNeighbour(message.clone())));
        assert!(classifier.affects_plan(&Message::DelNeighbour(message.clone())));
        message.header.ifindex = 4;
        assert!(!classifier.affects_plan(&Message::DelNeighbour(message)));
    }

    #[test]
    fn a_route_counts_by_its_table() {
        let mut classifier = classifier();
        let mut affects = |table, length, protocol| {
            let mut message = route::to_dump(false, table);
            message.header.destination_prefix_length = length;
            message.header.protocol = protocol;
            if protocol != RouteProtocol::Kernel {
                let gateway = std::net::IpAddr::from([10, 42, 2, 0]);
                message
                    .attributes
                    .push(RouteAttribute::Gateway(gateway.into()));
            }
            classifier.affects_plan(&Message::NewRoute(message))
        };
        assert!(affects(5130, 24, RouteProtocol::Static));
        assert!(affects(MAIN, 0, RouteProtocol::Dhcp));
        assert!(affects(MAIN, 24, RouteProtocol::Boot));
        assert!(!affects(MAIN, 24, RouteProtocol::Bgp));
        assert!(!affects(MAIN, 24, RouteProtocol::Kernel));
        assert!(!affects(255, 32, RouteProtocol::Kernel));
        assert!(!affects(100, 0, RouteProtocol::Boot));
    }
}
