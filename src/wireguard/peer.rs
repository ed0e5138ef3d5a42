//! A peer: its keys, its sessions, its endpoint and its counters.
//!
//! The packet threads use atomics and one uncontended lock per batch. The handshake has a lock of its own
//! that they never take.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwapOption, Guard};

use super::clock::Time;
use super::config::{PeerId, PeerMtu};
use super::drops::{Dropped, Drops};
use super::endpoint_rule::Evidence;
use super::events::Pending;
use super::key::PublicKey;
use super::packet::{Fragments, Outer};
use super::pairings::{Pair, Pairings};
use super::place::{Place, Roamed};
use super::session::Session;
use super::staged::Staged;
use super::timers::Timers;
use super::udp::{Endpoint, is_source_gone};
use super::way::Way;

/// Segmentation offload is tried again this long after a path refused it.
const OFFLOAD_PAUSE: Duration = Duration::from_secs(60);
/// A refusal of the kernel to send is logged at most once in this time. Without the limit, a kernel that
/// refuses now and then would flood the log.
const REFUSAL_PAUSE: Duration = Duration::from_secs(60);

/// Two sessions that the two sides began within this time of each other come from handshakes that crossed.
const CROSSING: Duration = Duration::from_secs(1);

/// A session that was replaced still opens datagrams for this time: longer than any network delays a
/// datagram, or a handshake an answer. The last one that was replaced does so until the next replacement.
const STILL_OPENS: Duration = Duration::from_secs(10);
/// The most replaced sessions that still open datagrams: two sides that try four candidates of each other
/// make no more.
const MAX_REPLACED: usize = 8;

/// Sends datagrams: the sockets, or a test's stand-in.
pub(super) trait Wire {
    /// Sends a run of datagrams; see [`super::udp::Sockets::send`].
    fn send(
        &self,
        run: &[u8],
        stride: usize,
        to: &Endpoint,
        outer: Outer,
        offload: bool,
    ) -> io::Result<bool>;

    /// Whether the present route to an endpoint has the endpoint's local address as its source, and leads
    /// through the interface that the peer's datagram came in by.
    fn leads(&self, endpoint: &Endpoint) -> bool;
}

/// The state of a configured peer.
pub(super) struct Peer {
    id: PeerId,
    /// The current key first.
    keys: Mutex<Vec<PublicKey>>,
    pub(super) timers: Timers,
    pub(super) events: Pending,
    /// The session that seals.
    current: ArcSwapOption<Session>,
    waiting: Mutex<Waiting>,
    place: Mutex<Place>,
    /// What a relay takes from the MTU, 0 without one, to be asked without the lock.
    relay_overhead: AtomicUsize,
    pub(super) handshake: Mutex<HandshakeState>,
    pub(super) staged: Mutex<Staged>,
    /// Whether anything is staged, to be asked without the lock.
    pub(super) has_staged: AtomicBool,
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
    last_handshake: AtomicU64,
    last_initiation: AtomicU64,
    /// When a datagram was last sent to the peer, at any endpoint.
    last_sent: AtomicU64,
    answer: Mutex<Option<Answered>>,
    heard_unasked: AtomicU64,
    /// Whether a job to begin a handshake is queued.
    pub(super) handshake_asked: AtomicBool,
    offload_after: AtomicU64,
    /// Whether it was logged that the path refuses segmentation offload.
    offload_logged: AtomicBool,
    /// Whether it was logged that the kernel refuses to send, and nothing was sent since.
    refusal_logged: AtomicBool,
    /// No refusal is logged before this time.
    refusal_log_after: AtomicU64,
    /// A [`PeerMtu`], packed.
    mtu: AtomicU32,
}

/// The sessions beside the current one.
///
/// The paper keeps one replaced session. That is too few where handshakes follow each other within a round
/// trip, or cross: each side seals with the old keys until it has the new ones, and datagrams sealed with
/// them arrive after the second handshake.
#[derive(Default)]
struct Waiting {
    /// Replaced sessions with the times of their replacement, the latest last. They still open datagrams.
    replaced: Vec<(Arc<Session>, Time)>,
    /// The session of a responder, until a message of the initiator confirms it.
    next: Option<Arc<Session>>,
}

