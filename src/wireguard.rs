//! A WireGuard device in userspace: a TUN link, a UDP port, and the threads between them.
//!
//! [`Device::start`] makes all of it. The agent calls [`Device::set_peers`] when its plan changes, and `wg`
//! configures the same device through [`uapi`]. Events are reported to the embedder, see [`PeerEvents`]. Echoes
//! are diverted to it, see [`Device::set_diverted`].
//! Nothing here knows of clusters.
//!
//! ```text
//!  TUN queue ──read──► transmit: route, cut, pad, seal a batch ──sendmsg, UDP_SEGMENT──► UDP socket
//!  TUN queue ◄─writev─ receive: open a batch, check source, join ◄──recvmmsg, UDP_GRO─── UDP socket
//!                          │ handshake messages, requests for a session
//!                          ▼
//!                      handshake: Noise, cookies, timers, the link's state
//! ```
//!
//! The threads share a `Core`: the peer table, which is replaced and never changed; the receiver
//! indices; and peers, whose sessions seal and open on several threads at the same time. Packets of two
//! peers never take the same lock.
//!
//! `tests` lists what this device does and boringtun's does not, with a test for each.

mod abort;
mod admission;
pub mod bench_support;
mod checksum;
mod clock;
pub mod config;
mod core;
mod divert;
mod drops;
mod duplex;
mod endpoint_rule;
mod events;
pub mod gso;
mod handshake;
mod held;
mod icmp;
mod identity;
mod indices;
mod io;
pub mod key;
mod link;
mod nested;
pub mod packet;
mod pairings;
mod peer;
mod place;
mod protocol;
mod receive;
mod reconfigure;
mod relay_packet;
mod relay_table;
pub mod replay;
mod routes;
mod send;
mod sequencer;
mod session;
mod staged;
pub mod table;
#[cfg(test)]
mod tests;
/// For the fuzzer.
#[cfg(all(fuzzing, not(test)))]
#[expect(
    clippy::unwrap_used,
    dead_code,
    reason = "tests, of which the fuzzer runs some"
)]
pub mod tests;
mod threads;
mod timers;
mod timestamp;
mod timestamp_sequence;
mod timestamp_store;
mod translation;
mod transmit;
mod tun;
pub mod uapi;
mod udp;
mod way;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use self::clock::Time;
pub use self::config::{
    MAX_CANDIDATES, PeerConfig, PeerId, PeerMtu, PeerWay, RELAY_PORT, overhead,
};
use self::core::Core;
pub use self::core::UNASKED_AFTER;
pub use self::divert::{Diverted, ECHO_PORT, Origin};
pub use self::drops::Dropped;
pub use self::events::PeerEvents;
use self::io::{Io, OnGone, open_queues, write_alone};
use self::key::{PrivateKey, PublicKey};
pub use self::pairings::Pair;
pub use self::protocol::{OVERHEAD, REJECT_AFTER_TIME};

use self::threads::Callbacks;
pub use self::timers::SILENT_AFTER;
pub use self::timestamp::{Accepted, Store, Tai64n, Timestamp};
use self::timestamp_sequence::TimestampSequence;
use self::timestamp_store::StoreWriter;
use self::transmit::send_alone;
pub use self::tun::TunError;
use self::udp::Sockets;
use self::way::Way;

/// The MTU of a new link: what is left of 1,500 bytes after IPv6, UDP and WireGuard.
pub const DEFAULT_MTU: u32 = 1420;

