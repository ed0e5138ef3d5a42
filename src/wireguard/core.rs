//! What the threads of a device share: peers, indices, keys, and the way to the handshake thread.
//!
//! No I/O and no clock: the same core runs under a test that carries its datagrams by hand.

use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519;

use super::clock::Time;
use super::configure::Configured;
use super::drops::{Dropped, Drops};
use super::indices::Indices;
use super::key::{PrivateKey, PublicKey};
use super::novelty::{Hearing, Novelty};
use super::peer::Peer;
use super::table::Table;
use super::timers::REKEY_TIMEOUT;
use super::timestamp::{Accepted, Tai64n, Timestamp, Timestamps};
use super::udp::Endpoint;

/// The most handshake messages that wait, as in the kernel.
const MAX_QUEUED: usize = 4096;
/// The most that wait from addresses of peers, and from those that have shown a cookie.
const MAX_QUEUED_KNOWN: usize = 512;
/// In a flood those who asked just now are heard only while no more than so many wait.
const FEW: usize = 16;
/// So many messages of strangers within [`FLOOD_WINDOW`] mean a flood: to do what 512 of them ask for
/// in a second takes a tenth of a CPU.
const FLOOD: u32 = 128;
const FLOOD_WINDOW: Duration = Duration::from_millis(250);
/// A flood lasts at least so long, so that it does not come and go with every batch.
pub(super) const LOAD_LASTS: Duration = Duration::from_secs(1);

/// Timestamps of so many peers are kept, those of removed ones among them, the latest.
const MAX_ACCEPTED: usize = 16_384;

/// So long after the last datagram to an address no usual NAT or firewall lets in an answer any more
/// (Linux: `nf_conntrack_udp_timeout_stream`, 120 s; RFC 4787, section 4.3 wants no more than 5 minutes,
/// common devices keep 30 to 180 s).
pub const UNASKED_AFTER: Duration = Duration::from_secs(180);

/// The bytes of the longest handshake message, an initiation.
pub(super) const MAX_HANDSHAKE: usize = 148;

/// The state of a device.
pub(super) struct Core {
    pub(super) table: ArcSwap<Table>,
    pub(super) indices: Indices,
    pub(super) drops: Drops,
    pub(super) identity: ArcSwapOption<Identity>,
    pub(super) jobs: Jobs,
    pub(super) configured: Mutex<Configured>,
    pub(super) timestamps: Mutex<Timestamps>,
    /// The greatest timestamps of peers, and of those that were removed.
    accepted: Arc<Mutex<Accepted>>,
    /// The wall clock, for timestamps and nothing else.
    pub(super) wall: fn() -> Timestamp,
    /// Whether packets of peers to loopback, link-local, multicast and such addresses are dropped.
    pub(super) unicast_only: bool,
    mtu: AtomicUsize,
    up: AtomicBool,
    started: Time,
}

/// The device's own key and what follows from it.
pub(super) struct Identity {
    pub(super) private: PrivateKey,
    pub(super) public: PublicKey,
    pub(super) secret: x25519::StaticSecret,
    pub(super) cookies: RateLimiter,
}

impl Identity {
    pub(super) fn new(private: PrivateKey) -> Self {
        let secret = x25519::StaticSecret::from(private.0);
        let public = x25519::PublicKey::from(&secret);
        Self {
            private,
            public: PublicKey(public.to_bytes()),
            secret,
            cookies: RateLimiter::new(&public),
        }
    }
}

/// Work for the handshake thread.
pub(super) enum Job {
    /// A handshake message came.
    Message(Box<HandshakeMessage>),
    /// Something was to be sent to a peer, and there is no session or it is old.
    Initiate(Arc<Peer>),
    /// The peer may be at one of these addresses by now.
    LookFor(Arc<Peer>, Vec<SocketAddr>),
    /// The peer called an address of ours: whether it is the source by the route of now is looked up.
    Source(Arc<Peer>, Endpoint),
    /// A session is in use now: what waited for it may go.
    Flush(Arc<Peer>),
    /// The peer is to hear from us now.
    Keepalive(Arc<Peer>),
}

/// A handshake message as it came.
pub(super) struct HandshakeMessage {
    pub(super) from: Endpoint,
    /// Whether it came from the address of a peer.
    pub(super) known: bool,
    bytes: [u8; MAX_HANDSHAKE],
    length: usize,
}

