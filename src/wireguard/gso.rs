//! Segmentation offload on the TUN side: one large packet with a virtio-net header stands for many.
//!
//! [`Split`] cuts a large packet of the kernel into the packets that are sent, [`Coalescer`] joins received
//! packets into as few large ones as possible. Both are pure and copy no payload more than once: a split
//! writes each packet to the place where it is sealed, a join only lists the pieces for `writev`.

use std::io::IoSlice;
use std::net::IpAddr;
use std::ops::Range;

use super::checksum;
use super::packet::{Header, IPV4_HEADER, TCP, UDP, UDP_HEADER};

/// The bytes of a virtio-net header.
pub const VNET_HEADER: usize = 10;
/// The most packets one large packet stands for: the kernel takes no more of UDP.
pub const MAX_SEGMENTS: usize = 64;
/// The most bytes of an IP packet.
pub const MAX_PACKET: usize = 65_535;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
/// Or'ed to the kind if the packet has the flag "congestion window reduced" (CWR).
const GSO_ECN: u8 = 0x80;

#[cfg(test)]
const TCP_HEADER: usize = 20;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 16;
const CWR: u8 = 128;

/// The virtio-net header (virtio 1.2, 5.1.6) in the host's byte order, as TUN has it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VnetHeader {
    flags: u8,
    kind: u8,
    header_length: u16,
    segment_size: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl VnetHeader {
    /// Takes the header off what was read.
    pub fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (&[flags, kind, h0, h1, s0, s1, c0, c1, o0, o1], packet) = bytes.split_first_chunk()?;
        let header = Self {
            flags,
            kind,
            header_length: u16::from_ne_bytes([h0, h1]),
            segment_size: u16::from_ne_bytes([s0, s1]),
            checksum_start: u16::from_ne_bytes([c0, c1]),
            checksum_offset: u16::from_ne_bytes([o0, o1]),
        };
        Some((header, packet))
    }

    /// Whether the packet stands for several.
    pub fn is_joined(&self) -> bool {
        self.kind & !GSO_ECN != GSO_NONE
    }

    /// The header as bytes.
    pub fn to_bytes(self) -> [u8; VNET_HEADER] {
        let [h0, h1] = self.header_length.to_ne_bytes();
        let [s0, s1] = self.segment_size.to_ne_bytes();
        let [c0, c1] = self.checksum_start.to_ne_bytes();
        let [o0, o1] = self.checksum_offset.to_ne_bytes();
        [self.flags, self.kind, h0, h1, s0, s1, c0, c1, o0, o1]
    }
}

/// How to cut a large packet.
#[derive(Clone, Debug)]
pub struct Split<'a> {
    packet: &'a [u8],
    kind: Kind,
    v6: bool,
    /// Where TCP or UDP begins, and where the payload does.
    transport: usize,
    payload: usize,
    /// Bytes of payload in each packet but the last.
    segment: usize,
    /// The sum of the addresses and the protocol.
    pseudo: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Tcp,
    Udp,
    /// One packet, whose checksum at this offset from the transport header is to be finished.
    Unfinished(usize),
    /// One packet, as it is.
    Whole,
}

impl<'a> Split<'a> {
    /// Reads how to cut a packet; `None` if header and packet don't fit together.
    pub fn new(vnet: &VnetHeader, packet: &'a [u8], ip: &Header) -> Option<Self> {
        let packet = packet.get(..ip.length)?;
        let transport = usize::from(vnet.checksum_start);
        let v6 = ip.source.is_ipv6();
        let whole = Self {
            packet,
            kind: Kind::Whole,
            v6,
            transport,
            payload: 0,
            segment: packet.len(),
            pseudo: 0,
        };
        let kind = match vnet.kind & !GSO_ECN {
            GSO_NONE if vnet.flags & NEEDS_CHECKSUM == 0 => return Some(whole),
            GSO_NONE => {
                let offset = usize::from(vnet.checksum_offset);
                let inside = transport >= ip.header && transport + offset + 2 <= packet.len();
                return inside.then_some(Self {
                    kind: Kind::Unfinished(offset),
                    ..whole
                });
            }
            GSO_TCP4 if !v6 => Kind::Tcp,
            GSO_TCP6 if v6 => Kind::Tcp,
            GSO_UDP => Kind::Udp,
            _ => return None,
        };
        // TUN gives no checksum_start without NEEDS_CSUM, and no GSO without either.
        if transport < ip.header || vnet.segment_size == 0 {
            return None;
        }
        let payload = match kind {
            Kind::Tcp => {
                let words = packet.get(transport + 12)? >> 4;
                (words >= 5).then_some(transport + usize::from(words) * 4)?
            }
            Kind::Udp | Kind::Unfinished(_) | Kind::Whole => transport + UDP_HEADER,
        };
        let protocol = if kind == Kind::Tcp { TCP } else { UDP };
        (payload < packet.len()).then(|| Self {
            kind,
            payload,
            segment: usize::from(vnet.segment_size),
            pseudo: checksum::pseudo_header(ip.source, ip.destination, protocol, 0),
            ..whole
        })
    }

