//! Events of peers for the control plane: which peers to look at, and when.
//!
//! An event is one bit of its peer. A thread that carries packets sets the bit and, with the first event
//! since the last wake-up, wakes the handshake thread, which calls the embedder. It takes no lock,
//! allocates nothing and never waits for the embedder, and a packet without an event costs nothing.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// What happened with one peer since its events were last taken.
///
/// # Contract
/// - The device calls [`super::Options::on_events`] after an event that was not taken yet, on its handshake
///   thread. The function should return soon: handshakes and timers wait for it. Packets do not.
/// - Events are a set for each peer, so several handshakes may be one event. They name the peers to look at;
///   the values are in [`super::Device::stats`]. Read these after [`super::Device::take_events`], and nothing
///   is missed.
/// - Calls coalesce too. One may come when everything was taken already.
/// - `handshake`, `endpoint` and `heard` are reported at once, `silent` and `expired` up to 0.2 seconds late.
/// - A peer that is removed takes its events along; one whose key changes keeps them.
/// - There is no event for the passing of time or the growth of counters.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PeerEvents {
    /// A handshake was completed.
    pub handshake: bool,
    /// The endpoint has changed, because a message of the peer came from another address.
    pub endpoint: bool,
    /// Data or an initiation was sent, and nothing came back for [`super::SILENT_AFTER`].
    pub silent: bool,
    /// Something came from a peer that was silent.
    pub heard: bool,
    /// The last handshake was [`super::REJECT_AFTER_TIME`] ago, so there is no session any more.
    pub expired: bool,
}

/// An event of a peer, as its bit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Handshake = 1,
    Endpoint = 2,
    Silent = 4,
    Heard = 8,
    Expired = 16,
}

/// The events of one peer that were not taken yet.
#[derive(Debug, Default)]
pub(super) struct Pending(AtomicU8);

impl Pending {
    pub(super) fn add(&self, event: Event) {
        self.0.fetch_or(event as u8, Ordering::Release);
    }

    /// Takes over the events of a peer in whose place this one comes.
    pub(super) fn inherit(&self, before: &Self) {
        let bits = before.0.swap(0, Ordering::AcqRel);
        self.0.fetch_or(bits, Ordering::Release);
    }

    /// The events so far, which are forgotten; `None` if there are none.
    pub(super) fn take(&self) -> Option<PeerEvents> {
        if self.0.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let bits = self.0.swap(0, Ordering::AcqRel);
        let has = |event: Event| bits & event as u8 != 0;
        (bits != 0).then(|| PeerEvents {
            handshake: has(Event::Handshake),
            endpoint: has(Event::Endpoint),
            silent: has(Event::Silent),
            heard: has(Event::Heard),
            expired: has(Event::Expired),
        })
    }
}

/// Whether the embedder must be called.
#[derive(Debug, Default)]
pub(super) struct Signal(AtomicBool);

impl Signal {
    /// Asks for a call; true if none was asked for yet.
    pub(super) fn set(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Whether a call was asked for. The next event asks for another one.
    pub(super) fn take(&self) -> bool {
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::AcqRel)
    }
}
