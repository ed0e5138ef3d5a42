//! How the datagrams of a peer travel: through the sockets, or through a relay. Pure.

use std::net::{IpAddr, SocketAddr};

use super::config::RELAY_PORT;
use super::packet::udp_headers;
use super::protocol::OVERHEAD;
use super::udp::Endpoint;

/// How datagrams reach a peer, or came from it.
///
/// The sockets take an [`Endpoint`] only, so no relayed datagram can leave through them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Way {
    /// Through the sockets.
    Direct(Endpoint),
    /// Through the session with a relay, to or from this WireGuard address.
    Relayed(IpAddr),
}

impl Way {
    /// The address and port of the peer.
    pub(super) fn remote(self) -> SocketAddr {
        match self {
            Self::Direct(endpoint) => endpoint.remote,
            Self::Relayed(address) => SocketAddr::new(address, RELAY_PORT),
        }
    }

    /// The endpoint, where there is no relay.
    pub(super) fn direct(self) -> Option<Endpoint> {
        match self {
            Self::Direct(endpoint) => Some(endpoint),
            Self::Relayed(_) => None,
        }
    }

    /// The bytes that a relay takes from the link's MTU, for the headers around the datagram and WireGuard's own in it; 0
    /// without a relay.
    pub(super) const fn overhead(self) -> usize {
        match self {
            Self::Direct(_) => 0,
            Self::Relayed(address) => udp_headers(address.is_ipv6()) + OVERHEAD,
        }
    }
}

impl From<Endpoint> for Way {
    fn from(endpoint: Endpoint) -> Self {
        Self::Direct(endpoint)
    }
}
