//! A peer: its keys, its sessions, where it is, and what was counted.
//!
//! The packet threads touch atomics and one uncontended lock per batch; the handshake has a lock of
//! its own that they never take.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwapOption, Guard};
use boringtun::noise::handshake::Handshake;

use super::clock::Time;
use super::drops::{Dropped, Drops};
use super::key::{PresharedKey, PublicKey};
use super::packet::Outer;
use super::session::Session;
use super::staged::Staged;
use super::timers::Timers;
use super::udp::{Endpoint, is_source_gone};

/// A path that refused segmentation offload is tried with it again after this time.
const OFFLOAD_PAUSE: Duration = Duration::from_secs(60);
/// That the kernel refuses to send is told once, and not again within this time: where it refuses now
/// and then, each time would be a flood.
const REFUSAL_PAUSE: Duration = Duration::from_secs(60);

/// Sessions that both sides began, one each, within this time of each other crossed on the way.
const CROSSING: Duration = Duration::from_secs(1);

/// What datagrams are sent by: the sockets, or a test's stand-in.
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
}

/// The state of one peer, as long as it is configured.
pub(super) struct Peer {
    key: PublicKey,
    pub(super) timers: Timers,
    /// What is sent with, where there is a session.
    current: ArcSwapOption<Session>,
    waiting: Mutex<Waiting>,
    endpoint: Mutex<Option<Endpoint>>,
    pub(super) handshake: Mutex<HandshakeState>,
    pub(super) staged: Mutex<Staged>,
    /// Whether anything is staged, to be asked without the lock.
    pub(super) has_staged: AtomicBool,
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
    last_handshake: AtomicU64,
    last_initiation: AtomicU64,
    /// Whether an initiation was asked for and not begun yet.
    pub(super) handshake_asked: AtomicBool,
    offload_after: AtomicU64,
    /// Whether it was told that the path does not take segmentation offload.
    offload_told: AtomicBool,
    /// Whether it was told that the kernel refuses to send, and nothing was sent since.
    refusal_told: AtomicBool,
    refusal_untold_until: AtomicU64,
}

/// The sessions beside the current one.
#[derive(Default)]
struct Waiting {
    /// Still opens what was under way when it was replaced.
    previous: Option<Arc<Session>>,
    /// Made as responder, and not yet confirmed by a message of the initiator.
    next: Option<Arc<Session>>,
}

/// The handshakes with a peer; `None` while the device has no key, or the peer's own.
#[derive(Default)]
pub(super) struct HandshakeState {
    pub(super) noise: Option<Handshake>,
    pub(super) preshared_key: Option<PresharedKey>,
    /// When an initiation was last taken from the peer.
    pub(super) last_taken: Option<Time>,
    pub(super) cookie_since: Option<Time>,
    /// The indices that are registered for answers.
    pub(super) awaiting: [Option<u32>; 2],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process; a poisoned lock is never seen but in tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a session of ours and one of the other side's come from handshakes that crossed.
fn crossed(own: &Session, other: &Session) -> bool {
    let apart = own
        .created()
        .since(other.created())
        .max(other.created().since(own.created()));
    own.is_initiator() && !other.is_initiator() && apart < CROSSING
}

impl Peer {
    pub(super) fn new(key: PublicKey) -> Self {
        Self {
            key,
            timers: Timers::default(),
            current: ArcSwapOption::empty(),
            waiting: Mutex::default(),
            endpoint: Mutex::default(),
            handshake: Mutex::default(),
            staged: Mutex::default(),
            has_staged: AtomicBool::new(false),
            rx_bytes: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            last_handshake: AtomicU64::new(0),
            last_initiation: AtomicU64::new(0),
            handshake_asked: AtomicBool::new(false),
            offload_after: AtomicU64::new(0),
            offload_told: AtomicBool::new(false),
            refusal_told: AtomicBool::new(false),
            refusal_untold_until: AtomicU64::new(0),
        }
    }

    pub(super) fn key(&self) -> &PublicKey {
        &self.key
    }

    pub(super) fn handshake(&self) -> MutexGuard<'_, HandshakeState> {
        lock(&self.handshake)
    }

