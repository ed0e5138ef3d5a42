//! Devices without sockets and threads, whose datagrams a test carries by hand.
//!
//! [`boringtun_gaps`] has a test for each thing that boringtun leaves to its embedder.

#[cfg(test)]
mod aliases;
#[cfg(test)]
mod boringtun_gaps;
#[cfg(test)]
mod candidates;
#[cfg(test)]
mod crossing;
#[cfg(test)]
mod destinations;
#[cfg(test)]
mod diverted;
#[cfg(test)]
mod early;
#[cfg(test)]
mod events;
#[cfg(test)]
mod failing;
#[cfg(test)]
mod flows;
#[cfg(test)]
mod garbage;
#[cfg(test)]
mod key_rotation;
#[cfg(test)]
mod path_mtu;
#[cfg(test)]
mod peer_names;
#[cfg(test)]
mod relayed;
#[cfg(test)]
mod replayed;
#[cfg_attr(
    test,
    expect(unreachable_pub, reason = "public for the fuzzer's crate")
)]
pub mod script;
#[cfg(test)]
mod sessions;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;

use super::clock::Time;
use super::config::{PeerConfig, PeerId};
use super::core::Core;
use super::drops::Dropped;
use super::handshake::Handshaker;
use super::key::{PrivateKey, PublicKey};
use super::packet::{Ecn, Fragments, Outer};
use super::peer::{Peer, Wire};
use super::receive::Receive;
use super::timestamp::{Accepted, Timestamp};
use super::timestamp_sequence::TimestampSequence;
use super::transmit::Transmit;
use super::udp::{Endpoint, Message};
use super::{checksum, gso};
#[cfg(test)]
use super::{endpoint_rule::Evidence, way::Way};

/// A datagram under way.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
    ecn: Ecn,
    fragments: Fragments,
}

impl Datagram {
    fn kind(&self) -> u8 {
        self.bytes[0]
    }
}

/// Collects what a host sends.
struct Captured {
    address: SocketAddr,
    sent: RefCell<Vec<Datagram>>,
    /// The error of every send, if any.
    errno: Cell<Option<i32>>,
    /// Whether the path accepts segmentation offload.
    offload: Cell<bool>,
}

impl Wire for Captured {
    fn send(
        &self,
        run: &[u8],
        stride: usize,
        to: &Endpoint,
        outer: Outer,
        offload: bool,
    ) -> io::Result<bool> {
        if let Some(errno) = self.errno.get() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let datagrams = run.chunks(stride).map(|bytes| Datagram {
            from: self.address,
            to: to.remote,
            bytes: bytes.to_vec(),
            ecn: outer.ecn,
            fragments: outer.fragments,
        });
        self.sent.borrow_mut().extend(datagrams);
        Ok(offload && self.offload.get())
    }

    fn leads(&self, _: &Endpoint) -> bool {
        true
    }
}

struct Host {
    key: PrivateKey,
    core: Arc<Core>,
    wire: Captured,
    transmit: Transmit,
    receive: Receive,
    handshaker: Handshaker,
    /// Packets that the tunnel has delivered.
    delivered: Vec<Vec<u8>>,
}

impl Host {
    /// A host at 192.0.2.`n`, with the same key and timestamps as any other of that number.
    fn new(n: u8) -> Self {
        Self::that_accepted(n, Arc::default())
    }

    /// A host whose earlier runs have accepted these timestamps.
    fn that_accepted(n: u8, accepted: Arc<Mutex<Accepted>>) -> Self {
        Self::with(n, accepted, false)
    }

    /// A host that drops packets to other than unicast addresses, or does not.
    fn with(n: u8, accepted: Arc<Mutex<Accepted>>, unicast_only: bool) -> Self {
        let timestamps = TimestampSequence::new(Timestamp::default(), None);
        let mut core = Core::new(
            1420,
            timestamps,
            accepted,
            || Timestamp::from_unix(Duration::from_secs(1)),
            Time::default(),
        );
        core.unicast_only = unicast_only;
        let core = Arc::new(core);
        core.link_changed(true);
        let key = PrivateKey([n; 32]);
        core.set_private_key(Some(key.clone()));
        Self {
            key,
            wire: Captured {
                address: address(n),
                sent: RefCell::default(),
                errno: Cell::default(),
                offload: Cell::new(true),
            },
            transmit: Transmit::default(),
            receive: Receive::default(),
            handshaker: Handshaker::new(core.clone()),
            delivered: Vec::new(),
            core,
        }
    }