impl Waiting {
    /// Keeps sessions that were replaced, the latest last; returns those that have ended.
    fn replace(
        &mut self,
        sessions: impl IntoIterator<Item = Arc<Session>>,
        now: Time,
    ) -> Vec<Arc<Session>> {
        let sessions = sessions.into_iter().map(|session| (session, now));
        self.replaced.extend(sessions);
        let surplus = self.replaced.len().saturating_sub(MAX_REPLACED);
        let before_last = self.replaced.len().saturating_sub(1);
        let is_over = |(_, since): &(_, Time)| now.since(*since) >= STILL_OPENS;
        let old = self.replaced[..before_last]
            .iter()
            .take_while(|kept| is_over(kept));
        let count = old.count().max(surplus);
        self.replaced
            .drain(..count)
            .map(|(session, _)| session)
            .collect()
    }
}

/// The handshakes with a peer.
#[derive(Default)]
pub(super) struct HandshakeState {
    pub(super) pairings: Pairings,
    /// When an initiation of the peer was last accepted.
    pub(super) last_accepted: Option<Time>,
    pub(super) cookie_since: Option<Time>,
    /// The indices that are registered for answers.
    pub(super) awaiting: Vec<u32>,
}

/// An answer to an initiation of this device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answered {
    pub(super) from: SocketAddr,
    /// Since the initiation.
    pub(super) round_trip: Duration,
    pub(super) at: Time,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process. Only tests see a poisoned lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a session of this side and one of the peer come from handshakes that crossed.
fn crossed(own: &Session, other: &Session) -> bool {
    let apart = own
        .created()
        .since(other.created())
        .max(other.created().since(own.created()));
    own.is_initiator() && !other.is_initiator() && apart < CROSSING
}

impl Peer {
    /// A peer with these keys, the current one first.
    pub(super) fn new(id: PeerId, keys: Vec<PublicKey>) -> Self {
        Self {
            id,
            keys: Mutex::new(keys),
            timers: Timers::default(),
            events: Pending::default(),
            current: ArcSwapOption::empty(),
            waiting: Mutex::default(),
            place: Mutex::default(),
            relay_overhead: AtomicUsize::new(0),
            handshake: Mutex::default(),
            staged: Mutex::default(),
            has_staged: AtomicBool::new(false),
            rx_bytes: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            last_handshake: AtomicU64::new(0),
            last_initiation: AtomicU64::new(0),
            last_sent: AtomicU64::new(0),
            answer: Mutex::default(),
            heard_unasked: AtomicU64::new(0),
            handshake_asked: AtomicBool::new(false),
            offload_after: AtomicU64::new(0),
            offload_logged: AtomicBool::new(false),
            refusal_logged: AtomicBool::new(false),
            refusal_log_after: AtomicU64::new(0),
            mtu: AtomicU32::new(0),
        }
    }

    /// The size of the packets that are sent to it.
    pub(super) fn mtu(&self) -> PeerMtu {
        let packed = self.mtu.load(Ordering::Relaxed);
        let bytes = (packed & 0xffff) as u16;
        match packed >> 16 {
            0 => PeerMtu::Link,
            1 => PeerMtu::Configured(bytes),
            _ => PeerMtu::Path(bytes),
        }
    }

    pub(super) fn set_mtu(&self, mtu: PeerMtu) {
        let packed = match mtu {
            PeerMtu::Link => 0,
            PeerMtu::Configured(bytes) => 1 << 16 | u32::from(bytes),
            PeerMtu::Path(bytes) => 2 << 16 | u32::from(bytes),
        };
        self.mtu.store(packed, Ordering::Relaxed);
    }

    pub(super) fn id(&self) -> &PeerId {
        &self.id
    }

    /// The current key.
    pub(super) fn key(&self) -> PublicKey {
        lock(&self.keys)[0]
    }

    /// The keys, the current one first.
    pub(super) fn keys(&self) -> Vec<PublicKey> {
        lock(&self.keys).clone()
    }

