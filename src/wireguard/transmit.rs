//! From the TUN device to the wire: route, cut, pad, seal, send.
//!
//! Datagrams to one peer are gathered in one buffer, in the layout of UDP segmentation offload, until one
//! does not fit the run. Then the run is sealed as a batch and passed to the kernel in one call.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::clock::Time;
use super::config::PeerMtu;
use super::core::Core;
use super::divert::Origin;
use super::drops::Dropped;
use super::gso::{Split, VnetHeader};
use super::icmp::Answer;
use super::nested::Nesting;
use super::packet::{Fragments, Header, LEAST_IPV6, Outer};
use super::peer::{Peer, Wire};
use super::protocol::{DATA_HEADER, OVERHEAD, TAG};
use super::send::send;
use super::session::Session;
use super::tun::MAX_READ;
use super::udp::{MAX_DATAGRAMS, MAX_SEND};

/// A packet that cannot be sent, and the ICMP error for its sender, if any.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Refused(pub(super) Option<Answer>);

/// The longest packet that a datagram of IPv4 has room for: 65,535 bytes less the headers of IP, UDP
/// and WireGuard. The link's MTU should be less. If it is not, the sender gets an ICMP error.
const MAX_INNER: u16 = 65_475;

/// The most bytes of padding of a packet.
const MAX_PADDING: usize = 15;

/// A run of datagrams that is being gathered.
pub(super) struct Transmit {
    buffer: Vec<u8>,
    length: usize,
    count: usize,
    /// The bytes of each datagram but the last.
    stride: usize,
    /// Whether the last datagram is as long as the others, so that one more may follow.
    open: bool,
    /// Whether any of them carries a packet; keepalives carry none.
    data: bool,
    outer: Outer,
    /// The bytes that a relay adds to each datagram at most, so that the run is sent in one call.
    relay_overhead: usize,
    to: Option<(Arc<Peer>, Arc<Session>)>,
}

impl Default for Transmit {
    fn default() -> Self {
        Self {
            // One datagram around the largest packet, or a run of at most MAX_SEND.
            buffer: vec![0; MAX_READ + OVERHEAD],
            length: 0,
            count: 0,
            stride: 0,
            open: false,
            data: false,
            outer: Outer::default(),
            relay_overhead: 0,
            to: None,
        }
    }
}

impl Transmit {
    /// Takes a packet as it was read from the TUN device.
    ///
    /// It may be sent at once or with later ones: call [`Self::flush`] when there are no more.
    pub(super) fn packet(
        &mut self,
        core: &Core,
        wire: &impl Wire,
        bytes: &[u8],
        now: Time,
    ) -> Result<(), Refused> {
        let refuse = |reason, answer| {
            core.drops.add(reason, 1);
            Err(Refused(answer))
        };
        let Some((vnet, packet)) = VnetHeader::read(bytes) else {
            return refuse(Dropped::Malformed, None);
        };
        let Some(ip) = Header::parse(packet) else {
            return refuse(Dropped::Malformed, None);
        };
        if ip.length > usize::from(MAX_INNER) && !vnet.is_joined() {
            return refuse(Dropped::TooBig, Some(Answer::TooBig(MAX_INNER)));
        }
        if core.diversion.takes(&ip, packet) {
            divert(core, &vnet, packet, &ip);
            return Ok(());
        }
        let nesting = Nesting::of(packet, &ip);
        if nesting == Nesting::TooDeep {
            return refuse(Dropped::TooDeep, Some(Answer::Unreachable));
        }
        let table = core.table.load();
        let Some(peer) = table.route(ip.destination, || ip.flow_hash(packet)) else {
            return refuse(Dropped::NoPeer, Some(Answer::Unreachable));
        };
        // One relay deep.
        if peer.relay_overhead() != 0 && table.relays.is_for_another(&ip, packet) {
            return refuse(Dropped::RelayedTwice, None);
        }
        let session = peer.session();
        if let Some(session) = session.as_ref().filter(|session| session.may_send(now)) {
            if peer.has_staged.load(Ordering::Acquire) {
                self.flush_staged(core, wire, peer, now);
            }
            let Some(split) = Split::new(&vnet, packet, &ip) else {
                return refuse(Dropped::Malformed, None);
            };
            let fragments = match fragments(core, peer, split.length(0), &ip) {
                Ok(fragments) => fragments,
                Err(answer) => return refuse(Dropped::TooBig, Some(answer)),
            };
            let outer = outer(&ip, nesting, fragments);
            self.append(core, wire, (peer, session), &split, outer, now);
            return Ok(());
        }
        if peer.way().is_none() {
            return refuse(Dropped::NoEndpoint, Some(Answer::Unreachable));
        }
        let dropped = peer.stage(bytes);
        core.drops.add(Dropped::NoSession, dropped);
        core.ask_handshake(peer, now);
        // There may be a session since the check above, and its thread may have found nothing staged.
        if peer
            .session()
            .as_ref()
            .is_some_and(|session| session.may_send(now))
        {
            self.flush_staged(core, wire, peer, now);
        }
        Ok(())
    }

