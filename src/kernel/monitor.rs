//! Tells when something changed in the kernel that concerns the agent.
//!
//! What it tells is only where to look: the agent reads the state afresh and finds nothing to do
//! where the change was its own. Open the monitor before the first look, or what changes in between
//! is missed.

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
/// Room for the news of some thousand routes of our own.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Where something changed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// What the agent owns: its link, its addresses, routes, rules, nft table.
    pub own: bool,
    /// flannel's devices, their addresses, its routes.
    pub flannel: bool,
    /// The node's other addresses, links and default routes.
    pub underlay: bool,
    /// Others' tables of nf_tables: nothing that the agent makes, but it may stand in its way.
    pub firewall: bool,
}

impl Event {
    /// Whether it concerns more than others' firewalls.
    pub fn concerns_the_plan(self) -> bool {
        self.own || self.flannel || self.underlay
    }

    /// News was lost: anything may have changed.
    const ANYTHING: Self = Self {
        own: true,
        flannel: true,
        underlay: true,
        firewall: true,
    };

    const OWN: Self = Self {
        own: true,
        ..Self::NOTHING
    };

    const FLANNEL: Self = Self {
        flannel: true,
        ..Self::NOTHING
    };

    const UNDERLAY: Self = Self {
        underlay: true,
        ..Self::NOTHING
    };

    const NOTHING: Self = Self {
        own: false,
        flannel: false,
        underlay: false,
        firewall: false,
    };

    fn merge(&mut self, other: Self) {
        self.own |= other.own;
        self.flannel |= other.flannel;
        self.underlay |= other.underlay;
        self.firewall |= other.firewall;
    }
}

/// The kernel's news for one network namespace.
pub struct Monitor {
    route: TokioSocket,
    nftables: TokioSocket,
    classifier: Classifier,
}

impl Monitor {
    /// Subscribes to the news; `interface` is the tunnel's link, whether or not it exists yet.
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

    /// Waits until something changed.
    ///
    /// May be dropped and called again: nothing is lost. News that came together is told together.
    pub async fn changed(&mut self) -> io::Result<Event> {
        loop {
            let mut event = Event::NOTHING;
            tokio::select! {
                first = self.route.recv_from_full() => {
                    drain(&self.route, first, &mut event, |message, event| {
                        event.merge(self.classifier.classify(message));
                    })?;
                }
                first = self.nftables.recv_from_full() => {
                    drain(&self.nftables, first, &mut event, |message: &NftMessage, event| {
                        event.own |= message.is_about(nft::TABLE);
                        event.firewall |= message.is_about_another_than(nft::TABLE);
                    })?;
                }
            }
            if event != Event::NOTHING {
                return Ok(event);
            }
        }
    }
}