/// The options of a device.
pub struct Options {
    /// The name of the TUN link.
    pub name: String,
    /// The MTU in bytes of a link that does not exist yet.
    pub mtu: u32,
    /// Keeps the link when the process ends, and makes it again when another program deletes it.
    pub persistent: bool,
    /// The UDP port; 0 takes a free one.
    pub listen_port: u16,
    /// The mark (`SO_MARK`) of every datagram that is sent; 0 is none.
    pub fwmark: u32,
    /// The number of queues of the link, each with a thread; `None` follows the number of CPUs.
    pub queues: Option<NonZeroUsize>,
    /// The argument of the last call to [`Store::keep_own`] in any earlier run.
    pub timestamp_floor: Timestamp,
    /// The argument of the last call to [`Store::keep_accepted`] in any earlier run.
    pub accepted: Accepted,
    /// Keeps handshake timestamps over restarts. Handshakes do not wait for it.
    pub store: Option<Box<dyn Store>>,
    /// Drops packets of peers to loopback, link-local, multicast, broadcast, unspecified and mapped addresses,
    /// as [`Dropped::ForeignDestination`]. The kernel's WireGuard passes them on, since a routing protocol
    /// may need multicast.
    pub unicast_only: bool,
    /// Called once if another program deletes the link and it is not persistent.
    pub on_link_gone: Box<dyn Fn() + Send + Sync>,
    /// Called when there are events to take; see [`PeerEvents`] for the contract.
    pub on_events: Box<dyn Fn() + Send + Sync>,
    /// Called on the handshake thread when there are packets to take with [`Device::take_diverted`]. Calls
    /// coalesce, and one may come when everything was taken already. The function should return soon.
    pub on_diverted: Box<dyn Fn() + Send + Sync>,
}

impl Options {
    /// A link of this name that ends with the process, on a free port, without a mark.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            mtu: DEFAULT_MTU,
            persistent: false,
            listen_port: 0,
            fwmark: 0,
            queues: None,
            timestamp_floor: Timestamp::default(),
            accepted: Accepted::new(),
            store: None,
            unicast_only: false,
            on_link_gone: Box::new(|| {}),
            on_events: Box::new(|| {}),
            on_diverted: Box::new(|| {}),
        }
    }
}

/// The reason why a device did not start, in one sentence.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The link could not be made.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// Another process has the port.
    #[error(
        "UDP port {0} is in use by another process (ss -lunp shows which): stop that process or choose another port"
    )]
    PortInUse(u16),
    /// The socket could not be opened.
    #[error("opening UDP port {0}: {1}")]
    Socket(u16, std::io::Error),
    /// A thread or descriptor could not be made.
    #[error("starting the tunnel's threads: {0}")]
    Threads(std::io::Error),
}

/// Counters of a device.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// By peer.
    pub peers: BTreeMap<PeerId, PeerStats>,
    /// Dropped packets, by reason.
    pub drops: BTreeMap<Dropped, u64>,
}

/// Counters of a peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PeerStats {
    /// Its key.
    pub public_key: PublicKey,
    /// The keys of the session that packets to it are sealed with.
    pub pair: Option<Pair>,
    /// The source of its last message, or else the configured endpoint. For a peer behind a relay it is its WireGuard
    /// address and [`RELAY_PORT`].
    pub endpoint: Option<SocketAddr>,
    /// Whether the peer is behind a relay. Then its endpoint tells others nothing.
    pub relayed: bool,
    /// Bytes of authenticated messages received, with WireGuard's headers.
    pub rx_bytes: u64,
    /// Bytes of messages sent, with WireGuard's headers.
    pub tx_bytes: u64,
    /// How long ago the last handshake was completed.
    pub last_handshake: Option<Duration>,
    /// How long ago the last *unasked* initiation of the peer arrived: one from an IP address to which this
    /// device had sent nothing for [`UNASKED_AFTER`], while it had sent nothing to the peer at any other
    /// address either, and at least that long after the device started, since an earlier process may have
    /// sent. One through a relay is never unasked. Then no mapping of a NAT or firewall in front of this host let it in.
    ///
    /// This does not exclude a NAT that lets in every source while anything is sent through it
    /// (endpoint-independent filtering, RFC 4787, section 5). Behind such a NAT, keepalives to one peer
    /// must go on.
    pub heard_unasked: Option<Duration>,
    /// How long ago data or an initiation was first sent after the last message of the peer; `None` if
    /// nothing is awaited. A keepalive gets no answer and does not count.
    pub unanswered: Option<Duration>,
    /// The last answer to an initiation of this device.
    pub answer: Option<Answer>,
}

/// An answer to a handshake initiation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answer {
    /// Its source.
    pub from: SocketAddr,
    /// How long after the initiation it came.
    pub round_trip: Duration,
    /// How long ago it came.
    pub ago: Duration,
}

/// A running device. Dropping it ends its threads; the link stays if it is persistent.
pub struct Device {
    core: Arc<Core>,
    io: Arc<Io>,
    threads: Vec<JoinHandle<()>>,
}