    fn public(&self) -> PublicKey {
        self.key.public_key()
    }

    /// The name that other hosts call it by.
    fn id(&self) -> PeerId {
        PeerId::from(&self.public())
    }

    fn set_peers(&self, peers: &[(&Self, PeerConfig)], now: Time) {
        self.core.set_peers(&peers_of(peers), now);
    }

    fn peer(&self, host: &Self) -> Arc<Peer> {
        self.core.table.load().peers[&host.public()].clone()
    }

    fn drops(&self, reason: Dropped) -> u64 {
        self.core.drops.count(reason)
    }
}

/// The UDP address of host `n`.
fn address(n: u8) -> SocketAddr {
    (Ipv4Addr::new(192, 0, 2, n), 51820).into()
}

/// Host `n` as a peer that owns 10.0.`n`.0/24.
fn config(n: u8) -> PeerConfig {
    let key = PrivateKey([n; 32]).public_key();
    PeerConfig {
        endpoint: Some(address(n)),
        ..PeerConfig::new(key).with_allowed_ips([net(&format!("10.0.{n}.0/24"))].into())
    }
}

fn net(net: &str) -> IpNet {
    net.parse().unwrap()
}

/// A UDP packet from 10.0.`from`.1 to 10.0.`to`.1.
fn packet(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    packet_between([10, 0, from, 1].into(), [10, 0, to, 1].into(), payload)
}

