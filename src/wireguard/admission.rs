//! The queue of the handshake thread: its jobs, and the handshake messages that are admitted.
//!
//! A flood of messages from forged addresses must neither fill the lanes of peers nor keep out an unknown
//! sender with a real address. [`recent_sources`] finds the addresses that sent a message within the last
//! seconds, [`rate_limit`] limits the messages of each source under load.

pub(super) mod rate_limit;
mod recent_sources;

use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};

use self::recent_sources::{Recency, RecentSources};
use super::clock::Time;
use super::drops::Dropped;
use super::key::PublicKey;
use super::peer::Peer;
use super::protocol::INITIATION_SIZE;
use super::udp::Endpoint;
use super::way::Way;

/// The most handshake messages of unknown senders that wait, as in the kernel.
const MAX_QUEUED: usize = 4096;
/// The most that wait from addresses of peers, and the most with a valid cookie.
const MAX_QUEUED_KNOWN: usize = 512;
/// In a flood, a sender that repeats itself is admitted only while fewer messages than this wait.
const MAX_REPEATED: usize = 16;
/// More messages of unknown senders than this within [`FLOOD_WINDOW`] are a flood: to process 512 a second
/// takes a tenth of a CPU.
const FLOOD: u32 = 128;
const FLOOD_WINDOW: Duration = Duration::from_millis(250);
/// A flood lasts at least this long, so that the state does not change with every batch.
pub(super) const LOAD_LASTS: Duration = Duration::from_secs(1);

/// Work for the handshake thread.
pub(super) enum Job {
    /// A handshake message was received.
    Message(Box<HandshakeMessage>),
    /// There is a packet for a peer, and no session or an old one.
    Initiate(Arc<Peer>),
    /// A peer with a new key was added: an initiation of it may be held.
    KeysAdded,
    /// The peer may have moved to one of these addresses.
    TryCandidates(Arc<Peer>, Vec<SocketAddr>),
    /// Try a handshake with the peer under this key of the device.
    TryIdentity(Arc<Peer>, PublicKey),
    /// The peer sent to a local address. Look up whether the present route uses it as its source.
    Source(Arc<Peer>, Endpoint),
    /// A session is in use now: send the packets that waited for it.
    Flush(Arc<Peer>),
    /// Send the peer a keepalive now.
    Keepalive(Arc<Peer>),
}

/// A handshake message as it was received.
#[derive(Clone)]
pub(super) struct HandshakeMessage {
    pub(super) from: Way,
    /// The relay that it came through.
    pub(super) through: Option<Arc<Peer>>,
    /// Whether it came from the address of a peer.
    pub(super) known: bool,
    bytes: [u8; INITIATION_SIZE],
    length: usize,
}