impl Device {
    /// Makes or takes over the link, opens the port and starts the threads. The link exists when this
    /// returns. A new link is down and has no addresses.
    ///
    /// The sockets stay in the network namespace of the calling thread, even if the link moves to another.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left behind.
    pub fn start(options: Options) -> Result<Self, StartError> {
        let Options {
            name,
            mtu,
            persistent,
            listen_port,
            fwmark,
            ..
        } = options;
        let sockets = Sockets::bind(listen_port, fwmark).map_err(|error| {
            if error.kind() == std::io::ErrorKind::AddrInUse {
                StartError::PortInUse(listen_port)
            } else {
                StartError::Socket(listen_port, error)
            }
        })?;
        let queues = options
            .queues
            .map_or_else(default_queues, NonZeroUsize::get);
        let tuns = open_queues(&name, mtu, persistent, queues)?;
        let floor = options.timestamp_floor;
        let accepted = Arc::new(Mutex::new(options.accepted));
        let writer = options
            .store
            .map(|store| StoreWriter::start(floor, accepted.clone(), store))
            .transpose()
            .map_err(StartError::Threads)?;
        let timestamps = TimestampSequence::new(floor, writer);
        let mut core = Core::new(mtu, timestamps, accepted, wall_clock, Time::now());
        core.unicast_only = options.unicast_only;
        let core = Arc::new(core);
        let on_gone = if persistent {
            OnGone::Remake(name, mtu, persistent)
        } else {
            OnGone::Call(options.on_link_gone)
        };
        let io = Io::new(sockets, tuns, fwmark, on_gone).map_err(StartError::Threads)?;
        let io = Arc::new(io);
        let callbacks = Callbacks {
            on_events: options.on_events,
            on_diverted: options.on_diverted,
        };
        let threads = threads::start(&core, &io, callbacks).map_err(StartError::Threads)?;
        Ok(Self { core, io, threads })
    }

    /// Makes these the peers. What is the same already is left alone: sessions of peers that stay, and the
    /// endpoint of a peer that roamed, until the configured one changes.
    ///
    /// A peer whose key changes keeps its prefixes, its endpoint, its counters and the packets that wait
    /// for a session. If its new key was among its keys before, or its old one still is, the sessions under keys
    /// that it keeps go on. Otherwise they end, and a handshake with the new key begins. A peer with the key of
    /// the device, or with that of a peer whose name comes before its own, is left out.
    ///
    /// Several peers may own one prefix: a flow to it keeps to one of them that has a session, and
    /// packets from it are taken from each.
    pub fn set_peers(&self, peers: &BTreeMap<PeerId, PeerConfig>) {
        self.core.set_peers(peers, Time::now());
    }

    /// The peers as they are configured, with every change that `wg` made. An endpoint is the configured
    /// one, wherever the peer is now.
    pub fn peers(&self) -> BTreeMap<PeerId, PeerConfig> {
        self.core.peer_configs()
    }

    /// Takes the events of all peers since they were last taken: only peers with events are in the map.
    /// [`PeerEvents`] has the contract.
    pub fn take_events(&self) -> BTreeMap<PeerId, PeerEvents> {
        self.core.take_events()
    }

    /// Tries candidate endpoints of a peer: the same handshake initiation is sent to all of them, which also
    /// opens a NAT on this side. The peer answers the first copy that arrives, and the endpoint moves to the
    /// source of that answer. Without an answer it stays.
    ///
    /// The candidate for a peer behind a relay is its WireGuard address and [`RELAY_PORT`]. An answer through the relay
    /// moves the endpoint, unless the direct way was proven to work in both directions meanwhile.
    ///
    /// Unknown peers and an empty list are ignored. Of a longer list the first [`MAX_CANDIDATES`] count.
    pub fn try_candidates(&self, id: &PeerId, candidates: &[SocketAddr]) {
        self.core.try_candidates(id, candidates);
    }

    /// Diverts UDP packets to these addresses and [`ECHO_PORT`]: from peers, after the check of their source,
    /// and from the link. Fragments are not diverted. An empty set, as at the start, diverts nothing.
    pub fn set_diverted(&self, addresses: BTreeSet<IpAddr>) {
        self.core.diversion.set_addresses(addresses);
    }