    /// Changes the keys; the current one first.
    pub(super) fn set_keys(&self, keys: Vec<PublicKey>) {
        *lock(&self.keys) = keys;
    }

    /// Takes over what outlives a key: the endpoint, the counters, and the packets that wait for a
    /// session.
    pub(super) fn inherit(&self, before: &Self) {
        self.change_place(|place| place.set(before.way()));
        for (own, before) in [
            (&self.rx_bytes, &before.rx_bytes),
            (&self.tx_bytes, &before.tx_bytes),
            (&self.last_sent, &before.last_sent),
            (&self.heard_unasked, &before.heard_unasked),
        ] {
            own.store(before.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.events.inherit(&before.events);
        let staged = std::mem::take(&mut *before.staged());
        self.has_staged.store(!staged.is_empty(), Ordering::Release);
        *self.staged() = staged;
    }

    pub(super) fn handshake(&self) -> MutexGuard<'_, HandshakeState> {
        lock(&self.handshake)
    }

    pub(super) fn staged(&self) -> MutexGuard<'_, Staged> {
        lock(&self.staged)
    }

    /// Keeps a packet until there is a session; returns how many were dropped to make room.
    pub(super) fn stage(&self, packet: &[u8]) -> u64 {
        let dropped = self.staged().push(packet);
        self.has_staged.store(true, Ordering::Release);
        dropped
    }

    /// The session that seals.
    pub(super) fn session(&self) -> Guard<Option<Arc<Session>>> {
        self.current.load()
    }

    /// Whether there is a session that seals. It may be too old.
    pub(super) fn has_session(&self) -> bool {
        self.current.load().is_some()
    }

