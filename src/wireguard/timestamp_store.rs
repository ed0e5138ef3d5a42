//! Has timestamps kept by the embedder's store, on a thread of its own: how far this device's have come,
//! and the greatest that was accepted of each peer.
//!
//! A store writes to a disk, and a disk may take its time or hang. No handshake waits for that longer
//! than a moment, and as a rule none waits at all: the device's own timestamps are reserved long before
//! they are needed, see `timestamp`. What was accepted of a peer is written after the answer. A crash
//! between the two loses it: an initiation that was accepted within that time (a second, or twenty times
//! what the disk takes) is answered once more if it is sent again after the restart. The answer is of no
//! use to anyone but its initiator, and it moves no endpoint.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::abort::AbortOnPanic;
use super::timestamp::{Accepted, Store, Timestamp};

/// So long a handshake waits for a mark that it needs. A disk that does its work takes a tenth of it.
const PATIENCE: Duration = Duration::from_millis(250);
/// So long the end of a device waits for what is still to be written.
const PARTING: Duration = Duration::from_secs(2);

/// The thread that writes, and what it knows. Dropping it ends the thread, after what it has still to
/// write unless that takes too long.
pub(super) struct StoreWriter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Whether somebody has waited in vain since the last mark was written.
    late: bool,
}

/// The least time between two writes of what was accepted, and how many times a write's own time: so that
/// no disk is busy with it for more than a twentieth of its time.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_BY_WRITE: u32 = 20;

struct Shared {
    marks: Mutex<Marks>,
    changed: Condvar,
    accepted: Arc<Mutex<Accepted>>,
}

#[derive(Default)]
struct Marks {
    wanted: Timestamp,
    written: Timestamp,
    /// Whether something was accepted that is not written.
    accepted: bool,
    end: bool,
    ended: bool,
}

impl StoreWriter {
    /// Starts the thread; `floor` is the last mark of earlier runs, `accepted` what was accepted of peers.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(
        floor: Timestamp,
        accepted: Arc<Mutex<Accepted>>,
        store: Box<dyn Store>,
    ) -> io::Result<Self> {
        let marks = Marks {
            wanted: floor,
            written: floor,
            ..Marks::default()
        };
        let shared = Arc::new(Shared {
            marks: Mutex::new(marks),
            changed: Condvar::new(),
            accepted,
        });
        let thread = {
            let shared = shared.clone();
            thread::Builder::new()
                .name("wg-timestamps".to_owned())
                .spawn(move || {
                    let _guard = AbortOnPanic;
                    shared.write(&*store);
                })?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
            late: false,
        })
    }

    /// The last mark that was asked for, written or not.
    pub(super) fn wanted(&self) -> Timestamp {
        self.shared.marks().wanted
    }

    /// Asks for a mark; returns at once.
    pub(super) fn reserve(&self, mark: Timestamp) {
        let mut marks = self.shared.marks();
        marks.wanted = marks.wanted.max(mark);
        self.shared.changed.notify_all();
    }

    /// Asks for what was accepted of peers to be written; returns at once.
    pub(super) fn keep_accepted(&self) {
        self.shared.marks().accepted = true;
        self.shared.changed.notify_all();
    }

    /// Asks for the last timestamp that was used in the place of what is reserved: none follows.
    pub(super) fn settle(&mut self, used: Timestamp) {
        self.shared.marks().wanted = used;
        self.shared.changed.notify_all();
    }

    /// Waits until the mark that is written is no earlier than a timestamp that is to be used, unless
    /// that takes too long: then once, and not again until the disk is back.
    pub(super) fn wait(&mut self, timestamp: Timestamp) {
        let patience = if self.late { Duration::ZERO } else { PATIENCE };
        let written = self
            .shared
            .wait(patience, |marks| marks.written >= timestamp);
        if written && self.late {
            tracing::info!("the disk has taken how far timestamps have come");
        } else if !written && !self.late {
            tracing::warn!(
                "the disk is slow to take how far timestamps have come; handshakes go on, but should this process end before it has, and the clock be set back, peers may refuse them for a while"
            );
        }
        self.late = !written;
    }

    /// Whether the mark that was last waited for is not written yet.
    #[cfg(test)]
    pub(super) fn is_late(&self) -> bool {
        self.late
    }
}

impl Shared {
    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something at most so long; tells whether it is so.
    fn wait(&self, patience: Duration, condition: impl Fn(&Marks) -> bool) -> bool {
        let (marks, _) = self
            .changed
            .wait_timeout_while(self.marks(), patience, |marks| !condition(marks))
            .unwrap_or_else(PoisonError::into_inner);
        condition(&marks)
    }

    /// Writes the last mark that is wanted, each time there is another one, and what was accepted of
    /// peers, with pauses.
    #[expect(
        clippy::disallowed_methods,
        reason = "the pauses are for the disk, whose time no test passes in"
    )]
    fn write(&self, store: &dyn Store) {
        let mut pause_until = Instant::now();
        let mut marks = self.marks();
        loop {
            let now = Instant::now();
            let may_keep = marks.end || now >= pause_until;
            if marks.wanted != marks.written {
                let wanted = marks.wanted;
                drop(marks);
                store.keep_own(wanted);
                marks = self.marks();
                marks.written = wanted;
                self.changed.notify_all();
            } else if marks.accepted && may_keep {
                marks.accepted = false;
                drop(marks);
                let accepted = self
                    .accepted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                store.keep_accepted(&accepted);
                let took = now.elapsed();
                pause_until = Instant::now() + PAUSE.max(took * PAUSE_BY_WRITE);
                marks = self.marks();
            } else if marks.end {
                break;
            } else if marks.accepted {
                let (woken, _) = self
                    .changed
                    .wait_timeout(marks, pause_until.saturating_duration_since(now))
                    .unwrap_or_else(PoisonError::into_inner);
                marks = woken;
            } else {
                let woken = self.changed.wait(marks);
                marks = woken.unwrap_or_else(PoisonError::into_inner);
            }
        }
        marks.ended = true;
        self.changed.notify_all();
    }
}

impl Drop for StoreWriter {
    fn drop(&mut self) {
        self.shared.marks().end = true;
        self.shared.changed.notify_all();
        // A thread that hangs on the disk is left to the end of the process.
        if self.shared.wait(PARTING, |marks| marks.ended)
            && let Some(thread) = self.thread.take()
        {
            // One that panicked has ended the process.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for StoreWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreWriter")
            .field("late", &self.late)
            .finish_non_exhaustive()
    }
}
