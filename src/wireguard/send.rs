//! Sends the sealed datagrams of a peer: through the sockets, or through the session with a relay.
//!
//! Two hosts that cannot send to each other may both reach a third. The datagrams between them are then the payload
//! of UDP packets from one's WireGuard address to the other's, port `RELAY_PORT` on both sides (`relay_packet`). Such a
//! packet is an ordinary packet in the session with the relay, whose kernel forwards it. So the relay needs nothing, and
//! sees the ciphertext of the session between the two. No kernel of the two takes part: the packets are made here and
//! recognised in `receive`.
//!
//! A relay is one deep: a relay's own endpoint is never relayed, and a relayed datagram holds no other one.

use std::net::IpAddr;
use std::sync::Arc;

use super::clock::Time;
use super::config::PeerMtu;
use super::core::Core;
use super::drops::Dropped;
use super::nested::Nesting;
use super::packet::{Fragments, Outer};
use super::peer::{Peer, Wire};
use super::protocol::{DATA_HEADER, OVERHEAD};
use super::relay_packet::Headers;
use super::udp::{MAX_DATAGRAMS, MAX_SEND};
use super::way::Way;

/// Sends a run of datagrams, of `stride` bytes but the last, to a peer's endpoint and counts them; false if the kernel
/// refused it, or there is no relay for it.
pub(super) fn send(
    core: &Core,
    wire: &impl Wire,
    peer: &Peer,
    (run, stride): (&[u8], usize),
    outer: Outer,
    now: Time,
) -> bool {
    let Some(way) = peer.way() else {
        let count = run.len().div_ceil(stride) as u64;
        core.drops.add(Dropped::NoEndpoint, count);
        return true;
    };
    send_to(core, wire, peer, (run, stride), (way, None), outer, now)
}

/// The same to another address than the peer's endpoint. What answers a message that came `through` a relay goes back
/// through that one, if no peer relays to the address.
pub(super) fn send_to(
    core: &Core,
    wire: &impl Wire,
    peer: &Peer,
    (run, stride): (&[u8], usize),
    (way, through): (Way, Option<&Arc<Peer>>),
    outer: Outer,
    now: Time,
) -> bool {
    match way {
        Way::Direct(endpoint) => {
            peer.send_direct(wire, (run, stride), endpoint, outer, now, &core.drops)
        }
        Way::Relayed(address) => {
            let to = (address, through);
            let sent = send_through_relay(core, wire, (run, stride), to, outer, now);
            if sent {
                peer.count_sent(run.len());
            }
            sent
        }
    }
}

/// Sends a run of sealed datagrams of a peer to its WireGuard address, through the session with a relay: the
/// configured one, or `back`, the one that a message came through which is answered. Returns whether the kernel took
/// it. What is not sent is counted.
pub(super) fn send_through_relay(
    core: &Core,
    wire: &impl Wire,
    (run, stride): (&[u8], usize),
    (to, back): (IpAddr, Option<&Arc<Peer>>),
    outer: Outer,
    now: Time,
) -> bool {
    let refuse = |reason, count: usize| {
        core.drops.add(reason, count as u64);
        false
    };
    let all = run.len().div_ceil(stride);
    let table = core.table.load();
    let relays = &table.relays;
    let Some((relay, source)) = relays.relay_to(to).or(back).zip(relays.source_for(to)) else {
        return refuse(Dropped::NoRelay, all);
    };
    let endpoint = match relay.way() {
        Some(Way::Direct(endpoint)) => endpoint,
        // One relay deep.
        Some(Way::Relayed(_)) => return refuse(Dropped::RelayedTwice, all),
        None => return refuse(Dropped::NoRelay, all),
    };
    let session = relay.session();
    let Some(session) = session.as_ref().filter(|session| session.may_send(now)) else {
        core.ask_handshake(relay, now);
        return refuse(Dropped::NoRelay, all);
    };
    let headers = Headers::new(source, to, outer);
    let outer = match headers.nesting() {
        Nesting::TooDeep => return refuse(Dropped::TooDeep, all),
        nesting @ (Nesting::Outermost | Nesting::Within(_)) => Outer {
            hops: nesting.hops(),
            fragments: match relay.mtu() {
                // The relay's path shrank, and what is behind it has not been told yet.
                PeerMtu::Path(most) if headers.length(stride) > usize::from(most) => {
                    return refuse(Dropped::TooBig, all);
                }
                PeerMtu::Path(_) => Fragments::None,
                PeerMtu::Link | PeerMtu::Configured(_) => Fragments::Allowed,
            },
            ..outer
        },
    };
    let wrapped = |length: usize| {
        let packet = headers.length(length);
        packet + core.padding(relay.mtu(), packet) + OVERHEAD
    };
    let wrapped_stride = wrapped(stride);
    let most = (MAX_SEND / wrapped_stride).clamp(1, MAX_DATAGRAMS);
    let mut all_sent = true;
    for run in run.chunks(stride * most) {
        let count = run.len().div_ceil(stride);
        let mut bytes = Vec::with_capacity(count * wrapped_stride);
        for datagram in run.chunks(stride) {
            let end = bytes.len() + wrapped(datagram.len());
            bytes.resize(bytes.len() + DATA_HEADER, 0);
            headers.wrap(datagram, &mut bytes);
            // The padding, and the room for the tag.
            bytes.resize(end, 0);
        }
        if !session.seal_batch(&mut bytes, wrapped_stride) {
            core.ask_handshake(relay, now);
            all_sent = refuse(Dropped::NoRelay, count);
            continue;
        }
        // The timers come first, as in `Transmit::flush`.
        relay.timers.sent(true, now);
        all_sent &= relay.send_direct(
            wire,
            (&bytes, wrapped_stride),
            endpoint,
            outer,
            now,
            &core.drops,
        );
    }
    if session.wants_rekey(now) {
        core.ask_handshake(relay, now);
    }
    all_sent
}