impl HandshakeMessage {
    fn new(message: &[u8], from: Endpoint, known: bool) -> Option<Self> {
        let mut bytes = [0; MAX_HANDSHAKE];
        bytes.get_mut(..message.len())?.copy_from_slice(message);
        Some(Self {
            from,
            known,
            bytes,
            length: message.len(),
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The queue of the handshake thread.
///
/// Messages from the addresses of peers have a lane of their own, and so have those with a cookie: a
/// flood from elsewhere can neither fill them nor delay them. In a flood the strangers' lane is for
/// those who have not asked just now; the others cost a look at two marks, and neither a lock nor a
/// wake-up.
#[derive(Default)]
pub(super) struct Jobs {
    queue: Mutex<Queue>,
    /// The addresses that peers were last seen at.
    known: ArcSwap<HashSet<IpAddr>>,
    flood: Flood,
    /// Who asked when; made with the first flood.
    novelty: OnceLock<Novelty>,
    /// Called when there is something to do after there was nothing.
    waker: ArcSwapOption<Waker>,
}

pub(super) struct Waker(pub(super) Box<dyn Fn() + Send + Sync>);

/// Whether strangers ask for more than there is time for.
#[derive(Debug, Default)]
struct Flood {
    window: AtomicU64,
    messages: AtomicU32,
    /// In nanoseconds.
    until: AtomicU64,
}

impl Flood {
    /// Takes note of a message; tells whether it is one of a flood.
    ///
    /// Threads that do so at once may forget some, of many.
    fn note(&self, now: Time) -> bool {
        let window = now.as_nanos() / FLOOD_WINDOW.as_nanos() as u64;
        if self.window.load(Ordering::Relaxed) != window {
            self.window.store(window, Ordering::Relaxed);
            self.messages.store(0, Ordering::Relaxed);
        }
        if self.messages.fetch_add(1, Ordering::Relaxed) >= FLOOD {
            let until = now + LOAD_LASTS;
            self.until.store(until.as_nanos(), Ordering::Relaxed);
            return true;
        }
        self.is_on(now)
    }

    fn is_on(&self, now: Time) -> bool {
        now.as_nanos() < self.until.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
struct Queue {
    /// Asked for by the device itself, and bounded by the number of peers.
    own: VecDeque<Job>,
    known: VecDeque<Box<HandshakeMessage>>,
    /// From strangers who have shown that they receive at their address.
    proven: VecDeque<Box<HandshakeMessage>>,
    strangers: VecDeque<Box<HandshakeMessage>>,
}

impl Jobs {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_waker(&self, waker: Waker) {
        self.waker.store(Some(Arc::new(waker)));
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.load() {
            (waker.0)();
        }
    }

    pub(super) fn push(&self, job: Job) {
        self.queue().own.push_back(job);
        self.wake();
    }

    /// Queues a message of at most [`MAX_HANDSHAKE`] bytes, unless there are too many; `proven` says
    /// that it carries a valid cookie.
    ///
    /// # Errors
    /// Why a message was dropped: this one, or where it came to a full lane of strangers the one that
    /// had waited longest there.
    fn push_message(
        &self,
        message: &[u8],
        from: Endpoint,
        proven: bool,
        now: Time,
    ) -> Result<(), Dropped> {
        let address = from.remote.ip();
        let known = self.known.load().contains(&address);
        let (mut flooded, mut hearing) = (false, Hearing::First);
        if !known && !proven {
            flooded = self.flood.note(now);
            if flooded {
                self.novelty.get_or_init(Novelty::default);
            }
            if let Some(novelty) = self.novelty.get() {
                hearing = novelty.asks(address, now);
            }
            if flooded && hearing == Hearing::Not {
                return Err(Dropped::RateLimited);
            }
        }
        let message = HandshakeMessage::new(message, from, known).ok_or(Dropped::Malformed)?;
        let mut queue = self.queue();
        // Strangers are heard the newest first, so where one is too many it is the oldest.
        let mut yields = false;
        let (lane, limit) = if known {
            (&mut queue.known, MAX_QUEUED_KNOWN)
        } else if proven {
            (&mut queue.proven, MAX_QUEUED_KNOWN)
        } else if flooded && hearing != Hearing::First {
            (&mut queue.strangers, FEW)
        } else {
            yields = true;
            (&mut queue.strangers, MAX_QUEUED)
        };
        let full = lane.len() >= limit;
        if full && !yields {
            return Err(Dropped::QueueFull);
        }
        let oldest = if full { lane.pop_front() } else { None };
        lane.push_back(Box::new(message));
        // Whoever is at work on a lane looks at it again, and in a flood he comes by himself.
        let was_empty = lane.len() == 1;
        drop(queue);
        if was_empty && !flooded {
            self.wake();
        }
        oldest.map_or(Ok(()), |_| Err(Dropped::QueueFull))
    }

    /// Whether strangers ask for more than there is time for: then their messages wait for whoever
    /// looks after them, and wake nobody.
    pub(super) fn is_flooded(&self, now: Time) -> bool {
        self.flood.is_on(now)
    }

    /// The next job: the device's own first, then known peers', then, if asked for, strangers', those
    /// with a cookie before the others.
    /// Tells also whether so many of peers' wait behind it that it means load.
    pub(super) fn pop(&self, strangers: bool) -> Option<(Job, bool)> {
        let mut queue = self.queue();
        let job = if let Some(job) = queue.own.pop_front() {
            job
        } else if let Some(message) = queue.known.pop_front() {
            Job::Message(message)
        } else {
            let proven = if strangers {
                queue.proven.pop_front()
            } else {
                None
            };
            let message = match proven {
                // The newest first: who waited long has asked again meanwhile, and in a flood the
                // others would have to wait for all that came before them.
                None if strangers => queue.strangers.pop_back(),
                proven => proven,
            };
            Job::Message(message?)
        };
        let loaded = queue.known.len() >= MAX_QUEUED_KNOWN / 8;
        Some((job, loaded))
    }

    /// How many messages of strangers wait.
    pub(super) fn strangers(&self) -> usize {
        let queue = self.queue();
        queue.proven.len() + queue.strangers.len()
    }

    /// Takes note of where peers are.
    pub(super) fn set_known(&self, known: HashSet<IpAddr>) {
        if **self.known.load() != known {
            self.known.store(Arc::new(known));
        }
    }
}

impl Core {
    pub(super) fn new(
        mtu: u32,
        timestamps: Timestamps,
        accepted: Arc<Mutex<Accepted>>,
        wall: fn() -> Timestamp,
        now: Time,
    ) -> Self {
        let core = Self {
            table: ArcSwap::from_pointee(Table::default()),
            indices: Indices::default(),
            drops: Drops::default(),
            identity: ArcSwapOption::empty(),
            jobs: Jobs::default(),
            configured: Mutex::default(),
            timestamps: Mutex::new(timestamps),
            accepted,
            wall,
            mtu: AtomicUsize::new(0),
            unicast_only: false,
            up: AtomicBool::new(false),
            started: now,
        };
        core.set_mtu(mtu);
        core
    }

    /// The MTU of the link in bytes.
    pub(super) fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed)
    }

    pub(super) fn set_mtu(&self, mtu: u32) {
        let mtu = usize::try_from(mtu).unwrap_or(usize::MAX);
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Takes note whether the link is up; true if that is new.
    pub(super) fn set_up(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::Relaxed) != up
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Asks for a handshake with a peer, unless one was begun just now.
    pub(super) fn ask_handshake(&self, peer: &Arc<Peer>, now: Time) {
        let recent = |at| now.since(at) < REKEY_TIMEOUT;
        if peer.last_initiation().is_some_and(recent) {
            return;
        }
        if !peer.handshake_asked.swap(true, Ordering::Relaxed) {
            self.jobs.push(Job::Initiate(peer.clone()));
        }
    }

    /// The greatest timestamp that was accepted of a peer, in any run; zero for none.
    pub(super) fn last_accepted(&self, key: &PublicKey) -> Tai64n {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.get(key).copied().unwrap_or_default()
    }

    /// Takes note of the timestamp of an initiation that was accepted, and has it kept on disk.
    pub(super) fn note_accepted(&self, key: &PublicKey, timestamp: Tai64n) {
        {
            let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
            let before = accepted.insert(*key, timestamp);
            if before.is_none() && accepted.len() > MAX_ACCEPTED {
                let table = self.table.load();
                let removed = accepted
                    .iter()
                    .filter(|(key, _)| !table.peers.contains_key(*key));
                let oldest = removed.min_by_key(|(_, timestamp)| **timestamp);
                if let Some((&oldest, _)) = oldest {
                    accepted.remove(&oldest);
                }
            }
        }
        let timestamps = self.timestamps.lock();
        timestamps
            .unwrap_or_else(PoisonError::into_inner)
            .accepted();
    }

    /// Whether nothing that this device sent can have let in a message of a peer from an address; see
    /// [`super::PeerStats::heard_unasked`].
    pub(super) fn is_unasked(&self, peer: &Peer, from: IpAddr, now: Time) -> bool {
        let is_quiet = |at| now.since(at) >= UNASKED_AFTER;
        is_quiet(self.started)
            && peer.last_sent().is_none_or(is_quiet)
            && self.table.load().peers.values().all(|other| {
                other.last_sent().is_none_or(is_quiet)
                    || other
                        .endpoint()
                        .is_none_or(|endpoint| endpoint.remote.ip() != from)
            })
    }

    /// Follows a peer to where an authenticated message of a confirmed session came from.
    pub(super) fn roam(&self, peer: &Arc<Peer>, from: Endpoint) {
        if peer.roam(from) {
            self.jobs.push(Job::Source(peer.clone(), from));
        }
    }

    /// Queues a handshake message for the handshake thread.
    pub(super) fn take_handshake(
        &self,
        message: &[u8],
        from: Endpoint,
        now: Time,
    ) -> Result<(), Dropped> {
        // The last 16 bytes are the second MAC; without a cookie they are zero (paper, 5.4.4).
        let proven = message.last_chunk().is_some_and(|mac2| *mac2 != [0_u8; 16])
            && self.identity.load().as_ref().is_some_and(|identity| {
                let now = now.as_duration();
                identity.cookies.verify_mac2(message, from.remote, now)
            });
        self.jobs.push_message(message, from, proven, now)
    }

    /// Looks where the peers are, for the queue of handshakes.
    pub(super) fn note_known_addresses(&self) {
        let table = self.table.load();
        let endpoints = table.peers.values().filter_map(|peer| peer.endpoint());
        self.jobs
            .set_known(endpoints.map(|endpoint| endpoint.remote.ip()).collect());
    }

    /// The bytes to append to an inner packet: up to a multiple of 16, but never beyond the MTU
    /// (paper 5.4.6). A packet that came in spite of the MTU counts by its last piece, as in the
    /// kernel.
    pub(super) fn padding(&self, length: usize) -> usize {
        let mtu = self.mtu();
        let last = if length > mtu {
            length % mtu.max(1)
        } else {
            length
        };
        last.next_multiple_of(16).min(mtu.max(last)) - last
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn packets_are_padded_to_16_bytes_but_never_beyond_the_mtu() {
        let timestamps = Timestamps::new(Timestamp::default(), None);
        let core = Core::new(
            1420,
            timestamps,
            Arc::default(),
            Timestamp::default,
            Time::default(),
        );
        for (length, padded) in [
            (0, 0),
            (1, 16),
            (21, 32),
            (49, 64),
            (1408, 1408),
            (1409, 1420),
            (1420, 1420),
            (1421, 1436),
            (2840, 2840),
            (2839, 2840),
        ] {
            assert_eq!(length + core.padding(length), padded, "{length}");
        }
        core.set_mtu(0);
        assert_eq!(core.padding(5), 0);
    }

    fn address(n: usize) -> Endpoint {
        let n = u32::try_from(n).unwrap();
        SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + n), 51820)).into()
    }

    #[test]
    fn when_too_many_strangers_wait_the_newest_is_heard_first_and_the_oldest_goes() {
        let jobs = Jobs::default();
        // Slowly enough for no flood, in which an address may be taken for another one now and then.
        let at = |n: usize| Time::from_duration(FLOOD_WINDOW * u32::try_from(n / 100).unwrap());
        let ask = |n| jobs.push_message(&[1; MAX_HANDSHAKE], address(n), false, at(n));
        for n in 0..MAX_QUEUED {
            ask(n).unwrap();
        }
        assert_eq!(ask(MAX_QUEUED), Err(Dropped::QueueFull));

        let heard: Vec<_> = std::iter::from_fn(|| jobs.pop(true))
            .map(|(job, _)| {
                let Job::Message(message) = job else {
                    unreachable!("nothing else was asked for")
                };
                message.from.remote
            })
            .collect();
        let newest_first: Vec<_> = (1..=MAX_QUEUED).rev().map(|n| address(n).remote).collect();
        assert_eq!(heard, newest_first);
    }

    #[test]
    fn of_known_peers_messages_those_that_came_first_are_heard() {
        let jobs = Jobs::default();
        jobs.set_known([address(0).remote.ip()].into());
        let ask = |kind| {
            let message = [kind; MAX_HANDSHAKE];
            jobs.push_message(&message, address(0), false, Time::default())
        };
        for n in 0..MAX_QUEUED_KNOWN {
            ask(u8::try_from(n % 7).unwrap()).unwrap();
        }
        assert_eq!(ask(99), Err(Dropped::QueueFull));
        let heard = std::iter::from_fn(|| jobs.pop(false))
            .filter(|(job, _)| matches!(job, Job::Message(message) if message.bytes()[0] != 99));
        assert_eq!(heard.count(), MAX_QUEUED_KNOWN);
    }
}