    /// Sends the packets that waited for a session; true if there were any.
    pub(super) fn flush_staged(
        &mut self,
        core: &Core,
        wire: &impl Wire,
        peer: &Arc<Peer>,
        now: Time,
    ) -> bool {
        // The lock is held until all are sent, so that no packet overtakes them.
        let mut staged = peer.staged();
        let session = peer.session();
        let Some(session) = session.as_ref().filter(|session| session.may_send(now)) else {
            return false;
        };
        let waited = !staged.is_empty();
        while let Some(packet) = staged.pop() {
            self.append_staged(core, wire, (peer, session), &packet, now);
        }
        if waited {
            self.flush(core, wire, now);
        }
        peer.has_staged.store(false, Ordering::Release);
        waited
    }

    /// Sends an empty message if there is a session; else asks for a handshake.
    pub(super) fn keepalive(&mut self, core: &Core, wire: &impl Wire, peer: &Arc<Peer>, now: Time) {
        let session = peer.session();
        match session.as_ref().filter(|session| session.may_send(now)) {
            Some(session) => {
                self.make_room(core, wire, (peer, session), OVERHEAD, Outer::default(), now);
                self.length += OVERHEAD;
                self.count += 1;
                self.flush(core, wire, now);
            }
            None => core.ask_handshake(peer, now),
        }
    }

    /// Appends a packet that waited, in the form in which it was read.
    fn append_staged(
        &mut self,
        core: &Core,
        wire: &impl Wire,
        to: (&Arc<Peer>, &Arc<Session>),
        bytes: &[u8],
        now: Time,
    ) {
        let split = VnetHeader::read(bytes).and_then(|(vnet, packet)| {
            let ip = Header::parse(packet)?;
            let split = Split::new(&vnet, packet, &ip)?;
            let fragments = fragments(core, to.0, split.length(0), &ip);
            let outer = |fragments| outer(&ip, Nesting::of(packet, &ip), fragments);
            Some((split, fragments.map(outer)))
        });
        match split {
            Some((split, Ok(outer))) => self.append(core, wire, to, &split, outer, now),
            Some((_, Err(_))) => core.drops.add(Dropped::TooBig, 1),
            None => core.drops.add(Dropped::Malformed, 1),
        }
    }

    fn append(
        &mut self,
        core: &Core,
        wire: &impl Wire,
        to: (&Arc<Peer>, &Arc<Session>),
        split: &Split<'_>,
        outer: Outer,
        now: Time,
    ) {
        let mtu = core.mtu_to(to.0);
        let aliases = core.translation.load();
        for n in 0..split.count() {
            let inner = split.length(n);
            let padded = inner + Core::padding_within(mtu, inner);
            self.make_room(core, wire, to, padded + OVERHEAD, outer, now);
            let datagram = &mut self.buffer[self.length..self.length + padded + OVERHEAD];
            let plaintext = &mut datagram[DATA_HEADER..DATA_HEADER + padded];
            let (packet, padding) = plaintext.split_at_mut(inner);
            split.write(n, packet);
            if let Some(aliases) = &*aliases {
                aliases.outbound(packet);
            }
            padding.fill(0);
            self.length += padded + OVERHEAD;
            self.count += 1;
            self.data = true;
        }
    }

    /// Sends the run if the next datagram cannot be part of it.
    fn make_room(
        &mut self,
        core: &Core,
        wire: &impl Wire,
        (peer, session): (&Arc<Peer>, &Arc<Session>),
        length: usize,
        outer: Outer,
        now: Time,
    ) {
        debug_assert!(length >= DATA_HEADER + TAG);
        let same = self
            .to
            .as_ref()
            .is_some_and(|to| Arc::ptr_eq(&to.1, session));
        let fits = same
            && self.open
            && self.outer == outer
            && length <= self.stride
            && self.count < MAX_DATAGRAMS
            && self.length + length + (self.count + 1) * self.relay_overhead <= MAX_SEND;
        if fits {
            self.open = length == self.stride;
            return;
        }
        self.flush(core, wire, now);
        if !same {
            self.to = Some((peer.clone(), session.clone()));
        }
        (self.stride, self.open, self.outer) = (length, true, outer);
        self.relay_overhead = match peer.relay_overhead() {
            0 => 0,
            bytes => bytes + MAX_PADDING,
        };
    }

