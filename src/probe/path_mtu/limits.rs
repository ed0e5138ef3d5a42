//! The sizes that are possible on a path. Pure.

use std::net::IpAddr;

use crate::wireguard::overhead;
use crate::wireguard::packet::LEAST_IPV6;

/// The bytes of an IP packet that every usual path carries (RFC 8899, 5.1.2 has 1,200 for the payload).
const BASE: u32 = LEAST_IPV6 as u32;
/// The bytes that every host takes over IPv4 (RFC 791, 3.1), in IP packets.
const LEAST_V4: u32 = 576;

/// The sizes that a node allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sizes {
    /// What a path starts with, inside the tunnel.
    pub start: u32,
    /// The MTU of the link that leads out.
    pub underlay: u32,
}

/// The sizes that are possible on one path, in order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// What is assumed where not even the base passes.
    pub(super) floor: u32,
    /// What is assumed to pass when the present size does not.
    pub(super) base: u32,
    /// What a path starts with.
    pub(super) start: u32,
    /// The largest.
    pub(super) most: u32,
    /// What is added to a packet on the underlay, by all tunnels.
    pub(super) overhead: u32,
}

impl Limits {
    /// Of a path to an endpoint on the underlay.
    pub fn direct(endpoint: IpAddr, sizes: Sizes) -> Self {
        let overhead = overhead(endpoint.is_ipv6());
        let least = if endpoint.is_ipv6() { BASE } else { LEAST_V4 };
        Self::new(sizes.start, sizes.underlay, overhead, overhead, least)
    }

    /// Of a path whose datagrams are packets to a relay: `endpoint` is the peer's WireGuard address, and the path to the
    /// relay has these limits and carries packets of `carried` bytes now.
    pub fn relayed(endpoint: IpAddr, sizes: Sizes, relay: &Self, carried: u32) -> Self {
        let own = overhead(endpoint.is_ipv6());
        let least = relay.floor + relay.overhead;
        Self::new(sizes.start, carried, own, own + relay.overhead, least)
    }

    /// `carrier` and `own` are the size of what carries the datagrams and what one tunnel adds; `overhead` and `least`
    /// are about the underlay.
    fn new(start: u32, carrier: u32, own: u32, overhead: u32, least: u32) -> Self {
        // Below this no header fits.
        let most = carrier.saturating_sub(own).max(own);
        let base = BASE.saturating_sub(overhead).min(most);
        let floor = least.saturating_sub(overhead).min(base);
        Self {
            floor,
            base,
            start: start.clamp(floor, most),
            most,
            overhead,
        }
    }
}