    /// Takes a session that this side began into use; returns the sessions that have ended.
    ///
    /// When both sides begin at the same time there are two sessions, and without a rule each side would
    /// seal with one and wait for the end of the other. The rule: the side with the lesser key insists
    /// on its session, the other side `yields` its own.
    pub(super) fn install_initiated(
        &self,
        session: Arc<Session>,
        yields: bool,
        now: Time,
    ) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        if yields
            && self
                .current
                .load()
                .as_ref()
                .is_some_and(|other| crossed(&session, other))
        {
            return waiting.replace([session], now);
        }
        // A session that the peer began is newer than the current one. If the two crossed and this side
        // yields, the peer's takes over as soon as it is confirmed. Otherwise it only opens.
        let awaited = |next: &mut Arc<Session>| !(yields && crossed(&session, next));
        let next = waiting.next.take_if(awaited);
        let current = self.current.swap(Some(session));
        waiting.replace(current.into_iter().chain(next), now)
    }

    /// Keeps a session that the peer began until it is confirmed; returns the sessions that have ended.
    pub(super) fn install_responded(&self, session: Arc<Session>, now: Time) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        // The initiator may have the one before already, and seal with it.
        let before = waiting.next.replace(session);
        waiting.replace(before, now)
    }

    /// Takes the session that waited for its confirmation into use; returns the sessions that have ended.
    ///
    /// A side that `insists` keeps the session that it began at the same time, see
    /// [`Self::install_initiated`].
    pub(super) fn confirm(
        &self,
        session: &Arc<Session>,
        insists: bool,
        now: Time,
    ) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        if !waiting
            .next
            .as_ref()
            .is_some_and(|next| Arc::ptr_eq(next, session))
        {
            return Vec::new();
        }
        let next = waiting.next.take();
        let is_ours_kept = insists
            && self
                .current
                .load()
                .as_ref()
                .is_some_and(|own| crossed(own, session));
        let replaced = if is_ours_kept {
            next
        } else {
            self.current.swap(next)
        };
        waiting.replace(replaced, now)
    }

    /// Ends every session; returns them.
    pub(super) fn forget_sessions(&self) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        let mut all: Vec<_> = waiting.replaced.drain(..).map(|(old, _)| old).collect();
        all.extend(self.current.swap(None));
        all.extend(waiting.next.take());
        all
    }

    /// Ends the sessions under pairs of keys that do not stay; returns them. The latest session that stays takes
    /// the place of one that sealed.
    pub(super) fn forget_sessions_of(&self, stays: impl Fn(Pair) -> bool) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        let ends = |session: &Arc<Session>| !stays(session.pair());
        let replaced = &mut waiting.replaced;
        let mut all: Vec<_> = replaced
            .extract_if(.., |(session, _)| ends(session))
            .map(|(session, _)| session)
            .collect();
        let current = self.current.load_full();
        if let Some(current) = current.filter(ends) {
            self.current
                .store(replaced.pop().map(|(session, _)| session));
            all.push(current);
        }
        all.extend(waiting.next.take_if(|next| ends(next)));
        all
    }

    fn change_place<T>(&self, change: impl FnOnce(&mut Place) -> T) -> T {
        let mut place = lock(&self.place);
        let result = change(&mut place);
        let overhead = place.way().map_or(0, Way::overhead);
        // Usually it is the same, and a store would take the cache line from the other thread.
        if self.relay_overhead() != overhead {
            self.relay_overhead.store(overhead, Ordering::Relaxed);
        }
        result
    }

    /// How datagrams are sent to the peer; `None` without an endpoint.
    pub(super) fn way(&self) -> Option<Way> {
        lock(&self.place).way()
    }

    /// The endpoint, where datagrams are not sent through a relay.
    pub(super) fn direct_endpoint(&self) -> Option<Endpoint> {
        lock(&self.place).direct()
    }

    /// The bytes that a relay takes from the MTU; 0 without one.
    pub(super) fn relay_overhead(&self) -> usize {
        self.relay_overhead.load(Ordering::Relaxed)
    }

    /// Sets the endpoint, or removes it. The kernel chooses the source address.
    pub(super) fn set_way(&self, way: Option<Way>) {
        self.change_place(|place| place.set(way));
    }

    /// Moves the endpoint to the source of an authenticated message of a confirmed session, if the message proves
    /// enough. `has_relay` tells whether a peer relays to an address. The local address that the peer sent to becomes the source only if the route back is known to agree. If that is
    /// not known, the route must be looked up, see [`Self::judge_source`].
    #[must_use]
    pub(super) fn roam(
        &self,
        from: Way,
        evidence: Evidence,
        has_relay: impl FnOnce(IpAddr) -> bool,
        now: Time,
    ) -> Roamed {
        self.change_place(|place| place.roam(from, evidence, has_relay, now))
    }

    /// Records whether the present route to an endpoint has the endpoint's local address as its source, and
    /// leads through the interface that the peer's datagram came in by.
    pub(super) fn judge_source(&self, from: Endpoint, leads: bool) {
        lock(&self.place).judge(from, leads);
    }

    /// Returns the endpoint for an answer to an initiation. Its source is the local address that the peer
    /// sent to if the route back `leads` from there, unless an earlier answer from it did not arrive.
    pub(super) fn answer_from(
        &self,
        from: Way,
        leads: impl FnOnce(&Endpoint) -> bool,
        now: Time,
    ) -> Way {
        let Way::Direct(from) = from else {
            lock(&self.place).answer_relayed(from);
            return from;
        };
        let leads = leads(&from);
        let is_unconfirmed = lock(&self.waiting).next.is_some();
        let answer = lock(&self.place).answer(from, leads, is_unconfirmed, now);
        answer.into()
    }

    /// Forgets the source address of the endpoint and all that was looked up. The kernel chooses by the
    /// present route.
    pub(super) fn clear_source(&self) {
        lock(&self.place).clear_source();
    }

    /// Forgets what was looked up, since the routes may have changed.
    pub(super) fn forget_sources(&self) {
        lock(&self.place).forget_judgements();
    }

    /// Sends a run of datagrams through the sockets.
    pub(super) fn send_direct(
        &self,
        wire: &impl Wire,
        (run, stride): (&[u8], usize),
        endpoint: Endpoint,
        outer: Outer,
        now: Time,
        drops: &Drops,
    ) -> bool {
        let count = run.len().div_ceil(stride) as u64;
        let offload = self.offload_after.load(Ordering::Relaxed) <= now.as_nanos();
        let mut sent = wire.send(run, stride, &endpoint, outer, offload);
        if endpoint.local.is_some() && sent.as_ref().is_err_and(is_source_gone) {
            self.clear_source();
            sent = wire.send(run, stride, &endpoint.remote.into(), outer, offload);
        }
        match sent {
            Ok(offloaded) => {
                if offload && !offloaded && count > 1 {
                    let after = now + OFFLOAD_PAUSE;
                    self.offload_after
                        .store(after.as_nanos(), Ordering::Relaxed);
                    if !self.offload_logged.swap(true, Ordering::Relaxed) {
                        tracing::info!(peer = %self.id, "path refuses segmentation offload: sending datagrams one by one, retrying each minute");
                    }
                }
                self.tx_bytes.fetch_add(run.len() as u64, Ordering::Relaxed);
                self.note_sent(now);
                if self.refusal_logged.load(Ordering::Relaxed) {
                    self.refusal_logged.store(false, Ordering::Relaxed);
                    tracing::info!(peer = %self.id, "kernel sends to the peer again");
                }
                true
            }
            // The link that it leaves by carries less than the path did. The embedder measures that.
            Err(error)
                if outer.fragments == Fragments::None
                    && error.raw_os_error() == Some(libc::EMSGSIZE) =>
            {
                drops.add(Dropped::TooBig, count);
                false
            }
            Err(error) => {
                drops.add(Dropped::SendFailed, count);
                self.log_refusal(&endpoint.remote, &error, now);
                false
            }
        }
    }

    fn log_refusal(&self, endpoint: &SocketAddr, error: &io::Error, now: Time) {
        let logged = self.refusal_logged.load(Ordering::Relaxed);
        if logged || self.refusal_log_after.load(Ordering::Relaxed) > now.as_nanos() {
            return;
        }
        self.refusal_logged.store(true, Ordering::Relaxed);
        let until = now + REFUSAL_PAUSE;
        self.refusal_log_after
            .store(until.as_nanos(), Ordering::Relaxed);
        tracing::warn!(peer = %self.id, %endpoint, %error, "kernel refuses to send to the peer: packets are lost, handshakes are retried");
    }

    /// Counts bytes that were sent through a relay.
    pub(super) fn count_sent(&self, bytes: usize) {
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn count_received(&self, bytes: usize) {
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn rx_bytes(&self) -> u64 {
        self.rx_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn tx_bytes(&self) -> u64 {
        self.tx_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn handshake_completed(&self, now: Time) {
        self.timers.handshake_completed(now);
        self.last_handshake.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub(super) fn last_handshake(&self) -> Option<Time> {
        Time::from_nanos(self.last_handshake.load(Ordering::Relaxed))
    }

    /// Records an answer to an initiation of this device.
    pub(super) fn note_answer(&self, from: SocketAddr, now: Time) {
        let begun = self.last_initiation().unwrap_or(now);
        *lock(&self.answer) = Some(Answered {
            from,
            round_trip: now.since(begun),
            at: now,
        });
    }

    /// The last answer to an initiation of this device.
    pub(super) fn answer(&self) -> Option<Answered> {
        *lock(&self.answer)
    }

    /// Records that a datagram was sent to the peer.
    pub(super) fn note_sent(&self, now: Time) {
        self.last_sent.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub(super) fn last_sent(&self) -> Option<Time> {
        Time::from_nanos(self.last_sent.load(Ordering::Relaxed))
    }

    /// Records an initiation that no earlier datagram of this device can have let in.
    pub(super) fn note_unasked(&self, now: Time) {
        self.heard_unasked.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub(super) fn heard_unasked(&self) -> Option<Time> {
        Time::from_nanos(self.heard_unasked.load(Ordering::Relaxed))
    }

    pub(super) fn initiated(&self, now: Time) {
        self.last_initiation
            .store(now.as_nanos(), Ordering::Relaxed);
    }

    /// When an initiation was last sent.
    pub(super) fn last_initiation(&self) -> Option<Time> {
        Time::from_nanos(self.last_initiation.load(Ordering::Relaxed))
    }

    /// Lets the next initiation be sent at once.
    pub(super) fn forget_initiation(&self) {
        self.last_initiation.store(0, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Peer").field(&self.id).finish()
    }
}
