//! What the threads of a device share: peers, indices, keys, and the way to the handshake thread.
//!
//! No I/O and no clock: the same core runs under a test that carries its datagrams by hand.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519;

use super::clock::Time;
use super::configure::Configured;
use super::drops::{Dropped, Drops};
use super::indices::Indices;
use super::key::{PrivateKey, PublicKey};
use super::peer::Peer;
use super::table::Table;
use super::timers::REKEY_TIMEOUT;
use super::timestamp::{Timestamp, Timestamps};
use super::udp::Endpoint;

/// The most handshake messages that wait, as in the kernel.
pub(super) const MAX_QUEUED: usize = 4096;

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
    /// The wall clock, for timestamps and nothing else.
    pub(super) wall: fn() -> Timestamp,
    mtu: AtomicUsize,
    up: AtomicBool,
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
    /// A session is in use now: what waited for it may go.
    Flush(Arc<Peer>),
    /// The peer is to hear from us now.
    Keepalive(Arc<Peer>),
}

/// A handshake message as it came.
pub(super) struct HandshakeMessage {
    pub(super) from: Endpoint,
    bytes: [u8; MAX_HANDSHAKE],
    length: usize,
}

impl HandshakeMessage {
    /// Keeps a message of at most [`MAX_HANDSHAKE`] bytes.
    pub(super) fn new(message: &[u8], from: Endpoint) -> Option<Self> {
        let mut bytes = [0; MAX_HANDSHAKE];
        bytes.get_mut(..message.len())?.copy_from_slice(message);
        Some(Self {
            from,
            bytes,
            length: message.len(),
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The queue of the handshake thread.
#[derive(Default)]
pub(super) struct Jobs {
    queue: Mutex<Queue>,
    /// Called after a job was queued.
    waker: ArcSwapOption<Waker>,
}

pub(super) struct Waker(pub(super) Box<dyn Fn() + Send + Sync>);

#[derive(Default)]
struct Queue {
    /// Asked for by the device itself, and bounded by the number of peers.
    own: VecDeque<Job>,
    /// Handshake messages, from anybody.
    messages: VecDeque<Box<HandshakeMessage>>,
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

    /// Queues a message, unless there are too many.
    pub(super) fn push_message(&self, message: HandshakeMessage) -> Result<(), Dropped> {
        let mut queue = self.queue();
        if queue.messages.len() >= MAX_QUEUED {
            return Err(Dropped::QueueFull);
        }
        queue.messages.push_back(Box::new(message));
        drop(queue);
        self.wake();
        Ok(())
    }

    /// The next job, those of the device itself first, and how many messages wait behind it.
    pub(super) fn pop(&self) -> Option<(Job, usize)> {
        let mut queue = self.queue();
        let job = match queue.own.pop_front() {
            Some(job) => job,
            None => Job::Message(queue.messages.pop_front()?),
        };
        Some((job, queue.messages.len()))
    }
}

impl Core {
    pub(super) fn new(mtu: u32, timestamps: Timestamps, wall: fn() -> Timestamp) -> Self {
        let core = Self {
            table: ArcSwap::from_pointee(Table::default()),
            indices: Indices::default(),
            drops: Drops::default(),
            identity: ArcSwapOption::empty(),
            jobs: Jobs::default(),
            configured: Mutex::default(),
            timestamps: Mutex::new(timestamps),
            wall,
            mtu: AtomicUsize::new(0),
            up: AtomicBool::new(false),
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
    use super::*;

    #[test]
    fn packets_are_padded_to_16_bytes_but_never_beyond_the_mtu() {
        let timestamps = Timestamps::new(Timestamp::default(), None);
        let core = Core::new(1420, timestamps, Timestamp::default);
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
}
