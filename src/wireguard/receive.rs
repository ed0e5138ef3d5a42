//! From the wire to the TUN device: find the session, open, check the source, join, write. A relayed datagram is opened
//! twice: once as a packet of the relay, once as what it is.
//!
//! Handshake messages are passed on to their thread. Nothing here panics or answers, whatever the bytes
//! are.

use std::io::IoSlice;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::{Arc, Weak};

use super::admission::Job;
use super::clock::Time;
use super::core::Core;
use super::divert::Origin;
use super::drops::Dropped;
use super::endpoint_rule::Evidence;
use super::gso::Coalescer;
use super::packet::{Ecn, Header, set_ecn};
use super::peer::Peer;
use super::protocol::{
    COOKIE_REPLY, COOKIE_REPLY_SIZE, DATA_HEADER, INITIATION, INITIATION_SIZE, OVERHEAD,
    REKEY_ON_RECEIVE, RESPONSE, RESPONSE_SIZE, TAG, data_header,
};
use super::relay_packet;
use super::session::{Opened, Session};
use super::table::Table;
use super::udp::Message;
use super::way::Way;

/// The number of sessions that a receive thread caches; a power of two.
const CACHED: usize = 64;

/// The state of a receive thread between batches.
pub(super) struct Receive {
    coalescer: Coalescer,
    opened: Vec<Opened>,
    /// Recent sessions, by the low bits of their index.
    sessions: Vec<(u32, Weak<Session>)>,
    /// Relayed datagrams in the message that is being opened.
    relayed: Vec<Arrived>,
    /// Where the last datagram of the wire ended that held one.
    relayed_until: usize,
}

/// Datagrams of one size in the arena, the last of which may be shorter, that came the same way.
struct Arrived {
    range: Range<usize>,
    stride: usize,
    from: Way,
    /// The relay that they came through.
    through: Option<Arc<Peer>>,
    ecn: Ecn,
}

impl Default for Receive {
    fn default() -> Self {
        Self {
            coalescer: Coalescer::default(),
            opened: Vec::new(),
            sessions: vec![(0, Weak::new()); CACHED],
            relayed: Vec::new(),
            relayed_until: 0,
        }
    }
}

impl Receive {
    /// Opens one message in the arena, and the relayed datagrams in it, and keeps the packets.
    pub(super) fn message(&mut self, core: &Core, arena: &mut [u8], message: &Message, now: Time) {
        let direct = Arrived {
            range: message.range.clone(),
            stride: message.stride,
            from: message.from.into(),
            through: None,
            ecn: message.ecn,
        };
        self.arrived(core, arena, &direct, now);
        // Relayed datagrams hold no others, so this ends.
        let mut relayed = std::mem::take(&mut self.relayed);
        for relayed in relayed.drain(..) {
            self.arrived(core, arena, &relayed, now);
        }
        self.relayed = relayed;
    }

    fn arrived(&mut self, core: &Core, arena: &mut [u8], message: &Arrived, now: Time) {
        let mut at = message.range.start;
        while at < message.range.end {
            let datagram = at..message.range.end.min(at + message.stride);
            let Some((index, _)) = data_header(&arena[datagram.clone()]) else {
                pass_on(core, &arena[datagram.clone()], message, now);
                at = datagram.end;
                continue;
            };
            // All datagrams that follow to the same session.
            let mut end = datagram.end;
            while end < message.range.end {
                let next = end..message.range.end.min(end + message.stride);
                let header = data_header(&arena[next.clone()]);
                if header.is_none_or(|(other, _)| other != index) {
                    break;
                }
                end = next.end;
            }
            self.run(core, arena, at..end, index, message, now);
            at = end;
        }
    }