    /// How many packets there are, at least one.
    pub fn count(&self) -> usize {
        (self.packet.len() - self.payload).div_ceil(self.segment)
    }

    /// The bytes of the `n`th packet.
    pub fn length(&self, n: usize) -> usize {
        self.payload + self.piece(n).len()
    }

    fn piece(&self, n: usize) -> Range<usize> {
        let start = self.payload + n * self.segment;
        start..(start + self.segment).min(self.packet.len())
    }

    /// Writes the `n`th packet into `out`, which must be of [`Self::length`].
    pub fn write(&self, n: usize, out: &mut [u8]) {
        match self.kind {
            Kind::Whole => out.copy_from_slice(self.packet),
            Kind::Unfinished(offset) => {
                out.copy_from_slice(self.packet);
                // The field holds the sum of the pseudo header, which thus is part of the sum.
                let sum = checksum::finish(checksum::sum(&out[self.transport..]));
                // Zero would mean "none" in UDP, and both forms of zero are equal elsewhere.
                let sum = if sum == 0 { 0xffff } else { sum };
                put(out, self.transport + offset, sum);
            }
            Kind::Tcp | Kind::Udp => {
                let (headers, payload) = out.split_at_mut(self.payload);
                headers.copy_from_slice(&self.packet[..self.payload]);
                payload.copy_from_slice(&self.packet[self.piece(n)]);
                self.finish(n, out);
            }
        }
    }