impl HandshakeMessage {
    /// A message of at most [`INITIATION_SIZE`] bytes.
    pub(super) fn new(
        message: &[u8],
        (from, through): (Way, Option<Arc<Peer>>),
        known: bool,
    ) -> Option<Self> {
        let mut bytes = [0; INITIATION_SIZE];
        bytes.get_mut(..message.len())?.copy_from_slice(message);
        Some(Self {
            from,
            through,
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
/// Messages from the addresses of peers have a lane of their own, and so have those with a valid cookie: a
/// flood from other addresses neither fills nor delays these lanes. In a flood, the lane of unknown senders
/// admits those that have sent no message within the last seconds. To refuse one of the others takes two
/// reads of memory, no lock and no wake-up.
#[derive(Default)]
pub(super) struct Jobs {
    queue: Mutex<Queue>,
    /// The addresses that peers last used.
    known: ArcSwap<HashSet<IpAddr>>,
    flood: Flood,
    /// Made with the first flood.
    recent_sources: OnceLock<RecentSources>,
    /// Called when a job is added to an empty queue.
    waker: ArcSwapOption<Waker>,
}

pub(super) struct Waker(pub(super) Box<dyn Fn() + Send + Sync>);

/// Whether unknown senders send more messages than there is time for.
#[derive(Debug, Default)]
struct Flood {
    window: AtomicU64,
    messages: AtomicU32,
    /// In nanoseconds.
    until: AtomicU64,
}

impl Flood {
    /// Counts a message; true if there is a flood.
    ///
    /// Threads that count at the same time may lose a few of many.
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
    /// The device's own jobs, whose number follows the number of peers.
    own: VecDeque<Job>,
    known: VecDeque<Box<HandshakeMessage>>,
    /// From unknown senders that have proved with a cookie that they receive at their address.
    proven: VecDeque<Box<HandshakeMessage>>,
    unknown: VecDeque<Box<HandshakeMessage>>,
}

impl Jobs {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_waker(&self, waker: Waker) {
        self.waker.store(Some(Arc::new(waker)));
    }

    pub(super) fn wake(&self) {
        if let Some(waker) = &*self.waker.load() {
            (waker.0)();
        }
    }

    pub(super) fn push(&self, job: Job) {
        self.queue().own.push_back(job);
        self.wake();
    }

    /// Queues a message of at most [`INITIATION_SIZE`] bytes, unless there are too many; `through` is the relay that
    /// it came through, and `proven` says that it carries a valid cookie.
    ///
    /// # Errors
    /// The reason why a message was dropped: this one, or the oldest of a full lane of unknown senders.
    pub(super) fn push_message(
        &self,
        message: &[u8],
        from: Way,
        through: Option<&Arc<Peer>>,
        proven: bool,
        now: Time,
    ) -> Result<(), Dropped> {
        let address = from.remote().ip();
        let known = self.known.load().contains(&address);
        let (mut flooded, mut recency) = (false, Recency::New);
        if !known && !proven {
            flooded = self.flood.note(now);
            if flooded {
                self.recent_sources.get_or_init(RecentSources::default);
            }
            if let Some(recent_sources) = self.recent_sources.get() {
                recency = recent_sources.note(address, now);
            }
            if flooded && recency == Recency::Recent {
                return Err(Dropped::RateLimited);
            }
        }
        let message = HandshakeMessage::new(message, (from, through.cloned()), known)
            .ok_or(Dropped::Malformed)?;
        let mut queue = self.queue();
        // The newest message of an unknown sender is processed first, so a full lane drops the oldest.
        let mut yields = false;
        let (lane, limit) = if known {
            (&mut queue.known, MAX_QUEUED_KNOWN)
        } else if proven {
            (&mut queue.proven, MAX_QUEUED_KNOWN)
        } else if flooded && recency != Recency::New {
            (&mut queue.unknown, MAX_REPEATED)
        } else {
            yields = true;
            (&mut queue.unknown, MAX_QUEUED)
        };
        let full = lane.len() >= limit;
        if full && !yields {
            return Err(Dropped::QueueFull);
        }
        let oldest = if full { lane.pop_front() } else { None };
        lane.push_back(Box::new(message));
        // A thread that empties the lane looks at it again. In a flood the thread wakes up by its timer.
        let was_empty = lane.len() == 1;
        drop(queue);
        if was_empty && !flooded {
            self.wake();
        }
        oldest.map_or(Ok(()), |_| Err(Dropped::QueueFull))
    }

    /// Whether unknown senders send more messages than there is time for. Then their messages wait for
    /// the timer of the handshake thread and do not wake it.
    pub(super) fn is_flooded(&self, now: Time) -> bool {
        self.flood.is_on(now)
    }

    /// The next job: the device's own first, then messages of peers, then, with `unknown`, messages of
    /// unknown senders, those with a cookie before the others. Also returns whether so many messages of
    /// peers wait that the device is under load.
    pub(super) fn pop(&self, unknown: bool) -> Option<(Job, bool)> {
        let mut queue = self.queue();
        let job = if let Some(job) = queue.own.pop_front() {
            job
        } else if let Some(message) = queue.known.pop_front() {
            Job::Message(message)
        } else {
            let proven = if unknown {
                queue.proven.pop_front()
            } else {
                None
            };
            let message = match proven {
                // The newest first: the sender of an old one has sent another by now, and in a flood a
                // new one would have to wait for all before it.
                None if unknown => queue.unknown.pop_back(),
                proven => proven,
            };
            Job::Message(message?)
        };
        let loaded = queue.known.len() >= MAX_QUEUED_KNOWN / 8;
        Some((job, loaded))
    }

    /// The number of messages of unknown senders that wait.
    pub(super) fn unknown(&self) -> usize {
        let queue = self.queue();
        queue.proven.len() + queue.unknown.len()
    }

    /// Sets the addresses of peers.
    pub(super) fn set_known(&self, known: HashSet<IpAddr>) {
        if **self.known.load() != known {
            self.known.store(Arc::new(known));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn address(n: usize) -> Way {
        let n = u32::try_from(n).unwrap();
        let address = SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + n), 51820));
        Way::Direct(address.into())
    }

    #[test]
    fn a_full_lane_of_unknown_senders_drops_the_oldest_and_serves_the_newest_first() {
        let jobs = Jobs::default();
        // Too slowly for a flood, in which two addresses may be confused now and then.
        let at = |n: usize| Time::from_duration(FLOOD_WINDOW * u32::try_from(n / 100).unwrap());
        let ask = |n| jobs.push_message(&[1; INITIATION_SIZE], address(n), None, false, at(n));
        for n in 0..MAX_QUEUED {
            ask(n).unwrap();
        }
        assert_eq!(ask(MAX_QUEUED), Err(Dropped::QueueFull));

        let served: Vec<_> = std::iter::from_fn(|| jobs.pop(true))
            .map(|(job, _)| {
                let Job::Message(message) = job else {
                    unreachable!("nothing else was asked for")
                };
                message.from.remote()
            })
            .collect();
        let newest_first: Vec<_> = (1..=MAX_QUEUED)
            .rev()
            .map(|n| address(n).remote())
            .collect();
        assert_eq!(served, newest_first);
    }

    #[test]
    fn messages_of_peers_are_served_in_order_and_a_full_lane_drops_the_newest() {
        let jobs = Jobs::default();
        jobs.set_known([address(0).remote().ip()].into());
        let ask = |kind| {
            let message = [kind; INITIATION_SIZE];
            jobs.push_message(&message, address(0), None, false, Time::default())
        };
        for n in 0..MAX_QUEUED_KNOWN {
            ask(u8::try_from(n % 7).unwrap()).unwrap();
        }
        assert_eq!(ask(99), Err(Dropped::QueueFull));
        let served = std::iter::from_fn(|| jobs.pop(false))
            .filter(|(job, _)| matches!(job, Job::Message(message) if message.bytes()[0] != 99));
        assert_eq!(served.count(), MAX_QUEUED_KNOWN);
    }
}
