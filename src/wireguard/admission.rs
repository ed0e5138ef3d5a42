//! The queue of the handshake thread: what it has to do, and which handshake messages are admitted.
//!
//! A flood of messages from made-up addresses must neither fill the lanes of peers nor keep out a
//! stranger with a real one. [`recent_sources`] tells who asked just now, [`rate_limit`] how much one
//! source may ask for.

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
use super::peer::Peer;
use super::protocol::INITIATION_SIZE;
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

/// Work for the handshake thread.
pub(super) enum Job {
    /// A handshake message came.
    Message(Box<HandshakeMessage>),
    /// Something was to be sent to a peer, and there is no session or it is old.
    Initiate(Arc<Peer>),
    /// The peer may be at one of these addresses by now.
    TryCandidates(Arc<Peer>, Vec<SocketAddr>),
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
    bytes: [u8; INITIATION_SIZE],
    length: usize,
}

impl HandshakeMessage {
    fn new(message: &[u8], from: Endpoint, known: bool) -> Option<Self> {
        let mut bytes = [0; INITIATION_SIZE];
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
    recent_sources: OnceLock<RecentSources>,
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

    /// Queues a message of at most [`INITIATION_SIZE`] bytes, unless there are too many; `proven` says
    /// that it carries a valid cookie.
    ///
    /// # Errors
    /// Why a message was dropped: this one, or where it came to a full lane of strangers the one that
    /// had waited longest there.
    pub(super) fn push_message(
        &self,
        message: &[u8],
        from: Endpoint,
        proven: bool,
        now: Time,
    ) -> Result<(), Dropped> {
        let address = from.remote.ip();
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
        let message = HandshakeMessage::new(message, from, known).ok_or(Dropped::Malformed)?;
        let mut queue = self.queue();
        // Strangers are heard the newest first, so where one is too many it is the oldest.
        let mut yields = false;
        let (lane, limit) = if known {
            (&mut queue.known, MAX_QUEUED_KNOWN)
        } else if proven {
            (&mut queue.proven, MAX_QUEUED_KNOWN)
        } else if flooded && recency != Recency::New {
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn address(n: usize) -> Endpoint {
        let n = u32::try_from(n).unwrap();
        SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + n), 51820)).into()
    }

    #[test]
    fn when_too_many_strangers_wait_the_newest_is_heard_first_and_the_oldest_goes() {
        let jobs = Jobs::default();
        // Slowly enough for no flood, in which an address may be taken for another one now and then.
        let at = |n: usize| Time::from_duration(FLOOD_WINDOW * u32::try_from(n / 100).unwrap());
        let ask = |n| jobs.push_message(&[1; INITIATION_SIZE], address(n), false, at(n));
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
            let message = [kind; INITIATION_SIZE];
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