    /// Sets this device's WireGuard addresses: the sources of relayed datagrams, and the only destinations at which
    /// they are accepted. An empty set, as at the start, sends and accepts none.
    pub fn set_own_addresses(&self, addresses: BTreeSet<IpAddr>) {
        self.core.set_own_addresses(addresses);
    }

    /// Translates addresses of hosts behind this device: packets of peers to an alias, a key of the map, get the host's
    /// address as their destination, and packets of the host get the alias as their source. The packets on the link
    /// have the host's address. Peers must route the alias to this device, and accept it as a source.
    ///
    /// A pair of different families is ignored. An empty map, as at the start, translates nothing.
    pub fn set_aliases(&self, aliases: &BTreeMap<IpAddr, IpAddr>) {
        self.core.translation.set(aliases);
    }

    /// Takes the diverted packets in the order of their arrival, at most 1,024. While so many wait, further
    /// ones are dropped as [`Dropped::NotDiverted`], and so is one of more than 1,280 bytes.
    pub fn take_diverted(&self) -> Vec<Diverted> {
        self.core.diversion.take()
    }

    /// Sends an IP packet to a peer through its session, whatever its addresses are. For the timers it is data,
    /// as a packet from the link.
    ///
    /// Returns false if it was not sent: the peer is unknown or has no endpoint, the packet is not one whole IP
    /// packet, there is no session, or the kernel refused the datagram. Without a session a handshake begins, unless one began within five seconds.
    pub fn send_packet(&self, id: &PeerId, packet: &[u8]) -> bool {
        let sockets = self.io.sockets.load();
        self.core.peer(id).is_some_and(|peer| {
            send_alone(&self.core, &**sockets, &peer, packet, None, Time::now())
        })
    }

    /// Sends an IP packet to a peer as [`Self::send_packet`] does, padded to a length. The peer takes the padding off.
    /// Nothing on the way may fragment the datagram, so if the peer gets the packet, the path carries packets of this
    /// length.
    pub fn send_padded(&self, id: &PeerId, packet: &[u8], length: u16) -> bool {
        let sockets = self.io.sockets.load();
        let length = Some(usize::from(length));
        self.core.peer(id).is_some_and(|peer| {
            send_alone(&self.core, &**sockets, &peer, packet, length, Time::now())
        })
    }

    /// How each peer with an endpoint is reached now.
    pub fn ways(&self) -> BTreeMap<PeerId, PeerWay> {
        self.core.ways()
    }

    /// Writes an IP packet to the link, as if it came from a peer. Its checksums must be complete.
    ///
    /// # Errors
    /// `InvalidInput` if it is not one whole IP packet; `EIO` while the link is down; `EBADFD` or `NotConnected`
    /// while the link does not exist.
    pub fn write_packet(&self, packet: &[u8]) -> std::io::Result<()> {
        write_alone(&self.io.tuns.load(), packet)
    }

    /// Changes or removes the device's key. Every session ends.
    pub fn set_private_key(&self, key: Option<PrivateKey>) {
        self.core.set_private_key(key);
    }

    /// Changes the device's keys: the current one, and another under which it also answers and, where a peer does
    /// not answer the current one, asks. Sessions under a key that stays go on, and those of others end.
    pub fn set_identities(&self, current: PrivateKey, also: Option<PrivateKey>) {
        self.core.set_identities([current].into_iter().chain(also));
    }

    /// Sends an initiation to a peer under one of the device's keys, beside the traffic: the session that an
    /// answer brings takes over. Without an answer nothing changes.
    ///
    /// Unknown peers, and keys that the device does not have, are ignored.
    pub fn try_identity(&self, id: &PeerId, own: PublicKey) {
        self.core.try_identity(id, own);
    }

    /// Changes the UDP port; 0 takes a free one. Sessions go on: a keepalive shows each peer the new port.
    ///
    /// # Errors
    /// `AddrInUse` if it is taken. On an error the port stays as it was.
    pub fn set_listen_port(&self, port: u16) -> std::io::Result<()> {
        if port != 0 && port == self.listen_port() {
            return Ok(());
        }
        let fwmark = self.io.fwmark.load(Ordering::Relaxed);
        self.io.replace_sockets(Sockets::bind(port, fwmark)?);
        self.clear_sources();
        self.core.announce_move();
        Ok(())
    }