    /// Hands over the packets that were kept; see [`Coalescer::finish`].
    pub(super) fn finish(&mut self, arena: &mut [u8], write: impl FnMut(&[IoSlice<'_>], usize)) {
        self.coalescer.finish(arena, write);
    }

    /// Sets whether UDP packets are joined.
    pub(super) fn join_udp(&mut self, join: bool) {
        self.coalescer.join_udp(join);
    }

    fn session(&mut self, core: &Core, index: u32) -> Option<Arc<Session>> {
        let slot = &mut self.sessions[index as usize % CACHED];
        if slot.0 == index
            && let Some(session) = slot.1.upgrade().filter(|session| !session.is_retired())
        {
            return Some(session);
        }
        let session = core.indices.session(index)?;
        *slot = (index, Arc::downgrade(&session));
        Some(session)
    }

    /// Opens a run of datagrams to one session.
    fn run(
        &mut self,
        core: &Core,
        arena: &mut [u8],
        run: Range<usize>,
        index: u32,
        message: &Arrived,
        now: Time,
    ) {
        let stride = message.stride;
        let count = run.len().div_ceil(stride) as u64;
        let Some(session) = self.session(core, index) else {
            return core.drops.add(Dropped::UnknownIndex, count);
        };
        let Some(peer) = session.peer().upgrade() else {
            return core.drops.add(Dropped::UnknownIndex, count);
        };
        let mut opened = std::mem::take(&mut self.opened);
        session.open_batch(&mut arena[run.clone()], stride, now, &mut opened);

        let (mut bytes, mut authentic, mut data) = (0, false, false);
        let table = core.table.load();
        // Neighbours usually share their source.
        let mut accepted = None;
        for plaintext in &opened {
            let plaintext = match plaintext {
                Ok(plaintext) => run.start + plaintext.start..run.start + plaintext.end,
                Err(reason) => {
                    core.drops.add(*reason, 1);
                    continue;
                }
            };
            authentic = true;
            bytes += plaintext.len() + OVERHEAD;
            if plaintext.is_empty() {
                continue;
            }
            data = true;
            let kept = self.keep(core, &table, &peer, arena, plaintext, message, |source| {
                accepted == Some(source) || {
                    let accepts = table.accepts(source, &peer);
                    if accepts {
                        accepted = Some(source);
                    }
                    accepts
                }
            });
            if let Err(reason) = kept {
                core.drops.add(reason, 1);
            }
        }
        self.opened = opened;
        if authentic {
            peer.count_received(bytes);
            let evidence = if session.awaits_confirmation() {
                Evidence::Confirmation
            } else {
                Evidence::Message
            };
            core.roam(&peer, message.from, evidence, now);
            note_received(core, &peer, &session, data, now);
        }
    }

    /// Checks a packet that was opened and keeps it for the TUN device, or diverts it. A relayed datagram is kept to be
    /// opened.
    #[expect(clippy::too_many_arguments, reason = "this many values decide")]
    fn keep(
        &mut self,
        core: &Core,
        table: &Table,
        peer: &Arc<Peer>,
        arena: &mut [u8],
        plaintext: Range<usize>,
        message: &Arrived,
        accepts: impl FnOnce(IpAddr) -> bool,
    ) -> Result<(), Dropped> {
        let packet = &mut arena[plaintext.clone()];
        let mut ip = Header::parse(packet).ok_or(Dropped::Malformed)?;
        if table.relays.is_for_this_device(&ip, packet) {
            if message.through.is_some() {
                return Err(Dropped::RelayedTwice);
            }
            if !table.relays.admits(ip.source, peer) {
                return Err(Dropped::ForeignRelay);
            }
            let datagram = relay_packet::open(&ip, packet)?;
            let ecn = message.ecn.decapsulate(ip.ecn).ok_or(Dropped::Congested)?;
            let datagram = plaintext.start + datagram.start..plaintext.start + datagram.end;
            self.keep_relayed(
                arena,
                &plaintext,
                datagram,
                Way::Relayed(ip.source),
                peer,
                ecn,
            );
            return Ok(());
        }
        if !accepts(ip.source) {
            return Err(Dropped::ForeignSource);
        }
        if core.unicast_only && !is_routable(ip.destination) {
            return Err(Dropped::ForeignDestination);
        }
        let ecn = message.ecn.decapsulate(ip.ecn).ok_or(Dropped::Congested)?;
        if ecn != ip.ecn {
            set_ecn(packet, ecn);
        }
        if core.diversion.takes(&ip, packet) {
            core.divert(Origin::Peer(peer.id().clone()), &packet[..ip.length]);
            return Ok(());
        }
        core.translation.inbound(packet, &mut ip);
        let packet = plaintext.start..plaintext.start + ip.length;
        self.coalescer.push(arena, packet, &ip);
        Ok(())
    }

    /// Keeps a relayed datagram, which lies in a plaintext, to be opened after those around it. If it continues the one
    /// before, it is moved next to it, so that they are opened as one batch.
    fn keep_relayed(
        &mut self,
        arena: &mut [u8],
        plaintext: &Range<usize>,
        datagram: Range<usize>,
        from: Way,
        relay: &Arc<Peer>,
        ecn: Ecn,
    ) {
        // Nothing else may lie between the two.
        let is_next = self.relayed_until + DATA_HEADER == plaintext.start;
        self.relayed_until = plaintext.end + TAG;
        if let Some(last) = self.relayed.last_mut().filter(|last| {
            is_next
                && last.from == from
                && last.ecn == ecn
                && last
                    .through
                    .as_ref()
                    .is_some_and(|through| Arc::ptr_eq(through, relay))
                && last.range.len().is_multiple_of(last.stride)
                && datagram.len() <= last.stride
        }) {
            let end = last.range.end + datagram.len();
            arena.copy_within(datagram, last.range.end);
            last.range.end = end;
            return;
        }
        self.relayed.push(Arrived {
            stride: datagram.len(),
            range: datagram,
            from,
            through: Some(relay.clone()),
            ecn,
        });
    }
}

/// Whether packets between hosts may have this destination: it is neither loopback, link-local, multicast,
/// limited broadcast or unspecified, nor an IPv4 address in the form of IPv6 (RFC 6890, RFC 4291).
fn is_routable(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(address) => {
            let [first, second, ..] = address.octets();
            match first {
                0 | 127 | 224..=239 => false,
                169 => second != 254,
                255 => !address.is_broadcast(),
                _ => true,
            }
        }
        IpAddr::V6(address) => {
            let [first, ..] = address.segments();
            // Unspecified, loopback and mapped addresses are all in ::/80.
            match first {
                0 => u128::from(address) >> 48 != 0,
                0xfe80..=0xfebf | 0xff00.. => false,
                _ => true,
            }
        }
    }
}

/// Records authentic messages of a session, and begins a handshake if one is due.
fn note_received(core: &Core, peer: &Arc<Peer>, session: &Arc<Session>, data: bool, now: Time) {
    core.received(peer, data, now);
    if session.confirm() {
        let pair = session.pair();
        let insists = pair.own < pair.peer;
        core.indices.retire(peer.confirm(session, insists, now));
        core.handshake_completed(peer, now);
        core.jobs.push(Job::Flush(peer.clone()));
    }
    if session.is_initiator()
        && now.since(session.created()) >= REKEY_ON_RECEIVE
        && peer
            .session()
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, session))
        && peer.timers.rekey_on_receive()
    {
        core.ask_handshake(peer, now);
    }
}

