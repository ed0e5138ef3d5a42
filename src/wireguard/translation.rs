//! One-to-one translation of addresses where packets enter and leave the tunnel.
//!
//! A peer reaches a host behind this device by an *alias*, because the host's own address means another host to the
//! peer. A packet from a peer to an alias gets the host's address as its destination. A packet of the host gets the
//! alias as its source. The link sees the host's address alone, so routes, filters and connection tracking of this
//! host know nothing of aliases.
//!
//! No state is kept, so the two directions of a flow may pass through different devices with the same aliases. The
//! checksums of IPv4, TCP, UDP and ICMPv6 are updated (RFC 1624), and ICMP errors quote the packet as its sender knows
//! it (RFC 5508, 4.2). Addresses inside of payloads stay, as with any NAT.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::{ArcSwapOption, Guard};

use super::checksum;
use super::packet::{Header, ICMP_HEADER, TCP, UDP};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const UDP_LITE: u8 = 136;

/// The extension headers of IPv6 that may precede the transport header (RFC 8200, 4.1).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// More extension headers than any sender uses.
const MAX_EXTENSIONS: usize = 8;

/// The aliases of a device, none at the start.
#[derive(Default)]
pub(super) struct Translation(ArcSwapOption<Pairs>);

/// The aliases, at least one.
#[derive(Debug)]
pub(super) struct Pairs {
    host_of: HashMap<IpAddr, IpAddr>,
    alias_of: HashMap<IpAddr, IpAddr>,
}

/// An address field of an IP header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Side {
    Source,
    Destination,
}

impl Translation {
    /// Makes these the aliases, each with the address of its host. A pair of different families is left out, and of two
    /// aliases of a host the first is its source.
    pub(super) fn set(&self, aliases: &BTreeMap<IpAddr, IpAddr>) {
        let pairs = aliases.iter().map(|(alias, host)| (*alias, *host));
        let pairs = pairs.filter(|(alias, host)| alias.is_ipv4() == host.is_ipv4());
        let host_of = pairs.clone().collect::<HashMap<_, _>>();
        let alias_of = pairs.rev().map(|(alias, host)| (host, alias)).collect();
        let pairs = (!host_of.is_empty()).then(|| Pairs { host_of, alias_of }.into());
        self.0.store(pairs);
    }

    /// Translates a packet from a peer; `ip` is its header, and gets the new destination. Padding may follow it.
    #[inline]
    pub(super) fn inbound(&self, packet: &mut [u8], ip: &mut Header) {
        if let Some(pairs) = &*self.0.load() {
            pairs.inbound(packet, ip);
        }
    }

    /// The aliases of this moment, for the packets of a run; `None` if there are none.
    #[inline]
    pub(super) fn load(&self) -> Guard<Option<Arc<Pairs>>> {
        self.0.load()
    }
}

impl Pairs {
    fn inbound(&self, packet: &mut [u8], ip: &mut Header) {
        let Some(packet) = packet.get_mut(..ip.length) else {
            return;
        };
        // What the host had sent comes back in an ICMP error.
        if let Some(&host) = self.host_of.get(&ip.destination) {
            translate_quoted(packet, ip, Side::Source, &self.host_of);
            rewrite(packet, ip, Side::Destination, host);
            ip.destination = host;
        }
    }

    /// Translates a packet to a peer, with complete checksums.
    pub(super) fn outbound(&self, packet: &mut [u8]) {
        let Some(ip) = Header::parse(packet) else {
            return;
        };
        // A router in front of the host may be the one that sends the error.
        translate_quoted(packet, &ip, Side::Destination, &self.alias_of);
        if let Some(&alias) = self.alias_of.get(&ip.source) {
            rewrite(packet, &ip, Side::Source, alias);
        }
    }
}

