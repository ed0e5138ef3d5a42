//! Support for benchmarks: the path of a packet through the device, without sockets and threads.
//!
//! Two devices with one session, no handshake and a fixed time. The product does not use it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::handshake::SessionKeys;
use zeroize::Zeroizing;

use super::clock::Time;
use super::config::{PeerConfig, PeerId};
use super::core::Core;
use super::key::PublicKey;
use super::packet::Outer;
use super::pairings::Pair;
use super::peer::{Peer, Wire};
use super::protocol::{DATA_HEADER, OVERHEAD};
use super::receive::Receive;
use super::session::{Opened, Session};
use super::timestamp::Timestamp;
use super::timestamp_sequence::TimestampSequence;
use super::transmit::Transmit;
use super::udp::{Endpoint, Message};

/// Two devices: what the first one sends, the second one receives.
pub struct DevicePair {
    sender: Side,
    receiver: Side,
    transmit: Transmit,
    receive: Receive,
    opened: Vec<Opened>,
    wire: Loop,
    now: Time,
}

struct Side {
    core: Core,
    session: Arc<Session>,
    _peer: Arc<Peer>,
}

/// Keeps what was sent, in runs of datagrams of one size, or only counts it.
#[derive(Default)]
struct Loop {
    keep: bool,
    runs: RefCell<Vec<Run>>,
}

/// Datagrams of `stride` bytes one after the other, the last of which may be shorter.
#[derive(Clone, Debug)]
pub struct Run {
    /// The datagrams.
    pub bytes: Vec<u8>,
    /// The bytes of each but the last.
    pub stride: usize,
}

impl Wire for Loop {
    fn send(
        &self,
        run: &[u8],
        stride: usize,
        _to: &Endpoint,
        _outer: Outer,
        offload: bool,
    ) -> io::Result<bool> {
        if self.keep {
            let bytes = run.to_vec();
            self.runs.borrow_mut().push(Run { bytes, stride });
        }
        Ok(offload)
    }

    fn leads(&self, _: &Endpoint) -> bool {
        true
    }
}

impl Side {
    fn new(own: u8, other: u8, now: Time) -> Self {
        let timestamps = TimestampSequence::new(Timestamp::default(), None);
        let core = Core::new(
            1420,
            timestamps,
            Arc::default(),
            Timestamp::default,
            Time::default(),
        );
        core.link_changed(true);
        let network = ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, 0, other, 0), 24);
        let key = PublicKey([other; 32]);
        let config = PeerConfig {
            endpoint: Some(SocketAddr::new([192, 0, 2, other].into(), 51820)),
            ..PeerConfig::new(key).with_allowed_ips(BTreeSet::from([network.into()]))
        };
        core.set_peers(&BTreeMap::from([(PeerId::from(&key), config)]), now);
        let peer = core.table.load().peers[&key].clone();
        let keys = SessionKeys {
            local_index: own.into(),
            peer_index: other.into(),
            receiving_key: Zeroizing::new([own; 32]),
            sending_key: Zeroizing::new([other; 32]),
        };
        let pair = Pair {
            own: PublicKey([own; 32]),
            peer: key,
        };
        let session = Session::new(&keys, Arc::downgrade(&peer), pair, true, now);
        let session = Arc::new(session);
        core.indices.establish(&session);
        peer.install_initiated(session.clone(), false, now);
        Self {
            core,
            session,
            _peer: peer,
        }
    }
}

impl Default for DevicePair {
    fn default() -> Self {
        let now = Time::from_duration(Duration::from_secs(10_000));
        Self {
            sender: Side::new(1, 2, now),
            receiver: Side::new(2, 1, now),
            transmit: Transmit::default(),
            receive: Receive::default(),
            opened: Vec::new(),
            wire: Loop::default(),
            now,
        }
    }
}

impl DevicePair {
    /// Seals a run of datagrams in place; each has its plaintext 16 bytes from its beginning, and 16
    /// bytes of room behind it.
    pub fn seal(&self, run: &mut Run) {
        let sealed = self.sender.session.seal_batch(&mut run.bytes, run.stride);
        assert!(sealed, "the session has messages left");
    }