    /// The UDP port.
    pub fn listen_port(&self) -> u16 {
        self.io.sockets.load().port()
    }

    /// Changes the mark of every datagram that is sent; 0 is none.
    ///
    /// # Errors
    /// `PermissionDenied` without `CAP_NET_ADMIN`.
    pub fn set_fwmark(&self, fwmark: u32) -> std::io::Result<()> {
        self.io.sockets.load().set_fwmark(fwmark)?;
        self.io.fwmark.store(fwmark, Ordering::Relaxed);
        self.clear_sources();
        Ok(())
    }

    /// Forgets the source addresses of endpoints, because sockets or marks have changed.
    fn clear_sources(&self) {
        for peer in self.core.table.load().peers.values() {
            peer.clear_source();
        }
    }

    /// Sets whether the link stays when the process ends.
    ///
    /// # Errors
    /// The error of the kernel.
    pub fn set_persistent(&self, persistent: bool) -> std::io::Result<()> {
        self.io
            .tuns
            .load()
            .iter()
            .try_for_each(|tun| tun.set_persistent(persistent))
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        let now = Time::now();
        let peer = |peer: &Arc<peer::Peer>| {
            let way = peer.way();
            PeerStats {
                public_key: peer.key(),
                pair: peer.session().as_ref().map(|session| session.pair()),
                endpoint: way.map(Way::remote),
                relayed: way.is_some_and(|way| way.direct().is_none()),
                rx_bytes: peer.rx_bytes(),
                tx_bytes: peer.tx_bytes(),
                last_handshake: peer.last_handshake().map(|at| now.since(at)),
                heard_unasked: peer.heard_unasked().map(|at| now.since(at)),
                unanswered: peer.timers.waiting_since().map(|at| now.since(at)),
                answer: peer.answer().map(|answer| Answer {
                    from: answer.from,
                    round_trip: answer.round_trip,
                    ago: now.since(answer.at),
                }),
            }
        };
        let table = self.core.table.load();
        Stats {
            peers: table
                .peers
                .values()
                .map(|of| (of.id().clone(), peer(of)))
                .collect(),
            drops: Dropped::ALL
                .iter()
                .map(|&reason| (reason, self.core.drops.count(reason)))
                .collect(),
        }
    }
}

impl uapi::Control for Device {
    fn set(&self, set: uapi::Set) -> Result<(), Errno> {
        let errno =
            |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        // What may fail comes first: a request is applied whole or not at all.
        if let Some(port) = set.listen_port {
            self.set_listen_port(port).map_err(errno)?;
        }
        if let Some(fwmark) = set.fwmark {
            self.set_fwmark(fwmark).map_err(errno)?;
        }
        match set.private_key {
            uapi::KeyUpdate::Keep => {}
            uapi::KeyUpdate::Clear => self.set_private_key(None),
            uapi::KeyUpdate::Set(key) => self.set_private_key(Some(key)),
        }
        if set.replace_peers || !set.peers.is_empty() {
            self.core
                .change_peers(set.replace_peers, set.peers, Time::now());
        }
        Ok(())
    }

    fn get(&self) -> uapi::Get {
        let now = Time::now();
        let wall = wall_clock().to_unix();
        let identities = self.core.identities.load();
        let identity = identities.current();
        uapi::Get {
            private_key: identity.map(|identity| identity.private.clone()),
            listen_port: self.listen_port(),
            fwmark: self.io.fwmark.load(Ordering::Relaxed),
            peers: self
                .core
                .peers_for_uapi(|at| wall.saturating_sub(now.since(at))),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.io.stop();
        for thread in self.threads.drain(..) {
            // A panic of a thread has ended the process.
            let _ = thread.join();
        }
    }
}

/// One queue for two CPUs, the second of which receives. With one queue, one thread does both.
fn default_queues() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (cpus / 2).clamp(1, 4)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the protocol uses wall-clock time in handshakes, and wg shows it"
)]
fn wall_clock() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Timestamp::from_unix(since_epoch.unwrap_or_default())
}
