//! Watches the routes by which peers are reached.
//!
//! Datagrams to a peer have the local address that the peer sent to as their source, as long as the way back
//! leads through the interface that its datagram came in by. When another route is better, that route's
//! source is right: with the old one the peer would answer to an address that nothing reaches any more. The
//! kernel's WireGuard looks up the route of each packet. This device looks it up before an address becomes
//! the source (`place`), when the kernel reports a change of routes, and every two seconds.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink has many messages and attributes; this needs one of each"
)]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket as Netlink, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// The multicast groups of routes and rules (`RTMGRP_IPV4_ROUTE` and so on, linux/rtnetlink.h).
const ROUTES_AND_RULES: u32 = 0x40 | 0x80 | 0x400 | 0x4_0000;

/// The socket for notifications of changed routes.
pub(super) struct RouteWatch {
    events: Netlink,
}

/// The socket for look-ups of routes.
#[derive(Debug)]
pub(super) struct RouteQuery(Mutex<Netlink>);

impl RouteWatch {
    /// Watches the namespace of the calling thread.
    ///
    /// # Errors
    /// The error of the kernel.
    pub(super) fn new() -> io::Result<Self> {
        let mut events = Netlink::new(NETLINK_ROUTE)?;
        events.set_non_blocking(true)?;
        events.bind(&SocketAddr::new(0, ROUTES_AND_RULES))?;
        Ok(Self { events })
    }

    /// The descriptor to poll for reading.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Discards the notifications.
    pub(super) fn drain(&self) {
        super::link::drain(&self.events);
    }
}

impl RouteQuery {
    /// Looks up routes in the namespace of the calling thread.
    ///
    /// # Errors
    /// The error of the kernel.
    pub(super) fn new() -> io::Result<Self> {
        let query = Netlink::new(NETLINK_ROUTE)?;
        query.connect(&SocketAddr::new(0, 0))?;
        // The kernel answers at once. An answer that takes this long never comes.
        setsockopt(&query, sockopt::ReceiveTimeout, &TimeVal::new(1, 0))?;
        Ok(Self(Mutex::new(query)))
    }

    /// Whether datagrams to `remote` from the address `local` leave through the interface of this index;
    /// `mark` is that of the datagrams.
    pub(super) fn leads(&self, remote: IpAddr, local: IpAddr, interface: u32, mark: u32) -> bool {
        // The zone of a link-local address is its interface: there is no other route.
        let is_bound = matches!(local, IpAddr::V6(local) if local.is_unicast_link_local());
        is_bound
            || self
                .interface_of(remote, local, mark)
                .is_ok_and(|found| found == Some(interface))
    }

    /// The interface of the route to an address from a local one.
    fn interface_of(&self, to: IpAddr, from: IpAddr, mark: u32) -> io::Result<Option<u32>> {
        let mut route = RouteMessage::default();
        let (family, bits) = match to {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        route.header.address_family = family;
        route.header.destination_prefix_length = bits;
        route.header.source_prefix_length = bits;
        route.attributes = vec![
            RouteAttribute::Destination(RouteAddress::from(to)),
            RouteAttribute::Source(RouteAddress::from(from)),
        ];
        if mark != 0 {
            route.attributes.push(RouteAttribute::Mark(mark));
        }
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        let mut message = NetlinkMessage::new(
            header,
            NetlinkPayload::from(RouteNetlinkMessage::GetRoute(route)),
        );
        message.finalize();
        let mut request = vec![0; message.buffer_len()];
        message.serialize(&mut request);
        let query = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        query.send(&request, 0)?;

        let mut answer = Vec::with_capacity(4096);
        query.recv(&mut answer, 0)?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                let interface = |attribute: &RouteAttribute| match *attribute {
                    RouteAttribute::Oif(interface) => Some(interface),
                    _ => None,
                };
                Ok(route.attributes.iter().find_map(interface))
            }
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Ok(None),
        }
    }
}