    /// Opens a run of datagrams in place; returns how many were authentic and new.
    pub fn open(&mut self, run: &mut Run) -> usize {
        let session = &self.receiver.session;
        session.open_batch(&mut run.bytes, run.stride, self.now, &mut self.opened);
        self.opened.iter().filter(|opened| opened.is_ok()).count()
    }

    /// Takes a packet behind its virtio-net header as it is read from the TUN device, and drops the datagrams.
    pub fn transmit(&mut self, bytes: &[u8]) {
        let core = &self.sender.core;
        let taken = self.transmit.packet(core, &self.wire, bytes, self.now);
        assert!(taken.is_ok(), "the packet goes to the peer");
        self.transmit.flush(core, &self.wire, self.now);
    }

    /// The same, and returns what was sent.
    pub fn transmitted(&mut self, bytes: &[u8]) -> Vec<Run> {
        self.wire.keep = true;
        self.transmit(bytes);
        self.wire.keep = false;
        self.wire.runs.take()
    }

    /// Takes a run of datagrams as it is received; returns how many packets, joined or not, would be
    /// written to the TUN device.
    pub fn receive(&mut self, run: &mut Run) -> usize {
        let message = Message {
            range: 0..run.bytes.len(),
            stride: run.stride,
            from: SocketAddr::new([192, 0, 2, 1].into(), 51820).into(),
            ecn: super::packet::Ecn::NotCapable,
        };
        let core = &self.receiver.core;
        self.receive
            .message(core, &mut run.bytes, &message, self.now);
        let mut written = 0;
        self.receive.finish(&mut run.bytes, |_, _| written += 1);
        written
    }
}

impl Run {
    /// `count` datagrams around plaintexts of `length` zeros, to be sealed.
    pub fn of_zeros(count: usize, length: usize) -> Self {
        let stride = length + OVERHEAD;
        Self {
            bytes: vec![0; count * stride],
            stride,
        }
    }

    /// The plaintext of each datagram.
    pub fn plaintexts(&self) -> impl Iterator<Item = &[u8]> {
        let datagrams = self.bytes.chunks(self.stride);
        datagrams.map(|datagram| &datagram[DATA_HEADER..datagram.len() - (OVERHEAD - DATA_HEADER)])
    }
}

/// A TCP packet over IPv4 from 10.0.1.1 to 10.0.2.1 that stands for `segments` packets with `segment`
/// bytes of payload each, as the TUN device hands it over.
pub fn superpacket(segments: u16, segment: u16) -> Vec<u8> {
    let payload = usize::from(segments) * usize::from(segment);
    let length = u16::try_from(40 + payload).expect("at most 65,495 bytes of payload");
    let [s0, s1] = segment.to_ne_bytes();
    let [t0, t1] = 20_u16.to_ne_bytes();
    let [c0, c1] = 16_u16.to_ne_bytes();
    let [h0, h1] = 40_u16.to_ne_bytes();
    // Needs a checksum, TCP over IPv4.
    let mut bytes = vec![1, 1, h0, h1, s0, s1, t0, t1, c0, c1];
    let [l0, l1] = length.to_be_bytes();
    bytes.extend([0x45, 0, l0, l1, 0, 1, 0x40, 0, 64, 6, 0, 0]);
    bytes.extend([10, 0, 1, 1, 10, 0, 2, 1]);
    bytes.extend([
        0, 7, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 16, 1, 0, 0, 0, 0, 0,
    ]);
    bytes.resize(bytes.len() + payload, 0xa5);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superpacket_arrives_in_one_piece() {
        let mut bench = DevicePair::default();
        let mut runs = bench.transmitted(&superpacket(44, 1380));
        assert_eq!(runs.len(), 1);
        assert_eq!(runs[0].bytes.len(), 44 * (1420 + OVERHEAD));
        assert_eq!(bench.receive(&mut runs[0]), 1);
    }

    #[test]
    fn a_run_is_opened_as_it_was_sealed() {
        let mut bench = DevicePair::default();
        let mut run = Run::of_zeros(3, 64);
        bench.seal(&mut run);
        assert_eq!(bench.open(&mut run), 3);
        assert!(run.plaintexts().all(|plaintext| plaintext == [0; 64]));
    }
}