    /// Seals and sends the run.
    pub(super) fn flush(&mut self, core: &Core, wire: &impl Wire, now: Time) {
        let run = &mut self.buffer[..self.length];
        if let Some((peer, session)) = self.to.as_ref().filter(|_| self.count > 0) {
            if session.seal_batch(run, self.stride) {
                // The timers come first: an answer may arrive before the send returns, and must not be
                // followed by arming what it disarms.
                peer.timers.sent(self.data, now);
                send(core, wire, peer, (run, self.stride), self.outer, now);
                if session.wants_rekey(now) {
                    core.ask_handshake(peer, now);
                }
            } else {
                core.drops.add(Dropped::NoSession, self.count as u64);
                core.ask_handshake(peer, now);
            }
        }
        (self.length, self.count, self.open, self.data) = (0, 0, false, false);
    }

    /// Drops the references to peer and session, before a time without traffic.
    pub(super) fn rest(&mut self) {
        self.to = None;
    }
}

/// Hands an echo from the link to the embedder. A large packet of the kernel stands for several.
#[cold]
fn divert(core: &Core, vnet: &VnetHeader, packet: &[u8], ip: &Header) {
    let Some(split) = Split::new(vnet, packet, ip) else {
        return core.drops.add(Dropped::Malformed, 1);
    };
    for n in 0..split.count() {
        let mut echo = vec![0; split.length(n)];
        split.write(n, &mut echo);
        core.divert(Origin::Link, &echo);
    }
}

/// Seals and sends one whole packet at once, on any thread; false if it was not sent. Without a session a
/// handshake begins, and the packet does not wait for it.
///
/// A packet that is `padded` to a length is sent in a datagram that nothing on the way may fragment, whatever the
/// peer's MTU.
pub(super) fn send_alone(
    core: &Core,
    wire: &impl Wire,
    peer: &Arc<Peer>,
    packet: &[u8],
    padded: Option<usize>,
    now: Time,
) -> bool {
    let is_whole = |ip: &Header| ip.length == packet.len() && ip.length <= usize::from(MAX_INNER);
    let Some(ip) = Header::parse(packet).filter(is_whole) else {
        return false;
    };
    if peer.way().is_none() {
        return false;
    }
    let (length, fragments) = match padded {
        Some(padded) if padded > usize::from(MAX_INNER) => return false,
        Some(padded) => (padded.max(packet.len()), Fragments::None),
        None => match fragments(core, peer, packet.len(), &ip) {
            Ok(fragments) => {
                let padding = Core::padding_within(core.mtu_to(peer), packet.len());
                (packet.len() + padding, fragments)
            }
            Err(_) => return false,
        },
    };
    let length = length + OVERHEAD;
    let mut datagram = vec![0; length];
    datagram[DATA_HEADER..DATA_HEADER + packet.len()].copy_from_slice(packet);
    let session = peer.session();
    let sealed = session
        .as_ref()
        .filter(|session| session.may_send(now) && session.seal_batch(&mut datagram, length));
    let Some(session) = sealed else {
        core.ask_handshake(peer, now);
        return false;
    };
    // The timers come first, as in `Transmit::flush`.
    peer.timers.sent(true, now);
    let outer = outer(&ip, Nesting::of(packet, &ip), fragments);
    let sent = send(core, wire, peer, (&datagram, length), outer, now);
    if session.wants_rekey(now) {
        core.ask_handshake(peer, now);
    }
    sent
}

/// Whether the datagram around a packet of so many bytes may be fragmented, or the ICMP error where it does not fit the
/// way to the peer. Where that is not measured and there is no relay, the link's MTU is the limit, which the kernel knows.
fn fragments(core: &Core, peer: &Peer, length: usize, ip: &Header) -> Result<Fragments, Answer> {
    let is_relayed = peer.relay_overhead() != 0;
    let is_measured = matches!(peer.mtu(), PeerMtu::Path(_));
    if !is_measured && !is_relayed {
        return Ok(Fragments::Allowed);
    }
    let most = core.mtu_to(peer);
    let v6 = ip.source.is_ipv6();
    if length <= most {
        Ok(if is_measured {
            Fragments::None
        } else {
            Fragments::Allowed
        })
    } else if v6 && !is_relayed && length <= usize::from(LEAST_IPV6) {
        Ok(Fragments::Small)
    } else {
        let most = u16::try_from(most).unwrap_or(MAX_INNER);
        // No sender of IPv6 makes its packets smaller (RFC 8201, 4).
        let least = if v6 { LEAST_IPV6 } else { 0 };
        Err(Answer::TooBig(most.max(least)))
    }
}

/// The fields of the outer header that depend on the packet.
fn outer(ip: &Header, nesting: Nesting, fragments: Fragments) -> Outer {
    Outer {
        ecn: ip.ecn,
        hops: nesting.hops(),
        fragments,
    }
}