    fn finish(&self, n: usize, out: &mut [u8]) {
        let length = out.len();
        if self.v6 {
            put(out, 4, clamp(length - 40));
        } else {
            put(out, 2, clamp(length));
            let id = u16::from_be_bytes([out[4], out[5]]);
            put(out, 4, id.wrapping_add(clamp(n)));
            let header = usize::from(out[0] & 15) * 4;
            put(out, 10, 0);
            let sum = checksum::finish(checksum::sum(&out[..header]));
            put(out, 10, sum);
        }
        let transport = self.transport;
        let at = transport
            + if self.kind == Kind::Tcp {
                let sequence = out[transport + 4..].first_chunk().copied();
                let sequence = u32::from_be_bytes(sequence.unwrap_or_default());
                let sequence = sequence.wrapping_add(u32::try_from(n * self.segment).unwrap_or(0));
                out[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
                if n + 1 < self.count() {
                    out[transport + 13] &= !(FIN | PSH);
                }
                if n > 0 {
                    out[transport + 13] &= !CWR;
                }
                TCP_CHECKSUM
            } else {
                put(out, transport + 4, clamp(length - transport));
                UDP_CHECKSUM
            };
        put(out, at, 0);
        let sum = self.pseudo + (length - transport) as u64 + checksum::sum(&out[transport..]);
        let sum = checksum::finish(sum);
        put(out, at, if sum == 0 { 0xffff } else { sum });
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn clamp(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

/// Joins packets of one flow that follow each other.
///
/// Packets of one flow keep their order, and so do the first packets of the flows.
#[derive(Debug)]
pub struct Coalescer {
    joined: Vec<Joined>,
    used: usize,
    join_udp: bool,
}

impl Default for Coalescer {
    fn default() -> Self {
        Self {
            joined: Vec::new(),
            used: 0,
            join_udp: true,
        }
    }
}

/// How many packets back a predecessor is searched. Batches mix few flows, and where they mix many there is
/// little to join.
const LOOK_BACK: usize = 8;

#[derive(Debug, Default)]
struct Joined {
    /// The first packet, in the arena.
    first: Range<usize>,
    /// The payloads of the others.
    rest: Vec<Range<usize>>,
    flow: Option<Flow>,
    /// Whether another packet may be appended.
    open: bool,
    /// Whether the checksum of the first packet is known to be right.
    verified: bool,
    /// Bytes of all payloads.
    payload: usize,
    next_sequence: u32,
    push: bool,
}

/// The parts of a TCP or UDP packet that joining looks at.
#[derive(Clone, Copy, Debug)]
struct Flow {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Where TCP or UDP begins in the packet, and where the payload does.
    transport: usize,
    payload: usize,
    /// Bytes of payload.
    length: usize,
}

impl Coalescer {
    /// Takes a packet that lies in the arena.
    pub fn push(&mut self, arena: &[u8], packet: Range<usize>, ip: &Header) {
        let bytes = &arena[packet.clone()];
        let flow = Flow::of(bytes, ip);
        let joinable = flow
            .is_some_and(|flow| (self.join_udp || flow.protocol == TCP) && flow.is_joinable(bytes));
        if let Some(flow) = flow {
            let recent = self.used.saturating_sub(LOOK_BACK)..self.used;
            let same = |joined: &&mut Joined| {
                joined
                    .flow
                    .is_some_and(|other| flow.same(&other, arena, joined.first.start, packet.start))
            };
            if let Some(joined) = self.joined[recent].iter_mut().rev().find(same) {
                if joinable && joined.append(arena, packet.start, flow) {
                    return;
                }
                joined.open = false;
            }
        }
        if self.used == self.joined.len() {
            self.joined.push(Joined::default());
        }
        self.joined[self.used].begin(arena, packet, flow, joinable);
        self.used += 1;
    }

    /// Hands every packet, joined or alone, to `write` and forgets them.
    ///
    /// The pieces begin with the virtio-net header. `write` also gets the number of packets that
    /// went into this one.
    pub fn finish(&mut self, arena: &mut [u8], mut write: impl FnMut(&[IoSlice<'_>], usize)) {
        for joined in &mut self.joined[..self.used] {
            let vnet = joined.seal(arena).to_bytes();
            let mut pieces = [IoSlice::new(&[]); MAX_SEGMENTS + 1];
            pieces[0] = IoSlice::new(&vnet);
            pieces[1] = IoSlice::new(&arena[joined.first.clone()]);
            let count = joined.rest.len() + 1;
            for (piece, range) in pieces[2..].iter_mut().zip(&joined.rest) {
                *piece = IoSlice::new(&arena[range.clone()]);
            }
            write(&pieces[..=count], count);
        }
        self.used = 0;
    }

    /// Sets whether UDP packets are joined. The kernel accepts them since Linux 6.2.
    pub fn join_udp(&mut self, join: bool) {
        self.join_udp = join;
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }
}

impl Flow {
    fn of(packet: &[u8], ip: &Header) -> Option<Self> {
        if ip.fragment {
            return None;
        }
        let transport = ip.header;
        let payload = match ip.protocol {
            TCP => {
                let words = packet.get(transport + 12)? >> 4;
                (words >= 5).then_some(transport + usize::from(words) * 4)?
            }
            UDP => transport + UDP_HEADER,
            _ => return None,
        };
        Some(Self {
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            transport,
            payload,
            length: packet.len().checked_sub(payload)?,
        })
    }

    /// Whether a packet may be part of a joined one at all.
    fn is_joinable(&self, packet: &[u8]) -> bool {
        let transport = self.transport;
        let plain = match self.protocol {
            TCP => packet[transport + 13] & !PSH == ACK,
            // A UDP packet may have padding beyond its own length, or no checksum.
            _ => {
                packet[transport + 4..transport + 6]
                    == clamp(packet.len() - transport).to_be_bytes()
                    && packet[transport + 6..transport + 8] != [0, 0]
            }
        };
        // With IPv4 options nothing is joined. Without, the checksum of the header must be right, because
        // a new one is made.
        let ip = self.source.is_ipv6()
            || transport == IPV4_HEADER
                && checksum::fold(checksum::sum(&packet[..IPV4_HEADER])) == 0xffff;
        plain && ip && self.length > 0
    }

    fn same(&self, other: &Self, arena: &[u8], other_start: usize, start: usize) -> bool {
        let ports = |start: usize, flow: &Self| {
            let at = start + flow.transport;
            &arena[at..at + 4]
        };
        self.protocol == other.protocol
            && ports(start, self) == ports(other_start, other)
            && self.source == other.source
            && self.destination == other.destination
    }

    fn checksum_is_right(&self, packet: &[u8]) -> bool {
        let transport = &packet[self.transport..];
        let pseudo = checksum::pseudo_header(
            self.source,
            self.destination,
            self.protocol,
            transport.len(),
        );
        checksum::fold(pseudo + checksum::sum(transport)) == 0xffff
    }
}

impl Joined {
    fn begin(&mut self, arena: &[u8], packet: Range<usize>, flow: Option<Flow>, joinable: bool) {
        let start = packet.start;
        self.first = packet;
        self.rest.clear();
        self.flow = flow;
        self.open = joinable;
        self.verified = false;
        self.push = false;
        if let Some(flow) = flow.filter(|_| joinable) {
            self.payload = flow.length;
            if flow.protocol == TCP {
                self.push = arena[start + flow.transport + 13] & PSH != 0;
                self.open = !self.push;
                self.next_sequence = sequence(arena, start + flow.transport)
                    .wrapping_add(u32::try_from(flow.length).unwrap_or(0));
            }
        }
    }

    /// Appends a joinable packet of the same flow if it continues this one.
    fn append(&mut self, arena: &[u8], start: usize, flow: Flow) -> bool {
        let Some(first) = self.flow.filter(|_| self.open) else {
            return false;
        };
        let packet = start..start + flow.payload + flow.length;
        let fits = flow.payload == first.payload
            && flow.length <= first.length
            && first.payload + self.payload + flow.length <= MAX_PACKET
            && self.rest.len() + 2 <= MAX_SEGMENTS
            && same_headers(&arena[self.first.clone()], &arena[packet.clone()], &first);
        let follows =
            flow.protocol == UDP || sequence(arena, start + flow.transport) == self.next_sequence;
        if !fits || !follows || !flow.checksum_is_right(&arena[packet.clone()]) {
            return false;
        }
        if !self.verified && !first.checksum_is_right(&arena[self.first.clone()]) {
            return false;
        }
        self.verified = true;
        self.rest.push(packet.start + flow.payload..packet.end);
        self.payload += flow.length;
        self.open = flow.length == first.length;
        if flow.protocol == TCP {
            let length = u32::try_from(flow.length).unwrap_or(0);
            self.next_sequence = self.next_sequence.wrapping_add(length);
            if arena[start + flow.transport + 13] & PSH != 0 {
                (self.push, self.open) = (true, false);
            }
        }
        true
    }

    /// Rewrites the header of the first packet for all of them.
    fn seal(&self, arena: &mut [u8]) -> VnetHeader {
        let Some(flow) = self.flow.filter(|_| !self.rest.is_empty()) else {
            return VnetHeader::default();
        };
        let packet = &mut arena[self.first.clone()];
        let length = flow.payload + self.payload;
        let v6 = flow.source.is_ipv6();
        if v6 {
            put(packet, 4, clamp(length - 40));
        } else {
            put(packet, 2, clamp(length));
            put(packet, 10, 0);
            let sum = checksum::finish(checksum::sum(&packet[..IPV4_HEADER]));
            put(packet, 10, sum);
        }
        let (kind, offset) = if flow.protocol == TCP {
            if self.push {
                packet[flow.transport + 13] |= PSH;
            }
            (if v6 { GSO_TCP6 } else { GSO_TCP4 }, TCP_CHECKSUM)
        } else {
            put(packet, flow.transport + 4, clamp(length - flow.transport));
            (GSO_UDP, UDP_CHECKSUM)
        };
        let pseudo = checksum::pseudo_header(
            flow.source,
            flow.destination,
            flow.protocol,
            length - flow.transport,
        );
        put(packet, flow.transport + offset, checksum::fold(pseudo));
        VnetHeader {
            flags: NEEDS_CHECKSUM,
            kind,
            header_length: clamp(flow.payload),
            segment_size: clamp(flow.length),
            checksum_start: clamp(flow.transport),
            checksum_offset: clamp(offset),
        }
    }
}

fn sequence(arena: &[u8], transport: usize) -> u32 {
    let bytes = arena[transport + 4..].first_chunk().copied();
    u32::from_be_bytes(bytes.unwrap_or_default())
}

/// Whether two packets of a flow differ only where segments of one packet differ.
fn same_headers(first: &[u8], next: &[u8], flow: &Flow) -> bool {
    let transport = flow.transport;
    let ip = if flow.source.is_ipv6() {
        // Version, class and label; hop limit. The extension headers: there are none.
        first[..4] == next[..4] && first[7] == next[7]
    } else {
        // Type of service; fragmentation flags; time to live.
        first[1] == next[1] && first[6..9] == next[6..9]
    };
    let transport = flow.protocol == UDP
        // Acknowledgement; data offset; window; urgent pointer and options.
        || first[transport + 8..transport + 13] == next[transport + 8..transport + 13]
            && first[transport + 14..transport + 16] == next[transport + 14..transport + 16]
            && first[transport + 18..flow.payload] == next[transport + 18..flow.payload];
    ip && transport
}

#[cfg(test)]
mod tests;