/// Queues what may be a handshake message.
fn pass_on(core: &Core, datagram: &[u8], message: &Arrived, now: Time) {
    let kind = datagram.first_chunk().map(|kind| u32::from_le_bytes(*kind));
    let dropped = match (kind, datagram.len()) {
        (Some(INITIATION), INITIATION_SIZE)
        | (Some(RESPONSE), RESPONSE_SIZE)
        | (Some(COOKIE_REPLY), COOKIE_REPLY_SIZE) => {
            let through = message.through.as_ref();
            let taken = core.take_handshake(datagram, message.from, through, now);
            taken.err()
        }
        _ => Some(Dropped::Malformed),
    };
    if let Some(reason) = dropped {
        core.drops.add(reason, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_link_local_and_similar_destinations_are_not_routable() {
        let routable = |address: &str| is_routable(address.parse().unwrap());
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "224.0.0.1",
            "239.255.255.250",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::10.0.0.1",
            "fe80::1",
            "febf::1",
            "ff02::1",
            "ffff::",
        ] {
            assert!(!routable(address), "{address}");
        }
        for address in [
            "1.0.0.0",
            "10.4.0.1",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.255.255",
            "169.255.0.0",
            "223.255.255.255",
            "255.255.255.254",
            "64:ff9b::10.0.0.1",
            "::1:0:0:0:0",
            "2001:db8::1",
            "fd00::1",
            "fe7f::1",
            "fec0::1",
            "feff::1",
        ] {
            assert!(routable(address), "{address}");
        }
    }
}