    pub(super) fn staged(&self) -> MutexGuard<'_, Staged> {
        lock(&self.staged)
    }

    /// Keeps a packet until there is a session; returns how many had to go for it.
    pub(super) fn stage(&self, packet: &[u8]) -> u64 {
        let dropped = self.staged().push(packet);
        self.has_staged.store(true, Ordering::Release);
        dropped
    }

    /// The session to send with.
    pub(super) fn session(&self) -> Guard<Option<Arc<Session>>> {
        self.current.load()
    }

    /// Whether there is a session to send with, though it may be too old.
    pub(super) fn has_session(&self) -> bool {
        self.current.load().is_some()
    }

    /// Takes a session that this side began into use; returns those that are over.
    ///
    /// When both sides began at once, two sessions come of it, and without a rule each side would
    /// send with one and wait for the other one's end. The rule: the side with the lesser key insists
    /// on its session, the other side `yields` its own.
    pub(super) fn install_initiated(
        &self,
        session: Arc<Session>,
        yields: bool,
    ) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        if yields
            && self
                .current
                .load()
                .as_ref()
                .is_some_and(|other| crossed(&session, other))
        {
            return waiting.previous.replace(session).into_iter().collect();
        }
        // A session that the other side began is newer than the current one. If it crossed with this
        // one and ours yields, it takes over as soon as it is confirmed; else it only still opens.
        let awaited = |next: &mut Arc<Session>| !(yields && crossed(&session, next));
        let next = waiting.next.take_if(awaited);
        let current = self.current.swap(Some(session));
        let mut over = Vec::new();
        let previous = match next {
            Some(next) => {
                over.extend(current);
                Some(next)
            }
            None => current,
        };
        over.extend(std::mem::replace(&mut waiting.previous, previous));
        over
    }

    /// Keeps a session that the other side began until it is confirmed; returns those that are over.
    pub(super) fn install_responded(&self, session: Arc<Session>) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        let over = [waiting.next.replace(session), waiting.previous.take()];
        over.into_iter().flatten().collect()
    }

    /// Takes the session that waited for its confirmation into use; returns those that are over.
    ///
    /// A side that `insists` keeps the session it began at the same time, see
    /// [`Self::install_initiated`].
    pub(super) fn confirm(&self, session: &Arc<Session>, insists: bool) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        if !waiting
            .next
            .as_ref()
            .is_some_and(|next| Arc::ptr_eq(next, session))
        {
            return Vec::new();
        }
        if insists
            && self
                .current
                .load()
                .as_ref()
                .is_some_and(|own| crossed(own, session))
        {
            let next = waiting.next.take();
            return std::mem::replace(&mut waiting.previous, next)
                .into_iter()
                .collect();
        }
        let current = self.current.swap(waiting.next.take());
        std::mem::replace(&mut waiting.previous, current)
            .into_iter()
            .collect()
    }

    /// Gives up every session; returns them.
    pub(super) fn forget_sessions(&self) -> Vec<Arc<Session>> {
        let mut waiting = lock(&self.waiting);
        let all = [
            self.current.swap(None),
            waiting.previous.take(),
            waiting.next.take(),
        ];
        all.into_iter().flatten().collect()
    }

    pub(super) fn endpoint(&self) -> Option<Endpoint> {
        *lock(&self.endpoint)
    }

    /// Points to where the peer is configured to be; the kernel chooses from where to speak to it.
    pub(super) fn set_endpoint(&self, remote: SocketAddr) {
        *lock(&self.endpoint) = Some(remote.into());
    }

    /// Knows no more where the peer is.
    pub(super) fn forget_endpoint(&self) {
        *lock(&self.endpoint) = None;
    }

    /// Follows the peer to where an authenticated message came from.
    pub(super) fn roam(&self, from: Endpoint) {
        let mut endpoint = lock(&self.endpoint);
        if *endpoint != Some(from) {
            *endpoint = Some(from);
        }
    }

    /// Forgets from which of our addresses the peer was spoken to, so that the kernel chooses anew.
    pub(super) fn clear_source(&self) {
        if let Some(endpoint) = &mut *lock(&self.endpoint) {
            endpoint.local = None;
        }
    }

    /// Sends a run of datagrams to where the peer is, and counts; false if the kernel refused it.
    pub(super) fn send(
        &self,
        wire: &impl Wire,
        run: &[u8],
        stride: usize,
        outer: Outer,
        now: Time,
        drops: &Drops,
    ) -> bool {
        let count = run.len().div_ceil(stride) as u64;
        let Some(endpoint) = self.endpoint() else {
            drops.add(Dropped::NoEndpoint, count);
            return true;
        };
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
                    if !self.offload_told.swap(true, Ordering::Relaxed) {
                        tracing::info!(peer = %self.key, "the path does not take segmentation offload: datagrams are sent one by one, and offload is tried again each minute");
                    }
                }
                self.tx_bytes.fetch_add(run.len() as u64, Ordering::Relaxed);
                if self.refusal_told.load(Ordering::Relaxed) {
                    self.refusal_told.store(false, Ordering::Relaxed);
                    tracing::info!(peer = %self.key, "the kernel sends to the peer again");
                }
                true
            }
            Err(error) => {
                drops.add(Dropped::SendFailed, count);
                self.tell_refusal(&endpoint.remote, &error, now);
                false
            }
        }
    }

    fn tell_refusal(&self, endpoint: &SocketAddr, error: &io::Error, now: Time) {
        let told = self.refusal_told.load(Ordering::Relaxed);
        if told || self.refusal_untold_until.load(Ordering::Relaxed) > now.as_nanos() {
            return;
        }
        self.refusal_told.store(true, Ordering::Relaxed);
        let until = now + REFUSAL_PAUSE;
        self.refusal_untold_until
            .store(until.as_nanos(), Ordering::Relaxed);
        tracing::warn!(peer = %self.key, %endpoint, %error, "the kernel refuses to send to the peer: what is sent is lost, and handshakes are tried again");
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
        self.timers.handshake_completed();
        self.last_handshake.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub(super) fn last_handshake(&self) -> Option<Time> {
        Time::from_nanos(self.last_handshake.load(Ordering::Relaxed))
    }

    pub(super) fn initiated(&self, now: Time) {
        self.last_initiation
            .store(now.as_nanos(), Ordering::Relaxed);
    }

    /// When an initiation was last sent.
    pub(super) fn last_initiation(&self) -> Option<Time> {
        Time::from_nanos(self.last_initiation.load(Ordering::Relaxed))
    }

    /// Lets the next initiation go out at once.
    pub(super) fn forget_initiation(&self) {
        self.last_initiation.store(0, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Peer").field(&self.key).finish()
    }
}