fn packet_between(source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(28 + payload.len()).unwrap();
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0];
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum = checksum::finish(checksum::sum(&packet));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0, 7, 0, 9]);
    packet.extend((length - 20).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

/// Hosts, the datagrams between them, and the time.
struct World {
    hosts: Vec<Host>,
    now: Time,
    under_way: VecDeque<Datagram>,
    /// All datagrams ever sent.
    log: Vec<Datagram>,
}

impl World {
    /// Two hosts, 1 and 2, that are peers. Nothing was sent yet.
    fn pair() -> Self {
        let world = Self::of([1, 2]);
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, config(2))], world.now);
        two.set_peers(&[(one, config(1))], world.now);
        world
    }

    /// Two hosts, the second of which has no endpoint of the first.
    fn pair_with_one_endpoint() -> Self {
        let world = Self::of([1, 2]);
        let [one, two] = world.hosts.as_slice() else {
            unreachable!()
        };
        one.set_peers(&[(two, config(2))], world.now);
        let anywhere = PeerConfig {
            endpoint: None,
            ..config(1)
        };
        two.set_peers(&[(one, anywhere)], world.now);
        world
    }

    /// Two hosts with a session.
    fn connected_pair() -> Self {
        let mut world = Self::pair();
        world.send(0, &packet(1, 2, b"hello"));
        world.settle();
        assert_eq!(world.hosts[1].delivered, [packet(1, 2, b"hello")]);
        world.hosts[1].delivered.clear();
        world
    }

    fn of<const N: usize>(numbers: [u8; N]) -> Self {
        Self {
            hosts: numbers.map(Host::new).into(),
            now: Time::from_duration(Duration::from_secs(10_000)),
            under_way: VecDeque::new(),
            log: Vec::new(),
        }
    }

    /// A host reads a packet from its TUN device and sends it.
    fn send(&mut self, host: usize, packet: &[u8]) {
        let bytes = [&gso::VnetHeader::default().to_bytes()[..], packet].concat();
        let Host {
            core,
            wire,
            transmit,
            ..
        } = &mut self.hosts[host];
        let _ = transmit.packet(core, wire, &bytes, self.now);
        transmit.flush(core, wire, self.now);
        self.collect();
    }

    /// The same with several packets, which are sent as one run if possible.
    #[cfg(test)]
    fn send_run(&mut self, host: usize, packets: &[Vec<u8>]) {
        let Host {
            core,
            wire,
            transmit,
            ..
        } = &mut self.hosts[host];
        for packet in packets {
            let bytes = [&gso::VnetHeader::default().to_bytes()[..], packet].concat();
            let _ = transmit.packet(core, wire, &bytes, self.now);
        }
        transmit.flush(core, wire, self.now);
        self.collect();
    }

    /// Every handshake thread does its work.
    fn work(&mut self) {
        let now = self.now;
        for host in &mut self.hosts {
            host.handshaker.run(&host.wire, || now);
            host.handshaker.tick(&host.wire, now);
            host.handshaker.run(&host.wire, || now);
        }
        self.collect();
    }

    fn collect(&mut self) {
        for host in &self.hosts {
            let sent = host.wire.sent.take();
            self.log.extend(sent.iter().cloned());
            self.under_way.extend(sent);
        }
    }

    /// A datagram reaches a host.
    fn deliver(&mut self, datagram: &Datagram) {
        let Some(host) = self
            .hosts
            .iter_mut()
            .find(|host| host.wire.address == datagram.to)
        else {
            return;
        };
        let mut arena = datagram.bytes.clone();
        let message = Message {
            range: 0..arena.len(),
            stride: arena.len(),
            from: datagram.from.into(),
            ecn: datagram.ecn,
        };
        host.receive
            .message(&host.core, &mut arena, &message, self.now);
        let delivered = &mut host.delivered;
        host.receive.finish(&mut arena, |pieces, _| {
            let bytes: Vec<u8> = pieces
                .iter()
                .flat_map(|piece| piece.iter().copied())
                .collect();
            delivered.push(bytes[gso::VNET_HEADER..].to_vec());
        });
    }

    /// All datagrams arrive, with those that they lead to, until none is under way.
    fn settle(&mut self) {
        self.settle_with(|_| true);
    }

    /// The same, but only datagrams that `passes` arrive.
    fn settle_with(&mut self, mut passes: impl FnMut(&Datagram) -> bool) {
        for _ in 0..100 {
            self.work();
            if self.under_way.is_empty() {
                return;
            }
            while let Some(datagram) = self.under_way.pop_front() {
                if passes(&datagram) {
                    self.deliver(&datagram);
                }
            }
        }
        panic!("the hosts do not stop sending");
    }

    /// Time passes, in steps of a tick.
    fn pass(&mut self, time: Duration) {
        self.pass_with(time, |_| true);
    }

    fn pass_with(&mut self, time: Duration, mut passes: impl FnMut(&Datagram) -> bool) {
        let end = self.now + time;
        while self.now < end {
            self.now = end.min(self.now + Duration::from_millis(200));
            self.settle_with(&mut passes);
        }
    }

    /// How many messages of a kind were sent so far.
    fn count(&self, kind: u8) -> usize {
        self.log
            .iter()
            .filter(|datagram| datagram.kind() == kind)
            .count()
    }

    /// Whether packets pass, both ways.
    fn assert_connected(&mut self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let (a, b) = (
                u8::try_from(from + 1).unwrap(),
                u8::try_from(to + 1).unwrap(),
            );
            self.hosts[to].delivered.clear();
            self.send(from, &packet(a, b, b"are you there"));
            self.settle();
            assert_eq!(self.hosts[to].delivered, [packet(a, b, b"are you there")]);
            self.hosts[to].delivered.clear();
        }
    }
}

fn keepalive(seconds: u16) -> Option<NonZeroU16> {
    NonZeroU16::new(seconds)
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// These peers, called by their keys as `wg` would call them.
fn peers_of(hosts: &[(&Host, PeerConfig)]) -> BTreeMap<PeerId, PeerConfig> {
    let peer = |(host, config): &(&Host, PeerConfig)| {
        let public_key = host.public();
        let config = PeerConfig {
            public_key,
            ..config.clone()
        };
        (PeerId::from(&public_key), config)
    };
    hosts.iter().map(peer).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