/// Where something changed by the messages of one datagram, rtnetlink's or nfnetlink's, to somebody who
/// knows of no link yet.
pub fn read_news(interface: &str, datagram: &[u8]) -> Event {
    let mut classifier = Classifier {
        interface: interface.to_owned(),
        links: BTreeMap::new(),
    };
    let mut event = Event::NOTHING;
    messages(datagram, |_, payload| {
        if let NetlinkPayload::InnerMessage(message) = payload {
            event.merge(classifier.classify(&message));
        }
    });
    messages(datagram, |_, payload: NetlinkPayload<NftMessage>| {
        if let NetlinkPayload::InnerMessage(message) = payload {
            event.own |= message.is_about(nft::TABLE);
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

/// Goes through the first datagram and all that are there with it.
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
            // More news than there was room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                *event = Event::ANYTHING;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        next = subscriber.socket_ref().recv_from_full();
    }
}

/// Tells from a message where something changed.
#[derive(Debug)]
struct Classifier {
    interface: String,
    /// What was last told of each link.
    links: BTreeMap<u32, KnownLink>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct KnownLink {
    name: String,
    mtu: u32,
    up: bool,
}

impl Classifier {
    fn classify(&mut self, message: &Message) -> Event {
        match message {
            Message::NewLink(message) => self.link(message),
            Message::DelLink(message) => {
                // One that came while news was lost is known by what the message says alone.
                let known = self.links.remove(&message.header.index);
                let name = known.map_or_else(|| link::from_message(message).name, |link| link.name);
                self.of_link(&name, Event::NOTHING)
            }
            Message::NewAddress(message) | Message::DelAddress(message) => {
                match link::from_address(message) {
                    Some(address) if !address.link_local => {
                        let name = self
                            .links
                            .get(&address.index)
                            .map(|link| link.name.as_str());
                        self.of_link(name.unwrap_or_default(), Event::UNDERLAY)
                    }
                    Some(_) | None => Event::NOTHING,
                }
            }
            Message::NewRoute(message) | Message::DelRoute(message) => of_route(message),
            Message::NewRule(_) | Message::DelRule(_) => Event::OWN,
            // A neighbour or a forwarding entry. Pods' own come and go on other links; what is new
            // on flannel's is flannel's doing.
            Message::DelNeighbour(message) => {
                let known = self.links.get(&message.header.ifindex);
                if known.is_some_and(|link| is_flannels(&link.name)) {
                    Event::FLANNEL
                } else {
                    Event::NOTHING
                }
            }
            _ => Event::NOTHING,
        }
    }

    /// A link is new, or something about it.
    fn link(&mut self, message: &LinkMessage) -> Event {
        let found = link::from_message(message);
        let known = self.links.get(&found.index);
        // Ports of bridges are pods; they come and go.
        let port = message
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::Controller(_)));
        let changed = known.is_some_and(|known| known.mtu != found.mtu || known.up != found.up);
        let other = if changed && !port {
            Event::UNDERLAY
        } else {
            // An address follows, if it matters.
            Event::NOTHING
        };
        let event = self.of_link(&found.name, other);
        self.remember(found);
        event
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

    fn of_link(&self, name: &str, other: Event) -> Event {
        if name == self.interface {
            Event::OWN
        } else if is_flannels(name) {
            // Routes of our own lead through it.
            Event {
                own: true,
                ..Event::FLANNEL
            }
        } else {
            other
        }
    }
}

fn is_flannels(link: &str) -> bool {
    link.starts_with("flannel.") || link.starts_with("flannel-v6.")
}

fn of_route(message: &RouteMessage) -> Event {
    let id = route::table(message);
    if Table::ALL.iter().any(|table| table.id() == id) {
        return Event::OWN;
    }
    if id != MAIN {
        return Event::NOTHING;
    }
    if message.header.destination_prefix_length == 0 {
        return Event::UNDERLAY;
    }
    if route::may_be_flannels(message) {
        Event::FLANNEL
    } else {
        Event::NOTHING
    }
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
    fn a_link_is_ours_flannels_or_the_underlays() {
        let mut classifier = classifier();
        let mut of = |message| classifier.classify(&message);
        let flannel = Event {
            own: true,
            ..Event::FLANNEL
        };

        assert_eq!(
            of(Message::NewLink(link_message(7, "kilo0", 1420))),
            Event::OWN
        );
        assert_eq!(of(Message::DelLink(link::to_index(3))), flannel);
        assert_eq!(
            of(Message::NewLink(link_message(9, "flannel.1", 1450))),
            flannel
        );
        assert_eq!(
            of(Message::NewLink(link_message(2, "eth0", 1400))),
            Event::UNDERLAY
        );
        assert_eq!(
            of(Message::NewLink(link_message(2, "eth0", 1400))),
            Event::NOTHING
        );
        assert_eq!(
            of(Message::NewLink(link_message(11, "veth1", 1450))),
            Event::NOTHING
        );
    }

    #[test]
    fn a_link_that_was_never_told_of_counts_when_it_goes() {
        let message = Message::DelLink(link_message(12, "flannel.1", 1450));
        assert!(classifier().classify(&message).flannel);
    }

    #[test]
    fn a_pods_link_that_comes_up_is_no_news() {
        let mut classifier = classifier();
        classifier.classify(&Message::NewLink(link_message(11, "veth1", 1500)));
        let mut port = link_message(11, "veth1", 1450);
        port.attributes.push(LinkAttribute::Controller(4));
        assert_eq!(classifier.classify(&Message::NewLink(port)), Event::NOTHING);
    }

    #[test]
    fn an_address_counts_where_its_link_does() {
        let mut classifier = classifier();
        let mut of = |index, net: &str| {
            let message = link::to_address(index, net.parse().unwrap(), Scope::Global);
            classifier.classify(&Message::DelAddress(message))
        };
        assert_eq!(of(7, "10.42.1.0/32"), Event::OWN);
        assert!(of(3, "10.42.1.0/32").flannel);
        assert_eq!(of(2, "192.168.50.11/24"), Event::UNDERLAY);
        assert_eq!(of(2, "fe80::1/64"), Event::NOTHING);
    }

    #[test]
    fn a_neighbour_counts_where_it_is_flannels_and_goes() {
        let mut classifier = classifier();
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 3;
        let new = Message::NewNeighbour(message.clone());
        assert_eq!(classifier.classify(&new), Event::NOTHING);
        let gone = Message::DelNeighbour(message.clone());
        assert_eq!(classifier.classify(&gone), Event::FLANNEL);
        message.header.ifindex = 4;
        let elsewhere = Message::DelNeighbour(message);
        assert_eq!(classifier.classify(&elsewhere), Event::NOTHING);
    }

    #[test]
    fn a_route_counts_by_its_table() {
        let mut classifier = classifier();
        let mut of = |table, length, protocol| {
            let mut message = route::to_dump(false, table);
            message.header.destination_prefix_length = length;
            message.header.protocol = protocol;
            if protocol != RouteProtocol::Kernel {
                let gateway = std::net::IpAddr::from([10, 42, 2, 0]);
                message
                    .attributes
                    .push(RouteAttribute::Gateway(gateway.into()));
            }
            classifier.classify(&Message::NewRoute(message))
        };
        assert_eq!(of(5130, 24, RouteProtocol::Static), Event::OWN);
        assert_eq!(of(MAIN, 0, RouteProtocol::Dhcp), Event::UNDERLAY);
        assert_eq!(of(MAIN, 24, RouteProtocol::Boot), Event::FLANNEL);
        assert_eq!(of(MAIN, 24, RouteProtocol::Bgp), Event::NOTHING);
        assert_eq!(of(MAIN, 24, RouteProtocol::Kernel), Event::NOTHING);
        assert_eq!(of(255, 32, RouteProtocol::Kernel), Event::NOTHING);
        assert_eq!(of(100, 0, RouteProtocol::Boot), Event::NOTHING);
    }
}
