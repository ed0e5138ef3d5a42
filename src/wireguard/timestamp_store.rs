//! Writes timestamps to the embedder's store, on a thread of its own: the mark that this device's
//! timestamps have reached, and the greatest that was accepted from each peer.
//!
//! The store writes to a disk, which may be slow or hang. A handshake waits for that at most [`PATIENCE`],
//! and usually not at all: the device's own timestamps are reserved long before they are needed, see
//! `timestamp`. The timestamp of a peer is written after the answer. A crash between the two loses it: an
//! initiation that was accepted in that time (a second, or twenty times what the disk takes) is answered
//! once more if it is sent again after the restart. The answer is useful to its initiator only, and it
//! moves no endpoint.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::abort::AbortOnPanic;
use super::timestamp::{Accepted, Store, Timestamp};

/// A handshake waits this long for a mark that it needs. A disk that works takes a tenth of it.
const PATIENCE: Duration = Duration::from_millis(250);
/// The end of a device waits this long for unwritten timestamps.
const PARTING: Duration = Duration::from_secs(2);

/// The writing thread and its state. Dropping it ends the thread after its last write, unless that takes
/// too long.
pub(super) struct StoreWriter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Whether a handshake has waited in vain since the last mark was written.
    late: bool,
}

/// The least pause between two writes of accepted timestamps, and the pause as a multiple of the duration
/// of the write: no disk spends more than a twentieth of its time on them.
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
    /// Whether an accepted timestamp is not written yet.
    accepted: bool,
    end: bool,
    ended: bool,
}

impl StoreWriter {
    /// Starts the thread. `floor` is the last mark of earlier runs, `accepted` the timestamps of peers.
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

    /// The last mark that was reserved, written or not.
    pub(super) fn wanted(&self) -> Timestamp {
        self.shared.marks().wanted
    }

    /// Reserves a mark; returns at once.
    pub(super) fn reserve(&self, mark: Timestamp) {
        let mut marks = self.shared.marks();
        marks.wanted = marks.wanted.max(mark);
        self.shared.changed.notify_all();
    }

    /// Starts to write the timestamps of peers; returns at once.
    pub(super) fn keep_accepted(&self) {
        self.shared.marks().accepted = true;
        self.shared.changed.notify_all();
    }

    /// Replaces the reserved mark by the last timestamp that was used. None may be used after this.
    pub(super) fn settle(&mut self, used: Timestamp) {
        self.shared.marks().wanted = used;
        self.shared.changed.notify_all();
    }

    /// Waits until the written mark is no earlier than a timestamp that is about to be used, for at most
    /// [`PATIENCE`]. After a wait in vain it does not wait again until the disk has caught up.
    pub(super) fn wait(&mut self, timestamp: Timestamp) {
        let patience = if self.late { Duration::ZERO } else { PATIENCE };
        let written = self
            .shared
            .wait(patience, |marks| marks.written >= timestamp);
        if written && self.late {
            tracing::info!("timestamp mark written to disk");
        } else if !written && !self.late {
            tracing::warn!(
                "disk too slow to write the timestamp mark: handshakes go on, but peers may refuse them after a crash if the clock is set back"
            );
        }
        self.late = !written;
    }

    /// Whether the mark of the last wait is not written yet.
    #[cfg(test)]
    pub(super) fn is_late(&self) -> bool {
        self.late
    }
}

impl Shared {
    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a condition, for at most this time; returns whether it holds.
    fn wait(&self, patience: Duration, condition: impl Fn(&Marks) -> bool) -> bool {
        let (marks, _) = self
            .changed
            .wait_timeout_while(self.marks(), patience, |marks| !condition(marks))
            .unwrap_or_else(PoisonError::into_inner);
        condition(&marks)
    }

    /// Writes each new mark, the latest if there are several, and the timestamps of peers, with pauses.
    #[expect(
        clippy::disallowed_methods,
        reason = "the pauses spare the disk, whose time no test passes in"
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
        // A thread that hangs on the disk ends with the process.
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
