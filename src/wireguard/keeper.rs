//! Has the high-water mark of timestamps remembered, on a thread of its own.
//!
//! Whoever embeds the device writes the mark to a disk, and a disk may take its time or hang. No
//! handshake waits for that longer than a moment, and as a rule none waits at all: the next mark is
//! asked for long before it is needed, see `timestamp`.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::threads::AbortOnPanic;
use super::timestamp::{Persist, Timestamp};

/// So long a handshake waits for a mark that it needs. A disk that does its work takes a tenth of it.
const PATIENCE: Duration = Duration::from_millis(250);
/// So long the end of a device waits for what is still to be written.
const PARTING: Duration = Duration::from_secs(2);

/// The thread that writes, and what it knows. Dropping it ends the thread, after what it has still to
/// write unless that takes too long.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Whether somebody has waited in vain since the last mark was written.
    late: bool,
}

#[derive(Default)]
struct Shared {
    marks: Mutex<Marks>,
    changed: Condvar,
}

#[derive(Default)]
struct Marks {
    wanted: Timestamp,
    written: Timestamp,
    end: bool,
    ended: bool,
}

impl Keeper {
    /// Starts the thread; `floor` is the last mark of earlier runs.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(floor: Timestamp, persist: Persist) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        {
            let mut marks = shared.marks();
            (marks.wanted, marks.written) = (floor, floor);
        }
        let thread = {
            let shared = shared.clone();
            thread::Builder::new()
                .name("wg-timestamps".to_owned())
                .spawn(move || {
                    let _guard = AbortOnPanic;
                    shared.write(&persist);
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

    /// Writes the last mark that is wanted, each time there is another one.
    fn write(&self, persist: &Persist) {
        let mut marks = self.marks();
        loop {
            let idle = |marks: &mut Marks| marks.wanted <= marks.written && !marks.end;
            marks = self
                .changed
                .wait_while(marks, idle)
                .unwrap_or_else(PoisonError::into_inner);
            if marks.wanted <= marks.written {
                break;
            }
            let wanted = marks.wanted;
            drop(marks);
            persist(wanted);
            marks = self.marks();
            marks.written = wanted;
            self.changed.notify_all();
        }
        marks.ended = true;
        self.changed.notify_all();
    }
}

impl Drop for Keeper {
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

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper")
            .field("late", &self.late)
            .finish_non_exhaustive()
    }
}