/// Translates an address of the packet that an ICMP error quotes.
fn translate_quoted(
    packet: &mut [u8],
    ip: &Header,
    side: Side,
    to: &HashMap<IpAddr, IpAddr>,
) -> Option<()> {
    if ip.protocol == TCP || ip.protocol == UDP {
        return None;
    }
    let (protocol, at) = transport(packet, ip)?;
    let kind = *packet.get(at)?;
    let is_error = match protocol {
        // Destination unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792).
        ICMP => matches!(kind, 3 | 4 | 5 | 11 | 12),
        // All below 128 (RFC 4443, 2.1).
        ICMPV6 => kind < 128,
        _ => false,
    };
    if !is_error {
        return None;
    }
    let quoted = packet.get_mut(at + ICMP_HEADER..)?;
    let inner = Header::parse_piece(quoted)?;
    let address = match side {
        Side::Source => inner.source,
        Side::Destination => inner.destination,
    };
    let new = *to.get(&address)?;
    let before = checksum::sum(quoted);
    rewrite(quoted, &inner, side, new);
    let after = checksum::sum(quoted);
    adjust(packet, at + 2, before, after);
    Some(())
}

/// Replaces an address of a packet, with the checksums that cover it. Only the first piece of the packet need be there.
fn rewrite(packet: &mut [u8], ip: &Header, side: Side, new: IpAddr) {
    let (start, new) = match (new, side) {
        (IpAddr::V4(new), Side::Source) => (12, new.octets().to_vec()),
        (IpAddr::V4(new), Side::Destination) => (16, new.octets().to_vec()),
        (IpAddr::V6(new), Side::Source) => (8, new.octets().to_vec()),
        (IpAddr::V6(new), Side::Destination) => (24, new.octets().to_vec()),
    };
    let transport = transport(packet, ip);
    let Some(field) = packet.get_mut(start..start + new.len()) else {
        return;
    };
    let (before, after) = (checksum::sum(field), checksum::sum(&new));
    field.copy_from_slice(&new);
    if ip.source.is_ipv4() {
        adjust(packet, 10, before, after);
    }
    let Some((protocol, at)) = transport else {
        return;
    };
    match protocol {
        TCP => adjust(packet, at + 16, before, after),
        ICMPV6 if ip.source.is_ipv6() => adjust(packet, at + 2, before, after),
        UDP | UDP_LITE => {
            let field = at + 6..at + 8;
            // Zero stands for none (RFC 768).
            if packet.get(field.clone()) != Some(&[0, 0]) {
                adjust(packet, at + 6, before, after);
                if let Some(sum) = packet.get_mut(field).filter(|sum| **sum == [0, 0]) {
                    sum.fill(0xff);
                }
            }
        }
        _ => {}
    }
}

/// The protocol and the place of the transport header; `None` in a fragment that does not have it, and where another
/// address than the header's is covered by the checksum.
fn transport(packet: &[u8], ip: &Header) -> Option<(u8, usize)> {
    if ip.source.is_ipv4() {
        let offset = u16::from_be_bytes(*packet.get(6..)?.first_chunk()?) & 0x1fff;
        return (offset == 0).then_some((ip.protocol, ip.header));
    }
    let (mut protocol, mut at) = (ip.protocol, ip.header);
    for _ in 0..MAX_EXTENSIONS {
        let length = match protocol {
            HOP_BY_HOP | DESTINATION_OPTIONS => None,
            // Before its last segment the destination is not the packet's final one.
            ROUTING if *packet.get(at + 3)? == 0 => None,
            FRAGMENT => {
                let offset = u16::from_be_bytes(*packet.get(at + 2..)?.first_chunk()?) & 0xfff8;
                (offset == 0).then_some(Some(8))?
            }
            ROUTING => return None,
            _ => return Some((protocol, at)),
        };
        let length = match length {
            Some(length) => length,
            None => usize::from(*packet.get(at + 1)?) * 8 + 8,
        };
        protocol = *packet.get(at)?;
        at += length;
    }
    None
}

/// Updates a checksum where bytes of one sum were replaced by bytes of another (RFC 1624, 3). Nothing happens where it
/// is not there.
fn adjust(packet: &mut [u8], at: usize, before: u64, after: u64) {
    let Some(field) = packet.get_mut(at..).and_then(<[u8]>::first_chunk_mut::<2>) else {
        return;
    };
    let old = u64::from(!u16::from_be_bytes(*field));
    let sum = old + u64::from(!checksum::fold(before)) + u64::from(checksum::fold(after));
    *field = checksum::finish(sum).to_be_bytes();
}

#[cfg(test)]
#[path = "translation/tests.rs"]
mod tests;
